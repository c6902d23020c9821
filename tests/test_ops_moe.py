"""Routing, the experts, and the activation functions between their matrices."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dsv4.ops.moe import Expert, Route, moe, route, silu, softplus, swiglu
from dsv4.quant.activation import fp8_simulate
from dsv4.quant.formats import FP8_BLOCK
from dsv4.quant.rounding import FLOAT, OFFICIAL
from tests.devices import DEVICES, far, normal, ulps

WIDTH, HIDDEN, EXPERTS = 32, 24, 6


def scores_of(x: Tensor, gate: Tensor) -> Tensor:
    return F.softplus(x.double() @ gate.double().T).sqrt()


# --- routing ---------------------------------------------------------------------------------------------------------


@DEVICES
def test_a_scored_layer_takes_the_largest_of_score_and_bias(device: str) -> None:
    """Chosen with the bias, weighed without it, divided by their sum, times the scale."""
    x, gate, bias = normal("x", 20, WIDTH), normal("g", EXPERTS, WIDTH), normal("b", EXPERTS, size=2)
    found = route(x.to(device), gate.to(device), bias.to(device), None, 3, 1.5)
    scores = scores_of(x, gate)
    wanted = torch.topk(scores + bias, 3).indices
    assert found.experts.tolist() == wanted.tolist()
    weights = scores.gather(1, wanted)
    assert found.weights.dtype == torch.float32
    assert far(found.weights, 1.5 * weights / weights.sum(1, keepdim=True)) < 1e-5
    assert torch.topk(scores, 3).indices.tolist() != wanted.tolist()  # the bias did choose


@DEVICES
def test_a_hash_layer_takes_what_it_is_given(device: str) -> None:
    """The chosen experts in their given order, weighed by their scores."""
    x, gate = normal("x", 4, WIDTH), normal("g", EXPERTS, WIDTH)
    chosen = torch.tensor([[5, 0], [1, 2], [3, 3], [0, 5]])
    found = route(x.to(device), gate.to(device), None, chosen.to(device), 2, 2.5)
    weights = scores_of(x, gate).gather(1, chosen)
    assert found.experts.tolist() == chosen.tolist()
    assert far(found.weights, 2.5 * weights / weights.sum(1, keepdim=True)) < 1e-5


@DEVICES
def test_equal_scores_fall_to_the_lowest_experts(device: str) -> None:
    x, gate = normal("x", 3, WIDTH).to(device), torch.zeros(EXPERTS, WIDTH, device=device)
    assert route(x, gate, None, None, 4, 1.0).experts.tolist() == [[0, 1, 2, 3]] * 3
    bias = torch.tensor([0.0, 1, 0, 1, 0, 1], device=device)
    assert route(x, gate, bias, None, 4, 1.0).experts.tolist() == [[1, 3, 5, 0]] * 3


def test_every_expert_can_be_chosen() -> None:
    found = route(normal("x", 2, WIDTH), normal("g", EXPERTS, WIDTH), torch.zeros(EXPERTS), None, EXPERTS, 1.0)
    assert found.experts.sort(1).values.tolist() == [list(range(EXPERTS))] * 2


# --- experts ---------------------------------------------------------------------------------------------------------


def expert(name: str) -> Expert:
    w1, w3 = (normal(f"{name}.{part}", HIDDEN, WIDTH, size=0.3) for part in ("w1", "w3"))
    return Expert(w1, w3, normal(f"{name}.w2", WIDTH, HIDDEN, size=0.3))


def moved(one: Expert, device: str) -> Expert:
    return Expert(*(weight.to(device) for weight in one))


def one_expert(x: Tensor, weights: Expert, limit: float) -> Tensor:
    """An unweighted expert in FP64."""
    w1, w3, w2 = (w.double() for w in weights)
    gate, up = x.double() @ w1.T, x.double() @ w3.T
    return (F.silu(gate.clamp(max=limit)) * up.clamp(-limit, limit)) @ w2.T


@DEVICES
@pytest.mark.parametrize("tokens", [1, 2, 9])
@pytest.mark.parametrize("limit", [0.5, 10.0])
def test_the_mixture_is_its_formula(tokens: int, limit: float, device: str) -> None:
    """Routed experts by weight, the shared one with no weight and no scale; an expert nobody chose does nothing."""
    x, experts, shared = normal("x", tokens, WIDTH), [expert(f"e{n}") for n in range(EXPERTS)], expert("shared")
    picks = Route(torch.tensor([[n % 4, 4] for n in range(tokens)]), torch.rand(tokens, 2) + 0.1)
    experts[5] = Expert(*(torch.full_like(w, float("nan")) for w in experts[5]))
    found = moe(x.to(device), Route(*(p.to(device) for p in picks)), [moved(e, device) for e in experts],
                moved(shared, device), limit, rounds=FLOAT)  # fmt: skip
    wanted = one_expert(x, shared, limit)
    for token, slot in itertools.product(range(tokens), range(2)):
        number, weight = int(picks.experts[token, slot]), float(picks.weights[token, slot])
        wanted[token] += weight * one_expert(x[token], experts[number], limit)
    assert far(found, wanted) < 1e-5


def constant(value: float) -> Expert:
    """An expert of width 1 that makes `value` of 1, and nothing else in between: silu(20) is 20 in FP32."""
    return Expert(torch.tensor([[20.0]]), torch.tensor([[0.05]]), torch.tensor([[value]]))


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
@DEVICES
def test_experts_are_summed_by_ascending_number_then_the_shared_one(order: tuple[int, ...], device: str) -> None:
    """(1e9 - 1e9) + 1 is 1; in any other order the 1 is lost. The same however the choice was listed."""
    experts = [moved(constant(v), device) for v in (1e9, -1e9, 1.0)]
    picks = Route(torch.tensor([order], device=device), torch.ones(1, 3, device=device))
    x = torch.ones(1, 1, device=device)
    assert moe(x, picks, experts, moved(constant(0.0), device), 0, FLOAT).item() == pytest.approx(1, rel=1e-3)
    found = moe(
        x, picks, [moved(constant(v), device) for v in (1.0, 1e9, 0.0)], moved(constant(-1e9), device), 0, FLOAT
    )
    assert found.item() == 0


def test_the_routing_weight_comes_before_the_last_matrix_and_its_quantiser() -> None:
    """With FP8 matrices the activations before w2 are rounded after they were weighted."""
    matrices = [normal(n, 128, 128, size=0.2) for n in ("w1", "w3", "w2")]
    quantised = Expert(*(FP8_BLOCK.encode(m) for m in matrices))
    silent = Expert(quantised.w1, quantised.w3, FP8_BLOCK.encode(torch.zeros(128, 128)))
    x, weight = normal("x", 3, 128, dtype=torch.bfloat16), 0.3
    picks = Route(torch.zeros(3, 1, dtype=torch.int64), torch.full((3, 1), weight))
    found = moe(x, picks, [quantised], silent, 10.0, rounds=OFFICIAL)
    w1, w3, w2 = (m.values().double() for m in quantised)  # type: ignore[union-attr]
    rounded = fp8_simulate(x, 128).double()
    hidden = swiglu((rounded @ w1.T).bfloat16(), (rounded @ w3.T).bfloat16(), 10.0)
    before = fp8_simulate((hidden * weight).bfloat16(), 128).double() @ w2.T
    after = weight * (fp8_simulate(hidden.bfloat16(), 128).double() @ w2.T)
    assert far(found, before) < 0.003
    assert far(found, after) > 0.005


# --- activation functions --------------------------------------------------------------------------------------------

# Units of the last place: one exponential of the library and two or three roundings behind it.
BOUND = {"cpu": 2, "cuda": 3}
EVERYWHERE = torch.cat((torch.linspace(-87, 87, 5003), torch.linspace(-1, 1, 4001), torch.logspace(-30, 38, 500)))


@DEVICES
def test_softplus_is_accurate_everywhere(device: str) -> None:
    """Within 2 units of the last place (3 on CUDA) of ln(1 + e^x) up to a threshold of 20, and x itself above."""
    x = torch.cat((EVERYWHERE, torch.tensor([20.0, 20.000002])))
    found = softplus(x.to(device)).cpu()
    exact = torch.where(x > 20, x.double(), torch.log1p(torch.exp(x.double())))
    assert float(ulps(found, exact).max()) <= BOUND[device]
    assert torch.equal(found[x > 20], x[x > 20])
    assert softplus(torch.tensor([-1000.0, 1000.0], device=device)).tolist() == [0.0, 1000.0]


@DEVICES
def test_silu_is_accurate_everywhere(device: str) -> None:
    """Within 2 units of the last place (3 on CUDA) of x / (1 + e^-x); far below zero it is a zero, not NaN."""
    found = silu(EVERYWHERE.to(device)).cpu()
    exact = EVERYWHERE.double() / (1 + torch.exp(-EVERYWHERE.double()))
    assert float(ulps(found, exact).max()) <= BOUND[device]
    assert silu(torch.tensor([-100.0, -1e30, 1e30], device=device)).tolist() == [0.0, 0.0, pytest.approx(1e30)]


@DEVICES
def test_the_gate_is_clamped_from_above_alone(device: str) -> None:
    """gate: min(g, limit); up: both sides; a limit of 0 clamps nothing."""
    gate, up = (
        torch.tensor([-20.0, 30.0, 30.0, 1.0], device=device),
        torch.tensor([3.0, 3.0, -30.0, 30.0], device=device),
    )
    wanted = F.silu(torch.tensor([-20.0, 10, 10, 1])) * torch.tensor([3.0, 3, -10, 10])
    assert swiglu(gate, up, 10.0).tolist() == pytest.approx(wanted.tolist(), rel=1e-6)
    assert swiglu(gate, up, 0).tolist() == pytest.approx((F.silu(gate) * up).tolist(), rel=1e-6)


def test_swiglu_computes_in_fp32() -> None:
    gate, up = normal("g", 50, dtype=torch.bfloat16), normal("u", 50, dtype=torch.bfloat16)
    assert swiglu(gate, up, 10.0).dtype == torch.float32
    assert torch.equal(swiglu(gate, up, 10.0), swiglu(gate.float(), up.float(), 10.0))
