"""`python -m training.train tiny`: trains a recipe on one GPU (or, slowly, a CPU) and exports the model.

A run is a directory: `state.pt` to go on from after an interruption, `log.jsonl` with the curves, and at the end
`model/` in the official format. The same seed gives the same batches; a run that was interrupted continues as if it
had not been.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Collection
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from training import recipes
from training.export import export_model
from training.feed import Block, Plan, blocks, schedule
from training.network import COMPILED, Network
from training.optimizer import Muon, by_adam
from training.params import initial
from training.recipes import Phase, Recipe
from training.step import Passes

EVERY = 50  # steps between lines of the log
DECAYED = ("embed", "head")  # and the routers: a score that runs away never comes back
SAVE_EVERY = 500  # steps between states, so that an interruption costs little
BIAS_RATE = 1e-3  # how fast the router's bias evens out the experts


class Run:
    """Parameters, optimisers and the number of steps done."""

    def __init__(self, recipe: Recipe, device: str, compiled: Collection[str] = ()) -> None:
        self.recipe, self.device, self.step = recipe, device, 0
        config = recipe.config
        start = initial(config, recipe.seed)
        self.params = {name: p.to(device).requires_grad_(p.is_floating_point()) for name, p in start.items()}
        self.biases = {name: p for name, p in self.params.items() if name.endswith("gate.bias")}
        self.bias = torch.stack([p.detach() for p in self.biases.values()])  # of all routers, by layer
        for p, row in zip(self.biases.values(), self.bias, strict=True):
            p.data = row
        learnt = {n: p.requires_grad_(n not in self.biases) for n, p in self.params.items() if p.is_floating_point()}
        adam = {name: p for name, p in learnt.items() if by_adam(name, p) and p.requires_grad}
        matrices = {name: p for name, p in learnt.items() if name not in adam and p.requires_grad}
        self.muon = Muon(matrices, {name: config.o_groups for name in matrices if name.endswith("wo_a.weight")})
        decayed = [p for name, p in adam.items() if name.startswith(DECAYED) or ".gate." in name]
        rest = [p for name, p in adam.items() if not (name.startswith(DECAYED) or ".gate." in name)]
        groups = [{"params": decayed, "weight_decay": recipe.decay}, {"params": rest, "weight_decay": 0.0}]
        self.adam = torch.optim.AdamW(groups, lr=recipe.rate, betas=(0.9, 0.95), eps=1e-10, fused=device != "cpu")
        network = Network(config, self.params, torch.bfloat16, compiled=compiled)
        self.passes = Passes(network, recipe, device, recorded=device != "cpu")

    def train(self, phase: Phase, block: Block) -> dict[str, Tensor]:
        """One step; returns what the log wants to know, still on the device."""
        losses, loads = self.passes(phase, block)
        load = torch.stack([loads[name.removesuffix("gate.bias")] for name in self.biases]).float()
        gradients = [p.grad for group in self.adam.param_groups for p in group["params"] if p.grad is not None]
        size = torch.nn.utils.get_total_norm(gradients)
        torch._foreach_mul_(gradients, 1.0 / size.clamp(min=1.0))
        self._update(load)
        return losses | {"gradient": size, "load": (load.amax(1) / load.mean(1)).amax()}

    @torch.no_grad()
    def _update(self, load: Tensor) -> None:
        factor = pace(self.step, self.recipe)
        for group in self.adam.param_groups:
            group["lr"] = self.recipe.rate * factor
        self.muon.step(self.recipe.matrix_rate * factor, self.recipe.decay)
        self.adam.step()
        self.bias += BIAS_RATE * torch.sign(load.mean(1, keepdim=True) - load)
        self.step += 1

    def save(self, path: Path) -> None:
        """Everything to go on from; renamed into place, so that no half of it is ever found."""
        state = {
            "step": self.step,
            "params": self.params,
            "adam": self.adam.state_dict(),
            "muon": self.muon.state_dict(),
        }
        torch.save(state, path.with_suffix(".partial"))
        path.with_suffix(".partial").replace(path)

    def load(self, path: Path) -> None:
        """Take a saved state back."""
        state = torch.load(path, map_location=self.device)
        with torch.no_grad():
            for name, p in self.params.items():
                p.copy_(state["params"][name])
        self.adam.load_state_dict(state["adam"])
        self.muon.load_state_dict(state["muon"])
        self.step = state["step"]


def pace(step: int, recipe: Recipe) -> float:
    """Share of the full rates at a step: a short rise, a long level, a straight fall to a hundredth."""
    rise = min(1.0, (step + 1) / recipe.warmup)
    fall = (recipe.steps - step) / (recipe.cooldown * recipe.steps)
    return min(rise, max(0.01, min(1.0, fall)))


def train(run: Run, plan: Plan, out: Path, processes: int, deadline: float) -> bool:
    """Train until done or until `deadline` (of time.monotonic); True when done."""
    todo = list(islice(schedule(run.recipe), run.step, None))
    started, first = time.monotonic(), run.step
    with (out / "log.jsonl").open("a", encoding="utf-8") as log:
        for (phase, _), block in zip(todo, blocks(plan, todo, processes), strict=True):
            found = run.train(phase, block)
            if run.step % EVERY == 0 or run.step == run.recipe.steps:
                line = _line(run, phase, found, started, first)
                print(line, flush=True)
                log.write(json.dumps(line) + "\n")
                log.flush()
                if not line["loss"] < float("inf"):
                    raise FloatingPointError(f"step {run.step}: the loss is {line['loss']}; the last state is kept")
            if run.step % SAVE_EVERY == 0:
                run.save(out / "state.pt")
            if time.monotonic() > deadline and run.step < run.recipe.steps:
                break
    run.save(out / "state.pt")
    return run.step == run.recipe.steps


def _line(run: Run, phase: Phase, found: dict[str, Tensor], started: float, first: int) -> dict[str, Any]:
    seconds = time.monotonic() - started
    numbers = {name: round(float(value), 4) for name, value in found.items()}
    done = run.step - first
    rest = {"length": phase.length, "sparse": phase.sparse, "pace": round(pace(run.step - 1, run.recipe), 4)}
    return {"step": run.step, **numbers, **rest, "seconds": round(seconds, 1),
            "tokens_per_second": round(done * run.recipe.tokens / seconds)}  # fmt: skip


def scaled(recipe: Recipe, factor: float) -> Recipe:
    """The same recipe with all phases longer or shorter: for trying things out."""
    return replace(recipe, phases=tuple(replace(p, steps=max(1, round(p.steps * factor))) for p in recipe.phases))


def main() -> None:
    """The command line."""
    build = Path(__file__).parent / "build"
    parser = argparse.ArgumentParser(prog="python -m training.train", description=__doc__)
    parser.add_argument("recipe", choices=recipes.RECIPES)
    parser.add_argument("--out", type=Path, help="the run's directory (training/build/RECIPE)")
    parser.add_argument("--corpus", type=Path, default=build)
    parser.add_argument("--vocabulary", type=Path, default=build / "vocabulary")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--minutes", type=float, default=1e9, help="stop by then, to be continued by the same command")
    parser.add_argument("--scale", type=float, default=1.0, help="factor on the number of steps")
    parser.add_argument("--processes", type=int, default=max(1, (os.cpu_count() or 2) - 2))
    parser.add_argument("--eager", action="store_true", help="do not compile")
    given = parser.parse_args()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # sums in one order, run after run
    torch.set_float32_matmul_precision("high")
    deadline = time.monotonic() + 60 * given.minutes
    recipe = scaled(recipes.RECIPES[given.recipe], given.scale)
    out = given.out or build / given.recipe
    out.mkdir(parents=True, exist_ok=True)
    plan = Plan(recipes.MIXTURE, given.vocabulary, given.corpus, recipe.seed, recipe.prompt_weight, recipe.tokens)
    run = Run(recipe, given.device, compiled=() if given.eager else COMPILED)
    if (out / "state.pt").exists():
        run.load(out / "state.pt")
    if train(run, plan, out, given.processes, deadline):
        export_model(run.params, recipe, given.vocabulary, out / "model")


if __name__ == "__main__":
    main()
