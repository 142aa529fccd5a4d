"""One command for the day a GPU is lent: does it run, and how fast, the most valuable first, in bounded time.

    python benchmarks/gpu.py --minutes 9 [--out FOLDER] [--parts tests steps ...]

Each part is a process of its own with a limit; one that fails or takes too long is recorded as such, and the next ones
run. After each part `gpu.json` in FOLDER (by default $OUT, or here) is written again: what each part printed at its
end, its seconds and how it ended. `rows.jsonl` beside it has the results in the form of benchmarks/results/: look at
them, and append what is worth keeping. Without a GPU the same parts run at toy size. No network is needed.

    tests      tests marked `gpu`: kernels against a CPU, sharding on an NCCL mesh of one, save and resume
    runs       three tiny steps of five recipes, compiled or not, with each recomputation (benchmarks/gpu_parts.py)
    steps      a step at the recipes' own sizes, compiled or not: images a second, share of the peak, memory
    loss       the loss on prototypes at several sizes, and attention
    fed        a real run from JPEGs: threads against processes
    embedding  ViT-S, B and L at 224 pixels, against transformers; and from files
    learning   what small images teach in a minute of each arm
"""

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from measure import argument_parser, environment, machine_name, versions

HERE = Path(__file__).resolve().parent
LEAST = 5.0  # seconds that a command is given at least, if any are left


@dataclass(frozen=True)
class Command:
    """Words after `python`, in their order of worth, and the most seconds they may take."""

    part: str
    words: tuple[str, ...]
    seconds: float


def commands(gpu: bool) -> list[Command]:
    """What is run, in this order; toys without a GPU."""

    def script(part: str, seconds: float, line: str) -> Command:
        name, *words = line.split()
        return Command(part, (str(HERE / name), *words), seconds)

    tests = ["-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "--timeout", "150"]
    listed = [Command("tests", (*tests, str(HERE.parent / "tests" / "test_gpu.py")), 120.0)]
    if not gpu:
        small = "--quick --against nothing --recipe demo_dino --own-size"
        toys = (
            "runs gpu_parts.py runs",
            f"steps step.py {small}",
            "loss prototypes.py --images 1 --prototypes 4096 --rounds 1",
            "loss attention.py --quick",
            "fed gpu_parts.py fed",
            "embedding embed.py --quick --px 56 --images 2 --rounds 1 --against usual",
            "embedding embed.py --pipeline --images 8 --rounds 2",
            "learning gpu_parts.py learning",
        )
        return listed + [script(part, 60.0, line) for part, _, line in (toy.partition(" ") for toy in toys)]
    step = "step.py --own-size --against nothing --rounds 5 --recipe"
    return [
        *listed,
        script("runs", 100.0, "gpu_parts.py runs"),
        *(
            script("steps", 60.0, f"{step} {recipe} --images {images}{how}")
            for recipe, images in (("vitl16_short", 64), ("vitl14", 32))
            for how in ("", " --compile")
        ),
        script("loss", 40.0, "prototypes.py --bf16 --images 32 64 --plain-images 8 --rounds 3"),
        script("loss", 20.0, "attention.py --images 32 --heads 16"),
        script("fed", 120.0, "gpu_parts.py fed"),
        *(script("embedding", 40.0, f"embed.py --size {size} --images 128") for size in ("small", "base", "large")),
        script("embedding", 40.0, "embed.py --pipeline"),
        script("learning", 300.0, "small_data.py --cpu-seconds 60 --seeds 0 1 2"),
    ]


def run(command: Command, seconds: float) -> dict:
    """Run a command for so many seconds at most: how it ended, what its last line says, and the end of its errors."""
    start, environment_ = time.monotonic(), os.environ | {"PYTHONPATH": str(HERE.parent)}
    process = subprocess.Popen(
        [sys.executable, *command.words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment_,
        cwd=HERE.parent, start_new_session=True,
    )  # fmt: skip
    try:
        out, errors = process.communicate(timeout=seconds)
        ended = "done" if process.returncode == 0 else f"failed with exit code {process.returncode}"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)  # with the processes that it started
        out, errors = process.communicate()
        ended = f"stopped after {seconds:.0f} s"
    last = (out.strip().splitlines() or [""])[-1]
    try:
        rows = json.loads(last)
    except ValueError:
        rows = []
    return {
        "part": command.part,
        "command": " ".join(Path(word).name if word.startswith(str(HERE.parent)) else word for word in command.words),
        "ended": ended,
        "seconds": round(time.monotonic() - start, 1),
        "rows": rows if isinstance(rows, list) else [],
        "out": [] if rows else out.splitlines()[-15:],
        "errors": errors.splitlines()[-40:],
    }


def run_all(listed: list[Command], seconds: float, out: Path, commit: str | None, machine: str) -> list[dict]:
    """Run the commands while there is time, and write what is known after each."""
    start, ended = time.monotonic(), []
    out.mkdir(parents=True, exist_ok=True)
    about = {"machine": machine, "commit": commit, "versions": versions(("triton", "transformers")), **environment()}
    for command in listed:
        left = seconds - (time.monotonic() - start)
        if left < LEAST:
            found = {"part": command.part, "command": " ".join(command.words), "ended": "no time left", "rows": []}
        else:
            found = run(command, min(left, command.seconds))
        ended.append(found)
        print(f"{found['part']:<10} {found.get('seconds', 0):6.1f} s  {found['ended']}: {found['command']}",
              file=sys.stderr, flush=True)  # fmt: skip
        text = json.dumps(
            about | {"date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "parts": ended}, indent=1
        )
        (out / "gpu.json").write_text(text)
        origin = {"machine": machine, "versions": about["versions"], "commit": commit, "date": json.loads(text)["date"]}
        with open(out / "rows.jsonl", "w") as stream:
            stream.writelines(json.dumps(row | origin) + "\n" for each in ended for row in each["rows"])
    return ended


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--minutes", type=float, default=9.0, help="in all; what does not fit is left out")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ".")))
    parser.add_argument("--parts", nargs="+", help="only these")
    parser.add_argument("--quick", action="store_true", help="toy size, also on a GPU")
    arguments = parser.parse_args()
    listed = commands(torch.cuda.is_available() and not arguments.quick)
    if arguments.parts:
        if unknown := set(arguments.parts) - {command.part for command in listed}:
            parser.error(f"no part {', '.join(unknown)}; there are {', '.join(dict.fromkeys(c.part for c in listed))}")
        listed = [command for command in listed if command.part in arguments.parts]
    machine = arguments.machine or machine_name()
    ended = run_all(listed, 60 * arguments.minutes, arguments.out, arguments.commit, machine)
    print(json.dumps([row for each in ended for row in each["rows"]]))


if __name__ == "__main__":
    main()
