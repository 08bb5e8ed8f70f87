"""A thousand damaged payloads; ``python -m tests.fuzz_wire --seconds 60`` has more."""

from tests.fuzz_wire import fuzz


def test_damaged_payloads_are_record_errors_in_bounded_memory() -> None:
    done, valid = fuzz(range(1_000), deadline=float("inf"))
    assert done == 1_000
    assert 0 < valid < done
