"""What a model is (`ModelConfig`), what was asked (`EngineOptions`), and what was decided (`Resolved`)."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, TypeVar

from dsv4.config_fields import key, key_names, read_fields, shown
from dsv4.config_forms import fold_resaved, refuse_other_models
from dsv4.config_named import NAMED
from dsv4.config_options import EngineOptions as EngineOptions
from dsv4.config_rules import check_consistent
from dsv4.errors import ConfigError

Draft = Literal["mtp", "dspark"]
DSPARK_STAGES: Final = 3
_WIDTH: Final = 1 << 17
# Keys that say nothing about inference: no use, and no report.
_BOOKKEEPING: Final = frozenset(
    {
        "architectures",
        "auto_map",
        "transformers_version",
        "initializer_range",
        "use_cache",
        "pad_token_id",
        "_name_or_path",
        "id2label",
        "label2id",
        "mlp_bias",
        "output_router_logits",
        "router_aux_loss_coef",
        "router_jitter_noise",
        "return_dict",
        "output_attentions",
        "output_hidden_states",
        "chunk_size_feed_forward",
        "is_encoder_decoder",
        "problem_type",
    }
)
_NVFP4_KEYS: Final = frozenset(
    {
        "quant_algo",
        "moe_quant_algo",
        "group_size",
        "ignore",
        "quantized_layers",
        "producer",
        "expert_dtype",
    }
)
_MAX_BYTES: Final = 1 << 22  # the official file holds 2 kB; a map of quantised layers a few hundred


@dataclass(frozen=True, kw_only=True)
class Yarn:
    """`rope_scaling`: YaRN for the layers that compress. The amplitude factor of this family is always 1."""

    type: str = key("str", only=("yarn",))
    factor: float = key("float", low=1)
    original_max_position_embeddings: int = key("int", low=1)
    beta_fast: float = key("float", low=0)
    beta_slow: float = key("float", low=0)
    attention_factor: float = key("float", only=(1.0,), absent=1.0)


@dataclass(frozen=True, kw_only=True)
class DSpark:
    """The keys `dspark_*`: a drafter of three stages that proposes `block_size` tokens at once."""

    block_size: int = key("int", low=1, high=64)
    noise_token_id: int = key("int", low=0)
    target_layer_ids: tuple[int, ...] = key("ints", low=0)
    markov_rank: int = key("int", low=1, high=_WIDTH)


@dataclass(frozen=True, kw_only=True)
class Quantization:
    """`quantization_config`: FP8 linears in blocks of 128 by 128; `nvfp4` names the expert banks stored as NVFP4.

    `scale_fmt` None means F32 scales. With "ue8m0" scales are powers of two, stored as UE8M0 or (Base) as F32.
    """

    quant_method: str = key("str", only=("fp8",))
    fmt: str = key("str", only=("e4m3",), absent="e4m3")
    activation_scheme: str = key("str", only=("dynamic",), absent="dynamic")
    weight_block_size: tuple[int, ...] = key("ints", only=((128, 128),))
    scale_fmt: str | None = key("str", only=("ue8m0",), absent=None)
    nvfp4: frozenset[str] = frozenset()


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """An official `config.json`, checked; attributes bear its keys. Build one with `load`, `from_dict` or `named`.

    `compress_ratios` decides the layers: 0 is a window alone, 4 compresses with overlap and selects by the indexer,
    any larger ratio (128 in every release) compresses plainly. Entries after the main layers belong to the draft.
    """

    model_type: str = key("str", only=("deepseek_v4",))
    hidden_size: int = key("int", low=1, high=_WIDTH)
    num_hidden_layers: int = key("int", low=1, high=1024)
    num_attention_heads: int = key("int", low=1, high=4096)
    num_key_value_heads: int = key("int", only=(1,))
    head_dim: int = key("int", low=1, high=_WIDTH)
    qk_rope_head_dim: int = key("int", low=2)
    q_lora_rank: int = key("int", low=1, high=_WIDTH)
    o_groups: int = key("int", low=1, high=4096)
    o_lora_rank: int = key("int", low=1, high=_WIDTH)
    sliding_window: int = key("int", low=1)
    moe_intermediate_size: int = key("int", low=1, high=_WIDTH)
    n_routed_experts: int = key("int", low=1, high=4096)
    n_shared_experts: int = key("int", only=(1,))
    num_experts_per_tok: int = key("int", low=1)
    num_hash_layers: int = key("int", low=0)
    scoring_func: str = key("str", only=("sqrtsoftplus",))
    topk_method: str = key("str", only=("noaux_tc",))
    norm_topk_prob: bool = key("bool", only=(True,))
    routed_scaling_factor: float = key("float", low=1e-6)
    swiglu_limit: float = key("float", low=1e-6)
    index_n_heads: int = key("int", low=1, high=4096)
    index_head_dim: int = key("int", low=1, high=_WIDTH)
    index_topk: int = key("int", low=1)
    hc_mult: int = key("int", low=1, high=16)
    hc_sinkhorn_iters: int = key("int", low=1, high=1000)
    hc_eps: float = key("float", low=1e-30, high=1)
    rms_norm_eps: float = key("float", low=1e-30, high=1)
    rope_theta: float = key("float", low=1)
    compress_rope_theta: float = key("float", low=1)
    max_position_embeddings: int = key("int", low=1)
    vocab_size: int = key("int", low=1, high=1 << 22)
    bos_token_id: int = key("int", low=0)
    eos_token_id: int = key("int", low=0)
    tie_word_embeddings: bool = key("bool", only=(False,))
    attention_bias: bool = key("bool", only=(False,))
    attention_dropout: float = key("float", only=(0.0,), absent=0.0)
    hidden_act: str = key("str", only=("silu",))
    num_nextn_predict_layers: int = key("int", only=(0, 1))
    compress_ratios: tuple[int, ...] = key("ints", low=0)
    expert_dtype: str | None = key("str", only=("fp4", "fp8"), absent=None)
    torch_dtype: str = key("str", only=("bfloat16", "float32"), absent="bfloat16")
    rope_scaling: Yarn
    dspark: DSpark | None = None
    quantization: Quantization | None = None
    unknown: tuple[str, ...] = dataclasses.field(default=(), compare=False)

    @classmethod
    def load(cls, directory: str | Path) -> ModelConfig:
        """Reads `directory/config.json`. ConfigError if it is missing, no JSON, refused or contradicts itself."""
        path = Path(directory) / "config.json"
        return cls.from_dict(read_json(path), source=str(path))

    @classmethod
    def named(cls, name: str) -> ModelConfig:
        """A frozen configuration of `config_named.NAMED`, such as "flash" or "tiny-pro"."""
        if name not in NAMED:
            raise ConfigError("unknown configuration name", got=shown(name), wanted=" or ".join(NAMED))
        return cls.from_dict(NAMED[name], source=name)

    @classmethod
    def find(cls, target: str) -> ModelConfig:
        """A named configuration, or the one in a directory. ConfigError lists the names where it is neither."""
        if target in NAMED:
            return cls.named(target)
        if not Path(target).is_dir():
            raise ConfigError(f"{shown(target)} is no directory", wanted="a checkpoint, or " + ", ".join(NAMED))
        return cls.load(target)

    @classmethod
    def from_dict(cls, given: Mapping[str, Any], source: str = "config") -> ModelConfig:
        """Checks every key. ConfigError names the first that is missing, out of range or contradicted."""
        if not isinstance(given, Mapping):
            raise ConfigError(source, got=shown(given), wanted="a JSON object")
        refuse_other_models(given, source)
        flat = fold_resaved(given, source)
        values = read_fields(cls, flat, source)
        values["rope_scaling"], of_rope = _read_rope(flat.get("rope_scaling"), source)
        values["dspark"], of_dspark = _read_dspark(flat, source)
        values["quantization"], of_quantization = _read_quantization(flat.get("quantization_config"), source)
        known = key_names(cls) | _BOOKKEEPING | {"rope_scaling", "quantization_config"}
        unknown = [name for name in flat if name not in known and not name.startswith("dspark_")]
        config = cls(**values, unknown=tuple(sorted(unknown + of_rope + of_dspark + of_quantization)))
        check_consistent(config, source)
        return config

    def to_dict(self) -> dict[str, Any]:
        """The official keys, ready for `json.dump`; `from_dict` of it is this configuration again."""
        flat: dict[str, Any] = {"architectures": ["DeepseekV4ForCausalLM"]}
        flat |= {name: _plain(getattr(self, name)) for name in _ordered_keys(ModelConfig)}
        flat["rope_scaling"] = {name: getattr(self.rope_scaling, name) for name in _ordered_keys(Yarn)[:-1]}
        if self.quantization is not None:
            flat["quantization_config"] = _quantization_dict(self.quantization)
        if self.dspark is not None:
            flat |= {f"dspark_{name}": _plain(getattr(self.dspark, name)) for name in _ordered_keys(DSpark)}
        return {name: value for name, value in flat.items() if value is not None}

    @property
    def layer_ratios(self) -> tuple[int, ...]:
        """The compression ratio of every main layer."""
        return self.compress_ratios[: self.num_hidden_layers]

    def shortened(self, layers: int) -> ModelConfig:
        """The first layers of it, without a draft. ConfigError where it has not so many."""
        if not 0 < layers <= self.num_hidden_layers:
            raise ConfigError("layers", got=layers, wanted=f"1 to {self.num_hidden_layers}")
        return dataclasses.replace(
            self,
            num_hidden_layers=layers,
            compress_ratios=self.compress_ratios[:layers],
            num_hash_layers=min(layers, self.num_hash_layers),
            num_nextn_predict_layers=0,
            dspark=None,
        )

    @property
    def draft(self) -> Draft | None:
        """Which drafter `mtp.*` holds. The `dspark_*` keys decide: `num_nextn_predict_layers` is 1 in both releases."""
        if self.dspark is not None:
            return "dspark"
        return "mtp" if self.num_nextn_predict_layers else None

    @property
    def draft_layers(self) -> int:
        """Number of `mtp.*` blocks: 3, 1 or 0."""
        return {"dspark": DSPARK_STAGES, "mtp": 1, None: 0}[self.draft]

    def layer_counts(self) -> dict[int, int]:
        """How many main layers have each ratio, in rising order."""
        return {ratio: self.layer_ratios.count(ratio) for ratio in sorted(set(self.layer_ratios))}


def read_json(path: Path) -> Any:
    """The JSON value in a small file. ConfigError if it is missing, too large, no JSON, or says one key twice."""
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ConfigError(str(path), got=f"{path.stat().st_size} bytes", wanted=f"at most {_MAX_BYTES}")
        return json.loads(path.read_bytes(), object_pairs_hook=_unique_keys)
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist", do="give a directory that holds a DeepSeek-V4 checkpoint") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read", got=error.strerror) from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is no JSON", got=str(error)[:80]) from None


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"key {next(name for name in names if names.count(name) > 1)!r} twice")
    return table


_S = TypeVar("_S")


def _section(
    cls: type[_S], given: object, source: str, prefix: str, also: frozenset[str] = frozenset()
) -> tuple[_S, list[str]]:
    """One nested dataclass, and the keys that neither it nor `also` knows."""
    if not isinstance(given, Mapping):
        raise ConfigError(f"{source}: {prefix[:-1]}", got=shown(given), wanted="an object")
    unknown = [f"{prefix}{name}" for name in given if name not in key_names(cls) | also]
    return cls(**read_fields(cls, given, source, prefix)), unknown


def _read_rope(given: object, source: str) -> tuple[Yarn, list[str]]:
    if isinstance(given, Mapping) and "rope_type" in given:
        given = {"type": given["rope_type"], **given}
    return _section(Yarn, given, source, "rope_scaling.", frozenset({"rope_type"}))


def _read_dspark(flat: Mapping[str, Any], source: str) -> tuple[DSpark | None, list[str]]:
    keys = {name.removeprefix("dspark_"): value for name, value in flat.items() if name.startswith("dspark_")}
    return _section(DSpark, keys, source, "dspark_") if keys else (None, [])


def _read_quantization(given: object, source: str) -> tuple[Quantization | None, list[str]]:
    if given is None:
        return None, []
    quantization, unknown = _section(Quantization, given, source, "quantization_config.", _NVFP4_KEYS)
    assert isinstance(given, Mapping)
    return dataclasses.replace(quantization, nvfp4=_nvfp4_banks(given, source)), unknown


def _nvfp4_banks(given: Mapping[str, Any], source: str) -> frozenset[str]:
    """Expert banks such as "layers.3.ffn.experts". Only `quantized_layers` says it: the draft's experts stay MXFP4."""
    where, layers = f"{source}: quantization_config.quantized_layers", given.get("quantized_layers")
    if layers is None and given.get("moe_quant_algo") is None:
        return frozenset()
    if not isinstance(layers, Mapping):
        raise ConfigError(where, got=shown(layers), wanted="an object that names the NVFP4 expert banks")
    for name, entry in layers.items():
        algo = entry.get("quant_algo") if isinstance(entry, Mapping) else entry
        if algo != "NVFP4" or not name.endswith(".ffn.experts"):
            raise ConfigError(f"{where}.{name}", got=shown(algo), wanted="NVFP4 for '<layer>.ffn.experts'")
    return frozenset(layers)


