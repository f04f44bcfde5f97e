"""Scheduled functions as kernels in source form, and how each function calls them.

TVM splits a function into what a device computes and what the host does, which is no more than to
allocate memory between kernels and to launch them. So the host's half is read, not compiled.

Importing this file loads TVM's compiler.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import tvm
from tvm import tirx
from tvm.tirx.build import codegen_build, split_host_device_mods
from tvm_ffi import structural_map, structural_walk

from hetsched.errors import UnsupportedOperation
from hetsched.lowering.entry import PREFIX
from hetsched.lowering.program import Step, Steps

# The pass behind which kernels and host are functions of their own.
SPLIT = "tirx.SplitHostDevice"
SHARED_NBYTES = "tirx.use_dyn_shared_memory"
AXES, GROUP, THREAD = "xyz", "blockIdx", "threadIdx"
# TVM's first lines of CUDA C, which need headers of packages, and what does in their place.
HEADERS = re.compile(r"#ifdef __CUDACC_RTC__.*?<cuda\.h>\n#endif\n", re.DOTALL)
PREAMBLE = """#ifdef __CUDACC_RTC__
typedef signed char int8_t;
typedef short int16_t;
typedef int int32_t;
typedef long long int64_t;
typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef unsigned int uint32_t;
typedef unsigned long long uint64_t;
#else
#include <cstdint>
#endif
"""
# C's names of functions of float32, which OpenCL C calls by the name alone.
FLOAT_NAMES = re.compile(r"\b(a?(?:cos|sin|tan)h?|atan2|erf|expm1|log1p|round|trunc)f(?=\()")
# In OpenCL C, where a kernel begins; and the attribute that tells its compiler the group.
LONGEST_NAME = 48
KERNEL = re.compile(r"__kernel void (\w+)\(([^{};]*)\)(?=\s*\{)")


@dataclass(frozen=True, eq=False)
class DeviceCode:
    """Kernels in `source`, and what each function launches, by its name."""

    source: str
    steps: Mapping[str, Steps]


def device_code(given: Mapping[str, Any], target: Any) -> DeviceCode:
    """The code of scheduled functions, by their names, for a device of `target`.

    Raises
    ------
    UnsupportedOperation
        A function does something between its kernels.
    """
    short = {name: _short(name, index) for index, name in enumerate(given)}
    functions = {short[name]: function for name, function in given.items()}
    named = {
        tvm.ir.GlobalVar(name): function.with_attr("global_symbol", name)
        for name, function in functions.items()
    }
    hosted = target.with_host(tvm.target.Target("llvm"))
    module = tirx.transform.BindTarget(hosted)(tvm.IRModule(named))
    lower, _, finalise = tirx.get_default_tir_pipeline(hosted)
    split = _After(SPLIT)
    with tvm.transform.PassContext(instruments=[split]), hosted:
        module = lower(module)
    there = {variable.name_hint: function for variable, function in split.module.functions.items()}
    steps = {name: _steps(short[name], there) for name in given}
    _, kernels = split_host_device_mods(module)
    if not kernels:
        return DeviceCode("", steps)
    ((device, code),) = kernels.items()
    code = finalise()(code)
    if str(target.kind.name) == "cuda":
        source = HEADERS.sub(PREAMBLE, _source(code, device))
    else:
        source = FLOAT_NAMES.sub(r"\1", _source(_exact(code), device))
        source = _with_group_sizes(source, steps)
    return DeviceCode(source, steps)


def _source(code: Any, device: Any) -> str:
    return str(codegen_build(code, device).inspect_source())


def _exact(module: Any) -> Any:
    """Kernels whose numbers are written by their bits where TVM's six digits would change them."""

    def number(found: Any) -> Any:
        value = np.float32(found.value)
        if str(found.ty.dtype) != "float32" or np.float32(f"{value:.6e}") == value:
            return found
        bits = tirx.IntImm("int32", int(value.view(np.int32)))
        return tirx.call_pure_extern("float32", "as_float", bits)

    functions = {
        variable: function.with_body(structural_map(function.body, (tirx.FloatImm, number)))
        for variable, function in module.functions.items()
    }
    return tvm.IRModule(functions, attrs=module.attrs)


def _short(name: str, index: int) -> str:
    """A name for a function, and so for its kernels, that is not too long for any compiler."""
    plain = re.sub(r"\W", "_", name.removeprefix(PREFIX).removeprefix("fused_"))
    return f"f{index}_{plain[:LONGEST_NAME]}"


