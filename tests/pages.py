"""What pages of Markdown name, and which of it does not exist: files, names of the code, commands, options and links.

The code is read by its syntax trees, and command lines by the parser of the commands; no command runs, and torch is not
loaded.
"""

import ast
import builtins
import contextlib
import dataclasses
import functools
import io
import re
import shlex
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import troodon
from tests.test_house import PACKAGE, ROOT, Module, read
from troodon import cli, recipes
from troodon.config import UsageError

# What stands for things of the reader's in these pages.
EXAMPLES = {
    "photos/", "test/", "wanted/", "pool/", "images.tar/train", "../shared/data", "zen5-2-cores", "runs/large-logs",
    "runs/students/distill_vits14", "/dev/shm",
}  # fmt: skip

FILE = re.compile(r"\.?[\w.-]+\.(py|md|ya?ml|toml|csv|jsonl?|html|css|npz|npy|txt|parquet|png|safetensors)")
PLACEHOLDER = re.compile(r"[A-Z][A-Z_]*")
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)
TABLE = re.compile(r"<!-- table: .*?<!-- end -->", re.DOTALL)
SPAN = re.compile(r"(?<!`)`([^`]+)`(?!`)")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
Definition = ast.FunctionDef | ast.ClassDef | ast.AnnAssign | ast.Assign


class Code:
    """The names in some folders of Python files, by their syntax trees."""

    def __init__(self, *folders: Path, skip: str = ""):
        modules = {name: module for folder in folders for name, module in read(folder).items()}
        self.modules: dict[str, Module] = {name: module for name, module in modules.items() if name != skip}
        self.nodes = [node for module in self.modules.values() for node in ast.walk(module.tree)]
        self.defined = {name: dict(definitions(module.tree)) for name, module in self.modules.items()}
        self.names: dict[str, list[Definition]] = {}
        for names in self.defined.values():
            for name, node in names.items():
                self.names.setdefault(name, []).append(node)
        self.members: dict[str, dict[str, list[Definition]]] = {}  # of all classes of a name
        for node in self.nodes:
            if isinstance(node, ast.ClassDef):
                members = self.members.setdefault(node.name, {})
                for name, child in definitions(node):
                    members.setdefault(name, []).append(child)

    @cached_property
    def constants(self) -> set[str]:
        """Strings in the code, but for tests: names of columns and files, and options of scripts."""
        trees = [module.tree for name, module in self.modules.items() if ".test_" not in name]
        values = (node.value for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Constant))
        return {value for value in values if isinstance(value, str)}

    @cached_property
    def words(self) -> set[str]:
        """All that a single word in code type may be."""
        config = tomllib.loads((ROOT / "pyproject.toml").read_text())
        words = {part for name in self.modules for part in name.split(".")} | set(self.names) | self.constants
        words |= {name for members in self.members.values() for name in members} | set(dir(builtins))
        words |= {node.arg for node in self.nodes if isinstance(node, ast.arg)}
        words |= {name for verb in cli.VERBS for name in verb.split()}
        words |= {name for recipe_names in recipes.KNOWN.values() for name in recipe_names}
        words |= {marker.partition(":")[0] for marker in config["tool"]["pytest"]["ini_options"]["markers"]}
        return words | set(config["project"]["optional-dependencies"])

    def has(self, dotted: str) -> bool:
        """Whether a module, a name in a module or a member of a class is called so."""
        parts = dotted.split(".")
        if len(parts) == 1:
            return dotted in self.words
        if self.modules_named(dotted) or (parts[0], parts[-1]) in EXPORTS:
            return True
        if any(flag == flag_of(dotted) or flag.startswith(f"{flag_of(dotted)}.") for flag in FLAGS):
            return True
        owner, name = ".".join(parts[:-1]), parts[-1]
        if any(name in self.defined[module] for module in self.modules_named(owner)):
            return True
        if name not in self.members.get(parts[-2], ()):
            return False
        return len(parts) == 2 or self.has(owner)

    def modules_named(self, dotted: str) -> list[str]:
        return [name for name in self.modules if name == dotted or name.endswith(f".{dotted}")]

    def parameters(self, function: str) -> list[list[str]]:
        """The parameters of every function, method or class of this name."""
        owner, _, name = function.rpartition(".")
        nodes = self.members.get(owner, self.names).get(name, ())
        return [parameters for node in nodes if (parameters := _parameters(node)) is not None]


