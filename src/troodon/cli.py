"""The verbs as commands. Results on standard output, progress on standard error.

Exit codes: 0 done, 1 failed, 2 a mistake in the command, 130 interrupted with everything saved.
Neither `--help` nor a mistake in a command loads torch.
"""

import dataclasses
import faulthandler
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterable
from typing import Any

from troodon import recipes
from troodon.config import UsageError, nearest, parse
from troodon.curate.config import CurateConfig
from troodon.evaluate.config import SUITES, suite
from troodon.learn.config import PretrainConfig
from troodon.run import DOING, RENDEZVOUS, doing, say
from troodon.verbs.about import Demo, Doctor, Recipes, Report
from troodon.verbs.common import configured
from troodon.verbs.curation import Calibrate, Curate
from troodon.verbs.distillation import Distill, by_name
from troodon.verbs.evaluation import Compare, Evaluate
from troodon.verbs.images import Embed, Pack, Scan, ShowCrops
from troodon.verbs.leakage import Leak
from troodon.verbs.training import Pretrain, beginning

DONE, FAILED, MISTAKE, INTERRUPTED = 0, 1, 2, 130

VERBS: dict[str, type] = {
    "doctor": Doctor, "demo": Demo, "scan": Scan, "pack": Pack, "show crops": ShowCrops, "embed": Embed,
    "curate": Curate, "curate calibrate": Calibrate, "pretrain": Pretrain, "distill": Distill, "evaluate": Evaluate,
    "compare": Compare, "leak": Leak, "report": Report, "recipes": Recipes,
}  # fmt: skip
# Verbs whose settings start from a name: what a name means, what --help shows without one, and the names.
NAMED: dict[str, tuple[Callable[[str], Any], Any, Iterable[str]]] = {
    "curate": (recipes.curate, CurateConfig(), recipes.KNOWN["curate"]),
    "pretrain": (recipes.pretrain, PretrainConfig(), recipes.KNOWN["pretrain"]),
    "show crops": (recipes.pretrain, PretrainConfig(), recipes.KNOWN["pretrain"]),
    "distill": (recipes.distill, PretrainConfig(), recipes.KNOWN["distill"]),
    "evaluate": (suite, SUITES["mine"], SUITES),
}


def main() -> None:
    """The command `troodon`."""
    if sys.stderr is not None:
        faulthandler.enable()  # a crash in a library leaves where each thread was
    sys.exit(run(sys.argv[1:]))


def run(words: list[str]) -> int:
    """Do what a command line says; returns the exit code."""
    debug = "--debug" in words
    words = [w for w in words if w != "--debug"]
    verb = verb_of(words)
    prog = f"troodon {verb}" if verb in VERBS else "troodon"
    try:
        if verb in ("--help", "-h"):
            print(overview())
        elif verb == "--version":
            from importlib.metadata import version

            print(version("troodon"))
        elif verb not in VERBS:
            raise nearest("command", verb, VERBS)
        else:
            done = command(verb, words[len(verb.split()) :])
            doing[:] = json.loads(os.environ[DOING]) if DOING in os.environ else ["troodon", *words]
            done.run()
        return DONE
    except SystemExit as stop:  # --help of a verb
        return int(stop.code or 0)
    except BrokenPipeError:  # whoever read the results has gone, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except (UsageError, KeyboardInterrupt, Exception) as error:
        code, text = verdict(error)
        if RENDEZVOUS in os.environ:
            from troodon import launch

            launch.last_words(text, traceback.format_exc())
            return code
        if debug:
            traceback.print_exc()
        say(f"{prog}: {text}{'; the same command goes on' if code == INTERRUPTED else ''}")
        return code


def verb_of(words: list[str]) -> str:
    """What a command line asks for: its first word, or its first two, as in `show crops`."""
    if not words:
        return "--help"
    of_two = " ".join(words[:2])
    if any(verb.startswith(f"{words[0]} ") for verb in VERBS) and words[0] not in VERBS:
        return of_two
    return of_two if of_two in VERBS else words[0]


def verdict(error: BaseException) -> tuple[int, str]:
    """Exit code and one line for an error."""
    if isinstance(error, UsageError):
        return MISTAKE, str(error)
    if isinstance(error, KeyboardInterrupt) or type(error).__name__ == "Interrupted":
        return INTERRUPTED, str(error) or "interrupted"
    if type(error).__name__ == "RankLost":
        return FAILED, str(error)
    misplaced = FileNotFoundError | FileExistsError | NotADirectoryError | IsADirectoryError | PermissionError
    if isinstance(error, misplaced) and error.filename:
        return MISTAKE, f"{error.filename}: {(error.strerror or type(error).__name__).lower()}"
    said = " ".join(str(error).split()) or "no reason given"
    return FAILED, f"{type(error).__name__}: {said} (--debug shows where)"


def command(verb: str, words: list[str]) -> Any:
    """The command that these words mean. UsageError in one line, SystemExit(0) after --help."""
    kind, default, prog = VERBS[verb], None, f"troodon {verb}"
    if verb in NAMED:
        named, config, known = NAMED[verb]
        if verb == "pretrain":
            named = beginning(value(words, "--init"))
        if words and not words[0].startswith("-"):
            config = configured(words[0], config, named)
        elif not {"--help", "-h"} & set(words):
            raise UsageError(f"say first which recipe: troodon {verb} NAME ...; one of {', '.join(known)}")
        default = blank(kind, config)
    done = parse(kind, words, prog=prog, default=default)
    if not isinstance(done, Distill):
        return done
    configs = {}  # the same options change every student's recipe
    for name, recipe in by_name(done.students).items():
        of_student = blank(kind, configured(recipe, PretrainConfig(), recipes.distill))
        configs[name] = parse(kind, words, prog=prog, default=of_student).config
    return dataclasses.replace(done, configs=configs)


def value(words: list[str], option: str) -> str | None:
    """What follows an option on a command line that is not read yet."""
    for word, following in zip(words, [*words[1:], None]):
        if word == option:
            return following
        if word.startswith(f"{option}="):
            return word.partition("=")[2]
    return None


def blank(kind: type, config: Any) -> Any:
    """A command of that kind of which only the settings are known."""
    import tyro

    missing = {f.name: tyro.MISSING for f in dataclasses.fields(kind) if f.default is dataclasses.MISSING}
    return kind(**missing, config=config)


def overview() -> str:
    """What `troodon --help` prints."""
    lines = ["usage: troodon VERB ...", "", "General visual features from unlabelled images.", ""]
    lines += [f"  {verb:<10} {(kind.__doc__ or '').splitlines()[0]}" for verb, kind in VERBS.items()]
    lines += ["", "troodon VERB --help says more. --debug shows where an error came from."]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
