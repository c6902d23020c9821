"""What is written is what is loaded, bit for bit, in every format, whatever the shards; and the ledger balances."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dsv4.checkpoint.load import LoadProgress, Weight, load
from dsv4.checkpoint.names import parameters
from dsv4.checkpoint.reader import Checkpoint
from dsv4.checkpoint.synth import random_weight, synth
from dsv4.checkpoint.write import write
from dsv4.cli.synth import synth as synth_command
from dsv4.config import ModelConfig
from dsv4.errors import CheckpointError
from dsv4.llm import EMBEDDED
from dsv4.quant.tensor import QTensor
from tests import PICO
from tests.micro import join_file, micro_config, open_and_load, read_index, split_file, write_index, write_micro

PLAIN: dict[str, Any] = {"quantization_config": None, "expert_dtype": None}
DSPARK: dict[str, Any] = {
    "dspark_block_size": 5, "dspark_noise_token_id": 2, "dspark_target_layer_ids": [0, 1], "dspark_markov_rank": 4,
    "compress_ratios": [8, 4, 0, 0, 0],
}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "preview": {},
    "dspark": DSPARK,
    "no draft": {"num_nextn_predict_layers": 0, "compress_ratios": [0, 128]},
    "fp8 experts": {"expert_dtype": "fp8"},
    "base": {"expert_dtype": "fp8", "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}},
    "nvfp4": {
        "quantization_config": {
            "quant_method": "fp8", "weight_block_size": [128, 128], "scale_fmt": "ue8m0", "moe_quant_algo": "NVFP4",
            "quantized_layers": {f"layers.{n}.ffn.experts": {"quant_algo": "NVFP4"} for n in range(2)},
        }
    },
    "bfloat16": PLAIN,
    "float32": PLAIN | {"torch_dtype": "float32"},
}  # fmt: skip


def parts(weight: Weight) -> list[torch.Tensor]:
    if isinstance(weight, QTensor):
        return [t for t in (weight.data, weight.scale, weight.global_scale) if t is not None]
    return [weight]


def same_bits(a: Weight, b: Weight) -> bool:
    return all(
        x.dtype == y.dtype and x.shape == y.shape and torch.equal(as_bytes(x), as_bytes(y))
        for x, y in zip(parts(a), parts(b), strict=True)
    )


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("shard_bytes", [1, 8192, 1 << 30])
def test_written_weights_load_bit_for_bit(tmp_path: Path, kind: str, shard_bytes: int) -> None:
    config = micro_config(**SHAPES[kind])
    weights = {param.name: random_weight(param, config, 5) for param in parameters(config)}
    write(tmp_path, config, weights, max_shard_bytes=shard_bytes)
    assert ModelConfig.load(tmp_path) == config
    loaded = open_and_load(tmp_path)
    assert loaded.keys() == weights.keys()
    assert [name for name in weights if not same_bits(weights[name], loaded[name])] == []


def test_synth_writes_the_same_tensors_whatever_the_shards(tmp_path: Path) -> None:
    config = micro_config()
    for directory, size, seed in (("a", 1 << 30, 3), ("b", 4096, 3), ("c", 4096, 4)):
        synth(config, tmp_path / directory, seed, max_shard_bytes=size)
    a, b, c = (open_and_load(tmp_path / name) for name in "abc")
    assert len(Checkpoint.open(tmp_path / "b").shards) > 3
    assert all(same_bits(a[name], b[name]) for name in a)
    assert not any(same_bits(a[name], c[name]) for name in a if name.endswith("w1.weight"))


def test_official_files_are_laid_out_as_safetensors_lays_them_out(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors")
    write_micro(tmp_path, shard_bytes=1 << 30)
    ours = Checkpoint.open(tmp_path)
    with safetensors.safe_open(str(ours.shards[0]), "pt") as theirs:
        assert set(theirs.keys()) == set(ours.specs)
        for name in theirs.keys():  # noqa: SIM118 (no mapping)
            tensor = theirs.get_tensor(name)
            assert torch.equal(as_bytes(tensor), as_bytes(ours.tensor(name)))


def test_loading_shares_the_mapping_and_cannot_write_to_the_file(tmp_path: Path) -> None:
    write_micro(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    weights = open_and_load(tmp_path)
    norm = weights["norm.weight"]
    assert isinstance(norm, torch.Tensor)
    norm.zero_()
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}


def test_a_single_file_needs_no_index_and_no_alignment(tmp_path: Path) -> None:
    write_micro(tmp_path, shard_bytes=1 << 30)
    config = micro_config()
    expected = {param.name: random_weight(param, config, 1) for param in parameters(config)}
    (tmp_path / "model.safetensors.index.json").unlink()
    shard = next(tmp_path.glob("*.safetensors"))
    header, payload = split_file(shard)
    for pad in range(1, 4):
        header["__metadata__"]["format"] = "p" * pad  # moves the payload off every alignment
        join_file(shard, header, payload)
        loaded = open_and_load(tmp_path)
        assert all(same_bits(loaded[name], expected[name]) for name in loaded)


def test_progress_ends_at_all_bytes_and_names_the_layers() -> None:
    steps: list[LoadProgress] = []
    checkpoint = Checkpoint.open(PICO)
    weights = load(checkpoint, ModelConfig.load(PICO), progress=steps.append)
    assert (steps[-1].done, steps[-1].total) == (4_692_577, 4_692_577)
    assert [step.what for step in steps][-5:] == ["layers.0", "layers.1", "layers.2", "layers.3", "mtp.0"]
    assert sum(len(parts(weight)) for weight in weights.values()) == 427
    assert sum(sum(part.nbytes for part in parts(weight)) for weight in weights.values()) == 4_692_577


def test_nvfp4_input_scales_are_ignored_for_a_reason(tmp_path: Path) -> None:
    write_micro(tmp_path, shard_bytes=1 << 30, **SHAPES["nvfp4"])
    shard = next(tmp_path.glob("*.safetensors"))
    header, payload = split_file(shard)
    name = "layers.0.ffn.experts.0.w1.input_scale"
    header[name] = {"dtype": "F32", "shape": [], "data_offsets": [len(payload), len(payload) + 4]}
    join_file(shard, header, payload + b"\0\0\x80\x3f")
    index = read_index(tmp_path)
    index["weight_map"][name] = shard.name
    del index["metadata"]
    write_index(tmp_path, index)
    assert name not in open_and_load(tmp_path)


def test_weights_that_are_there_are_not_overwritten_unasked(tmp_path: Path) -> None:
    write_micro(tmp_path)
    with pytest.raises(CheckpointError, match="already holds weights"):
        write_micro(tmp_path)
    synth(micro_config(), tmp_path, seed=2, overwrite=True)
    assert len(Checkpoint.open(tmp_path).shards) == 1


def test_writing_takes_exactly_the_parameters(tmp_path: Path) -> None:
    config = micro_config(**PLAIN)
    weights = {param.name: random_weight(param, config, 0) for param in parameters(config)}
    with pytest.raises(CheckpointError, match="stray"):
        write(tmp_path, config, {**weights, "stray": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"norm\.weight.*missing"):
        write(tmp_path, config, {name: weight for name, weight in weights.items() if name != "norm.weight"})
    with pytest.raises(CheckpointError, match="float16"):
        write(tmp_path, config, {**weights, "norm.weight": torch.ones(32, dtype=torch.float16)})


def test_a_full_disk_is_seen_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=10))
    with pytest.raises(CheckpointError, match="free space"):
        write_micro(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["tiny-pro", "tiny-flash-0731", "tiny-base"])
def test_the_command_writes_a_checkpoint_with_the_embedded_tokenizer(tmp_path: Path, name: str) -> None:
    synth_command(tmp_path, config=name, seed=1)
    weights = open_and_load(tmp_path)
    assert ModelConfig.load(tmp_path) == ModelConfig.named(name)
    assert (tmp_path / "tokenizer.json").read_bytes() == (EMBEDDED / "tokenizer.json").read_bytes()
    table = weights["layers.0.ffn.gate.tid2eid"]
    assert isinstance(table, torch.Tensor)
    assert all(len(set(row)) == len(row) for row in table[:50].tolist())
    wide = weights["layers.2.attn.wq_a.weight"]
    assert isinstance(wide, QTensor)
    assert abs(float(wide.values().std()) * 256**0.5 - 1) < 0.05
