"""The kernels' own text on the CPU: the everyday cases, offsets beyond 2^31, and ThreadSanitizer."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from dsv4.check.cases import FAMILIES
from dsv4.check.cases.inputs import INF, NAN
from dsv4.check.cases.norm import FORMATS, NEAR
from dsv4.check.contract import Case, judge
from dsv4.check.metrics import differing, leaves
from dsv4.kernels import moe, norm, rows
from dsv4.kernels.launch import KERNELS
from dsv4.kernels.rows import NAMES
from dsv4.ops.norm import rms_norm
from dsv4.ops.quantize import quantize
from dsv4.ops.rope import frequencies, rotation
from dsv4.quant.formats import NVFP4
from dsv4.quant.kv_rows import KvRow
from tests import shim
from tests.devices import normal
from tests.shim.build import build, kernels, library
from tests.shim.everyday import cases, problems
from tests.shim.probes import PROBES

FILES = (
    "norm.cu", "quantize.cu", "moe.cu", "rope.cu", "kv.cu", "matmul.cu", "best.cu", "route.cu",
    "compress.cu", "step.cu", "sample.cu",
)  # fmt: skip


@pytest.mark.parametrize("label", cases())
def test_a_case(label: str) -> None:
    """Memory, the same bits in another order of threads, a token alone, reference, unfused twin, oracle."""
    assert problems(label) == []


@pytest.mark.slow
@pytest.mark.parametrize("label", [label for label in cases("full") if "of 0 to 2100" not in label])
def test_a_case_of_full_size(label: str) -> None:
    assert problems(label) == []


@pytest.mark.parametrize("name", PROBES)
def test_a_probe(name: str) -> None:
    assert problems(name) == []


MANY_FORMS = re.compile(r"(rms_norm|rms_norm_quant|swiglu_quant): .*(x 336|x 272|odd rows)")
MANY = [label for label in cases() if MANY_FORMS.match(label)]


@pytest.mark.parametrize("label", MANY)
def test_a_case_by_the_kernels_for_many_rows(label: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two chunks a warp: no CPU has the patience for as many rows as they are meant for."""
    monkeypatch.setattr(norm, "FEW", 0)
    monkeypatch.setattr(moe, "FEW", 0)
    assert problems(label) == []


def long_row(dtype: torch.dtype) -> Tensor:
    """Longer than 8192: four chunks a warp to normalise it, two to store it."""
    return normal("long", 1, 8712, dtype=dtype)


LONG = [
    *(
        Case(op=rms_norm, name=name, make=lambda t=t: (long_row(t), normal("weight", 8712), 1e-6), bounds=NEAR)
        for t, name in NAMES.items()
    ),
    *(
        Case(op=quantize, name=label, make=lambda fmt=fmt, scale=scale: (long_row(torch.bfloat16), fmt, scale))
        for label, fmt, scale in FORMATS
    ),
]


@pytest.mark.parametrize("case", LONG, ids=lambda case: case.label)
def test_a_long_row(case: Case) -> None:
    with shim.machine():
        verdicts = judge(case, case.op.implementations["fused"].run)
    assert [verdict for verdict in verdicts if not verdict.ok] == []


SIZES = (-130, -90, -61, -60, -59, -1, 0, 59, 60, 61, 100, 110)  # of a given scale and of the numbers, as powers of two


@pytest.mark.parametrize("dtype", NAMES)
def test_a_given_scale_of_any_size(dtype: torch.dtype, seed: int) -> None:
    """Ties, zeros with signs, and numbers that a scale is much too large or too small for."""
    draw = torch.Generator().manual_seed(seed)
    ties = torch.randint(-26, 27, (2, 64), generator=draw) / 4
    numbers = torch.cat((torch.randn(2, 64, generator=draw), ties, torch.tensor([[0.0, -0.0] * 32])))
    with shim.machine():
        for size in SIZES:
            x = (numbers.double() * 2.0**size).to(dtype)
            for total in (torch.tensor(mantissa * 2.0**power) for power in SIZES for mantissa in (1.0, 1.7)):
                found = quantize.implementations["fused"].run(x, NVFP4, total)
                wanted = quantize.reference(x, NVFP4, total)
                assert torch.equal(found.data, wanted.data), (size, total)
                assert torch.equal(found.scale.view(torch.uint8), wanted.scale.view(torch.uint8)), (size, total)


