import os
import pickle
import re
import shutil
from pathlib import Path

import av
import fakes
import jsonargparse
import numpy as np
import pytest
import torch
from PIL import Image

from pl_patchcore import MSTCDataModule, PatchCore, Preprocessing, UserError
from pl_patchcore.data import mstc

CODECS = {
    "mpeg4": {"codec": "mpeg4", "qmin": "2", "qmax": "2"},
    "mpeg4, B-frames": {"codec": "mpeg4", "qmin": "2", "qmax": "2", "bf": "2", "g": "9"},
    "mjpeg": {"codec": "mjpeg", "fmt": "yuvj420p", "qmin": "2", "qmax": "2"},
    "h264": {"codec": "libx264", "crf": "12", "bf": "3", "g": "10"},
    "h264, open GOP": {
        "codec": "libx264",
        "crf": "12",
        "bf": "3",
        "g": "10",
        "b-pyramid": "normal",
        "x264-params": "open-gop=1",
    },
    "ffv1": {"codec": "ffv1"},
    "rawvideo": {"codec": "rawvideo"},
}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return fakes.mstc(tmp_path_factory.mktemp("mstc"))


@pytest.fixture
def root(written, tmp_path):
    """A copy that a test may break."""
    return Path(shutil.copytree(written, tmp_path / "shanghaitech"))


def retrained(root, count, **codec):
    """Put one training video of ``count`` frames in place of scene 1's two."""
    (root / "training" / "videos" / "01_002.avi").unlink(missing_ok=True)
    pictures = (fakes.coded(k) for k in range(count))
    return fakes.video(root / "training" / "videos" / "01_001.avi", pictures, **codec)


def read(records):
    return [fakes.code_of(record.image()) for record in records]


def ready(data, **transform):
    data.transform = Preprocessing(**({"resize": None, "crop": None} | transform))
    data.prepare_data()
    data.setup("test")
    return data


@pytest.mark.parametrize("codec", CODECS)
def test_frame_k_is_frame_5k_of_the_original(root, codec):
    for scene, count in enumerate((1, 5, 6, 23), start=3):
        path = root / "training" / "videos" / f"{scene:02d}_001.avi"
        fakes.video(path, (fakes.coded(k) for k in range(count)), **CODECS[codec])
        assert read(MSTCDataModule(root, scenes=scene).records[0]) == list(range(0, count, 5))
        assert read(MSTCDataModule(root, scenes=scene, frame_step=1).records[0]) == list(range(count))


@pytest.mark.parametrize("codec", CODECS)
def test_any_order_gives_the_same_frames(root, codec):
    retrained(root, 40, **CODECS[codec])
    train = MSTCDataModule(root, frame_step=1, scenes=[1, 2]).records[0][::3]
    order = np.random.default_rng(0).permutation(len(train))
    expected = [np.asarray(record.image()) for record in train]
    for i in [0, 0, *order, order[-1]]:
        assert np.array_equal(np.asarray(train[i].image()), expected[i])
    assert [fakes.code_of(Image.fromarray(p)) for p in expected[:14]] == list(range(0, 40, 3))


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more than a small machine has cores
def test_loader_processes_give_the_same_frames(root, workers):
    # larger than what a decoder reads at once, so that processes that shared a place in the file would show
    retrained(root, 300, codec="rawvideo")
    alone = ready(MSTCDataModule(root, scenes=[1, 2], batch_size=4, num_workers=0))
    expected = torch.cat([batch["image"] for batch in alone.train_dataloader()])
    assert len(expected) == 60 + 2 * 5
    _ = alone.train_set[0]  # a video is open, at the place they start from, when the loader processes start
    data = ready(MSTCDataModule(root, scenes=[1, 2], batch_size=4, num_workers=workers))
    loader = data.train_dataloader()
    for _ in range(2):  # the second time from where the first one ended
        batches = list(loader)
        assert torch.equal(torch.cat([b["image"] for b in batches]), expected)
        assert torch.cat([b["index"] for b in batches]).tolist() == list(range(70))
    assert fakes.code_of(alone.records[0][10].image()) == 50


