"""What every test may ask for: the folder of real images, scripts of benchmarks/, and a quiet torch.

Tests run on the CPU: a GPU is hidden from them, so that equal bits are equal everywhere and test processes do not fill
its memory. Only `pytest -m gpu` shows it, to tests that are marked so.
"""

import os
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from _pytest.mark.expression import Expression

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SHARED = Path(os.environ.get("TROODON_TEST_DATA", Path(__file__).parents[2] / "shared"))


def pytest_configure(config: pytest.Config) -> None:
    """Hide CUDA devices, before torch looks for them, unless this run is of tests marked `gpu` and of no others.

    Kernels then run as Python, which Triton decides when it is imported, by whichever test module is first.
    """
    if not only_gpu(config.option.markexpr):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        os.environ.setdefault("TRITON_INTERPRET", "1")


def only_gpu(markers: str) -> bool:
    """Whether an expression of markers, as that of `-m`, takes tests marked `gpu` and none without a mark."""
    expression = Expression.compile(markers or "not gpu")
    return expression.evaluate(lambda name, **_: name == "gpu") and not expression.evaluate(lambda name, **_: False)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip tests marked `gpu` where there is none to see."""
    if item.get_closest_marker("gpu") is None:
        return
    import torch

    if not torch.cuda.is_available():
        hidden = not only_gpu(item.config.option.markexpr)
        pytest.skip("a GPU is shown to `pytest -m gpu` alone" if hidden else "torch finds no CUDA device here")


@pytest.fixture
def shared() -> Callable[[str], Path]:
    """`shared("photos.tar")` is a pack of real images; the test is skipped where the folder is missing."""

    def find(name: str, folder: str = "data") -> Path:
        path = SHARED / folder / name
        if not path.exists():
            pytest.skip(f"needs {name} in {SHARED / folder} (or TROODON_TEST_DATA)")
        return path

    return find


@pytest.fixture
def run_script(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str], dict]]:
    """A function that runs a script of benchmarks/ as Python does, with its own folder on the path."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    modules = set(sys.modules)
    yield lambda name, run_name: runpy.run_path(str(BENCHMARKS / name), run_name=run_name)
    for name in set(sys.modules) - modules:  # `measure`, `step`: names under which only scripts import them
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(BENCHMARKS)):
            del sys.modules[name]


@pytest.fixture(autouse=True)
def few_threads(request: pytest.FixtureRequest) -> None:
    """Test processes run beside one another; each keeps to one thread where torch is used."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
