"""The objective as data: which terms a network is trained by, and what each needs. No torch here.

The functions of the terms stand in terms.py, under the same names.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from troodon.config import UsageError, nearest, within

# What a term needs besides the student's features of global crops. Each is computed once, for all terms that need it.
CLS_TARGETS = "prototype targets of class tokens"  # from the teacher's head
MASKED_TARGETS = "prototype targets of masked patches"
VISIBLE_TARGETS = "prototype targets of visible patches"
CLS_FEATURES = "a frozen teacher's class tokens"
PATCH_FEATURES = "a frozen teacher's patches"
ANCHOR = "an anchor's patches"  # an earlier EMA

TERMS: Mapping[str, tuple[str, ...]] = {
    "dino": (CLS_TARGETS,),
    "ibot": (MASKED_TARGETS,),
    "ibot_visible": (VISIBLE_TARGETS,),
    "koleo": (),
    "kde": (),
    "contrast": (),
    "gram": (ANCHOR,),
    "cls_features": (CLS_FEATURES,),
    "patch_features": (PATCH_FEATURES,),
}
EARLIER = {f"{name}_weight": name for name in ("dino", "ibot", "koleo", "contrast", "gram")}
EARLIER |= {"cls_weight": "cls_features", "patch_weight": "patch_features"}


@dataclass(frozen=True)
class ObjectiveConfig:
    """A weighted sum of terms. By default DINO + iBOT + KoLeo (https://arxiv.org/abs/2304.07193, section 4)."""

    RENAMED: ClassVar[Mapping[str, str]] = EARLIER

    terms: tuple[tuple[str, float], ...] = (("dino", 1.0), ("ibot", 1.0), ("koleo", 0.1))
    """Names and weights of the terms: dino, ibot, ibot_visible, koleo, kde, contrast, gram; in distillation also
    cls_features and patch_features, which compare with the teacher's features and need no heads."""
    targets: Literal["sinkhorn", "centring"] = "sinkhorn"
    """How the teacher's logits become targets."""
    heads: Literal["separate", "shared"] = "separate"
    """Whether the patch objective has a head of its own."""
    student_temperature: float = 0.1
    koleo_group: int = 0
    """Images, one after another in the step, among which koleo and kde look for others; 0 is all of them."""
    contrast_temperature: float = 0.05
    projector: tuple[int, ...] = ()
    """Widths of an MLP between class tokens and contrast, such as 512 512 128; its hidden layers are normalised over
    the images of the step (https://arxiv.org/abs/2002.05709, section 4.2). Empty: contrast compares class tokens."""
    patch_loss: Literal["smooth_l1", "cosine"] = "smooth_l1"
    """How patch_features compares. The teacher's channels are standardised first."""
    centre_momentum: float = 0.9
    """Share of the centre that stays at each step, with centring."""

    LATER = ("projector",)

    def __post_init__(self) -> None:
        within(self, "objective.", 1e-4, None, "student_temperature", "contrast_temperature")
        within(self, "objective.", 0, None, "koleo_group")
        within(self, "objective.", 1, None, *(["projector"] if self.projector else []))
        within(self, "objective.", 0, 1, "centre_momentum")
        names = [name for name, _ in self.terms]
        for name, weight in self.terms:
            if name not in TERMS:
                raise nearest("term in objective.terms", name, TERMS)
            if names.count(name) > 1:
                raise UsageError(f"objective.terms: {name} is there twice; give it one weight")
            if not 0 < weight < float("inf"):
                raise UsageError(f"objective.terms {name} {weight:g}: must be above 0; leave out a term not wanted")
        if not set(names) - {"koleo", "kde", "gram"}:
            given = " ".join(names) or "(none)"
            raise UsageError(f"objective.terms {given}: nothing to learn from; add dino 1, ibot 1 or contrast 1")

        if self.projector and "contrast" not in names:
            given = " ".join(map(str, self.projector))
            raise UsageError(f"objective.projector {given}: it is for contrast, which is not in objective.terms")

    def weight(self, term: str) -> float:
        """The weight of a term; 0 if the objective has no such term."""
        return dict(self.terms).get(term, 0.0)

    def without(self, *terms: str) -> tuple[tuple[str, float], ...]:
        """The other terms, with their weights."""
        return tuple((name, weight) for name, weight in self.terms if name not in terms)

    @property
    def needs(self) -> frozenset[str]:
        """All that its terms need."""
        return frozenset(need for name, _ in self.terms for need in TERMS[name])

    @property
    def patch_targets(self) -> bool:
        """Whether patches are compared by prototypes."""
        return bool(self.needs & {MASKED_TARGETS, VISIBLE_TARGETS})

    @property
    def patches(self) -> bool:
        """Whether patches are compared at all."""
        return bool(self.needs - {CLS_TARGETS, CLS_FEATURES})

    @property
    def prototypes(self) -> bool:
        """Whether tokens are compared by prototypes, which heads give."""
        return self.patch_targets or CLS_TARGETS in self.needs

    @property
    def features(self) -> tuple[str, ...]:
        """Which features are compared with a frozen teacher's: "cls", "patches"."""
        return ("cls",) * (CLS_FEATURES in self.needs) + ("patches",) * (PATCH_FEATURES in self.needs)

    def renewed(self, options: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
        """The option `terms` for options of earlier versions, where each weight had a name of its own."""
        weights = {name: str(weight) for name, weight in self.terms}
        weights |= {EARLIER[name]: " ".join(words) for name, words in options.items()}
        return {"terms": [word for name in TERMS if _above_zero(weights.get(name)) for word in (name, weights[name])]}


def _above_zero(weight: str | None) -> bool:
    """False for no weight and for 0; what is not a number is refused later, by its name."""
    try:
        return weight is not None and float(weight) != 0
    except ValueError:
        return True
