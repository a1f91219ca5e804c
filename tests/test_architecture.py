"""What holds for the source as a whole: import directions, one home a concern, sizes, public names."""

from __future__ import annotations

import ast
import inspect
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

import distnorm

PACKAGE = Path(distnorm.__file__).parent

# A file imports only what stands above its room here: a package, or a module beside the packages.
ORDER = [
    *("errors", "config", "kernels", "sources", "plan", "measure", "payload", "policies", "monitor"),
    *("deferred", "step", "operators", "graphs"),
    *("clipper", "functional", "verification", "hooks", "integrations"),
    *("trainer", "bench", "cli", "__main__", "launch"),
]
MOST_MODULES, MOST_PACKAGES = 11, 14
# These import the catalogue, `from distnorm import Config`, like any user.
USERS_OF_PUBLIC_NAMES = {"trainer", "bench", "cli", "__main__", "launch"}
APART = {"testing"}
FRAMEWORKS = {
    "deepspeed",
    "megatron",
    "transformers",
    "accelerate",
    "lightning",
    "torchtitan",
    "trl",
    "peft",
    "ray",
}
COLLECTIVES = re.compile(
    r"(all_reduce|all_gather|all_to_all|reduce_scatter|broadcast|gather|scatter|reduce|barrier|send|recv"
    r"|isend|irecv|batch_isend_irecv)(_\w+)?"
)
MAY_ISSUE_COLLECTIVES = {"plan.collectives", "testing", "trainer", "verification", "bench"}
# The oracles share no code with what they judge, so each knows for itself what an infinite order means; and
# a configuration is refused before torch is imported.
MAY_ASK_WHETHER_P_IS_INFINITE = {"measure.norms", "config.combinations", "testing", "verification"}
FACTORIES = {
    *("zeros", "ones", "empty", "full", "tensor", "arange", "eye", "linspace", "logspace"),
    *("rand", "randn", "randint", "randperm"),
}
MAKES_TENSORS = [room for room in ORDER[: ORDER.index("hooks")] if room not in ("errors", "config")]
MAX_LINES, MAX_FUNCTION_LINES = 300, 50


@dataclass(frozen=True)
class Source:
    """A file of the package: `module` is its dotted name without "distnorm.", `room` its entry in ORDER."""

    module: str
    path: Path
    tree: ast.Module

    @property
    def room(self) -> str:
        return self.module.split(".")[0]

    def is_among(self, names: set[str]) -> bool:
        """Whether the names have the file, or its room."""
        return self.module in names or self.room in names


@cache
def sources() -> tuple[Source, ...]:
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found.append(Source(module, path, ast.parse(path.read_text(encoding="utf-8"), str(path))))
    return tuple(found)


def library() -> list[Source]:
    """All files but the catalogue."""
    return [source for source in sources() if source.module]


def runtime_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes below, except what only a type checker reads."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            yield from (inner for branch in child.orelse for inner in ast.walk(branch))
        else:
            yield child
            yield from runtime_nodes(child)


