"""Kernels of another engine beside ours, on the same arguments: `python -m bench.peers --folder PEERS [--out FILE]`.

PEERS holds a wheel of vLLM for this Python and torch, unpacked, or of it these alone:

    _flashmla_C.abi3.so   FlashMLA: attention over picked rows of FP8 (decode), and of BF16 (prefill)
    deep_gemm/            DeepGEMM, with its headers: products of FP8 blocks; it compiles with nvcc at the first call
    vllm-*.dist-info/     says which version it is

Both sides run in CUDA graphs over copies of their arguments, as many as overflow the second cache twice by what a call
reads of them. Scales, row numbers and tensors are in the peer's layout before the clock starts, and its results are
compared with ours: our cache rows are FlashMLA's, byte for byte. Angles are zero, for `attend` turns its values back
and FlashMLA does not. Each peer runs in a process of its own: what goes wrong there is told, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from dsv4.bench.clock import Call, Timing, in_graph, on_cpu
from dsv4.bench.ops import FEW, circumstances, l2_cache, moved
from dsv4.check.cases import attend as rows
from dsv4.check.cases import linear as products
from dsv4.check.cases import select
from dsv4.check.cases.inputs import BF16
from dsv4.check.contract import Arguments, Case, placed
from dsv4.check.fences import transform
from dsv4.check.metrics import METRICS, leaves
from dsv4.check.verify import device_for, prepare
from dsv4.errors import ConfigError, DSV4Error
from dsv4.ops.attention import attend
from dsv4.ops.linear import scaled_matmul
from dsv4.ops.op import use
from dsv4.ops.rope import Rotation
from dsv4.quant.e8m0 import ue8m0_decode
from dsv4.quant.tensor import QTensor

WHAT: Final = "peers"
HEADS: Final = {"flash": rows.FLASH, "pro": rows.PRO}
CHUNK: Final = 4096  # tokens of a prefill
AMONG: Final = 4  # times as many entries as are picked
MATRICES: Final = tuple(name for name in products.SHAPES if name.startswith("flash"))
NEAR: Final = 1e-4  # 1 - cos; both sides round probabilities to BF16
_MOST_COPIES: Final = 256
_CALLS: Final = {True: 64, False: 8}  # of a graph, at least: of few tokens, and of more

Forms = Mapping[str, Call]  # ways to call a peer's kernel on one set of arguments


class Peer(NamedTuple):
    """load: its kernel out of the folder. bind: kernel and our arguments -> its calls, which return what ours does."""

    name: str
    load: Callable[[Path], Any]
    bind: Callable[..., Forms]
    cases: Callable[[], Iterator[Case]]


# --- FlashMLA --------------------------------------------------------------------------------------------------------


def flashmla(kernel: str, folder: Path) -> Any:
    torch.ops.load_library(str(found(folder, "_flashmla_C*.so")))
    return getattr(torch.ops._flashmla_C, kernel)


def decode(
    kernel: Any, q: Tensor, near: Tensor, near_rows: Tensor, far: Tensor, far_rows: Tensor, sink: Tensor, turn: Rotation
) -> Forms:
    """Layers of a kind share a plan of the blocks' work, which the first of them has made by a kernel of its own."""
    first = q.unsqueeze(1), pages(near), numbers(near_rows), lengths(near_rows), sink
    last = pages(far), numbers(far_rows), lengths(far_rows), q.shape[-1], q.shape[-1] ** -0.5, None

    def call(plan: Sequence[Tensor | None]) -> Any:
        return kernel(*first, *plan, *last)[0].squeeze(1)

    plan = kernel(*first, None, None, *last)[2:]
    return {"planned": partial(call, plan), "and plans": partial(call, (None, None))}


def prefill(
    kernel: Any, q: Tensor, near: Tensor, near_rows: Tensor, far: Tensor, far_rows: Tensor, sink: Tensor, turn: Rotation
) -> Forms:
    """Over rows that are BF16, those of both pools one behind another."""
    listed = numbers(torch.cat((near_rows, far_rows + len(near)), 1))
    given = (
        q,
        torch.cat((near, far)).unsqueeze(1),
        listed,
        q.shape[-1] ** -0.5,
        q.shape[-1],
        sink,
        lengths(listed[:, 0]),
    )
    return {"rows decoded": lambda: kernel(*given, None)[0]}


def pages(stored: Tensor) -> Tensor:
    """[pages, rows, 1, 584]: a place that is as long as a row with its scales, though these lie behind all rows."""
    count, width = rows.ROW.page_rows(stored.shape[1]), sum(rows.ROW.sizes)
    return stored[:, : count * width].unflatten(1, (count, 1, width))


