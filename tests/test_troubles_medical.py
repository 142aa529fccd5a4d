"""Medical images: DICOM and NIfTI are images like others, and keep the meaning of their values."""

import contextlib
import io
import tarfile
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

import troodon
from tests.test_pretrain import CONFIG as TINY
from tests.test_troubles_values import SIGHT, VIT, run, same, smooth
from troodon.config import UsageError
from troodon.images import containers, formats, volumes
from troodon.images.decode import BadImage, decode, decode_values, read_header
from troodon.images.sources import open_source
from troodon.model.backbone import Backbone

pydicom = pytest.importorskip("pydicom", reason="needs the extra `medical`")
nibabel = pytest.importorskip("nibabel", reason="needs the extra `medical`")


@pytest.fixture(autouse=True)
def warnings_as_for_users() -> None:
    """The module filters warnings once, at import; pytest then puts its own filters before these."""
    warnings.filterwarnings("ignore", module=r"pydicom\b")


CT, US_FRAMES = "1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.5.1.4.1.1.3.1"
LITTLE, RLE, LOSSLESS, JPEG_LS = (
    "1.2.840.10008.1.2.1",
    "1.2.840.10008.1.2.5",
    "1.2.840.10008.1.2.4.70",
    "1.2.840.10008.1.2.4.80",
)


def dicom_file(stored: np.ndarray | None, kind: str = CT, syntax: str = LITTLE, frames: int = 1, **elements) -> bytes:
    """A DICOM file of these stored values: (H, W), (H, W, 3) or (frames, H, W ...)."""
    dataset = pydicom.Dataset()
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = LITTLE
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID = kind
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID = "1.2.3"
    if stored is not None:
        shape = stored.shape[1:] if frames > 1 else stored.shape
        bits = 8 * stored.dtype.itemsize
        dataset.Rows, dataset.Columns = shape[:2]
        dataset.SamplesPerPixel = shape[2] if len(shape) == 3 else 1
        dataset.PhotometricInterpretation = "RGB" if len(shape) == 3 else "MONOCHROME2"
        if len(shape) == 3:
            dataset.PlanarConfiguration = 0
        if frames > 1:
            dataset.NumberOfFrames = frames
        dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = bits, bits, bits - 1
        dataset.PixelRepresentation = int(stored.dtype.kind == "i")
        dataset.PixelData = stored.tobytes()
    for name, value in elements.items():
        setattr(dataset, name, value)
    if syntax == RLE:
        dataset.compress(RLE)
    out = io.BytesIO()
    dataset.save_as(out, enforce_file_format=True)
    if syntax in (LOSSLESS, JPEG_LS):  # nothing here encodes them
        return out.getvalue().replace(LITTLE.encode().ljust(20, b"\0"), syntax.encode().ljust(20, b"\0"), 1)
    return out.getvalue()


def counts(top: int = 4095, seed: int = 0) -> np.ndarray:
    return (smooth(seed) * top).round().astype(np.uint16)


# ---- DICOM


@pytest.mark.parametrize("syntax", [LITTLE, RLE])
def test_a_ct_has_hounsfield_units_and_a_window(syntax):
    """A CT has a slope, an intercept and a window | A range is in Hounsfield units; without it, the window is shown."""
    said = {"RescaleSlope": 1, "RescaleIntercept": -1024, "WindowCenter": [40, 300], "WindowWidth": [400, 1500]}
    data, units = dicom_file(counts(), syntax=syntax, **said), counts().astype(int) - 1024
    assert np.array_equal(decode_values(data).array[:, :, 0], units)
    assert decode_values(data).window == (-160, 239)
    wanted = ((units.clip(-160, 239) + 160) / 399 * 255).round()  # 40 - 0.5 ± 399 / 2, as the standard has it
    assert np.abs(decode(data, 1)[:, :, 0] - wanted).max() <= 1
    assert np.array_equal(decode(data, 1, range=(-1024, 3071))[:, :, 0], (counts() / 4095 * 255).round())
    header = read_header(data)
    assert (header.format, header.height, header.width, header.channels, header.is_deep) == ("DICOM", 64, 64, 1, True)
    exact = dicom_file(counts(), **said | {"VOILUTFunction": "LINEAR_EXACT"})
    assert decode_values(exact).window == (-160, 240)
    zero = dicom_file(counts(), WindowCenter=0, WindowWidth=1)
    assert len(np.unique(decode(zero, 1))) <= 2


