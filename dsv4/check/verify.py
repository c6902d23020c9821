"""Cases, and the implementations that a device has for them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import chain, repeat
from multiprocessing import get_context
from typing import Any

import torch

from dsv4 import kernels, settings
from dsv4.check.cases import cases as all_cases
from dsv4.check.contract import Case, Run, Verdict, judge, placed
from dsv4.errors import ConfigError, RequestError
from dsv4.ops.op import Op, use


def device_for(name: str | None) -> torch.device:
    """The device of this name, or (None) a GPU if there is one and else the CPU. ConfigError if there is none."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if name.partition(":")[0] not in ("cpu", "cuda"):
        raise ConfigError("device", got=name, wanted="cpu or cuda")
    try:
        return torch.empty(0, device=name).device  # with its number, where there are several
    except (RuntimeError, AssertionError) as error:
        raise ConfigError("device", got=name, do=str(error).splitlines()[0]) from None


def prepare() -> None:
    """Register the kernels; one CPU thread, for small work is over before a second one has woken up."""
    kernels.install()
    torch.set_num_threads(settings.load().threads or 1)


def implementations(op: Op[..., Any], device: torch.device) -> dict[str, Run]:
    """What there is to judge: on a GPU kernels, "auto" where it has a choice, and libraries; on a CPU the reference."""
    if device.type != "cuda":
        return {"reference": op.reference}
    names = kernels.preferred(device).get(op.name, ())
    found = {name: op.implementations[name].run for name in names if name in op.implementations}
    if "unfused" in found:
        found["unfused"] = partial(_chosen, op, "unfused")
    if len(found.keys() - {"unfused"}) > 1:
        found["auto"] = partial(_chosen, op, "auto")
    return found | {name: op.implementations[name].run for name in _libraries(op, device)}


def _libraries(op: Op[..., Any], device: torch.device) -> tuple[str, ...]:
    return kernels.libraries(device).get(op.name, ()) if device.type == "cuda" else ()


def twin(op: Op[..., Any]) -> Run | None:
    """The body over the kernels of the smaller ops, for an op whose body calls any: a fused kernel has its bits."""
    called = (op.reference.__globals__.get(name) for name in op.reference.__code__.co_names)
    return partial(_chosen, op, "unfused") if any(isinstance(one, Op) for one in called) else None


def _chosen(op: Op[..., Any], choice: str, *args: Any) -> Any:
    with use("covered", **{op.name: choice}):
        return op(*args)


def check(cases: Sequence[Case], device: torch.device) -> Iterator[list[Verdict]]:
    """The judgement of every case by every implementation: one list for each pair.

    A kernel may refuse what another one takes; where all of them refuse, each is wrong unless the case is refusable. A
    library may refuse what it likes, and a token may have other bits alone.
    """
    prepare()
    for case in cases:
        given = placed(case.make(), device)
        runs = implementations(case.op, device)
        named = runs.keys() - {"auto", "reference", "unfused"}
        kernel = {name: case.op.implementations[name].accepts for name in named}
        libraries = _libraries(case.op, device)
        takes = {name for name, accepts in kernel.items() if name not in libraries and not accepts(*given)}
        for name, run in runs.items():
            library = name in libraries
            beside = twin(case.op) if name in kernel and not library else None
            spare = library or bool(takes - {name})
            yield judge(case, run, name, device, beside, kernel.get(name), given, spare, company=library)
        if device.type == "cuda" and case.size == "big":
            torch.cuda.empty_cache()  # for who shares the GPU


def check_side_by_side(
    families: Sequence[str], chosen: Mapping[int, Case], device: torch.device, jobs: int
) -> Iterator[list[Verdict]]:
    """`check` in so many processes, each with the cases of one op at a time.

    chosen: by their numbers among the cases of these families. RequestError if the device's memory is full.
    """
    by_op: dict[str, list[int]] = {}
    for number, case in chosen.items():
        by_op.setdefault(case.op.name, []).append(number)
    jobs = min(jobs, len(by_op))
    try:
        if jobs == 1:
            yield from check(list(chosen.values()), device)
        else:
            with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
                yield from chain.from_iterable(pool.map(_apart, repeat(families), by_op.values(), repeat(str(device))))
    except torch.OutOfMemoryError:
        raise RequestError("the device's memory is full", got=f"{jobs} processes", do="lower --jobs") from None


def _apart(families: Sequence[str], numbers: Sequence[int], device: str) -> list[list[Verdict]]:
    """In a process that knows nothing yet."""
    found = all_cases(*families)
    return list(check([found[number] for number in numbers], torch.device(device)))


def unseen(cases: Sequence[Case], device: torch.device) -> dict[str, list[str]]:
    """Implementations that some architecture prefers and this device does not run: name -> ops."""
    kernels.install()  # cases may have been judged in other processes
    here = {case.op.name: set(implementations(case.op, device)) for case in cases}
    left: dict[str, list[str]] = {}
    for name in sorted(here):
        for given in dict.fromkeys(given for rows in kernels.PREFER.values() for given in rows.get(name, ())):
            if given not in here[name]:
                left.setdefault(given, []).append(name)
    return left


def about(device: torch.device) -> str:
    """The device and what runs on it, in words."""
    if device.type != "cuda":
        return f"on the CPU, torch {torch.__version__}: the references"
    return f"on {torch.cuda.get_device_name(device)}, torch {torch.__version__}: the kernels"
