"""A checkpoint directory becomes something to talk to: the one place where all rooms meet."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from dsv4 import kernels, settings
from dsv4.cache.layout import cache_bytes, page_count, page_tokens
from dsv4.cache.store import Store
from dsv4.chat.control import DSML, END_THINK
from dsv4.chat.dialect import Dialect
from dsv4.chat.encode import Prompt, encode_messages
from dsv4.chat.events import Completion
from dsv4.chat.grammar import Grammar, Grammars
from dsv4.chat.grammar_calls import Calls
from dsv4.chat.grammar_json import Json
from dsv4.chat.grammar_text import grammar_text
from dsv4.chat.parse import parse_completion
from dsv4.chat.tokenizer import Tokenizer
from dsv4.checkpoint.hub import find_model
from dsv4.checkpoint.ledger import Ledger, balance
from dsv4.checkpoint.load import Handed, Progress, Weight, load_ledger
from dsv4.checkpoint.load import LoadProgress as LoadProgress
from dsv4.checkpoint.reader import Checkpoint
from dsv4.config import EngineOptions, ModelConfig, Resolved, read_json
from dsv4.config_fields import shown
from dsv4.engine.engine import Engine
from dsv4.engine.request import Delta, Sampling
from dsv4.engine.runner import Runner
from dsv4.engine.speculate import Drafter
from dsv4.errors import ConfigError, RequestError
from dsv4.kernels.ready import load_all
from dsv4.llm_memory import check_memory, in_bytes
from dsv4.llm_options import check_device, draft_guesses, fitted
from dsv4.llm_start import Stages, Started
from dsv4.model.model import Model
from dsv4.model.mtp import Mtp
from dsv4.ops.op import PURE, all_ops, check_choices, under
from dsv4.quant.formats import FP8_BLOCK

EMBEDDED = Path(str(files("dsv4"))) / "assets" / "tiny"
# Below this width a matrix product is over before a second thread has woken up.
_ONE_THREAD_WIDTH = 512


@dataclass
class LLM:
    """A loaded model with its words. Build one with `LLM.load`."""

    directory: Path
    config: ModelConfig
    tokenizer: Tokenizer
    engine: Engine
    resolved: Resolved
    started: Started
    dialect_asked: str | None = None
    _inbox: dict[int, deque[Delta]] = field(default_factory=dict)

    @classmethod
    def load(
        cls,
        model: str | Path | None = None,
        options: EngineOptions | None = None,
        dialect: str | None = None,
        progress: Progress | None = None,
    ) -> LLM:
        """Read the checkpoint in `model`: a directory, ORG/NAME in the hub's local cache, None for the embedded one.

        `dialect`: as `Dialect.for_model` takes it. Sets torch's number of threads: one for narrow models, for which
        more are slower, DSV4_THREADS if set. Raises a DSV4Error for anything wrong with the files or options.
        `progress`: told of every stage as it begins and goes on, from this thread: headers, kernels, weights, cache,
        layers, and on a GPU rehearsal and graphs. What each took is in `started`.
        """
        stages = Stages(progress)
        stages.enter("headers")
        directory = EMBEDDED if model is None else find_model(model)
        config = ModelConfig.load(directory)
        options = fitted(options or EngineOptions(), config)
        check_device(options.device)
        tokenizer = Tokenizer.load(directory, config.vocab_size)
        _check_words(tokenizer, config)
        if dialect is not None:
            Dialect.for_model(directory, dialect)  # a mistake in it should not have to wait for the weights
        checkpoint = Checkpoint.open(directory)
        guesses = draft_guesses(config, options)
        ledger = balance(config, checkpoint.specs, draft=guesses > 0)
        options = options.decided(_able(options, ledger))
        check_memory(ledger, config, options)
        stages.device = options.device
        _install(options, stages)
        torch.set_num_threads(_threads(config))
        stages.enter("weights", ledger.nbytes, "bytes")
        weights = Handed(load_ledger(checkpoint, ledger, config, options.device, progress), stages.taking())
        engine = _engine(config, weights, options, tokenizer, guesses, stages)
        resolved = Resolved(config, options, _facts(directory, config, options, ledger, guesses))
        return cls(directory, config, tokenizer, engine, resolved, stages.over(ledger.nbytes), dialect)

    def lines(self) -> list[str]:
        """What was decided and how long that took, a line each, to be shown at start."""
        return self.resolved.lines(("started", self.started.line()))

    @cached_property
    def dialect(self) -> Dialect:
        """How this model was taught to chat. PromptError if neither the directory nor the caller says."""
        return Dialect.for_model(self.directory, self.dialect_asked)

    @cached_property
    def defaults(self) -> Sampling:
        """Sampling that the checkpoint's generation_config.json recommends; the family's own if there is none."""
        path = self.directory / "generation_config.json"
        return _recommended(read_json(path), str(path)) if path.exists() else Sampling()

    @cached_property
    def grammars(self) -> Grammars:
        """Compiles what an answer is held to (`Sampling.grammar`). RequestError without the library for it."""
        return Grammars(self.tokenizer, self.config.vocab_size)

    def grammar(self, answer: Json | None, calls: Calls | None = None, *, in_reasoning: bool = False) -> Grammar:
        """What `Sampling.grammar` takes, of an answer or calls (`chat.grammar_text`). RequestError if it cannot be had.

        `in_reasoning` is `Prompt.in_reasoning`: reasoning is free, and what follows it is held.
        """
        text = grammar_text(answer, calls, self.tokenizer.control_id(DSML))
        return self.grammars.compile(text, self.tokenizer.control_id(END_THINK) if in_reasoning else None)

    def prompt(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        thinking: bool = True,
        effort: str | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> Prompt:
        """Render OpenAI-style messages in this model's dialect; `chat.encode.encode_messages` has further options."""
        return encode_messages(messages, self.dialect, thinking=thinking, effort=effort, tools=tools)

    def generate(self, prompt: Prompt | Sequence[int], sampling: Sampling | None = None) -> Iterator[Delta]:
        """Token by token, the answer to one prompt (None: sampled as the checkpoint recommends).

        Several answers may be read side by side; they share steps. Closing an iterator early drops its request.
        RequestError for a prompt that cannot be served, at once.
        """
        ids = self.tokenizer.encode_prompt(prompt.pieces) if isinstance(prompt, Prompt) else prompt
        sampling = sampling or self.defaults
        self.engine.check(ids, sampling)
        return self._answer(ids, sampling)

    def _answer(self, ids: Sequence[int], sampling: Sampling) -> Iterator[Delta]:
        number = self.engine.add(ids, sampling)
        mine = self._inbox[number] = deque()
        try:
            while True:
                while not mine:
                    for delta in self.engine.step():
                        if delta.number not in self._inbox:
                            raise RequestError(f"request {delta.number} is stepped by two", do="use generate for all")
                        self._inbox[delta.number].append(delta)
                if mine[0].error:
                    raise mine[0].error
                yield mine[0]
                if mine.popleft().finish:
                    return
        finally:
            self.engine.cancel(number)
            del self._inbox[number]

    def ask(self, question: str, sampling: Sampling | None = None, *, thinking: bool = True) -> Completion:
        """One question, one answer, taken apart into reasoning and content."""
        prompt = self.prompt([{"role": "user", "content": question}], thinking=thinking)
        text = "".join(delta.text for delta in self.generate(prompt, sampling))
        return parse_completion(text, in_reasoning=prompt.in_reasoning, tools=False)


