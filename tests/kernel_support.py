"""Small kernel sources of the tests' own, places of their own for what is built, and a CUDA driver that pretends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from dsv4.kernels import build
from dsv4.kernels.build import Places
from dsv4.kernels.cache import say

ROOT = Path(__file__).resolve().parents[1]

COPY = """// copies
// arch: sm_90a sm_100a sm_103a sm_120a
#include "common/move.cuh"
extern "C" __global__ void copy(float* to, const float* from, long long n) {
  long long at = blockIdx.x * (long long)blockDim.x + threadIdx.x;
  if (at < n) to[at] = moved(from[at]);
}
"""
MOVE = """#pragma once
#include "common/deeper.cuh"
__device__ inline float moved(float x) { return x * ONE; }
"""
SPILL = """// arch: sm_90a
extern "C" __global__ void __launch_bounds__(1024) spill(float* x, int n) {
  float a[64];
#pragma unroll
  for (int i = 0; i < 64; i++) a[i] = x[i * n + threadIdx.x];
  __syncthreads();
  for (int k = 0; k < n; k++)
#pragma unroll
    for (int i = 0; i < 64; i++) a[i] = a[i] * a[(i * 7 + 3) % 64] + x[k];
#pragma unroll
  for (int i = 0; i < 64; i++) x[i * n + threadIdx.x] = a[i];
}
"""
# Reads a sum of the tensor cores before it waits for it: ptxas waits in its place, and says so.
SERIAL = """// arch: sm_90a
extern "C" __global__ void early(float* y, unsigned long long a, unsigned long long b) {
  float d[4] = {0, 0, 0, 0};
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
  asm volatile("wgmma.mma_async.sync.aligned.m64n8k32.f32.e4m3.e4m3 {%0, %1, %2, %3}, %4, %5, 1, 1, 1;"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "l"(a), "l"(b));
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
  y[threadIdx.x] = d[0];
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
  y[threadIdx.x + 128] = d[1];
}
"""
SOURCES = {"copy.cu": COPY, "common/move.cuh": MOVE, "common/deeper.cuh": "#pragma once\n#define ONE 1.0f\n"}


def places(folder: Path, sources: dict[str, str] | None = None) -> Places:
    """Sources below `folder`, and next to them room for ready-made cubins and a cache, both empty."""
    for name, text in (SOURCES if sources is None else sources).items():
        path = folder / "csrc" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return Places(folder / "csrc", folder / "prebuilt", folder / "cache")


def python(script: str, *arguments: object, **environment: str) -> subprocess.Popen[str]:
    """A fresh interpreter that runs `script`."""
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ran(script: str, *arguments: object, **environment: str) -> tuple[str, str]:
    """What such an interpreter said on stdout and stderr; it has to end well."""
    process = python(script, *arguments, **environment)
    out, err = process.communicate()
    assert process.returncode == 0, err
    return out, err


def pretend_driver(folder: Path) -> dict[str, str]:
    """Builds the pretended driver into `folder`; the environment in which a process meets it, writing into `book`."""
    source, library = Path(__file__).with_name("pretend_cuda.cpp"), folder / "libcuda.so.1"
    subprocess.run(["g++", "-shared", "-fPIC", "-w", source, "-o", library, "-ldl"], check=True)
    return {"LD_LIBRARY_PATH": str(folder), "PRETEND_BOOK": str(folder / "book")}


def forked(work: Callable[[], object]) -> int:
    """The id of a copy of this process that does `work` and ends, with code 0 unless that raises.

    A copy has the compiler loaded, so that what is timed or killed is the work and not the start of an interpreter.
    """
    child = os.fork()
    if child:
        return child
    try:
        forget()
        work()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


def ended_well(child: int, within: float = 60) -> bool:
    """Whether a copy came to its end, and that in time; one that did not is killed."""
    until = time.monotonic() + within
    while time.monotonic() < until:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return status == 0
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


def forget() -> None:
    """What this process has found and said so far."""
    build._memory.clear()
    say.cache_clear()
