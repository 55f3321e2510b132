"""How `rayprism top` draws what it has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from rich.console import RenderableType

    from rayprism.fleet.top_rows import ApplicationRow, JobRow, NodeRow, VersionRow, View

__all__ = ["Cell", "Column", "describe_view", "draw", "fit"]

_GAP = 2
_LONG_AGE_S = 1.0
_FULL_RATIO = 0.95


@dataclass(frozen=True, slots=True)
class Cell:
    """A text, and whether something is wrong with it."""

    text: str
    bad: bool = False

    @property
    def shown(self) -> str:
        """With a sign for those who see no colours."""
        return f"{self.text}!" if self.bad else self.text

    @property
    def is_quiet(self) -> bool:
        """Whether it says that there is nothing."""
        return self.text in ("-", "0", "0 %")


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table.

    Args:
        title: Its head.
        cells: One for each row.
        rank: Where there is no room, the highest go first; those of 0 stay.
        is_number: Whether it is aligned to the right.
    """

    title: str
    cells: Sequence[Cell]
    rank: int = 0
    is_number: bool = True

    @property
    def width(self) -> int:
        """Characters."""
        return max(map(len, (self.title, *(cell.shown for cell in self.cells))))


def fit(columns: Sequence[Column], width: int | None) -> list[Column]:
    """Leaves out columns until the others have room.

    First go those in which there is nothing, last those in which something is wrong.

    Args:
        columns: In their order.
        width: Characters; None: as many as it takes.
    """
    kept = list(columns)

    def worth(column: Column) -> tuple[bool, bool, int]:
        quiet = all(cell.is_quiet for cell in column.cells)
        return (any(cell.bad for cell in column.cells), not quiet, -column.rank)

    while width is not None and sum(column.width + _GAP for column in kept) - _GAP > width:
        loose = [column for column in kept if column.rank]
        if not loose:
            break
        kept.remove(min(loose, key=worth))
    return kept


def draw(view: View, head: str, width: int | None) -> RenderableType:
    """Everything, the worst first: a screen cuts off what is below.

    Args:
        view: What to draw.
        head: The first line.
        width: Characters that there are; None: as many as it takes.
    """
    from rich.console import Group
    from rich.text import Text

    parts: list[RenderableType] = [Text(head, style="bold", no_wrap=True, overflow="ellipsis")]
    parts += [Text(_printable(note), style="yellow") for note in view.notes]
    for columns in (
        _applications(view.applications),
        _versions(view.versions),
        _jobs(view.jobs),
        _nodes(view.nodes),
    ):
        if columns[0].cells:
            parts += [Text(""), _table(fit(columns, width))]
    return Group(*parts)


def describe_view(view: View, head: str) -> str:
    """The same as plain text, as wide as it is."""
    import io

    from rich.console import Console

    file = io.StringIO()
    console = Console(file=file, width=10_000, color_system=None, force_terminal=False)
    console.print(draw(view, head, None))
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines())


def _table(columns: Sequence[Column]) -> RenderableType:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, _GAP, 0, 0), header_style="dim")
    for column in columns:
        table.add_column(
            column.title,
            justify="right" if column.is_number else "left",
            no_wrap=True,
            overflow="ellipsis",
        )
    for cells in zip(*(column.cells for column in columns), strict=True):
        table.add_row(*(Text(cell.shown, "bold red" if cell.bad else "") for cell in cells))
    return table


_Row = TypeVar("_Row")


def _column(
    title: str,
    rows: Sequence[_Row],
    cell: Callable[[_Row], Cell | str],
    rank: int = 0,
    *,
    is_number: bool = True,
) -> Column:
    found = [cell(row) for row in rows]
    cells = [Cell(_printable(one)) if isinstance(one, str) else one for one in found]
    return Column(title, cells, rank, is_number)


def _printable(text: str) -> str:
    """Labels and errors come from elsewhere, and a terminal obeys some characters."""
    return "".join(char if char.isprintable() else "?" for char in text)


def _versions(rows: Sequence[VersionRow]) -> list[Column]:
    return [
        _column("MODEL", rows, lambda row: row.model, is_number=False),
        _column("VERSION", rows, lambda row: row.version),
        _column("ROLE", rows, lambda row: row.role or "-", 5, is_number=False),
        _column("WEIGHT", rows, lambda row: _percent(row.weight_ratio), 4),
        _column("READY", rows, lambda row: _ready(row.ready_replicas, row.target_replicas)),
        _column("REQ/S", rows, lambda row: _number(row.requests_per_s)),
        _column("ERR/S", rows, lambda row: _wrong(row.errors_per_s), 8),
        _column(
            "ERR %", rows, lambda row: Cell(_percent(row.error_ratio), bool(row.error_ratio)), 1
        ),
        _column("REJ/S", rows, lambda row: _wrong(row.rejected_per_s), 3),
        _column("P50", rows, lambda row: _seconds(row.p50_s), 2),
        _column("P99", rows, _p99),
        _column("SLOWEST STAGE", rows, _slowest, 10),
        _column("ROWS/S", rows, lambda row: _number(row.rows_per_s), 9),
        _column("BATCH", rows, lambda row: _number(row.batch_rows_mean), 12),
        _column("PADDING", rows, lambda row: _percent(row.padding_ratio), 13),
        _column("QUEUE", rows, lambda row: _number(row.queue_rows), 7),
        _column("AGE", rows, _age, 6),
        _column("FALLB/S", rows, lambda row: _wrong(row.fallbacks_per_s), 3),
        _column("AGREE", rows, lambda row: _percent(row.shadow_agreement_ratio), 11),
    ]


