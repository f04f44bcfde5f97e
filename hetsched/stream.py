"""The schedule of many requests that follow each other through a plan."""

from collections import defaultdict
from heapq import heappop, heappush

from hetsched.errors import InfeasiblePlan
from hetsched.plan import Recipe
from hetsched.schedule import Schedule, Slot, Transfer
from hetsched.tasks import contract


def stream(recipe: Recipe, requests: int, in_flight: int = 0) -> Schedule:
    """When each part of each of `requests` runs, with at most `in_flight` at once (0: any number).

    As the executor does it: a unit runs a request's parts in the plan's order, and of several
    requests serves the one whose part was ready first; a link takes one tensor after the other.
    Slots are named by part and request, as `part0 of 7`. So the time a request tends to
    `objective.seconds_a_request`, which says it from a request of each route alone.

    Raises
    ------
    InfeasiblePlan
        A part cannot run where it is placed, or its data cannot get there.
    """
    for turn in recipe.turns:
        turn.simulate()
    return _Stream(recipe, in_flight or requests).run(requests)


class _Route:
    """What a request does whose parts are where `recipe` has them, all by numbers of parts."""

    def __init__(self, recipe: Recipe) -> None:
        members = [names for _, _, names in recipe.parts]
        tasks = contract(recipe.tasks, members, recipe.placement)
        self.names = [name for name, _, _ in recipe.parts]
        self.devices = [device for _, device, _ in recipe.parts]
        self.units = [tasks.system.device(device).unit for device in self.devices]
        self.seconds = [
            tasks.task[names[0]].seconds[device]
            for names, device in zip(members, self.devices, strict=True)
        ]
        number = {names[0]: index for index, names in enumerate(members)}
        self.order: dict[str, list[int]] = defaultdict(list)
        for index, unit in enumerate(self.units):
            self.order[unit].append(index)
        # Tensors by the part that writes them: name, bytes, way, seconds and the parts that read
        # them there; each once to a device.
        self.sent: dict[int | None, list[tuple[Transfer, list[int]]]] = defaultdict(list)
        self.moves: set[tuple[str | None, str | None]] = set()
        self.missing = [0] * len(members)
        ways: dict[tuple[int | None, str, str | None], tuple[Transfer, list[int]]] = {}
        for edge in tasks.edges:
            source = None if edge.source is None else number[edge.source]
            sink = None if edge.sink is None else number[edge.sink]
            ends = (
                None if source is None else self.devices[source],
                None if sink is None else self.devices[sink],
            )
            key = source, edge.tensor or str(edge.sink), ends[1]
            if key not in ways:
                seconds = tasks.transfer_seconds(edge.nbytes, *ends)
                ways[key] = Transfer(edge.tensor, edge.nbytes, *ends, 0.0, seconds), []
                self.sent[source].append(ways[key])
                if tasks.moves(*ends):
                    self.moves.add(ends)
            if sink is not None:
                ways[key][1].append(sink)
                self.missing[sink] += 1
        # Parts to run, and results to bring.
        self.total = len(self.names) + sum(move.sink is None for move, _ in ways.values())


class _Stream:
    """Events in order of time; each is a time, a number that settles ties, and what happens."""

    def __init__(self, recipe: Recipe, in_flight: int) -> None:
        self._in_flight = in_flight
        # Of a request by its number, modulo theirs.
        self._routes = [_Route(turn) for turn in recipe.turns]
        self._units = dict.fromkeys(unit for route in self._routes for unit in route.units)
        self._events: list[tuple[float, int, int, int | None, list[int] | None]] = []
        self._count = 0
        self._slots: list[Slot] = []
        self._transfers: list[Transfer] = []

    def run(self, requests: int) -> Schedule:
        routes = [self._route(request) for request in range(requests)]
        free: dict[str, bool] = dict.fromkeys(self._units, True)
        self._link_free: dict[tuple[str | None, str | None], float] = defaultdict(float)
        ready: dict[str, list[tuple[float, int, int]]] = {unit: [] for unit in self._units}
        missing = [list(route.missing) for route in routes]
        position = [dict.fromkeys(route.order, 0) for route in routes]
        left = [route.total for route in routes]
        waiting = list(range(requests))[::-1]

        def admit(time: float) -> None:
            if waiting:
                request = waiting.pop()
                self._send(time, request, None)
                for unit in routes[request].order:
                    offer(time, request, unit)

        def offer(time: float, request: int, unit: str) -> None:
            """The request's next part on the unit, if it can run."""
            place = position[request][unit]
            if place < len(routes[request].order[unit]):
                part = routes[request].order[unit][place]
                if not missing[request][part]:
                    missing[request][part] = -1
                    heappush(ready[unit], (time, request, part))

        def start(time: float, unit: str) -> None:
            if free[unit] and ready[unit]:
                _, request, part = heappop(ready[unit])
                free[unit] = False
                route = routes[request]
                finish = time + route.seconds[part]
                name = f"{route.names[part]} of {request}"
                self._slots.append(Slot(name, route.devices[part], time, finish))
                self._put(finish, request, part, None)

        for _ in range(min(self._in_flight, requests)):
            admit(0.0)
        for unit in self._units:
            start(0.0, unit)
        touched: list[str] = []
        while self._events:
            time, _, request, part, readers = heappop(self._events)
            if part is not None:
                # A part is done.
                unit = routes[request].units[part]
                free[unit] = True
                position[request][unit] += 1
                left[request] -= 1
                self._send(time, request, part)
                offer(time, request, unit)
                touched.append(unit)
            elif readers:
                for reader in readers:
                    missing[request][reader] -= 1
                    offer(time, request, routes[request].units[reader])
                    touched.append(routes[request].units[reader])
            else:
                left[request] -= 1
            if left[request] == 0:
                left[request] = -1
                admit(time)
                touched += list(self._units)
            # Whatever else happens at this very time comes first, so that ties go by the request.
            if not self._events or self._events[0][0] > time:
                for unit in touched:
                    start(time, unit)
                touched = []
        if any(count >= 0 for count in left):
            raise InfeasiblePlan("the parts of this plan wait for each other")
        return Schedule(tuple(self._slots), tuple(self._transfers), "predicted")

    def _route(self, request: int) -> _Route:
        return self._routes[request % len(self._routes)]

    def _put(self, time: float, request: int, part: int | None, readers: list[int] | None) -> None:
        self._count += 1
        heappush(self._events, (time, self._count, request, part, readers))

    def _send(self, time: float, request: int, part: int | None) -> None:
        route = self._route(request)
        for move, readers in route.sent[part]:
            ends = move.source, move.sink
            if ends not in route.moves:
                self._put(time, request, None, readers)
                continue
            begin = max(time, self._link_free[ends])
            self._link_free[ends] = begin + move.seconds
            self._transfers.append(
                Transfer(move.tensor, move.nbytes, *ends, begin, begin + move.seconds)
            )
            self._put(begin + move.seconds, request, None, readers)
