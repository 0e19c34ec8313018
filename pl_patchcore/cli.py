"""The command ``pl-patchcore``: fit, validate, test, predict, run (fit, then test), update and benchmark.

Lightning's command line, with three things of its own: option names are checked before anything else, so that a
misspelt one, on the command line or anywhere in a YAML file, is answered with one line; what a user can put right
(`UserError`) is shown as one line without a traceback; reports are written after test and predict.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import json
import logging
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import lightning as L
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from pl_patchcore import benchmark
from pl_patchcore.backbone import UntrainedBackboneWarning
from pl_patchcore.checkpoint import holds_backbone, read_checkpoint
from pl_patchcore.data import AnomalyDataModule
from pl_patchcore.ensemble import Combine, PatchCoreEnsemble
from pl_patchcore.errors import UserError
from pl_patchcore.patchcore import PatchCore
from pl_patchcore.published import published_for
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


class Trainer(L.Trainer):
    """Lightning's Trainer with ``run``, ``update`` and ``benchmark``."""

    settings: ClassVar[dict[str, Any]] = {}  # of the command line, for ``benchmark``

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
            UserError: If no checkpoint is given, or it is of an ensemble.
        """
        if ckpt_path is None or not isinstance(model, PatchCore):
            raise UserError("update needs ckpt_path of a single fitted model; an ensemble must be fitted again.")
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
        assert isinstance(datamodule, AnomalyDataModule)
        if processes < 1:
            raise UserError(f"processes must be at least 1, got {processes}.")
        datamodule.download_data()
        settings, kind = self.settings, type(datamodule)
        known = datamodule.categories()
        if strange := [name for name in categories or [] if name not in (*known, kind.category_all)]:
            raise UserError(f"no category {strange[0]!r}; there are {', '.join(known) or 'none to choose from'}.")
        if processes > 1:
            settings["trainer"]["devices"] = 1
        argument = kind.category_argument if known else None
        names = categories or known or [kind.__name__.removesuffix("DataModule").lower()]
        jobs = benchmark.plan(settings, Path(folder), names, argument, shots or [None], seeds or [None])
        published = published_for(kind.__name__, settings["model"])
        failed = benchmark.run_jobs(jobs, processes, restart)
        benchmark.write_table(Path(folder), benchmark.table_lines(jobs, published), failed, published)
        if failed:
            raise UserError(f"{len(failed)} of {len(jobs)} rows failed: {', '.join(failed)}; start again to retry.")


def make_model(
    members: list[dict[str, Any]] | None = None, combine: Combine = "nominal", **settings: Any
) -> L.LightningModule:
    """Make a PatchCore, or an ensemble of several.

    Args:
        members: For an ensemble: a list with the settings of each member that differ from the shared ones, such as
            ``{backbone: densenet201, layers: [features.denseblock2, features.denseblock3]}``.
        combine: How an ensemble's scores become one: ``nominal``, in units of what is usual among nominal patches;
            ``test_range``, as in the authors' code, scaled to [0, 1] over the whole test set.
        **settings: Arguments of `PatchCore`.
    """
    if members is None:
        return PatchCore(**settings)
    return PatchCoreEnsemble(members, combine, **settings)


def _refuse(message: str, *_: Any) -> NoReturn:
    """Say in one line which option has a value it cannot have; jsonargparse's own answer is a nest of types."""
    key = ".".join(re.findall(r'Parser key "([^"]+)"', message))
    expected = dict.fromkeys(re.findall(r"Expected an? (.+?)(?:\. Got value: .*)?$", message, re.MULTILINE))
    values = re.findall(r"(?:Got|Given) value: (.*)", message)
    if not (key and expected and values):
        raise UserError(" ".join(message.split()))
    if key == "data":
        names = [name for name in sys.modules["pl_patchcore.data"].__all__ if name.endswith("DataModule")]
        raise UserError(f"no data module {values[0]!r}; did you mean {_nearest(values[0], names)!r}?")
    types = [re.sub(r"<class '(?:.*\.)?(.+)'>|typing\.(.+)", r"\1\2", kind) for kind in expected]
    kinds = [kind for kind in types if kind != "NoneType" or len(types) == 1]
    if any(kind.startswith("Literal[") for kind in kinds):
        kinds = ["one of " + ", ".join(kind.removeprefix("Literal[").removesuffix("]") for kind in kinds)]
    raise UserError(f"{key} must be {' or '.join(kinds)}, got {values[0]}.")


