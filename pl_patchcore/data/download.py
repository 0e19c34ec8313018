"""Archives from the network: an address -> the folder that a data module reads.

``fetch_archive`` downloads a ``.tar``, ``.tar.gz``, ``.tar.xz`` or ``.zip``, checks it and unpacks it. Three names may
lie beside the folder ``data/mtd``: the archive ``data/mtd.zip`` (it stays, and may be deleted), ``mtd.zip.partial``
with its ``mtd.zip.partial.note`` (what came so far, and of which version of the file), and ``mtd.unpacking`` (removed,
or left by a killed process and removed by the next call). A folder under the final name is always whole.

Only the standard library speaks to the network: urllib follows redirects and obeys ``https_proxy``.
"""

from __future__ import annotations

import gzip
import hashlib
import http.client
import logging
import lzma
import re
import shutil
import ssl
import stat
import struct
import sys
import tarfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import IO, Any, NamedTuple, cast
from urllib.error import HTTPError, URLError
from urllib.parse import unquote, urlsplit
from urllib.request import FTPHandler, Request, build_opener

from tqdm import tqdm

from pl_patchcore.errors import UserError

if sys.platform != "win32":
    import fcntl

SUFFIXES = (".tar", ".tar.gz", ".tar.xz", ".zip")
_BLOCK = 1 << 20  # bytes read at once
_PAUSES = (0.5, 1.0, 2.0, 4.0)  # seconds before the second try, the third, ...
_PASSING = (408, 429, 500, 502, 503, 504)  # HTTP answers that a later try may not get
_BROKEN = (
    *(EOFError, tarfile.TarError, zipfile.BadZipFile, gzip.BadGzipFile, zlib.error, lzma.LZMAError, struct.error),
    *(ValueError, OverflowError, RuntimeError),  # nonsense in a header; a password or an unknown compression in a .zip
)

log = logging.getLogger(__name__)
_bar = partial(tqdm, unit="B", unit_scale=True, mininterval=0.5)


def fetch_archive(
    url: str,
    folder: str | Path,
    *,
    sha256: str | None = None,
    name: str | None = None,
    strip: bool = False,
    by_hand: str = "",
    timeout: float = 30.0,
    progress: bool = True,
) -> Path:
    """Make ``folder`` from the archive at ``url``.

    An archive that already lies beside ``folder`` is used without network. A broken download is continued, by up to
    four further tries here and by the next call, unless the file has changed meanwhile. An archive with an absolute
    path, a ``..``, a link or a device in it is refused before anything is written.

    Args:
        url: Address of the archive: http, https or file.
        folder: Folder to make; must not exist.
        sha256: Checksum of the archive, 64 hexadecimal digits; None skips the check and logs what the sum is.
        name: File name of the archive beside ``folder``; None takes the last part of ``url``.
        strip: Leave out the one folder at the top of the archive that holds all others.
        by_hand: How a person gets the archive, for error messages: "register at ... and fetch ...".
        timeout: Seconds that connecting, or waiting for more bytes, may take.
        progress: Show bars with bytes, rate and time left.

    Raises:
        UserError: If ``folder`` exists, the archive cannot be had, has another checksum, is broken or hostile, the
            disk is full, or another process is fetching it.
    """
    folder = Path(folder).absolute()
    name = unquote(PurePosixPath(urlsplit(url).path).name) if name is None else name
    if not name.endswith(SUFFIXES) or Path(name).name != name:
        raise UserError(f"{url}: its file name {name!r} must end with one of {', '.join(SUFFIXES)}; give it as name.")
    if urlsplit(url).scheme not in ("http", "https", "file"):
        raise UserError(f"{url}: is not an address that begins with http://, https:// or file://; give one.")
    archive = folder.with_name(name)
    remedy = f"{by_hand or f'fetch {url} by other means'}, put it at {archive} and run again"
    try:
        archive.parent.mkdir(parents=True, exist_ok=True)
        with _alone(archive):
            if folder.exists() or folder.is_symlink():
                raise UserError(f"{folder}: is there already and is never overwritten; move it away or use it.")
            if by_person := archive.exists():
                log.info("%s: is there, nothing is downloaded.", archive)
            else:
                _download(url, archive, remedy, timeout, progress)
            with archive.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if sha256 is None:
                log.warning("%s: no checksum is known for it, so it was not checked; its sha256 is %s.", archive, found)
            elif found != sha256.lower():
                if not by_person:
                    archive.unlink()
                advice = "delete it and run again to download it" if by_person else "it was removed: run again"
                raise UserError(f"{archive}: its sha256 is {found}, not {sha256.lower()}; {advice}, or {remedy}.")
            _unpack(archive, folder, strip, progress, f"delete {archive} and run again, or {remedy}")
    except OSError as error:
        message = f"{folder}: cannot be made ({_line(error)}); give a folder that can be written, with space."
        raise UserError(message) from error
    return folder


