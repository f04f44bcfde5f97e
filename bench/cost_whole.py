"""Whole networks on one device, as the sum of measured kernels says and as they run.

What is asked is whether kernels that are measured one behind another add up; `models` is about
networks whose kernels nobody has measured.
"""

import statistics

from bench.cost_plans import HEADS, cells, error, rows
from bench.costing import HALVES, Options, Result

# Larger ones take minutes to compile.
LARGEST = frozenset("unet light_vgg19 vit_b_16 convnext_tiny bert_base_like".split())
MODELS = tuple(name for half in HALVES for name in half if name not in LARGEST)


def measured(options: Options) -> Result:
    """Each network on the device, nothing else running."""
    found = rows(options, "whole", MODELS, options.device, ())
    errors = [error(row) for row in found]
    figures = {
        "models": len(errors),
        "median_error": statistics.median(errors),
        "within_5": statistics.fmean(one <= 0.05 for one in errors),
        "within_10": statistics.fmean(one <= 0.10 for one in errors),
        "worst": max(errors),
    }
    text = (
        f"{len(errors)} networks on {options.device}: the sum of measured kernels is within 10 % "
        f"of the latency for {figures['within_10']:.0%}, within 5 % for {figures['within_5']:.0%}; "
        f"median error {figures['median_error']:.1%}, worst {figures['worst']:.1%}"
    )
    passed = figures["within_10"] == 1.0 and figures["within_5"] >= 0.8
    return Result(text, HEADS, cells(found), figures | {"rows": found}, passed)
