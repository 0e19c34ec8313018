"""One recipe over all categories of a data set, or of several -> tables.

Each row (a category, or scene, at a number of shots and a seed) is a process of its own, ``pl-patchcore run``, in a
folder of its own. So one that fails takes no other with it, memory is given back, and several run at once. A row is
finished when its ``metrics.json`` is there, which is written whole; a benchmark that was stopped goes on with the
others. Several data sets are benchmarks in folders of their own, and a page that holds all their tables.
"""

from __future__ import annotations

import copy
import csv
import json
import logging
import math
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
import yaml
from rich.table import Column, Table
from tqdm import tqdm

from pl_patchcore.configs import with_category
from pl_patchcore.data import AnomalyDataModule
from pl_patchcore.errors import UserError
from pl_patchcore.files import plain_console, whole_file
from pl_patchcore.published import Published
from pl_patchcore.report.summary import FIGURES

if sys.platform != "win32":
    import fcntl

log = logging.getLogger(__name__)

# settings that change where and how fast a row is computed, and not what
_ELSEWHERE = {
    "accelerator", "callbacks", "default_root_dir", "devices", "enable_checkpointing", "enable_model_summary",
    "enable_progress_bar", "logger", "num_nodes", "num_workers", "plugins", "profiler", "strategy",
}  # fmt: skip
_POLL_SECONDS = 0.2
Line = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """A row of the benchmark: what is run, and where."""

    category: str  # product or scene; the data set's name where there is one only
    shots: int | None  # nominal training images; None for all
    seed: int | None  # of shots and model; None leaves both as configured
    folder: Path  # where the run writes; its name is that of the row
    settings: dict[str, Any]  # configuration of ``pl-patchcore run``
    headline: tuple[str, ...] = tuple(FIGURES)  # figures that the data set is compared by

    def figures(self) -> dict[str, Any] | None:
        """Figures of the finished run, None if it has not finished; a `UserError` if it had other settings."""
        if not (self.folder / "metrics.json").is_file():
            return None
        saved = self.folder / "job.yaml"
        theirs = yaml.safe_load(saved.read_text(encoding="utf-8")) if saved.is_file() else {}
        old, new = _identity(theirs), _identity(self.settings)
        if changed := [name for name in sorted(old | new) if old.get(name) != new.get(name)]:
            name, more = changed[0], f" (and {len(changed) - 1} other changes)" if changed[1:] else ""
            raise UserError(
                f"{self.folder}: was run with {name} {old.get(name)}, which is {new.get(name)} now{more}; give another "
                "--folder, or --restart true to run everything again."
            )
        result: dict[str, Any] = json.loads((self.folder / "metrics.json").read_text(encoding="utf-8"))
        return result


