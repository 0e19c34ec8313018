"""Options of `PatchCore` that come in groups, and what became of arguments it had before.

A group is given as its dataclass, as a dict of plain values, or by command as ``--model.store.kind disk``; it is saved
as a dict. Every group checks itself. `patchcore.py` and `cli.py` read them.
"""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, ParamSpec, TypeVar, get_args

from pl_patchcore.errors import UserError
from pl_patchcore.preprocessing import IMAGENET_MEAN, IMAGENET_STD

StoreKind = Literal["auto", "ram", "disk"]
StoreDtype = Literal["float32", "float16", "bfloat16"]


@dataclass(frozen=True)
class PatchOptions:
    """How a layer becomes patch features.

    Args:
        stride: Step between patches, in cells of the layer's grid.
        layer_dim: Null: features are averaged over the neighbourhood and layers concatenated. A number: adaptive
            pooling of each layer to so many numbers, as in the authors' code; goes with ``feature_dim``.
        feature_dim: Adaptive pooling of all layers together to so many numbers.
    """

    group: ClassVar[str] = "patches"
    stride: int = 1
    layer_dim: int | None = None
    feature_dim: int | None = None

    def __post_init__(self) -> None:
        for name, value in (("stride", self.stride), ("layer_dim", self.layer_dim), ("feature_dim", self.feature_dim)):
            if value is not None and value < 1:
                raise UserError(f"patches.{name} must be at least 1, got {value}.")
        if (self.layer_dim is None) != (self.feature_dim is None):
            raise UserError(
                f"patches.layer_dim and patches.feature_dim go together, got {self.layer_dim} and {self.feature_dim}; "
                "set both or none."
            )


@dataclass(frozen=True)
class ImageOptions:
    """How an image's pixels are resized and normalised.

    Args:
        interpolation: Filter of the resize, ``bilinear`` or ``bicubic``, antialiased.
        mean: Mean of the normalisation, RGB in [0, 1].
        std: Standard deviation of the normalisation, RGB in [0, 1].
    """

    group: ClassVar[str] = "images"
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    def __post_init__(self) -> None:
        _one_of("images.interpolation", self.interpolation, ("bilinear", "bicubic"))
        for name in ("mean", "std"):
            values = tuple(float(value) for value in getattr(self, name))
            if len(values) != 3 or (name == "std" and min(values) <= 0):
                raise UserError(
                    f"images.{name} must be three {'positive ' * (name == 'std')}numbers, got {list(values)}."
                )
            object.__setattr__(self, name, values)  # equal, whether lists or tuples were given


@dataclass(frozen=True)
class StoreOptions:
    """Where the patch features of the training images are kept until the memory bank is selected.

    Args:
        kind: ``ram``, ``disk`` (a temporary file), or ``auto``: the disk where the fit would take more than half of the
            main memory available. The memory bank is the same.
        folder: Folder of the file; null: the system's folder for temporary files.
        dtype: ``float32``, or ``float16`` or ``bfloat16`` to halve the space: the memory bank's features are rounded
            so (the same ones are selected).
        selection_memory: GiB that greedy selection may take. Where that is too little to hold all projected features,
            it selects within chunks, then among the selected ones: at most 4 times as far from the patch features as
            the best coreset, where exact selection is at most 2 times as far. Null: select exactly.

    Raises:
        UserError: For a value that is out of range.
    """

    group: ClassVar[str] = "store"
    kind: StoreKind = "auto"
    folder: str | None = None
    dtype: StoreDtype = "float32"
    selection_memory: float | None = None

    def __post_init__(self) -> None:
        _one_of("store.kind", self.kind, get_args(StoreKind))
        _one_of("store.dtype", self.dtype, get_args(StoreDtype))
        memory = self.selection_memory
        if memory is not None and not (isinstance(memory, int | float) and memory > 0):
            raise UserError(f"store.selection_memory must be GiB above 0, got {memory!r}; leave it out for no limit.")
        if self.folder is not None and not isinstance(self.folder, str):
            raise UserError(f"store.folder must be the path of a folder, as text, got {self.folder!r}.")

    def check_method(self, coreset_method: str) -> None:
        """Refuse a limit of memory for a coreset method that knows none.

        Raises:
            UserError: If there is one.
        """
        if self.selection_memory is not None and coreset_method != "greedy":
            raise UserError(
                f"store.selection_memory goes with coreset_method greedy, got {coreset_method}; leave one of them out."
            )


