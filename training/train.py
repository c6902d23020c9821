"""`python -m training.train tiny`: trains a recipe on one GPU (or, slowly, a CPU) and exports the model.

A run is a directory: `state.pt` to go on from after an interruption, `log.jsonl` with the curves, and at the end
`model/` in the official format. The same seed gives the same batches; a run that was interrupted continues as if it
had not been. With `--fit` the recipe is stretched to the minutes that there are: the speed of this machine is measured
first, and the factor is kept in `fitted.json` of the run and in its log.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import time
from collections.abc import Collection
from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from dsv4.errors import DSV4Error
from training import recipes
from training.curves import Means, append, cut, digest
from training.export import export_model
from training.feed import Block, Maker, Plan, blocks, schedule
from training.network import COMPILED, Network
from training.optimizer import Muon, by_adam
from training.params import imported, initial
from training.recipes import Phase, Recipe
from training.step import Passes

EVERY = 50  # steps between lines of the log
DECAYED = ("embed", "head")  # and the routers: a score that runs away never comes back
SAVE_EVERY = 500  # steps between states, so that an interruption costs little
MEASURED = 4  # steps that are timed of each form
SURE = 0.95  # share of the minutes that steps get: states are saved and steps recorded beside them
BIAS_RATE = 1e-3  # how fast the router's bias evens out the experts


class Run:
    """Parameters, optimisers, and how far a run has come."""

    def __init__(
        self,
        recipe: Recipe,
        device: str,
        compiled: Collection[str] = (),
        recorded: bool = False,
        begin: Path | None = None,
    ) -> None:
        """`begin`: a checkpoint of the recipe's configuration to train on from, in place of random numbers."""
        self.recipe, self.device, self.step, self.seconds = recipe, device, 0, 0.0
        config = recipe.config
        start = imported(begin, config) if begin else initial(config, recipe.seed)
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
        self.passes = Passes(network, recipe, device, recorded)

    def train(self, phase: Phase, block: Block) -> tuple[dict[str, Tensor], Tensor]:
        """One step; returns what the log wants to know (and by kind of document), still on the device."""
        losses, loads, kinds = self.passes(phase, block)
        load = torch.stack([loads[name.removesuffix("gate.bias")] for name in self.biases]).float()
        gradients = [p.grad for group in self.adam.param_groups for p in group["params"] if p.grad is not None]
        size = torch.nn.utils.get_total_norm(gradients)
        torch._foreach_mul_(gradients, 1.0 / size.clamp(min=1.0))
        self._update(load)
        return losses | {"gradient": size, "load": (load.amax(1) / load.mean(1)).amax()}, kinds

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
            "seconds": self.seconds,
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
        self.step, self.seconds = state["step"], state["seconds"]


def pace(step: int, recipe: Recipe) -> float:
    """Share of the full rates at a step: a short rise, a long level, a straight fall to a hundredth."""
    rise = min(1.0, (step + 1) / recipe.warmup)
    fall = (recipe.steps - step) / (recipe.cooldown * recipe.steps)
    return min(rise, max(0.01, min(1.0, fall)))


def train(run: Run, plan: Plan, out: Path, processes: int, deadline: float) -> bool:
    """Train until done or until `deadline` (of time.monotonic); True when done."""
    log, means, names = out / "log.jsonl", Means(), list(plan.mixture)
    cut(log, run.step)
    todo = list(islice(schedule(run.recipe), run.step, None))
    before, started, first = run.seconds, time.monotonic(), run.step
    for (phase, _), block in zip(todo, blocks(plan, todo, processes), strict=True):
        means.add(*run.train(phase, block))
        run.seconds = before + time.monotonic() - started
        last = run.step == run.recipe.steps
        if run.step % EVERY == 0 or last:
            rate = round((run.step - first) * run.recipe.tokens / (run.seconds - before))
            form = {"length": phase.length, "sparse": phase.sparse, "pace": round(pace(run.step - 1, run.recipe), 4)}
            times = {"seconds": round(run.seconds, 1), "tokens_per_second": rate}
            line = {"step": run.step, **form, **times, **means.take(names)}
            append(log, line)
            if not line["loss"] < float("inf"):
                raise FloatingPointError(f"step {run.step}: the loss is {line['loss']}; the last state is kept")
        late = time.monotonic() > deadline
        if run.step % SAVE_EVERY == 0 or last or late:
            run.save(out / "state.pt")
            append(log, {"step": run.step, "digest": digest(run.params)})
        if late:
            break
    return run.step == run.recipe.steps


