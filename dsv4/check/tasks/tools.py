"""Calling tools: which one, with which arguments, when not to, and what to say once the result is there."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from random import Random
from typing import Any

from dsv4.chat.events import Completion
from dsv4.check.tasks import facts, talk, words
from dsv4.check.tasks.item import Family, Item
from dsv4.check.tasks.parts import keeping
from dsv4.check.tasks.phrasing import Message, ask, asked, listed, says, short
from dsv4.check.tasks.story_grammar import articles
from dsv4.check.tasks.toolbox import SLOT, Arguments, Use, offered, pool, use, value

# Where a wish has a second tool that could do: without them all it cannot be fulfilled.
RELATED = {
    "get_weather": ("get_weather", "get_forecast", "web_search"),
    "get_forecast": ("get_weather", "get_forecast", "web_search"),
    "get_news": ("get_news", "web_search"),
    "get_score": ("get_score", "web_search", "get_news"),
    "get_recipe": ("get_recipe", "web_search"),
    "get_population": ("get_population", "web_search"),
    "get_stock_price": ("get_stock_price", "web_search"),
    "find_film": ("find_film", "web_search"),
    "web_search": ("web_search", "get_news"),
    "send_email": ("send_email", "send_message"),
    "send_message": ("send_message", "send_email", "call_contact"),
    "call_contact": ("call_contact", "send_message"),
    "set_alarm": ("set_alarm", "add_reminder", "set_timer"),
    "set_timer": ("set_timer", "set_alarm", "add_reminder"),
    "add_event": ("add_event", "add_reminder", "create_note"),
    "add_reminder": ("add_reminder", "add_event", "create_note"),
    "translate": ("translate", "lookup_word"),
    "lookup_word": ("lookup_word", "translate", "web_search"),
    "find_flight": ("find_flight", "web_search"),
    "get_train": ("get_train", "web_search"),
    "get_distance": ("get_distance", "web_search"),
    "set_light": ("set_light", "switch_device"),
    "calculate": ("calculate", "convert_units"),
}


def said(arguments: Arguments) -> str:
    """The arguments as a person would list them."""
    return listed([f"{key} {json.dumps(each) if isinstance(each, bool) else each}" for key, each in arguments.items()])


def thought(uses: Sequence[Use], tools: Sequence[Mapping[str, Any]]) -> str:
    """The reasoning that leads to the calls: what is wanted, what there is, what fits.

    It names all tools before it says which: who decides without having looked refuses what could be done.
    """
    calls = "; ".join(f"{one.tool} with {said(one.arguments)}" for one in uses)
    return f"{_looked([one.tool for one in uses], tools)} I call {calls}."


def _looked(wanted: Sequence[str], tools: Sequence[Mapping[str, Any]]) -> str:
    wants = listed([pool()[name]["wants"] for name in wanted])
    return f"The user wants {wants}. Tools: {', '.join(tool['function']['name'] for tool in tools)}."


def wish(one: Use, random: Random) -> str:
    """What the user says who wants this call."""
    return articles(ask(one.question, random, **one.arguments))


# --- the families -------------------------------------------------------------------------------------------------


def make_call(random: Random, thinking: bool, size: int) -> Item:
    """One call, out of one to four tools."""
    one = use(random.choice(list(pool())), random)
    return _calling("tool_call", [one], wish(one, random), random, thinking)


def _parts(uses: Sequence[Use]) -> Mapping[str, Any]:
    """The calls of an item by family and key, for the split."""
    return {"parts": [("tool_call", one.key) for one in uses]}


JOINTS = (
    "{first} {second}",
    "{first} Also: {second}",
    "{first} And then: {second}",
    "Two things. {first} {second}",
    "I have two wishes. {first} {second}",
    "{first} After that: {second}",
    "First: {first} Second: {second}",
    "Please do both. {first} {second}",
    "1. {first} 2. {second}",
    "{first}\n{second}",
)


def make_parallel(random: Random, thinking: bool, size: int) -> Item:
    """Two calls in one answer, of one tool or of two."""
    name = random.choice(list(pool()))
    other = name if random.random() < 0.3 else random.choice([tool for tool in pool() if tool != name])
    first, second = use(name, random), use(other, random)
    while second.key == first.key:
        second = use(other, random)
    texts = {which: _ended(one) for which, one in (("first", first), ("second", second))}
    return _calling("tool_parallel", [first, second], random.choice(JOINTS).format(**texts), random, thinking)


def _ended(one: Use) -> str:
    text = articles(one.question.format(**one.arguments))
    return text if text.endswith((".", "?", "!")) else text + "."


def _calling(family: str, uses: list[Use], question: str, random: Random, thinking: bool) -> Item:
    calls = tuple((one.tool, one.arguments) for one in uses)
    tools = offered([one.tool for one in uses], random)
    return Item(
        family, " & ".join(one.key for one in uses), asked(question, random), "",
        thought(uses, tools) if thinking else "", calls, thinking, tools=tools, wanted=calls, facts=_parts(uses),
    )  # fmt: skip


def judge_calls(item: Item, completion: Completion) -> bool:
    """The wanted calls and no others, whole, in any order, with equal arguments."""
    if completion.problems or not all(call.complete for call in completion.calls):
        return False
    made = [(call.name, _parsed(call.arguments)) for call in completion.calls]
    wanted = [(name, dict(arguments)) for name, arguments in item.wanted]
    return len(made) == len(wanted) and all(_same(made, call) == _same(wanted, call) for call in wanted)


def _same(calls: Sequence[tuple[str, Any]], wanted: tuple[str, Any]) -> int:
    """How many of `calls` are this one."""
    return sum(name == wanted[0] and _equal(arguments, wanted[1]) for name, arguments in calls)


def _equal(made: Any, wanted: Arguments) -> bool:
    """Equal by name and value: 2.0 is 2, but `true` is not 1."""
    if not isinstance(made, dict) or made.keys() != wanted.keys():
        return False
    return all(
        made[key] == wanted[key] and isinstance(made[key], bool) == isinstance(wanted[key], bool) for key in wanted
    )


def _parsed(arguments: str) -> Any:
    try:
        return json.loads(arguments)
    except (ValueError, RecursionError):
        return None


NO_TOOL = (
    "I have no tool for that.",
    "None of my tools can do that.",
    "I cannot do that with the tools that I have.",
    "Sorry, I have no tool for that.",
)
THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
REFUSAL = re.compile(r"\bno tool|none of my tools|\bcannot\b|\bcan't\b", re.IGNORECASE)


def make_none(random: Random, thinking: bool, size: int) -> Item:
    """Tools are offered, but the question needs none of them, or one that is not there."""
    return (_no_need if random.random() < 0.6 else _no_tool)(random, thinking)


PLAIN = {
    **words.FAMILIES,
    "talk": talk.FAMILIES["talk"],
    "capital": facts.FAMILIES["capital"],
}  # what can be asked that needs no tool


def _no_need(random: Random, thinking: bool) -> Item:
    asked_for = PLAIN[random.choice(list(PLAIN))].make(random, thinking, 0)
    return replace(
        asked_for, family="tool_none", key=f"{asked_for.family}/{asked_for.key}", tools=offered([], random),
        reasoning=f"No tool is needed. {asked_for.reasoning}" if thinking else "",
        wanted=(asked_for.family, asked_for.wanted), facts={"parts": [(asked_for.family, asked_for.key)]},
    )  # fmt: skip


def _no_tool(random: Random, thinking: bool) -> Item:
    one = use(random.choice(list(pool())), random)
    tools = offered([], random, without=RELATED.get(one.tool, (one.tool,)))
    question = asked(wish(one, random), random)
    why = f"{_looked([one.tool], tools)} None does that." if thinking else ""
    answer = random.choice(NO_TOOL)
    return Item("tool_none", one.key, question, answer, why, (), thinking, tools=tools, facts={"parts": []})


def judge_none(item: Item, completion: Completion) -> bool:
    """A right answer without a call, or the statement that no tool can do it."""
    if not short(completion):
        return False
    if item.wanted is None:
        return bool(REFUSAL.search(completion.content))
    family, wanted = item.wanted
    return PLAIN[family].judge(replace(item, family=family, wanted=wanted), completion)


def make_result(random: Random, thinking: bool, size: int) -> Item:
    """The call is made and answered; the answer has to be told."""
    one = use(random.choice(list(pool())), random)
    tool = pool()[one.tool]
    result = {key: value(kind, random) for key, kind in tool["result"].items()}
    known = {**one.arguments, **result}
    answer = random.choice([text for text in tool["answers"] if set(SLOT.findall(text)) <= set(known)])
    values = [str(result[key]) for key in SLOT.findall(answer) if key in result]
    tools = offered([one.tool], random)
    messages = (
        *asked(wish(one, random), random),
        _call_message(one, thought([one], tools) if thinking else "", random),
    )
    return Item(
        "tool_result", f"{one.key} {json.dumps(result)}", _with_result(messages, result),
        _capital(answer.format(**known)),
        f"The result says {said(result)}." if thinking else "", (), thinking,
        tools=tools, wanted=tuple(values), facts=_parts([one]),
    )  # fmt: skip


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _call_message(one: Use, reasoning: str, random: Random) -> Message:
    function = {"name": one.tool, "arguments": json.dumps(one.arguments, ensure_ascii=False)}
    call = {"id": f"call_{random.randint(0, 9999)}", "type": "function", "function": function}
    message: Message = {"role": "assistant", "content": "", "tool_calls": [call]}
    return message | ({"reasoning_content": reasoning} if reasoning else {})


def _with_result(messages: tuple[Message, ...], result: Arguments) -> tuple[Message, ...]:
    call = messages[-1]["tool_calls"][0]
    return (*messages, {"role": "tool", "tool_call_id": call["id"], "content": json.dumps(result)})


def judge_result(item: Item, completion: Completion) -> bool:
    """The values of the result that matter, in a sentence and not as JSON."""
    content = THOUSANDS.sub("", completion.content)
    return short(completion) and "{" not in content and says(content, *item.wanted)


FAMILIES: dict[str, Family] = {
    "tool_call": Family(make_call, judge_calls),
    "tool_parallel": Family(keeping(make_parallel), judge_calls),
    "tool_none": Family(keeping(make_none), judge_none),
    "tool_result": Family(keeping(make_result), judge_result),
}
