"""From a source to its cubin: declarations, headers, keys, figures, and in which order the places are asked."""

from __future__ import annotations

import json
import re
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from dsv4.errors import KernelError
from dsv4.kernels import build, compiler, prebuilt, source
from dsv4.kernels.architectures import ARCHITECTURES
from dsv4.kernels.build import Places, find
from dsv4.kernels.cache import entry_name
from dsv4.kernels.compiler import compile_source
from dsv4.kernels.entry import pack, unpack
from dsv4.kernels.figures import Figures, _sections, figures, parameters, serialised
from dsv4.kernels.launch import Kernel
from dsv4.kernels.source import read, sources
from tests.kernel_support import SPILL, forget, places, ran

WHOLE = '// arch: sm_90a\nextern "C" __global__ void k(float* x) { x[0] = 1; }\n'


@pytest.fixture(autouse=True)
def _fresh() -> None:
    forget()


# --- sources -------------------------------------------------------------------------------------------------------


def test_headers_stand_once_where_they_are_first_met(tmp_path: Path) -> None:
    texts = {
        "a.cu": '// arch: sm_90a\n#include "common/x.cuh"\n#  include "common/y.cuh" // why\nint a;\n',
        "common/x.cuh": '#pragma once\n#include "common/y.cuh"\nint x;\n',
        "common/y.cuh": "#pragma once\nint y;",
    }
    assert read("a.cu", places(tmp_path, texts).csrc).text.splitlines() == [
        '#line 1 "a.cu"',
        "// arch: sm_90a",
        '#line 1 "common/x.cuh"',
        "",
        '#line 1 "common/y.cuh"',
        "",
        "int y;",
        '#line 3 "common/x.cuh"',
        "int x;",
        '#line 3 "a.cu"',
        "",
        "int a;",
    ]


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        ({}, "kernel source a.cu wants a.cu; got no such file; wanted one below csrc/"),
        ({"a.cu": '#include "common/x.cuh"\n'}, "kernel source a.cu wants common/x.cuh; got no such file"),
        ({"a.cu": '#include "../../secret"\n'}, "kernel source a.cu wants ../../secret"),
        (
            {"a.cu": "int a;\n"},
            "kernel source a.cu; got no declaration; wanted a line '// arch: …' with some of sm_90a,",
        ),
        ({"a.cu": "// arch:\n"}, "got no declaration"),
        ({"a.cu": "// arch: sm_90a sm_89\n"}, "got sm_90a sm_89; wanted"),
        ({"a.cu": " // arch: sm_90a\n"}, "got no declaration"),
    ],
)
def test_a_source_that_cannot_be_read_is_named(texts: dict[str, str], words: str, tmp_path: Path) -> None:
    (tmp_path.parent / "secret").write_text("")
    with pytest.raises(KernelError, match=re.escape(words)):
        read("a.cu", places(tmp_path, texts).csrc)


def test_all_sources_are_found(tmp_path: Path) -> None:
    found = sources(places(tmp_path).csrc)
    assert [(one.file, one.architectures) for one in found] == [("copy.cu", tuple(ARCHITECTURES))]


# --- keys ----------------------------------------------------------------------------------------------------------

