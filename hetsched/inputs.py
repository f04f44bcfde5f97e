"""Input values: made from a seed, or read from `.npz` files keyed by the ONNX names."""

import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from hetsched import oracle
from hetsched.dtype import STRING, numpy_dtype
from hetsched.errors import InputError, ModelError
from hetsched.files import replacing
from hetsched.graph import Graph, to_onnx
from hetsched.op import Tensor

# Integer inputs are mostly indices, of tables of unknown length: the widest range that works.
INDEX_RANGES = (256, 128, 64, 32, 16, 8, 4, 2, 1)


def seeded_inputs(graph: Graph, seed: int = 0) -> dict[str, np.ndarray]:
    """Values for each input: normal floats, and integers from the widest range that works.

    Raises
    ------
    InputError
        ONNX Runtime accepts none of the ranges; the caller has to give inputs.
    """
    indices = [tensor for tensor in graph.inputs if numpy_dtype(tensor.dtype).kind in "iu"]
    if not indices:
        return {tensor.name: seeded(tensor, seed) for tensor in graph.inputs}
    model = to_onnx(graph)
    reason = ""
    for high in INDEX_RANGES:
        values = {tensor.name: seeded(tensor, seed, high) for tensor in graph.inputs}
        try:
            oracle.run(model, values)
        except ModelError as error:
            reason = str(error)
            continue
        return values
    raise InputError(f"no range of integers suits the inputs ({reason}); give them in a .npz file")


def seeded(tensor: Tensor, seed: int, high: int = 2) -> np.ndarray:
    """Seeded values: normal floats, integers in [0, `high`), either truth value, any text."""
    rng = np.random.default_rng(seed)
    if tensor.dtype == STRING:
        letters = rng.integers(ord("a"), ord("z"), tensor.shape)
        return np.asarray(np.vectorize(chr, otypes=[object])(letters))
    kind = numpy_dtype(tensor.dtype)
    if tensor.dtype == "bool":
        return np.asarray(rng.integers(0, 2, tensor.shape)).astype(bool)
    if kind.kind in "iu":
        return np.asarray(rng.integers(0, min(high, np.iinfo(kind).max), tensor.shape)).astype(kind)
    return np.asarray(rng.standard_normal(tensor.shape)).astype(kind)


def read_inputs(path: str | Path) -> dict[str, np.ndarray]:
    """The arrays of a `.npz` file by name.

    Raises
    ------
    InputError
        The file is missing, or no `.npz`, or holds Python objects.
    """
    try:
        found = np.load(path, allow_pickle=False)
        if isinstance(found, np.ndarray):
            raise InputError(f"'{path}' holds one array without a name; write it with np.savez")
        with found:
            return {name: found[name] for name in found.files}
    except OSError as error:
        raise InputError(f"cannot read '{path}': {error.strerror or error}") from None
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"'{path}' is no .npz file: {str(error).splitlines()[0]}") from None


def write_outputs(path: str | Path, outputs: Mapping[str, np.ndarray]) -> None:
    """Writes arrays by name as `.npz`, aside first.

    Raises
    ------
    OutputFileError
        The file cannot be written.
    """
    with replacing(path) as file, zipfile.ZipFile(file, "w") as archive:
        # np.savez takes the names as keywords, and some of ONNX's are keywords of its own.
        for name, array in outputs.items():
            plain = array.astype(str) if array.dtype == object else array
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.asarray(plain), allow_pickle=False)
