"""The house around the rooms: environment, packaging, documents, commands and the size of files."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import dsv4
from dsv4 import settings
from dsv4.errors import ConfigError
from tests.test_doors import ENGINE_NEEDS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "dsv4"
DOCUMENTS = ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

# --- the environment ---------------------------------------------------------------------------------------------


def no_report(line: str) -> None:
    raise AssertionError(line)


def test_an_empty_environment_gives_the_defaults() -> None:
    assert settings.load({}, no_report) == settings.Settings(threads=None)


@pytest.mark.parametrize(
    ("variable", "text", "field", "value"),
    [
        ("DSV4_THREADS", "3", "threads", 3),
        ("DSV4_CACHE", "here/kernels", "cache", Path("here/kernels")),
        ("DSV4_API_KEY", "a key", "api_key", "a key"),
        ("TORCH_EXTENSIONS_DIR", "/x/extensions", "torch_extensions", Path("/x/extensions")),
        ("TORCH_EXTENSIONS_DIR", "", "torch_extensions", None),
        ("XDG_CACHE_HOME", "/x/cache", "user_cache", Path("/x/cache")),
        ("XDG_CACHE_HOME", "x/cache", "user_cache", None),
    ],
)
def test_a_knob_sets_its_field(variable: str, text: str, field: str, value: object) -> None:
    assert getattr(settings.load({variable: text, "HOME": "x"}, no_report), field) == value


def test_an_empty_cache_folder_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^DSV4_CACHE; got ''; wanted a directory; unset DSV4_CACHE"):
        settings.load({"DSV4_CACHE": ""}, no_report)


@pytest.mark.parametrize("text", ["", "0", "-1", "many", "2.5"])
def test_a_bad_value_is_one_line_that_names_the_knob(text: str) -> None:
    with pytest.raises(ConfigError, match=f"^DSV4_THREADS; got {text!r}; wanted a whole number.*; unset DSV4_THREADS"):
        settings.load({"DSV4_THREADS": text}, no_report)


def test_an_unknown_knob_is_reported_with_the_likely_name() -> None:
    lines: list[str] = []
    settings.load({"DSV4_THREDS": "3"}, lines.append)
    assert lines == ["DSV4_THREDS is not a setting (did you mean DSV4_THREADS?); it is ignored"]


def test_there_are_few_knobs_and_each_has_a_field() -> None:
    assert len(settings.KNOBS) <= 12
    assert [knob.field for knob in settings.KNOBS] == list(settings.Settings.__dataclass_fields__)


READERS = {"environ", "environb", "getenv", "getenvb", "putenv", "envvar"}


def environment_readers(source: str) -> set[str]:
    """Names in `source` by which the environment is read, typer's `envvar=` too."""
    nodes = list(ast.walk(ast.parse(source)))
    attributes = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    imported = {node.name for node in nodes if isinstance(node, ast.alias)}
    keywords = {node.arg for node in nodes if isinstance(node, ast.keyword)}
    return READERS & {name for name in attributes | imported | keywords if name}


@pytest.mark.parametrize("source", ["os.environ['A']", "from os import getenv", "typer.Option(envvar='A')"])
def test_a_planted_reader_of_the_environment_is_found(source: str) -> None:
    assert environment_readers(source)


