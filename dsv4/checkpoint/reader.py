"""A checkpoint directory opened without trust: index and headers checked, tensors mapped rather than read."""

from __future__ import annotations

import mmap
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import torch

from dsv4.checkpoint.header import MAX_HEADER, Stored, load_json, read_header
from dsv4.checkpoint.specs import TensorSpec
from dsv4.config_fields import shown
from dsv4.errors import CheckpointError

INDEX_NAME: Final = "model.safetensors.index.json"
_MAX_INDEX: Final = 128 << 20  # Pro's has 12 MiB
_MAX_SHARDS: Final = 4096
_SHARD_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*\.safetensors")
_HEADER_PER_TENSOR: Final = 4096  # twenty times what a header spends on one
TORCH_DTYPES: Final = {
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.uint8,  # exponent bytes: a numeric conversion would ruin them
    "I8": torch.int8,
    "U8": torch.uint8,
    "I64": torch.int64,
}


class Checkpoint:
    """Tensors of a directory by Hub name. Opening reads headers only; `tensor` maps the file that it needs."""

    def __init__(self, directory: Path, stored: Mapping[str, Stored]) -> None:
        self.directory = directory
        self.stored = dict(stored)
        self._maps: dict[Path, mmap.mmap] = {}

    @classmethod
    def open(cls, directory: str | Path) -> Checkpoint:
        """Reads the index (or the single file) and all headers. CheckpointError says what is damaged, and where."""
        directory = Path(directory)
        index = directory / INDEX_NAME
        if index.exists():
            return cls(directory, _read_indexed(directory, index))
        shards = sorted(directory.glob("*.safetensors"))
        if len(shards) != 1:
            raise CheckpointError(
                f"{directory}: no {INDEX_NAME}", got=f"{len(shards)} safetensors files", wanted="an index or one file"
            )
        return cls(directory, read_header(shards[0]))

    @property
    def specs(self) -> dict[str, TensorSpec]:
        """Name, dtype and shape of every tensor that is there."""
        return {name: stored.spec for name, stored in self.stored.items()}

    @property
    def shards(self) -> list[Path]:
        """The files, each once, in order of name."""
        return sorted({stored.shard for stored in self.stored.values()})

    def tensor(self, name: str) -> torch.Tensor:
        """The stored tensor, on the CPU. It shares memory with the file's mapping: pages are read when touched.

        The mapping is private: writing to the tensor does not write to the file. UE8M0 comes as uint8 bytes.
        """
        spec, shard, begin, _ = self.stored[name]
        dtype = TORCH_DTYPES[spec.dtype]
        if spec.nbytes == 0:
            return torch.empty(spec.shape, dtype=dtype)
        flat = torch.frombuffer(self._mapping(shard), dtype=torch.uint8, count=spec.nbytes, offset=begin)
        if begin % dtype.itemsize:
            flat = flat.clone()  # the mapping starts on a page, so this tensor is not aligned to its items
        return flat.view(dtype).view(spec.shape)

    def _mapping(self, shard: Path) -> mmap.mmap:
        if shard not in self._maps:
            try:
                with shard.open("rb") as file:
                    self._maps[shard] = _map_private(file.fileno())
            except (OSError, ValueError) as error:
                raise CheckpointError(f"{shard} cannot be mapped", got=str(error)) from None
        return self._maps[shard]


def _map_private(handle: int) -> mmap.mmap:
    """Copy-on-write, without reserving memory for the copies: 160 GB map on a small machine as well."""
    if not hasattr(mmap, "MAP_PRIVATE"):
        return mmap.mmap(handle, 0, access=mmap.ACCESS_COPY)
    no_reserve = getattr(mmap, "MAP_NORESERVE", 0x4000)  # Linux's value; Python names it from 3.13 on
    return mmap.mmap(handle, 0, flags=mmap.MAP_PRIVATE | no_reserve, prot=mmap.PROT_READ | mmap.PROT_WRITE)


def _read_indexed(directory: Path, index: Path) -> dict[str, Stored]:
    table, total = _read_index(index)
    shards: dict[str, list[str]] = {}
    for name, shard in table.items():
        shards.setdefault(shard, []).append(name)
    if len(shards) > _MAX_SHARDS:
        raise CheckpointError(f"{INDEX_NAME}: files", got=len(shards), wanted=f"at most {_MAX_SHARDS}")
    for shard, names in sorted(shards.items()):  # a download that stopped is the usual damage: say so first
        if not (directory / shard).is_file():
            wanted = f"a file that holds {shown(names[0])} and {len(names) - 1} more"
            raise CheckpointError(f"{INDEX_NAME} names {shard}, which is not there", wanted=wanted)
    found: dict[str, Stored] = {}
    for shard, names in sorted(shards.items()):
        found |= _read_shard(directory / shard, names)
    payload = sum(stored.spec.nbytes for stored in found.values())
    if total is not None and total != payload:
        wanted = f"{payload}, the sum over the files"
        raise CheckpointError(f"{INDEX_NAME}: total_size", got=shown(total), wanted=wanted)
    return found


def _read_index(index: Path) -> tuple[dict[str, str], float | None]:
    try:
        if index.stat().st_size > _MAX_INDEX:
            raise CheckpointError(INDEX_NAME, got=f"{index.stat().st_size} bytes", wanted=f"at most {_MAX_INDEX}")
        content = load_json(index.read_bytes(), INDEX_NAME)
    except OSError as error:
        raise CheckpointError(f"{index} cannot be read", got=error.strerror) from None
    table = content.get("weight_map")
    if not isinstance(table, dict) or not table:
        raise CheckpointError(f"{INDEX_NAME}: weight_map", got=shown(table), wanted="an object: tensor name to file")
    for name, shard in table.items():
        if not isinstance(shard, str) or not _SHARD_NAME.fullmatch(shard):
            wanted = "a plain file name that ends in .safetensors"
            raise CheckpointError(f"{INDEX_NAME}: file of {shown(name)}", got=shown(shard), wanted=wanted)
    return table, _total_size(content.get("metadata", {}))


def _total_size(metadata: object) -> float | None:
    """The payload that the index claims; other programs have written it as a float."""
    total = metadata.get("total_size") if isinstance(metadata, dict) else metadata
    if total is None or (isinstance(total, int | float) and not isinstance(total, bool)):
        return total
    raise CheckpointError(f"{INDEX_NAME}: metadata.total_size", got=shown(total), wanted="a number of bytes")


def _read_shard(path: Path, names: list[str]) -> dict[str, Stored]:
    """The headers of one file, if it holds exactly the tensors that the index puts there."""
    found = read_header(path, min(MAX_HEADER, (1 << 20) + _HEADER_PER_TENSOR * len(names)))
    missing, extra = sorted(set(names) - found.keys()), sorted(found.keys() - set(names))
    if missing:
        wanted = f"there, as {INDEX_NAME} says"
        raise CheckpointError(f"{path.name}: tensor {shown(missing[0])} is not in it", wanted=wanted)
    if extra:
        raise CheckpointError(f"{path.name}: tensor {shown(extra[0])}", got="no entry in the index", wanted="one")
    return found