@tvm.ir.instrument.pass_instrument
class _After:
    """Keeps the module as the pass of a name leaves it."""

    def __init__(self, name: str) -> None:
        self._name = name
        self.module: Any = None

    def run_after_pass(self, module: Any, info: Any) -> None:
        if info.name == self._name:
            self.module = module


def _steps(name: str, functions: Mapping[str, Any]) -> Steps:
    """What the host's half of a function allocates and launches."""
    function = functions[name]
    known: dict[Any, int] = {parameter: index for index, parameter in enumerate(function.params)}
    temporaries: list[int] = []
    launches: list[Step] = []
    for statement in _statements(function.body):
        match statement:
            case tirx.AllocBuffer():
                buffer = statement.buffer
                known[buffer] = len(function.params) + len(temporaries)
                itemsize = tvm.DataType(str(buffer.dtype)).itemsize
                temporaries.append(prod(map(int, buffer.shape)) * itemsize)
            case tirx.DeclBuffer():
                known[statement.buffer] = known[_buffer_of(name, statement.data)]
            case tirx.Evaluate():
                launches.append(_step(name, statement.value, known, functions))
            case _:
                raise UnsupportedOperation(f"'{name}' does more than launch kernels")
    return Steps(tuple(launches), tuple(temporaries))


def _step(name: str, call: Any, known: Mapping[Any, int], functions: Mapping[str, Any]) -> Step:
    if getattr(getattr(call, "op", None), "name", "") != "tirx.call_ffi_kernel":
        raise UnsupportedOperation(f"'{name}' does more than launch kernels")
    kernel = str(call.args[0].value)
    tags = [str(tag) for tag in call.attrs.launch_params]
    passed = list(call.args[1:])
    first = len(passed) - len(tags)
    sizes = {tag: int(size) for tag, size in zip(tags, passed[first:], strict=True)}
    groups, threads = (
        [sizes.pop(f"{index}.{axis}", 1) for axis in AXES] for index in (GROUP, THREAD)
    )
    shared = sizes.pop(SHARED_NBYTES, 0)
    if sizes:
        raise UnsupportedOperation(f"'{name}' launches a kernel along {min(sizes)}")
    stored = _stored(functions[kernel])
    arguments = [
        (known[_buffer_of(name, argument)], any(parameter.same_as(other) for other in stored))
        for argument, parameter in zip(passed[:first], functions[kernel].params, strict=True)
    ]
    whole = tuple(count * size for count, size in zip(groups, threads, strict=True))
    return Step(kernel, whole, tuple(threads), tuple(arguments), shared)


def _buffer_of(name: str, address: Any) -> Any:
    """The buffer whose address a kernel gets."""
    if getattr(getattr(address, "op", None), "name", "") != "tirx.buffer_data":
        raise UnsupportedOperation(f"'{name}' passes a kernel what is no address of a buffer")
    return address.args[0]


def _statements(body: Any) -> Iterator[Any]:
    """The statements of a host's function, in order."""
    match body:
        case tirx.SeqStmt():
            for item in body.seq:
                yield from _statements(item)
        case tirx.AttrStmt():
            yield from _statements(body.body)
        case _:
            yield body


def _stored(kernel: Any) -> list[Any]:
    """The parameters of a kernel that it stores to."""
    declared: dict[Any, Any] = {}
    stored: list[Any] = []

    def declare(statement: Any) -> None:
        declared[statement.buffer] = statement.data

    def store(statement: Any) -> None:
        stored.append(statement.buffer)

    walks = [(tirx.DeclBuffer, declare), (tirx.BufferStore, store)]
    structural_walk(kernel.body, walks, order="post")
    return [declared[buffer] for buffer in stored if buffer in declared]


def _with_group_sizes(source: str, steps: Mapping[str, Steps]) -> str:
    """The source in which each kernel says how many work-items are in a group.

    A compiler that knows can do without a general version, and use more registers.
    """
    sizes = {step.kernel: step.local_size for own in steps.values() for step in own.launches}

    def told(match: re.Match[str]) -> str:
        x, y, z = sizes[match[1]]
        return f"__attribute__((reqd_work_group_size({x}, {y}, {z}))) {match[0]}"

    return KERNEL.sub(told, source)
