"""Decode thousands of damaged files in a separate process: the decoder must not crash, hang or leak memory.

    python -m tests.fuzz [--files 5000] [--seed 0] [--slow] [FILE ...]

Small images of every format (and FILEs) are damaged in five ways and decoded by several threads, like in training.
Prints a line of JSON: the number of each outcome, the slowest decoding, and the growth of the process.
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

DAMAGES = ("flip", "cut", "grow", "blank", "splice")
TIMEOUT_S = 60  # per batch; then the stack of every thread is printed, and the process exits
THREADS = 4


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


def resident() -> float:
    """Resident memory of this process, in MB."""
    gc.collect()
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--slow", action="store_true", help="without simplejpeg")
    parser.add_argument("more", nargs="*", type=Path, help="files to damage besides the small ones")
    args = parser.parse_args()
    if args.slow:
        decoder.simplejpeg = None
    faulthandler.enable()
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
