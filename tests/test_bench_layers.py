"""What `dsv4 bench decode` and `prefill` make of measured steps: layers, floors, a whole model, lines, a table."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

from dsv4.bench import clock, decode, slices
from dsv4.bench.clock import Timing
from dsv4.bench.decode import DECODE
from dsv4.bench.layers import KINDS, At, Layer, Machine, Step, layers, pattern, wholes
from dsv4.bench.prefill import PREFILL, chunks
from dsv4.bench.slices import Bench, Slice, circumstances, needed, of_kind, steps
from dsv4.bench.work import Chunk, chunk_bytes, chunk_flop, entries
from dsv4.checkpoint.names import parameters
from dsv4.checkpoint.reads import Point, Reads, row_reads
from dsv4.checkpoint.specs import Param
from dsv4.cli.bench_layers import Asked, show, time_layers
from dsv4.cli.main import main
from dsv4.config import ModelConfig
from tests.slices import Unrecorded, small

FLASH, PRO = ModelConfig.named("flash"), ModelConfig.named("pro")
POINT = Point(1, 8192)


def step(kind: str, count: int, us: float, launches: int = 0, at: At = POINT, flop: float = 0.0) -> Step:
    return Step(kind, count, at, Timing(1e-6 * us, 0, 0, ""), 1e-5 * count, launches, 100 * count + 7, 7, flop)


def layer(kind: str, us: float, rest: float, at: At = POINT, flop: float = 0.0) -> Layer:
    return Layer(kind, at, 1e-6 * us, 1e-6 * rest, 10**6, 10**7, 20.0, 5e-5, flop)


# --- a layer ----------------------------------------------------------------------------------------------------------


def test_a_layer_is_what_one_more_costs() -> None:
    (found,) = layers([step("CSA", 6, 900, 140, flop=12.0), step("CSA", 2, 500, 60, flop=4.0)])
    each, rest, host = (pytest.approx(x) for x in (1e-4, 3e-4, 6e-5))
    assert found == Layer("CSA", POINT, each, rest, 100, 7, 20, host, 2)
    said = found.line("decode", Machine(1e9))
    assert (said["layer_us"], said["rest_us"], said["floor_us"], said["host_us"]) == (100.0, 300.0, 0.1, 60.0)
    assert (said["what"], said["kind"], said["sequences"], said["context"]) == ("decode layer", "CSA", 1, 8192)
    assert "flop" not in said


def test_kinds_and_points_are_apart() -> None:
    other = Point(8, 8192)
    found = layers([step(kind, n, n * us, at=at) for kind, us in (("CSA", 3), ("HCA", 2))
                    for at in (POINT, other) for n in (1, 3)])  # fmt: skip
    assert [(one.kind, one.at, round(1e6 * one.seconds)) for one in found] == [
        ("CSA", POINT, 3), ("CSA", other, 3), ("HCA", POINT, 2), ("HCA", other, 2),
    ]  # fmt: skip


def test_a_floor_is_the_larger_of_bytes_and_products() -> None:
    assert Machine(1e9).floor(5e6, 1e18) == pytest.approx(5e-3)
    assert Machine(1e9, 1e12).floor(5e6, 1e9) == pytest.approx(5e-3)
    assert Machine(1e9, 1e12).floor(5e6, 1e10) == pytest.approx(1e-2)
    said = layer("CSA", 20_000, 0, Chunk(8192, 0), 1e10).line("prefill", Machine(1e9, 1e12))
    assert (said["what"], said["tokens"], said["behind"]) == ("prefill layer", 8192, 0)
    assert (said["floor_us"], said["flop"], said["fp8_peak_tflop_s"]) == (10_000, 10**10, 1.0)


# --- a whole model ----------------------------------------------------------------------------------------------------


def test_patterns_are_those_of_the_releases() -> None:
    assert pattern(FLASH) == {"CSA": 21, "HCA": 20, "SWA": 2}
    assert list(pattern(PRO)) == ["CSA", "HCA"]
    for config in (FLASH, PRO):
        assert sum(pattern(config).values()) == config.num_hidden_layers
        assert pattern(config)["CSA"] == config.layer_counts()[4]


def test_a_model_is_the_sum_of_its_layers_and_the_most_of_the_rest() -> None:
    (found,) = wholes([layer("CSA", 100, 400), layer("HCA", 50, 500)], FLASH)
    us = 21 * 100 + 22 * 50 + 500
    assert found.seconds == pytest.approx(1e-6 * us)
    terms = "43 layers = 21 x CSA 100.0 + 20 x HCA 50.0 + 2 x SWA as HCA 50.0 + rest 500.0 µs"
    assert str(found) == f"{terms} = {us / 1e3:.2f} ms: {1e6 / us:.0f} tokens/s"
    said = found.line("decode", Machine(1e9))
    assert (said["what"], said["step_us"], said["context"]) == ("decode step extrapolated", us, 8192)
    assert (said["of_layers"], said["priced_as"]) == ({"CSA": 21, "HCA": 20, "SWA": 2}, {"SWA": "HCA"})
    assert said["floor_us"] == pytest.approx(43 * 1000 + 10_000)
    assert said["tokens_per_s"] == pytest.approx(1e6 / us, rel=1e-3)


def test_a_window_that_was_measured_stands_for_itself() -> None:
    (found,) = wholes([layer("CSA", 100, 400), layer("HCA", 50, 500), layer("SWA", 40, 900)], FLASH)
    assert found.seconds == pytest.approx(1e-6 * (21 * 100 + 20 * 50 + 2 * 40 + 900))
    assert "2 x SWA 40.0 + rest 900.0" in str(found)
    assert found.line("decode", Machine(1e9))["priced_as"] == {}


def test_a_step_of_many_is_so_many_tokens() -> None:
    (found,) = wholes([layer(kind, 100, 0, Point(8, 4096)) for kind in ("CSA", "HCA")], FLASH)
    assert str(found).endswith(f"= 4.30 ms: {8e6 / 4300:,.0f} tokens/s")
    (found,) = wholes([layer(kind, 100, 0, Chunk(2048, 65536)) for kind in ("CSA", "HCA")], FLASH)
    assert found.tokens == 2048


def test_nothing_is_made_up_where_a_kind_is_missing() -> None:
    assert wholes([layer("CSA", 100, 400), layer("SWA", 50, 400)], FLASH) == []
    assert wholes([layer("CSA", 100, 400), layer("HCA", 50, 400, Point(8, 8192))], FLASH) == []
    assert [
        one.at for one in wholes([layer("HCA", 1, 1), layer("HCA", 1, 1, Point(2, 99)), layer("CSA", 1, 1)], PRO)
    ] == [POINT]


# --- work -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [Chunk(7, 0), Chunk(300, 41), Chunk(1, 127)])
@pytest.mark.parametrize(("ratio", "most"), [(4, 16), (128, None), (1, 128)])
def test_entries_are_those_that_each_token_sees(chunk: Chunk, ratio: int, most: int | None) -> None:
    ends = range(chunk.behind, chunk.behind + chunk.tokens)
    counts = [len(range(ratio - 1, at + 1, ratio)) for at in ends]
    assert entries(chunk, ratio, most) == sum(min(count, most or count) for count in counts)


def own(config: ModelConfig) -> list[Param]:
    return [param for param in parameters(config) if param.name.startswith("layers.1.")]


def test_products_of_a_token_by_hand() -> None:
    """Of Flash, the 8,192nd token: 2 FLOP for each number of each matrix that it passes, and for each row's."""
    chunk, params = Chunk(1, 8191), {kind: own(of_kind(FLASH, kind, 2)) for kind in KINDS}
    found = {kind: chunk_flop(FLASH, params[kind], ratio, chunk) for kind, ratio in KINDS.items()}
    d, lora, heads = 4096, 1024, 64 * 512
    attention = d * lora + lora * heads + d * 512 + heads // 8 * 8192 + 8192 * d
    mhc, router, shared = 2 * 24 * 4 * d, 256 * d, 3 * d * 2048
    assert found["SWA"].dense == 2 * (attention + mhc + router + shared)
    assert found["HCA"].dense - found["SWA"].dense == 2 * (2 * 512 * d)
    assert found["CSA"].dense - found["SWA"].dense == 2 * (4 * (512 + 128) * d + lora * 64 * 128 + 64 * d)
    assert {one.experts for one in found.values()} == {2 * 6 * 3 * d * 2048}
    rows = {"CSA": 128 + 512, "HCA": 128 + 64, "SWA": 128}
    assert {kind: one.attention for kind, one in found.items()} == {kind: 4 * n * heads for kind, n in rows.items()}
    assert [found[kind].scores for kind in KINDS] == [2 * 2048 * 64 * 128, 0, 0]
    assert {one.streams for one in found.values()} == {2 * 2 * 24 * d}