def test_a_dicom_without_a_window_is_shown_from_its_least_to_its_greatest_value():
    """A DICOM has no window, or 8 bits | It is shown from its least to its greatest value; 8 bits are unchanged."""
    got = decode(dicom_file(counts(1000) + 500), 1)
    assert (got.min(), got.max()) == (0, 255)
    small = counts(200).astype(np.uint8)
    assert np.array_equal(decode(dicom_file(small), 1)[:, :, 0], small)
    slope = dicom_file(counts(), RescaleSlope=0.5, RescaleIntercept=1)
    assert np.array_equal(decode_values(slope).array[:, :, 0], (counts() * 0.5 + 1).astype(np.float32))
    flat = np.full((4, 4), 7, np.uint16)
    assert decode(dicom_file(flat), 1).max() == 0


def test_monochrome1_is_inverted_with_its_window():
    """Small values of a radiograph are bright (MONOCHROME1) | They are inverted within their bits, with the window."""
    said = {
        "BitsStored": 12,
        "HighBit": 11,
        "WindowCenter": 3000,
        "WindowWidth": 1000,
        "VOILUTFunction": "LINEAR_EXACT",
    }
    plain = dicom_file(counts(), **said)
    inverted = dicom_file(counts(), **said, PhotometricInterpretation="MONOCHROME1")
    assert np.array_equal(decode_values(inverted).array, 4095 - decode_values(plain).array)
    assert np.abs(decode(inverted, 1).astype(int) - (255 - decode(plain, 1).astype(int))).max() <= 1
    units = dicom_file(counts(), **said, PhotometricInterpretation="MONOCHROME1", RescaleSlope=2, RescaleIntercept=-10)
    shown = decode_values(units)
    assert shown.window == (2 * 4095 - 20 - 3500, 2 * 4095 - 20 - 2500)


def test_colours_and_compressed_dicoms_are_read():
    """A DICOM has colours, or is compressed by JPEG | It becomes RGB; what is not decoded names the package."""
    rgb = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    assert np.array_equal(decode(dicom_file(rgb)), rgb)
    for name in ("SC_rgb_jpeg_dcmtk.dcm", "examples_jpeg2k.dcm", "examples_palette.dcm", "image_dfl.dcm"):
        data = Path(pydicom.data.get_testdata_file(name, download=False)).read_bytes()
        pixels, header = decode(data), read_header(data)
        assert pixels.shape == (header.height, header.width, 3)
        assert pixels.std() > 5
    for syntax, package in ((LOSSLESS, "pylibjpeg pylibjpeg-libjpeg"), (JPEG_LS, "pyjpegls")):
        with pytest.raises(BadImage, match=f"decode error: JPEG.*: pip install {package} decodes it"):
            decode(compressed(syntax))


def compressed(syntax: str) -> bytes:
    name = "SC_rgb_jpeg_gdcm.dcm" if syntax == LOSSLESS else "MR_small_jpeg_ls_lossless.dcm"
    return Path(pydicom.data.get_testdata_file(name, download=False)).read_bytes()


def test_broken_dicoms_are_broken_images(monkeypatch):
    """A DICOM is truncated, too large, or damaged anywhere | It is one broken image, with a reason in one line."""
    data = dicom_file(counts(), RescaleIntercept=-1024)
    random = np.random.default_rng(0)
    for cut in (133, 200, 400, len(data) - 100):
        with pytest.raises(BadImage):
            decode(data[:cut])
    for _ in range(60):
        broken = bytearray(data)
        for place in random.integers(0, 600, 4):
            broken[place] = random.integers(256)
        with contextlib.suppress(BadImage):
            decode(bytes(broken))
    monkeypatch.setenv("TROODON_MAX_MEGAPIXELS", "0.001")
    with pytest.raises(BadImage, match="TROODON_MAX_MEGAPIXELS"):
        decode(data)


