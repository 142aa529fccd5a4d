"""Does the nearest image show the same thing? Instance retrieval, and copies among many images."""

from collections.abc import Iterator, Sequence

import numpy as np

from troodon.config import UsageError
from troodon.evaluate.config import EvaluateConfig
from troodon.evaluate.features import Extractor, Reader, extract, same_images
from troodon.evaluate.metrics import average_precision, interval, micro_ap
from troodon.evaluate.results import Result, likeness
from troodon.evaluate.sets.benchmark import Benchmark, Judged
from troodon.search.exact import pairs_above, unit

# Shape suffixes: Q queries, N images of the gallery, D channels, P pairs.

CHUNK = 256  # queries ranked at a time
MOST = 2**24  # pairs whose scores are held at one time


def retrieve(backbone: Extractor, benchmark: Benchmark, config: EvaluateConfig, reader: Reader) -> Iterator[Result]:
    """Mean average precision and precision of the first images, for each difficulty that the truth knows."""
    features = extract(backbone, benchmark.images, boxes=benchmark.boxes, reader=reader)
    place = {int(row): i for i, row in enumerate(features.rows)}
    asked = [i for i, q in enumerate(benchmark.queries) if int(q) in place]
    gallery = np.array([place[int(row)] for row in benchmark.gallery if int(row) in place])
    code = {int(features.rows[p]): i for i, p in enumerate(gallery)}
    query_QD = features.final_ND[[place[int(benchmark.queries[i])] for i in asked]]
    images = same_images(benchmark.images)
    for difficulty, judged in benchmark.judged.items():
        found = [
            (np.array([code[int(r)] for r in right if int(r) in code], int),
             np.array([code[int(r)] for r in nothing if int(r) in code], int))
            for right, nothing in (judged[i] for i in asked)
        ]  # fmt: skip
        ap_Q, first_QA = rank_queries(query_QD, features.final_ND[gallery], found, config.at, benchmark.average)
        known = ~np.isnan(ap_Q)
        if not known.any():
            raise UsageError(f"{benchmark.name}: no query has an image that is right for it")
        settings = {
            "queries": int(known.sum()), "gallery": len(gallery), "features": "class token of the last block, cosine",
            "average precision": benchmark.average,
            "interval": f"95 %, bootstrap over queries, {config.resamples} resamples",
        }  # fmt: skip
        if features.left_out:
            settings["images left out"] = len(features.left_out)
        like = likeness(backbone, images, difficulty=difficulty, average=benchmark.average)
        suffix = "" if difficulty == "all" else f"_{difficulty}"
        measured = {"map": ap_Q, **{f"p@{k}": first_QA[:, i] for i, k in enumerate(config.at)}}
        for metric, value_Q in measured.items():
            low, high = interval(value_Q[known], config.resamples, config.seed)
            value = float(value_Q[known].mean())
            details = {"per query": ap_Q.tolist(), "left out": features.left_out} if metric == "map" else {}
            yield Result(f"retrieve{suffix}", benchmark.name, metric, value, low, high, settings, like, details)


def find_copies(backbone: Extractor, benchmark: Benchmark, config: EvaluateConfig, reader: Reader) -> Iterator[Result]:
    """Average precision of all pairs of images in one ranking: one threshold must serve every image."""
    features = extract(backbone, benchmark.images, reader=reader)
    place = {int(row): i for i, row in enumerate(features.rows)}
    pairs = np.array([(place[a], place[b]) for a, b in benchmark.pairs.tolist() if a in place and b in place])
    if not len(pairs):
        raise UsageError(f"{benchmark.name}: none of its {len(benchmark.pairs)} pairs can be read")
    value, low, high = micro_ap(*score_pairs(features.final_ND, pairs), config.resamples, config.seed)
    settings = {
        "pairs": len(pairs), "images": len(features.rows), "features": "class token of the last block, cosine",
        "interval": f"95 %, bootstrap over the pairs, {config.resamples} resamples",
    }  # fmt: skip
    like = likeness(backbone, same_images(benchmark.images))
    details = {"left out": features.left_out}
    yield Result("copies", benchmark.name, "micro_ap", value, low, high, settings, like, details)


def rank_queries(
    query_QD: np.ndarray, gallery_ND: np.ndarray, judged: Judged, at: Sequence[int], how: str
) -> tuple[np.ndarray, np.ndarray]:
    """Average precision (Q,) and precision of the first `at` images (Q, len(at)), by cosine.

    `judged` holds for each query the gallery's rows that are right, and those that count for nothing. NaN for a query
    that nothing is right for. Equal scores keep the order of the gallery.
    """
    ap_Q, first_QA = np.full(len(query_QD), np.nan), np.full((len(query_QD), len(at)), np.nan)
    unit_ND = unit(gallery_ND)
    for start in range(0, len(query_QD), CHUNK):
        score_QN = unit(query_QD[start : start + CHUNK]) @ unit_ND.T
        for place, score_N in enumerate(score_QN, start):
            right, nothing = judged[place]
            if not len(right):
                continue
            relevant_N, counts_N = np.zeros(len(score_N), bool), np.ones(len(score_N), bool)
            relevant_N[right], counts_N[nothing] = True, False
            order = np.argsort(-score_N, kind="stable")
            ranked = relevant_N[order[counts_N[order]]]
            ap_Q[place] = average_precision(ranked, len(right), how)
            first_QA[place] = [ranked[:k].sum() / min(k, len(right)) for k in at]
    return ap_Q, first_QA


def score_pairs(x_ND: np.ndarray, pairs_P2: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The cosine of every pair of images (P,), and whether it is one of `pairs_P2`; of very many, the highest only."""
    count = len(x_ND)
    floor = -2.0
    if count * (count - 1) // 2 > MOST:
        right = np.einsum("pd,pd->p", unit(x_ND[pairs_P2[:, 0]]), unit(x_ND[pairs_P2[:, 1]]))
        floor = float(right.min()) - 1e-4  # pairs below the last that is right change nothing
    if floor > -2.0:
        i_P, j_P, score_P = pairs_above(x_ND, floor)
    else:
        i_P, j_P = np.triu_indices(count, 1)
        unit_ND = unit(x_ND)
        score_P = (unit_ND @ unit_ND.T)[i_P, j_P]
    wanted = np.sort(pairs_P2, axis=1) @ np.array([count, 1])
    return score_P, np.isin(i_P * count + j_P, wanted)
