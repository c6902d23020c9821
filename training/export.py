"""A trained table of parameters to a directory that the engine, and any reader of the official format, loads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from training.params import export
from training.recipes import Recipe

TEXTS = ("tokenizer.json", "official_token_ids.json", "dialect.json")
GENERATION = {"do_sample": False, "bos_token_id": 0, "eos_token_id": 1}


def export_model(params: Mapping[str, Tensor], recipe: Recipe, texts: Path, directory: Path) -> None:
    """Weights in the official formats, tokenizer and dialect beside them. RuntimeError above the recipe's limit."""
    export(params, recipe.config, directory)
    for name in TEXTS:
        shutil.copyfile(texts / name, directory / name)
    (directory / "generation_config.json").write_text(json.dumps(GENERATION) + "\n", encoding="utf-8")
    size = sum(path.stat().st_size for path in directory.iterdir())
    if size > recipe.limit:
        raise RuntimeError(f"{directory} has {size} bytes, the recipe allows {recipe.limit}")
