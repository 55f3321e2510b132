"""Changes the text of a YAML file so that it says something else, and nothing but what has to.

Only the places that differ are written anew; every other byte stays, comments and all. So it works
on the text, at the marks that PyYAML gives, and not by writing the document out again: comments
belong to lines for people, and to the token before them for a round-trip parser, which moves the
heading of the next application when a key is added at the end of the one before.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import yaml

__all__ = ["CannotRewrite", "rewrite", "same_data"]

_STEP = 2
_PLAIN = re.compile(r"[A-Za-z_/][A-Za-z0-9_./-]*")


class CannotRewrite(Exception):
    """The change cannot be made without touching what is not meant; it says where."""


class _OtherKind(CannotRewrite):
    """What holds the value has to write it anew."""


def same_data(one: Any, other: Any) -> bool:
    """Whether two documents say the same; 1, 1.0, True and "1" do not."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(same_data(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same_data, one, other))
    return type(one) is type(other) and bool(one == other)


def rewrite(text: str, new: Any) -> str:
    """The text, changed so that it says something new.

    Args:
        text: YAML, one document, as Serve reads it.
        new: What it is to say: plain JSON values.

    Raises:
        CannotRewrite: What is to change is behind an alias, or written in a way that leaves no
            room for it.
    """
    ended = text.endswith("\n")
    work = _Rewriter(text if ended else f"{text}\n")
    result = work.run(new)
    try:
        said = yaml.safe_load(result)
    except yaml.YAMLError:
        said = None
    if not same_data(said, new):
        # The last word is the parser's: an anchor that others share, a quirk of YAML 1.1.
        raise CannotRewrite("it would have said something else (an alias?)")
    return result if ended else result.removesuffix("\n")


