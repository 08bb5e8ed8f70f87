"""The proof of the tree's shape finds what it is there to find."""

from tests.structure import MOST_FILES, MOST_LINES, circle_in, rooms_of, too_full, too_long

ROOTS = ("house",)


def test_a_circle_of_files_is_named_from_end_to_end() -> None:
    imports = {"house.a": {"house.b"}, "house.b": {"house.c"}, "house.c": {"house.a"}}
    circle = circle_in(imports)
    assert circle[0] == circle[-1]
    assert set(circle) == set(imports)
    assert circle_in({**imports, "house.c": set()}) == []


def test_rooms_can_be_a_circle_where_files_are_none() -> None:
    imports = {
        "house": {"house.word"},
        "house.word": set[str](),
        "house.store": set[str](),
        "house.store.base": set[str](),
        "house.store.owners": {"house.store.owner.shard"},
        "house.store.owner": set[str](),
        "house.store.owner.shard": {"house.store.base", "house.word"},
    }
    assert circle_in(imports) == []
    rooms = rooms_of(imports, ROOTS)
    assert set(circle_in(rooms)) == {"house.store", "house.store.owner"}
    mended = {**imports, "house.store.owners": set[str]()}
    assert circle_in(rooms_of(mended, ROOTS)) == []


def test_a_front_door_is_no_part_of_its_room() -> None:
    imports = {
        "house.wing": {"house.wing.deep.a"},
        "house.wing.base": set[str](),
        "house.wing.deep": set[str](),
        "house.wing.deep.a": {"house.wing.base"},
    }
    assert circle_in(rooms_of(imports, ROOTS)) == []


def test_what_is_too_long_or_too_full_is_named() -> None:
    assert list(too_long({"a.py": MOST_LINES, "b.py": MOST_LINES + 1})) == [
        f"b.py: expected at most {MOST_LINES} lines, got {MOST_LINES + 1}"
    ]
    full = [f"wing/{number}.py" for number in range(MOST_FILES)] + ["wing/__init__.py"]
    assert list(too_full(full)) == []
    assert list(too_full([*full, "wing/more.md"])) == [
        f"wing: expected at most {MOST_FILES} files, got {MOST_FILES + 1}"
    ]
