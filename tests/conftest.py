"""What every test may ask for: the folder of real images, scripts of benchmarks/, and a quiet torch."""

import os
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SHARED = Path(os.environ.get("TROODON_TEST_DATA", Path(__file__).parents[2] / "shared"))


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
