"""How matrices that share an input should lie on blocks: `python -m bench.linear_mixed [--json FILE]` on a Hopper GPU.

One line a timed case: the best plans, microseconds by turns of the stored matrix and all blocks. No plan changes a bit.
These figures chose `plan` of dsv4/kernels/linear_mixed.py. (Dense tiles of 8 rows lost nearly everywhere and are gone.)
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
        calls = in_turn(run, given, device)
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
            if (us := microseconds(calls)) is not None:
                found[f"{turns} {places}"] = us
        ours = f"{chosen.form.turns} {chosen.form.segments * chosen.form.clusters + chosen.dense}"
        tell("linear mixed", case.name, ours, found, asked.json, device)


if __name__ == "__main__":
    main()