def numbers(listed: Tensor) -> Tensor:
    return listed.int().unsqueeze(1)


def lengths(listed: Tensor) -> Tensor:
    return torch.full((len(listed),), listed.shape[1], dtype=torch.int32, device=listed.device)


def attention(tokens: Sequence[int], make: Callable[[int, int, int], Arguments]) -> Iterator[Case]:
    for model, heads in HEADS.items():
        for n in tokens:
            picked = select.PICKED[model]
            name = f"{model} CSA, {heads} heads, {rows.WINDOW} + {picked} rows, {n}"
            made = partial(make, n, heads, picked)
            yield Case(op=attend, name=name, make=made, tokens=(0, 2, 4, 6), moved=rows.moved)


def steps(tokens: int, heads: int, picked: int) -> Arguments:
    """A token of each of so many sequences."""
    return *rows.given(tokens, heads, rows.WINDOW, picked, among=AMONG)[:6], unturned(tokens)


def chunk(tokens: int, heads: int, picked: int) -> Arguments:
    """Of one sequence, whose rows were decoded before: that is timed on neither side."""
    return *rows.decoding(partial(rows.prompt, tokens, heads, picked))()[:6], unturned(tokens)


def unturned(tokens: int) -> Rotation:
    return Rotation(torch.ones(tokens, rows.ROW.rope_dims), torch.zeros(tokens, rows.ROW.rope_dims))


# --- DeepGEMM --------------------------------------------------------------------------------------------------------


def deepgemm(folder: Path) -> Any:
    sys.path.insert(0, str(found(folder, "deep_gemm/__init__.py").parent.parent))
    return importlib.import_module("deep_gemm").fp8_gemm_nt


def product(kernel: Any, x: QTensor, weight: QTensor, dtype: torch.dtype) -> Forms:
    """Scales as FP32, those of tokens column by column at multiples of 16 bytes: else it would lay them out itself."""
    left, right = (x.data, columns(ue8m0_decode(x.scale))), (weight.data, ue8m0_decode(weight.scale))

    def call() -> Tensor:
        y = torch.empty(len(x), len(weight), dtype=dtype, device=x.device)
        kernel(left, right, y)
        return y

    return {"": call}


