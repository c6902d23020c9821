"""Launching a kernel on torch's current stream, and the checks that come before.

    _NORM = Kernel("norm.cu", "rms_norm", "ppp i f")     # nothing is built or loaded yet
    need(x, "x", shape=(None, 4096), dtype=torch.bfloat16)
    _NORM(x.shape[0], 256, x, weight, y, 4096, eps, smem=16384, pdl=True)

A graph being captured takes a launch as a stream does. The first launch on a device finds or builds the cubin and loads
it; `Kernel.load` does that ahead of time.
"""

from __future__ import annotations

import ctypes
import struct
import threading
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

from torch import Tensor

from dsv4.errors import KernelError
from dsv4.kernels import driver
from dsv4.kernels.architectures import architecture
from dsv4.kernels.build import Places, find
from dsv4.kernels.entry import Entry
from dsv4.kernels.need import describe, need

__all__ = ["KERNELS", "Kernel", "Launch", "need", "unfit"]

# code of a signature: how `struct` packs it, what it is in C
CODES: Final = {
    "p": ("P", "a pointer"),
    "i": ("i", "int"),
    "l": ("q", "long long"),
    "f": ("f", "float"),
    "m": ("128s", "the 128 bytes of a tensor map"),
}
KERNELS: Final[list[Kernel]] = []  # every one that was constructed, for the tests that hold signatures against cubins
_MOST_CONFIGURATIONS: Final = 1024  # kept of one kernel: a grid that follows the token count has many
_LARGEST_GRID: Final = 2**31 - 1
_LARGEST_CLUSTER: Final = 16


class Launch(NamedTuple):
    """What one launch asks for: blocks on x, threads of a block, dynamic shared memory in bytes, blocks of a cluster.

    cluster: 0 for none. A kernel that stores into the memory of its cluster needs one, be it of one block: outside of
    clusters the instruction is illegal.

    pdl: it may start before the kernel in front of it ends (programmatic dependent launch), so the kernel has to
    `griddepcontrol.wait` before it reads anything that an earlier one wrote. cooperative: all blocks are on the device
    at once, or the driver refuses.
    """

    grid: int
    block: int
    smem: int = 0
    cluster: int = 0
    pdl: bool = False
    cooperative: bool = False


def unfit(launch: Launch, function: driver.Function) -> str | None:
    """Why a launch cannot be, by what the kernel and its device allow, or None."""
    grid, block, smem, cluster, *_ = launch
    static, room = function.static, function.shared
    rules = (
        (0 < grid <= _LARGEST_GRID, f"got grid {grid}; wanted 1 to {_LARGEST_GRID}"),
        (0 < block <= function.threads, f"got block {block}; wanted 1 to {function.threads}"),
        (0 <= smem <= room, f"got smem {smem}; wanted at most {room} beside {static} static bytes"),
        (0 <= cluster <= _LARGEST_CLUSTER, f"got cluster {cluster}; wanted at most {_LARGEST_CLUSTER}"),
        (grid % max(cluster, 1) == 0, f"got grid {grid}; wanted a multiple of cluster {cluster}"),
    )
    return next((why for holds, why in rules if not holds), None)


class _Place(threading.local):
    """Where a thread lays out a kernel's arguments, and the array of their addresses that the driver takes.

    The driver copies them during the call, so one place is enough; another thread has its own.
    """

    def __init__(self, layout: Sequence[str]) -> None:
        self.buffer = ctypes.create_string_buffer(struct.calcsize("".join(layout)))
        start = ctypes.addressof(self.buffer)
        ends = [struct.calcsize("".join(layout[: number + 1])) for number in range(len(layout))]
        places = [start + end - struct.calcsize(code) for end, code in zip(ends, layout, strict=True)]
        self._pointers = (ctypes.c_void_p * len(places))(*places)
        self.address = ctypes.addressof(self._pointers)
        self.entered: set[int] = set()  # devices whose context this thread has been given


class _Loaded:
    """A kernel on one device, with the configurations that it has been launched in and the most `smem` among them."""

    def __init__(self, function: driver.Function) -> None:
        self.function, self.handle = function, function.handle
        self.run = driver.driver().cuLaunchKernelEx
        self.configurations: dict[tuple[Any, ...], Any] = {}
        self.smem = 0


