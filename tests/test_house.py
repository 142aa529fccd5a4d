"""The house rules that a machine can hold: which way imports point, what stays light, what every file says of itself.

Each rule is a function of a source tree that returns its violations in words. It is tried first on a small made tree
that breaks it, then on the package.
"""

import ast
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "troodon"

FLOORS = (
    {
        "config",
        "run",
        "rendezvous",
        "devices",
        "dist",
        "launch",
        "text",
        "bad_image",
        "pixels",
        "pillow",
        "lock",
        "serve",
        "progress",
        "live",
        "stream",
    },
    {"model", "images", "search", "copies"},
    {"views"},
    {"learn", "evaluate", "curate", "export", "report", "explore", "world"},
    {"verbs", "demo", "doctor", "cli", "slurm", "recipes", "__init__", "__main__"},
)
APART = {("views", "model"), ("views", "search")}  # rooms that do not know those below them
FREE_FLOORS = (0, 4)  # where neighbours may import each other

# Modules that a mistake in a path or a setting passes through; waiting for torch (over a second) is not for them.
LIGHT = re.compile(
    r"troodon(\.__main__|\.config|\.run|\.text|\.\w+\.config|\.images(\.\w+)*|\.views\.attacks"
    r"|\.(cli|verbs|slurm|recipes|report|world)(\.\w+)*)?"
)
HEAVY = {"torch", "torchvision", "timm", "transformers"}

LONGEST = 400  # lines of a file
LONGEST_FUNCTION = 60  # lines


@dataclass(frozen=True)
class Module:
    """One file of the package: its dotted name, whether it is a package's `__init__`, and its syntax tree."""

    name: str
    path: Path
    tree: ast.Module

    @property
    def part(self) -> str:
        """What stands on a floor: the folder or file directly under the package."""
        return self.name.partition(".")[2].partition(".")[0] or "__init__"


@dataclass(frozen=True)
class Import:
    name: str
    line: int
    at_import: bool  # runs when the module is imported, not only when a function of it is called


def read(package: Path) -> dict[str, Module]:
    """All modules under the folder `package`, by dotted name."""
    modules = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        modules[name] = Module(name, path, ast.parse(path.read_text(encoding="utf-8")))
    return modules


def imports(module: Module, modules: dict[str, Module]) -> Iterator[Import]:
    """What a module imports, anywhere in it; `from troodon.data import index` is `troodon.images.index`."""

    def walk(node: ast.AST, at_import: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno, at_import) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                depth = node.level - (module.path.name == "__init__.py")
                above = module.name.split(".")[: -depth or None]
                base = ".".join([*above, *([base] if base else [])])
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                yield Import(inner if inner in modules else base, node.lineno, at_import)
        is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for child in ast.iter_child_nodes(node):
            yield from walk(child, at_import and not is_function and not _for_types_only(node, child))

    yield from walk(module.tree, True)


def _for_types_only(node: ast.AST, child: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING") and child in node.body


def upward(package: Path) -> list[str]:
    """Imports that point up, or across between siblings of a floor."""
    modules, wrong = read(package), []
    floor = {part: level for level, parts in enumerate(FLOORS) for part in parts}
    for module in modules.values():
        if module.part not in floor:
            wrong.append(f"{module.name} stands on no floor: give it one in FLOORS")
            continue
        for found in imports(module, modules):
            if found.name in modules and modules[found.name].part != module.part:
                mine, other = floor[module.part], floor.get(modules[found.name].part, -1)
                apart = (module.part, modules[found.name].part) in APART
                if apart or other > mine or (other == mine and mine not in FREE_FLOORS):
                    wrong.append(f"{module.name}:{found.line} imports {found.name}")
    return wrong


def reachable(start: str, targets: dict[str, set[str]]) -> set[str]:
    """All modules that imports lead to from `start`, in any number of steps."""
    reached, pending = set(), [*targets[start]]
    while pending:
        name = pending.pop()
        if name not in reached:
            reached.add(name)
            pending += targets[name]
    return reached


def import_targets(modules: dict[str, Module]) -> dict[str, set[str]]:
    """What each module imports; imports in functions and for type checkers count too."""
    return {name: {i.name for i in imports(m, modules) if i.name in modules} - {name} for name, m in modules.items()}


def circular(package: Path) -> list[str]:
    """Modules that import each other in a circle."""
    targets = import_targets(read(package))
    reached = {name: reachable(name, targets) for name in targets}
    circles = {tuple(sorted(n for n in reached[name] if name in reached[n])) for name in targets}
    return [f"a circle of imports: {', '.join(circle)}" for circle in sorted(circles) if circle]


def lines_reached(package: Path, start: str) -> int:
    """Lines of a module and of all that imports lead to from it, packages above them included."""
    modules = read(package)
    targets = {
        name: found | {name.rpartition(".")[0]} & modules.keys() for name, found in import_targets(modules).items()
    }
    files = [modules[name].path for name in reachable(start, targets) | {start}]
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in files)


