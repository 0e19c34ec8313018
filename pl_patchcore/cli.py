"""The command ``pl-patchcore``: fit, validate, test, predict, run (fit, then test), update, calibrate and benchmark.

``export`` is in `export/command.py`. The others are Lightning's command line, with four things of its own: settings
have one order (`configs.ordered`); ``ckpt_path`` brings the model's settings; what a user can put right is said in one
line without a traceback; reports are written after test and predict. `commands.py` answers what needs no torch,
`option_errors.py` words errors.
"""

from __future__ import annotations

import argparse
import errno
import logging
import os
import re
import shlex
import sys
import warnings
from collections.abc import Collection, Sequence
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import Any

import lightning as L
import yaml
from jsonargparse import (  # type: ignore[attr-defined]
    ActionConfigFile,
    ArgumentError,
    DefaultHelpFormatter,
    Namespace,
    set_parsing_settings,
)
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.plugins.io import CheckpointIO

import pl_patchcore.data
from pl_patchcore.backbone import UntrainedBackboneWarning
from pl_patchcore.checkpoint import (
    holds_backbone,
    make_paths_absolute,
    plain_settings,
    read_checkpoint,
    with_settings,
    without_weights,
)
from pl_patchcore.commands import COMMANDS, HELP_INDENT, answered, fail, shorten
from pl_patchcore.configs import comes_with_the_package, config_file, is_recipe, ordered, read_config
from pl_patchcore.data import AnomalyDataModule
from pl_patchcore.data.base import loader_error
from pl_patchcore.errors import UserError
from pl_patchcore.files import check_output, hold, output_folder, plain_console, whole_file
from pl_patchcore.lightning_parts import WholeFiles
from pl_patchcore.option_errors import in_one_line
from pl_patchcore.options import (
    GROUPS,
    check_arguments,
    known_arguments,
    options_of,
    refuse_rate_beside_threshold,
    refuse_unknown,
)
from pl_patchcore.patchcore import PatchCore
from pl_patchcore.report import CoverageReport, PredictionWriter, TestReport, TrainingImagesReport

log = logging.getLogger(__name__)

_NO_OPTIONS = {"model", "datamodule", "dataloaders", "train_dataloaders", "val_dataloaders", "weights_only"}


