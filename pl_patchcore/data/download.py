"""Archives from the network: an address -> the folder that a data module reads.

Beside the folder ``data/mtd`` lie the archive ``data/mtd.zip`` and ``mtd.zip.lock`` (both may be deleted), and for
a while ``mtd.zip.partial``, its ``mtd.zip.partial.note`` (of which version of the file it is), and ``mtd.unpacking``.
A killed process leaves these to the next call. A folder under the final name is always whole.
"""

from __future__ import annotations

import errno
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
import tarfile
import time
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from email.message import Message
from functools import partial
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import IO, Any
from urllib.error import HTTPError
from urllib.parse import unquote, urlsplit
from urllib.request import Request, urlopen

from filelock import FileLock, Timeout
from tqdm import tqdm

from pl_patchcore.errors import UserError

SUFFIXES = (".tar", ".tar.gz", ".tar.xz", ".zip")
_BLOCK = 1 << 20  # bytes read at once
_HEADER = 1 << 24  # bytes of a tar file read at once, at most
_TIMEOUT = 30.0  # seconds that connecting, or waiting for more bytes, may take
_SLOW = 60.0, 1000  # seconds after which a download that came at fewer bytes a second is given up
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
) -> Path:
    """Make ``folder`` from the archive at ``url``.

    An archive that lies beside ``folder`` already is used without network. A broken download is continued, here and by
    the next call, unless the file has changed meanwhile. An archive with a path that leads out of the folder, a link or
    a device in it is refused before anything is written.

    Args:
        url: Address of the archive: http, https or file.
        folder: Folder to make; must not exist.
        sha256: Checksum of the archive, 64 hexadecimal digits; None skips the check and logs what the sum is.
        name: File name of the archive beside ``folder``; None takes the last part of ``url``.
        strip: Leave out the one folder at the top of the archive that holds all others.
        by_hand: How a person gets the archive, for error messages: "register at ... and fetch ...".

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
    again = f"delete {archive} and run again, or {remedy}"
    try:
        archive.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{archive}.lock", timeout=0):  # a killed process holds it no longer
            if folder.exists() or folder.is_symlink():
                raise UserError(f"{folder}: is there already and is never overwritten; move it away or use it.")
            if not archive.exists():
                _download(url, archive, remedy)
            with archive.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if sha256 is None:
                log.warning("%s: no checksum is known for it, so it was not checked; its sha256 is %s.", archive, found)
            elif found != sha256.lower():
                raise UserError(f"{archive}: its sha256 is {found}, not {sha256.lower()}; {again}.")
            _unpack(archive, folder, strip, again)
    except Timeout:
        raise UserError(f"{archive}: another process is fetching it; wait until it is done.") from None
    except (OSError, NotImplementedError) as error:  # NotImplementedError: a file system that knows no locks
        message = f"{folder}: cannot be made ({_line(error)}); give a folder that can be written, with space."
        raise UserError(message) from error
    return folder


def _download(url: str, archive: Path, remedy: str) -> None:
    """Bring ``url`` to ``archive`` through ``<archive>.partial``, in as many tries as it takes."""
    part = archive.with_name(f"{archive.name}.partial")
    note = part.with_name(f"{part.name}.note")
    try:
        with part.open("ab") as out:
            for pause in (*_PAUSES, None):
                try:
                    _one_try(url, out, note)
                    break
                except (OSError, http.client.HTTPException, ValueError) as error:
                    if getattr(error, "errno", None) == errno.ENOSPC:
                        raise
                    reason, again = _explain(error)
                    if pause is None or not again or url.startswith("file:"):
                        raise UserError(f"{url}: cannot be downloaded ({reason}); {remedy}.") from error
                    log.warning("%s: %s; trying again in %g s.", url, reason, pause)
                    time.sleep(pause)
    finally:
        if not part.stat().st_size:
            part.unlink()
            note.unlink(missing_ok=True)
    part.replace(archive)
    note.unlink(missing_ok=True)


def _one_try(url: str, out: IO[bytes], note: Path) -> None:
    """Ask for the bytes that ``out`` lacks, append them, and return only if it is whole then."""
    have = out.seek(0, 2)
    noted_url, _, version = note.read_text(encoding="utf-8").partition("\n") if note.exists() else ("", "", "")
    resume = bool(have and version and noted_url == url)
    conditions = {"Range": f"bytes={have}-", "If-Range": version} if resume else {}
    try:
        response = urlopen(Request(url, headers={"User-Agent": "pl-patchcore", **conditions}), timeout=_TIMEOUT)
    except HTTPError as error:
        if error.code != 416:  # Range Not Satisfiable
            raise
        response = error
    with response:
        headers, total = response.headers, None
        if response.status in (206, 416):
            same, span = resume and _version(headers) in ("", version), headers.get("Content-Range", "")
            found = re.fullmatch(rf"bytes \*/({have})" if response.status == 416 else rf"bytes {have}-\d+/(\d+)", span)
            if not same or not found:
                out.truncate(0)
                raise OSError("the file has changed since its first part came; that part was dropped")
            if response.status == 416:  # nothing is lacking
                return
            total = int(found[1])
        else:  # the whole file: a first try, a changed file, or a server that knows no ranges
            out.truncate(0)
            have = 0
            note.write_text(f"{url}\n{_version(headers)}", encoding="utf-8")
            length = headers.get("Content-Length", "")
            total = int(length) if length.isdecimal() else None
        _check_space(note.parent, 0 if total is None else total - have)
        began = time.monotonic()
        with _bar(desc=note.name.removesuffix(".partial.note"), total=total, initial=have) as bar:
            while block := response.read1(_BLOCK):  # read1: keeps what came before a connection breaks
                out.write(block)
                bar.update(len(block))
                if (waited := time.monotonic() - began) > _SLOW[0] and out.tell() - have < waited * _SLOW[1]:
                    raise OSError(f"it comes at fewer than {_SLOW[1]} bytes a second")
    size = out.seek(0, 2)
    if not size or total not in (None, size):
        raise OSError(f"{size} of {total or 'unknown'} bytes came")


def _explain(error: Exception) -> tuple[str, bool]:
    """What went wrong, and whether another try may do better."""
    if isinstance(error, HTTPError):
        error.close()
        return f"the server answers {error.code} {_line(error.reason)}", error.code in _PASSING
    reason = getattr(error, "reason", error)
    return _line(reason), not isinstance(reason, ssl.SSLCertVerificationError)


def _version(headers: Message) -> str:
    """What tells two versions of a file apart; a weak ETag (``W/...``) does not by the byte."""
    tag = str(headers.get("ETag", "W/"))
    return str(headers.get("Last-Modified", "")) if tag.startswith("W/") else tag


def _check_space(folder: Path, size: int) -> None:
    free = shutil.disk_usage(folder).free
    if size > free:
        raise OSError(errno.ENOSPC, f"needs {size:,} bytes on a disk with {free:,} free")


def _line(error: object) -> str:
    """What an exception says, on one line, without a server's control characters."""
    text = "".join(c if c.isprintable() else " " for c in str(error))
    return " ".join(text.split()) or type(error).__name__


