"""Graph -> a file of ONNX, what is told in it, and a session of onnxruntime that runs it."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from pl_patchcore.errors import UserError
from pl_patchcore.export.runtime import Runtime
from pl_patchcore.weights_file import first_line

INPUT = "image"
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
EXAMPLE = (224, 288)  # pixels of the images that the graph is recorded with, where any will do
Run = Callable[[np.ndarray], dict[str, np.ndarray]]  # images uint8 (B, H, W, 3) -> outputs by name


def require(packages: tuple[str, ...], extra: str) -> dict[str, str]:
    """Versions of packages that an export needs.

    Raises:
        UserError: If one is missing.
    """
    for name in packages:
        try:
            import_module(name)
        except ImportError as error:
            raise UserError(f"this export needs {name}: pip install 'pl-patchcore[{extra}]'.") from error
    return {name: version(name) for name in packages}


def write(runtime: Runtime, path: Path) -> None:
    """Record the graph, and write it; raises as `recorded`."""
    how = {"dynamo": True, "verbose": False, "input_names": [INPUT], "output_names": runtime.outputs}
    with _AttentionOfFourAxes():
        recorded(torch.onnx.export, runtime, **how).save(path)


class _AttentionOfFourAxes(TorchFunctionMode):
    """Attention within windows, as of Hiera, has five axes, and the exporter takes four."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention and args[0].ndim > 4:
            outer = args[0].shape[:-3]
            found = func(*(each.flatten(0, -4) for each in args[:3]), *args[3:], **(kwargs or {}))
            return found.unflatten(0, outer)
        return func(*args, **(kwargs or {}))


def recorded(record: Callable[..., Any], runtime: Runtime, **how: Any) -> Any:
    """Record a graph whose batch is open, and height and width too where the images may have any.

    Args:
        record: An exporter of torch, that takes a module, example inputs and ``dynamic_shapes``.
        runtime: What is recorded.
        how: More for the exporter.

    Raises:
        UserError: If the backbone cannot be recorded.
    """
    size = runtime.size or runtime.size_beyond(EXAMPLE)
    example = torch.randint(0, 256, (2, *size, 3), dtype=torch.uint8)  # of a batch of 1, 1 would be taken for fixed
    open_axes = dict.fromkeys(range(1 if runtime.size else 3), torch.export.Dim.DYNAMIC)
    try:
        with _quiet(), torch.no_grad():
            return record(runtime, (example,), dynamic_shapes=(open_axes,), **how)
    except Exception as error:  # of torch's and onnx's own many kinds
        cause = error
        while isinstance(cause.__cause__, Exception):
            cause = cause.__cause__
        one_size = runtime.size or runtime.frame.transform.size
        any_size = "" if one_size else "; resize and crop give its images one size, at which more backbones can be"
        raise UserError(f"the graph of this model cannot be recorded ({first_line(cause)}){any_size}.") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep back what the exporter says of itself."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def tell(told: Mapping[str, str], path: Path) -> None:
    """Put texts by name into a file's ``metadata_props``."""
    import onnx

    model = onnx.load(path)
    onnx.helper.set_model_props(model, dict(told))
    onnx.save(model, path)


def session(path: Path) -> Run:
    """Run a file on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    opened = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [each.name for each in opened.get_outputs()]

    def run(images: np.ndarray) -> dict[str, np.ndarray]:
        return dict(zip(names, opened.run(None, {INPUT: images}), strict=True))

    return run
