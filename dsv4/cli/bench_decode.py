"""`dsv4 bench decode`: what a token costs in layers of full width, beside what its bytes cost."""

from __future__ import annotations

from typing import Annotated

import typer

from dsv4.cli.bench_layers import ConfigName, Kinds, LayerCounts, Out, Samples, asked, time_layers
from dsv4.cli.options import numbers


def decode(
    config: ConfigName = "flash",
    layers: LayerCounts = "2,6",
    kinds: Kinds = "CSA,HCA",
    contexts: Annotated[str, typer.Option(help="tokens of context of one sequence")] = "8192",
    sequences: Annotated[str, typer.Option(help="numbers of sequences")] = "1,8",
    at: Annotated[int, typer.Option(min=256, help="tokens of context of several sequences")] = 8192,
    samples: Samples = 10,
    out: Out = None,
) -> None:
    """Time decode steps, with sampling, of random layers of full width on a GPU; weights are drawn there.

    Steps are CUDA graphs. A layer is what one layer more costs, `rest` what a step has beside its layers, `host` what
    Python needs to launch a step. The floor is the time in which this machine, in the same run, copies as many bytes as
    must be read. Then the layers of the whole model are added up; SWA that was not measured counts as HCA.
    """
    lengths, many = numbers("--contexts", contexts), numbers("--sequences", sequences)
    given = asked(config, layers, kinds, samples, out)
    from dsv4.bench.decode import DECODE, points  # takes seconds: not before the usage has been checked

    time_layers(DECODE, given, points(lengths, many, at))