def _identity(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The settings that a row's figures depend on, dotted."""
    dotted: dict[str, Any] = {}
    for key, value in settings.items():
        if key not in _ELSEWHERE and (prefix or key in ("model", "data", "trainer", "seed_everything")):
            name = f"{prefix}{key}"
            dotted |= _identity(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return dotted


def plan(
    settings: dict[str, Any],
    datamodule: AnomalyDataModule,
    folder: Path,
    categories: Sequence[str] | None = None,
    shots: Sequence[int | None] | None = None,
    seeds: Sequence[int | None] | None = None,
    by_category: Mapping[str, Any] | None = None,
) -> list[Job]:
    """List the rows: one for each category, number of shots and seed (see `cli.Trainer.benchmark`).

    ``settings`` is the configuration of ``pl-patchcore run`` that all share: ``model``, ``data``, ``trainer`` and more.
    ``by_category`` are settings of the model that differ.
    """
    kind, known = type(datamodule), datamodule.categories()
    if strange := [name for name in categories or [] if name not in (*known, kind.category_all)]:
        raise UserError(f"no category {strange[0]!r}; there are {', '.join(known) or 'none to choose from'}.")
    names, jobs = categories or known or [kind.__name__.removesuffix("DataModule").lower()], []
    for category, number, seed in product(names, shots or [None], seeds or [None]):
        job, name = copy.deepcopy(settings), str(category)
        options = job["data"].setdefault("init_args", {})
        job["model"] = with_category(job["model"], by_category, name)
        if known and kind.category_argument is not None:
            options[kind.category_argument] = category
        if number is not None:
            options["shots"], name = number, f"{name}_shots{number}"
        if seed is not None:
            options["shots_seed"] = job["model"]["seed"] = seed
            name = f"{name}_seed{seed}"
        place = folder / name.replace("/", "_")
        trainer = job.setdefault("trainer", {})
        trainer |= {"default_root_dir": str(place), "logger": False, "enable_progress_bar": False}
        trainer["enable_checkpointing"] = bool(trainer.get("enable_checkpointing"))
        jobs.append(Job(str(category), number, seed, place, job, kind.headline))
    return jobs


def run_jobs(jobs: Sequence[Job], processes: int = 1, restart: bool = False) -> dict[str, str]:
    """Run the rows that are not finished, each in a process of its own, ``processes`` at once.

    On GPUs each gets the next one in turn; on the CPU they share its cores. Returns what went wrong, by the row's name.
    """
    for job in jobs if restart else ():
        (job.folder / "metrics.json").unlink(missing_ok=True)
    waiting = [job for job in jobs if job.figures() is None]
    if len(waiting) < len(jobs):
        log.info("%d of %d rows are finished already.", len(jobs) - len(waiting), len(jobs))
    running: dict[int, tuple[Job, subprocess.Popen[bytes], float]] = {}  # by slot
    failed: dict[str, str] = {}
    bar = tqdm(total=len(jobs), initial=len(jobs) - len(waiting), desc="Benchmark", unit=" rows")
    try:
        while waiting or running:
            for job in list(waiting):
                free = [slot for slot in range(processes) if slot not in running]
                if job.figures() is not None:  # by another benchmark
                    waiting.remove(job)
                    bar.update()
                elif free and (process := _start(job, free[0], processes)) is not None:
                    waiting.remove(job)
                    running[free[0]] = (job, process, time.monotonic())
            shown = ", ".join(job.folder.name for job, _, _ in running.values()) or "waiting for another process"
            bar.set_postfix_str(shown, refresh=shown != bar.postfix or sys.stderr.isatty())
            time.sleep(_POLL_SECONDS)
            for slot, (job, process, start) in list(running.items()):
                if process.poll() is not None:
                    del running[slot]
                    bar.update()
                    seconds = time.monotonic() - start
                    bar.write(f"{job.folder.name}: {_outcome(job, process.returncode, failed)} ({seconds:.0f} s)")
    finally:
        for _, process, _ in running.values():
            process.terminate()
        for _, process, _ in running.values():
            process.wait()
        bar.close()
    return failed


def _start(job: Job, slot: int, processes: int) -> subprocess.Popen[bytes] | None:
    """Start a row; None if another process is at it (one left behind when a benchmark was killed, say)."""
    job.folder.mkdir(parents=True, exist_ok=True)
    with (job.folder / ".lock").open("w") as lock, (job.folder / "log.txt").open("a") as output:
        if sys.platform != "win32":
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return None
        if job.figures() is not None:
            return None
        output.truncate(0)
        environment = dict(os.environ)
        if processes > 1:
            job.settings["trainer"]["devices"] = 1
            environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
            visible = environment.get("CUDA_VISIBLE_DEVICES")
            gpus = visible.split(",") if visible else [str(number) for number in range(torch.cuda.device_count())]
            if gpus:
                environment["CUDA_VISIBLE_DEVICES"] = gpus[slot % len(gpus)]
        with whole_file(job.folder / "job.yaml") as partial:
            partial.write_text(yaml.safe_dump(job.settings, sort_keys=False, allow_unicode=True), encoding="utf-8")
        return subprocess.Popen(
            [sys.executable, "-m", "pl_patchcore", "run", "--config", str(job.folder / "job.yaml")],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            pass_fds=[] if sys.platform == "win32" else [lock.fileno()],  # the lock is held until the run ends
        )


def _outcome(job: Job, code: int, failed: dict[str, str]) -> str:
    """What a process that has ended leaves: figures, or a reason, which goes into ``failed``."""
    if (figures := job.figures()) is not None:
        return ", ".join(f"{figure_name(key)} {_text(figures.get(key), 1, '.4f')}" for key in job.headline)
    if code < 0:
        reason = f"killed by signal {-code}{'; out of memory, perhaps' if code == -9 else ''}"
    else:
        log_file = job.folder / "log.txt"
        last = log_file.read_text(encoding="utf-8", errors="replace").strip().rpartition("\n")[2]
        reason = f"{last.removeprefix('pl-patchcore: error: ')} (see {log_file})"
    failed[job.folder.name] = reason
    return f"failed: {reason}"


def table_lines(jobs: Sequence[Job], published: Published | None = None) -> list[Line]:
    """Lines of the table: each category, its seeds averaged, and the average over categories.

    Returns:
        Dicts with ``category``, ``shots``, ``seeds`` (number averaged), ``missing`` (rows that have not finished); for
        each headline figure its value, in [0, 1] or None, ``<figure>_se``, the standard error over seeds, None below
        two seeds, and ``<figure>_published``, in [0, 1] or None.
    """
    lines = []
    for shots in dict.fromkeys(job.shots for job in jobs):
        here = [job for job in jobs if job.shots == shots]
        names = list(dict.fromkeys(job.category for job in here))
        known = published.categories if published and shots is None else {}
        average = published.average if published and shots is None and set(known) in (set(), set(names)) else None
        for name in names:
            beside = average if len(names) == 1 and not known else known.get(name)
            lines.append(_average(name, [job for job in here if job.category == name], beside))
        if len(names) > 1:
            lines.append(_average("average", here, average))
    return lines


def _average(name: str, jobs: Sequence[Job], published: Mapping[str, float] | None) -> Line:
    """Line of the table: the mean over seeds of the means over the categories that have finished with the seed."""
    found = [(job.seed, figures) for job in jobs if (figures := job.figures())]
    line: Line = {"category": name, "shots": jobs[0].shots}
    line |= {"seeds": len({seed for seed, _ in found}), "missing": len(jobs) - len(found)}
    for key in jobs[0].headline:
        by_seed: dict[int | None, list[float]] = {}
        for seed, figures in found:
            if figures.get(key) is not None:
                by_seed.setdefault(seed, []).append(figures[key])
        means = [fmean(values) for values in by_seed.values()]
        reference = (published or {}).get(key)
        line[key] = fmean(means) if means else None
        line[f"{key}_se"] = stdev(means) / math.sqrt(len(means)) if len(means) > 1 else None
        line[f"{key}_published"] = None if reference is None else reference / 100
    return line


def write_table(
    folder: Path,
    lines: Sequence[Line],
    failed: Mapping[str, str],
    published: Published | None,
    others: Sequence[Published] = (),
) -> None:
    """Write ``benchmark.csv``, ``benchmark.json`` and ``benchmark.md``, and print the table.

    ``lines`` are those of `table_lines`, ``failed`` what went wrong, by row. The figures ``published`` stand beside
    ours; those of ``others`` are named below the table.
    """
    notes = [f"{name} failed: {reason}" for name, reason in failed.items()]
    for other in reversed(others):
        had = ", ".join(f"{figure_name(key)} {value:.1f}" for key, value in other.average.items())
        notes.insert(0, f"Published elsewhere: {other.run} ({other.source}): {had}.")
    if published is not None and _compared(lines):
        told = f"Published: {published.run} ({published.source}); in percent, with the difference of ours."
        notes.insert(0, told)
    run, cells = None if published is None else published.run, _cells(lines)
    content = {"published": run, "failed": dict(failed), "notes": notes, "rows": list(lines)}
    _write(folder, lines, content, _markdown(cells, notes))
    _print(cells, notes, folder)


def write_overview(folder: Path, failed: Mapping[str, str]) -> None:
    """Write the tables of several data sets as one, and print their averages.

    ``benchmark.md`` has the averages of all, then the table of each set; ``benchmark.csv`` has all lines, with the
    column ``dataset``; ``benchmark.json`` has by set what those of the sets hold.

    Args:
        folder: Where to; its folders hold the benchmarks of the sets (`write_table`).
        failed: Each set, by the name of its folder, and what went wrong, empty where nothing did.
    """
    sets: dict[str, Any] = {}
    for name, reason in failed.items():
        path = folder / name / "benchmark.json"
        sets[name] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"rows": []}
        if not sets[name]["rows"]:
            sets[name] |= {"failed": {name: reason}, "notes": [f"{name} failed: {reason}"]}
    lines = [{"dataset": name} | line for name, one in sets.items() for line in one["rows"]]
    # of each set and number of shots the last line: the average, or the only one
    last = {(line["dataset"], line["shots"]): line | {"category": line["dataset"]} for line in lines}
    cells = _cells(list(last.values()), "data set")
    pages = [_markdown(cells, [note for one in sets.values() if not one["rows"] for note in one["notes"]])]
    pages += [
        f"## {name}\n\n{_markdown(_cells(one['rows']), one['notes'])}" for name, one in sets.items() if one["rows"]
    ]
    _write(folder, lines, {"datasets": sets}, "\n".join(pages))
    _print(cells, [], folder)


def _write(folder: Path, lines: Sequence[Line], content: Mapping[str, Any], page: str) -> None:
    """Write lines as CSV, content as JSON, and a page of Markdown."""
    with whole_file(folder / "benchmark.csv") as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(dict.fromkeys(key for line in lines for key in line)))
        writer.writeheader()
        writer.writerows(lines)
    for ending, text in (("json", json.dumps(content, indent=2, ensure_ascii=False) + "\n"), ("md", page)):
        with whole_file(folder / f"benchmark.{ending}") as partial:
            partial.write_text(text, encoding="utf-8")


