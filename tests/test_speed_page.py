"""The performance page is what bench/results says, and says so when it is not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest

from bench import page
from bench.page_lines import REPLACED, RESULTS, TIMES, Line, Lookup, PageError, Query, read, short, sources, told
from bench.page_picture import curves, draw, drawn
from bench.page_tables import KINDS, decode_rows, decoded, prefill_rows, whole_rows

H200 = "NVIDIA H200"
TIMED = {"op": "rope", "case": "flash 1", "implementation": "fused", "date": "2026-11-29", "device": page.FIRST}
LAYER: dict[str, Any] = {
    "what": "decode layer", "config": "flash", "date": "2026-11-29", "device": page.FIRST, "launches": 20.0,
    "rest_us": 400.0, "rest_bytes": 10**9, "copy_gb_s": 2500.0,
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the results."""
    return Path(shutil.copytree(RESULTS, tmp_path / "results", ignore=shutil.ignore_patterns("*.svg")))


@pytest.fixture(scope="module")
def lines() -> list[Line]:
    return read()


def add(folder: Path, name: str, *lines: dict[str, Any]) -> None:
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def layers(device: str, commit: str, *points: tuple[int, int]) -> Iterator[dict[str, Any]]:
    for n, context in points:
        for kind, us in (("CSA", 150.0), ("HCA", 130.0)):
            at = {"kind": kind, "sequences": n, "context": context, "layer_us": us + n, "floor_us": 70.0 + n}
            yield {**LAYER, **at, "device": device, "commit": commit}


# --- the page that is there ------------------------------------------------------------------------------------------


def test_the_page_is_what_the_results_say(capsys: pytest.CaptureFixture[str]) -> None:
    assert page.differences(page.ROOT, page.lookups()) == []
    page.main(["--check"])
    assert capsys.readouterr().out == ""


def test_every_table_is_there_with_its_files() -> None:
    text = (page.ROOT / page.PAGE).read_text(encoding="utf-8")
    there = [kind for kind in KINDS if f"\n### {kind.title}\n" in text]
    assert [kind for kind in KINDS if not (kind.later or kind in there)] == []
    assert text.count("\n### ") == text.count("\nOn an ") == len(there)
    assert "`2026-11-28-decode.jsonl` (4032a1d)" in text
    assert "copied from what the run printed" in text


# --- a page that is not what it should be -----------------------------------------------------------------------------


def test_a_new_figure_changes_the_page(folder: Path) -> None:
    assert page.differences(page.ROOT, page.lookups(folder)) == []
    add(folder, "2026-11-29-ops", {**TIMED, "commit": "abc1234", "microseconds": 1.17, "floor_microseconds": 0.04})
    found = page.differences(page.ROOT, page.lookups(folder))
    row = next(line for line in found if line.startswith("+| RoPE"))
    assert row.startswith("+| RoPE of 64 (Pro 128) heads | 1.17 |")
    assert any("`2026-11-29-ops.jsonl` (abc1234)" in line for line in found)
    add(folder, "2026-11-29-decode", *layers(page.FIRST, "abc1234", (1, 8192), (8, 8192)))
    found = page.differences(page.ROOT, page.lookups(folder))
    assert "+| CSA layer, 8K of context | 151 | 71.0 | 228 (vLLM 0.24) |" in found
    assert any("Layers of Flash's width take 131 and 151 µs" in line for line in found)
    assert f"{page.PICTURE} shows other figures" in found


def test_a_check_says_what_differs_and_writes_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add(folder, "2026-11-29-ops", {**TIMED, "commit": "abc1234", "microseconds": 1.17})
    looks = page.lookups(folder)
    monkeypatch.setattr(page, "lookups", lambda: looks)
    before = (page.ROOT / page.PAGE).read_bytes()
    with pytest.raises(SystemExit, match=r"(?s)\+\| RoPE.*python -m bench.page writes it anew") as stop:
        page.main(["--check"])
    assert isinstance(stop.value.code, str)  # printed, exit code 1
    assert (page.ROOT / page.PAGE).read_bytes() == before


def test_a_missing_figure_is_an_error(lines: list[Line], monkeypatch: pytest.MonkeyPatch) -> None:
    few = [line for line in lines if line.said.get("case") != "flash wq_b 1"]
    with pytest.raises(PageError, match=r"no line of NVIDIA H100.*case 'flash wq_b 1' in \*-ops\*"):
        page.page([Lookup(few, page.FIRST)])
    monkeypatch.setattr(page, "lookups", lambda: [Lookup(few, page.FIRST)])
    with pytest.raises(SystemExit, match=r"^bench\.page: no line of"):
        page.main([])
    assert Lookup(few, page.FIRST, strict=False).us("scaled_matmul", "flash wq_b 1") is None


@pytest.mark.parametrize("gone", ["decode layer", "peers", "embedded model, one request after another"])
def test_a_kind_of_lines_that_is_gone_is_an_error(gone: str, lines: list[Line]) -> None:
    few = [line for line in lines if line.said.get("what") != gone]
    with pytest.raises(PageError, match=f"what '{gone}'"):
        page.blocks([Lookup(few, page.FIRST)])


