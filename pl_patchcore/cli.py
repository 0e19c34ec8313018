"""The command ``pl-patchcore``: fit, validate, test, predict, run (fit, then test), update and benchmark.

Lightning's command line, with four things of its own: option names are checked before anything else, so that a
misspelt one, on the command line or anywhere in a YAML file, is answered with one line; what a user can put right
(`UserError`) is shown as one line without a traceback; ``ckpt_path`` brings the model's settings; reports are written
after test and predict.
"""

from __future__ import annotations

import importlib
import inspect
import logging
import re
import sys
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

import lightning as L
import yaml
from jsonargparse import ActionConfigFile, ArgumentParser, Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from pl_patchcore.backbone import UntrainedBackboneWarning
from pl_patchcore.checkpoint import holds_backbone, read_checkpoint
from pl_patchcore.configs import config_file, read_config
from pl_patchcore.data import AnomalyDataModule
from pl_patchcore.errors import UserError
from pl_patchcore.options import GROUPS, moved, nearest, plain_settings
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
    ".*`max_epochs` was not set.*",  # PatchCore sets it
    "LightningCLI's args parameter is intended.*",  # the arguments are looked through first
)
_COMMANDS = LightningCLI.subcommands() | {name: {"model", "datamodule"} for name in ("run", "update", "benchmark")}
_CLASSES = ("pl_patchcore.data", "lightning.pytorch.callbacks", "lightning.pytorch.loggers")  # found by name alone


