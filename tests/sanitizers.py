"""Every kernel on the small cases under compute-sanitizer's tools, side by side: `python -m tests.sanitizers` on a GPU.

What a kernel computes `dsv4 check` judges; here each runs once a case, with nothing of torch's between, every tensor in
memory of its own so that a step beside it is seen.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Final, NamedTuple

import torch

from dsv4.bench.ops import record
from dsv4.check import verify
from dsv4.check.cases import FAMILIES, cases
from dsv4.check.contract import placed

ROOT = Path(__file__).resolve().parents[1]
SANITIZER: Final = os.environ.get("SANITIZER", "compute-sanitizer")
TOOLS: Final = ("memcheck", "racecheck", "synccheck")
AT_ONCE: Final = 8  # tools and families: most of their time is that of a CPU
FOUND: Final = 9  # the exit code for errors that a tool found
LIMIT: Final = 120  # seconds of one tool and family
# API errors: cuda-bindings asks a driver older than itself for entries that it lacks, which is no fault of a kernel.
_FLAGS: Final = ("--report-api-errors", "no", "--show-backtrace", "no", "--error-exitcode", str(FOUND))


class Outcome(NamedTuple):
    """code: 0 if all was well, FOUND for what the tool found, 1 if a kernel could not run, None past the limit."""

    tool: str
    family: str
    code: int | None
    seconds: float
    text: str

    @property
    def closing(self) -> list[str]:
        """What the tool and the program said last."""
        return re.findall(r"^(?:=+ )?(\w+ SUMMARY: .*|\d+ runs of .*)$", self.text, re.MULTILINE)


def launch(family: str) -> str:
    """Run each kernel of the family once on every small case that it takes; what was run, in words."""
    device = verify.device_for("cuda")
    verify.prepare()
    done: Counter[str] = Counter()
    for case in (case for case in cases(family) if case.size == "small"):
        for name in verify.implementations(case.op, device).keys() - {"auto", "unfused"}:
            given, kernel = placed(case.make(), device), case.op.implementations[name]
            if not kernel.accepts(*given):
                kernel.run(*given)
                torch.cuda.synchronize()  # the tool names the kernel that it speaks of
                done[case.op.name] += 1
    return f"{done.total()} runs of {', '.join(done)}"


def sanitized(tool: str, family: str, package: Path = ROOT) -> Outcome:
    """The small cases of a family under a tool, with the dsv4 that lies in `package`."""
    start = time.monotonic()
    command = [SANITIZER, "--tool", tool, *_FLAGS, sys.executable, "-m", "tests.sanitizers", "--launch", family]
    paths = [str(package), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    given = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    with tempfile.TemporaryFile("w+") as told:
        running = subprocess.Popen(command, cwd=package, env=given, stdout=told, stderr=told, start_new_session=True)
        try:
            code: int | None = running.wait(LIMIT)
        except subprocess.TimeoutExpired:
            code = None
            os.killpg(running.pid, signal.SIGKILL)  # with the program that it watches
        told.seek(0)
        text = told.read()
    return Outcome(tool, family, code, time.monotonic() - start, text)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("families", nargs="*", default=FAMILIES, help="only these; without, all")
    parser.add_argument("--launch", choices=FAMILIES, help="only run the kernels of one, under a tool or without")
    parser.add_argument("--json", type=Path, help="append a line for each tool and family to this file")
    asked = parser.parse_args()
    if asked.launch:
        print(launch(asked.launch))
        return
    if not shutil.which(SANITIZER):
        raise SystemExit(f"no {SANITIZER} on the PATH; it comes with CUDA's toolkit, and SANITIZER=... names another")
    device, wrong = torch.device("cuda", torch.cuda.current_device()), False
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for found in pool.map(lambda pair: sanitized(*pair), product(TOOLS, asked.families)):
            print(f"{found.tool} {found.family}: {'; '.join(found.closing)} ({found.seconds:.0f} s)", flush=True)
            if found.code != 0:
                wrong = True
                print(f"exit code {found.code}\n{found.text[-4000:]}", flush=True)
            if asked.json:
                told = {key: value for key, value in found._asdict().items() if key != "text"}
                record(asked.json, {"what": "sanitizer", **told, "closing": found.closing}, device)
    raise SystemExit(wrong)


if __name__ == "__main__":
    main()
