"""Resampling."""

from collections.abc import Sequence

import numpy as np

from hetsched.op import Op
from hetsched.operation import Known, Operation, Piece, refused, wholes
from hetsched.region import Region

TAPS = {"nearest": 0, "linear": 2, "cubic": 4}


class Resize(Operation):
    """Each output element is a weighted sum of its neighbours in the input."""

    onnx_types = ("Resize", "Upsample")
    examples = (
        "(float[1,3,4,5] x) => (y) <float[4] s = {1, 1, 2, 3}> { y = Resize "
        '<coordinate_transformation_mode="asymmetric", nearest_mode="floor"> (x, , s) }',
        "(float[1,3,4,5] x) => (float[1,3,8,10] y) <int64[4] n = {1, 3, 8, 10}> { y = Resize "
        '<mode="linear"> (x, , , n) }',
        "(float[1,2,4,6] x) => (y) <float[2] s = {2, 1.5}> { y = Resize <axes=[2,3]> (x, , s) }",
        '(float[1,3,5,4] x) => (y) <float[4] s = {1, 1, 4, 2}> { y = Resize <mode="linear", '
        'coordinate_transformation_mode="asymmetric"> (x, , s) }',
        "(float[1,3,5,4] x) => (y) <float[4] s = {1, 1, 2, 2}> { y = Resize "
        '<nearest_mode="ceil"> (x, , s) }',
    )

    def flops(self, op: Op) -> int:
        before, after = op.input(0).shape, op.output().shape
        scaled = sum(old != new for old, new in zip(before, after, strict=True))
        taps = TAPS[op.attributes.get("mode", "nearest")]
        return 2 * op.output().size * taps**scaled if taps else 0

    def piece(self, op: Op, index: int, region: Region, known: Known) -> Piece:
        """Axes that stay as they are, and those that a whole number enlarges.

        It computes what whole elements of the input become, and of a mean between neighbours one
        more on each side, whose own mean is then of too few.
        """
        before, after = op.input(0).shape, op.output().shape
        read, made, scaled = region, region, False
        for axis in region.cuts(after):
            if before[axis] == after[axis]:
                continue
            ratio = self._ratio(op, axis, known)
            first, last = region.intervals[axis]
            halo = 0 if _stays(op, ratio) else 1
            low, high = max(0, first // ratio - halo), min(before[axis], -(-last // ratio) + halo)
            read, made = read.along(axis, low, high), made.along(axis, low * ratio, high * ratio)
            scaled = True
        for axis in range(len(before)):
            if axis not in region.cuts(after):
                read = read.along(axis, 0, before[axis])
        if scaled and op.attributes.get("antialias"):
            raise refused(op, "it takes a mean over more than neighbours")
        reads = wholes(op)
        reads[0] = read
        if not op.has_input(3):
            return Piece.of(op, reads, {0: made})
        axes = op.attributes.get("axes", range(len(before)))
        sizes = np.array([made.shape[axis] for axis in axes])
        return Piece.of(op, reads, {0: made}, {3: sizes})

    def _ratio(self, op: Op, axis: int, known: Known) -> int:
        """The whole number that the axis is enlarged by."""
        before, after = op.input(0).shape, op.output().shape
        ratio = after[axis] // before[axis]
        place = 2 if op.kind == "Resize" and known.opset > 10 else 1
        scales: Sequence[float] = op.attributes.get("scales", ())
        if op.has_input(place) and op.input(place).size:
            name = op.input(place).name
            if name not in known.constants:
                raise refused(op, f"'{name}' is no constant")
            scales = tuple(known.constants[name].tolist())
        axes = [a % len(before) for a in op.attributes.get("axes", range(len(before)))]
        exact = not scales or scales[axes.index(axis)] == ratio
        if after[axis] != ratio * before[axis] or not exact:
            raise refused(op, "it is not enlarged by a whole number", axis)
        mode = op.attributes.get("coordinate_transformation_mode", "half_pixel")
        policy = op.attributes.get("keep_aspect_ratio_policy", "stretch")
        if mode in ("align_corners", "tf_crop_and_resize") or policy != "stretch":
            raise refused(op, "an element comes from a place that depends on the size", axis)
        if op.attributes.get("mode", "nearest") == "cubic":
            raise refused(op, "it takes a mean over more than neighbours", axis)
        return ratio


def _stays(op: Op, ratio: int) -> bool:
    """Whether all copies of an element stand where it becomes `ratio` elements."""
    if op.attributes.get("mode", "nearest") != "nearest":
        return False
    mode = op.attributes.get("coordinate_transformation_mode", "half_pixel")
    if op.kind == "Upsample" or mode == "asymmetric":
        return bool(op.attributes.get("nearest_mode", "floor") == "floor")
    rounding = op.attributes.get("nearest_mode", "round_prefer_floor")
    return rounding in ("round_prefer_floor", "round_prefer_ceil")
