"""How products with FP8 matrices should lie on blocks: `python -m bench.linear_wide [--json FILE]` on a Hopper GPU.

For each matrix and number of tokens the best plans, in microseconds and TFLOP/s, beside the plan that is chosen, the
kernel for few tokens in turns of 32, and cuBLASLt's product alone, its scales made beforehand. A plan whose result has
other bits than the kernel for few is named. These figures choose `plan` of dsv4/kernels/linear_wide.py and `FEW` of
dsv4/kernels/linear.py.

With --csrc FOLDER... instead: the kernels of these copies of dsv4/kernels/csrc beside ours, in the plan that is chosen.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from dsv4.bench.clock import Call, fp8_peak, in_graph
from dsv4.bench.ops import l2_cache, record, sets
from dsv4.check.cases.linear import SHAPES, _given
from dsv4.check.contract import Arguments, placed
from dsv4.check.metrics import differing
from dsv4.check.verify import prepare
from dsv4.errors import KernelError
from dsv4.kernels import linear, linear_library, linear_wide
from dsv4.kernels.build import Places
from dsv4.kernels.launch import Kernel
from dsv4.kernels.linear_wide import KERNELS, Kind, Plan
from dsv4.ops.linear import scaled_matmul
from dsv4.quant.tensor import QTensor

TOKENS = (17, 32, 33, 48, 64, 96, 128, 256, 512, 2048, 8192)
NAMES = ("flash wq_b", "flash wo_b", "flash shared w1 w3", "flash shared w2", "flash wq_a wkv", "pro wo_b")
ROUNDS = 3  # of kernels in turn: a GPU that gets warm is slower for all of them


def plans(segments: int, tokens: int) -> Iterator[Plan]:
    """What is tried."""
    kinds: tuple[Kind, ...] = ("wide128", "wide256") if segments == 1 and tokens > linear_wide.TILE else ("wide128",)
    for kind in kinds:
        for width in (8, *((2, 4, 16) if tokens >= 2048 else ())):
            yield Plan(kind, width=width)
    if segments > 1:
        yield Plan("split")


def through_plan(given: Plan, segments: int, x: QTensor, weight: QTensor, dtype: torch.dtype) -> Tensor:
    y = torch.empty(len(x), weight.shape[0], dtype=dtype, device=x.device)
    linear_wide.launch(x, weight, y, 1, segments, given)
    return y


def through_few(x: QTensor, weight: QTensor, dtype: torch.dtype) -> Tensor:
    y = torch.empty(len(x), weight.shape[0], dtype=dtype, device=x.device)
    linear.few(x, weight, y)
    return y


def library(x: QTensor, weight: QTensor, dtype: torch.dtype) -> Call:
    """The product alone; tokens past a multiple of four are left out."""
    whole = len(x) // 4 * 4
    scale = linear_library.token_scales(QTensor(x.data[:whole], x.scale[:whole], x.format))
    linear_library.product(x.data[:whole], weight, scale, dtype)
    return partial(linear_library.product, x.data[:whole], weight, scale, dtype)


def timed(calls: list[Call], tokens: int) -> float:
    """Microseconds of one call."""
    return 1e6 * in_graph(calls * -(-(16 if tokens <= 512 else 4) // len(calls)), 5).seconds


def tried(given: Arguments, copies: list[Arguments]) -> tuple[dict[str, float], list[str]]:
    """Microseconds by plan, and the plans with other bits."""
    x, weight, _ = given
    segments = linear.form(*weight.shape).segments
    found, wrong = {}, []
    wanted = through_few(*given)
    for plan in plans(segments, len(x)):
        fit = linear_wide.fitting(plan)
        name = f"{fit.kind} {fit.stages} w{fit.width}"
        try:
            if differing(through_plan(fit, segments, *given), wanted):
                wrong.append(name)
            calls: list[Call] = [partial(through_plan, fit, segments, *one) for one in copies]
            found[name] = round(timed(calls, len(x)), 2)
        except KernelError as error:
            wrong.append(f"{name}: {error}")
    return found, wrong


class Roomy(Plan):
    """With all memory that there is: what another kernel has beside its ring is its own affair."""

    @property
    def bytes(self) -> int:
        return linear_wide.SHARED


def kernels_of(csrc: Path) -> dict[tuple[torch.dtype, Kind], Kernel]:
    """Those of a copy of our sources, in which ready-made ones may lie in a folder `prebuilt`."""
    places = Places(csrc=csrc, prebuilt=csrc / "prebuilt")
    return {key: Kernel(ours.file, ours.name, ours.signature, places) for key, ours in KERNELS.items()}


@contextmanager
def launched(kernels: Mapping[tuple[torch.dtype, Kind], Kernel]) -> Iterator[None]:
    """These in place of ours."""
    ours = dict(KERNELS)
    KERNELS.update(kernels)
    try:
        yield
    finally:
        KERNELS.update(ours)


def compared(given: Arguments, copies: list[Arguments], folders: list[Path]) -> tuple[dict[str, float], list[str]]:
    """Microseconds by folder and kind of tiles, and those with other bits."""
    x, weight, _ = given
    segments = linear.form(*weight.shape).segments
    kinds = {linear_wide.plan(weight.shape[0], segments, len(x)).kind, *(("wide128",) if segments == 1 else ())}
    plans = [Roomy(*linear_wide.fitting(Plan(kind))) for kind in sorted(kinds)]
    all_kernels = {"ours": dict(KERNELS), **{folder.name: kernels_of(folder) for folder in folders}}
    samples: dict[str, list[float]] = {}
    wrong, wanted = [], through_few(*given)
    for turn in range(ROUNDS):
        for (folder, kernels), plan in ((pair, plan) for plan in plans for pair in all_kernels.items()):
            name = f"{folder} {plan.kind}"
            with launched(kernels):
                if not turn and differing(through_plan(plan, segments, *given), wanted):
                    wrong.append(name)
                calls: list[Call] = [partial(through_plan, plan, segments, *one) for one in copies]
                samples.setdefault(name, []).append(timed(calls, len(x)))
    return {name: round(median(found), 2) for name, found in samples.items()}, wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", type=Path, help="append one line for each case to this file")
    parser.add_argument("--case", nargs="*", default=NAMES, help="only these matrices")
    parser.add_argument("--tokens", type=int, nargs="*", default=TOKENS)
    parser.add_argument("--csrc", type=Path, nargs="*", help="compare the kernels of these folders with ours")
    asked = parser.parse_args()
    prepare()
    device = torch.device("cuda", 0)
    peak, began = fp8_peak(device), time.monotonic()
    print(f"FP8 peak {peak / 1e12:,.0f} TFLOP/s", flush=True)
    run = scaled_matmul.implementations["fused"].run
    for name, tokens in ((name, tokens) for name in asked.case for tokens in asked.tokens):
        rows, columns = SHAPES[name]
        given = placed(_given(tokens, rows, columns, torch.bfloat16), device)
        copies = sets(given, l2_cache(device))
        plan, wrong = tried(given, copies) if asked.csrc is None else compared(given, copies, asked.csrc)
        others = {"chosen": [partial(run, *one) for one in copies], "cublaslt": [library(*one) for one in copies]}
        if tokens <= 128:
            others["few"] = [partial(through_few, *one) for one in copies]
        beside = {of: round(timed(calls, tokens), 2) for of, calls in others.items()}
        flops = 2 * tokens * rows * columns
        shown = [f"{of} {us:.1f} ({flops / us / 1e6 / (peak / 1e12):.0%})" for of, us in beside.items()]
        best = sorted(plan.items(), key=lambda pair: pair[1])
        shown += [f"{of}: {us:.1f}" for of, us in (best[:4] if asked.csrc is None else best)]
        print(f"{name} {tokens}: " + "  ".join(shown) + "".join(f"\n  OTHER BITS {one}" for one in wrong), flush=True)
        if asked.json:
            what = "wide linear plans" if asked.csrc is None else "wide linear kernels"
            line = {"what": what, "matrix": name, "tokens": tokens, "us": beside | plan, "wrong": wrong}
            record(asked.json, line | {"fp8_peak": peak}, device)
    print(f"{time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
