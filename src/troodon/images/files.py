"""Local and remote files: opened, and read in ranges.

A URL `scheme://...` (https, s3, gs, az, hf ...) is read by fsspec and the package for its scheme (s3fs, gcsfs,
aiohttp ...: extra `remote`), in ranges, with MAX_ATTEMPTS attempts each. The cache keeps what was read in the folder
TROODON_CACHE (~/.cache/troodon), up to TROODON_CACHE_GB (20). It evicts nothing: what does not fit is read again each
time. In a shuffled pass over more data than fits, evicting the oldest would remove all of it before it is needed again.
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
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from troodon import run
from troodon.config import UsageError

T = TypeVar("T")

REMOTE = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+(::|://)")
MAX_ATTEMPTS = 4  # one attempt and three retries, after about 0.5, 1 and 2 seconds
RETRY_WAIT_S = 0.5
MAX_REMOTE_READS = 32  # remote ranges that are read at the same time
READ_AHEAD = 8 << 20  # bytes that are read at a time while a remote container is listed
MIN_FREE_SHARE = 0.1  # of the disk that holds the cache


def read(path: str, offset: int = 0, length: int = -1) -> bytes:
    """Read a range of a file, or all of it with length -1. Raises OSError if the file ends earlier."""
    if REMOTE.match(path):
        return _read_remote(path, offset, length)
    with open(path, "rb", buffering=0) as file:
        data = file.readall() if length < 0 and not offset else b""
        if length >= 0:
            data = os.pread(file.fileno(), length, offset)
    return _checked(path, data, offset, length)


def open_file(path: str) -> Any:
    """Open a file for sequential and random reading."""
    if not REMOTE.match(path):
        return open(path, "rb")
    fs, name = filesystem(path)
    return retry(path, lambda: fs.open(name, "rb", block_size=READ_AHEAD, cache_type="readahead"))


def size(path: str) -> int:
    """The length of a file in bytes."""
    if not REMOTE.match(path):
        return os.path.getsize(path)
    fs, name = filesystem(path)
    return retry(path, lambda: fs.size(name)) or 0


def exists(path: str) -> bool:
    """Whether there is a file or folder at this path or URL."""
    if not REMOTE.match(path):
        return os.path.exists(path)
    fs, name = filesystem(path)
    return retry(path, lambda: fs.exists(name))


@functools.cache
def _scheme(scheme: str) -> Any:
    """The file system of a scheme. Raises UsageError, with what to install, if there is none."""
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
        message = f"{scheme}://: {error}"
        raise UsageError(f'{message} (pip install "troodon[remote]" has https and s3)') from None


def filesystem(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL, and the path of the file in it."""
    if "::" in url:  # one file system inside another, in fsspec's notation
        import fsspec

        return fsspec.core.url_to_fs(url)
    fs = _scheme(url.partition("://")[0].lower())
    return fs, fs._strip_protocol(url)


def _read_remote(url: str, offset: int, length: int) -> bytes:
    cached = cache_folder() / _cache_name(url, offset, length)
    with contextlib.suppress(OSError):
        return cached.read_bytes()
    fs, name = filesystem(url)
    with _remote_reads:
        data = retry(url, lambda: _read_range(fs, name, url, offset, length))
    _store(cached, data)
    return data


_remote_reads = threading.BoundedSemaphore(MAX_REMOTE_READS)


def _read_range(fs: Any, name: str, url: str, offset: int, length: int) -> bytes:
    if length < 0:
        return _checked(url, fs.cat_file(name), 0, -1)
    if length == 0:
        return b""
    data = fs.cat_file(name, start=offset, end=offset + length)
    if len(data) > length:  # a server without support for ranges sends the whole file
        data = data[offset : offset + length]
    return _checked(url, data, offset, length)


def _checked(path: str, data: bytes, offset: int, length: int) -> bytes:
    if 0 <= length != len(data):
        raise OSError(f"{path}: ends before {offset + length:,} bytes")
    return data


def retry(url: str, attempt: Callable[[], T]) -> T:
    """Call `attempt`, with retries after errors that may pass; a missing or forbidden file is not tried again."""
    for number in range(1, MAX_ATTEMPTS + 1):
        try:
            return attempt()
        except (FileNotFoundError, PermissionError, NotImplementedError, UsageError):
            raise
        except Exception as error:  # every fsspec backend has its own errors
            if number == MAX_ATTEMPTS:
                message = " ".join(str(error).split()) or type(error).__name__
                raise OSError(f"{url}: {message} (tried {MAX_ATTEMPTS} times)") from error
            time.sleep(RETRY_WAIT_S * 2 ** (number - 1) * random.uniform(0.5, 1.5))
    raise AssertionError


# ---- Cache


@functools.cache
def cache_folder() -> Path:
    return Path(os.environ.get("TROODON_CACHE", "~/.cache/troodon")).expanduser() / "ranges"


def _cache_name(url: str, offset: int, length: int) -> str:
    digest = hashlib.sha256(f"{url}\0{offset}\0{length}".encode()).hexdigest()
    return f"{digest[:2]}/{digest[2:40]}"


def _store(path: Path, data: bytes) -> None:
    """Write a range to the cache if it fits. Errors are ignored: reading works without a cache."""
    with contextlib.suppress(OSError):
        if _cache_budget().reserve(len(data)):
            run.write_bytes(path, data)


class _CacheBudget:
    """How many bytes the cache may still grow: measured once, then reduced by what this process adds."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        try:
            limit = float(os.environ.get("TROODON_CACHE_GB", "20")) * 1e9
        except ValueError:
            raise UsageError(f"TROODON_CACHE_GB {os.environ['TROODON_CACHE_GB']!r}: a number") from None
        folder = cache_folder()
        used = sum(file.stat().st_size for file in folder.glob("*/*")) if folder.exists() else 0
        disk = shutil.disk_usage(next(f for f in (folder, *folder.parents) if f.exists()))
        self.remaining = min(limit - used, disk.free - MIN_FREE_SHARE * disk.total)

    def reserve(self, size: int) -> bool:
        with self.lock:
            if size > self.remaining:
                return False
            self.remaining -= size
            return True


_cache_budget = functools.cache(_CacheBudget)
