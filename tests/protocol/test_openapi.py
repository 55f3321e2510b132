from __future__ import annotations

import base64
import hashlib
import html
import re
from html.parser import HTMLParser
from typing import Any

import jsonschema
import numpy as np
import orjson
import pytest

from rayprism.core.tensors import Datatype, TensorSpec, numpy_dtype
from rayprism.models.push import push_model
from rayprism.models.repository import ModelVersion, Repository
from rayprism.protocol.http import decode_infer_request, encode_infer_response
from rayprism.protocol.metadata import (
    ServedModel,
    model_config,
    model_metadata,
    model_ready,
    model_statistics,
    repository_index,
    server_metadata,
)
from rayprism.protocol.openapi import docs_page, example_request, openapi_document
from rayprism.protocol.status import http_status
from rayprism.serving.traffic import TIMEOUT_HEADER, VERSION_HEADER
from tests.protocol.tensors import assert_same
from tests.protocol.test_metadata import INDEX, STATISTICS
from tests.protocol.test_status import EXPECTED, make
from tests.support.asyncs import async_test, until
from tests.support.models import mlp_example, save_mlp
from tests.support.versions import fleet

EXAMPLE = {
    "origin": np.array([[b"JFK"], [b"LGA"]], np.object_),
    "distance": np.array([[np.nan], [2.0]], np.float32),
}
STABLE = ServedModel(
    "flights",
    "3",
    (
        TensorSpec("origin", Datatype.BYTES, (-1, 1), description="</script><b>IATA</b>"),
        TensorSpec("distance", Datatype.FP32, (8, 1), allow_nan=False),
    ),
    (TensorSpec("delay", Datatype.FP32, (-1, 1)),),
    description="Delays & more <script>alert(1)</script>",
    example=EXAMPLE,
)
CANDIDATE = ServedModel("flights", "4", STABLE.inputs, STABLE.outputs, is_default=False)
OTHER = ServedModel(
    "n.e-w_1",
    "1",
    (TensorSpec("ids", Datatype.INT64, (2, -1)), TensorSpec("on", Datatype.BOOL, (2,))),
    (TensorSpec("n", Datatype.UINT8, ()),),
    batched=False,
    example={"ids": np.array([[2**63 - 1], [1]]), "on": np.array([True, False])},
)
MODELS = [STABLE, CANDIDATE, OTHER]
DOCUMENT = openapi_document(MODELS)


def resolve(reference: str) -> Any:
    assert reference.startswith("#/")
    found: Any = DOCUMENT
    for part in reference[2:].split("/"):
        found = found[part]
    return found


def references(value: Any) -> list[str]:
    if isinstance(value, dict):
        own = [value["$ref"]] if isinstance(value.get("$ref"), str) else []
        return own + [found for inner in value.values() for found in references(inner)]
    if isinstance(value, list):
        return [found for inner in value for found in references(inner)]
    return []


def check(schema: str, instance: Any) -> None:
    whole = {"$ref": f"#/components/schemas/{schema}", "components": DOCUMENT["components"]}
    jsonschema.Draft202012Validator(whole).validate(instance)