def _ordered_keys(cls: type[Any]) -> list[str]:
    return [field.name for field in dataclasses.fields(cls) if field.name in key_names(cls)]


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


def _quantization_dict(q: Quantization) -> dict[str, Any]:
    flat = {name: _plain(getattr(q, name)) for name in _ordered_keys(Quantization)}
    if q.nvfp4:
        flat |= {"quant_algo": "MIXED_PRECISION", "moe_quant_algo": "NVFP4", "group_size": 16}
        flat["quantized_layers"] = {bank: {"quant_algo": "NVFP4", "group_size": 16} for bank in sorted(q.nvfp4)}
    return {name: value for name, value in flat.items() if value is not None}


@dataclass(frozen=True)
class Resolved:
    """What was decided, printed once at start: configuration, options, and `facts` (name and text) beside them."""

    model: ModelConfig
    options: EngineOptions
    facts: tuple[tuple[str, str], ...] = ()

    def lines(self, *more: tuple[str, str]) -> list[str]:
        """One line a decision, names aligned; then `more` names and texts."""
        c, o = self.model, self.options
        kinds = {0: "window", 4: "ratio 4 with indexer"}
        layers = ", ".join(f"{n} {kinds.get(ratio, f'ratio {ratio}')}" for ratio, n in c.layer_counts().items())
        own = (
            ("layers", f"{c.num_hidden_layers} ({layers}), draft {c.draft or 'none'}"),
            ("width", f"{c.hidden_size}, {c.num_attention_heads} heads of {c.head_dim}"),
            ("experts", f"{c.n_routed_experts}, {c.num_experts_per_tok} a token, and 1 shared"),
            ("numerics", f"{o.numerics}, activations {o.dtype}{', in bytes' if o.stored else ''}, on {o.device}"),
            ("context", f"{o.max_context} positions, {o.max_sequences} sequences, prefill by {o.prefill_chunk}"),
        )
        rows = self.facts + own + more
        width = max(len(name) for name, _ in rows)
        return [f"{name:<{width}}  {text}" for name, text in rows]
