"""A part as a Relax module of TVM: imported, folded, legalised, its weights taken out.

Importing this file loads TVM's compiler, so a target imports it when it first compiles.
"""

import re
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from threading import Condition, RLock
from typing import Any, TypeVar

import numpy as np
import onnx
import tvm
from tvm import relax, topi
from tvm.relax import vm_build
from tvm.relax.expr_functor import PyExprMutator, mutator
from tvm.relax.frontend.onnx import onnx_frontend
from tvm.tirx.compilation_pipeline import get_tir_pipeline

from hetsched.dtype import STRING, numpy_dtype
from hetsched.errors import CompileError, UnsupportedOperation
from hetsched.graph import DETACHED_NBYTES, Graph, to_onnx
from hetsched.host import cores
from hetsched.lowering import recurrent
from hetsched.lowering.entry import PIPELINE, direct
from hetsched.lowering.for_tvm import for_tvm, refusal
from hetsched.lowering.integer import Integers
from hetsched.lowering.quantized import INTEGER, quantized
from hetsched.lowering.stack import ON_STACK
from hetsched.lowering.temporaries import temporaries
from hetsched.schedules import polynomials  # noqa: F401
from hetsched.schedules.apply import scheduled
from hetsched.schedules.layout import blocked
from hetsched.schedules.legal import legalisations
from hetsched.schedules.rules import Rules
from hetsched.schedules.sorting import in_loops
from hetsched.schedules.vectors import Vectors
from hetsched.tvm_runtime import ERRORS, first_line, quiet, to_numpy, to_tvm

_generate = tvm.get_global_func("target.build.llvm")
_pack = tvm.get_global_func("runtime.ModulePackImportsToLLVM")

# TVM's errors at its border, where a model that it does not serve is no error of ours.
REFUSALS: tuple[type[Exception], ...] = (*ERRORS, UnsupportedOperation)

# The importer warns of every tensor that it renames, and prints the graph before it raises.
warnings.filterwarnings("ignore", module=r"tvm\.")
onnx_frontend.print = lambda *_: None

# What code generation knows, of the operations that remain when tensor operations are lowered.
EMITTED = frozenset(
    "relax.call_tir relax.call_pure_packed relax.call_dps_packed relax.shape_of "
    "relax.tensor_to_shape relax.shape_to_tensor relax.null_value".split()
)
MISSING_CONVERTER = re.compile(r"The following operators are not supported for frontend ONNX: .*")
# For a module of which no code is made.
ANY_VECTORS = Vectors(lanes=4, registers=16)
# A remainder in the text of a function.
WRAPS = re.compile(r" % |T\.(bitwise_and|truncmod|floormod)\(")
# For functions that wrap: see `build`.
CAREFUL = {"cl-opt": ["-vectorize-loops:bool=false"]}
# A loop that threads share, in the text of a function.
SHARED = "T.parallel("
# What is folded is stored, and a repeated value is cheaper to make again.
LARGEST_REPEATED_NBYTES = 4096
# The most LLVM modules that the functions of a part are shared out to. Not the number of cores, so
# that the code is the same on every machine.
MOST_MODULES = 8

Made = TypeVar("Made")

# TVM's passes in Python keep what they work on in lists of the process: one part at a time. Code
# generation, the longer half, does not, and runs in several threads.
passes = RLock()


@dataclass(frozen=True, eq=False)
class Lowered:
    """A module of loops, and the weights of the graph in it by address: (name, TVM's tensor)."""

    module: Any
    known: Mapping[int, tuple[str, Any]]


@dataclass(frozen=True, eq=False)
class RelaxPart:
    """`main` of `module` takes the part's inputs, then `weights` in order.

    It makes the outputs that operations make, each once, in order. With `workspace_nbytes` it is
    what `direct` makes, else a program of TVM's virtual machine.
    """

    module: Any
    weights: Mapping[str, np.ndarray]
    constants: bytes = b""
    workspace_nbytes: int | None = None
    calls: tuple[str, ...] = ()

    @property
    def is_parallel(self) -> bool:
        """Whether any loop is shared between threads."""
        functions = self.module.functions.values()
        return any(
            SHARED in function.script()
            for function in functions
            if isinstance(function, tvm.tirx.PrimFunc)
        )


