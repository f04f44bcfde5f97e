"""Measures kernel groups until their times are known well enough, and keeps them in the store.

A burst runs the groups of a graph on a device a few times, one behind another. Bursts of several
graphs and devices take turns, so that a drift of the machine touches all alike; the time of a
kernel is the median of its bursts. What is least known of what counts most comes first, and what
has no sample before what has one; where the time is limited, those kernels come first that tell
most about the others, whose times are then predicted. A burst that was disturbed does not count and
is repeated later. Each burst is kept at once.
"""

import statistics
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import inf
from time import perf_counter, sleep

from hetsched.confidence import margin
from hetsched.cost import Progress, kernel_of, roofline_seconds, signature
from hetsched.device import Device
from hetsched.disturbance import Witness
from hetsched.forms import between
from hetsched.fusion import Group
from hetsched.graph import Graph
from hetsched.learning.choice import next_to_measure
from hetsched.learning.model import Model
from hetsched.learning.regression import Estimate
from hetsched.learning.work import Work
from hetsched.operation import group_flops, group_nbytes
from hetsched.plugin import load
from hetsched.sequence import KernelSequence, method, surroundings
from hetsched.store import Kernel, Rejected, Sample, Store
from hetsched.target import Target

# A burst has so many passes if that takes no longer or shorter than this.
PASSES = 8
SHORTEST_SECONDS, LONGEST_SECONDS = 0.05, 1.0
# Bursts that a sample is made of; older ones are forgotten.
MOST_BURSTS = 32
# Disturbed bursts that are kept of a sample, to be looked at; and between one and the next attempt.
MOST_REJECTED = 8
PAUSE_SECONDS = 0.25
# Kernels that are chosen for what they tell of others; the rest comes by the time that it takes.
MOST_CHOSEN = 256
# Kernels that take less than this share of their graph together need not be known well.
IGNORED_SHARE = 0.05
# Weights of graphs that are loaded at the same time.
MOST_LOADED_NBYTES = 1 << 30
# What compiling a graph may take before its first burst, doubled for each that follows, and of the
# time that is left.
COMPILING_SECONDS = 15.0
COMPILING_SHARE = 0.8
# A machine that changes by more while it is measured is told of.
MOST_DRIFT = 0.05


@dataclass(frozen=True)
class Effort:
    """How well a time has to be known: a margin of at most `tolerance`, relative to it.

    At least and at most so many bursts are made of a graph. With `trusting`, what the store has is
    taken as it is, unless each of its bursts was disturbed. Unless it is `watching`, bursts count
    whatever else goes on.
    """

    tolerance: float
    least_bursts: int
    most_bursts: int
    trusting: bool = False
    watching: bool = True

    def settles(self, sample: Sample) -> bool:
        return len(sample.bursts) >= self.least_bursts and sample.relative_margin <= self.tolerance


# A device's fingerprint, its compiler, the method of measuring and the signature of a kernel.
Key = tuple[str, str, str, str]

# Before a plan is made, and when nothing else is asked for than to measure.
QUICK = Effort(tolerance=0.03, least_bursts=3, most_bursts=8, trusting=True)
THOROUGH = Effort(tolerance=0.02, least_bursts=5, most_bursts=MOST_BURSTS)


@dataclass(frozen=True, eq=False)
class Course:
    """Groups of a graph that are measured on a device, one behind another."""

    graph: Graph
    groups: Sequence[Group]
    device: Device

    @cached_property
    def compiler(self) -> str:
        return load(Target, self.device.target).configuration(self.device)

    @cached_property
    def method(self) -> str:
        return method(self.graph)

    @property
    def megabytes(self) -> int:
        """What a run of the graph touches."""
        return surroundings(self.graph)

    @cached_property
    def parts(self) -> Mapping[str, Graph]:
        """Each group as a graph of its own, by its name, as it is among its neighbours."""
        graph = between(self.graph, self.device)
        return {group.name: graph.part(group.ops, group.name) for group in self.groups}

    @cached_property
    def keys(self) -> Mapping[str, Key]:
        """What the sample of each group is kept under, by the group's name."""
        kind = (self.device.fingerprint, self.compiler, self.method)
        return {name: (*kind, signature(part)) for name, part in self.parts.items()}


