"""The verb `embed`: which tokens, in which files, read by other programs; what is nearest to a query."""

import importlib.util
import io
import json
import re
import shlex
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import troodon
from troodon import cli
from troodon.config import UsageError
from troodon.curate import embed as embedding
from troodon.curate import embedding_files, stage
from troodon.model.backbone import Backbone
from troodon.model.config import Preprocessing, ViTConfig
from troodon.search.exact import l2_normalise
from troodon.verbs.embedding import find_nearest

CONFIG = ViTConfig(dim=32, depth=3, heads=2, patch=8, grid=2, layer_scale=0.5)
SIGHT = Preprocessing(resize=16, crop=16)
COUNT = 12  # images, of which number 5 is broken


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A backbone and a folder of images, two of each of several colours; the last one once more as query.png."""
    home = tmp_path_factory.mktemp("embed")
    Backbone.random(CONFIG, SIGHT, seed=1).save(home / "net")
    random = np.random.default_rng(0)
    for i in range(COUNT):
        pixels = random.integers(0, 60, (24, 20 + i, 3)) + np.array([[30, 190][i // 2 & j > 0] for j in (1, 2, 4)])
        path = home / "photos" / ["cats", "dogs"][i % 2] / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.astype(np.uint8)).save(path)
        if i == 5:
            path.write_bytes(b"no image")
    Image.fromarray(pixels.astype(np.uint8)).save(home / "query.png")
    return home


@pytest.fixture
def net(world) -> Backbone:
    return troodon.load(world / "net")


def run(*words: object, capsys) -> tuple[int, str, str]:
    code = cli.run([str(word) for word in words])
    return code, *capsys.readouterr()


def expected_vectors(net: Backbone, world: Path, tokens: str, blocks: list[int]) -> tuple[list[str], np.ndarray]:
    """The names of the readable images, in order, and what the network gives for each."""
    paths = sorted(p for p in (world / "photos").rglob("*.png") if p.stem != "05")
    f = net.features(paths, blocks=blocks or 1)
    if tokens == "patches":
        return [p.name for p in paths], torch.cat([b.patches for b in f.blocks], -1).numpy()
    wanted = tokens.split("+")
    parts = [l2_normalise(getattr(block, name).numpy()) for block in f.blocks for name in wanted]
    return [p.name for p in paths], np.concatenate(parts, 1)


@pytest.mark.parametrize("tokens", embedding_files.TOKENS)
@pytest.mark.parametrize("blocks", [[], [0, 2]])
def test_a_matrix_of_any_tokens_and_blocks(world, net, tmp_path, tokens, blocks):
    out = troodon.embed(net, world / "photos", tmp_path / "e", tokens=tokens, blocks=blocks, compute="fp32")
    x, images = embedding.load_embeddings(out)
    names, expected = expected_vectors(net, world, tokens, blocks)
    assert x.dtype == np.float16
    assert x.shape == (COUNT, *expected.shape[1:])
    readable = np.array(images["status"].to_pylist()) == "ok"
    assert [Path(p).name for p, ok in zip(images["path"].to_pylist(), readable) if ok] == names
    np.testing.assert_allclose(x[readable], expected, atol=4e-3)
    assert not np.any(x[~readable])


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
@pytest.mark.parametrize("tokens", ["cls+mean", "patches"])
def test_a_table_has_the_vectors_of_the_matrix(world, net, tmp_path, suffix, tokens, monkeypatch):
    monkeypatch.setattr(embedding_files, "CHUNK_VALUES", 300)  # few images at once
    monkeypatch.setitem(embedding.embed.__wrapped__.__kwdefaults__, "partition_size", 5)
    options = {"tokens": tokens, "blocks": [1, -1], "compute": "fp32"}
    x, images = embedding.load_embeddings(troodon.embed(net, world / "photos", tmp_path / "npy", **options))
    out = troodon.embed(net, world / "photos", tmp_path / "table", format=suffix, **options)
    assert not (out / "embeddings.npy").exists()
    read = {"parquet": pq.read_table, "arrow": pyarrow.feather.read_table}[suffix]
    table = read(out / f"embeddings.{suffix}")
    per_image = 4 if tokens == "patches" else 1
    assert len(table) == (COUNT - 1) * per_image
    assert table.schema.field("embedding").type == pa.list_(pa.float32(), x.shape[-1])
    for row in table.to_pylist():
        place = (row["row"], row["column"]) if tokens == "patches" else ()
        np.testing.assert_array_equal(np.float32(row["embedding"]), x[(row["id"], *place)])
        assert (row["path"], row["label"]) == (images["path"][row["id"]].as_py(), images["label"][row["id"]].as_py())
    if tokens == "patches":
        assert table["column"].to_pylist()[:4] == [0, 1, 0, 1]
    assert {*table["label"].to_pylist()} == {"cats", "dogs"}
    assert images["status"].to_pylist() == pq.read_table(out / "images.parquet")["status"].to_pylist()


def test_duckdb_searches_the_table(world, net, tmp_path):
    duckdb = pytest.importorskip("duckdb", reason="duckdb is not installed")
    out = troodon.embed(net, world / "photos", tmp_path / "e", format="parquet")
    file = out / "embeddings.parquet"
    query = find_nearest(net, [world / "query.png"], out, k=3)[0]
    found = duckdb.sql(
        f"""SELECT id, path, label, array_cosine_similarity(embedding::FLOAT[32], q.one) AS score
        FROM '{file}', (SELECT embedding::FLOAT[32] AS one FROM '{file}' WHERE path LIKE '%11.png') AS q
        ORDER BY score DESC LIMIT 3"""
    ).fetchall()
    assert [row[:3] for row in found] == [(image["id"], image["path"], image["label"]) for image in query]
    assert [row[3] for row in found] == pytest.approx([image["score"] for image in query], abs=2e-3)


def test_the_same_command_does_nothing_and_another_is_refused(world, tmp_path, capsys, monkeypatch):
    words = ["embed", "--backbone", world / "net", "--data", world / "photos", "--out", tmp_path / "e"]
    chosen = ["--tokens", "mean", "--format", "parquet", "--blocks", "1", "2", "--threads", "1"]
    code, out, err = run(*words, *chosen, capsys=capsys)
    assert (code, out.strip()) == (0, str(tmp_path / "e"))
    assert "1 of 12 images is set aside: 1 not an image; " in err
    assert "05.png" in err
    before = {p.name: (p.stat().st_mtime_ns, p.stat().st_ino) for p in (tmp_path / "e").iterdir()}
    with monkeypatch.context() as patched:
        patched.setattr(Backbone, "features", lambda *_, **__: pytest.fail("the network ran again"))
        assert run(*words, *chosen, capsys=capsys) == (0, f"{tmp_path / 'e'}\n", "")
    for change, said in (
        (["--tokens", "cls"], "tokens: mean -> cls"),
        (["--format", "npy"], "format: parquet -> None"),
        (["--blocks", "2"], "blocks: [1, 2] -> [2]"),
    ):
        code, out, err = run(*words, *chosen, *change, capsys=capsys)
        assert (code, out) == (2, "")
        assert said in err
    assert before == {p.name: (p.stat().st_mtime_ns, p.stat().st_ino) for p in (tmp_path / "e").iterdir()}


@pytest.mark.parametrize("options", [{"format": "parquet"}, {"tokens": "patches"}])
def test_a_stopped_command_goes_on(world, net, tmp_path, monkeypatch, options):
    """A kill leaves whole units; what is computed again are the others, and the file is that of one go."""
    monkeypatch.setattr(embedding_files, "UNIT_BYTES", 3 * 2 * 4 * 32)  # three images of patches
    monkeypatch.setattr(embedding, "PARTITION_SIZE", 3)
    monkeypatch.setitem(embedding.embed.__wrapped__.__kwdefaults__, "partition_size", 3)
    options |= {"batch": 2, "threads": 1, "compute": "fp32"}
    whole = troodon.embed(net, world / "photos", tmp_path / "whole", **options)
    images, features = [], Backbone.features

    def counted(self, prepared, **chosen):
        images.append(len(prepared))
        if stop and sum(images) > 7:
            raise KeyboardInterrupt
        return features(self, prepared, **chosen)

    monkeypatch.setattr(Backbone, "features", counted)
    stop = True
    with pytest.raises(KeyboardInterrupt):
        troodon.embed(net, world / "photos", tmp_path / "e", **options)
    assert not (tmp_path / "e").exists()
    stop, done = False, len(list((tmp_path / "e.parts").glob("embed-*/0*/counts.json")))
    assert done == 2
    images.clear()
    out = troodon.embed(net, world / "photos", tmp_path / "e", **options)
    assert sum(images) == COUNT - 1 - 6 + ("tokens" in options)  # a grey image tells how large patches are
    for path in whole.iterdir():
        if path.name not in ("timings.json", "manifest.json"):
            assert path.read_bytes() == (out / path.name).read_bytes(), path.name


def test_units_of_patches_are_small(net, monkeypatch):
    _, encode = embedding.encoder(net, "patches")
    monkeypatch.setattr(embedding_files, "UNIT_BYTES", 10_000)
    assert embedding_files.images_of_a_unit(net, encode) == 10_000 // (2 * 4 * 32)


def test_arrays_of_parts_without_a_readable_image_become_zeros(tmp_path):
    for name, x in (("a", np.zeros((2, 0), np.float16)), ("b", np.ones((3, 2, 2, 4), np.float16))):
        (tmp_path / name).mkdir()
        np.save(tmp_path / name / "x.npy", x)
    stage.concatenate_matrices([tmp_path / "a", tmp_path / "b"], tmp_path / "x.npy")
    x = np.load(tmp_path / "x.npy")
    assert x.shape == (5, 2, 2, 4)
    assert x.reshape(5, -1).any(1).tolist() == [False, False, True, True, True]


@pytest.mark.parametrize("suffix", embedding_files.FORMATS)
def test_the_nearest_images_of_queries(world, net, tmp_path, capsys, suffix, monkeypatch):
    monkeypatch.setattr(embedding_files, "CHUNK_VALUES", 96)  # three images at once
    words = ["embed", "--backbone", world / "net", "--out", tmp_path / "e"]
    made = [*words, "--data", world / "photos", "--tokens", "cls+mean", "--format", suffix, "--blocks", "1"]
    queries = ["--query", world / "query.png", world / "photos" / "cats" / "00.png"]
    queries += ["--query", world / "photos" / "dogs" / "03.png"]
    code, out, _ = run(*made, *queries, "--k", "4", "--json", capsys=capsys)
    assert code == 0
    found = json.loads(out)
    assert [entry["query"] for entry in found] == [str(q) for q in queries if q != "--query"]
    names, x = expected_vectors(net, world, "cls+mean", [1])
    x = l2_normalise(x)
    for entry, row in zip(found, (names.index(n) for n in ("11.png", "00.png", "03.png")), strict=True):
        best = np.argsort(-(x[row] @ x.T), kind="stable")[:4]
        assert [Path(image["path"]).name for image in entry["nearest"]] == [names[b] for b in best]
        assert [image["score"] for image in entry["nearest"]] == pytest.approx((x[row] @ x.T)[best], abs=2e-3)
        assert entry["nearest"][0]["label"] == ("cats" if int(names[row][:2]) % 2 == 0 else "dogs")
    assert run(*words, *queries, "--k", "4", "--json", capsys=capsys) == (0, out, "")  # without the data
    code, table, _ = run(*words, *queries, "--k", "2", capsys=capsys)
    lines = table.splitlines()
    assert [len(lines), lines[0]] == [9, str(world / "query.png")]
    assert lines[1].split() == ["1", "1.0000", "dogs", found[0]["nearest"][0]["path"]]
    assert len(find_nearest(net, [world / "query.png"], tmp_path / "e", k=99)[0]) == COUNT - 1


def test_a_query_of_images_writes_nothing(world, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    words = ["embed", "--backbone", world / "net", "--data", world / "photos", "--query", world / "query.png"]
    code, out, _ = run(*words, "--k", "1", capsys=capsys)
    assert code == 0
    assert out.split()[-1].endswith("11.png")
    assert list(tmp_path.iterdir()) == []


def test_a_query_has_the_range_of_the_index(world, net, tmp_path):
    """Of 12 bits in 16, only the high byte would be left, that is four bits."""
    for i in range(6):
        ramp = np.random.default_rng(i).integers(0, 4096, (4, 4)).repeat(6, 0).repeat(6, 1)
        (tmp_path / "scans").mkdir(exist_ok=True)
        Image.fromarray(ramp.astype(np.uint16)).save(tmp_path / "scans" / f"{i}.png")
    troodon.scan(tmp_path / "scans", tmp_path / "index", range=(0, 4095))
    out = troodon.embed(net, tmp_path / "index", tmp_path / "e", compute="fp32")
    for given in ([tmp_path / "scans" / "4.png"], [Image.open(tmp_path / "scans" / "4.png")]):
        (found,) = find_nearest(net, given, out, k=1)
        assert Path(found[0]["path"]).name == "4.png"
        assert found[0]["score"] == pytest.approx(1, abs=1e-5)


def test_a_query_in_python_is_any_picture(world, net, tmp_path):
    out = troodon.embed(net, world / "photos", tmp_path / "e")
    data = io.BytesIO()
    Image.open(world / "query.png").save(data, "png")
    pictures = [Image.open(world / "query.png"), data.getvalue(), np.asarray(Image.open(world / "query.png"))]
    assert {Path(found[0]["path"]).name for found in find_nearest(net, pictures, out)} == {"11.png"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--data", "{photos}"], "--out is missing"),
        (["--data", "{photos}", "--out", "{out}", "--json"], "--json: is about the images nearest to a --query"),
        (["--data", "{photos}", "--out", "{out}", "--k", "3"], "--k: is about"),
        (["--out", "{out}"], "--data is missing"),
        (["--query", "{query}"], "--out is missing: embed takes --data and --out; with --query, one is enough"),
        (["--out", "{out}", "--query", "{query}"], "holds no finished embeddings; give --data"),
        (["--out", "{made}", "--query", "{query}", "--tokens", "mean"], "(tokens: cls -> mean); leave --tokens out"),
        (["--out", "{made}", "--query", "{query}", "--k", "0"], "k 0"),
        (["--out", "{made}", "--query", "{photos}/cats/00.pgn"], "00.pgn: No such file"),
        (["--out", "{out}", "--data", "{photos}", "--query", "{photos}/dogs/05.png"], "05.png: not an image"),
        (["--out", "{out}", "--data", "{photos}", "--query", "{query}", "--tokens", "patches"], "a query takes"),
        (["--out", "{patches}", "--query", "{query}"], "holds patches"),
        (["--out", "{other}", "--query", "{query}"], "was made with another backbone, random"),
        (["--out", "{net}", "--query", "{query}"], "holds no finished embeddings"),
        (["--out", "{out}", "--data", "{photos}", "--blocks", "3"], "block 3: this network has the blocks 0 to 2"),
        (["--out", "{out}", "--data", "{photos}", "--format", "paruqet"], "parquet"),
        (["--out", "{out}", "--data", "{photos}", "--tokens", "patch"], "did you mean 'patches'"),
    ],
)
def test_mistakes_are_refused_before_anything_is_written(world, net, tmp_path, capsys, words, said):
    troodon.embed(net, world / "photos", tmp_path / "made")
    troodon.embed(net, world / "photos", tmp_path / "patches", tokens="patches")
    troodon.embed(Backbone.random(CONFIG, SIGHT, seed=2), world / "photos", tmp_path / "other")
    capsys.readouterr()
    places = {name: tmp_path / name for name in ("out", "made", "patches", "other")}
    places |= {"net": world / "net", "photos": world / "photos", "query": world / "query.png"}
    code, out, err = run("embed", "--backbone", world / "net", *(w.format(**places) for w in words), capsys=capsys)
    assert (code, out) == (2, "")
    assert said in err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["made", "other", "patches"]


def test_python_refuses_unknown_names(world, net, tmp_path):
    for options, said in (({"format": "csv"}, "unknown format 'csv'"), ({"tokens": "clss"}, "did you mean 'cls'")):
        with pytest.raises(UsageError, match=said):
            troodon.embed(net, world / "photos", tmp_path / "e", **options)


PAGE = (Path(__file__).parents[1] / "docs" / "features.md").read_text()


def page_blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.+?)^```", PAGE, re.MULTILINE | re.DOTALL)


def test_the_page_on_features_runs(world, tmp_path, capsys, monkeypatch):
    """Its commands, its Python and its SQL, one after the other; of packages that are not installed, none."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").symlink_to(world / "photos")
    deep = ViTConfig(dim=32, depth=12, heads=2, patch=8, grid=2, registers=1)
    Backbone.random(deep, SIGHT).save(tmp_path / "runs" / "first" / "backbone")
    for name in ("a", "b", "new", "other"):
        Image.open(world / "query.png").save(tmp_path / f"{name}.jpg")
    lines = [line for block in page_blocks("bash") for line in block.splitlines()]
    assert len(lines) == 6
    for line in lines:
        code, out, err = run(*shlex.split(line, comments=True)[1:], capsys=capsys)
        assert (code, bool(out)) == (0, True), err
    names = {"images": torch.zeros(2, 3, 16, 16)}
    for block in page_blocks("python"):
        if "import peft" not in block or importlib.util.find_spec("peft"):
            exec(block, names)
    assert troodon.load("tuned").dtype == torch.float32
    if importlib.util.find_spec("duckdb"):
        import duckdb

        (statement,) = page_blocks("sql")
        assert len(duckdb.sql(statement).fetchall()) == 10


