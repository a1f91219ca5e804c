"""CONTRIBUTING.md's rooms and its map of the code are true: every stop exists, and is passed in order."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import FrameType

import torch

import distnorm

PACKAGE = Path(distnorm.__file__).parent
TEXT = (PACKAGE.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
Stop = tuple[str, str]
"""A file of the package, and the qualified name of a function in it."""


def section(title: str) -> str:
    return TEXT.split(f"\n## {title}\n")[1].split("\n## ")[0]


def maps() -> list[list[Stop]]:
    """The stops of each table of the map."""
    tables = section("A newcomer's map").split("| file | function |")[1:]
    return [re.findall(r"^\| `([\w/]+\.py)` \| `([\w.]+)` \|", table, re.MULTILINE) for table in tables]


@cache
def functions(file: str) -> dict[int, str]:
    """The qualified name of every function of a file, by the line at which its code object starts."""
    found: dict[int, str] = {}

    def visit(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                if not isinstance(child, ast.ClassDef):
                    first = min([child.lineno, *(decorator.lineno for decorator in child.decorator_list)])
                    found[first] = prefix + child.name
                visit(child, f"{prefix}{child.name}.")

    visit(ast.parse((PACKAGE / file).read_text(encoding="utf-8")), "")
    return found


def calls_of(action: Callable[[], object]) -> list[Stop]:
    """The package's functions that an action calls, in order."""
    calls: list[Stop] = []

    def record(frame: FrameType, event: str, argument: object) -> None:
        path = Path(frame.f_code.co_filename)
        if event == "call" and path.is_relative_to(PACKAGE):
            file = path.relative_to(PACKAGE).as_posix()
            name = functions(file).get(frame.f_code.co_firstlineno)
            if name is not None:  # no comprehension, nor a module
                calls.append((file, name))

    sys.setprofile(record)
    try:
        action()
    finally:
        sys.setprofile(None)
    return calls


def missed(stops: list[Stop], calls: list[Stop]) -> Stop | None:
    """The first stop that the calls don't come to after those before it."""
    remaining = iter(calls)
    return next((stop for stop in stops if stop not in remaining), None)


def test_every_stop_of_the_map_exists():
    planning, step = maps()
    assert len(planning) > 5
    assert len(step) > 20
    assert [stop for stop in planning + step if stop[1] not in functions(stop[0]).values()] == []


def test_every_file_and_name_in_the_documents_exists():
    root = PACKAGE.parent
    for document in (root / "CONTRIBUTING.md", root / "README.md", *root.glob("docs/*.md")):
        text = document.read_text(encoding="utf-8")
        for file in re.findall(r"`(?:distnorm/)?((?:\w+/)+\w+\.(?:py|json|sh|txt|cpp|c))`", text):
            known = (root / file, PACKAGE / file)
            assert file.startswith(("torch", "megatron", "deepspeed")) or any(map(Path.exists, known)), file
    for file, name in re.findall(r"`(\w+/\w+\.py)`\s\(`(\w+\.\w+)`\)", TEXT):
        assert name in functions(file).values(), name


def walk() -> Iterator[list[Stop]]:
    """What making a clipper calls, and then the first step, until its row is written."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 1))
    config = {"clip": {"max_norm": 1e-3}, "monitor": {"every": 1}}
    clippers: list[distnorm.GradClipper] = []
    yield calls_of(lambda: clippers.append(distnorm.GradClipper(model, config)))
    model(torch.ones(2, 4)).square().mean().backward()
    yield calls_of(lambda: (clippers[0].clip(), clippers[0].flush()))


def test_a_clipper_and_its_step_pass_every_stop_in_the_order_of_the_map():
    for stops, calls in zip(maps(), walk(), strict=True):
        assert missed(stops, calls) is None


def test_stops_in_another_order_are_missed():
    _, step = maps()
    *_, calls = walk()
    for i in range(len(step) - 1):
        swapped = [*step[:i], step[i + 1], step[i], *step[i + 2 :]]
        assert missed(swapped, calls) is not None, (step[i], step[i + 1])


def test_the_list_of_rooms_has_every_room_and_module():
    text = section("The rooms, and their order")
    listed = re.search(r"```\n(.*?)```", text, re.DOTALL)
    assert listed is not None
    rooms = {f"{path.parent.name}/" for path in PACKAGE.glob("*/__init__.py")}
    modules = {path.stem for path in PACKAGE.glob("*.py")}
    assert set(listed[1].split()) == rooms | modules - {"__init__", "testing"}
    assert f"{len(rooms)} rooms (folders) and {len(modules)} modules" in text
    assert rooms <= set(re.findall(r"`(\w+/)`", text))


def test_no_file_has_the_marks_of_an_unfinished_merge():
    kinds = (".py", ".c", ".cpp", ".js", ".md", ".sh", ".toml", ".yaml", ".txt", ".html", ".css")
    ignored = {".git", ".venv", "site", "runs", "build", "dist", "node_modules"}
    files = [path for path in PACKAGE.parent.rglob("*") if path.suffix in kinds]
    read = [path for path in files if not ignored & set(path.relative_to(PACKAGE.parent).parts)]
    assert len(read) > 300
    marked = re.compile(r"^(<{7}|>{7}) ", re.MULTILINE)
    assert [path for path in read if marked.search(path.read_text(encoding="utf-8"))] == []
