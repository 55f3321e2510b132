"""The OpenAPI document of a server and its models, and the page that shows it.

Source: OpenAPI Specification 3.1.1; the endpoints are those of the Open Inference Protocol v2 and
of Triton's extensions. The server answers over the same paths that are named here; see
`rayprism.protocol.page` for the page.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any
from urllib.parse import quote

import numpy as np
import orjson

from rayprism.core.tensors import Array, Datatype, TensorSpec, datatype_of
from rayprism.core.values import values_from_array
from rayprism.protocol.metadata import ServedModel, model_metadata, server_metadata
from rayprism.protocol.page import docs_page
from rayprism.protocol.schemas import HEADERS, PARAMETERS, RESPONSES, SCHEMAS, VERSION_HEADER

__all__ = ["docs_page", "example_request", "openapi_document"]

_MAX_EXAMPLE_VALUES = 4096
"""Longer examples (images) would make the document too heavy to read."""
_VALUES = {
    Datatype.BOOL: "Booleans",
    Datatype.BYTES: "Strings",
}
_MODEL_GETS = (
    ("", "metadata", "Inputs and outputs", "ModelMetadata", "404"),
    ("/ready", "ready", "Whether it would answer now", "ModelReady", "404", "503"),
    ("/config", "config", "Batching and scheduling", "ModelConfig", "404"),
    ("/stats", "stats", "Counts and times of a replica", "ModelStatistics", "404"),
    ("/traffic", "traffic", "Who gets the requests of a replica", "ModelTraffic", "404"),
)
"""What a model tells of itself: end of the path, name, summary, schema, errors."""
_DESCRIPTION = """\
Versioned machine-learning models behind the Open Inference Protocol v2.

**Time-outs.** `parameters.timeout` of a request is in microseconds; a request that cannot be
served in that time is answered 504. The header `x-rayprism-timeout-s` says it in seconds; the
smaller of both counts. **Priorities.** `parameters.priority` runs from 1, which is served first.

**Versions.** A model may give a share of its requests to another version. Every answer of a model,
errors too, says in the header `x-rayprism-version` which version gave it. The same header on a
request asks for a version: that one answers, or the answer says why not. Who gets which share, and
what became of it, is under `/traffic` of the model.

**Binary tensors.** Instead of `data` an input can have `parameters.binary_data_size`; its bytes
then follow the JSON, in the order of the inputs, and the header `Inference-Header-Content-Length`
says how long the JSON is. Outputs come that way where `parameters.binary_data_output` of the
request, or `parameters.binary_data` of the output, is true.

