"""Configuration: frozen dataclasses in and out of command lines and YAML, strictly.

A config is data. A recipe builds it, the command line or a file changes it, it is resolved once and
recorded whole. There is one parser: a YAML file is turned into the command line that says the same, so an
unknown key or a wrong type is the same error, with the same nearest right name, wherever it was written.
"""

import contextlib
import dataclasses
import difflib
import functools
import hashlib
import io
import json
import math
import re
import sys
from collections.abc import Iterable, Iterator
from numbers import Real
from pathlib import Path
from typing import Any, TypeVar

C = TypeVar("C")
Range = tuple[float | str, ...]  # values of pixels that become black and white; two for all channels, or for each


class UsageError(ValueError):
    """A mistake the user can put right. Its message is one line: the value, what is wrong, the nearest fix."""


def nearest(kind: str, name: object, known: Iterable[str]) -> UsageError:
    """The error for a name that is not among the `known` ones."""
    known = sorted(known)
    close = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return UsageError(f"unknown {kind} {str(name)!r}: {hint}it is one of {', '.join(known) or '(none)'}")


def within(config: object, section: str, low: float, high: float | None = None, *names: str) -> None:
    """UsageError for a number, or one of several, of these fields of `config` outside [low, high]."""
    for name in names:
        value = getattr(config, name)
        for number in value if isinstance(value, tuple) else (value,):
            if number is not None and not (low <= number and (high is None or number <= high)):
                allowed = f"{low} or more" if high is None else f"from {low} to {high}"
                raise UsageError(f"{section}{name} {number}: must be {allowed}")


def check_range(range: Range | None) -> Range | None:
    """The range; UsageError unless it is finite numbers, the smaller one first: two, or two for each channel.

    The error for percentiles (see `percentiles`) says how they become numbers.
    """
    if range is None or _is_pairs(range):
        return range
    text = range_text(range)
    if percentiles(range):
        fix = f"`troodon scan DATA --out index --range {text}`, then `--data index`"
        raise UsageError(f"range {text}: only scan measures percentiles, and its index keeps them as numbers: {fix}")
    raise UsageError(f"range {text}: two numbers, the smaller one first, such as 0 4095; or two for each channel")


def _is_pairs(range: Range) -> bool:
    numbers = [float(n) for n in range if isinstance(n, Real) and math.isfinite(n)]
    is_whole = len(numbers) == len(range) and bool(numbers) and len(numbers) % 2 == 0
    return is_whole and all(low < high for low, high in zip(numbers[::2], numbers[1::2]))


def percentiles(range: Range | None) -> tuple[float, float] | None:
    """The numbers of a range such as ("1%", "99%"), which stands for percentiles of the values of a set; else None.

    UsageError for percentiles that do not lie in 0 to 100, the smaller one first.
    """
    if range is None or not any(isinstance(n, str) and n.endswith("%") for n in range):
        return None
    with contextlib.suppress(ValueError):
        low, high = (float(str(n).removesuffix("%")) if str(n).endswith("%") else math.nan for n in range)
        if 0 <= low < high <= 100:
            return low, high
    raise UsageError(f"range {range_text(range)}: two percentiles, the smaller one first, such as 1% 99%")


def range_text(range: Range) -> str:
    """A range as on a command line."""
    return " ".join(f"{n:.10g}" if isinstance(n, Real) else str(n) for n in range)


def pair(side: int | tuple[int, int]) -> tuple[int, int]:
    """Height and width of what a setting says by one side, where both are the same, or by both."""
    return side if isinstance(side, tuple) else (side, side)


def parse(target: Any, arguments: list[str], *, prog: str, default: Any = None, description: str | None = None) -> Any:
    """Read command-line `arguments` into `target`, a dataclass or a function, which is then built or called.

    Raises UsageError, in one line, for anything that does not fit; `--help` prints and raises SystemExit(0).
    """
    import tyro

    options = {} if default is None else {"default": default}
    arguments, printed = renewed(arguments, default, prog), io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            return tyro.cli(target, args=arguments, prog=prog, description=description, **options)
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise UsageError(_one_line(printed.getvalue(), dict(_options(arguments)))) from None


def renewed(arguments: list[str], default: Any, prog: str) -> list[str]:
    """The same command line with options of earlier versions under the names they have now.

    A config names its earlier fields in `RENAMED` ({"old": "new"}); one whose fields became something else has a method
    `renewed`, which takes and returns {field: words}. A note on standard error says what is read as what.
    """
    notes = []
    for prefix, section in _sections(default):
        changes = getattr(section, "RENAMED", {})
        words, options = [], {}
        for flag, values in _options(arguments) if changes else []:
            field, dot, rest = flag.removeprefix(prefix).partition(".")
            kept = field == changes.get(field) and values  # a flag that takes a value now, and has one
            if flag.startswith(prefix) and field in changes and not kept:
                options[f"{field}{dot}{rest}"] = values
            else:
                words += ([_flag(flag)] if flag else []) + values
        if not options:
            continue
        earlier = ", ".join(_flag(f"{prefix}{field}") for field in dict.fromkeys(o.partition(".")[0] for o in options))
        if hasattr(section, "renewed"):
            now = section.renewed(options)
            notes.append(f"{earlier} as {' '.join(' '.join((_flag(prefix + o), *v)) for o, v in now.items())}")
        else:
            now = {changes[(parts := o.partition("."))[0]] + parts[1] + parts[2]: v for o, v in options.items()}
            fields = dict.fromkeys(o.partition(".")[0] for o in now)
            notes.append(f"{earlier} as {', '.join(_flag(prefix + field) for field in fields)}")
        if twice := [option for option in now if prefix + option in dict(_options(words))]:
            raise UsageError(f"{earlier} and {_flag(prefix + twice[0])} say the same: give the second one only")
        arguments = words + [word for option, values in now.items() for word in (_flag(prefix + option), *values)]
    if notes:
        _note(f"{prog}: reads options of an earlier version: {'; '.join(notes)}")
    return arguments


