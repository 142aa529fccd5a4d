import hashlib
import io
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from troodon.config import UsageError
from troodon.views.attacks import ATTACKS
from troodon.world import scene as world_scene
from troodon.world import write as world
from troodon.world.shapes import SPECIES
from troodon.world.surfaces import HABITATS, TEXTURES
from troodon.world.write import WorldConfig, render, render_offtopic, write_world

TINY = WorldConfig(px=32, classes=3, curated=4, clean=24, copies=30, off_topic=12, broken=5, train=4, val=3, dense=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("demo") / "world"
    write_world(path, 3, TINY)
    return path


@pytest.fixture(scope="module")
def truth(folder):
    return pq.read_table(folder / "truth.parquet").to_pylist()


def same(a, b) -> bool:
    return all(np.array_equal(x, y) for x, y in zip((a.image, a.mask, a.depth), (b.image, b.mask, b.depth)))


def test_a_picture_is_a_function_of_its_arguments():
    first = [render(4, k, px=32) for k in range(6)]
    assert all(same(first[k], render(4, k, px=32)) for k in reversed(range(6)))
    assert not any(same(first[k], render(5, k, px=32)) for k in range(6))
    assert len({p.image.tobytes() for p in first}) == 6
    code = (
        "import hashlib, sys; from troodon.world.write import render, render_offtopic as off\n"
        "print(hashlib.sha256(render(4, 5, px=32).image.tobytes() + off(4, 2, 32)[0].tobytes()).hexdigest())\n"
        "assert 'torch' not in sys.modules"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert output == hashlib.sha256(first[5].image.tobytes() + render_offtopic(4, 2, 32)[0].tobytes()).hexdigest()


def test_shapes_types_and_labels():
    for px in (16, 40, 65):
        p = render(0, 1, label=2, identity=9, px=px)
        assert p.image.shape == (px, px, 3)
        assert p.mask.shape == p.depth.shape == (px, px)
        assert (p.image.dtype, p.mask.dtype, p.depth.dtype) == (np.uint8, np.uint8, np.float32)
        assert (p.label, p.identity) == (2, 9)
    assert render(0, 1, identity=29).label == 29 % 12
    assert render(0, 1).identity != render(0, 2).identity
    assert {render(0, k, px=16).label for k in range(150)} == set(range(12))


def test_every_species_texture_and_habitat_is_rendered():
    everyone = WorldConfig(classes=len(SPECIES))
    for label in range(len(SPECIES)):
        assert (render(0, label, label=label, px=32, config=everyone).mask == 1).sum() > 15
    assert {s.texture for s in SPECIES.values()} == TEXTURES.keys()
    assert {s.habitat for s in SPECIES.values()} == HABITATS.keys()


def test_surfaces_use_their_two_colours_equally():
    x, y = (np.linspace(-1, 1, 96, dtype=np.float32).reshape(s) for s in ((1, 96), (96, 1)))
    for name, surface in (TEXTURES | HABITATS).items():
        t = [np.broadcast_to(surface(x, y, np.random.default_rng(k)), (96, 96)) for k in range(12)]
        assert t[0].dtype == np.float32, name
        assert min(v.min() for v in t) >= -1e-3, name
        assert max(v.max() for v in t) <= 1 + 1e-3, name
        assert 0.2 < np.mean(t) < 0.7, name
        assert np.std(t) > 0.08, name


def test_the_mask_is_where_the_body_is(monkeypatch):
    """The same scenes with other body colours differ inside the mask and nowhere else."""
    config = WorldConfig(clutter=0.0)
    before = [render(0, k, config=config) for k in range(24)]
    palette = world_scene._palette
    monkeypatch.setattr(world_scene, "_palette", lambda r: (lambda colours, hue: (1 - colours, hue))(*palette(r)))
    for k, p in enumerate(before):
        changed = np.abs(render(0, k, config=config).image.astype(int) - p.image).max(-1)
        assert (changed[p.mask == 1] > 2).mean() > 0.9
        outside = p.mask == 0
        outside[1:] &= p.mask[:-1] == 0  # pixels beside the body may hold a part of it
        outside[:-1] &= p.mask[1:] == 0
        outside[:, 1:] &= p.mask[:, :-1] == 0
        outside[:, :-1] &= p.mask[:, 1:] == 0
        assert (changed[outside] <= 2).mean() > 0.99


def test_depth_is_nearer_on_the_body_than_behind_it():
    for k in range(40):
        p = render(2, k, px=48)
        assert np.isfinite(p.depth).all()
        assert 0.5 < p.depth.min() < p.depth.max() < 12
        if (p.mask == 1).sum() > 20:
            assert p.depth[p.mask == 1].max() < p.depth[p.mask == 0].min()
            assert np.ptp(p.depth[p.mask == 1]) > 0  # it bulges


def test_clutter_is_nearer_than_the_body_it_hides():
    cluttered, alone = WorldConfig(clutter=1.0), WorldConfig(clutter=0.0)
    is_nearer = set()
    for k in range(40):
        p, bare = render(2, k, px=48, config=cluttered), render(2, k, px=48, config=alone)
        thing, body = p.mask == 2, bare.mask == 1
        if thing.sum() > 12:
            nearer = bool(p.depth[thing].max() < bare.depth[body].min())
            is_nearer.add(nearer)
            assert nearer or not (thing & body).any()
            assert (p.depth[thing] < bare.depth[thing]).all()  # never behind what it hides
    assert is_nearer == {True, False}


def test_near_bodies_are_large():
    config = WorldConfig(clutter=0.0)
    p = [render(2, k, label=8, px=32, config=config) for k in range(40)]
    area, depth = [(x.mask == 1).mean() for x in p], [x.depth[x.mask == 1].mean() for x in p]
    assert np.corrcoef(area, depth)[0, 1] < -0.7


def test_clutter_leaves_most_of_a_body_visible():
    cluttered, alone = WorldConfig(clutter=1.0), WorldConfig(clutter=0.0)
    visible, clutter_count = [], 0
    for k in range(60):
        p = render(3, k, px=48, config=cluttered)
        visible.append((p.mask == 1).sum() / (render(3, k, px=48, config=alone).mask == 1).sum())
        clutter_count += (p.mask == 2).any()
    assert min(visible) > 0.4
    assert np.mean(visible) > 0.9
    assert min(visible) < 0.95  # some stand before it
    assert clutter_count > 50


def test_an_individual_looks_the_same_everywhere():
    def hues(identity: int, image: int) -> np.ndarray:
        p = render(1, image, label=8, identity=identity, px=48, config=WorldConfig(clutter=0.0))
        hue = np.asarray(Image.fromarray(p.image).convert("HSV"))[..., 0][p.mask == 1]
        x = np.bincount(hue // 16, minlength=16).astype(float)
        return x / np.linalg.norm(x)

    first = np.stack([hues(i, 100 + i) for i in range(12)])
    later = np.stack([hues(i, 200 + i) for i in range(12)])
    assert ((first @ later.T).argmax(1) == np.arange(12)).mean() > 0.7


def test_shape_predicts_the_class_and_colour_does_not():
    config, rows = WorldConfig(classes=6), range(480)
    pictures = [render(6, k, label=k % 6, px=32, config=config) for k in rows]
    label = np.array([p.label for p in pictures])

    def accuracy(describe) -> float:
        x = np.stack([describe(p) for p in pictures]).astype(float)
        x -= x[:360].mean(0)
        x /= np.linalg.norm(x, axis=1, keepdims=True) + 1e-9
        near = np.argsort(-(x[360:] @ x[:360].T), 1)[:, :20]
        votes = np.stack([(label[near] == c).sum(1) for c in range(6)], 1)
        return float((votes.argmax(1) == label[360:]).mean())

    def colours(p) -> np.ndarray:
        hsv = np.asarray(Image.fromarray(p.image).convert("HSV")).reshape(-1, 3).astype(int)
        return np.sqrt(np.bincount(hsv[:, 0] // 22 * 16 + hsv[:, 1] // 64 * 4 + hsv[:, 2] // 64, minlength=192))

    def form(p) -> np.ndarray:
        rows, columns = np.nonzero(p.mask == 1)
        cut = Image.fromarray((p.mask == 1).astype(np.uint8) * 255)
        return np.asarray(
            cut.resize((12, 12), Image.Resampling.BOX, (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1))
        ).ravel()

    assert accuracy(colours) < 0.3  # chance is 0.17
    assert accuracy(form) > 0.6


def test_off_topic_pictures():
    images = [render_offtopic(1, k, 48) for k in range(80)]
    assert len({kind for _, kind in images}) >= 8
    assert all(image.shape == (48, 48, 3) and image.dtype == np.uint8 for image, _ in images)
    assert len({image.tobytes() for image, _ in images}) == 80
    assert np.array_equal(render_offtopic(1, 7, 48)[0], images[7][0])


def test_a_written_world_has_the_configured_sizes(folder, truth):
    count = Counter(row["role"] for row in truth)
    assert count == {
        **{"curated": 12, "clean": 24, "copy": 30, "off-topic": 12, "broken": 5, "train": 12, "val": 9, "dense": 4}
    }
    assert write_world(folder, 3, TINY) == count  # again: nothing to do, the same answer
    for role in ("train", "val"):
        assert sorted(p.name for p in (folder / "evaluation" / role).iterdir()) == sorted(TINY.species())
    assert {p.name for p in folder.iterdir()} == {
        *("curated", "uncurated", "evaluation", "dense", "truth.parquet", "manifest.json")
    }


def test_the_ground_truth_is_complete_and_correct(folder, truth):
    files = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.suffix in (".jpg", ".png")}
    files -= {f for f in files if f.startswith(("dense/masks", "dense/depth"))}
    assert sorted(row["path"] for row in truth) == sorted(files)
    by_path = {row["path"]: row for row in truth}
    pool = ("clean", "copy", "off-topic", "broken")
    assert all(row["path"].startswith("uncurated/") == (row["role"] in pool) for row in truth)
    for row in truth:
        data = (folder / row["path"]).read_bytes()
        if row["role"] == "broken":
            with pytest.raises(OSError):  # noqa: PT011 - Pillow has many words for it
                Image.open(io.BytesIO(data)).load()
            continue
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            assert image.format == ("PNG" if row["path"].endswith(".png") else "JPEG")
        if row["role"] in ("curated", "train", "val"):
            assert row["path"].split("/")[-2] == row["label"]
        assert (row["role"] == "copy") == (row["original"] is not None) == (row["attack"] is not None)
        if row["role"] == "copy":
            original = by_path[row["original"]]
            assert original["role"] in ("clean", "curated")
            assert (row["label"], row["identity"]) == (original["label"], original["identity"])
            assert (data == (folder / row["original"]).read_bytes()) == (row["attack"] == "exact")
    assert {row["attack"] for row in truth if row["role"] == "copy"} == {*ATTACKS, "exact"}
    originals = Counter(row["original"] for row in truth if row["original"])
    assert max(originals.values()) > 1  # some have several copies
    assert {by_path[path]["role"] for path in originals} == {"clean", "curated"}
    assert len({row["path"].rpartition(".")[2] for row in truth if row["role"] == "clean"}) == 2


def test_roles_share_no_individual(truth):
    of = {
        role: {(row["label"], row["identity"]) for row in truth if row["role"] == role}
        for role in ("curated", "clean", "train", "val", "dense")
    }
    assert sum(map(len, of.values())) == len(set().union(*of.values()))
    assert len(of["clean"]) == 24 / TINY.poses


def test_dense_pictures_have_their_mask_and_depth(folder, truth):
    for row in (row for row in truth if row["role"] == "dense"):
        name = row["path"].split("/")[-1].rpartition(".")[0] + ".png"
        mask = np.asarray(Image.open(folder / "dense/masks" / name))
        depth = np.asarray(Image.open(folder / "dense/depth" / name))
        assert mask.shape == depth.shape == (TINY.px, TINY.px)
        assert mask.max() <= 2
        assert (mask == 1).any()
        assert depth.dtype == np.uint16
        assert 500 < depth.min() < depth[mask == 1].max() < depth[mask == 0].min()


def test_a_world_is_reproducible_to_the_byte(folder, truth, tmp_path):
    write_world(tmp_path / "again", 3, TINY)
    for row in truth:
        assert (tmp_path / "again" / row["path"]).read_bytes() == (folder / row["path"]).read_bytes()


def test_an_interrupted_world_is_not_published(tmp_path, monkeypatch):
    whole, done = world._copies, []

    def cut(*arguments):
        for file in whole(*arguments):
            done.append(file)
            if len(done) == 5:
                raise KeyboardInterrupt
            yield file

    monkeypatch.setattr(world, "_copies", cut)
    with pytest.raises(KeyboardInterrupt):
        write_world(tmp_path / "world", 3, TINY)
    assert not (tmp_path / "world").exists()
    monkeypatch.setattr(world, "_copies", whole)
    assert write_world(tmp_path / "world", 3, TINY)["copy"] == 30
    assert [p.name for p in tmp_path.iterdir()] == ["world"]


def test_another_world_is_refused(folder):
    with pytest.raises(UsageError, match=r"world\.clean: 24 -> 25"):
        write_world(folder, 3, replace(TINY, clean=25))


def test_invalid_settings_are_refused():
    with pytest.raises(UsageError, match="classes: 40 species; must be 2 to 16"):
        WorldConfig(classes=40)
    with pytest.raises(UsageError, match="clutter: 2"):
        WorldConfig(clutter=2.0)
    with pytest.raises(UsageError, match="no picture to copy"):
        write_world(None, 0, WorldConfig(clean=0, curated=0))  # type: ignore[arg-type]
