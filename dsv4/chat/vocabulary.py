"""Reading and checking `tokenizer.json` before anything trusts it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from dsv4.chat.control import REQUIRED
from dsv4.chat.detokenize import token_bytes
from dsv4.errors import CheckpointError

MAX_BYTES = 64 << 20  # the official file has 6 MB
PROBE = "Aé 中😀\n 1234\t"


@dataclass(frozen=True)
class Vocabulary:
    """`controls`: added token → id. `size`: one more than the largest id."""

    controls: dict[str, int]
    size: int


def read_vocabulary(path: Path, vocab_size: int | None) -> tuple[Vocabulary, tokenizers.Tokenizer]:
    """The checked vocabulary and a BPE that knows none of the added tokens. Raises `CheckpointError`."""
    tree = _read_json(path)
    controls = _controls(path, tree)
    tokens = _tokens(path, tree)
    _check_ids(path, controls, tokens, vocab_size)
    try:
        bpe = tokenizers.Tokenizer.from_str(json.dumps(_plain(path, tree)))
    except Exception as e:  # the library raises plain Exception for whatever it dislikes
        raise CheckpointError(f"{path} cannot be read by the tokenizers library", got=_one_line(e)) from e
    _check_byte_level(path, bpe)
    return Vocabulary(controls, 1 + max(*controls.values(), *tokens.values())), bpe


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(f"{path} is missing", do="copy tokenizer.json of the same release beside the weights")
    if path.stat().st_size > MAX_BYTES:
        raise CheckpointError(f"{path} is too large", got=f"{path.stat().st_size} bytes", wanted=f"at most {MAX_BYTES}")
    try:
        tree = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as e:
        raise CheckpointError(f"{path} is not JSON", got=_one_line(e), do="download it again") from None
    if not isinstance(tree, dict) or not isinstance(tree.get("model"), dict) or tree["model"].get("type") != "BPE":
        raise CheckpointError(f"{path} is no byte-level BPE tokenizer", wanted='a "model" of type "BPE"')
    return tree


def _plain(path: Path, tree: dict[str, Any]) -> dict[str, Any]:
    """The parts that turn text into ids, and nothing else: the library aborts the process on some odd settings."""
    odd = [f"model.{key}" for key, value in tree["model"].items() if key not in ("type", "vocab", "merges") and value]
    if tree.get("normalizer") not in (None, {"type": "Sequence", "normalizers": []}):
        odd.append("normalizer")
    if not _splits_then_bytes(tree.get("pre_tokenizer")):
        odd.append("pre_tokenizer")
    if odd:
        raise CheckpointError(f"{path} is no tokenizer of this family", got=f"an unexpected {', '.join(odd)}")
    model = {"type": "BPE", "vocab": tree["model"]["vocab"], "merges": tree["model"].get("merges")}
    return {"version": "1.0", "added_tokens": [], "pre_tokenizer": tree["pre_tokenizer"], "model": model}


def _splits_then_bytes(node: Any) -> bool:
    """Whether the pre-tokeniser is a sequence of regular-expression splits and then bytes."""
    steps = node.get("pretokenizers") if isinstance(node, dict) and node.get("type") == "Sequence" else None
    if not isinstance(steps, list) or not steps or not all(isinstance(step, dict) for step in steps):
        return False
    return all(step.get("type") == "Split" for step in steps[:-1]) and steps[-1].get("type") == "ByteLevel"


def _controls(path: Path, tree: dict[str, Any]) -> dict[str, int]:
    added = tree.get("added_tokens")
    if not isinstance(added, list) or not all(isinstance(a, dict) for a in added):
        raise CheckpointError(f"{path} has no list of added tokens", got=type(added).__name__)
    pairs = [(a.get("content"), a.get("id")) for a in added]
    _check_table(path, "added_tokens", pairs)
    controls = dict(pairs)
    missing = [name for name in REQUIRED if name not in controls]
    if missing:
        raise CheckpointError(
            f"{path} lacks control tokens", got="no " + ", ".join(missing), wanted="a DeepSeek-V4 tokenizer"
        )
    return controls


def _tokens(path: Path, tree: dict[str, Any]) -> dict[str, int]:
    tokens = tree["model"].get("vocab")
    if not isinstance(tokens, dict) or not tokens:
        raise CheckpointError(
            f"{path} has no vocabulary", got=type(tokens).__name__, wanted='"model": {"vocab": {token: id}}'
        )
    _check_table(path, "vocab", list(tokens.items()))
    return tokens


def _check_table(path: Path, what: str, table: list[tuple[Any, Any]]) -> None:
    for name, id in table:
        if not isinstance(name, str) or not name or not _is_unicode(name):
            raise CheckpointError(f"{path}: {what} names a token wrongly", got=repr(name), wanted="a text")
        if type(id) is not int or not 0 <= id < 2**32:
            raise CheckpointError(f"{path}: {what} gives {name!r} no token id", got=repr(id), wanted="a whole number")
    if len({name for name, _ in table}) < len(table) or len({id for _, id in table}) < len(table):
        raise CheckpointError(f"{path}: {what} has a name or an id twice")


def _check_ids(path: Path, controls: dict[str, int], tokens: dict[str, int], vocab_size: int | None) -> None:
    largest = max(*controls.values(), *tokens.values())
    if vocab_size is not None and largest >= vocab_size:
        raise CheckpointError(
            f"{path} has ids that the model has no embedding for",
            got=f"id {largest}",
            wanted=f"ids below vocab_size {vocab_size}",
            do="use the tokenizer.json of this checkpoint",
        )
    by_id = {id: token for token, id in tokens.items()}
    clash = [name for name, id in controls.items() if by_id.get(id, name) != name]
    if clash:
        raise CheckpointError(
            f"{path}: added token {clash[0]} has the id of another token", got=f"id {controls[clash[0]]}"
        )


def _check_byte_level(path: Path, bpe: tokenizers.Tokenizer) -> None:
    tokens = [bpe.id_to_token(id) for id in bpe.encode(PROBE, add_special_tokens=False).ids]
    if b"".join(token_bytes(token) for token in tokens if token) != PROBE.encode():
        raise CheckpointError(f"{path} loses text", got=tokens, wanted="a byte-level BPE: every byte back")


def _is_unicode(text: str) -> bool:
    return not any("\ud800" <= char <= "\udfff" for char in text)


def _one_line(e: BaseException) -> str:
    return " ".join(str(e).split())[:200] or type(e).__name__
