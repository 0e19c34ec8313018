"""The command ``pl-patchcore export``: a checkpoint -> a file that runs without this package."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn, get_args

from pl_patchcore.commands import COMMANDS
from pl_patchcore.errors import UserError
from pl_patchcore.export.options import FileOptions, Precision
from pl_patchcore.export.rows import FileDtype
from pl_patchcore.export.runtime import MapAt
from pl_patchcore.export.write import FORMATS, export
from pl_patchcore.patchcore import PatchCore


class _Parser(argparse.ArgumentParser):
    """A parser that raises its errors."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"export: {message}; pl-patchcore export --help shows its options.")


def _parser() -> _Parser:
    """Its answer lacks what is not given; options that are neither named below nor of ``model`` are `FileOptions`."""
    parser = _Parser(
        "pl-patchcore export",
        description=COMMANDS["export"],
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    add = parser.add_argument
    add("--ckpt_path", required=True, help="Checkpoint of the fitted model.")
    add("--format", default="onnx", choices=list(FORMATS), help="Format of the file (default: onnx).")
    add("--output", help="The file, by default beside the checkpoint; what is known of it goes to .json beside it.")
    add("--data", nargs="+", help="Folder of images, or image files, to compare file and model on, beside noise.")
    help = "Nominal images that are not in the memory bank, likewise: the file's scores of them set its thresholds."
    add("--calibration", nargs="+", help=help)
    add("--model.weights", help="Path of the backbone's weights, where they lie elsewhere.")
    add("--model.tile_batch", type=int, help="Tiles that the backbone is given at once in the file.")
    add("--model.image_threshold", type=float, help="Threshold for anomaly scores set by hand.")
    add("--model.pixel_threshold", type=float, help="The same for anomaly maps.")
    add("--model.false_alarm_rate", type=float, help="Share of nominal images, in (0, 1), that may exceed thresholds.")
    help = "Resize by the same filter, unrounded, in the file, of a model with images.resize_by pillow. Scores change."
    add("--resize_in_file", action="store_true", help=help)
    help = "Take images of this size alone; roi, ignore and longer_side need it."
    add("--image_size", nargs=2, type=int, metavar=("HEIGHT", "WIDTH"), help=help)
    help = "Type of the memory bank's rows in the file (default: float32); --data measures what is lost."
    add("--bank_dtype", choices=get_args(FileDtype), help=help)
    help = "Of products when the file runs (default: float32); bf16 with openvino, --data measures what is lost."
    add("--precision", choices=get_args(Precision), help=help)
    help = "Maps on the pixels of the image, or of the network's input (default: image)."
    add("--map_at", choices=get_args(MapAt), help=help)
    add("--max_score_change", type=float, help="Keep no file that changes a score by more than this share of it.")
    help = "Write images and what the model says of them beside the file, as .npz, for tests elsewhere."
    add("--parity_file", action="store_true", help=help)
    return parser


def run(words: Sequence[str]) -> None:
    """Export a checkpoint.

    Args:
        words: The command's options.

    Raises:
        UserError: If one is wrong, or as `export`.
    """
    given: dict[str, Any] = vars(_parser().parse_args(words))
    checkpoint, kind = given.pop("ckpt_path"), given.pop("format")
    output = given.pop("output", "") or Path(checkpoint).with_suffix(FORMATS[kind][0])
    data, calibration = given.pop("data", None), given.pop("calibration", None)
    of_model = {name.removeprefix("model."): given.pop(name) for name in [*given] if name.startswith("model.")}
    options = FileOptions(**given)
    module = PatchCore.load_from_checkpoint(checkpoint, inference="float32", **of_model)
    export(module, output, kind, data, checkpoint, options, calibration)
