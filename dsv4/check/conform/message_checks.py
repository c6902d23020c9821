"""What a case may demand of Anthropic's messages, whole or streamed: the events of a stream must add up to one."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import Any

from dsv4.check.conform.checks import Check, Got, Json, Unclear, Wrong, at, fields, of_schema, ok, parsed, want

STOPS = ("end_turn", "max_tokens", "stop_sequence", "tool_use", "pause_turn", "refusal")
# By kind of block: its fields, and what each delta of it adds to.
BLOCKS: dict[str, dict[str, type]] = {
    "text": {"text": str},
    "thinking": {"thinking": str, "signature": str},
    "tool_use": {"id": str, "name": str, "input": dict},
}
DELTAS = {
    "text": {"text_delta": "text"},
    "thinking": {"thinking_delta": "thinking", "signature_delta": "signature"},
    "tool_use": {"input_json_delta": "partial_json"},
}
CUT = "the answer was cut at max_tokens"


def message(got: Got) -> Json:
    """The message. Wrong if it is none, or if the events of a stream come in another order than the protocol's."""
    ok(got)
    return _added_up(got) if got.streamed else got.tree


def blocks(got: Got, kind: str) -> list[Json]:
    """Its blocks of one kind."""
    return [block for block in at(message(got), "content") if block.get("type") == kind]


def _added_up(got: Got) -> Json:
    """A start, block after block, what changed since the start, an end."""
    events = [event for event in got.chunks if event.get("type") != "ping"]
    kinds = [str(event.get("type")) for event in events]
    want(kinds[:1] == ["message_start"], f"first event {kinds[:1]}", "message_start")
    want(kinds[-1] == "message_stop", f"last event {kinds[-1]}", "message_stop")
    said = dict(at(events[0], "message"))
    empty = said.get("content") == [] and said.get("stop_reason") is None
    want(empty, f"message_start with {said.get('content')}, {said.get('stop_reason')}", "no content and no reason yet")
    changes = list(takewhile(lambda event: event["type"] == "message_delta", reversed(events[:-1])))
    want(changes, f"{kinds[-2:]} at the end", "message_delta and message_stop")
    inner: Sequence[Json] = events[1 : -1 - len(changes)]
    content: list[Json] = []
    while inner:
        block, inner = _block(len(content), inner)
        content.append(block)
    for change in reversed(changes):
        said |= at(change, "delta") | {"usage": at(said, "usage") | at(change, "usage")}
    for block in content:
        if block["type"] == "tool_use":
            block["input"] = _input(block.pop("partial_json"), said.get("stop_reason") == "max_tokens")
    return said | {"content": content}


def _block(index: int, events: Sequence[Json]) -> tuple[Json, Sequence[Json]]:
    """The block that these events begin with, and the events behind it."""
    want(events[0].get("type") == "content_block_start", events[0], f"content_block_start of block {index}")
    want(at(events[0], "index") == index, f"a block with index {events[0]['index']}", f"{index}: no gaps")
    block = dict(at(events[0], "content_block"))
    names = DELTAS.get(str(block.get("type")), {})
    want(names, f"a block of type {block.get('type')!r}", " or ".join(DELTAS))
    block |= {name: block.get(name) or "" for name in names.values()}
    want(not any(block[name] for name in names.values()), block, "a block that begins empty")
    for n, event in enumerate(events[1:], 2):
        want(event.get("index") == index, event, f"events of block {index} until it stops")
        if event.get("type") == "content_block_stop":
            return block, events[n:]
        delta = event.get("delta") or {}
        name = names.get(str(delta.get("type")))
        good = event.get("type") == "content_block_delta" and name is not None
        want(good, event, f"content_block_delta with {' or '.join(names)}")
        want(not block.get("signature"), event, "nothing behind the signature")
        block[str(name)] += at(delta, str(name))
    raise Wrong(f"no end of block {index}", "content_block_stop")


def _input(text: str, cut: bool) -> Json:
    if cut:
        raise Unclear(CUT)
    return parsed(text.encode()) if text else {}


def spoken(got: Got) -> Any:
    """What it says, why it ends and what it counts: names and signatures apart, which may differ each time."""
    said = message(got)
    names = ("id", "signature")
    content = [{name: value for name, value in block.items() if name not in names} for block in said["content"]]
    return content, said["stop_reason"], said["stop_sequence"], input_tokens(got), at(said, "usage.output_tokens")


def input_tokens(got: Got) -> int:
    """Of the whole prompt: those that were cached are told beside the others."""
    usage = at(message(got), "usage")
    cached = ("cache_read_input_tokens", "cache_creation_input_tokens")
    return int(at(usage, "input_tokens")) + sum(usage.get(name) or 0 for name in cached)


def _uncut(got: Got) -> None:
    """Unclear if it was cut: what was asked for may have been in what is missing."""
    if message(got)["stop_reason"] == "max_tokens":
        raise Unclear(CUT)