@dataclass(frozen=True)
class Measured:
    """What is known of the kernels by now.

    `fresh` were measured by this call, `refused` are not compiled, with the reason. `drift` is by
    how much longer the first graph took at the end than at the beginning, and `since` by how much
    longer than when the store's samples of it were taken; None where that was not measured.
    `disturbed` bursts of `bursts` did not count. `estimates` are of kernels for which the time did
    not suffice, by those that were measured.
    """

    samples: Mapping[Key, Sample]
    fresh: frozenset[Key]
    refused: Mapping[Key, str]
    drift: float | None = None
    since: float | None = None
    bursts: int = 0
    disturbed: int = 0
    estimates: Mapping[Key, Estimate] = field(default_factory=dict)

    def seconds(self, key: Key) -> float:
        """The time of a kernel; infinite if there is none."""
        return self.samples[key].seconds if key in self.samples else inf


def measure(
    courses: Sequence[Course],
    store: Store,
    effort: Effort,
    deadline: float = inf,
    progress: Progress | None = None,
) -> Measured:
    """Measures what `effort` asks for into the store, and tells what is known then.

    No burst begins after `deadline`, in seconds of `perf_counter`.

    Raises
    ------
    DeviceError
        The target of a device is not available here.
    PartError
        A kernel fails.
    """
    work = _Work(courses, store, effort, deadline, progress)
    try:
        return work.done()
    finally:
        work.close()


@dataclass(eq=False)
class _State:
    """How far a course is: the seconds of all its groups in each burst of this call.

    `attempts` is how often its kernels were loaded, not always all; `disturbed` how many bursts did
    not count.
    """

    course: Course
    shares: Mapping[str, float]
    kernels: KernelSequence | None = None
    attempts: int = 0
    bursts: int = 0
    disturbed: int = 0
    totals: list[float] = field(default_factory=list)
    loading_seconds: float = 0.0
    wall_seconds: float = 0.0

    @property
    def nbytes(self) -> int:
        return self.course.graph.weight_nbytes


