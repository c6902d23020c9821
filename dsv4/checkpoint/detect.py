"""Which number formats a checkpoint really uses: read off its dtypes, and held against its configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from dsv4.checkpoint.specs import StoredFormats, TensorSpec
from dsv4.config import ModelConfig
from dsv4.config_fields import shown
from dsv4.errors import CheckpointError
from dsv4.quant.formats import FP8_BLOCK, FP8_BLOCK_F32, MXFP4, Format

_LINEAR: Final = "layers.0.attn.wq_a"
_OF_LINEARS: Final = (FP8_BLOCK, FP8_BLOCK_F32)
_OF_EXPERTS: Final = (MXFP4, FP8_BLOCK, FP8_BLOCK_F32)
_EXPERT_DTYPES: Final = {"mxfp4": "fp4", "fp8": "fp8", "fp8_f32": "fp8"}


def detect(config: ModelConfig, specs: Mapping[str, TensorSpec]) -> StoredFormats:
    """The formats of the tensors `specs`. CheckpointError if they contradict `config` or are none that it knows.

    One matrix of each kind is looked at: whether all others agree, the ledger sees.
    """
    refuse_resaved(specs)
    if config.quantization is None:
        _refuse_quantised(specs)
        return StoredFormats.of(config)
    linear = _format_of(_LINEAR, specs, _OF_LINEARS)
    nvfp4 = config.quantization.nvfp4
    probe = next((bank for bank in _banks(config) if bank not in nvfp4), None)
    experts = _format_of(f"{probe}.0.w1", specs, _OF_EXPERTS) if probe else MXFP4
    found = _EXPERT_DTYPES[experts.name]
    if config.expert_dtype not in (None, found):
        got, wanted = f"{found} ({_dtypes(f'{probe}.0.w1', specs)})", f"{config.expert_dtype}, as config.json says"
        raise CheckpointError(f"tensor {probe}.0.w1.weight: expert_dtype", got=got, wanted=wanted)
    return StoredFormats("BF16", linear, experts, nvfp4)


def refuse_resaved(specs: Mapping[str, TensorSpec]) -> None:
    """Raises CheckpointError for the names that transformers writes: half the Hub's, half its own."""
    strange = next((name for name in specs if name.startswith(("model.", "lm_head."))), None)
    if strange is not None:
        raise CheckpointError(
            f"tensor {shown(strange)}: transformers re-saved these weights under names of its own",
            wanted="the official names, such as 'layers.0.attn.wq_a.weight'",
            do="take the original: deepseek-ai repositories on the Hugging Face Hub, or what from_pretrained was given",
        )


def refuse_other_draft(config: ModelConfig, specs: Mapping[str, TensorSpec]) -> None:
    """Raises CheckpointError where `mtp.*` holds the other drafter than `config` says."""
    for kind, mark in (("mtp", "mtp.0.e_proj.weight"), ("dspark", "mtp.0.main_proj.weight")):
        if mark in specs and config.draft != kind:
            raise CheckpointError(
                f"tensor {mark} belongs to a drafter of kind {kind}",
                wanted=f"{config.draft}, as config.json says",
                do="give it the config.json that came with these weights",
            )


def _banks(config: ModelConfig) -> list[str]:
    blocks = [f"layers.{n}" for n in range(config.num_hidden_layers)] + [f"mtp.{n}" for n in range(config.draft_layers)]
    return [f"{block}.ffn.experts" for block in blocks]


def _format_of(stem: str, specs: Mapping[str, TensorSpec], allowed: tuple[Format, ...]) -> Format:
    weight, scale = specs.get(f"{stem}.weight"), specs.get(f"{stem}.scale")
    if weight is None:
        raise CheckpointError(f"tensor {stem}.weight is missing", do="the checkpoint is incomplete")
    for stored in allowed:
        if (weight.dtype, scale.dtype if scale else None) == (stored.data_name, stored.scale_name):
            return stored
    wanted = " or ".join(f"{stored.data_name} with {stored.scale_name} scales" for stored in allowed)
    hint = "config.json lists no such layer in quantized_layers" if weight.dtype == "U8" else None
    raise CheckpointError(f"tensor {stem}.weight", got=_dtypes(stem, specs), wanted=wanted, do=hint)


def _dtypes(stem: str, specs: Mapping[str, TensorSpec]) -> str:
    weight, scale = specs[f"{stem}.weight"], specs.get(f"{stem}.scale")
    return f"{weight.dtype} with {scale.dtype if scale else 'no'} scales"


def _refuse_quantised(specs: Mapping[str, TensorSpec]) -> None:
    packed = next((spec for spec in specs.values() if spec.dtype not in ("BF16", "F32", "I64")), None)
    if packed is not None:
        wanted = "BF16 or F32, since config.json has no quantization_config"
        raise CheckpointError(f"tensor {shown(packed.name)}", got=str(packed), wanted=wanted)
