"""Image file -> input of the backbone, one image at a time.

Reads an image or mask file, resizes, crops and normalises it, and remembers which part of the original the
crop covers. Each image is handled alone, in the data set, so that a score never depends on its neighbours in
the batch. Next: `patch_features.py`.

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
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as tvf

from pl_patchcore.errors import UserError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
UNKNOWN = 255  # mask value of pixels that no pixel figure counts
_ORIENTATION = 274  # EXIF tag


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
        for name, size in (("resize", self.resize), ("crop", self.crop)):
            if size is not None and min(_pair(size)) < 1:
                raise UserError(f"{name} must be at least 1 pixel, got {size}.")
        if self.resize_mode not in ("squash", "shorter_side"):
            raise UserError(f"resize_mode must be 'squash' or 'shorter_side', got {self.resize_mode!r}.")
        if self.interpolation not in ("bilinear", "bicubic"):
            raise UserError(f"interpolation must be 'bilinear' or 'bicubic', got {self.interpolation!r}.")
        if self.resize_mode == "shorter_side" and isinstance(self.resize, tuple | list):
            raise UserError(f"resize_mode 'shorter_side' takes one number for resize, got {self.resize}.")
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise UserError(f"mean and std take three numbers, std positive; got {self.mean} and {self.std}.")
        if self.resize is not None and self.crop is not None:
            # shorter_side makes the other side at least as long, so this bound holds for it too
            fits = [c <= r for c, r in zip(_pair(self.crop), _pair(self.resize), strict=True)]
            if not all(fits):
                raise UserError(
                    f"crop {self.crop} is larger than the resized image ({self.resize}); lower crop or raise resize."
                )

    def __call__(self, image: Image.Image) -> Tensor:
        """Turn an RGB image into a float32 tensor ``(3, H, W)``, normalised."""
        resized = self._resize(image, InterpolationMode(self.interpolation))
        tensor: Tensor = tvf.normalize(tvf.to_tensor(self._crop(resized)), list(self.mean), list(self.std))
        return tensor

    def mask(self, mask: np.ndarray) -> Tensor:
        """Take a ``uint8`` mask ``(H0, W0)`` of the original through the same geometry, nearest pixel."""
        resized = self._resize(Image.fromarray(mask), InterpolationMode.NEAREST)
        return torch.from_numpy(np.array(self._crop(resized)))

    def crop_box(self, size: tuple[int, int]) -> tuple[float, float, float, float]:
        """Part of an original of ``size`` (height, width) that the input covers.

        Returns:
            ``(top, left, bottom, right)`` in pixels of the original, fractional.
        """
        height, width = self._resized(size)
        rows, columns = (height, width) if self.crop is None else _pair(self.crop)
        top, left = round((height - rows) / 2), round((width - columns) / 2)  # as torchvision's center_crop
        down, across = size[0] / height, size[1] / width
        return top * down, left * across, (top + rows) * down, (left + columns) * across

    def denormalise(self, image: Tensor) -> Tensor:
        """Undo the normalisation of ``(..., 3, H, W)``: RGB in [0, 1], for pictures."""
        mean, std = (torch.tensor(v, device=image.device).view(3, 1, 1) for v in (self.mean, self.std))
        return (image * std + mean).clamp(0, 1)

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers, strings and lists, as stored in checkpoints."""
        return {k: list(v) if isinstance(v, tuple | list) else v for k, v in asdict(self).items()}

    def _resized(self, size: tuple[int, int]) -> tuple[int, int]:
        if self.resize is None:
            return size
        if self.resize_mode == "squash":
            return _pair(self.resize)
        target = _pair(self.resize)[0]
        height, width = size
        if height <= width:
            return target, int(target * width / height)
        return int(target * height / width), target

    def _resize(self, image: Image.Image, interpolation: InterpolationMode) -> Image.Image:
        size = self._resized((image.height, image.width))
        resized: Image.Image = tvf.resize(image, list(size), interpolation)
        return resized

    def _crop(self, image: Image.Image) -> Image.Image:
        if self.crop is None:
            return image
        rows, columns = _pair(self.crop)
        if rows > image.height or columns > image.width:
            raise UserError(
                f"crop {self.crop} is larger than an image of {image.height}x{image.width} pixels; set resize."
            )
        cropped: Image.Image = tvf.center_crop(image, [rows, columns])
        return cropped


def read_image(path: Path) -> Image.Image:
    """Read an image file as 8-bit RGB, upright.

    EXIF orientation is applied; grey is repeated to three channels; 16-bit grey is scaled from its full range;
    an alpha channel is dropped (the colours under it are kept).

    Args:
        path: Image file in any format Pillow reads.

    Returns:
        RGB image.

    Raises:
        UserError: If the file is missing, not an image, cut short, or holds floating-point pixels.
    """
    image = ImageOps.exif_transpose(_open(path))
    if image.mode == "F" or (image.mode == "I" and image.getextrema()[1] > 65535):  # type: ignore[operator]
        raise UserError(f"{path}: pixels of mode {image.mode} have no defined range; save it with 8 or 16 bits.")
    if image.mode.startswith("I"):
        grey = np.asarray(image).astype(np.float32) / 257  # 65535 -> 255
        image = Image.fromarray(grey.round().astype(np.uint8))
    return image.convert("RGB")


def read_mask(path: Path, threshold: int = 127) -> np.ndarray:
    """Read a ground-truth mask.

    Args:
        path: Image file, grey (of several channels the brightest counts).
        threshold: Grey levels above it, of 0 to 255, are anomalous; what lies below (soft edges of drawn masks)
            is nominal. The original's levels are cut before any resize.

    Returns:
        uint8 ``(H, W)``: 1 anomalous, 0 nominal.

    Raises:
        UserError: If the file cannot be read.
    """
    image = ImageOps.exif_transpose(_open(path))
    if image.mode == "1":
        levels = np.asarray(image).astype(np.uint8) * 255
    elif image.mode.startswith("I"):
        levels = (np.asarray(image) // 257).astype(np.uint8)
    else:
        levels = np.asarray(image.convert("RGB")).max(axis=2)
    return (levels > threshold).astype(np.uint8)


def check_image(path: Path) -> tuple[int, int]:
    """Check an image file without decoding it, where that is enough.

    Reads the header and the end marker of JPEG and PNG files (about 0.1 ms); a file without its end marker is
    decoded, and refused if that fails.

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
            if marker not in file.read():
                _open(path)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        if isinstance(error, UserError):
            raise
        raise _unreadable(path, error) from error
    return height, width


def _open(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            image.load()
            return image
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> UserError:
    if path.is_dir():
        return UserError(f"{path}: is a folder where an image file should be; take it out of the data set.")
    if not path.exists():
        return UserError(f"{path}: no such file; restore it or take it out of the data set.")
    reason = "not an image" if isinstance(error, UnidentifiedImageError) else error
    return UserError(f"{path}: cannot be read ({reason}); replace the file or take it out of the data set.")


def _pair(size: int | tuple[int, int] | list[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])
