"""Hugging Face transformers as the outside judge: its logits, what it selected and how closely, and its own noise.

The noise floor is what transformers differs from itself by when the same sum is taken in another order: with the
residual width and every expert's hidden units permuted in its weights (twice, once with each of its implementations
of the experts) and with the prompt fed through its cache in pieces. All of it is FP32 and equal in exact arithmetic,
and nothing of ours takes part.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

INF = float("inf")


@cache
def transformers() -> Any:
    """The package, imported by the one worker that needs it: seconds."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    return transformers


# Where the residual width stands in a weight of transformers' model: last dimension, or the one before.
_READS = (
    "embed_tokens", "lm_head", "model.norm", "input_layernorm", "post_attention_layernorm", "q_a_proj", "kv_proj",
    "gate_proj", "up_proj", "weights_proj", "mlp.gate", "gate_up_proj", "_hc.fn", "hc_fn",
)  # fmt: skip
_WRITES = ("o_b_proj", "down_proj")


@dataclass
class Trace:
    """One way through a prompt of T tokens. Sets and scores are keyed by layer and kind, such as "2.selected".

    `chosen`: [T, n] whether entry (or expert) n was taken. `scores`: [T, n] what was ranked, FP32, -inf where a token
    may not look; transformers only.
    """

    logits: Tensor  # [T, V] FP32
    chosen: dict[str, Tensor] = field(default_factory=dict)
    scores: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Verdict:
    """What transformers says of a prompt, and how far it may be believed."""

    base: Trace
    floor: float  # largest difference of a logit between two orders of the same sums
    ties: dict[str, float]  # of each ranking: margin of the closest choice, over the noise of the scores it compares


def rotations(config: dict[str, Any], label: str, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines [T, R / 2] of positions [T] for "main" or "compress" layers."""
    made = transformers().DeepseekV4Config(**config)
    from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4RotaryEmbedding

    cos, sin = DeepseekV4RotaryEmbedding(made)(torch.zeros(1), positions[None], layer_type=label)
    return cos[0], sin[0]


def members(indices: Tensor, width: int) -> Tensor:
    """[T, k] indices, -1 for none -> [T, width] membership."""
    table = torch.zeros(indices.shape[0], width + 1, dtype=torch.bool)
    return table.scatter(1, torch.where(indices < 0, width, indices), True)[:, :width]


def margins(scores: Tensor, chosen: Tensor) -> Tensor:
    """[T]: by how much the worst taken candidate beats the best one left; infinite where none is left."""
    return scores.masked_fill(~chosen, INF).amin(1) - scores.masked_fill(chosen, -INF).amax(1)


class Judge:
    """transformers' model in FP32, read by its own loader from a checkpoint in the official layout."""

    def __init__(self, directory: Path) -> None:
        loader: Any = transformers().DeepseekV4ForCausalLM
        model, info = loader.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
        faults = {name: found for name, found in info.items() if found}
        assert not faults, faults
        self.model: Any = model.float().eval()  # BF16-stored tensors stay BF16 on loading

    def verdict(self, ids: Tensor, generator: torch.Generator) -> Verdict:
        """The whole prompt at once, and how the same differs in three other orders. ids: [T]."""
        base = self.trace(self.model, ids, [len(ids)])
        others = [self.trace(self.permuted(generator), ids, [len(ids)])]
        with eager_experts(self.model):
            others.append(self.trace(self.permuted(generator), ids, [len(ids)]))
            others.append(self.trace(self.model, ids, [1, 130, 1, 70, 55, 1, 1]))
        floor = max(_distance(base.logits, other.logits) for other in others)
        noise = {name: max(_distance(s, other.scores[name]) for other in others) for name, s in base.scores.items()}
        closest = {name: float(margins(s, base.chosen[name]).min()) for name, s in base.scores.items()}
        return Verdict(base, floor, {name: closest[name] / noise[name] for name in noise})

    @torch.inference_mode()
    def trace(self, model: Any, ids: Tensor, pieces: Sequence[int]) -> Trace:
        """Feed `ids` [T] in pieces of these lengths (what is left as the last one), through the cache if several."""
        cuts = torch.tensor([0, *pieces]).cumsum(0).clamp(max=len(ids)).unique().tolist()
        spans = list(zip(cuts, [*cuts[1:], len(ids)], strict=True))
        whole = spans[0][1] == len(ids)
        cache = None if whole else transformers().DynamicCache(config=model.config)
        logits, seen = [], _Seen(model)
        with seen.watching():
            for start, end in spans:
                if start < end:
                    out = model(ids[None, start:end], past_key_values=cache, use_cache=not whole)
                    logits.append(out.logits[0])
        return Trace(torch.cat(logits), *seen.tables(len(ids)))

    def permuted(self, generator: torch.Generator) -> Any:
        """The same function of the tokens: residual width and the routed experts' hidden units in another order."""
        other = copy.deepcopy(self.model)
        d, f = other.config.hidden_size, other.config.moe_intermediate_size
        width, units = (torch.randperm(n, generator=generator) for n in (d, f))
        for name, tensor in other.state_dict().items():  # shares memory with the model
            tensor.copy_(_permute(name, tensor, width, units))
        return other


def _permute(name: str, tensor: Tensor, width: Tensor, units: Tensor) -> Tensor:
    stem = name.removesuffix(".weight")
    if stem.endswith(".experts.gate_up_proj"):
        tensor = tensor.unflatten(1, (2, -1))[:, :, units].flatten(1, 2)
    if stem.endswith(".experts.down_proj"):
        tensor = tensor[..., units]
    if stem.endswith(("_hc.fn", "hc_fn")):
        return tensor.unflatten(1, (-1, len(width)))[..., width].flatten(1)
    if stem.endswith(_READS):
        return tensor[..., width]
    return tensor[..., width, :] if stem.endswith(_WRITES) else tensor


@contextmanager
def eager_experts(model: Any) -> Iterator[None]:
    """One expert after another instead of transformers' grouped product."""
    before = model.config._experts_implementation
    model.set_experts_implementation("eager")
    try:
        yield
    finally:
        model.set_experts_implementation(before)


def _distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().nan_to_num(nan=0).max())  # -inf - -inf: neither may be looked at


