"""The tables of the performance page: which figures, in which order. All are looked up (bench/page_lines.py)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from textwrap import fill
from typing import Any, Final, NamedTuple

from bench.page_lines import Line, Lookup, Query, short, sources
from bench.page_peers import CHUNKS, LAYERS, LAYERS_AT, PEERS, Peer

NONE: Final = "–"
DECODE: Final = Query(("*-decode*",), {"what": "decode layer"})
PREFILL: Final = Query(("*-prefill*",), {"what": "prefill layer"})
_WHOLE: Final = {
    "decode": Query(("*-decode*",), {"what": "decode step extrapolated"}),
    "prefill": Query(("*-prefill*",), {"what": "prefill step extrapolated"}),
}
_SHAPES: Final = ("flash", "pro")

Row = Sequence[str]


class Kind(NamedTuple):
    """A table that each device has, if it has lines for it."""

    title: str
    head: Row
    rows: Callable[[Lookup], Iterator[Row]]
    said: str
    later: bool = False  # there may be no line of it yet


# --- numbers ---------------------------------------------------------------------------------------------------------


def number(value: float | None) -> str:
    """Three digits, or all before the point."""
    if value is None:
        return NONE
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def both(value: float | None, other: float | None) -> str:
    """The other one in brackets."""
    return number(value) + (f" ({number(other)})" if other is not None else "")


def peer(of: Peer | None) -> str:
    return f"{of.shown} ({of.whose})" if of else NONE


# --- decode ----------------------------------------------------------------------------------------------------------


def timed(look: Lookup, query: Query, of: Row, at: Row) -> list[Line]:
    """Lines of each group that the fields `of` make: of the newest run that has it, at a point the last; in order."""
    found: dict[tuple[Any, ...], Line] = {}
    for group in sorted({tuple(line.said[name] for name in of) for line in look.matching(query)}):
        for line in look.run(Query(query.files, {**query.where, **dict(zip(of, group, strict=True))})):
            found[(*group, *(line.said[name] for name in at))] = line
    return [found[place] for place in sorted(found)]


def decoded(look: Lookup) -> list[Line]:
    """Layers of each config and kind."""
    found = timed(look, DECODE, ("config", "kind"), ("sequences", "context"))
    if not found:
        look.newest(DECODE)  # says what there is no line of
    return found


def beside(look: Lookup, said: dict[str, Any]) -> Peer | None:
    """Another engine's layer at the same point of the same GPU."""
    at = said["config"], said["context"]
    return LAYERS.get((short(look.device), said["kind"], said["sequences"])) if at == LAYERS_AT else None


def decode_rows(look: Lookup) -> Iterator[Row]:
    for line in decoded(look):
        said = dict(line.said)
        at = f"{said['config'].capitalize()} {said['kind']}", f"{said['sequences']:,}", f"{said['context']:,}"
        us, floor, rest = said["layer_us"], said["floor_us"], said["rest_bytes"] / said["copy_gb_s"] / 1e3
        figures = number(us), number(floor), f"{floor / us:.0%}", peer(beside(look, said)), f"{said['launches']:.0f}"
        look.used.append(line)
        yield *at, *figures, number(said["rest_us"]), number(rest), number(said.get("host_us"))


def milliseconds(us: float) -> str:
    return number(us / 1e3)


def prefill_rows(look: Lookup) -> Iterator[Row]:
    for line in timed(look, PREFILL, ("config", "kind"), ("tokens", "behind")):
        said, tokens = line.said, line.said["tokens"]
        us, floor = said["layer_us"], said["floor_us"]
        known = CHUNKS.get((short(look.device), tokens)) if (said["config"], said["behind"]) == ("flash", 0) else None
        look.used.append(line)
        yield (
            f"{said['config'].capitalize()} {said['kind']}", f"{tokens:,}", f"{said['behind']:,}", milliseconds(us),
            milliseconds(floor), f"{floor / us:.0%}", peer(known), number(said["flop"] / us / 1e6),
            milliseconds(said["rest_us"]), milliseconds(said["host_us"]),
        )  # fmt: skip


