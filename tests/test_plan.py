"""`dsv4 plan`: what it counts is what is allocated, what it says fits is the most that fits, mistakes are one line."""

from __future__ import annotations

import gc
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dsv4 import kernels
from dsv4.cache.store import Store
from dsv4.checkpoint.held import held_by_part
from dsv4.checkpoint.names import parameters
from dsv4.checkpoint.reads import Point
from dsv4.checkpoint.synth import RandomWeights, synth
from dsv4.cli.main import main
from dsv4.config import EngineOptions, ModelConfig
from dsv4.engine.runner import Runner
from dsv4.errors import ConfigError, RequestError
from dsv4.llm import EMBEDDED, LLM
from dsv4.llm_gpus import GPUS, Gpu, find_gpu
from dsv4.llm_memory import weight_bytes
from dsv4.llm_plan import OUTSIDE, Plan, make_plan
from dsv4.llm_workspace import workspace
from dsv4.model.model import Model
from dsv4.ops.op import use

FLASH = ModelConfig.named("flash")
SMALL = Gpu("small", OUTSIDE + (64 << 20), 1e12, False, "sm_90a", "nowhere")  # no GPU has so little


def plan(target: str = "tiny-pro", gpu: Gpu = SMALL, **asked: Any) -> Plan:
    return make_plan(target, EngineOptions(**({"reuse_points": 2} | asked)), gpu)


# --- bytes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["tiny-pro", "flash", str(EMBEDDED)])
@pytest.mark.parametrize("cache_tokens", [None, 300])
def test_the_cache_is_what_a_store_allocates(target: str, cache_tokens: int | None) -> None:
    made = plan(target, max_context=256, prefill_chunk=64, max_sequences=3, cache_tokens=cache_tokens)
    store = Store(made.config, replace(made.options, device="cpu"), made.options.reuse_points)
    found = sum(tensor.nbytes for layer in store.layers for tensor in layer.tensors())
    assert sum(made.cache(made.options)) == found + store.table.nbytes


def test_weights_are_those_of_the_check_before_loading() -> None:
    made = plan(str(EMBEDDED))
    assert made.loading == weight_bytes(made.ledger, made.options) > sum(made.weights.values())
    assert made.weights == held_by_part(parameters(made.config))


def test_files_say_what_their_configuration_promises(tmp_path: Path) -> None:
    """A checkpoint, its config.json alone, and the name of the configuration: the same numbers."""
    config = ModelConfig.named("tiny-pro")
    synth(config, tmp_path / "whole")
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text(json.dumps(config.to_dict()))
    facts = [plan(str(one)).facts([Point(1, 100)]) for one in ("tiny-pro", tmp_path / "whole", tmp_path / "bare")]
    sources = [one.pop("source") for one in facts]
    assert facts[0] == facts[1] == facts[2]
    assert ["headers" in source for source in sources] == [False, True, False]


def test_a_draft_that_is_not_asked_for_is_not_loaded() -> None:
    with_draft, without = plan(), plan(draft_tokens=0)
    assert with_draft.weights["draft"] > without.weights["draft"] == 0
    assert plan("tiny-flash-0731").weights["draft"] == 0  # nothing drives it


def test_all_that_is_needed_is_in_the_sum() -> None:
    made = plan(max_sequences=3)
    loaded = sum(made.weights.values()) + made.workspace(made.options).total
    cache = sum(made.cache(made.options))
    assert made.needed(made.options) == OUTSIDE + cache + max(made.loading, loaded)
    assert made.free(made.options) == SMALL.memory - made.needed(made.options)


@pytest.mark.parametrize(("context", "scores"), [(2048, 0), (2052, 576), (1 << 20, 1 << 18)])
def test_the_indexer_scores_every_entry_of_long_contexts(context: int, scores: int) -> None:
    options = EngineOptions(stored=True, max_context=context, prefill_chunk=503, draft_slack=8)
    steps = workspace(FLASH, options)
    assert steps.tokens == 512
    picked, heads = 2 * 512 * 8, 64 * (2 * 128 + 68 + 4)
    assert steps.indexer == (512 * (4 * scores + picked + heads) if scores else 0)


def test_the_largest_step_has_a_chunk_and_all_who_decode() -> None:
    one, many = (workspace(FLASH, EngineOptions(stored=True, max_sequences=n)) for n in (1, 9))
    assert (one.tokens, many.tokens) == (512 + 9, 512 + 9 * 9)
    assert many.logits == 9 * one.logits
    assert many.total == many.streams + many.lists + many.indexer + max(many.attention, many.experts, many.logits)


# --- what fits -------------------------------------------------------------------------------------------------------


def test_the_longest_context_is_the_longest() -> None:
    made = plan(gpu=SMALL._replace(memory=OUTSIDE + (30 << 20)))
    longest = made.longest
    assert 0 < longest < made.config.max_position_embeddings
    assert [plan(gpu=made.gpu, max_context=longest + more).free(replace(
        made.options, max_context=longest + more)) >= 0 for more in (0, 1)] == [True, False]  # fmt: skip


def test_as_many_sequences_fit_as_are_said() -> None:
    made = plan()
    most = made.most_sequences
    assert most > 1
    assert [plan(max_sequences=n).free(replace(made.options, max_sequences=n)) >= 0 for n in (most, most + 1)] == [
        True,
        False,
    ]


