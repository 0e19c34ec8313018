"""The YAML files that come with the package: recipes, data sets, Trainers.

They are the only copy of the recipes. ``pl-patchcore --config recipes/mtd`` and ``PatchCore.from_recipe("mtd")`` read
them. In the repository they lie in ``configs/``; the wheel holds them as package data.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from pl_patchcore.errors import UserError
from pl_patchcore.options import nearest

_HERE = Path(__file__).parent
CONFIGS = _HERE / "configs" if (_HERE / "configs").is_dir() else _HERE.parent / "configs"


def config_names(folder: str = "") -> list[str]:
    """Names of the files that come with the package, such as ``data/folder``, or of those in one of its folders."""
    place = CONFIGS / folder
    return sorted(path.relative_to(place).with_suffix("").as_posix() for path in place.rglob("*.yaml"))


def config_file(name: str | Path) -> Path:
    """Find a configuration file: a path, or the name of one that comes with the package.

    Raises:
        UserError: If there is no such file.

    Example:
        >>> config_file("data/folder").name
        'folder.yaml'
    """
    path, names = Path(name), config_names()
    if path.is_file():
        return path
    if str(name) not in names:
        alike = nearest(path.with_suffix("").as_posix(), names)
        raise UserError(
            f"{name}: no such configuration file, nor one that comes with PatchCore; did you mean {alike!r}?"
        )
    return CONFIGS / f"{name}.yaml"


def read_config(path: Path) -> dict[str, Any]:
    """Read a configuration file.

    Raises:
        UserError: If it is no YAML, or holds no options by name.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: is no YAML file: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: must hold options as 'name: value'.")
    return content


def recipe(name: str) -> dict[str, Any]:
    """The arguments of `PatchCore` that a recipe sets.

    Raises:
        UserError: If there is no such recipe.

    Example:
        >>> recipe("mstc")["layers"]
        ['layer3', 'layer4']
    """
    names = config_names("recipes")
    if name not in names:
        raise UserError(f"recipe {name!r} is unknown; choose one of {', '.join(names)}.")
    model: dict[str, Any] = read_config(CONFIGS / "recipes" / f"{name}.yaml").get("model") or {}
    return model
