"""Seeded random weights of any configuration, in the official format: for tests and benchmarks, not for answers.

A tensor's numbers depend on the seed, its name and the configuration alone, so the layout in shards changes no byte.
Scales keep activations in range through any depth: norms are near 1, matrices near sqrt(1 / in), and the streams'
mixing starts near the identity.
"""

from __future__ import annotations

import hashlib
import math
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

import torch

from dsv4.checkpoint.load import LoadProgress, Progress, Weight
from dsv4.checkpoint.names import parameters
from dsv4.checkpoint.reader import TORCH_DTYPES
from dsv4.checkpoint.specs import Param
from dsv4.checkpoint.write import SHARD_BYTES, write_stream
from dsv4.config import ModelConfig

_CPU: Final = torch.device("cpu")
_TEXT_FILES: Final = (
    "tokenizer.json",
    "tokenizer_config.json",
    "dialect.json",
    "generation_config.json",
    "official_token_ids.json",
)


def synth(
    config: ModelConfig,
    directory: str | Path,
    seed: int = 0,
    *,
    text_from: str | Path | None = None,
    max_shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> None:
    """Writes a random checkpoint of `config`, one tensor at a time, never holding more.

    `text_from` is a directory whose tokenizer and dialect are copied beside it. CheckpointError as `write` raises.
    """
    params = {param.name: param for param in parameters(config)}
    total = sum(param.nbytes for param in params.values())
    start, done = time.monotonic(), 0

    def produce(name: str) -> Weight:
        nonlocal done
        weight = random_weight(params[name], config, seed)
        done += weight.nbytes
        if progress is not None:
            progress(LoadProgress(done, total, time.monotonic() - start, name, "writing"))
        return weight

    write_stream(directory, config, params.values(), produce, max_shard_bytes, overwrite)
    if text_from is not None:
        for file in _TEXT_FILES:
            if (Path(text_from) / file).exists():
                shutil.copyfile(Path(text_from) / file, Path(directory) / file)


class RandomWeights(Mapping[str, Weight]):
    """All weights of a configuration, each drawn on `device` when it is asked for and not kept.

    A GPU draws other numbers than a CPU, of the same distributions.
    """

    def __init__(self, config: ModelConfig, seed: int, device: torch.device) -> None:
        self._config, self._seed, self._device = config, seed, device
        self._params = {param.name: param for param in parameters(config)}

    def __getitem__(self, name: str) -> Weight:
        return random_weight(self._params[name], self._config, self._seed, self._device)

    def __iter__(self) -> Iterator[str]:
        return iter(self._params)

    def __len__(self) -> int:
        return len(self._params)


def random_weight(param: Param, config: ModelConfig, seed: int, device: torch.device = _CPU) -> Weight:
    """The weight of one parameter, in the format that it is stored in."""
    digest = hashlib.sha256(f"{seed}:{param.name}".encode()).digest()
    generator = torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    if param.name.endswith(".tid2eid"):
        return _expert_ids(param, config, generator)
    values = _values(param, config, generator)
    return values.to(TORCH_DTYPES[param.dtype]) if param.format is None else param.format.encode(values)


def _values(param: Param, config: ModelConfig, generator: torch.Generator) -> torch.Tensor:
    """FP32 of the parameter's logical shape."""
    name, shape = param.name, param.shape
    noise = torch.randn(shape, generator=generator, device=generator.device)
    if "norm.weight" in name:
        return 1.0 + 0.05 * noise
    if name.endswith(("hc_attn_base", "hc_ffn_base")):
        return 0.1 * noise + _near_identity(config.hc_mult).to(noise.device)
    if name.endswith("_scale"):
        return 0.3 + 0.03 * noise
    if name.endswith((".ape", ".bias", "_base")):
        return 0.1 * noise
    if name.endswith(("attn_sink", "embed.weight")):
        return noise
    return noise / math.sqrt(shape[-1])


def _near_identity(streams: int) -> torch.Tensor:
    """mHC base [streams * (2 + streams)]: pre and post at zero, the square mixing matrix with a strong diagonal."""
    return torch.cat((torch.zeros(2 * streams), 2.0 * torch.eye(streams).flatten()))


def _expert_ids(param: Param, config: ModelConfig, generator: torch.Generator) -> torch.Tensor:
    """I64 [vocab, k]: different experts for every token."""
    rows = torch.rand(param.shape[0], config.n_routed_experts, generator=generator, device=generator.device)
    return rows.argsort(-1)[:, : param.shape[1]].contiguous()
