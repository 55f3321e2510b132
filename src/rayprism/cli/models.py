"""`rayprism models`: push, list, show and verify."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rayprism.cli.output import print_json, print_table, repository_option, say, shown_path
from rayprism.errors import RayprismError

if TYPE_CHECKING:
    from rayprism.models.manifest import Manifest
    from rayprism.models.repository import ModelVersion, Repository

__all__ = ["models"]


@click.group()
def models() -> None:
    """Push model versions to a repository, and look at what is there."""


@models.command(
    epilog="\b\nExamples:\n"
    "  rayprism models push flights model.onnx --example rows.json\n"
    "  rayprism models push flights model.onnx --example rows.json \\\n"
    "      --metadata auc=0.81 --metadata-file training.json --max-rows 256\n"
    "  rayprism models push minilm ./export --example texts.json --allow-code \\\n"
    "      --code processor.py:Tokenize --input text:BYTES:-1,1 --output embedding:FP32:-1,384 \\\n"
    "      --ragged input_ids:1:0 --ragged attention_mask:1:0 --max-cost 4096 \\\n"
    "      --tolerance-rule cosine"
)
@click.argument("model")
@click.argument("source", type=click.Path(path_type=Path))
@click.option(
    "--example",
    type=click.Path(dir_okay=False, path_type=Path),
    required=True,
    help="A request as JSON. What the model makes of it is what every replica has to reproduce.",
)
@repository_option
@click.option(
    "--runtime",
    type=click.Choice(["onnx", "torch", "python"]),
    help="What runs the model.  [default: what the suffix says]",
)
@click.option("--file", metavar="NAME", help="Which file of a source folder is the model.")
@click.option("--code", metavar="FILE.py:CLASS", help="A class around the runtime, or the model.")
@click.option("--allow-code", is_flag=True, help="Run the code that comes with the model.")
@click.option("--max-rows", type=click.IntRange(1), help="Most rows in one batch.")
@click.option(
    "--max-cost", type=click.IntRange(1), help="Most rows * padded length in one batch (--ragged)."
)
@click.option(
    "--max-delay-s", type=click.FloatRange(0, 60), help="How long a batch may wait to be filled."
)
@click.option(
    "--execution",
    type=click.Choice(["auto", "inline", "thread"]),
    help="Where batches run.  [default: auto]",
)
@click.option(
    "--not-batched", is_flag=True, help="Axis 0 is no row: requests run one at a time, as they are."
)
@click.option(
    "--ragged",
    multiple=True,
    metavar="NAME:AXIS:VALUE",
    help="Pad this axis of this input of the runtime with this value. May be repeated.",
)
@click.option(
    "--tolerance-rule",
    type=click.Choice(["close", "exact", "top1", "cosine"]),
    help="When a replica's answer to the example is right.  [default: close]",
)
@click.option("--tolerance-absolute", type=float, help="For `close`.  [default: 1e-05]")
@click.option("--tolerance-relative", type=float, help="For `close`.  [default: 0.0001]")
@click.option("--tolerance-cosine", type=float, help="For `cosine`.  [default: 0.999]")
@click.option(
    "--metadata",
    multiple=True,
    metavar="KEY=VALUE",
    help="Free; a value that is JSON is taken as that. May be repeated.",
)
@click.option(
    "--metadata-file",
    type=click.Path(dir_okay=False, path_type=Path),
    help="A JSON object; --metadata adds to it.",
)
@click.option("--option", multiple=True, metavar="KEY=VALUE", help="For the runtime and the code.")
@click.option(
    "--input",
    "inputs",
    multiple=True,
    metavar="NAME:DATATYPE:SHAPE",
    help="What clients send, as in `x:FP32:-1,30`, where the model does not say. May be repeated.",
)
@click.option(
    "--output", "outputs", multiple=True, metavar="NAME:DATATYPE:SHAPE", help="What clients get."
)
@click.option(
    "--runtime-input",
    "runtime_inputs",
    multiple=True,
    metavar="NAME:DATATYPE:SHAPE",
    help="What the runtime takes after pre-processing, where the model does not say.",
)
def push(model: str, source: Path, repository: Path, example: Path, **options: Any) -> None:
    """Push SOURCE, a model file or a folder, as the next version of MODEL.

    The version is loaded and run as a replica would before it becomes visible.

    Exit codes: 0 pushed (there may be warnings), 1 not pushed and nothing left behind, 2 wrong
    usage.
    """
    from rayprism.cli.push_options import batching_of, mapping_of, specs_of, tolerance_of
    from rayprism.models.push import push_model
    from rayprism.models.repository import Repository

    result = push_model(
        Repository(repository),
        model,
        source,
        example=example,
        runtime=options["runtime"],
        file=options["file"],
        code=options["code"],
        batching=batching_of(options),
        tolerance=tolerance_of(options),
        metadata=mapping_of("--metadata", options["metadata"], options["metadata_file"]),
        inputs=specs_of("--input", options["inputs"]),
        outputs=specs_of("--output", options["outputs"]),
        runtime_inputs=specs_of("--runtime-input", options["runtime_inputs"]),
        options=mapping_of("--option", options["option"]),
        allow_code=options["allow_code"],
    )
    manifest = result.version.manifest
    click.echo(
        f"{manifest.model} version {manifest.version} is in {shown_path(result.version.folder)}"
    )
    _print_signature(manifest)
    for warning in result.warnings:
        say(f"{click.style('warning:', fg='yellow')} {warning}")
    click.echo(f"\nTo serve it:\n\n{_snippet(manifest)}")


def _snippet(manifest: Manifest) -> str:
    from rayprism.fleet.check_models import MODEL_IMPORT_PATH
    from rayprism.serving.settings import DEPLOYMENT_NAME

    allow_code = ", allow_code: true" if manifest.runs_code else ""
    # Quoted: a name such as `on` or `1e3` is something else to YAML.
    return (
        "http_options: {host: 127.0.0.1, keep_alive_timeout_s: 20}\n"
        "applications:\n"
        f'- name: "{manifest.model}"\n'
        f'  route_prefix: "/v2/models/{manifest.model}"\n'
        f"  import_path: {MODEL_IMPORT_PATH}\n"
        f'  args: {{model: "{manifest.model}", version: "{manifest.version}"{allow_code}}}\n'
        "  deployments:\n"
        f"  - {{name: {DEPLOYMENT_NAME}, num_replicas: 1}}\n"
    )


def _print_signature(manifest: Manifest) -> None:
    click.echo(f"  runtime  {manifest.runtime}, {manifest.file}")
    for role, specs in (
        ("input", manifest.inputs),
        ("inner", manifest.runtime_inputs),
        ("output", manifest.outputs),
    ):
        for spec in specs:
            click.echo(f"  {role:<7}  {spec.name} {spec.datatype} {list(spec.shape)}")


@models.command(
    name="list",
    epilog="\b\nExamples:\n  rayprism models list\n  rayprism models list --json",
)
@repository_option
@click.option("--json", "as_json", is_flag=True, help="Print it for programs.")
def list_models(repository: Path, as_json: bool) -> None:
    """List the models of a repository."""
    from rayprism.models.repository import Repository

    found = Repository(repository)
    items = [_summary(found, model) for model in found.models()]
    if as_json:
        print_json(items)
    elif not items:
        click.echo(f"no models in {repository}. `rayprism models push` adds one")
    else:
        print_table(
            ("MODEL", "VERSIONS", "NEWEST", "CREATED", "RUNTIME"),
            [
                (
                    item["model"],
                    _ranges(item["versions"]),
                    item["versions"][-1],
                    item["created"] or "?",
                    item["runtime"] or item["error"],
                )
                for item in items
            ],
        )


def _summary(repository: Repository, model: str) -> dict[str, Any]:
    versions = repository.versions(model)
    item: dict[str, Any] = {
        "model": model,
        "versions": versions,
        "created": None,
        "runtime": None,
        "error": None,
    }
    try:
        manifest = repository.version(model, versions[-1]).manifest
    except RayprismError as error:
        # One broken manifest must not hide the other models.
        return item | {"error": str(error)}
    return item | {"created": manifest.created, "runtime": manifest.runtime}


def _ranges(numbers: list[int]) -> str:
    """`1-3, 7`."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and parts[-1][-1] == number - 1:
            parts[-1][1:] = [number]
        else:
            parts.append([number])
    return ", ".join("-".join(map(str, part)) for part in parts)


