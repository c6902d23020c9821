"""How matrices that share an input should lie on blocks: `python -m bench.linear_mixed [--json FILE]` on a Hopper GPU.

One line a timed case: the best plans, microseconds by turns of the stored matrix and all blocks. No plan changes a bit.
These figures chose `plan` of dsv4/kernels/linear_mixed.py. (Dense tiles of 8 rows lost nearly everywhere and are gone.)
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
from dsv4.kernels import linear, linear_mixed
from dsv4.ops.linear import shared_input

TURNS, PLACES = (1, 2, 3, 4), (132, 192, 224, 264)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", type=Path, help="append one line for each case to this file")
    asked = parser.parse_args()
    prepare()
    device, run = torch.device("cuda", 0), shared_input.implementations["fused"].run
    plan = linear_mixed.plan
    for case in timed("linear", op="shared_input"):
        given = placed(case.make(), device)
        copies = sets(given, l2_cache(device))
        calls = [partial(run, *one) for one in copies] * -(-16 // len(copies))
        dense, stored = given[2].shape[0], given[3].shape
        chosen, own, tiles = plan(dense, *stored), linear.form(*stored), stored[0] // linear.TILE_ROWS
        found: dict[str, float] = {}
        for turns, places in product(TURNS, PLACES):
            clusters = -(-tiles // turns)
            blocks = min(-(-dense // 16), places - own.segments * clusters)
            if blocks < own.segments:
                continue
            form = linear.Form(own.segments, clusters, turns)
            tried = linear_mixed.Plan(blocks // own.segments * own.segments, form)
            linear_mixed.plan = lambda *_, tried=tried: tried  # type: ignore[assignment,misc]
            try:
                found[f"{turns} {places}"] = round(1e6 * in_graph(calls, 7).seconds, 3)
            except KernelError:
                continue
        best = sorted(found.items(), key=lambda pair: pair[1])[:5]
        ours = f"{chosen.form.turns} {chosen.form.segments * chosen.form.clusters + chosen.dense}"
        print(f"{case.name}: chosen {ours}; " + "  ".join(f"{form} {us:.2f}" for form, us in best), flush=True)
        if asked.json:
            line = {"what": "linear mixed", "case": case.name, "chosen": ours, "us": found}
            record(asked.json, line, device)


if __name__ == "__main__":
    main()
