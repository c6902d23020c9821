"""Which streams the kernels of mHC take: None, or the reason why not, by shape, stride, dtype and device alone."""

from __future__ import annotations

from functools import cache
from typing import Final

import torch
from torch import Tensor

from dsv4.kernels.rows import NAMES, refuse_format
from dsv4.ops.mhc import Mixed, Mixer
from dsv4.quant.formats import Format
from dsv4.quant.rows import GlobalScale

MOST_STREAMS: Final = 16
MOST_COLUMNS: Final = 31 * 256  # what one block finishes
FAST_STREAMS: Final = 4  # what all kernels but those called "any" are written for
LEAST_EPS: Final = 1e-9  # below, Sinkhorn's factors may overflow
CLUSTER_TOKENS: Final = 4  # up to which it is the faster one on an H100 ...
CLUSTER_WIDE: Final = 3  # ... from so many on where a block has two ranges
CLUSTER_RANGES: Final = 2  # of 256 columns, a block at most


def pre(streams: Tensor, mixer: Mixer, iterations: int, eps: float, norm_eps: float) -> str | None:
    """Of `mhc_pre`."""
    return _refuse_streams(streams) or _refuse_eps(eps)


def head(streams: Tensor, mixer: Mixer, eps: float, norm_eps: float) -> str | None:
    """Of `mhc_head`."""
    return _refuse_streams(streams)


def post(y: Tensor, mixed: Mixed) -> str | None:
    """Of `mhc_post`."""
    if y.dtype != mixed.streams.dtype:
        return f"y is {_plain(y.dtype)}, the streams are {_plain(mixed.streams.dtype)}"
    if not y.is_contiguous():
        return "y is not contiguous"
    return _refuse_streams(mixed.streams)


def pre_norm_quant(
    streams: Tensor,
    mixer: Mixer,
    iterations: int,
    eps: float,
    norm_eps: float,
    weight: Tensor,
    fmt: Format,
    scale: GlobalScale = None,
) -> str | None:
    """Of `mhc_pre_norm_quant`."""
    if reason := pre(streams, mixer, iterations, eps, norm_eps):
        return reason
    if streams.shape[1] != FAST_STREAMS:
        return f"{streams.shape[1]} streams, and {FAST_STREAMS} fit"
    return refuse_format(fmt, scale)


def step(
    y: Tensor,
    mixed: Mixed,
    mixer: Mixer,
    iterations: int,
    eps: float,
    norm_eps: float,
    weight: Tensor,
    fmt: Format,
    scale: GlobalScale = None,
) -> str | None:
    """Of `mhc_post_pre_norm_quant`, as two kernels."""
    return post(y, mixed) or pre_norm_quant(mixed.streams, mixer, iterations, eps, norm_eps, weight, fmt, scale)


def cluster_step(
    y: Tensor,
    mixed: Mixed,
    mixer: Mixer,
    iterations: int,
    eps: float,
    norm_eps: float,
    weight: Tensor,
    fmt: Format,
    scale: GlobalScale = None,
) -> str | None:
    """Of `mhc_post_pre_norm_quant`, as one kernel."""
    if y.shape[0] > CLUSTER_TOKENS:
        return f"{y.shape[0]} tokens, and {CLUSTER_TOKENS} fit"
    if y.dtype != torch.bfloat16:
        return f"y is {_plain(y.dtype)}, and bfloat16 fits"
    most = CLUSTER_RANGES * 256 * largest_cluster(y.device)
    if y.shape[1] > most:
        return f"{y.shape[1]} columns, and {most} fit into a cluster"
    if y.shape[1] > most // CLUSTER_RANGES and 0 < y.shape[0] < CLUSTER_WIDE:
        return f"{y.shape[1]} columns of {y.shape[0]} tokens, and two kernels are faster below {CLUSTER_WIDE}"
    return step(y, mixed, mixer, iterations, eps, norm_eps, weight, fmt, scale)


@cache
def largest_cluster(device: torch.device) -> int:
    """Blocks that can share their memory: 16 on Hopper and its large successors, 8 on the cards with sm_120."""
    return 8 if torch.cuda.is_available() and torch.cuda.get_device_capability(device)[0] == 12 else 16


def cluster_size(d: int, device: torch.device) -> int:
    """Blocks of the cluster that takes a token of d columns: two at least, since memcheck refuses stores within one."""
    return min(largest_cluster(device), max(2, -(-d // 256)))


def _refuse_streams(streams: Tensor) -> str | None:
    _, m, d = streams.shape
    if not streams.is_cuda:
        return f"the streams are on {streams.device}"
    if streams.dtype not in NAMES:
        return f"the streams are {_plain(streams.dtype)}"
    if not 1 <= m <= MOST_STREAMS:
        return f"{m} streams, and 1 to {MOST_STREAMS} fit"
    if d % 8 or not 0 < d <= MOST_COLUMNS:
        return f"{d} columns, and multiples of 8 to {MOST_COLUMNS} fit"
    return None if streams.is_contiguous() else f"the streams have stride {list(streams.stride())}"


def _refuse_eps(eps: float) -> str | None:
    return None if eps >= LEAST_EPS else f"eps is {eps}, and {LEAST_EPS} or more fits"


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
