#!/usr/bin/env python3
# SPDX-FileCopyrightText: 2026 the run_utils authors
# SPDX-License-Identifier: MIT
"""Kill a run, or fail it, at its k-th system call, for every k; and fill its disk.

Under `strace -f -e inject=CALL:signal=KILL:when=k` every file of the run must be whole
or absent, the readers must work, and so must the next run. With CALL:error=ENOSPC and
EIO instead, the exit status and output of the experiment must be what they would have
been. Thinned to RUN_UTILS_FAULTS runs (default 100); RUN_UTILS_FAULTS=0 does them all.
"""

from __future__ import annotations

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

CALLS = ["openat", "write", "rename", "mkdir", "close", "unlink", "fsync"]
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


def bare_python(folder: Path) -> str:
    """Make an environment without pip, whose packages are listed in no time."""
    subprocess.run(
        [sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True
    )
    return str(folder / "bin" / "python")


class Faults(unittest.TestCase):
    """No single fault costs more than it must."""

    home: Path
    python: str
    points: list[tuple[str, int]]

    @classmethod
    def setUpClass(cls) -> None:
        if shutil.which("strace") is None:
            raise unittest.SkipTest("strace is not installed")
        probe = ["strace", "-qq", "-o", os.devnull, "true"]
        if subprocess.run(probe, stderr=subprocess.DEVNULL).returncode != 0:
            raise unittest.SkipTest("ptrace is not allowed here")
        cls.home = Path(tempfile.mkdtemp(prefix="run_utils-faults-"))
        cls.addClassCleanup(shutil.rmtree, cls.home, ignore_errors=True)
        cls.python = bare_python(cls.home / "venv")
        (cls.home / "train.py").write_text(SCRIPT)
        cls.points = cls.count_calls()

    @classmethod
    def run_script(cls, cwd: Path, *strace: str) -> tuple[int, str, str]:
        env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
        command = [*strace, cls.python, str(cls.home / "train.py")]
        done = subprocess.run(
            command,
            cwd=cwd,
            env=env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=120,
        )
        return done.returncode, done.stdout.decode(), done.stderr.decode()

    @classmethod
    def count_calls(cls) -> list[tuple[str, int]]:
        """Return (call, k) for every call of a run after its first mkdir."""
        cwd = cls.home / "count"
        cwd.mkdir()
        log = cls.home / "strace.log"
        trace = f"trace={','.join(CALLS)}"
        cls.run_script(cwd, "strace", "-f", "-qq", "-o", str(log), "-e", trace)
        counts: dict[tuple[str, str], int] = {}
        points: set[tuple[str, int]] = set()
        entered: set[str] = set()
        for line in log.read_text(errors="replace").splitlines():
            found = re.match(r"(\d+) +(\w+)\(", line)
            if not found or found[2] not in CALLS:
                continue
            pid, call = found.groups()
            counts[pid, call] = counts.get((pid, call), 0) + 1
            if call == "mkdir" or str(cwd) in line:
                entered.add(pid)
            if pid in entered:
                points.add((call, counts[pid, call]))
        return sorted(points)

    def thinned(self, share: float) -> list[tuple[str, int]]:
        wanted = int(os.environ.get("RUN_UTILS_FAULTS", "100")) * share
        if wanted <= 0 or wanted >= len(self.points):
            return self.points
        step = len(self.points) / wanted
        return [self.points[int(i * step)] for i in range(int(wanted))]

    def inject(
        self, fault: str, call: str, number: int
    ) -> tuple[Path, tuple[int, str, str]]:
        cwd = Path(tempfile.mkdtemp(dir=self.home))
        inject = f"inject={call}:{fault}:when={number}"
        options = ["-e", f"trace={call}", "-e", inject]
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
            self.assertTrue(path.read_text().endswith("\n"))
        for run_dir in (cwd / "results" / "exp").glob("*"):
            command = [self.python, str(ROOT / "run_utils.py"), "inspect", str(run_dir)]
            inspected = subprocess.run(command, capture_output=True)
            known = any(
                (run_dir / name).exists() for name in ("status.json", "metadata.json")
            )
            self.assertEqual(inspected.returncode, 0 if known else 2, inspected.stderr)

    def test_kill_at_every_call(self) -> None:
        for position, (call, number) in enumerate(self.thinned(0.4)):
            with self.subTest(call=call, when=number):
                cwd, _ = self.inject("signal=KILL", call, number)
                self.check_files(cwd)
                if position % 8 == 0:
                    self.assertEqual(self.run_script(cwd)[:2], EXPECTED)
                shutil.rmtree(cwd, ignore_errors=True)

    def check_errors(self, fault: str) -> None:
        for call, number in self.thinned(0.3):
            with self.subTest(fault=fault, call=call, when=number):
                cwd, done = self.inject(f"error={fault}", call, number)
                if list(cwd.iterdir()):  # else it hit the start of Python itself
                    self.assertEqual(done[:2], EXPECTED, done[2])
                self.check_files(cwd)
                shutil.rmtree(cwd, ignore_errors=True)

    def test_no_space_at_every_call(self) -> None:
        self.check_errors("ENOSPC")

    def test_input_output_error_at_every_call(self) -> None:
        self.check_errors("EIO")


FULL_DISK = """
mount -t tmpfs -o size=64k tmpfs disk
cd disk
exec "$@"
"""
FILLER = """
import sys
from run_utils import run_context
with run_context("results/exp", "exp") as run_dir:
    for n in range(20000): print(n, "x" * 20)
sys.exit(3)
"""


class AFullDisk(unittest.TestCase):
    """A disk of 64 KiB that fills up during a run, or is full before it starts."""

    def setUp(self) -> None:
        self.home = Path(tempfile.mkdtemp(prefix="run_utils-disk-"))
        self.addCleanup(shutil.rmtree, self.home, ignore_errors=True)
        (self.home / "disk").mkdir()
        self.python = bare_python(self.home / "venv")

    def on_small_disk(self, script: str) -> subprocess.CompletedProcess[bytes]:
        (self.home / "train.py").write_text(script)
        inside = ["sh", "-c", FULL_DISK, "sh", self.python, str(self.home / "train.py")]
        command = ["unshare", "-Um", "--map-root-user", *inside]
        done = subprocess.run(
            command,
            cwd=self.home,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=120,
        )
        if b"unshare" in done.stderr or b"mount" in done.stderr:
            self.skipTest("unshare -Um with a tmpfs is not allowed here")
        return done

    def test_it_fills_up_during_the_run(self) -> None:
        done = self.on_small_disk(FILLER)
        expected = "".join(f"{n} {'x' * 20}\n" for n in range(20000)).encode()
        self.assertEqual(done.returncode, 3, done.stderr)
        self.assertTrue(done.stdout == expected, done.stderr)
        self.assertIn(b"is no longer logged", done.stderr)

    def test_it_is_full_before_the_run(self) -> None:
        fill = "import contextlib\nwith contextlib.suppress(OSError):\n"
        fill += (
            "    file = open('full', 'wb', 0)\n    while file.write(bytes(512)): pass\n"
        )
        script = fill + "import run_utils, sys\nsys.exit(run_utils.main(sys.argv[1:] or"
        script += " ['run', '--base-dir', 'results/x', '--', 'echo', 'hi']))\n"
        done = self.on_small_disk(script)
        self.assertEqual((done.returncode, done.stdout), (2, b""), done.stderr)
        self.assertRegex(
            done.stderr.decode(),
            r"^train.py: cannot create a run in '.*': No space left on device;"
            r" choose a base_dir that is writable and has space\n$",
        )


if __name__ == "__main__":
    unittest.main(argv=sys.argv[:1], testRunner=CountingRunner)
