#!/usr/bin/env python3
# SPDX-FileCopyrightText: 2026 the run_utils authors
# SPDX-License-Identifier: MIT
"""Tests of run_utils, in the order of its sections: `python3 test_run_utils.py`.

Needs nothing but Python. What this machine lacks (git, PyYAML, dash, ...) is skipped
by name. External programs are stub scripts on PATH; the real ones are tried as well.
"""

from __future__ import annotations

import argparse
import ast
import collections
import contextlib
import datetime
import decimal
import enum
import fractions
import hashlib
import io
import json
import math
import os
import pathlib
import random
import re
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import types
import unittest
import uuid
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple
from unittest import mock

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import run_utils  # noqa: E402
from run_utils import Run  # noqa: E402

SOURCE = HERE / "run_utils.py"
READ_JSON = "JSON.parse(require('fs').readFileSync(0))"  # for node
GIT = shutil.which("git")
LINUX = sys.platform == "linux"


def _python_without_pip() -> str:
    """Return a Python of an empty environment: its package list takes no time."""
    folder = tempfile.mkdtemp(prefix="run_utils-test-")
    unittest.addModuleCleanup(shutil.rmtree, folder, ignore_errors=True)
    command = [sys.executable, "-m", "venv", "--without-pip", folder]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
    return os.path.join(folder, "bin", "python")


def forget_secrets() -> None:
    run_utils._known_secrets.clear()
    run_utils._redact_shapes.cache_clear()


def setUpModule() -> None:
    global PYTHON, CACHE
    PYTHON = _python_without_pip()
    CACHE = os.path.join(os.path.dirname(PYTHON), "cache")


PYTHON, CACHE = sys.executable, ""


class RunCase(unittest.TestCase):
    """A temporary directory to work in, and scripts that run there."""

    def setUp(self) -> None:
        self.tmp = Path(os.path.realpath(tempfile.mkdtemp(prefix="run_utils-test-")))
        self.addCleanup(self.remove, self.tmp)
        os.chdir(self.tmp)
        self.addCleanup(os.chdir, "/")  # where we were may be gone

    def remove(self, folder: Path) -> None:
        """Remove a folder in which a recorder may still be at work for a moment."""
        for _ in range(500):
            shutil.rmtree(folder, ignore_errors=True)
            if not folder.exists():
                return
            time.sleep(0.02)
        self.fail(f"{folder} cannot be removed")

    def script(
        self,
        body: str,
        *args: str,
        env: dict[str, str] | None = None,
        flags: tuple[str, ...] = (),
        **options: Any,
    ) -> Any:
        """Run `body` as train.py in the temporary directory, output captured."""
        path = self.write_script(body)
        settings: dict[str, Any] = {
            "env": self.environment(env),
            "stdin": subprocess.DEVNULL,
            "stdout": subprocess.PIPE,
            "stderr": subprocess.PIPE,
            "timeout": 60,
            "encoding": "utf-8",
            "errors": "surrogateescape",
            **options,
        }
        command = [PYTHON, *flags, str(path), *args]
        return subprocess.run(command, **settings)

    def write_script(self, body: str) -> Path:
        path = self.tmp / "train.py"
        text = "import os, sys, time\nfrom run_utils import *\n" + textwrap.dedent(body)
        if not path.exists() or path.read_text("utf-8") != text:  # it may be in use
            path.write_text(text, "utf-8")
        return path

    def environment(self, more: dict[str, str] | None = None) -> dict[str, str]:
        env = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
        places = {"PYTHONPATH": str(HERE), "PYTHONPYCACHEPREFIX": CACHE}
        return {**env, **places, **(more or {})}

    def in_context(self, body: str, *args: str, **options: Any) -> Any:
        """Run `body` inside ``with run_context("results/exp") as run_dir:``."""
        inside = textwrap.indent(textwrap.dedent(body).strip(), "    ")
        start = 'with run_context("results/exp", "exp") as run_dir:\n'
        return self.script(start + inside + "\n", *args, **options)

    def command(self, *words: str, **options: Any) -> Any:
        """Run the command line of run_utils in the temporary directory."""
        return self.script("sys.exit(main(sys.argv[1:]))", *words, **options)

    def run_dirs(self) -> list[Path]:
        return sorted(path.parent for path in self.tmp.rglob("status.json"))

    def run_dir(self) -> Path:
        runs = [path for path in self.run_dirs() if path.parent.name != "attempts"]
        self.assertEqual(len(runs), 1, runs)
        return runs[0]

    def json(self, name: str) -> dict[str, Any]:
        value = json.loads((self.run_dir() / name).read_text("ascii"))
        assert isinstance(value, dict)
        return value

    def log(self, name: str) -> str:
        return (self.run_dir() / "logs" / f"{name}.log").read_text("utf-8")

    def index(self) -> list[dict[str, Any]]:
        lines = (self.tmp / "results/index/runs_index.jsonl").read_text("ascii")
        return [json.loads(line) for line in lines.splitlines() if line]

    def wait_for_status(self, status: str) -> dict[str, Any]:
        """Return status.json once it says `status`; fail after a long while."""
        for _ in range(500):
            with contextlib.suppress(AssertionError, ValueError, OSError):
                facts = self.json("status.json")
                if facts["status"] == status:
                    return facts
            time.sleep(0.02)
        self.fail(f"status.json never said {status!r}")


class TheFileItself(unittest.TestCase):
    """The contents in the docstring are the headings of the file, in its order."""

    def test_contents_match_headings(self) -> None:
        text = SOURCE.read_text("utf-8")
        headings = re.findall(r"^# === (.+) ===$", text, re.M)
        docstring = ast.get_docstring(ast.parse(text)) or ""
        contents = docstring.split("Contents")[1].split("The rules")[0]
        listed = re.findall(r"^    (\S.*?)  ", contents, re.M)
        self.assertEqual(listed, headings)

    def test_every_public_name_has_a_docstring(self) -> None:
        body = ast.parse(SOURCE.read_text("utf-8")).body
        nodes = [n for n in body if isinstance(n, (ast.FunctionDef, ast.ClassDef))]
        for node in nodes:
            if node.name in run_utils.__all__:
                self.assertTrue(ast.get_docstring(node), node.name)

    def test_importing_creates_nothing_and_starts_nothing(self) -> None:
        code = "import os, sys, threading; sys.path.insert(0, sys.argv[1]);"
        code += "import run_utils; print(os.listdir(), threading.active_count())"
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-B", "-c", code, str(HERE)]
            done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE)
        self.assertEqual(done.stdout, b"[] 1\n")

    def test_examples_in_docstrings_hold(self) -> None:
        import doctest

        with contextlib.redirect_stdout(io.StringIO()) as report:
            failed = doctest.testmod(run_utils).failed
        self.assertEqual(failed, 0, report.getvalue())


class TheReadme(RunCase):
    """What the README shows works as pasted."""

    README = HERE / "README.md"

    def blocks(self, language: str) -> list[str]:
        if not self.README.exists():
            self.skipTest("there is no README.md beside the tests")
        text = self.README.read_text("utf-8")
        return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)

    def test_the_example(self) -> None:
        example, reading = self.blocks("python")
        done = self.script(example + reading)
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        run = run_utils.load_run(self.run_dir())
        self.assertEqual((run["config.lr"], run["metrics.step"]), (0.1, 2))

    @unittest.skipUnless(shutil.which("sh"), "needs a shell")
    def test_the_shell_lines(self) -> None:
        lines = self.blocks("sh")[0].splitlines()
        shutil.copy(SOURCE, self.tmp)
        path = os.path.dirname(PYTHON) + os.pathsep + os.environ["PATH"]
        env = {**self.environment({"PATH": path}), "PYTHONPATH": ""}
        shell = ["sh", "-ec", "\n".join(lines[:3])]
        done = subprocess.run(shell, env=env, capture_output=True, encoding="utf-8")
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertTrue(done.stdout.startswith("hello\nrun       "), done.stdout)
        self.assertIn("lr: 0.1", done.stdout)
        self.assertRegex(
            done.stdout, r"\nrun +status .*\ndemo/python3-\d+-\d+ +success "
        )


class ARunDirectory(RunCase):
    """run_context leaves one directory with config, metadata, status and folders."""

    def test_everything_is_there_after_the_block(self) -> None:
        done = self.in_context("print('hello')")
        self.assertEqual(
            (done.returncode, done.stdout, done.stderr), (0, "hello\n", "")
        )
        names = {path.name for path in self.run_dir().iterdir()}
        files = {"config.yaml", "metadata.json", "status.json"}
        self.assertEqual(names, files | set(run_utils.DEFAULT_SUBDIRS))

    def test_metadata_is_complete(self) -> None:
        self.in_context("pass", "--lr", "0.1")
        metadata = self.json("metadata.json")
        for key in [
            "timestamp_utc",
            "command",
            "argv",
            "working_dir",
            "hostname",
            "user",
            "python",
            "platform",
            "git",
            "cuda",
            "pip_freeze",
            "env",
            "inputs",
            "launcher",
            "run_utils",
            "capture",
        ]:
            self.assertIn(key, metadata)
        self.assertIsInstance(metadata["pip_freeze"], list)
        self.assertEqual(metadata["working_dir"], str(self.tmp))
        self.assertEqual(metadata["argv"][-2:], ["--lr", "0.1"])
        self.assertIn("pip_freeze", metadata["capture"])

    def test_hostile_bytes_are_strict_json(self) -> None:
        hostile = os.fsdecode(b"\xff\xfe")
        self.in_context("pass", hostile, "\x1b[31m", env={"HOSTILE": hostile})
        metadata = self.json("metadata.json")
        self.assertEqual(metadata["env"]["HOSTILE"], "\\udcff\\udcfe")
        self.assertEqual(metadata["argv"][-1], "\x1b[31m")
        for program in (["jq", "."], ["node", "-e", READ_JSON]):
            if shutil.which(program[0]):
                text = (self.run_dir() / "metadata.json").read_bytes()
                subprocess.run(program, input=text, check=True, capture_output=True)

    def test_metadata_is_there_from_the_first_line_of_the_body(self) -> None:
        done = self.in_context("print((run_dir / 'metadata.json').exists())")
        self.assertEqual(done.stdout, "True\n")

    def test_the_command_can_be_pasted_into_a_shell(self) -> None:
        self.in_context("print(sys.argv[1:])", "a b", "$HOME", "it's")
        command = self.json("metadata.json")["command"]
        env = self.environment()
        again = subprocess.run(
            ["sh", "-c", str(command)], env=env, stdout=subprocess.PIPE, check=True
        )
        self.assertEqual(
            again.stdout.decode(),
            f"{['a b', '$HOME', chr(105) + 't' + chr(39) + 's']!r}\n",
        )

    def test_status_says_running_in_the_body(self) -> None:
        done = self.in_context("print((run_dir / 'status.json').read_text())")
        status = json.loads(done.stdout)
        self.assertEqual((status["status"], status["exit_code"]), ("running", None))
        self.assertRegex(status["started_utc"], r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ$")

    def test_RUN_DIR_is_set_inside_and_restored_after(self) -> None:
        body = """
        with run_context("results/exp", "outer") as outer:
            with run_context("results/exp", "inner") as inner:
                print(os.environ["RUN_DIR"] == str(inner))
            print(os.environ["RUN_DIR"] == str(outer))
        print(os.environ["RUN_DIR"])
        """
        done = self.script(body, env={"RUN_DIR": "mine"})
        self.assertEqual(done.stdout.split(), ["True", "True", "mine"])

    def test_positional_arguments_of_the_ancestors(self) -> None:
        body = """
        import argparse
        from pathlib import Path
        args = argparse.Namespace(lr=0.1, command="train", args=[1])
        with run_context(Path("results/exp"), "exp", vars(args), "config.yaml",
                         True, ["logs", "figures"]) as run_dir:
            args.run_dir = run_dir
            capture_metadata(run_dir, extra={"config_runner": True})
        """
        done = self.script(body)
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        self.assertTrue(self.json("metadata.json")["config_runner"])
        self.assertTrue((self.run_dir() / "figures").is_dir())
        self.assertFalse((self.run_dir() / "plots").exists())
        config = run_utils.load_run(self.run_dir()).config
        self.assertEqual(config["args"], {"lr": 0.1, "command": "train", "args": [1]})

    def test_the_functions_by_hand_give_the_same_files(self) -> None:
        body = """
        run_dir = start_run("results/exp", "exp")
        write_config_yaml(run_dir, "python train.py", {"lr": 0.1})
        capture_metadata(run_dir)
        mark_status(run_dir, "success", exit_reason="normal", extra={"best": 3})
        """
        done = self.script(body)
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        status = self.json("status.json")
        self.assertEqual((status["status"], status["best"]), ("success", 3))
        self.assertIsInstance(self.json("metadata.json")["pip_freeze"], list)
        self.assertEqual([row["event"] for row in self.index()], ["start", "end"])

    def test_it_goes_where_the_script_said_first_even_after_chdir(self) -> None:
        self.in_context("os.chdir('/')")
        self.assertEqual(self.json("status.json")["status"], "success")

    @unittest.skipUnless(hasattr(os, "fork"), "needs fork")
    def test_64_processes_in_one_second_get_64_directories(self) -> None:
        read, write = os.pipe()  # closing it starts them all at once
        children = []
        for _ in range(64):
            pid = os.fork()
            if pid == 0:
                os.close(write)
                os.read(read, 1)
                run_utils.start_run("results/exp", "exp")
                os._exit(0)
            children.append(pid)
        os.close(write)
        ends = {os.waitpid(pid, 0)[1] for pid in children}
        os.close(read)
        self.assertEqual((ends, len(self.run_dirs())), ({0}, 64))
        self.assertEqual(len(self.index()), 64)


class Names(RunCase):
    """Any prefix gives a directory name inside base_dir, within 255 bytes."""

    def test_hostile_prefixes_stay_inside(self) -> None:
        prefixes = ["../../etc", "/etc", "Qwen/Qwen3-8B", 'a"; rm -rf /', "x" * 300]
        prefixes += [
            "",
            ".",
            "..",
            "CON",
            "nul.txt",
            "é" * 200,
            "a\nb",
            "-rf",
            "\udc80",
        ]
        for prefix in prefixes:
            with self.subTest(prefix=prefix):
                run_dir = run_utils.start_run(self.tmp / "exp", prefix)
                self.assertEqual(run_dir.parent, self.tmp / "exp")
                self.assertLessEqual(len(os.fsencode(run_dir.name)), 255)
                self.assertNotIn("\n", run_dir.name)
                self.assertNotRegex(run_dir.name, r"^[-.]")

    def test_readable_names_stay_readable(self) -> None:
        self.assertEqual(run_utils._safe_name("Qwen/Qwen3-8B"), "Qwen_Qwen3-8B")
        self.assertEqual(run_utils._safe_name("CON"), "_CON")
        found = run_utils._safe_name("größe-β")
        if sys.getfilesystemencoding() == "utf-8":
            self.assertEqual(found, "größe-β")
        else:
            self.assertEqual(found, "gr__e-_")

    def test_the_prefix_defaults_to_the_script(self) -> None:
        self.script('run_context("results/exp").__enter__()')
        self.assertRegex(self.run_dir().name, r"^train-\d{8}-\d{6}")

    def test_taken_names_get_a_number(self) -> None:
        run_utils._make_run_dir(self.tmp, "a")
        (self.tmp / "a-2").symlink_to("nowhere")
        self.assertEqual(run_utils._make_run_dir(self.tmp, "a").name, "a-3")


class Mistakes(RunCase):
    """A caller's mistake raises one clear sentence before anything is created."""

    def check(self, sentence: str, *args: object, **kwargs: object) -> None:
        with self.assertRaises((OSError, TypeError, ValueError)) as caught:
            run_utils.run_context(*args, **kwargs).__enter__()  # type: ignore
        self.assertEqual(str(caught.exception), sentence)
        self.assertEqual(list(self.tmp.rglob("status.json")), [])

    def test_base_dir_is_not_a_path(self) -> None:
        self.check("base_dir must be a path, not 3", 3)

    def test_base_dir_is_empty(self) -> None:
        self.check("base_dir is ''; give a directory such as 'results/exp'", "")

    def test_base_dir_is_a_file(self) -> None:
        (self.tmp / "file").write_text("mine", "utf-8")
        path = str(self.tmp / "file" / "exp")
        self.check(
            f"cannot create a run in {path!r}: {str(self.tmp / 'file')!r} is a file;"
            " choose another base_dir",
            path,
        )
        self.assertEqual((self.tmp / "file").read_text("utf-8"), "mine")

    def test_subdirs_is_a_string(self) -> None:
        self.check("subdirs must be a list of names, not 'logs'", "r", subdirs="logs")

    def test_subdirs_leads_outside(self) -> None:
        sentence = "subdirs has '../x'; give names inside the run"
        self.check(sentence, "r", subdirs=["../x"])

    def test_tags_is_a_string(self) -> None:
        sentence = "tags must be a list of strings, not 'a'; use ['a']"
        self.check(sentence, "r", tags="a")

    def test_config_filename_has_a_folder(self) -> None:
        sentence = "file name 'a/b' has a folder in it; give a bare name"
        self.check(sentence, "r", config_filename="a/b")

    def test_entering_twice(self) -> None:
        context = run_utils.run_context(self.tmp / "exp", capture_output=False)
        with context as run_dir, self.assertRaises(RuntimeError) as caught:
            context.__enter__()
        sentence = f"this run_context already recorded {str(run_dir)!r};"
        sentence += " call run_context(...) again for another run"
        self.assertEqual(str(caught.exception), sentence)

    @unittest.skipIf(os.geteuid() == 0, "root may write everywhere")
    def test_base_dir_is_not_writable(self) -> None:
        (self.tmp / "locked").mkdir(mode=0o555)
        path = str(self.tmp / "locked" / "exp")
        self.check(
            f"cannot create a run in {path!r}: Permission denied;"
            " choose a base_dir that is writable and has space",
            path,
        )


ENDINGS = [  # body, exit status, (status, exit_reason, exit_code, type, message)
    ("pass", 0, ("success", "normal", 0, None, None)),
    ("sys.exit()", 0, ("success", "system_exit", 0, None, None)),
    ("sys.exit(0)", 0, ("success", "system_exit", 0, None, None)),
    ("sys.exit(3)", 3, ("failed", "system_exit", 3, "SystemExit", "3")),
    ("sys.exit('no')", 1, ("failed", "system_exit", 1, "SystemExit", "no")),
    ("1 / 0", 1, ("failed", "exception", 1, "ZeroDivisionError", "division by zero")),
    ("raise MemoryError", 1, ("failed", "exception", 1, "MemoryError", "")),
    ("raise GeneratorExit", 1, ("failed", "exception", 1, "GeneratorExit", "")),
    (
        "raise KeyboardInterrupt",
        -signal.SIGINT,
        ("failed", "exception", 130, "KeyboardInterrupt", ""),
    ),
    (
        "import asyncio; raise asyncio.CancelledError('stop')",
        1,
        ("failed", "exception", 1, "asyncio.exceptions.CancelledError", "stop"),
    ),
]
if sys.version_info >= (3, 11):
    ENDINGS.append(
        (
            "raise ExceptionGroup('two', [ValueError(1), KeyError(2)])",
            1,
            ("failed", "exception", 1, "ExceptionGroup", "two (2 sub-exceptions)"),
        )
    )


class HowItEnds(RunCase):
    """Every way to end inside Python is recorded, and happens as without us."""

    def test_status_and_exit_status(self) -> None:
        for body, returncode, expected in ENDINGS:
            with self.subTest(body):
                shutil.rmtree(self.tmp / "results", ignore_errors=True)
                done = self.in_context(body)
                self.assertEqual(done.returncode, returncode)
                status = self.json("status.json")
                error = status["exception"] or {}
                keys = ("status", "exit_reason", "exit_code")
                found = tuple(status[key] for key in keys)
                found += (error.get("type"), error.get("message"))
                self.assertEqual(found, expected)
                self.assertGreaterEqual(status["duration_seconds"], 0)
                last = self.index()[-1]
                self.assertEqual((last["event"], last["status"]), ("end", expected[0]))

    def test_what_was_seeded_inside_is_told(self) -> None:
        (self.tmp / "torch.py").write_text(
            "seed = 1\ndef manual_seed(new):\n    global seed\n    seed = new\n"
            "def initial_seed():\n    return seed\n",
            "utf-8",
        )
        body = """
            import torch, random
            torch.manual_seed(42)
            os.environ["PYTHONHASHSEED"] = "7"
            random.seed(3)
        """
        self.in_context(body)
        self.assertIsNone(self.json("metadata.json")["determinism"]["torch_seed"])
        told = {"torch_seed": 42, "PYTHONHASHSEED": "7"}
        self.assertEqual(self.json("status.json")["determinism"], told)
        self.assertEqual(self.command("diff", "latest").stdout, "")
        self.in_context(body.replace("42", "43"))
        first, second = map(str, self.run_dirs())
        done = self.command("diff", first, second)
        self.assertEqual(done.stdout, "machine   torch_seed: 42 -> 43\n")

    def test_nothing_is_told_of_seeds_that_are_as_before(self) -> None:
        self.in_context("import random; random.seed(3)")
        self.assertNotIn("determinism", self.json("status.json"))

    def test_the_traceback_is_the_one_without_us(self) -> None:
        body = "def f():\n    raise ValueError('x') from KeyError('y')\n"
        with_us = self.in_context(textwrap.indent(body, "") + "f()")
        path = self.tmp / "train.py"
        text = path.read_text("utf-8").replace(
            'with run_context("results/exp", "exp") as run_dir:', "if True:"
        )
        path.write_text(text, "utf-8")
        without = subprocess.run(
            [PYTHON, str(path)], env=self.environment(), stderr=subprocess.PIPE
        )
        self.assertEqual(with_us.stderr, without.stderr.decode())

    def test_the_traceback_is_in_the_log_and_in_status(self) -> None:
        self.in_context("1 / 0")
        self.assertIn("ZeroDivisionError: division by zero", self.log("stderr"))
        self.assertIn("1 / 0", self.json("status.json")["exception"]["traceback"])

    def test_an_exception_whose_str_raises(self) -> None:
        body = """
        class Bad(Exception):
            def __str__(self): raise RuntimeError
        raise Bad
        """
        done = self.in_context(body)
        self.assertEqual(done.returncode, 1)
        message = self.json("status.json")["exception"]["message"]
        self.assertEqual(message, "<Bad whose str() raises RuntimeError>")

    def test_the_callers_own_word_is_kept(self) -> None:
        self.in_context("mark_status(run_dir, 'partial', extra={'seen': 7})")
        status = self.json("status.json")
        found = status["status"], status["exit_reason"], status["seen"]
        self.assertEqual(found, ("partial", "normal", 7))
        self.assertEqual([row["event"] for row in self.index()], ["start", "end"])

    def test_an_exception_overrides_the_callers_word(self) -> None:
        self.in_context("mark_status(run_dir, 'partial'); 1 / 0")
        self.assertEqual(self.json("status.json")["status"], "failed")

    def test_a_forked_child_that_leaves_the_block_writes_nothing(self) -> None:
        body = """
        pid = os.fork()
        if pid == 0:
            sys.exit(9)
        os.waitpid(pid, 0)
        print((run_dir / "status.json").read_text())
        """
        done = self.in_context(body)
        self.assertEqual(json.loads(done.stdout)["status"], "running")
        self.assertEqual(self.json("status.json")["status"], "success")

    def test_terminated_multiprocessing_children_do_not_count(self) -> None:
        body = """
        import multiprocessing
        def work():
            with run_context("results/exp", "exp") as run_dir:
                context = multiprocessing.get_context("fork")
                child = context.Process(target=time.sleep, args=(60,))
                child.start()
                child.terminate()
                child.join()
        work()
        """
        self.assertEqual(self.script(body).returncode, 0)
        self.assertEqual(self.json("status.json")["status"], "success")

    def test_a_generator_that_is_never_finished(self) -> None:
        body = """
        def runs():
            with run_context("results/exp", "exp"):
                yield 1
                yield 2
        generator = runs()
        next(generator)
        """
        self.assertEqual(self.script(body).returncode, 0)
        self.wait_for_status("failed")

    def test_one_run_after_another_and_inside_another(self) -> None:
        body = """
        for number in range(2):
            with run_context("results/exp", "outer"):
                with run_context("results/exp", "inner"):
                    print(number)
        """
        done = self.script(body)
        self.assertEqual((done.stdout, done.stderr), ("0\n1\n", ""))
        found = [
            json.loads((run / "status.json").read_text("utf-8"))
            for run in self.run_dirs()
        ]
        self.assertEqual([facts["status"] for facts in found], ["success"] * 4)

    def test_threads_have_their_own_runs(self) -> None:
        body = """
        import threading
        def work():
            for _ in range(3):
                with run_context("results/exp", "exp") as run_dir:
                    log_metrics(run_dir, {"x": 1})
        threads = [threading.Thread(target=work) for _ in range(4)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        print("RUN_DIR" in os.environ)
        """
        done = self.script(body)
        self.assertEqual((done.stdout, done.stderr), ("False\n", ""))
        self.assertEqual(len(self.run_dirs()), 12)

    def test_decorated_functions_coroutines_and_generators(self) -> None:
        body = """
        import asyncio
        @run_context("results/exp", "exp")
        def plain(x): return x
        @run_context("results/exp", "exp")
        async def coroutine(x):
            await asyncio.sleep(0)
            return os.environ["RUN_DIR"] != "" and x
        @run_context("results/exp", "exp")
        def generator(x):
            yield x
        print(plain(1), plain(2), asyncio.run(coroutine(3)), list(generator(4)))
        """
        done = self.script(body)
        self.assertEqual((done.stdout, done.stderr), ("1 2 3 [4]\n", ""))
        self.assertEqual(len(self.run_dirs()), 4)

    def test_concurrent_coroutines(self) -> None:
        body = """
        import asyncio
        async def work(n):
            with run_context("results/exp", f"exp{n}"):
                await asyncio.sleep(0.01 * (3 - n))
                print("in", n, flush=True)
        async def every():
            await asyncio.gather(*(work(n) for n in range(3)))
        asyncio.run(every())
        print("out")
        """
        done = self.script(body)
        self.assertEqual(done.returncode, 0)
        self.assertIn("out\n", done.stdout)
        found = {
            json.loads((r / "status.json").read_text("utf-8"))["status"]
            for r in self.run_dirs()
        }
        self.assertEqual(found, {"success"})


class Resuming(RunCase):
    """run_dir= and resume= go on in a directory without losing its earlier record."""

    def test_run_dir_is_used_exactly(self) -> None:
        body = """
        for number in range(2):
            with run_context("results/exp", run_dir="out/here") as run_dir:
                print(run_dir, number)
        """
        done = self.script(body)
        self.assertEqual(done.stdout.split()[0], str(self.tmp / "out/here"))
        first = self.tmp / "out/here/attempts/1/status.json"
        self.assertEqual(json.loads(first.read_text("utf-8"))["status"], "success")
        self.assertIn(
            "here 0", (self.tmp / "out/here/logs/stdout.log").read_text("utf-8")
        )
        self.assertIn(
            "here 1", (self.tmp / "out/here/logs/stdout.log").read_text("utf-8")
        )

    def test_resume_by_path_name_and_latest(self) -> None:
        body = """
        with run_context("results/exp", "exp") as first: pass
        for again in (first, first.name, "latest"):
            with run_context("results/exp", resume=again) as run_dir:
                print(run_dir == first)
        """
        done = self.script(body)
        self.assertEqual(done.stdout.split(), ["True"] * 3)
        attempts = sorted(
            path.name for path in (self.tmp / "results").glob("exp/*/attempts/*")
        )
        self.assertEqual(attempts, ["1", "2", "3"])

    def test_a_run_that_is_alive_is_not_resumed(self) -> None:
        done = self.in_context("run_context('results/exp', resume=run_dir).__enter__()")
        self.assertIn("is still running; it cannot be resumed", done.stderr)

    def test_auto_goes_on_in_the_run_of_the_same_job(self) -> None:
        body = """
        with run_context("results/exp", "exp", resume="auto") as run_dir:
            print(run_dir)
        """
        job = {"SLURM_JOB_ID": "7"}
        again = {**job, "SLURM_RESTART_COUNT": "1"}
        runs = [
            self.script(body, env=env).stdout
            for env in (job, {"SLURM_JOB_ID": "8"}, again, job, {})
        ]
        self.assertEqual(runs[2], runs[0])
        self.assertEqual(len(set(runs)), 4)
        status = Path(runs[0].strip(), "status.json")
        self.assertEqual(json.loads(status.read_text("utf-8"))["attempt"], 2)

    @unittest.skipUnless(GIT, "git is not installed")
    def test_code_that_changed_between_attempts_is_warned_about(self) -> None:
        git = ["git", "-c", "user.name=x", "-c", "user.email=x@example.org"]
        body = 'with run_context("results/exp", run_dir="results/out"): pass'
        self.write_script(body)
        for words in (["init", "-q"], ["add", "train.py"], ["commit", "-qm", "x"]):
            subprocess.run([*git, *words], check=True)
        self.script(body)
        subprocess.run([*git, "commit", "-qm", "y", "--allow-empty"], check=True)
        done = self.script(body)
        warning = "run_utils: changed since attempt 1: code (commit_full)\n"
        self.assertEqual(done.stderr, warning)

    def test_what_changed_between_attempts_is_recorded_and_warned_about(self) -> None:
        body = """
        lr, version = sys.argv[1:]
        with open("thing-0.dist-info/METADATA", "w") as file:
            file.write("Name: thing\\nVersion: " + version)
        config = {"model": {"lr": float(lr)}, "seed": 1}
        with run_context("results/exp", run_dir="out", config_args=config):
            pass
        """
        (self.tmp / "thing-0.dist-info").mkdir()
        self.script(body, "0.1", "1")
        done = self.script(body, "0.2", "2")
        for what in ("config (model.lr)", "packages (thing)"):
            self.assertIn(f"changed since attempt 1: {what}\n", done.stderr)
        metadata = json.loads((self.tmp / "out/metadata.json").read_text("ascii"))
        changes = {
            "attempt": 1,
            "config": {"model.lr": [0.1, 0.2]},
            "code": {},
            "packages": {"thing": ["1", "2"]},
        }
        self.assertEqual(metadata["changes"], changes)

    @unittest.skipUnless(LINUX, "how a process ended is told by Linux")
    def test_the_death_of_an_earlier_attempt_goes_into_its_own_record(self) -> None:
        body = """
        with run_context("results/exp", run_dir="out"):
            print("here", flush=True)
            sys.stdin.read()
        """
        words = [PYTHON, str(self.write_script(body))]
        pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        with subprocess.Popen(words, env=self.environment(), **pipes) as first:
            assert first.stdout is not None
            first.stdout.readline()
            self.script(body)
            first.kill()
        archived = self.tmp / "out/attempts/1/status.json"
        for _ in range(500):
            facts = json.loads(archived.read_text("ascii"))
            if facts["status"] != "running":
                break
            time.sleep(0.02)
        self.assertEqual((facts["attempt"], facts["signal"]), (1, "SIGKILL"))
        last = json.loads((self.tmp / "out/status.json").read_text("ascii"))
        self.assertEqual((last["attempt"], last["status"]), (2, "success"))


class SeveralProcesses(RunCase):
    """The ranks of one launch share one run, and never that of another launch."""

    enter = 'with run_context("results/exp", "exp", {"lr": 1}) as run_dir:\n'

    def start(
        self, body: str, rank: int, world: int = 2, **more: str
    ) -> subprocess.Popen[str]:
        """Start train.py as one rank of a launch whose launcher is this process."""
        facts = {"RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_PORT": "29500"}
        facts.update({"LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1"})
        process = subprocess.Popen(
            [PYTHON, str(self.write_script(body))],
            env=self.environment({**facts, **more}),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
        )
        self.addCleanup(process.communicate)
        self.addCleanup(process.kill)
        return process

    def outputs(self, *processes: subprocess.Popen[str]) -> list[str]:
        results = [process.communicate(timeout=60) for process in processes]
        for process, (_, errors) in zip(processes, results):
            self.assertEqual(process.returncode, 0, errors)
        return [output for output, _ in results]

    def wait_until(self, condition: Any) -> Any:
        """Return what the condition gives once it holds; fail after a long while."""
        for _ in range(1000):
            with contextlib.suppress(AssertionError, ValueError, OSError):
                found = condition()
                if found:
                    return found
            time.sleep(0.02)
        self.fail("it never came to that")

    def wait_for(self, pattern: str) -> Path:
        """Return the first file that matches, once there is one."""
        path: Path = self.wait_until(lambda: sorted(self.tmp.glob(pattern)))[0]
        return path

    def wait_for_rank(self, failed: int) -> dict[str, Any]:
        """Return status.json once it names the rank that failed."""
        self.wait_until(lambda: self.json("status.json").get("failed_rank") == failed)
        return self.json("status.json")

    def run_dir(self) -> Path:
        runs = [path for path in self.run_dirs() if path.parent.name == "exp"]
        self.assertEqual(len(runs), 1, runs)
        return runs[0]

    def test_all_ranks_share_one_directory_and_one_record(self) -> None:
        body = self.enter + "    print(run_dir, flush=True)\n"
        body += "    print('torch' in sys.modules, file=sys.stderr)\n"
        ranks = [self.start(body, rank, 4) for rank in (2, 0, 3, 1)]
        paths = self.outputs(*ranks)
        self.assertEqual(set(paths), {f"{self.run_dir()}\n"})
        self.assertEqual([row["event"] for row in self.index()], ["start", "end"])
        self.assertEqual(self.json("status.json")["status"], "success")
        self.assertEqual(self.json("metadata.json")["launcher"]["rank"], 0)
        for rank in ("", "rank1.", "rank2.", "rank3."):
            self.assertEqual(self.log(f"{rank}stdout"), f"{self.run_dir()}\n")
            self.assertEqual(self.log(f"{rank}stderr"), "False\n")
        logs = {path.name for path in (self.run_dir() / "logs").iterdir()}
        self.assertEqual(len(logs), 8, logs)
        self.wait_until(lambda: not (self.tmp / "results/exp/.ranks").exists())

    def test_a_rank_that_comes_when_rank_0_has_ended_still_joins(self) -> None:
        body = self.enter + "    print(run_dir)\n"
        first = self.outputs(self.start(body, 0))
        self.assertEqual(self.outputs(self.start(body, 1)), first)

    def test_a_rank_of_another_host_is_answered_by_the_recorder(self) -> None:
        elsewhere = (
            "import run_utils\nrun_utils._Launch._published_here = lambda self: None\n"
        )
        body = elsewhere + self.enter + "    print(run_dir, flush=True)\n"
        body += "    sys.stdin.read()\n"
        rank_0, rank_1 = self.start(body, 0), self.start(body, 1)
        assert rank_0.stdout is not None and rank_1.stdout is not None
        self.assertEqual(rank_1.stdout.readline(), rank_0.stdout.readline())
        self.wait_until(lambda: not (self.tmp / "results/exp/.ranks").exists())
        self.outputs(rank_0, rank_1)

    def test_a_rank_that_raises_is_the_cause_even_when_rank_0_is_killed(self) -> None:
        body = self.enter + "    print('here', flush=True); sys.stdin.read()\n"
        body += "    if os.environ['RANK'] == '1': raise ValueError('bad batch')\n"
        rank_0, rank_1 = self.start(body, 0), self.start(body, 1)
        for name in ("stdout.log", "rank1.stdout.log"):  # both are inside
            log = self.wait_for(f"results/exp/exp-*/logs/{name}")
            self.wait_until(lambda log=log: log.read_text("utf-8") == "here\n")
        rank_1.communicate("")
        self.wait_for("results/exp/exp-*/logs/rank1.status.json")
        rank_0.terminate()
        rank_0.wait()
        facts = self.wait_for_rank(1)
        self.assertEqual(facts["exception"]["type"], "ValueError")
        self.assertEqual((facts["status"], facts["exit_code"]), ("failed", 1))
        self.assertEqual(facts["ranks"]["0"]["signal"], "SIGTERM" if LINUX else None)
        self.wait_until(lambda: len(self.index()) > 1)  # the recorder's last act
        self.assertEqual([row["event"] for row in self.index()], ["start", "end"])

    def test_a_rank_that_is_killed_fails_the_run_although_rank_0_succeeds(self) -> None:
        body = self.enter + "    print('here', flush=True); sys.stdin.read()\n"
        rank_0, rank_1 = self.start(body, 0), self.start(body, 1)
        log = self.wait_for("results/exp/exp-*/logs/rank1.stdout.log")
        self.wait_until(lambda: log.read_text("utf-8") == "here\n")
        rank_1.kill()
        self.wait_for("results/exp/exp-*/logs/rank1.status.json")
        self.outputs(rank_0)
        facts = self.wait_for_rank(1)
        self.assertEqual((facts["status"], facts["exit_reason"]), ("failed", "killed"))
        self.assertEqual(facts["ranks"]["0"]["status"], "success")
        self.wait_until(lambda: self.index()[-1]["status"] == "failed")

    def test_a_rank_that_fails_after_rank_0_ended_fails_the_run(self) -> None:
        body = self.enter + "    if os.environ['RANK'] == '1': sys.exit(7)\n"
        self.outputs(self.start(body, 0))
        self.start(body, 1).communicate()
        self.assertEqual(self.wait_for_rank(1)["exit_code"], 7)
        self.wait_until(lambda: self.index()[-1]["status"] == "failed")

    def test_what_a_crashed_launch_left_is_never_joined(self) -> None:
        body = self.enter + "    print(run_dir, flush=True); sys.stdin.read()\n"
        crashed = self.start(body, 0)
        assert crashed.stdout is not None
        stale = crashed.stdout.readline()
        crashed.kill()
        crashed.wait()
        rank_1 = self.start(body, 1)
        self.wait_for("results/exp/.ranks/*/1-*")
        rank_0 = self.start(body, 0)
        paths = self.outputs(rank_0, rank_1)
        self.assertEqual(paths[0], paths[1])
        self.assertNotIn(stale, paths)

    def test_requests_and_answers_of_the_past_are_passed_over(self) -> None:
        body = self.enter + "    print(run_dir)\n"
        waiting = self.start(body, 1)
        request = self.wait_for("results/exp/.ranks/*/1-*")
        waiting.kill()
        waiting.wait()
        identity = run_utils._process_identity(os.getpid())
        answer = {"run_dir": "/", "attempt": 1, "pid": waiting.pid, "process": identity}
        for name in ("1-0123abcd", "1-0123abce.json", "1-0123abcf.joined", "run.json"):
            request.with_name(name).write_text(json.dumps(answer), "ascii")
        paths = self.outputs(self.start(body, 1), self.start(body, 0))
        self.assertEqual(set(paths), {f"{self.run_dir()}\n"})

    def test_a_rank_whose_rank_0_never_comes_says_what_it_waited_for(self) -> None:
        body = "import run_utils; run_utils.RANK_WAIT_SECONDS = 0.1\n" + self.enter
        _, errors = self.start(
            body + "    pass\n", 1, MASTER_PORT="12345"
        ).communicate()
        self.assertIn(
            "TimeoutError: rank 1 of 2 waited 0.1 s for rank 0 to create the run below "
            f"'{self.tmp / 'results/exp'}' (MASTER_ADDR=127.0.0.1 MASTER_PORT=12345 ",
            errors,
        )
        self.assertEqual(self.run_dirs(), [])
        self.assertEqual(list(self.tmp.glob("results/exp/.ranks/*/*")), [])

    def test_sequential_and_nested_contexts_pair_up(self) -> None:
        body = """
        for number in range(2):
            with run_context("results/exp", "exp") as outer:
                print(outer)
                with run_context("results/exp", "exp") as inner:
                    print(inner)
        """
        first, second = self.outputs(self.start(body, 0), self.start(body, 1))
        self.assertEqual(first, second)
        self.assertEqual(len(set(first.split())), 4)
        self.assertEqual(len(self.run_dirs()), 4)

    def test_separate_ranks_have_a_run_each(self) -> None:
        body = "with run_context('results/exp', 'exp', ranks='separate'): pass"
        self.outputs(self.start(body, 0), self.start(body, 1))
        launchers = [run.metadata["launcher"] for run in run_utils.find_runs()]
        self.assertEqual({facts["rank"] for facts in launchers}, {0, 1})
        with self.assertRaisesRegex(ValueError, "give 'together' or 'separate'"):
            run_utils.run_context("results/exp", ranks="alone")

    def test_a_program_that_a_rank_starts_is_an_ordinary_run(self) -> None:
        body = self.enter + "    import subprocess\n"
        child = "from run_utils import *\nwith run_context('results/sub', 'sub'): pass"
        body += (
            f"    if os.environ['RANK'] == '1': subprocess.run({[PYTHON, '-c', child]})"
        )
        self.outputs(self.start(body, 0), self.start(body, 1))
        self.assertEqual(len(run_utils.find_runs("results/sub")), 1)

    def test_two_launchers_with_one_port_have_a_run_each(self) -> None:
        body = self.enter + "    print(run_dir)\n"
        shell = f"sh -c '{PYTHON} {self.write_script(body)}; true' &"
        env = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_PORT": "29500"}
        words = ["/bin/sh", "-c", f"RANK=1 {shell} RANK=0 {shell} wait"]
        settings: Any = {"stdout": subprocess.PIPE, "encoding": "utf-8"}
        settings["env"] = self.environment(env)
        launches = [subprocess.Popen(words, **settings) for _ in range(3)]
        paths = [launch.communicate(timeout=60)[0].split() for launch in launches]
        self.assertEqual([len(set(pair)) for pair in paths], [1, 1, 1], paths)
        self.assertEqual(len({pair[0] for pair in paths}), 3, paths)


class WhatCountsAsARank(unittest.TestCase):
    """Only what a launcher says of several processes makes a rank."""

    torch: ClassVar = {"RANK": "1", "WORLD_SIZE": "4", "MASTER_PORT": "29500"}
    slurm: ClassVar = {"SLURM_PROCID": "1", "SLURM_NTASKS": "4", "SLURM_JOB_ID": "7"}
    step: ClassVar = {**slurm, "SLURM_STEP_ID": "0"}
    mpi: ClassVar = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "4"}

    def test_launchers(self) -> None:
        hydra = {"PMI_RANK": "1", "PMI_SIZE": "4"}
        for env in (
            self.torch,
            self.step,
            self.mpi,
            hydra,
            {**self.step, **self.torch},
        ):
            with self.subTest(env=env):
                found = run_utils._rank(env)
                self.assertIsNotNone(found)
                self.assertEqual((found or ())[:2], (1, 4))

    def test_ordinary_processes(self) -> None:
        cases: dict[str, dict[str, str]] = {
            "world size 1": {**self.torch, "RANK": "0", "WORLD_SIZE": "1"},
            "a world of one inside a step": {
                **self.step,
                **self.torch,
                "WORLD_SIZE": "1",
            },
            "garbage": {**self.torch, "RANK": "abc"},
            "negative": {**self.torch, "RANK": "-1"},
            "beyond the world": {**self.torch, "RANK": "4"},
            "digits of another script": {**self.torch, "RANK": "\u0661"},
            "no launcher": {"RANK": "1", "WORLD_SIZE": "4"},
            "rank of an adapter": {"RANK": "64"},
            "script of sbatch": self.slurm,
            "batch step": {**self.slurm, "SLURM_STEP_ID": str(0xFFFFFFFB)},
            "interactive step": {**self.slurm, "SLURM_STEP_ID": str(0xFFFFFFFA)},
            "one task of a large job": {**self.step, "SLURM_STEP_NUM_TASKS": "1"},
            "garbage of MPI": {**self.mpi, "OMPI_COMM_WORLD_SIZE": ""},
        }
        for name, env in cases.items():
            with self.subTest(name):
                self.assertIsNone(run_utils._rank(env))

    def test_what_all_ranks_of_a_launch_share_is_equal_and_else_differs(self) -> None:
        for env, changed in (
            (self.torch, {"MASTER_PORT": "29501"}),
            (self.step, {"SLURM_STEP_ID": "1"}),
            (self.step, {"SLURM_JOB_ID": "8"}),
            (self.torch, {"TORCHELASTIC_RESTART_COUNT": "1"}),
            (self.step, {"SLURM_RESTART_COUNT": "1"}),
        ):
            with self.subTest(changed=changed):
                name = next(name for name in env if "RANK" in name or "PROCID" in name)
                folders = [
                    self.folder({**env, name: "2"}),
                    self.folder({**env, name: "3"}),
                    self.folder({**env, **changed}),
                ]
                self.assertEqual(folders[0], folders[1])
                self.assertNotEqual(folders[0], folders[2])

    def folder(self, env: dict[str, str]) -> Path:
        run_utils._entered.clear()
        options = {"base_dir": Path("/r"), "run_prefix": "x", "ranks": "together"}
        folder: Path = run_utils._Launch(env, options).folder
        return folder


