"""What the keys of a `config.json` must agree on among themselves."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from dsv4.errors import ConfigError

if TYPE_CHECKING:
    from dsv4.config import DSpark, ModelConfig

Rule = tuple[str, bool, object, str]  # the key to look at, whether it holds, got, wanted


def check_consistent(config: ModelConfig, source: str) -> None:
    """Raises ConfigError for the first rule that does not hold, naming its key."""
    rules = [*_widths(config), *_rope(config), *_layers(config), *_tokens(config), *_formats(config)]
    if config.dspark is not None:
        rules += _dspark(config, config.dspark)
    for name, holds, got, wanted in rules:
        if not holds:
            raise ConfigError(f"{source}: {name}", got=got, wanted=wanted)


def _widths(c: ModelConfig) -> Iterator[Rule]:
    rope, index, heads = c.qk_rope_head_dim, c.index_head_dim, c.num_attention_heads
    yield "qk_rope_head_dim", rope % 2 == 0, rope, "an even number"
    yield "qk_rope_head_dim", rope <= c.head_dim, rope, f"at most head_dim {c.head_dim}"
    yield "o_groups", heads % c.o_groups == 0, c.o_groups, f"a divisor of num_attention_heads {heads}"
    yield "index_head_dim", index & (index - 1) == 0, index, "a power of two, for the Hadamard transform"
    yield "index_head_dim", index >= rope, index, f"at least qk_rope_head_dim {rope}"
    chosen, experts = c.num_experts_per_tok, c.n_routed_experts
    yield "num_experts_per_tok", chosen <= experts, chosen, f"at most n_routed_experts {experts}"


def _rope(c: ModelConfig) -> Iterator[Rule]:
    fast, slow = c.rope_scaling.beta_fast, c.rope_scaling.beta_slow
    yield "rope_scaling.beta_slow", slow > 0, slow, "more than 0"
    yield "rope_scaling.beta_fast", fast > slow, fast, f"more than beta_slow {slow:g}"
    for name in ("rope_theta", "compress_rope_theta"):
        yield name, getattr(c, name) > 1, getattr(c, name), "more than 1"
    window, positions = c.sliding_window, c.max_position_embeddings
    yield "sliding_window", window <= positions, window, f"at most max_position_embeddings {positions}"


def _layers(c: ModelConfig) -> Iterator[Rule]:
    ratios, layers, draft = c.compress_ratios, c.num_hidden_layers, c.draft_layers
    hashed, tail = c.num_hash_layers, list(ratios[layers:])
    yield "num_hash_layers", hashed <= layers, hashed, f"at most num_hidden_layers {layers}"
    odd = next((ratio for ratio in ratios if 0 < ratio < 4), None)
    wanted = "0, 4 or more than 4 (ratios 1 and 2 are DeepSeek-V4.1, another architecture)"
    yield "compress_ratios", odd is None, f"ratio {odd}", wanted
    yield "compress_ratios", len(ratios) >= layers, f"{len(ratios)} entries", f"one for each of {layers} layers"
    wanted = f"{draft} zeros for the draft, or nothing"
    yield "compress_ratios", len(tail) in (0, draft) and not any(tail), f"{tail} after the main layers", wanted


def _tokens(c: ModelConfig) -> Iterator[Rule]:
    for name in ("bos_token_id", "eos_token_id"):
        yield name, getattr(c, name) < c.vocab_size, getattr(c, name), f"less than vocab_size {c.vocab_size}"


def _formats(c: ModelConfig) -> Iterator[Rule]:
    blocks = {f"layers.{n}" for n in range(c.num_hidden_layers)} | {f"mtp.{n}" for n in range(c.draft_layers)}
    banks = c.quantization.nvfp4 if c.quantization else frozenset()
    stray = sorted(bank for bank in banks if bank.removesuffix(".ffn.experts") not in blocks)
    quantised = c.quantization is not None
    yield "torch_dtype", c.torch_dtype == "bfloat16" or not quantised, c.torch_dtype, "bfloat16 if quantised"
    yield "expert_dtype", c.expert_dtype is None or quantised, c.expert_dtype, "a quantization_config beside it"
    yield "quantization_config.quantized_layers", not stray, ", ".join(stray[:3]), "expert banks of layers that exist"


def _dspark(c: ModelConfig, d: DSpark) -> Iterator[Rule]:
    ids, noise = d.target_layer_ids, d.noise_token_id
    yield "dspark_noise_token_id", noise < c.vocab_size, noise, f"less than vocab_size {c.vocab_size}"
    wanted = f"different layers below num_hidden_layers {c.num_hidden_layers}"
    distinct = 0 < len(set(ids)) == len(ids)
    yield "dspark_target_layer_ids", distinct and max(ids) < c.num_hidden_layers, list(ids), wanted