def test_records_of_a_scene(written):
    train, test = MSTCDataModule(written, scenes="02").records
    videos = written / "training" / "videos"
    assert [r.path for r in train] == [videos / f"02_00{v}.avi" / f"{k:06d}" for v in (1, 2) for k in range(0, 23, 5)]
    assert read(train) == [1000, 1005, 1010, 1015, 1020, 2000, 2005, 2010, 2015, 2020]
    assert {(r.label, r.defect, r.category) for r in train} == {(0, "nominal", "02")}
    folder = written / "testing" / "frames"
    assert [r.path for r in test] == [
        folder / v / f"{k:03d}.jpg" for v in ("02_0014", "02_0135") for k in (0, 5, 10, 15)
    ]
    assert [(r.label, r.defect) for r in test[:4]] == [
        (0, "nominal"),
        (1, "anomalous"),
        (1, "anomalous"),
        (0, "nominal"),
    ]
    assert {r.label for r in test[4:]} == {0}
    assert {r.category for r in test} == {"02"}
    assert all(abs(np.asarray(r.image())[18:22].mean() - 80) < 4 for r in train + test)  # the scene's grey


@pytest.mark.parametrize("step", [1, 3, 5])
def test_labels_and_masks_are_those_of_the_frame(written, step):
    labels = np.load(written / "testing" / "test_frame_mask" / "01_0014.npy")
    masks = np.load(written / "testing" / "test_pixel_mask" / "01_0014.npy")
    data = ready(MSTCDataModule(written, frame_step=step, num_workers=0))
    for i, k in enumerate(range(0, 16, step)):
        sample = data.test_set[i]
        assert fakes.code_of(data.records[1][i].image()) == k
        assert sample["label"] == labels[k] == (4 <= k < 12)
        assert np.array_equal(sample["mask"].numpy(), masks[k])
        red = sample["image"][0] - sample["image"][1] > 2
        assert (red & (sample["mask"] == 1)).sum() >= 0.9 * red.sum()
        assert bool(red.any()) == (sample["label"] == 1)


def test_frames_are_in_the_order_of_their_numbers(root):
    frames = root / "testing" / "frames" / "01_0014"
    for k in range(1000, 1003):
        Image.fromarray(fakes.coded(k)).save(frames / f"{k:03d}.jpg")
    for path in frames.glob("0*.jpg"):
        path.rename(frames / f"{int(path.stem)}.jpg")  # 0, 1, 10, 11, ..., 1000, ... by name
    for k in range(16, 1000):
        (frames / f"{k}.jpg").symlink_to(frames / "0.jpg")
    labels = np.zeros(1003, bool)
    labels[1000] = True
    np.save(root / "testing" / "test_frame_mask" / "01_0014.npy", labels)
    np.save(root / "testing" / "test_pixel_mask" / "01_0014.npy", np.ones((1003, 48, 64), bool) & labels[:, None, None])
    test = MSTCDataModule(root).records[1][:201]
    assert [r.path.name for r in test] == [f"{k}.jpg" for k in range(0, 1003, 5)]
    assert [r.path.name for r in test if r.label] == ["1000.jpg"]
    image, mask = test[200].read()
    assert fakes.code_of(image) == 1000
    assert mask.all()


def test_masks_of_any_number_type(root):
    for kind in ("frame", "pixel"):
        path = root / "testing" / f"test_{kind}_mask" / "01_0014.npy"
        np.save(path, np.load(path).astype(float))
    test = MSTCDataModule(root).records[1]
    assert [r.label for r in test[:4]] == [0, 1, 1, 0]
    mask = test[1].read()[1]
    assert mask.dtype == np.uint8
    assert mask.sum() == 16 * 16


