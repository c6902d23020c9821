"""`dsv4 plan`: whether a model fits on a GPU, how much context and how many at once, and how fast it can be at best."""

from __future__ import annotations

import json
from typing import Annotated, Any, Final

import typer
from rich.console import Console
from rich.table import Table

from dsv4.cli.options import CacheTokens, Draft, MaxContext, MaxSequences, PrefillChunk, ReusePoints, numbers
from dsv4.config import EngineOptions
from dsv4.config_named import NAMED
from dsv4.errors import RequestError
from dsv4.llm_gpus import GPUS, find_gpu

_WIDTH: Final = 120
_CONTEXTS: Final = (8192, 131_072)
_ABOUT: Final = {
    "attention": "compressors and indexers too",
    "draft": "0 where it is not loaded",
    "router": "tables of the hash layers too",
}
_NOT_COUNTED: Final = "Not counted: gaps that torch's allocator leaves, and the logits that each CUDA graph keeps."


def plan(
    target: Annotated[str, typer.Argument(help="a checkpoint's directory, ORG/NAME, or: " + ", ".join(NAMED))],
    gpus: Annotated[str, typer.Option(help=f"one of {', '.join(GPUS)}, as in H200 or 1xH200")],
    max_sequences: MaxSequences = 8,
    max_context: MaxContext = 4096,
    cache_tokens: CacheTokens = None,
    reuse_points: ReusePoints = 64,
    prefill_chunk: PrefillChunk = 512,
    draft: Draft = None,
    sequences: Annotated[str, typer.Option(help="numbers of sequences to tell the least time of a token for")] = (
        "1,8,32,64"
    ),
    contexts: Annotated[str | None, typer.Option(help="and tokens of context behind each of them")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Plan for `--device cuda` on one GPU, from headers: weights and GPU need not be there.

    What does not fit is said, and is no error.
    """
    gpu, counts = find_gpu(gpus), numbers("--sequences", sequences)
    asked = EngineOptions(
        max_context=max_context,
        max_sequences=max_sequences,
        cache_tokens=cache_tokens,
        reuse_points=reuse_points,
        prefill_chunk=prefill_chunk,
        draft_tokens=draft,
    )
    lengths = None if contexts is None else numbers("--contexts", contexts)
    from dsv4.checkpoint.reads import Point  # what loads torch has to wait until the usage has been checked
    from dsv4.llm_plan import make_plan

    made = make_plan(target, asked, gpu)
    limit = made.config.max_position_embeddings
    if lengths is not None and max(lengths) > limit:
        raise RequestError("--contexts", got=max(lengths), wanted=f"at most the model's {limit}")
    lengths = lengths or [length for length in _CONTEXTS if length <= limit] or [limit]
    found = made.facts([Point(count, length) for length in lengths for count in counts])
    if as_json:
        print(json.dumps(found, indent=1))
    else:
        console = Console(highlight=False)
        show(console if console.is_terminal else Console(highlight=False, width=_WIDTH), found)


def show(console: Console, found: dict[str, Any]) -> None:
    """Print what `Plan.facts` says."""
    gpu, options = found["gpu"], found["options"]
    console.print(f"{found['source']} on one {gpu['name']}", markup=False, soft_wrap=True)
    console.print(
        f"{options['max_sequences']} sequences of {options['max_context']:,} tokens, prompts by"
        f" {options['prefill_chunk']}, a draft of {options['draft_tokens']} tokens; --device cuda",
        soft_wrap=True,
    )
    console.print(_memory(found))
    console.print("\n".join((*_verdict(found), _NOT_COUNTED)), soft_wrap=True)
    console.print(_floors(found))
    how = "measured reads" if gpu["measured"] else "a data sheet's reads, which nobody reaches"
    console.print(
        f"The least time of a step without a draft: its bytes at {gpu['reads'] / 1e12:.2f} TB/s ({how}). No engine is"
        " faster; experts are those that random tokens choose.",
        soft_wrap=True,
    )
    console.print(f"{gpu['name']}: {gpu['source']}; kernels for it: dsv4 kernels --arch {gpu['architecture']}")


def _memory(found: dict[str, Any]) -> Table:
    table = Table("memory")
    table.add_column("GB", justify="right")
    table.add_column("what it is", overflow="fold")

    def row(name: str, nbytes: float, about: str = "") -> None:
        table.add_row(name, f"{nbytes / 1e9:,.3f}", about)

    weights, cache, steps = found["weights"], found["cache"], found["workspace"]
    row("weights, loaded", weights["loaded"], f"of {weights['files'] / 1e9:,.1f} GB of files")
    for name, nbytes in weights["parts"].items():
        row(f"  {name}", nbytes, _ABOUT.get(name, ""))
    row(
        "weights, while loading",
        found["loading"],
        "at worst: files, and a layer's experts once more as they are packed",
    )
    table.add_section()
    row("cache", cache["total"], f"{cache['tokens']:,} tokens in pages")
    row("  pages", cache["pages"], f"{cache['per_token']:,.0f} bytes a token of context")
    row("  rings", cache["rings"], f"{cache['per_sequence'] / 1e6:,.2f} MB a sequence: windows, compressors' tails")
    row("  kept to go on from", cache["kept"], f"{cache['per_kept'] / 1e6:,.2f} MB each")
    table.add_section()
    row("largest step", steps["total"], f"estimate, {steps['tokens']:,} tokens: the first three and the largest below")
    for name in ("streams", "lists", "indexer", "attention", "experts", "logits"):
        row(f"  {name}", steps[name])
    row("outside of torch", found["outside"], "estimate: CUDA's context, code of kernels")
    table.add_section()
    row("needed", found["needed"], "outside + cache + the larger of loading, and loaded with a step")
    row("there is", found["gpu"]["memory"], found["gpu"]["name"])
    return table


def _verdict(found: dict[str, Any]) -> list[str]:
    free, options = found["free"] / 1e9, found["options"]
    fits = f"It fits: {free:,.1f} GB are left." if free >= 0 else f"It does not fit: {-free:,.1f} GB are lacking."
    if found["outside"] + found["loading"] > found["gpu"]["memory"]:
        return [fits, "There is no room for any context: weights while they are loaded are too much alone."]
    return [
        fits,
        f"One sequence alone can have {found['longest_context']:,} tokens of context;"
        f" {found['most_sequences']:,} sequences of {options['max_context']:,} fit at once.",
    ]


def _floors(found: dict[str, Any]) -> Table:
    table = Table("context")
    for title in ("sequences", "GB a step", "ms a step at least", "tokens/s at most", "room"):
        table.add_column(title, justify="right")
    for one in found["floors"]:
        table.add_row(
            f"{one['context']:,}", f"{one['sequences']}", f"{one['nbytes'] / 1e9:,.2f}", f"{1e3 * one['seconds']:.2f}",
            f"{one['tokens_per_second']:,.0f}", "yes" if one["fits"] else "no",
        )  # fmt: skip
    return table
