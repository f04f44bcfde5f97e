"""Programs of launches: written, read again, and refused when damaged."""

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from programs import SOURCE, affine

from hetsched.errors import PackageError
from hetsched.launches import LAUNCHES, Program


def test_a_program_is_read_as_it_was_written() -> None:
    program = affine()
    again = Program.from_files(program.files(), "opencl")
    assert vars(again) == vars(program)
    assert again.launches[1].groups == (8,)
    first, *others = program.launches
    program = replace(program, launches=(replace(first, case=2), *others))
    again = Program.from_files(program.files(), "opencl")
    assert [launch.case for launch in again.launches] == [2, None]
    with pytest.raises(PackageError, match="has a case, which kernels of cuda have not"):
        replace(program, language="cuda")


def damaged(*path: Any, value: Any) -> Callable[[Any], None]:
    def change(document: Any) -> None:
        for key in path[:-1]:
            document = document[key]
        document[path[-1]] = value

    return change


FIRST = ("launches", 0, "arguments", 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (damaged("version", value=2), "has version 2, not 1"),
        (damaged("language", value="C"), "'C' is no language"),
        (damaged("workspace_nbytes", value=-1), "'workspace' has -1 bytes"),
        (damaged("workspace_nbytes", value=512), "32 bytes from 512 of the 512 of workspace"),
        (damaged("workspace_nbytes", value=True), "workspace_nbytes is True"),
        (damaged("constants_nbytes", value=8), "constants.bin has 516 bytes, not 8"),
        (damaged("weights", "w", value=8), "32 bytes from 0 of the 8 of weight 'w'"),
        (damaged("weights", value={}), "no region 'weight' 'w'"),
        (damaged("inputs", 0, "dtype", value="float7"), "unknown type float7"),
        (damaged("inputs", 0, "dtype", value="string"), "is of strings"),
        (damaged("inputs", 0, "shape", value=[2, -4]), "has the shape [2, -4]"),
        (damaged("inputs", 0, "shape", value=[1 << 50]), "has the shape"),
        (damaged("inputs", value=[]), "no region 'input' 0"),
        (damaged("launches", 0, "kernel", value="thrice"), "no kernel in the source"),
        (damaged("launches", 0, "kernel", value="get_group_id"), "no kernel in the source"),
        (damaged("launches", 0, "kernel", value="sum()"), "no kernel in the source"),
        (damaged("launches", 0, "kernel", value="s" * 300), "no kernel in the source"),
        (damaged("launches", 0, "global", value=[8, 1]), "2 global and 1 local sizes"),
        (damaged("launches", 0, "global", value=[]), "0 global and 1 local sizes"),
        (damaged("launches", 0, "global", value=[0]), "0 work-items in groups of 1"),
        (damaged("launches", 0, "local", value=[3]), "8 work-items in groups of 3"),
        (damaged("launches", 0, "shared_nbytes", value=-1), "-1 shared bytes"),
        (damaged("launches", 0, "case", value=-1), "'twice', is for the case -1"),
        (damaged("launches", 0, "case", value="0"), "case is '0'"),
        (damaged("launches", 0, "arguments", value=3), "arguments is 3"),
        (damaged(*FIRST, "place", value=["input", 0, -4, 32]), "32 bytes from -4"),
        (damaged(*FIRST, "place", value=["input", 0, 4, 32]), "32 bytes from 4"),
        (damaged(*FIRST, "place", value=["input", 0, 0, 0]), "0 bytes from 0"),
        (damaged(*FIRST, "place", value=["input", 0, 0]), "is no place"),
        (damaged(*FIRST, "place", value=["input", "x", 0, 32]), "no region 'input' 'x'"),
        (damaged(*FIRST, "place", value=["heap", 0, 0, 32]), "no region 'heap' 0"),
        (damaged(*FIRST, "written", value=True), "writes to input 0"),
    ],
)
def test_a_damaged_program_is_refused(change: Callable[[Any], None], message: str) -> None:
    program = affine()
    document = json.loads(program.to_json())
    change(document)
    with pytest.raises(PackageError) as caught:
        Program.from_json(json.dumps(document), SOURCE, program.constants)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (LAUNCHES, None, "'launches.json' is missing"),
        (LAUNCHES, b"{", "is no JSON"),
        (LAUNCHES, b"[]", "launches.json is []"),
        ("kernels.cl", b"\xff", "is no text"),
        ("kernels.cl", b"", "was changed"),
        ("constants.bin", None, "constants.bin has 0 bytes, not 516"),
    ],
)
def test_damaged_files_are_refused(name: str, content: bytes | None, message: str) -> None:
    files = affine().files()
    files.pop(name)
    if content is not None:
        files[name] = content
    with pytest.raises(PackageError) as caught:
        Program.from_files(files, "opencl")
    assert message in str(caught.value)
