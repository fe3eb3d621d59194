"""Who may know whom: imports only go down, and only the framework room knows Detectron2."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# A room may import itself and rooms further down (earlier in this list).
ORDER = [
    "dfm_kernels",
    "framework",
    "config",
    "core",
    "predictors",
    "losses",
    "data",
    "evaluation",
    "modeling",
    "visualize",
    "visualize_classes",
    "engine",
    "export",
    "tools",
    "benchmarks",
]
# Pure torch: they see explicit arguments, never a config or a framework.
PURE = {"dfm_kernels", "core", "predictors", "losses"}
CONFIG_MODULES = ("yacs", "fvcore.common.config", "omegaconf")


def _room_of(path: Path) -> str:
    parts = path.relative_to(ROOT).parts
    if parts[0] == "kernels":
        return "dfm_kernels"
    return parts[0] if parts[0] != "dfm_d2" else parts[1].removesuffix(".py")


def _files() -> list[Path]:
    folders = [ROOT / name for name in ("dfm_d2", "kernels", "tools", "benchmarks")]
    files = [path for folder in folders for path in sorted(folder.rglob("*.py"))]
    # dfm_d2/__init__.py belongs to no room: it may import nothing of ours.
    return [path for path in files if path != ROOT / "dfm_d2" / "__init__.py"]


def _imported_modules(path: Path) -> list[str]:
    """Full names of the modules that a file imports, anywhere in it; `from a import b` counts as a.b."""
    modules = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, (
                f"{path.relative_to(ROOT)}:{node.lineno}: write imports in full, from dfm_d2"
            )
            modules += [f"{node.module}.{alias.name}" for alias in node.names]
    return modules


def _imported_rooms(path: Path) -> set[str]:
    rooms = set()
    for module in _imported_modules(path):
        parts = module.split(".")
        if parts[0] == "dfm_kernels" or parts[0] in ("tools", "benchmarks"):
            rooms.add(parts[0])
        elif parts[0] == "dfm_d2" and len(parts) > 1 and parts[1] != "__version__":
            rooms.add(parts[1])
    return rooms


@pytest.fixture(params=_files(), ids=lambda path: str(path.relative_to(ROOT)))
def file(request) -> Path:
    return request.param


def test_imports_only_go_down(file):
    room = _room_of(file)
    assert room in ORDER, f"{room} is a new room: give it its place in ORDER"
    unknown = _imported_rooms(file) - set(ORDER)
    assert not unknown, f"imports {unknown}, which have no place in ORDER"
    up = [other for other in _imported_rooms(file) if ORDER.index(other) > ORDER.index(room)]
    assert not up, f"{room} imports {up}, which is above it"


def test_pure_rooms_know_no_framework_and_no_config(file):
    if _room_of(file) not in PURE:
        return
    assert not _imported_rooms(file) & {"framework", "config"}
    assert not [module for module in _imported_modules(file) if module.startswith(CONFIG_MODULES)]
    tree = ast.parse(file.read_text())
    names = {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
    names |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    assert not names & {"cfg", "CfgNode"}, "a config gets in: pass the values themselves"


def test_only_one_file_imports_detectron2(file):
    if file == ROOT / "dfm_d2" / "framework" / "_detectron2.py":
        return
    assert not [module for module in _imported_modules(file) if module.split(".")[0] == "detectron2"]


def test_nobody_touches_sys_modules(file):
    touches = [
        node.lineno
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Attribute) and node.attr == "modules" and ast.unparse(node.value) == "sys"
    ]
    assert not touches


def test_framework_is_used_through_its_closed_list(file):
    if _room_of(file) == "framework":
        return
    inner = [module for module in _imported_modules(file) if module.startswith("dfm_d2.framework._")]
    assert not inner, f"import these names from dfm_d2.framework: {inner}"


def test_the_package_itself_imports_nothing_of_ours():
    assert not _imported_rooms(ROOT / "dfm_d2" / "__init__.py")