class _Seen:
    """Forward hooks on what ranks and what selects."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.picked: dict[str, list[Tensor]] = {}
        self.ranked: dict[str, list[Tensor]] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        hooks = {
            "DeepseekV4Indexer": self._index,
            "DeepseekV4IndexerScorer": self._score,
            "DeepseekV4TopKRouter": self._route,
            "DeepseekV4HashRouter": self._route,
        }
        handles = []
        for name, module in self.model.named_modules():
            if hook := hooks.get(type(module).__name__):
                handles.append(module.register_forward_hook(_bound(hook, name.split(".")[2])))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _index(self, layer: str, _module: Any, out: Any) -> None:
        self.picked.setdefault(f"{layer}.selected", []).append(out[0])

    def _score(self, layer: str, _module: Any, out: Any) -> None:
        self.ranked.setdefault(f"{layer}.selected", []).append(out[0])

    def _route(self, layer: str, module: Any, out: Any) -> None:
        logits, _, experts = out
        self.picked.setdefault(f"{layer}.experts", []).append(experts)
        if hasattr(module, "e_score_correction_bias"):
            scores = module.score_fn(logits) + module.e_score_correction_bias
            self.ranked.setdefault(f"{layer}.experts", []).append(scores)

    def tables(self, tokens: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """(chosen, scores) of Trace."""
        widths = {"selected": tokens // 4, "experts": self.model.config.n_routed_experts}
        visible = {"selected": torch.arange(1, tokens + 1).unsqueeze(1) // 4, "experts": widths["experts"]}
        scores = {}
        for name, parts in self.ranked.items():
            kind = name.split(".")[1]
            table = torch.cat([torch.nn.functional.pad(part, (0, widths[kind] - part.shape[1])) for part in parts])
            scores[name] = table.masked_fill(torch.arange(widths[kind]) >= visible[kind], -INF)
        return join(self.picked, widths), scores


def join(picked: dict[str, list[Tensor]], widths: dict[str, int]) -> dict[str, Tensor]:
    """Indices of consecutive steps -> one membership table a layer and kind."""
    return {
        name: torch.cat([members(part, widths[name.split(".")[1]]) for part in parts]) for name, parts in picked.items()
    }


def _bound(hook: Callable[[str, Any, Any], None], layer: str) -> Callable[[Any, Any, Any], None]:
    return lambda module, _inputs, out: hook(layer, module, out)
