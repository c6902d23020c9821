"""How rows should lie on threads: `python bench/row_forms.py [--json FILE]` on a GPU.

One line a timed case of many rows: microseconds by chunks a warp and threads on a multiprocessor ("all": no block takes
a second row). What is chosen by these figures: `_chunks` and `threads` of dsv4/kernels/norm.py and its neighbours.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from dsv4.bench.ops import measure, record, timed
from dsv4.check.contract import Case
from dsv4.kernels import moe, norm, quantize, rows

FORMS = (("norm", None, norm, (1, 2)), ("quantize", None, quantize, (1, 2)), ("moe", "swiglu_quant", moe, (1, 2)))
THREADS = {"512": 512, "1024": 1024, "1536": 1536, "2048": 2048, "all": 1 << 30}


def measured(case: Case, module: object, chunks: int, threads: int) -> float | None:
    """Microseconds of the fused kernel in this form; None if it has no such form."""
    chosen = module.shape_rows  # type: ignore[attr-defined]
    module.shape_rows = lambda x, *_: rows.shape_rows(x, chunks, threads)  # type: ignore[attr-defined]
    try:
        return next(line.line()["microseconds"] for line in measure([case], torch.device("cuda", 0), 10))
    except KeyError:
        return None
    finally:
        module.shape_rows = chosen  # type: ignore[attr-defined]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, help="append one line for each case to this file")
    asked = parser.parse_args()
    for family, op, module, some in FORMS:
        for case in timed(family, op=op):
            if case.name.endswith(" 1"):
                continue
            found = {
                f"{chunks} x {name}": time
                for chunks in some
                for name, threads in THREADS.items()
                if (time := measured(case, module, chunks, threads)) is not None
            }
            shown = "  ".join(f"{form} {us:.1f}" for form, us in found.items())
            print(f"{case.op.name} {case.name}: {shown}", flush=True)
            if asked.json:
                line = {"what": "row forms", "op": case.op.name, "case": case.name, "us": found}
                record(asked.json, line, torch.device("cuda", 0))


if __name__ == "__main__":
    main()
