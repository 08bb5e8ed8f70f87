"""What ``make check`` proves of the tree's shape, beside the import contracts.

    python -m tests.structure

No circle of files and none of rooms: a room is the modules that lie directly in one folder, and
so is each module in a package's root. ``__init__`` is a package's front door and no part of the
room behind it. No module of more than `MOST_LINES`, no folder of more than `MOST_FILES`.
"""

import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path, PurePosixPath

import grimp

PACKAGES = ("serve_app", "graphs", "benchmarks", "examples")
MOST_LINES = 300
MOST_FILES = 18

Imports = Mapping[str, set[str]]


def imports_of(*packages: str) -> Imports:
    """Return which modules each module imports, those for types alone included."""
    graph = grimp.build_graph(*packages, cache_dir=None)
    return {
        module: graph.find_modules_directly_imported_by(module) - {module}
        for module in sorted(graph.modules)
    }


def rooms_of(imports: Imports, roots: tuple[str, ...] = PACKAGES) -> Imports:
    """Return which rooms each room imports."""
    packages = {module.rpartition(".")[0] for module in imports}

    def room(module: str) -> str:
        folder = module.rpartition(".")[0]
        return f"{module}/__init__" if module in packages else module if folder in roots else folder

    rooms: dict[str, set[str]] = {}
    for module, imported in imports.items():
        rooms.setdefault(room(module), set()).update(room(one) for one in imported)
    return {name: imported - {name} for name, imported in rooms.items()}


def circle_in(imports: Imports) -> list[str]:
    """Return one circle, its first name again at its end; nothing where there is none."""
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        circle: list[str] = error.args[1]
        return circle[::-1]
    return []


def too_long(lines: Mapping[str, int]) -> Iterator[str]:
    """Say which modules have outgrown their noun."""
    for name, count in lines.items():
        if count > MOST_LINES:
            yield f"{name}: expected at most {MOST_LINES} lines, got {count}"


def too_full(files: list[str]) -> Iterator[str]:
    """Say which folders have become a heap; ``__init__.py`` counts for nothing."""
    folders = Counter(
        str(PurePosixPath(name).parent) for name in files if not name.endswith("__init__.py")
    )
    for folder, count in folders.items():
        if count > MOST_FILES:
            yield f"{folder}: expected at most {MOST_FILES} files, got {count}"


def problems() -> Iterator[str]:
    """Yield everything that is wrong with this tree."""
    imports = imports_of(*PACKAGES)
    for what, found in (("files", imports), ("rooms", rooms_of(imports))):
        if circle := circle_in(found):
            yield f"a circle of {what}: {' -> '.join(circle)}"
    listed = subprocess.run(["git", "ls-files"], capture_output=True, text=True, check=True)
    files = [name for name in listed.stdout.split() if Path(name).exists()]
    modules = [name for name in files if name.endswith(".py")]
    yield from too_long({name: Path(name).read_text().count("\n") for name in modules})
    yield from too_full(files)


if __name__ == "__main__":
    found = list(problems())
    print("\n".join(found) or "no circle of files or rooms, no module too long, no folder too full")
    sys.exit(bool(found))
