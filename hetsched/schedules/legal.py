"""Loops of our own for operations of Relax, in the form that TVM's legalisation takes.

Importing this file loads TVM's compiler.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import tvm
from tvm import te, tirx

from hetsched.schedules import matmul, rows
from hetsched.schedules.loops import shape_of
from hetsched.schedules.rules import Rules
from hetsched.tvm_runtime import to_numpy

Rule = Callable[[Any, Any], Any]
# Between which a number and its inverse are normal.
SMALLEST, LARGEST = 1e-30, 1e30


def legalise_divide(builder: Any, call: Any, rules: Rules) -> Any | None:
    """By one number: a multiplication takes a fraction of the time."""
    data, divisor = call.args
    shape = shape_of(data)
    if shape is None or shape_of(divisor) is None or not isinstance(divisor, tvm.ir.GenericConst):
        return None
    array = to_numpy(divisor.value)
    if array.size != 1 or array.ndim > len(shape) or not SMALLEST < abs(array).item() < LARGEST:
        return None
    inverse = tirx.const(1 / array.astype(np.float64).item(), "float32")
    return builder.call_te(
        lambda x: te.compute(x.shape, lambda *i: x[i] * inverse, name="divided"),
        data,
        primfunc_name_hint="divide",
    )


FAMILIES: dict[str, Callable[[Any, Any, Rules], Any | None]] = {
    "relax.divide": legalise_divide,
    "relax.matmul": matmul.legalise,
    "relax.nn.layer_norm": rows.legalise_layer_norm,
    "relax.nn.softmax": rows.legalise_softmax,
}


def legalisations(rules: Rules) -> dict[str, Rule]:
    """A rule for each operation that has a family; TVM's own rule where that declines."""
    return {name: _rule(name, rules) for name in FAMILIES}


def _rule(name: str, rules: Rules) -> Rule:
    default = tvm.ir.Op.get(name).get_attr("FLegalize")

    def rule(builder: Any, call: Any) -> Any:
        found = FAMILIES[name](builder, call, rules)
        return default(builder, call) if found is None else found

    return rule
