"""The command ``pl-patchcore``: fit, validate, test, predict, run (fit, then test), update and benchmark.

Lightning's command line, with four things of its own: option names are checked before anything else, so that a
misspelt one, on the command line or anywhere in a YAML file, is answered with one line; what a user can put right
(`UserError`) is shown as one line without a traceback; ``ckpt_path`` brings the model's settings; reports are written
after test and predict.
"""

from __future__ import annotations

import importlib
import logging
import re
import sys
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from inspect import signature
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

import lightning as L
import yaml
from jsonargparse import ActionConfigFile, ArgumentParser  # type: ignore[attr-defined]
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from pl_patchcore import data as data_modules
from pl_patchcore.backbone import UntrainedBackboneWarning
from pl_patchcore.checkpoint import holds_backbone, plain_settings, read_checkpoint
from pl_patchcore.configs import config_file, read_config
from pl_patchcore.data import AnomalyDataModule
from pl_patchcore.data.base import loader_error
from pl_patchcore.errors import UserError
from pl_patchcore.options import GROUPS, moved, nearest
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
        from pl_patchcore import benchmark, published  # not needed for anything else

        if processes < 1:
            raise UserError(f"processes must be at least 1, got {processes}.")
        assert isinstance(datamodule, AnomalyDataModule)  # the command makes no other
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
        super().__call__(parser, cfg, str(config_file(values)), option_string)  # type: ignore[no-untyped-call]


class _Parser(LightningArgumentParser):
    """Lightning's parser, which answers a wrong value in one line."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Say which option has a value it cannot have; jsonargparse's own answer is a nest of types."""
        if not self.exit_on_error:  # one inside another, whose message the outer one has
            super().error(message, ex)
        key = ".".join(re.findall(r'Parser key "([^"]+)"', message))
        expected = re.findall(
            r"Expected an? (?:<class '(?:[^']*\.)?|typing\.)?(.+?)(?:'>)?(?:\. Got value: .*)?$", message, re.MULTILINE
        )
        values = re.findall(r"(?:Got|Given) value: (.*)", message)
        if not (key and expected and values):
            raise UserError(" ".join(message.split())) from ex
        if key == "data":
            names = [name for name in data_modules.__all__ if name.endswith("DataModule")]
            raise UserError(f"no data module {values[0]!r}; did you mean {nearest(values[0], names)!r}?") from ex
        kinds = [kind for kind in dict.fromkeys(expected) if kind != "NoneType"] or expected[:1]
        if choices := [kind[8:-1] for kind in kinds if kind.startswith("Literal[")]:
            kinds = ["one of " + ", ".join(choices)]
        raise UserError(f"{key} must be {' or '.join(kinds)}, got {values[0]}.") from ex


class PatchCoreCLI(LightningCLI):
    """Lightning's command line for `PatchCore` and the data modules."""

    trainer: Trainer

    def __init__(self, args: Sequence[str] | None = None) -> None:
        self.arguments = list(sys.argv[1:] if args is None else args)
        self.options: dict[str, Any] = {}  # what the user gives, on the command line and in files
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
            args=args,  # type: ignore[arg-type]
        )

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """The command that is called for, as setting each up takes a fifth of a second; all if it is none of them."""
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
        command = self.arguments[0] if self.arguments else ""
        if command in _COMMANDS:
            self.options = _check_names(self.command_parser, self.arguments[1:])
            path = self.options.get("ckpt_path")
            if command == "update" and not path and not {"h", "help"} & self.options.keys():
                raise UserError("update needs ckpt_path, the checkpoint of a fitted model.")
            if path and path not in ("best", "last", "hpc") and command != "fit":
                self._read_checkpoint(parser, path)
        elif command.lstrip("-") in ("c", "config"):
            raise UserError(f"the command comes first: pl-patchcore fit {' '.join(self.arguments)}.")
        elif not command:
            raise UserError(f"give a command, {{{','.join(_COMMANDS)}}}; pl-patchcore --help explains them.")
        elif not command.startswith("-"):
            raise UserError(f"unknown command {command!r}; did you mean {nearest(command, _COMMANDS)!r}?")
        super().parse_arguments(parser, args)
        self.chosen: Any = self.config[self.config["subcommand"]]  # settings of the command
        # Next, Lightning would put the checkpoint's settings over the user's own, by way of YAML. It offers no way to
        # leave that out; it does without where there is no ckpt_path.
        self.ckpt_path = self.chosen.pop("ckpt_path", None)

    def _read_checkpoint(self, parser: LightningArgumentParser, path: str) -> None:
        """Have the model made with the settings of a checkpoint, save what the user sets otherwise.

        They are data from a file that may come from anywhere. So they do not go through the parser, which would read
        a class and its arguments out of a string, but straight to the constructor.
        """
        checkpoint = read_checkpoint(path)
        self.saved = plain_settings(checkpoint["hyper_parameters"], signature(PatchCore.__init__).parameters, path)
        if "backbone" not in self.saved and not any(name.startswith("model.backbone") for name in self.options):
            raise UserError(
                f"{path} was fitted with a module as backbone; give it as model.backbone, or load it in Python."
            )
        self.brings_weights = holds_backbone(checkpoint) and not {"model.weights", "model.backbone"} & {*self.options}
        parser.add_instantiator(self._make_model, PatchCore)

    def _make_model(self, kind: type[PatchCore], *_: Any, **values: Any) -> PatchCore:
        """Make the model with the settings of the checkpoint, under those that the user gives."""
        settings = dict(values if "model" in self.options else self.saved or {})
        for name in (name for name in self.options if name.startswith("model.")):
            group, option = [*name.removeprefix("model.").split(".", 1), ""][:2]
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

    def after_instantiate_classes(self) -> None:
        """Where a checkpoint brings the model, let the saved configuration hold only what the user sets of it."""
        if self.saved is not None:
            given = [f"{name}." for name in self.options]
            kept = {k: v for k, v in self.chosen["model"].items() if f"model.{k}.".startswith(tuple(given))}
            self.chosen["model"] = type(self.chosen)(kept)

    def before_benchmark(self) -> None:
        """Hand the settings on: each row of a benchmark is a ``run`` with them."""
        text = self.command_parser.dump(self.chosen, skip_none=False, skip_validation=True)
        own = ("folder", "categories", "shots", "seeds", "processes", "restart", "config")
        self.trainer.settings = {name: value for name, value in yaml.safe_load(text).items() if name not in own}


