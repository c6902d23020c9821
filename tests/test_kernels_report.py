"""`dsv4 kernels`: what every kernel takes, and an exit code that CI can go by."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from dsv4.cli.main import main
from dsv4.errors import KernelError
from dsv4.kernels import build
from dsv4.kernels.figures import serialised
from tests.kernel_support import SERIAL, SOURCES, SPILL, forget, places

Run = Callable[..., tuple[int, str, str]]
SHARE = """// arch: sm_90a sm_120a
extern "C" __global__ void share(float* x) {
  __shared__ float s[1000];
  s[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  x[threadIdx.x] = s[threadIdx.x ^ 1];
}
"""


@pytest.fixture
def kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Writes these sources and runs `dsv4 kernels` over them: exit code, stdout, stderr."""

    def run(sources: dict[str, str], *options: str) -> tuple[int, str, str]:
        where = places(tmp_path, sources)
        where.csrc.mkdir(exist_ok=True)
        forget()
        monkeypatch.setattr(build, "Places", lambda: where)
        with pytest.raises(SystemExit) as stop:
            main(["kernels", *options])
        return int(stop.value.code or 0), *capsys.readouterr()

    return run


def test_a_table_of_all_kernels_and_architectures(kernels: Run) -> None:
    code, out, err = kernels({**SOURCES, "share.cu": SHARE})
    assert (code, err) == (0, "")
    rows = {line.split("│")[1].strip(): line for line in out.splitlines() if line.count("│") == 6}
    assert rows["share"].count("shared 4,000") == 2
    assert rows["share.cu"].count("compiled") == rows["share.cu"].count("not for it") == 2
    assert rows["copy.cu"].count("compiled") == 4
    assert "sm_120a: 2 kernels of 2 sources" in out
    assert "no kernel for" in out


def test_the_second_time_all_comes_from_the_cache(kernels: Run) -> None:
    kernels(SOURCES)
    assert kernels(SOURCES)[1].count("cache") == 4


def test_only_what_is_asked_for(kernels: Run) -> None:
    _, out, _ = kernels({**SOURCES, "share.cu": SHARE}, "copy.cu", "--arch", "sm_100a", "--arch", "sm_90a")
    assert "share" not in out.split("registers of a thread")[0]
    assert "sm_120a" not in out
    assert "sm_100a: 1 kernels of 1 sources" in out


def test_a_spill_is_shown_and_fails(kernels: Run) -> None:
    code, out, err = kernels({**SOURCES, "spill.cu": SPILL})
    assert code == 1
    assert err == "spill.cu for sm_90a: spill spills\n"
    assert re.search(r"spill +│ 64 stack \d+ spills \d+, \d+ ", out)


def test_products_that_wait_for_each_other_are_shown_and_fail(kernels: Run) -> None:
    code, out, err = kernels({**SOURCES, "serial.cu": SERIAL})
    assert code == 1
    assert err == "serial.cu for sm_90a: the products of early are serialised\n"
    assert "NVRTC on serial.cu:\nptxas info    : (C75" in out


def test_what_ptxas_says_of_other_things_is_no_fault() -> None:
    told = "ptxas info    : (C7514) wgmma.mma_async instructions are serialized due to x in the function 'k' in line 0"
    assert serialised(told) == ["k"]
    assert serialised("ptxas info    : (C7508) a remark on setmaxnreg in function 'k'\nx.cu(2): warning #177-D") == []


def test_json_has_every_figure(kernels: Run) -> None:
    code, out, _ = kernels({**SOURCES, "spill.cu": SPILL, "share.cu": SHARE}, "--json")
    told = json.loads(out)
    assert code == 1
    by_pair = {(pair["source"], pair["architecture"]): pair for pair in told["pairs"]}
    assert len(by_pair) == 4 + 1 + 2
    share = by_pair["share.cu", "sm_120a"]
    assert (share["origin"], share["error"], share["kernels"]["share"]["shared"]) == ("compiled", None, 4000)
    assert share["bytes"] > 1000
    spill = by_pair["spill.cu", "sm_90a"]["kernels"]["spill"]
    assert spill["spills"]
    assert spill["registers"] == 64
    assert spill["parameters"] == [8, 4]
    assert told["lacks"].keys() == {"sm_90a", "sm_100a", "sm_103a", "sm_120a"}


def test_one_that_does_not_compile_fails_and_hides_no_other(kernels: Run) -> None:
    code, out, err = kernels({**SOURCES, "broken.cu": "// arch: sm_90a\nint x = y;\n"})
    assert code == 1
    assert err.startswith("kernel source broken.cu does not compile for sm_90a: ")
    assert 'identifier "y" is undefined' in err
    assert "not compiled" in out
    assert out.count("compiled, ") == 4


def test_without_a_compiler_what_is_missing_is_said_once(kernels: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise KernelError(
            "kernels cannot be compiled here", got="no cuda", wanted="cuda-core and NVRTC", do="pip install"
        )

    monkeypatch.setattr(build, "compiler", missing)
    code, out, err = kernels(SOURCES)
    assert code == 1
    assert out.count("not compiled") == 4
    assert err == "kernels cannot be compiled here; got no cuda; wanted cuda-core and NVRTC; pip install\n"


def test_a_warning_of_the_compiler_is_shown(kernels: Run) -> None:
    code, out, _ = kernels({"w.cu": '// arch: sm_90a\nextern "C" __global__ void k() { int unused; }\n'})
    assert code == 0
    assert "NVRTC on w.cu:\nw.cu(2): warning #177-D" in out


def test_no_sources_are_no_fault(kernels: Run) -> None:
    assert kernels({}) == (0, "no kernel sources\n", "")


@pytest.mark.parametrize("options", [("--arch", "sm_89"), ("nowhere.cu",)])
def test_a_name_that_is_none_is_refused_with_those_that_are(options: tuple[str, ...], kernels: Run) -> None:
    code, out, err = kernels(SOURCES, *options)
    assert (code, out) == (1, "")
    assert err.startswith("dsv4: ")
    assert f"got {options[-1]}; wanted " in err
