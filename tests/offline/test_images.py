"""What images become: checked against the model, and decoded as Pillow does."""

from __future__ import annotations

import contextlib
import io
import sys
import warnings
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image, ImageOps

from rayprism.core.tensors import Datatype, TensorSpec
from rayprism.errors import ConfigInvalid, SetupError
from rayprism.models.manifest import Manifest
from rayprism.offline.columns import ColumnMap
from rayprism.offline.images import (
    PixelFormat,
    UnreadableImage,
    decode_image,
    input_columns,
    plan_pixels,
)
from rayprism.offline.spec_parts import InputSpec
from tests.offline.manifests import manifest

SCORE = TensorSpec("score", Datatype.FP32, (-1, 1))
RGB = [[[255, 0, 0], [0, 255, 0], [0, 0, 255]], [[0, 0, 0], [128, 64, 32], [255, 255, 255]]]


def source(columns: dict[str, str] | None = None, **options: Any) -> InputSpec:
    options.setdefault("size", [2, 3])
    return InputSpec.model_validate(
        {"uri": "x", "format": "images", "images": options, "columns": columns or {}}
    )


def model(*shape: int, datatype: Datatype = Datatype.FP32, batched: bool = True) -> Manifest:
    batching = {} if batched else {"batched": False, "max_rows": 1}
    return manifest([TensorSpec("x", datatype, shape)], [SCORE], **batching)


def pixels(*shape: int, datatype: Datatype = Datatype.FP32, **options: Any) -> PixelFormat:
    found = plan_pixels(source(**options), model(-1, *shape, datatype=datatype))
    assert found is not None
    return found


def problem(spec: InputSpec, taker: Manifest) -> str:
    with pytest.raises(ConfigInvalid) as caught:
        plan_pixels(spec, taker)
    return str(caught.value)


