"""What a verb is given: models, machines, plans, packages and places to write to."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer

import hetsched
from hetsched.cli.options import shapes_of
from hetsched.cli.progress import Fallbacks, Steps
from hetsched.errors import HetschedError, OutputFileError, PlanError
from hetsched.graph import Graph
from hetsched.inputs import read_inputs, seeded_inputs
from hetsched.plan import Plan, Recipe, read_recipe
from hetsched.store import Store, default_path
from hetsched.system import System


def read_model(model: Path, shape: list[str] | None, steps: Steps) -> Graph:
    shapes = shapes_of(shape or ())
    stage = steps.begin("reading the model")
    count = 0

    def told(what: str) -> None:
        nonlocal count
        count += 1
        stage(what, count - 1, count)

    return hetsched.read_onnx(model, shapes, told)


def machine_of(
    devices: str | None,
    system: Path | None,
    winograd: str | None,
    store: Path | None,
    steps: Steps,
    fallback: Fallbacks | None = None,
) -> System:
    if devices and system:
        raise typer.BadParameter("give --devices or --system, not both", param_hint="'--system'")
    if system:
        return with_winograd(System.load(system), winograd)
    steps.begin("measuring links")
    return with_winograd(System.local(devices or "cpu", store_of(store), fallback), winograd)


def fallbacks_of(allowed: bool, strict: bool = False) -> Fallbacks | None:
    """Where a command tells of devices that it goes on without, if it may."""
    if allowed and strict:
        raise typer.BadParameter("--strict forbids what --fallback allows")
    return Fallbacks() if allowed else None


def with_winograd(system: System, winograd: str | None) -> System:
    return system if winograd is None else system.with_options("cpu", winograd=winograd)


def store_of(path: Path | None) -> Store:
    return Store(path or default_path())


def inputs_of(graph: Graph, path: Path | None, seed: int) -> Mapping[str, Any]:
    return read_inputs(path) if path else seeded_inputs(graph, seed)


def plan_of(path: Path) -> Plan | Recipe:
    """The plan of a package, or what a plan file has of one."""
    if is_package(path):
        return hetsched.load(path).plan
    with naming_file(path):
        return read_recipe(text_of(path))


def plan_text(path: Path) -> str:
    if is_package(path):
        return hetsched.load(path).plan.to_json()
    with naming_file(path):
        return text_of(path)


def is_package(path: Path) -> bool:
    if path.suffix == ".hsp":
        return True
    try:
        with path.open("rb") as file:
            return file.read(2) == b"PK"
    except OSError:
        # Whoever reads it will say what is wrong.
        return False


def refuse(options: Mapping[str, object], why: str) -> None:
    for name, value in options.items():
        if value:
            raise typer.BadParameter(f"{name} {why}")


def check_writable(path: Path | None) -> None:
    """Says before long work what would only be said after it."""
    if path is None:
        return
    if path.is_dir():
        raise OutputFileError(f"cannot write '{path}': it is a folder")
    if not path.parent.is_dir():
        raise OutputFileError(f"cannot write '{path}': '{path.parent}' is no folder")


def text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise PlanError(str(error.strerror)) from None
    except UnicodeDecodeError:
        raise PlanError("it is not text") from None


@contextmanager
def naming_file(path: Path) -> Iterator[None]:
    """Names the file that an error of its content comes from."""
    try:
        yield
    except HetschedError as error:
        raise type(error)(f"plan file '{path}': {error}") from None