class Metrics(RunCase):
    """log_metrics appends one line of strict JSON that other processes see at once."""

    def rows(self) -> list[dict[str, Any]]:
        path = self.tmp / "metrics" / "metrics.jsonl"

        def refuse(name: str) -> None:
            self.fail(f"{name} is not JSON")

        text = path.read_text("ascii")
        return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]

    def test_numbers_nan_text_and_nested_values(self) -> None:
        run_utils.log_metrics(self.tmp, {"loss": 0.5, "n": 3, "ok": True}, step=1)
        run_utils.log_metrics(self.tmp, {"loss": float("nan"), "name": "é", "l": [1]})
        first, second = self.rows()
        self.assertEqual((first["step"], first["loss"], first["n"]), (1, 0.5, 3))
        self.assertEqual((second["loss"], second["name"]), ("NaN", "é"))
        self.assertEqual((second["step"], second["l"]), (None, [1]))

    def test_a_torn_line_is_repaired(self) -> None:
        (self.tmp / "metrics").mkdir()
        (self.tmp / "metrics" / "metrics.jsonl").write_text('{"step": 1, "lo', "utf-8")
        run_utils.log_metrics(self.tmp, {"loss": 1})
        lines = (self.tmp / "metrics" / "metrics.jsonl").read_text("utf-8").splitlines()
        self.assertEqual(json.loads(lines[1])["loss"], 1)

    def test_forked_children_log_whole_lines_too(self) -> None:
        body = """
        log_metrics(run_dir, {"who": -1})
        pids = []
        for who in range(4):
            pid = os.fork()
            if pid == 0:
                for _ in range(200):
                    log_metrics(run_dir, {"who": who})
                os._exit(0)
            pids.append(pid)
        [os.waitpid(pid, 0) for pid in pids]
        """
        self.in_context(body)
        path = self.run_dir() / "metrics" / "metrics.jsonl"
        rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        self.assertEqual(len(rows), 801)

    def test_no_acknowledged_row_is_lost_to_SIGKILL(self) -> None:
        body = """
        for step in range(10 ** 9):
            log_metrics(run_dir, {"x": step}, step)
            os.write(1, b"%d\\n" % step)
        """
        text = (
            'with run_context("results/exp", "exp", capture_output=False) as run_dir:'
        )
        path = self.write_script(text + textwrap.indent(textwrap.dedent(body), "    "))
        child = subprocess.Popen(
            [PYTHON, str(path)], env=self.environment(), stdout=subprocess.PIPE
        )
        assert child.stdout is not None
        child.stdout.read(2000)
        child.kill()
        acknowledged = 0
        for line in child.stdout.read().split()[1:-1]:
            acknowledged = max(acknowledged, int(line))
        child.stdout.close()
        child.wait()
        # Linux may cut the last write at a page; its row was not acknowledged.
        rows = run_utils._read_lines(self.run_dir() / "metrics" / "metrics.jsonl")
        steps = [row["step"] for row in rows]
        self.assertEqual(steps, list(range(len(steps))))
        self.assertGreaterEqual(steps[-1], acknowledged)

    def test_a_step_may_be_any_object(self) -> None:
        run_utils.log_metrics(self.tmp, {"loss": 1.5}, step=Path("3"))  # type: ignore[arg-type]
        run_utils.log_metrics(self.tmp, {("a", 1): True}, step=4)  # type: ignore[dict-item]
        rows = list(run_utils._read_lines(self.tmp / "metrics" / "metrics.jsonl"))
        self.assertEqual([row["step"] for row in rows], ["3", 4])
        self.assertEqual([list(row.values())[-1] for row in rows], [1.5, True])

    def test_a_full_disk_does_not_raise(self) -> None:
        (self.tmp / "metrics").mkdir()
        (self.tmp / "metrics" / "metrics.jsonl").mkdir()
        with contextlib.redirect_stderr(None):
            run_utils.log_metrics(self.tmp, {"x": 1})


class SavedFiles(RunCase):
    """Files are whole or absent, readable by others, and strict JSON."""

    def test_save_json_converts_and_creates_folders(self) -> None:
        path = run_utils.save_json(
            "a/b.json", {"x": {1}, "p": Path("q"), "n": float("nan")}
        )
        self.assertEqual(
            json.loads(path.read_text("utf-8")), {"x": [1], "p": "q", "n": "NaN"}
        )

    def test_mode_follows_the_umask(self) -> None:
        before = os.umask(0o027)
        try:
            run_utils._write_file(self.tmp / "f", b"x")
        finally:
            os.umask(before)
        self.assertEqual(stat.S_IMODE((self.tmp / "f").stat().st_mode), 0o640)

    def test_a_failed_write_keeps_the_old_file(self) -> None:
        path = self.tmp / "f"
        path.write_bytes(b"old")
        for name in ("write", "replace", "close"):
            original = getattr(os, name)

            def fail(*args: object, name: str = name, original=original) -> None:  # type: ignore
                if name == "close":
                    original(*args)
                raise OSError(28, "No space left on device")

            with self.subTest(name), self.assertRaises(OSError):
                setattr(os, name, fail)
                try:
                    run_utils._write_file(path, b"new")
                finally:
                    setattr(os, name, original)
            self.assertEqual(path.read_bytes(), b"old")
            self.assertEqual(os.listdir(), ["f"])

    def test_readers_never_see_half_a_file(self) -> None:
        path = self.tmp / "f.json"
        run_utils._write_json(path, {"n": 0})
        stop = threading.Event()
        seen: list[object] = []

        def read() -> None:
            while not stop.is_set():
                seen.append(json.loads(path.read_text("utf-8"))["n"])

        thread = threading.Thread(target=read)
        thread.start()
        for number in range(100):
            run_utils._write_json(path, {"n": number, "text": "xy " * 5000})
        stop.set()
        thread.join()
        self.assertEqual(seen, sorted(seen))


class TheIndex(RunCase):
    """Every run has its lines in the index of its results root."""

    def test_keys_and_root(self) -> None:
        self.in_context("pass")
        start, end = self.index()
        keys = [
            "event",
            "timestamp_utc",
            "run_dir",
            "run_basename",
            "experiment_name",
            "env_name",
            "results_root",
            "hostname",
            "user",
            "pid",
            "git_commit_short",
            "script_name",
            "status",
            "exit_reason",
            "path",
            "inputs",
        ]
        self.assertEqual(list(start), keys)
        self.assertEqual((start["event"], end["event"]), ("start", "end"))
        self.assertEqual(start["path"], f"exp/{self.run_dir().name}")

    def test_the_nearest_index_wins_then_results_then_base_dir(self) -> None:
        root = run_utils._results_root
        self.assertEqual(root(Path("/a/results/b/c")), Path("/a/results"))
        self.assertEqual(root(Path("/a/b")), Path("/a/b"))
        (self.tmp / "index").mkdir()
        (self.tmp / "index" / "runs_index.jsonl").touch()
        self.assertEqual(root(self.tmp / "results" / "x"), self.tmp)

    def test_a_torn_tail_costs_only_itself(self) -> None:
        path = self.tmp / "lines.jsonl"
        run_utils._append_line(path, {"n": 1})
        whole = path.read_bytes()
        for cut in range(1, len(whole)):
            path.write_bytes(whole[:cut])
            run_utils._append_line(path, {"n": 2})
            last = list(run_utils._read_lines(path))[-1]
            self.assertEqual(last, {"n": 2})

    def test_notes_and_tags_of_run_context(self) -> None:
        self.script('with run_context("results/e", notes="try", tags=["a"]): pass')
        (note,) = run_utils._read_lines(self.run_dir() / "notes.jsonl")
        self.assertEqual((note["text"], note["tags"]), ("try", ["a"]))


class Lineage(RunCase):
    """mark_artifact_used writes on both sides, and never fails."""

    def test_both_sides(self) -> None:
        body = """
        with run_context("results/a", "producer") as producer:
            (producer / "artifacts" / "model.pt").write_text("x")
        with run_context("results/b", "consumer") as consumer:
            mark_artifact_used(producer / "artifacts" / "model.pt", reason="init")
        """
        done = self.script(body)
        self.assertEqual(done.stderr, "")
        producer, consumer = self.run_dirs()
        (line,) = run_utils._read_lines(producer / "artifacts" / "USED_BY.jsonl")
        self.assertEqual(
            (line["artifact_relpath"], line["reason"]), ("model.pt", "init")
        )
        self.assertEqual(line["consumer_run_dir"], str(consumer))
        (entry,) = run_utils.load_run(consumer).metadata["inputs"]
        self.assertEqual(
            (entry["run"], entry["path"]), (producer.name, "artifacts/model.pt")
        )
        self.assertEqual((entry["size"], entry["status"]), (1, "success"))

    def test_what_is_in_no_run_is_ignored(self) -> None:
        run_utils.mark_artifact_used(self.tmp / "nothing", self.tmp)
        self.assertEqual(os.listdir(), [])


class ProvenanceCase(unittest.TestCase):
    """A home, stub programs in front on PATH, and git repositories to make."""

    def setUp(self) -> None:
        self.tmp = Path(os.path.realpath(tempfile.mkdtemp(prefix="run_utils-test-")))
        self.addCleanup(shutil.rmtree, self.tmp, ignore_errors=True)
        (self.tmp / "bin").mkdir()
        (self.tmp / ".gitconfig").write_text(
            "[user]\nname=n\nemail=e@x\n[init]\ndefaultBranch=main\n"
            '[protocol "file"]\nallow=always\n[commit]\ngpgSign=false\n',
            "utf-8",
        )
        env = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
        env.update(HOME=str(self.tmp), XDG_CONFIG_HOME=str(self.tmp))
        self.patch(mock.patch.dict(os.environ, env, clear=True))

    def patch(self, patcher: Any) -> None:
        patcher.start()
        self.addCleanup(patcher.stop)

    def limit(self, **constants: float) -> None:
        for name, value in constants.items():
            self.patch(mock.patch.object(run_utils, name, value))

    def stub(self, name: str, text: str) -> str:
        """Put a shell script on PATH, which then is nothing else."""
        path = self.tmp / "bin" / name
        path.write_text("#!/bin/sh\nPATH=/usr/bin:/bin\n" + text, "utf-8")
        path.chmod(0o755)
        os.environ["PATH"] = str(self.tmp / "bin")
        return str(path)

    def git(self, *words: str, cwd: Path | None = None) -> str:
        command = ["git", *words]
        done = subprocess.run(command, cwd=cwd or self.repo, capture_output=True)
        self.assertEqual(done.returncode, 0, done.stderr)
        return done.stdout.decode().strip()

    def new_repo(self, name: str = "repo", *options: str) -> Path:
        if GIT is None:
            self.skipTest("git is not installed")
        self.repo = self.tmp / name
        self.repo.mkdir()
        self.git("init", "-q", *options)
        (self.repo / "a.txt").write_text("one\n", "utf-8")
        self.git("add", "-A")
        self.git("commit", "-qm", "first")
        return self.repo


class ForeignPrograms(ProvenanceCase):
    """A foreign program costs at most its time and its bytes, and leaves nothing."""

    def test_what_it_prints(self) -> None:
        output = run_utils._run([self.stub("p", "echo out; echo err >&2")])
        found = output.returncode, output.text, output.problem
        self.assertEqual(found, (0, "out\n", None))

    def test_problems_are_sentences(self) -> None:
        self.limit(PROGRAM_BYTES=1000, PROGRAM_SECONDS=0.5)
        for text, sentence in {
            "echo no such thing >&2; exit 3": "p ended with status 3: no such thing",
            "sleep 60": "p did not end within 0.5 s",
            "while :; do echo flood; done": "p printed more than 1000 bytes",
            "exec >&- 2>&-; sleep 60": "p did not end within 0.5 s",
        }.items():
            self.assertEqual(run_utils._run([self.stub("p", text)]).problem, sentence)
        problem = run_utils._run(["/no/such/program"]).problem
        self.assertRegex(str(problem), "^program cannot be started: .*No such file")

    def test_a_grandchild_that_holds_the_pipe_is_not_waited_for(self) -> None:
        output = run_utils._run([self.stub("p", "sleep 60 & echo done")])
        self.assertEqual((output.text, output.problem), ("done\n", None))

    def test_its_children_die_with_it(self) -> None:
        self.limit(PROGRAM_SECONDS=0.3)
        marker = self.tmp / "marker"
        self.assertIsNotNone(
            run_utils._run(
                [self.stub("p", f"(sleep 0.6; touch {marker}) & sleep 60")]
            ).problem
        )
        time.sleep(0.6)
        self.assertFalse(marker.exists())


