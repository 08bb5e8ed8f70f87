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
    copies.add(target[:rows, 1:8], source)
    copies.add(target[rows:, 1:8], source[::-1])
    copies.run()
    assert np.array_equal(target[:rows, 1:8], source)
    assert np.array_equal(target[rows:, 1:8], source[::-1])
    assert (target[:, 0] == 255).all()
    assert (target[:, 8] == 255).all()


@pytest.mark.parametrize("rows", [2, 1_000_000])
def test_a_target_that_is_too_narrow_is_an_error(rows: int) -> None:
    copies = Copies()
    copies.add(np.empty((rows, 3, 8), np.uint8), np.zeros((rows, 3, 8), np.uint16))
    with pytest.raises(TypeError, match="uint16"):
        copies.run()
