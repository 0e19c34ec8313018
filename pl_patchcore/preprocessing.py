"""Image of any kind -> input of the backbone, one image at a time.

Reads an image file, a PIL image, an array or a tensor, paints over what does not count (`roi.py`), resizes, crops and
normalises it, and remembers which part of the original the crop covers.
Each image is handled alone, so that a score never depends on its neighbours in the batch. Next: `data/base.py`,
which makes samples and batches of it.

The paper says "resized and center cropped to 256x256 and 224x224": ``resize_mode="squash"`` resizes to exactly
256x256. The authors' code resizes the shorter side (``"shorter_side"``), which on elongated images crops more.
"""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from pl_patchcore.errors import UserError
from pl_patchcore.resize import resized

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
MOST_PIXELS = 16_384  # of a side
UNKNOWN = 255  # mask value of pixels that no pixel figure counts
UNNAMED = ("max_pixels", "roi", "ignore", "levels")  # settings on which the patch features of an image do not depend
BAND = 256  # rows of an image that are converted at once, of which there are several copies meanwhile
_ORIENTATION = 274  # EXIF tag
# no EPS among them, for which Pillow would start another program
_FORMATS = ("BMP", "DIB", "GIF", "JPEG", "JPEG2000", "PCX", "PNG", "PPM", "SGI", "TGA", "TIFF", "WEBP")
Image.init()  # Pillow's formats are loaded here, not with the first image, which would take twice as long
_NORMALISED = 3  # no level of an image normalised as usual lies above that
_LARGER = "raise model.images.max_pixels to allow so large an image."
_GREY_ONLY = "model.images.bits is for grey images; save this one with 8 bits a channel."
_pillows_limit = threading.Lock()  # that limit belongs to the whole process
ImageLike = str | os.PathLike[str] | Image.Image | np.ndarray | Tensor  # what `read_image` reads
Color = Literal["rgb", "bgr"]  # order of the channels
ResizeMode = Literal["squash", "shorter_side", "longer_side"]
ResizeBy = Literal["pillow", "tensors"]


