"""Fine-tune a backbone with a linear layer on labelled images, in plain PyTorch.

python examples/finetune.py BACKBONE LABELLED OUT

LABELLED has a folder of images for each class. OUT becomes a backbone folder, which `troodon.load` takes.
"""

import copy
import dataclasses
import sys
from pathlib import Path

import torch
from torch.utils.data import DataLoader

import troodon

backbone = troodon.load(sys.argv[1])
folders = sorted(folder for folder in Path(sys.argv[2]).iterdir() if folder.is_dir())
labelled = [(path, label) for label, folder in enumerate(folders) for path in sorted(folder.iterdir())]
data = [(backbone.prepare(path)[0], label) for path, label in labelled]  # in memory; see Dataset for more images
vit = copy.deepcopy(backbone.vit).requires_grad_(True).train()  # the backbone itself stays as it is
head = torch.nn.Linear(backbone.config.dim, len(folders))
optimizer = torch.optim.AdamW([{"params": vit.parameters(), "lr": 1e-5}, {"params": head.parameters(), "lr": 1e-3}])
for epoch in range(10):
    losses = []
    for images, labels in DataLoader(data, batch_size=16, shuffle=True):
        loss = torch.nn.functional.cross_entropy(head(vit(images)), labels)  # vit gives class tokens
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    print(f"epoch {epoch}: loss {sum(losses) / len(losses):.4f}")
dataclasses.replace(backbone, vit=vit.eval()).save(sys.argv[3])