class GitFacts(ProvenanceCase):
    """Commit, branch, changes and remote are told in every state of a repository."""

    def facts(self, where: Path | None = None, exclude: str = "") -> dict[str, Any]:
        tree = run_utils._GitTree(str(where or self.repo), [exclude] if exclude else [])
        facts, problem = run_utils._git(tree)
        self.assertIsNone(problem)
        return facts

    def test_a_clean_repository(self) -> None:
        repo = self.new_repo()
        self.git("remote", "add", "origin", "https://example.org/x.git")
        (repo / "sub").mkdir()
        facts = self.facts(repo / "sub")
        commit = self.git("rev-parse", "HEAD")
        self.assertEqual(facts["commit_full"], commit)
        self.assertTrue(commit.startswith(facts["commit_short"]))
        self.assertEqual(run_utils._git_head(str(repo)), facts["commit_short"])
        found = [facts[key] for key in ("branch", "is_dirty", "unpushed", "root")]
        self.assertEqual(found, ["main", False, 1, str(repo)])
        self.assertEqual(facts["remote_origin_url"], "https://example.org/x.git")

    def test_what_makes_it_dirty(self) -> None:
        repo = self.new_repo()
        for change in ("echo x >> a.txt", "echo x > new", "rm a.txt", "chmod +x a.txt"):
            subprocess.run(["sh", "-c", change], cwd=repo, check=True)
            self.assertTrue(self.facts()["is_dirty"], change)
            self.git("reset", "-q", "--hard")
            self.git("clean", "-qfd")
        (repo / ".gitignore").write_text("*.log\n", "utf-8")
        self.git("add", "-A")
        self.git("commit", "-qm", "ignore")
        (repo / "x.log").write_text("ignored", "utf-8")
        self.assertFalse(self.facts()["is_dirty"])

    def test_the_results_tree_does_not_count(self) -> None:
        repo = self.new_repo()
        (repo / "results").mkdir()
        (repo / "results" / "r.json").write_text("{}", "utf-8")
        self.assertTrue(self.facts()["is_dirty"])
        self.assertFalse(self.facts(exclude=str(repo / "results"))["is_dirty"])

    def test_detached_unborn_worktree_and_shallow(self) -> None:
        repo = self.new_repo()
        self.git("worktree", "add", "-q", "-b", "side", str(self.tmp / "tree"))
        self.assertEqual(self.facts(self.tmp / "tree")["branch"], "side")
        self.git(
            "clone", "-q", "--depth=1", f"file://{repo}", str(self.tmp / "shallow")
        )
        facts = self.facts(self.tmp / "shallow")
        self.assertEqual((facts["is_shallow"], facts["unpushed"]), (True, 0))
        self.git("checkout", "-q", "--detach")
        facts = self.facts()
        self.assertEqual((facts["branch"], facts["is_dirty"]), (None, False))
        self.git("init", "-q", str(self.tmp / "unborn"))
        facts = self.facts(self.tmp / "unborn")
        self.assertEqual((facts["branch"], facts["commit_full"]), ("main", None))
        self.assertIsNone(run_utils._git_head(str(self.tmp / "unborn")))

    def test_a_dirty_submodule_makes_it_dirty(self) -> None:
        inner = self.new_repo("inner")
        repo = self.new_repo()
        self.git("submodule", "--quiet", "add", str(inner), "sub")
        self.git("commit", "-qm", "submodule")
        self.assertFalse(self.facts()["is_dirty"])
        (repo / "sub" / "a.txt").write_text("changed\n", "utf-8")
        self.assertTrue(self.facts()["is_dirty"])
        self.assertEqual(self.facts(repo / "sub")["root"], str(repo / "sub"))

    def test_git_variables_of_the_caller_do_not_count(self) -> None:
        repo = self.new_repo()
        os.environ.update(GIT_DIR="/nonexistent", GIT_INDEX_FILE="/nonexistent")
        self.assertEqual(self.facts()["root"], str(repo))

    def test_none_bare_and_foreign_repositories(self) -> None:
        self.new_repo()
        facts, problem = run_utils._git(run_utils._GitTree(str(self.tmp)))
        self.assertEqual(set(facts.values()), {None})
        self.assertIn("not a git repository", str(problem))
        self.git("clone", "-q", "--bare", str(self.repo), str(self.tmp / "bare"))
        facts, _ = run_utils._git(run_utils._GitTree(str(self.tmp / "bare")))
        self.assertEqual((facts["is_dirty"], facts["root"]), (None, None))
        self.patch(mock.patch.object(run_utils, "_git_run", self.as_a_stranger))
        facts, problem = run_utils._git(run_utils._GitTree(str(self.repo)))
        self.assertIsNone(facts["commit_full"])
        self.assertIn("dubious ownership", str(problem))

    def as_a_stranger(self, directory: str, *words: str, **_: Any) -> Any:
        env = {**os.environ, "GIT_TEST_ASSUME_DIFFERENT_OWNER": "1"}
        return run_utils._run(["git", *words], cwd=directory, env=env)

    def test_a_lock_is_no_obstacle_and_nothing_is_written(self) -> None:
        repo = self.new_repo()
        (repo / ".git" / "index.lock").touch()
        (repo / "a.txt").write_text("two\n", "utf-8")
        before = [(p, p.stat().st_mtime_ns) for p in sorted((repo / ".git").rglob("*"))]
        self.assertTrue(self.facts()["is_dirty"])
        after = [(p, p.stat().st_mtime_ns) for p in sorted((repo / ".git").rglob("*"))]
        self.assertEqual(before, after)

    def test_a_git_that_fails_hangs_or_lies(self) -> None:
        self.limit(PROGRAM_SECONDS=0.3, HEAD_SECONDS=0.3)
        for text in ("exit 128", "sleep 60", "echo garbage", "printf '\\377\\000'"):
            self.stub("git", text)
            facts, problem = run_utils._git(run_utils._GitTree(str(self.tmp)))
            self.assertEqual((set(facts.values()), bool(problem)), ({None}, True), text)
            self.assertIsNone(run_utils._git_head(str(self.tmp)))

    def test_nothing_that_git_could_start_is_run(self) -> None:
        repo = self.new_repo()
        trip = self.tmp / "tripped"
        wire = self.tmp / "wire"
        wire.write_text(f"#!/bin/sh\necho $0 >> {trip}\ncat\n", "utf-8")
        wire.chmod(0o755)
        for key in ("core.fsmonitor", "core.pager", "diff.external", "diff.x.textconv"):
            self.git("config", key, str(wire))
        for key in ("filter.x.clean", "filter.x.process", "filter.x.smudge"):
            self.git("config", key, str(wire))
        shutil.copy(wire, repo / ".git" / "hooks" / "post-index-change")
        (repo / ".gitattributes").write_text("* filter=x diff=x\n", "utf-8")
        (repo / "a.txt").write_text("two\n", "utf-8")
        trip.unlink(missing_ok=True)
        run_utils._git(run_utils._GitTree(str(repo)))
        run_utils._git_head(str(repo))
        self.assertFalse(trip.exists(), trip.exists() and trip.read_text("utf-8"))
        subprocess.run(["git", "status"], cwd=repo, capture_output=True)
        self.assertTrue(trip.exists(), "the wire does not trip for an ordinary git")


SECRET = b"ghp_" + b"aB3" * 12


class PatchCase(ProvenanceCase):
    """A repository, its patch, and the clone that the patch is applied to."""

    def new_tree(self, files: dict[str, bytes], name: str = "repo") -> Path:
        repo = self.new_repo(name)
        for path, content in files.items():
            self.write(path, content)
        self.git("add", "-A", "-f")
        self.git("commit", "-qm", "second", "--allow-empty")
        return repo

    def write(self, path: str | Path, content: bytes) -> None:
        target = self.repo / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)

    def keep(self, entered: int | None = None, exclude: str = "") -> dict[str, Any]:
        """Write the patch; return what is told of it."""
        self.patch(mock.patch.object(run_utils, "_known_secrets", set()))
        tree = run_utils._GitTree(str(self.repo), [exclude or str(self.tmp)], entered)
        facts, problem = run_utils._git_patch(tree, self.tmp / "git.patch")
        self.assertIsNone(problem)
        return facts

    def rebuild(self, *settings: str) -> dict[str, tuple[object, bytes]]:
        clone, patch = self.tmp / "clone", self.tmp / "git.patch"
        shutil.rmtree(clone, ignore_errors=True)
        config = [word for setting in settings for word in ("-c", setting)]
        where = (str(self.repo), str(clone))
        self.git("clone", "-q", "--recurse-submodules", *config, *where)
        if patch.exists():
            self.git("apply", "--whitespace=nowarn", str(patch), cwd=clone)
            patch.unlink()
        return read_tree(clone)

    def assert_round_trip(self, *settings: str) -> dict[str, Any]:
        facts = self.keep()
        self.assertEqual(self.rebuild(*settings), read_tree(self.repo))
        return facts


def read_tree(root: Path) -> dict[str, tuple[object, bytes]]:
    """Return {path: (kind, content)} of all files but git's own."""
    tree: dict[str, tuple[object, bytes]] = {}
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name != ".git"]
        links = [name for name in folders if os.path.islink(os.path.join(folder, name))]
        for name in [name for name in files + links if name != ".git"]:
            path = os.path.join(folder, name)
            if os.path.islink(path):
                kind, content = "link", os.fsencode(os.readlink(path))
            else:
                kind = f"{os.stat(path).st_mode & 0o100:o}"
                content = Path(path).read_bytes()
            tree[os.path.relpath(path, root)] = kind, content
    return tree


class GitPatch(PatchCase):
    """The patch turns a clean checkout of the commit into the tree at entry."""

    ODD: ClassVar[dict[str, tuple[bytes | None, bytes | None]]] = {
        "no newline": (b"a\nb", b"a\nc"),
        "newline added": (b"a", b"a\n"),
        "crlf": (b"a\r\nb\r\n", b"a\r\nc\r\n"),
        "mixed\tends": (b"a\r\nb\nc\r", b"a\nb\r\nc\n"),
        "emptied": (b"a\n", b""),
        "filled": (b"", b"a\n"),
        "deleted": (b"a\n", None),
        "sp ace/ in name": (None, b"new\n"),
        os.fsdecode("\u00fc\u00e4\u65e5\u672c".encode()): (b"1\n", b"2\n"),
        'quote"back\\slash': (b"1\n", b"2\n"),
        "new\nline": (b"1\n", b"2\n"),
        b"\xff\xfe".decode("utf-8", "surrogateescape"): (b"1\n", b"2\n"),
        "binary": (bytes(range(256)) * 9, bytes(range(255, -1, -1)) * 9),
        "new binary": (None, b"\0" * 5000),
        "new empty": (None, b""),
        "deleted binary": (b"\0\1\2", None),
        "diff --git a/x b/x": (b"diff --git a/x b/x\n", b"diff --git a/y b/y\n"),
        "not utf-8": (b"\xe9\n", b"\xe8\n"),
        "a -> b": (b"1\n", b"2\n"),
        "long line": (b"x" * 70000, b"y" * 70000),
    }

    @unittest.skipUnless(sys.platform == "linux", "names of any bytes need Linux")
    def test_odd_files(self) -> None:
        self.new_tree({k: old for k, (old, _) in self.ODD.items() if old is not None})
        for name, (_, new) in self.ODD.items():
            if new is None:
                (self.repo / name).unlink()
            else:
                self.write(name, new)
        facts = self.assert_round_trip()
        self.assertEqual((facts["files"], facts["left_out"]), (len(self.ODD), []))

    def test_files_that_git_was_told_to_take_as_unchanged(self) -> None:
        names = ["assumed", "assumed mode", "deleted", "skipped", "same", "\u2713\nx"]
        names = [os.fsdecode(name.encode()) for name in names]
        repo = self.new_tree(dict.fromkeys(names, b"1\n"))
        (repo / "link").symlink_to("same")
        self.git("add", "link")
        self.git("commit", "-qm", "link")
        self.git("update-index", "--assume-unchanged", "link", *names)
        self.git("update-index", "--no-assume-unchanged", "skipped")
        self.git("update-index", "--skip-worktree", "skipped")
        for name in ("assumed", "skipped", names[-1]):
            self.write(name, b"2\n")
        (repo / "assumed mode").chmod(0o755)
        (repo / "deleted").unlink()
        (repo / "link").unlink()
        (repo / "link").symlink_to("deleted")
        facts, _ = run_utils._git(run_utils._GitTree(str(repo)))
        self.assertEqual(len(facts["changed"]), 6)
        self.assertTrue(facts["is_dirty"])
        self.assertEqual(self.assert_round_trip()["files"], 6)

    def test_what_a_sparse_checkout_lacks_is_not_deleted(self) -> None:
        repo = self.new_tree({"a/x": b"1\n", "b/y": b"1\n", "c": b"1\n"})
        self.git("sparse-checkout", "set", "a")
        self.assertFalse((repo / "b").exists())
        self.write("a/x", b"2\n")
        self.assertEqual(self.keep()["files"], 1)
        tree = self.rebuild()
        self.assertEqual([tree[name][1] for name in ("a/x", "b/y")], [b"2\n", b"1\n"])

    def test_staged_unstaged_renamed_modes_links_and_types(self) -> None:
        names = ["staged", "both", "moved", "mode", "file2link", "file2dir"]
        names += ["cached", "dir/x"]
        repo = self.new_tree({name: name.encode() * 9 + b"\n" for name in names})
        (repo / "link").symlink_to("mode")
        (repo / "link2file").symlink_to("mode")
        self.git("add", ".")
        self.git("commit", "-qm", "links")
        self.write("staged", b"s\n")
        self.write("both", b"s\n")
        self.git("add", ".")
        self.write("both", b"later\n")
        self.git("mv", "moved", "moved away")
        self.git("rm", "-q", "--cached", "cached")
        (repo / "mode").chmod(0o755)
        for name in ("link", "link2file", "file2link", "file2dir", "dir/x"):
            (repo / name).unlink()
        (repo / "dir").rmdir()
        (repo / "link").symlink_to(os.fsdecode("elsewhere \u00fc".encode()))
        (repo / "file2link").symlink_to("mode")
        (repo / "dir").symlink_to("mode")
        self.write("link2file", b"now a file\n")
        self.write("file2dir/x", b"now a directory\n")
        self.git("add", "-N", "file2dir/x")
        self.assert_round_trip()

    def test_line_endings_that_git_converts(self) -> None:
        for setting in ("true", "input", "false"):
            attributes = b"*.t text eol=crlf\n"
            files = {"a": b"1\n2\n3\n", ".gitattributes": attributes, "b.t": b"1\n"}
            self.new_tree(files, f"repo-{setting}")
            self.git("config", "core.autocrlf", setting)
            for name in files:
                (self.repo / name).unlink()
            (self.repo / "a.txt").unlink()
            self.git("checkout", ".")
            self.write("a", b"1\r\n2\r\nthree\r\n")
            self.write("b.t", b"1\r\n2\r\n")
            self.write("c", b"1\r\n2\n")
            with self.subTest(autocrlf=setting):
                self.assert_round_trip(f"core.autocrlf={setting}")

    def test_a_filter_like_that_of_git_lfs(self) -> None:
        files = {".gitattributes": b"*.bin filter=big\n", "a.bin": b"pointer\n"}
        self.new_tree({**files, "b.bin": b"pointer\n"})
        self.git("config", "filter.big.clean", "echo pointer")
        self.git("config", "filter.big.smudge", "cat")
        self.write("a.bin", b"real content\0" * 9)
        self.assert_round_trip()

    def test_a_merge_that_stopped_and_a_repository_without_commits(self) -> None:
        self.new_tree({"a": b"1\n"})
        self.git("checkout", "-qb", "side")
        self.write("a", b"2\n")
        self.git("commit", "-qam", "2")
        self.git("checkout", "-q", "main")
        self.write("a", b"3\n")
        self.git("commit", "-qam", "3")
        merge = ["git", "merge", "-q", "side"]
        subprocess.run(merge, cwd=self.repo, capture_output=True)
        self.assertIn(b"<<<<", read_tree(self.repo)["a"][1])
        self.assert_round_trip()
        for number, kind in enumerate(("sha1", "sha256")):
            self.repo = self.tmp / f"unborn{number}"
            self.repo.mkdir()
            self.git("init", "-q", f"--object-format={kind}")
            self.write("x/y", b"1\n")
            self.assertEqual(self.keep()["files"], 1)
            fresh = self.tmp / f"fresh{number}"
            self.git("init", "-q", str(fresh))
            self.git("apply", str(self.tmp / "git.patch"), cwd=fresh)
            self.assertEqual(read_tree(fresh), read_tree(self.repo))

    def test_submodules_changed_inside_and_moved(self) -> None:
        self.new_tree({"f": b"1\n", "g": b"1\n"}, "inner")
        self.new_repo()
        self.git("submodule", "--quiet", "add", str(self.tmp / "inner"), "s u/b")
        self.git("commit", "-qm", "s")
        inner = self.repo / "s u" / "b"
        (inner / "f").write_bytes(b"2\n")
        self.git("commit", "-qam", "inside", cwd=inner)
        (inner / "g").write_bytes(b"2\n")
        (inner / "new").write_bytes(b"2\n")
        self.assertEqual(self.assert_round_trip()["files"], 3)
        facts, _ = run_utils._git(run_utils._GitTree(str(self.repo)))
        module = facts["submodules"][0]
        self.assertEqual((module["path"], module["is_dirty"]), ("s u/b", True))
        self.assertNotEqual(module["recorded"], module["commit_full"])

    def test_what_is_not_the_code(self) -> None:
        self.new_tree({".gitignore": b"*.o\n"})
        self.write("x.o", b"x")
        self.write("results/r/config.yaml", b"x")
        for name in ("status.json", "x.log"):
            self.write(f"exp-20260131-142501-1a2b3c4/{name}", b"{}")
        self.write("index/runs_index.jsonl", b"{}\n")
        self.write(".ranks/1a/run.json", b"{}\n")
        facts = self.keep(exclude=str(self.repo / "results"))
        self.assertEqual((facts["files"], facts["file"]), (0, None))
        self.assertFalse((self.tmp / "git.patch").exists())

    def test_the_tree_is_that_of_entry(self) -> None:
        self.new_tree({"early": b"1\n", "late": b"1\n"})
        self.write("early", b"2\n")
        (self.tmp / "mark").write_bytes(b"")
        entered = (self.tmp / "mark").stat().st_ctime_ns
        time.sleep(0.02)
        self.write("late", b"2\n")
        self.write("new", b"2\n")
        self.assertEqual(self.keep(entered)["files"], 1)
        tree = run_utils._GitTree(str(self.repo), entered=entered)
        facts, _ = run_utils._git(tree)
        found = facts["changed"], facts["changed_after_entry"], facts["untracked"]
        self.assertEqual(found, (["early"], ["late"], []))

    def test_limits_list_what_is_left_out(self) -> None:
        self.limit(PATCH_FILE_BYTES=100, PATCH_BYTES=150, MAX_LISTED=2)
        self.new_repo()
        for name, size in (("a", 90), ("b", 91), ("c", 92), ("d", 101)):
            self.write(name, b"x" * size)
        facts = self.keep()
        self.assertEqual((facts["files"], facts["left_out_count"]), (1, 3))
        self.assertEqual(facts["left_out_bytes"], 91 + 92 + 101)
        full = "the patch is full"
        entries = [
            {"path": name, "bytes": n, "reason": full, "sha256": sha256(b"x" * n)}
            for name, n in (("b", 91), ("c", 92))
        ]
        self.assertEqual(facts["left_out"], entries)
        self.limit(PATCH_BYTES=1000)
        entry = self.keep()["left_out"][0]
        self.assertEqual((entry["path"], entry["reason"]), ("d", "too large"))
        self.limit(PATCH_FILES=2)
        self.assertEqual(self.keep()["left_out_count"], 2)

    def test_special_files_and_repositories_inside_are_left_out(self) -> None:
        self.new_repo()
        self.write("x", b"")
        os.mkfifo(self.repo / "fifo")
        self.git("init", "-q", "nested")
        self.write("nested/f", b"1")
        left_out = {entry["path"] for entry in self.keep()["left_out"]}
        self.assertEqual(left_out - {"fifo"}, {"nested/"})

    def test_the_repository_is_left_as_it_was(self) -> None:
        repo = self.new_repo()
        self.write("a.txt", b"two\n")
        self.write("new", b"two\n")
        (repo / ".git" / "index.lock").touch()  # of a git that crashed, or runs
        files = sorted((repo / ".git").rglob("*"))
        before = [(path, path.stat().st_mtime_ns) for path in files]
        self.assertEqual(self.keep()["files"], 2)
        run_utils._git_bundle(run_utils._GitTree(str(repo)), self.tmp / "b")
        files = sorted((repo / ".git").rglob("*"))
        self.assertEqual([(path, path.stat().st_mtime_ns) for path in files], before)

    def test_a_tree_that_git_cannot_read_has_a_reason(self) -> None:
        repo = self.new_repo()
        self.write("a.txt", b"two\n")
        tree = run_utils._GitTree(str(repo))
        shutil.rmtree(repo / ".git" / "objects")
        facts, problem = run_utils._git_patch(tree, self.tmp / "git.patch")
        self.assertIsNone(facts["file"])
        self.assertRegex(str(problem), "git ended with status 128")

    def test_a_git_that_hangs_costs_its_timeout(self) -> None:
        self.new_repo()
        self.write("a.txt", b"two\n")
        tree = run_utils._GitTree(str(self.repo))
        self.limit(PATCH_SECONDS=0.2, PROGRAM_SECONDS=0.2)
        self.stub("git", "sleep 60")
        _, problem = run_utils._git_patch(tree, self.tmp / "git.patch")
        self.assertRegex(str(problem), "git did not end within")


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class SecretsInPatches(PatchCase):
    """A patch shows no secret and still applies."""

    BASE = b"".join(b"line %d\n" % number for number in range(30))

    def keep_redacted(self) -> tuple[dict[str, Any], dict[str, tuple[object, bytes]]]:
        facts, path = self.keep(), self.tmp / "git.patch"
        self.assertNotIn(SECRET, path.read_bytes())
        return facts, self.rebuild()

    def test_a_secret_in_a_new_file_and_in_a_tracked_one(self) -> None:
        self.new_tree({"f": self.BASE})
        self.write("f", self.BASE.replace(b"line 9", b"key " + SECRET))
        self.write("new", b"key " + SECRET + b"\n")
        facts, tree = self.keep_redacted()
        self.assertEqual(sorted(facts["redacted"]), ["f", "new"])
        clean = self.BASE.replace(b"line 9", b"key <REDACTED>")
        self.assertEqual(tree["f"][1], clean)
        self.assertEqual(tree["new"][1], b"key <REDACTED>\n")

    def test_a_value_found_secret_in_one_file_is_replaced_in_all(self) -> None:
        self.new_repo()
        values = (
            b"q7Rk2Lm9Xw4Zt8",
            b"c0rrect-h0rse-ecdfe2",
            b"hunter2hunter2",
            b"tr0ub4dor&3",
        )
        for number, value in enumerate(values):  # without a shape of their own
            self.write(f"a{number}", b"print('" + value + b"')\n")
            self.write(
                f"z{number}", b"# " + b"x" * 200 + b"\ndb_password = '" + value + b"'\n"
            )
        self.keep()
        patch = (self.tmp / "git.patch").read_bytes()
        self.assertEqual([value for value in values if value in patch], [])

    def test_a_table_of_secrets_is_redacted_and_not_looked_for_elsewhere(self) -> None:
        self.new_repo()
        row = "password = 'q7Rk2Lm9Xw4Zt8-%d'\n"
        table = "".join([row % n for n in range(run_utils.MAX_LEARNED + 1)])
        self.write("a", table.encode())
        self.write("z", b"'q7Rk2Lm9Xw4Zt8-7'\n")
        self.assertEqual(self.keep()["redacted"], ["a"])
        self.assertNotIn(b"'q7Rk2Lm9Xw4Zt8-8'", (self.tmp / "git.patch").read_bytes())
        self.assertEqual(run_utils._known_secrets, set())

    def test_a_word_that_a_secret_is_named_with_stays_elsewhere(self) -> None:
        self.new_repo()
        for word in (b"resnet50-base_v2", b"default tokenizer", b"bert-base-uncased"):
            self.write("a", b"model = '" + word + b"'\n")
            self.write("z", b"password = '" + word + b"'\n")
            self.keep()
            patch = (self.tmp / "git.patch").read_bytes()
            self.assertIn(b"model = '" + word, patch)

    def test_the_temporary_files_hold_no_secret(self) -> None:
        self.new_tree({"f": self.BASE})
        self.write("f", self.BASE + SECRET)
        self.write("new", SECRET)
        kept = self.tmp / "scratch"
        kept.mkdir()
        scratch = contextlib.nullcontext(str(kept))
        self.patch(mock.patch("tempfile.TemporaryDirectory", lambda **_: scratch))
        self.keep()
        files = [path for path in kept.rglob("*") if path.is_file()]
        loose = [path for path in files if len(path.name) == 38]
        self.assertEqual(len(loose), 2)
        for path in files:
            data = path.read_bytes()
            data = zlib.decompress(data) if path in loose else data
            self.assertNotIn(SECRET, data, path)

    def test_a_secret_in_the_old_content(self) -> None:
        old = self.BASE.replace(b"line 9", b"key " + SECRET)
        names = ("removed", "kept", "deleted", "far", "mode")
        repo = self.new_tree(dict.fromkeys(names, old))
        self.write("removed", self.BASE)
        self.write("kept", old.replace(b"line 10", b"ten"))
        self.write("far", old + b"end\n")
        (repo / "mode").chmod(0o755)
        (repo / "deleted").unlink()
        facts, tree = self.keep_redacted()
        self.assertEqual((facts["files"], facts["left_out"]), (5, []))
        self.assertEqual(tree["removed"][1], self.BASE)
        kept = old.replace(b"line 10", b"ten").replace(SECRET, b"<REDACTED>")
        self.assertEqual(tree["kept"][1], kept)
        self.assertEqual(tree["mode"], ("100", old))
        self.assertNotIn("deleted", tree)

    def test_what_a_filter_encrypts_is_not_in_it(self) -> None:
        attributes = b"hidden filter=git-crypt\n"
        files = {".gitattributes": attributes, "hidden": b"\0cipher", "f": b"1\n"}
        self.new_tree(files)
        self.git("config", "filter.git-crypt.clean", "printf cipher")
        self.write("hidden", b"plain text\n")
        self.write("f", b"2\n")
        self.assertEqual(self.keep()["files"], 1)
        self.assertNotIn(b"plain", (self.tmp / "git.patch").read_bytes())

    def test_binary_files_names_and_files_that_hold_secrets_by_nature(self) -> None:
        self.new_tree({"x": b"1\n", ".env": b"TRACKED=1\n"})
        hidden = (".env", "prod.env", ".env.local", "k/id_rsa", "a.pem", ".aws/x")
        for name in hidden:
            self.write(name, b"A=1\n")
        self.write("bin", b"\0" + SECRET)
        self.write(f"name-{SECRET.decode()}", b"1")
        self.write("id_rsa.pub", b"public\n")
        self.write(".env.example", b"API_KEY=\n")
        facts, _ = self.keep_redacted()
        reasons = {entry["path"]: entry["reason"] for entry in facts["left_out"]}
        self.assertEqual(reasons.pop("bin"), "a binary file that holds a secret")
        named = reasons.pop(f"name-{SECRET.decode()}")
        self.assertEqual(named, "has a secret in its name")
        self.assertEqual(reasons, dict.fromkeys(hidden, "holds secrets by nature"))
        self.assertEqual(facts["files"], 2)


class GitBundle(PatchCase):
    """Commits that no remote has are kept, unless one holds a secret."""

    def bundle(self) -> tuple[dict[str, Any], str]:
        self.patch(mock.patch.object(run_utils, "_known_secrets", set()))
        tree = run_utils._GitTree(str(self.repo))
        facts, problem = run_utils._git_bundle(tree, self.tmp / "git.bundle")
        return facts, str(problem)

    def test_a_clone_of_the_remote_gets_the_commit(self) -> None:
        upstream = self.new_repo("up")
        self.git("clone", "-q", str(upstream), str(self.tmp / "repo"))
        self.repo = self.tmp / "repo"
        facts, problem = self.bundle()
        self.assertEqual((facts["file"], facts["commits"], problem), (None, 0, "None"))
        self.write("a.txt", b"two\n")
        self.git("commit", "-qam", "second")
        facts, problem = self.bundle()
        self.assertEqual((facts["commits"], problem), (1, "None"))
        self.assertEqual(facts["commit"], self.git("rev-parse", "HEAD"))
        other = self.tmp / "other"
        self.git("clone", "-q", str(upstream), str(other))
        self.git("fetch", "-q", str(self.tmp / "git.bundle"), "HEAD", cwd=other)
        self.git("cat-file", "-e", facts["commit"], cwd=other)

    def test_one_secret_keeps_it_away(self) -> None:
        for name, files, reason in (
            ("content", {"x": SECRET}, "'x' of an unpushed commit holds a secret"),
            ("nature", {".env": b"1"}, "'.env' of an .* holds secrets by nature"),
            ("name", {SECRET.decode(): b"1"}, "the name of a file .* holds a secret"),
        ):
            self.new_tree(files, name)
            self.assertRegex(self.bundle()[1], f"^no bundle: {reason}")
        self.new_repo("message")
        self.git("commit", "-q", "--allow-empty", "-m", SECRET.decode())
        self.assertRegex(self.bundle()[1], "no bundle: a commit holds a secret")
        self.assertFalse((self.tmp / "git.bundle").exists())

    def test_a_large_history_is_not_kept(self) -> None:
        self.limit(BUNDLE_BYTES=1000)
        self.new_tree({"x": b"1" * 2000})
        problem = "no bundle: git printed more than 1000 bytes"
        self.assertEqual(self.bundle()[1], problem)


