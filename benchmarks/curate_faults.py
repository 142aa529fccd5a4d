"""Curation under faults: does it end in the same bytes as an undisturbed run?

    python benchmarks/curate_faults.py [--quick] [--parts kills nodes] [--kills 20] [--disk FOLDER] [--record]

A pool of pictures with attacked copies, a truncated tar and files broken in 36 ways is curated by `troodon curate`,
with two processes, undisturbed. Its ledger must name every broken file, and have a row for every image. Then curation
starts again and again, and at a random moment `kill -9` ends the main process or a worker; the same command restarts a
killed main process. Then a Ray cluster of two nodes and a head that does no units curates: undisturbed, and with a node
killed as a stage begins, once for each stage. `--disk` names a folder on a small file system (a tmpfs of some MB): it
is filled while curation works there, then emptied, and the same command continues. `ours` is the number of runs that
ended in the same ledger, groups, hits and fingerprint, byte for byte; `rival` is the number of runs.
"""

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

from measure import argument_parser, finish, result

FOLDERS = ("curated", "pool", "benchmark")
STAGES = ("embed", "compare", "centres", "probes", "layout", "join", "disguises", "leaks", "look-alikes", "retrieve",
          "gather")  # fmt: skip
COMPARED = ("images.parquet", "groups.parquet", "hits.parquet", "embeddings/embeddings.npy", "embeddings/pixels.npy")


def make_picture(seed: int) -> np.ndarray:
    low = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(low).resize((96, 72), Image.Resampling.BICUBIC))


