"""Weights by their Hub names, and the small parts that every layer shares."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from dsv4.config import ModelConfig
from dsv4.ops.mhc import Mixed, Mixer, mhc_head, mhc_post, mhc_pre
from dsv4.ops.norm import rms_norm
from dsv4.quant.tensor import QTensor
from dsv4.taps import tap


class Scope:
    """The weights below a name prefix. Each is handed out as the reference computes with it."""

    def __init__(self, weights: Mapping[str, Tensor | QTensor], prefix: str = "") -> None:
        self._weights, self._prefix = weights, prefix

    def sub(self, name: str) -> Scope:
        """The scope below `name`."""
        return Scope(self._weights, f"{self._prefix}{name}.")

    def matrix(self, name: str) -> Tensor | QTensor:
        """`name`.weight of a linear layer: quantised as stored, or dense."""
        weight = self._weights[f"{self._prefix}{name}.weight"]
        return weight if isinstance(weight, QTensor) else _dense(weight)

    def dense(self, name: str) -> Tensor:
        """A matrix that is never quantised."""
        weight = self._weights[self._prefix + name]
        assert not isinstance(weight, QTensor), f"{self._prefix}{name} is never quantised"
        return _dense(weight)

    def wide(self, name: str) -> Tensor:
        """A tensor that the reference holds in FP32."""
        weight = self._weights[self._prefix + name]
        assert not isinstance(weight, QTensor), f"{self._prefix}{name} is never quantised"
        return weight.float()

    def integers(self, name: str) -> Tensor:
        """A table of integers, int64."""
        weight = self._weights[self._prefix + name]
        assert isinstance(weight, Tensor)
        return weight.to(torch.int64)

    def mixer(self, site: str, streams: int) -> Mixer:
        """The weights of an mHC site: "attn", "ffn" or "head"."""
        fn, base, scale = (self.wide(f"hc_{site}_{part}") for part in ("fn", "base", "scale"))
        rows = torch.tensor([streams, streams, streams**2][: len(scale)], device=scale.device)
        return Mixer(fn, base, scale.repeat_interleave(rows))


def _dense(weight: Tensor) -> Tensor:
    """What `matmul` reads, which widens it: as stored, but on a CPU widened here and not in every call."""
    return weight.float() if weight.device.type == "cpu" else weight


class Norm:
    """RMSNorm with its weight."""

    def __init__(self, scope: Scope, name: str, config: ModelConfig) -> None:
        self.weight, self.eps = scope.wide(f"{name}.weight"), config.rms_norm_eps

    def __call__(self, x: Tensor) -> Tensor:
        """x: [..., D]; returns the same shape and dtype."""
        return rms_norm(x, self.weight, self.eps)


class HyperConnection:
    """The mHC site around one sublayer."""

    def __init__(self, scope: Scope, site: str, config: ModelConfig) -> None:
        self.mixer = scope.mixer(site, config.hc_mult)
        self.iterations, self.eps, self.norm_eps = config.hc_sinkhorn_iters, config.hc_eps, config.rms_norm_eps

    def pre(self, streams: Tensor) -> Mixed:
        """[T, M, d] -> the sublayer's input and the weights of the way back."""
        return mhc_pre(streams, self.mixer, self.iterations, self.eps, self.norm_eps)

    @staticmethod
    def post(y: Tensor, mixed: Mixed) -> Tensor:
        """Write the sublayer's output [T, d] back: new streams [T, M, d]."""
        return mhc_post(y, mixed)


class HeadMix:
    """The last mHC site and the norm behind it: streams to the vector that the head reads."""

    def __init__(self, scope: Scope, config: ModelConfig) -> None:
        self.mixer, self.norm = scope.mixer("head", config.hc_mult), Norm(scope, "norm", config)
        self.eps, self.norm_eps = config.hc_eps, config.rms_norm_eps

    def reduce(self, streams: Tensor) -> Tensor:
        """[T, M, d] -> [T, d], before the norm."""
        return mhc_head(streams, self.mixer, self.eps, self.norm_eps)

    def __call__(self, streams: Tensor) -> Tensor:
        """[T, M, d] -> [T, d], after the norm."""
        return self.norm(self.reduce(streams))


def expand(x: Tensor, streams: int) -> Tensor:
    """Equal copies for the residual streams: [T, d] -> [T, M, d]."""
    return x.unsqueeze(1).repeat(1, streams, 1)


class Behind(NamedTuple):
    """Streams behind a layer, before its output has been written back: the next one's first op does it."""

    y: Tensor  # [T, d] of the experts
    mixed: Mixed
    layer: int


def settled(streams: Tensor | Behind) -> Tensor:
    """[T, M, d]."""
    if isinstance(streams, Tensor):
        return streams
    out = mhc_post(streams.y, streams.mixed)
    tap("streams", streams.layer, out)
    return out
