"""Features by timm of an exported backbone (pip install timm).

troodon export BACKBONE --to timm --out net.safetensors
python examples/timm_features.py net.safetensors IMAGE ...
"""

import json
import sys
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

file = Path(sys.argv[1])
report = json.loads((file.parent / "parity.json").read_text())[file.name]
model = eval(report["line"], {"timm": timm}).eval()  # timm.create_model(...), of these sizes
model.load_state_dict(load_file(file), strict=True)
p, images = report["preprocessing"], []
for path in sys.argv[2:]:
    with Image.open(path) as opened:
        image = opened.convert("RGB")
    scale = p["resize"] / min(image.size)  # of the shorter side; then the middle is cut out
    image = image.resize([max(p["resize"], round(side * scale)) for side in image.size], Image.Resampling.BICUBIC)
    left, top = ((side - p["crop"]) // 2 for side in image.size)
    pixels = np.asarray(image.crop((left, top, left + p["crop"], top + p["crop"]))) / 255
    images.append(((pixels - p["mean"]) / p["std"]).transpose(2, 0, 1))
with torch.no_grad():
    tokens = model.forward_features(torch.from_numpy(np.stack(images)).float())  # class token, registers, patches
for path, vector in zip(sys.argv[2:], tokens[:, 0], strict=True):
    print(path, tuple(vector.shape), [round(value, 4) for value in vector[:3].tolist()])
