"""Where reports go: the console, the run's folder, and files that are either whole or not there."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import lightning as L
from rich.console import Console


def output_folder(trainer: L.Trainer) -> Path:
    """Folder of the run: the logger's, else the Trainer's ``default_root_dir``; the same on every process.

    Every process must call it, as Lightning broadcasts the folder: one that does not stalls the others.
    """
    return Path(trainer.log_dir or trainer.default_root_dir)


def plain_console() -> Console:
    """Console that prints folders and defect types as they are, whatever brackets and colons they hold."""
    return Console(soft_wrap=True, markup=False, emoji=False)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give a temporary name beside ``path``, renamed to it when the block ends well, removed otherwise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    partial = Path(name)
    try:
        yield partial
        partial.chmod(0o644)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
