#!/usr/bin/env python3
# SPDX-FileCopyrightText: 2026 the run_utils authors
# SPDX-License-Identifier: MIT
"""Pass our own files through redaction: a copy of them in a git.patch must be whole.

They are full of the names and shapes that redaction looks for. Nothing in them may be
taken for a secret, replaced, or remembered. Ends with one line of counts.
"""

from __future__ import annotations

import difflib
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import run_utils  # noqa: E402


def main() -> int:
    passed = failed = 0
    for path in list_files():
        problem = find_problem(path)
        if problem:
            print(f"FAIL {path.relative_to(ROOT)}: {problem}")
            failed += 1
        else:
            passed += 1
    print(f"{passed} passed, {failed} failed, 0 skipped")
    return int(failed > 0)


def list_files() -> list[Path]:
    """Return what a commit of this project has, byte code and pictures left out."""
    names = ["run_utils.py", "test_run_utils.py", "vendor.sh", "README.md", "LICENSE"]
    paths = [ROOT / name for name in names]
    paths += [path for path in sorted((ROOT / ".ci").iterdir()) if path.is_file()]
    return paths


def find_problem(path: Path) -> str:
    """Return what redaction takes for a secret in a file, or nothing."""
    data = path.read_bytes()
    name = str(path.relative_to(ROOT)).encode()
    redactor = run_utils._Redactor()
    redactor.learn_code(data, name)
    if redactor.known:
        return f"remembered as secret: {sorted(redactor.known)[:5]}"
    clean = redactor.code(data, name)
    if clean != data:
        before = data.decode("utf-8", "replace").splitlines()
        after = clean.decode("utf-8", "replace").splitlines()
        changes = difflib.unified_diff(before, after, "before", "after", "", "", 0, "")
        return "\n".join(["changed", *list(changes)[:40]])
    audit = run_utils._Audit(ROOT)
    audit.search([path])
    if audit.found:
        lines = data.decode("utf-8", "replace").splitlines()
        numbers = [found["line"] for found in audit.found if found["line"]]
        shown = [f"{number}: {lines[number - 1]}" for number in numbers[:20]]
        return "\n".join(["audit would name lines", *shown])
    return ""


if __name__ == "__main__":
    sys.exit(main())
