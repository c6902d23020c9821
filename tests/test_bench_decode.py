"""`dsv4 bench decode`: what is a layer and what is the rest, what must be read, and what it refuses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dsv4.bench.clock import Timing
from dsv4.bench.decode import Layer, Step, layers, line, points
from dsv4.checkpoint.names import parameters
from dsv4.checkpoint.reads import Point, layer_bytes
from dsv4.checkpoint.synth import RandomWeights, random_weight
from dsv4.cli.main import main
from dsv4.config import ModelConfig
from dsv4.quant.tensor import QTensor

FLASH = ModelConfig.named("flash")


def test_a_layer_is_what_one_more_costs() -> None:
    point = Point(1, 8192)
    steps = [Step("CSA", n, point, Timing(1e-6 * us, 0, 0, ""), launches, 100 * n + 7, 7)
             for n, us, launches in ((2, 500, 60), (6, 900, 140))]  # fmt: skip
    (found,) = layers(steps)
    assert found == Layer("CSA", point, pytest.approx(1e-4), pytest.approx(3e-4), 100, 7, 20)
    said = line(found, 1e9)
    assert (said["layer_us"], said["rest_us"], said["floor_us"], said["kind"]) == (100.0, 300.0, 0.1, "CSA")


def test_points_are_each_context_once() -> None:
    assert points([1024, 8192], [1, 8], 8192) == [Point(1, 1024), Point(1, 8192), Point(8, 8192)]


@pytest.mark.parametrize(
    ("ratio", "context", "rows", "keys"),
    [(4, 8192, 128 + 512, 2048), (4, 1024, 128 + 256, 0), (128, 8192, 128 + 64, 0)],
)
def test_bytes_of_a_layer(ratio: int, context: int, rows: int, keys: int) -> None:
    """All weights but the experts that nobody chose, the rows that are attended to, and the keys that are scored."""
    config = replace(
        FLASH, num_hidden_layers=2, compress_ratios=(ratio,) * 2, num_hash_layers=0, num_nextn_predict_layers=0
    )
    own = [param for param in parameters(config) if param.name.startswith("layers.1.")]
    each = {param.name: sum(spec.nbytes for spec in param.stored()) for param in own}
    unread = sum(size for name, size in each.items() if ".experts." in name and int(name.split(".")[4]) >= 6)
    assert layer_bytes(config, own, ratio, 6, Point(3, context)) == pytest.approx(
        sum(each.values()) - unread + 3 * (584 * rows + 68 * keys)
    )


def test_random_weights_are_those_of_synth() -> None:
    config = ModelConfig.named("tiny-pro")
    drawn = RandomWeights(config, 3, torch.device("cpu"))
    assert set(drawn) == {param.name for param in parameters(config)}
    assert len(drawn) == len(set(drawn))
    param = next(param for param in parameters(config) if param.format is not None)
    found, wanted = drawn[param.name], random_weight(param, config, 3)
    assert isinstance(found, QTensor)
    assert isinstance(wanted, QTensor)
    assert torch.equal(found.data, wanted.data)


def exits(*arguments: str) -> int | str | None:
    with pytest.raises(SystemExit) as stop:
        main(["bench", "decode", *arguments])
    return stop.value.code


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (["--layers", "3"], "two different numbers"),
        (["--layers", "3,3"], "two different numbers"),
        (["--contexts", "8K"], "numbers from 1 on"),
        (["--sequences", "0"], "numbers from 1 on"),
        (["--kinds", "window"], "CSA or HCA"),
        (["--config", "nope"], "flash, pro"),
    ],
)
def test_mistakes_are_told_in_one_line(asked: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert exits(*asked) == 1
    assert said in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert exits() == 1
    assert "wanted an H100 or H200" in capsys.readouterr().err
