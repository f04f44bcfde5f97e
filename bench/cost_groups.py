"""Kernel groups of networks that the model has not seen: predicted beside measured.

Networks are in two halves. From the kernels of one at most so many samples are chosen; kernels of
the other are predicted that are not in the first. Then the other way. Two things are beside it that
tell what is missing: the same kernels measured again, and what would be predicted of a sixth of the
networks if all kernels of the others were known.
"""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bench.collection import Collection, Network, collected
from bench.costing import Options, Result
from hetsched.learning.choice import next_to_measure
from hetsched.learning.regression import Regression
from hetsched.learning.work import Work
from hetsched.profiling import Key
from hetsched.system import System

COUNTS = (500, 200, 50)
# The goals with 500 samples, and the mean error with 50.
MEAN, WITHIN, FEW_MEAN = 0.05, 0.95, 0.10
NEAR = 0.10
# Of the networks, the share that is left out where all others are known.
PARTS = 6
# What takes less is lost in the time that asking a clock takes.
TOLD_SECONDS = 0.1e-6
# What takes at least so long is a kernel rather than a call of one.
LONG_SECONDS = 20e-6
MEASURES = ("mean", "near", "told_mean", "told_near", "long_mean", "long_near")
ANCHORS = (
    "PerfSAGE, end to end, seen families: below 5 %; CDMPP, unseen networks: 14 %; others, unseen "
    "families: 13 to 52 %"
)


@dataclass(frozen=True)
class Split:
    """Kernels to learn from, those that are chosen of them, in order, and kernels to predict."""

    name: str
    pool: Sequence[Key]
    known: Sequence[Key]
    asked: Sequence[Key]
    works: Mapping[Key, Work]
    networks: Sequence[Network]


def measured(options: Options) -> Result:
    found = collected(options)
    clock = System.local(options.device).devices[0].clock_hz
    rows = [
        row for split in splits(found, clock, max(COUNTS)) for row in _rows(split, found, clock)
    ]
    both = [_together(rows, kind, count) for kind in ("chosen", "drawn") for count in COUNTS]
    rows += both
    repeated = [
        _errors("measured again", found.passes[1], found.passes[0], split.asked)
        | {"split": split.name, "samples": None}
        for split in splits(found, clock, 0)
    ]
    others = _of_all_others(found, clock)
    goal = next(row for row in rows if row["split"] == "both" and row["samples"] == COUNTS[0])
    few = next(row for row in rows if row["split"] == "both" and row["samples"] == COUNTS[-1])
    kernels = len({key for network in found.networks for key in network.keys})
    again = {key: statistics.fmean(row[key] for row in repeated) for key in MEASURES}
    text = (
        f"{len(found.networks)} networks, {kernels} kernels "
        f"on {options.device}; to compile and measure all took {found.profiling_seconds:.0f} s. "
        f"Kernels of unseen networks, {COUNTS[0]} samples: mean error {goal['mean']:.1%} (goal "
        f"{MEAN:.0%}), within 10 % {goal['near']:.1%} (goal {WITHIN:.0%}); {COUNTS[-1]} samples: "
        f"{few['mean']:.1%} (goal {FEW_MEAN:.0%}). The same kernels measured again differ by "
        f"{again['mean']:.1%}, within 10 % {again['near']:.1%}. Without the "
        f"{goal['kernels'] - goal['told_kernels']} kernels of less than 0.1 us: mean error "
        f"{goal['told_mean']:.1%}, within 10 % {goal['told_near']:.1%}; measured again "
        f"{again['told_mean']:.1%} and {again['told_near']:.1%}. Of 20 us and more: mean error "
        f"{goal['long_mean']:.1%}, within 10 % {goal['long_near']:.1%}; measured again "
        f"{again['long_mean']:.1%} and {again['long_near']:.1%}; with all other networks known "
        f"{others['long_mean']:.1%} and {others['long_near']:.1%}. Elsewhere: {ANCHORS}."
    )
    heads = ["samples from", "how", "count", "kernels", "mean error", "median", "within 10 %",
             "mean, 20 us and more", "within 10 %", "by time"]  # fmt: skip
    families = _families(found, clock)
    return Result(
        text,
        heads,
        [_cells(row) for row in (*rows, others, *repeated)],
        {"rows": rows, "others": others, "repeated": repeated, "families": families},
        goal["mean"] <= MEAN and goal["near"] >= WITHIN and few["mean"] <= FEW_MEAN,
    )


def splits(found: Collection, clock_hz: float, count: int) -> Iterator[Split]:
    """Both directions; the first `count` kernels to learn from are the ones to choose."""
    for which in (0, 1):
        from_, to = found.half(which), found.half(1 - which)
        works = {key: work for network in found.networks for key, work in network.works.items()}
        pool = list(dict.fromkeys(key for network in from_ for key in network.keys))
        asked = list(dict.fromkeys(key for network in to for key in network.keys))
        order = next_to_measure([works[key] for key in pool], Regression(clock_hz), count)
        known = [pool[index] for index in order]
        seen = {key[-1] for key in pool}
        unseen = [key for key in asked if key[-1] not in seen]
        yield Split(f"half {which + 1}", pool, known, unseen, works, to)