def definitions(node: ast.Module | ast.ClassDef) -> Iterator[tuple[str, Definition]]:
    """Names that a module or a class defines, attributes that methods set included."""
    for child in node.body:
        if isinstance(child, ast.FunctionDef | ast.ClassDef):
            yield child.name, child
        elif isinstance(child, ast.AnnAssign | ast.Assign):
            targets = child.targets if isinstance(child, ast.Assign) else [child.target]
            for target in (name for t in targets for name in ast.walk(t)):
                if isinstance(target, ast.Name):
                    yield target.id, child
        if isinstance(node, ast.ClassDef) and isinstance(child, ast.FunctionDef):
            for inner in ast.walk(child):
                if isinstance(inner, ast.Assign):
                    attributes = (name for target in inner.targets for name in ast.walk(target))
                    yield from ((n.attr, inner) for n in attributes if isinstance(n, ast.Attribute))


def _parameters(node: ast.AST) -> list[str] | None:
    if isinstance(node, ast.ClassDef):
        for child in node.body:
            if isinstance(child, ast.FunctionDef) and child.name == "__init__":
                return _parameters(child)
        return [c.target.id for c in node.body if isinstance(c, ast.AnnAssign) and isinstance(c.target, ast.Name)]
    if isinstance(node, ast.FunctionDef):
        names = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
        return names[1:] if names[:1] in (["self"], ["cls"]) else names
    return None


def flag_of(setting: str) -> str:
    return f"--{setting.replace('_', '-')}"


def flags(config: object, prefix: str = "") -> Iterator[str]:
    """The options of a command or a config, by its fields."""
    for field in dataclasses.fields(config):  # pyrefly: ignore
        value = getattr(config, field.name, None)
        if dataclasses.is_dataclass(value):
            yield from flags(value, prefix if field.name == "config" else f"{prefix}{field.name}.")
        else:
            yield flag_of(prefix + field.name)
            yield flag_of(f"{prefix}no-{field.name}")


FLAGS: dict[str, set[str]] = {"--help": set(), "--debug": set()}  # the verbs of each option
for _verb, _kind in cli.VERBS.items():
    for _flag in flags(_kind):
        FLAGS.setdefault(_flag, set()).add(_verb)
LOOKING = {"auto"} | {name for name, recipe in recipes.KNOWN["pretrain"].items() if recipes.needs_start(recipe)}
EXPORTS = {("troodon", name) for name in vars(troodon)["__all__"]}


@functools.cache
def command_mistake(line: str) -> str | None:
    """What is wrong with a command line of `troodon`; options that must be there may be missing."""
    words = [word for word in shlex.split(line, comments=True)[1:] if word != "..."]
    if not words or PLACEHOLDER.fullmatch(words[0]) or words[0] in ("--help", "--version"):
        return None
    verb = cli.verb_of(words)
    if verb not in cli.VERBS:
        return f"{line}: there is no command {verb!r}"
    if old := [word for word in words if word.startswith("--") and word.partition("=")[0] not in FLAGS]:
        return f"{line}: there is no option {old[0]}"  # the parser would take those of earlier versions, with a note
    words = complete(verb, words[len(verb.split()) :])
    if verb == "pretrain" and words[0] in LOOKING:  # at images or weights, which are not here; their options are alike
        words[0] = "small"
    if verb == "recipes" and not set(words) <= {name for named in recipes.KNOWN.values() for name in named}:
        return f"{line}: there is no recipe {words[0]!r}"
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            cli.parse_command(verb, words)
    except UsageError as error:
        return f"{line}: {error}"
    except SystemExit:
        pass
    return None


def complete(verb: str, words: list[str]) -> list[str]:
    """The words with something for each argument that must be there, and for a placeholder in the place of a recipe."""
    given, known = {word.partition("=")[0] for word in words}, []
    there = next((n for n, word in enumerate(words) if word.startswith("-")), len(words))  # words before all options
    for field in dataclasses.fields(cli.VERBS[verb]):
        if field.default is not dataclasses.MISSING:
            continue
        kind = field.type if isinstance(field.type, str) else repr(field.type)
        if "ositional" in kind:
            known = sorted(cli.CONFIGURED[verb][2]) if verb in cli.CONFIGURED else ["x"]
            if there <= 0:
                words = ["small" if "small" in known else known[0], *words]
            there -= 1
        elif flag_of(field.name) not in given:
            choice = re.search(r"Literal\[['\"](\w+)", kind)
            words = [*words, flag_of(field.name), choice[1] if choice else "x"]
    if verb in cli.CONFIGURED and PLACEHOLDER.fullmatch(words[0]):
        words = ["small" if "small" in known else known[0], *words[1:]]
    return words


