"""Image files in a folder."""

from __future__ import annotations

import logging
from pathlib import Path

log = logging.getLogger(__name__)

IMAGE_SUFFIXES = (".bmp", ".jfif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


def list_images(folder: Path, recursive: bool = False) -> list[Path]:
    """List the image files in a folder by their suffix, upper or lower case, in the order of their names.

    Hidden files (as some systems leave everywhere) are passed over; other files that are no images are counted in
    a log line.

    Args:
        folder: The folder.
        recursive: Also those in folders inside.
    """
    entries = folder.rglob("*") if recursive else folder.glob("*")
    visible = (path for path in entries if not any(part.startswith(".") for part in path.relative_to(folder).parts))
    files = sorted(path for path in visible if path.is_file())
    images = [path for path in files if path.suffix.lower() in IMAGE_SUFFIXES]
    if others := [path for path in files if path.suffix.lower() not in IMAGE_SUFFIXES]:
        log.info("%s: %d files that are no images are passed over, such as %s.", folder, len(others), others[0].name)
    return images
