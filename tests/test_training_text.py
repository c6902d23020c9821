"""The text that the embedded models learn from: cleaning, the split, the archive, and their vocabulary."""

from __future__ import annotations

import json
import struct
from collections import Counter
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4.chat.tokenizer import Tokenizer
from tests.chat_support import official_vocabulary
from training import corpus, fetch, sources, vocabulary, wordnet
from training.clean import html_blocks, paragraphs, passages, plain, unwrapped
from training.fetch import CorpusError, Package
from training.sources import Source

# --- cleaning ------------------------------------------------------------------------------------------------------

PAGE = """<html><head><title>No</title><style>p {}</style></head><body>
<div class="related"><div>Next</div> | Index</div>
<h2>The <code>bisect</code> module<a class="headerlink" href="#x">¶</a></h2>
<p>Keeps a list in
sorted&nbsp;order &amp; is &#8220;fast&#8221;.<p>A second one<br>in two.
<ul><li>one <b>bold</b> item<li>another</ul>
<pre>if a &lt; b:
    return  a</pre><table><tr><th>Type<th>Size</tr><tr><td>int<td>4</table><script>var x = "<p>no</p>";</script>
</body></html>"""


def test_a_page_is_its_text_without_furniture() -> None:
    assert html_blocks(PAGE) == [
        "## The bisect module",
        'Keeps a list in sorted order & is "fast".',
        "A second one",
        "in two.",
        "- one bold item",
        "- another",
        "if a < b:\n    return  a",
        "Type | Size",
        "int | 4",
    ]


def test_furniture_ends_where_its_own_element_ends() -> None:
    assert html_blocks('<div class="toc"><div>a</div><p>b</p>c</div><p>text') == ["text"]


def test_plain_text_has_no_odd_signs() -> None:
    assert plain("a\r\nb\rc \t\n‘d’ e\u0301\u00ad\u200b\x07\x1e…") == "a\nb\nc\n'd' é..."


def test_prose_is_unwrapped_and_verse_is_not() -> None:
    assert [unwrapped(part) for part in paragraphs("one\n two\n\n\n    a\n      b\n")] == ["one two", "    a\n      b"]


@given(st.lists(st.text("ab# \n", min_size=1, max_size=60), max_size=8), st.integers(5, 40))
@settings(deadline=None, max_examples=100)
def test_passages_lose_nothing_but_blanks_and_are_short(blocks: list[str], size: int) -> None:
    found = list(passages(blocks, size))
    assert all(0 < len(text) <= size for text in found)
    assert "".join("".join(found).split()) == "".join("".join(blocks).split())


def test_a_heading_opens_a_passage() -> None:
    assert list(passages(["a" * 12, "# title", "b"], 22)) == ["a" * 12, "# title\n\nb"]


# --- the sources ---------------------------------------------------------------------------------------------------

DATA = {
    "noun": "00000010 05 n 02 dog 0 domestic_dog 0 001 @ 00000020 n 0000 | a tame animal; kept at home; "
    '"the dog barked"; "a dog\'s life"  \n'
    "00000020 05 n 01 canine 0 000 | any of various mammals  \n"
    '00000030 06 n 0a Big_Ben 0 b 0 c 0 d 0 e 0 f 0 g 0 h 0 i 0 j 0 000 | a bell in "London"  \n',
    "verb": "00000010 29 v 01 bark 0 000 01 + 02 00 | make a sound  \n",
    "adj": "00000010 00 s 01 galore(ip) 0 000 | in great numbers  \n",
    "adv": "00000010 02 r 01 well 0 000 | in a good way  \n",
}
INDEX = {
    "noun": "dog n 1 2 @ ~ 1 1 00000010  \ncanine n 1 0 1 0 00000020  \n",
    "verb": "bark v 1 0 1 1 00000010  \n",
    "adj": "",
    "adv": "",
}


@pytest.fixture
def words(tmp_path: Path) -> Path:
    """A small WordNet."""
    for name in wordnet.FILES:
        (tmp_path / f"data.{name}").write_text("  1 the licence\n" + DATA[name], encoding="utf-8")
        (tmp_path / f"index.{name}").write_text("  1 the licence\n" + INDEX[name], encoding="utf-8")
    (tmp_path / "cntlist.rev").write_text(
        "dog%1:05:00:: 1 42\ndog%1:18:01:: 4 1\nbark%2:29:00:: 1 3\n", encoding="utf-8"
    )
    return tmp_path