class _Work:
    """The courses that are not settled, in turns."""

    def __init__(
        self,
        courses: Sequence[Course],
        store: Store,
        effort: Effort,
        deadline: float,
        progress: Progress | None,
    ) -> None:
        self._store, self._effort = store, effort
        self._deadline, self._progress = deadline, progress
        self._samples = _known(courses, store)
        self._before = dict(self._samples)
        self._fresh: set[Key] = set()
        self._refused: dict[Key, str] = {}
        self._partial: set[Key] = set()
        self._described: set[str] = set()
        self._open: list[_State] = []
        self._witness = Witness()
        if effort.trusting:
            courses = [
                replace(course, groups=[g for g in course.groups if not self._has(course, g)])
                for course in courses
            ]
        self._states = [_State(course, _shares(course)) for course in courses if course.groups]
        # What comes first where the time may not suffice.
        self._ranks = self._chosen() if deadline < inf else {}

    def done(self) -> Measured:
        """Bursts in turns until all is settled or the time is over."""
        for state in self._turns():
            # The first graph is measured once more at the end.
            reference = self._reference
            reserved = _burst_seconds(reference) if reference else 0.0
            if perf_counter() >= self._deadline - reserved:
                break
            self._tell(state)
            self._burst(state)
        drift, since = self._drift()
        return Measured(
            self._samples,
            frozenset(self._fresh),
            self._refused,
            drift,
            since,
            sum(state.bursts for state in self._states),
            sum(state.disturbed for state in self._states),
            self._estimates() if self._deadline < inf else {},
        )

    def _chosen(self) -> dict[Key, int]:
        """Which kernels to measure first, by how much they tell of what all of them take."""
        ranks: dict[Key, int] = {}
        for device, states in self._unknown().items():
            model = Model.of(device, self._store.records())
            pool: dict[Key, Work] = {}
            shares: dict[Key, float] = defaultdict(float)
            for state in states:
                course, missing = state.course, set(self._missing(state))
                names = [name for name, key in course.keys.items() if key in missing]
                parts = [course.parts[name] for name in names]
                found = model.estimates(parts, course.megabytes)
                state.shares = {**state.shares, **_uncertain(names, found)}
                for name, part, estimate in zip(names, parts, found, strict=True):
                    shares[course.keys[name]] += estimate.seconds
                    pool[course.keys[name]] = model.work(part, course.megabytes)
            keys = list(pool)
            works, weights = list(pool.values()), [shares[key] for key in keys]
            order = next_to_measure(works, model.regression, MOST_CHOSEN, weights)
            ranks |= {keys[position]: rank for rank, position in enumerate(order)}
        return ranks

    def _estimates(self) -> dict[Key, Estimate]:
        """Of what is still missing, by all that is known now."""
        estimates: dict[Key, Estimate] = {}
        for device, states in self._unknown().items():
            model = Model.of(device, self._store.records())
            for course in (state.course for state in states):
                parts = [course.parts[name] for name in course.keys]
                found = model.estimates(parts, course.megabytes)
                estimates |= dict(zip(course.keys.values(), found, strict=True))
        known = self._samples.keys() | self._refused.keys()
        return {key: found for key, found in estimates.items() if key not in known}

    def _unknown(self) -> Mapping[Device, list[_State]]:
        """The courses with kernels that have no sample, by device."""
        found: dict[Device, list[_State]] = defaultdict(list)
        for state in self._states:
            if self._missing(state):
                found[state.course.device].append(state)
        return found

    def _turns(self) -> Iterator[_State]:
        """Each course that is not settled, the most needed first, and then again."""
        while waiting := [state for state in self._states if not self._settled(state)]:
            for state in sorted(waiting, key=self._need, reverse=True):
                if not self._settled(state):
                    yield state

    def close(self) -> None:
        for state in list(self._open):
            self._unload(state)

    def _has(self, course: Course, group: Group) -> bool:
        sample = self._samples.get(course.keys[group.name])
        return sample is not None and not sample.is_rejected

    def _missing(self, state: _State) -> list[Key]:
        """What has neither a sample nor a reason."""
        known = self._samples.keys() | self._refused.keys()
        return [key for key in dict.fromkeys(state.course.keys.values()) if key not in known]

    def _settled(self, state: _State) -> bool:
        # Without a deadline, what is disturbed again and again has to end too.
        disturbed = state.disturbed if self._deadline == inf else 0
        if max(len(state.totals), disturbed) >= self._effort.most_bursts:
            return True
        return not self._missing(state) and self._loose_share(state) <= IGNORED_SHARE

    def _loose_share(self, state: _State) -> float:
        """The share of the graph's time in kernels that are not known well."""
        total = loose = 0.0
        for key in state.course.keys.values():
            sample = self._samples.get(key)
            if sample is not None:
                total += sample.seconds
                loose += 0.0 if self._effort.settles(sample) else sample.seconds
        return loose / total if total else 0.0

    def _need(self, state: _State) -> tuple[bool, float]:
        """The seconds that are uncertain; what has no sample comes first."""
        missing = set(self._missing(state))
        found = 0.0
        for name, key in state.course.keys.items():
            if key in missing:
                found += state.shares[name]
            elif key in self._samples:
                sample = self._samples[key]
                found += min(sample.margin, sample.seconds)
        return bool(missing), found

    def _burst(self, state: _State) -> None:
        kernels = self._loaded(state)
        course = state.course
        begin = perf_counter()
        if self._effort.watching:
            self._witness.begin(course.device)
        times = kernels.burst(_burst_seconds(state))
        why = self._witness.end(course.device) if self._effort.watching else ""
        state.bursts += 1
        for name, reason in kernels.refused.items():
            self._refused[course.keys[name]] = reason
        taken: dict[Key, list[list[float]]] = {}
        for name, seconds in times.items():
            taken.setdefault(course.keys[name], []).append(seconds)
        for key, found in taken.items():
            # What was measured without its neighbours gives way.
            known = self._before if key in self._partial else self._samples
            before = known.get(key)
            self._samples[key] = rejecting(before, found, why) if why else combined(before, found)
        parts = {course.keys[name]: course.parts[name] for name in times}
        kept = [(self._kernel(parts[key], key[-1]), self._samples[key]) for key in taken]
        self._store.add(course.device, course.compiler, course.method, kept)
        self._fresh.update(taken)
        if len(times) + len(kernels.refused) < len(course.groups):
            self._partial.update(taken)
            self._unload(state)
        else:
            self._partial.difference_update(taken)
        if why:
            state.disturbed += 1
            if perf_counter() + PAUSE_SECONDS < self._deadline:
                sleep(PAUSE_SECONDS)
        elif state.kernels is not None:
            state.totals.append(sum(map(statistics.median, times.values())))
        state.wall_seconds = perf_counter() - begin

    def _kernel(self, part: Graph, key: str) -> Kernel:
        """With its graph when it is first written."""
        if key in self._described:
            return Kernel(key, "+".join(op.kind for op in part.ops))
        self._described.add(key)
        return kernel_of(part)

    def _loaded(self, state: _State) -> KernelSequence:
        """The kernels of a course; others are put away where there are too many weights."""
        if state.kernels is None:
            while self._open and self._nbytes() + state.nbytes > MOST_LOADED_NBYTES:
                self._unload(self._open[0])
            course = state.course
            missing = set(self._missing(state))
            groups = sorted(
                course.groups,
                key=lambda g: (
                    course.keys[g.name] not in missing,
                    self._ranks.get(course.keys[g.name], MOST_CHOSEN),
                    -state.shares[g.name],
                ),
            )
            # Not all at once, so that something is soon kept; and some time has to be left to run
            # what is compiled.
            now = perf_counter()
            whole = COMPILING_SECONDS * 2**state.attempts
            until = now + min(whole, COMPILING_SHARE * (self._deadline - now))
            state.kernels = KernelSequence(
                course.graph, groups, course.device, self._progress, until
            )
            state.attempts += 1
            state.loading_seconds = perf_counter() - now
            self._open.append(state)
        return state.kernels

    def _nbytes(self) -> int:
        return sum(state.nbytes for state in self._open)

    def _unload(self, state: _State) -> None:
        if state.kernels is not None:
            state.kernels.close()
            state.kernels = None
            self._open.remove(state)

    @property
    def _reference(self) -> _State | None:
        """The first course that was measured whole."""
        return next((state for state in self._states if state.totals), None)

    def _drift(self) -> tuple[float | None, float | None]:
        """The change of the machine since the first burst, and that before it since the store's."""
        reference = self._reference
        if reference is None:
            return None, None
        keys = [key for key in reference.course.keys.values() if key in self._fresh]
        if not keys:
            return None, None
        since = None
        if all(key in self._before for key in keys):
            since = reference.totals[0] / sum(self._before[key].seconds for key in keys) - 1
        others = any(state.totals for state in self._states if state is not reference)
        if others and perf_counter() < self._deadline:
            self._burst(reference)
        drift = None
        if len(reference.totals) > 1:
            drift = reference.totals[-1] / reference.totals[0] - 1
        return drift, since

    def _tell(self, state: _State) -> None:
        if self._progress:
            keys = {key for other in self._states for key in other.course.keys.values()}
            done = sum(
                1
                for key in keys
                if key in self._refused
                or (key in self._samples and self._effort.settles(self._samples[key]))
            )
            left = min(self._deadline - perf_counter(), self._seconds_left())
            disturbed = sum(other.disturbed for other in self._states)
            bursts = sum(other.bursts for other in self._states)
            told = f", {disturbed} of {bursts} bursts disturbed" if disturbed else ""
            unknown = len(keys - self._samples.keys() - self._refused.keys())
            if self._deadline < inf and unknown:
                told += f", {len(keys) - unknown} measured, {unknown} predicted so far"
            self._progress(
                f"{state.course.graph.name} on {state.course.device.name}{told}, "
                f"{_duration(left)} left",
                min(done, len(keys) - 1),
                len(keys),
            )

    def _seconds_left(self) -> float:
        """About what is needed until all is settled; margins shrink with the root of the bursts."""
        found = 0.0
        for state in self._states:
            if self._settled(state):
                continue
            count = max(1, len(state.totals))
            relative = (
                margin(state.totals) / statistics.median(state.totals) if state.totals else inf
            )
            tolerance = self._effort.tolerance
            times = 4.0 if relative >= 4.0 * tolerance else relative / tolerance
            wanted = count * times**2
            more = min(max(wanted, self._effort.least_bursts), self._effort.most_bursts) - count
            # As many are disturbed as before.
            tries = max(1, state.bursts) / max(1, state.bursts - state.disturbed)
            found += max(1.0, more) * tries * (state.wall_seconds or SHORTEST_SECONDS)
            if not state.totals:
                loads = [s.loading_seconds for s in self._states if s.attempts]
                found += statistics.fmean(loads) if loads else COMPILING_SECONDS
        return found


