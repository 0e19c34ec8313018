"""One recipe over all categories of a data set -> a table.

Each row (a category, or scene, at a number of shots and a seed) is a process of its own, ``pl-patchcore run``, in a
folder of its own. So one that fails takes no other with it, memory is given back, and several run at once. A row is
finished when its ``metrics.json`` is there, which is written whole; a benchmark that was stopped goes on with the
rows that are not. The table says nothing of time, so that it is the same however often it was stopped.
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
) -> list[Job]:
    """List the rows: one for each category, number of shots and seed (see `cli.Trainer.benchmark`).

    ``settings`` is the configuration of ``pl-patchcore run`` that all share: ``model``, ``data``, ``trainer`` and more.
    """
    kind, known = type(datamodule), datamodule.categories()
    if strange := [name for name in categories or [] if name not in (*known, kind.category_all)]:
        raise UserError(f"no category {strange[0]!r}; there are {', '.join(known) or 'none to choose from'}.")
    names, jobs = categories or known or [kind.__name__.removesuffix("DataModule").lower()], []
    for category, number, seed in product(names, shots or [None], seeds or [None]):
        job, name = copy.deepcopy(settings), str(category)
        options = job["data"].setdefault("init_args", {})
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
        jobs.append(Job(str(category), number, seed, place, job))
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
        if processes > 1:
            job.settings["trainer"]["devices"] = 1
        with whole_file(job.folder / "job.yaml") as partial:
            partial.write_text(yaml.safe_dump(job.settings, sort_keys=False, allow_unicode=True), encoding="utf-8")
        environment = dict(os.environ)
        if processes > 1:
            environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
            visible = environment.get("CUDA_VISIBLE_DEVICES")
            gpus = visible.split(",") if visible else [str(number) for number in range(torch.cuda.device_count())]
            if gpus:
                environment["CUDA_VISIBLE_DEVICES"] = gpus[slot % len(gpus)]
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
        return ", ".join(f"{name} {_text(figures.get(key), 1, '.4f')}" for key, name in FIGURES.items())
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
        each figure its value, in [0, 1] or None, ``<figure>_se``, the standard error over seeds, None below two
        seeds, and ``<figure>_published``, in [0, 1] or None.
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


def _average(name: str, jobs: Sequence[Job], published: Sequence[float | None] | None) -> Line:
    """Line of the table: the mean over seeds of the means over the categories that have finished with the seed."""
    found = [(job.seed, figures) for job in jobs if (figures := job.figures())]
    line: Line = {"category": name, "shots": jobs[0].shots}
    line |= {"seeds": len({seed for seed, _ in found}), "missing": len(jobs) - len(found)}
    for place, key in enumerate(FIGURES):
        by_seed: dict[int | None, list[float]] = {}
        for seed, figures in found:
            if figures[key] is not None:
                by_seed.setdefault(seed, []).append(figures[key])
        means = [fmean(values) for values in by_seed.values()]
        reference = published[place] if published else None
        line[key] = fmean(means) if means else None
        line[f"{key}_se"] = stdev(means) / math.sqrt(len(means)) if len(means) > 1 else None
        line[f"{key}_published"] = None if reference is None else reference / 100
    return line


def write_table(folder: Path, lines: Sequence[Line], failed: Mapping[str, str], published: Published | None) -> None:
    """Write ``benchmark.csv``, ``benchmark.json`` and ``benchmark.md``, and print the table."""
    with whole_file(folder / "benchmark.csv") as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)
    source = None if published is None else published.source
    with whole_file(folder / "benchmark.json") as partial:
        content = {"published": source, "failed": dict(failed), "rows": list(lines)}
        partial.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    header, *rows = _cells(lines)
    notes = [f"{name} failed: {reason}" for name, reason in failed.items()]
    if source is not None and "published" in " ".join(header):
        notes.insert(0, f"Published: {source}; in percent, with the difference of ours.")
    escaped = [" | ".join(cell.replace("|", r"\|") for cell in row) for row in (header, *rows)]
    text = [f"| {row} |" for row in escaped]
    text.insert(1, "|---|" + "---:|" * (len(header) - 1))
    with whole_file(folder / "benchmark.md") as partial:
        partial.write_text("\n".join([*text, *(f"\n{note}" for note in notes)]) + "\n", encoding="utf-8")
    table = Table(header[0], *(Column(name, justify="right") for name in header[1:]))
    for row in rows:
        table.add_row(*row)
    console = plain_console()
    for printed in (table, *notes, f"Written to {folder}: benchmark.csv, benchmark.json, benchmark.md"):
        console.print(printed)


def _cells(lines: Sequence[Line]) -> list[list[str]]:
    """Header and rows as text, in percent; columns that hold nothing are left out."""
    with_shots = any(line["shots"] is not None for line in lines)
    compared = [key for key in FIGURES if any(line[f"{key}_published"] is not None for line in lines)]
    rows = [["category", *["shots"] * with_shots]]
    for key, name in FIGURES.items():
        rows[0] += [name, *[f"published {name}"] * (key in compared)]
    for line in lines:
        missing = f" ({line['missing']} missing)" if line["missing"] else ""
        row = [line["category"] + missing, *[str(line["shots"] or "all")] * with_shots]
        for key in FIGURES:
            value, error, other = line[key], line[f"{key}_se"], line[f"{key}_published"]
            row.append(_text(value, 100, ".2f") + ("" if error is None else f" ± {100 * error:.2f}"))
            if key in compared:
                both = value is not None and other is not None
                row.append(_text(other, 100, ".1f") + (f" ({100 * (value - other):+.1f})" if both else ""))
        rows.append(row)
    return rows


def _text(value: float | None, factor: float, digits: str) -> str:
    return "–" if value is None else format(factor * value, digits)