**Compression.** Bodies may be sent with `Content-Encoding: gzip` or `deflate`, and come
compressed where `Accept-Encoding` asks for it.
"""


def openapi_document(models: Sequence[ServedModel], *, server_url: str = "/") -> dict[str, Any]:
    """The OpenAPI 3.1 document of a server.

    Args:
        models: The served versions. Of several versions of one model, the first that is its
            default answers requests that name no version.
        server_url: What stands in front of every path; relative ones are taken from the document.

    Returns:
        A document of plain values. Under `x-rayprism-models` it says once more, for the page, what
        each version takes and gives.
    """
    paths = _server_paths()
    schemas: dict[str, Any] = dict(SCHEMAS)
    tags = [{"name": "server", "description": "The server itself"}]
    shown: list[dict[str, Any]] = []
    defaults: set[str] = set()
    for model in models:
        is_default = model.is_default and model.name not in defaults
        if is_default:
            defaults.add(model.name)
        root = f"/v2/models/{quote(model.name, safe='')}"
        versioned = f"{root}/versions/{quote(model.version, safe='')}"
        tag = f"{model.name} {model.version}"
        tags.append({"name": tag, "description": model.description})
        key = re.sub(r"[^A-Za-z0-9._-]", "_", f"{model.name}.{model.version}")
        schemas[f"{key}.Request"] = _request_schema(model)
        schemas[f"{key}.Response"] = _response_schema(model)
        example = example_request(model)
        for path, suffix in ((root, "default"), (versioned, model.version)):
            if path == versioned or is_default:
                # A version that the path names is not asked for otherwise.
                parameters = [n for n in PARAMETERS if path == root or n != VERSION_HEADER]
                operations = _model_paths(path, key, f"{key}.{suffix}", tag, parameters, example)
                paths.update({p: item for p, item in operations.items() if p not in paths})
        shown.append(
            {
                **model_metadata(model),
                "version": model.version,
                "description": model.description,
                "isDefault": is_default,
                "inferPath": f"{root if is_default else versioned}/infer",
                "inputs": [_shown(spec, model.batched) for spec in model.inputs],
                "outputs": [_shown(spec, model.batched) for spec in model.outputs],
                "exampleText": _request_text(example or _template(model)),
                "exampleIsReal": example is not None,
            }
        )
    return {
        "openapi": "3.1.1",
        "info": {
            "title": "rayprism",
            "version": server_metadata()["version"],
            "summary": "Models behind the Open Inference Protocol v2",
            "description": _DESCRIPTION,
        },
        "servers": [{"url": server_url}],
        "tags": tags,
        "paths": paths,
        "components": {
            "schemas": schemas,
            "responses": RESPONSES,
            "headers": HEADERS,
            "parameters": PARAMETERS,
        },
        "x-rayprism-models": shown,
    }


def example_request(model: ServedModel) -> dict[str, Any] | None:
    """A JSON request made of the model's example; only its first row where it is batched.

    Returns:
        None where there is no example, where JSON cannot carry it, or where it is too long.
    """
    if not model.example:
        return None
    inputs = []
    count = 0
    for spec in model.inputs:
        array = model.example.get(spec.name)
        if array is None:
            return None
        if model.batched:
            array = array[:1]
        count += array.size
        if count > _MAX_EXAMPLE_VALUES:
            return None
        try:
            inputs.append(_example_tensor(spec.name, array))
        except ValueError:
            return None
    return {"inputs": inputs}


def _example_tensor(name: str, array: Array) -> dict[str, Any]:
    datatype = datatype_of(array)
    values = values_from_array(array)
    if datatype.is_float:
        # Written and read again, 0.1 as FP32 stays 0.1, and NaN becomes null.
        wide = array.ravel().astype(np.float64 if datatype is Datatype.FP64 else np.float32)
        if np.isinf(wide).any():
            raise ValueError("JSON cannot carry infinities")
        values = orjson.loads(orjson.dumps(wide, option=orjson.OPT_SERIALIZE_NUMPY))
    return {
        "name": name,
        "datatype": datatype.value,
        "shape": list(array.shape),
        "data": values,
    }


def _request_text(request: dict[str, Any]) -> str:
    """A request as people read it: one tensor a line."""
    tensors = ",\n".join(f"    {orjson.dumps(tensor).decode()}" for tensor in request["inputs"])
    return f'{{\n  "inputs": [\n{tensors}\n  ]\n}}'


def _template(model: ServedModel) -> dict[str, Any]:
    """A request with the right names and datatypes, for people to fill in."""
    return {
        "inputs": [
            {
                "name": spec.name,
                "datatype": spec.datatype.value,
                "shape": [1 if size == -1 else size for size in _free_rows(spec, model.batched)],
                "data": [],
            }
            for spec in model.inputs
        ]
    }


def _free_rows(spec: TensorSpec, batched: bool) -> list[int]:
    return [-1, *spec.shape[1:]] if batched else list(spec.shape)


def _shown(spec: TensorSpec, batched: bool) -> dict[str, Any]:
    return {
        "name": spec.name,
        "datatype": spec.datatype.value,
        "shape": _free_rows(spec, batched),
        "description": spec.description,
        "allowNan": spec.allow_nan if spec.datatype.is_float else None,
    }


def _tensor_schema(spec: TensorSpec, batched: bool) -> dict[str, Any]:
    sizes = [
        {"type": "integer", "minimum": 1} if size == -1 else {"const": size}
        for size in _free_rows(spec, batched)
    ]
    values = _VALUES.get(spec.datatype, "Floats" if spec.datatype.is_float else "Integers")
    schema: dict[str, Any] = {
        "type": "object",
        "required": ["name", "datatype", "shape"],
        "properties": {
            "name": {"const": spec.name},
            "datatype": {"const": spec.datatype.value},
            "shape": {
                "type": "array",
                **({"prefixItems": sizes} if sizes else {}),
                "minItems": len(sizes),
                "maxItems": len(sizes),
            },
            "data": {"$ref": f"#/components/schemas/{values}"},
            "parameters": {"$ref": "#/components/schemas/TensorParameters"},
        },
    }
    if spec.description:
        schema["description"] = spec.description
    return schema


def _request_schema(model: ServedModel) -> dict[str, Any]:
    return {
        "type": "object",
        "required": ["inputs"],
        "properties": {
            "id": {"type": "string", "maxLength": 1024, "description": "Echoed in the answer"},
            "parameters": {"$ref": "#/components/schemas/RequestParameters"},
            "inputs": {
                "type": "array",
                "minItems": len(model.inputs),
                "maxItems": len(model.inputs),
                "items": {"oneOf": [_tensor_schema(spec, model.batched) for spec in model.inputs]},
            },
            "outputs": {
                "type": "array",
                "description": "The outputs that are wanted; all where it is left out",
                "items": {
                    "type": "object",
                    "required": ["name"],
                    "properties": {
                        "name": {"enum": [spec.name for spec in model.outputs]},
                        "parameters": {"$ref": "#/components/schemas/OutputParameters"},
                    },
                },
            },
        },
    }


def _response_schema(model: ServedModel) -> dict[str, Any]:
    return {
        "type": "object",
        "required": ["model_name", "model_version", "outputs"],
        "properties": {
            "model_name": {"type": "string"},
            "model_version": {"type": "string"},
            "id": {"type": "string"},
            "outputs": {
                "type": "array",
                "items": {"oneOf": [_tensor_schema(spec, model.batched) for spec in model.outputs]},
            },
        },
    }


def _ref(kind: str, name: str) -> dict[str, str]:
    return {"$ref": f"#/components/{kind}/{name}"}


def _json(schema: dict[str, Any], description: str, **extra: Any) -> dict[str, Any]:
    return {
        "description": description,
        "content": {"application/json": {"schema": schema, **extra}},
    }


def _get(
    operation_id: str,
    tag: str,
    summary: str,
    schema: str,
    *errors: str,
    headers: Sequence[str] = (),
) -> dict[str, Any]:
    answer = _json(_ref("schemas", schema), "The answer")
    if headers:
        answer["headers"] = {name: _ref("headers", name) for name in headers}
    return {
        "get": {
            "operationId": operation_id,
            "tags": [tag],
            "summary": summary,
            "responses": {
                "200": answer,
                **{status: _ref("responses", f"Error{status}") for status in errors},
            },
        }
    }


def _server_paths() -> dict[str, Any]:
    return {
        "/v2": _get("server", "server", "Name, version, extensions", "ServerMetadata"),
        "/v2/health/live": _get("live", "server", "Whether the process answers", "Live"),
        "/v2/health/ready": _get(
            "ready", "server", "Whether every model that should be served is ready", "Ready", "503"
        ),
        "/v2/repository/index": {
            "post": {
                "operationId": "index",
                "tags": ["server"],
                "summary": "The served versions and their states",
                "responses": {
                    "200": _json(_ref("schemas", "RepositoryIndex"), "One entry for each version")
                },
            }
        },
    }


def _model_paths(
    path: str,
    key: str,
    operation: str,
    tag: str,
    parameters: Sequence[str],
    example: dict[str, Any] | None,
) -> dict[str, Any]:
    examples = {} if example is None else {"example": example}
    infer = {
        "operationId": f"infer.{operation}",
        "tags": [tag],
        "summary": "Inference",
        "parameters": [_ref("parameters", name) for name in parameters],
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {"schema": _ref("schemas", f"{key}.Request"), **examples},
                "application/octet-stream": {},
            },
        },
        "responses": {
            "200": {
                "description": "The outputs",
                "headers": {
                    name: _ref("headers", name)
                    for name in (
                        "Inference-Header-Content-Length",
                        "Content-Encoding",
                        VERSION_HEADER,
                    )
                },
                "content": {
                    "application/json": {"schema": _ref("schemas", f"{key}.Response")},
                    "application/octet-stream": {},
                },
            },
            **{
                name.removeprefix("Error"): _ref("responses", name)
                for name in RESPONSES
                if name.startswith("Error")
            },
        },
    }
    return {
        f"{path}/infer": {"post": infer},
        **{
            f"{path}{end}": _get(
                f"{name}.{operation}", tag, summary, schema, *errors, headers=(VERSION_HEADER,)
            )
            for end, name, summary, schema, *errors in _MODEL_GETS
        },
    }
