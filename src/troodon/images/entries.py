"""What a source holds, as it is listed: its images, its tables of labels, and the files that are not read."""

from dataclasses import dataclass, field

from troodon.images import files, volumes
from troodon.images.formats import RASTER_EXTENSIONS, LeftOut, extension
from troodon.images.labels import LabelTable


@dataclass
class Listing:
    """The images of one source, as columns, and its other files."""

    paths: list[str] = field(default_factory=list)
    containers: list[str] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    tables: dict[str, LabelTable] = field(default_factory=dict)  # by folder: see labels.assign_labels
    left_out: LeftOut = field(default_factory=LeftOut)

    def add(self, path: str, container: str, offset: int, length: int) -> None:
        self.paths.append(path)
        self.containers.append(container)
        self.offsets.append(offset)
        self.lengths.append(length)

    def add_file(self, path: str, location: str, size: int) -> None:
        """Add a file that is an image, or each image of a local file of several."""
        has_several = extension(path) not in RASTER_EXTENSIONS and not files.REMOTE.match(location)
        count = volumes.image_count(location) if has_several else None
        if count is None:
            return self.add(path, location, 0, size)
        if not count:
            self.left_out.add_reason("file", "are DICOM without pixels", path)
        for number in range(count):
            name = f"{path}{volumes.SEPARATOR}{number:0{len(str(count))}d}"
            self.add(name, f"{location}{volumes.MEMBER}", number, -1)
