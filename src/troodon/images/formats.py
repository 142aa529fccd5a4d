"""Which files may be images: by their names, and by their first bytes where the name does not say it.

Medical images are among them where the extra `medical` is installed: DICOM (dicom.py) and NIfTI (volumes.py).

Files that are not read are counted in `LeftOut`, which says in one line how many, by ending or by reason.
"""

import importlib.util
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TypeVar

from troodon.images.dicom import INSTALL, is_dicom
from troodon.images.volumes import NIFTI_NAME
from troodon.text import plural, printable

T = TypeVar("T")

HAS_PYDICOM, HAS_NIBABEL = (importlib.util.find_spec(name) is not None for name in ("pydicom", "nibabel"))
DICOM_EXTENSIONS = frozenset(("dcm", "dicom"))

# File name extensions of the formats that decode.py reads, and of some image formats that it does not.
# fmt: off
RASTER_EXTENSIONS = frozenset((
    "jpg", "jpeg", "jpe", "jfif", "mpo", "png", "apng", "webp", "gif", "tif", "tiff", "bmp", "dib", "avif",
    "jp2", "j2k", "jpc", "j2c", "jpf", "jpx", "ppm", "pgm", "pbm", "pnm", "pfm",
    "qoi", "tga", "ico", "icns", "psd", "dds", "pcx", "sgi", "npy",
))
IMAGE_EXTENSIONS = RASTER_EXTENSIONS | (DICOM_EXTENSIONS if HAS_PYDICOM else frozenset())
UNSUPPORTED_EXTENSIONS = frozenset((
    "heic", "heif", "jxl", "svg", "eps", "dng", "cr2", "cr3", "nef", "nrw", "arw", "orf", "rw2", "raf", "raw", "pef",
    "srw", "3fr", "iiq",
))
OTHER_ARCHIVES = frozenset(("tgz", "tbz", "tbz2", "txz", "7z", "rar"))
COMPRESSIONS = frozenset(("gz", "bz2", "xz", "zst", "lz4", "z"))
# fmt: on
LIST_EXTENSIONS = ("txt", "csv", "tsv", "jsonl")

LOOK_BYTES = 132  # of a file whose name does not say what it is
LOOKS = 1000  # files of one ending that are looked at; if none of them is an image, the others are not looked at
MAX_ENDINGS = 8  # endings that a message names

_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # also how raw files of cameras begin
_MAGIC = re.compile(
    rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|GIF8[79]a|RIFF....WEBP|....ftypavi[fs]|\0\0\0\x0cjP  \r\n\x87\n|\xff\x4f\xff\x51"
    rb"|BM....\0\0\0\0....[\x0c\x28\x34\x38\x40\x6c\x7c]\0\0\0|P[4-6]\s+[#\d]|qoif|8BPS\0\x01|DDS \x7c\0\0\0|icns\0",
    re.DOTALL,
)


