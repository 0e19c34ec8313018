"""Data sets in their true layout, with tiny made-up images."""

from pathlib import Path

import numpy as np
from PIL import Image


def mtd(root: Path, nominal: int = 10, per_defect: int = 2) -> Path:
    """Magnetic Tile Defects: grey JPEGs of differing sizes, masks with soft edges beside them."""
    rng = np.random.default_rng(0)
    for kind in ("Free", "Blowhole", "Break", "Crack", "Fray", "Uneven"):
        folder = root / f"MT_{kind}" / "Imgs"
        folder.mkdir(parents=True)
        for number in range(nominal if kind == "Free" else per_defect):
            height, width = int(rng.integers(60, 90)), int(rng.integers(40, 60))
            pixels = rng.normal(110, 6, (height, width))
            mask = np.zeros((height, width))
            if kind != "Free":
                top, left = height // 2, width // 2
                pixels[top - 6 : top + 6, left - 6 : left + 6] = 230
                mask[top - 6 : top + 6, left - 6 : left + 6] = 255
                mask[top - 7, left - 6 : left + 6] = 100
            stem = folder / f"exp{number}_num_{1000 + number}"
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(stem.with_suffix(".jpg"), quality=95)
            Image.fromarray(mask.astype(np.uint8)).save(stem.with_suffix(".png"))
    return root
