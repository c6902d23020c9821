"""The tiny model of the golden values, variants A to D: every weight from a formula on its Hub name."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from dsv4.checkpoint.names import parameters
from dsv4.config import ModelConfig
from dsv4.quant.formats import FP8_BLOCK, MXFP4
from dsv4.quant.tensor import QTensor
from tests.synthetic import u

IDS = [(7 * i * i + 3 * i + 1) % 32 for i in range(22)]


def config(quantised: bool = False, dspark: bool = False) -> ModelConfig:
    """Variant A (and B): widths of 64; C: widths of 128 and quantised weights; D: A with a three-stage draft."""
    wide = 128 if quantised else 64
    given: dict[str, Any] = ModelConfig.named("flash").to_dict() | {
        "vocab_size": 32, "hidden_size": wide, "moe_intermediate_size": wide if quantised else 32,
        "num_hidden_layers": 4, "num_hash_layers": 1, "num_attention_heads": 4, "head_dim": 128,
        "q_lora_rank": 128 if quantised else 32, "o_groups": 2, "o_lora_rank": 64 if quantised else 16,
        "n_routed_experts": 8, "num_experts_per_tok": 2, "routed_scaling_factor": 1.5, "swiglu_limit": 1.0,
        "sliding_window": 8, "compress_ratios": [0, 4, 8, 4, *([0, 0, 0] if dspark else [0])],
        "index_n_heads": 8, "index_topk": 3,
    }  # fmt: skip
    if not quantised:
        del given["quantization_config"]
        given.pop("expert_dtype", None)
    if dspark:
        given |= {
            "dspark_block_size": 5, "dspark_noise_token_id": 30, "dspark_target_layer_ids": [1, 2, 3],
            "dspark_markov_rank": 16,
        }  # fmt: skip
    return ModelConfig.from_dict(given)


def _formula(name: str, shape: tuple[int, ...]) -> Tensor:
    """FP32 weights of variant A."""
    if name.endswith("tid2eid"):
        rows, columns = torch.arange(shape[0]).unsqueeze(1), torch.arange(shape[1])
        return (3 * rows + 5 * columns) % 8
    value = u(name, int(np.prod(shape)))
    if "norm" in name or name.endswith("_scale"):
        value = 1 + 0.25 * value
    elif name.endswith("gate.bias"):
        value = 0.25 * value
    elif not (name.endswith(("ape", "attn_sink", "_base")) or name == "embed.weight"):
        value = value * np.sqrt(3 / shape[-1]) * (2 if "wgate" in name else 1)
    return torch.from_numpy(value.astype(np.float32)).view(shape)


def _exponent(inputs: int, largest: float) -> int:
    return int(np.floor(np.log2(np.sqrt(3 / inputs) / largest)))


def _fp8(name: str, out: int, inputs: int) -> QTensor:
    data = torch.from_numpy(448 * u(name, out * inputs)).float().to(torch.float8_e4m3fn).view(out, inputs)
    rows, columns = torch.arange(-(-out // 128)).unsqueeze(1), torch.arange(-(-inputs // 128))
    scale = _exponent(inputs, 448) + (rows + columns) % 2 + 127
    return QTensor(data, scale.to(torch.uint8), FP8_BLOCK)


def _fp4(name: str, out: int, inputs: int) -> QTensor:
    codes = torch.from_numpy(np.clip((8 * u(name, out * inputs) + 8).astype(np.int64), 0, 15)).view(out, inputs)
    packed = (codes[:, 0::2] | codes[:, 1::2] << 4).to(torch.uint8).view(MXFP4.data_dtype)
    rows, columns = torch.arange(out).unsqueeze(1), torch.arange(inputs // 32)
    scale = _exponent(inputs, 6) + (rows + columns) % 3 - 1 + 127
    return QTensor(packed, scale.to(torch.uint8), MXFP4)


def weights(model: ModelConfig, rounded: bool = False) -> dict[str, Tensor | QTensor]:
    """All weights by Hub name. `rounded`: what the official format stores as BF16 is rounded so (variants B and C)."""
    made: dict[str, Tensor | QTensor] = {}
    for param in parameters(model):
        if param.format is FP8_BLOCK:
            made[param.name] = _fp8(param.name, *param.shape)
        elif param.format is MXFP4:
            made[param.name] = _fp4(param.name, *param.shape)
        else:
            value = _formula(param.name, param.shape)
            made[param.name] = value.bfloat16() if rounded and param.dtype == "BF16" else value
    return made
