"""What a notebook shows; and the notebook among the examples, which runs as it stands."""

import ast
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

import troodon
from tests.test_examples import draw_classes
from tests.test_report import make_images, make_run, make_scores, make_selection, metrics
from troodon.model.backbone import Backbone, Features
from troodon.model.config import Preprocessing, ViTConfig
from troodon.report.glance import folder_table
from troodon.verbs.notebook import Folder, Scores, Summary, shown, summarised

NOTEBOOK = Path(__file__).parents[1] / "examples" / "first_look.ipynb"


class Cells(HTMLParser):
    """The words of a table, cell by cell."""

    def __init__(self, text: str):
        super().__init__()
        self.words: list[str] = []
        self.feed(text)

    def handle_data(self, data: str) -> None:
        self.words.append(data.replace("\N{NO-BREAK SPACE}", " "))


def words(shown_as: object) -> list[str]:
    assert isinstance(shown_as, str)
    return Cells(shown_as).words


def run_cells(sources: list[str]) -> list[object]:
    """Run the code of cells in order, in one namespace; what the last expression of each is worth, or None."""
    names: dict[str, object] = {"__name__": "__main__"}
    values = []
    for number, source in enumerate(sources):
        tree = ast.parse(source)
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, f"cell {number}", "exec"), names)
        value = eval(compile(ast.Expression(last.value), f"cell {number}", "eval"), names) if last else None
        values.append(value)
    return values


def test_the_notebook_is_valid_and_kept_without_outputs() -> None:
    notebook = json.loads(NOTEBOOK.read_text())
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert set(notebook) == {"cells", "metadata", "nbformat", "nbformat_minor"}
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(set(ids)) == len(ids)
    for cell in notebook["cells"]:
        assert re.fullmatch(r"[A-Za-z0-9_-]{1,64}", cell["id"])
        keys = {"cell_type", "id", "metadata", "source"}
        assert set(cell) == keys | ({"execution_count", "outputs"} if cell["cell_type"] == "code" else set())
        assert all(line.endswith("\n") for line in cell["source"][:-1])
        if cell["cell_type"] == "code":
            assert (cell["outputs"], cell["execution_count"]) == ([], None)


def test_the_notebook_goes_from_a_folder_to_a_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw_classes(tmp_path / "photos", 4)
    monkeypatch.chdir(tmp_path)
    pretrain, tiny = troodon.pretrain, {"vit": {"dim": 32, "depth": 1, "heads": 1, "patch": 8, "grid": 4}}
    tiny |= {"crops": {"global_px": 32, "local_px": 16, "locals": 2}, "probe_every": 0, "threads": 1}
    monkeypatch.setattr(troodon, "pretrain", lambda *a, settings: pretrain(*a, settings=settings | tiny, devices=1))
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    sources = ["".join(cell["source"]) for cell in cells]
    assert "steps, batch = 100, 16" in sources[0]
    sources[0] = sources[0].replace("steps, batch = 100, 16", "steps, batch = 2, 4")
    values = run_cells(sources)
    shapes = [value._repr_html_() for value in values if hasattr(value, "_repr_html_")]
    assert len(shapes) == 4, "the index, the run, the backbone and the features"
    assert "Finished: 2 of 2 steps" in " ".join(words(shapes[1]))
    assert "(8, 32)" in shapes[3]
    assert values[-1].size[0] > 100  # pyrefly: ignore


def test_features_and_backbones_are_tables_of_shapes() -> None:
    features = Features(torch.zeros(2, 8), torch.zeros(2, 4, 5, 8), torch.zeros(2, 1, 8))
    said = words(features._repr_html_())
    assert said[0] == "Features of 2 images, torch.float32, on cpu"
    assert {"(2, 8)", "(2, 4, 5, 8)", "(2, 1, 8)"} <= set(said)
    of_aspect = Features(torch.zeros(2, 8), [torch.zeros(3, 4, 8), torch.zeros(5, 4, 8)], torch.zeros(2, 0, 8))
    assert "2 grids, such as (3, 4, 8)" in words(of_aspect._repr_html_())
    network = Backbone.random(ViTConfig(dim=16, depth=2, heads=1, patch=8, grid=2), Preprocessing(36, (32, 48)), 0)
    said = words(network._repr_html_())
    assert {"Backbone random", "ViT of 2 blocks, 16 channels", "32 x 48 pixels", "(images, 4, 6, 16)"} <= set(said)


def test_folders_are_what_is_in_them(tmp_path: Path) -> None:
    make_run(tmp_path / "run", [*metrics(2000)])
    make_selection(tmp_path / "selection", make_images(tmp_path / "photos", 24))
    make_scores(tmp_path / "scores")
    said = words(Folder(tmp_path / "run")._repr_html_())
    assert said[0] == "Run run"
    assert "Finished: 2,000 of 2,000 steps in 12 min 16 s." in said
    assert "pretrained, k-NN" in words(folder_table(tmp_path / "scores"))
    assert "left out by duplicate" in words(folder_table(tmp_path / "selection"))
    assert folder_table(tmp_path) is None


def test_verbs_return_what_they_did() -> None:
    entry = {"backbone": "<b>", "protocol": "knn", "metric": "accuracy", "dataset": "x"}
    entry |= {"value": 0.5, "low": 0.4, "high": 0.6}
    scores = shown(lambda: [entry])()
    assert scores == [entry]
    assert isinstance(scores, Scores)
    assert "<b>&" not in scores._repr_html_()
    assert {"<b>", "k-NN", "50.0 %", "40.0 % to 60.0 %"} <= set(words(scores._repr_html_()))
    folder = shown(lambda: Path("runs") / "first")()
    assert isinstance(folder, Folder)
    assert folder == Path("runs/first")
    assert str(folder / "backbone") == "runs/first/backbone"
    assert shown(lambda: None)() is None
    summary = summarised(lambda: {"images": 1234, "ok": 1200})()
    assert isinstance(summary, Summary)
    assert {"1,234", "1,200"} <= set(words(summary._repr_html_()))
    assert troodon.pretrain.__doc__.startswith("Learn features")
