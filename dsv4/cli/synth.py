"""`dsv4 synth`: write a checkpoint of seeded random weights in the official format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Final

import typer
from rich.console import Console

from dsv4.cli.progress import load_bar
from dsv4.config import ModelConfig
from dsv4.config_named import NAMED

_CONFIG_HELP: Final = "a config.json's directory, or: " + ", ".join(NAMED)


def synth(
    out: Annotated[Path, typer.Option("--out", help="directory to write")],
    config: Annotated[str, typer.Option("--config", help=_CONFIG_HELP)] = "tiny-pro",
    layers: Annotated[int | None, typer.Option(help="only its first layers, without a draft")] = None,
    seed: Annotated[int, typer.Option("--seed", help="the same seed writes the same tensors")] = 0,
    shard_bytes: Annotated[int, typer.Option("--shard-bytes", min=1, help="largest file")] = 4 << 30,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace weights that are there")] = False,
) -> None:
    """Write random weights of a configuration, with the embedded tokenizer where its vocabulary fits."""
    model = ModelConfig.find(config)
    model = model if layers is None else model.shortened(layers)
    # The checkpoint room takes seconds to import: not before the usage has been checked.
    from dsv4.checkpoint import synth as writer

    text = _text_for(model)
    with load_bar(Console(stderr=True), "writing") as show:
        writer.synth(model, out, seed, text_from=text, max_shard_bytes=shard_bytes, overwrite=overwrite, progress=show)
    Console(highlight=False).print(f"wrote {out}: {config}, seed {seed}", markup=False, soft_wrap=True)


def _text_for(model: ModelConfig) -> Path | None:
    """The embedded model's directory, if its tokenizer has this vocabulary."""
    from dsv4.llm import EMBEDDED

    vocab = json.loads((EMBEDDED / "config.json").read_bytes())["vocab_size"]
    return EMBEDDED if vocab == model.vocab_size else None