@contextmanager
def _alone(archive: Path) -> Iterator[None]:
    """Refuse a second process at the same archive; a killed one holds no lock."""
    path = archive.with_name(f"{archive.name}.lock")
    with path.open("ab") as lock:
        if sys.platform != "win32":
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"{archive}: another process is fetching it; wait until it is done.") from None
            except OSError as error:
                log.info("%s: cannot be locked (%s); run no second process on it.", archive, error)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


# Download


class _FailedTry(Exception):
    """A try at the network that failed: the reason, and whether another try may do better."""


class _NoFTP(FTPHandler):
    """Takes the place of urllib's own, which would follow a redirect to ftp."""

    def ftp_open(self, request: Request) -> Any:
        raise URLError("ftp is not accepted")


def _download(url: str, archive: Path, remedy: str, timeout: float, progress: bool) -> None:
    """Bring ``url`` to ``archive`` through ``<archive>.partial``, in as many tries as it takes."""
    part = archive.with_name(f"{archive.name}.partial")
    note = part.with_name(f"{part.name}.note")
    try:
        with part.open("ab") as out:
            for pause in (*_PAUSES, None):
                try:
                    _one_try(url, out, note, archive, timeout, progress)
                    break
                except _FailedTry as failure:
                    reason, again = failure.args
                    if pause is None or not again or url.startswith("file:"):
                        raise UserError(f"{url}: cannot be downloaded ({reason}); {remedy}.") from failure
                    log.warning("%s: %s; trying again in %g s.", url, reason, pause)
                    time.sleep(pause)
    finally:
        if not part.stat().st_size:
            part.unlink()
            note.unlink(missing_ok=True)
    part.replace(archive)
    note.unlink(missing_ok=True)


def _one_try(url: str, out: IO[bytes], note: Path, archive: Path, timeout: float, progress: bool) -> None:
    """Ask for the bytes that ``out`` lacks, append them, and return only if it is whole then."""
    have = out.seek(0, 2)
    noted_url, _, version = note.read_text(encoding="utf-8").partition("\n") if note.exists() else ("", "", "")
    resume = bool(have and version and noted_url == url)
    conditions = {"Range": f"bytes={have}-", "If-Range": version} if resume else {}
    request = Request(url, headers={"User-Agent": "pl-patchcore", **conditions})
    with _network(build_opener(_NoFTP).open, request, timeout=timeout) as response:
        headers = response.headers
        same = resume and _version(headers) in ("", version)
        span = headers.get("Content-Range", "")
        total: int | None
        if response.status in (206, 416):
            if same and response.status == 416 and span == f"bytes */{have}":
                return
            found = re.fullmatch(rf"bytes {have}-\d+/(\d+)", span)
            if response.status == 416 or not same or not found:
                out.truncate(0)
                raise _FailedTry("the file has changed since its first part came; that part was dropped", True)
            total = int(found[1])
        else:  # the whole file: a first try, a changed file, or a server that knows no ranges
            out.truncate(0)
            have = 0
            note.write_text(f"{url}\n{_version(headers)}", encoding="utf-8")
            length = headers.get("Content-Length", "")
            total = int(length) if length.isdecimal() else None
        _check_space(archive, 0 if total is None else total - have)
        with _bar(desc=archive.name, total=total, initial=have, disable=not progress) as bar:
            while block := _network(response.read1, _BLOCK):  # read1: keeps what came before a connection breaks
                out.write(block)
                bar.update(len(block))
    size = out.seek(0, 2)
    if not size or total not in (None, size):
        raise _FailedTry(f"{size} of {total or 'unknown'} bytes came", True)