def test_marks_and_blocks_belong_together() -> None:
    assert page.filled("a<!-- page: b -->old<!-- end -->c", {"b": "new"}) == "a<!-- page: b -->new<!-- end -->c"
    for text in ("", "<!-- page: other --><!-- end -->"):
        with pytest.raises(PageError, match="wanted b"):
            page.filled(text, {"b": "new"})


# --- which line counts ------------------------------------------------------------------------------------------------


def test_the_newest_line_counts_by_date_then_file_then_place(tmp_path: Path) -> None:
    def us() -> float | None:
        return Lookup(read(tmp_path), page.FIRST).us("rope", "flash 1")

    add(tmp_path, "2026-11-29-ops", {**TIMED, "microseconds": 1.0}, {**TIMED, "microseconds": 2.0})
    assert us() == 2
    add(tmp_path, "2026-11-29-ops-again", {**TIMED, "microseconds": 3.0})
    assert us() == 3
    add(tmp_path, "2026-11-29-ops-before", {**TIMED, "microseconds": 4.0})  # of a kernel that was replaced
    assert us() == 3
    add(tmp_path, "2026-12-01-ops", {**TIMED, "date": "2026-11-28", "microseconds": 5.0})
    assert us() == 3
    add(tmp_path, "2026-12-02-ops", {**TIMED, "device": H200, "date": "2026-12-02", "microseconds": 6.0})
    assert us() == 3
    add(tmp_path, "2026-12-03-forms", {**TIMED, "date": "2026-12-03", "microseconds": 7.0})  # not a file of this kind
    assert us() == 3


def test_what_a_gpu_prefers_counts_of_what_the_newest_run_timed(tmp_path: Path) -> None:
    route = {**TIMED, "op": "route", "microseconds": 5.0}
    add(tmp_path, "2026-11-29-ops", {**route, "implementation": "cluster"}, {**route, "microseconds": 4.0})
    look = Lookup(read(tmp_path), page.FIRST)
    assert (look.us("route", "flash 1"), look.us("route", "flash 1", "fused")) == (5, 4)
    add(tmp_path, "2026-11-30-ops", {**route, "microseconds": 3.0, "date": "2026-11-30"})
    assert Lookup(read(tmp_path), page.FIRST).us("route", "flash 1") == 3


def test_a_floor_is_of_the_same_line_or_of_the_bytes_counted_last(tmp_path: Path) -> None:
    counted = {**TIMED, "microseconds": 2.0, "floor_microseconds": 0.5, "date": "2026-11-28"}
    add(tmp_path, "2026-11-28-ops", counted)
    add(tmp_path, "2026-11-29-printed", {**TIMED, "microseconds": 1.0, "from": "a print", "tree": "abc"})
    look = Lookup(read(tmp_path), page.FIRST)
    assert (look.us("rope", "flash 1"), look.floor("rope", "flash 1")) == (1, 0.5)
    assert "`2026-11-29-printed.jsonl` (abc, a print)" in sources(look.used)


def test_what_is_said_of_files_is_true_of_some(lines: list[Line]) -> None:
    stems = {line.stem for line in lines}
    assert [pattern for pattern in TIMES if not any(fnmatch(stem, pattern) for stem in stems)] == []
    used = {(stem, op) for stem, op in REPLACED for line in lines if fnmatch(line.stem, stem)}
    assert used == set(REPLACED)


def test_other_benches_are_read_as_bench_ops_says_it() -> None:
    wide = {"what": "wide linear plans", "matrix": "m", "tokens": 9, "us": {"chosen": 3.0, "cublaslt": 2.0, "few": 1.0}}
    assert [(one["case"], one["implementation"], one["microseconds"]) for one in told(wide)] == [
        ("m 9", "fused", 3.0),
        ("m 9", "cublaslt", 2.0),
    ]
    form = {"what": "index logits forms", "case": "c", "microseconds": 2.0, "of_copy_bandwidth": 0.25, "op": "x"}
    assert "implementation" not in next(told(form))
    assert next(told({**form, "shipped": True}))["floor_microseconds"] == 0.5


# --- points and GPUs --------------------------------------------------------------------------------------------------


def test_points_are_those_of_the_newest_run_of_each_gpu(tmp_path: Path) -> None:
    add(tmp_path, "2026-11-28-decode", *layers(page.FIRST, "old", (1, 8192), (16, 8192)))
    add(
        tmp_path,
        "2026-11-29-decode",
        *layers(page.FIRST, "new", (1, 1 << 20), (1, 8192), (64, 8192)),
        *layers(H200, "new", (2, 4096)),
    )
    found = read(tmp_path)
    look, other = Lookup(found, page.FIRST), Lookup(found, H200, strict=False)
    places = [(line.said["sequences"], line.said["context"]) for line in decoded(look)]
    assert places == [(1, 8192), (1, 1 << 20), (64, 8192)] * 2
    assert {line.tree for line in look.used} == {"new"}
    rows = list(decode_rows(look))
    assert rows[2][:7] == ("Flash CSA", "64", "8,192", "214", "134", "63%", "1,261 (vLLM 0.24)")
    assert [row[:3] for row in decode_rows(other)] == [("Flash CSA", "2", "4,096"), ("Flash HCA", "2", "4,096")]
    assert curves([look, other]) == {
        "H100, Flash": {
            "context": {"CSA": [[8192, 151, 71], [1 << 20, 151, 71]], "HCA": [[8192, 131, 71], [1 << 20, 131, 71]]},
            "sequences": {"CSA": [[1, 151, 71], [64, 214, 134]], "HCA": [[1, 131, 71], [64, 194, 134]]},
        }
    }


