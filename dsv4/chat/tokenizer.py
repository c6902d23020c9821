"""`tokenizer.json` in, ids out: user text, encoded prompts and raw text each by a door of its own.

The `tokenizers` library finds added tokens in any text it is given. Its switch against that, `encode_special_tokens`,
covers only those whose `special` flag is set: `<think>`, `<｜User｜>` and `｜DSML｜` have it unset. So the added tokens
are taken out of the file before the library sees it, and this class alone knows them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import tokenizers

from dsv4.chat.control import BOS, EOS, ROLES, Piece, joined
from dsv4.chat.detokenize import Detokenizer, token_bytes
from dsv4.chat.vocabulary import Vocabulary, read_vocabulary
from dsv4.errors import PromptError


class Tokenizer:
    """Byte-level BPE with named control tokens. Immutable after loading; safe to share between threads.

    Attributes: `controls` name → id of every added token; `bos_id`, `eos_id`; `role_ids` id → name of the tokens that
    must not appear inside a turn (beginning of sentence, user, assistant, latest_reminder, two older ones): stop there.
    """

    def __init__(self, vocabulary: Vocabulary, bpe: tokenizers.Tokenizer) -> None:
        self.controls = vocabulary.controls
        self.size = vocabulary.size
        self.bos_id, self.eos_id = self.controls[BOS], self.controls[EOS]
        self.role_ids = {self.controls[name]: name for name in ROLES if name in self.controls}
        self._bpe = bpe
        self._names = {id: name for name, id in self.controls.items()}
        # At one position the longest name wins, as in the library.
        names = sorted(self.controls, key=len, reverse=True)
        self._control_pattern = re.compile("(" + "|".join(map(re.escape, names)) + ")")

    @classmethod
    def load(cls, directory: str | Path, vocab_size: int | None = None) -> Tokenizer:
        """Read `directory/tokenizer.json`. `vocab_size` is the model's: an id at or past it has no embedding.

        Raises `CheckpointError` when the file is missing, damaged, not this family's, or disagrees with `vocab_size`.
        """
        return cls(*read_vocabulary(Path(directory) / "tokenizer.json", vocab_size))

    def encode_text(self, text: str) -> list[int]:
        """Ids of somebody's text. Control tokens written in it come out as the ordinary tokens of their letters."""
        try:
            text.encode()
        except UnicodeEncodeError as e:
            raise PromptError(
                "text is not valid Unicode",
                got=f"a lone surrogate at character {e.start}",
                do="decode it as UTF-8 first",
            ) from None
        return list(self._bpe.encode(text, add_special_tokens=False).ids)

    def encode_prompt(self, pieces: Iterable[Piece]) -> list[int]:
        """Ids of a prompt from `chat.encode`: its control tokens by name, everything else as text."""
        ids: list[int] = []
        for piece in joined(pieces):
            ids += self.encode_text(piece) if isinstance(piece, str) else [self.control_id(piece.name)]
        return ids

    def encode_raw(self, text: str) -> list[int]:
        """Ids of text in which every added token counts, as the official encoder's output is read. Adds no BOS."""
        ids: list[int] = []
        for part in self._control_pattern.split(text):
            if part:
                ids += [self.controls[part]] if part in self.controls else self.encode_text(part)
        return ids

    def control_id(self, name: str) -> int:
        """Id of a control token; `PromptError` if this tokenizer has none of that name."""
        if name not in self.controls:
            raise PromptError(f"the tokenizer has no control token {name}", do="leave out the message that needs it")
        return self.controls[name]

    def token_bytes(self, id: int) -> bytes:
        """The bytes that one id stands for; ids of the padding at the vocabulary's end stand for none."""
        if id in self._names:
            return self._names[id].encode()
        token = self._bpe.id_to_token(id) if 0 <= id < 2**32 else None
        return b"" if token is None else token_bytes(token)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids, control tokens included; bytes that are no UTF-8 become U+FFFD."""
        return b"".join(map(self.token_bytes, ids)).decode(errors="replace")

    def stream(self) -> Detokenizer:
        """A fresh incremental `Detokenizer` over this vocabulary."""
        return Detokenizer(self.token_bytes)
