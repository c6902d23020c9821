"""The machine: faster versions of ops, and which of them each architecture prefers.

Importing this needs no GPU and no cuda-core. `install` registers what there is; a kernel is built or loaded when it is
first launched.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Final

from dsv4.kernels.architectures import ARCHITECTURES

if TYPE_CHECKING:
    import torch

    from dsv4.ops.op import Explained

_SIMT: Final = {
    "block_rows": ("fused",),
    "compress_keys": ("fused",),
    "compress_kv": ("fused",),
    "entry_rows": ("fused",),
    "grouped_linear": ("fused",),
    "grouped_linear_quant": ("unfused",),
    "head": ("fused",),
    "index_logits": ("fused",),
    "index_queries": ("fused",),
    "matmul": ("fused",),
    "mhc_head": ("fused",),
    "mhc_post": ("fused",),
    "mhc_post_pre_norm_quant": ("cluster", "fused", "unfused"),
    "mhc_pre": ("fused",),
    "mhc_pre_norm_quant": ("fused", "unfused"),
    "prefetch": ("fused",),
    "q_norm_rope": ("fused", "unfused"),
    "quantize": ("fused",),
    "read_kv": ("fused",),
    "rms_norm": ("fused",),
    "rms_norm_quant": ("fused", "unfused"),
    "rope": ("fused",),
    "rotations": ("fused",),
    "sample": ("fused",),
    "route": ("cluster", "fused"),
    "select_rows": ("fused",),
    "swiglu": ("fused",),
    "swiglu_quant": ("fused",),
    "unit_rms": ("fused",),
    "window_rows": ("fused",),
    "write_kv": ("fused",),
}
_HOPPER: Final = ("attend", "grouped_scaled_matmul", "linear", "scaled_matmul", "shared_input", "stored_moe")
_FUSING_HOPPER: Final = {
    "attend_quant": ("fused", "unfused"),
    "grouped_linear_quant": ("unfused", "fused"),  # the fused one has not been timed
    "scaled_matmul_q_norm_rope": ("fused", "unfused"),
}
# The only place where the choice stands: architecture -> op -> implementations, the best first. "unfused" is the op's
# own body over the kernels of the smaller ops, and stands where these leave nothing to plain PyTorch.
PREFER: Final[Mapping[str, Mapping[str, tuple[str, ...]]]] = dict.fromkeys(ARCHITECTURES, _SIMT) | {
    "sm_90a": _SIMT | dict.fromkeys(_HOPPER, ("fused",)) | _FUSING_HOPPER,
}
# Libraries beside our kernels, which are judged and timed with them but run only where they are named: a row of theirs
# has other bits in other company.
LIBRARIES: Final[Mapping[str, Mapping[str, tuple[str, ...]]]] = {
    name: {"scaled_matmul": ("cublaslt" if name == "sm_90a" else "cublaslt_nvfp4",)} for name in ARCHITECTURES
}


def install() -> None:
    """Register the kernels. They run inside `dsv4.ops.op.use` alone; calling this again does nothing."""
    from dsv4.ops.op import prefer

    _register()
    prefer(preferred)


def _register() -> None:
    """Each family's file registers its functions when it is imported."""
    from dsv4.kernels import (  # noqa: F401
        attention,
        compress,
        experts,
        index_logits,
        index_queries,
        kv,
        linear,
        linear_grouped,
        linear_heads,
        linear_library,
        linear_mixed,
        linear_nvfp4,
        matmul,
        mhc,
        moe,
        norm,
        prefetch,
        quantize,
        rope,
        route,
        sample,
        select,
        step,
    )


@cache
def preferred(device: torch.device) -> Mapping[str, tuple[str, ...]]:
    """The row of PREFER for a CUDA device; nothing for one that none of our kernels is compiled for."""
    return PREFER.get(_architecture(device), {})


def complete(device: torch.device) -> bool:
    """Whether a CUDA device has kernels of ours for every op that any has them for: then a step is kernels alone."""
    return preferred(device).keys() >= {op for row in PREFER.values() for op in row}


def libraries(device: torch.device) -> Mapping[str, tuple[str, ...]]:
    """The row of LIBRARIES for a CUDA device."""
    return LIBRARIES.get(_architecture(device), {})


def _architecture(device: torch.device) -> str:
    import torch

    capability = torch.cuda.get_device_capability(device)
    return next((name for name, known in ARCHITECTURES.items() if known.capability == capability), "")


def explain(architecture: str) -> list[Explained]:
    """For every op, what "auto" runs on "sm_90a" and the like if it accepts the arguments, and why not the others.

    What one call comes to, with its arguments: `Op.explain`.
    """
    from dsv4.ops.op import Explained, all_ops

    found = []
    for name, one in sorted(all_ops().items()):
        order = PREFER[architecture].get(name, ())
        runs = next((given for given in order if given in one.implementations), None)
        given = dict.fromkeys((*order, *one.implementations))
        others = {other: _reason(other, order, one.implementations) for other in given if other != runs}
        found.append(Explained(name, runs, others))
    return found


def _reason(name: str, order: tuple[str, ...], installed: Mapping[str, object]) -> str:
    if name not in installed:
        return "not installed"
    return "where the better ones refuse" if name in order else "only if asked for by name"