def refusal_of(graph: Graph, attempt: Callable[[Graph], Any] | None = None) -> str | None:
    """Why TVM cannot import and lower `graph`, or do what `attempt` does; no code is made."""
    attempt = attempt or lowered
    with quiet(), passes:
        try:
            attempt(graph)
        except REFUSALS as error:
            return _culprit(graph, error, attempt)
    return None


def compile_part(
    graph: Graph,
    build: Callable[[Any], Any],
    rules: Rules,
    interpreted: bool = False,
    *,
    sorts: bool = True,
) -> tuple[Any, RelaxPart]:
    """What `build` makes of the part's module of loops, and the part that it was made of.

    The loops are scheduled by `rules`. If `interpreted`, the part is a program of TVM's virtual
    machine even if it could do without. TVM's runtime `sorts`, or loops do. Several threads may
    compile parts at once.

    Raises
    ------
    CompileError
        TVM refuses the part.
    """

    def attempt(part: Graph) -> tuple[Any, RelaxPart]:
        with passes:
            made = _made(part, rules, interpreted, sorts)
        return build(made.module), made

    with quiet():
        try:
            return attempt(graph)
        except REFUSALS as error:
            why = _culprit(graph, error, attempt)
    # Outside, so that TVM's half-made functions do not live on, and complain, with the error.
    raise CompileError(f"part '{graph.name}': {why}")


def attempted(graph: Graph, attempt: Callable[[Graph], Made]) -> Made:
    """What `attempt` makes of `graph` by TVM's passes; one part at a time.

    Raises
    ------
    CompileError
        TVM refuses the part; the message has the operation.
    """

    def alone(part: Graph) -> Made:
        with passes:
            return attempt(part)

    with quiet():
        try:
            return alone(graph)
        except REFUSALS as error:
            why = _culprit(graph, error, alone)
    raise CompileError(f"part '{graph.name}': {why}")


def part_of(graph: Graph, rules: Rules) -> RelaxPart:
    """The part that `compile_part` makes code of; no code is made.

    Raises
    ------
    CompileError
        TVM refuses the part.
    """
    with quiet(), passes:
        try:
            return _made(graph, rules)
        except REFUSALS as error:
            why = _said(error)
    raise CompileError(f"part '{graph.name}': {why}")


def part_temporaries(
    part: RelaxPart, llvm: Mapping[str, Any], threads: int
) -> tuple[tuple[int, ...], ...]:
    """The bytes that each function which `part` calls holds at once, beside the workspace."""
    with quiet(), passes:
        return temporaries(part.module, part.calls, llvm, threads)


def _made(graph: Graph, rules: Rules, interpreted: bool = False, sorts: bool = True) -> RelaxPart:
    fused = fuse(lowered(graph, rules, sorts=sorts))
    fused = replace(fused, module=scheduled(fused.module, rules))
    lifted = lift_constants(fused, graph)
    return lifted if interpreted else _direct(lifted)


def lowered(
    graph: Graph,
    rules: Rules | None = None,
    vectors: Vectors | None = ANY_VECTORS,
    *,
    sorts: bool = True,
) -> Lowered:
    """The module of `graph` in which every tensor operation is a call of a TensorIR function.

    With `rules`, operations get the loops that have a schedule for them. Without `vectors` none
    has loops of its own for a processor: all are left to be scheduled. TVM's runtime `sorts`, or
    loops do.

    Raises
    ------
    UnsupportedOperation, or one of `ERRORS`
        TVM's importer or its operators do not cover the graph.
    """
    made = dict.fromkeys(t for t in graph.outputs if t.name in graph.producers)
    graph = replace(graph, outputs=tuple(made))
    graph = quantized(graph)
    for op in graph.ops:
        why = refusal(op, graph)
        if why is not None:
            raise UnsupportedOperation(f"{op}: {why}")
    graph = for_tvm(graph)
    imported = _imported(graph, vectors if rules is None else rules.vectors)
    module = relax.transform.DecomposeOpsForInference()(imported.module)
    module = _rewritten(module, _Folder(module))
    if rules is not None:
        module = blocked(
            module,
            rules,
            [index for index, t in enumerate(graph.inputs) if t.name in graph.packed],
            [index for index, t in enumerate(graph.outputs) if t.name in graph.packed],
        )
    module = relax.transform.DeadCodeElimination()(module)
    ours = {} if rules is None else legalisations(rules)
    with tvm.target.Target("llvm"):
        module = module if sorts else in_loops(module)
        module = relax.backend.DispatchSortScan()(module)
        module = relax.transform.LegalizeOps({"relax.take": _take, **ours})(module)
    _check(module, graph if rules is not None else replace(graph, packed={}))
    return replace(imported, module=module)


