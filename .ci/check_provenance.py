#!/usr/bin/env python3
# SPDX-FileCopyrightText: 2026 the run_utils authors
# SPDX-License-Identifier: MIT
"""Rebuild random trees from commit and patch; meet huge repositories and files.

Each tree has files of odd content and name that were edited, deleted, linked, renamed
and made executable, some of it staged, some of it committed, some of that pushed. A
clone of the remote and the patch must give the same bytes. RUN_UTILS_TREES is the
number of trees (default 16). A repository with 100,000 files and an untracked file of
5 GB must cost no more than the limits say.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import run_utils  # noqa: E402
import test_run_utils  # noqa: E402

LINES = [b"a", b"\r", b"", b"\xff", b"zz", b"diff --git a/x b/x", b"\t ", b"--- a/x"]
NAMES = ["x", " y", "z\u00e9", "%", '"', "'", "\n", "-"]


class RandomTrees(test_run_utils.CodeCase):
    """Commit and patch give the tree, whatever was done to it."""

    def content(self, rng: random.Random) -> bytes:
        lines = [rng.choice(LINES) for _ in range(rng.randrange(30))]
        end = rng.choice((b"", b"\n", b"\r\n", b"\0"))
        return b"\n".join(lines) + end

    def change(self, rng: random.Random, path: Path) -> None:
        """Do one of six things to a file, which may not be there."""
        path.parent.mkdir(parents=True, exist_ok=True)
        is_there = os.path.lexists(path)
        deed = rng.randrange(6)
        if deed == 0 and is_there:
            path.unlink()
        elif deed == 1 and is_there and not path.is_symlink():
            path.chmod(0o755)
        elif deed == 2 and is_there:
            self.git("mv", "-k", str(path), f"{path} moved")
        elif deed == 3:
            if is_there:
                path.unlink()
            path.symlink_to(rng.choice(("x", "../y", "\u00fc")))
        elif not path.is_symlink():
            path.write_bytes(self.content(rng))

    def make_tree(self, rng: random.Random, name: str) -> None:
        """Make a repository, pushed or not, and change it in several rounds."""
        names = [f"{rng.choice('abc')}/{rng.choice(NAMES)}{i}" for i in range(50)]
        make = rng.choice((self.new_repo, self.pushed_repo))
        make(name, {name: self.content(rng) for name in names[:35]})
        for path in names:
            self.change(rng, self.repo / path)
            if rng.random() < 0.15:
                self.git("add", "-A")
            if rng.random() < 0.04:
                self.git("commit", "-qm", "more", "--allow-empty")

    def test_round_trips(self) -> None:
        for seed in range(int(os.environ.get("RUN_UTILS_TREES", "16"))):
            with self.subTest(seed=seed):
                self.make_tree(random.Random(seed), f"random{seed}")
                self.assert_round_trip()


class HugeTrees(test_run_utils.CodeCase):
    """What is huge costs no more than the limits, and the experiment nothing."""

    def setUp(self) -> None:
        memory = Path("/dev/shm")  # 100,000 files take half a minute on a disk
        place = None
        if os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > 2e9:
            place = str(memory)
        with mock.patch.object(tempfile, "tempdir", place):
            super().setUp()
        self.new_repo()

    def record(self) -> dict[str, Any]:
        """Return the metadata of a run that does nothing."""
        script = self.repo / "train.py"
        script.write_text(
            f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
            "from run_utils import run_context\n"
            "with run_context('results/exp', 'exp'): pass\n",
            "utf-8",
        )
        command = [sys.executable, str(script)]
        subprocess.run(command, cwd=self.repo, check=True, timeout=120)
        (path,) = self.repo.glob("results/exp/*/metadata.json")
        metadata: dict[str, Any] = json.loads(path.read_bytes())
        return metadata

    def test_an_untracked_file_of_5_gb(self) -> None:
        with open(self.repo / "checkpoint.pt", "wb") as file:
            file.truncate(5_000_000_000)
        metadata = self.record()
        (entry,) = metadata["git"]["patch"]["left_out"]
        found = (entry["path"], entry["bytes"], entry["reason"])
        self.assertEqual(found, ("checkpoint.pt", 5_000_000_000, "too large"))
        seconds = metadata["capture"]["git.patch"]["seconds"]
        self.assertLess(seconds, run_utils.PATCH_SECONDS)

    def test_100_000_files_and_some_more(self) -> None:
        for number in range(100):
            folder = self.repo / "tracked" / str(number)
            folder.mkdir(parents=True)
            for file in range(1000):
                (folder / f"{file}.txt").touch()
        self.git("add", "-A")
        self.git("commit", "-qm", "many")
        (self.repo / "untracked").mkdir()
        for file in range(3000):
            (self.repo / "untracked" / f"{file}.txt").touch()
        metadata = self.record()
        capture = metadata["capture"]
        limit = 2 * run_utils.PATCH_SECONDS + 3 * run_utils.PROGRAM_SECONDS
        for name in ("git", "git.patch"):
            self.assertLess(capture[name]["seconds"], limit, name)
        if not capture["git"]["ok"]:
            self.skipTest(f"this machine is too slow: {capture['git']['problem']}")
        git = metadata["git"]
        self.assertEqual(git["untracked_count"], 3001)
        patch = git["patch"]
        self.assertEqual(patch["files"], run_utils.PATCH_FILES, patch)


if __name__ == "__main__":
    unittest.main(argv=sys.argv[:1], testRunner=test_run_utils.CountingRunner)
