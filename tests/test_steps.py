"""Curation with everything on: benchmarks, hashes, lists, clusters, marks, other backends; the ledger balances."""

import os
import pickle
import shutil
import signal
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from troodon import run, verbs
from troodon.config import UsageError, from_dict
from troodon.curate import backends, ledger, pipeline
from troodon.curate import embed as embedding
from troodon.curate.backends import ProcessPool
from troodon.curate.config import CurateConfig
from troodon.curate.descriptor import CopyDescriptor
from troodon.images.index import SCHEMA, Index
from troodon.images.sources import open_source
from troodon.model.backbone import Backbone
from troodon.model.config import Preprocessing, ViTConfig
from troodon.recipes import curation
from troodon.views.attacks import attack

from .test_curate import QUICK, Pixels, files, picture, png, rows, write

NO_IMAGES = Index(SCHEMA.empty_table())


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> dict[str, Index]:
    """Two curated sets of 6, a pool with attacked copies of some of 8 benchmark images, and 40 others in 4 kinds."""
    root, random = tmp_path_factory.mktemp("world"), np.random.default_rng(0)

    def like(seed: int, other: int, share: float) -> np.ndarray:
        return (share * picture(seed) + (1 - share) * picture(other)).astype(np.uint8)

    for name, kinds in (("first", (0, 1)), ("second", (2,))):
        write(
            root / name,
            {f"{name}{i}.png": png(like(kinds[i % len(kinds)], 500 + i + 10 * kinds[0], 0.6)) for i in range(6)},
        )
    write(root / "benchmark", {f"b{i}.png": png(picture(300 + i)) for i in range(8)} | {"b-broken.png": b"no"})
    pool = {f"k{kind}-{i}.png": png(like(kind, 600 + 20 * kind + i, 0.6)) for kind in range(4) for i in range(10)}
    pool |= {f"leak{i}.png": png(attack(picture(300 + i), "jpeg", random, 0.3)) for i in range(5)}
    pool |= {"leak-same.png": png(picture(306)), "broken.png": b"", "small.png": png(picture(7)[:10, :30])}
    pool["copy.png"] = png(attack(like(3, 660, 0.6), "shrink", random, 0.3))
    write(root / "pool", pool)
    curated = open_source(root / "first", root / "second")
    return {"curated": curated, "uncurated": open_source(root / "pool"), "benchmark": open_source(root / "benchmark")}


def curate(world: dict[str, Index], out: Path, backend=None, curated: Index | None = None, **changes) -> Path:
    given = world["curated"] if curated is None else curated
    config = replace(QUICK, benchmark_false_merges=1e-6, **changes)
    bench = world["benchmark"]
    return pipeline.curate(config, given, world["uncurated"], Pixels(), out, benchmark=bench, backend=backend)


EVERYTHING = {
    "steps": ("exact", "hash", "duplicate", "benchmark"),
    "search": "lists",
    "gather": "auto",
    "large": 5,
    "marks": ("side<20", "aspect>2"),
}


def test_all_steps_together_balance_and_give_reasons(world, tmp_path):
    out = curate(world, tmp_path / "s", **EVERYTHING)
    ledger, summary = rows(out), run.read_json(out / "summary.json")
    assert [s["name"] for s in summary["stages"]] == ["decode", "exact", "hash", "duplicate", "benchmark", "retrieve"]
    assert summary["benchmark"] == {"in": 9, "kept": 0}
    for i in range(5):
        assert (ledger[f"leak{i}.png"]["stage"], ledger[f"leak{i}.png"]["cause"]) == (
            "benchmark",
            ledger[f"b{i}.png"]["at"],
        )
    assert ledger["leak-same.png"]["cause"] == ledger["b6.png"]["at"]
    assert ledger["leak-same.png"]["reason"] == "resembles a benchmark image, cosine 1.00"
    assert ledger["b0.png"]["reason"] == "of a benchmark: not to train on"
    assert ledger["copy.png"]["stage"] in ("hash", "duplicate")
    assert ledger["small.png"]["marks"] == "side<20 aspect>2"
    assert ledger["small.png"]["score_aspect"] == 3
    assert summary["marked"] == {"side<20": 1, "aspect>2": 1}
    assert summary["search"]["by"] == "lists"
    assert summary["search"]["still_alike"]["found"] == 0
    page = verbs.report(out, tmp_path / "page.html").read_text()
    assert "resembles a benchmark image" in page
    assert "images of benchmarks, and those that resemble one" in page
    assert all((out / "embeddings" / name).exists() for name in ("embeddings.npy", "images.parquet"))
    assert not list(tmp_path.glob("*.work"))


