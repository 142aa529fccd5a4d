"""Weights by name: in the folder that TROODON_WEIGHTS names, else from the Hugging Face hub, once and not silently."""

import contextlib
import hashlib
import os
import re
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

from troodon.config import UsageError
from troodon.model.files import SHARDS, read_description
from troodon.run import say
from troodon.text import file_size

FOLDER = "TROODON_WEIGHTS"  # environment variable: a folder of weights
SIZES = {"s": "small", "b": "base", "l": "large", "g": "giant"}
RELEASED = {  # public names, and the repositories on the hub where their owner publishes them
    **{f"dinov2_vit{s}14": f"facebook/dinov2-{size}" for s, size in SIZES.items()},
    **{f"dinov2_vit{s}14_reg": f"facebook/dinov2-with-registers-{size}" for s, size in SIZES.items()},
    **{
        f"dinov3_vit{s}16{plus}": f"facebook/dinov3-vit{s}16{plus}-pretrain-lvd1689m"
        for s, plus in (("s", ""), ("s", "plus"), ("b", ""), ("l", ""), ("h", "plus"), ("7b", ""))
    },
}
HUB = re.compile(r"hf:([\w.-]+/[\w.-]+?)(?:@([\w.-]+))?")  # hf:owner/name, or hf:owner/name@revision


class Named(NamedTuple):
    """Weights by name, and where they lie."""

    name: str
    path: Path


def find(place: str) -> Named | None:
    """The weights of a public name, or of hf:owner/name; None for anything else.

    UsageError, with the remedy, if they are not here and cannot be fetched.
    """
    found = HUB.fullmatch(place)
    if place.startswith("hf:") and not found:
        raise UsageError(f"{place}: a repository of the hub is hf:owner/name")
    if not found and place not in RELEASED:
        return None
    repository, revision = (found[1], found[2]) if found else (RELEASED[place], None)
    name = repository.partition("/")[2] if found else place
    if revision is None and (path := _in_folder(name, repository)) is not None:
        tell(f"{place}: is {path}")
        return Named(name, path)
    return Named(name, _from_hub(place, repository, revision))


def tell(line: str) -> None:
    """Say it once, also where several ranks load the same weights."""
    if os.environ.get("RANK", "0") == "0":
        say(line)


def suggestion(place: str) -> str:
    """What may be meant by a place that is not there."""
    if re.fullmatch(r"(facebook|timm)/[\w.-]+", place):
        return f"; did you mean hf:{place}?"
    close = get_close_matches(place, RELEASED, n=1, cutoff=0.7)
    return f"; did you mean {close[0]}?" if close else ""


def _in_folder(name: str, repository: str) -> Path | None:
    """The weights in the folder of TROODON_WEIGHTS: a file as it was released, or a folder of the repository's name."""
    if not (text := os.environ.get(FOLDER)):
        return None
    folder = Path(text).expanduser()
    if not folder.is_dir():
        raise UsageError(f"{FOLDER}={text}: no such folder")
    if (folder / repository).is_dir():
        return folder / repository
    stems = {name, repository.partition("/")[2], f"{name.replace('_reg', '_reg4')}_pretrain"}
    for path in sorted(folder.iterdir()):
        stem = path.name if path.is_dir() else path.stem
        if stem in stems or re.fullmatch(rf"{re.escape(name)}_pretrain_lvd1689m(-\w+)?", stem):
            return path
    return None