def rejecting(before: Sample | None, found: Sequence[Sequence[float]], why: str) -> Sample:
    """The sample with one disturbed burst more, which changes its time only if it has no other."""
    burst = _of_burst(found)
    if before is None:
        before = Sample(burst, statistics.fmean(map(_spread, found)), 0)
    rejected = (*before.rejected[1 - MOST_REJECTED :], Rejected(burst, why))
    # Disturbance only makes longer.
    seconds = before.seconds if before.bursts else min(before.seconds, burst)
    return replace(before, seconds=seconds, rejected=rejected)


def _of_burst(found: Sequence[Sequence[float]]) -> float:
    return statistics.fmean(statistics.median(seconds) for seconds in found)


def combined(before: Sample | None, found: Sequence[Sequence[float]]) -> Sample:
    """The sample with one burst more: the times of each occurrence of the kernel."""
    burst = _of_burst(found)
    every = sum(map(len, found))
    spread = statistics.fmean(map(_spread, found))
    rejected = before.rejected if before is not None else ()
    if before is None or not before.bursts:
        # What was only rejected gives way.
        before = Sample(0.0, 0.0, 0)
    bursts = (*before.bursts[1 - MOST_BURSTS :], burst)
    repeats = before.repeats + every
    return Sample(
        seconds=statistics.median(bursts),
        spread=(before.spread * before.repeats + spread * every) / repeats,
        repeats=repeats,
        margin=margin(bursts),
        bursts=bursts,
        rejected=rejected,
    )


