"""The comparison: three recordings (a, b, and a shaken by one last place), and what they say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dsv4.chat.tokenizer import Tokenizer
from dsv4.check.compare.measure import Gap, as_json, ends, gaps
from dsv4.check.compare.record import Recording, record
from dsv4.check.compare.way import Way
from dsv4.check.perplexity import HELDOUT, read_texts
from dsv4.check.study.formats import Peaks
from dsv4.check.study.opening import open_subject
from dsv4.check.study.sample import Passage
from dsv4.check.study.study import Subject, calibrate
from dsv4.config import ModelConfig
from dsv4.errors import RequestError


@dataclass(frozen=True)
class Comparison:
    """`gaps`: a against b; `end` and `floor`: what becomes of the predictions with b, and by rounding alone."""

    a: Way
    b: Way
    tokens: int
    gaps: list[Gap]
    end: Mapping[str, float]
    floor: Mapping[str, float]

    @property
    def first_parted(self) -> Gap | None:
        """Where the bits part."""
        return next((gap for gap in self.gaps if gap.parted), None)

    @property
    def first_beyond(self) -> Gap | None:
        """Where the difference first is more than rounding makes."""
        return next((gap for gap in self.gaps if gap.beyond), None)

    def as_json(self) -> dict[str, Any]:
        """Everything."""
        firsts = {"first_parted": self.first_parted, "first_beyond_floor": self.first_beyond}
        return {
            "a": self.a.words,
            "b": self.b.words,
            "tokens": self.tokens,
            **{name: gap and as_json([gap])[0] for name, gap in firsts.items()},
            "end": dict(self.end),
            "floor": dict(self.floor),
            "gaps": as_json(self.gaps),
        }


def compare(directory: Path, a: Way, b: Way, text: str | None, tokens: int, layers: int | None) -> Comparison:
    """Read the same tokens in both ways. `text`: None takes held-out text; `layers`: how many are looked at."""
    if a.stored or b.stored:
        raise RequestError("stored layers have other ops", got=f"{a.words} and {b.words}", do="compare --answers N")
    ids = _ids(directory, text, tokens)
    subjects: dict[str, Subject] = {}
    recordings = []
    for way in (a, b, replace(a, shaken=True)):
        if way.device not in subjects:
            subjects[way.device] = open_subject(directory, way.device, len(ids))
        recordings.append(_recorded(subjects[way.device], way, ids, layers))
    ours, theirs, moved = recordings
    return Comparison(a, b, len(ids), gaps(ours, theirs, moved), ends(ours, theirs), ends(ours, moved))


def _recorded(subject: Subject, way: Way, ids: Sequence[int], layers: int | None) -> Recording:
    calibrated = way.run.format == "nvfp4-calibrated"
    peaks: Peaks = calibrate(subject, [[Passage(tuple(ids))]], lambda *_: None) if calibrated else {}
    return record(subject, way, ids, subject.config.num_hidden_layers if layers is None else layers, peaks)


def _ids(directory: Path, text: str | None, tokens: int) -> list[int]:
    tokenizer = Tokenizer.load(directory, ModelConfig.load(directory).vocab_size)
    texts = [held.text for held in read_texts(HELDOUT)] if text is None else [text]
    ids = [tokenizer.bos_id, *(id for one in texts for id in tokenizer.encode_text(one))][:tokens]
    if len(ids) < 2:
        raise RequestError("too little text", got=f"{len(ids) - 1} tokens", wanted="at least one")
    return ids
