"""Triton's compiler in tests: the interpreter takes what the compiler refuses. No GPU is needed for it."""

import os
import subprocess
import sys

import pytest


def output_of(script: str) -> list[str]:
    """The words that a script prints that compiles kernels, in a process without the interpreter; or the test skips."""
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()
