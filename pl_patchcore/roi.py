"""Options ``roi`` and ``ignore`` -> which pixels of an original image count. `Preprocessing` asks for them.

An option is boxes and polygons in pixels of the original image, or masks in files. The pixel in column x and row y
covers x to x + 1 and y to y + 1, as in `regions.py`; a box or polygon holds the pixels whose centres lie inside, of a
polygon by the even-odd rule. So the outline of a `Region` holds the region's own pixels.
"""

from __future__ import annotations

import os
import reprlib
import unicodedata
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from pl_patchcore.data.files import IMAGE_SUFFIXES, by_name, is_folder
from pl_patchcore.data.masks import MID_GREY
from pl_patchcore.errors import UserError
from pl_patchcore.preprocessing import check_image, read_mask, shown

Shape = tuple[Any, ...]  # a box (left, top, right, bottom), or a polygon ((x, y), ...)
Where = str | tuple[Shape, ...]  # absolute path of a mask or a folder of masks, or shapes
MOST_CORNERS = 10_000  # of all shapes of an option, for checkpoints hold them as plain values
FARTHEST = 2**31  # pixels, of a coordinate
CROSSINGS = 1_000_000  # of edges and rows at once, about 50 MB
KEPT = 4  # sizes of images whose pixels are kept in memory, a byte each


def checked(name: str, value: Any) -> Where | None:
    """Check the value of an option, and bring it to plain tuples.

    Args:
        name: Name of the option.
        value: Path of a mask image, or of a folder of masks by the image's name; a box ``[left, top, right, bottom]``,
            a polygon ``[[x, y], ...]``, or a list of these; None.

    Raises:
        UserError: If it is none of these, a box is empty, or there is no such file or folder.

    Example:
        >>> checked("roi", [[10, 10, 50, 40], [[0, 0], [9, 0], [0, 9]]])
        ((10, 10, 50, 40), ((0, 0), (9, 0), (0, 9)))
    """
    if value is None:
        return None
    if isinstance(value, str | os.PathLike):
        path = Path(value).absolute()
        if not is_folder(path) and not path.is_file():
            raise UserError(f"{name}: {path}: no such file or folder; give a mask image, a folder of masks, or null.")
        return str(path)
    alone = _shape(value)
    listed = [alone] if alone else list(map(_shape, value)) if isinstance(value, list | tuple | np.ndarray) else []
    shapes = tuple(shape for shape in listed if shape)
    if not shapes or len(shapes) < len(listed):
        raise UserError(
            f"{name} must be a box [left, top, right, bottom], a polygon [[x, y], ...] of at least 3 corners, a list "
            f"of these, or the path of a mask image or of a folder of masks, got {reprlib.repr(value)}."
        )
    if sum(map(len, shapes)) > MOST_CORNERS:
        raise UserError(f"{name} has more than {MOST_CORNERS} numbers or corners; give a mask image in their place.")
    for shape in shapes:
        numbers = np.asarray(shape, np.float64)
        if not (np.abs(numbers) <= FARTHEST).all():
            raise UserError(f"{name} {_words(shape)}: coordinates must be at most {FARTHEST} pixels from the corner.")
        if numbers.ndim == 1 and (numbers[2:] <= numbers[:2]).any():
            raise UserError(f"{name} {_words(shape)}: a box is [left, top, right, bottom], right above left, bottom "
                            "above top; y points down.")  # fmt: skip
    return shapes


def _shape(value: Any) -> Shape | None:
    """A box or a polygon as tuples; None if it is neither."""
    try:
        numbers = np.asarray(value)
    except ValueError:  # lists of different lengths
        return None
    if numbers.dtype.kind not in "iuf":
        return None
    if numbers.shape == (4,):
        return tuple(numbers.tolist())
    return tuple(map(tuple, numbers.tolist())) if numbers.shape[1:] == (2,) and len(numbers) >= 3 else None


def _words(shape: Shape) -> str:
    return reprlib.repr([list(part) if isinstance(part, tuple) else part for part in shape])


def marked(name: str, where: Where, size: tuple[int, int], path: Path | None, max_pixels: int | None) -> np.ndarray:
    """Pixels of an image that an option marks: bool ``(H, W)``, not to be written to.

    Args:
        name: Name of the option, for messages.
        where: As `checked` returns it.
        size: Height and width of the image.
        path: File of the image, by whose name a folder of masks is looked at.
        max_pixels: As `preprocessing.read_image`, of masks.

    Raises:
        UserError: If a box or polygon holds no pixel of the image; if the image has no mask or no name, or a mask is of
            another size or cannot be read.
    """
    if not isinstance(where, str):
        return _drawn(name, where, size)
    mask = Path(where)
    if mask.is_dir():
        mask = mask_of(name, mask, path)
        found = _read(mask, max_pixels)
    else:
        found = _read_once(mask, max_pixels, mask.stat().st_mtime_ns if mask.exists() else 0)
    _refuse_other_size(name, mask, found.shape, size, path)
    return found


def check_marked(name: str, where: Where, size: tuple[int, int], path: Path | None, max_pixels: int | None) -> None:
    """Refuse what `marked` refuses, as far as it shows without decoding a mask of the image's own."""
    if isinstance(where, str) and Path(where).is_dir():
        mask = mask_of(name, Path(where), path)
        _refuse_other_size(name, mask, check_image(mask, max_pixels=max_pixels, mask=True).size, size, path)
    else:
        marked(name, where, size, path, max_pixels)


