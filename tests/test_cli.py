"""The command line as a user meets it: what goes to stdout, what to stderr, and with which exit code."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dsv4.cli.main import main

FRANCE = "What is the capital of France?"
PARIS = "The capital of France is Paris."


class Run:
    """One call of `main`."""

    def __init__(self, capsys: pytest.CaptureFixture[str], *arguments: str) -> None:
        with pytest.raises(SystemExit) as stop:
            main(list(arguments))
        self.code = stop.value.code or 0
        self.out, self.err = capsys.readouterr()


Call = Callable[..., Run]


@pytest.fixture
def dsv4(capsys: pytest.CaptureFixture[str]) -> Call:
    return lambda *arguments: Run(capsys, *arguments)


def test_the_answer_alone_goes_to_stdout(dsv4: Call) -> None:
    run = dsv4("generate", "-p", FRANCE)
    assert (run.code, run.out) == (0, PARIS + "\n")
    assert "The user asks for the capital of France." in run.err
    assert "tokens/s" in run.err
    assert "stopped by end of sentence" in run.err
    assert "numerics  official" in run.err


def test_without_thinking_and_quiet(dsv4: Call) -> None:
    run = dsv4("generate", "-p", FRANCE, "--no-think", "--quiet")
    assert (run.code, run.out, run.err) == (0, PARIS + "\n", "")


def test_an_answer_held_to_a_schema(pico_dir: Path, dsv4: Call, tmp_path: Path) -> None:
    file = tmp_path / "schema.json"
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    file.write_text(json.dumps(schema))
    run = dsv4("generate", str(pico_dir), "-p", FRANCE, "-q", "--json-schema", str(file))
    assert json.loads(run.out)["a"] in (1, 2)
    for content, said in (
        ('{"not": {}}', 'Unimplemented keys: ["not"]'),
        ("[]", "that is an object"),
        ("{", "is no JSON"),
    ):
        file.write_text(content)
        run = dsv4("generate", str(pico_dir), "-p", FRANCE, "--json-schema", str(file))
        assert run.code == 1
        assert said in run.err
    assert dsv4("generate", str(pico_dir), "-p", FRANCE, "--json-schema", str(tmp_path / "none")).code == 2


def test_json_holds_everything(pico_dir: Path, dsv4: Call) -> None:
    run = dsv4("generate", str(pico_dir), "-p", FRANCE, "--json", "--trace", "3")
    found = json.loads(run.out)
    assert found["message"]["content"] == PARIS
    assert found["message"]["reasoning_content"].startswith("The user asks")
    assert found["finish"] == "stop"
    assert found["completion_tokens"] == len(found["token_ids"]) > 20
    assert [len(step["ranking"]) for step in found["trace"]] == [5, 5, 5]
    assert sum(candidate["probability"] for candidate in found["trace"][0]["ranking"]) <= 1


def test_trace_takes_a_number_or_none_and_marks_turn_ends(dsv4: Call) -> None:
    whole = dsv4("generate", "-p", FRANCE, "--no-think", "--trace")
    lines = [line for line in whole.err.splitlines() if " p " in line and "entropy" in line]
    assert len(lines) == 8
    assert "turn end" in lines[-1]
    assert "turn end" not in lines[0].split("|")[0]
    assert sum("entropy" in line for line in dsv4("generate", "--trace", "4", "-p", FRANCE).err.splitlines()) == 4


def test_a_raw_prompt_without_its_sentinel_shows_in_the_trace(pico_dir: Path, dsv4: Call) -> None:
    prompt = f"<｜begin▁of▁sentence｜><｜User｜>{FRANCE}<｜Assistant｜>"
    run = dsv4("generate", str(pico_dir), "--raw", "-p", prompt, "--trace", "1")
    assert '"<think>"' in run.err
    assert run.out.startswith("<think>")
    assert PARIS in run.out


def test_a_stop_string_and_a_limit_are_named(pico_dir: Path, dsv4: Call) -> None:
    cut = dsv4("generate", str(pico_dir), "-p", FRANCE, "--no-think", "--stop", " is")
    assert cut.out == "The capital of France\n"
    assert "stop string" in cut.err
    assert "--max-tokens" in dsv4("generate", str(pico_dir), "-p", FRANCE, "--max-tokens", "3").err


def test_the_same_seed_gives_the_same_answer(pico_dir: Path, dsv4: Call) -> None:
    def answer(seed: str) -> str:
        wild = ("--temperature", "3", "--max-tokens", "12", "--quiet")
        return str(dsv4("generate", str(pico_dir), "-p", "Tell me a story.", "--no-think", "--seed", seed, *wild).out)

    assert answer("1") == answer("1") != answer("2")


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("generate",), 2, "--prompt"),
        (("generate", "-p", "x", "--numerics", "double"), 2, "numerics"),
        (("generate", "nowhere", "-p", "x"), 1, "nowhere"),
        (("generate", "-p", "x", "--temperature", "-1"), 1, "temperature"),
        (("generate", "-p", "x", "--effort", "low"), 1, "high"),
        (("generate", "-p", "x", "--dialect", "preview"), 1, "contradicts"),
        (("generate", "-p", "x " * 50, "--max-context", "16"), 1, "--max-context"),
        (("generate", "-p", "x", "--device", "abacus"), 1, "device"),
        (("generate", "-p", "x", "--draft", "99"), 1, "draft_tokens"),
        (("inspect", "nowhere"), 1, "nowhere"),
        (("synth", "--config", "huge", "--out", "x"), 1, "huge"),
        (("nonsense",), 2, "nonsense"),
    ],
)
def test_errors_are_one_line_with_an_exit_code(arguments: tuple[str, ...], code: int, words: str, dsv4: Call) -> None:
    run = dsv4(*arguments)
    assert run.code == code
    assert words in run.err
    assert "Traceback" not in run.err
    if code == 1:
        assert run.err.startswith("dsv4: ")
        assert run.err.count("\n") == 1
        assert run.out == ""


def test_synth_inspect_generate(tmp_path: Path, dsv4: Call) -> None:
    """A checkpoint of our own making goes the whole way."""
    out = str(tmp_path / "X")
    assert dsv4("synth", "--config", "tiny-pro", "--out", out, "--seed", "3").code == 0
    assert "ratio 128: 4" in dsv4("inspect", out).out
    run = dsv4("generate", out, "-p", "hi", "--max-tokens", "8")
    assert run.code == 0
    assert "stopped by" in run.err


def test_what_cannot_fit_is_refused_before_it_is_read(monkeypatch: pytest.MonkeyPatch, dsv4: Call) -> None:
    monkeypatch.setattr("os.sysconf", lambda name: 1000)
    run = dsv4("generate", "-p", FRANCE)
    assert run.code == 1
    assert "does not fit into memory" in run.err


@pytest.mark.parametrize(
    ("file", "change", "words"),
    [
        ("generation_config.json", {"do_sample": True, "temperature": "hot"}, "temperature"),
        ("generation_config.json", {"do_sample": True, "top_k": 50.5}, "top_k"),
        ("generation_config.json", {"do_sample": True, "temperature": -1}, "temperature"),
        ("config.json", {"eos_token_id": 5}, "eos_token_id"),
        ("config.json", {"sliding_window": 10**9}, "at most"),
    ],
)
def test_a_directory_that_contradicts_itself_is_refused(
    file: str, change: dict[str, object], words: str, tmp_path: Path, pico_dir: Path, dsv4: Call
) -> None:
    model = tmp_path / "model"
    shutil.copytree(pico_dir, model)
    (model / file).write_text(json.dumps(json.loads((model / file).read_text()) | change))
    run = dsv4("generate", str(model), "-p", FRANCE)
    assert run.code == 1
    assert words in run.err.splitlines()[-1]


def test_a_recommendation_that_is_null_is_none(tmp_path: Path, pico_dir: Path, dsv4: Call) -> None:
    model = tmp_path / "model"
    shutil.copytree(pico_dir, model)
    (model / "generation_config.json").write_text('{"temperature": null, "top_k": null}')
    assert dsv4("generate", str(model), "-p", FRANCE, "--max-tokens", "2", "--quiet").code == 0


@pytest.mark.parametrize("verb", ["compare --json", "study formats --json", "eval --json", "bench ops --out"])
def test_where_nothing_can_be_written_no_work_is_done(verb: str, tmp_path: Path, dsv4: Call) -> None:
    for path in (tmp_path / "gone" / "x.json", tmp_path):
        done = dsv4(*verb.split(), str(path))
        assert (done.code, done.out) == (1, "")
        assert f"cannot write there; got {path}; wanted" in done.err


@pytest.mark.slow
def test_with_no_standard_output_the_answer_goes_nowhere() -> None:
    command = f"{sys.executable} -m dsv4.cli.main generate -p hi -q --max-tokens 3 >&-"
    done = subprocess.run(command, shell=True, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_version_is_an_option_as_well(dsv4: Call) -> None:
    assert dsv4("--version").out == dsv4("version").out


def test_without_a_verb_there_is_help(dsv4: Call) -> None:
    assert "generate" in dsv4().out


def test_a_usage_error_and_the_version_do_not_wait_for_torch() -> None:
    code = "import sys, dsv4.cli.main; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_weights_are_not_deleted_for_a_write_that_cannot_fit(tmp_path: Path, dsv4: Call) -> None:
    out = tmp_path / "X"
    assert dsv4("synth", "--out", str(out)).code == 0
    before = sorted(path.name for path in out.iterdir())
    run = dsv4("synth", "--config", "pro", "--out", str(out), "--overwrite")
    assert run.code == 1
    assert "free space" in run.err
    assert sorted(path.name for path in out.iterdir()) == before
