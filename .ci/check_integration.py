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

    def python(self, *words: str, body: str = "") -> subprocess.CompletedProcess[str]:
        if body:
            (self.tmp / "script.py").write_text(textwrap.dedent(body), "utf-8")
            words = ("script.py", *words)
        env = {**os.environ, "PYTHONPATH": str(ROOT), "IPYTHONDIR": str(self.tmp)}
        return subprocess.run(
            [sys.executable, *words],
            cwd=self.tmp,
            env=env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            timeout=300,
        )

    def run_dirs(self) -> list[Path]:
        return [path.parent for path in sorted(self.tmp.rglob("status.json"))]

    def logs(self) -> str:
        return "".join(
            p.read_text("utf-8") for p in sorted(self.tmp.rglob("logs/*.log"))
        )


class UnderPytest(Case):
    """A test's output is captured by pytest and in the log, in every capture mode."""

    libraries = ("pytest",)

    def test_capture_modes(self) -> None:
        (self.tmp / "test_it.py").write_text(
            textwrap.dedent(
                """
                import sys
                from run_utils import run_context
                def test_one(tmp_path):
                    before = sys.stdout
                    with run_context("results/exp"):
                        print("from the body")
                    assert sys.stdout is before
                """
            )
        )
        for mode in ("-s", "--capture=fd", "--capture=sys", "--capture=tee-sys"):
            with self.subTest(mode):
                shutil.rmtree(self.tmp / "results", ignore_errors=True)
                done = self.python("-m", "pytest", "-q", "-rP", mode, "test_it.py")
                self.assertEqual(done.returncode, 0, done.stdout + done.stderr)
                self.assertIn("from the body", done.stdout)
                self.assertIn("from the body", self.logs())


class InIPython(Case):
    """IPython and a notebook show the output, and it is in the log."""

    def test_ipython(self) -> None:
        if importlib.util.find_spec("IPython") is None:
            self.skipTest("IPython is not installed")
        code = (
            "from run_utils import run_context\nwith run_context('results/e') as d:\n"
        )
        (self.tmp / "cell.ipy").write_text(
            code + "    print('from a cell')\n    !echo shell\n"
        )
        done = self.python("-m", "IPython", "--no-banner", "cell.ipy")
        self.assertIn("from a cell", done.stdout, done.stderr)
        self.assertIn("from a cell", self.logs())

    def test_notebook(self) -> None:
        for library in ("nbclient", "nbformat", "ipykernel"):
            if importlib.util.find_spec(library) is None:
                self.skipTest(f"{library} is not installed")
        body = """
        import nbformat, nbclient
        cells = [
            "from run_utils import run_context\\n"
            "with run_context('results/e', notes='nb') as run_dir:\\n"
            "    print('from a notebook')",
            "with run_context('results/e'):\\n    1 / 0",
            "print('after')",
        ]
        book = nbformat.v4.new_notebook()
        book.cells = [nbformat.v4.new_code_cell(cell) for cell in cells]
        nbclient.NotebookClient(book, timeout=120, allow_errors=True,
                                kernel_name="python3").execute()
        print([output.get("text") or output.get("ename")
               for cell in book.cells for output in cell.outputs])
        """
        done = self.python(body=body)
        shown = "['from a notebook\\n', 'ZeroDivisionError', 'after\\n']\n"
        self.assertEqual(done.stdout, shown, done.stderr)
        self.assertIn("from a notebook", self.logs())
        found = [json.loads((r / "status.json").read_text()) for r in self.run_dirs()]
        self.assertEqual({facts["status"] for facts in found}, {"success", "failed"})
        self.assertTrue(self.run_dirs()[0].name.startswith("notebook-"))


class WithTorch(Case):
    """DataLoader workers run as ever; torch is not imported or initialised by us."""

    libraries = ("torch",)

    def test_data_loader_workers(self) -> None:
        body = """
        import sys, os
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
        done = self.python(body=body)
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertEqual(done.stdout.split()[-1], "False")
        rows = run_utils.load_run(self.run_dirs()[0]).metrics
        self.assertEqual(rows["total"], 2016)
        metadata = run_utils.load_run(self.run_dirs()[0]).metadata
        self.assertIn("torch", json.dumps(metadata["pip_freeze"]))


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
        done = self.python(body=body)
        self.assertIn("100%", done.stderr)
        self.assertIn("100%", self.logs())

    def test_rich_on_a_terminal(self) -> None:
        if importlib.util.find_spec("rich") is None:
            self.skipTest("rich is not installed")
        import pty

        (self.tmp / "script.py").write_text(
            "import run_utils\nfrom rich.console import Console\n"
            "with run_utils.run_context('results/exp'):\n"
            "    Console().print('[red]colour[/red]')\n"
        )
        pid, master = pty.fork()
        if pid == 0:
            os.chdir(self.tmp)
            os.environ.update(PYTHONPATH=str(ROOT), TERM="xterm-256color")
            os.execv(sys.executable, [sys.executable, "script.py"])
        shown = b""
        while True:
            try:
                data = os.read(master, 4096)
            except OSError:
                break
            if not data:
                break
            shown += data
        os.waitpid(pid, 0)
        os.close(master)
        self.assertIn(b"\x1b[31mcolour\x1b[0m", shown)
        self.assertIn("\x1b[31mcolour\x1b[0m", self.logs())


class AThousandKills(Case):
    """No row that log_metrics has acknowledged is lost, whenever SIGKILL comes."""

    def test_no_acknowledged_row_is_lost(self) -> None:
        generator = random.Random(1)
        for number in range(1000):
            run_dir = self.tmp / str(number % 10)
            acknowledged, written = os.pipe()
            pid = os.fork()
            if pid == 0:
                for step in range(10**9):
                    run_utils.log_metrics(run_dir, {"kill": number, "x": 0.5}, step)
                    os.write(written, b"%d\n" % step)
            os.close(written)
            time.sleep(generator.random() * 0.004)
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            with open(acknowledged, "rb") as pipe:
                steps = pipe.read().split(b"\n")[:-1]
            if steps:
                # Linux may cut the write that is going on at a page of the file; that
                # row was not acknowledged, and readers skip it.
                rows = run_utils._read_lines(run_dir / "metrics" / "metrics.jsonl")
                found = {row["step"] for row in rows if row["kill"] == number}
                self.assertTrue(set(map(int, steps)) <= found, number)


if __name__ == "__main__":
    unittest.main(argv=sys.argv[:1], testRunner=CountingRunner)