def encode(pixels: np.ndarray, kind: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def broken_files() -> dict[str, bytes]:
    """Files that are broken pictures, each in a different way."""
    files = {"empty.jpg": b"", "text.png": b"<html>no</html>", "zeros.jpg": bytes(5000)}
    for kind in ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF"):
        whole = encode(make_picture(7), kind)
        for cut in (0.02, 0.3, 0.6, 0.9):
            files[f"cut{cut}.{kind.lower()}"] = whole[: int(len(whole) * cut)]
    generator = np.random.default_rng(1)
    for kind in ("JPEG", "PNG", "WEBP"):
        damaged = bytearray(encode(make_picture(8), kind))
        for at in generator.integers(0, len(damaged), 40):
            damaged[at] = int(generator.integers(256))
        files[f"damaged.{kind.lower()}"] = bytes(damaged)
    whole = encode(make_picture(9), "PNG")
    header = struct.pack(">4sII", b"IHDR", 60_000, 60_000) + whole[24:29]  # claims 3.6 billion pixels
    files["huge.png"] = whole[:12] + header + struct.pack(">I", zlib.crc32(header)) + whole[33:]
    files["checksum.png"] = whole[:29] + bytes(4) + whole[33:]
    files["headless.jpg"] = encode(make_picture(9), "JPEG")[2:]
    files["noise.jpg"] = generator.bytes(5000)
    files["document.jpg"] = b"%PDF-1.7\n" + generator.bytes(2000)
    files["sound.webp"] = b"RIFF" + struct.pack("<I", 2036) + b"WAVEfmt " + generator.bytes(2024)
    return files


def prepare(home: Path, images: int) -> None:
    """Write curated pictures, a pool, a benchmark, and an untrained backbone, whose features do not matter here."""
    from troodon.model.backbone import Backbone
    from troodon.model.config import Preprocessing, ViTConfig
    from troodon.views.attacks import attack

    generator = np.random.default_rng(0)
    for folder in FOLDERS:
        (home / folder).mkdir()
    for i in range(20):
        (home / "curated" / f"{i}.png").write_bytes(encode(make_picture(i), "PNG"))
        (home / "benchmark" / f"{i}.png").write_bytes(encode(make_picture(1000 + 7 * i), "PNG"))
    for i in range(images):
        pixels = make_picture(1000 + i) if i % 5 else attack(make_picture(1000 + i + 1), "jpeg", generator, 0.3)
        (home / "pool" / f"{i:05d}.jpg").write_bytes(encode(pixels, "JPEG"))
    for name, data in broken_files().items():
        (home / "pool" / name).write_bytes(data)
    with tarfile.open(home / "pool" / "cut.tar", "w") as tar:
        for i in range(50):
            data = encode(make_picture(9000 + i), "PNG")
            info = tarfile.TarInfo(f"{i:03d}.png")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    whole = (home / "pool" / "cut.tar").read_bytes()
    (home / "pool" / "cut.tar").write_bytes(whole[: int(len(whole) * 0.7)])
    network = ViTConfig(dim=48, depth=2, heads=2, patch=8, grid=4, layer_scale=1.0)
    Backbone.random(network, Preprocessing(resize=32, crop=32)).save(home / "backbone")


def start(home: Path, out: Path, *backend: str, **environment: str) -> subprocess.Popen:
    """Start a curation into `out`, by two workers or by this backend."""
    words = ["curate", "curate_small", "--curated", home / "curated", "--uncurated", home / "pool",
             "--benchmark", home / "benchmark", "--backbone", home / "backbone", "--out", out, "--part", "64",
             "--calibration-images", "40", "--search", "lists", "--batch", "16",
             *(backend or ("--workers", "2"))]  # fmt: skip
    return subprocess.Popen(
        [sys.executable, "-m", "troodon", *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
    )  # fmt: skip


def wait(process: subprocess.Popen) -> tuple[int, str]:
    """The exit code and messages of a curation."""
    _, messages = process.communicate(timeout=300)
    return process.returncode, messages


def children(process: int) -> list[int]:
    """The process ids of the children of a process."""
    try:
        return [int(p) for p in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
    except OSError:
        return []


def digest(out: Path) -> str:
    """A hash of the fingerprint and of all files that must be the same."""
    hashed = hashlib.sha256(json.loads((out / "manifest.json").read_text())["fingerprint"].encode())
    for name in COMPARED:
        hashed.update((out / name).read_bytes())
    return hashed.hexdigest()


def curate_with_kill(home: Path, out: Path, generator: random.Random, seconds: float, victim: str) -> str | None:
    """The digest of a curation with one kill at a random moment. None if it ended before the kill."""
    process, until = start(home, out), time.monotonic() + generator.uniform(0.15, 0.9) * seconds
    while time.monotonic() < until and process.poll() is None:
        time.sleep(0.01)
    workers = children(process.pid)
    process_id = process.pid if victim == "main" or not workers else generator.choice(workers)
    was_killed = process.poll() is None
    if was_killed:
        os.kill(process_id, signal.SIGKILL)
    code, messages = wait(process)
    if not was_killed:
        return None
    if process_id == process.pid:
        assert out.exists() == (out / "manifest.json").exists()
        code, messages = wait(start(home, out))
    assert code == 0, messages
    return digest(out)


def count_named(home: Path, out: Path) -> int:
    """The number of files that the ledger names as broken: exactly those that are, among a row for each image."""
    rows = pq.read_table(out / "images.parquet").to_pylist()
    reasons = {Path(row["path"]).name: row["reason"] for row in rows if row["stage"] == "decode"}
    assert reasons.keys() == broken_files().keys(), reasons.keys() ^ broken_files().keys()
    assert all(reasons.values()), reasons
    assert not any(row["kept"] for row in rows if row["stage"] == "decode")
    files = [path for folder in FOLDERS for path in (home / folder).iterdir() if path.suffix != ".tar"]
    assert len(rows) - sum("cut.tar" in row["path"] for row in rows) == len(files)
    return len(reasons)


def lose_nodes(home: Path, undisturbed: str) -> int | None:
    """The number of curations by a Ray cluster that lost a node and ended the same. None without Ray."""
    try:
        from ray.cluster_utils import Cluster
    except ImportError:
        return print("ray is not installed: the part `nodes` is skipped")
    same = 0
    for stage in ("", *STAGES):
        out = home / f"ray-{stage}"
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        nodes, start_time = [cluster.add_node(num_cpus=1) for _ in range(2)], time.monotonic()
        process = start(home, out, "--backend", "ray", RAY_ADDRESS=cluster.address)
        if stage:
            pattern = f"{out.name}.work/{'embeddings.parts/' if stage == 'embed' else ''}{stage}-*"
            while process.poll() is None and not list(home.glob(pattern)):
                time.sleep(0.002)
            running = process.poll() is None
            cluster.remove_node(nodes[len(stage) % 2], allow_graceful=False)
            assert running, f"the curation ended before the stage {stage} began"
        code, messages = wait(process)
        cluster.shutdown()
        assert code == 0, messages
        if stage:
            same += digest(out) == undisturbed
        else:
            assert digest(out) == undisturbed, "by Ray, undisturbed"
        case, seconds = f"a node lost in {stage}" if stage else "undisturbed", time.monotonic() - start_time
        print(f"Ray, {case}: {seconds:.1f} s; {same} with a lost node the same", flush=True)
    return same


def full_disk(home: Path, disk: Path) -> bool:
    """Fill a small file system during curation; whether it fails, and then continues to the same end."""
    process, filler = start(home, disk / "selection"), disk / "filler"
    while not list(disk.glob("selection.work/**/00001")) and process.poll() is None:
        time.sleep(0.01)
    with open(filler, "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(65536))
        except OSError:
            pass
    code, messages = wait(process)
    print(f"full disk: exit {code}: {messages.strip().splitlines()[-1][:160]}")
    failed = code == 1 and not (disk / "selection").exists()
    filler.unlink()
    code, messages = wait(start(home, disk / "selection"))
    assert code == 0, messages
    return failed and digest(disk / "selection") == digest(home / "undisturbed")


def kills(home: Path, count: int, seconds: float, undisturbed: str) -> int:
    """The number of curations with a kill that ended the same."""
    generator, same, kill, attempt = random.Random(0), 0, 0, 0
    while kill < count:
        out, victim = home / f"out{attempt}", "main" if kill % 2 else "worker"
        if (ended := curate_with_kill(home, out, generator, seconds, victim)) is None:
            seconds *= 0.9  # it ended before the kill: the machine has become faster
        else:
            kill, same = kill + 1, same + (ended == undisturbed)
            print(f"kill {kill}, {victim}: {same} of {kill} the same", flush=True)
        attempt += 1
    return same


def main() -> None:
    parser = argument_parser(__doc__, packages=("pyarrow", "ray"))
    parser.add_argument("--quick", action="store_true", help="two kills, and no nodes")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--parts", nargs="+", default=["kills", "nodes"], choices=["kills", "nodes"])
    parser.add_argument("--images", type=int, default=600)
    parser.add_argument("--disk", type=Path, help="folder on a small file system, which is filled")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.kills, arguments.parts, arguments.images = 2, ["kills"], 200
    results = []
    with tempfile.TemporaryDirectory(prefix="troodon-faults-") as folder:
        home = Path(folder)
        prepare(home, arguments.images)
        start_time = time.monotonic()
        code, messages = wait(start(home, home / "undisturbed"))
        assert code == 0, messages
        seconds, undisturbed = time.monotonic() - start_time, digest(home / "undisturbed")
        summary = json.loads((home / "undisturbed" / "summary.json").read_text())
        print(f"undisturbed: {seconds:.1f} s; " + ", ".join(f"{s['name']} -{s['dropped']}" for s in summary["stages"]))
        settings = {"images": summary["images"], "broken": count_named(home, home / "undisturbed")}
        if arguments.disk:
            settings["full_disk"] = full_disk(home, arguments.disk)
        if "kills" in arguments.parts:
            results.append(("same_after_kill", kills(home, arguments.kills, seconds, undisturbed), arguments.kills))
        if "nodes" in arguments.parts and (same := lose_nodes(home, undisturbed)) is not None:
            results.append(("same_after_lost_node", same, len(STAGES)))
    finish([result(name, ours, rival, "runs", more_is_better=True, **settings) for name, ours, rival in results],
           arguments)  # fmt: skip


if __name__ == "__main__":
    main()
