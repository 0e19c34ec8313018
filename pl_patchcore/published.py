"""Published figures, to stand beside one's own, from ``published.csv``.

The file holds a line for each figure's category (``average`` is over all of a data set), in percent, with the source.
Lines of a run whose settings a configuration can repeat hold these in the column ``settings``, YAML, on the line of the
average; `published_for` finds the run that a configuration repeats. Runs without settings are of another method, or of
another part of the data; `others_had` lists them. The PRO of the authors' code counts the nominal pixels of anomalous
images only, where ours counts those of all test images, so that the two cannot be compared to the last digit.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import yaml

Figures = Mapping[str, float]  # name of a figure, as in metrics.json: percent
_NAMES = ("run", "source", "data", "settings", "category")  # columns that are no figures


@dataclass(frozen=True)
class Published:
    """Figures of one published run."""

    run: str  # in words
    source: str
    data: str  # name of the data module's class
    settings: Mapping[str, Any] | None  # of the model, that they were made with; None: not ours to repeat
    average: Figures  # over all categories
    categories: Mapping[str, Figures]  # of each, where known


def _published(lines: list[dict[str, str]]) -> Published:
    """A run: the line of its average, and those of its categories."""
    first, settings = lines[0], yaml.safe_load(lines[0]["settings"])
    categories = {line["category"]: _figures(line) for line in lines[1:]}
    return Published(first["run"], first["source"], first["data"], settings, _figures(first), categories)


def _figures(line: Mapping[str, str]) -> Figures:
    return {name: float(value) for name, value in line.items() if name not in _NAMES and value}


with Path(__file__).with_suffix(".csv").open(newline="", encoding="utf-8") as _file:
    PUBLISHED = [_published(list(lines)) for _, lines in groupby(csv.DictReader(_file), itemgetter("run", "data"))]


def published_for(data: str, settings: Mapping[str, Any]) -> Published | None:
    """Find the published run on a data module, by its class's name, with these settings of the model (all of them).

    Example:
        >>> settings = {"backbone": "wide_resnet50_2", "coreset_method": "greedy", "coreset_ratio": 0.1}
        >>> published_for("MSTCDataModule", settings).average
        {'pixel_auroc': 91.8}
    """
    if settings.get("coreset_method") not in ("greedy", "approximate"):
        return None
    return next((run for run in PUBLISHED if run.data == data and _holds(settings, run.settings)), None)


def others_had(data: str) -> list[Published]:
    """List the published runs on a data set that are of another method, or of another part of the data.

    Example:
        >>> [run.average["pro_0.05"] for run in others_had("MVTecAD2DataModule")]
        [28.8, 26.0]
    """
    return [run for run in PUBLISHED if run.data == data and run.settings is None]


def _holds(settings: Any, wanted: Any) -> bool:
    if isinstance(wanted, Mapping):
        return isinstance(settings, Mapping) and all(_holds(settings.get(name), wanted[name]) for name in wanted)
    return bool(settings == wanted)