def test_nothing_fits_where_weights_do_not() -> None:
    made = plan("flash", GPUS["H100"])
    assert (made.longest, made.most_sequences) == (0, 0)
    assert made.free(made.options) < 0


def test_a_floor_is_bytes_over_bandwidth() -> None:
    one, many = plan().floors([Point(1, 256), Point(4, 256)])
    assert one.seconds == one.nbytes / SMALL.reads
    assert many.tokens_per_second == 4 / many.seconds
    assert one.nbytes < many.nbytes < 4 * one.nbytes


# --- the verb --------------------------------------------------------------------------------------------------------


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        main(["plan", *arguments])
    return int(stop.value.code or 0), *capsys.readouterr()


def test_what_does_not_fit_is_said_and_is_no_error(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "flash", "--gpus", "1xH200")
    made = plan("flash", GPUS["H200"], max_sequences=8, reuse_points=64)
    assert code == 0
    assert f"It does not fit: {-made.free(made.options) / 1e9:.1f} GB are lacking." in out
    assert "no room for any context" in out


def test_what_fits_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "tiny-pro", "--gpus", "h100", "--sequences", "1,3", "--contexts", "500")
    assert code == 0
    assert "It fits" in out
    assert "measured" in out
    assert [line.split()[1:4:2] for line in out.splitlines() if line.startswith("│ 500 ")] == [
        ["500", "1"],
        ["500", "3"],
    ]


def test_options_count_and_json_has_all(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ("--max-sequences", "3", "--max-context", "300", "--cache-tokens", "700", "--prefill-chunk", "64")
    code, out, _ = run(capsys, "tiny-pro", "--gpus", "H200", "--json", "--reuse-points", "2", "--draft", "0", *asked)
    made = plan(gpu=GPUS["H200"], max_sequences=3, max_context=300, cache_tokens=700, prefill_chunk=64, draft_tokens=0)
    found = json.loads(out)
    assert code == 0
    assert found["floors"]
    assert found | {"floors": []} == json.loads(json.dumps(made.facts([])))
    assert found["fits"]
    assert found["cache"]["tokens"] == 768


def test_a_data_sheet_is_called_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert "data sheet" in run(capsys, "tiny-pro", "--gpus", "B200")[1]
    assert {name for name, gpu in GPUS.items() if gpu.measured} == {"H100", "H200"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["flash", "--gpus", "2xH200"], "not shared between GPUs yet; got '2xH200'; wanted one GPU, as in 1xH200"),
        (["flash", "--gpus", "0xH200"], "got '0xH200'; wanted one GPU"),
        (["flash", "--gpus", "A100"], "--gpus; got 'A100'; wanted one of H100, H200"),
        (["flash", "--gpus", "H200,H200"], "--gpus; got"),
        (["nowhere", "--gpus", "H200"], "is no directory"),
        (["tiny-base", "--gpus", "H200"], "stored layers: linears; got fp8_f32; wanted fp8"),
        (["flash", "--gpus", "H200", "--sequences", "0"], "numbers from 1 on"),
        (["flash", "--gpus", "H200", "--contexts", "8K"], "numbers from 1 on"),
        (["flash", "--gpus", "H200", "--contexts", "2000000"], "--contexts; got 2000000; wanted at most the model's"),
        (["flash", "--gpus", "H200", "--max-context", "2000000"], "wanted at most the model's 1048576"),
        (["flash", "--gpus", "H200", "--cache-tokens", "100"], "cache_tokens (--cache-tokens); got 100"),
        (["flash-0731", "--gpus", "H200", "--draft", "2"], "draft_tokens (--draft)"),
    ],
)
def test_mistakes_are_told_in_one_line(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, *arguments)
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert said in err


def test_errors_are_of_their_kinds() -> None:
    with pytest.raises(RequestError):
        find_gpu("2xH100")
    with pytest.raises(ConfigError):
        plan("tiny-base")


# --- beside a GPU's own account --------------------------------------------------------------------------------------


def allocated() -> int:
    gc.collect()
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def planned(made: Plan) -> int:
    """Weights once loaded, and cache."""
    return sum(made.weights.values()) + sum(made.cache(made.options))


@pytest.mark.gpu
def test_a_gpu_holds_of_the_embedded_model_what_is_planned() -> None:
    made, before = plan(str(EMBEDDED), max_sequences=4), allocated()
    llm = LLM.load(options=made.options)
    worst = torch.cuda.max_memory_allocated() - before
    assert allocated() - before == pytest.approx(planned(made), rel=0.02)
    assert worst < 1.05 * (made.needed(made.options) - OUTSIDE)
    assert llm.engine is not None


@pytest.mark.gpu
def test_a_gpu_holds_of_layers_of_flash_what_is_planned(tmp_path: Path) -> None:
    """Five of them, every kind, with random weights; and the largest step is near its estimate."""
    config = FLASH.shortened(5)
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    made = plan(str(tmp_path), max_context=65_536, max_sequences=4)
    kernels.install()
    before = allocated()
    store = Store(config, made.options, made.options.reuse_points)
    with use(made.options.choices):
        model = Model(config, RandomWeights(config, 0, torch.device("cuda", 0)), made.options)
        loaded = allocated()
        assert loaded - before == pytest.approx(planned(made), rel=0.02)
        Runner(model, store).rehearse(made.options.prefill_chunk, made.options.draft_slack)
    worst = torch.cuda.max_memory_allocated() - loaded
    assert 0.6 < worst / made.workspace(made.options).total < 1.25
