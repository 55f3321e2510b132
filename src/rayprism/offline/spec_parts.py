"""What a batch job is told of its input, its output, its actors and its limits."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
)

__all__ = [
    "CsvOptions",
    "Format",
    "ImageLayout",
    "ImageMode",
    "ImageOptions",
    "InputSpec",
    "Limits",
    "OutputSpec",
    "Pool",
    "SpecPart",
]

Format = Literal["parquet", "csv", "jsonl", "images"]
ImageMode = Literal["L", "RGB"]
ImageLayout = Literal["NCHW", "NHWC"]


class SpecPart(BaseModel):
    """A part of what a job is told."""

    # Strict: YAML has types of its own, and `true` for a number or "no" for a flag is a mistake.
    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, validate_default=True, protected_namespaces=()
    )


def _strings(value: Any) -> Any:
    """One string stands for a list of one."""
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list | tuple) or not all(type(item) is str for item in values):
        raise ValueError("a string or a list of strings; quote what YAML reads as something else")
    return tuple(values)


def _once_each(values: tuple[str, ...]) -> tuple[str, ...]:
    twice = sorted({value for value in values if values.count(value) > 1})
    if twice:
        raise ValueError(f"{twice[0]!r} is given twice")
    if "" in values:
        raise ValueError("an empty string among them")
    return values


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


_Strings = Annotated[tuple[str, ...], BeforeValidator(_strings), AfterValidator(_once_each)]
_Count = Annotated[int, Field(ge=1)]


class CsvOptions(SpecPart):
    r"""How CSV files are written.

    Args:
        delimiter: One character. A tab is `"\t"` in double quotes.
        newlines_in_values: Whether quoted values may hold line breaks. Such files cannot be cut:
            each is one shard.
    """

    delimiter: str = ","
    newlines_in_values: bool = False

    @field_validator("delimiter")
    @classmethod
    def _is_one_character(cls, value: str) -> str:
        if len(value) != 1 or not value.isascii() or value in '\r\n"':
            raise ValueError('one ASCII character; a tab is "\\t" in double quotes')
        return value


class ImageOptions(SpecPart):
    """What images become before the model gets them: one input of the model.

    They are turned as their EXIF data says, converted to this mode, and resized (bilinear,
    antialiased, whatever their proportions were). Transparency is dropped.

    Args:
        size: Height and width in pixels.
        mode: Grey (`L`) or colour.
        layout: Order of the axes: rows, channels, height, width, or the channels last. A model
            without an axis for the channels takes mode `L`.
        scale: What a pixel of 0 to 255 is multiplied by. 1 where the input is of whole numbers.
    """

    size: Annotated[
        tuple[
            Annotated[int, Field(ge=1, le=16_384)],
            Annotated[int, Field(ge=1, le=16_384)],
        ],
        BeforeValidator(_tuple),
    ]
    mode: ImageMode = "RGB"
    layout: ImageLayout = "NCHW"
    scale: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1 / 255


class InputSpec(SpecPart):
    """What the job reads.

    Args:
        uri: Files, folders or patterns, local or of a filesystem that pyarrow opens. One string
            stands for a list of one.
        format: By default what the suffixes say.
        columns: The model's input to its column, or to the columns that are put side by side.
            Inputs that are not named take the column of their own name.
        partitioning: `hive`: folders named `key=value` are columns.
        csv: For `csv` only.
        images: For `images` only, and needed there.
    """

    uri: _Strings
    format: Format | None = None
    columns: dict[str, _Strings] = Field(default_factory=dict)
    partitioning: Literal["hive", "none"] = "none"
    csv: CsvOptions = CsvOptions()
    images: ImageOptions | None = None

    @field_validator("uri")
    @classmethod
    def _has_one(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value:
            raise ValueError("at least one file, folder or pattern")
        return value

    @field_validator("columns")
    @classmethod
    def _name_columns(cls, value: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
        for name, columns in value.items():
            if not columns:
                raise ValueError(f"{name!r} has no column. Leave it out to take the one named so")
        return value

    @field_validator("csv")
    @classmethod
    def _only_for_csv(cls, value: CsvOptions, info: ValidationInfo) -> CsvOptions:
        given = info.data.get("format")
        if value != CsvOptions() and given not in (None, "csv"):
            raise ValueError(f"only for format: csv; the format is {given}")
        return value

    @field_validator("images")
    @classmethod
    def _for_images(cls, value: ImageOptions | None, info: ValidationInfo) -> ImageOptions | None:
        if "format" not in info.data:
            return value
        given = info.data["format"]
        if given == "images" and value is None:
            raise ValueError("format: images needs them, as in `images: {size: [224, 224]}`")
        if given not in (None, "images") and value is not None:
            raise ValueError(f"only for format: images; the format is {given}")
        return value


class OutputSpec(SpecPart):
    """What the job writes: Parquet files in one folder.

    Args:
        uri: The folder. New or empty, or what an earlier run of the same job began.
        passthrough: Columns of the input that are copied; `"*"` for all.
        partitioned: Whether files lie in the same `key=value` folders as the input's.
        prefix: Put before the names of the columns that hold predictions.
        row_position: Whether the columns `_file` and `_row` say where a row came from.
        compression: Of the Parquet files.
    """

    uri: Annotated[str, Field(min_length=1)]
    passthrough: _Strings = ()
    partitioned: bool = False
    prefix: str = ""
    row_position: bool = False
    compression: Literal["zstd", "snappy", "gzip", "lz4", "brotli", "none"] = "zstd"

    @field_validator("passthrough")
    @classmethod
    def _all_or_some(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if "*" in value and len(value) > 1:
            raise ValueError('"*" stands for every column: give it alone')
        return value

    @property
    def passes_all(self) -> bool:
        """Whether every column of the input is copied."""
        return self.passthrough == ("*",)


class Pool(SpecPart):
    """The actors that do the work.

    Args:
        min_actors: Fewest.
        max_actors: Most.
        initial_actors: At the start; by default what `start_full` says.
        start_full: Whether the pool starts with `max_actors`, instead of `min_actors`.
        cpus: Of each actor, as Ray counts them.
        gpus: Of each actor; a part of 1 shares a GPU.
    """

    min_actors: Annotated[int, Field(ge=1, le=10_000)] = 1
    max_actors: Annotated[int, Field(ge=1, le=10_000)] = 2
    initial_actors: _Count | None = None
    start_full: bool = True
    cpus: Annotated[float, Field(gt=0, le=1_024)] = 1
    gpus: Annotated[float, Field(ge=0, le=64)] = 0

    @field_validator("max_actors")
    @classmethod
    def _not_below_min(cls, value: int, info: ValidationInfo) -> int:
        least = info.data.get("min_actors")
        if least is not None and value < least:
            raise ValueError(f"at least min_actors, which is {least}")
        return value

    @field_validator("initial_actors")
    @classmethod
    def _between(cls, value: int | None, info: ValidationInfo) -> int | None:
        least, most = info.data.get("min_actors"), info.data.get("max_actors")
        if value is None or least is None or most is None:
            return value
        if not least <= value <= most:
            raise ValueError(f"from min_actors to max_actors, which are {least} and {most}")
        return value

    @field_validator("gpus")
    @classmethod
    def _whole_above_one(cls, value: float) -> float:
        if value > 1 and not value.is_integer():
            raise ValueError("a whole number, or a part of 1: Ray cannot split several GPUs")
        return value

    @property
    def first_actors(self) -> int:
        """How many the pool starts with."""
        if self.initial_actors is not None:
            return self.initial_actors
        return self.max_actors if self.start_full else self.min_actors


class Limits(SpecPart):
    """How much at once, and when to give up.

    Args:
        batch_rows: Most rows that the model gets at once; by default the manifest's. Of images,
            it never gets more than 64 MiB of pixels hold.
        shard_rows: Rows of Parquet, or images, that are committed as a whole; by default what
            suits the model (`JobSpec.shard_rows`).
        shard_bytes: The same for text files (`JobSpec.shard_bytes`).
        max_dead_letters: The job ends when more rows than this have failed. 0: at the first.
        max_memory_bytes: Of one actor.
    """

    batch_rows: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    shard_rows: _Count | None = None
    shard_bytes: Annotated[int, Field(ge=1_024)] | None = None
    max_dead_letters: Annotated[int, Field(ge=0)] = 1_000
    max_memory_bytes: Annotated[int, Field(ge=64 * 1024 * 1024)] | None = None
