"""What the points of the map can be coloured by: a class for each image, or a number."""

from dataclasses import dataclass

import numpy as np
import pyarrow.compute as pc
from numpy import ndarray

from troodon.explore.collection import Collection
from troodon.search.inverted_lists import kmeans, nearest_centroids

CLASSES = ("label", "stage", "pool", "split", "marks", "status", "kept")
CLUSTERS = 24
MAX_CLASSES = 65_534
NONE = 65_535  # the class of an image that has none


@dataclass(frozen=True)
class Colour:
    """A uint16 class or a float32 number for each of N images; the classes with their names and counts."""

    kind: str  # "classes" or "numbers"
    values_N: ndarray
    names: list[str]
    counts: list[int]


def colour_names(collection: Collection) -> list[str]:
    """What these images can be coloured by."""
    table = collection.images
    there = [name for name in CLASSES if name in table.column_names and table[name].null_count < len(table)]
    if "status" in there and collection.has_vector_N.all():
        there.remove("status")
    numbers = [name for name in table.column_names if name == "score" or name.startswith("score_")]
    return [*there, "cluster", *numbers, *(["pixels"] if "width" in table.column_names else [])]


def colour(collection: Collection, name: str) -> Colour:
    """The colour of each image by one of `colour_names`. The most frequent class comes first."""
    if name == "cluster":
        return _clusters(collection)
    if name == "pixels":
        width, height = (collection.column(side).astype(np.float64) for side in ("width", "height"))
        return Colour("numbers", (width * height).astype("<f4"), [], [])
    if name == "score" or name.startswith("score_"):
        return Colour("numbers", collection.column(name).astype("<f4"), [], [])
    column = collection.images[name].combine_chunks()
    if name == "kept":
        column = pc.if_else(column, "kept", "left out")
    encoded = column.dictionary_encode()
    encoded = encoded.combine_chunks() if hasattr(encoded, "combine_chunks") else encoded
    names = [str(value) for value in encoded.dictionary.to_pylist()]
    codes = pc.fill_null(encoded.indices, -1).to_numpy(zero_copy_only=False).astype(np.int64)
    counts = np.bincount(codes[codes >= 0], minlength=len(names))
    order = np.argsort(-counts, kind="stable")[:MAX_CLASSES]
    place = np.full(len(names) + 1, NONE, np.int64)  # the last one is for -1
    place[order] = np.arange(len(order))
    return Colour("classes", place[codes].astype("<u2"), [names[i] for i in order], counts[order].tolist())


def _clusters(collection: Collection) -> Colour:
    """Clusters of vectors by spherical k-means, the largest first."""
    rows = np.flatnonzero(collection.has_vector_N)
    centroids_LD = kmeans(collection.x_ND[rows] if len(rows) < 200_000 else collection.x_ND, CLUSTERS, seed=0)
    values_N = np.full(len(collection), NONE, "<u2")
    cluster_M = nearest_centroids(collection.x_ND, centroids_LD, 1)[1][rows, 0] if len(rows) else np.zeros(0, int)
    counts = np.bincount(cluster_M, minlength=len(centroids_LD))
    order = np.argsort(-counts, kind="stable")
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order))
    values_N[rows] = place[cluster_M]
    return Colour("classes", values_N, [f"cluster {i + 1}" for i in range(len(order))], counts[order].tolist())
