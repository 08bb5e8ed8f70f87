"""Leases, ledger and budget: the store's logic, without Ray."""

import asyncio
import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.errors import KeyExpired, KeyReleased, StoreFull, UnknownKey
from serve_app.records import make_record
from serve_app.store.offers import offer_of, pack, unpack
from serve_app.store.owner.budget import Budget
from serve_app.store.owner.holdings import Holdings
from serve_app.store.owner.leases import Leases
from serve_app.store.owner.ledger import Ledger
from tests.distinct_ids import distinct_ids

META = make_record(np.zeros((2, 2, 1), int), num_experts=4).meta


@given(st.integers(0, 2**32))
def test_leases_end_when_they_should_and_only_once(seed: int) -> None:
    rng, leases = random.Random(seed), Leases()
    ends: dict[int, float] = {}
    ended: set[int] = set()
    now = 0.0
    for seq in range(40):
        ends[seq] = now + rng.uniform(0.1, 20)
        leases.add(seq, ends[seq])
        now += rng.uniform(0, 1.5)
        live = [other for other in ends if other not in ended]
        for other in rng.sample(live, min(3, len(live))):
            if rng.random() < 0.3:
                leases.end(other)
                ended.add(other)
            else:
                ends[other] = now + rng.uniform(0.1, 20)
                leases.renew(other, ends[other])
        swept = set(leases.sweep(now))
        assert not swept & ended
        assert all(ends[other] <= now for other in swept)
        ended |= swept
        overdue = [other for other in ends if other not in ended and math.ceil(ends[other]) <= now]
        assert not overdue
    assert set(leases.sweep(now + 100)) == set(ends) - ended


def test_a_ledger_tells_released_expired_and_unknown_apart() -> None:
    ledger: Ledger[str] = Ledger()
    a = ledger.add(META, "a", now=0, lease_s=5)
    b = ledger.add(META, "b", now=0, lease_s=50)
    assert ledger.release(b)
    assert list(ledger.expire(6)) == [a]
    with pytest.raises(KeyExpired):
        ledger.read(a, 6)
    with pytest.raises(KeyReleased):
        ledger.read(b, 6)
    with pytest.raises(UnknownKey):
        ledger.read(2, 6)
    assert sorted(ledger.take_dropped()) == ["a", "b"]
    assert ledger.live == 0


def test_reading_renews() -> None:
    ledger: Ledger[str] = Ledger()
    seq = ledger.add(META, "a", now=0, lease_s=5)
    ledger.read(seq, 4)
    assert list(ledger.expire(8)) == []
    assert list(ledger.expire(10)) == [seq]


def test_a_chain_of_children_keeps_what_it_needs() -> None:
    ledger: Ledger[str] = Ledger()
    root = ledger.add(META, "root", now=0, lease_s=9)
    turn = ledger.add(META, "turn", now=0, lease_s=9, parent=root)
    other = ledger.add(META, "other", now=0, lease_s=9, parent=root)
    last = ledger.add(META, "last", now=0, lease_s=9, parent=turn)
    ledger.release(root)
    ledger.release(turn)
    assert ledger.take_dropped() == []
    assert [payload for _, payload, _ in ledger.read(last, 1)] == ["root", "turn", "last"]
    ledger.release(last)
    assert ledger.take_dropped() == ["last", "turn"]
    ledger.release(other)
    assert ledger.take_dropped() == ["other", "root"]


