"""Frozen configurations by name: the official ones, and small ones that this program writes for itself."""

from __future__ import annotations

from typing import Any, Final

_YARN: Final = {
    "type": "yarn",
    "factor": 16,
    "original_max_position_embeddings": 65536,
    "beta_fast": 32,
    "beta_slow": 1,
}
_FP8: Final = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
    "scale_fmt": "ue8m0",
}


def _pattern(first: int, layers: int, draft: int) -> list[int]:
    """`first` twice, then 4 and 128 in turn, then a zero for every draft block (paper, section 4.2.1)."""
    return [first, first, *(4 if layer % 2 == 0 else 128 for layer in range(2, layers)), *[0] * draft]


def _dspark(layers: int, rank: int, noise: int = 128799) -> dict[str, Any]:
    return {
        "dspark_block_size": 5,
        "dspark_noise_token_id": noise,
        "dspark_target_layer_ids": [layers - 3, layers - 2, layers - 1],
        "dspark_markov_rank": rank,
    }


_FLASH: Final[dict[str, Any]] = {
    "architectures": ["DeepseekV4ForCausalLM"],
    "model_type": "deepseek_v4",
    "hidden_size": 4096,
    "num_hidden_layers": 43,
    "num_attention_heads": 64,
    "num_key_value_heads": 1,
    "head_dim": 512,
    "qk_rope_head_dim": 64,
    "q_lora_rank": 1024,
    "o_groups": 8,
    "o_lora_rank": 1024,
    "sliding_window": 128,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 6,
    "num_hash_layers": 3,
    "scoring_func": "sqrtsoftplus",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.5,
    "swiglu_limit": 10.0,
    "index_n_heads": 64,
    "index_head_dim": 128,
    "index_topk": 512,
    "hc_mult": 4,
    "hc_sinkhorn_iters": 20,
    "hc_eps": 1e-6,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "compress_rope_theta": 160000,
    "rope_scaling": _YARN,
    "max_position_embeddings": 1048576,
    "vocab_size": 129280,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "use_cache": True,
    "torch_dtype": "bfloat16",
    "num_nextn_predict_layers": 1,
    "quantization_config": _FP8,
    "compress_ratios": _pattern(0, 43, 1),
}
_PRO: Final[dict[str, Any]] = _FLASH | {
    "hidden_size": 7168,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "q_lora_rank": 1536,
    "o_groups": 16,
    "moe_intermediate_size": 3072,
    "n_routed_experts": 384,
    "routed_scaling_factor": 2.5,
    "index_topk": 1024,
    "expert_dtype": "fp4",
    "compress_ratios": _pattern(128, 61, 1),
}
# Narrow, but every width is a multiple of 128 and the indexer has 16 heads: fewer leave exact ties at zero.
_TINY: Final[dict[str, Any]] = _FLASH | {
    "hidden_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "head_dim": 128,
    "q_lora_rank": 128,
    "o_groups": 2,
    "o_lora_rank": 128,
    "moe_intermediate_size": 128,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "index_n_heads": 16,
    "index_topk": 16,
    "vocab_size": 5120,
    "expert_dtype": "fp4",
    "compress_ratios": _pattern(128, 6, 1),
}

NAMED: Final[dict[str, dict[str, Any]]] = {
    "flash": _FLASH,
    "pro": _PRO,
    "flash-0731": _FLASH | {"expert_dtype": "fp4", "compress_ratios": _pattern(0, 43, 3)} | _dspark(43, 256),
    "pro-0813": _PRO | {"compress_ratios": _pattern(128, 61, 3)} | _dspark(61, 512),
    "tiny-pro": _TINY,
    "tiny-flash-0731": _TINY | {"compress_ratios": _pattern(0, 6, 3)} | _dspark(6, 64, noise=2),
    "tiny-base": _TINY
    | {"compress_ratios": _pattern(0, 6, 1), "expert_dtype": "fp8"}
    | {"quantization_config": {name: value for name, value in _FP8.items() if name != "scale_fmt"}},
}
