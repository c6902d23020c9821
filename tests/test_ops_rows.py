"""Every op: a row's bits do not depend on the rows beside it (CPU), and CUDA tensors give what CPU tensors give."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dsv4.model.attention import compressor_of
from dsv4.model.layers import Scope
from dsv4.ops.attention import sparse_attention, window_positions
from dsv4.ops.compress import compressor_terms, finish_entry, pool
from dsv4.ops.index import head_weights, index_scores, select_rows, top_k
from dsv4.ops.linear import grouped_linear, linear
from dsv4.ops.mhc import Mixed, mhc_head, mhc_post, mhc_pre, sigmoid, sinkhorn
from dsv4.ops.moe import Expert, Route, moe, route, silu, softplus, swiglu
from dsv4.ops.norm import rms_norm, unit_rms
from dsv4.ops.quantize import _hadamard_matrix, hadamard, quantize_index, quantize_kv
from dsv4.ops.rope import Rotation, _swapped, frequencies, rope, rotation
from dsv4.quant import e2m1, e8m0
from dsv4.quant.formats import FP8_BLOCK
from dsv4.quant.rounding import FP8, OFFICIAL
from dsv4.quant.tensor import QTensor
from tests.devices import bits, far, normal

T = 23
HALF = torch.bfloat16
Run = Callable[..., Any]


def scope(device: str, **weights: Tensor) -> Scope:
    return Scope({f"w.{name.replace('__', '.')}": weight.to(device) for name, weight in weights.items()}, "w.")


def mixer(device: str, site: str, rows: int) -> Any:
    given = {
        "fn": normal("fn", rows, 192, size=0.1),
        "base": normal("base", rows),
        "scale": torch.ones(1 if rows == 4 else 3),
    }
    return scope(device, **{f"hc_{site}_{name}": value for name, value in given.items()}).mixer(site, 4)


def compressor(device: str) -> Any:
    return compressor_of(
        scope(device, wkv__weight=normal("a", 48, 48), wgate__weight=normal("b", 48, 48), ape=normal("c", 4, 48),
              norm__weight=normal("d", 24))
    )  # fmt: skip


def expert(device: str, name: str) -> Expert:
    return Expert(*(FP8_BLOCK.encode(normal(f"{name}{n}", 48, 48, size=0.2)).to(device) for n in range(3)))


def eight(device: str) -> QTensor:
    return FP8_BLOCK.encode(normal("w8", 40, 200)).to(device)


def picked(choice: Tensor, weights: Tensor, x: Tensor) -> Tensor:
    """A mixture of four experts and the shared one."""
    experts = [expert(x.device.type, f"e{n}") for n in range(4)]
    return moe(x, Route(choice % 4, weights.abs() + 0.1), experts, expert(x.device.type, "s"), 10.0, rounds=OFFICIAL)


def turned(x: Tensor, positions: Tensor) -> Tensor:
    return rope(x, rotation(positions, frequencies(16, 160000.0, 16, 65536).to(x.device)))


ATTENDED = normal("pool", 300, 48, dtype=HALF)
KEYS = normal("keys", 300, 32, dtype=HALF)
POSITIONS = torch.arange(T) * 37
HEADS = normal("x", T, 2, 40, dtype=HALF)
CHOICE = torch.stack([torch.randperm(300, generator=torch.Generator().manual_seed(n))[:128] for n in range(T)])

# Each: a function of tensors whose first dimension is the row, and those tensors. Widths are no multiple of a vector.
OPS: dict[str, tuple[Run, tuple[Tensor, ...]]] = {
    "rms_norm": (lambda x: rms_norm(x, normal("w", 49).to(x.device), 1e-6), (normal("x", T, 49, dtype=HALF),)),
    "rms_norm of streams": (lambda x: rms_norm(x, normal("w", 48).to(x.device), 1e-6), (normal("x", T, 4, 48),)),
    "unit_rms": (lambda q: unit_rms(q, 1e-6), (normal("q", T, 3, 48, dtype=HALF),)),
    "rotation": (lambda p: tuple(rotation(p, frequencies(6, 1e4).to(p.device))), (POSITIONS,)),
    "rope": (turned, (normal("x", T, 48, dtype=HALF), POSITIONS)),
    "rope of heads": (turned, (normal("x", T, 3, 48, dtype=HALF), POSITIONS)),
    "sigmoid": (sigmoid, (normal("x", T, 3, size=20),)),
    "softplus": (softplus, (normal("x", T, 3, size=20),)),
    "silu": (silu, (normal("x", T, 3, size=20),)),
    "swiglu": (lambda g, u: swiglu(g, u, 1.0), (normal("g", T, 7, dtype=HALF), normal("u", T, 7, dtype=HALF))),
    "sinkhorn": (lambda x: sinkhorn(x, 20, 1e-6), (normal("x", T, 4, 4, size=3),)),
    "mhc_pre": (lambda s: tuple(mhc_pre(s, mixer(s.device.type, "attn", 24), 20, 1e-6, 1e-6))[:3],
                (normal("s", T, 4, 48, dtype=HALF),)),
    "mhc_post": (lambda y, s, p, c: mhc_post(y, Mixed(y, p, c, s)),
                 (normal("y", T, 48, dtype=HALF), normal("s", T, 4, 48), normal("p", T, 4), normal("c", T, 4, 4))),
    "mhc_head": (lambda s: mhc_head(s, mixer(s.device.type, "head", 4), 1e-6, 1e-6),
                 (normal("s", T, 4, 48, dtype=HALF),)),
    "linear": (lambda x: linear(x, eight(x.device.type), FP8), (normal("x", T, 200, dtype=HALF),)),
    "grouped_linear": (lambda x: grouped_linear(x, normal("w", 14, 40).to(x.device)), (HEADS,)),
    "hadamard": (hadamard, (normal("x", T, 3, 32, dtype=HALF),)),
    "quantize_index": (quantize_index, (normal("x", T, 32, dtype=HALF),)),
    "quantize_kv": (lambda x: quantize_kv(x, 16), (normal("x", T, 112, dtype=HALF),)),
    "compressor_terms": (lambda x, p: compressor_terms(x, compressor(x.device.type), p),
                         (normal("x", T, 48, dtype=HALF), POSITIONS)),
    "pool": (lambda t, p: pool(t, p, 4, HALF),
             (normal("t", T, 8, 2, 34), torch.arange(T).unsqueeze(1) * 2 + torch.arange(-4, 4))),
    "finish_entry": (lambda e, c, s: finish_entry(e, normal("n", 48).to(e.device), Rotation(c, s), 1e-6),
                     (normal("e", T, 48, dtype=HALF), normal("c", T, 16), normal("s", T, 16))),
    "head_weights": (lambda x: head_weights(x, normal("w", 5, 48).to(x.device), 32), (normal("x", T, 48, dtype=HALF),)),
    "index_scores": (lambda q, w, r: index_scores(q, w, KEYS.to(q.device), r),
                     (normal("q", T, 5, 32, dtype=HALF), normal("w", T, 5, dtype=HALF), CHOICE)),
    "top_k": (lambda s: top_k(s, 9), (normal("s", T, 70, dtype=HALF).float(),)),
    "select_rows": (lambda s, v: select_rows(s, v, 9), (normal("s", T, 64, dtype=HALF).float(), torch.arange(T) * 2)),
    "window_positions": (lambda p: window_positions(p, 128), (POSITIONS,)),
    "sparse_attention": (lambda q, r: sparse_attention(q, ATTENDED.to(q.device), r, normal("sink", 3).to(q.device)),
                         (normal("q", T, 3, 48, dtype=HALF), CHOICE)),
    "sparse_attention of FP32": (
        lambda q, r: sparse_attention(q, ATTENDED.float().to(q.device), r, normal("sink", 3).to(q.device)),
        (normal("q", T, 3, 48), CHOICE)),
    "route": (lambda x: tuple(route(x, normal("g", 9, 48).to(x.device), normal("b", 9).to(x.device), None, 3, 1.5)),
              (normal("x", T, 48, dtype=HALF),)),
    "moe": (picked, (CHOICE[:, :2], normal("w", T, 2), normal("x", T, 48, dtype=HALF))),
}  # fmt: skip


def results(found: Any) -> list[Tensor]:
    return list(found) if isinstance(found, tuple) else [found]


@pytest.mark.parametrize("name", OPS)
def test_a_row_has_the_same_bits_in_any_company(name: str, seed: int) -> None:
    """Every row alone, every prefix, and random runs of rows, against all rows at once."""
    run, rows = OPS[name]
    together, draw = results(run(*rows)), random.Random(seed)
    spans = [(n, n + 1) for n in range(T)] + [(0, n) for n in range(2, T)]
    spans += [tuple(sorted(draw.sample(range(T + 1), 2))) for _ in range(10)]  # type: ignore[misc]
    for start, end in spans:
        for part, whole in zip(results(run(*(x[start:end] for x in rows))), together, strict=True):
            assert torch.equal(bits(part), bits(whole[start:end])), f"rows {start} to {end}"


@pytest.mark.parametrize("name", ["softplus", "linear", "sinkhorn"])
def test_a_planted_dependence_is_seen(name: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A last bit that follows the number of rows."""
    run, rows = OPS[name]
    nudged = lambda *x: torch.nextafter(r := run(*x).float(), r + 1) if len(x[0]) % 8 == 0 else run(*x).float()  # noqa: E731
    monkeypatch.setitem(OPS, name, (nudged, rows))
    with pytest.raises(AssertionError, match="rows "):
        test_a_row_has_the_same_bits_in_any_company(name, seed)


@pytest.mark.gpu
@pytest.mark.parametrize("name", OPS)
def test_cuda_gives_what_the_cpu_gives(name: str) -> None:
    """Integers exactly; FP32 to 1e-4 of the largest number, BF16 to 0.02: a few steps, where a rounding flips."""
    run, rows = OPS[name]
    for there, here in zip(results(run(*(x.cuda() for x in rows))), results(run(*rows)), strict=True):
        assert there.is_cuda
        assert there.dtype == here.dtype
        if here.dtype == torch.int64:
            assert torch.equal(there.cpu(), here)
        else:
            assert far(there, here) < (0.02 if here.dtype == HALF else 1e-4)


@pytest.mark.parametrize("table", [_hadamard_matrix, _swapped, e2m1._table, e8m0._table])
def test_tables_made_while_inferring_serve_training_too(table: Any) -> None:
    given = (torch.device("cpu"),) if table in (e2m1._table, e8m0._table) else (48, torch.device("cpu"))
    with torch.inference_mode():
        assert not table(*given).is_inference()
