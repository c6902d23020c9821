"""What was asked of an engine, beside the model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from dsv4.config_fields import shown
from dsv4.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """What was asked. `max_context` counts positions per sequence; `draft_slack` tokens can be rewound.

    `cache_tokens`: tokens of compressed rows over all sequences; None: as many as `max_sequences` can come to.
    `reuse_points`: states that are kept for prompts that begin as an earlier one did; 0: none.
    `turn`: steps that a request keeps its slot while others wait for one.

    `draft_tokens`: guesses a step, where the checkpoint has a draft; None: as many as pay.
    `kernels`: what ops run as, a choice of `ops/op.py` for all of them or one for each by name ("*": all others).
    `stored`: activations, caches and experts in the bytes of their formats, as kernels read them.
    None or no "*" in these two: as the device has it, which `LLM.load` decides (`decided`); until then references.
    `graphs`: decode steps as CUDA graphs, where layers are stored and all ops are kernels of a GPU.
    """

    numerics: Literal["official", "float"] = "official"
    dtype: Literal["bfloat16", "float32"] = "bfloat16"  # how activations are stored
    device: str = "cpu"
    max_context: int = 4096
    max_sequences: int = 1
    prefill_chunk: int = 512
    draft_slack: int = 8
    draft_tokens: int | None = None
    cache_tokens: int | None = None
    reuse_points: int = 64
    turn: int = 512
    kernels: str | Mapping[str, str] | None = dataclasses.field(default=None, hash=False)  # a dict has no hash
    stored: bool | None = None
    graphs: bool = True

    @property
    def choices(self) -> Mapping[str, str]:
        """`kernels` by name; "*", for ops that are not named, is among them."""
        return {"*": "reference", **self._named}

    @property
    def _named(self) -> Mapping[str, str]:
        return {"*": self.kernels} if isinstance(self.kernels, str) else self.kernels or {}

    def decided(self, able: bool) -> EngineOptions:
        """The same with nothing left open. able: whether the device has kernels for all of a step of stored layers."""
        others = self._named.get("*")
        able = able and (self.numerics, self.dtype) == ("official", "bfloat16")
        stored = able and others in (None, "auto") if self.stored is None else self.stored
        others = others or ("auto" if able and stored else "reference")
        return dataclasses.replace(self, stored=stored, kernels={**self._named, "*": others})

    def __post_init__(self) -> None:
        choices = {"numerics": ("official", "float"), "dtype": ("bfloat16", "float32")}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ConfigError(name, got=shown(getattr(self, name)), wanted=" or ".join(allowed))
        lows = {
            "max_context": 1,
            "max_sequences": 1,
            "prefill_chunk": 1,
            "draft_slack": 0,
            "reuse_points": 0,
            "turn": 1,
        }
        for name, low in lows.items():
            if getattr(self, name) < low:
                raise ConfigError(name, got=getattr(self, name), wanted=f"at least {low}")
        if self.stored and (self.numerics, self.dtype) != ("official", "bfloat16"):
            got = f"{self.numerics} numerics, activations {self.dtype}"
            raise ConfigError("stored layers", got=got, wanted="official numerics and bfloat16")
        if self.draft_tokens is not None and not 0 <= self.draft_tokens <= self.draft_slack:
            raise ConfigError("draft_tokens (--draft)", got=self.draft_tokens, wanted=f"0 to {self.draft_slack}")
