"""GPUs by name: memory as CUDA reports it, and the bytes a second that a kernel reads at best."""

from __future__ import annotations

import re
from typing import Final, NamedTuple

from dsv4.errors import RequestError


class Gpu(NamedTuple):
    """memory: bytes, the least that `torch.cuda.mem_get_info` was seen to give. reads: bytes a second.

    measured: whether `reads` is what a kernel was timed at; else it is of the maker's data sheet. source: of both.
    """

    name: str
    memory: int
    reads: float
    measured: bool
    architecture: str
    source: str


def _gib(count: float) -> int:
    return int(count * 2**30)


_SEEN: Final = "memory as out-of-memory reports of torch give it"
_SGLANG: Final = "memory by sgl-project/sglang#25225; reads by NVIDIA's data sheet (8 TB/s)"
# Reads of 4 GB with the best of many launches, on machines of ours (driver 580.159, CUDA 13.0), 2026-11-22.
GPUS: Final = {
    gpu.name: gpu
    for gpu in (
        Gpu("H100", _gib(79.15), 3.12e12, True, "sm_90a", f"H100 80GB HBM3 (SXM); {_SEEN}; reads measured 2026-11-22"),
        Gpu("H200", _gib(139.72), 4.51e12, True, "sm_90a", f"H200 (SXM); {_SEEN}; reads measured 2026-11-22"),
        Gpu("B200", _gib(178.3), 8.0e12, False, "sm_100a", _SGLANG),
        Gpu("B300", _gib(267.6), 8.0e12, False, "sm_103a", _SGLANG),
    )
}
_ASKED: Final = re.compile(r"(?:(?P<count>\d+)\s*x\s*)?(?P<name>[A-Za-z]\w*)", re.ASCII)


def find_gpu(text: str) -> Gpu:
    """The GPU of "H200" or "1xH200". RequestError for one that is not known, and for more than one."""
    found = _ASKED.fullmatch(text.strip())
    gpu = GPUS.get(found["name"].upper()) if found else None
    if found is None or gpu is None:
        raise RequestError("--gpus", got=repr(text), wanted=f"one of {', '.join(GPUS)}, as in H200 or 1xH200")
    if int(found["count"] or 1) != 1:
        raise RequestError(
            "--gpus: weights are not shared between GPUs yet",
            got=repr(text),
            wanted=f"one GPU, as in 1x{gpu.name}",
            do="plan for one of them",
        )
    return gpu