class _Rewriter:
    """Collects splices `(start, end, replacement)` of one text."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._newline = "\r\n" if "\r\n" in text else "\n"
        self._splices: list[tuple[int, int, str]] = []
        self._offset = _STEP

    def run(self, new: Any) -> str:
        root = yaml.compose(self._text, Loader=yaml.SafeLoader)
        if root is None:
            raise CannotRewrite("the file is empty")
        self._offset = _list_offset(root)
        self._change(root, yaml.safe_load(self._text), new, "")
        pieces: list[str] = []
        done = 0
        for start, stop, replacement in sorted(self._splices, key=lambda splice: splice[:2]):
            if start < done:
                # What is deleted may reach into the empty lines and comments of its neighbour.
                if replacement and start < stop:
                    raise CannotRewrite("two changes are in one place")
                start, stop = done, max(stop, done)
            pieces += [self._text[done:start], replacement]
            done = stop
        return "".join([*pieces, self._text[done:]])

    def _change(self, node: yaml.Node, old: Any, new: Any, path: str) -> None:
        """Changes a value that is what it was: a mapping, a list, or anything else."""
        if same_data(old, new):
            return
        if isinstance(node, yaml.MappingNode) and isinstance(new, Mapping) and old and new:
            self._change_mapping(node, old, new, path)
        elif isinstance(node, yaml.SequenceNode) and isinstance(new, list) and old and new:
            self._change_list(node, old, new, path)
        elif isinstance(node, yaml.ScalarNode) and not isinstance(new, (Mapping, list)):
            start, end = node.start_mark.index, self._end(node)
            space = " " if start == end else ""
            self._splices.append((start, end, space + _scalar(new, node.style)))
        else:
            raise _OtherKind(f"{path or 'the whole file'} becomes something of another kind")

    def _change_value(
        self, key: yaml.Node, value: yaml.Node, old: Any, new: Any, path: str, *, block: bool
    ) -> None:
        """Changes what is behind a key, where need be to something of another kind."""
        if same_data(old, new):
            return
        if value.start_mark.index < key.end_mark.index:
            raise CannotRewrite(f"{path} is an alias")
        try:
            mark = len(self._splices)
            self._change(value, old, new, path)
        except _OtherKind:
            if not block and value.start_mark.index < value.end_mark.index:
                del self._splices[mark:]
                self._splices.append((value.start_mark.index, value.end_mark.index, _flow(new)))
                return
            if not block or not isinstance(key, yaml.ScalarNode):
                raise
            del self._splices[mark:]
            self._replace(key, value, new)

    def _replace(self, key: yaml.ScalarNode, value: yaml.Node, new: Any) -> None:
        colon = self._text.index(":", key.end_mark.index) + 1
        end = self._end(value)
        lines = self._block(new, key.start_mark.column)
        if not lines:
            self._splices.append((colon, end, f" {_flow(new)}"))
            return
        # A comment behind the key or behind a short old value stays where it is.
        self._splices.append((colon, end, ""))
        self._insert_after(end, lines)

    def _change_mapping(
        self, node: yaml.MappingNode, old: Mapping[str, Any], new: Mapping[str, Any], path: str
    ) -> None:
        pairs = {key.value: (key, value) for key, value in node.value if not _is_merge(key)}
        gone = [key for key in old if key not in new]
        fresh = [key for key in new if key not in pairs and not _inherited(key, old, new)]
        if node.flow_style and (gone or fresh):
            self._splices.append((node.start_mark.index, node.end_mark.index, _flow(new)))
            return
        for name, (key, value) in pairs.items():
            if name in new and name in old:
                where = f"{path}.{name}" if path else name
                self._change_value(
                    key, value, old[name], new[name], where, block=not node.flow_style
                )
        for name in gone:
            if name not in pairs:
                raise CannotRewrite(f"{path}.{name} comes out of an alias (`<<`)")
            key, value = pairs[name]
            if self._before(key.start_mark).strip():
                raise CannotRewrite(f"{path}.{name} does not begin its line")
            self._delete_lines(key.start_mark, self._pair_end(key, value))
        if fresh:
            column = node.start_mark.column
            lines = [line for name in fresh for line in self._pair(name, new[name], column)]
            self._insert_after(self._end(node), lines)

    def _change_list(
        self, node: yaml.SequenceNode, old: list[Any], new: list[Any], path: str
    ) -> None:
        names_old, names_new = _identities(old), _identities(new)
        kept = [name for name in names_new if name in names_old]
        in_place = names_new[: len(kept)] == kept == [n for n in names_old if n in names_new]
        if node.flow_style and names_old != names_new:
            self._splices.append((node.start_mark.index, node.end_mark.index, _flow(new)))
            return
        if not in_place or not kept:
            raise _OtherKind(f"{path} is put in another order")
        if (
            any(
                later.start_mark.index < earlier.end_mark.index
                for earlier, later in pairwise(node.value)
            )
            or node.value[0].start_mark.index < node.start_mark.index
        ):
            raise CannotRewrite(f"{path} holds an alias")
        for name, item, before in zip(names_old, node.value, old, strict=True):
            if name in names_new:
                where = f"{path}[{name}]"
                self._change_item(item, before, new[names_new.index(name)], where, node)
            else:
                if not re.fullmatch(r" *- +", self._before(item.start_mark)):
                    raise CannotRewrite(f"{path}[{name}] does not begin in the line of its dash")
                self._delete_item(item, is_first=item is node.value[0])
        column = node.start_mark.column
        lines = [line for item in new[len(kept) :] for line in self._item(item, column)]
        if lines:
            self._insert_after(self._end(node), lines)

    def _change_item(
        self, item: yaml.Node, old: Any, new: Any, path: str, parent: yaml.SequenceNode
    ) -> None:
        mark = len(self._splices)
        try:
            self._change(item, old, new, path)
        except _OtherKind:
            if not parent.flow_style:
                raise
            del self._splices[mark:]
            self._splices.append((item.start_mark.index, item.end_mark.index, _flow(new)))

    def _end(self, node: yaml.Node) -> int:
        """Where the content of a node ends; the mark of a block is behind its comments."""
        flow = getattr(node, "flow_style", True)
        if isinstance(node, yaml.MappingNode) and not flow:
            return self._pair_end(*node.value[-1])
        if isinstance(node, yaml.SequenceNode) and not flow:
            last = node.value[-1]
            own = last.start_mark.index >= node.start_mark.index
            return self._end(last) if own else self._content_end(node)
        # Only a block scalar ends behind its line.
        block = getattr(node, "style", None) in ("|", ">")
        return self._content_end(node) if block else int(node.end_mark.index)

    def _content_end(self, node: yaml.Node) -> int:
        return len(self._text[: node.end_mark.index].rstrip())

    def _pair_end(self, key: yaml.Node, value: yaml.Node) -> int:
        if value.start_mark.index < key.end_mark.index:
            return self._line_end(key.end_mark.index)  # an alias: its node is elsewhere
        return self._end(value)

    def _before(self, mark: yaml.Mark) -> str:
        return self._text[mark.index - mark.column : mark.index]

    def _line_end(self, index: int) -> int:
        """Behind the line break of the line that holds a place."""
        return self._text.index("\n", index) + 1

    def _insert_after(self, index: int, lines: Sequence[str]) -> None:
        place = self._line_end(index)
        self._splices.append((place, place, "".join(line + self._newline for line in lines)))

    def _delete_lines(self, mark: yaml.Mark, end: int) -> None:
        """Deletes from the line of a mark to that of an end."""
        start, stop = self._extent(mark, end)
        self._splices.append((start, stop, ""))

    def _delete_item(self, item: yaml.Node, *, is_first: bool) -> None:
        """Deletes an item with the comments right above it, and an empty line too many."""
        start, stop = self._extent(item.start_mark, self._end(item))
        dash = _indent(self._line_at(start))
        while _is_comment_at(line := self._line_before(start), dash):
            start -= len(line)
        if is_first:
            while (line := self._line_at(stop)) and not line.strip():
                stop += len(line)
        elif not self._line_at(stop).strip():
            while (line := self._line_before(start)) and not line.strip():
                start -= len(line)
        self._splices.append((start, stop, ""))

    def _extent(self, mark: yaml.Mark, end: int) -> tuple[int, int]:
        start, stop = mark.index - mark.column, self._line_end(end)
        column = _indent(self._line_at(start))
        # Comments that are deeper go along: what they were in is gone.
        while (line := self._line_at(stop)).lstrip().startswith("#") and _indent(line) > column:
            stop += len(line)
        return start, stop

    def _line_at(self, index: int) -> str:
        return self._text[index : self._line_end(index)] if index < len(self._text) else ""

    def _line_before(self, index: int) -> str:
        start = self._text.rfind("\n", 0, max(index - 1, 0)) + 1
        return self._text[start:index]

    def _pair(self, key: str, value: Any, column: int) -> list[str]:
        head = f"{' ' * column}{_scalar(key)}:"
        lines = self._block(value, column)
        return [head, *lines] if lines else [f"{head} {_flow(value)}"]

    def _block(self, value: Any, column: int) -> list[str]:
        """Lines of a value below its key; none where it fits behind it."""
        if isinstance(value, Mapping):
            if len(value) == 1 and not isinstance(next(iter(value.values())), (Mapping, list)):
                return []
            inner = column + _STEP
            return [line for key, item in value.items() for line in self._pair(key, item, inner)]
        if isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
            inner = column + self._offset
            return [line for item in value for line in self._item(item, inner)]
        return []

    def _item(self, item: Any, column: int) -> list[str]:
        dash = f"{' ' * column}- "
        small = not isinstance(item, Mapping) or not any(
            isinstance(value, (Mapping, list)) for value in item.values()
        )
        if small or not item:
            return [dash + _flow(item)]
        inner = column + len("- ")
        lines = [line for key, value in item.items() for line in self._pair(key, value, inner)]
        return [dash + lines[0][inner:], *lines[1:]]


def _is_merge(key: yaml.Node) -> bool:
    return bool(key.tag == "tag:yaml.org,2002:merge")


def _inherited(key: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Whether a merge (`<<`) gives the key already what it is to be."""
    return key in old and same_data(old[key], new[key])


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip(" "))


