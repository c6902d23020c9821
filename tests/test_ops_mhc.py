"""Hyper-connections: Sinkhorn, the way in, the way back, the head."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dsv4.check.cases.mhc import exact_sinkhorn
from dsv4.model.layers import Scope
from dsv4.ops.mhc import Mixed, Mixer, mhc_head, mhc_post, mhc_pre, sigmoid, sinkhorn
from tests.devices import DEVICES, far, normal, ulps
from tests.synthetic import u

EPS = 1e-6
PRE = [0.79742533, 0.17804757, 0.53113943, 0.33153373]
POST = [0.43306458, 1.35107529, 0.79711008, 0.78482962]
COMB = [
    [0.42761767, 0.53180826, 0.02239704, 0.01817608],
    [0.25151730, 0.07165466, 0.40388569, 0.27294135],
    [0.05004869, 0.25816122, 0.03802200, 0.65376711],
    [0.27081540, 0.13837489, 0.53569430, 0.05511442],
]
# Signs whose columns are orthogonal: weights of the four streams can be read off their weighted sum.
SIGNS = torch.tensor([[1.0, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]])


def numbers(name: str, count: int) -> Tensor:
    return torch.from_numpy(u(name, count)).float()


def mixer(fn: Tensor, base: Tensor, scale: Tensor, site: str, device: str = "cpu") -> Mixer:
    stored = {"fn": fn, "base": base, "scale": scale}
    return Scope({f"hc_{site}_{name}": value.to(device) for name, value in stored.items()}).mixer(site, 4)


def known(device: str) -> tuple[Tensor, Mixer]:
    """Streams of root mean square 1 and a mixer that finds `2 u("mix")` in them."""
    fn = 2 * numbers("mix", 24).unsqueeze(1) * SIGNS.flatten() / 16
    return SIGNS.unsqueeze(0).to(device), mixer(fn, numbers("base", 24), torch.tensor([1, 0.5, 0.75]), "attn", device)


@DEVICES
def test_known_values(device: str) -> None:
    """pre, post and comb of the specification, through the whole of `mhc_pre`."""
    streams, weights = known(device)
    mixed = mhc_pre(streams, weights, 20, EPS, 0.0)
    pre = SIGNS.T @ mixed.x[0].cpu() / 4
    assert pre.tolist() == pytest.approx(PRE, abs=2e-6)
    assert mixed.post[0].tolist() == pytest.approx(POST, abs=1e-6)
    assert far(mixed.comb[0], torch.tensor(COMB)) < 1e-6
    assert mixed.comb.sum(1).flatten().tolist() == pytest.approx([0.999999] * 4, abs=5e-7)
    assert mixed.comb.sum(2).flatten().tolist() == pytest.approx([0.999999] * 4, abs=5e-7)


@DEVICES
@pytest.mark.parametrize("iterations", [1, 2, 3, 20])
@pytest.mark.parametrize("size", [0.5, 8.0])
def test_sinkhorn_is_its_definition(iterations: int, size: float, device: str) -> None:
    """At a size of 8 the sums have not settled after two iterations, so that every one of them counts."""
    logits = normal("logits", 50, 4, 4, size=size)
    assert far(sinkhorn(logits.to(device), iterations, EPS), exact_sinkhorn(logits, iterations, EPS)) < 1e-5


def test_a_planted_missing_iteration_is_seen() -> None:
    logits = normal("logits", 50, 4, 4, size=8)
    assert far(sinkhorn(logits, 1, EPS), exact_sinkhorn(logits, 2, EPS)) > 0.1
    assert far(sinkhorn(logits, 3, EPS), exact_sinkhorn(logits, 2, EPS)) > 0.01


def test_a_planted_wrong_order_is_seen() -> None:
    """Columns before rows."""
    logits = normal("logits", 50, 4, 4, size=8)
    assert far(sinkhorn(logits.mT, 2, EPS).mT, exact_sinkhorn(logits, 2, EPS)) > 0.1


@DEVICES
def test_many_iterations_make_it_doubly_stochastic(device: str) -> None:
    a = sinkhorn(normal("logits", 20, 4, 4).to(device), 100, EPS)
    assert bool((a > 0).all())
    for dim in (1, 2):
        assert a.sum(dim).flatten().tolist() == pytest.approx([1.0] * 80, abs=1e-4)


@DEVICES
def test_sinkhorn_survives_large_logits(device: str) -> None:
    logits = torch.tensor([[[1e4, -1e4], [-1e4, 1e4]], [[300.0, 300.0], [300.0, -300.0]]], device=device)
    assert bool(sinkhorn(logits, 20, EPS).isfinite().all())


def test_sinkhorn_leaves_its_input_alone() -> None:
    logits = normal("logits", 3, 4, 4)
    before = logits.clone()
    sinkhorn(logits, 3, EPS)
    assert torch.equal(logits, before)


@DEVICES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_mhc_pre_is_its_formula(dtype: torch.dtype, device: str) -> None:
    streams, fn = normal("streams", 6, 4, 32, dtype=dtype, size=2), normal("fn", 24, 128, size=0.1)
    base, scale = normal("base", 24), torch.tensor([0.7, 1.3, 0.9])
    mixed = mhc_pre(streams.to(device), mixer(fn, base, scale, "ffn", device), 20, EPS, EPS)
    flat = streams.double().flatten(1)
    mix = flat @ fn.double().T / (flat.square().mean(1, keepdim=True) + EPS).sqrt()
    pre, post, comb = (
        (m * s + b) for m, s, b in zip(mix.split((4, 4, 16), 1), scale, base.split((4, 4, 16)), strict=True)
    )
    x = ((torch.sigmoid(pre) + EPS).unsqueeze(-1) * streams.double()).sum(1)
    assert mixed.x.dtype == dtype
    assert far(mixed.x, x) < (0.005 if dtype == torch.bfloat16 else 1e-5)
    assert far(mixed.post, 2 * torch.sigmoid(post)) < 1e-5
    assert far(mixed.comb, exact_sinkhorn(comb.unflatten(1, (4, 4)), 20, EPS)) < 1e-5


@DEVICES
def test_mhc_post_sums_over_the_first_index_of_comb(device: str) -> None:
    """Stream k gets post_k * y + sum_j comb[j, k] * stream_j."""
    y, streams, post, comb = (normal(n, *shape) for n, shape in
                              (("y", (5, 16)), ("s", (5, 4, 16)), ("p", (5, 4)), ("c", (5, 4, 4))))  # fmt: skip
    found = mhc_post(y.to(device), Mixed(y.to(device), post.to(device), comb.to(device), streams.to(device)))
    wanted = torch.einsum("tk,td->tkd", post, y) + torch.einsum("tjk,tjd->tkd", comb, streams)
    other = torch.einsum("tk,td->tkd", post, y) + torch.einsum("tkj,tjd->tkd", comb, streams)
    assert far(found, wanted) < 1e-6
    assert far(found, other) > 0.1


@DEVICES
def test_mhc_head_weighs_by_pre_alone(device: str) -> None:
    streams, fn, base = normal("s", 3, 4, 16), normal("fn", 4, 64, size=0.2), normal("base", 4)
    found = mhc_head(streams.to(device), mixer(fn, base, torch.tensor([1.5]), "head", device), EPS, EPS)
    flat = streams.double().flatten(1)
    mix = flat @ fn.double().T / (flat.square().mean(1, keepdim=True) + EPS).sqrt()
    wanted = ((torch.sigmoid(mix * 1.5 + base) + EPS).unsqueeze(-1) * streams.double()).sum(1)
    assert far(found, wanted) < 1e-5


@DEVICES
def test_sigmoid_is_accurate_everywhere(device: str) -> None:
    x = torch.cat((torch.linspace(-104, 104, 4001), normal("x", 1000)))
    found = sigmoid(x.to(device)).cpu()
    assert float(ulps(found, torch.sigmoid(x.double()))[x > -87].max()) <= (3 if device == "cuda" else 2)
    assert sigmoid(torch.tensor([-1000.0, 1000.0, -89.0])).tolist() == [0.0, 1.0, pytest.approx(0, abs=1e-37)]
