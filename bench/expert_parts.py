"""What each kernel of the routed experts takes: `python -m bench.expert_parts [--json FILE]` on a Hopper GPU.

Each kernel alone in a CUDA graph, over experts that no cache holds. `whole` is the op, whose kernels run in turn,
`early` the op whose kernels start while the one in front runs, `down late` the same but for the second matrix.
GB/s: of the weights that are chosen.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Container
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from dsv4.bench.clock import in_graph
from dsv4.bench.ops import TURNS, record, timed
from dsv4.check.contract import Arguments, placed
from dsv4.check.verify import prepare
from dsv4.kernels import experts
from dsv4.kernels.launch import Kernel
from dsv4.ops.experts import routed_experts


def early(late: Container[Kernel], call: Callable[[], object]) -> object:
    """A call in which all kernels but the late ones start while the one in front of them runs."""
    usual = Kernel.__call__

    def launched(self: Kernel, *arguments: Any, **more: Any) -> None:
        usual(self, *arguments, pdl=self not in late, **more)

    with patch.object(Kernel, "__call__", launched):
        return call()


def parts(given: Arguments) -> dict[str, partial[object]]:
    """Calls of the kernels with arguments that fit each other."""
    x, picks, stored, _, limit = given
    (tokens, d), k, device = x.shape, picks.experts.shape[1], x.device
    count, width = len(stored.up.tiles), stored.down.shape[1]
    size = experts.wide(tokens, k, count)
    most = experts.most_groups(tokens * k, count, size)
    groups = experts._grouped(x, picks, count, size, most)
    hidden = torch.empty(most, width // 128, size, 128, dtype=torch.uint8, device=device)
    scale, y = torch.empty(most, width // 128, size, device=device), torch.empty(tokens, k, d, device=device).bfloat16()
    up = (experts._UP[size], stored.up, groups.image, groups.scale, groups, most, limit, groups.weight, hidden, scale)
    down = (experts._DOWN[size], stored.down, hidden, scale, groups, most, groups.pair, y)
    experts._multiply(*up)
    whole = partial(routed_experts.implementations["fused"].run, *given)
    return {
        "tokens": partial(experts._grouped, x, picks, count, size, most),
        "up": partial(experts._multiply, *up),
        "down": partial(experts._multiply, *down),
        "whole": whole,
        "early": partial(early, (), whole),
        "down late": partial(early, list(experts._DOWN.values()), whole),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", type=Path, help="append one line for each case to this file")
    parser.add_argument("--case", default="", help="only cases whose name has this in it")
    asked = parser.parse_args()
    prepare()
    device = torch.device("cuda", 0)
    for case in timed("experts", only=asked.case):
        given = placed(case.make(), device)
        assert case.turn
        sets = [parts(case.turn(given, number)) for number in range(TURNS if len(given[0]) <= 64 else 1)]
        us = {name: 1e6 * in_graph([one[name] for one in sets], 15).seconds for name in sets[0]}
        rows, columns = given[2].down.shape
        matrix = len(given[1].experts.unique()) * rows * columns * 17 / 32  # bytes of one of the three
        weights = {"up": 2 * matrix, "down": matrix} | dict.fromkeys(("whole", "early", "down late"), 3 * matrix)
        rates = {name: round(nbytes / us[name] / 1e3) for name, nbytes in weights.items()}
        print(f"{case.name}: " + "  ".join(f"{name} {t:.2f} us" for name, t in us.items()), rates, flush=True)
        if asked.json:
            record(asked.json, {"what": "expert parts", "case": case.name, "us": us, "GB/s": rates}, device)


if __name__ == "__main__":
    main()
