"""Compressed rows: terms, pooling, which blocks end when, and who sees them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dsv4.model.attention import compressor_of
from dsv4.model.batch import Segment, Steps, make_batch
from dsv4.model.layers import Scope
from dsv4.ops.compress import (
    Compressor,
    Ring,
    StepTokens,
    block_tokens,
    compress_keys,
    compress_kv,
    compressor_terms,
    finish_entry,
    pool,
)
from dsv4.ops.kv import read_kv
from dsv4.ops.linear import matmul
from dsv4.ops.norm import rms_norm
from dsv4.ops.quantize import hadamard, quantize_index, quantize_kv
from dsv4.ops.rope import frequencies, rope, rotation
from dsv4.quant.index_keys import FP4_KEYS, FP8_KEYS, KeyLayout
from dsv4.quant.kv_rows import KvRow
from dsv4.quant.rounding import FP4, FP8
from dsv4.taps import listening
from tests import golden_model
from tests.devices import DEVICES, far, normal
from tests.test_golden_model import FLOAT, Variant

DIM = 6


def stored(ratio: int) -> dict[str, Tensor]:
    """Weights of a compressor as a checkpoint holds them."""
    width = (2 if ratio == 4 else 1) * DIM
    shapes = {"wkv.weight": (width, 16), "wgate.weight": (width, 16), "ape": (ratio, width), "norm.weight": (DIM,)}
    return {name: normal(name, *shape) for name, shape in shapes.items()}


def pooled(x: Tensor, weights: dict[str, Tensor], ratio: int) -> Tensor:
    """Entries of all complete blocks by the definition, in FP64, one channel at a time."""
    wide = {name: weight.double() for name, weight in weights.items()}
    values, scores = x.double() @ wide["wkv.weight"].T, x.double() @ wide["wgate.weight"].T
    scores += wide["ape"][torch.arange(len(x)) % ratio]
    entries = torch.zeros(len(x) // ratio, DIM, dtype=torch.float64)
    for block in range(len(entries)):
        for channel in range(DIM):
            own = [(t, channel + (DIM if ratio == 4 else 0)) for t in range(block * ratio, (block + 1) * ratio)]
            before = [(t, channel) for t in range((block - 1) * ratio, block * ratio)] if ratio == 4 and block else []
            picks = torch.tensor(before + own).unbind(1)
            entries[block, channel] = torch.softmax(scores[picks], 0) @ values[picks]
    return entries


@DEVICES
@pytest.mark.parametrize("ratio", [4, 8, 128])
def test_pooling_is_its_definition(ratio: int, device: str) -> None:
    """Both halves of the overlapped ratio, a position bias in the score alone, a softmax for every channel."""
    x, given = normal("x", 3 * ratio, 16), stored(ratio)
    weights = compressor_of(Scope({f"c.{name}": weight.to(device) for name, weight in given.items()}, "c."))
    terms = compressor_terms(x.to(device), weights, torch.arange(len(x), device=device))
    tokens = block_tokens(torch.arange(ratio - 1, len(x), ratio, device=device), ratio)
    entries = pool(terms[tokens.clamp(min=0)], tokens, ratio, torch.float32)
    assert far(entries, pooled(x, given, ratio)) < 1e-5


@DEVICES
def test_the_first_block_has_no_block_before_it(device: str) -> None:
    """Whatever stands where negative positions would be has no weight, NaN included."""
    terms, tokens = normal("t", 1, 8, 2, 2 * DIM).to(device), torch.arange(-4, 4, device=device).unsqueeze(0)
    poisoned = terms.clone()
    poisoned[:, :4] = float("nan")
    assert torch.equal(pool(poisoned, tokens, 4, torch.float32), pool(terms, tokens, 4, torch.float32))
    own_values, own_scores = terms[0, 4:, :, DIM:].unbind(1)
    assert far(pool(terms, tokens, 4, torch.float32)[0], (torch.softmax(own_scores, 0) * own_values).sum(0)) < 1e-6


def test_large_scores_do_not_overflow() -> None:
    terms = normal("t", 2, 8, 2, 2 * DIM, size=1e4)
    assert bool(pool(terms, torch.arange(8).expand(2, -1), 4, torch.float32).isfinite().all())


def test_blocks_read_two_spans_when_overlapped_and_one_otherwise() -> None:
    assert block_tokens(torch.tensor([3, 11]), 4).tolist() == [list(range(-4, 4)), list(range(4, 12))]
    assert block_tokens(torch.tensor([7, 15]), 8).tolist() == [list(range(8)), list(range(8, 16))]


def test_an_entry_is_normalised_and_turned_to_its_first_position() -> None:
    entry, norm, steps = normal("e", 3, 16), normal("n", 16), frequencies(8, 160000.0)
    turn = rotation(torch.tensor([0, 4, 128]), steps)
    assert torch.equal(finish_entry(entry, norm, turn, 1e-6), rope(rms_norm(entry, norm, 1e-6), turn))


# --- a step in one op -------------------------------------------------------------------------------------------------


STEPS = ((0, 2), (2, 3), (3, 4), (4, 11), (11, 12), (12, 23))


class Stepped:
    """23 tokens of one sequence, ratio 4, by steps: what the ops are given, and what the smaller ones make of it."""

    slot, length, dims = 1, 13, 128

    def __init__(self) -> None:
        x, project = normal("x", 23, 16), normal("p", 4 * self.dims, 16)
        self.ape, self.norm, self.steps = (
            normal("a", 4, 2, 2 * self.dims),
            normal("n", self.dims),
            frequencies(64, 1.6e5),
        )
        self.ape[:, 0] = 0
        self.ring = Ring(torch.full((2 * self.length, 2, 2 * self.dims), float("nan")), self.length)
        self.projected = matmul(x, project)
        self.terms = compressor_terms(x, Compressor(project, self.ape, self.norm), torch.arange(23))
        self.ends = torch.arange(3, 23, 4)

    def run(self, op: Callable[..., None], pages: Tensor, *more: object) -> None:
        for start, stop in STEPS:
            at = torch.arange(start, stop)
            turn, slots = rotation(at // 4 * 4, self.steps), torch.full_like(at, self.slot)
            given = self.projected[start:stop], self.ape, self.norm, 1e-6, turn, StepTokens(slots, at, at // 4)
            op(*given, self.ring, stop - start, pages, *more)

    def entries(self, first: int = 3) -> Tensor:
        """Turned to the position that is so many before their block's last."""
        needed = block_tokens(self.ends, 4)
        pooled = pool(self.terms[needed.clamp(min=0)], needed, 4, torch.bfloat16)
        return finish_entry(pooled, self.norm, rotation(self.ends - first, self.steps), 1e-6)


