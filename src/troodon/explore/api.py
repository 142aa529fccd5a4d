"""What the page asks for: points, colours, thumbnails, neighbours, pairs; and what it may write: decisions.

Answers are JSON, or long arrays in little-endian binary form. Images are known by id, which is the row of the image.
"""

import email.parser
import email.policy
import json
import math
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy import ndarray

from troodon.explore.collection import Collection
from troodon.explore.colours import Colour, colour, colour_names
from troodon.explore.layout import Layout
from troodon.explore.made import Made
from troodon.explore.nearest import Nearest
from troodon.explore.pairs import Pairs, copies, leaks, similar
from troodon.explore.pictures import SIDES, Pictures
from troodon.explore.server import Answer, Refused, Request, Routes
from troodon.images.decode import BadImage

BACKGROUND = "explore"  # name of threads that end with the process
MAX_NEIGHBOURS = 1000
MAX_DESCRIBED = 1000  # images at once
MAX_FOUND = 20_000  # images whose names hold a text
MISSING = (
    b'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 64 64"><rect width="64" height="64" fill="#8c9298" '
    b'fill-opacity=".25"/><path d="M20 20 44 44M44 20 20 44" stroke="#8c9298" stroke-width="3"/></svg>'
)
TEXTS = ("path", "label", "split", "status", "stage", "reason", "pool", "marks")
NUMBERS = ("width", "height", "length", "score", "weight")


def in_background(work: Callable[[], Any]) -> Future:
    """The result of some work that begins at once, in a thread that ends with the process."""
    future: Future = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name=BACKGROUND, daemon=True).start()
    return future


