"""Layouts."""

from troodon.data.benchmarks import Benchmark, Tree, own


def open_benchmark(place, layout=None):
    tree = Tree.open(place)
    return own(tree) if tree else None