def test_a_ledger_is_written_in_blocks(world, tmp_path, monkeypatch):
    whole = curate(world, tmp_path / "a", **EVERYTHING)
    monkeypatch.setattr(ledger, "BLOCK", 7)
    blocks = curate(world, tmp_path / "b", **EVERYTHING)
    tables = [pq.read_table(out / "images.parquet").to_pylist() for out in (whole, blocks)]
    assert repr(tables[0]) == repr(tables[1])  # not ==: scores may be nan


def test_all_backends_give_the_same_selection(world, tmp_path):
    backend = ProcessPool(2)
    assert files(curate(world, tmp_path / "a", backend=backend, partition_size=16, **EVERYTHING)) == files(
        curate(world, tmp_path / "b", **EVERYTHING)
    )


def test_gathering_by_clusters_balance_or_all(world, tmp_path):
    cluster = curate(
        world, tmp_path / "c", gather="cluster", clusters=4, more_than=1, per_cluster=4, retrieve_space="plain"
    )
    clusters = pq.read_table(cluster / "clusters.parquet").to_pylist()
    assert {c["dataset"] for c in clusters} == {"first", "second"}
    assert all(c["hits"] > 1 and c["taken"] == min(4, c["size"]) for c in clusters)
    kept = [r for r in rows(cluster).values() if r["kept"] and r["pool"] == "uncurated"]
    assert len(kept) <= sum(c["taken"] for c in clusters)
    assert {r["reason"] for r in kept} == {"drawn from a cluster of curated images"}

    every = curate(world, tmp_path / "a", gather="all", curated=NO_IMAGES)
    dropped = [r for r in rows(every).values() if r["pool"] == "uncurated" and not r["kept"]]
    assert {r["stage"] for r in dropped} == {"decode", "duplicate", "benchmark"}
    balanced = curate(world, tmp_path / "b", gather="balance", curated=NO_IMAGES, target=12, levels=(8, 4))
    assert run.read_json(balanced / "summary.json")["kept"] == 12
    alone = curate(world, tmp_path / "d", gather="all", steps=("exact",), curated=NO_IMAGES)
    stages = [s["name"] for s in run.read_json(alone / "summary.json")["stages"] if s["dropped"]]
    assert stages == ["decode", "benchmark"]
    with pytest.raises(UsageError, match="or set gather to balance or all"):
        curate(world, tmp_path / "e", curated=NO_IMAGES)


@pytest.mark.parametrize("gather", ["sample", "cluster", "auto", "balance", "all"])
def test_a_pool_without_remaining_images(tmp_path, gather):
    one = write(tmp_path / "one", {"a.png": png(picture(0))})
    copies = write(tmp_path / "copies", {"b.png": png(picture(0)), "c.png": b""})
    out = pipeline.curate(replace(QUICK, gather=gather), one, copies, Pixels(), tmp_path / "s")
    assert [r["kept"] for r in rows(out).values()] == [True, False, False]


def test_collisions_are_filled(world, tmp_path):
    plain = curate(world, tmp_path / "a", k=3, k_of=("second=5",))
    filled = curate(world, tmp_path / "b", k=3, k_of=("second=5",), collisions="fill")
    hits = pq.read_table(plain / "hits.parquet")
    assert np.bincount(hits["query"].to_numpy()).tolist() == [3] * 6 + [5] * 6
    kept = [sum(r["kept"] for r in rows(out).values()) for out in (plain, filled)]
    assert len(set(pq.read_table(filled / "hits.parquet")["row"].to_pylist())) == kept[1] - 12
    assert kept[1] > kept[0]


