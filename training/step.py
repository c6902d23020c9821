"""A pass forward and backward: as calls, or recorded once and replayed as one CUDA graph.

Thin models are made of thousands of short kernels, which a host cannot start as fast as a GPU runs them. A recorded
pass reads its tokens from tensors of its own and leaves losses and gradients in others; parameters stay in place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from training.feed import FULL, Block
from training.network import Losses, Network
from training.recipes import Phase, Recipe

KINDS = 256  # a byte numbers them
WARM_UP = 3  # passes before recording: compilers and libraries set themselves up


class Result(NamedTuple):
    """What a pass leaves beside gradients."""

    losses: dict[str, Tensor]
    load: dict[str, Tensor]  # tokens sent to each expert, by router
    kinds: Tensor  # [2, 256] FP64: by kind of document, loss of what was to be said, and how many tokens that was


def run_pass(network: Network, recipe: Recipe, phase: Phase, ids: Tensor, weights: Tensor, kinds: Tensor) -> Result:
    """Losses of B rows and their gradients.

    ids, weights, kinds: [B, S + 2] int64; how much a token counts, in hundredths, and of which kind its document is.
    """
    losses, length = Losses(), phase.length
    rows, following = network.rows(ids[:, :length]), network.rows(ids[:, 1 : length + 1])
    streams = network.streams(rows, losses, phase.sparse)
    each = network.losses(streams, following.ids)
    drafted = network.draft_losses(network.draft_streams(streams, following, losses), ids[:, 2:].flatten())
    share, draft_share = (weights[:, n : n + length].flatten().float() for n in (1, 2))
    loss, draft = (each * share).sum() / share.sum(), (drafted * draft_share).sum() / draft_share.sum()
    index = torch.stack(losses.index).mean()
    (loss + recipe.draft_weight * draft + index).backward()
    found = {"loss": loss, "draft": draft, "index": index, "recall": torch.stack(losses.recall).mean()}
    said = (weights[:, 1 : length + 1].flatten() == FULL).double()
    terms = torch.stack((each.detach() * said, said))
    which = kinds[:, 1 : length + 1].reshape(-1, 1) == torch.arange(KINDS, device=kinds.device)
    by_kind = terms @ which.double()  # in one order, unlike index_add
    return Result({name: value.detach() for name, value in found.items()}, losses.load, by_kind)


class Recorded:
    """A pass as one CUDA graph. Its gradients are set again at every call: other passes may have put theirs there."""

    def __init__(self, work: Callable[[], Result], params: Iterable[Tensor]) -> None:
        self.params = [p for p in params if p.requires_grad]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                self._clear()
                work()
        torch.cuda.current_stream().wait_stream(side)
        self._clear()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.result = work()
        self.gradients = [p.grad for p in self.params]

    def _clear(self) -> None:
        for p in self.params:
            p.grad = None

    def __call__(self) -> Result:
        """Replay."""
        for p, gradient in zip(self.params, self.gradients, strict=True):
            p.grad = gradient
        self.graph.replay()
        return self.result


class Passes:
    """Runs blocks through a network. On a GPU a kind of phase is recorded when it first comes, in place of the last."""

    def __init__(self, network: Network, recipe: Recipe, device: str, recorded: bool) -> None:
        self.network, self.recipe, self.device, self.recorded = network, recipe, device, recorded
        self.kind: tuple[int, bool] | None = None

    def __call__(self, phase: Phase, block: Block) -> Result:
        """Gradients are left on the parameters, nothing of an earlier pass among them."""
        given = [torch.from_numpy(array.astype("int64")) for array in block]
        if not self.recorded:
            for p in self.network.params.values():
                p.grad = None
            return run_pass(self.network, self.recipe, phase, *(t.to(self.device) for t in given))
        if self.kind != (phase.length, phase.sparse):
            self._record(phase, given)
        for static, tensor in zip(self.inputs, given, strict=True):
            static.copy_(tensor.pin_memory(), non_blocking=True)
        return self.replay()

    def _record(self, phase: Phase, given: list[Tensor]) -> None:
        self.replay: Any = None  # frees the memory of the kind before
        self.inputs = [tensor.to(self.device) for tensor in given]
        work = lambda: run_pass(self.network, self.recipe, phase, *self.inputs)  # noqa: E731
        self.replay = Recorded(work, self.network.params.values())
        self.kind = phase.length, phase.sparse
