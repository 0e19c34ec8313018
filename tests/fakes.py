"""Data sets in their true layout, with tiny made-up images."""

import csv
import json
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


DEFECT = 6  # side of the square that is a defect in the sets of categories


def picture(rng: np.random.Generator, number: int | None = None, size: tuple[int, int] = (40, 50)) -> tuple:
    """Noise (H, W, 3), and a mask (H, W) of one square, whose corner moves with the ``number``; None: no square."""
    pixels, mask = rng.normal(120, 10, (*size, 3)), np.zeros(size, np.uint8)
    if number is not None:
        mask[3 * number : 3 * number + DEFECT, 3 * number : 3 * number + DEFECT] = 255
        pixels[mask > 0] = 250
    return pixels.clip(0, 255).astype(np.uint8), mask


def save(pixels: np.ndarray, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def mvtec(root: Path, categories: list[str], defects: tuple[str, ...] = ("broken", "dirt")) -> Path:
    """MVTec AD, and MPDD: 40x50 RGB images, masks of one square whose corner moves with the image's number."""
    rng = np.random.default_rng(0)
    for category in categories:
        for place, number in (("train/good", 4), ("test/good", 2), *((f"test/{defect}", 2) for defect in defects)):
            for i in range(number):
                pixels, mask = picture(rng, None if "good" in place else i)
                save(pixels, root / category / place / f"{i:03d}.png")
                if mask.any():
                    save(mask, root / category / "ground_truth" / Path(place).name / f"{i:03d}_mask.png")
    return root


def btad(root: Path, categories: tuple[str, ...] = ("01", "02")) -> Path:
    """BTAD: bitmaps in product 01 and 03, whose masks are .png in 01; one empty mask in 02."""
    rng = np.random.default_rng(0)
    for category in categories:
        kind, mask_kind = {"01": ("bmp", "png"), "02": ("png", "png"), "03": ("bmp", "bmp")}[category]
        for place, number in (("train/ok", 4), ("test/ok", 2), ("test/ko", 3)):
            for i in range(number):
                pixels, mask = picture(rng, i if "ko" in place else None)
                save(pixels, root / category / place / f"{i:04d}.{kind}")
                if "ko" in place:
                    empty = category == "02" and i == 2
                    save(mask * (not empty), root / category / "ground_truth" / "ko" / f"{i:04d}.{mask_kind}")
    return root


def mvtec_ad_2(root: Path, categories: tuple[str, ...] = ("can", "vial"), private: int = 2) -> Path:
    """MVTec AD 2: grey images of ``vial``, several lights in the public test, the same names in good and bad."""
    rng = np.random.default_rng(0)
    lights = ("regular", "overexposed", "shift_1")
    for category in categories:
        names = {
            "train/good": [f"{i:03d}_regular" for i in range(4)],
            "validation/good": [f"{i:03d}_regular" for i in range(3)],
            "test_public/good": [f"000_{light}" for light in lights[:2]],
            "test_public/bad": [f"000_{light}" for light in lights],
            "test_private": [f"{i:03d}_regular" for i in range(private)],
            "test_private_mixed": [f"{i:03d}_mixed" for i in range(private)],
        }
        for place, stems in names.items():
            for i, stem in enumerate(stems):
                pixels, mask = picture(rng, i if place == "test_public/bad" or (i % 2 and "private" in place) else None)
                save(pixels[:, :, 0] if category == "vial" else pixels, root / category / place / f"{stem}.png")
                if place == "test_public/bad":
                    save(mask, root / category / "test_public" / "ground_truth" / "bad" / f"{stem}_mask.png")
    return root


LOCO_CONFIG = [  # relative and absolute saturation, as there are
    {"defect_name": "missing", "pixel_value": 255, "saturation_threshold": 0.5, "relative_saturation": True},
    {"defect_name": "additional", "pixel_value": 254, "saturation_threshold": 20, "relative_saturation": False},
    {"defect_name": "broken", "pixel_value": 253, "saturation_threshold": 1.0, "relative_saturation": True},
]


def loco(root: Path, categories: tuple[str, ...] = ("breakfast_box", "pushpins")) -> Path:
    """MVTec LOCO AD: a folder of masks for each image, of one level each; the first logical image has two defects."""
    rng = np.random.default_rng(0)
    for category in categories:
        for place, number in (("train/good", 4), ("validation/good", 3), ("test/good", 2)):
            for i in range(number):
                save(picture(rng)[0], root / category / place / f"{i:03d}.png")
        for defect, levels in (("logical_anomalies", (255, 254)), ("structural_anomalies", (253,))):
            for i in range(2):
                pixels, mask = picture(rng, i)
                save(pixels, root / category / "test" / defect / f"{i:03d}.png")
                for number, level in enumerate(levels[: 1 if i else None]):
                    here = np.roll(mask, 10 * number, axis=1) // 255 * level
                    save(here.astype(np.uint8), root / category / "ground_truth" / defect / f"{i:03d}/{number:03d}.png")
        (root / category / "defects_config.json").write_text(json.dumps(LOCO_CONFIG))
    return root


def visa(root: Path, categories: tuple[str, ...] = ("candle", "pcb1")) -> Path:
    """VisA: JPEG images, masks whose levels are class numbers, three lists; some anomalous images train in two."""
    rng = np.random.default_rng(0)
    rows: dict[str, list[list[str]]] = {"1cls": [], "2cls_highshot": [], "2cls_fewshot": []}
    for category in categories:
        for i in range(6):
            image = f"{category}/Data/Images/Normal/{i:04d}.JPG"
            save(picture(rng)[0], root / image)
            rows["1cls"].append([category, "train" if i < 4 else "test", "normal", image, ""])
            rows["2cls_highshot"].append([category, "train" if i < 3 else "test", "normal", image, ""])
            rows["2cls_fewshot"].append([category, "train" if i < 2 else "test", "normal", image, ""])
        for i in range(3):
            image, mask = f"{category}/Data/Images/Anomaly/{i:03d}.JPG", f"{category}/Data/Masks/Anomaly/{i:03d}.png"
            pixels, levels = picture(rng, i)
            save(pixels, root / image)
            save(levels // 255 * (i + 1), root / mask)
            rows["1cls"].append([category, "test", "anomaly", image, mask])
            for split in ("2cls_highshot", "2cls_fewshot"):
                rows[split].append([category, "train" if i == 0 else "test", "anomaly", image, mask])
    (root / "split_csv").mkdir()
    for split, lines in rows.items():
        with (root / "split_csv" / f"{split}.csv").open("w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([["object", "split", "label", "image", "mask"], *lines])
    return root


def kolektor_sdd2(root: Path) -> Path:
    """KolektorSDD2: a mask beside each image, empty for nominal ones; one image is there twice, as in the real set."""
    rng = np.random.default_rng(0)
    for split, first, nominal, defects in (("train", 10000, 5, 2), ("test", 20000, 3, 2)):
        for i in range(nominal + defects):
            pixels, mask = picture(rng, i - nominal if i >= nominal else None)
            for copy in ("", *[" (copy)"] * (split == "train" and i == 0)):
                save(pixels, root / split / f"{first + i}{copy}.png")
                save(mask, root / split / f"{first + i}{copy}_GT.png")
    return root


def real_iad(root: Path, categories: tuple[str, ...] = ("audiojack", "pcb")) -> Path:
    """Real-IAD: images and masks by sample and view; one of a defective sample is nominal in its view."""
    rng = np.random.default_rng(0)
    for category in categories:
        lists: dict[str, list] = {"train": [], "test": []}

        def add(
            split: str, place: str, stem: str, kind: str, number: int | None, category=category, lists=lists
        ) -> None:
            pixels, levels = picture(rng, number)
            folder, mask = root / "realiad_1024" / category, None
            save(pixels, folder / place / f"{stem}.jpg")
            if number is not None:
                mask = f"{place}/{stem}_mask.png"
                save(levels, folder / mask)
            entry = {
                "category": category,
                "anomaly_class": kind,
                "image_path": f"{place}/{stem}.jpg",
                "mask_path": mask,
            }
            lists[split].append(entry)

        for i in range(6):
            place, stem = f"OK/S{i:04d}", f"{category}_{i:04d}_OK_C1_20231018090000"
            add("train" if i < 4 else "test", place, stem, "OK", None)
        for i, kind in enumerate(("AK", "HS")):
            place, stem = f"NG/{kind}/S{i:04d}", f"{category}_{i:04d}_NG_{kind}"
            add("test", place, f"{stem}_C1_20231018090000", kind, i)
            add("test", place, f"{stem}_C2_20231018090000", "OK", None)
        meta = {"prefix": f"{category}/", "normal_class": "OK", "pre_transform": None}
        path = root / "realiad_jsons" / f"{category}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"meta": meta, **lists}))
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
