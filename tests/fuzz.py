"""Read thousands of damaged files in a separate process: nothing may crash, hang, leak memory or be lost silently.

    python -m tests.fuzz [--files 5000] [--seed 0] [--slow] [FILE ...]
    python -m tests.fuzz --containers 10000 [--seed 0]

Small images of every format (and FILEs) are damaged in five ways and decoded by several threads, like in training.
Prints a line of JSON: the number of each outcome, the slowest decoding, and the growth of the process.

With --containers, tars, zips, Parquet files and lists of images are damaged instead, then listed, and all that is
listed is read. Every image of a container must be listed, unless a message or one clear error says that some are not.
"""

import argparse
import faulthandler
import gc
import io
import json
import random
import tarfile
import tempfile
import time
import warnings
import zipfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from troodon import run
from troodon.config import UsageError
from troodon.images import decode as decoder
from troodon.images.decode import BadImage, decode, read_header
from troodon.images.sources import open_source

DAMAGES = ("flip", "cut", "grow", "blank", "splice")
TIMEOUT_S = 60  # per batch; then the stack of every thread is printed, and the process exits
THREADS = 4
MEMBERS = 5  # images in a container
WHOLE = (".tar", ".zip", ".parquet")  # containers that tell whether a member is missing; half a list is a list


def small_files() -> dict[str, bytes]:
    """An image of 48 by 33 pixels in every format that this Pillow can write."""
    noise = np.random.default_rng(0).integers(0, 40, (33, 48, 3))
    y, x = np.mgrid[0:33, 0:48]
    image = Image.fromarray((np.stack([x * 4, y * 6, x + y], 2) + noise).clip(0, 255).astype(np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    kinds: dict[str, tuple[Image.Image, str, dict]] = {
        "jpeg": (image, "JPEG", {"exif": exif}), "progressive": (image, "JPEG", {"progressive": True}),
        "cmyk": (image.convert("CMYK"), "JPEG", {}), "grey": (image.convert("L"), "JPEG", {}),
        "png": (image, "PNG", {"exif": exif}), "alpha": (image.convert("RGBA"), "PNG", {}),
        "palette": (image.convert("P"), "PNG", {}), "deep": (image.convert("I;16"), "PNG", {}),
        "gif": (image.convert("P"), "GIF", {}), "webp": (image, "WEBP", {}), "avif": (image, "AVIF", {}),
        "tiff": (image, "TIFF", {}), "tiff-lzw": (image, "TIFF", {"compression": "tiff_lzw"}),
        "tiff-jpeg": (image, "TIFF", {"compression": "jpeg"}), "float": (image.convert("F"), "TIFF", {}),
        "bmp": (image, "BMP", {}), "jpeg2000": (image, "JPEG2000", {}), "ppm": (image, "PPM", {}),
        "tga": (image, "TGA", {}), "ico": (image, "ICO", {}), "icns": (image, "ICNS", {}), "dds": (image, "DDS", {}),
        "pcx": (image, "PCX", {}), "sgi": (image, "SGI", {}), "qoi": (image, "QOI", {}),
    }  # fmt: skip
    files = {}
    for name, (picture, format, options) in kinds.items():
        out = io.BytesIO()
        try:
            picture.save(out, format, **options)
        except (KeyError, OSError, ValueError):  # not in this build of Pillow
            continue
        files[name] = out.getvalue()
    out = io.BytesIO()
    np.save(out, np.asarray(image))
    return files | {"npy": out.getvalue()}


def damage(files: list[bytes], draw: random.Random) -> bytes:
    data = bytearray(draw.choice(files))
    kind = draw.choice(DAMAGES)
    start = draw.randrange(len(data))
    if kind == "flip":
        for _ in range(draw.choice((1, 2, 4, 8, 64))):
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    elif kind == "cut":
        del data[start:]
    elif kind == "grow":  # the first bytes hold the sizes
        start = draw.randrange(min(len(data), 100))
        data[start : start + 4] = draw.choice(
            (b"\xff" * 4, b"\x7f\xff\xff\xff", b"\x00\x01\x00\x00", b"\x00\x00\xff\xff")
        )
    elif kind == "blank":
        data[start : start + 100] = bytes(len(data[start : start + 100]))
    else:  # the end of another file
        other = draw.choice(files)
        data[start:] = other[min(start, len(other)) :]
    return bytes(data)


def try_decode(data: bytes) -> tuple[str, float]:
    """The outcome of decoding, and its duration in seconds."""
    start = time.perf_counter()
    try:
        pixels = decode(data, None)
        assert pixels.dtype == np.uint8
        assert pixels.ndim == 3
        header = read_header(data)
        assert pixels.shape[:2] == (header.height, header.width), (pixels.shape, header)
        status = "ok"
    except BadImage as bad:
        status = bad.status
    return status, time.perf_counter() - start


def small_containers(home: Path) -> dict[str, bytes]:
    """The same few images in containers of each kind, by file name; lists name the images in `home`/listed."""
    images = {f"class{i % 2}/{i}.png": data for i, data in enumerate([small_files()["png"]] * MEMBERS)}
    for name, data in images.items():
        (home / "listed" / name).parent.mkdir(parents=True, exist_ok=True)
        (home / "listed" / name).write_bytes(data)
    made = {}
    for format in (tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT):
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w", format=format) as tar:
            for name, data in images.items():
                for part, content in ((name, data), (name.replace(".png", ".cls"), b"1")):
                    member = tarfile.TarInfo(part)
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
        made[f"{format}.tar"] = out.getvalue()
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w", method) as archive:
            for name, data in images.items():
                archive.writestr(name, data)
            archive.writestr("labels.csv", "path,label\n" + "".join(f"{name},a\n" for name in images))
        made[f"{method}.zip"] = out.getvalue()
    labels = [name.partition("/")[0] for name in images]
    structs = [{"bytes": data, "path": name} for name, data in images.items()]
    for number, column in enumerate((list(images.values()), structs)):
        table, out = pa.table({"image": column, "label": labels}), pa.BufferOutputStream()
        pq.write_table(table, out, row_group_size=2, compression=("none", "snappy")[number])
        made[f"{number}.parquet"] = out.getvalue().to_pybytes()
    names = [f"listed/{name}" for name in images]
    rows = [f"{name},{label},train" for name, label in zip(names, labels)]
    return made | {
        "l.txt": "\n".join(names).encode(),
        "l.csv": "\n".join(["path,label,split", *rows]).encode(),
        "l.tsv": "\n".join(["path,label,split", *rows]).replace(",", "\t").encode(),
    }


def try_container(home: Path, name: str, data: bytes) -> tuple[str, float]:
    """List a container with this content and read all that is listed: the outcome, and its duration in seconds."""
    (home / name).write_bytes(data)
    said: list[str] = []
    say, run.say, start = run.say, lambda message="": said.append(message), time.perf_counter()
    try:
        index = open_source(home / name)
        broken = 0
        for row in range(len(index)):
            try:
                decode(index.read(row), None)
            except (BadImage, OSError):
                broken += 1
        assert len(index) >= MEMBERS or said or not name.endswith(WHOLE), f"{name}: {MEMBERS - len(index)} images lost"
        outcome = "some broken" if broken else "ok" if len(index) >= MEMBERS else "some left out"
    except UsageError as error:
        outcome = "refused"
        if "\n" in str(error):
            raise ValueError(f"an error of several lines: {error}") from None
    finally:
        run.say = say
    return outcome, time.perf_counter() - start


def fuzz_containers(count: int, seed: int) -> dict:
    """Damage and read `count` containers; raises what is not one clear error. The report."""
    draw, outcomes, slowest = random.Random(seed), Counter[str](), 0.0
    with tempfile.TemporaryDirectory() as folder:
        made = small_containers(Path(folder))
        for name, data in made.items():
            assert try_container(Path(folder), name, data)[0] == "ok", name
        for number in range(count):
            name = draw.choice(sorted(made))
            alike = [data for other, data in made.items() if Path(other).suffix == Path(name).suffix]
            data = damage([made[name]] if draw.random() < 0.8 else alike, draw)
            faulthandler.dump_traceback_later(TIMEOUT_S, exit=True)
            try:
                outcome, seconds = try_container(Path(folder), name, data)
            except BaseException as error:
                error.add_note(f"container {number} of seed {seed}: {name}, {len(data)} bytes")
                Path(tempfile.gettempdir(), f"fuzz-{seed}-{number}-{name}").write_bytes(data)
                raise
            outcomes[outcome] += 1
            slowest = max(slowest, seconds)
    faulthandler.cancel_dump_traceback_later()
    return {"outcomes": outcomes, "slowest_s": round(slowest, 3), "kinds": len(made)}


def resident() -> float:
    """Resident memory of this process, in MB."""
    gc.collect()
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=5000)
    parser.add_argument("--containers", type=int, default=0, help="damage so many containers instead")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--slow", action="store_true", help="without simplejpeg")
    parser.add_argument("more", nargs="*", type=Path, help="files to damage besides the small ones")
    args = parser.parse_args()
    if args.slow:
        decoder.simplejpeg = None
    faulthandler.enable()
    if args.containers:
        warnings.simplefilter("ignore")
        print(json.dumps(fuzz_containers(args.containers, args.seed)))
        return
    files = [*small_files().values(), *(path.read_bytes() for path in args.more)]
    files = [data for data in files if data]
    draw, outcomes, slowest, baseline = random.Random(args.seed), Counter[str](), 0.0, 0.0
    with ThreadPoolExecutor(THREADS) as pool:
        for start in range(0, args.files, 250):
            faulthandler.dump_traceback_later(TIMEOUT_S, exit=True)
            batch = [damage(files, draw) for _ in range(min(250, args.files - start))]
            for status, seconds in pool.map(try_decode, batch):
                outcomes[status] += 1
                slowest = max(slowest, seconds)
            if start <= args.files // 3:
                baseline = resident()  # includes what decoders cache
    faulthandler.cancel_dump_traceback_later()
    report = {"outcomes": outcomes, "slowest_s": round(slowest, 3), "grown_mb": round(resident() - baseline, 1)}
    print(json.dumps(report | {"kinds": len(files)}))


if __name__ == "__main__":
    main()
