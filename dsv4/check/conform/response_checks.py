"""What a case may demand of OpenAI's responses, whole or streamed: a stream's events must add up to its last one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dsv4.check.conform.checks import Check, Got, Json, Unclear, at, error, fields, of_schema, ok, parsed, want

ENDS = ("response.completed", "response.incomplete", "response.failed")
ITEMS: dict[str, dict[str, type]] = {
    "message": {"id": str, "status": str, "content": list},
    "reasoning": {"id": str, "summary": list},
    "function_call": {"id": str, "status": str, "call_id": str, "name": str, "arguments": str},
}
# What is spelt out by deltas: the list of the item that the text lies in ("" for the item itself), and its field.
SPELT = {
    "output_text": ("content", "text"),
    "refusal": ("content", "refusal"),
    "reasoning_text": ("content", "text"),
    "reasoning_summary_text": ("summary", "text"),
    "function_call_arguments": ("", "arguments"),
}
PARTS = {"content_part": "content", "reasoning_summary_part": "summary"}
CUT = "the answer was cut at max_output_tokens"


def response(got: Got) -> Json:
    """The response. Wrong if it is none, or if the events of a stream come in another order than the protocol's."""
    ok(got)
    return _added_up(got) if got.streamed else got.tree


def items(got: Got, kind: str) -> list[Json]:
    """Its items of one kind."""
    return [item for item in at(response(got), "output") if item.get("type") == kind]


def text(got: Got) -> str:
    """What its messages say."""
    return "".join(part.get("text", "") for item in items(got, "message") for part in item["content"])


def _added_up(got: Got) -> Json:
    """A response that is empty, the events of each item, the response as it is at its end."""
    events = got.chunks
    numbers = [event.get("sequence_number") for event in events]
    want(numbers == list(range(len(events))), f"sequence_number {numbers[:9]}", "0, 1, 2 and so on")
    kinds = [str(event.get("type")) for event in events]
    begun = 2 if kinds[1:2] == ["response.in_progress"] else 1
    want(kinds[:1] == ["response.created"], f"first event {kinds[:1]}", "response.created")
    for event in events[:begun]:
        said = at(event, "response.status"), at(event, "response.output")
        want(said == ("in_progress", []), f"{event['type']}: {said}", "in_progress, and no output yet")
    want([kind for kind in kinds if kind in ENDS] == kinds[-1:], kinds[-3:], f"once and last {' or '.join(ENDS)}")
    final: Json = at(events[-1], "response")
    want(kinds[-1] == f"response.{final.get('status')}", f"{kinds[-1]} with status {final.get('status')}", "the same")
    inner = events[begun:-1]
    added = [event["output_index"] for event in inner if event["type"] == "response.output_item.added"]
    output = at(final, "output")
    want(added == list(range(len(output))), f"output_item.added of items {added}", f"of each of {len(output)} in turn")
    for index, item in enumerate(output):
        _spell(item, [event for event in inner if event.get("output_index") == index])
    return final


def _spell(item: Json, events: Sequence[Json]) -> None:
    """An item is added, spelt out and done; what was spelt out is what it holds at the end."""
    kinds = [event["type"].removeprefix("response.") for event in events]
    want(
        (kinds[0], kinds[-1]) == ("output_item.added", "output_item.done"), kinds, "output_item.added first, .done last"
    )
    added, done = at(events[0], "item"), at(events[-1], "item")
    want((added.get("id"), added.get("type")) == (item["id"], item["type"]), added, "the item as it ends, but empty")
    want(not any(added.get(name) for name in ("content", "summary", "arguments")), added, "an item that begins empty")
    want(done == item, done, f"the item as the last event has it: {item}")
    texts: dict[tuple[str, int], str] = {("", 0): ""} if item["type"] == "function_call" else {}
    ended = set()
    for event, kind in zip(events[1:-1], kinds[1:-1], strict=True):
        stem, _, what = kind.rpartition(".")
        want(event.get("item_id") == item["id"], event, f"item_id {item['id']}")
        place = PARTS[stem] if stem in PARTS else SPELT.get(stem, ("", ""))[0]
        key = place, event[f"{place}_index"] if place else 0
        if stem in PARTS and what == "added":
            texts[key] = ""
        elif stem in PARTS:
            want(at(event, "part") == item[key[0]][key[1]], event, f"the part of {item}")
        elif stem in SPELT:
            field = SPELT[stem][1]
            want(key in texts and key not in ended, event, "text between a part's beginning and its end")
            texts[key] += event["delta"] if what == "delta" else ""
            if what == "done":
                ended.add(key)
                held = (item[place][key[1]] if place else item)[field]
                want(event.get(field) == texts[key] == held, event, f"{held!r}, {texts[key]!r} of deltas")
    count = {name: kinds.count(f"{stem}.done") for stem, name in PARTS.items()}
    want(ended == set(texts), f"ends of {sorted(ended)}", f"one of each of {sorted(texts)}")
    parts = {name: len(item.get(name) or ()) for name in count}
    want(count == parts, f"parts {count}", f"those of the item, {parts}")