def _from_hub(place: str, repository: str, revision: str | None) -> Path:
    """The folder of a repository in the hub's cache; what is missing of it is fetched."""
    try:
        import huggingface_hub as hub
        import huggingface_hub.errors
    except ImportError:
        where = f"is not in {FOLDER}={os.environ[FOLDER]}" if FOLDER in os.environ else f"{FOLDER} names no folder"
        raise UsageError(f'{place}: {where}; to fetch it from the hub: pip install "troodon[hub]"') from None
    with contextlib.suppress(hub.errors.LocalEntryNotFoundError, FileNotFoundError):
        config = hub.hf_hub_download(repository, "config.json", revision=revision, local_files_only=True)
        if _is_whole(folder := Path(config).parent):
            return folder
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE") or hub.is_offline_mode():
        raise UsageError(f"{place}: {repository} is not in the hub's cache, and HF_HUB_OFFLINE is set; unset it")
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    with _explained(hub, place, repository, endpoint):
        info = hub.HfApi(endpoint=endpoint).model_info(repository, revision=revision, files_metadata=True)
        files = {file.rfilename: file for file in info.siblings or []}
        wanted = _wanted(list(files), place, repository)
        size = file_size(sum(files[name].size or 0 for name in wanted))
        tell(f"{place}: fetches {repository} from {endpoint}, {size}, licence: {_licence(info)}")
        for name in wanted:
            path = Path(hub.hf_hub_download(repository, name, revision=revision, endpoint=endpoint))
            _check(path, files[name], place)
    return path.parent


@contextlib.contextmanager
def _explained(hub: Any, place: str, repository: str, endpoint: str) -> Iterator[None]:
    """Errors of the hub in words, with the remedy."""
    try:
        yield
    except hub.errors.GatedRepoError:
        remedy = f"accept it at {endpoint}/{repository}, then run: hf auth login"
        raise UsageError(f"{place}: {repository} asks you to accept its licence first; {remedy}") from None
    except hub.errors.RevisionNotFoundError:
        raise UsageError(f"{place}: {repository} has no such revision") from None
    except hub.errors.RepositoryNotFoundError:
        raise UsageError(f"{place}: {endpoint} has no repository {repository} (or it is private)") from None
    except Exception as error:
        if isinstance(error, UsageError) or getattr(error, "errno", None) is not None:  # a full disk, for one
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0][:150]
        remedy = f"try again, whole files are kept; or put the file into the folder of {FOLDER}"
        raise UsageError(f"{place}: cannot be fetched from {endpoint} ({reason}); {remedy}") from None


def _wanted(names: list[str], place: str, repository: str) -> list[str]:
    """The files to fetch: the network's description, and its weights in the first form there is."""
    beside = [name for name in ("preprocessor_config.json", "config.json") if name in names]
    for weights in SHARDS:
        if weights in names:
            return [*beside, weights]
        if f"{weights}.index.json" in names:
            stem, _, end = weights.partition(".")
            shards = [n for n in names if re.fullmatch(rf"{stem}-\d+-of-\d+\.{end}", n)]
            return [*beside, f"{weights}.index.json", *shards]
    raise UsageError(f"{place}: {repository} has none of {', '.join(SHARDS)}; it has {', '.join(names[:5])}")


def _is_whole(folder: Path) -> bool:
    """Whether a folder of the cache has the weights, all of them."""
    for weights in SHARDS:
        if (index := folder / f"{weights}.index.json").exists():
            return all((folder / name).exists() for name in read_description(index).get("weight_map", {}).values())
        if (folder / weights).exists():
            return True
    return False


def _check(path: Path, file: Any, place: str) -> None:
    """UsageError, and the file is gone, if it has not the size and the hash that the hub tells."""
    with open(path, "rb") as opened:
        is_same = file.lfs is None or hashlib.file_digest(opened, "sha256").hexdigest() == file.lfs.sha256
    if is_same and file.size in (None, path.stat().st_size):
        return
    for there in {path.resolve(), path}:
        there.unlink(missing_ok=True)
    raise UsageError(f"{place}: {path.name} is not the file that the hub tells of, and is removed; try again")


def _licence(info: Any) -> str:
    card = info.card_data or {}
    named = card.get("license_name") if card.get("license") == "other" else card.get("license")
    return str(named or next((tag[8:] for tag in info.tags or [] if tag.startswith("license:")), "not named"))
