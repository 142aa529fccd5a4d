"""The stream of batches: a function of seed and step, independent of threads, ranks and broken files."""

import io
import os
import tarfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from troodon.config import UsageError
from troodon.images.decode import decode
from troodon.images.reading import read_batches
from troodon.images.sources import open_source
from troodon.views.attacks import random_attack
from troodon.views.config import CropsConfig, MasksConfig, PhotometricConfig
from troodon.views.crops import generator, multi_crop
from troodon.views.loader import Loader
from troodon.views.order import assign_source, permute

CROPS = CropsConfig(global_px=16, local_px=8, locals=3)
CPU = torch.device("cpu")


@pytest.fixture
def index(tmp_path):
    random = np.random.default_rng(0)
    with tarfile.open(tmp_path / "images.tar", "w") as tar:
        for i in range(13):
            buffer = io.BytesIO()
            Image.fromarray(random.integers(0, 255, (20 + i, 24, 3), dtype=np.uint8)).save(buffer, "PNG")
            data = b"not an image" if i in (4, 5) else buffer.getvalue()
            info = tarfile.TarInfo(f"{i:02d}.png")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return open_source(tmp_path / "images.tar")


def make_loader(index, **changes) -> Loader:
    settings = {"crops": CROPS, "patch": 4, "batch_size": 4, "seed": 7, "threads": 2} | changes
    return Loader(index, photometric=PhotometricConfig(), masks=MasksConfig(), attack=random_attack, **settings)


def take(loader: Loader, first: int, count: int) -> list:
    batches = loader.batches(first, CPU)
    taken = [next(batches) for _ in range(count)]
    batches.close()
    return taken


def same(a, b) -> bool:
    return all(torch.equal(getattr(a, n), getattr(b, n)) for n in ("globals_GBCHW", "locals_VBCHW", "masks_NP"))


@pytest.mark.parametrize("length", [1, 2, 3, 7, 64, 1009])
def test_a_permutation_visits_everything_once(length):
    for key in (0, 1, 2**63 + 5):
        assert sorted(permute(i, length, key) for i in range(length)) == list(range(length))


def test_permutations_differ_by_key_and_look_shuffled():
    orders = [[permute(i, 1009, key) for i in range(1009)] for key in (0, 1)]
    assert orders[0] != orders[1]
    assert abs(np.corrcoef(orders[0], orders[1])[0, 1]) < 0.15
    assert abs(np.corrcoef(orders[0], np.arange(1009))[0, 1]) < 0.15


def test_batches_are_a_function_of_the_step(index):
    six = take(make_loader(index), 0, 6)
    assert all(same(a, b) for a, b in zip(six[3:], take(make_loader(index, threads=1), 3, 3), strict=True))
    assert not same(six[0], six[1])
    assert not same(six[0], take(make_loader(index, seed=8), 0, 1)[0])
    assert six[0].globals_GBCHW.shape == (2, 4, 3, 16, 16)
    assert six[0].locals_VBCHW.shape == (3, 4, 3, 8, 8)
    assert six[0].masks_NP.shape == (8, 16)


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_take_slices_of_the_same_batch(index, world):
    (whole,) = take(make_loader(index), 5, 1)
    parts = [take(make_loader(index, rank=r, world_size=world), 5, 1)[0] for r in range(world)]
    assert torch.equal(torch.cat([p.globals_GBCHW for p in parts], 1), whole.globals_GBCHW)
    assert torch.equal(torch.cat([p.locals_VBCHW for p in parts], 1), whole.locals_VBCHW)
    masks = torch.cat([p.masks_NP.unflatten(0, (2, -1)) for p in parts], 1).flatten(0, 1)
    assert torch.equal(masks, whole.masks_NP)


def test_a_preview_is_the_beginning_of_its_batch(index):
    (whole,) = take(make_loader(index), 3, 1)
    few = make_loader(index).preview(3, 2)
    assert torch.equal(few.globals_GBCHW, whole.globals_GBCHW[:, :2])
    assert torch.equal(few.locals_VBCHW, whole.locals_VBCHW[:, :2])
    assert torch.equal(few.masks_NP, whole.masks_NP.unflatten(0, (2, -1))[:, :2].flatten(0, 1))


def test_a_broken_file_is_recorded_and_replaced_by_the_next(index):
    loader = make_loader(index)
    take(loader, 0, 8)
    assert sorted(loader.broken) == [4, 5]
    assert all(reason for reason in loader.broken.values())
    assert torch.equal(loader.load_views(_position_of(loader, 4))[0], _views_of_row(loader, 6, visit=0))


def _position_of(loader: Loader, row: int) -> int:
    return next(p for p in range(13) if permute(p, 13, hash((loader.seed, 0)) & (2**64 - 1)) == row)


def _views_of_row(loader: Loader, row: int, visit: int):
    return multi_crop(decode(loader.index.read(row)), loader.crops, generator(loader.seed, row, visit))[0]


def test_no_readable_image_at_all_is_an_error(index):
    with pytest.raises(UsageError, match="none of the 2 images can be read"):
        make_loader(index.take([4, 5])).load_views(0)


def test_a_batch_that_ranks_cannot_share_is_refused(index):
    with pytest.raises(UsageError, match="batch 4 does not divide over 3 ranks"):
        make_loader(index, world_size=3)