def scaled(recipe: Recipe, factor: float) -> Recipe:
    """The same recipe with all phases longer or shorter."""
    return replace(recipe, phases=tuple(replace(p, steps=max(1, round(p.steps * factor))) for p in recipe.phases))


def measured(run: Run, maker: Maker) -> float:
    """Seconds that all steps of a run's recipe take on this machine. The run is of no use afterwards."""
    each: dict[tuple[int, bool], float] = {}
    for phase in run.recipe.phases:
        form = (phase.length, phase.sparse)
        if form not in each:
            block = maker.block("fit", phase.length, phase.long)
            float(run.train(phase, block)[1].sum())  # compiles and records; the number makes the host wait
            started = time.monotonic()
            found = [run.train(phase, block)[1] for _ in range(MEASURED)]
            float(found[-1].sum())
            each[form] = (time.monotonic() - started) / MEASURED
    print({f"{length} {'sparse' if sparse else 'dense'}": round(each[length, sparse], 4) for length, sparse in each})
    if run.device != "cpu":
        print(f"at most {torch.cuda.max_memory_reserved() / 1e9:.1f} GB of the GPU's memory", flush=True)
    return sum(phase.steps * each[phase.length, phase.sparse] for phase in run.recipe.phases)


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
    parser.add_argument("--begin", type=Path, help="a checkpoint to train on from; without it, random numbers")
    parser.add_argument("--scale", type=float, default=1.0, help="factor on the number of steps")
    parser.add_argument("--fit", type=float, help="so many steps as this machine does in as many minutes")
    parser.add_argument("--processes", type=int, default=max(1, (os.cpu_count() or 2) - 2))
    parser.add_argument("--eager", action="store_true", help="do not compile")
    parser.add_argument("--unrecorded", action="store_true", help="call every step anew, without a CUDA graph")
    given = parser.parse_args()
    started = time.monotonic()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # sums in one order, run after run
    torch.set_float32_matmul_precision("high")
    recipe = recipes.RECIPES[given.recipe]
    out = given.out or build / given.recipe
    out.mkdir(parents=True, exist_ok=True)
    plan = Plan.of(recipe, given.vocabulary, given.corpus)
    how = (given.device, () if given.eager else COMPILED, given.device != "cpu" and not given.unrecorded, given.begin)
    kept, factor = out / "fitted.json", given.scale
    if kept.exists():
        factor = json.loads(kept.read_text(encoding="utf-8"))["factor"]
    elif given.fit:
        whole = measured(Run(recipe, *how), Maker(plan))
        factor = SURE * (60 * given.fit - (time.monotonic() - started)) / whole
        gc.collect()  # frees the run that was measured
        kept.write_text(json.dumps({"factor": factor, "minutes": given.fit}) + "\n", encoding="utf-8")
    recipe = scaled(recipe, factor)
    run = Run(recipe, *how)
    if (out / "state.pt").exists():
        run.load(out / "state.pt")
    else:
        append(out / "log.jsonl", {"step": 0, "steps": recipe.steps, "factor": factor, "tokens": recipe.tokens})
    if train(run, plan, out, given.processes, started + 60 * given.minutes):
        export_model(run.params, recipe, given.vocabulary, out / "model")


if __name__ == "__main__":
    try:
        main()
    except DSV4Error as error:
        raise SystemExit(f"error: {error}; `make train` builds corpus and vocabulary first") from None