def columns(scale: Tensor) -> Tensor:
    """[T, n] with a stride of 1 from token to token, and of a multiple of 4 from column to column."""
    count = len(scale)
    wide = scale.new_zeros(scale.shape[1], -(-count // 4) * 4)
    wide[:, :count] = scale.t()
    return wide[:, :count].t()


def matrices(tokens: Sequence[int]) -> Iterator[Case]:
    for label in MATRICES:
        for n in tokens:
            make = partial(products._given, n, *products.SHAPES[label], BF16)
            yield Case(op=scaled_matmul, name=f"{label} {n}", make=make, tokens=(0,))


PEERS: Final = {
    peer.name: peer
    for peer in (
        Peer("FlashMLA decode", partial(flashmla, "sparse_decode_fwd"), decode, partial(attention, (1, 64), steps)),
        Peer("FlashMLA prefill", partial(flashmla, "sparse_prefill_fwd"), prefill, partial(attention, (CHUNK,), chunk)),
        Peer("DeepGEMM", deepgemm, product, partial(matrices, (1, 64, CHUNK))),
    )
}


# --- what is timed and told ------------------------------------------------------------------------------------------


def found(folder: Path, pattern: str) -> Path:
    """The first of this name. ConfigError if there is none."""
    paths = sorted(folder.rglob(pattern))
    if not paths:
        raise ConfigError(f"--folder {folder}", got=f"no {pattern}", do="unpack a wheel of vLLM there")
    return paths[0]


def compared(peer: Peer, folder: Path, device: torch.device, samples: int) -> Iterator[dict[str, Any]]:
    """A line for each form of each case; where the peer fails, one that says how, and the next case is tried."""
    kernel: Any = None
    for case in peer.cases():
        line = {"what": WHAT, "peer": peer.name, "op": case.op.name, "case": case.name}
        try:
            kernel = kernel or peer.load(folder)
            for told in against(peer, kernel, case, device, samples):
                yield line | told
        except Exception as error:  # of whatever kind a peer's is
            words = str(error).partition("\n")[0]
            yield line | {"failed": f"{type(error).__name__}: {words}", "signature": kernel and signature(kernel)}
        if device.type == "cuda":
            torch.cuda.empty_cache()


def against(peer: Peer, kernel: Any, case: Case, device: torch.device, samples: int) -> Iterator[dict[str, Any]]:
    given = placed(case.make(), device)
    with torch.no_grad(), use("auto"):
        ours = case.op(*given)
        sets = copies(given, moved(case, given, ours), device)
        few = len(given[0]) <= FEW
        timing = timed([partial(case.op, *one) for one in sets], few, device, samples)
        bound = [peer.bind(kernel, *one) for one in sets]
        for form in bound[0]:
            off = angle(bound[0][form](), ours)
            theirs = timed([one[form] for one in bound], few, device, samples)
            yield {"form": form, "sets": len(sets), **told("ours", timing), **told("theirs", theirs), "1 - cos": off}


def copies(given: Arguments, nbytes: int, device: torch.device) -> list[Arguments]:
    """The arguments, as often as it takes to overflow the second cache twice, of which a call moves so many bytes."""
    count = -(-2 * l2_cache(device) // nbytes) if device.type == "cuda" else 1
    return [given, *(transform(given, torch.clone) for _ in range(min(_MOST_COPIES, count) - 1))]


def timed(calls: list[Call], few: bool, device: torch.device, samples: int) -> Timing:
    if device.type != "cuda":
        return on_cpu(calls, samples)
    return in_graph(calls * -(-_CALLS[few] // len(calls)), samples)


def told(side: str, timing: Timing) -> dict[str, Any]:
    middle, *spread = (round(1e6 * seconds, 3) for seconds in timing[:3])
    return {f"{side}_microseconds": middle, f"{side}_spread": spread}


def angle(theirs: Tensor, ours: Tensor) -> float:
    """1 - cos of it."""
    (one,), (other,) = leaves(theirs).values(), leaves(ours).values()
    return METRICS["cos"](one, other)


def signature(kernel: Any) -> str:
    """The arguments that it takes, by its own account."""
    if not hasattr(kernel, "overloads"):
        return str(kernel.__doc__)
    return "; ".join(str(getattr(kernel, name)._schema) for name in kernel.overloads())


def wrong(line: Mapping[str, Any]) -> str:
    """Why a line is no comparison, or nothing."""
    if "failed" in line:
        return f"{line['failed']}" + (f" ({line['signature']})" if line["signature"] else "")
    return "" if line["1 - cos"] <= NEAR else f"its result is another one: 1 - cos is {line['1 - cos']:.1e}"


def table(lines: Sequence[Mapping[str, Any]]) -> Table:
    shown = Table("peer", "form", "case")
    for title in ("ours µs", "theirs µs", "theirs / ours", "1 - cos"):
        shown.add_column(title, justify="right")
    for line in lines:
        if "failed" not in line:
            ours, theirs = line["ours_microseconds"], line["theirs_microseconds"]
            figures = f"{ours:.2f}", f"{theirs:.2f}", f"{theirs / ours:.2f}", f"{line['1 - cos']:.1e}"
            shown.add_row(line["peer"], line["form"], line["case"], *figures)
    return shown


def apart(name: str, folder: Path, samples: int) -> list[dict[str, Any]]:
    """All lines of a peer, in a process that knows nothing yet."""
    prepare()
    return list(compared(PEERS[name], folder, device_for("cuda"), samples))


def measured(names: Sequence[str], folder: Path, samples: int) -> Iterator[dict[str, Any]]:
    for name in names:
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            try:
                yield from pool.submit(apart, name, folder, samples).result()
            except BrokenProcessPool:
                yield {"what": WHAT, "peer": name, "case": "", "failed": "its process has died", "signature": None}


def run(asked: argparse.Namespace) -> int:
    """The exit code: 1 if something is wrong with a line."""
    device = device_for("cuda")
    if not asked.folder.is_dir():
        raise ConfigError("--folder", got=asked.folder, wanted="a folder with the peers' files")
    version = next((path.name for path in sorted(asked.folder.rglob("*.dist-info"))), None)
    shared = {"version": version, **circumstances(device)}
    lines = [{**line, **shared} for line in measured(asked.only or list(PEERS), asked.folder, asked.samples)]
    if asked.out:
        with asked.out.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
    Console(highlight=False, width=160).print(table(lines))
    bad = [f"{line['peer']}, {line['case']}: {why}" for line in lines if (why := wrong(line))]
    print("\n".join([f"on {shared['device']}, {version}", *bad]))
    return 1 if bad else 0


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--folder", type=Path, required=True, help="with the peers' files")
    parser.add_argument("--only", nargs="+", choices=PEERS, help="these peers")
    parser.add_argument("--samples", type=int, default=10, help="how often each is measured")
    parser.add_argument("--out", type=Path, help="append the lines to this file")
    try:
        raise SystemExit(run(parser.parse_args(arguments)))
    except DSV4Error as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
