"""The registry of ops: who runs where, by whose choice, and that nothing ever falls back unsaid.

A GPU is played by fake tensors: they have shape, dtype and device, and any look at a value is an error.
"""

from __future__ import annotations

import ast
import subprocess
import sys
import timeit
from collections.abc import Callable, Mapping
from pathlib import Path
from threading import Thread
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from dsv4 import kernels
from dsv4.config import EngineOptions
from dsv4.engine.request import Sampling
from dsv4.errors import ConfigError, KernelError
from dsv4.llm import LLM, LoadProgress
from dsv4.ops import op as registry
from dsv4.ops.op import Op, all_ops, check_choices, counts, forget_counts, op, pure, under, use, watching

HERE = torch.ones(3, 4)
FAKE = FakeTensorMode()
THERE = FakeTensor(FAKE, torch.empty(3, 4, device="meta"), torch.device("cuda:0"))


def even(x: Tensor) -> str | None:
    if not x.is_cuda:
        return "x is on cpu"
    return "an odd number of rows" if x.shape[0] % 2 else None


@pytest.fixture
def rig(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Two ops, `outer` calling `inner`, with a kernel each that writes down its name."""
    monkeypatch.setattr(registry, "OPS", dict(all_ops()))
    monkeypatch.setattr(registry, "_preference", registry._nothing)
    log: list[str] = []

    @op
    def inner(x: Tensor) -> Tensor:
        log.append("inner body")
        return x

    @op
    def outer(x: Tensor) -> Tensor:
        log.append("outer body")
        return inner(x)

    @inner.impl("fast", accepts=lambda x: None if x.is_cuda else "x is on cpu")
    def _(x: Tensor) -> Tensor:
        log.append("inner fast")
        return x

    @outer.impl("even", accepts=even)
    def _(x: Tensor) -> Tensor:
        log.append("outer even")
        return x

    def ran(x: Tensor) -> list[str]:
        log.clear()
        outer(x)
        return list(log)

    def prefer(**rows: tuple[str, ...]) -> None:
        registry.prefer(lambda device: rows)

    return SimpleNamespace(inner=inner, outer=outer, ran=ran, prefer=prefer)


BODIES = ["outer body", "inner body"]
SMALL = ["outer body", "inner fast"]


@pytest.mark.parametrize("x", [HERE, THERE], ids=["cpu", "gpu"])
def test_a_bare_call_runs_the_bodies_whatever_is_installed(x: Tensor, rig: SimpleNamespace) -> None:
    rig.prefer(outer=("even",), inner=("fast",))
    assert rig.ran(x) == BODIES
    assert rig.outer.calls == rig.inner.calls == {"reference": 1}


@pytest.mark.parametrize("choice", ["reference", "auto", "covered", "unfused"])
def test_on_a_cpu_every_choice_for_all_is_the_reference(choice: str, rig: SimpleNamespace) -> None:
    rig.prefer(outer=("even", "unfused"), inner=("fast",))
    with use(choice):
        assert rig.ran(HERE) == BODIES
    assert rig.outer.calls == rig.inner.calls == {"reference": 1}


def test_auto_runs_the_first_that_accepts(rig: SimpleNamespace) -> None:
    rig.prefer(outer=("even", "unfused"), inner=("fast",))
    with use("auto"):
        assert rig.ran(THERE) == SMALL
        assert rig.ran(THERE.new_empty(4, 4)) == ["outer even"]
    assert rig.outer.calls == {"even": 1, "unfused": 1}
    assert rig.inner.calls == {"fast": 1}


def test_auto_without_an_implementation_that_accepts_is_an_error_that_says_all(rig: SimpleNamespace) -> None:
    rig.prefer(outer=("lost", "even"))
    with use("auto"), pytest.raises(KernelError) as error:
        rig.outer(THERE)
    for part in ("outer", "lost: not installed", "even: an odd number of rows", "float32[3, 4] on cuda:0", "reference"):
        assert part in str(error.value)
    assert not rig.outer.calls


def test_auto_without_a_kernel_is_an_error_and_covered_runs_the_body(rig: SimpleNamespace) -> None:
    rig.prefer(inner=("fast",))
    with (
        use("auto"),
        pytest.raises(KernelError, match=r"outer cannot run as chosen \(this architecture has no kernel\)"),
    ):
        rig.outer(THERE)
    with use("covered"):
        assert rig.ran(THERE) == SMALL
    assert rig.outer.calls == {"reference": 1}, "the body of an op without kernels is plain PyTorch and counted as such"


def test_covered_is_strict_where_there_are_kernels(rig: SimpleNamespace) -> None:
    rig.prefer(outer=("even",))
    with use("covered"), pytest.raises(KernelError, match="an odd number of rows"):
        rig.outer(THERE)


@pytest.mark.parametrize(
    ("named", "x", "why"),
    [
        ({"outer": "even"}, THERE, "an odd number of rows"),
        ({"outer": "even"}, HERE, "x is on cpu"),
        ({"outer": "unfused", "inner": "fast"}, HERE, "x is on cpu"),
    ],
)
def test_a_forced_choice_never_falls_back(named: Mapping[str, str], x: Tensor, why: str, rig: SimpleNamespace) -> None:
    rig.prefer(outer=("even", "unfused"), inner=("fast",))
    with use("auto", **named), pytest.raises(KernelError, match=why):
        rig.outer(x)


def test_reference_by_name_is_plain_pytorch_all_the_way_down_and_unfused_is_not(rig: SimpleNamespace) -> None:
    rig.prefer(outer=("even",), inner=("fast",))
    with use("auto", outer="reference"):
        assert rig.ran(THERE) == BODIES
    with use("auto", outer="unfused"):
        assert rig.ran(THERE) == SMALL
    assert rig.outer.calls == {"reference": 1, "unfused": 1}


def test_unfused_for_all_takes_the_ops_that_can_be(rig: SimpleNamespace) -> None:
    rig.prefer(outer=("even", "unfused"), inner=("fast",))
    with use("unfused"):
        assert rig.ran(THERE.new_empty(4, 4)) == SMALL
    rig.prefer(outer=("even",), inner=("fast",))
    with use("unfused"):
        assert rig.ran(THERE.new_empty(4, 4)) == ["outer even"]
    rig.prefer(inner=("fast",))
    with use("unfused"):
        assert rig.ran(THERE) == SMALL
    assert rig.outer.calls == {"unfused": 1, "even": 1, "reference": 1}


def test_the_innermost_choice_counts_and_a_star_forgets(rig: SimpleNamespace) -> None:
    rig.prefer(outer=("even", "unfused"), inner=("fast",))
    with use("auto", inner="reference"):
        assert rig.ran(THERE) == BODIES
        with use(inner="fast"):
            assert rig.ran(THERE) == SMALL
        with use("auto"):
            assert rig.ran(THERE) == SMALL
        with pure():
            assert rig.ran(THERE) == BODIES
        with use(outer="reference", inner="fast"):
            assert rig.ran(THERE) == BODIES
    with use(inner="fast"):  # nothing was said of `outer`
        assert rig.ran(THERE) == SMALL
    assert rig.ran(THERE) == BODIES


def test_what_an_engine_is_told_lies_beneath_what_is_said_around_it(rig: SimpleNamespace) -> None:
    rig.prefer(outer=("even", "unfused"), inner=("fast",))
    for outside, wanted in ((pure(), BODIES), (use(outer="unfused"), SMALL), (use(inner="reference"), BODIES)):
        with outside, under({"*": "auto"}):
            assert rig.ran(THERE) == wanted
    with under({"*": "auto"}):
        assert rig.ran(THERE.new_empty(4, 4)) == ["outer even"]


def test_a_choice_is_of_the_thread_that_made_it(rig: SimpleNamespace) -> None:
    rig.prefer(outer=("even", "unfused"), inner=("fast",))
    seen: list[list[str]] = []
    with use("auto"):
        thread = Thread(target=lambda: seen.append(rig.ran(THERE)))
        thread.start()
        thread.join()
        assert seen == [BODIES]
        assert rig.ran(THERE) == SMALL


def test_a_choice_ends_with_its_block_also_by_an_error(rig: SimpleNamespace) -> None:
    rig.prefer(outer=("even",))
    with pytest.raises(KernelError), use("auto"):
        rig.outer(THERE)
    assert rig.ran(THERE) == BODIES


def test_arguments_by_keyword(rig: SimpleNamespace) -> None:
    rig.prefer(outer=("even",))
    with use("auto"), pytest.raises(KernelError, match=r"odd.*got float32\[3, 4\] on cuda:0"):
        rig.outer(x=THERE)
    with use("auto"):
        rig.outer(x=THERE.new_empty(2, 4))
    assert rig.outer.calls == {"even": 1}


@pytest.mark.parametrize(
    ("choices", "why"),
    [
        ({"rms_nrom": "auto"}, "no such op; got rms_nrom; wanted rms_norm"),
        ({"rms_norm": "fastest"}, "no such choice for rms_norm; got fastest; wanted auto or covered or reference or"),
        ({"*": "even"}, r"no such choice for \*; got even"),
        ({"zzz": "auto"}, r"no such op; got zzz; wanted [a-z_]+ or .* write_kv or \*"),
    ],
)
def test_a_choice_that_does_not_exist_is_refused_at_once(choices: Mapping[str, str], why: str) -> None:
    with pytest.raises(KernelError, match=why), use(choices):
        raise AssertionError("the block ran")


def test_the_explanation_names_what_runs_and_every_reason(rig: SimpleNamespace) -> None:
    rig.prefer(outer=("even", "unfused"), inner=("fast",))
    with use("auto"):
        said = rig.outer.explain(THERE)
    assert said == ("outer", "unfused", {"even": "an odd number of rows", "reference": "not the choice"})
    assert rig.outer.explain(THERE).runs == "reference"
    with use(outer="even"):
        assert rig.outer.explain(THERE).runs is None
    assert not rig.outer.calls


def test_a_watcher_is_told_of_the_outermost_ops_whatever_they_run_as(rig: SimpleNamespace) -> None:
    rig.prefer(outer=("even", "unfused"), inner=("fast",))
    told: list[tuple[str, str]] = []

    def listener(one: Op[..., Tensor], name: str, given: tuple[Tensor, ...], result: Tensor) -> None:
        assert given[0] is result
        told.append((one.name, name))

    with watching(listener):
        assert rig.ran(THERE) == BODIES
        with use("auto"):
            assert rig.ran(THERE) == SMALL
        rig.inner(HERE)
    with pure(), watching(listener):
        assert rig.ran(THERE) == BODIES
    assert told == [("outer", "reference"), ("outer", "unfused"), ("inner", "reference"), ("outer", "reference")]
    assert rig.ran(THERE) == BODIES
    assert len(told) == 4


def test_two_ops_or_implementations_of_one_name_are_refused(rig: SimpleNamespace) -> None:
    def outer(x: Tensor) -> Tensor:
        return x

    with pytest.raises(AssertionError, match="two ops outer"):
        op(outer)
    with pytest.raises(AssertionError, match="outer has an implementation even"):
        rig.outer.impl("even", accepts=even)


def test_counts_are_by_op_and_implementation(rig: SimpleNamespace) -> None:
    forget_counts()
    rig.ran(HERE)
    rig.ran(HERE)
    assert counts() == {"outer": {"reference": 2}, "inner": {"reference": 2}}
    forget_counts()
    assert counts() == {}


def test_an_op_looks_like_its_function() -> None:
    from dsv4.ops.norm import rms_norm

    assert isinstance(rms_norm, Op)
    assert rms_norm.__name__ == "rms_norm"
    assert "rounding at the end" in (rms_norm.__doc__ or "")
    assert rms_norm.reference.__name__ == "rms_norm"


def test_a_call_costs_less_than_a_microsecond_or_two_more_than_the_function() -> None:
    """About a quarter of one where nobody is in the way; a loaded machine gets some patience."""

    def plain(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return x

    made, x = Op(plain), HERE

    def cost(function: Callable[..., Tensor]) -> float:
        return min(timeit.repeat(lambda: function(x, x, 1e-6), number=2000, repeat=20)) / 2000

    assert cost(made) - cost(plain) < 2e-6


# --- the real ones ---------------------------------------------------------------------------------------------------


def decorated() -> set[str]:
    """Names under `@op` in the files of the room."""
    found = set()
    for path in Path(registry.__file__).parent.glob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and "op" in map(ast.unparse, node.decorator_list):
                found.add(node.name)
    return found


def test_every_op_of_the_room_is_known() -> None:
    assert all_ops().keys() == decorated()
    assert len(decorated()) > 25


def test_what_an_architecture_prefers_are_ops() -> None:
    for rows in kernels.PREFER.values():
        assert rows.keys() <= all_ops().keys()
        assert all(rows.values())


def test_importing_the_kernels_takes_no_torch_and_no_cuda() -> None:
    script = "import sys, dsv4.kernels; print(*(name for name in ('torch', 'cuda', 'numpy') if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, check=True, text=True)
    assert done.stdout.split() == []


@pytest.mark.parametrize("architecture", kernels.PREFER)
def test_the_explanation_of_all_ops_has_a_line_for_each(architecture: str) -> None:
    kernels.install()
    lines = {line.op: line for line in kernels.explain(architecture)}
    assert lines.keys() == all_ops().keys()
    assert lines["pool"].runs is None
    assert lines["rms_norm_quant"].others["reference"] == "only if asked for by name"


# --- through the program ---------------------------------------------------------------------------------------------


def spoken(llm: LLM) -> list[int]:
    prompt = llm.prompt([{"role": "user", "content": "Hi"}])
    return [delta.token for delta in llm.generate(prompt, Sampling(temperature=0, max_tokens=4))]


def test_an_engine_runs_as_its_options_say() -> None:
    wanted = spoken(LLM.load())
    forget_counts()
    llm = LLM.load(options=EngineOptions(kernels={"*": "auto", "rms_norm": "unfused"}))
    assert ("kernels", "auto; rms_norm=unfused; on a CPU the references") in llm.resolved.facts
    assert spoken(llm) == wanted
    assert set(counts()["rms_norm"]) == {"unfused"}
    assert set(counts()["rope"]) == {"reference"}
    forget_counts()
    with pure():
        assert spoken(llm) == wanted
    assert set(counts()["rms_norm"]) == {"reference"}


def test_the_default_is_the_references() -> None:
    assert EngineOptions().choices == {"*": "reference"}
    assert EngineOptions(kernels={"rope": "fused"}).choices == {"*": "reference", "rope": "fused"}
    assert hash(EngineOptions(kernels={"rope": "fused"})) == hash(EngineOptions())
    assert EngineOptions(kernels={"rope": "fused"}) != EngineOptions()


def test_a_wrong_choice_is_found_before_the_weights_are_read() -> None:
    read: list[LoadProgress] = []
    with pytest.raises(KernelError, match="no such op; got ropes; wanted rope"):
        LLM.load(options=EngineOptions(kernels={"ropes": "auto"}), progress=read.append)
    assert {step.stage for step in read} == {"headers"}


def test_the_command_line_forces_by_name() -> None:
    from dsv4.cli.options import choices

    assert choices("covered", None) == {"*": "covered"}
    assert choices("reference", ["rope=fused", "*=auto"]) == {"rope": "fused", "*": "auto"}
    for wrong in ("rope", "=fused", "rope="):
        with pytest.raises(ConfigError, match=r"--force; got .*wanted OP=CHOICE"):
            choices("reference", [wrong])


def test_known_choices_pass() -> None:
    check_choices({"*": "covered", "rms_norm": "unfused", "rope": "auto"})
