"""How one key of a `config.json` is declared and checked; the dataclasses of `config.py` are the table."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Final

from dsv4.errors import ConfigError

REQUIRED: Final = dataclasses.MISSING
_LARGEST: Final = 1 << 24  # a width, a count or an id: nothing in this family comes near it


def key(
    kind: str,
    *,
    low: float | None = None,
    high: float | None = None,
    only: tuple[object, ...] | None = None,
    absent: Any = REQUIRED,
) -> Any:
    """A dataclass field that stands for one key.

    `kind` is "int", "float", "str", "bool" or "ints"; `low` and `high` are inclusive; `only` lists the values that
    this program can run; `absent` is the value where the key may be missing.
    """
    metadata = {"kind": kind, "low": low, "high": high, "only": only}
    if absent is REQUIRED:
        return dataclasses.field(metadata=metadata)
    return dataclasses.field(default=absent, metadata=metadata)


def read_fields(cls: type[Any], given: Mapping[str, Any], source: str, prefix: str = "") -> dict[str, Any]:
    """Checked values for every `key` of the dataclass `cls`, from `given` (its keys carry no prefix; messages do)."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(cls):
        if "kind" not in field.metadata:
            continue
        where = f"{source}: {prefix}{field.name}"
        if field.name not in given or (given[field.name] is None and field.default is not REQUIRED):
            if field.default is REQUIRED:
                raise ConfigError(where, got="nothing", wanted=_wanted(field.metadata), do="the key is missing")
            values[field.name] = field.default
        else:
            values[field.name] = _checked(given[field.name], field.metadata, where)
    return values


def key_names(cls: type[Any]) -> frozenset[str]:
    """Names of the keys that `cls` declares."""
    return frozenset(field.name for field in dataclasses.fields(cls) if "kind" in field.metadata)


def _checked(value: object, rule: Mapping[str, Any], where: str) -> object:
    kind, only = rule["kind"], rule["only"]
    if kind == "ints":
        return _checked_ints(value, rule, where)
    result = float(value) if kind == "float" and _is(value, "int") else value  # type: ignore[arg-type]
    if not _is(result, kind) or not _in_range(result, rule) or (only is not None and result not in only):
        raise ConfigError(where, got=shown(value), wanted=_wanted(rule))
    return result


def _checked_ints(value: object, rule: Mapping[str, Any], where: str) -> tuple[int, ...]:
    if not isinstance(value, list | tuple) or not all(_is(v, "int") and _in_range(v, rule) for v in value):
        raise ConfigError(where, got=shown(value), wanted=_wanted(rule))
    if rule["only"] is not None and tuple(value) not in rule["only"]:
        raise ConfigError(where, got=shown(value), wanted=_wanted(rule))
    return tuple(value)


def _is(value: object, kind: str) -> bool:
    if kind == "int":
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= _LARGEST
    if kind == "float":
        return isinstance(value, float) and math.isfinite(value)
    return isinstance(value, {"str": str, "bool": bool}[kind])


def _in_range(value: Any, rule: Mapping[str, Any]) -> bool:
    low, high = rule["low"], rule["high"]
    return (low is None or value >= low) and (high is None or value <= high)


def _wanted(rule: Mapping[str, Any]) -> str:
    if rule["only"] is not None:
        return " or ".join(shown(value) for value in rule["only"])
    noun = {"int": "an integer", "float": "a number", "str": "a string", "bool": "true or false", "ints": "integers"}
    low, high = rule["low"], rule["high"]
    high = _LARGEST if high is None and rule["kind"] in ("int", "ints") else high
    bounds = [f"of at least {low:g}"] if low is not None else []
    bounds += [f"at most {high}"] if high is not None else []
    return " ".join([noun[rule["kind"]], " and ".join(bounds)]).strip()


def shown(value: object) -> str:
    """A value as a message shows it: short and on one line, whatever the file held."""
    if value is None:
        return "nothing"
    text = {True: "true", False: "false"}.get(value, repr(value)) if isinstance(value, bool) else _repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _repr(value: object) -> str:
    if isinstance(value, int) and abs(value) > 1 << 64:
        return "an enormous integer"  # printing it could itself be refused or take for ever
    if isinstance(value, list | tuple | dict) and len(value) > 16:
        return f"a {type(value).__name__} of {len(value)}"
    if isinstance(value, str) and len(value) > 60:
        return repr(value[:50]) + "..."
    return repr(value)
