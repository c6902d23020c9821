"""Options beside a model: what does not go together with it, and what follows from it."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

import torch

from dsv4.config import EngineOptions, ModelConfig
from dsv4.errors import ConfigError

_GUESSES: Final = 2


def fitted(options: EngineOptions, config: ModelConfig) -> EngineOptions:
    """The options, checked against the model; a context that nobody asked for is cut to the model's. ConfigError."""
    limit = config.max_position_embeddings
    if options.max_context == EngineOptions().max_context:
        options = replace(options, max_context=min(options.max_context, limit))
    if options.max_context > limit:
        raise ConfigError("max_context (--max-context)", got=options.max_context, wanted=f"at most the model's {limit}")
    if options.cache_tokens is not None and options.cache_tokens < options.max_context:
        raise ConfigError(
            "cache_tokens (--cache-tokens)",
            got=options.cache_tokens,
            wanted=f"at least the {options.max_context} of one request's context",
            do="raise it or lower --max-context",
        )
    if options.draft_tokens and config.draft != "mtp":
        got = f"{options.draft_tokens} for a draft of kind {config.draft or 'none'}"
        raise ConfigError("draft_tokens (--draft)", got=got, wanted="0: only the one-layer draft is driven so far")
    return options


def check_device(name: str) -> None:
    """ConfigError where torch has no such device."""
    if name.partition(":")[0] not in ("cpu", "cuda"):
        raise ConfigError("device", got=repr(name), wanted="cpu or cuda")
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError("device", got=repr(name), do=str(error).splitlines()[0]) from None


def draft_guesses(config: ModelConfig, options: EngineOptions) -> int:
    """Tokens to guess each step."""
    if config.draft != "mtp":
        return 0
    return min(_GUESSES, options.draft_slack) if options.draft_tokens is None else options.draft_tokens
