"""ONNX Runtime, asked for one result at a time: constant folding, and what a right result is.

It is the reference of verification and of the tests. `targets/onnxruntime.py` uses the same
sessions as a device that does the work.
"""

import os
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as native

from hetsched.dtype import dtype_name, numpy_dtype, onnx_code
from hetsched.errors import ModelError

# ONNX Runtime 1.31 supports opset 26 and runs 27, the newest it has operators for, only when it is
# told that nobody relies on it; it reads the variable when it loads a model.
os.environ.setdefault("ALLOW_RELEASED_ONNX_OPSET_ONLY", "0")
NEWEST_IR_VERSION = 13
# protobuf cannot write more.
LARGEST_MODEL_NBYTES = 2**31 - 1
# Errors are raised, and need not be printed too.
ERROR_SEVERITY = 4

# Without this the notices about new opsets go to stderr past every session's own setting.
onnxruntime.set_default_logger_severity(ERROR_SEVERITY)

# All that ONNX Runtime raises for a model or an input that it refuses: its own kinds have no base
# class in common, and its binding raises plain ones of Python.
ERRORS: tuple[type[Exception], ...] = (
    native.EPFail,
    native.Fail,
    native.InvalidArgument,
    native.InvalidGraph,
    native.InvalidProtobuf,
    native.NoModel,
    native.NoSuchFile,
    native.NotImplemented,
    native.RuntimeException,
    RuntimeError,
    TypeError,
    ValueError,
)


def session(model: onnx.ModelProto, threads: int = 1) -> onnxruntime.InferenceSession:
    """`model` on the processor, on `threads` threads that do not spin.

    Raises
    ------
    ModelError
        ONNX Runtime refuses the model, or it is larger than 2 GB.
    """
    return open_session(model, session_options(threads))


def session_options(threads: int) -> onnxruntime.SessionOptions:
    """Quiet, and `threads` threads that sleep when there is no work: other devices compute too."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = ERROR_SEVERITY
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


def open_session(
    model: onnx.ModelProto, options: onnxruntime.SessionOptions
) -> onnxruntime.InferenceSession:
    """`session` with options of the caller's."""
    if model.ByteSize() > LARGEST_MODEL_NBYTES:
        raise ModelError("ONNX Runtime is given no model of more than 2 GB")
    if model.ir_version > NEWEST_IR_VERSION:
        older = onnx.ModelProto()
        older.CopyFrom(model)
        older.ir_version = NEWEST_IR_VERSION
        model = older
    try:
        return onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
    except ERRORS as error:
        raise ModelError(f"ONNX Runtime: {first_line(error)}") from None


def run(model: onnx.ModelProto, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The outputs of `model`, by name.

    Raises
    ------
    ModelError
        ONNX Runtime refuses the model or the inputs, or fails.
    """
    opened = session(model)
    names = [output.name for output in opened.get_outputs()]
    try:
        if any(array.dtype.kind in "OSU" for array in inputs.values()):
            # Strings have no memory to share; only this way takes them.
            return dict(zip(names, opened.run(names, dict(inputs)), strict=True))
        feeds = {name: to_ort(array) for name, array in inputs.items()}
        results = opened.run_with_ort_values(names, feeds)
        return {name: from_ort(value) for name, value in zip(names, results, strict=True)}
    except ERRORS as error:
        raise ModelError(f"ONNX Runtime: {first_line(error)}") from None


def to_ort(array: np.ndarray) -> onnxruntime.OrtValue:
    """The array as ONNX Runtime's own value, which uses its memory: keep the array alive."""
    array = np.asarray(array, order="C")
    if array.dtype.isbuiltin == 1:
        return onnxruntime.OrtValue.ortvalue_from_numpy(array)
    # numpy's C interface does not know the 16-bit and 8-bit floats of ml_dtypes.
    bits = array.view(np.dtype(f"u{array.itemsize}"))
    return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(
        bits, onnx_code(array.dtype.name)
    )


def from_ort(value: onnxruntime.OrtValue) -> np.ndarray:
    """The values of a tensor of ONNX Runtime, without a copy but for strings."""
    dtype = numpy_dtype(dtype_name(value.element_type()))
    shape = tuple(value.shape())
    if dtype.kind == "O" or 0 in shape:
        return np.asarray(value.numpy(), dtype=dtype).reshape(shape)
    bits = np.asarray(_Memory(value, shape, dtype.itemsize))
    return bits.view(dtype)


def first_line(error: Exception) -> str:
    """What ONNX Runtime says, without its error numbers and the places in its source.

    Examples
    --------
    >>> first_line(RuntimeError("[ONNXRuntimeError] : 1 : FAIL : /a/b.cc:46 f(int) No such op"))
    'No such op'
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    text = re.sub(r"\[ONNXRuntimeError\] : \d+ : \w+ : ", "", text)
    return re.sub(r"/\S+:\d+ .*?\)(?: const)?(?: \[with .*?\])? (?=\S)", "", text)


class _Memory:
    """Lends the memory of an OrtValue to numpy, and keeps it alive for as long."""

    def __init__(self, value: onnxruntime.OrtValue, shape: tuple[int, ...], itemsize: int) -> None:
        self._value = value
        self.__array_interface__: dict[str, Any] = {
            "data": (value.data_ptr(), False),
            "shape": shape,
            "typestr": f"|u{itemsize}" if itemsize == 1 else f"<u{itemsize}",
            "version": 3,
        }
