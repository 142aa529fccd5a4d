"""How the product of features and prototypes is cut into chunks. No torch here."""

CACHED = 1 << 26  # logits of one head output up to which they are kept, and not computed again


def chunk_size(device: str) -> int:
    """Prototypes of a chunk: few enough for the caches of a CPU, enough to keep an accelerator busy."""
    return 1024 if device == "cpu" else 8192
