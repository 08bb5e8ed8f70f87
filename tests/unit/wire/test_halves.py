"""A prompt's rows and the generated ones that come apart are one record."""

from typing import Any

import numpy as np
import pytest

from serve_app.errors import RecordError
from serve_app.records import make_record
from serve_app.wire.expected import Expected
from serve_app.wire.registry import FormatName, decode_halves, encode
from tests.unit.wire.samples import FULL, IDS, MODEL, NAMES, SAY_START, npy, routes, same


def half(first: int, stop: int, name: FormatName) -> Any:
    ids = routes().ids[first:stop]
    return encode(make_record(ids, num_experts=16, moe_layers=(1, 2), start=first), name)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("prompt", [1, 3])
@pytest.mark.parametrize("rows", [None, 4])
def test_halves_of_every_format_are_one_record(
    name: FormatName, prompt: int, rows: int | None
) -> None:
    found = decode_halves(
        half(0, prompt, name),
        half(prompt, 4, name),
        Expected(3, 2, 16, (1, 2), rows=rows),
        allow_pickle=True,
    )
    same(found, routes())


def test_halves_may_differ_in_format_and_start_where_the_caller_says() -> None:
    found = decode_halves(IDS[:1].tolist(), npy(IDS[1:]), Expected(3, 2, 16, start=9))
    same(found, make_record(IDS, num_experts=16, start=9))


def test_rows_of_both_halves_add_up() -> None:
    with pytest.raises(RecordError, match=r"generated half: expected ids \[2, 3, 2\], got .*3, 3"):
        decode_halves(IDS[:1], IDS[1:], Expected(3, 2, 16, rows=3))
    with pytest.raises(RecordError, match="4 rows in both halves, got 4 in the prompt's"):
        decode_halves(IDS, IDS, Expected(3, 2, 16, rows=4))
    with pytest.raises(RecordError, match=r"prompt half: expected ids \[rows, 3, 2\]"):
        decode_halves(IDS[:, :2], IDS, FULL)


@pytest.mark.parametrize("nothing", [None, [], IDS[:0], ""])
def test_one_sampled_token_has_no_generated_rows(nothing: Any) -> None:
    same(decode_halves(IDS, nothing, Expected(3, 2, 16, rows=4)), make_record(IDS, num_experts=16))
    with pytest.raises(RecordError, match=r"prompt half: expected ids \[5, 3, 2\]"):
        decode_halves(IDS, nothing, Expected(3, 2, 16, rows=5))
    with pytest.raises(RecordError, match="prompt half: expected routes, got no rows"):
        decode_halves([], IDS, FULL)


@pytest.mark.parametrize("generated", [IDS[1:], None])
def test_extra_rows_are_the_last_ones(generated: Any) -> None:
    prompt = IDS[:1] if generated is not None else IDS
    found = decode_halves(prompt, generated, Expected(3, 2, 16, rows=3, extra_rows=1))
    same(found, make_record(IDS[:3], num_experts=16))


@pytest.mark.parametrize("name", SAY_START)
def test_a_generated_half_begins_where_the_prompt_ends(name: FormatName) -> None:
    with pytest.raises(RecordError, match="generated half: expected rows from position 2 on, got"):
        decode_halves(half(0, 2, name), half(3, 4, name), MODEL)


def test_native_and_repeating_rows_keep_their_kind() -> None:
    prompt, generated = IDS.astype(np.int16), IDS[:3].astype(np.int16)
    prompt[1] = -1
    generated[0, 2] = 5
    found = decode_halves(prompt, generated, FULL)
    assert found.valid.tolist() == [True, False, True, True, False, True, True]
    assert found.meta.unrouted == 1
    with pytest.raises(RecordError, match="generated half: expected 2 different experts"):
        decode_halves(prompt, generated, Expected(3, 2, 16, repeats="refuse"))
    with pytest.raises(RecordError, match="prompt half: expected routes, got all zeros"):
        decode_halves(np.zeros_like(prompt), generated, FULL)


def test_records_of_ours_that_say_more_than_routes_are_not_halves() -> None:
    first = routes(weight_version=3)
    second = routes(3, start=4, weight_version=4)
    with pytest.raises(RecordError, match="put the second with parent="):
        decode_halves(encode(first, "r3serve"), encode(second, "r3serve"), MODEL)
    told = encode(routes(3, start=4, tokens=[1, 2, 3]), "r3serve")
    with pytest.raises(RecordError, match="put the second with parent="):
        decode_halves(encode(routes(), "r3serve"), told, MODEL)
