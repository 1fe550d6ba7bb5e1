#!/usr/bin/env python3
# SPDX-FileCopyrightText: 2026 the run_utils authors
# SPDX-License-Identifier: MIT
"""Change one chapter in many small ways, and print the changes that no test notices.

    check_mutation.py HEADING [--limit 100] [--seed 1] [--list]

Changes are those of cosmic-ray, one at a time, in a copy of the tree. The tests below
the same HEADING come first; a change that they pass is tried with all the others. This
takes minutes to hours, so `.ci/run` leaves it out.
Ends with one line of counts, in which passed are the changes that were noticed.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import difflib
import importlib.util
import itertools
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NEEDED = "cosmic-ray==8.7.0"
FILES = ["run_utils.py", "test_run_utils.py", "vendor.sh", "README.md", "LICENSE"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("heading", help="such as Lineage")
    parser.add_argument("--limit", type=int, help="try as many, chosen at random")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--list", action="store_true", help="only show the changes")
    args = parser.parse_args()
    if importlib.util.find_spec("cosmic_ray") is None:
        print(f"SKIP mutation: {sys.executable} -m pip install {NEEDED}")
        return 75
    before, chapter, after = cut_out(ROOT / "run_utils.py", args.heading)
    first_line = before.count("\n") + 1
    mutants = sorted(set(make_mutants(chapter)))
    if args.limit is not None and args.limit < len(mutants):
        mutants = random.Random(args.seed).sample(mutants, args.limit)
    if args.list:
        for mutant in mutants:
            print(describe(chapter, mutant, first_line))
        return 0
    with tempfile.TemporaryDirectory(prefix="run_utils-mutation-") as folder:
        tree = Tree(Path(folder), args.heading)
        survivors = 0
        for mutant in mutants:
            if tree.passes(before + mutant + after):
                survivors += 1
                print(describe(chapter, mutant, first_line), flush=True)
    print(f"{len(mutants) - survivors} passed, {survivors} failed, 0 skipped")
    return int(survivors > 0)


def cut_out(path: Path, heading: str) -> tuple[str, str, str]:
    """Return what is before a chapter, the chapter, and what is after it."""
    text = path.read_text("utf-8")
    pattern = rf"^# === {re.escape(heading)} ===\n.*?(?=^# === |^if __name__ |\Z)"
    found = re.search(pattern, text, re.M | re.S)
    if found is None:
        headings = ", ".join(re.findall(r"^# === (.*) ===$", text, re.M))
        raise SystemExit(f"{path.name} has no heading {heading!r}, but {headings}")
    return text[: found.start()], found[0], text[found.end() :]


# === Mutants ===


def make_mutants(chapter: str) -> list[str]:
    """Return the chapter with each change that is one to Python.

    Annotations and docstrings are text to it.
    """
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator, operator_names

    known = {meaning_of(chapter)}
    mutants = []
    for name in wanted_operators(operator_names()):
        kind = get_operator(name)
        if kind.arguments():  # an operator that has to be told what to do
            continue
        for occurrence in itertools.count():
            mutant = mutate_code(chapter, kind(), occurrence)
            if mutant is None:
                break
            meaning = meaning_of(mutant)
            if meaning is not None and meaning not in known:
                known.add(meaning)
                mutants.append(mutant)
    return mutants


def wanted_operators(names: Iterable[str]) -> list[str]:
    """Return the names of operators, with one replacement of `+`, one of `/`, ...

    core/ReplaceBinaryOperator_Add_Sub core/ReplaceBinaryOperator_Add_Mul
    """
    wanted: dict[str, str] = {}
    for name in sorted(names):
        key = name
        if "/ReplaceBinaryOperator_" in name:
            key = name.rpartition("_")[0]
        wanted.setdefault(key, name)
    return list(wanted.values())


class Meaning(ast.NodeTransformer):
    """Takes out of a syntax tree what Python does not look at when it runs."""

    def visit_arg(self, node: ast.arg) -> ast.arg:
        node.annotation = None
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.returns = None
        return self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        node.annotation = ast.Constant(None)
        return self.generic_visit(node)


def meaning_of(text: str) -> str | None:
    """Return a text that is equal for two programs that do the same."""
    try:
        return ast.dump(Meaning().visit(ast.parse(text)))
    except SyntaxError:
        return None


def describe(chapter: str, mutant: str, first_line: int) -> str:
    """Return where a change is, and the change.

    run_utils.py:6431
    -            if producer is None or os.path.realpath(producer) == own:
    +            if producer is None or os.path.realpath(producer) != own:
    """
    old = chapter.splitlines()
    lines = list(difflib.unified_diff(old, mutant.splitlines(), lineterm="", n=0))
    found = re.match(r"@@ -(\d+)", lines[2])
    assert found is not None
    number = first_line + int(found[1]) - 1
    return "\n".join([f"run_utils.py:{number}", *lines[3:]])


# === Tests ===


def test_classes(tests: str) -> list[str]:
    """Return the names of the classes that have tests, without those they use."""
    names = []
    for node in ast.parse(tests).body:
        if isinstance(node, ast.ClassDef) and "    def test_" in ast.unparse(node):
            names.append(node.name)
    return names


class Suite:
    """Some of the tests, or all, and the seconds that they may take."""

    def __init__(self, names: list[str]) -> None:
        self.words = [sys.executable, "test_run_utils.py", "-f", *names]
        self.limit = 600.0


class Tree:
    """A copy of the tree, in which the tests run, those of one chapter first."""

    def __init__(self, path: Path, heading: str) -> None:
        self.path = path
        for name in FILES:
            shutil.copy2(ROOT / name, path / name)
        _, tests, _ = cut_out(path / "test_run_utils.py", heading)
        names = test_classes(tests)
        self.suites = [Suite(names), Suite([])]
        for suite in self.suites:
            began = time.monotonic()
            if not self.passes_suite(suite):
                raise SystemExit("the tests fail without any change")
            suite.limit = 3 * (time.monotonic() - began) + 20

    def passes(self, text: str) -> bool:
        """Run the tests on a changed file; those that do not end have noticed it."""
        (self.path / "run_utils.py").write_text(text, "utf-8")
        return all(map(self.passes_suite, self.suites))

    def passes_suite(self, suite: Suite) -> bool:
        env = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}  # many are of one second
        child = subprocess.Popen(
            suite.words, cwd=self.path, env=env, stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip
        try:
            return child.wait(suite.limit) == 0
        except subprocess.TimeoutExpired:
            return False
        finally:
            with contextlib.suppress(OSError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()


if __name__ == "__main__":
    sys.exit(main())