class LocalPackages(PatchCase):
    """Packages from local folders are told with commit, changes and patch."""

    def install(self, name: str, url: str, **about: bool) -> None:
        info = self.tmp / "site-packages" / f"{name}-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Name: {name}\nVersion: 1.0\n", "utf-8")
        direct = json.dumps({"url": url, "dir_info": about})
        (info / "direct_url.json").write_text(direct, "utf-8")

    def asked(self, tree: Any) -> list[dict[str, Any]]:
        places = [str(self.tmp / "site-packages"), str(self.tmp / "developed")]
        request = {"sys_path": places, "executable": sys.executable}
        packages, problem = run_utils._local_packages(request, tree, self.tmp)
        self.assertIsNone(problem)
        return packages

    def test_their_repositories_are_told_and_kept(self) -> None:
        repo = self.new_repo("my lib")
        self.write("a.txt", b"two\n")
        url = f"file://{self.tmp}/my%20lib"
        self.install("mine", url, editable=True)
        self.install("mine-too", url)
        egg = self.tmp / "developed" / "old.egg-info"
        egg.mkdir(parents=True)
        (egg / "PKG-INFO").write_text("Name: old\nVersion: 1.0\n", "utf-8")
        packages = self.asked(run_utils._GitTree(str(self.tmp)))
        names = [(package["name"], package["editable"]) for package in packages]
        self.assertEqual(names, [("mine", True), ("mine-too", False), ("old", True)])
        facts = {key: packages[0][key] for key in ("path", "is_dirty", "commit_full")}
        commit = self.git("rev-parse", "HEAD")
        self.assertEqual(facts["path"], str(repo))
        self.assertEqual((facts["is_dirty"], facts["commit_full"]), (True, commit))
        self.assertEqual(packages[0]["patch"]["file"], "git.mine.patch")
        self.assertIn(b"+two", (self.tmp / "git.mine.patch").read_bytes())
        self.assertTrue((self.tmp / "git.mine.bundle").exists())
        self.assertNotIn("patch", packages[1])  # the same repository
        self.assertIn("not a git repository", packages[2]["problem"])

    def test_that_of_the_experiment_is_not_kept_twice(self) -> None:
        repo = self.new_repo()
        self.install("mine", repo.as_uri(), editable=True)
        packages = self.asked(run_utils._GitTree(str(repo)))
        self.assertNotIn("patch", packages[0])

    def test_another_python_is_asked_for_its_path(self) -> None:
        request = {"sys_path": [], "executable": sys.executable, "directory": "/"}
        places, problem = run_utils._sys_path(request)
        self.assertIsNone(problem)
        self.assertIn(os.path.dirname(os.__file__), places)


class TripWires(PatchCase):
    """Nothing that git could be made to start is started."""

    WIRES = (
        "core.fsmonitor", "core.pager", "core.editor", "core.askPass", "diff.external",
        "diff.x.textconv", "diff.x.command", "filter.x.clean", "filter.x.smudge",
        "filter.x.process", "credential.helper", "core.sshCommand", "gpg.program",
        "uploadpack.packObjectsHook", "core.gitProxy", "interactive.diffFilter",
    )  # fmt: skip
    HOOKS = ("post-index-change", "reference-transaction", "pre-auto-gc")

    def arm(self, repo: Path) -> None:
        for key in self.WIRES:
            self.git("config", key, str(self.wire), cwd=repo)
        folder = Path(self.git("rev-parse", "--absolute-git-dir", cwd=repo))
        (folder / "hooks").mkdir(exist_ok=True)
        (folder / "info").mkdir(exist_ok=True)
        for hook in self.HOOKS:
            shutil.copy(self.wire, folder / "hooks" / hook)
        attributes = "* filter=x diff=x\n"
        (folder / "info" / "attributes").write_text(attributes, "utf-8")

    def test_the_wires_stay(self) -> None:
        tripped, self.wire = self.tmp / "tripped", self.tmp / "wire"
        self.wire.write_text(f'#!/bin/sh\necho "$0" >> {tripped}\ncat\n', "utf-8")
        self.wire.chmod(0o755)
        names = ("changed", "touched", "hidden", "link")
        files = dict.fromkeys(names, b"1\n")
        self.new_tree(files, "inner")
        repo = self.new_tree(files)
        self.git("submodule", "--quiet", "add", str(self.tmp / "inner"), "sub")
        self.git("commit", "-qm", "submodule")
        self.git("config", "submodule.recurse", "true")
        for root in (repo, repo / "sub"):
            self.git("update-index", "--assume-unchanged", "hidden", cwd=root)
            self.arm(root)
            (root / "changed").write_bytes(b"2\n")
            (root / "hidden").write_bytes(b"2\n")
            (root / "new").write_bytes(b"2\n")
            os.utime(root / "touched", (1, 1))
        wire = str(self.wire)
        os.environ.update(GIT_CONFIG_COUNT="1", GIT_CONFIG_KEY_0="core.fsmonitor")
        os.environ.update(GIT_CONFIG_VALUE_0=wire, GIT_EXTERNAL_DIFF=wire)
        os.environ.update(GIT_PAGER=wire, GIT_SSH=wire, GIT_ASKPASS=wire)
        tripped.unlink(missing_ok=True)
        tree = run_utils._GitTree(str(repo))
        facts, problem = run_utils._git(tree)
        self.assertEqual((facts["is_dirty"], problem), (True, None))
        facts, problem = run_utils._git_patch(tree, self.tmp / "git.patch")
        self.assertEqual((facts["files"], problem), (6, None))
        facts, problem = run_utils._git_bundle(tree, self.tmp / "git.bundle")
        self.assertEqual((facts["file"], problem), ("git.bundle", None))
        self.assertIsNotNone(run_utils._git_head(str(repo)))
        self.assertFalse(tripped.exists(), tripped.exists() and tripped.read_text())
        subprocess.run(["git", "status"], cwd=repo, capture_output=True)
        self.assertTrue(tripped.exists(), "the wire does not trip for an ordinary git")

    def test_a_partial_clone_fetches_nothing(self) -> None:
        origin = self.new_tree({"a": b"1\n", "b": b"2\n"}, "origin")
        self.git("config", "uploadpack.allowFilter", "true")
        part = self.tmp / "part"
        self.git("clone", "-q", "--filter=blob:none", origin.as_uri(), str(part))
        self.git("rm", "-q", "b")
        self.git("commit", "-qm", "third")
        self.git("pull", "-q", cwd=part)
        shutil.rmtree(origin)
        self.repo = part
        self.write("a", b"changed\n")
        tree = run_utils._GitTree(str(part))
        facts, problem = run_utils._git(tree)
        self.assertEqual((facts["is_dirty"], problem), (True, None))
        facts, problem = run_utils._git_patch(tree, self.tmp / "git.patch")
        self.assertEqual((facts["files"], problem), (1, None))

    def test_a_filter_that_cannot_be_switched_off_stops_the_status(self) -> None:
        self.new_repo()
        self.git("config", "filter.a=b.clean", "false")
        facts, problem = run_utils._git(run_utils._GitTree(str(self.repo)))
        self.assertIsNone(facts["is_dirty"])
        sentence = "a git filter has a name that cannot be switched off"
        self.assertEqual(problem, sentence)
        _, problem = run_utils._git_patch(
            run_utils._GitTree(str(self.repo)), self.tmp / "git.patch"
        )
        self.assertEqual(problem, sentence)


class Surroundings(ProvenanceCase):
    """Container, environment and determinism are read, never set or imported."""

    def test_the_container(self) -> None:
        os.environ["APPTAINER_CONTAINER"] = "/images/torch.sif"
        facts, _ = run_utils._container()
        found = facts["kind"], facts["image"]
        self.assertEqual(found, ("apptainer", "/images/torch.sif"))
        del os.environ["APPTAINER_CONTAINER"]
        os.environ["SLURM_CONTAINER_IMAGE"] = "nvcr.io/x:1"
        self.assertEqual(run_utils._container()[0]["image"], "nvcr.io/x:1")

    def test_the_environment_and_its_lock_files(self) -> None:
        (self.tmp / "uv.lock").write_bytes(b"x")
        (self.tmp / "pyvenv.cfg").write_text("home = /usr\nuv = 0.4.18\n", "utf-8")
        facts, _ = run_utils._environment(str(self.tmp), str(self.tmp))
        self.assertEqual((facts["manager"], facts["uv_version"]), ("uv", "0.4.18"))
        self.assertEqual(facts["lock_files"], {"uv.lock": sha256(b"x")})
        package = self.tmp / "conda" / "conda-meta" / "numpy-2.0-py312.json"
        package.parent.mkdir(parents=True)
        package.touch()
        facts, _ = run_utils._environment("", str(self.tmp / "conda"))
        self.assertEqual(facts["manager"], "conda")
        self.assertEqual(facts["conda_packages"], ["numpy-2.0-py312"])

    def test_the_ids_of_a_kubernetes_job(self) -> None:
        env = {"POD_NAME": "a-0", "JOB_COMPLETION_INDEX": "0", "EDITOR": "vi"}
        found = run_utils._launcher(env)
        self.assertEqual(found, {"JOB_COMPLETION_INDEX": "0", "POD_NAME": "a-0"})

    def test_no_random_number_is_drawn(self) -> None:
        state = random.getstate()
        first = run_utils._determinism()
        self.assertEqual(random.getstate(), state)
        self.assertEqual(first, run_utils._determinism())
        random.random()
        second = run_utils._determinism()
        self.assertNotEqual(first["random_state"], second["random_state"])
        random.setstate(state)

    def test_a_loaded_torch_is_read_and_a_broken_one_tolerated(self) -> None:
        torch: Any = types.ModuleType("torch")
        torch.initial_seed = lambda: 42
        torch.are_deterministic_algorithms_enabled = lambda: 1 // 0
        cudnn = types.SimpleNamespace(benchmark=True)
        torch.backends = types.SimpleNamespace(cudnn=cudnn)
        os.environ["PYTHONHASHSEED"] = "0"
        with mock.patch.dict(sys.modules, torch=torch):
            facts = run_utils._determinism()
        found = [facts[f"torch_{key}"] for key in ("seed", "deterministic")]
        self.assertEqual(found, [42, None])
        self.assertEqual(facts["torch_cudnn_benchmark"], True)
        self.assertEqual(facts["PYTHONHASHSEED"], "0")

    def test_a_module_imports_nothing_for_us(self) -> None:
        lazy: Any = types.ModuleType("numpy")
        asked: list[str] = []
        lazy.__getattr__ = asked.append
        with mock.patch.dict(sys.modules, numpy=lazy, torch=lazy):
            run_utils._determinism()
        self.assertEqual(asked, [])

    def test_a_seed_of_numpy_that_was_not_used_yet(self) -> None:
        key = [7]
        for index in range(1, 624):  # init_genrand of mt19937ar.c
            last = key[-1]
            key.append((1812433253 * (last ^ (last >> 30)) + index) & 0xFFFFFFFF)
        state = ["MT19937", types.SimpleNamespace(tolist=lambda: key), 624, 0, 0.0]
        numpy: Any = types.ModuleType("numpy")
        numpy.random = types.SimpleNamespace(get_state=lambda: state)
        with mock.patch.dict(sys.modules, numpy=numpy):
            self.assertEqual(run_utils._determinism()["numpy_seed"], 7)
            state[2] = 3
            self.assertIsNone(run_utils._determinism()["numpy_seed"])


class ScriptElsewhere(RunCase):
    """The repository is that of the script, not that of the working directory."""

    @unittest.skipIf(GIT is None, "git is not installed")
    def test_the_commit_in_name_and_metadata(self) -> None:
        (self.tmp / "code").mkdir()
        self.write_script('with run_context("results/exp", "exp"): pass').rename(
            self.tmp / "code" / "train.py"
        )
        identity = ["-c", "user.name=n", "-c", "user.email=e@x"]
        for words in (["init", "-q"], ["add", "."], [*identity, "commit", "-qm", "c"]):
            subprocess.run(["git", *words], cwd=self.tmp / "code", check=True)
        command = [PYTHON, "code/train.py"]
        subprocess.run(command, cwd=self.tmp, env=self.environment(), check=True)
        git = self.json("metadata.json")["git"]
        self.assertEqual(git["root"], str(self.tmp / "code"))
        self.assertFalse(git["is_dirty"])
        self.assertTrue(self.run_dir().name.endswith("-" + git["commit_short"]))


class Packages(ProvenanceCase):
    """The packages are what `pip freeze` says, or else what the metadata says."""

    def test_pip_of_the_interpreter_is_asked(self) -> None:
        python = self.stub(
            "python", "echo 'b==2'; echo '-e git+https://x.org/r@1#egg=r'"
        )
        lines, problem = run_utils._packages(python, [])
        self.assertEqual(lines, ["b==2", "-e git+https://x.org/r@1#egg=r"])
        self.assertIsNone(problem)

    def test_without_pip_the_metadata_is_read(self) -> None:
        direct = {
            "plain": None,
            "wheel": {"url": "https://x.org/w.whl", "archive_info": {}},
            "vcs": {
                "url": "https://x.org/r",
                "vcs_info": {"vcs": "git", "commit_id": "1a"},
            },
            "local": {"url": "file:///src/local", "dir_info": {"editable": True}},
        }
        for name, url in direct.items():
            folder = self.tmp / "site" / f"{name}-1.0.dist-info"
            folder.mkdir(parents=True)
            (folder / "METADATA").write_text(f"Name: {name}\nVersion: 1.0\n", "utf-8")
            if url:
                (folder / "direct_url.json").write_text(json.dumps(url), "utf-8")
        (self.tmp / "site" / "torn-1.0.dist-info").mkdir()
        python = self.stub("python", "echo 'No module named pip' >&2; exit 1")
        lines, problem = run_utils._packages(python, [str(self.tmp / "site")])
        self.assertIsNone(problem)
        vcs, wheel = "vcs @ git+https://x.org/r@1a", "wheel @ https://x.org/w.whl"
        self.assertEqual(lines, ["-e /src/local", "plain==1.0", vcs, wheel])

    def test_another_program_without_packages(self) -> None:
        self.limit(PIP_SECONDS=0.3)
        lines, problem = run_utils._packages(self.stub("python", "sleep 60"), [])
        self.assertEqual((lines, problem), (None, "python did not end within 0.3 s"))


class Cuda(ProvenanceCase):
    """GPUs are what nvidia-smi says; torch is read only where it is loaded already."""

    def test_two_gpus(self) -> None:
        self.stub(
            "nvidia-smi",
            'case "$1" in --query*) '
            'echo "0, NVIDIA H100, 81559, GPU-8a1b, 550.54, Enabled"; '
            'echo "1, NVIDIA H100, 81559, GPU-9c2d, 550.54, [N/A]";; '
            '-L) echo "GPU 0: H100 (UUID: GPU-8a1b)"; echo "  MIG 1g.10gb (UUID: M)";;'
            ' *) echo "| NVIDIA-SMI 550.54   CUDA Version: 12.4 |";; esac',
        )
        facts, problem = run_utils._cuda()
        found = [facts[key] for key in ("available", "version", "device_count")]
        self.assertEqual((found, problem), ([True, "12.4", 2], None))
        self.assertEqual(facts["driver_version"], "550.54")
        self.assertEqual(facts["devices"][1]["uuid"], "GPU-9c2d")
        modes = [device["mig.mode.current"] for device in facts["devices"]]
        self.assertEqual(modes, ["Enabled", None])
        self.assertEqual(facts["devices"][0]["memory.total"], 81559)
        self.assertEqual(facts["mig_devices"], ["MIG 1g.10gb (UUID: M)"])

    def test_a_driver_older_than_mig(self) -> None:
        self.stub(
            "nvidia-smi",
            'case "$1" in --query*mig*) echo "mig is not a valid field"; exit 2;; '
            '--query*) echo "0, K80, 11441, GPU-0, 418.1";; esac',
        )
        facts, problem = run_utils._cuda()
        device = facts["devices"][0]
        found = (device["name"], device["mig.mode.current"], problem)
        self.assertEqual(found, ("K80", None, None))

    def test_no_program_and_no_driver(self) -> None:
        os.environ["PATH"] = str(self.tmp / "bin")
        self.patch(mock.patch.object(run_utils, "NVIDIA_DRIVER", "/nonexistent"))
        facts, problem = run_utils._cuda()
        self.assertEqual((facts["available"], problem), (False, None))

    def test_hanging_failing_and_garbage(self) -> None:
        self.limit(PROGRAM_SECONDS=0.3)
        for text in ("sleep 60", "exit 9", "echo what"):
            self.stub("nvidia-smi", text)
            facts, problem = run_utils._cuda()
            self.assertIsNone(facts["available"], text)
            self.assertTrue(problem, text)

    def test_torch_is_read_only_from_what_is_loaded(self) -> None:
        self.assertIsNone(run_utils._loaded_cuda()["torch_cuda_version"])
        torch = types.SimpleNamespace(cuda="12.1")
        self.patch(mock.patch.dict(sys.modules, {"torch.version": torch}))
        self.assertEqual(run_utils._loaded_cuda()["torch_cuda_version"], "12.1")


class Machine(ProvenanceCase):
    """What the machine says is told without starting a program."""

    def test_platform_agrees_with_the_standard_library(self) -> None:
        import platform

        facts = run_utils._platform()
        self.assertEqual(facts["system"], platform.system())
        self.assertEqual(facts["machine"], platform.machine())
        self.assertEqual(facts["cpu_count"], os.cpu_count())

    @unittest.skipIf(os.name != "posix", "user ids are POSIX")
    def test_a_user_without_a_name(self) -> None:
        for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
            os.environ.pop(name, None)
        with mock.patch("pwd.getpwuid", side_effect=KeyError):
            self.assertEqual(run_utils._user(), f"uid:{os.getuid()}")

    def test_launchers(self) -> None:
        env = {"SLURM_JOB_ID": "7", "RANK": "0", "WORLD_SIZE": "2", "HOME": "/"}
        found = run_utils._launcher(env)
        self.assertEqual(found, {"RANK": "0", "SLURM_JOB_ID": "7", "WORLD_SIZE": "2"})


RANDOM = "a1B2c3D4e5F6g7H8i9J0"  # looks like a key; as a whole and in pieces harmless


class NoSecretReachesTheDisk(RunCase):
    """A canary sits in every place that a secret can come from; none is on the disk."""

    def setUp(self) -> None:
        super().setUp()
        self.canaries: list[str] = []

    def canary(self) -> str:
        self.canaries.append(f"hf_{uuid.uuid4().hex}Zz9")
        return self.canaries[-1]

    def project(self) -> Path:
        """Make a repository with a canary in all that git tells."""
        if GIT is None:
            self.skipTest("git is not installed")
        repo = self.tmp / "project"
        (repo / "lib").mkdir(parents=True)
        (repo / "tracked.py").write_text("x = 1\n", "utf-8")
        (repo / "old.py").write_text(f"key = '{self.canary()}'\n", "utf-8")
        url = f"https://oauth2:{self.canary()}@example.org/x.git"
        identity = ("-c", "user.name=n", "-c", "user.email=e@x")
        for words in (
            ("init", "-q"),
            ("add", "-A"),
            (*identity, "commit", "-qm", f"with {self.canary()}"),
            ("remote", "add", "origin", url),
        ):
            subprocess.run(["git", *words], cwd=repo, check=True)
        (repo / "tracked.py").write_text(f"x = '{self.canary()}'\n", "utf-8")
        (repo / "old.py").write_text("key = os.environ['KEY']\n", "utf-8")
        (repo / "new.py").write_text(f"token: {self.canary()}\n", "utf-8")
        (repo / ".env").write_text(f"SOME_KEY={self.canary()}\n", "utf-8")
        self.plain = "c0rrect-h0rse-ecdfe2"  # has no shape of its own
        text = f"db_password = '{self.plain}'\n"
        (repo / "settings.py").write_text(text, "utf-8")
        self.canaries.append(self.plain)
        return repo

    def package(self) -> Path:
        info = self.tmp / "site" / "private-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text("Name: private\nVersion: 1.0\n", "utf-8")
        vcs = {"vcs": "git", "commit_id": "1a2b3c"}
        url = f"https://oauth2:{self.canary()}@example.org/p.git"
        direct = json.dumps({"url": url, "vcs_info": vcs})
        (info / "direct_url.json").write_text(direct, "utf-8")
        return info.parent

    def test_canaries(self) -> None:
        repo, site, temporary = self.project(), self.package(), self.tmp / "temporary"
        temporary.mkdir()
        config = {
            "api_key": self.canary(),
            "nested": {"deep": [{"url": f"https://u:{self.canary()}@x.org/?a=1"}]},
            "free": f"text with {self.canary()} inside",
            "used_by_settings": self.plain,
            "lr": 0.1,
        }
        (repo / "train.py").write_text(
            f"import json, sys\nsys.path.append({str(site)!r})\n"
            "from run_utils import *\n"
            "config, note, message = json.loads(sys.stdin.read())\n"
            "with run_context('../results/e', 'e', config, notes=note) as run_dir:\n"
            "    log_metrics(run_dir, {'loss': 1.0, 'why': message})\n"
            "    raise RuntimeError(message)\n",
            "utf-8",
        )
        given = [config, f"note {self.canary()}", f"no access with {self.canary()}"]
        env = {"WANDB_API_KEY": self.canary(), "PLAIN": f"a {self.canary()}"}
        env.update(TMPDIR=str(temporary), DB_URL=f"pg://me:{self.canary()}@h/d")
        command = [PYTHON, "train.py", "--token", self.canary(), f"key={self.canary()}"]
        done = subprocess.run(
            command, cwd=repo, env=self.environment(env), timeout=60,
            input=json.dumps(given).encode(), capture_output=True,
        )  # fmt: skip
        self.assertEqual(done.returncode, 1, done.stderr)
        self.run_dir()
        for path in [*(self.tmp / "results").rglob("*"), *temporary.rglob("*")]:
            if not path.is_file():
                continue
            data = path.read_bytes()
            for number, canary in enumerate(self.canaries):
                self.assertNotIn(canary.encode(), data, f"{number} in {path}")
        metadata = self.json("metadata.json")
        git, problem = metadata["git"], metadata["capture"]["git.bundle"]["problem"]
        self.assertEqual(git["patch"]["file"], "git.patch")
        self.assertEqual([e["path"] for e in git["patch"]["left_out"]], [".env"])
        self.assertRegex(problem, "no bundle: .* holds a secret")
        self.assertEqual(metadata["config"]["lr"], 0.1)


class Audit(RunCase):
    """Secrets in runs, also in those of the ancestors, are found and never told."""

    def make(self, name: str, **files: str) -> Path:
        run = self.tmp / "results" / "exp" / name
        (run / "logs").mkdir(parents=True)
        (run / "status.json").write_text('{"status": "success"}', "utf-8")
        for file, text in files.items():
            path = run / file.replace("__", "/").replace("_", ".")
            path.write_text(text, "utf-8")
        return run

    def audit(self, *words: str) -> Any:
        done = self.command("audit", *words)
        self.assertEqual(done.stderr, "")
        for secret in (SECRET.decode(), "h0rse-battery"):
            self.assertNotIn(secret, done.stdout)
        return done

    def test_a_clean_tree(self) -> None:
        self.in_context("log_metrics(run_dir, {'loss': 1.0})")
        done = self.audit("results")
        self.assertRegex(done.stdout, r"^no places with a secret; \d+ files searched")
        self.assertEqual(done.returncode, 0)

    def test_where_secrets_are(self) -> None:
        secret = SECRET.decode()
        run = self.make(
            "old-20240131-142501",
            config_yaml="a:\n  hf_token: " + secret + "\n  lr: 0.1\n",
            metadata_json=json.dumps(
                {"argv": ["python", "--password", "h0rse-battery"]}
            ),
            logs__out_log="line one\nusing " + secret + "\nand h0rse-battery\n",
            rows_jsonl=json.dumps({"a": 1}) + "\n" + json.dumps({"url": secret}) + "\n",
        )
        (run / "model.bin").write_bytes(b"\0 " + SECRET)
        (self.tmp / "results" / "index").mkdir()
        row = {"run_name": "x", "note": "h0rse-battery"}
        index = self.tmp / "results" / "index" / "runs_index.jsonl"
        index.write_text(json.dumps(row) + "\n", "utf-8")
        done = self.audit("results")
        start = "exp/old-20240131-142501/"
        for line in (
            start + "config.yaml: key a.hf_token",
            start + "metadata.json: key argv",
            start + "logs/out.log: line 2",
            start + "logs/out.log: line 3",
            start + "rows.jsonl: line 2, key url",
            start + "model.bin: somewhere in a binary file",
            "index/runs_index.jsonl: line 1, key note",
        ):
            self.assertIn(line + "\n", done.stdout)
        self.assertIn("7 places with a secret", done.stdout)
        self.assertEqual(done.returncode, 1)
        facts = json.loads(self.audit("results", "--json").stdout)
        self.assertEqual(len(facts["found"]), 7)

    def test_what_is_secret_in_the_environment_is_searched(self) -> None:
        self.make("old-20240131-142501", logs__out_log="said h0rse-battery\n")
        env = {"SERVICE_PASSWORD": "h0rse-battery"}
        done = self.command("audit", "results", env=env)
        self.assertIn("logs/out.log: line 1\n", done.stdout)
        self.assertEqual(self.audit("results").returncode, 0)

    def test_bad_input_and_files_that_cannot_be_read(self) -> None:
        done = self.command("audit", "nowhere")
        self.assertEqual((done.returncode, done.stdout), (2, ""))
        self.assertRegex(done.stderr, "'nowhere' is not a folder; give one that")
        run = self.make("old-20240131-142501")
        with open(run / "huge.txt", "wb") as file:
            file.truncate(run_utils.MAX_READ + 1)
        done = self.audit("results")
        self.assertIn("huge.txt: not searched: ", done.stdout)
        self.assertEqual(done.returncode, 2)


class SecretNames(unittest.TestCase):
    """A value under a secret name is replaced; names that only sound alike are not."""

    def setUp(self) -> None:
        forget_secrets()
        self.addCleanup(forget_secrets)

    def test_names_of_secrets(self) -> None:
        for name in [
            "ACME_API_KEY",
            "acmeApiKey",
            "password",
            "DB_PASSWORD",
            "PGPASSWORD",
            "SMTP_PASS",
            "MYSQL_PWD",
            "hf_token",
            "GITHUB_TOKEN",
            "accessToken",
            "client_secret",
            "AWS_SECRET_ACCESS_KEY",
            "MY_CREDENTIALS",
            "signing_key",
            "X_AUTH_TOKEN",
            "HTTP_COOKIE",
            "FERNET_KEY",
            "GH_PAT",
            "passphrase",
            "ACME_KEY",
            "POETRY_PYPI_TOKEN_CORP",
            "service.api-key.prod",
        ]:
            with self.subTest(name):
                found = run_utils._redact({name: RANDOM})
                self.assertEqual(found, {name: run_utils.REDACTED})

    def test_short_and_wordy_passwords(self) -> None:
        for value in ("hunter2", "letmein", "correct horse battery", "pa/ss"):
            found = run_utils._redact({"db": {"password": value}})
            self.assertEqual(found, {"db": {"password": run_utils.REDACTED}})

    def test_names_that_sound_alike(self) -> None:
        harmless = {
            "tokenizer": "Qwen/Qwen3-8B",
            "max_new_tokens": "512",
            "TOKENIZERS_PARALLELISM": "false",
            "pad_token": "<|endoftext|>",
            "eos_token": "endoftext2",
            "keyboard": "us-intl105",
            "num_key_value_heads": 8,
            "author": "Jane Doe 2nd",
            "primary_key": "id",
            "sort_key": "created_at",
            "token_type": "bpe-v2",
            "PASS_RATE": "0.98",
            "forward_pass": "full",
            "passage": "page 12 of 13",
            "secret": None,
            "api_key": "",
            "hub_token": "None",
            "password": "${DB_PASSWORD}",
            "AWS_SHARED_CREDENTIALS_FILE": "/home/ann/.aws/credentials",
            "ssh_public_key": "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAI ann@host",
            "PWD": "/home/ann/src",
            "secret_token_count": 3,
            "use_auth_token": True,
            "commit": "9f2c1e4b7a6d5c3f8e0b1a2c4d6e8f0a1b3c5d7e",
            "sha256": "8e35c2cd" * 8,
            "run": "train-20260131-142501-1a2b3c4",
            "model": "unsloth/Qwen2.5-Coder-32B-Instruct-bnb-4bit",
            "image": "nvcr.io/nvidia/pytorch:24.05-py3@sha256:" + "0a1b" * 16,
            "uuid": "203db13e-70c7-462b-9a3d-bf32640cb0be",
        }
        self.assertEqual(run_utils._redact(harmless), harmless)

    def test_the_callers_object_is_not_touched(self) -> None:
        config = {"a": {"password": RANDOM}, "b": [RANDOM]}
        run_utils._redact(config)
        self.assertEqual(config, {"a": {"password": RANDOM}, "b": [RANDOM]})


