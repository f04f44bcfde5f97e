"""Settings for all tests: examples are drawn from a fixed seed, so that a run repeats."""

from collections.abc import Iterator
from dataclasses import replace
from time import perf_counter

import pytest
from hypothesis import HealthCheck, settings

from hetsched.device import Device
from hetsched.disturbance import Reading
from hetsched.plugin import load
from hetsched.target import Target

# Of a core that schedules are tested for: its own, and one with fewer and narrower registers.
ISAS = ("", "x86_64 avx2 fma f16c")

settings.register_profile(
    "repeatable",
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("repeatable")


@pytest.fixture(scope="session", autouse=True)
def own_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Times measured by tests, beside whatever else runs, stay out of the user's profile store.

    And every test compiles what it tests.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HETSCHED_STORE", str(tmp_path_factory.mktemp("store") / "profile.sqlite"))
        patch.setenv("HETSCHED_CACHE", "off")
        yield


@pytest.fixture(scope="session", autouse=True)
def nothing_disturbs() -> Iterator[None]:
    """What is measured counts, beside whatever else runs: not each test is about that."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hetsched.disturbance.reading", lambda device: Reading(perf_counter()))
        yield


@pytest.fixture(scope="module")
def target() -> Target:
    found = load(Target, "cpu")
    why = found.unavailable()
    if why is not None:
        pytest.skip(why)
    return found


@pytest.fixture(params=ISAS, scope="module")
def device(target: Target, request: pytest.FixtureRequest) -> Device:
    here = target.device("cpu:0")
    isa = request.param or here.isa
    if not set(isa.split()) <= set(here.isa.split()):
        pytest.skip(f"this processor has no {isa}")
    return replace(here, isa=isa)