@models.command(
    epilog="\b\nExamples:\n"
    "  rayprism models show flights\n"
    "  rayprism models show flights 3\n"
    "  rayprism models show flights 3 --json"
)
@click.argument("model")
@click.argument("version", type=click.IntRange(1), required=False)
@repository_option
@click.option(
    "--json", "as_json", is_flag=True, help="Print the manifest, or one for each version."
)
def show(model: str, version: int | None, repository: Path, as_json: bool) -> None:
    """Show the versions of MODEL, or all about one VERSION."""
    from rayprism.models.repository import Repository

    found = Repository(repository)
    if version is not None:
        one = found.version(model, version)
        if as_json:
            click.echo(one.manifest.to_json(), nl=False)
        else:
            _print_version(one)
        return
    manifests = [found.version(model, number).manifest for number in found.versions(model)]
    if as_json:
        print_json([manifest.model_dump(mode="json") for manifest in manifests])
        return
    print_table(
        ("VERSION", "CREATED", "RUNTIME", "FILE", "SIZE", "DIGEST"),
        [
            (
                str(manifest.version),
                manifest.created,
                manifest.runtime,
                manifest.file,
                _size(sum(entry.size_bytes for entry in manifest.files.values())),
                manifest.digest.removeprefix("sha256:")[:12],
            )
            for manifest in manifests
        ],
    )


