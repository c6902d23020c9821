"""Launching on a GPU: streams, graphs, clusters, shared memory, dependent and cooperative launches, and refusals.

The sources are compiled without one too, so that nothing but the launch is left to be found there.
"""

from __future__ import annotations

import threading
import time

import pytest
import torch
from torch import Tensor

from dsv4.errors import KernelError
from dsv4.kernels import driver
from dsv4.kernels.architectures import ARCHITECTURES
from dsv4.kernels.build import Places, find
from dsv4.kernels.launch import Kernel, need
from tests.kernel_support import SOURCES, forget, places

ALL = f"// arch: {' '.join(ARCHITECTURES)}\n"
RANK = """extern "C" __global__ void rank(int* to) {
  unsigned rank, size;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  if (threadIdx.x == 0) to[blockIdx.x] = rank + 100 * size;
}
"""
TURN = """extern "C" __global__ void turn(float* x, int n) {
  extern __shared__ float s[];
  for (int i = threadIdx.x; i < n; i += blockDim.x) s[i] = x[i];
  __syncthreads();
  for (int i = threadIdx.x; i < n; i += blockDim.x) x[i] = s[n - 1 - i];
}
"""
# Each thread of a step reads what another block of the step before wrote, so that a missing wait shows.
STEP = """extern "C" __global__ void step(const int* from, int* to, int n) {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
  asm volatile("griddepcontrol.wait;" ::: "memory");
  int at = blockIdx.x * blockDim.x + threadIdx.x;
  if (at < n) to[at] = from[(at + 4097) % n] + 1;
}
"""
MEET = """extern "C" __global__ void meet(int* count, int* seen) {
  if (threadIdx.x == 0) {
    atomicAdd(count, 1);
    while (*(volatile int*)count < (int)gridDim.x) {}
    seen[blockIdx.x] = *(volatile int*)count;
  }
}
"""
NUMBERS = """extern "C" __global__ void numbers(long long l, float f, const int* absent, int i, double* to) {
  to[0] = (double)l;
  to[1] = f;
  to[2] = i;
  to[3] = absent == nullptr;
}
"""
TEXTS = {"rank.cu": RANK, "turn.cu": TURN, "step.cu": STEP, "meet.cu": MEET, "numbers.cu": NUMBERS}
TEXTS = {**SOURCES, **{name: ALL + text for name, text in TEXTS.items()}}


@pytest.fixture(scope="module")
def where(tmp_path_factory: pytest.TempPathFactory) -> Places:
    forget()
    return places(tmp_path_factory.mktemp("gpu"), TEXTS)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_sources_of_these_tests_compile_without_a_gpu(architecture: str, where: Places) -> None:
    for kernel in kernels(where).values():
        kernel.check(find(kernel.file, architecture, where).entry)


def kernels(where: Places) -> dict[str, Kernel]:
    """Fresh ones, that have not been loaded."""
    signatures = {"copy": "ppl", "rank": "p", "turn": "p i", "step": "pp i", "meet": "pp", "numbers": "l f p i p"}
    return {name: Kernel(f"{name}.cu", name, codes, where) for name, codes in signatures.items()}


def ramp(n: int = 100_003) -> Tensor:
    return torch.arange(n, dtype=torch.float32, device="cuda")


