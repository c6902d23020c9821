"""The CUDA driver through cuda-core's bindings, and what launching needs to know of torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, Final, NamedTuple

import torch

from dsv4.errors import KernelError
from dsv4.kernels.compiler import INSTALL

PORTABLE_CLUSTER: Final = 8  # blocks; more, up to 16, a kernel has to be allowed to
_UNASKED_SHARED: Final = 48 << 10  # bytes of shared memory that a block gets without asking

# What torch's compiler calls for the same purpose; the public way builds a Stream object first. A build for the CPU has
# neither.
_raw_stream: Final = getattr(torch._C, "_cuda_getCurrentRawStream", None)


@cache
def driver() -> Any:
    """The bindings; KernelError if they are not installed."""
    try:
        from cuda.bindings import driver as bindings
    except ImportError as missing:
        raise KernelError(
            "kernels cannot be launched", got=f"no {missing.name}", wanted="cuda-core", do=INSTALL
        ) from None
    return bindings


def call(function: str, *arguments: object) -> Any:
    """What a driver function gives; KernelError with its name and the driver's words if that is an error."""
    try:
        error, *found = getattr(driver(), function)(*arguments)
    except RuntimeError as missing:  # the bindings' way to say that there is no driver, or one too old
        raise KernelError(f"the CUDA driver has no {function}", got=missing) from None
    if int(error):
        raise KernelError(f"the CUDA driver refused {function}", got=words(error))
    return found[0] if found else None


def words(error: Any) -> str:
    """The driver's words for an error, as in "CUDA_ERROR_INVALID_VALUE (invalid argument)"."""
    (_, said) = driver().cuGetErrorString(error)
    return f"{error.name} ({said.decode()})" if said else str(error)


def current_device() -> int:
    """The index of torch's current device."""
    return torch.cuda.current_device()


def current_stream(device: int) -> int:
    """The handle of torch's current stream on a device."""
    if _raw_stream is None:
        raise KernelError("kernels cannot be launched", got=f"torch {torch.__version__}", wanted="a torch with CUDA")
    return int(_raw_stream(device))


def capability(device: int) -> tuple[int, int]:
    """The compute capability of a device."""
    return torch.cuda.get_device_capability(device)


@contextmanager
def on_device(device: int) -> Iterator[None]:
    """The device is current inside, for torch and for the driver."""
    with torch.cuda.device(device):
        give_context(device)
        yield


def give_context(device: int) -> None:
    """A thread that has not used the device yet has no context, and torch gives it none for the device that is current.

    The context is the one that all of torch uses; it is never given back.
    """
    if not int(call("cuCtxGetCurrent")):
        call("cuCtxSetCurrent", call("cuDevicePrimaryCtxRetain", call("cuDeviceGet", device)))


@contextmanager
def outside_capture() -> Iterator[None]:
    """Inside, this thread may allocate and load although a stream of it is being captured."""
    relaxed = driver().CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
    before = call("cuThreadExchangeStreamCaptureMode", relaxed)
    try:
        yield
    finally:
        call("cuThreadExchangeStreamCaptureMode", before)


class Function(NamedTuple):
    """A kernel on a device. threads: of a block at most. shared: bytes a block may ask for beside its own `static`."""

    handle: Any
    threads: int
    static: int
    shared: int


def load(cubin: bytes, name: str, device: int) -> Function:
    """A kernel of a cubin, its code on the device. The device must be current. KernelError with the driver's words."""
    kinds, device_kinds = driver().CUfunction_attribute, driver().CUdevice_attribute
    library = call("cuLibraryLoadData", cubin, [], [], 0, [], [], 0)
    handle = call("cuKernelGetFunction", call("cuLibraryGetKernel", library, name.encode()))
    threads = call("cuFuncGetAttribute", kinds.CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK, handle)
    static = call("cuFuncGetAttribute", kinds.CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES, handle)
    whole = call(
        "cuDeviceGetAttribute",
        device_kinds.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN,
        call("cuDeviceGet", device),
    )
    return Function(handle, threads, static, whole - static)


def allow(function: Function, shared: int, cluster: int) -> None:
    """Opt in to what a kernel does not get unasked."""
    kinds = driver().CUfunction_attribute
    if shared + function.static > _UNASKED_SHARED:
        call("cuFuncSetAttribute", function.handle, kinds.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, shared)
    if cluster > PORTABLE_CLUSTER:
        call("cuFuncSetAttribute", function.handle, kinds.CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED, 1)


def configuration(grid: int, block: int, shared: int, cluster: int, pdl: bool, cooperative: bool, stream: int) -> Any:
    """A CUlaunchConfig, to be kept and used again."""
    bindings = driver()
    config = bindings.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = grid, 1, 1
    config.blockDimX, config.blockDimY, config.blockDimZ = block, 1, 1
    config.sharedMemBytes, config.hStream = shared, bindings.CUstream(stream)
    config.attrs = _attributes(cluster, pdl, cooperative)
    config.numAttrs = len(config.attrs)
    return config


def _attributes(cluster: int, pdl: bool, cooperative: bool) -> list[Any]:
    bindings = driver()
    kinds, found = bindings.CUlaunchAttributeID, []
    if cluster:
        size = bindings.CUlaunchAttribute()
        size.id = kinds.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
        size.value.clusterDim.x, size.value.clusterDim.y, size.value.clusterDim.z = cluster, 1, 1
        found.append(size)
    if pdl:
        early = bindings.CUlaunchAttribute()
        early.id = kinds.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        early.value.programmaticStreamSerializationAllowed = 1
        found.append(early)
    if cooperative:
        together = bindings.CUlaunchAttribute()
        together.id = kinds.CU_LAUNCH_ATTRIBUTE_COOPERATIVE
        together.value.cooperative = 1
        found.append(together)
    return found
