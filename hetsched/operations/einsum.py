"""Sums of products in Einstein's notation."""

from math import prod

from hetsched.op import Op
from hetsched.operation import Operation


class Einsum(Operation):
    """One term for each value of all letters together: its products, and an addition to the sum."""

    onnx_types = ("Einsum",)

    def flops(self, op: Op) -> int:
        terms = op.attributes["equation"].replace(" ", "").split("->")[0].split(",")
        sizes: dict[str, int] = {}
        for term, tensor in zip(terms, op.inputs, strict=True):
            assert tensor is not None
            head, ellipsis, tail = term.partition("...")
            covered = len(tensor.shape) - len(head) - len(tail)
            # The axes under an ellipsis broadcast from the right, so they are named from there.
            middle = [f"...{covered - i}" for i in range(covered)] if ellipsis else []
            for letter, size in zip([*head, *middle, *tail], tensor.shape, strict=True):
                sizes[letter] = max(size, sizes.get(letter, 1))
        return prod(sizes.values()) * len(terms)
