"""Which room may import which. The table is the architecture; a wrong door fails here, a lazy import as well."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "dsv4"

# room: the rooms it may import besides itself. `llm` alone lets kernels meet the model.
BASE = {"config", "errors", "settings"}
BELOW_LLM = BASE | {"quant", "parallel", "taps", "ops", "kernels", "checkpoint", "cache", "model", "engine", "chat"}
DOORS: dict[str, set[str]] = {
    "": set(),  # dsv4/__init__.py
    "errors": set(),
    "settings": {"errors"},
    "config": {"errors"},
    "quant": BASE,
    "parallel": BASE,
    "taps": BASE,
    "ops": {"quant", "taps", "parallel", "errors"},
    "kernels": {"ops", "quant", "parallel", "settings", "errors"},
    "checkpoint": {"config", "quant", "parallel", "errors"},
    "cache": {"config", "quant", "errors"},
    "model": {"config", "quant", "ops", "cache", "parallel", "taps", "errors"},
    "engine": {"config", "model", "cache", "ops", "parallel", "taps", "errors"},
    "chat": {"config", "errors"},
    "llm": BELOW_LLM,
    "cli": {"llm", "chat", "checkpoint.hub", "engine.request", "config", "errors", "check", "bench"},
    "server": {"llm", "chat", "engine.request", "config", "errors"},
    "check": BELOW_LLM | {"llm", "bench"},
    "bench": BELOW_LLM | {"llm", "check"},
}
# Single files whose doors differ from their room's: more for the verbs that are about a room, less for plain Python.
FILES: dict[str, set[str]] = {
    **dict.fromkeys(("cli.inspect", "cli.synth", "cli.plan"), DOORS["cli"] | {"checkpoint"}),
    **dict.fromkeys(("cli.kernels", "cli.doctor"), DOORS["cli"] | {"kernels"}),
    "cli.serve": DOORS["cli"] | {"server", "settings"},
    "cache.pages": set(),
}

ENGINE_NEEDS = {"torch", "numpy", "tokenizers", "typer", "rich"}
# What an optional extra of pyproject.toml brings, and the files that may ask for it.
EXTRAS = {
    "bench.load_figures": {"matplotlib"},
    "chat.grammar": {"llguidance"},
    "check.study.plots": {"matplotlib"},
    "check.compare.picture": {"matplotlib"},
    "checkpoint.hub": {"huggingface_hub", "httpx2"},
    "cli.config_file": {"yaml"},
    "cli.pull": {"huggingface_hub"},
    "server.anthropic_in": {"pydantic"},
    "server.anthropic_out": {"pydantic_core"},
    "server.app": {"fastapi", "starlette"},
    "server.guard": {"starlette"},
    "server.responses_in": {"pydantic"},
    "server.run": {"uvicorn"},
    "server.schema": {"pydantic"},
    "server.static": {"starlette"},
    "server.stream": {"fastapi", "starlette"},
    "kernels.compiler": {"cuda"},
    "kernels.driver": {"cuda"},
}
TENSORS = {"torch", "numpy", "safetensors"}  # safetensors' readers bring one of the other two
STDLIB_ONLY = ("errors", "settings", "cache.pages")
# Wheels are built where there is no torch, and `dsv4 kernels` needs none to show its table.
BUILDERS = tuple(f"kernels.{name}" for name in ("build", "cache", "compiler", "prebuilt", "report", "source"))
PLAIN = ("checkpoint.hub", "engine.scheduler", "engine.request", "engine.stop")
TENSOR_FREE = ("", "config", "chat", *PLAIN, *BUILDERS, *STDLIB_ONLY)


class Import(NamedTuple):
    line: int
    module: str
    at_runtime: bool = True


def modules(package: Path) -> Iterator[tuple[str, Path]]:
    """Every file of `package` with its dotted name in it: "ops.norm", "ops" for ops/__init__.py, "" for the root."""
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def inside(module: str, door: str) -> bool:
    return module == door or module.startswith(door + ".")


def room(module: str) -> str:
    """`config_fields` beside `config` is the same room in a second file."""
    head = module.partition(".")[0]
    return head if head in DOORS else head.partition("_")[0]


def imports(path: Path, package: Path) -> Iterator[Import]:
    """Every import statement of a file, wherever it stands, and the imports by name that a reader can follow."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_only = {id(node) for block in ast.walk(tree) if _is_typing_block(block) for node in ast.walk(block)}
    for node in ast.walk(tree):
        for module in _imported(node, path, package):
            yield Import(getattr(node, "lineno", 0), module, id(node) not in typing_only)


