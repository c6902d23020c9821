"""A way to run a model, and the words for it: "pure", "fused,device=cuda", "nvfp4@experts,chunk=64", "float".

Answers alone are also compared in "stored" layers: "auto,stored,device=cuda" is what `--device cuda` serves with.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Final, Literal

from dsv4.check.study.formats import FORMATS, GROUPS, WHOLE, Run
from dsv4.check.study.study import OFFICIAL_RUN
from dsv4.config import EngineOptions
from dsv4.errors import RequestError
from dsv4.kernels import install
from dsv4.ops.op import all_ops, check_choices

KERNELS: Final = {"pure": "reference", "unfused": "unfused", "fused": "covered", "auto": "auto"}
_NUMBERS: Final = ("chunk", "batch")
_TEXTS: Final = {"device": None, "dtype": ("bfloat16", "float32")}


@dataclass(frozen=True)
class Way:
    """`run`: the number formats; `chunk`: tokens of a step, 0 for all; `batch`: copies of the text side by side."""

    words: str = "pure"
    choices: Mapping[str, str] = field(default_factory=lambda: {"*": "reference"})
    run: Run = OFFICIAL_RUN
    device: str = "cpu"
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    chunk: int = 0
    batch: int = 1
    stored: bool = False  # layers in the bytes that kernels read
    shaken: bool = False  # embedded numbers moved by one unit in their last place: what rounding alone does

    @property
    def pure(self) -> bool:
        """Whether references alone run."""
        return set(self.choices.values()) <= {"reference"}

    def options(self, context: int, sequences: int) -> EngineOptions:
        """What an engine runs by in this way; RequestError for a format that none has.

        context: positions. sequences: how many at once, where the way has no `batch`. `chunk` cuts prompts.
        """
        if self.run not in (OFFICIAL_RUN, Run("float"), Run("float32")):
            wanted = "official or float: what other formats do to answers, dsv4 study formats tells"
            raise RequestError("--answers", got=self.run.format, wanted=wanted)
        return EngineOptions(
            numerics="float" if self.run.format == "float" else "official",
            dtype=self.dtype,
            device=self.device,
            max_context=context,
            max_sequences=self.batch if self.batch > 1 else sequences,
            prefill_chunk=self.chunk or EngineOptions.prefill_chunk,
            draft_tokens=0,
            reuse_points=0,
            kernels=dict(self.choices),
            stored=self.stored,
        )


def parse(words: str, device: str) -> Way:
    """The way that `words` name, on `device` unless they say another. RequestError for a word that is none."""
    way = Way(words, device=device)
    for word in filter(None, map(str.strip, words.split(","))):
        way = _after(way, word)
    if not way.pure:
        install()  # whose names the choices are
    check_choices(way.choices)
    if not way.pure and not way.device.startswith("cuda"):
        raise RequestError(words, got=f"device {way.device}", wanted="cuda: kernels run on a GPU", do="add device=cuda")
    return way


def _after(way: Way, word: str) -> Way:
    name, _, value = word.partition("=")
    form, _, places = word.partition("@")
    if word in KERNELS:
        return replace(way, choices={**way.choices, "*": KERNELS[word]})
    if word == "stored":
        return replace(way, stored=True)
    if form in (*FORMATS, *WHOLE) and (places or "all") in GROUPS:
        run = Run(form, places or "all")
        return replace(way, run=run, dtype="float32" if run.dtype == "float32" else way.dtype)
    if name in _NUMBERS and value.isdecimal():
        return replace(way, **{name: int(value)})  # type: ignore[arg-type]
    if name in _TEXTS and value in (_TEXTS[name] or (value,)) and value:
        return replace(way, **{name: value})  # type: ignore[arg-type]
    if name in all_ops() and value:
        return replace(way, choices={**way.choices, name: value})
    raise RequestError(
        "no way to run a model",
        got=word,
        wanted=f"{', '.join(KERNELS)}, stored, a format ({', '.join((*WHOLE, *FORMATS))}) or format@place, chunk=N,"
        " batch=N, device=…, dtype=…, or op=choice",
    )
