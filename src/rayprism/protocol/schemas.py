"""The parts of the OpenAPI document that are the same for every server."""

from __future__ import annotations

from typing import Any

__all__ = ["HEADERS", "PARAMETERS", "RESPONSES", "SCHEMAS", "VERSION_HEADER"]

VERSION_HEADER = "x-rayprism-version"
"""Of a request and of an answer: the key of its parameter, and of its header, below."""


def _object(required: dict[str, Any], optional: dict[str, Any] | None = None) -> dict[str, Any]:
    return {
        "type": "object",
        "required": list(required),
        "properties": {**required, **(optional or {})},
    }


def _list(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items}


def _ref(name: str) -> dict[str, Any]:
    return {"$ref": f"#/components/schemas/{name}"}


def _values(name: str, *kinds: str, description: str) -> dict[str, Any]:
    return {
        "description": f"{description}. Flat in row-major order, or nested to the shape",
        "type": "array",
        "items": {"anyOf": [{"type": list(kinds)}, _ref(name)]},
    }


def _by(key: str, values: dict[str, Any], description: str, **names: Any) -> dict[str, Any]:
    """An object whose keys are data: `key` says what they are, `names` what they look like."""
    return {
        "type": "object",
        "description": f"{description}, by {key}",
        "propertyNames": {"type": "string", **names},
        "additionalProperties": values,
    }


def _by_version(values: dict[str, Any], description: str) -> dict[str, Any]:
    return _by("version", values, description, pattern="^[0-9]+$")


_TEXT: dict[str, Any] = {"type": "string"}
_COUNT: dict[str, Any] = {"type": "integer", "minimum": 0}
_FLAG: dict[str, Any] = {"type": "boolean"}
_PERCENT: dict[str, Any] = {"type": "number", "minimum": 0, "maximum": 100}
_SIZES = _list({"type": "integer", "minimum": -1})
_TENSORS = _list(_object({"name": _TEXT, "datatype": _TEXT, "shape": _SIZES}))
_TENSOR_CONFIGS = _list(_object({"name": _TEXT, "data_type": _TEXT, "dims": _SIZES}))
_DURATIONS = ("success", "fail", "queue", "compute_input", "compute_infer", "compute_output")
_BATCH_DURATIONS = ("compute_input", "compute_infer", "compute_output")

SCHEMAS: dict[str, Any] = {
    "Error": _object({"error": _TEXT}),
    "Live": _object({"live": _FLAG}),
    "Ready": _object({"ready": _FLAG}),
    "ServerMetadata": _object({"name": _TEXT, "version": _TEXT, "extensions": _list(_TEXT)}),
    "ModelReady": _object({"name": _TEXT, "ready": _FLAG}),
    "ModelMetadata": _object(
        {
            "name": _TEXT,
            "versions": _list(_TEXT),
            "platform": _TEXT,
            "inputs": _TENSORS,
            "outputs": _TENSORS,
        }
    ),
    "ModelConfig": _object(
        {
            "name": _TEXT,
            "platform": _TEXT,
            "backend": _TEXT,
            "max_batch_size": _COUNT,
            "input": _TENSOR_CONFIGS,
            "output": _TENSOR_CONFIGS,
        },
        {"dynamic_batching": {"type": "object"}, "version_policy": {"type": "object"}},
    ),
    "Duration": _object({"count": _COUNT, "ns": _COUNT}),
    "ModelStatistics": _object(
        {
            "model_stats": _list(
                _object(
                    {
                        "name": _TEXT,
                        "version": _TEXT,
                        "last_inference": _COUNT,
                        "inference_count": _COUNT,
                        "execution_count": _COUNT,
                        "inference_stats": _object({key: _ref("Duration") for key in _DURATIONS}),
                        "batch_stats": _list(
                            _object(
                                {
                                    "batch_size": _COUNT,
                                    **{key: _ref("Duration") for key in _BATCH_DURATIONS},
                                }
                            )
                        ),
                    }
                )
            )
        }
    ),
    "CandidateCounts": _object(
        {
            "answered": {**_COUNT, "description": "Requests that it answered"},
            "left": {**_COUNT, "description": "Requests whose clients left while it had them"},
            "fallbacks": _by("reason", _COUNT, "Requests that were answered in its place"),
            "resting": {**_FLAG, "description": "It kept failing and is left alone for a while"},
        }
    ),
    "ShadowCounts": _object(
        {
            "compared": {**_COUNT, "description": "Copies whose answers were compared"},
            "dropped": _by("reason", _COUNT, "Copies that were not sent"),
            "failed": _by("reason", _COUNT, "Copies without an answer to compare"),
            "outputs": _by(
                "output",
                _object({"agreed": _COUNT, "disagreed": _COUNT}),
                "Whether it was as the client's answer",
            ),
        }
    ),
    "ModelTraffic": _object(
        {
            "model_name": _TEXT,
            "model_version": {**_TEXT, "description": "Whose replica tells this"},
            "weights": _by_version(_PERCENT, "Percent of the requests"),
            "sticky": {
                "description": "What keeps one user at one version; null where nothing does",
                "anyOf": [_object({"header": _TEXT}), {"type": "null"}],
            },
            "shadow": _by_version(_PERCENT, "Percent of the answered requests that are copied"),
            "candidates": _by_version(
                _ref("CandidateCounts"), "What became of the requests since the replica started"
            ),
            "shadows": _by_version(
                _ref("ShadowCounts"), "What became of the copies since the replica started"
            ),
        }
    ),
    "RepositoryIndex": _list(
        _object(
            {
                "name": _TEXT,
                "version": _TEXT,
                "state": {"enum": ["READY", "LOADING", "UNLOADING", "UNAVAILABLE"]},
                "reason": _TEXT,
            }
        )
    ),
    "Floats": _values("Floats", "number", "null", description="Numbers; null stands for NaN"),
    "Integers": _values("Integers", "integer", description="Whole numbers"),
    "Booleans": _values("Booleans", "boolean", description="true and false"),
    "Strings": _values("Strings", "string", description="Strings, taken as UTF-8"),
    "TensorParameters": _object(
        {},
        {
            "binary_data_size": {
                **_COUNT,
                "description": "Bytes of the tensor behind the JSON, in the place of data",
            },
            "non_finite_as_null": {
                **_FLAG,
                "description": "Of an output: null also stands for infinities",
            },
        },
    ),
    "OutputParameters": _object(
        {}, {"binary_data": {**_FLAG, "description": "Whether it comes as binary tensor data"}}
    ),
    "RequestParameters": _object(
        {},
        {
            "timeout": {**_COUNT, "description": "Microseconds; 0 means the server's default"},
            "priority": {**_COUNT, "description": "From 1, served first; 0 means the default"},
            "binary_data_output": {
                **_FLAG,
                "description": "Whether outputs that do not say come as binary tensor data",
            },
        },
    ),
}