class Api:
    """The routes of one collection. The layout may still be on its way; what needs it waits."""

    def __init__(self, collection: Collection, layout: Callable[[], Layout]):
        self.collection, self.made = collection, Made(collection)
        self.pictures = Pictures(collection.index)
        self.nearest: Future[Nearest] = in_background(lambda: Nearest(collection.x_ND, collection.has_vector_N))
        self.layout: Future[Layout] = in_background(layout)
        self.encoding = threading.Lock()  # one image at a time goes through the network
        self.computed: dict[str, Any] = {}
        self.computing = threading.Lock()

    def routes(self) -> Routes:
        return {
            ("GET", "/api/collection"): self.describe_collection,
            ("GET", "/api/points"): self.points,
            ("GET", "/api/colour"): self.colours,
            ("GET", "/api/image"): lambda request: Answer.of(self.describe([self._id(request)])[0]),
            ("POST", "/api/images"): self.images,
            ("GET", "/api/thumbnail"): self.thumbnail,
            ("GET", "/api/neighbours"): self.neighbours,
            ("POST", "/api/search"): self.search,
            ("GET", "/api/find"): self.find,
            ("GET", "/api/pairs"): self.pairs,
            ("GET", "/api/decisions"): lambda _: Answer.of(self.made.all()),
            ("POST", "/api/decide"): self.decide,
        }

    def _id(self, request: Request, name: str = "id") -> int:
        return request.number(name, 0, len(self.collection) - 1)

    def _once(self, name: str, work: Callable[[], Any]) -> Any:
        """What some work gives, which is done once."""
        with self.computing:
            if name not in self.computed:
                self.computed[name] = work()
            return self.computed[name]

    def describe_collection(self, _: Request) -> Answer:
        has = self.collection
        ledger = {"copies": copies, "leaks": leaks}
        kinds = ["similar", *(name for name, find in ledger.items() if len(self._once(name, lambda f=find: f(has))))]
        return Answer.of({
            "name": has.folder.name, "kind": has.kind, "images": len(has), "vectors": int(has.has_vector_N.sum()),
            "backbone": has.backbone, "takes_pictures": has.encode is not None, "colours": colour_names(has),
            "pairs": kinds, "decisions_file": str(has.decisions_file), "decided": len(self.made),
        })  # fmt: skip

    def points(self, _: Request) -> Answer:
        """x, y of each image, float32; nan without a vector."""
        return _binary(self.layout.result().place_N2.astype("<f4"))

    def colours(self, request: Request) -> Answer:
        """uint32 length of a JSON text, this text, padded to four bytes, and a uint16 or float32 for each image."""
        name = request.values.get("by", "")
        if name not in colour_names(self.collection):
            raise Refused(400, f"by: one of {', '.join(colour_names(self.collection))}")
        found: Colour = self._once(f"colour {name}", lambda: colour(self.collection, name))
        text = json.dumps({"kind": found.kind, "names": found.names, "counts": found.counts}).encode()
        text += b" " * (-len(text) % 4)
        return _binary(np.array([len(text)], "<u4").tobytes() + text + found.values_N.tobytes())

    def images(self, request: Request) -> Answer:
        return Answer.of(self.describe(self._ids(request.json.get("ids"), MAX_DESCRIBED)))

    def _ids(self, value: Any, limit: int) -> list[int]:
        if not isinstance(value, list) or len(value) > limit:
            raise Refused(400, f"ids: a list of {limit:,} numbers at most")
        count = len(self.collection)
        if any(type(row) is not int or not 0 <= row < count for row in value):
            raise Refused(400, f"ids: numbers from 0 to {count - 1:,}")
        return value

    def describe(self, rows: Sequence[int]) -> list[dict]:
        """All that is known about these images."""
        has = self.collection
        table = has.images.select([n for n in (*TEXTS, *NUMBERS, "kept", "cause") if n in has.images.column_names])
        scores = [name for name in has.images.column_names if name.startswith("score_")]
        table = pa.table({name: has.images[name] for name in (*table.column_names, *scores)})
        described = []
        for row, image in zip(rows, table.take(pa.array(rows, pa.int64())).to_pylist()):
            known = {name: value for name, value in image.items() if not _is_missing(value)}
            if known.get("cause", 0) < 0:
                del known["cause"]
            described.append({"id": row, **known, "decision": self.made.of(row)})
        return described

    def thumbnail(self, request: Request) -> Answer:
        """A JPEG. For an image that cannot be read 404, or with `missing=drawn` a drawing that says so."""
        row, size = self._id(request), request.values.get("size", "small")
        if size not in SIDES:
            raise Refused(400, f"size: one of {', '.join(SIDES)}")
        try:
            data = self.pictures.get(row, size, request.is_gone)
        except ConnectionError:
            raise
        except (BadImage, OSError) as error:
            if request.values.get("missing") == "drawn":
                return Answer(MISSING, "image/svg+xml")
            reason = error.reason if isinstance(error, BadImage) else "the file is gone, or cut short"
            raise Refused(404, reason) from None
        return Answer(data, "image/jpeg", {"Cache-Control": "private, max-age=3600"})

    def neighbours(self, request: Request) -> Answer:
        row, k = self._id(request), request.number("k", 1, MAX_NEIGHBOURS, 50)
        return _ranked(*self.nearest.result().of_row(row, k))

    def search(self, request: Request) -> Answer:
        k, encode = request.number("k", 1, MAX_NEIGHBOURS, 50), self.collection.encode
        if encode is None:
            raise Refused(409, "start the explorer with --backbone, to search by a picture from elsewhere")
        data = uploaded(request)
        try:
            with self.encoding:
                vector_D = encode(data)
        except BadImage as error:
            raise Refused(400, f"this picture cannot be read: {error.status}: {error.reason}") from None
        return _ranked(*self.nearest.result().of_vector(vector_D, k))

    def find(self, request: Request) -> Answer:
        """Images whose path, label or tags hold a text."""
        text = request.values.get("text", "")[:300]
        hit_N = np.zeros(len(self.collection), bool)
        for name in ("path", "label"):
            column = pc.match_substring(self.collection.images[name].cast(pa.string()), text, ignore_case=True)
            hit_N |= pc.fill_null(column, False).to_numpy(zero_copy_only=False)
        hit_N[self.made.tagged_like(text)] = True
        rows = np.flatnonzero(hit_N)
        return Answer.of({"count": len(rows), "ids": rows[:MAX_FOUND].tolist()})

    def pairs(self, request: Request) -> Answer:
        """uint32 number of pairs; uint32 ids of the first images, and of the second; float32 scores, highest first."""
        finders: dict[str, Callable[[], Pairs]] = {
            "similar": lambda: similar(self.layout.result()),
            "copies": lambda: copies(self.collection),
            "leaks": lambda: leaks(self.collection),
        }
        name = request.values.get("of", "")
        if name not in finders:
            raise Refused(400, f"of: one of {', '.join(finders)}")
        found: Pairs = self._once(name, finders[name])
        parts = (np.array([len(found)], "<u4"), found.row_P.astype("<u4"), found.other_P.astype("<u4"))
        return _binary(b"".join(part.tobytes() for part in (*parts, found.score_P.astype("<f4"))))

    def decide(self, request: Request) -> Answer:
        """Keep, leave out or tag images; `instead_of` is the image in whose place one is kept."""
        asked = request.json
        rows = self._ids(asked.get("ids"), len(self.collection))
        changes = {name: asked[name] for name in ("keep", "add_tag", "remove_tag", "instead_of") if name in asked}
        if not changes or (problem := self.made.problem(rows, changes)):
            raise Refused(400, problem if changes else "nothing to decide: keep, add_tag, remove_tag or instead_of")
        try:
            changed = self.made.change(rows, changes)
        except OSError as error:
            raise Refused(507, f"not saved: {self.collection.decisions_file}: {error.strerror}") from None
        return Answer.of({str(row): decision for row, decision in changed.items()})


def uploaded(request: Request) -> bytes:
    """The image in the body of a request: all of it, or the first file of a form."""
    if not request.content_type.lower().startswith("multipart/form-data"):
        return request.body
    head = f"Content-Type: {request.content_type}\r\n\r\n".encode("latin-1", "replace")
    try:
        form = email.parser.BytesParser(policy=email.policy.HTTP).parsebytes(head + request.body)
        files = [part for part in form.iter_parts() if part.get_filename() is not None]
        data = files[0].get_payload(decode=True) if files else None
    except Exception:  # hostile headers make the parser raise nearly anything
        data = None
    if not isinstance(data, bytes):
        raise Refused(400, "the form has no file")
    return data


def _binary(data: bytes | ndarray) -> Answer:
    return Answer(data if isinstance(data, bytes) else data.tobytes(), "application/octet-stream")


def _ranked(rows: ndarray, scores: ndarray) -> Answer:
    return Answer.of([{"id": int(row), "similarity": round(float(s), 6)} for row, s in zip(rows, scores)])


def _is_missing(value: Any) -> bool:
    return value is None or value == "" or (isinstance(value, float) and not math.isfinite(value))
