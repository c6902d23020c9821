"""Which form of the dense product is the faster one: `python -m bench.matmul_forms [--json FILE]` on a GPU.

One line a matrix and number of tokens: microseconds of the form for few with tiles of 8 and of 16 rows, of the form for
many, and which of them `dsv4/kernels/matmul.py` takes. No form changes a bit.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from bench.forms import in_turn, microseconds
from dsv4.bench.ops import record
from dsv4.check.cases.inputs import BF16, normal
from dsv4.check.cases.matmul import SHAPES, weights
from dsv4.check.verify import prepare
from dsv4.kernels import matmul

TOKENS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128)
MATRICES = SHAPES | {"flash head": (129_280, 4096)}
CHOICE = (matmul.tile_rows, matmul.few, matmul._PASSES)


def force(form: str) -> None:
    """Tiles of so many rows for few tokens, or the form for many, whatever the matrix; or "chosen"."""
    matmul.tile_rows, matmul.few, matmul._PASSES = CHOICE  # type: ignore[misc]
    if form == "many":
        matmul.few = lambda *_: None  # type: ignore[assignment]
    elif form != "chosen":
        matmul.tile_rows, matmul._PASSES = (lambda *_: int(form.split()[1])), 2**30  # type: ignore[assignment, misc]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", type=Path, help="append one line for each matrix to this file")
    parser.add_argument("--only", default="", help="only matrices whose name has this in it")
    asked = parser.parse_args()
    prepare()
    device = torch.device("cuda", 0)
    for name, (rows, columns) in MATRICES.items():
        if asked.only not in name:
            continue
        weight, found = weights(rows, columns, BF16).to(device), dict[str, dict[str, float]]()
        for tokens in TOKENS:
            given = (normal("x", tokens, columns, dtype=BF16).to(device), weight)
            calls = in_turn(matmul.product, given, device)
            found[str(tokens)] = {}
            for form in ("few 8", "few 16", "many", "chosen"):
                force(form)
                if (us := microseconds(calls)) is not None:
                    found[str(tokens)][form] = round(us, 2)
            shown = "  ".join(f"{form} {us:.2f}" for form, us in found[str(tokens)].items())
            print(
                f"{name}, {tokens}: {shown}  ({2e-3 * rows * columns / found[str(tokens)]['chosen']:.0f} GB/s)",
                flush=True,
            )
        if asked.json:
            record(asked.json, {"what": "matmul forms", "matrix": name, "us": found}, device)


if __name__ == "__main__":
    main()
