"""Exports: what other libraries read is the backbone, or nothing is left; and nothing of others is overwritten."""

import dataclasses
import http.server
import json
import shutil
import threading
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

import troodon
from tests.test_export_network import GATED, PLAIN, RELEASED, ROTARY, images, made
from troodon import cli
from troodon.config import UsageError
from troodon.export import graphs, names, release
from troodon.export.parity import ExportDiffers
from troodon.export.weights import create_model
from troodon.model.backbone import Backbone
from troodon.model.config import BASE, GIANT, LARGE, SMALL, Preprocessing

FOUR = dataclasses.replace(RELEASED, channels=4, registers=3)
EARTH = dataclasses.replace(ROTARY, channels=4)
WIDE = dataclasses.replace(GATED, mlp_width=88, registers=0, channels=3)
NETWORKS = {"plain": PLAIN, "released": RELEASED, "gated": GATED, "four": FOUR, "wide": WIDE}
ROTARIES = {"rotary": ROTARY, "gated rotary": dataclasses.replace(ROTARY, mlp="swiglu", mlp_width=96, registers=0)}
SIZES = ((1, 56, 56), (2, 28, 70), (3, 14, 14), (2, 84, 98), (5, 42, 28))
SUFFIXES = {"timm": ".safetensors", "original": ".pth", "torch": ".pt2", "onnx": ".onnx"}


@pytest.fixture
def transformers() -> Any:
    return pytest.importorskip("transformers", reason="needs transformers: pip install -e '.[dev]'")


def assert_close(got: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    assert got.shape == expected.shape
    assert (got - expected).norm() <= tolerance * expected.norm()


def exported(backbone: Backbone, to: str, folder: Path, **options: Any) -> tuple[Path, dict]:
    out = folder / f"M{SUFFIXES.get(to, '')}"
    report = troodon.export(backbone, to, out, **options)
    beside = (out if to == "huggingface" else folder) / "parity.json"
    assert json.loads(beside.read_text())["model.safetensors" if to == "huggingface" else out.name] == report
    assert not list(folder.glob("**/*.partial"))
    assert not list(folder.glob(".*"))
    return out, report


def whole(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("name", NETWORKS | ROTARIES)
def test_transformers_reads_a_folder(name, transformers, tmp_path):
    config = (NETWORKS | ROTARIES)[name]
    backbone = made(config)
    out, report = exported(backbone, "huggingface", tmp_path)
    model, registers = transformers.AutoModel.from_pretrained(str(out)).eval(), config.registers
    for size in SIZES:
        x_BCHW = images(config, size)
        f, tokens_BLD = backbone.features(x_BCHW), model(pixel_values=x_BCHW).last_hidden_state.detach()
        if config.position_antialias or size[1:] == (56, 56):  # elsewhere it resizes positions in its own way
            assert_close(tokens_BLD[:, 0], f.cls)
            assert_close(tokens_BLD[:, 1 : 1 + registers], f.registers)
            assert_close(tokens_BLD[:, 1 + registers :], f.patches.flatten(1, 2))
    others = {(row["height"], row["width"]): row["difference"] for row in report["other_rule"]}
    assert bool(others) != config.position_antialias
    assert (56, 56) not in others
    assert all(1e-4 < difference < 1 for difference in others.values())
    again = troodon.load(out)
    same = {"layer_scale": config.layer_scale} | ({"grid": config.grid} if name in ROTARIES else {})
    assert dataclasses.replace(again.config, **same) == config
    if config.channels != 4:  # which has no processor
        assert (again.preprocessing.resize, again.preprocessing.crop) == (64, 56)
    x_BCHW = images(config, (2, 28, 70))
    torch.testing.assert_close(again.features(x_BCHW).cls, backbone.features(x_BCHW).cls)


@pytest.mark.parametrize("name", ["plain", "gated"])
def test_its_processor_prepares_images_as_we_do(name, transformers, tmp_path):
    backbone = made(NETWORKS[name])
    out, report = exported(backbone, "huggingface", tmp_path)
    channels, random = backbone.channels, np.random.default_rng(0)
    values = random.integers(0, 255, (60, 80, channels), dtype=np.uint8).repeat(2, 0).repeat(2, 1)
    processor = transformers.AutoImageProcessor.from_pretrained(str(out))
    theirs = processor(values, return_tensors="pt")["pixel_values"]
    assert (theirs - backbone.prepare(values)).abs().max() * 0.2 * 255 <= 2
    (note,) = report["processor"]["notes"]
    assert "rounds the longer side down, to 96 pixels of 96.1" in note or "to 106 pixels of 106.7" in note


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"range": (0.0, 4095.0)}, "the range 0"), ({"crop": (56, 28)}, "56 x 28 is not square")],
)
def test_a_processor_that_would_be_wrong_is_left_out_with_the_reason(changes, said, transformers, tmp_path, capsys):
    backbone = made(PLAIN)
    backbone = dataclasses.replace(backbone, preprocessing=dataclasses.replace(backbone.preprocessing, **changes))
    backbone.save(tmp_path / "b")
    assert cli.run(["export", str(tmp_path / "b"), "--to", "huggingface", "--out", str(tmp_path / "F")]) == 0
    assert not (tmp_path / "F" / "preprocessor_config.json").exists()
    assert said in capsys.readouterr().out
    assert said in (tmp_path / "F" / "README.md").read_text()