def test_no_local_crops(index):
    (batch,) = take(replace(make_loader(index), crops=replace(CROPS, locals=0)), 0, 1)
    assert batch.locals_VBCHW.shape == (0, 4, 3, 8, 8)
    (with_locals,) = take(make_loader(index), 0, 1)
    assert batch.globals_GBCHW.shape == with_locals.globals_GBCHW.shape


def test_read_batches_gives_every_readable_image_once_in_order(index):
    broken = {}
    got = list(
        read_batches(
            index, 4, lambda images: torch.tensor([im.shape[0] for im in images]), join=torch.cat, broken=broken
        )
    )
    rows = [r for rows, _ in got for r in rows]
    assert rows == [0, 1, 2, 3, 6, 7, 8, 9, 10, 11, 12]
    assert torch.cat([x for _, x in got]).tolist() == [20 + r for r in rows]
    assert sorted(broken) == [4, 5]


@pytest.mark.parametrize("length", [1, 13, 1009])
def test_every_image_is_seen_once_a_pass_whatever_the_batch(index, length):
    """No batch size divides a prime number of images; ranks share the images."""
    table = index.table.take([0] * length)
    loader = replace(make_loader(index, batch_size=6), index=replace(index, table=table))
    ranks = [replace(loader, rank=rank, world_size=3) for rank in range(3)]
    rows = [row for batch in range(length) for rank in ranks for row in rank.rows(batch)]  # six passes in all
    for visit in range(6):
        assert sorted(rows[visit * length : (visit + 1) * length]) == list(range(length))


@pytest.mark.parametrize("weights", [(1.0,), (1.0, 1.0), (3.0, 1.0), (0.1, 0.2, 0.7), (5.0, 0.001, 2.0)])
def test_sources_are_assigned_by_weight_each_in_order(weights):
    count = 3000
    assigned = [assign_source(position, weights) for position in range(count)]
    for source, weight in enumerate(weights):
        places = [place for owner, place in assigned if owner == source]
        assert places == list(range(len(places)))  # none left out, none twice
        for end in (10, 100, count):
            share = sum(owner == source for owner, _ in assigned[:end])
            assert abs(share - end * weight / sum(weights)) < len(weights)


def test_sources_are_mixed_by_weight(tmp_path):
    for name, count in (("a", 5), ("b", 20)):
        (tmp_path / name).mkdir()
        for i in range(count):
            Image.new("RGB", (20, 20), (i, 0, 0)).save(tmp_path / name / f"{i:02d}.png")
    both = open_source(tmp_path / "a", tmp_path / "b")
    assert both.source_lengths == (5, 20)
    mixed = make_loader(both, weights=(1.0, 1.0))
    rows = [row for batch in range(10) for row in mixed.rows(batch)]
    assert sorted(row for row in rows if row < 5) == sorted(list(range(5)) * 4)
    assert sorted(row for row in rows if row >= 5) == list(range(5, 25))
    assert rows != [row for batch in range(10) for row in make_loader(both).rows(batch)]
    halves = [replace(mixed, rank=rank, world_size=2).rows(7) for rank in range(2)]
    assert halves[0] + halves[1] == mixed.rows(7)


@pytest.mark.parametrize(
    ("weights", "message"),
    [((1.0,), "data names 2 sources, so give 2 weights"), ((1.0, 0.0), "weights 0: must be above 0")],
)
def test_weights_that_do_not_fit_are_refused(index, weights, message):
    with pytest.raises(UsageError, match=message):
        make_loader(replace(index, source_lengths=(6, 7)), weights=weights)


def test_processes_give_the_same_as_threads_and_report_broken_images(index):
    threads, processes = make_loader(index), make_loader(index, processes=2)
    assert all(same(a, b) for a, b in zip(take(threads, 0, 5), take(processes, 0, 5), strict=True))
    assert processes.broken == threads.broken


def test_attacked_batches_are_a_function_of_the_step_too(index):
    crops = replace(CROPS, attack=0.9)
    six = take(make_loader(index, crops=crops, threads=1), 0, 6)
    for other in ({"threads": 4}, {"processes": 2}):
        assert all(
            same(a, b) for a, b in zip(six[2:], take(make_loader(index, crops=crops, **other), 2, 4), strict=True)
        )
    assert not same(six[0], take(make_loader(index), 0, 1)[0])


def test_large_jpegs_are_decoded_reduced_and_cropped_alike(tmp_path, monkeypatch):
    random = np.random.default_rng(0)
    rough = Image.fromarray(random.integers(0, 255, (30, 40, 3), dtype=np.uint8))
    rough.resize((1600, 1200), Image.Resampling.BICUBIC).save(tmp_path / "large.jpg", quality=95)
    loader, sizes = make_loader(open_source(tmp_path), batch_size=1), []
    small = [loader.load_views(position)[:2] for position in range(10)]
    monkeypatch.setattr("troodon.views.crops.MARGIN", 1e9)
    whole = [loader.load_views(position)[:2] for position in range(10)]
    for a, b in zip(small, whole, strict=True):
        for x, y in zip(a, b, strict=True):
            sizes.append((x.float() - y.float()).abs().mean().item())
    assert 0 < np.mean(sizes) < 3  # of 255: boxes are rounded to pixels eight times as large


def test_advice_names_what_is_known_to_help(index):
    assert any("troodon pack --side" in line for line in make_loader(index).advice())
    assert make_loader(index, threads=1, world_size=1).advice()[0].startswith("more threads") or os.cpu_count() == 1
