"""How a matrix should lie on blocks: `python -m bench.linear_forms [--json FILE]` on a Hopper GPU.

One line a timed case: the best forms, microseconds by segments, clusters and stages. These figures chose `form` and
`memory` of dsv4/kernels/linear.py. (Segments change the order of the sums, the others do not.)
"""

from __future__ import annotations

import argparse
from functools import partial
from itertools import product
from pathlib import Path

import torch

from dsv4.bench.clock import in_graph
from dsv4.bench.ops import l2_cache, record, sets, timed
from dsv4.check.contract import placed
from dsv4.check.verify import prepare
from dsv4.errors import KernelError
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
        copies = sets(given, l2_cache(device))
        calls = [partial(run, *one) for one in copies] * -(-16 // len(copies))
        tiles, chosen = given[1].shape[0] // 64, form(*given[1].shape)
        ours = f"{chosen.segments} {chosen.clusters} {memory(chosen, given[1].shape[1], 8)[0]}"
        found: dict[str, float] = {}
        for segments, places, stages in product(SEGMENTS, PLACES, STAGES):
            clusters = min(tiles, places // segments)
            tried = linear.Form(segments, clusters, -(-tiles // clusters))
            linear.form = lambda *_, tried=tried: tried  # type: ignore[assignment,misc]
            linear._STAGES = linear._FEWEST = stages  # type: ignore[misc]
            memory.cache_clear()
            try:
                found[f"{segments} {tried.clusters} {stages}"] = round(1e6 * in_graph(calls, 7).seconds, 3)
            except KernelError:
                continue
        best = sorted(found.items(), key=lambda pair: pair[1])[:6]
        print(f"{case.name}: chosen {ours}; " + "  ".join(f"{form} {us:.2f}" for form, us in best), flush=True)
        if asked.json:
            line = {"what": "linear forms", "case": case.name, "chosen": ours, "us": found}
            record(asked.json, line, device)


if __name__ == "__main__":
    main()
