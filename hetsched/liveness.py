"""Which tensors are there at the same time while a graph runs, and the memory that they take."""

from collections.abc import Sequence

from hetsched.graph import Graph
from hetsched.op import Op
from hetsched.operation import operation_of


def peak_nbytes(graph: Graph, order: Sequence[Op] | None = None) -> int:
    """The most bytes of inputs and activations that are there at once; weights do not count.

    Operations run one after the other, in their order in the graph or another topological one. A
    tensor is there from its operation to its last reader, an input from the start and an output to
    the end. A view is its input, and nothing else is written in place. Linear time.
    """
    ops = graph.ops if order is None else order
    storage: dict[str, str] = {}
    last: dict[str, int] = {}
    for index, op in enumerate(ops):
        for tensor in op.reads:
            last[storage.get(tensor.name, tensor.name)] = index
        if operation_of(op).is_view and op.reads:
            source = op.reads[0].name
            for tensor in op.writes:
                storage[tensor.name] = storage.get(source, source)
    for tensor in graph.outputs:
        last[storage.get(tensor.name, tensor.name)] = len(ops)
    there = {t.name: t.nbytes for t in graph.inputs if t.name in last}
    held = sum(there.values())
    peak = held
    dying: list[list[str]] = [[] for _ in range(len(ops) + 1)]
    for name, index in last.items():
        dying[index].append(name)
    for index, op in enumerate(ops):
        for tensor in op.writes:
            if tensor.name not in storage:
                there[tensor.name] = tensor.nbytes
                held += tensor.nbytes
                if tensor.name not in last:
                    # Nobody reads it, but it is written.
                    dying[index].append(tensor.name)
        peak = max(peak, held)
        held -= sum(there.pop(name, 0) for name in dying[index])
    return peak
