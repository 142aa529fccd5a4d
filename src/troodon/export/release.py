"""A backbone in the format of others: written, read back by the library it is for, compared, and only then kept."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, get_args

from troodon.config import UsageError, nearest
from troodon.export import graphs, huggingface, weights
from troodon.export.card import Origin, card
from troodon.export.network import DTYPES, Network
from troodon.export.parity import TOLERANCE, Reader, compare, summary
from troodon.export.place import check_file, put_file, put_folder
from troodon.model.backbone import Backbone
from troodon.run import say, version, write_bytes

Format = Literal["huggingface", "timm", "original", "onnx", "torch", "openvino"]
SUFFIXES = {"timm": ".safetensors", "original": ".pth", "onnx": ".onnx", "torch": ".pt2", "openvino": ".xml"}
GRAPHS = {"onnx": graphs.write_onnx, "torch": graphs.write_torch, "openvino": graphs.write_openvino}
# Packages that read an export back, without which there is no proof, and how to install them.
NEEDS = {
    "huggingface": (("transformers",), "pip install transformers"),
    "onnx": (("onnx", "onnxscript", "onnxruntime"), 'pip install "troodon[export]"'),
    "openvino": (("openvino",), "pip install openvino"),
}


def check(to: str, out: Path, dtype: str, blocks: Sequence[int]) -> None:
    """UsageError for what cannot be exported, whatever the backbone: before it is loaded."""
    if to not in get_args(Format):
        raise nearest("format", to, get_args(Format))
    if dtype not in DTYPES:
        raise nearest("dtype", dtype, DTYPES)
    if to not in GRAPHS and (dtype != "fp32" or blocks):
        option = "blocks" if blocks else f"dtype {dtype}"
        raise UsageError(f"{option}: weights for {to} are all blocks, in fp32; --to {', '.join(GRAPHS)} take this")
    packages, remedy = NEEDS.get(to, ((), ""))
    if missing := [package for package in packages if find_spec(package) is None]:
        raise UsageError(f"--to {to} needs {', '.join(missing)} to read its export back: {remedy}")
    if to not in SUFFIXES:
        return
    if out.suffix != SUFFIXES[to] and not out.is_dir():
        raise UsageError(f"{out}: an export to {to} is a {SUFFIXES[to]} file, such as {out.with_suffix(SUFFIXES[to])}")
    check_file(out, to)


def release(
    backbone: Backbone,
    to: Format,
    out: Path,
    *,
    origin: Origin,
    dtype: str = "fp32",
    blocks: Sequence[int] = (),
    norm: bool = True,
) -> dict:
    """Write the export, whole and proven or not at all, with parity.json beside it. Returns that report.

    ExportDiffers if what is read back is not the backbone; UsageError for what the format cannot hold, and where
    something else than such an export is at `out`.
    """
    check(to, out, dtype, blocks)
    if backbone.config.positions == "rope" and to in ("timm", "original"):
        others = ", ".join(("huggingface", *GRAPHS))
        raise UsageError(f"--to {to}: Troodon writes no rotary positions under its names; --to {others} have them")
    if backbone.config.stem != "linear" and to not in GRAPHS:
        raise UsageError(f"--to {to}: its networks have no convolutional stem; --to {', '.join(GRAPHS)} have it")
    blocks = backbone.block_numbers(list(blocks))
    backbone = _as_saved(backbone)
    network = Network(backbone.vit, blocks, norm).eval()

    def write(place: Path) -> dict:
        if to == "huggingface":
            report = _report(backbone, network, to, huggingface.write(backbone, place), dtype)
            write_bytes(place / "README.md", card(backbone, origin, report).encode())
            return report
        if to in GRAPHS:
            reader = GRAPHS[to](backbone, network, dtype, place)
        else:
            reader = (weights.write_timm if to == "timm" else weights.write_original)(backbone, place)
        return _report(backbone, network, to, reader, dtype)

    say(f"export: writes {backbone.name} for {to}, and reads it back: {out}")
    if to == "huggingface":
        return put_folder(out, to, backbone.fingerprint, write)
    return put_file(out, to, write)


def _as_saved(backbone: Backbone) -> Backbone:
    """The same weights in fp32 on the CPU, in a network of their own: the given one may be in training."""
    state = {name: tensor.detach().cpu().float() for name, tensor in backbone.vit.state_dict().items()}
    return Backbone.from_state_dict(
        state, backbone.config, backbone.preprocessing, name=backbone.name, digest=backbone.fingerprint
    )


def _report(backbone: Backbone, network: Network, to: str, reader: Reader, dtype: str) -> dict:
    """What parity.json says of an export."""
    rows = compare(network, reader, backbone.preprocessing, TOLERANCE[dtype])
    described = graphs.about(backbone, network, dtype)
    outputs = {name: what for name, what in described["outputs"].items() if name in {row["output"] for row in rows}}
    return {
        "to": to,
        "backbone": described["backbone"],
        "preprocessing": described["preprocessing"],
        "troodon": version(),
        "reader": reader.name,
        "dtype": dtype,
        "tolerance": TOLERANCE[dtype],
        "outputs": outputs,
        **summary(rows),
        **reader.notes,
        "rows": rows,
    }
