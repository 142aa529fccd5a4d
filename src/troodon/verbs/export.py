"""The verb `export`: a backbone for other libraries."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tyro.conf import Positional

from troodon.config import UsageError
from troodon.verbs.common import as_backbone

if TYPE_CHECKING:
    from troodon.model.backbone import Backbone


def export(
    backbone: "str | Path | Backbone",
    to: str,
    out: str | Path,
    *,
    dtype: str = "fp32",
    blocks: Sequence[int] = (),
    norm: bool = True,
    scores: Sequence[str | Path] = (),
    licence: str | None = None,
    push: str | None = None,
    api: Any = None,
) -> dict:
    """Write a backbone for another library, which reads it back and must give the same tokens; else nothing is kept.

    `to` is "huggingface", a folder for transformers with a model card; "timm" or "original", a file of weights; "onnx",
    "torch" or "openvino", a graph for any number of images of any size that patches divide, in `dtype` "fp32" or
    "fp16". `blocks`, numbered from 0, are further outputs of a graph: through the last norm, or as they are. `scores`
    are folders of `evaluate` for the card, and `licence` is that of the data. `push` uploads the folder to a repository
    OWNER/NAME of the hub, by `api`, a `huggingface_hub.HfApi`. Returns the report, which parity.json beside `out` holds
    too. UsageError for what the format cannot hold, and where `out` is something else.
    """
    from troodon.export.card import origin_of
    from troodon.export.push import check_name
    from troodon.export.push import push as upload
    from troodon.export.release import check, release

    if to != "huggingface" and (
        given := [n for n, v in (("scores", scores), ("licence", licence), ("push", push)) if v]
    ):
        raise UsageError(f"{given[0]}: for a model card on the hub, and so for --to huggingface alone")
    if push:
        check_name(push)
    out = Path(out)
    check(to, out, dtype, blocks)
    origin = origin_of(backbone, scores, licence)
    report = release(as_backbone(backbone), to, out, origin=origin, dtype=dtype, blocks=blocks, norm=norm)  # pyrefly: ignore
    return report | ({"pushed": upload(out, push, api)} if push else {})


@dataclass(frozen=True)
class Export:
    """A backbone for transformers, timm, ONNX and others; each export is read back and compared."""

    backbone: Positional[str]
    """A run, a backbone folder, weights in any file, or a name such as dinov2_vits14."""
    to: Literal["huggingface", "timm", "original", "onnx", "torch", "openvino"]
    """The library or format: huggingface is a folder for transformers; timm and original are weights; onnx, torch
    (.pt2) and openvino are graphs for any number of images of any size."""
    out: str
    """A new folder for huggingface; a new file for all others."""
    dtype: Literal["fp32", "fp16"] = "fp32"
    """Of a graph: its weights, images and outputs."""
    blocks: tuple[int, ...] = ()
    """Blocks of which a graph also gives the tokens, numbered from 0, such as 2 5 8 11."""
    norm: bool = True
    """Whether the tokens of --blocks go through the last norm."""
    scores: tuple[str, ...] = ()
    """Folders of scores for the model card."""
    licence: str | None = None
    """Licence of the data, for the model card."""
    push: str | None = None
    """Upload the folder to this repository of the Hugging Face hub, OWNER/NAME. Nothing is uploaded without it."""
    json: bool = False
    """Print the report as JSON."""

    def run(self) -> None:
        names = ("dtype", "blocks", "norm", "scores", "licence", "push")
        report = export(self.backbone, self.to, self.out, **{name: getattr(self, name) for name in names})
        if self.json:
            print(json.dumps(report, indent=1))
            return
        print("\n".join([*_lines(report), f"{'report':<11} {_parity(self)}", self.out]))


def _lines(report: dict) -> list[str]:
    """What a user should know of an export."""
    lines = [f"{report['reader']} read it back: {report['result']}"]
    lines += [
        f"at {row['height']} x {row['width']} pixels by up to {row['difference']:.1e}: {row['rule']}"
        for row in report["other_rule"]
    ]
    lines += (
        [f"without preprocessor_config.json: {report['without_processor']}"] if "without_processor" in report else []
    )
    lines += report.get("processor", {}).get("notes", [])
    lines += [report[name] for name in ("not_by_timm", "line", "rule") if name in report]
    if "arguments" in report:
        lines.append("arguments for the reference's DinoVisionTransformer: " + json.dumps(report["arguments"]))
    lines += [f"uploaded: {report['pushed']}"] if "pushed" in report else []
    return lines


def _parity(command: Export) -> Path:
    out = Path(command.out)
    return (out if command.to == "huggingface" else out.parent) / "parity.json"