def heavy(package: Path) -> list[str]:
    """Light modules whose import loads torch or its like, with the way there."""
    modules = read(package)

    def way(name: str, seen: set[str]) -> list[str] | None:
        if name.partition(".")[0] in HEAVY or name == "safetensors.torch":
            return [name]
        if name not in modules or name in seen:
            return None
        seen.add(name)
        above = [name.rpartition(".")[0]]  # importing a.b runs a first
        for target in [*above, *(i.name for i in imports(modules[name], modules) if i.at_import)]:
            if rest := way(target, seen):
                return [name, *rest]
        return None

    return [" -> ".join(found) for name in modules if LIGHT.fullmatch(name) and (found := way(name, set()))]


def unfit(package: Path) -> list[str]:
    """Files too long to be read in one sitting, and files that do not say what they are."""
    wrong = []
    for module in read(package).values():
        lines = len(module.path.read_text(encoding="utf-8").splitlines())
        if lines > LONGEST:
            wrong.append(f"{module.name} has {lines} lines: more than {LONGEST}")
        wrong += [
            f"{module.name}.{node.name} has {length} lines: more than {LONGEST_FUNCTION}"
            for node in ast.walk(module.tree)
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            and (length := (node.end_lineno or 0) - node.lineno + 1) > LONGEST_FUNCTION
        ]
        may_be_empty = module.path.name == "__init__.py"
        if not ast.get_docstring(module.tree) and (module.tree.body or not may_be_empty):
            wrong.append(f"{module.name} has no docstring")
    return wrong


def unread(package: Path) -> list[str]:
    """Settings (fields of a `...Config`) that nothing reads."""
    trees = [module.tree for module in read(package).values()]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    asked = {n.attr for n in nodes if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Load)}
    return [
        f"{config.name}.{field.target.id}"
        for config in nodes
        if isinstance(config, ast.ClassDef) and config.name.endswith("Config")
        for field in config.body
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and field.target.id not in asked
    ]


def private_paths(files: list[Path]) -> list[str]:
    """Lines of text files that name a folder of the machine they were written on."""
    words = [f"/{folder}/" for folder in ("work", "root")]
    wrong = []
    for path in files:
        data = path.read_bytes()
        if b"\0" not in data[:8192]:
            lines = enumerate(data.decode("utf-8", errors="replace").splitlines(), 1)
            wrong += [f"{path}:{number}" for number, line in lines if any(word in line for word in words)]
    return wrong


# What each rule must catch, in a tree of a few files. Each file also starts with a docstring, but an empty `__init__`.
TREE = {
    "__init__.py": "def load():\n    from troodon.model import vit\n",
    "config.py": "",
    "run.py": "import troodon.config\n",
    "images/__init__.py": "",
    "images/index.py": "from troodon import config\n",
    "views/__init__.py": "",
    "views/crops.py": "import torch\nfrom troodon.images import index\n",
    "model/__init__.py": "",
    "model/config.py": "class ViTConfig:\n    depth: int\n",
    "model/vit.py": "from torch import nn\nfrom .config import ViTConfig\nlayers = ViTConfig().depth\n",
    "learn/__init__.py": "",
    "learn/loop.py": "from troodon.model import vit\nfrom ..views.crops import nothing\n",
    "curate/__init__.py": "",
    "curate/dedup.py": "from . import nothing\n",
    "cli.py": "from troodon.recipes import small\ndef main():\n    from troodon.learn import loop\n",
    "recipes/__init__.py": "",
    "recipes/small.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from troodon.learn import loop\n",
}


def write(folder: Path, **changes: str) -> Path:
    """The made tree with some files other than they were; `images__index` is images/index.py."""
    files = TREE | {f"{name.replace('__', '/', 1)}.py": text for name, text in changes.items()}
    for name, text in files.items():
        path = folder / "troodon" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("" if name.endswith("__init__.py") and not text else f'"""What it is."""\n{text}')
    return folder / "troodon"


RULES = (upward, circular, heavy, unfit, unread)


@pytest.mark.parametrize("rule", RULES)
def test_a_tidy_tree_passes(rule: Callable[[Path], list[str]], tmp_path: Path) -> None:
    assert rule(write(tmp_path)) == []


