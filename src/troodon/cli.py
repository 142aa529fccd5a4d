"""The verbs as commands. Results on standard output, progress on standard error.

Exit codes: 0 done, 1 failed, 2 a mistake in the command, 130 interrupted with everything saved.
Neither `--help` nor a mistake in a command loads torch.
"""

import dataclasses
import faulthandler
import json
import math
import os
import sys
from collections.abc import Callable, Iterable
from typing import Any

from troodon import recipes
from troodon.config import UsageError, nearest, parse
from troodon.curate.config import CurateConfig
from troodon.demo import Demo
from troodon.doctor import Doctor
from troodon.evaluate.config import SUITES, get_suite
from troodon.launch import run_command
from troodon.learn.config import PretrainConfig
from troodon.run import COMMAND, current_command, version
from troodon.verbs import automatic
from troodon.verbs.about import Recipes, Report
from troodon.verbs.common import resolve_config
from troodon.verbs.curation import Calibrate, Curate
from troodon.verbs.dedup import Apply, Dedup
from troodon.verbs.distillation import Distill, recipes_by_name
from troodon.verbs.embedding import Embed
from troodon.verbs.evaluation import Compare, Evaluate
from troodon.verbs.exploration import Explore
from troodon.verbs.export import Export
from troodon.verbs.images import Pack, Scan
from troodon.verbs.leakage import Leak
from troodon.verbs.show import ShowAttention, ShowCrops, ShowMatches, ShowNeighbours, ShowPca
from troodon.verbs.training import Pretrain, pretrain_recipes
from troodon.verbs.watching import Watch

VERBS: dict[str, type] = {
    "doctor": Doctor, "demo": Demo, "scan": Scan, "pack": Pack, "embed": Embed,
    "show crops": ShowCrops, "show pca": ShowPca, "show attention": ShowAttention, "show neighbours": ShowNeighbours,
    "show matches": ShowMatches,
    "dedup": Dedup, "apply": Apply, "curate": Curate, "curate calibrate": Calibrate, "pretrain": Pretrain,
    "distill": Distill, "evaluate": Evaluate, "compare": Compare, "leak": Leak, "explore": Explore,
    "export": Export,
    "watch": Watch, "report": Report, "recipes": Recipes,
}  # fmt: skip
# Verbs whose config starts from a name: the config of a name, what --help shows without a name, and the names.
CONFIGURED: dict[str, tuple[Callable[[str], Any], Any, Iterable[str]]] = {
    "curate": (recipes.curate, CurateConfig(), recipes.KNOWN["curate"]),
    "pretrain": (recipes.pretrain, PretrainConfig(), recipes.KNOWN["pretrain"]),
    "show crops": (recipes.pretrain, PretrainConfig(), recipes.KNOWN["pretrain"]),
    "distill": (recipes.distill, PretrainConfig(), recipes.KNOWN["distill"]),
    "evaluate": (get_suite, SUITES["mine"], SUITES),
}


def main() -> None:
    """The command `troodon`."""
    if sys.stderr is not None:
        faulthandler.enable()  # a crash in a library prints the stack of each thread
    sys.exit(run(sys.argv[1:]))


def run(words: list[str]) -> int:
    """Run a command line; returns the exit code."""
    debug = "--debug" in words
    words = [w for w in words if w != "--debug"]
    verb = verb_of(words)

    def work() -> None:
        if verb in ("--help", "-h"):
            print(overview())
        elif verb == "--version":
            print(version())
        elif verb not in VERBS:
            raise nearest("command", verb, VERBS)
        else:
            parsed = parse_command(verb, words[len(verb.split()) :])
            current_command[:] = json.loads(os.environ[COMMAND]) if COMMAND in os.environ else ["troodon", *words]
            parsed.run()

    return run_command(work, f"troodon {verb}" if verb in VERBS else "troodon", debug)