class Trainer(L.Trainer):
    """Lightning's Trainer with ``run``, ``update``, ``calibrate`` and ``benchmark``."""

    settings: dict[str, Any]  # of the whole command, which ``benchmark`` hands on; set by the command line
    by_category: dict[str, dict[str, Any]]  # settings of the model that differ; likewise

    def run(self, model: PatchCore, datamodule: AnomalyDataModule) -> None:
        """Fit, then test where there are test images, in one process."""
        self.fit(model, datamodule=datamodule)
        if datamodule.records[1]:
            self.test(model, datamodule=datamodule, verbose=False)
        else:
            log.info("There are no test images, so there is nothing to test.")

    def update(self, model: PatchCore, datamodule: AnomalyDataModule, ckpt_path: str = "") -> None:
        """Add the data module's nominal training images to a fitted model (see `PatchCore.update`).

        Args:
            model: The model.
            datamodule: The data.
            ckpt_path: Checkpoint of the fitted model; the updated one is written to the run's folder.
        """
        _load(model, ckpt_path)
        model.update(self, datamodule=datamodule)

    def calibrate(self, model: PatchCore, datamodule: AnomalyDataModule, ckpt_path: str = "") -> None:
        """Set a fitted model's thresholds from the data module's nominal training images, without a fit.

        They must not be in the memory bank. The first process scores them all (see `PatchCore.calibrate`).

        Args:
            model: The model.
            datamodule: The data.
            ckpt_path: Checkpoint of the fitted model; the calibrated one is written to the run's folder, as
                ``calibrated.ckpt``.
        """
        if not self.is_global_zero:
            return
        folder = output_folder(self)
        lock = hold(folder)
        _load(model, ckpt_path)
        datamodule.transform = datamodule.transform or model.transform
        datamodule.prepare_data()
        datamodule.setup("fit")
        model.to(self.strategy.root_device).calibrate(datamodule.train_dataloader())
        target = folder / "calibrated.ckpt"
        model.save(target)
        lock.release()
        plain_console().print(f"calibrated model: {target}")

    def benchmark(
        self,
        model: PatchCore,
        datamodule: AnomalyDataModule,
        folder: str = "benchmark",
        categories: list[str] | None = None,
        shots: list[int] | None = None,
        seeds: list[int] | None = None,
        processes: int = 1,
        restart: bool = False,
        datasets: list[str] | None = None,
    ) -> None:
        """Fit and test on every category of a data set, or of several, and set up a table beside published figures.

        A benchmark that was stopped goes on where it was when it is started again.

        Args:
            model: The model.
            datamodule: The data.
            folder: Where the table goes, and a folder for each row.
            categories: Categories, or scenes; null for all there are.
            shots: Numbers of nominal training images to train on, one row each; null trains on all.
            seeds: Seeds of the shots and the model, one row each; the table then has means and standard errors.
            processes: Rows run at once, each on the next GPU or on its share of the cores.
            restart: Run finished rows again.
            datasets: Several data sets: configuration files, such as ``data/mvtec``, each as if it alone were given;
                the table then has their averages. On the command line only.

        Raises:
            UserError: If there is no such category, or the folder holds a benchmark with other settings.
        """
        from pl_patchcore import benchmark, published  # not needed for anything else

        if processes < 1:
            raise UserError(f"processes must be at least 1, got {processes}.")
        if datasets is not None:
            raise UserError("datasets: give it on the command line, as --datasets '[data/mvtec,data/visa]'.")
        datamodule.download_data()
        jobs = benchmark.plan(self.settings, datamodule, Path(folder), categories, shots, seeds, self.by_category)
        data = type(datamodule).__name__
        beside, others = published.published_for(data, self.settings["model"]), published.others_had(data)
        failed = benchmark.run_jobs(jobs, processes, restart)
        benchmark.write_table(Path(folder), benchmark.table_lines(jobs, beside), failed, beside, others)
        if failed:
            raise UserError(f"{len(failed)} of {len(jobs)} rows failed: {', '.join(failed)}; start again to retry.")


def _load(model: PatchCore, path: str) -> None:
    checkpoint = read_checkpoint(path)
    model.on_load_checkpoint(checkpoint)
    model.load_state_dict(checkpoint["state_dict"])


class _Parser(LightningArgumentParser):
    """Lightning's parser, with a shorter help."""

    def format_help(self, *args: Any) -> str:
        return shorten(super().format_help(*args))


class _HelpFormatter(DefaultHelpFormatter):
    """What options do stands further to the left than usual, so that it takes fewer lines."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs | {"max_help_position": HELP_INDENT})  # type: ignore[no-untyped-call]


class _ConfigFile(ActionConfigFile):
    """A YAML file, or the name of one that comes with the package, such as ``data/folder``."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        path = config_file(values)
        read_config(path)  # says in plain words where a file is no YAML
        before: dict[str, Any] = {}
        if is_recipe(values):  # it is the published model: `PatchCore` as it is by default, but for what the file says
            before, cfg["model"] = dict(cfg["model"].items()), parser.get_defaults()["model"]
            cfg["by_category"] = None
        try:
            super().__call__(parser, cfg, str(path), option_string)  # type: ignore[no-untyped-call]
            parser.validate(cfg, skip_required=True)  # here, where it is known which file is wrong
        except (ArgumentError, KeyError, TypeError) as error:
            raise UserError(in_one_line(str(error), parser.get_defaults().keys(), f" in {path}")) from error
        changed = [name for name, was in before.items() if cfg["model"][name] != was]
        if changed:
            listed = ", ".join(f"{name} {cfg['model'][name]} (was {before[name]})" for name in changed)
            log.info("%s sets the model as published: %s.", values, listed)


