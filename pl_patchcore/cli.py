"""The command ``pl-patchcore``: fit, validate, test, predict, run (fit, then test), update and benchmark.

Lightning's command line, with three things of its own: what a user can put right, such as a misspelt option, is said in
one line without a traceback; ``ckpt_path`` brings the model's settings; reports are written after test and predict.
"""

from __future__ import annotations

import errno
import importlib
import logging
import os
import re
import sys
import warnings
from collections.abc import Iterable, Sequence
from inspect import signature
from pathlib import Path
from typing import Any, NoReturn

import lightning as L
import yaml
from jsonargparse import ActionConfigFile, ArgumentError, ArgumentParser, Namespace  # type: ignore[attr-defined]
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.plugins.io import CheckpointIO

from pl_patchcore import data as data_modules
from pl_patchcore.backbone import UntrainedBackboneWarning
from pl_patchcore.checkpoint import holds_backbone, plain_settings, read_checkpoint, with_settings, write_checkpoint
from pl_patchcore.configs import config_file, read_config
from pl_patchcore.data import AnomalyDataModule
from pl_patchcore.data.base import loader_error
from pl_patchcore.errors import UserError
from pl_patchcore.files import check_output, hold, output_folder, plain_console, whole_file
from pl_patchcore.lightning_parts import WholeFiles
from pl_patchcore.options import GROUPS, moved, nearest, refuse_rate_beside_threshold
from pl_patchcore.patchcore import PatchCore
from pl_patchcore.report import CoverageReport, PredictionWriter, TestReport

_QUIET = (
    ".*isinstance.treespec, LeafSpec.*",  # Lightning's own use of torch
    ".*in eval mode at the start of training.*",  # as it should be: the backbone is frozen
    ".*Total length of `list` across ranks is zero.*",  # no validation set
    ".*is smaller than the logging interval.*",
    ".*Using `DistributedSampler` with the dataloaders.*",  # the model leaves out what it repeats
    ".*when logging on epoch level in distributed setting.*",  # figures are of all processes already
    ".*`tensorboardX` has been removed as a dependency.*",  # the CSV logger will do
    "You defined a `validation_step` but have no.*",
    "Using ModelCheckpoint with manual optimization.*",  # the optimiser changes nothing
    ".*does not have many workers.*",  # num_workers is the data module's business
)
_COMMANDS = LightningCLI.subcommands() | {
    name: {"model", "datamodule"} for name in ("run", "update", "calibrate", "benchmark")
}


class Trainer(L.Trainer):
    """Lightning's Trainer with ``run``, ``update`` and ``benchmark``."""

    settings: dict[str, Any]  # of the whole command, which ``benchmark`` hands on; set by the command line

    def run(self, model: PatchCore, datamodule: AnomalyDataModule) -> None:
        """Fit, then test, in one process.

        Args:
            model: The model.
            datamodule: The data.
        """
        datamodule.prepare_data()
        datamodule.require("test")
        self.fit(model, datamodule=datamodule)
        self.test(model, datamodule=datamodule, verbose=False)

    def update(self, model: PatchCore, datamodule: AnomalyDataModule, ckpt_path: str = "") -> None:
        """Add the data module's nominal training images to a fitted model (see `PatchCore.update`).

        Args:
            model: The model.
            datamodule: The data.
            ckpt_path: Checkpoint of the fitted model; the updated one is written to the run's folder.
        """
        checkpoint = read_checkpoint(ckpt_path)
        model.on_load_checkpoint(checkpoint)
        model.load_state_dict(checkpoint["state_dict"])
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
        checkpoint = read_checkpoint(ckpt_path)
        model.on_load_checkpoint(checkpoint)
        model.load_state_dict(checkpoint["state_dict"])
        datamodule.transform = datamodule.transform or model.transform
        datamodule.prepare_data()
        datamodule.setup("fit")
        model.to(self.strategy.root_device).calibrate(datamodule.train_dataloader())
        target = output_folder(self) / "calibrated.ckpt"
        with whole_file(target) as partial:
            write_checkpoint(model, partial)
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
    ) -> None:
        """Fit and test on every category of a data set, and set up a table beside published figures.

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

        Raises:
            UserError: If there is no such category, or the folder holds a benchmark with other settings.
        """
        from pl_patchcore import benchmark, published  # not needed for anything else

        if processes < 1:
            raise UserError(f"processes must be at least 1, got {processes}.")
        datamodule.download_data()
        jobs = benchmark.plan(self.settings, datamodule, Path(folder), categories, shots, seeds)
        beside = published.published_for(type(datamodule).__name__, self.settings["model"])
        failed = benchmark.run_jobs(jobs, processes, restart)
        benchmark.write_table(Path(folder), benchmark.table_lines(jobs, beside), failed, beside)
        if failed:
            raise UserError(f"{len(failed)} of {len(jobs)} rows failed: {', '.join(failed)}; start again to retry.")


