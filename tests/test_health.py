"""A collapsed run is told from a healthy one, in words; readings are of the whole batch on any number of ranks."""

import math
from dataclasses import replace

import pytest
import torch

from tests.ranks import on_ranks
from troodon import dist
from troodon.images.sources import open_source
from troodon.learn import health
from troodon.learn.config import GuardConfig, ObjectiveConfig
from troodon.learn.losses import ALONE, Ranks
from troodon.learn.pretrain import pretrain
from troodon.learn.schedules import Schedule
from troodon.recipes import own
from troodon.run import MetricsFile
from troodon.world.scene import WorldConfig
from troodon.world.write import write_world


@pytest.fixture(scope="session")
def pool(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    sizes = WorldConfig(clean=240, copies=0, off_topic=0, broken=0, curated=1, train=1, val=1)
    write_world(folder / "world", 0, sizes)
    return open_source(folder / "world" / "uncurated")


def constant(value):
    return Schedule(peak=value, end=value, shape="constant")


def run(pool, out, **changes):
    config = replace(own.demo_dino(100), health_every=5, log_every=5, probe_every=0, checkpoint_every=100, batch=32)
    config = replace(config, threads=1, **changes)
    pretrain(config, pool, out)
    alarms: dict[str, str] = {}
    for record in MetricsFile(out / "metrics.jsonl").read():
        if record.get("event") == "health":
            alarms.setdefault(record["alarm"], record["message"])  # the first: a later one may say that it is over
    return alarms


SCHEDULES = own.demo_dino(100).schedules
CENTRING = ObjectiveConfig(targets="centring", terms=(("dino", 1.0), ("ibot", 0.3), ("koleo", 0.03)))


@pytest.mark.slow
def test_a_healthy_run_raises_no_alarm(pool, tmp_path):
    # With seed 0 torch 2.11, whose random weights are others, learns so slowly that its targets stay flat.
    assert run(pool, tmp_path / "run", seed=2) == {}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "alarm", "advice"),
    [
        ({"schedules": replace(SCHEDULES, teacher_temperature=constant(0.5))}, "flat", "schedules.teacher_temperature"),
        ({"schedules": replace(SCHEDULES, lr=replace(SCHEDULES.lr, peak=0.1)), "guard": GuardConfig("stop")}, "flat",
         "schedules.lr.peak"),
        ({"objective": replace(CENTRING, centre_momentum=1.0),
          "schedules": replace(SCHEDULES, teacher_temperature=constant(0.04))}, "few prototypes", "sinkhorn"),
        ({"objective": CENTRING, "schedules": replace(SCHEDULES, teacher_temperature=constant(0.04),
                                                      ema_momentum=constant(0.0))}, "few prototypes",
         "schedules.ema_momentum"),
    ],
    ids=["temperature too high", "rate x 100", "no centring", "momentum 0"],
)  # fmt: skip
def test_a_collapsed_run_is_recognised(pool, tmp_path, changes, alarm, advice):
    alarms = run(pool, tmp_path / "run", **changes)
    assert alarm in alarms
    assert advice in alarms[alarm]


def test_features_that_got_worse_are_told():
    config = own.demo_dino()
    records = [{"step": -1, "knn": 0.5}, {"step": 99, "knn": 0.52}, {"step": 199, "knn": 0.3}]
    assert "k-NN 30.0%, and 52.0% at step 100" in health.verdict(records, config)["worse"]
    assert health.verdict(records[:2], config) == {}
    assert "before the first step" in health.verdict([records[0], records[2]], config)["worse"]


def test_readings_of_known_features():
    one = health.feature_readings(torch.ones(6, 4) + 1e-4 * torch.randn(6, 4))
    assert one["feature_cosine"] > 0.999
    assert one["nearest_distance"] < 1e-2
    apart = health.feature_readings(torch.eye(5))
    assert apart["feature_cosine"] == pytest.approx(0.0, abs=1e-6)
    assert apart["effective_rank"] == pytest.approx(4.0, rel=1e-3)  # five corners, centred
    assert apart["nearest_distance"] == pytest.approx(math.sqrt(2))


def test_readings_of_known_targets():
    class Alone:
        ranks = ALONE

    uniform = health.target_readings(torch.full((6, 8), 1 / 8), Alone())
    assert uniform["target_entropy"] == pytest.approx(1.0)
    assert uniform["prototypes_used"] == pytest.approx(1 / 6)
    sharp = health.target_readings(torch.eye(8)[:4], Alone())
    assert sharp["target_entropy"] == 0.0
    assert sharp["mean_target_entropy"] == pytest.approx(math.log(4) / math.log(8))
    assert sharp["prototypes_used"] == 1.0


def test_readings_over_ranks_are_those_of_the_whole_batch():
    torch.manual_seed(0)
    targets, features = torch.randn(8, 5).softmax(1), torch.randn(8, 6)
    for said in on_ranks(2, _read, targets, features):
        for name, value in (_read(targets, features, whole=True)).items():
            torch.testing.assert_close(said[name], value)


def _read(targets, features, whole=False):
    class Method:
        ranks = ALONE if whole else Ranks(dist.sum_over_ranks, dist.max_over_ranks, dist.all_gather)

    if not whole:
        targets, features = (x.chunk(2)[dist.rank()] for x in (targets, features))
    return health.target_readings(targets, Method()) | health.feature_readings(Method.ranks.gather(features))