@pytest.mark.parametrize(
    ("rule", "changes", "said"),
    [
        (
            upward,
            {"images__index": "from troodon.model import vit\n"},
            "troodon.images.index:2 imports troodon.model.vit",
        ),
        (
            upward,
            {"images__index": "from troodon.views import crops\n"},
            "troodon.images.index:2 imports troodon.views.crops",
        ),
        (
            upward,
            {"views__crops": "from troodon.model import vit\n"},
            "troodon.views.crops:2 imports troodon.model.vit",
        ),
        (upward, {"model__vit": "def f():\n    import troodon.learn.loop\n"}, "vit:3 imports troodon.learn.loop"),
        (upward, {"learn__loop": "from troodon.curate.dedup import x\n"}, "loop:2 imports troodon.curate.dedup"),
        (upward, {"learn__loop": "from ..curate import dedup\n"}, "loop:2 imports troodon.curate.dedup"),
        (upward, {"learn__loop": "from troodon import load\n"}, "troodon.learn.loop:2 imports troodon"),
        (upward, {"run": "from .images.index import x\n"}, "troodon.run:2 imports troodon.images.index"),
        (upward, {"recipes__small": "", "odds": "import os\n"}, "troodon.odds stands on no floor"),
        (
            circular,
            {"run": "def f():\n    import troodon.config\n", "config": "from troodon import run\n"},
            "a circle of imports: troodon.config, troodon.run",
        ),
        (heavy, {"config": "import torch\n"}, "troodon.images.index -> troodon.config -> torch"),
        (heavy, {"images__index": "try:\n    from torch import nn\nexcept ImportError:\n    pass\n"}, "index -> torch"),
        (heavy, {"model__config": "class C:\n    import torch\n"}, "troodon.model.config -> torch"),
        (heavy, {"recipes__small": "from troodon.model.vit import x\n"}, "small -> troodon.model.vit -> torch"),
        (heavy, {"cli": "import safetensors.torch\n"}, "troodon.cli -> safetensors.torch"),
        (unfit, {"model__vit": "#\n" * LONGEST}, "troodon.model.vit has 401 lines"),
        (unfit, {"model__vit": "def f():\n" + "    x = 1\n" * LONGEST_FUNCTION}, "troodon.model.vit.f has 61 lines"),
        (unread, {"model__vit": ""}, "ViTConfig.depth"),
    ],
)
def test_each_rule_catches(rule: Callable, changes: dict[str, str], said: str, tmp_path: Path) -> None:
    assert any(said in line for line in rule(write(tmp_path, **changes)))


def test_a_package_that_loads_torch_makes_all_below_it_heavy(tmp_path: Path) -> None:
    package = write(tmp_path)
    (package / "images" / "__init__.py").write_text("import torch\n")
    assert "troodon.images.index -> troodon.images -> torch" in heavy(package)


def test_a_file_must_say_what_it_is(tmp_path: Path) -> None:
    package = write(tmp_path)
    (package / "images" / "index.py").write_text("x = 1\n")
    (package / "views" / "crops.py").write_text("")
    assert unfit(package) == ["troodon.images.index has no docstring", "troodon.views.crops has no docstring"]


def test_private_paths_are_found_in_text_only(tmp_path: Path) -> None:
    place = f"/{'work'}/here"
    (tmp_path / "text.md").write_text(f"fine\nin {place}\n")
    (tmp_path / "binary").write_bytes(b"\0" + place.encode())
    (tmp_path / "fine.yml").write_text(".github/workflows and framework/x\n")
    assert private_paths(sorted(tmp_path.iterdir())) == [f"{tmp_path / 'text.md'}:2"]


@pytest.mark.parametrize("rule", RULES)
def test_troodon_keeps(rule: Callable[[Path], list[str]]) -> None:
    assert rule(PACKAGE) == []


def test_training_reaches_little() -> None:
    """It drags in no tables, layouts, embedded world or reports: whoever reads how it learns need not read these."""
    assert lines_reached(PACKAGE, "troodon.learn.pretrain") < 7_000


def test_no_file_names_the_machine_it_was_written_on() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    files = [ROOT / os.fsdecode(name) for name in listed.stdout.split(b"\0") if name]
    assert private_paths([path for path in files if path.is_file()]) == []


def loaded(*arguments: str) -> set[str]:
    """The modules that a fresh Python imports when started with these arguments."""
    done = subprocess.run([sys.executable, "-X", "importtime", *arguments], capture_output=True, text=True, check=True)
    return {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}


def test_importing_troodon_costs_nothing() -> None:
    names = loaded("-c", "import troodon")
    assert "troodon" in names
    assert not names & (HEAVY | {"numpy", "pyarrow", "PIL", "scipy", "tyro", "rich", "yaml"})


def test_verbs_stay_verbs_once_the_folders_of_their_names_are_imported() -> None:
    code = "import troodon, troodon.evaluate.config, troodon.report.page, troodon.curate.config, troodon.demo as d\n"
    code += "assert all(callable(getattr(troodon, name)) for name in troodon.__all__); print(troodon.__all__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "evaluate" in done.stdout


@pytest.mark.skipif(not (PACKAGE / "cli.py").exists(), reason="there is no command line yet")
def test_help_does_not_load_torch() -> None:
    names = loaded("-m", "troodon.cli", "--help")
    assert "argparse" in names or "tyro" in names
    assert not names & HEAVY
