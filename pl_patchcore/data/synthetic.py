"""Generated data set: photographs of textures -> nominal crops, and crops with drawn defects.

The photographs (512x512, grey) come with scikit-image. Training crops are taken from the left half, test crops from
the right half, and mirrored at random (the halves of the brick wall are mirror images). Each image is made when it is
read, from the seed, its set and its number alone. The figures tell nothing about a method's worth on real defects.
"""

from __future__ import annotations

import tempfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import gaussian_filter

from pl_patchcore.data.base import NOMINAL, AnomalyDataModule, Record
from pl_patchcore.errors import UserError
from pl_patchcore.options import check_arguments
from pl_patchcore.preprocessing import Preprocessing

Array = NDArray[np.float64]
Rng = np.random.Generator
Texture = Literal["brick", "gravel", "grass"]
MOST_IMAGES = 100_000
_SPLIT = 256  # column of the photograph: training images from the left of it, test images from the right
_VISIBLE = 0.03  # least mean change of grey inside a defect, of 1; three times the sensor's noise


def draw_scratch(image: Array, rng: Rng) -> tuple[Array, Array]:
    """A thin, slightly curved line, brighter or darker than the surface."""
    size = len(image)
    angle, length = rng.uniform(0, np.pi), rng.uniform(0.25, 0.6) * size
    middle = rng.uniform(0.3, 0.7, 2) * size
    along = np.array([np.sin(angle), np.cos(angle)])
    bend = np.array([-along[1], along[0]]) * rng.uniform(-0.15, 0.15) * length
    t = np.linspace(-1, 1, 200)[:, None]
    line = middle + along * t * length / 2 + bend * (1 - t**2)  # (200, 2) points
    y, x = np.mgrid[:size, :size]
    distance = np.sqrt(((np.stack([y, x], -1)[:, :, None] - line[::4]) ** 2).sum(-1).min(-1))
    alpha = np.clip(rng.uniform(1.0, 2.2) - distance + 0.5, 0, 1)  # half-width in pixels, antialiased
    level = np.clip(np.median(image) + rng.choice([-1, 1]) * rng.uniform(0.25, 0.45), 0, 1)
    return level + gaussian_filter(rng.normal(0, 0.03, image.shape), 1), alpha


def draw_stain(image: Array, rng: Rng) -> tuple[Array, Array]:
    """An irregular soft blot that darkens the surface under it."""
    alpha = _blob(len(image), rng, rng.uniform(0.05, 0.12), soft=2.0)
    return image * rng.uniform(0.45, 0.75), alpha


def draw_foreign(image: Array, rng: Rng) -> tuple[Array, Array]:
    """A lump of smooth, shaded material with a sharp edge."""
    size = len(image)
    alpha = _blob(size, rng, rng.uniform(0.03, 0.07), soft=0.7)
    y, x = np.mgrid[:size, :size] / size
    angle = rng.uniform(0, 2 * np.pi)
    shade = 0.8 * (np.cos(angle) * x + np.sin(angle) * y)
    return np.clip(rng.uniform(0.2, 0.8) + shade - shade[alpha > 0.5].mean(), 0, 1), alpha


def draw_blur(image: Array, rng: Rng) -> tuple[Array, Array]:
    """A spot where the surface is worn smooth, or out of focus."""
    return gaussian_filter(image, rng.uniform(2.0, 4.0)), _blob(len(image), rng, rng.uniform(0.09, 0.16), soft=3.0)


DEFECTS: dict[str, Callable[[Array, Rng], tuple[Array, Array]]] = {
    "scratch": draw_scratch, "stain": draw_stain, "foreign": draw_foreign, "blur": draw_blur
}  # fmt: skip


@dataclass(frozen=True)
class SyntheticRecord(Record):
    """A generated image, made from its seed and its path, which only names it."""

    size: int = 192  # side, pixels
    seed: int = 0

    def check(self, transform: Preprocessing | None = None) -> None:
        """Nothing can be missing."""

    def read(self, transform: Preprocessing | None = None) -> tuple[Image.Image, NDArray[np.uint8]]:
        """Make the image, RGB, and its mask: 1 where the drawn defect covers at least half of the surface."""
        rng = np.random.default_rng([self.seed, zlib.crc32(self.path.as_posix().encode())])
        photograph = _photograph(self.category)
        part = photograph[:, :_SPLIT] if "train" in self.path.parts else photograph[:, _SPLIT:]
        top, left = (int(rng.integers(0, side - self.size + 1)) for side in part.shape)
        image = part[top : top + self.size, left : left + self.size]
        if rng.random() < 0.5:
            image = image[:, ::-1]
        alpha = np.zeros_like(image)
        if self.label == 1:
            image, alpha = _damage(image, DEFECTS[self.defect], rng)
        image = image * rng.uniform(0.95, 1.05) + rng.uniform(-0.02, 0.02)  # exposure
        image = image + rng.normal(0, 0.01, image.shape)  # sensor
        grey = (np.clip(image, 0, 1) * 255).round().astype(np.uint8)
        return Image.fromarray(grey).convert("RGB"), (alpha >= 0.5).astype(np.uint8)


