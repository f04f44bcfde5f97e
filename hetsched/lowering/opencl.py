"""A part as a program of launches, for OpenCL devices that compute on a processor.

The part goes the way of the `cpu` target, with the same schedules; only the last step differs: the
loops of each function become kernels in OpenCL C, and a launch of each stands where the processor's
code has a call. On a device of one compute unit a function is one kernel of a single work-item. On
more, the parallel loops of a function are kernels whose work-items share them out.

In the source several of these are the cases of one kernel, as a driver may keep few kernels open:
PoCL 3.1 has 128 in a process, and opens a library at each launch of another.

Importing this file loads TVM's compiler.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import tvm
from tvm import s_tir, tirx

from hetsched.graph import Graph
from hetsched.launches import APART, MOST_LETTERS, Launch, Place, Program
from hetsched.lowering.entry import PREFIX, Calls, calls_of
from hetsched.lowering.kernels import (
    MOST_PARAMETERS,
    QUADS_LANES,
    Kernels,
    Nest,
    kernels,
)
from hetsched.lowering.program import Step, Steps, assembled, copies
from hetsched.lowering.relax import compile_part, fuse, lowered, passes, refusal_of
from hetsched.operation import flops
from hetsched.schedules.rules import Rules

# Of a buffer within a buffer: no device asks for more.
ALIGNMENT = 512
TARGET = tvm.target.Target("opencl")
# No scheduler looks for other work-items in a group, and a compiler need not prepare for them.
# For some processors LLVM halves vectors of 512 bits, unless a function says that it needs them.
HEAD = "__attribute__((reqd_work_group_size(1, 1, 1), min_vector_width(512)))\n__kernel void "
# A launch takes PoCL as long as so much arithmetic, 0.9 us. Parts whose launches do less are one
# kernel; of larger ones, some get slower as such: LLVM has more to keep apart.
JOINED_FLOPS = 1_000_000
JOINED = "part"
GATHERED = "kernels"
FUNCTION = "static void "
# Of the functions that are one kernel, five to thirty: built as fast as each alone.
KERNEL_LETTERS = 128_000
# Copies all of a tensor, four bytes at a time or one.
COPIES = {
    4: "(__global const uint* restrict a0, __global uint* restrict a1) {{\n"
    "  for (int i = 0; i < {count}; ++i) a1[i] = a0[i];\n}}\n",
    1: "(__global const uchar* restrict a0, __global uchar* restrict a1) {{\n"
    "  for (int i = 0; i < {count}; ++i) a1[i] = a0[i];\n}}\n",
}


def program(
    graph: Graph, rules: Rules, units: int = 1, alignment: int = ALIGNMENT
) -> tuple[Program, Mapping[str, np.ndarray]]:
    """The part for a device of so many compute units, and the weights that it reads, by name.

    Each place in it starts at a multiple of `alignment` bytes. On one unit, a part of small
    functions is one kernel that calls them in turn. Instructions that multiply bytes are those of
    the processor of `rules`; where the device has none, C stands for them.

    Raises
    ------
    CompileError
        The part has something that no kernel can be made of.
    """

    vectors = rules.vectors
    dot = "quads" if vectors.dot == "vnni" and vectors.lanes == QUADS_LANES else "pairs"
    rules = replace(rules, vectors=replace(vectors, dot=dot))

    def build(module: Any) -> tuple[Calls, Mapping[str, Steps], _Sources]:
        with passes:
            calls = calls_of(module, alignment)
            sources = _Sources()
            steps = {
                name: _steps(sources, name, kernels(function, units))
                for name, function in flattened(calls.functions).items()
            }
        for name, nbytes in copies(calls).items():
            steps[name] = _steps(sources, "copy", _copying(nbytes))
        return calls, steps, sources

    (calls, steps, sources), part = compile_part(graph, build, rules, interpreted=True, sorts=False)
    made = assembled(graph, part.weights, calls, steps, "opencl", sources.text(), alignment)
    small = units == 1 and sum(map(flops, graph.ops)) < JOINED_FLOPS * len(made.launches)
    joined = _joined(made, sources) if small else None
    return joined or _gathered(made, sources), part.weights


def why_not(graph: Graph) -> str | None:
    """Why no program can be made of `graph`, or None; quick, as no loops are scheduled."""

    def attempt(part: Graph) -> Calls:
        return calls_of(fuse(lowered(part, sorts=False)).module)

    return refusal_of(graph, attempt)


def _steps(sources: "_Sources", name: str, made: Kernels) -> Steps:
    launches = (
        Step(sources.named(name, nest), (nest.items,), (1,), nest.arguments) for nest in made.nests
    )
    return Steps(tuple(launches), made.temporaries)


def _copying(nbytes: int) -> Kernels:
    each = 1 if nbytes % 4 else 4
    text = COPIES[each].format(count=nbytes // each)
    return Kernels((Nest(text, ((0, False), (1, True)), 1, ()),), ())


def _joined(program: Program, sources: "_Sources") -> Program | None:
    """The program as one launch of a kernel that calls its kernels, if that takes all regions."""
    regions = list(
        dict.fromkeys((p.region, p.which) for launch in program.launches for p in launch.arguments)
    )
    if len(program.launches) < 2 or len(regions) > MOST_PARAMETERS:
        return None
    written = {
        (p.region, p.which) for launch in program.launches for p in launch.arguments if p.written
    }
    parameters = ", ".join(
        f"__global {'' if region in written else 'const '}uchar* r{index}"
        for index, region in enumerate(regions)
    )
    calls = []
    for launch in program.launches:
        arguments = ", ".join(
            f"(__global {'' if place.written else 'const '}void*)"
            f"(r{regions.index((place.region, place.which))} + {place.start})"
            for place in launch.arguments
        )
        calls.append(f"  {launch.kernel}({arguments});\n")
    names = dict.fromkeys(launch.kernel for launch in program.launches)
    source = (
        f"{sources.helpers}{''.join(map(sources.function, names))}"
        f"\n{HEAD}{JOINED}({parameters}) {{\n{''.join(calls)}}}\n"
    )
    places = tuple(
        Place(*region, 0, program.region_nbytes(*region), region in written) for region in regions
    )
    return replace(program, source=source, launches=(Launch(JOINED, (1,), (1,), places),))


def _gathered(program: Program, sources: "_Sources") -> Program:
    """The program with its kernels as cases of fewer ones.

    Such a kernel has as many pointers as any of its cases; others get their first one again.
    """
    pointers = {launch.kernel: len(launch.arguments) for launch in program.launches}
    groups: list[list[str]] = []
    letters = 0
    for name in pointers:
        letters += len(sources.function(name))
        if not groups or letters > KERNEL_LETTERS:
            groups.append([])
            letters = len(sources.function(name))
        groups[-1].append(name)
    kernels: list[str] = []
    # By the function: its kernel, what it is there, and how many pointers that has.
    places: dict[str, tuple[str, int | None, int]] = {}
    for group in groups:
        if len(group) == 1:
            (name,) = group
            kernels.append(sources.kernel(name))
            places[name] = name, None, pointers[name]
            continue
        whole, most = f"{GATHERED}{len(kernels)}", max(pointers[name] for name in group)
        names = [f"p{index}" for index in range(most)]
        cases = []
        for case, name in enumerate(group):
            places[name] = whole, case, most
            cases.append(f"  case {case}: {name}({', '.join(names[: pointers[name]])}); break;\n")
        parameters = ", ".join([*(f"__global void* {name}" for name in names), "int which"])
        kernels.append(
            f"{''.join(map(sources.function, group))}\n"
            f"{HEAD}{whole}({parameters}) {{\n"
            f"  switch (which) {{\n{''.join(cases)}  }}\n}}\n"
        )

    def moved(launch: Launch) -> Launch:
        kernel, case, most = places[launch.kernel]
        more = launch.arguments[:1] * (most - len(launch.arguments))
        return replace(launch, kernel=kernel, case=case, arguments=launch.arguments + more)

    return replace(
        program,
        source=APART.join([sources.helpers, *kernels]),
        launches=tuple(map(moved, program.launches)),
    )


class _Sources:
    """The loops of a program, each distinct text once."""

    def __init__(self) -> None:
        self._names: dict[str, str] = {}
        self._texts: dict[str, str] = {}
        self._helpers: dict[str, None] = {}

    def named(self, function: str, nest: Nest) -> str:
        """The name of the kernel for these loops of a function."""
        self._helpers |= dict.fromkeys(nest.helpers)
        if nest.text not in self._names:
            readable = re.sub(r"\W", "", function.removeprefix(PREFIX))
            name = f"k{len(self._names)}_{readable}"[:MOST_LETTERS]
            self._names[nest.text], self._texts[name] = name, nest.text
        return self._names[nest.text]

    @property
    def helpers(self) -> str:
        """The functions that all of them may call."""
        return "".join(self._helpers)

    def kernel(self, name: str) -> str:
        return f"{HEAD}{name}{self._texts[name]}"

    def function(self, name: str) -> str:
        """The same for kernels to call."""
        return f"{FUNCTION}{name}{self._texts[name]}"

    def text(self) -> str:
        """All of them, each as a kernel."""
        return "".join([self.helpers, *map(self.kernel, self._texts)])


def flattened(functions: Mapping[str, Any]) -> dict[str, Any]:
    """The functions as loops over flat buffers and vectors, as TVM lowers them."""
    module = tvm.IRModule(
        {
            tvm.ir.GlobalVar(name): function.with_attr("global_symbol", name).with_attr(
                "target", TARGET
            )
            for name, function in functions.items()
        }
    )
    steps = [
        s_tir.transform.CanonicalizeLoop(),
        s_tir.transform.LowerInitBlock(),
        s_tir.transform.PlanAndUpdateBufferAllocationLocation(),
        s_tir.transform.ConvertBlocksToOpaque(),
        s_tir.transform.CompactBufferAllocation(),
        s_tir.transform.LowerMatchBuffer(),
        s_tir.transform.StmtSimplify(),
        s_tir.transform.LowerOpaqueBlock(),
        tirx.transform.FlattenBuffer(),
        tirx.transform.NarrowDataType(32),
        s_tir.transform.LoopPartition(),
        tirx.transform.VectorizeLoop(True),
        s_tir.transform.HoistIfThenElse(),
        tirx.transform.UnrollLoop(),
        s_tir.transform.RenormalizeSplitPattern(),
        tirx.transform.StmtSimplify(),
        tirx.transform.RemoveNoOp(),
        s_tir.transform.RewriteUnsafeSelect(),
        tirx.transform.LowerIntrin(),
    ]
    found = tvm.transform.Sequential(steps)(module)
    return {variable.name_hint: function for variable, function in found.functions.items()}
