#!/usr/bin/env python3
# SPDX-FileCopyrightText: 2026 the run_utils authors
# SPDX-License-Identifier: MIT
"""Kill a run, or fail it, at its k-th system call, for many k; and fill its disk.

Under `strace -f -e inject=CALL:signal=KILL:when=k` every file of the run must be whole
or absent, the readers must work, and so must the next run. With CALL:error=ENOSPC and
EIO instead, the exit status and the output of the experiment must be what they would
have been without us, unless no run could be made at all. RUN_UTILS_FAULTS is how many
calls are tried (default 120), as many of each kind; 0 means all of them.
"""

from __future__ import annotations

import compileall
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from test_run_utils import CountingRunner  # noqa: E402

CALLS = ["openat", "read", "write", "close", "fsync", "mkdir", "mkdirat", "rename"]
CALLS += ["renameat", "renameat2", "unlink", "unlinkat", "link", "linkat"]
SCRIPT = """
import os, sys
from run_utils import run_context, log_metrics
with run_context("results/exp", "exp", {"lr": 0.1}) as run_dir:
    print("inside", flush=True)
    log_metrics(run_dir, {"loss": 1.0}, step=1)
    print("more", flush=True)  # as os._exit would lose it without us, too
    print("error", file=sys.stderr)
os._exit(3)
"""
EXPECTED = (3, "inside\nmore\n")
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}

Ended = subprocess.CompletedProcess[str]


def make_python(folder: Path) -> str:
    """Make an environment without pip, whose packages are listed in no time."""
    words = [sys.executable, "-m", "venv", "--without-pip", str(folder)]
    subprocess.run(words, check=True)
    return str(folder / "bin" / "python")


def start(words: list[str], cwd: Path) -> Ended:
    """Run a command to its end, with its output captured."""
    return subprocess.run(
        words, cwd=cwd, env=ENVIRONMENT, stdin=subprocess.DEVNULL, capture_output=True,
        encoding="utf-8", timeout=120,
    )  # fmt: skip


