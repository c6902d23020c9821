"""NVFP4 by NVFP4 through torch, as far as a CPU goes: its scales' order, torch's rules, the numbers, the refusals.

The library itself is played by `library`, which reads bytes by the written-out layout. No GPU that has the real one has
run any of this.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from dsv4 import kernels
from dsv4.check.cases.linear import _given, _given_nvfp4
from dsv4.check.contract import Arguments
from dsv4.check.fences import transform
from dsv4.errors import KernelError
from dsv4.kernels import linear_nvfp4
from dsv4.kernels.linear_nvfp4 import NAME, tiled
from dsv4.ops.linear import scaled_matmul
from dsv4.ops.op import use
from dsv4.quant.formats import NVFP4
from dsv4.quant.tensor import QTensor

FAKE = FakeTensorMode()
FP32, BF16 = torch.float32, torch.bfloat16
run = scaled_matmul.implementations[NAME].run
SHAPES = [(1, 16, 32), (5, 144, 96), (130, 48, 288)]  # tokens, rows, columns


# --- the order of the scales ----------------------------------------------------------------------------------------


def place(row: int, column: int, columns: int) -> int:
    """The byte of a scale, as cuBLAS's documentation counts it."""
    tile = row // 128 * -(-columns // 4) + column // 4
    return tile * 512 + row % 32 * 16 + row % 128 // 32 * 4 + column % 4


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (128, 4), (129, 5), (300, 18), (256, 64)])
def test_every_scale_stands_where_the_library_reads_it(rows: int, columns: int) -> None:
    """All bytes but NaN in turn; what is beside them is zero."""
    scale = (1 + torch.arange(rows * columns) % 126).to(torch.uint8).view(rows, columns)
    found = tiled(scale.view(torch.float8_e4m3fn))
    assert found.dtype == torch.float8_e4m3fn
    assert found.shape == (-(-rows // 128) * 128 * -(-columns // 4) * 4,)
    assert found.is_contiguous()
    at = torch.tensor([[place(r, c, columns) for c in range(columns)] for r in range(rows)])
    assert len(at.unique()) == at.numel()
    held = found.view(torch.uint8)
    assert torch.equal(held[at], scale)
    assert int(held.count_nonzero()) == scale.numel()


def test_whole_tiles_are_a_permutation_that_has_a_way_back() -> None:
    draw = torch.Generator().manual_seed(1)
    scale = torch.randint(0, 127, (384, 12), generator=draw, dtype=torch.uint8)
    found = tiled(scale.view(torch.float8_e4m3fn)).view(torch.uint8)
    back = found.view(3, 3, 32, 4, 4).permute(0, 3, 2, 1, 4).reshape(384, 12)
    assert torch.equal(back, scale)


# --- the product ----------------------------------------------------------------------------------------------------


def library(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, *, out_dtype: torch.dtype) -> Tensor:
    """What `torch._scaled_mm` would say to the shapes, then the product, byte by byte."""
    REAL(*(x.to("meta") for x in (a, b, scale_a, scale_b)), out_dtype=out_dtype)
    assert (a.dtype, b.dtype) == (torch.float4_e2m1fn_x2,) * 2
    return (_decoded(a, scale_a) @ _decoded(b.t(), scale_b).T).to(out_dtype)


REAL = torch._scaled_mm
SIZES = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)


def _decoded(pairs: Tensor, scale: Tensor) -> Tensor:
    """FP64, without the global scale."""
    assert pairs.is_contiguous()
    codes = pairs.view(torch.uint8)
    codes = torch.stack((codes & 15, codes >> 4), -1).flatten(1).long()
    rows, blocks = codes.shape[0], codes.shape[1] // 16
    at = torch.tensor([[place(r, c, blocks) for c in range(blocks)] for r in range(rows)])
    return SIZES[codes & 7] * (1 - 2.0 * (codes > 7)) * scale.double()[at].repeat_interleave(16, 1)


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "_scaled_mm", library)


