"""The architecture, drawn and checked: imports go down, never up, sideways or in a circle."""

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path

import networkx
import pytest

ROOT = Path(__file__).parents[1]

# Lowest first. A module imports from lines below its own; a folder is one name, whose files may
# import each other. The extensions stand on top: hetsched loads them by name alone.
LAYERS = """
errors  device  schedule  trial  split  region  confidence
plugin  dtype  files  host  meters  document
store  op  oracle  trace  tvm_runtime  disturbance
fusion  schedules  launches
graph  operation
archive  target  inputs  frontend  lowering  rewrite  liveness
cache  request  forms  quantization  fpga  programs
crew
opencl  cuda  native  executor  footprint
links
overheads
system
tasks  cost
problem  instance  sequence
learning
scheduler  plan  bounds  profiling  quality  corun
energy
objective
partitioner  compiler  explain  calibration  stream
sharing  stages
package
executable
verify  contest
api
__init__
report
cli
__main__
operations  schedulers  targets  cost_models  partitioners
"""

LEVELS = {name: level for level, row in enumerate(LAYERS.split("\n")) for name in row.split()}
EXTENSIONS = frozenset("operations schedulers targets cost_models partitioners".split())
# Packages that take a second or a gigabyte to load, and the modules that are made to load them.
HEAVY = frozenset("tvm tvm_ffi numba pyopencl amaranth".split())
LOADERS = (
    frozenset(
        ["hetsched.tvm_runtime"]
        + [f"hetsched.opencl.{name}" for name in "builder crew query runtime".split()]
        + [
            f"hetsched.lowering.{name}"
            for name in "device_code entry gpu integer kernels metaschedule opencl program "
            "recurrent relax stack temporaries trials".split()
        ]
    )
    | {
        f"hetsched.schedules.{name}"
        for name in "apply blocks convolution elementwise integer layout legal loops matmul "
        "polynomials pooling recurrent reductions rows sorting window winograd".split()
    }
    | {"hetsched.fpga.cycles", "hetsched.fpga.simulator"}
    | {
        f"hetsched.fpga.rtl.{name}"
        for name in "array blocks conv core load netlist queues store".split()
    }
    | {f"hetsched.schedules.gpu.{name}" for name in "loops threads tiles".split()}
    | {f"hetsched.stages.{name}" for name in "annealing borders pipeline".split()}
    | {"hetsched.partitioners.layerwise"}
    | {
        # Named by whoever wants them, loaded by name.
        f"hetsched.schedulers.{name}"
        for name in "_contention _cpsat _gaps _justify _list _rank _refutation _search cpop exact "
        "heft ippts lookahead peft portfolio".split()
    }
)


def source_files() -> dict[str, Path]:
    """The modules by the name that they are imported by."""
    found = {}
    for folder in ("hetsched", *sorted(EXTENSIONS - {"operations", "schedulers"})):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = list(path.relative_to(ROOT).with_suffix("").parts)
            parts = parts if parts[0] == "hetsched" else ["hetsched", *parts]
            found[".".join(parts).removesuffix(".__init__")] = path
    return found


FILES = source_files()