class SecretShapes(unittest.TestCase):
    """Tokens are told by their shape, wherever they stand in a text."""

    def setUp(self) -> None:
        forget_secrets()
        self.addCleanup(forget_secrets)

    def test_tokens_of_known_and_unknown_providers(self) -> None:
        for token in (
            "ghp_" + "A1b2" * 9,
            "sk-" + "a1B2" * 12,
            "hf_" + "aBcD" * 8 + "ef",
            "AKIA" + "A1B2" * 4,
            "AIza" + "A1b2-" * 7,
            "xoxb-" + "123456789012-" * 2 + "a1B2c3D4e5",
            "glpat-" + "a1B2" * 5,
            "npm_" + "a1b2" * 9,
            "eyJ" + "a1B2" * 5 + ".eyJ" + "c3D4" * 5 + "." + "e5F6" * 8,
            "dapi" + "0a1b2c3d" * 4,
            "SG." + "a1B2" * 5 + "." + "c3D4" * 10,
            "acme_live_" + RANDOM,
            "wonder-pat-" + RANDOM,
            "xapp-1-" + "A1B2-" * 8 + "c3D4",
            "glrt-" + "a1B2" * 5,
            "a1B2c3D4e5F6g7.atlas" + "v1." + "H8i9" * 15,
            "csk-" + "ymDswpBcrQbvZjp" * 2 + "Tifmr1Yi",  # as long as few words are
            "-----BEGIN RSA PRIVATE KEY-----\nMIIE\n-----END RSA PRIVATE KEY-----",
        ):
            with self.subTest(token[:8]):
                found = run_utils._redact_text(f"failed with {token} (401), retry 1")
                self.assertEqual(found, "failed with <REDACTED> (401), retry 1")

    def test_urls(self) -> None:
        for before, after in {
            "https://ann:" + RANDOM + "@x.org/a?b=1": "https://<REDACTED>@x.org/a?b=1",
            "postgres://u:p4ss@db:5432/x": "postgres://<REDACTED>@db:5432/x",
            "git+ssh://git@github.com/a/b.git": "git+ssh://git@github.com/a/b.git",
            "https://x.org/a?token="
            + RANDOM
            + "&n=1": "https://x.org/a?token=<REDACTED>&n=1",
            "https://s3/x?X-Amz-Signature="
            + "0a" * 32: "https://s3/x?X-Amz-Signature=<REDACTED>",
            "https://hooks.slack.com/services/T01A/B01A/" + RANDOM: (
                "https://hooks.slack.com/services/<REDACTED>"
            ),
        }.items():
            forget_secrets()
            self.assertEqual(run_utils._redact_text(before), after)

    def test_headers_assignments_and_json_in_text(self) -> None:
        for text in (
            f"Authorization: Bearer {RANDOM}",
            f"export ACME_API_KEY={RANDOM}",
            f'{{"name": "x", "api_key": "{RANDOM}"}}',
            f"api_key: '{RANDOM}'",
            f"machine x.org login me password {RANDOM}",
        ):
            found = run_utils._redact_text(text)
            self.assertEqual(found, text.replace(RANDOM, run_utils.REDACTED))

    def test_prose_stays(self) -> None:
        for text in (
            "The password is the name of a game; guess the secret token.",
            "Set --api-key or HF_TOKEN to authenticate",
            r"(?i)api[_-]?key\s*[:=]\s*(\w+)",
            "granularity=fine,compact,1,0",
            "gpt-4o-mini-2024-07-18, checkpoint-1000, sm80_xmma_gemm_f16f16_f16f32",
        ):
            self.assertEqual(run_utils._redact_text(text), text)

    def test_code_stays(self) -> None:
        for text in (
            "SERVICE_TOKEN = 0x00000002",
            "def get(self, key: PositionalIndexer2D) -> Self:",
            "step = warp.LdMatrix8x8x16bOpOfThem(self.layout)",
            "key = c10::computeDispatchKey2(dtype)",
            "norm = CrossAttnDownBlock2DWithSkipConnection3",
        ):
            self.assertEqual(run_utils._redact_text(text), text)

    def test_long_and_hostile_texts_come_back(self) -> None:
        for piece in ("a", "://", "eyJ", "=", "-----BEGIN ", "key=", "a-", "a@", '"'):
            text = piece * (1_000_000 // len(piece))
            self.assertLess(len(run_utils._redact_text(text)), 50_000)
        hidden = "x " * 500_000 + "ghp_" + "A1b2" * 9
        self.assertFalse("A1b2" in run_utils._redact_text(hidden))
        half = "x" * 16_000 + " ghp_" + "A1b2" * 400_000
        self.assertFalse("A1b2" in run_utils._redact_text(half))


class CommandLines(unittest.TestCase):
    """One value after a secret flag is replaced, and argv and command agree."""

    def setUp(self) -> None:
        forget_secrets()
        self.addCleanup(forget_secrets)

    def test_flags_and_assignments(self) -> None:
        argv = [
            "train.py",
            "--lr",
            "0.1",
            "--api-key",
            RANDOM,
            "--token=" + RANDOM[::-1],
        ]
        argv += [
            "model.api_key=" + RANDOM * 2,
            "+x.max_tokens=4096",
            "--password",
            "x y z",
        ]
        argv += [
            "--ask-password",
            "--seed",
            "3",
            "-H",
            f"Authorization: Bearer {RANDOM}",
        ]
        marker = run_utils.REDACTED
        expected = ["train.py", "--lr", "0.1", "--api-key", marker, "--token=" + marker]
        expected += [
            "model.api_key=" + marker,
            "+x.max_tokens=4096",
            "--password",
            marker,
        ]
        expected += [
            "--ask-password",
            "--seed",
            "3",
            "-H",
            f"Authorization: Bearer {marker}",
        ]
        self.assertEqual(run_utils._redact_argv(argv), expected)
        command = run_utils._redact({"command": shlex.join(argv)})["command"]
        self.assertEqual(shlex.split(command), expected)

    def test_an_argv_that_is_none(self) -> None:
        given: Any = {"argv": [1, 2.5, None, ["--lr", "1"], {"password": RANDOM}]}
        marked = {"password": "<REDACTED>"}
        expected = {"argv": [1, 2.5, None, ["--lr", "1"], marked]}
        self.assertEqual(run_utils._redact(given), expected)


class Canaries(RunCase):
    """A secret is in no file of a run, wherever it came from."""

    def test_propagation_into_every_file(self) -> None:
        secret, other = "Zq9" + RANDOM, "Yw8" + RANDOM[::-1]
        body = """
        import argparse
        secret = os.environ["ACME_API_KEY"]
        args = {"db": {"password": sys.argv[1]}, "note": f"uses {secret}"}
        with run_context("results/exp", "exp", args, notes=f"try {secret}") as run_dir:
            mark_status(run_dir, "partial", extra={"hint": secret})
            log_metrics(run_dir, {"text": f"{secret} and {sys.argv[1]}"})
            raise ValueError(f"bad key {secret}, password {sys.argv[1]}")
        """
        env = {"ACME_API_KEY": secret, "HINT": f"the key is {secret}, or {other}"}
        done = self.script(body, other, env=env)
        self.assertIn(secret, done.stderr)
        self.assertEqual(self.json("status.json")["status"], "failed")
        files = [path for path in (self.tmp / "results").rglob("*") if path.is_file()]
        self.assertGreater(len(files), 5)
        for path in files:
            data = path.read_bytes()
            self.assertNotIn(secret.encode(), data, path)
            self.assertNotIn(other.encode(), data, path)


class Colour(enum.Enum):
    RED = "red"
    BLUE = 2


class Level(enum.IntEnum):
    HIGH = 3


class Access(enum.Flag):
    READ = 1
    WRITE = 2


class Text(str):
    pass


@dataclass
class Optimiser:
    lr: float = 1e-4
    betas: tuple = (0.9, 0.999)
    extra: dict = field(default_factory=dict)
    shape: tuple = (2, 3)
    dtype: str = "bf16"
    known: ClassVar[int] = 7


class Point(NamedTuple):
    x: int
    y: int


class Bare:
    def __init__(self, **values: object) -> None:
        self.__dict__.update(values)


class Hostile:
    def __repr__(self) -> str:
        raise RuntimeError("no")

    def __getattr__(self, name: str) -> object:
        raise RuntimeError("no")

    __len__ = __iter__ = __hash__ = __eq__ = __str__ = __bool__ = __repr__  # type: ignore


class Endless(list):
    def __iter__(self):  # type: ignore[no-untyped-def]
        while True:
            yield 1


class ArgumentsAndCommandTest(unittest.TestCase):
    """config.yaml is the command followed by the arguments; nothing is lost."""

    def test_mapping_keeps_its_order_below_the_command(self) -> None:
        found = run_utils._config_document("c", {"z": 1, "a": 2})
        self.assertEqual(list(found.items()), [("command", "c"), ("z", 1), ("a", 2)])

    def test_namespace_dataclass_and_plain_object_count_as_mappings(self) -> None:
        for args in (argparse.Namespace(lr=1), Bare(lr=1), types.SimpleNamespace(lr=1)):
            found = run_utils._config_document("c", args)
            self.assertEqual(found, {"command": "c", "lr": 1})
        self.assertEqual(run_utils._config_document("c", Optimiser())["lr"], 1e-4)

    def test_no_arguments_leave_the_command_alone(self) -> None:
        nothing: list[Any] = [None, {}, argparse.Namespace()]
        for args in nothing:
            self.assertEqual(run_utils._config_document("c", args), {"command": "c"})

    def test_other_command_key_moves_the_arguments_down(self) -> None:
        args = {"command": "train", "args": [1], "lr": 2}
        found = run_utils._config_document("c", args)
        self.assertEqual(found, {"command": "c", "args": args})

    def test_same_command_key_is_written_once(self) -> None:
        found = run_utils._config_document("c", {"lr": 1, "command": "c"})
        self.assertEqual(found, {"command": "c", "lr": 1})

    def test_list_or_text_goes_under_args(self) -> None:
        for args in ([1, 2], "--lr 1", 0, False):
            found = run_utils._config_document("c", args)
            self.assertEqual(found, {"command": "c", "args": args})


class PlainDataTest(unittest.TestCase):
    """Every object has one documented form made of JSON's types alone."""

    TABLE = (
        (Colour.RED, "red"),
        (Colour.BLUE, "BLUE"),
        (Level.HIGH, 3),
        (Access.READ, "READ"),
        (Text("a"), "a"),
        (True, True),
        (Point(1, 2), {"x": 1, "y": 2}),
        ((1, (2,)), [1, [2]]),
        ({3, 20, 100}, [3, 20, 100]),
        (frozenset("cab"), ["a", "b", "c"]),
        ({"b", 1, None}, [1, None, "b"]),
        (range(3), [0, 1, 2]),
        (range(10**12), "range(0, 1000000000000)"),
        (collections.deque([1]), [1]),
        (collections.OrderedDict(b=1, a=2), {"b": 1, "a": 2}),
        (collections.defaultdict(int, a=1), {"a": 1}),
        (types.MappingProxyType({"a": 1}), {"a": 1}),
        ({"a": 1}.keys(), ["a"]),
        (pathlib.PurePosixPath("/a/b"), "/a/b"),
        (datetime.date(2024, 1, 2), "2024-01-02"),
        (datetime.datetime(2024, 1, 2, 3, 4, 5), "2024-01-02T03:04:05"),
        (datetime.time(3, 4), "03:04:00"),
        (datetime.timedelta(hours=1), "PT3600.000000S"),
        (decimal.Decimal("1.10"), "1.10"),
        (fractions.Fraction(1, 3), "1/3"),
        (uuid.UUID(int=1), "00000000-0000-0000-0000-000000000001"),
        (1 + 2j, "(1+2j)"),
        (b"a\xff", "b'a\\xff'"),
        (bytearray(b"a"), "b'a'"),
        (memoryview(b"a"), "b'a'"),
        (b"a" * 600, f"b'{'a' * 500}'... <600 bytes>"),
        (json.dumps, "json.dumps"),
        (float, "float"),
        (json, "json"),
        (Bare, f"{__name__}.Bare"),
        (Bare(a={"b": 1}), {"a": {"b": 1}}),
        (Bare(), f"<{__name__}.Bare object>"),
        (2**1000, 2**1000),
        (10**5000, f"<int of 16610 bits, {hex(10**5000)[:40]}...>"),
        ("\udcff\xe9", "\\udcff\xe9"),
    )

    def test_table_of_types(self) -> None:
        for value, wanted in self.TABLE:
            found = run_utils._plain(value)
            self.assertEqual((found, type(found)), (wanted, type(wanted)), repr(wanted))

    def test_dataclass_is_its_fields_without_class_variables(self) -> None:
        wanted = ["lr", "betas", "extra", "shape", "dtype"]
        self.assertEqual(list(run_utils._plain(Optimiser())), wanted)

    def test_numbers_that_json_lacks_stay_floats(self) -> None:
        self.assertTrue(math.isnan(run_utils._plain(math.nan)))
        self.assertEqual(run_utils._plain(-math.inf), -math.inf)

    def test_key_that_is_no_string_is_written_as_json_and_none_is_lost(self) -> None:
        found = run_utils._plain({1: "a", "1": "b", None: 3, (1, "x"): 4, "1 (2)": 5})
        wanted = {"1": "a", "1 (2)": "b", "null": 3, '[1, "x"]': 4, "1 (2) (5)": 5}
        self.assertEqual(found, wanted)

    def test_result_of_json_types_alone_is_unchanged(self) -> None:
        value = {"a": [1, 2.5, None, True, "x"], "b": {"c": {}}, "d": []}
        self.assertEqual(run_utils._plain(value), value)
        self.assertEqual(list(run_utils._plain(value)), list(value))


class HostileObjectTest(unittest.TestCase):
    """Conversion ends, stays small, raises nothing and changes nothing."""

    def test_object_that_raises_at_every_touch_is_named(self) -> None:
        wanted = f"<{__name__}.Hostile, repr raises RuntimeError>"
        self.assertEqual(run_utils._plain({"a": Hostile()}), {"a": wanted})

    def test_generator_is_not_consumed(self) -> None:
        numbers = (n for n in range(3))
        run_utils._plain([numbers])
        self.assertEqual(list(numbers), [0, 1, 2])

    def test_endless_list_stops_at_its_length(self) -> None:
        self.assertEqual(run_utils._plain(Endless([5, 6])), [1, 1])

    def test_address_is_left_out_of_a_repr(self) -> None:
        self.assertNotIn("0x", run_utils._plain([object(), lambda: 0, iter([])][0]))

    def test_cycle_is_marked_and_a_shared_list_is_not(self) -> None:
        shared: list = [1]
        value: dict = {"a": shared, "b": shared}
        value["c"] = value
        wanted = {"a": [1], "b": [1], "c": "<cycle>"}
        self.assertEqual(run_utils._plain(value), wanted)

    def test_deep_nesting_ends_in_a_marker(self) -> None:
        value: list = []
        for _ in range(5000):
            value = [value]
        text = json.dumps(run_utils._plain(value))
        self.assertEqual(text.count("["), run_utils.MAX_DEPTH)
        self.assertIn("<list nested too deeply>", text)

    def test_long_list_ends_in_a_count(self) -> None:
        found = run_utils._plain(list(range(10_003)))
        self.assertEqual(found[9_999:], [9_999, "<3 more items>"])
        found = run_utils._plain(dict.fromkeys(range(10_003), 0))
        self.assertEqual(list(found.items())[10_000:], [("<more>", "<3 more keys>")])

    def test_shared_lists_cannot_grow_without_bound(self) -> None:
        value: list = ["x"]
        for _ in range(40):
            value = [value, value]
        self.assertLess(len(json.dumps(run_utils._plain(value))), 20_000_000)

    def test_one_long_text_in_many_places_is_bounded(self) -> None:
        found = run_utils._plain(["x" * 100_000] * 9_000)
        self.assertLess(len(found), 110)
        self.assertRegex(found[-1], "^<[0-9]+ more items>$")

    def test_large_set_is_cut_in_bounded_time(self) -> None:
        found = run_utils._plain(set(range(20_000)))
        self.assertEqual((len(found), found[-1]), (10_001, "<10000 more items>"))

    def test_whole_lifts_the_limits(self) -> None:
        rows = [list(range(20_000))] * 10
        self.assertEqual(run_utils._plain(rows, whole=True), rows)

    def test_long_text_is_cut_with_a_count(self) -> None:
        found = run_utils._plain("x" * 100_007)
        self.assertEqual(found[99_998:], "xx... <7 more characters>")

    def test_unreadable_item_leaves_the_others(self) -> None:
        class Settings(collections.UserDict):
            def __getitem__(self, key: str) -> object:
                return 1 // self.data[key]

        found = run_utils._plain(Settings(a=1, b=0))
        self.assertEqual(found["a"], 1)
        self.assertTrue(found["b"].startswith("<unreadable: ZeroDivisionError("))

    def test_mock_objects_are_harmless(self) -> None:
        for value in (mock.MagicMock(), mock.Mock(spec=dict), mock.Mock(spec=str)):
            self.assertIsInstance(run_utils._plain(value), (str, dict))

    def test_caller_s_object_is_not_changed(self) -> None:
        value = collections.defaultdict(list, {"a": {3, 1}, "b": (1, 2)})
        before = repr(value)
        run_utils._plain(value)
        self.assertEqual(repr(value), before)

    def test_deep_call_stack_does_not_raise(self) -> None:
        def deeper(left: int) -> object:
            return run_utils._plain([[[Hostile()]]]) if left == 0 else deeper(left - 1)

        frame, depth = sys._getframe(), 0
        while frame:
            frame, depth = frame.f_back, depth + 1  # type: ignore[assignment]
        for spare in range(8, 40):
            self.assertIsNotNone(deeper(sys.getrecursionlimit() - depth - spare))


# Each document with the bytes that both writers must give.
YAML_TABLE: Any = (
    ({}, "{}\n"),
    ([], "[]\n"),
    ("x", "x\n"),
    (None, "null\n"),
    ("", '""\n'),
    ({"a": {"b": []}, "c": [{}]}, "a:\n  b: []\nc: [{}]\n"),
    (
        {"a": [{"b": 1, "c": [[1], {"d": 2}]}]},
        "a:\n  - b: 1\n    c:\n      - [1]\n      - d: 2\n",
    ),
    ([[["x" * 81]], {"k" * 81: {"a": {"b": 1}}}], None),
    ({"lr": 1e-4, "eps": 1e-08, "big": 1e16, "zero": -0.0}, None),
    (
        [math.inf, -math.inf, math.nan, 1e-5, 5e-324],
        "[.inf, -.inf, .nan, 1.0e-05, 5.0e-324]\n",
    ),
    (
        ["no", "y", "1e3", "08", "0o17", "12:30:45"],
        '["no", "y", "1e3", "08", "0o17", "12:30:45"]\n',
    ),
    (
        ["=", "<<", "~", "null", "1_000", ".5"],
        '["=", "<<", "~", "null", "1_000", ".5"]\n',
    ),
    (
        ["a: b", "a #b", " a", "a ", "-a", "a,b"],
        '["a: b", "a #b", " a", "a ", "-a", "a,b"]\n',
    ),
    (["Qwen/Qwen3-8B", "../x", "~/y", "a b"], "[Qwen/Qwen3-8B, ../x, ~/y, a b]\n"),
    ("two\nlines\t\"'\\", '"two\\nlines\\t\\"\'\\\\"\n'),
    ("\xe9 \u4e2d\u6587 \U0001f600", '"\xe9 \u4e2d\u6587 \U0001f600"\n'),
    (
        "\x00\x1b\x7f\x85\xa0\u2028\u202e\ufeff\U0001ffff",
        '"\\u0000\\u001b\\x7f\\x85\\xa0\\u2028\\u202e\\ufeff\\U0001ffff"\n',
    ),
    ({"\n": 1, "": 2, "true": 3}, '"\\n": 1\n"": 2\n"true": 3\n'),
    ({"shared": [["a" * 99], ["a" * 99]]}, None),
)


class YamlTest(unittest.TestCase):
    """The text is the same with and without PyYAML, and both YAMLs read it alike."""

    def test_table_of_documents(self) -> None:
        for value, wanted in YAML_TABLE:
            with mock.patch.dict(sys.modules, {"yaml": None}):
                found = run_utils._format_yaml(value)
            if wanted is not None:
                self.assertEqual(found, wanted)

    def test_pyyaml_gives_the_same_bytes_and_the_same_value(self) -> None:
        try:
            import yaml
        except ImportError:
            self.skipTest("PyYAML is not installed")
        for value, _ in YAML_TABLE:
            with mock.patch.dict(sys.modules, {"yaml": None}):
                plain = run_utils._format_yaml(value)
            tree = run_utils._yaml_tree(value)
            self.assertEqual(run_utils._yaml_by_pyyaml(tree), plain)
            self.assertEqual(repr(yaml.safe_load(plain)), repr(value))

    def test_user_s_own_pyyaml_representers_change_nothing(self) -> None:
        try:
            import yaml
        except ImportError:
            self.skipTest("PyYAML is not installed")

        def block(dumper: yaml.SafeDumper, text: str) -> object:
            return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|")

        before = dict(yaml.SafeDumper.yaml_representers)
        with mock.patch.object(yaml.SafeDumper, "yaml_representers", before):
            yaml.SafeDumper.add_representer(str, block)
            with mock.patch.object(yaml.SafeDumper, "ignore_aliases", lambda *_: False):
                found = run_utils._yaml_by_pyyaml({"a": ["x\\n", {"b": "1"}], "c": "1"})
        self.assertEqual(found, "a:\n  - x\\n\n  - b: 1\nc: 1\n")

    def test_long_key_becomes_a_complex_key(self) -> None:
        found = run_utils._format_yaml({"k" * 81: [1], "j" * 81: {"a": 1}})
        self.assertEqual(found, f"? {'k' * 81}\n: [1]\n? {'j' * 81}\n: a: 1\n")

    def test_list_that_is_too_wide_stands_one_item_a_line(self) -> None:
        found = run_utils._format_yaml({"a": ["x" * 40, "y" * 40]})
        self.assertEqual(found, f"a:\n  - {'x' * 40}\n  - {'y' * 40}\n")

    def test_float_is_a_float_to_yaml_1_1(self) -> None:
        found = run_utils._format_yaml([1e16, 1e-4, 1e-5, -2e300, 1.5e-7])
        self.assertEqual(found, "[1.0e+16, 0.0001, 1.0e-05, -2.0e+300, 1.5e-07]\n")

    def test_lone_surrogate_never_stops_the_encoding(self) -> None:
        found = run_utils._format_yaml(["\udcff", run_utils._plain("\udcff")])
        self.assertEqual(found.encode("utf-8"), b'["\\udcff", "\\\\udcff"]\n')


class BrokenYamlModuleTest(unittest.TestCase):
    """Whatever `import yaml` does, the same text is written."""

    def run_script(self, files: dict, name: str, *flags: str) -> str:
        with tempfile.TemporaryDirectory() as folder:
            for path, text in files.items():
                target = pathlib.Path(folder, path)
                target.parent.mkdir(exist_ok=True)
                target.write_text(text, encoding="utf-8")
            home = os.path.dirname(os.path.abspath(run_utils.__file__))
            argv = [sys.executable, *flags, str(pathlib.Path(folder, name)), home]
            result = subprocess.run(
                argv, capture_output=True, encoding="utf-8", timeout=60
            )
        self.assertEqual(result.stderr, "")
        return result.stdout

    SCRIPT = (
        "import sys\nsys.path.append(sys.argv[1])\nimport run_utils\nprint('once')\n"
        "print(run_utils._format_yaml({'a': [{'b': 1e16}], 'c': 'no'}), end='')\n"
    )
    WANTED = 'once\na:\n  - b: 1.0e+16\nc: "no"\n'

    def test_script_named_yaml_does_not_run_twice(self) -> None:
        found = self.run_script({"yaml.py": self.SCRIPT}, "yaml.py")
        self.assertEqual(found, self.WANTED)

    def test_package_named_yaml_may_do_anything(self) -> None:
        for body in ("raise SystemExit(3)", "1 / 0", "SafeDumper = 5", "syntax error"):
            files = {"yaml/__init__.py": body, "s.py": self.SCRIPT}
            self.assertEqual(self.run_script(files, "s.py"), self.WANTED, body)

    def test_optimised_and_isolated_interpreters_write_the_same(self) -> None:
        for flags in (("-O",), ("-OO",), ("-I",), ("-S",), ("-E", "-S", "-B")):
            found = self.run_script({"s.py": self.SCRIPT}, "s.py", *flags)
            self.assertEqual(found, self.WANTED, flags)


class JsonTest(unittest.TestCase):
    """JSON is strict, ASCII, ends in a newline, and nothing makes it fail."""

    def test_numbers_that_json_lacks_become_strings(self) -> None:
        found = run_utils._format_json([math.nan, math.inf, {"a": -math.inf}], None)
        self.assertEqual(found, '["NaN", "Infinity", {"a": "-Infinity"}]\n')

    def test_lone_surrogate_becomes_visible_text_and_a_pair_stays(self) -> None:
        found = run_utils._format_json(["\udcff", "\U0001f600"], None)
        self.assertEqual(found, '["\\\\udcff", "\\ud83d\\ude00"]\n')

    def test_huge_int_is_summarised(self) -> None:
        found = run_utils._format_json({"a": 10**5000}, None)
        self.assertTrue(found.startswith('{"a": "<int of 16610 bits, 0x31e2'))

    def test_data_that_is_not_plain_is_converted(self) -> None:
        loop: list = [{1}]
        loop.append(loop)
        self.assertEqual(run_utils._format_json(loop, None), '[[1], "<cycle>"]\n')

    def test_indent_is_for_files_and_none_for_lines(self) -> None:
        self.assertEqual(
            run_utils._format_json({"a": [1]}), '{\n  "a": [\n    1\n  ]\n}\n'
        )
        self.assertEqual(run_utils._format_json({"a": [1]}, None), '{"a": [1]}\n')


WRITERS = """
import ctypes, subprocess
print("python")
os.write(1, b"os.write\\n")
subprocess.run(["echo", "child"])
ctypes.CDLL(None).puts(b"puts")
"""


@unittest.skipIf(os.name != "posix", "descriptors are captured on POSIX")
class CapturedDescriptors(RunCase):
    """Not a terminal: all output is in the logs and goes where it went before."""

    def test_every_kind_of_writer(self) -> None:
        done = self.in_context(WRITERS + "print('error', file=sys.stderr)")
        self.assertEqual((done.returncode, done.stderr), (0, "error\n"))
        lines = {"python", "os.write", "child", "puts"}
        self.assertEqual(set(done.stdout.split()), lines)
        self.assertEqual(set(self.log("stdout").split()), lines)
        self.assertEqual(self.log("stderr"), "error\n")

    def test_one_log_when_both_go_to_one_place(self) -> None:
        body = """
        for number in range(50):
            os.write(1 + number % 2, b"%d\\n" % number)
        """
        done = self.in_context(body, stderr=subprocess.STDOUT)
        self.assertEqual(done.stdout.split(), [str(n) for n in range(50)])
        self.assertEqual(self.log("output"), done.stdout)

    def test_output_before_and_after_the_block_is_not_in_the_log(self) -> None:
        body = """
        print("before")
        with run_context("results/exp"):
            print("inside")
        print("after")
        """
        done = self.script(body)
        self.assertEqual(done.stdout.split(), ["before", "inside", "after"])
        self.assertEqual(self.log("stdout"), "inside\n")

    def test_order_with_whoever_holds_the_stream_from_before(self) -> None:
        body = """
        held = sys.stdout
        with run_context("results/exp"):
            print("1"); held.write("2\\n"); print("3")
            print(sys.stdout is held)
        """
        self.assertEqual(self.script(body).stdout.split(), ["1", "2", "3", "True"])

    def test_streams_are_restored_exactly(self) -> None:
        body = """
        def state():
            return [os.fstat(n)[:3] for n in (1, 2)], id(sys.stdout), id(sys.stderr)
        def descriptors(): return sorted(os.listdir("/proc/self/fd")) if LINUX else 0
        before = state(), descriptors()
        for ending in ("pass", "1 / 0", "sys.exit(2)"):
            with __import__("contextlib").suppress(BaseException):
                with run_context("results/exp"), run_context("results/exp"):
                    exec(ending)
        print((state(), descriptors()) == before)
        """
        done = self.script(f"LINUX = {LINUX}\n" + textwrap.dedent(body))
        self.assertEqual(done.stdout, "True\n", done.stderr)

    def test_binary_output_progress_bars_and_100_megabytes(self) -> None:
        body = """
        sys.stdout.buffer.write(bytes(range(256)))
        sys.stdout.flush()
        print("50%", end="\\r"); print("100%", end="\\r", flush=True)
        for _ in range(100): os.write(1, bytes(1_000_000))
        """
        with open(self.tmp / "out", "wb") as out:
            done = self.in_context(body, stdout=out)
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        expected = bytes(range(256)) + b"50%\r100%\r" + bytes(100_000_000)
        self.assertTrue((self.tmp / "out").read_bytes() == expected)
        log = self.run_dir() / "logs" / "stdout.log"
        self.assertTrue(log.read_bytes() == expected)

    def test_a_reader_that_goes_away(self) -> None:
        body = """
        for n in range(20000): print(n, flush=n < 2)
        """
        path = self.write_script(
            'with run_context("results/exp"):\n'
            + textwrap.indent(textwrap.dedent(body), "    ")
        )
        command = f"{shlex.quote(PYTHON)} {shlex.quote(str(path))} | head -1"
        done = subprocess.run(
            ["sh", "-c", command],
            env=self.environment(),
            capture_output=True,
        )
        self.assertEqual((done.stdout, done.stderr), (b"0\n", b""))
        self.assertEqual(self.wait_for_status("success")["exit_code"], 0)
        self.assertEqual(len(self.log("stdout").split()), 20000)

    def test_a_slow_reader_does_not_slow_the_body(self) -> None:
        body = """
        with run_context("results/exp", "exp"):
            os.write(1, b"x" * 2_000_000)
            open("body-is-done", "w").close()
        """
        child = subprocess.Popen(
            [PYTHON, str(self.write_script(body))],
            env=self.environment(),
            stdout=subprocess.PIPE,
        )
        assert child.stdout is not None
        for _ in range(1000):
            if (self.tmp / "body-is-done").exists():
                break
            time.sleep(0.01)
        self.assertTrue((self.tmp / "body-is-done").exists())
        self.assertIsNone(child.poll())
        self.assertEqual(len(child.stdout.read()), 2_000_000)
        child.stdout.close()
        self.assertEqual(child.wait(), 0)

    def test_a_write_that_holds_the_GIL_does_not_hang(self) -> None:
        body = """
        import ctypes
        data = bytes(1 << 20)
        print(ctypes.PyDLL(None).write(1, data, len(data)), file=sys.stderr)
        """
        done = self.in_context(body)
        self.assertEqual((done.stderr, len(done.stdout)), ("1048576\n", 1 << 20))

    def test_a_child_that_outlives_the_run_does_not_hold_it(self) -> None:
        body = """
        import subprocess
        subprocess.Popen(["sh", "-c", "sleep 30; echo late"])
        """
        started = time.monotonic()
        self.assertEqual(self.in_context(body).returncode, 0)
        self.assertLess(time.monotonic() - started, 25)

    def test_closed_and_absent_streams(self) -> None:
        for redirect in (">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"):
            with self.subTest(redirect):
                shutil.rmtree(self.tmp / "results", ignore_errors=True)
                path = self.write_script('with run_context("results/exp"): print("x")')
                command = f"{shlex.quote(PYTHON)} {shlex.quote(str(path))} {redirect}"
                done = subprocess.run(["sh", "-c", command], env=self.environment())
                self.assertEqual(done.returncode, 0)
                self.assertEqual(self.json("status.json")["status"], "success")

    def test_redirect_stdout_inside_the_block(self) -> None:
        body = """
        import contextlib, io
        with contextlib.redirect_stdout(io.StringIO()) as text:
            print("elsewhere")
        print("here")
        """
        self.assertEqual(self.in_context(body).stdout, "here\n")
        self.assertEqual(self.log("stdout"), "here\n")

    def test_capture_output_false_leaves_streams_alone(self) -> None:
        body = """
        before = os.fstat(1)
        with run_context("results/exp", capture_output=False):
            print(os.fstat(1) == before)
        """
        self.assertEqual(self.script(body).stdout, "True\n")
        self.assertEqual(os.listdir(self.run_dir() / "logs"), [])

    def test_not_a_byte_is_lost_at_SIGKILL(self) -> None:
        body = """
        os.write(1, b"x" * 3_000_000)
        os.kill(os.getpid(), 9)
        """
        done = self.in_context(body)
        self.assertEqual((done.returncode, len(done.stdout)), (-9, 3_000_000))
        self.assertEqual(len(self.log("stdout")), 3_000_000)

    def test_faulthandler_is_in_the_log(self) -> None:
        body = "import faulthandler; faulthandler.enable(); faulthandler._sigsegv()"
        done = self.in_context(body)
        self.assertEqual(done.returncode, -signal.SIGSEGV)
        self.assertIn("Segmentation fault", self.log("stderr"))
        self.assertIn("Segmentation fault", done.stderr)
        status = self.wait_for_status("failed")
        self.assertIn("Segmentation fault", "".join(status["last_output"]))

    def test_a_log_that_cannot_be_written_costs_nothing_but_the_log(self) -> None:
        body = """
        print("first", flush=True)
        import resource
        resource.setrlimit(resource.RLIMIT_FSIZE, (6, resource.RLIM_INFINITY))
        import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        print("second")
        """
        done = self.in_context(body)
        self.assertEqual((done.returncode, done.stdout), (0, "first\nsecond\n"))
        self.assertIn("stdout is no longer logged", done.stderr)


@unittest.skipIf(os.name != "posix", "pseudo-terminals are POSIX")
class OnATerminal(RunCase):
    """A terminal stays one: a tee copies what Python writes to the log."""

    def on_terminal(self, command: list[str]) -> str:
        import pty

        pid, master = pty.fork()
        if pid == 0:
            os.execve(command[0], command, self.environment())
        shown = b""
        with contextlib.suppress(OSError):
            while True:
                data = os.read(master, 65536)
                if not data:
                    break
                shown += data
        os.close(master)
        self.wait_status = os.waitpid(pid, 0)[1]
        return shown.decode().replace("\r\n", "\n")

    def test_isatty_stays_true_and_the_log_has_the_text(self) -> None:
        body = """
        with run_context("results/exp"):
            print(sys.stdout.isatty(), sys.stderr.isatty(), sys.stdout.fileno())
            print("\\x1b[31mred\\x1b[0m", file=sys.stderr)
            sys.stdout.buffer.write(b"bytes\\n")
        print(type(sys.stdout).__name__)
        """
        path = self.write_script(body)
        shown = self.on_terminal([PYTHON, str(path)])
        text = "True True 1\n\x1b[31mred\x1b[0m\n"
        self.assertEqual(self.log("output"), text + "bytes\n")
        self.assertEqual(
            set(shown.split()), set((text + "bytes TextIOWrapper").split())
        )

    def test_run_gives_the_command_a_terminal(self) -> None:
        path = self.write_script(
            "print(os.isatty(0), os.isatty(1), os.isatty(2)); sys.exit(4)"
        )
        command = [PYTHON, str(SOURCE), "run", "--base-dir", "results/exp", "--"]
        shown = self.on_terminal([*command, PYTHON, str(path)])
        self.assertIn("True True True\n", shown)
        self.assertEqual(os.WEXITSTATUS(self.wait_status), 4)
        self.assertEqual(self.log("output").replace("\r\n", "\n"), "True True True\n")

    def test_run_forwards_a_signal_to_a_command_that_said_nothing(self) -> None:
        import pty

        path = self.write_script("open('ready', 'w').close(); time.sleep(60)")
        command = [PYTHON, str(SOURCE), "run", "--base-dir", "results/exp", "--"]
        pid, master = pty.fork()
        if pid == 0:
            os.chdir(self.tmp)
            os.execve(PYTHON, [*command, PYTHON, str(path)], self.environment())
        while not (self.tmp / "ready").exists():
            time.sleep(0.02)
        os.kill(pid, signal.SIGTERM)
        with contextlib.suppress(OSError):  # the terminal is gone with the program
            while os.read(master, 65536):
                pass
        os.close(master)
        self.assertEqual(os.WEXITSTATUS(os.waitpid(pid, 0)[1]), 128 + signal.SIGTERM)
        status = self.json("status.json")
        self.assertEqual((status["signal"], status["exit_code"]), ("SIGTERM", 143))
        self.assertEqual(self.log("output"), "")


@unittest.skipIf(os.name != "posix", "the recorder is POSIX")
class Deaths(RunCase):
    """Every death is on disk within a second, with what is known of it."""

    def test_every_way_to_die(self) -> None:
        deaths = [
            ("os.kill(os.getpid(), 9)", "SIGKILL"),
            ("os.kill(os.getpid(), 15)", "SIGTERM"),
            ("os.abort()", "SIGABRT"),
            ("import ctypes; ctypes.string_at(0)", "SIGSEGV"),
            ("os._exit(7)", None),
        ]
        for body, name in deaths:
            with self.subTest(body):
                shutil.rmtree(self.tmp / "results", ignore_errors=True)
                done = self.in_context(body)
                expected = 7 if name is None else -signal.Signals[name]
                self.assertEqual(done.returncode, expected)
                status = self.wait_for_status("failed")
                self.assertEqual(status["exit_reason"], "killed")
                self.assertGreaterEqual(status["duration_seconds"], 0)
                if LINUX and status["exit_code"] is not None:
                    code = 7 if name is None else 128 + signal.Signals[name]
                    found = status["exit_code"], status["signal"]
                    self.assertEqual(found, (code, name))
                time.sleep(0.1)
                self.assertEqual(self.index()[-1]["exit_reason"], "killed")

    def test_out_of_memory_under_a_limit(self) -> None:
        body = """
        import resource
        resource.setrlimit(resource.RLIMIT_AS, (400 << 20, 400 << 20))
        bytearray(1 << 30)
        """
        self.assertEqual(self.in_context(body).returncode, 1)
        status = self.json("status.json")
        self.assertEqual(status["exception"]["type"], "MemoryError")

    def test_killed_just_after_entry(self) -> None:
        self.in_context("os.kill(os.getpid(), 9)")
        self.wait_for_status("failed")
        for _ in range(200):
            if self.json("metadata.json")["pip_freeze"] is not None:
                return
            time.sleep(0.05)
        self.fail("the recorder did not complete metadata.json")

    def test_a_program_that_takes_our_place(self) -> None:
        body = "os.execvp('sh', ['sh', '-c', 'echo replaced; exit 3'])"
        done = self.in_context(body)
        self.assertEqual((done.returncode, done.stdout), (3, "replaced\n"))
        self.assertEqual(self.wait_for_status("failed")["exit_reason"], "killed")

    def test_a_killed_recorder_costs_one_line(self) -> None:
        body = """
        import run_utils
        recorder = run_utils._active[0].recorder
        recorder.ask("drain", "drained")  # its first answer tells its pid
        os.kill(recorder.pid, 9)
        print("still here")
        """
        done = self.in_context(body)
        self.assertEqual((done.returncode, done.stdout), (0, "still here\n"))
        line = "run_utils: the recorder is gone; finishing its work here\n"
        self.assertEqual(done.stderr, line)
        self.assertEqual(self.log("stdout"), "still here\n")
        self.assertEqual(self.json("status.json")["status"], "success")
        self.assertIsInstance(self.json("metadata.json")["pip_freeze"], list)

    def test_no_process_and_no_zombie_is_left(self) -> None:
        body = """
        with run_context("results/exp"): pass
        try:
            print(os.waitpid(-1, os.WNOHANG))
        except ChildProcessError:
            print("no children")
        """
        self.assertEqual(self.script(body).stdout, "no children\n")

    def test_waiting_for_any_child_never_meets_the_recorder(self) -> None:
        body = """
        pid = os.fork()
        if pid == 0: os._exit(0)
        print(os.wait()[0] == pid)
        try: os.wait()
        except ChildProcessError: print("none")
        """
        self.assertEqual(self.in_context(body).stdout, "True\nnone\n")

    def test_no_thread_no_handler_no_hook(self) -> None:
        body = """
        import signal, threading
        def state():
            handlers = [signal.getsignal(n) for n in (1, 2, 15)]
            return handlers, threading.active_count(), sys.excepthook
        before = state()
        with run_context("results/exp"):
            print(state() == before)
        """
        self.assertEqual(self.script(body).stdout, "True\n")

    def test_forking_inside_warns_of_nothing(self) -> None:
        body = """
        pid = os.fork()
        if pid == 0: os._exit(0)
        os.waitpid(pid, 0)
        """
        done = self.in_context(body, flags=("-X", "dev", "-W", "error"))
        self.assertEqual((done.returncode, done.stderr), (0, ""))

    def test_closing_all_descriptors_in_the_body(self) -> None:
        body = "os.closerange(3, 256); held = open('mine', 'w'); held.write('x')"
        self.assertEqual(self.in_context(body).returncode, 0)
        self.assertEqual((self.tmp / "mine").read_text("utf-8"), "x")
        self.assertEqual(self.json("status.json")["status"], "success")


class WithoutARecorder(RunCase):
    """Where no recorder can be started the process does its work, and says so."""

    def check(self, reason: str, done: subprocess.CompletedProcess[str]) -> None:
        self.assertEqual((done.returncode, done.stdout), (0, "x\n"))
        line = f"run_utils: no recorder ({reason}): its work is done in this process,"
        self.assertEqual(done.stderr, f"{line} slower\n")
        self.assertEqual(self.json("status.json")["status"], "success")
        capture = self.json("metadata.json")["capture"]
        slow = {"git", "git.patch", "git.bundle", "cuda", "pip_freeze"}
        self.assertLess(slow, set(capture))
        self.assertEqual(self.log("stdout"), "x\n")

    def test_no_executable(self) -> None:
        body = 'sys.executable = ""\nwith run_context("results/exp"): print("x")'
        self.check("sys.executable is '', not a Python", self.script(body))

    def test_frozen(self) -> None:
        body = 'sys.frozen = True\nwith run_context("results/exp"): print("x")'
        self.check("a frozen program", self.script(body))

    def test_no_more_processes(self) -> None:
        body = """
        import subprocess
        def fail(*args, **kwargs): raise BlockingIOError(11, "no more processes")
        subprocess.run = subprocess.Popen = fail
        with run_context("results/exp"): print("x")
        """
        self.check("[Errno 11] no more processes", self.script(body))

    def test_a_process_limit(self) -> None:
        limit = "import resource\nresource.setrlimit(resource.RLIMIT_NPROC, (1, 1))\n"
        if self.script(limit + "os.fork()").returncode == 0:
            self.skipTest("root has no process limit")
        done = self.script(limit + 'with run_context("results/exp"): print("x")')
        self.check("[Errno 11] Resource temporarily unavailable", done)

    def test_a_zip_file(self) -> None:
        import zipfile

        with zipfile.ZipFile(self.tmp / "app.zip", "w") as archive:
            archive.write(SOURCE, "run_utils.py")
        env = {"PYTHONPATH": str(self.tmp / "app.zip")}
        done = self.script('with run_context("results/exp"): print("x")', env=env)
        self.check("run_utils is not a plain file", done)

    def test_source_from_stdin(self) -> None:
        text = SOURCE.read_text("utf-8").partition('\nif __name__ == "__main__":')[0]
        text += '\nwith run_context("results/exp", "exp"): print("x")\n'
        done = subprocess.run(
            [PYTHON, "-"],
            input=text,
            env=self.environment(),
            encoding="utf-8",
            capture_output=True,
        )
        self.check("run_utils is not a plain file", done)


class DescriptorsOfTheProgram(RunCase):
    """A program may close what it did not open; its own files stay its own."""

    BODY = """
    os.closerange(3, 256)
    mine = [os.open(f"mine{n}", os.O_RDWR | os.O_CREAT) for n in range(40)]
    """

    def test_files_at_the_numbers_of_ours_are_neither_written_nor_closed(self) -> None:
        check = """
        for number in mine:
            os.fstat(number)  # raises when it was closed
        print("all open")
        """
        start = 'with run_context("results/exp", "exp") as run_dir:\n'
        body = textwrap.indent(textwrap.dedent(self.BODY), "    ")
        ways: list[dict[str, Any]] = [{}, {"stderr": subprocess.STDOUT}]
        for options in ways:
            done = self.script(start + body + textwrap.dedent(check), **options)
            self.assertEqual(done.returncode, 0, done.stderr)
            self.assertTrue(done.stdout.endswith("all open\n"), done.stdout)
            sizes = {path.name: path.stat().st_size for path in self.tmp.glob("mine*")}
            self.assertEqual(set(sizes.values()), {0}, sizes)

    def test_nor_after_an_exception(self) -> None:
        done = self.in_context(f'{self.BODY}raise ValueError("x")')
        self.assertIn("ValueError: x", done.stderr)
        self.assertEqual({p.stat().st_size for p in self.tmp.glob("mine*")}, {0})

    @unittest.skipUnless(os.path.isdir("/proc/self/fd"), "needs /proc/self/fd")
    def test_nothing_stays_open_without_a_recorder(self) -> None:
        body = """
        import run_utils, subprocess
        before = os.listdir("/proc/self/fd")
        def fail(*_, **__): raise OSError("no process")
        subprocess.run = fail
        for _ in range(3):
            with run_context("results/exp", "exp"):
                pass
        print(len(os.listdir("/proc/self/fd")) - len(before))
        """
        self.assertEqual(self.script(body).stdout, "0\n")


class WhatReadersSay(RunCase):
    """A reader never says running of a dead run, nor lost of a live one."""

    def status(self, age: float = 0, **facts: object) -> str:
        now = run_utils._running_status({"notes": None})
        run_utils._write_json(self.tmp / "status.json", {**now, **facts})
        then = time.time() - age
        os.utime(self.tmp / "status.json", (then, then))
        return str(run_utils._status_now(self.tmp)["status"])

    def test_this_very_process_is_running_whatever_the_clock_says(self) -> None:
        for age in (0, 1e6, -1e6):
            self.assertEqual(self.status(age), "running")

    def test_a_pid_that_is_gone_or_used_again_is_lost(self) -> None:
        child = subprocess.Popen(["true"])
        child.wait()
        self.assertEqual(self.status(pid=child.pid), "lost")
        identity = run_utils._process_identity(os.getpid())
        if identity["start_ticks"] is not None:
            again = {**identity, "start_ticks": identity["start_ticks"] - 1}
            self.assertEqual(self.status(process=again), "lost")

    @unittest.skipUnless(LINUX, "zombies are told by /proc")
    def test_a_zombie_is_lost(self) -> None:
        pid = os.fork()
        if pid == 0:
            os._exit(0)
        time.sleep(0.1)
        identity = run_utils._process_identity(pid)
        self.assertEqual(self.status(pid=pid, process=identity), "lost")
        os.waitpid(pid, 0)

    @unittest.skipUnless(LINUX, "the boot id is Linux's")
    def test_another_boot_is_lost(self) -> None:
        identity = {**run_utils._process_identity(os.getpid()), "boot_id": "other"}
        self.assertEqual(self.status(process=identity), "lost")

    def test_another_host_is_judged_by_the_heartbeat(self) -> None:
        self.assertEqual(self.status(5, hostname="elsewhere"), "running")
        self.assertEqual(self.status(600, hostname="elsewhere"), "lost")

    def test_another_host_without_a_heartbeat_is_unknown(self) -> None:
        found = self.status(600, hostname="elsewhere", heartbeat_seconds=None)
        self.assertEqual(found, "unknown")

    @unittest.skipUnless(LINUX, "needs /proc")
    def test_a_stopped_process_is_running(self) -> None:
        child = subprocess.Popen(["sleep", "60"])
        os.kill(child.pid, signal.SIGSTOP)
        identity = run_utils._process_identity(child.pid)
        self.assertEqual(self.status(pid=child.pid, process=identity), "running")
        child.kill()
        child.wait()


class TheRunCommand(RunCase):
    """`run -- CMD` records any command and exits with its status."""

    def record(self, *words: str, **options: Any) -> Any:
        command = ["run", "--base-dir", "results/demo", "--"]
        return self.command(*command, *words, **options)

    def test_output_config_and_exit_status(self) -> None:
        (self.tmp / "job.py").write_text(
            "import sys; print(sys.argv[1:]); sys.exit(5)", "utf-8"
        )
        done = self.record(PYTHON, "job.py", "--lr", "0.1", "--fp16", "seed=3")
        self.assertEqual(done.returncode, 5)
        self.assertEqual(done.stdout, "['--lr', '0.1', '--fp16', 'seed=3']\n")
        run_dir = self.run_dir()
        self.assertEqual(done.stderr, f"run_utils: recorded in {run_dir}\n")
        self.assertTrue(run_dir.name.startswith("job-"))
        config = run_utils.load_run(run_dir).config
        self.assertEqual((config["lr"], config["fp16"], config["seed"]), (0.1, True, 3))
        self.assertEqual(self.json("status.json")["exit_code"], 5)
        self.assertTrue(str(self.json("metadata.json")["command"]).endswith("seed=3"))

    def test_a_module_gives_its_name(self) -> None:
        done = self.record(PYTHON, "-m", "json.tool", "--help")
        self.assertEqual(done.returncode, 0)
        self.assertTrue(self.run_dir().name.startswith("json.tool-"))

    def test_any_language_and_a_second_double_dash(self) -> None:
        done = self.record("sh", "-c", 'echo "$@"', "sh", "--", "a b")
        self.assertEqual((done.returncode, done.stdout), (0, "-- a b\n"))

    def test_a_signal_gives_128_plus_its_number(self) -> None:
        done = self.record("sh", "-c", "kill -9 $$")
        self.assertEqual(done.returncode, 137)
        status = self.json("status.json")
        found = status["exit_reason"], status["exit_code"], status["signal"]
        self.assertEqual(found, ("killed", 137, "SIGKILL"))

    def test_signals_are_forwarded(self) -> None:
        path = self.write_script("sys.exit(main(sys.argv[1:]))")
        job = (
            "trap 'echo got it; exit 6' TERM; echo ready; while :; do sleep 0.05; done"
        )
        words = ["run", "--base-dir", "results/demo", "--", "sh", "-c", job]
        child = subprocess.Popen(
            [PYTHON, str(path), *words],
            env=self.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        assert child.stdout is not None
        self.assertEqual(child.stdout.readline(), b"ready\n")
        child.terminate()
        self.assertEqual(child.stdout.read(), b"got it\n")
        child.stdout.close()
        self.assertEqual(child.wait(), 6)

    def test_a_program_that_is_not_there(self) -> None:
        done = self.record("no-such-program")
        self.assertEqual((done.returncode, self.run_dirs()), (2, []))
        sentence = "'no-such-program' is not a program on PATH; nothing was recorded\n"
        self.assertEqual(done.stderr, f"train.py: {sentence}")

    def test_a_config_file(self) -> None:
        (self.tmp / "c.json").write_text('{"lr": 1, "name": "x"}', "utf-8")
        words = [
            "run",
            "--base-dir",
            "results/demo",
            "--config",
            "c.json",
            "--",
            "true",
        ]
        self.assertEqual(self.command(*words).returncode, 0)
        config = run_utils.load_run(self.run_dir()).config
        self.assertEqual((config["lr"], config["name"]), (1, "x"))


class Inspecting(RunCase):
    """`inspect` shows one run on one screen, and trusts nothing it reads."""

    def test_a_failed_run(self) -> None:
        body = """
        log_metrics(run_dir, {"loss": 2.0}, 1)
        log_metrics(run_dir, {"loss": 1.0}, 2)
        raise ValueError("bad \\x1b[31m learning rate")
        """
        self.in_context(body)
        done = self.command("inspect", "latest")
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        self.assertIn("failed (exception), exit code 1", done.stdout)
        self.assertIn("ValueError: bad \\x1b[31m learning rate", done.stdout)
        self.assertIn("loss: 1 (lowest 1, highest 2, 2 values)", done.stdout)
        self.assertIn("plots: empty", done.stdout)

    def test_a_run_that_used_a_file_of_another(self) -> None:
        self.in_context("(run_dir / 'artifacts/model.pt').touch()")
        producer = self.run_dir()
        model = producer / "artifacts" / "model.pt"
        used = f"mark_artifact_used({str(model)!r})"
        self.script(f"with run_context('results/exp', 'next'): {used}")
        shown = self.command("inspect", "next").stdout
        what = f"{producer.name}/artifacts/model.pt (success)"
        line = f"inputs    mark_artifact_used: {what}\n"
        self.assertIn(line, shown)

    def test_the_attempts_of_a_resumed_run(self) -> None:
        self.script("""
        for lr in (1, 2):
            with run_context("results/e", "e", {"lr": lr}, run_dir="results/e/r"):
                pass
        """)
        shown = self.command("inspect", "results/e/r").stdout
        self.assertRegex(shown, r"\n          2 attempts, \S+ in all\n")
        self.assertIn("          attempt 1: success (normal), exit code 0,", shown)
        self.assertIn("          changed since: lr: 1 -> 2\n", shown)
        self.assertIn("success (2 attempts)", self.command("list").stdout)

    def test_json_for_programs(self) -> None:
        self.in_context("pass")
        done = self.command("inspect", "--json", str(self.run_dir() / "logs"))
        self.assertEqual(json.loads(done.stdout)["status"]["status"], "success")

    def test_sentences_for_bad_input(self) -> None:
        self.script('for _ in "ab": run_context("results/e", "exp").__enter__()')
        for run_dir in self.run_dirs():
            self.addCleanup(shutil.rmtree, run_dir, ignore_errors=True)
        done = self.command("inspect", "no-such")
        self.assertEqual(done.returncode, 2)
        here = str(self.tmp / "results")
        self.assertEqual(done.stderr, f"train.py: no run 'no-such' below {here!r}\n")
        done = self.command("inspect", "exp")
        self.assertEqual(done.returncode, 2)
        self.assertRegex(
            done.stderr, r"^train.py: 'exp' is a part of 2 names \(.*; say more\n$"
        )
        done = self.command("inspect", "/")
        sentence = "'/' is not in a run directory; give one, or a name"
        self.assertEqual(done.stderr, f"train.py: {sentence}\n")

    def test_an_unknown_option(self) -> None:
        done = self.command("inspect", "--nope", "x")
        self.assertEqual(done.returncode, 2)
        self.assertIn("unrecognized arguments: --nope", done.stderr)

    def test_damaged_and_foreign_directories(self) -> None:
        damages = [b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe", b"{}", b'{"git": 3}']
        damages += [b'{"status": [1], "exception": 4, "duration_seconds": "x"}']
        damages.append(
            b'{"capture": {"a": 1}, "python": 7, "platform": [], "command": {}}'
        )
        damages.append(b'{"inputs": [1, {}], "duration_seconds": %s}' % (b"9" * 400))
        damages.append(b'{"inputs": 1, "loss": %s}' % (b"9" * 400))
        names = ["status.json", "metadata.json", "config.yaml", "notes.jsonl"]
        for name in [*names, "metrics/metrics.jsonl"]:
            for data in damages:
                with self.subTest(name=name, data=data):
                    folder = self.tmp / "damaged"
                    shutil.rmtree(folder, ignore_errors=True)
                    folder.mkdir()
                    (folder / "metrics").mkdir()
                    (folder / "status.json").write_bytes(b"{}")
                    (folder / name).write_bytes(data)
                    self.assertEqual(run_utils.main(["inspect", str(folder)]), 0)

    def setUp(self) -> None:
        super().setUp()
        silence = contextlib.redirect_stdout(None)
        silence.__enter__()
        self.addCleanup(silence.__exit__, None, None, None)

    def test_a_reader_that_goes_away(self) -> None:
        self.in_context("pass")
        path = self.write_script("sys.exit(main(sys.argv[1:]))")
        command = (
            f"{shlex.quote(PYTHON)} {shlex.quote(str(path))} inspect latest | true"
        )
        done = subprocess.run(
            ["sh", "-c", command], env=self.environment(), stderr=subprocess.PIPE
        )
        self.assertEqual(done.stderr, b"")


class ReadingCase(RunCase):
    """A results tree of runs written as plain files, and commands in this process."""

    def make_run(self, name: str, **facts: Any) -> Path:
        """Write a run directory; `config`, `status`, `metadata`, `metrics`, `notes`."""
        path = self.tmp / "results" / name
        for folder in ("artifacts", "logs", "metrics"):
            (path / folder).mkdir(parents=True)
        stamp = "2026-01-01T00:00:00Z"
        status: dict[str, Any] = {"status": "success", "exit_reason": "normal"}
        status["started_utc"] = stamp
        status.update({"exit_code": 0, "duration_seconds": 60, "run": path.name})
        metadata = {"argv": ["python", "train.py"], "config": facts.get("config", {})}
        metadata.update({"timestamp_utc": stamp, "inputs": []})
        for file, known in (("status", status), ("metadata", metadata)):
            text = json.dumps({**known, **facts.get(file, {})})
            (path / f"{file}.json").write_text(text, "utf-8")
        lines = {"metrics/metrics.jsonl": "metrics", "notes.jsonl": "notes"}
        for file, key in lines.items():
            text = "".join(json.dumps(row) + "\n" for row in facts.get(key, []))
            (path / file).write_text(text, "utf-8")
        return path

    def ask(self, *words: str, columns: int | None = None) -> tuple[int, str, str]:
        """Run a command here; return its exit status and what it printed."""
        out, err = io.StringIO(), io.StringIO()
        width = {"COLUMNS": str(columns)} if columns else {}
        with mock.patch.dict(os.environ, width), contextlib.ExitStack() as stack:
            if not columns:
                os.environ.pop("COLUMNS", None)
            stack.enter_context(contextlib.redirect_stdout(out))
            stack.enter_context(contextlib.redirect_stderr(err))
            try:
                code = run_utils.main(list(words))
            except SystemExit as usage:
                code = int(str(usage.code))
        return code, out.getvalue(), err.getvalue()

    def rows(self, *words: str) -> list[str]:
        """Return the names of the runs that `list` shows, in its order."""
        code, out, err = self.ask("list", "--json", *words)
        self.assertEqual((code, err), (0, ""))
        return [row["name"] for row in json.loads(out)]


class InputsWithoutACall(ReadingCase):
    """Paths in config and argv that lie in other runs become inputs of the record."""

    def inputs(self, config: Any, *argv: str) -> list[tuple[str, str, str]]:
        found = run_utils._inputs(config, ["python", *argv], self.tmp / "own")
        return [(entry["key"], entry["run"], entry["path"]) for entry in found]

    def setUp(self) -> None:
        super().setUp()
        self.a, self.b = self.make_run("exp/a"), self.make_run("exp/b")
        for name in ("a.pt", "b c.pt"):
            (self.a / "artifacts" / name).write_text("x", "utf-8")
        (self.tmp / "link.pt").symlink_to(self.a / "artifacts" / "a.pt")

    def test_from_a_real_run(self) -> None:
        body = """
        with run_context("results/exp", config_args={"init": sys.argv[1]}) as run_dir:
            pass
        """
        done = self.script(body, "results/exp/a/artifacts/a.pt")
        self.assertEqual(done.stderr, "")
        (run,) = run_utils.find_runs("results", contains="train")
        (entry,) = run.metadata["inputs"]
        facts = [entry[key] for key in ("key", "run", "path", "size", "status")]
        self.assertEqual(facts, ["init", "a", "artifacts/a.pt", 1, "success"])
        self.assertEqual([row.get("inputs") for row in self.index()], [["a"], None])

    def test_by_hand(self) -> None:
        body = """
        run_dir = start_run("results/exp", "hand")
        write_config_yaml(run_dir, "x", {"init": "results/exp/a/artifacts/a.pt"})
        capture_metadata(run_dir)
        """
        self.assertEqual(self.script(body).stderr, "")
        self.assertRegex(self.ask("lineage", "results/exp/a")[1], r"used by +hand-")

    def test_every_way_of_naming_a_file(self) -> None:
        file = "results/exp/a/artifacts/a.pt"
        ways: list[tuple[Any, list[str]]] = [
            ({"init": file}, []),
            ({"model": {"init": [0, {"deep": [file]}]}}, []),
            ({"init": f"  {file}".strip()}, [file]),
            ({}, [f"--init={file}"]),
            ({}, ["--init", file]),
            ({}, [f"model.init={file}"]),
            ({}, [str(self.tmp / file)]),
            ({}, ["link.pt"]),
            ({"init": "./results/../results/exp/a/artifacts/a.pt"}, []),
        ]
        for config, argv in ways:
            with self.subTest(config=config, argv=argv):
                found = [entry[1:] for entry in self.inputs(config, *argv)]
                self.assertEqual(found, [("a", "artifacts/a.pt")])

    def test_lists_directories_and_globs(self) -> None:
        both = ["results/exp/a/artifacts/a.pt", "results/exp/a/artifacts/b c.pt"]
        expected = [("a", "artifacts/a.pt"), ("a", "artifacts/b c.pt")]
        for config in ({"init": both}, {"init": ",".join(both)}):
            self.assertEqual([entry[1:] for entry in self.inputs(config)], expected)
        self.assertEqual([entry[1:] for entry in self.inputs({}, *both)], expected)
        self.assertEqual(self.inputs({"init": "results/exp/b"}), [("init", "b", ".")])

    def test_what_is_no_input(self) -> None:
        (self.tmp / "data").mkdir()
        (self.tmp / "data" / "metadata.json").write_text('{"rows": 1}', "utf-8")
        (self.tmp / "data" / "x.csv").touch()
        own = self.tmp / "own"
        own.mkdir()
        (own / "status.json").write_text("{}", "utf-8")
        config = {"data": "data/x.csv", "out": "results/exp", "own": "own", "n": 3}
        config.update({"gone": "results/exp/a/no.pt", "odd": "\0", "long": "x" * 9999})
        self.assertEqual(self.inputs({**config, "command": "results/exp/a"}), [])

    def test_a_failed_lost_or_superseded_producer_is_warned_about(self) -> None:
        self.make_run("exp/bad", status={"status": "failed"})
        self.ask("note", "results/exp/b", "--tag", "superseded")
        body = 'with run_context("results/exp", config_args={"i": sys.argv[1:]}): pass'
        done = self.script(body, "results/exp/bad", "results/exp/a", "results/exp/b")
        expected = "run_utils: i=. comes from bad, which is failed\n"
        expected += "run_utils: i=. comes from b, which is superseded\n"
        self.assertEqual(done.stderr, expected)

    def test_the_runs_of_the_ancestors(self) -> None:
        old = self.make_run("exp/old")
        for run_dir, facts in ((old, {"working_dir": str(self.tmp)}), (self.b, {})):
            text = json.dumps({"timestamp_utc": "2025-01-01T00:00:00Z", **facts})
            (run_dir / "metadata.json").write_text(text, "utf-8")
        (old / "config.yaml").write_text("init: results/exp/b/artifacts\n", "utf-8")
        self.assertEqual([entry["run"] for entry in run_utils._read_inputs(old)], ["b"])
        self.assertIn("old (success): artifacts", self.ask("lineage", "b")[1])


class LineageCommand(ReadingCase):
    """`lineage` shows both directions to any depth, wherever the runs are now."""

    def use(self, consumer: str, producer: str, **more: Any) -> None:
        here, there = (self.tmp / "results" / name for name in (consumer, producer))
        path = there / "artifacts" / "m.pt"
        path.touch()
        metadata = json.loads((here / "metadata.json").read_text("utf-8"))
        metadata["inputs"].append(run_utils._input("init", path, there, here))
        (here / "metadata.json").write_text(json.dumps(metadata), "utf-8")

    def setUp(self) -> None:
        super().setUp()
        for name in "abcd":
            self.make_run(f"exp/{name}")
        self.use("exp/b", "exp/a")
        self.use("exp/c", "exp/b")
        self.use("exp/d", "exp/b")

    def test_both_directions(self) -> None:
        expected = "b (success)\n"
        expected += "used      a (success): artifacts/m.pt\n"
        expected += "used by   c (success): artifacts/m.pt\n"
        expected += "          d (success): artifacts/m.pt\n"
        self.assertEqual(self.ask("lineage", "results/exp/b"), (0, expected, ""))
        deep = self.ask("lineage", "results/exp/a")[1]
        self.assertEqual(deep.count("\n"), 4)
        self.assertIn("            c (success)", deep)

    def test_several_files_of_one_run(self) -> None:
        metadata = self.tmp / "results/exp/d/metadata.json"
        facts = json.loads(metadata.read_text("utf-8"))
        (entry,) = facts["inputs"]
        facts["inputs"] += [{**entry, "path": f"artifacts/{n}"} for n in range(4)]
        metadata.write_text(json.dumps(facts), "utf-8")
        out = self.ask("lineage", "results/exp/d")[1]
        files = "artifacts/m.pt, artifacts/0, artifacts/1 and 2 more"
        self.assertIn(f"used      b (success): {files}\n", out)

    def test_cycles_end(self) -> None:
        self.use("exp/a", "exp/c")
        out = self.ask("lineage", "results/exp/a")[1]
        self.assertIn("a (success): artifacts/m.pt (see above)", out)

    def test_a_chain_of_5000_runs(self) -> None:
        lineage = run_utils._Lineage(self.tmp / "none")
        runs = [Path(f"/r{number}") for number in range(5000)]
        lineage.edges.update({pair: ["m.pt"] for pair in zip(runs, runs[1:])})
        for start, users in ((runs[0], True), (runs[-1], False)):
            depths = [depth for depth, _, _ in lineage.walk(start, users)]
            self.assertEqual(depths, list(range(1, 5000)))

    def test_a_moved_tree_and_renamed_runs(self) -> None:
        os.rename("results", "elsewhere")
        os.rename("elsewhere/exp/a", "elsewhere/exp/baseline")
        out = self.ask("lineage", "elsewhere/exp/b")[1]
        self.assertIn("used      baseline (success): artifacts/m.pt\n", out)
        self.assertIn("c (success)", out)

    def test_a_copy_beside_the_original_is_its_own_tree(self) -> None:
        shutil.copytree("results", "copy")
        (self.tmp / "copy/exp/a/status.json").write_text(
            '{"status": "failed"}', "utf-8"
        )
        self.assertIn("a (failed)", self.ask("lineage", "copy/exp/b")[1])
        self.assertIn("a (success)", self.ask("lineage", "results/exp/b")[1])

    def test_a_deleted_run_is_said_to_be_gone(self) -> None:
        shutil.rmtree("results/exp/a")
        out = self.ask("lineage", "results/exp/b")[1]
        self.assertIn("used      a (not there now): artifacts/m.pt\n", out)

    def test_graphs(self) -> None:
        out = self.ask("lineage", "results/exp/b", "--dot")[1]
        self.assertIn('  n0 -> n1 [label="artifacts/m.pt"];\n', out)
        out = self.ask("lineage", "results/exp/b", "--mermaid")[1]
        self.assertIn('  n0 -->|"artifacts/m.pt"| n1\n', out)
        graph = json.loads(self.ask("lineage", "results/exp/b", "--json")[1])
        self.assertEqual((len(graph["runs"]), len(graph["edges"])), (4, 3))
        odd = run_utils._format_graph("mermaid", [Path('x"]|<b>;')], [])
        self.assertEqual(list(odd)[1], '  n0["x#34;]#124;#60;b#62;;"]')
        odd = run_utils._format_graph("dot", [Path('x"\\')], [])
        self.assertEqual(list(odd)[1], '  n0 [label="x\\"\\\\"];')

    def test_the_index_makes_no_difference(self) -> None:
        without = self.ask("lineage", "results/exp/b")[1]
        self.assertEqual(self.ask("reindex", "results")[0], 0)
        self.assertEqual(self.ask("lineage", "results/exp/b")[1], without)
        run_utils.mark_artifact_used("results/exp/d/artifacts", "results/exp/a")
        self.assertIn("d (success)", self.ask("lineage", "results/exp/a")[1])

    def test_used_by_lines_of_the_ancestors(self) -> None:
        line = {"artifact_relpath": "x.pt", "consumer_run_dir": "/old/results/exp/d"}
        path = self.tmp / "results/exp/a/artifacts/USED_BY.jsonl"
        path.write_text(json.dumps(line) + "\n", "utf-8")
        out = self.ask("lineage", "results/exp/a")[1]
        self.assertIn("d (success): artifacts/x.pt", out)


class Where(ReadingCase):
    """`where` compares numbers as numbers, texts as texts, by dotted keys."""

    def setUp(self) -> None:
        super().setUp()
        config = {
            "lr": 0.001,
            "model": {"name": "Qwen/Qwen3"},
            "fp16": True,
            "s": "1e3",
        }
        rows = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 0.5, "acc": "NaN"}]
        self.run_at = Run(self.make_run("exp/a", config=config, metrics=rows))

    def test_table(self) -> None:
        true = ["lr<1e-2", "lr <= 0.001", "lr==1e-3", "lr=0.001", "lr!=2", "loss<1"]
        true += ["model.name~Qwen3$", "config.lr<1", "metrics.loss>=0.5", "fp16==true"]
        true += ["fp16==True", "status==success", "name~^a", "s==1000", "lr>1 or lr<1"]
        true += ["lr<1 and loss<1", "lr>1 and loss>9 or fp16==true", "none!=3"]
        true += ["model.name=='qwen/qwen3'", 'model.name=="Qwen/Qwen3"', "nope==null"]
        true += ["started_utc>2025", "acc!=1", "fp16==true or lr>1 and lr>2"]
        false = ["lr>1", "lr<1 and lr>1", "nope<1", "nope==1", "model.name~^x", "acc<1"]
        false += ["acc>1", "acc==acc", "fp16<1", "lr>1 or loss>1", "none==3"]
        for expected, texts in ((True, true), (False, false)):
            for text in texts:
                with self.subTest(text):
                    self.assertIs(run_utils._condition(text)(self.run_at), expected)

    def test_sentences_for_what_is_not_understood(self) -> None:
        how = "write KEY<VALUE (or <= > >= == != ~), joined by and/or"
        for text, rest in (
            ("lr", "lr"),
            ("lr<", "lr<"),
            ("lr<1 and", "lr<1 and"),
            ("lr<1 and ", "lr<1 and "),
            ("lr<1 xor b<2", "lr<1 xor b<2"),
            ("", ""),
            ("a<1 or __import__('os')", "__import__('os')"),
        ):
            with self.subTest(text):
                with self.assertRaises(ValueError) as caught:
                    run_utils.find_runs("results", where=text)
                sentence = f"where {text!r} is not understood at {rest!r}; {how}"
                self.assertEqual(str(caught.exception), sentence)
        with self.assertRaisesRegex(ValueError, "'\\(' is no regular expression: "):
            run_utils.find_runs("results", where="a~(")


class FindingRuns(ReadingCase):
    """find_runs and `list` show the runs that were asked for, newest first."""

    def setUp(self) -> None:
        super().setUp()
        for day in (1, 3, 2):
            start = f"2026-01-0{day}T00:00:00Z"
            facts = {
                "started_utc": start,
                "status": "failed" if day == 2 else "success",
            }
            config = {"lr": day / 10, "same": 1, "command": str(day)}
            rows = [{"step": 1, "time": 1, "loss": 1.0 / day}]
            name = f"exp/train-2026010{day}-000000"
            self.make_run(name, config=config, status=facts, metrics=rows)
        (self.tmp / "results/exp/train-20260103-000000/artifacts/m").write_text(
            "x" * 2000, "utf-8"
        )
        for run in self.run_dirs()[:2]:
            (run / "metrics" / "metrics.jsonl").unlink()
        self.names = [f"train-2026010{day}-000000" for day in (3, 2, 1)]

    def test_filters(self) -> None:
        third, second, first = self.names
        for words, expected in (
            ([], self.names),
            (["--status", "failed"], [second]),
            (["--where", "lr>=0.2"], [third, second]),
            (["--since", "2026-01-02"], [third, second]),
            (["--since", "1d"], []),
            (["--contains", "0102"], [second]),
            (["--contains", "EXP/train"], self.names),
            (["--has-outputs"], [third]),
            (["--sort", "lr"], [first, second, third]),
            (["--sort=-lr", "-n", "2"], [third, second]),
            (["--sort", "loss"], [third, second, first]),
            (["-n", "1"], [third]),
            (["--tag", "x"], []),
        ):
            with self.subTest(words):
                self.assertEqual(self.rows(*words), expected)

    def test_a_row_for_pandas(self) -> None:
        (run, *_) = run_utils.find_runs("results", where="lr==0.3")
        self.assertEqual((run["config.lr"], run["metrics.loss"]), (0.3, 1 / 3))
        self.assertEqual((run["duration_seconds"], run["attempts"]), (60, 1))
        self.assertTrue(all(isinstance(key, str) for key in run))

    def test_the_table(self) -> None:
        code, out, err = self.ask("list")
        self.assertEqual((code, err), (0, ""))
        head, *lines = out.splitlines()
        self.assertEqual(
            head.split()[:6], ["run", "status", "age", "time", "outputs", "config"]
        )
        self.assertRegex(
            lines[0], r"^exp/train-20260103-000000  success  \d+d\d+h  1m00s"
        )
        self.assertIn("  2 (2.05 kB)  lr=0.3  loss=0.333333", lines[0])
        self.assertIn("  empty        lr=0.2", lines[1])
        none = self.ask("list", "--tag", "x")
        here = str(self.tmp / "results")
        self.assertEqual(none, (0, "", f"no such runs below {here!r}\n"))
        self.assertNotIn("same", out)

    def test_it_fits_the_terminal(self) -> None:
        self.ask("note", self.names[0], "é☃表 " * 50, "--tag", "canonical")
        for columns in (20, 40, 72, 80, 100, 200):
            with self.subTest(columns):
                out = self.ask("list", columns=columns)[1]
                widths = list(map(run_utils._width, out.splitlines()))
                self.assertLessEqual(max(widths), columns)
        self.assertIn(self.names[0], self.ask("list", columns=72)[1])

    def test_by_script(self) -> None:
        other = {"argv": ["python", "-m", "pkg.evaluate"]}
        self.make_run("exp/e", metadata=other)
        out = self.ask("list", "--by-script")[1]
        self.assertRegex(out, r"(?s)^pkg.evaluate: 1 run\nrun.*\ntrain: 3 runs\nrun")

    def test_csv_is_safe_in_a_spreadsheet(self) -> None:
        config = {"a": "=cmd()", "b": "-1+1", "c": -1.5, "d": 'x,"y"', "e": "-x"}
        config["\x1b[2J"] = 1
        start = {"started_utc": "2026-01-05T00:00:00Z"}
        self.make_run("exp/odd-20260105-000000", config=config, status=start)
        import csv

        row = next(csv.DictReader(io.StringIO(self.ask("list", "--csv")[1])))
        self.assertEqual(row["config.\\x1b[2J"], "1")
        found = [row[f"config.{key}"] for key in "abcde"]
        self.assertEqual(found, ["'=cmd()", "-1+1", "-1.5", 'x,"y"', "'-x"])

    def test_markdown_shows_which_used_which(self) -> None:
        body = """
        with run_context("results/exp", "next", {"i": "results/exp/%s"}): pass
        """
        self.script(body % self.names[0])
        self.ask("note", self.names[1], "a | b <script>", "--tag", "superseded")
        lines = self.ask("list", "--md")[1].splitlines()
        self.assertEqual(
            len({len(re.findall(r"(?<!\\)\|", line)) for line in lines if line}), 1
        )
        self.assertRegex(lines[2], rf"\| {self.names[0]}/. \|")
        self.assertRegex(lines[3], r"\| next-\d+-\d+ \|")
        self.assertIn(r"\[superseded\] a \| b \<script\>", lines[4])

    def test_what_is_not_shown_is_counted(self) -> None:
        out = self.ask("list", "-n", "1")[1]
        self.assertEqual(
            out.splitlines()[-1], "2 older runs are not shown; -n 0 shows all"
        )

    def test_sentences_for_bad_input(self) -> None:
        for words, sentence in (
            (["no"], "'no' is not a folder; give one that holds runs"),
            (
                ["--since", "x"],
                "since 'x' is no time; give '12h', '7d' or '2026-01-31'",
            ),
        ):
            code, out, err = self.ask("list", *words)
            self.assertEqual((code, out), (2, ""))
            self.assertTrue(err.endswith(f": {sentence}\n"), err)


class WhereRunsAre(ReadingCase):
    """Moved, copied, renamed and half-deleted trees give right answers at once."""

    def test_moved_renamed_deleted_and_copied(self) -> None:
        for day in (1, 2, 3):
            start = {"started_utc": f"2026-01-0{day}T00:00:00Z"}
            self.make_run(f"exp/t-2026010{day}-000000", status=start)
        self.ask("reindex", "results")
        os.rename("results", "moved")
        self.assertEqual(len(self.rows("moved")), 3)
        os.rename("moved/exp/t-20260101-000000", "moved/exp/best")
        self.assertEqual(self.rows("moved")[-1], "best")
        shutil.rmtree("moved/exp/t-20260102-000000")
        shutil.copytree("moved/exp", "moved/more/deep/copy")
        names = ["t-20260103-000000", "best"]
        self.assertEqual(sorted(self.rows("moved")), sorted(names * 2))

    def test_what_is_left_of_a_run_is_shown(self) -> None:
        run = self.make_run("exp/t-20260101-000000")
        (run / "status.json").unlink()
        (run / "metadata.json").unlink()
        self.assertEqual(self.rows(), ["t-20260101-000000"])
        self.assertIn("  ?  ", self.ask("list")[1])

    def test_folders_with_a_date_that_hold_runs(self) -> None:
        self.make_run("sweep-20260101-000000/a")
        self.make_run("sweep-20260101-000000/t-20260102-000000")
        self.assertEqual(self.rows(), ["t-20260102-000000", "a"])

    def test_links(self) -> None:
        self.make_run("exp/a")
        for link, target in (
            ("results/loop", "results"),
            ("results/exp/best", "results/exp/a"),
            ("results/gone", "nowhere"),
            ("results/scratch", "far"),
        ):
            os.symlink(self.tmp / target, link)
        shutil.copytree("results/exp/a", "far/exp/b")
        self.assertEqual(sorted(self.rows()), ["a", "b"])

    def test_any_file_of_a_run_names_it(self) -> None:
        run = self.make_run("exp/a")
        (run / "plots").mkdir()
        (run / "plots" / "f.png").touch()
        os.symlink(run / "plots" / "f.png", "figure.png")
        for path in ("figure.png", "results/exp/a/plots/f.png", "results/exp/a/plots"):
            self.assertIn(f"run       {run}\n", self.ask("inspect", path)[1])


class Diffing(ReadingCase):
    """`diff` shows only what differs, and says by its exit status whether it does."""

    def test_two_runs(self) -> None:
        git = {"commit_full": "1a2b3c4", "is_dirty": True, "branch": "main"}
        packages = ["numpy==1.0", "-e /home/ann/pkg", "old==1", "A_b @ git+https://x@1"]
        facts = {"git": git, "pip_freeze": packages, "hostname": "one"}
        a = self.make_run("exp/a", config={"lr": 1, "x": {"y": 2}}, metadata=facts)
        packages = ["numpy==2.0", "-e /home/ann/pkg", "new==1", "a-b @ git+https://x@2"]
        facts = {"git": {**git, "is_dirty": False}, "pip_freeze": packages}
        facts["hostname"] = "two"
        rows = [{"step": 1, "loss": 1}]
        b = self.make_run(
            "exp/b", config={"lr": 2, "x": {"y": 2}}, metadata=facts, metrics=rows
        )
        (a / "git.patch").write_text("+one\n+same\n", "utf-8")
        (b / "git.patch").write_text("+two\n+same\n", "utf-8")
        code, out, err = self.ask("diff", str(a), str(b))
        self.assertEqual((code, err), (1, ""))
        expected = """
        config    lr: 1 -> 2
        code      is_dirty: true -> false
                  git.patch:
                    @@ -1,2 +1,2 @@
                    -+one
                    ++two
                     +same
        packages  numpy: 1.0 -> 2.0
                  old: 1 -> none
                  a-b: git+https://x@1 -> git+https://x@2
                  new: none -> 1
        machine   hostname: one -> two
        metrics   loss: none -> 1
        """
        self.assertEqual(out, textwrap.dedent(expected).lstrip("\n"))
        self.assertEqual(self.ask("diff", str(a), str(a)), (0, "", ""))
        found = json.loads(self.ask("diff", "--json", str(a), str(b))[1])
        self.assertEqual(found["config"], {"lr": [1, 2]})

    def test_one_run_against_here_and_now(self) -> None:
        self.in_context("pass")
        done = self.command("diff", "latest")
        self.assertEqual((done.returncode, done.stdout, done.stderr), (0, "", ""))
        path = self.run_dir() / "metadata.json"
        facts = json.loads(path.read_text("utf-8"))
        facts["python"]["version"] = "2.7.18"
        path.write_text(json.dumps(facts), "utf-8")
        done = self.command("diff", "latest")
        self.assertEqual(done.returncode, 1)
        self.assertTrue(done.stdout.startswith("machine   python: 2.7.18 -> 3."))

    @unittest.skipUnless(GIT, "git is not installed")
    def test_the_commits_between(self) -> None:
        git = ["git", "-c", "user.name=x", "-c", "user.email=x@example.org"]
        commits = []
        subprocess.run(["git", "init", "-q", "."], check=True)
        for text in ("first", "second"):
            subprocess.run([*git, "commit", "-qm", text, "--allow-empty"], check=True)
            head = subprocess.run(["git", "rev-parse", "HEAD"], stdout=subprocess.PIPE)
            commits.append(head.stdout.decode().strip())
        for name, commit in zip("ab", commits):
            facts = {"commit_full": commit, "commit_short": commit[:7]}
            self.make_run(
                f"exp/{name}", metadata={"git": {**facts, "root": str(self.tmp)}}
            )
        out = self.ask("diff", "results/exp/a", "results/exp/b")[1]
        self.assertIn(f"            >{commits[1][:7]} second\n", out.replace("> ", ">"))

    def test_changes_whose_content_was_not_kept_are_not_called_the_same(self) -> None:
        git = {"commit_full": "1a2b3c4", "is_dirty": True}
        for name in "ab":
            self.make_run(f"exp/{name}", metadata={"git": git})
        code, out, _ = self.ask("diff", "results/exp/a", "results/exp/b")
        expected = "code      uncommitted changes: not kept by a -> not kept by b\n"
        self.assertEqual((code, out), (1, expected))

    def test_trouble_is_2(self) -> None:
        self.assertEqual(self.ask("diff", "nothing")[0], 2)


class Notes(ReadingCase):
    """Notes and tags are appended, by several people at once, and shown everywhere."""

    def test_tags_come_and_go(self) -> None:
        run = self.make_run("exp/a")
        self.assertEqual(
            self.ask("note", "a", "looks good", "--tag", "canonical")[0], 0
        )
        self.assertEqual(self.ask("note", "a", "--tag", "x", "--tag", "y")[0], 0)
        self.assertEqual(self.ask("note", "a", "no more", "--untag", "canonical")[0], 0)
        self.assertEqual(Run(run)["tags"], ["x", "y"])
        self.assertEqual(self.rows("--tag", "x"), ["a"])
        self.assertEqual(self.rows("--tag", "canonical"), [])
        self.assertIn("[x] [y] looks good; no more", self.ask("list")[1])
        out = self.ask("inspect", "a")[1]
        self.assertIn("tags      x y\n", out)
        self.assertRegex(
            out, r"notes     \S+Z \S+: looks good\n          .*: no more\n"
        )
        self.assertEqual([row["event"] for row in self.index()], ["note"] * 3)

    def test_64_at_once(self) -> None:
        self.make_run("exp/a")
        code = "import sys, run_utils\nfor n in range(4): "
        code += 'run_utils.main(["note", "results/exp/a", f"{sys.argv[1]}.{n}"])'
        command = [PYTHON, "-c", code]
        env = self.environment()
        writers = [subprocess.Popen([*command, str(n)], env=env) for n in range(16)]
        self.assertEqual([writer.wait() for writer in writers], [0] * 16)
        lines = (self.tmp / "results/exp/a/notes.jsonl").read_text("utf-8").splitlines()
        texts = {json.loads(line)["text"] for line in lines if line}
        self.assertEqual(texts, {f"{a}.{b}" for a in range(16) for b in range(4)})

    def test_nothing_to_note(self) -> None:
        self.make_run("exp/a")
        code, _, err = self.ask("note", "a")
        self.assertEqual(code, 2)
        self.assertTrue(
            err.endswith("nothing to note; give a text, or --tag canonical\n")
        )


class Reindexing(ReadingCase):
    """`reindex` rebuilds the index from the directories alone."""

    def test_one_line_a_run_oldest_first(self) -> None:
        for day in (2, 1):
            start = {"started_utc": f"2026-01-0{day}T00:00:00Z"}
            self.make_run(f"exp/t-2026010{day}-000000", status=start)
        self.assertEqual(
            self.ask("reindex", "--dry-run")[1],
            "2 runs: 2 added, 0 removed, if it were done\n",
        )
        self.assertFalse((self.tmp / "results/index").exists())
        self.assertEqual(self.ask("reindex")[1], "2 runs: 2 added, 0 removed\n")
        rows = self.index()
        paths = ["exp/t-20260101-000000", "exp/t-20260102-000000"]
        self.assertEqual([row["path"] for row in rows], paths)
        facts = {(row["event"], row["status"], row["script_name"]) for row in rows}
        self.assertEqual(facts, {("backfill", "success", "train")})
        before = (self.tmp / "results/index/runs_index.jsonl").read_bytes()
        self.ask("reindex")
        again = (self.tmp / "results/index/runs_index.jsonl").read_bytes()
        self.assertEqual(before, again)
        shutil.rmtree("results/exp/t-20260101-000000")
        self.assertEqual(self.ask("reindex")[1], "1 runs: 0 added, 1 removed\n")

    def test_lines_that_runs_append_meanwhile_stay(self) -> None:
        run = self.make_run("exp/a")
        rebuild = run_utils._rebuilt_index

        def slowly(root: Path) -> Any:
            rows = rebuild(root)
            run_utils._append_index(run_utils._index_row(run, root), "end", "late")
            return rows

        with mock.patch.object(run_utils, "_rebuilt_index", slowly):
            self.ask("reindex", "results")
        found = [(row["event"], row["status"]) for row in self.index()]
        self.assertEqual(found, [("backfill", "success"), ("end", "late")])

    def test_runs_of_the_ancestors(self) -> None:
        run = self.make_run("exp/old-20250101-000000")
        (run / "metadata.json").write_text(
            '{"timestamp_utc": "2025-01-01T00:00:00Z"}', "utf-8"
        )
        (run / "status.json").write_text(
            '{"status": "failed", "exit_reason": "x"}', "utf-8"
        )
        (run / "config.yaml").write_text("lr: 0.1\ncommand: python old.py\n", "utf-8")
        self.ask("reindex", "results")
        (row,) = self.index()
        facts = [row[key] for key in ("event", "status", "exit_reason", "script_name")]
        self.assertEqual(facts, ["backfill", "failed", "x", "old"])
        self.assertEqual(self.rows("--where", "lr==0.1"), ["old-20250101-000000"])


class YamlOfTheAncestors(unittest.TestCase):
    """Without PyYAML the files that it wrote are read, or it is said which are not."""

    DOCUMENT = r"""
    lr: 0.0001
    small: 1.0e-05
    on: 'on'
    none: null
    flag: true
    empty: []
    nothing: {}
    inline: [a, 1, 'b c', {d: e}]
    layers:
    - 1
    - - 2
      - x: y
        z: -3
    text: a long plain text that is folded
      over two lines and a - dash
    quoted: 'it''s: folded

      and has two lines'
    escaped: "tab\t and \u2603 \
      \ go on"
    ? "a very long key"
    : value
    shared: &id001
      a: 1
    again: *id001
    listed: &id002
    - x
    too: *id002
    date: 2026-01-31
    octal: 0o17
    """
    VALUE: ClassVar[dict[str, Any]] = {
        "lr": 0.0001,
        "small": 1e-05,
        "true": "on",
        "none": None,
        "flag": True,
        "empty": [],
        "nothing": {},
        "inline": ["a", 1, "b c", {"d": "e"}],
        "layers": [1, [2, {"x": "y", "z": -3}]],
        "text": "a long plain text that is folded over two lines and a - dash",
        "quoted": "it's: folded\nand has two lines",
        "escaped": "tab\t and ☃  go on",
        "a very long key": "value",
        "shared": {"a": 1},
        "again": {"a": 1},
        "listed": ["x"],
        "too": ["x"],
        "date": "2026-01-31",
        "octal": "0o17",
    }

    def test_both_readers_agree(self) -> None:
        text = textwrap.dedent(self.DOCUMENT).lstrip("\n")
        self.assertEqual(run_utils._YamlReader(text).document(), self.VALUE)
        self.assertEqual(run_utils._parse_yaml(text), self.VALUE)

    def test_what_is_not_read_is_said(self) -> None:
        for text, line in (
            ("a: 1\nb: !!python/tuple [1]\n", "line 2, '!!python/tuple [1]'"),
            ("a: |\n  text\n", "line 1, '|'"),
            ("a: 1\n b: 2\n", "line 1, '1'"),
            ("a: b\nrest\n", "line 2, 'rest'"),
        ):
            with self.subTest(text):
                with self.assertRaises(ValueError) as caught:
                    run_utils._YamlReader(text).document()
                sentence = f"{line}, takes PyYAML to read"
                self.assertEqual(str(caught.exception), sentence)


class ReadersTrustNothing(ReadingCase):
    """Whatever lies in a results tree: no traceback, no hang, nothing steered."""

    COMMANDS = (
        *("list", "list --json", "list --md", "inspect X", "lineage X", "diff X X"),
        "list --csv --where lr<1 --sort loss --has-outputs",
        *("reindex --dry-run", "audit results"),
    )

    def readable(self, *commands: str) -> None:
        for command in commands or self.COMMANDS:
            words = command.replace("X", "results/exp/t-20260101-000000").split()
            with self.subTest(command):
                code, out, err = self.ask(*words)
                self.assertIn(code, (0, 1, 2) if "audit" in words else (0, 1), err)
                self.assertNotIn("Traceback", err)
                self.assertNotRegex(out, r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]")

    def test_odd_files(self) -> None:
        run = self.make_run("exp/t-20260101-000000")
        for name in ("status.json", "metadata.json", "config.yaml", "notes.jsonl"):
            path = run / name
            kept = path.read_bytes() if path.exists() else b""
            path.unlink(missing_ok=True)
            os.mkfifo(path)
            self.readable()
            path.unlink()
            path.mkdir()
            self.readable()
            path.rmdir()
            path.symlink_to(path)
            self.readable()
            path.unlink()
            with open(path, "wb") as file:
                file.truncate(1_000_000_000)
            self.readable()
            path.write_bytes(kept)

    def test_one_line_counts_what_cannot_be_read(self) -> None:
        run = self.make_run("exp/t-20260101-000000")
        (run / "status.json").write_bytes(b"{")
        (run / "metadata.json").write_bytes(b"[1]")
        code, out, err = self.ask("list")
        self.assertEqual(code, 0)
        self.assertIn("  ?  ", out)
        start = f"2 files cannot be read: '{run}/metadata.json' is not a JSON object"
        self.assertEqual(err, f"{start} that can be read\n")

    def test_hostile_contents(self) -> None:
        evil = "\x1b]0;pwned\x07\u202e\x9b31m\r\n| `x` <b>"
        config: Any = {evil: evil, "deep": {}}
        inner = config["deep"]
        for _ in range(200):
            inner["x"] = {}
            inner = inner["x"]
        facts: dict[str, Any] = dict.fromkeys(("hostname", "user", "command"), evil)
        facts["inputs"] = [{"path": evil, "run": evil, "run_dir": evil, "status": 3}]
        facts["inputs"].append(evil)
        facts["git"] = {"commit_short": evil, "branch": [evil], "unpushed": evil}
        facts["run_utils"] = {"schema_version": 99}
        facts["pip_freeze"] = [evil, 3, None]
        status = {"status": evil, "exit_reason": [evil], "started_utc": {}, "run": 7}
        status.update({"duration_seconds": evil, "exception": {"traceback": [evil]}})
        rows = [
            {"loss": 1e999, "step": evil},
            {evil: "x", "loss": True, "big": 10**400},
        ]
        notes = [
            {"text": [evil], "tags": evil, "user": {}},
            {"text": evil, "tags": [evil]},
        ]
        more = {"metadata": facts, "status": status, "metrics": rows, "notes": notes}
        self.make_run("exp/t-20260101-000000", config=config, **more)
        encoding = sys.getfilesystemencoding()
        name = evil.replace("/", "").encode(encoding, "ignore").decode(encoding)
        odd = self.tmp / "results" / "exp" / f"t{name}-20260102-000000"
        shutil.copytree(self.tmp / "results/exp/t-20260101-000000", odd)
        self.readable()

    def test_yaml_that_would_end_libyaml(self) -> None:
        run = self.make_run("exp/t-20260101-000000", metadata={"config": None})
        for text in ("a: " + "[" * 450000, "- " * 400000, "a: ]\n" + "{a: " * 200000):
            (run / "config.yaml").write_text(text, "utf-8")
            self.readable("list", "inspect X", "audit results")

    def test_a_yaml_bomb(self) -> None:
        run = self.make_run("exp/t-20260101-000000", metadata={"config": None})
        bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n"
        for n in range(1, 12):
            bomb += f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n"
        (run / "config.yaml").write_text(bomb, "utf-8")
        self.readable("list", "inspect X")


# === vendor.sh ===

CHECKOUT = Path(run_utils.__file__).resolve().parent
OURS = ("__init__.py", "__main__.py", "LICENSE")
# What vendor.sh needs beside a shell; git and Python are not among it.
VENDOR_PROGRAMS = (
    *("awk", "cat", "cmp", "grep", "head", "mkdir", "mv", "readlink", "rm"),
    *("sed", "sha1sum", "shasum", "perl", "tail", "wc"),
)


class VendorCase(unittest.TestCase):
    """A checkout with a tiny run_utils.py, and an empty package to copy it into."""

    shell = "dash"

    def setUp(self) -> None:
        if not shutil.which(self.shell):
            self.skipTest(f"no {self.shell} on PATH")
        if not (CHECKOUT / "vendor.sh").is_file():
            self.skipTest("vendor.sh is not beside run_utils.py: this is a copy")
        folder = tempfile.TemporaryDirectory(prefix="run_utils test ")
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)
        self.checkout = self.folder / "check out"
        self.package = self.folder / "src" / "my pkg"
        self.copy = self.package / "run_utils"
        self.checkout.mkdir()
        self.package.mkdir(parents=True)
        for name in ("vendor.sh", "LICENSE"):
            shutil.copy(CHECKOUT / name, self.checkout)
        self.release("1.2.0")

    def release(self, version: str, last_line: str = "pass\n") -> None:
        text = f'__version__ = "{version}"\n__vendored__ = None\n{last_line}'
        (self.checkout / "run_utils.py").write_text(text, encoding="utf-8")

    def vendor(
        self,
        *argv: str | Path,
        cwd: Path | None = None,
        script: str | Path | None = None,
        env: dict[str, str] | None = None,
    ) -> tuple[int, str, str]:
        """Run vendor.sh; return its status, stdout and stderr."""
        shell = shutil.which(self.shell) or self.shell
        done = subprocess.run(
            [shell, "--", str(script or self.checkout / "vendor.sh"), *map(str, argv)],
            cwd=cwd or self.folder,
            env=env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            check=False,
        )
        return done.returncode, done.stdout, done.stderr

    def edit(self, name: str, text: str = "# mine\n") -> Path:
        path = self.copy / name
        with path.open("a", encoding="utf-8") as file:
            file.write(text)
        return path

    def contents(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in self.copy.iterdir()}

    def assert_refused(self, sentence: str, *argv: str | Path) -> None:
        """Expect one sentence on stderr, status 1, and every file as it was."""
        before = self.contents()
        answer = self.vendor(*(argv or (self.package,)))
        self.assertEqual(answer, (1, "", f"vendor.sh: {sentence}\n"))
        self.assertEqual(self.contents(), before)


