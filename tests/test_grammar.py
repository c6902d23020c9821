"""Grammars alone: tokens by chance, held to one, always come to a right answer; what cannot be had is refused."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv4.chat.grammar import MAX_TEXT
from dsv4.chat.grammar_json import Json
from dsv4.chat.grammar_text import choice_answer, grammar_text, json_answer, lark_answer, regex_answer
from dsv4.errors import RequestError
from tests.babble import BYTES, GRAMMARS, MARK, SIZE, WORDS, next_tokens, walk

FORMATS = jsonschema.FormatChecker(("uuid", "ipv4"))  # a date is held to its form: 29 February is one in any year


def compiled(answer: Json, after: int | None = None) -> Any:
    return GRAMMARS.compile(grammar_text(answer, None, MARK), after)


def check(schema: Json, seed: int, only: Any = ()) -> None:
    text, whole = walk(compiled(json_answer(schema, strict=True)), seed, only=only)
    assert whole, text
    jsonschema.validate(json.loads(text), schema, format_checker=FORMATS)


SHORT = st.text(max_size=4).map(lambda text: text.encode(errors="ignore").decode())
LEAVES: st.SearchStrategy[Json] = st.one_of(
    st.sampled_from([{"type": "boolean"}, {"type": "null"}, {"type": "integer"}, {"type": "number"}]),
    st.sampled_from([{"type": "string", "format": name} for name in ("date", "uuid", "ipv4", "date-time")]),
    st.sampled_from([{"type": "string", "pattern": "^[a-c]{2,5}$"}, {"type": ["string", "null"], "maxLength": 3}]),
    st.builds(lambda low, n: {"type": "string", "minLength": low, "maxLength": low + n}, *[st.integers(0, 9)] * 2),
    st.builds(lambda low, n: {"type": "integer", "minimum": low, "maximum": low + n}, *[st.integers(-99, 999)] * 2)
    .filter(lambda s: s["minimum"] <= s["maximum"]),
    st.lists(SHORT | st.integers(-9, 9) | st.none(), min_size=1, max_size=4).map(lambda values: {"enum": values}),
    st.builds(lambda value: {"const": value}, SHORT | st.booleans() | st.just({"a": [1, "b"]})),
)  # fmt: skip


def objects(inside: st.SearchStrategy[Json]) -> st.SearchStrategy[Json]:
    def build(properties: dict[str, Json], needed: int) -> Json:
        required = list(properties)[:needed]
        return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}

    return st.builds(build, st.dictionaries(SHORT, inside, max_size=3), st.integers(0, 3))


def lists(inside: st.SearchStrategy[Json]) -> st.SearchStrategy[Json]:
    return st.builds(lambda items, most: {"type": "array", "items": items, "maxItems": most}, inside, st.integers(0, 3))


def either(inside: st.SearchStrategy[Json]) -> st.SearchStrategy[Json]:
    return st.builds(lambda some: {"anyOf": some}, st.lists(inside, min_size=1, max_size=3))


SCHEMAS = st.recursive(LEAVES, lambda inside: objects(inside) | lists(inside) | either(inside), max_leaves=6)


@given(SCHEMAS, st.integers(0, 1 << 30))
def test_an_answer_by_chance_satisfies_its_schema(schema: Json, seed: int) -> None:
    check(schema, seed)


@given(SCHEMAS, st.integers(0, 1 << 30))
def test_also_when_it_comes_byte_by_byte(schema: Json, seed: int) -> None:
    check(schema, seed, BYTES)


@given(st.integers(0, 1 << 30))
def test_recursive_schemas(seed: int) -> None:
    node = {
        "type": "object",
        "properties": {
            "value": {"enum": [1, "é", None]},
            "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]},
        },
        "required": ["value", "next"],
        "additionalProperties": False,
    }
    check({"$ref": "#/$defs/node", "$defs": {"node": node}}, seed)


def test_any_object_is_an_object() -> None:
    for seed in range(20):
        text, whole = walk(compiled(json_answer({"type": "object"}, strict=True)), seed)
        assert not whole or isinstance(json.loads(text), dict)
        assert text.lstrip()[:1] == b"{"


def reachable(words: list[bytes], grammar: Any) -> set[bytes]:
    """Walk everywhere that masks lead, and hold each mask against the list of words. Returns the words come to."""
    found, pending, seen = set(), [(b"", grammar.start(), [])], set()
    while pending:
        text, matcher, path = pending.pop()
        tokens = next_tokens(matcher.mask())
        right = {id for id in range(SIZE) if id not in WORDS.controls.values() and WORDS.token_bytes(id)
                 and any(word.startswith(text + WORDS.token_bytes(id)) for word in words)}  # fmt: skip
        assert (WORDS.eos_id in tokens) == (text in words), text
        assert set(tokens) - {WORDS.eos_id} <= right, text
        assert tokens
        if text in words:
            found.add(text)
        if len(right) > 1 and len({WORDS.token_bytes(id)[:1] for id in right}) > 1:  # nothing is forced here
            assert set(tokens) - {WORDS.eos_id} == right, text
        for token in set(tokens) - {WORDS.eos_id}:
            further = grammar.start()
            wholes = [further.accept(step) for step in [*path, token]]
            reached = text + WORDS.token_bytes(token)
            if wholes[-1]:
                assert reached in words
                found.add(reached)
            elif reached not in seen:
                seen.add(reached)
                pending.append((reached, further, [*path, token]))
    return found


@pytest.mark.slow
def test_every_mask_on_every_way_to_cut_a_text_is_right() -> None:
    words = ["the cat", "the cats", "the", "thé", "中文", "中", "😀!", "a\n\nb", "true", "truer", 'say "hi"', "</x>"]
    coded = [word.encode() for word in words]
    assert reachable(coded, compiled(choice_answer(words))) == set(coded)


def test_what_a_grammar_ends_on() -> None:
    """The end of sentence exactly where it accepts; whole as soon as nothing can follow."""
    matcher = compiled(regex_answer("ab?")).start()
    a, b = (WORDS.encode_text(text)[0] for text in "ab")
    assert WORDS.eos_id not in next_tokens(matcher.mask())
    assert not matcher.accept(a)
    assert WORDS.eos_id in next_tokens(matcher.mask())
    assert matcher.accept(b)


@pytest.mark.parametrize("pattern", [r"[0-9]{1,3}/\w{2}", r"a\/b|[/\n]x", "^(cat|dog)s?$", 'é"{1,2}', "[^a]\\\\"])
def test_regular_expressions(pattern: str) -> None:
    for seed in range(5):
        text, whole = walk(compiled(regex_answer(pattern)), seed)
        assert whole
        assert re.fullmatch(pattern, text.decode())


def test_choices_with_odd_characters() -> None:
    words = ["", "\x00", "\u2028", '"\\', "tab\t\r\n", "｜DSML｜", "<｜User｜>", "a" * 300]
    assert {walk(compiled(choice_answer(words)), seed)[0].decode() for seed in range(200)} == set(words)


def test_a_grammar_of_lark() -> None:
    grammar = compiled(lark_answer('start: "(" start? ")"'))
    for seed in range(10):
        text, whole = walk(grammar, seed, 400)
        assert text.count(b"(") >= text.count(b")") if not whole else re.fullmatch(rb"(\(+)(\)+)", text)


def test_anything_goes_until_the_token_that_it_waits_for() -> None:
    end = WORDS.controls["</think>"]
    matcher = compiled(choice_answer(["yes"]), end).start()
    for token in (WORDS.eos_id, 5, WORDS.controls["<｜User｜>"]):
        assert matcher.mask() is None
        assert not matcher.accept(token)
    assert not matcher.accept(end)
    assert matcher.mask() is not None
    assert all(b"yes".startswith(WORDS.token_bytes(token)) for token in next_tokens(matcher.mask() or b""))


def test_two_answers_of_one_grammar_do_not_meet() -> None:
    grammar = compiled(regex_answer("ab"))
    one, other = grammar.start(), grammar.start()
    (a,) = WORDS.encode_text("a")
    before = other.mask()
    one.accept(a)
    assert other.mask() == before != one.mask()


NOT, LOOKS = {"not": {"type": "string"}}, {"type": "string", "pattern": "^(?!a)b"}


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        (NOT, 'Unimplemented keys: \\["not"\\]'),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"properties": {"a": {"if": {}, "then": {}}}}, 'Unimplemented keys: \\["if", "then"\\]'),
        ({"oneOf": [{"properties": {"a": {}}}, {"type": "object"}]}, "oneOf"),
        ({"type": "string", "format": "idn-email"}, "idn-email"),
        (LOOKS, "look-ahead"),
        ({"type": "objekt"}, "objekt"),
        ({"type": "object", "properties": []}, "properties must be an object"),
        ({"enum": []}, "anyOf is empty"),
        ({"$ref": "http://example.org/x.json"}, "does not fetch"),
        ({"$ref": "#/$defs/none"}, "none"),
        ({"type": "object", "required": ["a"], "properties": {"a": False}}, "required property 'a' is unsatisfiable"),
    ],
)
def test_a_schema_that_cannot_be_kept(schema: Json, said: str) -> None:
    with pytest.raises(RequestError, match=f"the grammar cannot be used; got .*{said}"):
        compiled(json_answer(schema, strict=True))


def test_without_strict_the_rest_is_kept() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer", **NOT}}, "required": ["a"]} | NOT
    text, _ = walk(compiled(json_answer(schema, strict=False)), 1, 40)
    assert re.match(rb'\{\s*"a"\s*:\s*-?\d', text)


@pytest.mark.parametrize("pattern", ["(a", "a{3,2}", r"\1", r"\bword", "(?=a)", "(" * 3000 + ")" * 3000, "[b-a]", "\\"])
def test_a_pattern_that_is_none(pattern: str) -> None:
    with pytest.raises(RequestError, match=r"^the grammar cannot be used"):
        compiled(regex_answer(pattern))


@pytest.mark.parametrize(
    "grammar", ["", "start: nothing", "stort: /a/", "start: start", "start: <|no such token|>", "\x00"]
)
def test_a_grammar_that_is_none(grammar: str) -> None:
    with pytest.raises(RequestError, match=r"^the grammar cannot be used"):
        compiled(lark_answer(grammar))


def nested(depth: int) -> Json:
    schema: Json = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


def schema(asked: Json) -> Json:
    return json_answer(asked, strict=True)


HOSTILE: dict[str, Json] = {
    "deep": schema(nested(400)),
    "deep lists": schema(json.loads('{"items":' * 400 + "{}" + "}" * 400)),
    "a loop": schema({"$ref": "#"}),
    "a longer loop": schema({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}),
    "a loop of all": schema({"$ref": "#/$defs/a", "$defs": {"a": {"allOf": [{"$ref": "#/$defs/a"}]}}}),
    "an endless list": schema({"type": "array", "minItems": 1 << 60}),
    "endless text": schema({"type": "string", "minLength": 1 << 40}),
    "a huge number": schema({"type": "integer", "minimum": 10**400}),
    "many values": schema({"enum": [f"value {n}" for n in range(8000)]}),
    "many objects": schema({"enum": [{"a": n} for n in range(5000)]}),
    "many properties": schema({"properties": {f"p{n}": {} for n in range(5000)}}),
    "many ways": schema({"anyOf": [{"properties": {f"p{n}": {"type": "string"}}} for n in range(2000)]}),
    "a product": schema({"allOf": [{"anyOf": [{"properties": {f"a{n}": {}}}, {"minItems": n}]} for n in range(20)]}),
    "too large": schema({"enum": ["x" * MAX_TEXT]}),
    "(a+)+": regex_answer("(a+)+b"),
    "states": regex_answer("(a|b)*a(a|b){200}"),
    "powers": regex_answer("((a{1,100}){1,100}){1,100}"),
    "dots": regex_answer("(.*a.{20}){10}.*b.{20}c"),
    "a billion": regex_answer("a{1000000000}"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_grammar_is_refused_or_walked_but_never_endured(name: str) -> None:
    """The limits of time are generous: what they are against takes minutes, gigabytes, or the process."""
    began, said = time.monotonic(), ""
    try:
        walk(compiled(HOSTILE[name]), 1, 50)
    except RequestError as error:
        said = str(error)
    assert "\n" not in said
    assert len(said) < 500
    assert time.monotonic() - began < 60


def test_without_the_library_the_refusal_names_the_extra() -> None:
    script = (
        "import sys; sys.modules['llguidance'] = None\n"
        "from dsv4.chat.grammar import Grammars; from dsv4.errors import RequestError\n"
        "try: Grammars(None, 1)\n"
        "except RequestError as error: print(error)"
    )
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert "pip install 'dsv4[grammar]'" in said
