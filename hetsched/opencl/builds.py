"""Programs built in other processes, as a compiler that ends its process must not end ours.

PoCL ends it where a kernel cannot be linked, on a full disk for instance, and LLVM where it cannot
write; a process also builds one program after the other. So children build (`builder.py`), as many
at a time as there are cores, and hand over binaries. They start when they are first needed, and end
when nobody has asked for a while, at the latest with this process.
"""

import atexit
import json
import os
import selectors
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from threading import BoundedSemaphore, Timer

from hetsched.errors import HetschedError
from hetsched.host import cores

BUILDER = Path(__file__).with_name("builder.py")
# Of one program. The largest take a minute on a slow machine.
PATIENCE_SECONDS = 900.0
# What is told of a compiler's last words.
LAST_LINES, LAST_NBYTES, LINE_LETTERS = 3, 8 << 10, 200

_idle: list["_Child"] = []
_alive: set["_Child"] = set()
_at_once = BoundedSemaphore(len(cores()))


class Died(HetschedError):
    """The process that was building a program ended, or had to be; the message has its words."""


class _Left(Exception):
    """A child has ended because nobody asked."""


def build(platform: str, number: int, options: str, source: str) -> tuple[int, bytes]:
    """OpenCL's status, and the binary of `source` for a device, the `number`th of its platform.

    Where the status is not 0, what the compiler says in place of the binary, which is empty if the
    driver has none. Platforms are numbered as in this process. Several threads may call this.

    Raises
    ------
    Died
        The compiler's process did not survive, or took too long.
    """
    text = source.encode()
    about = {"platform": platform, "number": number, "options": options, "nbytes": len(text)}
    request = json.dumps(about).encode() + b"\n" + text
    with _at_once:
        while True:
            try:
                child, known = _idle.pop(), True
            except IndexError:
                child, known = _Child(), False
            try:
                answer = child.ask(request)
            except _Left:
                child.end()
                if known:
                    continue
                raise Died("its compiler ended without an answer") from None
            except BaseException:
                child.end()
                raise
            _idle.append(child)
            return answer


class _Child:
    """A process that builds one program at a time."""

    def __init__(self) -> None:
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(BUILDER), *map(str, cores())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                bufsize=0,
            )
        except OSError as error:
            raise Died(f"its compiler could not be started: {error.strerror}") from error
        self._late = False
        _alive.add(self)

    def ask(self, request: bytes) -> tuple[int, bytes]:
        assert self._process.stdin is not None
        timer = Timer(PATIENCE_SECONDS, self._expire)
        timer.daemon = True
        timer.start()
        try:
            # If it is gone, its answer tells.
            with suppress(BrokenPipeError):
                rest = memoryview(request)
                while rest:
                    rest = rest[self._process.stdin.write(rest) :]
            return self._answer()
        finally:
            timer.cancel()

    def end(self) -> None:
        _alive.discard(self)
        process = self._process
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout, process.stderr):
            assert pipe is not None
            pipe.close()

    def _expire(self) -> None:
        self._late = True
        self._process.kill()

    def _answer(self) -> tuple[int, bytes]:
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        answer, words = bytearray(), b""
        with selectors.DefaultSelector() as ready:
            ready.register(self._process.stdout, selectors.EVENT_READ)
            ready.register(self._process.stderr, selectors.EVENT_READ)
            while ready.get_map():
                for key, _ in ready.select():
                    piece = os.read(key.fd, 1 << 20)
                    if not piece:
                        ready.unregister(key.fileobj)
                    elif key.fileobj is self._process.stdout:
                        answer += piece
                    else:
                        words = (words + piece)[-LAST_NBYTES:]
                head, line, body = answer.partition(b"\n")
                if line:
                    about = json.loads(head)
                    if len(body) == about["nbytes"]:
                        return about["status"], bytes(body)
        code = self._process.wait()
        if code == 0 and not answer:
            raise _Left
        raise Died(self._death(code) + _told(words.decode(errors="replace").splitlines()))

    def _death(self, code: int) -> str:
        if self._late:
            return f"its compiler did not end within {PATIENCE_SECONDS:g} s"
        if code < 0:
            return f"its compiler crashed ({signal.Signals(-code).name})"
        return f"its compiler failed with exit status {code}"


def _told(lines: Sequence[str]) -> str:
    wanted = [" ".join(line.split())[:LINE_LETTERS] for line in lines if line.strip()]
    return f": {'; '.join(wanted[-LAST_LINES:])}" if wanted else ""


@atexit.register
def _end() -> None:
    for child in list(_alive):
        child.end()


def _forget() -> None:
    _idle.clear()
    _alive.clear()


if hasattr(os, "register_at_fork"):
    # Those of another process answer that one.
    os.register_at_fork(after_in_child=_forget)