def closed(schema: Any) -> Any:
    """The same schema, but for keys that it does not describe."""
    if isinstance(schema, list):
        return [closed(inner) for inner in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        return closed(resolve(schema["$ref"]))
    extra = {"additionalProperties": False} if "properties" in schema else {}
    return {key: closed(inner) for key, inner in schema.items()} | extra


def operations() -> list[tuple[str, str, dict[str, Any]]]:
    return [
        (path, method, operation)
        for path, item in DOCUMENT["paths"].items()
        for method, operation in item.items()
    ]


def test_the_structure_is_openapi() -> None:
    assert re.fullmatch(r"3\.1\.\d+", DOCUMENT["openapi"])
    assert DOCUMENT["info"]["title"]
    assert DOCUMENT["info"]["version"]
    orjson.dumps(DOCUMENT)
    for reference in references(DOCUMENT):
        resolve(reference)
    for kind, components in DOCUMENT["components"].items():
        for name, component in components.items():
            assert re.fullmatch(r"[a-zA-Z0-9._-]+", name), name
            if kind == "schemas":
                jsonschema.Draft202012Validator.check_schema(component)
    identifiers = [operation["operationId"] for _, _, operation in operations()]
    assert len(identifiers) == len(set(identifiers))
    tags = {tag["name"] for tag in DOCUMENT["tags"]}
    for path, method, operation in operations():
        assert path.startswith("/v2")
        assert method in ("get", "post")
        assert set(operation["tags"]) <= tags
        assert operation["summary"]
        for status, response in operation["responses"].items():
            assert re.fullmatch(r"[2-5]\d\d", status)
            target = resolve(response["$ref"]) if "$ref" in response else response
            assert target["description"]
        for parameter in map(resolve, references(operation.get("parameters", []))):
            assert parameter["in"] == "header"
            assert parameter["name"]
            assert parameter["schema"]


def test_every_endpoint_is_there() -> None:
    paths = set(DOCUMENT["paths"])
    expected = {"/v2", "/v2/health/live", "/v2/health/ready", "/v2/repository/index"}
    for root in (
        "/v2/models/flights",
        "/v2/models/flights/versions/3",
        "/v2/models/flights/versions/4",
        "/v2/models/n.e-w_1",
        "/v2/models/n.e-w_1/versions/1",
    ):
        ends = ("infer", "ready", "config", "stats", "traffic")
        expected |= {root, *(f"{root}/{end}" for end in ends)}
    assert paths == expected


def test_a_model_without_a_default_has_no_path_without_a_version() -> None:
    paths = openapi_document([CANDIDATE])["paths"]
    assert "/v2/models/flights/infer" not in paths
    assert "/v2/models/flights/versions/4/infer" in paths


def test_the_first_default_gets_the_path_without_a_version() -> None:
    document = openapi_document([STABLE, ServedModel("flights", "4", OTHER.inputs, OTHER.outputs)])
    content = document["paths"]["/v2/models/flights/infer"]["post"]["requestBody"]["content"]
    assert content["application/json"]["schema"]["$ref"].endswith("/flights.3.Request")
    assert [m["isDefault"] for m in document["x-rayprism-models"]] == [True, False]


def test_every_error_is_described() -> None:
    infer = DOCUMENT["paths"]["/v2/models/flights/infer"]["post"]["responses"]
    for kind in EXPECTED:
        assert str(http_status(make(kind))) in infer


@pytest.mark.parametrize(
    ("path", "may_ask"),
    [
        ("/v2/models/flights/infer", True),
        ("/v2/models/flights/versions/3/infer", False),
        ("/v2/models/flights/versions/4/infer", False),
    ],
)
def test_requests_may_name_a_version_once_and_a_time_out(path: str, may_ask: bool) -> None:
    infer = DOCUMENT["paths"][path]["post"]
    parameters = {p["name"]: p["schema"] for p in map(resolve, references(infer["parameters"]))}
    assert TIMEOUT_HEADER in parameters
    assert (VERSION_HEADER in parameters) == may_ask
    cases: list[tuple[str, Any, bool]] = [
        (TIMEOUT_HEADER, 0.25, True),
        (TIMEOUT_HEADER, 86_400, True),
        (TIMEOUT_HEADER, 0, False),
        (TIMEOUT_HEADER, 86_401, False),
        (VERSION_HEADER, "3", True),
        (VERSION_HEADER, "newest", False),
    ]
    for name, value, fits in cases:
        if name in parameters:
            validator = jsonschema.Draft202012Validator(parameters[name])
            assert validator.is_valid(value) == fits, (name, value)


def test_every_answer_of_a_model_says_which_version_gave_it() -> None:
    for path, _, operation in operations():
        if path.startswith("/v2/models/"):
            for status, response in operation["responses"].items():
                target = resolve(response["$ref"]) if "$ref" in response else response
                assert VERSION_HEADER in target["headers"], (path, status)


@pytest.mark.parametrize("model", [STABLE, OTHER])
def test_examples_are_requests_that_fit_their_schema(model: ServedModel) -> None:
    content = DOCUMENT["paths"][f"/v2/models/{model.name}/infer"]["post"]["requestBody"]["content"]
    example = content["application/json"]["example"]
    assert example == example_request(model)
    check(f"{model.name}.{model.version}.Request", example)
    tensors = decode_infer_request(orjson.dumps(example)).tensors
    assert list(tensors) == [spec.name for spec in model.inputs]
    if model.batched:
        assert all(len(array) == 1 for array in tensors.values())
    shown = next(m for m in DOCUMENT["x-rayprism-models"] if m["name"] == model.name)
    assert orjson.loads(shown["exampleText"]) == example
    assert shown["exampleIsReal"]


@pytest.mark.parametrize("datatype", [Datatype.FP16, Datatype.BF16, Datatype.FP32, Datatype.FP64])
def test_examples_of_floats_are_short(datatype: Datatype) -> None:
    array = np.array([[0.5, 0.1, np.nan]]).astype(numpy_dtype(datatype))
    model = ServedModel("m", "1", (TensorSpec("x", datatype, (-1, 3)),), (), example={"x": array})
    example = example_request(model)
    assert example is not None
    (tensor,) = example["inputs"]
    assert tensor["data"][0] == 0.5
    assert tensor["data"][2] is None
    assert len(str(tensor["data"][1])) < 12
    assert_same(decode_infer_request(orjson.dumps(example)).tensors["x"], array)


def test_the_schema_refuses_what_the_model_does() -> None:
    good = example_request(STABLE)
    assert good is not None
    for path, value in (
        (("inputs", 0, "name"), "elsewhere"),
        (("inputs", 0, "datatype"), "FP32"),
        (("inputs", 0, "shape"), [1, 2]),
        (("inputs", 0, "shape"), [1]),
        (("inputs", 0, "data"), [1]),
        (("inputs", 1, "data"), ["1"]),
        (("inputs",), []),
        (("inputs",), good["inputs"][:1]),
    ):
        bad = orjson.loads(orjson.dumps(good))
        target = bad
        for key in path[:-1]:
            target = target[key]
        target[path[-1]] = value
        with pytest.raises(jsonschema.ValidationError):
            check("flights.3.Request", bad)


def test_answers_fit_their_schemas() -> None:
    check("ServerMetadata", server_metadata())
    check("ModelMetadata", model_metadata(STABLE))
    check("ModelReady", model_ready(STABLE))
    check("ModelConfig", model_config(STABLE))
    check("ModelConfig", model_config(OTHER))
    check("ModelStatistics", model_statistics([(STABLE, STATISTICS)]))
    check("RepositoryIndex", repository_index(INDEX))
    request = decode_infer_request(orjson.dumps(example_request(STABLE)))
    for value in (1.0, np.nan):
        outputs = {"delay": np.array([[value]], np.float32)}
        check(
            "flights.3.Response", orjson.loads(encode_infer_response("m", "3", request, outputs)[0])
        )


@pytest.fixture(scope="module")
def versions(tmp_path_factory: pytest.TempPathFactory) -> list[ModelVersion]:
    """Two versions of a model that answer otherwise."""
    folder = tmp_path_factory.mktemp("versions")
    repository = Repository(folder / "models")
    return [
        push_model(
            repository, "m", save_mlp(folder / f"{n}.onnx", seed=n), example=mlp_example()
        ).version
        for n in (1, 2)
    ]


TRAFFIC_BEFORE = {
    "model_name": "m",
    "model_version": "1",
    "weights": {"1": 100},
    "sticky": None,
    "shadow": {},
    "candidates": {},
    "shadows": {},
}


@async_test
async def test_what_a_model_tells_of_its_traffic_fits_its_schema(
    versions: list[ModelVersion],
) -> None:
    strict = jsonschema.Draft202012Validator(closed(resolve("#/components/schemas/ModelTraffic")))
    row = {"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [1, 2, 3, 4]}
    async with fleet(versions) as (stable, _):

        async def infer(user: str) -> str:
            got = await stable.client.post(
                "/v2/models/m/infer", json={"inputs": [row]}, headers={"x-user": user}
            )
            assert got.status_code == 200, got.text
            return got.headers[VERSION_HEADER]

        before = (await stable.client.get("/v2/models/m/traffic")).json()
        assert before == TRAFFIC_BEFORE
        strict.validate(before)
        shares: dict[str, Any] = {
            "candidates": [{"version": 2, "weight": 33.33}, {"version": 4, "weight": 33.34}],
            "sticky": {"header": "x-user"},
            "shadow": [{"version": 2, "sample": 100}, {"version": 9, "sample": 99.99}],
        }
        assert stable.service.reconfigure({"traffic": shares})
        users = [f"u{number}" for number in range(24)]
        assert {await infer(user) for user in users} == {"1", "2"}
        await until(lambda: stable.shadow(2)["compared"] and stable.shadow(9)["failed"])
        after = (await stable.client.get("/v2/models/m/traffic")).json()
        strict.validate(after)
        assert after["candidates"]["2"]["answered"]
        assert after["candidates"]["4"]["fallbacks"]
        assert after["shadows"]["2"]["outputs"]["y"]["disagreed"]


@pytest.mark.parametrize(
    "wrong",
    [
        {"weights": {"stable": 100}},
        {"weights": {"1": 101}},
        {"weights": {"1": "100"}},
        {"sticky": "x-user"},
        {"candidates": {"2": {"answered": 1}}},
        {"shadows": {"2": {"compared": -1, "dropped": {}, "failed": {}, "outputs": {}}}},
    ],
    ids=lambda wrong: ".".join(wrong),
)
def test_the_schema_of_traffic_refuses_other_documents(wrong: dict[str, Any]) -> None:
    check("ModelTraffic", TRAFFIC_BEFORE)
    with pytest.raises(jsonschema.ValidationError):
        check("ModelTraffic", TRAFFIC_BEFORE | wrong)


@pytest.mark.parametrize(
    "example",
    [
        None,
        {},
        {"origin": EXAMPLE["origin"]},
        {**EXAMPLE, "origin": np.array([[b"\xff"]], np.object_)},
        {**EXAMPLE, "distance": np.array([[np.inf]], np.float32)},
        {**EXAMPLE, "distance": np.array([[1j]])},
        {**EXAMPLE, "distance": np.zeros((1, 5000), np.float32)},
    ],
    ids=["none", "empty", "missing", "not UTF-8", "infinite", "complex", "long"],
)
def test_without_an_example_that_fits_there_is_a_template(example: Any) -> None:
    model = ServedModel("flights", "3", STABLE.inputs, STABLE.outputs, example=example)
    assert example_request(model) is None
    document = openapi_document([model])
    (shown,) = document["x-rayprism-models"]
    assert not shown["exampleIsReal"]
    assert orjson.loads(shown["exampleText"])["inputs"] == [
        {"name": "origin", "datatype": "BYTES", "shape": [1, 1], "data": []},
        {"name": "distance", "datatype": "FP32", "shape": [1, 1], "data": []},
    ]
    content = document["paths"]["/v2/models/flights/infer"]["post"]["requestBody"]["content"]
    assert "example" not in content["application/json"]


def test_no_models() -> None:
    document = openapi_document([], server_url="/inner")
    assert document["x-rayprism-models"] == []
    assert document["servers"] == [{"url": "/inner"}]


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def test_the_page_loads_nothing_from_elsewhere() -> None:
    text = docs_page("/v2/openapi.json")
    page = Page(text)
    for tag, attributes in page.tags:
        assert tag not in ("img", "iframe", "object", "embed")
        assert not (tag == "script" and attributes)
        for name in ("src", "href", "action"):
            target = attributes.get(name)
            assert target is None or target.startswith(("#", "data:,", "/v2/openapi.json"))
    assert "://" not in text
    assert "@import" not in text
    assert "url(" not in text[: text.index("<script>")]


def test_the_page_allows_only_its_own_script_and_style() -> None:
    text = docs_page("openapi.json")
    policy = next(a["content"] for tag, a in Page(text).tags if "http-equiv" in a)
    assert policy is not None
    for tag, directive in (("script", "script-src"), ("style", "style-src")):
        (inside,) = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
        assert f"{directive} 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy


def test_the_page_makes_no_markup_of_data() -> None:
    text = docs_page("openapi.json")
    for way in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
        assert way not in text


def test_the_page_escapes_the_address() -> None:
    address = '"><script>alert(1)</script>&'
    text = docs_page(address)
    assert "<script>alert" not in text
    assert html.escape(address) in text
    (main,) = [attributes for tag, attributes in Page(text).tags if tag == "main"]
    assert main["data-document"] == address


def test_the_page_is_accessible() -> None:
    page = Page(docs_page("openapi.json"))
    tags = [tag for tag, _ in page.tags]
    assert ("html", {"lang": "en"}) in page.tags
    for landmark in ("header", "nav", "main", "footer", "h1", "title", "noscript"):
        assert landmark in tags
    assert any(attributes.get("class") == "skip" for _, attributes in page.tags)