@dataclass(frozen=True)
class Preprocessing:
    """Resize, centre crop and normalise a PIL image into the backbone's input.

    Args:
        resize: Size before the crop, in pixels: one number, ``(height, width)``, or None to leave it.
        crop: Size of the centre crop, one number, ``(height, width)``, or None for no crop.
        resize_mode: ``squash`` resizes both sides to ``resize``, ignoring the aspect ratio; ``shorter_side``
            resizes the shorter side to ``resize`` (one number) and keeps the aspect ratio; ``longer_side`` fits the
            image into ``resize``, keeps the aspect ratio, and fills the rest evenly with the image's edges.
        interpolation: Filter of the image's resize (antialiased); masks always take the nearest pixel.
        mean: Subtracted per RGB channel, in units of [0, 1].
        std: Divided by per RGB channel, in units of [0, 1].
        bits: As `read_image`; kept here as it belongs to what the model has seen.
        max_pixels: As `read_image`.
        roi: Where images count, in pixels of the original: a box ``[left, top, right, bottom]``, a polygon
            ``[[x, y], ...]``, a list of these, the path of a mask image, or of a folder of masks by the image's name;
            None: everywhere. What does not count is painted over with the mean of the normalisation.
        ignore: Where they do not count, likewise.
        levels: Give images as levels of 8 bits, not normalised: a quarter of the memory.
        crop_multiple: Leave rows at the bottom and columns at the right out, so that both sides of the input are
            multiples of so many pixels; None: not.
        resize_by: ``pillow`` resizes by Pillow, which rounds to 8 bits; ``tensors`` by `resize.resized`, the same
            filter unrounded, so that other programs can do exactly the same. With ``levels`` it is rounded as well.

    Raises:
        UserError: If a size is not positive, the crop is larger than the resized image, or ``roi`` or ``ignore`` is
            none of these.

    Example:
        >>> Preprocessing()(Image.new("RGB", (300, 200))).shape
        torch.Size([3, 224, 224])
    """

    resize: int | tuple[int, int] | None = 256
    crop: int | tuple[int, int] | None = 224
    resize_mode: ResizeMode = "squash"
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    bits: int | None = None
    max_pixels: int | None = None
    roi: Sequence[Any] | str | None = None
    ignore: Sequence[Any] | str | None = None
    levels: bool = False
    crop_multiple: int | None = None
    resize_by: ResizeBy = "pillow"

    def __post_init__(self) -> None:
        for name in ("resize", "crop", "mean", "std"):
            if np.ndim(value := getattr(self, name)):  # lists and arrays become tuples of plain numbers
                object.__setattr__(self, name, tuple(np.asarray(value).tolist()))
        for name, size in (("resize", self.resize), ("crop", self.crop)):
            if size is not None and (np.shape(size) not in ((), (2,)) or np.min(size) < 1):
                raise UserError(f"{name} must be at least 1 pixel, one number or (height, width), got {size}.")
            if size is not None and np.max(size) > MOST_PIXELS:
                raise UserError(f"{name} must be at most {MOST_PIXELS} pixels, got {size}.")
        if self.resize_mode not in get_args(ResizeMode):
            raise UserError(f"resize_mode must be 'squash', 'shorter_side' or 'longer_side', got {self.resize_mode!r}.")
        if self.interpolation not in ("bilinear", "bicubic"):
            raise UserError(f"interpolation must be 'bilinear' or 'bicubic', got {self.interpolation!r}.")
        if self.resize_by not in get_args(ResizeBy):
            raise UserError(f"resize_by must be 'pillow' or 'tensors', got {self.resize_by!r}.")
        if self.resize_mode == "shorter_side" and isinstance(self.resize, tuple):
            raise UserError(f"resize_mode 'shorter_side' takes one number for resize, got {self.resize}.")
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise UserError(f"mean and std take three numbers, std positive; got {self.mean} and {self.std}.")
        if self.bits is not None and not 1 <= self.bits <= 31:
            raise UserError(f"images.bits must be from 1 to 31, got {self.bits}.")
        if self.max_pixels is not None and self.max_pixels < 1:
            raise UserError(f"images.max_pixels must be at least 1, got {self.max_pixels}.")
        # shorter_side makes the other side at least as long, so this bound holds for it too
        if self.resize is not None and self.crop is not None and np.any(np.greater(self.crop, self.resize)):
            raise UserError(f"crop {self.crop} is larger than the resized image ({self.resize}); change one of them.")
        if self.crop_multiple is not None and not 1 <= self.crop_multiple <= min(self.size or (MOST_PIXELS,)):
            raise UserError(f"images.crop_multiple must be from 1 to the input's sides, got {self.crop_multiple}.")
        if self.marks:
            from pl_patchcore.roi import checked  # which imports this file

            for name, where in self.marks:
                object.__setattr__(self, name, checked(name, where))

    @property
    def marks(self) -> list[tuple[str, Any]]:
        """Options that say where images count, by name."""
        return [(name, where) for name in ("roi", "ignore") if (where := getattr(self, name)) is not None]

    @property
    def size(self) -> tuple[int, int] | None:
        """Height and width of the input; None where they depend on the image."""
        size = self.resize if self.crop is None and self.resize_mode != "shorter_side" else self.crop
        if size is None:
            return None
        height, width = (size, size) if isinstance(size, int) else size
        step = self.crop_multiple or 1
        return height - height % step, width - width % step

    @property
    def paint(self) -> tuple[int, int, int]:
        """RGB levels of the mean of the normalisation, which covers what does not count."""
        red, green, blue = (round(255 * min(max(m, 0), 1)) for m in self.mean)
        return red, green, blue

    def left_out(self, original: tuple[int, int] | None = None) -> float:
        """Share of an image's area, in [0, 1), that the crop leaves out.

        Args:
            original: Height and width of the image; None if they are not known: 0 where they would matter.

        Example:
            >>> round(Preprocessing().left_out(), 3)
            0.234
        """
        if original is None:
            if self.resize is None or self.resize_mode != "squash":
                return 0.0
            original = (MOST_PIXELS, MOST_PIXELS)  # whichever
        top, left, bottom, right = self.geometry(*original).box
        rows, columns = (
            min(high, side) - max(low, 0)
            for low, high, side in zip((top, left), (bottom, right), original, strict=True)
        )
        return 1 - rows * columns / (original[0] * original[1])

    def geometry(self, height: int, width: int) -> Geometry:
        """Where an image of some size goes.

        Raises:
            UserError: If it is smaller than the crop.
        """
        fitted, frame = (height, width), (height, width)
        if self.resize is not None:
            frame = self.resize if isinstance(self.resize, tuple) else (self.resize, self.resize)
            if self.resize_mode == "shorter_side":  # as torchvision rounds
                short, long = sorted((height, width))
                longer = int(frame[0] * long / short)
                frame = (frame[0], longer) if height <= width else (longer, frame[0])
            fitted = frame
            if self.resize_mode == "longer_side":
                scale = min(frame[0] / height, frame[1] / width)
                fitted = max(1, round(scale * height)), max(1, round(scale * width))
        rows, columns = self.crop if isinstance(self.crop, tuple) else (self.crop or frame[0], self.crop or frame[1])
        # of the frame's middle, then of the image's within the frame
        top, left = (
            round((of - size) / 2) - round((of - inner) / 2)
            for of, size, inner in zip(frame, (rows, columns), fitted, strict=True)
        )
        step = self.crop_multiple or 1
        bottom, right = top + rows - rows % step, left + columns - columns % step
        if bottom == top or right == left:
            raise UserError(f"images.crop_multiple {step} leaves nothing of {rows}x{columns} pixels; raise resize.")
        if rows > frame[0] or columns > frame[1]:
            raise UserError(f"crop {self.crop} is larger than an image of {frame[0]}x{frame[1]} pixels; set resize.")
        down, across = height / fitted[0], width / fitted[1]
        return Geometry(
            fitted,
            rows=slice(max(0, top), min(bottom, fitted[0])),
            columns=slice(max(0, left), min(right, fitted[1])),
            edges=[(max(0, -top), max(0, bottom - fitted[0])), (max(0, -left), max(0, right - fitted[1]))],
            box=(top * down, left * across, bottom * down, right * across),
        )

    def scale(self, height: int, width: int) -> tuple[float, float]:
        """Pixels of an image of some size per pixel of the input, down and across."""
        fitted = self.geometry(height, width).fitted
        return height / fitted[0], width / fitted[1]

    def region(self, size: tuple[int, int], path: str | os.PathLike[str] | None = None) -> np.ndarray | None:
        """Which pixels of an image count, uint8 ``size``, not to be written to; None: all, as no option says otherwise.

        Args:
            size: Height and width of the image.
            path: File of the image, by whose name a folder of masks is looked at.

        Raises:
            UserError: If none does, or as `roi.marked`.
        """
        if not self.marks:
            return None
        from pl_patchcore.roi import marked  # which imports this file

        file = None if path is None else Path(path)
        found = {name: marked(name, where, size, file, self.max_pixels) for name, where in self.marks}
        counts = found["roi"] if "roi" in found else ~found["ignore"]
        if len(found) == 2:
            counts = counts & ~found["ignore"]
        if not counts.any():
            image = "an image in memory" if file is None else shown(file)
            raise UserError(f"{image}: no pixel of its {size[0]}x{size[1]} counts; change {' and '.join(found)}.")
        return counts.view(np.uint8)

    def check_region(self, size: tuple[int, int], path: Path) -> None:
        """Refuse what `region` refuses, as far as it shows without decoding a mask of the image's own.

        Raises:
            UserError: As `region`.
        """
        if self.marks:
            from pl_patchcore.roi import check_marked  # which imports this file

            for name, where in self.marks:
                check_marked(name, where, size, path, self.max_pixels)

    def apply(
        self, image: Image.Image, mask: np.ndarray | None = None, path: str | os.PathLike[str] | None = None
    ) -> dict[str, Tensor]:
        """Take an image, and its mask, through the same geometry.

        Args:
            image: RGB.
            mask: uint8 ``(H0, W0)``, of the image's size; it is resized to the nearest pixel.
            path: File of the image, by whose name ``roi`` and ``ignore`` find its mask in a folder.

        Returns:
            ``image`` float32 ``(3, H, W)``, normalised, or uint8 where ``levels`` says so; ``mask`` uint8 ``(H, W)``,
            where one was given, `UNKNOWN` where the image does not count and beyond its edges; ``original_size`` int64
            ``(2,)``, height and width; ``crop_box`` float32 ``(4,)``, the part of the original that the input covers:
            top, left, bottom, right in pixels of the original, fractional, beyond it where edges were repeated;
            ``region`` uint8 ``(H0, W0)``, 1 where a pixel of the original counts, where ``roi`` or ``ignore`` is set.

        Raises:
            UserError: If the image is smaller than the crop, or as `region`.
        """
        height, width = image.height, image.width
        fitted, rows, columns, edges, box = geometry = self.geometry(height, width)
        region = self.region((height, width), path) if self.roi is not None or self.ignore is not None else None
        if region is not None:
            image = image.copy()
            image.paste(self.paint, None, Image.fromarray(region == 0))
        if fitted != (height, width) and self.resize_by == "tensors":
            pixels = self._resized(image, geometry)
        else:
            if fitted != (height, width):
                image = image.resize(fitted[::-1], Image.Resampling[self.interpolation.upper()])
            pixels = torch.from_numpy(_cut_out(image, rows, columns, edges))
        result = {
            "image": pixels if self.levels else normalised(pixels, self.mean, self.std),
            "original_size": torch.tensor((height, width), dtype=torch.int64),
            "crop_box": torch.tensor(box, dtype=torch.float32),
        }
        if region is not None:
            result["region"] = torch.from_numpy(region.copy())
        if mask is not None:
            if region is not None:
                mask = np.where(region, mask, np.uint8(UNKNOWN))
            if fitted != (height, width):
                mask = np.asarray(Image.fromarray(mask).resize(fitted[::-1], Image.Resampling.NEAREST))
            result["mask"] = torch.from_numpy(np.pad(mask[rows, columns], edges, constant_values=UNKNOWN))
        return result

    def _resized(self, image: Image.Image, geometry: Geometry) -> Tensor:
        """Resize and crop in tensors: ``(3, H, W)``, float32, or uint8 where ``levels`` says so."""
        fitted, rows, columns, ((above, below), (before, behind)), _ = geometry
        first = rows.start - above, columns.start - before
        height, width = rows.stop + below - first[0], columns.stop + behind - first[1]
        given = torch.from_numpy(np.array(image))[None]  # (1, H0, W0, 3)
        pixels = torch.empty((3, height, width), dtype=torch.uint8 if self.levels else torch.float32)
        for start in range(0, height, BAND):
            count = min(BAND, height - start), width
            band = resized(given, fitted, (first[0] + start, first[1]), count, self.interpolation)[0]
            pixels[:, start : start + BAND] = band.round_() if self.levels else band
        return pixels

    def read(self, image: ImageLike, color: Color = "rgb") -> Image.Image:
        """Read an image of any kind as 8-bit RGB, upright: see `read_image`."""
        return read_image(image, color, self.bits, self.max_pixels)

    def __call__(self, image: ImageLike, color: Color = "rgb") -> Tensor:
        """Turn an image of any kind into a float32 tensor ``(3, H, W)``, normalised.

        Args:
            image: See `read_image`.
            color: Order of the channels of an array or a tensor.

        Raises:
            UserError: As `read_image` and `apply`.
        """
        path = image if isinstance(image, str | os.PathLike) else None
        pixels = self.apply(self.read(image, color), path=path)["image"]
        return normalised(pixels, self.mean, self.std) if self.levels else pixels

    def denormalise(self, image: Tensor) -> Tensor:
        """Undo the normalisation of ``(..., 3, H, W)``: RGB in [0, 1], for pictures; levels of 8 bits have none."""
        if image.dtype == torch.uint8:
            return image.float() / 255
        mean, std = torch.tensor([self.mean, self.std], dtype=torch.float32, device=image.device)[..., None, None]
        rgb: Tensor = (image.float() * std + mean).clamp(0, 1)
        return rgb

    def as_dict(self) -> dict[str, Any]:
        """What an image becomes by: plain numbers, strings and lists, as stored in checkpoints."""
        settings = {name: value for name, value in asdict(self).items() if name not in UNNAMED}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in settings.items()}


