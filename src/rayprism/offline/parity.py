"""Whether a job's output is what the running endpoint answers, shown on a sample of the rows."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from rayprism.core.compare import Difference, Tolerance, compare_outputs
from rayprism.core.tensors import Array, Tensors
from rayprism.errors import SetupError
from rayprism.models.manifest import Manifest
from rayprism.offline.endpoint import EndpointError, Refused, Served, check_served
from rayprism.offline.parity_rows import JobOutput, SampledRow, draw_rows, read_rows

if TYPE_CHECKING:
    from rayprism.offline.plan import Plan

__all__ = [
    "Asked",
    "Disagreement",
    "Letters",
    "OutputParity",
    "Parity",
    "compare_row",
    "compare_rows",
    "largest_difference",
    "rows_together",
    "run_parity",
]

MOST_SHOWN = 10
_MOST_VALUES = 8
_MOST_REASON = 500


class Asked(Protocol):
    """What is needed of a `rayprism.offline.endpoint.Endpoint`."""

    address: str

    def describe(self) -> Served:
        """What is served under the model's name and version."""

    def infer(self, inputs: Tensors) -> Tensors:
        """The version's outputs; raises `Refused` where it says no."""


@dataclass(slots=True)
class OutputParity:
    """How well one output agrees.

    Args:
        compared: Rows.
        agree: Those that agree under the manifest's rule.
        largest_absolute: Difference of two numbers; None where none could be compared. Infinite
            where a number stands against NaN.
        largest_relative: As a share of the endpoint's number, where that is not 0.
    """

    compared: int = 0
    agree: int = 0
    largest_absolute: float | None = None
    largest_relative: float | None = None

    @property
    def disagree(self) -> int:
        """Rows."""
        return self.compared - self.agree


@dataclass(slots=True)
class Letters:
    """What the endpoint says to rows that are dead letters of the job.

    Args:
        refused: It refuses them too.
        answered: It answers them: a disagreement.
        not_sent: No request can be made of them: a value is missing, or not of the input's type.
    """

    refused: int = 0
    answered: int = 0
    not_sent: int = 0


@dataclass(frozen=True, slots=True)
class Disagreement:
    """A row on which job and endpoint disagree.

    Args:
        shard: Its number.
        file: Of the input.
        row: Row, or byte of its line, in the file.
        output: Which one; empty where the endpoint refused the row, or answered a dead letter.
        online: The first values of the endpoint's answer, or why it gave none.
        offline: The first values in the job's output, or the reason of the dead letter.
        message: What differs.
    """

    shard: int
    file: str
    row: int
    output: str
    online: str
    offline: str
    message: str


