"""Predictions beside what was measured, run by run, and whether a device has changed since."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from hetsched.device import Device
from hetsched.errors import OutputFileError
from hetsched.plan import Plan, simulate
from hetsched.schedule import Schedule
from hetsched.store import Residual, Store

# Fewer earlier runs tell no band; older ones than the last so many do not count.
LEAST_EARLIER, MOST_EARLIER = 5, 50
# The band is so many deviations wide to each side, and at least such a share.
DEVIATIONS = 4.0
LEAST_SHARE = 0.1
# Of a normal distribution: its standard deviation by its median absolute one.
NORMAL = 1.4826


@dataclass(frozen=True)
class History:
    """What was predicted and measured before, the oldest first: of runs, or of a device's parts.

    `device` is empty for runs. `drift` says how far the last one is from those before it, in words.
    """

    device: str
    residuals: tuple[Residual, ...]

    @property
    def ratio(self) -> float:
        """The median of measured over predicted time."""
        return statistics.median(_ratios(self.residuals))

    @property
    def drift(self) -> str:
        *earlier, last = _ratios(self.residuals)
        return drift(earlier[-MOST_EARLIER:], last) if self.device else ""


def histories(digest: str, devices: Sequence[Device], store: Store) -> tuple[History, ...]:
    """Of the model of `digest` on `devices`, and of all that these have run, as far as known."""
    names = [device.name for device in devices]
    subjects = {_run(digest, names): ""} | {
        _parts(device): device.name for device in devices if not device.modelled
    }
    found = (
        History(
            name, tuple(r for r in store.residuals(subject) if min(r.predicted, r.measured) > 0)
        )
        for subject, name in subjects.items()
    )
    return tuple(history for history in found if history.residuals)


def _run(digest: str, names: Sequence[str]) -> str:
    return f"run of {digest[:12]} by {', '.join(names)}"


def _parts(device: Device) -> str:
    return f"parts on {device.fingerprint} {device.name}"


def _ratios(residuals: Sequence[Residual]) -> list[float]:
    return [one.measured / one.predicted for one in residuals if one.predicted > 0]


def calibrate(plan: Plan, measured: Sequence[Schedule], store: Store) -> tuple[str, ...]:
    """Keeps what was predicted and measured of a plan's runs; a line for each device that drifts.

    A device drifts if what its parts take, by what was predicted, leaves the band of the runs
    before. Devices without a clock of their own are left out. A store that cannot be written to is
    no reason to fail: then nothing is kept, and nothing is told.
    """
    predicted = simulate(plan)
    # By subject, and the device that is told of.
    seconds = {
        _run(plan.original.digest, plan.devices): (
            "",
            predicted.makespan,
            statistics.median(run.makespan for run in measured),
        )
    }
    for name in plan.devices:
        device = plan.system.device(name)
        if not device.modelled:
            seconds[_parts(device)] = (
                name,
                predicted.busy_seconds(name),
                statistics.median(run.busy_seconds(name) for run in measured),
            )
    told = []
    try:
        for subject, (device_name, before, now) in seconds.items():
            if not before > 0:
                continue
            earlier = _ratios(store.residuals(subject))
            store.add_residual(Residual(subject, before, now, len(measured)))
            found = drift(earlier[-MOST_EARLIER:], now / before)
            if device_name and found:
                told.append(f"'{device_name}' drifts: its parts take {found}; measure it again")
    except OutputFileError:
        return ()
    return tuple(told)


def drift(earlier: Sequence[float], ratio: float) -> str:
    """How far a ratio of measured to predicted time is from those of `earlier` runs, in words.

    Empty where it is within their band, or they are too few to have one.

    Examples
    --------
    >>> drift([1.0, 1.02, 0.98, 1.0, 1.01], 1.05)
    ''
    >>> drift([1.0, 1.02, 0.98, 1.0, 1.01], 1.5)
    '1.50 x the prediction, in earlier runs 0.90 to 1.10'
    """
    if len(earlier) < LEAST_EARLIER:
        return ""
    middle = statistics.median(earlier)
    deviation = NORMAL * statistics.median(abs(one - middle) for one in earlier)
    reach = max(DEVIATIONS * deviation, LEAST_SHARE * middle)
    if abs(ratio - middle) <= reach:
        return ""
    band = f"{max(0.0, middle - reach):.2f} to {middle + reach:.2f}"
    return f"{ratio:.2f} x the prediction, in earlier runs {band}"