def fuse(part: Lowered) -> Lowered:
    """One TensorIR function for each chain of operations that can share its loops."""
    steps = (
        relax.transform.AnnotateTIROpPattern(),
        relax.transform.FuseOps(),
        relax.transform.FuseTIR(),
        relax.transform.DeadCodeElimination(),
    )
    return replace(part, module=tvm.transform.Sequential(steps)(part.module))


def _direct(part: RelaxPart) -> RelaxPart:
    """The part without the virtual machine, where it can do without."""
    found = direct(part.module)
    if found is None:
        return part
    return RelaxPart(
        found.module, part.weights, found.constants, found.workspace_nbytes, found.calls
    )


def build(module: Any, llvm: Mapping[str, Any], folder: Path) -> list[Path]:
    """The object files in `folder` that a part's module becomes, to be linked into one library.

    `llvm` is TVM's description of the processor. The functions are shared out to several LLVM
    modules, which are built side by side; the same module gives the same files.

    LLVM 22 vectorises some loops wrongly whose loads wrap around, `x[i % 8]`, as if they did not
    (https://github.com/llvm/llvm-project/issues/156849 is of the kind): functions that have such
    an index go through an LLVM that leaves loops as they are. Loops that a schedule vectorises
    are not concerned.
    """
    target = tvm.target.Target(dict(llvm))
    careful = tvm.target.Target({**llvm, **CAREFUL})
    builder = relax.ExecBuilder() if isinstance(module["main"], relax.Function) else None
    with passes:
        if builder:
            with target:
                module = relax.get_pipeline("default")(module)
            module = vm_build._vmcodegen(builder, module)
        texts = {v.name_hint: function.script() for v, function in module.functions.items()}
    # Alone: TVM tells LLVM that two buffers never overlap, which no longer holds where one function
    # writes what another reads and both are inlined into one.
    caller = [] if builder else ["main"]
    functions = {v.name_hint: (v, function) for v, function in module.functions.items()}
    loops = {name: text for name, text in sorted(texts.items()) if name not in caller}
    wrapping = [name for name, text in loops.items() if WRAPS.search(text)]
    plain = {name: len(text) for name, text in loops.items() if name not in wrapping}
    shares = [
        *((share, target) for share in _shared_out(plain)),
        (wrapping, careful),
        (caller, target),
    ]
    lower, finalise, _ = get_tir_pipeline(ON_STACK if builder else PIPELINE)

    def generate(index: int) -> Path:
        names, chosen = shares[index]
        path = folder / f"loops{index}.o"
        hosted = tvm.tirx.transform.BindTarget(chosen.with_host(chosen))
        own = hosted(tvm.IRModule(dict(functions[name] for name in names)))
        own = finalise()(lower(own))
        # Options of LLVM hold for the whole process.
        with _options.altered() if chosen is careful else _options.as_they_are():
            _generate(own, chosen).write_to_file(str(path))
        return path

    wanted = [index for index, (names, _) in enumerate(shares) if names]
    with ThreadPoolExecutor(len(cores())) as workers:
        paths = list(workers.map(generate, wanted))
    if builder is None:
        return paths
    with passes:
        executable = vm_build._vmlink(builder, target)
        packed = _pack(executable.mod, False, str(target), "")
        paths.append(folder / "program.o")
        packed.write_to_file(str(paths[-1]))
    return paths


def _shared_out(nbytes: Mapping[str, int]) -> list[list[str]]:
    """The names in at most `MOST_MODULES` shares of about equal work, by the lengths of texts."""
    shares: list[list[str]] = [[] for _ in range(min(MOST_MODULES, len(nbytes)))]
    work = [0] * len(shares)
    for name in sorted(nbytes, key=lambda name: (-nbytes[name], name)):
        least = work.index(min(work))
        shares[least].append(name)
        work[least] += nbytes[name]
    return shares


class _Options:
    """The options of LLVM: many threads may build as long as none has altered them."""

    def __init__(self) -> None:
        self._changed = Condition()
        self._building = 0

    @contextmanager
    def as_they_are(self) -> Iterator[None]:
        with self._changed:
            self._building += 1
        try:
            yield
        finally:
            with self._changed:
                self._building -= 1
                self._changed.notify_all()

    @contextmanager
    def altered(self) -> Iterator[None]:
        # Whoever builds next waits for the condition's lock, which is held to the end.
        with self._changed:
            self._changed.wait_for(lambda: self._building == 0)
            yield


