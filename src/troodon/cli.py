"""The verbs as commands. Results on standard output, progress on standard error.

Exit codes: 0 done, 1 failed, 2 a mistake in the command, 130 interrupted with everything saved.
Neither `--help` nor a mistake in a command loads torch.
"""

import json
import os
import shlex
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

from tyro.conf import Positional, arg

from troodon import recipes, verbs
from troodon.config import UsageError, nearest, parse, to_yaml
from troodon.curate.config import CurateConfig
from troodon.evaluate.config import SUITES, EvaluateConfig, suite
from troodon.learn.config import PretrainConfig
from troodon.run import DOING, RENDEZVOUS, doing, say
from troodon.slurm import SlurmConfig

DONE, FAILED, MISTAKE, INTERRUPTED = 0, 1, 2, 130

Images = Annotated[tuple[str, ...], arg(metavar="PATH [PATH ...]")]


@dataclass(frozen=True)
class Scan:
    """Inventory of images: formats, sizes, broken files with the reason, exact duplicates. Changes nothing."""

    data: Positional[Images]
    """Folders, tars, paths inside tars (x.tar/train), or images."""
    out: str | None = None
    """Where to write the index, a folder; nowhere if left out."""
    threads: int = 0
    """Threads that read; 0 is one per processor."""
    json: bool = False
    """Print the summary as JSON."""

    def run(self) -> None:
        from troodon.data.scan import render

        summary = verbs.scan(_some(self.data, "images to scan"), self.out, threads=self.threads)
        print(json.dumps(summary, indent=1) if self.json else render(summary))
        if self.out:
            _next(f"troodon pretrain small --data {_q(self.out)} --out runs/first")


@dataclass(frozen=True)
class Embed:
    """One vector per image, by a backbone: embeddings.npy beside the list of images."""

    backbone: str
    """A run, a backbone folder, released weights (.pth), or a Hugging Face folder."""
    data: Images
    """Folders, tars, paths inside tars, or images."""
    out: str
    """A new folder."""
    tokens: str = "cls"
    """cls: class tokens; cls+mean: these and mean patch tokens."""
    batch: int = 64
    """Images at once."""
    threads: int = 0
    """Threads that read; 0 is one per processor."""

    def run(self) -> None:
        print(
            verbs.embed(self.backbone, self.data, self.out, tokens=self.tokens, batch=self.batch, threads=self.threads)
        )


@dataclass(frozen=True)
class Curate:
    """From a pool of images, without copies, those that resemble a curated set. Copies and deletes nothing."""

    recipe: Positional[str]
    """A recipe (see `troodon recipes`) or a YAML file."""
    curated: Images
    """Images that are wanted: folders, tars, paths inside tars."""
    uncurated: Images
    """The pool to choose from."""
    backbone: str
    """What compares images: a run, a backbone folder, released weights (.pth), a Hugging Face folder."""
    out: str
    """A new folder: the selection, which `pretrain --data` takes."""
    config: Annotated[CurateConfig, arg(name="")] = CurateConfig()

    def run(self) -> None:
        out = verbs.curate(self.config, self.curated, self.uncurated, self.backbone, self.out)
        summary = json.loads((out / "summary.json").read_text())
        for stage in summary["stages"]:
            print(f"{stage['name']:<10} {stage['in']:>9,} in {stage['dropped']:>9,} dropped {stage['out']:>9,} out")
        print(out)
        _next(f"troodon pretrain small --data {_q(self.out)} --out runs/first", f"troodon report {_q(self.out)}")


@dataclass(frozen=True)
class Pretrain:
    """Learn features from unlabelled images. The same command on the same folder goes on where it stopped."""

    recipe: Positional[str]
    """A recipe (see `troodon recipes`) or a YAML file."""
    data: Images = ()
    """Folders, tars, paths inside tars, an index or a selection. A dry run does without."""
    out: str | None = None
    """The run's folder. A dry run does without."""
    init: str | None = None
    """First weights: a run, a backbone folder or released weights of the same network."""
    devices: str = "auto"
    """Devices of this machine to train on, or processes where it has none; auto is all devices.
    For a dry run, a number is one of accelerators, which need not be here."""
    dry_run: bool = False
    """Tell what the run would take, and stop."""
    images_per_second: float | None = None
    """For a dry run: what all devices together see, to tell the time by."""
    slurm: SlurmConfig = SlurmConfig()
    config: Annotated[PretrainConfig, arg(name="")] = PretrainConfig()

    def run(self) -> None:
        devices, slurm = self.devices, self.slurm
        if slurm.nodes and not self.dry_run:
            print(verbs.submit(self.config, self.data, self.out, slurm, init=self.init))
            return
        if slurm.nodes:
            devices = slurm.nodes * slurm.gpus_per_node
        folder = verbs.pretrain(
            self.config, self.data, self.out, init=self.init, devices=devices, dry_run=self.dry_run,
            images_per_second=self.images_per_second,
        )  # fmt: skip
        if folder is not None and self.out is not None:
            print(folder)
            _next(
                f"troodon evaluate mine --backbone {_q(self.out)} --data LABELLED --out {_q(self.out)}-scores",
                f"troodon report {_q(self.out)}",
            )


