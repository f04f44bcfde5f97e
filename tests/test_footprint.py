"""What plans hold in memory: predicted before compiling, told after, and what then is there."""

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

import hetsched
from hetsched.crew import tables_nbytes
from hetsched.device import Device
from hetsched.dtype import ALIGNMENT
from hetsched.errors import InfeasiblePlan
from hetsched.footprint import Loaded, memory, pool_nbytes
from hetsched.graph import Graph, from_onnx
from hetsched.plan import Plan, make_plan
from hetsched.request import Step
from hetsched.system import System
from hetsched.target import Footprint

SHAPE = (1, 32, 16, 16)
NBYTES = int(np.prod(SHAPE)) * 4


def convolutions(count: int, kernel: int = 3) -> Graph:
    """One behind the other; by 3 x 3 some are Winograd's."""
    rng = np.random.default_rng(0)
    nodes, weights = [], []
    for index in range(count):
        weight = (rng.standard_normal((32, 32, kernel, kernel)) / 17).astype(np.float32)
        weights.append(numpy_helper.from_array(weight, f"w{index}"))
        ends = [f"t{index}", f"w{index}"], [f"t{index + 1}"]
        nodes.append(helper.make_node("Conv", *ends, f"conv{index}", pads=[kernel // 2] * 4))
    values = [
        helper.make_tensor_value_info(f"t{index}", TensorProto.FLOAT, SHAPE)
        for index in range(count + 1)
    ]
    model = helper.make_model(
        helper.make_graph(
            nodes, "chain", values[:1], values[-1:], weights, value_info=values[1:-1]
        ),
        opset_imports=[helper.make_opsetid("", 17)],
    )
    return from_onnx(model)


def system(devices: str, **changed: float) -> System:
    local = System.local(devices)
    return replace(local, devices=tuple(replace(device, **changed) for device in local.devices))


def planned(graph: Graph, machine: System, where: str) -> Plan:
    prices = hetsched.api.priced(graph, machine, "roofline")
    names = [device.name for device in machine.devices]
    order = [group.name for group in graph.groups]
    placement = {name: names[int(on)] for name, on in zip(order, where, strict=True)}
    return make_plan(graph, machine, prices, placement, order, "test")


@pytest.mark.parametrize("where", ["000", "010"])
def test_the_prediction_is_what_is_there(where: str) -> None:
    pytest.importorskip("tvm")
    if "1" in where and len(hetsched.host.cores()) < 2:
        pytest.skip("there is one core")
    names = [f"cpu:{core}" for core in hetsched.host.cores()[: len(set(where))]]
    plan = planned(convolutions(3), system(",".join(names)), where)
    predicted = plan.memory
    assert predicted.exact
    with hetsched.compile(plan) as executable:
        assert executable.memory == predicted
        x = np.ones(SHAPE, np.float32)
        executable.run({"t0": x})
        kernels = executable.start()._kernels
        held = {
            array.ctypes.data: array.nbytes
            for kernel in kernels
            for array in kernel._compute._weights  # type: ignore[attr-defined]
        }
        constants = sum(len(p.artifact.files.get("constants.bin", b"")) for p in executable.parts)
        weights = sum(item.weights_nbytes for item in predicted.devices) - predicted.shared_nbytes
        assert sum(held.values()) - constants == weights
        # Winograd's weights are larger than the model's.
        assert weights > plan.graph.weight_nbytes
    handed = sum(item.tensors_nbytes for item in predicted.devices)
    # A crew's results begin with a cache line.
    assert handed == NBYTES * len(plan.parts) + (ALIGNMENT if len(names) > 1 else 0)


def test_a_limit_is_held_against_the_exact_figure() -> None:
    """Without re-use, and with the model's weights, it is said to hold more than it does."""
    pytest.importorskip("tvm")
    core = f"cpu:{hetsched.host.cores()[0]}"
    graph = convolutions(24)
    exact = planned(graph, system(core), "0" * 24).memory.nbytes
    bound = sum(planned(graph, system(core), "0" * 24).memory_bytes().values())
    for held in (exact, exact * 2):
        planned(graph, system(core, memory_bytes=float(held)), "0" * 24)
    assert bound != exact
    with pytest.raises(InfeasiblePlan, match="would hold"):
        planned(graph, system(core, memory_bytes=float(exact - 1)), "0" * 24)


def two(first: Footprint | None, second: Footprint | None, unit: str = "b") -> list[Loaded]:
    """A part that hands one tensor to another, of which a run returns what it makes."""
    graph = convolutions(2)
    devices = Device("a", "none"), Device("b", "none", cores=() if unit == "b" else (0,))
    found = []
    for index, (device, footprint) in enumerate(zip(devices, (first, second), strict=True)):
        step = Step(f"part{index}", device, (f"t{index}",), (f"t{index + 1}",))
        found.append(Loaded(step, graph.part([graph.ops[index]], step.name), footprint))
    return found


def test_shared_weights_are_there_once() -> None:
    first = Footprint({"x": 100, "y": 10}, 7)
    parts = two(first, Footprint({"x": 100}, 3))
    steps = [part.step for part in parts]
    found = memory(parts, ["t2"], {}, True, [(0, 1)])
    assert [item.weights_nbytes for item in found.devices] == [110, 100]
    # The last device has the tables of the crew too: two tensors, weights, and two rows more.
    tables = tables_nbytes([steps], dict(zip(steps, [2 + 2 + 2, 2 + 1 + 2], strict=True)))
    assert [item.workspace_nbytes for item in found.devices] == [7, 3 + tables]
    assert [item.tensors_nbytes for item in found.devices] == [NBYTES, NBYTES + ALIGNMENT]
    assert found.shared_nbytes == 100
    assert found.nbytes == 110 + 10 + 2 * NBYTES + ALIGNMENT + tables
    assert found.exact


def test_who_waits_has_a_pool_of_its_own() -> None:
    """The unit of the last step works by its own thread in some runs, by the caller in others."""
    page = 4096
    calls = Footprint({}, 0, ((page,),))
    parts = two(calls, calls)
    steps = [part.step for part in parts]
    tables = tables_nbytes([steps], dict.fromkeys(steps, 4))
    one, last = memory(parts, ["t2"], {}, True, [(0, 1)]).devices
    assert one.workspace_nbytes == page
    assert last.workspace_nbytes == 2 * page + tables
    # Where Python hands over, each unit's thread does its own work.
    one, last = memory(parts, ["t2"], {}, False, [(0, 1)]).devices
    assert one.workspace_nbytes == last.workspace_nbytes == page


def test_replicas_have_what_each_of_them_needs() -> None:
    """Two devices run the same part in turn; a caller that waits does the work of both."""
    page = 4096
    first, _ = two(Footprint({"x": 100}, 7, ((page,),)), None)
    other = Loaded(replace(first.step, device=Device("b", "none")), first.graph, first.footprint)
    found = memory([first, other], ["t1"], {}, True, [(0,), (1,), (0,), (1,)])
    assert found.exact
    assert found.shared_nbytes == 100
    tables = tables_nbytes([[first.step], [other.step]], {first.step: 5, other.step: 5})
    own, again = found.devices
    assert own.workspace_nbytes == 7 + 2 * page + tables
    assert again.workspace_nbytes == 7 + page
    # One request is in flight, whichever of the two it is on.
    assert [item.tensors_nbytes for item in found.devices] == [NBYTES + ALIGNMENT, 0]


@pytest.mark.parametrize("replicas", [False, True])
def test_the_arrays_of_a_crew_are_counted(replicas: bool) -> None:
    """All that numpy allocates to load and run, against the prediction without weights."""
    pytest.importorskip("tvm")
    names = [f"cpu:{core}" for core in hetsched.host.cores()[:2]]
    if len(names) < 2:
        pytest.skip("there is one core")
    # Of 1 x 1, which take no temporary memory from TVM.
    graph = convolutions(3, kernel=1)
    plan = planned(graph, system(",".join(names)), "000" if replicas else "010")
    if replicas:
        plan = replace(plan, replicas={names[0]: tuple(names)})
    x = {"t0": np.ones(SHAPE, np.float32)}
    with hetsched.compile(plan) as executable:
        weights = sum(item.weights_nbytes for item in executable.memory.devices)
        wanted = executable.memory.nbytes - weights + executable.memory.shared_nbytes
        tracemalloc.start(1)
        try:
            for _ in range(4):
                executable.run(x)
            domain = tracemalloc.DomainFilter(True, np.lib.tracemalloc_domain)
            found = tracemalloc.take_snapshot().filter_traces([domain])
        finally:
            tracemalloc.stop()
        held = sum(trace.size for trace in found.traces)
    assert held == pytest.approx(wanted, rel=0.02, abs=500)


def test_what_no_target_can_tell_is_not_exact() -> None:
    found = memory(two(Footprint({}, 0), None), ["t2"], {}, True, [(0, 1)])
    assert [item.exact for item in found.devices] == [False, False]
    assert found.devices[1].weights_nbytes == 32 * 32 * 9 * 4


def test_the_pool_of_temporaries() -> None:
    page = 4096
    assert pool_nbytes([]) == 0
    assert pool_nbytes([(1,), (page + 1,), (page,)]) == 2 * page
    # The larger piece is taken by who comes first, and the smaller one grows.
    assert pool_nbytes([(page, 3 * page), (2 * page, 2 * page)]) == 5 * page
