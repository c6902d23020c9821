"""Answers held to a grammar: which tokens may come next. The llguidance library does the parsing.

A grammar (`chat.grammar_text` writes them) speaks of text and of control tokens, `<[id]>`. Text never contains a
control token: those come where a grammar names them and nowhere else, however the text was cut into tokens. A grammar
is compiled once, and bounded in size, states and work for each token: a hostile one is refused, not endured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from dsv4.chat.tokenizer import Tokenizer
from dsv4.errors import RequestError

if TYPE_CHECKING:
    import llguidance

INSTALL: Final = "pip install 'dsv4[grammar]'"
MAX_TEXT = 1 << 17  # characters of one grammar, schemas included
MAX_SYMBOLS, MAX_STATES = 100_000, 25_000  # of a compiled grammar and of its lexer, which takes 1 to 2 kB a state


class Grammars:
    """Compiles grammars over one vocabulary. Safe to share between threads."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        """`vocab_size` is the model's: ids without a token are never allowed. RequestError without the library."""
        try:
            import llguidance
        except ImportError:
            raise RequestError("answers are held to a grammar by llguidance, which is missing", do=INSTALL) from None
        self._library = llguidance
        self._words = llguidance.LLTokenizer(llguidance.TokenizerWrapper(_Words(tokenizer, vocab_size)))

    def compile(self, text: str, after: int | None = None) -> Grammar:
        """The grammar `text`; `after`: the token behind which it begins. RequestError for one that cannot be had."""
        if len(text) > MAX_TEXT:
            raise RequestError("the grammar is too large", got=f"{len(text)} characters", wanted=f"at most {MAX_TEXT}")
        limits = self._library.LLParserLimits(
            max_grammar_size=MAX_SYMBOLS, max_lexer_states=MAX_STATES, verbose_errors=False
        )
        matcher = self._library.LLMatcher(self._words, text, log_level=0, limits=limits)
        matcher.compute_bitmask()  # the first may be dear, and tells whether there is any answer at all
        if matcher.is_error():
            raise RequestError("the grammar cannot be used", got=_said(matcher))
        return Grammar(matcher, after)


class _Words:
    """A tokenizer as the library asks for one."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self.eos_token_id, self.bos_token_id = tokenizer.eos_id, tokenizer.bos_id
        self.tokens = [tokenizer.token_bytes(id) for id in range(vocab_size)]
        self.special_token_ids = sorted(tokenizer.controls.values())
        self._tokenizer = tokenizer

    def __call__(self, text: str) -> Sequence[int]:
        return self._tokenizer.encode_text(text)


@dataclass(frozen=True, eq=False)
class Grammar:
    """A compiled grammar. Answers are held to it from the start, or from behind the first token `after`."""

    compiled: llguidance.LLMatcher
    after: int | None

    def start(self) -> Matcher:
        """For one answer."""
        return Matcher(self.compiled.deep_copy(), self.after)


class Matcher:
    """Where one answer stands in its grammar (`engine.request.Matcher`)."""

    def __init__(self, matcher: llguidance.LLMatcher, after: int | None) -> None:
        self._matcher, self._after = matcher, after

    def mask(self) -> bytes | None:
        """One bit a token, the lowest of a byte first; the end of sentence is allowed where the grammar accepts.

        None while anything goes. RequestError where the grammar turns out to need more than it may.
        """
        if self._after is not None:
            return None
        bits = self._matcher.compute_bitmask()
        if self._matcher.is_error():
            raise RequestError("the grammar became too complex for this answer", got=_said(self._matcher))
        return bits

    def accept(self, token: int) -> bool:
        """Take in a token that `mask` allowed; whether the answer is whole, so that nothing can follow."""
        if self._after is not None:
            self._after = None if token == self._after else self._after
            return False
        self._matcher.consume_token(token)
        return self._matcher.is_stopped() and not self._matcher.is_error()


def _said(matcher: llguidance.LLMatcher) -> str:
    """What went wrong, on one line."""
    said = " ".join(matcher.get_error().split())[:300]
    return "one that no text satisfies" if said.startswith("NoExtensionBias") else said
