"""The losses against their definitions, in plain loops."""

import math

import pytest
import torch

from troodon.learn import losses
from troodon.learn.losses import ALONE


def test_sinkhorn_is_the_textbook_iteration():
    torch.manual_seed(0)
    logits, t = torch.randn(12, 7).double(), 0.5
    q = torch.exp(logits / t).T
    q /= q.sum()
    for _ in range(3):
        q /= q.sum(1, keepdim=True) * 7
        q /= q.sum(0, keepdim=True) * 12
    torch.testing.assert_close(losses.sinkhorn(logits.float(), t, ALONE), (q * 12).T.float(), rtol=1e-5, atol=1e-7)


def test_sinkhorn_balances_prototypes():
    torch.manual_seed(0)
    logits = torch.randn(64, 8) + torch.tensor([3.0] + [0.0] * 7)  # everybody likes the first
    q = losses.sinkhorn(logits, 0.1, ALONE, rounds=50)
    torch.testing.assert_close(q.sum(1), torch.ones(64))
    torch.testing.assert_close(q.sum(0), torch.full((8,), 8.0), rtol=1e-2, atol=0.0)


@pytest.mark.parametrize("size", [4.0, 400.0])
def test_sinkhorn_cannot_overflow(size):
    q = losses.sinkhorn(size * torch.eye(6), 0.04, ALONE)
    torch.testing.assert_close(q, torch.eye(6))


def test_sinkhorn_over_ranks_with_different_numbers_of_rows_equals_one():
    """Two ranks as two threads, which meet at every reduction."""
    import threading

    torch.manual_seed(0)
    logits = torch.randn(10, 5)
    shares, meeting, results = {}, threading.Barrier(2), {}

    def reduced(rank, how):
        def reduce(x):
            shares[rank] = x
            meeting.wait()
            result = how(torch.stack([shares[0], shares[1]]))
            meeting.wait()
            return result

        return reduce

    def work(rank, rows):
        ranks = losses.Ranks(reduced(rank, lambda x: x.sum(0)), reduced(rank, lambda x: x.amax(0)), lambda x: x)
        results[rank] = losses.sinkhorn(rows, 0.1, ranks)

    threads = [threading.Thread(target=work, args=(r, rows)) for r, rows in enumerate((logits[:3], logits[3:]))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.testing.assert_close(torch.cat([results[0], results[1]]), losses.sinkhorn(logits, 0.1, ALONE))


def test_dino_is_the_mean_over_pairs_of_views():
    torch.manual_seed(0)
    student, teacher = torch.randn(3, 4, 6), torch.randn(2, 4, 6).softmax(-1)
    log_p = (student / 0.1).log_softmax(-1)
    pairs = [-(teacher[g] * log_p[v]).sum(-1).mean() for v in range(3) for g in range(2)]
    loss = losses.dino(losses.cross_entropies(student, teacher, 0.1), same_views=False)
    torch.testing.assert_close(loss, torch.stack(pairs).mean())
    own = [-(teacher[g] * log_p[v]).sum(-1).mean() for v in range(2) for g in range(2) if v != g]
    loss = losses.dino(losses.cross_entropies(student[:2], teacher, 0.1), same_views=True)
    torch.testing.assert_close(loss, torch.stack(own).mean())


def test_ibot_weighs_crops_and_not_patches():
    student, teacher = torch.randn(5, 4), torch.randn(5, 4).softmax(-1)
    weight = torch.tensor([1.0, 0.25, 0.25, 0.25, 0.25])  # a crop of one masked patch, and one of four
    each = losses.cross_entropies(student[None], teacher[None], 0.1)[0, 0]
    torch.testing.assert_close(each, -(teacher * (student / 0.1).log_softmax(-1)).sum(-1))
    expected = (each[0] + each[1:].mean()) / 6
    torch.testing.assert_close(losses.ibot(each, weight, 6), expected)


def test_koleo_is_minus_the_log_distance_to_the_nearest():
    angles = torch.tensor([0.0, 0.1, 2.0])
    x = torch.stack([angles.cos(), angles.sin()], 1) * torch.tensor([[1.0], [5.0], [0.3]])  # lengths do not matter
    near, far = 2 * math.sin(0.05), 2 * math.sin(0.95)
    assert losses.koleo(x).item() == pytest.approx(-(2 * math.log(near) + math.log(far)) / 3, abs=1e-5)


def test_koleo_of_duplicates_is_finite_and_has_finite_gradients():
    x = torch.ones(4, 8, requires_grad=True)
    loss = losses.koleo(x)
    loss.backward()
    assert math.isfinite(loss.item())
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("views", [2, 3])
def test_contrast_is_finding_each_other_view_among_those_of_other_images(views):
    torch.manual_seed(0)
    x = torch.randn(views, 5, 4)
    each = []
    for view in range(views):
        for image in range(5):
            for positive in set(range(views)) - {view}:
                choices = [(positive, image)] + [(v, i) for v in range(views) for i in range(5) if i != image]
                cosine = [torch.cosine_similarity(x[view, image], x[v, i], dim=0) for v, i in choices]
                each.append(-(torch.stack(cosine) / 0.1).softmax(0)[0].log())
    torch.testing.assert_close(losses.contrast(x, 0.1), torch.stack(each).mean())


@pytest.mark.parametrize("views", [2, 4])
def test_contrast_of_equal_views_is_that_of_chance_with_finite_gradients(views):
    x = torch.ones(views, 6, 8, requires_grad=True)
    loss = losses.contrast(x, 0.05)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(views * 5 + 1))
    assert x.grad.isfinite().all()
