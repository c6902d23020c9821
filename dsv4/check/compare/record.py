"""One text through one model, and everything that its ops gave, by layer and name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from dsv4.cache.store import Store
from dsv4.check.compare.way import Way
from dsv4.check.study.formats import Peaks
from dsv4.check.study.study import Subject
from dsv4.model.batch import Segment
from dsv4.ops.compress import OVERLAPPED
from dsv4.ops.index import entry_rows, index_scores
from dsv4.ops.op import Op, use, watching
from dsv4.ops.step import block_rows, rotations, window_rows
from dsv4.quant.rounding import Numerics, none
from dsv4.quant.tensor import QTensor
from dsv4.taps import listening

# What follows from positions alone: rows lie elsewhere in a cache of another size.
_PLACES: Final = (block_rows, entry_rows, rotations, window_rows)
# Places that are rounded between ops. The others lie inside one, where rows may stand in another order.
_ALONE: Final = ("attn_input", "latent", "group_output", "attn_output")


class Part(NamedTuple):
    """What one step gave. `first`: position of its first row, None where rows are no tokens."""

    tensor: Tensor
    first: int | None


class Key(NamedTuple):
    """A result: the layer (the number of layers: the head), and op, weight and part."""

    layer: int
    name: str


@dataclass
class Recording:
    """Results in the order in which they first came, each with one part a step, on the CPU."""

    layers: int  # how many are looked at, from the first; the head is looked at in any case
    head: int  # the number of all layers
    batch: int
    tokens: int  # of the text
    names: Mapping[int, str]  # of weights, by identity
    found: dict[Key, list[Part]] = field(default_factory=dict)
    logits: Tensor = field(default_factory=lambda: torch.empty(0))
    step: tuple[int, int] = (0, 0)  # first position and number of tokens of the step that runs
    _layer: int = 0
    _times: Counter[tuple[int, str]] = field(default_factory=Counter)

    def tap(self, name: str, layer: int, tensor: Tensor) -> None:
        """Listens to `taps`: streams say which layer comes next."""
        if name == "streams":
            if layer < 0:
                self._times.clear()
            else:
                self._keep("streams", tensor)
            self._layer = layer + 1

    def op(self, one: Op[..., Any], ran: str, args: Sequence[Any], result: Any) -> None:
        """Listens to ops."""
        if one in _PLACES:
            return
        label = " ".join(filter(None, (one.name, _weight(args, self.names))))
        for part, tensor in _tensors(result):
            if not any(tensor is arg for arg in args):
                # What some steps leave out must not rename what follows: vectors of heads go by their shape.
                heads = "" if " " in label or tensor.dim() != 3 else f" {tensor.shape[1]}x{tensor.shape[2]}"
                self._keep(label + heads + part, self._seen(tensor) if one is index_scores else tensor)

    def _seen(self, scores: Tensor) -> Tensor:
        """Scores of the entries that a token may see. The others mean nothing; how many there are depends on cuts."""
        first, tokens = self.step
        positions = torch.arange(first, first + tokens, device=scores.device).repeat(len(scores) // tokens)
        entries = torch.arange(self.tokens // OVERLAPPED, device=scores.device)
        wide = pad(scores, (0, len(entries) - scores.shape[1]))
        return wide.masked_fill(entries >= ((positions + 1) // OVERLAPPED).unsqueeze(1), 0.0)

    def rounded(self, place: str, tensor: Tensor) -> None:
        """What a rounding gave."""
        self._keep(f"round {place}", tensor)

    def _keep(self, name: str, tensor: Tensor) -> None:
        if self._layer < self.layers or self._layer == self.head:
            self._times[self._layer, name] += 1
            count = self._times[self._layer, name]
            key = Key(self._layer, name if count == 1 else f"{name} ({count})")
            rows = len(tensor) if len(tensor) % self.batch else len(tensor) // self.batch
            first, tokens = self.step
            part = Part(tensor[:rows].detach().cpu().clone(), first if rows == tokens else None)
            self.found.setdefault(key, []).append(part)


def record(subject: Subject, way: Way, ids: Sequence[int], layers: int, peaks: Peaks) -> Recording:
    """Run `ids` through the model in one way. subject: its weights on the way's device."""
    found = Recording(layers, subject.config.num_hidden_layers, way.batch, len(ids), {})
    model = subject.model(lambda layer: _watched(way.run.numerics(layer, peaks), found), way.dtype)
    found.names = {id(part): name for block in model.blocks for name, part in _parts(block, "", 0)}
    if way.shaken:
        model.embedding = shaken(model.embedding)
    chunk = min(way.chunk or len(ids), len(ids))
    options = replace(subject.options, dtype=way.dtype, device=way.device, max_context=len(ids), cache_tokens=None)
    store = Store(subject.config, replace(options, max_sequences=way.batch, prefill_chunk=chunk))
    streams = []
    with ExitStack() as stack:
        for watch in (use(way.choices), watching(found.op), listening(found.tap)):
            stack.enter_context(watch)
        for start in range(0, len(ids), chunk):
            part = ids[start : start + chunk]
            found.step = (start, len(part))
            batch = model.batch([Segment(slot, start, part) for slot in range(way.batch)])
            streams.append(model(batch, store).streams[: len(part)])
            for slot in range(way.batch):
                store.advance(slot, len(part))
        found._times.clear()
        found.batch, found.step = 1, (0, len(ids))  # the head reads the first copy alone, all of it
        found.logits = model.logits(torch.cat(streams)).cpu()
    return found


