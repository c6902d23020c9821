"""Other forms of a `config.json`: those refused with the reason, and the one that transformers re-saves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from dsv4.config_fields import shown
from dsv4.errors import ConfigError

_LAYER_TYPES: Final = {
    "sliding_attention": 0,
    "compressed_sparse_attention": 4,
    "heavily_compressed_attention": 128,
}
_RATE_KEYS: Final = {
    "compress_rate_csa": "compressed_sparse_attention",
    "compress_rate_hca": "heavily_compressed_attention",
}
_MLP_TYPES: Final = ("hash_moe", "moe")
_RESAVED: Final = ("layer_types", "mlp_layer_types", "rope_parameters", "compress_rates", *_RATE_KEYS)


def refuse_other_models(given: Mapping[str, Any], source: str) -> None:
    """Raises ConfigError, saying why, for V4.1, for vision checkpoints and for anything that is no DeepSeek-V4."""
    model_type = str(given.get("model_type", "")).lower().replace(".", "_")
    if "v4_1" in model_type or "v41" in model_type or "text_config" in given or any("engram" in k for k in given):
        raise ConfigError(
            f"{source}: this is DeepSeek-V4.1, another architecture (engram memory, ratios 1 and 2, shared KV sources)",
            got=shown(given.get("model_type")),
            wanted="model_type 'deepseek_v4'",
            do="use a V4 checkpoint",
        )
    if given.get("vision_n_layers") or given.get("vision_config"):
        raise ConfigError(
            f"{source}: this is a vision checkpoint, and this program reads text only",
            got="vision_n_layers" if given.get("vision_n_layers") else "vision_config",
            do="use the text checkpoint",
        )


def fold_resaved(given: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The official keys for a configuration that transformers wrote again; any other comes back as it was.

    Layer types become `compress_ratios` and `num_hash_layers`, `rope_parameters` becomes the two thetas and
    `rope_scaling`. A key that stands there in both forms must say the same in both.
    """
    flat = dict(given)
    flat.setdefault("torch_dtype", flat.pop("dtype", None))
    quantization = flat.get("quantization_config")
    if isinstance(quantization, dict) and "expert_dtype" in quantization:
        _put(flat, "expert_dtype", quantization["expert_dtype"], source)
    if not any(name in given for name in _RESAVED):
        return flat
    folded = {**_fold_layers(flat, source), **_fold_rope(flat, source)}
    for name, value in folded.items():
        _put(flat, name, value, source)
    flat.setdefault("topk_method", "noaux_tc")  # transformers does not keep it, and knows no other
    return {name: value for name, value in flat.items() if name not in (*_RESAVED, "partial_rotary_factor")}


def _put(flat: dict[str, Any], name: str, value: object, source: str) -> None:
    old = flat.get(name)
    if name == "compress_ratios" and isinstance(old, list) and isinstance(value, list):
        value = value + old[len(value) :]  # the re-saved form drops the draft blocks' zeros
    if old is not None and old != value:
        raise ConfigError(f"{source}: {name} is contradicted by its re-saved form", got=shown(old), wanted=shown(value))
    flat[name] = value


def _fold_layers(flat: Mapping[str, Any], source: str) -> dict[str, Any]:
    folded: dict[str, Any] = {}
    if flat.get("layer_types") is not None:
        rates = _rates(flat, source)
        folded["compress_ratios"] = [rates[t] for t in _types(flat, "layer_types", tuple(rates), source)]
    if flat.get("mlp_layer_types") is not None:
        types = _types(flat, "mlp_layer_types", _MLP_TYPES, source)
        hashed = types.count("hash_moe")
        if types[:hashed] != ["hash_moe"] * hashed:
            raise ConfigError(f"{source}: mlp_layer_types", got=shown(types), wanted="hash_moe first, then moe")
        folded["num_hash_layers"] = hashed
    return folded


def _rates(flat: Mapping[str, Any], source: str) -> dict[str, Any]:
    rates = flat.get("compress_rates") or {}
    if not isinstance(rates, dict) or not set(rates) <= set(_LAYER_TYPES):
        wanted = f"an object with keys {', '.join(_LAYER_TYPES)}"
        raise ConfigError(f"{source}: compress_rates", got=shown(rates), wanted=wanted)
    older = {kind: flat[name] for name, kind in _RATE_KEYS.items() if flat.get(name) is not None}
    return {**_LAYER_TYPES, **rates, **older}


def _types(flat: Mapping[str, Any], name: str, known: tuple[str, ...], source: str) -> list[str]:
    types = flat[name]
    if not isinstance(types, list) or not all(isinstance(t, str) and t in known for t in types):
        raise ConfigError(f"{source}: {name}", got=shown(types), wanted=f"a list of {', '.join(known)}")
    return types


def _fold_rope(flat: Mapping[str, Any], source: str) -> dict[str, Any]:
    rope = flat.get("rope_parameters")
    folded: dict[str, Any] = {}
    if flat.get("partial_rotary_factor") is not None and isinstance(flat.get("head_dim"), int):
        folded["qk_rope_head_dim"] = _rope_dims(flat, source)
    if rope is None:
        return folded
    main, compress = _rope_parts(rope, source)
    folded["rope_theta"] = main.get("rope_theta", flat.get("rope_theta"))
    folded["compress_rope_theta"] = compress.get("rope_theta", flat.get("compress_rope_theta"))
    if compress.get("rope_type") == "yarn":
        folded["rope_scaling"] = _yarn(compress)
    else:  # no scaling at all is YaRN by a factor of one
        whole = flat.get("max_position_embeddings")
        folded["rope_scaling"] = {"type": "yarn", "factor": 1, "original_max_position_embeddings": whole}
        folded["rope_scaling"] |= {"beta_fast": 32, "beta_slow": 1}
    return folded


def _rope_parts(rope: object, source: str) -> tuple[dict[str, Any], dict[str, Any]]:
    parts = [rope.get(name) for name in ("main", "compress")] if isinstance(rope, dict) else [None, None]
    if not isinstance(parts[0], dict) or not isinstance(parts[1], dict):
        raise ConfigError(f"{source}: rope_parameters", got=shown(rope), wanted="objects 'main' and 'compress'")
    if parts[0].get("rope_type", "default") != "default":
        raise ConfigError(f"{source}: rope_parameters.main", got=shown(parts[0]), wanted="rope_type 'default'")
    return parts[0], parts[1]


def _yarn(compress: Mapping[str, Any]) -> dict[str, Any]:
    dropped = ("rope_theta", "rope_type", "partial_rotary_factor")
    return {"type": "yarn", **{name: value for name, value in compress.items() if name not in dropped}}


def _rope_dims(flat: Mapping[str, Any], source: str) -> int:
    factor = flat["partial_rotary_factor"]
    if not isinstance(factor, int | float) or isinstance(factor, bool) or not 0 < factor <= 1:
        raise ConfigError(f"{source}: partial_rotary_factor", got=shown(factor), wanted="a number in (0, 1]")
    return round(int(flat["head_dim"]) * factor)
