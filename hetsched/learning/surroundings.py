"""How much a run of a graph touches, and so what a kernel finds in the caches.

The same kernel takes 0.5 us in a network of a megabyte and 3 us in one of thirty: between two of
its runs everything else has pushed its code and weights out of the near caches.
"""

from math import ceil, log2

from hetsched.graph import Graph

# Of a kernel: its code, its table of addresses, the stack.
CODE_NBYTES = 16_384


def touched_nbytes(graph: Graph) -> int:
    """The weights, the tensors between kernel groups, and the code of all groups, in bytes."""
    tensors = {t.name: t.nbytes for group in graph.groups for t in group.outputs}
    inputs = sum(tensor.nbytes for tensor in graph.inputs)
    return graph.weight_nbytes + inputs + sum(tensors.values()) + CODE_NBYTES * len(graph.groups)


def surroundings(graph: Graph) -> int:
    """`touched_nbytes` rounded up to a power of four of megabytes, at least one.

    Samples of a kernel in graphs of one surroundings may stand for each other.
    """
    megabytes = max(1.0, touched_nbytes(graph) / 2**20)
    return int(4 ** ceil(log2(megabytes) / 2))