def _network(call: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Call what may fail for reasons of the network; an answer of status 416 is returned."""
    try:
        return call(*args, **options)
    except HTTPError as error:
        if error.code == 416:
            return error
        error.close()
        raise _FailedTry(f"the server answers {error.code} {error.reason}", error.code in _PASSING) from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise _FailedTry(_line(reason), not isinstance(reason, ssl.SSLCertVerificationError)) from error


def _version(headers: http.client.HTTPMessage) -> str:
    """What tells two versions of a file apart; a weak ETag (``W/...``) does not by the byte."""
    tag = str(headers.get("ETag", "W/"))
    return str(headers.get("Last-Modified", "")) if tag.startswith("W/") else tag


def _check_space(path: Path, size: int) -> None:
    free = shutil.disk_usage(path.parent).free
    if size > free:
        raise UserError(f"{path}: needs {size:,} bytes on a disk with {free:,} free; make room or use another disk.")


def _line(error: object) -> str:
    """What an exception says, on one line."""
    return " ".join(str(error).split()) or type(error).__name__


# Unpacking


class _Member(NamedTuple):
    name: str
    kind: str  # file, folder, or what is refused
    size: int  # bytes, unpacked
    open: Callable[[], IO[bytes]]


def _unpack(archive: Path, folder: Path, strip: bool, progress: bool, remedy: str) -> None:
    """Write the members of ``archive`` beside ``folder``, then give them its name."""
    staging = folder.with_name(f"{folder.name}.unpacking")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        zipped = archive.name.endswith(".zip")
        with zipfile.ZipFile(archive) if zipped else tarfile.open(archive) as packed:
            members = _zip_members(packed) if isinstance(packed, zipfile.ZipFile) else _tar_members(packed)
            placed = _placed(archive, members, strip)
            total = sum(member.size for _, member in placed)
            _check_space(folder, total)
            staging.mkdir()
            with _bar(desc=folder.name, total=total, disable=not progress) as bar:
                for parts, member in placed:
                    path = staging.joinpath(*parts)
                    (path if member.kind == "folder" else path.parent).mkdir(parents=True, exist_ok=True)
                    if member.kind == "file":
                        with member.open() as source, path.open("wb") as out:
                            shutil.copyfileobj(source, out, _BLOCK)
                    bar.update(member.size)
        for path in (staging, *staging.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)
        staging.rename(folder)
    except UserError:
        raise
    except _BROKEN as error:
        raise UserError(f"{archive}: is cut short or broken ({_line(error)}); {remedy}.") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _zip_members(packed: zipfile.ZipFile) -> list[_Member]:
    members = []
    for info in packed.infolist():
        mode = info.external_attr >> 16  # 0 where the archive was not made under Unix
        plain = stat.S_IFMT(mode) in (0, stat.S_IFREG)
        kind = "folder" if info.is_dir() else "file" if plain else "link" if stat.S_ISLNK(mode) else "device"
        members.append(_Member(info.filename, kind, info.file_size, partial(packed.open, info)))
    return members


def _tar_members(tar: tarfile.TarFile) -> list[_Member]:
    """List a .tar, reading it to its end: what is cut short or fails its own checksum shows here."""
    members = []
    for info in tar.getmembers():  # ends without a word at a header that is cut or nonsense
        link = info.issym() or info.islnk()
        kind = "folder" if info.isdir() else "file" if info.isreg() else "link" if link else "device"
        read = cast(Callable[[], IO[bytes]], partial(tar.extractfile, info))
        members.append(_Member(info.name, kind, info.size, read))
    file = cast(IO[bytes], tar.fileobj)
    file.seek(tar.offset)
    if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError("its end is missing")
    while file.read(_BLOCK):
        pass  # .gz and .xz keep a checksum at the end
    return members


def _placed(archive: Path, members: list[_Member], strip: bool) -> list[tuple[tuple[str, ...], _Member]]:
    """Check every member, and say where below the folder it goes."""
    placed = []
    for member in members:
        path = PureWindowsPath(member.name)  # takes / and \ as separators, and knows drives
        if path.anchor or ".." in path.parts:
            raise UserError(f"{archive}: its member {member.name!r} leads out of the folder; do not use this archive.")
        if member.kind not in ("file", "folder"):
            raise UserError(f"{archive}: its member {member.name!r} is a {member.kind}; do not use this archive.")
        if parts := PurePosixPath(member.name).parts:
            placed.append((parts, member))
    if strip:
        tops = sorted({parts[0] for parts, _ in placed})
        if len(tops) != 1 or any(len(parts) == 1 and member.kind == "file" for parts, member in placed):
            raise UserError(f"{archive}: has {', '.join(tops[:5])} at its top, not one folder; set strip=False.")
        placed = [(parts[1:], member) for parts, member in placed]
    if not any(member.kind == "file" for _, member in placed):
        raise UserError(f"{archive}: holds no file; give the archive of the data set.")
    return placed
