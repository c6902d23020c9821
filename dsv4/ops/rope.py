"""Rotary position embedding on the last dimensions of a vector, interleaved, with YaRN for the compressed layers."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from dsv4.ops.norm import unit_rms
from dsv4.ops.op import op


class Rotation(NamedTuple):
    """Cosines and signed sines of T positions, each [T, R] FP32, every value standing twice (once per pair member)."""

    cos: Tensor
    sin: Tensor  # -sin for the even member of a pair, +sin for the odd one


def frequencies(
    dims: int, theta: float, factor: float = 1.0, original: int = 0, beta_fast: float = 32, beta_slow: float = 1
) -> Tensor:
    """Angular step per position of each pair: [dims / 2] FP32, radians.

    `original` = 0 gives plain RoPE. Otherwise YaRN (arXiv 2309.00071): steps of pairs that turn less than `beta_slow`
    times in `original` positions are divided by `factor`, those that turn more than `beta_fast` times are kept, and a
    linear ramp lies between. The attention amplitude is not scaled in this model.
    """
    steps = 1.0 / (theta ** (torch.arange(0, dims, 2, dtype=torch.float32) / dims))
    if not original:
        return steps

    def pair(turns: float) -> float:
        return dims * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = max(math.floor(pair(beta_fast)), 0), min(math.ceil(pair(beta_slow)), dims - 1)
    ramp = ((torch.arange(dims // 2, dtype=torch.float32) - low) / max(high - low, 0.001)).clamp(0, 1)
    return steps / factor * ramp + steps * (1 - ramp)


def rotation(positions: Tensor, steps: Tensor) -> Rotation:
    """The rotation of each position. positions: [T] integers; steps: [R / 2] FP32 of `frequencies`.

    The angle is the FP32 product of position and step, as in the reference's table: at a million tokens a product in
    double precision would differ by 0.05 radians.
    """
    angles = positions.float().unsqueeze(1) * steps
    cos, sin = angles.cos(), angles.sin()
    return Rotation(torch.stack((cos, cos), -1).flatten(1), torch.stack((-sin, sin), -1).flatten(1))


@op
def rope(x: Tensor, turn: Rotation, inverse: bool = False) -> Tensor:
    """Rotate the last R dimensions of x in pairs (2i, 2i+1), in FP32, rounded once to x's dtype.

    x: [T, D] or [T, H, D]; turn: rotations of the T positions; `inverse` turns back by the same angle. Returns a new
    tensor of x's shape; the first D - R dimensions are copied.
    """
    cos, sin = turn if x.dim() == 2 else (turn.cos.unsqueeze(1), turn.sin.unsqueeze(1))
    dims = cos.shape[-1]
    tail = x[..., -dims:].float()
    kept, crossed = tail * cos, tail.index_select(-1, _swapped(dims, x.device)) * sin
    turned = kept - crossed if inverse else kept + crossed
    return torch.cat((x[..., :-dims], turned.type(x.dtype)), -1)


@op
def q_norm_rope(q: Tensor, eps: float, turn: Rotation) -> Tensor:
    """Query heads, normalised each by itself and rotated: [T, H, D] -> the same."""
    return rope(unit_rms(q, eps), turn)


@lru_cache(maxsize=8)
@torch.inference_mode(False)  # training may need it later
def _swapped(dims: int, device: torch.device) -> Tensor:
    """1, 0, 3, 2, ...: the other member of each pair."""
    return torch.arange(dims, device=device) ^ 1
