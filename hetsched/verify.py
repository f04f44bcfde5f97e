"""Results against ONNX Runtime: part by part, then the whole."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from hetsched import oracle
from hetsched.compiler import CompiledPart
from hetsched.dtype import tolerance
from hetsched.errors import HetschedError, InputError, ModelError, VerificationFailed
from hetsched.executable import Executable
from hetsched.forms import pack, unpack
from hetsched.graph import Graph, to_onnx
from hetsched.host import pinned
from hetsched.inputs import seeded_inputs
from hetsched.op import Tensor
from hetsched.plugin import load
from hetsched.target import Target

Progress = Callable[[str, int, int], None]
WHOLE = "whole"
# What floats that were bytes have as their peak, at least.
PEAK_UNITS = 90


@dataclass(frozen=True)
class Comparison:
    """The worst tensor of a part, or of the whole, against ONNX Runtime.

    `deviation` is the largest difference over the largest magnitude that is right, infinite for
    another shape, dtype, or place of NaN and infinity; `problem` says what a part failed with.
    """

    name: str
    device: str
    tensor: str
    dtype: str
    deviation: float
    tolerance: float
    problem: str = ""

    @property
    def passed(self) -> bool:
        return not self.problem and self.deviation <= self.tolerance


@dataclass(frozen=True)
class Verification:
    """What was compared; `independent` are outputs that other inputs do not change."""

    comparisons: tuple[Comparison, ...]
    outputs: tuple[str, ...]
    independent: tuple[str, ...]
    seed: int

    @property
    def culprit(self) -> Comparison | None:
        """The first that deviates, in the order of the plan; the whole comes last."""
        return next((item for item in self.comparisons if not item.passed), None)

    @property
    def meaningful(self) -> bool:
        """Whether any output depends on the inputs; otherwise equality says nothing."""
        return set(self.independent) < set(self.outputs)

    @property
    def passed(self) -> bool:
        return self.culprit is None and self.meaningful

    def check(self) -> None:
        """
        Raises
        ------
        VerificationFailed
            Something deviates, or no output depends on the inputs.
        """
        culprit = self.culprit
        if culprit is not None:
            what = "the whole" if culprit.name == WHOLE else culprit.name
            raise VerificationFailed(
                f"{what} on '{culprit.device}' deviates from ONNX Runtime: "
                + (
                    culprit.problem
                    or f"'{culprit.tensor}' by {culprit.deviation:.2e} of its peak, "
                    f"tolerance {culprit.tolerance:.0e} for {culprit.dtype}"
                )
            )
        if not self.meaningful:
            raise VerificationFailed(
                "no output depends on the inputs, so that equal outputs prove nothing; "
                "give other inputs, or check the model's weights"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "passed": self.passed,
            "seed": self.seed,
            "independent_outputs": list(self.independent),
            "comparisons": [vars(item) | {"passed": item.passed} for item in self.comparisons],
        }


def verify(
    executable: Executable,
    inputs: Mapping[str, np.ndarray] | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Verification:
    """Compares each part, given ONNX Runtime's own values, and the whole on `inputs`.

    Without `inputs` they are made from `seed`.

    Raises
    ------
    InputError
        The inputs do not fit.
    """
    graph = executable.plan.original
    given = dict(inputs) if inputs is not None else seeded_inputs(graph, seed)
    report = progress or (lambda what, done, of: None)
    steps = len(executable.parts) + 2
    report("ONNX Runtime", 0, steps)
    expected = _border_values(executable, given)
    comparisons = []
    for index, item in enumerate(executable.parts):
        report(item.part.name, index + 1, steps)
        comparisons.append(_compare_part(item, expected))
    report(WHOLE, steps - 1, steps)
    comparisons.append(_compare_whole(executable, given, expected))
    outputs = tuple(dict.fromkeys(tensor.name for tensor in graph.outputs))
    independent = _independent(graph, given, expected, seed)
    return Verification(tuple(comparisons), outputs, independent, seed)


def deviation(actual: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference, as a share of the largest finite magnitude of `expected`.

    Infinite where shape, dtype, or the places of NaN and infinities differ.

    Examples
    --------
    >>> deviation(np.array([1.0, 2.02]), np.array([1.0, 2.0]))
    0.010000000000000009
    """
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return float("inf")
    if actual.size == 0:
        return 0.0
    if expected.dtype.kind in "OSUb":
        return 0.0 if np.array_equal(actual, expected) else float("inf")
    exact, found = expected.astype(np.float64), actual.astype(np.float64)
    if expected.dtype.kind in "iu" and np.array_equal(actual, expected):
        return 0.0
    finite = np.isfinite(exact)
    if not np.array_equal(found[~finite], exact[~finite], equal_nan=True):
        return float("inf")
    if not np.isfinite(found[finite]).all():
        return float("inf")
    if not finite.any():
        return 0.0
    peak = float(np.abs(exact[finite]).max())
    worst = float(np.abs(found[finite] - exact[finite]).max())
    return worst / peak if peak else worst


def compare(
    name: str,
    device: str,
    tensors: Sequence[Tensor],
    actual: Mapping[str, np.ndarray],
    expected: Mapping[str, np.ndarray],
    units: int = 0,
) -> Comparison:
    """The worst of `tensors`, by how far it is beyond its tolerance.

    Bytes may differ by `units`, and floats by as much as if their peak were `PEAK_UNITS` of them.
    """
    rows = [
        Comparison(
            name,
            device,
            tensor.name,
            tensor.dtype,
            deviation(np.asarray(actual[tensor.name]), expected[tensor.name]),
            _tolerance(expected[tensor.name], units),
        )
        for tensor in tensors
    ]
    return max(rows, key=lambda row: (row.deviation > row.tolerance, row.deviation))


