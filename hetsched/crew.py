"""Runs plans whose parts are all functions of addresses, without Python between two of them.

`crew.c` has the work of a thread; it is compiled into what a target makes of a part. All that its
threads need stands ready when a request begins: the memory of what one part hands to the next, the
tables of addresses, and which steps wait for which. Such memory is used again by later requests;
results are always new arrays. Where parts are on several devices, requests take routes in turn.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from ctypes import CDLL, CFUNCTYPE, addressof, c_char, c_int32, c_int64, c_uint32, c_void_p, cast
from dataclasses import dataclass, field
from functools import reduce
from math import prod
from operator import and_
from pathlib import Path
from threading import Lock
from time import perf_counter

import numpy as np

from hetsched.dtype import ALIGNMENT, empty, new
from hetsched.errors import PartError
from hetsched.request import Request, Step, View, failure
from hetsched.schedule import Schedule, Transfer
from hetsched.target import Code

SOURCE = Path(__file__).with_suffix(".c")

# The structures of crew.c.
STEP = np.dtype(
    [("function", "u8"), ("sources", "u8"), ("readers", "u8"), ("counts", "i4", 2)], align=True
)
STATE = np.dtype(
    [
        *((name, "i8") for name in ("table", "start", "finish", "handed")),
        ("done", "u4"),
        ("unused", "V28"),
    ]
)
SLOT = np.dtype(
    [
        ("states", "u8"),
        *((name, "i4") for name in ("route", "working", "failed", "status", "host")),
        *((name, "u4") for name in ("ended", "waiters")),
    ],
    align=True,
)
SHARE = np.dtype([("steps", "u8"), ("count", "i8")])
PROGRESS = np.dtype([("number", "u4"), ("position", "i4")])
UNIT = np.dtype(
    [
        *((name, "u4") for name in ("signal", "sleeping", "calls", "idle")),
        ("unused", "V48"),
        *((name, "u4") for name in ("taken", "oldest")),
        *((name, "u8") for name in ("shares", "progress")),
        ("line", "V40"),
    ]
)
CREW = np.dtype(
    [
        *((name, "u8") for name in ("steps", "units", "slots", "tell")),
        *((name, "i4") for name in ("step_count", "unit_count", "most")),
        *((name, "u4") for name in ("submitted", "stopping")),
    ],
    align=True,
)

# A value as code takes it, and the number of the kind that is an address.
VALUE = np.dtype([("kind", "i4"), ("unused", "i4"), ("content", "i8")])
ADDRESS = 4

NANOSECOND = 1e-9
# A wait in C ends so often to see whether Python was interrupted.
LONGEST_WAIT_SECONDS = 0.05
# Requests are told apart by their numbers modulo this. Not so many are in flight, as a unit that
# is on few of the routes may hear of requests that have ended.
NUMBERS = 64
MOST_IN_FLIGHT = 32
MOST_ROUTES = 16
CORE_WORDS = 16
# The block of an array's shape and strides, of one axis.
SHAPE_NBYTES = 24
# What `crew_copy` counts in.
WORD_NBYTES = 8
TELL = CFUNCTYPE(None, c_uint32, c_int32)

# Shape and dtype.
Kind = tuple[tuple[int, ...], np.dtype]


class Crew:
    """The units of a plan whose steps have `codes`. `outputs` are the names that a run returns.

    `constants` are results that no step writes. What `views` put together has one memory, to which
    the steps write their pieces. Each unit needs a thread that calls `work`.

    Requests take `routes` in turn, each the numbers of its steps, by default all; the steps of two
    routes are the same parts in the same order. `submit` waits where `most` are in flight, by
    default two for each unit, and two more.
    """

    def __init__(
        self,
        steps: Sequence[Step],
        codes: Sequence[Code],
        outputs: Sequence[str],
        constants: Mapping[str, np.ndarray],
        views: Mapping[str, View] | None = None,
        routes: Sequence[tuple[int, ...]] = (),
        most: int = 0,
    ) -> None:
        self._constants = dict(constants)
        # Arrays of which C has the address only.
        self._kept: list[np.ndarray] = []
        # The codes of each unit.
        self._own: dict[str, list[Code]] = defaultdict(list)
        for step, code in zip(steps, codes, strict=True):
            self._own[step.device.unit].append(code)
        routes = routes or [tuple(range(len(steps)))]
        assert len(routes) <= MOST_ROUTES
        found: dict[tuple[int, ...], _Route] = {}
        for route in routes:
            if route not in found:
                course = [steps[i] for i in route], [codes[i] for i in route]
                found[route] = self._route(len(found), *course, outputs, views or {})
        self._routes = tuple(found.values())
        # By the request, modulo their number.
        self._turns = tuple(found[route] for route in routes)
        self._count = 0
        self._most_in_flight = min(most or 2 * len(self._own) + 2, MOST_IN_FLIGHT)
        self._in_flight: dict[int, CrewRequest] = {}
        self._lock = Lock()
        # What the code of a step said when it failed, by request and step.
        self._said: dict[tuple[int, int], str] = {}
        self._tell = TELL(self._told)
        library = codes[0].module
        self._work, self._stop = library.crew_work, library.crew_stop
        self._submit, self._serve = library.crew_submit, library.crew_serve
        self._wait = library.crew_wait
        self._work.argtypes, self._work.restype = (c_void_p, c_int32), None
        self._submit.argtypes, self._submit.restype = (c_void_p, c_void_p, c_int32), c_uint32
        self._serve.argtypes = (c_void_p, c_int32, c_void_p, c_uint32, c_void_p)
        self._serve.restype = c_int32
        self._wait.argtypes = (c_void_p, c_uint32, c_int64)
        self._stop.argtypes, self._stop.restype = (c_void_p,), None
        self._crew = self._made()

    def work(self, unit: str) -> None:
        """Runs the steps of `unit` on the calling thread until the crew is told to stop."""
        max(self._own[unit], key=lambda code: code.threads).enter()
        self._work(self._crew, list(self._own).index(unit))

    def stop(self) -> None:
        """Threads that work return when all requests have ended."""
        self._stop(self._crew)

    def submit(self, inputs: Mapping[str, np.ndarray], attended: bool = False) -> "CrewRequest":
        """Starts a run; waits while there are as many in flight as may be.

        If `attended`, the caller goes on to `attend` it.
        """
        with self._lock:
            route = self._turns[self._count % len(self._turns)]
            ready = route.free and not self._in_flight
            memory = route.free.pop() if ready else self._memory(route)
            self._count += 1
            request = CrewRequest(self, route, memory, {**inputs, **self._constants})
            if attended and not self._in_flight:
                request.host = route.host
            number = self._submit(self._crew, memory.slot_address, request.host)
            request.number = number
            self._in_flight[number] = request
        return request

    def attend(self, request: "CrewRequest") -> None:
        """Does the work of a unit on the calling thread until the request ends, if it has none.

        To wait for a thread that has to be woken takes longer than many parts.
        """
        memory = request.memory
        if request.host >= 0 and memory is not None:
            route = request.route
            route.codes[-1].enter()
            slot, number = memory.slot_address, request.number
            if self._serve(self._crew, request.host, slot, number, route.cores):
                with self._lock:
                    self._settle(request)

    def wait(self, request: "CrewRequest", timeout: float | None) -> bool:
        """Whether the request ends within `timeout` seconds."""
        end = None if timeout is None else perf_counter() + timeout
        memory = request.memory
        while memory is not None:
            left = LONGEST_WAIT_SECONDS if end is None else end - perf_counter()
            seconds = max(0.0, min(left, LONGEST_WAIT_SECONDS))
            slot = memory.slot_address
            if self._wait(slot, request.number, round(seconds / NANOSECOND)):
                with self._lock:
                    self._settle(request)
                return True
            if left <= 0:
                return False
        return True

    def _settle(self, request: "CrewRequest") -> None:
        """Takes what an ended request tells, and its memory for others; the lock is held."""
        if request.memory is not None:
            del self._in_flight[request.number]
            request.route.free.append(request.memory)
            request.settle(lambda index: self._said.pop((request.number, index), ""))

    def _memory(self, route: "_Route") -> "_Memory":
        """Memory for the route that no request in flight uses; the lock is held."""
        for request in list(self._in_flight.values()) if not route.free else ():
            if request.ended:
                self._settle(request)
        while self._in_flight:
            number = int(self._fields["submitted"][0]) + 1
            oldest = next(iter(self._in_flight.values()))
            most = len(self._in_flight) >= self._most_in_flight
            # A unit on few routes can be as many requests behind as there are routes.
            if not most and (number - oldest.number) % (1 << 32) < NUMBERS - MOST_ROUTES:
                break
            assert oldest.memory is not None
            self._wait(oldest.memory.slot_address, oldest.number, 1 << 62)
            self._settle(oldest)
        return route.free.pop() if route.free else _Memory(route)

    def _told(self, number: int, index: int) -> None:
        """Keeps what the code of a failed step says, on the thread that ran it."""
        route = self._turns[(number - 1) % len(self._turns)]
        self._said[number, index] = route.codes[index].raised()

    def _route(
        self,
        number: int,
        steps: Sequence[Step],
        codes: Sequence[Code],
        outputs: Sequence[str],
        views: Mapping[str, View],
    ) -> "_Route":
        order: dict[str, list[int]] = defaultdict(list)
        for index, step in enumerate(steps):
            order[step.device.unit].append(index)
        # What a caller that waits may serve: the unit of the last step, if its code runs anywhere.
        last = steps[-1].device
        anywhere = all(codes[index].threads == 1 for index in order[last.unit])
        host = list(self._own).index(last.unit) if anywhere else -1
        # By words: what numpy packs bits with needs more memory than a small plan.
        cores = self._keep(np.zeros(CORE_WORDS, np.uint64))
        for core in last.cores:
            cores[core // 64] |= np.uint64(1 << core % 64)
        course = _Course(steps, codes, outputs, views)
        return _Route(number, course, tuple(codes), order, host, address(cores))

    def _made(self) -> int:
        """The address of what C knows of the crew."""
        units = list(self._own)
        count = len(self._routes[0].codes)
        steps = self._keep(np.zeros((len(self._routes), count), STEP))
        for route in self._routes:
            for index, code in enumerate(route.codes):
                sources = self._keep(np.array(route.course.sources[index], np.int32))
                readers = self._keep(
                    np.array([units.index(unit) for unit in route.course.readers[index]], np.int32)
                )
                steps[route.number, index] = (
                    code.function,
                    sources.ctypes.data,
                    readers.ctypes.data,
                    (len(sources), len(readers)),
                )
        members = self._keep(_zeros(len(units), UNIT))
        for fields, unit in zip(members, units, strict=True):
            shares = self._keep(np.zeros(len(self._routes), SHARE))
            for route in self._routes:
                order = self._keep(np.array(route.order.get(unit, ()), np.int32))
                shares[route.number] = order.ctypes.data, len(order)
            progress = self._keep(np.zeros(NUMBERS, PROGRESS))
            fields["shares"], fields["oldest"] = shares.ctypes.data, 1
            fields["progress"] = progress.ctypes.data
        slots = self._keep(np.zeros(NUMBERS, np.uint64))
        self._fields = np.zeros(1, CREW)
        self._fields["steps"] = steps.ctypes.data
        self._fields["units"] = members.ctypes.data
        self._fields["slots"] = slots.ctypes.data
        self._fields["tell"] = cast(self._tell, c_void_p).value
        self._fields["step_count"], self._fields["unit_count"] = count, len(units)
        self._fields["most"] = NUMBERS
        return self._fields.ctypes.data

    def _keep(self, array: np.ndarray) -> np.ndarray:
        """The array, which lives as long as the crew."""
        self._kept.append(array)
        return array


class CrewRequest(Request):
    """One run in flight, in `memory` until it has ended."""

    number = 0
    host = -1

    def __init__(
        self,
        crew: Crew,
        route: "_Route",
        memory: "_Memory",
        values: dict[str, np.ndarray],
    ) -> None:
        course = route.course
        super().__init__(course.steps)
        self._crew = crew
        self.route = route
        self._course = course
        self.memory: _Memory | None = memory
        self._stamps = b""
        # What the code reads and writes; C has only the addresses.
        self._values = values
        for name, made in course.results.items():
            values[name] = made()
        for name, places in course.bound.items():
            array = values[name]
            if not array.flags.c_contiguous:
                array = values[name] = np.ascontiguousarray(array)
            memory.bind(places, address(array))

    @property
    def ended(self) -> bool:
        return self.memory is None or self.memory.ended.value == self.number

    def wait(self, timeout: float | None = None) -> bool:
        return self.memory is None or self._crew.wait(self, timeout)

    def settle(self, said: Callable[[int], str]) -> None:
        """Keeps what the memory tells, and forgets it; `said` is what a step that failed says."""
        assert self.memory is not None
        self._stamps = bytes(self.memory.stamps)
        if self.memory.failed.value:
            slot = self.memory.slot[0]
            index, status = int(slot["failed"]) - 1, int(slot["status"])
            step, failed = self._course.steps[index], self.route.codes[index].failed
            if failed is None:
                why = said(index) or f"its code gave {status}"
                self._error = PartError(f"{step} failed: {why}")
            else:
                cause = failed(status)
                self._error = failure(step, step.device.name, cause)
                self._error.__cause__ = cause
        else:
            self._result = {name: self._values[name] for name in self._course.outputs}
        self._values = {}
        self.memory = None

    def schedule(self) -> Schedule:
        self.wait()
        # Told from the stamps when somebody asks: a run of many parts would wait for it.
        if self._stamps:
            states, self._stamps = np.frombuffer(self._stamps, STATE), b""
            for index in np.flatnonzero(states["done"] == self.number).tolist():
                start, finish, handed = (
                    int(states[name][index]) * NANOSECOND for name in ("start", "finish", "handed")
                )
                self.record(index, start, finish)
                for tensor, nbytes, source, sink in self._course.transfers[index]:
                    times = self.since(finish), self.since(handed)
                    self.record_transfer(Transfer(tensor, nbytes, source, sink, *times))
        return super().schedule()


class Between:
    """Where in a request's memory the tensors are that one step hands to another.

    `kinds` are shape and dtype of what each step makes, by tensor, and `outputs` what a run
    returns, which is in arrays of its own. What `views` put together lies in one piece. `charged`
    is by device the memory that no other tensor had before.
    """

    def __init__(
        self,
        steps: Sequence[Step],
        kinds: Mapping[str, Kind],
        outputs: Sequence[str],
        views: Mapping[str, View],
    ) -> None:
        # By tensor: the one whose memory it is in, and the bytes before it there.
        self.within = {name: (name, 0) for name in kinds}
        for whole, view in views.items():
            self.within[whole] = whole, 0
            start = 0
            for piece in view.pieces:
                self.within[piece] = whole, start
                start += nbytes_of(kinds[piece])
        self.kinds = {**kinds, **{n: (view.shape, view.dtype) for n, view in views.items()}}
        # The steps that make each tensor, and those that make or read it.
        self.made: dict[str, list[int]] = defaultdict(list)
        for index, step in enumerate(steps):
            for name in step.outputs:
                self.made[name].append(index)
        self.made |= {n: [self.made[p][0] for p in view.pieces] for n, view in views.items()}
        self.results = {name: self.kinds[name] for name in outputs if name in self.made}
        users: dict[str, list[int]] = defaultdict(list)
        for index, step in enumerate(steps):
            for tensor in (*step.inputs, *step.outputs):
                name, _ = self.within.get(tensor, (tensor, 0))
                if name in self.made and name not in self.results:
                    users[name].append(index)
        # The start of each.
        self.places: dict[str, int] = {}
        self.charged: dict[str, int] = defaultdict(int)
        self._place(steps, users)

    @property
    def nbytes(self) -> int:
        return sum(self.charged.values())

    def _place(self, steps: Sequence[Step], users: Mapping[str, Sequence[int]]) -> None:
        """A tensor takes the smallest piece that is large enough and free, or a new one.

        A piece is free, whatever the units do meanwhile, if its users have all run when the tensor
        is made.
        """
        # By step, those that have all run when it begins.
        before: list[int] = []
        last: dict[str, int] = {}
        for index, step in enumerate(steps):
            known = 0
            earlier = {maker for name in step.inputs for maker in self.made.get(name, ())}
            earlier.update(last[unit] for unit in [step.device.unit] if unit in last)
            for other in earlier:
                known |= before[other] | 1 << other
            before.append(known)
            last[step.device.unit] = index
        pieces: list[tuple[int, int, int]] = []  # size, start, users
        total = 0
        for name in sorted(users, key=lambda name: min(self.made[name])):
            known = reduce(and_, (before[maker] for maker in self.made[name]))
            size = -(-nbytes_of(self.kinds[name]) // ALIGNMENT) * ALIGNMENT
            free = [p for p in pieces if p[0] >= size and not p[2] & ~known]
            if free:
                piece = min(free)
                pieces.remove(piece)
            else:
                piece = (size, total, 0)
                total += size
                self.charged[steps[min(self.made[name])].device.name] += size
            self.places[name] = piece[1]
            used = sum(1 << user for user in set(users[name]))
            pieces.append((piece[0], piece[1], used))


def tables_nbytes(routes: Sequence[Sequence[Step]], addresses: Mapping[Step, int]) -> int:
    """What a crew has to tell C on these routes, for one request at a time.

    `addresses` are how many the code of each step takes.
    """
    units = {step.device.unit for route in routes for step in route}
    count = len(routes) * len(routes[0])
    # Of the crew, of each unit, and of each route with the memory of a request.
    arrays = [NUMBERS * 8, count * STEP.itemsize, len(units) * UNIT.itemsize + ALIGNMENT]
    arrays += [CREW.itemsize]
    arrays += [NUMBERS * PROGRESS.itemsize, len(routes) * SHARE.itemsize] * len(units)
    for route in routes:
        arrays += [CORE_WORDS * 8, SLOT.itemsize, ALIGNMENT]
        arrays += [len(route) * STATE.itemsize + ALIGNMENT]
        # The numbers of its steps on each unit, and for each step its sources and readers.
        arrays += [len(route) * 4 // len(units)] * len(units) + [0, 0] * len(route)
        # A row of two words for each address, of the request.
        arrays += [16 * addresses[step] for step in route]
    # The same of the code. Those of the kernel are in blocks that numpy has kept of others.
    arrays += [16 * count for count in addresses.values()]
    return sum(block_nbytes(nbytes) + SHAPE_NBYTES for nbytes in arrays)


def block_nbytes(nbytes: int) -> int:
    """What glibc's heap gives for a block of so many bytes.

    Examples
    --------
    >>> [block_nbytes(nbytes) for nbytes in (0, 25, 1024)]
    [24, 40, 1032]
    """
    return max(24, -(-(nbytes + 8) // 16) * 16 - 8)


class _Course:
    """What each request does, and where in its memory the tensors between the parts are."""

    def __init__(
        self,
        steps: Sequence[Step],
        codes: Sequence[Code],
        outputs: Sequence[str],
        views: Mapping[str, View],
    ) -> None:
        self.steps = tuple(steps)
        self.outputs = tuple(outputs)
        kinds = {
            name: kind
            for step, code in zip(steps, codes, strict=True)
            for name, kind in zip(step.outputs, code.results, strict=True)
        }
        between = Between(steps, kinds, outputs, views)
        made = between.made
        self.nbytes = between.nbytes
        # What makes an array for each result.
        self.results = {name: new(*kind) for name, kind in between.results.items()}
        # By step: the steps of other units that it waits for, and the units that wait for it.
        self.sources: list[list[int]] = []
        self.readers: list[list[str]] = [[] for _ in steps]
        # Of tensor, bytes, source and sink, by the step that makes the tensor.
        self.transfers: list[list[tuple[str, int, str, str]]] = [[] for _ in steps]
        # By tensor, where its address stands: step and cell of its table, and the bytes before it.
        self.bound: dict[str, list[tuple[int, int, int]]] = defaultdict(list)
        # Step, cell, and the bytes before it in the memory.
        self.fixed: list[tuple[int, int, int]] = []
        for index, (step, code) in enumerate(zip(steps, codes, strict=True)):
            cells = zip((*step.inputs, *step.outputs), (*code.inputs, *code.outputs), strict=True)
            for tensor, cell in cells:
                name, start = between.within.get(tensor, (tensor, 0))
                if name in between.places:
                    self.fixed.append((index, cell, between.places[name] + start))
                else:
                    self.bound[name].append((index, cell, start))
            sources = sorted({i for name in step.inputs for i in made.get(name, ())})
            others = [i for i in sources if steps[i].device.unit != step.device.unit]
            self.sources.append(others)
            for source in others:
                if step.device.unit not in self.readers[source]:
                    self.readers[source].append(step.device.unit)
            read = [
                piece
                for name in step.inputs
                for piece in (views[name].pieces if name in views else (name,))
                if piece in made
            ]
            for name in read:
                (maker,) = made[name]
                if steps[maker].device.name == step.device.name:
                    continue
                nbytes = nbytes_of(between.kinds[name])
                move = (name, nbytes, steps[maker].device.name, step.device.name)
                if move not in self.transfers[maker]:
                    self.transfers[maker].append(move)


@dataclass(frozen=True, eq=False)
class _Route:
    """A way of requests through the units; `order` has the steps of each unit.

    `host` is the number of the unit that a caller who waits may serve, or -1, and `cores` the
    address of its cores.
    """

    number: int
    course: _Course
    codes: tuple[Code, ...]
    order: Mapping[str, Sequence[int]]
    host: int
    cores: int
    free: "list[_Memory]" = field(default_factory=list)


class _Memory:
    """What one request needs, for one request after another of the same route."""

    def __init__(self, route: _Route) -> None:
        course, codes = route.course, route.codes
        # Of several ways to allocate memory, the first is taken.
        allocate = next((code.allocate for code in codes if code.allocate), _allocated)
        nbytes = course.nbytes + ALIGNMENT
        self._between = allocate(nbytes)
        start = -address(self._between) % ALIGNMENT + address(self._between)
        self._tables = [code.table.reshape(-1).copy() for code in codes]
        for code, table in zip(codes, self._tables, strict=True):
            if code.within is not None and code.allocate == allocate:
                begin = address(self._between)
                first, second = code.within
                table[first], table[second] = begin, begin + nbytes
        for index, cell, offset in course.fixed:
            self._tables[index][cell] = start + offset
        self.states = _zeros(len(codes), STATE)
        self.states["table"] = [address(table) for table in self._tables]
        self.slot = np.zeros(1, SLOT)
        self.slot["states"], self.slot["route"] = address(self.states), route.number
        self.slot_address = address(self.slot)
        # What is looked at in each run, without numpy: what it does is no longer in the caches.
        self.ended = c_uint32.from_address(address(self.slot["ended"]))
        self.failed = c_int32.from_address(address(self.slot["failed"]))
        self.stamps = memoryview(self.states.view(np.uint8).data)
        self._cells = [memoryview(table.data) for table in self._tables]

    def bind(self, places: Sequence[tuple[int, int, int]], value: int) -> None:
        for index, cell, offset in places:
            self._cells[index][cell] = value + offset


def copying(library: CDLL, kind: Kind) -> Code:
    """Code, from `crew.c`, of a step that reads one array and writes another: to measure by.

    What it writes differs a little from what it read, so that nothing can leave it out.
    """
    return Code(
        function=cast(library.crew_copy, c_void_p).value or 0,
        table=np.array([nbytes_of(kind) // WORD_NBYTES, 0, 0], np.uint64),
        inputs=(1,),
        outputs=(2,),
        results=(kind,),
        threads=1,
        enter=lambda: None,
        module=library,
    )


def _allocated(nbytes: int) -> np.ndarray:
    return empty((nbytes,), np.dtype(np.uint8))


def address(array: np.ndarray) -> int:
    """Where the values of a contiguous array begin."""
    try:
        # What numpy tells of an array takes three times as long, which counts for small networks.
        return addressof(c_char.from_buffer(array))  # type: ignore[arg-type]
    except (TypeError, ValueError):
        # It is read-only, empty, or of a type that buffers do not have.
        return int(array.__array_interface__["data"][0])


def _zeros(count: int, dtype: np.dtype) -> np.ndarray:
    """An array that begins with a cache line."""
    memory = np.zeros(count * dtype.itemsize + ALIGNMENT, np.uint8)
    start = -address(memory) % ALIGNMENT
    return memory[start : start + count * dtype.itemsize].view(dtype)


def nbytes_of(kind: Kind) -> int:
    shape, dtype = kind
    return prod(shape) * dtype.itemsize
