"""Launching without a GPU: arguments, checks and what the driver is told, by a driver that only pretends."""

from __future__ import annotations

import ctypes
import re
import struct
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dsv4.errors import KernelError
from dsv4.kernels.architectures import ARCHITECTURES, architecture
from dsv4.kernels.build import find
from dsv4.kernels.driver import Function
from dsv4.kernels.launch import Kernel, Launch, need, unfit
from tests.kernel_support import places, pretend_driver, ran


class OnCuda(Tensor):
    """A CPU tensor that says it is on a CUDA device."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    index = 0

    def get_device(self) -> int:
        return self.index


def on_cuda(*shape: int, index: int = 0) -> Tensor:
    x = torch.zeros(*shape).as_subclass(OnCuda)
    x.index = index  # type: ignore[attr-defined]
    return x


# --- arguments -----------------------------------------------------------------------------------------------------


@pytest.fixture
def kernel() -> Kernel:
    return Kernel("some.cu", "work", "l fp i p")


def test_arguments_are_laid_out_as_c_does(kernel: Kernel) -> None:
    x = on_cuda(3)
    assert kernel.fill((-(2**40), 0.5, x, -7, None)) == 0
    place = kernel._place
    assert struct.unpack_from("@qfPiP", place.buffer) == (-(2**40), 0.5, x.data_ptr(), -7, 0)
    start = ctypes.addressof(place.buffer)
    assert [address - start for address in place._pointers] == [0, 8, 16, 24, 32]


def test_each_thread_has_its_own_place(kernel: Kernel) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(lambda: kernel._place.address).result() != kernel._place.address


Y = on_cuda(2, index=1)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((1, 0.5, on_cuda(3), 1), "arguments of kernel some.cu:work; got 4; wanted 5: lfpip"),
        ((2**63, 0.5, None, 1, None), "argument 0 of kernel some.cu:work; got 9223372036854775808; wanted long long"),
        ((1, "x", None, 1, None), "argument 1 of kernel some.cu:work; got 'x'; wanted float"),
        (
            (1, 0.5, torch.zeros(2, 3), 1, None),
            r"argument 2 .* got float32 \[2, 3\] with stride \[3, 1\] on cpu; wanted a",
        ),
        ((1, 0.5, 4096, 1, None), "argument 2 .* got 4096; wanted a CUDA tensor or None"),
        ((1, 0.5, None, 2**31, None), "argument 3 .* got 2147483648; wanted int"),
        ((1, 0.5, None, 1.0, None), "argument 3 .* got 1.0; wanted int"),
        ((1, 0.5, None, torch.tensor(3), None), r"argument 3 .* got int64 \[\] .* on cpu; wanted int"),
        ((1, 0.5, on_cuda(3), 1, Y), "tensors of kernel some.cu:work; got .*; wanted one CUDA device"),
    ],
)
def test_a_wrong_argument_is_named(arguments: tuple[object, ...], words: str, kernel: Kernel) -> None:
    with pytest.raises(KernelError, match=f"^{words}"):
        kernel.fill(arguments)


@pytest.mark.parametrize("signature", ["", "p x", "pp d"])
def test_a_signature_is_of_known_letters(signature: str) -> None:
    with pytest.raises(KernelError, match=r"signature of kernel some\.cu:work"):
        Kernel("some.cu", "work", signature)


def test_no_blocks_launch_nothing(kernel: Kernel) -> None:
    """Without a driver, a device or a source; but not with wrong arguments."""
    kernel(0, 32, 1, 0.5, on_cuda(1), 1, None)
    with pytest.raises(KernelError, match="argument 3"):
        kernel(0, 32, 1, 0.5, None, "many", None)


# --- what a launch may ask for -------------------------------------------------------------------------------------

ALLOWED = Function(handle=None, threads=512, static=1024, shared=200_000)


@pytest.mark.parametrize(
    ("launch", "words"),
    [
        (Launch(1, 1), None),
        (Launch(2**31 - 1, 512, 200_000), None),
        (Launch(32, 32, cluster=16), None),
        (Launch(6, 32, cluster=1), None),
        (Launch(2**31, 32), "grid 2147483648"),
        (Launch(-1, 32), "grid -1"),
        (Launch(1, 513), "block 513; wanted 1 to 512"),
        (Launch(1, 0), "block 0"),
        (Launch(1, 32, 200_001), "smem 200001; wanted at most 200000 beside 1024 static bytes"),
        (Launch(1, 32, -1), "smem -1"),
        (Launch(34, 32, cluster=17), "cluster 17"),
        (Launch(6, 32, cluster=4), "grid 6; wanted a multiple of cluster 4"),
        (Launch(6, 32, cluster=-1), "cluster -1"),
    ],
)
def test_a_launch_is_held_against_what_is_allowed(launch: Launch, words: str | None) -> None:
    why = unfit(launch, ALLOWED)
    assert (why is None) if words is None else words in str(why)


# --- what the driver is told ---------------------------------------------------------------------------------------

WORK = '// arch: sm_90a\nextern "C" __global__ void work(long long l, float f, int* p, int i, int* q) { p[0] = i; }\n'
LAUNCHES = """
import os, sys, threading, pathlib
from contextlib import nullcontext
from dsv4.kernels import driver
from dsv4.kernels.build import Places
from dsv4.kernels.launch import Kernel
from tests.test_kernels_launch import SCENES, on_cuda
driver.current_device = lambda: 0
driver.current_stream = lambda device: 4096 + device
driver.capability = lambda device: (9, 0)
driver.on_device = lambda device: nullcontext(driver.give_context(device))
folder, x, y = pathlib.Path(sys.argv[1]), on_cuda(3), on_cuda(2)
for name, calls in SCENES.items():
    work = Kernel("work.cu", "work", "lfpip", Places(folder / "csrc", folder / "prebuilt", folder / "cache"))
    with open(os.environ["PRETEND_BOOK"], "a") as book:
        print("scene", name, hex(x.data_ptr()), hex(y.data_ptr()), file=book)
    try:
        exec(calls)
    except Exception as error:
        with open(os.environ["PRETEND_BOOK"], "a") as book:
            print("error", error, file=book)
