"""Weights by name: from a local folder, or once from a hub, here one on this machine with small files."""

import hashlib
import json
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import troodon
from tests.test_weights import RELEASED as RULE
from tests.test_weights import TINY, network, state_of
from troodon import cli
from troodon.config import UsageError
from troodon.model.hub import RELEASED

SHA = "0123456789abcdef0123456789abcdef01234567"
X = torch.randn(1, 3, 28, 56, generator=torch.Generator().manual_seed(0))


class Hub:
    """A hub on this machine: repositories as dictionaries of files, and what was asked of it."""

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {}
        self.asked: list[str] = []
        self.ranges: list[str] = []
        self.gated: set[str] = set()
        self.breaks = False  # ends one connection within a file
        self.lies = False  # tells other hashes than those of its files
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None: ...

            def do_HEAD(self) -> None:
                self.answer(False)

            def do_GET(self) -> None:
                self.answer(True)

            def answer(self, with_body: bool) -> None:
                hub.asked.append(f"{self.command} {self.path}")
                parts = self.path.partition("?")[0].strip("/").split("/")
                if parts[:2] == ["api", "models"]:
                    return self.send(*hub.info("/".join(parts[2:4])), with_body)
                repository, file = "/".join(parts[:2]), "/".join(parts[4:])
                data = hub.files.get(repository, {}).get(file)
                if data is None:
                    return self.send(404, b"", {"X-Error-Code": "EntryNotFound"}, with_body)
                headers = {"X-Repo-Commit": SHA, "ETag": f'"{hashlib.sha256(data).hexdigest()}"'}
                if text := self.headers.get("Range"):
                    hub.ranges.append(text)
                    start = int(text.removeprefix("bytes=").partition("-")[0])
                    headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
                    return self.send(206, data[start:], headers, with_body)
                self.send(200, data, headers, with_body)

            def send(self, status: int, data: bytes, headers: dict[str, str], with_body: bool) -> None:
                self.send_response(status)
                for name, value in (headers | {"Content-Length": str(len(data))}).items():
                    self.send_header(name, value)
                self.end_headers()
                if with_body and hub.breaks and len(data) > 100_000:
                    hub.breaks, self.close_connection = False, True
                    self.wfile.write(data[:50_000])
                elif with_body:
                    self.wfile.write(data)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def digest(self, data: bytes) -> str:
        return "0" * 64 if self.lies else hashlib.sha256(data).hexdigest()

    def info(self, repository: str) -> tuple[int, bytes, dict[str, str]]:
        if repository in self.gated:
            return 403, b"{}", {"X-Error-Code": "GatedRepo"}
        if repository not in self.files:
            return 404, b"{}", {"X-Error-Code": "RepoNotFound"}
        siblings = [
            {
                "rfilename": name,
                "size": len(data),
                "lfs": {"sha256": self.digest(data), "size": len(data), "pointerSize": 1},
            }
            for name, data in self.files[repository].items()
        ]
        answer = {"id": repository, "sha": SHA, "siblings": siblings, "cardData": {"license": "apache-2.0"}, "tags": []}
        return 200, json.dumps(answer).encode(), {"Content-Type": "application/json"}


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Iterator[Hub]:
    constants = pytest.importorskip("huggingface_hub.constants", reason="needs the extra hub")
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy", "HF_HUB_OFFLINE", "TROODON_WEIGHTS"):
        monkeypatch.delenv(name, raising=False)
    made = Hub()
    monkeypatch.setenv("HF_ENDPOINT", made.address)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    yield made
    made.server.shutdown()
    made.server.server_close()


def repository(folder: Path, shards: bool = False) -> dict[str, bytes]:
    """The files of a Hugging Face repository with the network of test_weights."""
    names = {
        "cls_token": "embeddings.cls_token", "mask_token": "embeddings.mask_token",
        "pos_embed": "embeddings.position_embeddings",
        "patch_embed.proj.": "embeddings.patch_embeddings.projection.", "blocks.": "encoder.layer.",
        "attn.proj": "attention.output.dense", "ls1.gamma": "layer_scale1.lambda1", "ls2.gamma": "layer_scale2.lambda1",
    }  # fmt: skip
    state = {}
    for name, tensor in state_of(TINY).items():
        if name.startswith("norm."):
            name = f"layer{name}"
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        if ".attn.qkv." in name:
            for part, value in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                state[name.replace("attn.qkv", f"attention.attention.{part}")] = value.contiguous()
        else:
            state[name] = tensor
    folder.mkdir()
    description = {"model_type": "dinov2", "num_attention_heads": 2, "hidden_size": 128}
    (folder / "config.json").write_text(json.dumps(description))
    (folder / "README.md").write_text("not fetched")
    if shards:
        parts = [dict(list(state.items())[:10]), dict(list(state.items())[10:])]
        files = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
        for part, file in zip(parts, files, strict=True):
            save_file(part, folder / file)
        index = {name: file for part, file in zip(parts, files, strict=True) for name in part}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    else:
        save_file(state, folder / "model.safetensors")
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("shards", [False, True])
def test_a_public_name_is_fetched_once_and_said(shards, hub, tmp_path, capsys):
    hub.files["facebook/dinov2-small"] = repository(tmp_path / "made", shards)
    got = troodon.load("dinov2_vits14")
    said = capsys.readouterr().err
    assert f"dinov2_vits14: fetches facebook/dinov2-small from {hub.address}, " in said
    assert " MB, licence: apache-2.0" in said
    assert got.config == TINY  # by the rule of the released network, with which it was trained
    assert got.name == "dinov2_vits14"
    torch.testing.assert_close(got.features(X).patches, network(TINY).features(X).patches)
    assert not any("README" in line for line in hub.asked)
    hub.asked.clear()
    again = troodon.load("dinov2_vits14")
    assert (hub.asked, capsys.readouterr().err) == ([], "")
    assert again.fingerprint == got.fingerprint


