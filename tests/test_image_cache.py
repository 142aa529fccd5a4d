"""Decoded images that stay in memory change no batch, and take no more memory than they may."""

import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import troodon
from troodon import recipes
from troodon.images import cache
from troodon.images.cache import CachedIndex, cached, free_memory
from troodon.images.index import Index
from troodon.images.sources import open_source
from troodon.model.backbone import Backbone
from troodon.model.config import Preprocessing
from troodon.views.attacks import random_attack
from troodon.views.config import CropsConfig, MasksConfig, PhotometricConfig
from troodon.views.loader import Loader

CROPS = CropsConfig(local_px=8, locals=3, mixed=((16, 8, 1.0), (32, 8, 1.0)), mixed_by="progress")
GIB = 2**30


@pytest.fixture
def index(tmp_path, monkeypatch):
    """JPEGs, which are decoded reduced, and PNGs, which are not; one file is broken."""
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    random = np.random.default_rng(0)
    for i in range(8):
        rough = Image.fromarray(random.integers(0, 255, (9, 12, 3), dtype=np.uint8))
        name = f"{i}.{'jpg' if i % 2 else 'png'}"
        rough.resize((160 + 80 * i, 120 + 60 * i), Image.Resampling.BICUBIC).save(tmp_path / name)
    (tmp_path / "broken.jpg").write_bytes(b"nothing")
    return open_source(tmp_path)


def make_loader(index, **changes) -> Loader:
    settings = {"crops": CROPS, "patch": 4, "batch_size": 4, "seed": 7, "threads": 2, "progress": lambda b: b / 12}
    return Loader(
        index, photometric=PhotometricConfig(), masks=MasksConfig(), attack=random_attack, **settings | changes
    )


def take(loader: Loader, first: int, count: int) -> list:
    batches = loader.batches(first, torch.device("cpu"))
    taken = [next(batches) for _ in range(count)]
    batches.close()
    return taken


@pytest.mark.parametrize("changes", [{}, {"crops": replace(CROPS, attack=0.9)}], ids=["plain", "attacks"])
def test_batches_are_the_same_with_and_without(index, changes):
    plain, kept = make_loader(index, **changes), make_loader(cached(index, 1.0), **changes)
    batches = take(plain, 0, 12)
    assert {batch.globals_GBCHW.shape[-1] for batch in batches} == {16, 32}
    for a, b in zip(batches, take(kept, 0, 12), strict=True):
        for name in ("globals_GBCHW", "locals_VBCHW", "masks_NP", "images_B2"):
            assert torch.equal(getattr(a, name), getattr(b, name))
    assert kept.broken == plain.broken != {}
    assert len(kept.index.cache.images) == 8


def test_each_image_is_decoded_once_for_each_size(index, monkeypatch):
    decoded, read = [], Index.read
    monkeypatch.setattr(Index, "read", lambda self, row: decoded.append(row) or read(self, row))
    kept = cached(index, 1.0)
    whole = [kept.decode(row) for row in range(8)]
    assert all(kept.decode(row) is pixels for row, pixels in enumerate(whole))
    assert decoded == list(range(8))
    jpeg, png = 7, 6
    halves = [kept.decode(row, 3, lambda height, width: 2) for row in (jpeg, png)]
    assert halves[0].shape[0] == whole[jpeg].shape[0] / 2
    assert halves[1] is whole[png]  # kept once: this format is not reduced
    assert kept.decode(jpeg, 3, lambda height, width: 2) is halves[0]
    assert len(decoded) == 10
    assert kept.cache.bytes == sum(x.nbytes + cache.OVERHEAD for x in [*whole, halves[0]])
    with pytest.raises(ValueError, match="read-only"):
        whole[0][0] = 0


def test_images_that_do_not_all_fit_are_not_kept(index, monkeypatch):
    one = cached(index, 1.0)
    one.decode(0)
    size = one.cache.bytes
    kept = cached(index, 4 * size / GIB)  # the later ones are larger
    for row in range(8):
        kept.decode(row)
    assert kept.cache.is_closed
    assert (kept.cache.images, kept.cache.bytes) == ({}, 0)
    assert np.array_equal(kept.decode(7), index.decode(7))
    monkeypatch.setattr(cache, "SAMPLE", 1)  # the mean of the first image tells, before memory is full
    early = cached(index, 4 * size / GIB)
    early.decode(0)
    assert early.cache.is_closed


def test_other_rows_are_other_images(index):
    kept = cached(index, 1.0)
    first, last = kept.decode(0), kept.take([7, 0])
    assert np.array_equal(last.decode(0), index.decode(7))
    assert np.array_equal(last.decode(1), first)


def test_memory_is_shared_by_ranks_and_processes(index, monkeypatch):
    assert cached(index, 0.0) is index
    assert cached(index, 2.0).limit == 2 * GIB
    monkeypatch.setattr(cache, "default_threads", lambda: 4)
    kept = cached(index, 2.0)
    kept.decode(0)
    in_a_process = pickle.loads(pickle.dumps(kept))
    assert (in_a_process.limit, in_a_process.cache.images) == (GIB // 2, {})
    assert np.array_equal(in_a_process.decode(1), index.decode(1))
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert cached(index, 2.0).limit == GIB // 2
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert cached(index, 2.0).limit == GIB


def test_free_memory_is_at_most_the_limit_of_the_container(tmp_path, monkeypatch):
    (tmp_path / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:   5000 kB\n")
    monkeypatch.setattr(cache, "AVAILABLE", tmp_path / "meminfo")
    limits = tmp_path / "memory.max", tmp_path / "limit_in_bytes"
    monkeypatch.setattr(cache, "LIMITS", limits)
    assert free_memory() == 5000 * 1024
    limits[0].write_text("max\n")
    assert free_memory() == 5000 * 1024
    limits[1].write_text("4096000\n")
    assert free_memory() == 4_096_000


class Stop(Exception):
    pass


@pytest.mark.parametrize("gib", [None, 0.0])
def test_trainings_keep_their_images(index, tmp_path, monkeypatch, gib):
    kept, settings = [], {"image_cache_gib": gib, "steps": 2}

    def begin(first, index, *_, **__):
        kept.append(isinstance(index, CachedIndex))
        raise Stop

    monkeypatch.setattr("troodon.learn.pretrain.pretrain", begin)
    monkeypatch.setattr("troodon.learn.distill.distill", begin)
    with pytest.raises(Stop):
        troodon.pretrain("demo", tmp_path, tmp_path / "run", settings=settings)
    teacher = Backbone.random(recipes.pretrain("demo").vit, Preprocessing(32, 32), seed=0)
    with pytest.raises(Stop):
        troodon.distill("distill_demo", teacher, tmp_path, tmp_path / "student", settings=settings)
    assert kept == [gib is None] * 2
