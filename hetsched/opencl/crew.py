"""A program on an OpenCL device as code for a crew: `crew.c` calls OpenCL itself.

Where device and host share memory nothing is copied: a kernel takes the address of what lies in
memory that OpenCL has allocated, and a buffer lends other memory for a call.
"""

from collections.abc import Callable, Sequence
from ctypes import CDLL, CFUNCTYPE, c_int, c_void_p, cast
from functools import partial
from math import prod
from typing import Any

import numpy as np
import pyopencl as cl

from hetsched.crew import address
from hetsched.dtype import empty
from hetsched.errors import HetschedError
from hetsched.launches import INPUT, OUTPUT
from hetsched.opencl.runtime import Failed, Loaded
from hetsched.opencl.turn import LEAVE, TAKE, Turn
from hetsched.target import Code

FUNCTION = "crew_opencl"
# What it calls, in the order of `struct program`.
CALLS = (
    "clSetKernelArg",
    "clSetKernelArgSVMPointer",
    "clEnqueueNDRangeKernel",
    "clCreateBuffer",
    "clReleaseMemObject",
    "clEnqueueMapBuffer",
    "clEnqueueUnmapMemObject",
    "clFinish",
)
MOST_AXES = 3
# TVM's number of a value that is an address.
ADDRESS = 4
# The structures of crew.c.
LAUNCH = np.dtype(
    [("kernel", "u8"), ("axes", "i8"), ("global", "u8", MOST_AXES), ("local", "u8", MOST_AXES)]
)
ARGUMENT = np.dtype([("kernel", "u8"), ("number", "i4"), ("tensor", "i4"), ("start", "i8")])
TENSOR = np.dtype([("nbytes", "u8"), ("written", "i8")])
VALUE = np.dtype([("kind", "i4"), ("unused", "i4"), ("content", "i8")])
PROGRAM = np.dtype(
    [
        *((name, "u8") for name in CALLS),
        *((name, "u8") for name in ("take", "leave", "turn", "context", "queue")),
        *((name, "u8") for name in ("launches", "arguments", "tensors")),
        ("counts", "i4", 4),
    ]
)
# Of the table: the program and two cells for allocated memory, then three for each tensor, the
# first of them its address.
WITHIN = 1, 2
FIRST_CELL, TENSOR_CELLS = 3, 3


def code(loaded: Loaded, library: CDLL) -> Code | None:
    """A loaded program as code, with the functions of `library`; None where that would copy.

    The code is valid as long as `loaded` is there.
    """
    there, program = loaded.opened, loaded.program
    # A driver of a GPU may copy what it is lent, or hold on to it.
    lends = there.shares_memory and loaded.device.kind == "cpu"
    if not lends or any(place.start for _, _, place in loaded.free):
        return None
    count = len(program.inputs)
    tensors = np.array(
        [*((t.nbytes, 0) for t in program.inputs), *((t.nbytes, 1) for t in program.outputs)],
        TENSOR,
    )
    launches = np.zeros(len(program.launches), LAUNCH)
    for row, launch, kernel in zip(launches, program.launches, loaded.kernels, strict=True):
        axes = len(launch.global_size)
        row["kernel"], row["axes"] = kernel.int_ptr, axes
        row["global"][:axes], row["local"][:axes] = launch.global_size, launch.local_size
    number_of = {INPUT: 0, OUTPUT: count}
    arguments = np.array(
        [
            (loaded.kernels[index].int_ptr, number, number_of[place.region] + int(place.which), 0)
            for index, number, place in loaded.free
        ],
        ARGUMENT,
    )
    driver = CDLL(cl._cl.__file__)
    head = np.zeros(1, PROGRAM)
    for name in CALLS:
        head[name] = cast(getattr(driver, name), c_void_p).value
    head["context"], head["queue"] = there.context.int_ptr, there.queue.int_ptr
    head["launches"], head["arguments"] = address(launches), address(arguments)
    head["tensors"] = address(tensors)
    if isinstance(there.turn, Turn):
        head["take"], head["leave"], head["turn"] = TAKE, LEAVE, there.turn.address
    head["counts"] = len(launches), len(arguments), len(tensors), 0
    table = np.zeros(FIRST_CELL + TENSOR_CELLS * len(tensors), np.uint64)
    table[0] = address(head)
    cells = tuple(range(FIRST_CELL, len(table), TENSOR_CELLS))
    return Code(
        function=cast(getattr(library, FUNCTION), c_void_p).value or 0,
        table=table,
        inputs=cells[:count],
        outputs=cells[count:],
        results=tuple(loaded.outputs),
        threads=1,
        # C has the addresses of these only.
        enter=partial(_entered, head, launches, arguments, tensors, loaded),
        module=library,
        allocate=there.allocate if there.shared_pointers else None,
        within=WITHIN if there.shared_pointers else None,
        failed=partial(_failed, loaded.device.name),
    )