@dataclass(slots=True)
class Parity:
    """What came out.

    Args:
        model: Its name.
        version: Of the job and of the endpoint.
        digest: Of the job's manifest.
        endpoint: Its address.
        endpoint_digest: What it tells of its manifest; None where it tells nothing.
        tolerance: The manifest's rule, by which rows agree.
        sample: Rows that were asked for.
        seed: By which they were drawn.
        rows_together: Most rows of one request.
        shards: Those of the job.
        shards_done: Those that are committed, from which was drawn.
        shards_read: Those that rows were drawn from.
        rows_done: Rows of the input in committed shards, dead letters included.
        rows: Rows that were drawn.
        agree: Rows on which everything agrees.
        outputs: By name.
        letters: Dead letters among the rows.
        disagreements: The first of them.
        disagreement_count: How many there are.
    """

    model: str
    version: str
    digest: str
    endpoint: str
    endpoint_digest: str | None
    tolerance: Tolerance
    sample: int
    seed: int
    rows_together: int
    shards: int
    shards_done: int
    shards_read: int
    rows_done: int
    rows: int = 0
    agree: int = 0
    outputs: dict[str, OutputParity] = field(default_factory=dict)
    letters: Letters = field(default_factory=Letters)
    disagreements: list[Disagreement] = field(default_factory=list)
    disagreement_count: int = 0

    @property
    def agrees(self) -> bool:
        """Whether all rows agree, and there was at least one to compare."""
        return self.disagreement_count == 0 and self.agree > 0

    def to_json(self) -> dict[str, Any]:
        """As plain values; an infinite difference is the string `Infinity`."""
        said = asdict(self)
        for name, output in self.outputs.items():
            said["outputs"][name] = {
                **{key: _plain(value) for key, value in said["outputs"][name].items()},
                "disagree": output.disagree,
            }
        return {**said, "agrees": self.agrees}

    def add(self, row: SampledRow, online: Tensors | Refused | None) -> None:
        """Counts a row.

        Args:
            row: With what the job made of it.
            online: What the endpoint made of it; None where it could not be asked.
        """
        self.rows += 1
        if row.outputs is None:
            self._add_letter(row, online)
        elif isinstance(online, Refused):
            for output in self.outputs.values():
                output.compared += 1
            shown = next((_shown(value) for value in row.outputs.values()), "")
            self._disagree(row, "", str(online), shown, "the endpoint refuses it")
        elif online is not None:
            self._compare(row, row.outputs, online)

    def _add_letter(self, row: SampledRow, online: Tensors | Refused | None) -> None:
        if online is None:
            self.letters.not_sent += 1
        elif isinstance(online, Refused):
            self.letters.refused += 1
            self.agree += 1
        else:
            self.letters.answered += 1
            reason = "" if row.letter is None else f"{row.letter.code}: {row.letter.reason}"
            shown = "; ".join(f"{name} {_shown(value)}" for name, value in online.items())
            self._disagree(row, "", shown, reason, "a dead letter, and the endpoint answers it")

    def _compare(self, row: SampledRow, offline: Tensors, online: Tensors) -> None:
        agree = True
        for name, output in self.outputs.items():
            got, answer = offline[name], online.get(name)
            output.compared += 1
            gap = None if answer is None else largest_difference(answer, got)
            if gap is not None:
                output.largest_absolute = max(gap[0], output.largest_absolute or 0.0)
                output.largest_relative = max(gap[1], output.largest_relative or 0.0)
            difference = compare_row(name, answer, got, self.tolerance)
            if difference is None:
                output.agree += 1
                continue
            agree = False
            shown = "nothing" if answer is None else _shown(answer)
            self._disagree(row, name, shown, _shown(got), difference.message)
        self.agree += agree

    def _disagree(
        self, row: SampledRow, output: str, online: str, offline: str, message: str
    ) -> None:
        self.disagreement_count += 1
        if len(self.disagreements) < MOST_SHOWN:
            values = (online[:_MOST_REASON], offline[:_MOST_REASON])
            where = (row.shard, row.file, row.position)
            self.disagreements.append(Disagreement(*where, output, *values, message))


def compare_row(
    name: str, online: Array | None, offline: Array, tolerance: Tolerance
) -> Difference | None:
    """Compares one output of one row by the manifest's rule; what the endpoint says is expected.

    Args:
        name: Of the output.
        online: The endpoint's; None where it gave none.
        offline: The job's.
        tolerance: The rule.
    """
    if online is None:
        return Difference(name, "the endpoint does not give it")
    # What reads an empty list back cannot know the sizes inside.
    if online.size == 0 and offline.size == 0:
        return None
    differences = compare_outputs({name: online}, {name: offline}, tolerance)
    return differences[0] if differences else None


def largest_difference(online: Array, offline: Array) -> tuple[float, float] | None:
    """The largest absolute and the largest relative difference of two tensors.

    NaN and NaN, and equal infinities, do not differ; NaN and a number differ infinitely. Relative
    is to the endpoint's number, where that is not 0.

    Returns:
        None where their shapes differ, or where they hold text or nothing.
    """
    if online.shape != offline.shape or online.dtype.kind in "OSU" or online.size == 0:
        return None
    want, got = online.astype(np.float64), offline.astype(np.float64)
    same = (want == got) | (np.isnan(want) & np.isnan(got))
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        gap = np.where(same, 0.0, np.abs(got - want))
        gap = np.where(np.isnan(gap), np.inf, gap)
        share = np.where(same | (want == 0), 0.0, gap / np.abs(want))
        share = np.where(np.isnan(share), np.inf, share)
    return float(gap.max()), float(share.max())


def rows_together(manifest: Manifest, batch_rows: int) -> int:
    """Most rows that a request may have so that its answer can be taken apart.

    Args:
        manifest: Of the model.
        batch_rows: What was asked for.
    """
    batching = manifest.batching
    # Outputs as long as the longest row of the request: pre-processing makes the lengths, so
    # nobody but the model knows what of a row's answer is padding.
    padded = batching.ragged_outputs and manifest.runtime_inputs
    return batch_rows if batching.batched and not padded else 1


