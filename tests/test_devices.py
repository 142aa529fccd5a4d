"""Where torch computes: one rule for every verb, errors that name what there is, results that do not depend on it."""

import contextlib
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import troodon
from troodon import UsageError, devices, dist
from troodon.curate.encoder import CopyEncoder, PixelBackbone, Placed
from troodon.devices import accelerator, check_device, choose_device, memory_advice
from troodon.model import packing, preprocess
from troodon.model.backbone import Backbone
from troodon.model.config import Preprocessing, ViTConfig
from troodon.search import exact

CPU = torch.device("cpu")


@pytest.fixture
def cuda(monkeypatch):
    """A function that makes torch report so many CUDA devices of this capability; they cannot compute."""

    def pretend(count: int, capability: tuple[int, int] = (9, 0)) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)

    pretend(0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    return pretend


def backbone() -> Backbone:
    config = ViTConfig(patch=8, dim=64, depth=2, heads=1, layer_scale=1.0)
    return Backbone.random(config, Preprocessing(crop=32, resize=32), seed=0)


def test_auto_takes_the_best_device_and_workers_take_them_in_turn(cuda, monkeypatch):
    assert choose_device() == choose_device("cpu:0") == CPU
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert choose_device() == choose_device("mps") == torch.device("mps")
    assert choose_device("auto", devices.TRAINABLE) == CPU
    cuda(2)
    names = [str(choose_device(name)) for name in ("auto", "cuda", "cuda:1", "cpu")]
    assert names == ["cuda:0", "cuda:0", "cuda:1", "cpu"]
    for worker, expected in enumerate(("cuda:0", "cuda:1", "cuda:0")):
        monkeypatch.setenv("LOCAL_RANK", str(worker))
        assert str(choose_device("auto")) == str(choose_device("cuda")) == str(dist.device()) == expected
        assert str(choose_device("cuda:1")) == "cuda:1"
    assert [str(accelerator(name)) for name in (None, "cpu", "cpu:0", CPU, "auto")] == ["None"] * 4 + ["cuda:0"]


@pytest.mark.parametrize(
    ("count", "built", "device", "message"),
    [
        (1, True, "cuda:1", "cuda:1: this machine has 1 CUDA device, cuda:0"),
        (2, True, "cuda:7", "cuda:7: this machine has 2 CUDA devices, cuda:0 to cuda:1"),
        (0, False, "cuda", "cuda: torch was built without CUDA; there is cpu"),
        (0, True, "cuda:0", "cuda:0: torch finds no CUDA device; there is cpu"),
        (1, True, "mps", "mps: not on this machine; there is cuda:0 and cpu"),
        (0, True, "cpu:1", "cpu:1: not on this machine; there is cpu"),
    ],
)
def test_a_device_that_is_not_there_names_those_that_are(cuda, monkeypatch, count, built, device, message):
    cuda(count)
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: built)
    for choose in (choose_device, backbone().to):
        with pytest.raises(UsageError) as error:
            choose(device)
        assert str(error.value) == message


@pytest.mark.parametrize("wrong", ["gpu", "cuda:", "cuda:x", "auto:1", "cud"])
def test_a_device_without_a_meaning_is_a_mistake(wrong):
    with pytest.raises(UsageError, match="device"):
        check_device(wrong)
    for right in ("auto", "cuda", "cuda:12", "mps", "cpu"):
        check_device(right)


@pytest.mark.parametrize(
    "verb", ["embed", "curate", "leak", "calibrate", "dedup", "evaluate", "load", "show_pca", "show_matches"]
)
def test_every_verb_looks_at_the_device_before_anything_else(cuda, tmp_path, verb):
    """Neither the backbone nor the images exist: the device is what is refused, and nothing is written."""
    none, out = tmp_path / "none", tmp_path / "out"
    calls = {
        "embed": (none, none, out), "curate": ("curate_small", none, none, none, out), "leak": (none, none, none, out),
        "calibrate": (none, none), "dedup": (none, out), "evaluate": ("mine", none, none, out), "load": (none,),
        "show_pca": (none, none, out.with_suffix(".png")), "show_matches": (none, none, out.with_suffix(".png")),
    }  # fmt: skip
    cuda(1)
    for device, message in (("cuda:3", "this machine has 1 CUDA device, cuda:0"), ("gpu", "device 'gpu'|device gpu")):
        with pytest.raises(UsageError, match=message):
            getattr(troodon, verb)(*calls[verb], device=device)
    assert not out.exists()


