"""Files on this machine and beyond it: listed, opened, and read in parts.

What starts with `scheme://` (https, s3, gs, az, hf ...) is read by fsspec and whatever speaks that scheme (s3fs, gcsfs,
aiohttp ...: extra `remote`), in ranges, each tried TRIES times. What was read once is kept in the folder TROODON_CACHE
(~/.cache/troodon), up to TROODON_CACHE_GB (20): what no longer fits is read anew each time, for in a shuffled pass over
more than fits, throwing out the oldest would throw out everything before it is needed again.
"""

import contextlib
import functools
import hashlib
import os
import random
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from troodon import run
from troodon.config import UsageError

T = TypeVar("T")

REMOTE = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+(::|://)")
TRIES = 4  # the first and three more, after about 0.5, 1 and 2 seconds
WAIT_S = 0.5
AT_ONCE = 32  # ranges that are read at one time from elsewhere
AHEAD = 8 << 20  # bytes that listing the inside of a distant file reads at a time
LEFT_FREE = 0.1  # of the disk that holds the cache


def read(path: str, offset: int = 0, length: int = -1) -> bytes:
    """A part of a file, or all of it with length -1. OSError where that much is not there."""
    if REMOTE.match(path):
        return _cached(path, offset, length)
    with open(path, "rb", buffering=0) as file:
        data = file.readall() if length < 0 and not offset else b""
        if length >= 0:
            data = os.pread(file.fileno(), length, offset)
    return _whole(path, data, offset, length)


def open_file(path: str) -> Any:
    """The file, to be read from beginning to end, or from place to place."""
    if not REMOTE.match(path):
        return open(path, "rb")
    fs, name = system(path)
    return _retried(path, lambda: fs.open(name, "rb", block_size=AHEAD, cache_type="readahead"))


def size(path: str) -> int:
    if not REMOTE.match(path):
        return os.path.getsize(path)
    fs, name = system(path)
    return _retried(path, lambda: fs.size(name)) or 0


def below(url: str) -> Iterator[tuple[str, str, int]]:
    """Every file below a distant folder: its path there, its URL, how long it is; by path."""
    fs, name = system(url)
    found = _retried(url, lambda: fs.find(name, detail=True))
    top = name.rstrip("/") + "/"
    for path, info in sorted(found.items()):
        if info.get("type", "file") == "file" and path.startswith(top):
            size = info.get("size")
            yield path[len(top) :], fs.unstrip_protocol(path), -1 if size is None else size


def exists(path: str) -> bool:
    if not REMOTE.match(path):
        return os.path.exists(path)
    fs, name = system(path)
    return _retried(path, lambda: fs.exists(name))


@functools.cache
def _scheme(scheme: str) -> Any:
    """The file system of a scheme; UsageError with what to install."""
    import fsspec

    options = {}
    if scheme in ("http", "https"):
        with contextlib.suppress(ImportError):
            import aiohttp

            options = {"client_kwargs": {"timeout": aiohttp.ClientTimeout(total=120, sock_read=30)}}
    try:
        return fsspec.filesystem(scheme, **options)
    except ValueError as error:
        raise UsageError(f"{scheme}://: {error}") from None
    except ImportError as error:
        said = f"{scheme}://: {error}"
        raise UsageError(f'{said} (pip install "troodon[remote]" has https and s3)') from None


def system(url: str) -> tuple[Any, str]:
    """The file system that a URL belongs to, and what the file is called there."""
    if "::" in url:  # one file system inside another, as fsspec writes it
        import fsspec

        return fsspec.core.url_to_fs(url)
    fs = _scheme(url.partition("://")[0].lower())
    return fs, fs._strip_protocol(url)


def _cached(url: str, offset: int, length: int) -> bytes:
    kept = cache() / _name(url, offset, length)
    with contextlib.suppress(OSError):
        return kept.read_bytes()
    fs, name = system(url)
    with _gate:
        data = _retried(url, lambda: _range(fs, name, url, offset, length))
    _keep(kept, data)
    return data


_gate = threading.BoundedSemaphore(AT_ONCE)


def _range(fs: Any, name: str, url: str, offset: int, length: int) -> bytes:
    if length < 0:
        return _whole(url, fs.cat_file(name), 0, -1)
    if length == 0:
        return b""
    data = fs.cat_file(name, start=offset, end=offset + length)
    if len(data) > length:  # a server that knows no ranges sends all of it
        data = data[offset : offset + length]
    return _whole(url, data, offset, length)


def _whole(path: str, data: bytes, offset: int, length: int) -> bytes:
    if 0 <= length != len(data):
        raise OSError(f"{path}: ends before {offset + length:,} bytes")
    return data


def _retried(url: str, attempt: Callable[[], T]) -> T:
    """What a distant place says at last. What is not there, or not for us, is not asked for again."""
    for tried in range(1, TRIES + 1):
        try:
            return attempt()
        except (FileNotFoundError, PermissionError, NotImplementedError, UsageError):
            raise
        except Exception as error:  # every backend has its own
            if tried == TRIES:
                said = " ".join(str(error).split()) or type(error).__name__
                raise OSError(f"{url}: {said} (tried {TRIES} times)") from error
            time.sleep(WAIT_S * 2 ** (tried - 1) * random.uniform(0.5, 1.5))
    raise AssertionError


# ---- the cache


@functools.cache
def cache() -> Path:
    return Path(os.environ.get("TROODON_CACHE", "~/.cache/troodon")).expanduser() / "ranges"


def _name(url: str, offset: int, length: int) -> str:
    digest = hashlib.sha256(f"{url}\0{offset}\0{length}".encode()).hexdigest()
    return f"{digest[:2]}/{digest[2:40]}"


def _keep(path: Path, data: bytes) -> None:
    """Write what was read, while there is room. A cache that cannot be written is none, and harms nobody."""
    with contextlib.suppress(OSError):
        if _room().takes(len(data)):
            run.write_bytes(path, data)


class _Room:
    """How much more the cache may hold; counted once, and then by what this process adds."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        try:
            limit = float(os.environ.get("TROODON_CACHE_GB", "20")) * 1e9
        except ValueError:
            raise UsageError(f"TROODON_CACHE_GB {os.environ['TROODON_CACHE_GB']!r}: a number") from None
        home = cache()
        held = sum(file.stat().st_size for file in home.glob("*/*")) if home.exists() else 0
        place = next(folder for folder in (home, *home.parents) if folder.exists())
        disk = shutil.disk_usage(place)
        self.left = min(limit - held, disk.free - LEFT_FREE * disk.total)

    def takes(self, size: int) -> bool:
        with self.lock:
            if size > self.left:
                return False
            self.left -= size
            return True


_room = functools.cache(_Room)
