"""From the host to a device without waiting for what the device still has to do."""

from __future__ import annotations

import torch
from torch import Tensor


def sent(x: Tensor, device: torch.device) -> Tensor:
    """x, which lies on the CPU, on `device`. A copy out of memory that can be paged would wait for the stream."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)
