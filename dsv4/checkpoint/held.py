"""Bytes of GPU memory that stored layers hold of their parameters, and at worst while they are made of the files'.

Counted from names, shapes and formats alone, of what `model/stored.py`, `model/layers.py` and `ops/experts.py` do:
norms become FP32; the position bias of a compressor has zeros beside it; an mHC site's scales are repeated for its
rows; experts are packed. All else stays as it is in its file, if not where: the dense matrices that read a layer's
input lie below one another.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import Final

from dsv4.checkpoint import load
from dsv4.checkpoint.specs import Param, StoredFormats
from dsv4.config import ModelConfig
from dsv4.errors import ConfigError
from dsv4.quant.formats import FP8_BLOCK
from dsv4.quant.packed import COLUMNS, PACKED, ROWS, tile_bytes

PARTS: Final = (
    "attention", "routed experts", "shared experts", "router", "head and embedding", "mHC and norms", "draft",
)  # fmt: skip
_EXPERTS: Final = (".experts.", ".shared_experts.")
_TWICE: Final = (".ape", "_base")
# Bytes for each value of an expert's w1 and w3 while these two are packed, the result among them: codes lie there one a
# byte in several orders. As tests/test_held.py has it measured; w2 has half as many values.
_PACKING: Final = {"mxfp4": 5.5, "nvfp4": 6.9, "fp8": 4.1, "fp8_f32": 4.1}


def part_of(name: str) -> str:
    """Which of `PARTS` a parameter belongs to."""
    if name.startswith("mtp."):
        return "draft"
    if name.startswith(("embed.", "head.")):
        return "head and embedding"
    marks = {".experts.": PARTS[1], ".shared_experts.": PARTS[2], ".gate.": PARTS[3], ".attn.": PARTS[0]}
    return next((part for mark, part in marks.items() if mark in name), "mHC and norms")


def held(param: Param) -> int:
    """Bytes of what a stored model on a GPU has of this parameter."""
    name = param.name
    if _is_expert(param):
        return _packed(param)
    if name.endswith("norm.weight"):
        return 4 * param.size
    if name.endswith(_TWICE):  # "_base": the site's scales have become as long
        return 2 * param.nbytes
    return 0 if name.endswith("_scale") else param.nbytes


def _packed(param: Param) -> int:
    """Of w2, or of one of w1 and w3, whose rows alternate: tiles, which rows of tiles stand apart, global scale."""
    assert param.format is not None
    (rows, columns), tile = param.shape, tile_bytes(param.format)
    if param.name.endswith(".w2.weight"):
        rows += -rows % ROWS
    return rows * (columns // COLUMNS) * tile // ROWS + 4 * rows // ROWS + 4


def held_by_part(params: Iterable[Param]) -> dict[str, int]:
    """Of all of `PARTS`, those without a parameter too."""
    total: Counter[str] = Counter(dict.fromkeys(PARTS, 0))
    for param in params:
        total[part_of(param.name)] += held(param)
    return dict(total)


def loading_bytes(params: Iterable[Param]) -> int:
    """The most that lies in memory while all weights, read as they are in their files, become a stored model.

    Part by part: the embedding is widened to FP32 once; a layer's experts lie there as they were until they are packed.
    """
    params = tuple(params)
    now = worst = sum(param.nbytes for param in params)
    for group in _groups(params):
        worst = max(worst, now + _beside(group))
        now += sum(held(param) - param.nbytes for param in group)
    return max(worst, now)


def _groups(params: Iterable[Param]) -> Iterator[list[Param]]:
    """Parameters that become a layer together; the others each alone."""

    def group(param: Param) -> str:
        part = load.part_of(param.name)
        return part if "." in part else param.name

    for _, own in groupby(params, group):
        yield list(own)


def _beside(group: list[Param]) -> int:
    """What is new in memory when most of it is, before the files' bytes of the group's experts go."""
    if group[0].name == "embed.weight":
        return 4 * group[0].size
    routed = [param for param in group if ".experts." in param.name]
    shared = [param for param in group if ".shared_experts." in param.name]
    others = [param for param in group if not _is_expert(param)]
    up = sum(held(param) for param in routed if not param.name.endswith(".w2.weight"))
    both = sum(map(held, routed))
    packing = _packing(routed)
    experts = max(up + packing, both + packing // 2, both + _packing(shared))
    return experts + sum(held(param) - param.nbytes for param in others)


def _is_expert(param: Param) -> bool:
    return any(mark in param.name for mark in _EXPERTS)


def _packing(experts: Iterable[Param]) -> int:
    """While w1 and w3 of one of them are packed; w2 takes half of it."""
    return max((int(_PACKING[p.format.name] * 2 * p.size) for p in experts if p.format is not None), default=0)


def refuse_unstored(config: ModelConfig, formats: StoredFormats) -> None:
    """ConfigError where stored layers cannot hold a checkpoint of these formats and widths."""
    do = "only small models run simulated: dsv4 generate without --stored"
    linear, experts = formats.names()
    if formats.linear is not FP8_BLOCK:
        raise ConfigError("stored layers: linears", got=linear, wanted=FP8_BLOCK.name, do=do)
    if formats.experts not in PACKED:
        wanted = " or ".join(one.name for one in PACKED)
        raise ConfigError("stored layers: experts", got=experts, wanted=wanted, do=do)
    for name in ("hidden_size", "moe_intermediate_size"):
        if getattr(config, name) % COLUMNS:
            got, wanted = getattr(config, name), f"a multiple of {COLUMNS}, to be packed"
            raise ConfigError(f"stored layers: {name}", got=got, wanted=wanted, do=do)