def test_four_channels_and_an_mlp_that_transformers_lacks_are_refused_in_words(transformers, tmp_path):
    report = troodon.export(made(FOUR), "huggingface", tmp_path / "four")
    assert "4 channels" in report["without_processor"]
    odd = made(dataclasses.replace(GATED, mlp_width=100))
    with pytest.raises(UsageError, match="an MLP of 100 channels: transformers has those of a whole ratio"):
        troodon.export(odd, "huggingface", tmp_path / "odd")
    assert not (tmp_path / "odd").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["four"]


def test_periods_that_transformers_cannot_compute_are_said(transformers, tmp_path):
    backbone = made(ROTARY)
    backbone.vit.rope_embed.periods.copy_(backbone.vit.rope_embed.periods.bfloat16())
    _, report = exported(backbone, "huggingface", tmp_path)
    assert report["difference"] is None
    assert all(1e-5 < row["difference"] < 0.1 for row in report["other_rule"])
    assert "computes periods of rotary positions in fp32" in (tmp_path / "M" / "README.md").read_text()
    with pytest.raises(UsageError, match="--to timm: Troodon writes no rotary positions under its names; --to hugg"):
        troodon.export(backbone, "timm", tmp_path / "M.safetensors")


@pytest.mark.parametrize("name", NETWORKS)
def test_names_of_timm_and_of_released_weights_lead_back(name, tmp_path):
    config, backbone = NETWORKS[name], made(NETWORKS[name])
    out, report = exported(backbone, "timm", tmp_path)
    assert report["line"].startswith("timm.create_model('vit_")
    state = load_file(out)
    positions = 16 if config.registers else 17  # timm has none of the class token beside registers
    assert state["pos_embed"].shape == (1, positions, 64)
    again = names.from_timm(state, config)
    assert {n: t.shape for n, t in again.items()} == {n: t.shape for n, t in backbone.vit.state_dict().items()}
    loaded, x_BCHW = Backbone.from_state_dict(again, config, Preprocessing(), name="x"), images(config, (2, 28, 70))
    assert_close(loaded.features(x_BCHW).patches, backbone.features(x_BCHW).patches)

    out, report = exported(backbone, "original", tmp_path)
    state = torch.load(out, weights_only=True)
    assert all(torch.equal(tensor, state[name]) for name, tensor in backbone.vit.state_dict().items())
    assert report["arguments"]["interpolate_offset"] == config.position_offset
    assert ("rule" in report) == (config.position_antialias != bool(config.registers))
    assert set(json.loads((tmp_path / "parity.json").read_text())) == {"M.safetensors", "M.pth"}


