"""The server of the page: right answers under load, one line for what is no image, a stop that leaves nothing."""

import base64
import contextlib
import http.client
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from pages import code
from PIL import Image
from test_export import made, pictures

from pl_patchcore import PatchCore

pytest.importorskip("litserve")
pytestmark = pytest.mark.filterwarnings("ignore:.*has random weights")
BYTES = 20_000_000  # that the server takes at most
SECONDS = 60  # for each step at most; a few where nothing else runs
SIZES = ((64, 80), (60, 60), (33, 300), (300, 48), (257, 128))


class Server:
    """The program of the page in processes of its own, of one group."""

    def __init__(self, folder):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        (folder / "server.py").write_text(code("A server"), encoding="utf-8")
        self.log = folder / "log.txt"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "server.py", "m.ckpt", str(self.port)],
                cwd=folder, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip

    def ask(self, body=None):
        """Status and answer; the path is that of the images where there is one."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=SECONDS)
        try:
            kind = {"Content-Type": "application/octet-stream"}
            connection.request(*(("GET", "/health") if body is None else ("POST", "/predict", body, kind)))
            answer = connection.getresponse()
            return answer.status, answer.read().decode()
        finally:
            connection.close()

    def ready(self):
        """Wait until it answers."""
        for _ in wait():
            assert self.process.poll() is None, self.log.read_text()
            with contextlib.suppress(OSError):
                if self.ask() == (200, "ok"):
                    break

    def gone(self):
        """Wait for the end of all of its processes, none of which the signal has surprised.

        (LitServe's watch over its processes may look once more when they have ended, and log that.)
        """
        assert self.process.wait(SECONDS) == 0
        assert "\nKeyboardInterrupt\n" not in self.log.read_text()
        for _ in wait():
            try:
                os.killpg(self.process.pid, 0)
            except ProcessLookupError:
                return

    def kill(self):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def wait():
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        yield
        time.sleep(0.1)
    pytest.fail(f"not done within {SECONDS} s")


def encoded(image, kind="PNG"):
    image.save(file := io.BytesIO(), kind)
    return file.getvalue()


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """A folder with a checkpoint, images as files, and what the model finds in them."""
    folder = tmp_path_factory.mktemp("serve")
    module = made("mobilenet_v2", (6, 3, 64, 80), layers=["features.6", "features.13"], resize=(72, 96), crop=(64, 80))
    module.save(folder / "m.ckpt")
    images = [Image.fromarray(each) for size in SIZES for each in pictures(size, 2)]
    return folder, [encoded(image) for image in images], module.inspect(images)


@pytest.fixture(scope="module")
def server(fitted):
    server = Server(fitted[0])
    try:
        server.ready()
        yield server
    finally:
        server.kill()


def check(answer, expected):
    status, text = answer
    assert status == 200, text
    found, said = json.loads(text), expected.to_dict()
    assert found["score"] == pytest.approx(expected.score, rel=1e-5)
    for name in ("verdict", "p_value", "threshold", "height", "width"):
        assert found[name] == said[name]
    assert [each["box"] for each in found["regions"]] == [each["box"] for each in said["regions"]]
    levels = np.asarray(Image.open(io.BytesIO(base64.b64decode(found["map"]))))
    assert (levels.dtype, levels.max()) == (np.uint16, 65535)
    heat = np.nan_to_num(expected.anomaly_map)
    np.testing.assert_allclose(levels / 65535 * found["map_highest"], heat, rtol=0, atol=2e-5 * heat.max())


def wrong():
    """Files that are refused, and what is said of them."""
    image = Image.fromarray(pictures((200, 200), 1)[0])
    return [
        (b"", 422, "Field required"),
        (b"no image", 422, "not an image"),
        (encoded(image)[:20_000], 422, "not an image, or cut short"),
        (encoded(image, "GIF"), 422, "send a whole BMP, JPEG, PNG, TIFF or WebP file"),
        (encoded(Image.new("F", (50, 50)), "TIFF"), 422, "numbers of 32 bits have no defined range"),
        # cut short, which would show if it were decoded
        (encoded(Image.new("1", (14000, 14000)))[:5000], 422, "has 14000x14000 pixels; send one of at most 20,000,000"),
        (bytes(BYTES + 1), 413, "Payload too large"),
    ]


def test_answers_under_load(server, fitted):
    _, files, expected = fitted
    refused = wrong()
    bodies = [refused[i // 8 % len(refused)][0] if i % 8 == 0 else files[i % len(files)] for i in range(200)]
    start = time.monotonic()
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(server.ask, bodies))
    assert time.monotonic() - start < SECONDS
    for i, answer in enumerate(answers):
        if i % 8:
            check(answer, expected[i % len(files)])
        else:
            _, status, said = refused[i // 8 % len(refused)]
            assert answer[0] == status
            assert said in answer[1]
            assert "\n" not in answer[1]
    assert "Traceback" not in server.log.read_text()


def test_a_stop_answers_what_was_asked(server, fitted):
    """Ctrl+C, which reaches all processes."""
    large = Image.fromarray(pictures((1200, 1600), 1)[0])
    module = PatchCore.load_from_checkpoint(fitted[0] / "m.ckpt")
    file, expected = encoded(large), module.inspect(large)
    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(server.ask, file) for _ in range(8)]
        time.sleep(0.2)
        assert server.ask() == (200, "ok")
        assert not all(each.done() for each in asked)
        os.killpg(server.process.pid, signal.SIGINT)
        for each in asked:
            check(each.result(), expected)
    server.gone()


def test_a_stop_while_the_model_loads(fitted):
    server = Server(fitted[0])
    try:
        for _ in wait():
            if "running on" in server.log.read_text():
                break
        time.sleep(1)
        server.process.terminate()
        server.gone()
        assert "Traceback" not in server.log.read_text()
    finally:
        server.kill()
