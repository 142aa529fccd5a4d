"""Instance retrieval, and copy detection among many images."""

from collections.abc import Iterator, Sequence

import numpy as np

from troodon.config import UsageError
from troodon.evaluate.config import EvaluateConfig
from troodon.evaluate.features import Extractor, Reader, dataset_fingerprint, extract
from troodon.evaluate.metrics import average_precision, bootstrap_interval, micro_ap
from troodon.evaluate.results import Result, likeness
from troodon.evaluate.sets.benchmark import Benchmark, Relevance
from troodon.search.exact import l2_normalise, pairs_above

# Shape suffixes: Q queries, N images of the gallery, D channels, P pairs.

CHUNK = 256  # queries ranked at a time
MAX_PAIRS = 2**24  # maximum number of pairs whose scores are in memory at one time


def retrieve(backbone: Extractor, benchmark: Benchmark, config: EvaluateConfig, reader: Reader) -> Iterator[Result]:
    """Yield mean average precision, and precision of the first images, for each difficulty of the ground truth."""
    features = extract(backbone, benchmark.images, boxes=benchmark.boxes, reader=reader)
    position = {int(row): i for i, row in enumerate(features.rows)}
    readable = [i for i, q in enumerate(benchmark.queries) if int(q) in position]
    gallery = np.array([position[int(row)] for row in benchmark.gallery if int(row) in position])
    in_gallery = {int(features.rows[p]): i for i, p in enumerate(gallery)}
    query_QD = features.final_ND[[position[int(benchmark.queries[i])] for i in readable]]
    images = dataset_fingerprint(benchmark.images)
    for difficulty, relevance in benchmark.relevance.items():
        judgements = [
            (np.array([in_gallery[int(r)] for r in relevant if int(r) in in_gallery], int),
             np.array([in_gallery[int(r)] for r in ignored if int(r) in in_gallery], int))
            for relevant, ignored in (relevance[i] for i in readable)
        ]  # fmt: skip
        ap_Q, precision_QA = rank_queries(
            query_QD, features.final_ND[gallery], judgements, config.retrieval_at, benchmark.ap_method
        )
        valid_Q = ~np.isnan(ap_Q)
        if not valid_Q.any():
            raise UsageError(f"{benchmark.name}: no query has a relevant image")
        settings = {
            "queries": int(valid_Q.sum()), "gallery": len(gallery), "features": "class token of the last block, cosine",
            "average precision": benchmark.ap_method,
            "interval": f"95 %, bootstrap over queries, {config.resamples} resamples",
        }  # fmt: skip
        if features.unreadable:
            settings["images left out"] = len(features.unreadable)
        like = likeness(backbone, images, difficulty=difficulty, average=benchmark.ap_method)
        suffix = "" if difficulty == "all" else f"_{difficulty}"
        measured = {"map": ap_Q, **{f"p@{k}": precision_QA[:, i] for i, k in enumerate(config.retrieval_at)}}
        for metric, value_Q in measured.items():
            low, high = bootstrap_interval(value_Q[valid_Q], config.resamples, config.seed)
            value = float(value_Q[valid_Q].mean())
            details = {"per query": ap_Q.tolist(), "left out": features.unreadable} if metric == "map" else {}
            yield Result(f"retrieve{suffix}", benchmark.name, metric, value, low, high, settings, like, details)


def detect_copies(
    backbone: Extractor, benchmark: Benchmark, config: EvaluateConfig, reader: Reader
) -> Iterator[Result]:
    """Yield the average precision of all pairs of images in one ranking, so with one threshold for all images."""
    features = extract(backbone, benchmark.images, reader=reader)
    position = {int(row): i for i, row in enumerate(features.rows)}
    pairs = np.array([(position[a], position[b]) for a, b in benchmark.pairs.tolist() if {a, b} <= position.keys()])
    if not len(pairs):
        raise UsageError(f"{benchmark.name}: none of its {len(benchmark.pairs)} pairs can be read")
    value, low, high = micro_ap(*score_pairs(features.final_ND, pairs), config.resamples, config.seed)
    settings = {
        "pairs": len(pairs), "images": len(features.rows), "features": "class token of the last block, cosine",
        "interval": f"95 %, bootstrap over the pairs, {config.resamples} resamples",
    }  # fmt: skip
    like = likeness(backbone, dataset_fingerprint(benchmark.images))
    details = {"left out": features.unreadable}
    yield Result("copies", benchmark.name, "micro_ap", value, low, high, settings, like, details)


def rank_queries(
    query_QD: np.ndarray, gallery_ND: np.ndarray, relevance: Relevance, at: Sequence[int], method: str
) -> tuple[np.ndarray, np.ndarray]:
    """Rank the gallery by cosine: average precision (Q,) and precision of the first `at` images (Q, len(at)).

    `relevance` holds for each query the relevant rows of the gallery, and the rows that are ignored. Queries without a
    relevant row get NaN. Equal scores keep the order of the gallery.
    """
    ap_Q, precision_QA = np.full(len(query_QD), np.nan), np.full((len(query_QD), len(at)), np.nan)
    unit_ND = l2_normalise(gallery_ND)
    for start in range(0, len(query_QD), CHUNK):
        score_QN = l2_normalise(query_QD[start : start + CHUNK]) @ unit_ND.T
        for query, score_N in enumerate(score_QN, start):
            relevant, ignored = relevance[query]
            if not len(relevant):
                continue
            relevant_N, counted_N = np.zeros(len(score_N), bool), np.ones(len(score_N), bool)
            relevant_N[relevant], counted_N[ignored] = True, False
            order = np.argsort(-score_N, kind="stable")
            ranked = relevant_N[order[counted_N[order]]]
            ap_Q[query] = average_precision(ranked, len(relevant), method)
            precision_QA[query] = [ranked[:k].sum() / min(k, len(relevant)) for k in at]
    return ap_Q, precision_QA


def score_pairs(x_ND: np.ndarray, pairs_P2: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cosine of every pair of images (P,), and whether it is one of `pairs_P2`; the highest only of very many pairs."""
    count = len(x_ND)
    threshold = -2.0
    if count * (count - 1) // 2 > MAX_PAIRS:
        correct_P = np.einsum("pd,pd->p", l2_normalise(x_ND[pairs_P2[:, 0]]), l2_normalise(x_ND[pairs_P2[:, 1]]))
        threshold = float(correct_P.min()) - 1e-4  # pairs below the last correct one do not change the result
    if threshold > -2.0:
        i_P, j_P, score_P = pairs_above(x_ND, threshold)
    else:
        i_P, j_P = np.triu_indices(count, 1)
        unit_ND = l2_normalise(x_ND)
        score_P = (unit_ND @ unit_ND.T)[i_P, j_P]
    codes_P = np.sort(pairs_P2, axis=1) @ np.array([count, 1])
    return score_P, np.isin(i_P * count + j_P, codes_P)
