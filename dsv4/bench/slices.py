"""Layers of full width with random weights, of one kind and so many at a time, and the time of their steps.

Weights are in the official formats and drawn on the device (`checkpoint.synth`), so what is measured is speed and
memory and nothing else. A model of one kind of layer is timed with two numbers of them: what one more costs is a
layer, and what remains is the rest of a step (`layers.py`). What a step is, `decode.py` and `prefill.py` say.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from statistics import mean
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from dsv4 import kernels
from dsv4.bench import ops
from dsv4.bench.clock import Call, Timing, copy_bandwidth, fp8_peak, in_turn, on_host
from dsv4.bench.layers import KINDS, At, Machine, Step
from dsv4.cache.layout import cache_bytes
from dsv4.cache.paged import Paged
from dsv4.cache.store import Store
from dsv4.cache.stored import StoredLayer
from dsv4.checkpoint.names import parameters
from dsv4.checkpoint.reads import head_bytes
from dsv4.checkpoint.synth import RandomWeights
from dsv4.config import EngineOptions, ModelConfig
from dsv4.errors import ConfigError
from dsv4.llm_workspace import workspace
from dsv4.model.model import Model
from dsv4.ops.op import use
from dsv4.taps import listening

_DRAWN: Final = 1 << 14  # rows of a cache drawn at once; further ones are the same again


class Sizes(NamedTuple):
    """Of a cache: the options of the engine."""

    max_context: int
    max_sequences: int
    prefill_chunk: int


class Bench(NamedTuple):
    """What is timed. what: its name in results and as a verb. sizes: of the cache for a point.

    in_a_row: steps of a sample, between which nothing is waited for. work: whether products count beside bytes.
    """

    what: str
    sizes: Callable[[Any], Sizes]
    made: Callable[[Model, Store, Any], Call]  # what runs a step
    counted: Callable[[Slice, float, Any], tuple[float, float]]  # bytes and FLOP of a layer, by experts in use
    in_a_row: int
    work: bool = False


class Seen(NamedTuple):
    """touched: routed experts in use, on average over layers. host: seconds until a step is launched."""

    touched: float
    timing: Timing
    host: float
    launches: int


def of_kind(config: ModelConfig, kind: str, count: int) -> ModelConfig:
    """So many layers of one kind; no hash layers, no draft. ConfigError where the model has not so many layers."""
    return replace(config.shortened(count), compress_ratios=(KINDS[kind],) * count, num_hash_layers=0)


def options(device: torch.device, sizes: Sizes) -> EngineOptions:
    """As the engine runs them where all ops are kernels, without room for a draft or for states to go on from."""
    return EngineOptions(
        device=str(device),
        stored=True,
        kernels="auto",
        reuse_points=0,
        draft_slack=0,
        **sizes._asdict(),
    )


class Slice:
    """Layers of one kind, of which the first so many run."""

    def __init__(self, config: ModelConfig, kind: str, most: int, device: torch.device) -> None:
        """Draws the weights. `most`: layers."""
        self.config, self.kind, self.device = of_kind(config, kind, most), kind, device
        last = f"layers.{most - 1}."
        self.own = [param for param in parameters(self.config) if param.name.startswith(last)]
        self.head = head_bytes(parameters(self.config))
        kernels.install()
        self._options = options(device, Sizes(1, 1, 1))
        with use(self._options.choices):
            self._model = Model(self.config, RandomWeights(self.config, 0, device), self._options)
        self._blocks = self._model.blocks

    def step(self, bench: Bench, count: int, at: At, samples: int) -> Step:
        """Time a step of the first `count` layers."""
        self._model.blocks = self._blocks[:count]
        store = Store(self.config.shortened(count), options(self.device, bench.sizes(at)))
        for layer in store.layers:
            assert isinstance(layer, StoredLayer)
            _fill(layer)
        with use(self._options.choices):
            seen = _seen(bench.made(self._model, store, at), self.device, samples, bench.in_a_row)
        nbytes, flop = bench.counted(self, seen.touched, at)
        nbytes = round(count * nbytes) + self.head
        return Step(self.kind, count, at, seen.timing, seen.host, seen.launches, nbytes, self.head, count * flop)


def steps(bench: Bench, of: Slice, counts: Sequence[int], points: Sequence[At], samples: int) -> Iterator[Step]:
    """Times with each of the counts at each of the points."""
    for at in points:
        for count in counts:
            yield of.step(bench, count, at, samples)
            gc.collect()
            if of.device.type == "cuda":
                torch.cuda.empty_cache()


def _seen(call: Call, device: torch.device, samples: int, in_a_row: int) -> Seen:
    touched: list[int] = []
    with listening(lambda name, _, x: touched.append(len(x.unique())) if name == "experts" else None):
        call()  # nothing is captured of a step the first time
    call()
    calls = [call] * in_a_row
    host = on_host(calls, device, samples)
    return Seen(mean(touched), in_turn(calls, device, samples), host, _launches(call, device))


def _launches(call: Call, device: torch.device) -> int:
    """Kernels of one step; on a CPU none."""
    if device.type == "cpu":
        return 0
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        call()
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


# --- where ------------------------------------------------------------------------------------------------------------


def machine(bench: Bench, device: torch.device) -> Machine:
    """What the floors are measured by, on this machine and now."""
    return Machine(copy_bandwidth(device), fp8_peak(device) if bench.work else 0.0)


def circumstances(found: Sequence[Step], device: torch.device) -> dict[str, Any]:
    """Where and with which numbers of layers it was measured."""
    counts = sorted({step.layers for step in found})
    return {**ops.circumstances(device), "layers": counts, "weights": "random"}


def needed(bench: Bench, config: ModelConfig, kinds: Sequence[str], most: int, points: Sequence[At]) -> int:
    """Bytes at worst: weights with a layer's experts once more as they are packed, a cache, and the largest step."""
    layer = f"layers.{most - 1}."
    beside = []
    for kind in kinds:
        own = of_kind(config, kind, most)
        params = list(parameters(own))
        weights = sum(param.nbytes for param in params if not param.name.startswith("layers."))
        weights += (most + 1) * sum(param.nbytes for param in params if param.name.startswith(layer))
        for at in points:
            asked = options(torch.device("cpu"), bench.sizes(at))
            beside.append(weights + cache_bytes(own, asked) + workspace(own, asked).total)
    return max(beside)


def check_fits(
    bench: Bench, config: ModelConfig, kinds: Sequence[str], most: int, points: Sequence[At]
) -> torch.device:
    """The GPU that it fits on. ConfigError where there is none, or where it has too little memory left."""
    need = needed(bench, config, kinds, most, points)
    if not torch.cuda.is_available():
        raise ConfigError(f"dsv4 bench {bench.what}", got="no GPU that torch sees", wanted="an H100 or H200")
    free = torch.cuda.mem_get_info()[0]
    if need > free:
        raise ConfigError(
            f"--layers: weights, caches and the largest step of {most}",
            got=f"about {need / 1e9:.0f} GB",
            wanted=f"at most the {free / 1e9:.0f} GB that are free",
            do="name fewer layers, or less at once",
        )
    return torch.device("cuda", torch.cuda.current_device())