def normalised(levels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Normalise levels of 8 bits ``(..., 3, H, W)``, by a mean and standard deviation of [0, 1]: float32."""
    shift, scale = (levels.new_tensor(each, dtype=torch.float32)[:, None, None] for each in (mean, std))
    return levels.to(torch.float32).div_(255).sub_(shift).div_(scale)


class Geometry(NamedTuple):
    """Where an image goes. The input is a part of the fitted image, with edges repeated beyond it."""

    fitted: tuple[int, int]  # height and width after the resize
    rows: slice  # of the fitted image that are in the input
    columns: slice
    edges: list[tuple[int, int]]  # rows and columns beyond it, at the start and at the end
    box: tuple[float, float, float, float]  # top, left, bottom, right of the input in pixels of the original

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the input."""
        height, width = (part.stop - part.start + sum(edge) for part, edge in zip(self[1:3], self.edges, strict=True))
        return height, width


def _cut_out(image: Image.Image, rows: slice, columns: slice, edges: list[tuple[int, int]]) -> np.ndarray:
    """Part of an image as uint8 ``(3, H, W)``, with edges repeated; takes next to no other memory."""
    pixels = np.empty((3, rows.stop - rows.start, columns.stop - columns.start), np.uint8)
    for start in range(rows.start, rows.stop, BAND):
        stop = min(start + BAND, rows.stop)
        band = np.asarray(image.crop((columns.start, start, columns.stop, stop)))  # (n, W, 3)
        pixels[:, start - rows.start : stop - rows.start] = band.transpose(2, 0, 1)
    return np.pad(pixels, [(0, 0), *edges], mode="edge") if np.any(edges) else pixels


class Header(NamedTuple):
    """What an image file says undecoded: height and width, upright; whether it has more than 8 bits; pages."""

    size: tuple[int, int]
    deep: bool
    pages: int


def read_image(
    image: ImageLike, color: Color = "rgb", bits: int | None = None, max_pixels: int | None = None
) -> Image.Image:
    """Read an image of any kind as 8-bit RGB, upright; a file and what is in memory of the same pixels give the same.

    EXIF orientation is applied; grey is repeated to three channels; an alpha channel is dropped (the colours under it
    are kept); of several pages the first is read. The scale of more than 8 bits is never taken from the pixels.

    Args:
        image: Path of a file; a PIL image; an array ``(H, W)``, ``(H, W, 3)`` or ``(H, W, 4)``, uint8, uint16, or
            floating-point in [0, 1]; or a tensor ``(3, H, W)``, uint8, or floating-point in [0, 1], which is an image
            before normalisation. A fourth channel is alpha, and dropped. Floating-point numbers are rounded to 8 bits.
        color: Order of the channels of an array or a tensor; ``bgr`` is OpenCV's. A file and a PIL image know theirs.
        bits: Grey images of more than 8 bits a pixel, arrays ``(H, W)`` of uint16 among them, are scaled from
            ``0 ... 2**bits - 1`` (12 for a camera of 12 bits whose images are in 16); None: from the full range of 16
            bits. A file of 12 bits tells its scale itself.
        max_pixels: Largest image that is opened; None: Pillow's limit, 178,956,970, for files, and none for others.

    Raises:
        UserError: If it is none of these; if a file is missing, no regular file, not an image or cut short; if it is
            larger than ``max_pixels``, or its pixels have no defined range.

    Example:
        >>> read_image(np.array([[[255, 0, 0]]], np.uint8), color="bgr").getpixel((0, 0))
        (0, 0, 255)
    """
    if color not in ("rgb", "bgr"):
        raise UserError(f"color must be 'rgb' or 'bgr', got {color!r}.")
    if isinstance(image, str | os.PathLike):
        source = _opened(Path(image), max_pixels)
    elif isinstance(image, Image.Image):
        source = _opened(image, max_pixels, f"a PIL image of mode {image.mode}")
    elif isinstance(image, Tensor):
        name = f"a tensor of {tuple(image.shape)} {str(image.dtype).removeprefix('torch.')}"
        source = _opened(_of_array(_of_tensor(image), name, color, bits), max_pixels, name)
    elif isinstance(image, np.ndarray):
        name = f"an array of {image.shape} {image.dtype}"
        source = _opened(_of_array(image, name, color, bits), max_pixels, name)
    else:
        raise UserError(
            "an image must be a path, a PIL image, an array (H, W), (H, W, 3) or (H, W, 4), or a tensor (3, H, W), "
            f"got a {type(image).__name__}."
        )
    with source as opened:
        if bits is not None or opened.mode.startswith(("I", "F")):
            bits = _check_range(opened, bits)
        if isinstance(image, Image.Image):  # the caller's stays as it is
            upright = ImageOps.exif_transpose(opened)
        else:
            ImageOps.exif_transpose(upright := opened, in_place=True)  # large images: no copy more than it takes
        if upright.mode.startswith("I"):
            upright = Image.fromarray(_of_depth(np.asarray(upright), 2 ** (bits or 16) - 1))
        return upright if upright.mode == "RGB" else upright.convert("RGB")


def _of_depth(grey: np.ndarray, high: int) -> np.ndarray:
    """Levels 0 to ``high`` of a grey image brought to 8 bits."""
    if (lowest := int(grey.min())) < 0 or (highest := int(grey.max())) > high:
        found = f"level {lowest if lowest < 0 else highest}"
        raise UserError(f"holds {found}, outside of 0 to {high}; set model.images.bits, or save it anew.")
    levels = np.empty(grey.shape, np.uint8)
    for start in range(0, len(grey), BAND):
        levels[start : start + BAND] = (grey[start : start + BAND].astype(np.float32) / (high / 255)).round()
    return levels


def _of_tensor(image: Tensor) -> np.ndarray:
    """A tensor ``(3, H, W)`` as an array ``(H, W, 3)``."""
    if image.ndim != 3 or image.shape[0] != 3:
        remedy = "give list(images) of a batch" if image.ndim == 4 else "repeat grey, and put the channels first"
        raise UserError(f"a tensor of {tuple(image.shape)}: an image must be (3, H, W); {remedy}.")
    image = image.detach().permute(1, 2, 0).cpu()
    return (image.float() if image.is_floating_point() else image).numpy()


def _of_array(pixels: np.ndarray, name: str, color: Color, bits: int | None) -> Image.Image:
    """An array as the image that a file with these pixels gives."""
    if pixels.ndim != 2 and (pixels.ndim != 3 or pixels.shape[2] not in (3, 4)):
        remedy = "give list(images) of a batch" if pixels.ndim == 4 else "put the channels last"
        raise UserError(f"{name}: an image must be (H, W), (H, W, 3) or (H, W, 4); {remedy}.")
    if not pixels.size:
        raise UserError(f"{name}: holds no pixel; give an image that has some.")
    if pixels.dtype.kind == "f":
        pixels = _of_floats(pixels, name)
    if pixels.dtype.kind != "u" or pixels.dtype.itemsize > 2:
        raise UserError(f"{name}: an image must be uint8, uint16, or floating-point in [0, 1]; give one of these.")
    if pixels.ndim == 3:
        pixels = pixels[..., :3] if color == "rgb" else pixels[..., 2::-1]
        if pixels.dtype.itemsize == 2:
            if bits not in (None, 16):
                raise UserError(f"{name}: {_GREY_ONLY}")
            pixels = pixels >> 8  # as Pillow reads files of 16 bits a channel
    return Image.fromarray(pixels.astype(np.uint16 if pixels.ndim == 2 and pixels.dtype.itemsize == 2 else np.uint8))


def _of_floats(pixels: np.ndarray, name: str) -> np.ndarray:
    """Levels uint8 of floating-point numbers in [0, 1]."""
    lowest, highest = float(pixels.min()), float(pixels.max())
    levels = np.rint(pixels.astype(np.float32) * 255)
    if levels.min() >= 0 and levels.max() <= 255:
        return levels.astype(np.uint8)
    remedy = (
        "look for NaN and infinity" if not np.isfinite((lowest, highest)).all()
        else "give the image before its normalisation, or call the model itself: model(images)"
        if lowest < 0 or highest <= _NORMALISED
        else "give uint8, or divide by 255" if highest <= 255
        else "give uint16, or divide by the highest level there can be"
    )  # fmt: skip
    raise UserError(f"{name} in {lowest:.4g}..{highest:.4g}: floating-point images are in 0..1; {remedy}.")


def read_mask(path: Path, max_pixels: int | None = None) -> np.ndarray:
    """Read the levels of a mask file, upright: uint8 ``(H, W)``, or int64 where it has more than 8 bits a pixel.

    Of several channels the brightest counts. Where the colours are all one and an alpha channel is not, that is the
    mask.

    Raises:
        UserError: As `read_image`; if levels are negative or no whole numbers, or colours and alpha contradict.
    """
    with _opened(path, max_pixels) as file:
        image = ImageOps.exif_transpose(file)
        if image.mode.startswith(("I", "F")):
            deep = np.asarray(image)
            if not np.isfinite(deep).all() or (deep < 0).any() or (deep != deep.round()).any():
                raise UserError("a mask needs whole levels from 0 up; save it with 0 and 255.")
            return deep.astype(np.int64)
        if image.mode in ("1", "L"):
            return np.asarray(image.convert("L"))
        levels: np.ndarray = np.asarray(image.convert("RGB")).max(axis=2)
        if image.mode in ("LA", "RGBA", "PA"):
            alpha = np.asarray(image.getchannel("A"))
            if alpha.min() != alpha.max() and ((alpha > 127) != (levels > 127)).any():
                if levels.min() != levels.max():
                    raise UserError("colours and alpha mark different pixels; save the mask without alpha.")
                return alpha
        return levels


def check_image(path: Path, bits: int | None = None, max_pixels: int | None = None, mask: bool = False) -> Header:
    """Check an image or mask file by its header and, of JPEG and PNG, its end marker; without that it is decoded.

    Raises:
        UserError: As `read_image`, or `read_mask`.
    """
    with _opened(path, max_pixels) as image:
        if not mask:
            _check_range(image, bits)
        width, height = image.size
        tags = getattr(image, "tag_v2", {})
        if image.format == "TIFF":  # some versions of Pillow give the upright size, some the stored one
            width, height = tags[256], tags[257]
        if (tags or image.getexif()).get(_ORIENTATION, 1) >= 5:  # quarter turns
            width, height = height, width
        pages = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)  # MPO: a JPEG with previews
        header = Header((height, width), _is_deep(image), pages)
        marker = {"JPEG": b"\xff\xd9", "PNG": b"IEND"}.get(image.format or "", b"")
    with path.open("rb") as raw:
        raw.seek(max(0, path.stat().st_size - 64))
        whole = marker in raw.read()
    if not whole and mask:
        read_mask(path, max_pixels)
    elif not whole:
        read_image(path, bits=bits, max_pixels=max_pixels)
    return header