def test_calibration_leaves_clips_out(written):
    data = ready(MSTCDataModule(written, "all", frame_step=10, num_workers=0))
    train = data.records[0]
    clips = [record.path.parent.name for record in train]
    groups = [data.train_set[place]["group"] for place in range(len(train))]
    assert groups == [clips.index(clip) for clip in clips]
    assert 1 < len(set(groups)) < len(groups)


def test_anomalous_frame_without_marked_pixels_is_unknown(root):
    path = root / "testing" / "test_pixel_mask" / "01_0014.npy"
    np.save(path, np.zeros_like(np.load(path)))
    data = ready(MSTCDataModule(root, num_workers=0))
    assert [data.test_set[i]["mask"].unique().tolist() for i in range(4)] == [[0], [255], [255], [0]]


def test_twelve_of_thirteen_scenes_are_listed(tmp_path, caplog):
    root = fakes.mstc(tmp_path, scenes=range(1, 14), videos=1, frames=6, test_frames=6)
    twelve = [f"{scene:02d}" for scene in range(1, 13)]
    data = MSTCDataModule(root)
    assert data.categories() == twelve
    assert data.category_argument == "scenes"
    for scene in data.categories():
        one = MSTCDataModule(root, **{data.category_argument: scene})
        assert {r.category for part in one.records for r in part} == {scene}
    together = MSTCDataModule(root, scenes="all")
    assert (
        sorted({r.category for r in together.records[0]}) == sorted({r.category for r in together.records[1]}) == twelve
    )
    assert together.describe() == (
        f"scenes {', '.join(twelve)}: 24 nominal training images; 48 test images (36 nominal, 12 anomalous)"
    )
    caplog.clear()
    asked = MSTCDataModule(root, scenes=[13, 1])
    assert [sorted({r.category for r in part}) for part in asked.records] == [["01", "13"], ["01"]]
    assert "13 training and 24 test videos, of 330 and 107 in the original" in caplog.text
    thirteen = MSTCDataModule(root, scenes="13")
    thirteen.setup("fit")
    assert {r.category for r in thirteen.records[0]} == {"13"}
    with pytest.raises(UserError, match="the test set is empty"):
        thirteen.setup("test")
    with pytest.raises(UserError, match=r"scene 14 has no video in .*videos; there are 01, 02,"):
        _ = MSTCDataModule(root, scenes=[1, 14]).records


def test_whole_set_is_not_remarked_upon(written, caplog, monkeypatch):
    monkeypatch.setattr(mstc, "_ORIGINAL", (4, 4))
    _ = MSTCDataModule(written).records
    assert caplog.text == ""


@pytest.mark.parametrize("scenes", [1, "1", "01", [1], ["1", "01"]])
def test_ways_to_name_a_scene(scenes):
    assert MSTCDataModule(scenes=scenes).scenes == ["01"]


@pytest.mark.parametrize("scenes", ["one", [], [1, "all"], -1, 1.5])
def test_bad_scenes(scenes):
    with pytest.raises(UserError, match=r"scenes must be ('all', a number|text, or a whole number)"):
        MSTCDataModule(scenes=scenes)


def test_bad_options():
    with pytest.raises(UserError, match="frame_step must be at least 1, got 0"):
        MSTCDataModule(frame_step=0)
    with pytest.raises(UserError, match="batch_size must be at least 1"):
        MSTCDataModule(batch_size=0)
    with pytest.raises(TypeError, match="batchsize"):
        MSTCDataModule(batchsize=2)


def video_cut_short(root):
    path = root / "training" / "videos" / "01_002.avi"
    path.write_bytes(path.read_bytes()[:-100])
    return r"01_002\.avi: is cut short, \d+ bytes of \d+; replace"


def no_video(root):
    (root / "training" / "videos" / "01_002.avi").write_text("<html>404</html>")
    return r"01_002\.avi: is no video that can be read"


def empty_video(root):
    (root / "training" / "videos" / "01_001.avi").write_bytes(b"")
    return r"01_001\.avi: is no video that can be read"


