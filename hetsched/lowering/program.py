"""The program of launches that a part is: kernels of its functions in the place of calls.

Importing this file loads TVM's compiler.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from hetsched.graph import Graph
from hetsched.launches import (
    CONSTANT,
    INPUT,
    OUTPUT,
    WEIGHT,
    WORKSPACE,
    Launch,
    Place,
    Program,
)
from hetsched.lowering.entry import COPY, Calls, Memory, placed


@dataclass(frozen=True)
class Step:
    """A launch of one of a function's kernels.

    For each pointer, `arguments` have the number of a parameter of the function, or behind these
    of a temporary, and whether it is written.
    """

    kernel: str
    global_size: tuple[int, ...]
    local_size: tuple[int, ...]
    arguments: tuple[tuple[int, bool], ...]
    shared_nbytes: int = 0


@dataclass(frozen=True)
class Steps:
    """A function as launches, one behind another, and the bytes of each of its temporaries."""

    launches: tuple[Step, ...]
    temporaries: tuple[int, ...] = ()


def copies(calls: Calls) -> dict[str, int]:
    """The functions that only copy, by the name that `assembled` knows them by: bytes of each.

    Their first parameter is what is read, the second what is written.
    """
    return {
        _copy(memories[0].nbytes): memories[0].nbytes
        for name, memories in calls.calls
        if name == COPY
    }


def assembled(
    graph: Graph,
    weights: Mapping[str, np.ndarray],
    calls: Calls,
    steps: Mapping[str, Steps],
    language: str,
    source: str,
    alignment: int,
) -> Program:
    """The program of a part that makes these calls, each of `steps` by the function's name.

    `steps` have also what `copies` names. Tensors between launches share the workspace with
    temporaries; each place in it starts at a multiple of `alignment`.
    """
    launches: list[tuple[Step, list[Memory]]] = []
    between = list(calls.between)
    # Memories live from launch to launch, of which a call is several.
    spans: list[tuple[int, int]] = []
    for name, memories in calls.calls:
        if name == COPY:
            name, memories = _copy(memories[0].nbytes), memories[::-1]
        now = len(spans)
        own = [Memory(nbytes, first=now, last=now) for nbytes in steps[name].temporaries]
        between += own
        first = len(launches)
        launches += [(step, [*memories, *own]) for step in steps[name].launches]
        spans.append((first, max(first, len(launches) - 1)))
    for memory in between:
        memory.first, memory.last = spans[memory.first][0], spans[memory.last][1]
    nbytes = placed(between, alignment)
    for memory in between:
        memory.row = calls.workspace
    regions: list[tuple[str, int | str]] = [
        *((INPUT, index) for index in range(len(graph.inputs))),
        *((WEIGHT, name) for name in weights),
        (CONSTANT, 0),
        *((OUTPUT, index) for index in range(len(graph.computed))),
        (WORKSPACE, 0),
    ]
    return Program(
        language,
        source,
        tuple(map(graph.handed, graph.inputs)),
        tuple(map(graph.handed, graph.computed)),
        tuple(
            Launch(
                step.kernel,
                step.global_size,
                step.local_size,
                tuple(
                    Place(*regions[there[i].row or 0], there[i].start, there[i].nbytes, written)
                    for i, written in step.arguments
                ),
                step.shared_nbytes,
            )
            for step, there in launches
        ),
        {name: array.nbytes for name, array in weights.items()},
        calls.constants,
        nbytes,
    )


def _copy(nbytes: int) -> str:
    return f"copy_{nbytes}"