_options = _Options()


def lift_constants(part: Lowered, graph: Graph) -> RelaxPart:
    """Constants of `DETACHED_NBYTES` or more become parameters of `main`, behind the inputs.

    One that is a weight of `graph` unchanged keeps its array and name; any other is named by its
    content, so that parts which make the same one share it.
    """
    lifter = _Lifter(part, graph)
    module = _rewritten(part.module, lifter)
    main = module["main"]
    with_weights = relax.Function(
        [*main.params, *lifter.variables.values()], main.body, main.ret_ty, main.is_pure, main.attrs
    )
    module.update_func(module.get_global_var("main"), with_weights)
    return RelaxPart(module, lifter.weights)


def _culprit(graph: Graph, error: Exception, attempt: Callable[[Graph], Any]) -> str:
    """Which operation TVM refuses, and why; found by trying each alone."""
    said = _said(error)
    for op in graph.ops:
        try:
            attempt(graph.part([op], op.name))
        except REFUSALS as found:
            said = _said(found)
            return said if str(op) in said else f"{op}: {said}"
    return said


def _said(error: Exception) -> str:
    traceback.clear_frames(error.__traceback__)
    said = first_line(error)
    return MISSING_CONVERTER.sub("TVM has no converter for it", said)


def _imported(graph: Graph, vectors: Vectors | None) -> Lowered:
    importer = _Importer(graph, vectors)
    for tensor in (*graph.inputs, *(t for op in graph.ops for t in (*op.reads, *op.writes))):
        if tensor.dtype == STRING:
            raise UnsupportedOperation(f"'{tensor.name}' is of strings")
        if not tensor.size and tensor.name not in graph.constants:
            raise UnsupportedOperation(f"'{tensor.name}' has no elements")
    model = to_onnx(graph, weights=False)
    # The importer makes names fit its language and does not see when two become one.
    names: dict[str, str] = {"": ""}
    for value in (*model.graph.input, *model.graph.initializer):
        value.name = names.setdefault(value.name, f"t{len(names)}")
    for index, node in enumerate(model.graph.node):
        # What the importer knows a node by.
        node.name = str(index)
        if index in importer.layers:
            # Read already; the importer takes offence at an empty one.
            del node.attribute[:]
        for side in (node.input, node.output):
            side[:] = [names.setdefault(name, f"t{len(names)}") for name in side]
    for value in (*model.graph.value_info, *model.graph.output):
        value.name = names[value.name]
    # Weights stay where they are instead of going through the model, which would copy them.
    known = {}
    for name, array in graph.constants.items():
        tensor = to_tvm(array, array.dtype)
        known[tensor.data_ptr()] = (name, tensor)
        importer._nodes[names[name]] = relax.const(tensor)
    del model.graph.initializer[:]
    module = importer.from_onnx(model.graph, graph.opsets.get("", 1))
    return Lowered(module, known)


def _rewritten(module: Any, rewriter: Any) -> Any:
    main = module["main"]
    body = rewriter.visit_expr(main.body)
    changed = relax.Function(main.params, body, main.ret_ty, main.is_pure, main.attrs)
    module.update_func(module.get_global_var("main"), changed)
    return module


def _check(module: Any, graph: Graph) -> None:
    """TVM skips what it cannot lower, and an importer that errs shows in the type of a result."""
    main = module["main"]
    for block in main.body.blocks:
        for binding in block.bindings:
            value = getattr(binding, "value", None)
            operation = getattr(value, "op", None)
            if isinstance(operation, tvm.ir.Op) and operation.name not in EMITTED:
                raise UnsupportedOperation(f"TVM has no loops for {operation.name}")
    results = main.ret_ty.fields if isinstance(main.ret_ty, relax.TupleType) else [main.ret_ty]
    for tensor, result in zip(map(graph.handed, graph.outputs), results, strict=True):
        shape = getattr(result, "shape", None)
        found = tuple(int(d) for d in shape) if isinstance(shape, relax.ShapeExpr) else None
        if found != tensor.shape or str(result.dtype) != tensor.dtype:
            raise UnsupportedOperation(
                f"TVM makes {result.dtype}{list(found or '?')} of what is {tensor}"
            )


