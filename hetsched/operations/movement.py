"""Types that move elements and compute nothing."""

from hetsched.op import Op, Tensor
from hetsched.operation import Operation

# They read as many elements of their first input as they write, wherever those lie.
TAKING = ("Compress", "Gather", "GatherElements", "GatherND", "Slice", "Trilu")


class Movement(Operation):
    """Each output element is an input element, or a constant."""

    onnx_types = (
        *TAKING,
        "CenterCropPad",
        "Concat",
        "Constant",
        "ConstantOfShape",
        "DepthToSpace",
        "Expand",
        "EyeLike",
        "OneHot",
        "Pad",
        "ReverseSequence",
        "ScatterElements",
        "ScatterND",
        "SpaceToDepth",
        "Split",
        "Tile",
        "Transpose",
    )

    def flops(self, op: Op) -> int:
        return 0

    def read_nbytes(self, op: Op, tensor: Tensor) -> int:
        if op.kind in TAKING and tensor == op.inputs[0]:
            # A row that is taken twice is in a cache the second time.
            return min(tensor.nbytes, op.output().nbytes)
        return tensor.nbytes
