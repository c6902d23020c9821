"""Layers in bytes say what simulated layers say: the same numbers to the bit, in every way to cut and share a step."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

import dsv4.ops.experts
import dsv4.ops.linear
from dsv4 import kernels
from dsv4.cache.layout import cache_bytes
from dsv4.cache.paged import Paged
from dsv4.cache.stored import StoredLayer
from dsv4.checkpoint.load import load
from dsv4.checkpoint.reader import Checkpoint
from dsv4.checkpoint.synth import synth
from dsv4.config import EngineOptions, ModelConfig
from dsv4.engine.request import Sampling
from dsv4.errors import ConfigError
from dsv4.llm import EMBEDDED, LLM
from dsv4.model.model import Model
from dsv4.ops.linear import matmul_rows
from dsv4.ops.op import counts, forget_counts, use
from dsv4.quant.index_keys import FP4_KEYS, FP8_KEYS
from dsv4.quant.kv_rows import KvRow
from dsv4.quant.paged import spans
from tests.exact import OPTIONS, Rig, same

# As the embedded model, every kind of layer, but wide enough to be packed.
CHANGES: dict[str, Any] = {
    "hidden_size": 256, "num_hidden_layers": 5, "compress_ratios": [0, 4, 128, 4, 0, 0], "vocab_size": 64,
    "n_routed_experts": 8, "num_experts_per_tok": 3, "num_hash_layers": 1,
}  # fmt: skip


def slowly(*given: Any) -> list[Any]:
    return [pytest.param(one, marks=pytest.mark.slow) for one in given]


def rig(directory: Path, **changes: Any) -> Rig:
    config = ModelConfig.from_dict(json.loads((EMBEDDED / "config.json").read_text()) | CHANGES | changes)
    synth(config, directory, seed=3)
    return Rig(config, load(Checkpoint.open(directory), config))


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> Rig:
    return rig(tmp_path_factory.mktemp("stored") / "model")


@pytest.fixture(scope="module")
def stored(simulated: Rig) -> Rig:
    return in_bytes(simulated)


def in_bytes(given: Rig) -> Rig:
    return Rig(given.config, given.weights, options=replace(OPTIONS, stored=True))


def test_a_prompt_has_the_bits_of_the_simulation(simulated: Rig, stored: Rig) -> None:
    assert same(stored.whole, simulated.whole)


@pytest.mark.parametrize("ends", [(127, 128, 300), *slowly((1, 2, 3, 300), (7, 100, 255, 256, 300), (299, 300))])
def test_pieces_equal_the_whole(ends: tuple[int, ...], simulated: Rig, stored: Rig) -> None:
    assert same(stored.pieces(stored.store(), ends), simulated.whole)


@pytest.mark.slow
def test_a_sequence_beside_others_equals_itself_alone(stored: Rig) -> None:
    ids, others = stored.ids[:200], stored.random_ids(90, 5)
    alone = stored.run(stored.store(), (0, ids))[0]
    store = stored.store()
    parts = [stored.run(store, (2, ids[:130]), (1, others[:7]), (3, others))[0]]
    parts.append(stored.run(store, (1, others[7:]), (2, ids[130:]))[1])
    assert same(torch.cat(parts), alone)


@pytest.mark.slow
def test_rewound_equals_never_written(stored: Rig) -> None:
    store = stored.store()
    stored.run(store, (0, stored.ids[:126]))
    mark = store.mark(0)
    stored.run(store, (0, stored.random_ids(8, 9)))
    store.rewind(0, mark)
    assert same(stored.run(store, (0, stored.ids[126:150]))[0], stored.pieces(stored.store(), (126, 150))[126:])


@pytest.mark.parametrize("length", [130, *slowly(4, 256)])
def test_restored_equals_gone_on(length: int, stored: Rig) -> None:
    """Into another slot, whose full pages are those of the first."""
    store = stored.store(points=2)
    stored.run(store, (0, stored.ids[:length]))
    store.keep(1, 0, length)
    shared, page = store.pages[0][: length // store.page], store.pages[1][length // store.page :]
    store.assign(1, [*shared, *page])
    store.reset(1, length)
    store.restore(1, 1, length)
    assert same(stored.run(store, (1, stored.ids[length : length + 20]))[0], stored.whole[length : length + 20])


@pytest.mark.slow
def test_chosen_entries_are_those_of_unrounded_scores(tmp_path: Path) -> None:
    """Where an indexer has to choose, pieces still equal the whole, and nearly all of what it chooses is the same."""
    simulated = rig(tmp_path / "model", index_topk=16)
    stored = in_bytes(simulated)
    whole = stored.run(stored.store(), (0, stored.ids))[0]
    assert same(stored.pieces(stored.store(), (90, 91, 92, 210, 300)), whole)
    other = simulated.run(simulated.store(), (0, simulated.ids))[0]
    assert torch.nn.functional.cosine_similarity(whole.flatten(1).double(), other.flatten(1).double()).min() > 0.9
    assert same(whole[:64], other[:64])  # up to 16 entries all are chosen


def rows_of(paged: Paged[Any], rows: Tensor) -> Tensor:
    page, data, scales = spans(paged.layout, paged.pages, rows)
    numbers, sizes = paged.layout.sizes
    found = [(int(p), int(d), int(s)) for p, d, s in zip(page, data, scales, strict=True)]
    return torch.stack([
        torch.cat((paged.pages[p, d : d + numbers], paged.pages[p, s : s + sizes]))
        for p, d, s in found
    ])  # fmt: skip


@pytest.mark.parametrize("layout", [KvRow(512, 64), KvRow(96, 32), FP4_KEYS, FP8_KEYS], ids=str)
def test_rows_of_pages_move_whole(layout: Any) -> None:
    paged, rows = Paged(layout, 3, 5, torch.device("cpu")), torch.tensor([14, 0, 7])
    given = torch.arange(3 * paged.width, dtype=torch.int64).remainder(251).type(torch.uint8).view(3, -1)
    paged[rows] = given
    assert torch.equal(paged[rows], given)
    assert torch.equal(rows_of(paged, rows), given)
    assert int((paged.pages != 0).sum()) == int((given != 0).sum())


@pytest.mark.parametrize("points", [0, 3])
def test_the_bytes_of_a_cache_are_known_before(points: int, stored: Rig) -> None:
    store, asked = stored.store(points), replace(stored.options, reuse_points=points)
    assert all(isinstance(layer, StoredLayer) for layer in store.layers)
    found = sum(tensor.nbytes for layer in store.layers for tensor in layer.tensors())
    assert cache_bytes(stored.config, asked) == found < cache_bytes(stored.config, replace(asked, stored=False))


@pytest.mark.parametrize("changes", [{"numerics": "float"}, {"dtype": "float32"}])
def test_only_official_numerics_are_stored(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"stored layers; got .*; wanted official numerics and bfloat16"):
        EngineOptions(stored=True, **changes)


def test_dense_weights_are_refused(tmp_path: Path) -> None:
    config = ModelConfig.from_dict(json.loads((EMBEDDED / "config.json").read_text()) | CHANGES
                                   | {"quantization_config": None, "expert_dtype": None})  # fmt: skip
    synth(config, tmp_path / "model", seed=3)
    with pytest.raises(ConfigError, match=r"stored layers: wq_a; got .*; wanted fp8"):
        Model(config, load(Checkpoint.open(tmp_path / "model"), config), replace(OPTIONS, stored=True))


@pytest.mark.parametrize("question", ["What is the capital of France?", *slowly("What is 123 + 456?")])
def test_the_embedded_model_says_the_same(question: str) -> None:
    """With the draft's guesses: tokens, and the hash of all logits behind them."""
    said = []
    for given in (False, True):
        llm = LLM.load(options=EngineOptions(stored=given, max_context=512))
        prompt = llm.prompt([{"role": "user", "content": question}])
        said.append([(one.token, one.hash) for one in llm.generate(prompt, Sampling(temperature=0, max_tokens=12))])
    assert said[0] == said[1]


