"""Image files in a folder."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

log = logging.getLogger(__name__)

IMAGE_SUFFIXES = (".bmp", ".jfif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


def list_images(folder: Path, recursive: bool = False) -> list[Path]:
    """List the image files in a folder by their suffix, upper or lower case, in the order of their names.

    Hidden files (as some systems leave everywhere) are passed over; other files that are no images are counted in
    a log line.

    Args:
        folder: The folder.
        recursive: Also those in folders inside, links followed.
    """
    files = sorted(_walk(folder, recursive))
    images = [path for path in files if path.suffix.lower() in IMAGE_SUFFIXES]
    if others := [path for path in files if path.suffix.lower() not in IMAGE_SUFFIXES]:
        log.info("%s: %d files that are no images are passed over, such as %s.", folder, len(others), others[0].name)
    return images


def _walk(folder: Path, recursive: bool) -> Iterator[Path]:
    """Files that are not hidden; links to folders are followed, each folder is visited once."""
    seen = set()
    for here, folders, names in os.walk(folder, followlinks=True):
        place = os.path.realpath(here)
        if place in seen:  # a link back
            folders.clear()
            continue
        seen.add(place)
        folders[:] = [name for name in sorted(folders) if recursive and not name.startswith(".")]
        yield from (Path(here, name) for name in names if not name.startswith("."))