def extension(name: str) -> str:
    """What follows the last dot, in lower case; "" if there is no dot."""
    _, dot, suffix = name.rpartition("/")[2].rpartition(".")
    return suffix.lower() if dot else ""


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is skipped."""
    return name.startswith(".") or name in ("__MACOSX", "embeddings.npy")  # the last: part of our artifacts


def extensions_hint() -> str:
    return "image files end in .jpg .png .webp .gif .tif .bmp ..."


def is_image(name: str, start: bytes) -> bool:
    """Whether a file that begins with these LOOK_BYTES is an image, whatever its name says."""
    if is_dicom(start):
        return HAS_PYDICOM and name.rpartition("/")[2].upper() != "DICOMDIR"
    if start.startswith(_TIFF):
        return extension(name) not in UNSUPPORTED_EXTENSIONS
    return _MAGIC.match(start) is not None


def has_image_name(path: str, is_remote: bool = False) -> bool:
    """Whether the name of a file is that of an image, or of a local volume of images."""
    if extension(path) in IMAGE_EXTENSIONS:
        return True
    return HAS_NIBABEL and not is_remote and NIFTI_NAME.search(path) is not None


def find_images(candidates: Iterable[tuple[str, T]], look: Callable[[T], bytes]) -> set[str]:
    """The names of those files, (name, place) each, that begin like images. `look` reads LOOK_BYTES at a place.

    Of more than LOOKS files of one ending, as many are looked at first, and the others only if one is an image.
    """
    groups: dict[str, list[tuple[str, T]]] = defaultdict(list)
    for name, place in sorted(candidates, key=lambda candidate: candidate[0]):
        groups[extension(name)].append((name, place))
    found: set[str] = set()
    for group in groups.values():
        step = -(-len(group) // LOOKS)
        first = {name for name, place in group[::step] if is_image(name, look(place))}
        if first and step > 1:
            first |= {name for i, (name, place) in enumerate(group) if i % step and is_image(name, look(place))}
        found |= first
    return found


@dataclass
class LeftOut:
    """Files that are not read: how many, by ending or by reason."""

    endings: Counter[str] = field(default_factory=Counter)
    reasons: Counter[tuple[str, str]] = field(default_factory=Counter)  # a noun, and what is said of it
    firsts: dict[tuple[str, str], str] = field(default_factory=dict)  # for each reason, the first name

    def add(self, name: str, in_archive: bool = False) -> None:
        """Count a file that is not an image, or hidden."""
        self.endings[_describe(name, in_archive)] += 1

    def add_hidden(self, name: str) -> None:
        """Count a hidden file or folder, unless it is one that systems and programs make for themselves."""
        if name.startswith((".git", "._")) or name in (".DS_Store", "__MACOSX", "embeddings.npy"):
            return
        self.endings["hidden"] += 1

    def add_reason(self, noun: str, said: str, name: str) -> None:
        """Count what cannot be read. `said` follows the noun in the plural: "are encrypted"."""
        key = noun, said
        self.reasons[key] += 1
        self.firsts[key] = min(self.firsts.get(key, name), name)

    def update(self, other: "LeftOut") -> None:
        self.endings.update(other.endings)
        self.reasons.update(other.reasons)
        for key, name in other.firsts.items():
            self.firsts[key] = min(self.firsts.get(key, name), name)

    def endings_text(self) -> str:
        """What is left out by ending: "2 .json, 1 without ending"."""
        common = sorted(self.endings.items(), key=lambda item: (" " not in item[0], -item[1], item[0]))
        items = [f"{count:,} {ending}" for ending, count in common[:MAX_ENDINGS]]
        if rest := common[MAX_ENDINGS:]:
            items.append(f"{sum(count for _, count in rest):,} with {plural(len(rest), 'other ending')}")
        return ", ".join(items)

    def reasons_text(self) -> str:
        """What is left out by reason: "4 files are encrypted (the first: 0.jpg)"."""
        items = []
        for (noun, said), count in sorted(self.reasons.items()):
            first = f"{'the first: ' if count > 1 else ''}{printable(self.firsts[noun, said])}"
            items.append(f"{plural(count, noun)} {said if count > 1 else re.sub('^are ', 'is ', said)} ({first})")
        return "; ".join(items)


def _describe(name: str, in_archive: bool) -> str:
    """The ending of a file that is not read, and why it is not where it may hold images."""
    suffix = extension(name)
    if NIFTI_NAME.search(name):
        of = "inside an archive" if in_archive else "at a URL" if HAS_NIBABEL else INSTALL
        return f".nii{'' if suffix == 'nii' else '.gz'} ({of})"
    if suffix in DICOM_EXTENSIONS:
        return f".{suffix} ({INSTALL})"
    if suffix in COMPRESSIONS:
        inner = extension(name[: -len(suffix) - 1])
        if inner == "tar":
            return f".tar.{suffix} (to be unpacked first)"
        return f".{inner}.{suffix} (compressed)" if re.fullmatch("[a-z0-9]{1,5}", inner) else f".{suffix} (compressed)"
    if suffix in ("tar", "zip", "parquet"):
        return f".{suffix} {'inside an archive' if in_archive else 'without images'}"
    if suffix in OTHER_ARCHIVES:
        return f".{suffix} (to be unpacked first)"
    if suffix in UNSUPPORTED_EXTENSIONS:
        return f".{suffix} (images that Pillow does not read)"
    if not suffix:
        return "without ending"
    return f".{suffix}" if re.fullmatch("[a-z0-9]{1,10}", suffix) else "with an odd ending"
