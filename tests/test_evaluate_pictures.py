"""Pictures show the features: colours of patches, neighbours with the right frame."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from tests.evaluate_world import COLOURS, FakeBackbone, make_features, make_index
from troodon.evaluate.components import patch_colours
from troodon.evaluate.pictures import RIGHT, WRONG, draw_neighbours, draw_pca, spread_over_classes


def halves(images: int) -> np.ndarray:
    """Patches whose features differ between the left and the right half of every image."""
    x = 0.01 * np.random.default_rng(0).normal(size=(images, 6, 6, 12))
    x[:, :, :3, 0] += 1
    x[:, :, 3:, 1] += 1
    return x


def test_similar_patches_get_one_colour_in_all_images() -> None:
    colours = np.stack(patch_colours([*halves(3)]).colours).astype(int)
    left, right = colours[:, :, :3, 0], colours[:, :, 3:, 0]
    assert left.std() < 10
    assert right.std() < 10
    assert abs(left.mean() - right.mean()) > 200


def test_the_background_is_at_the_border() -> None:
    x = 0.05 * np.random.default_rng(0).normal(size=(2, 8, 8, 12))
    x[:, 2:6, 2:6, 3] += 1
    inside = np.zeros((8, 8), dtype=bool)
    inside[2:6, 2:6] = True
    found = patch_colours([*x], foreground=True)
    shown = np.stack(found.colours).any(-1)
    assert np.array_equal(np.stack(found.foreground), np.stack([inside] * 2))
    assert not shown[:, ~inside].any()
    assert shown[:, inside].all()


def test_features_of_few_channels_or_of_one_value_are_drawn() -> None:
    assert patch_colours([np.ones((2, 2, 2))]).colours[0].shape == (2, 2, 3)
    assert not patch_colours([np.ones((2, 2, 8))], foreground=True).colours[0].any()


def test_images_are_drawn_beside_their_patches(tmp_path: Path) -> None:
    patches = torch.from_numpy(halves(4))
    normalise = SimpleNamespace(mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    backbone = SimpleNamespace(
        prepare=lambda images: torch.full((len(images), 3, 32, 32), 1.0),
        features=lambda prepared: SimpleNamespace(patches=patches),
        preprocessing=normalise,
    )
    draw_pca(backbone, [np.zeros((9, 9, 3), np.uint8)] * 4, tmp_path / "pca.png")
    page = np.asarray(Image.open(tmp_path / "pca.png")).astype(int)
    assert page.shape[1] == 1000
    assert (page[60, 60] == 191).all()  # 1.0 * 0.25 + 0.5: the image as it was before it was normalised
    cell = (1000 - 4 * 16 - 3 * 4) // 6
    x, y = 16 + cell + 4, 16
    assert np.abs(page[y + 60, x + 15] - page[y + 60, x + cell - 15]).max() > 200
    assert (page[y + cell + 30, -60] == 255).all()  # the fourth image starts a second row, of which the rest is empty


@pytest.mark.parametrize("labelled", [True, False])
def test_frames_show_whether_classes_agree(tmp_path: Path, labelled: bool) -> None:
    names = ["red", "red", "green", "blue"]
    train = make_index(tmp_path / "train", names if labelled else [None] * 4)
    val = make_index(tmp_path / "val", ["red"] if labelled else [None])
    near = make_features(np.array([[1.0, 0.0], [0.9, 0.1], [0.5, 0.5], [0.0, 1.0]]))
    draw_neighbours(train, val, (near, make_features(np.array([[1.0, 0.0]]))), tmp_path / "n.png")
    page = np.asarray(Image.open(tmp_path / "n.png"))
    cell, gap = (1000 - 32 - 24 - 6 * 8) // 8, 8
    corners = [tuple(int(v) for v in page[17, 16 + cell + 24 + i * (cell + gap) + 1]) for i in range(7)]
    white = [(255, 255, 255)] * 3  # four images have no fifth neighbour
    if labelled:
        assert corners == [RIGHT, RIGHT, WRONG, WRONG, *white]
        inside = page[16 + cell // 2, 16 + cell + 24 + 2 * (cell + gap) + cell // 2]
        assert np.abs(inside.astype(int) - COLOURS["green"]).max() < 80
    else:
        assert not {RIGHT, WRONG} & {*corners}
    assert (page[16 + cell + 3 : 16 + cell + 18, 16 + cell + 24 :] < 200).any()  # cosines below


def test_rows_of_features_are_rows_of_the_index(tmp_path: Path) -> None:
    """An unreadable image shifts the features relative to the index. The pictures must not shift."""
    train, val = make_index(tmp_path / "train", ["red", "green", "blue"]), make_index(tmp_path / "val", ["x", "blue"])
    near, far = make_features(np.eye(3)[1:]), make_features(np.eye(3)[2:])
    near.rows[:], far.rows[:] = [1, 2], [1]
    draw_neighbours(train, val, (near, far), tmp_path / "n.png")
    page = np.asarray(Image.open(tmp_path / "n.png")).astype(int)
    cell = (1000 - 32 - 24 - 6 * 8) // 8
    for x in (16, 16 + cell + 24):
        middle = page[16 + cell // 3 : 16 + cell // 2, x + cell // 3 : x + cell // 2].mean((0, 1))
        assert np.abs(middle - COLOURS["blue"]).max() < 20
    assert tuple(page[17, 16 + cell + 25]) == RIGHT


def test_queries_are_of_different_classes() -> None:
    labels = [name for name in "abcdef" for _ in range(10)]
    assert sorted(labels[i] for i in spread_over_classes(labels, 6)) == [*"abcdef"]
    assert spread_over_classes(["a", "b"], 6) == [0, 1]
    assert spread_over_classes([None, None, None], 2) == [0, 2]


def test_pca_picture_of_images_of_several_sizes(tmp_path: Path) -> None:
    images = [np.full((30, 20, 3), 90, np.uint8), np.full((20, 30, 3), 30, np.uint8)]
    draw_pca(FakeBackbone(), images, tmp_path / "pca.png")
    with Image.open(tmp_path / "pca.png") as picture:
        assert picture.width == 1000
