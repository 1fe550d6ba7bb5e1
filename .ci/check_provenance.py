#!/usr/bin/env python3
# SPDX-FileCopyrightText: 2026 the run_utils authors
# SPDX-License-Identifier: MIT
"""Rebuild random trees from commit and patch; meet huge repositories and files.

Each tree has files of odd content and name that were edited, deleted, linked, renamed
and made executable, some of it staged; a clean clone and the patch must give the same
bytes. RUN_UTILS_TREES is the number of trees (default 12). A repository with 100,000
files and an untracked file of 5 GB must cost no more than the limits say.
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


class RandomTrees(test_run_utils.PatchCase):
    """Commit and patch give the tree, whatever was done to it."""

    def content(self, rng: random.Random) -> bytes:
        lines = [rng.choice(LINES) for _ in range(rng.randrange(30))]
        end = rng.choice((b"", b"\n", b"\r\n", b"\0"))
        return b"\n".join(lines) + end

    def change(self, rng: random.Random, path: Path) -> None:
        deed, exists = rng.randrange(6), os.path.lexists(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        if deed == 0 and exists:
            path.unlink()
        elif deed == 1 and exists and not path.is_symlink():
            path.chmod(0o755)
        elif deed == 2 and exists:
            other = path.with_name(f"{path.name} moved")
            self.git("mv", "-k", str(path), str(other))
        elif deed == 3:
            if exists:
                path.unlink()
            path.symlink_to(rng.choice(("x", "../y", "\u00fc")))
        elif not path.is_symlink():
            path.write_bytes(self.content(rng))

    def test_round_trips(self) -> None:
        for seed in range(int(os.environ.get("RUN_UTILS_TREES", "12"))):
            rng = random.Random(seed)
            names = [f"{rng.choice('abc')}/{rng.choice(NAMES)}{i}" for i in range(50)]
            files = {name: self.content(rng) for name in names[:35]}
            self.new_tree(files, f"random{seed}")
            for name in names:
                self.change(rng, self.repo / name)
                if rng.random() < 0.2:
                    self.git("add", "-A")
            with self.subTest(seed=seed):
                self.assert_round_trip()


class HugeTrees(test_run_utils.ProvenanceCase):
    """What is huge costs no more than the limits, and the experiment nothing."""

    def setUp(self) -> None:
        memory = Path("/dev/shm")  # 100,000 files take half a minute on a disk
        fits = memory.is_dir() and shutil.disk_usage(memory).free > 2e9
        place = str(memory) if fits and os.access(memory, os.W_OK) else None
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
        patch = metadata["git"]["patch"]
        entry = {"path": "checkpoint.pt", "bytes": 5_000_000_000, "reason": "too large"}
        self.assertEqual(patch["left_out"], [entry])
        capture = metadata["capture"]
        limit = run_utils.PATCH_SECONDS
        self.assertLess(capture["git.patch"]["seconds"], limit)

    def test_100_000_files_and_some_more(self) -> None:
        for number in range(100):
            (self.repo / "tracked" / str(number)).mkdir(parents=True)
            for file in range(1000):
                (self.repo / "tracked" / str(number) / f"{file}.txt").touch()
        self.git("add", "-A")
        self.git("commit", "-qm", "many")
        (self.repo / "untracked").mkdir()
        for file in range(3000):
            (self.repo / "untracked" / f"{file}.txt").touch()
        metadata = self.record()
        capture, git = metadata["capture"], metadata["git"]
        for name in ("git", "git.patch", "git.bundle"):
            limit = 2 * run_utils.PATCH_SECONDS + 3 * run_utils.PROGRAM_SECONDS
            self.assertLess(capture[name]["seconds"], limit, name)
        if not capture["git"]["ok"]:
            self.skipTest(f"this machine is too slow: {capture['git']['problem']}")
        self.assertEqual(git["untracked_count"], 3001)
        kept = git["patch"]["files"]
        self.assertEqual(kept + git["patch"]["left_out_count"], 3001)
        self.assertEqual(kept, run_utils.PATCH_FILES)


if __name__ == "__main__":
    unittest.main(argv=sys.argv[:1], testRunner=test_run_utils.CountingRunner)
