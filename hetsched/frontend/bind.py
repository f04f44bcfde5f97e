"""Static shapes for the inputs."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import onnx

from hetsched.dtype import dtype_name
from hetsched.errors import ModelError
from hetsched.frontend.model import Model, typed
from hetsched.op import Tensor

Dim = int | str | None
"""A size, a symbol that stands for the same size everywhere, or nothing known."""

# Exporters write these for "unknown", not for one size that several dimensions share.
NO_SYMBOLS = frozenset(("", "?", "-1", "None", "none"))


def bind(model: Model, shapes: Mapping[str, Sequence[int]]) -> Model:
    """The model with inputs of static shape, those of `shapes` where it leaves them open.

    Raises
    ------
    ModelError
        `shapes` contradicts the model, or leaves a dimension open.
    """
    declared = {value.name: _dims(value) for value in model.inputs}
    _refuse_strangers(shapes, declared)
    sizes: dict[str, int] = {}
    for name, shape in shapes.items():
        _fit(name, declared[name], tuple(shape), sizes)
    bound = {
        name: tuple(shapes[name])
        if name in shapes
        else dims and tuple(sizes.get(dim, dim) if isinstance(dim, str) else dim for dim in dims)
        for name, dims in declared.items()
    }
    if any(not _is_static(shape) for shape in bound.values()):
        raise ModelError(_open(bound))
    tensors = {}
    for value in model.inputs:
        shape = tuple(int(dim or 0) for dim in bound[value.name] or ())
        code = value.type.tensor_type.elem_type
        if not code:
            raise ModelError(f"the input '{value.name}' has no element type")
        tensors[value.name] = Tensor(value.name, shape, dtype_name(code))
    return replace(model, inputs=tuple(map(typed, tensors.values())), tensors=tensors)


def _dims(value: onnx.ValueInfoProto) -> tuple[Dim, ...] | None:
    kind = value.type.tensor_type
    if not kind.HasField("shape"):
        return None
    return tuple(_dim(dim) for dim in kind.shape.dim)


def _dim(dim: onnx.TensorShapeProto.Dimension) -> Dim:
    if dim.HasField("dim_value"):
        return int(dim.dim_value) if dim.dim_value > 0 else None
    return None if dim.dim_param in NO_SYMBOLS else str(dim.dim_param)


def _is_static(dims: tuple[Dim, ...] | None) -> bool:
    return dims is not None and all(isinstance(dim, int) for dim in dims)


def _refuse_strangers(
    shapes: Mapping[str, Sequence[int]], declared: Mapping[str, tuple[Dim, ...] | None]
) -> None:
    for name in shapes:
        if name not in declared:
            there = ", ".join(f"'{other}'" for other in declared) or "none"
            raise ModelError(f"no input is named '{name}'; there are {there}")


def _fit(
    name: str, dims: tuple[Dim, ...] | None, shape: tuple[int, ...], sizes: dict[str, int]
) -> None:
    """Checks the shape of one input, and notes in `sizes` what its symbols stand for."""
    for size in shape:
        if isinstance(size, bool) or not hasattr(size, "__index__") or size < 0:
            raise ModelError(f"the shape of '{name}' needs sizes of 0 or more, not {size!r}")
    if dims is None:
        return
    if len(dims) != len(shape):
        raise ModelError(
            f"the input '{name}' is {_text(dims)}, of rank {len(dims)}, "
            f"but {_text(shape)} has rank {len(shape)}"
        )
    for dim, size in zip(dims, shape, strict=True):
        if isinstance(dim, int) and dim != size:
            raise ModelError(f"the input '{name}' is {_text(dims)}, which {_text(shape)} is not")
        if isinstance(dim, str) and sizes.setdefault(dim, size) != size:
            raise ModelError(
                f"the dimension '{dim}' is {sizes[dim]} in one place, "
                f"but {size} in {_text(shape)} of '{name}'"
            )


def _open(bound: Mapping[str, tuple[Dim, ...] | None]) -> str:
    left = {name: dims for name, dims in bound.items() if not _is_static(dims)}
    sizes = _examples(left.values())
    flags = " ".join(f"--shape {name}={_example(dims, sizes)}" for name, dims in left.items())
    what = ", ".join(f"'{name}' {_text(dims)}" for name, dims in left.items())
    noun = "input is" if len(left) == 1 else "inputs are"
    return f"the {noun} not of static shape: {what}; give it, such as {flags}"


def _examples(inputs: Iterable[tuple[Dim, ...] | None]) -> dict[str, int]:
    """A size for each symbol: one where it counts items, the usual one of an image elsewhere."""
    sizes: dict[str, int] = {}
    for dims in inputs:
        for index, dim in enumerate(dims or ()):
            if isinstance(dim, str):
                usual = _usual(index, len(dims or ()))
                sizes[dim] = min(sizes.get(dim, usual), usual)
    return sizes


def _usual(index: int, rank: int) -> int:
    return 1 if index == 0 else 224 if rank == 4 else 128


def _example(dims: tuple[Dim, ...] | None, sizes: Mapping[str, int]) -> str:
    if dims is None:
        return "1,3,224,224"
    return ",".join(
        str(sizes[dim] if isinstance(dim, str) else _usual(i, len(dims)) if dim is None else dim)
        for i, dim in enumerate(dims)
    )


def _text(dims: Sequence[Dim] | None) -> str:
    if dims is None:
        return "of unknown rank"
    return f"[{', '.join('?' if dim is None else str(dim) for dim in dims)}]"
