"""The programs of the page that run OpenVINO's files, in Python without torch and in C++: the model's answers."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import openvino
import pytest
from pages import code
from PIL import Image
from test_export import MODELS, SIZES, made, pictures

pytestmark = pytest.mark.filterwarnings("ignore")  # of the exporter itself
PACKAGE = Path(openvino.__file__).parent


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A model, its file, and images as files, one of them without a box."""
    folder, module = tmp_path_factory.mktemp("exported"), made(**MODELS["squash"])
    images = [pictures(size, 1)[0] for size in SIZES]
    module.pixel_threshold = np.mean(sorted(np.nanmax(each.anomaly_map) for each in module.inspect(images))[:2]).item()
    module.export(folder / "m.xml", "openvino")
    for number, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{number}.ppm")
    return module, folder / "m.xml", sorted(folder.glob("*.ppm"))


def check(found, expected):
    assert found["score"] == pytest.approx(expected.score, rel=1e-4)
    assert found["anomalous"] == expected.anomalous
    y, x = np.nonzero(expected.mask)
    assert found.get("box") == ([x.min(), y.min(), x.max() + 1, y.max() + 1] if len(x) else None)


def test_python_without_torch(exported):
    module, path, files = exported
    banned = "import sys; sys.modules['torch'] = sys.modules['pl_patchcore'] = None\n"
    program = [sys.executable, "-c", banned + code("OpenVINO from Python"), path, *files]
    done = subprocess.run(program, capture_output=True, text=True, check=True)
    for line, expected in zip(done.stdout.splitlines(), module.inspect(files), strict=True):
        check(found := json.loads(line), expected)
        assert found["p_value"] == pytest.approx(expected.p_value, abs=1.01 / 41)


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """The program in C++, compiled by the page's own lines."""
    if shutil.which("g++") is None or not (PACKAGE / "include" / "openvino" / "openvino.hpp").is_file():
        pytest.skip("needs g++ and the headers in Python's package of OpenVINO")
    folder = tmp_path_factory.mktemp("program")
    (folder / "score.cpp").write_text(code("OpenVINO from C++", "cpp"), encoding="utf-8")
    lines = code("OpenVINO from C++", "bash").replace("$(python ", f"$({sys.executable} ")
    subprocess.run(["bash", "-e", "-c", lines], cwd=folder, check=True)
    return folder / "score"


def test_cpp(exported, program):
    module, path, files = exported
    for file, expected in zip(files, module.inspect(files), strict=True):
        done = subprocess.run([program, path, file], capture_output=True, text=True, check=True)
        check(json.loads(done.stdout), expected)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"no image", "not a PPM image"),
        (b"P6\n4 4\n255\n12", "cut short"),
        (b"P6 99999 99999 255\n", "not a PPM image"),
    ],
)
def test_cpp_refuses(exported, program, content, said, tmp_path):
    (tmp_path / "wrong.ppm").write_bytes(content)
    done = subprocess.run([program, exported[1], tmp_path / "wrong.ppm"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"{tmp_path / 'wrong.ppm'}: ")
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
