"""Verbs: each a function, which `import troodon` gives, and beside it its command, with the same names and defaults.

Here, and only here, the parts that never import one another meet: a recipe becomes a config, a path becomes
an index or a backbone, training is lent a k-NN to watch itself by.
"""

from troodon.verbs.about import report
from troodon.verbs.common import load
from troodon.verbs.curation import calibrate, curate
from troodon.verbs.distillation import distill
from troodon.verbs.evaluation import compare, evaluate
from troodon.verbs.images import embed, pack, scan, show_crops
from troodon.verbs.leakage import leak
from troodon.verbs.training import pretrain, submit

__all__ = [
    "calibrate",
    "compare",
    "curate",
    "distill",
    "embed",
    "evaluate",
    "leak",
    "load",
    "pack",
    "pretrain",
    "report",
    "scan",
    "show_crops",
    "submit",
]
