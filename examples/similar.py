"""Print the images of a folder that look most like one image.

python examples/similar.py BACKBONE FOLDER IMAGE

For many images, `troodon embed --query` does the same from vectors that are computed once.
"""

import sys
from pathlib import Path

from torch.nn.functional import normalize

import troodon

backbone = troodon.load(sys.argv[1])
images = sorted(path for path in Path(sys.argv[2]).rglob("*") if path.is_file())
features = backbone.features(images, on_error="skip")
query = backbone.features(sys.argv[3])
scores = (normalize(features.cls) @ normalize(query.cls).T)[:, 0]  # cosine similarity
for i in scores.argsort(descending=True)[:5].tolist():
    print(f"{scores[i]:.3f}  {images[features.rows[i]]}")
