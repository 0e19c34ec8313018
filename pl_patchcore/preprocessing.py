"""Image file -> input of the backbone, one image at a time.

Reads an image file, resizes, crops and normalises it, and remembers which part of the original the crop covers.
Each image is handled alone, so that a score never depends on its neighbours in the batch. Next: `data/base.py`,
which makes samples and batches of it.

The paper says "resized and center cropped to 256x256 and 224x224": ``resize_mode="squash"`` resizes to exactly
256x256. The authors' code resizes the shorter side (``"shorter_side"``), which on elongated images crops more.
"""

from __future__ import annotations

import io
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms.functional import InterpolationMode, normalize, resize

from pl_patchcore.errors import UserError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
UNKNOWN = 255  # mask value of pixels that no pixel figure counts
_ORIENTATION = 274  # EXIF tag
_UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)  # what Pillow raises for a bad file


@dataclass(frozen=True)
class Preprocessing:
    """Resize, centre crop and normalise a PIL image into the backbone's input.

    Args:
        resize: Size before the crop, in pixels: one number, ``(height, width)``, or None to leave it.
        crop: Size of the centre crop, one number, ``(height, width)``, or None for no crop.
        resize_mode: ``squash`` resizes both sides to ``resize``, ignoring the aspect ratio; ``shorter_side``
            resizes the shorter side to ``resize`` (one number) and keeps the aspect ratio.
        interpolation: Filter of the image's resize (antialiased); masks always take the nearest pixel.
        mean: Subtracted per RGB channel, in units of [0, 1].
        std: Divided by per RGB channel, in units of [0, 1].

    Raises:
        UserError: If a size is not positive or the crop is larger than the resized image.

    Example:
        >>> Preprocessing()(Image.new("RGB", (300, 200))).shape
        torch.Size([3, 224, 224])
    """

    resize: int | tuple[int, int] | None = 256
    crop: int | tuple[int, int] | None = 224
    resize_mode: Literal["squash", "shorter_side"] = "squash"
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    def __post_init__(self) -> None:
        for name in ("resize", "crop", "mean", "std"):
            if np.ndim(value := getattr(self, name)):  # lists and arrays become tuples of plain numbers
                object.__setattr__(self, name, tuple(np.asarray(value).tolist()))
        for name, size in (("resize", self.resize), ("crop", self.crop)):
            if size is not None and (np.shape(size) not in ((), (2,)) or np.min(size) < 1):
                raise UserError(f"{name} must be at least 1 pixel, one number or (height, width), got {size}.")
        if self.resize_mode not in ("squash", "shorter_side"):
            raise UserError(f"resize_mode must be 'squash' or 'shorter_side', got {self.resize_mode!r}.")
        if self.interpolation not in ("bilinear", "bicubic"):
            raise UserError(f"interpolation must be 'bilinear' or 'bicubic', got {self.interpolation!r}.")
        if self.resize_mode == "shorter_side" and isinstance(self.resize, tuple):
            raise UserError(f"resize_mode 'shorter_side' takes one number for resize, got {self.resize}.")
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise UserError(f"mean and std take three numbers, std positive; got {self.mean} and {self.std}.")
        # shorter_side makes the other side at least as long, so this bound holds for it too
        if self.resize is not None and self.crop is not None and np.any(np.greater(self.crop, self.resize)):
            raise UserError(f"crop {self.crop} is larger than the resized image ({self.resize}); change one of them.")

    @property
    def size(self) -> tuple[int, int] | None:
        """Height and width of the input; None where they depend on the image."""
        size = self.resize if self.crop is None and self.resize_mode == "squash" else self.crop
        return (size, size) if isinstance(size, int) else size

    def apply(self, image: Image.Image, mask: np.ndarray | None = None) -> dict[str, Tensor]:
        """Take an image, and its mask, through the same geometry.

        Args:
            image: RGB.
            mask: uint8 ``(H0, W0)``, of the image's size; it is resized to the nearest pixel.

        Returns:
            ``image`` float32 ``(3, H, W)``, normalised; ``mask`` uint8 ``(H, W)``, where one was given;
            ``original_size`` int64 ``(2,)``, height and width; ``crop_box`` float32 ``(4,)``, the part of the
            original that the input covers: top, left, bottom, right in pixels of the original, fractional.

        Raises:
            UserError: If the image is smaller than the crop.
        """
        resized = image
        if self.resize is not None:
            side = self.resize_mode == "squash" and isinstance(self.resize, int)
            size = (self.resize, self.resize) if side else self.resize
            resized = resize(image, size, InterpolationMode(self.interpolation))
        width, height = resized.size
        rows, columns = self.crop if isinstance(self.crop, tuple) else (self.crop or height, self.crop or width)
        if rows > height or columns > width:
            raise UserError(f"crop {self.crop} is larger than an image of {height}x{width} pixels; set resize.")
        top, left = round((height - rows) / 2), round((width - columns) / 2)
        crop = (left, top, left + columns, top + rows)
        pixels = torch.from_numpy(np.array(resized.crop(crop))).permute(2, 0, 1).contiguous()  # (3, H, W)
        down, across = image.height / height, image.width / width  # pixels of the original per pixel
        covered = (top * down, left * across, (top + rows) * down, (left + columns) * across)
        result = {
            "image": normalize(pixels.to(torch.float32).div_(255), self.mean, self.std, inplace=True),
            "original_size": torch.tensor((image.height, image.width), dtype=torch.int64),
            "crop_box": torch.tensor(covered, dtype=torch.float32),
        }
        if mask is not None:
            nearest = Image.fromarray(mask).resize(resized.size, Image.Resampling.NEAREST)
            result["mask"] = torch.from_numpy(np.array(nearest.crop(crop)))
        return result

    def __call__(self, image: Image.Image) -> Tensor:
        """Turn an RGB image into a float32 tensor ``(3, H, W)``, normalised."""
        return self.apply(image)["image"]

    def denormalise(self, image: Tensor) -> Tensor:
        """Undo the normalisation of ``(..., 3, H, W)``: RGB in [0, 1], for pictures."""
        mean, std = torch.tensor([self.mean, self.std], dtype=torch.float32, device=image.device)[..., None, None]
        rgb: Tensor = (image * std + mean).clamp(0, 1)
        return rgb

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers, strings and lists, as stored in checkpoints."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}


