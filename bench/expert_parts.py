"""What each kernel of the experts takes: `python -m bench.expert_parts [--json FILE]` on a Hopper GPU.

Each kernel alone in a CUDA graph, over experts that no cache holds. `whole` is the op, whose kernels run in turn.
GB/s: of the weights that are chosen and of the shared expert's.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import torch

from dsv4.bench.clock import in_graph
from dsv4.bench.ops import TURNS, record, timed
from dsv4.check.cases.experts import nbytes
from dsv4.check.contract import Arguments, placed
from dsv4.check.verify import prepare
from dsv4.kernels import experts
from dsv4.ops.experts import stored_moe


def parts(given: Arguments) -> dict[str, partial[object]]:
    """Calls of the kernels with arguments that fit each other."""
    x, picks, stored, limit, dtype = given
    (tokens, d), k, device = x.shape, picks.experts.shape[1], x.device
    whole = partial(stored_moe.implementations["fused"].run, *given)
    if experts.few(tokens, k, d):
        up, down = experts.few_parts(*given)
        up()
        return {"up": partial(up), "down": partial(down), "whole": whole}
    width, form = stored.routed.down.shape[1], experts.choose(tokens, k, stored.many)
    most = experts.most_groups(tokens, k, stored.many, form.wide)
    groups = experts._grouped(x, picks, stored.many, form.wide, most)
    hidden = torch.empty(most, width // 128, form.wide, 128, dtype=torch.uint8, device=device)
    scale, y = torch.empty(most, width // 128, form.wide, device=device), torch.empty(tokens, k + 1, d, dtype=dtype)
    y = y.to(device)
    first = partial(experts._up, stored, form, groups, limit, hidden, scale)
    first()
    return {
        "tokens": partial(experts._grouped, x, picks, stored.many, form.wide, most),
        "up": first,
        "down": partial(experts._down, stored, form, groups, hidden, scale, y),
        "whole": whole,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", type=Path, help="append one line for each case to this file")
    parser.add_argument("--case", default="", help="only cases whose name has this in it")
    asked = parser.parse_args()
    prepare()
    device = torch.device("cuda", 0)
    for case in timed("moe", op="stored_moe", only=asked.case):
        given = placed(case.make(), device)
        assert case.turn
        sets = [parts(case.turn(given, number)) for number in range(TURNS if len(given[0]) <= 64 else 1)]
        us = {name: 1e6 * in_graph([one[name] for one in sets], 15).seconds for name in sets[0]}
        chosen = len(given[1].experts.unique())
        up, down = (
            chosen * nbytes(routed) + nbytes(shared)
            for routed, shared in zip(given[2].routed, given[2].shared, strict=True)
        )
        weights = {"up": up, "down": down, "whole": up + down}
        rates = {name: round(size / us[name] / 1e3) for name, size in weights.items()}
        print(f"{case.name}: " + "  ".join(f"{name} {t:.2f} us" for name, t in us.items()), rates, flush=True)
        if asked.json:
            record(asked.json, {"what": "expert parts", "case": case.name, "us": us, "GB/s": rates}, device)


if __name__ == "__main__":
    main()
