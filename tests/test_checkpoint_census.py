"""The inventory of expected tensors equals what the Hub's checkpoints hold: counts, dtypes and bytes, exactly."""

from __future__ import annotations

import json

import pytest

from dsv4.checkpoint.ledger import balance
from dsv4.checkpoint.names import census, inventory, parameters
from dsv4.checkpoint.specs import StoredFormats, TensorSpec
from dsv4.cli.inspect import describe, inspect
from dsv4.config import ModelConfig
from tests import PICO
from tests.micro import micro_config

PUBLISHED = {
    "flash": (69_187, 159_609_485_896, (433, 417, 375, 34_167, 3, 33_792), 1_575, 3_593_787_756),
    "pro": (145_116, 864_704_792_696, (619, 590, 528, 71_952, 3, 71_424), 2_343, 13_956_587_692),
    "flash-0731": (72_317, 166_878_536_440, (445, 433, 390, 35_718, 3, 35_328), 4_705, 10_862_838_300),
    "pro-0813": (149_782, 892_727_580_904, (631, 606, 543, 74_271, 3, 73_728), 7_009, 41_979_375_900),
}
DTYPES = ("BF16", "F32", "F8_E4M3", "F8_E8M0", "I64", "I8")
MAIN = {"flash": (284_332_240_471, 156_015_698_140), "pro": (1_572_997_201_763, 850_748_205_004)}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_census_is_reproduced(name: str) -> None:
    tensors, nbytes, dtypes, draft_tensors, draft_bytes = PUBLISHED[name]
    expected = inventory(ModelConfig.named(name))
    assert census(expected.values()) == (tensors, nbytes, dict(zip(DTYPES, dtypes, strict=True)))
    draft = census(spec for spec in expected.values() if spec.name.startswith("mtp."))
    assert (draft.tensors, draft.nbytes) == (draft_tensors, draft_bytes)


@pytest.mark.parametrize("name", MAIN)
def test_parameters_and_bytes_of_the_main_model(name: str) -> None:
    params = list(parameters(ModelConfig.named(name), draft=False))
    assert sum(param.size for param in params if param.dtype != "I64") == MAIN[name][0]
    assert sum(spec.nbytes for param in params for spec in param.stored()) == MAIN[name][1]


def test_components_of_flash_have_their_published_bytes() -> None:
    specs = inventory(ModelConfig.named("flash"), draft=False).values()

    def part_bytes(*needles: str) -> int:
        return sum(spec.nbytes for spec in specs if any(needle in spec.name for needle in needles))

    assert part_bytes("embed.") == 1_059_061_760
    assert part_bytes("attn.wo_a.") == 1_442_928_640
    assert part_bytes("attn.compressor.") == 525_722_624
    assert part_bytes("attn.indexer.") == 275_353_344
    assert part_bytes("ffn.experts.") == 147_169_738_752
    assert part_bytes("ffn.shared_experts.") == 1_082_196_480
    assert part_bytes("ffn.gate.weight", "ffn.gate.bias") == 90_218_496
    assert part_bytes("tid2eid") == 18_616_320
    assert part_bytes("hc_") == 135_537_756


def test_names_shapes_and_dtypes_of_a_few_tensors() -> None:
    flash, pro = inventory(ModelConfig.named("flash")), inventory(ModelConfig.named("pro-0813"))
    for name, dtype, shape in (
        ("layers.0.attn.wo_a.weight", "F8_E4M3", (8192, 4096)),
        ("layers.2.attn.compressor.ape", "F32", (4, 1024)),
        ("layers.3.attn.compressor.ape", "F32", (128, 512)),
        ("layers.2.ffn.gate.tid2eid", "I64", (129280, 6)),
        ("layers.9.ffn.experts.255.w2.weight", "I8", (4096, 1024)),
        ("layers.9.ffn.experts.255.w2.scale", "F8_E8M0", (4096, 64)),
        ("mtp.0.hc_head_fn", "F32", (4, 16384)),
    ):
        assert flash[name] == TensorSpec(name, dtype, shape)
    assert pro["mtp.0.main_proj.weight"].shape == (7168, 3 * 7168)
    assert pro["mtp.2.confidence_head.proj.weight"].shape == (1, 7168 + 512)
    assert "layers.3.ffn.gate.tid2eid" not in flash
    assert "layers.2.ffn.gate.bias" not in flash
    assert "layers.0.attn.compressor.ape" not in flash
    assert not any(name in pro for name in ("mtp.0.e_proj.weight", "mtp.0.norm.weight", "mtp.1.main_norm.weight"))


def test_base_repacked_and_nvfp4_banks() -> None:
    base = inventory(ModelConfig.named("tiny-base"))
    assert base["layers.1.ffn.experts.0.w1.scale"] == ("layers.1.ffn.experts.0.w1.scale", "F32", (1, 2))
    assert census(base.values()).dtypes.keys() == {"BF16", "F32", "F8_E4M3", "I64"}
    repacked = inventory(micro_config(expert_dtype="fp8"))
    assert repacked["layers.1.ffn.experts.0.w1.scale"].dtype == "F8_E8M0"
    formats = StoredFormats(nvfp4=frozenset({"layers.1.ffn.experts"}))
    banks, expert = inventory(micro_config(), formats), "layers.1.ffn.experts.0.w1"
    assert banks[f"{expert}.weight_scale"] == (f"{expert}.weight_scale", "F8_E4M3", (32, 2))
    assert banks[f"{expert}.weight_scale_2"].shape == ()
    assert f"{expert}.scale" not in banks
    assert banks["mtp.0.ffn.experts.0.w1.scale"].dtype == "F8_E8M0"


def test_the_embedded_model_holds_exactly_its_inventory() -> None:
    found = describe(str(PICO))
    assert found["census"]["total"]["tensors"] == 427
    assert found["ignored"] == {}


def test_a_draft_that_is_not_wanted_is_ignored_for_a_reason() -> None:
    specs = inventory(micro_config())
    ledger = balance(micro_config(), specs, draft=False)
    assert set(ledger.ignored) == {name for name in specs if name.startswith("mtp.")}
    assert set(ledger.ignored.values()) == {"draft weights, and no draft was asked for"}


def test_inspect_prints_the_published_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    inspect("flash")
    shown = capsys.readouterr().out
    assert "69,187 tensors, 159,609,485,896 bytes; 284,332,240,471 parameters and 6,610,048,891 in the draft" in shown
    inspect("flash", as_json=True)
    assert json.loads(capsys.readouterr().out)["census"]["main"]["dtypes"]["I8"] == 33_024
