"""How a matrix should lie on blocks: `python -m bench.linear_forms [--json FILE]` on a Hopper GPU.

One line a timed case: the best forms, microseconds by segments, clusters and stages. These figures chose `form` and
`memory` of dsv4/kernels/linear.py. (Segments change the order of the sums, the others do not.)
"""

from __future__ import annotations

import argparse
from itertools import product
from pathlib import Path

import torch

from bench.forms import in_turn, microseconds, tell
from dsv4.bench.ops import timed
from dsv4.check.contract import placed
from dsv4.check.verify import prepare
from dsv4.kernels import linear
from dsv4.ops.linear import scaled_matmul

SEGMENTS, PLACES, STAGES = (1, 2, 4), (132, 224, 264, 396), (4, 5, 6, 7, 8, 10, 12)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", type=Path, help="append one line for each case to this file")
    parser.add_argument("--case", default="", help="only cases whose name has this in it")
    asked = parser.parse_args()
    prepare()
    device, run = torch.device("cuda", 0), scaled_matmul.implementations["fused"].run
    form, memory = linear.form, linear.memory
    for case in timed("linear", only=asked.case):
        given = placed(case.make(), device)
        if case.op is not scaled_matmul or len(given[0]) > linear.FEW:
            continue
        calls = in_turn(run, given, device)
        tiles, chosen = given[1].shape[0] // 64, form(*given[1].shape)
        ours = f"{chosen.segments} {chosen.clusters} {memory(chosen, given[1].shape[1], 8)[0]}"
        found: dict[str, float] = {}
        for segments, places, stages in product(SEGMENTS, PLACES, STAGES):
            clusters = min(tiles, places // segments)
            tried = linear.Form(segments, clusters, -(-tiles // clusters))
            linear.form = lambda *_, tried=tried: tried  # type: ignore[assignment,misc]
            linear._STAGES = linear._FEWEST = stages  # type: ignore[misc]
            memory.cache_clear()
            if (us := microseconds(calls)) is not None:
                found[f"{segments} {tried.clusters} {stages}"] = us
        tell("linear forms", case.name, ours, found, asked.json, device)


if __name__ == "__main__":
    main()