def model(split: Split, found: Collection, clock_hz: float, keys: Sequence[Key]) -> Regression:
    """Fitted to the first measurement of these kernels."""
    return Regression(clock_hz).fitted(
        [split.works[key] for key in keys], [found.passes[0][key] for key in keys]
    )


def truth(found: Collection, keys: Sequence[Key]) -> dict[Key, float]:
    """The mean of both measurements."""
    first, second = found.passes
    return {key: (first[key] + second[key]) / 2 for key in keys}


def _rows(split: Split, found: Collection, clock_hz: float) -> Iterator[dict[str, Any]]:
    wanted = truth(found, split.asked)
    for kind in ("chosen", "drawn"):
        for count in COUNTS:
            keys = list(split.known[:count])
            if kind == "drawn":
                order = np.random.default_rng(0).permutation(len(split.pool))[:count]
                keys = [split.pool[index] for index in order]
            estimates = model(split, found, clock_hz, keys).estimates(
                [split.works[key] for key in split.asked]
            )
            predicted = {
                key: estimate.seconds for key, estimate in zip(split.asked, estimates, strict=True)
            }
            surprises = [
                abs(np.log(wanted[key] / estimate.seconds)) / estimate.deviation
                for key, estimate in zip(split.asked, estimates, strict=True)
            ]
            yield _errors(kind, predicted, wanted, split.asked) | {
                "split": split.name,
                "samples": count,
                "used": len(keys),
                "in_two_deviations": float(np.mean(np.array(surprises) < 2)),
            }


def _of_all_others(found: Collection, clock_hz: float) -> dict[str, Any]:
    """The errors of each part of the networks, with all kernels of the others as samples.

    Parts are of networks far apart in the list, so that most have relatives among the others.
    """
    predicted: dict[Key, float] = {}
    for part in range(PARTS):
        asked = found.networks[part::PARTS]
        works = {key: work for network in asked for key, work in network.works.items()}
        known: dict[Key, Work] = {}
        for network in found.networks:
            if network not in asked:
                known |= network.works
        seen = {key[-1] for key in known}
        unseen = [key for key in works if key[-1] not in seen]
        model = Regression(clock_hz).fitted(
            list(known.values()), [found.passes[0][key] for key in known]
        )
        estimates = model.estimates([works[key] for key in unseen])
        predicted |= {key: one.seconds for key, one in zip(unseen, estimates, strict=True)}
    keys = list(predicted)
    return _errors("all others", predicted, truth(found, keys), keys) | {
        "split": "sixths",
        "samples": None,
    }


def _errors(
    kind: str, predicted: Mapping[Key, float], wanted: Mapping[Key, float], keys: Sequence[Key]
) -> dict[str, Any]:
    times = np.array([wanted[key] for key in keys])
    errors = np.abs(np.array([predicted[key] for key in keys]) / times - 1)
    told, long = times >= TOLD_SECONDS, times >= LONG_SECONDS
    return {
        "kind": kind,
        "kernels": len(keys),
        "mean": float(errors.mean()),
        "median": float(np.median(errors)),
        "near": float(np.mean(errors <= NEAR)),
        "told_kernels": int(told.sum()),
        "told_mean": float(errors[told].mean()),
        "told_near": float(np.mean(errors[told] <= NEAR)),
        "long_kernels": int(long.sum()),
        "long_mean": float(errors[long].mean()),
        "long_near": float(np.mean(errors[long] <= NEAR)),
        "by_time": float((errors * times).sum() / times.sum()),
    }


def _together(rows: Sequence[Mapping[str, Any]], kind: str, count: int) -> dict[str, Any]:
    """Both directions as one, each kernel counting once."""
    chosen = [row for row in rows if row["kind"] == kind and row["samples"] == count]
    found: dict[str, Any] = {"split": "both", "kind": kind, "samples": count}
    for key in ("kernels", "told_kernels", "long_kernels"):
        found[key] = sum(row[key] for row in chosen)
    for key, weight in [
        *((key, "kernels") for key in ("mean", "median", "near", "by_time", "in_two_deviations")),
        *((key, "told_kernels") for key in ("told_mean", "told_near")),
        *((key, "long_kernels") for key in ("long_mean", "long_near")),
    ]:
        found[key] = sum(row[key] * row[weight] for row in chosen) / found[weight]
    return found


def _families(found: Collection, clock_hz: float) -> dict[str, dict[str, float]]:
    """The mean error of each family, with all samples that may be chosen."""
    errors: dict[str, list[float]] = {}
    for split in splits(found, clock_hz, COUNTS[0]):
        wanted = truth(found, split.asked)
        estimates = model(split, found, clock_hz, split.known).estimates(
            [split.works[key] for key in split.asked]
        )
        for key, estimate in zip(split.asked, estimates, strict=True):
            family = split.works[key].family
            errors.setdefault(family, []).append(abs(estimate.seconds / wanted[key] - 1))
    return {
        family: {"kernels": len(values), "mean": statistics.fmean(values)}
        for family, values in sorted(errors.items(), key=lambda item: -len(item[1]))
    }


def _cells(row: Mapping[str, Any]) -> list[str]:
    shares = [row[key] for key in ("mean", "median", "near", "long_mean", "long_near", "by_time")]
    count = "" if row["samples"] is None else str(row["samples"])
    return [row["split"], row["kind"], count, str(row["kernels"]), *(f"{s:.1%}" for s in shares)]