def _take(builder: Any, call: Any) -> Any:
    # The default is to read outside of the data where an index points there.
    return builder.call_te(topi.take, *call.args, call.attrs.axis, mode="clip")


def _reshaped(call: Any, array: np.ndarray, *_: Any) -> np.ndarray:
    return array.reshape(_shape(call))


def _broadcast(call: Any, array: np.ndarray, *_: Any) -> np.ndarray | None:
    result = np.broadcast_to(array, _shape(call))
    return result if result.nbytes <= LARGEST_REPEATED_NBYTES else None


def _transposed(call: Any, array: np.ndarray) -> np.ndarray:
    axes = call.attrs.axes
    return array.transpose(None if axes is None else [int(axis) for axis in axes])


def _padded(call: Any, array: np.ndarray, *_: Any) -> np.ndarray | None:
    if call.attrs.pad_mode != "constant" or float(call.attrs.pad_value):
        return None
    widths = [int(width) for width in call.attrs.pad_width]
    return np.pad(array, list(zip(widths[::2], widths[1::2], strict=True)))


def _taken(call: Any, array: np.ndarray, places: np.ndarray) -> np.ndarray | None:
    axis = call.attrs.axis
    if axis is None or places.min(initial=0) < 0 or places.max(initial=0) >= array.shape[axis]:
        return None
    return np.asarray(array.take(places, int(axis)))


def _shape(call: Any) -> tuple[int, ...]:
    return tuple(int(dim) for dim in call.ty.shape)


