"""Every damage to a checkpoint is one clean line that names the tensor, within a second, without allocating for it."""

from __future__ import annotations

import json
import shutil
import struct
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dsv4.checkpoint.header import read_header
from dsv4.checkpoint.reader import INDEX_NAME, Checkpoint
from dsv4.errors import CheckpointError
from tests.micro import check, join_file, open_and_load, read_index, split_file, write_index, write_micro

WQ_A, SCALE, NORM = "layers.0.attn.wq_a.weight", "layers.0.attn.wq_a.scale", "norm.weight"
MEMORY = 8 << 20  # of Python objects; the headers themselves need a tenth


@pytest.fixture(scope="session")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_micro(tmp_path_factory.mktemp("sound"))


@pytest.fixture
def directory(sound: Path, tmp_path: Path) -> Path:
    shutil.copytree(sound, tmp_path / "damaged")
    return tmp_path / "damaged"


def shard_of(directory: Path, name: str) -> Path:
    return directory / str(read_index(directory)["weight_map"][name])


def refused(directory: Path, *words: str, act: Callable[[Path], object] = check) -> None:
    """One line with all `words`, in under a second of work, and with no allocation of the size that the file claims."""
    tracemalloc.start()
    start = time.process_time()  # not the clock on the wall: the machine may be busy with other things
    with pytest.raises(CheckpointError) as caught:
        act(directory)
    seconds, (_, peak) = time.process_time() - start, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    message = str(caught.value)
    assert [word for word in words if word not in message] == [], message
    assert "\n" not in message
    assert len(message) < 400
    assert seconds < 1
    assert peak < MEMORY


def edit(directory: Path, name: str, change: Callable[[dict[str, Any]], object]) -> None:
    """Applies `change` to the header of the shard that holds the tensor `name`."""
    shard = shard_of(directory, name)
    header, payload = split_file(shard)
    change(header)
    join_file(shard, header, payload)


def test_the_sound_checkpoint_loads(sound: Path) -> None:
    assert len(open_and_load(sound)) > 50
    assert len(Checkpoint.open(sound).shards) > 2


@pytest.mark.parametrize("keep", [0, 5, 8, 300])
def test_a_truncated_header(directory: Path, keep: int) -> None:
    shard = shard_of(directory, NORM)
    shard.write_bytes(shard.read_bytes()[:keep])
    refused(directory, shard.name, "truncated")


def test_a_truncated_payload(directory: Path) -> None:
    shard = shard_of(directory, NORM)
    shard.write_bytes(shard.read_bytes()[:-1])
    refused(directory, shard.name, "tensor", "truncated")


def test_bytes_after_the_last_tensor(directory: Path) -> None:
    shard = shard_of(directory, NORM)
    shard.write_bytes(shard.read_bytes() + b"\0")
    refused(directory, shard.name, "after the last tensor")


@pytest.mark.parametrize("length", [1 << 20, 100 << 20, 1 << 40, (1 << 63) + 1, (1 << 64) - 1])
def test_an_absurd_header_length(directory: Path, length: int) -> None:
    shard = shard_of(directory, NORM)
    shard.write_bytes(struct.pack("<Q", length) + shard.read_bytes()[8:])
    refused(directory, shard.name, "header length", str(length))


def test_an_absurd_header_length_in_a_file_that_is_as_large(directory: Path) -> None:
    shard = shard_of(directory, NORM)
    with shard.open("r+b") as file:
        file.write(struct.pack("<Q", 1 << 34))
        file.truncate(1 << 35)  # a sparse file
    refused(directory, shard.name, "header length", "at most")
    refused(shard, "header length", act=read_header)


