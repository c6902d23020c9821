"""Index logits over stored keys: a value by hand, the reference implementation's roundings, places beyond the end."""

from __future__ import annotations

import math

import pytest
import torch

from dsv4.check.cases.index import given, pool, queries
from dsv4.check.contract import Arguments
from dsv4.check.metrics import differing
from dsv4.ops.index import index_scores
from dsv4.ops.index_logits import index_logits, read_keys
from dsv4.quant.index_keys import FP4_KEYS, KEY_LAYOUTS, KeyLayout
from tests.devices import DEVICES, far

BOTH = pytest.mark.parametrize("layout", KEY_LAYOUTS.values(), ids=lambda one: one.name)


def on(device: str, of: Arguments) -> Arguments:
    return tuple(x.to(device) if isinstance(x, torch.Tensor) else x for x in of)


@DEVICES
@BOTH
def test_a_value_by_hand(layout: KeyLayout, device: str) -> None:
    """Key 1 of two, in the second page of its sequence: 3 * relu(2 - 6) - 0.5 * relu(6)."""
    q, keys = torch.zeros(1, 2, 128), torch.zeros(2, 128)
    q[0, 0, 0], q[0, 0, 127], q[0, 1, 127] = 1.0, -2.0, 2.0
    keys[1, 0], keys[1, 127] = 2.0, 3.0
    pages = torch.zeros(3, layout.page_bytes(1), dtype=torch.uint8)
    data, scales = layout.encode(keys)
    pages[[2, 0]] = torch.nn.functional.pad(torch.cat((data, scales), 1), (0, pages.shape[1] - layout.data_bytes - 4))
    table, weights = torch.tensor([[-1, -1], [2, 0]]), torch.tensor([[3.0, -0.5]])
    of = (*layout.encode(q), weights, pages, table, torch.tensor([1]), torch.tensor([2]), 64)
    found = index_logits(*on(device, of))[0]
    assert found[:2].tolist() == [0.0, -3.0]
    assert (found[2:] == -math.inf).all()


@DEVICES
@BOTH
def test_they_are_index_scores_but_for_the_roundings_to_bf16(layout: KeyLayout, device: str) -> None:
    q, q_scales, weights, pages, table, slots, visible, width = on(device, given(layout, 6, 192, 32))
    weights = weights.bfloat16()
    logits = index_logits(q, q_scales, weights.float(), pages, table, slots, visible, width)
    numbers = torch.arange(192, device=device).repeat(6, 1)
    keys = read_keys(pages, table, slots, numbers, layout)
    for dtype, bound in ((torch.float32, 1e-6), (torch.bfloat16, 0.02)):
        rows = torch.arange(6 * 192, device=device).view(6, 192)
        heads = layout.decode(q, q_scales).to(dtype)
        scores = index_scores(heads, weights.to(dtype), keys.flatten(0, 1).to(dtype), rows)
        seen = numbers < visible.unsqueeze(1)
        assert far(logits[seen], scores[seen]) < bound


@BOTH
def test_a_token_has_the_bits_that_it_has_alone(layout: KeyLayout) -> None:
    """Also where more places are asked for."""
    *rows, pages, table, slots, visible, width = given(layout, 7, 128, 32)
    whole = index_logits(*rows, pages, table, slots, visible, width)
    for t in range(7):
        own = (*(x[t : t + 1] for x in rows), pages, table, slots[t : t + 1], visible[t : t + 1])
        assert not differing(index_logits(*own, width), whole[t : t + 1])
        longer = index_logits(*own, width + 192)
        assert not differing(longer[:, :width], whole[t : t + 1])
        assert (longer[:, width:] == -math.inf).all()


@DEVICES
@BOTH
def test_no_token_and_no_place(layout: KeyLayout, device: str) -> None:
    pages, table = pool(layout, 1, 64, 32)
    nobody = torch.zeros(0, dtype=torch.int64)
    of = on(device, (*queries(layout, 0), pages, table, nobody, nobody))
    assert index_logits(*of, 64).shape == (0, 64)
    one = on(device, (*queries(layout, 1), pages, table, torch.tensor([0]), torch.tensor([0])))
    assert index_logits(*one, 0).shape == (1, 0)
    assert (index_logits(*one, 64) == -math.inf).all()


@DEVICES
def test_a_nan_reaches_the_keys_and_tokens_that_are_its_own(device: str) -> None:
    q, q_scales, weights, pages, table, slots, visible, width = given(FP4_KEYS, 4, 64, 32)
    pages[table[0, 1], 32 * 64 + 4 * 3] = 255
    q_scales[3, 9, 1] = 255
    found = index_logits(*on(device, (q, q_scales, weights, pages, table, slots, visible, width))).cpu()
    wanted = torch.zeros(4, 64, dtype=torch.bool)
    wanted[:3, 35], wanted[3, : visible[3]] = True, True
    assert torch.equal(found.isnan(), wanted)