def test_released_sizes_need_no_options_of_timm():
    sizes = {"small": SMALL, "base": BASE, "large": LARGE, "giant": GIANT}
    for size, config in sizes.items():
        plain = {"img_size": 518, "dynamic_img_size": True}
        assert create_model(config) == (f"vit_{size}_patch14_dinov2", plain)
        four = dataclasses.replace(config, registers=4)
        assert create_model(four) == (f"vit_{size}_patch14_reg4_dinov2", plain)
    other = dataclasses.replace(SMALL, patch=16, grid=14, heads=12, registers=1, channels=2)
    expected = {"img_size": 224, "patch_size": 16, "num_heads": 12, "in_chans": 2, "reg_tokens": 1}
    assert create_model(other)[1] == {"dynamic_img_size": True} | expected
    assert create_model(dataclasses.replace(GIANT, dim=384, heads=6))[1]["embed_dim"] == 384


@pytest.mark.parametrize("name", NETWORKS)
def test_timm_loads_the_file_strictly(name, tmp_path):
    try:
        timm = import_module("timm")
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"needs timm with a torchvision that imports, which are in no extra: {error}")
    backbone = made(NETWORKS[name])
    out, report = exported(backbone, "timm", tmp_path)
    assert report["reader"].startswith("timm ")
    model = eval(report["line"]).eval()
    model.load_state_dict(load_file(out), strict=True)
    x_BCHW = images(NETWORKS[name], (2, 56, 56))
    assert_close(model.forward_features(x_BCHW)[:, 0].detach(), backbone.features(x_BCHW).cls)
    assert timm.__version__ in report["reader"]


