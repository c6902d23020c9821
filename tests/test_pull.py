"""`dsv4 pull` against a hub on 127.0.0.1 that drops connections, sends wrong bytes and refuses; ORG/NAME as MODEL."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dsv4.checkpoint import hub as ours
from dsv4.checkpoint.hub import Name, find_model, read_name
from dsv4.cli.main import main
from dsv4.errors import CheckpointError
from tests.hub_stand_in import COMMIT, Hub, stand_in

pytest.importorskip("huggingface_hub")
from huggingface_hub import constants

WEIGHTS = "model-00001-of-00001.safetensors"
SMALL = {
    "config.json": b'{"model_type": "deepseek_v4"}',
    "README.md": b"# a model",
    "LICENSE": b"MIT",
    WEIGHTS: bytes(range(256)) * 2000,
    "model.safetensors.index.json": b"{}",
    "encoding/encoding_dsv4.py": b"TEXT = 'a prompt'\n",
    "encoding/README.md": b"how to talk",
    "inference/model.py": b"raise SystemExit\n",
    "pytorch_model.bin": b"could run code",
    "figures/benchmark.png": b"a picture",
}
NOT_WANTED = {"pytorch_model.bin", "figures/benchmark.png"}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, no token of whoever runs this, and no waiting between tries."""
    folder = tmp_path / "cache"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1 << 14)  # what it has of a broken piece is lost
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    monkeypatch.setattr("socket.getaddrinfo", _here_alone(socket.getaddrinfo))
    return folder


def _here_alone(look_up: Callable[..., Any]) -> Callable[..., Any]:
    """No test asks another machine, whatever the library thinks that its endpoint is."""

    def looked_up(host: object, *rest: Any, **named: Any) -> Any:
        assert host in ("127.0.0.1", b"127.0.0.1"), host
        return look_up(host, *rest, **named)

    return looked_up