def test_entries_of_wordnet_read_as_text(words: Path) -> None:
    (first, group), *_ = wordnet.groups(wordnet.read(words))
    assert len(group) == 2
    assert first.split("\n") == [
        'dog (noun): a tame animal; kept at home. "the dog barked". "a dog\'s life". '
        "Also: domestic dog. A kind of: canine.",
        "canine (noun): any of various mammals.",
    ]


def test_the_word_count_is_hexadecimal_and_markers_go(words: Path) -> None:
    meanings = wordnet.read(words)
    assert len(meanings["n", "00000030"].words) == 10
    assert meanings["a", "00000010"].words == ("galore",)
    assert meanings["a", "00000010"].kind == "adjective"
    assert meanings["v", "00000010"].definition == "make a sound"


def test_definitions_are_of_words_in_use(words: Path) -> None:
    assert [entry for entry, _ in wordnet.definitions(words)] == [
        {
            "word": "dog",
            "pos": "noun",
            "definition": "a tame animal; kept at home",
            "example": "the dog barked",
            "count": 43,
        },
        {"word": "bark", "pos": "verb", "definition": "make a sound", "example": "", "count": 3},
    ]


def packed_bible(text: str) -> bytes:
    """A bible.data of two windows, each character one code of nine bits."""
    parts = [sum(ord(char) << 9 * n for n, char in enumerate(part)) for part in (text[:20], text[20:40])]
    windows = [part.to_bytes(-(-9 * 20 // 8), "little") for part in parts]
    start = 92 + 8
    return b"EC02".ljust(88, b"\0") + struct.pack(">3I", 2, start, start + len(windows[0])) + b"".join(windows)


def test_the_bible_is_read_window_by_window(tmp_path: Path) -> None:
    path = tmp_path / "usr/lib/bible.data"
    path.parent.mkdir(parents=True)
    path.write_bytes(packed_bible("Ge1:1 In the end.\nGe1:2 And.\nGe2:1 Thus.\n"[:40]))
    assert list(sources.king_james(tmp_path)) == ["In the end.\n\nAnd.", "Thus."]
    path.write_bytes(b"EC03" + bytes(100))
    with pytest.raises(CorpusError, match="another form; got b'EC03'"):
        list(sources.king_james(tmp_path))


def test_pages_do_not_repeat_themselves(tmp_path: Path) -> None:
    same = f"<p>{'This sentence stands on every page of the manual, and once is enough. ' * 2}"
    (tmp_path / "html").mkdir()
    for name, own in (("a", "First of all pages."), ("b", "Second."), ("genindex", "Nothing to read here at all.")):
        (tmp_path / f"html/{name}.html").write_text(f"<p>{own}{same}<p>Short line.", encoding="utf-8")
    first, second = sources.pages(tmp_path, "ht*l")
    assert "every page" in first
    assert second == "Second.\n\nShort line."


def test_a_command_that_fails_or_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"^there is no no-such-command; "):
        fetch.run("no-such-command", where=tmp_path)
    with pytest.raises(CorpusError, match=r"^sh -c echo.* failed; got last; "):
        fetch.run("sh", "-c", "echo first >&2; echo last >&2; exit 1", where=tmp_path)


def test_a_package_that_this_release_lacks_names_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lacking(*command: str, where: Path) -> str:
        raise CorpusError("apt-get download failed", got=f"E: Unable to locate package {command[-1]}")

    monkeypatch.setattr(fetch, "run", lacking)
    with pytest.raises(CorpusError, match=r"no Debian package a-doc or b-doc; got .* b-doc; run `apt-get update`"):
        fetch.debian(("a-doc", "b-doc"), tmp_path / "a")


# --- the split and the archive -------------------------------------------------------------------------------------


def small_source(name: str, count: int) -> Source:
    texts = [f"Document {n} of {name}, long enough to be one of the documents of a corpus." for n in range(count)]
    return Source(
        name, "public domain", lambda into: Package(name, "1", into), lambda root: [*texts, "short", texts[0]]
    )


@pytest.fixture
def built(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """A small corpus of two sources."""
    corpus.build_corpus(tmp_path, (small_source("one", 300), small_source("two", 300)))
    return tmp_path


def test_a_document_is_taught_or_held_out_and_never_both(built: Path) -> None:
    taught, held = (corpus.documents(built, "one", held_out) for held_out in (False, True))
    assert len(taught) + len(held) == 300
    assert not set(taught) & set(held)
    assert 1 <= len(held) <= 20


def test_text_of_the_held_out_file_is_not_taught(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = corpus.documents(built, "one", held_out=False)[0]
    (tmp_path / "secret.jsonl").write_text(json.dumps({"text": f"Title\n{first}"}) + "\n", encoding="utf-8")
    monkeypatch.setattr(corpus, "HELD_OUT_FILE", tmp_path / "secret.jsonl")
    corpus._held_out_lines.cache_clear()
    assert first not in corpus.documents(built, "one", held_out=False)
    corpus._held_out_lines.cache_clear()


def test_the_committed_held_out_file_is_held_out() -> None:
    rows = [json.loads(line) for line in corpus.HELD_OUT_FILE.read_text(encoding="utf-8").splitlines()]
    assert {row["source"] for row in rows} == {source.name for source in sources.SOURCES}
    assert all(corpus.is_held_out(row["text"]) and 300 <= len(row["text"]) <= 2000 for row in rows)
    share = sum(len(row["text"]) for row in rows if row["source"] == "wordnet") / sum(len(row["text"]) for row in rows)
    assert 0.28 < share < 0.4
    assert corpus.HELD_OUT_FILE.stat().st_size <= corpus.HELD_OUT_BYTES


def test_every_source_has_a_licence_and_a_credit() -> None:
    credits_ = (Path(corpus.__file__).parent / "SOURCES.md").read_text(encoding="utf-8")
    notes = corpus.HELD_OUT_FILE.with_name("HELDOUT-LICENSES.md").read_text(encoding="utf-8")
    for source in sources.SOURCES:
        assert f"`{source.name}`" in credits_
        assert f"`{source.name}`" in notes
        assert source.licence in credits_


def test_the_archive_is_the_same_each_time_and_unpacks(built: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    first = corpus.pack(built).read_bytes()
    other = tmp_path_factory.mktemp("other")
    corpus.build_corpus(other, (small_source("one", 300), small_source("two", 300)))
    assert corpus.pack(other).read_bytes() == first
    copy = tmp_path_factory.mktemp("copy")
    (copy / "corpus.tar.xz").write_bytes(first)
    corpus.unpack(copy)
    assert corpus.documents(copy, "two", held_out=True) == corpus.documents(built, "two", held_out=True)


def test_a_damaged_file_is_found(built: Path) -> None:
    (built / "corpus/two.txt").write_text("x", encoding="utf-8")
    corpus.pack(built)
    with pytest.raises(CorpusError, match=r"^two\.txt is damaged"):
        corpus.unpack(built)


def test_a_source_without_text_stops_the_build(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="none 1 holds no text"):
        corpus.build_corpus(tmp_path, (small_source("none", 0)._replace(read=lambda root: []),))
    with pytest.raises(CorpusError, match=r"corpus/none.txt is missing; run `python -m training.corpus build`"):
        corpus.documents(tmp_path, "none", held_out=False)


def test_what_is_too_much_is_thinned_out_evenly() -> None:
    texts = [f"{n:100}" for n in range(1000)]
    kept = corpus.collect(texts, 0.025, set())
    assert len(kept) == 250
    assert {int(b) - int(a) for a, b in pairwise(kept)} == {4}


# --- the vocabulary ------------------------------------------------------------------------------------------------

TEXT = """The dog barked at the mailman, and the mailman laughed at the dog: "You are 12 years old, and still afraid?"
def add(first, second):
    return first + second  # 1234 times\n\n\n{"name": "add", "arguments": [10, 200]}  Straße, 犬, Ωmega."""
SIZE = 700


@pytest.fixture(scope="module")
def official() -> dict[str, Any]:
    """The official tokenizer.json."""
    official_vocabulary()  # skips where it is not installed
    tree: dict[str, Any] = json.loads(vocabulary.official_file().read_text(encoding="utf-8"))
    return tree


@pytest.fixture(scope="module")
def made(official: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small vocabulary for TEXT."""
    texts = {"text": [TEXT]}
    counts = vocabulary.weighted({"text": vocabulary.count(vocabulary.without_added(official), [TEXT])}, {"text": 1})
    kept = vocabulary.best(official, texts, counts, {"text": 1}, SIZE)
    tree, ids = vocabulary.subset(official, kept, SIZE)
    out = tmp_path_factory.mktemp("vocabulary")
    (out / "tokenizer.json").write_text(json.dumps(tree), encoding="utf-8")
    (out / "official_token_ids.json").write_text(json.dumps(ids), encoding="utf-8")
    return out


@cache
def load(made: Path) -> Tokenizer:
    return Tokenizer.load(made, SIZE)


def test_every_token_is_an_official_one(official: dict[str, Any], made: Path) -> None:
    tree = json.loads((made / "tokenizer.json").read_text(encoding="utf-8"))
    ids = json.loads((made / "official_token_ids.json").read_text(encoding="utf-8"))
    official_ids = official["model"]["vocab"] | {token["content"]: token["id"] for token in official["added_tokens"]}
    own = tree["model"]["vocab"] | {token["content"]: token["id"] for token in tree["added_tokens"]}
    assert sorted(own.values()) == list(range(SIZE))
    assert {official_ids[token] == ids[id] for token, id in own.items()} == {True}
    assert ids[:3] == [0, 1, 2]
    chosen = ids[: len(tree["model"]["vocab"])]
    assert chosen == sorted(chosen)


def test_every_token_but_the_bytes_has_its_merge_and_its_halves(made: Path) -> None:
    model = json.loads((made / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    merged = vocabulary.halves(model["merges"])
    marks = {token for token, id in model["vocab"].items() if id < 3}
    assert len(model["vocab"].keys() - merged.keys() - marks) == 256
    assert merged.keys() | {half for pair in merged.values() for half in pair} <= model["vocab"].keys()
    assert not any(map(vocabulary.many_digits, model["vocab"]))


def test_control_tokens_with_a_name_are_all_there(official: dict[str, Any], made: Path) -> None:
    named = {token["content"] for token in official["added_tokens"] if not vocabulary.is_place_holder(token)}
    assert len(named) == 66
    tokenizer = load(made)
    assert named <= tokenizer.controls.keys()
    assert (tokenizer.bos_id, tokenizer.eos_id) == (0, 1)


def test_where_all_official_tokens_are_kept_text_is_split_as_officially(official: dict[str, Any], made: Path) -> None:
    ids = json.loads((made / "official_token_ids.json").read_text(encoding="utf-8"))
    own, theirs = load(made), vocabulary.without_added(official)
    same = 0
    for line in TEXT.replace("12", "1").split(" "):
        wanted = theirs.encode(f" {line}", add_special_tokens=False).ids
        if set(wanted) <= set(ids):
            same += 1
            assert [ids[id] for id in own.encode_text(f" {line}")] == wanted
    assert same > 20


@given(text=st.text())
@settings(deadline=None, max_examples=200)
def test_any_text_comes_back(made: Path, text: str) -> None:
    tokenizer = load(made)
    assert tokenizer.decode(tokenizer.encode_text(text)) == text


def test_a_number_is_its_digits(made: Path) -> None:
    tokenizer = load(made)
    assert [tokenizer.decode([id]) for id in tokenizer.encode_text("a 12345")][-5:] == list("12345")


def test_a_token_comes_with_its_parts_or_not_at_all() -> None:
    pairs = vocabulary.halves(["a b", "ab c", "1 2", "a 12"])
    assert vocabulary.choose({"abc": 9, "12": 8, "a12": 7}, pairs, "abc12", 7) == {*"abc12", "ab", "abc"}
    assert vocabulary.choose({"abc": 9}, pairs, "abc12", 6) == set("abc12")


def test_pruning_hands_the_use_of_a_token_to_its_halves() -> None:
    pairs = vocabulary.halves(["a b", "ab c", "c d", "d e"])
    use = {"abc": 5.0, "cd": 4.0, "de": 6.0}
    kept = {*"abcde", *pairs.keys()}
    assert kept - vocabulary.prune(kept, use, pairs, 8) == {"cd"}
    assert kept - vocabulary.prune(kept, use, pairs, 7) == {"cd", "abc"}
    # "ab" has the five uses of "abc" now, fewer than the six of "de".
    assert kept - vocabulary.prune(kept, use, pairs, 6) == {"cd", "abc", "ab"}


def test_control_tokens_of_an_exercise_are_not_counted(made: Path) -> None:
    tokenizer = load(made)
    ids = tokenizer.encode_raw("<｜User｜>The dog<｜Assistant｜></think>barked.")
    assert list(vocabulary._texts(ids, set(tokenizer.controls.values()), tokenizer)) == ["", "The dog", "", "barked."]


def test_weights_do_not_depend_on_length() -> None:
    counts = {"long": Counter({"a": 900, "b": 100}), "short": Counter({"b": 2})}
    assert vocabulary.weighted(counts, {"long": 1, "short": 3}) == pytest.approx({"a": 0.9, "b": 3.1})