def test_threads_prepare_while_the_network_computes(world, net, monkeypatch):
    """Pixels are prepared and hashed by reading threads, and later batches while the network has the first."""
    names, ahead = set(), []
    prepare, features = Backbone.prepare, Backbone.features

    def prepared(self, images, **options):
        names.add(threading.current_thread().name.rpartition("_")[0])
        ahead.append(len(images))
        return prepare(self, images, **options)

    def computed(self, batch, **options):
        deadline = time.monotonic() + 10
        while sum(ahead) < 6 and time.monotonic() < deadline:
            time.sleep(0.001)
        assert sum(ahead) >= 6
        return features(self, batch, **options)

    monkeypatch.setattr(Backbone, "prepare", prepared)
    monkeypatch.setattr(Backbone, "features", computed)
    with tempfile.TemporaryDirectory() as folder:
        troodon.embed(net, world / "photos", Path(folder, "e"), batch=2, threads=2, compute="fp32")
    assert names == {"prepare"}


def test_files_give_the_same_features_by_one_thread_and_by_many(world, tmp_path, monkeypatch):
    from troodon.model import backbone as module
    from troodon.verbs.common import with_range

    paths = sorted((world / "photos").rglob("*.png"))
    net = with_range(Backbone.random(CONFIG, SIGHT), None)
    found = []
    for threads in (1, 3):
        monkeypatch.setattr(module, "default_threads", lambda threads=threads: threads)
        f = net.features([*paths, tmp_path / "none.png"], on_error="skip")
        found.append((f.rows, f.cls.numpy().tobytes(), f.patches.numpy().tobytes()))
        with pytest.raises(UsageError, match=r"05.png: not an image.*on_error='skip' leaves it out"):
            net.features([*paths, tmp_path / "none.png"])
    assert found[0] == found[1]
    assert len(found[0][0]) == COUNT - 1


