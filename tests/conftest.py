"""What every test may ask for: the folder of real images, and a quiet torch."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

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


@pytest.fixture(autouse=True)
def few_threads(request: pytest.FixtureRequest) -> None:
    """Test processes run beside one another; each keeps to one thread where torch is used."""
    import sys

    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