class _ConfigFile(ActionConfigFile):
    """A YAML file, or the name of one that comes with the package, such as ``data/folder``."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        path = config_file(values)
        read_config(path)  # says in plain words where a file is no YAML
        try:
            super().__call__(parser, cfg, str(path), option_string)  # type: ignore[no-untyped-call]
            parser.validate(cfg, skip_required=True)  # here, where it is known which file is wrong
        except (ArgumentError, KeyError, TypeError) as error:
            raise UserError(_in_one_line(str(error), parser.get_defaults().keys(), f" in {path}")) from error


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

    def __init__(self, args: Sequence[str] | None = None) -> None:
        self.arguments = list(sys.argv[1:] if args is None else args)
        self.saved: dict[str, Any] = {}  # the model's settings in the checkpoint to be loaded
        self.given: Any = None  # those that the user gives beside it
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
            args=args,  # type: ignore[arg-type]
        )

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """The command that is called for, as setting each up takes a fifth of a second; all if it is none of them."""
        return {name: skip for name, skip in _COMMANDS.items() if self.arguments[:1] == [name]} or _COMMANDS

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """A parser with ``--config`` that raises its errors."""
        parser = LightningArgumentParser(exit_on_error=False, allow_abbrev=False, **kwargs)
        parser.add_argument("-c", "--config", action=_ConfigFile, help=_ConfigFile.__doc__)
        return parser

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add Trainer, model and data; the data is missed only once all names are known to be right."""
        parser.add_lightning_class_args(Trainer, "trainer")
        parser.add_lightning_class_args(PatchCore, "model")
        parser.add_lightning_class_args(AnomalyDataModule, "data", subclass_mode=True, required=False)
        parser.set_defaults({"trainer.max_epochs": 1})

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the reports and their options."""
        parser.add_lightning_class_args(TestReport, "report")
        parser.add_lightning_class_args(PredictionWriter, "predictions")
        parser.add_lightning_class_args(CoverageReport, "coverage")
        self.command_parser = parser

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, and read the model's settings in ``ckpt_path``."""
        command = self.arguments[0] if self.arguments else ""
        if command.lstrip("-") in ("c", "config"):
            raise UserError(f"the command comes first: pl-patchcore fit {' '.join(self.arguments)}.")
        if not command:
            raise UserError(f"give a command, {{{','.join(_COMMANDS)}}}; pl-patchcore --help explains them.")
        if not command.startswith("-") and command not in _COMMANDS:
            raise UserError(f"unknown command {command!r}; did you mean {nearest(command, _COMMANDS)!r}?")
        try:
            super().parse_arguments(parser, args)
        except ArgumentError as error:
            raise UserError(_in_one_line(str(error), self.command_parser.get_defaults().keys())) from error
        self.chosen: Any = self.config[self.config["subcommand"]]  # settings of the command
        # Next, Lightning would put the checkpoint's settings over the user's own, by way of YAML. It offers no way to
        # leave that out; it does without where there is no ckpt_path.
        self.ckpt_path = self.chosen.pop("ckpt_path", None)
        named = {argument.partition("=")[0].removeprefix("--model.") for argument in self.arguments}
        refuse_rate_beside_threshold([name for name, value in self.chosen["model"].items() if name in named and value])
        parser.add_instantiator(self._make_model, PatchCore)
        if self.chosen["data"] is None:
            raise UserError(f"{command} needs a data module, such as --data MTDDataModule.")
        seed = self.chosen.get("seed_everything")
        if isinstance(seed, int) and not isinstance(seed, bool) and not 0 <= seed < 2**32:
            raise UserError(f"seed_everything must be from 0 to {2**32 - 1}, got {seed}.")
        if command in ("test", "validate", "predict", "update", "calibrate"):
            if self.ckpt_path in (None, "", "best", "last", "hpc"):
                raise UserError(f"{command} needs ckpt_path, the checkpoint of a fitted model: the path of its file.")
            self._read_checkpoint(parser, self.ckpt_path)

    def _read_checkpoint(self, parser: LightningArgumentParser, path: str) -> None:
        """Have the model made with the settings of a checkpoint, save what the user sets otherwise.

        They are data from a file that may come from anywhere. So they do not go through the parser, which would read
        a class and its arguments out of a string, but straight to the constructor.
        """
        checkpoint = read_checkpoint(path)
        self.saved = plain_settings(checkpoint["hyper_parameters"], signature(PatchCore.__init__).parameters, path)
        self.given = self.command_parser.parse_args(self.arguments[1:], defaults=False).get("model") or Namespace()  # type: ignore[no-untyped-call]
        if "backbone" not in self.saved and "backbone" not in self.given:
            raise UserError(
                f"{path} was fitted with a module as backbone; give it as model.backbone, or load it in Python."
            )
        self.brings_weights = holds_backbone(checkpoint) and not ("weights" in self.given or "backbone" in self.given)

    def _make_model(self, kind: type[PatchCore], *_: Any, **values: Any) -> PatchCore:
        """Make the model with the settings of the checkpoint, if there is one, under those that the user gives."""
        if self.given is None:
            return with_settings(kind, values)
        settings = dict(self.saved)
        for name, value in vars(self.given).items():
            settings[name] = {**settings.get(name, {}), **vars(value)} if name in GROUPS else values[name]
        with warnings.catch_warnings():
            if self.brings_weights:
                settings["weights"] = None  # the checkpoint's own are loaded over the random ones
                warnings.simplefilter("ignore", UntrainedBackboneWarning)
            return with_settings(kind, settings)

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
        trainer = self.config_init[self.config["subcommand"]]["trainer"]
        plugins = trainer["plugins"] or []
        plugins = list(plugins) if isinstance(plugins, Sequence) and not isinstance(plugins, str) else [plugins]
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            plugins.append(WholeFiles())
        made = super().instantiate_trainer(plugins=plugins, **kwargs)
        check_output(Path(made.default_root_dir))
        return made

    def after_instantiate_classes(self) -> None:
        """Where a checkpoint brings the model, let the saved configuration hold only what the user sets of it."""
        if self.given is not None:
            self.chosen["model"] = self.given

    def before_benchmark(self) -> None:
        """Hand the settings on: each row of a benchmark is a ``run`` with them."""
        text = self.command_parser.dump(self.chosen, skip_none=False, skip_validation=True)
        own = ("folder", "categories", "shots", "seeds", "processes", "restart", "config")
        self.trainer.settings = {name: value for name, value in yaml.safe_load(text).items() if name not in own}