def _p99(row: VersionRow) -> Cell:
    over = None not in (row.p99_s, row.target_p99_s) and (row.p99_s or 0) > (row.target_p99_s or 0)
    return Cell(_seconds(row.p99_s), over)


def _slowest(row: VersionRow) -> str:
    stage = row.slowest_stage
    return "-" if stage is None else f"{stage} {_seconds(row.stage_mean_s[stage])}"


def _age(row: VersionRow) -> Cell:
    age_s = row.queue_age_s or 0.0
    return Cell(_seconds(age_s) if age_s else "0", age_s >= _LONG_AGE_S)


def _jobs(rows: Sequence[JobRow]) -> list[Column]:
    return [
        _column("BATCH JOB", rows, lambda row: row.batch_job, is_number=False),
        _column("MODEL", rows, lambda row: row.model, 4, is_number=False),
        _column("VERSION", rows, lambda row: row.version, 3),
        _column("ROWS/S", rows, lambda row: _number(row.rows_per_s)),
        _column("DEAD LETTERS", rows, lambda row: _wrong(row.dead_letter_rows), 2),
        _column("SHARDS DONE", rows, lambda row: _number(row.shards_done), 5),
        _column("FAILED", rows, lambda row: _wrong(row.shards_failed), 1),
        _column("LEFT", rows, lambda row: _number(row.shards_left)),
        _column("ACTORS", rows, lambda row: _number(row.actors), 6),
        _column("TIME LEFT", rows, lambda row: "-" if row.left_s is None else _left(row.left_s)),
    ]


def _left(seconds: float) -> str:
    minutes, left = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{left:02}" if hours else f"{minutes}:{left:02}"


def _nodes(rows: Sequence[NodeRow]) -> list[Column]:
    return [
        _column("NODE", rows, lambda row: row.address, is_number=False),
        _column("CPU", rows, lambda row: _percent(row.cpu_ratio)),
        _column("CPUS", rows, lambda row: _number(row.cpus), 1),
        _column("MEMORY", rows, _memory),
    ]


def _memory(row: NodeRow) -> Cell:
    if row.memory_used_bytes is None or not row.memory_total_bytes:
        return Cell("-")
    used, total = row.memory_used_bytes / 2**30, row.memory_total_bytes / 2**30
    return Cell(f"{used:.1f} of {total:.1f} GiB", used / total >= _FULL_RATIO)


def _applications(rows: Sequence[ApplicationRow]) -> list[Column]:
    return [
        _column("APPLICATION", rows, lambda row: row.application, is_number=False),
        _column(
            "STATUS", rows, lambda row: Cell(row.status, row.status != "RUNNING"), is_number=False
        ),
        _column("READY", rows, lambda row: _ready(row.healthy_replicas, row.target_replicas)),
    ]


def _ready(ready: int, target: int | None) -> Cell:
    if target is None:
        return Cell(f"{ready}")
    return Cell(f"{ready}/{target}", ready < target)


def _wrong(value: float | None) -> Cell:
    return Cell(_number(value), bool(value))


def _number(value: float | None) -> str:
    """Three digits, or all before the point."""
    if value is None:
        return "-"
    if value == int(value) or value >= 99.95:
        return f"{value:,.0f}"
    if value >= 9.995:
        return f"{value:.1f}"
    return f"{value:.2f}" if value >= 0.005 else "<0.01"


def _percent(value: float | None) -> str:
    if value is None:
        return "-"
    if value > 0.0 and value < 0.0001:
        return "<0.01 %"
    # 99.996 % is not all of it.
    shown = min(value, 0.9999) if value < 1.0 else value
    return f"{round(shown * 100, 2 if shown < 0.1 or shown > 0.99 else 1):g} %"


def _seconds(value: float | None) -> str:
    if value is None:
        return "-"
    scaled, unit = (value, "s") if value >= 0.9995 else (value * 1000, "ms")
    digits = 2 if scaled < 9.995 else 1 if scaled < 99.95 else 0
    return f"{scaled:.{digits}f} {unit}"
