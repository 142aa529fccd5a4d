"""Which values the images of a set use: what a range of values follows from."""

import functools
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa

from troodon import run
from troodon.config import Range, UsageError, check_range, percentiles, range_text
from troodon.images.decode import MEDICAL, BadImage, decode_values, read_header
from troodon.images.index import Index, saved_range
from troodon.images.reading import map_ordered
from troodon.pixels import Used, advice, used

LOOKED_AT = 64  # images, at most, before a set is used
MEASURED = 1024  # images, at most, from which percentiles are found
MEASURED_VALUES = 1 << 22  # of all of them, in each channel; so a sample of each large image


def used_by(data: bytes) -> Used | None:
    """The values of an image of more than 8 bits, which is decoded for it. Raises BadImage."""
    if not read_header(data).is_deep:
        return None
    values = decode_values(data, None)
    seen = used(values.array)
    return seen if seen is None else seen._replace(has_window=values.window is not None)


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


def measured(index: Index, range: Range | None, threads: int = 0) -> Range | None:
    """The range as numbers: percentiles, such as ("1%", "99%"), are found from a sample of the images of the set.

    All channels of grey and colour images share a pair; where all images have another number of channels, such as the
    bands of a satellite, each channel has its own. Every image counts alike. UsageError if no image has more than 8
    bits, or nearly all values are the same.
    """
    if (shares := percentiles(range)) is None or range is None:
        return check_range(range)
    rows = np.unique(np.linspace(0, len(index) - 1, min(len(index), MEASURED)).round().astype(int)).tolist()
    with ThreadPoolExecutor(workers := index.thread_count(threads)) as pool:
        sample = functools.partial(_sample, index, MEASURED_VALUES // len(rows))
        found = [values_NC for values_NC in map_ordered(pool, sample, rows, 2 * workers) if values_NC is not None]
    text, images = range_text(range), f"{len(rows):,} of {len(index):,} images"
    if not found:
        raise UsageError(f"range {text}: none of {images} looked at has more than 8 bits; leave the range out")
    counts = {values_NC.shape[1] for values_NC in found}
    if len(counts) > 1 or counts & {1, 3}:
        found = [values_NC.reshape(-1, 1) for values_NC in found]
    pairs_2C = np.nanpercentile(np.concatenate(found), shares, axis=0)
    if not (pairs_2C[0] < pairs_2C[1]).all():
        raise UsageError(f"range {text}: both are {pairs_2C[0].max():g}; choose percentiles further apart, or numbers")
    numbers = tuple(float(f"{n:.6g}") for n in pairs_2C.T.ravel())
    run.say(f"range {text}: is {range_text(numbers)}, found from {images}")
    return check_range(numbers)


def _sample(index: Index, count: int, row: int) -> np.ndarray | None:
    """At most `count` values of each channel (N, C) of an image of more than 8 bits; NaN where they are not finite."""
    try:
        data = index.read(row)
        if not read_header(data).is_deep:
            return None
        values_HWC = decode_values(data, None, range=(0, 1)).array
    except (BadImage, OSError):
        return None
    values_NC = values_HWC.reshape(-1, values_HWC.shape[2])
    if len(values_NC) > count:
        values_NC = values_NC[np.random.default_rng(row).integers(0, len(values_NC), count)]
    values_NC = values_NC.astype(np.float32)
    values_NC[~np.isfinite(values_NC)] = np.nan
    return values_NC


def of_scan(table: pa.Table) -> dict:
    """The values of all images of more than 8 bits in a scanned table: their types, least and greatest, and advice."""
    table = table.filter(table["dtype"].is_valid())
    dtypes, lows, highs, formats = (table[name].to_pylist() for name in ("dtype", "low", "high", "format"))
    if not dtypes:
        return {}
    columns = zip(dtypes, lows, highs, formats)
    seen = [Used(dtype, low, high, format in MEDICAL) for dtype, low, high, format in columns]
    range = saved_range(table.schema)
    counts = {name: dtypes.count(name) for name in sorted(set(dtypes))}
    return {"types": counts, "min": min(lows), "max": max(highs)} | (
        {"range": list(range)} if range else {"advice": advice(seen)}
    )