def study(folder: Path) -> Path:
    """A folder as a clinic has it: a series without extensions, a report, the list of the disk, and frames."""
    series = folder / "ct"
    series.mkdir(parents=True)
    for i in range(3):
        (series / f"IM{i:04d}").write_bytes(dicom_file(counts(seed=i), RescaleIntercept=-1024, RescaleSlope=1))
    (series / "IM0003.dcm").write_bytes(dicom_file(counts(seed=3), RescaleIntercept=-1024, RescaleSlope=1))
    (folder / "report.dcm").write_bytes(dicom_file(None, "1.2.840.10008.5.1.4.1.1.88.11"))
    (folder / "DICOMDIR").write_bytes(dicom_file(None, "1.2.840.10008.1.3.10"))
    frames = np.stack([counts(1000, i) for i in range(12)])
    (folder / "us.dcm").write_bytes(dicom_file(frames, US_FRAMES, frames=12))
    return folder


def test_a_study_is_listed_image_by_image(tmp_path, capsys):
    """A folder holds DICOMs without extension, frames and reports | Each frame is an image; what has none is told."""
    index = open_source(study(tmp_path / "study"))
    frames = [f"study/us.dcm#{i:02d}" for i in range(12)]
    assert index.column("path") == [*(f"study/ct/IM000{i}" for i in range(3)), "study/ct/IM0003.dcm", *frames]
    assert "1 file is DICOM without pixels (study/report.dcm)" in capsys.readouterr().err
    low, high = 0, 1000
    wanted = ((counts(1000, 5).astype(float) - low) / (high - low) * 255).round()
    assert np.abs(index.decode(4 + 5, 1)[:, :, 0] - wanted).max() <= 1  # by the values of the whole file
    assert "as FILE#0" in str(broken_reason(tmp_path / "study" / "us.dcm"))
    summary = troodon.scan(tmp_path / "study")
    assert (summary["ok"], summary["formats"]) == (16, {"DICOM": 16})
    assert "the window in each file is shown; set --range -1024 3071" in summary["values"]["advice"]


def broken_reason(path: Path) -> BadImage:
    with pytest.raises(BadImage) as caught:
        decode(path.read_bytes())
    return caught.value


# ---- NIfTI


def volume(path: Path, slices: int = 12, seed: int = 0, **header) -> np.ndarray:
    """Write a volume of 20 x 24 pixels and so many slices; its values."""
    values = np.random.default_rng(seed).integers(0, 1500, (20, 24, slices)).astype(np.int16)
    image = nibabel.Nifti1Image(values, np.eye(4))
    for name, value in header.items():
        image.header[name] = value
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(image, path)
    return values


@pytest.mark.parametrize("name", ["brain.nii.gz", "brain.nii"])
def test_every_slice_of_a_volume_is_an_image(tmp_path, name):
    """A NIfTI volume lies in a folder | Each slice is an image, by a window or range of the whole volume."""
    values = volume(tmp_path / "a" / name)
    index = open_source(tmp_path / "a")
    assert index.column("path") == [f"a/{name}#{i:02d}" for i in range(12)]
    assert np.array_equal(decode_values(index.read(7), 1).array[:, :, 0], np.rot90(values[:, :, 7]))
    low, high = values.min(), values.max()
    assert np.abs(index.decode(7, 1)[:, :, 0] - (np.rot90(values[:, :, 7]) - low) / (high - low) * 255).max() <= 0.51
    ranged = index.with_range((0, 3000)).decode(7)
    assert ranged.shape == (24, 20, 3)
    assert np.abs(ranged[:, :, 0] - np.rot90(values[:, :, 7]) / 3000 * 255).max() <= 0.51
    volume(tmp_path / "b" / name, cal_min=100, cal_max=200)
    assert decode_values(open_source(tmp_path / "b").read(0)).window == (100, 200)
    assert open_source(tmp_path / "a" / name).column("path") == [f"{name}#{i:02d}" for i in range(12)]


