"""A checkpoint and held-out text as the study needs them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch

from dsv4 import settings
from dsv4.chat.dialect import Dialect
from dsv4.chat.tokenizer import Tokenizer
from dsv4.check.perplexity import HELDOUT as HELDOUT
from dsv4.check.perplexity import read_texts
from dsv4.check.study.sample import Exercises, Samples, draw_samples
from dsv4.check.study.study import Subject
from dsv4.check.tasks.item import Family
from dsv4.checkpoint.ledger import balance
from dsv4.checkpoint.load import Progress, load_ledger
from dsv4.checkpoint.reader import Checkpoint
from dsv4.config import EngineOptions, ModelConfig
from dsv4.errors import ConfigError

NARROW: Final = 512  # up to this width a matrix product is over before a second thread has woken up


@dataclass(frozen=True)
class Asked:
    """How much is read. `span`: tokens of the longest passage, and of a step."""

    seeds: int = 3
    tokens: int = 1536
    span: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        for name, low in {"seeds": 1, "tokens": 64, "span": 32}.items():
            if getattr(self, name) < low:
                raise ConfigError(f"--{name}", got=getattr(self, name), wanted=f"at least {low}")


def open_samples(directory: Path, text: Path, families: Mapping[str, Family], asked: Asked) -> Samples:
    """The samples for the checkpoint in `directory`, in its own words."""
    config = ModelConfig.load(directory)
    tokenizer = Tokenizer.load(directory, config.vocab_size)
    exercises = Exercises(families, Dialect.for_model(directory), tokenizer, asked.span)
    texts = [held.text for held in read_texts(text)]
    return draw_samples(texts, exercises, asked.seeds, asked.tokens, asked.seed)


def open_subject(directory: Path, device: str, span: int, progress: Progress | None = None) -> Subject:
    """The weights of a checkpoint, without its draft.

    Sets torch's number of threads: one for narrow models, for which processes pay and threads do not; DSV4_THREADS
    if set.
    """
    config = ModelConfig.load(directory)
    checkpoint = Checkpoint.open(directory)
    options = EngineOptions(device=device, prefill_chunk=span)
    threads = settings.load().threads or (1 if config.hidden_size <= NARROW else torch.get_num_threads())
    torch.set_num_threads(threads)
    ledger = balance(config, checkpoint.specs, draft=False)
    return Subject(config, load_ledger(checkpoint, ledger, config, device, progress), options)
