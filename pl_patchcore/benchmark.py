"""One recipe over all categories of a data set -> a table.

Each row (a category, or scene, at a number of shots and a seed) is a process of its own, ``pl-patchcore run``, in a
folder of its own. So that one that fails takes no other with it, memory is given back, and several run at once. A row
is finished when its ``metrics.json`` is there, which is written whole; a benchmark that was stopped goes on with the
rows that are not. The table says nothing of time, so that it is the same however often it was stopped.
"""

from __future__ import annotations

import csv
import json
import logging
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import IO, Any

import torch
import yaml
from rich.table import Table
from tqdm import tqdm

from pl_patchcore.errors import UserError
from pl_patchcore.published import Published
from pl_patchcore.report.files import plain_console, whole_file

if sys.platform != "win32":
    import fcntl

log = logging.getLogger(__name__)

FIGURES = {"image_auroc": "image AUROC", "pixel_auroc": "pixel AUROC", "pro": "PRO"}
# settings that change where and how fast a row is computed, and not what
_ELSEWHERE = {
    "accelerator", "callbacks", "default_root_dir", "devices", "enable_checkpointing", "enable_model_summary",
    "enable_progress_bar", "logger", "num_nodes", "num_workers", "plugins", "profiler", "strategy",
}  # fmt: skip


@dataclass(frozen=True)
class Job:
    """A row of the benchmark: what is run, and where.

    Args:
        category: Product or scene; the data set's name where there is one only.
        shots: Nominal training images; None for all.
        seed: Seed of shots and model; None leaves both as configured.
        folder: Where the run writes.
        settings: Configuration of ``pl-patchcore run``.
    """

    category: str
    shots: int | None
    seed: int | None
    folder: Path
    settings: dict[str, Any]

    @property
    def name(self) -> str:
        """Name of the row, and of its folder."""
        return self.folder.name

    def figures(self) -> dict[str, Any] | None:
        """Figures of the finished run, None if it has not finished.

        Raises:
            UserError: If the folder holds a run with other settings.
        """
        if not (self.folder / "metrics.json").is_file():
            return None
        saved = self.folder / "job.yaml"
        theirs = yaml.safe_load(saved.read_text(encoding="utf-8")) if saved.is_file() else {}
        old, new = dict(_flat(_identity(theirs))), dict(_flat(_identity(self.settings)))
        if changed := [name for name in sorted(old | new) if old.get(name) != new.get(name)]:
            name = changed[0]
            raise UserError(
                f"{self.folder}: was run with {name} {old.get(name)}, which is {new.get(name)} now"
                f"{f' (and {len(changed) - 1} other changes)' if changed[1:] else ''}; give another --folder, or "
                "--restart true to run everything again."
            )
        result: dict[str, Any] = json.loads((self.folder / "metrics.json").read_text(encoding="utf-8"))
        return result


