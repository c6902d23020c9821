"""What a decode step must read in a layer, and the weights that `dsv4 bench decode` draws."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dsv4.checkpoint.names import parameters
from dsv4.checkpoint.reads import Point, layer_bytes
from dsv4.checkpoint.synth import RandomWeights, random_weight
from dsv4.config import ModelConfig
from dsv4.quant.tensor import QTensor

FLASH = ModelConfig.named("flash")


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
