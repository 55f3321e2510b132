"""Images as the input of a model: what becomes of each, and how one is decoded."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final, Literal, get_args

import numpy as np
import pyarrow as pa

from rayprism.core.tensors import Array, Datatype, TensorSpec
from rayprism.errors import ConfigInvalid, Fault, SetupError
from rayprism.models.manifest import Manifest
from rayprism.offline.filesystems import what_failed
from rayprism.offline.outputs import inner_shape
from rayprism.offline.spec_parts import ImageLayout, ImageMode, ImageOptions, InputSpec

__all__ = [
    "IMAGE_COLUMN",
    "IMAGE_SUFFIXES",
    "PATH_COLUMN",
    "PixelFormat",
    "UnreadableImage",
    "decode_image",
    "input_columns",
    "is_image",
    "load_pillow",
    "plan_pixels",
]

IMAGE_COLUMN: Final = "image"
PATH_COLUMN: Final = "path"
IMAGE_SUFFIXES: Final = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")

# Pillow knows more, some of which run other programs (EPS).
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
_BATCH_BYTES = 64 * 1024 * 1024
_CHANNELS: dict[ImageMode, int] = {"L": 1, "RGB": 3}
_ORIENTATION_TAG = 0x0112


class UnreadableImage(ValueError):
    """It cannot be decoded: the fault of its row. Tells nothing of what is in it."""


def is_image(path: str) -> bool:
    """Whether a file has the suffix of an image."""
    return path.lower().endswith(IMAGE_SUFFIXES)


@dataclass(frozen=True, slots=True)
class PixelFormat:
    """What images become. Made with `plan_pixels`.

    Args:
        options: What the job says.
        shape: Of a row of the model's input.
        dtype: Of the pixels that are read: `uint8` where the input is of whole numbers.
    """

    options: ImageOptions
    shape: tuple[int, ...]
    dtype: Literal["uint8", "float32"]

    @property
    def schema(self) -> Any:
        """The columns that images have: `pyarrow.Schema`."""
        kind = pa.from_numpy_dtype(np.dtype(self.dtype))
        for size in reversed(self.shape):
            kind = pa.list_(kind, size)
        return pa.schema([pa.field(IMAGE_COLUMN, kind), pa.field(PATH_COLUMN, pa.string())])

    @property
    def most_rows(self) -> int:
        """How many are in memory at once: 64 MiB of pixels, or a single image that has more."""
        return max(1, _BATCH_BYTES // self.empty(1).nbytes)

    def empty(self, rows: int) -> Array:
        """Room for images. Shapes: `[rows, *shape]`."""
        return np.empty((rows, *self.shape), self.dtype)

    def column(self, pixels: Array) -> Any:
        """Pixels as a column, without a copy: `pyarrow.FixedSizeListArray`.

        Args:
            pixels: Contiguous. Shapes: `[rows, *shape]`.
        """
        array = pa.array(pixels.reshape(-1))
        for size in reversed(self.shape):
            array = pa.FixedSizeListArray.from_arrays(array, size)
        return array


def input_columns(source: InputSpec, manifest: Manifest) -> dict[str, tuple[str, ...]]:
    """The columns of each input that does not take the one of its own name.

    The only input of a model takes the pixels of images, whatever it is named.

    Args:
        source: What the job says.
        manifest: Of the model.
    """
    columns = dict(source.columns)
    if source.images is not None and len(manifest.inputs) == 1:
        columns.setdefault(manifest.inputs[0].name, (IMAGE_COLUMN,))
    return columns


def plan_pixels(source: InputSpec, manifest: Manifest, name: str = "job") -> PixelFormat | None:
    """Finds what images have to become for a model.

    Args:
        source: What the job says of its input.
        manifest: Of the model.
        name: What the job was read from, for messages.

    Returns:
        None where the input is not of images.

    Raises:
        ConfigInvalid: Every fault: no input or several take the pixels, or what images become is
            not what it takes.
        SetupError: Pillow is not installed.
    """
    options = source.images
    if options is None:
        return None
    load_pillow()
    columns = input_columns(source, manifest)
    takers = [
        item for item in manifest.inputs if IMAGE_COLUMN in columns.get(item.name, (item.name,))
    ]
    if len(takers) != 1:
        raise ConfigInvalid(name, [Fault("input.columns", _not_one(takers, manifest))])
    (item,) = takers
    inner = inner_shape(item, manifest.batching.batched)
    shape = _row_shape(inner, options)
    problems = [_value_problem(item, options)]
    if not _fits(shape, inner):
        problems.append(_shape_problem(item, inner, shape, options))
    faults = [Fault("input.images", problem) for problem in problems if problem]
    if faults:
        raise ConfigInvalid(name, faults)
    return PixelFormat(options, shape, "uint8" if item.datatype.is_integer else "float32")


def _not_one(takers: list[TensorSpec], manifest: Manifest) -> str:
    version = f"{manifest.model} {manifest.version}"
    if takers:
        several = ", ".join(item.name for item in takers)
        return f"one input takes the column {IMAGE_COLUMN!r}, here {several} of {version} do"
    names = [item.name for item in manifest.inputs]
    return (
        f"no input of {version} takes the pixels, which are the column {IMAGE_COLUMN!r}; its "
        f"inputs are {', '.join(names)}. Name the one that does, as in `{names[0]}: {IMAGE_COLUMN}`"
    )


def _value_problem(item: TensorSpec, options: ImageOptions) -> str:
    if item.datatype in (Datatype.BYTES, Datatype.BOOL, Datatype.INT8):
        return (
            f"the input {item.name!r} is {item.datatype}, and pixels are numbers of 0 to 255. "
            "Allowed are inputs of floats, UINT8 and wider whole numbers"
        )
    if item.datatype.is_integer and options.scale != 1:
        return (
            f"scale is {options.scale:g}, and the input {item.name!r} is {item.datatype}, which "
            "takes pixels as they are. Write scale: 1.0"
        )
    return ""


def _row_shape(inner: tuple[int, ...], options: ImageOptions) -> tuple[int, ...]:
    """The shape that an image gets, with as many axes as the model wants where that can be."""
    height, width = options.size
    channels = _CHANNELS[options.mode]
    shape = (height, width, channels) if options.layout == "NHWC" else (channels, height, width)
    if len(inner) == 1:
        return (math.prod(shape),)
    if len(inner) == 2 and channels == 1:
        return height, width
    # A model that is not batched may have an axis of one row.
    return (1,) * (len(inner) - len(shape)) + shape


def _fits(shape: tuple[int, ...], inner: tuple[int, ...]) -> bool:
    return len(shape) == len(inner) and all(
        need in (-1, have) for have, need in zip(shape, inner, strict=True)
    )


def _shape_problem(
    item: TensorSpec, inner: tuple[int, ...], shape: tuple[int, ...], options: ImageOptions
) -> str:
    mend = next(
        (
            f"Write size: {list(other.size)}, mode: {other.mode}, layout: {other.layout}"
            for other in _others(inner, options)
            if _fits(_row_shape(inner, other), inner)
        ),
        "No size, mode and layout make such rows",
    )
    return (
        f"the input {item.name!r} takes rows of shape {list(inner)} (-1: any size); size "
        f"{list(options.size)}, mode {options.mode} and layout {options.layout} make {list(shape)}."
        f" {mend}"
    )


def _others(inner: tuple[int, ...], options: ImageOptions) -> Iterator[ImageOptions]:
    """What may be meant: the nearest to what is said first."""
    modes = sorted(get_args(ImageMode), key=lambda mode: mode != options.mode)
    layouts = sorted(get_args(ImageLayout), key=lambda layout: layout != options.layout)
    for mode in modes:
        for layout in layouts:
            at = -2 if layout == "NCHW" or len(inner) == 2 else -3
            wanted = inner[at:][:2] if len(inner) >= 2 else (-1, -1)
            size = tuple(
                said if need < 1 else need for need, said in zip(wanted, options.size, strict=False)
            )
            yield options.model_copy(update={"size": size, "mode": mode, "layout": layout})


def load_pillow() -> Any:
    """Pillow's module `PIL.Image`, with the formats that it knows.

    Raises:
        SetupError: It is not installed.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise SetupError(
            "format images needs Pillow, which is not installed. Mend: pip install "
            "'rayprism[images]'"
        ) from error
    Image.init()
    return Image


