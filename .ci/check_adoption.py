#!/usr/bin/env python3
# SPDX-FileCopyrightText: 2026 the run_utils authors
# SPDX-License-Identifier: MIT
"""Copy run_utils into a project, and let the tools of projects loose on the copy.

None of them may change one byte of it or find anything in it. The tools are those
beside this interpreter; one that is not there is skipped. Ends with a line of counts.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
COPY = "src/pkg/run_utils"
PYTHON_FILES = [f"{COPY}/__init__.py", f"{COPY}/__main__.py"]
FILES = [*PYTHON_FILES, f"{COPY}/LICENSE"]

RUFF = ["ruff", "check", "--no-cache", "--quiet", "--output-format", "concise"]
TOOLS = [
    ["black", "--quiet", COPY],
    ["black", "--quiet", "--preview", "--unstable", "--line-length", "40", COPY],
    ["ruff", "format", "--no-cache", "--quiet", COPY],
    ["ruff", "format", "--no-cache", "--quiet", "--line-length", "40", COPY],
    [*RUFF, COPY],
    [*RUFF, "--select", "ALL", COPY],
    [*RUFF, "--select", "ALL", "--preview", "--line-length", "40", COPY],
    [*RUFF, "--select", "ALL", "--preview", "--fix", "--unsafe-fixes", COPY],
    ["isort", "--quiet", COPY],
    ["isort", "--quiet", "--profile", "google", "--force-sort-within-sections", COPY],
    ["flake8", "--max-complexity", "1", "--max-line-length", "40", COPY],
    ["pylint", "--score", "n", "--enable=all", COPY],
    ["mypy", "--strict", "--no-error-summary", "--cache-dir", os.devnull,
     "--disallow-any-decorated", "src"],
    ["mypy", "--strict", "--no-error-summary", "--cache-dir", os.devnull,
     "--warn-unreachable", "--disallow-any-expr", COPY],
    *[["pyupgrade", f"--py3{minor}-plus", *PYTHON_FILES] for minor in range(9, 15)],
    ["codespell", COPY],
    ["autoflake", "--recursive", "--in-place", "--remove-all-unused-imports",
     "--remove-unused-variables", "--remove-duplicate-keys", COPY],
    ["bandit", "--quiet", "--recursive", COPY],
    # What pre-commit proposes to everybody, and what many add to it.
    ["trailing-whitespace-fixer", *FILES],
    ["end-of-file-fixer", *FILES],
    ["mixed-line-ending", *FILES],
    ["fix-byte-order-marker", *FILES],
    ["check-added-large-files", "--enforce-all", *FILES],
    ["check-ast", *PYTHON_FILES],
    ["check-builtin-literals", *PYTHON_FILES],
    ["check-case-conflict", *FILES],
    ["check-docstring-first", *PYTHON_FILES],
    ["check-merge-conflict", "--assume-in-merge", *FILES],
    ["check-vcs-permalinks", *FILES],
    ["debug-statement-hook", *PYTHON_FILES],
    ["detect-private-key", *FILES],
]  # fmt: skip

HOST = '''"""A project that records its runs."""

from pathlib import Path

from .run_utils import find_runs, log_metrics, run_context


def train(steps: int) -> Path:
    """Record a run of some steps."""
    with run_context("results/host", "host", {"steps": steps}) as run_dir:
        for step in range(steps):
            log_metrics(run_dir, {"loss": 1 / (step + 1)}, step=step)
    assert find_runs("results/host")
    return run_dir


@run_context("results/host", "double")
def double(number: int) -> int:
    """Return twice a number."""
    return 2 * number


if __name__ == "__main__":
    train(double(2))
'''
COVERAGE = "[run]\nsource = src\nomit = */run_utils/*\n"


def main() -> int:
    results = []
    with tempfile.TemporaryDirectory(prefix="run_utils-adoption-") as folder:
        host = Path(folder)
        make_host(host)
        before = contents(host)
        for words in TOOLS:
            results.append(tried(words, host, before))
        results.append(covered(host))
    counts = {word: results.count(word) for word in ("ok", "FAIL", "SKIP")}
    print(f"{counts['ok']} passed, {counts['FAIL']} failed, {counts['SKIP']} skipped")
    return min(counts["FAIL"], 1)


def make_host(host: Path) -> None:
    package = host / "src" / "pkg"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "train.py").write_text(HOST, "utf-8")
    (host / ".coveragerc").write_text(COVERAGE, "utf-8")
    subprocess.run(["git", "init", "--quiet"], cwd=host, check=True)
    subprocess.run([str(ROOT / "vendor.sh"), str(package)], check=True)
    subprocess.run(["git", "add", "."], cwd=host, check=True)


def contents(host: Path) -> dict[str, bytes]:
    return {name: (host / name).read_bytes() for name in FILES}


def tried(words: list[str], host: Path, before: dict[str, bytes]) -> str:
    """Run one tool; tell whether the copy is as before, and nothing was found."""
    size = (host / FILES[0]).stat().st_size
    if words[0] == "check-added-large-files" and size > 500 * 1024:
        print(f"SKIP {words[0]}: the copy has {size:,} bytes, which it refuses")
        return "SKIP"
    if not (BIN / words[0]).exists():
        print(f"SKIP {words[0]}: it is not beside this Python")
        return "SKIP"
    command = [str(BIN / words[0]), *words[1:]]
    done = subprocess.run(command, cwd=host, capture_output=True, text=True)
    after = contents(host)
    changed = [name for name in FILES if after[name] != before[name]]
    for name in changed:
        (host / name).write_bytes(before[name])
    shown = " ".join(words).replace(COPY, "COPY")[:100]
    if changed or done.returncode != 0:
        print(f"FAIL {shown}: status {done.returncode}, changed {changed}")
        print("\n".join((done.stdout + done.stderr).splitlines()[:12]))
        return "FAIL"
    print(f"ok {shown}")
    return "ok"


def covered(host: Path) -> str:
    """Tell whether a project measures its coverage without the copy, by its `omit`."""
    if not (BIN / "coverage").exists():
        print("SKIP coverage: it is not beside this Python")
        return "SKIP"
    coverage = [str(BIN / "coverage")]
    env = {**os.environ, "PYTHONPATH": str(host / "src")}
    run = [*coverage, "run", "-m", "pkg.train"]
    done = subprocess.run(run, cwd=host, env=env, capture_output=True, text=True)
    report = [*coverage, "report"]
    told = subprocess.run(report, cwd=host, capture_output=True, text=True)
    is_good = done.returncode == 0 and "train.py" in told.stdout
    if is_good and "run_utils" not in told.stdout:
        print("ok coverage with omit = */run_utils/*")
        return "ok"
    print(f"FAIL coverage: {done.stderr}{told.stdout}{told.stderr}")
    return "FAIL"


if __name__ == "__main__":
    sys.exit(main())
