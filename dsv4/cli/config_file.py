"""A verb's options from a YAML file, and back: each by its long name, without the dashes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from dsv4.errors import ConfigError

NEVER = ("config", "print-config")  # in a file
SECRET = ("api-key",)  # never shown, right or wrong
_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", Path: "a path"}


@dataclass(frozen=True)
class Option:
    """One option of a verb: its parameter, its type, and the least and greatest value, None for any."""

    parameter: str
    kind: Any
    least: float | None
    most: float | None

    @property
    def wanted(self) -> str:
        """What fits, in words."""
        bounds = (("least", self.least), ("most", self.most))
        said = [f"at {word} {bound:g}" for word, bound in bounds if bound is not None]
        return ", ".join([_words(self.kind), *said])

    def fits(self, value: object) -> bool:
        """Whether a value of YAML is one of this option."""
        low, high = (-math.inf if self.least is None else self.least), (math.inf if self.most is None else self.most)
        return _fits(value, self.kind) and (not isinstance(value, int | float) or low <= value <= high)


def options(verb: Callable[..., Any]) -> dict[str, Option]:
    """What a file may set: long name → option, in the order of the verb's parameters."""
    return dict(_options(verb))


def _options(verb: Callable[..., Any]) -> Iterator[tuple[str, Option]]:
    for parameter, hint in get_type_hints(verb, include_extras=True).items():
        if parameter == "return" or not hasattr(hint, "__metadata__"):
            continue
        kind, info = hint.__origin__, hint.__metadata__[0]
        given = (info.default, *(info.param_decls or ()))  # inside Annotated the first name takes the default's place
        long = [name for name in given if isinstance(name, str) and name.startswith("--")]
        name = long[0].partition("/")[0][2:] if long else parameter.replace("_", "-")
        if name not in NEVER:
            yield name, Option(parameter, kind, info.min, info.max)


def read(file: Path, verb: Callable[..., Any]) -> dict[str, Any]:
    """Parameter → value of a file. ConfigError with file and line for what is no option or does not fit."""
    yaml, known, found = _yaml(), options(verb), {}
    try:
        loader = yaml.SafeLoader(file.read_bytes())
        node = loader.get_single_node()
        pairs = [] if node is None else node.value
        if node is not None and not isinstance(node, yaml.MappingNode):
            raise ConfigError(f"{file}:1: options", wanted="lines of the form name: value")
        for key, content in pairs:
            where, name = f"{file}:{key.start_mark.line + 1}", str(key.value)
            option, value = known.get(name), loader.construct_object(content, deep=True)
            if option is None:
                near = get_close_matches(name, known, n=1)
                wanted = near[0] if near else "an option's long name, as dsv4 serve --help lists them"
                raise ConfigError(f"{where}: no such option", got=name[:60], wanted=wanted)
            if option.parameter in found:
                raise ConfigError(f"{where}: {name} stands there twice", do="leave one out")
            if not option.fits(value):
                got = "a value that is not shown" if name in SECRET else repr(value)[:60]
                raise ConfigError(f"{where}: {name}", got=got, wanted=option.wanted)
            found[option.parameter] = value
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{file}:{mark.line + 1}" if mark else str(file)
        what = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ConfigError(f"{where}: no YAML", got=what, wanted="lines of the form name: value") from None
    return found


def text(values: Mapping[str, Any], verb: Callable[..., Any]) -> str:
    """`values`, by parameter, as a file that `read` takes; what is secret is left out."""
    shown = {}
    for name, option in options(verb).items():
        value = values[option.parameter]
        if name not in SECRET:
            shown[name] = str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value
    said: str = _yaml().safe_dump(shown, sort_keys=False, allow_unicode=True)
    return said


def _yaml() -> Any:
    try:
        import yaml
    except ImportError:
        raise ConfigError("a configuration in a file needs PyYAML", do="pip install 'dsv4[server]'") from None
    return yaml


def _fits(value: object, kind: Any) -> bool:
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if get_origin(kind) is list:
        return isinstance(value, list) and all(_fits(item, get_args(kind)[0]) for item in value)
    if get_args(kind):
        return any(_fits(value, part) for part in get_args(kind))
    if kind is float:
        return type(value) in (int, float)
    return type(value) is (str if kind is Path else kind)


def _words(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return " or ".join(map(str, get_args(kind)))
    if get_origin(kind) is list:
        return f"a list, each {_words(get_args(kind)[0])}"
    parts = [part for part in get_args(kind) if part is not NoneType]
    return " or ".join(map(_words, parts)) if parts else _NAMES[kind]
