"""Files of weights in any container: their tensors by name; and in words what a file is that holds none.

A pickle is read without running code of it (`weights_only`). Files are told by what is in them, not by their names.
"""

import argparse
import json
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from troodon.config import UsageError

AGAIN = "download it again"
STATE_DICT = "save the names and tensors of the network: torch.save(network.state_dict(), PATH)"
UNPACK = "extract it, and give the file of weights inside"
IMAGE = "give images to features(), or to --data"
SIGNS = (  # first bytes of a file, what it is, and the remedy
    (b"version https://git-lfs", "a pointer of git-lfs in place of the file", "run: git lfs pull"),
    (b"/annex/objects/", "a pointer of git-annex in place of the file", "run: git annex get"),
    (b"\x89HDF", "an HDF5 file, as Keras and TensorFlow write them", STATE_DICT),
    (b"\x93NUMPY", "a NumPy array", STATE_DICT),
    (b"GGUF", "a GGUF file of llama.cpp", "give the .safetensors that it was made from"),
    (b"PAR1", "a Parquet table", "give a file of weights"),
    (b"\xff\xd8\xff", "a JPEG image", IMAGE),
    (b"\x89PNG", "a PNG image", IMAGE),
    (b"RIFF", "an image, a sound or a video", IMAGE),
    (b"GIF8", "a GIF image", IMAGE),
    (b"%PDF", "a PDF document", "give a file of weights"),
    (b"\x1f\x8b", "a file compressed by gzip", UNPACK),
    (b"\xfd7zXZ", "a file compressed by xz", UNPACK),
    (b"BZh", "a file compressed by bzip2", UNPACK),
    (b"\x28\xb5\x2f\xfd", "a file compressed by zstd", UNPACK),
    (b"7z\xbc\xaf", "a 7z archive", UNPACK),
    (b"Rar!", "a rar archive", UNPACK),
)
SUFFIXES = {
    ".onnx": ("an ONNX graph", STATE_DICT),
    ".pb": ("a TensorFlow graph", STATE_DICT),
    ".tflite": ("a TensorFlow Lite model", STATE_DICT),
    ".msgpack": ("weights of Flax", STATE_DICT),
    ".mlmodel": ("a Core ML model", STATE_DICT),
    ".engine": ("a TensorRT engine", STATE_DICT),
}
IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif")
SHARDS = ("model.safetensors", "pytorch_model.bin")  # of Hugging Face folders; each may have an index of several files


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor in a file of torch or of safetensors, by its name; names inside dictionaries are joined by dots.

    Tensors may lie in the mapped file: copy those to keep. UsageError for any other file, with what it seems to be.
    """
    with open(path, "rb") as file:
        head = file.read(1024)
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1 << 32:
        return _read_safetensors(path)
    if not head.startswith(b"PK") and not head.startswith(b"\x80") and _tar(head):
        raise UsageError(f"{path}: not weights but a tar archive; {UNPACK}")
    if head.startswith(b"PK"):
        _check_zip(path)
    elif not head.startswith(b"\x80"):
        what, remedy = _kind(path, head)
        raise UsageError(f"{path}: not weights but {what}; {remedy}")
    tensors = dict(_named(_read_torch(path, mmap=head.startswith(b"PK"))))
    if not tensors:
        raise UsageError(f"{path}: holds no tensors under names; {STATE_DICT}")
    return tensors


def read_shards(folder: Path) -> dict[str, Tensor]:
    """The tensors of a Hugging Face folder, of one file or of several that an index lists."""
    for name in SHARDS:
        if (index := folder / f"{name}.index.json").exists():
            files = read_description(index).get("weight_map", {})
            tensors: dict[str, Tensor] = {}
            for file in sorted(set(files.values())):
                if not (folder / file).exists():
                    raise UsageError(f"{folder / file}: is missing, and {index.name} lists it; {AGAIN}")
                tensors |= read_tensors(folder / file)
            if missing := sorted(files.keys() - tensors.keys()):
                raise UsageError(f"{folder}: {index.name} lists {missing[0]}, which is in none of its files; {AGAIN}")
            return tensors
        if (folder / name).exists():
            return read_tensors(folder / name)
    names = sorted(path.name for path in folder.iterdir())
    raise UsageError(f"{folder}: has none of {', '.join(SHARDS)}; it holds {', '.join(names[:5])}")


def read_description(path: Path) -> dict[str, Any]:
    """A JSON object in a file. UsageError if it is not one."""
    try:
        description = json.loads(path.read_text())
    except (ValueError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: not JSON ({error}); {AGAIN}") from None
    if not isinstance(description, dict):
        raise UsageError(f"{path}: not a JSON object; {AGAIN}")
    return description


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise UsageError(f"{path}: not whole, the beginning of a safetensors file ({error}); {AGAIN}") from None


def _read_torch(path: Path, mmap: bool) -> Any:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # the settings in checkpoints of DINO and MAE
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except OSError:
        raise
    except pickle.UnpicklingError as error:
        if found := re.search(r"GLOBAL `?([\w.]+)", str(error)):
            objects = f"holds Python objects ({found[1]}) besides tensors, which could run any code"
            raise UsageError(f"{path}: {objects}; {STATE_DICT}") from None
        raise UsageError(f"{path}: not whole, or not a file of torch; {AGAIN}") from None
    except Exception as error:  # a damaged pickle can raise anything
        reason = (str(error).splitlines() or [type(error).__name__])[0][:100]
        raise UsageError(f"{path}: not whole, or not a file of torch ({reason}); {AGAIN}") from None


def _named(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor) and name:
        yield name, value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            if isinstance(key, str):  # an optimiser's state is under numbers
                yield from _named(inner, f"{name}.{key}" if name else key)


def _check_zip(path: Path) -> None:
    """UsageError for a zip that torch did not write."""
    try:
        with zipfile.ZipFile(path) as file:
            names = file.namelist()
    except (zipfile.BadZipFile, UnicodeDecodeError):
        size = path.stat().st_size / 1e6
        raise UsageError(f"{path}: not whole, the first {size:.3g} MB of a file; {AGAIN}") from None
    if any(name.endswith("/data.pkl") for name in names):
        if any("/code/" in name for name in names):
            raise UsageError(f"{path}: not weights but a TorchScript program; {STATE_DICT}")
        return
    kinds = {".npy": ("NumPy arrays (.npz)", STATE_DICT), ".h5": ("a Keras model", STATE_DICT)}
    kinds |= {".pt": ("a program of torch.export (.pt2)", STATE_DICT)}
    what, remedy = next(
        (kinds[end] for end in kinds for name in names if name.endswith(end)), ("a zip archive", UNPACK)
    )
    raise UsageError(f"{path}: not weights but {what}; {remedy}")


def _kind(path: Path, head: bytes) -> tuple[str, str]:
    """What a file without tensors seems to be, and the remedy."""
    if not path.stat().st_size:
        return "an empty file", AGAIN
    for start, what, remedy in SIGNS:
        if head.startswith(start):
            return what, remedy
    if path.suffix.lower() in SUFFIXES:
        return SUFFIXES[path.suffix.lower()]
    if head[:1] == b"\x08" and head[2:3] == b"\x12":
        return SUFFIXES[".onnx"]
    if head[4:8] == b"TFL3":
        return SUFFIXES[".tflite"]
    if not head.strip(b"\0"):
        return "nothing but zeros, a download that never began", AGAIN
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    if text.startswith(b"<"):
        return "a web page (or another answer of a server)", f"{AGAIN}, from the address of the file itself"
    if text.startswith(b"{"):
        return "a JSON text", "give its folder if the weights lie beside it, or the file of weights"
    if b"\0" not in head and head.isascii():
        return "a text", "give a file of weights"
    return "a file of no known kind", "give a .pth, .bin or .safetensors"


def _tar(head: bytes) -> bool:
    return head[257:262] == b"ustar"
