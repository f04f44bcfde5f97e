"""The most float32 operations a second of one core, for shares of the peak.

    python -m bench.peak

A loop of fused multiply-adds on vector registers and nothing else. Twelve accumulators wait for
no one but themselves: enough to fill two pipes of six cycles, and with both factors they fit in
sixteen registers. The widest vectors are not always the fastest, and too wide ones are taken apart,
so that the peak is the best of the widths there are. A core's clock changes: measure again next to
whatever is held against it, and take medians of both.
"""

import ctypes
import statistics
from collections.abc import Callable
from functools import cache
from time import perf_counter

from llvmlite import binding

WIDTHS = (4, 8, 16)
ACCUMULATORS = 12
ROUNDS = 100_000


def peak_flops() -> float:
    """Operations a second of the core that this thread is on, measured now, in a millisecond."""
    return max(_flops(width) for width in WIDTHS)


def _flops(width: int) -> float:
    loop = _loops()[width]
    start = perf_counter()
    loop(0.5, ROUNDS)
    return 2 * width * ACCUMULATORS * ROUNDS / (perf_counter() - start)


@cache
def _loops() -> dict[int, Callable[[float, int], float]]:
    """A loop for each width; each has run once."""
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    machine = binding.Target.from_default_triple().create_target_machine(
        cpu=binding.get_host_cpu_name(),
        features=binding.get_host_cpu_features().flatten(),
        opt=3,
        jit=True,
    )
    source = "\n".join(map(_source, WIDTHS))
    engine = binding.create_mcjit_compiler(binding.parse_assembly(source), machine)
    engine.finalize_object()
    signature = ctypes.CFUNCTYPE(ctypes.c_float, ctypes.c_float, ctypes.c_int64)
    loops = {}
    for width in WIDTHS:
        loop = signature(engine.get_function_address(f"loop{width}"))
        loop.engine = engine  # type: ignore[attr-defined]  # It owns the code.
        loop(0.5, ROUNDS)
        loops[width] = loop
    return loops


def _source(width: int) -> str:
    """A function of a factor and a number of rounds: each round is a <- a * factor + factor."""
    vector = f"<{width} x float>"
    every = range(ACCUMULATORS)
    # Kept apart by what they start from, or they would be one.
    phis = [
        f"%a{i} = phi {vector} [ splat (float {i}.0), %entry ], [ %b{i}, %body ]" for i in every
    ]
    steps = [
        f"%b{i} = call {vector} @llvm.fma.v{width}f32({vector} %a{i}, {vector} %x, {vector} %x)"
        for i in every
    ]
    sums = [f"%s{i} = fadd {vector} %{'s' if i > 1 else 'b'}{i - 1}, %b{i}" for i in every[1:]]
    lines = [
        f"declare {vector} @llvm.fma.v{width}f32({vector}, {vector}, {vector})",
        f"define float @loop{width}(float %factor, i64 %rounds) {{",
        "entry:",
        f"%first = insertelement {vector} poison, float %factor, i64 0",
        f"%x = shufflevector {vector} %first, {vector} poison, <{width} x i32> zeroinitializer",
        "br label %body",
        "body:",
        "%round = phi i64 [ 0, %entry ], [ %next, %body ]",
        *phis,
        *steps,
        "%next = add i64 %round, 1",
        "%more = icmp slt i64 %next, %rounds",
        "br i1 %more, label %body, label %end",
        "end:",
        *sums,
        f"%result = extractelement {vector} %s{ACCUMULATORS - 1}, i64 0",
        "ret float %result",
        "}",
    ]
    return "\n".join(lines)


def main() -> None:
    found = {width: statistics.median(_flops(width) for _ in range(15)) for width in WIDTHS}
    for width, flops in found.items():
        print(f"{width:2} lanes {flops / 1e9:8.1f} GFLOP/s")


if __name__ == "__main__":
    main()