def encode(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def rgb() -> Image.Image:
    return Image.fromarray(np.array(RGB, np.uint8))


def photo(width: int = 40, height: int = 30) -> Image.Image:
    """Smooth, so that JPEG keeps it nearly, and nothing in it is symmetric."""
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    return Image.fromarray((np.stack([x, y * x, y**2], 2) * 255).astype(np.uint8))


def decode(data: bytes, format: PixelFormat) -> np.ndarray[Any, Any]:
    out = format.empty(1)
    decode_image(data, format, out[0])
    return out[0]


def refused(data: bytes, **options: Any) -> str:
    with pytest.raises(UnreadableImage) as caught:
        decode(data, pixels(3, 2, 3, **options))
    return str(caught.value)


# --- what they have to become


@pytest.mark.parametrize(
    ("shape", "options", "row"),
    [
        ((-1, 3, 2, 3), {}, (3, 2, 3)),
        ((-1, 3, -1, -1), {}, (3, 2, 3)),
        ((-1, 2, 3, 3), {"layout": "NHWC"}, (2, 3, 3)),
        ((-1, 1, 2, 3), {"mode": "L"}, (1, 2, 3)),
        ((-1, 2, 3, 1), {"mode": "L", "layout": "NHWC"}, (2, 3, 1)),
        ((-1, 2, 3), {"mode": "L"}, (2, 3)),
        ((-1, -1, -1), {"mode": "L", "layout": "NHWC"}, (2, 3)),
        ((-1, 6), {"mode": "L"}, (6,)),
        ((-1, 18), {}, (18,)),
    ],
)
def test_rows_have_as_many_axes_as_the_model_takes(
    shape: tuple[int, ...], options: dict[str, Any], row: tuple[int, ...]
) -> None:
    assert pixels(*shape[1:], **options).shape == row


def test_a_model_of_one_image_may_have_an_axis_for_it() -> None:
    for shape, row in (((3, 2, 3), (3, 2, 3)), ((1, 3, 2, 3), (1, 3, 2, 3))):
        found = plan_pixels(source(), model(*shape, batched=False))
        assert found is not None
        assert found.shape == row


@pytest.mark.parametrize(
    ("shape", "options", "mend"),
    [
        ((3, 224, 224), {}, "Write size: [224, 224], mode: RGB, layout: NCHW"),
        ((3, -1, 8), {}, "Write size: [2, 8], mode: RGB, layout: NCHW"),
        ((2, 3, 3), {}, "Write size: [2, 3], mode: RGB, layout: NHWC"),
        ((3, 2, 3), {"mode": "L"}, "Write size: [2, 3], mode: RGB, layout: NCHW"),
        ((1, 28, 28), {}, "Write size: [28, 28], mode: L, layout: NCHW"),
        ((28, 28, 1), {"mode": "RGB"}, "Write size: [28, 28], mode: L, layout: NHWC"),
        ((28, 28), {}, "Write size: [28, 28], mode: L, layout: NCHW"),
        ((4, 5, 6), {}, "No size, mode and layout make such rows"),
        ((64,), {"mode": "L"}, "No size, mode and layout make such rows"),
    ],
)
def test_what_does_not_fit_says_what_to_write(
    shape: tuple[int, ...], options: dict[str, Any], mend: str
) -> None:
    said = problem(source(**options), model(-1, *shape))
    assert f"input.images: the input 'x' takes rows of shape {list(shape)}" in said
    assert said.endswith(mend)


def test_whole_numbers_take_pixels_as_they_are() -> None:
    assert pixels(3, 2, 3, datatype=Datatype.UINT8, scale=1.0).dtype == "uint8"
    assert pixels(3, 2, 3, datatype=Datatype.INT32, scale=1).dtype == "uint8"
    assert pixels(3, 2, 3, datatype=Datatype.FP16, scale=1.0).dtype == "float32"
    said = problem(source(size=[5, 5]), model(-1, 3, 2, 3, datatype=Datatype.UINT8))
    assert "scale is 0.00392157, and the input 'x' is UINT8" in said
    assert "Write scale: 1.0" in said
    assert "Write size: [2, 3]" in said, "both faults at once"
    for datatype in (Datatype.BYTES, Datatype.BOOL, Datatype.INT8):
        said = problem(source(scale=1.0), model(-1, 3, 2, 3, datatype=datatype))
        assert f"the input 'x' is {datatype}, and pixels are numbers of 0 to 255" in said


def test_one_input_takes_the_pixels() -> None:
    two = manifest(
        [TensorSpec("a", Datatype.FP32, (-1, 3, 2, 3)), TensorSpec("b", Datatype.BYTES, (-1, 1))],
        [SCORE],
    )
    said = problem(source(), two)
    assert "input.columns: no input of m 3 takes the pixels" in said
    assert "as in `a: image`" in said
    mapped = source({"a": "image", "b": "path"})
    assert plan_pixels(mapped, two) is not None
    assert input_columns(mapped, two) == {"a": ("image",), "b": ("path",)}
    said = problem(source({"a": "image", "b": "image"}), two)
    assert "one input takes the column 'image', here a, b of m 3 do" in said
    named = manifest([TensorSpec("image", Datatype.FP32, (-1, 3, 2, 3)), two.inputs[1]], [SCORE])
    assert plan_pixels(source({"b": "path"}), named) is not None


def test_the_only_input_takes_the_pixels_whatever_its_name() -> None:
    assert input_columns(source(), model(-1, 3, 2, 3)) == {"x": ("image",)}
    table = InputSpec.model_validate({"uri": "x", "columns": {"y": "z"}})
    assert input_columns(table, model(-1, 3)) == {"y": ("z",)}
    assert plan_pixels(table, model(-1, 3)) is None


def test_pillow_is_said_to_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(SetupError, match=r"pip install 'rayprism\[images\]'"):
        plan_pixels(source(), model(-1, 3, 2, 3))


# --- decoding


def test_channels_come_first_or_last_and_are_scaled() -> None:
    data, expected = encode(rgb()), np.array(RGB)
    first = decode(data, pixels(3, 2, 3))
    assert first.dtype == np.float32
    np.testing.assert_allclose(first, expected.transpose(2, 0, 1) / 255, rtol=1e-6)
    assert first.max() == 1.0
    last = decode(data, pixels(2, 3, 3, layout="NHWC", scale=2))
    assert last.tolist() == (expected * 2).tolist()
    raw = decode(data, pixels(3, 2, 3, datatype=Datatype.UINT8, scale=1))
    assert raw.dtype == np.uint8
    assert raw.tolist() == expected.transpose(2, 0, 1).tolist()
    flat = decode(data, pixels(18, scale=1))
    assert flat.tolist() == expected.transpose(2, 0, 1).ravel().tolist()


def test_grey_of_any_shape() -> None:
    grey = np.asarray(rgb().convert("L")).tolist()
    data = encode(rgb())
    assert decode(data, pixels(2, 3, mode="L", scale=1)).tolist() == grey
    assert decode(data, pixels(1, 2, 3, mode="L", scale=1)).tolist() == [grey]
    last = decode(data, pixels(2, 3, 1, mode="L", layout="NHWC", scale=1))
    assert last[..., 0].tolist() == grey


@pytest.mark.parametrize("size", [(10, 10), (7, 90), (30, 40), (1, 1)])
def test_they_are_resized_as_pillow_does(size: tuple[int, int]) -> None:
    image = photo()
    expected = np.asarray(image.resize(size[::-1], Image.Resampling.BILINEAR))
    got = decode(encode(image), pixels(*size, 3, size=list(size), layout="NHWC", scale=1))
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"])
@pytest.mark.parametrize("target", ["L", "RGB"])
def test_every_mode_is_converted(mode: str, target: str) -> None:
    image = photo().convert(mode)
    format = {"CMYK": "JPEG", "YCbCr": "JPEG", "PA": "TIFF"}.get(mode, "PNG")
    if mode == "PA":
        image = photo().convert("P").convert("PA")
    data = encode(image, format)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert(target)).reshape(30, 40, -1)
    channels = expected.shape[2]
    format_ = pixels(30, 40, channels, size=[30, 40], mode=target, layout="NHWC", scale=1)
    np.testing.assert_array_equal(decode(data, format_), expected)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "MPO"])