@pytest.mark.parametrize(
    "text",
    [b"", b"[]", b"null", b"{", b'{"a":1}', b"\xff\xfe", b"[" * 50_000, b'{"a":' * 50_000, b'{"a":NaN}', b"7" * 5000,
     b'{"a":{"dtype":"F32","shape":[],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[],"data_offsets":[0,4]}}',
     b'{"\\ud800\\n":1}', b'{"__metadata__":3}', b'{"__metadata__":{"a":1}}'],
)  # fmt: skip
def test_a_header_that_is_no_table_of_tensors(directory: Path, text: bytes) -> None:
    shard = shard_of(directory, NORM)
    join_file(shard, text, split_file(shard)[1])
    refused(directory, shard.name)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("dtype", "F16"), ("dtype", 3), ("dtype", None), ("dtype", ["F32"]),
        ("shape", None), ("shape", [-1]), ("shape", [True]), ("shape", [1.0]), ("shape", "8"), ("shape", [1] * 9),
        ("shape", [1 << 62, 1 << 62]), ("shape", [10**30]), ("shape", [0]), ("shape", [31]),
        ("data_offsets", None), ("data_offsets", [0]), ("data_offsets", [0, 1, 2]), ("data_offsets", [-64, 0]),
        ("data_offsets", [64, 0]), ("data_offsets", [0, 1 << 62]), ("data_offsets", [10**40, 10**40 + 64]),
        ("extra", 1),
    ],
)  # fmt: skip
def test_a_false_claim_about_one_tensor(directory: Path, field: str, value: object) -> None:
    edit(directory, NORM, lambda header: header[NORM].update({field: value}))
    refused(directory, NORM)


def test_an_offset_past_the_end(directory: Path) -> None:
    edit(directory, NORM, lambda h: h[NORM].update(data_offsets=[x + (1 << 40) for x in h[NORM]["data_offsets"]]))
    refused(directory, NORM, "hole")


def test_overlapping_tensors(directory: Path) -> None:
    edit(directory, NORM, lambda h: h[NORM].update(data_offsets=[x - 2 for x in h[NORM]["data_offsets"]]))
    refused(directory, NORM, "overlaps")


def test_two_names_for_the_same_bytes(directory: Path) -> None:
    edit(directory, NORM, lambda header: header.update(twin=dict(header[NORM])))
    refused(directory, "overlaps")


def rename(directory: Path, old: str, new: str) -> None:
    edit(directory, old, lambda header: header.update({new: header.pop(old)}))
    index = read_index(directory)
    index["weight_map"][new] = index["weight_map"].pop(old)
    write_index(directory, index)


def test_a_tensor_under_another_name_is_missing_and_extra(directory: Path) -> None:
    rename(directory, NORM, "norm.wait")
    refused(directory, "norm.weight", "missing")


def test_an_extra_tensor(directory: Path) -> None:
    index = read_index(directory)
    edit(directory, NORM, lambda header: header.update(stray={"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}))
    index["weight_map"]["stray"] = shard_of(directory, NORM).name
    write_index(directory, index)
    refused(directory, "stray", "belongs to no parameter")


def test_a_wrong_shape_of_the_right_size(directory: Path) -> None:
    edit(directory, WQ_A, lambda header: header[WQ_A].update(shape=[32, 8]))
    refused(directory, WQ_A, "F8_E4M3 [32, 8]", "F8_E4M3 [8, 32]")


def test_a_wrong_dtype_of_the_right_size(directory: Path) -> None:
    edit(directory, SCALE, lambda header: header[SCALE].update(dtype="U8"))
    refused(directory, WQ_A, "F8_E4M3 with U8 scales")


def test_one_matrix_in_another_format_than_the_rest(directory: Path) -> None:
    name = "layers.1.attn.wq_a.scale"
    edit(directory, name, lambda header: header[name].update(dtype="I8"))
    refused(directory, name, "I8 [1, 1]", "F8_E8M0 [1, 1]")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda index: index["weight_map"].update({NORM: "no.safetensors"}), ["no.safetensors", "not there"]),
        (lambda index: index["weight_map"].update({NORM: "../x.safetensors"}), [NORM, "plain file name"]),
        (lambda index: index["weight_map"].update({NORM: "/etc/passwd"}), [NORM, "plain file name"]),
        (lambda index: index["weight_map"].update({NORM: ".safetensors"}), [NORM, "plain file name"]),
        (lambda index: index["weight_map"].update({NORM: "a\n.safetensors"}), [NORM, "plain file name"]),
        (lambda index: index["weight_map"].update({NORM: 3}), [NORM, "plain file name"]),
        (lambda index: index["weight_map"].update(absent=index["weight_map"][NORM]), ["absent", "not in it"]),
        (lambda index: index["weight_map"].pop(NORM), [NORM, "no entry in the index"]),
        (lambda index: index["weight_map"].clear(), ["weight_map"]),
        (lambda index: index.update(weight_map=[1]), ["weight_map"]),
        (lambda index: index["metadata"].update(total_size=7), ["total_size", "got 7"]),
        (lambda index: index["metadata"].update(total_size="7"), ["total_size"]),
    ],
)
def test_an_index_that_lies(directory: Path, change: Callable[[Any], object], words: list[str]) -> None:
    index = read_index(directory)
    change(index)
    write_index(directory, index)
    refused(directory, *words)


