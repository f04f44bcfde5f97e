"""exp, erf and tanh of float32 as polynomials, which vectorise, in place of calls of the C library.

Importing this file loads TVM's compiler, and tells it.
"""

import math
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import numpy as np
import tvm
from tvm import tirx

# log(2) in two parts, of which the first times a small integer is exact.
LOG2_HIGH = 0.693359375
LOG2_LOW = -2.12194440e-4
# (exp(r) - 1 - r) / r**2 for |r| <= log(2) / 2, highest power first; of Cephes, expf.
EXP = (
    1.9875691500e-4,
    1.3981999507e-3,
    8.3334519073e-3,
    4.1665795894e-2,
    1.6666665459e-1,
    5.0000001201e-1,
)
# erf(x) = x P(x**2) / Q(x**2) for |x| <= 4, beyond which it is 1; of Eigen, generic_fast_erf_float.
ERF_LIMIT = 4.0
ERF_NUMERATOR = (
    -2.72614225801306e-10,
    2.77068142495902e-08,
    -2.10102402082508e-06,
    -5.69250639462346e-05,
    -7.34990630326855e-04,
    -2.95459980854025e-03,
    -1.60960333262415e-02,
)
ERF_DENOMINATOR = (
    -1.45660718464996e-05,
    -2.13374055278905e-04,
    -1.68282697438203e-03,
    -7.37332916720468e-03,
    -1.42647390514189e-02,
)
# tanh(x) = x P(x**2) / Q(x**2) for |x| <= 7.9, beyond which it is 1; of Eigen, ptanh_float.
TANH_LIMIT = 7.90531110763549805
TANH_NUMERATOR = (
    -2.76076847742355e-16,
    2.00018790482477e-13,
    -8.60467152213735e-11,
    5.12229709037114e-08,
    1.48572235717979e-05,
    6.37261928875436e-04,
    4.89352455891786e-03,
)
TANH_DENOMINATOR = (
    1.19825839466702e-06,
    1.18534705686654e-04,
    2.26843463243900e-03,
    4.89352518554385e-03,
)
MANTISSA_BITS = 23
EXPONENT_BIAS = 127
# Above the library's rules.
LEVEL = 20


def exp(x: Any) -> Any:
    """2**n exp(r) with x = n log(2) + r; within 2 units in the last place, denormals are zero."""
    dtype = str(x.ty.dtype)
    integer = dtype.replace("float", "int")
    limited = tirx.max(tirx.min(x, _like(89.0, x)), _like(-87.3, x))
    return _let(limited, lambda y: _let(
        tirx.floor(y * _like(1.44269504, x) + _like(0.5, x)), lambda n: _let(
            y - n * _like(LOG2_HIGH, x) - n * _like(LOG2_LOW, x), lambda r: tirx.Select(
                x == x,
                (_horner(EXP, r) * r * r + r + _like(1.0, x))
                # Half of the power, twice, because 2**128 is no float32.
                * tirx.reinterpret(dtype, tirx.Cast(integer, n + _like(EXPONENT_BIAS - 1.0, x))
                                   << tirx.const(MANTISSA_BITS, integer))
                * _like(2.0, x),
                x,
            ))))  # fmt: skip


def erf(x: Any) -> Any:
    """Within 4 units in the last place."""
    return _odd_ratio(x, ERF_LIMIT, ERF_NUMERATOR, ERF_DENOMINATOR)


def tanh(x: Any) -> Any:
    """Within 5 units in the last place."""
    return _odd_ratio(x, TANH_LIMIT, TANH_NUMERATOR, TANH_DENOMINATOR)


def _odd_ratio(
    x: Any, limit: float, numerator: Sequence[float], denominator: Sequence[float]
) -> Any:
    """y P(y**2) / Q(y**2) with x limited to y."""
    limited = tirx.max(tirx.min(x, _like(limit, x)), _like(-limit, x))
    return _let(limited, lambda y: _let(y * y, lambda z: tirx.Select(
        x == x, y * _horner(numerator, z) / _horner(denominator, z), x
    )))  # fmt: skip


def _horner(coefficients: Sequence[float], x: Any) -> Any:
    first, *rest = (_like(value, x) for value in coefficients)
    return reduce(lambda total, value: total * x + value, rest, first)


def _like(value: float, x: Any) -> Any:
    return tirx.const(value, str(x.ty.dtype))


def _let(value: Any, body: Callable[[Any], Any]) -> Any:
    variable = tirx.Var("y", str(value.ty.dtype))
    return tirx.Let(variable, value, body(variable))


def _register(name: str, rule: Callable[[Any], Any], exact: Callable[[float], float]) -> None:
    operator = tvm.ir.Op.get(f"tirx.{name}")
    library = operator.get_attr("llvm.FLowerIntrinsic") or operator.get_attr(
        "default.FLowerIntrinsic"
    )

    def lower(call: Any) -> Any:
        dtype, x = str(call.ty.dtype), call.args[0]
        if not dtype.startswith("float32"):
            return library(call)
        scalar = x.value if isinstance(x, tirx.Broadcast) else x
        if isinstance(scalar, tirx.FloatImm):
            # TVM's analysis of the variables in a polynomial stumbles over what it can compute.
            return tirx.const(exact(float(scalar.value)), dtype)
        return rule(x)

    tirx.register_intrin_lowering(f"tirx.{name}", "llvm", f=lower, level=LEVEL)
    # Otherwise a vectorised loop calls it lane by lane, and erf is not marked by TVM.
    tvm.ir.register_op_attr(f"tirx.{name}", "TVectorizable", True, level=LEVEL)


_register("exp", exp, lambda x: float(np.exp(np.float32(x))))
_register("erf", erf, math.erf)
_register("tanh", tanh, math.tanh)