def test_ray_gives_devices_itself(tmp_path):
    with pytest.raises(UsageError, match="device cuda:1: Ray gives each process a device of its own"):
        troodon.dedup(tmp_path, tmp_path / "out", backend="ray", device="cuda:1")


class Counting:
    """A network that says which devices it has moved to, and where its features were computed."""

    name, fingerprint, channels, read = "counting", "0", 3, None

    def __init__(self, device: str = "cpu", log: list | None = None):
        self.device, self.log = torch.device(device), [] if log is None else log

    def to(self, device: torch.device) -> "Counting":
        self.log.append(f"to {device}")
        return Counting(str(device), self.log)

    def prepare(self, images):
        return torch.zeros(len(images), 1)

    def features(self, prepared, blocks=1):
        self.log.append(f"computes on {self.device}")
        return SimpleNamespace(cls=prepared + 1)


def test_a_network_moves_once_and_computes_on_its_device(cuda, monkeypatch):
    cuda(2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    network = Counting()
    encoder = CopyEncoder(Placed(network, "auto"), pixels=False).without_reader()
    for _ in range(3):
        encoder([np.zeros((8, 8, 3), np.uint8)])
    assert network.log == ["to cuda:1"] + ["computes on cuda:1"] * 3


def test_a_network_travels_as_weights_of_a_cpu(cuda):
    cuda(1)
    placed = pickle.loads(pickle.dumps(Placed(Counting("cuda:0"), "auto")))
    assert placed.network.device == CPU
    assert placed.device == "auto"
    assert placed.here.device == torch.device("cuda:0")


def test_a_placed_backbone_is_the_backbone():
    net, images = backbone(), [np.full((40, 40, 3), 9 * i, np.uint8) for i in range(3)]
    placed = pickle.loads(pickle.dumps(Placed(net.optimized("bf16"), "cpu:0")))
    assert placed.compute == torch.bfloat16
    assert placed.fingerprint == net.fingerprint
    x = net.optimized("bf16").features(net.prepare(images)).cls
    assert torch.equal(placed.features(placed.prepare(images)).cls, x)
    assert Placed(PixelBackbone(3), "cpu").features(torch.ones(1, 8, 8, 3)).cls.shape == (1, 288)


def test_products_run_on_the_chosen_device(monkeypatch):
    x = np.random.default_rng(0).normal(size=(50, 16)).astype(np.float16)
    expected, seen = exact.top_k(x, x, 3), []
    propose = exact._propose_on_device
    monkeypatch.setattr(exact, "_propose_on_device", lambda device, *rest: seen.append(device) or propose(CPU, *rest))
    again = exact.top_k(x, x, 3, device=torch.device("cuda", 0))
    assert seen == [torch.device("cuda", 0)]
    for a, b in zip(expected, again, strict=True):
        np.testing.assert_array_equal(a, b)


def test_knn_of_features_is_computed_where_the_network_is(cuda, monkeypatch):
    from troodon.evaluate import knn

    cuda(1)
    seen, top_k = [], knn.top_k
    monkeypatch.setattr(knn, "top_k", lambda *a, device: seen.append(device) or top_k(*a))
    x, y = torch.randn(20, 4), torch.arange(20) % 3
    on_gpu = knn.knn(x, y, x, [3], 0.07, torch.device("cuda", 0))[3]
    assert torch.equal(on_gpu, knn.knn(x, y, x, [3], 0.07)[3])
    assert seen == [torch.device("cuda", 0), None]


def test_memory_that_is_full_names_the_option_that_needs_less(monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    net = backbone()
    monkeypatch.setattr(type(net.vit), "after_blocks", full)
    with pytest.raises(UsageError, match=r"cpu: its memory does not hold 6 images of 32 x 32 pixels .* \(--batch 3\)"):
        net.features(torch.zeros(6, 3, 32, 32))
    with pytest.raises(ZeroDivisionError), memory_advice("cpu", "x", "y"):
        raise ZeroDivisionError


def test_old_devices_get_no_bf16_and_no_kernel(cuda, monkeypatch):
    cuda(1, (7, 5))
    gpu = torch.device("cuda", 0)
    assert dist.compute_dtype("auto", gpu) == torch.float32
    assert dist.compute_dtype("bf16", gpu) == torch.bfloat16
    assert packing.layout_of.__wrapped__(((2, 5),), gpu).offsets is None
    cuda(1, (8, 0))
    assert dist.compute_dtype("auto", gpu) == torch.bfloat16


def test_heads_that_the_kernel_does_not_take_go_group_by_group(monkeypatch):
    layout = packing.Layout(((2, 5),), torch.tensor([0, 5, 10], dtype=torch.int32))
    taken = []
    monkeypatch.setattr(packing, "by_kernel", lambda *_: taken.append("kernel"))
    monkeypatch.setattr(packing, "by_group", lambda *_: taken.append("group"))
    for width, dtype in ((64, torch.bfloat16), (12, torch.bfloat16), (64, torch.float32)):
        packing.attend(*[torch.zeros(10, 1, width, dtype=dtype)] * 3, layout)
    assert taken == ["kernel", "group", "group"]


def test_a_failed_rank_does_not_wait_for_the_others(monkeypatch):
    ended = []
    monkeypatch.setattr(dist.dist, "destroy_process_group", lambda: ended.append(dist.world_size()))
    monkeypatch.setattr(dist.dist, "init_process_group", lambda *_, **__: None)
    for ranks, ends in ((2, []), (1, [1])):
        monkeypatch.setattr(dist, "world_size", lambda ranks=ranks: ranks)
        ended.clear()
        with pytest.raises(ZeroDivisionError), dist.process_group():
            1 / 0  # noqa: B018
        assert ended == ends
    with dist.process_group():
        pass
    assert ended == [1, 1]


def test_the_same_vectors_by_any_name_of_a_device(tmp_path):
    from PIL import Image

    (tmp_path / "images").mkdir()
    for i in range(4):
        pixels = np.random.default_rng(i).integers(0, 256, (40, 40, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{i}.png")
    folders = [
        troodon.embed(backbone(), tmp_path / "images", tmp_path / name, device=device, compute="fp32")
        for name, device in (("a", "cpu"), ("b", "cpu:0"), ("c", "auto"))
    ]
    first, *others = [np.load(folder / "embeddings.npy") for folder in folders]
    for other in others:
        np.testing.assert_array_equal(first, other)
    made = [
        troodon.dedup(tmp_path / "images", tmp_path / f"d{device}", device=device, workers=workers)
        for device, workers in (("cpu", 0), ("auto", 1))
    ]
    assert len({(folder / "selection.csv").read_bytes() for folder in made}) == 1


def test_batches_go_to_a_gpu_from_pinned_memory_beside_the_network(monkeypatch):
    """The copy starts on a stream of its own and has ended before the network may read; its memory stays so long."""
    done, empty, to = [], torch.empty, torch.Tensor.to

    def pinned(*shape, pin_memory=False, **options):
        done.append(f"pinned {pin_memory}")
        return empty(*shape, **options)

    def moved(self, device, **options):
        done.append(f"to {device.type} {options}")
        return to(self, torch.float32)

    gpu = SimpleNamespace(type="cuda")
    stream = SimpleNamespace(synchronize=lambda: done.append("copied"))
    monkeypatch.setattr(torch, "empty", pinned)
    monkeypatch.setattr(torch.Tensor, "to", moved)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, other: done.append(f"kept for {other}"))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: stream)
    monkeypatch.setattr(
        torch.cuda, "stream", lambda other: contextlib.nullcontext(done.append(f"on {other is stream}"))
    )
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: "the network's")
    parts = [torch.arange(6.0).reshape(2, 3), torch.ones(1, 3)]
    assert torch.equal(preprocess.joined(parts, gpu), torch.cat(parts))
    assert done == ["pinned True", "on True", "to cuda {'non_blocking': True}", "copied", "kept for the network's"]
    assert torch.equal(preprocess.stacked([*parts[0]], gpu), parts[0])
    assert done[-1] == "pinned True"
    assert torch.equal(preprocess.joined(parts, CPU), torch.cat(parts))
