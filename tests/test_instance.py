"""Instance files: what they say, and what is said of a wrong one."""

import json
from pathlib import Path
from typing import Any

import pytest

from hetsched.errors import InstanceError
from hetsched.instance import parse_instance, read_instance


def instance() -> dict[str, Any]:
    return {
        "devices": ["cpu", "gpu"],
        "links": [{"source": "cpu", "sink": "gpu", "seconds": 1e-5, "bytes_per_second": 8e9}],
        "memory_bytes": {"gpu": 4e9},
        "tasks": [
            {"name": "c", "seconds": {"cpu": 1, "gpu": None}},
            {"name": "a", "seconds": {"cpu": 0.01, "gpu": 0.002}, "memory_bytes": 1000},
            {"name": "b", "seconds": {"gpu": 2}},
        ],
        "edges": [
            {"source": "a", "sink": "b", "nbytes": 4096},
            {"source": "b", "sink": "c", "nbytes": 0},
        ],
    }


def test_an_instance_is_a_task_graph() -> None:
    tasks = parse_instance(json.dumps(instance()))
    assert [task.name for task in tasks.tasks] == ["a", "b", "c"]
    assert tasks.task["c"].seconds == {"cpu": 1.0}
    assert tasks.task["a"].memory_bytes == 1000
    assert tasks.system.device("gpu").memory_bytes == 4e9
    assert tasks.system.device("cpu").memory_bytes == float("inf")
    assert tasks.transfer_seconds(4096, "cpu", "gpu") == 1e-5 + 4096 / 8e9
    assert tasks.transfer_seconds(4096, "gpu", "cpu") == float("inf")


def test_what_may_be_absent() -> None:
    tasks = parse_instance('{"devices": ["x"], "tasks": [{"name": "t", "seconds": {"x": 0}}]}')
    assert tasks.edges == ()
    assert parse_instance('{"devices": ["x"], "tasks": []}').tasks == ()


@pytest.mark.parametrize(
    ("way", "value", "message"),
    [
        (("devices",), [], "no device"),
        (("devices",), ["cpu", "gpu", "cpu"], "'cpu' is there twice"),
        (("devices",), "cpu", "instance.devices is 'cpu'"),
        (("tasks", 0, "name"), "a", "task 'a' is there twice"),
        (("tasks", 0, "seconds", "cpu"), -1, "seconds of 'c' on 'cpu' is -1"),
        (("tasks", 0, "seconds", "cpu"), float("inf"), "must be finite"),
        (("tasks", 0, "seconds", "cpu"), float("nan"), "is nan"),
        (("tasks", 0, "seconds", "cpu"), True, "instance.tasks[0].seconds.cpu is True"),
        (("tasks", 0, "seconds", "tpu"), 1, "seconds on 'tpu', which is no device"),
        (("tasks", 0, "seconds"), {"cpu": None}, "no device can run 'c'"),
        (("tasks", 0, "seconds"), [], "instance.tasks[0].seconds is []"),
        (("tasks", 1, "memory_bytes"), -5, "memory_bytes of 'a' is -5"),
        (("tasks", 1, "name"), None, "instance.tasks[1].name is None"),
        (("edges", 0, "sink"), "z", "edges[0].sink is 'z', which is no task"),
        (("edges", 0, "nbytes"), -1, "edges[0].nbytes is -1"),
        (("edges", 1, "sink"), "a", "in a circle: "),
        (("edges", 1, "sink"), "b", "in a circle: b"),
        (("links", 0, "sink"), "tpu", "a link names 'tpu'"),
        (("links", 0, "bytes_per_second"), 0, "must be finite and positive"),
        (("links", 0, "seconds"), "1", "links[0].seconds is '1'"),
        (("memory_bytes",), {"tpu": 1}, "memory_bytes names 'tpu'"),
        (("memory_bytes", "gpu"), -1, "memory_bytes.gpu is -1"),
    ],
)
def test_a_wrong_instance_is_refused(
    way: tuple[str | int, ...], value: object, message: str
) -> None:
    content: Any = instance()
    place = content
    for key in way[:-1]:
        place = place[key]
    place[way[-1]] = value
    with pytest.raises(InstanceError) as found:
        parse_instance(json.dumps(content))
    assert message in str(found.value)


@pytest.mark.parametrize("key", ["devices", "tasks"])
def test_what_an_instance_needs(key: str) -> None:
    content = instance()
    del content[key]
    with pytest.raises(InstanceError, match=f"instance lacks '{key}'"):
        parse_instance(json.dumps(content))


def test_two_links_of_one_pair_are_refused() -> None:
    content = instance()
    content["links"] *= 2
    with pytest.raises(InstanceError, match="from 'cpu' to 'gpu' is there twice"):
        parse_instance(json.dumps(content))


@pytest.mark.parametrize(
    ("data", "message"),
    [(b"{", "is no JSON"), (b"\xff\xfe", "is not text"), (b"[]", "is []"), (None, "No such file")],
)
def test_the_file_is_named(data: bytes | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "instance.json"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(InstanceError) as found:
        read_instance(path)
    assert str(path) in str(found.value)
    assert message in str(found.value)