def test_bytes_of_a_chunk_are_weights_once_streams_and_what_lies_behind() -> None:
    config, chunk = of_kind(FLASH, "CSA", 2), Chunk(2048, 65536)
    weights = Reads.of(own(config))
    found = chunk_bytes(config, own(config), 4, 256, chunk)
    streams = 2048 * 4 * 4096 * 2
    assert found == weights.fixed + weights.routed + 2 * streams + row_reads(FLASH, 4, 65536)
    assert chunk_bytes(config, own(config), 4, 128, chunk) == found - weights.routed / 2


# --- what is run ------------------------------------------------------------------------------------------------------


def test_points() -> None:
    assert decode.points([1024, 8192], [1, 8], 8192) == [Point(1, 1024), Point(1, 8192), Point(8, 8192)]
    assert chunks([8192, 2048], [0, 65536]) == [Chunk(2048, 0), Chunk(2048, 65536), Chunk(8192, 0), Chunk(8192, 65536)]


def test_sixteen_layers_and_a_chunk_of_8192_fit_on_an_h200_and_forty_do_not() -> None:
    """As `dsv4 bench` asks the GPU for it: 139.7 GiB, of which torch has the most."""
    room, kinds = 139 << 30, ("CSA", "HCA")
    many = decode.points([8192, 131_072, 1 << 20], [1, 8, 32, 64], 8192)
    assert 55e9 < needed(DECODE, FLASH, kinds, 16, many) < 80e9
    assert needed(DECODE, FLASH, kinds, 40, many) > room
    assert needed(DECODE, PRO, kinds, 4, decode.points([8192], [1, 8], 8192)) < room
    assert needed(PREFILL, FLASH, kinds, 3, chunks([2048, 8192], [0, 65536])) < room / 2
    assert needed(PREFILL, FLASH, ("CSA",), 3, [Chunk(8192, 65536)]) > needed(
        PREFILL, FLASH, ("CSA",), 3, [Chunk(8192, 0)]
    )


