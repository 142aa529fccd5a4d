"""How logits, products of M rows and K prototypes, are cut into chunks. No torch here."""

CACHED = 1 << 26  # logits of one head output up to which they are kept, and not computed again

# An accelerator takes half a gigabyte of fp32 at a time, so that products, which read all prototypes or rows for it,
# keep it busy. A processor takes what is small beside the prototypes, or fits into its caches.
ON_ACCELERATOR = 1 << 27  # logits
ON_PROCESSOR = 1 << 20  # logits with all rows
PROTOTYPES_ON_PROCESSOR = 1024
ROWS_ON_PROCESSOR = 128  # with all prototypes


def rows_at_a_time(prototypes: int, device: str) -> int:
    """Rows of a chunk that has all prototypes."""
    return ROWS_ON_PROCESSOR if device == "cpu" else max(1, ON_ACCELERATOR // prototypes)


def prototypes_at_a_time(rows: float, device: str) -> int:
    """Prototypes of a chunk that has all rows."""
    most, logits = (PROTOTYPES_ON_PROCESSOR, ON_PROCESSOR) if device == "cpu" else (ON_ACCELERATOR, ON_ACCELERATOR)
    return max(1, min(most, logits // max(1, int(rows))))