@pytest.fixture
def hub(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with stand_in({"org/small": SMALL}) as here:
        asks(here, monkeypatch)
        yield here


def asks(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """As HF_ENDPOINT does it, which the library reads when it is imported."""
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")


def pull(name: str) -> Path:
    return ours.pull(name, lambda file, done, total: None)


def files(directory: Path) -> dict[str, bytes]:
    return {p.relative_to(directory).as_posix(): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def failing(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line of an error, with exit code 1 and nothing on stdout."""
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    out, err = capsys.readouterr()
    assert (stop.value.code, out) == (1, "")
    assert err.startswith("dsv4: ")
    assert err.count("\n") == 1
    return err


# --- names ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("org/name", Name("org/name", "main")),
        ("org/name.v4-Flash_2", Name("org/name.v4-Flash_2", "main")),
        ("org/name@v1", Name("org/name", "v1")),
        ("org/name@refs/pr/1", Name("org/name", "refs/pr/1")),
        *((text, None) for text in ("name", "/org/name", "org/name/", "a/b/c", "../name", "org/..", "~/name")),
        *((text, None) for text in ("org/na me", "org/name@", "org/name@/etc", "org/name@a/../b", "or--g/name", "")),
    ],
)
def test_a_name_is_told_from_a_path(text: str, name: Name | None) -> None:
    assert read_name(text) == name


def test_a_directory_goes_before_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("org/name").mkdir(parents=True)
    assert find_model("org/name") == Path("org/name")
    assert find_model("nowhere") == Path("nowhere")


# --- what arrives ---------------------------------------------------------------------------------------------------


def test_everything_that_is_wanted_arrives_and_is_found_by_its_name(hub: Hub) -> None:
    directory = pull("org/small")
    assert files(directory) == {path: content for path, content in SMALL.items() if path not in NOT_WANTED}
    assert find_model("org/small") == find_model("org/small@main") == directory
    before = len(hub.asked)
    assert pull("org/small@v1") == directory
    assert not [asked for asked in hub.asked[before:] if "/resolve/" in asked.path]  # all of it was there


def test_a_connection_that_drops_is_taken_up_where_it_broke(hub: Hub) -> None:
    hub.drops[WEIGHTS] = 2
    assert files(pull("org/small"))[WEIGHTS] == SMALL[WEIGHTS]
    starts = [int((asked.range or "bytes=0-")[6:-1]) for asked in hub.fetched(WEIGHTS)]
    half, piece = len(SMALL[WEIGHTS]) // 2, 1 << 14
    assert starts[0] == 0
    assert half - piece <= starts[1] <= half
    assert starts[1] + half // 2 - piece <= starts[2] <= starts[1] + half


def test_a_pull_that_failed_goes_on_with_the_files_that_it_has(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    hub.down[WEIGHTS] = 100
    assert "503" in failing(capsys, "pull", "org/small")
    assert "goes on" in failing(capsys, "generate", "org/small", "-p", "x")
    hub.down.clear()
    pull("org/small")
    assert len(hub.fetched("config.json")) == 1


@pytest.mark.parametrize("path", [WEIGHTS, "config.json"])
def test_wrong_bytes_are_fetched_once_more(path: str, hub: Hub) -> None:
    hub.wrong[path] = 1
    assert files(pull("org/small"))[path] == SMALL[path]
    assert len(hub.fetched(path)) == 2


def test_bytes_that_stay_wrong_are_refused_and_not_kept(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    hub.wrong[WEIGHTS] = 2
    assert f"{WEIGHTS} came twice with other bytes" in failing(capsys, "pull", "org/small")
    assert "not all in the local cache" in failing(capsys, "inspect", "org/small")
    assert files(pull("org/small"))[WEIGHTS] == SMALL[WEIGHTS]


def test_a_byte_that_rots_in_the_cache_is_found_by_the_next_pull(hub: Hub) -> None:
    blob = (pull("org/small") / WEIGHTS).resolve()
    blob.write_bytes(b"\1" + SMALL[WEIGHTS][1:])
    assert files(pull("org/small"))[WEIGHTS] == SMALL[WEIGHTS]


def test_a_path_that_leads_out_of_the_cache_touches_nothing(
    hub: Hub, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outside = cache.parent / "outside.json"
    outside.write_bytes(b"mine")
    hub.repos["org/small"]["../../../../outside.json"] = b"theirs"
    failing(capsys, "pull", "org/small")
    assert outside.read_bytes() == b"mine"


# --- what does not --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("org/nothing", {}, "the hub has no org/nothing"),
        ("org/small@v9", {}, "no such revision"),
        ("org/small", {"token": "secret"}, "set HF_TOKEN"),
        ("org/small", {"gated": True}, "consent"),
        ("org/small", {"repos": {"org/small": {"README.md": b"x"}}}, "holds no checkpoint"),
        ("small", {}, "wanted ORG/NAME"),
        ("../etc/passwd", {}, "wanted ORG/NAME"),
    ],
)
def test_a_refusal_is_one_line(
    name: str, change: dict[str, object], words: str, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    for attribute, value in change.items():
        setattr(hub, attribute, value)
    assert words in failing(capsys, "pull", name)


def test_a_hub_that_is_not_there_is_one_line(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with stand_in({}) as gone:
        asks(gone, monkeypatch)
    assert "cannot be asked; got Connect" in failing(capsys, "pull", "org/small")


def test_offline_what_is_there_is_checked_and_the_rest_is_one_line(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = pull("org/small")
    before = len(hub.asked)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert pull("org/small") == directory
    (directory / WEIGHTS).resolve().write_bytes(b"\1" + SMALL[WEIGHTS][1:])
    for name in ("org/small", "org/small@v1", "org/other"):
        assert "HF_HUB_OFFLINE" in failing(capsys, "pull", name)
    assert len(hub.asked) == before


@pytest.mark.parametrize(
    "verb",
    [
        ("generate", "-p", "x"),
        ("inspect",),
        ("plan", "--gpus", "H200"),
        ("chat",),
        ("eval",),
        ("study", "formats"),
        ("compare",),
    ],
    ids=str,
)
def test_a_name_that_is_not_here_says_how_to_get_it(
    verb: tuple[str, ...], cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "dsv4 pull org/absent" in failing(capsys, *verb, "org/absent")


def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for asking in (lambda: pull("org/small"), lambda: find_model("org/small")):
        with pytest.raises(CheckpointError, match=r"pip install 'dsv4\[hub\]'"):
            asking()


# --- from end to end ------------------------------------------------------------------------------------------------


def test_a_pulled_model_answers_by_its_name(
    cache: Path, pico_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = {path.name: path.read_bytes() for path in pico_dir.iterdir() if path.is_file()}
    with stand_in({"org/pico": model}) as hub:
        asks(hub, monkeypatch)
        pull("org/pico")
    question = ("-p", "What is the capital of France?", "--no-think", "--quiet")
    for arguments, words in (
        (("generate", "org/pico", *question), "Paris"),
        (("inspect", "org/pico"), "every expected"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(list(arguments))
        assert not stop.value.code
        assert words in capsys.readouterr().out


def clean(home: Path) -> dict[str, str]:
    """An environment for a process of its own, without settings of whoever runs this."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING", "XDG_CACHE"))}
    return kept | {"HF_HOME": str(home)}


PULL = (sys.executable, "-m", "dsv4.cli.main", "pull", "org/small")


def parts(folder: Path) -> list[str]:
    """Unfinished files, in a tree that may change meanwhile."""
    return [name for _, _, names in os.walk(folder) for name in names if name.endswith(".incomplete")]


@pytest.mark.parametrize("others", [0, 40])
def test_ctrl_c_ends_it_at_once_and_leaves_no_part(others: int, tmp_path: Path) -> None:
    """Also where many more files are just being opened by the library's threads."""
    more = {f"encoding/{n}.md": bytes([n]) * 3000 for n in range(others)}
    with stand_in({"org/small": SMALL | more}) as hub:
        hub.stalls[WEIGHTS] = 1
        environment = clean(tmp_path) | {"HF_ENDPOINT": hub.url}
        pulling = subprocess.Popen(PULL, env=environment, stderr=subprocess.PIPE, text=True)
        while not (hub.fetched(WEIGHTS) and parts(tmp_path)):
            assert pulling.poll() is None
            threading.Event().wait(0.02)
        pulling.send_signal(signal.SIGINT)
        _, err = pulling.communicate(timeout=60)
    assert pulling.returncode == 130
    assert err.strip() == "dsv4: stopped; dsv4 pull again goes on with the files that are whole"
    assert parts(tmp_path) == []


LOUD = """
import os, signal, threading
from dsv4.checkpoint import hub
from dsv4.cli.main import main

class Finalized:
    def __del__(self):
        open(os.devnull).close()

def forever():
    while True:
        Finalized()

def pull(name, show):
    threading.Thread(target=forever, daemon=True).start()
    signal.raise_signal(signal.SIGINT)

hub.pull = pull
main(["pull", "org/small"])
"""


@pytest.mark.slow
def test_what_a_finalizer_then_fails_to_do_is_not_told() -> None:
    """As those of the library's temporary folders, in its threads: they can open nothing any more."""
    done = subprocess.run([sys.executable, "-c", LOUD], capture_output=True, text=True, check=False)
    assert done.returncode == 130
    assert done.stderr.strip() == "dsv4: stopped; dsv4 pull again goes on with the files that are whole"


@pytest.mark.slow
def test_the_environment_counts_as_for_every_program_of_the_hub(tmp_path: Path) -> None:
    """HF_ENDPOINT, HF_HOME, HF_TOKEN and HF_HUB_OFFLINE, in processes of their own: the library reads them once."""
    environment = clean(tmp_path / "home") | {"HF_TOKEN": "secret"}

    def run(**more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(PULL, env=environment | more, capture_output=True, text=True, check=False)

    with stand_in({"org/small": SMALL}) as hub:
        hub.token = "secret"
        hub.drops[WEIGHTS] = 1
        pulled = run(HF_ENDPOINT=hub.url)
    assert (pulled.returncode, pulled.stderr) == (0, "")
    directory = Path(pulled.stdout.removesuffix("\n"))
    assert directory.is_relative_to(tmp_path / "home")
    assert directory.name == COMMIT
    assert json.loads((directory / "config.json").read_bytes()) == json.loads(SMALL["config.json"])
    assert {asked.authorization for asked in hub.asked if "org/small" in asked.path} == {"Bearer secret"}
    assert run(HF_HUB_OFFLINE="1").stdout == pulled.stdout