def plan(
    settings: dict[str, Any],
    folder: Path,
    categories: Sequence[str],
    argument: str | None,
    shots: Sequence[int | None],
    seeds: Sequence[int | None],
) -> list[Job]:
    """List the rows.

    Args:
        settings: Configuration of ``pl-patchcore run`` that all share: ``model``, ``data``, ``trainer`` and so on.
        folder: Where the rows' folders go.
        categories: Names of the categories.
        argument: The data module's argument that selects one; None where it has one only.
        shots: Numbers of nominal training images; None for all.
        seeds: Seeds of shots and model; None leaves both as configured.
    """
    jobs = []
    for category, number, seed in product(categories, shots, seeds):
        job = json.loads(json.dumps(settings))
        options = job["data"].setdefault("init_args", {})
        name = str(category)
        if argument is not None:
            options[argument] = category
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
    """Run the rows that are not finished, each in a process of its own.

    Args:
        jobs: The rows.
        processes: Rows run at once. On GPUs each gets the next one in turn; on the CPU they share its cores.
        restart: Run finished rows again.

    Returns:
        What went wrong, by the row's name.

    Raises:
        UserError: If a row's folder holds a run with other settings.
    """
    if restart:
        for job in jobs:
            (job.folder / "metrics.json").unlink(missing_ok=True)
    finished = [job for job in jobs if job.figures() is not None]
    if finished:
        log.info("%d of %d rows are finished already.", len(finished), len(jobs))
    waiting = [job for job in jobs if job not in finished]
    running: dict[int, tuple[Job, subprocess.Popen[bytes], float]] = {}  # by slot
    failed: dict[str, str] = {}
    bar = tqdm(total=len(jobs), initial=len(finished), desc="Benchmark", unit=" rows")
    try:
        while waiting or running:
            for slot in [slot for slot in range(processes) if slot not in running]:
                started = next(((job, p) for job in waiting if (p := _start(job, slot, processes)) is not None), None)
                if started is None:
                    break
                waiting.remove(started[0])
                running[slot] = (*started, time.monotonic())
            shown = ", ".join(job.name for job, _, _ in running.values()) or "waiting for another process"
            bar.set_postfix_str(shown, refresh=shown != bar.postfix or sys.stderr.isatty())
            time.sleep(0.2)
            for slot, (job, process, start) in list(running.items()):
                if process.poll() is None:
                    continue
                del running[slot]
                bar.update()
                seconds = time.monotonic() - start
                if job.figures() is not None:
                    bar.write(f"{job.name}: {_line(job)} ({seconds:.0f} s)")
                else:
                    failed[job.name] = _reason(job, process.returncode)
                    bar.write(f"{job.name}: failed: {failed[job.name]}")
            for job in [job for job in waiting if job.figures() is not None]:  # by another benchmark
                waiting.remove(job)
                bar.update()
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
    with (job.folder / ".lock").open("w") as lock:
        if sys.platform != "win32":
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return None
        if job.figures() is not None:
            return None
        with whole_file(job.folder / "job.yaml") as partial:
            partial.write_text(yaml.safe_dump(job.settings, sort_keys=False, allow_unicode=True), encoding="utf-8")
        environment = dict(os.environ)
        if processes > 1:
            environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
            if torch.cuda.is_available():
                devices = environment.get("CUDA_VISIBLE_DEVICES", "").split(",")
                devices = devices if devices[0] else [str(i) for i in range(torch.cuda.device_count())]
                environment["CUDA_VISIBLE_DEVICES"] = devices[slot % len(devices)]
        with (job.folder / "log.txt").open("w") as output:
            return subprocess.Popen(
                [sys.executable, "-m", "pl_patchcore", "run", "--config", str(job.folder / "job.yaml")],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                pass_fds=[] if sys.platform == "win32" else [lock.fileno()],  # the lock is held until the run ends
            )


def _reason(job: Job, code: int) -> str:
    lines = (job.folder / "log.txt").read_text(encoding="utf-8", errors="replace").splitlines()
    last = next((line for line in reversed(lines) if line.strip()), "")
    if code < 0:
        what = f"killed by signal {-code}"
        return what + ("; out of memory, perhaps" if code == -9 else "")
    return f"{last.removeprefix('pl-patchcore: error: ')} (see {job.folder / 'log.txt'})"


def _line(job: Job) -> str:
    figures = job.figures() or {}
    return ", ".join(f"{name} {_number(figures.get(key))}" for key, name in FIGURES.items())


def _identity(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that a row's figures depend on."""
    kept = {key: settings.get(key) for key in ("model", "data", "trainer", "seed_everything")}
    return {name: _without(value) for name, value in kept.items()}


def _without(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without(inner) for key, inner in value.items() if key not in _ELSEWHERE}
    return value


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else str(key))
    else:
        yield name, value


# The table

Line = dict[str, Any]


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
        groups = {
            name: [job for job in here if job.category == name] for name in dict.fromkeys(j.category for j in here)
        }
        beside = published if shots is None else None
        known = beside.categories if beside is not None else {}
        lines += [_average(name, shots, {name: members}, known.get(name)) for name, members in groups.items()]
        if len(groups) > 1:
            whole = beside is not None and (not known or set(known) == set(groups))
            lines.append(_average("average", shots, groups, beside.average if beside and whole else None))
        elif beside is not None and not known:
            lines[-1] = _average(lines[-1]["category"], shots, groups, beside.average)
    return lines