CHUNK: dict[str, Any] = {
    "what": "prefill layer", "config": "flash", "date": "2026-11-29", "device": page.FIRST, "commit": "new",
    "kind": "CSA", "tokens": 8192, "behind": 0, "layer_us": 20_000.0, "floor_us": 5000.0, "rest_us": 900.0,
    "host_us": 800.0, "flop": 8 * 10**12, "copy_gb_s": 2500.0,
}  # fmt: skip
WHOLE: dict[str, Any] = {
    "what": "decode step extrapolated", "config": "flash", "date": "2026-11-29", "device": page.FIRST, "commit": "new",
    "of_layers": {"CSA": 21, "SWA": 2}, "priced_as": {"SWA": "HCA"}, "sequences": 8, "context": 8192,
    "step_us": 10_000.0, "floor_us": 5000.0, "tokens_per_s": 800.0, "copy_gb_s": 2500.0,
}  # fmt: skip


def test_chunks_and_whole_models_have_tables_once_there_are_lines(folder: Path) -> None:
    (look,) = page.lookups(folder)
    assert [*prefill_rows(look), *whole_rows(look)] == []
    assert "two CSA, two HCA" not in page.page([look])
    add(folder, "2026-11-29-prefill", CHUNK, {**CHUNK, "kind": "HCA", "behind": 65536})
    add(folder, "2026-11-29-decode-whole", WHOLE, {**WHOLE, "tokens_per_s": 900.0})
    (look,) = page.lookups(folder)
    assert [tuple(row) for row in prefill_rows(look)] == [
        ("Flash CSA", "8,192", "0", "20.0", "5.00", "25%", "16.9 (vLLM 0.24)", "400", "0.90", "0.80"),
        ("Flash HCA", "8,192", "65,536", "20.0", "5.00", "25%", "–", "400", "0.90", "0.80"),
    ]
    assert [tuple(row) for row in whole_rows(look)] == [
        ("Flash", "8 sequences behind 8,192", "21 CSA + 2 SWA as HCA", "10.0", "5.00", "50%", "900")
    ]
    text = page.page([look])
    assert "\n### A chunk of a prompt, layers of full width\n" in text
    assert "\n### All layers, added up\n" in text
    assert "two CSA, two HCA" in text


def test_a_host_is_shown_where_it_was_timed(tmp_path: Path) -> None:
    lines = list(layers(page.FIRST, "new", (1, 8192)))
    add(tmp_path, "2026-11-29-decode", {**lines[0], "host_us": 61.0}, lines[1])
    assert [row[-1] for row in decode_rows(Lookup(read(tmp_path), page.FIRST))] == ["61.0", "–"]


def test_another_gpu_has_tables_and_columns_of_its_own(folder: Path) -> None:
    add(folder, "2026-11-29-decode", *layers(H200, "new", (1, 8192)))
    first, other = page.lookups(folder)
    text = page.page([first, other])
    h100, _, h200 = text.partition("\n## H200\n")
    assert h100.startswith(page.page([first]).partition("\n## Whose")[0])
    assert h200.count("\n### ") == 1  # no table of another engine's figures alone
    assert "| Flash CSA | 1 | 8,192 | 151 | 71.0 | 47% | 215 (vLLM 0.24) |" in h200
    lines = page.summary([first, other]).splitlines()
    assert lines[1] == "| one token of Flash | H100 | its bytes | a peer | H200 | its bytes | a peer |"
    assert lines[3].endswith("| 228 (vLLM 0.24) | 151 | 71.0 | 215 (vLLM 0.24) |")
    assert page.step(first) == page.step(page.lookups()[0])
    assert [short(name) for name in (page.FIRST, H200, "NVIDIA H100 PCIe")] == ["H100", "H200", "H100 PCIe"]


def test_a_picture_says_what_it_shows_even_if_that_is_one_point(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    add(tmp_path, "2026-11-29-decode", *layers(page.FIRST, "new", (1, 8192)))
    wanted = curves([Lookup(read(tmp_path), page.FIRST)])
    path = tmp_path / "one.svg"
    assert drawn(path) is None
    draw(wanted, path)
    assert drawn(path) == wanted
    first = path.read_bytes()
    draw(wanted, path)
    assert path.read_bytes() == first
    assert all(f">{words}<" in first.decode() for words in ("H100, Flash, 1 sequence", "8K", "CSA, its bytes"))


def test_a_query_says_what_it_is() -> None:
    assert str(Query(("*-ops",), {"op": "rope"})) == "op 'rope' in *-ops"