def unit(module: str) -> str:
    """The name in the drawing: a module of hetsched, or the folder that it is in."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def imports(tree: ast.AST) -> Iterator[tuple[str, int, bool]]:
    """Imported modules, the line, and whether it runs only inside of a function."""
    late = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno, id(node) in late
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "a relative import hides what is imported"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in FILES else str(node.module), node.lineno, id(node) in late


def problems(module: str, tree: ast.AST) -> Iterator[str]:
    """What a module imports against the rules."""
    own = unit(module)
    for target, line, late in imports(tree):
        where = f"{module}:{line} imports {target}"
        package = target.partition(".")[0]
        if package in HEAVY and not late and module not in LOADERS:
            yield f"{where} at module level: whoever imports it waits for {package}"
        if package in HEAVY and own != "targets" and module not in LOADERS:
            yield f"{where}: only a target, or what it loads late, may"
        if package != "hetsched":
            continue
        if target not in FILES:
            yield f"{where}, which does not exist"
            continue
        if late and not (own == "targets" and target in LOADERS):
            yield f"{where} inside of a function, which hides it"
        if not late and target in LOADERS and module not in LOADERS:
            yield f"{where} at module level: it loads a compiler"
        if unit(target) == own:
            continue
        if unit(target) in EXTENSIONS:
            other = "an extension" if own in EXTENSIONS else "hetsched"
            yield f"{where}: {other} imports no extension"
        elif LEVELS[unit(target)] >= LEVELS[own]:
            yield f"{where}, which is not below it"


def test_the_drawing_is_complete() -> None:
    assert {unit(module) for module in FILES} == set(LEVELS)
    assert len(LEVELS) == len(LAYERS.split())


@pytest.mark.parametrize("module", FILES)
def test_imports_go_down(module: str) -> None:
    assert list(problems(module, ast.parse(FILES[module].read_text()))) == []


@pytest.mark.parametrize("module", FILES)
def test_a_module_says_what_it_is(module: str) -> None:
    assert ast.get_docstring(ast.parse(FILES[module].read_text()))


def test_every_folder_is_installed() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    packages = {
        module.removesuffix(".__init__")
        for module, path in FILES.items()
        if path.name == "__init__.py"
    }
    assert set(settings["packages"]) == packages
    others = {
        path
        for path in (ROOT / "hetsched").rglob("*.*")
        if path.suffix != ".py" and path.parent.name != "__pycache__" and path.is_file()
    }
    shipped = {
        path
        for package, patterns in settings["package-data"].items()
        for pattern in patterns
        for path in (ROOT / package.replace(".", "/")).glob(pattern)
    }
    assert others == shipped


def test_no_imports_in_a_circle() -> None:
    view = networkx.DiGraph()
    for module, path in FILES.items():
        for target, _, _ in imports(ast.parse(path.read_text())):
            if target in FILES:
                view.add_edge(module, target)
    assert view.number_of_edges() > 100
    assert list(networkx.simple_cycles(view)) == []


def test_an_extension_imports_no_other_of_its_kind() -> None:
    for module, path in FILES.items():
        for target, _, _ in imports(ast.parse(path.read_text())):
            own, other = unit(module), unit(target) if target in FILES else ""
            if own in EXTENSIONS and own == other:
                # What several share stands in a file that is no extension.
                assert target.rpartition(".")[2].startswith("_"), f"{module} imports {target}"


@pytest.mark.parametrize(
    ("module", "code", "message"),
    [
        ("hetsched.op", "from hetsched.graph import Graph", "not below"),
        ("hetsched.plan", "from hetsched.plan import Plan\nimport hetsched.api", "not below"),
        ("hetsched.cost", "from hetsched import tasks", "not below"),
        ("hetsched.api", "from hetsched.targets import cpu", "imports no extension"),
        ("hetsched.api", "import hetsched.partitioners.task", "imports no extension"),
        ("hetsched.partitioners.auto", "from hetsched.targets.cpu import Cpu", "no extension"),
        ("hetsched.graph", "def f():\n    from hetsched import op", "inside of a function"),
        ("hetsched.targets.cpu", "import tvm", "waits for tvm"),
        ("hetsched.targets.cpu", "import hetsched.tvm_runtime", "loads a compiler"),
        ("hetsched.targets.cpu", "def f():\n    from hetsched import graph", "inside of a"),
        ("hetsched.verify", "def f():\n    import numba", "only a target"),
        ("hetsched.verify", "from hetsched.nothing import f", "does not exist"),
    ],
)
def test_a_forbidden_import_is_found(module: str, code: str, message: str) -> None:
    assert any(message in problem for problem in problems(module, ast.parse(code)))


@pytest.mark.parametrize(
    ("module", "code"),
    [
        ("hetsched.graph", "from hetsched.op import Op\nimport numpy"),
        ("hetsched.targets.cpu", "def f():\n    from hetsched.lowering.relax import compile_part"),
        ("hetsched.targets.cpu", "def f():\n    import tvm"),
        ("hetsched.frontend.reader", "from hetsched.frontend.model import Model"),
    ],
)
def test_a_right_import_passes(module: str, code: str) -> None:
    assert list(problems(module, ast.parse(code))) == []