def whole_rows(look: Lookup) -> Iterator[Row]:
    for what, at in (("decode", ("sequences", "context")), ("prefill", ("tokens", "behind"))):
        for line in timed(look, _WHOLE[what], ("config",), at):
            said = line.said
            few, many = (f"{said[name]:,}" for name in at)
            point = f"{few} sequences behind {many}" if what == "decode" else f"{few} of a prompt behind {many}"
            kinds = {kind: f"{kind} as {other}" for kind, other in said["priced_as"].items()}
            layers = " + ".join(f"{count} {kinds.get(kind, kind)}" for kind, count in said["of_layers"].items())
            look.used.append(line)
            step, floor = said["step_us"], said["floor_us"]
            figures = milliseconds(step), milliseconds(floor), f"{floor / step:.0%}", number(said["tokens_per_s"])
            yield said["config"].capitalize(), point, layers, *figures


def embedded(look: Lookup, draft: int, graphs: bool) -> float | None:
    """Tokens a second of one request."""
    where = {"what": "embedded model, one request after another", "draft": draft, "graphs": graphs}
    line = look.newest(Query(("*",), where))
    return line.said["tokens_per_s"] if line else None


def embedded_rows(look: Lookup) -> Iterator[Row]:
    for draft in (0, 2):
        yield f"{draft}", *(number(embedded(look, draft, graphs)) for graphs in (True, False))


# --- ops -------------------------------------------------------------------------------------------------------------

_ROWS: Final = (
    ("RoPE of 64 (Pro 128) heads", "rope", "{}"),
    ("query heads: norm and RoPE", "q_norm_rope", "{}"),
    ("RMS norm + FP8", "rms_norm_quant", "fp8 {}"),
    ("RMS norm + MXFP4", "rms_norm_quant", "mxfp4 {}"),
    ("RMS norm + NVFP4 by row", "rms_norm_quant", "nvfp4 by row {}"),
    ("SwiGLU + FP8", "swiglu_quant", "{} fp8"),
    ("SwiGLU + MXFP4", "swiglu_quant", "{} mxfp4"),
    ("SwiGLU + NVFP4 by row", "swiglu_quant", "{} nvfp4 by row"),
    ("norm, RoPE, FP8 row into the cache", "write_kv", "{}"),
    ("mHC, the way back", "mhc_post", "{}"),
    ("mHC, way back to quantised input", "mhc_post_pre_norm_quant", "{} fp8"),
)


def row_rows(look: Lookup) -> Iterator[Row]:
    for name, op, case in _ROWS:
        shapes = [case.format(shape) for shape in _SHAPES if op != "write_kv" or shape == "flash"]
        one = [number(look.us(op, f"{shape} 1")) for shape in shapes]
        many = [f(op, f"{shape} 8192") for shape in shapes for f in (look.us, look.floor)]
        blank = [""] * (len(_SHAPES) - len(shapes))
        peers = [peer(found) for n in ("1", "8192") if (found := PEERS.get((op, n)))]
        yield name, *one, *blank, *map(number, many), *blank, *blank, peers[0] if peers else NONE


_STORED, _GROUPED, _REFERENCE = "scaled_matmul", "grouped_scaled_matmul", "grouped_linear"
_NAMES: Final = ("wq_b", "wo_b", "shared w1 w3", "shared w2", "wq_a wkv")
_MATRICES: Final = (
    *((f"Flash {name}", _STORED, f"flash {name}") for name in _NAMES),
    ("Flash wo_a, by groups", _GROUPED, "flash wo_a"),
    ("the same, BF16 products", _REFERENCE, "flash wo_a"),
    *((f"Pro {name}", _STORED, f"pro {name}") for name in _NAMES),
    ("Pro wo_a, by groups", _GROUPED, "pro wo_a"),
)


def speed(look: Lookup, op: str, case: str, name: str | None = None) -> float | None:
    """TFLOP a second."""
    line = look.timed(op, case, name)
    return line.said.get("TFLOP_per_s") if line else None


def matrix_rows(look: Lookup) -> Iterator[Row]:
    for name, op, case in _MATRICES:
        nbytes = look.counted(op, f"{case} 1", "bytes")
        few = [number(look.us(op, f"{case} {n}")) for n in (1, 16)]
        floor, many = number(look.floor(op, f"{case} 1")), f"{case} 8192"
        library = op == _STORED
        us = both(look.us(op, many), look.us(op, many, "cublaslt") if library else None)
        rate = both(speed(look, op, many), speed(look, op, many, "cublaslt") if library else None)
        yield name, number(nbytes and nbytes / 1e6), few[0], floor, few[1], us, rate


