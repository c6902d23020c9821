"""What benches share that time one op in many forms."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch

from dsv4.bench.clock import Call, in_graph
from dsv4.bench.ops import l2_cache, record, sets
from dsv4.check.contract import Arguments
from dsv4.errors import KernelError

_CALLS: Final = 16  # of a graph, at least
_SAMPLES: Final = 7
_SHOWN: Final = 6


def in_turn(run: Callable[..., Any], given: Arguments, device: torch.device) -> list[Call]:
    """The call with copies of its arguments, as many as overflow the second cache."""
    copies = sets(given, l2_cache(device))
    return [partial(run, *one) for one in copies] * -(-_CALLS // len(copies))


def microseconds(calls: list[Call]) -> float | None:
    """Of one of the calls, in a graph; None for a form that no kernel takes."""
    try:
        return round(1e6 * in_graph(calls, _SAMPLES).seconds, 3)
    except KernelError:
        return None


def tell(
    what: str, case: str, chosen: str, found: Mapping[str, float], path: Path | None, device: torch.device
) -> None:
    """Print the best forms of a case, and append all to a file of results, if there is one."""
    best = sorted(found.items(), key=lambda pair: pair[1])[:_SHOWN]
    print(f"{case}: chosen {chosen}; " + "  ".join(f"{form} {us:.2f}" for form, us in best), flush=True)
    if path:
        record(path, {"what": what, "case": case, "chosen": chosen, "us": found}, device)
