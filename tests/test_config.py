"""A `config.json` is read whole: every key checked, every contradiction named, other models refused with the reason."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4.config import EngineOptions, ModelConfig, Resolved
from dsv4.config_named import NAMED
from dsv4.errors import ConfigError
from tests import PICO
from tests.micro import micro_config, micro_dict

PRO = NAMED["pro-0813"]
MAY_BE_ABSENT = {
    "architectures", "attention_dropout", "initializer_range", "use_cache", "torch_dtype", "expert_dtype",
}  # fmt: skip


def test_flash_has_the_values_of_its_release() -> None:
    flash = ModelConfig.named("flash")
    assert (flash.hidden_size, flash.num_hidden_layers, flash.n_routed_experts) == (4096, 43, 256)
    assert flash.layer_counts() == {0: 2, 4: 21, 128: 20}
    assert flash.layer_ratios[:5] == (0, 0, 4, 128, 4)
    assert len(flash.compress_ratios) == 44
    assert (flash.draft, flash.draft_layers, flash.expert_dtype) == ("mtp", 1, None)
    assert flash.rope_scaling.original_max_position_embeddings == 65536


def test_pro_0813_differs_from_flash_0731_in_the_twelve_published_keys() -> None:
    flash, pro = NAMED["flash-0731"], NAMED["pro-0813"]
    assert {name for name in pro if pro[name] != flash.get(name)} == {
        "dspark_markov_rank", "dspark_target_layer_ids", "hidden_size", "index_topk", "moe_intermediate_size",
        "n_routed_experts", "num_attention_heads", "num_hidden_layers", "o_groups", "q_lora_rank",
        "routed_scaling_factor", "compress_ratios",
    }  # fmt: skip
    config = ModelConfig.named("pro-0813")
    assert (config.draft, config.draft_layers, len(config.compress_ratios)) == ("dspark", 3, 64)
    assert config.num_nextn_predict_layers == 1  # which therefore says nothing about the drafter


@pytest.mark.parametrize("name", NAMED)
def test_to_dict_reads_back_as_the_same_configuration(name: str) -> None:
    config = ModelConfig.named(name)
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert set(config.to_dict()) >= set(NAMED[name]) - {"initializer_range", "use_cache"}


@pytest.mark.parametrize("name", sorted(set(PRO) - MAY_BE_ABSENT - {"quantization_config"}))
def test_a_missing_key_is_named(name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        ModelConfig.from_dict({key: value for key, value in PRO.items() if key != name})


@pytest.mark.parametrize("name", sorted(MAY_BE_ABSENT))
def test_a_key_that_may_be_absent_is_not_missed(name: str) -> None:
    ModelConfig.from_dict({key: value for key, value in PRO.items() if key != name})


@pytest.mark.parametrize("wrong", [True, "7", 1.5, -1, 0, None, [], {}, 10**40, float("nan")])
@pytest.mark.parametrize("name", ["hidden_size", "num_hidden_layers", "head_dim", "vocab_size", "hc_mult"])
def test_a_wrong_count_is_named(name: str, wrong: object) -> None:
    with pytest.raises(ConfigError, match=name) as caught:
        ModelConfig.from_dict(PRO | {name: wrong})
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 250


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"o_groups": 3}, "o_groups"),
        ({"num_experts_per_tok": 385}, "num_experts_per_tok"),
        ({"qk_rope_head_dim": 63}, "qk_rope_head_dim"),
        ({"qk_rope_head_dim": 514}, "qk_rope_head_dim"),
        ({"index_head_dim": 96}, "index_head_dim"),
        ({"index_head_dim": 32}, "index_head_dim"),
        ({"num_hash_layers": 62}, "num_hash_layers"),
        ({"compress_ratios": [4] * 60}, "compress_ratios"),
        ({"compress_ratios": [4] * 64}, "compress_ratios"),
        ({"compress_ratios": [3] * 61}, "compress_ratios"),
        ({"compress_ratios": "4"}, "compress_ratios"),
        ({"compress_ratios": [True] * 61}, "compress_ratios"),
        ({"eos_token_id": 129280}, "eos_token_id"),
        ({"scoring_func": "softmax"}, "scoring_func"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
        ({"num_key_value_heads": 8}, "num_key_value_heads"),
        ({"expert_dtype": "int4"}, "expert_dtype"),
        ({"quantization_config": None}, "expert_dtype"),
        ({"quantization_config": {"quant_method": "awq", "weight_block_size": [128, 128]}}, "quant_method"),
        ({"quantization_config": PRO["quantization_config"] | {"weight_block_size": [32, 32]}}, "weight_block_size"),
        ({"quantization_config": PRO["quantization_config"] | {"scale_fmt": "e4m3"}}, "scale_fmt"),
        ({"rope_scaling": PRO["rope_scaling"] | {"type": "linear"}}, "rope_scaling.type"),
        ({"rope_scaling": PRO["rope_scaling"] | {"factor": "16"}}, "rope_scaling.factor"),
        ({"rope_scaling": {"type": "yarn"}}, "rope_scaling.factor"),
        ({"dspark_target_layer_ids": [58, 58, 60]}, "dspark_target_layer_ids"),
        ({"dspark_target_layer_ids": [59, 60, 61]}, "dspark_target_layer_ids"),
        ({"dspark_noise_token_id": 129280}, "dspark_noise_token_id"),
        ({"torch_dtype": "float16"}, "torch_dtype"),
    ],
)
def test_a_contradiction_is_named(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        ModelConfig.from_dict(PRO | changes)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model_type": "deepseek_v4_1"}, "another architecture"),
        ({"text_config": {}}, "another architecture"),
        ({"engram_layers": [1, 2]}, "another architecture"),
        ({"compress_ratios": [2] * 61}, "another architecture"),
        ({"vision_n_layers": 24}, "vision checkpoint"),
        ({"model_type": "llama"}, "deepseek_v4"),
    ],
)
def test_other_models_are_refused_with_the_reason(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        ModelConfig.from_dict(PRO | changes)


def test_unknown_keys_are_collected_wherever_they_stand() -> None:
    rope, quantization = PRO["rope_scaling"] | {"mscale": 1}, PRO["quantization_config"] | {"spin": 1}
    changes = {"new": 3, "rope_scaling": rope, "quantization_config": quantization, "dspark_new": 1}
    config = ModelConfig.from_dict(PRO | changes)
    assert config.unknown == ("dspark_new", "new", "quantization_config.spin", "rope_scaling.mscale")
    assert config == ModelConfig.named("pro-0813")


def test_any_larger_ratio_is_a_plain_one() -> None:
    assert micro_config(compress_ratios=[8, 5, 0]).layer_ratios == (8, 5)


def test_without_quantisation_the_checkpoint_is_plain() -> None:
    config = micro_config(quantization_config=None, expert_dtype=None, torch_dtype="float32")
    assert config.quantization is None


def resaved(**changes: Any) -> dict[str, Any]:
    """What transformers writes for the same model (checked against version 5.23)."""
    given = micro_dict(num_hidden_layers=3, num_hash_layers=1, compress_ratios=None, num_nextn_predict_layers=1)
    yarn = given.pop("rope_scaling") | {"rope_type": "yarn", "attention_factor": 1.0, "rope_theta": 160000.0}
    for name in ("num_hash_layers", "torch_dtype", "topk_method"):
        del given[name]
    kinds = ["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"]
    return given | {
        "dtype": "bfloat16",
        "layer_types": kinds,
        "mlp_layer_types": ["hash_moe", "moe", "moe"],
        "compress_rates": {kinds[1]: 4, kinds[2]: 8},
        "partial_rotary_factor": 0.25,
        "rope_parameters": {"main": {"rope_type": "default", "rope_theta": 10000.0}, "compress": yarn},
        "quantization_config": given["quantization_config"] | {"expert_dtype": "fp4"},
        "pad_token_id": None,
        "transformers_version": "5.23.0",
        **changes,
    }


def test_the_resaved_form_folds_back() -> None:
    official = micro_config(num_hidden_layers=3, num_hash_layers=1, compress_ratios=[0, 4, 8])
    folded = ModelConfig.from_dict(resaved())
    assert folded == official
    assert folded.unknown == ()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"compress_ratios": [0, 4, 4, 0]}, "compress_ratios"),
        ({"mlp_layer_types": ["moe", "hash_moe", "moe"]}, "mlp_layer_types"),
        ({"layer_types": ["full_attention"] * 3}, "layer_types"),
        ({"layer_types": [["x"]] * 3}, "layer_types"),
        ({"rope_parameters": {"main": {}}}, "rope_parameters"),
        ({"partial_rotary_factor": 0.5}, "qk_rope_head_dim"),
        ({"partial_rotary_factor": "x"}, "partial_rotary_factor"),
        ({"compress_rates": {"other": 1}}, "compress_rates"),
        ({"compress_rates": {"heavily_compressed_attention": "8"}}, "compress_ratios"),
        ({"rope_theta": 5.0}, "rope_theta"),
        ({"expert_dtype": "fp8"}, "expert_dtype"),
    ],
)
def test_a_resaved_form_that_contradicts_itself_is_refused(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        ModelConfig.from_dict(resaved(**changes))


def nvfp4(**changes: Any) -> dict[str, Any]:
    bank = {"quant_algo": "NVFP4", "group_size": 16}
    more = {"moe_quant_algo": "NVFP4", "quantized_layers": {"layers.0.ffn.experts": bank}}
    return micro_dict(quantization_config=PRO["quantization_config"] | more | changes)


def test_nvfp4_counts_only_the_layers_it_lists() -> None:
    config = ModelConfig.from_dict(nvfp4())
    assert config.quantization is not None
    assert config.quantization.nvfp4 == {"layers.0.ffn.experts"}
    assert ModelConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    "layers",
    [None, 3, {"layers.9.ffn.experts": {"quant_algo": "NVFP4"}}, {"layers.0.ffn.experts": {"quant_algo": "INT4"}}],
)
def test_nvfp4_without_a_true_list_of_layers_is_refused(layers: object) -> None:
    with pytest.raises(ConfigError, match="quantized_layers"):
        ModelConfig.from_dict(nvfp4(quantized_layers=layers))


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_value_under_any_key_is_taken_or_refused_cleanly(data: st.DataObject) -> None:
    table = data.draw(st.sampled_from([PRO, resaved(), nvfp4()]))
    given_ = {**table, data.draw(st.sampled_from(sorted(table))): data.draw(JUNK)}
    section = data.draw(st.sampled_from(["rope_scaling", "quantization_config", "rope_parameters"]))
    if isinstance(given_.get(section), dict) and given_[section]:
        given_[section] = {**given_[section], data.draw(st.sampled_from(sorted(given_[section]))): data.draw(JUNK)}
    try:
        ModelConfig.from_dict(given_)
    except ConfigError as error:
        message = str(error)
        assert "\n" not in message
        assert len(message) < 300


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"a": 1, "a": 2}', "[" * 100_000, "\xff", "9" * 9000, "null"])
def test_a_file_that_is_no_object_is_one_clean_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(ConfigError, match=r"config\.json") as caught:
        ModelConfig.load(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_missing_or_enormous_file_is_one_clean_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        ModelConfig.load(tmp_path)
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(1 << 33)
    with pytest.raises(ConfigError, match="at most"):
        ModelConfig.load(tmp_path)


def test_options_are_checked_and_resolved_ones_print() -> None:
    with pytest.raises(ConfigError, match="numerics"):
        EngineOptions(numerics="fast")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="max_context"):
        EngineOptions(max_context=0)
    with pytest.raises(ConfigError, match="reuse_points; got -1; wanted at least 0"):
        EngineOptions(reuse_points=-1)
    with pytest.raises(ConfigError, match="turn"):
        EngineOptions(turn=0)
    lines = Resolved(ModelConfig.load(PICO), EngineOptions(), (("model", "pico"),)).lines()
    assert lines[0].split() == ["model", "pico"]
    assert any("4 (1 window, 2 ratio 4 with indexer, 1 ratio 128), draft mtp" in line for line in lines)


def test_configurations_need_no_torch() -> None:
    code = "import sys, dsv4.config as c; c.ModelConfig.named('pro'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=PICO.parents[2]).returncode == 0


@pytest.mark.parametrize(
    ("asked", "able", "wanted"),
    [
        ({}, False, (False, {"*": "reference"})),
        ({}, True, (True, {"*": "auto"})),
        ({"kernels": {"rope": "unfused"}}, True, (True, {"*": "auto", "rope": "unfused"})),
        ({"kernels": {"rope": "unfused"}}, False, (False, {"*": "reference", "rope": "unfused"})),
        ({"kernels": "reference"}, True, (False, {"*": "reference"})),
        ({"kernels": "covered"}, True, (False, {"*": "covered"})),
        ({"kernels": "auto"}, True, (True, {"*": "auto"})),
        ({"kernels": "auto"}, False, (False, {"*": "auto"})),
        ({"stored": False}, True, (False, {"*": "reference"})),
        ({"stored": True}, True, (True, {"*": "auto"})),
        ({"stored": True}, False, (True, {"*": "reference"})),
        ({"numerics": "float"}, True, (False, {"*": "reference"})),
        ({"dtype": "float32"}, True, (False, {"*": "reference"})),
    ],
)
def test_what_nobody_asked_for_is_decided_by_the_device(
    asked: dict[str, Any], able: bool, wanted: tuple[bool, dict[str, str]]
) -> None:
    options = EngineOptions(**asked).decided(able)
    assert (options.stored, options.choices) == wanted
    assert options.decided(not able) == options
