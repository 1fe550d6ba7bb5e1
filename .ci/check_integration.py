#!/usr/bin/env python3
# SPDX-FileCopyrightText: 2026 the run_utils authors
# SPDX-License-Identifier: MIT
"""Runs inside pytest, IPython, a notebook, torch and tqdm; and a thousand SIGKILLs."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
import unittest
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import run_utils  # noqa: E402
from test_run_utils import CountingRunner  # noqa: E402


class Case(unittest.TestCase):
    """A temporary directory, and Python with the libraries of this environment."""

    libraries: tuple[str, ...] = ()

    def setUp(self) -> None:
        for library in self.libraries:
            if importlib.util.find_spec(library) is None:
                self.skipTest(f"{library} is not installed")
        self.tmp = Path(tempfile.mkdtemp(prefix="run_utils-integration-"))
        self.addCleanup(shutil.rmtree, self.tmp, ignore_errors=True)
        self.env = {**os.environ, "PYTHONPATH": str(ROOT), "IPYTHONDIR": str(self.tmp)}

    def write(self, name: str, text: str) -> str:
        (self.tmp / name).write_text(textwrap.dedent(text), "utf-8")
        return name

    def python(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *words], cwd=self.tmp, env=self.env,
            stdin=subprocess.DEVNULL, capture_output=True, encoding="utf-8",
            timeout=300,
        )  # fmt: skip

    def run_dirs(self) -> list[Path]:
        return sorted(path.parent for path in self.tmp.rglob("status.json"))

    def logs(self) -> str:
        texts = [path.read_text("utf-8") for path in self.tmp.rglob("logs/*.log")]
        return "".join(texts)


class UnderPytest(Case):
    """A test's output is captured by pytest and in the log, in every capture mode."""

    libraries = ("pytest",)
    body = """
        import sys
        from run_utils import run_context
        def test_one(tmp_path):
            before = sys.stdout
            with run_context("results/exp"):
                print("from the body")
            assert sys.stdout is before
        """

    def test_capture_modes(self) -> None:
        self.write("test_it.py", self.body)
        for mode in ("-s", "--capture=fd", "--capture=sys", "--capture=tee-sys"):
            with self.subTest(mode):
                shutil.rmtree(self.tmp / "results", ignore_errors=True)
                done = self.python("-m", "pytest", "-q", "-rP", mode, "test_it.py")
                self.assertEqual(done.returncode, 0, done.stdout + done.stderr)
                self.assertIn("from the body", done.stdout)
                self.assertIn("from the body", self.logs())


class InIPython(Case):
    """IPython shows the output, and it is in the log."""

    libraries = ("IPython",)

    def test_a_cell(self) -> None:
        cell = """
            from run_utils import run_context
            with run_context('results/e') as d:
                print('from a cell')
                !echo shell
            """
        done = self.python("-m", "IPython", "--no-banner", self.write("it.ipy", cell))
        self.assertIn("from a cell", done.stdout, done.stderr)
        self.assertIn("from a cell", self.logs())


class InANotebook(Case):
    """A notebook shows the output, and it is in the log; a flat run ends with it."""

    libraries = ("nbclient", "nbformat", "ipykernel")
    body = """
        import nbformat, nbclient
        cells = [
            "from run_utils import log_metrics, run_context, start_run\\n"
            "with run_context('results/e', notes='nb') as run_dir:\\n"
            "    print('from a notebook')",
            "with run_context('results/e'):\\n    1 / 0",
            "print('after')",
            "flat = start_run('results/e', 'flat', until_exit=True)",
            "log_metrics(flat, {'loss': 1})\\nprint('in a later cell')",
        ]
        book = nbformat.v4.new_notebook()
        book.cells = [nbformat.v4.new_code_cell(cell) for cell in cells]
        client = nbclient.NotebookClient(
            book, timeout=120, allow_errors=True, kernel_name="python3")
        client.execute()
        outputs = [output for cell in book.cells for output in cell.outputs]
        print([output.get("text") or output.get("ename") for output in outputs])
        """

    def test_its_cells(self) -> None:
        done = self.python(self.write("script.py", self.body))
        shown = ["from a notebook\n", "ZeroDivisionError", "after\n"]
        shown.append("in a later cell\n")
        self.assertEqual(done.stdout, f"{shown}\n", done.stderr)
        for text in ("from a notebook", "in a later cell"):
            self.assertIn(text, self.logs())
        self.assertEqual(self.ends("notebook-*"), ["failed", "success"])
        self.assertEqual(self.ends("flat-*"), ["success"])

    def ends(self, pattern: str) -> list[str]:
        """Return how runs ended; a kernel that was stopped may take a moment."""
        states: list[str] = []
        for _ in range(500):
            files = self.tmp.glob(f"results/e/{pattern}/status.json")
            states = sorted(json.loads(f.read_text("ascii"))["status"] for f in files)
            if "running" not in states:
                break
            time.sleep(0.02)
        return states


