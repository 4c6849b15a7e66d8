"""The architecture's laws, read from the source of every module."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Set
from dataclasses import dataclass
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parent.parent
PACKAGE = "ensemble_rm"

# The order of the rooms, from the ground up: an import never points to a later row.
FLOORS = {
    room: floor
    for floor, rooms in enumerate(
        (
            (
                "errors",
                "arrays",
                "field_help",
                "file_modes",
                "progress",
                "sqlite",
                "plotting",
                "text_table",
            ),
            ("saved_json", "file_digests"),
            ("data",),
            ("aggregation",),
            ("metrics",),
            ("uncertainty",),
            ("calibration",),
            ("members",),
            ("scoring",),
            ("versions",),
            ("ensemble",),
            ("training",),
            ("judgments",),
            ("evidence",),
            ("drift",),
            ("recalibration",),
            ("retraining",),
            ("active_learning",),
            ("best_of_n",),
            ("evaluation",),
            ("rl",),
            ("server",),
            ("demo",),
            ("cli",),
            ("__main__", "__init__"),
        )
    )
    for room in rooms
}

# Third party -> the rooms that may import it.
HOMES = {
    "torch": {"members", "training", "demo.make_data", "rl.trl_kl", "rl.monitor.trl_callback"},
    "transformers": {"members", "training", "demo.make_data", "rl.monitor.trl_callback"},
    "accelerate": {"members", "training", "demo.make_data", "rl.monitor.trl_callback"},
    "sklearn": {"calibration", "metrics"},
    "netcal": {"calibration", "metrics"},
    "matplotlib": {"plotting", "drift.plots", "evaluation.report", "rl.monitor.plot"},
    "datasets": {"data", "judgments"},
    "gguf": {"members"},
    "peft": {"members"},
    "filelock": {"versions"},
    "sqlalchemy": {"judgments"},
    "alembic": {"judgments"},
    "psycopg": {"judgments"},
    "httpx": {"members.remote"},
    "starlette": {"server"},
    "uvicorn": {"server"},
    "prometheus_client": {"server"},
    "pydantic": {"server"},
    "pydantic_core": {"server"},
}
INSIDE_FUNCTIONS = {"sklearn", "netcal", "matplotlib", "datasets", "gguf", "httpx", "peft"}
# May print, configure logging and read the environment.
COMMANDS = frozenset({"cli", "__main__", "demo.make_data"})
# May seed a global generator: in a context that restores it, which a test of its own holds.
SEEDERS = frozenset({"members.learning", "members.branches.gradient_training", "demo.make_data"})
PICKLERS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


@dataclass(frozen=True)
class Import:
    """One import: the module it names, where it stands."""

    target: str
    line: int
    in_function: bool


@dataclass(frozen=True)
class Module:
    """One source file of the package."""

    name: str  # without the package's own, "__init__" for its root
    path: Path
    tree: ast.Module

    @property
    def room(self) -> str:
        return self.name.split(".")[0]

    def at(self, node: ast.AST) -> str:
        return f"{self.path.relative_to(CHECKOUT)}:{getattr(node, 'lineno', 0)}"


def read_modules() -> tuple[Module, ...]:
    found = []
    for path in sorted((CHECKOUT / PACKAGE).rglob("*.py")):
        parts = path.relative_to(CHECKOUT / PACKAGE).with_suffix("").parts
        if parts[-1] == "__init__" and len(parts) > 1:
            parts = parts[:-1]
        found.append(Module(".".join(parts), path, ast.parse(path.read_text(encoding="utf-8"))))
    return tuple(found)


MODULES = read_modules()
NAMES = {module.name for module in MODULES}


def each_module(*, except_in: frozenset[str] = frozenset()) -> pytest.MarkDecorator:
    chosen = [module for module in MODULES if not lies_in(module.name, except_in)]
    return pytest.mark.parametrize("module", chosen, ids=lambda module: module.name)


def lies_in(name: str, homes: Set[str]) -> bool:
    return any(name == home or name.startswith(f"{home}.") for home in homes)


def walk(node: ast.AST, *, in_function: bool = False) -> Iterator[tuple[ast.AST, bool]]:
    """Every node below, with whether it stands inside a function."""
    for child in ast.iter_child_nodes(node):
        yield child, in_function
        inside = in_function or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
        yield from walk(child, in_function=inside)


def imports(module: Module) -> Iterator[Import]:
    for node, in_function in walk(module.tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, in_function)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module.at(node)}: a relative import"
            for alias in node.names:
                yield Import(f"{node.module}.{alias.name}", node.lineno, in_function)


def own(target: str) -> str | None:
    """The package's module that an import's target lies in; None for a third party's."""
    parts = target.split(".")
    if parts[0] != PACKAGE:
        return None
    for end in range(len(parts), 1, -1):
        name = ".".join(parts[1:end])
        if name in NAMES:
            return name
    return "__init__"


