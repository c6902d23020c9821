"""The conversions of csrc/common/convert.cuh against the formats of dsv4/quant, instructions against integer code."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dsv4.kernels.build import Places
from dsv4.kernels.launch import Kernel
from dsv4.quant import e2m1, e4m3, e8m0
from tests import shim
from tests.shim.build import CSRC

SOURCE = Path(shim.__file__).parent / "convert_probe.cu"
SIGNATURES = {"narrowed": "p p l", "widened": "p", "divided": "p p p l"}
Run = Callable[..., None]


@pytest.fixture(params=["host", pytest.param("gpu", marks=pytest.mark.gpu)])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Run:
    """Launch a kernel of the probe on CPU tensors, with 256 threads a block."""
    if request.param == "host":
        return lambda name, grid, *args: shim.launch(str(SOURCE), name, grid, 256, *args)
    shutil.copytree(CSRC / "common", tmp_path / "csrc" / "common")
    shutil.copy(SOURCE, tmp_path / "csrc")
    places = Places(csrc=tmp_path / "csrc", cache=None)

    def on_gpu(name: str, grid: int, *args: Tensor | int) -> None:
        moved = [arg.cuda() if isinstance(arg, Tensor) else arg for arg in args]
        Kernel(SOURCE.name, name, SIGNATURES[name], places)(grid, 256, *moved)
        for arg, there in zip(args, moved, strict=True):
            if isinstance(arg, Tensor):
                arg.copy_(there)

    return on_gpu


def patterns(step: int) -> Tensor:
    """Every sign, exponent and 11 leading bits of the mantissa, then what decides a rounding: nothing, a bit, a half.

    step: 1 for all, more for a sample.
    """
    leading = (torch.arange(0, 1 << 20, step) << 12).to(torch.int64)
    trailing = torch.tensor([0, 1, 0x7FF, 0x800, 0x801, 0xFFF])
    return (leading.unsqueeze(1) + trailing).flatten().to(torch.int32).view(torch.float32)


def check_narrowed(run: Run, x: Tensor) -> None:
    out = torch.zeros(len(x), 6, dtype=torch.int32)
    run("narrowed", -(-len(x) // 256), x, out, len(x))
    bits = (x.bfloat16().view(torch.int16).int() & 0xFFFF, e4m3.e4m3_encode(x).view(torch.uint8).int())
    known = ~x.isnan()
    codes = e2m1.e2m1_encode(torch.where(known, x, 0.0)).int()
    for found, wanted, nan in zip(out.T, (*bits, codes) * 2, (0x7FFF, 0x7F, None) * 2, strict=True):
        assert torch.equal(found[known], wanted[known])
        assert nan is None or bool((found[~known] == nan).all())


def test_numbers_are_narrowed_as_the_formats_say(run: Run) -> None:
    check_narrowed(run, patterns(13))


@pytest.mark.slow
def test_every_number_is_narrowed_as_the_formats_say() -> None:
    """All that can decide a rounding to 10 mantissa bits or fewer, 6 million numbers."""
    for part in patterns(1).split(1 << 20):
        check_narrowed(lambda name, grid, *args: shim.launch(str(SOURCE), name, grid, 256, *args), part)


def test_every_byte_is_widened_as_the_formats_say(run: Run) -> None:
    out = torch.zeros(256, 2)
    run("widened", 1, out)
    every = torch.arange(256, dtype=torch.uint8)
    wanted = torch.stack((every.view(torch.float8_e4m3fn).float(), e8m0.ue8m0_decode(every)), 1)
    assert torch.equal(out.nan_to_num(nan=7e30), wanted.nan_to_num(nan=7e30))


def test_the_quotient_has_the_code_of_the_one_that_ieee_rounds(run: Run, seed: int) -> None:
    """Around the ties of E2M1, near them, anywhere, and far above, for steps as far from 1 as they may be."""
    draw = torch.Generator().manual_seed(seed)
    count = 100_000
    mantissa = 1 + torch.randint(0, 1 << 23, (count,), generator=draw) * 2.0**-23
    mantissa[:1000] = 2 - 2.0**-23  # the one for which theorems make exceptions
    step = mantissa * torch.exp2(torch.randint(-79, 99, (count,), generator=draw).double()).float()
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0])
    exact = ties[torch.randint(0, 8, (count,), generator=draw)] * step
    near = (exact.view(torch.int32) + torch.randint(-2, 3, (count,), generator=draw).int()).view(torch.float32)
    anywhere = step * torch.randn(count, generator=draw) * 3
    odd = torch.tensor([0.0, 1e-45])[torch.randint(0, 2, (count,), generator=draw)]
    for x in (near, -near, anywhere, odd, -odd, step * 1e6):
        found = torch.zeros(count, dtype=torch.int32)
        run("divided", -(-count // 256), x, step, found, count)
        assert torch.equal(found, e2m1.e2m1_encode(x / step).int())