def off(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_gives_the_numbers_of_the_reference(shape: tuple[int, int, int], dtype: torch.dtype, played: None) -> None:
    given = _given_nvfp4(*shape, dtype)
    for _ in range(2):  # the second time its scales are kept
        found, wanted = run(*given), scaled_matmul.reference(*given)
        assert (found.shape, found.dtype) == (wanted.shape, dtype)
        assert off(found, wanted) < (2.0**-9 if dtype == BF16 else 1e-6)


def test_global_scales_of_all_and_of_each_row(played: None) -> None:
    x, weight, _ = _given_nvfp4(5, 144, 96, FP32)
    assert x.global_scale is not None
    assert x.global_scale.shape == (5, 1)
    by_row = QTensor(weight.data, weight.scale, NVFP4, torch.linspace(0.1, 3, 144).unsqueeze(1))
    of_all = QTensor(x.data, x.scale, NVFP4, torch.tensor(0.25))
    for given in ((x, by_row, FP32), (of_all, weight, FP32), (of_all, by_row, FP32)):
        assert off(run(*given), scaled_matmul.reference(*given)) < 1e-6


def test_a_nan_scale_makes_its_row_nan(played: None) -> None:
    x, weight, _ = _given_nvfp4(3, 16, 32, FP32)
    x.scale.view(torch.uint8)[1, 1] = 0x7F
    assert run(x, weight, FP32).isnan().all(1).tolist() == [False, True, False]


def test_scales_in_another_order_would_be_seen(played: None, monkeypatch: pytest.MonkeyPatch) -> None:
    given = _given_nvfp4(130, 48, 288, FP32)
    right: Callable[[Tensor], Tensor] = linear_nvfp4.tiled
    wrong = {
        "columns first": lambda scale: right(scale).view(-1, 32, 4, 4).transpose(2, 3).flatten(),
        "tiles by columns": lambda scale: right(scale).view(-1, -(-scale.shape[1] // 4), 512).transpose(0, 1).flatten(),
    }
    for name, order in wrong.items():
        monkeypatch.setattr(linear_nvfp4, "tiled", lambda scale, order=order: order(scale).contiguous())
        monkeypatch.setattr(linear_nvfp4, "_weights", type(linear_nvfp4._weights)())
        assert off(run(*given), scaled_matmul.reference(*given)) > 0.1, name


def test_torchs_own_rules_take_the_shapes() -> None:
    """The real function, on tensors without numbers: it looks at dtypes, shapes, strides and numbers of scales."""
    for shape in SHAPES:
        there = tuple(transform(one, lambda x: x.to("meta")) for one in _given_nvfp4(*shape, BF16))
        assert run(*there).shape == shape[:2]
    x, weight, _ = (transform(one, lambda x: x.to("meta")) for one in _given_nvfp4(4, 24, 32, BF16))
    with pytest.raises(RuntimeError, match="divisible by 16"):
        run(x, weight, BF16)


# --- who may run it -------------------------------------------------------------------------------------------------


def shown(given: Arguments) -> Arguments:
    """On a GPU, without numbers."""

    def fake(x: Tensor) -> Tensor:
        made = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
        return FakeTensor(FAKE, made, torch.device("cuda:0"))

    return tuple(transform(one, fake) for one in given)


def why_not(given: Arguments) -> str | None:
    return scaled_matmul.implementations[NAME].accepts(*given)


@pytest.fixture
def blackwell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))


def test_on_blackwell_it_takes_them(blackwell: None) -> None:
    assert [why_not(shown(_given_nvfp4(*shape, BF16))) for shape in SHAPES] == [None] * len(SHAPES)


@pytest.mark.parametrize(
    ("given", "why"),
    [
        (lambda: _given(3, 128, 128, BF16), "x is fp8_row and the weight fp8: both have to be nvfp4"),
        (lambda: (_given(3, 128, 128, BF16)[0], *_given_nvfp4(3, 128, 128, BF16)[1:]), "x is fp8_row"),
        (lambda: _given_nvfp4(3, 24, 32, BF16), "3 tokens and a matrix of 24 x 32: wanted some, and multiples of 16"),
        (lambda: _given_nvfp4(3, 16, 48, BF16), "multiples of 16 x 32"),
        (lambda: _given_nvfp4(3, 16, 32, torch.float16), "float16 is not among the types"),
        (lambda: (QTensor(*empty()), *_given_nvfp4(3, 16, 32, BF16)[1:]), "0 tokens"),
    ],
)
def test_what_it_refuses_there(given: Callable[[], Arguments], why: str, blackwell: None) -> None:
    assert why in (why_not(shown(given())) or "")


def empty() -> tuple[Tensor, Tensor, object, Tensor]:
    scale = torch.empty(0, 2, dtype=torch.uint8).view(torch.float8_e4m3fn)
    return torch.empty(0, 16, dtype=torch.uint8), scale, NVFP4, torch.tensor(1.0)


def test_other_gpus_and_builds_are_told_what_is_missing(blackwell: None, monkeypatch: pytest.MonkeyPatch) -> None:
    given = shown(_given_nvfp4(3, 16, 32, BF16))
    with monkeypatch.context() as older:
        older.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
        assert why_not(given) == "the GPU has compute capability 9.0: wanted 10.0 or more, which reads NVFP4"
    with monkeypatch.context() as older:
        older.setattr(torch.version, "cuda", "12.6")
        assert why_not(given) == "torch is built for CUDA 12.6: wanted 12.8 or newer"
    with monkeypatch.context() as older:
        older.delattr(torch, "float4_e2m1fn_x2")
        assert "has no float4_e2m1fn_x2: wanted 2.8 or newer" in (why_not(given) or "")


def test_the_explanation_names_why_it_does_not_run_here() -> None:
    kernels.install()
    given = _given_nvfp4(3, 16, 32, BF16)
    with use(scaled_matmul=NAME):
        said = scaled_matmul.explain(*given)
        assert said.runs is None
        assert said.others[NAME] == "x is on cpu: wanted a GPU of compute capability 10.0 or more"
        with pytest.raises(KernelError, match=r"compute capability 10\.0 or more"):
            scaled_matmul(*given)
    assert scaled_matmul.explain(*given).others[NAME] == "not the choice"


def test_nobody_prefers_it_and_every_blackwell_may_name_it() -> None:
    listed = {name for name, rows in kernels.LIBRARIES.items() if NAME in rows.get("scaled_matmul", ())}
    assert listed == kernels.ARCHITECTURES.keys() - {"sm_90a"}
    assert not any(NAME in order for rows in kernels.PREFER.values() for order in rows.values())
