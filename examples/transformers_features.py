"""Features by transformers of an exported backbone (pip install transformers).

troodon export BACKBONE --to huggingface --out net-hf
python examples/transformers_features.py net-hf IMAGE ...
"""

import sys

import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel

model = AutoModel.from_pretrained(sys.argv[1])
processor = AutoImageProcessor.from_pretrained(sys.argv[1])
images = []
for path in sys.argv[2:]:
    with Image.open(path) as file:
        images.append(file.convert("RGB"))
with torch.no_grad():
    tokens = model(**processor(images, return_tensors="pt")).last_hidden_state  # class token, registers, patches
for path, vector in zip(sys.argv[2:], tokens[:, 0], strict=True):
    print(path, tuple(vector.shape), [round(value, 4) for value in vector[:3].tolist()])