def spoken(got: Got) -> Any:
    """What it says, how it ends and what it counts: names and secrets apart, which may differ each time."""
    said, names = response(got), ("id", "call_id", "encrypted_content")
    output = [{name: value for name, value in item.items() if name not in names} for item in said["output"]]
    counts = [at(said, f"usage.{name}_tokens") for name in ("input", "output")]
    return output, said["status"], said["incomplete_details"], counts


def _uncut(got: Got) -> None:
    """Unclear if it was cut: what was asked for may have been in what is missing."""
    if response(got)["status"] == "incomplete":
        raise Unclear(CUT)


# --- checks ------------------------------------------------------------------------------------------------------


def formed(got: Got) -> None:
    """A response of the right shape, whose parts fit each other."""
    said = response(got)
    fields(said, {"id": str, "model": str, "created_at": int, "output": list, "usage": dict})
    want(said.get("object") == "response", f"object {said.get('object')!r}", "response")
    want(said.get("error", 0) is None, f"error {said.get('error', 'missing')}", "null")
    status, cut = said.get("status"), said.get("incomplete_details", 0)
    want(status in ("completed", "incomplete"), f"status {status!r}", "completed or incomplete")
    want(
        (cut is None) == (status == "completed"), f"{status}, incomplete_details {cut}", "null, or why it is incomplete"
    )
    for item in said["output"]:
        want(item.get("type") in ITEMS, f"an item of type {item.get('type')!r}", " or ".join(ITEMS))
        fields(item, ITEMS[item["type"]])
        if item["type"] == "function_call" and item["status"] == "completed":
            parsed(item["arguments"].encode())
        for part in item["content"] if item["type"] == "message" else ():
            want(part.get("type") in ("output_text", "refusal"), part, "output_text or refusal")
            if part["type"] == "output_text":
                fields(part, {"text": str, "annotations": list})
    names = [item["id"] for item in said["output"]]
    want(len(set(names)) == len(names), names, "an id for each item")
    _counts(said["usage"], got.asked["max_output_tokens"])


def _counts(usage: Json, most: int) -> None:
    fields(usage, dict.fromkeys(("input_tokens", "output_tokens", "total_tokens"), int))
    come, gone, total = (usage[f"{name}_tokens"] for name in ("input", "output", "total"))
    want(come > 0 and gone > 0 and come + gone == total, f"usage {come}, {gone}, {total}", "above 0, and their sum")
    want(gone <= most, f"{gone} output_tokens", f"at most {most}")
    cached, reasoning = (
        at(usage, "input_tokens_details.cached_tokens"),
        at(usage, "output_tokens_details.reasoning_tokens"),
    )
    want(cached <= come, f"{cached} cached_tokens", f"of {come} input_tokens")
    want(reasoning <= gone, f"{reasoning} reasoning_tokens", f"of {gone} output_tokens")


def cut(got: Got) -> None:
    """It is incomplete, and says why. Unclear if the model had no more to say."""
    said = response(got)
    if said["status"] == "completed" and said["usage"]["output_tokens"] < got.asked["max_output_tokens"]:
        raise Unclear("the model ended before max_output_tokens")
    reason = at(said, "incomplete_details") or {}
    want(said["status"] == "incomplete", f"status {said['status']}", "incomplete")
    want(reason.get("reason") == "max_output_tokens", f"incomplete_details {reason}", "reason max_output_tokens")
    last = said["output"][-1]
    want(
        last.get("status") in ("incomplete", None),
        f"status {last.get('status')} of the item that was cut",
        "incomplete",
    )


