"""`dsv4 bench ops`: what is timed, how many bytes it moves, and what is written down. Speed itself is for a GPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from dsv4.bench import clock
from dsv4.bench.clock import Timing
from dsv4.bench.ops import Measured, circumstances, measure, moved, sets, timed
from dsv4.check.contract import Case
from dsv4.check.verify import device_for
from dsv4.cli.main import main

D, M = 4096, 4
# Bytes of Flash's one token, counted by hand: what goes in, what comes out.
BYTES = {
    ("rms_norm", "flash 1"): 2 * D + 4 * D + 2 * D,
    ("rms_norm_quant", "fp8 flash 1"): 2 * D + 4 * D + 2 * D + D + D // 128,
    ("quantize", "flash mxfp4 1"): 2 * D + D // 2 + D // 32,
    ("quantize", "flash nvfp4 by row 1"): 2 * D + D // 2 + D // 16 + 4,
    ("swiglu_quant", "flash fp8 1"): 2 * 2 * 2048 + 4 + 2048 + 2048 // 128,
    ("rope", "flash 1"): 2 * 64 * 512 * 2 + 2 * 64 * 4,
    ("write_kv", "flash 1"): 2 * 512 + 4 * 512 + 2 * 64 * 4 + 8 + 584,
    ("read_kv", "flash 1"): 584 + 8 + 2 * 512,
    ("compress_kv", "ending of 4, 1"): 2 * 8192 + 7 * 4096 + 4096 + 24 + 4 * 512 + 2 * 64 * 4 + 584,
    ("compress_keys", "ending of 4, fp4, 1"): 2 * 2048 + 7 * 1024 + 1024 + 24 + 4 * 128 + 2 * 64 * 4 + 68,
    ("compress_kv", "no end of 128, 1"): 2 * 4096 + 2048 + 24 + 4 * 512,
    ("mhc_post", "flash 1"): 2 * D + 4 * M + 4 * M * M + 2 * 2 * M * D,
    ("mhc_pre", "flash 1"): 2 * M * D + 4 * (24 * M * D + 2 * 24) + 2 * D + 4 * M + 4 * M * M,
}


def case_of(op: str, name: str) -> Case:
    return next(case for case in timed() if (case.op.name, case.name) == (op, name))


@pytest.mark.parametrize("op_and_name", BYTES, ids=" ".join)
def test_the_bytes_that_an_op_moves(op_and_name: tuple[str, str]) -> None:
    case = case_of(*op_and_name)
    given = case.make()
    assert moved(case, given, case.op(*given)) == BYTES[op_and_name]


def test_the_step_between_two_sublayers_reads_fn_once() -> None:
    """Its 1.6 MB are nearly all that the step moves."""
    case = case_of("mhc_post_pre_norm_quant", "flash fp8 1")
    given = case.make()
    assert pytest.approx(moved(case, given, case.op(*given)), rel=0.1) == 24 * M * D * 4


def test_a_line_says_what_was_measured() -> None:
    timing = Timing(2e-6, 1.9e-6, 2.5e-6, "graph of 64 calls")
    one = Measured(case_of("rms_norm", "flash 1"), "fused", timing, 4_000_000, 4e12)
    assert one.line() == {
        "op": "rms_norm", "case": "flash 1", "implementation": "fused", "how": "graph of 64 calls", "microseconds": 2.0,
        "spread": [1.9, 2.5], "bytes": 4_000_000, "floor_microseconds": 1.0, "of_copy_bandwidth": 0.5,
        "copy_GB_per_s": 4000.0}  # fmt: skip


def test_a_product_is_held_against_the_librarys() -> None:
    case = case_of("scaled_matmul", "flash wo_b 512")
    assert case.flops == 2 * 512 * 4096 * 8192
    line = Measured(case, "fused", Timing(1e-4, 1e-4, 1e-4, ""), 1, 4e12, 1e15).line()
    assert (line["TFLOP_per_s"], line["of_fp8_peak"], line["fp8_peak_TFLOP_per_s"]) == (343.6, 0.3436, 1000.0)
    assert "of_fp8_peak" not in Measured(case, "fused", Timing(1e-4, 1e-4, 1e-4, ""), 1, 4e12).line()


def test_cold_weights_take_as_many_sets_as_overflow_the_cache() -> None:
    given = (torch.ones(1000), (torch.ones(24),), None, 1e-6)
    copies = sets(given, 50_000)
    assert len(copies) == 25
    assert len({one[0].data_ptr() for one in copies}) == 25
    assert all(torch.equal(one[1][0], given[1][0]) for one in copies)
    assert len(sets(given, 1)) == 1
    assert len(sets(given, 1 << 40)) == 64


def test_the_median_of_the_samples_is_the_time() -> None:
    assert clock._timing([4.0, 2.0, 9.0], 2, "so") == (2.0, 1.0, 4.5, "so")
    calls: list[int] = []
    found = clock.on_cpu([lambda: calls.append(1), lambda: calls.append(2)], samples=3)
    assert calls == [1, 2] * 4  # once for warmth
    assert 0 < found.low <= found.seconds <= found.high
    assert found.low < 0.1  # the others may have waited for a busy machine
    assert 1e6 < clock.copy_bandwidth(torch.device("cpu"), 1) < 1e13


def test_on_a_cpu_the_references_of_one_token_are_timed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "found.jsonl"
    for _ in range(2):
        main_exits(["bench", "ops", "norm", "--op", "rms_norm", "--device", "cpu", "--samples", "1", "--out", str(out)])
    lines = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [line["case"] for line in lines] == ["flash 1", "pro 1"] * 2
    assert {line["implementation"] for line in lines} == {"reference"}
    assert {"date", "commit", "device", "driver", "torch", "cuda", "python"} <= lines[0].keys()
    said = capsys.readouterr()
    assert "rms_norm" in said.out
    assert "a CPU has no kernels" in said.err


def main_exits(arguments: list[str]) -> int:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    return int(ended.value.code or 0)


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["norms"], "no such family of cases"),
        (["--case", "medium"], "no timed case has this name; got --case medium"),
        (["--device", "x"], "device"),
    ],
)
def test_what_does_not_exist_is_refused(arguments: list[str], why: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main_exits(["bench", "ops", *arguments]) == 1
    assert why in capsys.readouterr().err


def test_every_line_says_where_it_was_measured() -> None:
    said = circumstances(torch.device("cpu"))
    assert said["torch"] == torch.__version__
    assert said["driver"] is None


@pytest.mark.gpu
def test_a_gpu_times_calls_in_a_graph() -> None:
    chosen = [case for case in timed("norm", op="rms_norm") if "flash" in case.name]
    found = list(measure(chosen, device_for("cuda"), 3))
    assert {one.implementation for one in found} == {"fused"}
    assert all(one.timing.how.startswith("graph") for one in found)
    assert all(0 < one.timing.low <= one.timing.seconds for one in found)