class Faults(unittest.TestCase):
    """No single fault costs more than it must."""

    home: Path
    python: str
    points: list[tuple[str, int]]  # system calls of a run: name, and which of a process

    @classmethod
    def setUpClass(cls) -> None:
        if shutil.which("strace") is None:
            raise unittest.SkipTest("strace is not installed")
        probe = ["strace", "-qq", "-o", os.devnull, "true"]
        if subprocess.run(probe, stderr=subprocess.DEVNULL).returncode != 0:
            raise unittest.SkipTest("ptrace is not allowed here")
        cls.home = Path(tempfile.mkdtemp(prefix="run_utils-faults-"))
        cls.addClassCleanup(shutil.rmtree, cls.home, ignore_errors=True)
        cls.python = make_python(cls.home / "venv")
        (cls.home / "train.py").write_text(SCRIPT)
        compileall.compile_file(ROOT / "run_utils.py", quiet=1)
        cls.points = cls.list_calls()

    @classmethod
    def run_script(cls, cwd: Path, *strace: str) -> Ended:
        return start([*strace, cls.python, str(cls.home / "train.py")], cwd)

    @classmethod
    def list_calls(cls) -> list[tuple[str, int]]:
        """Return (call, k) of each call that a run makes from its first mkdir on.

        Lines of the log: `31337 openat(AT_FDCWD, "results", O_RDONLY) = 3`.
        """
        cwd = cls.home / "count"
        cwd.mkdir()
        log = cls.home / "strace.log"
        trace = f"trace=?{',?'.join(CALLS)}"  # not every machine has all of them
        cls.run_script(cwd, "strace", "-f", "-qq", "-o", str(log), "-e", trace)
        counts: dict[tuple[str, str], int] = {}
        points: set[tuple[str, int]] = set()
        recording: set[str] = set()
        for line in log.read_text(errors="replace").splitlines():
            found = re.match(r"(\d+) +(\w+)\(", line)
            if not found:
                continue
            pid, call = found.groups()
            counts[pid, call] = counts.get((pid, call), 0) + 1
            if call.startswith("mkdir") or str(cwd) in line:
                recording.add(pid)
            if pid in recording:
                points.add((call, counts[pid, call]))
        return sorted(points)

    def test_the_calls_that_make_a_file_whole_are_among_them(self) -> None:
        kinds = {call for call, _ in self.points}
        self.assertLessEqual({"openat", "write", "close"}, kinds)
        self.assertTrue(kinds & {"rename", "renameat", "renameat2"}, kinds)

    def thinned(self, share: float) -> list[tuple[str, int]]:
        """Return as many calls as are wanted, evenly spread over each kind."""
        wanted = int(int(os.environ.get("RUN_UTILS_FAULTS", "120")) * share)
        if wanted == 0:
            return self.points
        kinds = sorted({call for call, _ in self.points})
        of_each = max(1, wanted // len(kinds))
        chosen = []
        for kind in kinds:
            same = [point for point in self.points if point[0] == kind]
            step = max(1.0, len(same) / of_each)
            chosen += [same[int(n * step)] for n in range(min(of_each, len(same)))]
        return chosen

    def inject(self, fault: str, call: str, number: int) -> tuple[Path, Ended]:
        """Run the script with a fault, in a folder of its own."""
        cwd = Path(tempfile.mkdtemp(dir=self.home))
        self.addCleanup(shutil.rmtree, cwd, ignore_errors=True)
        options = ["-e", f"trace={call}", "-e", f"inject={call}:{fault}:when={number}"]
        done = self.run_script(cwd, "strace", "-f", "-qq", "-o", os.devnull, *options)
        return cwd, done

    def check_files(self, cwd: Path) -> None:
        """Every file is whole, and the readers can tell what there is."""
        for path in cwd.rglob("*.json"):
            json.loads(path.read_text("ascii"))
        for path in cwd.rglob("*.jsonl"):
            for line in path.read_text("ascii").splitlines():
                json.loads(line)
        for path in cwd.rglob("config.yaml"):
            self.assertTrue(path.read_text("utf-8").endswith("\n"))
        for run_dir in (cwd / "results" / "exp").glob("*"):
            names = ("status.json", "metadata.json")
            is_run = any((run_dir / name).exists() for name in names)
            words = [self.python, str(ROOT / "run_utils.py"), "inspect", str(run_dir)]
            shown = start(words, cwd)
            self.assertEqual(shown.returncode, 0 if is_run else 2, shown.stderr)

    def test_kill_at_every_call(self) -> None:
        for position, (call, number) in enumerate(self.thinned(0.4)):
            with self.subTest(call=call, when=number):
                cwd, _ = self.inject("signal=KILL", call, number)
                self.check_files(cwd)
                if position % 8 == 0:
                    done = self.run_script(cwd)
                    found = (done.returncode, done.stdout)
                    self.assertEqual(found, EXPECTED, done.stderr)

    def check_errors(self, error: str) -> None:
        for call, number in self.thinned(0.3):
            with self.subTest(error=error, call=call, when=number):
                cwd, done = self.inject(f"error={error}", call, number)
                self.check_files(cwd)
                if list(cwd.glob("results/exp/*")):
                    found = (done.returncode, done.stdout)
                    self.assertEqual(found, EXPECTED, done.stderr)
                elif (cwd / "results").exists():  # else it hit the start of Python
                    self.assertIn("OSError: cannot create a run in '", done.stderr)

    def test_no_space_at_every_call(self) -> None:
        self.check_errors("ENOSPC")

    def test_input_output_error_at_every_call(self) -> None:
        self.check_errors("EIO")


ON_A_SMALL_DISK = 'mount -t tmpfs -o size=64k tmpfs disk && cd disk && exec "$@"'
FILLER = """
import sys
from run_utils import run_context
with run_context("results/exp", "exp") as run_dir:
    for n in range(20000): print(n, "x" * 20)
sys.exit(3)
"""
FULL_BEFORE = """
import contextlib, sys
import run_utils
with contextlib.suppress(OSError), open("full", "wb", 0) as file:
    while True:
        file.write(bytes(512))
sys.exit(run_utils.main(["run", "--base-dir", "results/x", "--", "echo", "hi"]))
"""


class AFullDisk(unittest.TestCase):
    """A disk of 64 KiB that fills up during a run, or is full before it starts."""

    def setUp(self) -> None:
        self.home = Path(tempfile.mkdtemp(prefix="run_utils-disk-"))
        self.addCleanup(shutil.rmtree, self.home, ignore_errors=True)
        (self.home / "disk").mkdir()
        self.python = make_python(self.home / "venv")

    def on_a_small_disk(self, script: str) -> Ended:
        train = self.home / "train.py"
        train.write_text(script)
        words = ["unshare", "-Um", "--map-root-user", "sh", "-c", ON_A_SMALL_DISK, "sh"]
        done = start([*words, self.python, str(train)], self.home)
        if "unshare" in done.stderr or "mount" in done.stderr:
            self.skipTest("unshare -Um with a tmpfs is not allowed here")
        return done

    def test_it_fills_up_during_the_run(self) -> None:
        done = self.on_a_small_disk(FILLER)
        expected = "".join(f"{n} {'x' * 20}\n" for n in range(20000))
        self.assertEqual(done.returncode, 3, done.stderr)
        self.assertTrue(done.stdout == expected, done.stderr)
        self.assertIn("is no longer logged", done.stderr)

    def test_it_is_full_before_the_run(self) -> None:
        done = self.on_a_small_disk(FULL_BEFORE)
        self.assertEqual((done.returncode, done.stdout), (2, ""), done.stderr)
        self.assertRegex(
            done.stderr,
            r"^train.py: cannot create a run in '.*': No space left on device;"
            r" choose a base_dir that is writable and has space\n$",
        )


if __name__ == "__main__":
    unittest.main(argv=sys.argv[:1], testRunner=CountingRunner)
