"""Lists the input of a job, and says before any work what is wrong with it."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial, reduce
from typing import Any, Literal, get_args

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs as pa_fs

from rayprism.core.shards import FileFacts
from rayprism.core.tensors import suggest
from rayprism.errors import Fault, SetupError
from rayprism.offline.csv_lines import read_header
from rayprism.offline.filesystems import (
    find_files,
    is_compressed,
    name_of,
    open_filesystem,
    open_text,
    raise_faults,
    read_head,
    what_failed,
)
from rayprism.offline.images import IMAGE_SUFFIXES, PixelFormat, is_image
from rayprism.offline.json_lines import (
    json_type,
    merge_json_types,
    parse_objects,
    plain_json_type,
)
from rayprism.offline.lines import cut_lines, find_line
from rayprism.offline.partitions import partition_types, partition_values
from rayprism.offline.spec_parts import Format
from rayprism.offline.unify import common_type

__all__ = [
    "Format",
    "Listing",
    "list_inputs",
    "open_filesystem",
    "partition_values",
]

_SUFFIXES: dict[str, Format] = {
    ".parquet": "parquet",
    ".pq": "parquet",
    ".csv": "csv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    **dict.fromkeys(IMAGE_SUFFIXES, "images"),
}
_THREADS = 16
_MOST_SHOWN = 20
# Of a JSON Lines input so much is read to find its types: of many files, less of each.
_SAMPLE_BYTES = 1 << 24
_SAMPLE_PART_BYTES = (1 << 14, 1 << 18)


@dataclass(frozen=True, slots=True)
class Listing:
    """The files of an input, in order. Plain data: any process can open them.

    Args:
        filesystem: URI that opens their filesystem.
        root: Folder in it that their paths start from.
        files: In the order of their paths.
        format: Of all of them.
        schema: All columns, partitions last. Those that were asked for have the type in which
            `read_shard` gives them; of the others it is the first file's type.
        partitions: Names of the columns that come from folders `name=value`.
        delimiter: Of CSV.
        newlines_in_values: Whether quoted values of CSV may hold line ends.
        pixels: What images become.
        passed_over: How many files in the folders of images have no suffix of one.
    """

    filesystem: str
    root: str
    files: tuple[FileFacts, ...]
    format: Format
    schema: pa.Schema
    partitions: tuple[str, ...] = ()
    delimiter: str = ","
    newlines_in_values: bool = False
    pixels: PixelFormat | None = None
    passed_over: int = 0

    def open(self) -> pa_fs.FileSystem:
        """The filesystem; the same object for one process."""
        return open_filesystem(self.filesystem)[0]

    def path(self, index: int) -> str:
        """Where a file lies in the filesystem."""
        return f"{self.root.rstrip('/')}/{self.files[index].path}"

    def partition_folder(self, index: int) -> str:
        """The folders `name=value` that a file lies in, as they are written; empty for none."""
        folders = self.files[index].path.split("/")[:-1]
        return "/".join(part for part in folders if "=" in part) if self.partitions else ""


@dataclass(frozen=True, slots=True)
class _Found:
    """What one file says of itself."""

    facts: FileFacts
    schema: pa.Schema = field(default_factory=lambda: pa.schema([]))
    has_rows: bool = False
    fault: str = ""


def list_inputs(
    uris: Sequence[str],
    *,
    format: Format | None,
    columns: Sequence[str] | None,
    partitioning: Literal["hive", "none"] = "none",
    delimiter: str = ",",
    newlines_in_values: bool = False,
    types: Mapping[str, pa.DataType] | None = None,
    pixels: PixelFormat | None = None,
) -> Listing:
    """Finds the files of an input, and looks into each, but for images.

    Columns of CSV are text. Those of JSON Lines have the type that samples of the files show:
    whole numbers, numbers, booleans, text, or lists of these; text where they are mixed. A value
    that its column's type cannot hold exactly is a bad row when it is read.

    An image is a row with the columns `image` and `path`. Files without the suffix of an image are
    passed over.

    Args:
        uris: Paths, folders, globs or URIs, all on one filesystem.
        format: By default what the suffix of the files says.
        columns: What every file must have; None for every column that any of them has.
        partitioning: `hive`: folders `name=value` are columns. One that a file has too is taken
            from the folder.
        delimiter: Of CSV, one ASCII character.
        newlines_in_values: Of CSV: quoted values may hold line ends; its files are not cut.
        types: Of JSON Lines: columns of which more is known than the samples show, such as a model
            input of float32, whose first values may happen to be whole.
        pixels: Of images, from `plan_pixels`.

    Raises:
        SetupError: Nothing is there, nothing is in it, a folder cannot be read, the delimiter
            is none, or images come without `pixels`.
        ConfigInvalid: Files that cannot be read, that miss columns, or whose columns have types
            that do not go together. Each is named, up to 20.
    """
    uris = [uris] if isinstance(uris, str) else list(uris)
    if len(delimiter.encode()) != 1 or delimiter in '"\r\n':
        raise SetupError(
            f"csv.delimiter {delimiter!r}: allowed is one ASCII character, and no quote or line end"
        )
    hive = partitioning == "hive"
    filesystem_uri, root, sizes = find_files(uris, partitioned=hive)
    kind = format or ("images" if pixels else _guess_format(uris, sizes))
    passed_over = 0
    if kind == "images":
        found_files, sizes = len(sizes), _only_images(uris, sizes, pixels)
        passed_over = found_files - len(sizes)
    partitions: dict[str, pa.DataType] = {}
    if hive:
        partitions, faults = partition_types(list(sizes))
        raise_faults(uris, faults)
    listing = Listing(
        filesystem_uri,
        root,
        (),
        kind,
        pa.schema([]),
        tuple(partitions),
        delimiter,
        newlines_in_values,
        pixels if kind == "images" else None,
        passed_over,
    )
    found = _look_into(listing, sizes)
    raise_faults(uris, [Fault(one.facts.path, one.fault) for one in found if one.fault])
    if not any(one.has_rows for one in found):
        raise SetupError(f"{name_of(uris)} is empty: {len(found)} files, and no row in any of them")
    schema, faults = _join_schemas(kind, found, columns, set(partitions), types or {})
    raise_faults(uris, faults)
    for name, type_ in partitions.items():
        at = schema.get_field_index(name)
        schema = (schema.remove(at) if at >= 0 else schema).append(pa.field(name, type_))
    return replace(listing, files=tuple(one.facts for one in found), schema=schema)


def _guess_format(uris: Sequence[str], paths: Iterable[str]) -> Format:
    kinds = Counter(_suffix(path) for path in paths)
    formats = {_SUFFIXES.get(suffix) for suffix in kinds}
    if len(formats) == 1 and (known := formats.pop()) is not None:
        return known
    got = ", ".join(suffix or "(no suffix)" for suffix in sorted(kinds))
    raise SetupError(
        f"{name_of(uris)}: the suffixes of its files do not tell one format: {got}. Known are "
        f"{', '.join(_SUFFIXES)}. Mend: set input.format to one of {', '.join(get_args(Format))}, "
        "or name the files with a glob"
    )


def _only_images(
    uris: Sequence[str], sizes: Mapping[str, int], pixels: PixelFormat | None
) -> dict[str, int]:
    if pixels is None:
        raise SetupError(
            f"{name_of(uris)} holds images: say what becomes of them in input.images, as in "
            "`images: {size: [224, 224]}`"
        )
    images = {path: size for path, size in sizes.items() if is_image(path)}
    if not images:
        raise SetupError(
            f"{name_of(uris)} holds no image: {len(sizes)} files, as {next(iter(sizes))}, and none "
            f"of them ends in {', '.join(IMAGE_SUFFIXES)}"
        )
    return images


def _suffix(path: str) -> str:
    name = path.rpartition("/")[2].lower()
    if is_compressed(name):
        name = name.rpartition(".")[0]
    return name[name.rindex(".") :] if "." in name else ""


def _look_into(listing: Listing, sizes: Mapping[str, int]) -> list[_Found]:
    """Looks into every file; what is wrong with one is told of it, and is not raised."""
    if listing.pixels is not None:
        # One that is none is a bad row, and to open each would be half the work.
        schema = listing.pixels.schema
        return [_Found(FileFacts(path, size), schema, True) for path, size in sizes.items()]
    filesystem = listing.open()
    least, most = _SAMPLE_PART_BYTES
    sample_bytes = min(max(_SAMPLE_BYTES // len(sizes), least), most)
    looks: dict[Format, Callable[[pa_fs.FileSystem, str, FileFacts], _Found]] = {
        "parquet": _look_into_parquet,
        "csv": partial(_look_into_csv, listing),
        "jsonl": partial(_look_into_json, sample_bytes),
    }
    look = looks[listing.format]
    cut = listing.format == "jsonl" or not listing.newlines_in_values

    def look_into(path: str) -> _Found:
        splittable = listing.format != "parquet" and cut and not is_compressed(path)
        facts = FileFacts(path, sizes[path], splittable=splittable)
        try:
            return look(filesystem, f"{listing.root.rstrip('/')}/{path}", facts)
        except (OSError, pa.ArrowException) as error:
            return _Found(facts, fault=f"cannot be read as {listing.format}: {what_failed(error)}")
        except ValueError as error:
            return _Found(facts, fault=str(error))

    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(look_into, sizes))


def _look_into_parquet(filesystem: pa_fs.FileSystem, path: str, facts: FileFacts) -> _Found:
    with pq.ParquetFile(path, filesystem=filesystem) as file:
        groups = range(file.metadata.num_row_groups)
        rows = tuple(file.metadata.row_group(group).num_rows for group in groups)
        schema = file.schema_arrow.remove_metadata()
    return _Found(replace(facts, row_groups=rows), schema, sum(rows) > 0)


def _look_into_csv(
    listing: Listing, filesystem: pa_fs.FileSystem, path: str, facts: FileFacts
) -> _Found:
    names, begin = read_header(filesystem, path, listing.delimiter, listing.newlines_in_values)
    schema = pa.schema([pa.field(name, pa.string()) for name in names])
    return _Found(facts, schema, len(read_head(filesystem, path, begin + 1)) > begin)


def _look_into_json(
    sample_bytes: int, filesystem: pa_fs.FileSystem, path: str, facts: FileFacts
) -> _Found:
    types: dict[str, pa.DataType] = {}
    objects, reason, has_rows = 0, "", False
    with open_text(filesystem, path) as file:
        size = facts.size_bytes
        starts = {0, size // 2, size - sample_bytes} if facts.splittable else {0}
        for start in sorted(at for at in starts if at >= 0):
            stop = start + sample_bytes
            begin = find_line(file, start, stop) if start else 0
            if facts.splittable:
                file.seek(begin)
            for lines in cut_lines(file.read, begin, stop):
                rows, _, bad = parse_objects(lines.without_bom() if begin == 0 else lines)
                objects += len(rows)
                reason = reason or (bad[0].reason if bad else "")
                has_rows = has_rows or bool(rows or bad)
                for name in {name: None for row in rows for name in row}:
                    seen = json_type(row.get(name) for row in rows)
                    types[name] = merge_json_types(types.get(name, pa.null()), seen)
    fault = f"is not JSON Lines: {reason}" if reason and not objects else ""
    schema = pa.schema([pa.field(name, type_) for name, type_ in types.items()])
    return _Found(facts, schema, has_rows, fault)


def _join_schemas(
    kind: Format,
    found: Sequence[_Found],
    columns: Sequence[str] | None,
    partitions: Set[str],
    types: Mapping[str, pa.DataType],
) -> tuple[pa.Schema, list[Fault]]:
    """One schema for all files, and what keeps them from having one."""
    # Thousands of files have few schemas. A file without a header has nothing to say.
    schemas: dict[pa.Schema, list[str]] = defaultdict(list)
    for one in found:
        if one.has_rows or (kind == "parquet" and len(one.schema)):
            schemas[one.schema].append(one.facts.path)
    every = dict.fromkeys(name for schema in schemas for name in schema.names)
    needed = [name for name in (every if columns is None else columns) if name not in partitions]
    faults = _missing(kind, schemas, needed, columns is None)
    fields = {item.name: item for item in reversed(list(next(iter(schemas))))}
    fields = {name: fields[name] for name in next(iter(schemas)).names}
    for name in dict.fromkeys(needed):
        if kind == "jsonl":
            type_ = _json_column(schemas, name, types)
        else:
            type_, clashes = _parquet_column(schemas, name)
            faults += clashes
        fields[name] = pa.field(name, type_)
    return pa.schema(list(fields.values())), faults


def _missing(
    kind: Format, schemas: Mapping[pa.Schema, list[str]], needed: Sequence[str], every: bool
) -> list[Fault]:
    known = dict.fromkeys(name for schema in schemas for name in schema.names)
    faults = []
    for name in needed:
        if name not in known:
            hint = suggest(name, known)
            shown = ", ".join(list(known)[:_MOST_SHOWN]) + (
                ", ..." if len(known) > _MOST_SHOWN else ""
            )
            if kind == "csv" and len(known) == 1:
                hint = " Is the delimiter right?"
            faults.append(Fault(name, f"no file has this column; there are {shown}.{hint}"))
    for schema, paths in schemas.items():
        twice = [name for name in needed if schema.names.count(name) > 1]
        absent = [name for name in needed if name in known and name not in schema.names]
        if twice:
            faults += [Fault(path, f"has more than one column {_names(twice)}") for path in paths]
        # A line of JSON may leave a key out, and so may all lines of a file.
        if absent and kind != "jsonl":
            hint = ". Mend: name the columns that are wanted instead of '*'" if every else ""
            faults += [Fault(path, f"lacks column {_names(absent)}{hint}") for path in paths]
    return faults


def _parquet_column(
    schemas: Mapping[pa.Schema, list[str]], name: str
) -> tuple[pa.DataType, list[Fault]]:
    """The type of a column in all files. What most files have is what the others must go with."""
    paths: dict[pa.DataType, list[str]] = defaultdict(list)
    for schema, having in schemas.items():
        if schema.names.count(name) == 1:
            paths[schema.field(name).type] += having
    ranked = sorted(paths, key=lambda type_: -len(paths[type_]))
    common, faults = ranked[0] if ranked else pa.null(), []
    for type_ in ranked[1:]:
        joined = common_type(common, type_)
        if joined is None:
            faults += [
                Fault(
                    path,
                    f"column {name!r} is {type_}, and {common} in {len(paths[ranked[0]])} "
                    "other files: no type holds both",
                )
                for path in paths[type_]
            ]
        else:
            common = joined
    return common, faults


def _json_column(
    schemas: Mapping[pa.Schema, list[str]], name: str, types: Mapping[str, pa.DataType]
) -> pa.DataType:
    seen = [schema.field(name).type for schema in schemas if name in schema.names]
    if name in types:
        return plain_json_type(types[name])
    return plain_json_type(reduce(merge_json_types, seen, pa.null()))


def _names(names: Any) -> str:
    return ", ".join(names) or "(none)"
