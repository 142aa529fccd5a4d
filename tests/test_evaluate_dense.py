"""Segmentation and depth: windows cover every pixel, heads learn from patches, predictions are merged."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from troodon.config import UsageError
from troodon.evaluate import metrics
from troodon.evaluate.baselines import LocationPrior, PatchColours
from troodon.evaluate.config import DenseConfig, EvaluateConfig
from troodon.evaluate.dense import DepthTask, SegmentationTask, cell_targets, interpolate, predict, train_head
from troodon.evaluate.discover import iou
from troodon.evaluate.feature_maps import (
    WindowGrid,
    extract_maps,
    last_four,
    normalise,
    resize,
    spread_four,
    tokens,
)
from troodon.evaluate.features import Reader, cache_key
from troodon.evaluate.match import change_light, match_distances, random_affine, warp
from troodon.evaluate.sets.benchmark import IGNORE, Benchmark, Tree, depth_range, open_table
from troodon.evaluate.sets.layouts import open_benchmark
from troodon.evaluate.suite import evaluate
from troodon.model.backbone import Backbone
from troodon.model.config import Preprocessing, ViTConfig

COLOURS = np.array([(200, 60, 60), (60, 190, 70), (50, 80, 210)])
CONFIG = EvaluateConfig(dense=DenseConfig(steps=60, batch=8, rate=1e-2, heads=("linear",)), resamples=100)
VIEW = Preprocessing(resize=32, crop=32)


def make_street_dataset(folder: Path, images: int = 12, size: tuple[int, int] = (48, 64)) -> Benchmark:
    """Images of blocks in three colours, with masks of the colours, and distances that grow with the class."""
    rows = ["image,mask,depth,split"]
    (folder / "m").mkdir(parents=True)
    for i in range(images):
        random = np.random.default_rng(i)
        mask = np.kron(random.integers(0, 3, (3, 4)), np.ones((16, 16), int))[: size[0], : size[1]]
        pixels = np.clip(COLOURS[mask] + random.normal(0, 8, (*mask.shape, 3)), 0, 255).astype(np.uint8)
        mask[:4] = 11 if i % 2 else mask[:4]  # unlabelled
        Image.fromarray(pixels).save(folder / f"{i:02d}.png")
        Image.fromarray(mask.astype(np.uint8)).save(folder / "m" / f"{i:02d}.png")
        metres = np.where(mask > 2, 0, 1000 * (mask + 1)).astype(np.uint16)
        Image.fromarray(metres).save(folder / "m" / f"d{i:02d}.png")
        rows.append(f"{i:02d}.png,m/{i:02d}.png,m/d{i:02d}.png,{'val' if i % 3 == 2 else 'train'}")
    (folder / "index.csv").write_text("\n".join(rows))
    (folder / "classes.txt").write_text("0 red\n1 green\n2 blue\n11 unlabelled\n")
    tree = Tree.open(folder)
    assert tree is not None
    benchmark = open_table(tree)
    assert benchmark is not None
    return benchmark


def with_depths(masks: Benchmark) -> Benchmark:
    """The same images, with depth as ground truth."""
    tree = Tree.open(Path(masks.images.column("container")[0]).parent)
    assert tree is not None
    splits = masks.images.column("split")
    names = [f"m/d{i:02d}.png" for i in range(len(masks.images))]
    images = tree.index([f"{i:02d}.png" for i in range(len(names))], splits=splits)
    return Benchmark("far", "depth", images, tree.index(names))


@pytest.mark.parametrize(
    ("height", "width", "scale"), [(100, 100, 1.0), (37, 300, 1.0), (480, 360, 1.73), (5, 5, 1.32)]
)
def test_windows_cover_every_pixel_and_no_more(height: int, width: int, scale: float) -> None:
    grid = WindowGrid(32, scale)
    size = grid.resized(height, width)
    assert min(size) == max(32, round(32 * scale))
    count = np.zeros(size, int)
    for top, left in grid.corners(*size):
        assert 0 <= top <= size[0] - 32
        count[top : top + 32, left : left + 32] += 1
    assert count.shape == size
    assert count.min() >= 1
    if size == (32, 32):
        assert count.max() == 1


def test_feature_maps_match_the_network_on_each_window(tmp_path: Path) -> None:
    benchmark = make_street_dataset(tmp_path / "s", images=3)
    vit = ViTConfig(dim=32, depth=6, heads=2, patch=8, grid=4, layer_scale=1.0)
    backbone = Backbone.random(vit, VIEW)
    maps = extract_maps(backbone, benchmark.images, WindowGrid(32), (1, 5), Reader(batch=2, cache=tmp_path / "cache"))
    again = extract_maps(backbone, benchmark.images, WindowGrid(32), (1, 5), Reader(batch=5, cache=tmp_path / "cache"))
    assert isinstance(again.parts[0].maps_NLhwD, np.memmap)
    assert maps.rows_N.tolist() == again.rows_N.tolist() == [0, 0, 1, 1, 2, 2]
    patches, cls = again.get(np.array([3]), (5,))
    pixels = np.asarray(Image.open(tmp_path / "s" / "01.png"))
    top, left, height, width = maps.positions_N4[3]
    window = normalise(backbone, resize(pixels, (height, width))[None, :, top : top + 32, left : left + 32])
    direct = backbone.features(window)
    assert torch.allclose(patches[0, 0].movedim(0, -1), direct.patches[0], atol=2e-3)
    assert torch.allclose(cls[0, 0], direct.cls[0], atol=1e-5)
    assert torch.allclose(tokens(backbone, window, (1, 5))[0][0, 1], direct.patches[0])


@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_feature_maps_of_a_faster_network_match_those_of_the_network(tmp_path: Path, compute: str) -> None:
    """In its own precision, a few windows at a time, and with another cache key than in another precision."""
    benchmark = make_street_dataset(tmp_path / "s", images=3)
    vit = ViTConfig(dim=32, depth=6, heads=2, patch=8, grid=4, layer_scale=1.0)
    plain = Backbone.random(vit, VIEW)
    fast = plain.optimized(compute)
    maps_of = {}
    for name, backbone in (("plain", plain), ("fast", fast)):
        maps = extract_maps(backbone, benchmark.images, WindowGrid(32), (2, 5), Reader(batch=4))
        maps_of[name] = maps.get(np.arange(6), (2, 5))
    for ours, reference in zip(maps_of["fast"], maps_of["plain"]):
        error = (ours - reference).norm() / reference.norm()
        assert error < (1e-3 if compute == "fp32" else 2e-2)
        assert (error > 1e-3) == (compute == "bf16")  # so it was used
    window = torch.randn(1, 3, 32, 32)
    assert torch.equal(tokens(fast, window, (5,))[1][:, 0], fast.features(window).cls)
    same = cache_key(plain, benchmark.images) == cache_key(fast, benchmark.images)
    assert same == (compute == "fp32")


def test_blocks_of_dense_heads() -> None:
    assert last_four(12) == (8, 9, 10, 11)
    assert [spread_four(depth) for depth in (12, 24, 40)] == [(2, 5, 8, 11), (4, 11, 17, 23), (9, 19, 29, 39)]
    assert spread_four(3)[-1] == 2
    assert spread_four(1) == last_four(1) == (0,)


def test_segmentation_learns_from_patches_and_beats_the_location_prior(tmp_path: Path) -> None:
    colours = PatchColours(VIEW, 8)
    scores = evaluate([colours, LocationPrior()], [make_street_dataset(tmp_path / "s")], CONFIG, tmp_path / "scores")
    by_metric = {(s["backbone"], s["protocol"], s["metric"]): s for s in scores}
    ours, prior = (by_metric[b, "segment", "miou"] for b in ("patch-colours", "location-prior"))
    assert ours["value"] > 0.8 > 0.5 > prior["value"]
    assert ours["low"] < ours["value"] < ours["high"]
    assert ours["settings"]["window"] == 32
    assert by_metric["patch-colours", "segment", "pixel_accuracy"]["value"] > 0.9
    assert by_metric["patch-colours", "match", "pck@0.1"]["value"] > 0.1
    assert ours["fingerprint"] != prior["fingerprint"]


def test_every_head_learns_depth(tmp_path: Path) -> None:
    benchmark = with_depths(make_street_dataset(tmp_path / "s"))
    dense = DenseConfig(
        steps=80,
        batch=8,
        rate=1e-2,
        bins=16,
        range=(0.5, 4.0),
        heads=("linear", "patches", "linear_4_ms", "dpt"),
        scales=(1.0, 1.5),
    )
    config = dataclasses.replace(CONFIG, dense=dense, protocols=("depth",))
    scores = evaluate([PatchColours(VIEW, 8), LocationPrior()], [benchmark], config, tmp_path / "scores")
    absrel = {(s["backbone"], s["protocol"]): s["value"] for s in scores if s["metric"] == "absrel"}
    assert set(absrel) == {
        ("patch-colours", "depth"), ("patch-colours", "depth_patches"), ("patch-colours", "depth_linear_4_ms"),
        ("patch-colours", "depth_dpt"), ("location-prior", "depth"),
    }  # fmt: skip
    assert max(v for (b, _), v in absrel.items() if b == "patch-colours") < 0.3 < absrel["location-prior", "depth"]


def test_a_missing_depth_range_is_an_error_before_anything_runs(tmp_path: Path) -> None:
    benchmark = with_depths(make_street_dataset(tmp_path / "s", images=3))
    with pytest.raises(UsageError, match=r"--dense\.range LEAST MOST; .* from 1\.00 to 3\.00"):
        evaluate([PatchColours(VIEW, 8)], [benchmark], CONFIG, tmp_path / "scores")
    assert not (tmp_path / "scores").exists()


def test_targets_match_the_position_of_the_window(tmp_path: Path) -> None:
    benchmark, task = make_street_dataset(tmp_path / "s", images=2), SegmentationTask(3)
    maps = extract_maps(PatchColours(VIEW, 8), benchmark.images, WindowGrid(32), (0,), Reader())
    target, windows = cell_targets(benchmark, task, maps)
    assert target.shape == (4, 16, 16)
    assert windows.tolist() == [0, 1, 2, 3]
    whole = benchmark.target(1)
    top, left, height, width = maps.positions_N4[3]
    y, x = int((top + 9) / height * 48), int((left + 21) / width * 64)
    assert target[3][4, 10] == whole[y, x]
    assert (target[2][0] == IGNORE).all()  # the first rows of the second picture are unlabelled


def test_unreadable_ground_truth_skips_only_its_image(tmp_path: Path) -> None:
    benchmark = make_street_dataset(tmp_path / "s", images=6)
    (tmp_path / "s" / "m" / "00.png").write_bytes(b"broken")
    maps = extract_maps(PatchColours(VIEW, 8), benchmark.images, WindowGrid(32), (0,), Reader())
    _, windows = cell_targets(benchmark, SegmentationTask(3), maps)
    assert set(maps.rows_N[windows]) == {1, 2, 3, 4, 5}


def test_windows_are_merged_into_one_prediction(tmp_path: Path) -> None:
    """A head that returns the red channel of each patch predicts the red channel of the image."""
    benchmark = make_street_dataset(tmp_path / "s", images=2)
    maps = extract_maps(PatchColours(VIEW, 8), benchmark.images, WindowGrid(32), (0,), Reader())
    task = DepthTask(1.0, 0.0, 10.0, 1)

    class Red(torch.nn.Module):
        def forward(self, maps_BLDhw, cls_BLD):
            return maps_BLDhw[:, 0, :1]

    task_without_activation = dataclasses.replace(task)
    object.__setattr__(task_without_activation, "activation", lambda z: z)
    predicted = dict(predict(Red(), task_without_activation, [maps, maps], (0,), {0: (48, 64), 1: (48, 64)}))
    pixels = np.asarray(Image.open(tmp_path / "s" / "01.png"), dtype=np.float32)
    red = (pixels[..., 0] / 255 - 0.485) / 0.229
    assert np.corrcoef(predicted[1].ravel(), red.ravel())[0, 1] > 0.9
    assert predicted[1].shape == (48, 64)
    assert interpolate(torch.ones(1, 1, 2, 2), (3, 5)).shape == (1, 1, 3, 5)


def test_training_is_deterministic(tmp_path: Path) -> None:
    benchmark, task = make_street_dataset(tmp_path / "s", images=4), SegmentationTask(3)
    maps = extract_maps(PatchColours(VIEW, 8), benchmark.images, WindowGrid(32), (0,), Reader())
    target, windows = cell_targets(benchmark, task, maps)
    few = DenseConfig(steps=5, batch=3)
    a, b, c = (train_head("linear", task, maps, (0,), target, windows, few, seed) for seed in (1, 1, 2))
    assert torch.equal(a.layer.weight, b.layer.weight)
    assert not torch.equal(a.layer.weight, c.layer.weight)


def test_discovery_finds_an_object_of_another_colour(tmp_path: Path) -> None:
    folder, rows, boxes = tmp_path / "things", ["image,tags"], []
    folder.mkdir()
    for i in range(6):
        random = np.random.default_rng(i)
        top, left = random.integers(0, 5, 2) * 8
        pixels = random.normal((90, 120, 60), 12, (64, 96, 3))
        pixels[top : top + 24, left : left + 32] += (90, -60, 60)
        pixels[56:, 88:] += (90, -60, 60)  # alike, and apart
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{i}.png")
        rows.append(f"{i}.png,thing")
        boxes.append(np.array([[0, 0, 4, 4], [left, top, left + 32, top + 24]], float))
    (folder / "index.csv").write_text("\n".join(rows))
    benchmark = open_benchmark(folder)
    assert benchmark is not None
    config = dataclasses.replace(CONFIG, protocols=("discover",), dense=dataclasses.replace(CONFIG.dense, side=64))
    some = dataclasses.replace(benchmark, objects=(*boxes[:5], np.zeros((0, 4))))
    (score,) = evaluate([PatchColours(VIEW, 8)], [some], config, tmp_path / "s")
    assert (score["metric"], score["value"], score["settings"]["images"]) == ("corloc", 1.0, 5)
    assert score["settings"]["a box of the whole picture"] == 0.0
    elsewhere = dataclasses.replace(benchmark, objects=tuple(b[:1] for b in boxes))
    (score,) = evaluate([PatchColours(VIEW, 8)], [elsewhere], config, tmp_path / "t")
    assert score["value"] == 0.0
    assert iou(np.array([0, 0, 4, 2]), np.array([[2, 0, 6, 2], [9, 9, 10, 10]])).tolist() == [1 / 3, 0]


def test_mean_iou_matches_scikit_learn() -> None:
    sklearn = pytest.importorskip("sklearn.metrics")
    random = np.random.default_rng(0)
    target, predicted = random.integers(0, 5, (2, 40, 40))
    target[random.random((40, 40)) < 0.1] = IGNORE
    counts = metrics.class_counts(predicted, target, 6, IGNORE)  # a sixth class that is nowhere
    valid = target != IGNORE
    expected = sklearn.jaccard_score(target[valid], predicted[valid], average="macro")
    assert metrics.mean_iou(counts[None])[0] == pytest.approx(expected)
    assert counts[0].sum() / counts[2].sum() == pytest.approx((predicted == target)[valid].mean())


def test_depth_errors_match_their_definitions() -> None:
    random = np.random.default_rng(0)
    t, p = random.uniform(1, 5, (2, 30))
    t[:5] = 0
    errors = metrics.depth_errors(p, t)
    valid = [(a, b) for a, b in zip(p, t) if b > 0]
    assert errors["absrel"] == pytest.approx(sum(abs(a - b) / b for a, b in valid) / len(valid))
    assert errors["rmse"] == pytest.approx((sum((a - b) ** 2 for a, b in valid) / len(valid)) ** 0.5)
    assert errors["delta1"] == pytest.approx(sum(max(a / b, b / a) < 1.25 for a, b in valid) / len(valid))


def test_patches_that_encode_their_position_are_matched_correctly() -> None:
    """The features of a patch encode its position in the first view, so the nearest patch is the true match."""
    affine = random_affine(np.random.default_rng(3))
    n = 16
    ys = 2 * (torch.arange(n) + 0.5) / n - 1
    place = torch.stack(torch.meshgrid(ys, ys, indexing="xy"), -1)
    target = place @ affine[:, :2].T + affine[:, 2]

    def code(x: torch.Tensor) -> torch.Tensor:  # nearer places have a higher cosine
        return torch.cat([(6 * x).cos(), (6 * x).sin(), (2 * x).cos(), (2 * x).sin()], -1)

    distances = match_distances(code(place), code(target), affine)
    assert len(distances) > n
    assert distances.max() < 1.5 / n
    chance = match_distances(torch.randn(n, n, 8), torch.randn(n, n, 8), affine)
    assert (chance < 0.1).mean() < 0.2
    grey = torch.full((3, 8, 8), 100, dtype=torch.uint8)
    changed = torch.stack([change_light(grey, np.random.default_rng(i)) for i in range(50)])[:, :, 0, 0].float()
    assert changed.std(0).min() > 15  # every colour changes, and not by one factor
    assert (changed / changed.mean(1, keepdim=True)).std() > 0.1
    assert (change_light(torch.full((3, 1, 1), 255, dtype=torch.uint8), np.random.default_rng(0)) <= 255).all()
    ramp = torch.arange(64.0).repeat(64, 1)[None].expand(3, -1, -1) * 4
    changed = warp(ramp.to(torch.uint8), affine).float()
    assert abs(float(changed[0, 32, 32]) - 4 * (31.5 + 32 * float(affine[0, 2]))) < 6


@pytest.mark.parametrize(
    ("pack", "kind", "images", "truths"),
    [
        ("seg_camvid_dev.tar", "mask", 468, set(range(11)) | {IGNORE}),
        ("depth_kitchen_dev.tar", "depth", 240, None),
        ("retr_eth80_dev.tar", "retrieval", 1640, None),
        ("neardup_cifar10_dev.tar", "copies", 4313, None),
    ],
)
def test_kinds_of_real_datasets(shared, pack: str, kind: str, images: int, truths: set | None) -> None:
    benchmark = open_benchmark(shared(pack))
    assert benchmark is not None
    assert (benchmark.kind, len(benchmark.images)) == (kind, images)
    if benchmark.ground_truth is not None:
        assert set(benchmark.images.column("split")) == {"train", "val"}
    if truths is not None:
        assert {int(v) for row in range(0, images, 40) for v in np.unique(benchmark.target(row))} == truths
        assert benchmark.classes[:2] == ("Sky", "Building")
    if kind == "depth":
        low, high = depth_range(benchmark, 0.001)
        assert 0.5 < low < 1.0 < 3.0 < high < 4.0
    if kind == "retrieval":
        assert len(benchmark.queries) == 80
        assert all(len(relevant) == 40 for relevant, _ in benchmark.relevance["all"])
    if kind == "copies":
        assert len(benchmark.pairs) == 174


def test_colours_of_real_streets_beat_chance(tmp_path: Path, shared) -> None:
    """Sky, road and trees differ in colour: far better than the most frequent class everywhere (2.5 %)."""
    benchmark = open_benchmark(shared("seg_camvid_dev.tar"))
    assert benchmark is not None
    assert benchmark.ground_truth is not None
    rows = np.concatenate([np.arange(0, 360, 30), np.arange(370, 468, 20)])
    few = dataclasses.replace(
        benchmark, images=benchmark.images.take(rows), ground_truth=benchmark.ground_truth.take(rows)
    )
    config = dataclasses.replace(CONFIG, dense=dataclasses.replace(CONFIG.dense, side=96, steps=100), match_images=3)
    scores = evaluate([PatchColours(VIEW, 8)], [few], config, tmp_path / "s")
    by_metric = {s["metric"]: s for s in scores}
    assert by_metric["miou"]["value"] > 0.12
    assert by_metric["pixel_accuracy"]["value"] > 0.4
    assert (by_metric["miou"]["settings"]["train"], by_metric["miou"]["settings"]["val"]) == (12, 5)
