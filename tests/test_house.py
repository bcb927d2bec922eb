"""Rules that the whole house keeps: imports go downwards, nothing is unpickled, help comes at once."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "lopt_lite"
SOURCES = sorted([*PACKAGE.rglob("*.py"), *(ROOT / "cli").glob("*.py")])

#: From the bottom up; a room imports from itself and from rooms below it. Modules in no room are level 0, but for
#: ``lopt_lite/__init__.py``, which offers all operations.
LEVELS = {"": 0, "checkpoints": 1, "data": 2, "residency": 3, "training": 4, "results": 5, "cli": 6}


def room(path: Path) -> str:
    if path.parent == ROOT / "cli":
        return "cli"
    return "" if path.parent == PACKAGE else path.relative_to(PACKAGE).parts[0]


def room_of_module(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in LEVELS else ""


def imports(path: Path) -> Iterator[tuple[str, str]]:
    """(module, name) of every import from the package in ``path``, at any depth; name is "" for ``import module``."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names if alias.name.split(".")[0] == "lopt_lite")
        elif isinstance(node, ast.ImportFrom):
            if node.level and path.parent != ROOT / "cli":
                raise AssertionError(f"{path} has a relative import")
            if node.module and node.module.split(".")[0] == "lopt_lite":
                for alias in node.names:
                    # ``from lopt_lite.data import batches`` reaches the same module as importing it by its full name.
                    inner = f"{node.module}.{alias.name}"
                    is_module = (ROOT / Path(*inner.split("."))).with_suffix(".py").exists()
                    yield (inner if is_module or node.module == "lopt_lite" else node.module), alias.name


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_downwards(path):
    if path == PACKAGE / "__init__.py":
        pytest.skip("offers the operations of all rooms")
    for module, _ in imports(path):
        assert LEVELS[room_of_module(module)] <= LEVELS[room(path)], f"{path.name} imports {module}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_room_uses_another_rooms_private_names(path):
    for module, name in imports(path):
        private = [part for part in [*module.split("."), name] if part.startswith("_") and not part.startswith("__")]
        assert not private or room_of_module(module) == room(path), f"{path.name} imports {module}.{name}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_is_unpickled_and_no_remote_code_is_run(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            assert not {alias.name.split(".")[0] for alias in node.names} & {"pickle", "dill", "joblib", "marshal"}
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in ("torch.load", "pickle.load", "pickle.loads", "eval", "exec", "os.system")
            for keyword in node.keywords:
                if keyword.arg == "trust_remote_code":
                    assert ast.unparse(keyword.value) == "False", f"{path.name}:{node.lineno}"
        if isinstance(node, ast.ExceptHandler):
            caught = ast.unparse(node.type) if node.type is not None else "everything"
            passes_on = any(isinstance(inner, ast.Raise) and inner.exc is None for inner in ast.walk(node))
            assert passes_on or caught not in ("everything", "Exception"), f"{path.name}:{node.lineno} hides errors"


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_the_package_does_not_print(path):
    calls = [n for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(n, ast.Call)]
    assert not [call.lineno for call in calls if ast.unparse(call.func) in ("print", "sys.stdout.write")]


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["export", "--help"], ["--version"]])
def test_help_does_not_load_torch(arguments):
    code = (
        "import sys\n"
        "from lopt_lite_cli.main import main\n"
        f"code = main({arguments!r})\n"
        "heavy = {'torch', 'transformers', 'numpy', 'safetensors', 'peft', 'bitsandbytes'} & set(sys.modules)\n"
        "sys.exit(f'loaded {heavy}' if heavy else code)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_help_comes_within_half_a_second():
    command = [sys.executable, "-c", "import sys; from lopt_lite_cli.main import main; sys.exit(main(['--help']))"]

    def seconds() -> float:
        started = time.perf_counter()
        subprocess.run(command, capture_output=True, check=True)
        return time.perf_counter() - started

    # The best of several: a busy machine may slow one down, but cannot speed one up.
    assert min(seconds() for _ in range(5)) < 0.5


def tracked_texts() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode:
        return []
    paths = [ROOT / name for name in listed.stdout.split("\0") if name]
    return [path for path in paths if path.is_file() and path.suffix not in (".png", ".safetensors", ".gguf")]


def test_no_tracked_file_names_a_place_on_somebodys_machine():
    paths = tracked_texts()
    if not paths:
        pytest.skip("not a git checkout")
    machine_path = re.compile(r"(?<![\w.])/(?:work|tmp|root|home|Users)/[A-Za-z0-9_.]")
    found = []
    for path in paths:
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
            if machine_path.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    assert not found, "\n".join(found)