def _is_comment_at(line: str, column: int) -> bool:
    return line.lstrip().startswith("#") and _indent(line) == column


def _identities(items: list[Any]) -> list[str]:
    """What tells the items of a list apart: their name, their version, or else their place."""
    for key in ("name", "version"):
        names = [str(item.get(key)) for item in items if isinstance(item, Mapping) and key in item]
        if len(names) == len(items) == len(set(names)):
            return names
    return [str(index) for index in range(len(items))]


def _list_offset(root: yaml.Node) -> int:
    """How much deeper than its key the file writes a list."""
    if isinstance(root, yaml.MappingNode):
        for key, value in root.value:
            if isinstance(value, yaml.SequenceNode) and not value.flow_style:
                return int(value.start_mark.column - key.start_mark.column)
    return _STEP


def _scalar(value: Any, style: str | None = None) -> str:
    if not isinstance(value, str):
        # Of PyYAML's making: JSON writes 1e-05, which YAML 1.1 takes for a string.
        return yaml.safe_dump([value], default_flow_style=True, width=10_000).strip()[1:-1]
    if style == "'" and value.isprintable():
        return "'" + value.replace("'", "''") + "'"
    if style is None and _PLAIN.fullmatch(value) and yaml.safe_load(value) == value:
        return value
    text: str = yaml.safe_dump(value, default_style='"', allow_unicode=True, width=10**9)
    return text.rstrip("\n")


def _flow(value: Any) -> str:
    if isinstance(value, Mapping):
        return (
            "{" + ", ".join(f"{_scalar(key)}: {_flow(item)}" for key, item in value.items()) + "}"
        )
    if isinstance(value, list):
        return "[" + ", ".join(map(_flow, value)) + "]"
    return _scalar(value)
