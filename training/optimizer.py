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
        self.params, self.momentum = dict(params), momentum
        self.shapes: dict[tuple[int, int], list[str]] = {}
        self.views = {name: _matrices(p, pieces.get(name, 1)) for name, p in self.params.items()}
        for name, view in self.views.items():
            self.shapes.setdefault((view.shape[1], view.shape[2]), []).append(name)
        self.moments = {
            shape: torch.zeros(sum(len(self.views[n]) for n in names), *shape, device=self.views[names[0]].device)
            for shape, names in self.shapes.items()
        }

    @torch.no_grad()
    def step(self, rate: float, decay: float) -> None:
        """One update from the gradients."""
        for shape, names in self.shapes.items():
            grads = torch.cat([self._grad(name) for name in names])
            moment = self.moments[shape].lerp_(grads, 1 - self.momentum)
            update = orthogonal(grads.lerp(moment, self.momentum)).float()
            size = 0.2 * max(shape) ** 0.5 * rate
            for name, part in zip(names, update.split([len(self.views[n]) for n in names]), strict=True):
                self.views[name].mul_(1 - rate * decay).add_(part, alpha=-size)

    def _grad(self, name: str) -> Tensor:
        grad = self.params[name].grad
        view = self.views[name]
        return torch.zeros_like(view) if grad is None else grad.reshape(view.shape)

    def state_dict(self) -> dict[str, Any]:
        """The moments, by shape."""
        return {"moments": self.moments}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take moments back."""
        for shape, moment in state["moments"].items():
            self.moments[shape].copy_(moment)


def _matrices(p: Tensor, pieces: int) -> Tensor:
    """[n, rows, columns], sharing the parameter's memory."""
    data = p.detach()
    return data if data.dim() == 3 else data.view(pieces, -1, data.shape[1])