def under_bash_too(case: type[VendorCase]) -> type[VendorCase]:
    """Give a class that runs vendor.sh under dash a twin that takes bash."""
    name = case.__name__ + "UnderBash"
    body = {"shell": "bash", "__module__": case.__module__, "__doc__": case.__doc__}
    globals()[name] = type(name, (case,), body)
    return case


@under_bash_too
class VendorWritesACopy(VendorCase):
    """vendor.sh writes three files into a package and touches nothing else there."""

    def test_three_files_and_the_step_are_the_answer(self) -> None:
        self.assertEqual(self.vendor(self.package), (0, "none -> 1.2.0\n", ""))
        self.assertEqual(sorted(self.contents()), sorted(OURS))

    def test_only_the_stamp_differs_from_the_source(self) -> None:
        self.vendor(self.package)
        source = (self.checkout / "run_utils.py").read_bytes()
        blob = hashlib.sha1(b"blob %d\0" % len(source) + source).hexdigest()
        stamp = f'__vendored__ = "1.2.0 {blob}"'.encode()
        stamped = source.replace(b"__vendored__ = None", stamp)
        self.assertEqual((self.copy / "__init__.py").read_bytes(), stamped)

    def test_blob_id_is_the_one_git_gives(self) -> None:
        if not shutil.which("git"):
            self.skipTest("no git on PATH")
        self.vendor(self.package)
        argv = ["git", "hash-object", "--no-filters", "run_utils.py"]
        blob = subprocess.check_output(argv, cwd=self.checkout).strip()
        self.assertIn(blob, (self.copy / "__init__.py").read_bytes())

    def test_annotation_and_comment_of_the_stamp_line_stay(self) -> None:
        line = "__vendored__: str | None = None  # by vendor.sh\n"
        source = self.checkout / "run_utils.py"
        source.write_text(f'__version__ = "1.2.0"\n{line}', encoding="utf-8")
        self.vendor(self.package)
        text = (self.copy / "__init__.py").read_text(encoding="utf-8")
        pattern = r'\n__vendored__: str \| None = "1.2.0 \w{40}"  # by vendor.sh\n$'
        self.assertRegex(text, pattern)
        self.assertEqual(self.vendor("--check", self.package)[0], 0)

    def test_missing_last_newline_stays_missing(self) -> None:
        self.release("1.2.0", last_line="pass")
        self.vendor(self.package)
        self.assertTrue((self.copy / "__init__.py").read_bytes().endswith(b"\npass"))
        self.assertEqual(self.vendor("--check", self.package)[0], 0)

    def test_second_time_changes_nothing(self) -> None:
        self.vendor(self.package)
        before = [(self.copy / name).stat().st_ino for name in OURS]
        self.assertEqual(self.vendor(self.package), (0, "1.2.0 is current\n", ""))
        self.assertEqual([(self.copy / name).stat().st_ino for name in OURS], before)

    def test_other_files_stay(self) -> None:
        self.copy.mkdir()
        (self.copy / "notes.txt").write_text("mine", encoding="utf-8")
        (self.package / "__init__.py").write_text("mine", encoding="utf-8")
        self.vendor(self.package)
        self.assertEqual(self.contents()["notes.txt"], b"mine")
        self.assertEqual(len(list(self.package.iterdir())), 2)

    def test_files_can_be_read_by_colleagues(self) -> None:
        before = os.umask(0o027)
        self.addCleanup(os.umask, before)
        self.vendor(self.package)
        modes = {stat.S_IMODE((self.copy / name).stat().st_mode) for name in OURS}
        self.assertEqual(modes, {0o640})


