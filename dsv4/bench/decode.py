"""A decode step of layers of full width on a GPU: time against context and sequences, beside that of its bytes.

Weights are random ones in the official formats, drawn on the GPU (`checkpoint.synth`), so what is measured is speed and
memory and nothing else. A model of one kind of layer is timed with two numbers of them: what one more costs is a layer,
and what remains is the rest of a step, head and embedding. Steps are those of the engine (`engine/graphs.py`): one CUDA
graph, with all that depends on positions inside. No block of a compressor ends in the step, as in three of four (of a
ratio of 4) or 127 of 128.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from statistics import mean
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from dsv4 import kernels
from dsv4.bench import ops
from dsv4.bench.clock import Timing, copy_bandwidth, in_stream
from dsv4.cache.paged import Paged
from dsv4.cache.store import Store
from dsv4.cache.stored import StoredLayer
from dsv4.checkpoint.names import parameters
from dsv4.checkpoint.reads import INDEXED, Point, head_bytes, layer_bytes
from dsv4.checkpoint.synth import RandomWeights
from dsv4.config import EngineOptions, ModelConfig
from dsv4.engine.graphs import Graphs, Shape
from dsv4.errors import ConfigError
from dsv4.model.batch import Segment
from dsv4.model.model import Model
from dsv4.ops.op import use
from dsv4.taps import listening

LAYERS: Final = {"CSA": INDEXED, "HCA": 128}  # tokens of an entry
_IN_A_ROW: Final = 8  # steps of a sample: the host is ahead of the GPU, as in an engine
_DRAWN: Final = 1 << 14  # rows of a cache drawn at once; further ones are the same again


class Step(NamedTuple):
    """A step of some layers of one kind: what it takes, how many launches it is, and the bytes that it must read."""

    kind: str
    layers: int
    point: Point
    timing: Timing
    launches: int
    nbytes: int
    head: int  # of them, those that belong to no layer


class Layer(NamedTuple):
    """Of one layer, and of what a step has beside its layers. Seconds, and bytes that must be read."""

    kind: str
    point: Point
    seconds: float
    rest: float
    nbytes: int
    rest_bytes: int
    launches: float


def steps(
    config: ModelConfig, kind: str, counts: Sequence[int], points: Sequence[Point], samples: int
) -> Iterator[Step]:
    """Times of models of layers of one kind, of each of the counts."""
    device = torch.device("cuda", torch.cuda.current_device())
    most = max(counts)
    own = replace(config.shortened(most), compress_ratios=(LAYERS[kind],) * most, num_hash_layers=0)
    kernels.install()
    options = EngineOptions(
        device=str(device), stored=True, kernels="auto", prefill_chunk=1, reuse_points=0, draft_slack=0
    )
    with use(options.choices):
        model = Model(own, RandomWeights(own, 0, device), options)
        blocks = model.blocks
        for point in points:
            sized = replace(options, max_context=point.context, max_sequences=point.sequences)
            for count in counts:
                model.blocks = blocks[:count]
                yield _step(model, own, kind, point, sized, samples)


def _step(model: Model, config: ModelConfig, kind: str, point: Point, options: EngineOptions, samples: int) -> Step:
    count = len(model.blocks)
    store = Store(config.shortened(count), options)
    for layer in store.layers:
        assert isinstance(layer, StoredLayer)
        _fill(layer)
    segments = [Segment(slot, point.context - 2, [slot + 1]) for slot in range(point.sequences)]
    graphs = Graphs(model, store)
    shape = graphs.shape(segments)
    assert shape is not None
    touched: list[int] = []
    with listening(lambda name, _, x: touched.append(len(x.unique())) if name == "experts" else None):
        graphs.run(segments, shape)
    graphs.run(segments, shape)
    timing = in_stream([partial(graphs.run, segments, shape)] * _IN_A_ROW, samples)
    launches = _launches(graphs, segments, shape)
    last = f"layers.{config.num_hidden_layers - 1}."
    own = [param for param in parameters(config) if param.name.startswith(last)]
    layers = count * layer_bytes(config, own, LAYERS[kind], mean(touched), point)
    head = head_bytes(parameters(config))
    del graphs, store
    gc.collect()
    torch.cuda.empty_cache()
    return Step(kind, count, point, timing, launches, round(layers) + head, head)


def _launches(graphs: Graphs, segments: Sequence[Segment], shape: Shape) -> int:
    """Kernels of one replay."""
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        graphs.run(segments, shape)
        torch.cuda.synchronize()
    return sum(event.count for event in seen.key_averages() if event.self_device_time_total and "Mem" not in event.key)


def _fill(layer: StoredLayer) -> None:
    """Numbers of the size of real ones: scores of zeros would all be equal."""
    for paged, width in (
        (layer.near, layer.layout.width),
        (layer.far, layer.layout.width),
        (layer.keys, layer.layout.key_width),
    ):
        if paged is not None:
            _draw(paged, width)
    for tail in (layer.tail, layer.key_tail):
        tail.normal_()


def _draw(paged: Paged[Any], width: int) -> None:
    device = paged.pages.device
    total = len(paged.pages) * paged.layout.page_rows(paged.pages.shape[1])
    values: Tensor = torch.cat(paged.layout.encode(torch.randn(min(total, _DRAWN), width, device=device).bfloat16()), 1)
    for start in range(0, total, len(values)):
        rows = torch.arange(start, min(total, start + len(values)), device=device)
        paged[rows] = values[: len(rows)]


def layers(found: Iterable[Step]) -> list[Layer]:
    """What one layer more costs, at each point."""
    by: dict[tuple[str, Point], list[Step]] = {}
    for step in found:
        by.setdefault((step.kind, step.point), []).append(step)
    made = []
    for (kind, point), pair in by.items():
        few, many = sorted(pair, key=lambda step: step.layers)[:: len(pair) - 1]
        more = many.layers - few.layers
        each = (many.timing.seconds - few.timing.seconds) / more
        rest = few.timing.seconds - few.layers * each
        launches = (many.launches - few.launches) / more
        made.append(Layer(kind, point, each, rest, (many.nbytes - few.nbytes) // more, few.head, launches))
    return made


def line(of: Layer, copied: float) -> dict[str, Any]:
    """A line of a file of results. copied: bytes a second, as `circumstances` has found."""
    return {
        "what": "decode layer", "kind": of.kind, "sequences": of.point.sequences, "context": of.point.context,
        "layer_us": round(1e6 * of.seconds, 2), "rest_us": round(1e6 * of.rest, 1), "launches": of.launches,
        "bytes": of.nbytes, "rest_bytes": of.rest_bytes, "floor_us": round(1e6 * of.nbytes / copied, 2),
        "copy_gb_s": round(copied / 1e9, 1),
    }  # fmt: skip


def circumstances(found: Sequence[Step]) -> tuple[dict[str, Any], float]:
    """Where and with which numbers of layers it was measured, and the bytes a second of a copy there."""
    device = torch.device("cuda", torch.cuda.current_device())
    counts = sorted({step.layers for step in found})
    return {**ops.circumstances(device), "layers": counts, "weights": "random"}, copy_bandwidth(device)


def points(contexts: Sequence[int], sequences: Sequence[int], at: int) -> list[Point]:
    """A token behind each of the contexts, and as many sequences as these behind `at` tokens."""
    return sorted({Point(1, context) for context in contexts} | {Point(count, at) for count in sequences})


def check_fits(config: ModelConfig, counts: Sequence[int]) -> None:
    """ConfigError where the weights are more than the GPU has."""
    if not torch.cuda.is_available():
        raise ConfigError("dsv4 bench decode", got="no GPU that torch sees", wanted="an H100 or H200")
    layer = max(config.num_hidden_layers - 1, 0)
    each = sum(param.nbytes for param in parameters(config) if param.name.startswith(f"layers.{layer}."))
    free = torch.cuda.mem_get_info()[0]
    if each * (max(counts) + 2) > free:
        got = f"{max(counts)} layers of {each / 1e9:.1f} GB"
        raise ConfigError("--layers", got=got, wanted=f"room in {free / 1e9:.0f} GB", do="name fewer layers")