@lru_cache(KEPT)
def _drawn(name: str, shapes: tuple[Shape, ...], size: tuple[int, int]) -> np.ndarray:
    """Pixels inside of any of the shapes, bool ``size``."""
    inside = np.zeros(size, bool)
    for shape in shapes:
        numbers = np.asarray(shape, np.float64)
        found = _fill_box(inside, numbers) if numbers.ndim == 1 else _fill_polygon(inside, numbers)
        if not found:
            raise UserError(
                f"{name} {_words(shape)} holds no pixel of an image of {size[0]}x{size[1]} (height x width); give x "
                "and y in pixels of the original image."
            )
    inside.flags.writeable = False
    return inside


def _first(place: Any, most: Any) -> Any:
    """First pixel, from 0 to ``most``, whose centre lies at a place or behind it."""
    return np.clip(np.ceil(place - 0.5), 0, most).astype(np.int64)


def _fill_box(inside: np.ndarray, box: np.ndarray) -> bool:
    """Fill a box; whether it holds any pixel."""
    left, top, right, bottom = _first(box, np.array(inside.shape[::-1] * 2))
    inside[top:bottom, left:right] = True
    return bool(top < bottom and left < right)


def _fill_polygon(inside: np.ndarray, corners: np.ndarray) -> bool:
    """Fill a polygon, corners ``(n, 2)``; whether it holds any pixel.

    Where an edge crosses a row of centres, all pixels to the right change from outside to inside or back.
    """
    height, width = inside.shape
    (left, top), (right, bottom) = (_first(f(0), np.array([width, height])) for f in (corners.min, corners.max))
    ends = np.stack([corners, np.roll(corners, -1, axis=0)])  # (2, n, 2)
    low, high = np.take_along_axis(ends, ends[..., 1].argsort(axis=0)[..., None], axis=0)  # each edge from the top down
    begin, end = _first(low[:, 1], height), _first(high[:, 1], height)  # rows that it crosses, (n,)
    changes = np.zeros((bottom - top, right - left + 1), np.uint8)  # a column more, for what lies to the right
    slope = (high - low)[:, 0] / np.where(high[:, 1] > low[:, 1], (high - low)[:, 1], 1)
    rows = end - begin
    for some in np.split(np.arange(len(rows)), np.searchsorted(rows.cumsum(), range(CROSSINGS, rows.sum(), CROSSINGS))):
        edge = np.repeat(some, rows[some])
        row = begin[edge] + np.arange(len(edge)) - np.repeat(rows[some].cumsum() - rows[some], rows[some])
        x = low[edge, 0] + (row + 0.5 - low[edge, 1]) * slope[edge]
        np.bitwise_xor.at(changes, (row - top, _first(x, right).clip(left) - left), 1)
    np.bitwise_xor.accumulate(changes, axis=1, out=changes)
    filled = changes[:, :-1].view(bool)
    inside[top:bottom, left:right] |= filled
    return bool(filled.any())


def mask_of(name: str, folder: Path, path: Path | None) -> Path:
    """Mask of an image in a folder: of its name but for the suffix, or with ``_mask`` behind that.

    Of masks in folders inside, the image's path must end so: ``a/01.png`` is the mask of ``.../a/01.jpg``, rather than
    ``01.png``.

    Raises:
        UserError: If there is none, several, or the image has no name.
    """
    if path is None:
        raise UserError(f"{name} is a folder of masks by name, and this image has none; give the path of its file.")
    whole = path.absolute()
    parts = whole.with_suffix("").parts[1:]
    stem = unicodedata.normalize("NFC", parts[-1])
    for start in range(len(parts)):
        place = folder.joinpath(*parts[start:-1])
        mask = _masks_in(place, place.stat().st_mtime_ns).get(stem) if place.is_dir() else None
        if mask == whole:
            raise UserError(f"{name}: {folder}: holds the images themselves; give a folder of masks.")
        if mask is not None:
            return mask
    wanted = f"{parts[-1]}.png or {parts[-1]}_mask.png"
    raise UserError(f"{shown(whole)}: has no mask {shown(wanted)} in the folder of {name}, {folder}; add it.")


@lru_cache(1024)
def _masks_in(folder: Path, _changed: int) -> dict[str, Path]:
    """Masks that lie in a folder, not in those inside, by the names of their images; kept until the folder changes."""
    files = (path for path in sorted(folder.iterdir()) if not path.name.startswith("."))
    return by_name([path for path in files if path.suffix.lower() in IMAGE_SUFFIXES], folder, "_mask")


def _read(path: Path, max_pixels: int | None) -> np.ndarray:
    """Pixels that a mask marks, bool ``(H, W)``: those brighter than mid-grey, or than 0 where none is so bright."""
    levels = read_mask(path, max_pixels)
    bright: np.ndarray = levels > MID_GREY[levels.dtype != np.uint8]
    return bright if bright.any() else levels > 0


@lru_cache(2)  # of roi and of ignore
def _read_once(path: Path, max_pixels: int | None, _changed: int) -> np.ndarray:
    """As `_read`; kept until the file changes."""
    return _read(path, max_pixels)


def _refuse_other_size(name: str, mask: Path, found: tuple[int, ...], size: tuple[int, int], path: Path | None) -> None:
    if found != size:
        image = "an image in memory" if path is None else shown(path)
        raise UserError(
            f"{name}: {shown(mask)}: mask of {found[0]}x{found[1]} pixels for an image of {size[0]}x{size[1]} "
            f"({image}); a mask must have its image's size."
        )