# --- checks ------------------------------------------------------------------------------------------------------


def formed(got: Got) -> None:
    """A message of the right shape, whose parts fit each other."""
    said = message(got)
    fields(said, {"id": str, "model": str, "content": list, "usage": dict})
    want((said.get("type"), said.get("role")) == ("message", "assistant"), said, "type message, role assistant")
    for block in said["content"]:
        kind = block.get("type")
        want(kind in BLOCKS, f"a block of type {kind!r}", " or ".join(BLOCKS))
        fields(block, BLOCKS[kind])
    reason = said.get("stop_reason")
    want(reason in STOPS, f"stop_reason {reason!r}", " or ".join(STOPS))
    stop = said.get("stop_sequence", 0)
    want((stop is None) == (reason != "stop_sequence"), f"stop_sequence {stop!r}, {reason}", "null, or what stopped it")
    uses = any(block["type"] == "tool_use" for block in said["content"])
    want(uses <= (reason in ("tool_use", "max_tokens")), f"{reason} behind tool_use", "stop_reason tool_use")
    want((reason == "tool_use") <= uses, said["content"], "a tool_use where that is the stop_reason")
    count, most = at(said, "usage.output_tokens"), got.asked["max_tokens"]
    want(type(count) is int and 0 < count <= most, f"{count!r} output_tokens", f"1 to {most}")
    want(input_tokens(got) > 0, said["usage"], "input_tokens above 0")


def ends(*reasons: str) -> Check:
    """It ends for one of these reasons."""

    def check(got: Got) -> None:
        reason = message(got).get("stop_reason")
        want(reason in reasons, f"stop_reason {reason!r}", " or ".join(reasons))

    return check


def stopped(got: Got) -> None:
    """One of stop_sequences ended it, is named and not shown."""
    said, stops = message(got), got.asked["stop_sequences"]
    text = "".join(block["text"] for block in blocks(got, "text"))
    want(not any(stop in text for stop in stops), repr(text), f"a text that ends before any of {stops}")
    if said["stop_reason"] != "stop_sequence" and said["stop_sequence"] is None:
        raise Unclear("the model wrote none of stop_sequences")
    got_both = said["stop_reason"], said["stop_sequence"]
    want(got_both[0] == "stop_sequence" and got_both[1] in stops, got_both, f"stop_sequence and one of {stops}")


def thought(got: Got) -> None:
    """Thinking, signed, before all text. Unclear if there is none."""
    content = message(got)["content"]
    kinds = [block["type"] for block in content]
    if "thinking" not in kinds:
        raise Unclear("the model did not think")
    want(kinds[0] == "thinking" and "thinking" not in kinds[1:], kinds, "one block of thinking before all others")
    want(content[0].get("signature"), "thinking without a signature", "a signature: clients send back no other")


def used(got: Got) -> None:
    """Tools are used, as many as may be, each under a name of its own. Unclear if none is."""
    uses = blocks(got, "tool_use")
    _uncut(got)
    if not uses:
        raise Unclear("the model used no tool")
    want(len({use["id"] for use in uses}) == len(uses), [use["id"] for use in uses], "an id for each tool_use")
    choice = got.asked.get("tool_choice") or {}
    if choice.get("disable_parallel_tool_use"):
        want(len(uses) == 1, f"{len(uses)} tool_use", "one")
    if choice.get("type") in ("any", "tool"):
        names = [tool["name"] for tool in got.asked["tools"]]
        want({use["name"] for use in uses} <= set(names), [use["name"] for use in uses], f"tools of {names}")


def unused(got: Got) -> None:
    """No tool is used."""
    want(not blocks(got, "tool_use"), blocks(got, "tool_use"), "no tool_use")


def held(got: Got) -> None:
    """The text is JSON of the schema that was asked for."""
    _uncut(got)
    of_schema("".join(block["text"] for block in blocks(got, "text")))


def longer(got: Got) -> None:
    """The prompt has more tokens than the one before: what was added is in it."""
    more, less = input_tokens(got), input_tokens(got.earlier)
    want(more > less, f"{more} tokens of input", f"more than the {less} without what was added")


def counted(got: Got) -> None:
    """count_tokens tells what the same request had."""
    ok(got)
    count, had = at(got.tree, "input_tokens"), input_tokens(got.earlier)
    want(type(count) is int and count == had, f"input_tokens {count!r}", f"{had}, as the usage of the same message")


def refused(kind: str, *statuses: int) -> Check:
    """An error in Anthropic's shape, of this type."""

    def check(got: Got) -> None:
        want(got.status in statuses, f"status {got.status}", " or ".join(map(str, statuses)))
        want(got.tree.get("type") == "error", f"type {got.tree.get('type')!r}", "error")
        want(at(got.tree, "error.type") == kind, f"error.type {got.tree['error']['type']!r}", kind)
        fields(at(got.tree, "error"), {"message": str})

    return check