"""
SCENES = {
    "plain": "for _ in range(2): work(5, 64, 2**40, -0.25, x, -7, y)\nwork(5, 64, 3, 1, None, 0, y)",
    "pdl": "work(8, 32, 1, 1, x, 1, y, pdl=True)",
    "cooperative": "work(8, 32, 1, 1, x, 1, y, cooperative=True)",
    "cluster": "work(8, 32, 1, 1, x, 1, y, cluster=4)",
    "alone": "work(8, 32, 1, 1, x, 1, y, cluster=1)",
    "both": "work(8, 32, 1, 1, x, 1, y, cluster=4, pdl=True)",
    "little": "work(8, 32, 1, 1, x, 1, y, smem=48128)",
    "much": "work(8, 32, 1, 1, x, 1, y, smem=48129)",
    "wide": "work(16, 32, 1, 1, x, 1, y, cluster=16)",
    "shrinking": "for smem in (90_000, 60_000, 90_000, 100_000): work(1, 32, 1, 1, x, 1, y, smem=smem)",
    "threads": "threads = [threading.Thread(target=work, args=(n, 32, n, n, x, n, y)) for n in range(1, 9)]\n"
    "[t.start() for t in threads]\n[t.join() for t in threads]",
    "streams": "for stream in (8192, 12288, 8192):\n"
    "    driver.current_stream = lambda device: stream\n    work(1, 32, 1, 1, x, 1, y)\n"
    "driver.current_stream = lambda device: 4096",
    "many": "for n in range(1, 1500): work(n, 32, 1, 1, x, 1, y)\nassert len(work._loaded[0].configurations) < 1025",
    "refused": "work(66666, 32, 1, 0.5, x, 1, None)",
    "unfit": "work(1, 1024, 1, 0.5, x, 1, None)",
    "old": "os.environ['PRETEND_OLD'] = '1'\nwork(1, 32, 1, 0.5, x, 1, None)",
}
Noted = dict[str, list[str]]


@pytest.fixture(scope="module")
def noted(tmp_path_factory: pytest.TempPathFactory) -> Noted:
    """What the driver was told in each scene; the first line has the addresses of x and y."""
    folder = tmp_path_factory.mktemp("driver")
    places(folder, {"work.cu": WORK})
    environment = pretend_driver(folder)
    ran(LAUNCHES, folder, **environment)
    scenes: Noted = {}
    for line in Path(environment["PRETEND_BOOK"]).read_text().splitlines():
        if line.startswith("scene "):
            _, name, line = line.split(" ", 2)
            scenes[name] = []
        scenes[name].append(line)
    return scenes


@pytest.mark.slow
def test_the_driver_gets_grid_block_stream_and_arguments(noted: Noted) -> None:
    addresses, *lines = noted["plain"]
    x, y = addresses.split()
    plain = "launch work grid 5 1 1 block 64 1 1 shared 0 stream 0x1000"
    assert lines == [
        "context 100",
        "capture 0 to 2",
        "load",
        "capture 2 to 0",
        f"{plain} with {2**40} -0.25 {x} -7 {y}",
        f"{plain} with {2**40} -0.25 {x} -7 {y}",
        f"{plain} with 3 1 (nil) 0 {y}",
    ]


@pytest.mark.parametrize(
    ("scene", "wanted"),
    [
        ("pdl", ["grid 8 1 1 block 32 1 1 shared 0 stream 0x1000 attribute 6=1"]),
        ("cooperative", ["grid 8 1 1 block 32 1 1 shared 0 stream 0x1000 attribute 2=1"]),
        ("cluster", ["grid 8 1 1 block 32 1 1 shared 0 stream 0x1000 attribute 4=4"]),
        ("alone", ["grid 8 1 1 block 32 1 1 shared 0 stream 0x1000 attribute 4=1"]),
        ("both", ["grid 8 1 1 block 32 1 1 shared 0 stream 0x1000 attribute 4=4 attribute 6=1"]),
        ("little", ["grid 8 1 1 block 32 1 1 shared 48128 stream 0x1000"]),  # and 1 KiB of its own: all unasked
        ("much", ["set 8 to 48129", "grid 8 1 1 block 32 1 1 shared 48129 stream 0x1000"]),
        ("wide", ["set 14 to 1", "grid 16 1 1 block 32 1 1 shared 0 stream 0x1000 attribute 4=16"]),
    ],
)
def test_the_driver_gets_what_a_launch_asks_for(scene: str, wanted: list[str], noted: Noted) -> None:
    """Numbers of CUlaunchAttributeID and CUfunction_attribute, by CUDA's reference."""
    assert [re.sub(r"launch work | with .*", "", line) for line in noted[scene][4:]] == wanted


