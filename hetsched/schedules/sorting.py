"""The largest or smallest of each row in order, as loops: where there is no runtime that sorts.

Importing this file loads TVM's compiler.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from tvm import relax, tirx
from tvm.relax.expr_functor import PyExprMutator, mutator
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T  # noqa: N812

# TVM's pattern of a function that no other may be fused with.
OPAQUE = 8
BOTH, VALUES = "both", "values"


def in_loops(module: Any) -> Any:
    """`module` with functions in place of what its `main` sorts."""
    main = module["main"]
    sorter = _Sorter(module)
    body = sorter.visit_expr(main.body)
    changed = sorter.builder_.get()
    changed.update_func(
        changed.get_global_var("main"),
        relax.Function(main.params, body, main.ret_ty, main.is_pure, main.attrs),
    )
    return changed


def first_of_rows(
    shape: Sequence[int], axis: int, count: int, largest: bool, dtypes: tuple[str, str]
) -> Any:
    """The function of a tensor of `shape` that finds the first `count` along an axis, in order.

    Its outputs are their values and their places, of these types. Of equal ones the earlier goes
    first. Each is inserted where it belongs among the best so far: linear time where few are
    wanted, or where the best come first.
    """
    wanted = list(shape)
    wanted[axis] = count
    size = shape[axis]
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("first_of_rows")
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True, "op_pattern": OPAQUE})
        data = T.arg("data", T.buffer(shape, dtypes[0]))
        values = T.arg("values", T.buffer(wanted, dtypes[0]))
        places = T.arg("places", T.buffer(wanted, dtypes[1]))

        def is_before(a: Any, b: Any) -> Any:
            return a > b if largest else a < b

        with ExitStack() as loops:
            loops.enter_context(T.sblock("root"))
            T.reads([])
            T.writes([])
            others = [dim for index, dim in enumerate(shape) if index != axis]
            # Rows are independent of each other.
            row = [loops.enter_context(T.parallel(0, dim)) for dim in others]

            def element(place: Any) -> list[Any]:
                return [*row[:axis], place, *row[axis:]]

            best = T.alloc_buffer((count,), dtypes[0])
            home = T.alloc_buffer((count,), "int32")
            slot = T.alloc_buffer((1,), "int32", scope="local")
            with T.serial(0, size) as j:
                value = data[tuple(element(j))]
                fits = tirx.any(j < count, is_before(value, best[count - 1]))
                with T.If(fits), T.Then():
                    T.buffer_store(slot, tirx.min(j, count - 1), [0])
                    with T.While(tirx.all(slot[0] > 0, is_before(value, best[slot[0] - 1]))):
                        T.buffer_store(best, best[slot[0] - 1], [slot[0]])
                        T.buffer_store(home, home[slot[0] - 1], [slot[0]])
                        T.buffer_store(slot, slot[0] - 1, [0])
                    T.buffer_store(best, value, [slot[0]])
                    T.buffer_store(home, j, [slot[0]])
            with T.serial(0, count) as j:
                T.buffer_store(values, best[j], element(j))
                T.buffer_store(places, T.cast(home[j], dtypes[1]), element(j))
    return builder.get()


@mutator
class _Sorter(PyExprMutator):  # type: ignore[misc]
    """Puts functions of loops in the place of calls that sort."""

    def visit_call_(self, op: Any) -> Any:
        call = super().visit_call_(op)
        if getattr(call.op, "name", "") != "relax.topk":
            return call
        shape = getattr(call.args[0].ty, "shape", None)
        if not isinstance(shape, relax.ShapeExpr):
            return call
        if not all(isinstance(dim, tirx.IntImm) for dim in shape):
            return call
        sizes = [int(dim) for dim in shape]
        axis = int(call.attrs.axis) % len(sizes)
        count = int(call.attrs.k)
        count = sizes[axis] if count < 1 else min(count, sizes[axis])
        dtypes = str(call.args[0].ty.dtype), str(call.attrs.dtype)
        function = first_of_rows(sizes, axis, count, bool(call.attrs.largest), dtypes)
        wanted = [count if index == axis else size for index, size in enumerate(sizes)]
        results = [relax.TensorType(wanted, dtype) for dtype in dtypes]
        name = self.builder_.add_func(function, "first_of_rows")
        both = self.builder_.emit(relax.call_tir(name, [call.args[0]], results))
        if str(call.attrs.ret_type) == BOTH:
            return both
        return relax.TupleGetItem(both, 0 if str(call.attrs.ret_type) == VALUES else 1)