@pytest.fixture
def slow_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU that is not measured, and steps that are not recorded."""
    monkeypatch.setattr(decode, "Graphs", Unrecorded)
    monkeypatch.setattr(slices, "copy_bandwidth", lambda _: 1e9)
    monkeypatch.setattr(slices, "fp8_peak", lambda _: 1e12)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


CASES = [(DECODE._replace(in_a_row=1), [Point(2, 260)]), (PREFILL, [Chunk(5, 130)])]


@pytest.mark.usefixtures("slow_machine")
@pytest.mark.parametrize(("bench", "points"), CASES, ids=["decode", "prefill"])
def test_a_bench_from_weights_to_lines(
    bench: Bench, points: list[At], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a CPU, small: every kind at every point, lines that say so, and a sum for the model."""
    monkeypatch.setattr(slices, "check_fits", lambda *_: torch.device("cpu"))
    config, out = small(num_hidden_layers=3), tmp_path / "lines.jsonl"
    time_layers(bench, Asked("small", config, (1, 2), tuple(KINDS), 1, out), points)
    lines = [json.loads(text) for text in out.read_text(encoding="utf-8").splitlines()]
    places = [{name: line[name] for name in ("kind", *points[0]._fields)} for line in lines[: -len(points)]]
    assert places == [{"kind": kind, **at._asdict()} for kind in KINDS for at in points]
    assert [line["what"] for line in lines[-len(points) :]] == [f"{bench.what} step extrapolated"] * len(points)
    assert all(line["config"] == "small" and line["layers"] == [1, 2] and line["host_us"] > 0 for line in lines[:-2])
    assert all(line["of_layers"] == {"CSA": 1, "HCA": 1, "SWA": 1} for line in lines[-len(points) :])
    said = capsys.readouterr().out
    assert said.count("3 layers = 1 x CSA") == len(points)


