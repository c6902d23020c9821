"""Pages and files as plain text: blocks of text, and passages of blocks."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator
from html.parser import HTMLParser

SIZE = 2000  # characters of a passage, at most
SHORTEST = 60  # characters of a document, at least

# Typographic signs that a small vocabulary had better not spend tokens on, and signs that nobody sees.
PLAIN = str.maketrans(
    {"‘": "'", "’": "'", "“": '"', "”": '"', "…": "...", "\u00a0": " ", "\u2009": " ", "\u202f": " "}
    | dict.fromkeys("\u00ad\u200b\u200c\u200d\u2060\ufeff¶", "")
)
NO_TEXT = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\ud800-\udfff\ue000-\uf8ff]")  # control, surrogate, private


def plain(text: str) -> str:
    """`text` in NFC with straight quotes, Unix line ends, and neither control characters nor trailing blanks."""
    text = unicodedata.normalize("NFC", re.sub(r"\r\n?", "\n", text)).translate(PLAIN).expandtabs(4)
    return re.sub(r"(?<! ) +$", "", NO_TEXT.sub("", text), flags=re.MULTILINE)


def paragraphs(text: str) -> list[str]:
    """What empty lines separate, line breaks kept."""
    return [block.strip("\n") for block in re.split(r"\n\s*\n", text) if block.strip()]


def unwrapped(paragraph: str) -> str:
    """A paragraph of prose on one line. Indented more than its first line suggests: verse, whose lines stay."""
    lines = paragraph.split("\n")
    return paragraph if all(line.startswith("    ") for line in lines) else " ".join(map(str.strip, lines))


def passages(blocks: Iterable[str], size: int = SIZE) -> Iterator[str]:
    """Neighbouring blocks together, up to `size` characters. A heading rather opens a passage than closes one."""
    held = ""
    for block in (piece for whole in blocks for piece in _cut(whole, size)):
        full = len(held) + 2 + len(block) > size or (block.startswith("#") and len(held) > size // 2)
        if held and full:
            yield held
            held = ""
        held = f"{held}\n\n{block}" if held else block
    if held:
        yield held


def _cut(block: str, size: int) -> Iterator[str]:
    """The block, or if it is too long, pieces of it: cut at empty lines, else line ends, else blanks, else anywhere."""
    while len(block) > size:
        at = next((n for sign in ("\n\n", "\n", " ") if (n := block.rfind(sign, 1, size)) > 0), size)
        yield block[:at]
        block = block[at:].lstrip("\n") if block[at] == "\n" else block[at:].lstrip(" ")
    if block.strip():
        yield block


SKIPPED = {"script", "style", "head", "nav", "svg", "form", "footer", "button", "noscript"}
# Navigation, contents, paragraph marks: of Sphinx, DocBook and the SQLite pages, by class.
FURNITURE = {"mobile-nav", "related", "sphinxsidebar", "footer", "headerlink"}
FURNITURE |= {"navheader", "navfooter", "toc", "nosearch", "fancy_toc"}
BLOCKS = {"p", "div", "li", "dt", "dd", "tr", "table", "ul", "ol", "dl", "pre", "blockquote", "br", "hr"}
BLOCKS |= {"section", "body", "article", "main"}
HEADINGS = {f"h{n}": "#" * n + " " for n in range(1, 7)}
VOID = {"br", "hr", "img", "input", "link", "meta", "col", "wbr", "area", "base", "source"}


class _Page(HTMLParser):
    """Collects `blocks`. Lines and blanks count inside <pre> alone."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.blocks: list[str] = []
        self._text: list[str] = []
        self._prefix = ""
        self._pre = 0
        self._skipped: list[str] = []  # open elements of the name that began the part to skip

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if self._skipped:
            self._skipped += [tag] * (tag == self._skipped[0])
            return
        classes = set((dict(attrs).get("class") or "").split())
        if tag not in VOID and (tag in SKIPPED or classes & FURNITURE):
            self._skipped = [tag]
        elif tag in BLOCKS or tag in HEADINGS:
            self._close()
            self._prefix = HEADINGS.get(tag, "- " if tag == "li" else self._prefix)
            self._pre += tag == "pre"
        elif tag in ("td", "th") and "".join(self._text).strip():
            self._text.append(" | ")

    def handle_endtag(self, tag: str) -> None:
        if self._skipped:
            self._skipped = self._skipped[: -1 if tag == self._skipped[0] else None]
        elif tag in BLOCKS or tag in HEADINGS:
            self._close()
            self._prefix = ""
            self._pre -= tag == "pre" and self._pre > 0

    def handle_data(self, data: str) -> None:
        if not self._skipped:
            self._text.append(data)

    def _close(self) -> None:
        text = plain("".join(self._text))
        text = text.strip("\n") if self._pre else " ".join(text.split())
        if text.strip():
            self.blocks.append(self._prefix + text)
            self._prefix = ""
        self._text = []

    def close(self) -> None:
        super().close()
        self._close()


def html_blocks(page: str) -> list[str]:
    """The text blocks of an HTML page: headings with #, list items with -, cells between |, <pre> as it stands."""
    reader = _Page()
    reader.feed(page)
    reader.close()
    return reader.blocks