def test_volumes_in_time_colours_and_with_slopes_are_read(tmp_path):
    """A volume has four axes, colours, or a slope | Each slice of each time is an image, with its true values."""
    values = np.random.default_rng(0).random((4, 5, 3, 2)).astype(np.float32)
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), tmp_path / "time.nii.gz")
    index = open_source(tmp_path / "time.nii.gz")
    assert len(index) == 6
    assert np.array_equal(decode_values(index.read(4), 1).array[:, :, 0], np.rot90(values[:, :, 1, 1]))
    rgb = np.zeros((4, 5, 2), [("R", "u1"), ("G", "u1"), ("B", "u1")])
    rgb["G"] = 9
    nibabel.save(nibabel.Nifti1Image(rgb, np.eye(4)), tmp_path / "rgb.nii")
    assert open_source(tmp_path / "rgb.nii").decode(1)[0, 0].tolist() == [0, 9, 0]
    image = nibabel.Nifti1Image(np.arange(60, dtype=np.int16).reshape(3, 4, 5), np.eye(4))
    image.header.set_slope_inter(2, -7)
    nibabel.save(image, tmp_path / "slope.nii.gz")
    got = decode_values(open_source(tmp_path / "slope.nii.gz").read(2)).array[:, :, 0]
    assert np.array_equal(got, np.rot90(np.asarray(nibabel.load(tmp_path / "slope.nii.gz").dataobj)[:, :, 2]))


def test_a_volume_is_decompressed_once_for_all_its_slices(tmp_path, monkeypatch):
    """All slices of some volumes are read | Each volume is opened once, and few of them stay in memory."""
    for i in range(3):
        volume(tmp_path / f"{i}.nii.gz", seed=i)
    opened, real = [], volumes.open_volume
    monkeypatch.setattr(volumes, "open_volume", lambda path: opened.append(path) or real(path))
    cache = containers._Cache(2 * 20 * 24 * 12 * 2, lambda volume: volume.size)
    monkeypatch.setattr(containers, "_volumes", cache)
    troodon.scan(tmp_path, threads=1)
    assert len(opened) == 3
    assert len(cache.futures) == 2


def test_labels_and_splits_of_a_volume_are_those_of_its_slices(tmp_path, capsys):
    """A labels.csv names volumes, or they lie in folders of classes | Each slice has what is said of its volume."""
    for name in ("a", "b"):
        volume(tmp_path / "t" / f"{name}.nii.gz", 2)
        volume(tmp_path / "f" / name / "x.nii.gz", 2)
    (tmp_path / "t" / "labels.csv").write_text("path,label,split\na.nii.gz,ill,train\nb.nii.gz,well,val\n")
    (tmp_path / "list.csv").write_text("path,label\nt/a.nii.gz,1\nt/b.nii.gz,2\n")
    index = open_source(tmp_path / "t")
    assert index.column("label") == ["ill", "ill", "well", "well"]
    assert index.column("split") == ["train", "train", "val", "val"]
    assert open_source(tmp_path / "f").column("label") == ["a", "a", "b", "b"]
    assert open_source(tmp_path / "list.csv").column("label") == ["1", "1", "2", "2"]
    assert capsys.readouterr().err == ""


def test_broken_volumes_are_broken_images(tmp_path, capsys):
    """A NIfTI file is damaged, truncated, or missing | It is one broken image, or some, each with a reason."""
    (tmp_path / "bad.nii.gz").write_bytes(b"\x1f\x8b" + bytes(50))
    volume(tmp_path / "cut.nii.gz", 2)
    (tmp_path / "cut.nii.gz").write_bytes((tmp_path / "cut.nii.gz").read_bytes()[:1000])
    volume(tmp_path / "ok.nii", 2)
    summary = troodon.scan(tmp_path)
    assert summary["ok"] == 2
    names = [image["path"].rpartition("/")[2] for image in summary["broken"]]
    assert names == ["bad.nii.gz#0", "cut.nii.gz#0", "cut.nii.gz#1"]
    index = open_source(tmp_path / "ok.nii")
    with pytest.raises(OSError, match="has no image 9, but 2"):
        containers.read(index.column("container")[0], 9, -1)


# ---- the same rules everywhere


@pytest.fixture
def net(tmp_path) -> Backbone:
    Backbone.random(VIT, SIGHT).save(tmp_path / "net")
    return troodon.load(tmp_path / "net")