@dataclass(frozen=True)
class EnsembleOptions:
    """Several models on the same images, each with a memory bank of its own.

    Args:
        members: Null: one model. A list with the settings of each member that differ from the shared ones, such as
            ``{backbone: densenet201, layers: [features.denseblock2, features.denseblock3]}``.
        combine: How the members' scores become one: ``nominal``, in units of what is usual among nominal patches;
            ``test_range``, as in the authors' code, scaled to [0, 1] over the whole test set.
    """

    group: ClassVar[str] = "ensemble"
    members: list[dict[str, Any]] | None = None
    combine: Literal["nominal", "test_range"] = "nominal"

    def __post_init__(self) -> None:
        _one_of("ensemble.combine", self.combine, ("nominal", "test_range"))
        if self.members is None:
            return
        if not isinstance(self.members, Sequence) or not all(isinstance(member, Mapping) for member in self.members):
            raise UserError(f"ensemble.members must be a list of dicts of settings, got {self.members!r}.")
        if not self.members:
            raise UserError("ensemble.members names no model; give the settings of at least one.")
        for member in self.members:
            refuse_unknown(member, MEMBER_ARGUMENTS, "a member of an ensemble")
            for kind in (group for group in GROUPS.values() if group.group in member):
                options_of(kind, member[kind.group])
        object.__setattr__(self, "members", [dict(member) for member in self.members])


P = ParamSpec("P")
Options = TypeVar("Options", PatchOptions, ImageOptions, StoreOptions, EnsembleOptions)
GROUPS: dict[str, type[PatchOptions | ImageOptions | StoreOptions | EnsembleOptions]] = {
    kind.group: kind for kind in (PatchOptions, ImageOptions, StoreOptions, EnsembleOptions)
}
MEMBER_ARGUMENTS = (  # of an ensemble; the members share all else
    "backbone", "layers", "weights", "patch_size", "patches", "coreset_method", "coreset_ratio", "coreset_size",
    "projection_dim", "num_neighbors", "distance", "reweighting_neighbors", "sigma", "search", "bank_dtype",
)  # fmt: skip
MOVED = {
    "patch_stride": "patches.stride",
    "layer_dim": "patches.layer_dim",
    "feature_dim": "patches.feature_dim",
    "interpolation": "images.interpolation",
    "mean": "images.mean",
    "std": "images.std",
    "store": "store.kind",
    "store_dir": "store.folder",
    "store_dtype": "store.dtype",
    "selection_memory": "store.selection_memory",
    "members": "ensemble.members",
    "combine": "ensemble.combine",
}
REMOVED = {
    "shard_bank": "every process holds the whole memory bank",
    "coreset_seconds": "a smaller coreset_ratio or coreset_size takes less time",
    "compile_backbone": "the backbone runs as it is",
}


def options_of(kind: type[Options], value: Options | Mapping[str, Any]) -> Options:
    """A group of options, from its dataclass or a dict.

    Raises:
        UserError: If it is neither, or names an option that the group does not have.

    Example:
        >>> options_of(StoreOptions, {"kind": "disk"}).kind
        'disk'
    """
    if isinstance(value, kind):
        return value
    names = [field.name for field in fields(kind)]
    if not isinstance(value, Mapping):
        where = MOVED.get(kind.group, f"{kind.group}.{names[0]}")
        raise UserError(
            f"{kind.group} must be {kind.__name__} or a dict of {', '.join(names)}, got {value!r}; "
            f"{kind.group}={{{where.rpartition('.')[2]!r}: ...}} sets {where}."
        )
    refuse_unknown(value, names, kind.group)
    return kind(**value)


