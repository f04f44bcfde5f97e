"""The loops that define the operations: their speed, next to a core's peak and ONNX Runtime.

    python -m bench.reference --json FILE [--threads 1,2] [--repeats N]

Each round runs the loop of `bench.peak`, then every operation by the reference and by ONNX Runtime,
so that all of them meet the same machine. The peak of two threads is taken to be two peaks.
Compilation by Numba comes before the first round. Where another process takes its share of a core,
a run is cut in two more often the longer it is: hence the least time beside the median.

Exit status: 0 if all results are within the tolerance of their type, 3 if one is not.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import onnx
from onnx import helper
from rich.console import Console
from rich.table import Table

import hetsched
from bench.peak import peak_flops
from bench.record import record, write
from hetsched import oracle
from hetsched.device import Device
from hetsched.dtype import tolerance
from hetsched.errors import HetschedError
from hetsched.host import cores
from hetsched.operation import flops
from hetsched.plugin import load
from hetsched.target import Target
from hetsched.verify import deviation

FAILED = 3
OPSET = 19
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Case:
    """One node: the shape of its first input, the shapes of its weights, and its attributes."""

    name: str
    kind: str
    x: Shape
    weights: tuple[Shape, ...] = ()
    attributes: Mapping[str, Any] | None = None


PADDED = {"pads": [1, 1, 1, 1]}
CASES = (
    Case("matmul 512", "MatMul", (512, 512), ((512, 512),)),
    Case("matmul 1 x 4096 x 1024", "MatMul", (1, 4096), ((4096, 1024),)),
    Case("matmul 12 x 128 x 64 x 128", "MatMul", (12, 128, 64), ((12, 64, 128),)),
    Case("conv 3x3, 64 of 56", "Conv", (1, 64, 56, 56), ((64, 64, 3, 3),), PADDED),
    Case("conv 3x3, 512 of 7", "Conv", (1, 512, 7, 7), ((512, 512, 3, 3),), PADDED),
    Case("conv 7x7, stride 2", "Conv", (1, 3, 224, 224), ((64, 3, 7, 7),), {"strides": [2, 2]}),
    Case("conv 1x1, 256 of 28", "Conv", (1, 256, 28, 28), ((256, 256, 1, 1),)),
    Case("conv depthwise", "Conv", (1, 96, 56, 56), ((96, 1, 3, 3),), {**PADDED, "group": 96}),
    Case(
        "conv transposed", "ConvTranspose", (1, 64, 28, 28), ((64, 64, 2, 2),), {"strides": [2, 2]}
    ),
    Case("max pool", "MaxPool", (1, 64, 112, 112), (), {"kernel_shape": [3, 3], "strides": [2, 2]}),
    Case("average pool", "AveragePool", (1, 64, 56, 56), (), {"kernel_shape": [3, 3], **PADDED}),
    Case("softmax", "Softmax", (12, 128, 128)),
    Case("layer norm", "LayerNormalization", (128, 768), ((768,), (768,))),
    Case("batch norm", "BatchNormalization", (1, 64, 56, 56), ((64,),) * 4),
    Case("lstm", "LSTM", (32, 1, 128), ((1, 512, 128), (1, 512, 128)), {"hidden_size": 128}),
)


@dataclass(frozen=True)
class Row:
    """Medians of a case on so many threads, and the least time of all rounds.

    Shares are of the peak: `share` the median of those of each round, `best_share` that of the
    least time in the greatest peak. `first_seconds` is the first call, with Numba's compilation of
    what no case before had needed.
    """

    case: str
    threads: int
    flops: int
    first_seconds: float
    seconds: float
    least_seconds: float
    onnxruntime_seconds: float
    onnxruntime_least_seconds: float
    flops_per_second: float
    share: float
    best_share: float
    deviation: float
    passed: bool


def model_of(case: Case, seed: int) -> onnx.ModelProto:
    """The node alone, its weights as initializers."""
    rng = np.random.default_rng(seed)
    # Positive, because the last weights of a normalisation are variances.
    arrays = [rng.uniform(0.1, 1, shape).astype(np.float32) for shape in case.weights]
    weights = [onnx.numpy_helper.from_array(array, f"w{i}") for i, array in enumerate(arrays)]
    names = ["x", *(weight.name for weight in weights)]
    node = helper.make_node(case.kind, names, ["y"], "node", **case.attributes or {})
    graph = helper.make_graph(
        [node],
        "graph",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, case.x)],
        [helper.make_empty_tensor_value_info("y")],
        weights,
    )
    return helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", OPSET)])


def measure(threads: int, repeats: int, seed: int) -> tuple[float, list[Row]]:
    """The peak of one core and every case, interleaved."""
    device = Device("reference", "reference", cores=tuple(cores()[:threads]))
    target = load(Target, "reference")
    runs: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {}
    counts, first, errors, limits = {}, {}, {}, {}
    for case in CASES:
        model = model_of(case, seed)
        graph = hetsched.read_onnx(model)
        x = np.random.default_rng(seed).standard_normal(case.x).astype(np.float32)
        kernel = target.load(target.compile(graph, device), graph, device)
        session = oracle.open_session(model, oracle.session_options(threads=threads))

        def ours(kernel: Any = kernel, x: np.ndarray = x) -> Any:
            return kernel.run([x])

        def theirs(session: Any = session, x: np.ndarray = x) -> Any:
            return session.run(None, {"x": x})

        first[case.name], (found, *_) = _timed(ours)
        runs[case.name] = ours, theirs
        counts[case.name] = sum(map(flops, graph.ops))
        errors[case.name] = deviation(found, theirs()[0])
        limits[case.name] = tolerance("float32").relative
    peaks: list[float] = []
    taken: dict[str, list[tuple[float, float, float]]] = {case.name: [] for case in CASES}
    for _ in range(repeats):
        for name, (ours, theirs) in runs.items():
            peaks.append(peak_flops())
            seconds, _result = _timed(ours)
            taken[name].append((seconds, _timed(theirs)[0], counts[name] / seconds / peaks[-1]))
    rows = []
    for name, times in taken.items():
        mine, others, shares = zip(*times, strict=True)
        seconds = statistics.median(mine)
        rows.append(
            Row(
                case=name,
                threads=threads,
                flops=counts[name],
                first_seconds=first[name],
                seconds=seconds,
                least_seconds=min(mine),
                onnxruntime_seconds=statistics.median(others),
                onnxruntime_least_seconds=min(others),
                flops_per_second=counts[name] / seconds,
                share=statistics.median(shares) / threads,
                best_share=counts[name] / min(mine) / max(peaks) / threads,
                deviation=errors[name],
                passed=errors[name] <= limits[name],
            )
        )
    return statistics.median(peaks), rows


def _timed(work: Callable[[], Any]) -> tuple[float, Any]:
    start = perf_counter()
    result = work()
    return perf_counter() - start, result


def table(rows: Sequence[Row]) -> Table:
    """A row a case and a number of threads."""
    shown = Table(title="the reference, its share of the peak of its cores, and ONNX Runtime")
    shown.add_column("operation", no_wrap=True)
    for title in (
        "threads",
        "first s",
        "ms",
        "least",
        "GFLOP/s",
        "of peak",
        "best",
        "ONNX Runtime ms",
        "least",
        "deviation",
    ):
        shown.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        shown.add_row(
            row.case,
            str(row.threads),
            f"{row.first_seconds:.1f}",
            f"{row.seconds * 1e3:.3f}",
            f"{row.least_seconds * 1e3:.3f}",
            f"{row.flops_per_second / 1e9:.1f}",
            f"{row.share:.1%}",
            f"{row.best_share:.1%}",
            f"{row.onnxruntime_seconds * 1e3:.3f}",
            f"{row.onnxruntime_least_seconds * 1e3:.3f}",
            f"{row.deviation:.0e}{'' if row.passed else ' FAILED'}",
        )
    return shown


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.reference", description=__doc__)
    parser.add_argument("--json", type=Path, required=True, help="where the results go")
    parser.add_argument("--threads", default="1,2", help="numbers of threads with commas between")
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    about = record(given.seed)
    wanted = [int(text) for text in given.threads.split(",") if int(text) <= len(cores())]
    peaks: dict[int, float] = {}
    rows: list[Row] = []
    try:
        for threads in wanted:
            peaks[threads], more = measure(threads, given.repeats, given.seed)
            rows += more
        write(
            given.json,
            {
                **about,
                "repeats": given.repeats,
                "peak_flops_per_second": peaks,
                "rows": [asdict(row) for row in rows],
            },
        )
    except HetschedError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    console = Console(width=None if sys.stdout.isatty() else 200)
    console.print(table(rows))
    for threads, peak in peaks.items():
        console.print(f"{threads} threads: the peak of a core is {peak / 1e9:.1f} GFLOP/s")
    return 0 if all(row.passed for row in rows) else FAILED


if __name__ == "__main__":
    sys.exit(main())