def _print_version(version: ModelVersion) -> None:
    manifest = version.manifest
    batching = manifest.batching
    click.echo(f"{manifest.model} version {manifest.version}, pushed {manifest.created}")
    _print_signature(manifest)
    if manifest.code is not None:
        click.echo(f"  code     {manifest.code.file}:{manifest.code.class_name}")
    bounds = f"at most {batching.max_rows} rows" if batching.batched else "none: one at a time"
    cost = f", cost {batching.max_cost}" if batching.max_cost is not None else ""
    click.echo(f"  batches  {bounds}{cost}, {batching.execution}")
    for name, ragged in batching.ragged.items():
        click.echo(f"  ragged   {name} axis {ragged.axis}, padded with {ragged.value:g}")
    click.echo(f"  golden   {manifest.golden.tolerance.rule}")
    click.echo(f"  digest   {manifest.digest}")
    click.echo(f"  folder   {shown_path(version.folder)}")
    for path, entry in manifest.files.items():
        click.echo(f"  file     {path} ({_size(entry.size_bytes)})")
    for key, value in manifest.metadata.items():
        click.echo(f"  {key}: {value}")


def _size(size_bytes: int) -> str:
    size = float(size_bytes)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"


@models.command(
    epilog="\b\nExamples:\n  rayprism models verify\n  rayprism models verify flights 3 --load"
)
@click.argument("model", required=False)
@click.argument("version", type=click.IntRange(1), required=False)
@repository_option
@click.option("--load", is_flag=True, help="Also load it and reproduce its golden example.")
@click.option("--allow-code", is_flag=True, help="With --load: run code that comes with a model.")
@click.pass_context
def verify(
    ctx: click.Context,
    model: str | None,
    version: int | None,
    repository: Path,
    load: bool,
    allow_code: bool,
) -> None:
    """Compare every file of the repository, of MODEL, or of one VERSION with its digest.

    Exit codes: 0 all is as it was pushed, 1 something is not, 2 wrong usage.
    """
    from rayprism.models.repository import Repository

    found = Repository(repository)
    names = found.models() if model is None else [model]
    bad = checked = 0
    for name in names:
        for number in found.versions(name) if version is None else [version]:
            checked += 1
            try:
                note = _verify(found.version(name, number), load=load, allow_code=allow_code)
            except RayprismError as error:
                bad += 1
                click.echo(f"{click.style('bad', fg='red')}  {name} {number}: {error}")
            else:
                click.echo(f"{click.style('ok', fg='green')}   {name} {number}{note}")
    if not checked:
        click.echo(f"no models in {repository}")
    ctx.exit(1 if bad else 0)


def _verify(version: ModelVersion, *, load: bool, allow_code: bool) -> str:
    version.verify()
    if not load:
        return ""
    from rayprism.models.loader import load_model

    loaded = load_model(version, allow_code=allow_code)
    loaded.close()
    return f", golden example reproduced, loaded in {sum(loaded.load_s.values()):.2f} s"


@models.command(
    epilog="\b\nExamples:\n"
    "  rayprism models copy ./models s3://models\n"
    "  rayprism models copy 's3://models?endpoint_override=store:8333&scheme=http' /models"
)
@click.argument("source")
@click.argument("target")
def copy(source: str, target: str) -> None:
    """Copy to TARGET every version of SOURCE that it lacks.

    Each is a folder, or a URI in object storage (s3://, gs://, abfs://). Files are compared with
    their digests on the way, and a version appears whole or not at all. Nothing is changed or
    deleted in TARGET. Journals are not copied.
    """
    from rayprism.models.copying import copy_versions
    from rayprism.offline.filesystems import open_filesystem

    done = copy_versions(open_filesystem(source), open_filesystem(target), say=say)
    click.echo(f"{len(done.copied)} copied, {len(done.present)} were there")
