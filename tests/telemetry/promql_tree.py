"""What an expression of PromQL asks for, and which labels its result has."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import promql_parser as promql

Labels = frozenset[str] | None
"""None: whatever the series have."""

_OPERATORS = {
    "MatchOp.Equal": "=",
    "MatchOp.NotEqual": "!=",
    "MatchOp.Re": "=~",
    "MatchOp.NotRe": "!~",
}
# A function that changes labels would need a rule of its own in `result_labels`.
_KEEPS_LABELS = {"rate", "increase", "last_over_time", "max_over_time"}
_SET_OPERATORS = {"and", "or", "unless"}


def walk(node: Any) -> Iterator[Any]:
    """It, and every part of it."""
    yield node
    for child in _children(node):
        yield from walk(child)


def selectors(node: Any) -> Iterator[Any]:
    """The series that it asks for."""
    return (part for part in walk(node) if isinstance(part, promql.VectorSelector))


def summed_selectors(node: Any) -> Iterator[Any]:
    """Those whose labels get as far as here: no aggregation is between."""
    for child in _children(node):
        if isinstance(child, promql.VectorSelector):
            yield child
        elif not isinstance(child, promql.AggregateExpr):
            yield from summed_selectors(child)


def matchers(selector: Any) -> dict[str, tuple[str, str]]:
    """Operator and value by label."""
    return {m.name: (_OPERATORS[str(m.op)], m.value) for m in selector.matchers.matchers}


def name_pattern(selector: Any) -> re.Pattern[str]:
    """The names of the series that it takes."""
    return re.compile(re.escape(selector.name) if selector.name else _named(selector))


def _named(selector: Any) -> str:
    return matchers(selector)["__name__"][1]


def by_labels(node: Any) -> frozenset[str] | None:
    """Of an aggregation: its labels. None: it is no aggregation, or one that keeps all."""
    if not isinstance(node, promql.AggregateExpr) or str(node.op) in ("topk", "bottomk"):
        return None
    if node.modifier is None:
        return frozenset()
    assert node.modifier.type == promql.AggModifierType.By, "`without` keeps what nobody listed"
    return frozenset(node.modifier.labels)


def result_labels(node: Any) -> Labels:
    """The labels that every series of its result has."""
    if isinstance(node, promql.AggregateExpr):
        labels = by_labels(node)
        return result_labels(node.expr) if labels is None else labels
    if isinstance(node, promql.Call):
        return _of_call(node)
    if isinstance(node, promql.BinaryExpr):
        left, right = result_labels(node.lhs), result_labels(node.rhs)
        if isinstance(node.lhs, promql.NumberLiteral):
            return right
        if str(node.op) == "or" and left is not None and right is not None:
            return left & right
        return left
    if isinstance(node, promql.ParenExpr | promql.UnaryExpr | promql.SubqueryExpr):
        return result_labels(node.expr)
    return None


def _of_call(node: Any) -> Labels:
    if node.func.name == "vector":
        return frozenset()
    labels = result_labels(node.args[-1])
    if node.func.name == "histogram_quantile":
        return None if labels is None else labels - {"le"}
    assert node.func.name in _KEEPS_LABELS, node.func.name
    return labels


def mismatches(node: Any) -> list[str]:
    """Operations whose sides have different labels, and so never meet."""
    found = []
    for part in walk(node):
        if not isinstance(part, promql.BinaryExpr):
            continue
        sides = [side for side in (part.lhs, part.rhs) if not _is_number(side)]
        labels = [result_labels(side) for side in sides]
        on = part.modifier.matching if part.modifier is not None else None
        if len(labels) < 2 or None in labels or on is not None:
            continue
        if labels[0] != labels[1]:
            found.append(part.prettify())
    return found


def _is_number(node: Any) -> bool:
    if isinstance(node, promql.ParenExpr):
        return _is_number(node.expr)
    return isinstance(node, promql.NumberLiteral)


def _children(node: Any) -> list[Any]:
    if isinstance(node, promql.Call):
        return list(node.args)
    names = ("lhs", "rhs", "expr", "vector_selector")
    return [child for name in names if (child := getattr(node, name, None)) is not None]
