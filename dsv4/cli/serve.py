"""`dsv4 serve`: an OpenAI-compatible server for many clients at once."""

from __future__ import annotations

import gc
import logging
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from dsv4 import settings
from dsv4.checkpoint.hub import find_model
from dsv4.cli import config_file
from dsv4.cli.options import (
    CacheTokens,
    Device,
    Dialect,
    Draft,
    Dtype,
    Force,
    Graphs,
    Kernels,
    MaxContext,
    MaxSequences,
    ModelName,
    Numerics,
    PrefillChunk,
    ReusePoints,
    Stored,
    choices,
)
from dsv4.cli.progress import load_bar
from dsv4.config import EngineOptions
from dsv4.errors import ConfigError

NEEDS = ("fastapi", "uvicorn")
LOOPBACK = ("127.", "::1")


def _configure(ctx: typer.Context, file: Path | None) -> Path | None:
    if file is not None:
        ctx.default_map = config_file.read(file, serve)
    return file


def serve(
    ctx: typer.Context,
    model: ModelName = None,
    config: Annotated[
        Path | None, typer.Option(callback=_configure, is_eager=True, help="options by name in YAML; those here win")
    ] = None,
    print_config: Annotated[bool, typer.Option("--print-config", help="print what counts as YAML, and end")] = False,
    host: Annotated[str, typer.Option(help="address to listen on; 0.0.0.0 for all")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free one")] = 8000,
    api_key: Annotated[str | None, typer.Option(help="what clients must show; DSV4_API_KEY hides it from ps")] = None,
    api_key_file: Annotated[Path | None, typer.Option(help="a file with the key and nothing else")] = None,
    name: Annotated[
        list[str] | None, typer.Option("--served-model-name", help="what clients call the model; repeatable")
    ] = None,
    max_sequences: MaxSequences = 8,
    max_context: MaxContext = 4096,
    cache_tokens: CacheTokens = None,
    reuse_points: ReusePoints = 64,
    prefill_chunk: PrefillChunk = 512,
    max_queue: Annotated[int, typer.Option(min=0, help="requests that may wait; more get status 429")] = 64,
    max_body_mib: Annotated[int, typer.Option(min=1, help="largest request")] = 16,
    unread: Annotated[int, typer.Option(min=1, help="tokens a client may leave unread before it has to wait")] = 1024,
    stall: Annotated[float, typer.Option(min=0.1, help="seconds after which an answer that nobody reads ends")] = 60,
    deadline: Annotated[float | None, typer.Option(min=0.001, help="seconds after which any request ends")] = None,
    step_limit: Annotated[
        float, typer.Option(min=0, help="seconds of one step after which /health tells 503; 0: never")
    ] = 120,
    drain: Annotated[int, typer.Option(min=0, help="seconds that answers have to end after SIGTERM")] = 30,
    log_text: Annotated[
        bool, typer.Option("--log-text", help="write what users ask and are answered to stderr, as lines of JSON")
    ] = False,
    dialect: Dialect = None,
    numerics: Numerics = "official",
    dtype: Dtype = "bfloat16",
    device: Device = "cpu",
    kernels: Kernels = None,
    stored: Stored = None,
    graphs: Graphs = True,
    force: Force = None,
    draft: Draft = None,
) -> None:
    """Serve /v1/chat/completions and its neighbours until Ctrl-C or SIGTERM, which let running answers end."""
    options = EngineOptions(
        numerics=numerics,
        dtype=dtype,
        device=device,
        max_context=max_context,
        max_sequences=max_sequences,
        cache_tokens=cache_tokens,
        reuse_points=reuse_points,
        prefill_chunk=prefill_chunk,
        draft_tokens=draft,
        kernels=choices(kernels, force),
        stored=stored,
        graphs=graphs,
    )
    key = _key(api_key, api_key_file)
    if print_config:
        hidden = "# The API key is set and not shown: use api-key-file or DSV4_API_KEY.\n" if api_key else ""
        print(hidden + config_file.text(ctx.params, serve), end="")
        return
    lacking = [library for library in NEEDS if find_spec(library) is None]
    if lacking:
        raise ConfigError(f"dsv4 serve needs {' and '.join(lacking)}", do="pip install 'dsv4[server]'")
    from dsv4.server import run  # not before: nothing else needs its libraries
    from dsv4.server.options import ServerOptions

    directory = None if model is None else find_model(model)
    bound = run.bind(host, port)
    from dsv4.llm import LLM
    from dsv4.server.app import Service

    err = Console(stderr=True, highlight=False)
    with load_bar(err, "loading") as show:
        llm = LLM.load(directory, options, dialect, show)
    _ = llm.dialect, llm.defaults  # what is wrong with them is said now and not to the first client
    gc.collect()
    gc.freeze()  # what is loaded stays until the end: the collector need not look through it again and again
    served = ServerOptions(
        names=tuple(name or (llm.directory.resolve().name if model is None else model.rstrip("/"),)),
        key=key,
        queue=max_queue,
        unread=unread,
        stall=stall,
        body=max_body_mib << 20,
        deadline=deadline,
        step_limit=step_limit,
        drain=drain,
        log_text=log_text,
    )
    if log_text:
        told = logging.getLogger("dsv4.server.text")
        told.setLevel(logging.INFO)
        told.addHandler(logging.StreamHandler())
    service = Service(llm, served)
    lines = [
        *llm.lines(),
        f"serving {max_sequences} requests at once, {max_queue} more may wait, as {', '.join(served.names)}",
        *(["what users ask and are answered is logged (--log-text)"] if log_text else []),
        f"listening on {run.url(bound)}/v1, {_who(bound.getsockname()[0], key)}; in a browser: {run.url(bound)}/",
    ]
    err.print("\n".join(lines), style="dim", markup=False, soft_wrap=True)
    run.serve(service, bound)
    err.print("stopped", style="dim")


def _key(given: str | None, file: Path | None) -> str | None:
    """What clients must show: from the option, a file or the environment."""
    if given is not None and file is not None:
        raise ConfigError("the API key is given twice", do="leave out --api-key or --api-key-file")
    key = file.read_text(encoding="utf-8", errors="replace").strip() if file else given
    key = settings.load().api_key if key is None else key
    if key is not None and not (key and key.isascii() and key.isprintable() and " " not in key):
        raise ConfigError("the API key", wanted="printable ASCII characters without a space")
    return key


def _who(address: str, key: str | None) -> str:
    if key is not None:
        return "for those who have the key"
    return "for this machine alone" if address.startswith(LOOPBACK) else "for everybody: there is no --api-key"
