"""SimCLR with a ResNet-18 and DINO with a ViT-Ti, written the usual way, as rivals of small_data.py.

Not a benchmark itself. Plain PyTorch, one image after another through Pillow, the settings of the papers
(https://arxiv.org/abs/2002.05709; https://arxiv.org/abs/2104.14294) at 64 pixels, for the same seconds. The schedules
end with the time: their place is the share of it that is used.
"""

import math
import random
import time
from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy import ndarray
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from torch import Tensor, nn

# Shape suffixes: B images, V views, C channels, H and W pixels, D channels of a feature, K prototypes, L tokens.

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PX, LOCAL_PX = 64, 32


def to_tensor(image: Image.Image) -> Tensor:
    x_CHW = torch.from_numpy(np.asarray(image, dtype=np.float32)).permute(2, 0, 1) / 255
    return (x_CHW - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def random_crop(image: Image.Image, px: int, scale: tuple[float, float]) -> Image.Image:
    """A random resized crop, as usual: ten tries, else the whole image."""
    width, height = image.size
    for _ in range(10):
        area = width * height * random.uniform(*scale)
        ratio = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = random.randint(0, width - w), random.randint(0, height - h)
            box = (left, top, left + w, top + h)
            return image.resize((px, px), Image.Resampling.BICUBIC, box=box)
    return image.resize((px, px), Image.Resampling.BICUBIC)


def jitter(image: Image.Image, b: float, c: float, s: float, h: float) -> Image.Image:
    """Brightness, contrast, saturation and hue, in a random order."""

    def shift_hue(x: Image.Image) -> Image.Image:
        hue, saturation, value = x.convert("HSV").split()
        amount = round(random.uniform(-h, h) * 255)
        hue = hue.point([(level + amount) % 256 for level in range(256)])
        return Image.merge("HSV", (hue, saturation, value)).convert("RGB")

    changes = [
        lambda x: ImageEnhance.Brightness(x).enhance(random.uniform(1 - b, 1 + b)),
        lambda x: ImageEnhance.Contrast(x).enhance(random.uniform(1 - c, 1 + c)),
        lambda x: ImageEnhance.Color(x).enhance(random.uniform(1 - s, 1 + s)),
        shift_hue,
    ]
    for change in random.sample(changes, len(changes)):
        image = change(image)
    return image


def view(
    image: Image.Image, px: int, scale: tuple[float, float], strength: tuple[float, float, float, float], blur: float,
    solarise: float,
) -> Tensor:  # fmt: skip
    """A crop with changed colours, (C, px, px)."""
    image = random_crop(image, px, scale)
    if random.random() < 0.5:
        image = ImageOps.mirror(image)
    if random.random() < 0.8:
        image = jitter(image, *strength)
    if random.random() < 0.2:
        image = image.convert("L").convert("RGB")
    if random.random() < blur:
        image = image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 1.0)))
    if random.random() < solarise:
        image = ImageOps.solarize(image, 128)
    return to_tensor(image)


