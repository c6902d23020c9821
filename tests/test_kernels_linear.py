"""How FP8 matrices lie on blocks: what decides the bits, what has to fit; on a GPU that nothing else decides bits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dsv4.check.cases import grouped, mixed
from dsv4.check.cases.linear import SHAPES, SLICES, _given
from dsv4.check.contract import placed
from dsv4.check.metrics import differing
from dsv4.kernels import linear, linear_mixed, linear_wide, matmul
from dsv4.kernels.linear_wide import Plan
from dsv4.ops.linear import grouped_scaled_matmul, scaled_matmul, shared_input
from dsv4.quant.tensor import QTensor

WHOLE = 227 << 10  # bytes of shared memory that a block of Hopper can have


@pytest.mark.parametrize("shape", (SHAPES | SLICES).values(), ids=SHAPES | SLICES)
def test_every_matrix_of_the_releases_fits(shape: tuple[int, int]) -> None:
    rows, columns = shape
    form = linear.form(rows, columns)
    blocks = columns // 128
    assert form.segments in (1, 2, 4)
    assert blocks // form.segments >= min(blocks, 8)
    assert form.clusters * form.segments <= 2 * linear.MULTIPROCESSORS
    for tokens in (8, 16, 32):
        stages, smem = linear.memory(form, columns, tokens)
        assert 4 <= stages <= 12
        assert smem + 1024 <= WHOLE


@pytest.mark.parametrize("shape", (grouped.SHAPES | grouped.SLICES).values(), ids=grouped.SHAPES | grouped.SLICES)
def test_a_group_has_clusters_of_its_own(shape: tuple[int, int, int]) -> None:
    rows, columns, groups = shape
    form = linear.form(rows, columns, groups)
    assert form.clusters % groups == 0
    assert form.clusters * form.segments <= 2 * linear.MULTIPROCESSORS
    assert form.turns == -(-rows // 64 // form.clusters)
    assert form.segments == linear.form(rows, columns).segments
    for tokens in (8, 16, 32):
        stages, smem = linear.memory(form, columns, tokens)
        assert 4 <= stages <= 12
        assert smem + 1024 <= WHOLE


@pytest.mark.parametrize("shape", mixed.SHAPES.values(), ids=mixed.SHAPES)
def test_two_matrices_of_one_launch_find_room_at_once(shape: tuple[int, int, int]) -> None:
    dense, stored, columns = shape
    plan, machine = linear_mixed.plan(dense, stored, columns), matmul.Machine(linear.MULTIPROCESSORS, 228 << 10)
    form, few = plan.form, matmul.few(16, dense, columns, 1, machine)
    assert few is not None
    assert form.segments == linear.form(stored, columns).segments
    assert form.clusters * form.turns * 64 >= stored
    assert plan.dense % form.segments == 0
    assert 0 < form.segments * form.clusters + plan.dense <= 2 * linear.MULTIPROCESSORS
    assert max(few.smem, linear.memory(form, columns, 8)[1]) + 2048 <= 114 << 10


def test_segments_follow_from_the_shape_alone() -> None:
    """They are the order of the sums: nothing that differs between two machines or two steps may decide them."""
    assert [linear.form(rows, 8192).segments for rows in (64, 4096, 1 << 17)] == [4, 4, 4]
    assert [linear.form(4096, columns).segments for columns in (128, 1024, 2048, 4096, 8192, 16384)] == [
        1,
        1,
        2,
        4,
        4,
        4,
    ]


@pytest.mark.parametrize("shape", (SHAPES | SLICES).values(), ids=SHAPES | SLICES)
@pytest.mark.parametrize("tokens", [33, 64, 128, 129, 512, 4096, 8192])
def test_every_plan_fits(shape: tuple[int, int], tokens: int) -> None:
    segments = linear.form(*shape).segments
    given = linear_wide.plan(shape[0], segments, tokens)
    assert given.bytes + 1024 <= WHOLE
    assert 3 <= given.stages <= 8
    assert given.kind != "wide256" or segments == 1
    assert given.kind != "split" or segments > 1


def test_what_a_plan_decides() -> None:
    """Few tiles are split by segments; one segment and many tiles have tiles of 256 tokens."""
    assert linear_wide.plan(4096, 4, 128) == Plan("split", stages=5)
    assert linear_wide.plan(7168, 4, 128) == Plan("split", stages=5)
    assert linear_wide.plan(4096, 4, 256) == Plan("wide128", stages=6)
    assert linear_wide.plan(4096, 2, 256) == Plan("split", stages=5)
    assert linear_wide.plan(4096, 2, 512) == Plan("wide128", stages=6)
    assert linear_wide.plan(4096, 4, 8192) == Plan("wide128", stages=6)
    assert linear_wide.plan(32768, 1, 129) == Plan("wide256", stages=4)
    assert linear_wide.plan(32768, 1, 128) == Plan("wide128", stages=6)
    assert linear_wide.plan(4096, 1, 1024) == Plan("wide128", stages=6)


# --- on a GPU -------------------------------------------------------------------------------------------------------

PLANS = [Plan(kind, width=width) for kind in linear_wide.KINDS for width in (1, 3, 8)]
MATRICES = {"one": (320, 1536), "two": (320, 2304), "four": (448, 4096)}  # by segments


@pytest.fixture(scope="module", params=MATRICES)
def alone(request: pytest.FixtureRequest) -> tuple[QTensor, QTensor, int, Tensor]:
    """Tokens, a matrix, its segments, and the products of every token by itself."""
    rows, columns = MATRICES[request.param]
    x, weight, _ = placed(_given(4096, rows, columns, torch.bfloat16), torch.device("cuda"))
    return x, weight, linear.form(rows, columns).segments, product([few_of(x, t, 1) for t in range(len(x))], weight)


def few_of(x: QTensor, start: int, count: int) -> QTensor:
    return QTensor(x.data[start : start + count], x.scale[start : start + count], x.format)


def product(parts: list[QTensor], weight: QTensor) -> Tensor:
    run = scaled_matmul.implementations["fused"].run
    return torch.cat([run(part, weight, torch.float32) for part in parts])


@pytest.mark.gpu
def test_a_row_has_its_own_bits_in_a_batch_of_every_size(alone: tuple[QTensor, QTensor, int, Tensor]) -> None:
    x, weight, _, wanted = alone
    wrong = [n for n in range(1, 129) if differing(product([few_of(x, 100, n)], weight), wanted[100 : 100 + n])]
    assert wrong == []


@pytest.mark.gpu
def test_a_row_has_its_own_bits_in_a_chunk(alone: tuple[QTensor, QTensor, int, Tensor]) -> None:
    x, weight, _, wanted = alone
    assert differing(product([x], weight), wanted) == 0


@pytest.mark.gpu
@pytest.mark.parametrize("given", PLANS, ids=str)
def test_no_plan_changes_a_bit(given: Plan, alone: tuple[QTensor, QTensor, int, Tensor]) -> None:
    x, weight, segments, wanted = alone
    if (given.kind == "wide256") > (segments == 1) or (given.kind == "split") > (segments > 1):
        pytest.skip("not for so many segments")
    for tokens in (33, 256, 700, 4096):
        part = few_of(x, 0, tokens)
        for dtype in (torch.float32, torch.bfloat16):
            y = torch.full((tokens, weight.shape[0]), torch.nan, dtype=dtype, device="cuda")
            linear_wide.launch(part, weight, y, 1, segments, linear_wide.fitting(given))
            assert differing(y, wanted[:tokens].to(dtype)) == 0, (tokens, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 20, 40, 300])
def test_groups_have_the_bits_of_matrices_by_themselves(tokens: int) -> None:
    """However many clusters one of them has."""
    run = grouped_scaled_matmul.implementations["fused"].run
    x, weight, groups, dtype = placed(grouped.given(tokens, 3072, 2304, 3, torch.float32), torch.device("cuda"))
    parts = zip(x.data.chunk(3, 1), x.scale.chunk(3, 1), weight.data.chunk(3), weight.scale.chunk(3), strict=True)
    alone = [
        product([QTensor(data.contiguous(), scale.contiguous(), x.format)], QTensor(w, by, weight.format))
        for data, scale, w, by in parts
    ]
    assert differing(run(x, weight, groups, dtype), torch.cat(alone, 1)) == 0


@pytest.mark.gpu
@pytest.mark.parametrize("shape", mixed.SHAPES.values(), ids=mixed.SHAPES)
def test_one_launch_has_the_bits_of_two(shape: tuple[int, int, int]) -> None:
    run = shared_input.implementations["fused"].run
    for tokens in (1, 2, 5, 8, 9):
        x, rows, dense, stored = placed(mixed._given(tokens, *shape), torch.device("cuda"))
        found = run(x, rows, dense, stored)
        assert differing(found.dense, matmul.product(x, dense)) == 0, tokens
        alone = scaled_matmul.implementations["fused"].run(rows, stored, torch.bfloat16)
        assert differing(found.stored, alone) == 0, tokens
