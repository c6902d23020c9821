"""What is trained, on what, and for how long: everything that decides a model's numbers beside the code."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from dsv4.config import ModelConfig
from dsv4.config_named import NAMED

MiB = 1 << 20

# Shares of tokens. Names are families of dsv4/check/tasks, sources of training/sources.py, or "definitions". Texts come
# out at half as much again, because passages fill what whole exercises leave of a row, and each token of theirs counts
# fully: of old English there is little. Most long texts are asked many questions ("needles"), as a needle alone teaches
# one answer in thousands of tokens. What people say first is short: a small share ("talk") is many examples.
MIXTURE: Final = {
    "wordnet": 5, "definitions": 4, "python-docs": 1.5, "sqlite-docs": 0.7, "postgresql-docs": 0.8, "python-code": 1,
    "king-james": 0.5, "shakespeare": 0.5, "jargon": 0.7, "devil": 0.2,
    "story": 8, "continue_story": 4, "story_question": 4,
    "capital": 4, "country": 2, "continent": 1.5, "demonym": 1, "language": 1, "simple_facts": 2,
    "add": 7, "subtract": 6, "multiply": 2.5, "compare": 1, "word_problem": 3,
    "copy": 3, "reverse": 1, "sort": 2, "count": 0.7, "first": 0.5, "last": 0.5, "nth": 0.7, "membership": 0.7,
    "uppercase": 1, "name_some": 0.7, "sequence": 0.7,
    "needle": 5, "needles": 11, "memory": 1.5, "remember": 1,
    "tool_call": 12, "tool_parallel": 3, "tool_none": 3, "tool_result": 2, "json": 3, "json_prompt": 1.5,
    "define": 1.5, "opposite": 0.7, "plural": 0.7, "past_tense": 0.7, "spell": 0.7, "category": 0.7,
    "talk": 2, "chat": 1.5, "conversation": 5, "unknown": 1.5, "obey": 1.5, "repeats": 3,
}  # fmt: skip


@dataclass(frozen=True)
class Phase:
    """A stretch of training with rows of one length.

    `sparse`: attention sees what the indexers select; else it sees all, and the indexers learn from all. `long`: how
    much more than their share the families get whose prompts can fill a row.
    """

    steps: int
    length: int
    sparse: bool
    long: float = 1.0


@dataclass(frozen=True)
class Recipe:
    """`limit`: bytes that the exported directory may have."""

    config: ModelConfig
    phases: tuple[Phase, ...]
    limit: int
    mixture: Mapping[str, float] = field(default_factory=lambda: MIXTURE)
    tokens: int = 32768  # of a step
    seed: int = 1
    matrix_rate: float = 5e-3  # Muon's, as a share of each matrix's RMS of 0.2
    rate: float = 3e-3  # AdamW's
    warmup: int = 100
    cooldown: float = 0.5  # the last part of all steps, in which the rates fall to nothing
    decay: float = 0.1
    draft_weight: float = 0.3
    prompt_weight: float = 0.1  # of a token of a prompt, beside 1 of an answer's
    prompt_most: float = 60.0  # of a whole prompt: a long one is mostly filler

    @property
    def steps(self) -> int:
        """Of all phases."""
        return sum(phase.steps for phase in self.phases)


def _config(**changes: Any) -> ModelConfig:
    return ModelConfig.from_dict(copy.deepcopy(NAMED["flash"]) | changes)


_COMMON: Final = {"vocab_size": 5120, "num_hash_layers": 3, "expert_dtype": "fp4"}

TINY: Final = _config(
    **_COMMON,
    hidden_size=128,
    num_hidden_layers=7,
    compress_ratios=[0, 0, 4, 128, 4, 128, 4, 0],
    num_attention_heads=4,
    q_lora_rank=128,
    o_groups=2,
    o_lora_rank=128,
    moe_intermediate_size=128,
    n_routed_experts=12,
    index_n_heads=16,
    index_topk=128,
)
DEEP61: Final = _config(
    **_COMMON,
    hidden_size=64,
    num_hidden_layers=61,
    compress_ratios=[128, 128, *(4 if layer % 2 == 0 else 128 for layer in range(2, 61)), 0],
    num_attention_heads=4,
    head_dim=64,
    qk_rope_head_dim=16,
    q_lora_rank=64,
    o_groups=2,
    o_lora_rank=64,
    moe_intermediate_size=64,
    n_routed_experts=12,
    routed_scaling_factor=2.5,
    index_n_heads=16,
    index_head_dim=32,
    index_topk=64,
)
RECIPES: Final = {
    "tiny": Recipe(
        TINY,
        # Long rows come before the rates have fallen: what is found at 1,024 tokens has to be found at 32,768.
        (
            Phase(6000, 1024, False),
            Phase(600, 4096, False, long=2),
            Phase(2000, 1024, True),
            Phase(600, 4096, True, long=2),
            Phase(160, 32768, False, long=4),
            Phase(240, 32768, True, long=4),
            Phase(800, 1024, True),
        ),
        16 * MiB,
    ),
    # Half the tokens of a step: what 61 layers keep for the gradient has to fit into 80 GB.
    "deep61": Recipe(
        DEEP61,
        (Phase(4000, 1024, False), Phase(1600, 1024, True)),
        20 * MiB,
        tokens=16384,
        matrix_rate=3e-3,
        warmup=300,
    ),
}
