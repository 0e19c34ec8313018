"""Where a run writes: the console, its folder, and files that are either whole or not there."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import lightning as L
from filelock import FileLock, Timeout
from rich.console import Console

from pl_patchcore.errors import UserError

FULL = 1 << 20  # bytes free on a disk that has just refused a file


def output_folder(trainer: L.Trainer) -> Path:
    """Folder of the run: the logger's, else the Trainer's ``default_root_dir``; the same on every process.

    Every process must call it, as Lightning broadcasts the folder: one that does not stalls the others.
    """
    return Path(trainer.log_dir or trainer.default_root_dir)


def spreadsheet_cell(path: str) -> str:
    """A path as a spreadsheet may show it: it takes none for a formula.

    Example:
        >>> spreadsheet_cell("=1+1.png")
        './=1+1.png'
    """
    return f".{os.sep}{path}" if path.startswith(tuple("=+-@\t\r")) else path


def plain_console() -> Console:
    """Console that prints folders and defect types as they are, whatever brackets and colons they hold."""
    return Console(soft_wrap=True, markup=False, emoji=False)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give a temporary name beside ``path``, renamed to it when the block ends well, removed otherwise.

    Raises:
        UserError: If the disk is full, the folder cannot be written to, or something else has the name.
    """
    partial, suffix = path, path.suffix or ".partial"  # torch.save takes no name that is a dot and no other
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"{path}: cannot be written: is a directory or a device; give the name of a file.")
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.stem[:100]}-", suffix=suffix, dir=path.parent)
        os.close(handle)
        partial = Path(name)
        yield partial
        partial.chmod(0o644)
        partial.replace(path)
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError where a disk is full
        if reason := _refusal(error, path, partial):
            raise UserError(f"{path}: cannot be written: {reason}.") from error
        raise
    finally:
        if partial != path:
            partial.unlink(missing_ok=True)


def _refusal(error: OSError | RuntimeError, path: Path, partial: Path) -> str | None:
    """Why a file could not be written, and what to do; None if the error is about something else."""
    free, number, name = free_bytes(path.parent), None, None
    if isinstance(error, OSError):
        number, name = error.errno, error.filename
    elif free < FULL:
        number = errno.ENOSPC
    of_block = partial != path  # else there is no temporary file yet
    if number is None or (of_block and name is not None and Path(name) not in (path, partial, *path.parents)):
        return None
    if number in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk is full ({free / 1e6:.1f} MB free); make room, or choose another folder"
    return f"{os.strerror(number).lower()}; make {_existing(path.parent)} a folder that takes it, or choose another one"


def free_bytes(folder: Path) -> int:
    """Bytes free on the disk of a folder that need not exist yet."""
    return shutil.disk_usage(_existing(folder)).free


def _existing(folder: Path) -> Path:
    return next(place for place in (folder, *folder.absolute().parents) if place.exists())


def hold(folder: Path) -> FileLock:
    """Take a folder for this run, until the lock is released or the process ends; a `UserError` if another has it."""
    folder.mkdir(parents=True, exist_ok=True)
    # may be taken again by this process, which a lock knows by its path
    lock = FileLock(folder.resolve() / ".in_use", blocking=False, is_singleton=True)
    try:
        lock.acquire()
    except Timeout as error:
        raise UserError(f"{folder}: another run writes there now; wait for it, or choose another folder.") from error
    return lock


def check_output(folder: Path) -> None:
    """Make a folder for what a run writes; a `UserError`, before the work, if it takes no files."""
    with whole_file(folder / ".check") as partial:
        partial.write_bytes(bytes(FULL))
    (folder / ".check").unlink()
