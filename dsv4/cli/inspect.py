"""`dsv4 inspect`: what a checkpoint holds, or what a named configuration's checkpoint must hold, without weights."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from dsv4.config import ModelConfig
from dsv4.config_named import NAMED

if TYPE_CHECKING:
    from dsv4.checkpoint.specs import StoredFormats, TensorSpec


def inspect(
    target: Annotated[str, typer.Argument(help="a checkpoint's directory, ORG/NAME, or: " + ", ".join(NAMED))],
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Print the census of a checkpoint: tensors and bytes of every dtype, main model and draft."""
    found = describe(target)
    if as_json:
        print(json.dumps(found, indent=1))
    else:
        _print(found)


def describe(target: str) -> dict[str, Any]:
    """What `inspect` prints. A directory is held against its config.json, as loading does; a name needs no files."""
    # The checkpoint room takes seconds to import: not before the usage has been checked.
    from dsv4.checkpoint.hub import find_model
    from dsv4.checkpoint.ledger import balance
    from dsv4.checkpoint.names import inventory
    from dsv4.checkpoint.reader import Checkpoint
    from dsv4.checkpoint.specs import StoredFormats

    directory = target if target in NAMED else str(find_model(target))
    config = ModelConfig.find(directory)
    if target in NAMED:
        source = f"{target} (expected tensors, no weights read)"
        return _describe(source, config, StoredFormats.of(config), inventory(config), {})
    checkpoint = Checkpoint.open(directory)
    ledger = balance(config, checkpoint.specs)
    source = f"{Path(target)} (files: {len(checkpoint.shards)}; every expected tensor is there)"
    return _describe(source, config, ledger.formats, checkpoint.specs, ledger.ignored)


def _describe(
    source: str,
    config: ModelConfig,
    formats: StoredFormats,
    specs: Mapping[str, TensorSpec],
    ignored: Mapping[str, str],
) -> dict[str, Any]:
    linear, experts = formats.names()
    return {
        "source": source,
        "layers": {f"ratio {ratio}": count for ratio, count in config.layer_counts().items()},
        "drafter": config.draft or "none",
        "formats": {"linears": linear, "experts": experts, "nvfp4_banks": len(formats.nvfp4)},
        "ignored": dict(Counter(ignored.values())),
        "unknown_keys": list(config.unknown),
        "census": _count(config, formats, specs),
    }


def _count(config: ModelConfig, formats: StoredFormats, specs: Mapping[str, TensorSpec]) -> dict[str, Any]:
    """Tensors, bytes, dtypes and parameters (expert ids are no parameters) of the main model, the draft and both."""
    from dsv4.checkpoint.names import census, parameters

    size = Counter[str]()
    for param in parameters(config, formats):
        size[_part(param.name)] += 0 if param.dtype == "I64" else param.size
    found: dict[str, Any] = {}
    for part in ("main", "draft"):
        group = [spec for spec in specs.values() if _part(spec.name) == part]
        found[part] = {**census(group)._asdict(), "nbytes_by_dtype": _bytes(group), "parameters": size[part]}
    return {**found, "total": {**census(specs.values())._asdict(), "parameters": size.total()}}


def _bytes(specs: list[TensorSpec]) -> dict[str, int]:
    total = Counter[str]()
    for spec in specs:
        total[spec.dtype] += spec.nbytes
    return dict(sorted(total.items()))


def _part(name: str) -> str:
    return "draft" if name.startswith("mtp.") else "main"


def _print(found: dict[str, Any]) -> None:
    console = Console(highlight=False)
    for name in ("source", "layers", "drafter", "formats", "ignored", "unknown_keys"):
        if found[name]:
            console.print(f"{name.replace('_', ' '):<13}{_line(found[name])}", markup=False, soft_wrap=True)
    console.print(_table(found["census"]))
    main, draft, total = (found["census"][part] for part in ("main", "draft", "total"))
    console.print(
        f"{total['tensors']:,} tensors, {total['nbytes']:,} bytes; {main['parameters']:,} parameters"
        f" and {draft['parameters']:,} in the draft",
        soft_wrap=True,
    )


def _line(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name}: {item}" for name, item in value.items())
    return ", ".join(value) if isinstance(value, list) else str(value)


def _table(counts: dict[str, Any]) -> Table:
    main, draft, total = counts["main"], counts["draft"], counts["total"]
    table = Table("dtype")
    for title in ("main", "bytes", "draft", "bytes", "total"):
        table.add_column(title, justify="right")
    for dtype, tensors in total["dtypes"].items():
        cells = [part[key].get(dtype, 0) for part in (main, draft) for key in ("dtypes", "nbytes_by_dtype")]
        table.add_row(dtype, *(f"{cell:,}" for cell in (*cells, tensors)))
    table.add_section()
    sums = (main["tensors"], main["nbytes"], draft["tensors"], draft["nbytes"], total["tensors"])
    table.add_row("all", *(f"{cell:,}" for cell in sums))
    return table
