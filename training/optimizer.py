"""Muon for matrices, AdamW for all else, as the original was trained (arXiv 2606.19348, section on optimisation)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

# Quintic whose iteration drives singular values towards 1 fast rather than exactly.
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ADAM = ("embed.", "head.", ".gate.", "hc_", "norm.", ".ape", "attn_sink")


def by_adam(name: str, tensor: Tensor) -> bool:
    """Whether a parameter is one of those that orthogonal updates do not suit."""
    return tensor.dim() < 2 or any(part in name for part in _ADAM)


def orthogonal(g: Tensor, iterations: int = 5) -> Tensor:
    """[n, rows, columns] -> matrices of the same singular vectors, singular values near 1 (Newton-Schulz, BF16)."""
    a, b, c = _COEFFICIENTS
    x = g.bfloat16()
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(iterations):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon:
    """Momentum, orthogonalised; all matrices of one shape are updated together.

    A stack [E, out, in] counts as E matrices, and `pieces` says into how many row blocks a matrix falls (wo_a: one for
    each group of heads). An update has an RMS of 0.2 times the rate, about AdamW's, so one decay suits both.
    """

    def __init__(self, params: Mapping[str, Tensor], pieces: Mapping[str, int], momentum: float = 0.95) -> None:
        self.momentum = momentum
        shapes: dict[tuple[int, int], list[tuple[Tensor, int]]] = {}
        for name, p in params.items():
            count = len(p) if p.dim() == 3 else pieces.get(name, 1)
            shapes.setdefault((p.numel() // p.shape[-1] // count, p.shape[-1]), []).append((p, count))
        self.members = shapes
        self.matrices = {shape: _joined(shape, members) for shape, members in shapes.items()}
        self.moments = {shape: torch.zeros_like(matrices) for shape, matrices in self.matrices.items()}

    @torch.no_grad()
    def step(self, rate: float, decay: float) -> None:
        """One update from the gradients."""
        for shape, members in self.members.items():
            grads = torch.cat([_gradient(p).reshape(count, *shape) for p, count in members])
            moment = self.moments[shape].lerp_(grads, 1 - self.momentum)
            update = orthogonal(grads.lerp(moment, self.momentum)).float()
            self.matrices[shape].mul_(1 - rate * decay).add_(update, alpha=-0.2 * max(shape) ** 0.5 * rate)

    def state_dict(self) -> dict[str, Any]:
        """The moments, by shape."""
        return {"moments": self.moments}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take moments back."""
        for shape, moment in state["moments"].items():
            self.moments[shape].copy_(moment)


def _joined(shape: tuple[int, int], members: list[tuple[Tensor, int]]) -> Tensor:
    """One tensor [n, rows, columns] that holds the members from now on: a few calls update however many there are."""
    joined = torch.cat([p.detach().reshape(count, *shape) for p, count in members])
    for (p, _), part in zip(members, joined.split([count for _, count in members]), strict=True):
        p.data = part.view(p.shape)
    return joined


def _gradient(p: Tensor) -> Tensor:
    return torch.zeros_like(p) if p.grad is None else p.grad