def shaken(x: Tensor) -> Tensor:
    """x with every number but zero moved by one unit in its last place, up or down by a fixed draw."""
    bits = x.view(torch.int16 if x.dtype == torch.bfloat16 else torch.int32)
    moves = torch.randint(0, 2, x.shape, generator=torch.Generator().manual_seed(0)).to(x.device) * 2 - 1
    return torch.where(x == 0, bits, bits + moves.type(bits.dtype)).view(x.dtype)


def _watched(numerics: Numerics, found: Recording) -> Numerics:
    def wrap(place: str) -> Any:
        rounding = getattr(numerics, place)

        def looked_at(x: Tensor) -> Tensor:
            y: Tensor = rounding(x)
            found.rounded(place, y)
            return y

        return looked_at

    return replace(numerics, **{place: wrap(place) for place in _ALONE if getattr(numerics, place) is not none})


def _parts(thing: Any, name: str, depth: int) -> Iterator[tuple[str, Any]]:
    """Tensors and quantised matrices inside a layer, by the names of the attributes that lead to them."""
    if isinstance(thing, Tensor | QTensor):
        yield name, thing
    elif isinstance(thing, list):
        for number, inner in enumerate(thing):
            yield from _parts(inner, f"{name}.{number}", depth + 1)
    elif depth < 6:
        inside = thing._asdict() if hasattr(thing, "_asdict") else getattr(thing, "__dict__", {})
        for attribute, inner in inside.items():
            yield from _parts(inner, f"{name}.{attribute}".lstrip("."), depth + 1)


def _weight(args: Sequence[Any], names: Mapping[int, str]) -> str:
    """The name of the weight that an op was given: of the first argument that is one, or holds one."""
    for arg in args:
        for part in (arg, *(arg if isinstance(arg, tuple) else ())):
            if id(part) in names:
                return names[id(part)].removesuffix(".fn").removesuffix(".mixer").removesuffix(".weight")
    return ""


def _tensors(result: Any, part: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors of a result with the names of the parts of it that they are."""
    if isinstance(result, Tensor):
        if result.dim():
            yield part, result
    elif isinstance(result, QTensor):
        inside = {"data": result.data.view(torch.uint8), "scale": result.scale.view(torch.uint8)}
        if result.global_scale is not None:
            inside["global scale"] = result.global_scale.reshape(-1)
        for name, inner in inside.items():
            yield f"{part} {name}", inner
    elif isinstance(result, tuple):
        named = result._asdict() if hasattr(result, "_asdict") else dict(enumerate(result))
        for field_, inner in named.items():
            yield from _tensors(inner, f"{part} {field_}")