def test_an_index_that_sends_a_tensor_to_another_shard(directory: Path) -> None:
    index = read_index(directory)
    other = shard_of(directory, "mtp.0.norm.weight").name
    assert index["weight_map"][NORM] != other
    index["weight_map"][NORM] = other
    write_index(directory, index)
    refused(directory, NORM)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"weight_map": {}, "weight_map": {}}', "[" * 100_000])
def test_an_index_that_is_no_index(directory: Path, text: str) -> None:
    (directory / INDEX_NAME).write_text(text)
    refused(directory, INDEX_NAME)


def test_an_enormous_index(directory: Path) -> None:
    with (directory / INDEX_NAME).open("r+b") as file:
        file.truncate(1 << 40)
    refused(directory, INDEX_NAME, "at most")


def test_several_files_without_an_index(directory: Path) -> None:
    (directory / INDEX_NAME).unlink()
    refused(directory, INDEX_NAME, "safetensors files")


def test_a_directory_in_place_of_a_shard(directory: Path) -> None:
    shard = shard_of(directory, NORM)
    shard.unlink()
    shard.mkdir()
    refused(directory, shard.name)


def overwrite(directory: Path, name: str, data: bytes) -> None:
    """Puts `data` at the beginning of a tensor's bytes."""
    stored = Checkpoint.open(directory).stored[name]
    with stored.shard.open("r+b") as file:
        file.seek(stored.begin)
        file.write(data)


@pytest.mark.parametrize("name", [SCALE, "layers.1.ffn.experts.1.w2.scale", "mtp.0.e_proj.scale"])
def test_a_nan_scale(directory: Path, name: str) -> None:
    overwrite(directory, name, b"\xff")
    refused(directory, name, "NaN", act=open_and_load)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_nan_scale_of_a_base_checkpoint(tmp_path: Path, number: float) -> None:
    base = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    write_micro(tmp_path, expert_dtype="fp8", quantization_config=base)
    overwrite(tmp_path, SCALE, struct.pack("<f", number))
    refused(tmp_path, SCALE, "NaN", act=open_and_load)


@pytest.mark.parametrize("expert", [-1, 2, 1 << 40])
def test_an_expert_id_that_is_none(directory: Path, expert: int) -> None:
    name = "layers.0.ffn.gate.tid2eid"
    overwrite(directory, name, struct.pack("<q", expert))
    refused(directory, name, str(expert), "0 to 1", act=open_and_load)


def reconfigure(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    given = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in given.items() if value is not None}))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"expert_dtype": "fp8"}, ["expert_dtype", "fp4 (I8 with F8_E8M0 scales)", "fp8"]),
        ({"expert_dtype": None, "quantization_config": None}, ["no quantization_config"]),
        ({"hidden_size": 64}, ["embed.weight", "[12, 32]", "[12, 64]"]),
        ({"num_hidden_layers": 1, "compress_ratios": [8, 0]}, ["layers.1.", "belongs to no parameter"]),
        ({"num_hidden_layers": 3, "compress_ratios": [8, 4, 0, 0]}, ["layers.2.", "missing"]),
        ({"compress_ratios": [8, 8, 0]}, ["layers.1.attn.compressor.ape"]),
        ({"num_hash_layers": 0}, ["layers.0.ffn.gate.bias", "missing"]),
        ({"num_nextn_predict_layers": 0, "compress_ratios": [8, 4]}, ["mtp.0.e_proj.weight", "drafter"]),
        (
            {"dspark_block_size": 5, "dspark_noise_token_id": 2, "dspark_target_layer_ids": [0],
             "dspark_markov_rank": 4, "compress_ratios": [8, 4]},
            ["mtp.0.e_proj.weight", "drafter of kind mtp", "dspark"],
        ),
    ],
)  # fmt: skip
def test_a_configuration_of_another_model(directory: Path, changes: dict[str, Any], words: list[str]) -> None:
    reconfigure(directory, **changes)
    refused(directory, *words)


def test_weights_that_transformers_resaved_are_sent_back_to_the_original(directory: Path) -> None:
    rename(directory, NORM, "model.norm.weight")
    refused(directory, "model.norm.weight", "transformers", "deepseek-ai repositories")