def _tolerance(expected: np.ndarray, units: int) -> float:
    """Of the peak of `expected`."""
    exact = float(tolerance(expected.dtype.name).relative)
    if not units or expected.dtype.kind not in "iuf":
        return exact
    if expected.dtype.itemsize == 1:
        return units / max(1.0, float(np.abs(expected.astype(np.int64)).max(initial=0)))
    return max(exact, units / PEAK_UNITS) if expected.dtype.kind == "f" else exact


def _border_values(
    executable: Executable, inputs: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """ONNX Runtime's values of all tensors that cross a border, and of the constants there.

    Results are those of the graph before any split.
    """
    graph = executable.plan.graph
    model = to_onnx(graph)
    kept = {output.name for output in model.graph.output}
    known = {value.name: value for value in model.graph.value_info}
    for item in executable.parts:
        for tensor in (*item.graph.outputs, *item.graph.inputs):
            if tensor.name in known and tensor.name not in kept:
                kept.add(tensor.name)
                model.graph.output.append(known[tensor.name])
    try:
        values = oracle.run(model, {tensor.name: inputs[tensor.name] for tensor in graph.inputs})
    except KeyError as error:
        raise InputError(f"input {error} is missing") from None
    original = executable.plan.original
    if original is not graph:
        values |= oracle.run(to_onnx(original), {t.name: inputs[t.name] for t in graph.inputs})
    return {**original.constants, **graph.constants, **inputs, **values}


def _compare_part(item: CompiledPart, expected: Mapping[str, np.ndarray]) -> Comparison:
    device = item.part.device
    target = load(Target, device.target)
    inputs, packed = item.graph.inputs, item.graph.packed

    def run() -> Sequence[np.ndarray]:
        with pinned(device.cores), target.load(item.artifact, item.graph, device) as kernel:
            values = [kernel.receive(_handed(item.graph, tensor, expected)) for tensor in inputs]
            results = [np.array(kernel.send(value)) for value in kernel.run(values)]
        return [
            unpack(array, tensor.shape) if tensor.name in packed else array
            for tensor, array in zip(item.graph.outputs, results, strict=True)
        ]

    with ThreadPoolExecutor(1) as worker:
        done = worker.submit(run)
        error = done.exception()
    if error is not None:
        tensor = item.graph.outputs[0]
        return Comparison(
            item.part.name,
            device.name,
            tensor.name,
            tensor.dtype,
            float("inf"),
            tolerance(tensor.dtype).relative,
            f"it failed: {' '.join(str(error).split()) or repr(error)}",
        )
    names = [tensor.name for tensor in item.graph.outputs]
    actual = dict(zip(names, done.result(), strict=True))
    units = target.units(item.graph, device)
    return compare(item.part.name, device.name, item.graph.outputs, actual, expected, units)


def _handed(graph: Graph, tensor: Tensor, values: Mapping[str, np.ndarray]) -> np.ndarray:
    """The value of `tensor` as the part `graph` takes it."""
    array = values[tensor.name]
    return pack(array, graph.packed[tensor.name]) if tensor.name in graph.packed else array


def _compare_whole(
    executable: Executable,
    inputs: Mapping[str, np.ndarray],
    expected: Mapping[str, np.ndarray],
) -> Comparison:
    devices = ",".join(executable.plan.devices)
    outputs = tuple(dict.fromkeys(executable.outputs))
    try:
        actual = executable.run(inputs)
    except InputError:
        raise
    except HetschedError as error:
        first = outputs[0]
        limit = tolerance(first.dtype).relative
        return Comparison(WHOLE, devices, first.name, first.dtype, float("inf"), limit, str(error))
    return compare(WHOLE, devices, outputs, actual, expected, _units(executable))


def _units(executable: Executable) -> int:
    """What the whole may be off by: no more than its parts."""
    return max(
        load(Target, item.part.device.target).units(item.graph, item.part.device)
        for item in executable.parts
    )


def _independent(
    graph: Graph,
    inputs: Mapping[str, np.ndarray],
    expected: Mapping[str, np.ndarray],
    seed: int,
) -> tuple[str, ...]:
    """The outputs that ONNX Runtime gives for other inputs too."""
    others = [_other(inputs, seed + 1), _other(inputs, seed + 2)]
    changed: set[str] = set()
    for values in others:
        try:
            found = oracle.run(to_onnx(graph), values)
        except ModelError:
            # Indices that are right apart may be wrong together; then the next try decides.
            continue
        changed |= {
            name
            for name, array in found.items()
            if not np.array_equal(array, expected[name], equal_nan=array.dtype.kind in "fc")
        }
    return tuple(dict.fromkeys(t.name for t in graph.outputs if t.name not in changed))


def _other(inputs: Mapping[str, np.ndarray], seed: int) -> dict[str, np.ndarray]:
    """The same values in another order, and floats moved: never an index that was not there."""
    rng = np.random.default_rng(seed)
    found = {}
    for name, array in inputs.items():
        values = rng.permutation(array.reshape(-1)).reshape(array.shape)
        if array.dtype.kind not in "OSUbiu":
            values = (values.astype(np.float64) * 1.5 + 0.25).astype(array.dtype)
        elif array.dtype == bool:
            values = ~array
        found[name] = values
    return found