class PatchCoreCLI(LightningCLI):
    """Lightning's command line for `PatchCore` and the data modules."""

    def __init__(self, args: Sequence[str] | None = None) -> None:
        self.arguments = list(sys.argv[1:] if args is None else args)
        super().__init__(
            make_model,
            AnomalyDataModule,
            subclass_mode_data=True,
            trainer_class=Trainer,
            seed_everything_default=False,
            parser_kwargs={"prog": "pl-patchcore", "description": "PatchCore anomaly detection."},
            save_config_kwargs={"overwrite": True},
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            args=self.arguments,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Trainer methods offered, and their arguments that are not options."""
        return LightningCLI.subcommands() | {name: {"model", "datamodule"} for name in ("run", "update", "benchmark")}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the reports and their options."""
        parser.add_lightning_class_args(TestReport, "report")
        parser.add_lightning_class_args(PredictionWriter, "predictions")
        parser.add_lightning_class_args(CoverageReport, "coverage")
        parser.set_defaults({"trainer.max_epochs": 1})
        parser.error = _refuse  # type: ignore[method-assign, assignment]

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Check the names of all options, take the model of ``ckpt_path`` as default, then parse."""
        given = check_options(parser, self.arguments)
        super().parse_arguments(parser, self._with_checkpoint(given))

    def _with_checkpoint(self, options: set[str]) -> list[str]:
        """Put the model's settings of the checkpoint to be loaded before the user's own, which win."""
        arguments = self.arguments
        path = next((value for key, value in _options(arguments) if key == "ckpt_path"), None)
        if arguments and arguments[0] == "update" and not path and not any(a in ("-h", "--help") for a in arguments):
            raise UserError("update needs ckpt_path, the checkpoint of a fitted model.")
        if not path or path in ("best", "last", "hpc") or arguments[0] == "fit":
            return arguments
        checkpoint = read_checkpoint(path)
        saved = dict(checkpoint["hyper_parameters"])
        if "backbone" not in saved and not any(name.startswith("model.backbone") for name in options):
            raise UserError(
                f"{path} was fitted with a module as backbone; give it as model.backbone, or load it in Python."
            )
        if holds_backbone(checkpoint) and not {"model.weights", "model.backbone"} & options:
            saved["weights"] = None  # the checkpoint's own are loaded over the random ones
            warnings.simplefilter("ignore", UntrainedBackboneWarning)
        # JSON is YAML on one line; strings stand for themselves
        words = {key: value if isinstance(value, str) else json.dumps(value) for key, value in saved.items()}
        given = [f"--model.{key}={word}" for key, word in words.items()]
        return [arguments[0], *given, *arguments[1:]]

    def _parse_ckpt_path(self) -> None:
        """Nothing: `_with_checkpoint` has done it, and lets the user's options win."""

    def instantiate_classes(self) -> None:
        """Make the model, the data and the Trainer; what one of them refuses is said in its own words."""
        try:
            super().instantiate_classes()
        except UserError:
            raise
        except (ValueError, MisconfigurationException) as error:  # a setting that Lightning refuses, or a data module
            found = re.search(r"Errors:\n  - (.*)\n  - Expected a <class 'NoneType'>", str(error), re.DOTALL)
            raise UserError(" ".join((found[1] if found else str(error)).split())) from error

    def before_instantiate_classes(self) -> None:
        """Do not collect predictions, maps and all, in memory: they are written as they come."""
        if self.subcommand == "predict":
            self.config["predict"]["return_predictions"] = False
        if self.subcommand in ("test", "validate"):
            self.config[self.subcommand]["verbose"] = False

    def before_benchmark(self) -> None:
        """Hand the settings on: each row of a benchmark is a ``run`` with them."""
        parser, config = self._parser("benchmark"), self.config["benchmark"]
        settings = yaml.safe_load(parser.dump(config, skip_none=False, skip_validation=True))
        for name in ("folder", "categories", "shots", "seeds", "processes", "restart", "config"):
            settings.pop(name, None)
        Trainer.settings = settings


def check_options(parser: LightningArgumentParser, arguments: Sequence[str]) -> set[str]:
    """Refuse option names that do not exist, wherever they stand.

    Args:
        parser: The parser of the whole command line.
        arguments: The command line, without the program's name.

    Returns:
        Names of the options given.

    Raises:
        UserError: Naming the option, the file it is in, and the nearest right one.
    """
    commands = parser._subcommands_action._name_parser_map  # type: ignore[union-attr]
    if not arguments or arguments[0] not in commands:
        words = [argument for argument in arguments[:1] if not argument.startswith("-")]
        if words:
            raise UserError(f"unknown command {words[0]!r}; did you mean {_nearest(words[0], list(commands))!r}?")
        return set()
    known = {action.dest for action in commands[arguments[0]]._actions} | {
        "config",
        "help",
        "data.class_path",
        "data.init_args",
    }
    options = []  # key, value, the data module it is for, where it stands
    for key, value in _options(arguments[1:]):
        if key in ("config", "c") and value is not None:
            content = list(_file_options(Path(value)))
            own = _data_class(content)
            options += [(name, inner, own, f" in {value}") for name, inner in content]
        elif key not in ("config", "c", "h") and not key.startswith(("help", "print_")):
            options.append((key, value, None, ""))
    chosen = _data_class([(key, value) for key, value, _, _ in options])
    for key, value, data, where in options:
        _check_name(key, known, data or chosen, where)
        for place, inner in _nested(value):
            _check_name(place, _arguments(inner), None, where)
    return {key for key, _, _, _ in options}


def _data_class(options: Sequence[tuple[str, Any]]) -> str | None:
    """Name of the data module: the last one given."""
    given = [value for key, value in options if key in ("data", "data.class_path") and isinstance(value, str)]
    return given[-1] if given else None


def _check_name(key: str, known: set[str], data: str | None, where: str) -> None:
    if key in known or any(key.startswith(f"{name}.") for name in known & _OPEN):
        return
    if any(name.startswith(f"{key}.") for name in known):
        return  # a group
    if key.startswith("data."):
        if data is None:
            return  # jsonargparse says that data is missing
        known = {f"data.{name}" for name in _arguments(data)}
        if not known:
            return  # jsonargparse says that the class is missing
        short = key.replace("data.init_args.", "data.")
        if short in known:
            return
        key = short
    raise UserError(f"unknown option {key!r}{where}; did you mean {_nearest(key, sorted(known))!r}?")


_OPEN = {  # options that take a class with arguments of its own
    "trainer.accelerator", "trainer.strategy", "trainer.logger", "trainer.callbacks", "trainer.plugins",
    "trainer.profiler", "model.backbone",
}  # fmt: skip


def _arguments(class_path: str) -> set[str]:
    """Names of a class's constructor arguments; empty where the class is not found (jsonargparse says so)."""
    if "." not in class_path:
        for module in ("pl_patchcore.data", "lightning.pytorch.callbacks", "lightning.pytorch.loggers"):
            if hasattr(sys.modules.get(module), class_path):
                class_path = f"{module}.{class_path}"
                break
        else:
            return set()
    module, _, name = class_path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
        names = set(inspect.signature(found).parameters)
        if issubclass(found, AnomalyDataModule):  # these pass what they don't name on to their base
            names = (names | set(inspect.signature(AnomalyDataModule).parameters)) - {"loading"}
    except (ImportError, ValueError, AttributeError, TypeError):
        return set()
    return names


def _nested(value: Any) -> Iterator[tuple[str, str]]:
    """Init arguments of classes inside an option's value: their name and the class they are for."""
    if isinstance(value, list):
        for item in value:
            yield from _nested(item)
    elif isinstance(value, dict):
        if isinstance(value.get("class_path"), str) and isinstance(value.get("init_args"), dict):
            names = _arguments(value["class_path"])
            if names and "kwargs" not in names:
                for name in value["init_args"]:
                    yield name, value["class_path"]
        for inner in value.values():
            yield from _nested(inner)


def _options(arguments: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """Options of a command line: name without dashes, and value."""
    for argument, following in pairwise([*arguments, ""]):
        if argument.startswith("-") and len(argument) > 1 and not argument[1].isdigit():
            name, equals, value = argument.lstrip("-").partition("=")
            yield (
                name.removesuffix("+"),
                value if equals else None if following.startswith("--") else following,
            )


def _file_options(path: Path) -> Iterator[tuple[str, Any]]:
    """Options of a YAML file, dotted; lists and what belongs to a class of its own stay values."""
    if not path.is_file():
        raise UserError(f"{path}: no such configuration file.")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: is no YAML file: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: must hold options as 'name: value'.")
    yield from _flat("", content)


def _flat(prefix: str, content: dict[Any, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in content.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and name not in _OPEN and value:
            yield from _flat(f"{name}.", value)
        else:
            yield name, value


def _nearest(name: str, known: Sequence[str]) -> str:
    last = name.rsplit(".", 1)[-1]
    alike = [k for k in known if k.rsplit(".", 1)[-1] == last]
    return (alike or difflib.get_close_matches(name, known, 1, 0) or [""])[0]


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


__all__ = ["PatchCoreCLI", "Trainer", "check_options", "main"]
