"""MVTec AD 2 (Heckler-Kram et al. 2025), in the layout of MVTec AD but for its names.

Layout, as distributed: ``<category>/train/good``, ``validation/good`` (which set thresholds),
``test_public/{good,bad}`` and ``test_public/ground_truth/bad/<image>_mask.png``; without labels ``test_private`` and
``test_private_mixed`` (the same scenes under other light), which ``predict`` scores for the evaluation server
(`report/submission.py`). Numbers of images: table IV of the paper. Next: `mvtec.py`.
"""

from __future__ import annotations

from typing import ClassVar

from pl_patchcore.data.base import Record, tell_counts
from pl_patchcore.data.files import list_images
from pl_patchcore.data.mvtec import Layout, MVTecDataModule

PRIVATE = {"test_private": "regular", "test_private_mixed": "mixed"}  # folder: what its images' names end with
# images of a category in each of these two folders; the server takes exactly these, numbered from 000
PRIVATE_COUNTS = {
    "can": 321, "fabric": 314, "fruit_jelly": 255, "rice": 277, "sheet_metal": 142, "vial": 276, "wallplugs": 232,
    "walnuts": 228,
}  # fmt: skip


class MVTecAD2DataModule(MVTecDataModule):
    """One category of MVTec AD 2; arguments as of `MVTecDataModule`.

    A test is of the public part. ``predict`` scores both private ones.
    """

    headline: ClassVar[tuple[str, ...]] = ("pro_0.05", "pro", "seg_f1", "image_auroc")
    layout: ClassVar[Layout] = Layout(
        name="MVTec AD 2",
        root="data/mvtec_ad_2",
        counts={
            "can": (412, 72, 90, 46), "fabric": (387, 66, 90, 43), "fruit_jelly": (263, 20, 60, 37),
            "rice": (313, 42, 90, 35), "sheet_metal": (137, 24, 90, 19), "vial": (291, 35, 105, 41),
            "wallplugs": (293, 60, 90, 33), "walnuts": (432, 60, 90, 48),
        },
        by_hand="fetch MVTec AD 2 from https://www.mvtec.com/company/research/datasets/mvtec-ad-2",
        url=(
            "https://www.mydrive.ch/shares/121573/7f68fe2c4f7c2ceaa08f463aaeb2f414/download/466712769-1743422799/"
            "mvtec_ad_2.tar.gz"
        ),
        sha256="c0ded99ef32bfc8e352d52beb44515e5b292b8598cb963aadfa91ca0763505e4",  # as several who fetched it found it
        test="test_public",
        truth="test_public/ground_truth",
        validation="validation",
    )  # fmt: skip

    def load_predict_records(self) -> list[Record] | None:
        """List the images of both private parts; whether they are anomalous is not known."""
        folder, records = self.category_folder(), []
        for part in PRIVATE:
            images = list_images(folder / part, self.layout.help)
            known = PRIVATE_COUNTS.get(folder.name)
            tell_counts(folder / part, [len(images)], None if known is None else [known], [part])
            records += [Record(path, -1, part, folder.name) for path in images]
        return records
