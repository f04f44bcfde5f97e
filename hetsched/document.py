"""JSON documents that others write: parsed, checked, and refused with the way to what is wrong."""

import json
from typing import Any

from hetsched.errors import HetschedError

NUMBER = (int, float)


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
