"""The mixture on stored experts: that of `moe`, to the bit."""

from __future__ import annotations

import pytest
import torch

from dsv4.check.cases import experts as cases
from dsv4.check.cases.expert_matrices import of_format
from dsv4.ops.experts import store_experts, stored_moe
from dsv4.ops.moe import Expert, Route, moe
from dsv4.ops.quantize import quantize
from dsv4.quant.formats import FP8_BLOCK, FP8_BLOCK_F32, FP8_ROW, MXFP4, NVFP4, Format, FormatError
from dsv4.quant.rounding import OFFICIAL
from tests.devices import normal

D, WIDTH = 256, 128


def expert(name: str, fmt: Format = MXFP4) -> Expert:
    shapes = {"w1": (WIDTH, D), "w3": (WIDTH, D), "w2": (D, WIDTH)}
    return Expert(*(of_format(f"{name} {part}", *shape, fmt) for part, shape in shapes.items()))


@pytest.mark.parametrize("fmt", [MXFP4, *cases.OTHERS])
@pytest.mark.parametrize("tokens", [1, 7])
def test_it_is_the_mixture_of_the_model(tokens: int, fmt: Format) -> None:
    experts, x = [expert(f"e{n}", fmt) for n in range(5)], normal("x", tokens, D, dtype=torch.bfloat16)
    shared = expert("shared", FP8_BLOCK)
    chosen = torch.stack([torch.randperm(5)[:3] for _ in range(tokens)])
    picks = Route(chosen, torch.rand(tokens, 3) + 0.1)
    found = stored_moe(quantize(x, FP8_ROW), picks, store_experts(experts, shared), 10.0, x.dtype)
    assert torch.equal(found, moe(x, picks, experts, shared, 10.0, OFFICIAL))


@pytest.mark.parametrize(
    ("routed", "shared", "words"),
    [
        (
            expert("e")._replace(w2=torch.ones(D, WIDTH)),
            expert("s", FP8_BLOCK),
            "float32; wanted mxfp4 or nvfp4 or fp8",
        ),
        (expert("e"), expert("s"), "mxfp4; wanted fp8 or fp8_f32"),
        (expert("e")._replace(w3=expert("e", NVFP4).w3), expert("s", FP8_BLOCK_F32), "cannot be packed"),
    ],
)
def test_what_cannot_be_stored_is_refused(routed: Expert, shared: Expert, words: str) -> None:
    with pytest.raises(FormatError, match=words):
        store_experts([routed], shared)


def test_experts_of_two_formats_are_refused() -> None:
    with pytest.raises(FormatError, match="cannot be stacked; got nvfp4 256 x 256; wanted mxfp4 256 x 256"):
        store_experts([expert("a"), expert("b", NVFP4)], expert("s", FP8_BLOCK))


def test_odd_cases_leave_most_numbers_alone() -> None:
    """They would judge nothing if all were NaN."""
    for make in (cases._odd_activations, cases._odd_scales, cases._odd_nvfp4_scales):
        found = stored_moe(*make())
        assert 0 < float(found.isnan().float().mean()) < 0.6
    for make in (cases._far_apart, cases._far_apart_nvfp4):
        assert not stored_moe(*make()).isnan().any()


def test_odd_scales_stand_apart_and_fit() -> None:
    for make in (cases._far_apart, cases._far_apart_nvfp4):
        assert make()[2].routed.up.apart[0].tolist() == [1, 0]
        assert make()[2].routed.down.apart[0].tolist() == [1, 0]
    for make in (cases._odd_scales, cases._odd_nvfp4_scales):
        assert make()[2].routed.up.apart[0].tolist() == [0, 0]
        assert make()[2].routed.down.apart[0].tolist() == [0, 1]


def test_what_cancels_leaves_the_small_ones() -> None:
    """The third expert and the shared one give about as much, the others ten million times that."""
    x, picks, experts, *rest = cases._cancelling(1)
    none, third, first = (
        float(stored_moe(x, Route(chosen, torch.ones(chosen.shape)), experts, *rest).float().std())
        for chosen in (picks.experts[:, :0], torch.full((6, 1), 2), torch.zeros(6, 1, dtype=torch.int64))
    )
    assert third > 1.2 * none > 0.01
    assert first > 1e7 * third
