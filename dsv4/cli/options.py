"""Options that several verbs have: their types, and what `--help` says of them. Defaults stand with the verbs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer

from dsv4.errors import ConfigError, RequestError

_model = typer.Argument(help="a checkpoint's directory or ORG/NAME; without it, the embedded model")
ModelPath = Annotated[Path | None, _model]
ModelName = Annotated[str | None, _model]  # for verbs that show the name as it was given

System = Annotated[str, typer.Option(help="a system message")]
Effort = Annotated[str | None, typer.Option(help="reasoning effort, by the model's own names")]
Temperature = Annotated[float | None, typer.Option(help="0: always the most probable token")]
TopK = Annotated[int | None, typer.Option(help="choose among so many tokens; 0: all")]
TopP = Annotated[float | None, typer.Option(help="choose among the head of this mass; 1: all")]
MinP = Annotated[float | None, typer.Option(help="least probability, as a share of the largest")]

Dialect = Annotated[str | None, typer.Option(help="preview, 0731, or the path of a dialect")]
Numerics = Annotated[
    Literal["official", "float"], typer.Option(help="official: round activations as the model was trained")
]
Dtype = Annotated[Literal["bfloat16", "float32"], typer.Option(help="how activations are stored")]
Device = Annotated[str, typer.Option(help="where the model runs")]
Kernels = Annotated[
    Literal["reference", "covered", "auto", "unfused"] | None,
    typer.Option(
        help="covered: where there are any; auto: nothing else; without: auto on a GPU that has all, else reference"
    ),
]
Stored = Annotated[
    bool | None,
    typer.Option(
        "--stored/--simulated",
        help="activations, caches and experts in bytes, which kernels take; without: where all ops are kernels",
        show_default=False,
    ),
]
Graphs = Annotated[
    bool, typer.Option("--graphs/--no-graphs", help="replay decode steps as CUDA graphs, where all ops are kernels")
]
Force = Annotated[list[str] | None, typer.Option(help="OP=CHOICE for one op; repeatable")]
Draft = Annotated[int | None, typer.Option(help="tokens to guess each step with the draft; 0: none")]
MaxSequences = Annotated[int, typer.Option(help="requests that run at once")]
MaxContext = Annotated[int, typer.Option(help="tokens of prompt and answer of one request")]
CacheTokens = Annotated[
    int | None, typer.Option(help="tokens in the cache, of all requests; without it, enough for all at once")
]
ReusePoints = Annotated[int, typer.Option(min=0, help="states kept for prompts that begin as an earlier one; 0: none")]
PrefillChunk = Annotated[int, typer.Option(help="tokens of prompts a step")]
KeyFile = Annotated[Path | None, typer.Option(help="a file with the server's key")]


def key_of(file: Path | None) -> str | None:
    """The key that a file holds; OSError if it cannot be read."""
    return None if file is None else file.read_text(encoding="utf-8").strip()


def choices(kernels: str | None, force: Sequence[str] | None) -> dict[str, str]:
    """`--kernels` and every `--force OP=CHOICE` as one table. ConfigError for one that is none."""
    pairs = [(text, *text.partition("=")) for text in force or ()]
    for text, op, _, choice in pairs:
        if not op or not choice:
            raise ConfigError("--force", got=repr(text), wanted="OP=CHOICE, as in rms_norm=reference")
    return {**({} if kernels is None else {"*": kernels}), **{op: choice for _, op, _, choice in pairs}}


def numbers(name: str, text: str, low: int = 1) -> list[int]:
    """Those of an option such as 1,8,32. RequestError for what is none, or below `low`."""
    try:
        found = [int(one) for one in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < low:
        raise RequestError(name, got=repr(text), wanted=f"numbers from {low} on, with commas")
    return found