class _RunFolder(SaveConfigCallback):
    """Takes the run's folder for this process, and writes the whole configuration there."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        folder = output_folder(trainer)
        if trainer.is_global_zero and not self.already_saved:
            self.lock = hold(folder)
            with whole_file(folder / self.config_filename) as partial:
                self.parser.save(self.config, partial, skip_none=False, overwrite=True, multifile=self.multifile)
        self.already_saved = True


class PatchCoreCLI(LightningCLI):
    """Lightning's command line for `PatchCore` and the data modules."""

    trainer: Trainer

    def __init__(self, words: Sequence[str], verbose: bool = False) -> None:
        self.arguments, self.verbose = ordered(words) if words[0] in COMMANDS else list(words), verbose
        self.saved: dict[str, Any] = {}  # the model's settings in the checkpoint to be loaded
        self.given: Any = None  # those that the user sets, by options and files that do not come with the package
        if self.arguments[0] not in COMMANDS:  # completion by tab, without the arguments of a thousand classes
            set_parsing_settings(subclasses_disabled=[lambda kind: kind.__module__.startswith(("torch", "lightning"))])
        super().__init__(
            PatchCore,
            AnomalyDataModule,
            subclass_mode_data=True,
            trainer_class=Trainer,
            seed_everything_default=False,
            parser_kwargs={"prog": "pl-patchcore", "description": "PatchCore anomaly detection."},
            save_config_callback=_RunFolder,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """The command that is called for, as setting each up takes a fifth of a second; all if it is none of them."""
        first = self.arguments[0]
        commands = [name for name in COMMANDS if name != "export"]
        return {name: _NO_OPTIONS for name in commands if first == name or first not in commands}

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """A parser with ``--config`` that raises its errors."""
        kwargs |= {"usage": f"pl-patchcore {self.arguments[0]} [options]", "exit_on_error": False}
        kwargs["formatter_class"] = _HelpFormatter
        parser = _Parser(allow_abbrev=False, **kwargs)
        parser.add_argument("-c", "--config", action=_ConfigFile, help=_ConfigFile.__doc__)
        return parser

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add data, model and Trainer; in this order they are made."""
        parser.add_lightning_class_args(AnomalyDataModule, "data", subclass_mode=True, required=False)
        parser.add_lightning_class_args(PatchCore, "model")
        parser.add_lightning_class_args(Trainer, "trainer")
        parser.set_defaults({"trainer.max_epochs": 1, "trainer.enable_model_summary": self.verbose})

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the reports and their options, and settings by category."""
        parser.add_lightning_class_args(TestReport, "report")
        parser.add_lightning_class_args(PredictionWriter, "predictions")
        parser.add_lightning_class_args(CoverageReport, "coverage")
        parser.add_lightning_class_args(TrainingImagesReport, "training")
        told = "Settings of the model that differ, by category: ``{screw: {reference_rotations: 8}}``."
        parser.add_argument("--by_category", type=dict[str, dict[str, Any]] | None, default=None, help=told)
        self.command_parser = parser

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, and read the model's settings in ``ckpt_path``."""
        if self.arguments[0] not in COMMANDS:
            try:
                script = parser.get_completion_script(f"shtab-{self.arguments[-1].rpartition('=')[2]}")
            except ValueError as error:  # another shell, or shtab is not there
                raise UserError(str(error)) from error
            print(script)  # noqa: T201 - the answer
            raise SystemExit(0)
        try:
            self.config = parser.parse_args(self.arguments)
        except ArgumentError as error:
            raise UserError(in_one_line(str(error), self.command_parser.get_defaults().keys())) from error
        command = self.config["subcommand"]
        self.chosen: Any = self.config[command]  # settings of the command
        make_paths_absolute(self.chosen["model"])
        # Next, Lightning would put the checkpoint's settings over the user's own, by way of YAML. It offers no way to
        # leave that out; it does without where there is no ckpt_path.
        self.ckpt_path = self.chosen.pop("ckpt_path", None)
        named = {word.partition("=")[0].removeprefix("--model.") for word in self.arguments}
        refuse_rate_beside_threshold([name for name, value in self.chosen["model"].items() if name in named and value])
        self.by_category = self._by_category(named)
        if command in ("fit", "run"):
            self._take_category()
        own = [
            word for word in self.arguments[1:]
            if not (word.startswith("--config=") and comes_with_the_package(word.removeprefix("--config=")))
        ]  # fmt: skip
        own = [f"--data={self.chosen['data']['class_path']}", *own]  # their options need it
        self.given = self.command_parser.parse_args(own, defaults=False).get("model") or Namespace()  # type: ignore[no-untyped-call]
        if "calibration_share" in self.given and "calibration" not in self.given:
            self.given["calibration"] = self.chosen["model"]["calibration"] = None  # a share asks for a split
        parser.add_instantiator(self._make_model, PatchCore)
        seed = self.chosen.get("seed_everything")
        if isinstance(seed, int) and not 0 <= seed < 2**32:
            raise UserError(f"seed_everything must be from 0 to {2**32 - 1}, got {seed}.")
        if command in ("test", "validate", "predict", "update", "calibrate"):
            if self.ckpt_path in (None, "", "best", "last", "hpc"):
                raise UserError(f"{command} needs ckpt_path, the checkpoint of a fitted model: the path of its file.")
            self._read_checkpoint(self.ckpt_path)
        parser.add_instantiator(self._make_data, AnomalyDataModule)

    def _by_category(self, named: Collection[str]) -> dict[str, dict[str, Any]]:
        """Settings of the model by category, checked, but for those that are given as options, by these names."""
        found, known = self.chosen.pop("by_category", None) or {}, signature(PatchCore.__init__).parameters
        for category, settings in found.items():
            refuse_unknown(settings, known, "the model", f"by_category.{category}.")
            check_arguments(PatchCore.__init__, settings, f"by_category.{category}.")
            for name in GROUPS.keys() & settings.keys():
                options_of(GROUPS[name], settings[name])
        options = {name.partition(".")[0] for name in named}
        return {
            category: {name: value for name, value in settings.items() if name not in options}
            for category, settings in found.items()
        }

    def _take_category(self) -> None:
        """Put the settings of the category that the data module selects over those of the model."""
        module, _, name = self.chosen["data"]["class_path"].rpartition(".")
        argument = getattr(import_module(module), name).category_argument
        category = None if argument is None else (self.chosen["data"].get("init_args") or {}).get(argument)
        differ = self.by_category.get(str(category), {})
        for name, value in differ.items():
            if name in GROUPS:
                vars(self.chosen["model"][name]).update(value)
            else:
                self.chosen["model"][name] = value
        if differ:
            listed = ", ".join(f"{name} {value}" for name, value in differ.items())
            log.info("by_category: %s has %s.", category, listed)

    def _make_data(self, kind: type[AnomalyDataModule], *_: Any, **values: Any) -> AnomalyDataModule:
        """Make the data module, and list its images before a backbone is fetched."""
        made = kind(**values)
        if (command := self.config["subcommand"]) != "benchmark":  # which takes other categories than this one
            made.look(command)
        return made

    def _read_checkpoint(self, path: str) -> None:
        """Read the settings of a checkpoint.

        The file may come from anywhere. So they do not go through the parser, which would read a class and its
        arguments out of a string, but straight to the constructor.
        """
        checkpoint = read_checkpoint(path)
        self.saved = plain_settings(checkpoint["hyper_parameters"], known_arguments(PatchCore), path)
        if "backbone" not in self.saved and "backbone" not in self.given:
            raise UserError(f"{path} was fitted with a module as backbone; give it as model.backbone.")
        model = self.chosen["model"]
        changed = any(n in self.given and model[n] != self.saved.get(n) for n in ("weights", "backbone"))
        self.brings_weights = holds_backbone(checkpoint) and not changed

    def _make_model(self, kind: type[PatchCore], *_: Any, **values: Any) -> PatchCore:
        """Make the model with the settings of the checkpoint, if there is one, under those that the user gives."""
        if not self.saved:
            return with_settings(kind, values)
        settings = dict(self.saved)
        for name, value in vars(self.given).items():
            settings[name] = {**settings.get(name, {}), **vars(value)} if name in GROUPS else values[name]
        if self.brings_weights:
            settings = without_weights(settings)  # the checkpoint's own are loaded over the random ones
        return with_settings(kind, settings, quiet=self.brings_weights)

    def before_instantiate_classes(self) -> None:
        """Do not collect predictions, maps and all, in memory: they are written as they come."""
        if self.ckpt_path is not None:
            self.chosen["ckpt_path"] = self.ckpt_path
        if self.subcommand == "predict":
            self.chosen["return_predictions"] = False
        if self.subcommand in ("test", "validate"):
            self.chosen["verbose"] = False

    def instantiate_classes(self) -> None:
        """Make the model, the data and the Trainer; what one of them refuses is said in its own words."""
        try:
            super().instantiate_classes()
        except UserError:
            raise
        except (ValueError, MisconfigurationException) as error:  # a setting that Lightning refuses, or a data module
            found = re.search(r"Errors:\n  - (.*)\n  - Expected a <class 'NoneType'>", str(error), re.DOTALL)
            raise UserError(" ".join((found[1] if found else str(error)).split())) from error

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Give the Trainer a way to write checkpoints that leaves no half file, unless the user gives another."""
        plugins = self.config_init[self.subcommand]["trainer"]["plugins"] or []
        plugins = list(plugins) if isinstance(plugins, Sequence) and not isinstance(plugins, str) else [plugins]
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            plugins.append(WholeFiles())
        try:
            made = super().instantiate_trainer(plugins=plugins, **kwargs)
        except TypeError as error:  # devices that are no number, say
            raise UserError(f"trainer: {error}") from error
        check_output(Path(made.default_root_dir))
        return made

    def after_instantiate_classes(self) -> None:
        """Let the saved configuration hold only what the user sets, so that every command can start with it."""
        if self.saved:  # a checkpoint brings the rest of the model
            self.chosen["model"] = self.given
        for name in ("verbose", "return_predictions"):
            self.chosen.pop(name, None)

    def after_fit(self) -> None:
        """Name the model's file, those of earlier fits beside it, and what to do next."""
        if not self.trainer.is_global_zero:
            return
        callbacks: list[Any] = self.trainer.checkpoint_callbacks
        named = [getattr(callback, "best_model_path", "") for callback in callbacks]
        files = [Path(name) for name in dict.fromkeys(named) if name and Path(name).is_file()]
        for file in files:
            here = file.relative_to(Path.cwd()) if file.is_relative_to(Path.cwd()) else file
            others = sorted(path.name for path in file.parent.glob("*.ckpt") if path not in files)
            log.info("Model: %s%s", here, f" (beside it, of earlier fits: {', '.join(others)})" if others else "")
            log.info("Next: pl-patchcore predict --ckpt_path %s --data.predict IMAGES", shlex.quote(str(here)))

    after_run = after_update = after_fit

    def before_benchmark(self) -> None:
        """Hand the settings on: each row of a benchmark is a ``run`` with them."""
        text = self.command_parser.dump(self.chosen, skip_none=False, skip_validation=True)
        own = ("folder", "categories", "shots", "seeds", "processes", "restart", "datasets", "config")
        self.trainer.settings = {name: value for name, value in yaml.safe_load(text).items() if name not in own}
        self.trainer.by_category = self.by_category


def _benchmark_sets(words: Sequence[str], verbose: bool) -> None:
    """Run ``benchmark --datasets``: a benchmark for each, and one page of them all."""
    from pl_patchcore.benchmark import write_overview  # not needed for anything else

    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--datasets", nargs="?")
    parser.add_argument("--folder", default="benchmark")
    try:
        known, rest = parser.parse_known_args(words)
        names = yaml.safe_load(known.datasets or "")
    except (argparse.ArgumentError, yaml.YAMLError) as error:
        raise UserError(f"benchmark: {' '.join(str(error).split())}") from error
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise UserError(f"datasets must be a list of configuration files, got {known.datasets}; try [data/mvtec].")
    sets = {Path(name).with_suffix("").name: name for name in names}
    if len(sets) < len(names):
        raise UserError(f"datasets: two files have one name, {', '.join(names)}; each names a folder of its own.")
    failed = {folder: _unreadable(name) for folder, name in sets.items()}  # told before others take hours
    for folder, reason in failed.items():
        if reason:
            log.warning("%s is left out: %s", folder, reason)
    for folder, name in sets.items():
        if not failed[folder]:
            log.info("Data set %s", folder)
            try:
                PatchCoreCLI([*rest, f"--config={name}", f"--folder={Path(known.folder, folder)}"], verbose)
            except UserError as error:
                failed[folder] = str(error)
                log.warning("%s: %s", folder, error)
    write_overview(Path(known.folder), failed)
    if wrong := [folder for folder, reason in failed.items() if reason]:
        raise UserError(f"{len(wrong)} of {len(sets)} data sets have errors: {', '.join(wrong)}; start again to retry.")


def _unreadable(name: str) -> str:
    """Why the data set of a configuration file cannot be read; empty if it can, or has to be fetched first."""
    data = read_config(config_file(name)).get("data")
    if not isinstance(data, dict) or "class_path" not in data:
        raise UserError(f"datasets: {name} names no data set; it needs data with class_path.")
    kind = getattr(pl_patchcore.data, str(data["class_path"]), None)
    try:
        made = None if kind is None else kind(**(data.get("init_args") or {}))
        if made is not None and not made.download and not made.categories():
            _ = made.listed
    except (UserError, TypeError) as error:
        return str(error)
    return ""


def _set_up_console(verbose: bool) -> None:
    """Show what this package says; what others say only if ``verbose``."""
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, format="%(message)s")
    logging.getLogger(__package__).setLevel(logging.INFO)
    warnings.formatwarning = lambda message, *_, **__: f"{message}\n"
    if not verbose:
        for library in ("lightning.pytorch", "lightning.fabric"):
            logging.getLogger(library).setLevel(logging.WARNING)
        warnings.simplefilter("ignore")
        warnings.simplefilter("default", UntrainedBackboneWarning)


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line; exit status 2 for what a user can put right.

    Args:
        args: Arguments, the process's own if None.
    """
    words = list(sys.argv[1:] if args is None else args)
    if answered(words):
        return
    verbose = "-v" in words
    _set_up_console(verbose)
    words = [word for word in words if word != "-v"]
    try:
        options = {word.partition("=")[0] for word in words}
        if words[0] == "benchmark" and "--datasets" in options and not options & {"-h", "--help", "--print_config"}:
            _benchmark_sets(words, verbose)
        elif words[0] == "export":
            from pl_patchcore.export.command import run  # not needed for anything else

            run(words[1:])
        else:
            PatchCoreCLI(words, verbose)
    except UserError as error:
        # a loader process's error carries the traceback it had there; the last line is the message
        lines = [line for line in str(error).splitlines() if line.strip()]
        fail(lines[-1].split("UserError: ", 1)[-1] if lines and lines[0].startswith("Caught ") else str(error))
    except (RuntimeError, ConnectionResetError, EOFError) as error:  # of a loader process that was killed, perhaps
        if (explained := loader_error(error)) is error:
            raise
        sys.stderr.write("\n")  # a line of its own: torch ends its word about a killed process with a null character
        fail(str(explained))
    except OSError as error:  # a full or read-only disk, an occupied name
        if error.filename is None and error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = "" if error.filename is None else f"{error.filename}: "
        fail(f"{where}{os.strerror(error.errno or 0).lower()}; choose another place.")
