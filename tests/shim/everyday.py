"""The everyday cases on the shim: what is wrong with the kernels of a folder, by the label of a case or of a probe."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from dsv4 import kernels
from dsv4.check.cases import FAMILIES
from dsv4.check.contract import Case, Size, judge
from dsv4.kernels import rows
from dsv4.ops.op import use
from tests import shim
from tests.shim.build import CSRC, on_hopper
from tests.shim.probes import PROBES

# Ops whose kernels threads cannot play, and those that they can with the headers of tests/shim/hopper.
TENSOR_CORES = (
    "grouped_linear", "grouped_linear_quant", "grouped_scaled_matmul", "linear", "scaled_matmul",
    "scaled_matmul_q_norm_rope", "shared_input", "stored_moe",
)  # fmt: skip
PLAYED = ("attend", "attend_quant", "index_logits")


def _listed() -> Iterator[Case]:
    kernels.install()
    return (case for family in FAMILIES.values() for case in family())


@cache
def cases(*sizes: Size) -> dict[str, Case]:
    """Cases of ops by their labels, but those that the kernels may refuse and do. No size: the small ones."""
    with shim.posing():
        simple = [case for case in _listed() if case.op.name not in (*TENSOR_CORES, *PLAYED)]
        listed = [case for case in simple if case.size in (sizes or ("small",))]
        return {case.label: case for case in listed if not (case.refusable and _refused(case))}


@cache
def played(*ops: str) -> dict[str, Case]:
    """The everyday cases of these ops of PLAYED, or of all."""
    listed = [case for case in _listed() if case.op.name in (ops or PLAYED)]
    return {case.label: case for case in listed if case.size in ("small", "full") and not case.refusable}


def _refused(case: Case) -> str | None:
    return case.op.implementations["fused"].accepts(*case.make())


def unfused(case: Case) -> Callable[..., Any]:
    """The op's own body over the kernels of the smaller ops."""
    smaller = {name: "fused" for name, op in kernels_of().items() if op is not case.op}

    def run(*args: Any) -> Any:
        with shim.posing(), use(smaller):
            return case.op.reference(*args)

    return run


def kernels_of() -> dict[str, Any]:
    """Ops that have a fused implementation."""
    from dsv4.ops.op import all_ops

    return {name: op for name, op in all_ops().items() if "fused" in op.implementations}


def problems(label: str, csrc: Path = CSRC) -> list[str]:
    """What the kernels of `csrc` do wrong in a case or a probe; nothing is as it should be.

    Those of the smaller ops are not asked whether they agree with a copy: it would have to be compiled of them too.
    """
    if label in PROBES:
        try:
            return list(PROBES[label](csrc))
        except shim.Fault as fault:
            return [str(fault)]
    case = played().get(label) or cases("small", "full")[label]
    twin = unfused(case) if csrc == CSRC and fuses(case) else None
    hopper = label in played()
    try:
        with (
            shim.machine(csrc=on_hopper(csrc) if hopper else csrc, clusters=hopper) as ran,
            pytest.MonkeyPatch.context() as patch,
        ):
            if hopper:  # room for clusters
                patch.setattr(rows, "multiprocessors", lambda device: 132)
            verdicts = judge(case, case.op.implementations["fused"].run, twin=twin)
    except shim.Fault as fault:
        return [str(fault)]
    wrong = [f"{v.check} {v.leaf}: {v.distance}" for v in verdicts if not v.ok]
    return wrong if ran else [*wrong, "no kernel ran"]


def fuses(case: Case) -> bool:
    """Whether the op is several smaller ones in one, with kernels of their own, of equal bits."""
    return case.op.name in ("rms_norm_quant", "swiglu_quant", "q_norm_rope", "write_kv")
