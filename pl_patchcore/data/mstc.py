"""Mini ShanghaiTech Campus: every fifth frame of ShanghaiTech Campus (Liu et al. 2018) -> records.

Layout, as its authors publish it: ``training/videos/SS_NNN.avi`` (nominal; SS is the scene),
``testing/frames/SS_NNNN/000.jpg, 001.jpg, ...``, and of each test video ``testing/test_frame_mask/SS_NNNN.npy`` (a 0
or 1 for each frame) and ``testing/test_pixel_mask/SS_NNNN.npy`` (frames, H, W). The paper gives no offset, and does not
say whether its 12 scenes shared a memory bank: here frame k of the mini set is frame 5k of the original, in the order
of display, and ``scenes`` says which scenes one bank is made of.

Training frames are decoded while they are read. Each process keeps one video open and goes on from where it is;
going back starts again at frame 0. (Seeking ends on the right frame with some codecs only.) So each loader process also
decodes what the others return, which takes 0.4 ms for a frame of 480x856 pixels.
"""

from __future__ import annotations

import logging
import os
import re
import threading
from collections import defaultdict
from collections.abc import Generator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from pl_patchcore.data.base import NOMINAL, AnomalyDataModule, Record
from pl_patchcore.errors import UserError
from pl_patchcore.options import check_arguments
from pl_patchcore.preprocessing import UNKNOWN, Header, Preprocessing, check_file, check_image, read_image

log = logging.getLogger(__name__)

_VIDEOS, _FRAMES = Path("training", "videos"), Path("testing", "frames")
_LABELS, _MASKS = Path("testing", "test_frame_mask"), Path("testing", "test_pixel_mask")
_ORIGINAL = (330, 107)  # training and test videos
_HELP = (
    "fetch the data set by hand from https://svip-lab.github.io/dataset/campus_dataset.html and give the folder that "
    "holds training/videos, testing/frames, testing/test_frame_mask and testing/test_pixel_mask as data.root"
)


class VideoRecord(Record):
    """A frame of a training video; ``path`` is the video's, with the frame's number behind it."""

    def read(self, transform: Preprocessing | None = None) -> tuple[Image.Image, np.ndarray]:
        """Decode the frame, RGB; its mask is all nominal."""
        image = _decode(self.path.parent, int(self.path.name))
        return image, np.zeros((image.height, image.width), np.uint8)

    def check(self, transform: Preprocessing | None = None) -> None:
        """Refuse a file that is shorter than its header says; it was read through when its frames were counted."""
        video = self.path.parent
        with video.open("rb") as file:
            start, size = file.read(8), video.stat().st_size
        if start[:4] == b"RIFF" and size < (whole := int.from_bytes(start[4:], "little") + 8):
            raise UserError(f"{video}: is cut short, {size} bytes of {whole}; replace the file.")


class FrameRecord(Record):
    """A frame of a test video; ``mask_path`` holds the masks of the whole video."""

    mask_is_image: ClassVar[bool] = False

    def read(self, transform: Preprocessing | None = None) -> tuple[Image.Image, np.ndarray]:
        """Read the frame and its mask, as `Record.read`; a mask must mark no pixel of a frame of label 0."""
        image = read_image(self.path)
        return image, self._mask((image.height, image.width))

    def check(self, transform: Preprocessing | None = None) -> Header:
        """Check the image's header, and its mask."""
        header = check_image(self.path)
        self._mask(header.size)
        return header

    def _mask(self, size: tuple[int, int]) -> np.ndarray:
        path, frame = Path(str(self.mask_path)), int(self.path.stem)
        mask: np.ndarray = (_array(path)[frame] != 0).astype(np.uint8)  # this frame is all that is read
        if mask.shape != size:
            raise self.mismatch(mask.shape, size)
        if mask.any() and self.label == 0:
            raise UserError(f"{path}: marks pixels of frame {frame}, whose label in {_LABELS} is 0; restore both.")
        return mask if mask.any() or self.label == 0 else np.full(size, UNKNOWN, np.uint8)