@under_bash_too
class VendorUpdates(VendorCase):
    """An untouched copy of an earlier version is replaced, and the step is told."""

    def test_step_between_two_releases(self) -> None:
        self.vendor(self.package)
        self.release("1.10.0")
        self.assertEqual(self.vendor(self.package), (0, "1.2.0 -> 1.10.0\n", ""))
        self.assertEqual(self.vendor("--check", self.package)[0], 0)
        self.assertEqual(sorted(self.contents()), sorted(OURS))

    def test_step_between_two_states_of_one_release(self) -> None:
        self.vendor(self.package)
        self.release("1.2.0", last_line="print()\n")
        status, out, _ = self.vendor(self.package)
        self.assertEqual(status, 0)
        self.assertRegex(out, r"\A1\.2\.0 \w{7} -> 1\.2\.0 \w{7}\n\Z")

    def test_lost_file_is_put_back(self) -> None:
        self.vendor(self.package)
        (self.copy / "LICENSE").unlink()
        self.assertEqual(self.vendor(self.package)[0], 0)
        self.assertEqual(sorted(self.contents()), sorted(OURS))


@under_bash_too
class VendorRefuses(VendorCase):
    """Without --force no file is lost that vendor.sh did not write."""

    def test_edited_copy(self) -> None:
        self.vendor(self.package)
        self.release("1.3.0")
        path = self.edit("__init__.py")
        why = f"{path} was edited after 1.2.0 was copied"
        self.assert_refused(f"{why}; --force goes on, with a backup")

    def test_copy_whose_stamp_was_edited(self) -> None:
        self.vendor(self.package)
        path = self.copy / "__init__.py"
        text = path.read_text(encoding="utf-8").replace(' "1.2.0 ', ' "1.1.0 ', 1)
        path.write_text(text.replace('n__ = "1.2.0"', 'n__ = "1.1.0"'), "utf-8")
        why = f"{path} was edited after 1.1.0 was copied"
        self.assert_refused(f"{why}; --force goes on, with a backup")

    def test_ancestor_without_a_stamp(self) -> None:
        self.copy.mkdir()
        path = self.edit("__init__.py", "def run_context(): ...\n")
        why = f"{path} was not written by vendor.sh"
        self.assert_refused(f"{why}; --force goes on, with a backup")

    def test_edited_small_files(self) -> None:
        self.vendor(self.package)
        for name in ("LICENSE", "__main__.py"):
            path = self.edit(name)
            why = f"{path} was not written by vendor.sh"
            self.assert_refused(f"{why}; --force goes on, with a backup")
            path.unlink()

    def test_newer_copy(self) -> None:
        self.release("1.10.0")
        self.vendor(self.package)
        self.release("1.9.3")
        why = f"{self.copy / '__init__.py'} is 1.10.0, newer than 1.9.3"
        self.assert_refused(f"{why}; --force goes on, with a backup")

    def test_module_that_the_copy_would_hide(self) -> None:
        module = self.package / "run_utils.py"
        module.write_text("", encoding="utf-8")
        why = f"{module} would be hidden by a package of its name"
        sentence = f"vendor.sh: {why}; --force goes on, with a backup\n"
        self.assertEqual(self.vendor(self.package), (1, "", sentence))
        self.assertFalse(self.copy.exists())

    def test_things_in_the_way(self) -> None:
        self.copy.write_text("", encoding="utf-8")
        sentence = f"vendor.sh: {self.copy} is in the way: not a directory\n"
        self.assertEqual(self.vendor("--force", self.package), (1, "", sentence))
        self.copy.unlink()
        (self.copy / "__init__.py").mkdir(parents=True)
        path = self.copy / "__init__.py"
        sentence = f"vendor.sh: {path} is in the way: it is a directory\n"
        self.assertEqual(self.vendor("--force", self.package), (1, "", sentence))

    def test_package_that_cannot_be_written(self) -> None:
        self.vendor(self.package)
        self.release("1.3.0")
        self.copy.chmod(0o555)
        self.addCleanup(self.copy.chmod, 0o755)
        if os.access(self.copy, os.W_OK):
            self.skipTest("this user may write anywhere")
        self.assert_refused(f"cannot write {self.copy}")


