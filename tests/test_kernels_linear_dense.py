"""Dense products: which form takes which matrix, what has to fit, and that no form and no company changes a bit."""

from __future__ import annotations

import pytest
import torch

from dsv4.check.cases.inputs import BF16, INF, NAN, normal
from dsv4.check.cases.matmul import SHAPES, weights
from dsv4.check.metrics import differing
from dsv4.kernels import matmul, sample
from dsv4.ops.index import top_k
from tests import shim

HOPPER = matmul.Machine(132, 228 << 10)
SMALL = matmul.Machine(170, 100 << 10)  # of an RTX 5090
WHOLE = {HOPPER: 227 << 10, SMALL: 99 << 10}  # bytes of shared memory that a block can have
MATRICES = SHAPES | {"flash head": (129_280, 4096), "pro head": (129_280, 7168), "least": (1, 8)}


@pytest.mark.parametrize("machine", WHOLE)
@pytest.mark.parametrize("shape", MATRICES.values(), ids=MATRICES)
def test_every_form_fits(shape: tuple[int, int], machine: matmul.Machine) -> None:
    for tokens in range(1, 9):
        form = matmul.few(matmul.tile_rows(shape[0], machine), *shape, tokens, machine)
        if form is not None:
            assert 1 <= form.stages <= 24
            assert form.smem + 1024 <= WHOLE[machine]
        assert form is not None or tokens > 3 or machine is SMALL
    for tokens in (1, 16, 17, 40, 128, 8192):
        wide, stages, smem = matmul.many(tokens, shape[1], machine)
        assert wide >= min(tokens, 128)
        assert 2 <= stages <= 16
        assert smem + 1024 <= WHOLE[machine]


def test_dtypes_and_width_alone_choose_the_arithmetic() -> None:
    x, weight = torch.zeros(3, 24, dtype=BF16), torch.zeros(5, 24, dtype=BF16)
    assert matmul.on_tensor_cores(x, weight)
    assert matmul.on_tensor_cores(x[:1], weight[:1])
    assert not matmul.on_tensor_cores(x.float(), weight)
    assert not matmul.on_tensor_cores(x, weight.float())
    assert not matmul.on_tensor_cores(x[:, :20], weight[:, :20])


@pytest.mark.parametrize("n", [40, 2048, 2100])
def test_the_best_of_any_numbers(n: int) -> None:
    """Both zeros are equal, NaN is minus infinity, and the lower index of equals comes first."""
    draw = torch.Generator().manual_seed(n)
    odd = torch.tensor([0.0, -0.0, NAN, -NAN, INF, -INF, 1.0, -1.0])
    logits = torch.stack(
        [
            odd[torch.randint(0, 8, (n,), generator=draw)],
            odd[torch.randint(0, 4, (n,), generator=draw)],
            odd[torch.tensor([2, 5])[torch.randint(0, 2, (n,), generator=draw)]],
            torch.randn(n, generator=draw),
        ]
    )
    with shim.machine():
        values, ids = sample.best(logits, 32)
    assert torch.equal(ids, top_k(logits, 32))
    assert not differing(values, logits.gather(1, ids))


@pytest.mark.gpu
@pytest.mark.parametrize(("rows", "columns"), [(2624, 4096), (256, 4096), (384, 7168), (5000, 1032), (70, 136)])
def test_a_row_has_the_bits_that_it_has_alone(rows: int, columns: int) -> None:
    """At every number of tokens up to 130, and in the chunk of a prompt."""
    x, weight = normal("x", 1000, columns, dtype=BF16).cuda(), weights(rows, columns, BF16).cuda()
    alone = torch.cat([matmul.product(row, weight) for row in x.split(1)])
    for tokens in (*range(2, 131), 300, 1000):
        assert not differing(matmul.product(x[-tokens:], weight), alone[-tokens:]), tokens


@pytest.mark.gpu
def test_no_machine_changes_a_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer multiprocessors, less memory: other tiles, other rings, more turns; and each of the forms for many."""
    x, weight = normal("x", 130, 4096, dtype=BF16).cuda(), weights(9000, 4096, BF16).cuda()
    wanted = matmul.product(x, weight)
    machines = (matmul.Machine(20, 228 << 10), matmul.Machine(300, 100 << 10), matmul.Machine(7, 150 << 10))
    for machine in machines:
        monkeypatch.setattr(matmul, "machine_of", lambda device, machine=machine: machine)
        for tokens in (1, 3, 8, 16, 32, 64, 128):
            assert not differing(matmul.product(x[:tokens], weight), wanted[:tokens]), (machine, tokens)
