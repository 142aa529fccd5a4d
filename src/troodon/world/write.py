"""The embedded world: endless procedural pictures with class, mask, depth and identity, from a seed alone.

It allows a demonstration of the whole system without any download. This module writes a world to disk, in the form in
which a crawl would find it:

    curated/<species>/*             few, labelled
    uncurated/*                     an anonymous pool, with near-duplicates, off-topic pictures and broken files
    evaluation/{train,val}/<species>/*
    dense/{images,masks,depth}/*    masks: 0 background, 1 body, 2 another object; depth: 16-bit PNG, millimetres
    truth.parquet                   the ground truth of every image file
    manifest.json

    scene.py      one picture             shapes.py     its species, as polygons
    surfaces.py   textures and habitats   offtopic.py   images that show no species
"""

import hashlib
import io
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from troodon import run
from troodon.config import UsageError, fingerprint, to_dict
from troodon.progress import watched
from troodon.views.attacks import ATTACKS, attack
from troodon.world.offtopic import render_offtopic
from troodon.world.scene import DEFAULT, Picture, WorldConfig, render

__all__ = ["DEFAULT", "TRUTH_SCHEMA", "Picture", "WorldConfig", "render", "render_offtopic", "write_world"]

_VERSION = 2  # of the generator; another version makes other pictures from the same seed
_EXACT = "exact"  # a byte-identical copy
_BROKEN = ("truncated", "text", "empty", "noise")
_PNG_SHARE = 0.2
_STRENGTH = (0.25, 0.75)  # of attacks

TRUTH_SCHEMA = pa.schema(
    [
        ("path", pa.string()),  # relative to the world's folder, one row per image file
        ("role", pa.string()),  # curated, clean, copy, off-topic, broken, train, val or dense
        ("label", pa.string()),  # species; null for off-topic and broken
        ("identity", pa.int64()),  # of the individual within its species; -1 where there is none
        ("original", pa.string()),  # path of the original of a copy; else null
        ("attack", pa.string()),  # of a copy: a kind of attacks.ATTACKS, or "exact"; else null
        ("kind", pa.string()),  # of an off-topic picture, or of the damage of a broken file; else null
    ]
)


@dataclass(frozen=True)
class _File:
    """A row of the ground truth, and the number of the picture to render, if there is one."""

    path: str
    role: str
    label: str | None = None
    identity: int = -1
    original: str | None = None
    attack: str | None = None
    kind: str | None = None
    image: int = -1


def write_world(folder: Path, seed: int, config: WorldConfig = DEFAULT) -> dict[str, int]:
    """Write a world to `folder`, completely or not at all; return the number of image files of each role.

    A folder that already holds this world is not changed. Raises UsageError if it holds something else.
    """
    if config.copies and not config.clean + config.curated:
        raise UsageError(f"copies: {config.copies}, but there is no picture to copy; set clean or curated")
    settings = {"seed": seed, "version": _VERSION, "world": to_dict(config)}
    if not run.is_done(folder, "world", fingerprint(settings), settings):
        with run.publish(folder, "world", fingerprint(settings), settings) as partial:
            files = list(_fill(partial, seed, config))
            columns = {name: [getattr(f, name) for f in files] for name in TRUTH_SCHEMA.names}
            pq.write_table(pa.table(columns, schema=TRUTH_SCHEMA), partial / "truth.parquet", compression="zstd")
    roles = pq.read_table(folder / "truth.parquet", columns=["role"])["role"].to_pylist()
    return dict(Counter(roles))


def _fill(folder: Path, seed: int, config: WorldConfig) -> Iterator[_File]:
    """Write every file, and yield its ground truth."""
    pictures = _pictures(seed, config)
    for file in watched(pictures, "world", "pictures"):
        picture = render(seed, file.image, identity=file.identity, px=config.px, config=config)
        _write_file(folder, file.path, _encode(picture.image, file.path))
        if file.role == "dense":
            name = f"{Path(file.path).stem}.png"
            _write_file(folder, f"dense/masks/{name}", _encode(picture.mask, name))
            _write_file(folder, f"dense/depth/{name}", _encode(np.rint(picture.depth * 1000).astype(np.uint16), name))
        yield file
    for k in range(config.off_topic):
        image, kind = render_offtopic(seed, k, config.px)
        file = _File(_pool_path(seed, "off-topic", k), "off-topic", kind=kind)
        _write_file(folder, file.path, _encode(image, file.path))
        yield file
    yield from _copies(folder, seed, config, [f for f in pictures if f.role in ("clean", "curated")])
    for k in range(config.broken):
        file = _File(_pool_path(seed, "broken", k, ".jpg"), "broken", kind=_BROKEN[k % len(_BROKEN)])
        data = _encode(render(seed, len(pictures) + k, px=config.px, config=config).image, file.path)
        _write_file(folder, file.path, _damage(file.kind, data))
        yield file


