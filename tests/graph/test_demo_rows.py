"""What the demo says of a step's rows: replayed, masked, refused."""

import numpy as np

from examples.report import Rows
from examples.trainer import rows_of
from serve_app import RoutedSequence
from tests.distinct_ids import distinct_ids
from tests.http_server import LocalGraph


def test_every_row_is_one_of_them_or_the_last_of_its_sequence(graph: LocalGraph) -> None:
    client, ids = graph.client, distinct_ids((9, 4, 2), 16)
    ids[3] = 5
    key = client.put(ids, num_experts=16)
    sequences = [
        RoutedSequence(key, 10),  # one refused, and the last row
        RoutedSequence(None, 4),  # masked to its last row
        RoutedSequence(key, 12),  # a gap behind what was captured, which is masked to its end
        RoutedSequence(key, 5),
    ]
    batch = client.materialize(sequences, on_missing="mask")
    assert len(batch.valid) == 31
    assert rows_of(batch) == Rows(replayed=8 + 8 + 4, masked=4 + 3, refused=3)
    client.release([key])
    assert np.count_nonzero(~batch.valid.numpy()) == 11
