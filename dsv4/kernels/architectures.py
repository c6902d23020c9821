"""The architectures that sources may declare, and which devices run their cubins, each on its own alone."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final, NamedTuple

from dsv4.errors import KernelError


class Architecture(NamedTuple):
    """capability: the compute capability of the devices. about: some of them, for people."""

    capability: tuple[int, int]
    about: str


ARCHITECTURES: Final[Mapping[str, Architecture]] = MappingProxyType(
    {
        "sm_90a": Architecture((9, 0), "Hopper: H100, H200, H20"),
        "sm_100a": Architecture((10, 0), "Blackwell: B200, GB200"),
        "sm_103a": Architecture((10, 3), "Blackwell: B300, GB300"),
        "sm_120a": Architecture((12, 0), "Blackwell: RTX PRO 6000, RTX 5090"),
    }
)
_OF_CAPABILITY: Final = {known.capability: name for name, known in ARCHITECTURES.items()}


def architecture(capability: tuple[int, int]) -> str:
    """The architecture of a device, as in "sm_90a"; KernelError if none of ours runs there."""
    try:
        return _OF_CAPABILITY[capability]
    except KeyError:
        wanted = ", ".join(f"{major}.{minor}" for major, minor in _OF_CAPABILITY)
        do = "the references run on any device"
        got = "{}.{}".format(*capability)
        raise KernelError("no kernels for this compute capability", got=got, wanted=wanted, do=do) from None