def test_medical_images_go_through_every_verb(tmp_path, net, capsys):
    """DICOM and NIfTI are scanned, packed, embedded and trained on | All see the same values as features(path)."""
    folder = study(tmp_path / "data")
    volume(folder / "brain.nii.gz")
    paths = [f"{tmp_path}/{path}" for path in open_source(folder).column("path")]
    wanted = net.features(paths).cls
    for options in ({}, {"range": (-1000, 2000)}):
        troodon.embed(net, folder, tmp_path / f"e{len(options)}", compute="fp32", **options)
        vectors = np.load(tmp_path / f"e{len(options)}" / "embeddings.npy")
        cls = net.features(paths).cls if not options else troodon.load(tmp_path / "net", **options).features(paths).cls
        np.testing.assert_allclose(vectors, torch.nn.functional.normalize(cls).numpy(), atol=2e-3)
    troodon.scan(folder, tmp_path / "index")
    troodon.pack(tmp_path / "index", tmp_path / "shards")
    packed, listed = open_source(tmp_path / "shards"), open_source(tmp_path / "index")
    assert [packed.decode(row).tobytes() for row in range(28)] == [listed.decode(row).tobytes() for row in range(28)]
    with tarfile.open(tmp_path / "shards" / "00000.tar") as tar:
        assert {name.rpartition(".")[2] for name in tar.getnames()} == {"dcm", "npy"}
    troodon.pack(tmp_path / "index", tmp_path / "small", settings={"side": 16})
    assert troodon.scan(tmp_path / "small")["formats"] == {"PNG": 28}
    troodon.scan(folder, tmp_path / "percent", range=("1%", "99%"))
    troodon.pretrain(TINY, tmp_path / "percent", tmp_path / "run", settings={"steps": 1})
    trained = troodon.load(tmp_path / "run")
    assert trained.preprocessing.range == open_source(tmp_path / "percent").range
    same(trained.features([paths[-1]]), trained.features([open_source(folder).read(27)]))
    assert wanted.shape == (28, 64)


def test_a_volume_alone_asks_which_of_its_images(tmp_path, net):
    """features() is given a volume | One line says how many images it holds, and how one is named."""
    values = volume(tmp_path / "brain.nii.gz")
    with pytest.raises(UsageError, match=r"holds 12 images: name one, as .*brain\.nii\.gz#6"):
        net.features(tmp_path / "brain.nii.gz")
    one = net.features(f"{tmp_path}/brain.nii.gz#6")
    grey = (np.rot90(values[:, :, 6]) - values.min()) / float(values.max() - values.min())
    same(one, net.features((grey * 255).round().astype(np.uint8)))


def test_without_the_extra_a_line_says_what_to_install(tmp_path, monkeypatch, capsys):
    """pydicom and nibabel are not installed | Files are named that are not read, and what to install."""
    folder = study(tmp_path / "study")
    volume(folder / "brain.nii.gz", 2)
    (folder / "a.png").write_bytes(png())
    monkeypatch.setattr(formats, "HAS_PYDICOM", False)
    monkeypatch.setattr(formats, "HAS_NIBABEL", False)
    monkeypatch.setattr(formats, "IMAGE_EXTENSIONS", formats.RASTER_EXTENSIONS)
    assert open_source(folder).column("path") == ["study/a.png"]
    said = capsys.readouterr().err
    for part in ('1 .nii.gz (pip install "troodon[medical]")', '7 files are DICOM (pip install "troodon[medical]")'):
        assert part in said
    with pytest.raises(UsageError, match=r'a medical image; pip install "troodon\[medical\]" reads it'):
        open_source(folder / "brain.nii.gz")
    with pytest.raises(UsageError, match=r'a medical image; pip install "troodon\[medical\]" reads it'):
        open_source(folder / "us.dcm")


def png() -> bytes:
    from PIL import Image

    out = io.BytesIO()
    Image.new("RGB", (8, 8)).save(out, "PNG")
    return out.getvalue()


def test_volumes_in_archives_are_left_out_by_name(tmp_path, capsys):
    """A tar holds DICOMs and NIfTI volumes | The DICOMs are read, and the volumes are named as left out."""
    volume(tmp_path / "brain.nii.gz", 2)
    with tarfile.open(tmp_path / "study.tar", "w") as tar:
        for name, data in (("a.dcm", dicom_file(counts())), ("b", dicom_file(counts(seed=1)))):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        tar.add(tmp_path / "brain.nii.gz", "brain.nii.gz")
    index = open_source(tmp_path / "study.tar")
    assert index.column("path") == ["study.tar/a.dcm", "study.tar/b"]
    assert index.decode(1).std() > 5
    assert "1 .nii.gz (inside an archive)" in capsys.readouterr().err
    assert run("scan", tmp_path / "study.tar") == 0
