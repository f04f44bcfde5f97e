"""What is going on, on stderr."""

import os
import sys
from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

Report = Callable[[str, int, int], None]


class Steps:
    """What is going on, on stderr: a bar on a terminal, lines if they are asked for, or nothing."""

    def __init__(self, verbose: bool) -> None:
        self._verbose = verbose
        self._bar: Progress | None = None

    def __enter__(self) -> "Steps":
        if sys.stderr.isatty() and not self._verbose:
            # A stream of its own: stderr is elsewhere while a compiler is kept quiet.
            self._stream = os.fdopen(os.dup(sys.stderr.fileno()), "w")
            self._bar = Progress(
                SpinnerColumn(),
                TextColumn("{task.fields[stage]}", markup=False),
                BarColumn(),
                TextColumn("{task.fields[count]}", markup=False),
                TimeRemainingColumn(),
                TextColumn("{task.fields[what]}", markup=False),
                console=Console(file=self._stream),
                transient=True,
            )
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()
            self._stream.close()

    def begin(self, stage: str) -> Report:
        """Starts a stage; what it returns is told each item, its number and how many there are."""
        if self._verbose:
            say(stage)
        if self._bar is None:
            return lambda what, done, of: (
                say(f"{stage}: {what} ({done + 1} of {of})") if self._verbose else None
            )
        for task in list(self._bar.task_ids):
            self._bar.remove_task(task)
        bar, task = self._bar, self._bar.add_task("", total=None, stage=stage, what="", count="")
        return lambda what, done, of: bar.update(
            task, completed=done, total=of, what=what, count=f"{done}/{of}"
        )


class Fallbacks(list[str]):
    """What was gone on without: a line on stderr for each, and all of them for the document."""

    def __call__(self, line: str) -> None:
        if line not in self:
            self.append(line)
            say(f"fallback: {line}")


def say(text: str) -> None:
    print(text, file=sys.stderr)


def complain(text: str) -> None:
    say(f"error: {' '.join(text.split())}")
