"""A checkpoint's parameters as tensors: plain ones as stored, quantised matrices whole as QTensors."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Final, NamedTuple

import torch

from dsv4.checkpoint.ledger import Ledger, balance
from dsv4.checkpoint.reader import Checkpoint
from dsv4.checkpoint.specs import Param
from dsv4.config import ModelConfig
from dsv4.errors import CheckpointError
from dsv4.quant.formats import has_nan_scale
from dsv4.quant.tensor import QTensor

Weight = torch.Tensor | QTensor
_READERS: Final = 4  # files are read and copied by so many threads: one alone does not keep a fast disk busy


class LoadProgress(NamedTuple):
    """`done` of `total` of a stage after `seconds` of it; `what` is under way, or just done, such as "layers.3".

    unit: of `done` and `total`, such as "bytes" or "layers". total 0: nobody knows how much there is to do.
    """

    done: int
    total: int
    seconds: float
    what: str
    stage: str = "weights"
    unit: str = "bytes"

    @property
    def rate(self) -> float:
        """Units a second so far."""
        return self.done / self.seconds if self.seconds > 0 else 0.0

    @property
    def left(self) -> float | None:
        """Seconds that the rest of the stage takes at this rate; None while there is none."""
        return (self.total - self.done) / self.rate if self.rate and self.total else None


Progress = Callable[[LoadProgress], None]


class Handed(Mapping[str, Weight]):
    """Weights that are given away, each once: whoever packs or widens one then has it alone, and may free it.

    taken: told the name of each, when it is.
    """

    def __init__(self, weights: dict[str, Weight], taken: Callable[[str], None] | None = None) -> None:
        self._weights, self._taken = weights, taken

    def __getitem__(self, name: str) -> Weight:
        weight = self._weights.pop(name)
        if self._taken is not None:
            self._taken(name)
        return weight

    def __contains__(self, name: object) -> bool:
        return name in self._weights

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


def load(
    checkpoint: Checkpoint,
    config: ModelConfig,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
    draft: bool = True,
) -> dict[str, Weight]:
    """Every parameter of `config` by its Hub name; a quantised matrix "….weight" is a QTensor that holds its scales.

    Names, shapes and dtypes are checked before a byte is copied (`ledger.balance`), NaN scales and expert ids out of
    range while loading: CheckpointError. On the CPU the tensors share the files' mapping. `progress` is called once
    for every part, such as "layers.3", from this thread.
    """
    return load_ledger(checkpoint, balance(config, checkpoint.specs, draft), config, device, progress)


def load_ledger(
    checkpoint: Checkpoint,
    ledger: Ledger,
    config: ModelConfig,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> dict[str, Weight]:
    """As `load`, for a caller that made the ledger itself, to show what was ignored."""
    weights: dict[str, Weight] = {}
    start, done, total = time.monotonic(), 0, ledger.nbytes
    with ThreadPoolExecutor(_READERS) as pool:
        for part, params in _parts(ledger.params):
            loaded = pool.map(lambda param: _fetch(checkpoint, param, config, device), params)
            weights.update(zip((param.name for param in params), loaded, strict=True))
            done += sum(param.nbytes for param in params)
            if progress is not None:
                progress(LoadProgress(done, total, time.monotonic() - start, part))
    return weights


def _parts(params: tuple[Param, ...]) -> Iterator[tuple[str, list[Param]]]:
    """Runs of parameters that belong together: "embed", "layers.0", "mtp.0"."""
    parts: dict[str, list[Param]] = {}
    for param in params:
        parts.setdefault(part_of(param.name), []).append(param)
    yield from parts.items()


def part_of(name: str) -> str:
    """The run of parameters that one belongs to: "layers.3" of "layers.3.attn.wq_a.weight"."""
    words = name.split(".")
    return ".".join(words[:2]) if words[0] in ("layers", "mtp") else words[0]


def _fetch(checkpoint: Checkpoint, param: Param, config: ModelConfig, device: torch.device | str) -> Weight:
    tensors = [checkpoint.tensor(spec.name) for spec in param.stored()]
    if param.format is None:
        if param.name.endswith(".tid2eid"):
            _check_ids(param.name, tensors[0], config.n_routed_experts)
        return tensors[0].to(device)
    matrix = QTensor(tensors[0], tensors[1], param.format, tensors[2] if len(tensors) > 2 else None)
    _check_scales(param, matrix)
    return matrix.to(device)


def _check_scales(param: Param, matrix: QTensor) -> None:
    whole, scale = matrix.global_scale, matrix.scale
    infinite = scale.dtype == torch.float32 and not bool(scale.isfinite().all())
    if has_nan_scale(matrix) or infinite or (whole is not None and not bool(whole.isfinite())):
        name = param.stored()[1].name
        raise CheckpointError(f"tensor {name}", got="NaN or Inf", wanted="finite scales", do="download it again")


def _check_ids(name: str, table: torch.Tensor, experts: int) -> None:
    low, high = int(table.min()), int(table.max())
    if low < 0 or high >= experts:
        raise CheckpointError(f"tensor {name}", got=f"expert ids {low} to {high}", wanted=f"0 to {experts - 1}")
