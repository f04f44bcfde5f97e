"""Settings for all tests: examples are drawn from a fixed seed, so that a run repeats."""

from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

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