def decode_image(data: bytes, pixels: PixelFormat, out: Array) -> None:
    """Decodes a file; of one with several frames the first.

    Args:
        data: The file.
        pixels: What it becomes.
        out: Where it goes; contiguous. Shapes: `pixels.shape`.

    Raises:
        UnreadableImage: It is no image, truncated, has more pixels than Pillow takes for safe, or
            pixels that cannot be made 8 bits.
    """
    if not data:
        raise UnreadableImage("the file is empty")
    pillow = load_pillow()
    try:
        with pillow.open(io.BytesIO(data), formats=_FORMATS) as image:
            most = pillow.MAX_IMAGE_PIXELS
            if most is not None and math.prod(image.size) > most:
                raise pillow.DecompressionBombError
            image.load()
            array = _to_array(pillow, image, pixels.options)
    except (UnreadableImage, MemoryError):
        raise
    except pillow.UnidentifiedImageError:
        raise UnreadableImage(f"no image of a known kind ({', '.join(_FORMATS)})") from None
    except (pillow.DecompressionBombError, pillow.DecompressionBombWarning):
        raise UnreadableImage(
            f"the image has more than {pillow.MAX_IMAGE_PIXELS:,} pixels, as a file has that is "
            "made to fill the memory"
        ) from None
    except Exception as error:
        # Its decoders raise whatever the bytes of a damaged file make them run into.
        raise UnreadableImage(f"the image is damaged: {what_failed(error)}") from error
    if pixels.options.layout == "NCHW" and array.ndim == 3:
        array = np.ascontiguousarray(array.transpose(2, 0, 1))
    array = array.reshape(out.shape)
    if pixels.dtype == "uint8":
        out[...] = array
    else:
        np.multiply(array, np.float32(pixels.options.scale), out=out)


