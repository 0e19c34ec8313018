"""What jsonargparse says of a wrong option -> one line: the option, what is wrong, the remedy."""

from __future__ import annotations

import re
from collections.abc import Iterable
from importlib import import_module

from jsonargparse import ArgumentParser

from pl_patchcore.options import moved, nearest


def in_one_line(message: str, known: Iterable[str], file: str = "", inside: str = "", of: str = "") -> str:
    """What is wrong with an option, out of jsonargparse's own message, which may be a nest of types.

    Args:
        message: That of jsonargparse.
        known: Options there are, dotted.
        file: `` in <path>``, if the option stands in a file.
        inside: What stands before the names in the message, such as ``data.``.
        of: `` of <class>``, if the options are those of a class.
    """
    keys = re.findall(r'Parser key "([^"]+)"', message)
    problem = re.search(
        r"Problem with given class_path '([\w.]+)':\n(.*?)(?=\n +- |\n +Given value|\Z)", message, re.DOTALL
    )
    if problem:
        return _in_class(problem[1], problem[2], f"{inside}{'.'.join(keys[:1])}", file)
    unknown = re.search(
        r"(?:Group '(\w+)' does not )?(?:nrecognized arguments: -+|(?:Key|Option|accept [a-z ]+) ')([a-z_][\w.]*)",
        message,
    )
    no_group = re.search(r"Unable to load config '(.*)'", message)
    name = inside + (".".join(filter(None, unknown.groups())) if unknown else ".".join(keys[:1]))
    if (unknown or no_group) and name.startswith("model.") and (place := moved(name.removeprefix("model."), "model.")):
        return f"{file.removeprefix(' in ')}: {place}".removeprefix(": ")
    if no_group:
        options = sorted(option for option in known if option.startswith(f"{name}."))
        listed = ", ".join([*options[:8], *["..."] * (len(options) > 8)])
        return f"{name}{file} is a group of options, {listed}; got {no_group[1]!r}."
    if unknown:
        return f"unknown option {name!r}{of}{file}; did you mean {nearest(name, known)!r}?"
    expected = re.findall(
        r"Expected an? (?:<class '(?:[^']*\.)?|typing\.)?(.+?)(?:'>)?(?:\. Got value: .*)?$", message, re.MULTILINE
    )
    values = re.findall(r"(?:Got|Given) value: (.*)", message)
    name = inside + ".".join(keys)
    if values and (base := re.search(r"Import path does not correspond to a subclass of (\w+)", message)):
        return f"{name}{file}: {values[0]} is no {base[1]}; derive it from that class."
    if values and "Expected a dot import path string" in message:
        return f"{name}{file}: no class {values[0]!r}; did you mean {nearest(values[0], _classes(message))!r}?"
    if not (keys and expected and values):
        return " ".join(message.split())
    kinds = [kind for kind in dict.fromkeys(expected) if kind != "NoneType"] or expected[:1]
    if choices := [kind[8:-1] for kind in kinds if kind.startswith("Literal[")]:
        kinds = ["one of " + ", ".join(choices)]
    return f"{name} must be {' or '.join(kinds)}, got {values[0]}."


def _in_class(path: str, message: str, option: str, file: str) -> str:
    """What is wrong with an option that is a class, or with an argument of that class."""
    if missing := re.search(r"following arguments are required: (.*)", message):
        return f"{option}{file}: {path.rpartition('.')[2]} needs {missing[1]}; set {option}.{missing[1]}."
    if "has no attribute" in message or "No module named" in message:
        return f"{option}{file}: no class {path!r}: {' '.join(message.split())}."
    module, _, name = path.rpartition(".")
    arguments = ArgumentParser().add_class_arguments(getattr(import_module(module), name), "it", fail_untyped=False)
    known = [f"{option}.{argument.removeprefix('it.')}" for argument in arguments]
    return in_one_line(message, known, file, f"{option}.", f" of {name}")


def _classes(message: str) -> set[str]:
    """Names of the classes that an option takes, out of the types that a message lists."""
    types = re.findall(r"[\w.]+\.\w+", "".join(re.findall(r"Subtypes: .*", message)))
    found = [getattr(import_module(path.rpartition(".")[0]), path.rpartition(".")[2], object) for path in types]
    names: set[str] = set()
    while found:
        kind = found.pop()
        if isinstance(kind, type) and kind is not object and kind.__name__ not in names:
            names.add(kind.__name__)
            found += kind.__subclasses__()
    return names
