"""Thousands of damaged files for the decoder, in a process of their own: it must neither die, nor hang, nor grow.

    python -m tests.fuzz [--files 5000] [--seed 0] [--slow] [FILE ...]

Small pictures of every format (and FILEs) are damaged in five ways and decoded by several threads, as workers do.
Prints a line of JSON: how many came out how, the slowest of them, and by how much the process grew.
"""

import argparse
import faulthandler
import gc
import io
import json
import random
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from troodon.images import decode as decoder
from troodon.images.decode import BadImage, decode, read_header

WAYS = ("flip", "cut", "grow", "blank", "splice")
HANGS_S = 60  # for one picture; then every thread's place is printed, and the process ends
THREADS = 4


def small_files() -> dict[str, bytes]:
    """A picture of 48 by 33 pixels in every format that can be written here."""
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


def damaged(files: list[bytes], draw: random.Random) -> bytes:
    data = bytearray(draw.choice(files))
    way = draw.choice(WAYS)
    at = draw.randrange(len(data))
    if way == "flip":
        for _ in range(draw.choice((1, 2, 4, 8, 64))):
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    elif way == "cut":
        del data[at:]
    elif way == "grow":  # sizes stand in the first bytes
        at = draw.randrange(min(len(data), 100))
        data[at : at + 4] = draw.choice((b"\xff" * 4, b"\x7f\xff\xff\xff", b"\x00\x01\x00\x00", b"\x00\x00\xff\xff"))
    elif way == "blank":
        data[at : at + 100] = bytes(len(data[at : at + 100]))
    else:  # the end of another file
        other = draw.choice(files)
        data[at:] = other[min(at, len(other)) :]
    return bytes(data)


def attempt(data: bytes) -> tuple[str, float]:
    """What came of it, and how many seconds it took."""
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


def resident() -> float:
    """MB of this process."""
    gc.collect()
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--slow", action="store_true", help="without simplejpeg")
    parser.add_argument("more", nargs="*", type=Path, help="files to damage besides the small ones")
    given = parser.parse_args()
    if given.slow:
        decoder.simplejpeg = None
    faulthandler.enable()
    files = [*small_files().values(), *(path.read_bytes() for path in given.more)]
    files = [data for data in files if data]
    draw, outcomes, slowest, settled = random.Random(given.seed), Counter[str](), 0.0, 0.0
    with ThreadPoolExecutor(THREADS) as pool:
        for start in range(0, given.files, 250):
            faulthandler.dump_traceback_later(HANGS_S, exit=True)
            batch = [damaged(files, draw) for _ in range(min(250, given.files - start))]
            for status, seconds in pool.map(attempt, batch):
                outcomes[status] += 1
                slowest = max(slowest, seconds)
            if start <= given.files // 3:
                settled = resident()  # what decoders keep for themselves is there by now
    faulthandler.cancel_dump_traceback_later()
    report = {"outcomes": outcomes, "slowest_s": round(slowest, 3), "grown_mb": round(resident() - settled, 1)}
    print(json.dumps(report | {"kinds": len(files)}))


if __name__ == "__main__":
    main()
