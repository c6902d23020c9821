"""The shim that runs kernels on the CPU: it computes what a GPU would, and finds what a GPU might hide."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests import shim

SOURCE = r"""
template <int N>
__device__ __forceinline__ float block_sum(float v, float (&scratch)[N]) {
  for (int m = 16; m; m >>= 1) v += __shfl_xor_sync(~0u, v, m);
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = v;
  __syncthreads();
  v = threadIdx.x % 32 < blockDim.x / 32 ? scratch[threadIdx.x % 32] : 0.0f;
  for (int m = 16; m; m >>= 1) v += __shfl_xor_sync(~0u, v, m);
  return v;
}
#define SUM(name, WARPS)                                                                    \
  extern "C" __global__ void __launch_bounds__(256) name(const float* x, float* y, int n) { \
    __shared__ float scratch[WARPS];                                                        \
    const int i = blockIdx.x * blockDim.x + threadIdx.x;                                    \
    const float sum = block_sum(i < n ? x[i] : 0.0f, scratch);                              \
    if (threadIdx.x == 0) y[blockIdx.x] = sum;                                              \
  }
SUM(sum, 8)
SUM(sum_past_its_scratch, 4)
extern "C" __global__ void shuffles(int* y) {
  const int t = threadIdx.x;
  y[t] = __shfl_sync(~0u, t, 5), y[32 + t] = __shfl_up_sync(~0u, t, 3u), y[64 + t] = __shfl_down_sync(~0u, t, 3u);
  y[96 + t] = __shfl_xor_sync(~0u, t, 9), y[128 + t] = __shfl_sync(~0u, t, 2, 8);
  y[160 + t] = __shfl_down_sync(~0u, t, 3u, 8), y[192 + t] = int(__ballot_sync(~0u, t % 3 == 0));
  y[224 + t] = __any_sync(~0u, t == 31) + 2 * __all_sync(~0u, t < 31);
}
extern "C" __global__ void half_a_warp(int* y) {
  if (threadIdx.x < 16) y[threadIdx.x] = __shfl_xor_sync(0xFFFFu, int(threadIdx.x), 1);
}
extern "C" __global__ void from_outside_the_mask(int* y) {
  if (threadIdx.x < 16) y[threadIdx.x] = __shfl_xor_sync(0xFFFFu, int(threadIdx.x), 16);
}
extern "C" __global__ void two_shuffles(int* y) {
  y[threadIdx.x] = threadIdx.x % 2 ? __shfl_xor_sync(~0u, 1, 1) : __shfl_sync(~0u, 1, 1);
}
extern "C" __global__ void reversed(const float* x, float* y) {
  __shared__ float s[64];
  s[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  y[threadIdx.x] = s[63 - threadIdx.x];
}
extern "C" __global__ void reversed_without_waiting(const float* x, float* y) {
  __shared__ float s[64];
  s[threadIdx.x] = x[threadIdx.x];
  y[threadIdx.x] = s[63 - threadIdx.x];
}
extern "C" __global__ void neighbours(const float* x, float* y, int wait) {
  __shared__ float s[32];
  s[threadIdx.x] = x[threadIdx.x];
  if (wait) __syncwarp();
  y[threadIdx.x] = s[__shfl_xor_sync(~0u, int(threadIdx.x), 1)];
}
extern "C" __global__ void leaves(float* y) {
  if (threadIdx.x == 3) return;
  __syncthreads();
  y[0] = 1;
}
extern "C" __global__ void write_at(float* y, int i) { y[i] = 1; }
extern "C" __global__ void read_at(const float* x, float* y, int i) { y[0] = x[i]; }
extern "C" __global__ void dynamic(float* y, int at) {
  DYNAMIC_SHARED(float, s);
  s[int(threadIdx.x) + at] = threadIdx.x;
  __syncthreads();
  y[threadIdx.x] = s[31 - threadIdx.x];
}
extern "C" __global__ void scaled(float* y, long long n, float by, int row, int width) {
  if (threadIdx.x < n) y[threadIdx.x] *= by;
  if (row) y[row * width] = 0;
}
extern "C" __global__ void sixteen_bytes(const float* x, float* y) {
  const float4 v = *reinterpret_cast<const float4*>(x + threadIdx.x);
  y[threadIdx.x] = v.w;
}
extern "C" __global__ void stale(float* y) {
  __shared__ float s[1];
  if (blockIdx.x == 0) s[0] = 1;
  y[blockIdx.x] = s[0];
}
"""


@pytest.fixture(scope="module")
def csrc(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("csrc")
    (folder / "shim.cu").write_text(SOURCE, encoding="utf-8")
    return folder


def launch(csrc: Path, name: str, grid: int, block: int, *args: object, **how: object) -> None:
    shim.launch("shim.cu", name, grid, block, *args, csrc=csrc, **how)  # type: ignore[arg-type]


@pytest.mark.parametrize("order", shim.ORDERS)
def test_barriers_and_shuffles_exchange(csrc: Path, order: int) -> None:
    x, y, z = torch.arange(1000.0), torch.zeros(4), torch.zeros(64)
    launch(csrc, "sum", 4, 256, x, y, 1000, order=order)
    assert y.tolist() == [float(part.sum()) for part in x.split(256)]
    launch(csrc, "reversed", 1, 64, x, z, order=order)
    assert torch.equal(z, x[:64].flip(0))


def test_every_shuffle_reads_the_lane_that_it_names(csrc: Path) -> None:
    y, t = torch.zeros(8, 32, dtype=torch.int32), range(32)
    launch(csrc, "shuffles", 1, 32, y)
    assert y[0].tolist() == [5] * 32
    assert y[1].tolist() == [max(i - 3, i if i < 3 else 0) for i in t]
    assert y[2].tolist() == [i + 3 if i < 29 else i for i in t]
    assert y[3].tolist() == [i ^ 9 for i in t]
    assert y[4].tolist() == [i // 8 * 8 + 2 for i in t]
    assert y[5].tolist() == [i + 3 if i % 8 < 5 else i for i in t]
    assert set(y[6].tolist()) == {sum(1 << i for i in t if i % 3 == 0)}
    assert set(y[7].tolist()) == {1}
    launch(csrc, "half_a_warp", 1, 32, y)
    assert y[0][:16].tolist() == [i ^ 1 for i in range(16)]


@pytest.mark.parametrize(
    ("name", "block", "args", "said"),
    [
        ("sum_past_its_scratch", 256, (torch.zeros(9), torch.zeros(1), 9), r"undefined behaviour.*shim\.cu:5"),
        ("from_outside_the_mask", 32, (torch.zeros(32),), "a value of no lane"),
        ("two_shuffles", 32, (torch.zeros(32),), "at different shuffles"),
        ("leaves", 64, (torch.zeros(1),), "left the kernel while others wait"),
        ("write_at", 1, (torch.zeros(4), 4), "memory that is not its own"),
        ("write_at", 1, (torch.zeros(4), -1), "4 bytes outside the tensors"),
        ("write_at", 1, (torch.zeros(5), 5), "4 bytes outside the tensors"),
        ("read_at", 1, (torch.zeros(4), torch.zeros(1), 4), r"memory that is not its own.*shim\.cu"),
        ("scaled", 1, (torch.zeros(4), 1, 1.0, 70_000, 70_000), r"undefined behaviour.*shim\.cu"),
        ("sixteen_bytes", 2, (torch.zeros(8), torch.zeros(2)), r"thread 1: undefined behaviour.*shim\.cu"),
        ("dynamic", 32, (torch.zeros(32), 1), "memory that is not its own"),
        ("dynamic", 32, (torch.zeros(32), -1), "outside the dynamic shared memory"),
        ("sum", 512, (torch.zeros(9), torch.zeros(1), 9), "bounded to 256 threads; got 512"),
        ("sum", 32, (torch.zeros(9), torch.zeros(1)), "sum takes ppi, not p p"),
        ("sum", 32, (torch.zeros(9), torch.zeros(1), 9.0), "sum takes ppi, not p p f"),
        ("nothing", 32, (), "no kernel nothing"),
    ],
)
def test_a_fault_is_named_and_the_process_lives(
    csrc: Path, name: str, block: int, args: tuple[object, ...], said: str
) -> None:
    smem = 128 if name == "dynamic" else 0
    with pytest.raises(shim.Fault, match=said):
        launch(csrc, name, 1, block, *args, smem=smem)
    y = torch.ones(4)
    launch(csrc, "scaled", 1, 32, y, 3, 2.5, 0, 0)
    assert y.tolist() == [2.5, 2.5, 2.5, 1.0]


@pytest.mark.parametrize("order", [0, 1])
def test_shared_memory_that_nobody_wrote_is_nan(csrc: Path, order: int) -> None:
    """What one thread reads too early, and what a block before has left."""
    x, y, z = torch.arange(64.0), torch.zeros(64), torch.zeros(2)
    launch(csrc, "reversed_without_waiting", 1, 64, x, y, order=order)
    assert y.isnan().any()
    launch(csrc, "stale", 2, 1, z, order=order)
    assert z.tolist()[0] == 1
    assert z[1].isnan()


def test_some_blocks_of_a_huge_grid_run(csrc: Path) -> None:
    y = torch.zeros(4)
    launch(csrc, "sum", 2**31 - 1, 32, torch.zeros(1), y, 0, blocks=(2, 3), fenced=False)
    with pytest.raises(shim.Fault, match="block 4"):
        launch(csrc, "sum", 2**31 - 1, 32, torch.zeros(1), y, 0, blocks=(3, 10))


def test_a_text_that_does_not_compile_says_why(tmp_path: Path) -> None:
    (tmp_path / "wrong.cu").write_text('extern "C" __global__ void wrong() { nowhere(); }', encoding="utf-8")
    with pytest.raises(RuntimeError, match=r"cannot compile wrong\.cu[\s\S]*nowhere"):
        shim.launch("wrong.cu", "wrong", 1, 1, csrc=tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "block", "more", "said"),
    [
        ("reversed", 64, (), None),
        ("reversed_without_waiting", 64, (), "data race"),
        ("neighbours", 32, (1,), None),
        ("neighbours", 32, (0,), "data race"),  # a shuffle exchanges values and orders no memory
    ],
)
def test_the_sanitizer_sees_races(csrc: Path, name: str, block: int, more: tuple[int, ...], said: str | None) -> None:
    x, y = torch.arange(64.0), torch.zeros(64)
    if said:
        with pytest.raises(shim.Fault, match=said):
            shim.sanitized("shim.cu", name, 1, block, x, y, *more, csrc=csrc)
        return
    shim.sanitized("shim.cu", name, 1, block, x, y, *more, csrc=csrc)
    wanted = x.flip(0) if name == "reversed" else x[[i ^ 1 for i in range(32)]]
    assert torch.equal(y[:block], wanted)