class Trainer(L.Trainer):
    """Lightning's Trainer with ``run``, ``update`` and ``benchmark``."""

    settings: dict[str, Any]  # of the whole command, which ``benchmark`` hands on; set by the command line

    def run(self, model: L.LightningModule, datamodule: L.LightningDataModule) -> None:
        """Fit, then test, in one process.

        Args:
            model: The model.
            datamodule: The data.
        """
        if isinstance(datamodule, AnomalyDataModule):
            datamodule.prepare_data()
            datamodule.require("test")
        self.fit(model, datamodule=datamodule)
        self.test(model, datamodule=datamodule, verbose=False)

    def update(self, model: L.LightningModule, datamodule: L.LightningDataModule, ckpt_path: str | None = None) -> None:
        """Add the data module's nominal training images to a fitted model (see `PatchCore.update`).

        Args:
            model: The model.
            datamodule: The data.
            ckpt_path: Checkpoint of the fitted model; the updated one is written to the run's folder.

        Raises:
            UserError: If no checkpoint is given.
        """
        if ckpt_path is None or not isinstance(model, PatchCore):
            raise UserError("update needs ckpt_path, the checkpoint of a fitted model.")
        checkpoint = read_checkpoint(ckpt_path)
        model.on_load_checkpoint(checkpoint)
        model.load_state_dict(checkpoint["state_dict"])
        model.update(self, datamodule=datamodule)

    def benchmark(
        self,
        model: L.LightningModule,
        datamodule: L.LightningDataModule,
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
        from pl_patchcore.benchmark import run_benchmark

        run_benchmark(self.settings, datamodule, Path(folder), categories, shots, seeds, processes, restart)


class _ConfigFile(ActionConfigFile):  # type: ignore[misc]
    """``--config``: a YAML file, or the name of one that comes with the package, such as ``data/folder``."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        super().__call__(parser, cfg, str(config_file(values)), option_string)


class _Parser(LightningArgumentParser):
    """Lightning's parser, which answers a wrong value in one line."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Say which option has a value it cannot have; jsonargparse's own answer is a nest of types."""
        if not self.exit_on_error:  # one inside another, whose message the outer one has
            super().error(message, ex)
        key = ".".join(re.findall(r'Parser key "([^"]+)"', message))
        expected = dict.fromkeys(re.findall(r"Expected an? (.+?)(?:\. Got value: .*)?$", message, re.MULTILINE))
        values = re.findall(r"(?:Got|Given) value: (.*)", message)
        if not (key and expected and values):
            raise UserError(" ".join(message.split())) from ex
        if key == "data":
            names = [name for name in importlib.import_module("pl_patchcore.data").__all__ if "DataModule" in name]
            raise UserError(f"no data module {values[0]!r}; did you mean {nearest(values[0], names)!r}?") from ex
        types = [re.sub(r"<class '(?:.*\.)?(.+)'>|typing\.(.+)", r"\1\2", kind) for kind in expected]
        kinds = [kind for kind in types if kind != "NoneType" or len(types) == 1]
        if any(kind.startswith("Literal[") for kind in kinds):
            kinds = ["one of " + ", ".join(kind.removeprefix("Literal[").removesuffix("]") for kind in kinds)]
        raise UserError(f"{key} must be {' or '.join(kinds)}, got {values[0]}.") from ex


class PatchCoreCLI(LightningCLI):
    """Lightning's command line for `PatchCore` and the data modules."""

    def __init__(self, args: Sequence[str] | None = None) -> None:
        self.arguments = list(sys.argv[1:] if args is None else args)
        self.saved: dict[str, Any] | None = None  # the model's settings in the checkpoint to be loaded
        super().__init__(
            PatchCore,
            AnomalyDataModule,
            subclass_mode_data=True,
            trainer_class=Trainer,
            seed_everything_default=False,
            parser_class=_Parser,
            parser_kwargs={"prog": "pl-patchcore", "description": "PatchCore anomaly detection."},
            save_config_kwargs={"overwrite": True},
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            args=self.arguments,
        )

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """The command that is called for, since setting each up takes a fifth of a second; all if it is none of them."""
        return {name: skip for name, skip in _COMMANDS.items() if self.arguments[:1] == [name]} or _COMMANDS

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """A parser with ``--config``."""
        parser = _Parser(**kwargs)
        parser.add_argument("-c", "--config", action=_ConfigFile, help=_ConfigFile.__doc__)
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the reports and their options."""
        parser.add_lightning_class_args(TestReport, "report")
        parser.add_lightning_class_args(PredictionWriter, "predictions")
        parser.add_lightning_class_args(CoverageReport, "coverage")
        parser.set_defaults({"trainer.max_epochs": 1})
        self.command_parser = parser

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Check the names of all options, read the model's settings in ``ckpt_path``, then parse."""
        command, *rest = self.arguments or [""]
        if command in _COMMANDS:
            self.options = _check_names(self.command_parser, rest)
            path = self.options.get("ckpt_path")
            if command == "update" and not path and not {"h", "help"} & self.options.keys():
                raise UserError("update needs ckpt_path, the checkpoint of a fitted model.")
            if path and path not in ("best", "last", "hpc") and command != "fit":
                self._read_checkpoint(parser, path)
        elif command.lstrip("-") in ("c", "config"):
            raise UserError(f"the command comes first: pl-patchcore fit {' '.join(self.arguments)}.")
        elif command and not command.startswith("-"):
            raise UserError(f"unknown command {command!r}; did you mean {nearest(command, _COMMANDS)!r}?")
        super().parse_arguments(parser, args)
        # Lightning would put the checkpoint's settings over the user's own next, by way of YAML; there is no public
        # way to forbid it, but where it finds no ckpt_path it does not
        self.ckpt_path = self._chosen.get("ckpt_path")
        if self.ckpt_path is not None:
            self._chosen["ckpt_path"] = None

    @property
    def _own(self) -> list[str]:
        """Names of the model's settings that the user gives, such as ``store.kind``."""
        return [name.removeprefix("model.") for name in self.options if name.startswith("model.")]

    @property
    def _chosen(self) -> Namespace:
        """Settings of the command, as parsed."""
        return self.config[self.config["subcommand"]]

    def _read_checkpoint(self, parser: LightningArgumentParser, path: str) -> None:
        """Have the model made with the settings of a checkpoint, save what the user sets otherwise.

        They are data from a file that may come from anywhere. So they do not go through the parser, which would read
        a class and its arguments out of a string, but straight to the constructor.
        """
        checkpoint = read_checkpoint(path)
        arguments = inspect.signature(PatchCore.__init__).parameters
        self.saved = plain_settings(checkpoint["hyper_parameters"], arguments, path)
        if "backbone" not in self.saved and not any(name.startswith("backbone") for name in self._own):
            raise UserError(
                f"{path} was fitted with a module as backbone; give it as model.backbone, or load it in Python."
            )
        self.brings_weights = holds_backbone(checkpoint) and not {"weights", "backbone"} & set(self._own)
        parser.add_instantiator(self._make_model, PatchCore)

    def _make_model(self, kind: type[PatchCore], *_: Any, **values: Any) -> PatchCore:
        """Make the model with the settings of the checkpoint, under those that the user sets."""
        assert self.saved is not None
        settings = dict(values if "model" in self.options else self.saved)
        for name in self._own:
            group, _, option = name.partition(".")
            if group in GROUPS and option:
                settings[group] = {**settings.get(group, {}), option: getattr(values[group], option)}
            else:
                settings[group] = values[group]
        with warnings.catch_warnings():
            if self.brings_weights:
                settings["weights"] = None  # the checkpoint's own are loaded over the random ones
                warnings.simplefilter("ignore", UntrainedBackboneWarning)
            return kind(**settings)

    def before_instantiate_classes(self) -> None:
        """Do not collect predictions, maps and all, in memory: they are written as they come."""
        if self.ckpt_path is not None:
            self._chosen["ckpt_path"] = self.ckpt_path
        if self.subcommand == "predict":
            self._chosen["return_predictions"] = False
        if self.subcommand in ("test", "validate"):
            self._chosen["verbose"] = False

    def instantiate_classes(self) -> None:
        """Make the model, the data and the Trainer; what one of them refuses is said in its own words."""
        try:
            super().instantiate_classes()
        except UserError:
            raise
        except (ValueError, MisconfigurationException) as error:  # a setting that Lightning refuses, or a data module
            found = re.search(r"Errors:\n  - (.*)\n  - Expected a <class 'NoneType'>", str(error), re.DOTALL)
            raise UserError(" ".join((found[1] if found else str(error)).split())) from error

    def after_instantiate_classes(self) -> None:
        """Where a checkpoint brings the model, let the saved configuration hold only what the user set of it."""
        if self.saved is not None:
            kept = [name for name in self._own if name in self._chosen["model"]]
            self._chosen["model"] = Namespace({name: self._chosen["model"][name] for name in kept})

    def before_benchmark(self) -> None:
        """Hand the settings on: each row of a benchmark is a ``run`` with them."""
        text = self.command_parser.dump(self._chosen, skip_none=False, skip_validation=True)
        settings = yaml.safe_load(text)
        for name in ("folder", "categories", "shots", "seeds", "processes", "restart", "config"):
            settings.pop(name, None)
        self.trainer.settings = settings


def _check_names(parser: LightningArgumentParser, arguments: Sequence[str]) -> dict[str, Any]:
    """Refuse option names that do not exist, wherever they stand.

    Args:
        parser: The parser of the command.
        arguments: What follows the command.

    Returns:
        The options given and their values, the last one of each; text if from the command line.

    Raises:
        UserError: Naming the option, the file it is in, and the nearest right one.
    """
    known = set(parser.get_defaults(skip_validation=True).keys()) | {"config", "c", "h"}
    options: list[tuple[str, Any, str]] = []  # name, value, file
    for name, value in _words(arguments):
        if name in ("config", "c") and value is not None:
            path = config_file(value)
            options += [(inner, given, f" in {path}") for inner, given in _flat(read_config(path), known)]
        else:
            options.append((name, value, ""))
    modules = {file: module for name, value, file in options if (module := _data_module(name, value))}
    for name, value, file in options:
        module = modules.get(file) or ["", *modules.values()][-1]
        if name.startswith("data."):
            _check_arguments([name.removeprefix("data.").removeprefix("init_args.")], module, file, "data.")
        elif name == "data":
            _check_value(value, file, "data.", module)
        else:
            _check_name(name, value, known, file)
            _check_value(value, file)
    return {name: value for name, value, _ in options}


def _words(arguments: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """Options of a command line: name without dashes, and value."""
    for argument, following in pairwise([*arguments, ""]):
        if argument.startswith("-") and len(argument) > 1 and not argument[1].isdigit():
            name, equals, value = argument.lstrip("-").partition("=")
            yield name.removesuffix("+"), value if equals else None if following.startswith("--") else following


def _flat(content: Mapping[str, Any], known: Collection[str], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Options of a YAML file, dotted."""
    for key, value in content.items():
        if isinstance(value, dict) and f"{prefix}{key}" not in known:
            yield from _flat(value, known, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _data_module(name: str, value: Any) -> str | None:
    """The data module's class, if it is what an option gives."""
    given = value.get("class_path") if name == "data" and isinstance(value, dict) else value
    return given if name in ("data", "data.class_path") and isinstance(given, str) else None


def _check_name(name: str, value: Any, known: Collection[str], file: str) -> None:
    options = [option for option in known if option.startswith(f"{name}.")]
    is_group = options and (not value or isinstance(value, dict) or value[:1] == "{" or Path(value).is_file())
    is_known = any(name == option or name.startswith(f"{option}.") for option in known)
    if is_group or is_known or re.fullmatch(r"(.*\.)?help|print_.*", name):
        return
    if name.startswith("model.") and (place := moved(name.removeprefix("model."), "model.")):
        raise UserError(f"{file.removeprefix(' in ')}: {place}".removeprefix(": "))
    if options:
        raise UserError(f"{name}{file} is a group of options, {', '.join(sorted(options))}; got {value!r}.")
    raise UserError(f"unknown option {name!r}{file}; did you mean {nearest(name, known)!r}?")


def _check_value(value: Any, file: str, prefix: str = "", class_path: str = "") -> None:
    """Refuse arguments that a class inside an option's value does not have."""
    if isinstance(value, list):
        for item in value:
            _check_value(item, file)
    elif isinstance(value, dict):
        if isinstance(given := value.get("init_args"), dict):
            _check_arguments(given, str(value.get("class_path") or class_path), file, prefix)
        for inner in value.values():
            _check_value(inner, file)


def _check_arguments(names: Iterable[str], class_path: str, file: str, prefix: str) -> None:
    """Refuse arguments that a class does not have; jsonargparse says where there is no such class."""
    known = _arguments(class_path)
    for name in names:
        if known and name.partition(".")[0] not in {*known, "class_path", "help"}:
            raise UserError(
                f"unknown option {prefix + name!r}{file}; did you mean {prefix + nearest(name, known)!r}?"
            )


def _arguments(class_path: str) -> set[str]:
    """Names of the arguments of a class, given by its path or by its name alone; empty where there is none."""
    module, _, name = class_path.rpartition(".")
    for place in [module] if module else _CLASSES:
        try:
            found = getattr(importlib.import_module(place), name)
            names = ArgumentParser().add_class_arguments(found, "it", fail_untyped=False)
        except (ImportError, AttributeError, ValueError):
            continue
        return {option.split(".")[1] for option in names}
    return set()


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
        sys.stderr.write(f"pl-patchcore: error: {text}\n")
        raise SystemExit(2) from None
