"""A step: the same losses as when it is written the usual way, and no wait for the device but the guard's."""

import math
from dataclasses import replace

import pytest
import torch
from benchmarks.usual import UsualMethod
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode, unset_fake_temporarily

from tests.test_plan import batch
from troodon.learn import optim
from troodon.learn.clock import Clock
from troodon.learn.config import ObjectiveConfig, PretrainConfig
from troodon.learn.loop import Learner, NotFinite, train
from troodon.learn.losses import Ranks
from troodon.learn.method import Method
from troodon.learn.network import Network
from troodon.learn.parallel import empty
from troodon.model.config import HeadConfig, ViTConfig
from troodon.views.batch import Batch
from troodon.views.config import CropsConfig

CONFIG = PretrainConfig(
    vit=ViTConfig(dim=32, depth=2, heads=2, patch=4, grid=4, layer_scale=0.5),
    dino_head=HeadConfig(96, 32, 16),
    ibot_head=HeadConfig(80, 32, 16),
    crops=CropsConfig(global_px=16, local_px=8, locals=4),
    batch=6,
    steps=100,
)


def branches(config: PretrainConfig) -> list[Network]:
    made = [empty(config).to_empty(device="cpu") for _ in range(2)]
    torch.manual_seed(0)
    made[0].initialize()
    made[1].load_state_dict(made[0].state_dict())
    return made


def steps(method: Method, config: PretrainConfig, seen: Batch, count: int) -> list[dict]:
    terms: list[dict] = []
    optimizer = optim.adamw(method.student, config.vit.depth, config.optim)
    learner = Learner(method, optimizer, config.schedules, config.optim, lambda step, batch, seen: terms.append(seen))
    train(
        [learner], iter([seen] * count), first_step=50, clock=Clock.of_steps(50 + count), accumulate=1,
        stop_requested=lambda: False,
    )  # fmt: skip
    return terms


@pytest.mark.parametrize(
    ("objective", "mlp"),
    [(ObjectiveConfig(), "gelu"), (ObjectiveConfig(targets="centring", heads="shared"), "swiglu")],
)
def test_three_steps_are_those_of_the_usual_way(objective, mlp):
    config = replace(CONFIG, objective=objective, vit=replace(CONFIG.vit, mlp=mlp))
    torch.manual_seed(1)
    seen = batch(config)
    ours, usual = (steps(kind(config.objective, *branches(config)), config, seen, 3) for kind in (Method, UsualMethod))
    for a, b in zip(ours, usual, strict=True):
        assert {n: v.item() for n, v in a.items()} == pytest.approx({n: v.item() for n, v in b.items()}, rel=2e-5)


def test_a_broken_step_changes_nothing(monkeypatch):
    method, seen = Method(CONFIG.objective, *branches(CONFIG)), batch(CONFIG)
    optimizer = optim.adamw(method.student, CONFIG.vit.depth, CONFIG.optim)
    learner = Learner(method, optimizer, CONFIG.schedules, CONFIG.optim, lambda *_: None)

    def take(first: int) -> list[torch.Tensor]:
        how = {"accumulate": 1, "stop_requested": lambda: False}
        train([learner], iter([seen]), first_step=first, clock=Clock.of_steps(first + 1), **how)
        moments = [value for state in optimizer.state.values() for value in state.values()]
        return [x.detach().clone() for x in (*method.student.parameters(), *method.ema.parameters(), *moments)]

    before = take(50)
    losses = method.losses
    monkeypatch.setattr(method, "losses", lambda *asked: {n: x * math.nan for n, x in losses(*asked).items()})
    with pytest.raises(NotFinite):
        take(51)
    monkeypatch.undo()
    moments = [value for state in optimizer.state.values() for value in state.values()]
    after = [*method.student.parameters(), *method.ema.parameters(), *moments]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(before, take(51), strict=True))


@pytest.mark.parametrize(
    "objective",
    [
        ObjectiveConfig(),
        ObjectiveConfig(
            targets="centring",
            heads="shared",
            terms=(*ObjectiveConfig().terms, ("gram", 1.0)),
            koleo_group=3,
        ),
    ],
)
def test_a_step_asks_the_device_for_one_thing_only(objective, monkeypatch):
    """On tensors without numbers, whose reading raises: of three steps, only the guard's verdicts are read."""
    config = replace(CONFIG, objective=objective, vit=replace(CONFIG.vit, drop_path=0.4))
    seen, read = batch(config), []
    masked_M, weight_M = seen.masked_patches()  # made on the host

    def total(x):
        if x.shape == (2,):  # whether the step is broken, and whether some rank is asked to stop
            read.append(x)
            with unset_fake_temporarily():
                return torch.zeros(2)
        return x

    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        monkeypatch.setattr(
            Batch, "masked_patches", lambda self: (mode.from_tensor(masked_M), mode.from_tensor(weight_M))
        )
        heads = config.dino_head, config.ibot_head if objective.heads == "separate" else None
        student, average, anchor = (Network(config.vit, *heads) for _ in range(3))
        method = Method(
            config.objective, student, average, ranks=Ranks(total, lambda x: x, lambda x: x),
            anchor=anchor.backbone if objective.weight("gram") else None, compute=torch.bfloat16,
        )  # fmt: skip
        crops = mode.from_tensor(seen.globals_GBCHW), mode.from_tensor(seen.locals_VBCHW)
        fake = Batch(*crops, seen.masks_NP, share=seen.share)
        terms = steps(method, config, fake, 3)
        with pytest.raises(DataDependentOutputException):  # it would be noticed
            terms[-1]["ibot"].item()
    assert len(read) == len(terms) == 3
