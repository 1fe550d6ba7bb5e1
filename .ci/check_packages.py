#!/usr/bin/env python3
# SPDX-FileCopyrightText: 2026 the run_utils authors
# SPDX-License-Identifier: MIT
"""Hold redaction of code against the source of real packages: it must change nothing.

    check_packages.py [--keep DIR] [PACKAGE ...]

The packages come from the registry without their dependencies and stay in a cache.
Each file goes through redaction as a patch would take it; one package also goes the
whole way: untracked in a repository, recorded, and rebuilt from git.patch. Every .py
that parsed must parse after; what is altered all the same is listed below by name.
"""

from __future__ import annotations

import argparse
import ast
import os
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import run_utils  # noqa: E402

PACKAGES = [
    "trl==1.16.0", "transformers==5.24.0", "peft==0.21.2", "accelerate==1.15.0",
    "diffusers==0.42.1", "numpy==2.4.6", "pandas==3.1.1", "scikit-learn==1.9.1",
    "openai==3.57.0", "litellm==1.110.2", "torch==2.14.1",
]  # fmt: skip
# The wheels of this platform have the same Python source without 2 GB of libraries.
SMALL = ["--platform=macosx_11_0_arm64", "--platform=macosx_14_0_arm64"]
WHOLE_WAY = "trl"

# What is altered, and rightly: tokens as one would paste them, in examples and tests.
ALTERED = {
    "litellm/proxy/custom_auth_auto.py": "a key of sk- and 22 random letters",
    "litellm/proxy/management_endpoints/key_management_endpoints.py": (
        "docstrings with keys of sk- and 22 random letters"
    ),
    "litellm/proxy/spend_tracking/spend_management_endpoints.py": (
        "docstrings with api_key='64 hexadecimal digits'"
    ),
    "litellm/secret_managers/hashicorp_secret_manager.py": (
        'a docstring with "client_token": a UUID'
    ),
    "transformers/testing_utils.py": "the hf_ token of its test user",
}
MAX_BYTES = run_utils.PATCH_FILE_BYTES


def main() -> int:
    parser = argparse.ArgumentParser(description="Redaction on the source of packages.")
    cache = os.environ.get("RUN_UTILS_CI_CACHE", "~/.cache/run_utils-ci")
    keep = Path(os.path.expanduser(cache)) / "packages"
    parser.add_argument("--keep", type=Path, default=keep, help="where they are kept")
    parser.add_argument("packages", nargs="*", metavar="PACKAGE", default=PACKAGES)
    args = parser.parse_args()
    passed = failed = skipped = 0
    folders = []
    for package in args.packages:
        folder = args.keep / package
        problem = install(package, folder)
        if problem:
            print(f"SKIP {package}: {problem}")
            skipped += 1
        else:
            folders.append(folder)
    for folder in folders:
        good, bad = check_package(folder)
        passed += good
        failed += bad
    if any(folder.name.startswith(WHOLE_WAY) for folder in folders):
        problem = check_the_whole_way(folders[0] / WHOLE_WAY)
        print(f"{WHOLE_WAY} by run_context and git apply: {problem or 'the same'}")
        failed += bool(problem)
        passed += not problem
    print(f"{passed} passed, {failed} failed, {skipped} skipped")
    return int(failed > 0)


def install(package: str, folder: Path) -> str:
    """Put a package into a folder of its own; return why that cannot be."""
    if (folder / ".done").exists():
        return ""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
    pip += ["--no-compile", "--only-binary=:all:", "--disable-pip-version-check"]
    for more in ([*SMALL, "--python-version=3.12"], []):
        command = [*pip, "--upgrade", f"--target={folder}", *more, package]
        done = subprocess.run(command, capture_output=True, encoding="utf-8")
        if done.returncode == 0:
            (folder / ".done").touch()
            return ""
    lines = done.stderr.strip().splitlines()
    return (lines or ["pip failed"])[-1]


def check_package(folder: Path) -> tuple[int, int]:
    """Redact each file; return how many were right and wrong."""
    passed = failed = size = 0
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.stat().st_size <= MAX_BYTES:
            files[path.relative_to(folder).as_posix()] = path.read_bytes()
    redactor = run_utils._Redactor()
    finds = {}
    began = time.process_time()
    for name, data in files.items():  # what one file tells is searched for in all
        if b"\0" not in data:
            finds[name] = redactor.learn_code(data, os.fsencode(name))
    for name, data in files.items():
        clean = redactor.code(data, os.fsencode(name), finds.get(name))
        size += len(data)
        problem = ""
        if clean != data and name not in ALTERED:
            problem = f"altered, {first_change(data, clean)}"
        if clean != data and name.endswith(".py") and parses(data) > parses(clean):
            problem = "it no longer parses"
        if problem:
            print(f"{folder.name}: {name}: {problem}")
        failed += bool(problem)
        passed += not problem
    speed = size / 1e6 / max(time.process_time() - began, 1e-6)
    print(
        f"{folder.name}: {passed + failed} files, {size / 1e6:.0f} MB, {speed:.0f} MB/s"
    )
    return passed, failed


def first_change(before: bytes, after: bytes) -> str:
    """Return the first line that differs, as it is after redaction."""
    for number, line in enumerate(after.splitlines(), 1):
        if line not in before:
            place = max(0, line.find(run_utils.REDACTED.encode()) - 60)
            return f"line {number}: {line[place : place + 100]!r}"
    return "somewhere"


def parses(data: bytes) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            ast.parse(data)
        except (SyntaxError, ValueError, RecursionError):
            return False
    return True


def check_the_whole_way(source: Path) -> str:
    """Record a package as untracked files; return how the rebuilt tree differs."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder, "tree")
        tree.mkdir()
        git(tree, "init", "-q")
        (tree / "a.txt").write_text("a\n")
        git(tree, "add", "-A")
        user = ["-c", "user.name=n", "-c", "user.email=e@x"]
        git(tree, *user, "commit", "-qm", "a")
        git(Path(folder), "clone", "-q", "tree", "clone")
        subprocess.run(["cp", "-R", source, tree / source.name], check=True)
        (tree / "train.py").write_text(
            f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
            "import run_utils\n"
            "run_utils.PATCH_FILES, run_utils.PATCH_BYTES = 10_000, 200_000_000\n"
            "with run_utils.run_context('../results', 'r') as run_dir: pass\n"
        )
        subprocess.run([sys.executable, "train.py"], cwd=tree, check=True)
        (run,) = Path(folder, "results").glob("r-*")
        clone = Path(folder, "clone")
        git(clone, "apply", "--whitespace=nowarn", str(run / "git.patch"))
        command = ["diff", "-r", str(source), str(clone / source.name)]
        done = subprocess.run(command, capture_output=True, encoding="utf-8")
        return done.stdout[:500]


def git(folder: Path, *words: str) -> None:
    subprocess.run(["git", *words], cwd=folder, check=True)


if __name__ == "__main__":
    raise SystemExit(main())
