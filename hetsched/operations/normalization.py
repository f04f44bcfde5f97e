"""Normalisation by mean and deviation, of a batch, a channel or a layer."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hetsched.op import Op
from hetsched.operation import (
    Call,
    Compiler,
    Known,
    Operation,
    Piece,
    interpreted,
    keep,
    refused,
    wholes,
)
from hetsched.operations._arithmetic import sum_dtype
from hetsched.region import Region

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
    examples = (
        "(float[2,3,4] x, float[3] s, float[3] b, float[3] m) => (y) <float[3] v = {1, 2, 3}> { "
        "y = BatchNormalization (x, s, b, m, v) }",
        "(float[2,6,4] x, float[6] s, float[6] b) => (float[2,6,4] y) { y = GroupNormalization "
        "<num_groups=3> (x, s, b) }",
        "(float[2,3,4] x, float[3] s, float[3] b) => (y) { y = InstanceNormalization (x, s, b) }",
        "(float[2,3,4] x, float[3,4] s, float[4] b) => (y) { y = LayerNormalization <axis=-2> "
        "(x, s, b) }",
        "(float[2,3,4] x, float[4] s) => (y) { y = RMSNormalization (x, s) }",
        "(float[2,3,4] x) => (y) { y = LpNormalization <axis=1> (x) }",
        "(float[2,6,4,3] x) => (y) { y = LRN <size=3> (x) }",
        "(float[2,3,4,5] x) => (y) { y = MeanVarianceNormalization <axes=[2,3]> (x) }",
    )

    def flops(self, op: Op) -> int:
        if op.kind == "LRN":
            # The squares of its neighbours added up, a multiply-add, a power and a division.
            return op.output().size * (2 * int(op.attributes["size"]) + 4)
        return op.output().size * FLOPS_PER_ELEMENT[op.kind]

    def piece(self, op: Op, index: int, region: Region, known: Known) -> Piece:
        """Any box of the axes over which no statistics are taken."""
        if index or op.attributes.get("training_mode"):
            raise refused(op, "its statistics are of the whole input")
        rank = len(region.intervals)
        axis = op.attributes.get("axis", -1) % rank
        taken: Mapping[str, Sequence[int]] = {
            "BatchNormalization": (),
            "GroupNormalization": range(2, rank),
            "InstanceNormalization": range(2, rank),
            "LRN": (1,),
            "LayerNormalization": range(axis, rank),
            "LpNormalization": (axis,),
            "MeanVarianceNormalization": op.attributes.get("axes", (0, 2, 3)),
            "RMSNormalization": range(axis, rank),
        }
        keep(op, index, region, taken[op.kind], "its statistics are taken along it")
        first, last = region.intervals[1] if rank > 1 else (0, 1)
        channels = op.output().shape[1] if rank > 1 else 1
        reads = wholes(op)
        reads[0] = region
        if op.kind in ("LayerNormalization", "RMSNormalization"):
            reads[1:] = [None if t is None else region.operand(t.shape) for t in op.inputs[1:]]
            return Piece.of(op, reads, {0: region})
        groups = op.attributes.get("num_groups", channels)
        each = channels // groups
        if first % each or last % each:
            raise refused(op, f"channels {first} to {last} cut groups of {each}", 1)
        for place, tensor in enumerate(op.inputs[1:], 1):
            if tensor is None or tensor.size == 1:
                continue
            if tensor.shape == (channels,):
                reads[place] = Region(((first, last),))
            elif tensor.shape == (groups,):
                reads[place] = Region(((first // each, last // each),))
            else:
                raise refused(op, f"'{tensor.name}' has no value for each channel")
        if "num_groups" in op.attributes:
            return Piece.of(op, reads, {0: region}, num_groups=(last - first) // each)
        return Piece.of(op, reads, {0: region})

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
