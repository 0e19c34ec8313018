"""MPDD, painted metal parts (Jezek et al. 2021), in the layout of MVTec AD. Next: `mvtec.py`.

Numbers of images: the central directory of the published archive, which adds up to the paper's 888 and 458.
"""

from __future__ import annotations

from typing import ClassVar

from pl_patchcore.data.mvtec import Layout, MVTecDataModule


class MPDDDataModule(MVTecDataModule):
    """One category of MPDD; arguments as of `MVTecDataModule`."""

    headline: ClassVar[tuple[str, ...]] = ("image_auroc", "pixel_auroc")
    layout: ClassVar[Layout] = Layout(
        name="MPDD",
        root="data/mpdd",
        counts={
            "bracket_black": (289, 32, 47), "bracket_brown": (185, 26, 51), "bracket_white": (110, 30, 30),
            "connector": (128, 30, 14), "metal_plate": (54, 26, 71), "tubes": (122, 32, 69),
        },
        by_hand="fetch MPDD as https://github.com/stepanje/MPDD says",
    )  # fmt: skip
