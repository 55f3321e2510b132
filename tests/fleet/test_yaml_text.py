"""Only what is meant changes in the text of a YAML file."""

from __future__ import annotations

import difflib
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from rayprism.fleet.yaml_text import CannotRewrite, rewrite, same_data


def changed_lines(before: str, after: str) -> list[str]:
    lines = list(difflib.unified_diff(before.splitlines(), after.splitlines(), lineterm="", n=0))
    return [line for line in lines[2:] if not line.startswith("@@")]


KEYS = st.text("abcxyz", min_size=1, max_size=3) | st.sampled_from(
    ["on", "no", "version", "1", "a b"]
)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=6)
    | st.sampled_from(["yes", "1e3", "0o7", "012", "2020-01-01", "a: b", "# no", "~", "=", "é\n\t"])
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=10,
)
MAPPINGS = st.dictionaries(KEYS, VALUES, min_size=1, max_size=4)


@given(MAPPINGS, MAPPINGS, st.sampled_from([None, False, True]), st.booleans())
def test_the_text_says_what_it_is_to_say(old, new, flow, sharing):
    if sharing:
        new = {**old, **new}
    text = yaml.safe_dump(old, default_flow_style=flow, sort_keys=False, allow_unicode=True)
    try:
        result = rewrite(text, new)
    except CannotRewrite:
        # Of what nothing is left, nothing can be kept.
        assert not sharing or not any(new[key] == value for key, value in old.items())
        return
    assert same_data(yaml.safe_load(result), new)
    # Of the text, not of what it was made of: PyYAML does not read back each line break it writes.
    if same_data(yaml.safe_load(text), new):
        assert result == text


def test_untouched_lines_are_kept_byte_for_byte():
    text = (
        "%YAML 1.1\n---\n"
        "a:   1   # one\n"
        "'b': \"two\"\n\n"
        "c: {x: 0x10,   y: 010}\n"
        "d: >\n  folded\n  text\n\n"
        "e:\n- - 1\n  - 2\n"
        "f: 'end'"
    )
    data = yaml.safe_load(text)
    assert rewrite(text, data) == text
    data["a"] = 5
    data["b"] = "three"
    data["c"]["x"] = 17
    data["f"] = "it's"
    assert rewrite(text, data) == (
        text.replace("a:   1 ", "a:   5 ")
        .replace('"two"', '"three"')
        .replace("0x10", "17")
        .replace("'end'", "'it''s'")
    )


def test_a_key_is_added_before_what_comes_next():
    text = "a:\n  b:\n    c: 1  # one\n\n# About d.\nd: 2\n"
    new = {"a": {"b": {"c": 1, "t": {"x": [{"version": "4", "weight": 5}]}}}, "d": 2}
    assert rewrite(text, new) == (
        'a:\n  b:\n    c: 1  # one\n    t:\n      x:\n        - {version: "4", weight: 5}\n\n'
        "# About d.\nd: 2\n"
    )


@pytest.mark.parametrize(
    ("text", "dash"),
    [("l:\n- n: 1\na: 1\n", "  - "), ("l:\n  - n: 1\na: 1\n", "    - ")],
)
def test_lists_are_indented_as_in_the_file(text, dash):
    new = {"l": [{"n": 1}], "a": 1, "t": {"x": [{"v": 1}], "y": 2}}
    assert f"t:\n  x:\n{dash}{{v: 1}}\n" in rewrite(text, new)


@pytest.mark.parametrize(
    ("text", "result"),
    [
        ("a:\n  b:  # none yet\nc: 1\n", "a:\n  b:  # none yet\n    t: {x: 1}\n    u: 2\nc: 1\n"),
        ("a:\n  b: {}  # none\nc: 1\n", "a:\n  b:  # none\n    t: {x: 1}\n    u: 2\nc: 1\n"),
        ("a:\n  b: null\nc: 1\n", "a:\n  b:\n    t: {x: 1}\n    u: 2\nc: 1\n"),
        ("a: {b: {}}\nc: 1\n", "a: {b: {t: {x: 1}, u: 2}}\nc: 1\n"),
        ("a: {b: {t: {x: 2}, u: 2}} # f\nc: 1\n", "a: {b: {t: {x: 1}, u: 2}} # f\nc: 1\n"),
        (
            "a:\r\n  b:\r\n    u: 2\r\nc: 1\r\n",
            "a:\r\n  b:\r\n    u: 2\r\n    t: {x: 1}\r\nc: 1\r\n",
        ),
        (
            "\ufeffa:\n  b: {t: {x: 2},\n      u: 2}\nc: 1",
            "\ufeffa:\n  b: {t: {x: 1},\n      u: 2}\nc: 1",
        ),
        ("c: 1\na:\n  b:\n    u: 2", "c: 1\na:\n  b:\n    u: 2\n    t: {x: 1}"),
    ],
)
def test_a_mapping_grows_as_it_is_written(text, result):
    assert rewrite(text, {"a": {"b": {"t": {"x": 1}, "u": 2}}, "c": 1}) == result


