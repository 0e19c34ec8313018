"""A fitted model as one file that runs without this package: camera image in, score, verdict and map out.

The way of an export, one file a stage::

    options.py       what a file is to be like; a model that no file could repeat is refused with the reason
    geometry.py      images (B, H, W, 3)      -> the network's input, and the way back to the image's pixels
    rows.py          rows of the memory bank  -> the same in fewer bits
    runtime.py       joins these with the model's parts: images -> scores, verdicts, p-values, maps, as one graph
    onnx_file.py     graph                    -> a file of ONNX, and a session that runs it
    openvino_file.py the same, of OpenVINO; torch_file.py, of torch.export
    parity.py        file, model, images      -> how far they differ; more than stated is refused
    write.py         all of it                -> a file, and what is known of it as JSON; command.py calls it
"""

from pl_patchcore.export.options import FileOptions
from pl_patchcore.export.write import FORMATS, export

__all__ = ["FORMATS", "FileOptions", "export"]
