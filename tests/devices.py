"""Where the operator tests run, their random inputs, and distances between results."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


def normal(name: str, *shape: int, dtype: torch.dtype = torch.float32, size: float = 1.0) -> Tensor:
    """Normal numbers that depend on `name` and the shape alone, made on the CPU."""
    generator = torch.Generator().manual_seed(sum(map(ord, name)) + 1000 * sum(shape))
    return (size * torch.randn(shape, generator=generator)).to(dtype)


def bits(x: Tensor) -> Tensor:
    """The bytes of a tensor, for bitwise comparison."""
    return x.contiguous().view(torch.uint8)


def ulps(found: Tensor, exact: Tensor) -> Tensor:
    """Distance of FP32 numbers from FP64 ones in units of the last place, below the normal numbers in theirs."""
    near = exact.abs().float().clamp(min=2.0**-126)
    step = torch.nextafter(near, torch.full_like(near, float("inf"))) - near
    return (found.double() - exact.double()).abs() / step


def far(found: Tensor, wanted: Tensor) -> float:
    """Largest absolute distance, over the largest wanted magnitude. NaN is infinitely far."""
    assert found.shape == wanted.shape
    wanted = wanted.to(found.device)
    distance = (found.double() - wanted.double()).abs().nan_to_num(nan=float("inf")).max()
    return float(distance / wanted.double().abs().max().clamp(min=1e-30))