@under_bash_too
class VendorForce(VendorCase):
    """--force replaces anything, and what was there stays in a numbered backup."""

    def test_edited_copy_is_kept_as_backup(self) -> None:
        self.vendor(self.package)
        edited = self.edit("__init__.py").read_bytes()
        self.release("1.3.0")
        kept = "kept __init__.py as __init__.py.bak-1\n"
        answer = self.vendor("--force", self.package)
        self.assertEqual(answer, (0, f"{kept}1.2.0 -> 1.3.0\n", ""))
        self.assertEqual(self.contents()["__init__.py.bak-1"], edited)
        self.assertEqual(self.vendor("--check", self.package)[0], 0)

    def test_older_backup_is_never_overwritten(self) -> None:
        self.vendor(self.package)
        for text in ("# one\n", "# two\n", "# three\n"):
            self.edit("__init__.py", text)
            self.vendor("--force", self.package)
        backups = [self.contents()[f"__init__.py.bak-{n}"] for n in (1, 2, 3)]
        lasts = [backup.splitlines()[-1] for backup in backups]
        self.assertEqual(lasts, [b"# one", b"# two", b"# three"])

    def test_foreign_newer_and_small_files(self) -> None:
        self.copy.mkdir()
        self.edit("__init__.py")
        out = self.vendor("--force", self.package)[1]
        self.assertTrue(out.endswith("unknown -> 1.2.0\n"), out)
        self.release("1.1.0")
        self.edit("LICENSE")
        out = self.vendor("--force", self.package)[1]
        self.assertTrue(out.endswith("1.2.0 -> 1.1.0\n"), out)
        backups = {"LICENSE.bak-1", "__init__.py.bak-1", "__init__.py.bak-2"}
        self.assertEqual(set(self.contents()) - set(OURS), backups)

    def test_nothing_to_force_leaves_no_backup(self) -> None:
        self.vendor(self.package)
        answer = self.vendor("--force", self.package)
        self.assertEqual(answer, (0, "1.2.0 is current\n", ""))
        self.assertEqual(sorted(self.contents()), sorted(OURS))


@under_bash_too
class VendorCheck(VendorCase):
    """--check writes nothing and tells a current copy from any other by its status."""

    def test_missing_current_old_and_incomplete(self) -> None:
        missing = self.vendor("--check", self.package)
        self.assertEqual(missing, (1, "none -> 1.2.0\n", ""))
        self.assertFalse(self.copy.exists())
        self.vendor(self.package)
        current = self.vendor("--check", self.package)
        self.assertEqual(current, (0, "1.2.0 is current\n", ""))
        self.release("1.3.0")
        old = self.vendor("--check", self.package)
        self.assertEqual(old, (1, "1.2.0 -> 1.3.0\n", ""))
        self.release("1.2.0")
        (self.copy / "__main__.py").unlink()
        sentence = f"vendor.sh: {self.copy / '__main__.py'} is missing\n"
        self.assertEqual(self.vendor("--check", self.package), (1, "", sentence))

    def test_edited_and_newer(self) -> None:
        self.vendor(self.package)
        path = self.copy / "__init__.py"
        self.release("1.1.0")
        newer = f"{path} is 1.2.0, newer than 1.1.0"
        self.assert_refused(newer, "--check", self.package)
        self.edit("__init__.py")
        edited = f"{path} was edited after 1.2.0 was copied"
        self.assert_refused(edited, "--check", self.package)


@under_bash_too
class VendorUsage(VendorCase):
    """Wrong usage is one sentence and status 2."""

    def assert_misused(self, sentence: str, *argv: str | Path) -> None:
        text = f"vendor.sh: {sentence}; see vendor.sh --help\n"
        self.assertEqual(self.vendor(*argv), (2, "", text))

    def test_sentences(self) -> None:
        self.assert_misused("PACKAGE_DIR is missing")
        self.assert_misused("PACKAGE_DIR is missing", "--check")
        self.assert_misused("no such directory: ''", "")
        self.assert_misused("no such directory: 'nowhere'", "--force", "nowhere")
        self.assert_misused("one PACKAGE_DIR is wanted, not 2", "a", "b")
        self.assert_misused("unknown option '--ceck'", "--ceck", self.package)
        self.assertEqual(list(self.package.iterdir()), [])

    def test_help(self) -> None:
        status, out, err = self.vendor("--help")
        self.assertEqual((status, err), (0, ""))
        self.assertIn("usage: vendor.sh [--check | --force] PACKAGE_DIR\n", out)


@under_bash_too
class VendorRunsAnywhere(VendorCase):
    """Paths, the current directory and absent programs do not matter."""

    def test_relative_script_and_package(self) -> None:
        answer = self.vendor(".", cwd=self.package, script="../../check out/vendor.sh")
        self.assertEqual(answer, (0, "none -> 1.2.0\n", ""))
        here = self.checkout
        answer = self.vendor("--check", self.package, cwd=here, script="vendor.sh")
        self.assertEqual(answer, (0, "1.2.0 is current\n", ""))

    def test_through_symbolic_links(self) -> None:
        (self.checkout / "link.sh").symlink_to("vendor.sh")
        (self.folder / "v.sh").symlink_to(self.checkout / "link.sh")
        answer = self.vendor(self.package, script="v.sh")
        self.assertEqual(answer, (0, "none -> 1.2.0\n", ""))

    def test_names_with_a_dash_a_space_and_a_newline(self) -> None:
        for name in ("-n", "a  b", "new\nline\n"):
            (self.folder / name).mkdir()
            answer = self.vendor("--", name)
            self.assertEqual(answer, (0, "none -> 1.2.0\n", ""), name)
            self.assertTrue((self.folder / name / "run_utils" / "LICENSE").exists())

    def programs(self, *left_out: str) -> dict[str, str]:
        """Return an environment whose PATH has only what vendor.sh needs."""
        folder = self.folder / "bin"
        folder.mkdir()
        for name in sorted({*VENDOR_PROGRAMS} - {*left_out}):
            if shutil.which(name):
                (folder / name).symlink_to(shutil.which(name) or "")
        return {"PATH": str(folder)}

    def test_without_git_and_python(self) -> None:
        answer = self.vendor(self.package, env=self.programs())
        self.assertEqual(answer, (0, "none -> 1.2.0\n", ""))

    def test_without_a_program_for_sha1(self) -> None:
        env = self.programs("sha1sum", "shasum")
        sentence = "sha1sum or shasum is needed, and neither is on PATH"
        answer = self.vendor(self.package, env=env)
        self.assertEqual(answer, (1, "", f"vendor.sh: {sentence}\n"))

    def test_without_its_source(self) -> None:
        (self.checkout / "run_utils.py").unlink()
        sentence = "vendor.sh: run_utils.py is not beside vendor.sh\n"
        self.assertEqual(self.vendor(self.package), (1, "", sentence))


class VendoredCopyWorks(VendorCase):
    """A copy of the real file answers under its own name."""

    def setUp(self) -> None:
        super().setUp()
        shutil.copy(CHECKOUT / "run_utils.py", self.checkout)
        self.package = self.folder / "src" / "pkg"
        self.copy = self.package / "run_utils"
        self.package.mkdir()
        (self.package / "__init__.py").touch()
        self.vendor(self.package)

    def module(self, *argv: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-B", "-m", "pkg.run_utils", *argv],
            cwd=self.folder / "src",
            capture_output=True,
            encoding="utf-8",
            check=False,
        )

    def test_stamped_line_is_no_longer_than_the_others(self) -> None:
        lines = (self.copy / "__init__.py").read_text(encoding="utf-8").splitlines()
        self.assertLessEqual(max(map(len, lines)), 88)

    def test_version(self) -> None:
        done = self.module("--version")
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        self.assertIn(run_utils.__version__, done.stdout)

    def test_inspect(self) -> None:
        code = "from pkg.run_utils import run_context\nwith run_context('runs'): pass\n"
        argv = [sys.executable, "-B", "-c", code]
        subprocess.run(argv, cwd=self.folder / "src", check=True)
        (run_dir,) = (self.folder / "src").glob("runs/*/metadata.json")
        done = self.module("inspect", str(run_dir.parent))
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        self.assertIn(run_dir.parent.name, done.stdout)

    def test_program_name_is_the_copy_s(self) -> None:
        done = self.module("--no-such-option")
        self.assertEqual(done.returncode, 2)
        self.assertIn("python -m pkg.run_utils", done.stderr)


# === The closing line ===


class CountingResult(unittest.TextTestResult):
    """Counts what passed: testsRun means other things in other versions."""

    passed = 0

    def addSuccess(self, test: unittest.TestCase) -> None:
        super().addSuccess(test)
        self.passed += 1

    def addExpectedFailure(self, test: unittest.TestCase, err: Any) -> None:
        super().addExpectedFailure(test, err)
        self.passed += 1


class CountingRunner(unittest.TextTestRunner):
    """Runs classes side by side; ends with what was skipped and a line of counts."""

    def __init__(self, **options: Any) -> None:
        options["resultclass"] = CountingResult
        # With stderr closed, what calls us may hand in a descriptor to report on.
        if sys.stderr is None:
            descriptor = os.environ.get("RUN_UTILS_TEST_FD")
            report: Any = int(descriptor) if descriptor else os.devnull
            options["stream"] = open(report, "w", encoding="utf-8")  # noqa: SIM115
        super().__init__(**options)

    def run(self, test: Any) -> Any:
        classes = list(test)
        workers = min(2, len(classes)) if hasattr(os, "fork") else 1
        if workers > 1:
            shares = [unittest.TestSuite(classes[n::workers]) for n in range(workers)]
            children = [self.start(share) for share in shares]
            reports = [self.collect(*child) for child in children]
        else:
            reports = [self.report(super().run(test))]
        for name, reason in [pair for report in reports for pair in report["skipped"]]:
            self.stream.write(f"SKIP {name}: {reason}\n")
        passed, failed = (sum(r[key] for r in reports) for key in ("passed", "failed"))
        skipped = sum(len(report["skipped"]) for report in reports)
        self.stream.write(f"{passed} passed, {failed} failed, {skipped} skipped\n")
        self.stream.flush()
        return types.SimpleNamespace(wasSuccessful=lambda: not failed, testsRun=1)

    def report(self, result: Any) -> dict[str, Any]:
        lost = result.failures + result.errors + result.unexpectedSuccesses
        skipped = [(case.id(), reason) for case, reason in result.skipped]
        skipped = [(name.replace("__main__.", ""), why) for name, why in skipped]
        return {"passed": result.passed, "failed": len(lost), "skipped": skipped}

    def start(self, share: unittest.TestSuite) -> tuple[int, Any]:
        """Run tests in a child, which is nobody's parent when they begin."""
        said = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115
        self.stream.flush()
        pid = os.fork()
        if pid == 0:
            result = super().run(share)
            self.stream.flush()
            json.dump(self.report(result), said)
            said.flush()
            os._exit(0)
        return pid, said

    def collect(self, pid: int, said: Any) -> dict[str, Any]:
        os.waitpid(pid, 0)
        with said:
            said.seek(0)
            text = said.read()
        lost = {"passed": 0, "failed": 1, "skipped": [["all tests", "a worker died"]]}
        report: dict[str, Any] = json.loads(text) if text else lost
        return report


if __name__ == "__main__":
    unittest.main(testRunner=CountingRunner)
