"""Whether the tests notice a changed operator, number or condition: `python tests/mutants.py --number 100`.

Needs cosmic-ray and a Unix. Each mutant of a seeded sample is one forked process: the libraries are imported
once, the mutated text takes the place of the file at import, and nothing is written to the tree. The tests of
SUBJECTS run until one fails; those that start another interpreter would not see the mutant.
"""

import argparse
import ast
import contextlib
import importlib
import os
import random
import resource
import sys
from importlib.machinery import SourceFileLoader
from pathlib import Path

import pytest
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator, operator_names

ROOT = Path(__file__).resolve().parents[1]
DENSE = "tests/modeling/test_dense.py"
DETECTOR = "tests/modeling/test_detector.py tests/engine/test_detector_updates.py"
UPDATES = "tests/engine/test_block_optimizer.py tests/engine/test_local_update.py"
# Folder, its files, their tests from the cheapest to the dearest.
SUBJECTS = [
    ("dfm_d2/flow", "path solver box_space label_space noise", f"tests/core {DETECTOR}"),
    ("dfm_d2/local_update", "updates hand_over blocks block_optimizer", f"{UPDATES} {DETECTOR}"),
    ("dfm_d2/detection", "assignment coupling loss", f"tests/losses {DETECTOR}"),
    ("dfm_d2/detection", "stack detector sampler training dense", f"tests/predictors {DETECTOR} {DENSE}"),
    ("dfm_d2/detection", "postprocess", f"{DETECTOR} tests/export/test_equality.py"),
    ("dfm_d2/classification", "sampler flow_classifier", "tests/modeling/test_classifier.py"),
    ("kernels/dfm_kernels", "box_flow_update/reference flow_loss/reference", f"tests/kernels {DETECTOR}"),
]
# A replacement stays in its group: a shift of a float is a TypeError anywhere, and would only flatter.
GROUPS = [
    {"Add", "Sub", "Mul", "Div", "FloorDiv", "Mod", "Pow"}, {"BitOr", "BitAnd", "BitXor"},
    {"Eq", "NotEq", "Lt", "LtE", "Gt", "GtE"}, {"Is", "IsNot"}, {"Delete", "USub", "Not", "Invert"},
]  # fmt: skip
CPU_SECONDS = 600  # of all tests of one mutant; a hang is a kill


def is_useful(operator):
    kind, *change = operator.split("/")[1].split("_")
    return kind not in ("NoOp", "VariableInserter", "VariableReplacer") and (
        not change or any(set(change) <= group for group in GROUPS)
    )


OPERATORS = {name: get_operator(name)() for name in sorted(operator_names()) if is_useful(name)}


def mutants_of(path):
    """(path, line, operator, occurrence), but for annotations, bare stars and the order of strings."""
    text = path.read_text()
    every = [*ast.walk(ast.parse(text))]
    types = [getattr(node, name, None) for node in every for name in ("annotation", "returns")]
    spans = [((a.lineno, a.col_offset), (a.end_lineno, a.end_col_offset)) for a in types if a is not None]
    nodes = list(ast_nodes(get_ast(text)))
    for name, operator in OPERATORS.items():
        places = [(node, start) for node in nodes for start, _ in operator.mutation_positions(node)]
        for occurrence, (node, start) in enumerate(places):
            bare_star = node.parent is not None and node.parent.type == "parameters"
            of_strings = "Comparison" in name and any(child.type == "string" for child in node.children)
            in_type = any(a <= start < b for a, b in spans)
            if not (bare_star or in_type or of_strings and not name.endswith(("_Eq", "_NotEq"))):
                yield path, start[0], name, occurrence


def mutate(path, operator, occurrence):
    """The mutated text, or None where it is no Python."""
    text = mutate_code(path.read_text(), OPERATORS[operator], occurrence)
    with contextlib.suppress(SyntaxError):
        return text if text and compile(text, str(path), "exec") else None


def survives(path, text, tests):
    """Whether the tests pass with `text` in the place of the file, in a process of its own."""
    if child := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    get_code = SourceFileLoader.get_code

    def mutated_code(loader, name):
        mine = os.path.realpath(loader.path) == str(path)
        return compile(text, loader.path, "exec") if mine else get_code(loader, name)

    SourceFileLoader.get_code = mutated_code
    sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    options = "-x -p no:cacheprovider --hypothesis-seed=0 --timeout=0 -o addopts= -m".split()
    os._exit(pytest.main([*tests.split(), *options, "not gpu and not slow"]))


def main():
    parser = argparse.ArgumentParser(description="Prints the mutants that no test notices.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--number", type=int, default=100)
    options = parser.parse_args()
    os.chdir(ROOT)
    os.environ |= {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
    for name in ("torch", "torchvision", "hypothesis.strategies", "scipy.optimize", "fvcore.common.config"):
        importlib.import_module(name)
    tests_of = {ROOT / folder / f"{name}.py": t for folder, names, t in SUBJECTS for name in names.split()}
    found = [mutant for path in tests_of for mutant in mutants_of(path)]
    random.Random(options.seed).shuffle(found)
    good = ((*mutant, text) for mutant in found if (text := mutate(mutant[0], *mutant[2:])) is not None)
    killed = 0
    for _, (path, line, operator, _, text) in zip(range(options.number), good):
        if survives(path, text, tests_of[path]):
            changed = [b for a, b in zip(path.read_text().split("\n"), text.split("\n")) if a != b]
            print(f"{path.relative_to(ROOT)}:{line} {operator}: {''.join(changed).strip()}", flush=True)
        else:
            killed += 1
    print(f"{options.number} mutants: {killed} killed ({100 * killed / options.number:.0f}%)")


if __name__ == "__main__":
    main()
