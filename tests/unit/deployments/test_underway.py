"""Answers are kept for a while, and never more of them than a bound."""

from typing import Any

from serve_app.deployments.underway import _MOST_BYTES, Underway


async def test_the_oldest_answers_go_first_and_each_once() -> None:
    underway, refs = Underway(), [object() for _ in range(5)]
    kept: Any = underway._kept
    for ref in refs[:3]:
        underway.keep(ref, 10)  # type: ignore[arg-type]
    assert [ref for ref, _ in kept] == refs[:3]
    underway._drop_up_to(2)
    assert [ref for ref, _ in kept] == refs[2:3]
    underway.keep(refs[3], _MOST_BYTES)  # type: ignore[arg-type]
    assert [ref for ref, _ in kept] == refs[3:4]
    underway._drop_up_to(3)  # it went before its time
    assert [ref for ref, _ in kept] == refs[3:4]
    underway.keep(refs[4], _MOST_BYTES)  # type: ignore[arg-type]
    assert [ref for ref, _ in kept] == refs[4:]
    underway._drop_up_to(5)
    assert not kept
    assert underway._nbytes == 0
