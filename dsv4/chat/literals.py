"""A release's prompt texts, read out of the `encoding/` folder that its checkpoint ships, without running it.

The folder's Python files are parsed, and their string constants looked up by SHA-256. A text that reads like one of
the known ones but is not means a dialect that this program has not met: an error, since a near miss in the prompt
degrades a model silently.
"""

from __future__ import annotations

import ast
import hashlib
import warnings
from collections.abc import Iterator
from pathlib import Path

from dsv4.errors import PromptError

EFFORT_A, EFFORT_B, TOOLS, RESPONSE_FORMAT = "effort A", "effort B", "tools", "response format"
KNOWN = {
    "f7a24f3b3050d4a83781e9b755b316aae2ec1d9dc87562541d90bcb04d7350f7": EFFORT_A,
    "53fb31b8392ec5b4a926481943efc67636748f137c1a49d493a7af4d4fa55d2c": EFFORT_B,
    "09b7269daaddbeaf11a3ed55c07b1846c35162b841d8b4301bbe0449879d1fd8": TOOLS,
    "012f31fcc1338bdfe25b132eaf56ab020ee75ab8e649f37b30b8e5f544fb17a5": RESPONSE_FORMAT,
}
# How each kind of text begins, in every release so far.
OPENINGS = {
    "Reasoning Effort:": "an effort text",
    "## Tools\n": "a tool template",
    "## Response Format:": "a response format",
}
MAX_BYTES = 1 << 20


def read_literals(source: Path) -> dict[str, str]:
    """Known texts among the string constants of a `.py` file, or of the files directly in a folder.

    Raises `PromptError` for an unreadable file and for an unknown text that opens like a known kind.
    """
    files = sorted(source.glob("*.py")) if source.is_dir() else [source]
    found: dict[str, str] = {}
    for file in files:
        for text in _strings(_parse(file)):
            kind = KNOWN.get(hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest())
            if kind is not None:
                found[kind] = text
            else:
                _refuse_lookalike(file, text)
    return found


def _parse(file: Path) -> ast.AST:
    size = file.stat().st_size
    if size > MAX_BYTES:
        raise PromptError(
            f"{file} is too large for an encoding file", got=f"{size} bytes", wanted=f"at most {MAX_BYTES}"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an old escape in a docstring is none of ours
            return ast.parse(file.read_bytes())
    except (SyntaxError, ValueError, RecursionError, MemoryError) as e:
        raise PromptError(f"{file} is not Python that can be read", got=str(e) or type(e).__name__) from None


def _strings(node: ast.AST) -> Iterator[str]:
    """String constants, and sums of them, which a reader would take for one text."""
    pending = [node]
    while pending:
        node = pending.pop()
        text = _folded(node)
        if text is not None:
            yield text
        else:
            pending += ast.iter_child_nodes(node)


def _folded(node: ast.AST) -> str | None:
    parts: list[str] = []
    while isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add) and _constant(node.right) is not None:
        parts.append(_constant(node.right) or "")
        node = node.left
    first = _constant(node)
    return None if first is None else first + "".join(reversed(parts))


def _constant(node: ast.AST) -> str | None:
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


def _refuse_lookalike(file: Path, text: str) -> None:
    for opening, kind in OPENINGS.items():
        if text.startswith(opening) and text != opening:
            digest = hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()
            raise PromptError(
                f"{file} holds {kind} of a dialect unknown to this version",
                got=f"{text[:40]!r}... (sha256 {digest[:16]})",
                do="pass --dialect PATH with a dialect.json that states it",
            )
