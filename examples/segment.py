"""Segment images by a linear layer on frozen patch tokens.

python examples/segment.py BACKBONE IMAGES MASKS NEW OUT

MASKS has a grey PNG of the same name for each of IMAGES, whose values are classes from 0. NEW are images to segment;
their masks are written to OUT.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import cross_entropy, interpolate

import troodon

backbone = troodon.load(sys.argv[1])
images, masks, new, out = map(Path, sys.argv[2:])
paths = sorted(images.iterdir())
tokens, classes = [], []
for path, hwD in zip(paths, backbone.features(paths, keep_aspect=True).patches, strict=True):
    mask = Image.open(masks / f"{path.stem}.png").resize((hwD.shape[1], hwD.shape[0]), Image.Resampling.NEAREST)
    tokens.append(hwD.flatten(0, 1))
    classes.append(torch.from_numpy(np.array(mask)).long().flatten())
x, y = torch.cat(tokens), torch.cat(classes)
head = torch.nn.Linear(x.shape[1], int(y.max()) + 1)
optimizer = torch.optim.AdamW(head.parameters(), 1e-2)
for _ in range(300):
    loss = cross_entropy(head(x), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
for path in sorted(new.iterdir()):
    logits = head(backbone.features(path, keep_aspect=True).patches[0]).permute(2, 0, 1)[None]
    with Image.open(path) as image:
        mask = interpolate(logits, image.size[::-1], mode="bilinear").argmax(1)[0]
    Image.fromarray(mask.byte().numpy()).save(out / f"{path.stem}.png")