@pytest.mark.parametrize(
    ("config", "options", "tolerance"),
    [(PLAIN, {"blocks": (0,), "norm": False}, 1e-4), (GATED, {"blocks": (0,)}, 1e-4), (EARTH, {"dtype": "fp16"}, 2e-2)],
)
def test_one_onnx_file_serves_all_sizes(config, options, tolerance, tmp_path, monkeypatch):
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs onnxruntime: pip install -e '.[dev]'")
    backbone = made(config)
    if config == GATED:
        monkeypatch.setattr(graphs, "INSIDE", 1000)  # as large weights are
    out, report = exported(backbone, "onnx", tmp_path, **options)
    assert set(report["files"]) == {"M.onnx", *(["M.onnx.data"] if config == GATED else [])}
    session = onnxruntime.InferenceSession(out, providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    assert (given.name, given.shape) == ("images", ["images", config.channels, "14*rows", "14*columns"])
    shapes = {output.name: output.shape for output in session.get_outputs()}
    assert shapes["patches"] == ["images", "rows", "columns", 64]
    assert shapes["registers"] == ["images", config.registers, 64]
    about = {name: json.loads(text) for name, text in session.get_modelmeta().custom_metadata_map.items()}
    assert about["preprocessing"]["crop"] == 56
    assert list(about["outputs"]) == list(shapes) == list(report["outputs"])
    dtype = np.float16 if options.get("dtype") == "fp16" else np.float32
    for size in SIZES:
        x_BCHW = images(config, size)
        got = dict(zip(shapes, session.run(None, {"images": x_BCHW.numpy().astype(dtype)}), strict=True))
        f, theirs = backbone.features(x_BCHW), {n: torch.from_numpy(v).float() for n, v in got.items()}
        expected = {"cls": f.cls, "patches": f.patches, "registers": f.registers}
        for number in options.get("blocks", ()):
            (tokens,) = backbone.vit.after_blocks([x_BCHW], [number], norm=options.get("norm", True))[0]
            expected[f"block_{number}_cls"] = tokens.cls_BD
            expected[f"block_{number}_patches"] = tokens.patches_BPD.unflatten(1, f.patches.shape[1:3])
        assert theirs.keys() == expected.keys()
        for output, value in expected.items():
            assert_close(theirs[output], value, tolerance)
    norm = "after the last norm" if options.get("norm", True) else "before any norm"
    assert all(norm in what for output, what in report["outputs"].items() if output.startswith("block_"))


def test_a_graph_of_torch_serves_all_sizes(tmp_path):
    backbone = made(GATED)
    out, _ = exported(backbone, "torch", tmp_path, blocks=[0])
    network = torch.export.load(out).module()
    for size in SIZES[:2] + SIZES[3:]:
        x_BCHW = images(GATED, size)
        got, f = network(x_BCHW), backbone.features(x_BCHW)
        for output, value in (("cls", f.cls), ("patches", f.patches), ("registers", f.registers)):
            assert_close(got[output], value)
        assert_close(got["block_0_cls"], f.cls)


def test_openvino_reads_its_export(tmp_path):
    pytest.importorskip("openvino", reason="needs openvino, which is in no extra")
    troodon.export(made(GATED), "openvino", tmp_path / "M.xml")
    assert {p.name for p in tmp_path.iterdir()} == {"M.xml", "M.bin", "parity.json"}


@pytest.mark.parametrize(("to", "function"), [("huggingface", "hugging_face"), ("timm", "timm")])
def test_an_export_that_differs_leaves_nothing(to, function, transformers, tmp_path, monkeypatch):
    right = getattr(names, function)

    def wrong(state: dict[str, Tensor]) -> dict[str, Tensor]:
        renamed = right(state)
        name = next(n for n in renamed if n.endswith("norm1.bias"))
        return renamed | {name: renamed[name] + 0.01}

    exported(made(PLAIN), to, tmp_path)
    before = whole(tmp_path)
    monkeypatch.setattr(names, function, wrong)
    for out in (f"M{SUFFIXES.get(to, '')}", f"new{SUFFIXES.get(to, '')}"):
        with pytest.raises(ExportDiffers, match=r"cls differs by .* of its length at 1 x 56 x 56; at most 0\.0001"):
            troodon.export(made(PLAIN), to, tmp_path / out)
    assert whole(tmp_path) == before
    assert len(list(tmp_path.iterdir())) == (1 if to == "huggingface" else 2)


@pytest.mark.parametrize("to", ["huggingface", "original"])
def test_an_export_replaces_an_export_and_nothing_else(to, transformers, tmp_path):
    out, first = exported(made(PLAIN), to, tmp_path)
    _, second = exported(made(RELEASED), to, tmp_path)
    assert first["backbone"] != second["backbone"]
    if to == "original":
        out.write_bytes(b"something of the user's")
    else:
        (out / "notes.txt").write_text("something of the user's")
    before = whole(tmp_path)
    with pytest.raises(UsageError, match=r"also holds notes\.txt|has changed since it was exported"):
        troodon.export(made(PLAIN), to, out)
    assert whole(tmp_path) == before


@pytest.mark.parametrize(
    ("to", "out", "said"),
    [
        ("huggingface", "mine", "mine: is there and not a huggingface export"),
        ("original", "mine", "mine: is a folder; give a file"),
        ("original", "x.pth", "x.pth: is there and not an export to original"),
        ("timm", "x.pth", "an export to timm is a .safetensors file, such as .*x.safetensors"),
        ("original", "mine/new.pth", "parity.json: is there and not what exports write"),
        ("tim", "new", "unknown format 'tim': did you mean 'timm'"),
    ],
)
def test_what_is_not_an_export_is_not_touched(to, out, said, transformers, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "parity.json").write_text('{"a": 1}')
    (tmp_path / "x.pth").write_text("weights")
    before = whole(tmp_path)
    with pytest.raises(UsageError, match=said):
        troodon.export(made(PLAIN), to, tmp_path / out)
    assert whole(tmp_path) == before


@pytest.mark.parametrize(
    ("to", "options", "said"),
    [
        ("timm", {"blocks": [1]}, "blocks: weights for timm are all blocks"),
        ("original", {"dtype": "fp16"}, "dtype fp16: weights for original"),
        ("onnx", {"dtype": "fp61"}, "unknown dtype 'fp61': did you mean 'fp16'"),
        ("torch", {"blocks": [1, 9]}, "block 9: this network has the blocks 0 to 1; -1 is the last"),
        ("onnx", {"licence": "CC0"}, "licence: for a model card on the hub"),
        ("huggingface", {"push": "first"}, "push 'first': give the owner and the name, such as me/first"),
        ("huggingface", {"scores": ["here"]}, "here: no scores; --scores takes"),
    ],
)
def test_options_that_a_format_cannot_follow_are_refused(to, options, said, transformers, tmp_path):
    with pytest.raises(UsageError, match=said):
        troodon.export(made(PLAIN), to, tmp_path / f"M{SUFFIXES.get(to, '')}", **options)
    assert not list(tmp_path.iterdir())


def test_a_network_in_training_is_exported_as_it_is_and_stays_as_it_is(transformers, tmp_path):
    backbone = made(dataclasses.replace(PLAIN, drop_path=0.5))
    x_BCHW = images(PLAIN, (2, 56, 56))
    expected = backbone.features(x_BCHW).cls
    backbone.vit.train().requires_grad_(True).bfloat16()
    out, _ = exported(backbone, "huggingface", tmp_path)
    assert backbone.vit.training
    assert all(p.requires_grad and p.dtype == torch.bfloat16 for p in backbone.vit.parameters())
    assert_close(troodon.load(out).features(x_BCHW).cls, expected, 2e-2)


def test_a_library_that_is_missing_is_named_before_anything_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(release, "find_spec", lambda name: None if name in ("onnxscript", "transformers") else name)
    with pytest.raises(UsageError, match=r'needs onnxscript to read its export back: pip install "troodon\[export\]"'):
        troodon.export(tmp_path / "no such backbone", "onnx", tmp_path / "M.onnx")
    with pytest.raises(UsageError, match="needs transformers to read its export back: pip install transformers"):
        troodon.export(tmp_path / "no such backbone", "huggingface", tmp_path / "F")


FILES = {"README.md", "config.json", "model.safetensors", "parity.json", "preprocessor_config.json"}


class Api:
    """In place of the hub's."""

    endpoint = "http://127.0.0.1"

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict]] = []

    def create_repo(self, name: str, **options: Any) -> None:
        self.calls.append((name, options))

    def upload_folder(self, **options: Any) -> str:
        left = {p.name for p in Path(options["folder_path"]).iterdir()} - set(options["ignore_patterns"])
        self.calls.append(("upload", options | {"left": left}))
        return "http://127.0.0.1/me/first"


