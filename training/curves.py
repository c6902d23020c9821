"""What a run writes down: a line of means every so often, in `log.jsonl` of its directory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


class Means:
    """Means since the last line. They are added up on the device, so that no step waits for the host."""

    def __init__(self) -> None:
        self.steps = 0
        self.sums: dict[str, Tensor] = {}

    def add(self, found: Mapping[str, Tensor], kinds: Tensor) -> None:
        """One step's numbers, and [2, n] by kind of document: summed loss, and tokens."""
        self.steps += 1
        for name, value in (*found.items(), ("kinds", kinds)):
            wide = value.detach().double()
            self.sums[name] = self.sums[name] + wide if name in self.sums else wide.clone()

    def take(self, names: Sequence[str]) -> dict[str, Any]:
        """All means, then `families`: the loss in nats of what the answers of each kind said. Begins anew."""
        loss, tokens = self.sums.pop("kinds").tolist()
        means: dict[str, Any] = {name: round(float(total) / self.steps, 4) for name, total in self.sums.items()}
        told = {name: round(loss[n] / tokens[n], 3) for n, name in enumerate(names) if tokens[n]}
        self.steps, self.sums = 0, {}
        return {**means, "families": told}


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of all bytes, in the order of the names: equal for equal runs."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        found.update(tensors[name].detach().cpu().contiguous().view(torch.uint8).numpy())
    return found.hexdigest()


def cut(log: Path, step: int) -> None:
    """Drop the lines behind `step`: a run that goes on from there writes them again."""
    if log.exists():
        lines = [line for line in log.read_text(encoding="utf-8").splitlines() if json.loads(line)["step"] <= step]
        log.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def append(log: Path, line: Mapping[str, Any]) -> None:
    """One more line; printed as well, without what is long."""
    with log.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    print({name: value for name, value in line.items() if name != "families"}, flush=True)
