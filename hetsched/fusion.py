"""Kernel groups: the operations that a compiler makes one kernel of.

A group is an anchor and the elementwise tail behind it (bias, activation, residual add, reshape).
Dequantisation goes with who reads it, and quantisation is a tail, so that groups of a quantised
model hand over integers. A group is the unit that is priced and placed: the sum of the times of
unfused operations is not the time of the fused kernel.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from hetsched.op import Op, Tensor

ELEMENTWISE = frozenset(
    """Abs Acos Acosh Add And Asin Asinh Atan Atanh BitShift BitwiseAnd BitwiseNot BitwiseOr
    BitwiseXor Cast CastLike Ceil Celu Clip Cos Cosh Div Elu Equal Erf Exp Floor Gelu Greater
    GreaterOrEqual HardSigmoid HardSwish Identity IsInf IsNaN LeakyRelu Less LessOrEqual Log Max
    Mean Min Mish Mod Mul Neg Not Or PRelu Pow QuantizeLinear Reciprocal Relu Round Selu Shrink
    Sigmoid Sign Sin Sinh Softplus Softsign Sqrt Sub Sum Swish Tan Tanh ThresholdedRelu Where
    Xor""".split()
)
# They move no data, or only where a kernel stores its result.
RESHAPING = frozenset("Dropout Flatten Reshape Squeeze Transpose Unsqueeze".split())
TAIL = ELEMENTWISE | RESHAPING
# It makes a tensor larger, and stands before the one operation that reads it.
HEAD = "DequantizeLinear"

# GELU, the longest tail in use that branches, has five operations.
LONGEST_BRANCHING_TAIL = 8


@dataclass(frozen=True, eq=False)
class Group:
    """Operations in topological order, and the tensors that they exchange with the rest.

    `inputs` are activations, `constants` the weights that the group reads. The name is that of the
    anchor, the first operation that does more than to dequantise.
    """

    ops: tuple[Op, ...]
    inputs: tuple[Tensor, ...]
    constants: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]

    @property
    def name(self) -> str:
        return next((op for op in self.ops if op.kind != HEAD), self.ops[0]).name

    @property
    def members(self) -> tuple[str, ...]:
        """The names of its operations."""
        return tuple(op.name for op in self.ops)

    @property
    def kinds(self) -> str:
        """The op types, as in `Conv+Add+Relu`."""
        return "+".join(op.kind for op in self.ops)


def fuse(
    ops: Sequence[Op],
    outputs: Iterable[Tensor],
    constants: Mapping[str, object],
    joins: frozenset[str] = frozenset(),
    views: frozenset[str] = frozenset(),
) -> tuple[Group, ...]:
    """The kernel groups of `ops`, in topological order; each of `joins` begins one.

    Operations of `views` are in none.

    A group has one exit until its last operation, so that nothing outside can lie on a path
    between two of its members: the groups form an acyclic graph. Linear time in `ops`.
    """
    return Wiring(ops, outputs, constants, joins, views).groups()


class Wiring:
    """Who writes and who reads each tensor of `ops`, by position; `outputs` leave them.

    No operation of `joins` is in a tail, and none of `views` in a group. Made once, it gathers
    parts in time that is linear in each part.
    """

    def __init__(
        self,
        ops: Sequence[Op],
        outputs: Iterable[Tensor],
        constants: Mapping[str, object],
        joins: frozenset[str] = frozenset(),
        views: frozenset[str] = frozenset(),
    ) -> None:
        self._ops = ops
        self._kept = {tensor.name for tensor in outputs}
        self._constants = constants
        self._joins = joins
        self._views = views
        self._position = {op.name: index for index, op in enumerate(ops)}
        self._producer = {t.name: i for i, op in enumerate(ops) for t in op.writes}
        self._consumers: dict[str, list[int]] = {}
        for index, op in enumerate(ops):
            for tensor in op.reads:
                self._consumers.setdefault(tensor.name, []).append(index)
        self.heads = {index for index, op in enumerate(ops) if self._is_head(op)}

    def groups(self) -> tuple[Group, ...]:
        """The kernel groups, as `fuse` says."""
        taken: set[int] = set()
        members: list[list[int]] = []
        for index in range(len(self._ops)):
            if index in taken or index in self.heads or self._ops[index].name in self._views:
                continue
            group = [index]
            while tail := self._next_tail(group[-1], taken):
                group.extend(tail)
            taken.update(group)
            members.append(self._with_heads(group))
        # A group runs when the last of its inputs is there: where its last operation stands.
        members.sort(key=lambda group: group[-1])
        return tuple(map(self._group, members))

    def gather(self, part: Iterable[Op]) -> Group:
        """The operations `part` as one group, with the tensors that cross its border."""
        return self._group(sorted({self._position[op.name] for op in part}))

    def _with_heads(self, group: Sequence[int]) -> list[int]:
        """`group` and the heads of its operations, in topological order."""
        read = {tensor.name for index in group for tensor in self._ops[index].reads}
        makers = {self._producer[name] for name in read if name in self._producer}
        return sorted({*group, *(makers & self.heads)})

    def _is_head(self, op: Op) -> bool:
        """Whether `op` dequantises, for one other operation alone, what is no such result."""
        if op.kind != HEAD or op.domain or len(op.writes) != 1:
            return False
        name = op.writes[0].name
        readers = self._consumers.get(name, [])
        alone = len(readers) == 1 and name not in self._kept
        reader = self._ops[readers[0]] if alone else op
        return reader.kind != HEAD and reader.name not in self._views

    def _made(self, tensor: Tensor) -> int:
        """When a tensor can be there, a head taking no time; before all where nothing makes it."""
        index = self._producer.get(tensor.name, -1)
        if index not in self.heads:
            return index
        return max((self._producer.get(t.name, -1) for t in self._ops[index].reads), default=-1)

    def _next_tail(self, last: int, taken: set[int]) -> list[int]:
        """The operations from the one exit of a group, `last`, to its next single exit, or none.

        Walks through elementwise operations until all paths meet again: a chain meets at once,
        `x * sigmoid(x)` after two.
        """
        if len(self._ops[last].writes) != 1:
            return []
        frontier = {self._ops[last].writes[0].name}
        found: list[int] = []
        while len(found) < LONGEST_BRANCHING_TAIL:
            if frontier & self._kept:
                return []
            waiting = {i for name in frontier for i in self._consumers.get(name, ())} - set(found)
            if not waiting:
                return []
            index = min(waiting)
            op = self._ops[index]
            # What else it reads must be there before the group starts, not after.
            late = any(
                self._made(tensor) > last and self._producer[tensor.name] not in found
                for tensor in op.reads
            )
            if late or index in taken or op.kind not in TAIL or op.domain or len(op.writes) != 1:
                return []
            if op.name in self._joins:
                return []
            found.append(index)
            frontier = {
                name
                for name in (*frontier, op.writes[0].name)
                if not self._consumers.get(name) or set(self._consumers[name]) - set(found)
            }
            if frontier == {op.writes[0].name}:
                return found
        return []

    def _group(self, indices: Sequence[int]) -> Group:
        inside = set(indices)
        ops = tuple(self._ops[index] for index in indices)
        written = {tensor.name for op in ops for tensor in op.writes}
        read = dict.fromkeys(t for op in ops for t in op.reads if t.name not in written)
        return Group(
            ops=ops,
            inputs=tuple(tensor for tensor in read if tensor.name not in self._constants),
            constants=tuple(tensor for tensor in read if tensor.name in self._constants),
            outputs=tuple(
                tensor
                for op in ops
                for tensor in op.writes
                if tensor.name in self._kept
                or not inside.issuperset(self._consumers.get(tensor.name, ()))
            ),
        )
