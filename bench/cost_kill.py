"""Profiling, killed at random moments: what of it is lost, and whether the store ever is.

A process of its own measures a small network without end. It says when a burst begins; a burst is
kept when it ends. It is killed at a moment drawn from a seed, one in five while it starts and the
others while it measures; its store is read and compared with what was there and what was said, and
another process goes on with the same store. A process that ends before it is killed is a failure.
"""

import multiprocessing
import random
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from signal import SIGKILL
from tempfile import TemporaryDirectory
from time import sleep

from bench.costing import Options, Result
from bench.models import TEST_DATA
from hetsched import read_onnx
from hetsched.api import profile
from hetsched.errors import OutputFileError
from hetsched.profiling import MOST_BURSTS, Effort
from hetsched.store import Store

KILLS = 100
# Of so many kills one comes while the process starts, within so long.
STARTING_EVERY, STARTING_SECONDS = 5, 3.0
# From the first burst that a process keeps to its end at the latest.
MEASURING_SECONDS = 0.6
# No process needs longer to begin.
PATIENCE_SECONDS = 120.0
MODEL = TEST_DATA / "digits_cnn.onnx"
# It never has enough, and keeps every burst as one that counts.
ENDLESS = Effort(tolerance=0.0, least_bursts=10**9, most_bursts=10**9, watching=False)


@dataclass(frozen=True)
class Kill:
    """What was found behind one: bursts that had begun, and those that the store has of them.

    `torn` are bursts of which it has some kernels and not others, `altered` says that an older
    burst is gone or changed, or that there are more than had begun; `damaged` is what SQLite or
    hetsched say against the file.
    """

    seconds: float
    begun: int
    kept: int
    torn: int
    altered: bool
    damaged: str = ""
    alive: bool = True

    @property
    def lost(self) -> int:
        """Bursts that had ended, as another had begun, and are not there."""
        return max(0, self.begun - 1 - self.kept)

    @property
    def sound(self) -> bool:
        return self.alive and not (self.lost or self.torn or self.altered or self.damaged)


def measured(options: Options) -> Result:
    with TemporaryDirectory(prefix="hetsched-") as folder:
        kills = list(killed(MODEL, options.device, Path(folder), KILLS, options.seed))
    begun = sum(kill.begun for kill in kills)
    kept = sum(kill.kept for kill in kills)
    sound = sum(kill.sound for kill in kills)
    lost, torn = sum(kill.lost for kill in kills), sum(kill.torn for kill in kills)
    altered = sum(kill.altered for kill in kills)
    damaged = sum(bool(kill.damaged) for kill in kills)
    text = (
        f"{len(kills)} kills: {begun} bursts had begun, {kept} are in the store, {begun - kept} "
        f"were in flight; of those that had ended {lost} are lost and {torn} torn; {altered} "
        f"stores altered, {damaged} damaged, {sum(not kill.alive for kill in kills)} processes "
        f"that ended by themselves"
    )
    heads = ("killed while", "kills", "bursts begun", "kept", "sound")
    phases = {
        "starting": [kill for kill in kills if not kill.begun],
        "measuring": [kill for kill in kills if kill.begun],
    }
    cells = [
        (
            name,
            str(len(chosen)),
            str(sum(kill.begun for kill in chosen)),
            str(sum(kill.kept for kill in chosen)),
            str(sum(kill.sound for kill in chosen)),
        )
        for name, chosen in phases.items()
    ]
    figures = {"kills": [vars(kill) | {"lost": kill.lost} for kill in kills]}
    return Result(text, heads, cells, figures, sound == len(kills) and bool(kept))


def killed(model: Path, device: str, folder: Path, kills: int, seed: int) -> Iterator[Kill]:
    """Kills so many processes that profile `model`, with stores in `folder`."""
    drawn = random.Random(seed)
    path, before = folder / "0.sqlite", dict[tuple[str, ...], tuple[float, ...]]()
    for index in range(kills):
        starting = index % STARTING_EVERY == STARTING_EVERY - 1
        seconds = drawn.uniform(0.0, STARTING_SECONDS if starting else MEASURING_SECONDS)
        begun, alive = _lived(model, device, path, seconds, starting)
        try:
            store = Store(path)
            store.check()
            found = {
                (record.fingerprint, record.compiler, record.method, record.kernel.signature): (
                    record.sample.bursts
                )
                for record in store.records()
            }
        except OutputFileError as error:
            yield Kill(seconds, begun, 0, 0, False, str(error), alive)
            path, before = folder / f"{index + 1}.sqlite", {}
            continue
        added = [_added(before.get(key, ()), found.get(key, ())) for key in before | found]
        counts = [count for count in added if count is not None] or [0]
        kept, torn = max(counts), max(counts) - min(counts)
        altered = None in added or kept > begun
        yield Kill(seconds, begun, kept, torn, altered, alive=alive)
        before = found


def _added(old: tuple[float, ...], new: tuple[float, ...]) -> int | None:
    """How many bursts a sample has beyond the `old` ones; None where one of those is not there.

    Above its most a sample forgets the oldest.

    Examples
    --------
    >>> _added((1.0, 2.0), (1.0, 2.0, 3.0)), _added((1.0, 2.0), (2.0, 3.0))
    (1, None)
    """
    forgotten = range(len(old) + 1 if len(new) == MOST_BURSTS else 1)
    for count in forgotten:
        if new[: len(old) - count] == old[count:]:
            return len(new) - len(old) + count
    return None


def _lived(
    model: Path, device: str, path: Path, seconds: float, starting: bool
) -> tuple[int, bool]:
    """How many bursts a process began until it was killed, and whether it lived until then.

    It is killed `seconds` after it was started, or after it had kept its first burst.
    """
    context = multiprocessing.get_context("spawn")
    heard, said = context.Pipe(duplex=False)
    process = context.Process(target=work, args=(model, device, path, said))
    process.start()
    # The child alone holds the other end, so that its death ends what is heard.
    said.close()
    begun = 0
    try:
        while not starting and begun < 2 and heard.poll(PATIENCE_SECONDS):
            begun += heard.recv()
        sleep(seconds)
        process.kill()
        process.join()
        while True:
            begun += heard.recv()
    except EOFError:
        heard.close()
    process.join()
    return begun, process.exitcode == -SIGKILL


def work(model: Path, device: str, path: Path, said: Connection) -> None:
    """Profiles without end, and says when a burst begins."""

    def told(what: str, _: int, __: int) -> None:
        if what.endswith(" left"):
            said.send(1)

    profile(read_onnx(model), device, path, progress=told, effort=ENDLESS)
