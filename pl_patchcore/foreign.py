"""Files that may come from a stranger: what `torch.load` cannot see to, with ``weights_only=True`` too.

`checkpoint.py` and `backbone.py` read their files by it. Nothing of a file is executed; what it makes is bounded by its
size; damage is noticed.
"""

from __future__ import annotations

import pickle
import zipfile
from os import PathLike
from typing import IO, Any

import torch
from torch import Tensor

PICKLE_LIMIT = 4 << 20  # bytes: names, settings and shapes, of which torch reads about a million bytes a second
PLAIN_VALUES = 100_000  # values in the settings
PLAIN_DEPTH = 8  # settings inside settings
Source = str | PathLike[str] | IO[bytes]


def check_archive(source: Source) -> None:
    """Compare every checksum in the file, before anything is read of it.

    Raises:
        UnpicklingError: If it is no archive as `torch.save` writes it, whose size bounds what it unpacks to.
        BadZipFile: If a checksum differs.
    """
    if not zipfile.is_zipfile(source):
        raise pickle.UnpicklingError("no archive")
    with zipfile.ZipFile(source) as archive:
        entries = archive.infolist()
        stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
        pickled = sum(entry.file_size for entry in entries if entry.filename.endswith(".pkl"))
        if not stored or len({entry.filename for entry in entries}) < len(entries) or pickled > PICKLE_LIMIT:
            raise pickle.UnpicklingError("no archive as torch.save writes it")
        if archive.testzip() is not None:
            raise zipfile.BadZipFile("a checksum differs")


def is_plain(value: Any) -> bool:
    """Whether a value consists of None, bool, int, float, str, lists and dicts of them, and is of bounded size."""
    inside, count = [(value, 0)], 0
    while inside:
        value, depth = inside.pop()
        count += 1
        if depth > PLAIN_DEPTH or count > PLAIN_VALUES:
            return False
        if isinstance(value, dict):
            if not all(isinstance(name, str) for name in value):
                return False
            inside += [(inner, depth + 1) for inner in value.values()]
        elif isinstance(value, list | tuple):
            inside += [(inner, depth + 1) for inner in value]
        elif value is not None and type(value) not in (bool, int, float, str):
            return False
    return True


def is_whole(value: Any) -> bool:
    """Whether a value is a tensor whose numbers are all in the file, once each."""
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_meta or value.is_quantized:
        return False
    return value.nbytes <= value.untyped_storage().nbytes()