class WithTorch(Case):
    """DataLoader workers run as ever; torch is not imported or initialised by us."""

    libraries = ("torch",)
    body = """
        import sys
        import run_utils
        assert "torch" not in sys.modules
        import torch
        if __name__ == "__main__":
            with run_utils.run_context("results/exp") as run_dir:
                for method in ("fork", "spawn", "forkserver"):
                    loader = torch.utils.data.DataLoader(
                        range(64), batch_size=8, num_workers=2,
                        multiprocessing_context=method)
                    total = sum(int(batch.sum()) for batch in loader)
                    run_utils.log_metrics(run_dir, {"total": torch.tensor(total)})
                    print(method, total)
            print(torch.cuda.is_initialized())
        """

    def test_data_loader_workers(self) -> None:
        done = self.python(self.write("script.py", self.body))
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertEqual(done.stdout.split()[-1], "False")
        (run_dir,) = self.run_dirs()
        run = run_utils.load_run(run_dir)
        self.assertEqual(run.metrics["total"], 2016)
        self.assertIn("torch", json.dumps(run.metadata["pip_freeze"]))


class ProgressBars(Case):
    """tqdm and rich draw as before, and the log has what they wrote."""

    def test_tqdm_to_a_pipe(self) -> None:
        if importlib.util.find_spec("tqdm") is None:
            self.skipTest("tqdm is not installed")
        body = """
            import run_utils, tqdm
            with run_utils.run_context("results/exp"):
                for _ in tqdm.tqdm(range(3)): pass
            """
        done = self.python(self.write("script.py", body))
        self.assertIn("100%", done.stderr)
        self.assertIn("100%", self.logs())

    def test_rich_on_a_terminal(self) -> None:
        if importlib.util.find_spec("rich") is None:
            self.skipTest("rich is not installed")
        body = """
            import run_utils
            from rich.console import Console
            with run_utils.run_context('results/exp'):
                Console().print('[red]colour[/red]')
            """
        shown = self.on_a_terminal(self.write("script.py", body))
        self.assertIn(b"\x1b[31mcolour\x1b[0m", shown)
        self.assertIn("\x1b[31mcolour\x1b[0m", self.logs())

    def on_a_terminal(self, script: str) -> bytes:
        import pty

        pid, master = pty.fork()
        if pid == 0:
            os.chdir(self.tmp)
            env = {**self.env, "TERM": "xterm-256color"}
            os.execve(sys.executable, [sys.executable, script], env)
        shown = b""
        while True:
            try:
                data = os.read(master, 4096)
            except OSError:  # Linux says EIO when the other end is closed
                data = b""
            if not data:
                break
            shown += data
        os.waitpid(pid, 0)
        os.close(master)
        return shown


class AThousandKills(Case):
    """No row that log_metrics has acknowledged is lost, whenever SIGKILL comes."""

    def test_no_acknowledged_row_is_lost(self) -> None:
        generator = random.Random(1)
        for number in range(1000):
            run_dir = self.tmp / str(number % 10)
            run_dir.mkdir(exist_ok=True)
            steps = self.log_until_killed(run_dir, number, generator.random() * 0.004)
            if not steps:
                continue
            # Linux may cut the write that is going on at a page of the file; that row
            # was not acknowledged, and readers skip it.
            rows = run_utils._read_lines(run_dir / "metrics" / "metrics.jsonl")
            found = {row["step"] for row in rows if row["kill"] == number}
            self.assertTrue(steps <= found, number)

    def log_until_killed(self, run_dir: Path, number: int, seconds: float) -> set[int]:
        """Return the steps whose rows a killed process knew to be on disk."""
        acknowledged, written = os.pipe()
        pid = os.fork()
        if pid == 0:
            for step in range(10**9):
                run_utils.log_metrics(run_dir, {"kill": number, "x": 0.5}, step)
                os.write(written, b"%d\n" % step)
        os.close(written)
        time.sleep(seconds)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        with open(acknowledged, "rb") as pipe:
            return {int(line) for line in pipe.read().split(b"\n")[:-1]}


if __name__ == "__main__":
    unittest.main(argv=sys.argv[:1], testRunner=CountingRunner)