def _elementwise(function: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    return lambda call, *arrays: np.asarray(function(*arrays))


# What the importer makes of constants alone. TVM's own folding compiles a program for each value
# and is most of the time that compiling a network takes.
FOLDED: Mapping[str, Callable[..., np.ndarray | None]] = {
    "relax.reshape": _reshaped,
    "relax.expand_dims": _reshaped,
    "relax.squeeze": _reshaped,
    "relax.flatten": _reshaped,
    "relax.permute_dims": _transposed,
    "relax.nn.pad": _padded,
    "relax.take": _taken,
    "relax.broadcast_to": _broadcast,
    "relax.astype": lambda call, array: array.astype(numpy_dtype(str(call.ty.dtype))),
    "relax.where": _elementwise(np.where),
    "relax.isnan": _elementwise(np.isnan),
    "relax.add": _elementwise(np.add),
    "relax.subtract": _elementwise(np.subtract),
    "relax.multiply": _elementwise(np.multiply),
    "relax.maximum": _elementwise(np.maximum),
    "relax.minimum": _elementwise(np.minimum),
    "relax.less": _elementwise(np.less),
    "relax.negative": _elementwise(np.negative),
    "relax.sqrt": _elementwise(np.sqrt),
}
# What only names elements differently.
VIEWS = frozenset(
    f"relax.{name}" for name in "reshape expand_dims squeeze flatten permute_dims".split()
)


class _Importer(onnx_frontend.ONNXGraphImporter):  # type: ignore[misc]
    """TVM's importer, with the operations of `graph` that it lacks.

    Raises
    ------
    UnsupportedOperation
        One of these says what has no meaning here.
    """

    def __init__(self, graph: Graph, vectors: Vectors | None) -> None:
        super().__init__({}, "float32")
        self._vectors = vectors
        self._ops = graph.ops
        self._integers = Integers(self.bb, vectors)
        self.layers = {
            index: recurrent.read(op, graph.constants)
            for index, op in enumerate(graph.ops)
            if op.kind in recurrent.KINDS
        }

    def _check_for_unsupported_ops(self, graph: Any) -> None:
        foreign = onnx.GraphProto()
        foreign.node.extend(
            node
            for node in graph.node
            if node.op_type not in recurrent.KINDS and (node.domain, node.op_type) not in INTEGER
        )
        super()._check_for_unsupported_ops(foreign)

    def _convert_operator(self, op_name: str, inputs: Any, attrs: Any, opset: int) -> Any:
        integers = self._integers.emitted(op_name, list(inputs), attrs)
        if integers is not None:
            return integers
        if op_name not in recurrent.KINDS:
            return super()._convert_operator(op_name, inputs, attrs, opset)
        index = int(attrs["tvm_custom"]["name"])
        op, layer = self._ops[index], self.layers[index]
        return relax.Tuple(recurrent.convert(self.bb, op, layer, inputs, self._vectors))


@mutator
class _Folder(PyExprMutator):  # type: ignore[misc]
    """Computes the calls of `FOLDED` whose tensors are all constants."""

    def __init__(self, module: Any) -> None:
        super().__init__(module)
        self._known: dict[Any, Any] = {}
        self._views: dict[Any, Any] = {}

    def visit_var_binding_(self, binding: Any) -> None:
        value = self.visit_expr(binding.value)
        if isinstance(value, tvm.ir.GenericConst):
            self._known[binding.var] = value
            return
        super().visit_var_binding_(binding)
        if _name(value) in VIEWS:
            self._views[self.visit_expr(binding.var)] = value

    def visit_var_(self, op: Any) -> Any:
        return self._known[op] if op in self._known else super().visit_var_(op)

    def visit_dataflow_var_(self, op: Any) -> Any:
        return self._known[op] if op in self._known else super().visit_dataflow_var_(op)

    def visit_call_(self, op: Any) -> Any:
        call = super().visit_call_(op)
        if _name(call) == "relax.shape_to_tensor":
            return _constant_shape(call)
        if _name(call) == "relax.take":
            call = self._slice(call)
        folded = FOLDED.get(_name(call))
        if folded is None or not isinstance(getattr(op.ty, "shape", None), relax.ShapeExpr):
            return call
        arrays = []
        for argument in call.args:
            if isinstance(argument, tvm.ir.GenericConst):
                arrays.append(to_numpy(argument.value))
            elif not isinstance(argument, relax.ShapeExpr):
                return call
        result = folded(op, *arrays)
        dtype = numpy_dtype(str(op.ty.dtype))
        if result is None or result.dtype != dtype or result.shape != _shape(op):
            return call
        return relax.const(to_tvm(result, dtype))

    def _slice(self, call: Any) -> Any:
        """A take of one element of an axis, as a slice of its own copy of the views before it.

        Of views that several read, TVM would make a tensor.
        """
        data, index = call.args
        axis = call.attrs.axis
        if axis is None or not isinstance(index, tvm.ir.GenericConst) or index.ty.ndim:
            return call
        if data not in self._views or not isinstance(data.ty.shape, relax.ShapeExpr):
            return call
        size = data.ty.shape[int(axis)]
        place = int(to_numpy(index.value))
        if not isinstance(size, tvm.tirx.IntImm) or not 0 <= place < int(size):
            return call
        one = relax.op.strided_slice(self._viewed(data), [int(axis)], [place], [place + 1])
        return relax.op.squeeze(self.builder_.emit(one), [int(axis)])

    def _viewed(self, value: Any) -> Any:
        view = self._views.get(value)
        if view is None:
            return value
        source, *rest = view.args
        copy = relax.Call(view.op, [self._viewed(source), *rest], view.attrs, view.ty_args)
        return self.builder_.emit(copy)


def _constant_shape(call: Any) -> Any:
    values = getattr(call.args[0].ty, "values", None)
    if values is None or not all(isinstance(dim, tvm.tirx.IntImm) for dim in values):
        return call
    shape = np.array([int(dim) for dim in values], np.int64)
    return relax.const(to_tvm(shape, shape.dtype))


def _name(value: Any) -> str:
    return getattr(getattr(value, "op", None), "name", "")


@mutator
class _Lifter(PyExprMutator):  # type: ignore[misc]
    """Turns constants into variables, and collects what they are."""

    def __init__(self, part: Lowered, graph: Graph) -> None:
        super().__init__(part.module)
        self._known = part.known
        self._graph = graph
        self.weights: dict[str, np.ndarray] = {}
        self.variables: dict[str, Any] = {}

    def visit_generic_const_(self, op: Any) -> Any:
        array = to_numpy(op.value)
        if array.nbytes < DETACHED_NBYTES:
            return op
        name = self._name(array)
        if name not in self.variables:
            self.weights[name] = self._graph.constants.get(name, array)
            self.variables[name] = relax.Var(f"weight{len(self.variables)}", op.ty)
        return self.variables[name]

    def _name(self, array: np.ndarray) -> str:
        name, _ = self._known.get(array.ctypes.data, ("", None))
        own = self._graph.constants.get(name)
        if own is not None and own.shape == array.shape and own.dtype == array.dtype:
            return name
        content = sha256(f"{array.dtype} {array.shape}".encode())
        content.update(array.tobytes())
        return f"sha256:{content.hexdigest()[:32]}"
