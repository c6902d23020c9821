"""What a model takes while it loads: on a GPU in stored layers the bytes of its files, and nothing twice for long."""

from __future__ import annotations

import dataclasses
import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from dsv4.checkpoint.ledger import balance
from dsv4.checkpoint.load import Handed
from dsv4.checkpoint.reader import Checkpoint
from dsv4.checkpoint.synth import synth
from dsv4.config import EngineOptions, ModelConfig
from dsv4.errors import ConfigError
from dsv4.llm import EMBEDDED, LLM
from dsv4.llm_memory import weight_bytes

STORED = EngineOptions(device="cuda", stored=True, kernels="auto")


def test_weights_in_bytes_are_counted_so() -> None:
    config, checkpoint = ModelConfig.load(EMBEDDED), Checkpoint.open(EMBEDDED)
    ledger = balance(config, checkpoint.specs, draft=True)
    wide = 4 * sum(param.size for param in ledger.params)
    assert weight_bytes(ledger, EngineOptions()) == wide
    assert weight_bytes(ledger, EngineOptions(stored=True)) == wide  # a CPU has no kernels that read them
    layers = {param.name.split(".")[1] for param in ledger.params if param.name.startswith("layers.")}
    assert len(layers) == config.num_hidden_layers
    assert ledger.nbytes < weight_bytes(ledger, STORED) < 2 * ledger.nbytes


def test_what_is_handed_out_is_not_kept() -> None:
    weights = {"a": torch.ones(3), "b": torch.zeros(2)}
    seen = weakref.ref(weights["a"])
    handed = Handed(weights)
    assert ("a" in handed, len(handed), sorted(handed)) == (True, 2, ["a", "b"])
    assert handed["a"].shape == (3,)
    gc.collect()
    assert seen() is None
    assert "a" not in handed
    with pytest.raises(KeyError):
        handed["a"]


def test_a_model_takes_every_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    """And asks for none twice: then nothing would be there."""
    left: list[Handed] = []

    class Watched(Handed):
        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            left.append(self)

    monkeypatch.setattr("dsv4.llm.Handed", Watched)
    for options in (EngineOptions(), EngineOptions(stored=True)):
        LLM.load(options=options)
    assert [list(handed) for handed in left] == [[], []]


def test_the_first_layers_of_a_model(tmp_path: Path) -> None:
    flash = ModelConfig.named("flash")
    short = flash.shortened(3)
    assert (short.num_hidden_layers, short.layer_ratios, short.num_hash_layers) == (3, flash.layer_ratios[:3], 3)
    assert (short.draft, short.draft_layers, len(short.compress_ratios)) == (None, 0, 3)
    assert ModelConfig.from_dict(short.to_dict()) == short
    for count in (0, 44):
        with pytest.raises(ConfigError, match="wanted 1 to 43"):
            flash.shortened(count)
    tiny = ModelConfig.named("tiny-pro").shortened(2)
    synth(tiny, tmp_path, text_from=EMBEDDED)
    assert dataclasses.replace(ModelConfig.load(tmp_path), unknown=()) == dataclasses.replace(tiny, unknown=())
