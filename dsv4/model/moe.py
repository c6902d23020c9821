"""The mixture of experts of one layer."""

from __future__ import annotations

from torch import Tensor

from dsv4.config import ModelConfig
from dsv4.model.batch import Batch
from dsv4.model.layers import Scope
from dsv4.ops.moe import Expert, moe, route
from dsv4.quant.rounding import Numerics
from dsv4.taps import tap


def expert_of(scope: Scope) -> Expert:
    """The matrices of the expert below a scope."""
    return Expert(scope.matrix("w1"), scope.matrix("w3"), scope.matrix("w2"))


class MoE:
    """Router, routed experts and the shared one. Hash layers choose by token id, all others by score."""

    def __init__(self, scope: Scope, config: ModelConfig, layer: int, hashed: bool, rounds: Numerics) -> None:
        self.layer, self.rounds = layer, rounds
        self.k, self.scale, self.limit = config.num_experts_per_tok, config.routed_scaling_factor, config.swiglu_limit
        self.gate = scope.dense("gate.weight")
        self.table = scope.integers("gate.tid2eid") if hashed else None
        self.bias = None if hashed else scope.wide("gate.bias")
        self.experts = [expert_of(scope.sub(f"experts.{e}")) for e in range(config.n_routed_experts)]
        self.shared = expert_of(scope.sub("shared_experts"))

    def __call__(self, x: Tensor, batch: Batch) -> Tensor:
        """x: [T, d], normalised; returns [T, d]."""
        chosen = None if self.table is None else self.table[batch.ids]
        picks = route(x, self.gate, self.bias, chosen, self.k, self.scale)
        tap("experts", self.layer, picks.experts)
        return moe(x, picks, self.experts, self.shared, self.limit, self.rounds)