def _to_array(pillow: Any, image: Any, options: ImageOptions) -> Array:
    """Shapes: `[height, width] uint8` for mode L, `[height, width, 3] uint8` for RGB."""
    turn = _turns(pillow).get(_orientation(image))
    if turn is not None:
        image = image.transpose(turn)
    # Else Pillow warns of colours that stand for transparency, which is dropped here.
    image.info.pop("transparency", None)
    if image.mode.startswith("I;16"):
        # Pillow would make everything above 255 white. The high byte is what it takes of colours.
        image = pillow.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        kind = "whole numbers" if image.mode == "I" else "floats"
        raise UnreadableImage(
            f"the image has pixels of 32 bits ({kind}), and does not say which of them is white. "
            "Allowed are 8 and 16 bits"
        )
    if image.mode != options.mode:
        image = image.convert(options.mode)
    height, width = options.size
    if image.size != (width, height):
        image = image.resize((width, height), pillow.Resampling.BILINEAR)
    return np.asarray(image)


def _turns(pillow: Any) -> dict[int, Any]:
    """What turns an image upright. Source: Exif 2.32, 4.6.4, tag Orientation."""
    turn = pillow.Transpose
    return {
        2: turn.FLIP_LEFT_RIGHT,
        3: turn.ROTATE_180,
        4: turn.FLIP_TOP_BOTTOM,
        5: turn.TRANSPOSE,
        6: turn.ROTATE_270,
        7: turn.TRANSVERSE,
        8: turn.ROTATE_90,
    }


def _orientation(image: Any) -> Any:
    try:
        return image.getexif().get(_ORIENTATION_TAG)
    except Exception:
        # What a camera wrote beside the image may be damaged; viewers show the image all the same.
        return None