@dataclass(frozen=True)
class Evaluate:
    """What frozen features are worth on labelled images, beside trivial ones: scores with intervals."""

    suite: Positional[str]
    """A suite: mine, quick or paper; or a YAML file."""
    backbone: str
    """A run, a backbone folder, released weights (.pth), or a Hugging Face folder."""
    data: Images
    """Labelled images: labels from folder names or a labels.csv, splits from folders named train and val."""
    out: str
    """A new folder for the scores."""
    baselines: bool = True
    """Also a random network, a colour histogram and raw pixels."""
    cache: str | None = None
    """A folder that keeps features for the next time."""
    threads: int = 0
    """Threads that read; 0 is one per processor."""
    json: bool = False
    """Print the scores as JSON."""
    config: Annotated[EvaluateConfig, arg(name="")] = EvaluateConfig()

    def run(self) -> None:
        scores = verbs.evaluate(
            self.config, self.backbone, self.data, self.out,
            baselines=self.baselines, cache=self.cache, threads=self.threads,
        )  # fmt: skip
        print(json.dumps(scores, indent=1) if self.json else table(scores))
        _next(f"troodon report {_q(self.out)}")


@dataclass(frozen=True)
class Report:
    """One HTML page, which opens without a network, of every artifact in the given folders."""

    paths: Positional[Images]
    """Runs, selections, scores, indexes, or folders of them."""
    out: str = "report.html"
    """The page."""
    title: str | None = None

    def run(self) -> None:
        print(verbs.report(_some(self.paths, "artifacts to report on"), self.out, title=self.title))


@dataclass(frozen=True)
class Demo:
    """The whole system on an embedded world, in a few minutes: scan, curate, pretrain, evaluate, report."""

    out: str
    """A folder; the same command goes on where it stopped."""
    steps: int | None = None
    """Steps of pretraining; fewer is faster and worse."""
    seed: int = 0
    """Of the world and of everything that is learnt from it."""

    def run(self) -> None:
        from troodon.demo import demo

        folder = demo(self.out, steps=self.steps, seed=self.seed)
        print(table(json.loads((folder / "scores.json").read_text())))
        print(folder / "report.html")


@dataclass(frozen=True)
class Recipes:
    """List the recipes; print one as YAML, to edit and to give in place of its name."""

    name: Positional[str | None] = None

    def run(self) -> None:
        if self.name is None:
            for verb, known in recipes.KNOWN.items():
                for name, recipe in known.items():
                    print(f"{verb:<9} {name:<14} {(recipe.__doc__ or '').strip().splitlines()[0]}")
        else:
            print(to_yaml(recipes.any_verb(self.name)), end="")


@dataclass(frozen=True)
class Doctor:
    """What this machine can do, and what is missing."""

    def run(self) -> None:
        from troodon.doctor import examine

        for line in examine():
            print(line)


VERBS: dict[str, type] = {
    "doctor": Doctor, "demo": Demo, "scan": Scan, "embed": Embed, "curate": Curate, "pretrain": Pretrain,
    "evaluate": Evaluate, "report": Report, "recipes": Recipes,
}  # fmt: skip
NAMED: dict[str, tuple[Callable[[str], Any], Any]] = {  # verbs whose settings start from a name; and shown by --help
    "curate": (recipes.curate, CurateConfig()),
    "pretrain": (recipes.pretrain, PretrainConfig()),
    "evaluate": (suite, SUITES["mine"]),
}


def main() -> None:
    """The command `troodon`."""
    sys.exit(run(sys.argv[1:]))


def run(words: list[str]) -> int:
    """Do what a command line says; returns the exit code."""
    debug = "--debug" in words
    words = [w for w in words if w != "--debug"]
    verb = words[0] if words else "--help"
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
            done = command(verb, words[1:])
            doing[:] = json.loads(os.environ[DOING]) if DOING in os.environ else ["troodon", *words]
            done.run()
        return DONE
    except SystemExit as stop:  # --help of a verb
        return int(stop.code or 0)
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
    kind, default = VERBS[verb], None
    if verb in NAMED:
        named, config = NAMED[verb]
        if verb == "pretrain":
            named = verbs.beginning(value(words, "--init"))
        if words and not words[0].startswith("-"):
            config = verbs.configured(words[0], config, named)
        elif not {"--help", "-h"} & set(words):
            raise UsageError(f"say first which recipe: troodon {verb} NAME ...; one of {', '.join(known(verb))}")
        default = blank(kind, config)
    return parse(kind, words, prog=f"troodon {verb}", default=default)


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
    import dataclasses

    import tyro

    missing = {f.name: tyro.MISSING for f in dataclasses.fields(kind) if f.default is dataclasses.MISSING}
    return kind(**missing, config=config)


def known(verb: str) -> list[str]:
    return list(SUITES if verb == "evaluate" else recipes.KNOWN[verb])


def overview() -> str:
    """What `troodon --help` prints."""
    lines = ["usage: troodon VERB ...", "", "General visual features from unlabelled images.", ""]
    lines += [f"  {verb:<9} {(kind.__doc__ or '').splitlines()[0]}" for verb, kind in VERBS.items()]
    lines += ["", "troodon VERB --help says more. --debug shows where an error came from."]
    return "\n".join(lines)


def table(scores: list[dict]) -> str:
    """Scores for people: a line each."""
    width = max(len(s["backbone"]) for s in scores)
    return "\n".join(
        f"{s['protocol']:<12} {s['metric']:<10} {s['backbone']:<{width}} {s['value']:6.1%}  "
        f"({s['low']:.1%} to {s['high']:.1%})"
        for s in sorted(scores, key=lambda s: (s["protocol"], s["metric"], -s["value"]))
    )


def _some(paths: tuple[str, ...], what: str) -> tuple[str, ...]:
    if not paths:
        raise UsageError(f"no {what}: give at least one path")
    return paths


def _q(path: str) -> str:
    return shlex.quote(path)


def _next(*commands: str) -> None:
    if RENDEZVOUS in os.environ or os.environ.get("RANK", "0") != "0":
        return  # one of several processes: whoever launched them says it, or the first of them
    say("next:" + "".join(f"\n  {c}" for c in commands))


if __name__ == "__main__":
    main()
