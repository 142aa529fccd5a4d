"""Where an export goes: a folder or a file, whole or not at all, with parity.json beside it."""

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

from troodon.config import UsageError
from troodon.lock import alone
from troodon.run import publish, read_json, write_json

PARITY = "parity.json"  # {name of the export: its report}; each folder has one, so exports into one folder share it
WEIGHTS = "model.safetensors"  # names the export in the parity.json of a folder
Write = Callable[[Path], dict]  # fills the place it is given, and returns the report


def put_folder(out: Path, to: str, fingerprint: str, write: Write) -> dict:
    """Fill a new folder, or one that holds an export of this format, which is replaced. Returns the report.

    UsageError before anything is written where something else is there.
    """
    with alone(out):
        partial = None
        try:
            with publish(out, f"{to} export", fingerprint, {"to": to}) as partial:
                report = write(partial)
                write_json(partial / PARITY, {WEIGHTS: report})
        except BaseException:
            if partial is not None:
                shutil.rmtree(partial, ignore_errors=True)
            raise
    return report


def put_file(out: Path, to: str, write: Write) -> dict:
    """Write a new file, or one that is an export of this format, which is replaced. Returns the report.

    Files that go with it, such as weights beside a graph, have names that begin with its own. UsageError before
    anything is written where something else is there.
    """
    reports = check_file(out, to)
    partial = out.with_name(f".{out.name}.partial")
    with alone(out):
        shutil.rmtree(partial, ignore_errors=True)  # of a command that was killed
        partial.mkdir(parents=True)
        try:
            report = write(partial / out.name)
            files = sorted(partial.iterdir(), key=lambda path: path.name == out.name)  # what it needs comes first
            digests = {path.name: _digest(path) for path in files}
            reports = check_file(out, to, set(digests))
            for path in files:
                path.replace(out.with_name(path.name))
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        for old in set(reports.get(out.name, {}).get("files", {})) - set(digests):
            out.with_name(old).unlink(missing_ok=True)
        report = report | {"files": digests}
        with alone(out.with_name(PARITY)):
            write_json(out.with_name(PARITY), _reports(out.with_name(PARITY)) | {out.name: report})
    return report


def check_file(out: Path, to: str, names: set[str] | None = None) -> dict:
    """The reports beside `out`. UsageError if `out`, or a file of these names, is there and not an export of `to`."""
    if out.is_dir():
        raise UsageError(f"{out}: is a folder; give a file for an export to {to}")
    reports = _reports(out.with_name(PARITY))
    known = reports.get(out.name, {})
    for path in (out, *(out.with_name(name) for name in names or ())):
        if not path.exists():
            continue
        if known.get("to") != to or path.name not in known.get("files", {}):
            raise UsageError(f"{path}: is there and not an export to {to}; choose another --out")
        if path == out and _digest(path) != known["files"][path.name]:
            raise UsageError(f"{path}: has changed since it was exported; choose another --out, or remove it")
    return reports


def _reports(path: Path) -> dict:
    """The reports in a parity.json; UsageError if the file is something else."""
    if not path.exists():
        return {}
    try:
        reports = read_json(path)
    except (ValueError, OSError):
        reports = None
    if not isinstance(reports, dict) or not all(isinstance(r, dict) and "to" in r for r in reports.values()):
        raise UsageError(f"{path}: is there and not what exports write; choose another folder for --out")
    return reports


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
