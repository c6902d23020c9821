"""What is counted from headers is what a stored model holds: every byte, and not much more at worst while it loads."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dsv4.checkpoint.held import _PACKING, PARTS, held, held_by_part, loading_bytes, part_of, refuse_unstored
from dsv4.checkpoint.load import Handed, Weight, load
from dsv4.checkpoint.names import parameters
from dsv4.checkpoint.reader import Checkpoint
from dsv4.checkpoint.specs import StoredFormats
from dsv4.checkpoint.synth import RandomWeights
from dsv4.config import EngineOptions, ModelConfig
from dsv4.errors import ConfigError
from dsv4.llm import EMBEDDED
from dsv4.model.model import Model
from dsv4.model.mtp import Mtp
from dsv4.quant.formats import FP8_BLOCK, FP8_BLOCK_F32, MXFP4, Format
from dsv4.quant.packed import PACKED, pack
from dsv4.quant.tensor import QTensor
from tests.memory import Allocated, nbytes_of
from tests.micro import micro_config

CPU = torch.device("cpu")
OPTIONS = EngineOptions(stored=True)
TINY = ModelConfig.named("tiny-pro")


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dense matrices stay as they are stored, which a CPU would widen."""
    monkeypatch.setattr("dsv4.model.layers._dense", lambda weight: weight)


def drawn(config: ModelConfig) -> dict[str, Weight]:
    return dict(RandomWeights(config, 0, CPU))


def embedded() -> dict[str, Weight]:
    """In memory of their own: those that are read share their files'."""
    return {name: own(one) for name, one in load(Checkpoint.open(EMBEDDED), ModelConfig.load(EMBEDDED)).items()}


def own(weight: Weight) -> Weight:
    if isinstance(weight, Tensor):
        return weight.clone()
    return replace(weight, data=weight.data.clone(), scale=weight.scale.clone())


def built(config: ModelConfig, weights: dict[str, Weight]) -> tuple[Model, list[Mtp]]:
    handed = Handed(weights)
    model = Model(config, handed, OPTIONS)
    return model, [Mtp(config, handed, OPTIONS, model)] if config.draft == "mtp" else []


def tables(model: Model) -> int:
    """Angular steps of the rotations: they are no parameters."""
    return nbytes_of(model.steps)


CASES = {
    "embedded": (ModelConfig.load(EMBEDDED), embedded),
    "tiny": (TINY, lambda: drawn(TINY)),
    "fp8": (one := replace(TINY, expert_dtype="fp8"), lambda: drawn(one)),
    "nvfp4": (
        two := ModelConfig.from_dict(
            TINY.to_dict()
            | {"quantization_config": TINY.to_dict()["quantization_config"]
               | {"moe_quant_algo": "NVFP4", "quantized_layers": {"layers.1.ffn.experts": {"quant_algo": "NVFP4"}}}}
        ),
        lambda: drawn(two),
    ),
    "rows that no tile divides": (three := replace(TINY, hidden_size=384), lambda: drawn(three)),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_every_byte_of_a_model_is_counted(case: str) -> None:
    config, make = CASES[case]
    model, drafts = built(config, make())
    params = list(parameters(config))
    assert nbytes_of(model, drafts) - tables(model) == sum(map(held, params))
    assert nbytes_of(model) - tables(model) == sum(held(p) for p in params if not p.name.startswith("mtp."))


def test_every_part_has_its_bytes() -> None:
    model, drafts = built(TINY, drawn(TINY))
    parts = held_by_part(parameters(TINY))
    assert tuple(parts) == PARTS
    blocks = model.blocks
    assert parts["attention"] == nbytes_of([block.attn for block in blocks])
    assert parts["routed experts"] == nbytes_of([block.ffn.experts.routed for block in blocks])
    assert parts["shared experts"] == nbytes_of([block.ffn.experts.shared for block in blocks])
    assert parts["router"] == nbytes_of([block.ffn.router for block in blocks])
    assert parts["head and embedding"] == nbytes_of(model.head, model.embedding)
    sites: list[Any] = [[b.hc_attn, b.hc_ffn, b.attn_norm, b.ffn_norm] for b in blocks]
    assert parts["mHC and norms"] == nbytes_of(sites, model.head_mix)
    assert parts["draft"] == nbytes_of([[m.e_proj, m.h_proj, m.enorm, m.hnorm, m.block, m.head_mix] for m in drafts])


def test_nothing_is_in_two_parts() -> None:
    names = [param.name for param in parameters(TINY)]
    assert {part_of(name) for name in names} == set(PARTS)
    assert sum(held_by_part(parameters(TINY)).values()) == sum(map(held, parameters(TINY)))


@pytest.mark.parametrize("fmt", PACKED, ids=lambda fmt: fmt.name)
def test_what_packing_takes(fmt: Format) -> None:
    """Of two matrices for each value of theirs, a bit more where scales are few."""
    parts = [fmt.encode(torch.randn(512, 1024)) for _ in range(2)]
    with Allocated() as counted:
        pack(*parts)
    most = _PACKING[fmt.name] * 2 * parts[0].data.numel() * fmt.values_per_byte
    assert 0.95 * most < counted.worst <= most


@pytest.mark.parametrize("changes", [{}, {"expert_dtype": "fp8"}, {"vocab_size": 40_960, "hidden_size": 256}])
def test_the_worst_moment_of_loading(changes: dict[str, Any]) -> None:
    """All weights are there before the first layer is made. Up to a tenth of what comes to them is too much."""
    config = replace(
        TINY, **({"hidden_size": 512, "moe_intermediate_size": 384, "vocab_size": 640} | changes)
    ).shortened(2)
    weights, counted = drawn(config), Allocated()
    start = counted.begin(weights)
    with counted:
        model, _ = built(config, weights)
    params = list(parameters(config))
    assert start == sum(param.nbytes for param in params)
    assert counted.now == nbytes_of(model)
    new = loading_bytes(params) - start
    assert 0.9 * new < counted.worst - tables(model) - start <= new


@pytest.mark.parametrize(
    ("config", "formats", "said"),
    [
        (TINY, StoredFormats("BF16", FP8_BLOCK_F32, MXFP4), "linears; got fp8_f32; wanted fp8"),
        (TINY, StoredFormats("BF16", None, None), "linears; got BF16"),
        (TINY, StoredFormats("BF16", FP8_BLOCK, None), "experts; got BF16; wanted mxfp4"),
        (micro_config(), StoredFormats(), "hidden_size; got 32; wanted a multiple of 128"),
    ],
)
def test_what_stored_layers_cannot_hold_is_refused(config: ModelConfig, formats: StoredFormats, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        refuse_unstored(config, formats)


def test_flash_can_be_stored() -> None:
    refuse_unstored(ModelConfig.named("flash"), StoredFormats())
    assert isinstance(drawn(TINY)["layers.0.attn.wq_a.weight"], QTensor)
