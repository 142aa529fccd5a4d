"""Verbs: each is a function, which `import troodon` provides, with its command, of the same names and defaults.

Only here do the packages meet that never import each other: a recipe becomes a config, a path becomes an index or a
backbone, and a training gets a k-NN that monitors it.
"""

from troodon.verbs.about import report
from troodon.verbs.common import load
from troodon.verbs.curation import calibrate, curate
from troodon.verbs.dedup import apply, dedup
from troodon.verbs.distillation import distill
from troodon.verbs.embedding import embed
from troodon.verbs.evaluation import compare, evaluate
from troodon.verbs.exploration import explore
from troodon.verbs.export import export
from troodon.verbs.images import pack, scan
from troodon.verbs.leakage import leak
from troodon.verbs.notebook import shown, summarised
from troodon.verbs.show import show_attention, show_crops, show_matches, show_neighbours, show_pca
from troodon.verbs.training import pretrain, submit
from troodon.verbs.watching import watch

# What these return is shown by a notebook.
curate, dedup, embed, evaluate = shown(curate), shown(dedup), shown(embed), shown(evaluate)
distill, pretrain, pack, scan = shown(distill), shown(pretrain), summarised(pack), summarised(scan)

__all__ = [
    "apply",
    "calibrate",
    "compare",
    "curate",
    "dedup",
    "distill",
    "embed",
    "evaluate",
    "explore",
    "export",
    "leak",
    "load",
    "pack",
    "pretrain",
    "report",
    "scan",
    "show_attention",
    "show_crops",
    "show_matches",
    "show_neighbours",
    "show_pca",
    "submit",
    "watch",
]
