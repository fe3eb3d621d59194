"""Who may know whom: imports only go down, and only the framework package knows Detectron2."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# A package may import itself and packages further down (earlier in this list).
ORDER = [
    "dfm_kernels",
    "errors",
    "framework",
    "flow",
    "local_update",
    "data",
    "engine",
    "export",
    "visualize",
    "detection",
    "classification",
    "config",
    "registry",
    "command_line",
    "tools",
    "benchmarks",
]
# Packages that never know each other, whatever their order.
APART = [{"detection", "classification"}, {"export", "visualize"}]
# Pure torch: they see explicit arguments, never a config or a framework. local_update stands alone.
MAY_KNOW = {"dfm_kernels": set(), "local_update": set(), "flow": {"dfm_kernels"}}
CONFIG_MODULES = ("yacs", "fvcore.common.config", "omegaconf")


def _package_of(path: Path) -> str:
    parts = path.relative_to(ROOT).parts
    if parts[0] == "kernels":
        return "dfm_kernels"
    return parts[0] if parts[0] != "dfm_d2" else parts[1].removesuffix(".py")


def _files() -> list[Path]:
    folders = [ROOT / name for name in ("dfm_d2", "kernels", "tools", "benchmarks")]
    return [path for folder in folders for path in sorted(folder.rglob("*.py"))]


def _imported_modules(path: Path) -> list[str]:
    """Full names of the modules that a file imports, anywhere in it; `from a import b` counts as a.b."""
    modules = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{_at(path, node)}: write imports in full, from dfm_d2"
            modules += [f"{node.module}.{alias.name}" for alias in node.names]
    return modules


def _at(path: Path, node: ast.AST) -> str:
    return f"{path.relative_to(ROOT)}:{node.lineno}"


def _imported_packages(path: Path) -> set[str]:
    packages = set()
    for module in _imported_modules(path):
        parts = module.split(".")
        if parts[0] in ("dfm_kernels", "tools", "benchmarks"):
            packages.add(parts[0])
        elif parts[0] == "dfm_d2" and len(parts) > 1 and parts[1] != "__version__":
            packages.add(parts[1])
    return packages


def test_imports_only_go_down():
    wrong = []
    for path in _files():
        package, imported = _package_of(path), _imported_packages(path)
        if path == ROOT / "dfm_d2" / "__init__.py":
            wrong += [f"dfm_d2/__init__.py imports {other}" for other in imported]
            continue
        for other in sorted({package, *imported} - set(ORDER)):
            wrong.append(f"{other} has no place in ORDER")
        above = ORDER[ORDER.index(package) + 1 :]
        apart = {other for pair in APART if package in pair for other in pair - {package}}
        allowed = MAY_KNOW.get(package, set(ORDER) - set(above) - apart) | {package}
        for other in sorted(imported - allowed):
            wrong.append(f"{path.relative_to(ROOT)} imports {other}")
    assert not wrong


def test_no_config_gets_into_pure_packages():
    wrong = []
    for path in _files():
        if _package_of(path) not in MAY_KNOW:
            continue
        wrong += [module for module in _imported_modules(path) if module.startswith(CONFIG_MODULES)]
        for node in ast.walk(ast.parse(path.read_text())):
            if (isinstance(node, ast.arg) and node.arg == "cfg") or (
                isinstance(node, ast.Name) and node.id in ("cfg", "CfgNode")
            ):
                wrong.append(f"{_at(path, node)}: pass the values themselves")
    assert not wrong


def test_only_one_file_imports_detectron2():
    provider = ROOT / "dfm_d2" / "framework" / "_detectron2.py"
    wrong = [
        f"{path.relative_to(ROOT)}: {module}"
        for path in _files()
        if path != provider
        for module in _imported_modules(path)
        if module.split(".")[0] == "detectron2"
    ]
    assert not wrong


def test_nobody_touches_sys_modules():
    wrong = [
        _at(path, node)
        for path in _files()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr == "modules" and ast.unparse(node.value) == "sys"
    ]
    assert not wrong


def test_framework_is_used_through_its_closed_list():
    wrong = [
        f"{path.relative_to(ROOT)}: {module}"
        for path in _files()
        if _package_of(path) != "framework"
        for module in _imported_modules(path)
        if module.startswith("dfm_d2.framework._")
    ]
    assert not wrong
