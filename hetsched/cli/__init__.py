"""The command line: `hetsched VERB`, one Python function of the same name behind each.

Tables and JSON go to stdout; progress, hints and the one line of an error go to stderr. Each verb
has a file; the order here is that of `--help`.
"""

from hetsched.cli.command import app, main
from hetsched.cli.compile import compile_
from hetsched.cli.devices import devices
from hetsched.cli.diff import diff
from hetsched.cli.explain import explain
from hetsched.cli.fpga import fpga
from hetsched.cli.partition import partition
from hetsched.cli.profile import profile
from hetsched.cli.quantize import quantize
from hetsched.cli.run import run
from hetsched.cli.schedule import schedule
from hetsched.cli.simulate import simulate_
from hetsched.cli.tune import tune
from hetsched.cli.verify import verify

__all__ = ["app", "main"]

app.command()(devices)
app.command()(quantize)
app.command()(profile)
app.command()(tune)
app.command()(partition)
app.command(name="simulate")(simulate_)
app.command()(explain)
app.command()(diff)
app.command()(schedule)
app.command(name="compile")(compile_)
app.command()(run)
app.command()(verify)
app.add_typer(fpga, name="fpga")