def copy(kernel: Kernel, x: Tensor, y: Tensor) -> None:
    need(x, "x", shape=(None,), dtype=torch.float32, device="cuda")
    need(y, "y", shape=x.shape, dtype=torch.float32, device=x.device)
    kernel(-(-x.numel() // 256), 256, y, x, x.numel())


@pytest.mark.gpu
def test_a_copy(where: Places) -> None:
    x, y = ramp(), torch.zeros(100_003, device="cuda")
    copy(kernels(where)["copy"], x, y)
    assert torch.equal(x, y)


@pytest.mark.gpu
def test_every_kind_of_argument_arrives(where: Places) -> None:
    to = torch.zeros(4, dtype=torch.float64, device="cuda")
    kernels(where)["numbers"](1, 1, -(2**40), 0.5, None, -7, to)
    assert to.tolist() == [-(2.0**40), 0.5, -7.0, 1.0]


@pytest.mark.gpu
def test_the_stream_is_torchs_current_one(where: Places) -> None:
    """A launch behind a long sleep on a side stream is not seen by another stream until that has passed."""
    kernel, x, y = kernels(where)["copy"], ramp(), torch.zeros(100_003, device="cuda")
    kernel.load(0)
    assert y.sum().item() == 0  # torch loads its own kernel at its first use, and waits for all streams then
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        assert driver.current_stream(0) == side.cuda_stream
        torch.cuda._sleep(200_000_000)
        copy(kernel, x, y)
    assert driver.current_stream(0) == torch.cuda.current_stream().cuda_stream
    assert y.sum().item() == 0
    side.synchronize()
    assert torch.equal(x, y)


@pytest.mark.gpu
@pytest.mark.parametrize("size", [1, 2, 4, 8, 16])
def test_blocks_of_a_cluster_know_their_rank(size: int, where: Places) -> None:
    if size == 16 and torch.cuda.get_device_capability()[0] == 12:
        size = 8  # the largest there
    to = torch.zeros(32, dtype=torch.int32, device="cuda")
    kernels(where)["rank"](32, 64, to, cluster=size)
    assert to.tolist() == [100 * size + block % size for block in range(32)]


@pytest.mark.gpu
@pytest.mark.parametrize("kib", [4, 48, 64, 96])
def test_more_shared_memory_than_is_given_unasked(kib: int, where: Places) -> None:
    x = ramp(kib * 256)
    kernels(where)["turn"](1, 256, x, x.numel(), smem=4 * x.numel())
    assert torch.equal(x, ramp(kib * 256).flip(0))


@pytest.mark.gpu
def test_more_shared_memory_than_there_is_is_refused(where: Places) -> None:
    with pytest.raises(
        KernelError, match=r"launch of kernel turn\.cu:turn; got smem 1048576; wanted at most \d+ beside \d+ static"
    ):
        kernels(where)["turn"](1, 256, ramp(), 1, smem=1 << 20)


def chain(kernel: Kernel, length: int, pdl: bool) -> Tensor:
    """`length` steps between two buffers; element i of the last is `length` plus where it came from."""
    n = 264 * 256
    pair = [torch.arange(n, dtype=torch.int32, device="cuda"), torch.zeros(n, dtype=torch.int32, device="cuda")]
    for number in range(length):
        kernel(264, 256, pair[number % 2], pair[1 - number % 2], n, pdl=pdl)
    return pair[length % 2]


@pytest.mark.gpu
def test_a_chain_of_dependent_launches_is_a_chain(where: Places) -> None:
    kernel = kernels(where)["step"]
    wanted = chain(kernel, 200, pdl=False)
    n = wanted.numel()
    exact = (torch.arange(n, device="cuda") + 4097 * 200) % n + 200
    assert torch.equal(wanted, exact.int())
    for _ in range(5):
        assert torch.equal(chain(kernel, 200, pdl=True), wanted)


@pytest.mark.gpu
def test_a_cooperative_launch_has_all_its_blocks_at_once(where: Places) -> None:
    blocks = torch.cuda.get_device_properties(0).multi_processor_count
    count, seen = (torch.zeros(size, dtype=torch.int32, device="cuda") for size in (1, blocks))
    kernels(where)["meet"](blocks, 32, count, seen, cooperative=True)
    assert seen.tolist() == [blocks] * blocks


@pytest.mark.gpu
def test_a_cooperative_launch_that_does_not_fit_is_refused(where: Places) -> None:
    count = torch.zeros(1, dtype=torch.int32, device="cuda")
    with pytest.raises(KernelError, match=r"kernel meet\.cu:meet with .* was not launched; got CUDA_ERROR_COOPERATIVE"):
        kernels(where)["meet"](10**6, 32, count, count, cooperative=True)


@pytest.mark.gpu
@pytest.mark.parametrize("loaded", [True, False])
@pytest.mark.parametrize("pdl", [True, False])
def test_a_graph_takes_launches(loaded: bool, pdl: bool, where: Places) -> None:
    """Also where the first launch of a kernel, with its loading, falls into the capture."""
    kernel, n = kernels(where)["step"], 264 * 256
    if loaded:
        kernel.load(0)
    x, y = torch.arange(n, dtype=torch.int32, device="cuda"), torch.zeros(n, dtype=torch.int32, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(10):
            kernel(264, 256, x, y, n, pdl=pdl)
            kernel(264, 256, y, x, n, pdl=pdl)
    torch.cuda.synchronize()
    assert x[0].item() == 0  # captured, not run
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    exact = (torch.arange(n, device="cuda") + 4097 * 60) % n + 60
    assert torch.equal(x, exact.int())


@pytest.mark.gpu
def test_another_thread_launches_too(where: Places) -> None:
    """A thread that has used no device yet has no context of its own."""
    kernel, x, y = kernels(where)["copy"], ramp(), torch.zeros(100_003, device="cuda")
    failed: list[BaseException] = []

    def work() -> None:
        try:
            copy(kernel, x, y)
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    torch.cuda.synchronize()
    assert failed == []
    assert torch.equal(x, y)


@pytest.mark.gpu
def test_a_tensor_of_another_device_than_the_current(where: Places) -> None:
    """With one GPU, that one; with more, the last, while the first is current."""
    last = torch.cuda.device_count() - 1
    x = torch.arange(1000, dtype=torch.float32, device=f"cuda:{last}")
    y = torch.zeros_like(x)
    copy(kernels(where)["copy"], x, y)
    assert torch.cuda.current_device() == 0
    assert torch.equal(x, y)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (lambda x: (x, x.cpu(), 1), r"argument 1 of kernel copy\.cu:copy; got float32 \[10\] .* on cpu; wanted a CUDA"),
        (lambda x: (x, x, 1.5), "argument 2 .* got 1.5; wanted long long"),
        (lambda x: (x, x, x), "argument 2 .* wanted long long"),
        (lambda x: (x, x), "arguments of kernel .* got 2; wanted 3: ppl"),
    ],
)
def test_wrong_arguments_are_refused(arguments: object, words: str, where: Places) -> None:
    with pytest.raises(KernelError, match=words):
        kernels(where)["copy"](1, 32, *arguments(ramp(10)))  # type: ignore[operator]


@pytest.mark.gpu
@pytest.mark.parametrize(("block", "words"), [(0, "got block 0"), (1025, "got block 1025; wanted 1 to 1024")])
def test_a_block_that_cannot_be_is_refused(block: int, words: str, where: Places) -> None:
    with pytest.raises(KernelError, match=words):
        kernels(where)["copy"](1, block, ramp(10), ramp(10), 10)


@pytest.mark.gpu
def test_a_launch_costs_python_microseconds(where: Places) -> None:
    """Far above what it should be, so that a busy machine does not fail it; the figure is printed with -s."""
    kernel, x, y = kernels(where)["copy"], ramp(32), torch.zeros(32, device="cuda")
    best = float("inf")
    for _ in range(5):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(1000):
            kernel(1, 32, y, x, 32)
        best = min(best, (time.perf_counter() - start) / 1000 * 1e6)
    torch.cuda.synchronize()
    print(f"{best:.2f} µs a launch from Python")
    assert best < 50


@pytest.mark.gpu
def test_what_the_doctor_says_of_a_gpu_that_runs_kernels() -> None:
    from dsv4.kernels.doctor import _devices, _driver

    assert [found.state for found in (*_driver(True), *_devices(True))].count("wrong") == 0