def imported(nodes: Iterator[ast.AST]) -> Iterator[str]:
    """Dotted names, `a.b.c` for both `import a.b.c` and `from a.b import c`."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def ours(names: Iterator[str]) -> Iterator[str]:
    """The modules of the package among `names`; "" is the catalogue."""
    modules = {source.module for source in sources()}
    for name in names:
        first, _, rest = name.partition(".")
        if first == "distnorm":
            while rest not in modules:
                rest = rest.rpartition(".")[0]
            yield rest


def import_faults(source: Source) -> Iterator[str]:
    for target in ours(imported(ast.walk(source.tree))):
        room = target.split(".")[0]
        if room == source.room:
            continue
        if target == "":
            if source.room not in USERS_OF_PUBLIC_NAMES:
                yield f"{source.module} imports the catalogue"
        elif room in APART:
            yield f"{source.module} imports {target}, which stands apart"
        elif source.room not in APART and ORDER.index(room) > ORDER.index(source.room):
            yield f"{source.module} imports {target}, which stands below it"


def collective_calls(tree: ast.AST) -> Iterator[str]:
    """Calls of a collective, under whatever name torch.distributed's modules or functions have there."""
    homes: set[str] = set()
    functions: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            homes |= {a.asname or a.name for a in node.names if a.name.startswith("torch.distributed")}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch"):
            names = {alias.asname or alias.name: alias.name for alias in node.names}
            homes |= {
                name for name, original in names.items() if original in ("distributed", "distributed_c10d")
            }
            homes |= {name for name in names if "functional_collectives" in names[name]}
            if "distributed" in (node.module or ""):
                functions |= {name for name, original in names.items() if COLLECTIVES.fullmatch(original)}
    homes |= {"torch.distributed"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            home, _, name = called.rpartition(".")
            if called in functions or (home in homes and COLLECTIVES.fullmatch(name)):
                yield f"line {node.lineno}: {called}"


def order_compared_with_infinity(tree: ast.AST) -> Iterator[str]:
    """Places that ask whether a norm's order, whatever it is called there, is infinite."""
    order = re.compile(r"(^|\W)(p|ord|order|norm_type|norm\.type)($|\W)")
    infinity = re.compile(r"(^|\W)inf($|\W)")
    for node in ast.walk(tree):
        asked = ""
        if isinstance(node, ast.Call) and re.search(r"is_?(inf|finite)$", ast.unparse(node.func)):
            asked = " ".join(ast.unparse(argument) for argument in node.args)
        elif isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            infinite = [side for side in sides if infinity.search(ast.unparse(side))]
            asked = " ".join(ast.unparse(side) for side in sides if side not in infinite) if infinite else ""
        if order.search(asked):
            yield f"line {node.lineno}: {ast.unparse(node)}"


def run_python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_file_has_a_room_and_the_top_stays_small():
    assert {source.room for source in library()} == {*ORDER, *APART}
    top = [path for path in PACKAGE.iterdir() if path.suffix == ".py"]
    packages = [path for path in PACKAGE.iterdir() if (path / "__init__.py").exists()]
    assert len(top) <= MOST_MODULES and len(packages) <= MOST_PACKAGES


def test_contributing_says_the_order():
    text = (PACKAGE.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    listed = re.search(r"proves it:\n\n```\n(.*?)```", text, re.DOTALL)
    assert listed is not None
    assert [word.strip("/") for word in listed[1].split()] == ORDER


def test_imports_run_downward_only():
    assert [fault for source in library() for fault in import_faults(source)] == []


def circles(graph: dict[str, set[str]]) -> list[tuple[str, ...]]:
    """Modules that import each other, the first of each way round that is found."""
    found: list[tuple[str, ...]] = []
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        if module in path:
            found.append(path[path.index(module) :])
        elif module not in done:
            for target in sorted(graph.get(module, ())):
                visit(target, (*path, module))
            done.add(module)

    for module in graph:
        visit(module, ())
    return found


def test_no_files_import_each_other_in_circles():
    """Neither for a type checker only, nor at a first use: who reads one file reads only downward."""
    graph = {s.module: set(ours(imported(ast.walk(s.tree)))) - {s.module, ""} for s in library()}
    assert circles(graph) == []
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == [("b", "c")]


def test_sources_never_import_each_other():
    frameworks = [
        s
        for s in library()
        if s.room == "sources" and s.path.stem in ("plain", "dtensor", "fsdp1", "deepspeed")
    ]
    for source in frameworks:
        others = {other.module for other in frameworks} - {source.module}
        assert not others & set(ours(imported(ast.walk(source.tree)))), source.module


def test_the_trainer_and_the_bench_import_public_names_only():
    for source in library():
        if source.room in ("trainer", "bench"):
            targets = set(ours(imported(ast.walk(source.tree))))
            allowed = {"trainer", source.room}
            assert {t for t in targets if t and t.split(".")[0] not in allowed} == set(), source.module


def test_no_framework_is_imported_at_module_level():
    """But its own by an adapter, which nothing of ours imports, since it may derive classes from it."""
    for source in sources():
        own = {source.path.stem} if source.room == "integrations" else set()
        top = [
            node
            for node in ast.walk(source.tree)
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        ]
        inside = {inner for function in top for inner in ast.walk(function)}
        outside = (node for node in runtime_nodes(source.tree) if node not in inside)
        assert not {name.split(".")[0] for name in imported(outside)} & (FRAMEWORKS - own), source.module


def test_only_collectives_issues_collectives():
    found = {
        s.module: list(collective_calls(s.tree)) for s in library() if not s.is_among(MAY_ISSUE_COLLECTIVES)
    }
    assert {module: calls for module, calls in found.items() if calls} == {}


@pytest.mark.parametrize(
    "code",
    [
        "import torch.distributed as dist\ndist.all_reduce(t)",
        "import torch\ntorch.distributed.all_gather_object(a, b)",
        "from torch import distributed as d\nd.broadcast(t, 0)",
        "from torch.distributed import all_to_all_single as swap\nswap(a, b)",
        "import torch.distributed._functional_collectives as f\nf.all_reduce(t, 'sum', g)",
        "from torch.distributed.distributed_c10d import reduce_scatter_tensor\nreduce_scatter_tensor(a, b)",
    ],
)
def test_the_search_for_collectives_finds_them(code):
    assert list(collective_calls(ast.parse(code)))
    assert not list(
        collective_calls(ast.parse("ranks.all_reduce(t)\nfunctools.reduce(f, x)\nt.scatter(0, i, x)"))
    )


def test_only_norms_asks_whether_p_is_infinite():
    found = {
        s.module: list(order_compared_with_infinity(s.tree))
        for s in library()
        if not s.is_among(MAY_ASK_WHETHER_P_IS_INFINITE)
    }
    assert {module: places for module, places in found.items() if places} == {}


@pytest.mark.parametrize(
    "code",
    ["math.isinf(p)", "norm_type == float('inf')", "math.inf != config.norm.type", "p in (torch.inf, 2)"],
)
def test_the_search_for_infinite_orders_finds_them(code):
    assert list(order_compared_with_infinity(ast.parse(code)))
    assert not list(
        order_compared_with_infinity(ast.parse("math.isinf(max_norm)\nt.isfinite()\nx < math.inf\np > 0"))
    )


def made_on_the_default_device(tree: ast.AST) -> Iterator[str]:
    """Calls of torch's factories that don't say on which device, whose default the caller may have set."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            home, name = ast.unparse(node.func.value), node.func.attr
            says = any(keyword.arg in ("device", None) for keyword in node.keywords)
            if home == "torch" and name in FACTORIES and not says:
                yield f"line {node.lineno}: {ast.unparse(node)}"


def test_every_tensor_is_made_on_a_device_that_is_said():
    found = {s.module: list(made_on_the_default_device(s.tree)) for s in library() if s.room in MAKES_TENSORS}
    assert {module: calls for module, calls in found.items() if calls} == {}


@pytest.mark.parametrize("name", sorted(FACTORIES))
def test_the_search_for_default_devices_finds_them(name):
    assert list(made_on_the_default_device(ast.parse(f"x = f(torch.{name}(3, dtype=torch.int64))")))
    fine = f"torch.{name}(3, device='cpu')\nx.new_{name}(3)\ntorch.{name}_like(x)\nnumpy.{name}(3)"
    assert not list(made_on_the_default_device(ast.parse(fine)))


def test_files_and_functions_stay_short():
    too_long = []
    for source in sources():
        if (lines := len(source.path.read_text(encoding="utf-8").splitlines())) > MAX_LINES:
            too_long.append(f"{source.path.name}: {lines} lines")
        for node in ast.walk(source.tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                assert node.end_lineno is not None
                if (lines := node.end_lineno - node.lineno + 1) > MAX_FUNCTION_LINES:
                    too_long.append(f"{source.path.name}: {node.name}: {lines} lines")
    assert too_long == []


def test_what_needs_no_torch_imports_none():
    code = """
        import sys, distnorm
        from distnorm.cli import main
        distnorm.load_config({"clip": {"max_norm": 1e-3}}), distnorm.RunError, dir(distnorm)
        print([name for name in ("torch", "deepspeed", "numpy") if name in sys.modules])
    """
    assert run_python(inspect.cleandoc(code)) == "[]\n"


def test_plain_tensors_need_no_framework_that_the_caller_has_not_imported():
    code = """
        import sys, torch
        before = set(sys.modules)
        import distnorm
        grads = [torch.tensor([3.0, 4.0])]
        assert distnorm.get_total_norm(grads) == 5.0
        weight = torch.nn.Parameter(torch.ones(2)); weight.grad = grads[0]
        distnorm.GradClipper([weight], {"clip": {"max_norm": 1.0}}).clip()
        watched = ("torch.distributed.tensor", "torch.distributed.fsdp", "deepspeed")
        print(sorted(name for name in set(sys.modules) - before if name.startswith(watched)))
    """
    assert run_python(inspect.cleandoc(code)) == "[]\n"


def test_the_catalogue_agrees_with_itself():
    table = [name for names in distnorm._HOMES.values() for name in names]
    checked = [
        name.rpartition(".")[2]
        for name in imported(ast.walk(sources()[0].tree))
        if name.startswith("distnorm.")
    ]
    assert sorted(table) == sorted(distnorm.__all__) == sorted(checked)
    assert set(distnorm.__all__) <= set(dir(distnorm))
    with pytest.raises(AttributeError, match="has no attribute 'get_total_nrom'"):
        _ = distnorm.get_total_nrom


def test_verify_is_the_function_whatever_has_been_imported():
    code = "import distnorm.verification as v, distnorm; print(distnorm.verify is v.verify)"
    assert run_python(code) == "True\n"


def public_surface() -> dict[str, str]:
    """Every public name with its signature, and the public members of the classes that users hold."""
    surface = {}
    for name in distnorm.__all__:
        value = getattr(distnorm, name)
        if inspect.isclass(value) and issubclass(value, Exception):
            surface[name] = f"kind of {', '.join(base.__name__ for base in value.__bases__)}"
        elif name == "Config":  # pydantic writes its signature, differently from version to version
            surface[name] = f"({', '.join(value.model_fields)})"
        else:
            surface[name] = str(inspect.signature(value)).replace("'", "")
        if name in ("GradClipper", "ClipResult", "Monitor", "VerifyReport", "DoctorReport"):
            for member, attribute in sorted(vars(value).items()):
                if not member.startswith("_"):
                    shown = (
                        str(inspect.signature(attribute)) if inspect.isfunction(attribute) else "attribute"
                    )
                    surface[f"{name}.{member}"] = shown.replace("'", "")
    return surface


def test_the_public_surface_is_frozen():
    """A change here is a change for users: it needs a line in CHANGELOG.md."""
    frozen = json.loads((Path(__file__).parent / "public_surface.json").read_text(encoding="utf-8"))
    assert public_surface() == frozen


def test_every_public_name_is_documented():
    for name in distnorm.__all__:
        value = getattr(distnorm, name)
        assert value.__doc__ and len(value.__doc__.split()) > 3, name
        for member, attribute in vars(value).items() if inspect.isclass(value) else ():
            if inspect.isfunction(attribute) and not member.startswith("_"):
                assert attribute.__doc__, f"{name}.{member}"
