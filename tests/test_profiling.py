"""What is measured next, how often, and what is kept; clock and kernels are made up."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import inf
from pathlib import Path

import numpy as np
import pytest
from graphs import Builder

from hetsched.confidence import margin
from hetsched.cost import graph_of, signature
from hetsched.cost_models.profiled import Profiled
from hetsched.device import Device
from hetsched.fusion import Group
from hetsched.graph import Graph
from hetsched.learning.work import Work
from hetsched.profiling import QUICK, Course, Effort, Measured, combined, measure
from hetsched.store import Rejected, Sample, Store

HERE = Device("cpu:0", "cpu", fingerprint="core")
THERE = Device("cpu:1", "cpu", fingerprint="core")
EFFORT = Effort(tolerance=0.02, least_bursts=3, most_bursts=20)


def product(*widths: int, name: str = "g") -> Graph:
    """Matrix products in a row, a group each; those of the same widths are alike."""
    build = Builder()
    x = build.input("x", 2, widths[0])
    for before, after in pairwise(widths):
        weights = build.constant(np.ones((before, after), np.float32))
        x = build.op("MatMul", x, weights, shape=(2, after))
    graph = build.graph(x)
    return Graph(name, graph.ops, graph.inputs, graph.outputs, graph.constants, graph.opsets)


@dataclass
class Machine:
    """Kernels whose times are told by a function of group and burst, and a clock that they move."""

    told: Callable[[Group, int], float] = lambda group, burst: 1e-3
    compiling_seconds: float = 0.0
    refused: Sequence[str] = ()
    now: float = 100.0
    compiled: list[str] = field(default_factory=list)
    bursts: list[tuple[str, tuple[str, ...]]] = field(default_factory=list)
    closed: int = 0
    # By the burst, what disturbs it.
    disturbed: Callable[[int], str] = lambda burst: ""
    slept: float = 0.0

    def begin(self, device: Device) -> None:
        pass

    def end(self, device: Device) -> str:
        return self.disturbed(len(self.bursts))

    def sleep(self, seconds: float) -> None:
        self.slept += seconds

    def perf_counter(self) -> float:
        return self.now

    def load(
        self,
        graph: Graph,
        groups: Iterable[Group],
        device: Device,
        progress: object = None,
        deadline: float = inf,
    ) -> "Loaded":
        chosen = []
        for group in groups:
            if self.now < deadline:
                self.now += self.compiling_seconds
                self.compiled.append(group.name)
                chosen.append(group)
        return Loaded(self, graph, chosen)


@dataclass
class Loaded:
    machine: Machine
    graph: Graph
    groups: Sequence[Group]

    @property
    def refused(self) -> dict[str, str]:
        return {g.name: "no" for g in self.groups if g.name in self.machine.refused}

    def burst(self, seconds: float) -> dict[str, list[float]]:
        machine = self.machine
        machine.now += 1.0
        groups = [group for group in self.groups if group.name not in self.refused]
        machine.bursts.append((self.graph.name, tuple(sorted(g.name for g in groups))))
        return {g.name: [machine.told(g, len(machine.bursts))] * 3 for g in groups}

    def close(self) -> None:
        self.machine.closed += 1


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    made = Machine()
    monkeypatch.setattr("hetsched.profiling.KernelSequence", made.load)
    monkeypatch.setattr("hetsched.profiling.perf_counter", made.perf_counter)
    monkeypatch.setattr("hetsched.profiling.sleep", made.sleep)
    monkeypatch.setattr("hetsched.profiling.Witness", lambda: made)
    return made


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "profile.sqlite")


def course(graph: Graph, device: Device = HERE) -> Course:
    return Course(graph, graph.groups, device)


def names(machine: Machine) -> list[str]:
    return [name for name, _ in machine.bursts]


def test_what_is_steady_is_measured_no_more_than_needed(machine: Machine, store: Store) -> None:
    graph = product(4, 5, 6)
    found = measure([course(graph)], store, EFFORT)
    assert len(machine.bursts) == EFFORT.least_bursts
    for key in course(graph).keys.values():
        assert found.samples[key] == Sample(1e-3, 0.0, 9, 0.0, (1e-3,) * 3)
    assert found.fresh == set(course(graph).keys.values())
    assert machine.closed == 1


def test_what_wavers_is_measured_until_it_is_tight_or_often(machine: Machine, store: Store) -> None:
    machine.told = lambda group, burst: 1e-3 * (1 + 0.04 * (burst % 2))
    found = measure([course(product(4, 5))], store, EFFORT)
    assert EFFORT.least_bursts < len(machine.bursts) <= EFFORT.most_bursts
    machine.bursts.clear()
    machine.told = lambda group, burst: 1e-3 * (1 + burst % 7)
    found = measure([course(product(4, 6))], store, EFFORT)
    assert len(machine.bursts) == EFFORT.most_bursts
    (sample,) = (found.samples[key] for key in course(product(4, 6)).keys.values())
    assert not EFFORT.settles(sample)


def test_a_disturbed_burst_does_not_count_and_is_repeated_later(
    machine: Machine, store: Store
) -> None:
    """A moment in which everything takes half as long again leaves no trace in the times."""
    graphs = [product(400, 5, name="one"), product(4, 6, name="other")]
    machine.disturbed = lambda burst: "37% of the processor stolen" if burst in (1, 4) else ""
    machine.told = lambda group, burst: 1.5e-3 if burst in (1, 4) else 1e-3
    found = measure([course(graph) for graph in graphs], store, EFFORT)
    assert (found.bursts, found.disturbed) == (len(machine.bursts), 2)
    # The other one comes first, and what was disturbed has as many good bursts in the end.
    assert names(machine)[:3] == ["one", "other", "one"]
    for sample in found.samples.values():
        assert sample.seconds == 1e-3
        assert set(sample.bursts) == {1e-3}
        assert len(sample.bursts) >= EFFORT.least_bursts
    rejected = [one for record in store.records() for one in record.sample.rejected]
    assert rejected == [Rejected(1.5e-3, "37% of the processor stolen")] * 2
    assert machine.slept > 0


def test_what_is_always_disturbed_has_its_least_time_and_is_not_trusted(
    machine: Machine, store: Store
) -> None:
    machine.disturbed = lambda burst: "compute reference 1.4 x its best"
    machine.told = lambda group, burst: 1e-3 * (2 + burst % 3)
    graph = product(4, 5)
    (key,) = course(graph).keys.values()
    quick = Effort(0.03, 3, 8, trusting=True)
    found = measure([course(graph)], store, quick)
    assert len(machine.bursts) == found.disturbed == quick.most_bursts
    assert found.samples[key].seconds == 2e-3
    assert found.samples[key].relative_margin == inf
    assert found.samples[key].is_rejected
    # In a quiet moment it is measured anew.
    machine.disturbed = lambda burst: ""
    machine.told = lambda group, burst: 1e-3
    sample = measure([course(graph)], store, quick).samples[key]
    assert (sample.seconds, sample.repeats) == (1e-3, 9)
    assert len(sample.rejected) == quick.most_bursts
    count = len(machine.bursts)
    measure([course(graph)], store, quick)
    assert len(machine.bursts) == count


def test_a_budget_is_used_to_wait_for_a_quiet_moment(machine: Machine, store: Store) -> None:
    """Without one, what is always disturbed ends after as many bursts as would do."""
    quick = Effort(0.03, 3, 8)
    machine.disturbed = lambda burst: "30% of the processor stolen" if burst <= 20 else ""
    told: list[str] = []
    graph = product(4, 5)
    found = measure(
        [course(graph)], store, quick, machine.now + 1e3, lambda what, _, __: told.append(what)
    )
    assert found.disturbed == 20
    assert all(quick.settles(sample) for sample in found.samples.values())
    assert any("20 of 20 bursts disturbed" in what for what in told)


def test_outliers_change_neither_time_nor_margin() -> None:
    sample = None
    for burst in range(12):
        sample = combined(sample, [[1.0, 1.0, 9.0], [2.0, 2.0, 2.0]] if burst % 6 else [[30.0]])
    assert sample is not None
    assert sample.seconds == 1.5
    assert sample.margin < 0.02
    assert sample.bursts[:2] == (30.0, 1.5)


def test_the_interval_has_the_median_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    for count in (4, 6, 9, 15):
        hits = 0
        for _ in range(1000):
            values = rng.lognormal(0.0, 0.1, count)
            hits += abs(float(np.median(values)) - 1.0) <= 2 * margin(list(values))
        # The interval of order statistics need not lie around the median itself.
        assert hits >= 940


def test_graphs_take_turns(machine: Machine, store: Store) -> None:
    one, other = product(4, 5, 6, name="one"), product(4, 7, name="other")
    measure([course(one), course(other)], store, EFFORT)
    assert set(names(machine)[:2]) == set(names(machine)[2:4]) == {"one", "other"}
    # And the first once more at the end.
    assert names(machine)[-1] == names(machine)[0]


def test_what_is_not_known_and_counts_comes_first(machine: Machine, store: Store) -> None:
    small, large = product(4, 5, name="small"), product(400, 500, 4, name="large")
    measure([course(small), course(large)], store, EFFORT)
    assert names(machine)[0] == "large"
    assert machine.compiled[0] == large.groups[0].name
    machine.bursts.clear()
    new = product(3, 3, name="new")
    measure([course(large), course(new)], store, Effort(0.0, 4, 4))
    assert names(machine)[0] == "new"


def test_nothing_begins_behind_the_deadline_and_the_next_call_goes_on(
    machine: Machine, store: Store
) -> None:
    graphs = [product(4, 5, name="one"), product(400, 6, name="two"), product(4, 7, name="three")]
    courses = [course(graph) for graph in graphs]
    found = measure(courses, store, EFFORT, deadline=machine.now + 1.5)
    assert names(machine) == ["two", "three"]
    assert len(found.samples) == 2
    found = measure(courses, store, EFFORT)
    assert len(found.samples) == 3
    assert names(machine)[2] == "one"
    assert names(machine).count("two") == 3 + (names(machine)[-1] == "two")


def test_a_budget_goes_to_what_tells_most_and_the_rest_is_predicted(
    machine: Machine, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = product(300, 310, 320, 7)
    large, _, small = (group.name for group in graph.groups)
    given: list[int] = []

    def chosen(
        pool: Sequence[Work], regression: object, count: int, shares: Sequence[float]
    ) -> list[int]:
        given.extend((len(pool), len(shares)))
        return [2, 0, 1] if len(pool) == 3 else list(range(len(pool)))

    monkeypatch.setattr("hetsched.profiling.next_to_measure", chosen)
    machine.compiling_seconds = 10.0
    told: list[str] = []
    until = machine.now + 19
    found = measure([course(graph)], store, EFFORT, until, lambda what, _, __: told.append(what))
    # Not the largest, which comes first where nothing limits the time.
    assert machine.compiled[:2] == [small, large]
    assert given == [3, 3]
    keys = course(graph).keys
    assert found.estimates.keys() == keys.values() - found.samples.keys()
    assert len(found.estimates) == 1
    for estimate in found.estimates.values():
        assert estimate.seconds > 0
        assert not estimate.is_measured
    assert any("0 measured, 3 predicted so far" in what for what in told)
    # With time enough all are measured.
    assert not measure([course(graph)], store, EFFORT, machine.now + 1e6).estimates


def test_a_kill_loses_the_burst_in_flight_alone(machine: Machine, store: Store) -> None:
    graph = product(4, 5, 6)

    def told(group: Group, burst: int) -> float:
        if burst == 3:
            raise KeyboardInterrupt
        return 1e-3

    machine.told = told
    with pytest.raises(KeyboardInterrupt):
        measure([course(graph)], store, EFFORT)
    assert [len(record.sample.bursts) for record in store.records()] == [2, 2]
    machine.told = lambda group, burst: 1e-3
    measure([course(graph)], store, EFFORT)
    assert len(machine.bursts) == 3 + 1


def test_slow_compiling_does_not_keep_all_waiting(machine: Machine, store: Store) -> None:
    """And what was measured without its neighbours gives way to what was measured with them."""
    graph = product(400, 300, 20, 10)
    machine.compiling_seconds = 10.0
    machine.told = lambda group, burst: 1e-3 if burst == 3 else 1.0
    seen: list[int] = []

    def told(group: Group, burst: int) -> float:
        seen.append(len(store.records()))
        return 1e-3 if len(machine.bursts[-1][1]) == 3 else 1.0

    machine.told = told
    found = measure([course(graph)], store, EFFORT)
    assert [len(groups) for _, groups in machine.bursts] == [2, 3, 3, 3]
    assert seen[:3] == [0, 0, 2]
    assert all(sample.seconds == 1e-3 for sample in found.samples.values())
    assert all(record.sample.seconds == 1e-3 for record in store.records())


def test_what_is_refused_when_it_compiles_is_told_and_not_tried_again(
    machine: Machine, store: Store
) -> None:
    graph = product(4, 5, 6)
    machine.refused = (graph.groups[1].name,)
    found = measure([course(graph)], store, EFFORT)
    key = course(graph).keys[graph.groups[1].name]
    assert found.refused == {key: "no"}
    assert found.seconds(key) == inf
    assert len(machine.bursts) == 3


@pytest.mark.parametrize("faster", [False, True])
def test_a_machine_that_changes_is_told_of(machine: Machine, store: Store, faster: bool) -> None:
    def told(group: Group, burst: int) -> float:
        return 1e-3 * (1 - 0.01 * burst if faster else 1 + 0.01 * burst)

    machine.told = told
    graphs = [product(4, 5, name="one"), product(4, 6, name="other")]
    found = measure([course(graph) for graph in graphs], store, EFFORT)
    assert found.drift is not None
    assert found.since is None
    assert (found.drift < -0.05) if faster else (found.drift > 0.05)
    machine.told = lambda group, burst: 3e-3
    again = measure([course(graphs[0])], store, Effort(0.0, 50, 2))
    assert again.since is not None
    assert again.since > 1


def test_kernels_can_be_fitted_from_the_store(machine: Machine, store: Store) -> None:
    graph = product(4, 5, 6)
    measure([course(graph)], store, EFFORT)
    records = {record.kernel.signature: record for record in store.records()}
    assert {key[-1] for key in course(graph).keys.values()} == set(records)
    for key, record in records.items():
        assert signature(graph_of(record.kernel)) == key
        assert record.kernel.kinds == "MatMul"


def test_the_cost_model_measures_each_distinct_group_once(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "compiler 1"
    monkeypatch.setattr("hetsched.targets.cpu.Cpu.configuration", lambda self, device: text)
    machine.told = lambda group, burst: 1.0 + len(group.name) if burst < 4 else 7.0
    graph = product(4, 4, 4, 6)
    _, same, different = graph.groups
    costs = Profiled(str(tmp_path / "profile.sqlite"))
    both = [(group, device) for group in graph.groups for device in (HERE, THERE)]
    seconds = costs.all_seconds(graph, both)
    assert len(machine.bursts) == QUICK.least_bursts
    assert seconds[0] == seconds[1] == seconds[2] == seconds[3]
    # A later process, then another compiler.
    again = Profiled(str(tmp_path / "profile.sqlite"))
    assert again.all_seconds(product(4, 4, 4, 6), both[:0]) == []
    assert again.compute_seconds(graph, different, THERE) == seconds[4]
    assert len(machine.bursts) == QUICK.least_bursts
    text = "compiler 2"
    assert again.compute_seconds(graph, same, HERE) == 7.0
    text = "compiler 1"
    assert again.compute_seconds(graph, same, HERE) == seconds[0]


def test_the_cost_model_has_no_price_for_what_does_not_compile(
    machine: Machine, store: Store
) -> None:
    graph = product(4, 5)
    machine.refused = (graph.groups[0].name,)
    assert Profiled(str(store.path)).compute_seconds(graph, graph.groups[0], HERE) == inf


def test_progress_tells_the_time_that_is_left(machine: Machine, store: Store) -> None:
    told: list[tuple[str, int, int]] = []
    machine.told = lambda group, burst: 1e-3 * (1 + burst % 3)
    measure(
        [course(product(4, 5))],
        store,
        EFFORT,
        machine.now + 200,
        lambda what, done, of: told.append((what, done, of)),
    )
    assert len(told) == EFFORT.most_bursts
    assert all(what.startswith("g on cpu:0, ") and what.endswith(" s left") for what, _, _ in told)
    assert all(0 <= done < of for _, done, of in told)


@pytest.mark.parametrize("wavering", [0.0, 0.5])
def test_no_margin_is_too_small_to_ask_for(machine: Machine, store: Store, wavering: float) -> None:
    machine.told = lambda group, burst: 1e-3 * (1 + wavering * (burst % 2))
    effort = Effort(tolerance=0.0, least_bursts=7, most_bursts=7)
    measure([course(product(4, 5))], store, effort, progress=lambda what, done, of: None)
    assert len(machine.bursts) == 7


def test_nothing_to_measure() -> None:
    assert Measured({}, frozenset(), {}).seconds(("a", "b", "c", "d")) == inf
