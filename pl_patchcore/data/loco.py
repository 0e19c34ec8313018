"""MVTec LOCO AD (Bergmann et al. 2022), in the layout of MVTec AD, with a folder of masks for each image.

Layout, as distributed: ``<category>/{train,validation}/good``, ``test/{good,logical_anomalies,structural_anomalies}``,
``ground_truth/<defect>/<image>/000.png, 001.png, ...``, one for each defect of the image, and ``defects_config.json``:
to each level of a mask the defect's name and how many of its pixels found count as all of them (its saturation area,
for the metric sPRO). Areas and checks are those of the authors' evaluation code. Numbers of images: counted by several
who have the archive. Next: `mvtec.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np

from pl_patchcore.data.base import Record
from pl_patchcore.data.files import AGAIN, read_json
from pl_patchcore.data.mvtec import Layout, MVTecDataModule
from pl_patchcore.errors import UserError
from pl_patchcore.preprocessing import Header, Preprocessing, read_mask

CONFIG = "defects_config.json"
_KEYS = {"defect_name", "pixel_value", "saturation_threshold", "relative_saturation"}


class Saturation(NamedTuple):
    """How many pixels of a defect count as all of it."""

    pixel_value: int  # level of its masks, 1 to 255
    threshold: float  # pixels, or where it is relative a share of the defect's, in (0, 1]
    relative: bool

    def area(self, pixels: int) -> int:
        """Saturation area of a defect of so many pixels, at least 1 pixel and at most all."""
        return max(1, int(self.threshold * pixels) if self.relative else min(int(self.threshold), pixels))


@dataclass(frozen=True)
class LOCORecord(Record):
    """An anomalous image; its mask is the union of those of its defects."""

    tells_defects: ClassVar[bool] = True

    saturations: tuple[Saturation, ...] = ()  # what ``defects_config.json`` says of each level

    def defect_regions(self) -> list[tuple[np.ndarray, int]]:
        """The defects of the image: mask, bool ``(H, W)`` of the original size, and saturation area in pixels.

        Raises:
            UserError: If a mask cannot be read, or does not hold exactly one of the known levels.
        """
        known = {saturation.pixel_value: saturation for saturation in self.saturations}
        regions = []
        for path in self.masks():
            levels = read_mask(path)
            value, mask = int(levels.max()), levels > 0
            if value not in known or (levels[mask] != value).any():
                raise UserError(
                    f"{path}: its highest level is {value}; a mask holds exactly one beside 0, of "
                    f"{', '.join(map(str, sorted(known)))}, as {CONFIG} says; {AGAIN}."
                )
            regions.append((mask, known[value].area(int(mask.sum()))))
        return regions

    def check(self, transform: Preprocessing | None = None) -> Header | None:
        """As of other records, and the levels of the masks."""
        header = super().check(transform)
        self.defect_regions()
        return header


class MVTecLOCODataModule(MVTecDataModule):
    """One category of MVTec LOCO AD; arguments as of `MVTecDataModule`."""

    headline: ClassVar[tuple[str, ...]] = ("image_auroc", "mean_spro_0.05")
    layout: ClassVar[Layout] = Layout(
        name="MVTec LOCO AD",
        root="data/mvtec_loco",
        counts={
            "breakfast_box": (351, 102, 173, 62), "juice_bottle": (335, 94, 236, 54), "pushpins": (372, 138, 172, 69),
            "screw_bag": (360, 122, 219, 60), "splicing_connectors": (360, 119, 193, 60),
        },
        by_hand="fetch MVTec LOCO AD from https://www.mvtec.com/company/research/datasets/mvtec-loco",
        url=(
            "https://www.mydrive.ch/shares/48237/1b9106ccdfbb09a0c414bd49fe44a14a/download/430647091-1646842701/"
            "mvtec_loco_anomaly_detection.tar.xz"
        ),
        sha256="9e7c84dba550fd2e59d8e9e231c929c45ba737b6b6a6d3814100f54d63aae687",  # as several who fetched it found it
        validation="validation",
    )  # fmt: skip

    def load_records(self) -> tuple[list[Record], list[Record]]:
        """List the images as `MVTecDataModule` does, once ``defects_config.json`` is read."""
        self.saturations = read_saturations(self.category_folder() / CONFIG)
        return super().load_records()

    def anomalous_record(self, path: Path, defect: str, mask: Path | None) -> Record:
        """Record that knows its defects; levels above 0 are anomalous."""
        return LOCORecord(path, 1, defect, str(self.category), mask, (0, 0), saturations=self.saturations)


def read_saturations(path: Path) -> tuple[Saturation, ...]:
    """Read ``defects_config.json``.

    Raises:
        UserError: If it is missing or does not hold what it should.
    """
    content = read_json(path, AGAIN)
    entries = content if isinstance(content, list) else [content]
    found = {}
    for number, entry in enumerate(entries):
        if (wrong := _wrong(entry)) is not None:
            raise UserError(f"{path}: entry {number} {wrong}; {AGAIN}.")
        value = entry["pixel_value"]
        if value in found:
            raise UserError(f"{path}: entry {number} has the pixel_value {value} of another; {AGAIN}.")
        found[value] = Saturation(value, entry["saturation_threshold"], entry["relative_saturation"])
    if not found:
        raise UserError(f"{path}: holds no entry; {AGAIN}.")
    return tuple(found.values())


def _wrong(entry: Any) -> str | None:
    """What is wrong with an entry, None if nothing is."""
    if not isinstance(entry, dict) or set(entry) != _KEYS:
        return f"must hold exactly {', '.join(sorted(_KEYS))}"
    value, threshold, relative = (entry[key] for key in ("pixel_value", "saturation_threshold", "relative_saturation"))
    if type(value) is not int or not 1 <= value <= 255:
        return f"must have a pixel_value from 1 to 255, got {value!r}"
    if type(relative) is not bool:
        return f"must have a relative_saturation of true or false, got {relative!r}"
    if relative and not (type(threshold) in (int, float) and 0 < threshold <= 1):
        return f"must have a relative saturation_threshold in (0, 1], got {threshold!r}"
    if not relative and not (type(threshold) is int and threshold > 0):
        return f"must have a saturation_threshold of whole pixels, got {threshold!r}"
    return None
