"""The laws of the queue: nothing is lost, nothing runs late, bounds hold, order is kept."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from rayprism.core.batching import BatchLimits, BatchQueue, Pending, ServiceRate, plan_pieces

FAR_S = 1e9


def make_queue(**limits: float) -> BatchQueue:
    return BatchQueue(BatchLimits(**{"max_rows": 8, "max_queue_rows": 1000, **limits}))


def push(queue: BatchQueue, name: str, **fields: object) -> Pending:
    values: dict[str, object] = {"rows": 1, "arrival_s": 0.0, "deadline_s": FAR_S, **fields}
    pending = Pending(name, **values)  # type: ignore[arg-type]
    queue.push(pending)
    return pending


def names(batch: tuple[Pending, ...]) -> list[str]:
    return [pending.item for pending in batch]


def take(queue: BatchQueue, now_s: float = 0.0) -> list[str]:
    return names(queue.decide(now_s, free=True).batch)


def test_a_batch_holds_everything_that_waits_when_the_model_is_free() -> None:
    queue = make_queue()
    for name in "abc":
        push(queue, name)
    assert take(queue) == ["a", "b", "c"]
    assert len(queue) == 0
    assert queue.rows == 0


def test_nothing_is_bound_while_the_model_is_busy() -> None:
    queue = make_queue()
    push(queue, "a")
    assert queue.decide(0.0, free=False).batch == ()
    push(queue, "b")
    assert take(queue) == ["a", "b"]


def test_rows_bound_a_batch_and_the_rest_keeps_its_order() -> None:
    queue = make_queue(max_rows=4)
    for name in "abcdef":
        push(queue, name, rows=2)
    assert [take(queue) for _ in range(4)] == [["a", "b"], ["c", "d"], ["e", "f"], []]


def test_a_request_that_does_not_fit_lets_smaller_ones_pass_and_is_next() -> None:
    queue = make_queue(max_rows=4)
    push(queue, "a", rows=3)
    push(queue, "big", rows=4)
    push(queue, "c", rows=1)
    assert take(queue) == ["a", "c"]
    assert take(queue) == ["big"]


def test_priority_goes_first_and_first_come_first_served_within() -> None:
    queue = make_queue(max_rows=2)
    for name, priority in [("low", 3), ("mid1", 2), ("top", 1), ("mid2", 2)]:
        push(queue, name, priority=priority)
    assert take(queue) == ["top", "mid1"]
    assert take(queue) == ["mid2", "low"]


def test_only_equal_keys_share_a_batch() -> None:
    queue = make_queue()
    push(queue, "a", key=(3,))
    push(queue, "b", key=(4,))
    push(queue, "c", key=(3,))
    assert take(queue) == ["a", "c"]
    assert take(queue) == ["b"]


def test_cost_is_rows_times_padded_length() -> None:
    queue = make_queue(max_cost=20)
    push(queue, "a", length=5)
    push(queue, "b", length=6)
    push(queue, "c", length=6)
    push(queue, "d", length=6)
    # three rows of length 6 are 18; a fourth would make 24
    assert take(queue) == ["a", "b", "c"]
    assert take(queue) == ["d"]


def test_like_lengths_are_put_together() -> None:
    queue = make_queue(max_cost=40)
    for name, length in [("s1", 10), ("l1", 40), ("s2", 10), ("l2", 40), ("s3", 10)]:
        push(queue, name, length=length)
    assert take(queue) == ["s1", "s2", "s3"]
    assert take(queue) == ["l1"]
    assert take(queue) == ["l2"]


def test_a_row_over_the_cost_by_itself_runs_alone() -> None:
    queue = make_queue(max_cost=10)
    push(queue, "huge", length=100)
    push(queue, "small", length=1)
    assert take(queue) == ["huge"]
    assert take(queue) == ["small"]


def test_padding_share_is_bounded() -> None:
    queue = make_queue(max_padding_share=0.25)
    push(queue, "a", length=10)
    push(queue, "b", length=14)  # (10+14)/28: 14 % padding
    push(queue, "c", length=40)  # would make (10+14+40)/120: 47 %
    assert take(queue) == ["a", "b"]
    assert take(queue) == ["c"]


def test_a_batch_that_is_not_full_waits_for_the_delay_and_no_longer() -> None:
    queue = make_queue(max_rows=2, max_delay_s=0.010)
    push(queue, "a", arrival_s=1.0)
    decision = queue.decide(1.004, free=True)
    assert decision.batch == ()
    assert decision.wake_s == pytest.approx(1.010)
    assert take(queue, 1.010) == ["a"]


def test_a_full_batch_does_not_wait() -> None:
    queue = make_queue(max_rows=2, max_delay_s=10.0)
    push(queue, "a")
    push(queue, "b")
    assert take(queue, 0.0) == ["a", "b"]


def test_what_is_late_is_never_run() -> None:
    queue = make_queue()
    push(queue, "late", deadline_s=1.0)
    push(queue, "good", deadline_s=3.0)
    decision = queue.decide(2.0, free=True)
    assert names(decision.expired) == ["late"]
    assert names(decision.batch) == ["good"]


def test_what_could_not_end_in_time_is_expired_before_it_runs() -> None:
    queue = make_queue()
    push(queue, "hopeless", deadline_s=1.0)
    decision = queue.decide(0.9, free=True, floor_s=0.2)
    assert names(decision.expired) == ["hopeless"]
    assert decision.batch == ()


def test_a_busy_model_is_woken_for_the_next_deadline() -> None:
    queue = make_queue()
    push(queue, "a", deadline_s=5.0)
    push(queue, "b", deadline_s=3.0)
    assert queue.decide(0.0, free=False).wake_s == 3.0
    assert queue.decide(0.0, free=False, floor_s=0.5).wake_s == 2.5


def test_cancelled_requests_are_not_run_and_give_their_room_back() -> None:
    queue = make_queue(max_queue_rows=5)
    gone = push(queue, "gone", rows=5)
    assert not queue.has_room(1)
    queue.cancel(gone)
    queue.cancel(gone)
    assert queue.has_room(5)
    push(queue, "b")
    assert take(queue) == ["b"]


def test_the_queue_is_bounded_in_rows() -> None:
    queue = make_queue(max_queue_rows=10)
    push(queue, "a", rows=8)
    assert queue.has_room(2)
    assert not queue.has_room(3)


def test_a_failed_batch_is_halved_until_one_is_left() -> None:
    queue = make_queue()
    for name in "abcd":
        push(queue, name)
    first = queue.decide(0.0, free=True).batch
    push(queue, "later", priority=-1)
    assert queue.split_failed(first) is None
    left = queue.decide(0.0, free=True).batch
    assert names(left) == ["a", "b"], "halves run before what came later, whatever its priority"
    assert queue.split_failed(left) is None
    single = queue.decide(0.0, free=True).batch
    culprit = queue.split_failed(single)
    assert culprit is not None
    assert culprit.item == "a"
    assert [take(queue) for _ in range(3)] == [["b"], ["c", "d"], ["later"]]
    assert queue.rows == 0


def test_halves_of_a_failed_batch_expire_and_are_cancelled_like_all() -> None:
    queue = make_queue()
    a = push(queue, "a")
    push(queue, "b", deadline_s=2.0)
    push(queue, "c")
    batch = queue.decide(0.0, free=True).batch
    assert queue.split_failed(batch) is None
    queue.cancel(a)
    assert queue.decide(1.0, free=False).wake_s == 2.0
    assert names(queue.decide(3.0, free=False).expired) == ["b"], "told at once, not at its turn"
    assert take(queue, 3.0) == ["c"]
    assert queue.rows == 0


def test_a_delay_leaves_time_to_be_served_in() -> None:
    queue = make_queue(max_rows=2, max_delay_s=10.0)
    push(queue, "a", arrival_s=0.0, deadline_s=1.0)
    decision = queue.decide(0.0, free=True, floor_s=0.2)
    assert decision.batch == ()
    assert decision.wake_s == pytest.approx(0.4)
    assert names(queue.decide(0.4, free=True, floor_s=0.2).batch) == ["a"]


def test_drain_gives_back_everything_once() -> None:
    queue = make_queue(max_rows=2)
    for name in "abcd":
        push(queue, name)
    queue.split_failed(queue.decide(0.0, free=True).batch)
    assert sorted(names(tuple(queue.drain()))) == ["a", "b", "c", "d"]
    assert queue.drain() == []
    assert queue.rows == 0
    assert queue.decide(0.0, free=True).batch == ()


def test_served_requests_leave_no_deadlines_behind() -> None:
    queue = make_queue()
    for number in range(10_000):
        push(queue, str(number))
        assert take(queue)
    assert len(queue._deadlines) < 200


def test_the_oldest_is_looked_for_in_every_level_and_in_parts_of_failed_batches() -> None:
    queue = make_queue(max_rows=2)
    assert queue.oldest_s() is None
    push(queue, "late", arrival_s=3.0, priority=1)
    push(queue, "early", arrival_s=1.0, priority=2)
    push(queue, "middle", arrival_s=2.0, priority=2)
    assert queue.oldest_s() == 1.0
    batch = queue.decide(4.0, free=True).batch
    assert names(batch) == ["late", "early"]
    assert queue.oldest_s() == 2.0, "what runs does not wait"
    assert queue.split_failed(batch) is None
    assert queue.oldest_s() == 1.0, "until it has to run again"
    queue.cancel(batch[1])
    assert queue.oldest_s() == 2.0
    queue.drain()
    assert queue.oldest_s() is None


arrivals = st.tuples(st.floats(0, 100), st.integers(1, 3), st.integers(1, 3), st.booleans())


@given(st.lists(arrivals, max_size=30), st.integers(0, 10))
def test_the_oldest_is_the_earliest_that_waits(
    sent: list[tuple[float, int, int, bool]], batches: int
) -> None:
    queue = make_queue(max_rows=3)
    waiting = set()
    for arrival_s, rows, priority, leaves in sorted(sent, key=lambda one: one[0]):
        pending = Pending("", rows, arrival_s, FAR_S, priority)
        queue.push(pending)
        if leaves:
            queue.cancel(pending)
        else:
            waiting.add(pending)
    for _ in range(batches):
        assert queue.oldest_s() == min((one.arrival_s for one in waiting), default=None)
        waiting -= set(queue.decide(100.0, free=True).batch)


@given(
    rows=st.integers(1, 1000),
    length=st.integers(1, 600),
    max_rows=st.integers(1, 100),
    max_cost=st.none() | st.integers(1, 5000),
)
def test_pieces_cover_a_request_and_fit(
    rows: int, length: int, max_rows: int, max_cost: int | None
) -> None:
    limits = BatchLimits(max_rows=max_rows, max_queue_rows=10**9, max_cost=max_cost)
    pieces = plan_pieces(rows, length, limits)
    assert pieces[0][0] == 0
    assert pieces[-1][1] == rows
    assert all(left[1] == right[0] for left, right in pairwise(pieces))
    for start, stop in pieces:
        size = stop - start
        assert 1 <= size <= max_rows
        assert max_cost is None or size == 1 or size * length <= max_cost


class QueueMachine(RuleBasedStateMachine):
    """Pushes, runs, fails, cancels and lets time pass in any order; every request ends once."""

    def __init__(self) -> None:
        super().__init__()
        self.limits = BatchLimits(
            max_rows=4, max_queue_rows=10**6, max_cost=40, max_padding_share=0.5, max_delay_s=0.5
        )
        self.queue = BatchQueue(self.limits)
        self.now_s = 0.0
        self.pushed: dict[int, Pending] = {}
        self.ended: dict[int, str] = {}
        self.running: tuple[Pending, ...] = ()
        self.faulty: set[int] = set()
        self.floor_s = 0.0
        self.failed_once = False

    def waiting(self) -> list[Pending]:
        return [
            p for p in self.pushed.values() if p.item not in self.ended and p not in self.running
        ]

    def end(self, pending: Pending, how: str) -> None:
        assert pending.item not in self.ended, f"{pending} ended twice"
        self.ended[pending.item] = how

    @rule(
        rows=st.integers(1, 4),
        length=st.integers(1, 20),
        priority=st.integers(1, 3),
        key=st.sampled_from("xy"),
        patience_s=st.floats(0.1, 5),
        faulty=st.booleans(),
    )
    def push(
        self, rows: int, length: int, priority: int, key: str, patience_s: float, faulty: bool
    ) -> None:
        number = len(self.pushed)
        pending = Pending(number, rows, self.now_s, self.now_s + patience_s, priority, length, key)
        self.pushed[number] = pending
        if faulty:
            self.faulty.add(number)
        self.queue.push(pending)

    @rule(seconds=st.floats(0, 2))
    def wait(self, seconds: float) -> None:
        self.now_s += seconds

    @rule(floor_s=st.sampled_from([0.0, 0.05, 0.5]))
    def measure(self, floor_s: float) -> None:
        self.floor_s = floor_s

    @rule()
    def decide(self) -> None:
        floor_s = self.floor_s
        decision = self.queue.decide(self.now_s, free=not self.running, floor_s=floor_s)
        for pending in decision.expired:
            assert pending.deadline_s < self.now_s + floor_s
            self.end(pending, "expired")
        waiting = [p for p in self.waiting() if p not in decision.batch]
        if waiting:
            # Asked again at this time, the queue answers everyone who could not wait any longer.
            assert decision.wake_s is not None
            assert decision.wake_s <= min(p.deadline_s for p in waiting) - floor_s
        if decision.batch:
            assert not self.running
            self.running = decision.batch
            assert len({pending.key for pending in decision.batch}) == 1
            rows = sum(pending.rows for pending in decision.batch)
            longest = max(pending.length for pending in decision.batch)
            assert rows <= self.limits.max_rows
            if len(decision.batch) > 1:
                assert rows * longest <= 40
                true_cost = sum(p.rows * p.length for p in decision.batch)
                assert 1 - true_cost / (rows * longest) <= 0.5
            assert all(p.deadline_s >= self.now_s + floor_s for p in decision.batch)
            head = decision.batch[0]
            if not self.failed_once:
                before = [p for p in [*waiting, *decision.batch] if p.priority < head.priority]
                assert not before, "someone of a higher priority was passed over"
                assert head.item == min(
                    p.item for p in [*waiting, *decision.batch] if p.priority == head.priority
                ), "the oldest of its priority is always in"
            assert not any(p.cancelled for p in decision.batch)

    @precondition(lambda self: self.running)
    @rule()
    def finish(self) -> None:
        batch, self.running = self.running, ()
        if any(pending.item in self.faulty for pending in batch):
            self.failed_once = True
            culprit = self.queue.split_failed(batch)
            if culprit is not None:
                assert culprit.item in self.faulty
                self.end(culprit, "failed")
            return
        for pending in batch:
            if pending.item not in self.ended:
                self.end(pending, "served")

    @precondition(lambda self: self.pushed)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(self.pushed)))
        pending = self.pushed[number]
        if number not in self.ended and pending not in self.running:
            self.queue.cancel(pending)
            self.end(pending, "cancelled")

    @invariant()
    def rows_are_counted(self) -> None:
        waiting = self.waiting()
        assert self.queue.rows == sum(p.rows for p in waiting)
        assert len(self.queue) == len(waiting)

    @invariant()
    def the_oldest_is_known(self) -> None:
        arrivals_s = [p.arrival_s for p in self.waiting()]
        assert self.queue.oldest_s() == min(arrivals_s, default=None)

    def teardown(self) -> None:
        # Left alone, the queue empties itself: nothing is stuck in it.
        for _ in range(20 * len(self.pushed) + 10):
            if not self.running and not len(self.queue):
                break
            self.now_s += 0.6
            if self.running:
                self.finish()
            self.decide()
        if self.running:
            self.finish()
        assert set(self.ended) == set(self.pushed)


TestQueueMachine = QueueMachine.TestCase
TestQueueMachine.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def test_the_service_rate_is_what_was_measured() -> None:
    rate = ServiceRate()
    assert rate.rows_per_s is None
    assert rate.retry_after_s(100) == 1.0
    for _ in range(50):
        rate.observe(rows=8, seconds=0.1)
    assert rate.rows_per_s == pytest.approx(80)
    # half of 400 rows at 80 a second
    assert rate.retry_after_s(400) == pytest.approx(2.5)
    assert rate.floor_s == pytest.approx(0.1)


def test_the_floor_follows_a_model_that_became_slower() -> None:
    rate = ServiceRate()
    rate.observe(1, 0.001)
    for _ in range(1000):
        rate.observe(1, 0.1)
    assert 0.05 < rate.floor_s <= 0.1
