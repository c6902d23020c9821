"""A way to run a model, and the words for it: "pure", "fused,device=cuda", "nvfp4@experts,chunk=64", "float"."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Final, Literal

from dsv4.check.study.formats import FORMATS, GROUPS, WHOLE, Run
from dsv4.check.study.study import OFFICIAL_RUN
from dsv4.errors import RequestError
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
    shaken: bool = False  # embedded numbers moved by one unit in their last place: what rounding alone does

    @property
    def pure(self) -> bool:
        """Whether references alone run."""
        return set(self.choices.values()) <= {"reference"}


def parse(words: str, device: str) -> Way:
    """The way that `words` name, on `device` unless they say another. RequestError for a word that is none."""
    way = Way(words, device=device)
    for word in filter(None, map(str.strip, words.split(","))):
        way = _after(way, word)
    check_choices(way.choices)
    if not way.pure and not way.device.startswith("cuda"):
        raise RequestError(words, got=f"device {way.device}", wanted="cuda: kernels run on a GPU", do="add device=cuda")
    return way


def _after(way: Way, word: str) -> Way:
    name, _, value = word.partition("=")
    form, _, places = word.partition("@")
    if word in KERNELS:
        return replace(way, choices={**way.choices, "*": KERNELS[word]})
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
        wanted=f"{', '.join(KERNELS)}, a format ({', '.join((*WHOLE, *FORMATS))}) or format@place, chunk=N, batch=N,"
        " device=…, dtype=…, or op=choice",
    )