def folder_for_a_video(root):
    (root / "training" / "videos" / "01_003.avi").mkdir()
    return r"01_003\.avi: is no video that can be read"


def sound_alone(root):
    with av.open(str(root / "training" / "videos" / "01_002.avi"), "w", format="avi") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.rate = 8000
        container.mux(stream.encode(frame))
    return r"01_002\.avi: is no video that can be read"


def no_training_videos(root):
    shutil.rmtree(root / "training")
    return r"training/videos: no such folder.*fetch the data set by hand from https://svip-lab\.github\.io"


def no_test_frames(root):
    shutil.rmtree(root / "testing" / "frames")
    return r"testing/frames: no such folder.*testing/test_pixel_mask as data\.root"


def empty_test_video(root):
    shutil.rmtree(root / "testing" / "frames" / "01_0135")
    (root / "testing" / "frames" / "01_0135").mkdir()
    return r"01_0135: holds no frame"


def missing_frame(root):
    (root / "testing" / "frames" / "01_0014" / "007.jpg").unlink()
    return r"01_0014: frame 7 should come where 008\.jpg is"


def missing_last_frame(root):
    (root / "testing" / "frames" / "01_0014" / "015.jpg").unlink()
    return r"frame_mask/01_0014\.npy: has the shape \(16,\), but .*frames/01_0014 holds 15 frames"


def broken_frame(root):
    path = root / "testing" / "frames" / "01_0014" / "005.jpg"
    path.write_bytes(path.read_bytes()[:300])
    return r"005\.jpg: cannot be read"


def missing_labels(root):
    (root / "testing" / "test_frame_mask" / "01_0135.npy").unlink()
    return r"test_frame_mask/01_0135\.npy: no such file, though each test video"


def missing_masks(root):
    (root / "testing" / "test_pixel_mask" / "01_0135.npy").unlink()
    return r"test_pixel_mask/01_0135\.npy: no such file"


def masks_cut_short(root):
    path = root / "testing" / "test_pixel_mask" / "01_0135.npy"
    path.write_bytes(path.read_bytes()[:-10])
    return r"test_pixel_mask/01_0135\.npy: cannot be read"


def empty_mask_file(root):
    (root / "testing" / "test_pixel_mask" / "01_0135.npy").write_bytes(b"")
    return r"test_pixel_mask/01_0135\.npy: cannot be read"


def pickled_labels(root):
    np.save(root / "testing" / "test_frame_mask" / "01_0014.npy", np.array([{}] * 16), allow_pickle=True)
    return r"test_frame_mask/01_0014\.npy: cannot be read"


def pickle_for_labels(root):
    (root / "testing" / "test_frame_mask" / "01_0014.npy").write_bytes(pickle.dumps(np.zeros(16)))
    return r"test_frame_mask/01_0014\.npy: cannot be read"


def archive_of_labels(root):
    with (root / "testing" / "test_frame_mask" / "01_0014.npy").open("wb") as file:
        np.savez(file, labels=np.zeros(16))
    return r"test_frame_mask/01_0014\.npy: holds several arrays"


def fewer_masks_than_frames(root):
    path = root / "testing" / "test_pixel_mask" / "01_0014.npy"
    np.save(path, np.load(path)[:-1])
    return r"pixel_mask/01_0014\.npy: has the shape \(15, 48, 64\), but .*frames/01_0014 holds 16 frames; restore both"


def labels_in_the_place_of_masks(root):
    np.save(root / "testing" / "test_pixel_mask" / "01_0014.npy", np.zeros(16))
    return r"pixel_mask/01_0014\.npy: has the shape \(16,\)"


def other_labels(root):
    np.save(root / "testing" / "test_frame_mask" / "01_0014.npy", np.arange(16))
    return r"frame_mask/01_0014\.npy: holds labels other than 0 and 1"


def masks_of_another_size(root):
    path = root / "testing" / "test_pixel_mask" / "01_0014.npy"
    np.save(path, np.load(path)[:, :40])
    return r"pixel_mask/01_0014\.npy: mask of 40x64 pixels for an image of 48x64"


