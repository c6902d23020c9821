"""A checkpoint small enough to damage ten thousand times, and the means to damage it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dsv4.checkpoint.ledger import balance
from dsv4.checkpoint.load import Weight, load
from dsv4.checkpoint.reader import INDEX_NAME, Checkpoint
from dsv4.checkpoint.synth import synth
from dsv4.config import ModelConfig
from dsv4.config_named import NAMED

ROOT = Path(__file__).resolve().parents[1]
WIDTHS: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 16, "qk_rope_head_dim": 4,
    "q_lora_rank": 8, "o_groups": 2, "o_lora_rank": 8, "moe_intermediate_size": 32, "n_routed_experts": 2,
    "num_hash_layers": 1, "index_n_heads": 2, "index_head_dim": 8, "vocab_size": 12, "compress_ratios": [8, 4, 0],
}  # fmt: skip


def micro_dict(**changes: Any) -> dict[str, Any]:
    """An official `config.json` with every kind of parameter and few bytes; a change to None removes the key."""
    given = NAMED["tiny-pro"] | WIDTHS | changes
    return {name: value for name, value in given.items() if value is not None}


def micro_config(**changes: Any) -> ModelConfig:
    return ModelConfig.from_dict(micro_dict(**changes))


def write_micro(directory: Path, shard_bytes: int = 16384, **changes: Any) -> Path:
    """A synthetic checkpoint of `micro_config` in a few shards."""
    synth(micro_config(**changes), directory, seed=1, max_shard_bytes=shard_bytes)
    return directory


def open_and_load(directory: Path) -> dict[str, Weight]:
    config = ModelConfig.load(directory)
    return load(Checkpoint.open(directory), config)


def check(directory: Path) -> None:
    """Everything that is checked before a byte of a tensor is read."""
    balance(ModelConfig.load(directory), Checkpoint.open(directory).specs)


def split_file(shard: Path) -> tuple[dict[str, Any], bytes]:
    """(header, payload) of a safetensors file."""
    content = shard.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:start]), content[start:]


def join_file(shard: Path, header: object, payload: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    shard.write_bytes(len(text).to_bytes(8, "little") + text + payload)


def read_index(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((directory / INDEX_NAME).read_text())
    return found


def write_index(directory: Path, index: object) -> None:
    (directory / INDEX_NAME).write_text(json.dumps(index))
