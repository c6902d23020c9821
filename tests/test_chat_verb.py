"""`dsv4 chat`: through pipes and at a terminal; what is kept, replayed, saved and refused."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from dsv4.chat.events import collect
from dsv4.chat.replay import replay
from dsv4.cli import chat_talk
from dsv4.cli.chat import converse
from dsv4.cli.chat_commands import COMMANDS, Chat, run
from dsv4.cli.chat_input import read_message
from dsv4.cli.chat_local import Local
from dsv4.cli.chat_talk import Talk
from dsv4.cli.chat_turn import Turn
from dsv4.cli.main import main
from dsv4.config import EngineOptions
from dsv4.engine.request import Sampling
from dsv4.errors import DSV4Error, PromptError
from dsv4.llm import LLM
from tests import PICO
from tests.terminal import Terminal

FRANCE, JAPAN = "What is the capital of France?", "What is the capital of Japan?"
PARIS, TOKYO = "The capital of France is Paris.", "The capital of Japan is Tokyo."


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM.load(PICO, EngineOptions(max_context=256))


class Said:
    """One conversation over lines of input; `prompts` and `sampled` are the ids of each request and its answer."""

    def __init__(self, llm: LLM, capsys: pytest.CaptureFixture[str], sampling: Sampling, *lines: str) -> None:
        self.prompts: list[list[int]] = []
        self.sampled: list[list[int]] = []
        self.session = Chat(Talk(), Local(llm, sampling))
        given = iter(lines)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(llm, "generate", self._watched(llm.generate))
            patch.setattr("sys.stdin", io.StringIO())
            self.well = converse(self.session, lambda prompt: next(given, None), Console(stderr=True, soft_wrap=True))
        self.out, self.err = capsys.readouterr()

    def _watched(self, generate: Callable[..., Any]) -> Callable[..., Any]:
        def watched(ids: list[int], sampling: Sampling) -> Iterator[Any]:
            deltas = generate(ids, sampling)  # refuses at once, or not at all
            self.prompts.append(list(ids))
            self.sampled.append([])
            return self._noted(deltas)

        return watched

    def _noted(self, deltas: Iterator[Any]) -> Iterator[Any]:
        for delta in deltas:
            self.sampled[-1].append(delta.token)
            yield delta


Talking = Callable[..., Said]


@pytest.fixture
def say(llm: LLM, capsys: pytest.CaptureFixture[str]) -> Talking:
    def said(*lines: str, **sampling: Any) -> Said:
        return Said(llm, capsys, Sampling(**{"temperature": 0, "max_tokens": 60, **sampling}), *lines)

    return said


# --- history and its ids --------------------------------------------------------------------------------------------


def test_answers_go_to_stdout_and_all_else_to_stderr(say: Talking) -> None:
    said = say(FRANCE, "/nothink", JAPAN)
    assert said.out == f"{PARIS}\n{TOKYO}\n"
    assert "The user asks for the capital of France." in said.err
    assert "The user asks for the capital of Japan." not in said.err
    assert len(re.findall(r"\d+ \+ \d+ tokens, first after .* tokens/s; ended by end of sentence", said.err)) == 2
    assert said.well


def test_the_second_prompt_begins_with_the_very_ids_that_were_sampled(say: Talking, llm: LLM) -> None:
    """At a temperature where the model spells in ways in which the tokenizer would not."""
    tried = (say("/nothink", "Tell me a story.", JAPAN, temperature=3, max_tokens=12, seed=n) for n in range(30))

    def shows_something(spelt: list[int]) -> bool:
        """It did not end in a token of a role, and is not what the tokenizer would make of its text."""
        return len(spelt) == 12 and llm.tokenizer.encode_text(llm.tokenizer.decode(spelt)) != spelt

    said = next(said for said in tried if shows_something(said.sampled[0]))
    (first, second), spelt = said.prompts, said.sampled[0]
    assert second[: len(first) + len(spelt) + 1] == [*first, *spelt, llm.tokenizer.eos_id]


def test_a_prompt_begins_with_the_whole_of_the_turn_before(say: Talking) -> None:
    said = say("/nothink", FRANCE, JAPAN, FRANCE)
    for before, sampled, prompt in zip(said.prompts, said.sampled, said.prompts[1:], strict=False):
        assert prompt[: len(before) + len(sampled)] == before + sampled


def test_old_reasoning_is_left_out_and_the_answer_replayed(say: Talking, llm: LLM) -> None:
    said = say(FRANCE, JAPAN)
    end, mark = llm.tokenizer.control_id("<｜Assistant｜>"), llm.tokenizer.control_id("</think>")
    first, second = said.prompts
    sampled = said.sampled[0]
    answer = sampled[sampled.index(mark) :]  # the mark as well: it is what opens an old answer
    start = first.index(end) + 1
    assert second[: start + len(answer)] == first[:start] + answer


def test_ids_that_do_not_spell_the_text_are_not_used(llm: LLM) -> None:
    tokenizer = llm.tokenizer
    messages = [{"role": role, "content": text} for role, text in (("user", "a"), ("assistant", "bc"), ("user", "d"))]
    pieces = llm.prompt(messages, thinking=False).pieces
    plain = tokenizer.encode_prompt(pieces)
    letters = [*tokenizer.encode_text("b"), *tokenizer.encode_text("c")]
    unknown = next(id for id in range(tokenizer.size, tokenizer.size + 9) if not tokenizer.token_bytes(id))
    assert plain.count(tokenizer.eos_id) == 1
    for ids in ([], [5], [*letters, 5], [*letters, unknown], [tokenizer.eos_id]):
        assert replay(pieces, [ids], tokenizer) == plain
    at = plain.index(tokenizer.eos_id)
    width = len(tokenizer.encode_text("bc"))
    for ids in (
        letters,
        [*letters, tokenizer.eos_id],
        [*letters, tokenizer.bos_id],
        [7, tokenizer.control_id("</think>"), *letters],
    ):
        assert replay(pieces, [ids], tokenizer) == plain[: at - width] + letters + plain[at:]


def test_the_system_message_and_clear(say: Talking, llm: LLM) -> None:
    said = say("/system Be brief.", "/nothink", FRANCE, "/clear", JAPAN, "/system", "/clear", JAPAN)
    texts = [llm.tokenizer.decode(prompt) for prompt in said.prompts]
    assert ["Be brief." in text for text in texts] == [True, True, False]
    assert ["France" in text for text in texts] == [True, False, False]


# --- what does not fit, what is stopped -----------------------------------------------------------------------------


def test_what_no_longer_fits_is_said_and_not_kept(say: Talking) -> None:
    said = say("/nothink", FRANCE, "word " * 240, JAPAN)
    assert not said.well
    assert said.out == f"{PARIS}\n{TOKYO}\n"
    assert "does not fit into the context any more" in said.err
    assert "/clear begins anew" in said.err
    assert len(said.prompts) == 2


def test_an_answer_that_fills_the_context_is_named(say: Talking) -> None:
    runs = (say("/nothink", "word " * 240, temperature=3, max_tokens=4096, seed=n) for n in range(10))
    assert any("ended by --max-context: /clear begins anew" in said.err for said in runs)


def test_a_stopped_answer_leaves_nothing_running(llm: LLM) -> None:
    turn, talk = Turn(), Talk(thinking=False)
    events = list(Local(llm, Sampling(temperature=0)).answer(talk, FRANCE, turn, lambda: len(turn.ids) == 4))
    assert len(turn.ids) == 4
    assert PARIS.startswith(collect(events).content)
    assert turn.finish is None
    assert not llm.engine.busy


def test_reasoning_without_an_answer_is_not_kept(say: Talking) -> None:
    said = say(FRANCE, max_tokens=3)
    assert said.session.talk.messages == []
    assert "this turn is not kept" in said.err
    assert "--max-tokens" in said.err


# --- commands -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("/sav x", "did you mean /save?"),
        ("/thnik", "did you mean /think?"),
        ("/xyzzy", "/help lists them"),
        ("/", "/help lists them"),
        ("/effort extreme", "wanted high"),
        ("/save", "needs the name of a file"),
        ("/load nowhere.json", "nowhere.json"),
        ("/quit now", "stands alone"),
    ],
)
def test_a_command_that_is_none_is_told_and_the_chat_goes_on(line: str, words: str, say: Talking) -> None:
    said = say(line, "/nothink", FRANCE)
    assert (said.well, said.out) == (False, PARIS + "\n")
    assert words in said.err


def test_errors_of_a_command_are_ours(llm: LLM) -> None:
    """Whatever a line says: one of our errors or none."""
    session = Chat(Talk(), Local(llm, Sampling()))
    for line in ("/", "//", "/ x", "/\n", "/load", "/load nowhere", "/load /", "/help me", "/clear\nx"):
        with pytest.raises((DSV4Error, OSError), match=r"^[^\n]+$"):
            run(session, line)


def test_help_names_every_command_and_quit_ends(say: Talking) -> None:
    said = say("/help", "/effort", "/effort high", "/quit", FRANCE)
    assert all(f"/{name}" in said.err for name in COMMANDS)
    assert "there are: high" in said.err
    assert (said.out, said.well) == ("", True)


@pytest.mark.slow
def test_a_saved_conversation_goes_on_with_the_same_prompt(say: Talking, tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    wild = {"temperature": 3, "max_tokens": 20}
    begun = say("/system Be brief.", "/nothink", "Tell me a story.", f"/save {file}", JAPAN, **wild)
    tree = json.loads(file.read_text(encoding="utf-8"))
    assert [message["role"] for message in tree["messages"]] == ["system", "user", "assistant"]
    resumed = say(f"/load {file}", JAPAN, f"/save {file}", **wild)
    assert resumed.prompts[0] == begun.prompts[1]
    assert len(chat_talk.load(file).messages) == 4


def test_saving_does_not_overwrite_what_is_no_conversation(tmp_path: Path) -> None:
    file = tmp_path / "notes.json"
    file.write_text('{"mine": 1}', encoding="utf-8")
    with pytest.raises(PromptError, match="choose another name"):
        chat_talk.save(Talk(), file, "m")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.json"]
    assert file.read_text(encoding="utf-8") == '{"mine": 1}'


USER, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}


@pytest.mark.parametrize(
    "tree",
    [
        "not JSON",
        "[" * 100_000,
        [],
        {},
        {"messages": "a"},
        {"messages": [USER]},
        {"messages": [ANSWER, USER]},
        {"messages": [USER, ANSWER], "thinking": "yes"},
        {"messages": [USER, ANSWER], "effort": 3},
        {"messages": [USER, {**ANSWER, "token_ids": [-1]}]},
        {"messages": [USER, {**ANSWER, "token_ids": [True]}]},
        {"messages": [USER, {**ANSWER, "content": None}]},
        {"messages": [{"role": "tool", "content": "a"}, ANSWER]},
        {"messages": [{"role": "system"}, USER, 3]},
    ],
    ids=lambda tree: str(tree)[:50],
)
def test_a_file_that_is_no_conversation_is_one_line(tree: object, tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    file.write_text(tree if isinstance(tree, str) else json.dumps(tree), encoding="utf-8")
    with pytest.raises(PromptError) as caught:
        chat_talk.load(file)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("tree", [{"messages": []}, {"messages": [{"role": "system", "content": "s"}, USER, ANSWER]}])
def test_messages_of_others_are_taken(tree: object, tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    file.write_text(json.dumps(tree), encoding="utf-8")
    assert len(chat_talk.load(file).messages) in (0, 2)


# --- input ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lines", "messages"),
    [
        (["a", "", "b"], ["a", "", "b"]),
        (["a\\", "b\\", "c", "d"], ["a\nb\nc", "d"]),
        (["a\\"], ["a"]),
        (['"""', "a", "", "b\\", '"""', "c"], ["a\n\nb\\", "c"]),
        (['"""a', 'b"""'], ["a\nb"]),
        (['"""a"""'], ["a"]),
        (['  """a', "b"], ["a\nb"]),
        (["/system \\", "x"], ["/system \nx"]),
        ([], []),
    ],
)
def test_a_message_may_have_several_lines(lines: list[str], messages: list[str]) -> None:
    given = iter(lines)
    assert list(iter(lambda: read_message(lambda prompt: next(given, None)), None)) == messages


