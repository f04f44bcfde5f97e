"""Memory, predicted before anything is compiled against what a run takes: see `bench.footprint`."""

from bench import footprint, models
from bench.costing import Options, Result


def measured(options: Options) -> Result:
    """Plans on one and on two devices; all that differ of the partitioners of `footprint`."""
    names = options.names or tuple(footprint.MODELS)
    chosen = models.chosen(options.models, names, float("inf"))
    found = footprint.rows(chosen, seed=options.seed)
    heads, cells = footprint.cells(found)
    figures = footprint.summary(found)
    text = (
        f"{figures['plans']} plans of {figures['models']} models: {figures['within']:.0%} within "
        f"{footprint.GOAL:.0%} of what is measured, median {figures['median_error']:.2%}, largest "
        f"{figures['largest_error']:.1%}; {figures['whole_within']:.0%} if all counts that Python, "
        "TVM's calls and the linker keep on the heap beside the plan"
    )
    passed = figures["within"] == 1.0
    return Result(text, heads, cells, {**figures, "rows": found}, passed)