class Caller:
    """Calls the code of `loaded` on arrays, `failed` makes an error of what OpenCL answers with.

    Between the launches there is no Python, which would cost some microseconds at each, as what
    it does has left the near caches meanwhile.
    """

    def __init__(
        self, loaded: Loaded, code: Code, failed: Callable[[Failed], HetschedError]
    ) -> None:
        self._loaded, self._code, self._failed = loaded, code, failed
        self._call = CFUNCTYPE(c_int, c_void_p, c_void_p, c_int, c_void_p)(code.function)
        self._table, self._arguments, self._status = self._tables()

    def __call__(self, inputs: Sequence[Any]) -> list[np.ndarray]:
        """New outputs for these inputs; one thread at a time may ask."""
        outputs = [empty(*kind) for kind in self._code.results]
        arrays = self._loaded.arrays(inputs)
        self._place(self._table, arrays, outputs)
        self._called(self._arguments, self._status)
        return outputs

    def bound(self, inputs: Sequence[Any]) -> Callable[[], list[np.ndarray]]:
        """A call that reads these arrays and writes to its own, the same ones each time."""
        arrays = self._loaded.arrays(inputs)
        allocate = self._code.allocate or _unshared
        outputs = [
            allocate(_nbytes(kind))[: _nbytes(kind)].view(kind[1]).reshape(kind[0])
            for kind in self._code.results
        ]
        table, arguments, status = self._tables()
        self._place(table, arrays, outputs)

        def run(_kept: object = (table, arrays)) -> list[np.ndarray]:
            self._called(arguments, status)
            return outputs

        return run

    def _tables(self) -> tuple[np.ndarray, tuple[Any, ...], np.ndarray]:
        """A table of addresses, the arguments of a call by it, and where that leaves its status."""
        table = self._code.table.copy()
        given, made = np.zeros(1, VALUE), np.zeros(1, VALUE)
        given["kind"], given["content"] = ADDRESS, address(table)
        # A pointer that is made of an array keeps it.
        pointers = given.ctypes.data_as(c_void_p), made.ctypes.data_as(c_void_p)
        return table, (None, pointers[0], 1, pointers[1]), made

    def _place(
        self, table: np.ndarray, inputs: Sequence[np.ndarray], outputs: Sequence[np.ndarray]
    ) -> None:
        cells = (*self._code.inputs, *self._code.outputs)
        for cell, array in zip(cells, (*inputs, *outputs), strict=True):
            table[cell] = address(array)

    def _called(self, arguments: tuple[Any, ...], made: np.ndarray) -> None:
        self._call(*arguments)
        if status := int(made["content"][0]):
            raise self._failed(Failed(status, "its launches"))


def _nbytes(kind: tuple[tuple[int, ...], np.dtype]) -> int:
    shape, dtype = kind
    return prod(shape) * dtype.itemsize


def _unshared(nbytes: int) -> np.ndarray:
    return empty((nbytes,), np.dtype(np.uint8))


def _entered(*_kept: object) -> None:
    """Any thread may call OpenCL."""


def _failed(device: str, status: int) -> HetschedError:
    return Failed(status, "OpenCL").of("its launches failed", device)
