"""The trainer's mathematics: equal to the engine's, and with gradients that stay finite."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dsv4.cache.store import Store
from dsv4.check.forced import losses, served
from dsv4.checkpoint.names import parameters
from dsv4.config import EngineOptions, ModelConfig
from dsv4.engine.request import Sampling
from dsv4.llm import LLM
from dsv4.model.batch import Segment
from dsv4.model.model import Model
from dsv4.model.mtp import Mtp
from dsv4.quant.activation import fp4_simulate, fp8_simulate
from dsv4.quant.formats import FP8_BLOCK, MXFP4
from dsv4.quant.tensor import QTensor
from tests import PICO
from training import rounding, sinkhorn
from training.network import Losses, Network
from training.params import export, hub_tensor, hub_weights, imported, initial
from training.pieces import expert_weights, reduce, scores_of_experts

CONFIG = ModelConfig.from_dict(
    ModelConfig.named("flash").to_dict()
    | {
        "vocab_size": 200, "hidden_size": 64, "num_hidden_layers": 4, "compress_ratios": [0, 4, 128, 4, 0],
        "num_hash_layers": 2, "num_attention_heads": 4, "head_dim": 64, "qk_rope_head_dim": 16, "q_lora_rank": 32,
        "o_groups": 2, "o_lora_rank": 32, "moe_intermediate_size": 32, "n_routed_experts": 8,
        "num_experts_per_tok": 2, "index_n_heads": 16, "index_head_dim": 32, "index_topk": 8,
    }
)  # fmt: skip
LENGTH = 256


def shaken(seed: int) -> dict[str, torch.Tensor]:
    """Parameters away from their symmetric start."""
    params, generator = initial(CONFIG, seed), torch.Generator().manual_seed(seed)
    for name, p in params.items():
        if p.is_floating_point() and p.dim() < 3:
            params[name] = p + 0.05 * torch.randn(p.shape, generator=generator)
    return params


def test_logits_and_draft_equal_the_engine_s() -> None:
    params = shaken(1)
    ids = torch.randint(0, 200, (2, LENGTH + 1), generator=torch.Generator().manual_seed(2))
    network = Network(CONFIG, params, torch.float32, rounding=False)
    streams = network.streams(network.rows(ids[:, :-1]), Losses(), sparse=True)
    names = ("hc_head_fn", "hc_head_base", "hc_head_scale", "norm.weight")
    x = reduce(streams, *(params[name] for name in names), CONFIG.hc_eps, network.style)
    drafted = network.draft_streams(streams, network.rows(ids[:, 1:]), Losses())

    options = EngineOptions(numerics="float", dtype="float32", max_context=LENGTH, max_sequences=2)
    weights = {param.name: hub_tensor(params, param.name) for param in parameters(CONFIG)}
    model, store = Model(CONFIG, weights, options), Store(CONFIG, options)
    batch = model.batch([Segment(n, 0, ids[n, :-1].tolist()) for n in range(2)])
    output = model(batch, store)
    wanted = model.logits(output.streams)
    assert (x @ params["head.weight"].t() - wanted).abs().max() < 1e-4 * wanted.std()
    draft = Mtp(CONFIG, weights, options, model)(output.streams, ids[:, 1:].flatten(), batch, store.layers[-1])
    assert (drafted - draft).abs().max() < 1e-4 * draft.std()


@pytest.mark.slow
def test_a_trained_model_predicts_as_in_the_engine_with_all_its_roundings(pico_dir: Path) -> None:
    llm = LLM.load(PICO)
    model, options = served(llm)
    pieces = llm.prompt([{"role": "user", "content": "Tell me a story."}]).pieces
    ids = llm.tokenizer.encode_prompt(pieces)
    ids = [*ids, *(delta.token for delta in llm.generate(ids, Sampling(temperature=0, max_tokens=128)))]
    ids = (ids * 4)[:257]
    wanted = losses(model, options, ids)
    network = Network(llm.config, imported(pico_dir, llm.config), torch.bfloat16)
    with torch.no_grad():
        streams = network.streams(network.rows(torch.tensor([ids[:-1]])), Losses(), sparse=True)
        found = network.losses(streams, torch.tensor(ids[1:])).double()
    assert (found - wanted).abs().mean() < 0.02
    assert abs(float(found.mean() - wanted.mean())) < 0.005


def test_a_checkpoint_is_what_was_exported(tmp_path: Path) -> None:
    params = shaken(8)
    export(params, CONFIG, tmp_path)
    back = imported(tmp_path, CONFIG)
    assert {name: p.shape for name, p in back.items()} == {name: p.shape for name, p in params.items()}
    once = hub_weights(params, CONFIG)
    twice = hub_weights(back, CONFIG)
    for name, weight in once.items():
        pair = [w.values() if isinstance(w, QTensor) else w for w in (weight, twice[name])]
        assert torch.equal(*pair), name


def test_every_parameter_learns() -> None:
    params = {n: p.requires_grad_(p.is_floating_point() and "bias" not in n) for n, p in shaken(3).items()}
    ids = torch.randint(0, 200, (1, LENGTH + 2), generator=torch.Generator().manual_seed(4))
    network, losses = Network(CONFIG, params, torch.float32), Losses()
    streams = network.streams(network.rows(ids[:, :-2]), losses, sparse=True)
    following = network.rows(ids[:, 1:-1])
    loss = network.losses(streams, following.ids).mean() + sum(losses.index)
    drafted = network.draft_streams(streams, following, losses)
    (loss + network.draft_losses(drafted, ids[:, 2:].flatten()).mean()).backward()
    without = [n for n, p in params.items() if p.requires_grad and (p.grad is None or not p.grad.abs().sum() > 0)]
    assert without == []
    assert [n for n, p in params.items() if p.grad is not None and not p.grad.isfinite().all()] == []


def test_a_score_that_underflows_has_a_finite_gradient() -> None:
    gate = torch.eye(4, 8).requires_grad_()
    x = torch.zeros(1, 8)
    x[0, :4] = torch.tensor([1.0, 2.0, -200.0, -1e4])
    expert_weights(scores_of_experts(x, gate), torch.zeros(4), None, 2, 1.5).square().sum().backward()
    assert gate.grad is not None
    assert gate.grad.isfinite().all()


def test_the_gradient_of_sinkhorn_is_that_of_its_loop() -> None:
    logits = (3 * torch.randn(50, 4, 4, generator=torch.Generator().manual_seed(5))).requires_grad_()
    grad = torch.randn(50, 4, 4, generator=torch.Generator().manual_seed(6))
    wanted, found = (f(logits, 20, 1e-6) for f in (sinkhorn.plain, sinkhorn.sinkhorn))
    assert torch.equal(wanted, found)
    pairs = [torch.autograd.grad(out, logits, grad)[0] for out in (wanted, found)]
    torch.testing.assert_close(*pairs, rtol=1e-4, atol=1e-6)


def test_rounding_is_that_of_the_formats() -> None:
    x = torch.randn(40, 256, generator=torch.Generator().manual_seed(7)) * torch.logspace(-8, 3, 40)[:, None]
    assert torch.equal(rounding.fp8_rows(x, 128), fp8_simulate(x, 128))
    assert torch.equal(rounding.fp4_rows(x), fp4_simulate(x, 32))
    assert torch.equal(
        rounding.fp8_tiles(x[:, :64].t().contiguous()[:, :32]), FP8_BLOCK.encode(x[:32, :64].t()).values()
    )
    assert torch.equal(rounding.fp4_rows(x), MXFP4.encode(x).values())
