"""Copies done together give what copies one by one would."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from serve_app.assemble.copying import Copies


@pytest.mark.parametrize("rows", [1, 3, 200_000])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int64])
def test_all_copies_arrive_and_widen(rows: int, dtype: type) -> None:
    source = np.random.default_rng(rows).integers(0, 256, (rows, 7, 8), np.uint8)
    target: npt.NDArray[Any] = np.full((2 * rows, 9, 8), 255, dtype)
    copies = Copies()
    columns = copies.into(target[:, 1:8])
    columns.add(0, source)
    columns.add(rows, source[::-1])
    copies.run()
    assert np.array_equal(target[:rows, 1:8], source)
    assert np.array_equal(target[rows:, 1:8], source[::-1])
    assert (target[:, 0] == 255).all()
    assert (target[:, 8] == 255).all()


@pytest.mark.parametrize("rows", [2, 1_000_000])
def test_a_target_that_is_too_narrow_is_an_error(rows: int) -> None:
    copies = Copies()
    copies.into(np.empty((rows, 3, 8), np.uint8)).add(0, np.zeros((rows, 3, 8), np.uint16))
    with pytest.raises(TypeError, match="uint16"):
        copies.run()


@pytest.mark.parametrize("dtype", [np.uint8, np.int64])
@pytest.mark.parametrize("pieces", [2, 5, 4000])
def test_short_pieces_arrive_where_they_belong(pieces: int, dtype: type) -> None:
    """Neighbours or not, in any order, beside long ones."""
    dice = np.random.default_rng(pieces)
    lengths = dice.integers(1, 90, pieces)
    lengths[pieces // 2] = 20_000
    starts = np.cumsum(lengths) - lengths + np.arange(pieces) // 3  # some rows stay free
    sources = [dice.integers(0, 256, (length, 3, 8), np.uint8) for length in lengths]
    whole: npt.NDArray[Any] = np.full((starts[-1] + lengths[-1], 3, 8), 255, dtype)
    expected, copies = whole.copy(), Copies()
    target = copies.into(whole)
    order = dice.permutation(pieces) if pieces < 100 else range(pieces)
    for number in order:
        start, source = starts[number], sources[number]
        target.add(int(start), source)
        expected[start : start + len(source)] = source
    copies.run()
    assert np.array_equal(whole, expected)


def test_a_short_piece_that_is_too_wide_is_an_error() -> None:
    copies = Copies()
    target = copies.into(np.empty((4, 3, 8), np.uint8))
    target.add(0, np.zeros((2, 3, 8), np.uint8))
    target.add(2, np.zeros((2, 3, 8), np.uint16))
    with pytest.raises(TypeError, match="uint16"):
        copies.run()
