"""Every case of `dsv4 check`: the references on this CPU, and on a GPU all that is preferred there."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from dsv4 import kernels
from dsv4.check.cases import FAMILIES, cases
from dsv4.check.contract import Case, judge
from dsv4.check.fences import transform
from dsv4.check.verify import check, device_for, twin
from dsv4.cli.main import main
from dsv4.ops.compress import compress_keys, compress_kv
from dsv4.ops.kv import read_kv
from dsv4.ops.mhc import Mixed, Mixer, mhc_head, mhc_post, mhc_pre
from dsv4.ops.moe import swiglu
from dsv4.ops.norm import rms_norm
from dsv4.ops.op import all_ops
from dsv4.ops.quantize import quantize
from dsv4.ops.rope import Rotation, frequencies, rope, rotation
from dsv4.quant import e2m1
from dsv4.quant.activation import blocks
from dsv4.quant.formats import FP8_ROW, NVFP4
from dsv4.quant.kv_rows import KvRow
from dsv4.quant.tensor import QTensor

EVERYDAY = [case for case in cases() if case.size in ("small", "full")]
SLOWLY = [pytest.param(case, marks=[pytest.mark.slow] if case.size == "full" else []) for case in EVERYDAY]
FAKE = FakeTensorMode()


def labelled(case: Case) -> str:
    return case.label


def wrong(found: list[Any]) -> list[str]:
    return [f"{v.implementation}: {v.check} {v.leaf} {v.distance}" for v in found if not v.ok]


@pytest.mark.parametrize("case", SLOWLY, ids=labelled)
def test_the_reference_keeps_the_contract(case: Case) -> None:
    """Fences, repetition, company, the smaller ops of a fused one, and an oracle that was written apart."""
    assert wrong(judge(case, case.op.reference, "reference")) == []


def away_from_zero(x: Tensor) -> Tensor:
    """E2M1 with ties rounded up."""
    return (x.abs() * (1 + 2.0**-20)).copysign_(x)


def unrounded_scale(x: Tensor, fmt: Any, scale: Any = None) -> QTensor:
    """NVFP4 divided by the scale that it wished to store."""
    q = quantize.reference(x, fmt, scale)
    if fmt is not NVFP4:
        return q
    parts = blocks(x.float(), 16)
    step = (parts.abs().amax(-1, keepdim=True) / 6).clamp(min=2.0**-9 * float(q.global_scale.max()))
    return replace(q, data=e2m1.pack(e2m1.e2m1_encode((parts / step).flatten(-2)[:, : x.shape[1]])))


def swapped_nibbles(x: Tensor, fmt: Any, scale: Any = None) -> QTensor:
    q = quantize.reference(x, fmt, scale)
    return (
        q
        if fmt is FP8_ROW
        else replace(
            q, data=e2m1.pack(e2m1.unpack(q.data).unflatten(-1, (-1, 2)).flip(-1).flatten(-2)).view(q.data.dtype)
        )
    )


def with_sinkhorn(change: Any) -> Any:
    def run(streams: Tensor, mixer: Mixer, iterations: int, eps: float, norm_eps: float) -> Mixed:
        return change(mhc_pre.reference, streams, mixer, iterations, eps, norm_eps)

    return run


def in_halves(x: Tensor, turn: Rotation, inverse: bool = False) -> Tensor:
    """Pairs (i, i + R / 2)."""
    dims = turn.cos.shape[-1]
    tail = x[..., -dims:].unflatten(-1, (2, dims // 2)).transpose(-1, -2).flatten(-2)
    turned = rope.reference(torch.cat((x[..., :-dims], tail), -1), turn, inverse)[..., -dims:]
    return torch.cat((x[..., :-dims], turned.unflatten(-1, (dims // 2, 2)).transpose(-1, -2).flatten(-2)), -1)


def scales_in_place(kv: Tensor, weight: Tensor, eps: float, turn: Rotation, pages: Tensor, rows: Tensor) -> None:
    """Each row's scales right behind its numbers."""
    layout = KvRow(kv.shape[1], turn.cos.shape[-1])
    data, scales = layout.encode(rope(rms_norm(kv, weight, eps), turn))
    tokens, size = layout.page_rows(pages.shape[1]), layout.row_bytes + layout.scale_bytes
    for row, line in zip(rows.tolist(), torch.cat((data, scales), 1), strict=True):
        pages[row // tokens, row % tokens * size :][:size] = line


def turned_to_the_last(op: Any) -> Any:
    """Entries of compressors turned to the position of the token that ends their block."""

    def run(projected: Tensor, ape: Tensor, norm: Tensor, eps: float, turn: Rotation, *rest: Any) -> None:
        by = rotation(rest[0].positions, frequencies(turn.cos.shape[1], 160000.0, 16.0, 65536))
        op.reference(projected, ape, norm, eps, by, *rest)

    return run


PLANTED: dict[str, tuple[str, Any]] = {
    "norm weight plus one": ("rms_norm", lambda x, w, eps: rms_norm.reference(x, w + 1, eps)),
    "eps outside the root": (
        "rms_norm",
        lambda x, w, eps: (w * (x.float() / (x.float().square().mean(-1, keepdim=True).sqrt() + eps))).type(x.dtype),
    ),
    "mean rounded at the end alone": ("unit_rms", lambda q, eps: rms_norm.reference(q, torch.ones(q.shape[-1]), eps)),
    "bytes of the norm before its rounding": (
        "rms_norm_quant",
        lambda x, w, eps, fmt, scale=None: (
            rms_norm.reference(x, w, eps),
            quantize.reference(rms_norm.reference(x.float(), w, eps), fmt, scale),
        ),
    ),
    "ties away from zero": (
        "quantize",
        lambda x, fmt, scale=None: quantize.reference(away_from_zero(x.float()), fmt, scale),
    ),
    "scale not as stored": ("quantize", unrounded_scale),
    "high nibble first": ("quantize", swapped_nibbles),
    "gate clamped from below": (
        "swiglu",
        lambda g, u, limit: swiglu.reference(g.clamp(min=-limit) if limit else g, u, limit),
    ),
    "weight behind the rounding": (
        "swiglu_quant",
        lambda g, u, limit, w, *rest: quantize.reference(
            (swiglu.reference(g, u, limit).type(g.dtype) * (1 if w is None else w.unsqueeze(1))).type(g.dtype), *rest
        ),
    ),
    "halves instead of pairs": ("rope", in_halves),
    "never turned back": ("rope", lambda x, turn, inverse=False: rope.reference(x, turn)),
    "head not normalised": ("q_norm_rope", lambda q, eps, turn: rope.reference(q, turn)),
    "scales beside their rows": ("write_kv", scales_in_place),
    "absent rows not zero": ("read_kv", lambda pages, rows, *more: read_kv.reference(pages, rows.clamp(min=0), *more)),
    "entries turned to the last position": ("compress_kv", turned_to_the_last(compress_kv)),
    "keys turned to the last position": ("compress_keys", turned_to_the_last(compress_keys)),
    "keys never spread": ("compress_keys", lambda *given: compress_keys.reference(*given[:10], False)),
    "one Sinkhorn pass too few": (
        "mhc_pre",
        with_sinkhorn(lambda real, s, m, n, *eps: real(s, m, max(1, n - 1), *eps)),
    ),
    "comb transposed": (
        "mhc_pre",
        with_sinkhorn(lambda real, *given: (r := real(*given))._replace(comb=r.comb.mT.contiguous())),
    ),
    "rows of comb summed": ("mhc_post", lambda y, mixed: mhc_post.reference(y, mixed._replace(comb=mixed.comb.mT))),
    "no eps at the gate": ("mhc_head", lambda s, m, eps, norm_eps: mhc_head.reference(s, m, 0.01, norm_eps)),
}


@pytest.mark.slow
@pytest.mark.parametrize("bug", PLANTED)
def test_a_planted_mistake_is_seen_by_small_cases(bug: str) -> None:
    name, run = PLANTED[bug]
    listed = [case for case in EVERYDAY if case.op.name == name and case.size == "small"]
    caught = [case.name for case in listed if {v.check for v in judge(case, run) if not v.ok} & {"reference", "oracle"}]
    assert caught, f"{bug}: none of {len(listed)} cases"


@pytest.mark.gpu
@pytest.mark.parametrize("case", [case for case in cases() if case.size != "timed"], ids=labelled)
def test_the_kernels_keep_the_contract(case: Case) -> None:
    found = [verdict for verdicts in check([case], device_for("cuda")) for verdict in verdicts]
    assert wrong(found) == []
    assert found


def fake(x: Tensor) -> Tensor:
    """On a GPU, without numbers: any look at one is an error."""
    made = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
    return FakeTensor(FAKE, made, torch.device("cuda:0"))


def kernels_of(case: Case) -> list[str]:
    return [name for name in case.op.implementations if name not in ("reference", "unfused")]


@pytest.mark.parametrize("family", FAMILIES)
def test_kernels_take_the_cases_by_shape_dtype_and_device_alone(family: str) -> None:
    """And on a CPU they take none, whatever the shape."""
    kernels.install()
    refused = []
    for case in cases(family):
        if case.size not in ("small", "full"):
            continue
        given = case.make()
        shown = tuple(transform(one, fake) for one in given)
        for name in kernels_of(case):
            accepts = case.op.implementations[name].accepts
            assert accepts(*given), f"{case.label}: {name} takes CPU tensors"
            reason = accepts(*shown)
            if reason and not case.refusable and name == "fused":
                refused.append(f"{case.label}: {reason}")
    assert refused == []


def test_every_preferred_implementation_is_there_and_has_cases() -> None:
    kernels.install()
    judged = {case.op.name for case in cases()}
    for rows in kernels.PREFER.values():
        for name, order in rows.items():
            assert set(order) <= set(all_ops()[name].implementations), name
            assert name in judged
    for name, op in all_ops().items():
        extra = op.implementations.keys() - {"reference", "unfused"}
        preferred = {given for rows in kernels.PREFER.values() for given in rows.get(name, ())}
        named = {given for rows in kernels.LIBRARIES.values() for given in rows.get(name, ())}
        assert extra <= preferred | named, f"{name} has {extra - preferred - named}, which nobody prefers"
        assert not preferred & named


def test_a_fused_op_has_a_twin_of_the_smaller_ones() -> None:
    fused = {name for name, op in all_ops().items() if twin(op)}
    assert fused >= {"rms_norm_quant", "swiglu_quant", "q_norm_rope", "write_kv", "mhc_pre_norm_quant"}
    assert not fused & {"rms_norm", "quantize", "rope", "mhc_post"}


# --- the command -----------------------------------------------------------------------------------------------------


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(["check", *arguments])
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


def test_the_command_prints_a_line_for_each_case(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "norm", "--op", "unit_rms", "--case", "3 x 3 x 40", "--device", "cpu")
    assert code == 0
    assert re.search(r"unit_rms +│ 3 x 3 x 40 bf16 +│ reference +│ ulp 0 y +│ 2 +│ ok", out)
    assert "2 cases of 1 ops, 8 checks: all ok" in out
    assert "not run here, for want of a GPU that has them (fused: unit_rms)" in out


def test_the_command_sums_up_by_op(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    few = [case for case in cases("kv") if case.name == "no token bf16" or case.name == "no token"]
    monkeypatch.setattr("dsv4.check.cases.cases", lambda *families: few)
    code, out, _ = run(capsys, "--device", "cpu")
    assert code == 0
    assert re.search(r"write_kv +│ 1 cases", out)
    assert re.search(r"read_kv +│ 1 cases", out)


@pytest.mark.slow
def test_ops_are_judged_by_processes_as_by_one(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ("kv", "--case", "one token", "--device", "cpu", "--size", "small", "--json")
    one, apart = (run(capsys, *asked, "--jobs", jobs) for jobs in ("1", "2"))
    assert apart == one
    assert len({verdict["op"] for verdict in json.loads(one[1])["verdicts"]}) == 2


def test_full_memory_is_no_verdict(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(given: object, found: object) -> None:
        raise torch.OutOfMemoryError("2 GiB")

    few = [replace(case, oracle=full) for case in cases("norm") if case.name == "1 x 256 bf16"][:1]
    monkeypatch.setattr("dsv4.check.cases.cases", lambda *families: few)
    code, out, err = run(capsys, "norm", "--device", "cpu")
    assert (code, out) == (1, "")
    assert "the device's memory is full; got 1 processes; lower --jobs" in err


def test_the_command_says_what_is_wrong_and_fails(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = [
        replace(case, oracle=lambda given, found: found + 1)
        for case in cases("norm")
        if case.name == "1 x 256 bf16" and case.op.name == "rms_norm"
    ]
    monkeypatch.setattr("dsv4.check.cases.cases", lambda *families: broken)
    code, out, err = run(capsys, "norm", "--device", "cpu")
    assert code == 1
    assert "1 WRONG" in out
    assert "1 cases of 1 ops, 3 checks: 1 cases WRONG" in out
    assert re.search(r"rms_norm, 1 x 256 bf16, reference, oracle y: \d+ of 256 numbers differ", err)
    code, out, _ = run(capsys, "norm", "--device", "cpu", "--json")
    told = json.loads(out)
    assert (code, told["ok"], len(told["verdicts"])) == (1, False, 3)
    assert [line["check"] for line in told["verdicts"] if not line["distance"]["ok"]] == ["oracle"]


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["norms"], "no such family of cases; got norms; wanted norm or quantize"),
        (["--op", "rms"], "no case has this name; got --op rms; wanted one of"),
        (["--device", "tpu"], "device; got tpu; wanted cpu or cuda"),
    ],
)
def test_the_command_refuses_what_does_not_exist(
    arguments: list[str], why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = run(capsys, *arguments)
    assert code == 1
    assert why in err


@pytest.mark.parametrize(
    "name", ["rms_norm", "rms_norm_quant", "swiglu_quant", "mhc_post_pre_norm_quant", "write_kv", "rope"]
)
def test_what_is_timed_has_cases_of_one_token_and_of_many(name: str) -> None:
    timed = [case for case in cases() if case.op.name == name and case.bench]
    assert {case.name.rsplit(" ", 1)[1] for case in timed} == {"1", "8192"}