def _average(
    name: str, shots: int | None, groups: dict[str, list[Job]], published: Sequence[float | None] | None
) -> Line:
    done = {key: {job.seed: found for job in jobs if (found := job.figures())} for key, jobs in groups.items()}
    jobs = sum(len(jobs) for jobs in groups.values())
    line: Line = {"category": name, "shots": shots}
    line["seeds"] = max((len(found) for found in done.values()), default=0)
    line["missing"] = jobs - sum(len(found) for found in done.values())
    for place, key in enumerate(FIGURES):
        by_seed = []  # mean over the categories that have finished with the seed
        for seed in dict.fromkeys(seed for found in done.values() for seed in found):
            values = [found[seed][key] for found in done.values() if seed in found and found[seed][key] is not None]
            if values:
                by_seed.append(sum(values) / len(values))
        mean = sum(by_seed) / len(by_seed) if by_seed else None
        line[key] = mean
        line[f"{key}_se"] = None
        if mean is not None and len(by_seed) > 1:
            n = len(by_seed)
            line[f"{key}_se"] = math.sqrt(sum((value - mean) ** 2 for value in by_seed) / (n - 1) / n)
        reference = published[place] if published is not None else None
        line[f"{key}_published"] = None if reference is None else reference / 100
    return line


def write_table(folder: Path, lines: Sequence[Line], failed: Mapping[str, str], published: Published | None) -> None:
    """Write ``benchmark.csv``, ``benchmark.json`` and ``benchmark.md``, and print the table."""
    with whole_file(folder / "benchmark.csv") as partial, partial.open("w", newline="", encoding="utf-8") as file:
        _write_csv(file, lines)
    source = None if published is None else published.source
    with whole_file(folder / "benchmark.json") as partial:
        content = {"published": source, "failed": dict(failed), "rows": list(lines)}
        partial.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    header, rows = _cells(lines)
    text = [f"| {' | '.join(header)} |", "|---|" + "---:|" * (len(header) - 1)]
    text += [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows]
    notes = []
    if source is not None and "published" in " ".join(header):
        notes.append(f"Published: {source}; in percent, with the difference of ours.")
    notes += [f"{name} failed: {reason}" for name, reason in failed.items()]
    with whole_file(folder / "benchmark.md") as partial:
        partial.write_text("\n".join([*text, *(f"\n{note}" for note in notes)]) + "\n", encoding="utf-8")
    table = Table(*header)
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows:
        table.add_row(*row)
    console = plain_console()
    console.print(table)
    for note in notes:
        console.print(note)
    console.print(f"Written to {folder}: benchmark.csv, benchmark.json, benchmark.md")


def _write_csv(file: IO[str], lines: Sequence[Line]) -> None:
    writer = csv.DictWriter(file, fieldnames=list(lines[0]))
    writer.writeheader()
    writer.writerows(lines)


def _cells(lines: Sequence[Line]) -> tuple[list[str], list[list[str]]]:
    """Header and rows as text, in percent; columns that hold nothing are left out."""
    shots = any(line["shots"] is not None for line in lines)
    compared = [key for key in FIGURES if any(line[f"{key}_published"] is not None for line in lines)]
    header = ["category", *(["shots"] if shots else [])]
    for key, name in FIGURES.items():
        header += [name, *([f"published {name}"] if key in compared else [])]
    rows = []
    for line in lines:
        name = line["category"]
        if line["missing"]:
            name += f" ({line['missing']} missing)"
        row = [name, *([str(line["shots"] or "all")] if shots else [])]
        for key in FIGURES:
            value, error, other = line[key], line[f"{key}_se"], line[f"{key}_published"]
            text = "–" if value is None else f"{100 * value:.2f}"
            row.append(text if error is None else f"{text} ± {100 * error:.2f}")
            if key in compared:
                difference = "" if value is None or other is None else f" ({100 * (value - other):+.1f})"
                row.append("–" if other is None else f"{100 * other:.1f}{difference}")
        rows.append(row)
    return header, rows


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"
