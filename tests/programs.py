"""A program of two launches, written by hand."""

from hetsched.launches import CONSTANT, INPUT, OUTPUT, WEIGHT, WORKSPACE, Launch, Place, Program
from hetsched.op import Tensor

SOURCE = """
__kernel void twice(__global const float* restrict x, __global float* restrict doubled) {
  int i = get_group_id(0);
  doubled[i] = 2.0f * x[i];
}
__kernel void sum(
    __global const float* restrict doubled, __global const float* restrict weight,
    __global const float* restrict bias, __global float* restrict y) {
  int i = get_group_id(0);
  y[i] = doubled[i] * weight[i] + bias[0];
}
"""
# Where the second launch finds its bias.
BIAS = b"\0" * 512 + b"\0\0\xc0\x3f"


def affine() -> Program:
    """y = 2 x w + 1.5 on eight floats; the doubled x lies in the workspace, from byte 512."""
    doubled = Place(WORKSPACE, 0, 512, 32, written=True)
    return Program(
        "opencl",
        SOURCE,
        inputs=(Tensor("x", (2, 4), "float32"),),
        outputs=(Tensor("y", (2, 4), "float32"),),
        launches=(
            Launch("twice", (8,), (1,), (Place(INPUT, 0, 0, 32), doubled)),
            Launch(
                "sum",
                (8,),
                (1,),
                (
                    Place(WORKSPACE, 0, 512, 32),
                    Place(WEIGHT, "w", 0, 32),
                    Place(CONSTANT, 0, 512, 4),
                    Place(OUTPUT, 0, 0, 32, written=True),
                ),
            ),
        ),
        weights={"w": 32},
        constants=BIAS,
        workspace_nbytes=1024,
    )
