"""Builds OpenCL programs, as a process of its own: a script that `builds.py` starts.

A request on standard input is a line of JSON, {"platform", "number", "options", "nbytes"}, and the
source behind it. An answer on standard output is a line too, {"status", "nbytes"}, and behind it
the binary, or what the compiler says where OpenCL's status is not 0. The arguments are the cores
that compilers may use. It ends with its input, or when nobody has asked for a while.
"""

import json
import os
import sys
import warnings
from functools import cache
from select import select
from typing import Any

IDLE_SECONDS = 10.0


def main() -> None:
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, set(map(int, sys.argv[1:])))
    # What a compiler, or who it starts, prints or reads is none of the conversation.
    given, made = os.fdopen(os.dup(0), "rb", 0), os.fdopen(os.dup(1), "wb")
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)
    while select([given], [], [], IDLE_SECONDS)[0] and (line := given.readline()):
        request = json.loads(line)
        source = b""
        while len(source) < request["nbytes"]:
            more = given.read(request["nbytes"] - len(source))
            if not more:
                os._exit(1)
            source += more
        status, answer = built(
            request["platform"], request["number"], request["options"], source.decode()
        )
        about = {"status": status, "nbytes": len(answer)}
        made.write(json.dumps(about).encode() + b"\n" + answer)
        made.flush()
    # Without the drivers' own ends, which may crash.
    os._exit(0)


def built(platform: str, number: int, options: str, source: str) -> tuple[int, bytes]:
    # Late, so that what they say comes to the place that it should.
    import pyopencl as cl

    warnings.simplefilter("ignore", cl.CompilerWarning)
    try:
        program = cl.Program(opened(platform, number), source)
        program.build(options)
        (binary,) = program.get_info(cl.program_info.BINARIES)
    except cl.Error as error:
        return error.code, str(error).encode()
    return 0, binary or b""


@cache
def opened(platform: str, number: int) -> Any:
    """The context of a device; with each new one PoCL reads its library anew."""
    import pyopencl as cl

    there = next(one for one in cl.get_platforms() if one.name == platform)
    return cl.Context([there.get_devices()[number]])


if __name__ == "__main__":
    main()