def verb_of(words: list[str]) -> str:
    """The verb of a command line: its first word, or its first two, as in `show crops`."""
    if not words:
        return "--help"
    two_words = " ".join(words[:2])
    if any(verb.startswith(f"{words[0]} ") for verb in VERBS) and words[0] not in VERBS:
        return two_words
    return two_words if two_words in VERBS else words[0]


def parse_command(verb: str, words: list[str]) -> Any:
    """The command object of `verb` with the options in `words`. UsageError in one line, SystemExit(0) after --help."""
    kind, default, prog = VERBS[verb], None, f"troodon {verb}"
    if verb in CONFIGURED:
        named, config, known = CONFIGURED[verb]
        reasons: tuple[str, ...] = ()
        if verb == "pretrain":
            named = pretrain_recipes(option_value(words, "--init"))
        if len(lengths := [o for o in ("--steps", "--minutes", "--hours") if option_value(words, o) is not None]) > 1:
            raise UsageError(f"{' and '.join(lengths)}: give one of them")
        if verb == "pretrain" and words and words[0] == automatic.NAME and not {"--help", "-h"} & set(words):
            config, reasons = chosen(words)
        elif words and not words[0].startswith("-"):
            config = resolve_config(words[0], config, named, steps=option_value(words, "--steps"))
        elif not {"--help", "-h"} & set(words):
            raise UsageError(f"say first which recipe: troodon {verb} NAME ...; one of {', '.join(known)}")
        default = command_with(kind, config, **({"reasons": reasons} if reasons else {}))
    command = parse(kind, words, prog=prog, default=default)
    if not isinstance(command, Distill):
        return command
    configs = {}  # the same options change every student's recipe
    for name, recipe in recipes_by_name(command.students).items():
        student = resolve_config(recipe, PretrainConfig(), recipes.distill, steps=option_value(words, "--steps"))
        student_default = command_with(kind, student)
        configs[name] = parse(kind, words, prog=prog, default=student_default).config
    return dataclasses.replace(command, configs=configs)


def chosen(words: list[str]) -> tuple[PretrainConfig, tuple[str, ...]]:
    """What `auto` chooses for the command line, and why. What is no length is refused later, by its name."""

    def number(option: str) -> float:
        try:
            value = float(option_value(words, option) or 0)
        except ValueError:
            return 0.0
        return value if 0 < value < math.inf else 0.0

    minutes, steps = number("--minutes") or 60 * number("--hours"), int(number("--steps"))
    init, devices = option_value(words, "--init"), option_value(words, "--devices") or "auto"
    data, out = option_values(words, "--data"), option_value(words, "--out")
    choice = automatic.choose(data, out, minutes=minutes, steps=steps, devices=devices, init=init)
    return choice.config, choice.reasons


def option_values(words: list[str], option: str) -> list[str]:
    """All values of an option that takes several, on a command line that is not parsed yet."""
    values: list[str] = []
    for number, word in enumerate(words):
        if word.startswith(f"{option}="):
            values.append(word.partition("=")[2])
        elif word == option:
            rest = words[number + 1 :]
            values += rest[: next((n for n, other in enumerate(rest) if other.startswith("--")), len(rest))]
    return values


def option_value(words: list[str], option: str) -> str | None:
    """The value of an option on a command line that is not parsed yet; of several, the last."""
    for word, following in reversed(list(zip(words, [*words[1:], None]))):
        if word == option:
            return following
        if word.startswith(f"{option}="):
            return word.partition("=")[2]
    return None


def command_with(kind: type, config: Any, **others: Any) -> Any:
    """A command of that kind with this config; its required options are still missing."""
    import tyro

    missing = {f.name: tyro.MISSING for f in dataclasses.fields(kind) if f.default is dataclasses.MISSING}
    return kind(**missing, config=config, **others)


def overview() -> str:
    """The text of `troodon --help`."""
    lines = ["usage: troodon VERB ...", "", "General visual features from unlabelled images.", ""]
    lines += [f"  {verb:<10} {(kind.__doc__ or '').splitlines()[0]}" for verb, kind in VERBS.items()]
    lines += ["", "troodon VERB --help says more. --debug shows where an error came from."]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
