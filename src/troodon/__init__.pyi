# The signatures of the public names, for type checkers and editors, which do not see what `__getattr__` imports.
from troodon.config import UsageError as UsageError
from troodon.demo import demo as demo
from troodon.model.backbone import Backbone as Backbone
from troodon.model.backbone import Features as Features
from troodon.run import Interrupted as Interrupted
from troodon.verbs.about import report as report
from troodon.verbs.common import load as load
from troodon.verbs.curation import calibrate as calibrate
from troodon.verbs.curation import curate as curate
from troodon.verbs.dedup import apply as apply
from troodon.verbs.dedup import dedup as dedup
from troodon.verbs.distillation import distill as distill
from troodon.verbs.embedding import embed as embed
from troodon.verbs.evaluation import compare as compare
from troodon.verbs.evaluation import evaluate as evaluate
from troodon.verbs.exploration import explore as explore
from troodon.verbs.export import export as export
from troodon.verbs.images import pack as pack
from troodon.verbs.images import scan as scan
from troodon.verbs.leakage import leak as leak
from troodon.verbs.show import show_attention as show_attention
from troodon.verbs.show import show_crops as show_crops
from troodon.verbs.show import show_matches as show_matches
from troodon.verbs.show import show_neighbours as show_neighbours
from troodon.verbs.show import show_pca as show_pca
from troodon.verbs.training import pretrain as pretrain
from troodon.verbs.watching import watch as watch

__version__: str
