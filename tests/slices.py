"""The engine over a few layers with random weights: prompts in, tokens and hashes of all their logits out."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from dsv4 import kernels
from dsv4.cache.store import Store
from dsv4.checkpoint.synth import RandomWeights
from dsv4.config import EngineOptions, ModelConfig
from dsv4.engine.engine import Engine
from dsv4.engine.graphs import Graphs, Ran, Shape
from dsv4.engine.request import NONE, Sampling
from dsv4.engine.runner import Runner
from dsv4.engine.scheduler import Work
from dsv4.engine.speculate import Confirmed
from dsv4.llm import EMBEDDED
from dsv4.model.batch import Segment, Unread, laid_out
from dsv4.model.model import Model
from dsv4.ops.op import use
from tests.arithmetic import Letters, finish

# As the embedded model, with every kind of layer, but wide enough to be packed.
SMALL: dict[str, Any] = {
    "hidden_size": 256, "num_hidden_layers": 3, "compress_ratios": [0, 4, 128, 0], "vocab_size": 64,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "num_hash_layers": 1, "head_dim": 128, "sliding_window": 32,
    "index_topk": 16,
}  # fmt: skip

Said = tuple[list[int], str | None]  # tokens of an answer, and the hash of all logits behind them


def small(**changes: Any) -> ModelConfig:
    return ModelConfig.from_dict(json.loads((EMBEDDED / "config.json").read_text()) | SMALL | changes).shortened(3)


class Unrecorded(Graphs):
    """What a graph holds, run as it stands: a CPU records none."""

    def __init__(self, model: Model, store: Store) -> None:
        self._model, self._store, self.steps = model, store, 0

    def run(self, segments: Sequence[Segment], shape: Shape, unread: Unread | None = None) -> Ran:
        self.steps += 1
        given = torch.tensor(laid_out(segments), device=self._store.table.device)
        if unread:
            unread.into(given)
        return self._step(given, shape)


class Counted(Runner):
    """A runner that knows how many tokens it has run."""

    tokens = 0

    def run(self, work: Sequence[Work], unread: Unread | None = None) -> Ran:
        self.tokens += sum(item.size for item in work)
        return super().run(work, unread)


class Wrong:
    """A drafter that guesses three tokens, by no model at all."""

    def propose(self, confirmed: Sequence[Confirmed], streams: torch.Tensor) -> None:
        for request in (one.request for one in confirmed if one.end == one.request.length - 1):
            last = request.tokens(request.length - 1, request.length)[0]
            request.draft = (last, last, last)[: max(0, request.limit - request.length - 1)]


@dataclass(repr=False)
class Sliced:
    """Layers in bytes, their prompts, and how many tokens answer each of these."""

    config: ModelConfig
    device: str
    lengths: tuple[int, ...]
    answer: int

    @cached_property
    def options(self) -> EngineOptions:
        return EngineOptions(
            device=self.device, stored=True, kernels="auto", max_context=max(self.lengths) + self.answer,
            max_sequences=len(self.lengths), prefill_chunk=sum(self.lengths), draft_slack=3, reuse_points=0,
        )  # fmt: skip

    @cached_property
    def model(self) -> Model:
        kernels.install()
        with use(self.options.choices):
            return Model(self.config, RandomWeights(self.config, 5, torch.device(self.device)), self.options)

    @cached_property
    def prompts(self) -> list[list[int]]:
        return [random.Random(n).choices(range(self.config.vocab_size), k=n) for n in self.lengths]

    @cached_property
    def eager(self) -> list[Said]:
        """All at once, every prompt in one piece, no graphs, nothing taken back: what every other way has to say."""
        return self.said(self.engine(graphs=False))

    def engine(self, graphs: bool = True, drafter: Wrong | None = None, ahead: bool = False, **changes: Any) -> Engine:
        """`changes`: of the options."""
        options = replace(self.options, **changes)
        runner = Counted(self.model, Store(self.config, options, options.reuse_points), graphs)
        given: Any = drafter
        return Engine(runner, options.prefill_chunk, NONE, (), Letters, given, options.choices, options.turn, ahead)

    def said(self, engine: Engine, alone: bool = False) -> list[Said]:
        """What it answers to each prompt, greedily and not in turn; `alone`: one prompt behind another."""
        found: dict[int, Said] = {}
        for seed, prompt in enumerate(self.prompts):
            engine.add(prompt, Sampling(temperature=seed % 2, seed=seed, max_tokens=self.answer))
            if alone or seed == len(self.prompts) - 1:
                for number, deltas in finish(engine).items():
                    found[number] = [delta.token for delta in deltas], deltas[-1].hash
        return [found[number] for number in sorted(found)]

    @cached_property
    def least(self) -> int:
        """Tokens that have to run for all answers: the last of each is read by nobody."""
        return sum(self.lengths) + len(self.lengths) * (self.answer - 1)
