"""Curation in trouble: does it end in the same bytes as if nothing had happened?

    python benchmarks/curate_faults.py [--quick] [--parts kills nodes] [--kills 20] [--disk FOLDER]

A pool of pictures with attacked copies, a truncated tar and files broken in 36 ways is curated by `troodon curate`,
with two processes, undisturbed; its ledger must name every broken file, and have a row for every image. Then again and
again from the start, and at a random moment `kill -9` ends the main process or a worker; a killed main process is
started again by the same command. Then by a Ray cluster of two nodes and a head that does no units: undisturbed, and
with a node killed as one stage begins, each stage in its turn. `--disk` names a folder on a small file system (a tmpfs
of some MB): it is filled while curation works there, then emptied, and the same command goes on. `ours` are the runs
that ended in the same ledger, groups, hits and fingerprint, byte for byte; `rival` is how many there were.
"""

import argparse
import hashlib
import io
import json
import os
import random
import signal
import struct
import subprocess
import sys
import tarfile
import tempfile
import time
import zlib
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

FOLDERS = ("curated", "pool", "benchmark")
STAGES = ("embed", "compare", "centres", "probes", "layout", "join", "disguises", "leaks", "look-alikes", "retrieve",
          "gather")  # fmt: skip
COMPARED = ("images.parquet", "groups.parquet", "hits.parquet", "embeddings/embeddings.npy", "embeddings/pixels.npy")


def picture(seed: int) -> np.ndarray:
    low = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(low).resize((96, 72), Image.Resampling.BICUBIC))


