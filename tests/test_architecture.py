"""Who may know whom: imports only go down, and only the framework package knows Detectron2."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# A package may import itself and packages further down (earlier in this list).
ORDER = (
    "dfm_kernels errors safe_yaml framework flow local_update data engine export visualize detection "
    "classification config registry command_line tools benchmarks"
).split()
# Packages that never know each other, whatever their order.
APART = [{"detection", "classification"}, {"export", "visualize"}]
# Pure torch: they see explicit arguments, never a config or a framework. local_update stands alone.
MAY_KNOW = {"dfm_kernels": set(), "local_update": set(), "flow": {"dfm_kernels"}}
CONFIG_MODULES = ("yacs", "fvcore.common.config", "omegaconf")
# Functions that import what a text names.
CALLS = ("import_module", "__import__", "find_spec")


def _package_of(path: Path) -> str:
    parts = path.relative_to(ROOT).parts
    if parts[0] == "kernels":
        return "dfm_kernels"
    return parts[0] if parts[0] != "dfm_d2" else parts[1].removesuffix(".py")


# The syntax of each file of ours, node by node.
FOLDERS = ("dfm_d2", "kernels", "tools", "benchmarks")
PATHS = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
NODES = [(path, node) for path in PATHS for node in ast.walk(ast.parse(path.read_text()))]
PURE = {path for path in PATHS if _package_of(path) in MAY_KNOW}


def _at(path: Path, node: ast.AST) -> str:
    return f"{path.relative_to(ROOT)}:{node.lineno}"


def _imported(path: Path, node: ast.AST) -> list[str]:
    """The full names of the modules that a node imports, also by a call; `from a import b` counts as a.b."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, f"{_at(path, node)}: write imports in full, from dfm_d2"
        return [f"{node.module}.{alias.name}" for alias in node.names]
    if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(CALLS):
        parts = (part for argument in node.args for part in ast.walk(argument))
        return [str(part.value) for part in parts if isinstance(part, ast.Constant)]
    return []


IMPORTS = [(_at(path, node), path, name) for path, node in NODES for name in _imported(path, node)]


def test_imports_only_go_down():
    wrong = []
    for place, path, module in IMPORTS:
        top, *below = module.split(".")
        if top not in ("dfm_d2", "dfm_kernels", "tools", "benchmarks") or below[:1] == ["__version__"]:
            continue
        package, other = _package_of(path), below[0] if top == "dfm_d2" and below else top
        assert {package, other} <= {*ORDER, "__init__"}, f"{place}: {package} or {other} is not in ORDER"
        below_it = ORDER[: ORDER.index(package)] if package in ORDER else []
        apart = {name for pair in APART if package in pair for name in pair}
        if other not in MAY_KNOW.get(package, set(below_it) - apart) | {package}:
            wrong.append(f"{place} imports {other}")
    assert not wrong


def test_no_config_gets_into_pure_packages():
    wrong = [place for place, path, name in IMPORTS if path in PURE and name.startswith(CONFIG_MODULES)]
    for path, node in NODES:
        name = getattr(node, "arg", None) if isinstance(node, ast.arg) else getattr(node, "id", None)
        if path in PURE and name in ("cfg", "CfgNode"):
            wrong.append(f"{_at(path, node)}: pass the values themselves")
    assert not wrong


def test_private_parts_of_torch_are_listed():
    names = {name for _, _, name in IMPORTS} | {
        ast.unparse(node) for _, node in NODES if isinstance(node, ast.Attribute)
    }
    private = {name for name in names if re.fullmatch(r"torch\.(?!ops\.|__)(\w+\.)*_\w+(\.\w+)*", name)}
    private -= {name.rpartition(".")[0] for name in private}
    table = (ROOT / "docs/architecture.md").read_text().partition("## Private parts of torch")[2]
    rows = [line.split("|")[1] for line in table.partition("\n## ")[0].splitlines() if line.startswith("|")]
    assert private == {*re.findall(r"`([\w.]+)`", "".join(rows))}


def test_what_is_declared_is_imported_and_locked():
    """What another one needs is said in a comment, and is no import of ours."""
    declared = (ROOT / "pyproject.toml").read_text().partition("\ndependencies = [")[2].partition("\n]")[0]
    names = re.findall(r'^ +"([\w-]+)[^"]*",( +#.* needs it)?$', declared, re.MULTILINE)
    modules = {"pillow": "PIL", "opencv-python-headless": "cv2", "pyyaml": "yaml", "scikit-learn": "sklearn"}
    tops = {name.split(".")[0] for _, _, name in IMPORTS}
    assert len(names) == declared.count('"') // 2
    locked = dict(re.findall(r"^([\w-]+)==([\w.]+)", (ROOT / ".ci/lock.txt").read_text(), re.MULTILINE))
    assert {name for name, _ in names} <= locked.keys()
    assert f"<2.{int(locked['torch'].split('.')[1]) + 1}" in declared, "the bound is not what was tested"
    assert [name for name, reason in names if not reason and modules.get(name, name) not in tops] == []


def test_the_engine_names_neither_vertical():
    named = re.compile(r"MODEL\.(CLASSIFIER|DFM\.HEAD)|bottom_up|stage_predictors|dense_predictor")
    assert not [path for path in (ROOT / "dfm_d2/engine").glob("*.py") if named.search(path.read_text())]


def test_only_one_file_imports_detectron2_none_touches_sys_modules_and_framework_is_a_closed_list():
    files = {path for _, path, module in IMPORTS if module.split(".")[0] == "detectron2"}
    assert files == {ROOT / "dfm_d2/framework/_providers.py"}
    attributes = [(path, node) for path, node in NODES if isinstance(node, ast.Attribute)]
    assert not [_at(path, node) for path, node in attributes if ast.unparse(node) == "sys.modules"]
    users = [entry for entry in IMPORTS if _package_of(entry[1]) != "framework"]
    assert not [place for place, _, module in users if module.startswith("dfm_d2.framework._")]
