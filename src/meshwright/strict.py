"""Frozen dataclasses from plain values, as YAML gives them: the dataclasses are the schema, one reader walks them.

An unknown key, a wrong type or a value that is not one of the choices is a `ConfigError` that names the key, the value
and what was expected. Nothing is converted but whole numbers to floats.
"""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, Literal, TypeVar

from meshwright.errors import ConfigError

T = TypeVar("T")


def read(kind: type[T], raw: object, where: str, prefix: str = "") -> T:
    """A dataclass of type `kind` from a mapping; `where` and the dotted key are named in every error."""
    if not isinstance(raw, Mapping):
        raise ConfigError(f"{where}: {prefix.rstrip('.') or 'the file'} must be a mapping of keys, got {raw!r}")
    hints = typing.get_type_hints(kind)
    names = [f.name for f in fields(typing.cast(Any, kind))]
    for key in raw:
        if key not in names:
            near = difflib.get_close_matches(str(key), names, n=1)
            guess = f"; did you mean {prefix}{near[0]}?" if near else f"; known here: {', '.join(names)}"
            raise ConfigError(f"{where}: unknown key {prefix}{key}{guess}")
    return kind(**{key: _value(hints[key], raw[key], where, prefix + key) for key in raw})


def _value(hint: Any, value: object, where: str, key: str) -> Any:
    """`value` if it has the type `hint`; whole numbers count as floats, nothing else is converted."""
    if is_dataclass(hint) and isinstance(hint, type):
        return read(hint, value, where, key + ".")
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal and any(value == choice and type(value) is type(choice) for choice in arguments):
        return value
    if origin is types.UnionType:
        if value is None and type(None) in arguments:
            return None
        choices = [choice for choice in arguments if choice is not type(None)]
        lists = [choice for choice in choices if typing.get_origin(choice) is tuple]
        return _value((lists if isinstance(value, list | tuple) and lists else choices)[0], value, where, key)
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(_value(arguments[0], item, where, f"{key}[{index}]") for index, item in enumerate(value))
    if origin is dict and isinstance(value, dict):
        for name, item in value.items():
            if type(name) is not str or not _is_argument(item):
                raise ConfigError(
                    f"{where}: {key}: {name!r} = {item!r}; expected a name, and a number, text, true or false, empty, "
                    "or a list of these"
                )
        return {name: tuple(item) if isinstance(item, list) else item for name, item in value.items()}
    if hint is float and type(value) is int:
        return float(value)
    if origin is None and type(value) is hint:
        return value
    note = ""
    if hint is float and isinstance(value, str) and _is_number(value):
        note = f" (YAML reads {value} as text; write {float(value)!r})"
    raise ConfigError(f"{where}: {key} = {value!r} is {_name(type(value))}; expected {_expected(hint)}{note}")


_NAMES = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    type(None): "empty",
    list: "a list",
    dict: "a mapping",
}


def _name(kind: type) -> str:
    return _NAMES.get(kind, kind.__name__)


def _is_argument(value: object) -> bool:
    if isinstance(value, list | tuple):
        return all(_is_argument(item) and not isinstance(item, list | tuple) for item in value)
    return value is None or isinstance(value, bool | int | float | str)


def _expected(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, typing.get_args(hint)))
    if typing.get_origin(hint) is tuple:
        return f"a list, each {_expected(typing.get_args(hint)[0])}"
    return _name(typing.get_origin(hint) or hint)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def plain(value: Any) -> Any:
    """`value` with lists for tuples, in mappings too, as YAML knows them."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, tuple) else value


def merged(base: Any, patch: Any) -> Any:
    """`base` with the nested mapping `patch` laid over it; unknown keys pass through for `read` to name."""
    if not (isinstance(base, dict) and isinstance(patch, dict)):
        return patch
    return {**base, **{key: merged(base.get(key), item) for key, item in patch.items()}}