def test_the_last_key_leaves_braces():
    text = "a:\n  b:\n    t:\n      x: 1\n    # of t\n\nc: 1\n"
    assert rewrite(text, {"a": {"b": {}}, "c": 1}) == "a:\n  b: {}\n    # of t\n\nc: 1\n"


LIST = """\
# The file.
l:
  # First.
  - name: a
    v: 1

  # Second.
  - name: b
    v: 2
    # v: 3

  # Third.
  - name: c
    v: 3
z: 1
"""


@pytest.mark.parametrize(
    ("gone", "lines"),
    [
        ("a", ["-  # First.", "-  - name: a", "-    v: 1", "-"]),
        ("b", ["-  # Second.", "-  - name: b", "-    v: 2", "-    # v: 3", "-"]),
        ("c", ["-  # Third.", "-  - name: c", "-    v: 3"]),
    ],
)
def test_an_item_goes_with_its_heading(gone, lines):
    data = yaml.safe_load(LIST)
    data["l"] = [item for item in data["l"] if item["name"] != gone]
    found = changed_lines(LIST, rewrite(LIST, data))
    assert sorted(found) == sorted(lines)


@given(st.sets(st.sampled_from("abc")), st.booleans())
def test_any_items_go_and_another_comes(kept, more):
    data = yaml.safe_load(LIST)
    data["l"] = [item for item in data["l"] if item["name"] in kept]
    data["l"] += [{"name": "d", "v": 4}] if more else []
    after = rewrite(LIST, data)
    for name, heading in (("a", "# First."), ("b", "# Second."), ("c", "# Third.")):
        assert (heading in after) == (name in kept)
    assert after.startswith("# The file.\nl:")
    assert after.endswith("\nz: 1\n")
    assert "\n\n\n" not in after


def test_an_item_is_added_and_another_changed():
    data = yaml.safe_load(LIST)
    data["l"][1]["v"] = 9
    data["l"].append({"name": "d", "w": [{"x": {"y": 1}}]})
    assert changed_lines(LIST, rewrite(LIST, data)) == [
        "-    v: 2",
        "+    v: 9",
        "+  - name: d",
        "+    w:",
        "+      - x: {y: 1}",
    ]


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("one: &a {x: 1}\ntwo: *a\n", "two"),
        ("one: &a {x: 1}\ntwo: *a\n", "one"),
        ("base: &a {x: 1}\none: {x: 2}\ntwo:\n  <<: *a\n", "base"),
    ],
)
def test_what_others_share_is_not_changed(text, path):
    data: Any = {key: dict(value) for key, value in yaml.safe_load(text).items()}
    data[path]["x"] = 5
    with pytest.raises(CannotRewrite, match="alias"):
        rewrite(text, data)


def test_what_is_merged_in_is_written_out():
    text = "base: &a {x: 1, y: 2}\ntwo:\n  <<: *a\n  z: 3\n"
    data = {"base": {"x": 1, "y": 2}, "two": {"x": 5, "y": 2, "z": 3}}
    assert rewrite(text, data) == text + "  x: 5\n"


def test_same_data_tells_types_apart():
    assert same_data({"a": [1, "b"]}, {"a": [1, "b"]})
    for other in (1.0, True, "1", None):
        assert not same_data([1], [other])


@pytest.mark.parametrize(
    ("text", "new"),
    [
        ("l:\n- a: 1\n  b: 2\n", {"l": [{"b": 2}]}),
        ("m:\n  ? ''\n  : 1\n  b: 2\n", {"m": {"b": 2}}),
    ],
)
def test_a_key_that_does_not_begin_its_line_is_not_taken_out(text, new):
    with pytest.raises(CannotRewrite, match="does not begin its line"):
        rewrite(text, new)