def _engine(
    config: ModelConfig,
    weights: Mapping[str, Weight],
    options: EngineOptions,
    tokenizer: Tokenizer,
    guesses: int,
    stages: Stages,
) -> Engine:
    stages.enter("cache")
    store = Store(config, options, options.reuse_points)
    layers = config.num_hidden_layers + (guesses > 0)
    stages.enter("layers", layers, "layers")
    runner = Runner(Model(config, weights, options), store, _in_graphs(options))
    drafter = None
    if guesses:
        drafter = Drafter(Mtp(config, weights, options, runner.model), runner.store.layers[-1], guesses)
    stages.step(layers, "")
    if torch.device(options.device).type == "cuda":
        _rehearse(runner, options, guesses, stages)
    words = (tokenizer.eos_id, tokenizer.role_ids, tokenizer.stream)
    ahead = drafter is None and torch.device(options.device).type == "cuda"
    return Engine(runner, options.prefill_chunk, *words, drafter, options.choices, options.turn, ahead)


def _in_graphs(options: EngineOptions) -> bool:
    """A capture takes what the host does not wait for: kernels do, references do not."""
    return options.graphs and in_bytes(options) and not {"reference", "covered"} & {*options.choices.values()}


def _rehearse(runner: Runner, options: EngineOptions, guesses: int, stages: Stages) -> None:
    """Have the device find memory for the largest step, or refuse before anybody was promised anything.

    Then capture the graphs that the first request alone will ask for. Ops run as in the engine's steps.
    """
    try:
        with under(options.choices):
            stages.enter("rehearsal")
            runner.rehearse(options.prefill_chunk, options.draft_slack)
            counts = sorted({1, 1 + guesses}) if _in_graphs(options) else []
            if counts:
                stages.enter("graphs", len(counts), "graphs")
            for done, count in enumerate(counts, 1):
                runner.rehearse_graph(count)
                stages.step(done, f"{count} tokens a step")
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            "the largest step does not fit into memory beside weights and cache",
            got=f"{options.prefill_chunk} tokens of prompts and {options.max_sequences} sequences",
            do="lower --prefill-chunk, --max-context, --max-sequences or --cache-tokens",
        ) from error


