"""Extensions: one file each, found by its name.

A kind of extension (`Partitioner`, `CostModel`, `Target`, ...) is an abstract class with a
`package`, the place where its files are. `partitioners/task.py` is the partitioner `task`: nothing
else registers it. The fields of the dataclass in the file are its options, on the command line as
in Python: `--partitioner layerwise:stages=3` is `Layerwise(stages=3)`.
"""

from abc import ABC
from dataclasses import Field, fields, is_dataclass
from importlib import import_module
from pkgutil import iter_modules
from typing import Any, ClassVar, TypeVar

from hetsched.errors import PluginError


class Plugin(ABC):
    """What every kind of extension is."""

    package: ClassVar[str]

    @property
    def name(self) -> str:
        """The name of the extension's file."""
        return type(self).__module__.rpartition(".")[2]


P = TypeVar("P", bound=Plugin)


def names(base: type[Plugin]) -> list[str]:
    """The extensions there are, from the file names alone: nothing is imported."""
    path = import_module(base.package).__path__
    return sorted(module.name for module in iter_modules(path) if not module.name.startswith("_"))


def load(base: type[P], spec: str) -> P:
    """The extension named by `spec`, such as `task` or `layerwise:stages=3`.

    Raises
    ------
    PluginError
        There is no such extension, or it has no such option.
    """
    name, _, options = spec.partition(":")
    found = names(base)
    if name not in found:
        kind = base.package.rpartition(".")[2]
        raise PluginError(f"no '{name}' in {kind}; there are {', '.join(found)}")
    module = import_module(f"{base.package}.{name}")
    for value in vars(module).values():
        if (
            isinstance(value, type)
            and issubclass(value, base)
            and value.__module__ == module.__name__
        ):
            return value(**_options(value, spec, options))
    raise PluginError(f"{module.__file__} defines no {base.__name__}")


def _options(kind: type[Plugin], spec: str, text: str) -> dict[str, Any]:
    known: dict[str, Field] = {f.name: f for f in fields(kind)} if is_dataclass(kind) else {}
    given: dict[str, Any] = {}
    for item in filter(None, text.split(",")):
        key, equals, value = item.partition("=")
        if key not in known or not equals:
            there = ", ".join(f"{f.name}={f.default}" for f in known.values()) or "none"
            raise PluginError(f"'{item}' is not an option in '{spec}'; there are: {there}")
        given[key] = _parse(value, known[key].type, spec)
    return given


def _parse(text: str, kind: Any, spec: str) -> Any:
    try:
        if kind in (bool, "bool"):
            return {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}[
                text.lower()
            ]
        return {int: int, "int": int, float: float, "float": float}.get(kind, str)(text)
    except (KeyError, ValueError) as error:
        raise PluginError(
            f"'{text}' in '{spec}' is not a {getattr(kind, '__name__', kind)}"
        ) from error
