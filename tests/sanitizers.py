"""Every kernel on the small cases under compute-sanitizer's tools, side by side: `python -m tests.sanitizers` on a GPU.

A case is a few launches of ours among hundreds of torch's own, which take nearly all the time of a sanitizer. They are
somebody else's, so they run as they are: with that the tools take seconds in place of many minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Final, NamedTuple

import torch

from dsv4.bench.ops import circumstances
from dsv4.check.cases import FAMILIES

ROOT = Path(__file__).resolve().parents[1]
SANITIZER: Final = os.environ.get("SANITIZER", "compute-sanitizer")
TOOLS: Final = ("memcheck", "racecheck", "synccheck")
AT_ONCE: Final = 8  # tools and families: most of their time is that of a CPU
FOUND: Final = 9  # the exit code for errors that a tool found
LIMIT: Final = 120  # seconds of one tool and family
_TORCHS: Final = "native|cub|cutlass|gemm|gemv|splitK"  # in the names of the kernels of torch and of its libraries
# API errors: cuda-bindings asks a driver older than itself for entries that it lacks, which is no fault of a kernel.
_FLAGS: Final = ("--report-api-errors", "no", "--show-backtrace", "no", "--error-exitcode", str(FOUND))


class Outcome(NamedTuple):
    """code: 0 if all was well, FOUND for what the tool found, else that of `dsv4 check`, None past the limit."""

    tool: str
    family: str
    code: int | None
    seconds: float
    text: str

    @property
    def closing(self) -> list[str]:
        """What the tool and the check said last."""
        return re.findall(r"^(?:=+ )?(\w+ SUMMARY: .*|\d[\d,]* cases of .*)$", self.text, re.MULTILINE)


def sanitized(tool: str, family: str, package: Path = ROOT) -> Outcome:
    """The small cases of a family under a tool, with the dsv4 that lies in `package`."""
    start = time.monotonic()
    command = [SANITIZER, "--tool", tool, *_FLAGS, "--kernel-regex-exclude", f"kns={_TORCHS}", sys.executable]
    command += ["-m", "dsv4.cli.main", "check", family, "--size", "small", "--device", "cuda"]
    paths = [str(package), *filter(None, [os.environ.get("PYTHONPATH")])]
    given = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
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
    parser.add_argument("--json", type=Path, help="append a line for each tool and family to this file")
    asked = parser.parse_args()
    if not shutil.which(SANITIZER):
        raise SystemExit(f"no {SANITIZER} on the PATH; it comes with CUDA's toolkit, and SANITIZER=... names another")
    about, wrong = circumstances(torch.device("cuda", torch.cuda.current_device())), False
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for found in pool.map(lambda pair: sanitized(*pair), product(TOOLS, asked.families)):
            print(f"{found.tool} {found.family}: {'; '.join(found.closing)} ({found.seconds:.0f} s)", flush=True)
            if found.code != 0:
                wrong = True
                print(f"exit code {found.code}\n{found.text[-4000:]}", flush=True)
            if asked.json:
                line = {"what": "sanitizer", **found._asdict(), "closing": found.closing}
                with asked.json.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({key: value for key, value in line.items() if key != "text"} | about) + "\n")
    raise SystemExit(wrong)


if __name__ == "__main__":
    main()
