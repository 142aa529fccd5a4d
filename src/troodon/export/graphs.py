"""The network as one file that runs without Troodon: a graph of torch.export, of ONNX or of OpenVINO.

One file serves any number of images, of any size that patches divide.
"""

import contextlib
import io
import json
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from troodon.export.network import DTYPES, Network, program
from troodon.export.parity import Reader
from troodon.model.backbone import Backbone
from troodon.run import version

INSIDE = 1_800_000_000  # bytes of weights up to which ONNX keeps them inside: a file of protobuf ends at 2 GiB
AXES = {"cls": ("images",), "patches": ("images", "rows", "columns"), "registers": ("images",)}  # of any length


def write_torch(backbone: Backbone, network: Network, dtype: str, file: Path) -> Reader:
    """A .pt2 file, which `torch.export.load(file).module()` runs: images (B, C, H, W) -> a dictionary of outputs."""
    extra = {"troodon.json": json.dumps(about(backbone, network, dtype))}
    torch.export.save(program(network, dtype), file, extra_files=extra)
    loaded = torch.export.load(file).module()

    def read(images_BCHW: Tensor) -> dict[str, Tensor]:
        return loaded(images_BCHW.to(DTYPES[dtype]))

    return Reader(f"torch {torch.__version__}", read, notes={"smallest": "an image of two by two patches"})


def write_onnx(backbone: Backbone, network: Network, dtype: str, file: Path) -> Reader:
    """An .onnx file, with weights beside it in FILE.data where they take more than 1.8 GB."""
    import onnxruntime

    with _quiet():
        graph = torch.onnx.export(program(network, dtype), (), input_names=["images"], output_names=network.outputs)
    assert graph is not None
    for value, axes in _axes(graph, network, backbone.config.patch):
        value.shape = type(value.shape)([*axes, *value.shape[len(axes) :]])
    described = about(backbone, network, dtype)
    graph.model.metadata_props.update({name: json.dumps(what) for name, what in described.items()})
    size = sum(p.numel() for p in network.vit.parameters()) * DTYPES[dtype].itemsize
    graph.save(file, external_data=size > INSIDE)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])

    def read(images_BCHW: Tensor) -> dict[str, Tensor]:
        outputs = session.run(network.outputs, {"images": images_BCHW.to(DTYPES[dtype]).numpy()})
        return {name: torch.from_numpy(output) for name, output in zip(network.outputs, outputs, strict=True)}

    return Reader(f"onnxruntime {version('onnxruntime')}", read, notes={"opset": graph.model.opset_imports[""]})


def write_openvino(backbone: Backbone, network: Network, dtype: str, file: Path) -> Reader:
    """An .xml file with its weights beside it, in a .bin file."""
    import openvino

    with _quiet():
        model = openvino.convert_model(program(network, "fp32"))
    for output, name in zip(model.outputs, network.outputs, strict=True):
        output.tensor.set_names({name})
    model.inputs[0].tensor.set_names({"images"})
    for name, what in about(backbone, network, dtype).items():
        model.set_rt_info(json.dumps(what), name)
    openvino.save_model(model, str(file), compress_to_fp16=dtype == "fp16")
    compiled = openvino.Core().compile_model(str(file), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

    def read(images_BCHW: Tensor) -> dict[str, Tensor]:
        outputs = compiled(images_BCHW.numpy())
        return {name: torch.from_numpy(outputs[name].copy()) for name in network.outputs}

    return Reader(f"openvino {version('openvino')}", read)


def about(backbone: Backbone, network: Network, dtype: str) -> dict[str, Any]:
    """What a file says of itself: how to prepare images, and which tokens each output has."""
    preprocessing, config = backbone.preprocessing, backbone.config
    norm = "after the last norm" if network.norm else "before any norm"
    return {
        "made_by": f"troodon {version()}",
        "backbone": {"name": backbone.name, "fingerprint": backbone.fingerprint},
        "preprocessing": preprocessing.as_dict(),
        "patch": config.patch,
        "dtype": dtype,
        "outputs": {
            "cls": "class token (B, D) after the last norm",
            "patches": "(B, rows, columns, D) after the last norm",
            "registers": "(B, R, D) after the last norm",
            **{
                f"block_{number}_{tokens}": f"{what} after block {number}, counted from 0, {norm}"
                for number in network.blocks
                for tokens, what in (("cls", "class token"), ("patches", "patches"))
            },
        },
    }


def _axes(graph: torch.onnx.ONNXProgram, network: Network, patch: int) -> Iterator[tuple[Any, list[Any]]]:
    """Inputs and outputs with names for their first axes, in place of numbered symbols."""
    (images,) = graph.model.graph.inputs
    yield images, ["images", network.vit.config.channels, f"{patch}*rows", f"{patch}*columns"]
    for output in graph.model.graph.outputs:
        yield output, list(AXES[str(output.name).rpartition("_")[2]])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the progress and the warnings of exporters, which tell users of Troodon nothing."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        log.setLevel(logging.ERROR)
        try:
            yield
        finally:
            log.setLevel(level)