def _pictures(seed: int, config: WorldConfig) -> list[_File]:
    """The pictures of the world. Roles share no individual, so no individual of val occurs elsewhere."""
    names, files, used = config.species(), [], 0
    per_role = {role: getattr(config, role) * len(names) for role in ("curated", "train", "val")}
    for role, size in {**per_role, "clean": config.clean, "dense": config.dense}.items():
        for k in range(size):
            number, label = divmod(k, len(names))
            identity = (used + number // config.poses) * len(names) + label  # from which `render` knows the label
            path = _path(seed, role, k, names[label])
            files.append(_File(path, role, names[label], identity, image=len(files)))
        used += math.ceil(math.ceil(size / len(names)) / config.poses)
    return files


def _copies(folder: Path, seed: int, config: WorldConfig, originals: list[_File]) -> Iterator[_File]:
    """Near-duplicates: a fifth of the originals are curated; some originals have several copies; all attacks occur."""
    r = np.random.default_rng([seed, 3])
    kinds = [*ATTACKS, _EXACT]
    pools = [pool for pool in ([f for f in originals if f.role == role] for role in ("clean", "curated")) if pool]
    done = 0
    while done < config.copies:
        pool = pools[-1 if r.random() < 0.2 else 0]
        original = pool[int(r.integers(len(pool)))]
        data = (folder / original.path).read_bytes()
        for k in range(done, min(config.copies, done + int(r.geometric(0.6)))):
            kind = kinds[k % len(kinds)]
            path = _pool_path(seed, "copy", k, Path(original.path).suffix if kind == _EXACT else None)
            copy = data if kind == _EXACT else _encode(_attack_file(data, kind, r), path)
            _write_file(folder, path, copy)
            yield replace(original, path=path, role="copy", original=original.path, attack=kind)
            done += 1


def _attack_file(data: bytes, kind: str, r: np.random.Generator) -> np.ndarray:
    return attack(Image.open(io.BytesIO(data)), kind, r, r.uniform(*_STRENGTH))


def _damage(kind: str | None, data: bytes) -> bytes:
    return {
        "truncated": data[: len(data) * 2 // 5],
        "text": b"<html><body>404: there is no such picture</body></html>\n",
        "empty": b"",
        "noise": hashlib.sha256(data).digest() * 30,
    }[kind or ""]


def _path(seed: int, role: str, k: int, species: str) -> str:
    if role == "clean":
        return _pool_path(seed, role, k)
    folder = {"curated": f"curated/{species}", "dense": "dense/images"}.get(role, f"evaluation/{role}/{species}")
    return f"{folder}/{_name(seed, role, k)}"


def _pool_path(seed: int, role: str, k: int, suffix: str | None = None) -> str:
    """A path in the flat pool; it says nothing about the picture."""
    return f"uncurated/{_name(seed, role, k, suffix)}"


def _name(seed: int, role: str, k: int, suffix: str | None = None) -> str:
    digest = hashlib.sha256(f"{seed}/{role}/{k}".encode()).hexdigest()
    return digest[:12] + (suffix or (".png" if int(digest[-4:], 16) < _PNG_SHARE * 0x10000 else ".jpg"))


def _encode(pixels: np.ndarray, name: str) -> bytes:
    """Encode as PNG or JPEG, by the extension of `name`."""
    file = io.BytesIO()
    if name.endswith(".png"):
        Image.fromarray(pixels).save(file, "PNG")
    else:
        Image.fromarray(pixels).save(file, "JPEG", quality=92)
    return file.getvalue()


def _write_file(folder: Path, path: str, data: bytes) -> None:
    # Not run.write_bytes: the folder is published as a whole, and to flush thousands of small files takes minutes.
    (folder / path).parent.mkdir(parents=True, exist_ok=True)
    (folder / path).write_bytes(data)