def calls(module: Module) -> Iterator[tuple[ast.Call, str]]:
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Call):
            yield node, ast.unparse(node.func)


def is_constant(call: ast.Call, keyword: str, value: object) -> bool:
    return any(
        word.arg == keyword and isinstance(word.value, ast.Constant) and word.value.value is value
        for word in call.keywords
    )


def test_every_room_has_a_floor() -> None:
    assert {module.room for module in MODULES} <= set(FLOORS)


@each_module()
def test_imports_never_point_up(module: Module) -> None:
    for entry in imports(module):
        target = own(entry.target)
        if target is None or entry.target == f"{PACKAGE}.__version__":
            continue
        above = FLOORS[target.split(".")[0]] > FLOORS[module.room]
        assert not above, f"{module.name}:{entry.line} imports {target} from a floor above"


@each_module()
def test_third_parties_stay_in_their_rooms(module: Module) -> None:
    for entry in imports(module):
        party = entry.target.split(".")[0]
        if party not in HOMES:
            continue
        where = f"{module.name}:{entry.line} imports {party}"
        assert lies_in(module.name, HOMES[party]), f"{where}; only {sorted(HOMES[party])} may"
        if party in INSIDE_FUNCTIONS:
            assert entry.in_function, f"{where} at its head; import it inside the function"


def test_calibration_sees_neither_text_nor_models() -> None:
    for module in MODULES:
        if module.room == "calibration":
            for entry in imports(module):
                seen = lies_in(own(entry.target) or "", {"data", "members"})
                assert not seen, f"{module.name}:{entry.line} imports {entry.target}"


def is_kind(node: ast.AST) -> bool:
    """Whether a class is a kind of member: it has a kind's name."""
    return isinstance(node, ast.ClassDef) and any(
        isinstance(item, ast.Assign)
        and ast.unparse(item.targets[0]) == "kind"
        and isinstance(item.value, ast.Constant)
        for item in node.body
    )


def test_members_do_not_know_each_other() -> None:
    kinds = {
        module.name
        for module in MODULES
        if module.name.startswith("members.") and any(map(is_kind, module.tree.body))
    }
    assert len(kinds) > 5
    for module in MODULES:
        if module.name in kinds:
            known = {own(entry.target) for entry in imports(module)} & (kinds - {module.name})
            assert not known, f"{module.name} imports another kind of member: {sorted(known)}"


def test_no_import_cycles() -> None:
    needs = {
        module.name: {
            target
            for entry in imports(module)
            if not entry.in_function and (target := own(entry.target)) not in (None, "__init__")
        }
        for module in MODULES
        if module.name != "__init__"
    }
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"an import cycle: {' -> '.join((*path, name))}"
        if name not in done:
            for target in sorted(needs.get(name, set()) - {name}):
                visit(target, (*path, name))
            done.add(name)

    for name in sorted(needs):
        visit(name, ())


@each_module(except_in=COMMANDS)
def test_the_library_is_quiet(module: Module) -> None:
    """No print, no logging set up, no environment read, but on the command line."""
    banned_calls = {"print", "logging.basicConfig", "logging.config.dictConfig", "os.getenv"}
    for call, name in calls(module):
        assert name not in banned_calls, f"{module.at(call)}: {name}"
        assert not name.endswith((".addHandler", ".setLevel")), f"{module.at(call)}: {name}"
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Attribute):
            name = ast.unparse(node)
            assert name not in {"os.environ", "sys.stdout", "sys.stderr"}, module.at(node)
    for entry in imports(module):
        assert entry.target not in {"os.environ", "os.getenv", "logging.config"}, module.name


@each_module(except_in=SEEDERS)
def test_no_global_generator_is_seeded(module: Module) -> None:
    seeders = {"random.seed", "np.random.seed", "torch.manual_seed", "set_seed", "seed_everything"}
    for call, name in calls(module):
        assert name not in seeders, f"{module.at(call)}: {name}"
        assert not name.endswith((".set_seed", "random.set_state")), f"{module.at(call)}: {name}"


@each_module()
def test_no_pickle_and_no_remote_code(module: Module) -> None:
    for entry in imports(module):
        assert entry.target.split(".")[0] not in PICKLERS, f"{module.name}:{entry.line}"
    for call, name in calls(module):
        assert not is_constant(call, "trust_remote_code", True), module.at(call)
        if name.startswith("Auto") and name.endswith((".from_pretrained", ".from_config")):
            # Without it, transformers asks on standard input whether to run a model's code.
            given = {keyword.arg for keyword in call.keywords}
            assert "trust_remote_code" in given, f"{module.at(call)}: trust_remote_code"
        assert not is_constant(call, "allow_pickle", True), module.at(call)
        if name == "torch.load":
            assert is_constant(call, "weights_only", True), f"{module.at(call)}: weights_only"
