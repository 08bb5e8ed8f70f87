"""The rows of a prompt that the members of a group have in common."""

from collections.abc import Sequence

from serve_app.records import Record


def rows_in_common(records: Sequence[Record], rows: int) -> int:
    """Return how many of the first ``rows`` rows are the same in all records.

    Fewer than all where an engine processed the prompt more than once: batches of other sizes
    round otherwise, and a router may decide otherwise. None where new weights came in between,
    since a row has one version.
    """
    if len({record.weight_version for record in records}) > 1:
        return 0
    first = records[0].ids[:rows]
    for record in records[1:]:
        different = (record.ids[: len(first)] != first).any(axis=(1, 2))
        if different.any():
            first = first[: int(different.argmax())]
    return len(first)