def run_parity(
    plan: Plan,
    endpoint: Asked,
    *,
    sample: int = 256,
    seed: int = 0,
    batch_rows: int = 1,
) -> Parity:
    """Compares a sample of a job's rows with what an endpoint answers to them.

    Args:
        plan: Of the job, from `plan_job`. It may still be at work: committed shards count.
        endpoint: That serves the same version.
        sample: How many rows to draw; time and memory grow with it, and not with the data.
        seed: The same seed draws the same rows out of the same shards.
        batch_rows: Rows of one request. Only rows of equal shapes go together.

    Raises:
        JobChanged: The output is another job's.
        EndpointError: The endpoint cannot be asked, or serves something else.
        SetupError: There is no output, or input or output are not what they were.
    """
    manifest = plan.version.manifest
    output = JobOutput(plan.spec.output.uri)
    commits = output.commits(plan)
    served = endpoint.describe()
    check_served(manifest, served, endpoint.address)
    counts = {number: commit.rows_in for number, commit in commits.items()}
    drawn = draw_rows(counts, sample, seed)
    if not drawn:
        raise SetupError(f"{output.path}: no row in the shards that are done")
    result = Parity(
        model=manifest.model,
        version=str(manifest.version),
        digest=manifest.digest,
        endpoint=endpoint.address,
        endpoint_digest=served.digest,
        tolerance=manifest.golden.tolerance,
        sample=sample,
        seed=seed,
        rows_together=rows_together(manifest, batch_rows),
        shards=len(plan.shards),
        shards_done=len(commits),
        shards_read=len(drawn),
        rows_done=sum(counts.values()),
        outputs={name: OutputParity() for name in manifest.output_names},
    )
    rows = (
        row
        for number, places in drawn.items()
        for row in read_rows(plan, output, commits[number], places)
    )
    compare_rows(result, rows, endpoint, manifest)
    return result


def compare_rows(
    result: Parity, rows: Iterable[SampledRow], endpoint: Asked, manifest: Manifest
) -> None:
    """Asks an endpoint for rows and counts what it says.

    Args:
        result: What is added to.
        rows: With what the job made of them.
        endpoint: That is asked.
        manifest: Of the model.
    """
    batched = manifest.batching.batched
    for group in _requests(rows, result.rows_together):
        if group[0].inputs is None:
            result.add(group[0], None)
            continue
        for row, answer in zip(group, _ask(group, endpoint, batched), strict=True):
            result.add(row, answer)


def _requests(rows: Iterable[SampledRow], most: int) -> Iterator[list[SampledRow]]:
    """Rows that go in one request: of equal shapes, and dead letters alone."""
    waiting: dict[tuple[Any, ...], list[SampledRow]] = {}
    for row in rows:
        if row.inputs is None or row.outputs is None:
            yield [row]
            continue
        kind = tuple((name, value.shape) for name, value in row.inputs.items())
        group = waiting.setdefault(kind, [])
        group.append(row)
        if len(group) >= most:
            yield waiting.pop(kind)
    yield from waiting.values()


def _ask(rows: Sequence[SampledRow], endpoint: Asked, batched: bool) -> list[Tensors | Refused]:
    inputs = [row.inputs for row in rows if row.inputs is not None]
    request = {name: np.concatenate([one[name] for one in inputs]) for name in inputs[0]}
    try:
        if batched:
            return _split(endpoint.infer(request), len(rows), endpoint.address)
        outputs = endpoint.infer({name: value[0] for name, value in request.items()})
    except Refused as error:
        if len(rows) == 1:
            return [error]
        # Which of them is at fault is not told.
        return [answer for row in rows for answer in _ask([row], endpoint, batched)]
    return [{name: value[np.newaxis] for name, value in outputs.items()}]


def _split(outputs: Mapping[str, Array], rows: int, address: str) -> list[Tensors | Refused]:
    for name, value in outputs.items():
        if value.ndim == 0 or len(value) != rows:
            raise EndpointError(
                f"{address} answered {rows} rows with output {name!r} of shape {list(value.shape)}"
            )
    return [{name: value[row : row + 1] for name, value in outputs.items()} for row in range(rows)]


def _shown(array: Array) -> str:
    values = array.ravel()[:_MOST_VALUES].tolist()
    more = ", ..." if array.size > _MOST_VALUES else ""
    inner = ", ".join(f"{value:.8g}" if type(value) is float else f"{value!r}" for value in values)
    return f"[{inner}{more}]"


def _plain(value: Any) -> Any:
    return "Infinity" if isinstance(value, float) and math.isinf(value) else value