def test_a_step_stores_what_the_model_keeps() -> None:
    """Rounded, turned and stored as `Attention.remember` does it, and the ring has what the last tokens added."""
    given, layout = Stepped(), KvRow(128, 64)
    pages = torch.zeros(1, layout.page_bytes(8), dtype=torch.uint8)
    given.run(compress_kv, pages)
    kept = read_kv(pages, torch.arange(len(given.ends)), 128, 64)
    assert torch.equal(kept, quantize_kv(given.entries(), 64))
    assert not torch.equal(kept, quantize_kv(given.entries(0), 64))
    last = torch.arange(23 - given.length, 23)
    assert torch.equal(given.ring.terms[given.slot * given.length + last % given.length], given.terms[last])
    assert bool(given.ring.terms[: given.length].isnan().all())


@pytest.mark.parametrize("layout", [FP4_KEYS, FP8_KEYS], ids=lambda layout: layout.name)
def test_keys_are_what_the_indexer_keeps(layout: KeyLayout) -> None:
    """Of FP4 to the bit; turned to the first position and to no other, spread or not as it was asked."""
    rounding = FP4 if layout == FP4_KEYS else FP8
    wanted = {
        (first, spread): rounding(hadamard(given.entries(first)) if spread else given.entries(first))
        for given in [Stepped()]
        for first in (0, 3)
        for spread in (True, False)
    }
    for spread in (True, False):
        given, pages = Stepped(), torch.zeros(1, layout.page_bytes(8), dtype=torch.uint8)
        given.run(compress_keys, pages, layout, spread)
        data, scales = pages[0].split((8 * layout.data_bytes, 8 * 4))
        keys = layout.decode(data.view(8, -1), scales.view(8, -1)).bfloat16()[: len(given.ends)]
        assert [case for case, key in wanted.items() if torch.equal(keys, key)] == [(3, spread)]
    assert torch.equal(wanted[3, True], quantize_index(Stepped().entries(), rounding))


# --- which blocks a step ends ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("start", "count"), [(0, 3), (0, 4), (3, 1), (2, 7), (4, 3), (120, 20), (127, 1), (128, 127)])
def test_a_step_closes_the_blocks_whose_last_token_it_holds(start: int, count: int) -> None:
    """No partial block, and one that began in an earlier step too; turned to the first position of the block."""
    steps = Steps(frequencies(8, 1e4), frequencies(8, 1.6e5))
    batch = make_batch([Segment(2, start, [1] * count), Segment(0, 3, [5])], [0, 4, 128], steps)
    assert set(batch.closing) == {4, 128}
    for ratio, closing in batch.closing.items():
        places = [(2, p) for p in range(start, start + count)] + [(0, 3)]
        wanted = [(slot, p, p + 1 - ratio) for slot, p in places if (p + 1) % ratio == 0]
        if not wanted:
            assert closing is None
            continue
        assert closing is not None
        slots, ends, firsts = map(list, zip(*wanted, strict=True))
        assert (closing.slots.tolist(), closing.ends.tolist()) == (slots, ends)
        assert torch.equal(closing.turn.cos, rotation(torch.tensor(firsts), steps.yarn).cos)


# --- who sees them ---------------------------------------------------------------------------------------------------


def test_each_token_selects_among_complete_blocks_its_own_included() -> None:
    """Token t sees blocks 0 .. (t+1)//4 - 1, three at most are chosen: in the step that ends a block, too."""
    config, chosen = golden_model.config(), []  # type: ignore[var-annotated]
    variant = Variant(config, golden_model.weights(config), FLOAT)
    with listening(lambda name, layer, tensor: chosen.append(tensor) if name == "selected" and layer == 1 else None):
        variant.run(22)
    for token, entries in enumerate(chosen[0].tolist()):
        picked, visible = [e for e in entries if e >= 0], (token + 1) // 4
        assert len(set(picked)) == len(picked) == min(3, visible)
        assert picked == sorted(picked)
        assert all(e < visible for e in picked)