def test_a_benchmark_by_component_drops_more(world, tmp_path):
    direct = curate(world, tmp_path / "a", threshold=0.9, benchmark_threshold=0.5, gather="all", curated=NO_IMAGES)
    chained = curate(world, tmp_path / "b", threshold=0.9, benchmark_threshold=0.5, gather="all", curated=NO_IMAGES,
                   benchmark_mode="component")  # fmt: skip
    gone = [{name for name, r in rows(out).items() if r["stage"] == "benchmark"} for out in (direct, chained)]
    assert gone[0] <= gone[1]
    for name in gone[1] - gone[0]:
        assert rows(chained)[name]["reason"] == "joined to an image that resembles a benchmark's"


@dataclass(frozen=True)
class Copies(Pixels):
    """Another backbone, which finds copies."""

    name: str = "copies"
    fingerprint: str = "9"
    for_copies: bool = True


def test_another_backbone_finds_copies_and_images_are_read_once(world, tmp_path, capsys):
    finds, config = Copies(), replace(QUICK, threshold=0.6, duplicate_space="plain")
    out = pipeline.curate(config, world["curated"], world["uncurated"], Pixels(), tmp_path / "a", copies=finds)
    assert sum(finds.seen) == 12 + 48
    assert (out / "embeddings" / "copies.npy").exists()
    assert run.read_json(out / "summary.json")["finds_copies"] == "copies"
    assert "warning" not in capsys.readouterr().err
    pipeline.curate(config, world["curated"], world["uncurated"], Pixels(), tmp_path / "b")
    assert "warning: threshold 0.6 holds for a copy descriptor" in capsys.readouterr().err
    with pytest.raises(UsageError, match="copies takes 4 channels, pixels 3"):
        pipeline.curate(
            config, world["curated"], world["uncurated"], Pixels(), tmp_path / "c", copies=Copies(channels=4)
        )


def test_recipes_have_the_settings_of_the_paper():
    paper = curation.curate_paper()
    assert (paper.threshold, paper.benchmark_threshold, paper.k) == (0.6, 0.45, 4)
    assert (paper.clusters, paper.per_cluster, paper.more_than, paper.cap) == (100_000, 10_000, 3, 1_000_000)
    assert curation.curate_balance().gather == "balance"


def test_settings_are_read_by_their_first_names_and_recorded_under_them():
    first_names = {"disguises": 3, "minimum": 0.1, "part": 7}
    config = from_dict(CurateConfig(), first_names, source="test")
    assert config == CurateConfig(benchmark_attacks=3, min_similarity=0.1, partition_size=7)
    assert config.recorded(*CurateConfig.RENAMED.values()) == first_names
    assert config.recorded().keys() >= first_names.keys()


class KillsProcess(Pixels):
    """Kills its process if a picture is 13 pixels high."""

    def prepare(self, images):
        if any(len(image) == 13 for image in images):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().prepare(images)


def test_an_image_that_kills_processes_is_found_and_excluded(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(backends, "MAX_DEATHS", 1)
    index = write(tmp_path / "i", {f"{i}.png": png(picture(i)[: 13 if i == 1 else 40]) for i in range(3)})
    backend = ProcessPool(1)
    out = embedding.embed(KillsProcess(), index, tmp_path / "e", batch=1, threads=1, partition_size=2, backend=backend)
    backend.close()
    images = embedding.load_embeddings(out)[1]
    assert images["status"].to_pylist() == ["ok", "deadly", "ok"]
    assert images["reason"][1].as_py() == "every process that reads it dies"
    assert "embed: image 1 has killed 1 processes and is excluded" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir() if p.name != "i"] == ["e"]


