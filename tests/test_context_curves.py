"""`bench/context_curves.py`: that it runs, which ops a layer has at a point, what is drawn. Speed is for a GPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import context_curves as curves
from bench.context_curves import FULL, QUICK, Place, Point, Sweep, parts
from dsv4.quant.index_keys import FP4_KEYS, KEY_LAYOUTS

CSA = ["compress_kv", "compress_keys", "index_queries", "index_logits", "select_rows", "attend"]
FEW = ["compress_kv", "compress_keys", "attend"]  # of a CSA layer that attends to all its entries


def ops(model: str, layer: str, context: int) -> list[str]:
    return [case.op.name for case in parts(Place(model, layer, Point(1, context)), FP4_KEYS)]


def test_the_indexer_is_asked_where_there_is_a_choice() -> None:
    assert [ops("flash", "CSA", context) for context in (1024, 2048, 4096, 1 << 20)] == [FEW, FEW, CSA, CSA]
    assert [ops("pro", "CSA", context) for context in (4096, 8192)] == [FEW, CSA]
    assert ops("pro", "HCA", 1 << 20) == ["compress_kv", "attend"]
    assert list(curves.COLOURS) == CSA


@pytest.mark.parametrize("name", KEY_LAYOUTS)
def test_arguments_have_the_points_sizes(name: str) -> None:
    point = Point(3, 8192)
    csa = {case.op.name: case.make() for case in parts(Place("flash", "CSA", point), KEY_LAYOUTS[name])}
    hca = {case.op.name: case.make() for case in parts(Place("pro", "HCA", point), KEY_LAYOUTS[name])}
    assert csa["index_logits"][0].shape == (3, 64, KEY_LAYOUTS[name].data_bytes)
    assert csa["index_logits"][6].tolist() == [2048] * 3
    assert (csa["select_rows"][0].shape, csa["select_rows"][2]) == ((3, 2048), 512)
    assert [csa["attend"][at].shape for at in (0, 2, 4)] == [(3, 64, 512), (3, 128), (3, 512)]
    assert [hca["attend"][at].shape for at in (0, 2, 4)] == [(3, 128, 512), (3, 128), (3, 64)]
    assert [given["compress_kv"][1].shape[0] for given in (csa, hca)] == [4, 128]
    assert all(((given["compress_kv"][5].positions + 1) % 128 == 0).all() for given in (csa, hca))


def test_what_is_timed_once_is_the_same_everywhere() -> None:
    made: dict[str, Any] = {}
    count = 0
    for point in QUICK.points():
        for place in (Place(model, layer, point) for model in curves.HEADS for layer in curves.RATIOS):
            for case in parts(place, FP4_KEYS):
                shapes = [x.shape for x in case.make() if isinstance(x, torch.Tensor)]
                assert made.setdefault(case.label, shapes) == shapes
                count += 1
    assert 20 < len(made) < count


def test_the_points_are_two_curves_of_context_and_one_of_sequences() -> None:
    points = FULL.points()
    assert len(points) == len(set(points)) == 2 * 11 + 5
    assert [(one.title, one.along, len(one.points)) for one in curves.sweeps(points)] == [
        ("1 sequence", "context", 11),
        ("64 sequences", "context", 11),
        ("8K tokens of context", "sequences", 7),
    ]
    assert curves.sweeps([Point(1, 8)]) == []
    assert curves.sweeps([Point(1, 8), Point(1, 9)]) == [Sweep("1 sequence", "context", [Point(1, 8), Point(1, 9)])]


@pytest.mark.slow
def test_a_few_points_through_the_references(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "curves.jsonl"
    curves.main(["--device", "cpu", "--quick", "--out", str(out)])
    lines = curves.read(out)
    assert {"date", "commit", "device", "torch", "cuda"} <= lines[0].keys()
    assert {line["implementation"] for line in lines} == {"reference"}
    assert all(line["microseconds"] > 0 and line["bytes"] > 0 for line in lines)
    found = curves.times(lines)
    assert len(found) == len(QUICK.points()) * 2 * 2
    assert list(found[Place("flash", "CSA", Point(2, 4096))]) == CSA
    assert list(found[Place("pro", "CSA", Point(2, 4096))]) == FEW
    shown = capsys.readouterr().out
    assert all(name in shown for name in (*CSA, "sum", "4K"))
    pytest.importorskip("matplotlib")
    pictures = [tmp_path / name for name in ("one.svg", "two.svg")]
    for path in pictures:
        curves.main(["--plot", str(path), "--of", str(out)])
    text, again = (path.read_text(encoding="utf-8") for path in pictures)
    assert text == again
    assert all(f">{words}<" in text for words in ("Flash CSA, 1 sequence", "Pro HCA, 4K tokens of context", "sum"))


def test_the_last_of_equal_lines_counts_and_other_benches_do_not(tmp_path: Path) -> None:
    line = {"what": curves.WHAT, "model": "pro", "layer": "HCA", "sequences": 1, "context": 8192, "op": "attend"}
    other = {"op": "attend", "case": "pro csa 1", "microseconds": 7.0}
    path = tmp_path / "lines.jsonl"
    lines = {**line, "microseconds": 3.0}, other, {**line, "microseconds": 2.0}
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    assert curves.times(curves.read(path)) == {Place("pro", "HCA", Point(1, 8192)): {"attend": 2.0}}