# --- on a GPU -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def on_gpu(stored: Rig) -> Rig:
    weights = {name: weight.to("cuda") for name, weight in stored.weights.items()}
    return Rig(stored.config, weights, options=replace(stored.options, device="cuda"))


@pytest.fixture
def by_kernels() -> Iterator[None]:
    kernels.install()
    with use({"*": "auto"}):  # an op without a kernel is an error
        yield


@pytest.mark.gpu
@pytest.mark.usefixtures("by_kernels")
def test_a_step_runs_kernels_alone(on_gpu: Rig) -> None:
    forget_counts()
    on_gpu.pieces(on_gpu.store(), (290, 291, 300))
    on_gpu.model.logits(on_gpu.run(on_gpu.store(), (0, on_gpu.ids[:2]))[0])
    ran = counts()
    assert {name: how for name, how in ran.items() if "reference" in how} == {}
    assert {"attend", "compress_keys", "compress_kv", "matmul", "shared_input", "stored_moe", "write_kv"} <= ran.keys()


@pytest.mark.gpu
@pytest.mark.usefixtures("by_kernels")
def test_kernels_say_what_references_say(on_gpu: Rig, stored: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """As near as the references are to themselves if products are off by what tensor cores may be.

    Roundings turn then, and choices of experts with them.
    """
    found = on_gpu.run(on_gpu.store(), (0, on_gpu.ids))[0].cpu()
    wanted = stored.run(stored.store(), (0, stored.ids))[0]
    for room in (dsv4.ops.linear, dsv4.ops.experts):
        monkeypatch.setattr(room, "matmul_rows", about)
    assert _apart(found, wanted) < 3 * _apart(stored.run(stored.store(), (0, stored.ids))[0], wanted)


def about(x: Tensor, weight: Tensor) -> Tensor:
    """A product that is off by 2^-12 of its row's size."""
    exact = matmul_rows(x, weight)
    return exact + 2.0**-12 * exact.square().mean(1, keepdim=True).sqrt() * torch.randn_like(exact)


def _apart(left: Tensor, right: Tensor) -> float:
    """Cosine distance of the streams, of tokens on average."""
    return 1 - cosine_similarity(left.flatten(1).double(), right.flatten(1).double()).mean().item()


@pytest.mark.slow
def test_references_are_apart_if_products_are_off(stored: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """By more than nothing, and by less than would let a wrong kernel pass."""
    wanted = stored.whole
    assert _apart(stored.run(stored.store(), (0, stored.ids))[0], wanted) < 1e-12
    for room in (dsv4.ops.linear, dsv4.ops.experts):
        monkeypatch.setattr(room, "matmul_rows", about)
    assert 1e-4 < _apart(stored.run(stored.store(), (0, stored.ids))[0], wanted) < 0.03


@pytest.mark.gpu
@pytest.mark.usefixtures("by_kernels")
@pytest.mark.parametrize("ends", [(1, 2, 3, 300), (127, 128, 129, 300), (7, 100, 255, 256, 300), (299, 300)])
def test_pieces_equal_the_whole_on_a_gpu(ends: tuple[int, ...], on_gpu: Rig) -> None:
    whole = on_gpu.run(on_gpu.store(), (0, on_gpu.ids))[0]
    assert same(on_gpu.pieces(on_gpu.store(), ends), whole)


@pytest.mark.gpu
@pytest.mark.usefixtures("by_kernels")
def test_a_sequence_beside_others_equals_itself_alone_on_a_gpu(on_gpu: Rig) -> None:
    test_a_sequence_beside_others_equals_itself_alone(on_gpu)
    test_rewound_equals_never_written(on_gpu)


@pytest.mark.gpu
@pytest.mark.usefixtures("by_kernels")
def test_chosen_entries_on_a_gpu(tmp_path: Path) -> None:
    """Where the indexer has to choose: pieces equal the whole."""
    given = rig(tmp_path / "model", index_topk=16)
    weights = {name: weight.to("cuda") for name, weight in given.weights.items()}
    made = Rig(given.config, weights, options=replace(OPTIONS, stored=True, device="cuda"))
    whole = made.run(made.store(), (0, made.ids))[0]
    assert same(made.pieces(made.store(), (90, 91, 92, 210, 300)), whole)
