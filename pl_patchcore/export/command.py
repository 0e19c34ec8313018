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

_OF_FILE: dict[str, dict[str, Any]] = {
    "resize_in_file": {
        "action": "store_true",
        "help": "Of a model with images.resize_by pillow: resize in the file, by the same filter unrounded. Scores "
        "change; --data measures by how much.",
    },
    "image_size": {
        "nargs": 2,
        "type": int,
        "metavar": ("HEIGHT", "WIDTH"),
        "help": "Take images of this size alone; roi, ignore and longer_side need it.",
    },
    "bank_dtype": {
        "choices": get_args(FileDtype),
        "help": "Type of the memory bank's rows in the file (default: float32); --data measures what is lost.",
    },
    "precision": {
        "choices": get_args(Precision),
        "help": "Of products when the file runs (default: float32); bf16 with openvino, --data measures what is lost.",
    },
    "map_at": {
        "choices": get_args(MapAt),
        "help": "Maps on the pixels of the image, or of the network's input (default: image).",
    },
    "max_score_change": {"type": float, "help": "Keep no file that changes a score by more than this share of it."},
    "parity_file": {
        "action": "store_true",
        "help": "Write images and what the model says of them beside the file, as .npz, for tests elsewhere.",
    },
}
_OF_MODEL = ("weights", "tile_batch", "image_threshold", "pixel_threshold", "false_alarm_rate")


class _Parser(argparse.ArgumentParser):
    """A parser that raises its errors."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"export: {message}; pl-patchcore export --help shows its options.")


def _parser() -> _Parser:
    parser = _Parser("pl-patchcore export", description=COMMANDS["export"], allow_abbrev=False)
    parser.add_argument("--ckpt_path", required=True, help="Checkpoint of the fitted model.")
    parser.add_argument("--format", default="onnx", choices=list(FORMATS), help="Format of the file (default: onnx).")
    parser.add_argument(
        "--output", help="The file; by default beside the checkpoint, with its name. What is known of it goes to .json "
        "beside it."
    )  # fmt: skip
    parser.add_argument(
        "--data", nargs="+", help="Folder of images, or image files, to compare the file with the model on, beside "
        "noise."
    )  # fmt: skip
    parser.add_argument(
        "--calibration", nargs="+", help="Folder of nominal images that are not in the memory bank, or image files, "
        "whose scores by the file itself set its thresholds. One set by hand stays."
    )  # fmt: skip
    parser.add_argument("--model.weights", help="Path of the backbone's weights, where they lie elsewhere.")
    parser.add_argument("--model.tile_batch", type=int, help="Tiles that the backbone is given at once in the file.")
    parser.add_argument("--model.image_threshold", type=float, help="Threshold for anomaly scores set by hand.")
    parser.add_argument("--model.pixel_threshold", type=float, help="The same for anomaly maps.")
    parser.add_argument(
        "--model.false_alarm_rate", type=float, help="Share of nominal images, in (0, 1), that may exceed thresholds."
    )
    for name, how in _OF_FILE.items():
        parser.add_argument(f"--{name}", **how)
    return parser


def run(words: Sequence[str]) -> None:
    """Export a checkpoint.

    Args:
        words: The command's options.

    Raises:
        UserError: If one is wrong, or as `export`.
    """
    given: dict[str, Any] = vars(_parser().parse_args(words))
    checkpoint, kind = given["ckpt_path"], given["format"]
    data, nominal = (each[0] if each and len(each) == 1 else each for each in (given["data"], given["calibration"]))
    output = Path(given["output"] or Path(checkpoint).with_suffix(FORMATS[kind][0]))
    options = FileOptions(**{name: value for name in _OF_FILE if (value := given[name]) is not None})
    of_model = {name: value for name in _OF_MODEL if (value := given[f"model.{name}"]) is not None}
    module = PatchCore.load_from_checkpoint(checkpoint, inference="float32", **of_model)
    export(module, output, kind, data, checkpoint, options, nominal)
