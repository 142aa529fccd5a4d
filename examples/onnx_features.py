"""Features by onnxruntime, without torch or Troodon (pip install onnxruntime pillow).

troodon export BACKBONE --to onnx --out net.onnx
python examples/onnx_features.py net.onnx IMAGE ...
"""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image

session = onnxruntime.InferenceSession(sys.argv[1])
p = json.loads(session.get_modelmeta().custom_metadata_map["preprocessing"])
images = []
for path in sys.argv[2:]:
    with Image.open(path) as file:
        image = file.convert("RGB")
    scale = p["resize"] / min(image.size)  # of the shorter side; then the middle is cut out
    image = image.resize([max(p["resize"], round(side * scale)) for side in image.size], Image.Resampling.BICUBIC)
    left, top = ((side - p["crop"]) // 2 for side in image.size)
    pixels = np.asarray(image.crop((left, top, left + p["crop"], top + p["crop"]))) / 255
    images.append(((pixels - p["mean"]) / p["std"]).transpose(2, 0, 1))
cls, patches = session.run(["cls", "patches"], {"images": np.stack(images).astype(np.float32)})
for path, vector, grid in zip(sys.argv[2:], cls, patches, strict=True):
    print(path, vector.shape, grid.shape, vector[:3].round(4))
