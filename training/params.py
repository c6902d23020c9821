"""The flat table of parameters: Hub names, except that a layer's experts are one stack [E, out, in]."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from dsv4.checkpoint.ledger import balance
from dsv4.checkpoint.load import Weight, load_ledger
from dsv4.checkpoint.names import parameters
from dsv4.checkpoint.reader import TORCH_DTYPES, Checkpoint
from dsv4.checkpoint.specs import Param
from dsv4.checkpoint.write import write
from dsv4.config import ModelConfig
from dsv4.quant.tensor import QTensor

_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(w[123])\.weight")


def initial(config: ModelConfig, seed: int) -> dict[str, Tensor]:
    """FP32 parameters (tables of expert ids: int64) to start from, on the CPU. Depends on the seed and names alone.

    Matrices are normal with variance 1 / in; what writes into the streams is smaller by the depth. Each mHC site starts
    by reading mostly one stream, in turn, and by leaving the streams where they are.
    """
    generator = torch.Generator().manual_seed(seed)
    out: dict[str, Tensor] = {}
    for name, shape in _shapes(config):
        out[name] = _start(name, shape, config, generator)
    return out


def _shapes(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    for param in parameters(config):
        expert = _EXPERT.fullmatch(param.name)
        if expert is None:
            yield param.name, param.shape
        elif expert[2] == "0":
            yield f"{expert[1]}.{expert[3]}", (config.n_routed_experts, *param.shape)


def _start(name: str, shape: tuple[int, ...], config: ModelConfig, generator: torch.Generator) -> Tensor:
    noise = torch.randn(shape, generator=generator)
    depth = 1 / math.sqrt(2 * config.num_hidden_layers)
    last = name.rpartition(".")[2] if not name.endswith(".weight") else name.split(".")[-2]
    if last == "tid2eid":
        ranks = torch.rand(shape[0], config.n_routed_experts, generator=generator)
        return ranks.argsort(-1)[:, : shape[1]].contiguous()
    if last.endswith("norm"):
        return torch.ones(shape)
    if last.endswith("_base"):
        return _mixing_base(name, config)
    if last.endswith("_scale"):
        return torch.full(shape, 0.1)
    if last in ("ape", "bias", "attn_sink"):
        return torch.zeros(shape)
    scales = {"embed": 0.5, "head": 0.3 / math.sqrt(shape[-1]), "wo_b": depth, "w2": depth}
    if last == "embed" or last == "head":
        return noise * scales[last]
    return noise * scales.get(last, 1.0) / math.sqrt(shape[-1])


def _mixing_base(name: str, config: ModelConfig) -> Tensor:
    m = config.hc_mult
    layer = re.search(r"layers\.(\d+)\.hc_(attn|ffn)", name)
    reads = torch.full((m,), -1.5)
    if layer is None and not name.startswith("mtp.0.hc_attn") and not name.startswith("mtp.0.hc_ffn"):
        return torch.zeros(m)  # the head reads all streams alike
    site = 2 * int(layer[1]) + (layer[2] == "ffn") if layer else 0
    reads[site % m] = 1.5
    return torch.cat((reads, torch.zeros(m), 4 * torch.eye(m).flatten()))


def imported(directory: str | Path, config: ModelConfig) -> dict[str, Tensor]:
    """The parameters of a checkpoint of this configuration, to train on from: stored numbers, decoded."""
    checkpoint = Checkpoint.open(directory)
    weights = load_ledger(checkpoint, balance(config, checkpoint.specs, draft=True), config, "cpu", None)
    dense = {name: w.values() if isinstance(w, QTensor) else w for name, w in weights.items()}
    return {name: _imported(name, shape, dense) for name, shape in _shapes(config)}


def _imported(name: str, shape: tuple[int, ...], dense: Mapping[str, Tensor]) -> Tensor:
    if name in dense:
        return dense[name].float() if dense[name].is_floating_point() else dense[name].long()
    stem, _, which = name.rpartition(".")
    return torch.stack([dense[f"{stem}.{expert}.{which}.weight"].float() for expert in range(shape[0])])


def hub_tensor(params: Mapping[str, Tensor], name: str) -> Tensor:
    """The tensor of a Hub name."""
    expert = _EXPERT.fullmatch(name)
    return params[name] if expert is None else params[f"{expert[1]}.{expert[3]}"][int(expert[2])]


def hub_weights(params: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Weight]:
    """Every parameter under its Hub name, in the format that the official checkpoints store it in."""
    return {param.name: _stored(hub_tensor(params, param.name).detach().cpu(), param) for param in parameters(config)}


def _stored(tensor: Tensor, param: Param) -> Weight:
    if param.format is None:
        return tensor.to(TORCH_DTYPES[param.dtype]).contiguous()
    return param.format.encode(tensor.float())


def export(params: Mapping[str, Tensor], config: ModelConfig, directory: str | Path) -> None:
    """Write an official-format checkpoint."""
    write(directory, config, hub_weights(params, config), overwrite=True)