def marked_nominal_frame(root):
    path = root / "testing" / "test_pixel_mask" / "01_0014.npy"
    masks = np.load(path)
    masks[15, 3, 3] = 1
    np.save(path, masks)
    return r"pixel_mask/01_0014\.npy: marks pixels of frame 15, whose label"


@pytest.mark.parametrize(
    "break_it",
    [
        video_cut_short,
        no_video,
        empty_video,
        folder_for_a_video,
        sound_alone,
        no_training_videos,
        no_test_frames,
        empty_test_video,
        missing_frame,
        missing_last_frame,
        broken_frame,
        missing_labels,
        missing_masks,
        masks_cut_short,
        empty_mask_file,
        pickled_labels,
        pickle_for_labels,
        archive_of_labels,
        fewer_masks_than_frames,
        labels_in_the_place_of_masks,
        other_labels,
        masks_of_another_size,
        marked_nominal_frame,
    ],
)
def test_broken_data_is_refused_before_fitting(root, break_it):
    message = break_it(root)
    with pytest.raises(UserError, match=message):
        MSTCDataModule(root).prepare_data()
    if break_it not in (no_training_videos, no_test_frames):
        MSTCDataModule(root, scenes=2).prepare_data()  # another scene's files are not looked at


def test_video_that_decodes_to_fewer_frames_than_its_packets(root):
    retrained(root, 23)
    records = MSTCDataModule(root).records[0]
    retrained_again = root / "training" / "videos" / "01_001.avi"
    fakes.video(retrained_again, (fakes.coded(k) for k in range(12)), qmin="2", qmax="2")
    with pytest.raises(UserError, match=r"01_001\.avi: ends before frame 15 is decoded; replace or re-encode"):
        read(records)
    retrained_again.write_bytes(b"no video")
    with pytest.raises(UserError, match=r"01_001\.avi: frame 0 cannot be decoded"):
        records[0].image()


def test_broken_files_can_be_left_out(root):
    for break_it in (no_video, broken_frame, masks_of_another_size):
        break_it(root)
    path = root / "training" / "videos" / "02_001.avi"
    fakes.video(path, (fakes.coded(k) for k in range(24)), codec="rawvideo")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    data = MSTCDataModule(root, scenes="all", on_broken="skip", num_workers=2)
    data.prepare_data()
    videos = [r.path.parent.name for r in data.records[0]]
    assert videos.count("01_001.avi") == videos.count("02_002.avi") == 5
    assert videos.count("01_002.avi") == 0
    assert videos.count("02_001.avi") == 3  # frames 0, 5 and 10 are in the first half
    assert len(data.records[1]) == 4 + 2 * 4  # of the video whose masks have another size, none
    text = "\n".join(data.skipped)
    assert "01_002.avi: frame 0 cannot be decoded" in text
    assert "005.jpg: cannot be read" in text
    assert "01_0014.npy: mask of 40x64 pixels" in text


def test_few_shots(root):
    data = MSTCDataModule(root, shots=3, num_workers=0)
    every = MSTCDataModule(root).records[0]
    assert len(data.records[0]) == 3
    assert all(record in every for record in data.records[0])


def test_dropped_frames_are_remarked_upon(root, caplog):
    path = root / "training" / "videos" / "01_001.avi"
    with av.open(str(path), "w", format="avi") as container:
        stream = container.add_stream("mjpeg", rate=24)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuvj420p"
        for number in (0, 1, 2, 6, 7, 8, 9):
            frame = av.VideoFrame.from_ndarray(fakes.coded(number), format="rgb24")
            frame.pts = number
            container.mux(stream.encode(frame))
    assert read(MSTCDataModule(root).records[0][:2]) == [0, 8]
    assert "01_001.avi: announces 10 frames and holds 7: some were dropped" in caplog.text
    assert "01_002.avi" not in caplog.text