def _is_typing_block(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and not node.orelse and ast.unparse(node.test).endswith("TYPE_CHECKING")


def _imported(node: ast.AST, path: Path, package: Path) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        source = _absolute(node, path, package)
        return [f"{source}.{alias.name}" if inside(source, "dsv4") else source for alias in node.names]
    if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
        name = node.args[0] if node.args else None
        literal = isinstance(name, ast.Constant) and isinstance(name.value, str) and not name.value.startswith(".")
        return [name.value] if literal else ["a name known only at run time"]  # type: ignore[union-attr]
    return []


def _absolute(node: ast.ImportFrom, path: Path, package: Path) -> str:
    if not node.level:
        return node.module or ""
    here = ("dsv4", *path.relative_to(package).parent.parts)
    return ".".join((*here[: len(here) - node.level + 1], *filter(None, [node.module])))


def fault(module: str, found: Import) -> str | None:
    """Why `module` may not have this import, or None."""
    top, _, target = found.module.partition(".")
    if top == "dsv4":
        return _wrong_room(module, target)
    if top in sys.stdlib_module_names:
        return None
    if module in STDLIB_ONLY:
        return f"{module} is standard library only"
    if found.at_runtime and top in TENSORS and _tensor_free(module):
        return f"{module or 'dsv4'} may not import {top}"
    allowed = top in ENGINE_NEEDS or top in EXTRAS.get(module, ())
    return None if allowed else f"{found.module} is not among the engine's dependencies"


def _tensor_free(module: str) -> bool:
    return room(module) in TENSOR_FREE or any(inside(module, name) for name in TENSOR_FREE if name)


def _wrong_room(module: str, target: str) -> str | None:
    mine, theirs = room(module), room(target)
    if mine not in DOORS:
        return f"{mine} is no room of the table"
    if theirs not in DOORS:
        return f"dsv4.{target} is in no room of the table"
    allowed = FILES.get(module, DOORS[mine])
    at_home = theirs == mine and module not in STDLIB_ONLY
    if not theirs or at_home or theirs in allowed or any(inside(target, door) for door in allowed):
        return None
    return f"{module or 'dsv4'} may not import {target}"


def wrong_doors(package: Path) -> list[str]:
    """One line for every forbidden import under `package`."""
    return [
        f"{path.relative_to(package)}:{found.line}: {why}"
        for module, path in modules(package)
        for found in imports(path, package)
        if (why := fault(module, found))
    ]


def test_every_import_goes_through_a_door_of_the_table() -> None:
    assert wrong_doors(PACKAGE) == []


def test_every_file_is_in_a_room_of_the_table() -> None:
    assert [module for module, _ in modules(PACKAGE) if room(module) not in DOORS] == []


@pytest.mark.parametrize(
    ("file", "source", "why"),
    [
        ("quant/formats.py", "import dsv4.ops.norm", "may not import ops.norm"),
        ("ops/norm.py", "def f() -> None:\n    from dsv4.kernels import norm", "may not import kernels.norm"),
        ("ops/norm.py", "from dsv4 import model", "may not import model"),
        ("ops/norm.py", "from ..engine import stop", "may not import engine.stop"),
        ("kernels/norm.py", "from ..model.block import Block", "may not import model.block"),
        ("kernels/norm.py", "import importlib\nimportlib.import_module('dsv4.cache.store')", "may not import cache"),
        ("kernels/norm.py", "__import__('dsv4.' + 'cache')", "known only at run time"),
        ("model/block.py", "from dsv4.kernels import install", "may not import kernels"),
        ("model/block.py", "from dsv4.checkpoint.reader import read", "may not import checkpoint"),
        ("engine/engine.py", "from dsv4.chat.parse import parse", "may not import chat"),
        ("engine/request.py", "import torch", "may not import torch"),
        ("engine/scheduler.py", "def f() -> None:\n    import numpy as np", "may not import numpy"),
        ("cache/pages.py", "from dsv4.errors import DSV4Error", "may not import errors"),
        ("cache/pages.py", "from dsv4.cache.store import Store", "may not import cache.store"),
        ("chat/encode.py", "from torch import Tensor", "may not import torch"),
        ("chat/encode.py", "from dsv4.quant import formats", "may not import quant"),
        ("config_fields.py", "import torch", "may not import torch"),
        ("config.py", "import dsv4.settings", "may not import settings"),
        ("settings.py", "import rich", "standard library only"),
        ("errors.py", "from . import settings", "may not import settings"),
        ("__init__.py", "import torch", "may not import torch"),
        ("__init__.py", "from dsv4.config import ModelConfig", "may not import config"),
        ("cli/generate.py", "from dsv4.engine.runner import Runner", "may not import engine.runner"),
        ("cli/generate.py", "from dsv4.checkpoint import reader", "may not import checkpoint"),
        ("checkpoint/hub.py", "import torch", "may not import torch"),
        ("cli/inspect.py", "from dsv4.model import block", "may not import model"),
        ("llm.py", "from dsv4.cli import main", "may not import cli"),
        ("check/compare.py", "import dsv4.server.app", "may not import server"),
        ("model/block.py", "import transformers", "not among the engine's dependencies"),
        ("kernels/norm.py", "from cuda.core import Program", "not among the engine's dependencies"),
        ("kernels/build.py", "import torch", "may not import torch"),
        ("check/study/report.py", "import matplotlib", "not among the engine's dependencies"),
        ("helpers.py", "import dsv4.errors", "is no room of the table"),
        ("quant/formats.py", "from dsv4.helpers import f", "in no room of the table"),
        ("quant/formats.py", "if TYPE_CHECKING:\n    from dsv4.model.block import Block", "may not import model"),
    ],
)
def test_a_planted_wrong_door_is_found(tmp_path: Path, file: str, source: str, why: str) -> None:
    assert why in "\n".join(wrong_doors(_plant(tmp_path, file, source)))


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("llm.py", "from dsv4 import kernels, model\nimport dsv4.engine.engine, torch"),
        ("cli/synth.py", "import typer\nfrom dsv4.checkpoint.write import write"),
        ("cli/chat.py", "from dsv4.checkpoint.hub import find_model"),
        ("checkpoint/hub.py", "def f() -> None:\n    import huggingface_hub"),
        ("cli/generate.py", "from dsv4.engine.request import Request\nfrom dsv4 import __version__"),
        ("config_fields.py", "import json\nfrom dsv4.config import ModelConfig\nfrom .errors import ConfigError"),
        ("taps.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from torch import Tensor"),
        ("engine/stop.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from torch import Tensor"),
        ("engine/runner.py", "import torch\nfrom . import request\nfrom dsv4.model.model import Model"),
        ("chat/tokenizer.py", "from tokenizers import Tokenizer"),
        ("kernels/compiler.py", "def f() -> None:\n    from cuda.core import Program"),
    ],
)
def test_a_right_door_is_open(tmp_path: Path, file: str, source: str) -> None:
    assert wrong_doors(_plant(tmp_path, file, source)) == []


def _plant(tmp_path: Path, file: str, source: str) -> Path:
    path = tmp_path / "dsv4" / file
    path.parent.mkdir(parents=True)
    path.write_text(source, encoding="utf-8")
    return tmp_path / "dsv4"


def test_plain_rooms_load_no_torch() -> None:
    """Also what they import in turn: a fresh process loads them all and then has no torch and no numpy."""
    plain = [".".join(filter(None, ("dsv4", module))) for module, _ in modules(PACKAGE) if _tensor_free(module)]
    script = f"import sys, {', '.join(plain)}\nprint(*sorted({TENSORS!r} & set(sys.modules)))"
    loaded = subprocess.run([sys.executable, "-c", script], cwd=PACKAGE.parent, stdout=subprocess.PIPE, check=True)
    assert loaded.stdout.split() == []