class SyntheticDataModule(AnomalyDataModule):
    """Generated images: crops of a photographed texture, with drawn scratches, stains, foreign material, blur.

    Args:
        texture: Photograph the crops are from: brick, gravel or grass.
        image_size: Side of the crops, pixels, 64 to 256.
        train_images: Nominal training images.
        test_nominal: Nominal test images.
        test_per_defect: Test images of each of the four kinds of defect.
        seed: What all images are made from.
        **loading: Arguments of `AnomalyDataModule`.

    Raises:
        UserError: For a value out of range.

    Example:
        >>> data = SyntheticDataModule(train_images=2, test_nominal=1, test_per_defect=1)
        >>> data.describe()
        '2 nominal training images; 5 test images (1 nominal, 1 scratch, 1 stain, 1 foreign, 1 blur)'
    """

    category_argument: ClassVar[str | None] = "texture"

    def __init__(
        self,
        texture: Texture = "brick",
        image_size: int = 192,
        train_images: int = 60,
        test_nominal: int = 40,
        test_per_defect: int = 15,
        seed: int = 0,
        **loading: Any,
    ) -> None:
        check_arguments(SyntheticDataModule.__init__, locals(), "data.")
        super().__init__(**loading)
        if not 64 <= image_size <= 256:
            raise UserError(f"image_size must be from 64 to 256 pixels (half a photograph), got {image_size}.")
        numbers = {"train_images": train_images, "test_nominal": test_nominal, "test_per_defect": test_per_defect}
        for name, number in numbers.items():
            if not (least := 0 if name == "test_per_defect" else 1) <= number <= MOST_IMAGES:
                raise UserError(f"{name} must be at least {least} and at most {MOST_IMAGES}, got {number}.")
        self.texture, self.image_size, self.seed = texture, image_size, seed
        self.train_images, self.test_nominal, self.test_per_defect = train_images, test_nominal, test_per_defect

    def categories(self) -> list[str]:
        """The textures."""
        return list(get_args(Texture))

    def load_records(self) -> tuple[list[Record], list[Record]]:
        """Name the images."""
        train = [self._record("train", NOMINAL, i) for i in range(self.train_images)]
        test = [self._record("test", NOMINAL, i) for i in range(self.test_nominal)]
        test += [self._record("test", kind, i) for kind in DEFECTS for i in range(self.test_per_defect)]
        return train, test

    def export(self, folder: str | Path) -> Path:
        """Write the data set, all of it or nothing, into ``folder / texture`` in the layout of MVTec AD."""
        target = Path(folder) / self.texture
        if target.exists():
            raise UserError(f"{target}: exists already; remove it, or export to another folder.")
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{self.texture}-", dir=target.parent) as place:
            partial = Path(place, self.texture)
            for record in (*self.records[0], *self.records[1]):
                image, mask = record.read()
                files = {partial.joinpath(*record.path.parts[-3:]): image}
                if record.label == 1:
                    name = f"{record.path.stem}_mask.png"
                    files[partial / "ground_truth" / record.defect / name] = Image.fromarray(mask * 255)
                for path, picture in files.items():
                    path.parent.mkdir(parents=True, exist_ok=True)
                    picture.save(path)
            partial.rename(target)
        return target

    def _record(self, split: str, defect: str, number: int) -> Record:
        folder = "good" if defect == NOMINAL else defect  # MVTec's word
        path = Path("synthetic", self.texture, split, folder, f"{number:03d}.png")
        return SyntheticRecord(path, int(defect != NOMINAL), defect, self.texture, size=self.image_size, seed=self.seed)


def _damage(image: Array, draw: Callable[[Array, Rng], tuple[Array, Array]], rng: Rng) -> tuple[Array, Array]:
    """Draw a defect, again where nobody could see it (a blur on what was smooth before)."""
    for _ in range(100):
        content, alpha = draw(image, rng)
        change = np.abs(alpha * (content - image))[alpha >= 0.5]
        if change.size and change.mean() >= _VISIBLE:
            break
    return (1 - alpha) * image + alpha * content, alpha


@cache
def _photograph(texture: str) -> Array:
    import skimage.data  # no other data set needs it

    grey: Array = np.asarray(getattr(skimage.data, texture)(), np.float64) / 255
    return grey


def _blob(size: int, rng: Rng, radius: float, soft: float) -> Array:
    """Irregular blob: coverage in [0, 1], ``radius`` as a share of ``size``, edge ``soft`` pixels wide."""
    centre = rng.uniform(0.25, 0.75, 2) * size
    y, x = np.mgrid[:size, :size]
    y, x = y - centre[0], x - centre[1]
    angle = np.arctan2(y, x)
    edge = np.ones_like(angle)
    for wave in range(2, 6):
        edge += rng.uniform(0.05, 0.35) / wave * np.cos(wave * angle + rng.uniform(0, 2 * np.pi))
    stretch = rng.uniform(0.7, 1.4)
    distance = np.hypot(y * stretch, x / stretch)
    alpha: Array = 1 / (1 + np.exp(np.clip((distance - radius * size * edge) / (0.5 * soft), -50, 50)))
    return alpha
