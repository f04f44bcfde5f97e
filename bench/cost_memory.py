"""Memory, predicted before anything is compiled against what a run takes: see `bench.footprint`."""

import json

from bench import footprint, models
from bench.costing import Options, Result
from bench.record import record
from hetsched.files import write_text


def measured(options: Options) -> Result:
    """Plans on one and on two devices; all that differ of the partitioners of `footprint`.

    What an earlier run at the same commit measured of a model is kept in the folder.
    """
    names = options.names or tuple(footprint.MODELS)
    chosen = models.chosen(options.models, names, float("inf"))
    options.folder.mkdir(parents=True, exist_ok=True)
    commit = record(options.seed)["commit"]
    found: list[footprint.Row] = []
    for model in chosen:
        path = options.folder / f"memory-{model.name}-{commit}.json"
        if not path.exists():
            rows = footprint.rows([model], seed=options.seed)
            write_text(path, json.dumps(rows, indent=1))
        found += json.loads(path.read_text(encoding="utf-8"))
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