PARAMETERS: dict[str, Any] = {
    "Inference-Header-Content-Length": {
        "name": "Inference-Header-Content-Length",
        "in": "header",
        "description": "Bytes of JSON in front of binary tensors; left out for pure JSON",
        "schema": {"type": "integer", "minimum": 1},
    },
    "Content-Encoding": {
        "name": "Content-Encoding",
        "in": "header",
        "schema": {"enum": ["gzip", "deflate", "identity"]},
    },
    "Accept-Encoding": {"name": "Accept-Encoding", "in": "header", "schema": _TEXT},
    "X-Request-ID": {
        "name": "X-Request-ID",
        "in": "header",
        "description": "Names the request in the server's log; made up where left out",
        "schema": _TEXT,
    },
    VERSION_HEADER: {
        "name": VERSION_HEADER,
        "in": "header",
        "description": "Version that is wanted: it answers, or the answer says why not",
        "schema": {"type": "string", "pattern": "^[0-9]{1,10}$"},
    },
    "x-rayprism-timeout-s": {
        "name": "x-rayprism-timeout-s",
        "in": "header",
        "description": "Seconds it may take; of this and parameters.timeout the smaller counts",
        "schema": {"type": "number", "exclusiveMinimum": 0, "maximum": 86400},
    },
}

HEADERS: dict[str, Any] = {
    "Inference-Header-Content-Length": {
        "description": "Bytes of JSON in front of binary tensors; absent where all is JSON",
        "schema": {"type": "integer", "minimum": 1},
    },
    "Content-Encoding": {
        "description": "Present where the answer is compressed",
        "schema": {"enum": ["gzip", "deflate"]},
    },
    "Retry-After": {
        "description": "Whole seconds until there is room again",
        "schema": {"type": "integer", "minimum": 1},
    },
    VERSION_HEADER: {
        "description": "Version that gave the answer; absent where none did",
        "schema": {"type": "string", "pattern": "^[0-9]{1,10}$"},
    },
}

_ERRORS = {
    "400": "The request is malformed, or is not what the model takes",
    "404": "No such model or version",
    "413": "The body is over the limit, before or after inflating",
    "500": "The model failed",
    "501": "An extension that is not offered: sequences, shared memory, classification",
    "503": "The queue is full, or the version is not ready",
    "504": "It could not be served in the time that the request allowed",
}


def _error(status: str, description: str) -> dict[str, Any]:
    names = [VERSION_HEADER, "Retry-After"] if status == "503" else [VERSION_HEADER]
    return {
        "description": description,
        "headers": {name: {"$ref": f"#/components/headers/{name}"} for name in names},
        "content": {"application/json": {"schema": _ref("Error")}},
    }


RESPONSES: dict[str, Any] = {
    f"Error{status}": _error(status, description) for status, description in _ERRORS.items()
}
