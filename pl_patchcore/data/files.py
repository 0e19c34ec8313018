"""Image files in a folder."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from pl_patchcore.errors import UserError

log = logging.getLogger(__name__)

IMAGE_SUFFIXES = (".bmp", ".jfif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


def list_images(folder: Path, recursive: bool = False, remedy: str | None = None) -> list[Path]:
    """List the image files in a folder by their suffix, upper or lower case, in the order of their names.

    Hidden files (as some systems leave everywhere) are passed over; other files that are no images are counted in
    a log line.

    Args:
        folder: The folder.
        recursive: Also those in folders inside, links followed, each folder once.
        remedy: What to do where there is no such folder, or no image in it; None returns an empty list then.

    Raises:
        UserError: In that case.
    """
    if remedy is not None and not folder.is_dir():
        raise UserError(f"{folder}: no such folder; {remedy}.")
    files, seen = [], set()
    for here, folders, names in os.walk(folder, followlinks=True):
        place = os.path.realpath(here)
        folders[:] = [n for n in sorted(folders) if recursive and place not in seen and not n.startswith(".")]
        files += [Path(here, name) for name in names if place not in seen and not name.startswith(".")]
        seen.add(place)
    images = sorted(path for path in files if path.suffix.lower() in IMAGE_SUFFIXES)
    if remedy is not None and not images:
        raise UserError(f"{folder}: holds no image ({', '.join(IMAGE_SUFFIXES)}); {remedy}.")
    if others := sorted(set(files) - set(images)):
        log.info("%s: %d files that are no images are passed over, such as %s.", folder, len(others), others[0].name)
    return images
