"""Data sets in their true layout, with tiny made-up images."""

from collections.abc import Iterable
from pathlib import Path

import av
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


DEFECT = 6  # side of the square that is a defect in `mvtec`


def mvtec(root: Path, categories: list[str], defects: tuple[str, ...] = ("broken", "dirt")) -> Path:
    """MVTec AD: 40x50 RGB images, masks of one square whose corner moves with the image's number."""
    rng = np.random.default_rng(0)
    for category in categories:
        for place, number in (("train/good", 4), ("test/good", 2), *((f"test/{defect}", 2) for defect in defects)):
            folder = root / category / place
            folder.mkdir(parents=True)
            for i in range(number):
                pixels = rng.normal(120, 10, (40, 50, 3))
                mask = np.zeros((40, 50), np.uint8)
                if "good" not in place:
                    mask[3 * i : 3 * i + DEFECT, 3 * i : 3 * i + DEFECT] = 255
                    pixels[mask > 0] = 250
                    truth = root / category / "ground_truth" / folder.name
                    truth.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(mask).save(truth / f"{i:03d}_mask.png")
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{i:03d}.png")
    return root


def stranger(root: Path) -> Path:
    """What someone's own folder looks like: mixed sizes and formats, odd names, files that are no images."""
    rng = np.random.default_rng(0)
    (root / "ok" / "Schicht 2").mkdir(parents=True)
    (root / "bad" / "Kratzer").mkdir(parents=True)
    (root / "bad" / "Fleck ü").mkdir(parents=True)
    names = [
        "Teil 1.JPG", "Teil 2.jpeg", "größe.PNG", "日本.bmp", "Schicht 2/Teil 1.JPG", "a.TIFF", "b.webp", "c&d.png",
        "e.png", "f.jpg",
    ]  # fmt: skip
    for number, name in enumerate(names):
        grey = rng.integers(90, 110, (40 + 3 * number, 64 - 2 * number), dtype=np.uint8)
        image = Image.fromarray(grey)
        if name == "a.TIFF":
            image = Image.fromarray(grey.astype(np.uint16) * 257)
        elif name == "c&d.png":
            image = image.convert("RGBA")
        image.save(root / "ok" / name)
    (root / "ok" / "Notizen.txt").write_text("keine Bilder")
    (root / "ok" / "Thumbs.db").write_bytes(b"\0")
    (root / "ok" / "._Teil 1.JPG").write_bytes(b"\0")  # as macOS leaves them
    for name in ("Kratzer/1.JPG", "Kratzer/2.jpg", "Fleck ü/1.png"):
        pixels = rng.integers(90, 110, (50, 60), dtype=np.uint8)
        pixels[20:30, 20:30] = 250
        Image.fromarray(pixels).save(root / "bad" / name)
    return root


def coded(code: int, grey: int = 110, size: tuple[int, int] = (48, 64)) -> np.ndarray:
    """A picture (H, W, 3) that tells its number, as 16 black or white blocks of 8x8, after any codec."""
    picture = np.full((*size, 3), grey, np.uint8)
    for bit in range(16):
        top, left = 8 * (bit // 8), 8 * (bit % 8)
        picture[top : top + 8, left : left + 8] = 255 * (code >> bit & 1)
    return picture


def code_of(picture: Image.Image) -> int:
    """Read the number back."""
    pixels = np.asarray(picture).mean(axis=2)
    return sum(int(pixels[8 * (b // 8) + 2 :, 8 * (b % 8) + 2 :][:4, :4].mean() > 127) << b for b in range(16))


def video(path: Path, pictures: Iterable[np.ndarray], codec: str = "mpeg4", fmt: str = "yuv420p", **options) -> Path:
    """An .avi of RGB pictures; ``options`` are the codec's."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", format="avi") as container:
        stream = None
        for number, picture in enumerate(pictures):
            if stream is None:
                stream = container.add_stream(codec, rate=24, options=options)
                stream.height, stream.width = picture.shape[:2]
                stream.pix_fmt = fmt
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def mstc(root: Path, scenes: Iterable[int] = (1, 2), videos: int = 2, frames: int = 23, test_frames: int = 16) -> Path:
    """ShanghaiTech Campus, no test videos of scene 13.

    Training frame k of video v of scene s has the code ``1000 * v + k``, test frame k the code k; their grey is
    ``60 + 10 * s``. In the test frames 4 to 11 of each scene's first test video there is a red square.
    """
    for scene in scenes:
        for number in range(1, videos + 1):
            pictures = (coded(1000 * number + k, 60 + 10 * scene) for k in range(frames))
            video(root / "training" / "videos" / f"{scene:02d}_{number:03d}.avi", pictures, qmin="2", qmax="2")
        for number in (14, 135) if scene != 13 else ():
            name = f"{scene:02d}_{number:04d}"
            folder = root / "testing" / "frames" / name
            folder.mkdir(parents=True)
            labels, masks = np.zeros(test_frames, np.int8), np.zeros((test_frames, 48, 64), np.uint8)
            for k in range(test_frames):
                picture = coded(k, 60 + 10 * scene)
                if number == 14 and 4 <= k < 12:
                    picture[24:40, 2 * k : 2 * k + 16] = (255, 0, 0)
                    labels[k], masks[k, 24:40, 2 * k : 2 * k + 16] = 1, 1
                Image.fromarray(picture).save(folder / f"{k:03d}.jpg", quality=95)
            for kind, array in (("frame", labels), ("pixel", masks)):
                path = root / "testing" / f"test_{kind}_mask" / f"{name}.npy"
                path.parent.mkdir(exist_ok=True)
                np.save(path, array)
    return root