def test_other_files_are_passed_over(root, caplog):
    (root / "training" / "videos" / "._01_001.avi").write_text("what macOS leaves")
    (root / "testing" / "frames" / ".DS_Store").write_text("the same")
    (root / "testing" / "frames" / "01_0014" / "._000.jpg").write_text("the same")
    MSTCDataModule(root, scenes="all").prepare_data()
    assert "4 training and 4 test videos" in caplog.text


def test_one_video_is_open_at_a_time(root):
    data = MSTCDataModule(root, scenes="all")
    read(data.records[0][::-1])
    files = [Path(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd")]  # noqa: PTH208
    assert sum(str(root) in str(file.resolve()) for file in files) == 1


def peak_memory():
    """MiB that this process held at most since the peak was reset."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 1024


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the peak is reset by Linux alone")
def test_memory_does_not_grow_with_the_number_of_frames(tmp_path):
    size, peaks = (240, 320), []
    for count in (20, 220):
        root = fakes.mstc(tmp_path / str(count), scenes=[1], videos=1)
        fakes.video(root / "training" / "videos" / "01_001.avi", (fakes.coded(k, size=size) for k in range(count)))
        frames, name = root / "testing" / "frames" / "01_0014", "01_0014.npy"
        Image.fromarray(fakes.coded(0, size=size)).save(frames / "000.jpg")
        for k in range(1, count):
            shutil.copy(frames / "000.jpg", frames / f"{k:03d}.jpg")
        np.save(root / "testing" / "test_frame_mask" / name, np.ones(count))
        np.save(root / "testing" / "test_pixel_mask" / name, np.ones((count, *size), np.uint8))
        data = ready(MSTCDataModule(root, frame_step=1, num_workers=0))
        _ = data.train_set[0], data.test_set[0]
        Path("/proc/self/clear_refs").write_text("5")  # the peak is from here on
        before = peak_memory()
        for part in (data.train_set, data.test_set):
            for i in range(len(part)):
                _ = part[i]
        peaks.append(peak_memory() - before)
    assert peaks[1] < peaks[0] + 10  # 200 more frames are 22 MiB as they are decoded, 44 as RGB; their masks 15


def test_fit_and_test(written, tiny, trainer, caplog):
    model = PatchCore(tiny, layers=["fine", "coarse"], resize=[48, 64], crop=None, coreset_ratio=0.5, sigma=1.0)
    data = MSTCDataModule(written, scenes="all", batch_size=3, num_workers=0)
    runner = trainer(max_epochs=1)
    with caplog.at_level("INFO"):
        runner.fit(model, data)
        (figures,) = runner.test(model, data, verbose=False)
    assert model.figures["all"]["nominal"] == 12
    assert figures["test/image_auroc"] == 1
    assert figures["test/pixel_auroc"] > 0.95
    assert (
        "MSTCDataModule: scenes 01, 02: 20 nominal training images; 16 test images (12 nominal, 4 anomalous)"
        in caplog.text
    )


@pytest.mark.parametrize(
    ("written_as", "scenes"),
    [
        ("01", ["01"]),
        ("1", ["01"]),
        ("08", ["08"]),  # no octal number, unlike 01
        ("12", ["12"]),
        ("[1, '02', 08]", ["01", "02", "08"]),
        ("all", None),
    ],
)
def test_scenes_as_options(tmp_path, written_as, scenes):
    """As jsonargparse, the parser of the command line, reads them in its arguments and in YAML."""
    parser = jsonargparse.ArgumentParser()
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(MSTCDataModule, "data")
    config = tmp_path / "config.yaml"
    config.write_text(f"data:\n  scenes: {written_as}\n")
    for arguments in ([f"--data.scenes={written_as}"], ["--config", str(config)]):
        found = parser.parse_args([*arguments, "--data.batch_size=3"])
        data = parser.instantiate_classes(found).data
        assert data.scenes == scenes
        assert data.batch_size == 3
