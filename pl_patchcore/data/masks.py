"""What the levels of a data set's masks mean: read all of them, once, before the work."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pl_patchcore.errors import UserError
from pl_patchcore.preprocessing import Preprocessing, read_mask

if TYPE_CHECKING:
    from pl_patchcore.data.base import Record

log = logging.getLogger(__name__)

MID_GREY = (127, 32767)  # of 8 and of 16 bits
MOST_CLASSES = 32  # different levels of masks that are class numbers


def settle_masks(records: Sequence[Record], threads: int, transform: Preprocessing) -> list[Record]:
    """Say by ``mask_above`` what the levels of a data set's masks mean; every mask is read.

    Above mid-grey is anomalous, of 8 bits or of 16; masks of more than 8 bits whose levels end at 255 are taken as
    masks of 8. Where no mask of the data set is as bright as mid-grey, its levels are class numbers, each above 0
    anomalous, if there are few different ones. Records that say by ``mask_above`` what they mean are left.

    Raises:
        UserError: If the levels have no certain meaning.
    """
    unsaid = [record for record in records if record.mask_is_image and record.mask_above == MID_GREY]
    masked = [record for record in unsaid if record.label == 1 and record.mask_path]
    files = [(record, path) for record in masked for path in record.masks()]
    if not files:
        return list(records)

    def look(path: Path) -> tuple[bool, int, int, set[int]]:  # more than 8 bits, lowest and highest level, classes
        levels = read_mask(path, transform.max_pixels)
        low, high = int(levels.min()), int(levels.max())
        return levels.dtype != np.uint8, low, high, set(np.unique(levels).tolist()) if high <= 127 else set()

    with ThreadPoolExecutor(threads) as pool:
        looks = list(pool.map(look, [path for _, path in files]))
    deep = max((high for is_deep, _, high, _ in looks if is_deep), default=0)
    if 255 < deep <= 32767 or deep > 65535:
        found = next(path for (_, path), look in zip(files, looks, strict=True) if look[2] == deep)
        raise UserError(f"{found}: the highest level of a mask is {deep}, of no known range; save it with 0 and 255.")
    above = MID_GREY if deep > 255 else (127, 127)
    dim = [i for i, (is_deep, _, high, _) in enumerate(looks) if 0 < high <= above[is_deep]]
    if dim and not any(high > above[is_deep] for is_deep, _, high, _ in looks):
        levels = set().union(*(classes for *_, classes in looks)) - {0}
        counts = f"{len(dim)} of {len(files)} masks hold no level above 127; the highest is {max(levels)}"
        where = files[dim[0]][1]
        if len(levels) >= MOST_CLASSES:
            raise UserError(f"{where}: {counts}, and {len(levels)} differ; save masks with 0 and 255.")
        numbers = ", ".join(map(str, sorted(levels)))
        log.warning("%s: %s: they are read as class numbers, each a defect: %s.", where, counts, numbers)
        above = (0, 0)
    elif dim:
        log.warning(
            "%d of %d masks hold no level above mid-grey, though they are not black, such as %s: they mark nothing; "
            "save them with 0 and 255.",
            *(len(dim), len(files), files[dim[0]][1]),
        )
    if full := [i for i, (is_deep, low, *_) in enumerate(looks) if low > above[is_deep]]:
        message = "%d of %d masks mark their whole image, such as %s: pixel figures of them mean little."
        log.warning(message, len(full), len(files), files[full[0]][1])
    if not any(high for _, _, high, _ in looks):
        log.warning("all %d masks are empty, such as %s: there are no pixel figures.", len(files), files[0][1])
    settled = set(masked)
    return [replace(record, mask_above=above) if record in settled else record for record in records]
