"""Whether a model fits: the bytes of weights, as they are loaded, and cache beside those of the machine."""

from __future__ import annotations

import os

import torch

from dsv4.cache.layout import cache_bytes
from dsv4.checkpoint.held import loading_bytes
from dsv4.checkpoint.ledger import Ledger
from dsv4.config import EngineOptions, ModelConfig
from dsv4.errors import ConfigError


def in_bytes(options: EngineOptions) -> bool:
    """Whether kernels read weights as they are stored; elsewhere the references hold them as FP32."""
    return bool(options.stored) and torch.device(options.device).type == "cuda"


def weight_bytes(ledger: Ledger, options: EngineOptions) -> int:
    """What the weights take at worst while they are loaded: FP32, or in bytes as `loading_bytes` counts."""
    if in_bytes(options):
        return loading_bytes(ledger.params)
    return 4 * sum(param.size for param in ledger.params)


def check_memory(ledger: Ledger, config: ModelConfig, options: EngineOptions) -> None:
    """Refuse what cannot fit before the machine runs out of memory: ConfigError."""
    needed = weight_bytes(ledger, options) + cache_bytes(config, options)
    if torch.device(options.device).type == "cuda":
        total = torch.cuda.mem_get_info(options.device)[1]
    else:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > total:
        raise ConfigError(
            "this does not fit into memory" + ("" if in_bytes(options) else ": the references hold weights as FP32"),
            got=f"{needed / 1e9:,.1f} GB of weights and cache",
            wanted=f"at most the {total / 1e9:,.1f} GB of {options.device}",
            do="take a smaller checkpoint, a shorter --max-context or a larger machine",
        )
