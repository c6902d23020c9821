"""`dialect.json`: the texts that one of our own models was taught with.

    {"about": "…", "efforts": {"high": ""}, "default_effort": "high",
     "tools": "… {tool_schemas} …", "response_format": "… {schema}"}

`about` is for readers; `tools` and `response_format` may be null or absent. The templates use the placeholders of the
official ones: `{dsml_token}`, `{thinking_start_token}`, `{thinking_end_token}`, `{tool_schemas}`; `{schema}`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsv4.chat.templates import SCHEMA, TOOL_SCHEMAS, check_template
from dsv4.errors import PromptError

KEYS = {"about", "efforts", "default_effort", "tools", "response_format"}
MAX_BYTES = 1 << 20


@dataclass(frozen=True)
class OwnDialect:
    """A checked `dialect.json`."""

    efforts: dict[str, str | None]
    default_effort: str
    tools: str | None
    response_format: str | None


def read_own(path: Path) -> OwnDialect:
    """Read and check; `PromptError` names the key that is wrong."""
    tree = _read(path)
    unknown = sorted(set(tree) - KEYS)
    if unknown:
        raise PromptError(f"{path} has an unknown key", got=unknown[0], wanted=", ".join(sorted(KEYS)))
    efforts, default = tree.get("efforts"), tree.get("default_effort")
    if not isinstance(efforts, dict) or not all(isinstance(text, str) for text in efforts.values()):
        raise PromptError(f"{path}: efforts", got=json.dumps(efforts)[:80], wanted="an object of effort: text")
    if not isinstance(default, str) or default not in efforts:
        raise PromptError(f"{path}: default_effort", got=repr(default), wanted="one of efforts")
    return OwnDialect(
        dict(efforts),
        default,
        _template(path, tree, "tools", TOOL_SCHEMAS),
        _template(path, tree, "response_format", SCHEMA),
    )


def _read(path: Path) -> dict[str, Any]:
    if path.stat().st_size > MAX_BYTES:
        raise PromptError(
            f"{path} is too large for a dialect", got=f"{path.stat().st_size} bytes", wanted=f"at most {MAX_BYTES}"
        )
    try:
        tree = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as e:
        raise PromptError(f"{path} is not JSON", got=" ".join(str(e).split())) from None
    if not isinstance(tree, dict):
        raise PromptError(f"{path} is no dialect", got=type(tree).__name__, wanted="a JSON object")
    return tree


def _template(path: Path, tree: dict[str, Any], key: str, needed: str) -> str | None:
    text = tree.get(key)
    if text is None:
        return None
    if not isinstance(text, str):
        raise PromptError(f"{path}: {key}", got=type(text).__name__, wanted="a text or null")
    check_template(f"{path}: {key}", text, needed)
    return text