def reasoned(got: Got) -> None:
    """Reasoning stands before what came of it. Unclear if there is none."""
    kinds = [item["type"] for item in response(got)["output"]]
    if "reasoning" not in kinds:
        raise Unclear("the model gave no reasoning")
    want(kinds[0] == "reasoning", kinds, "reasoning first")
    for item in items(got, "reasoning"):
        for part in item["summary"]:
            want(part.get("type") == "summary_text", part, "summary_text")
        for part in item.get("content") or ():
            want(part.get("type") == "reasoning_text", part, "reasoning_text")
        want(item["summary"] or item.get("content"), item, "a summary or a content")
    count = at(response(got), "usage.output_tokens_details.reasoning_tokens")
    want(count > 0, f"{count} reasoning_tokens", "above 0")


def silent(got: Got) -> None:
    """It did not reason."""
    want(not items(got, "reasoning"), items(got, "reasoning"), "no reasoning")


def called(got: Got) -> None:
    """Functions are called, as many as may be, each under a name of its own. Unclear if none is."""
    _uncut(got)
    found = items(got, "function_call")
    if not found:
        raise Unclear("the model did not call")
    names = [call["call_id"] for call in found]
    want(all(names) and len(set(names)) == len(names), names, "a call_id for each call")
    want(all(call["status"] == "completed" for call in found), found, "calls with status completed")
    if got.asked.get("parallel_tool_calls") is False:
        want(len(found) == 1, f"{len(found)} calls", "one")
    if got.asked.get("tool_choice", "auto") != "auto":
        known = [tool["name"] for tool in got.asked["tools"]]
        want({call["name"] for call in found} <= set(known), [call["name"] for call in found], f"functions of {known}")


def uncalled(got: Got) -> None:
    """Nothing is called."""
    want(not items(got, "function_call"), items(got, "function_call"), "no function_call")


def longer(got: Got) -> None:
    """The prompt has more tokens than the one before: what was added is in it."""
    more, less = (at(response(one), "usage.input_tokens") for one in (got, got.earlier))
    want(more > less, f"{more} tokens of input", f"more than the {less} without what was added")


def repeats(*names: str) -> Check:
    """It tells what was asked for."""

    def check(got: Got) -> None:
        for name in names:
            value, asked = response(got).get(name), got.asked[name]
            want(value == asked, f"{name} {value!r}", repr(asked))

    return check


def kept(got: Got) -> None:
    """Goes on from an earlier response, or says clearly that it cannot."""
    if got.status != 200:
        error(400, 404)(got)
        told = at(got.tree, "error.param") or "", at(got.tree, "error.message")
        want(any("previous_response_id" in one for one in told), told, "an error that names previous_response_id")
        return
    repeats("previous_response_id")(got)
    longer(got)


def logprobs(got: Got) -> None:
    """One entry a token: their bytes make the text, their logarithms are at most 0, with the runners-up asked for."""
    ok(got)
    for item in items(got, "message"):
        for part in item["content"]:
            entries = at(part, "logprobs")
            for entry in entries:
                fields(entry, {"token": str, "bytes": list, "top_logprobs": list})
                want(at(entry, "logprob") <= 0, f"logprob {entry['logprob']}", "a number of at most 0")
                count, asked = len(entry["top_logprobs"]), got.asked["top_logprobs"]
                want(count == asked, f"{count} top_logprobs", f"{asked}, as asked for")
            made = bytes(byte for entry in entries for byte in entry["bytes"])
            want(made.startswith(part["text"].encode()), made, f"the bytes of {part['text']!r}")


def held(got: Got) -> None:
    """The text is JSON of the schema that was asked for."""
    _uncut(got)
    of_schema(text(got))


def json_text(got: Got) -> None:
    """The text is a JSON object."""
    _uncut(got)
    parsed(text(got).encode())