@pytest.mark.slow
def test_every_kernel_runs_in_a_case(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of these files, in those above; what they come to is judged there."""
    names: set[str] = set()
    for few in (rows.FEW, 0):
        monkeypatch.setattr(norm, "FEW", few)
        monkeypatch.setattr(moe, "FEW", few)
        for case in (*cases().values(), *LONG):
            with shim.machine(idle=True) as ran:
                case.op.implementations["fused"].run(*case.make())
            names.update(ran)
    assert {name for file in FILES for name in kernels(file)} - names == set()


WATCHED = (
    "rms_norm_quant: nvfp4 by row 3 x 336 bf16",
    "rms_norm_quant: fp8 3 x 272 fp32",
    "quantize: nvfp4 by tensor 3 x 18 bf16",
    "swiglu_quant: mxfp4 3 x 272 bf16",
    "q_norm_rope: 1 x 2 x 128 bf16",
    "write_kv: one token bf16",
    "compress_kv: a token that ends a block of 128",
    "compress_kv: more tokens than a ring has of 4",
)


@pytest.mark.slow
@pytest.mark.parametrize("label", WATCHED)
def test_no_race(label: str) -> None:
    """ThreadSanitizer sees none, and OS threads give the bits of the fibers."""
    case = cases()[label]
    run, found = case.op.implementations["fused"].run, []
    for threads in (False, True):
        given = case.make()
        with shim.machine(threads=threads):
            found.append(leaves(case.outcome(given, run(*given))))
    assert {name for name, leaf in found[0].items() if differing(leaf.tensor, found[1][name].tensor)} == set()


@pytest.mark.slow
def test_what_has_to_be_accepted_is() -> None:
    """Of the cases that are run on no CPU for their size too, but the largest."""
    with shim.posing():
        listed = [case for family in FAMILIES.values() for case in family() if case.size == "full"]
        reasons = {case.label: case.op.implementations["fused"].accepts(*case.make()) for case in listed}
    assert len(reasons) > 50
    refusable = {case.label for case in listed if case.refusable}
    assert {label: why for label, why in reasons.items() if why and label not in refusable} == {}


def test_a_wrapper_launches_what_the_kernel_declares() -> None:
    """Every kernel of these families: its name exists, its parameters have the kinds that the wrapper passes."""
    ours = [kernel for kernel in KERNELS if kernel.file in FILES and kernel.places is None]
    assert len(ours) > 50
    for kernel in ours:
        entry = library(build(kernel.file)).simt_find(kernel.name.encode())
        assert entry, kernel
        assert entry.contents.letters.decode() == kernel.signature, kernel


def test_every_kernel_has_a_wrapper() -> None:
    known = {(kernel.file, kernel.name) for kernel in KERNELS}
    for file in FILES:
        assert {(file, name) for name in kernels(file)} <= known


def test_the_usual_form_gives_the_bits_of_the_general_one() -> None:
    """Rows of every kind: ordinary, zero, huge, tiny, broken in each chunk and in the turned part, not stored."""
    torch.manual_seed(0)
    x = torch.randn(41, 512) * torch.exp2(torch.randint(-90, 90, (41, 8, 1)) / 6).expand(-1, -1, 64).reshape(41, 512)
    x[5], x[11], x[12], x[14], x[13, ::2], x[15, :64] = 0.0, 1e-30, 3e38, 1e-39, 0.0, -0.0
    for row, (column, bad) in enumerate(((3, NAN), (300, INF), (5, INF), (200, -INF), (449, INF), (511, NAN)), 20):
        x[row, column] = bad
    weight = torch.randn(512)
    weight[64:128] *= 1e30
    weight[128:192] *= 1e-30
    given, turn = (x.bfloat16(), weight, 1e-6), rotation(torch.arange(41), frequencies(64, 10000.0))
    rows = torch.randperm(4 * 64)[:41]
    rows[[7, 30, 40]] = -1
    size = KvRow(512, 64).page_bytes(64)
    general, usual = torch.zeros(4, size, dtype=torch.uint8), torch.zeros(4, size, dtype=torch.uint8)
    x, *rest = given
    shim.launch("kv.cu", "write_kv_bf16_2", 11, 128, x, 512, 41, 512, *rest, *turn, 64, general, size, 64, 576, 8, rows)
    shim.launch("kv.cu", "write_kv_usual", 11, 128, x, 512, 41, *rest, *turn, usual, size, 6, rows)
    assert torch.equal(general, usual)


def test_launch_shapes_change_no_bit() -> None:
    """The same rows in one chunk a warp and in two, one row a block and several, by few blocks and by many."""
    torch.manual_seed(0)
    x, weight = torch.randn(5, 500).bfloat16(), torch.randn(500)
    found = []
    for grid, chunks, slots, warps in ((5, 1, 1, 2), (1, 1, 4, 2), (2, 2, 1, 1), (3, 2, 2, 1), (2, 1, 1, 8)):
        y, data = torch.zeros_like(x), torch.zeros(5, 250, dtype=torch.uint8)
        scale, own = torch.zeros(5, 32, dtype=torch.uint8), torch.zeros(5)
        shape = (5, 500, slots, warps)
        args = (x, 500, weight, 1e-6, y, *shape, data, scale, None, own)
        shim.launch("norm.cu", f"rms_norm_nvfp4_bf16_{chunks}", grid, 32 * slots * warps, *args)
        found.append((y, data, scale, own))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
