"""The import directions stated and drawn in docs/architecture.md hold in the code."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "auglocal_ext"


def floors(page: str = "architecture.md") -> dict[str, int]:
    """Room -> floor, from the table in a page of docs/."""
    text = (ROOT / "docs" / page).read_text()
    found = {}
    for floor, rooms in re.findall(r"^\| (\d) \| ([^|]+) \|", text, flags=re.M):
        for room in re.findall(r"`([\w./]+)`", rooms):
            found[room.rstrip("/").removesuffix(".py")] = int(floor)
    return found


def imported_rooms(path: Path, within: tuple[str, ...] = ()) -> set[str]:
    """Rooms of the package that a file imports, also inside functions; of the room ``within``, where it is given."""
    relative = path.relative_to(ROOT).with_suffix("")
    here = list(relative.parts[:-1])  # the package the file is in, for relative imports
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(here[: len(here) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            names = [f"{module}.{alias.name}" for alias in node.names]
        for name in names:
            parts, whole = name.split("."), ("auglocal_ext", *within)
            if tuple(parts[: len(whole)]) == whole:
                rooms.add(parts[len(whole)] if len(parts) > len(whole) else "__init__")
    return rooms


def room_of(path: Path) -> str:
    relative = path.relative_to(PACKAGE).with_suffix("")
    return relative.parts[0]


def test_every_room_has_a_floor():
    known = floors()
    for path in PACKAGE.rglob("*.py"):
        room = room_of(path)
        if room not in ("__init__", "__main__", "_build_info"):
            assert room in known, f"{room} is not in the table of docs/architecture.md"


def test_no_import_runs_upward():
    known = floors()
    edges: dict[str, set[str]] = {}
    for path in PACKAGE.rglob("*.py"):
        room = room_of(path)
        if room not in known:
            continue
        for target in imported_rooms(path) - {room}:
            if target in known:
                assert known[target] <= known[room], f"{path.relative_to(ROOT)} imports {target} from a floor above"
                edges.setdefault(room, set()).add(target)
            elif target == "__init__" or not (PACKAGE / target).exists() and not (PACKAGE / f"{target}.py").exists():
                # a name of the package itself, e.g. LocalSequential: only the top floor may go through __init__
                assert known[room] >= 7, f"{path.relative_to(ROOT)} imports the whole package"
    for room, targets in edges.items():  # neighbours on one floor may use each other, in one direction
        for target in targets:
            assert room not in edges.get(target, ()), f"{room} and {target} import each other"


def test_rooms_within_training():
    known, edges = floors("architecture/training.md"), set()
    for path in (PACKAGE / "training").rglob("*.py"):
        room = path.relative_to(PACKAGE / "training").with_suffix("").parts[0]
        if room == "__init__":
            continue
        assert room in known, f"training/{room} is not in the table of docs/architecture/training.md"
        for target in imported_rooms(path, ("training",)) - {room}:
            assert target in known, f"{path.relative_to(ROOT)} imports {target} from the whole of training"
            assert known[target] < known[room], f"{path.relative_to(ROOT)} imports {target} from no floor below"
            edges.add((room, target))
    assert {("run", "config"), ("run", "data"), ("config", "data")} <= edges


def test_the_drawing_is_true():
    known = floors()
    text = (ROOT / "docs" / "architecture.md").read_text()
    drawing = re.search(r"```mermaid\nflowchart TD\n(.*?)```", text, flags=re.S).group(1)
    drawn = {}
    for floor, rooms in re.findall(r"subgraph f(\d)\[.*?\]\n(.*?)\n    end", drawing, flags=re.S):
        drawn |= {room: int(floor) for room in rooms.split()}
    assert drawn == known

    imports: dict[str, set[str]] = {room: set() for room in known}
    for path in PACKAGE.rglob("*.py"):
        if (room := room_of(path)) in known:
            imports[room] |= (imported_rooms(path) - {room}) & known.keys()
    arrows = {tuple(pair) for pair in re.findall(r"(\w+) --> (\w+)", drawing)}
    for room, target in arrows:
        assert target in imports[room], f"the drawing has {room} --> {target}, which is no import"

    def reached(room: str) -> set[str]:
        return {room}.union(*(reached(target) for source, target in arrows if source == room))

    for room, targets in imports.items():
        missing = targets - reached(room)
        assert not missing, f"{room} imports {', '.join(missing)}, to which no arrows of the drawing lead"


def test_top_floor_is_not_imported():
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text()
        assert not re.search(r"^\s*(from|import) (benchmarks|tests|examples)\b", text, flags=re.M), path


PAGES = ["README.md", *(page.relative_to(ROOT).as_posix() for page in sorted((ROOT / "docs").rglob("*.md")))]


@pytest.mark.parametrize("name", PAGES)
def test_documents_name_files_that_exist(name):
    text = (ROOT / name).read_text()
    for path in re.findall(r"`((?:auglocal_ext|csrc|benchmarks|tests|docs)/[\w./-]+\.\w+)`", text):
        if name == "docs/extend/op.md" and "squared_relu" in path:  # the files of its example
            continue
        assert (ROOT / path).exists(), f"{name} names {path}"
    if name.startswith("docs/architecture"):  # where a room's files are named without the package
        rooms = "|".join(room for room in floors() if (PACKAGE / room).is_dir())
        for path in re.findall(rf"`((?:{rooms})/[\w./-]+\.\w+)`", text):
            assert (PACKAGE / path).exists(), f"{name} names {path}"


def test_test_files_have_names_of_their_own_and_one_subject():
    """pytest imports them by name alone. What is longer than 400 lines has several subjects."""
    files = sorted((ROOT / "tests").rglob("*.py"))
    names = [path.name for path in files if path.name not in ("conftest.py", "__init__.py")]
    assert len(set(names)) == len(names), sorted({name for name in names if names.count(name) > 1})
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in files}
    assert not {path: length for path, length in lengths.items() if length > 400}