def encoded(pixels: np.ndarray, kind: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def broken() -> dict[str, bytes]:
    """Files that are no whole picture, each in its own way."""
    found = {"empty.jpg": b"", "text.png": b"<html>no</html>", "zeros.jpg": bytes(5000)}
    for kind in ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF"):
        whole = encoded(picture(7), kind)
        for cut in (0.02, 0.3, 0.6, 0.9):
            found[f"cut{cut}.{kind.lower()}"] = whole[: int(len(whole) * cut)]
    chance = np.random.default_rng(1)
    for kind in ("JPEG", "PNG", "WEBP"):
        damaged = bytearray(encoded(picture(8), kind))
        for at in chance.integers(0, len(damaged), 40):
            damaged[at] = int(chance.integers(256))
        found[f"damaged.{kind.lower()}"] = bytes(damaged)
    whole = encoded(picture(9), "PNG")
    sized = struct.pack(">4sII", b"IHDR", 60_000, 60_000) + whole[24:29]  # of 3.6 billion pixels, it says
    found["huge.png"] = whole[:12] + sized + struct.pack(">I", zlib.crc32(sized)) + whole[33:]
    found["checksum.png"] = whole[:29] + bytes(4) + whole[33:]
    found["headless.jpg"] = encoded(picture(9), "JPEG")[2:]
    found["noise.jpg"] = chance.bytes(5000)
    found["document.jpg"] = b"%PDF-1.7\n" + chance.bytes(2000)
    found["sound.webp"] = b"RIFF" + struct.pack("<I", 2036) + b"WAVEfmt " + chance.bytes(2024)
    return found


def prepare(home: Path, images: int) -> None:
    """Curated pictures, a pool, and an untrained backbone: what it says plays no part here."""
    from troodon.model.backbone import Backbone
    from troodon.model.config import Preprocessing, ViTConfig
    from troodon.views.attacks import attack

    chance = np.random.default_rng(0)
    for folder in FOLDERS:
        (home / folder).mkdir()
    for i in range(20):
        (home / "curated" / f"{i}.png").write_bytes(encoded(picture(i), "PNG"))
        (home / "benchmark" / f"{i}.png").write_bytes(encoded(picture(1000 + 7 * i), "PNG"))
    for i in range(images):
        pixels = picture(1000 + i) if i % 5 else attack(picture(1000 + i + 1), "jpeg", chance, 0.3)
        (home / "pool" / f"{i:05d}.jpg").write_bytes(encoded(pixels, "JPEG"))
    for name, data in broken().items():
        (home / "pool" / name).write_bytes(data)
    with tarfile.open(home / "pool" / "cut.tar", "w") as tar:
        for i in range(50):
            data = encoded(picture(9000 + i), "PNG")
            info = tarfile.TarInfo(f"{i:03d}.png")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    whole = (home / "pool" / "cut.tar").read_bytes()
    (home / "pool" / "cut.tar").write_bytes(whole[: int(len(whole) * 0.7)])
    network = ViTConfig(dim=48, depth=2, heads=2, patch=8, grid=4, layer_scale=1.0)
    Backbone.random(network, Preprocessing(resize=32, crop=32)).save(home / "backbone")


def start(home: Path, out: Path, *engine: str, **environment: str) -> subprocess.Popen:
    words = ["curate", "curate_small", "--curated", home / "curated", "--uncurated", home / "pool",
             "--benchmark", home / "benchmark", "--backbone", home / "backbone", "--out", out, "--part", "64",
             "--calibration-images", "40", "--search", "lists", "--batch", "16",
             *(engine or ("--workers", "2"))]  # fmt: skip
    return subprocess.Popen(
        [sys.executable, "-m", "troodon", *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
    )  # fmt: skip


def end(process: subprocess.Popen) -> tuple[int, str]:
    _, said = process.communicate(timeout=300)
    return process.returncode, said


def children(process: int) -> list[int]:
    try:
        return [int(p) for p in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
    except OSError:
        return []


def told(out: Path) -> str:
    digest = hashlib.sha256(json.loads((out / "manifest.json").read_text())["fingerprint"].encode())
    for name in COMPARED:
        digest.update((out / name).read_bytes())
    return digest.hexdigest()


def killed(home: Path, out: Path, chance: random.Random, seconds: float, whom: str) -> str | None:
    """Curate with one kill at a random moment; what came of it. None where all was done before."""
    process, until = start(home, out), time.monotonic() + chance.uniform(0.15, 0.9) * seconds
    while time.monotonic() < until and process.poll() is None:
        time.sleep(0.01)
    workers = children(process.pid)
    victim = process.pid if whom == "main" or not workers else chance.choice(workers)
    struck = process.poll() is None
    if struck:
        os.kill(victim, signal.SIGKILL)
    code, said = end(process)
    if not struck:
        return None
    if victim == process.pid:
        assert out.exists() == (out / "manifest.json").exists()
        code, said = end(start(home, out))
    assert code == 0, said
    return told(out)


def named(home: Path, out: Path) -> int:
    """How many files the ledger names as broken: those that were made so, all and alone, among a row for each image."""
    rows = pq.read_table(out / "images.parquet").to_pylist()
    found = {Path(row["path"]).name: row["reason"] for row in rows if row["stage"] == "decode"}
    assert found.keys() == broken().keys(), found.keys() ^ broken().keys()
    assert all(found.values()), found
    assert not any(row["kept"] for row in rows if row["stage"] == "decode")
    files = [path for folder in FOLDERS for path in (home / folder).iterdir() if path.suffix != ".tar"]
    assert len(rows) - sum("cut.tar" in row["path"] for row in rows) == len(files)
    return len(found)


def nodes_lost(home: Path, calm: str) -> int | None:
    """Whole curations by a Ray cluster, in each of which a node dies: how many ended the same. None without Ray."""
    try:
        from ray.cluster_utils import Cluster
    except ImportError:
        return print("ray is not installed: no node is killed")
    same = 0
    for stage in ("", *STAGES):
        out = home / f"ray-{stage}"
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        nodes, began = [cluster.add_node(num_cpus=1) for _ in range(2)], time.monotonic()
        process = start(home, out, "--engine", "ray", RAY_ADDRESS=cluster.address)
        if stage:
            begun = f"{out.name}.work/{'embeddings.parts/' if stage == 'embed' else ''}{stage}-*"
            while process.poll() is None and not list(home.glob(begun)):
                time.sleep(0.002)
            lost = process.poll() is None
            cluster.remove_node(nodes[len(stage) % 2], allow_graceful=False)
            assert lost, f"{stage} was not seen"
        code, said = end(process)
        cluster.shutdown()
        assert code == 0, said
        if stage:
            same += told(out) == calm
        else:
            assert told(out) == calm, "by Ray, undisturbed"
        what, seconds = f"a node lost in {stage}" if stage else "undisturbed", time.monotonic() - began
        print(f"Ray, {what}: {seconds:.1f} s; {same} of those that lost one the same", flush=True)
    return same


def full_disk(home: Path, disk: Path) -> bool:
    """Fill a small file system while curation works there; whether it fails, goes on and ends as it should."""
    process, filler = start(home, disk / "selection"), disk / "filler"
    while not list(disk.glob("selection.work/**/00001")) and process.poll() is None:
        time.sleep(0.01)
    with open(filler, "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(65536))
        except OSError:
            pass
    code, said = end(process)
    print(f"full disk: exit {code}: {said.strip().splitlines()[-1][:160]}")
    failed = code == 1 and not (disk / "selection").exists()
    filler.unlink()
    code, said = end(start(home, disk / "selection"))
    assert code == 0, said
    return failed and told(disk / "selection") == told(home / "calm")


def kills(home: Path, count: int, seconds: float, calm: str) -> int:
    """How many curations with a kill ended the same."""
    chance, same, struck, turn = random.Random(0), 0, 0, 0
    while struck < count:
        out, whom = home / f"out{turn}", "main" if struck % 2 else "worker"
        if (ended := killed(home, out, chance, seconds, whom)) is None:
            seconds *= 0.9  # the machine has become faster
        else:
            struck, same = struck + 1, same + (ended == calm)
            print(f"kill {struck}, {whom}: {same} of {struck} the same", flush=True)
        turn += 1
    return same


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two kills, and no nodes")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--parts", nargs="+", default=["kills", "nodes"], choices=["kills", "nodes"])
    parser.add_argument("--images", type=int, default=600)
    parser.add_argument("--disk", type=Path)
    given = parser.parse_args()
    if given.quick:
        given.kills, given.parts, given.images = 2, ["kills"], 200
    rows = []
    with tempfile.TemporaryDirectory(prefix="troodon-faults-") as folder:
        home = Path(folder)
        prepare(home, given.images)
        began = time.monotonic()
        code, said = end(start(home, home / "calm"))
        assert code == 0, said
        seconds, calm = time.monotonic() - began, told(home / "calm")
        summary = json.loads((home / "calm" / "summary.json").read_text())
        print(f"undisturbed: {seconds:.1f} s; " + ", ".join(f"{s['name']} -{s['dropped']}" for s in summary["stages"]))
        settings = {"images": summary["images"], "broken": named(home, home / "calm")}
        if given.disk:
            settings["full_disk"] = full_disk(home, given.disk)
        if "kills" in given.parts:
            rows.append(("same_after_kill", kills(home, given.kills, seconds, calm), given.kills))
        if "nodes" in given.parts and (same := nodes_lost(home, calm)) is not None:
            rows.append(("same_after_lost_node", same, len(STAGES)))
    print(json.dumps([{"name": name, "ours": ours, "rival": rival, "ratio": ours / rival, "unit": "runs",
                       "settings": settings} for name, ours, rival in rows]))  # fmt: skip


if __name__ == "__main__":
    main()