_INPUTS: Final = (("with an indexer (CSA)", "{} inputs of 4"), ("without (HCA)", "{} inputs of 128"))


def input_rows(look: Lookup) -> Iterator[Row]:
    for shape in _SHAPES:
        for name, case in _INPUTS:
            label = f"{case.format(shape)} "
            figures = [f("shared_input", label + n) for n in ("1", "8") for f in (look.us, look.floor)]
            yield f"{shape.capitalize()} {name}", *map(number, figures)


def expert_rows(look: Lookup) -> Iterator[Row]:
    for name, case in (("MXFP4", "flash"), ("FP8", "flash fp8")):
        for n in ("1", "64", "8192"):
            label = f"{case} {n}"
            compared = PEERS.get(("stored_moe", n)) if name == "MXFP4" else None
            figures = number(look.us("stored_moe", label)), number(look.floor("stored_moe", label)), peer(compared)
            yield name, f"{int(n):,}", *figures


_ENDS: Final = (
    ("compressor of 4", "compress_kv", "ending of 4, {}", "no end of 4, {}"),
    ("compressor of 128", "compress_kv", "ending of 128, {}", "no end of 128, {}"),
    ("index keys", "compress_keys", "ending of 4, fp4, {}", "no end of 4, fp4, {}"),
)
_CONTEXT: Final = (
    ("index queries", "index_queries", "fp4 flash {}"),
    ("index logits, FP4, 2,048 keys (8K of context)", "index_logits", "fp4 2048 keys {}"),
    ("index logits, FP4, 262,144 keys (1M)", "index_logits", "fp4 262144 keys {}"),
    ("index logits, FP8, 262,144 keys", "index_logits", "fp8 262144 keys {}"),
    ("the 512 best of 8,192", "select_rows", "flash, 8192 keys {}"),
    ("the 512 best of 262,144", "select_rows", "flash, 262144 keys {}"),
    ("attention, window and 512 rows (CSA)", "attend", "flash csa {}"),
    ("attention, window and 64 rows (HCA, 8K)", "attend", "flash hca 8k {}"),
    ("attention, window and 8,192 rows (HCA, 1M)", "attend", "flash hca 1m {}"),
)


def context_rows(look: Lookup) -> Iterator[Row]:
    for name, op, ending, other in _ENDS:
        us = [both(look.us(op, ending.format(n)), look.us(op, other.format(n))) for n in (1, 64)]
        yield f"{name}, a block ends (or none)", *us, number(look.floor(op, ending.format(64))), NONE
    for name, op, case in _CONTEXT:
        us = [number(look.us(op, case.format(n))) for n in (1, 64)]
        known = PEERS.get((op, "262144")) if "262144" in case else None
        yield name, *us, number(look.floor(op, case.format(64))), peer(known)
    yield "the router", number(look.us("route", "flash 1")), "", "", NONE


def head_rows(look: Lookup) -> Iterator[Row]:
    for shape in _SHAPES:
        for n in (1, 16, 64):
            us, floor = (f("head", f"{shape} {n}, 1 best") for f in (look.us, look.floor))
            yield shape.capitalize(), f"{n}", number(us), number(floor)


PEERED: Final = Query(("*-peers*",), {"what": "peers"})


def peer_rows(look: Lookup) -> Iterator[Row]:
    """What each peer's newest run has; a case that failed there has no line."""
    for name in sorted({line.said["peer"] for line in look.matching(PEERED)}):
        lines = look.run(Query(PEERED.files, {**PEERED.where, "peer": name}))
        for line in (line for line in lines if "failed" not in line.said):
            said = line.said
            look.used.append(line)
            ours, theirs = said["ours_microseconds"], said["theirs_microseconds"]
            figures = number(ours), number(theirs), f"{theirs / ours:.2f}"
            yield f"{name} ({said['form']})" if said["form"] else name, said["case"], *figures


# --- what is shown ---------------------------------------------------------------------------------------------------