def test_less_shared_memory_does_not_take_back_more(noted: Noted) -> None:
    asked = [int(line.split()[-1]) for line in noted["shrinking"] if line.startswith("set 8")]
    assert min(asked) == 90_000
    assert asked[-1] == 100_000


def test_a_thread_lays_out_its_own_arguments(noted: Noted) -> None:
    lines = [line for line in noted["threads"] if line.startswith("launch")]
    found = [re.findall(r"grid (\d+) .* with (\d+) (\d+) \S+ (\d+) ", line)[0] for line in lines]
    assert sorted(int(match[0]) for match in found) == list(range(1, 9))
    assert all(len(set(match)) == 1 for match in found)


def test_each_launch_goes_to_the_stream_that_is_current(noted: Noted) -> None:
    streams = [line.split(" stream ")[1].split()[0] for line in noted["streams"] if line.startswith("launch")]
    assert streams == ["0x2000", "0x3000", "0x2000"]


def test_a_new_thread_is_given_a_context_and_an_old_one_keeps_its_own(noted: Noted) -> None:
    assert noted["plain"].count("context 100") == 1
    assert noted["pdl"].count("context 100") == 0
    assert noted["threads"].count("context 100") == 8


def test_configurations_are_not_kept_without_end(noted: Noted) -> None:
    assert len(noted["many"]) == 1 + 3 + 1499


@pytest.mark.parametrize(
    ("scene", "words"),
    [
        (
            "refused",
            r"kernel work.cu:work with \(1, 0.5, float32 \[3\] with stride \[1\] on cpu, 1, None\) as Launch\(grid=6",
        ),
        ("refused", r"was not launched; got CUDA_ERROR_INVALID_VALUE \(invalid argument\)$"),
        ("unfit", "launch of kernel work.cu:work; got block 1024; wanted 1 to 512"),
        ("old", r"kernel work.cu:work, made for sm_90a by NVRTC [\d.]+, cannot be loaded on cuda:0"),
        ("old", "cuLibraryLoadData; got CUDA_ERROR_NO_BINARY_FOR_GPU"),
    ],
)
def test_a_launch_that_fails_names_the_kernel_and_all_that_was_asked(scene: str, words: str, noted: Noted) -> None:
    assert noted[scene][-1].startswith("error ")
    assert re.search(words, noted[scene][-1]), noted[scene][-1]


