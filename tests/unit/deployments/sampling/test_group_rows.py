"""Which rows the members of a group may share."""

import numpy as np

from serve_app.deployments.sampling.group_rows import rows_in_common
from serve_app.records import Record, make_record


def made(version: int, other_from: int = 9) -> Record:
    ids = np.arange(9 * 2 * 2).reshape(9, 2, 2) % 16
    ids[other_from:] = 15 - ids[other_from:]
    return make_record(ids, num_experts=16, weight_version=version)


def test_equal_prompts_are_shared_as_a_whole() -> None:
    assert rows_in_common([made(3), made(3), made(3)], 6) == 6


def test_rows_after_the_first_difference_are_each_members_own() -> None:
    assert rows_in_common([made(3), made(3, other_from=4), made(3)], 6) == 4
    assert rows_in_common([made(3), made(3, other_from=0)], 6) == 0


def test_equal_rows_of_other_weights_are_not_the_same_rows() -> None:
    assert rows_in_common([made(3), made(4)], 6) == 0
