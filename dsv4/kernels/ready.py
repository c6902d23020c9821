"""All kernels of a device, found or built and loaded before anybody waits for one of them.

A step launches what its shapes ask for, and no rehearsal has all shapes. So all are loaded that declare the device's
architecture, whatever asks for them later: from ready-made cubins that is megabytes, unpacked in hundredths of seconds.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import torch

from dsv4.kernels import driver
from dsv4.kernels.architectures import architecture
from dsv4.kernels.build import find
from dsv4.kernels.launch import KERNELS, Kernel
from dsv4.kernels.source import sources

_BUILDERS: Final = 8  # sources compiled at once at most: NVRTC holds no lock over threads


def load_all(device: torch.device, each: Callable[[int, int, str], None]) -> Counter[str]:
    """Have every kernel on a CUDA device. How many sources were "prebuilt", in the "cache", or had to be "compiled".

    each: told how many sources of how many are there, and the last one's name. KernelError for a device that none of
    ours is for, and for the first that cannot be built or loaded.
    """
    number = driver.current_device() if device.index is None else device.index
    wanted = architecture(driver.capability(number))
    own: dict[str, list[Kernel]] = {one.file: [] for one in sources() if wanted in one.architectures}
    for kernel in KERNELS:
        if kernel.places is None and kernel.file in own:  # others are a benchmark's, over sources of its own
            own[kernel.file].append(kernel)
    files = [file for file, kernels in own.items() if kernels]
    origins: Counter[str] = Counter()
    pool = ThreadPoolExecutor(min(_BUILDERS, os.cpu_count() or 1))
    try:
        for file, found in zip(files, pool.map(lambda file: find(file, wanted), files), strict=True):
            for kernel in own[file]:
                kernel.load(number)
            origins[found.origin] += 1
            each(origins.total(), len(files), file)
    finally:
        pool.shutdown(cancel_futures=True)
    return origins