def test_every_kind_of_file(format: str) -> None:
    got = decode(encode(photo(), format), pixels(30, 40, 3, size=[30, 40], layout="NHWC", scale=1))
    assert np.abs(got - np.asarray(photo())).max() < 60


def test_a_palette_with_transparency_is_read_without_a_warning() -> None:
    image = photo().quantize(4)
    data = encode(image, transparency=bytes([0, 100, 200, 255]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = decode(data, pixels(30, 40, 3, size=[30, 40], layout="NHWC", scale=1))
    np.testing.assert_array_equal(got, np.asarray(image.convert("RGB")))


def test_pixels_of_16_bits_keep_their_high_byte() -> None:
    values = np.array([[0, 255, 256], [0x8000, 0xFEFF, 0xFFFF]], np.uint16)
    for format in ("PNG", "TIFF"):
        data = encode(Image.fromarray(values), format)
        got = decode(data, pixels(2, 3, mode="L", scale=1))
        assert got.tolist() == [[0, 0, 1], [128, 254, 255]]


@pytest.mark.parametrize(("dtype", "kind"), [(np.float32, "floats"), (np.int32, "whole numbers")])
def test_pixels_of_32_bits_are_refused(dtype: Any, kind: str) -> None:
    data = encode(Image.fromarray(np.ones((2, 3), dtype)), "TIFF")
    assert refused(data).startswith(f"the image has pixels of 32 bits ({kind})")


@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_they_are_turned_as_exif_says(format: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    lossless = {"lossless": True} if format == "WEBP" else {}
    data = encode(photo(), format, exif=exif, **lossless)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    width, height = upright.size
    assert (width, height) == ((40, 30) if orientation < 5 else (30, 40))
    got = decode(data, pixels(height, width, 3, size=[height, width], layout="NHWC", scale=1))
    np.testing.assert_array_equal(got, np.asarray(upright))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_damaged_exif_leaves_the_image_as_it_is() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    whole = encode(photo(), "JPEG", exif=exif)
    expected = np.asarray(Image.open(io.BytesIO(encode(photo(), "JPEG"))))
    for damage in (b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0what"):
        data = whole.replace(exif.tobytes()[: len(damage)], damage)
        assert data != whole
        got = decode(data, pixels(30, 40, 3, size=[30, 40], layout="NHWC", scale=1))
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF"])
def test_truncated_files_are_refused_wherever_they_end(format: str) -> None:
    random = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)
    data = encode(Image.fromarray(random), format)
    for share in (0.01, 0.1, 0.5, 0.9):
        assert refused(data[: int(len(data) * share)])


def test_damaged_files_are_refused_or_read_and_nothing_else() -> None:
    random = np.random.default_rng(0)
    for format in ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF"):
        whole = encode(photo(), format)
        for _ in range(60):
            data = bytearray(whole)
            for place in random.integers(0, len(data), 8):
                data[place] = random.integers(256)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                with contextlib.suppress(UnreadableImage):
                    decode(bytes(data), pixels(3, 2, 3))


def test_files_that_are_no_images() -> None:
    assert refused(b"") == "the file is empty"
    assert refused(b"id,label\n1,cat\n").startswith("no image of a known kind (PNG, JPEG")
    assert refused(encode(photo(), "PPM")).startswith("no image of a known kind")
    assert refused(encode(photo(), "EPS")).startswith("no image of a known kind")


@pytest.mark.parametrize("quiet", [True, False])
def test_images_made_to_fill_the_memory(monkeypatch: pytest.MonkeyPatch, quiet: bool) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 900)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if quiet else "error")
        for width in (31, 62):
            said = refused(encode(Image.new("L", (width, 30))))
            assert said.startswith("the image has more than 900 pixels")
        decode(encode(Image.new("L", (30, 30))), pixels(3, 2, 3))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    decode(encode(Image.new("L", (62, 30))), pixels(3, 2, 3))


# --- as columns


def test_pixels_reach_the_model_without_a_copy() -> None:
    format = pixels(3, 2, 3)
    images = np.random.default_rng(0).random((5, 3, 2, 3), np.float32)
    column = format.column(images)
    assert column.type == format.schema.field("image").type
    mapped = ColumnMap.plan(format.schema, model(-1, 3, 2, 3), columns={"x": ("image",)}).tensors(
        pa.table({"image": column})
    )
    assert np.shares_memory(mapped.tensors["x"], images)
    np.testing.assert_array_equal(mapped.tensors["x"], images)
    assert len(format.column(format.empty(0))) == 0


def test_what_is_in_memory_at_once_is_bounded() -> None:
    assert pixels(3, -1, -1, size=[224, 224]).most_rows == 111
    large = pixels(3, -1, -1, size=[16_384, 16_384])
    assert large.most_rows == 1
    small = pixels(1, 8, 8, size=[8, 8], mode="L", datatype=Datatype.UINT8, scale=1)
    assert small.most_rows == 1 << 20