def _sections(config: Any, prefix: str = "--") -> Iterator[tuple[str, Any]]:
    """Every config inside of `config`, and what its options start with. The field `config` of a command has no name."""
    if not dataclasses.is_dataclass(config):
        return
    yield prefix, config
    for field in dataclasses.fields(config):
        inner = prefix if field.name == "config" else f"{prefix}{field.name}."
        yield from _sections(getattr(config, field.name), inner)


def _options(arguments: list[str]) -> list[tuple[str, list[str]]]:
    """The words of a command line as options with their values; words before the first option have the option ""."""
    options: list[tuple[str, list[str]]] = [("", [])]
    for word in arguments:
        flag, equals, value = word.partition("=")
        if word.startswith("--"):
            options.append((f"--{flag[2:].replace('-', '_')}", [value] if equals else []))
        else:
            options[-1][1].append(word)
    return options


def _flag(option: str) -> str:
    return f"--{option.removeprefix('--').replace('_', '-')}"


@functools.cache
def _note(message: str) -> None:
    """Print a note on standard error, once."""
    print(f"note: {message}", file=sys.stderr)


def to_dict(config: Any) -> dict:
    """Plain dictionaries, lists, numbers and strings, as YAML and JSON write them.

    A config names in `LATER` the fields that it did not always have: they are written only where they differ from their
    defaults, so that what was recorded before, and its fingerprint, stay as they are.
    """
    return json.loads(json.dumps(_plain(config)))


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, dict):
        return {name: _plain(v) for name, v in value.items()}
    if not dataclasses.is_dataclass(value):
        return value
    later = {f.name: f.default for f in dataclasses.fields(value) if f.name in getattr(value, "LATER", ())}
    items = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    return {name: _plain(v) for name, v in items.items() if not (name in later and v == later[name])}


def from_dict(default: C, changes: dict, *, source: str) -> C:
    """`default` with the (nested) `changes` applied; `source` names where they come from in errors."""
    try:
        return parse(type(default), _arguments(changes), prog=source, default=default)
    except UsageError as error:
        raise UsageError(f"{source}: {error}") from None


def from_yaml(default: C, path: Path) -> C:
    import yaml

    try:
        changes = yaml.safe_load(path.read_text()) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(changes, dict):
        raise UsageError(f"{path}: expected settings, as 'key: value' lines")
    return from_dict(default, changes, source=str(path))


def to_yaml(config: Any) -> str:
    import yaml

    return yaml.safe_dump(to_dict(config), sort_keys=False)


def differences(old: dict, new: dict, prefix: str = "") -> list[str]:
    """`a.b: 1 -> 2` for every setting in which two recorded configs differ."""
    lines = []
    for key in sorted(old.keys() | new.keys()):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            lines += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            lines.append(f"{prefix}{key}: {a} -> {b}")
    return lines


def fingerprint(*things: Any) -> str:
    """Twelve hex digits that name these configs, dictionaries, strings or numbers and no others."""
    plain = [to_dict(t) if dataclasses.is_dataclass(t) else t for t in things]
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:12]


def _arguments(changes: dict, prefix: str = "--") -> list[str]:
    words = []
    for key, value in changes.items():
        flag = f"{prefix}{str(key).replace('_', '-')}"
        if isinstance(value, dict):
            words += _arguments(value, f"{flag}.")
        elif isinstance(value, bool):
            head, dot, leaf = flag[2:].rpartition(".")
            words.append(flag if value else f"--{head}{dot}no-{leaf}")
        else:
            words += [flag, *_flat(value)]
    return words


def _flat(value: Any) -> list[str]:
    """The words of a setting, without the brackets of lists of lists: a command line has none."""
    return [word for v in value for word in _flat(v)] if isinstance(value, list | tuple) else [str(value)]


def _one_line(box: str, given: dict[str, list[str]]) -> str:
    """The words inside the box that tyro draws around an error, without the pointer to --help. A value that cannot be
    read is said as it was given, with the form that it must have."""
    rows = [row.strip(" │|") for row in re.sub(r"\x1b\[[0-9;]*m", "", box).splitlines()[1:] if re.search(r"\w", row)]
    text = " ".join(rows)
    if (wrong := re.match(r"Error parsing (--\S+): .*Argument helptext: \1 ", text)) is not None:
        option, form = wrong[1], rows[rows.index("Argument helptext:") + 1].removeprefix(wrong[1]).strip()
        return f"{option} {' '.join(given.get('--' + option[2:].replace('-', '_'), []))}: must be {form}"
    return re.split(r" ?(?:For full helptext|Argument helptext|Got errors:)", text)[0].strip()