class ResidualBlock(nn.Module):
    def __init__(self, before: int, channels: int, stride: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(before, channels, 3, stride, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU(),
            nn.Conv2d(channels, channels, 3, 1, 1, bias=False), nn.BatchNorm2d(channels),
        )  # fmt: skip
        self.skip = nn.Sequential()
        if stride != 1 or before != channels:
            self.skip = nn.Sequential(nn.Conv2d(before, channels, 1, stride, bias=False), nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.layers(x) + self.skip(x))


def resnet18() -> nn.Sequential:
    """With the stem that quarters the sides: without it all that follows has 16 times as many places."""
    layers: list[nn.Module] = [
        nn.Conv2d(3, 64, 7, 2, 3, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, 1),
    ]
    before = 64
    for channels, stride in ((64, 1), (64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), (512, 1)):
        layers.append(ResidualBlock(before, channels, stride))
        before = channels
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


class ViTTiny(nn.Module):
    """A ViT-Ti: 192 channels, 12 blocks, 3 heads; patches of 8 pixels. Returns all tokens, (B, L, D)."""

    def __init__(self, dim: int = 192, depth: int = 12, heads: int = 3, patch: int = 8):
        super().__init__()
        self.patches = nn.Conv2d(3, dim, patch, patch)
        self.cls = nn.Parameter(torch.randn(1, 1, dim) * 0.02)
        self.positions = nn.Parameter(torch.randn(1, dim, PX // patch, PX // patch) * 0.02)
        layer = nn.TransformerEncoderLayer(dim, heads, 4 * dim, 0.0, "gelu", batch_first=True, norm_first=True)
        self.blocks, self.norm = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False), nn.LayerNorm(dim)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x_BDHW = self.patches(x_BCHW)
        positions = F.interpolate(self.positions, x_BDHW.shape[2:], mode="bicubic")
        x_BLD = (x_BDHW + positions).flatten(2).transpose(1, 2)
        return self.norm(self.blocks(torch.cat([self.cls.expand(len(x_BLD), -1, -1), x_BLD], 1)))


class SimCLR(nn.Module):
    """NT-Xent at 0.5 of two views, through a projector of two layers."""

    batch, rate, decay = 128, 1e-3, 1e-6

    def __init__(self) -> None:
        super().__init__()
        self.backbone = resnet18()
        self.head = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 128))

    def views(self, image: Image.Image) -> list[Tensor]:
        return [view(image, PX, (0.08, 1.0), (0.8, 0.8, 0.8, 0.2), 0.5, 0.0) for _ in range(2)]

    def loss(self, views_VBCHW: list[Tensor], _: float) -> Tensor:
        z = F.normalize(self.head(self.backbone(torch.cat(views_VBCHW))), dim=1)
        cosine, half = z @ z.T / 0.5, len(z) // 2
        cosine = cosine.masked_fill(torch.eye(len(z), dtype=torch.bool, device=z.device), -torch.inf)
        return F.cross_entropy(cosine, torch.arange(len(z), device=z.device).roll(half))

    def after(self, _: float) -> None:
        """Nothing follows a step."""

    def features(self, x_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        found = self.backbone(x_BCHW)
        return found, found


class DINO(nn.Module):
    """Cross-entropy of local and global views with a centred EMA teacher at 0.04."""

    batch, rate, decay = 64, 5e-4 * 64 / 256, 0.04

    def __init__(self, prototypes: int = 4096) -> None:
        super().__init__()
        head = nn.Sequential(
            nn.Linear(192, 1024), nn.GELU(), nn.Linear(1024, 1024), nn.GELU(), nn.Linear(1024, 256),
        )  # fmt: skip
        self.backbone, self.head = ViTTiny(), head
        self.last = nn.utils.parametrizations.weight_norm(nn.Linear(256, prototypes, bias=False))
        self.teacher = deepcopy(nn.ModuleList([self.backbone, self.head, self.last])).requires_grad_(False)
        self.register_buffer("centre_K", torch.zeros(prototypes))

    def views(self, image: Image.Image) -> list[Tensor]:
        strength = (0.4, 0.4, 0.2, 0.1)
        wide = [view(image, PX, (0.4, 1.0), strength, blur, sol) for blur, sol in ((1.0, 0.0), (0.1, 0.2))]
        return wide + [view(image, LOCAL_PX, (0.05, 0.4), strength, 0.5, 0.0) for _ in range(2)]

    @staticmethod
    def logits(parts: Any, x_BCHW: Tensor) -> Tensor:
        backbone, head, last = parts
        return last(F.normalize(head(backbone(x_BCHW)[:, 0]), dim=1))

    def loss(self, views_VBCHW: list[Tensor], _: float) -> Tensor:
        with torch.no_grad():
            taught = self.logits(self.teacher, torch.cat(views_VBCHW[:2]))
            targets = ((taught - self.centre_K) / 0.04).softmax(1).chunk(2)
            self.centre_K = 0.9 * self.centre_K + 0.1 * taught.mean(0)
        parts = (self.backbone, self.head, self.last)
        wide, narrow = (self.logits(parts, torch.cat(views_VBCHW[a:b])) for a, b in ((0, 2), (2, 4)))
        predicted = [x.div(0.1).log_softmax(1) for x in (*wide.chunk(2), *narrow.chunk(2))]
        pairs = [(t, s) for t in range(2) for s in range(4) if s != t]
        return torch.stack([-(targets[t] * predicted[s]).sum(1).mean() for t, s in pairs]).mean()

    def after(self, share: float) -> None:
        momentum = 1 - (1 - 0.996) * (math.cos(math.pi * share) + 1) / 2
        own = nn.ModuleList([self.backbone, self.head, self.last])
        with torch.no_grad():
            for average, new in zip(self.teacher.parameters(), own.parameters(), strict=True):
                average.lerp_(new, 1 - momentum)

    def features(self, x_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.teacher[0](x_BCHW)
        parts = [F.normalize(x, dim=1) for x in (tokens[:, 0], tokens[:, 1:].mean(1))]
        return tokens[:, 0], torch.cat(parts, 1)


def features(model: Any, pictures: list[Image.Image], device: torch.device) -> tuple[ndarray, ndarray]:
    """Features of whole pictures at 64 pixels."""
    model.eval()
    parts = []
    with torch.inference_mode():
        for i in range(0, len(pictures), 256):
            x = torch.stack([to_tensor(p.resize((PX, PX), Image.Resampling.BICUBIC)) for p in pictures[i : i + 256]])
            parts.append([part.cpu().numpy() for part in model.features(x.to(device))])
    model.train()
    cls, both = (np.concatenate(column) for column in zip(*parts))
    return cls, both


def train_usual(
    arm: str, images: Any, seed: int, seconds: float, quarters: int
) -> Iterator[tuple[float, int, ndarray, ndarray]]:
    """Train for so many CPU seconds of this process; at each quarter its share, the images seen, and the features."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    random.seed(seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tell = time.monotonic if device.type == "cuda" else time.process_time
    train, index, _, _ = images.open()
    model: Any = {"simclr": SimCLR, "dino": DINO}[arm]().to(device)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=model.rate, weight_decay=model.decay)
    start, used, seen, step, quarter = tell(), 0.0, 0, 0, 1
    pictures = [Image.fromarray(train.decode(row, 3, None)) for row in range(len(train))]
    everything = [Image.fromarray(index.decode(row, 3, None)) for row in range(len(index))]
    order: list[int] = []
    while used < seconds:
        order = order or random.sample(range(len(pictures)), len(pictures))
        rows, order = order[: model.batch], order[model.batch :]
        if len(rows) == model.batch:
            views = [torch.stack(part).to(device) for part in zip(*(model.views(pictures[row]) for row in rows))]
            share = used / seconds
            optimizer.param_groups[0]["lr"] = model.rate * min(share / 0.1, 0.5 * (1 + math.cos(math.pi * share)))
            loss = model.loss(views, share)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 3.0)
            optimizer.step()
            model.after(share)
            seen, step = seen + len(rows), step + 1
        used = tell() - start
        while quarter <= quarters and used >= seconds * quarter / quarters:
            paused = tell()
            yield quarter / quarters, seen, *features(model, everything, device)
            start += tell() - paused
            quarter += 1