def test_a_failed_load_leaves_the_capture_mode_as_it_was(noted: Noted) -> None:
    assert [line for line in noted["old"] if line.startswith("capture")] == ["capture 0 to 2", "capture 2 to 0"]


# --- against the cubin ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "signature", "words"),
    [
        ("copy", "ppl", None),
        ("copy", "ppi", r"signature of kernel copy.cu:copy; got ppi, so 8\+8\+4 bytes; wanted 8\+8\+8, as compiled"),
        ("copy", "pp", r"wanted 8\+8\+8"),
        ("copied", "ppl", "kernel copy.cu:copied; got no such kernel; wanted copy"),
    ],
)
def test_a_signature_is_held_against_the_compiled_kernel(
    name: str, signature: str, words: str | None, tmp_path: Path
) -> None:
    entry = find("copy.cu", "sm_90a", places(tmp_path)).entry
    kernel = Kernel("copy.cu", name, signature)
    if words is None:
        kernel.check(entry)
    else:
        with pytest.raises(KernelError, match=words):
            kernel.check(entry)


def test_every_capability_of_the_table_has_its_architecture() -> None:
    assert {name: architecture(known.capability) for name, known in ARCHITECTURES.items()} == {
        n: n for n in ARCHITECTURES
    }
    with pytest.raises(KernelError, match=r"got 8.9; wanted 9.0, 10.0, 10.3, 12.0"):
        architecture((8, 9))


# --- need ----------------------------------------------------------------------------------------------------------

X = torch.zeros(4, 6, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    "wanted",
    [
        {},
        {"shape": (4, 6), "dtype": torch.bfloat16, "device": "cpu"},
        {"shape": (None, 6), "dtype": (torch.float32, torch.bfloat16), "align": 16},
    ],
)
def test_what_is_needed_passes(wanted: dict[str, object]) -> None:
    need(X, "x", **wanted)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("tensor", "wanted", "words"),
    [
        (None, {"shape": (4,)}, r"^tensor x; got None; wanted \[4\] contiguous$"),
        (X, {"shape": (4, 7)}, r"got bfloat16 \[4, 6\] with stride \[6, 1\] on cpu; wanted \[4, 7\] contiguous$"),
        (X, {"shape": (4, 6, None)}, r"wanted \[4, 6, any\]"),
        (X, {"dtype": torch.uint8}, "got bfloat16 .* wanted uint8"),
        (X, {"dtype": (torch.uint8, torch.float32)}, "wanted uint8 or float32"),
        (X, {"device": "cuda"}, "on cpu; wanted contiguous on cuda"),
        (X.t(), {}, r"\[6, 4\] with stride \[1, 6\] on cpu; wanted contiguous"),
        (X[0, 1:], {"align": 16}, "at 0x.* wanted contiguous at a multiple of 16 bytes"),
    ],
)
def test_what_is_not_passes_not(tensor: object, wanted: dict[str, object], words: str) -> None:
    with pytest.raises(KernelError, match=words):
        need(tensor, "x", **wanted)  # type: ignore[arg-type]


def test_a_strided_tensor_passes_where_it_may() -> None:
    need(X.t(), "x", contiguous=False)


def test_cuda_is_any_cuda_device() -> None:
    from dsv4.kernels.need import _is

    assert _is(torch.device("cuda:1"), torch.device("cuda"))
    assert not _is(torch.device("cuda:1"), torch.device("cuda:0"))
    assert not _is(torch.device("cpu"), torch.device("cuda"))


def test_a_tensor_map_lies_among_the_arguments_whole() -> None:
    kernel, words = Kernel("some.cu", "work", "i m p"), bytes(range(128))
    kernel.fill((7, words, None))
    buffer = kernel._place.buffer.raw
    assert words in buffer
    assert kernel._pack.__self__.size == len(buffer)
    with pytest.raises(KernelError, match=r"argument 1 of kernel some\.cu:work; got 5; wanted the 128 bytes"):
        kernel.fill((7, 5, None))