class Kernel:
    """One `extern "C" __global__` function of csrc/`file`.

    signature: its parameters in order, blanks ignored: p pointer, i int, l long long, f float, m tensor map
    (dsv4/kernels/tiles.py).
    """

    def __init__(self, file: str, name: str, signature: str, places: Places | None = None) -> None:
        self.file, self.name, self.signature = file, name, "".join(signature.split())
        if not self.signature or not set(self.signature) <= CODES.keys():
            raise KernelError(f"signature of {self}", got=repr(signature), wanted=f"letters of {''.join(CODES)}")
        self.places = places
        self._layout = [CODES[code][0] for code in self.signature]
        self._pack = struct.Struct("".join(self._layout)).pack_into
        self._place = _Place(self._layout)
        self._loaded: dict[int, _Loaded] = {}
        KERNELS.append(self)

    def __str__(self) -> str:
        return f"kernel {self.file}:{self.name}"

    def __call__(
        self,
        grid: int,
        block: int,
        *arguments: Tensor | int | float | bytes | None,
        smem: int = 0,
        cluster: int = 0,
        pdl: bool = False,
        cooperative: bool = False,
    ) -> None:
        """Launch on the current stream of the tensors' device, as `Launch` says; a grid of 0 blocks launches nothing.

        A tensor gives its address, None a null pointer. KernelError if an argument is not what the signature says, if
        the tensors are not on one CUDA device, or if kernel, device or driver refuse.
        """
        device = self.fill(arguments)
        if grid == 0:
            return
        if device < 0:
            device = driver.current_device()
        launch = (grid, block, smem, cluster, pdl, cooperative)
        entered = self._place.entered
        if device in entered and device == driver.current_device():
            self._launch(device, launch, arguments)
            return
        with driver.on_device(device):
            self._launch(device, launch, arguments)
        entered.add(device)

    def fill(self, arguments: Sequence[Any]) -> int:
        """Lay out the arguments for this thread's next launch. Returns the tensors' device, -1 if there are none."""
        if len(arguments) != len(self.signature):
            got, wanted = len(arguments), f"{len(self.signature)}: {self.signature}"
            raise KernelError(f"arguments of {self}", got=got, wanted=wanted)
        device, values = -1, []
        for code, value in zip(self.signature, arguments, strict=True):
            if isinstance(value, Tensor):
                home = value.get_device()
                if code != "p" or home < 0 or (device >= 0 and home != device):
                    raise self._misfit(arguments)
                device = home
                values.append(value.data_ptr())
            elif code == "p":
                if value is not None:
                    raise self._misfit(arguments)
                values.append(0)
            else:
                values.append(value)
        try:
            self._pack(self._place.buffer, 0, *values)
        except (struct.error, OverflowError):
            raise self._misfit(arguments) from None
        return device

    def _launch(self, device: int, launch: tuple[int, int, int, int, bool, bool], arguments: Sequence[object]) -> None:
        """With the arguments laid out, and the device current."""
        loaded = self._loaded.get(device) or self._load(device)
        key = (*launch, driver.current_stream(device))
        configuration = loaded.configurations.get(key) or self._configure(loaded, key)
        (error,) = loaded.run(configuration, loaded.handle, self._place.address, 0)
        if error:
            shown = ", ".join(map(describe, arguments))
            raise KernelError(f"{self} with ({shown}) as {Launch(*launch)} was not launched", got=driver.words(error))

    def _configure(self, loaded: _Loaded, key: tuple[Any, ...]) -> Any:
        """The driver's form of a launch on a stream, after what is checked for it once and not every time."""
        launch, stream = Launch(*key[:-1]), key[-1]
        if why := unfit(launch, loaded.function):
            raise KernelError(f"launch of {self}; {why}")
        most = max(launch.smem, loaded.smem)  # never less: an earlier configuration will be used again
        driver.allow(loaded.function, most, launch.cluster)
        loaded.smem = most
        if len(loaded.configurations) >= _MOST_CONFIGURATIONS:
            loaded.configurations.clear()
        configuration = driver.configuration(*launch, stream)
        loaded.configurations[key] = configuration
        return configuration

    def load(self, device: int) -> None:
        """Find or build the kernel for a device and load it there, if that has not been done."""
        if device not in self._loaded:
            with driver.on_device(device):
                self._load(device)

    def _load(self, device: int) -> _Loaded:
        wanted = architecture(driver.capability(device))
        entry = find(self.file, wanted, self.places).entry
        self.check(entry)
        try:
            with driver.outside_capture():
                function = driver.load(entry.cubin, self.name, device)
        except KernelError as error:
            made = f"made for {wanted} by NVRTC {entry.compiler.partition('-')[0]}"
            raise KernelError(f"{self}, {made}, cannot be loaded on cuda:{device}: {error}") from None
        return self._loaded.setdefault(device, _Loaded(function))

    def check(self, entry: Entry) -> None:
        """KernelError unless the compiled source has this kernel, with parameters as wide as the signature says."""
        if self.name not in entry.kernels:
            raise KernelError(f"{self}", got="no such kernel", wanted=" or ".join(sorted(entry.kernels)))
        said = tuple(struct.calcsize(code) for code in self._layout)
        compiled = entry.kernels[self.name].parameters
        if said != compiled:
            got, wanted = f"{self.signature}, so {_list(said)} bytes", f"{_list(compiled)}, as compiled"
            raise KernelError(f"signature of {self}", got=got, wanted=wanted)

    def _misfit(self, arguments: Sequence[object]) -> KernelError:
        """The error for arguments of which one is wrong, named by its place."""
        pairs = list(zip(self.signature, arguments, strict=True))
        for place, (code, value) in enumerate(pairs):
            if not _fits(code, value):
                wanted = "a CUDA tensor or None" if code == "p" else CODES[code][1]
                return KernelError(f"argument {place} of {self}", got=describe(value), wanted=wanted)
        homes = {str(value.device) for _, value in pairs if isinstance(value, Tensor)}
        return KernelError(f"tensors of {self}", got=" and ".join(sorted(homes)), wanted="one CUDA device")


def _fits(code: str, value: Any) -> bool:
    if code == "p" or isinstance(value, Tensor):
        return value is None or (code == "p" and isinstance(value, Tensor) and value.get_device() >= 0)
    try:
        struct.pack(CODES[code][0], value)
    except (struct.error, OverflowError):
        return False
    return True


def _list(sizes: Sequence[int]) -> str:
    return "+".join(map(str, sizes)) or "no"
