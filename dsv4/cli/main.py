"""`dsv4`: the verbs, and how errors reach the user."""

from __future__ import annotations

import os
import sys
from itertools import zip_longest
from typing import Annotated

import typer

from dsv4 import __version__
from dsv4.cli.bench import app as bench
from dsv4.cli.chat import chat
from dsv4.cli.check import check
from dsv4.cli.compare import compare
from dsv4.cli.conform import conform
from dsv4.cli.doctor import doctor
from dsv4.cli.eval import evaluate
from dsv4.cli.generate import generate
from dsv4.cli.inspect import inspect
from dsv4.cli.interrupt import ctrl_c
from dsv4.cli.kernels import kernels
from dsv4.cli.plan import plan
from dsv4.cli.pull import pull
from dsv4.cli.serve import serve
from dsv4.cli.study import app as study
from dsv4.cli.synth import synth
from dsv4.errors import DSV4Error

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Run DeepSeek-V4 models. Without MODEL, the small trained model inside the package answers.",
)
app.command()(chat)
app.command()(check)
app.command()(compare)
app.command()(conform)
app.command()(doctor)
app.command("eval")(evaluate)
app.command()(generate)
app.command()(inspect)
app.command()(kernels)
app.command()(plan)
app.command()(pull)
app.command()(serve)
app.command()(synth)
app.add_typer(bench, name="bench")
app.add_typer(study, name="study")
TRACED_STEPS = "20"


def _print_version(asked: bool) -> None:
    if asked:
        print(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    """Options before a verb."""


@app.command()
def version() -> None:
    """Print the version."""
    print(__version__)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line. Exit code 0: done; 1: an error that its one line explains; 2: wrong usage; 130: Ctrl-C."""
    given = _with_trace_number(sys.argv[1:] if arguments is None else arguments)
    try:
        with ctrl_c():
            app(given)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output went away, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (DSV4Error, OSError) as error:
        print(f"dsv4: {error}", file=sys.stderr)
        sys.exit(1)


def _with_trace_number(arguments: list[str]) -> list[str]:
    """`--trace` takes a number or none, which the option parser cannot express."""
    out: list[str] = []
    for this, following in zip_longest(arguments, arguments[1:], fillvalue=""):
        out += [this, TRACED_STEPS] if this == "--trace" and not following.isdecimal() else [this]
    return out


if __name__ == "__main__":
    main()
