"""Upload of an exported folder to the Hugging Face hub: the only thing that leaves the machine."""

import re
from pathlib import Path
from typing import Any

from troodon.config import UsageError
from troodon.run import MANIFEST, say
from troodon.text import file_size

STAYS = (MANIFEST,)  # it has the command, with paths of this machine


def check_name(name: str) -> None:
    """UsageError unless it is the name of a repository with its owner."""
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name):
        raise UsageError(f"push {name!r}: give the owner and the name, such as me/first")


def push(folder: Path, name: str, api: Any = None) -> str:
    """Upload the folder to the repository, which is made if it is not there, and then private. Returns its address.

    `api` is a `huggingface_hub.HfApi`; by default one with the endpoint and the token of this machine. A line says
    before what is uploaded and where to.
    """
    if api is None:
        from huggingface_hub import HfApi

        api = HfApi()
    files = [path for path in sorted(folder.iterdir()) if path.name not in STAYS]
    listed = ", ".join(f"{path.name} ({file_size(path.stat().st_size)})" for path in files)
    say(f"export: uploads to {getattr(api, 'endpoint', 'the hub')}, as {name} (private if it is new): {listed}")
    try:
        api.create_repo(name, repo_type="model", private=True, exist_ok=True)
        done = api.upload_folder(
            repo_id=name, repo_type="model", folder_path=str(folder), ignore_patterns=list(STAYS),
            commit_message="Exported by Troodon",
        )  # fmt: skip
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise RuntimeError(f"{folder} is complete, but was not uploaded to {name}: {reason}") from error
    return str(getattr(done, "commit_url", done))
