"""BTAD, beanTech Anomaly Detection (Mishra et al. 2021), in the layout of MVTec AD but for its names.

Layout, as distributed: ``0N/train/ok``, ``0N/test/{ok,ko}``, ``0N/ground_truth/ko``; images and masks are .bmp or .png,
paired by their stems. The masks of some anomalous images are empty: their pixels count neither way. Numbers of images:
counted by several who have the archive; they add up to the published 2540. Next: `mvtec.py`.
"""

from __future__ import annotations

from typing import ClassVar

from pl_patchcore.data.mvtec import Layout, MVTecDataModule


class BTADDataModule(MVTecDataModule):
    """One product (``01``, ``02`` or ``03``) of BTAD; arguments as of `MVTecDataModule`."""

    layout: ClassVar[Layout] = Layout(
        name="BTAD",
        root="data/btad",
        counts={"01": (400, 21, 49), "02": (399, 30, 200), "03": (1000, 400, 41)},
        by_hand="fetch https://avires.dimi.uniud.it/papers/btad/btad.zip",
        url="https://avires.dimi.uniud.it/papers/btad/btad.zip",
        sha256="461c9387e515bfed41ecaae07c50cf6b10def647b36c9e31d239ab2736b10d2a",  # as anomalib has it
        strip=True,
        nominal="ok",
    )