def test_a_torchscript_file_finds_copies(tmp_path):
    class Shrinks(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.adaptive_avg_pool2d(x, 4).flatten(1)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(Shrinks(), torch.zeros(1, 3, 32, 32)).save(str(tmp_path / "small.pt"))
    descriptor = CopyDescriptor.load(tmp_path / "small.pt")
    image = picture(0)
    x = descriptor.features(descriptor.prepare([image, picture(1)[:20]])).cls
    assert x.shape == (2, 48)
    expected = np.asarray(Image.fromarray(image).resize((4, 4), Image.Resampling.BOX), float) / 255
    np.testing.assert_allclose(x[0].reshape(3, 4, 4)[0], (expected[..., 0] - 0.485) / 0.229, atol=0.05)
    again = pickle.loads(pickle.dumps(descriptor))
    assert again.fingerprint == descriptor.fingerprint
    assert torch.equal(again.features(again.prepare([image])).cls, x[:1])
    (tmp_path / "text.pt").write_text("no network")
    with pytest.raises(UsageError, match=r"text\.pt: not a TorchScript copy descriptor"):
        CopyDescriptor.load(tmp_path / "text.pt")


class Sscd(torch.nn.Module):
    """The signature of SSCD's files: normalised pixels (B, 3, 288, 288) -> (B, 512), each of length one."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = torch.nn.Sequential(torch.nn.Conv2d(3, 32, 7, 8), torch.nn.ReLU(), torch.nn.Conv2d(32, 64, 3, 4))
        self.project = torch.nn.Linear(64, 512)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pooled = self.trunk(x).clamp(min=1e-6).pow(3.0).mean([2, 3]).pow(1.0 / 3.0)
        return torch.nn.functional.normalize(self.project(pooled))


def test_published_thresholds_give_a_warning_except_for_a_file_like_sscd(world, tmp_path, capsys):
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(Sscd().eval()).save(str(tmp_path / "sscd.torchscript.pt"))
        torch.jit.script(Sscd().trunk.append(torch.nn.Flatten())).save(str(tmp_path / "any.pt"))
    sscd, other = (CopyDescriptor.load(tmp_path / name) for name in ("sscd.torchscript.pt", "any.pt"))
    x_BD = sscd.features(sscd.prepare([picture(0), picture(1)[:20]])).cls
    assert x_BD.shape == (2, 512)
    torch.testing.assert_close(x_BD.norm(dim=1), torch.ones(2))
    paper = replace(curation.curate_paper(), steps=("duplicate", "benchmark"), gather="all")

    def warns(copies: Any, space: Literal["plain", "whitened"] = "plain") -> bool:
        out, config = tmp_path / "out", replace(paper, duplicate_space=space)
        pipeline.curate(
            config, NO_IMAGES, world["uncurated"], Pixels(), out, benchmark=world["benchmark"], copies=copies
        )
        summary = run.read_json(out / "summary.json")
        assert (summary["threshold"], summary["benchmark_threshold"]) == (0.6, 0.45)
        for folder in tmp_path.glob("out*"):
            shutil.rmtree(folder)
        return "warning: threshold 0.6 holds for a copy descriptor such as SSCD" in capsys.readouterr().err

    network = Backbone.random(ViTConfig(dim=32, depth=1, heads=2, patch=8, grid=4), Preprocessing(32, 32))
    assert not warns(sscd)
    assert warns(sscd, "whitened")
    assert warns(other)
    assert warns(network)


def test_calibrate_measures_and_writes_nothing(tmp_path):
    write(tmp_path / "photos", {f"{i}.png": png(picture(i)) for i in range(40)} | {"broken.png": b""})
    result = verbs.calibrate(Pixels(), tmp_path / "photos", images=20, strength=0.3)
    assert (result["images"], result["copies"]) == (20, 80)
    assert result["recall"]["resave"] == 1
    assert 0 < result["threshold"] < 1
    assert [p.name for p in tmp_path.iterdir()] == ["photos"]
    with pytest.raises(UsageError, match="at least 16 images: 0 of 1 can be read"):
        verbs.calibrate(Pixels(), tmp_path / "photos" / "broken.png")
