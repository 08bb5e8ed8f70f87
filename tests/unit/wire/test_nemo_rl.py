"""NeMo-RL's envelope has a row for every token; the last one is a dummy and no row of a record."""

import base64
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from serve_app.errors import RecordError
from serve_app.wire.expected import Expected
from serve_app.wire.registry import decode, encode
from tests.unit.wire.samples import FULL, MODEL, routes, same

DUMMY = np.tile(np.arange(2), (1, 3, 1))


def envelope(ids: npt.NDArray[Any]) -> str:
    text = base64.b64encode(ids.astype("<i2").tobytes()).decode()
    return f"nrlre1:int16:{'x'.join(map(str, ids.shape))}:{text}"


def answer(last: npt.NDArray[Any] = DUMMY) -> str:
    return envelope(np.concatenate([routes().ids, last]))


def expected(rows: int | None = None, extra_rows: int = 0) -> Expected:
    return Expected(3, 2, 16, (1, 2), rows=rows, extra_rows=extra_rows)


@pytest.mark.parametrize("told", [expected(), expected(4), expected(4, 1), expected(None, 1)])
def test_the_dummy_is_cut_once_whatever_the_caller_knows(told: Expected) -> None:
    same(decode(answer(), told), routes())
    same(decode(encode(routes(), "nemo_rl"), told), routes())


def test_what_is_written_has_a_row_for_every_token() -> None:
    """P+G tokens, P+G-1 rows: its readers refuse an envelope of another length."""
    text = encode(routes(), "nemo_rl")
    assert text.startswith("nrlre1:int8:5x2x2:")
    ids = np.frombuffer(base64.b64decode(text.rpartition(":")[2]), np.int8).reshape(5, 2, 2)
    np.testing.assert_array_equal(ids[:4], routes().ids[:, 1:])
    assert ids[4].tolist() == [[0, 1], [0, 1]]


def test_only_the_dummy_itself_is_taken_for_it() -> None:
    ids = routes().ids.astype(int)
    ids[:, 0] = 0
    same(decode(envelope(ids), MODEL), routes())
    same(decode(envelope(ids), expected(4)), routes())
    swapped = DUMMY[..., ::-1]
    assert decode(answer(swapped), FULL).meta.rows == 5
    with pytest.raises(RecordError, match=r"4 rows and after them NeMo-RL's dummy.*5 rows and no"):
        decode(answer(swapped), Expected(3, 2, 16, rows=4))


@pytest.mark.parametrize("filling", [-1, 0])
def test_the_row_after_the_known_ones_may_be_filled_otherwise(filling: int) -> None:
    filled = answer(np.full((1, 3, 2), filling))
    same(decode(filled, expected(4)), routes())
    assert decode(filled, MODEL).valid.tolist() == [True] * 4 + [False]


def test_rows_that_count_the_dummy_are_refused() -> None:
    with pytest.raises(RecordError, match=r"expected 5 rows and after them .*got 4 rows and the"):
        decode(answer(), expected(5))
    with pytest.raises(RecordError, match=r"ids \[3, 3, 2\] or \[3, 2, 2\], got list\[5, 3, 2\]"):
        decode(answer(), expected(3))
    with pytest.raises(RecordError, match=r"ids \[6, 3, 2\] or .*, got list\[5, 3, 2\]"):
        decode(answer(), expected(5, 1))
    with pytest.raises(RecordError, match="more rows than the 5 that are cut, got 5"):
        decode(answer(), expected(None, 5))
    with pytest.raises(RecordError, match="no rows: nothing but NeMo-RL's dummy"):
        decode(envelope(DUMMY), MODEL)


def test_a_dummy_row_is_not_chained_before_the_next_turns_real_one() -> None:
    first = decode(answer(), MODEL)
    second = decode(envelope(routes(3).ids), Expected(3, 2, 16, (1, 2), start=first.meta.stop))
    assert (first.meta.stop, second.start) == (4, 4)
    assert second.valid.all()
