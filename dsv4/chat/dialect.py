"""Which words a release wants around the conversation: effort texts, tool template, response-format sentence.

The releases share one grammar (`chat.encode`) and differ in these. "high" and "max" name other texts in the preview
and in the 0731 weights, so the dialect comes from the checkpoint itself and is never guessed:

    dialect   shipped as                             efforts (no text: "")
    preview   encoding/ with effort text A           high = "" (default), max = A
    0731      encoding/ with effort texts A and B    low = "" (default), high = A, max = B
    own       dialect.json (the embedded models)     what the file says
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dsv4.chat import literals
from dsv4.chat.own_dialect import read_own
from dsv4.errors import PromptError

DIALECT_FILE, ENCODING_FOLDER = "dialect.json", "encoding"

# effort → which text; None: no text.
EFFORTS: dict[str, dict[str, str | None]] = {
    "preview": {"high": None, "max": literals.EFFORT_A},
    "0731": {"low": None, "high": literals.EFFORT_A, "max": literals.EFFORT_B},
}
NAMES = (*EFFORTS, "own")
WHERE = (
    "the text is in encoding/ of the official checkpoint: copy that folder beside the weights or pass --dialect PATH"
)


@dataclass(frozen=True)
class Dialect:
    """One release's texts. An effort whose text is None exists, but nobody shipped its text.

    `source` says where the texts were read, for the line printed at start.
    """

    name: str
    efforts: Mapping[str, str | None]
    default_effort: str
    tools: str | None
    response_format: str | None
    source: str

    @classmethod
    def for_model(cls, directory: str | Path, override: str | None = None) -> Dialect:
        """The dialect of the checkpoint in `directory`; `override` is what `--dialect` said: a name or a path.

        A path replaces whatever the directory ships; a name must agree with it, or supply it where nothing is shipped.
        Raises `PromptError` when nothing decides, when two things disagree, or when a text is unknown.
        """
        if override is not None and override not in NAMES:
            return _at_path(Path(override))
        shipped = _shipped(Path(directory))
        if shipped is None:
            return _by_name(Path(directory), override)
        if override not in (None, shipped.name):
            raise PromptError(
                f"--dialect {override} contradicts the checkpoint",
                got=f"{shipped.name} in {shipped.source}",
                do="leave --dialect out, or pass a path to replace what the checkpoint ships",
            )
        return shipped

    def effort_text(self, effort: str | None) -> str:
        """What stands before everything else at this effort (None: the default), often nothing."""
        effort = self.default_effort if effort is None else effort
        if effort not in self.efforts:
            raise PromptError(
                f"the {self.name} dialect has no such effort", got=effort, wanted=" or ".join(self.efforts)
            )
        text = self.efforts[effort]
        return self._known(f"the text of effort {effort}", text)

    def tools_template(self) -> str:
        """The tool instructions, with placeholders."""
        return self._known("the tool template", self.tools)

    def response_format_template(self) -> str:
        """The sentence that asks for a JSON schema, with the placeholder `{schema}`."""
        return self._known("the response-format sentence", self.response_format)

    def _known(self, what: str, text: str | None) -> str:
        if text is None:
            raise PromptError(f"{what} of the {self.name} dialect is not at hand", got=self.source, do=self._where())
        return text

    def _where(self) -> str:
        return f"this model was made without it; {DIALECT_FILE} could state one" if self.name == "own" else WHERE


def _shipped(directory: Path) -> Dialect | None:
    own, encoding = directory / DIALECT_FILE, directory / ENCODING_FOLDER
    if own.is_file() and encoding.is_dir():
        raise PromptError(
            f"{directory} ships two dialects",
            got=f"{own.name} and {encoding.name}/",
            do="remove one, or pass --dialect PATH",
        )
    if own.is_file():
        return _own(own)
    return _official(encoding) if encoding.is_dir() else None


def _at_path(path: Path) -> Dialect:
    if path.is_dir():
        shipped = _shipped(path)
        return _official(path) if shipped is None else shipped
    if path.is_file():
        return _official(path) if path.suffix == ".py" else _own(path)
    raise PromptError(
        "no such dialect", got=str(path), wanted=", ".join(NAMES) + ", or the path of a dialect.json or encoding folder"
    )


def _by_name(directory: Path, name: str | None) -> Dialect:
    """The directory ships nothing. A named dialect works as far as it needs no text."""
    if name is None or name == "own":
        raise PromptError(
            f"{directory} does not say how it was taught to chat",
            got=f"neither {ENCODING_FOLDER}/ nor {DIALECT_FILE}" + (", which --dialect own reads" if name else ""),
            do="pass --dialect preview (April to July 2026), --dialect 0731 (later weights) or --dialect PATH",
        )
    return _from_texts(name, {}, f"--dialect {name}, without texts")


def _own(path: Path) -> Dialect:
    own = read_own(path)
    return Dialect("own", own.efforts, own.default_effort, own.tools, own.response_format, str(path))


def _official(source: Path) -> Dialect:
    texts = literals.read_literals(source)
    if literals.EFFORT_A not in texts:
        raise PromptError(
            f"{source} is no encoding that this version knows",
            got="effort text B without A" if literals.EFFORT_B in texts else "no known effort text",
            wanted="text A (preview) or A and B (0731)",
            do="pass --dialect NAME or PATH",
        )
    return _from_texts("0731" if literals.EFFORT_B in texts else "preview", texts, str(source))


def _from_texts(name: str, texts: Mapping[str, str], source: str) -> Dialect:
    table = EFFORTS[name]
    efforts = {effort: "" if which is None else texts.get(which) for effort, which in table.items()}
    default = next(effort for effort, which in table.items() if which is None)
    return Dialect(name, efforts, default, texts.get(literals.TOOLS), texts.get(literals.RESPONSE_FORMAT), source)
