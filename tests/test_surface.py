"""What a user meets after `import troodon`: every public name is listed, documented and known to type checkers."""

import ast
import inspect
import pydoc
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import troodon

VERBS = {
    "apply", "calibrate", "compare", "curate", "dedup", "demo", "distill", "embed", "evaluate", "explore", "export",
    "leak", "load", "pack", "pretrain", "report", "scan", "show_attention", "show_crops", "show_matches",
    "show_neighbours", "show_pca", "watch",
}  # fmt: skip
TYPES = {"Backbone", "Features", "Interrupted", "UsageError"}
SCRIPT = """\
from pathlib import Path

import troodon
from troodon import Backbone, Features, UsageError

try:
    folder = troodon.pretrain("small", "photos/", "runs/first", settings={"steps": 10}, devices=1)
except (UsageError, troodon.Interrupted) as error:
    print(error, troodon.__version__.split("."))
backbone: Backbone = troodon.load(Path("runs/first"))
features: Features = backbone.features(["a.jpg"])
print(features.cls.shape, troodon.evaluate("mine", backbone, "labelled/", "scores")[0]["value"])
"""


def test_dir_lists_the_verbs_and_the_types():
    public = {name for name in dir(troodon) if not name.startswith("_")}
    assert public == set(troodon.__all__) == VERBS | TYPES
    assert troodon.__version__ == metadata.version("troodon")
    assert "__version__" in dir(troodon)
    with pytest.raises(AttributeError, match="module 'troodon' has no attribute 'pretrian'"):
        troodon.pretrian  # noqa: B018


@pytest.mark.parametrize("name", sorted(VERBS | TYPES))
def test_every_name_can_be_imported_and_is_documented(name):
    value = getattr(troodon, name)
    assert inspect.isclass(value) if name in TYPES else inspect.isfunction(value)
    assert value.__name__ == name
    assert len(inspect.getdoc(value) or "") > 20
    assert f"`{name}`" in troodon.__doc__


def test_help_shows_them():
    page = pydoc.plain(pydoc.render_doc(troodon))
    for name in VERBS:
        assert f"\n    {name}(" in page, name
    for name in TYPES:
        assert f"\n    class {name}(" in page, name
    assert f"\nVERSION\n    {troodon.__version__}\n" in page
    assert 'troodon.pretrain("small", "photos/", "runs/first")' in page


def test_type_checkers_read_of_the_same_names():
    stub = ast.parse(Path(troodon.__file__).with_suffix(".pyi").read_text())
    imported = [alias.asname for node in stub.body if isinstance(node, ast.ImportFrom) for alias in node.names]
    assert sorted(imported) == sorted(troodon.__all__)


@pytest.mark.parametrize(
    ("right", "wrong", "message"),
    [
        ("", "", ""),
        ("devices=1", "device=1", "Unexpected keyword argument `device`"),
        ("features.cls", "features.clss", "has no attribute `clss`"),
        ("troodon.load(", "troodon.laod(", "No attribute `laod` in module `troodon`"),
    ],
)
def test_type_checkers_know_the_signatures(tmp_path: Path, right: str, wrong: str, message: str):
    (tmp_path / "pyrefly.toml").write_text('project-includes = ["*.py"]\n')  # without one, few errors are reported
    (tmp_path / "script.py").write_text(SCRIPT.replace(right, wrong) if right else SCRIPT)
    command = [sys.executable, "-m", "pyrefly", "check", "--python-interpreter-path", sys.executable, "script.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode == 0) is (not wrong), done.stdout + done.stderr
    assert message in done.stdout
