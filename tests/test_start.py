"""A start tells its stages as they go, and where its time went, to the last tenth; what steps need is there before."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dsv4 import kernels
from dsv4.cli.progress import told
from dsv4.config import EngineOptions
from dsv4.engine.request import Sampling
from dsv4.errors import KernelError
from dsv4.kernels import driver, launch, ready
from dsv4.kernels.build import Found
from dsv4.kernels.launch import KERNELS, Kernel
from dsv4.kernels.source import sources
from dsv4.llm import LLM, LoadProgress, _rehearse
from dsv4.llm_start import Stages, Started, process_age
from dsv4.ops.op import counts, forget_counts
from dsv4.ops.rope import rope
from tests import PICO

LAYERS = ["layers.0", "layers.1", "layers.2", "layers.3", "mtp.0"]


@pytest.fixture(scope="module")
def steps() -> list[LoadProgress]:
    """What a load on a CPU tells."""
    seen: list[LoadProgress] = []
    LLM.load(PICO, EngineOptions(max_context=64), progress=seen.append)
    return seen


def test_stages_come_in_order_and_end(steps: list[LoadProgress]) -> None:
    assert [stage for stage, _ in groupby(steps, lambda step: step.stage)][:-1] == [
        "headers", "weights", "cache", "layers",
    ]  # fmt: skip
    ends = {step.stage: (step.done, step.total, step.unit) for step in steps}
    assert ends["weights"] == (4_692_577, 4_692_577, "bytes")
    assert ends["layers"] == (5, 5, "layers")
    assert all(step.seconds >= 0 for step in steps)


def test_each_layer_is_told_as_it_is_begun(steps: list[LoadProgress]) -> None:
    made = [(step.done, step.what) for step in steps if step.stage == "layers"]
    assert made == [(0, ""), *enumerate(LAYERS), (5, "")]


def test_time_left_is_that_of_the_rate() -> None:
    assert LoadProgress(25, 100, 5.0, "x").left == 15
    assert LoadProgress(0, 100, 5.0, "x").left is None
    assert LoadProgress(0, 0, 5.0, "x").left is None
    assert told(LoadProgress(2, 8, 1.0, "layers.2", "layers", "layers")) == "2 of 8 layers, 3 s left"
    assert told(LoadProgress(10**9, 4 * 10**9, 1.0, "x")) == "1.0 GB of 4.0 GB, 1.0 GB/s, 3 s left"
    assert told(LoadProgress(0, 0, 1.0, "", "cache")) == ""


def test_every_moment_belongs_to_a_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("dsv4.llm_start.time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr("dsv4.llm_start.process_age", lambda: 3.0)
    stages = Stages(None)
    for stage, seconds in (("headers", 0.25), ("weights", 6.0), ("headers", 0.5)):
        stages.enter(stage)
        now[0] += seconds
    found = stages.over(12 * 10**9)
    assert found.seconds == {"process": 3.0, "headers": 0.75, "weights": 6.0}
    assert found.line() == "ready after 9.8 s: process 3.0, headers 0.8, weights 6.0 (12.0 GB, 2.0 GB/s)"
    monkeypatch.setattr("dsv4.llm_start.process_age", lambda: None)  # no system that tells
    stages = Stages(None)
    stages.enter("headers")
    assert list(stages.over(0).seconds) == ["headers"]


def test_tenths_add_up() -> None:
    random = Random(0)
    for _ in range(300):
        seconds = {name: random.uniform(0, 0.4) for name in "abcdefg"}
        total, _, parts = Started(seconds, 0, {}).line().removeprefix("ready after ").partition(" s: ")
        tenths = [round(10 * float(part.split()[1])) for part in parts.split(", ")]
        assert sum(tenths) == round(10 * float(total)) == round(10 * sum(seconds.values()))
        assert min(tenths) > 0


def test_the_command_line_says_where_its_time_went() -> None:
    """Of a process of its own: what it tells is what passes outside, but for the answer and the end."""
    command = [sys.executable, "-m", "dsv4.cli.main", "generate", str(PICO), "-p", "hi", "--max-tokens", "1", "--json"]
    begun = time.monotonic()
    done = subprocess.run(command, capture_output=True, check=True, text=True)
    passed = time.monotonic() - begun
    found = json.loads(done.stdout)["started"]
    assert found["seconds"] == pytest.approx(sum(found["stages"].values()), abs=0.01)
    assert list(found["stages"]) == ["process", "headers", "weights", "cache", "layers"]
    assert 0.2 * passed < found["seconds"] < passed + 0.05
    assert found["stages"]["process"] > 0.5 * found["seconds"]  # torch alone


def test_a_process_knows_its_age() -> None:
    first = process_age()
    time.sleep(0.05)
    second = process_age()
    assert first is not None
    assert second is not None
    assert 0.03 < second - first < 5


# --- kernels ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Kernel, int]]:
    """What `load_all` loads on a Hopper GPU that is not there."""
    kernels.install()
    seen: list[tuple[Kernel, int]] = []
    monkeypatch.setattr(driver, "capability", lambda device: (9, 0))
    monkeypatch.setattr(driver, "current_device", lambda: 1)
    monkeypatch.setattr(Kernel, "load", lambda kernel, device: seen.append((kernel, device)))
    origin = {"norm.cu": "cache", "moe.cu": "compiled"}
    entry: Any = None
    monkeypatch.setattr(ready, "find", lambda file, wanted: Found(entry, origin.get(file, "prebuilt")))
    return seen


def test_every_kernel_of_the_architecture_is_loaded(loaded: list[tuple[Kernel, int]]) -> None:
    Kernel("none.cu", "of_a_test", "p")
    told: list[tuple[int, int, str]] = []
    origins = ready.load_all(torch.device("cuda"), lambda *step: told.append(step))
    declared = {one.file for one in sources() if "sm_90a" in one.architectures}
    wanted = [kernel for kernel in KERNELS if kernel.places is None and kernel.file in declared]
    KERNELS.pop()
    assert {kernel for kernel, _ in loaded} == set(wanted)
    assert len(loaded) == len(wanted) > 50
    assert {device for _, device in loaded} == {1}
    files = sorted({kernel.file for kernel in wanted})
    assert set(files) == declared  # a source without a kernel would be one that nothing launches
    assert told == [(n, len(files), file) for n, file in enumerate(files, 1)]
    assert origins == {"prebuilt": len(files) - 2, "cache": 1, "compiled": 1}


def test_a_kernel_that_cannot_be_built_ends_the_start(
    loaded: list[tuple[Kernel, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(file: str, wanted: str) -> Found:
        raise KernelError(f"kernel source {file}", got="an error")

    monkeypatch.setattr(ready, "find", broken)
    with pytest.raises(KernelError, match="got an error"):
        ready.load_all(torch.device("cuda", 0), lambda *step: None)
    assert loaded == []


@pytest.fixture
def other_rope() -> Iterator[None]:
    rope.impl("other", accepts=lambda x, turn, inverse=False: None)(rope.reference)
    yield
    del rope.implementations["other"]


@pytest.mark.usefixtures("other_rope")
def test_a_rehearsal_runs_what_the_engine_will_run() -> None:
    """And not the references, whose kernels and memory are others."""
    llm = LLM.load(PICO, EngineOptions(kernels={"rope": "other"}, max_context=64))
    forget_counts()
    _rehearse(llm.engine._runner, llm.resolved.options, 0, Stages(None))
    assert counts()["rope"].keys() == {"other"}


def test_the_first_graph_is_captured_by_two_steps() -> None:
    runner, ran = LLM.load(PICO, EngineOptions(max_context=64)).engine._runner, []
    fake: Any = SimpleNamespace(shape=lambda segments: "shape", run=lambda segments, shape: ran.append(segments[0]))
    runner._graphs = fake
    runner.rehearse_graph(3)
    assert [(segment.slot, segment.start, len(segment.ids)) for segment in ran] == [(0, 0, 3)] * 2


@pytest.mark.gpu
def test_nothing_is_found_or_built_or_captured_for_the_first_request(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = LLM.load(options=EngineOptions(device="cuda"))
    assert {"kernels", "rehearsal", "graphs"} <= llm.started.seconds.keys()
    assert sum(llm.started.kernels.values()) > 20
    monkeypatch.setattr(launch, "find", None)  # a call would fail
    graphs: Any = llm.engine._runner._graphs
    before = list(graphs._captured)
    assert len(before) == 2
    prompt = llm.prompt([{"role": "user", "content": "What is the capital of France?"}], thinking=False)
    list(llm.generate(prompt, Sampling(temperature=0, max_tokens=4)))
    assert before[1] in graphs._captured


def test_a_damaged_file_of_proc_tells_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: "1 (x) S")
    assert process_age() is None
