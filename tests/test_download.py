"""Downloads from a real server on this machine, whose every answer is written down."""

import contextlib
import gzip
import hashlib
import io
import logging
import os
import re
import shutil
import signal
import socket
import ssl
import stat
import subprocess
import sys
import tarfile
import threading
import time
import tracemalloc
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from pl_patchcore import UserError
from pl_patchcore.data import download
from pl_patchcore.data.download import fetch_archive

DATA = Path(download.__file__).parent
NOISE = np.random.default_rng(0).bytes(300_000)  # does not compress: an archive is as long as what it holds
FILES = {"tiles-1.0/MT_Free/a.jpg": NOISE, "tiles-1.0/MT_Free/b.jpg": b"bb", "tiles-1.0/MT_Crack/c.jpg": b"c"}
UNPACKED = {name.removeprefix("tiles-1.0/"): data for name, data in FILES.items()}


def tar_bytes(files=FILES, mode="w", *extra):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(data), 0o4777
            tar.addfile(info, io.BytesIO(data))
        for info in extra:
            tar.addfile(info)
    return out.getvalue()


def zip_bytes(files=FILES):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, data in files.items():
            packed.writestr(name, data)
    return out.getvalue()


def sha(data):
    return hashlib.sha256(data).hexdigest()


def tree(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_GET(self):
        server, headers = self.server, {}
        self.close_connection = True
        call = SimpleNamespace(
            range=self.headers["Range"],
            condition=self.headers["If-Range"],
            agent=self.headers["User-Agent"],
            status=200,
            length=0,
        )
        server.calls.append(call)
        data, start = server.files.get(self.path), 0
        if self.path in server.moved:
            call.status, headers["Location"], data = 302, server.moved[self.path], b""
        elif server.statuses:
            call.status, data = server.statuses.pop(0), b"an error page"
        elif data is None:
            call.status, data = 404, b"no such page"
        if call.status == 200:
            version = server.date if server.etag is None or server.etag.startswith("W/") else server.etag
            if server.etag:
                headers["ETag"] = server.etag
            if server.date:
                headers["Last-Modified"] = server.date
            if call.range and server.ranges and (call.condition == version or not server.obeys_if_range):
                start = int(re.fullmatch(r"bytes=(\d+)-", call.range)[1])
                call.status = 206 if start < len(data) else 416
                headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
                if call.status == 416:
                    headers["Content-Range"] = f"bytes */{len(data)}"
        data = data[start:]
        self.send_response(call.status, server.reason)
        for name, value in headers.items():
            self.send_header(name, value)
        if server.chunked:
            self.send_header("Transfer-Encoding", "chunked")
        elif server.says_length:
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        stop = server.cuts.pop(0) if server.cuts and call.status in (200, 206) else None
        part = data[:stop]
        call.length = len(part)  # before it goes out: the client may be done before this thread is
        if server.chunked:
            self.wfile.write(f"{len(data):x}\r\n".encode() + part + (b"\r\n0\r\n\r\n" if stop is None else b""))
        elif server.drips:
            with contextlib.suppress(ConnectionError):  # the client has had enough
                for byte in part:
                    self.wfile.write(bytes([byte]))
                    time.sleep(0.01)
        else:
            self.wfile.write(part)
        self.wfile.flush()
        if stop is not None and server.stalls:
            server.released.wait(20)
        if stop is not None and server.after_cut:
            server.after_cut()


class Server(ThreadingHTTPServer):
    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.calls, self.files, self.moved, self.statuses, self.cuts = [], {}, {}, [], []
        self.etag, self.date, self.ranges, self.obeys_if_range = '"one"', None, True, True
        self.chunked, self.says_length, self.stalls, self.after_cut = False, True, False, None
        self.released, self.drips, self.reason = threading.Event(), False, None

    def url(self, path):
        return f"http://127.0.0.1:{self.server_port}{path}"

    def serve(self, path, data):
        self.files[path] = data
        return self.url(path)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(download, "_PAUSES", (0.01, 0.01))
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.released.set()
        running.shutdown()
        thread.join()


@pytest.fixture
def fetch(tmp_path):
    def call(url, **options):
        return fetch_archive(url, tmp_path / "data" / "mtd", **({"strip": True} | options))

    return call


def beside(tmp_path):
    return sorted(path.name for path in (tmp_path / "data").iterdir() if path.suffix != ".lock")


# Whole downloads


@pytest.mark.parametrize("name", ["mtd.tar", "mtd.tar.gz", "mtd.tar.xz", "mtd.zip"])
def test_whole_download(server, fetch, tmp_path, name):
    data = zip_bytes() if name == "mtd.zip" else tar_bytes(FILES, name.replace("mtd.tar", "w").replace(".", ":"))
    old = os.umask(0o077)
    try:
        folder = fetch(server.serve(f"/{name}?raw=1", data), sha256=sha(data).upper())
    finally:
        os.umask(old)
    assert folder == tmp_path / "data" / "mtd"
    assert tree(folder) == UNPACKED
    for path in (folder, *folder.rglob("*")):
        assert stat.S_IMODE(path.stat().st_mode) == (0o755 if path.is_dir() else 0o644)
    assert beside(tmp_path) == ["mtd", name]
    assert (tmp_path / "data" / name).read_bytes() == data
    assert [(call.status, call.range, call.agent) for call in server.calls] == [(200, None, "pl-patchcore")]


def test_redirects(server, fetch):
    server.moved["/old.zip"] = server.serve("/new/place", zip_bytes())
    assert tree(fetch(server.url("/old.zip"))) == UNPACKED


def test_file_address(fetch, tmp_path):
    with pytest.raises(UserError, match=r"No such file.*put it at .*/data/other\.zip and run again"):
        fetch((tmp_path / "none.zip").as_uri(), name="other.zip")
    assert beside(tmp_path) == []
    (tmp_path / "a place").mkdir()
    source = tmp_path / "a place" / "mtd.zip"
    source.write_bytes(zip_bytes())
    assert tree(fetch(source.as_uri())) == UNPACKED


def test_length_unknown(server, fetch):
    server.says_length = False
    assert tree(fetch(server.serve("/mtd.zip", zip_bytes()))) == UNPACKED


def test_progress(server, tmp_path, capsys):
    fetch_archive(server.serve("/b.zip", zip_bytes()), tmp_path / "b")
    shown = capsys.readouterr().err
    assert re.search(r"b\.zip: +100%.* 30\dk/30\dk .*B/s", shown)
    assert re.search(r"b: +100%.* 300k/300k .*B/s", shown)


# Broken downloads


@pytest.mark.parametrize("etag", ['"one"', None, 'W/"weak"'])
def test_cut_connection_is_resumed(server, fetch, etag):
    data = tar_bytes()
    server.etag, server.date, server.cuts = etag, "Wed, 21 Oct 2015 07:28:00 GMT", [100_000, 50_000]
    assert tree(fetch(server.serve("/mtd.tar", data), sha256=sha(data))) == UNPACKED
    assert [call.range for call in server.calls] == [None, "bytes=100000-", "bytes=150000-"]
    assert [call.length for call in server.calls] == [100_000, 50_000, len(data) - 150_000]
    assert {call.condition for call in server.calls[1:]} == {etag if etag == '"one"' else server.date}


def test_no_version_no_resume(server, fetch):
    server.etag, server.cuts = None, [100_000]
    assert tree(fetch(server.serve("/mtd.tar", tar_bytes()))) == UNPACKED
    assert [call.range for call in server.calls] == [None, None]


def test_short_answer_is_never_accepted(server, fetch, tmp_path):
    data = zip_bytes()
    server.cuts = [1000] * 3
    with pytest.raises(UserError, match=rf"3000 of {len(data)} bytes came.*put it at .*/data/mtd\.zip and run again"):
        fetch(server.serve("/mtd.zip", data))
    assert len(server.calls) == 3
    assert beside(tmp_path) == ["mtd.zip.partial", "mtd.zip.partial.note"]
    assert tree(fetch(server.url("/mtd.zip"))) == UNPACKED
    assert server.calls[-1].range == "bytes=3000-"
    assert beside(tmp_path) == ["mtd", "mtd.zip"]


def test_cut_in_a_chunk_is_seen(server, fetch):
    data = tar_bytes()
    server.chunked, server.cuts = True, [100_000]
    assert tree(fetch(server.serve("/mtd.tar", data), sha256=sha(data))) == UNPACKED
    assert [call.range for call in server.calls] == [None, "bytes=100000-"]


def test_nothing_came(server, fetch, tmp_path):
    with pytest.raises(UserError, match="0 of unknown bytes came"):
        fetch(server.serve("/mtd.zip", b""))
    assert beside(tmp_path) == []


def test_stalled_server_times_out(server, fetch, monkeypatch):
    monkeypatch.setattr(download, "_TIMEOUT", 0.2)
    server.stalls, server.cuts = True, [1000] * 3
    begin = time.monotonic()
    with pytest.raises(UserError, match=r"timed out\); fetch"):
        fetch(server.serve("/mtd.zip", zip_bytes()))
    assert time.monotonic() - begin < 10


def test_dripping_server_is_given_up(server, fetch, monkeypatch):
    monkeypatch.setattr(download, "_SLOW", (0.1, 1000))
    server.drips = True
    with pytest.raises(UserError, match=r"fewer than 1000 bytes a second\); fetch"):
        fetch(server.serve("/mtd.zip", zip_bytes()))


def test_control_characters_of_a_server_are_not_shown(server, fetch):
    server.statuses, server.reason = [403], "no\x1b[2J\x07way"
    with pytest.raises(UserError, match=r"the server answers 403 no \[2J way\)"):
        fetch(server.serve("/mtd.zip", b""))


@pytest.mark.parametrize("obeys_if_range", [True, False])
def test_changed_file_restarts(server, fetch, obeys_if_range):
    """A server that obeys If-Range answers 200; one that does not sends another ETag with its part."""
    server.cuts, server.obeys_if_range = [100_000], obeys_if_range
    new = tar_bytes({name: data[::-1] for name, data in FILES.items()})

    def change():
        server.etag, server.files["/mtd.tar"] = '"two"', new

    server.after_cut = change
    folder = fetch(server.serve("/mtd.tar", tar_bytes()))
    assert tree(folder) == {name: data[::-1] for name, data in UNPACKED.items()}
    assert (folder.parent / "mtd.tar").read_bytes() == new
    assert [call.status for call in server.calls] == ([200, 200] if obeys_if_range else [200, 206, 200])


def test_other_address_restarts(server, fetch):
    server.cuts = [1000] * 3
    with pytest.raises(UserError):
        fetch(server.serve("/a/mtd.tar", tar_bytes()))
    fetch(server.serve("/b/mtd.tar", tar_bytes()))
    assert server.calls[-1].range is None


def test_server_without_ranges_restarts(server, fetch):
    data = tar_bytes()
    server.ranges, server.cuts = False, [100_000]
    assert tree(fetch(server.serve("/mtd.tar", data), sha256=sha(data))) == UNPACKED
    assert [(call.range, call.status) for call in server.calls] == [(None, 200), ("bytes=100000-", 200)]


@pytest.mark.parametrize(("more", "statuses"), [(b"", [416]), (b"more", [416, 200])])
def test_killed_after_the_last_byte(server, fetch, tmp_path, more, statuses):
    """A partial file that is whole is taken; one longer than the file is fetched anew."""
    data = tar_bytes()
    url = server.serve("/mtd.tar", data)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mtd.tar.partial").write_bytes(data + more)
    (tmp_path / "data" / "mtd.tar.partial.note").write_text(f'{url}\n"one"')
    assert tree(fetch(url, sha256=sha(data))) == UNPACKED
    assert [call.status for call in server.calls] == statuses


# without what the packages import beside this module: torch takes seconds
RUN = f"""
import sys, types
for name, folder in (("pl_patchcore", {str(DATA.parent)!r}), ("pl_patchcore.data", {str(DATA)!r})):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [folder]
from pl_patchcore.data.download import fetch_archive
fetch_archive(*sys.argv[1:3], strip=True)
"""


def test_killed_process_is_resumed(server, fetch, tmp_path):
    data = tar_bytes()
    url = server.serve("/mtd.tar", data)
    server.stalls, server.cuts = True, [200_000]
    child = subprocess.Popen([sys.executable, "-c", RUN, url, str(tmp_path / "data" / "mtd")])
    partial = tmp_path / "data" / "mtd.tar.partial"
    deadline = time.monotonic() + 120
    while not (partial.exists() and partial.stat().st_size > 100_000):
        assert child.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    with pytest.raises(UserError, match="another process is fetching it"):
        fetch(url)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    server.released.set()
    have = partial.stat().st_size
    assert not (tmp_path / "data" / "mtd").exists()
    assert tree(fetch(url, sha256=sha(data))) == UNPACKED
    assert [call.range for call in server.calls] == [None, f"bytes={have}-"]
    assert server.calls[-1].length == len(data) - have
    assert beside(tmp_path) == ["mtd", "mtd.tar"]


def test_killed_while_unpacking(server, fetch, tmp_path):
    url = server.serve("/mtd.tar", tar_bytes())
    die = "import os, tarfile\ntarfile.copyfileobj = lambda *_: os.kill(os.getpid(), 9)\n" + RUN
    child = subprocess.run([sys.executable, "-c", die, url, str(tmp_path / "data" / "mtd")], check=False)
    assert child.returncode == -signal.SIGKILL
    assert beside(tmp_path) == ["mtd.tar", "mtd.unpacking"]
    (tmp_path / "data" / "mtd.unpacking" / "stale").touch()
    assert tree(fetch(url)) == UNPACKED
    assert len(server.calls) == 1
    assert beside(tmp_path) == ["mtd", "mtd.tar"]


# Checksums


def test_wrong_checksum(server, fetch, tmp_path):
    data = zip_bytes()
    with pytest.raises(UserError, match=f"its sha256 is {sha(data)}, not {'0' * 64}; delete .*mtd.zip and run again"):
        fetch(server.serve("/mtd.zip", data), sha256="0" * 64)
    assert beside(tmp_path) == ["mtd.zip"]
    assert tree(fetch(server.url("/mtd.zip"), sha256=sha(data))) == UNPACKED


def test_unknown_checksum_is_said(server, fetch, caplog):
    data = zip_bytes()
    with caplog.at_level(logging.WARNING, "pl_patchcore"):
        fetch(server.serve("/mtd.zip", data))
    assert "no checksum is known" in caplog.text
    assert sha(data) in caplog.text


# By hand


def test_archive_put_by_hand(server, fetch, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mtd.zip").write_bytes(zip_bytes())
    assert tree(fetch(server.url("/mtd.zip"), sha256=sha(zip_bytes()))) == UNPACKED
    assert not server.calls


def test_wrong_archive_put_by_hand_is_left_alone(server, fetch, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mtd.zip").write_bytes(b"mine")
    with pytest.raises(UserError, match=r"mtd\.zip: its sha256 is .* delete .*mtd\.zip and run again"):
        fetch(server.url("/mtd.zip"), sha256=sha(zip_bytes()))
    assert (tmp_path / "data" / "mtd.zip").read_bytes() == b"mine"


@pytest.mark.parametrize("status", [404, 410, 403])
def test_gone_for_good(server, fetch, tmp_path, status):
    server.statuses = [status]
    with pytest.raises(UserError) as caught:
        fetch(server.serve("/mtd.zip", zip_bytes()), by_hand="ask the authors for mtd.zip")
    message = str(caught.value)
    assert f"the server answers {status} " in message
    assert message.endswith(f"; ask the authors for mtd.zip, put it at {tmp_path / 'data' / 'mtd.zip'} and run again.")
    assert "\n" not in message
    assert len(server.calls) == 1
    assert beside(tmp_path) == []


def test_busy_server_is_asked_again(server, fetch):
    server.statuses = [503, 429]
    assert tree(fetch(server.serve("/mtd.zip", zip_bytes()))) == UNPACKED
    assert len(server.calls) == 3


def test_refused_connection(server, fetch, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/mtd.zip"
    with pytest.raises(UserError, match=r"refused\); fetch http://.* by other means, put it at .*mtd\.zip and run"):
        fetch(url)
    assert beside(tmp_path) == []


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificate")
def test_untrusted_certificate(server, fetch, tmp_path):
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    key_of = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"]
    command = ["openssl", "req", "-x509", *key_of, "-nodes", "-subj", "/CN=localhost"]
    subprocess.run([*command, "-keyout", str(key), "-out", str(certificate)], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    plain, tries = server.socket, []
    server.socket = context.wrap_socket(plain, server_side=True, do_handshake_on_connect=False)
    server.handle_error = lambda *_: tries.append(1)
    with pytest.raises(UserError, match=r"CERTIFICATE_VERIFY_FAILED.*and run again"):
        fetch(server.serve("/mtd.zip", zip_bytes()).replace("http:", "https:"))
    server.released.wait(0.2)
    assert len(tries) == 1  # another try would see the same certificate


# What is refused


def test_existing_folder_is_never_overwritten(server, fetch, tmp_path):
    (tmp_path / "data" / "mtd").mkdir(parents=True)
    (tmp_path / "data" / "mtd" / "mine").touch()
    with pytest.raises(UserError, match=r"data/mtd: is there already and is never overwritten"):
        fetch(server.serve("/mtd.zip", zip_bytes()))
    assert tree(tmp_path / "data" / "mtd") == {"mine": b""}
    assert not server.calls


@pytest.mark.parametrize(
    ("url", "match"),
    [
        ("ftp://host/mtd.zip", "http://, https:// or file://"),
        ("mtd.zip", "http://, https:// or file://"),
        ("https://host/mtd.rar", r"'mtd.rar' must end with one of \.tar, "),
        ("https://host/", "must end with one of"),
        ("https://host/..%2Fmtd.zip", "must end with one of"),
    ],
)
def test_bad_address(fetch, url, match):
    with pytest.raises(UserError, match=match):
        fetch(url)


def test_no_space_to_download(server, fetch, tmp_path, monkeypatch):
    data = tar_bytes()
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=len(data) - 1))
    with pytest.raises(UserError, match=rf"needs {len(data):,} bytes on a disk with {len(data) - 1:,} free"):
        fetch(server.serve("/mtd.tar", data))
    assert beside(tmp_path) == []


def test_no_space_to_unpack(server, fetch, tmp_path, monkeypatch):
    data = tar_bytes({"top/zeros": bytes(1_000_000)}, "w:gz")
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=999_999))
    with pytest.raises(UserError, match="needs 1,000,000 bytes on a disk with 999,999 free"):
        fetch(server.serve("/mtd.tar.gz", data))
    assert beside(tmp_path) == ["mtd.tar.gz"]


def test_folder_that_cannot_be_written(fetch, tmp_path):
    (tmp_path / "data").write_text("a file")
    with pytest.raises(UserError, match=r"data/mtd: cannot be made \(.*give a folder"):
        fetch("http://127.0.0.1/mtd.zip")


def special(name, kind, target=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def zip_special(name, mode):
    info = zipfile.ZipInfo(name)
    info.create_system, info.external_attr = 3, mode << 16
    out = io.BytesIO(zip_bytes())
    with zipfile.ZipFile(out, "a") as packed:
        packed.writestr(info, "/etc/passwd")
    return out.getvalue()


HOSTILE = {
    "tar up": ("mtd.tar", tar_bytes(FILES | {"../x": b""}), "leads out of the folder"),
    "tar up within": ("mtd.tar", tar_bytes(FILES | {"tiles-1.0/../../x": b""}), "leads out of the folder"),
    "tar absolute": ("mtd.tar", tar_bytes(FILES | {"/x": b""}), "leads out of the folder"),
    "tar two slashes": ("mtd.tar", tar_bytes(FILES | {"//x": b""}), "leads out of the folder"),
    "tar up folder": ("mtd.tar", tar_bytes(FILES, "w", special("..", tarfile.DIRTYPE)), "leads out of the folder"),
    "tar symlink": (
        "mtd.tar",
        tar_bytes(FILES, "w", special("tiles-1.0/l", tarfile.SYMTYPE, "..")),
        "is a link or a device",
    ),
    "tar hardlink": (
        "mtd.tar",
        tar_bytes(FILES, "w", special("tiles-1.0/l", tarfile.LNKTYPE, "tiles-1.0/MT_Crack/c.jpg")),
        "is a link or a device",
    ),
    "tar device": ("mtd.tar", tar_bytes(FILES, "w", special("tiles-1.0/d", tarfile.CHRTYPE)), "is a link or a device"),
    "tar pipe": ("mtd.tar", tar_bytes(FILES, "w", special("tiles-1.0/d", tarfile.FIFOTYPE)), "is a link or a device"),
    "zip up": ("mtd.zip", zip_bytes(FILES | {"../x": b""}), "leads out of the folder"),
    "zip up for Windows": ("mtd.zip", zip_bytes(FILES | {"..\\x": b""}), "leads out of the folder"),
    "zip drive": ("mtd.zip", zip_bytes(FILES | {"C:x": b""}), "leads out of the folder"),
    "zip absolute": ("mtd.zip", zip_bytes(FILES | {"/x": b""}), "leads out of the folder"),
    "zip symlink": ("mtd.zip", zip_special("tiles-1.0/l", stat.S_IFLNK | 0o777), "is a link or a device"),
    "zip device": ("mtd.zip", zip_special("tiles-1.0/l", stat.S_IFCHR | 0o777), "is a link or a device"),
}


@pytest.mark.parametrize(("name", "data", "match"), HOSTILE.values(), ids=HOSTILE)
def test_hostile_archive(server, fetch, tmp_path, monkeypatch, name, data, match):
    for module in ("shutil", "tarfile"):
        monkeypatch.setattr(f"{module}.copyfileobj", lambda *_: pytest.fail("a file was written too early"))
    with pytest.raises(UserError, match=f"{name}: its member .* {match}"):
        fetch(server.serve(f"/{name}", data))
    assert beside(tmp_path) == [name]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data"]


def broken(data, at):
    return data[:at] + bytes([data[at] ^ 255]) + data[at + 1 :]


GZ, XZ, ZIP = tar_bytes(FILES, "w:gz"), tar_bytes(FILES, "w:xz"), zip_bytes()
BLOCK_END = 512 + -(-len(NOISE) // 512) * 512  # the first member of the plain tar ends here
CUT = {
    "tar in a file": ("mtd.tar", tar_bytes()[:100_000]),
    "tar between files": ("mtd.tar", tar_bytes()[:BLOCK_END]),
    "tar in a header": ("mtd.tar", tar_bytes()[: BLOCK_END + 100]),
    "tar nonsense header": ("mtd.tar", broken(tar_bytes(), BLOCK_END)),
    "tar.gz": ("mtd.tar.gz", GZ[:100_000]),
    "tar.gz last bytes": ("mtd.tar.gz", GZ[:-4]),
    "tar.gz flipped": ("mtd.tar.gz", broken(GZ, len(GZ) - 6)),
    "tar.xz": ("mtd.tar.xz", XZ[:100_000]),
    "tar.xz flipped": ("mtd.tar.xz", broken(XZ, 100_000)),
    "zip": ("mtd.zip", ZIP[:100_000]),
    "zip flipped": ("mtd.zip", broken(ZIP, 100_000)),
    "zip with a password": ("mtd.zip", ZIP.replace(b"PK\1\2\x14\3\x14\0\0", b"PK\1\2\x14\3\x14\0\1")),
    "a page": ("mtd.tar.gz", b"<html>log in first</html>"),
    "a packed page": ("mtd.tar.gz", gzip.compress(b"<html>log in first</html>" * 100)),
}


@pytest.mark.parametrize(("name", "data"), CUT.values(), ids=CUT)
def test_broken_archive(server, fetch, tmp_path, name, data):
    with pytest.raises(UserError, match=rf"{name}: is cut short or broken \(.*delete .*{name} and run again, or ") as e:
        fetch(server.serve(f"/{name}", data))
    assert "\n" not in str(e.value)
    assert beside(tmp_path) == [name]


# What is unpacked


def test_without_strip(server, fetch):
    assert tree(fetch(server.serve("/mtd.zip", zip_bytes()), strip=False)) == FILES


@pytest.mark.parametrize("extra", ["readme.txt", "other/a.jpg"])
def test_strip_needs_one_folder(server, fetch, extra):
    with pytest.raises(UserError, match=f"has {extra.split('/')[0]}, tiles-1.0 at its top, not one folder"):
        fetch(server.serve("/mtd.zip", zip_bytes(FILES | {extra: b""})))


def test_dotted_members_and_empty_folders(server, fetch):
    folders = special(".", tarfile.DIRTYPE), special("./tiles-1.0/empty", tarfile.DIRTYPE)
    data = tar_bytes({f"./{name}": data for name, data in FILES.items()}, "w", *folders)
    folder = fetch(server.serve("/mtd.tar", data))
    assert tree(folder) == UNPACKED
    assert (folder / "empty").is_dir()


def test_archive_without_files(server, fetch):
    with pytest.raises(UserError, match="holds no file"):
        fetch(server.serve("/mtd.tar", tar_bytes({}, "w", special("top", tarfile.DIRTYPE))))


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME])
def test_headers_of_any_size_are_not_read_into_memory(tmp_path, kind):
    info = tarfile.TarInfo("long")
    info.type, info.size = kind, 1 << 28
    with gzip.open(tmp_path / "mtd.tar.gz", "wb", 1) as out:
        out.write(info.tobuf(tarfile.GNU_FORMAT))
        for _ in range(256):
            out.write(bytes(1 << 20))
        out.write(tar_bytes())
    tracemalloc.start()
    with pytest.raises(UserError, match=r"is cut short or broken \(a header of 268,435,456 bytes\)"):
        fetch_archive(f"file://{tmp_path}/mtd.tar.gz", tmp_path / "mtd")
    assert tracemalloc.get_traced_memory()[1] < 1 << 25
    tracemalloc.stop()
