#!/usr/bin/env python
"""Print the packages of this project, with their files, lines of Python and imports, as a Markdown table.

python tools/packages.py
"""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("dfm_d2", "kernels", "tools", "benchmarks", "examples", "tests")


def package_of(path: Path) -> str:
    """dfm_d2/flow/path.py is of dfm_d2.flow, kernels/dfm_kernels/dispatch.py of dfm_kernels; a module beside
    packages, such as dfm_d2/errors.py, counts as one."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    if parts[0] == "kernels":
        return parts[1]
    return ".".join(parts[:2]).removesuffix(".__init__") if parts[0] == "dfm_d2" else parts[0]


def imports_of(path: Path, packages: set[str]) -> set[str]:
    """The packages that a file imports, anywhere in it."""
    modules = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules += [f"{node.module}.{alias.name}" for alias in node.names]
    names = {".".join(module.split(".")[:2]) for module in modules}
    return {name if name in packages else name.split(".")[0] for name in names} & packages


def table() -> str:
    """The table; its last line is the Python that is no test."""
    files: dict[str, list[Path]] = {}
    for path in (path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))):
        files.setdefault(package_of(path), []).append(path)
    rows, total = [("package", "files", "lines", "imports"), ("---",) * 4], [0, 0]
    for package, paths in files.items():
        lines = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in paths)
        imports = set().union(*(imports_of(path, set(files)) for path in paths)) - {package}
        rows.append((package, len(paths), lines, ", ".join(sorted(imports))))
        if package != "tests":
            total = [total[0] + len(paths), total[1] + lines]
    rows.append(("all but the tests", *total, ""))
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in rows)


if __name__ == "__main__":
    print(table())
