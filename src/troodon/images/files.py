"""Local and remote files: opened, and read in ranges.

A URL `scheme://...` (https, s3, gs, az, hf ...) is read by fsspec and the package for its scheme (s3fs, gcsfs,
aiohttp ...: extra `remote`), in ranges, with MAX_ATTEMPTS attempts each. A read takes at most TROODON_TIMEOUT_S (60)
seconds, all attempts together. Pipes, sockets and devices are never opened.

The cache keeps what was read in the folder TROODON_CACHE (~/.cache/troodon), up to TROODON_CACHE_GB (20). It evicts
nothing: what does not fit is read again each time. In a shuffled pass over more data than fits, evicting the oldest
would remove all of it before it is needed again. Whole files that are no images are not kept.

Each process asks once for every URL whether it is still what the cache has, by ETag, Last-Modified and length. Where a
server gives neither of the first two, a copy is used for TROODON_CACHE_DAYS (7) days; where it cannot be reached, as
long as it exists.
"""

import contextlib
import functools
import hashlib
import json
import os
import random
import re
import shutil
import stat
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from troodon import run
from troodon.config import UsageError

T = TypeVar("T")

REMOTE = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+(::|://)")
MAX_ATTEMPTS = 4  # one attempt and three retries, after about 0.5, 1 and 2 seconds
RETRY_WAIT_S = 0.5
MAX_REMOTE_READS = 32  # remote ranges that are read at the same time
READ_AHEAD = 8 << 20  # bytes that are read at a time while a remote container is listed
MIN_FREE_SHARE = 0.1  # of the disk that holds the cache
CACHE_MAGIC = b"troodon "  # the first bytes of a file of the cache; then its version as JSON, a line feed, and the data
ASK_TIMEOUT_S = 10.0  # for the answer whether a URL has changed
UNREACHABLE_S = 300.0  # for so long, a server that did not answer is not asked again
MAX_REMEMBERED = 100_000  # URLs whose version this process remembers
LASTING_ERRORS = (TypeError, ValueError, ImportError)  # another attempt would end in the same way
PASSING_STATUS = (408, 425, 429)  # of HTTP; any other from 400 to 499 lasts
# What tells versions of a remote file apart, by its name in what the file systems of fsspec report.
# fmt: off
VALIDATORS = (
    "ETag", "etag", "Content-MD5", "md5Hash", "generation", "blob_id", "Last-Modified", "LastModified", "last_modified",
    "updated", "mtime", "modified", "created",
)
# fmt: on


class Version(NamedTuple):
    """What a server says of a file: its ETag, time of change and the like, "" for none of them; -1 for no length."""

    validator: str
    length: int


GONE, UNKNOWN = Version("gone", -1), Version("", -1)


def read(path: str, offset: int = 0, length: int = -1) -> bytes:
    """Read a range of a file, or all of it with length -1. Raises OSError if the file ends earlier, or is no file."""
    if REMOTE.match(path):
        return _read_remote(path, offset, length)
    require_file(path)
    with open(path, "rb", buffering=0) as file:
        data = file.readall() if length < 0 and not offset else b""
        if length >= 0:
            data = os.pread(file.fileno(), length, offset)
    return _checked(path, data, offset, length)


def require_file(path: str) -> None:
    """Raise OSError for a local pipe, socket or device: to open one may have effects, or may never end."""
    try:
        mode = os.stat(path).st_mode
    except ValueError as error:  # a zero byte, or half of a character
        raise OSError(f"{path!r}: is not a path ({error})") from None
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise OSError(f"{path}: is a pipe, socket or device, which is not opened")


def open_file(path: str) -> Any:
    """Open a file for sequential and random reading."""
    if not REMOTE.match(path):
        require_file(path)
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


def modified(path: str) -> int:
    """When a local file was last changed, in nanoseconds; for a URL, a number made of its ETag or Last-Modified.

    -1 if neither is known.
    """
    if not REMOTE.match(path):
        try:
            return os.stat(path).st_mtime_ns
        except (OSError, ValueError):
            return -1
    version = remote_version(path)
    if version is None or version == GONE or not version.validator:
        return -1
    return int(hashlib.sha256("\0".join(map(str, version)).encode()).hexdigest()[:15], 16)


@functools.cache
def _http() -> Any:
    """The file system of http and https."""
    import aiohttp
    import fsspec

    timeout = aiohttp.ClientTimeout(total=max(120.0, timeout_s()), sock_read=30)
    return fsspec.filesystem("http", client_kwargs={"timeout": timeout})


def filesystem(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL, and the path of the file in it.

    Raises UsageError, with what to install, for an unknown scheme; OSError for a server that cannot be reached.
    """
    import fsspec

    scheme = url.partition("://")[0].lower()
    try:
        if scheme in ("http", "https"):
            return _http(), url
        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        message = f"{scheme}://: {error}"
        raise UsageError(f'{message} (pip install "troodon[remote]" has https and s3)') from None
    except ValueError as error:
        raise UsageError(f"{scheme}://: {error}") from None
    except OSError:
        raise
    except Exception as error:  # every fsspec backend has its own errors
        raise OSError(f"{url}: {_describe(error)}") from error


def _read_remote(url: str, offset: int, length: int) -> bytes:
    cached = cache_folder() / _cache_name(url, offset, length)
    kept = _load(cached)
    version = remote_version(url) if kept else None
    if kept is not None and _is_current(kept[0], version, cached):
        return kept[1]
    seconds = timeout_s()
    with _remote_reads:
        data = _within(seconds, url, lambda: retry(url, lambda: _read_range(url, offset, length)))
    if length >= 0 or _is_image(data):
        _store(cached, remote_version(url) or UNKNOWN, data)
    return data


_remote_reads = threading.BoundedSemaphore(MAX_REMOTE_READS)


def _read_range(url: str, offset: int, length: int) -> bytes:
    try:
        fs, name = filesystem(url)
    except UsageError as error:
        raise FileNotFoundError(str(error)) from None  # the others of a list may have another scheme
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
            status = getattr(error, "status", 0)
            refused = isinstance(status, int) and 400 <= status < 500 and status not in PASSING_STATUS
            if refused or isinstance(error, LASTING_ERRORS):
                raise OSError(f"{url}: {_describe(error)}") from error
            if number == MAX_ATTEMPTS:
                raise OSError(f"{url}: {_describe(error)} (tried {MAX_ATTEMPTS} times)") from error
            time.sleep(RETRY_WAIT_S * 2 ** (number - 1) * random.uniform(0.5, 1.5))
    raise AssertionError


def _describe(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _within(seconds: float, url: str, work: Callable[[], T]) -> T:
    """The result of `work`, which another thread computes. OSError after so many seconds; the thread is left alone."""
    future: Future[T] = Future()

    def run_work() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run_work, daemon=True, name="remote").start()
    try:
        return future.result(seconds)
    except TimeoutError:
        if future.done():
            raise
        raise OSError(f"{url}: no complete answer within {seconds:g} s (TROODON_TIMEOUT_S)") from None


def _setting(name: str, default: str) -> float:
    try:
        return float(os.environ.get(name, default))
    except ValueError:
        raise UsageError(f"{name} {os.environ[name]!r}: a number") from None


def timeout_s() -> float:
    """The time in which one remote image must be read, in seconds."""
    if (seconds := _setting("TROODON_TIMEOUT_S", "60")) > 0:
        return seconds
    raise UsageError(f"TROODON_TIMEOUT_S {seconds:g}: must be more than 0")


# ---- Versions of remote files

_versions: dict[str, Version] = {}
_unreachable: dict[str, float] = {}  # by scheme and host: when it did not answer


def forget_versions() -> None:
    """Ask again for each URL whether it has changed: called when a source is opened."""
    _versions.clear()
    _unreachable.clear()


def remote_version(url: str) -> Version | None:
    """The version of a remote file, asked for once; None if its server does not answer."""
    if (known := _versions.get(url)) is not None:
        return known
    host = "/".join(url.split("/")[:3])
    if time.monotonic() - _unreachable.get(host, -UNREACHABLE_S) < UNREACHABLE_S:
        return None

    def ask() -> dict:
        fs, name = filesystem(url)
        fs.invalidate_cache()
        return fs.info(name)

    try:
        info = _within(min(ASK_TIMEOUT_S, timeout_s()), url, ask)
    except Exception as error:
        status = getattr(error.__cause__ or error, "status", None)
        if isinstance(error, FileNotFoundError) and (error.__cause__ is None or status in (404, 410)):
            version = GONE
        else:
            if not isinstance(status, int):  # else it answers, and refuses
                _unreachable[host] = time.monotonic()
            return None
    else:
        length = info.get("size")
        found = [f"{name} {info[name]}" for name in VALIDATORS if info.get(name) is not None]
        version = Version(", ".join(found), -1 if length is None else int(length))
    if len(_versions) >= MAX_REMEMBERED:
        _versions.clear()
    _versions[url] = version
    return version


def _is_current(kept: Version, now: Version | None, cached: Path) -> bool:
    """Whether a copy in the cache is still what its server has."""
    if now is None:  # it cannot be asked
        return True
    if kept.validator or now.validator:
        return kept == now
    with contextlib.suppress(OSError):
        age_days = (time.time() - cached.stat().st_mtime) / 86_400
        return kept.length == now.length and age_days < _setting("TROODON_CACHE_DAYS", "7")
    return False


# ---- Cache


@functools.cache
def cache_folder() -> Path:
    return Path(os.environ.get("TROODON_CACHE", "~/.cache/troodon")).expanduser() / "ranges"


def _cache_name(url: str, offset: int, length: int) -> str:
    digest = hashlib.sha256(f"{url}\0{offset}\0{length}".encode()).hexdigest()
    return f"{digest[:2]}/{digest[2:40]}"


def _store(path: Path, version: Version, data: bytes) -> None:
    """Write a range to the cache if it fits. Errors are ignored: reading works without a cache."""
    stored = CACHE_MAGIC + json.dumps(version).encode() + b"\n" + data
    with contextlib.suppress(OSError):
        if _cache_budget().reserve(len(stored)):
            run.write_bytes(path, stored)


def _load(path: Path) -> tuple[Version, bytes] | None:
    """A file of the cache; None if there is none, or only one of an earlier release."""
    try:
        stored = path.read_bytes()
        end = stored.index(b"\n")
        if not stored.startswith(CACHE_MAGIC):
            return None
        return Version(*json.loads(stored[len(CACHE_MAGIC) : end])), stored[end + 1 :]
    except (OSError, ValueError, TypeError):
        return None


def _is_image(data: bytes) -> bool:
    """Whether these bytes have the header of an image: a server may answer with a page of text instead."""
    from troodon.images.decode import BadImage, read_header

    try:
        read_header(data)
    except BadImage:
        return False
    return True


def cache_usage() -> tuple[int, int]:
    """The number of files in the cache, and of their bytes."""
    sizes = [path.stat().st_size for path in cache_folder().glob("*/*")]
    return len(sizes), sum(sizes)


def empty_cache() -> None:
    """Delete all that the cache holds."""
    shutil.rmtree(cache_folder(), ignore_errors=True)
    _cache_budget.cache_clear()


class _CacheBudget:
    """How many bytes the cache may still grow: measured once, then reduced by what this process adds."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        limit = _setting("TROODON_CACHE_GB", "20") * 1e9
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