class MSTCDataModule(AnomalyDataModule):
    """Mini ShanghaiTech Campus.

    Args:
        root: Folder that holds ``training`` and ``testing``.
        scenes: Scenes that one memory bank is made of: one (``1`` or ``01``), a list, or ``all`` that have test
            videos (scene 13 has none).
        frame_step: Every so many frames of a video are taken, from its first on; the mini set takes every fifth.
        **loading: Arguments of `AnomalyDataModule`.

    Raises:
        UserError: For a scene that is no number; on use, if a folder or file is missing, broken or cut short, or the
            labels or masks of a video are not as many as its frames.
    """

    category_argument: ClassVar[str | None] = "scenes"
    category_all: ClassVar[str | None] = "all"

    def __init__(
        self,
        root: str = "data/shanghaitech",
        scenes: str | int | list[str | int] = "01",
        frame_step: int = 5,
        **loading: Any,
    ) -> None:
        check_arguments(MSTCDataModule.__init__, locals(), "data.")
        super().__init__(**loading)
        if frame_step < 1:
            raise UserError(f"frame_step must be at least 1, got {frame_step}.")
        listed = scenes if isinstance(scenes, list | tuple) else [scenes]
        if scenes != "all" and (not listed or not all(str(scene).isdecimal() for scene in listed)):
            raise UserError(f"scenes must be 'all', a number such as 1 or '01', or a list of numbers, got {scenes!r}.")
        self.root = Path(root)
        self.scenes = None if scenes == "all" else sorted({f"{int(scene):02d}" for scene in listed})
        self.frame_step = frame_step

    def categories(self) -> list[str]:
        """Name the scenes under ``root`` that have both training and test videos, whichever are chosen."""
        test = self._by_scene(_FRAMES, "*/")
        return [scene for scene in self._by_scene(_VIDEOS, "*.avi") if scene in test]

    def load_records(self) -> tuple[list[Record], list[Record]]:
        """List the frames by scene, video and number; each training video is read through to count its frames."""
        videos, tests = self._by_scene(_VIDEOS, "*.avi"), self._by_scene(_FRAMES, "*/")
        found = tuple(sum(map(len, part.values())) for part in (videos, tests))
        if found[0] < _ORIGINAL[0] or found[1] < _ORIGINAL[1]:
            message = "%s: %d training and %d test videos, of %d and %d in the original."
            log.warning(message, self.root, *found, *_ORIGINAL)
        train: list[Record] = []
        test: list[Record] = []
        for scene in self.scenes or self.categories():
            if scene not in videos:
                raise UserError(f"scene {scene} has no video in {self.root / _VIDEOS}; there are {', '.join(videos)}.")
            for video in videos[scene]:
                numbers = range(0, self._length(video), self.frame_step)
                train += [VideoRecord(video / f"{n:06d}", 0, NOMINAL, scene, group=video.stem) for n in numbers]
            for folder in tests.get(scene, []):
                test += self._frames(folder, scene)
        return train, test

    def describe(self) -> str:
        """One line: the scenes, and the number of images in each set."""
        return f"scenes {', '.join(self.scenes or self.categories())}: {super().describe()}"

    def _by_scene(self, folder: Path, pattern: str) -> dict[str, list[Path]]:
        """Training or test videos of each scene."""
        scenes = defaultdict(list)
        for path in sorted((self.root / folder).glob(pattern)):
            if re.fullmatch(r"\d\d_\d+", path.stem):
                scenes[path.stem[:2]].append(path)
        if not scenes:
            raise UserError(f"{self.root / folder}: no such folder, or no video SS_NNN of a scene SS in it; {_HELP}.")
        return scenes

    def _length(self, video: Path) -> int:
        """Number of frames: the packets are counted, as headers may lie; nothing is decoded.

        Where broken files are skipped it is 1 at least: that frame cannot be read, and is left out with the reason.
        """
        import av  # no other data set needs it
        from av.error import FFmpegError

        announced, frames, problem = 0, 0, "holds no frame"
        if not video.is_dir():
            check_file(video)  # a pipe would never end
        try:
            with av.open(str(video)) as container:
                announced = container.streams.video[0].frames
                frames = sum(packet.size > 0 for packet in container.demux(video=0))
        except (OSError, FFmpegError, IndexError) as error:  # IndexError: no video in it
            problem = f"is no video that can be read ({error})"
        if frames == 0 and self.on_broken == "error":
            raise UserError(f"{video}: {problem}; replace the file.")
        if frames < announced:
            message = "%s: announces %d frames and holds %d: some were dropped, or are damaged."
            log.warning(message, video, announced, frames)
        return max(1, frames)

    def _frames(self, folder: Path, scene: str) -> list[Record]:
        """Records of a test video; its labels and masks must be as many as its frames."""
        files = sorted((path for path in folder.glob("*.jpg") if path.stem.isdigit()), key=lambda path: int(path.stem))
        if not files:
            raise UserError(f"{folder}: holds no frame (000.jpg, 001.jpg, ...); {_HELP}.")
        for number, path in enumerate(files):
            if int(path.stem) != number:
                raise UserError(f"{folder}: frame {number} should come where {path.name} is; restore the folder.")
        labels_path, masks_path = (self.root / part / f"{folder.name}.npy" for part in (_LABELS, _MASKS))
        labels, masks = _array(labels_path), _array(masks_path)
        for path, array, axes in ((labels_path, labels, 1), (masks_path, masks, 3)):
            if array.ndim != axes or len(array) != len(files):
                frames = f"{folder} holds {len(files)} frames"
                raise UserError(f"{path}: has the shape {array.shape}, but {frames}; restore both.")
        if not np.isin(labels, (0, 1)).all():
            raise UserError(f"{labels_path}: holds labels other than 0 and 1; restore the file.")
        return [
            FrameRecord(path, int(label), "anomalous" if label else NOMINAL, scene, masks_path)
            for path, label in zip(files[:: self.frame_step], labels[:: self.frame_step], strict=True)
        ]