def _unpack(archive: Path, folder: Path, strip: bool, remedy: str) -> None:
    """Write the members of ``archive`` beside ``folder``, then give them its name."""
    staging = folder.with_name(f"{folder.name}.unpacking")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        with _opened(archive) as packed:
            members = _checked_members(archive, packed)
            total = sum(size for _, size in members)
            _check_space(folder.parent, total)
            staging.mkdir()
            with _bar(desc=folder.name, total=total) as bar:
                for member, size in members:
                    packed.extract(member, staging)
                    bar.update(size)
        paths, tops = list(staging.rglob("*")), sorted(staging.iterdir())
        if not any(path.is_file() for path in paths):
            raise UserError(f"{archive}: holds no file; give the archive of the data set.")
        if strip and (len(tops) != 1 or tops[0].is_file()):
            names = ", ".join(path.name for path in tops[:5])
            raise UserError(f"{archive}: has {names} at its top, not one folder; set strip=False.")
        for path in (staging, *paths):
            path.chmod(0o755 if path.is_dir() else 0o644)
        (tops[0] if strip else staging).rename(folder)
    except UserError:
        raise
    except _BROKEN as error:
        raise UserError(f"{archive}: is cut short or broken ({_line(error)}); {remedy}.") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


class _Bounded:
    """A tar file of which nobody reads a header of gigabytes into memory, as a small compressed file may hold."""

    def __init__(self, file: Any) -> None:
        self.file = file

    def read(self, size: int) -> bytes:
        if size > _HEADER:
            raise tarfile.ReadError(f"a header of {size:,} bytes")
        data: bytes = self.file.read(size)
        return data

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


@contextmanager
def _opened(archive: Path) -> Iterator[Any]:
    if archive.name.endswith(".zip"):
        with zipfile.ZipFile(archive) as packed:
            yield packed
        return
    with archive.open("rb") as file:
        first = file.read(6)
    unpack: Any = gzip.open if first.startswith(b"\x1f\x8b") else lzma.open if first == b"\xfd7zXZ\0" else open
    with unpack(archive, "rb") as file, tarfile.open(fileobj=_Bounded(file), mode="r:") as tar:
        yield tar


def _checked_members(archive: Path, packed: Any) -> list[tuple[Any, int]]:
    """List the members with their sizes; refuse what is no plain file or folder, or leads out of the folder."""
    if isinstance(packed, zipfile.ZipFile):
        kinds = (0, stat.S_IFREG, stat.S_IFDIR)  # 0 where the archive was not made under Unix
        listed = [(i, i.filename, i.file_size, stat.S_IFMT(i.external_attr >> 16) in kinds) for i in packed.infolist()]
    else:
        packed.extraction_filter = getattr(tarfile, "data_filter", None)  # None before Python 3.11.4
        listed = [(info, info.name, info.size, info.isreg() or info.isdir()) for info in packed.getmembers()]
        packed.fileobj.seek(packed.offset)  # getmembers ends without a word at a header that is cut or nonsense
        if packed.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError("its end is missing")
        while packed.fileobj.read(_BLOCK):
            pass  # .gz and .xz keep a checksum at the end
    for _, name, _, plain in listed:
        path = PureWindowsPath(name)  # takes / and \ as separators, and knows drives
        if path.anchor or ".." in path.parts:
            raise UserError(f"{archive}: its member {name!r} leads out of the folder; do not use this archive.")
        if not plain:
            raise UserError(f"{archive}: its member {name!r} is a link or a device; do not use this archive.")
    return [(member, size) for member, _, size, _ in listed]
