"""Compare with numbers of the reference implementation: `python -m tests.parity FILE.npz ...`

Reads both kinds of golden files: `forward` (outputs of a network at several sizes) and `step` (three
training steps: loss terms, gradients, parameter factors, weights of student and average). Every setting
comes from the file. Prints a line per quantity with its error and tolerance; exits 0 only if all hold.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from troodon.learn import optim
from troodon.learn.config import ObjectiveConfig, OptimConfig
from troodon.learn.method import Method
from troodon.learn.network import Network
from troodon.learn.schedules import ScheduledValues
from troodon.model.config import HeadConfig, ViTConfig
from troodon.model.vit import ViT
from troodon.model.weights import config_from_weights
from troodon.views.batch import Batch


class Line(NamedTuple):
    quantity: str
    error: float
    tolerance: float

    @property
    def holds(self) -> bool:
        return self.error <= self.tolerance  # False for NaN


def compare(path: Path) -> Iterator[Line]:
    """Every quantity of one golden file. Raises ValueError for a file of neither kind."""
    with np.load(path) as file:
        golden = {name: file[name] for name in file.files}
    if "config" in golden:
        yield from _step(golden)
    elif any("/out/" in name for name in golden):
        for network in sorted({name.split("/")[0] for name in golden}):
            yield from _forward(network, _under(golden, f"{network}/"))
    else:
        raise ValueError(f"{path}: neither a forward nor a step golden file")


def _forward(network: str, golden: dict[str, np.ndarray]) -> Iterator[Line]:
    state, inputs = _tensors(_under(golden, "state/")), _tensors(_under(golden, "in/"))
    size = next(iter(inputs))
    # Everything but the number of heads can be read off the weights: a wrong number is far off, so the best is right.
    networks = [_network(state, heads) for heads in range(1, 33) if state["cls_token"].shape[-1] % heads == 0]
    expected = golden[f"out/{size}/x_norm_clstoken"]
    vit = min(networks, key=lambda net: _largest(net([inputs[size]])[0].cls_BD, expected))
    names = {"x_norm_clstoken": "cls_BD", "x_norm_patchtokens": "patches_BPD", "x_norm_regtokens": "registers_BRD"}
    for size, images in inputs.items():
        (tokens,) = vit([images])
        for theirs, ours in names.items():
            got = getattr(tokens, ours)
            if got.numel():
                yield Line(f"{network} {size} {theirs}", _largest(got, golden[f"out/{size}/{theirs}"]), 1e-5)
    if "inter/in" in golden:
        count = len({name.split("/")[1] for name in golden if name.startswith("inter/")}) - 1
        images = torch.from_numpy(golden["inter/in"])
        side = images.shape[-1] // vit.config.patch
        for i, (tokens,) in enumerate(vit.after_blocks([images], range(vit.config.depth - count, vit.config.depth))):
            patch_BDhw = tokens.patches_BPD.transpose(1, 2).unflatten(2, (-1, side))
            yield Line(f"{network} last blocks {i} patch", _largest(patch_BDhw, golden[f"inter/{i}/patch"]), 1e-5)
            yield Line(f"{network} last blocks {i} cls", _largest(tokens.cls_BD, golden[f"inter/{i}/cls"]), 1e-5)


def _network(state: dict[str, Tensor], heads: int) -> ViT:
    vit = ViT(config_from_weights(state, heads=heads)).eval()
    vit.load_state_dict(state)
    return vit


def _step(golden: dict[str, np.ndarray]) -> Iterator[Line]:
    c = json.loads(str(golden["config"]))
    method = _method(c)
    method.student.load_state_dict(_tensors(_under(golden, "student/")))
    method.ema.load_state_dict(_tensors(_under(golden, "teacher/")))
    config = OptimConfig(
        betas=tuple(c["betas"]),
        clip=c["clip_per_subnetwork"],
        layer_decay=c["layer_decay"],
        patch_embed=c["patch_embed_factor"],
    )
    optimizer = optim.adamw(method.student, c["depth"], config)

    theirs = {_name(str(n)): i for i, n in enumerate(golden["groups/name"])}
    ours = {name: optim.factors(name, c["depth"], config) for name, _ in method.student.named_parameters()}
    yield Line("parameters without a counterpart", len(ours.keys() ^ theirs.keys()), 0)
    for column, kind in enumerate(("lr", "wd", "last")):
        values = golden[f"groups/{kind}"].astype(float)
        error = max(abs(ours[n][column] - values[i]) for n, i in theirs.items() if n in ours)
        yield Line(f"factors of parameters: {kind}", error, 1e-9)

    batch = _batch(golden, c)
    scheduled = ScheduledValues(c["lr"], c["lr"], c["weight_decay"], c["momentum"], c["teacher_temperature"])
    for step in range(c["steps"]):
        optim.apply(optimizer, scheduled)
        (targets,) = method.targets([batch], scheduled)
        terms = method.losses(batch, targets)
        for name, value in _under(golden, f"loss/{step}/").items():
            got = terms[name].item() if name in terms else 0.0
            yield Line(f"step {step} loss {name}", abs(got - float(value)) / max(abs(float(value)), 1e-12), 1e-5)
        torch.stack([*terms.values()]).sum().backward()
        if step == 0:
            gradients = {name: p.grad for name, p in method.student.named_parameters()}
            yield from _tensorwise("gradient", _under(golden, "grad/"), gradients, 1e-5)
        optim.clip(method.student, config)
        optimizer.step()
        optimizer.zero_grad()
        method.after_step(scheduled)
    yield from _tensorwise("student after", _under(golden, "student_after/"), method.student.state_dict(), 1e-3)
    yield from _tensorwise("average after", _under(golden, "teacher_after/"), method.ema.state_dict(), 1e-4)


def _method(c: dict) -> Method:
    keys = ("dim", "depth", "heads", "patch", "grid", "registers", "position_offset", "position_antialias")
    vit = ViTConfig(**{k: c[k] for k in keys}, mlp="swiglu" if c["mlp"].startswith("swiglu") else "gelu")
    head = HeadConfig(c["prototypes"], c["head_hidden"], c["head_bottleneck"], c["head_layers"])
    objective = ObjectiveConfig(
        targets="sinkhorn" if c["targets"].startswith("sinkhorn") else "centring",
        heads="separate" if c["separate_heads"] else "shared",
        student_temperature=c["student_temperature"],
        terms=tuple((name, c[f"{name}_weight"]) for name in ("dino", "ibot", "koleo") if c[f"{name}_weight"]),
        centre_momentum=c["center_momentum"],
    )
    patches = head if c["separate_heads"] and c["ibot_weight"] else None
    student, average = (Network(vit, head, patches) for _ in range(2))
    return Method(objective, student, average)


def _batch(golden: dict[str, np.ndarray], c: dict) -> Batch:
    crops = _tensors(_under(golden, "batch/collated_"))
    empty = torch.zeros(0, c["images"], 3, c["local_px"], c["local_px"])
    return Batch(
        crops["global_crops"].unflatten(0, (c["global_crops"], c["images"])),
        crops["local_crops"].unflatten(0, (c["local_crops"], c["images"])) if c["local_crops"] else empty,
        crops["masks"],
    )


def _tensorwise(what: str, theirs: dict[str, np.ndarray], ours: dict[str, Tensor], tolerance: float) -> Iterator[Line]:
    """One line for the worst tensor: the norm of the difference over the norm."""
    missing = theirs.keys() ^ {n for n in ours if n in theirs or ours[n] is not None}
    yield Line(f"{what}: tensors without a counterpart", len(missing), 0)
    errors = {}
    for name, value in theirs.items():
        difference = np.linalg.norm(ours[name].detach().numpy() - value)
        errors[name] = float(difference / max(np.linalg.norm(value), 1e-12)) if difference else 0.0
    worst = max(errors, key=lambda n: errors[n])
    yield Line(f"{what}: worst of {len(errors)} tensors, {worst}", errors[worst], tolerance)


def _name(name: str) -> str:
    """Our name of a parameter: a head of one layer is a list of one here."""
    return name.replace("_head.mlp.weight", "_head.mlp.0.weight").replace("_head.mlp.bias", "_head.mlp.0.bias")


def _under(golden: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {_name(name[len(prefix) :]): value for name, value in golden.items() if name.startswith(prefix)}


def _tensors(arrays: dict[str, np.ndarray]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(value) for name, value in arrays.items()}


def _largest(ours: Tensor, theirs: np.ndarray) -> float:
    return float((ours.detach() - torch.from_numpy(theirs)).abs().max()) if ours.shape == theirs.shape else float("inf")


def main(paths: list[str]) -> int:
    if not paths:
        print("usage: python -m tests.parity FILE.npz ...", file=sys.stderr)
        return 2
    lines = []
    for path in paths:
        print(path)
        for line in compare(Path(path)):
            print(f"  {'ok  ' if line.holds else 'FAIL'} {line.quantity:<72} {line.error:9.2e} <= {line.tolerance:.0e}")
            lines.append(line)
    failed = sum(not line.holds for line in lines)
    print(f"{len(lines) - failed} hold, {failed} fail")
    return 1 if failed or not lines else 0


if __name__ == "__main__":
    torch.manual_seed(0)
    sys.exit(main(sys.argv[1:]))
