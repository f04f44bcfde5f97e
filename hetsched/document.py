"""JSON documents that others write: parsed, checked, and refused with the way to what is wrong."""

import json
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar

from hetsched.errors import DeviceError, HetschedError

NUMBER = (int, float)
# What stands for infinity in JSON, which has no number for it.
UNLIMITED = "unlimited"

T = TypeVar("T")


def parse(text: str, error: type[HetschedError], what: str) -> Any:
    """The content of a JSON text; `what` names it in the message.

    Raises
    ------
    HetschedError
        An `error`: the text is no JSON.
    """
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as reason:
        raise error(f"{what} is no JSON: {reason}") from None


def check(value: Any, shape: Any, where: str, error: type[HetschedError], found: str = "") -> None:
    """Whether `value` has `shape`: a type or several, a list of one shape, or a record.

    A record is a dict of named shapes, of which a name that ends with `?` may be absent, or, under
    the key `str`, of a shape for any name.

    Raises
    ------
    HetschedError
        An `error`: something is missing or of the wrong kind; the message has `found` and the way
        to it.
    """
    if isinstance(shape, dict | list):
        fits = isinstance(value, type(shape))
    else:
        kinds = shape if isinstance(shape, tuple) else (shape,)
        # Python counts a truth value as an integer.
        fits = isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))
    if not fits:
        raise error(f"{found}{where} is {value!r:.40}")
    if isinstance(shape, list):
        for index, item in enumerate(value):
            check(item, shape[0], f"{where}[{index}]", error, found)
    elif isinstance(shape, dict) and str in shape:
        for key in value:
            check(value[key], shape[str], f"{where}.{key}", error, found)
    elif isinstance(shape, dict):
        for key, inner in shape.items():
            name = key.removesuffix("?")
            if name in value:
                check(value[name], inner, f"{where}.{name}", error, found)
            elif name == key:
                raise error(f"{found}{where} lacks '{name}'")


def record(kind: type[T], item: Mapping[str, Any]) -> T:
    """The device or link that `plain` wrote, or that a machine file describes.

    Raises
    ------
    DeviceError
        A key or value that does not belong, or a field that is missing.
    """
    known = {f.name: f for f in fields(kind)}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for key, value in item.items():
        if key not in known:
            raise DeviceError(
                f"'{key}' is no field of a {kind.__name__.lower()}; there are {', '.join(known)}"
            )
        values[key] = _checked(known[key].type, key, value)
    try:
        return kind(**values)
    except TypeError as error:
        raise DeviceError(f"a {kind.__name__.lower()} is incomplete: {error}") from None


def _checked(kind: Any, key: str, value: Any) -> Any:
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        if not value >= 0:
            raise DeviceError(f"'{key}' is {value}; it must not be negative")
        if value == 0 and key.endswith("_per_second"):
            raise DeviceError(f"'{key}' is 0; it must be positive")
        return float(value)
    if kind is float and value == UNLIMITED:
        return float("inf")
    if kind is int and isinstance(value, int) and not isinstance(value, bool):
        if value < 0:
            raise DeviceError(f"'{key}' is {value}; it must not be negative")
        return value
    if kind is str and isinstance(value, str):
        return value
    if kind is bool and isinstance(value, bool):
        return value
    if kind == tuple[int, ...] and isinstance(value, list | tuple):
        if not all(isinstance(item, int) and item >= 0 for item in value):
            raise DeviceError(f"'{key}' is {value!r}, which is not a list of natural numbers")
        return tuple(value)
    if kind == tuple[float, ...] and isinstance(value, list | tuple):
        return tuple(_checked(float, key, item) for item in value)
    raise DeviceError(f"'{key}' is {value!r}, which is not a {getattr(kind, '__name__', kind)}")


def plain(item: Any) -> dict[str, Any]:
    """The fields of a device or link for JSON, without those that have their default."""
    found = {}
    for f in fields(item):
        value = getattr(item, f.name)
        if value == f.default:
            continue
        if isinstance(value, tuple):
            value = list(value)
        found[f.name] = UNLIMITED if value == float("inf") else value
    return found