def refuse_unknown(names: Iterable[str], known: Collection[str], where: str = "PatchCore", prefix: str = "") -> None:
    """Refuse arguments that do not exist.

    Args:
        names: Names given.
        known: Names there are.
        where: What they are arguments of, for the message.
        prefix: What stands before each name where the user writes it, such as ``model.``.

    Raises:
        UserError: Naming the first one and its new place, or the nearest one there is.

    Example:
        >>> refuse_unknown(["store_dir"], ["store"])
        Traceback (most recent call last):
        pl_patchcore.errors.UserError: store_dir is now store.folder.
    """
    for name in names:
        if name in known:
            continue
        if (place := moved(name, prefix)) and MOVED.get(name, "").partition(".")[0] in ("", *known):
            raise UserError(place)
        raise UserError(f"{where} has no argument {prefix + name!r}; did you mean {prefix + nearest(name, known)!r}?")


def moved(name: str, prefix: str = "") -> str | None:
    """What became of an argument that `PatchCore` had before, as a sentence; None if it had none of that name."""
    if name in MOVED:
        return f"{prefix}{name} is now {prefix}{MOVED[name]}."
    return f"{prefix}{name} is gone: {REMOVED[name]}." if name in REMOVED else None


def plain_settings(saved: Mapping[str, Any], known: Collection[str], path: str) -> dict[str, Any]:
    """Check a checkpoint's hyper-parameters: data, which must name arguments and hold plain values.

    Raises:
        UserError: Naming the first one that does not.
    """
    for name, value in saved.items():
        if name not in known:
            raise UserError(f"{path}: PatchCore has no argument {name!r}, as the file does; fit again.")
        if not _is_plain(value) or (isinstance(value, dict) and name in MEMBER_ARGUMENTS and name not in GROUPS):
            raise UserError(f"{path}: {name!r} is no plain value; fit again.")
    return dict(saved)


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(name, str) and _is_plain(inner) for name, inner in value.items())
    if isinstance(value, list | tuple):
        return all(_is_plain(inner) for inner in value)
    return value is None or type(value) in (bool, int, float, str)


def _one_of(name: str, value: Any, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise UserError(f"{name} must be {', '.join(allowed[:-1])} or {allowed[-1]}, got {value!r}.")


def nearest(name: str, known: Iterable[str]) -> str:
    """The known name that is most like a misspelt one; of dotted names rather one with the same last part."""
    names = sorted(known)
    alike = [other for other in names if other.rpartition(".")[2] == name.rpartition(".")[2]]
    return (alike or difflib.get_close_matches(name, names, 1, 0) or [""])[0]


def keeps_arguments(init: Callable[P, None]) -> Callable[P, None]:
    """Decorate a constructor to keep the arguments of the outermost class in ``self.arguments``, by name.

    Those that the class does not have are refused by `refuse_unknown`.
    """
    signature = inspect.signature(init)
    kwargs_name = next((p.name for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD), None)

    @functools.wraps(init)
    def keeping(*args: P.args, **kwargs: P.kwargs) -> None:
        module: Any = args[0]
        if "arguments" not in module.__dict__:  # of a subclass that is being built, if there is one
            if kwargs_name is None:
                refuse_unknown(kwargs, list(signature.parameters)[1:], type(module).__name__)
            given = signature.bind(*args, **kwargs)
            given.apply_defaults()
            arguments = dict(list(given.arguments.items())[1:])
            if kwargs_name is not None:
                arguments |= arguments.pop(kwargs_name)
            module.__dict__["arguments"] = arguments
        init(*args, **kwargs)

    return keeping
