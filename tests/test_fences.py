"""Fences around tensors: every byte that is written beside one is seen."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dsv4.check.fences import GUARD, Allocations, fence, fenced, transform
from dsv4.ops.mhc import Mixed
from dsv4.quant.formats import NVFP4

HALF = torch.bfloat16


@pytest.mark.parametrize("dtype", [HALF, torch.float32, torch.int64, torch.uint8, torch.float8_e4m3fn])
@pytest.mark.parametrize(
    ("size", "stride"), [((3, 5), (5, 1)), ((3, 5), (8, 1)), ((2, 3), (9, 2)), ((), ()), ((0, 4), (4, 1))]
)
def test_a_fence_sees_every_byte_but_the_tensors_own(
    size: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype
) -> None:
    one = fence(size, stride, dtype, "cpu")
    assert (tuple(one.view.shape), one.view.stride()) == (size, stride)
    assert one.view.data_ptr() % 64 == 0 or not one.view.numel()
    assert one.trespass() == 0
    one.view.copy_(torch.ones(size).to(dtype))
    assert one.trespass() == 0
    own = one.view.numel() * one.view.element_size()
    one.run.fill_(0)
    assert one.trespass() == one.run.numel() - own


def test_a_fence_is_made_of_nan() -> None:
    one = fenced(torch.ones(2, 3)[:, ::2], "cpu")
    assert one.view.tolist() == [[1, 1], [1, 1]]
    assert one.view.as_strided((4,), (1,), one.view.storage_offset() - 2).isnan().tolist() == [True, True, False, True]
    assert one.run.numel() > 2 * GUARD


def test_what_is_allocated_lies_between_fences() -> None:
    like = torch.ones(3, dtype=HALF)
    with Allocations() as made:
        empty = [torch.empty(2, 3), torch.empty_like(like), like.new_empty(4), torch.empty_strided((2, 2), (4, 1))]
        zeroed = [torch.zeros(3), torch.zeros_like(like), like.new_zeros(2)]
    assert len(made.fences) == 7
    assert all(bool(x.isnan().all()) for x in empty)
    assert all(not x.any() for x in zeroed)
    assert all(one.trespass() == 0 for one in made.fences)


def test_tensors_are_changed_wherever_they_are() -> None:
    q = NVFP4.encode(torch.ones(1, 16))
    value = (q, Mixed(*(torch.ones(n) for n in range(4))), None, "row", 1.0)
    seen: list[Tensor] = []
    changed = transform(value, lambda x: seen.append(x) or x.clone())  # type: ignore[func-returns-value]
    assert len(seen) == 3 + 4
    assert type(changed[1]) is Mixed
    assert changed[2:] == (None, "row", 1.0)
