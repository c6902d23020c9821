"""The study itself: every run over every sample, official first, and one tree of results."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final

from torch import Tensor

from dsv4.cache.store import Store
from dsv4.check.study.formats import Peaks, Run
from dsv4.check.study.forward import Pack, forward, packs, room_for
from dsv4.check.study.measure import Answers
from dsv4.check.study.sample import Passage, Samples
from dsv4.check.study.spread import finite, summarise
from dsv4.check.study.watch import StreamWatch, TensorWatch
from dsv4.config import EngineOptions, ModelConfig
from dsv4.errors import ConfigError
from dsv4.model.model import Model
from dsv4.quant.rounding import OFFICIAL, Numerics
from dsv4.quant.tensor import QTensor
from dsv4.taps import listening

OFFICIAL_RUN: Final = Run("official")
Progress = Callable[[str, int, int], None]  # what runs, tokens done, tokens in all


@dataclass(frozen=True)
class Subject:
    """A model's weights, and the options that its runs share."""

    config: ModelConfig
    weights: Mapping[str, Tensor | QTensor]
    options: EngineOptions

    def __post_init__(self) -> None:
        if not any(isinstance(weight, QTensor) for weight in self.weights.values()):
            raise ConfigError(
                "no matrix of this checkpoint is quantised, so the model rounds none of their inputs",
                do="study one in the official format",
            )

    def model(self, numerics: Callable[[int], Numerics], dtype: str | None = None) -> Model:
        """The model with the roundings of each layer; `dtype`: how activations are stored, if not as `options` say."""
        return Model(self.config, self.weights, self._stored(dtype), numerics)

    def store(self, work: Iterable[Pack], dtype: str | None = None) -> Store:
        """A cache for the packs of `work`."""
        return Store(self.config, room_for(self._stored(dtype), work))

    def _stored(self, dtype: str | None) -> EngineOptions:
        return replace(self.options, **({"dtype": dtype} if dtype else {}))  # type: ignore[arg-type]


@dataclass
class Session:
    """What the runs of one study share. `work`: the packs of each seed, texts first."""

    subject: Subject
    work: list[list[Pack]]
    peaks: Peaks
    tick: Callable[[str, int], None]  # what ran, and how many tokens of it
    kept: list[dict[str, list[Tensor]]] = field(default_factory=list)  # the official run's streams and experts by step
    logits: dict[tuple[int, int], list[Tensor]] = field(default_factory=dict)  # its logits by seed and pack

    @property
    def layers(self) -> int:
        """Main layers."""
        return self.subject.config.num_hidden_layers

    def tokens(self, run: Run) -> int:
        """How many tokens a run reads."""
        return tokens_of(pack for seed in self.work for pack in seed if not (run.depth and pack[0].family))

    def official(self) -> dict[str, Any]:
        """The run that all others are compared with."""
        streams = StreamWatch(self.layers, None)
        found = self._run(OFFICIAL_RUN, lambda _: OFFICIAL, streams)
        self.kept = streams.kept
        return found

    def run(self, run: Run) -> dict[str, Any]:
        """One of the plan. In the first n layers only: texts alone, and no look inside."""
        streams = None if run.depth else StreamWatch(self.layers, self.kept)
        return self._run(run, lambda layer: run.numerics(layer, self.peaks), streams)

    def _run(self, run: Run, numerics: Callable[[int], Numerics], streams: StreamWatch | None) -> dict[str, Any]:
        tensors = TensorWatch()
        looked_at = numerics if streams is None else (lambda layer: tensors.watched(numerics(layer), layer))
        model = self.subject.model(looked_at, run.dtype)
        store = self.subject.store([pack for packs in self.work for pack in packs], run.dtype)
        seeds = []
        for seed in range(len(self.work)):
            with ExitStack() as stack:
                if streams is not None:
                    stack.enter_context(listening(streams))
                seeds.append(self._answers(run, model, store, seed).values())
            if streams is not None:
                seeds[-1] |= {"layers": streams.take(), "tensors": tensors.take(self.layers)}
        return {"name": run.name, **asdict(run), "title": run.title, "seeds": seeds}

    def _answers(self, run: Run, model: Model, store: Store, seed: int) -> Answers:
        answers = Answers()
        for number, pack in enumerate(self.work[seed]):
            if run.depth and pack[0].family:
                break
            logits = forward(model, store, pack, self.subject.options.prefill_chunk)
            for passage, ours, theirs in zip(pack, logits, self.logits.setdefault((seed, number), logits), strict=True):
                answers.add(passage, ours, theirs)
            self.tick(run.name, tokens_of([pack]))
        return answers


def one_by_one(session: Session, plan: Sequence[Run]) -> Iterator[dict[str, Any]]:
    """The runs of a plan, in this process."""
    yield from map(session.run, plan)


def study(
    subject: Subject,
    samples: Samples,
    plan: Sequence[Run],
    report: Progress = lambda *_: None,
    through: Callable[[Session, Sequence[Run]], Iterable[dict[str, Any]]] = one_by_one,
) -> dict[str, Any]:
    """Run everything. Returns what `--json` writes: `runs`, the official one first, each with `seeds` and `summary`.

    `through` runs the plan, in its order, once the official run is done (`parallel.side_by_side`, for one).
    """
    chunk = subject.options.prefill_chunk
    session = Session(subject, [_packed(passages, chunk) for passages in samples.seeds], {}, lambda *_: None)
    calibration = packs(samples.calibration, chunk)
    total = tokens_of(calibration) + sum(map(session.tokens, (OFFICIAL_RUN, *plan)))
    session.tick = accumulated(report, total)
    session.peaks = calibrate(subject, calibration, session.tick)
    runs = [session.official(), *through(session, plan)]
    summarise(runs)
    found: dict[str, Any] = finite(
        {"layers": session.layers, "vocabulary": subject.config.vocab_size, "samples": _counts(samples), "runs": runs}
    )
    return found


def calibrate(subject: Subject, work: Sequence[Pack], tick: Callable[[str, int], None]) -> Peaks:
    """The largest magnitude at every place of every layer in the official run over these texts."""
    watch = TensorWatch()
    model = subject.model(lambda layer: watch.watched(OFFICIAL, layer, idle=True))
    store = subject.store(work)
    for pack in work:
        forward(model, store, pack, subject.options.prefill_chunk)
        tick("calibration", tokens_of([pack]))
    return watch.peaks()


def tokens_of(work: Iterable[Pack]) -> int:
    """Tokens of all passages."""
    return sum(len(passage.ids) for pack in work for passage in pack)


def accumulated(report: Progress, total: int) -> Callable[[str, int], None]:
    """A function that adds up the tokens it is told of, and reports."""
    done = 0

    def tick(what: str, tokens: int) -> None:
        nonlocal done
        done += tokens
        report(what, done, total)

    return tick


def _packed(passages: Iterable[Passage], chunk: int) -> list[Pack]:
    """Texts, then exercises, in packs of their own: a run over texts alone repeats the first steps of a full one."""
    held = list(passages)
    return [*packs([p for p in held if not p.family], chunk), *packs([p for p in held if p.family], chunk)]


def _counts(samples: Samples) -> dict[str, Any]:
    """How much was read, seed by seed."""
    seeds = [
        {
            "tokens": sum(len(p.ids) for p in seed),
            "predicted": sum(p.predicted for p in seed),
            "texts": sum(not p.family for p in seed),
            "exercises": sum(bool(p.family) for p in seed),
        }
        for seed in samples.seeds
    ]
    return {"seeds": seeds, "left_out": dict(samples.left_out)}