def option_mistake(span: str, code: Code) -> str | None:
    """What is wrong with `--option value ...`: no verb has it, or none takes the value."""
    words = shlex.split(span)
    names = [word.partition("=")[0] for word in words if word.startswith("--")]
    for name in names:
        if name not in FLAGS and name not in code.constants:
            return f"there is no option {name}"
    verbs = [verb for verb in cli.VERBS if all(verb in FLAGS.get(name, ()) for name in names)]
    if not verbs or len(words) == len(names) or any(PLACEHOLDER.fullmatch(word) for word in words):
        return None
    mistakes = [command_mistake(f"troodon {verb} {span}") for verb in verbs]
    return None if None in mistakes else mistakes[0]


def make_mistake(line: str) -> str | None:
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    words = line.split()
    for word in words[words.index("make") + 1 :]:
        if "=" not in word and not PLACEHOLDER.fullmatch(word) and word not in targets:
            return f"{line}: there is no target {word!r}"
    return None


@dataclass(frozen=True)
class Page:
    """A page of Markdown, and the code it speaks of."""

    text: str
    code: Code
    path: Path = ROOT / "docs" / "page.md"

    def at(self, position: int, mistake: str) -> str:
        return f"{self.path.name}:{self.text.count(chr(10), 0, position) + 1}: {mistake}"

    @cached_property
    def prose(self) -> str:
        """The page with code blocks and tables of results blank, so that positions stay."""
        blank = re.compile(r"\S")
        text = FENCE.sub(lambda m: blank.sub(" ", m[0]), self.text)
        return TABLE.sub(lambda m: blank.sub(" ", m[0]), text)

    def spans(self) -> Iterator[tuple[int, str]]:
        """Words in code type, each with its position."""
        yield from ((m.start(), " ".join(m[1].split())) for m in SPAN.finditer(self.prose))

    def folders(self, position: int) -> list[Path]:
        """Where a file named without its folder may lie: folders that its section names, the package, the root."""
        start = max(self.prose.rfind("\n## ", 0, position), 0)
        end = self.prose.find("\n## ", position)
        section = SPAN.findall(self.prose[start : end if end > 0 else None])
        named = {span if span.endswith("/") else str(Path(span).parent) for span in section if "/" in span}
        return [base / name for base in (PACKAGE, ROOT) for name in ("", *sorted(named)) if (base / name).is_dir()]

    def mistakes(self) -> list[str]:
        """All that the page names in code type or in a code block and that does not exist."""
        wrong = [(at, m) for at, span in self.spans() if (m := self.span_mistake(at, span))]
        blocks = [(match, self.block_mistakes(match[2], match[3])) for match in FENCE.finditer(self.text)]
        return self.told(wrong + [(match.start(), mistake) for match, found in blocks for mistake in found])

    def command_mistakes(self) -> list[str]:
        """Commands and options that do not exist: for pages that also name things of other programs."""
        spans = [(at, span) for at, span in self.spans() if self.is_command(span) or span.startswith("--")]
        wrong = [(at, m) for at, span in spans if (m := self.span_mistake(at, span))]
        blocks = [(m.start(), m[3]) for m in FENCE.finditer(self.text) if m[2] in ("", "bash")]
        return self.told(wrong + [(at, mistake) for at, block in blocks for mistake in self.block_mistakes("", block)])

    def told(self, wrong: list[tuple[int, str]]) -> list[str]:
        """Mistakes with their lines, in the order of the page."""
        return [self.at(at, mistake) for at, mistake in sorted(wrong)]

    def span_mistake(self, at: int, span: str) -> str | None:
        if span in EXAMPLES or "://" in span or not re.search(r"\w\w", span):
            return None
        if self.is_command(span):
            return next(iter(self.line_mistakes(span)), None)
        if span.startswith("--"):
            return option_mistake(span, self.code)
        if setting := re.fullmatch(r"([\w.]+): (.+)", span):
            return option_mistake(f"{flag_of(setting[1])} {setting[2]}", self.code)
        if re.fullmatch(r"[\w.*-]+(/[\w.*-]+)*/?", span) and ("/" in span or FILE.fullmatch(span)):
            return self.path_mistake(span, self.folders(at))
        return self.name_mistake(span)

    def is_command(self, line: str) -> bool:
        return re.match(r"(\w+=\S+ )*(troodon|make|pip|import|pytest|\S*python3?)( |$)", line) is not None

    def path_mistake(self, name: str, folders: list[Path]) -> str | None:
        pattern = re.sub(r"\b[A-Z]+\b(?!\.md)", "*", name.rstrip("/"))
        if any(path.is_dir() or not name.endswith("/") for folder in folders for path in folder.glob(pattern)):
            return None
        if not name.endswith((".py", ".md", "/")) and any(c.endswith(name) for c in self.code.constants):
            return None  # a file that the code reads or writes
        return f"there is no {name}"

    def name_mistake(self, span: str) -> str | None:
        try:
            tree = ast.parse(span, mode="eval").body
        except SyntaxError:
            return f"{span} is neither a name, a path nor a command"
        return next((m for m in self.expression_mistakes(tree) if m), None)

    def expression_mistakes(self, node: ast.AST) -> Iterator[str]:
        if isinstance(node, ast.Call):
            function = ast.unparse(node.func)
            yield from self.expression_mistakes(node.func)
            places = [argument.id for argument in node.args if isinstance(argument, ast.Name)]
            names, known = [keyword.arg for keyword in node.keywords], self.code.parameters(function)
            fits = any(places == p[: len(places)] and {*places, *names} <= {*p} for p in known)
            if known and not fits and len(places) == len(node.args):
                yield f"{ast.unparse(node)}: the parameters are {', '.join(known[0])}"
        elif isinstance(node, ast.Attribute | ast.Name):
            if not self.code.has(ast.unparse(node)):
                yield f"there is no {ast.unparse(node)}"
        else:
            for child in ast.iter_child_nodes(node):
                yield from self.expression_mistakes(child)

    def line_mistakes(self, line: str) -> Iterator[str]:
        """What is wrong with one line of a shell, or of Python's imports."""
        line = re.sub(r"\s#.*", "", line).strip()
        command = re.sub(r"^(\w+=\S+ +)+|^.* -m (?=troodon )", "", line)
        if command.startswith("troodon "):
            yield from filter(None, [command_mistake(command)])
        elif command.startswith("make"):
            yield from filter(None, [make_mistake(command)])
        elif command.startswith("import "):
            yield from (f"there is no module {name}" for name in command.split()[1:] if not self.code.has(name))
        modules = re.findall(r"-m ((?:tests|troodon|benchmarks)\b[\w.]*)", command)
        yield from (f"there is no module {name}" for name in modules if name not in self.code.modules)
        extras = re.findall(r"(?:troodon|\.)\[([\w,]+)\]", command)
        known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        yield from (f"there is no extra {name}" for e in extras for name in e.split(",") if name not in known)
        for word in command.split():
            if re.match(r"(src|tests|benchmarks|docs)/", word) or word == "constraints.txt":
                yield from filter(None, [self.path_mistake(word, [ROOT])])

    def block_mistakes(self, language: str, block: str) -> Iterator[str]:
        lines = block.splitlines()
        if language == "python":
            yield from self.python_mistakes(block)
        elif lines[0].startswith("src/"):
            yield from self.tree_mistakes(lines)
        elif language in ("", "bash"):
            for line in re.sub(r"\\\n *", "", block).splitlines():
                yield from self.line_mistakes(line)

    def python_mistakes(self, block: str) -> Iterator[str]:
        """Attributes of the package that it does not export, and of objects that no class has; in comments too."""
        nodes, members = list(ast.walk(ast.parse(block))), set().union(*self.code.members.values())
        variables = {node.id for node in nodes if isinstance(node, ast.Name)}
        used = {(ast.unparse(node.value), node.attr) for node in nodes if isinstance(node, ast.Attribute)}
        comments = " ".join(re.findall(r"#.*", block))
        used |= {(owner, name) for owner, name in re.findall(r"\b(\w+)\.(\w+)", comments) if owner in variables}
        for owner, name in sorted(used):
            if (owner, name) not in EXPORTS if owner == "troodon" else name not in members:
                yield f"there is no {owner}.{name}"

    def tree_mistakes(self, lines: list[str]) -> Iterator[str]:
        """Files and folders of a drawn tree: those before the gap, and files that the words after it name."""
        parents: list[Path] = []
        for line in lines:
            depth = (len(line) - len(line.lstrip())) // 2
            names, _, words = line.strip().partition("  ")
            parents[depth:] = [ROOT.joinpath(*parents[:depth], names.split()[0])]
            for name in [*names.split(), *re.findall(r"[\w/]+\.py", words)]:
                if not (parents[depth - 1] if depth else ROOT).joinpath(name).exists():
                    yield f"there is no {name} in the tree"


def link_mistakes(text: str, path: Path) -> list[str]:
    """Links to files that do not exist, or to headings that are not in them."""
    page, wrong = Page(text, Code(), path), []
    for match in LINK.finditer(page.prose):
        file, _, anchor = match[1].partition("#")
        target = path.parent / file if file else path
        if "://" in match[1]:
            continue
        if file and not target.exists():
            wrong.append(page.at(match.start(), f"there is no file {file}"))
        elif anchor and anchor not in anchors(text if target == path else target.read_text()):
            wrong.append(page.at(match.start(), f"there is no heading #{anchor}"))
    return wrong


def anchors(text: str) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}