@pytest.mark.usefixtures("slow_machine")
def test_a_step_is_what_was_asked() -> None:
    """Two sequences at the end of their contexts; as many layers as were named; bytes of the experts in use."""
    of = Slice(small(), "HCA", 2, torch.device("cpu"))
    found = list(steps(DECODE._replace(in_a_row=1), of, (1, 2), [Point(2, 260)], 1))
    assert [(one.kind, one.layers, one.at, one.launches) for one in found] == [
        ("HCA", n, Point(2, 260), 0) for n in (1, 2)
    ]
    few, many = (one.nbytes - one.head for one in found)
    weights = Reads.of(of.own)
    assert 2 * weights.fixed < many < 2 * (weights.fixed + weights.routed + 2 * row_reads(of.config, 128, 260))
    assert few < many
    shared = circumstances(found, of.device)
    assert (shared["layers"], shared["weights"]) == ([1, 2], "random")


def test_the_host_is_timed_by_itself() -> None:
    calls: list[int] = []
    found = clock.on_host([lambda: calls.append(1)] * 4, torch.device("cpu"), 3)
    assert len(calls) == 12
    assert 0 < found < 1e-3


# --- table and usage --------------------------------------------------------------------------------------------------


def test_the_table_says_what_was_found() -> None:
    to = io.StringIO()
    machine, at = Machine(1e9, 1e12), Chunk(8192, 65536)
    found = [layer("CSA", 2000, 300, at, 1e9), layer("HCA", 2000, 300, at, 1e8)]
    show(Console(file=to, highlight=False, width=160), found, wholes(found, FLASH), machine)
    said = to.getvalue()
    (row,) = (line for line in said.splitlines() if "CSA" in line and "│" in line)
    assert row.replace("│", " ").split() == [
        "CSA", "8,192", "65,536", "2,000.0", "1", "1", "1,000.0", "50%", "20.0", "300", "10,000", "50",
    ]  # fmt: skip
    assert "8,192 tokens, 65,536 behind: 43 layers = 21 x CSA 2000.0" in said
    to.truncate(0)
    show(Console(file=to, highlight=False, width=160), found[:1], [], Machine(1e9))
    assert "GFLOP" in said
    assert "GFLOP" not in to.getvalue()


def exits(*arguments: str) -> int | str | None:
    with pytest.raises(SystemExit) as stop:
        main(["bench", *arguments])
    return stop.value.code


@pytest.mark.parametrize("verb", ["decode", "prefill"])
@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (["--layers", "3"], "two different numbers"),
        (["--layers", "3,3"], "two different numbers"),
        (["--layers", "3,44"], "wanted 1 to 43"),
        (["--kinds", "window"], "CSA or HCA or SWA"),
        (["--config", "nope"], "flash, pro"),
        (["--out", "no/such/x"], "cannot write there"),
    ],
)
def test_mistakes_are_told_in_one_line(
    verb: str, asked: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exits(verb, *asked) == 1
    error = capsys.readouterr().err
    assert said in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (["decode", "--contexts", "8K"], "numbers from 1 on"),
        (["decode", "--sequences", "0"], "numbers from 1 on"),
        (["prefill", "--tokens", "0"], "numbers from 1 on"),
        (["prefill", "--behind", "-1"], "numbers from 0 on"),
    ],
)
def test_numbers_have_their_own_mistakes(asked: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert exits(*asked) == 1
    assert said in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("verb", ["decode", "prefill"])
def test_without_a_gpu_it_says_so(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert exits(verb) == 1
    assert f"dsv4 bench {verb}; got no GPU that torch sees; wanted an H100 or H200" in capsys.readouterr().err


def test_too_little_memory_is_said_before_weights_are_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (80 << 30, 80 << 30))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    points = [Point(1, 8192)]
    assert slices.check_fits(DECODE, FLASH, ["CSA"], 16, points) == torch.device("cuda", 0)
    with pytest.raises(slices.ConfigError, match=r"^--layers: .* of 30; got about \d+ GB; wanted at most the 86 GB"):
        slices.check_fits(DECODE, FLASH, ["CSA"], 30, points)