_reading = threading.local()  # what each thread reads: (path and process, reader, last frame)


def _decode(path: Path, number: int) -> Image.Image:
    """Frame ``number`` of a video, RGB."""
    from av.error import FFmpegError

    video: Any = getattr(_reading, "video", (None, None, 0))
    opened, reader, last = video
    _reading.video = (None, None, 0)  # not to be used again if this fails
    try:
        # a video opened before a fork shares its place in the file with the other processes
        if opened == (path, os.getpid()) and number >= last:
            image: Image.Image = reader.send(number)
        else:
            if reader is not None:
                reader.close()
            reader = _read_frames(path, number)
            image = next(reader)
    except StopIteration:
        raise UserError(f"{path}: ends before frame {number} is decoded; replace or re-encode the file.") from None
    except FFmpegError as error:
        message = f"{path}: frame {number} cannot be decoded ({error.strerror}); replace or re-encode it."
        raise UserError(message) from error
    _reading.video = (path, os.getpid()), reader, number
    return image


def _read_frames(path: Path, number: int) -> Generator[Image.Image, int, None]:
    """Frame ``number`` of a video, RGB, then those whose numbers are sent, never a smaller one."""
    import av
    from av.video.reformatter import VideoReformatter

    to_rgb = VideoReformatter()  # one for all frames: to make it takes longer than to use it
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_count = 1  # loader processes are many already, and a fork waits for threads it has not
        for place, frame in enumerate(container.decode(stream)):  # in the order of display
            while place == number:
                number = yield Image.fromarray(to_rgb.reformat(frame, format="rgb24", threads=1).to_ndarray())


def _array(path: Path) -> np.ndarray:
    """Open an array without reading it."""
    try:
        if path.exists():
            check_file(path)
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file, though each test video must have it; {_HELP}.") from None
    except (OSError, EOFError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); restore the file.") from error
    if not isinstance(array, np.ndarray):
        raise UserError(f"{path}: holds several arrays; restore the file.")
    return array