def _in_one_line(message: str, known: Iterable[str], file: str = "") -> str:
    """What is wrong with an option, out of jsonargparse's own message, which may be a nest of types.

    Args:
        message: That of jsonargparse.
        known: Options there are, dotted.
        file: `` in <path>``, if the option stands in a file.
    """
    keys = re.findall(r'Parser key "([^"]+)"', message)
    unknown = re.search(
        r"(?:Group '(\w+)' does not )?(?:nrecognized arguments: -+|(?:Key|Option|accept [a-z ]+) ')([a-z_][\w.]*)",
        message,
    )
    no_group = re.search(r"Unable to load config '(.*)'", message)
    name = ".".join(filter(None, unknown.groups())) if unknown else ".".join(keys[:1])
    if (unknown or no_group) and name.startswith("model.") and (place := moved(name.removeprefix("model."), "model.")):
        return f"{file.removeprefix(' in ')}: {place}".removeprefix(": ")
    if no_group:
        options = sorted(option for option in known if option.startswith(f"{name}."))
        listed = ", ".join([*options[:8], *["..."] * (len(options) > 8)])
        return f"{name}{file} is a group of options, {listed}; got {no_group[1]!r}."
    if unknown:
        prefix = "data." if keys[:1] == ["data"] else ""
        if kind := re.search(r"given class_path '(.+)\.(\w+)'", message):  # the option is an argument of this class
            if kind[2] == AnomalyDataModule.__name__:
                return f"{prefix}{name}{file} needs a data module before it, such as --data MTDDataModule."
            found = getattr(importlib.import_module(kind[1]), kind[2])
            arguments = ArgumentParser().add_class_arguments(found, "it", fail_untyped=False)
            known = [argument.removeprefix("it.") for argument in arguments]
        return f"unknown option {prefix + name!r}{file}; did you mean {prefix + nearest(name, known)!r}?"
    expected = re.findall(
        r"Expected an? (?:<class '(?:[^']*\.)?|typing\.)?(.+?)(?:'>)?(?:\. Got value: .*)?$", message, re.MULTILINE
    )
    values = re.findall(r"(?:Got|Given) value: (.*)", message)
    if not (keys and expected and values):
        return " ".join(message.split())
    if keys == ["data"]:
        names = [name for name in data_modules.__all__ if name.endswith("DataModule")]
        return f"no data module {values[0]!r}; did you mean {nearest(values[0], names)!r}?"
    kinds = [kind for kind in dict.fromkeys(expected) if kind != "NoneType"] or expected[:1]
    if choices := [kind[8:-1] for kind in kinds if kind.startswith("Literal[")]:
        kinds = ["one of " + ", ".join(choices)]
    return f"{'.'.join(keys)} must be {' or '.join(kinds)}, got {values[0]}."


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line; exit status 2 for what a user can put right.

    Args:
        args: Arguments, the process's own if None.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for message in _QUIET:
        warnings.filterwarnings("ignore", message)
    warnings.formatwarning = lambda message, *_, **__: f"{message}\n"
    try:
        PatchCoreCLI(args)
    except UserError as error:
        # a loader process's error carries the traceback it had there; the last line is the message
        lines = [line for line in str(error).splitlines() if line.strip()]
        text = lines[-1].split("UserError: ", 1)[-1] if lines and lines[0].startswith("Caught ") else str(error)
        _fail(text)
    except OSError as error:  # a full or read-only disk, an occupied name
        if error.filename is None and error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = "" if error.filename is None else f"{error.filename}: "
        _fail(f"{where}{os.strerror(error.errno or 0).lower()}; choose another place.")
    except RuntimeError as error:  # torch tells of a loader process that was killed wherever the run happens to be
        if (explained := loader_error(error)) is error:
            raise
        _fail(str(explained))


def _fail(text: str) -> NoReturn:
    """End with one line; on a line of its own, as torch ends its word about a killed process with a null character."""
    sys.stderr.write("\n" * text.startswith("a loader process") + f"pl-patchcore: error: {text}\n")
    raise SystemExit(2) from None
