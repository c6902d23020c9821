"""The header of one safetensors file, believed only after every claim in it was checked against the file's size.

      0          8             8 + n                                 size
      | n: u64 LE | JSON, n bytes | payload: the tensors, gapless     |

JSON: name -> {"dtype": "BF16", "shape": [4, 2], "data_offsets": [begin, end]}, offsets counted from the payload, and
"__metadata__" with strings. Source: the safetensors format description.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final, NamedTuple

from dsv4.checkpoint.specs import ITEM_BYTES, TensorSpec
from dsv4.config_fields import shown
from dsv4.errors import CheckpointError

MAX_HEADER: Final = 64 << 20  # all of Pro's 145,116 tensors in one file would need 21 MiB
_LENGTH: Final = 8
_MAX_DIMS: Final = 8
_KEYS: Final = frozenset({"dtype", "shape", "data_offsets"})


class Stored(NamedTuple):
    """Where one tensor lies: `begin` and `end` are byte positions in the file `shard`."""

    spec: TensorSpec
    shard: Path
    begin: int
    end: int


def read_header(shard: Path, max_header: int = MAX_HEADER) -> dict[str, Stored]:
    """Every tensor of one file. CheckpointError if a claim is malformed or does not fit the file's size exactly.

    At most `max_header` bytes are read, whatever length the file claims, and none of the payload.
    """
    try:
        with shard.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            length = _header_length(file.read(_LENGTH), size, max_header, shard.name)
            text = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{shard} cannot be read", got=error.strerror) from None
    start = _LENGTH + length
    entries = _parse(text, shard.name)
    found = {name: _entry(name, entry, shard, start) for name, entry in entries.items() if name != "__metadata__"}
    _check_tiling(found, start, size, shard.name)
    return found


def load_json(text: bytes, where: str) -> dict[str, Any]:
    """A JSON object without duplicate keys, NaN or bottomless nesting. CheckpointError names `where`."""
    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=_unique_keys, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} is no JSON", got=shown(str(error)), do="download the file again") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}", got=shown(value), wanted="a JSON object")
    return value


def _header_length(prefix: bytes, size: int, max_header: int, where: str) -> int:
    if len(prefix) < _LENGTH:
        raise CheckpointError(f"{where} is truncated", got=f"{size} bytes", wanted="at least the 8 of a header length")
    length = int.from_bytes(prefix, "little")
    if length > size - _LENGTH:
        raise CheckpointError(
            f"{where}: header length",
            got=length,
            wanted=f"at most {size - _LENGTH}, the rest of the file",
            do="the file is truncated or no safetensors file",
        )
    if length > max_header:
        raise CheckpointError(f"{where}: header length", got=length, wanted=f"at most {max_header}")
    return length


def _parse(text: bytes, where: str) -> dict[str, Any]:
    entries = load_json(text, f"{where}: header")
    metadata = entries.get("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{where}: __metadata__", got=shown(metadata), wanted="an object of strings")
    return entries


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table: dict[str, Any] = {}
    for name, value in pairs:
        if name in table:
            raise ValueError(f"key {shown(name)} stands there twice")
        table[name] = value
    return table


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is no JSON number")


def _entry(name: str, entry: object, shard: Path, start: int) -> Stored:
    where = f"{shard.name}: tensor {shown(name)}"
    if not isinstance(entry, dict) or entry.keys() != _KEYS:
        raise CheckpointError(where, got=shown(entry), wanted="an object of dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise CheckpointError(f"{where}: dtype", got=shown(dtype), wanted=" or ".join(ITEM_BYTES))
    if not _are_sizes(shape) or len(shape) > _MAX_DIMS:
        raise CheckpointError(f"{where}: shape", got=shown(shape), wanted=f"up to {_MAX_DIMS} sizes below 2^63")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise CheckpointError(f"{where}: data_offsets", got=shown(offsets), wanted="two byte positions")
    spec = TensorSpec(name, dtype, tuple(shape))
    if offsets[1] - offsets[0] != spec.nbytes:
        got = f"{shown(offsets[1] - offsets[0])} bytes"
        raise CheckpointError(f"{where}: data_offsets", got=got, wanted=f"{shown(spec.nbytes)} for {_short(spec)}")
    return Stored(spec, shard, start + offsets[0], start + offsets[1])


def _are_sizes(value: object) -> bool:
    """Whether it is a list of byte counts; JSON's true is no number here."""
    return isinstance(value, list) and all(type(v) is int and 0 <= v < 1 << 63 for v in value)


def _check_tiling(found: dict[str, Stored], start: int, size: int, where: str) -> None:
    """The tensors must cover the payload, from its first byte to the file's last, without overlap or hole."""
    position, before = start, "the header"
    for name, stored in sorted(found.items(), key=lambda item: (item[1].begin, item[1].end)):
        if stored.begin != position:
            problem = "overlaps" if stored.begin < position else "leaves a hole after"
            raise CheckpointError(
                f"{where}: tensor {shown(name)} {problem} {before}",
                got=f"offset {stored.begin - start}",
                wanted=position - start,
                do="download the file again",
            )
        if stored.end > size:
            raise CheckpointError(
                f"{where}: tensor {shown(name)} ends past the end of the file",
                got=f"{size} bytes",
                wanted=f"at least {stored.end}",
                do="the file is truncated: download it again",
            )
        position, before = stored.end, shown(name)
    if position != size:
        raise CheckpointError(f"{where}: bytes after the last tensor", got=f"{size} bytes", wanted=f"{position}")


def _short(spec: TensorSpec) -> str:
    return f"{spec.dtype} {shown(list(spec.shape))}"
