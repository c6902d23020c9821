"""Which form of the mHC kernels is the fastest for how many tokens: `python bench/mhc_forms.py [--json FILE]` on a GPU.

One line a shape and number of tokens, in microseconds a step (way back, mix, Sinkhorn, way in, norm, FP8) or a call,
each the median of 20 replays of a CUDA graph. A graph runs through as many sites as do not fit into the second cache
together (at most 61), so that fn comes from memory as it does in a model. What is chosen by these figures: MANY_FROM
of dsv4/kernels/mhc.py, CLUSTER_TOKENS of mhc_accepts.py, and the order in PREFER.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from dsv4 import kernels
from dsv4.kernels import mhc, mhc_accepts
from dsv4.ops.mhc import Mixed, Mixer, mhc_post, mhc_post_pre_norm_quant
from dsv4.ops.op import use
from dsv4.quant.formats import FP8_ROW

EPS, ITERATIONS, REPLAYS = 1e-6, 20, 20
SHAPES = {"flash": 4096, "pro": 7168}
TOKENS = (1, 2, 4, 8, 12, 16, 24, 32, 64, 128, 512, 2048, 8192)


def random(*shape: int, dtype: torch.dtype = torch.float32, size: float = 1.0) -> Tensor:
    return (torch.randn(shape, device="cuda") * size).to(dtype)


def microseconds(run: Callable[[], Any], count: int) -> float:
    """Of one of `count` calls inside `run`, on a graph of all of them."""
    run()  # builds and loads what is needed
    graph, times = torch.cuda.CUDAGraph(), []
    with torch.cuda.graph(graph):
        kept = run()  # its memory has to live as long as the graph
    for _ in range(REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / count)
    del kept
    return round(median(times), 3)


def measure(d: int, tokens: int) -> dict[str, float]:
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    count = min(61, 2 * cache // (24 * 4 * d * 4) + 1) if tokens < 512 else 4
    sites = [Mixer(random(24, 4 * d, size=0.01), random(24), random(24)) for _ in range(count)]
    bf16 = torch.bfloat16
    y, x, weight = random(tokens, d, dtype=bf16), random(tokens, d, dtype=bf16), random(d)
    comb = torch.softmax(random(tokens, 4, 4), 2)
    first = Mixed(x, random(tokens, 4), comb, random(tokens, 4, d, dtype=bf16))
    implementations = mhc_post_pre_norm_quant.implementations

    def steps(run: Callable[..., Any]) -> Mixed:
        mixed = first
        for site in sites:
            mixed = run(y, mixed, site, ITERATIONS, EPS, EPS, weight, FP8_ROW)[1]
        return mixed

    def in_form(form: str) -> Callable[..., Any]:
        def run(y: Tensor, mixed: Mixed, site: Mixer, *rest: Any) -> Any:
            chosen, mhc.mix_form = mhc.mix_form, lambda tokens, m, n: form
            try:
                return implementations["fused"].run(y, mixed, site, *rest)
            finally:
                mhc.mix_form = chosen

        return run

    found = {form: microseconds(lambda form=form: steps(in_form(form)), count) for form in ("few", "many")}  # type: ignore[misc]
    if tokens <= mhc_accepts.CLUSTER_TOKENS:
        found["cluster"] = microseconds(lambda: steps(implementations["cluster"].run), count)
    with use({"*": "auto"}, mhc_post_pre_norm_quant="unfused", mhc_pre_norm_quant="unfused"):
        found["unfused"] = microseconds(lambda: steps(mhc_post_pre_norm_quant), count)
    found["post"] = microseconds(lambda: [mhc_post.implementations["fused"].run(y, first) for _ in range(4)], 4)
    to = torch.empty_like(first.streams)
    found["copy of the streams"] = microseconds(lambda: [to.copy_(first.streams) for _ in range(4)], 4)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, help="append one line for each measurement to this file")
    asked = parser.parse_args()
    kernels.install()
    for name, d in SHAPES.items():
        for tokens in TOKENS:
            found = measure(d, tokens)
            print(
                f"{name:6} {tokens:5} tokens  " + "  ".join(f"{form} {us:.2f}" for form, us in found.items()),
                flush=True,
            )
            if asked.json:
                line = {"what": "mhc forms", "shape": name, "tokens": tokens, "us": found}
                line |= {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
                with asked.json.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