def test_settings_alone_reads_the_environment() -> None:
    sources = {path.relative_to(PACKAGE).as_posix(): path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py")}
    assert [name for name, source in sources.items() if environment_readers(source)] == ["settings.py"]


# --- files ---------------------------------------------------------------------------------------------------------


def test_no_file_of_the_package_is_long() -> None:
    files = [path for path in PACKAGE.rglob("*") if path.suffix in (".py", ".cu", ".cuh")]
    lines = {path.relative_to(ROOT).as_posix(): len(path.read_bytes().splitlines()) for path in files}
    assert {name: count for name, count in lines.items() if count > 400} == {}


def texts() -> Iterator[Path]:
    """The text files that are handed out."""
    kinds = (".py", ".md", ".cu", ".cuh", ".json", ".jsonl")
    yield from (ROOT / name for name in ("Makefile", "pyproject.toml", ".gitignore", ".ci/run"))
    yield from ROOT.glob("*.md")
    for folder in ("dsv4", "tests", "training", "bench", "wheel"):
        yield from (p for p in (ROOT / folder).rglob("*") if p.suffix in kinds)


MACHINE_PATH = re.compile(r"(?<![\w.~*/\])}-])/(?:home|root|Users|work|tmp|mnt|opt|scratch)/[\w.]")


@pytest.mark.parametrize("folder", ["home", "tmp", "Users"])
def test_a_planted_machine_path_is_found(folder: str) -> None:
    assert MACHINE_PATH.search(f"open('/{folder}/ann/model')")
    assert not MACHINE_PATH.search(f"https://example.org/{folder}/ann")


def test_no_file_names_a_path_of_one_machine() -> None:
    found = {path: MACHINE_PATH.findall(path.read_text(encoding="utf-8")) for path in texts()}
    assert {path: paths for path, paths in found.items() if paths} == {}


# --- documents -----------------------------------------------------------------------------------------------------

# A path with a folder, of any text kind, or a bare source file; not inside an address, nor under a home.
NAMED_FILE = re.compile(r"(?<![\w/.~<*-])((?:[\w.-]+/)+[\w-]+\.(?:py|cu|cuh|md|toml|json)|[\w-]+\.(?:py|cu|cuh))\b")
OTHERS = ("inference/", "encoding/")  # files of the official release


def missing(text: str) -> list[str]:
    """The files that `text` names and the repository lacks: from its root, from dsv4/, or by bare name anywhere."""
    names = [name for name in NAMED_FILE.findall(text) if not name.startswith(OTHERS)]
    return sorted({name for name in names if not any(_places(name))})


def _places(name: str) -> Iterator[bool]:
    yield from ((ROOT / name).exists(), (PACKAGE / name).exists())
    if "/" not in name:
        yield from (any(PACKAGE.rglob(name)), (ROOT / "tests" / name).exists())


def document(name: str) -> str:
    path = ROOT / name
    return path.read_text(encoding="utf-8")


def test_a_planted_dead_name_is_found() -> None:
    text = "`ops/norm.py` `dsv4/nowhere.py` `tests/test_nothing.py` `errors.py` `inference/model.py` `gone.py`"
    assert set(missing(text)) >= {"dsv4/nowhere.py", "gone.py", "tests/test_nothing.py"}
    assert not {"errors.py", "inference/model.py"} & set(missing(text))


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_file_that_a_document_names_exists(name: str) -> None:
    assert missing(document(name)) == []


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_make_command_that_a_document_names_exists(name: str) -> None:
    named = re.findall(r"(?:^|`)make ([a-z0-9]+)", document(name), re.MULTILINE)
    assert set(named) <= targets()


def test_the_readme_names_the_two_commands() -> None:
    assert {"make demo", "make test"} <= set(re.findall(r"make \w+", document("README.md")))


def test_the_recipe_for_a_wrong_token_runs_as_printed(capsys: pytest.CaptureFixture[str]) -> None:
    code = re.findall(r"^```python\n(.*?)^```", document("CONTRIBUTING.md"), re.MULTILINE | re.DOTALL)
    assert len(code) == 1
    exec(compile(code[0], "CONTRIBUTING.md", "exec"), {})
    printed = capsys.readouterr().out
    assert re.search(r"^0 streams \d", printed, re.MULTILINE)


# --- make ----------------------------------------------------------------------------------------------------------


def targets() -> set[str]:
    """The phony targets of the Makefile: what a person may type."""
    phony = re.search(r"^\.PHONY:(.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert phony
    return set(phony[1].split())


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    return subprocess.run(["make", *arguments], cwd=ROOT, capture_output=True, text=True, check=False, env=clean)


@pytest.mark.parametrize("target", ["help", "demo", "test", "ci", "soak", "gpu", "step", "lint", "clean"])
def test_make_knows_the_target_and_says_so(target: str, tmp_path: Path) -> None:
    assert target in targets()
    assert make("-n", target, f"VENV={tmp_path}/v", f"TEST_VENV={tmp_path}/t").returncode == 0
    assert target == "help" or f"make {target}" in make("help").stdout


@pytest.mark.parametrize(("version", "said"), [("Python 3.9.1", "3.10 or newer; {} is Python 3.9.1"), (None, "3.10")])
def test_an_old_or_missing_python_is_refused_in_one_sentence(version: str | None, said: str, tmp_path: Path) -> None:
    fake = tmp_path / "python"
    if version:
        fake.write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo {version} || exit 1\n', encoding="utf-8")
        fake.chmod(0o755)
    done = make("demo", f"PYTHON={fake}", f"VENV={tmp_path}/venv")
    assert done.returncode != 0
    assert said.format(fake) in done.stderr
    assert not (tmp_path / "venv").exists()


STAND_IN = """#!/bin/sh
case "$*" in
    *is_available*) exit {seen} ;;
    *"{fails}"*) echo "$*" >>{log}; exit 3 ;;
esac
echo "$*" >>{log}
out=`echo "$*" | sed -n 's/.*--out \\([^ ]*\\).*/\\1/p'`
test -z "$out" || echo "{{}}" >>"$out"
"""


def steps(tmp_path: Path, fails: str, seen: int = 0) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """`make step` with a Python that writes down what it is asked, and fails for what has `fails` in it."""
    fake, log = tmp_path / "python", tmp_path / "log"
    fake.write_text(STAND_IN.format(fails=fails, log=log, seen=seen), encoding="utf-8")
    fake.chmod(0o755)
    done = make("step", f"PYTHON={fake}", f"OUT={tmp_path}/lines")
    return done, log.read_text(encoding="utf-8").splitlines() if log.exists() else []


@pytest.mark.parametrize(
    ("fails", "code"), [("nothing", 0), ("-m pytest", 2), ("--config pro", 2), ("bench prefill", 2)]
)
def test_steps_are_all_run_and_a_failure_is_told_at_the_end(fails: str, code: int, tmp_path: Path) -> None:
    done, asked = steps(tmp_path, fails)
    assert done.returncode == code
    assert [fails in line for line in asked].count(True) == ("make step: failed:" in done.stderr) == bool(code)
    told = ["pytest -m gpu tests/test_graphs.py", "bench decode", "--config pro", "bench prefill"]
    assert all(one in line for one, line in zip(told, asked, strict=True))
    written = sorted(path.name for path in (tmp_path / "lines").iterdir())
    assert [name[11:] for name in written] == ["decode.jsonl", "prefill.jsonl"][: 2 - (fails == "bench prefill")]
    assert all(f"lines/{name}" in done.stdout.splitlines()[-1] for name in written)


def test_steps_need_a_gpu(tmp_path: Path) -> None:
    done, asked = steps(tmp_path, "nothing", seen=1)
    assert done.returncode == 2
    assert "make step: " in done.stderr
    assert "no torch that sees a GPU" in done.stderr
    assert asked == []


# --- the package ---------------------------------------------------------------------------------------------------


def test_the_declared_dependencies_are_those_the_doors_allow() -> None:
    assert {re.split(r"[<>=]", need)[0] for need in PROJECT["dependencies"]} == ENGINE_NEEDS


def test_the_wheel_holds_the_whole_package_and_nothing_else(tmp_path: Path) -> None:
    """By our backend; what it adds, tests/test_kernels_wheel.py looks at."""
    pytest.importorskip("flit_core")
    build = f"from with_cubins import build_wheel; print(build_wheel({str(tmp_path)!r}, {{'cubins': 'none'}}))"
    done = subprocess.run(
        [sys.executable, "-c", build],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": "wheel"},
    )
    name = done.stdout.split()[-1]
    assert name.startswith(f"dsv4-{dsv4.__version__}-")
    inside = {entry for entry in zipfile.ZipFile(tmp_path / name).namelist() if ".dist-info/" not in entry}
    ours = {path for path in PACKAGE.rglob("*") if path.is_file() and path.suffix not in (".pyc", ".pyo")}
    assert inside == {path.relative_to(ROOT).as_posix() for path in ours}


# --- the suite itself ------------------------------------------------------------------------------------------------

SKIPS = {
    "test_body.py": "import pytest\ndef test_it():\n    pytest.skip('no tool')",
    "test_mark.py": "import pytest\n@pytest.mark.skipif(True, reason='no tool')\ndef test_it(): ...",
    "test_file.py": "import pytest\npytest.importorskip('no_such_tool')\ndef test_it(): ...",
}


@pytest.mark.slow
@pytest.mark.parametrize(("ci", "closing"), [("", "3 skipped"), ("true", "1 failed, 2 errors")])
def test_a_skip_fails_in_ci_alone(ci: str, closing: str, tmp_path: Path) -> None:
    conftest = (ROOT / "tests/conftest.py").read_text(encoding="utf-8")
    for name, source in {**SKIPS, "conftest.py": conftest}.items():
        (tmp_path / name).write_text(source, encoding="utf-8")
    options = ["-p", "no:cacheprovider", "--continue-on-collection-errors", "-c", os.devnull]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(tmp_path)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "CI": ci, "PYTHONPATH": str(ROOT)},
    )
    assert closing in done.stdout.splitlines()[-1]
    assert (done.returncode == 0) == (not ci)
    assert done.stdout.count("where every test must run: ") >= (3 if ci else 0)


def test_what_guards_against_a_defect_is_there() -> None:
    """Every test and every patch that docs/defects.md promises."""
    text = (ROOT / "docs" / "defects.md").read_text(encoding="utf-8")
    named = re.findall(r"`(?:tests/)?([\w/]+\.(?:py|patch))(?:::(\w+))?`", text)
    rows = [
        line
        for line in text.splitlines()
        if line.startswith("| ") and "---" not in line and "what would fail" not in line
    ]
    assert all("`" in line for line in rows)
    assert len(named) > len(rows) > 20
    for file, test in named:
        source = (ROOT / "tests" / file).read_text(encoding="utf-8")
        assert not test or re.search(rf"^(?:@.*\n)*def {test}\(", source, re.MULTILINE), f"{file} has no {test}"
