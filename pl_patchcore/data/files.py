"""Folders -> lists of image files, and the mask of each image by its name; lists in files. Next: the data modules."""

from __future__ import annotations

import json
import logging
import os
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING, Any

from pl_patchcore.errors import UserError
from pl_patchcore.preprocessing import check_file

if TYPE_CHECKING:
    from pl_patchcore.data.base import Record

log = logging.getLogger(__name__)

IMAGE_SUFFIXES = (".bmp", ".jfif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
AGAIN = "unpack the data set again"  # what helps where a list and its files do not fit
# folders that systems leave in those of users, besides hidden ones
_SYSTEM = ("@eaDir", "@Recycle", "#recycle", "__MACOSX", "$RECYCLE.BIN", "System Volume Information", "lost+found")


def list_images(folder: Path, remedy: str, recursive: bool = False) -> list[Path]:
    """List the image files in a folder by their suffix, upper or lower case, in the order of their names.

    Hidden files and folders, and those that systems leave, are passed over; other files that are no images are counted
    in a log line. With ``recursive`` also the images in folders inside, links followed, each folder once.

    Raises:
        UserError: If there is no such folder, or no image in it, then with the ``remedy``; if it cannot be read.
    """
    if not is_folder(folder):
        raise UserError(f"{folder}: no such folder; {remedy}.")
    if not recursive:
        for name in list_folders(folder):
            if name.lower().endswith(IMAGE_SUFFIXES):
                check_file(folder / name)
    files, seen = [], set()
    for here, folders, names in os.walk(folder, onerror=_cannot_list, followlinks=True):
        place = os.path.realpath(here)
        folders[:] = [n for n in sorted(folders) if recursive and place not in seen and not _is_passed_over(n)]
        files += [Path(here, name) for name in names if place not in seen and not _is_passed_over(name)]
        seen.add(place)
    images = sorted(path for path in files if path.suffix.lower() in IMAGE_SUFFIXES)
    if not images:
        raise UserError(f"{folder}: holds no image ({', '.join(IMAGE_SUFFIXES)}); {remedy}.")
    if others := sorted(set(files) - set(images)):
        log.info("%s: %d files that are no images are passed over, such as %s.", folder, len(others), others[0].name)
    return images


def list_folders(folder: Path) -> list[str]:
    """List the names of the folders in a folder, as `list_images` passes some over; none where there is no folder."""
    here = next(os.walk(folder, onerror=_cannot_list), None) if is_folder(folder) else None
    return sorted(name for name in here[1] if not _is_passed_over(name)) if here else []


def is_folder(path: Path) -> bool:
    """Whether there is such a folder; a `UserError` without the right to look, or where the name is too long."""
    try:
        return path.is_dir()
    except OSError as error:
        raise UserError(f"{_short(str(path))}: cannot be looked at ({error.strerror}); give another path.") from error


def _is_passed_over(name: str) -> bool:
    return name.startswith(".") or name in _SYSTEM


def _cannot_list(error: OSError) -> None:
    raise UserError(
        f"{_short(error.filename)}: the folder cannot be listed ({error.strerror}); give yourself the right to, or "
        "move it away."
    ) from error


def _short(name: str) -> str:
    return name if len(name) < 400 else f"{name[:200]} ... {name[-100:]}"


def read_text(path: Path, remedy: str) -> str:
    """Read a list that belongs to a data set; a `UserError` with the ``remedy`` if it is missing or is no text."""
    try:
        check_file(path)
        return path.read_text(encoding="utf-8-sig")
    except UserError:
        raise UserError(f"{path}: no such file, or none that can be read; {remedy}.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: is no UTF-8 text ({error}); {remedy}.") from error


def read_json(path: Path, remedy: str) -> Any:
    """Read what a JSON file holds, plain values; a `UserError` with the ``remedy`` if it is none."""
    try:
        return json.loads(read_text(path, remedy))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is no JSON file ({error}); {remedy}.") from error


def inside(folder: Path, name: str, where: str) -> Path:
    """Path of a file in ``folder`` that a list names; a `UserError` that begins with ``where`` if it leads out."""
    path = PureWindowsPath(name)  # takes / and \ as separators, and knows drives
    if not name or "\0" in name or path.anchor or ".." in path.parts:
        raise UserError(f"{where}: names the file {name!r}, which is not in {folder}; {AGAIN}.")
    return folder.joinpath(*path.parts)


def require_files(records: Iterable[Record], listed_in: Path) -> None:
    """Refuse a copy that lacks images or masks which its list names; the error says how many, and names the first."""
    files = (path for record in records for path in (record.path, record.mask_path) if path is not None)
    if missing := [path for path in files if not path.is_file()]:
        raise UserError(f"{missing[0]}: no such file, though in {listed_in} ({len(missing)} are missing); {AGAIN}.")


def nominal_only(records: Sequence[Record], place: Path) -> list[Record]:
    """Leave out the anomalous images of a training part, and say how many."""
    nominal = [record for record in records if record.label == 0]
    if left_out := len(records) - len(nominal):
        log.info("%s: %d anomalous images of the training part are left out.", place, left_out)
    return nominal


def pair_masks(
    images: Sequence[Path], root: Path, masks: Sequence[Path], folder: Path, remedy: str
) -> dict[Path, Path]:
    """Mask of each image, or a folder of its masks: one or the other for each image, and none left over.

    Images in ``root`` and masks in ``folder`` have the same names but for the suffix, and ``_mask`` behind a mask's.
    Several masks of an image lie in a folder of that name.

    Raises:
        UserError: If an image has no mask (then with the ``remedy``), a mask no image, or two have one name.
    """
    of_image = by_name(images, root)
    folders = by_name(sorted({path.parent for path in masks} - {folder}), folder, "_mask")
    several = {name: path for name, path in folders.items() if name in of_image}
    single = by_name([path for path in masks if path.parent not in set(several.values())], folder, "_mask")
    if both := sorted(set(single) & set(several)):
        raise UserError(f"{single[both[0]]}: has the same name as {several[both[0]]}; remove one of them.")
    of_mask = single | several
    if missing := [name for name in of_image if name not in of_mask]:
        path, wanted = of_image[missing[0]], folder / missing[0]
        raise UserError(f"{path}: has no mask {wanted.name}_mask.png or {wanted}.png; {remedy}.")
    if stray := sorted(set(of_mask) - set(of_image)):
        raise UserError(f"{of_mask[stray[0]]}: belongs to no image in {root}; remove it, or put the image back.")
    return {path: of_mask[name] for name, path in of_image.items()}


def by_name(paths: Sequence[Path], folder: Path, ending: str = "") -> dict[str, Path]:
    """Paths by their names inside ``folder``, without suffix and ``ending``.

    Raises:
        UserError: If two have one name.
    """
    found: dict[str, Path] = {}
    for path in paths:
        name = path.relative_to(folder).with_suffix("").as_posix().removesuffix(ending)
        name = unicodedata.normalize("NFC", name)  # accents in one form, as file systems differ in that
        if name in found:
            raise UserError(f"{path}: has the same name as {found[name]}; rename one, so that the mask is known.")
        found[name] = path
    return found