def test_only_push_uploads_and_says_what(transformers, tmp_path, capsys):
    api = Api()
    troodon.export(made(PLAIN), "huggingface", tmp_path / "F", api=api)
    assert not api.calls
    report = troodon.export(made(PLAIN), "huggingface", tmp_path / "F", push="me/first", api=api)
    assert report["pushed"] == "http://127.0.0.1/me/first"
    (name, made_with), (_, uploaded) = api.calls
    assert (name, made_with["private"], uploaded["repo_id"]) == ("me/first", True, "me/first")
    assert uploaded["left"] == FILES  # not manifest.json, which names paths of this machine
    said = capsys.readouterr().err
    assert "uploads to http://127.0.0.1, as me/first (private if it is new): README.md (" in said
    assert "model.safetensors (" in said

    def refuses(**options: Any) -> None:
        raise OSError("401: no token")

    api.upload_folder = refuses
    with pytest.raises(RuntimeError, match="F is complete, but was not uploaded to me/first: 401: no token"):
        troodon.export(made(PLAIN), "huggingface", tmp_path / "F", push="me/first", api=api)
    assert (tmp_path / "F" / "model.safetensors").exists()


class Hub(http.server.BaseHTTPRequestHandler):
    """A hub on this machine that keeps what it is sent."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.requests.append((self.path, body))  # pyrefly: ignore[missing-attribute]
        answer: dict = {
            "url": "http://127.0.0.1/me/first",
            "commitUrl": "http://127.0.0.1/me/first/commit/1",
            "commitOid": "1",
        }
        if "preupload" in self.path:
            paths = [file["path"] for file in json.loads(body)["files"]]
            answer = {"files": [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in paths]}
        self.do_GET(answer)

    def do_GET(self, answer: dict | None = None) -> None:
        data = json.dumps(answer or {"id": "me/first", "sha": "0"}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


def test_the_client_of_the_hub_sends_the_folder(transformers, tmp_path):
    hub = import_module("huggingface_hub")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        server.requests = []  # pyrefly: ignore[missing-attribute]
        threading.Thread(target=server.serve_forever, daemon=True).start()
        api = hub.HfApi(endpoint=f"http://127.0.0.1:{server.server_port}", token="none")
        report = troodon.export(made(PLAIN), "huggingface", tmp_path / "F", push="me/first", api=api)
        server.shutdown()
    assert report["pushed"] == "http://127.0.0.1/me/first/commit/1"
    (_, created), *_, (path, sent) = server.requests
    assert json.loads(created)["name"] == "first"
    assert path == "/api/models/me/first/commit/main"
    assert {json.loads(line)["value"].get("path") for line in sent.splitlines()} == FILES | {None}


def test_from_images_to_transformers(transformers, tmp_path, capsys):
    random = np.random.default_rng(0)
    for i in range(16):
        folder = tmp_path / "photos" / ("train" if i < 12 else "val") / ("dark" if i % 2 else "light")
        folder.mkdir(parents=True, exist_ok=True)
        level = 40 if i % 2 else 200
        pixels = np.clip(level + random.normal(0, 20, (24, 30, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    tiny = ["--vit.dim", "32", "--vit.depth", "1", "--vit.heads", "2", "--vit.patch", "4", "--vit.grid", "4",
            "--crops.global-px", "16", "--crops.local-px", "8", "--crops.locals", "2", "--dino-head.prototypes", "32",
            "--dino-head.hidden", "16", "--batch", "8", "--steps", "2"]  # fmt: skip
    here = {name: str(tmp_path / name) for name in ("photos", "selection", "first", "run", "scores", "F")}

    def run(*words: str) -> str:
        assert cli.run(list(words)) == 0
        return capsys.readouterr().out

    run("pretrain", "small_dino", "--data", here["photos"], "--out", here["first"], *tiny)
    run("curate", "curate_small", "--uncurated", f"{here['photos']}/train", "--gather", "all", "--backbone",
        here["first"], "--out", here["selection"])  # fmt: skip
    run("pretrain", "small_dino", "--data", here["selection"], "--out", here["run"], *tiny, "--init", here["first"])
    run("evaluate", "mine", "--backbone", here["run"], "--data", here["photos"], "--out", here["scores"],
        "--protocols", "knn", "--ks", "3")  # fmt: skip
    printed = run("export", here["run"], "--to", "huggingface", "--out", here["F"], "--scores", here["scores"],
                  "--licence", "CC-BY 4.0 *", "--json")  # fmt: skip
    report = json.loads(printed)
    assert report["reader"] == f"transformers {transformers.__version__}"
    assert report["difference"] <= report["tolerance"]
    shutil.rmtree(here["run"])

    model = transformers.AutoModel.from_pretrained(here["F"]).eval()
    processor = transformers.AutoImageProcessor.from_pretrained(here["F"])
    picture = Image.open(tmp_path / "photos" / "val" / "dark" / "13.png")
    cls_BD = model(**processor(picture, return_tensors="pt")).last_hidden_state[:, 0].detach()
    assert_close(cls_BD, troodon.load(here["F"]).features([picture]).cls, 2e-2)

    page = (tmp_path / "F" / "README.md").read_text()
    score = json.loads((tmp_path / "scores" / "scores.json").read_text())[0]
    licence = "told by who exported this: CC-BY 4.0 \\*."
    story = (
        "# run",
        "2 steps of 8 images",
        "started from the backbone",
        "12 images.",
        "A selection (`",
        "| duplicate |",
    )
    for part in (*story, licence, f"`{score['fingerprint']}`"):
        assert part in page, part
    assert str(tmp_path) not in page
