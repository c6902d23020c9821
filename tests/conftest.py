"""One CPU thread, a printed seed, no GPU test without a GPU, and in CI no skipped test at all."""

from __future__ import annotations

import gc
import os
import random
import sys
from collections.abc import Generator, Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings

from tests import PICO

if TYPE_CHECKING:
    import openai

    from dsv4.llm import LLM
    from tests.serving import Running

# Before torch is first imported; child processes inherit it. One thread: the machine is shared, sums keep one order.
# The few tests that ask for two do not spin while the second waits for a core.
os.environ["OMP_NUM_THREADS"] = os.environ["DSV4_THREADS"] = "1"
os.environ["OMP_WAIT_POLICY"] = "passive"

# Where bytecode is forbidden, as in many containers, each worker and each child process compiles torch and the tests
# anew, a sixth of the suite's time. There it goes into a folder of its own, of the virtual environment if there is one,
# which outlives a clone; still none lies beside the sources.
if os.environ.pop("PYTHONDONTWRITEBYTECODE", None):
    sys.dont_write_bytecode = False
    home = Path(__file__).parents[1] / ".pytest_cache" if sys.prefix == sys.base_prefix else Path(sys.prefix)
    sys.pycache_prefix = str(home / "bytecode")
    os.environ["PYTHONPYCACHEPREFIX"] = sys.pycache_prefix

IN_CI = bool(os.environ.get("CI"))
SEED = pytest.StashKey[int]()

# Always fresh examples (hypothesis would freeze them in CI), never a deadline: the machine is shared.
settings.register_profile("everyday", deadline=None, max_examples=50)
settings.register_profile("thorough", deadline=None, max_examples=500, print_blob=True)
settings.load_profile("thorough" if IN_CI else "everyday")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", type=int, help="repeat a run: the seed that its header printed")


def pytest_configure(config: pytest.Config) -> None:
    asked = getattr(config, "workerinput", {}).get("seed", config.getoption("--seed"))
    config.stash[SEED] = random.SystemRandom().randrange(2**31) if asked is None else asked


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """All workers of pytest-xdist run under the seed that the header prints."""
    node.workerinput["seed"] = node.config.stash[SEED]


def pytest_collection_finish() -> None:
    """What is loaded now stays to the end: the collector need not walk over a million objects again and again.

    Nor over the young ones every 700: what tests leave behind is small.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20)


def pytest_report_header(config: pytest.Config) -> str:
    return f"seed: {config.stash[SEED]} (again: --seed {config.stash[SEED]})"


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("no GPU")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    expected = hasattr(report, "wasxfail") or item.get_closest_marker("gpu")
    if IN_CI and report.skipped and not expected:
        _fail(report)
    if report.failed:
        report.sections.append(("seed", f"--seed {item.config.stash[SEED]}"))
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    if IN_CI and report.skipped:
        _fail(report)
    return report


def _fail(report: pytest.TestReport | pytest.CollectReport) -> None:
    """In CI nothing may be missing: turn a skip into a failure that gives the skip's reason."""
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
    report.outcome = "failed"
    report.longrepr = f"skipped in CI, where every test must run: {reason}"


@pytest.fixture(scope="session", autouse=True)
def _one_command_tree() -> Iterator[None]:
    """typer reads the signatures of all verbs for every call of `main`; a process of a user's makes one call."""
    import typer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(typer.main, "get_command", cache(typer.main.get_command))
        yield


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def pico_dir() -> Path:
    """A trained checkpoint of four narrow layers: quicker than the embedded one, where any model will do."""
    return PICO


# What tests of the server share; a file that needs a server of another kind has its own. `llm` is each file's.


@pytest.fixture(scope="module")
def server(llm: LLM) -> Iterator[Running]:
    """A server of the file's model."""
    from tests.serving import running

    with running(llm) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Running) -> openai.OpenAI:
    """OpenAI's own."""
    return server.client()


@pytest.fixture(scope="module")
def actor() -> LLM:
    """A model whose words are dictated, or chance's."""
    from dsv4.config import EngineOptions
    from dsv4.llm import LLM

    return LLM.load(PICO, EngineOptions(max_sequences=2, max_context=2048, draft_tokens=0, reuse_points=0))


@pytest.fixture(scope="module")
def stage(actor: LLM) -> Iterator[Running]:
    """A server of that model."""
    from tests.serving import running

    with running(actor) as server:
        yield server


@pytest.fixture(scope="module")
def player(stage: Running) -> openai.OpenAI:
    """OpenAI's own client of it."""
    return stage.client()


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """A browser."""
    from tests import browser

    with browser.chromium() as started:
        yield started


@pytest.fixture
def seed(pytestconfig: pytest.Config) -> int:
    """This run's seed, printed in the header and beside every failure."""
    return pytestconfig.stash[SEED]