def test_any_repository_is_read_as_its_library_does(hub, tmp_path, monkeypatch):
    hub.files["someone/my.dino"] = repository(tmp_path / "made")
    got = troodon.load("hf:someone/my.dino")
    assert (got.name, got.config.position_offset) == ("my.dino", 0.0)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert troodon.load("hf:someone/my.dino").fingerprint == got.fingerprint
    with pytest.raises(UsageError, match="facebook/dinov2-base is not in the hub's cache, and HF_HUB_OFFLINE is set"):
        troodon.load("dinov2_vitb14")


def test_a_connection_that_breaks_is_taken_up_again(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules["huggingface_hub.constants"], "DOWNLOAD_CHUNK_SIZE", 1000)
    hub.files["facebook/dinov2-small"] = repository(tmp_path / "made")
    hub.breaks = True
    assert troodon.load("dinov2_vits14").config == TINY
    (start,) = (int(text.removeprefix("bytes=").rstrip("-")) for text in hub.ranges)
    assert 0 < start <= 50_000


def test_a_file_that_is_not_what_the_hub_tells_is_removed(hub, tmp_path):
    hub.files["facebook/dinov2-small"] = repository(tmp_path / "made")
    hub.lies = True
    with pytest.raises(UsageError, match="is not the file that the hub tells of, and is removed; try again"):
        troodon.load("dinov2_vits14")
    hub.lies = False
    assert troodon.load("dinov2_vits14").config == TINY


def test_what_a_hub_cannot_give_is_said_with_the_remedy(hub, tmp_path, monkeypatch, capsys):
    hub.gated.add("facebook/dinov3-vits16-pretrain-lvd1689m")
    with pytest.raises(UsageError, match=r"accept its licence first; accept it at .*, then run: hf auth login"):
        troodon.load("dinov3_vits16")
    with pytest.raises(UsageError, match="has no repository someone/nothing"):
        troodon.load("hf:someone/nothing")
    hub.files["someone/flax"] = {"config.json": b"{}", "flax_model.msgpack": b""}
    with pytest.raises(UsageError, match=r"has none of model\.safetensors, .*; it has config\.json, flax_model"):
        troodon.load("hf:someone/flax")
    with pytest.raises(UsageError, match="hf:only: a repository of the hub is hf:owner/name"):
        troodon.load("hf:only")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    words = ["embed", "--backbone", "dinov2_vits14", "--data", str(tmp_path), "--out", str(tmp_path / "out")]
    assert cli.run(words) == 2
    remedy = "or put the file into the folder of TROODON_WEIGHTS"
    assert remedy in capsys.readouterr().err


def test_without_the_extra_the_error_names_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.delenv("TROODON_WEIGHTS", raising=False)
    with pytest.raises(UsageError, match=r'TROODON_WEIGHTS names no folder; .*: pip install "troodon\[hub\]"'):
        troodon.load("dinov2_vits14")


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("dinov2_vits14", "dinov2_vits14_pretrain.pth"),
        ("dinov2_vits14", "dinov2_vits14.safetensors"),
        ("dinov2_vits14", "dinov2-small"),
        ("dinov2_vits14", "facebook/dinov2-small"),
        ("dinov2_vits14_reg", "dinov2_vits14_reg4_pretrain.pth"),
        ("hf:facebook/dinov2-small", "dinov2-small"),
        ("dinov3_vits16", "dinov3_vits16_pretrain_lvd1689m-08c60483.pth"),
    ],
)
def test_the_local_folder_comes_first(name, file, tmp_path, monkeypatch, capsys):
    place = tmp_path / file
    place.parent.mkdir(exist_ok=True)
    if place.suffix == ".pth":
        torch.save(state_of(TINY), place)
    elif place.suffix:
        save_file(state_of(TINY), place)
    else:
        repository(place)
    torch.save({}, tmp_path / "dinov2_vits14_other.pth")
    monkeypatch.setenv("TROODON_WEIGHTS", str(tmp_path))
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    got = troodon.load(name)
    assert f"{name}: is {place}" in capsys.readouterr().err
    assert got.name == name.removeprefix("hf:facebook/")
    is_transformers = name.startswith("hf:")
    assert (got.config.position_offset == RULE["position_offset"]) == (not is_transformers)


def test_a_local_folder_that_is_not_there_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("TROODON_WEIGHTS", str(tmp_path / "nothing"))
    with pytest.raises(UsageError, match=r"TROODON_WEIGHTS=.*nothing: no such folder"):
        troodon.load("dinov2_vits14")


@pytest.mark.parametrize(
    ("typo", "said"),
    [
        ("dinov2_vits41", r"did you mean dinov2_vits14\?"),
        ("dinov2-vitl14-reg", r"did you mean dinov2_vitl14_reg\?"),
        ("dinov3_vith16", r"did you mean dinov3_vit\w*16\w*\?"),
        ("facebook/dinov2-base", r"did you mean hf:facebook/dinov2-base\?"),
        ("runs/firts", "no such run, backbone folder or weights$"),
    ],
)
def test_a_typo_names_the_nearest(typo, said):
    with pytest.raises(UsageError, match=said):
        troodon.load(typo)


def test_the_names_are_those_of_the_hub():
    assert len(RELEASED) == 14
    assert RELEASED["dinov2_vitg14_reg"] == "facebook/dinov2-with-registers-giant"
    assert RELEASED["dinov3_vith16plus"] == "facebook/dinov3-vith16plus-pretrain-lvd1689m"
