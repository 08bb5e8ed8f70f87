"""Whose key ends when a client goes away, and whose must not."""

from serve_app.deployments.sampling.unread import Unread


def test_a_key_ends_whenever_its_client_goes_away() -> None:
    unread = Unread()
    unread.begins("early")
    assert unread.abandon("early") is None
    assert not unread.handed_out("early", "key")
    unread.begins("late")
    assert unread.handed_out("late", "key")
    assert unread.abandon("late") == "key"
    assert unread.abandon("late") is None
    assert unread.abandon("of another replica") is None


def test_of_a_group_each_members_key_ends() -> None:
    unread = Unread()
    unread.begins("group")
    assert unread.handed_out("group-0", "first")
    ended = [unread.abandon(one) for one in ("group", "group-0", "group-1")]
    assert ended == [None, "first", None]
    assert not unread.handed_out("group-1", "second")


def test_a_retry_that_is_abandoned_takes_nothing_of_an_attempt_that_was_read() -> None:
    unread = Unread()
    unread.begins("a")
    assert unread.handed_out("a", "first")
    unread.begins("a")
    assert unread.abandon("a") is None
    assert not unread.handed_out("a", "second")


def test_a_retry_takes_nothing_of_an_attempt_whose_key_is_on_its_way() -> None:
    for keys in (("first", "second"), ("second", "first")):
        unread = Unread()
        unread.begins("a")
        unread.begins("a")
        for key in keys:
            assert unread.handed_out("a", key)
            assert unread.abandon("a") is None
        unread.begins("a")
        assert unread.handed_out("a", "third")
        assert unread.abandon("a") is None


def test_a_retried_group_takes_nothing_and_loses_nothing() -> None:
    unread = Unread()
    unread.begins("g")
    assert unread.abandon("g-0") is None
    unread.begins("g")
    assert unread.handed_out("g-0", "of the retry")
    assert unread.handed_out("g-1", "of the first attempt")
    assert unread.handed_out("g-1", "of the retry too")
    assert [unread.abandon(one) for one in ("g", "g-0", "g-1")] == [None] * 3


def test_an_id_that_looks_like_a_members_is_its_own() -> None:
    unread = Unread()
    unread.begins("g")
    unread.begins("g-0")
    assert unread.handed_out("g-0", "key")
    assert unread.abandon("g") is None
    assert unread.abandon("g-0") == "key"


def test_what_is_remembered_is_bounded() -> None:
    unread = Unread(kept=2)
    for one in ("a", "b", "c"):
        unread.begins(one)
        assert unread.handed_out(one, f"key of {one}")
    assert [unread.abandon(one) for one in ("a", "b", "c")] == [None, "key of b", "key of c"]
