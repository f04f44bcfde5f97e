"""Engines in processes of their own, of which one works at a time.

The others are stopped by a signal meanwhile, so that none of their threads can spin, whatever its
engine does after a run.
"""

import ctypes
import os
import signal
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

from bench.engines import Engine, EngineRefuses
from bench.timing import seconds_of
from hetsched.errors import HetschedError

# Linux's prctl: the signal that a process gets when its parent dies.
PR_SET_PDEATHSIG = 1
CLOSE_SECONDS = 10.0


class Worker:
    """A process with the engine that `open_engine(*arguments)` makes there. A context.

    Raises
    ------
    EngineRefuses
        The engine does not serve the model, or its process dies.
    """

    def __init__(
        self, name: str, cores: tuple[int, ...], open_engine: Callable[..., Engine], *arguments: Any
    ) -> None:
        self._name = name
        context = get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(other, cores, open_engine, *arguments), daemon=True
        )
        self._process.start()
        other.close()
        try:
            self._answer()
        except EngineRefuses:
            self.close()
            raise
        self._signal(signal.SIGSTOP)

    def burst(self, warm: int, count: int) -> list[float]:
        """The seconds of each of `count` runs in a row, behind `warm` more that do not count."""
        self._signal(signal.SIGCONT)
        self._pipe.send((warm, count))
        seconds: list[float] = self._answer()
        self._signal(signal.SIGSTOP)
        return seconds

    def close(self) -> None:
        self._signal(signal.SIGCONT)
        self._pipe.close()
        self._process.join(CLOSE_SECONDS)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _answer(self) -> Any:
        try:
            answer = self._pipe.recv()
        except EOFError:
            self._process.join(CLOSE_SECONDS)
            code = self._process.exitcode
            raise EngineRefuses(f"{self._name}: its process ended with {code}") from None
        if isinstance(answer, str):
            raise EngineRefuses(answer)
        return answer

    def _signal(self, number: int) -> None:
        if self._process.is_alive() and self._process.pid is not None:
            os.kill(self._process.pid, number)


def _serve(
    pipe: Connection, cores: tuple[int, ...], open_engine: Callable[..., Engine], *arguments: Any
) -> None:
    # A stopped process would outlive a parent that is killed.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    os.sched_setaffinity(0, cores)
    try:
        engine = open_engine(*arguments)
        engine.run()
    except HetschedError as error:
        pipe.send(str(error))
        return
    pipe.send([])
    while True:
        try:
            warm, count = pipe.recv()
        except EOFError:
            break
        for _ in range(warm):
            engine.run()
        pipe.send([seconds_of(engine.run) for _ in range(count)])
    engine.close()