_TWO: Final = ("op", "1 token of Flash", "Pro", "8,192 tokens of Flash", "floor", "Pro", "floor", "best public figure")
KINDS: Final = (
    Kind(
        "A decoded token, layers of full width",
        (
            "layer",
            "sequences",
            "context",
            "µs",
            "floor",
            "share",
            "a peer",
            "launches",
            "rest of a step",
            "its floor",
            "host",
        ),
        decode_rows,
        "What one layer more costs a step, with random weights (`dsv4 bench decode`). *Launches*: kernels of it. "
        "*Share*: of the time that is its bytes' alone. *Host*: what Python needs to launch a step. The rest of a step "
        "is head, embedding, places and, where the host was timed, sampling.",
    ),
    Kind(
        "A chunk of a prompt, layers of full width",
        ("layer", "tokens", "behind", "ms", "floor", "share", "a peer", "TFLOP/s", "rest of a step", "host"),
        prefill_rows,
        "Milliseconds of one layer more, eager, with random weights (`dsv4 bench prefill`). *Floor*: the larger of "
        "what the bytes take to be copied and the products at the peak of FP8 in the same run.",
        later=True,
    ),
    Kind(
        "All layers, added up",
        ("model", "step", "layers", "ms", "floor", "share", "tokens/s"),
        whole_rows,
        "As if the model fitted on the one GPU: as many layers of each kind as it has, and the rest of a step. Added "
        "up from measured layers, not measured.",
        later=True,
    ),
    Kind(
        "The embedded model",
        ("guessed tokens", "tokens/s, a step one graph", "without graphs"),
        embedded_rows,
        "One request after another.",
    ),
    Kind("Norms, rows, residuals", _TWO, row_rows, ""),
    Kind(
        "FP8 matrices",
        ("matrix", "MB", "1 token", "floor", "16 tokens", "8,192 tokens", "TFLOP/s"),
        matrix_rows,
        "E4M3, a scale for 128 x 128; a row's bits are the same in any company. In brackets cuBLASLt's product alone. "
        "*BF16 products*: of FP8 weights, which is the reference's meaning of wo_a.",
    ),
    Kind(
        "Matrices that share an attention's input",
        ("inputs of a layer", "1 token", "floor", "8 tokens", "floor"),
        input_rows,
        "Dense and stored ones in one launch.",
    ),
    Kind(
        "Experts of a layer of Flash",
        ("format", "tokens", "µs", "floor", "a peer"),
        expert_rows,
        "The shared one among them; the peer's are the routed ones alone.",
    ),
    Kind(
        "The context's side of a layer of Flash",
        ("op", "1 sequence", "64", "floor of 64", "best public figure"),
        context_rows,
        "One token of each. `python -m bench.context_curves` draws these against context and sequences.",
    ),
    Kind(
        "The head",
        ("model", "tokens", "µs", "floor"),
        head_rows,
        "129,280 rows of BF16 and the best of them. (A sum over so much is read faster than it is copied.)",
    ),
    Kind(
        "Another engine's kernels in the same run",
        ("peer", "case", "ours", "theirs", "theirs / ours"),
        peer_rows,
        "The same bytes and arguments (`python -m bench.peers`). *Planned*: FlashMLA's plan of its work made before, "
        "as for all layers of a kind; *rows decoded*: on rows that are BF16 already.",
    ),
)


def markdown(head: Row, rows: Sequence[Row]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def copies(used: Sequence[Line]) -> str:
    """GB/s of a copy in these runs, the floors' measure."""
    keys = "copy_GB_per_s", "copy_gb_s"
    found = sorted({round(line.said[key]) for line in used for key in keys if key in line.said})
    return f" that copied {' to '.join(dict.fromkeys((f'{found[0]:,}', f'{found[-1]:,}')))} GB/s" if found else ""


def table(kind: Kind, look: Lookup) -> str:
    """With where it is from; nothing where a device has no figure of it."""
    look.used.clear()
    rows, known = [], 0
    for row in kind.rows(look):
        if len(look.used) > known:  # else all that it has is another engine's
            rows.append(row)
        known = len(look.used)
    if not rows:
        return ""
    where = f"On an {short(look.device)}{copies(look.used)}: {sources(look.used)}."
    return "\n\n".join(
        filter(None, (f"### {kind.title}", wrapped(kind.said), markdown(kind.head, rows), wrapped(where)))
    )


def wrapped(text: str, indent: str = "") -> str:
    return fill(text, 120, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
