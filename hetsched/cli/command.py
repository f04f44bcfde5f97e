"""The application itself: how every verb ends, with one line of an error and its exit status."""

import os
import signal
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import hetsched
from hetsched.cli.progress import complain, say
from hetsched.errors import HetschedError

INTERRUPTED = 130
BROKEN_PIPE = 141


class Commands(TyperGroup):
    """Ends every command the same way: one line on stderr and the exit status of the error."""

    def main(self, *args: Any, **options: Any) -> Any:
        try:
            status = super().main(*args, **options | {"standalone_mode": False})
        except typer.TyperException as error:
            context = getattr(error, "ctx", None)
            command = context.command_path if context else "hetsched"
            complain(f"{error.format_message().rstrip('.')} (see {command} --help)")
            status = error.exit_code
        sys.exit(status)

    def invoke(self, ctx: Any) -> Any:
        interrupts: list[int] = []

        def interrupted(number: int, _: object) -> None:
            interrupts.append(number)
            raise KeyboardInterrupt

        before = signal.signal(signal.SIGINT, interrupted)
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
        except (HetschedError, KeyboardInterrupt) as error:
            # A compiler may pass an interrupt on as a failure of its own.
            if interrupts or not isinstance(error, HetschedError):
                say("interrupted")
                raise SystemExit(INTERRUPTED) from None
            complain(str(error))
            raise typer.Exit(error.exit_status) from None
        except BrokenPipeError:
            # The reader has gone; what is left in the buffer must not fail again at the exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(BROKEN_PIPE) from None
        finally:
            signal.signal(signal.SIGINT, before)
        return result


app = typer.Typer(
    cls=Commands,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """The console script `hetsched`."""
    try:
        app()
    except SystemExit as end:
        if end.code == INTERRUPTED:
            # At once: what a compiler was at need not be taken down in order.
            os._exit(INTERRUPTED)
        raise


def _version(wanted: bool) -> None:
    if wanted:
        print(f"hetsched {hetsched.__version__}")
        raise typer.Exit


@app.callback()
def hetsched_(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """Partitions ONNX models over the devices of a machine, compiles, runs and verifies them."""