def shown(path: str | Path) -> str:
    """A path as it may stand in a message: on one line, all of it printable."""
    name = os.fsencode(path).decode(errors="backslashreplace")
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in name)


def check_file(path: Path) -> None:
    """Refuse what must not be opened: no file, a folder, a pipe, a socket, a device, a name that is not UTF-8.

    Raises:
        UserError: Naming the file.
    """
    remedy = "take it out of the data set"
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise UserError(f"{shown(path)}: its name is not UTF-8; rename it, or {remedy}.") from None
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise UserError(f"{shown(path)}: no such file; restore it or {remedy}.") from None
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        raise UserError(f"{shown(path)}: cannot be read ({error}); restore it or {remedy}.") from error
    if stat.S_ISDIR(mode):
        raise UserError(f"{shown(path)}: is a folder where an image file should be; {remedy}.")
    if not stat.S_ISREG(mode):
        raise UserError(f"{shown(path)}: is a pipe, a socket or a device, and not opened; {remedy}.")


def _is_deep(image: Image.Image) -> bool:
    return image.mode.startswith(("I", "F")) or any("16" in str(tile) for tile in getattr(image, "tile", []))


def _check_range(image: Image.Image, bits: int | None) -> int | None:
    """Refuse pixels without a defined range; return the bits that the image, or else the option, says."""
    if image.mode.startswith("I;"):
        return 12 if getattr(image, "tag_v2", {}).get(258) == (12,) else bits  # 258: bits of a sample
    if image.mode == "I":
        if image.format in ("PNG", "PPM"):  # 16 bits; Pillow scales those of PPM to the full range
            return bits if image.format == "PNG" else 16
        if bits is not None:
            return bits
    if image.mode in ("I", "F"):
        kind, option = ("whole", " or set model.images.bits") if image.mode == "I" else ("floating-point", "")
        raise UserError(f"{kind} numbers of 32 bits have no defined range; save it with 8 or 16 bits{option}.")
    if bits not in (None, 16) and _is_deep(image):
        raise UserError(_GREY_ONLY)
    return bits