def _install(options: EngineOptions, stages: Stages) -> None:
    """Have all kernels of the device if any op may run one, before minutes of reading: none is built while serving.

    KernelError for a choice that does not exist, or a kernel that cannot be built.
    """
    if options.choices != PURE:
        kernels.install()
    check_choices(options.choices)
    device = torch.device(options.device)
    if options.choices != PURE and device.type == "cuda" and kernels.preferred(device):
        stages.enter("kernels", 0, "sources")
        stages.kernels += load_all(device, stages.kernel)


def _kernels(options: EngineOptions) -> str:
    """What ops run as, in words: no op falls back to plain PyTorch unsaid."""
    asked = ", ".join(f"{name}={choice}" for name, choice in options.choices.items() if name != "*")
    said = options.choices["*"] + (f"; {asked}" if asked else "")
    if options.choices["*"] == "reference":
        return said
    if torch.device(options.device).type != "cuda":
        return f"{said}; on a CPU the references"
    rows = kernels.preferred(torch.device(options.device))
    return f"{said}; no kernels yet: {', '.join(sorted(all_ops().keys() - rows.keys())) or 'none'}"


def _facts(
    directory: Path, config: ModelConfig, options: EngineOptions, ledger: Ledger, guesses: int
) -> tuple[tuple[str, str], ...]:
    """What `Resolved` prints beside configuration and options."""
    linear, experts = ledger.formats.names()
    facts = (
        ("model", str(directory)),
        ("weights", f"linears {linear}, experts {experts}, {ledger.nbytes / 1e6:,.1f} MB"),
        ("cache", _cache(config, options)),
        ("draft", f"{config.draft}, {guesses} tokens a step" if guesses else "not used"),
        ("threads", str(torch.get_num_threads())),
        ("kernels", _kernels(options) + ("; decode steps in CUDA graphs" if _in_graphs(options) else "")),
    )
    return (*facts, ("unknown", ", ".join(config.unknown))) if config.unknown else facts


def _cache(config: ModelConfig, options: EngineOptions) -> str:
    tokens = page_count(config, options) * page_tokens(config)
    points = f"{options.reuse_points} points to go on from" if options.reuse_points else "no prefix is reused"
    return (
        f"{tokens:,} tokens in pages of {page_tokens(config)}, {points}, {cache_bytes(config, options) / 1e6:,.1f} MB"
    )


def _recommended(given: object, source: str) -> Sampling:
    if not isinstance(given, Mapping):
        raise ConfigError(source, got=shown(given), wanted="a JSON object")
    if given.get("do_sample") is False:
        return Sampling(temperature=0)
    names = ("temperature", "top_k", "top_p", "min_p")
    try:
        return Sampling(**{name: given[name] for name in names if given.get(name) is not None})
    except RequestError as error:
        raise ConfigError(f"{source}: {error.what}", got=error.got, wanted=error.wanted) from None


def _check_words(tokenizer: Tokenizer, config: ModelConfig) -> None:
    """The configuration's ids of the sentence marks are those of the tokenizer, which names them."""
    for name, id in (("bos_token_id", tokenizer.bos_id), ("eos_token_id", tokenizer.eos_id)):
        if getattr(config, name) != id:
            raise ConfigError(f"config.json: {name}", got=getattr(config, name), wanted=f"{id}, as tokenizer.json says")


def _able(options: EngineOptions, ledger: Ledger) -> bool:
    """Whether stored layers of these files run on this device by kernels alone."""
    device = torch.device(options.device)
    return device.type == "cuda" and kernels.complete(device) and ledger.formats.linear is FP8_BLOCK


def _threads(config: ModelConfig) -> int:
    asked = settings.load().threads
    return asked or (1 if config.hidden_size <= _ONE_THREAD_WIDTH else torch.get_num_threads())
