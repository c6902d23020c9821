"""`dsv4 bench prefill`: what a chunk of a prompt costs in layers of full width, beside its bytes and its products."""

from __future__ import annotations

from typing import Annotated

import typer

from dsv4.cli.bench_layers import ConfigName, Kinds, LayerCounts, Out, Samples, asked, time_layers
from dsv4.cli.options import numbers


def prefill(
    config: ConfigName = "flash",
    layers: LayerCounts = "1,3",
    kinds: Kinds = "CSA,HCA",
    tokens: Annotated[str, typer.Option(help="tokens of a chunk")] = "2048,8192",
    behind: Annotated[str, typer.Option(help="tokens of the prompt that have run before")] = "0,65536",
    samples: Samples = 5,
    out: Out = None,
) -> None:
    """Time a chunk of a prompt in random layers of full width on a GPU; weights are drawn there.

    Steps are eager, as in the engine. A layer is what one layer more costs, `rest` what a step has beside its layers,
    `host` what Python needs to launch a step. The floor is what this machine, in the same run, takes to copy the bytes
    of a layer (weights, streams in and out, stored rows that a token reads) or to multiply at the peak of FP8
    (matrices, experts, attention, index scores, mHC), whichever is more. Then the layers of the whole model are added
    up; SWA that was not measured counts as HCA.
    """
    many, before = numbers("--tokens", tokens), numbers("--behind", behind, low=0)
    given = asked(config, layers, kinds, samples, out)
    from dsv4.bench.prefill import PREFILL, chunks  # takes seconds: not before the usage has been checked

    time_layers(PREFILL, given, chunks(many, before))