def test_workers_and_jobs_write_the_same_files(world, net, tmp_path, monkeypatch, capsys):
    pytest.importorskip("submitit", reason="needs submitit: pip install 'troodon[slurm]'")
    monkeypatch.setitem(embedding.embed.__wrapped__.__kwdefaults__, "partition_size", 4)
    words = ["embed", "--backbone", world / "net", "--data", world / "photos", "--compute", "fp32"]
    shared = {
        "alone": [], "two": ["--workers", "2"],
        "array": ["--backend", "slurm", "--workers", "2", "--slurm.cluster", "local", "--slurm.cpus-per-job", "1"],
    }  # fmt: skip
    for name, options in shared.items():
        assert run(*words, "--out", tmp_path / name, *options, capsys=capsys)[0] == 0
    files = [
        {(tmp_path / name / file).read_bytes() for name in shared} for file in ("embeddings.npy", "images.parquet")
    ]
    assert [len(contents) for contents in files] == [1, 1]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--backend", "slurm"], "workers 0: of the backend slurm, the jobs of an array; 1 or more"),
        (["--slurm.partition", "gpus"], "they need --backend slurm, and it is local"),
        (["--workers", "2", "--compile"], "a network is compiled in this process only"),
        (["--backend", "slrum"], "backend 'slrum'"),
        (["--backend", "ray", "--device", "cuda:1"], "Ray gives each process a device of its own"),
    ],
)
def test_mistakes_about_backends_are_refused(world, tmp_path, capsys, options, said):
    words = ["embed", "--backbone", world / "net", "--data", world / "photos", "--out", tmp_path / "e"]
    code, _, err = run(*words, *options, capsys=capsys)
    assert code == 2
    assert said in err
    assert not (tmp_path / "e").exists()
