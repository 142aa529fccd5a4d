"""Which values the images of a set use: what a range of values follows from."""

import numpy as np
import pyarrow as pa

from troodon.images.decode import BadImage, decode_values, read_header
from troodon.images.index import Index, saved_range
from troodon.pixels import Used, advice, used

LOOKED_AT = 64  # images, at most, before a set is used


def used_by(data: bytes) -> Used | None:
    """The values of an image of more than 8 bits, which is decoded for it. Raises BadImage."""
    return used(decode_values(data, None)) if read_header(data).is_deep else None


def look_at(index: Index) -> str:
    """One line on a set whose images lose much without a range, from a few of them; "" if there is no need."""
    if index.range is not None or not len(index):
        return ""
    rows, seen = np.unique(np.linspace(0, len(index) - 1, LOOKED_AT).round().astype(int)).tolist(), []
    for row in rows:
        try:
            seen.append(used_by(index.read(row)))
        except (BadImage, OSError):
            continue
    line = advice([one for one in seen if one is not None])
    return f"of {len(rows)} images looked at, {line}" if line and len(rows) < len(index) else line


def of_scan(table: pa.Table) -> dict:
    """The values of all images of more than 8 bits in a scanned table: their types, least and greatest, and advice."""
    dtypes, lows, highs = (table[name].drop_null().to_pylist() for name in ("dtype", "low", "high"))
    if not dtypes:
        return {}
    seen, range = [Used(*one) for one in zip(dtypes, lows, highs)], saved_range(table)
    counts = {name: dtypes.count(name) for name in sorted(set(dtypes))}
    return {"types": counts, "min": min(lows), "max": max(highs)} | (
        {"range": list(range)} if range else {"advice": advice(seen)}
    )