@contextmanager
def _opened(image: Path | Image.Image, max_pixels: int | None, name: str = "") -> Iterator[Image.Image]:
    """Open an image file, or take an image that is open already, whose ``name`` is for messages.

    Whatever is raised for it, then or while it is decoded, is a `UserError` that begins with its name.
    """
    if isinstance(image, Path):
        check_file(image)
    try:
        with ExitStack() as files:
            opened = image
            if isinstance(opened, Path):
                if max_pixels is not None:
                    files.enter_context(_own_limit())
                file = files.enter_context(opened.open("rb"))  # given the path, Pillow maps some files, and garbles
                opened = files.enter_context(Image.open(file, formats=_FORMATS))  # TIFFs with a quarter turn
            if max_pixels is not None and opened.width * opened.height > max_pixels:
                raise UserError(f"has {opened.width}x{opened.height} pixels; {_LARGER}")
            yield opened
    except Exception as error:  # a damaged file makes Pillow raise nearly anything
        raise _in_plain_words(error, name or shown(str(image))) from error


def _in_plain_words(error: Exception, name: str) -> UserError:
    """What was raised for an image, as a line that begins with its ``name``."""
    if isinstance(error, UserError):
        return UserError(f"{name}: {error}")
    if isinstance(error, Image.DecompressionBombError):
        return UserError(f"{name}: {error}; {_LARGER}")
    reason = "not an image" if isinstance(error, UnidentifiedImageError) else str(error) or type(error).__name__
    reason = " ".join(reason.split())
    return UserError(f"{name}: cannot be read ({reason}); replace the file or take it out of the data set.")


@contextmanager
def _own_limit() -> Iterator[None]:
    """Switch Pillow's limit of pixels off."""
    with _pillows_limit:
        limit = Image.MAX_IMAGE_PIXELS
        Image.MAX_IMAGE_PIXELS = None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = limit
