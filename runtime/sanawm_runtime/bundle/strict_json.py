"""Strict JSON from untrusted bytes into typed dataclasses."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
import types
import typing
from typing import Any, Literal, Union, get_args, get_origin

from sanawm.errors import BundleError, UserError

# Deeper than any manifest needs and far from the interpreter's recursion limit.
MAX_DEPTH = 32
_INT64 = 2**63

_WORDS: dict[Any, str] = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "text",
    dict: "an object",
    list: "a list",
    types.NoneType: "null",
}


def parse_json(data: bytes, what: str, *, max_bytes: int) -> Any:
    """Parse one JSON document.

    `data` is UTF-8, at most `max_bytes` long; `what` names the file in messages. Refused beyond what JSON itself refuses: repeated keys,
    NaN and infinities, integers outside 64 bits, unpaired surrogates, nesting beyond `MAX_DEPTH`. Raises BundleError.
    """
    if len(data) > max_bytes:
        raise BundleError(f"{what}: {len(data):,} bytes, and the limit is {max_bytes:,}; this is not a file that sanawm wrote")

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(items)
        if len(found) != len(items):
            names = [name for name, _ in items]
            twice = next(name for name in names if names.count(name) > 1)
            raise BundleError(f"{what}: the key {twice!r} appears twice in one object; rebuild the bundle")
        return found

    def integer(text: str) -> int:
        if len(text) > 20 or not -_INT64 <= int(text) < _INT64:
            raise BundleError(f"{what}: the integer {text[:24]}… does not fit 64 bits; rebuild the bundle")
        return int(text)

    def number(text: str) -> float:
        value = float(text)
        if not math.isfinite(value):
            raise BundleError(f"{what}: the number {text[:24]} is not finite; rebuild the bundle")
        return value

    def constant(text: str) -> Any:
        raise BundleError(f"{what}: {text} is not a JSON number; rebuild the bundle")

    try:
        document = json.loads(
            data.decode("utf-8"), object_pairs_hook=pairs, parse_int=integer, parse_float=number, parse_constant=constant
        )
    except UnicodeDecodeError as error:
        raise BundleError(f"{what}: not UTF-8 text (byte {error.start}); the file is damaged, copy or rebuild the bundle") from None
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise BundleError(f"{what}: not valid JSON at {place} ({error.msg}); the file is damaged, copy or rebuild the bundle") from None
    except RecursionError:
        raise BundleError(f"{what}: nested deeper than {MAX_DEPTH} levels; this is not a file that sanawm wrote") from None
    _check_tree(document, what)
    return document


def _check_tree(document: Any, what: str) -> None:
    level = [document]
    depth = 0
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            raise BundleError(f"{what}: nested deeper than {MAX_DEPTH} levels; this is not a file that sanawm wrote")
        below: list[Any] = []
        for node in level:
            if isinstance(node, dict):
                below.extend(node)
                below.extend(node.values())
            elif isinstance(node, list):
                below.extend(node)
            elif isinstance(node, str) and not node.isascii() and any("\ud800" <= letter <= "\udfff" for letter in node):
                raise BundleError(f"{what}: holds text with an unpaired surrogate; the file is damaged, copy or rebuild the bundle")
        level = below


def decode(kind: Any, data: Any, where: str) -> Any:
    """Turn parsed JSON into `kind`: a dataclass, a basic type, `T | None`, `Literal`, `tuple[T, ...]`, `dict[str, T]` or `Any`.

    Types must match exactly (true is no integer; an integer serves as a float). A dataclass refuses unknown fields, and missing ones
    without a default. `where` is the JSON path so far. Raises BundleError that names the path.
    """
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return data
    if dataclasses.is_dataclass(kind):
        return _decode_dataclass(kind, data, where)
    if origin in (Union, types.UnionType):
        if data is None and types.NoneType in arguments:
            return None
        (inner,) = (argument for argument in arguments if argument is not types.NoneType)
        return decode(inner, data, where)
    if origin is Literal:
        if not any(type(data) is type(choice) and data == choice for choice in arguments):
            raise BundleError(f"{where}: expected one of {', '.join(map(repr, arguments))}, found {_show(data)}; rebuild the bundle")
        return data
    if origin is tuple:
        _expect(list, data, where)
        return tuple(decode(arguments[0], value, f"{where}[{index}]") for index, value in enumerate(data))
    if origin is dict:
        _expect(dict, data, where)
        return {name: decode(arguments[1], value, f"{where}.{_printable(name)}") for name, value in data.items()}
    if kind is dict:
        _expect(dict, data, where)
        return data
    if kind is float and type(data) is int:
        return float(data)
    _expect(kind, data, where)
    return data


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _decode_dataclass(kind: Any, data: Any, where: str) -> Any:
    _expect(dict, data, where)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    if unknown := [name for name in data if name not in fields]:
        raise BundleError(f"{where}: unknown field {_show(unknown[0])}; the bundle was made by another version of sanawm, rebuild it")
    required = (
        name for name, field in fields.items() if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    )
    if missing := [name for name in required if name not in data]:
        raise BundleError(f"{where}: the field '{missing[0]}' is missing; the bundle was made by another version of sanawm, rebuild it")
    hints = _hints(kind)
    values = {name: decode(hints[name], value, f"{where}.{name}") for name, value in data.items()}
    try:
        return kind(**values)
    except BundleError:
        raise
    except (UserError, ValueError, ArithmeticError) as error:
        # Only checks that a dataclass makes on its own values (__post_init__) can raise here; the types are right already.
        raise BundleError(f"{where}: {error}; rebuild the bundle") from None


def _expect(kind: Any, data: Any, where: str) -> None:
    if type(data) is not kind:
        raise BundleError(f"{where}: expected {_WORDS[kind]}, found {_show(data)}; rebuild the bundle")


def _printable(name: str) -> str:
    # Messages reach a terminal: keys are quoted and escaped unless they are plain words.
    return name if re.fullmatch(r"[A-Za-z0-9_./+-]{1,80}", name) else _show(name)


def _show(data: Any) -> str:
    if isinstance(data, dict | list):
        return _WORDS[type(data)]
    text = json.dumps(data)
    return text if len(text) <= 40 else text[:40] + "…"
