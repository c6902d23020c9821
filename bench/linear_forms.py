"""How a matrix should lie on blocks: `python -m bench.linear_forms [--json FILE]` on a Hopper GPU.

One line a timed case of one token: the best forms, microseconds by segments, clusters and stages. These figures chose
`form` of dsv4/kernels/linear.py. (Segments change the order of the sums, the others do not.)
"""

from __future__ import annotations

import argparse
import json
from itertools import product
from pathlib import Path

import torch

from dsv4.bench.ops import circumstances, measure, timed
from dsv4.errors import KernelError
from dsv4.kernels import linear

SEGMENTS, PLACES, STAGES = (1, 2, 4, 8), (132, 264, 396), (5, 6, 7, 8, 10, 12)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", type=Path, help="append one line for each case to this file")
    asked = parser.parse_args()
    device = torch.device("cuda", 0)
    for case in timed("linear"):
        if not case.name.endswith(" 1"):
            continue
        _, weight, _ = case.make()
        tiles, chosen = weight.shape[0] // 64, linear.form(*weight.shape)
        found: dict[str, float] = {}
        for segments, places, stages in product(SEGMENTS, PLACES, STAGES):
            form = linear.Form(segments, min(tiles, places // segments), stages)
            linear.form = lambda *_, form=form: form  # type: ignore[assignment,misc]
            try:
                line = next(measure([case], device, 5)).line()
            except (KernelError, StopIteration):
                continue
            found[" ".join(map(str, form))] = line["microseconds"]
        best = sorted(found.items(), key=lambda pair: pair[1])
        print(
            f"{case.name}: chosen {' '.join(map(str, chosen))}; " + "  ".join(f"{f} {us:.2f}" for f, us in best[:6]),
            flush=True,
        )
        if asked.json:
            line = {"what": "linear forms", "case": case.name, "chosen": chosen, "us": found}
            with asked.json.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line | circumstances(device)) + "\n")


if __name__ == "__main__":
    main()