def test_a_child_may_take_less_than_all_of_its_parent() -> None:
    ledger: Ledger[str] = Ledger()

    def add(name: str, start: int, rows: int, parent: int | None, kept: int | None = None) -> int:
        meta = META._replace(start=start, rows=rows, invalid=(0, rows - 1))
        return ledger.add(meta, name, now=0, lease_s=9, parent=parent, parent_rows=kept)

    def read(seq: int) -> list[tuple[str, int]]:
        return [(payload, rows) for _, payload, rows in ledger.read(seq, 1)]

    root = add("root", 0, 10, None)
    turn = add("turn", 10, 5, root)
    branch = add("branch", 7, 4, turn, kept=7)
    edge = add("edge", 12, 4, turn, kept=12)
    twice = add("twice", 9, 4, edge, kept=9)
    assert read(turn) == [("root", 10), ("turn", 5)]
    assert read(branch) == [("root", 7), ("branch", 4)]
    assert read(edge) == [("root", 10), ("turn", 2), ("edge", 4)]
    assert read(twice) == [("root", 9), ("twice", 4)]
    assert [(meta.stop, meta.invalid) for meta in ledger.describe(branch)] == [
        (7, (0,)),
        (11, (0, 3)),
    ]
    for seq in (root, turn, branch, edge):
        ledger.release(seq)
    assert read(twice) == [("root", 9), ("twice", 4)]
    ledger.release(twice)
    assert sorted(ledger.take_dropped()) == ["branch", "edge", "root", "turn", "twice"]


def test_records_of_earlier_weights_are_found_a_stretch_at_a_time() -> None:
    ledger: Ledger[int] = Ledger()
    for number in range(50_000):
        ledger.add(META._replace(weight_version=number // 10_000), 0, now=0, lease_s=9)
    ledger.release(3)
    found, first, looks = list[int](), 0, 0
    while True:
        some, then = ledger.older(2, first)
        found += some
        looks += 1
        if then is None:
            break
        first = then
    assert found == [seq for seq in range(20_000) if seq != 3]
    assert looks == 3


def test_a_ledger_forgets_the_long_dead_but_not_that_they_were() -> None:
    ledger: Ledger[int] = Ledger()
    for _ in range(3):
        seqs = [ledger.add(META, 0, now=0, lease_s=9) for _ in range(70_000)]
        for seq in seqs:
            ledger.release(seq)
        list(ledger.expire(1))
    kept = ledger.add(META, 1, now=0, lease_s=9)
    with pytest.raises(KeyReleased):
        ledger.read(0, 1)
    assert [payload for _, payload, _ in ledger.read(kept, 1)] == [1]


async def test_a_budget_serves_in_order_and_never_overdraws() -> None:
    budget, served = Budget(10), list[int]()

    async def put(nbytes: int) -> None:
        await budget.take(nbytes, 5)
        assert budget.used <= budget.total
        served.append(nbytes)

    await put(8)
    waiting = [asyncio.create_task(put(nbytes)) for nbytes in (5, 1, 4)]
    await asyncio.sleep(0)
    assert budget.waiting == 3
    budget.give(8)
    await asyncio.gather(*waiting)
    assert served == [8, 5, 1, 4]
    assert budget.used == 10


async def test_a_late_or_cancelled_put_holds_nothing() -> None:
    budget = Budget(10)
    await budget.take(10, 1)
    with pytest.raises(StoreFull, match="10 of 10"):
        await budget.take(1, 0.01)
    cancelled = asyncio.create_task(budget.take(2, 5))
    behind = asyncio.create_task(budget.take(3, 5))
    await asyncio.sleep(0)
    cancelled.cancel()
    budget.give(10)
    await behind
    assert budget.used == 3
    with pytest.raises(StoreFull, match="never"):
        await budget.take(11, 5)


def test_records_of_one_model_share_its_layers_however_they_arrived() -> None:
    """So that an answer about a thousand of them says the layers once."""
    holdings = Holdings(1 << 20)
    ids = distinct_ids((4, 60, 2), 8)
    for _ in range(100):
        record = make_record(ids, num_experts=8, moe_layers=list(range(1, 60)))
        (offer,) = unpack(pack([offer_of(record, None, None, None)]))
        seq = holdings.keep(offer, (record.ids.tobytes(),), 60, None)
        assert holdings.ledger.describe(seq) == [record.meta]
    metas = [holdings.ledger.describe(seq)[0] for seq in range(100)]
    assert len({id(meta.moe_layers) for meta in metas}) == 1
