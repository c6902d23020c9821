"""The mixture of experts of one layer."""

from __future__ import annotations

from torch import Tensor

from dsv4.config import ModelConfig
from dsv4.model.batch import Batch
from dsv4.model.layers import Scope
from dsv4.ops.moe import Expert, Route, moe, route
from dsv4.quant.rounding import Numerics
from dsv4.taps import tap


def experts_of(scope: Scope, config: ModelConfig) -> tuple[list[Expert], Expert]:
    """The matrices of the routed experts, and those of the shared one."""
    parts = (*(f"experts.{e}" for e in range(config.n_routed_experts)), "shared_experts")
    below = [scope.sub(part) for part in parts]
    *routed, shared = [Expert(one.matrix("w1"), one.matrix("w3"), one.matrix("w2")) for one in below]
    return routed, shared


class Router:
    """Who goes to which expert. Hash layers choose by token id, all others by score."""

    def __init__(self, scope: Scope, config: ModelConfig, layer: int, hashed: bool) -> None:
        self.layer, self.k, self.scale = layer, config.num_experts_per_tok, config.routed_scaling_factor
        self.gate = scope.dense("gate.weight")
        self.table = scope.integers("gate.tid2eid") if hashed else None
        self.bias = None if hashed else scope.wide("gate.bias")

    def __call__(self, x: Tensor, batch: Batch) -> Route:
        """x: [T, d], normalised."""
        chosen = None if self.table is None else self.table[batch.ids]
        picks = route(x, self.gate, self.bias, chosen, self.k, self.scale)
        tap("experts", self.layer, picks.experts)
        return picks


class MoE:
    """Router, routed experts and the shared one."""

    def __init__(self, scope: Scope, config: ModelConfig, layer: int, hashed: bool, rounds: Numerics) -> None:
        self.router, self.limit, self.rounds = Router(scope, config, layer, hashed), config.swiglu_limit, rounds
        self.experts, self.shared = experts_of(scope, config)

    def __call__(self, x: Tensor, batch: Batch) -> Tensor:
        """x: [T, d], normalised; returns [T, d]."""
        return moe(x, self.router(x, batch), self.experts, self.shared, self.limit, self.rounds)
