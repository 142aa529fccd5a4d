"""Classify images by a few labelled ones a class, such as five: the nearest mean of a class, nothing is trained.

python examples/classify.py BACKBONE LABELLED IMAGES

LABELLED has a folder of images for each class; IMAGES has the images to classify.
"""

import sys
from pathlib import Path

import torch
from torch.nn.functional import normalize

import troodon

backbone = troodon.load(sys.argv[1])
classes = sorted(folder for folder in Path(sys.argv[2]).iterdir() if folder.is_dir())
means = [normalize(backbone.features(sorted(folder.iterdir()), on_error="skip").cls).mean(0) for folder in classes]

images = sorted(Path(sys.argv[3]).iterdir())
features = backbone.features(images, on_error="skip")
scores = normalize(features.cls) @ normalize(torch.stack(means)).T  # cosine similarity of each image to each class
for row, score in zip(features.rows, scores, strict=True):
    print(f"{images[row].name}  {classes[score.argmax()].name}  {score.max():.3f}")