def _markdown(cells: Sequence[Sequence[str]], notes: Sequence[str]) -> str:
    """A table and the notes below it."""
    text = [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in cells]
    text.insert(1, "|---|" + "---:|" * (len(cells[0]) - 1))
    return "\n".join([*text, *(f"\n{note}" for note in notes)]) + "\n"


def _print(cells: Sequence[Sequence[str]], notes: Sequence[str], folder: Path) -> None:
    table = Table(cells[0][0], *(Column(name, justify="right") for name in cells[0][1:]))
    for row in cells[1:]:
        table.add_row(*row)
    console = plain_console()
    for printed in (table, *notes, f"Written to {folder}: benchmark.csv, benchmark.json, benchmark.md"):
        console.print(printed)


def _figure_keys(lines: Sequence[Line]) -> list[str]:
    """The figures of the lines, in their order."""
    ending = "_published"
    return list(dict.fromkeys(key.removesuffix(ending) for line in lines for key in line if key.endswith(ending)))


def _compared(lines: Sequence[Line]) -> list[str]:
    """Those of which some line has a published one."""
    return [key for key in _figure_keys(lines) if any(line.get(f"{key}_published") is not None for line in lines)]


def _cells(lines: Sequence[Line], what: str = "category") -> list[list[str]]:
    """Header and rows as text, in percent; columns that hold nothing are left out."""
    with_shots = any(line["shots"] is not None for line in lines)
    keys, compared = _figure_keys(lines), _compared(lines)
    rows = [[what, *["shots"] * with_shots]]
    for key in keys:
        rows[0] += [figure_name(key), *[f"published {figure_name(key)}"] * (key in compared)]
    for line in lines:
        missing = f" ({line['missing']} missing)" if line["missing"] else ""
        row = [line["category"] + missing, *[str(line["shots"] or "all")] * with_shots]
        for key in keys:
            value, error, other = (line.get(name) for name in (key, f"{key}_se", f"{key}_published"))
            row.append(_text(value, 100, ".2f") + ("" if error is None else f" ± {100 * error:.2f}"))
            if key in compared:
                difference = "" if value is None or other is None else f" ({100 * (value - other):+.1f})"
                row.append(_text(other, 100, ".1f") + difference)
        rows.append(row)
    return rows


def figure_name(key: str) -> str:
    """Name of a figure of ``metrics.json`` in tables.

    Example:
        >>> figure_name("image_auroc"), figure_name("pro_0.05"), figure_name("image_average_precision")
        ('image AUROC', 'PRO at 0.05', 'image average precision')
    """
    stem, _, limit = key.rpartition("_")
    if limit.startswith("0."):
        return f"{figure_name(stem)} at {limit}"
    return {**FIGURES, "spro": "sPRO", "seg_f1": "SegF1"}.get(key, key.replace("_", " "))


def _text(value: float | None, factor: float, digits: str) -> str:
    return "–" if value is None else format(factor * value, digits)