def _spread(seconds: Sequence[float]) -> float:
    """Half the distance between the quartiles."""
    if len(seconds) < 2:
        return 0.0
    first, _, third = statistics.quantiles(seconds, n=4)
    return (third - first) / 2


def _known(courses: Sequence[Course], store: Store) -> dict[Key, Sample]:
    """What the store has of the courses, by one query for each of them."""
    found: dict[Key, Sample] = {}
    for course in courses:
        alike = {key[-1]: key for key in course.keys.values() if key not in found}
        samples = store.samples(course.device, course.compiler, course.method, alike)
        found.update({alike[signature]: sample for signature, sample in samples.items()})
    return found


def _shares(course: Course) -> Mapping[str, float]:
    """About what each group takes, for what has not been measured."""
    return {
        group.name: roofline_seconds(group_flops(group), group_nbytes(group), course.device)
        for group in course.groups
    }


def _uncertain(names: Sequence[str], found: Sequence[Estimate]) -> Mapping[str, float]:
    """The seconds that are not known, by group."""
    return {
        name: estimate.seconds * estimate.deviation
        for name, estimate in zip(names, found, strict=True)
    }


def _burst_seconds(state: _State) -> float:
    total = state.totals[-1] if state.totals else 0.0
    return min(max(PASSES * total, SHORTEST_SECONDS), LONGEST_SECONDS)


def _duration(seconds: float) -> str:
    """A time to come, as one tells it.

    Examples
    --------
    >>> _duration(3.2), _duration(200)
    ('4 s', '3 min 20 s')
    """
    whole = int(seconds) + 1 if seconds % 1 else int(seconds)
    minutes, rest = divmod(max(0, whole), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