def test_a_command_takes_what_follows_on_further_lines() -> None:
    session = Chat(Talk(), None)  # type: ignore[arg-type]
    run(session, "/system \nBe brief.\nBe kind.")
    assert session.talk.system == "Be brief.\nBe kind."


def test_a_script_talks_to_the_embedded_model(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(f"/nothink\n\n{FRANCE}\n{JAPAN}"))
    with pytest.raises(SystemExit) as stop:
        main(["chat"])
    out, err = capsys.readouterr()
    assert (stop.value.code or 0, out) == (0, f"{PARIS}\n{TOKYO}\n")
    assert "numerics  official" in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("nowhere",), "nowhere"),
        (("--effort", "extreme"), "no such effort"),
        (("--temperature", "-1"), "temperature"),
        (("--load", "nowhere.json"), "nowhere.json"),
        (("--url", "localhost:8000"), "wanted http://HOST:PORT"),
        (("--url", "http://127.0.0.1:1"), "cannot be reached"),
    ],
)
def test_a_wrong_start_is_one_line(arguments: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["chat", "--quiet", *arguments])
    out, err = capsys.readouterr()
    assert (stop.value.code, out, err.count("\n")) == (1, "", 1)
    assert words in err


# --- a terminal -----------------------------------------------------------------------------------------------------


def test_ctrl_c_stops_the_answer_and_not_the_chat() -> None:
    """With a model that would go on for long: dimmed reasoning, stopped; Ctrl-C at the prompt; a command; the end."""
    with Terminal("--temperature", "50", "--top-k", "2000") as at:
        assert "Ctrl-D ends the chat" in at.expect("> ")
        at.type("Tell me a story.\n")
        at.expect("story.\r\n\x1b\\[2;3m.{60}")  # dim and italic
        at.type("\x03")
        stopped = at.expect("tokens/s.*> ")
        assert "ended by Ctrl-C" in stopped
        assert "not kept" in stopped
        assert int(re.findall(r"\+ (\d+) tokens", stopped)[0]) < 2000
        at.interrupt("ends the chat.*> ")
        at.type("/quti\n")
        at.expect("did you mean /quit.*> ")
        at.type("/quit\n")
        assert at.process.wait(60) == 0
