"""Types that give the same elements another shape, or tell a shape."""

from hetsched.op import Op, Tensor
from hetsched.operation import Operation


class View(Operation):
    """Nothing is computed and nothing moves; Dropout is the identity outside training."""

    onnx_types = (
        "Dropout",
        "Flatten",
        "Identity",
        "Reshape",
        "Shape",
        "Size",
        "Squeeze",
        "Unsqueeze",
    )
    is_view = True

    def flops(self, op: Op) -> int:
        return 0

    def read_nbytes(self, op: Op, tensor: Tensor) -> int:
        """What a kernel that this belongs to reads through it: not the shape asked for."""
        if op.kind in ("Shape", "Size") or tensor != op.inputs[0]:
            return 0
        return tensor.nbytes
