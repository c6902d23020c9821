"""The routed experts on stored operands: the mixture of `moe`, to the bit."""

from __future__ import annotations

import pytest
import torch

from dsv4.check.cases import experts as cases
from dsv4.ops.experts import routed_experts, store_experts
from dsv4.ops.linear import project
from dsv4.ops.moe import Expert, Route, moe, swiglu
from dsv4.ops.quantize import quantize
from dsv4.quant.formats import FP8_BLOCK, FP8_ROW
from dsv4.quant.rounding import FP8, OFFICIAL
from tests.devices import normal

D, WIDTH = 256, 128


def expert(name: str) -> Expert:
    shapes = {"w1": (WIDTH, D), "w3": (WIDTH, D), "w2": (D, WIDTH)}
    return Expert(*(cases.matrix(f"{name} {part}", *shape) for part, shape in shapes.items()))


@pytest.mark.parametrize("tokens", [1, 7])
def test_it_is_the_mixture_of_the_model(tokens: int) -> None:
    experts, x = [expert(f"e{n}") for n in range(5)], normal("x", tokens, D, dtype=torch.bfloat16)
    shared = Expert(*(FP8_BLOCK.encode(normal(n, *s, size=0.1)) for n, s in
                      (("s1", (WIDTH, D)), ("s3", (WIDTH, D)), ("s2", (D, WIDTH)))))  # fmt: skip
    chosen = torch.stack([torch.randperm(5)[:3] for _ in range(tokens)])
    picks = Route(chosen, torch.rand(tokens, 3) + 0.1)
    gate, up = (project(FP8(x), weight) for weight in (shared.w1, shared.w3))
    beside = project(FP8(swiglu(gate, up, 10.0).type(x.dtype)), shared.w2)
    found = routed_experts(quantize(x, FP8_ROW), picks, store_experts(experts), beside, 10.0)
    assert torch.equal(found, moe(x, picks, experts, shared, 10.0, OFFICIAL))


def test_odd_cases_leave_most_numbers_alone() -> None:
    """They would judge nothing if all were NaN."""
    for make in (cases._odd_activations, cases._odd_scales):
        found = routed_experts(*make())
        assert 0 < float(found.isnan().float().mean()) < 0.6
    assert not routed_experts(*cases._far_apart()).isnan().any()


def test_odd_scales_stand_apart_and_fit() -> None:
    assert cases._far_apart()[2].up.apart[0].tolist() == [1, 0]
    assert cases._far_apart()[2].down.apart[0].tolist() == [1, 0]
    assert cases._odd_scales()[2].up.apart[0].tolist() == [0, 0]
    assert cases._odd_scales()[2].down.apart[0].tolist() == [0, 1]
