"""Options of `PatchCore` that come in groups, and what became of arguments it had before.

A group is given as its dataclass, as a dict of plain values, or by command as ``--model.store.kind disk``; it is saved
as a dict. Every group checks itself. `patchcore.py` and `cli.py` read them.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import reprlib
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from os import PathLike
from types import NoneType, UnionType
from typing import Any, ClassVar, Literal, ParamSpec, TypeVar, Union, get_args, get_origin, get_type_hints

import numpy as np

from pl_patchcore.errors import UserError
from pl_patchcore.preprocessing import IMAGENET_MEAN, IMAGENET_STD

StoreKind = Literal["auto", "ram", "disk"]
StoreDtype = Literal["float32", "float16", "bfloat16"]


@dataclass(frozen=True)  # or jsonargparse would not show the groups as such
class _Group:
    """What the groups have in common: their values are checked against their annotations."""

    group: ClassVar[str]

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            object.__setattr__(self, name, without_numpy(value))
        check_arguments(type(self), vars(self), f"{self.group}.")


@dataclass(frozen=True)
class PatchOptions(_Group):
    """How a layer becomes patch features.

    Args:
        stride: Step between patches, in cells of the layer's grid.
        layer_dim: Null: features are averaged over the neighbourhood. A number: each layer is adaptively pooled to so
            many, as in the authors' code; with ``feature_dim``.
        feature_dim: Adaptive pooling of all layers together to so many numbers.
        combine: How to join layers; ``mean``: of as many channels each.
        position_embedding: How a timm model resizes it: as ``timm``, or as ``dinov2``'s authors.
    """

    group: ClassVar[str] = "patches"
    stride: int = 1
    layer_dim: int | None = None
    feature_dim: int | None = None
    combine: Literal["concatenate", "mean"] = "concatenate"
    position_embedding: Literal["timm", "dinov2"] = "timm"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in (("stride", self.stride), ("layer_dim", self.layer_dim), ("feature_dim", self.feature_dim)):
            if value is not None and value < 1:
                raise UserError(f"patches.{name} must be at least 1, got {value}.")
        if (self.layer_dim is None) != (self.feature_dim is None):
            raise UserError(
                f"patches.layer_dim and patches.feature_dim go together, got {self.layer_dim} and {self.feature_dim}; "
                "set both or none."
            )


@dataclass(frozen=True)
class ImageOptions(_Group):
    """How an image's pixels are resized and normalised.

    Args:
        interpolation: Filter of the resize, ``bilinear`` or ``bicubic``, antialiased.
        mean: Mean of the normalisation, RGB in [0, 1].
        std: Standard deviation of the normalisation, RGB in [0, 1].
        bits: Bits of grey images of more than 8 a pixel, such as a camera's 12 in files of 16; null: 16.
        max_pixels: Largest image that is opened, in pixels; null: Pillow's limit of 178,956,970.
        crop_multiple: Cut the bottom and the right, to multiples of it.
        resize_by: ``pillow``, which rounds to 8 bits; ``tensors``: unrounded, what an exported model repeats exactly.
    """

    group: ClassVar[str] = "images"
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    bits: int | None = None
    max_pixels: int | None = None
    crop_multiple: int | None = None
    resize_by: Literal["pillow", "tensors"] = "pillow"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("mean", "std"):  # equal, whether lists or tuples were given
            object.__setattr__(self, name, tuple(float(value) for value in getattr(self, name)))
        if min(self.std) <= 0:
            raise UserError(f"images.std must be three positive numbers, got {list(self.std)}.")


@dataclass(frozen=True)
class StoreOptions(_Group):
    """Where the patch features of the training images are kept until the memory bank is selected.

    Args:
        kind: ``ram``, ``disk`` (a temporary file), or ``auto``: the disk where the fit would take more than half of the
            main memory available.
        folder: Folder of the file; null: the system's folder for temporary files.
        dtype: ``float16`` and ``bfloat16`` halve the space: the memory bank's features are rounded so.
        selection_memory: GiB that greedy selection may take. Where that is too little, it selects within chunks, then
            among the selected ones: at most 4 times as far from the patch features as the best coreset, in place of 2.
            Null: select exactly.

    Raises:
        UserError: For a value that is out of range.
    """

    group: ClassVar[str] = "store"
    kind: StoreKind = "auto"
    folder: str | None = None
    dtype: StoreDtype = "float32"
    selection_memory: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        memory = self.selection_memory
        if memory is not None and memory <= 0:
            raise UserError(f"store.selection_memory must be GiB above 0, got {memory!r}; leave it out for no limit.")

    def check_method(self, coreset_method: str) -> None:
        """Refuse a limit of memory for a coreset method that knows none.

        Raises:
            UserError: If there is one.
        """
        if self.selection_memory is not None and coreset_method != "greedy":
            raise UserError(
                f"store.selection_memory goes with coreset_method greedy, got {coreset_method}; leave one of them out."
            )

    def check_processes(self, number: int) -> None:
        """Refuse a limit of memory for several processes.

        Raises:
            UserError: If there is one.
        """
        if self.selection_memory is not None and number > 1:
            raise UserError(
                f"store.selection_memory selects within chunks of one process, there are {number}; leave it out (each "
                "holds only its share of the patch features), or set trainer.devices to 1."
            )


@dataclass(frozen=True)
class EnsembleOptions(_Group):
    """Several models on the same images, each with a memory bank of its own.

    Args:
        members: Null: one model. A list with the settings of each member that differ from the shared ones.
        combine: Their scores in units of what is usual among nominal patches, ``nominal``, or, as in the authors' code,
            scaled to [0, 1] over the whole test set, ``test_range``.
    """

    group: ClassVar[str] = "ensemble"
    members: list[dict[str, Any]] | None = None
    combine: Literal["nominal", "test_range"] = "nominal"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.members is None:
            return
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
    "projection_dim", "num_neighbors", "distance", "reweighting_neighbors", "sigma", "image_score", "top_share",
    "top_share_of", "normalize_features", "position_radius", "search", "bank_dtype", "inference",
)  # fmt: skip
REST = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
THRESHOLDS = ("image_threshold", "pixel_threshold")  # arguments that set a threshold by hand
MOST = 2**63 - 1  # of a whole number
_WORDS = {
    int: "a whole number from 0 up",
    float: "a finite number",
    bool: "true or false",
    str: "text",
    dict: "settings by name",
    NoneType: "null",
}
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


def check_arguments(of: Callable[..., Any], values: Mapping[str, Any], prefix: str = "") -> None:
    """Compare values to the annotations of a function or dataclass; numbers must be finite, whole ones 0 or more.

    Args:
        of: The function.
        values: Its arguments by name; others in it do not matter.
        prefix: What stands before each name where the user writes it, such as ``store.``.

    Raises:
        UserError: Naming the first one that does not fit.

    Example:
        >>> check_arguments(nearest, {"name": 3})
        Traceback (most recent call last):
        pl_patchcore.errors.UserError: name must be text, got 3.
    """
    for name, kind in get_type_hints(of).items():
        if name in values and not _fits(values[name], kind):
            raise UserError(f"{prefix}{name} must be {_words(kind)}, got {reprlib.repr(values[name])}.")


def _fits(value: Any, kind: Any) -> bool:
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return any(_fits(value, one) for one in inner)
    if origin is Literal:
        return value in inner if isinstance(value, str) else False
    if origin is tuple and inner[-1] is not Ellipsis:
        return _is_list(value) and len(value) == len(inner) and all(map(_fits, value, inner))
    if origin in (list, Sequence, tuple):
        return _is_list(value) and all(_fits(one, inner[0]) for one in value)
    if origin in (dict, Mapping):
        return isinstance(value, Mapping)
    if kind in (int, float):
        if isinstance(value, bool) or not isinstance(value, int if kind is int else int | float):
            return False
        return 0 <= value <= MOST if kind is int else abs(value) <= sys.float_info.max
    if kind is str:
        return isinstance(value, str | PathLike)
    if kind is Any or is_dataclass(kind) or not isinstance(kind, type):  # a group checks itself
        return True
    return isinstance(value, kind)


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _words(kind: Any) -> str:
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return ", or ".join(_words(one) for one in inner)
    if origin is Literal:
        return f"{', '.join(inner[:-1])} or {inner[-1]}"
    if origin is tuple and inner[-1] is not Ellipsis:
        return f"a list of {len(inner)} ({_words(inner[0])} each)"
    if origin in (list, Sequence, tuple):
        return "a list" if inner[0] is Any else f"a list ({_words(inner[0])} each)"
    return _WORDS.get(origin or kind) or f"a {kind.__name__}"


def nearest(name: str, known: Iterable[str]) -> str:
    """The known name that is most like a misspelt one; of dotted names rather one with the same last part."""
    names = sorted(known)
    alike = [other for other in names if other.rpartition(".")[2] == name.rpartition(".")[2]]
    return (alike or difflib.get_close_matches(name, names, 1, 0) or [""])[0]


def refuse_rate_beside_threshold(given: Collection[str]) -> None:
    """Refuse a false-alarm rate in one call with a threshold set by hand, which it could not move.

    Args:
        given: Names of the arguments given, thresholds of null left out.

    Raises:
        UserError: If both are there.
    """
    by_hand = [name for name in THRESHOLDS if name in given]
    if by_hand and "false_alarm_rate" in given:
        raise UserError(
            f"false_alarm_rate moves calibrated thresholds, and {by_hand[0]} is set by hand; give one of them."
        )


def known_arguments(kind: type) -> list[str]:
    """Names of the arguments of a class, with those that its constructor passes on as ``**kwargs``.

    Example:
        >>> class Shop(StoreOptions):
        ...     def __init__(self, open=True, **kwargs): ...
        >>> known_arguments(Shop)
        ['open', 'kind', 'folder', 'dtype', 'selection_memory']
    """
    names: list[str] = []
    for each in kind.__mro__:
        if "__init__" in vars(each):
            parameters = list(inspect.signature(vars(each)["__init__"]).parameters.values())[1:]
            names += [each.name for each in parameters if each.kind not in REST]
            if all(each.kind is not each.VAR_KEYWORD for each in parameters):
                break
    return names


def without_numpy(value: Any) -> Any:
    """A value with plain numbers, text and lists in place of NumPy's, in lists, tuples and dicts, too.

    Example:
        >>> without_numpy({"resize": np.array([32, 32]), "seed": np.int64(3)})
        {'resize': [32, 32], 'seed': 3}
    """
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    if type(value) in (list, tuple):
        return type(value)(map(without_numpy, value))
    return {key: without_numpy(inner) for key, inner in value.items()} if type(value) is dict else value


def keeps_arguments(init: Callable[P, None]) -> Callable[P, None]:
    """Decorate a constructor to keep the arguments of the outermost class in ``self.arguments``, by name.

    Those that the class does not have are refused by `refuse_unknown`.
    """
    signature = inspect.signature(init)
    rest = [each.name for each in signature.parameters.values() if each.kind in REST]  # of *args and **kwargs

    @functools.wraps(init)
    def keeping(*args: P.args, **kwargs: P.kwargs) -> None:
        module: Any = args[0]
        if "arguments" not in module.__dict__:  # of a subclass that is being built, if there is one
            where, known = type(module).__name__, known_arguments(type(module))
            refuse_unknown(kwargs, known, where)
            given = signature.bind(*args, **kwargs)
            given.apply_defaults()
            arguments = dict(list(given.arguments.items())[1:])
            for passed_on in [arguments.pop(name) for name in rest]:
                if isinstance(passed_on, tuple):
                    names = [name for name in known if name not in signature.parameters]
                    if len(passed_on) > len(names):
                        raise UserError(f"{where} passes on an argument that has no name there; give it by name.")
                    passed_on = dict(zip(names, passed_on, strict=False))
                arguments |= passed_on
            module.__dict__["arguments"] = arguments
        init(*args, **kwargs)

    return keeping


def takes_numpy(init: Callable[P, None]) -> Callable[P, None]:
    """Decorate a constructor to get plain values in place of NumPy's: see `without_numpy`."""

    @functools.wraps(init)
    def taking(*args: P.args, **kwargs: P.kwargs) -> None:
        call: Callable[..., None] = init
        call(args[0], *without_numpy(args[1:]), **without_numpy(kwargs))

    return taking