CHANGES = {
    "the source": ("copy.cu", "from[at]", "from[at] + 0"),
    "a header": ("common/move.cuh", "x * ONE", "ONE * x"),
    "a header of a header": ("common/deeper.cuh", "1.0f", "2.0f"),
    "a comment of a header": ("common/deeper.cuh", "#define", "// one\n#define"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_key_changes_with(change: str, tmp_path: Path) -> None:
    where = places(tmp_path)
    first = find("copy.cu", "sm_90a", where)
    file, old, new = CHANGES[change]
    path = where.csrc / file
    path.write_text(path.read_text().replace(old, new))
    second = find("copy.cu", "sm_90a", where)
    assert [first.origin, second.origin] == ["compiled", "compiled"]
    assert first.entry.digest != second.entry.digest
    assert where.cache is not None
    assert len(list(where.cache.iterdir())) == 2


def test_the_key_changes_with_flags_architecture_compiler_and_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = read("copy.cu", places(tmp_path).csrc)
    names = {entry_name(one, "sm_90a", "13.0"), entry_name(one, "sm_90a", "13.1"), entry_name(one, "sm_120a", "13.0")}
    names.add(entry_name(one._replace(file="x/copy.cu"), "sm_90a", "13.0"))
    monkeypatch.setitem(source.FLAGS, "fma", True)
    names.add(entry_name(one, "sm_90a", "13.0"))
    assert len(names) == 5


def test_the_key_does_not_change_with_a_header_that_is_not_included(tmp_path: Path) -> None:
    where = places(tmp_path)
    before = read("copy.cu", where.csrc)
    (where.csrc / "common/other.cuh").write_text("#pragma once\n")
    assert read("copy.cu", where.csrc) == before


# --- compiling -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_cubin_is_of_the_architecture_that_was_asked_for(architecture: str, tmp_path: Path) -> None:
    """Its number stands in the ELF flags, at byte 1."""
    cubin = find("copy.cu", architecture, places(tmp_path)).entry.cubin
    assert cubin[:4] == b"\x7fELF"
    assert int.from_bytes(cubin[0x30:0x34], "little") >> 8 & 0xFF == int(architecture[3:-1])


def test_the_same_text_gives_the_same_cubin(tmp_path: Path) -> None:
    one = read("copy.cu", places(tmp_path).csrc)
    assert compile_source(one, "sm_90a") == compile_source(one, "sm_90a")


def test_an_architecture_that_is_not_declared_is_refused(tmp_path: Path) -> None:
    with pytest.raises(KernelError, match=r"kernel source a\.cu; got sm_100a; wanted sm_90a"):
        find("a.cu", "sm_100a", places(tmp_path, {"a.cu": WHOLE}))


def test_an_error_has_file_architecture_and_the_compilers_words(tmp_path: Path) -> None:
    texts = {"a.cu": '// arch: sm_90a sm_120a\n#include "common/x.cuh"\n', "common/x.cuh": "#pragma once\nint x = y;\n"}
    with pytest.raises(KernelError) as caught:
        find("a.cu", "sm_120a", places(tmp_path, texts))
    message = str(caught.value)
    assert message.startswith("kernel source a.cu does not compile for sm_120a: ")
    assert 'common/x.cuh(2): error: identifier "y" is undefined' in message


def test_an_error_of_the_assembler_is_told_too(tmp_path: Path) -> None:
    """What only sm_90a has, asked of another: ptxas refuses and not the front end."""
    text = '// arch: sm_120a\nextern "C" __global__ void k() { asm volatile("wgmma.fence.sync.aligned;"); }\n'
    with pytest.raises(KernelError, match=r"a\.cu does not compile for sm_120a: (.|\n)*wgmma"):
        find("a.cu", "sm_120a", places(tmp_path, {"a.cu": text}))


def test_there_is_no_header_but_ours(tmp_path: Path) -> None:
    with pytest.raises(KernelError, match="cuda_fp8"):
        find("a.cu", "sm_90a", places(tmp_path, {"a.cu": "// arch: sm_90a\n#include <cuda_fp8.h>\n"}))


@pytest.mark.parametrize("hidden", ["cuda.bindings", "cuda.core"])
def test_a_missing_package_is_said_with_the_remedy(
    hidden: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, hidden, None)
    for cached in (compiler.compiler, compiler._core):
        cached.cache_clear()
    with pytest.raises(KernelError, match=rf"no {hidden}.*; wanted cuda-core and NVRTC; pip install"):
        find("copy.cu", "sm_90a", places(tmp_path))


# --- figures -------------------------------------------------------------------------------------------------------

MANY = """// arch: sm_90a sm_120a
__device__ __noinline__ float twice(float a) { return a + a; }
extern "C" __global__ void call(float* x) { x[0] = twice(x[1]); }
extern "C" __global__ void share(const float* x, int n, float* y, long long m, float a) {
  __shared__ float s[300];
  s[threadIdx.x] = x[threadIdx.x] + n;
  __syncthreads();
  y[threadIdx.x] = s[threadIdx.x ^ 1] * a + m;
}
extern "C" __global__ void stack(float* x, int n) {
  float a[40];
  for (int i = 0; i < 40; i++) a[i] = x[i];
  for (int i = 0; i < n; i++) a[(int)x[i]] += 1;
  for (int i = 0; i < 40; i++) x[i] = a[i];
}
extern "C" __global__ void nothing() { int unused; }
"""


@pytest.mark.parametrize("architecture", ["sm_90a", "sm_120a"])
def test_figures_are_those_of_each_kernel(architecture: str, tmp_path: Path) -> None:
    entry = find("many.cu", architecture, places(tmp_path, {"many.cu": MANY})).entry
    assert entry.kernels.keys() == {"call", "share", "stack", "nothing"}
    assert entry.functions["_Z5twicef"].registers is None
    assert (entry.kernels["share"].shared, entry.kernels["stack"].shared) == (1200, 0)
    assert (entry.kernels["share"].stack, entry.kernels["stack"].stack) == (0, 160)
    assert entry.kernels["share"].parameters == (8, 4, 8, 8, 4)
    assert entry.kernels["nothing"].parameters == ()
    assert [name for name, of in entry.functions.items() if of.spills] == []
    assert all(0 < of.registers < 64 for of in entry.kernels.values() if of.registers is not None)
    assert 'many.cu(16): warning #177-D: variable "unused"' in entry.remarks
    assert "ptxas" not in entry.remarks


@pytest.mark.parametrize("architecture", ["sm_90a", "sm_100a", "sm_120a"])
def test_registers_and_stack_of_the_log_are_those_of_the_cubin(architecture: str, tmp_path: Path) -> None:
    """ELF attributes EIATTR_REGCOUNT and EIATTR_FRAME_SIZE of `.nv.info`, by symbol, against ptxas' words."""
    text = MANY.replace("sm_90a sm_120a", architecture) + SPILL.split("\n", 1)[1]
    entry = find("many.cu", architecture, places(tmp_path, {"many.cu": text})).entry
    (tmp_path / "cubin").write_bytes(entry.cubin)
    symbols = subprocess.run(
        ["readelf", "-s", "-W", tmp_path / "cubin"], capture_output=True, text=True, check=True
    ).stdout
    names = {int(line.split(":")[0]): line.split()[-1] for line in symbols.splitlines() if " FUNC " in line}
    info = dict(_sections(entry.cubin))[".nv.info"]
    found: dict[str, dict[int, int]] = {}
    for place in range(0, len(info), 12):
        attribute, symbol, value = (
            info[place + 1],
            *(int.from_bytes(info[place + at : place + at + 4], "little") for at in (4, 8)),
        )
        found.setdefault(names.get(symbol, ""), {})[attribute] = value
    for name, figure in entry.kernels.items():
        assert (found[name][0x2F], found[name][0x11]) == (figure.registers, figure.stack), name


def test_a_spill_is_found(tmp_path: Path) -> None:
    figure = find("spill.cu", "sm_90a", places(tmp_path, {"spill.cu": SPILL})).entry.kernels["spill"]
    assert figure.spills
    assert figure.registers == 64
    assert min(figure.spill_stores, figure.spill_loads, figure.stack) > 100


OLDER_LOG = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'k' for 'sm_90a'
ptxas info    : Function properties for k
    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 24 registers, used 1 barriers, 1024 bytes smem, 8 bytes cumulative stack size
"""


def test_the_log_of_an_older_compiler_is_read_too(tmp_path: Path) -> None:
    cubin = find("k.cu", "sm_90a", places(tmp_path, {"k.cu": WHOLE})).entry.cubin
    assert figures(OLDER_LOG, cubin) == {"k": Figures(24, 1024, 8, 4, 12, (8,))}


@pytest.mark.parametrize("log", ["", OLDER_LOG.replace("'k'", "'other'").replace("for k", "for other")])
def test_a_log_that_does_not_match_the_cubin_is_no_figures(log: str, tmp_path: Path) -> None:
    cubin = find("k.cu", "sm_90a", places(tmp_path, {"k.cu": WHOLE})).entry.cubin
    with pytest.raises(ValueError, match="the cubin holds"):
        figures(log, cubin)


@pytest.mark.parametrize("keep", [0, 10, 63, 200])
def test_a_damaged_cubin_is_a_value_error(keep: int, tmp_path: Path) -> None:
    cubin = find("k.cu", "sm_90a", places(tmp_path, {"k.cu": WHOLE})).entry.cubin
    with pytest.raises(ValueError, match=r"cubin|not found"):
        parameters(cubin[:keep])


# --- places --------------------------------------------------------------------------------------------------------


def test_ready_made_goes_before_the_cache_and_the_cache_before_compiling(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where, origins = places(tmp_path), []
    for step in ("compile", "cache", "ready-made"):
        if step == "ready-made":
            prebuilt.make(where.prebuilt, where.csrc)
        forget()
        if step != "compile":
            monkeypatch.setattr(build, "compile_source", None)  # a call would fail
        origins.append(find("copy.cu", "sm_90a", where))
    assert [found.origin for found in origins] == ["compiled", "cache", "prebuilt"]
    assert origins[0].entry == origins[1].entry == origins[2].entry


def test_a_process_asks_the_disk_once(tmp_path: Path) -> None:
    where = places(tmp_path)
    assert find("copy.cu", "sm_90a", where) is find("copy.cu", "sm_90a", where)


def test_a_ready_made_cubin_needs_no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    where = places(tmp_path)
    assert prebuilt.make(where.prebuilt, where.csrc) == 4
    monkeypatch.setattr(build, "compiler", None)
    assert find("copy.cu", "sm_103a", replace(where, cache=None)).origin == "prebuilt"


@pytest.mark.parametrize("change", CHANGES)
def test_a_ready_made_cubin_of_another_text_does_not_count(change: str, tmp_path: Path) -> None:
    where = places(tmp_path)
    prebuilt.make(where.prebuilt, where.csrc)
    file, old, new = CHANGES[change]
    path = where.csrc / file
    path.write_text(path.read_text().replace(old, new))
    assert find("copy.cu", "sm_90a", where).origin == "compiled"


def test_a_ready_made_cubin_of_other_flags_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    where = places(tmp_path)
    prebuilt.make(where.prebuilt, where.csrc)
    monkeypatch.setitem(source.FLAGS, "fma", True)
    assert find("copy.cu", "sm_90a", where).origin == "compiled"


def test_a_damaged_ready_made_cubin_is_said_and_built(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    where = places(tmp_path)
    prebuilt.make(where.prebuilt, where.csrc)
    path = where.prebuilt / "copy.sm_90a.cubin"
    path.write_bytes(path.read_bytes()[:-1])
    assert find("copy.cu", "sm_90a", where).origin == "compiled"
    assert "copy.sm_90a.cubin is damaged (its checksum does not match)" in capfd.readouterr().err


def test_an_entry_survives_its_bytes(tmp_path: Path) -> None:
    entry = find("many.cu", "sm_90a", places(tmp_path, {"many.cu": MANY})).entry
    assert unpack(pack(entry)) == entry


def test_too_many_bytes_make_no_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    where = places(tmp_path)
    monkeypatch.setattr(prebuilt, "LIMIT", 100)
    with pytest.raises(KernelError, match=r"all cubins of the wheel together; got .* bytes; wanted at most 100"):
        prebuilt.make(where.prebuilt, where.csrc)


# --- the kernels themselves ----------------------------------------------------------------------------------------

BOUND = """
import json, pkgutil
import dsv4.kernels
from dsv4.kernels.launch import KERNELS
for module in pkgutil.iter_modules(dsv4.kernels.__path__, "dsv4.kernels."):
    __import__(module.name)
print(json.dumps([(kernel.file, kernel.name, kernel.signature) for kernel in KERNELS]))
"""
REAL = [(one.file, architecture) for one in sources() for architecture in one.architectures]
PAIRS = [pytest.param(*pair, marks=[] if pair[1] == "sm_90a" else pytest.mark.slow) for pair in REAL]


@pytest.fixture(scope="module")
def bound() -> list[tuple[str, str, str]]:
    """File, name and signature of all kernels that the room constructs when it is imported."""
    return [(file, name, signature) for file, name, signature in json.loads(ran(BOUND)[0])]


@pytest.mark.parametrize(("file", "architecture"), PAIRS)
def test_every_declared_pair_compiles_without_spills_and_fits_its_signatures(
    file: str, architecture: str, bound: list[tuple[str, str, str]], pytestconfig: pytest.Config
) -> None:
    """Kept between runs: what has not changed is not compiled again."""
    assert pytestconfig.cache is not None
    entry = find(file, architecture, Places(cache=pytestconfig.cache.mkdir("kernels"))).entry
    assert [name for name, figure in entry.functions.items() if figure.spills] == []
    assert serialised(entry.remarks) == []
    signatures = {name: signature for source, name, signature in bound if source == file}
    assert entry.kernels.keys() == signatures.keys()
    for name, signature in signatures.items():
        Kernel(file, name, signature).check(entry)


def test_every_kernel_of_the_room_has_its_source(bound: list[tuple[str, str, str]]) -> None:
    assert {file for file, *_ in bound} <= {file for file, _ in REAL}
