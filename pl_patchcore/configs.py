"""The YAML files that come with the package: recipes, data sets, Trainers.

``pl-patchcore --config recipes/mtd`` and ``PatchCore.from_recipe("mtd")`` read them. In the repository they lie in
``configs/``; the wheel holds them as package data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from pl_patchcore.errors import UserError
from pl_patchcore.options import GROUPS, nearest

_HERE = Path(__file__).parent
CONFIGS = _HERE / "configs" if (_HERE / "configs").is_dir() else _HERE.parent / "configs"

_OWN_IMAGES, _OWN_MODULE = "data/folder", "FolderDataModule"  # defaults for images of one's own, and their data module


def config_names(folder: str = "") -> list[str]:
    """Names of the files that come with the package, such as ``data/folder``, or of those in one of its folders."""
    place = CONFIGS / folder
    return sorted(path.relative_to(place).with_suffix("").as_posix() for path in place.rglob("*.yaml"))


def config_file(name: str | Path) -> Path:
    """Find a configuration file, by its path or the name of one in the package; a `UserError` if there is none.

    Example:
        >>> config_file("data/folder").name
        'folder.yaml'
    """
    path, names = Path(name), config_names()
    if path.is_file():
        return path
    if str(name) not in names:
        alike = nearest(path.with_suffix("").as_posix(), names)
        raise UserError(f"{name}: no such configuration file, here or in the package; did you mean {alike!r}?")
    return CONFIGS / f"{name}.yaml"


def read_config(path: Path) -> dict[str, Any]:
    """Read a configuration file; a `UserError` if it is no YAML, or holds no options by name."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: is no YAML file: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: must hold options as 'name: value'.")
    return content


def recipe(name: str, category: str | None = None) -> dict[str, Any]:
    """The arguments of `PatchCore` that a recipe sets, with those for a category; a `UserError` if there is none.

    Example:
        >>> recipe("mstc")["layers"]
        ['layer3', 'layer4']
        >>> [recipe("anomalydino_448", each)["foreground"] for each in ("pill", "tile")]
        ['anomalydino', 'none']
    """
    names = config_names("recipes")
    if name not in names:
        raise UserError(f"recipe {name!r} is unknown; choose one of {', '.join(names)}.")
    content = read_config(CONFIGS / "recipes" / f"{name}.yaml")
    return with_category(content.get("model") or {}, content.get("by_category"), category)


def with_category(
    model: Mapping[str, Any], by_category: Mapping[str, Any] | None, category: str | None
) -> dict[str, Any]:
    """Settings of a model, groups of options as dicts, with those that ``by_category`` has for a category over them.

    Example:
        >>> with_category({"sigma": 4.0, "resize": 448}, {"screw": {"resize": 672}}, "screw")
        {'sigma': 4.0, 'resize': 672}
    """
    differ = (by_category or {}).get(category or "") or {}
    groups = {name: {**(model.get(name) or {}), **differ[name]} for name in GROUPS if name in differ}
    return {**model, **differ, **groups}


def ordered(words: Sequence[str]) -> list[str]:
    """The words of a command in the order in which they count: what comes later wins.

    First the defaults for images of one's own, where the data module is `FolderDataModule` or none is named; then
    recipes that come with the package, other configuration files, and options.

    Example:
        >>> ordered(["fit", "--data.nominal", "good", "-c", "recipes/official"])[:3]
        ['fit', '--config=data/folder', '--config=recipes/official']
    """
    files, options, rest = [], [], iter(words[1:])
    for word in rest:
        option, equals, value = word.partition("=")
        if option in ("-c", "--config") and (file := value if equals else next(rest, "")):
            files.append(file)
        else:
            options.append(word)
    files.sort(key=lambda file: (file != _OWN_IMAGES, not is_recipe(file)))
    if _data_module(files, options).rpartition(".")[2] == _OWN_MODULE and files[:1] != [_OWN_IMAGES]:
        files.insert(0, _OWN_IMAGES)
    return [*words[:1], *(f"--config={file}" for file in files), *options]


def _data_module(files: Sequence[str], options: Sequence[str]) -> str:
    """The data module that files and options name last; `FolderDataModule` if they name none."""
    said: list[Any] = [read_config(config_file(file)).get("data") for file in files]
    for word, following in zip(options, [*options[1:], ""], strict=False):
        option, equals, value = word.partition("=")
        if option in ("--data", "--data.class_path"):
            said.append(yaml.safe_load(value if equals else following))
    names = [each.get("class_path") if isinstance(each, dict) else each for each in said]
    return next((name for name in reversed(names) if isinstance(name, str)), _OWN_MODULE)


def comes_with_the_package(file: str) -> bool:
    """Whether a configuration file is one of the package's."""
    return config_file(file).resolve().is_relative_to(CONFIGS.resolve())


def is_recipe(file: str) -> bool:
    """Whether a configuration file is one of the package's recipes."""
    return config_file(file).resolve().parent == (CONFIGS / "recipes").resolve()
