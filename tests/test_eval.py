"""Scores mean what they say: which items are asked, what counts as right, how sure that makes us, and what is shown."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from random import Random

import pytest
import torch

from dsv4.chat.events import Completion
from dsv4.check import answers, evaluate
from dsv4.check.answers import Answer, Ask, Result, Said, Share, ask, judged, say, splits, together
from dsv4.check.evaluate import Part, dealt, grouped, shared_out
from dsv4.check.evaluate_report import failed, judged_bars
from dsv4.check.questions import Question, Voice, modes, questions, rows, stretches
from dsv4.check.score import Row, Score, wilson
from dsv4.check.tasks.item import Family, Item
from dsv4.config import EngineOptions, ModelConfig
from dsv4.llm import LLM
from tests import PICO
from tests.evaluations import evaluation, plan_of, row_of

KEYS = 400
SCHEMA = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object"}}}


def echo(random: Random, thinking: bool, size: int) -> Item:
    """Say a number back, in a few words."""
    number = random.randrange(KEYS)
    asked = random.choice(("Say {}.", "Please say {}.")).format(number)
    reasoning = "Say it." if thinking else ""
    return Item(
        "echo", str(number), ({"role": "user", "content": asked},), str(number), reasoning, thinking=thinking,
        wanted=str(number), facts={"digits": len(str(number)), "place": number / KEYS, "more": (1,)},
    )  # fmt: skip


def long_echo(random: Random, thinking: bool, size: int) -> Item:
    item = echo(random, thinking, size)
    text = "so it goes " * (size // 11) + str(item.messages[0]["content"])
    return replace(item, family="long_echo", messages=({"role": "user", "content": text},))


def says_it(item: Item, completion: Completion) -> bool:
    return completion.content == str(item.wanted)


def plain_only(random: Random, thinking: bool, size: int) -> Item:
    return echo(random, False, size)


def with_schema(random: Random, thinking: bool, size: int) -> Item:
    return replace(echo(random, thinking, size), response_format=SCHEMA)


ECHO = Family(echo, says_it)
LONG_ECHO = Family(long_echo, says_it)


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM.load(PICO, EngineOptions(max_sequences=4, draft_tokens=1))


@pytest.fixture(scope="module")
def voice(llm: LLM) -> Voice:
    return Voice(llm.dialect, llm.tokenizer)


def question(thinking: bool = False, number: int = 7) -> Question:
    item = replace(echo(Random(number), thinking, 0), wanted="7")
    return Question(item, (0, 1, 2, 3, 4), 40, thinking)


# --- what is asked -------------------------------------------------------------------------------------------------


def test_rows_are_families_by_modes_by_lengths() -> None:
    families = {"echo": ECHO, "long_echo": LONG_ECHO, "plain": Family(plain_only, says_it)}
    assert modes(families["plain"]) == [False]
    assert not stretches(ECHO)
    assert rows(families, (64, 128)) == [
        Row("echo", True),
        Row("echo", False),
        *(Row("long_echo", thinking, context) for thinking in (True, False) for context in (64, 128)),
        Row("plain", False),
    ]


def test_items_are_held_out_different_and_the_same_for_a_seed(voice: Voice) -> None:
    asked = questions(Row("echo", True), ECHO, voice, 20, 5)
    assert len({q.item.key for q in asked}) == 20
    assert all(q.item.held_out and q.in_reasoning and q.item.thinking for q in asked)
    assert asked == questions(Row("echo", True), ECHO, voice, 20, 5)
    assert [q.item.key for q in asked] != [q.item.key for q in questions(Row("echo", True), ECHO, voice, 20, 6)]
    plain = questions(Row("echo", False), ECHO, voice, 20, 5)
    assert [q.item.key for q in asked] == [q.item.key for q in plain]  # both modes answer the same
    assert not any(q.in_reasoning for q in plain)


@pytest.mark.slow
def test_a_family_with_few_keys_is_asked_in_other_words_and_never_the_same_twice(voice: Voice) -> None:
    held_out = sum(Item("echo", str(number), (), "").held_out for number in range(KEYS))
    asked = questions(Row("echo", False), ECHO, voice, 200, 0)
    assert len({q.item.key for q in asked}) == held_out < 100
    assert len({q.prompt for q in asked}) == len(asked) == 2 * held_out  # both phrasings of every key
    assert len({q.item.key for q in asked[:held_out]}) == held_out


def test_a_long_prompt_fills_its_context_and_no_more(voice: Voice) -> None:
    lengths = [len(q.prompt) for q in questions(Row("long_echo", True, 700), LONG_ECHO, voice, 12, 0)]
    assert len(lengths) == 12
    assert 0.9 * 700 < min(lengths) <= max(lengths) <= 700
    assert len({length % 4 for length in lengths}) == 4


def test_a_prompt_that_came_out_too_long_is_not_asked(voice: Voice) -> None:
    unsteady = Family(lambda r, thinking, size: long_echo(r, thinking, int(size * r.choice((1, 1.5)))), says_it)
    lengths = [len(q.prompt) for q in questions(Row("long_echo", True, 300), unsteady, voice, 12, 0)]
    assert len(lengths) == 12
    assert max(lengths) <= 300


def test_the_limit_grows_with_the_reference_answer(voice: Voice) -> None:
    item = echo(Random(0), True, 0)
    short, long = voice.question(item), voice.question(replace(item, reasoning=item.reasoning * 50))
    assert 32 < short.limit < 60 < 5 * short.limit < long.limit


# --- what is right -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("thinking", "text", "finish", "right"),
    [
        (False, "7", "stop", True),
        (False, "8", "stop", False),
        (False, "7", "length", False),
        (False, "7", "context", False),
        (False, "7", "role_token", False),
        (True, "It is 7.</think>7", "stop", True),
        (True, "7", "stop", False),  # never left its reasoning
        (False, "", "stop", False),
    ],
)
def test_an_answer_is_right_if_it_is_judged_so_and_ended_by_itself(
    thinking: bool, text: str, finish: str, right: bool
) -> None:
    answer = judged(question(thinking), ECHO, Said(text, 3, finish))
    assert answer.right == right
    assert (answer.text, answer.tokens, answer.finish, answer.prompt_tokens) == (text, 3, finish, 5)


@pytest.mark.parametrize("offered", [True, False])
def test_a_tool_call_counts_only_where_tools_were_offered(offered: bool) -> None:
    call = '<｜DSML｜tool_calls>\n<｜DSML｜invoke name="f">\n</｜DSML｜invoke>\n</｜DSML｜tool_calls>'
    family = Family(echo, lambda item, completion: [c.name for c in completion.calls] == ["f"])
    asked = question()
    tools = ({"type": "function", "function": {"name": "f", "parameters": {}}},) if offered else ()
    asked = replace(asked, item=replace(asked.item, tools=tools))
    assert judged(asked, family, Said(call, 9, "stop")).right == offered


def test_facts_that_are_no_plain_values_are_left_out() -> None:
    assert set(judged(question(), ECHO, Said("7", 1, "stop")).facts) == {"digits", "place"}


def reference(voice: Voice, wrong: int = 0) -> Callable[..., list[Said]]:
    """A model that knows every answer but the first few."""

    def told(engine: object, asked: list[Question]) -> list[Said]:
        texts = ["no" if n < wrong else q.item.content for n, q in enumerate(asked)]
        return [Said(q.in_reasoning * "x</think>" + text, 3, "stop") for q, text in zip(asked, texts, strict=True)]

    return told


def test_a_planted_wrong_answer_and_a_planted_wrong_judge_lower_the_score(
    llm: LLM, voice: Voice, monkeypatch: pytest.MonkeyPatch
) -> None:
    def score(family: Family) -> Score:
        return ask(llm, [Ask(Row("echo", True), family, 10)], 0).results[0].score

    monkeypatch.setattr(answers, "say", reference(voice))
    assert score(ECHO) == Score(10, 10)
    strict_judge = Family(echo, lambda item, completion: says_it(item, completion) and int(item.key) % 2 == 0)
    odd = sum(int(q.item.key) % 2 for q in questions(Row("echo", True), strict_judge, voice, 10, 0))
    assert odd
    assert score(strict_judge) == Score(10 - odd, 10)
    monkeypatch.setattr(answers, "say", reference(voice, wrong=3))
    assert score(ECHO) == Score(7, 10)


def test_the_embedded_model_answers_the_same_alone_and_in_company(llm: LLM, voice: Voice) -> None:
    asked = questions(Row("echo", False), ECHO, voice, 3, 0)
    together = say(llm.engine, asked)
    assert together == [say(llm.engine, [q])[0] for q in asked]
    assert all(told.tokens <= q.limit for told, q in zip(together, asked, strict=True))


def test_what_cannot_be_asked_is_said_and_not_skipped(llm: LLM, voice: Voice, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "say", reference(voice))
    asked = [
        Ask(Row("schema", False), Family(with_schema, says_it), 2),
        Ask(Row("echo", False), ECHO, 2),
        Ask(Row("long_echo", False, 5000), LONG_ECHO, 1),
    ]
    schema, plain, too_long = ask(llm, asked, 0).results
    assert "response-format" in str(schema.why)
    assert schema.score == Score(0, 0)
    assert plain.why is None
    assert plain.score == Score(2, 2)
    assert "leaves no room" in str(too_long.why)


@pytest.mark.parametrize("of", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_shares_put_together_are_the_whole(llm: LLM, of: int) -> None:
    """The second row has fewer items than there are shares, the others cannot be asked."""
    wanted = [
        Ask(Row("schema", False), Family(with_schema, says_it), 2),
        Ask(Row("echo", True), ECHO, 7),
        Ask(Row("echo", False), ECHO, 1),
        Ask(Row("long_echo", False, 5000), LONG_ECHO, 2),
    ]
    whole = ask(llm, wanted, 0)
    shares = [ask(llm, wanted, 0, Share(n, of)) for n in range(of)]
    assert [len(share.results[1].answers) for share in shares] == {2: [4, 3], 3: [3, 2, 2]}[of]
    found = together(shares)
    assert found.seconds == max(share.seconds for share in shares)
    assert found.draft.n > 0
    assert found._replace(seconds=whole.seconds) == whole
    assert together(shares[::-1]).results != whole.results  # planted: an order that is lost shows


def test_splits_by_length_by_value_and_by_quarter() -> None:
    given = [
        Answer("k", length, "", 1, "stop", length != 5, {"depth": depth, "digits": 2, "size": length * 1.5})
        for length, depth in ((4, 0.0), (5, 0.24), (8, 0.25), (10, 1.0))
    ]
    assert splits(given)["prompt_mod_4"] == {"0": Score(2, 2), "1": Score(0, 1), "2": Score(1, 1)}
    assert splits(given)["depth"] == {
        "0.0 to 0.25": Score(1, 2),
        "0.25 to 0.5": Score(1, 1),
        "0.75 to 1.0": Score(1, 1),
    }
    assert splits(given)["digits"] == {"2": Score(3, 4)}


# --- the whole -----------------------------------------------------------------------------------------------------


def test_short_rows_are_asked_together_until_the_engine_is_busy() -> None:
    rows = [Row(name, True) for name in "abcde"] + [Row("f", True, 1024)]
    few = plan_of(rows, items=6, long_items=1, options=EngineOptions(max_sequences=8))
    assert [[row.family for row in group] for group in grouped(few)] == [["a", "b", "c"], ["d", "e", "f"]]
    many = plan_of(rows, items=200, long_items=200, options=EngineOptions(max_sequences=8))
    assert grouped(many) == [(row,) for row in rows]


@pytest.mark.parametrize(
    ("jobs", "items", "shares"),
    [(1, 500, 1), (2, 500, 1), (3, 500, 2), (4, 500, 2), (8, 500, 4), (9, 500, 5), (600, 40, 40)],
)
def test_rows_are_shared_out_where_there_are_more_processes_than_groups(jobs: int, items: int, shares: int) -> None:
    needles = [Row("needle", thinking, 8192) for thinking in (True, False)]
    plan = plan_of(needles, items=1, long_items=items, options=EngineOptions(max_sequences=16))
    assert shared_out(plan, jobs) == [[Part((row,), share=Share(n, shares)) for n in range(shares)] for row in needles]


def test_no_share_is_empty() -> None:
    plan = plan_of(
        [Row("a", True), Row("b", True, 1024)], items=2, long_items=3, options=EngineOptions(max_sequences=8)
    )
    assert [len(shares) for shares in shared_out(plan, 8)] == [3]
    assert shared_out(plan_of([]), 8) == []


@pytest.mark.parametrize(
    ("device", "gpus", "each"),
    [
        ("cuda", 3, ["cuda:0", "cuda:1", "cuda:2", "cuda:0", "cuda:1"]),
        ("cuda", 1, ["cuda"] * 5),
        ("cuda:1", 3, ["cuda:1"] * 5),
        ("cpu", 3, ["cpu"] * 5),
    ],
)
def test_processes_are_dealt_out_to_the_gpus(
    device: str, gpus: int, each: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert dealt(device, 5) == each


def test_a_process_loads_its_model_on_the_device_dealt_to_it(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[EngineOptions] = []
    monkeypatch.setattr(LLM, "load", lambda model, options, dialect: loaded.append(options) or llm)
    monkeypatch.setattr(evaluate, "work", lambda *_: None)
    monkeypatch.setattr(evaluate, "_device", "")
    monkeypatch.setattr(evaluate.gc, "freeze", lambda: None)
    plan = plan_of([], options=EngineOptions(device="cuda", max_sequences=3))
    devices = get_context("spawn").SimpleQueue()
    devices.put("cuda:1")
    evaluate._settle(devices)
    for _ in range(2):
        evaluate._apart(plan, Part())
    assert loaded == [replace(plan.options, device="cuda:1")]


def test_bars_are_met_not_met_not_measured_or_cannot_be_asked() -> None:
    needles = [Row("needle", thinking, 8192) for thinking in (True, False)]
    tools = [Row("tool_call", thinking) for thinking in (True, False)]
    found = evaluation(
        (
            row_of(200, 200, Row("capital", True)),
            row_of(150, 200, Row("add", True)),
            row_of(200, 200, needles[0]),
            row_of(180, 200, needles[1]),
            row_of(200, 200, tools[0]),
            Result(tools[1], why="no template"),
        ),
        Score(40, 50),
    )
    said = {judged.bar.name: (judged.verdict, judged.lower) for judged in judged_bars(found)}
    assert [verdict for verdict, _ in said.values()] == [
        "met", "not met", "cannot be asked", "not met", "not measured", "met",
    ]  # fmt: skip
    assert said["needle at 8K"][1] == wilson(180, 200)[0]
    assert said["needle at 32K"][1] is None
    assert failed(found)
    assert not failed(evaluation([row_of(200, 200, Row("capital", True))], Score(40, 50)))


def test_options_fit_the_longest_row_and_the_draft(pico_dir: Path) -> None:
    config = ModelConfig.load(pico_dir)
    fitted = evaluate.options_for(config, [Row("needle", True, 32768), Row("echo", True)], EngineOptions())
    assert fitted.max_context == 32768 + evaluate.ANSWER_ROOM
    assert fitted.draft_tokens == 1
    assert evaluate.options_for(config, [Row("echo", True)], EngineOptions()).max_context == evaluate.SHORT_PROMPTS
    assert evaluate.options_for(replace(config, num_nextn_predict_layers=0), [], EngineOptions()).draft_tokens == 0
    short = replace(config, max_position_embeddings=5000)
    assert evaluate.options_for(short, [Row("n", True, 8192)], EngineOptions()).max_context == 5000