def read_image(path: Path) -> Image.Image:
    """Read an image file as 8-bit RGB, upright.

    EXIF orientation is applied; grey is repeated to three channels; 16-bit grey is scaled from its full range;
    an alpha channel is dropped (the colours under it are kept).

    Raises:
        UserError: If the file is missing, not an image, cut short, or holds floating-point pixels.
    """
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
    except _UNREADABLE as error:
        raise _unreadable(path, error) from error
    if image.mode == "F" or (image.mode == "I" and image.getextrema()[1] > 65535):  # type: ignore[operator]
        raise UserError(f"{path}: pixels of mode {image.mode} have no defined range; save it with 8 or 16 bits.")
    if image.mode.startswith("I"):
        grey = np.asarray(image).astype(np.float32) / 257  # 65535 -> 255
        image = Image.fromarray(grey.round().astype(np.uint8))
    return image.convert("RGB")


def check_image(path: Path) -> tuple[int, int]:
    """Check an image file by its header and, of JPEG and PNG, its end marker; without that it is decoded.

    Returns:
        Height and width, upright.

    Raises:
        UserError: As `read_image`.
    """
    try:
        with path.open("rb") as file, Image.open(file) as image:
            width, height = image.size
            if image.getexif().get(_ORIENTATION, 1) >= 5:  # quarter turns
                width, height = height, width
            marker = {"JPEG": b"\xff\xd9", "PNG": b"IEND"}.get(image.format or "", b"")
            file.seek(0, io.SEEK_END)
            file.seek(max(0, file.tell() - 64))
            whole = marker in file.read()
    except _UNREADABLE as error:
        raise _unreadable(path, error) from error
    if not whole:
        read_image(path)
    return height, width


def _unreadable(path: Path, error: Exception) -> UserError:
    if path.is_dir():
        return UserError(f"{path}: is a folder where an image file should be; take it out of the data set.")
    if not path.exists():
        return UserError(f"{path}: no such file; restore it or take it out of the data set.")
    reason = "not an image" if isinstance(error, UnidentifiedImageError) else error
    return UserError(f"{path}: cannot be read ({reason}); replace the file or take it out of the data set.")
