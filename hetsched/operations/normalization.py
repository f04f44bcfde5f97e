"""Normalisation by mean and deviation, of a batch, a channel or a layer."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from hetsched.op import Op
from hetsched.operation import Call, Compiler, Operation, interpreted
from hetsched.operations._arithmetic import sum_dtype

# Subtraction of the mean and division by the deviation, scale and shift; where statistics are
# taken, one addition for the mean and a product and an addition for the deviation.
FLOPS_PER_ELEMENT = {
    "BatchNormalization": 4,
    "GroupNormalization": 7,
    "InstanceNormalization": 7,
    "LayerNormalization": 7,
    "LpNormalization": 3,
    "MeanVarianceNormalization": 5,
    "RMSNormalization": 4,
}


class Normalization(Operation):
    """Each element less a mean, over a deviation."""

    onnx_types = (*FLOPS_PER_ELEMENT, "LRN")
    defined = ("BatchNormalization",)

    def flops(self, op: Op) -> int:
        if op.kind == "LRN":
            # The squares of its neighbours added up, a multiply-add, a power and a division.
            return op.output().size * (2 * int(op.attributes["size"]) + 4)
        return op.output().size * FLOPS_PER_ELEMENT[op.kind]

    def reference(
        self, call: Call, inputs: Sequence[Any], compiler: Compiler = interpreted
    ) -> tuple[np.ndarray, ...]:
        wide = sum_dtype(inputs[0].dtype)
        x, scale, shift, mean, variance = (array.astype(wide) for array in inputs)
        others = tuple(axis for axis in range(x.ndim) if axis != 1)
        results: tuple[np.ndarray, ...] = ()
        if call.attributes.get("training_mode"):
            momentum = wide.type(call.attributes["momentum"])
            running = mean, variance
            mean, variance = x.mean(axis=others), x.var(axis=others)
            results = tuple(
                old * momentum + new * (1 - momentum)
                for old, new in zip(running, (mean, variance), strict=True)
            )

        def by_channel(values: np.ndarray) -> np.ndarray:
            return values.reshape(-1, *(1,) * (x.ndim - 2))

        deviation = np.sqrt(variance + wide.type(call.attributes["epsilon"]))
        y = (x - by_channel(mean)) / by_channel(deviation) * by_channel(scale) + by_channel(shift)
        dtypes = (inputs[0].dtype, inputs[3].dtype, inputs[4].dtype)
        every = (y, *results)[: call.results]
        return tuple(value.astype(dtype) for value, dtype in zip(every, dtypes, strict=False))
