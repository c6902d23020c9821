"""The mathematics against an outside judge: Hugging Face transformers on fresh random checkpoints.

Both sides read the same official-format files. Every position's logits must agree within four times the noise that
transformers shows against itself (tests/hf.py says how that is measured), with the same argmax wherever its two best
tokens lie further apart than that noise, and every router and indexer must take the same sets.

A ranking's near-tie is nobody's error, but it changes all later logits. So a prompt is drawn again, by transformers'
own scores and before ours are known, until each choice is clearer than the noise allows both sides to move its scores.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dsv4.cache.store import Store
from dsv4.checkpoint.load import Weight, load
from dsv4.checkpoint.names import parameters
from dsv4.checkpoint.reader import Checkpoint
from dsv4.checkpoint.synth import random_weight
from dsv4.checkpoint.write import write
from dsv4.config import EngineOptions, ModelConfig
from dsv4.model.batch import Segment, Steps
from dsv4.model.model import Model
from dsv4.ops.rope import rotation
from dsv4.taps import listening
from tests.hf import INF, Judge, Trace, Verdict, join, rotations, transformers

ALLOWED = 4  # times the noise floor
TOKENS = 300  # two blocks of 128 and some: every position of a block is twice the last of a prompt
SMALL: dict[str, Any] = {
    "hidden_size": 96, "head_dim": 64, "qk_rope_head_dim": 16, "num_attention_heads": 4, "q_lora_rank": 48,
    "o_groups": 2, "o_lora_rank": 24, "moe_intermediate_size": 64, "vocab_size": 211, "index_head_dim": 32,
    "swiglu_limit": 1.0, "num_hidden_layers": 3, "num_hash_layers": 1,
}  # fmt: skip
# Ratios name the layers; None takes a key away. Without quantisation the files hold FP32, or what torch_dtype says.
SHAPES: dict[str, dict[str, Any]] = {
    "window only": {"compress_ratios": [0, 0, 0], "sliding_window": 100, "num_experts_per_tok": 1},
    "ratio 4 only": {"compress_ratios": [4, 4, 4], "num_hash_layers": 0, "rms_norm_eps": 1e-5, "index_topk": 48},
    "ratio 128 only": {"compress_ratios": [128, 128, 128], "num_hash_layers": 3, "sliding_window": 64},
    "flash pattern": {"compress_ratios": [0, 0, 4, 128, 0], "num_hidden_layers": 4, "num_hash_layers": 3},
    "pro pattern": {"compress_ratios": [128, 128, 4, 128], "num_hidden_layers": 4, "routed_scaling_factor": 2.5},
    "64 index heads": {"compress_ratios": [4, 0, 4], "index_n_heads": 64, "index_head_dim": 16, "index_topk": 5},
    "24 experts, top 6": {
        "compress_ratios": [0, 4, 128], "n_routed_experts": 24, "num_experts_per_tok": 6, "num_hash_layers": 2,
        "moe_intermediate_size": 40,
    },
    "odd widths, one group": {
        "compress_ratios": [4, 128, 0], "hidden_size": 76, "num_attention_heads": 3, "head_dim": 38,
        "qk_rope_head_dim": 6, "q_lora_rank": 29, "o_groups": 1, "o_lora_rank": 17, "moe_intermediate_size": 36,
        "n_routed_experts": 7, "num_experts_per_tok": 3,
    },
    "a group a head, all rope": {
        "compress_ratios": [128, 4, 0], "num_attention_heads": 8, "head_dim": 32, "qk_rope_head_dim": 32,
        "o_groups": 8, "o_lora_rank": 9, "index_n_heads": 24,
    },
    "two streams, seven rounds": {"compress_ratios": [0, 4, 128], "hc_mult": 2, "hc_sinkhorn_iters": 7, "hc_eps": 1e-4},
    "strong yarn": {
        "compress_ratios": [4, 128, 4], "rope_theta": 300, "compress_rope_theta": 2000, "index_topk": 40,
        "rope_scaling": {"type": "yarn", "factor": 6, "original_max_position_embeddings": 96, "beta_fast": 4,
                         "beta_slow": 1},
    },
    "real head widths": {
        "compress_ratios": [4, 128], "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 512,
        "qk_rope_head_dim": 64, "index_head_dim": 128,
    },
    "BF16 files": {"compress_ratios": [0, 4, 128, 0], "torch_dtype": "bfloat16", "swiglu_limit": 10.0},
    "FP8 and FP4 files": {
        "compress_ratios": [128, 4, 0, 0], "hidden_size": 256, "head_dim": 128, "q_lora_rank": 128, "o_lora_rank": 64,
        "moe_intermediate_size": 128, "quantization_config": {}, "expert_dtype": "fp4",
    },
}  # fmt: skip
SLOW: dict[str, dict[str, Any]] = {
    "tiny-pro": {"named": "tiny-pro"},
    "tiny-flash-0731": {"named": "tiny-flash-0731"},
    "tiny-base": {"named": "tiny-base"},
    "24 layers": {"compress_ratios": [0, 0, *[4, 128] * 11], "num_hidden_layers": 24, "index_topk": 66},
}  # fmt: skip


def shape(name: str) -> ModelConfig:
    """The configuration of that name."""
    changes = dict((SHAPES | SLOW)[name])
    if "named" in changes:
        return ModelConfig.named(changes["named"])
    given = ModelConfig.named("tiny-pro").to_dict()
    if "quantization_config" in changes:
        changes["quantization_config"] = given["quantization_config"]
    else:
        given = {key: value for key, value in given.items() if key not in ("quantization_config", "expert_dtype")}
        given["torch_dtype"] = "float32"
    mtp = len(changes["compress_ratios"]) - changes.get("num_hidden_layers", SMALL["num_hidden_layers"])
    return ModelConfig.from_dict(given | SMALL | {"num_nextn_predict_layers": mtp} | changes)


def strong_weight(param: Any, config: ModelConfig, seed: int) -> Weight:
    """A random weight; those that a usual initialisation leaves weak or alike are drawn at full strength."""
    weight = random_weight(param, config, seed)
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{param.name}".encode()))
    if param.name.endswith(("_base", ".ape", ".gate.bias")):
        return torch.randn(param.shape, generator=generator)
    if param.name.endswith("_scale"):
        return 1 + 0.25 * torch.randn(param.shape, generator=generator)
    return weight


@dataclass
class Case:
    """A checkpoint, both readers of it, and a prompt that transformers finds free of near-ties."""

    config: ModelConfig
    directory: Path
    seed: int

    def __post_init__(self) -> None:
        params = parameters(self.config)
        write(self.directory, self.config, {p.name: strong_weight(p, self.config, self.seed) for p in params})
        self.judge = Judge(self.directory)
        self.redrawn, self.ids, self.verdict = self._draw()

    def _draw(self) -> tuple[int, Tensor, Verdict]:
        generator = torch.Generator().manual_seed(self.seed)
        for redrawn in range(20):
            ids = torch.randint(self.config.vocab_size, (TOKENS,), generator=generator)
            verdict = self.judge.verdict(ids, generator)
            # Each of two compared scores may be ALLOWED times its noise off.
            assert INF not in verdict.ties.values(), f"a ranking leaves nothing out: {verdict.ties}"
            if all(margin > 2 * ALLOWED for margin in verdict.ties.values()):
                return redrawn, ids, verdict
        raise AssertionError(f"every prompt has a near-tie: {verdict.ties}")

    @cached_property
    def model(self) -> Model:
        return Model(self.config, load(Checkpoint.open(self.directory), self.config), self.options)

    @property
    def options(self) -> EngineOptions:
        return EngineOptions(
            numerics="float", dtype="float32", max_context=TOKENS + 10, prefill_chunk=TOKENS, max_sequences=2
        )

    def ours(self, pieces: Sequence[int]) -> Trace:
        """Our way through the first sum(pieces) tokens, one step a piece."""
        store, slot, start = Store(self.config, self.options), 1, 0
        logits: list[Tensor] = []
        picked: dict[str, list[Tensor]] = {}

        def listen(name: str, layer: int, tensor: Tensor) -> None:
            if name in ("selected", "experts"):
                picked.setdefault(f"{layer}.{name}", []).append(tensor)

        with listening(listen):
            for count in pieces:
                step = self.model.batch([Segment(slot, start, self.ids[start : start + count].tolist())])
                logits.append(self.model.logits(self.model(step, store).streams))
                store.advance(slot, count)
                start += count
        widths = {"selected": TOKENS // 4, "experts": self.config.n_routed_experts}
        return Trace(torch.cat(logits), join(picked, widths))

    def check(self, pieces: Sequence[int], label: str) -> None:
        """Our logits and choices of those steps are those of transformers."""
        ours, base, floor = self.ours(pieces), self.verdict.base, self.verdict.floor
        tokens = sum(pieces)
        for name, chosen in base.chosen.items():
            differ = (ours.chosen[name] != chosen[:tokens]).any(1).nonzero().flatten().tolist()
            assert not differ, f"{label}: other choices in layer {name} at positions {differ[:5]}"
        delta = (ours.logits - base.logits[:tokens]).abs().amax(1)
        best = base.logits[:tokens].topk(2).values
        clear = best[:, 0] - best[:, 1] > floor
        agree = ours.logits.argmax(1) == base.logits[:tokens].argmax(1)
        print(
            f"| {label} | {tokens} | {floor:.1e} | {delta.max():.1e} | {delta.max() / floor:.2f} "
            f"| {int(agree.sum())} ({int(clear.sum())} clear) | {self.redrawn} | {self.seed} |"
        )
        assert delta.max() <= ALLOWED * floor, f"{label}: position {int(delta.argmax())} is off"
        assert agree[clear].all(), f"{label}: another token at {(clear & ~agree).nonzero().flatten().tolist()[:5]}"


EVERYDAY = ("flash pattern", "pro pattern", "odd widths, one group", "strong yarn", "FP8 and FP4 files")
ALL = [pytest.param(name, marks=[] if name in EVERYDAY else [pytest.mark.slow]) for name in SHAPES | SLOW]
STEPS = (1, 1, 1, 1, 122, 1, 1, 1, 1, 125, 1, 1, 1, 1, 41)  # decodes 1-3, 126-129, 255-258 with chunks between


@pytest.mark.parametrize("name", ALL)
def test_logits_are_those_of_transformers(name: str, seed: int, tmp_path: Path) -> None:
    case = Case(shape(name), tmp_path / "model", seed)
    case.check([TOKENS], name)
    case.check(STEPS, f"{name}, in steps")


@pytest.mark.parametrize("name", SHAPES)
def test_the_config_that_transformers_saves_again_is_the_same_model(name: str) -> None:
    official = shape(name)
    again = ModelConfig.from_dict(transformers().DeepseekV4Config(**official.to_dict()).to_dict())
    assert again == replace(official, compress_ratios=official.layer_ratios)  # it drops the draft's zeros


@pytest.mark.parametrize("name", ["flash", "pro"])
def test_rotations_up_to_a_million_are_those_of_transformers(name: str) -> None:
    config = ModelConfig.named(name)
    steps = Steps.of(config, "cpu")
    positions = torch.tensor([0, 1, 127, 128, 65535, 65536, 999_999, config.max_position_embeddings - 1])
    for label, ours in {"main": steps.plain, "compress": steps.yarn}.items():
        cos, sin = rotations(config.to_dict(), label, positions)
        turn = rotation(positions, ours)
        assert torch.equal(turn.cos[:, ::2], cos)
        assert torch.equal(turn.sin[:, 1::2], sin)


# Alone in the cache and then continued token by token: every residue mod 4 on both sides of two block borders.
BORDERS = [*range(125, 131), *range(253, 259)]


def test_a_prompt_that_ends_near_a_block_border_continues_as_in_transformers(seed: int, tmp_path: Path) -> None:
    case = Case(shape("flash pattern"), tmp_path / "model", seed)
    for n in BORDERS:
        case.check([n, 1, 1, 1], f"prompt of {n}, decoded")


@pytest.mark.slow
def test_a_prompt_of_any_length_continues_as_in_transformers(seed: int, tmp_path: Path) -> None:
    case = Case(shape("pro pattern"), tmp_path / "model", seed)
    for n in range(1, 261):
        case.check([n, 1], f"prompt of {n}, decoded")
