"""Checkpoints written in the official layout: names, bytes, shards, index and `config.json`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Final

import torch

from dsv4.checkpoint.ledger import balance
from dsv4.checkpoint.load import Weight
from dsv4.checkpoint.reader import INDEX_NAME, TORCH_DTYPES
from dsv4.checkpoint.specs import ITEM_BYTES, Param, TensorSpec
from dsv4.config import ModelConfig
from dsv4.errors import CheckpointError
from dsv4.quant.tensor import QTensor

SHARD_BYTES: Final = 4 << 30  # about what the official shards hold
_PLAIN_NAMES: Final = {torch.bfloat16: "BF16", torch.float32: "F32", torch.int64: "I64"}
assert all(TORCH_DTYPES[name] == dtype for dtype, name in _PLAIN_NAMES.items())


def write(
    directory: str | Path,
    config: ModelConfig,
    tensors: Mapping[str, Weight],
    max_shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
) -> None:
    """Writes `tensors`, by Hub name as `load` returns them, as a checkpoint of `config`.

    CheckpointError if they are not exactly the parameters of `config`, or if weights are there and not `overwrite`.
    """
    params = {name: _param(name, weight) for name, weight in tensors.items()}
    specs = {spec.name: spec for param in params.values() for spec in param.stored()}
    write_stream(directory, config, balance(config, specs).params, tensors.__getitem__, max_shard_bytes, overwrite)


def write_stream(
    directory: str | Path,
    config: ModelConfig,
    params: Iterable[Param],
    produce: Callable[[str], Weight],
    max_shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
) -> None:
    """As `write`, but asks `produce` for one parameter at a time, in order, and never holds more than one."""
    shards = _split(list(params), max_shard_bytes)
    total = sum(param.nbytes for shard in shards for param in shard)
    target = Path(directory)
    _prepare(target, total, overwrite)
    table: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        _write_shard(target / name, shard, produce)
        table |= {spec.name: name for param in shard for spec in param.stored()}
    _write_json(target / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": table})
    _write_json(target / "config.json", config.to_dict())


def _param(name: str, weight: Weight) -> Param:
    if isinstance(weight, QTensor):
        return Param(name, weight.format.data_name, weight.shape, weight.format)
    if weight.dtype not in _PLAIN_NAMES:
        wanted = " or ".join(str(dtype) for dtype in _PLAIN_NAMES)
        raise CheckpointError(f"tensor {name}", got=weight.dtype, wanted=f"a QTensor, {wanted}")
    return Param(name, _PLAIN_NAMES[weight.dtype], tuple(weight.shape))


def _split(params: list[Param], limit: int) -> list[list[Param]]:
    """Runs of parameters of at most `limit` bytes (one that is larger stands alone); scales stay with their data."""
    shards: list[list[Param]] = []
    room = 0
    for param in params:
        size = param.nbytes
        if not shards or size > room:
            shards.append([])
            room = limit
        shards[-1].append(param)
        room -= size
    return shards


def _prepare(target: Path, total: int, overwrite: bool) -> None:
    """An empty place with room enough, before anything is computed."""
    try:
        target.mkdir(parents=True, exist_ok=True)
        old = [*target.glob("*.safetensors"), *target.glob(INDEX_NAME)]
        if old and not overwrite:
            do = "name another directory, or say --overwrite"
            raise CheckpointError(f"{target} already holds weights", got=old[0].name, do=do)
        free = shutil.disk_usage(target).free + sum(path.stat().st_size for path in old)
        if free < total:
            raise CheckpointError(f"{target}: free space", got=f"{free} bytes", wanted=f"{total}")
        for path in old:
            path.unlink()
    except OSError as error:
        raise CheckpointError(f"{target} cannot be written", got=error.strerror) from None


def _write_shard(path: Path, shard: list[Param], produce: Callable[[str], Weight]) -> None:
    specs = [spec for param in shard for spec in param.stored()]
    header, places = _layout(specs)
    partial = path.with_suffix(".partial")  # no reader takes a shard whose writer died
    try:
        with partial.open("wb") as file:
            file.write(header)
            for param in shard:
                for spec, tensor in zip(param.stored(), _tensors(produce(param.name)), strict=True):
                    assert (TORCH_DTYPES[spec.dtype], spec.shape) == (tensor.dtype, tuple(tensor.shape)), spec.name
                    file.seek(places[spec.name])
                    file.write(_bytes(tensor))
        partial.replace(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written", got=error.strerror) from None
    finally:
        partial.unlink(missing_ok=True)


def _layout(specs: list[TensorSpec]) -> tuple[bytes, dict[str, int]]:
    """The header, and every tensor's place in the file. Wide items come first, so that all are aligned to theirs."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offsets: dict[str, int] = {}
    end = 0
    for spec in sorted(specs, key=lambda spec: -ITEM_BYTES[spec.dtype]):
        offsets[spec.name], end = end, end + spec.nbytes
        entries[spec.name] = {"dtype": spec.dtype, "shape": spec.shape, "data_offsets": [end - spec.nbytes, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    return header, {name: len(header) + offset for name, offset in offsets.items()}


def _tensors(weight: Weight) -> list[torch.Tensor]:
    if not isinstance(weight, QTensor):
        return [weight]
    return [t for t in (weight.data, weight.scale, weight.global_scale) if t is not None]


def _bytes(tensor: torch.Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
