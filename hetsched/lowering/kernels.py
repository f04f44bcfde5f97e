"""The text of loops in OpenCL C: what TVM's passes leave of a function, as kernels.

TVM's own generator of OpenCL C knows neither the polynomials of `schedules/polynomials.py` nor half
floats on a device that can only store them, and spells out each lane of a vector. Here a vector is
OpenCL's own. Names are counted within a kernel, so that equal loops have equal texts.

Half floats and bfloat16 are float32 in registers, and rounded where they are stored or where the
model rounds them. Truth values are bytes in memory, and in vectors the masks that comparisons give.

Importing this file loads TVM's compiler.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from math import inf, isinf, isnan, prod
from typing import Any

import tvm
from tvm import ir, tirx

from hetsched.errors import UnsupportedOperation
from hetsched.lowering.stack import is_tile
from hetsched.schedules import polynomials
from hetsched.schedules.integer import PAIRS, QUADS

# A work-item's buffers that are larger are given places in the workspace.
LARGEST_PRIVATE_NBYTES = 1 << 14
# Of pointers: every device takes 1024 bytes of parameters.
MOST_PARAMETERS = 127
# Of what lies in the workspace, and of private arrays, so that vectors are whole cache lines.
ALIGNMENT = 64
LANES = (2, 4, 8, 16)
LANE_NAMES = "0123456789abcdef"
DTYPE = re.compile(r"(bool|bfloat|float|uint|int)(\d*)(?:x(\d+))?")
INTEGERS = {8: "char", 16: "short", 32: "int", 64: "long"}
SUFFIXES = {"int": "", "uint": "u", "long": "L", "ulong": "uL"}
ARITHMETIC = {
    tirx.Add: "+", tirx.Sub: "-", tirx.Mul: "*", tirx.Div: "/", tirx.Mod: "%",
    tirx.BitwiseAnd: "&", tirx.BitwiseOr: "|", tirx.BitwiseXor: "^", tirx.LShift: "<<",
    tirx.RShift: ">>",
}  # fmt: skip
COMPARISONS = {
    tirx.EQ: "==", tirx.NE: "!=", tirx.LT: "<", tirx.LE: "<=", tirx.GT: ">", tirx.GE: ">=",
}  # fmt: skip
BITWISE = {
    "bitwise_and": "&", "bitwise_or": "|", "bitwise_xor": "^", "shift_left": "<<",
    "shift_right": ">>",
}  # fmt: skip
# TVM's and C's names of what OpenCL calls otherwise.
RENAMED = {"abs": "fabs", "nearbyint": "rint", "power": "pow"}
FUNCTIONS = frozenset(
    "acos acosh asin asinh atan atan2 atanh ceil clz copysign cos cosh erf exp exp10 exp2 expm1 "
    "fabs floor fma fmod hypot ldexp log log10 log1p log2 nextafter popcount pow rint round "
    "rsqrt sin sinh sqrt tan tanh trunc".split()
)
# Functions that a processor has an instruction for, which PoCL's library of functions does not use.
ROUNDING = {"floor": "floor", "ceil": "ceil", "trunc": "trunc", "rint": "roundeven"}
WHOLE = (
    "#if defined(__has_builtin) && __has_builtin(__builtin_elementwise_{builtin})\n"
    "#define whole_{name}(x) __builtin_elementwise_{builtin}(x)\n"
    "#else\n#define whole_{name}(x) {name}(x)\n#endif\n"
)
QUESTIONS = frozenset(["isnan", "isinf", "isfinite"])
POLYNOMIALS: Mapping[str, Callable[[Any], Any]] = {
    "exp": polynomials.exp, "erf": polynomials.erf, "tanh": polynomials.tanh,
}  # fmt: skip
# A vector at any address of its elements: PoCL stores by vstore16 in three parts.
UNALIGNED = "typedef struct __attribute__((packed)) {{ {vector} v; }} unaligned_{vector};\n"
# Of an innermost loop that is unrolled: stores in all turns, and turns.
MOST_UNROLLED, MOST_TURNS = 64, 16
# To the second cache, of compilers for processors; what OpenCL has for it does nothing in PoCL.
FETCH = (
    "#ifdef __clang__\n"
    "#define fetch(address) __builtin_prefetch((const void*)(size_t)(address), 0, 2)\n"
    "#else\n#define fetch(address)\n#endif\n"
)
# The sum of the products of two numbers of 16 bits in each lane: an instruction of x86.
MULTIPLY_PAIRS = """#if defined(__clang__) && defined({feature})
typedef union {{
  int{lanes} given;
  short words __attribute__((__vector_size__({nbytes})));
  int sums __attribute__((__vector_size__({nbytes})));
}} pairs{lanes};
static inline int{lanes} {name}(int{lanes} a, int{lanes} b) {{
  pairs{lanes} x, y, z;
  x.given = a;
  y.given = b;
  z.sums = __builtin_ia32_pmaddwd{bits}(x.words, y.words);
  return z.given;
}}
#else
static inline int{lanes} {name}(int{lanes} a, int{lanes} b) {{
  return ((a << 16) >> 16) * ((b << 16) >> 16) + (a >> 16) * (b >> 16);
}}
#endif
"""
PAIRS_FEATURES = {4: "__SSE2__", 8: "__AVX2__", 16: "__AVX512BW__"}
# A total and four products of bytes in each lane: an instruction that PoCL takes for no processor
# by itself. As text it needs no permission, which a function would lose where PoCL puts it into one
# of its own.
QUADS_LANES = 16
MULTIPLY_QUADS = """#if defined(__clang__) && defined(HAS_QUADS)
static inline int16 multiply_quads(int16 total, int16 a, int16 b) {
  __asm__("vpdpbusd %2, %1, %0" : "+v"(total) : "v"(a), "v"(b));
  return total;
}
#else
static inline int16 multiply_quads(int16 total, int16 a, int16 b) {
  total += (a & 255) * ((b << 24) >> 24) + ((a >> 8) & 255) * ((b << 16) >> 24);
  return total + ((a >> 16) & 255) * ((b << 8) >> 24) + ((a >> 24) & 255) * (b >> 24);
}
#endif
"""
# Calls that are their argument.
HINTS = frozenset(["likely", "tvm_thread_invariant"])


@dataclass(frozen=True)
class Nest:
    """Loops of a function as a kernel for `items` work-items, each a group of its own.

    `text` is what follows the kernel's name. For each pointer, `arguments` have the number of a
    parameter of the function, or behind these of a temporary, and whether it is written.
    `helpers` are the texts of functions that it calls.
    """

    text: str
    arguments: tuple[tuple[int, bool], ...]
    items: int
    helpers: tuple[str, ...]


@dataclass(frozen=True)
class Kernels:
    """A function as `nests`, to be run in turn.

    `temporaries` are the bytes of what lies between them, or is too large for a work-item.
    """

    nests: tuple[Nest, ...]
    temporaries: tuple[int, ...]


def kernels(function: Any, units: int) -> Kernels:
    """The kernels of a lowered function, for a device of so many compute units.

    On one unit a function is one kernel of one work-item. On more, each outer loop whose iterations
    are parallel is a kernel, whose work-items take equal shares of them.

    Raises
    ------
    UnsupportedOperation
        It does something that OpenCL C cannot say.
    """
    parameters = {parameter: index for index, parameter in enumerate(function.params)}
    # Tensors begin where their places do.
    starts = [p.elem_offset for p in function.params if isinstance(p.elem_offset, tirx.Var)]
    statements, shared = _top(function.body)
    groups = [statements] if units == 1 else _groups(statements)
    temporaries: list[int] = []

    def temporary(buffer: Any, copies: int) -> int:
        temporaries.append(copies * _slot_nbytes(buffer))
        return len(parameters) + len(temporaries) - 1

    places = dict(parameters)
    used = [set(tirx.analysis.undefined_vars(tirx.SeqStmt(list(group)))) for group in groups]
    for statement in shared:
        readers = [group for group, names in zip(groups, used, strict=True)
                   if statement.buffer in names]  # fmt: skip
        if len(readers) == 1 and not any(map(_is_parallel, readers[0])):
            readers[0].insert(0, statement)
        elif readers:
            places[statement.buffer] = temporary(statement.buffer, 1)
    nests = []
    for group in groups:
        writer = _Writer(places, units, temporary, dict.fromkeys(starts, "0"))
        for statement in group:
            writer.top(statement)
        nests.append(writer.nest())
    return Kernels(tuple(nest for nest in nests if nest is not None), tuple(temporaries))


def _top(body: Any) -> tuple[list[Any], list[Any]]:
    """The statements of a function in order, and apart from them what it allocates for these."""
    statements: list[Any] = []
    allocated: list[Any] = []
    todo = [body]
    while todo:
        statement = todo.pop()
        match statement:
            case tirx.SeqStmt():
                todo.extend(reversed(statement.seq))
            case tirx.AttrStmt():
                todo.append(statement.body)
            case tirx.AllocBuffer():
                allocated.append(statement)
            case _:
                statements.append(statement)
    return statements, allocated


def _groups(statements: Sequence[Any]) -> list[list[Any]]:
    """Each parallel loop alone, what lies between two together; with the values named before."""
    groups: list[list[Any]] = []
    named: list[Any] = []
    is_open = False
    for statement in statements:
        if isinstance(statement, tirx.Bind | tirx.DeclBuffer):
            named.append(statement)
            if is_open:
                groups[-1].append(statement)
            continue
        if not is_open or _is_parallel(statement):
            groups.append(list(named))
        groups[-1].append(statement)
        is_open = not _is_parallel(statement)
    return groups


def _is_parallel(statement: Any) -> bool:
    return isinstance(statement, tirx.For) and statement.kind == tirx.ForKind.PARALLEL


def _slot_nbytes(buffer: Any) -> int:
    nbytes = prod(map(int, buffer.shape)) * int(tvm.DataType(str(buffer.dtype)).itemsize)
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True)
class _Type:
    """An element type, by its kind and bits, and the lanes of a vector of it."""

    kind: str
    bits: int
    lanes: int = 1

    @classmethod
    def of(cls, dtype: Any) -> "_Type":
        """
        Raises
        ------
        UnsupportedOperation
            OpenCL C has no such type.
        """
        return _type(str(dtype))

    @property
    def is_float(self) -> bool:
        return self.kind in ("float", "bfloat")

    @property
    def is_short(self) -> bool:
        """Whether it is a float of 16 bits, which is one of 32 in registers."""
        return self.is_float and self.bits == 16

    @property
    def scalar(self) -> str:
        """One lane in a register."""
        if self.kind == "bool":
            return "bool" if self.lanes == 1 else "int"
        if self.is_float:
            return "double" if self.bits == 64 else "float"
        return ("u" if self.kind == "uint" else "") + INTEGERS[self.bits]

    @property
    def text(self) -> str:
        """In a register."""
        return self.scalar + (str(self.lanes) if self.lanes > 1 else "")

    @property
    def mask(self) -> str:
        """What comparing two of these vectors gives."""
        return f"{INTEGERS[32 if self.is_short else self.bits]}{self.lanes}"


@cache
def _type(dtype: str) -> _Type:
    found = DTYPE.fullmatch(dtype)
    if found is not None:
        kind, bits, lanes = found.groups()
        made = _Type(kind, int(bits or 8), int(lanes or 1))
        widths = (8, 16, 32, 64) if kind in ("int", "uint", "bool") else (16, 32, 64)
        if made.bits in widths and made.lanes in (1, *LANES):
            return made
    raise UnsupportedOperation(f"OpenCL C has no type for {dtype}")


@dataclass(frozen=True)
class _Array:
    """A buffer: the name of its pointer, and the type of its elements in memory.

    Of one that kernels hand over, `argument` is its number. What a work-item has for itself is
    stored as it is in registers.
    """

    name: str
    element: _Type
    argument: int | None = None
    is_private: bool = False

    @property
    def memory(self) -> str:
        if self.element.kind == "bool":
            return "uchar"
        if self.element.is_short and not self.is_private:
            return "half" if self.element.kind == "float" else "ushort"
        return self.element.scalar


class _Writer:
    """Writes one kernel."""

    def __init__(
        self,
        places: Mapping[Any, int],
        units: int,
        temporary: Callable[[Any, int], int],
        names: Mapping[Any, str],
    ) -> None:
        self._places = places
        self._units = units
        self._temporary = temporary
        self._items = 1
        self._lines: list[str] = []
        self._depth = 1
        # How many loops are around, and were around the variables that they change.
        self._around = 0
        self._loops: dict[Any, int] = {}
        self._names = dict(names)
        self._arrays: dict[Any, _Array] = {}
        self._views: dict[Any, Any] = {}
        self._arguments: dict[str, _Array] = {}
        self._written: set[str] = set()
        self._counts: dict[str, int] = {}
        self._helpers: dict[str, str] = {}

    def nest(self) -> Nest | None:
        """The kernel, or None if it does nothing."""
        if not self._written:
            return None
        if len(self._arguments) > MOST_PARAMETERS:
            raise UnsupportedOperation(
                f"{len(self._arguments)} tensors, of which a kernel takes {MOST_PARAMETERS}"
            )
        parameters = ", ".join(
            f"__global {'' if name in self._written else 'const '}{array.memory}* restrict {name}"
            for name, array in self._arguments.items()
        )
        return Nest(
            "\n".join([f"({parameters}) {{", *self._lines, "}", ""]),
            tuple((a.argument or 0, name in self._written) for name, a in self._arguments.items()),
            self._items,
            tuple(self._helpers.values()),
        )

    def top(self, statement: Any) -> None:
        """A statement of the function, whose iterations go to several work-items if parallel."""
        if not _is_parallel(statement) or self._units == 1:
            self._statement(statement)
            return
        loops = [statement]
        while isinstance(loops[-1].body, tirx.For) and _is_parallel(loops[-1].body):
            loops.append(loops[-1].body)
        extents = [int(loop.extent) for loop in loops]
        count = prod(extents)
        self._items = min(count, self._units)
        wide = _Type("int", 64 if count * (self._items + 1) >= 1 << 31 else 32).text
        item = f"({wide})get_group_id(0)"
        index = self._named("i")
        start = f"{wide} {index} = {item} * {count} / {self._items}"
        end = f"{index} < ({item} + 1) * {count} / {self._items}"
        with self._block(f"for ({start}; {end}; ++{index})"):
            inner = count
            for loop, extent in zip(loops, extents, strict=True):
                inner //= extent
                name = self._named("i", loop.loop_var)
                found = f"{index} / {inner} % {extent}" if inner > 1 else f"{index} % {extent}"
                self._line(
                    f"const {self._text(loop.loop_var)} {name} = {found} + {self._(loop.min)};"
                )
            with self._turns(*(loop.loop_var for loop in loops)):
                self._statement(loops[-1].body)

    # Names and lines

    def _named(self, prefix: str, variable: Any = None) -> str:
        number = self._counts.get(prefix, 0)
        self._counts[prefix] = number + 1
        name = f"{prefix}{number}"
        if variable is not None:
            self._names[variable] = name
        return name

    def _line(self, text: str) -> None:
        self._lines.append("  " * self._depth + text)

    @contextmanager
    def _block(self, head: str) -> Iterator[None]:
        self._line(head + " {")
        self._depth += 1
        yield
        self._depth -= 1
        self._line("}")

    def _value(self, text: str, kind: str) -> str:
        """A name for a value that is used more than once."""
        name = self._named("t")
        self._line(f"const {kind} {name} = {text};")
        return name

    def _aside(self, expression: Any) -> tuple[str, list[str]]:
        """An expression, and the lines that it needs before it, which are not yet written."""
        before, self._lines = self._lines, []
        self._depth += 1
        text = self._(expression)
        self._depth -= 1
        lines, self._lines = self._lines, before
        return text, lines

    def _text(self, expression: Any) -> str:
        return _Type.of(expression.ty.dtype).text

    # Statements

    def _statement(self, statement: Any) -> None:
        match statement:
            case tirx.SeqStmt():
                for item in statement.seq:
                    self._statement(item)
            case tirx.AttrStmt():
                self._statement(statement.body)
            case tirx.For():
                self._loop(statement)
            case tirx.IfThenElse():
                with self._block(f"if {_bracketed(self._(statement.condition))}"):
                    self._statement(statement.then_case)
                if statement.else_case is not None:
                    with self._block("else"):
                        self._statement(statement.else_case)
            case tirx.While():
                with self._block("while (true)"):
                    self._line(f"if (!({self._(statement.condition)})) break;")
                    self._statement(statement.body)
            case tirx.Bind():
                text = self._(statement.value)
                self._loops[statement.var] = self._around
                name = self._named("t", statement.var)
                self._line(f"const {self._text(statement.value)} {name} = {text};")
            case tirx.BufferStore():
                self._store(statement)
            case tirx.AllocBuffer():
                self._allocate(statement.buffer)
            case tirx.Evaluate():
                self._evaluate(statement.value)
            case tirx.DeclBuffer():
                # Another view of a buffer.
                self._views[statement.buffer] = statement.data.args[0]
            case tirx.AssertStmt():
                pass
            case tirx.Break():
                self._line("break;")
            case tirx.Continue():
                self._line("continue;")
            case _:
                raise UnsupportedOperation(f"OpenCL C has no {type(statement).__name__}")

    def _loop(self, loop: Any) -> None:
        kind = self._text(loop.loop_var)
        first, count = self._(loop.min), self._(loop.extent)
        step = "1" if getattr(loop, "step", None) is None else self._(loop.step)
        end = count if first == "0" else f"{first} + {count}"
        name = self._named("i", loop.loop_var)
        if loop.kind == tirx.ForKind.UNROLLED or _is_short(loop):
            self._line("#pragma unroll")
        head = f"for ({kind} {name} = {first}; {name} < {end}; {name} += {step})"
        with self._block(head), self._turns(loop.loop_var):
            self._statement(loop.body)

    @contextmanager
    def _turns(self, *variables: Any) -> Iterator[None]:
        """In a loop that changes these."""
        self._around += 1
        self._loops |= dict.fromkeys(variables, self._around)
        yield
        self._around -= 1

    def _allocate(self, buffer: Any) -> None:
        element = _Type.of(buffer.dtype)
        count = prod(map(int, buffer.shape))
        if _slot_nbytes(buffer) <= LARGEST_PRIVATE_NBYTES or is_tile(buffer):
            array = _Array(self._named("m"), element, is_private=True)
            self._arrays[buffer] = array
            self._line(
                f"{array.memory} {array.name}[{count}] __attribute__((aligned({ALIGNMENT})));"
            )
            return
        whole = _Array(self._named("a"), element, self._temporary(buffer, self._items))
        self._arguments[whole.name] = whole
        self._written.add(whole.name)
        if self._items == 1:
            self._arrays[buffer] = whole
            return
        each = _slot_nbytes(buffer) // int(tvm.DataType(str(buffer.dtype)).itemsize)
        own = _Array(self._named("m"), element)
        self._arrays[buffer] = own
        self._line(
            f"__global {own.memory}* restrict {own.name} = "
            f"{whole.name} + (long)get_group_id(0) * {each};"
        )

    def _array(self, buffer: Any) -> _Array:
        while buffer in self._views:
            buffer = self._views[buffer]
        if buffer not in self._arrays:
            if buffer not in self._places:
                raise UnsupportedOperation(f"nothing is known of the memory '{buffer.name}'")
            element = _Type.of(buffer.dtype)
            array = _Array(self._named("a"), element, self._places[buffer])
            self._arrays[buffer] = self._arguments[array.name] = array
        found = self._arrays[buffer]
        if _Type.of(buffer.dtype) != found.element:
            raise UnsupportedOperation(f"'{buffer.name}' is {buffer.dtype} and something else")
        return found

    def _evaluate(self, value: Any) -> None:
        if isinstance(value, tirx.IntImm):
            return
        if isinstance(value, ir.Call):
            name, arguments = self._called(value)
            if name == "llvm.prefetch":
                self._prefetch(arguments[0].args[0])
                return
        raise UnsupportedOperation(f"OpenCL C has no {value!s:.60}")

    def _prefetch(self, element: Any) -> None:
        (index,) = element.indices
        self._helpers["fetch"] = FETCH
        self._line(f"fetch({self._address(self._array(element.source), index)});")

    def _store(self, store: Any) -> None:
        (index,) = store.indices
        lanes = int(tvm.DataType(str(index.ty.dtype)).lanes)
        if lanes not in (1, *LANES):
            if self._store_bits(store, index):
                return
            # Vectors that OpenCL does not have, in pieces.
            start = 0
            while start < lanes:
                count = next(n for n in (*reversed(LANES), 1) if n <= lanes - start)
                value, place = (_piece(e, start, count) for e in (store.value, index))
                self._store(tirx.BufferStore(store.buffer, value, [place]))
                start += count
            return
        array = self._array(store.buffer)
        value = self._(store.value)
        self._written.add(array.name)
        first, lanes = _first(index)
        if first is not None:
            self._line(self._stored(array, lanes, self._address(array, first), value) + ";")
            return
        value = self._value(value, _Type(*_parts(array.element), lanes).text)
        for lane, where in enumerate(self._lanes(array, index)):
            self._line(self._stored(array, 1, where, f"{value}.s{LANE_NAMES[lane]}") + ";")

    def _store_bits(self, store: Any, index: Any) -> bool:
        """Stores a longer vector as the bits of a wider one, if it is no more than these."""
        value = store.value
        if not isinstance(value, ir.Call) or self._called(value)[0] != "reinterpret":
            return False
        (bits,) = value.args
        kind = _Type.of(bits.ty.dtype)
        if kind.lanes not in LANES or kind.kind == "bool" or kind.is_short:
            return False
        array, text = self._array(store.buffer), self._(bits)
        first, _ = _first(index)
        if first is None:
            return False
        self._written.add(array.name)
        address = self._address(array, first)
        self._line(f"{self._vector(array, kind.scalar, kind.lanes, address)} = {text};")
        return True

    def _stored(self, array: _Array, lanes: int, address: str, value: str) -> str:
        """A statement that writes `lanes` elements from `address` on."""
        element = array.element
        wide = str(lanes) if lanes > 1 else ""
        if element.kind == "bool" and lanes > 1:
            value = f"convert_uchar{wide}({value} & 1)"
        if array.memory == "half":
            return f"vstore_half{wide}_rte({value}, 0, {address})"
        if array.memory == "ushort" and element.kind == "bfloat":
            value = f"{self._bfloat(lanes)}({value})"
        if lanes > 1:
            return f"{self._vector(array, array.memory, lanes, address)} = {value}"
        return f"*{address} = {value}"

    def _vector(self, array: _Array, scalar: str, lanes: int, address: str) -> str:
        """The vector at the address of an element, to read or to write."""
        vector = f"{scalar}{lanes}"
        self._helpers[vector] = UNALIGNED.format(vector=vector)
        space = "" if array.is_private else "__global "
        const = "" if array.is_private or array.name in self._written else "const "
        return f"(({space}{const}unaligned_{vector}*){address})->v"

    def _address(self, array: _Array, index: Any) -> str:
        """Where the element at `index` is: first what no loop changes is added, then what outer
        loops do, then inner ones, and constants last.

        So the innermost loop has one register to step, and constants are part of instructions.
        LLVM else computes addresses of several rows in vectors, whose registers the loop needs.
        """
        steps: dict[float, list[str]] = {}
        for term, sign in _terms(index):
            names = tirx.analysis.undefined_vars(term, [])
            depth = max((self._loops.get(name, 0) for name in names), default=0)
            key = inf if isinstance(term, tirx.IntImm) else depth
            steps.setdefault(key, []).append(f"{sign}{self._(term)}")
        text = array.name
        for _, terms in sorted(steps.items()):
            text = f"({text} + ({''.join(terms).removeprefix('+')}))"
        return f"({text})"

    # Expressions

    def _(self, expression: Any) -> str:
        """An expression of OpenCL C with this value; lines that it needs before it are written."""
        kind = type(expression)
        if kind in ARITHMETIC:
            return self._arithmetic(expression)
        if kind in COMPARISONS:
            return self._compared(expression)
        found = self._VISITS.get(kind)
        if found is None:
            raise UnsupportedOperation(f"OpenCL C has no {kind.__name__}")
        return found(self, expression)

    def _variable(self, variable: Any) -> str:
        if variable not in self._names:
            raise UnsupportedOperation(f"nothing is known of the value '{variable.name}'")
        name: str = self._names[variable]
        return name

    def _integer(self, constant: Any) -> str:
        kind = _Type.of(constant.ty.dtype)
        value = int(constant)
        if kind.kind == "bool":
            return "true" if value else "false"
        if kind.kind == "uint":
            value %= 1 << kind.bits
        return _integer(value, kind)

    def _float(self, constant: Any) -> str:
        kind = _Type.of(constant.ty.dtype)
        value = float(constant.value)
        if isnan(value):
            return f"({kind.scalar})NAN"
        if isinf(value):
            return f"({kind.scalar}){'-' if value < 0 else ''}INFINITY"
        text = value.hex() + ("" if kind.scalar == "double" else "f")
        return f"({text})" if text.startswith("-") else text

    def _arithmetic(self, expression: Any) -> str:
        kind = _Type.of(expression.ty.dtype)
        sign = ARITHMETIC[type(expression)]
        a, b = self._(expression.a), self._(expression.b)
        if sign == "%" and kind.is_float:
            return f"fmod({a}, {b})"
        # A sum of many terms stays flat, as compilers limit how deep brackets go.
        if sign == "+" and isinstance(expression.a, tirx.Add) and not _is_narrow(kind):
            return f"({a[1:-1]} + {b})"
        return _narrowed(f"({a} {sign} {b})", kind)

    def _compared(self, expression: Any) -> str:
        kind = _Type.of(expression.a.ty.dtype)
        text = f"({self._(expression.a)} {COMPARISONS[type(expression)]} {self._(expression.b)})"
        if kind.lanes == 1 or kind.kind == "bool":
            return text
        mask = f"int{kind.lanes}"
        return text if kind.mask == mask else f"convert_{mask}{text}"

    def _extreme(self, expression: Any) -> str:
        sign = ">" if isinstance(expression, tirx.Max) else "<"
        kind = _Type.of(expression.ty.dtype)
        name = f"{'larger' if sign == '>' else 'smaller'}_{kind.text}"
        self._helpers[name] = (
            f"static inline {kind.text} {name}({kind.text} a, {kind.text} b) "
            f"{{ return a {sign} b ? a : b; }}\n"
        )
        return f"{name}({self._(expression.a)}, {self._(expression.b)})"

    def _logical(self, expression: Any) -> str:
        is_and = isinstance(expression, tirx.And)
        a = self._(expression.a)
        if _Type.of(expression.ty.dtype).lanes > 1:
            return f"({a} {'&' if is_and else '|'} {self._(expression.b)})"
        b, lines = self._aside(expression.b)
        if not lines:
            return f"({a} {'&&' if is_and else '||'} {b})"
        name = self._named("t")
        self._line(f"bool {name} = {a};")
        with self._block(f"if ({name if is_and else '!' + name})"):
            self._lines += lines
            self._line(f"{name} = {b};")
        return name

    def _not(self, expression: Any) -> str:
        sign = "!" if _Type.of(expression.ty.dtype).lanes == 1 else "~"
        return f"({sign}{self._(expression.a)})"

    def _inverted(self, expression: Any) -> str:
        return _narrowed(f"(~{self._(expression.a)})", _Type.of(expression.ty.dtype))

    def _select(self, expression: Any) -> str:
        """Both values are computed."""
        kind = _Type.of(expression.ty.dtype)
        shared = _shared(expression.condition)
        condition = self._(expression.condition if shared is None else shared)
        a, b = self._(expression.true_value), self._(expression.false_value)
        if shared is None:
            mask = f"int{kind.lanes}" if kind.kind == "bool" else kind.mask
            if mask != f"int{kind.lanes}":
                condition = f"convert_{mask}({condition})"
        elif kind.lanes > 1:
            # Named, so that it is loaded before and there is no branch.
            a = self._value(a, kind.text)
        return f"({condition} ? {a} : {b})"

    def _cast(self, expression: Any) -> str:
        kind, source = (_Type.of(e.ty.dtype) for e in (expression, expression.value))
        value = self._(expression.value)
        if kind == source:
            return value
        if kind.kind == "bool":
            zero = "0" if kind.lanes == 1 else f"({source.text})(0)"
            text = f"({value} != {zero})"
            mask = f"int{kind.lanes}"
            return text if kind.lanes == 1 or source.mask == mask else f"convert_{mask}{text}"
        if source.kind == "bool" and kind.lanes > 1:
            return f"convert_{kind.text}({value} & 1)"
        if kind.text != source.text:
            value = f"convert_{kind.text}({value})" if kind.lanes > 1 else f"(({kind.text}){value})"
        return f"{self._rounded(kind)}({value})" if kind.is_short else value

    def _ramp(self, expression: Any) -> str:
        kind = _Type.of(expression.ty.dtype)
        lanes = ", ".join(_integer(lane, kind) for lane in range(kind.lanes))
        return (
            f"(({kind.text})({self._(expression.base)}) + "
            f"({kind.text})({self._(expression.stride)}) * ({kind.text})({lanes}))"
        )

    def _broadcast(self, expression: Any) -> str:
        kind = _Type.of(expression.ty.dtype)
        value = self._(expression.value)
        # All bits of a lane that is true are set.
        return f"({kind.text})({f'-(int){value}' if kind.kind == 'bool' else value})"

    def _shuffle(self, expression: Any) -> str:
        kind = _Type.of(expression.ty.dtype)
        lanes = [lane for vector in expression.vectors for lane in self._apart(vector)]
        chosen = [lanes[int(index)] for index in expression.indices]
        return chosen[0] if kind.lanes == 1 else f"({kind.text})({', '.join(chosen)})"

    def _apart(self, vector: Any) -> list[str]:
        """The lanes of a vector."""
        lanes = int(tvm.DataType(str(vector.ty.dtype)).lanes)
        if lanes == 1:
            return [self._value(self._(vector), self._text(vector))]
        if lanes in LANES:
            name = self._value(self._(vector), self._text(vector))
            return [f"{name}.s{lane}" for lane in LANE_NAMES[:lanes]]
        if not isinstance(vector, ir.Call) or self._called(vector)[0] != "reinterpret":
            raise UnsupportedOperation(f"OpenCL C has no vectors of {vector.ty.dtype}")
        # More lanes than a vector has, as parts of the lanes of one.
        wide = self._apart(vector.args[0])
        part = _Type.of(tvm.DataType(str(vector.ty.dtype)).with_lanes(lanes // len(wide)))
        return [
            f"as_{part.text}({lane}).s{index}"
            for lane in wide
            for index in LANE_NAMES[: part.lanes]
        ]

    def _let(self, expression: Any) -> str:
        text = self._(expression.value)
        name = self._named("t", expression.var)
        self._line(f"const {self._text(expression.value)} {name} = {text};")
        return self._(expression.body)

    def _loaded(self, expression: Any) -> str:
        (index,) = expression.indices
        array = self._array(expression.source)
        first, lanes = _first(index)
        if first is not None:
            return self._element(array, lanes, self._address(array, first))
        kind = _Type.of(expression.ty.dtype)
        found = [self._element(array, 1, where) for where in self._lanes(array, index)]
        if kind.kind == "bool":
            found = [f"-(int){value}" for value in found]
        return f"({kind.text})({', '.join(found)})"

    def _element(self, array: _Array, lanes: int, address: str) -> str:
        """`lanes` elements from `address` on."""
        wide = str(lanes) if lanes > 1 else ""
        if array.memory == "half":
            return f"vload_half{wide}(0, {address})"
        text = self._vector(array, array.memory, lanes, address) if lanes > 1 else f"(*{address})"
        if array.element.kind == "bool":
            return f"(convert_int{wide}({text}) != 0)" if lanes > 1 else f"((bool){text})"
        if array.element.kind == "bfloat" and not array.is_private:
            bits = f"convert_uint{wide}({text})" if lanes > 1 else f"(uint){text}"
            return f"as_float{wide}({bits} << 16)"
        return text

    def _lanes(self, array: _Array, index: Any) -> list[str]:
        """The addresses of elements that lie apart."""
        kind = _Type.of(index.ty.dtype)
        name = self._value(self._(index), kind.text)
        return [f"({array.name} + {name}.s{lane})" for lane in LANE_NAMES[: kind.lanes]]

    def _called(self, call: Any) -> tuple[str, list[Any]]:
        """The name of what is called, and its arguments."""
        name = getattr(call.op, "name", str(call.op)).removeprefix("tirx.")
        arguments = list(call.args)
        if name in ("call_pure_extern", "call_extern"):
            name = str(arguments.pop(0).value)
        elif name in ("call_llvm_pure_intrin", "call_llvm_intrin"):
            name = str(_intrinsic(int(arguments.pop(0))))
            short = name.removeprefix("llvm.")
            name = short if short in FUNCTIONS else name
        if name not in FUNCTIONS and name.removesuffix("f") in FUNCTIONS:
            # C's name of the one for float32.
            name = name.removesuffix("f")
        return RENAMED.get(name, name), arguments

    def _call(self, call: Any) -> str:
        name, arguments = self._called(call)
        kind = _Type.of(call.ty.dtype)
        if name == "prim.if_then_else":
            return self._either(call)
        if name in HINTS:
            return self._(arguments[0])
        if name in BITWISE:
            a, b = map(self._, arguments)
            return _narrowed(f"({a} {BITWISE[name]} {b})", kind)
        if name == "bitwise_not":
            return _narrowed(f"(~{self._(arguments[0])})", kind)
        if name == "reinterpret":
            return f"as_{kind.text}({self._(arguments[0])})"
        if name in ("fabs", "abs") and not kind.is_float:
            return _narrowed(f"abs({self._(arguments[0])})", kind)
        is_float32 = kind == _Type("float", 32, kind.lanes)
        if name in POLYNOMIALS and is_float32 and not isinstance(arguments[0], tirx.FloatImm):
            return self._(POLYNOMIALS[name](arguments[0]))
        if name == "pow" and (power := _power(arguments[1])) is not None:
            value = self._value(self._(arguments[0]), kind.text)
            product = " * ".join([value] * abs(power))
            return f"({product})" if power > 0 else f"(1 / ({product}))"
        if name in QUESTIONS:
            source = _Type.of(arguments[0].ty.dtype)
            text = f"{name}({self._(arguments[0])})"
            if source.lanes == 1:
                return f"((bool){text})"
            wanted = f"int{source.lanes}"
            return text if source.mask == wanted else f"convert_{wanted}({text})"
        if name in ROUNDING:
            self._helpers[name] = WHOLE.format(name=name, builtin=ROUNDING[name])
            return f"whole_{name}({self._(arguments[0])})"
        if name == PAIRS:
            name = f"{name}_{kind.lanes}"
            self._helpers[name] = MULTIPLY_PAIRS.format(
                name=name,
                lanes=kind.lanes,
                bits=32 * kind.lanes,
                nbytes=4 * kind.lanes,
                feature=PAIRS_FEATURES[kind.lanes],
            )
            return f"{name}({', '.join(map(self._, arguments))})"
        if name == QUADS:
            self._helpers[name] = MULTIPLY_QUADS
        if name in FUNCTIONS or name == QUADS:
            return f"{name}({', '.join(map(self._, arguments))})"
        raise UnsupportedOperation(f"OpenCL C has no {name}")

    def _either(self, call: Any) -> str:
        """Only the value that is wanted is computed."""
        condition = self._(call.args[0])
        (a, before_a), (b, before_b) = map(self._aside, call.args[1:])
        if not before_a and not before_b:
            return f"({condition} ? {a} : {b})"
        name = self._named("t")
        self._line(f"{self._text(call)} {name};")
        first = f"if {_bracketed(condition)}"
        for head, value, lines in ((first, a, before_a), ("else", b, before_b)):
            with self._block(head):
                self._lines += lines
                self._line(f"{name} = {value};")
        return name

    # Functions that kernels call

    def _rounded(self, kind: _Type) -> str:
        """A function that rounds float32 to a type of 16 bits, as float32."""
        wide = str(kind.lanes) if kind.lanes > 1 else ""
        name = f"rounded_{kind.kind}{wide}"
        if kind.kind == "float":
            body = (
                f"ushort{wide} bits; vstore_half{wide}_rte(x, 0, (half*)&bits); "
                f"return vload_half{wide}(0, (const half*)&bits);"
            )
        else:
            bits = f"{self._bfloat(kind.lanes)}(x)"
            wider = f"convert_uint{wide}({bits})" if wide else f"(uint){bits}"
            body = f"return as_float{wide}({wider} << 16);"
        self._helpers[name] = f"static inline float{wide} {name}(float{wide} x) {{ {body} }}\n"
        return name

    def _bfloat(self, lanes: int) -> str:
        """A function that rounds float32 to the bits of a bfloat16, ties to even."""
        wide = str(lanes) if lanes > 1 else ""
        name = f"bfloat_bits{wide}"
        narrow = f"convert_ushort{wide}" if wide else "(ushort)"
        self._helpers[name] = (
            f"static inline ushort{wide} {name}(float{wide} x) {{ uint{wide} bits = "
            f"as_uint{wide}(x); return x != x ? (ushort{wide})(0x7fc0) : "
            f"{narrow}((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16); }}\n"
        )
        return name

    _VISITS: Mapping[type, Callable[["_Writer", Any], str]] = {
        tirx.Var: _variable,
        tirx.IntImm: _integer,
        tirx.FloatImm: _float,
        tirx.Max: _extreme,
        tirx.Min: _extreme,
        tirx.And: _logical,
        tirx.Or: _logical,
        tirx.Not: _not,
        tirx.BitwiseNot: _inverted,
        tirx.Select: _select,
        tirx.Cast: _cast,
        tirx.Ramp: _ramp,
        tirx.Broadcast: _broadcast,
        tirx.Shuffle: _shuffle,
        tirx.Let: _let,
        ir.TensorLoad: _loaded,
        ir.Call: _call,
    }


_intrinsic = tvm.get_global_func("target.llvm_get_intrinsic_name")


def _parts(kind: _Type) -> tuple[str, int]:
    return kind.kind, kind.bits


def _shared(condition: Any) -> Any | None:
    """What all lanes of a condition have in common, or None where they differ."""
    if _Type.of(condition.ty.dtype).lanes == 1:
        return condition
    match condition:
        case tirx.Broadcast():
            return condition.value
        case tirx.And() | tirx.Or():
            a, b = _shared(condition.a), _shared(condition.b)
            return None if a is None or b is None else type(condition)(a, b)
        case tirx.Not():
            a = _shared(condition.a)
            return None if a is None else tirx.Not(a)
    return None


def _piece(vector: Any, start: int, count: int) -> Any:
    """`count` lanes of an expression from `start` on."""
    match vector:
        case tirx.Ramp():
            first = vector.base + vector.stride * start
            return tirx.Ramp(first, vector.stride, count) if count > 1 else first
        case tirx.Broadcast():
            return tirx.Broadcast(vector.value, count) if count > 1 else vector.value
        case ir.TensorLoad():
            (index,) = vector.indices
            return tirx.BufferLoad(vector.source, [_piece(index, start, count)])
        case tirx.Cast():
            scalar = tvm.DataType(str(vector.ty.dtype)).with_lanes(count)
            return tirx.Cast(str(scalar), _piece(vector.value, start, count))
    if type(vector) in {**ARITHMETIC, **COMPARISONS}:
        a, b = (_piece(side, start, count) for side in (vector.a, vector.b))
        return type(vector)(a, b)
    raise UnsupportedOperation(f"OpenCL C has no vectors of {vector.ty.dtype}")


def _is_short(loop: Any) -> bool:
    """Whether all turns of a loop are few enough to be written out."""
    stores = _stores(loop.body)
    return (
        isinstance(loop.extent, tirx.IntImm)
        and stores is not None
        and int(loop.extent) <= MOST_TURNS
        and int(loop.extent) * stores <= MOST_UNROLLED
    )


def _stores(statement: Any) -> int | None:
    """How often a statement stores; None of one with loops or branches."""
    match statement:
        case tirx.SeqStmt():
            counts = [_stores(item) for item in statement.seq]
            return None if None in counts else sum(filter(None, counts))
        case tirx.BufferStore():
            return 1
        case tirx.Bind() | tirx.AllocBuffer() | tirx.DeclBuffer() | tirx.Evaluate():
            return 0
    return None


def _first(index: Any) -> tuple[Any | None, int]:
    """The first of elements that lie behind each other, or None; and how many."""
    lanes = int(tvm.DataType(str(index.ty.dtype)).lanes)
    if lanes == 1:
        return index, 1
    if isinstance(index, tirx.Ramp) and _is_one(index.stride):
        return index.base, lanes
    return None, lanes


def _terms(index: Any, sign: str = "+") -> list[tuple[Any, str]]:
    """What an index is the sum of, each with its sign."""
    other = {"+": "-", "-": "+"}[sign]
    match index:
        case tirx.Add():
            return [*_terms(index.a, sign), *_terms(index.b, sign)]
        case tirx.Sub():
            return [*_terms(index.a, sign), *_terms(index.b, other)]
    return [(index, sign)]


def _power(exponent: Any) -> int | None:
    """A constant exponent that is multiplied out, as a call of pow takes a hundred times longer."""
    value = exponent.value if isinstance(exponent, tirx.Broadcast) else exponent
    if isinstance(value, tirx.Cast):
        value = value.value
    if not isinstance(value, tirx.FloatImm | tirx.IntImm):
        return None
    number = float(value.value)
    return int(number) if number in (-2, -1, 1, 2, 3, 4) else None


def _is_one(expression: Any) -> bool:
    return isinstance(expression, tirx.IntImm) and int(expression) == 1


def _bracketed(text: str) -> str:
    """In one pair of brackets; compilers warn of a comparison in two."""
    depth = 0
    for index, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if not depth:
            return text if text.startswith("(") and index == len(text) - 1 else f"({text})"
    return f"({text})"


def _is_narrow(kind: _Type) -> bool:
    """Whether C computes such integers as int."""
    return kind.kind in ("int", "uint") and kind.bits < 32 and kind.lanes == 1


def _narrowed(text: str, kind: _Type) -> str:
    """A result of the type that it has, in which it wraps around."""
    return f"(({kind.text}){text})" if _is_narrow(kind) else text


def _integer(value: int, kind: _Type) -> str:
    suffix = SUFFIXES.get(kind.scalar, "")
    if value == -(1 << (kind.bits - 1)) and kind.bits >= 32 and kind.kind == "int":
        return f"({value + 1}{suffix} - 1)"
    return f"({value}{suffix})" if value < 0 else f"{value}{suffix}"