def _check_names(parser: LightningArgumentParser, arguments: Sequence[str]) -> dict[str, Any]:
    """Refuse option names that do not exist, wherever they stand.

    Args:
        parser: The parser of the command.
        arguments: What follows the command.

    Returns:
        The options given, dotted, and the last value of each: text from the command line, data from a file.

    Raises:
        UserError: Naming the option, the file it is in, and the nearest right one.
    """
    known = {*parser.get_defaults().keys(), "config", "c", "h"}
    options: list[tuple[str, Any, str]] = []  # name, value, file
    for argument, following in pairwise([*arguments, ""]):
        if not re.match(r"-+[^\d-]", argument):
            continue
        name, equals, value = argument.lstrip("-").partition("=")
        value = value if equals else following
        if name in ("config", "c"):
            path = config_file(value)
            options += [(inner, given, f" in {path}") for inner, given in _flat(read_config(path), known)]
        else:
            options.append((name.removesuffix("+"), value, ""))
    module = next((given for name, value, _ in reversed(options) if (given := _data_module(name, value))), "")
    for name, value, file in options:
        if name.startswith("data."):
            _check_arguments([name.removeprefix("data.").removeprefix("init_args.")], module, file, "data.")
        elif name == "data":
            _check_value(value, file, "data.", module)
        else:
            _check_name(name, value, known, file)
            _check_value(value, file)
    return {name: value for name, value, _ in options}


def _flat(content: Mapping[str, Any], known: Collection[str], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Options of a YAML file, dotted."""
    for key, value in content.items():
        if isinstance(value, dict) and f"{prefix}{key}" not in known:
            yield from _flat(value, known, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _data_module(name: str, value: Any) -> str:
    """The data module's class, if it is what an option gives."""
    given = value.get("class_path") if isinstance(value, dict) else value
    return str(given or "") if name in ("data", "data.class_path") else ""


def _check_name(name: str, value: Any, known: Collection[str], file: str) -> None:
    options = sorted(option for option in known if option.startswith(f"{name}."))
    is_group = options and (not value or value[:1] in ("{", "-") or Path(value).is_file())
    is_known = any(f"{name}.".startswith(f"{option}.") for option in known)  # or belongs to a class of its own
    if is_group or is_known or re.fullmatch(r"(.*\.)?help|print_.*", name):
        return
    if name.startswith("model.") and (place := moved(name.removeprefix("model."), "model.")):
        raise UserError(f"{file.removeprefix(' in ')}: {place}".removeprefix(": "))
    if options:
        raise UserError(f"{name}{file} is a group of options, {', '.join(options)}; got {value!r}.")
    raise UserError(f"unknown option {name!r}{file}; did you mean {nearest(name, known)!r}?")


def _check_value(value: Any, file: str, prefix: str = "", class_path: str = "") -> None:
    """Refuse arguments that a class inside an option's value does not have."""
    if isinstance(value, dict):
        if isinstance(given := value.get("init_args"), dict):
            _check_arguments(given, str(value.get("class_path") or class_path), file, prefix)
        value = list(value.values())
    for inner in value if isinstance(value, list) else []:
        _check_value(inner, file)


def _check_arguments(names: Iterable[str], class_path: str, file: str, prefix: str) -> None:
    """Refuse arguments that a class does not have; jsonargparse says where there is no such class."""
    module, _, name = class_path.rpartition(".")
    for place in [module] if module else _CLASSES:
        try:
            found = getattr(importlib.import_module(place), name)
            arguments = ArgumentParser().add_class_arguments(found, "it", fail_untyped=False)
        except (ImportError, AttributeError, ValueError):
            continue
        known = [argument.split(".")[1] for argument in arguments]
        for given in names:
            if given.partition(".")[0] not in (*known, "class_path", "help"):
                alike = prefix + nearest(given, known)
                raise UserError(f"unknown option {prefix + given!r}{file}; did you mean {alike!r}?")
        return


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
    except RuntimeError as error:  # torch tells of a loader process that was killed wherever the run happens to be
        if (explained := loader_error(error)) is error:
            raise
        _fail(str(explained))


def _fail(text: str) -> NoReturn:
    """End with one line; on a line of its own, as torch ends its word about a killed process with a null character."""
    sys.stderr.write("\n" * text.startswith("a loader process") + f"pl-patchcore: error: {text}\n")
    raise SystemExit(2) from None
