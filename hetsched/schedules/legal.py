"""Loops of our own for operations of Relax, in the form that TVM's legalisation takes.

Importing this file loads TVM's compiler.
"""

from collections.abc import Callable
from typing import Any

import tvm

from hetsched.schedules import matmul, rows
from hetsched.schedules.rules import Rules

Rule = Callable[[Any, Any], Any]
FAMILIES: dict[str, Callable[[Any, Any, Rules], Any | None]] = {
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
