"""The embedded world: endless procedural pictures with class, mask, depth and identity, from nothing but a seed.

It lets the whole system be shown without any download. This file puts a world on the disk, as a crawl would find it:

    curated/<species>/*             few, labelled
    uncurated/*                     an anonymous pool, with near-duplicates, off-topic pictures and broken files
    evaluation/{train,val}/<species>/*
    dense/{images,masks,depth}/*    masks: 0 background, 1 body, 2 another thing; depth: 16-bit PNG, millimetres
    truth.parquet                   what every image file really is
    manifest.json

    world_scene.py      one picture             world_shapes.py    its species, as polygons
    world_surfaces.py   textures and habitats   world_offtopic.py  what else a crawl brings
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
from troodon.views.attacks import ATTACKS, attack
from troodon.world.offtopic import render_offtopic
from troodon.world.scene import DEFAULT, Picture, WorldConfig, render

__all__ = ["DEFAULT", "TRUTH", "Picture", "WorldConfig", "render", "render_offtopic", "write_world"]

_VERSION = 2  # of the generator; another one makes other pictures from the same seed
_EXACT = "exact"  # a copy whose bytes are the original's
_BROKEN = ("truncated", "text", "empty", "noise")
_PNG_SHARE = 0.2
_STRENGTH = (0.25, 0.75)  # of the attacks on planted copies

TRUTH = pa.schema(
    [
        ("path", pa.string()),  # relative to the world's folder, one row per image file
        ("role", pa.string()),  # curated, clean, copy, off-topic, broken, train, val or dense
        ("label", pa.string()),  # species; null for off-topic and broken
        ("identity", pa.int64()),  # of the individual within its species; -1 where there is none
        ("original", pa.string()),  # path of the picture that this is a copy of; else null
        ("attack", pa.string()),  # what was done to the copy: a kind of attacks.ATTACKS, or "exact"; else null
        ("kind", pa.string()),  # of an off-topic picture, or how a file is broken; else null
    ]
)


@dataclass(frozen=True)
class _File:
    """A row of the truth, and the number of the picture to render where there is one."""

    path: str
    role: str
    label: str | None = None
    identity: int = -1
    original: str | None = None
    attack: str | None = None
    kind: str | None = None
    image: int = -1


def write_world(folder: Path, seed: int, config: WorldConfig = DEFAULT) -> dict[str, int]:
    """Put a world into `folder`, whole or not at all; return how many image files there are of each role.

    A folder that already holds this world is left alone; UsageError if it holds another one.
    """
    if config.copies and not config.clean + config.curated:
        raise UsageError(f"copies: {config.copies}, but there is no picture to copy; set clean or curated")
    settings = {"seed": seed, "version": _VERSION, "world": to_dict(config)}
    if not run.is_done(folder, "world", fingerprint(settings), settings):
        with run.publish(folder, "world", fingerprint(settings), settings) as partial:
            files = list(_fill(partial, seed, config))
            columns = {name: [getattr(f, name) for f in files] for name in TRUTH.names}
            pq.write_table(pa.table(columns, schema=TRUTH), partial / "truth.parquet", compression="zstd")
    roles = pq.read_table(folder / "truth.parquet", columns=["role"])["role"].to_pylist()
    return dict(Counter(roles))


def _fill(folder: Path, seed: int, config: WorldConfig) -> Iterator[_File]:
    """Write every file, and yield its truth."""
    own = _pictures(seed, config)
    for done, file in enumerate(own):
        if done % 1000 == 0:
            run.say(f"world: {done} of {len(own)} pictures")
        picture = render(seed, file.image, identity=file.identity, px=config.px, config=config)
        _put(folder, file.path, _encode(picture.image, file.path))
        if file.role == "dense":
            name = f"{Path(file.path).stem}.png"
            _put(folder, f"dense/masks/{name}", _encode(picture.mask, name))
            _put(folder, f"dense/depth/{name}", _encode(np.rint(picture.depth * 1000).astype(np.uint16), name))
        yield file
    for k in range(config.off_topic):
        image, kind = render_offtopic(seed, k, config.px)
        file = _File(_anonymous(seed, "off-topic", k), "off-topic", kind=kind)
        _put(folder, file.path, _encode(image, file.path))
        yield file
    yield from _copies(folder, seed, config, [f for f in own if f.role in ("clean", "curated")])
    for k in range(config.broken):
        file = _File(_anonymous(seed, "broken", k, ".jpg"), "broken", kind=_BROKEN[k % len(_BROKEN)])
        whole = _encode(render(seed, len(own) + k, px=config.px, config=config).image, file.path)
        _put(folder, file.path, _broken(file.kind, whole))
        yield file


def _pictures(seed: int, config: WorldConfig) -> list[_File]:
    """The world's own pictures. Roles share no individual, so nothing in val was ever seen elsewhere."""
    names, files, met = config.species(), [], 0
    per_role = {role: getattr(config, role) * len(names) for role in ("curated", "train", "val")}
    for role, size in {**per_role, "clean": config.clean, "dense": config.dense}.items():
        for k in range(size):
            turn, label = divmod(k, len(names))
            identity = (met + turn // config.poses) * len(names) + label  # so `render` knows the label from it
            path = _path(seed, role, k, names[label])
            files.append(_File(path, role, names[label], identity, image=len(files)))
        met += math.ceil(math.ceil(size / len(names)) / config.poses)
    return files


def _copies(folder: Path, seed: int, config: WorldConfig, known: list[_File]) -> Iterator[_File]:
    """Near-duplicates: a fifth of the originals are curated ones; some originals have several; all attacks in turn."""
    r = np.random.default_rng([seed, 3])
    kinds = [*ATTACKS, _EXACT]
    pools = [pool for pool in ([f for f in known if f.role == role] for role in ("clean", "curated")) if pool]
    done = 0
    while done < config.copies:
        pool = pools[-1 if r.random() < 0.2 else 0]
        original = pool[int(r.integers(len(pool)))]
        data = (folder / original.path).read_bytes()
        for k in range(done, min(config.copies, done + int(r.geometric(0.6)))):
            kind = kinds[k % len(kinds)]
            path = _anonymous(seed, "copy", k, Path(original.path).suffix if kind == _EXACT else None)
            copy = data if kind == _EXACT else _encode(_attacked(data, kind, r), path)
            _put(folder, path, copy)
            yield replace(original, path=path, role="copy", original=original.path, attack=kind)
            done += 1


def _attacked(data: bytes, kind: str, r: np.random.Generator) -> np.ndarray:
    return attack(Image.open(io.BytesIO(data)), kind, r, r.uniform(*_STRENGTH))


def _broken(kind: str | None, whole: bytes) -> bytes:
    return {
        "truncated": whole[: len(whole) * 2 // 5],
        "text": b"<html><body>404: there is no such picture</body></html>\n",
        "empty": b"",
        "noise": hashlib.sha256(whole).digest() * 30,
    }[kind or ""]


def _path(seed: int, role: str, k: int, species: str) -> str:
    if role == "clean":
        return _anonymous(seed, role, k)
    where = {"curated": f"curated/{species}", "dense": "dense/images"}.get(role, f"evaluation/{role}/{species}")
    return f"{where}/{_name(seed, role, k)}"


def _anonymous(seed: int, role: str, k: int, suffix: str | None = None) -> str:
    """A place in the flat pool, which says nothing about what lies there."""
    return f"uncurated/{_name(seed, role, k, suffix)}"


def _name(seed: int, role: str, k: int, suffix: str | None = None) -> str:
    digest = hashlib.sha256(f"{seed}/{role}/{k}".encode()).hexdigest()
    return digest[:12] + (suffix or (".png" if int(digest[-4:], 16) < _PNG_SHARE * 0x10000 else ".jpg"))


def _encode(pixels: np.ndarray, name: str) -> bytes:
    """PNG or JPEG, as the name says."""
    file = io.BytesIO()
    if name.endswith(".png"):
        Image.fromarray(pixels).save(file, "PNG")
    else:
        Image.fromarray(pixels).save(file, "JPEG", quality=92)
    return file.getvalue()


def _put(folder: Path, path: str, data: bytes) -> None:
    # Not run.write_bytes: the whole folder is published at once, and flushing thousands of small files takes minutes.
    (folder / path).parent.mkdir(parents=True, exist_ok=True)
    (folder / path).write_bytes(data)
