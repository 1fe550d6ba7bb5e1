#!/usr/bin/env python3
# SPDX-FileCopyrightText: 2026 the run_utils authors
# SPDX-License-Identifier: MIT
"""Tests of run_utils, in the order of its sections: `python3 test_run_utils.py`.

Needs nothing but Python. What this machine lacks (git, PyYAML, dash, ...) is skipped
by name. External programs are stub scripts on PATH; the real ones are tried as well.
"""

from __future__ import annotations

import argparse
import array
import ast
import base64
import collections
import contextlib
import datetime
import decimal
import enum
import fractions
import functools
import glob
import hashlib
import html.parser
import io
import itertools
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
from collections.abc import Callable
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


def setUpModule() -> None:
    global PYTHON, CACHE
    # A job of `&` ignores Ctrl-C, one of nohup SIGHUP; so would all that we start.
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
        before = signal.signal(number, signal.default_int_handler)
        unittest.addModuleCleanup(signal.signal, number, before)
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

    UNWRITABLE = ("2>&-", "2>/dev/full", "2>&9")  # 9 is a pipe that nobody reads

    def redirected(self, words: list[str], redirect: str) -> tuple[int, str]:
        """Return the exit status of a command of a shell, and what it printed."""
        reader, writer = os.pipe()
        os.close(reader)
        command = f"exec 9>&0; exec {shlex.join(words)} </dev/null {redirect}"
        done = subprocess.run(
            ["sh", "-c", command], env=self.environment(), stdin=writer,
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=60, text=True,
        )  # fmt: skip
        os.close(writer)
        return done.returncode, done.stdout

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

    def wait_until(self, holds: Callable[[], object], what: str) -> Any:
        """Return the first true value of `holds()`; fail after a long while."""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            with contextlib.suppress(AssertionError, LookupError, ValueError, OSError):
                value = holds()
                if value:
                    return value
            time.sleep(0.02)
        self.fail(f"it never happened: {what}")

    def wait_for_status(self, status: str) -> dict[str, Any]:
        """Return status.json once it says `status`."""

        def facts() -> dict[str, Any] | None:
            found = self.json("status.json")
            return found if found["status"] == status else None

        found: dict[str, Any] = self.wait_until(facts, f"status.json: {status!r}")
        return found


# === Settings ===


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

    def setUp(self) -> None:
        super().setUp()
        if not (self.README.exists() and shutil.which("sh")):
            self.skipTest("needs README.md beside the tests, and a shell")

    def blocks(self, language: str) -> list[str]:
        text = self.README.read_text("utf-8")
        return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)

    def shell(self, lines: str, **more: str) -> str:
        path = os.path.dirname(PYTHON) + os.pathsep + os.environ["PATH"]
        env = {**self.environment({"PATH": path, "PYTHONPATH": ""}), **more}
        done = subprocess.run(
            ["sh", "-ec", lines], env=env, capture_output=True, encoding="utf-8"
        )
        self.assertEqual(done.returncode, 0, done.stderr)
        return done.stdout

    def test_every_line_of_python(self) -> None:
        Path("src/mypkg").mkdir(parents=True)
        Path("src/mypkg/__init__.py").touch()
        vendor = self.blocks("sh")[1].replace("path/to", f"sh {HERE}")
        self.shell(vendor)
        places = {"PYTHONPATH": f"{HERE}{os.pathsep}{self.tmp / 'src'}"}
        examples = self.blocks("python")
        self.assertGreater(len(examples), 5)
        for example in examples:
            with self.subTest(example):
                done = self.script(example, env=places)
                self.assertEqual((done.returncode, done.stderr), (0, ""))
        run = run_utils.find_runs("results/demo")[0]
        self.assertEqual((run["config.lr"], run.best("loss", "min")), (0.1, (1 / 3, 2)))
        (named,) = run_utils.find_runs("results/named")
        self.assertIn("org_small-lr0.1-", named["name"])
        self.assertEqual(named["tags"], ["canonical"])

    def test_the_lines_of_the_shell(self) -> None:
        shutil.copy(SOURCE, self.tmp)
        said = self.shell(self.blocks("sh")[0])
        self.assertTrue(said.startswith("hello\nrun       "), said)
        self.assertIn("lr: 0.1", said)
        self.assertRegex(said, r"\nrun +status .*\ndemo/python3-\d+-\d+ +success ")
        page = Path("report.html").read_text("utf-8")
        self.assertTrue(page.startswith("<!DOCTYPE html>"), page[:100])

    # What stands for a value in the table of commands.
    WORDS: ClassVar[dict[str, str]] = {
        "CMD ...": "python3 -c 'print(1)' --lr 0.1",
        "RUN [RUN]": "latest latest",
        "RUN...": "latest",
        "RUN": "latest",
        "ROOT": "results",
        "filters": "--status success",
        "DIR": "again",
        "D": "results/runs",
        "P": "named-{lr}",
        "FILE": "config.json",
        "T": "text",
    }

    def test_every_line_of_the_table_of_commands(self) -> None:
        shutil.copy(SOURCE, self.tmp)
        Path("config.json").write_text('{"seed": 1}', "ascii")
        pattern = "|".join(rf"(?<![\w-]){re.escape(word)}(?!\w)" for word in self.WORDS)
        text = self.README.read_text("utf-8")
        lines = re.findall(r"^python -m run_utils .*", text, re.M)
        self.assertGreater(len(lines), 12)
        for line in lines:
            words = re.sub(pattern, lambda match: self.WORDS[match[0]], line)
            words = re.sub(r"[\[\]]", "", words.partition("   ")[0])
            if GIT is None and re.search(r" (reproduce|verify) ", words):
                continue
            with self.subTest(words):
                self.shell(words.replace("python ", "python3 ", 1))
        self.assertEqual(Path("again").is_dir(), GIT is not None)

    def test_every_setting_that_is_named(self) -> None:
        text = self.README.read_text("utf-8")
        table = text.partition("\n| setting |")[2].partition("\n\n")[0]
        names = re.findall(r"`([A-Z_]+)`", table)
        self.assertGreater(len(names), 9)
        self.assertEqual([n for n in names if not hasattr(run_utils, n)], [])


class SettingsOfTheProgram(RunCase):
    """A setting that the program assigns before entry holds in the recorder too."""

    @unittest.skipUnless(GIT, "git is not installed")
    def test_a_limit_of_the_patch_is_told_to_the_recorder(self) -> None:
        body = """
        import run_utils
        run_utils.MAX_LISTED = 3
        with run_context("results/exp", "exp"):
            pass
        """
        git = ["git", "-c", "user.name=x", "-c", "user.email=x@example.org"]
        subprocess.run([*git, "init", "-q"], check=True)
        subprocess.run([*git, "commit", "-qm", "x", "--allow-empty"], check=True)
        for number in range(6):
            Path(f"file{number}.txt").touch()
        self.script(body)
        self.assertEqual(len(self.json("metadata.json")["git"]["untracked"]), 3)


# === Recording a run ===


class ARunDirectory(RunCase):
    """run_context leaves one directory with config, metadata, status and folders."""

    def test_everything_is_there_after_the_block(self) -> None:
        done = self.in_context("print('hello')")
        self.assertEqual(
            (done.returncode, done.stdout, done.stderr), (0, "hello\n", "")
        )
        names = {path.name for path in self.run_dir().iterdir()}
        files = {"config.yaml", "metadata.json", "status.json"}
        files.add("git.patch")  # the script, since it is in no repository
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
        log_metrics(run_dir, {"loss": 1})
        capture_metadata(run_dir)
        mark_status(run_dir, "success", exit_reason="normal", extra={"best": 3})
        """
        done = self.script(body)
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        status = self.json("status.json")
        self.assertEqual((status["status"], status["best"]), ("success", 3))
        self.assertGreaterEqual(status["duration_seconds"], 0)
        metadata = self.json("metadata.json")
        self.assertIsInstance(metadata["pip_freeze"], list)
        self.assertEqual(metadata["config"]["lr"], 0.1)
        self.assertEqual([row["event"] for row in self.index()], ["start", "end"])

    def test_a_config_by_hand_is_read_without_pyyaml(self) -> None:
        """metadata.json has it, also of a run for which nothing else is captured."""
        run = run_utils.start_run("results/exp", "exp", config_args={"lr": 0.1})
        metadata = json.loads((run / "metadata.json").read_text())
        self.assertEqual(metadata["config"]["lr"], 0.1)
        self.assertEqual(run_utils.load_run(run)["config.lr"], 0.1)
        done = self.command("verify", str(run))
        self.assertEqual((done.returncode, done.stdout), (2, ""))
        self.assertRegex(done.stderr, "has no metadata.json with its command\n$")

    @unittest.skipUnless(LINUX, "descriptors are counted in /proc")
    def test_runs_by_hand_leave_no_descriptor(self) -> None:
        body = """
        before = len(os.listdir("/proc/self/fd"))
        for number in range(30):
            run_dir = start_run("results/exp", "exp")
            log_metrics(run_dir, {"loss": 1})
            log_metrics(str(run_dir), {"loss": 2})
            log_metrics(os.path.relpath(run_dir), {"loss": 3})
            mark_status(run_dir, "success")
        print(len(os.listdir("/proc/self/fd")) - before)
        """
        self.assertEqual(self.script(body).stdout, "0\n")

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


class NamesFromValues(RunCase):
    """{key} in a prefix is filled from the config."""

    def test_a_prefix_is_filled(self) -> None:
        config = {"model": "org/Model", "optim": {"lr": 0.1}}
        prefix = "{model}-lr{optim.lr}"
        context = run_utils.run_context(
            "exp", prefix, config, capture_output=False, resources=False
        )
        with context as run_dir:
            self.assertTrue(run_dir.name.startswith("org_Model-lr0.1-"), run_dir)

    def test_an_unknown_key_raises_before_anything_is_created(self) -> None:
        with self.assertRaises(ValueError) as caught:
            run_utils.run_context("exp", "a-{b}", {"c": 1}).__enter__()
        sentence = "run_prefix 'a-{b}' has '{b}', which is no key of config_args (c)"
        self.assertEqual(str(caught.exception), sentence)
        with self.assertRaises(ValueError):
            run_utils.start_run("exp", "a-{}", config_args={"c": 1})
        self.assertFalse(Path("exp").exists())

    def name(self, prefix: str, config: Any) -> str:
        run_dir = run_utils.start_run("exp", prefix, False, config_args=config)
        return re.sub(r"-\d{8}-\d{6}(-\d+)?$", "", run_dir.name)

    def test_odd_values(self) -> None:
        self.assertEqual(self.name("{a}", {"a": "../x/e\n\0"}), "_x_e__")
        self.assertEqual(self.name("lr{lr}", {"lr": 3e-7}), "lr3e-07")
        self.assertEqual(self.name("{a.b}", {"a": {"b": None}}), "None")
        self.assertEqual(self.name("{a}-{b}", {"a": "{b}", "b": 1}), "_b_-1")

    def test_what_follows_a_long_value_stays(self) -> None:
        for long in ("x" * 300, "漢" * 300):
            name = self.name("{a}-lr{lr}", {"a": long, "lr": 0.1})
            self.assertTrue(name.endswith("-lr0.1"), name)
            self.assertLessEqual(len(name.encode()), run_utils.MAX_PREFIX_BYTES)

    def test_no_secret_is_in_a_name(self) -> None:
        body = """
        config = {"api_key": "sk" + "A1b2C3d4" * 4, "same": os.environ["X_TOKEN"]}
        with run_context("results/exp", "{api_key}-{same}", config):
            pass
        """
        done = self.script(body, env={"X_TOKEN": "ghp_" + "A" * 36})
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertIn("_REDACTED_-_REDACTED_-", self.run_dir().name)


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

    def test_a_metric_called_time_or_step_is_kept_beside_ours(self) -> None:
        run_utils.log_metrics(self.tmp, {"time": 1, "step": 2, "x": 3}, step=7)
        (row,) = self.rows()
        self.assertEqual((row["step"], row["step (2)"]), (7, 2))
        self.assertEqual((row["time (2)"], row["x"]), (1, 3))
        self.assertGreater(row["time"], 1e9)

    def test_a_torn_line_is_repaired(self) -> None:
        (self.tmp / "metrics").mkdir()
        (self.tmp / "metrics" / "metrics.jsonl").write_text('{"step": 1, "lo', "utf-8")
        run_utils.log_metrics(self.tmp, {"loss": 1})
        lines = (self.tmp / "metrics" / "metrics.jsonl").read_text("utf-8").splitlines()
        self.assertEqual(json.loads(lines[1])["loss"], 1)

    def test_a_relative_path_means_the_folder_that_we_are_in(self) -> None:
        for name in ("a", "b"):
            (self.tmp / name).mkdir()
            os.chdir(self.tmp / name)
            run_utils.log_metrics(".", {"loss": 1})
            run_utils.log_metrics(Path(), {"loss": 2})
        os.chdir(self.tmp)
        for name in ("a", "b"):
            rows = run_utils._read_lines(f"{name}/metrics/metrics.jsonl")
            self.assertEqual([row["loss"] for row in rows], [1, 2])

    def test_many_runs_that_nobody_ends_leave_few_files_open(self) -> None:
        done = self.script("""
        run_dirs = [start_run("results/exp", "exp") for _ in range(60)]
        for number in range(2):
            for run_dir in run_dirs:
                log_metrics(run_dir, {"x": number})
        print(len(os.listdir("/dev/fd")) < 60)
        for run_dir in run_dirs:
            rows = open(run_dir / "metrics/metrics.jsonl").read().count("\\n")
            assert rows == 2, rows
        """)
        self.assertEqual((done.stdout, done.stderr), ("True\n", ""))

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
        body = """
        os.makedirs("metrics/metrics.jsonl")
        log_metrics(".", {"x": 1})
        """
        done = self.script(body)
        self.assertEqual(done.returncode, 0)
        self.assertIn("run_utils: metrics.jsonl: ", done.stderr)


# === Reading runs ===


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
            text = json.dumps({**known, **facts.get(file, {})}, indent=2)
            (path / f"{file}.json").write_text(text, "utf-8")
        lines = {"metrics/metrics.jsonl": "metrics", "notes.jsonl": "notes"}
        for file, key in lines.items():
            if key in facts:
                text = "".join(json.dumps(row) + "\n" for row in facts[key])
                (path / file).write_text(text, "utf-8")
        return path

    def start(self, utc: str, **more: Any) -> dict[str, Any]:
        """Return the part of status.json that tells when a run was started."""
        return {"started_utc": utc, **more}

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

    def names(self, **options: Any) -> list[str]:
        """Return the names of what find_runs returns, which says nothing on stderr."""
        with contextlib.redirect_stderr(io.StringIO()) as said:
            runs = run_utils.find_runs("results", **options)
        self.assertEqual(said.getvalue(), "")
        return [run["name"] for run in runs]

    def said(self, **options: Any) -> str:
        """Return what find_runs says on stderr."""
        with contextlib.redirect_stderr(io.StringIO()) as said:
            run_utils.find_runs("results", **options)
        return said.getvalue()


class FindingRuns(ReadingCase):
    """find_runs returns the runs that were asked for, newest first."""

    def setUp(self) -> None:
        super().setUp()
        for day in (1, 3, 2):
            status = "failed" if day == 2 else "success"
            start = self.start(f"2026-01-0{day}T00:00:00Z", status=status)
            config = {"lr": day / 10, "same": 1, "command": str(day)}
            rows = [{"step": 1, "time": 1, "loss": 1.0 / day}]
            name = f"exp/train-2026010{day}-000000"
            self.make_run(name, config=config, status=start, metrics=rows)
        (self.tmp / "results/exp/train-20260103-000000/figure.png").touch()
        for run in self.run_dirs()[:2]:
            (run / "metrics" / "metrics.jsonl").unlink()

    def test_filters_and_order(self) -> None:
        third, second, first = (f"train-2026010{day}-000000" for day in (3, 2, 1))
        everything = [third, second, first]
        cases: list[tuple[dict[str, Any], list[str]]] = [
            ({}, everything),
            ({"status": "failed"}, [second]),
            ({"where": "lr>=0.2"}, [third, second]),
            ({"since": "2026-01-02"}, [third, second]),
            ({"since": "1d"}, []),
            ({"older": "2026-01-02T00:00:00Z"}, [first]),
            ({"contains": "0102"}, [second]),
            ({"contains": "EXP/train"}, everything),
            ({"has_outputs": True}, [third]),
            ({"sort": "lr"}, [first, second, third]),
            ({"sort": "age", "limit": 1}, [third]),
            ({"where": "run~0102 and time<=60 and age>60"}, [second]),
            ({"sort": "-lr", "limit": 2}, [third, second]),
            ({"sort": '-"lr"', "limit": 1}, [third]),
            ({"sort": 'max("loss")', "top": 1}, [third]),
            ({"sort": "loss"}, everything),
            ({"sort": "loss", "top": 2}, [third]),
            ({"limit": 1}, [third]),
        ]
        for options, expected in cases:
            with self.subTest(options):
                self.assertEqual(self.names(**options), expected)
        self.assertEqual(self.rows("--sort=-lr", "-n", "2"), [third, second])
        twice = ["--where", "lr=0.1 or lr=0.3", "--where", "lr=0.3 or lr=0.2"]
        self.assertEqual(self.rows(*twice), [third])

    def test_a_key_status_or_tag_that_no_run_has_is_said(self) -> None:
        for options, sentence in (
            ({"where": "lrr<1"}, "no run has 'lrr'; did you mean 'lr'?"),
            ({"sort": "-max(los)"}, "no run has 'max(los)'; did you mean 'loss'?"),
            (
                {"status": "sucess"},
                "no run has the status 'sucess'; there are: failed, ",
            ),
            ({"tag": "x"}, "no run has the tag 'x'"),
        ):
            with self.subTest(options):
                self.assertIn(f"run_utils: {sentence}", self.said(**options))
        self.assertEqual(self.said(where="acc==null"), "")
        self.assertEqual(self.said(status="running"), "")

    def test_a_key_of_the_config_with_the_name_of_one_of_ours(self) -> None:
        self.make_run(
            "exp/x",
            config={"name": "big", "metrics": {"loss": 7}},
            metrics=[{"step": 1, "loss": 2}],
        )
        sentence = "run_utils: 'name' is not of the config; that is 'config.name'\n"
        self.assertEqual(self.said(where="name=big"), sentence)
        self.assertEqual(self.names(where="config.name=big"), ["x"])
        self.assertEqual(self.said(where="status=lost"), "")
        self.assertEqual(self.names(where="metrics.loss=2"), ["x"])
        self.assertEqual(self.names(where="metrics.loss=7"), [])
        _, out, _ = self.ask("list", "--over", "seed", "--json", "--where", "loss=2")
        self.assertEqual(json.loads(out)[0]["metrics.loss"], 2)

    def test_mistakes_raise(self) -> None:
        for options, sentence in (
            ({"since": "x"}, "since 'x' is no time; give '12h', '7d' or '2026-01-31'"),
            ({"older": "2026-13"}, "older '2026-13' is no time; "),
            ({"older": "2026-02-30"}, "older '2026-02-30' is no time; "),
            ({"top": 3}, "top is of a value; give one as sort='-max(KEY)'"),
            ({"limit": -1}, "limit is -1; give 0 for all, or a number"),
            ({"sort": "-"}, "'' is no key; give one such as 'lr' or 'max(acc)'"),
        ):
            with self.subTest(options), self.assertRaises(ValueError) as caught:
                run_utils.find_runs("results", **options)
            self.assertTrue(str(caught.exception).startswith(sentence))

    def test_a_folder_that_is_not_there_is_said(self) -> None:
        shutil.rmtree("results")
        self.assertIn("results' cannot be read: No such file", self.said())

    def test_a_row_for_pandas(self) -> None:
        (run, *_) = run_utils.find_runs("results", where="lr==0.3")
        self.assertEqual((run["config.lr"], run["metrics.loss"]), (0.3, 1 / 3))
        self.assertEqual((run["duration_seconds"], run["attempts"]), (60, 1))
        self.assertEqual((run["reason"], run["script_name"]), (None, "train"))
        self.assertNotIn("config.command", run)
        self.assertNotIn("metadata", vars(run))  # of 10,000 runs that is too much
        self.assertTrue(all(isinstance(key, str) for key in run))

    def test_a_copy_in_another_process(self) -> None:
        import copy
        import pickle

        (run, *_) = run_utils.find_runs("results")
        for again in (pickle.loads(pickle.dumps(run)), copy.copy(run)):
            self.assertEqual((again, again.path), (run, run.path))

    def test_a_notebook_shows_tables(self) -> None:
        config = {"<b>": "<script>", "n": 1}
        self.make_run(
            "exp/odd", config=config, status=self.start("2026-02-01T00:00:00Z")
        )
        runs = run_utils.find_runs("results")
        for table in (runs._repr_html_(), runs[0]._repr_html_()):  # type: ignore[attr-defined]
            self.assertIn("<table", table)
            self.assertIn("odd</td>", table)
            self.assertNotIn("<script>", table)
        config_of_one = runs[0]._repr_html_()
        self.assertIn("<th>n</th>", config_of_one)
        self.assertIn("<td>&lt;script&gt;</td>", config_of_one)


class WhatARunSays(ReadingCase):
    """Every attribute of a Run is true, and NaN and infinities are floats."""

    def test_numbers_that_are_not_finite(self) -> None:
        rows = [
            {"step": 1, "loss": "NaN", "acc": "Infinity", "big": float("nan")},
            {"step": 2, "loss": "NaN", "acc": "-Infinity", "big": 2},
        ]
        run = Run(self.make_run("exp/a", config={"clip": "Infinity"}, metrics=rows))
        self.assertEqual(run["config.clip"], math.inf)
        self.assertTrue(math.isnan(run["metrics.loss"]))
        self.assertTrue(math.isnan(run.summary["loss"]["max"]))
        self.assertEqual(run.summary["acc"]["max"], math.inf)
        self.assertEqual(run.best("acc", "max"), (math.inf, 1))
        self.assertEqual(
            (run.best("big", "min"), run.summary["big"]["count"]), ((2, 2), 2)
        )
        self.assertTrue(math.isnan(run.best("loss", "min")[0]))
        self.assertTrue(math.isnan(run.best("nothing", "min")[0]))
        with self.assertRaisesRegex(ValueError, "best is 'top'; give 'min' or 'max'"):
            run.best("acc", "top")

    def test_series_and_best(self) -> None:
        rows = [
            {"step": n, "time": 1.0, "acc": value} for n, value in enumerate([1, 3, 2])
        ]
        rows.append({"step": None, "time": 1.0, "note": "é", "deep": {"x": 1}})
        run = Run(self.make_run("exp/a", metrics=rows))
        self.assertEqual(run.series("acc"), [(0, 1), (1, 3), (2, 2)])
        self.assertEqual(run.series("deep.x"), [(None, 1)])
        self.assertEqual(run.series("nothing"), [])
        self.assertEqual(
            (run.best("acc", "max"), run.best("acc", "min")), ((3, 1), (1, 0))
        )
        self.assertEqual((run["metrics.acc"], run["metrics.note"]), (2, "é"))

    def test_inputs_used_by_outputs_and_attempts(self) -> None:
        self.script("""
        with run_context("results/exp", "a") as a:
            (a / "artifacts" / "m.pt").write_text("x")
            (a / "figure.png").write_text("xy")
        with run_context("results/exp", "b", {"init": str(a / "artifacts/m.pt")}) as b:
            pass
        with run_context("results/exp", run_dir=b):
            mark_artifact_used(a / "figure.png", reason="looks good")
        """)
        b, a = run_utils.find_runs("results")
        used = [f"{a.path.name}/figure.png"]
        self.assertEqual((b.inputs, a.inputs), (used, []))
        self.assertEqual((a.used_by, b.used_by), ([b.path.name], []))
        self.assertEqual(a.outputs, {"artifacts/m.pt": 1, "figure.png": 2})
        self.assertEqual((len(b.attempts), b["attempts"]), (1, 2))
        self.assertEqual([b.attempts[0]["status"], a.attempts], ["success", []])
        self.assertEqual(run_utils.load_run(a.path / "logs").path, a.path)
        for path in (self.tmp / "results", self.tmp / "nothing"):
            sentence = f"{str(path)!r} is not in a run directory"
            with self.assertRaises(ValueError) as caught:
                run_utils.load_run(path)
            self.assertEqual(str(caught.exception), sentence)

    def test_records_of_version_1_and_of_the_ancestors(self) -> None:
        old = self.make_run("exp/old-20250101-000000")
        facts = {"status.json": '{"status": "failed", "exit_reason": "x"}'}
        facts["metadata.json"] = '{"timestamp_utc": "2025-01-01T00:00:00Z"}'
        facts["config.yaml"] = "lr: 0.1\ncommand: python old.py\n"
        for name, text in facts.items():
            (old / name).write_text(text, "utf-8")
        run = Run(old)
        found = [
            run[key] for key in ("status", "exit_reason", "started_utc", "script_name")
        ]
        self.assertEqual(found, ["failed", "x", "2025-01-01T00:00:00Z", "old"])
        if "config.lr" in run:
            self.assertEqual(run["config.lr"], 0.1)
        with mock.patch.dict(sys.modules, {"yaml": None}):
            (problem,) = Run(old).problems
        self.assertIn("config.yaml' cannot be read: ", problem)
        self.assertIn("PyYAML", problem)

    @unittest.skipIf(sys.platform == "win32", "needs users")
    def test_permission_denied_is_said_as_that(self) -> None:
        run = self.make_run("exp/a")
        self.assertEqual(Run(run).problems, [])
        os.chmod(run / "metadata.json", 0)
        other = self.make_run("exp/b", metrics=[{"step": 1, "loss": 2}])
        summary = run_utils._summarize_metrics(other)
        run_utils.save_json(other / "metrics/summary.json", summary)
        os.chmod(other / "metrics/metrics.jsonl", 0)
        noted = self.make_run("exp/c", notes=[{"text": "x"}])
        os.chmod(noted / "notes.jsonl", 0)
        closed = self.tmp / "results" / "closed"
        closed.mkdir(mode=0)
        self.addCleanup(os.chmod, closed, 0o755)
        for folder in (self.tmp, self.tmp / "results"):
            os.chmod(folder, 0o755)
        me = os.geteuid()
        if me == 0:
            os.seteuid(65534)
            self.addCleanup(os.seteuid, me)
        (problem,) = Run(run).problems
        path = str(run / "metadata.json")
        self.assertEqual(problem, f"{path!r} cannot be read: permission denied")
        self.assertEqual(run_utils._why_it_stays(Run(run)), problem)
        for path, find in ((run, run_utils._Plan), (closed, run_utils._find_run)):
            with self.subTest(path):
                with self.assertRaisesRegex(ValueError, "' cannot be read: permission"):
                    find(str(path))
        known = Run(other)
        self.assertEqual((known["metrics.loss"], known.series("loss")), (2, []))
        self.assertIn("metrics.jsonl' cannot be read: perm", known.problems[0])
        self.assertIn("notes.jsonl' cannot be read: perm", Run(noted).problems[0])


# === A recording ===

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
        self.assertNotIn("machine", self.command("diff", "latest").stdout)
        self.in_context(body.replace("42", "43"))
        first, second = map(str, self.run_dirs())
        done = self.command("diff", first, second)
        self.assertIn("machine   torch_seed: 42 -> 43\n", done.stdout)

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
        self.wait_for_status("success")

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
        self.assertEqual((done.returncode, done.stdout), (0, "False\n"))
        for line in done.stderr.splitlines():
            self.assertIn("is not logged: a run in another thread", line)
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
            got = yield x
            return (yield got)
        @run_context("results/exp", "exp")
        async def stream(x):
            got = yield x
            try:
                yield got
            except KeyError:
                yield "caught"
            finally:
                print("in the run" * ("RUN_DIR" in os.environ))
        async def use():
            items = stream(5)
            first = await items.__anext__()
            second = await items.asend(6)
            third = await items.athrow(KeyError("k"))
            await items.aclose()
            return first, second, third
        early = generator(0)
        next(early)
        early.close()
        print(plain(1), plain(2), asyncio.run(coroutine(3)), list(generator(4)))
        print(*asyncio.run(use()))
        """
        done = self.script(body)
        said = ["1 2 3 [4, None]", "in the run", "5 6 caught"]
        self.assertEqual(done.stdout.splitlines(), said)
        self.assertEqual(done.stderr, "")
        found = [json.loads((run / "status.json").read_text("ascii"))["status"]
                 for run in self.run_dirs()]  # fmt: skip
        self.assertEqual(found, ["success"] * 6)

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
        for again in (first, first.name):
            with run_context("results/exp", resume=again) as run_dir:
                print(run_dir == first)
        try:
            run_context("results/exp", "exp", resume="latest").__enter__()
        except ValueError as error:
            print(str(error).partition("', ")[2])
        mark_status(first, "failed")
        with run_context("results/exp", "other"): pass
        with run_context("results/exp", "exp", resume="latest") as run_dir:
            print(run_dir == first)
        """
        done = self.script(body)
        said = "has ended in success; give its name to resume it all the same"
        self.assertEqual(done.stdout.splitlines(), ["True", "True", said, "True"])
        attempts = sorted(
            path.name for path in (self.tmp / "results").glob("exp/*/attempts/*")
        )
        self.assertEqual(attempts, ["1", "2", "3"])

    def test_what_is_not_there_is_not_resumed(self) -> None:
        other = self.tmp / "results/exp-20250101-000000"
        other.mkdir(parents=True)
        (other / "status.json").write_text('{"status": "failed"}', "utf-8")
        folder = str(other.parent)
        for name, prefix in (("latest", "probe"), ("exp-20260101-000000", "exp")):
            sentence = f"no run {name!r} under {folder!r} to resume"
            with self.assertRaisesRegex(ValueError, re.escape(sentence)):
                run_utils.run_context(folder, prefix, resume=name).__enter__()
            self.assertEqual(list(other.parent.iterdir()), [other])

    def test_a_run_that_is_alive_is_not_resumed(self) -> None:
        body = """
        for words in ({"resume": run_dir}, {"run_dir": run_dir}):
            try:
                run_context('results/exp', **words).__enter__()
            except ValueError as error:
                print("is still running; it cannot be resumed" in str(error))
        """
        self.assertEqual(self.in_context(body).stdout.split(), ["True", "True"])

    def test_of_several_who_want_one_directory_at_once_one_gets_it(self) -> None:
        path = self.write_script("""
        sys.stdin.readline()
        try:
            with run_context("e", run_dir="out", capture_output=False):
                print("in", flush=True)
                sys.stdin.readline()
        except ValueError as error:
            print(error, flush=True)
            sys.stdin.readline()
        """)
        refusal = (
            f"run {str(self.tmp / 'out')!r} is still running; it cannot be resumed"
        )
        for attempt in range(1, 4):
            programs = [self.piped(path) for _ in range(4)]
            for program in programs:
                program.stdin.write("begin\n")
                program.stdin.flush()
            said = [program.stdout.readline().strip() for program in programs]
            for program in programs:  # now that all have tried
                program.communicate("end\n")
            self.assertEqual(sorted(said), ["in"] + 3 * [refusal])
            facts = json.loads(Path("out/status.json").read_text("ascii"))
            self.assertEqual((facts["status"], facts["attempt"]), ("success", attempt))
            earlier = sorted(os.listdir("out/attempts")) if attempt > 1 else []
            self.assertEqual(earlier, [str(n) for n in range(1, attempt)])

    def test_who_was_killed_while_taking_a_directory_keeps_nobody_off(self) -> None:
        for attempt in range(1, 4):
            with run_utils.run_context("e", run_dir="out", capture_output=False):
                pass
            Path(f"out/attempts/{attempt}").mkdir(parents=True)
        Path("out/attempts/3/status.json").write_text("{}", "utf-8")  # somebody's copy
        with run_utils.run_context("e", run_dir="out", capture_output=False):
            pass
        run = Run("out")
        self.assertEqual((run["status"], run["attempts"]), ("success", 5))
        self.assertEqual(sorted(os.listdir("out/attempts")), ["1", "2", "3", "4"])

    def piped(self, path: Path) -> Any:
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        words = [PYTHON, str(path)]
        return subprocess.Popen(words, env=self.environment(), text=True, **pipes)

    def test_a_disk_without_links_can_be_resumed_on(self) -> None:
        with mock.patch("os.link", side_effect=OSError(1, "not here")):
            for _ in range(2):
                with run_utils.run_context("e", run_dir="out", capture_output=False):
                    pass
        run = Run("out")
        self.assertEqual((run["status"], run["attempts"]), ("success", 2))
        self.assertEqual([n for n in os.listdir("out") if n.endswith(".tmp")], [])

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
        config = {"model": {"lr": float(sys.argv[1])}, "seed": 1, "clip": float("nan")}
        with run_context("results/exp", run_dir="out", config_args=config):
            pass
        """
        places = {"PYTHONPATH": f"{HERE}{os.pathsep}{self.tmp / 'lib'}"}
        for version, lr in (("1", "0.1"), ("2", "0.2")):
            shutil.rmtree("lib", ignore_errors=True)
            Path(f"lib/thing-{version}.dist-info").mkdir(parents=True)
            metadata = Path(f"lib/thing-{version}.dist-info/METADATA")
            metadata.write_text(f"Name: thing\nVersion: {version}\n", "utf-8")
            done = self.script(body, lr, env=places)
        for what in ("config (model.lr)", "packages (thing)"):
            self.assertIn(f"changed since attempt 1: {what}\n", done.stderr)
        facts = json.loads((self.tmp / "out/metadata.json").read_text("ascii"))
        changes = {
            "attempt": 1,
            "config": {"model.lr": [0.1, 0.2]},
            "code": {},
            "packages": {"thing": ["1", "2"]},
        }
        self.assertEqual(facts["changes"], changes)


class TheExceptionOfASignalHandler(RunCase):
    """What a signal handler raises while our code runs reaches the program."""

    def test_200_time_limits_around_log_metrics_and_print(self) -> None:
        body = """
        import signal
        def over(number, frame):
            raise TimeoutError
        signal.signal(signal.SIGALRM, over)
        caught = 0
        for number in range(200):
            try:
                signal.setitimer(signal.ITIMER_REAL, 0.0005 + 0.00001 * number)
                while True:
                    log_metrics(run_dir, {"x": number})
                    print("line", flush=True)
            except TimeoutError:
                caught += 1
        print()
        print(caught, "caught")
        """
        done = self.in_context(body)
        self.assertEqual(done.stderr, "")
        self.assertEqual(done.stdout.splitlines()[-1], "200 caught")
        self.assertEqual(self.json("status.json")["status"], "success")

    STRIKE = """
        import signal
        class Strike(Exception): pass
        def strike(number, frame):
            raise Strike
        signal.signal(signal.SIGALRM, strike)
        caught = 0
        """

    def test_struck_while_entering_and_leaving(self) -> None:
        body = """
        import random
        random.seed(1)
        entered = 0
        for number in range(40):
            try:
                signal.setitimer(signal.ITIMER_REAL, random.uniform(0.0005, 0.15))
                with run_context("results/exp", "exp", resources=False):
                    entered += 1
                time.sleep(10)
            except Strike:
                caught += 1
        print(caught)
        """
        done = self.script(self.STRIKE + body)
        self.assertEqual((done.stdout, done.stderr), ("40\n", ""))
        self.wait_until(self.all_have_ended, "no run says running")

    def test_struck_at_each_of_the_first_calls_of_an_exit(self) -> None:
        """Once the output stayed in the log, and the run was left running."""
        body = """
        for number in range(2, 22):
            calls = 0
            def trace(frame, event, argument):
                global calls
                calls += 1
                if calls == number:
                    signal.raise_signal(signal.SIGALRM)
            try:
                with run_context("results/exp", "exp", resources=False):
                    sys.settrace(trace)
            except Strike:
                caught += 1
            sys.settrace(None)
            print(number)
        print(caught, "caught")
        """
        done = self.script(self.STRIKE + body)
        shown = [*map(str, range(2, 22)), "20 caught"]
        self.assertEqual((done.stdout.split("\n")[:-1], done.stderr), (shown, ""))
        self.wait_until(self.all_have_ended, "no run says running")

    @unittest.skipUnless(LINUX, "no /proc")
    def test_struck_at_each_step_of_a_call_inside(self) -> None:
        """Once a descriptor stayed open, or the recorder was not heard any more."""
        body = """
        import run_utils
        with run_context("results/exp", "exp") as other: pass
        def calls(run_dir):
            yield None, lambda: save_json("x.json", {})
            yield None, lambda: run_utils._active[0].record.append("x.jsonl", {})
            yield None, lambda: capture_metadata(run_dir, {"added": 1})
            yield os.open, lambda: mark_artifact_used(other / "config.yaml", run_dir)
        def strike_once(frame, event, argument):
            global count
            if event in ("call", "c_return"):  # where Python looks for signals
                count += only in (None, argument)
            if count == number:
                count += 1
                signal.raise_signal(signal.SIGALRM)
        def opened():
            return sorted(os.listdir("/proc/self/fd"))
        with run_context("results/exp", "exp", resources=False) as run_dir:
            run_utils._active[0].recorder.ask("collected", seconds=30)
            for only, call in calls(run_dir):
                call()
                before = opened()
                number, count = 0, 1
                while count > number:
                    number += 1
                    count = 0
                    try:
                        sys.setprofile(strike_once)
                        call()
                    except Strike:
                        caught += 1
                    finally:
                        sys.setprofile(None)
                print(caught > 100, opened() == before)
            print(run_utils._active[0].recorder.ask("add", facts={}))
        """
        done = self.script(self.STRIKE + body)
        told = "True True\n" * 4 + "True\n"
        self.assertEqual((done.stdout, done.stderr), (told, ""), done.stderr)

    def all_have_ended(self) -> bool:
        texts = [(run / "status.json").read_text("ascii") for run in self.run_dirs()]
        return all(json.loads(text)["status"] != "running" for text in texts)

    def test_two_interrupts_within_milliseconds(self) -> None:
        body = """
        import signal
        try:
            with run_context("results/exp", "exp"):
                os.kill(os.getpid(), signal.SIGINT)
        except KeyboardInterrupt:
            print("after")
        """
        script = """
        import signal
        try:
            with run_context("results/exp", "exp") as run_dir:
                try:
                    os.kill(os.getpid(), signal.SIGINT)
                finally:
                    signal.signal(signal.SIGALRM, signal.default_int_handler)
                    signal.setitimer(signal.ITIMER_REAL, 0.001)
        except KeyboardInterrupt:
            print("after")
        time.sleep(0.2)
        """
        for text in (body, script):
            shutil.rmtree(self.tmp / "results", ignore_errors=True)
            done = self.script(text)
            self.assertEqual((done.stdout, done.stderr), ("after\n", ""))
            status = self.json("status.json")
            found = status["status"], status["exit_code"]
            self.assertEqual(found, ("failed", 130))
            complete = lambda: self.json("metadata.json")["capture"]["pip_freeze"]  # noqa: E731
            self.wait_until(complete, "the recorder completes the record alone")


class ExitCodes(RunCase):
    """exit_code is what the operating system sees."""

    def test_of_statuses_beyond_a_byte(self) -> None:
        for code in (256, -1, 257, 2**40):
            with self.subTest(code):
                shutil.rmtree(self.tmp / "results", ignore_errors=True)
                done = self.in_context(f"sys.exit({code})")
                self.assertEqual(self.json("status.json")["exit_code"], done.returncode)

    def test_of_a_ctrl_c_in_asyncio(self) -> None:
        body = """
        import asyncio, signal
        async def work():
            with run_context("results/exp", "exp"):
                asyncio.get_running_loop().call_soon(signal.raise_signal, signal.SIGINT)
                await asyncio.sleep(60)
        asyncio.run(work())
        """
        self.assertEqual(self.script(body).returncode, -signal.SIGINT)
        self.assertEqual(self.json("status.json")["exit_code"], 130)


class NoDescriptorIsLeft(RunCase):
    """A run whose program has used up all descriptors still has its end recorded."""

    def test_a_leak(self) -> None:
        body = """
        import resource
        resource.setrlimit(resource.RLIMIT_NOFILE, (128, 128))
        with run_context("results/exp", "exp"):
            kept = []
            while True:
                kept.append(open(os.devnull))
        """
        done = self.script(body)
        self.assertEqual(done.returncode, 1)
        status = self.json("status.json")
        self.assertEqual(status["status"], "failed")
        self.assertEqual(status["exception"]["type"], "OSError")
        self.assertIn("open(os.devnull)", status["exception"]["traceback"])
        self.assertEqual(self.index()[-1]["status"], "failed")


class EndsThatTheProgramCannotWrite(RunCase):
    """The recorder writes the end of a program that may not do so any more."""

    def check(self, body: str) -> None:
        done = self.in_context(body)
        self.assertEqual((done.returncode, done.stdout), (7, "x\n"), done.stderr)
        self.assertIn("that is left to the recorder", done.stderr)
        status = self.json("status.json")
        self.assertEqual((status["status"], status["exit_code"]), ("failed", 7))
        self.assertIsInstance(status["duration_seconds"], float)
        self.assertEqual(self.index()[-1]["status"], "failed")

    def test_rights_given_up(self) -> None:
        if os.geteuid() != 0:
            self.skipTest("only root can give up rights")
        self.check("print('x'); os.setgid(54321); os.setuid(54321); sys.exit(7)")

    def test_another_root_directory(self) -> None:
        if os.geteuid() != 0:
            self.skipTest("only root can change the root directory")
        self.check("print('x'); os.mkdir('new'); os.chroot('new'); sys.exit(7)")

    def test_a_limit_of_file_sizes(self) -> None:
        body = """
        import resource
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
        print("x")
        sys.exit(7)
        """
        self.check(body)

    def test_a_secret_of_the_block_is_redacted_there(self) -> None:
        secret = "hf_" + "A" * 36
        body = f"""
        import resource
        os.environ["HF_TOKEN"] = {secret!r}
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
        raise ValueError("with " + os.environ["HF_TOKEN"])
        """
        self.assertEqual(self.in_context(body).returncode, 1)
        message = self.json("status.json")["exception"]["message"]
        self.assertEqual(message, "with <REDACTED>")


class HeldSignals(unittest.TestCase):
    """Greenlets of one thread leave no signal blocked, whatever order they leave in."""

    @unittest.skipUnless(hasattr(signal, "pthread_sigmask"), "no masks of signals")
    def test_in_any_order(self) -> None:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
        for order in itertools.permutations(range(3)):
            inside = [run_utils._signals_held() for _ in range(3)]
            for greenlet in inside:
                greenlet.__enter__()
            for number in order:
                mask = signal.pthread_sigmask(signal.SIG_BLOCK, [])
                self.assertIn(signal.SIGINT, mask)
                inside[number].__exit__(None, None, None)
            mask = signal.pthread_sigmask(signal.SIG_BLOCK, [])
            self.assertEqual(mask, before)


class NothingIsLeft(RunCase):
    """However many runs a process has had, it is as it was before."""

    KINDS = """
    import signal, threading, run_utils
    def block(word, error=None):
        with run_context("results/exp", "exp") as run_dir:
            print(word)
            log_metrics(run_dir, {"a": 1})
            if error: raise error
    def by_hand():
        run_dir = start_run("results/exp", "exp")
        log_metrics(run_dir, {"a": 1})
        mark_status(run_dir, "success")
    def decorated():
        run_context("results/exp", "exp")(print)("decorated")
    def failing():
        for error in (ValueError(), SystemExit(3), KeyboardInterrupt()):
            try: block("failing", error)
            except BaseException as raised: assert raised is error
    def generator():
        @run_context("results/exp", "exp")
        def numbers(): yield from range(3)
        left = numbers()
        next(left)
        left.close()
    def overlapping():
        first, second = (run_context("results/exp", "exp") for _ in range(2))
        first.__enter__(), second.__enter__()
        first.__exit__(None, None, None), second.__exit__(None, None, None)
    def struck():
        os.makedirs(".git", exist_ok=True)  # so that git is asked
        def strike(*args): raise KeyboardInterrupt
        learn, run_utils._learn_at_entry = run_utils._learn_at_entry, strike
        try: block("struck on entry")
        except KeyboardInterrupt: pass
        finally: run_utils._learn_at_entry = learn
    def struck_by_a_signal():
        signal.signal(signal.SIGALRM, signal.default_int_handler)
        spawn = os.posix_spawn
        def spawn_late(*args, **more):
            pid = spawn(*args, **more)
            signal.raise_signal(signal.SIGALRM)
            return pid
        os.posix_spawn = spawn_late
        try: block("struck before a child is known")
        except KeyboardInterrupt: pass
        finally: os.posix_spawn = spawn
    def threads():
        others = [threading.Thread(target=block, args=(n,)) for n in range(COUNT)]
        for other in others: other.start()
        for other in others: other.join()
    def state():
        inside = (run_utils._taps, run_utils._captures, run_utils._active)
        children = open(f"/proc/self/task/{os.getpid()}/children").read()
        opened = sorted(os.listdir("/proc/self/fd"))
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, [])
        own = "write" in vars(sys.stdout)
        return (opened, children, own, mask, dict(os.environ), *map(len, inside),
                threading.active_count(), len(os.listdir(os.environ["TMPDIR"])))
    for kind in (lambda: block("block"), by_hand, decorated, failing, generator,
                 overlapping, threads, struck, struck_by_a_signal):
        kind()
        before = state()
        for _ in range(TIMES): kind()
        if state() != before: print(kind, before, state(), file=sys.__stderr__)
    """

    @unittest.skipUnless(LINUX, "no /proc")
    def test_of_each_kind_of_run(self) -> None:
        (self.tmp / "tmp").mkdir()
        text = "COUNT, TIMES = 5, 2\n" + textwrap.dedent(self.KINDS)
        done = self.script(text, env={"TMPDIR": str(self.tmp / "tmp")})
        self.assertEqual(done.returncode, 0, done.stderr)
        said = [
            line for line in done.stderr.splitlines() if "is not logged" not in line
        ]
        self.assertEqual(said, [])
        self.assertEqual(os.listdir(self.tmp / "tmp"), [])


class FlatScripts(RunCase):
    """start_run(until_exit=True) records what run_context does, with no block."""

    START = 'run_dir = start_run("results/exp", "exp", config_args={"lr": 1},'
    START += " until_exit=True)\n"
    ENDS: ClassVar[list[Any]] = [
        ("print('hello')", 0, ("success", "normal", 0)),
        ("sys.exit(3)", 3, ("failed", "system_exit", 3)),
        ("1 / 0", 1, ("failed", "exception", 1)),
        ("raise KeyboardInterrupt", -2, ("failed", "exception", 130)),
        ("os.kill(os.getpid(), 9)", -9, ("failed", "killed", 137)),
    ]

    @unittest.skipUnless(LINUX, "how a process ended is told by Linux")
    def test_every_end(self) -> None:
        for body, returncode, wanted in self.ENDS:
            with self.subTest(body):
                shutil.rmtree(self.tmp / "results", ignore_errors=True)
                done = self.script(self.START + body)
                self.assertEqual(done.returncode, returncode, done.stderr)

                def found() -> bool:
                    status = self.json("status.json")
                    keys = ("status", "exit_reason", "exit_code")
                    return tuple(status[key] for key in keys) == wanted  # noqa: B023

                self.wait_until(found, f"{wanted} of {self.json('status.json')}")
        self.assertEqual(self.json("metadata.json")["config"]["lr"], 1)

    @unittest.skipUnless(LINUX, "how a process ended is told by Linux")
    def test_what_sys_exit_says_is_why_it_failed(self) -> None:
        (self.tmp / "bin").mkdir()
        slow = self.tmp / "bin" / "nvidia-smi"
        slow.write_text("#!/bin/sh\nsleep 3\n", "ascii")
        slow.chmod(0o755)
        path = f"{self.tmp}/bin{os.pathsep}{os.environ['PATH']}"
        body = self.START + "print('hello')\nsys.exit('no data')"
        self.script(body, env={"PATH": path})
        wanted = "exit code 1: no data"
        self.wait_until(
            lambda: run_utils.load_run(self.run_dir())["reason"] == wanted, wanted
        )
        # What leaving waited for is no part of the run.
        self.assertLess(self.json("status.json")["duration_seconds"], 2.5)

    def test_workers_that_import_the_script_are_in_its_run(self) -> None:
        work = """
            import multiprocessing

            def work(number):
                log_metrics(run_dir, {"number": number})
                return run_dir

            if __name__ == "__main__":
                workers = multiprocessing.get_context("spawn").Process(
                    target=work, args=(1,)
                )
                workers.start()
                workers.join()
        """
        done = self.script(self.START + textwrap.dedent(work))
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        (run,) = run_utils.find_runs(self.tmp / "results")
        self.assertEqual(run["metrics.number"], 1)

    def test_the_next_run_ends_the_first_though_the_module_was_imported_anew(
        self,
    ) -> None:
        again = "del sys.modules['run_utils']\nfrom run_utils import start_run\n"
        body = self.START + "print('one')\n" + again
        self.script(body + self.START.replace('"exp",', '"two",') + "print('two')")
        for run_dir, line in zip(self.run_dirs(), ("one\n", "two\n")):
            log = (run_dir / "logs/stdout.log").read_text("utf-8")
            status = json.loads((run_dir / "status.json").read_text("ascii"))
            self.assertEqual((log, status["status"]), (line, "success"))

    def test_output_and_traceback_are_logged_and_the_next_run_ends_the_first(
        self,
    ) -> None:
        body = self.START + "print('one')\n" + self.START.replace('"exp",', '"two",')
        done = self.script(body + "print('two')\n1 / 0")
        self.assertEqual(done.stdout, "one\ntwo\n")
        first, second = self.run_dirs()
        self.assertEqual((first / "logs/stdout.log").read_text("utf-8"), "one\n")
        self.assertEqual((second / "logs/stdout.log").read_text("utf-8"), "two\n")
        status = json.loads((second / "status.json").read_text("ascii"))
        self.assertIn("ZeroDivisionError", status["exception"]["traceback"])


# === The record ===


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
        ]
        self.assertEqual(list(start)[: len(keys)], keys)
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
        place = run_utils._Place("", None)
        for _ in range(2):
            place.append(path, {"n": 1})
        whole = path.read_bytes()
        self.assertEqual(whole.count(b"\n"), 2)
        for cut in range(1, len(whole)):
            path.write_bytes(whole[:cut])
            place.append(path, {"n": 2})
            last = list(run_utils._read_lines(path))[-1]
            self.assertEqual(last, {"n": 2})

    def test_notes_and_tags_of_run_context(self) -> None:
        self.script('with run_context("results/e", notes="try", tags=["a"]): pass')
        (note,) = run_utils._read_lines(self.run_dir() / "notes.jsonl")
        self.assertEqual((note["text"], note["tags"]), ("try", ["a"]))

    @unittest.skipUnless(GIT, "git is not installed")
    def test_every_line_has_the_commit_and_the_script(self) -> None:
        git = ["git", "-c", "user.name=x", "-c", "user.email=x@example.org"]
        self.write_script('with run_context("results/exp", "exp"): pass')
        for words in (["init", "-q"], ["add", "train.py"], ["commit", "-qm", "x"]):
            subprocess.run([*git, *words], check=True)
        self.script('with run_context("results/exp", "exp"): pass')
        head = ["git", "rev-parse", "--short", "HEAD"]
        commit = subprocess.run(head, check=True, capture_output=True).stdout.decode()
        for row in self.index():
            found = row["git_commit_short"], row["script_name"]
            self.assertEqual(found, (commit.strip(), "train"))


class WhoseIndex(RunCase):
    """An index that somebody else has put above us takes no lines of ours."""

    def test_in_a_folder_where_everybody_may_write(self) -> None:
        shared = self.tmp / "shared"
        (shared / "index").mkdir(parents=True)
        (shared / "index" / "runs_index.jsonl").touch()
        base_dir = shared / "mine" / "exp"
        base_dir.mkdir(parents=True)
        self.assertEqual(run_utils._results_root(base_dir), shared)
        shared.chmod(0o1777)
        self.assertEqual(run_utils._results_root(base_dir), base_dir)

    def test_nothing_is_looked_for_above_a_repository(self) -> None:
        (self.tmp / "index").mkdir()
        (self.tmp / "index" / "runs_index.jsonl").touch()
        (self.tmp / "repo" / ".git").mkdir(parents=True)
        base_dir = self.tmp / "repo" / "results" / "exp"
        self.assertEqual(run_utils._results_root(base_dir), base_dir.parent)

    def test_an_index_that_is_a_link_gets_nothing(self) -> None:
        precious = self.tmp / "precious"
        precious.write_text("mine\n", "utf-8")
        folder = self.tmp / "results" / "index"
        folder.mkdir(parents=True)
        (folder / "runs_index.jsonl").symlink_to(precious)
        done = self.in_context("log_metrics(run_dir, {'x': 1})")
        self.assertEqual(precious.read_text("utf-8"), "mine\n")
        self.assertIn("run_utils: the index: ", done.stderr)
        self.assertEqual(self.json("status.json")["status"], "success")


class LinksInARun(RunCase):
    """Nothing of ours is written through a link in a run, or into a swapped run."""

    def test_links_for_files_and_folders(self) -> None:
        outside = self.tmp / "outside"
        outside.mkdir()
        run_dir = run_utils.start_run("results/exp", "exp")
        (run_dir / "metrics").rmdir()
        (run_dir / "metrics").symlink_to(outside)
        (outside / "notes").touch()
        (run_dir / "notes.jsonl").symlink_to(outside / "notes")
        with contextlib.redirect_stderr(io.StringIO()) as said:
            run_utils.log_metrics(run_dir, {"x": 1})
        self.assertIn("metrics.jsonl: ", said.getvalue())
        done = self.command("note", str(run_dir), "hello")
        self.assertEqual(done.returncode, 2)
        self.assertEqual(os.listdir(outside), ["notes"])
        self.assertEqual((outside / "notes").read_bytes(), b"")

    def test_a_hard_link_for_a_log(self) -> None:
        precious = self.tmp / "precious"
        precious.write_text("mine\n", "utf-8")
        (self.tmp / "out" / "logs").mkdir(parents=True)
        os.link(precious, self.tmp / "out" / "logs" / "stdout.log")
        done = self.script('with run_context("e", run_dir="out"): print("x")')
        self.assertEqual((done.returncode, done.stdout), (0, "x\n"))
        self.assertEqual(precious.read_text("utf-8"), "mine\n")

    def test_a_fifo_for_a_log_or_for_metrics_does_not_hang(self) -> None:
        (self.tmp / "out" / "logs").mkdir(parents=True)
        (self.tmp / "out" / "metrics").mkdir()
        os.mkfifo(self.tmp / "out" / "logs" / "stdout.log")
        os.mkfifo(self.tmp / "out" / "metrics" / "metrics.jsonl")
        body = 'with run_context("e", run_dir="out") as run_dir:\n'
        body += '    log_metrics(run_dir, {"x": 1}); print("x")'
        done = self.script(body)
        self.assertEqual((done.returncode, done.stdout), (0, "x\n"))

    def test_a_directory_that_took_the_place_of_the_run_gets_nothing(self) -> None:
        body = """
        os.rename(run_dir, "moved")
        os.mkdir(run_dir)
        """
        done = self.in_context(body)
        self.assertEqual(done.returncode, 0)
        self.assertEqual(os.listdir(next((self.tmp / "results/exp").iterdir())), [])


class TwoUsers(RunCase):
    """Files of another user are not appended to, and not taken for ours."""

    def test_files_that_another_user_has_put_there(self) -> None:
        if os.geteuid() != 0:
            self.skipTest("only root can act as two users")
        base_dir = self.tmp / "results" / "exp"
        base_dir.mkdir(parents=True)
        self.tmp.chmod(0o755)
        os.chown(base_dir, 54321, 54321)
        run_dir = base_dir / "exp-20260131-142501"
        (run_dir / "logs").mkdir(parents=True)
        (run_dir / "logs" / "stdout.log").touch()
        os.chown(run_dir / "logs" / "stdout.log", 54322, 54322)
        body = f"with run_context({str(base_dir)!r}, run_dir={str(run_dir)!r}):"
        done = self.script(body + " print('x')")
        self.assertEqual((done.returncode, done.stdout), (0, "x\n"))
        self.assertEqual((run_dir / "logs" / "stdout.log").read_bytes(), b"")
        self.assertIn("belongs to another user", done.stderr)


# === Several processes ===


class RankCase(RunCase):
    """Processes that are the ranks of one launch; this process is the launcher."""

    enter = 'with run_context("results/exp", "exp", {"lr": 1}) as run_dir:\n'
    waits = enter + "    print('here', flush=True); sys.stdin.read()\n"

    def start(
        self, body: str, rank: int, world: int = 2, **more: str
    ) -> subprocess.Popen[str]:
        """Start train.py as one rank."""
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
        """Let processes end in success; return what each has printed."""
        results = [process.communicate(timeout=60) for process in processes]
        for process, (_, errors) in zip(processes, results):
            self.assertEqual((process.returncode, errors), (0, ""))
        return [output for output, _ in results]

    def line(self, process: subprocess.Popen[str]) -> str:
        """Return the next line that a process prints."""
        assert process.stdout is not None
        return process.stdout.readline()

    def inside(self, *processes: subprocess.Popen[str]) -> None:
        """Wait until processes that run `waits` are inside the block."""
        for process in processes:
            self.assertEqual(self.line(process), "here\n")

    def wait_for(self, pattern: str) -> Path:
        """Return the first file that matches, once there is one."""
        found: list[Path] = self.wait_until(
            lambda: sorted(self.tmp.glob(pattern)), f"a file {pattern}"
        )
        return found[0]

    def wait_for_rank(self, failed: int) -> dict[str, Any]:
        """Return status.json once it names the rank that failed."""
        self.wait_until(
            lambda: self.json("status.json")["failed_rank"] == failed,
            f"status.json names rank {failed}",
        )
        return self.json("status.json")

    def wait_for_tidiness(self) -> None:
        folder = self.tmp / "results" / "exp" / ".ranks"
        self.wait_until(lambda: not folder.exists(), "the meeting place is removed")


class SeveralProcesses(RankCase):
    """The ranks of one launch share one run, and never that of another launch."""

    def test_all_ranks_share_one_directory_and_one_record(self) -> None:
        body = self.enter + "    print(run_dir, flush=True)\n"
        body += "    print('torch' in sys.modules, file=sys.stderr)\n"
        ranks = [self.start(body, rank, 4) for rank in (2, 0, 3, 1)]
        results = [rank.communicate(timeout=60) for rank in ranks]
        expected = (f"{self.run_dir()}\n", "False\n")
        self.assertEqual(results, [expected] * 4)
        self.assertEqual([row["event"] for row in self.index()], ["start", "end"])
        self.assertEqual(self.json("status.json")["status"], "success")
        launcher = self.json("metadata.json")["launcher"]
        self.assertEqual((launcher["rank"], launcher["world_size"]), (0, 4))
        for rank in ("", "rank1.", "rank2.", "rank3."):
            self.assertEqual(self.log(f"{rank}stdout"), f"{self.run_dir()}\n")
            self.assertEqual(self.log(f"{rank}stderr"), "False\n")
        logs = {path.name for path in (self.run_dir() / "logs").iterdir()}
        self.assertEqual(len(logs), 8, logs)
        self.wait_for_tidiness()

    def test_a_rank_that_comes_when_rank_0_has_ended_still_joins(self) -> None:
        body = self.enter + "    print(run_dir)\n"
        first = self.outputs(self.start(body, 0))
        self.assertEqual(self.outputs(self.start(body, 1)), first)
        self.wait_for_tidiness()

    def test_what_a_crashed_launch_left_is_never_joined(self) -> None:
        body = self.enter + "    print(run_dir, flush=True); sys.stdin.read()\n"
        crashed = self.start(body, 0)
        stale = self.line(crashed)
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
        answer = json.dumps({"run_dir": "/", "attempt": 1})
        stale = "1-0123456789abcdef"
        for name in (stale, f"{stale}.json", "2-0123456789abcdef.json", "run.json"):
            request.with_name(name).write_text(answer, "ascii")
        paths = self.outputs(self.start(body, 1), self.start(body, 0))
        self.assertEqual(set(paths), {f"{self.run_dir()}\n"})

    def test_a_rank_whose_rank_0_never_comes_says_what_it_waited_for(self) -> None:
        body = "import run_utils; run_utils.RANK_WAIT_SECONDS = 0.1\n" + self.enter
        rank_1 = self.start(body + "    pass\n", 1, MASTER_PORT="12345")
        _, errors = rank_1.communicate()
        self.assertIn(
            "TimeoutError: rank 1 waited 0.1 s for rank 0 to create the run below "
            f"'{self.tmp / 'results/exp'}' (MASTER_ADDR=127.0.0.1 MASTER_PORT=12345 ",
            errors,
        )
        self.assertIn("; let all ranks enter run_context, or give ranks=", errors)
        self.assertEqual(self.run_dirs(), [])
        # It may be tidied up as we look, which a path's own glob does not like.
        self.assertEqual(glob.glob(f"{self.tmp}/results/exp/.ranks/*/*"), [])

    def test_without_a_recorder_rank_0_answers_all_the_same(self) -> None:
        body = "if os.environ['RANK'] == '0': sys.executable = ''\n"
        body += self.enter + "    print(run_dir, flush=True); sys.stdin.read()\n"
        rank_0 = self.start(body, 0)
        path = self.line(rank_0)
        rank_1 = self.start(body, 1)
        self.assertEqual(self.line(rank_1), path)

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
        child = "from run_utils import *\nwith run_context('results/sub', 'sub'): pass"
        body = self.enter + "    import subprocess\n"
        body += "    if os.environ['RANK'] == '1':\n"
        body += f"        subprocess.run({[PYTHON, '-c', child]}, check=True)\n"
        self.outputs(self.start(body, 0), self.start(body, 1))
        self.assertEqual(len(run_utils.find_runs("results/sub")), 1)

    def test_nor_is_one_that_a_rank_of_open_mpi_starts(self) -> None:
        launcher = {"world_size": 4, "OMPI_COMM_WORLD_SIZE": "4"}
        (self.tmp / "metadata.json").write_text(json.dumps({"launcher": launcher}))
        env = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "4"}
        env["PMIX_NAMESPACE"] = "prterun-1"  # that of the record may be another
        with mock.patch.dict(os.environ, {"RUN_DIR": str(self.tmp)}):
            self.assertIsNone(run_utils._rank(env))
            self.assertIsNotNone(run_utils._rank({**env, "OMPI_COMM_WORLD_SIZE": "5"}))

    def test_two_launchers_with_one_port_have_a_run_each(self) -> None:
        body = self.enter + "    print(run_dir)\n"
        shell = f"sh -c '{PYTHON} {self.write_script(body)}; true' &"
        env = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_PORT": "29500"}
        words = ["/bin/sh", "-c", f"RANK=1 {shell} RANK=0 {shell} wait"]
        settings: Any = {"stdout": subprocess.PIPE, "encoding": "utf-8"}
        settings["env"] = self.environment(env)
        launches = [subprocess.Popen(words, **settings) for _ in range(2)]
        paths = [launch.communicate(timeout=60)[0].split() for launch in launches]
        self.assertEqual([len(set(pair)) for pair in paths], [1, 1], paths)
        self.assertNotEqual(paths[0][0], paths[1][0])


class RanksInsideARun(RankCase):
    """Ranks that are started inside a run share one of their own."""

    BODY = """
    import subprocess

    code = "from run_utils import run_context\\n"
    code += "with run_context('results/exp', 'inner'): print('here')"
    with run_context("results/exp", "outer"):
        facts = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
        ranks = [
            subprocess.Popen(
                [sys.executable, "-c", code], env={**os.environ, **facts, "RANK": rank}
            )
            for rank in "10"
        ]
        assert [rank.wait() for rank in ranks] == [0, 0]
    """

    def test_none_of_them_is_in_that_of_their_parent(self) -> None:
        done = self.script(self.BODY)
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        outer, inner = sorted(self.run_dirs(), key=lambda path: "inner" in path.name)
        for prefix in ("", "rank1."):
            log = inner / f"logs/{prefix}stdout.log"
            self.assertEqual(log.read_text("utf-8"), "here\n")
        self.assertEqual(list(outer.glob("logs/rank*")), [])


class RanksOfLightning(RankCase):
    """Rank 0 starts the others in mid-script, and each begins the script anew."""

    BODY = """
    import subprocess, time

    def fit():
        if "LOCAL_RANK" in os.environ:
            return []
        facts = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "NODE_RANK": "0"}
        os.environ.update(facts, LOCAL_RANK="0")
        return [
            subprocess.Popen(sys.orig_argv, env={**os.environ, "LOCAL_RANK": rank})
            for rank in "12"
        ]

    with run_context("results/exp", "inner-before"):
        pass
    with run_context("results/exp", "outer"), run_context("results/exp", "first"):
        ranks = fit()
        print("rank", os.environ["LOCAL_RANK"])
        open("in" + os.environ["LOCAL_RANK"], "w").close()
        while not (os.path.exists("in1") and os.path.exists("in2")):
            time.sleep(0.01)  # as they wait for one another before they train
        code = "from run_utils import *; print(start_run('results/exp', 'inner'))"
        subprocess.run([sys.executable, "-c", code], check=True)
    for number in range(2):
        with run_context("results/exp", "again") as run_dir:
            print("again", os.environ["LOCAL_RANK"])
            if number:
                open("again" + os.environ["LOCAL_RANK"], "w").close()
            if number and os.environ["LOCAL_RANK"] == "2":
                while not os.path.exists("again1"):
                    time.sleep(0.01)  # whoever comes into a failed run has no answer
                raise ValueError("bad")
    if ranks:
        assert [rank.wait() for rank in ranks] == [0, 1]
    """

    @unittest.skipIf(sys.version_info < (3, 10), "there is no sys.orig_argv")
    def test_they_share_the_runs_that_rank_0_enters(self) -> None:
        done = self.script(self.BODY)
        self.assertEqual(done.returncode, 0, done.stderr)
        self.wait_for_tidiness()
        names = ("again", "first")
        runs = [path for path in self.run_dirs() if path.name.startswith(names)]
        self.assertEqual(len(runs), 3, runs)
        for run_dir, word in zip(sorted(runs), ("again", "again", "rank")):
            for rank, prefix in enumerate(("", "rank1.", "rank2.")):
                log = (run_dir / f"logs/{prefix}stdout.log").read_text("utf-8")
                self.assertIn(f"{word} {rank}\n", log)
        (outer,) = [path for path in self.run_dirs() if "outer" in path.name]
        self.assertEqual(len(list(outer.glob("logs/rank*"))), 4)
        self.assertEqual(len(self.run_dirs()), 10)
        states = [
            run["reason"]
            for run in run_utils.find_runs("results", contains="exp/again")
        ]
        self.assertEqual(sorted(map(str, states)), ["None", "rank 2: ValueError: bad"])


class RanksOfTorch(RankCase):
    """Below mp.spawn only torch.distributed tells the rank, once it is initialised."""

    BODY = """
    import types

    world = 3
    for rank in range(world):
        if os.fork() == 0:
            break
    else:
        assert [os.wait()[1] for _ in range(world)] == 3 * [0]
        sys.exit()
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="12355")
    sys.modules["torch"] = types.ModuleType("torch")
    distributed = sys.modules["torch"].distributed = types.ModuleType("distributed")
    distributed.get_rank = lambda: rank
    distributed.get_world_size = lambda: world
    with run_context("results/exp", "exp") as run_dir:
        print("rank", rank)
    """

    def test_they_share_a_run(self) -> None:
        done = self.script(self.BODY)
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        run_dir = self.run_dir()
        for rank, prefix in enumerate(("", "rank1.", "rank2.")):
            log = run_dir / f"logs/{prefix}stdout.log"
            self.assertEqual(log.read_text("utf-8"), f"rank {rank}\n")
        self.assertEqual(self.json("metadata.json")["launcher"]["world_size"], 3)
        self.wait_for_tidiness()


class FailedRanks(RankCase):
    """status.json of the run names the rank that failed first, whoever ends last."""

    def test_a_rank_that_raises_is_the_cause_even_when_rank_0_is_killed(self) -> None:
        body = self.waits
        body += "    if os.environ['RANK'] == '1': raise ValueError('bad batch')\n"
        rank_0, rank_1 = self.start(body, 0), self.start(body, 1)
        self.inside(rank_0, rank_1)
        rank_1.communicate("")
        path = self.wait_for("results/exp/exp-*/logs/rank1.status.json")
        self.assertEqual(json.loads(path.read_text("ascii"))["pid"], rank_1.pid)
        rank_0.terminate()
        rank_0.wait()
        facts = self.wait_for_rank(1)
        self.assertEqual(facts["exception"]["type"], "ValueError")
        self.assertEqual((facts["status"], facts["exit_code"]), ("failed", 1))
        self.assertEqual(facts["ranks"]["0"]["signal"], "SIGTERM" if LINUX else None)
        self.wait_until(lambda: len(self.index()) > 1, "the end is in the index")
        self.assertEqual([row["event"] for row in self.index()], ["start", "end"])

    def test_rank_0_is_the_cause_when_it_failed_first(self) -> None:
        body = self.waits + "    raise KeyError(os.environ['RANK'])\n"
        rank_0, rank_1 = self.start(body, 0), self.start(body, 1)
        self.inside(rank_0, rank_1)
        rank_0.communicate("")
        self.wait_for_status("failed")
        rank_1.communicate("")
        facts = self.wait_for_rank(0)
        self.assertEqual(facts["exception"]["message"], "'0'")
        self.assertEqual(set(facts["ranks"]), {"0", "1"})

    def test_a_rank_that_is_killed_fails_the_run_although_rank_0_succeeds(self) -> None:
        rank_0, rank_1 = self.start(self.waits, 0), self.start(self.waits, 1)
        self.inside(rank_0, rank_1)
        rank_1.kill()
        path = self.wait_for("results/exp/exp-*/logs/rank1.status.json")
        self.assertEqual(json.loads(path.read_text())["last_output"], ["here"])
        self.outputs(rank_0)
        facts = self.wait_for_rank(1)
        self.assertEqual((facts["status"], facts["exit_reason"]), ("failed", "killed"))
        self.assertEqual(facts["ranks"]["0"]["status"], "success")
        self.wait_until(lambda: self.index()[-1]["status"] == "failed", "the index")

    def test_a_rank_that_fails_after_rank_0_ended_fails_the_run(self) -> None:
        body = self.enter + "    if os.environ['RANK'] == '1': sys.exit(7)\n"
        self.outputs(self.start(body, 0))
        self.start(body, 1).communicate()
        self.assertEqual(self.wait_for_rank(1)["exit_code"], 7)
        self.wait_until(lambda: self.index()[-1]["status"] == "failed", "the index")

    def test_a_rank_that_is_killed_after_rank_0_ended_fails_the_run(self) -> None:
        rank_0, rank_1 = self.start(self.waits, 0), self.start(self.waits, 1)
        self.inside(rank_0, rank_1)
        self.outputs(rank_0)
        rank_1.kill()
        self.assertEqual(self.wait_for_rank(1)["exit_reason"], "killed")

    def test_which_of_several_failures_came_first(self) -> None:
        raised = {"exit_reason": "exception", "ended": 10.0}
        later = {"exit_reason": "exception", "ended": 10.2}
        killed = {"exit_reason": "killed", "signal": "SIGKILL", "ended": 10.3}
        ended = {"exit_reason": "killed", "signal": "SIGTERM", "ended": 9.0}
        for first, second in ((raised, later), (killed, raised), (later, ended)):
            order = sorted([second, first], key=run_utils._failed_at)
            self.assertEqual(order, [first, second])
        late = {**killed, "ended": 10.6}  # it was not seen so much later
        self.assertLess(run_utils._failed_at(raised), run_utils._failed_at(late))


class RestartedJobs(RankCase):
    """resume="auto" continues the run of this very job, once it was started again."""

    body = 'with run_context("results/exp", "exp", resume="auto") as d: print(d)'

    def paths(self, *env: dict[str, str]) -> list[str]:
        done = [self.script(self.body, env=facts) for facts in env]
        self.assertEqual([each.stderr for each in done], [""] * len(done))
        return [each.stdout for each in done]

    def test_by_slurm(self) -> None:
        first = {"SLURM_JOB_ID": "7", "SLURM_CLUSTER_NAME": "c"}
        again = {**first, "SLURM_RESTART_COUNT": "1"}
        other = {**again, "SLURM_JOB_ID": "8"}
        paths = self.paths(first, first, again, other)
        self.assertEqual(paths[2], paths[1], "the newest run of the job")
        self.assertEqual(len(set(paths)), 3, paths)
        self.assertEqual(json.loads(
            (Path(paths[2].strip()) / "status.json").read_text("ascii")
        )["attempt"], 2)  # fmt: skip

    def test_a_job_that_was_not_started_again_gets_a_new_run(self) -> None:
        self.assertEqual(len(set(self.paths({}, {}))), 2)


class WhereRanksMeet(RankCase):
    """Nobody else can write where ranks meet, and nothing there leads elsewhere."""

    def test_the_folder_is_ours_alone(self) -> None:
        (self.tmp / "results/exp/.ranks").mkdir(parents=True, mode=0o777)
        (self.tmp / "results/exp/.ranks").chmod(0o777)
        rank_1 = self.start(self.waits, 1)
        self.wait_for("results/exp/.ranks/*/1-*")
        mode = stat.S_IMODE((self.tmp / "results/exp/.ranks").stat().st_mode)
        self.assertEqual(mode, 0o700)
        self.inside(self.start(self.waits, 0), rank_1)

    def test_links_in_its_place_are_not_followed(self) -> None:
        for name in (".ranks", ".ranks/{key}"):
            with self.subTest(name):
                shutil.rmtree(self.tmp / "results", ignore_errors=True)
                precious = self.tmp / "precious"
                precious.mkdir(exist_ok=True)
                (precious / "1-0123456789abcdef").touch()
                base = self.tmp / "results/exp"
                base.mkdir(parents=True)
                waiting = self.start(self.waits, 1)
                request = self.wait_for("results/exp/.ranks*/*/1-*")
                waiting.kill()
                waiting.wait()
                place = base / name.format(key=request.parent.name)
                shutil.rmtree(place)
                place.symlink_to(precious)
                rank_0 = self.start(self.waits, 0)
                self.inside(rank_0)
                if name == ".ranks":
                    self.inside(self.start(self.waits, 1))
                rank_0.communicate("")
                self.assertEqual(os.listdir(precious), ["1-0123456789abcdef"])

    def test_the_folder_of_another_user_is_left_alone(self) -> None:
        if os.geteuid() != 0:
            self.skipTest("only root can act as two users")
        theirs = self.tmp / "results/exp/.ranks"
        theirs.mkdir(parents=True)
        os.chown(theirs, 54321, 54321)
        rank_1, rank_0 = self.start(self.waits, 1), self.start(self.waits, 0)
        self.inside(rank_0, rank_1)
        self.outputs(rank_0, rank_1)
        self.assertEqual(os.listdir(theirs), [])
        own = theirs.with_name(".ranks-0")
        self.wait_until(lambda: not own.exists(), "tidiness")
        own.mkdir()
        os.chown(own, 54321, 54321)
        _, errors = self.start(self.waits, 1).communicate("")
        self.assertIn("the folder belongs to another user", errors)
        rank_0 = self.start(self.waits, 0)
        output, errors = rank_0.communicate("")
        self.assertEqual((rank_0.returncode, output), (0, "here\n"))
        self.assertIn("run_utils: the other ranks: PermissionError", errors)


class WhatCountsAsARank(unittest.TestCase):
    """Only what a launcher says of several processes makes a rank."""

    torch: ClassVar = {"RANK": "1", "WORLD_SIZE": "4", "MASTER_PORT": "29500"}
    slurm: ClassVar = {"SLURM_PROCID": "1", "SLURM_NTASKS": "4", "SLURM_JOB_ID": "7"}
    step: ClassVar = {**slurm, "SLURM_STEP_ID": "0"}
    mpi: ClassVar = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "4"}
    hydra: ClassVar = {"PMI_RANK": "1", "PMI_SIZE": "4"}

    def test_launchers(self) -> None:
        both = {**self.step, **self.torch}
        for env in (self.torch, self.step, self.mpi, self.hydra, both):
            with self.subTest(env=env):
                found = run_utils._rank(env)
                self.assertIsNotNone(found)
                self.assertEqual((found or ())[:2], (1, 4))

    def test_ordinary_processes(self) -> None:
        cases: dict[str, dict[str, str]] = {
            "world size 1": {**self.torch, "RANK": "0", "WORLD_SIZE": "1"},
            "a world of one in a step": {**self.step, **self.torch, "WORLD_SIZE": "1"},
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
            (self.torch, {"MASTER_ADDR": "node7"}),
            (self.torch, {"MASTER_ADDR": "localhost"}),
            (self.step, {"SLURM_STEP_ID": "1"}),
            (self.step, {"SLURM_JOB_ID": "8"}),
            (self.torch, {"TORCHELASTIC_RESTART_COUNT": "1"}),
            (self.step, {"SLURM_RESTART_COUNT": "1"}),
        ):
            with self.subTest(changed=changed):
                name = next(name for name in env if "RANK" in name or "PROCID" in name)
                keys = [
                    self.key({**env, name: "2"}),
                    self.key({**env, name: "3"}),
                    self.key({**env, **changed}),
                ]
                self.assertEqual(keys[0], keys[1])
                self.assertNotEqual(keys[0], keys[2])

    def test_localhost_is_another_on_each_host(self) -> None:
        env = {**self.torch, "MASTER_ADDR": "127.0.0.1"}
        here = self.key(env)
        with mock.patch.object(run_utils, "_hostname", return_value="elsewhere"):
            self.assertNotEqual(self.key(env), here)

    def key(self, env: dict[str, str]) -> str:
        run_utils._entered.clear()
        key: str = run_utils._Launch(env, Path("/r"), "x", "together").key
        return key


# === The recorder ===

RECORDER = "import run_utils\nrecorder = run_utils._active[0].recorder\n"


def is_running(pid: int) -> bool:
    """Tell whether a process runs: neither gone nor a zombie."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        fields = Path(f"/proc/{pid}/stat").read_text("utf-8").rpartition(")")[2]
        return fields.split()[0] not in "ZX"
    return False


class Deaths(RunCase):
    """Every death is on disk within a second, with what is known of it."""

    WAYS: ClassVar[list[Any]] = [
        ("os.kill(os.getpid(), 9)", "SIGKILL"),
        ("os.kill(os.getpid(), 15)", "SIGTERM"),
        ("os.abort()", "SIGABRT"),
        ("import ctypes; ctypes.string_at(0)", "SIGSEGV"),
        ("os._exit(7)", None),
        ("os.execvp('sh', ['sh', '-c', 'exit 7'])", None),
    ]

    @unittest.skipUnless(LINUX, "only Linux tells how a process died")
    def test_every_way_to_die(self) -> None:
        for body, name in self.WAYS:
            with self.subTest(body):
                shutil.rmtree(self.tmp / "results", ignore_errors=True)
                done = self.in_context(f"print('last words', flush=True)\n{body}")
                problem, code, left = f"killed by {name}", 0, "last words"
                if name is None:
                    problem = "the process ended before its run did (exit status 7)"
                else:
                    code = 128 + signal.Signals[name]
                self.assertEqual(done.returncode, 128 - code if code else 7)
                self.assertEqual(done.stdout, "last words\n")
                status = self.wait_for_status("failed")
                found = [status[key] for key in ("exit_reason", "signal", "problem")]
                self.assertEqual(found, ["killed", name, problem])
                self.assertEqual(status["exit_code"], code or 7)
                self.assertIn(left, status["last_output"])
                self.assertGreaterEqual(status["duration_seconds"], 0)
                self.wait_until(
                    lambda: self.index()[-1]["exit_reason"] == "killed", "the index"
                )

    def test_of_the_output_the_last_lines_are_kept(self) -> None:
        body = """
        import run_utils
        run_utils.LAST_OUTPUT_LINES = 2  # a setting of the program holds there too
        with run_context("results/exp", "exp"):
            print("one\\ntwo\\nthree", file=sys.stderr, flush=True)
            os.kill(os.getpid(), 9)
        """
        self.script(body)
        status = self.wait_for_status("failed")
        self.assertEqual(status["last_output"], ["two", "three"])

    def test_out_of_memory_under_a_limit(self) -> None:
        body = """
        import resource
        resource.setrlimit(resource.RLIMIT_AS, (400 << 20, 400 << 20))
        bytearray(1 << 30)
        """
        self.assertEqual(self.in_context(body).returncode, 1)
        status = self.json("status.json")
        self.assertEqual(status["exception"]["type"], "MemoryError")

    def test_what_the_kernel_kills_for_want_of_memory(self) -> None:
        group = Path(f"/sys/fs/cgroup/memory/run_utils-test-{os.getpid()}")
        limit = group / "memory.limit_in_bytes"
        if not group.parent.is_dir():
            group = Path("/sys/fs/cgroup") / group.name
            limit = group / "memory.max"
        try:
            group.mkdir()
        except OSError as error:
            self.skipTest(f"no cgroup can be made: {error}")
        self.addCleanup(
            self.wait_until, lambda: group.rmdir() is None, "the group is empty"
        )
        limit.write_text("60000000", "ascii")
        body = f"""
        with open("{group}/cgroup.procs", "w") as file: file.write(str(os.getpid()))
        with run_context("results/exp", "exp"):
            if os.fork() == 0:
                b"x" * (1 << 30)
                os._exit(0)
            print(os.wait()[1], flush=True)
            if "die" in sys.argv: os.kill(os.getpid(), 9)
        """
        self.assertEqual(self.script(body, "die").stdout, "9\n")
        problem = self.wait_for_status("failed")["problem"]
        self.assertEqual(problem, "killed by SIGKILL, out of memory")
        shutil.rmtree(self.tmp / "results")
        self.assertEqual(self.script(body).stdout, "9\n")
        (warning,) = self.wait_for_status("success")["warnings"]
        self.assertIn("want of memory", warning)

    def test_killed_just_after_entry(self) -> None:
        self.in_context("os.kill(os.getpid(), 9)")
        self.wait_for_status("failed")
        self.wait_until(
            lambda: self.json("metadata.json")["pip_freeze"] is not None,
            "the recorder completes metadata.json",
        )

    def test_a_process_that_becomes_a_daemon_runs_on(self) -> None:
        body = """
        import run_utils
        run_utils.HEARTBEAT_SECONDS = 0.05
        with run_context("results/exp", "exp"):
            if os.fork():
                os._exit(0)
            while os.path.exists("train.py") and not os.path.exists("go"):
                time.sleep(0.02)
            os._exit(0)
        """
        options = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.addCleanup((self.tmp / "go").touch)
        self.assertEqual(self.script(body, **options).returncode, 0)
        path = self.run_dir() / "status.json"
        first = path.stat().st_mtime
        self.wait_until(lambda: path.stat().st_mtime > first + 0.7, "the heart beats")
        self.assertEqual(self.json("status.json")["status"], "running")
        (self.tmp / "go").touch()
        self.wait_for_status("failed")


class TheHelper(RunCase):
    """The recorder leaves the program alone, and outlives it by little."""

    def test_no_child_no_thread_no_handler_no_hook(self) -> None:
        body = """
        import signal, threading
        def state():
            handlers = [signal.getsignal(n) for n in (1, 2, 15, 17)]
            blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [])
            return handlers, blocked, threading.active_count(), sys.excepthook
        before = state()
        with run_context("results/exp", "exp"):
            print(state() == before)
            pid = os.fork()
            if pid == 0: os._exit(0)
            print(os.wait()[0] == pid)
            try: os.wait()
            except ChildProcessError: print("no child")
        try: os.wait()
        except ChildProcessError: print("no child")
        """
        done = self.script(body, flags=("-X", "dev", "-W", "error"))
        self.assertEqual(done.stdout, "True\nTrue\nno child\nno child\n")
        self.assertEqual((done.returncode, done.stderr), (0, ""))

    @unittest.skipUnless(LINUX, "needs inotify")
    def test_metadata_is_written_when_it_is_complete_and_at_the_end(self) -> None:
        body = """
        import ctypes, run_utils
        system = ctypes.CDLL(None)
        watch = system.inotify_init1(os.O_NONBLOCK)
        IN_MOVED_TO = 0x80
        def written():
            return os.read(watch, 65536).count(b"metadata.json\\0")
        os.makedirs("results/exp/one")
        system.inotify_add_watch(watch, b"results/exp/one", IN_MOVED_TO)
        with run_context("results/exp", run_dir="results/exp/one"):
            run_utils._active[0].recorder.ask("collected", seconds=30)
            print(written())  # the first was on entry
        print(written())
        """
        done = self.script(body)
        self.assertEqual((done.stdout, done.stderr), ("2\n1\n", ""))

    @unittest.skipUnless(LINUX, "needs /proc")
    def test_what_it_is_while_it_runs_and_that_it_ends(self) -> None:
        body = RECORDER + "\n".join([
            "recorder.ask('collected', seconds=30)",
            "place = f'/proc/{recorder.pid}/'",
            "print(recorder.pid, os.getsid(recorder.pid) == os.getsid(0))",
            "print(os.readlink(place + 'cwd'))",
            "print(sorted({os.readlink(place + f'fd/{n}') for n in (0, 1, 2)}))",
            "print(*[s for s in open(place + 'status') if s.startswith('VmRSS')])",
        ])  # fmt: skip
        done = self.in_context(body)
        first, place, standard, memory, *_ = done.stdout.splitlines()
        pid, is_same_session = first.split()
        self.assertEqual((place, standard), ("/proc", "['/dev/null']"))
        self.assertEqual(is_same_session, "False")
        self.assertLess(int(memory.split()[1]), 16_000)
        self.wait_until(lambda: not is_running(int(pid)), "the recorder ends")

    def test_a_descriptor_that_children_inherit_is_not_held(self) -> None:
        body = """
        reader, writer = os.pipe()
        os.set_inheritable(writer, True)
        with run_context("results/exp", "exp"):
            os.close(writer)
            print(os.read(reader, 1))
        """
        self.assertEqual(self.script(body).stdout, "b''\n")

    def test_signals_for_the_whole_group_do_not_end_it(self) -> None:
        body = """
        import signal, threading
        os.setsid()
        for number in (1, 2, 3, 10, 12, 14, 15):
            signal.signal(number, lambda *_: None)
        struck = threading.Event()
        def strike():
            while not struck.is_set():
                for number in (1, 2, 3, 10, 12, 14, 15):
                    os.killpg(0, number)
        thread = threading.Thread(target=strike)
        thread.start()
        with run_context("results/exp", "exp"):
            struck.set()
            thread.join()
            for number in (1, 2, 3, 10, 12, 14, 15):
                os.kill(run_utils._active[0].recorder.pid, number)
            os.kill(os.getpid(), 9)
        """
        done = self.script("import run_utils\n" + textwrap.dedent(body))
        self.assertEqual((done.returncode, done.stderr), (-9, ""))
        self.wait_for_status("failed")

    def test_the_heart_beats(self) -> None:
        body = """
        import run_utils
        run_utils.HEARTBEAT_SECONDS = 0.05
        with run_context("results/exp", "exp") as run_dir:
            path = run_dir / "status.json"
            os.utime(path, (0, 0))
            while path.stat().st_mtime == 0: time.sleep(0.02)
            os.utime(path, (0, 0))
            while path.stat().st_mtime == 0: time.sleep(0.02)
        """
        self.assertEqual(self.script(body).returncode, 0)

    def test_questions_are_answered_in_bounded_time_and_by_their_own_answer(
        self,
    ) -> None:
        body = """
        import select, signal
        recorder.ask("collected", seconds=30)
        os.kill(recorder.pid, signal.SIGSTOP)
        began = time.monotonic()
        print(recorder.ask("drain", seconds=0.1), recorder.is_gone())
        print(time.monotonic() - began < 5)
        os.kill(recorder.pid, signal.SIGCONT)
        select.select([recorder.kept.number], [], [])  # the late answer
        os.kill(recorder.pid, signal.SIGSTOP)
        print(recorder.ask("drain", seconds=0.1))
        os.kill(recorder.pid, signal.SIGCONT)
        print(recorder.ask("add", seconds=30, facts={"added": 1}))
        if os.fork() == 0:
            os._exit(recorder.ask("drain"))
        print(os.wait()[1])
        """
        done = self.in_context(RECORDER + textwrap.dedent(body))
        answers = "False False\nTrue\nFalse\nTrue\n0\n"
        self.assertEqual((done.stdout, done.stderr), (answers, ""))
        self.assertEqual(self.json("metadata.json")["added"], 1)

    def test_a_ctrl_c_while_leaving_ends_the_waiting_and_nothing_else(self) -> None:
        body = """
        import signal, run_utils
        with run_context("results/exp", "exp"):
            recorder = run_utils._active[0].recorder
            recorder.ask("collected", seconds=30)
            os.kill(recorder.pid, signal.SIGSTOP)
            signal.signal(signal.SIGALRM, signal.default_int_handler)
            signal.setitimer(signal.ITIMER_REAL, 0.5)
        print("after the block")
        """
        self.check_the_end_after(self.script(body))

    def check_the_end_after(self, done: Any) -> None:
        """Check that the program went on, and that the recorder does its work."""
        self.assertEqual((done.returncode, done.stdout), (0, "after the block\n"))
        line = "run_utils: the recorder is still busy; it completes the record\n"
        self.assertEqual(done.stderr, line)
        self.assertEqual(self.json("status.json")["status"], "success")
        self.wait_until(
            lambda: self.json("metadata.json")["outputs"] is not None, "the last write"
        )

    @unittest.skipUnless(LINUX, "only Linux tells who is stopped")
    def test_a_recorder_that_was_stopped_holds_nobody_up(self) -> None:
        body = """
        import signal, run_utils
        run_utils.EXIT_WAIT_SECONDS = 600
        with run_context("results/exp", "exp"):
            run_utils.RECORDER_SECONDS = 0.1
            os.kill(run_utils._active[0].recorder.pid, signal.SIGSTOP)
        print("after the block")
        """
        self.check_the_end_after(self.script(body))

    def test_what_the_recorder_cannot_do_is_said_in_metadata(self) -> None:
        body = """
        import run_utils
        run_utils.HEARTBEAT_SECONDS = 0.01
        with run_context("results/exp", "exp") as run_dir:
            os.remove(run_dir / "status.json")
            time.sleep(0.05)
            for _ in range(2):  # in between it has tried to touch the file
                run_utils._active[0].recorder.ask("add", facts={})
        """
        self.assertEqual(self.script(body).returncode, 0)
        problem = self.json("metadata.json")["capture"]["recorder"]["problem"]
        self.assertIn("run_utils: the recorder: FileNotFoundError", problem)

    def test_closing_all_descriptors_in_the_body(self) -> None:
        body = "os.closerange(3, 256); held = open('mine', 'w'); held.write('x')"
        self.assertEqual(self.in_context(body).returncode, 0)
        self.assertEqual((self.tmp / "mine").read_text("utf-8"), "x")
        self.assertEqual(self.json("status.json")["status"], "success")


class LateRanks(unittest.TestCase):
    """A run that has ended, or whose process has died, takes no more ranks."""

    def test_they_get_no_answer(self) -> None:
        reader, writer = os.pipe()
        for descriptor in (reader, writer):
            self.addCleanup(os.close, descriptor)
        helper = mock.Mock(pidfd=reader, is_over=False)
        helper.meeting.tick.return_value = 9.0
        answer = run_utils._RecorderProcess._answer_ranks
        self.assertEqual(answer(helper), 9.0)
        helper.is_over = True
        self.assertNotEqual(answer(helper), 9.0)
        helper.is_over = False
        os.write(writer, b"x")  # as the descriptor of a process that has died
        self.assertNotEqual(answer(helper), 9.0)


class AKilledRecorder(RunCase):
    """A recorder that dies costs a line, and nothing of the output or the record."""

    KILL = RECORDER + "os.kill(recorder.pid, 9)\n"
    KILL += "while not recorder.is_gone(): time.sleep(0.01)\n"

    def check(self, done: Any) -> None:
        self.assertEqual((done.returncode, done.stdout), (0, "still here\n"))
        self.assertIn("run_utils: the recorder is gone", done.stderr)
        self.assertEqual(self.log("stdout"), "still here\n")
        self.assertEqual(self.json("status.json")["status"], "success")
        self.assertIsInstance(self.json("metadata.json")["pip_freeze"], list)

    def test_killed_in_the_block(self) -> None:
        self.check(self.in_context(self.KILL + "print('still here')"))

    def test_with_the_default_action_of_sigpipe(self) -> None:
        start = "import signal\nsignal.signal(signal.SIGPIPE, signal.SIG_DFL)\n"
        self.check(self.in_context(start + self.KILL + "print('still here')"))


class WhateverWasInherited(RunCase):
    """The recorder works whatever the program was started with."""

    def check(self, done: Any) -> None:
        self.assertEqual((done.returncode, done.stdout, done.stderr), (0, "x\n", ""))
        self.assertIsNotNone(self.json("status.json")["heartbeat_seconds"])
        self.assertIsInstance(self.json("metadata.json")["pip_freeze"], list)

    def test_sigchld_ignored(self) -> None:
        (self.tmp / "nvidia-smi").write_text("#!/bin/sh\necho bad >&2; exit 3\n")
        (self.tmp / "nvidia-smi").chmod(0o755)
        ignore = "import signal, os, sys; signal.signal(signal.SIGCHLD, signal.SIG_IGN)"
        script = self.write_script('with run_context("results/exp", "exp"): print("x")')
        words = [PYTHON, "-c", f"{ignore}; os.execv(sys.argv[1], sys.argv[1:])"]
        words += [PYTHON, str(script)]
        env = self.environment({"PATH": f"{self.tmp}:{os.environ['PATH']}"})
        options: Any = {"env": env, "encoding": "utf-8", "capture_output": True}
        self.check(subprocess.run(words, **options))
        problem = self.json("metadata.json")["capture"]["cuda"]["problem"]
        self.assertEqual(problem, "nvidia-smi ended with status 3: bad")

    @unittest.skipUnless(LINUX, "needs /proc")
    def test_python_variables(self) -> None:
        stub = '#!/bin/sh\necho "got $PYTHONWARNINGS" >&2; exit 3\n'
        (self.tmp / "nvidia-smi").write_text(stub, "ascii")
        (self.tmp / "nvidia-smi").chmod(0o755)
        body = """
        with open(f"/proc/{recorder.pid}/environ", "rb") as file:
            names = [text.split(b"=")[0] for text in file.read().split(b"\\0")]
        wrong = {b"PYTHONPATH", b"PYTHONWARNINGS"}.intersection(names)
        assert b"PYTHONHOME" in names and not wrong, names
        print("x")
        """
        env = {"PYTHONHOME": sys.base_prefix, "PYTHONWARNINGS": "error"}
        env["PATH"] = f"{self.tmp}:{os.environ['PATH']}"
        self.check(self.in_context(RECORDER + textwrap.dedent(body), env=env))
        problem = self.json("metadata.json")["capture"]["cuda"]["problem"]
        self.assertIn("got error", problem, "programs get the variables")

    def test_modules_of_the_working_directory_are_not_imported(self) -> None:
        body = """
        os.mkdir("work")
        os.chdir("work")
        for name in ("json", "threading", "re", "marshal", "pathlib", "_socket"):
            with open(f"{name}.py", "w") as file:
                file.write("open('hijacked', 'w')")
        with run_context("../results/exp", "exp"): print("x")
        """
        self.check(self.script(body))
        self.assertFalse((self.tmp / "work" / "hijacked").exists())

    def test_an_import_hook_that_changes_our_code(self) -> None:
        (self.tmp / "helper.py").write_text("", "ascii")
        hook = """
        import sys, importlib.machinery as machinery
        class Hook(machinery.SourceFileLoader):
            def get_code(self, name):
                if name != "run_utils":
                    return super().get_code(name)
                source = self.get_data(self.path) + b"\\nimport helper"
                return compile(source, self.path, "exec")
        others = (machinery.ExtensionFileLoader, machinery.EXTENSION_SUFFIXES)
        hook = machinery.FileFinder.path_hook((Hook, [".py"]), others)
        sys.path_hooks.insert(0, hook)
        sys.path_importer_cache.clear()
        """
        text = textwrap.dedent(hook)
        (self.tmp / "sitecustomize.py").write_text(text, "ascii")
        env = {"PYTHONPATH": f"{self.tmp}{os.pathsep}{HERE}"}
        env["PYTHONPYCACHEPREFIX"] = str(self.tmp / "nothing")
        body = 'with run_context("results/exp", "exp"): print("x")'
        self.check(self.script(body, env=env))

    def test_no_byte_code_is_kept(self) -> None:
        folder = self.tmp / "read-only"
        folder.mkdir()
        shutil.copy(SOURCE, folder)
        env = {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(folder)}
        env["PYTHONPYCACHEPREFIX"] = str(self.tmp / "nothing")
        body = 'with run_context("results/exp", "exp"): print("x")'
        self.check(self.script(body, env=env))
        self.assertEqual(os.listdir(folder), ["run_utils.py"])

    def test_a_zip_file(self) -> None:
        import zipfile

        with zipfile.ZipFile(self.tmp / "app.zip", "w") as archive:
            archive.write(SOURCE, "run_utils.py")
        env = {"PYTHONPATH": str(self.tmp / "app.zip")}
        body = 'with run_context("results/exp", "exp"): print("x")'
        self.check(self.script(body, env=env))


class WithoutARecorder(RunCase):
    """Where no recorder can be started the process does its work, and says so."""

    def check(self, reason: str, done: Any) -> None:
        self.assertEqual((done.returncode, done.stdout), (0, "x\n"))
        line = f"run_utils: no recorder ({reason}): its work is done in this process,"
        self.assertEqual(done.stderr, f"{line} slower\n")
        self.assertEqual(self.json("status.json")["status"], "success")
        self.assertIsNone(self.json("status.json")["heartbeat_seconds"])
        capture = self.json("metadata.json")["capture"]
        self.assertLess({"git", "git.patch", "cuda", "pip_freeze"}, set(capture))
        self.assertEqual(self.log("stdout"), "x\n")

    def test_no_interpreter(self) -> None:
        block = '\nwith run_context("results/exp", "exp"): print("x")'
        for body, reason in {
            'sys.executable = ""': "sys.executable is '', not a Python",
            "sys.frozen = True": "a frozen program",
            "import select; del select.poll": "it takes posix_spawn and poll",
            "del os.posix_spawn": "it takes posix_spawn and poll",
        }.items():
            with self.subTest(reason):
                shutil.rmtree(self.tmp / "results", ignore_errors=True)
                self.check(reason, self.script(body + block))

    def test_source_from_stdin(self) -> None:
        text = SOURCE.read_text("utf-8").partition('\nif __name__ == "__main__":')[0]
        text += '\nwith run_context("results/exp", "exp"): print("x")\n'
        options: Any = {"env": self.environment(), "encoding": "utf-8"}
        options["capture_output"] = True
        done = subprocess.run([PYTHON, "-"], input=text, **options)
        self.check("run_utils is no module of its own", done)

    def test_a_recorder_that_does_not_come_up(self) -> None:
        stub = self.tmp / "python3"
        body = f"""
        import run_utils
        run_utils.RECORDER_SECONDS = 0.2
        sys.executable = {str(stub)!r}
        with run_context("results/exp", "exp"): print("x")
        try: os.wait()
        except ChildProcessError: pass
        """
        for text, reason in {
            "exit 1": "it ended at once",
            "exec sleep 60": "it does not answer within 0.2 s",
        }.items():
            with self.subTest(text):
                shutil.rmtree(self.tmp / "results", ignore_errors=True)
                stub.write_text(f"#!/bin/sh\n{text}\n", "ascii")
                stub.chmod(0o755)
                self.check(reason, self.script(body))

    def test_a_process_limit(self) -> None:
        limit = "import resource\nresource.setrlimit(resource.RLIMIT_NPROC, (1, 1))\n"
        if self.script(limit + "os.fork()").returncode == 0:
            self.skipTest("root has no process limit")
        done = self.script(limit + 'with run_context("results/exp"): print("x")')
        reason = f"[Errno 11] Resource temporarily unavailable: {PYTHON!r}"
        self.check(reason, done)

    WAIT = """
        with run_context("results/exp", "exp"):
            try: os.wait()
            except ChildProcessError: print("x")
    """

    def test_a_process_that_takes_in_orphans(self) -> None:
        body = "import ctypes; ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)\n"
        if not LINUX:
            self.skipTest("only Linux has subreapers")
        done = self.script(body + textwrap.dedent(self.WAIT))
        self.check("this process would become its parent (a subreaper)", done)

    def test_process_1_of_a_container(self) -> None:
        script = self.write_script(self.WAIT)
        words = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
        options: Any = {"env": self.environment(), "encoding": "utf-8"}
        try:
            subprocess.run([*words, "true"], check=True, capture_output=True)
        except (OSError, subprocess.SubprocessError):
            self.skipTest("no process can have number 1 here")
        words += [PYTHON, str(script)]
        done = subprocess.run(words, capture_output=True, **options)
        self.check("process 1 would become its parent", done)


class WhereWindowsLacksNames(RunCase):
    """What needs no recorder works where the names of POSIX are missing."""

    # What os, signal and select have on Windows, and what other modules take here.
    OS = """
        abort access chdir chmod close cpu_count curdir defpath devnull dup dup2 environ
        error execv extsep fdopen fsdecode fsencode fspath fstat fsync ftruncate
        get_exec_path get_inheritable get_terminal_size getcwd getenv getpid getppid
        isatty kill linesep link listdir lseek lstat makedirs mkdir name open pardir
        path pathsep pipe popen putenv read readlink remove rename replace rmdir scandir
        sep set_inheritable stat stat_result strerror symlink system terminal_size
        truncate umask unlink unsetenv urandom utime waitpid walk write altsep
        DirEntry PathLike F_OK R_OK W_OK X_OK O_RDONLY O_WRONLY O_RDWR O_APPEND O_CREAT
        O_EXCL O_TRUNC SEEK_SET SEEK_CUR SEEK_END abc st sys
        supports_dir_fd supports_fd supports_follow_symlinks
        WNOHANG supports_bytes_environ environb getcwdb waitstatus_to_exitcode
        statvfs
    """
    SIGNAL = """
        SIGABRT SIGFPE SIGILL SIGINT SIGSEGV SIGTERM SIG_DFL SIG_IGN Signals Handlers
        signal getsignal default_int_handler strsignal valid_signals raise_signal
        set_wakeup_fd SIGKILL
    """
    WINDOWS = f"""
        import select, signal, subprocess, tempfile, shutil, inspect, traceback, logging
        import argparse, platform, getpass, socket, html, uuid, importlib.metadata
        kept = {{os: {OS.split()}, signal: {SIGNAL.split()}, select: ["select"]}}
        for module, names in kept.items():
            for name in [*vars(module)]:
                if name not in names and not name.startswith("_"):
                    delattr(module, name)
        for name in ("fcntl", "pwd", "grp", "resource", "termios", "tty", "pty"):
            sys.modules[name] = None
        os.supports_dir_fd, os.supports_fd = set(), {{os.stat}}
        from run_utils import *
    """
    RUNS = """
        run_dir = start_run("results/exp", "hand-{lr}", config_args={"lr": 0.1})
        capture_metadata(run_dir)
        log_metrics(run_dir, {"loss": 0.5}, step=1)
        save_json(run_dir / "artifacts/x.json", {"a": 1})
        mark_artifact_used(run_dir / "artifacts/x.json")
        mark_status(run_dir, "success")
        for number in range(2):
            with run_context("results/exp", "block", notes="n", tags=["t"]):
                print("text")
        start_run("results/exp", "flat", until_exit=True)
        print(len(find_runs("results")), load_run(run_dir).summary["loss"]["last"])
    """

    def on_windows(self, body: str, *args: str) -> Any:
        body = textwrap.dedent(body)
        script = textwrap.dedent(self.WINDOWS) + body
        path = self.tmp / "windows.py"
        path.write_text("import os, sys\n" + script, "utf-8")
        return subprocess.run(
            [PYTHON, str(path), *args], env=self.environment(), encoding="utf-8",
            stdin=subprocess.DEVNULL, capture_output=True, timeout=60,
        )  # fmt: skip

    def setUp(self) -> None:
        super().setUp()
        self.done = self.on_windows(self.RUNS)

    def test_runs_and_what_is_missing_is_said_once(self) -> None:
        self.assertEqual(
            (self.done.returncode, self.done.stdout), (0, "text\ntext\n4 0.5\n")
        )
        reason = "it takes posix_spawn and poll"
        line = f"run_utils: no recorder ({reason}): its work is done in this process,"
        self.assertEqual(self.done.stderr, f"{line} slower\n")
        ends = [run["status"] for run in run_utils.find_runs("results")]
        self.assertEqual(ends, ["success"] * 4)
        log = next(self.tmp.glob("results/exp/block-*/logs/stdout.log"))
        self.assertEqual(log.read_text("utf-8"), "text\n")

    def test_readers_and_report(self) -> None:
        body = "sys.exit(main(sys.argv[1:]))"
        commands = [
            "list", "list --json", "inspect latest", "lineage latest", "audit",
            "reindex", "env", "env --json", "report -o page.html",
            "note latest text --tag t", "prune --status success",
        ]  # fmt: skip
        if GIT is not None:
            commands += ["verify latest", "reproduce latest"]
        for command in commands:
            with self.subTest(command):
                done = self.on_windows(body, *command.split())
                self.assertIn(done.returncode, (0, 1), done.stderr)
                self.assertNotIn("Traceback", done.stderr)
                self.assertTrue(done.stdout, done.stderr)
        done = self.on_windows(body, "run", "--", "true")
        self.assertEqual(done.returncode, 2)
        self.assertIn("run takes os.fork, which is not here", done.stderr)


# === Output ===


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

    def test_output_after_a_long_silence_is_shown(self) -> None:
        body = """
        import run_utils, select
        run_utils.SILENT_SECONDS = 0.01
        shown, target = os.pipe()
        before = os.dup(1)
        os.dup2(target, 1)
        with run_context("results/exp", "exp"):
            run_utils._active[0].recorder.ask("collected", seconds=30)
            time.sleep(0.5)
            print("after it", flush=True)
            ready = select.select([shown], [], [], 30)[0]
            os.write(before, os.read(shown, 100) if ready else b"nothing")
        """
        self.assertEqual(self.script(body).stdout, "after it\n")

    def test_every_kind_of_writer(self) -> None:
        done = self.in_context(WRITERS + "print('error', file=sys.stderr)")
        self.assertEqual((done.returncode, done.stderr), (0, "error\n"))
        lines = {"python", "os.write", "child", "puts"}
        self.assertEqual(set(done.stdout.split()), lines)
        self.assertEqual(set(self.log("stdout").split()), lines)
        self.assertEqual(self.log("stderr"), "error\n")

    def test_nobody_waits_for_a_reader_longer_than_is_said(self) -> None:
        Path("log").write_bytes(b"what nobody forwards")
        with open("log", "rb") as log:
            forward = run_utils._Forward(log.fileno(), log.fileno())
            forward.wait(0)
            self.assertEqual(forward.position(), 0)

    def test_what_an_extension_in_C_has_not_flushed(self) -> None:
        body = """
        import types
        sys.modules["extension"] = types.SimpleNamespace(__file__="extension.so")
        import ctypes
        puts = ctypes.CDLL(None).puts
        del sys.modules["ctypes"]  # the extension alone tells that C may be at work
        puts(b"puts")
        """
        self.in_context(body)
        self.assertEqual(self.log("stdout"), "puts\n")

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
        sys.stdout.write("x" * 3_000_000)
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
            timeout=60,
        )
        self.assertEqual((done.stdout, done.stderr), (b"0\n", b""))
        self.assertEqual(self.wait_for_status("success")["exit_code"], 0)
        self.assertEqual(len(self.log("stdout").split()), 20001)

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

    def test_what_we_say_changes_neither_stdout_nor_the_exit_status(self) -> None:
        body = """
        args = {"hf_token": "hf_" + "A" * 36}  # which is told to be redacted
        with run_context("results/exp", "exp", args, capture_output=False):
            print("x")
        """
        command = [PYTHON, str(self.write_script(body))]
        for redirect in self.UNWRITABLE:
            self.assertEqual(self.redirected(command, redirect), (0, "x\n"), redirect)

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

    def test_what_goes_around_a_wrapper_is_logged_too(self) -> None:
        body = """
        import logging
        class Wrapper:  # as that of colorama
            def __init__(self, stream): self.stream = stream
            def __getattr__(self, name): return getattr(self.stream, name)
            def write(self, text): self.stream.write(text.upper())
        logging.getLogger().addHandler(logging.StreamHandler(sys.stdout))
        for kind in (Wrapper, lambda s: open(1, "w", closefd=False)):
            sys.stdout = kind(sys.__stdout__)
            with run_context("results/exp"):
                print("print")
                sys.stdout.flush()
                logging.getLogger().warning("handler")
                sys.__stdout__.write("held\\n")
        """
        shown = self.on_terminal([PYTHON, str(self.write_script(body))])
        texts = ["PRINT\nhandler\nheld\n", "print\nhandler\nheld\n"]
        self.assertEqual(shown, "".join(texts))
        found = [run / "logs" / "output.log" for run in sorted(self.run_dirs())]
        self.assertEqual([log.read_text("utf-8") for log in found], texts)

    def test_the_stream_stays_the_same_object_for_whoever_has_it(self) -> None:
        body = """
        import contextlib, copy, io, logging
        handler = logging.StreamHandler()
        logging.getLogger().addHandler(handler)
        held, write = sys.__stdout__, sys.stdout.write
        def state():
            layers = [sys.stdout, sys.stdout.buffer, sys.stdout.buffer.raw]
            return layers, [vars(layer).copy() for layer in layers], sys.stdout.closed
        before = state()
        with run_context("results/exp"):
            assert state()[0] == before[0] and isinstance(sys.stdout, io.TextIOBase)
            for action in (copy.copy, copy.deepcopy):
                with contextlib.suppress(TypeError):  # as without us
                    action(sys.stdout)
            logging.getLogger().warning("handler")
            held.write("held\\n"); write("method\\n"); print("print")
            sys.stdout.writelines(["lines\\n"]); sys.stdout.buffer.write(b"bytes\\n")
            os.write(1, b"not by Python\\n")
            sys.stdout.reconfigure(errors="replace")
        assert state() == before
        with run_context("results/exp"):
            sys.stdout = io.TextIOWrapper(sys.stdout.detach(), line_buffering=True)
            print("detached")
            with sys.stdout as stream:
                print("with", file=stream)
        """
        shown = self.on_terminal([PYTHON, str(self.write_script(body))])
        self.assertEqual(os.WEXITSTATUS(self.wait_status), 0, shown)
        first, second = sorted((run / "logs/output.log") for run in self.run_dirs())
        lines = ["handler", "held", "method", "print", "lines", "bytes"]
        self.assertEqual(sorted(first.read_text("utf-8").split()), sorted(lines))
        self.assertEqual(second.read_text("utf-8"), "detached\nwith\n")
        self.assertEqual(len(shown.splitlines()), 9, shown)

    def test_time_limits_lose_and_repeat_nothing(self) -> None:
        body = ForeignExceptions.BODY
        shown = self.on_terminal([PYTHON, str(self.write_script(body))])
        numbers = [line for line in shown.splitlines() if line.isdigit()]
        self.assertEqual(numbers, sorted(set(numbers), key=int))
        self.assertEqual(self.log("output").split(), numbers)
        self.assertIn("seen 200", shown)


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

    def test_what_took_the_place_of_the_connection_is_told_nothing(self) -> None:
        body = """
        import run_utils, socket
        ours, other = socket.socketpair()
        with run_context("results/exp", "exp"):
            os.dup2(ours.fileno(), run_utils._active[0].recorder.kept.number)
        other.setblocking(False)
        try: print(other.recv(100))
        except BlockingIOError: print("nothing")
        """
        self.assertEqual(self.script(body).stdout, "nothing\n")
        self.assertEqual(self.json("status.json")["status"], "success")


@unittest.skipIf(os.name != "posix", "descriptors are captured on POSIX")
class FullDisk(RunCase):
    """A log on a full disk costs nothing but the log: not one line, and no wait."""

    def on_full_disk(self, body: str, *flags: str) -> list[str]:
        """Return what a script shows, by stream, with results/ on a disk of 300 kB.

        What run_utils says of it is left out of stderr, and is the third.
        """
        path = self.write_script(body)
        (self.tmp / "results").mkdir(exist_ok=True)
        mount = 'mount -t tmpfs -o size=300k none results && exec "$@"'
        words = ["unshare", "-rm", "sh", "-c", mount, "sh", PYTHON, *flags, str(path)]
        if (
            not shutil.which("unshare")
            or subprocess.run(
                [*words[:5], "mount -t tmpfs none results"], capture_output=True
            ).returncode
        ):
            self.skipTest("no name space with a disk of its own")
        done = subprocess.run(
            words, env=self.environment(), capture_output=True, timeout=50, text=True
        )
        self.assertEqual(done.returncode, 0, done.stderr[-2000:])
        said = re.findall("run_utils: .*\n", done.stderr)
        return [done.stdout, re.sub("run_utils: .*\n", "", done.stderr), "".join(said)]

    BODY = """
    import threading
    def talk(stream, word, last):
        for number in range(last):
            print(word, number, file=stream, flush=bool(FORK))
    waiting = threading.Event()
    bar = threading.Thread(target=waiting.wait)  # as tqdm starts one
    bar.start()
    with run_context("results/exp", "exp"):
        others = [threading.Thread(target=talk, args=(sys.stderr, "error", 15000))]
        for other in others: other.start()
        pid = FORK and os.fork()
        if FORK and pid == 0:
            talk(sys.stdout, "child", 9000)
            os._exit(0)
        talk(sys.stdout, "out", 30000)
        for other in others: other.join()
        if FORK: os.waitpid(pid, 0)
    waiting.set()
    print("after")
    """

    def check(self, shown: str, word: str, last: int) -> None:
        lines = [line for line in shown.splitlines() if line.startswith(word)]
        expected = [f"{word} {number}" for number in range(last)]
        self.assertTrue(lines == expected, f"{len(lines)} lines {word!r}")

    def check_shared(self, shown: str, **last: int) -> None:
        """Check what processes wrote into one stream: every line, in any order.

        A line may be torn: the disk takes the first half of a write, and another
        process may write before the second half comes.
        """
        whole = [f"{word} {n}" for word, count in last.items() for n in range(count)]
        lines = collections.Counter(shown.splitlines())
        missing = collections.Counter(whole) - lines
        self.assertLessEqual(sum(missing.values()), 4, str(missing)[:200])
        self.assertEqual([line for line, n in lines.items() if n > 1], [])

    def test_threads_and_a_forked_worker_lose_nothing(self) -> None:
        for fork, flags in ((0, ()), (1, ()), (0, ("-u",))):
            with self.subTest(fork=fork, flags=flags):
                text = f"FORK = {fork}\n" + textwrap.dedent(self.BODY)
                out, error, said = self.on_full_disk(text, *flags)
                self.assertTrue(out.endswith("\nafter\n"))
                if fork:
                    talk = out[: -len("after\n")]
                    self.check_shared(talk, out=30000, child=9000)
                    self.assertEqual(len(talk), 386780)  # of all these lines
                    self.check_shared(error, error=15000)
                else:
                    self.check(out, "out", 30000)
                    self.check(error, "error", 15000)
                self.assertIn("is no longer logged: [Errno 28] No space left", said)

    def test_a_child_never_asks_the_recorder_of_its_parent(self) -> None:
        body = """
        import run_utils
        def ask(*_, **__): print("asked")
        with run_context("results/exp", "exp"):
            if os.fork() == 0:
                run_utils._captures[0].recorder.ask = ask
                for number in range(40000): print("child", number)
                sys.stdout.flush()
                os._exit(0)
            os.wait()
        """
        out, _, _ = self.on_full_disk(body)
        self.check(out, "child", 40000)
        self.assertNotIn("asked", out)


class ForeignExceptions(RunCase):
    """What a signal handler of the program raises reaches it, and no line is lost."""

    BODY = """
        import signal
        def stop(*_): raise TimeoutError("time limit")
        signal.signal(signal.SIGALRM, stop)
        seen = number = 0
        with run_context("results/exp", "exp"):
            for limit in range(200):
                try:
                    signal.setitimer(signal.ITIMER_REAL, 0.0007 + limit / 1e6)
                    while True:
                        number += 1
                        sys.stdout.write(f"{number}\\n")  # print takes two steps
                        sys.stdout.flush()
                except TimeoutError:
                    seen += 1
        print("seen", seen, file=sys.stderr)
        """

    def test_two_hundred_time_limits(self) -> None:
        done = self.script(self.BODY)
        self.assertEqual((done.returncode, done.stderr), (0, "seen 200\n"))
        numbers = [int(line) for line in done.stdout.split()]
        self.assertEqual(numbers, sorted(set(numbers)))
        self.assertEqual(self.log("stdout"), done.stdout)


class Objects(RunCase):
    """Any object may stand for sys.stdout; it is logged, and then as it was."""

    def test_every_kind_of_stream(self) -> None:
        body = """
        import codecs, io
        class Wrapper:  # as that of colorama
            def __init__(self, stream): self.stream = stream
            def __getattr__(self, name): return getattr(self.stream, name)
            def write(self, text): self.stream.write(text)
        class Tee:  # as many scripts have one
            def __init__(self, stream): self.stream, self.copy = stream, io.StringIO()
            def write(self, text): self.stream.write(text); self.copy.write(text)
            def flush(self): self.stream.flush()
        class Refusing:
            __slots__ = ("stream",)
            def __init__(self, stream): self.stream = stream
            def write(self, text): return self.stream.write(text)
            def flush(self): self.stream.flush()
        class OutStream(io.TextIOBase):  # of a notebook
            def __init__(self, _): self.texts = []
            def write(self, text): self.texts.append(text); return len(text)
        class Capture(io.TextIOWrapper):  # of pytest
            def __init__(self, _): super().__init__(io.BytesIO(), write_through=True)
        class Text(io.StringIO):
            def __init__(self, _): super().__init__()
        real = sys.stdout
        kinds = [Wrapper, Tee, Refusing, OutStream, Capture, Text,
                 lambda s: codecs.getwriter("utf-8")(s.buffer),
                 lambda s: open(1, "w", closefd=False)]
        for kind in kinds:
            sys.stdout = stream = kind(real)
            if kind is OutStream:  # somebody has set the attribute before us
                stream.write = stream.write
            before = dict(getattr(stream, "__dict__", {}))
            for number in range(2):
                with run_context("results/exp", f"kind{kinds.index(kind)}"):
                    print("text")
                    sys.stdout.writelines(["lines\\n"]) if kind is Text else None
            assert sys.stdout is stream, kind
            assert getattr(stream, "__dict__", {}) == before, kind
            stream.flush()
            sys.stdout = real
        """
        done = self.script(body)
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        for run in self.run_dirs():
            text = "text\nlines\n" if run.name.startswith("kind5") else "text\n"
            with self.subTest(run.name):
                self.assertEqual((run / "logs/stdout.log").read_text("utf-8"), text)
        self.assertEqual(done.stdout, 10 * "text\n")

    def test_cell_by_cell_in_a_shell_that_puts_write_back(self) -> None:
        """As IPython does since 9.0, which calls `pre_execute` within each cell."""
        body = """
        import contextlib, io, types
        class Events(list):
            def register(self, name, function): self.append((name, function))
            def unregister(self, name, function): self.remove((name, function))
        events = Events()
        shell = types.SimpleNamespace(events=events)
        sys.modules["IPython"] = types.SimpleNamespace(get_ipython=lambda: shell)
        class OutStream(io.TextIOBase):
            def __init__(self): self.texts = []
            def write(self, text): self.texts.append(text); return len(text)
        sys.stdout = stream = OutStream()
        @contextlib.contextmanager
        def cell():
            before = stream.write
            stream.write = lambda text: before(text)
            for name, function in list(events):
                assert name == "pre_execute"
                function()
            yield
            stream.write = before
        outer, inner = (run_context("results/exp", name) for name in ("a", "b"))
        with cell(): outer.__enter__(); print("one")
        with cell(): print("two")
        with cell():
            with inner: print("three")
        wrapped = stream.write = lambda text, write=stream.write: write(text)
        with cell(): print("four"); outer.__exit__(None, None, None)
        with cell(): print("five")
        assert not events and stream.write is wrapped
        sys.stdout = sys.__stdout__
        print("".join(stream.texts), end="")
        """
        done = self.script(body)
        words = ["one", "two", "three", "four", "five"]
        self.assertEqual(
            (done.returncode, done.stdout.split()), (0, words), done.stderr
        )
        logs = [run / "logs" / "stdout.log" for run in sorted(self.run_dirs())]
        found = [log.read_text("utf-8").split() for log in logs]
        self.assertEqual(found, [words[:4], ["three"]])

    def test_nothing_of_it_is_left_on_a_plain_stream(self) -> None:
        body = """
        def state():
            streams = [sys.stdout, sys.stdout.buffer, sys.stdout.buffer.raw, sys.stderr]
            return [dict(vars(stream)) for stream in streams], sys.stdout.write
        before = state()
        with run_context("results/exp"):
            print(sys.stdout.isatty(), sys.stdout is sys.__stdout__)
        assert state()[0] == before[0], state()
        """
        done = self.script(body)
        self.assertEqual((done.returncode, done.stdout), (0, "False True\n"))


class Overlapping(RunCase):
    """Runs may end in any order: each log has what was printed while it was open."""

    BODY = """
    import subprocess
    def say(text):
        print(text, flush=True)
        subprocess.run(["echo", text + "!"])
    runs = {name: run_context("results/exp", name) for name in "abc"}
    for step in sys.argv[1].split():
        if step[0] == "+": runs[step[1]].__enter__()
        if step[0] == "-": runs[step[1]].__exit__(None, None, None)
        say(step)
    """

    def test_in_any_order(self) -> None:
        orders = [
            "+a +b -a -b",
            "+a +b -b -a",
            "+a +b +c -a -b -c",
            "+a +b +c -b -a -c",
        ]
        for order in orders:
            with self.subTest(order):
                shutil.rmtree(self.tmp / "results", ignore_errors=True)
                done = self.script(self.BODY, order)
                steps = order.split()
                self.assertEqual(done.stderr, "")
                self.assertEqual(done.stdout, self.lines(steps))
                for run in self.run_dirs():
                    name = run.name[0]
                    inside = steps[steps.index("+" + name) : steps.index("-" + name)]
                    log = (run / "logs/stdout.log").read_text("utf-8")
                    self.assertEqual(log, self.lines(inside), run.name)

    def lines(self, steps: list[str]) -> str:
        return "".join(f"{step}\n{step}!\n" for step in steps)

    def test_what_a_thread_writes_when_a_run_ends_comes_last(self) -> None:
        body = """
        import threading
        ended = threading.Event()
        threading.Thread(target=ended.wait).start()
        move = os.dup2
        def move_and_write(*args, **more):
            move(*args, **more)
            os.write(1, b"after\\n")  # as that thread might just now
        for number in range(5):
            with run_context("results/exp", "exp"):
                os.write(1, b"inside\\n")
                os.dup2 = move_and_write
            os.dup2 = move
        ended.set()
        """
        done = self.script(body, stderr=subprocess.DEVNULL)
        self.assertEqual(done.stdout, "inside\nafter\nafter\n" * 5)


class WithoutItsRecorder(RunCase):
    """When the recorder dies, the writer sees it, shows the rest and goes on alone."""

    def test_output_is_shown_while_the_block_goes_on(self) -> None:
        body = """
        import run_utils
        with run_context("results/exp", "exp"):
            print("first", flush=True)
            os.kill(run_utils._active[0].recorder.pid, 9)
            open("killed", "w").close()
            while not os.path.exists("shown"):
                print("more", flush=True)
                time.sleep(0.05)
            print("last")
        """
        child = subprocess.Popen(
            [PYTHON, str(self.write_script(body))],
            env=self.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        assert child.stdout is not None
        with child.stdout:
            lines = [child.stdout.readline(), child.stdout.readline()]
            (self.tmp / "shown").touch()
            lines += child.stdout.readlines()
        self.assertEqual(child.wait(), 0)
        self.assertEqual((lines[0], lines[-1]), (b"first\n", b"last\n"))
        self.assertEqual(self.log("stdout").encode(), b"".join(lines))


class OddLogs(RunCase):
    """What happens to a log while it is written costs the program nothing."""

    def test_a_log_that_is_cut_is_forwarded_on(self) -> None:
        body = """
        import run_utils
        for number in range(3):
            print("x" * 50, number, flush=True)
            run_utils._active[0].recorder.ask("drain")
            os.truncate(run_dir / "logs" / "stdout.log", 0)
            time.sleep(0.3)  # the recorder has to notice it
        print("last")
        """
        done = self.in_context(body)
        expected = "".join(f"{'x' * 50} {number}\n" for number in range(3)) + "last\n"
        self.assertEqual(done.stdout, expected)

    def test_limited_file_sizes_kill_no_child(self) -> None:
        limit = "import resource, subprocess\n"
        limit += "resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))\n"
        body = """
        with run_context("results/exp", "exp"):
            command = "head -c 99000 /dev/zero | tr '\\\\0' x"
            print(subprocess.run(["sh", "-c", command]).returncode)
        """
        done = self.script(limit + textwrap.dedent(body))
        self.assertEqual(done.stdout.strip("x"), "0\n")
        self.assertEqual(len(done.stdout), 99002)
        self.assertIn("what other programs print is not logged", done.stderr)

    def test_a_run_in_another_thread_says_that_it_is_not_captured(self) -> None:
        body = """
        import threading
        def work():
            with run_context("results/exp", "other"): print("there")
        thread = threading.Thread(target=work)
        thread.start(); thread.join()
        print("here")
        """
        done = self.in_context(body)
        self.assertEqual((done.returncode, done.stdout), (0, "there\nhere\n"))
        self.assertEqual(done.stderr.count("is not logged"), 1)

    def test_a_reader_that_is_slow_and_does_not_block(self) -> None:
        body = """
        os.set_blocking(1, False)
        with run_context("results/exp", "exp"):
            os.write(1, b"x" * 1_000_000)
        """
        child = subprocess.Popen(
            [PYTHON, str(self.write_script(body))],
            env=self.environment(),
            stdout=subprocess.PIPE,
        )
        assert child.stdout is not None
        with child.stdout:
            self.wait_until(lambda: self.log("stdout"), "the log is there")
            time.sleep(0.4)  # the longer the pipe is full, the better
            self.assertEqual(len(child.stdout.read()), 1_000_000)
        self.assertEqual(child.wait(), 0)


# === Provenance ===
# One collector finds out one key of metadata.json, or says why it could not.


class ProvenanceCase(RunCase):
    """A clean environment, and stub programs in front on PATH."""

    def setUp(self) -> None:
        super().setUp()
        (self.tmp / "bin").mkdir()
        env = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
        self.patch(mock.patch.dict(os.environ, env, clear=True))

    def patch(self, patcher: Any) -> None:
        patcher.start()
        self.addCleanup(patcher.stop)

    def stub(self, name: str, text: str) -> str:
        """Put a shell script on PATH, which then is nothing else."""
        path = self.tmp / "bin" / name
        path.write_text("#!/bin/sh\nPATH=/usr/bin:/bin\n" + text, "utf-8")
        path.chmod(0o755)
        os.environ["PATH"] = str(self.tmp / "bin")
        return str(path)

    def problem_of(self, ask: Callable[[], object]) -> tuple[Any, str]:
        """Return what is known all the same where `ask` does not know, and why."""
        with self.assertRaises(run_utils._Unknown) as caught:
            ask()
        return caught.exception.facts, str(caught.exception)


class WhatIsRecorded(RunCase):
    """metadata.json has every key, and `capture` says of each how it went."""

    KEYS = (
        "timestamp_utc command argv working_dir hostname user python platform git cuda "
        "pip_freeze local_packages environment container determinism config env inputs "
        "launcher resources run_utils capture"
    )

    def test_keys_and_captures(self) -> None:
        body = """
        import json, random
        state = random.getstate()
        path = start_run("results/exp", config_args={"lr": 0.1})
        capture_metadata(path, extra={"mine": 1})
        lazy = {"yaml", "torch", "numpy", "importlib.metadata"} & set(sys.modules)
        print(json.dumps([sorted(lazy), random.getstate() == state]))
        """
        env = {"PYTHONHASHSEED": "7", "RANK": "0", "EDITOR": "vi"}
        done = self.script(body, "--lr", "0.1", env=env)
        self.assertEqual(json.loads(done.stdout), [[], True], done.stderr)
        found = self.json("metadata.json")
        self.assertLessEqual(set(self.KEYS.split()), set(found))
        self.assertEqual(found["mine"], 1)
        self.assertEqual(found["argv"][1:], [str(self.tmp / "train.py"), "--lr", "0.1"])
        self.assertEqual(shlex.split(found["command"]), found["argv"])
        names = found["run"], found["script_name"]
        self.assertEqual(names, (self.run_dir().name, "train"))
        self.assertEqual(found["python"]["executable"], PYTHON)
        self.assertEqual(found["python"]["version"], sys.version)
        self.assertEqual(found["determinism"]["PYTHONHASHSEED"], "7")
        self.assertEqual(found["launcher"], {"PYTHONHASHSEED": "7", "RANK": "0"})
        self.assertEqual(found["env"]["EDITOR"], "vi")
        self.assertEqual(found["config"]["lr"], 0.1)
        schema = {"version": run_utils.__version__, "vendored": None}
        self.assertEqual(found["run_utils"], {**schema, "schema_version": 2})
        names = {"python", "git", "git.patch", "pip_freeze", "cuda", "container"}
        self.assertLessEqual(names, set(found["capture"]))
        for name, report in found["capture"].items():
            self.assertGreaterEqual(report["seconds"], 0, name)
            self.assertEqual(report["ok"], report["problem"] is None, name)

    def test_one_that_fails_takes_no_other_along(self) -> None:
        body = """
        import run_utils
        def broken():
            raise ZeroDivisionError("a bug")
        def unknown():
            raise run_utils._Unknown("it hung", {"kind": "half"})
        run_utils._cuda = broken
        run_utils._container = unknown
        capture_metadata(start_run("results/exp"))
        """
        self.assertEqual(self.script(body).stderr, "")
        found = self.json("metadata.json")
        problems = {k: v["problem"] for k, v in found["capture"].items()}
        self.assertEqual(problems["cuda"], "ZeroDivisionError: a bug")
        self.assertEqual(problems["container"], "it hung")
        self.assertEqual(found["container"], {"kind": "half"})
        self.assertEqual(problems["pip_freeze"], None)

    def test_a_time_limit_of_the_program_is_not_swallowed(self) -> None:
        body = """
        import run_utils, signal
        def limit(number, frame):
            raise TimeoutError("the program's own")
        signal.signal(signal.SIGUSR1, limit)
        run_utils._cuda = lambda: os.kill(os.getpid(), signal.SIGUSR1) or time.sleep(9)
        try:
            capture_metadata(start_run("results/exp"))
        except TimeoutError as error:
            print(error)
        """
        self.assertEqual(self.script(body).stdout, "the program's own\n")


class WhichProgram(RunCase):
    """The program that runs decides what is recorded, not the files it is given."""

    def setUp(self) -> None:
        super().setUp()
        for name in ("a/tool.sh", "a/pkg/mod.py", "b/data.txt", "b/train.py", "b/x.sh"):
            path = self.tmp / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        (self.tmp / "a/tool.sh").chmod(0o755)
        (self.tmp / "a/pkg/__main__.py").touch()
        self.env = self.tmp / "env"
        self.env.joinpath("bin").mkdir(parents=True)
        self.env.joinpath("pyvenv.cfg").touch()
        for name in ("python", "pytest", "torchrun"):
            (self.env / "bin" / name).write_text("#!/bin/sh\n", "utf-8")
            (self.env / "bin" / name).chmod(0o755)
        path = f"{self.env}/bin:/usr/bin:/bin"
        patcher = mock.patch.dict(os.environ, PATH=path)
        patcher.start()
        self.addCleanup(patcher.stop)
        os.chdir(self.tmp / "a")

    def test_of_a_command(self) -> None:
        # A command: the name of its run, and the folder whose code is recorded first.
        for words, name, folder in (
            ("./tool.sh ../b/data.txt", "tool", "a"),
            ("./tool.sh /etc/hostname", "tool", "a"),
            ("cat ../b/data.txt", "cat", "a"),
            ("bash ../b/x.sh tool.sh", "x", "b"),
            ("bash -o pipefail ../b/x.sh", "x", "b"),
            ("bash -ec ../b/x.sh", "bash", "a"),
            ("python ../b/train.py tool.sh", "train", "b"),
            ("python -u -X dev -W ignore ../b/train.py", "train", "b"),
            ("python -m pkg.mod ../b/data.txt", "mod", "a/pkg"),
            ("python -um pkg", "pkg", "a/pkg"),
            ("python -m pytest ../b/train.py", "pytest", "a"),
            ("python -c 1 ../b/train.py", "python", "a"),
            ("pytest ../b/data.txt", "pytest", "a"),
            ("torchrun --nproc-per-node 2 ../b/train.py x", "train", "b"),
            ("torchrun -m pkg.mod", "mod", "a/pkg"),
            ("env LR=1 python ../b/train.py", "train", "b"),
            ("nice -n 5 bash tool.sh ../b/train.py", "tool", "a"),
            ("no-such-program ../b/train.py", "no-such-program", "a"),
        ):
            site = run_utils._Site.here(words.split())
            found = site.name, site.places()[0], site.directory
            wanted = str(self.tmp / folder)
            self.assertEqual(found, (name, wanted, wanted), words)

    def test_the_python_of_a_command(self) -> None:
        python = f"{self.env}/bin/python"
        for words, origin in (
            ("python x.py", "the command"),
            ("torchrun x.py", "the command"),
            ("pytest", "the command"),
            ("bash ../b/x.sh", "PATH"),
            ("make", "PATH"),
        ):
            site = run_utils._Site.here(words.split())
            self.assertEqual((site.executable, site.origin), (python, origin), words)

    def test_of_this_process(self) -> None:
        code = "import run_utils; site = run_utils._Site.here()\n"
        code += "print(site.name, site.places()[0], site.executable)"
        (self.tmp / "b/train.py").write_text(code, "utf-8")
        (self.tmp / "a/pkg/mod.py").write_text(code, "utf-8")
        for words, name, folder in (
            (["../b/train.py", "tool.sh"], "train", "b"),
            (["-m", "pkg.mod"], "mod", "a/pkg"),
            (["-m", "cProfile", "-o", "/dev/null", "../b/train.py"], "train", "b"),
            (["-c", code], "interactive", "a"),
        ):
            command, env = [PYTHON, *words], self.environment()
            done = subprocess.run(command, env=env, stdout=subprocess.PIPE)
            wanted = f"{name} {self.tmp / folder} {PYTHON}\n"
            self.assertEqual(done.stdout.decode(), wanted)

    @unittest.skipIf(GIT is None, "git is not installed")
    def test_the_commit_in_name_and_metadata(self) -> None:
        os.chdir(self.tmp / "b")
        script = self.write_script('with run_context("results", "exp"): pass')
        script.rename("train.py")
        identity = ["-c", "user.name=n", "-c", "user.email=e@x"]
        for words in (["init", "-q"], ["add", "."], [*identity, "commit", "-qm", "c"]):
            subprocess.run(["git", *words], check=True)
        os.chdir(self.tmp)
        command = [PYTHON, "b/train.py"]
        subprocess.run(command, env=self.environment(), check=True)
        git = self.json("metadata.json")["git"]
        self.assertEqual(git["root"], str(self.tmp / "b"))
        self.assertFalse(git["is_dirty"])
        self.assertTrue(self.run_dir().name.endswith("-" + git["commit_short"]))

    def test_own_sources_that_are_loaded(self) -> None:
        (self.tmp / "b/helper.py").touch()
        code = "import run_utils, helper; print(*run_utils._Site.here().loaded)"
        (self.tmp / "b/train.py").write_text(code, "utf-8")
        command, env = [PYTHON, "../b/train.py"], self.environment()
        done = subprocess.run(command, env=env, stdout=subprocess.PIPE)
        files = {os.path.realpath(line) for line in done.stdout.decode().split()}
        names = {"b/train.py", "b/helper.py"}
        self.assertEqual(files - {str(SOURCE)}, {str(self.tmp / n) for n in names})


# A pip that lists what lies beside it, and leaves a mark where it was asked.
PIP = """
import os, sys
print("asked", file=open(os.environ["ASKED"], "a"))
for name in sorted(os.listdir(os.path.dirname(os.path.dirname(__file__)))):
    if name.endswith(".dist-info"):
        print(name[:-10].replace("-", "=="))
"""


@unittest.skipIf(os.name != "posix", "an environment is laid out differently")
class PackagesAreReused(RunCase):
    """The list of the newest earlier run is taken unless anything may have changed."""

    def setUp(self) -> None:
        super().setUp()
        self.count = 0
        self.python, self.site = self.new_environment("env")
        self.install("alpha", "1.0")

    def new_environment(self, name: str) -> tuple[str, Path]:
        """Copy the empty environment, and give it a pip that tells when it is asked."""
        folder = self.tmp / name
        shutil.copytree(Path(PYTHON).parent.parent, folder, symlinks=True)
        site = next(folder.glob("lib/python*/site-packages"))
        (site / "pip").mkdir()
        (site / "pip/__main__.py").write_text(PIP, "utf-8")
        return str(folder / "bin/python"), site

    def install(self, name: str, version: str, **direct: object) -> Path:
        folder = self.site / f"{name}-{version}.dist-info"
        folder.mkdir()
        text = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n\nAbout\n"
        (folder / "METADATA").write_text(text, "utf-8")
        if direct:
            (folder / "direct_url.json").write_text(json.dumps(direct), "utf-8")
        return folder

    def record(self, python: str = "") -> tuple[dict[str, Any], bool]:
        """Make a run; return its metadata and whether pip was asked."""
        asked = self.tmp / "asked"
        asked.unlink(missing_ok=True)
        self.count += 1
        name = f"results/exp/t-20260101-0000{self.count:02}"
        path = self.write_script("with run_context('.', run_dir=sys.argv[1]): pass")
        env = self.environment({"ASKED": str(asked)})
        command = [python or self.python, str(path), name]
        done = subprocess.run(command, env=env, stderr=subprocess.PIPE)
        self.assertEqual((done.returncode, done.stderr), (0, b""))
        metadata = json.loads((self.tmp / name / "metadata.json").read_text("ascii"))
        self.assertTrue(metadata["capture"]["pip_freeze"]["ok"])
        return metadata, asked.exists()

    def test_the_list_is_taken_over_until_something_changes(self) -> None:
        first, was_asked = self.record()
        self.assertTrue(was_asked)
        self.assertEqual(first["pip_freeze"], ["alpha==1.0"])
        for _ in range(2):
            again, was_asked = self.record()
            self.assertFalse(was_asked)
            self.assertEqual(again["pip_freeze"], ["alpha==1.0"])
            about = {**first["packages"], "taken_from": "t-20260101-000001"}
            self.assertEqual(again["packages"], about)
        changes: dict[str, Callable[[], object]] = {
            "install": lambda: self.install("beta", "1.0"),
            "upgrade": lambda: (
                shutil.rmtree(self.site / "beta-1.0.dist-info"),
                self.install("beta", "2.0"),
            ),
            "the same version put in again": lambda: (
                shutil.rmtree(self.site / "beta-2.0.dist-info"),
                self.install("beta", "2.0", url="https://x.org/b", archive_info={}),
            ),
            "a .pth": lambda: (self.site / "x.pth").write_text("# x", "utf-8"),
        }
        for name, change in changes.items():
            change()
            found, was_asked = self.record()
            self.assertTrue(was_asked, name)
            installed = sorted(path.name for path in self.site.glob("*.dist-info"))
            wanted = [name[:-10].replace("-", "==") for name in installed]
            self.assertEqual(found["pip_freeze"], wanted)
        (self.site / "x.pth").unlink()
        for name in ("beta-2.0", "alpha-1.0"):
            shutil.rmtree(self.site / f"{name}.dist-info")
            found, was_asked = self.record()
            # Without beta all is as it was at first; without alpha as it never was.
            lines = sorted(path.name[:5] for path in self.site.glob("*.dist-info"))
            self.assertEqual([line[:5] for line in found["pip_freeze"]], lines)
            self.assertEqual(was_asked, not lines)

    def test_an_empty_list_is_taken_over_too(self) -> None:
        shutil.rmtree(self.site / "alpha-1.0.dist-info")
        for was_asked in (True, False):
            found = self.record()
            self.assertEqual((found[0]["pip_freeze"], found[1]), ([], was_asked))

    def test_environments_that_share_a_folder_in_turns(self) -> None:
        other, self.site = self.new_environment("other")
        self.install("gamma", "1.0")
        lists = {self.python: ["alpha==1.0"], other: ["gamma==1.0"]}
        for was_asked in (True, False, False):
            for python, lines in lists.items():
                found = self.record(python)
                self.assertEqual((found[0]["pip_freeze"], found[1]), (lines, was_asked))

    def test_many_that_start_together_take_the_list_of_one_that_has_ended(self) -> None:
        found, _ = self.record()
        together = f"{found['run']}-{{}}"
        for number in range(2, 60):  # which know nothing of their packages yet
            folder = self.tmp / "results/exp" / together.format(number)
            folder.mkdir()
            known = {**found, "pip_freeze": None, "packages": None, "capture": {}}
            (folder / "metadata.json").write_text(json.dumps(known), "utf-8")
        found, was_asked = self.record()
        self.assertEqual((found["pip_freeze"], was_asked), (["alpha==1.0"], False))

    def test_of_runs_of_one_second_the_last_counts(self) -> None:
        names = [f"t-20260101-000000{suffix}" for suffix in ("", "-2", "-9", "-10")]
        for name in [*reversed(names), "t-20250101-000000-11"]:
            (self.tmp / "exp" / name).mkdir(parents=True)
        record = run_utils._Record.at(self.tmp / "exp" / names[-1])
        found = [path.name for path in record.earlier_runs()]
        self.assertEqual(found, [*names[2::-1], "t-20250101-000000-11"])

    def test_another_interpreter_and_a_torn_record(self) -> None:
        self.record()
        self.assertTrue(self.record(f"{self.python}3")[1])
        other, self.site = self.new_environment("other")
        self.install("gamma", "1.0")
        for python, lines in ((other, ["gamma==1.0"]), ("", ["alpha==1.0"])):
            found, was_asked = self.record(python)
            self.assertEqual((found["pip_freeze"], was_asked), (lines, bool(python)))
        newest = self.tmp / f"results/exp/t-20260101-0000{self.count:02}/metadata.json"
        whole = json.loads(newest.read_text("ascii"))
        for torn in (
            b"{",
            json.dumps({**whole, "pip_freeze": "x"}).encode(),
            json.dumps({**whole, "packages": None}).encode(),
            json.dumps({**whole, "capture": {}}).encode(),
            json.dumps({**whole, "run_utils": {"schema_version": 1}}).encode(),
        ):
            shutil.rmtree(self.tmp / "results")
            newest.parent.mkdir(parents=True)
            newest.write_bytes(torn)
            found, was_asked = self.record()
            self.assertEqual((found["pip_freeze"], was_asked), (["alpha==1.0"], True))

    @unittest.skipIf(GIT is None, "git is not installed")
    def test_an_editable_package_that_moved_to_another_commit(self) -> None:
        source = self.tmp / "source"
        subprocess.run(["git", "init", "-q", str(source)], check=True)
        url = {"url": f"file://{source}", "dir_info": {"editable": True}}
        self.install("delta", "1.0", **url)
        git = ["git", "-C", str(source), "-c", "user.name=n", "-c", "user.email=e@x"]
        commit = [*git, "commit", "-qm", "x", "--allow-empty"]
        remote = [*git, "remote", "add", "origin", "https://x.org/r"]
        for change in (commit, commit, remote):
            subprocess.run(change, check=True)
            self.assertTrue(self.record()[1], change)
        self.assertFalse(self.record()[1])


class Packages(ProvenanceCase):
    """The packages are what pip says, or else what their own metadata says."""

    def packages(self, *places: Path, executable: str | None = None) -> Any:
        """Ask for the packages below some folders; there is no earlier run."""
        site = run_utils._Site(["train.py"])
        site.executable = executable
        site.sys_path = [str(place) for place in places]
        record: Any = types.SimpleNamespace(earlier_metadata=list)
        return run_utils._Packages(site, record).lines()

    def install(self, place: Path, name: str, direct: str = "") -> None:
        folder = place / f"{name}-1.0.dist-info"
        folder.mkdir(parents=True)
        (folder / "METADATA").write_text(f"Name: {name}\nVersion: 1.0\n", "utf-8")
        if direct:
            (folder / "direct_url.json").write_text(direct, "utf-8")

    def test_without_pip_the_metadata_is_read(self) -> None:
        place = self.tmp / "site-packages"
        self.install(place, "Plain")
        self.install(place, "wheel", '{"url": "https://x.org/w.whl"}')
        vcs = '"vcs_info": {"vcs": "git", "commit_id": "1a"}'
        self.install(place, "vcs", f'{{"url": "https://x.org/r", {vcs}}}')
        local = '{"url": "file:///src/a%20b", "dir_info": {"editable": true}}'
        self.install(place, "local", local)
        (place / "torn-1.0.dist-info").mkdir()
        (place / "old-2.egg-info").write_text("Name: old\nVersion: 2\n", "utf-8")
        self.install(self.tmp / "b/site-packages", "plain", "{}")
        python = self.stub("python", "exit 9")
        found = self.packages(place, self.tmp / "b/site-packages", executable=python)
        vcs, wheel = "vcs @ git+https://x.org/r@1a", "wheel @ https://x.org/w.whl"
        wanted = ["-e /src/a b", "old==2", "Plain==1.0", vcs, wheel]
        self.assertEqual(found, wanted)

    def test_a_broken_direct_url_is_said_and_one_elsewhere_ignored(self) -> None:
        place = self.tmp / "site-packages"
        self.install(place, "broken", '{"url": ')
        beside = self.tmp / "beside"
        self.install(beside, "lure", '{"url": "file:///etc", "dir_info": {}}')
        python = self.stub("python", "exit 9")
        asked = lambda: self.packages(place, beside, executable=python)  # noqa: E731
        lines, problem = self.problem_of(asked)
        self.assertEqual(lines, ["broken==1.0", "lure==1.0"])
        file = place / "broken-1.0.dist-info/direct_url.json"
        self.assertEqual(problem, f"{file} cannot be read")

    def test_a_pip_that_fails_is_said_and_the_metadata_read(self) -> None:
        place = self.tmp / "site-packages"
        self.install(place, "plain")
        (place / "pip").mkdir()
        python = self.stub("python", "echo no ssl >&2; exit 3")
        lines, problem = self.problem_of(
            lambda: self.packages(place, executable=python)
        )
        self.assertEqual(lines, ["plain==1.0"])
        self.assertEqual(problem, "python ended with status 3: no ssl")

    def test_local_sources(self) -> None:
        place = self.tmp / "site-packages"
        self.install(place, "a", '{"url": "file:///a", "dir_info": {"editable": true}}')
        self.install(place, "b", '{"url": "file:///b", "dir_info": {}}')
        (place / "c.egg-link").write_text("/c\n../\n", "utf-8")
        site = run_utils._Site(["train.py"])
        site.sys_path = [str(place)]
        wanted = {"a": ("/a", True), "b": ("/b", False), "c": ("/c", True)}
        self.assertEqual(run_utils._local_sources(site), wanted)

    @unittest.skipUnless(LINUX, "a program without a Python")
    def test_no_module_of_the_current_folder_or_of_pythonpath_is_run(self) -> None:
        lure = "import os; open(os.environ['LURE'], 'w').close()"
        for folder in (self.tmp / "pip", self.tmp / "path/pip"):
            folder.mkdir(parents=True)
            (folder / "__init__.py").touch()
            (folder / "__main__.py").write_text(lure, "utf-8")
        for name in ("json.py", "runpy.py", "encodings.py"):
            (self.tmp / name).write_text(lure, "utf-8")
        env = {"LURE": str(self.tmp / "lured"), "PIP_REQUIRE_VIRTUALENV": "1"}
        env["PYTHONPATH"] = os.pathsep.join(["", ".", str(self.tmp / "path")])
        os.environ.update(env)
        site = run_utils._Site.here([sys.executable, "nothing.py"])
        record: Any = types.SimpleNamespace(earlier_metadata=list)
        lines = run_utils._Packages(site, record).lines()
        self.assertFalse((self.tmp / "lured").exists())
        self.assertIsInstance(lines, list)
        self.assertEqual(site.prefix, sys.prefix)


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
        facts = run_utils._cuda()
        found = [facts[key] for key in ("available", "version", "device_count")]
        self.assertEqual(found, [True, "12.4", 2])
        self.assertEqual(facts["driver_version"], "550.54")
        self.assertEqual(facts["devices"][1]["uuid"], "GPU-9c2d")
        modes = [device["mig.mode.current"] for device in facts["devices"]]
        self.assertEqual(modes, ["Enabled", None])
        self.assertEqual(facts["devices"][0]["memory.total"], 81559)
        self.assertEqual(facts["mig_devices"], ["MIG 1g.10gb (UUID: M)"])

    def test_no_gpu(self) -> None:
        self.patch(mock.patch.object(run_utils, "NVIDIA_DRIVER", "/nonexistent"))
        os.environ["PATH"] = str(self.tmp / "bin")
        self.assertEqual(run_utils._cuda()["available"], False)
        for status in (0, 6):
            text = f"echo No devices were found; exit {status}"
            self.stub("nvidia-smi", f'case "$1" in --q*) {text};; esac')
            facts = run_utils._cuda()
            self.assertEqual((facts["available"], facts["devices"]), (False, []))

    def test_hanging_failing_and_garbage(self) -> None:
        self.patch(mock.patch.object(run_utils, "PROGRAM_SECONDS", 0.3))
        for text, problem in {
            "sleep 60": "nvidia-smi did not end within 0.3 s",
            "exit 9": "nvidia-smi ended with status 9",
            "echo what": "nvidia-smi gave no table",
        }.items():
            self.stub("nvidia-smi", text)
            facts, reason = self.problem_of(run_utils._cuda)
            self.assertEqual((facts["available"], reason), (None, problem))

    def test_a_driver_without_the_program(self) -> None:
        driver = self.tmp / "version"
        driver.write_text("NVRM version: Kernel Module  550.54.15  Tue\n", "utf-8")
        self.patch(mock.patch.object(run_utils, "NVIDIA_DRIVER", str(driver)))
        os.environ["PATH"] = str(self.tmp / "bin")
        facts, reason = self.problem_of(run_utils._cuda)
        found = facts["available"], facts["driver_version"]
        self.assertEqual(found, (None, "550.54.15"))
        self.assertIn("nvidia-smi cannot be started", reason)

    def test_torch_is_read_only_from_what_is_loaded(self) -> None:
        self.assertIsNone(run_utils._loaded_cuda()["torch_cuda_version"])
        torch: Any = types.ModuleType("torch")
        torch.version = types.SimpleNamespace(cuda="12.1")
        self.patch(mock.patch.dict(sys.modules, torch=torch))
        self.assertEqual(run_utils._loaded_cuda()["torch_cuda_version"], "12.1")


class Surroundings(ProvenanceCase):
    """Container, environment and determinism are read, never set or imported."""

    def test_the_container(self) -> None:
        os.environ["APPTAINER_CONTAINER"] = "/images/torch.sif"
        facts = run_utils._container()
        found = facts["kind"], facts["image"]
        self.assertEqual(found, ("apptainer", "/images/torch.sif"))
        del os.environ["APPTAINER_CONTAINER"]
        os.environ["SLURM_CONTAINER_IMAGE"] = "nvcr.io/x:1"
        self.assertEqual(run_utils._container()["image"], "nvcr.io/x:1")

    def test_the_environment_and_its_lock_files(self) -> None:
        (self.tmp / "uv.lock").write_bytes(b"x")
        (self.tmp / "pyvenv.cfg").write_text("home = /usr\nuv = 0.4.18\n", "utf-8")
        site = run_utils._Site(["train.py"])
        site.prefix = str(self.tmp)
        facts = run_utils._environment(site, str(self.tmp))
        self.assertEqual((facts["manager"], facts["uv_version"]), ("uv", "0.4.18"))
        digest = hashlib.sha256(b"x").hexdigest()
        self.assertEqual(facts["lock_files"], {"uv.lock": digest})
        package = self.tmp / "conda" / "conda-meta" / "numpy-2.0-py312.json"
        package.parent.mkdir(parents=True)
        package.touch()
        site.prefix = str(self.tmp / "conda")
        facts = run_utils._environment(site, str(self.tmp / "conda"))
        self.assertEqual((facts["manager"], facts["lock_files"]), ("conda", {}))
        self.assertEqual(facts["conda_packages"], ["numpy-2.0-py312"])
        lines = "# cmd: conda create\n+conda-forge/noarch::a-1-0\n-x/noarch::b-1-0\n"
        (package.parent / "history").write_text(lines)
        facts = run_utils._environment(site, str(self.tmp / "conda"))
        self.assertEqual(facts["conda_channels"], ["conda-forge"])

    def test_a_loaded_torch_is_read_and_a_broken_one_tolerated(self) -> None:
        torch: Any = types.ModuleType("torch")
        torch.initial_seed = lambda: 42
        torch.are_deterministic_algorithms_enabled = lambda: 1 // 0
        torch.backends = types.SimpleNamespace(
            cudnn=types.SimpleNamespace(benchmark=True)
        )
        before = run_utils._determinism()
        with mock.patch.dict(sys.modules, torch=torch):
            facts = run_utils._determinism()
            late = run_utils._late_determinism(before)
        found = [facts[f"torch_{key}"] for key in ("seed", "deterministic")]
        self.assertEqual(found, [42, None])
        self.assertEqual(late, {"torch_seed": 42, "torch_cudnn_benchmark": True})
        self.assertEqual(run_utils._late_determinism(facts), {})

    def test_a_module_imports_nothing_for_us(self) -> None:
        import importlib.util

        asked: list[str] = []
        lazy: Any = types.ModuleType("numpy")
        lazy.__getattr__ = asked.append
        source = self.tmp / "waiting.py"
        source.write_text("raise SystemExit('it was imported')", "utf-8")
        spec: Any = importlib.util.spec_from_file_location("waiting", source)
        spec.loader = importlib.util.LazyLoader(spec.loader)
        waiting: Any = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(waiting)
        modules = {"numpy": lazy, "torch": waiting, "waiting": waiting}
        with mock.patch.dict(sys.modules, modules):
            run_utils._determinism()
            run_utils._quick_metadata(run_utils._Site.here(), None)
        self.assertEqual(asked, [])


class Machine(ProvenanceCase):
    """What the machine says is told without starting a program."""

    def test_platform_agrees_with_the_standard_library(self) -> None:
        import platform

        facts = run_utils._platform()
        self.assertEqual(facts["system"], platform.system())
        self.assertEqual(facts["machine"], platform.machine())
        self.assertEqual(facts["cpu_count"], os.cpu_count())
        self.assertGreater(facts["memory_kib"], 10_000)

    @unittest.skipIf(os.name != "posix", "user ids are POSIX")
    def test_a_user_without_a_name(self) -> None:
        for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
            os.environ.pop(name, None)
        with mock.patch("pwd.getpwuid", side_effect=KeyError):
            self.assertEqual(run_utils._user(), f"uid:{os.getuid()}")

    def test_ids_of_launchers(self) -> None:
        env = {"SLURM_JOB_ID": "7", "RANK": "0", "WORLD_SIZE": "2", "POD_NAME": "a-0"}
        other = {"HOME": "/", "EDITOR": "vi", "RANKING": "1"}
        found = run_utils._launcher({**env, **other})
        self.assertEqual(found, env)


# === Resources ===
# What a run takes of processor, memory and GPU is measured from outside.


@unittest.skipUnless(os.path.isdir("/proc/self/task"), "needs /proc")
class WhatARunTakes(RunCase):
    """metadata.json has peaks and means, metrics/system.jsonl the samples."""

    BODY = """
    import run_utils, subprocess
    run_utils.HEARTBEAT_SECONDS = 0.2
    run_utils.SAMPLE_SHARE = 1.0
    busy = "import time, sys\\nheld = bytearray(int(sys.argv[1]))\\n"
    busy += "while time.process_time() < float(sys.argv[2]): pass\\nprint()\\ninput()"
    def start(size, seconds):
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        child = subprocess.Popen([sys.executable, "-c", busy, size, seconds], **pipes)
        return child
    def end(child):
        child.stdout.readline()
        child.communicate(b"\\n")
    end(start("0", "0.6"))  # before the run, which did not take it
    with run_context("results/exp", "exp") as run_dir:
        held = bytearray(60_000_000)
        end(start("0", "0.3"))
        children = [start("50_000_000", "0.1"), start("0", "0.1")]
        for child in children:
            child.stdout.readline()
        rows = run_dir / "metrics/system.jsonl"
        def count():
            return rows.exists() and rows.read_text().count('"processes": 3')
        before = count()  # samples of children that had not begun
        while count() <= before:
            time.sleep(0.01)  # until a sample has seen them all at work
        for child in children:
            child.communicate(b"\\n")
    """

    def test_processor_time_and_memory_of_the_whole_tree(self) -> None:
        done = self.script(self.BODY)
        self.assertEqual(done.stderr, "")
        found = self.json("metadata.json")["resources"]
        # 0.3 s of a child that has ended, 0.1 s of each of two, and what starting takes
        self.assertGreater(found["cpu_seconds"], 0.45)
        self.assertLess(found["cpu_seconds"], 1.05)
        self.assertEqual(found["cpu_source"], "/proc, with ended children")
        self.assertGreater(found["cpu_percent_peak"], 0)
        self.assertGreaterEqual(found["memory_bytes_peak"], 110_000_000)
        self.assertLess(found["memory_bytes_peak"], 300_000_000)
        self.assertLess(found["memory_bytes_mean"], found["memory_bytes_peak"])
        for source in found["memory_source"].split(" or "):
            self.assertIn(source, ("proportional", "resident minus shared"))
        self.assertIsNone(found["problem"])
        text = (self.run_dir() / "metrics/system.jsonl").read_text("ascii")
        rows = [json.loads(line) for line in text.splitlines()]
        self.assertEqual(found["samples"], len(rows) + 1)
        names = {"time", "processes", "cpu_percent", "memory_bytes", "memory_source"}
        self.assertEqual(set(rows[0]), names)
        self.assertEqual(max(row["processes"] for row in rows), 3)

    def test_it_can_be_turned_off(self) -> None:
        self.script('with run_context("results/exp", "exp", resources=False): pass')
        metadata = self.json("metadata.json")
        self.assertIsNone(metadata["resources"])
        self.assertNotIn("recorder", metadata["capture"])  # it has no problem
        self.assertFalse((self.run_dir() / "metrics/system.jsonl").exists())

    def test_memory_beyond_the_limit_is_not_counted_by_pages(self) -> None:
        body = """
        import run_utils
        run_utils.PROPORTIONAL_BYTES = 0
        with run_context("results/exp", "exp"):
            pass
        """
        self.script(body)
        found = self.json("metadata.json")["resources"]
        self.assertEqual(found["memory_source"], "resident minus shared")
        self.assertGreater(found["memory_bytes_peak"], 1_000_000)

    def test_gpus(self) -> None:
        tools = self.tmp / "bin"
        tools.mkdir()
        (tools / "nvidia-smi").write_text(
            '#!/bin/sh\ncase "$1" in --query-gpu=index,util*) '
            'echo "0, 93, 40536"; echo "1, [N/A], 81";; esac\n'
        )
        (tools / "nvidia-smi").chmod(0o755)
        body = """
        import run_utils
        run_utils.HEARTBEAT_SECONDS = 0.05
        run_utils.SAMPLE_SHARE = 1.0
        with run_context("results/exp", "exp") as run_dir:
            rows = run_dir / "metrics/system.jsonl"
            while not (rows.exists() and "gpu0" in rows.read_text()):
                time.sleep(0.01)
        """
        self.script(body, env={"PATH": f"{tools}:{os.environ['PATH']}"})
        found = self.json("metadata.json")["resources"]
        self.assertEqual(found["gpu_source"], "nvidia-smi")
        first, second = found["gpus"]
        self.assertEqual(first["index"], "0")
        self.assertEqual(first["utilization_percent_peak"], 93)
        self.assertEqual(first["memory_mib_mean"], 40536)
        self.assertEqual(second, {"index": "1", "memory_mib_mean": 81,
                                  "memory_mib_peak": 81})  # fmt: skip

    def test_a_slow_nvidia_smi_is_asked_less_often_and_a_failing_one_no_more(
        self,
    ) -> None:
        calls: list[object] = []

        def ask(columns: object, seconds: float) -> list[list[str]]:
            calls.append(seconds)
            time.sleep(0.01)
            if is_failing:
                raise run_utils._Unknown("it hung")
            return [["0", "5", "6"]]

        is_failing = False
        meter = run_utils._GpuMeter()
        meter.source = "nvidia-smi"
        with mock.patch.object(run_utils, "_nvidia_smi", ask):
            found = [meter.measure() for _ in range(3)]
            self.assertEqual(len(calls), 1)
            is_failing = True
            meter.due = 0.0
            found += [meter.measure() for _ in range(3)]
        row = {"gpu0_utilization_percent": 5, "gpu0_memory_mib": 6}
        self.assertEqual(found, [row, {}, {}, {}, {}, {}])
        self.assertEqual((meter.problem, len(calls)), ("it hung", 2))


class WithoutProc(RunCase):
    """Where there is no /proc, that is said."""

    def test_the_reason_is_kept(self) -> None:
        with mock.patch.object(run_utils, "isdir", return_value=False):
            sampler = run_utils._Sampler(os.getpid(), mock.Mock())
            self.assertEqual(sampler.tick(), run_utils.HEARTBEAT_SECONDS)
            found = sampler.summary()
        self.assertEqual((found["samples"], found["cpu_seconds"]), (0, None))
        sentence = "there is no /proc, which tells what processes take"
        self.assertEqual(found["problem"], sentence)


# === Git ===


SECRET = b"ghp_" + b"aB3" * 12  # of a provider's shape
SPECIFIC = b"q7Rk2Lm9Xw4Zt8"  # of no shape: a password


class Captured:
    """What the collectors of one run found out about the code, and where it lies."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.problems: dict[str, str] = {}
        self.git: dict[str, Any] = {}
        self.patch: dict[str, Any] = {}
        self.packages: list[dict[str, Any]] = []

    @property
    def text(self) -> bytes:
        if self.patch["file"] is None:
            return b""
        return (self.folder / self.patch["file"]).read_bytes()

    @property
    def left_out(self) -> dict[str, str]:
        return {entry["path"]: entry["reason"] for entry in self.patch["left_out"]}


class CodeCase(RunCase):
    """Git repositories, what is recorded of them, and the trees rebuilt from that."""

    def setUp(self) -> None:
        super().setUp()
        if GIT is None:
            self.skipTest("git is not installed")
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
        path.parent.mkdir(exist_ok=True)
        path.write_text("#!/bin/sh\nPATH=/usr/bin:/bin\n" + text, "utf-8")
        path.chmod(0o755)
        os.environ["PATH"] = str(self.tmp / "bin")
        return str(path)

    def git(self, *words: str, cwd: Path | None = None) -> str:
        command = ["git", *words]
        done = subprocess.run(command, cwd=cwd or self.repo, capture_output=True)
        self.assertEqual(done.returncode, 0, done.stderr)
        return done.stdout.decode().strip()

    def write(self, path: str | Path, content: bytes) -> None:
        target = self.repo / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)

    def commit(self, files: dict[str, bytes], subject: str = "more") -> None:
        for path, content in files.items():
            self.write(path, content)
        self.git("add", "-A", "-f")
        self.git("commit", "-qm", subject, "--allow-empty")

    def new_repo(
        self, name: str = "repo", files: dict[str, bytes] | None = None, *options: str
    ) -> Path:
        """Make a repository with one commit that no remote has."""
        self.repo = self.tmp / name
        self.repo.mkdir(parents=True)
        self.git("init", "-q", *options)
        self.commit({"a.txt": b"one\n", **(files or {})}, "first")
        return self.repo

    def pushed_repo(
        self, name: str = "repo", files: dict[str, bytes] | None = None
    ) -> Path:
        """Make a repository whose one commit is in <name>.git, its origin."""
        repo = self.new_repo(name, files)
        self.push(self.new_remote("origin"))
        return repo

    def new_remote(self, name: str) -> str:
        """Make an empty remote of self.repo; return its name."""
        folder = self.tmp / f"{self.repo.name}.{name}.git"
        self.git("init", "-q", "--bare", str(folder))
        self.git("remote", "add", name, str(folder))
        return name

    def push(self, remote: str = "origin") -> None:
        self.git("push", "-q", "-u", remote, "HEAD:main")

    def capture(self, entered: int | None = None, **facts: Any) -> Captured:
        """Let the collectors look at self.repo and write into a new run."""
        redactor = run_utils._Redactor()
        self.patch(mock.patch.object(run_utils, "_redactor", redactor))
        folder = self.tmp / "results" / "exp"
        folder.mkdir(parents=True, exist_ok=True)
        folder /= f"r-20260131-142501-{len(os.listdir(folder)):04}"
        folder.mkdir()
        record = run_utils._Record.at(folder)
        site = run_utils._Site.here()
        settings = {
            "directory": str(self.repo), "script": None, "loaded": [], "sys_path": [],
            "executable": None, "results_root": str(self.tmp / "results"),
            "run_dir": str(record.path), "entered": None, **facts,
        }  # fmt: skip
        if entered is not None:
            settings["entered"] = [entered, -1, 0]
        for name, value in settings.items():
            setattr(site, name, value)
        captured = Captured(record.path)
        answers: list[Any] = []
        for name, ask in run_utils._git_collectors(site, record).items():
            try:
                answers.append(ask())
            except run_utils._Unknown as reason:
                answers.append(reason.facts)
                if not reason.is_expected:
                    captured.problems[name] = str(reason)
        captured.git, captured.patch, captured.packages = answers
        return captured

    def rebuild(self, captured: Captured, *settings: str) -> Path:
        """Make the tree by the four lines of the README."""
        tree = self.tmp / "rebuilt"
        shutil.rmtree(tree, ignore_errors=True)
        tree.mkdir()
        base = captured.git["base"]
        if base is None:
            self.git("init", "-q", cwd=tree)
        else:
            self.clone(base, tree, *settings)
        for inner in self.all_inner(captured.git["submodules"] or []):
            if inner["base"] is not None:
                self.clone(inner["base"], tree / inner["path"])
        if captured.patch["file"]:
            patch = str(captured.folder / captured.patch["file"])
            self.git("apply", "--whitespace=nowarn", patch, cwd=tree)
        return tree

    def clone(self, base: dict[str, str], tree: Path, *settings: str) -> None:
        url = base["url"] or str(self.repo)
        self.git("init", "-q", str(tree), cwd=self.tmp)
        for setting in settings:
            self.git("config", *setting.split("="), cwd=tree)
        self.git("fetch", "-q", url, base["commit"], cwd=tree)
        self.git("checkout", "-q", "FETCH_HEAD", cwd=tree)

    def all_inner(self, modules: list[dict[str, Any]]) -> list[dict[str, Any]]:
        found = []
        for module in modules:
            found += [module, *self.all_inner(module["submodules"] or [])]
        return found

    def assert_round_trip(self, *settings: str, **facts: Any) -> Captured:
        captured = self.capture(**facts)
        self.assertEqual(captured.problems, {})
        tree = self.rebuild(captured, *settings)
        self.assertEqual(read_tree(tree), read_tree(self.repo))
        return captured


def read_tree(root: Path) -> dict[str, tuple[object, bytes]]:
    """Return {path: (kind, content)} of all files but git's own."""
    tree: dict[str, tuple[object, bytes]] = {}
    for folder, folders, files in os.walk(root):
        links = [name for name in folders if os.path.islink(os.path.join(folder, name))]
        folders[:] = [name for name in folders if name != ".git"]
        for name in [name for name in files + links if name != ".git"]:
            path = os.path.join(folder, name)
            if os.path.islink(path):
                kind, content = "link", os.fsencode(os.readlink(path))
            else:
                kind = f"{os.stat(path).st_mode & 0o100:o}"
                content = Path(path).read_bytes()
            tree[os.path.relpath(path, root)] = kind, content
    return tree


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class WhereThePatchStarts(CodeCase):
    """The base is the newest commit of this history that a remote has."""

    def test_the_head_of_a_pushed_branch(self) -> None:
        self.pushed_repo()
        captured = self.assert_round_trip()
        head = self.git("rev-parse", "HEAD")
        url = str(self.tmp / "repo.origin.git")
        base = {"commit": head, "remote": "origin", "url": url}
        self.assertEqual(captured.git["base"], base)
        found = [captured.git[key] for key in ("unpushed", "is_dirty", "branch")]
        self.assertEqual(found, [0, False, "main"])
        self.assertEqual(captured.patch["file"], None)
        self.assertEqual(os.listdir(captured.folder), [])

    def test_unpushed_commits_and_changes_are_one_patch(self) -> None:
        self.pushed_repo(files={"gone": b"1\n", "both": b"1\n", "back": b"1\n"})
        pushed = self.git("rev-parse", "HEAD")
        self.commit({"both": b"2\n", "back": b"2\n", "new": b"2\n"}, "Add a thing")
        (self.repo / "gone").unlink()
        self.git("mv", "new", "moved")
        self.commit({}, "Move the thing")
        self.write("both", b"3\n")
        self.write("back", b"1\n")
        self.write("untracked", b"3\n")
        captured = self.assert_round_trip()
        self.assertEqual(captured.git["base"]["commit"], pushed)
        subjects = [row["subject"] for row in captured.git["unpushed_commits"]]
        self.assertEqual(subjects, ["Move the thing", "Add a thing"])
        self.assertEqual(captured.git["unpushed"], 2)
        self.assertEqual(captured.patch["files"], 4)
        self.assertEqual(captured.git["changed"], ["back", "both"])

    def test_a_fork_and_a_remote_that_is_not_called_origin(self) -> None:
        self.new_repo()
        self.push(self.new_remote("upstream"))
        self.commit({"fork.txt": b"1\n"}, "only in the fork")
        self.new_remote("fork")
        self.git("push", "-q", "fork", "HEAD:topic/x")
        self.commit({"mine": b"1\n"}, "only here")
        base = self.assert_round_trip().git["base"]
        found = base["remote"], base["url"], base["commit"]
        url = str(self.tmp / "repo.fork.git")
        self.assertEqual(found, ("fork", url, self.git("rev-parse", "HEAD^")))

    def test_the_remote_of_the_branch_comes_before_origin(self) -> None:
        self.pushed_repo()
        self.push(self.new_remote("a-copy"))
        self.assertEqual(self.capture().git["base"]["remote"], "a-copy")
        self.git("checkout", "-q", "--detach")
        self.assertEqual(self.capture().git["base"]["remote"], "origin")

    @unittest.skipUnless(sys.getfilesystemencoding() == "utf-8", "ASCII names only")
    def test_without_a_remote_the_patch_has_the_whole_tree(self) -> None:
        self.new_repo(files={"bin": b"\0\1\2" * 500, "e m/pty": b"", "n": b"a\n\nb"})
        (self.repo / "link").symlink_to("a.txt")
        (self.repo / "a.txt").chmod(0o755)
        self.commit({}, "second")
        self.write('untracked \u00fc\n\t"', b"\\ x\r\n")
        captured = self.assert_round_trip()
        found = captured.git["base"], captured.git["unpushed"], captured.patch["files"]
        self.assertEqual(found, (None, 2, 6))
        subjects = [row["subject"] for row in captured.git["unpushed_commits"]]
        self.assertEqual(subjects, ["second", "first"])

    def test_a_large_tree_without_a_remote_starts_at_its_head(self) -> None:
        self.limit(WHOLE_FILES=2)
        self.new_repo(files={"b": b"1\n", "c": b"1\n"})
        self.write("b", b"2\n")
        captured = self.capture()
        head = self.git("rev-parse", "HEAD")
        base = {"commit": head, "remote": None, "url": None}
        self.assertEqual(captured.git["base"], base)
        sentence = f"^no remote is known to have commit {head[:12]}, only '{self.repo}'"
        self.assertRegex(captured.problems["git.patch"], sentence)
        self.assertEqual(list(captured.problems), ["git.patch"])
        self.assertEqual(read_tree(self.rebuild(captured)), read_tree(self.repo))
        self.limit(WHOLE_FILES=9, WHOLE_BYTES=5)
        self.assertEqual(self.capture().git["base"], base)

    def test_a_remote_without_a_common_commit(self) -> None:
        self.new_repo()
        self.new_remote("origin")
        self.assertIsNone(self.assert_round_trip().git["base"])

    def test_a_shallow_clone_of_a_commit_that_no_branch_has(self) -> None:
        self.pushed_repo()
        self.commit({"b": b"1\n"})
        self.git("push", "-q", "origin", "HEAD:refs/pull/1/head")
        self.commit({"c": b"1\n"})
        origin = self.tmp / "repo.origin.git"
        self.git("config", "uploadpack.allowAnySHA1InWant", "true", cwd=origin)
        self.repo = self.tmp / "shallow"
        self.git("init", "-q", str(self.repo), cwd=self.tmp)
        self.git("remote", "add", "origin", origin.as_uri())
        self.git("fetch", "-q", "--depth=1", "origin", "refs/pull/1/head")
        self.git("checkout", "-q", "FETCH_HEAD")
        self.write("a.txt", b"two\n")
        captured = self.assert_round_trip()
        found = captured.git["is_shallow"], captured.git["base"]["url"]
        self.assertEqual(found, (True, origin.as_uri()))

    def test_worktrees_and_a_git_dir_elsewhere(self) -> None:
        repo = self.pushed_repo()
        self.git("worktree", "add", "-q", "-b", "side", str(self.tmp / "side"))
        self.git("worktree", "add", "-q", "-b", "near", str(self.tmp / "near"))
        back = repo / ".git/worktrees/near/gitdir"
        back.write_text("../../../../near/.git\n")  # as git 2.48 can write it
        apart = str(self.tmp / "apart")
        self.git("clone", "-q", f"--separate-git-dir={apart}", str(repo),
                 str(self.tmp / "separate"))  # fmt: skip
        self.git("init", "-q", f"--separate-git-dir={apart}2", str(self.tmp / "bare"))
        for name in ("side", "near", "separate", "bare"):
            self.repo = self.tmp / name
            self.write("new", b"1\n")
            with self.subTest(name):
                self.assertEqual(self.assert_round_trip().git["root"], str(self.repo))

    def test_short_and_relative_urls_are_told_in_full(self) -> None:
        self.pushed_repo()
        self.git("config", f"url.{self.tmp}/.insteadOf", "t:")
        for url in ("t:repo.origin.git", "../repo.origin.git"):
            self.git("remote", "set-url", "origin", url)
            base = self.assert_round_trip().git["base"]
            self.assertEqual(base["url"], str(self.tmp / "repo.origin.git"))


class GitFacts(CodeCase):
    """Commit, branch, changes and remote are told in every state of a repository."""

    def test_a_clean_repository_from_a_sub_folder(self) -> None:
        repo = self.pushed_repo(files={"sub/x": b"1\n"})
        captured = self.capture(directory=str(repo / "sub"))
        facts = captured.git
        commit = self.git("rev-parse", "HEAD")
        self.assertEqual((facts["commit_full"], facts["root"]), (commit, str(repo)))
        self.assertTrue(commit.startswith(facts["commit_short"]))
        self.assertEqual(run_utils._git_head(str(repo)), facts["commit_short"])
        self.assertEqual(facts["remote_origin_url"], str(self.tmp / "repo.origin.git"))

    def test_what_makes_it_dirty(self) -> None:
        repo = self.pushed_repo(files={".gitignore": b"*.log\n"})
        for change in ("echo x >> a.txt", "echo x > new", "rm a.txt", "chmod +x a.txt"):
            subprocess.run(["sh", "-c", change], cwd=repo, check=True)
            self.assertTrue(self.capture().git["is_dirty"], change)
            self.git("reset", "-q", "--hard")
            self.git("clean", "-qfd")
        (repo / "x.log").write_text("ignored", "utf-8")
        self.assertFalse(self.capture().git["is_dirty"])

    def test_detached_unborn_and_bare(self) -> None:
        self.pushed_repo()
        self.git("checkout", "-q", "--detach")
        facts = self.capture().git
        self.assertEqual((facts["branch"], facts["is_dirty"]), (None, False))
        self.repo = self.tmp / "unborn"
        self.git("init", "-q", str(self.repo), cwd=self.tmp)
        facts = self.capture().git
        self.assertEqual((facts["branch"], facts["commit_full"]), ("main", None))
        self.assertIsNone(run_utils._git_head(str(self.repo)))
        self.repo = self.tmp / "repo.origin.git"
        captured = self.capture()
        self.assertEqual((captured.git["root"], captured.problems), (None, {}))

    def test_a_stash_that_status_shows(self) -> None:
        self.pushed_repo()
        self.write("a.txt", b"two\n")
        self.git("stash")
        self.git("config", "status.showStash", "true")
        self.write("a.txt", b"three\n")
        self.assertEqual(self.assert_round_trip().git["changed"], ["a.txt"])

    def test_git_variables_of_the_caller_do_not_count(self) -> None:
        repo = self.pushed_repo()
        os.environ.update(GIT_DIR="/nonexistent", GIT_INDEX_FILE="/nonexistent")
        self.assertEqual(self.capture().git["root"], str(repo))

    def test_a_repository_of_another_user_says_what_to_do(self) -> None:
        repo = self.pushed_repo(files={"train.py": b"pass\n"})
        self.assume_another_owner()
        captured = self.capture(script=str(repo / "train.py"))
        self.assertIsNone(captured.git["commit_full"])
        for name in ("git", "git.patch"):
            advice = f"git config --global --add safe.directory {repo}"
            self.assertIn(advice, captured.problems[name])
        self.assertIn(b"train.py", captured.text)

    def assume_another_owner(self) -> None:
        stranger = {"GIT_TEST_ASSUME_DIFFERENT_OWNER": "1"}
        self.patch(mock.patch.dict(run_utils._GIT_ENVIRONMENT, stranger))

    def test_a_git_that_fails_hangs_or_lies(self) -> None:
        self.pushed_repo()
        self.limit(PROGRAM_SECONDS=0.2, HEAD_SECONDS=0.2, PATCH_SECONDS=0.2)
        for text in ("exit 128", "sleep 60", "printf 'true\\nfalse\\n\\377\\000'"):
            self.stub("git", f"echo started >> {self.tmp}/calls; {text}")
            captured = self.capture()
            self.assertIsNone(captured.git["commit_full"], text)
            self.assertEqual(list(captured.problems), ["git", "git.patch"], text)
            self.assertIsNone(run_utils._git_head(str(self.repo)))
        calls = (self.tmp / "calls").read_text().splitlines()
        self.assertEqual(len(calls), 3 + 2 + 3)  # one that hung is not asked again

    def test_one_call_that_fails_does_not_take_the_others_along(self) -> None:
        """`git status` cannot read the index: commit and remote are told."""
        self.pushed_repo()
        (self.repo / ".git" / "index").write_bytes(b"broken")
        captured = self.capture()
        self.assertRegex(captured.problems["git"], "^git ended with status 128: ")
        head = self.git("rev-parse", "HEAD")
        found = captured.git["commit_full"], captured.git["remote_origin_url"]
        self.assertEqual(found, (head, str(self.tmp / "repo.origin.git")))

    def test_few_calls_for_a_run(self) -> None:
        """The commit is asked for on entry, and not again by the recorder."""
        script = f"import sys; sys.path.insert(0, {str(Path(SOURCE).parent)!r})\n"
        script += "from run_utils import run_context\n"
        script += "with run_context('results'): pass\n"
        files = {"train.py": script.encode(), ".gitignore": b"results\n", "f": b"1\n"}
        repo = self.pushed_repo(files=files)
        (repo / "f").write_text("2\n", "ascii")
        git = shutil.which("git")
        self.stub("git", f'echo "$*" >> {self.tmp}/calls; exec {git} "$@"')
        subprocess.run([sys.executable, repo / "train.py"], cwd=repo, check=True)
        calls = (self.tmp / "calls").read_text("utf-8")
        words = ("rev-parse", "config", "status", "ls-files", "cat-file", "diff")
        found = re.findall(rf" ({'|'.join(words)}) ", calls)
        self.assertEqual(sorted(found), sorted(words), calls)

    def test_few_calls_for_a_clean_repository(self) -> None:
        self.pushed_repo()
        calls = []
        real = run_utils._git_run

        def counted(directory: str, *words: str, **how: Any) -> bytes:
            calls.append(words[0])
            answer: bytes = real(directory, *words, **how)
            return answer

        self.patch(mock.patch.object(run_utils, "_git_run", counted))
        self.capture()
        self.assertEqual(calls, ["rev-parse", "config", "status", "ls-files"])


class WithoutGit(CodeCase):
    """Where there is no git the patch has the script and the sources around it."""

    def new_folder(self) -> Path:
        self.repo = self.tmp / "copied"
        for name in ("train.py", "pkg/model.py", "conf/a.yaml", "MANIFEST.in"):
            self.write(name, name.encode() + b"\n")
        (self.repo / "link").symlink_to("train.py")
        return self.repo

    def test_a_folder_without_a_repository(self) -> None:
        folder = self.new_folder()
        captured = self.assert_round_trip(script=str(folder / "train.py"))
        self.assertEqual(set(captured.git.values()), {None})
        self.assertEqual(captured.patch["root"], str(folder))

    def test_without_the_program(self) -> None:
        folder = self.new_folder()
        os.environ["PATH"] = str(self.tmp)
        captured = self.capture(script=str(folder / "train.py"))
        self.assertEqual((captured.problems, captured.patch["files"]), ({}, 5))
        (folder / ".git").mkdir()  # now somebody would miss it
        self.assertIn("in a repository", self.capture().problems["git"])

    def test_what_is_not_its_code(self) -> None:
        folder = self.new_folder()
        self.write("data.bin", b"\0x")
        for name in ("exp-20260131-142501/status.json", "env/pyvenv.cfg",
                     "env/x.py", ".cache/x.py", "other/.git/config", "other/x.py",
                     "exp-20260131-142501/x.py", "__pycache__/x.py"):  # fmt: skip
            self.write(name, b"x\n")
        (folder / "linked").symlink_to(self.tmp, target_is_directory=True)
        captured = self.capture(script=str(folder / "train.py"))
        names = sorted(read_tree(self.rebuild(captured)))
        code = ["MANIFEST.in", "conf/a.yaml", "link", "linked", "pkg/model.py"]
        self.assertEqual(names, [*code, "train.py"])  # a link, not what is behind it
        self.assertEqual(captured.left_out, {"data.bin": "no source"})

    def test_a_home_directory_is_not_a_program(self) -> None:
        self.write_home("train.py", "diary.txt", "thesis/secret.md", "lib/used.py")
        self.repo = self.tmp
        script, used = str(self.tmp / "train.py"), str(self.tmp / "lib" / "used.py")
        loaded = [used, json.__file__, run_utils.__file__]
        captured = self.capture(script=script, loaded=loaded)
        tree = read_tree(self.rebuild(captured))
        self.assertEqual(sorted(tree), ["lib/used.py", "train.py"])

    def write_home(self, *names: str) -> None:
        for name in names:
            (self.tmp / name).parent.mkdir(exist_ok=True)
            (self.tmp / name).write_bytes(b"x\n")

    def test_the_limits_keep_the_script(self) -> None:
        folder = self.new_folder()
        self.write("train.py", b"x" * 200)
        self.write("labels/1.txt", b"1")
        self.limit(WHOLE_BYTES=225)
        captured = self.capture(script=str(folder / "train.py"))
        names = sorted(read_tree(self.rebuild(captured)))
        self.assertEqual(names, ["conf/a.yaml", "pkg/model.py", "train.py"])
        full = "the patch is full"
        self.assertEqual(captured.left_out["labels/1.txt"], full)
        self.limit(WHOLE_FILES=1)
        captured = self.capture(script=str(folder / "train.py"))
        self.assertEqual(list(read_tree(self.rebuild(captured))), ["train.py"])


class GitPatch(CodeCase):
    """The patch turns a checkout of the base into the tree at entry."""

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
        "tab\tnew": (None, b"2"),
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

    @unittest.skipUnless(LINUX, "names of any bytes need Linux")
    def test_odd_files(self) -> None:
        """From a base by git, and as a whole tree by our own hand."""
        old = {name: old for name, (old, _) in self.ODD.items() if old is not None}
        for name, make in (("based", self.pushed_repo), ("whole", self.new_repo)):
            make(name, old)
            for path, (_, new) in self.ODD.items():
                if new is None:
                    (self.repo / path).unlink()
                else:
                    self.write(path, new)
            with self.subTest(name):
                captured = self.assert_round_trip()
                self.assertEqual(captured.patch["left_out"], [])
                if name == "based":
                    self.assertEqual(captured.patch["files"], len(self.ODD))

    def test_a_name_in_capitals_where_git_thinks_of_a_mac(self) -> None:
        repo = self.pushed_repo(files={"a.py": b"1\n", "folder/b.py": b"2\n"})
        self.git("config", "core.ignoreCase", "true")
        try:
            (repo / "A.py").touch(exist_ok=False)
        except FileExistsError:
            self.skipTest("names in capitals are the same here")
        os.rename(repo / "a.py", repo / "A.py")
        os.rename(repo / "folder", repo / "Folder")
        self.assert_round_trip()

    def test_files_that_git_was_told_to_take_as_unchanged(self) -> None:
        names = ["assumed", "assumed mode", "deleted", "skipped", "same", "\u2713\nx"]
        names = [os.fsdecode(name.encode()) for name in names]
        repo = self.pushed_repo(files=dict.fromkeys(names, b"1\n"))
        (repo / "link").symlink_to("same")
        self.git("add", "link")
        self.git("commit", "-qm", "link")
        self.push()
        self.git("update-index", "--assume-unchanged", "link", *names)
        self.git("update-index", "--no-assume-unchanged", "skipped")
        self.git("update-index", "--skip-worktree", "skipped")
        for name in ("assumed", "skipped", names[-1]):
            self.write(name, b"2\n")
        (repo / "assumed mode").chmod(0o755)
        (repo / "deleted").unlink()
        (repo / "link").unlink()
        (repo / "link").symlink_to("deleted")
        captured = self.assert_round_trip()
        self.assertEqual(len(captured.git["changed"]), 6)
        self.assertTrue(captured.git["is_dirty"])
        self.assertEqual(captured.patch["files"], 6)

    def test_a_file_that_was_only_promised_and_is_gone(self) -> None:
        """Of `git add -N` git says that HEAD has it empty: no patch could delete it."""
        repo = self.pushed_repo(files={"empty": b"", "sub/[x]": b""})
        for name in ("promised", "sub/promised"):
            self.write(name, b"1\n")
            self.git("add", "-N", name)
            (repo / name).unlink()
        (repo / "empty").unlink()
        (repo / "sub/[x]").unlink()
        captured = self.assert_round_trip()
        self.assertEqual(captured.git["changed"], ["empty", "sub/[x]"])
        self.repo = self.tmp / "new"
        self.repo.mkdir()
        self.git("init", "-q")
        self.write("promised", b"1\n")
        self.git("add", "-N", "promised")
        (self.repo / "promised").unlink()
        self.write("a.txt", b"1\n")
        self.assert_round_trip()

    def test_a_commit_that_is_replaced_here(self) -> None:
        repo = self.pushed_repo()
        old = self.git("rev-parse", "HEAD")
        self.commit({"a.txt": b"two\n"})
        self.push()
        self.git("replace", "HEAD", old)
        self.assert_round_trip()
        (repo / "a.txt").write_bytes(b"one\n")
        self.assert_round_trip()

    def test_what_a_sparse_checkout_lacks_is_not_deleted(self) -> None:
        repo = self.pushed_repo(files={"a/x": b"1\n", "b/y": b"1\n", "c": b"1\n"})
        self.git("sparse-checkout", "set", "a")
        self.assertFalse((repo / "b").exists())
        self.write("a/x", b"2\n")
        captured = self.capture()
        self.assertEqual(captured.patch["files"], 1)
        tree = read_tree(self.rebuild(captured))
        self.assertEqual([tree[name][1] for name in ("a/x", "b/y")], [b"2\n", b"1\n"])

    def test_staged_unstaged_renamed_modes_links_and_types(self) -> None:
        names = ["staged", "both", "moved", "mode", "file2link", "file2dir"]
        names += ["cached", "dir/x"]
        files = {name: name.encode() * 9 + b"\n" for name in names}
        for number, make in enumerate((self.pushed_repo, self.new_repo)):
            repo = make(f"repo{number}", files)
            (repo / "link").symlink_to("mode")
            (repo / "link2file").symlink_to("mode")
            self.git("add", ".")
            self.git("commit", "-qm", "links")
            self.change_types(repo)
            with self.subTest(make.__name__):
                self.assert_round_trip()

    def change_types(self, repo: Path) -> None:
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

    def test_line_endings_that_git_converts(self) -> None:
        for setting in ("true", "input", "false"):
            attributes = b"*.t text eol=crlf\n"
            files = {"a": b"1\n2\n3\n", ".gitattributes": attributes, "b.t": b"1\n"}
            self.pushed_repo(f"repo-{setting}", files)
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
                self.git("config", "--unset", "core.autocrlf")
                self.git("config", "--global", "core.autocrlf", setting)
                self.assert_round_trip()
                self.git("config", "--global", "--unset", "core.autocrlf")

    def test_a_filter_like_that_of_git_lfs(self) -> None:
        files = {".gitattributes": b"*.bin filter=big\n", "a.bin": b"pointer\n"}
        self.pushed_repo(files={**files, "b.bin": b"pointer\n"})
        self.git("config", "filter.big.clean", "echo pointer")
        self.git("config", "filter.big.smudge", "cat")
        self.write("a.bin", b"real content\0" * 9)
        self.assert_round_trip()

    def test_a_merge_that_stopped_and_a_repository_without_commits(self) -> None:
        self.pushed_repo(files={"a": b"1\n"})
        self.git("checkout", "-qb", "side")
        self.commit({"a": b"2\n"})
        self.git("checkout", "-q", "main")
        self.commit({"a": b"3\n"})
        self.push()
        merge = ["git", "merge", "-q", "side"]
        subprocess.run(merge, cwd=self.repo, capture_output=True)
        self.assertIn(b"<<<<", read_tree(self.repo)["a"][1])
        self.assert_round_trip()
        for number, kind in enumerate(("sha1", "sha256")):
            self.repo = self.tmp / f"unborn{number}"
            self.repo.mkdir()
            self.git("init", "-q", f"--object-format={kind}")
            self.write("x/y", b"1\n")
            self.assertEqual(self.assert_round_trip().patch["files"], 1)

    def test_a_repository_of_sha256(self) -> None:
        self.new_repo("repo", {}, "--object-format=sha256")
        self.git("config", "remote.origin.url", str(self.repo))
        self.git("update-ref", "refs/remotes/origin/main", "HEAD")
        self.git("config", "remote.origin.fetch", "+refs/heads/*:refs/remotes/origin/*")
        self.commit({"a.txt": b"two\n", "bin": b"\0"})
        captured = self.capture()
        self.assertEqual(captured.problems, {})
        self.assertEqual(captured.patch["files"], 2)
        tree = self.tmp / "tree"
        self.git("clone", "-q", str(self.repo), str(tree))
        self.git("checkout", "-q", captured.git["base"]["commit"], cwd=tree)
        self.git("apply", str(captured.folder / "git.patch"), cwd=tree)
        self.assertEqual(read_tree(tree), read_tree(self.repo))

    def test_attributes_in_the_tree_convert_nothing(self) -> None:
        attributes = b"* text eol=crlf\n*.u working-tree-encoding=UTF-16\n*.d -diff\n"
        self.pushed_repo(files={"x.d": b"1\n"})
        self.write(".gitattributes", attributes)
        self.write("x.d", b"$Id$\r\n2\n\0")
        self.assert_round_trip()

    def test_what_is_not_the_code(self) -> None:
        self.pushed_repo(files={".gitignore": b"*.o\n"})
        self.write("x.o", b"x")
        self.write("results/r/config.yaml", b"x")
        for name in ("status.json", "x.log"):
            self.write(f"exp-20260131-142501-1a2b3c4/{name}", b"{}")
        self.write("index/runs_index.jsonl", b"{}\n")
        self.write(".ranks/1a/run.json", b"{}\n")
        self.write("src/__pycache__/x.cpython-39.pyc", b"\0")
        captured = self.capture(results_root=str(self.repo / "results"))
        self.assertEqual((captured.patch["files"], captured.patch["file"]), (0, None))
        self.assertFalse(captured.git["is_dirty"])
        self.assertTrue(self.capture().git["is_dirty"])

    def test_the_tree_is_that_of_entry(self) -> None:
        """What is written later counts as HEAD has it."""
        self.pushed_repo(files={"early": b"1\n", "late": b"1\n"})
        self.commit({"unpushed": b"1\n"})
        self.write("early", b"2\n")
        expected = read_tree(self.repo)
        (self.tmp / "mark").write_bytes(b"")
        entered = (self.tmp / "mark").stat().st_ctime_ns
        while (self.tmp / "mark").stat().st_ctime_ns == entered:
            (self.tmp / "mark").write_bytes(b"")
        for name in ("late", "unpushed", "new"):
            self.write(name, b"2\n")
        self.assert_is_of_entry(entered, expected)
        self.git("remote", "remove", "origin")  # now the patch has the whole tree
        self.assert_is_of_entry(entered, expected)

    def assert_is_of_entry(self, entered: int, expected: object) -> None:
        captured = self.capture(entered)
        self.assertEqual(captured.problems, {})
        facts = captured.git
        self.assertEqual(facts["changed_after_entry"], ["late", "unpushed"])
        self.assertEqual((facts["changed"], facts["untracked"]), (["early"], []))
        self.assertEqual(read_tree(self.rebuild(captured)), expected)

    def test_the_repository_is_left_as_it_was(self) -> None:
        """From a sub folder too, with and without a lock of another git."""
        repo = self.pushed_repo(files={"sub/x": b"1\n", "sub/deep/y": b"1\n"})
        self.write("sub/x", b"two\n")
        self.write("sub/new", b"\0two\n")
        self.commit({"sub/deep/y": b"3\n"})
        os.utime(repo / "a.txt", (1, 1))  # which `git status` would write down
        for _ in range(2):
            before = [(p, p.stat().st_mtime_ns) for p in sorted(repo.rglob("*"))]
            captured = self.capture(directory=str(repo / "sub" / "deep"))
            self.assertEqual((captured.patch["files"], captured.problems), (3, {}))
            after = [(p, p.stat().st_mtime_ns) for p in sorted(repo.rglob("*"))]
            self.assertEqual(before, after)
            (repo / ".git" / "index.lock").touch()  # of a git that crashed, or runs

    def test_a_tree_that_git_cannot_read_has_a_reason(self) -> None:
        repo = self.pushed_repo()
        self.write("a.txt", b"two\n")
        shutil.rmtree(repo / ".git" / "objects")
        (repo / ".git" / "objects").mkdir()
        captured = self.capture()
        self.assertIsNone(captured.patch["file"])
        self.assertRegex(captured.problems["git.patch"], "git ended with status 128")

    def test_a_patch_that_stays_the_same_is_a_link(self) -> None:
        self.pushed_repo()
        self.write("new", os.urandom(LARGE := run_utils.LINK_BYTES))
        first = self.capture()
        second = self.capture()
        self.assertEqual(second.patch, first.patch)
        self.assertEqual(self.inode(first), self.inode(second))
        self.write("new", os.urandom(LARGE))
        self.assertNotEqual(self.inode(self.capture()), self.inode(second))
        self.write("new", b"small\n")
        self.assertNotEqual(self.inode(self.capture()), self.inode(self.capture()))

    def inode(self, captured: Captured) -> int:
        return (captured.folder / "git.patch").stat().st_ino


class PartsOfAnEarlierPatch(CodeCase):
    """What an earlier run says of the same two contents of a file is taken over."""

    OLD = "".join(f"line {number}\n" for number in range(40)).encode()

    def setUp(self) -> None:
        super().setUp()
        umlaut = os.fsdecode("b\u00fc.py".encode())
        names = ("a b.py", umlaut, "c/d.py", "mode.py", "gone.py", "bin")
        self.pushed_repo(files=dict.fromkeys(names, self.OLD))
        for number, name in enumerate(names[:4]):
            self.write(name, self.OLD.replace(b"line %d\n" % (5 * number), b"new\n"))
        self.write("bin", bytes(range(256)))
        self.write("untracked.py", b"x = 1\n")
        (self.repo / "gone.py").unlink()
        (self.repo / "mode.py").chmod(0o755)

    def record(self, **more: Any) -> Captured:
        """Leave a run as it is once it has ended."""
        captured = self.capture()
        facts = {"git": {"patch": {**captured.patch, **more}}}
        about = {"run_utils": {"version": run_utils.__version__}}
        file = captured.folder / "metadata.json"
        file.write_text(json.dumps({**facts, **about}), "utf-8")
        return captured

    def poison(self, captured: Captured) -> None:
        """Change a word of a patch, so that one sees where it comes from."""
        patch = captured.folder / "git.patch"
        data = patch.read_bytes().replace(b"+new\n", b"+old\n")
        patch.write_bytes(data)
        metadata = json.loads((captured.folder / "metadata.json").read_bytes())
        metadata["git"]["patch"]["sha256"] = sha256(data)
        (captured.folder / "metadata.json").write_text(json.dumps(metadata), "utf-8")

    def patch_of(self, captured: Captured) -> bytes:
        return (captured.folder / "git.patch").read_bytes()

    def test_all_of_it(self) -> None:
        first = self.record()
        second = self.assert_round_trip()
        self.assertEqual(self.patch_of(second), self.patch_of(first))
        self.assertEqual(second.patch, first.patch)

    def test_what_has_changed_is_compared_anew(self) -> None:
        self.poison(self.record())
        self.write("c/d.py", self.OLD.replace(b"line 3\n", b"newer\n"))
        self.write("a.txt", b"two\n")
        data = self.patch_of(self.capture())
        self.assertEqual(data.count(b"+old\n"), 2)  # as they stood there
        self.assertEqual(data.count(b"+new\n"), 1)  # the one whose mode has changed
        self.assertIn(b"+newer\n", data)
        self.commit({}, "all of it")
        self.push()
        self.write("a b.py", self.OLD)
        self.assert_round_trip()

    def test_not_of_a_file_that_was_written_after_entry(self) -> None:
        self.commit({"a.txt": b"as committed\n"})
        self.write("a.txt", b"as written\n")
        self.assertIn(b"+as written\n", self.patch_of(self.record()))
        written = (self.repo / "a.txt").stat().st_ctime_ns
        captured = self.capture(entered=written - 1)
        self.assertIn(b"+as committed\n", self.patch_of(captured))

    def test_not_from_a_patch_that_is_torn(self) -> None:
        first = self.record()
        fresh = self.patch_of(first)
        (first.folder / "git.patch").write_bytes(fresh[: fresh.index(b"+new") + 3])
        self.assertEqual(self.patch_of(self.capture()), fresh)

    def test_not_where_something_was_left_out_or_redacted(self) -> None:
        for key in ("left_out", "redacted"):
            with self.subTest(key):
                self.poison(self.record(**{key: ["x"]}))
                self.assertNotIn(b"+old\n", self.patch_of(self.capture()))

    def test_not_from_another_version(self) -> None:
        with mock.patch.object(run_utils, "__version__", "1.9"):
            self.poison(self.record())
        self.assertNotIn(b"+old\n", self.patch_of(self.capture()))

    def test_not_what_has_become_a_secret(self) -> None:
        """Be it in the new content of a file, or in the old that a patch shows."""
        for old, new in ((b"swordfish-4711", b"x"), (b"x", b"swordfish-4711")):
            with self.subTest(old=old):
                self.commit({"a.txt": b"1\n" + old + b"\n2\n"})
                self.push()
                self.write("a.txt", b"1\n" + new + b"\n2\n")
                self.assertIn(b"swordfish", self.patch_of(self.record()))
                redactor = run_utils._Redactor()
                redactor.learn_values(["swordfish-4711"])
                with mock.patch.object(run_utils, "_Redactor", lambda r=redactor: r):
                    captured = self.capture()
                self.assertNotIn(b"swordfish", self.patch_of(captured))


class WhenTheBlockWasEntered(RunCase):
    """What is newer than that is told by the clock of the disk with the files."""

    def test_the_clock_of_the_disk(self) -> None:
        site = run_utils._Site(["python"])
        site.directory = str(self.tmp)
        for device, expected in ((os.stat(self.tmp).st_dev, 2.0), (-1, 1.0)):
            site.entered = (1.0, device, 2.0)
            self.assertEqual(run_utils._Repository.of(site).entered, expected)

    def test_a_file_that_is_written_while_it_is_read(self) -> None:
        change = mock.Mock(is_late=False)
        change.look = lambda tree: change.configure_mock(is_late=True)
        problem = run_utils._Patch()._read(mock.Mock(), change)
        self.assertEqual(problem, "it was written while it was read")


class LimitsOfAPatch(CodeCase):
    """A limit leaves out files, each of which is listed; never the whole patch."""

    def test_what_is_left_out_is_listed(self) -> None:
        self.pushed_repo()
        self.limit(PATCH_FILE_BYTES=100, PATCH_BYTES=150, MAX_LISTED=2)
        for name, size in (("a", 90), ("b", 91), ("c", 92), ("d", 101)):
            self.write(name, b"x" * size)
        facts = self.capture().patch
        self.assertEqual((facts["files"], facts["left_out_count"]), (1, 3))
        self.assertEqual(facts["left_out_bytes"], 91 + 92 + 101)
        full = "the patch is full"
        entries = [
            {"path": name, "bytes": n, "reason": full, "sha256": sha256(b"x" * n)}
            for name, n in (("b", 91), ("c", 92))
        ]
        self.assertEqual(facts["left_out"], entries)
        self.limit(PATCH_BYTES=1000)
        entry = self.capture().patch["left_out"][0]
        self.assertEqual((entry["path"], entry["reason"]), ("d", "too large"))
        self.limit(PATCH_FILES=2)
        self.assertEqual(self.capture().patch["left_out_count"], 2)
        self.limit(PATCH_SECONDS=-1)
        captured = self.capture()
        self.assertEqual(set(captured.left_out.values()), {"no time left"})

    def test_the_old_side_of_a_change_is_measured_too(self) -> None:
        files = {"deleted": b"\0" * 2000, "shortened": b"x" * 2000, "small": b"1"}
        self.pushed_repo(files=files)
        self.limit(PATCH_FILE_BYTES=1000)
        (self.repo / "deleted").unlink()
        self.write("shortened", b"y\n")
        self.write("small", b"2")
        captured = self.capture()
        reason = "too large"
        self.assertEqual(captured.left_out, {"deleted": reason, "shortened": reason})
        self.assertEqual(captured.patch["left_out"][1]["bytes"], 2000)
        self.assertEqual(read_tree(self.rebuild(captured))["small"][1], b"2")

    def test_many_untracked_binary_files(self) -> None:
        self.pushed_repo()
        for number in range(90):
            self.write(f"{number}.bin", random.randbytes(20_000))
        captured = self.capture()
        found = captured.patch["files"], captured.patch["left_out"]
        self.assertEqual(found, (90, []))

    def test_what_is_no_file(self) -> None:
        self.pushed_repo()
        os.mkfifo(self.repo / "fifo")
        (self.repo / "a.txt").unlink()
        os.mkfifo(self.repo / "a.txt")
        captured = self.capture()
        self.assertEqual(captured.left_out, {"a.txt": "no file of this repository"})

    def test_a_file_that_cannot_be_read(self) -> None:
        self.pushed_repo()
        self.write("new", b"1\n")
        real = os.open

        def refuse(path: Any, *rest: Any, **how: Any) -> int:
            if str(path).endswith("/new"):
                raise PermissionError(13, "Permission denied", path)
            return real(path, *rest, **how)

        with mock.patch("os.open", refuse):
            captured = self.capture()
        self.assertEqual(captured.left_out, {"new": "Permission denied"})

    def test_a_partial_clone_fetches_nothing(self) -> None:
        """Its origin could be asked: a wire in the place of its server tells."""
        origin = self.pushed_repo(files={"b": b"1\n", "c": b"1\n"})
        origin = self.tmp / "repo.origin.git"
        self.git("config", "uploadpack.allowFilter", "true", cwd=origin)
        self.repo = self.tmp / "part"
        url = origin.as_uri()
        clone = ("clone", "-q", "-n", "--filter=blob:none", url, str(self.repo))
        self.git(*clone, cwd=self.tmp)
        self.git("reset", "-q")
        self.git("checkout", "-q", "a.txt")  # b and c are deleted, and nothing has them
        tripped = self.tmp / "tripped"
        wire = self.stub("wire", f"echo asked >> {tripped}; exec git-upload-pack $@")
        os.environ["PATH"] += f"{os.pathsep}{os.path.dirname(str(GIT))}"
        self.git("config", "remote.origin.uploadpack", wire)
        self.write("a.txt", b"changed\n")
        packs = sorted((self.repo / ".git" / "objects").rglob("*"))
        captured = self.capture()
        self.assertEqual(captured.problems, {})
        self.assertEqual(packs, sorted((self.repo / ".git" / "objects").rglob("*")))
        self.assertFalse(tripped.exists())
        tree = read_tree(self.rebuild(captured))
        self.assertEqual(tree, {"a.txt": ("0", b"changed\n")})
        self.git("fetch", "-q")
        self.assertTrue(tripped.exists(), "the wire does not trip for an ordinary git")


class RepositoriesInside(CodeCase):
    """Submodules and other repositories have their own base and part of the patch."""

    def with_submodule(self, name: str = "repo", url: Path | None = None) -> Path:
        """Make a pushed repository with a pushed submodule, and return that."""
        if url is None:
            self.pushed_repo("lib", {"f": b"1\n", "g": b"1\n"})
            url = self.tmp / "lib.origin.git"
        self.pushed_repo(name)
        self.git("submodule", "--quiet", "add", str(url), "s u/b")
        self.git("commit", "-qm", "submodule")
        self.push()
        return self.repo / "s u" / "b"

    def inside(self, inner: Path, files: dict[str, bytes], subject: str = "") -> None:
        for name, content in files.items():
            (inner / name).write_bytes(content)
        if subject:
            self.git("add", "-A", cwd=inner)
            self.git("commit", "-qm", subject, cwd=inner)

    def test_a_clean_one(self) -> None:
        inner = self.with_submodule()
        captured = self.assert_round_trip()
        (module,) = captured.git["submodules"]
        head = self.git("rev-parse", "HEAD", cwd=inner)
        found = module["path"], module["recorded"], module["base"]["commit"]
        self.assertEqual(found, ("s u/b", head, head))
        self.assertEqual((module["is_dirty"], captured.git["is_dirty"]), (False, False))

    def test_changed_inside_and_moved(self) -> None:
        inner = self.with_submodule()
        self.inside(inner, {"f": b"2\n"}, "nobody pushed this")
        self.inside(inner, {"g": b"2\n", "new": b"2\n"})
        captured = self.assert_round_trip()
        self.assertEqual(captured.patch["files"], 3)
        (module,) = captured.git["submodules"]
        self.assertTrue(module["is_dirty"])
        self.assertNotEqual(module["recorded"], module["commit_full"])
        self.assertEqual(module["unpushed_commits"][0]["subject"], "nobody pushed this")
        self.assertTrue(captured.git["is_dirty"])

    def test_the_patch_applies_on_a_recursive_clone(self) -> None:
        """Also when the commit of the superproject is not pushed."""
        inner = self.with_submodule()
        self.inside(inner, {"f": b"2\n"}, "unpushed")
        self.commit({"top": b"1\n"}, "records it")
        self.inside(inner, {"g": b"3\n"})
        captured = self.capture()
        tree = self.tmp / "recursive"
        url = captured.git["base"]["url"]
        self.git("clone", "-q", "--recurse-submodules", url, str(tree))
        patch = str(captured.folder / "git.patch")
        self.git("apply", "--whitespace=nowarn", patch, cwd=tree)
        self.assertEqual(read_tree(tree), read_tree(self.repo))
        self.assertEqual(read_tree(self.rebuild(captured)), read_tree(self.repo))

    def test_one_that_moved_on_to_a_pushed_commit(self) -> None:
        """The patch starts where a checkout of the superproject's base is."""
        inner = self.with_submodule()
        base = self.git("rev-parse", "HEAD", cwd=inner)
        self.inside(inner, {"f": b"2\n"}, "pushed later")
        self.git("push", "-q", "origin", "HEAD:main", cwd=inner)
        self.git("fetch", "-q", cwd=inner)
        captured = self.assert_round_trip()
        (module,) = captured.git["submodules"]
        found = module["base"]["commit"], module["is_dirty"], module["unpushed"]
        self.assertEqual(found, (base, True, 0))

    def test_a_recorded_commit_that_nobody_pushed(self) -> None:
        """The superproject is pushed, its submodule is not."""
        inner = self.with_submodule()
        pushed = self.git("rev-parse", "HEAD", cwd=inner)
        self.inside(inner, {"f": b"2\n"}, "unpushed")
        self.commit({}, "records it")
        self.push()
        captured = self.assert_round_trip()
        (module,) = captured.git["submodules"]
        self.assertEqual(module["base"]["commit"], pushed)
        self.assertEqual((module["is_dirty"], module["unpushed"]), (False, 1))

    def test_a_link_without_gitmodules_and_an_untracked_clone(self) -> None:
        lib = self.pushed_repo("lib", {"f": b"1\n"})
        repo = self.pushed_repo()
        for name in ("linked", "cloned"):
            url = str(self.tmp / "lib.origin.git")
            self.git("clone", "-q", url, str(repo / name))
        self.git("add", "linked")
        self.git("commit", "-qm", "a link")
        self.git("checkout", "-q", "--", ".", cwd=lib)
        for name in ("linked", "cloned"):
            self.inside(repo / name, {"f": b"2\n"})
        captured = self.assert_round_trip()
        modules = captured.git["submodules"]
        names = [(module["path"], bool(module["recorded"])) for module in modules]
        self.assertEqual(names, [("cloned", False), ("linked", True)])
        self.assertEqual([module["is_dirty"] for module in modules], [True, True])
        self.assertEqual(captured.git["untracked"], ["cloned/"])

    def test_one_without_a_remote_and_one_without_a_commit(self) -> None:
        repo = self.pushed_repo()
        for name in ("local", "local/unborn"):
            (repo / name).mkdir()
            self.git("init", "-q", cwd=repo / name)
            (repo / name / "f").write_bytes(b"1\n")
            if name == "local":
                self.git("add", "f", cwd=repo / name)
                self.git("commit", "-qm", "x", cwd=repo / name)
        captured = self.assert_round_trip()
        (module,) = captured.git["submodules"]
        self.assertEqual((module["path"], module["base"]), ("local", None))
        self.assertEqual(module["submodules"][0]["path"], "local/unborn")

    def test_one_that_cannot_be_read_does_not_take_the_others_along(self) -> None:
        inner = self.with_submodule()
        self.git("clone", "-q", str(self.tmp / "lib.origin.git"), "later")
        self.inside(self.repo / "later", {"f": b"3\n"})
        self.write("a.txt", b"two\n")
        self.git("config", "filter.a=b.clean", "false", cwd=self.repo / "later")
        captured = self.capture()
        sentence = "a git filter has a name that cannot be switched off"
        self.assertEqual(captured.problems, {"git.patch": f"later/: {sentence}"})
        self.assertEqual(captured.git["submodules"][0]["problem"], sentence)
        self.assertIn(b"+two", captured.text)
        self.assertTrue(inner.exists())


class NothingForeign(CodeCase):
    """No other repository's content is taken, whatever a folder claims to be."""

    def setUp(self) -> None:
        super().setUp()
        self.private = self.pushed_repo("private", {"diary": b"private words\n"})
        self.write("diary", b"private words, changed\n")
        self.write("more", b"private words, untracked\n")

    def assert_nothing_private(self, names: bool = True) -> Captured:
        captured = self.capture()
        for path in captured.folder.iterdir():
            self.assertNotIn(b"private words", path.read_bytes(), path)
        if names:
            self.assertNotIn("diary", str(captured.git))
        return captured

    def test_a_submodule_that_is_a_link(self) -> None:
        repo = self.pushed_repo()
        self.git("clone", "-q", str(self.tmp / "private.origin.git"), "sub")
        self.git("add", "sub")
        self.git("commit", "-qm", "x")
        shutil.rmtree(repo / "sub")
        (repo / "sub").symlink_to(self.private, target_is_directory=True)
        captured = self.assert_nothing_private()
        self.assertEqual(captured.problems, {})

    def test_a_git_file_that_points_elsewhere(self) -> None:
        side = self.tmp / "side"
        self.git("worktree", "add", "-q", str(side), cwd=self.private)
        for target in (self.private / ".git", self.private / ".git/worktrees/side"):
            repo = self.pushed_repo(f"repo {target.name}")
            self.commit({"evil/x": b"1\n"})
            self.write("evil/.git", b"gitdir: %s\n" % os.fsencode(target))
            self.assert_nothing_private()
            self.repo = repo / "evil"
            captured = self.assert_nothing_private()
            self.assertRegex(captured.problems["git"], "belongs to another work tree")

    def test_a_git_folder_with_the_objects_of_another(self) -> None:
        repo = self.pushed_repo()
        evil = repo / "evil" / ".git"
        evil.mkdir(parents=True)
        (evil / "commondir").write_text(f"{self.private}/.git\n")
        (evil / "HEAD").write_text("ref: refs/heads/main\n")
        self.assert_nothing_private()
        self.repo = repo / "evil"
        captured = self.assert_nothing_private()
        self.assertRegex(captured.problems["git"], "belongs to another work tree")

    def test_links_in_the_place_of_folders(self) -> None:
        repo = self.pushed_repo(files={"evil/diary": b"1\n"})
        shutil.rmtree(repo / "evil")
        (repo / "evil").symlink_to(self.private, target_is_directory=True)
        captured = self.assert_nothing_private(names=False)
        self.assertEqual(captured.git["changed"], ["evil/diary"])
        self.assertIn(b"deleted file mode", captured.text)
        for name in ("objects", "refs"):
            self.pushed_repo(name)
            shutil.rmtree(self.repo / ".git" / name)
            (self.repo / ".git" / name).symlink_to(self.private / ".git" / name)
            captured = self.assert_nothing_private()
            self.assertRegex(captured.problems["git"], "belongs to another work tree")

    def test_a_work_tree_that_is_set_to_be_elsewhere(self) -> None:
        for target in (self.private, self.tmp):
            self.pushed_repo(f"repo {target.name}")
            self.git("config", "core.worktree", str(target))
            captured = self.assert_nothing_private()
            if target == self.private:
                problem = captured.problems["git"]
                self.assertRegex(problem, "the .git above .* names another work tree")

    def test_links_that_lead_in_circles(self) -> None:
        repo = self.pushed_repo()
        for name in ("a", "b"):
            self.git("clone", "-q", str(self.tmp / "repo.origin.git"), name)
            for other in ("a", "b"):
                (repo / name / other).symlink_to(repo / other)
        captured = self.assert_round_trip()
        names = [module["path"] for module in captured.git["submodules"]]
        self.assertEqual(names, ["a", "b"])


class SecretsInPatches(CodeCase):
    """A patch shows no secret and still applies."""

    BASE = b"".join(b"line %d\n" % number for number in range(30))

    def redacted_tree(self) -> tuple[Captured, dict[str, tuple[object, bytes]]]:
        captured = self.capture()
        self.assertEqual(captured.problems, {})
        self.assertNotIn(SECRET, captured.text)
        return captured, read_tree(self.rebuild(captured))

    def test_a_secret_in_a_new_file_and_in_a_tracked_one(self) -> None:
        self.pushed_repo(files={"f": self.BASE})
        self.write("f", self.BASE.replace(b"line 9", b"key " + SECRET))
        self.write("new", b"key " + SECRET + b"\n")
        captured, tree = self.redacted_tree()
        self.assertEqual(sorted(captured.patch["redacted"]), ["f", "new"])
        clean = self.BASE.replace(b"line 9", b"key <REDACTED>")
        self.assertEqual(tree["f"][1], clean)
        self.assertEqual(tree["new"][1], b"key <REDACTED>\n")

    def test_a_value_found_secret_in_one_file_is_replaced_in_all(self) -> None:
        self.pushed_repo()
        self.write("a.py", b"print('" + SPECIFIC + b"')\n")
        self.write("z.py", b"#" * 200 + b"\ndb_password = '" + SPECIFIC + b"'\n")
        captured, tree = self.redacted_tree()
        self.assertEqual(tree["a.py"][1], b"print('<REDACTED>')\n")
        self.assertNotIn(SPECIFIC, captured.text)

    def test_the_temporary_files_hold_no_secret(self) -> None:
        self.pushed_repo(files={"f": self.BASE})
        self.write("f", self.BASE + SECRET)
        self.write("new", SECRET)
        kept = self.tmp / "scratch"
        kept.mkdir()
        scratch = contextlib.nullcontext(str(kept))
        self.patch(mock.patch.object(run_utils, "_temporary_folder", lambda: scratch))
        self.capture()
        self.assertTrue((kept / "b" / "f").exists())
        for path in kept.rglob("*"):
            if path.is_file():
                self.assertNotIn(SECRET, path.read_bytes(), path)

    def test_a_secret_in_the_old_content(self) -> None:
        old = self.BASE.replace(b"line 9", b"key " + SECRET)
        names = ("removed", "kept", "deleted", "far", "mode")
        repo = self.pushed_repo(files=dict.fromkeys(names, old))
        self.write("removed", self.BASE)
        self.write("kept", old.replace(b"line 10", b"ten"))
        self.write("far", old + b"end\n")
        (repo / "removed").chmod(0o755)
        (repo / "mode").chmod(0o755)
        (repo / "deleted").unlink()
        captured, tree = self.redacted_tree()
        found = captured.patch["files"], captured.patch["left_out"]
        self.assertEqual(found, (5, []))
        self.assertEqual(tree["removed"], ("100", self.BASE))
        kept = old.replace(b"line 10", b"ten").replace(SECRET, b"<REDACTED>")
        self.assertEqual(tree["kept"][1], kept)
        self.assertEqual(tree["mode"], ("100", old))
        self.assertNotIn("deleted", tree)

    def test_what_a_filter_encrypts_is_not_in_it(self) -> None:
        attributes = b"hidden filter=git-crypt\n"
        files = {".gitattributes": attributes, "hidden": b"\0cipher", "f": b"1\n"}
        self.pushed_repo(files=files)
        self.git("config", "filter.git-crypt.clean", "printf cipher")
        self.write("hidden", b"plain text\n")
        self.write("f", b"2\n")
        captured = self.capture()
        self.assertEqual(captured.patch["files"], 1)
        self.assertNotIn(b"plain", captured.text)

    def test_binary_files_names_and_files_that_hold_secrets_by_nature(self) -> None:
        files = {"x": b"1\n", ".env": b"TRACKED=1\n", "old.env": b"OLD=plain words\n"}
        self.pushed_repo(files=files)
        (self.repo / "old.env").unlink()
        hidden = (".env", "prod.env", ".env.local", "k/id_rsa", "a.pem", ".aws/x")
        for name in hidden:
            self.write(name, b"A=1\n")
        self.write("known.py", b"password = '" + SPECIFIC + b"'\n")
        self.write("bin", b"\0" + SPECIFIC)
        self.write(f"name-{SECRET.decode()}", b"1")
        self.write("id_rsa.pub", b"public\n")
        self.write(".env.example", b"API_KEY=\n")
        captured, _ = self.redacted_tree()
        reasons = captured.left_out
        self.assertEqual(reasons.pop("bin"), "a binary file that holds a secret")
        named = reasons.pop(f"name-{SECRET.decode()}")
        self.assertEqual(named, "has a secret in its name")
        self.assertEqual(reasons, dict.fromkeys(hidden, "holds secrets by nature"))
        self.assertEqual(captured.patch["files"], 4)
        self.assertNotIn(b"plain words", captured.text)

    def test_of_a_pem_file_the_content_decides(self) -> None:
        certificate, key = (
            b"-----BEGIN %s-----\nTUlJ\n-----END %s-----\n" % (kind, kind)
            for kind in (b"CERTIFICATE", b"RSA PRIVATE KEY")
        )
        self.pushed_repo(files={"moved.pem": certificate + key})
        self.write("moved.pem", certificate)
        self.write("ca.pem", certificate)
        self.write("both.pem", certificate + key)
        captured = self.capture()
        self.assertEqual(captured.left_out, {"both.pem": "holds secrets by nature"})
        self.assertEqual(captured.patch["redacted"], [])
        self.assertIn(b"+-----BEGIN CERTIFICATE", captured.text)
        self.assertNotIn(b"PRIVATE", captured.text)

    def test_what_a_file_of_secrets_holds_is_replaced_in_the_others(self) -> None:
        self.pushed_repo(files={"x": b"1\n"})
        self.write(".env", b"DB_PASSWORD=" + SPECIFIC + b"\n")
        self.write("a.py", b"connect('" + SPECIFIC + b"')\n")
        captured = self.capture()
        self.assertIn(b"+connect('<REDACTED>')", captured.text)
        self.assertEqual(captured.patch["redacted"], ["a.py"])

    def test_the_old_content_of_a_binary_file_is_not_in_it(self) -> None:
        self.pushed_repo(files={"bin": b"\0" + os.urandom(5000)})
        self.write("bin", b"\0new")
        self.assertLess(len(self.assert_round_trip().text), 500)


class LocalPackages(CodeCase):
    """Packages from local folders are told with commit, changes and patch."""

    def install(self, name: str, url: str, place: str = "site-packages") -> None:
        info = self.tmp / place / f"{name}-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Name: {name}\nVersion: 1.0\n", "utf-8")
        direct = json.dumps({"url": url, "dir_info": {"editable": True}})
        (info / "direct_url.json").write_text(direct, "utf-8")

    def test_their_repositories_are_told_and_kept(self) -> None:
        library = self.pushed_repo("my lib")
        self.write("a.txt", b"two\n")
        self.install("mine", f"file://{self.tmp}/my%20lib")
        self.install("mine-too", f"file://{self.tmp}/my%20lib")
        (self.tmp / "loose").mkdir()
        (self.tmp / "loose" / "code.py").write_bytes(b"pass\n")
        self.install("loose", f"file://{self.tmp}/loose")
        commit = self.git("rev-parse", "HEAD")
        experiment = self.pushed_repo()
        self.install("own", experiment.as_uri())
        captured = self.capture(sys_path=[str(self.tmp / "site-packages")])
        packages = {package["name"]: package for package in captured.packages}
        self.assertEqual(list(packages), ["loose", "mine", "mine-too", "own"])
        mine = packages["mine"]
        found = mine["path"], mine["is_dirty"], mine["commit_full"], mine["editable"]
        self.assertEqual(found, (str(library), True, commit, True))
        self.assertEqual(mine["base"]["commit"], commit)
        patch = captured.folder / mine["patch"]["file"]
        self.assertEqual(patch.name, "git.mine.patch")
        self.assertIn(b"+two", patch.read_bytes())
        self.assertNotIn("patch", packages["mine-too"])  # it is the same repository
        self.assertNotIn("patch", packages["own"])
        self.assertEqual(packages["loose"]["patch"]["files"], 1)
        self.assertEqual(captured.problems, {})

    def test_a_dist_info_beside_the_script_is_not_believed(self) -> None:
        self.pushed_repo("private", {"diary": b"private words\n"})
        self.write("diary", b"private words, changed\n")
        self.install("evil", (self.tmp / "private").as_uri(), "project")
        self.pushed_repo()
        captured = self.capture(sys_path=[str(self.tmp / "project")])
        self.assertEqual(captured.packages, [])


class WiredCase(CodeCase):
    """Repositories with all that git could be made to start set to a trip wire."""

    WIRES = (
        "core.fsmonitor", "core.pager", "core.editor", "core.askPass", "diff.external",
        "diff.x.textconv", "diff.x.command", "filter.x.clean", "filter.x.smudge",
        "filter.x.process", "credential.helper", "core.sshCommand", "gpg.program",
        "gpg.ssh.program", "gpg.x509.program", "uploadpack.packObjectsHook",
        "core.gitProxy", "interactive.diffFilter", "pager.status", "pager.rev-list",
        "core.alternateRefsCommand", "remote.origin.uploadpack", "sequence.editor",
    )  # fmt: skip
    SWITCHES = ("log.showSignature", "commit.gpgSign", "submodule.recurse",
                "status.submoduleSummary", "remote.origin.promisor")  # fmt: skip
    HOOKS = (
        "post-index-change",
        "reference-transaction",
        "pre-auto-gc",
        "post-checkout",
    )

    def setUp(self) -> None:
        super().setUp()
        self.tripped = self.tmp / "tripped"
        self.wire = self.tmp / "wire"
        text = f'#!/bin/sh\necho "$0" "$@" >> {self.tripped}\ncat\n'
        self.wire.write_text(text, "utf-8")
        self.wire.chmod(0o755)

    def arm(self, repo: Path) -> None:
        for key in self.WIRES:
            self.git("config", key, str(self.wire), cwd=repo)
        for key in self.SWITCHES:
            self.git("config", key, "true", cwd=repo)
        folder = Path(self.git("rev-parse", "--absolute-git-dir", cwd=repo))
        for name in ("hooks", "info"):
            (folder / name).mkdir(exist_ok=True)
        for hook in self.HOOKS:
            shutil.copy(self.wire, folder / "hooks" / hook)
        attributes = "* filter=x diff=x\n"
        (folder / "info" / "attributes").write_text(attributes, "utf-8")

    def assert_not_tripped(self) -> None:
        tripped = self.tripped.exists() and self.tripped.read_text()
        self.assertFalse(self.tripped.exists(), tripped)


class TripWires(WiredCase):
    """Nothing that git could be made to start is started."""

    def test_the_wires_stay(self) -> None:
        names = ("changed", "touched", "hidden", "link", "gone")
        files = dict.fromkeys(names, b"1\n")
        self.pushed_repo("inner", files)
        repo = self.pushed_repo(files=files)
        url = str(self.tmp / "inner.origin.git")
        self.git("submodule", "--quiet", "add", url, "sub")
        self.commit({"unpushed": b"1\n"})
        for root in (repo, repo / "sub"):
            self.git("update-index", "--assume-unchanged", "hidden", cwd=root)
            self.arm(root)
            for name in ("changed", "hidden", "new"):
                (root / name).write_bytes(b"2\n")
            (root / "gone").unlink()
            os.utime(root / "touched", (1, 1))
        self.git("config", "filter.y.clean", str(self.wire), cwd=repo / "sub")
        info = repo / ".git" / "modules" / "sub" / "info"
        (info / "attributes").write_text("* filter=y\n")
        wire = str(self.wire)
        os.environ.update(GIT_CONFIG_COUNT="1", GIT_CONFIG_KEY_0="core.fsmonitor")
        os.environ.update(GIT_CONFIG_VALUE_0=wire, GIT_EXTERNAL_DIFF=wire)
        os.environ.update(GIT_PAGER=wire, GIT_SSH=wire, GIT_ASKPASS=wire, EDITOR=wire)
        self.tripped.unlink(missing_ok=True)
        captured = self.capture(directory=str(repo / "sub" / ".."))
        self.assertEqual((captured.git["is_dirty"], captured.problems), (True, {}))
        self.assertEqual(captured.patch["files"], 10)
        self.assertIsNotNone(run_utils._git_head(str(repo)))
        self.assert_not_tripped()
        subprocess.run(["git", "status"], cwd=repo, capture_output=True)
        self.assertTrue(self.tripped.exists(), "the wire does not trip for others")

    def test_a_filter_that_cannot_be_switched_off_stops_the_status(self) -> None:
        self.pushed_repo()
        self.git("config", "filter.a=b.clean", str(self.wire))
        captured = self.capture()
        self.assertIsNone(captured.git["is_dirty"])
        sentence = "a git filter has a name that cannot be switched off"
        self.assertEqual(captured.problems["git"], sentence)
        self.assertIn(sentence, captured.problems["git.patch"])


# === Reproducing ===


class ReproduceCase(CodeCase):
    """Runs of a script in a repository, done again elsewhere."""

    TRAIN = """
        import os, sys, time
        from run_utils import run_context, log_metrics
        with run_context("results/exp", "exp", {"lr": 0.1, "seed": 1}) as run_dir:
            print("training")
            (run_dir / "artifacts" / "model.txt").write_text("weights")
            log_metrics(run_dir, {"loss": 0.25}, step=1)
    """

    def setUp(self) -> None:
        super().setUp()
        self.new_home()

    def new_home(self) -> None:
        places = {"PYTHONPATH": str(HERE), "PYTHONPYCACHEPREFIX": CACHE}
        os.environ.update(places)
        os.environ["GIT_CONFIG_GLOBAL"] = str(self.tmp / ".gitconfig")

    def record(self, *words: str, body: str = TRAIN, cwd: str = "") -> Path:
        """Run train.py of the repository; return the directory of its run."""
        self.write("train.py", textwrap.dedent(body).encode())
        self.git("add", "train.py")
        self.git("commit", "-qm", "train", "--allow-empty")
        self.push()
        return self.run_script(*words, cwd=cwd)

    def run_script(self, *words: str, cwd: str = "") -> Path:
        place = self.repo / cwd
        before = set(self.repo.rglob("status.json"))
        script = os.path.relpath(self.repo / "train.py", place)
        command = [PYTHON, script, *words]
        done = subprocess.run(command, cwd=place, capture_output=True, text=True)
        self.assertEqual(done.returncode, 0, done.stderr)
        (run,) = set(self.repo.rglob("status.json")) - before
        return run.parent

    def command_line(self, *words: object, cwd: Path | None = None) -> Any:
        """Run a command here; in a process of its own if it starts a program."""
        command = [*map(str, words)]
        os.chdir(cwd or self.tmp)
        if "--exec" in command and "x" not in command:
            python = [PYTHON, "-m", "run_utils"]
            return subprocess.run([*python, *command], capture_output=True, text=True)
        output, errors = io.StringIO(), io.StringIO()
        self.patch(mock.patch.object(run_utils, "_redactor", run_utils._Redactor()))
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
            status = run_utils.main(command)
        texts = output.getvalue(), errors.getvalue()
        return subprocess.CompletedProcess(command, status, *texts)

    def reproduce(self, run: Path, *words: str, status: int = 0) -> dict[str, Any]:
        """Build the tree again as self.tree; return the plan."""
        self.tree = self.tmp / "again"
        done = self.command_line(
            "reproduce", run, "--into", self.tree, "--json", *words
        )
        self.assertEqual(done.returncode, status, done.stdout + done.stderr)
        plan: dict[str, Any] = json.loads(done.stdout)
        return plan

    def texts(self, plan: dict[str, Any], about: str) -> list[str]:
        return [step["text"] for step in plan["steps"] if step["about"] == about]

    def assert_tree(self, repo: Path | None = None) -> None:
        """Hold the new tree against the repository, but for results and caches."""
        trees = []
        for root in (self.tree, repo or self.repo):
            trees.append({
                name: content for name, content in read_tree(root).items()
                if not re.search(r"(^|/)(results|__pycache__|\.venv)/", name)
            })  # fmt: skip
        self.assertEqual(trees[0], trees[1])


class TheTreeAgain(ReproduceCase):
    """`reproduce` makes the tree that ran, byte for byte, or says what is missing."""

    def test_dirty_with_unpushed_commits_and_a_submodule(self) -> None:
        self.pushed_repo("lib", {"f": b"1\n"})
        self.pushed_repo(files={"bin": b"\0\1", "gone": b"1\n", "sub/x": b"1\n"})
        url = str(self.tmp / "lib.origin.git")
        self.git("submodule", "--quiet", "add", url, "lib")
        self.record()
        self.commit({"unpushed": b"1\n"}, "unpushed")
        (self.repo / "gone").unlink()
        self.write("bin", b"\1\0")
        self.write("new", b"1\n")
        self.write("lib/f", b"2\n")
        (self.repo / "link").symlink_to("new")
        (self.repo / "sub/x").chmod(0o755)
        run = self.run_script(cwd="sub")
        before = self.state(self.repo)
        plan = self.reproduce(run)
        self.assert_tree()
        self.assertEqual(self.state(self.repo), before)
        (code,) = self.texts(plan, "code")
        base = json.loads((run / "metadata.json").read_text())["git"]["base"]["commit"]
        head = self.git("rev-parse", "--short", "HEAD").strip()
        text = f"{base[: len(head)]} with git.patch, which is {head}, byte for byte"
        self.assertEqual(code, text)
        place = self.tree / "sub"
        self.assertEqual(plan["working_dir"], str(place))
        self.assertEqual(plan["command"], [PYTHON, "../train.py"])
        self.assertEqual(plan["level"], 0)

    def state(self, root: Path) -> dict[str, object]:
        return {
            str(path): (path.lstat().st_mtime_ns, path.lstat().st_size)
            for path in sorted(root.rglob("*"))
        }

    def test_what_stays_elsewhere_and_what_goes_wrong(self) -> None:
        self.pushed_repo()
        run = self.record()
        self.assertEqual(self.command_line("verify", run).returncode, 0)
        self.reproduce(run)
        again = self.command_line("reproduce", run, "--into", self.tree)
        self.assertEqual(again.returncode, 2)
        self.assertIn("exists; give another folder by --into", again.stderr)
        done = self.command_line("reproduce", run, cwd=self.repo)
        place = self.tmp / f"{run.name}-again"
        self.assertTrue((place / "train.py").exists(), done.stderr)
        self.assertIn(f"rm -rf {place}", done.stdout)
        origin = self.git("remote", "get-url", "origin")
        found = self.git("-C", str(place), "remote", "get-url", "origin")
        self.assertEqual(found, origin)

    def test_the_remote_alone_a_copied_run_alone_and_neither(self) -> None:
        self.pushed_repo()
        self.write("new", b"1\n")
        run = self.record()
        copy = self.tmp / "copied" / run.name
        shutil.copytree(run, copy)
        away = self.repo.rename(self.tmp / "away")
        self.reproduce(copy)
        self.assert_tree(away)
        shutil.rmtree(self.tree)
        (self.tmp / "repo.origin.git").rename(self.tmp / "gone.git")
        plan = self.reproduce(copy, status=2)
        self.assertRegex(self.texts(plan, "code")[0], "^neither .* nor .* has commit")
        text = (copy / "metadata.json").read_text()
        (copy / "metadata.json").write_text(re.sub('"url": ".*"', '"url": null', text))
        (code,) = self.texts(self.reproduce(copy, status=2), "code")
        self.assertRegex(code, "nor 'a remote' has commit [0-9a-f]{12}: they are gone$")
        self.assertFalse(self.tree.exists())
        self.assertEqual(self.command_line("verify", copy).returncode, 2)

    def test_a_repository_without_a_remote_and_none_at_all(self) -> None:
        self.new_repo()
        self.patch(mock.patch.object(self, "push", lambda: None))
        run = self.record()
        shutil.rmtree(self.repo / ".git")
        self.reproduce(run)
        self.assert_tree()
        shutil.rmtree(self.tree)
        with open(run / "git.patch", "ab") as file:
            file.write(b"more\n")
        (text,) = self.texts(self.reproduce(run, status=2), "code")
        self.assertEqual(text, "git.patch is not the file that the run wrote")
        self.write("docs/icons/a.png", b"\0png")
        run = self.run_script()  # now there is no repository
        self.reproduce(run)
        self.assert_tree()
        shutil.rmtree(self.tree)
        shutil.rmtree(self.repo / "docs")
        (code,) = [s for s in self.reproduce(run, status=1)["steps"] if s["level"]]
        self.assertEqual(code["details"], ["docs/icons/a.png: no source"])

    def test_what_is_not_as_it_was_is_named(self) -> None:
        self.pushed_repo()
        self.write("large.bin", bytes(range(256)) * 24_000)
        self.write(".env", b"A=1\n")
        self.write("conf.py", b'api_password = "' + SPECIFIC + b'"\n')
        run = self.record()
        plan = self.reproduce(run, status=1)
        (code,) = [step for step in plan["steps"] if step["about"] == "code"]
        missing = [".env: holds secrets by nature", "conf.py: redacted"]
        self.assertEqual(code["details"], missing)
        self.assertTrue((self.tree / "large.bin").exists())  # it was still there
        refused = self.command_line("reproduce", run, "--into", "x", "--exec")
        self.assertEqual(refused.returncode, 2)
        self.assertIn(
            "--exec is refused: secrets: redacted in the code", refused.stderr
        )
        shutil.rmtree(self.tree)
        self.write("large.bin", b"other")
        (self.repo / ".env").unlink()
        (code,) = [s for s in self.reproduce(run, status=1)["steps"] if s["level"]][:1]
        self.assertIn("large.bin: too large", code["details"])

    def test_interrupted_at_any_call_of_git(self) -> None:
        self.pushed_repo(files={"x": b"1\n"})
        run = self.record()
        before = self.state(self.repo), self.state(run)
        for number in range(1, 12):
            counter = self.tmp / "counter"
            counter.write_text("")
            self.stub("git", f'''echo x >> {counter}
                [ "$(wc -l < {counter})" = {number} ] && kill -9 $PPID && exit 1
                exec {GIT} "$@"''')  # fmt: skip
            pid = os.fork()
            if pid == 0:
                done = self.command_line("reproduce", run, "--into", "again")
                os._exit(done.returncode)
            status = os.waitpid(pid, 0)[1]
            self.assertEqual((self.state(self.repo), self.state(run)), before)
            if status == 0:
                break
        self.assertGreater(number, 4)
        self.tree = self.tmp / "again"
        self.assert_tree()

    def test_a_half_built_tree_is_replaced_however_often_that_is_interrupted(
        self,
    ) -> None:
        tree = self.tmp / "again"
        names = ("unlink", "rmdir", "rename")
        steps = 0
        for number in range(1, 20):
            (tree / ".git/objects").mkdir(parents=True)
            (tree / ".git/run_utils.half").touch()
            (tree / "x").symlink_to("..")
            steps = 0

            def step(original: Any, *args: Any) -> None:
                nonlocal steps
                steps += 1
                if steps == number:  # noqa: B023
                    raise KeyboardInterrupt
                original(*args)

            with contextlib.ExitStack() as patches:
                for name in names:
                    patched = functools.partial(step, getattr(os, name))
                    patches.enter_context(mock.patch.object(os, name, patched))
                with contextlib.suppress(KeyboardInterrupt):
                    run_utils._make_room(str(tree))
            for emptied in self.tmp.glob("again.*"):  # has the name of another process
                run_utils._remove_tree(str(emptied))
            run_utils._make_room(str(tree))
            self.assertFalse(tree.exists())
            if steps < number:
                break
        self.assertEqual(steps, 6)

    def test_ctrl_c_leaves_nothing(self) -> None:
        self.pushed_repo(files={"x": b"1\n"})
        run = self.record()
        before = self.state(self.repo), self.state(run)
        self.stub("git", f'''[ "$1" = -C ] && shift 2
            case " $* " in *" checkout "*) kill -INT $PPID; sleep 9;; esac
            exec {GIT} "$@"''')  # fmt: skip
        done = self.command_line("reproduce", run, "--into", "again")
        self.assertEqual(done.returncode, 130, done.stdout)
        self.assertEqual((self.state(self.repo), self.state(run)), before)
        self.assertEqual(list(self.tmp.glob("again*")), [])

    def test_a_record_cannot_lead_out_of_the_tree(self) -> None:
        self.pushed_repo()
        run = self.record()
        path = run / "metadata.json"
        metadata = json.loads(path.read_text())
        base = metadata["git"]["base"]
        for name, sentence in (("../evil", "leads out"), ("x", "is no commit")):
            hostile = {"path": name, "base": {**base, "commit": "-" + base["commit"]}}
            metadata["git"]["submodules"] = [hostile]
            path.write_text(json.dumps(metadata))
            plan = self.reproduce(run, status=2)
            self.assertIn(sentence, self.texts(plan, "code")[0])
        self.assertFalse((self.tmp / "evil").exists())

    def test_a_link_in_the_tree_is_not_written_through(self) -> None:
        self.pushed_repo()
        outside = self.tmp / "outside"
        outside.write_text("mine")
        (self.repo / "link").symlink_to(outside)
        self.git("add", "link")
        run = self.record()
        hostile = self.tmp / "hostile"
        hostile.mkdir()
        (hostile / "link").write_text("theirs")
        path = run / "metadata.json"
        metadata = json.loads(path.read_text())
        digest = hashlib.sha256(b"theirs").hexdigest()
        left_out = [{"path": "link", "sha256": digest, "reason": "too large"}]
        metadata["git"]["patch"].update(root=str(hostile), left_out=left_out)
        path.write_text(json.dumps(metadata))
        plan = self.reproduce(run, status=1)
        self.assertEqual(outside.read_text(), "mine")
        (code,) = [step for step in plan["steps"] if step["about"] == "code"]
        self.assertEqual(code["details"], ["link: too large"])

    def test_an_earlier_attempt(self) -> None:
        body = self.TRAIN.replace(
            '"exp", {', "resume=(sys.argv + [None])[1], config_args={"
        )
        self.pushed_repo()
        run = self.record(body=body)
        first = read_tree(self.repo)["train.py"]
        self.write("train.py", textwrap.dedent(body + "\n        # later").encode())
        command = [PYTHON, "train.py", str(run)]
        subprocess.run(command, cwd=self.repo, check=True, capture_output=True)
        self.reproduce(run / "attempts" / "1")
        self.assertEqual(read_tree(self.tree)["train.py"], first)
        shutil.rmtree(self.tree)
        self.reproduce(run)
        self.assert_tree()


class NothingIsStarted(ReproduceCase, WiredCase):
    """Before --exec nothing runs that a record or its repository names."""

    def test_the_wires_stay(self) -> None:
        self.pushed_repo("lib", {"f": b"1\n"})
        self.pushed_repo(files={".gitattributes": b"* filter=x diff=x\n", "x": b"1\n"})
        url = str(self.tmp / "lib.origin.git")
        self.git("submodule", "--quiet", "add", url, "lib")
        self.write("new", b"1\n")
        run = self.record()
        for root in (self.repo, self.repo / "lib", self.tmp / "repo.origin.git"):
            self.arm(root)
        hooks = str(self.repo / ".git" / "hooks")
        self.git("config", "--global", "core.hooksPath", hooks)
        path = run / "metadata.json"
        metadata = json.loads(path.read_text())
        python = shutil.copy(self.wire, self.tmp / "python3")
        if os.geteuid() == 0:
            os.chown(python, 12345, -1)  # somebody else's
        else:
            python = self.wire
        metadata["python"]["executable"] = str(python)
        metadata["git"]["submodules"][0]["base"]["url"] = f"ext::{self.wire}"
        path.write_text(json.dumps(metadata))
        self.patch(mock.patch.object(sys, "executable", PYTHON))
        self.tripped.unlink(missing_ok=True)
        self.assertEqual(self.command_line("verify", run).returncode, 0)
        self.reproduce(run)
        self.assert_tree()
        shutil.rmtree(self.tree)
        away = self.repo.rename(self.tmp / "away")
        plan = self.reproduce(away / run.relative_to(self.repo), status=2)
        self.assertRegex(self.texts(plan, "code")[0], "transport 'ext' not allowed")
        self.assert_not_tripped()


class ThePlan(ReproduceCase):
    """What is missing is said before anything is built."""

    def test_inputs(self) -> None:
        self.pushed_repo()
        used = self.record() / "artifacts" / "model.txt"
        run = self.run_script(f"--init={used.relative_to(self.repo)}")
        plan = self.reproduce(run)
        self.assertEqual(self.texts(plan, "inputs"), ["1 file, unchanged"])
        self.assertIn(f"--init={used}", plan["command"])
        os.utime(used, (1, 1))  # only its time is another
        self.assertEqual(self.command_line("verify", run).returncode, 0)
        for content, sentence in {
            "": "is empty", "other weights": "has 13 bytes, not 7",
            "WEIGHTS": "has changed", None: "is gone",
        }.items():  # fmt: skip
            used.unlink()
            if content is not None:
                used.write_text(content)
                os.utime(used, (2, 2))
            done = self.command_line("verify", run, "--json")
            (text,) = self.texts(json.loads(done.stdout), "inputs")
            self.assertTrue(text.endswith(f"model.txt {sentence}"), text)
            done = self.command_line("reproduce", run, "--into", "x", "--exec")
            self.assertEqual(done.returncode, 2)
            self.assertIn("--exec is refused: inputs:", done.stderr)

    def test_too_little_room_on_the_disk(self) -> None:
        self.pushed_repo()
        run = self.record()
        metadata = json.loads((run / "metadata.json").read_text())
        metadata["outputs"].append({"path": "artifacts/x", "size": 5 * 10**15})
        (run / "metadata.json").write_text(json.dumps(metadata))
        done = self.command_line("verify", run)
        self.assertEqual(done.returncode, 1)
        self.assertRegex(
            done.stdout, "disk: differs: .* free, and the run took 5000 TB"
        )
        done = self.command_line("reproduce", run, "--into", "x", "--exec")
        self.assertIn("--exec is refused: disk:", done.stderr)

    def test_what_is_redacted_in_the_command(self) -> None:
        self.pushed_repo()
        run = self.record("--api_key", SPECIFIC.decode(), "--lr", "0.1")
        plan = self.reproduce(run, status=1)
        text = "redacted in the command: --api_key; give them by --set"
        self.assertEqual(self.texts(plan, "secrets"), [text])
        shutil.rmtree(self.tree)
        plan = self.reproduce(run, "--set", "api-key=new")
        self.assertEqual(plan["command"][-4:], ["--api_key", "new", "--lr", "0.1"])
        shutil.rmtree(self.tree)
        plan = self.reproduce(run, "--set", "api_key=x", "--set", "lr=0.2", status=1)
        self.assertEqual(self.texts(plan, "command"), ["lr is 0.2, not 0.1"])
        shutil.rmtree(self.tree)
        run = self.record("--lr=0.1", "seed=1")
        plan = self.reproduce(run, "--set", "lr=0.2", "--set", "seed=2", status=1)
        self.assertEqual(plan["command"][-2:], ["--lr=0.2", "seed=2"])

    def test_a_value_that_had_its_default(self) -> None:
        self.pushed_repo()
        for words, added in (
            ([], ["--lr", "0.2"]), (["--fast"], ["--lr", "0.2"]), (["a=1"], ["lr=0.2"]),
        ):  # fmt: skip
            run = self.record(*words)
            plan = self.reproduce(run, "--set", "lr=0.2", status=1)
            self.assertEqual(plan["command"][2:], [*words, *added])
            text = "lr is 0.2, not 0.1: added at its end"
            self.assertEqual(self.texts(plan, "command"), [text])
            shutil.rmtree(self.tree)
        done = self.command_line("reproduce", run, "--into", "x", "--set", "sed=1")
        sentence = "no word of the command sets 'sed'; did you mean 'seed'?"
        self.assertIn(sentence, done.stderr)

    def test_the_environment(self) -> None:
        self.pushed_repo()
        run = self.record()
        path = run / "metadata.json"
        metadata = json.loads(path.read_text())
        lines = ["torch==2.1.0+cu121", "gone==1.0", "-e /home/ann/lib", "a @ file:///b"]
        metadata["pip_freeze"] = lines
        metadata["python"]["version"] = "3.1.4 (main)"
        metadata["packages"]["state"] = "another"
        path.write_text(json.dumps(metadata))
        self.stub("uv", "exit 1")
        os.environ["PATH"] += f"{os.pathsep}/usr/bin:/bin"
        done = self.command_line("reproduce", run, "--into", self.tmp / "told")
        self.assertRegex(done.stdout, r"(?m)^\d+\. uv pip install .*requirements.txt")
        plan = self.reproduce(run, status=1)
        (step,) = [step for step in plan["steps"] if step["about"] == "environment"]
        here = platform_version()
        self.assertEqual(step["text"], f"python 3.1.4, here {here}")
        self.assertIn("gone 1.0, here missing", step["details"])
        venv = str(self.tree / ".venv")
        make, install = plan["environment"]
        self.assertEqual(make, ["uv", "venv", "--python", "3.1.4", venv])
        self.assertIn("https://download.pytorch.org/whl/cu121", install)
        required = (self.tree / ".git" / "requirements.txt").read_text()
        self.assertEqual(required, "torch==2.1.0+cu121\ngone==1.0\n")
        conda = {"conda_packages": ["a-b-1-py_0"], "conda_channels": ["conda-forge"]}
        metadata["environment"] = conda
        path.write_text(json.dumps(metadata))
        make = self.reproduce(run, "--into", str(self.tmp / "c"), status=1)[
            "environment"
        ][0]
        self.assertEqual(make[5:], ["--channel", "conda-forge", "a-b=1=py_0"])

    def install_from(self, folder: Path) -> Path:
        """Install a package "mine" that can be edited; return its site-packages."""
        site = self.tmp / "site-packages"
        place = site / "mine-1.0.dist-info"
        place.mkdir(parents=True)
        (place / "METADATA").write_text("Name: mine\nVersion: 1.0\n")
        direct = {"url": folder.as_uri(), "dir_info": {"editable": True}}
        (place / "direct_url.json").write_text(json.dumps(direct))
        return site

    def test_a_package_from_a_folder_that_has_changed(self) -> None:
        library = self.pushed_repo("lib", {"code.py": b"one\n"})
        self.write("code.py", b"two\n")
        site = self.install_from(library)
        self.pushed_repo()
        (package,) = self.capture(sys_path=[str(site)]).packages
        self.repo = library
        self.assertIsNone(run_utils._package_now(package))
        self.write("code.py", b"three\n")
        sentence = f"mine has changed in {library}"
        self.assertEqual(run_utils._package_now(package), sentence)
        before = self.git("rev-parse", "--short", "HEAD")
        self.commit({})
        after = self.git("rev-parse", "--short", "HEAD")
        sentence = f"mine {before}, here {after}, in {library}"
        self.assertEqual(run_utils._package_now(package), sentence)
        shutil.rmtree(library)
        sentence = f"mine was in {library}, which is gone"
        self.assertEqual(run_utils._package_now(package), sentence)

    def test_an_environment_inside_the_tree(self) -> None:
        """With a package from a folder, as it was with its changes."""
        library = self.pushed_repo("lib", {"pkg/code.py": b"one\n"})
        self.write("pkg/code.py", b"two\n")
        site = self.install_from(library / "pkg")
        self.pushed_repo()
        captured = self.capture(sys_path=[str(site)])
        run = self.record()
        shutil.copy(captured.folder / "git.mine.patch", run)
        path = run / "metadata.json"
        metadata = json.loads(path.read_text())
        metadata["local_packages"] = captured.packages
        metadata["pip_freeze"] = [f"-e {library}/pkg", "six==1.0"]
        path.write_text(json.dumps(metadata))
        shutil.rmtree(library)
        log = self.tmp / "asked"
        self.stub("uv", f'''echo "$@" >> {log}
            [ $1 = venv ] && mkdir -p "$4/bin" && ln -s {PYTHON} "$4/bin/python"
            [ $1 = venv ] && cp {Path(PYTHON).parent.parent}/pyvenv.cfg "$4"
            exit 0''')  # fmt: skip
        os.environ["PATH"] += f"{os.pathsep}/usr/bin:/bin"
        plan = self.reproduce(run, status=1)
        (step,) = [step for step in plan["steps"] if step["about"] == "environment"]
        gone = f"mine was in {library / 'pkg'}, which is gone"
        self.assertIn(gone, [step["text"], *step["details"]])
        shutil.rmtree(self.tree)
        uv = self.tmp / "bin" / "uv"
        works = uv.read_text()
        uv.write_text("#!/bin/sh\nexit 1\n")
        done = self.command_line("reproduce", run, "--into", self.tree, "--venv")
        self.assertEqual((done.returncode, self.tree.exists()), (2, False))
        uv.write_text("#!/bin/sh\nkill -9 $PPID\n")
        words = [PYTHON, "-m", "run_utils", "reproduce", run, "--into", self.tree]
        done = subprocess.run([*words, "--venv"], capture_output=True)
        self.assertEqual((done.returncode, self.tree.exists()), (-9, True))
        uv.write_text(works)
        plan = self.reproduce(run, "--venv", status=1)
        self.assertNotIn(gone, json.dumps(plan))
        self.assertEqual(plan["command"][0], f"{self.tree}/.venv/bin/python")
        copy = self.tree / ".git" / "packages" / "mine" / "pkg"
        self.assertEqual((copy / "code.py").read_bytes(), b"two\n")
        required = (self.tree / ".git" / "requirements.txt").read_text()
        self.assertEqual(required, f"-e {copy}\nsix==1.0\n")
        for line in log.read_text().splitlines():
            self.assertIn(f"{self.tree}/.venv", line)
        status = self.git("status", "--porcelain", cwd=self.tree)
        self.assertEqual(status, "")
        done = self.command_line("reproduce", run, "--into", self.tree, "--venv")
        self.assertIn("exists; give another folder by --into", done.stderr)

    def test_several_ranks(self) -> None:
        """The line of the launcher is what starts them; torchrun itself adds -u."""
        self.pushed_repo()
        path = self.record() / "metadata.json"
        metadata = json.loads(path.read_text())
        argv = [PYTHON, "-u", "train.py", "--lr", "1"]
        metadata["argv"] = argv
        hosts = {"LOCAL_WORLD_SIZE": "2", "GROUP_WORLD_SIZE": "2"}
        self.assertEqual(run_utils._launcher(hosts), hosts)
        torchrun = "torchrun --nproc-per-node 4 train.py --lr 1"
        for launcher, line in (
            ({"WORLD_SIZE": "4"}, torchrun),
            ({"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4"}, torchrun),
            ({"WORLD_SIZE": "4", **hosts},
             "torchrun --nnodes 2 --nproc-per-node 2 train.py --lr 1"),
            ({"SLURM_STEP_NUM_TASKS": "4", "SLURM_NTASKS": "8"},
             f"srun --ntasks 4 {shlex.join(argv)}"),
            ({"PMI_SIZE": "4"}, f"mpiexec -n 4 {shlex.join(argv)}"),
            ({"PMI_SIZE": "1"}, shlex.join(argv)),
            ({"SLURM_NTASKS": "8"}, shlex.join(argv)),  # one python in a batch script
        ):  # fmt: skip
            is_one = shlex.join(argv) == line
            metadata["launcher"] = {**launcher, "world_size": 4}
            if is_one:
                metadata["launcher"] = launcher
            path.write_text(json.dumps(metadata))
            plan = self.reproduce(path.parent, status=int(not is_one))
            self.assertEqual(shlex.join(plan["command"]), line)
            self.assertEqual(self.texts(plan, "command") == [], is_one)
            shutil.rmtree(self.tree)

    def test_its_command_can_be_pasted(self) -> None:
        self.pushed_repo()
        run = self.record("a\nb", "\x1b[1m")
        shown = self.command_line("reproduce", run, "--into", self.tmp / "again").stdout
        self.assertIn(r" train.py $'a\nb' $'\x1b[1m'" + "\n", shown)

    def test_it_fits_on_one_screen(self) -> None:
        self.pushed_repo()
        run = self.record()
        path = run / "metadata.json"
        metadata = json.loads(path.read_text())
        metadata["pip_freeze"] = [f"package{n}==1.{n}" for n in range(99)]
        metadata["packages"] = {"state": None}
        metadata["git"]["changed_after_entry"] = [f"file{n}" for n in range(99)]
        path.write_text(json.dumps(metadata))
        shown = self.command_line("reproduce", run, "--into", self.tmp / "again").stdout
        self.assertLess(len(shown.splitlines()), 20, shown)
        self.assertIn("and 94 more, see --json", shown)
        self.assertRegex(shown, r"package0 1\.0, here missing\n")


def platform_version() -> str:
    return sys.version.split(" ")[0]


class RunningItAgain(ReproduceCase):
    """--exec makes an ordinary new run, and says how exactly it came out."""

    def compare(self, body: str, *words: str, status: int = 0) -> dict[str, Any]:
        self.pushed_repo()
        self.run = self.record("--lr", "0.1", body=body)
        plan = self.reproduce(self.run, "--exec", *words, status=status)
        comparison: dict[str, Any] = plan["comparison"]
        return comparison

    def test_the_same_files(self) -> None:
        found = self.compare(self.TRAIN)
        self.assertEqual(found["level"], "the same files, byte for byte")
        metadata = json.loads((Path(found["run"]) / "metadata.json").read_text())
        self.assertEqual(metadata["reproduces"]["run_dir"], str(self.run))
        self.assertEqual(metadata["reproduces"]["run"], self.run.name)
        link = f"{self.run.name} (reproduced)"
        for command in ("inspect", "lineage", "list --md"):
            place = found["run"]
            if command == "list --md":
                place = f"{self.tree}/results"
            shown = self.command_line(*command.split(), place).stdout
            self.assertIn(self.run.name, shown, command)
            self.assertIn("(reproduced)", shown, command)
        self.assertIn(link, self.command_line("inspect", found["run"]).stdout)

    def test_the_same_files_and_another_output(self) -> None:
        found = self.compare(self.TRAIN.replace('"training"', "time.time_ns()"))
        level = "the same files, byte for byte, but another output"
        self.assertEqual((found["level"], found["same"]), (level, True))

    def test_the_same_metrics_and_a_log_that_differs(self) -> None:
        body = self.TRAIN.replace('"weights"', "str(time.time_ns())")
        found = self.compare(body, status=1)
        level = "the same metrics within 1e-06, but other files"
        self.assertEqual((found["level"], found["same"]), (level, False))

    def test_what_leaves_nothing_is_not_the_same_by_accident(self) -> None:
        body = """
            import time
            from run_utils import run_context
            with run_context("results/exp"):
                open("out.txt", "w").write(str(time.time_ns()))
        """
        found = self.compare(body, status=1)
        level = "not known: it left no file, metric or output"
        self.assertEqual((found["level"], found["same"]), (level, False))

    def test_a_command_in_another_language(self) -> None:
        self.pushed_repo(files={"job.sh": b"cat data; echo $1\n", "data": b"1\n"})
        self.write("data", b"2\n")
        words = ("run", "--base-dir", "results/sh", "--prefix", "my-job", "--")
        command = [PYTHON, "-m", "run_utils", *words, "sh", "job.sh", "x"]
        subprocess.run(command, cwd=self.repo, check=True, capture_output=True)
        (path,) = self.repo.rglob("status.json")
        found = self.reproduce(path.parent, "--exec")["comparison"]
        self.assertEqual(found["level"], "the same output, byte for byte")
        again = Path(found["run"])
        self.assertEqual(again.parent, self.tree / "results" / "sh")
        self.assertRegex(again.name, r"^my-job-\d{8}-")
        self.assertEqual((again / "logs" / "stdout.log").read_text(), "2\nx\n")
        metadata = json.loads((again / "metadata.json").read_text())
        self.assertEqual(metadata["reproduces"]["run_dir"], str(path.parent))

    def test_how_much_a_number_differs(self) -> None:
        """What follows the clock is not close by accident."""
        now = time.time()
        for then, again, verdict in (
            (0.5, 0.5, "same"), (0.5, 0.5 + 1e-9, "close"), (0, 1e-9, "different by 1"),
            (0.5, 0.4, "different by 0.2"), (None, 1, "new"), (1, None, "missing"),
            (now, now + 1, f"different by {1 / now:.2g}"), ("NaN", "NaN", "same"),
            (now * 1e3, now * 1e3 + 1, f"different by {1e-3 / now:.2g}"),
        ):  # fmt: skip
            found = run_utils._verdict("metric", then, again, 1e-6)
            self.assertEqual(found, verdict, (then, again))
        self.assertEqual(run_utils._verdict("end", 1, 1.0000001, 1e-6), "different")

    def test_a_folder_that_git_does_not_know(self) -> None:
        """What ran in an ignored folder is not run in the old one."""
        self.pushed_repo(files={".gitignore": b"build/\n"})
        (self.repo / "build").mkdir()
        run = self.record(cwd="build")
        self.write("train.py", b"raise SystemExit('the code of the old tree')\n")
        before = read_tree(self.repo)
        plan = self.reproduce(run, "--exec")
        self.assertEqual(plan["working_dir"], str(self.tree / "build"))
        self.assertEqual(plan["comparison"]["level"], "the same files, byte for byte")
        self.assertEqual(read_tree(self.repo), before)

    def test_wrong_words_are_refused_before_the_tree_is_built(self) -> None:
        self.pushed_repo()
        run = self.record("--lr", "0.1")
        for words in (["--tolerance", "much"], ["--tolerance", "nan"], ["--set", "lr"]):
            done = self.command_line(
                "reproduce", run, "--into", self.tmp / "again", *words
            )
            self.assertEqual(done.returncode, 2, words)
            self.assertIn(words[1], done.stderr)
            self.assertFalse((self.tmp / "again").exists(), words)

    def test_within_the_spread_of_the_seeds(self) -> None:
        body = self.TRAIN.replace('"seed": 1', '"seed": os.environ["SEED"]')
        body = body.replace("0.25", "float(os.environ['LOSS'])")
        body = body.replace('(run_dir / "artifacts" / "model.txt")', "#")
        self.pushed_repo()
        for number in (1, 3):
            os.environ.update(SEED=str(number), LOSS=str(number))
            run = self.record(body=body)
        os.environ["LOSS"] = "2.5"
        found = self.reproduce(run, "--exec", status=1)["comparison"]
        self.assertEqual(found["level"], "within the spread of 2 seeds")
        verdicts = {row["key"]: row["verdict"] for row in found["rows"]}
        self.assertEqual(verdicts["last(loss)"], "different by 0.17")
        for row in found["rows"]:
            row["now"] = 4
        level = run_utils._level_reached(Run(run), found["rows"], 1e-6)
        self.assertEqual(level, ("different", False))
        size = {"kind": "file", "key": "artifacts/big", "then": 5, "now": 5}
        level = run_utils._level_reached(Run(run), [{**size, "verdict": "same"}], 0)
        self.assertEqual(level[1], False)  # there was no time to hash it
        new = {"kind": "metric", "key": "last(new)", "now": 1, "verdict": "new"}
        level = run_utils._level_reached(Run(run), [new], 1e-6)  # no run had it
        self.assertEqual(level, ("different", False))


# === Lineage ===


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

    def test_every_way_of_naming_a_file(self) -> None:
        file = "results/exp/a/artifacts/a.pt"
        whole = str(self.tmp / file)
        ways: list[tuple[Any, list[str]]] = [
            ({"init": file}, []),
            ({"model": {"init": [0, {"deep": [file]}]}}, []),
            ({"init": file}, [file]),
            ({}, [f"--init={file}"]),
            ({}, ["--init", file]),
            ({}, [f"model.init={file}"]),
            ({}, [whole]),
            ({}, ["link.pt"]),
            ({"init": "./results/../results/exp/a/artifacts/a.pt"}, []),
            ({"init": f"file://{whole}"}, []),
            ({"init": f"file:{file}"}, []),
            ({"init": "results/exp/*/artifacts/a.p?"}, []),
            ({"init": "$RESULTS/exp/a/artifacts/a.pt"}, []),
        ]
        os.environ["RESULTS"] = "results"
        self.addCleanup(os.environ.pop, "RESULTS")
        for config, argv in ways:
            with self.subTest(config=config, argv=argv):
                found = [entry[1:] for entry in self.inputs(config, *argv)]
                self.assertEqual(found, [("a", "artifacts/a.pt")])

    def test_lists_directories_and_patterns(self) -> None:
        both = ["results/exp/a/artifacts/a.pt", "results/exp/a/artifacts/b c.pt"]
        expected = [("a", "artifacts/a.pt"), ("a", "artifacts/b c.pt")]
        for config in ({"init": both}, {"init": ",".join(both)}):
            self.assertEqual([entry[1:] for entry in self.inputs(config)], expected)
        self.assertEqual([entry[1:] for entry in self.inputs({}, *both)], expected)
        self.assertEqual(self.inputs({"init": "results/exp/b"}), [("init", "b", ".")])
        blank = f"file://{self.a}/artifacts/b%20c.pt"
        self.assertEqual(
            [entry[1:] for entry in self.inputs({"i": blank})], expected[1:]
        )
        pattern = {"init": "results/exp/a/artifacts/*.pt"}
        self.assertEqual([e[1:] for e in sorted(self.inputs(pattern))], expected)

    def test_what_is_no_input(self) -> None:
        (self.tmp / "data").mkdir()
        (self.tmp / "data" / "metadata.json").write_text('{"rows": 1}', "utf-8")
        (self.tmp / "data" / "x.csv").touch()
        own = self.tmp / "own"
        own.mkdir()
        (own / "status.json").write_text("{}", "utf-8")
        config = {"data": "data/x.csv", "out": "results/exp", "own": "own", "n": 3}
        config["gone"] = "results/exp/a/no.pt"
        config["long"] = "x," * 9999 + "results/exp/a"  # each part would be looked up
        config.update({"odd": "\0", "home": "~\0", "pattern": "\0/*"})
        self.assertEqual(self.inputs({**config, "command": "results/exp/a"}), [])

    def test_no_pattern_lists_the_whole_disk(self) -> None:
        patterns = ("a/*/b/[xy].pt", "/*/*/*", "a.pt")
        self.assertEqual(
            [run_utils._is_glob(p) for p in patterns], [True, False, False]
        )

    def test_a_data_set_is_looked_at_once(self) -> None:
        data = self.tmp / "data"
        data.mkdir()
        (data / "metadata.json").write_text('{"rows": [' + "1, " * 10**6 + "1]}")
        for number in range(300):
            (data / f"{number}.csv").touch()
        opened = []

        def count(path: Any, *rest: Any, **options: Any) -> Any:
            opened.append(os.fspath(path))
            return really(path, *rest, **options)

        really = run_utils._opened
        with mock.patch.object(run_utils, "_opened", count):
            self.inputs({"files": [f"data/{number}.csv" for number in range(300)]})
        self.assertEqual(opened, [str(data / "metadata.json")])

    def test_a_failed_lost_or_superseded_producer_is_warned_about(self) -> None:
        self.make_run("exp/bad", status={"status": "failed"})
        (self.b / "notes.jsonl").write_text('{"tags": ["superseded"]}\n', "utf-8")
        body = 'with run_context("results/exp", config_args={"i": sys.argv[1:]}): pass'
        done = self.script(body, "results/exp/bad", "results/exp/b", "results/exp/a")
        expected = "run_utils: i=. comes from bad, which is failed\n"
        expected += "run_utils: i=. comes from b, which is superseded\n"
        self.assertEqual(done.stderr, expected)

    def test_the_runs_of_the_ancestors(self) -> None:
        old = self.make_run("exp/old")
        text = json.dumps({"config": {"init": "results/exp/b/artifacts"}})
        (old / "metadata.json").write_text(
            text[:-1] + f', "working_dir": {json.dumps(str(self.tmp))}}}', "utf-8"
        )
        self.assertEqual([entry["run"] for entry in run_utils._read_inputs(old)], ["b"])
        self.assertEqual(Run(self.b).used_by, ["old"])


class UsesByHand(RunCase):
    """mark_artifact_used writes on both sides, is never lost, and never fails."""

    def test_both_sides(self) -> None:
        body = """
        with run_context("results/a", "producer") as producer:
            (producer / "artifacts" / "model.pt").write_text("x")
        with run_context("results/b", "consumer") as consumer:
            for _ in range(2):
                mark_artifact_used(producer / "artifacts" / "model.pt", reason="init")
        mark_artifact_used(producer, consumer)
        """
        done = self.script(body)
        self.assertEqual(done.stderr, "")
        producer, consumer = self.run_dirs()
        rows = list(run_utils._read_lines(producer / "artifacts" / "USED_BY.jsonl"))
        facts = (rows[0]["artifact_relpath"], rows[0]["reason"], rows[2]["reason"])
        self.assertEqual((len(rows), *facts), (3, "model.pt", "init", None))
        self.assertEqual(rows[0]["consumer_run_dir"], str(consumer))
        first, second = run_utils._read_inputs(consumer)
        self.assertEqual(
            (first["run"], first["path"]), (producer.name, "artifacts/model.pt")
        )
        self.assertEqual((first["size"], first["status"]), (1, "success"))
        self.assertEqual((first["reason"], second["path"]), ("init", "."))
        self.assertEqual(len((consumer / "inputs.jsonl").read_text().splitlines()), 2)
        self.assertEqual(Run(producer).used_by, [consumer.name])
        shutil.rmtree("results/index")
        self.assertEqual(Run(producer).used_by, [consumer.name])

    def test_what_is_in_no_run_is_ignored(self) -> None:
        run_utils.mark_artifact_used(self.tmp / "nothing", self.tmp)
        self.assertEqual(os.listdir(), [])

    def test_all_ranks_and_a_read_only_producer(self) -> None:
        self.script("""
        with run_context("results/a", "producer") as producer:
            (producer / "model.pt").write_text("x")
            (producer / "data.bin").write_text("x")
        (producer / "artifacts").rmdir()
        (producer / "artifacts").write_text("no folder")
        with run_context("results/b", "consumer") as consumer:
            pid = os.fork()
            mark_artifact_used(producer / ("model.pt" if pid else "data.bin"))
            if not pid:
                os._exit(0)
            os.waitpid(pid, 0)
        """)
        consumer = run_utils.find_runs("results/b")[0].path
        paths = sorted(entry["path"] for entry in run_utils._read_inputs(consumer))
        self.assertEqual(paths, ["data.bin", "model.pt"])


class LineageOfATree(ReadingCase):
    """The edges are found both ways to any depth, wherever the runs are now."""

    def use(self, consumer: str, producer: str) -> None:
        here, there = (self.tmp / "results" / name for name in (consumer, producer))
        path = there / "artifacts" / "m.pt"
        path.touch()
        metadata = json.loads((here / "metadata.json").read_text("utf-8"))
        entry = run_utils._input("init", str(path), str(there), here, "success")
        metadata["inputs"].append(entry)
        (here / "metadata.json").write_text(json.dumps(metadata, indent=2), "utf-8")

    def setUp(self) -> None:
        super().setUp()
        for name in "abcd":
            self.make_run(f"exp/{name}")
        self.use("exp/b", "exp/a")
        self.use("exp/c", "exp/b")
        self.use("exp/d", "exp/b")

    def walk(self, root: str, start: str, users: bool) -> list[tuple[int, str, str]]:
        lineage = run_utils._Lineage(self.tmp / root)
        found = lineage.walk(self.tmp / root / start, users)
        return [(depth, run.name, what) for depth, run, what in found]

    def test_both_directions(self) -> None:
        file = "artifacts/m.pt"
        self.assertEqual(self.walk("results", "exp/b", False), [(1, "a", file)])
        users = [(1, "c", file), (1, "d", file)]
        self.assertEqual(self.walk("results", "exp/b", True), users)
        deep = [(1, "b", file), (2, "c", file), (2, "d", file)]
        self.assertEqual(self.walk("results", "exp/a", True), deep)

    def test_of_recorded_runs_the_index_tells_who_used_one(self) -> None:
        body = """
        with run_context("results/new", "first") as run_dir:
            (run_dir / "artifacts" / "m.pt").touch()
        with run_context("results/new", "second", {"init": run_dir / "artifacts/m.pt"}):
            with run_context("results/new", "third", {"init": str(run_dir)}):
                pass
        with run_context("results/new", "other"):
            pass
        """
        self.script(body)
        new = self.tmp / "results/new"
        first, second = (next(new.glob(f"{name}-*")) for name in ("first", "second"))
        users = sorted(name.split("-")[0] for name in Run(first).used_by)
        self.assertEqual(users, ["second", "third"])
        self.assertEqual(Run(second).used_by, [next(new.glob("third-*")).name])
        with mock.patch.object(run_utils._Walk, "users_of", return_value=iter(())):
            self.assertEqual(Run(first).used_by, [])  # nothing else is read

    def test_cycles_end(self) -> None:
        self.use("exp/a", "exp/c")
        found = self.walk("results", "exp/a", True)
        self.assertIn((3, "a", "artifacts/m.pt (see above)"), found)

    def test_a_chain_of_5000_runs(self) -> None:
        lineage = run_utils._Lineage(self.tmp / "none")
        runs = [Path(f"/r{number}") for number in range(5000)]
        lineage.edges.update({pair: ["m.pt"] for pair in zip(runs, runs[1:])})
        for start, users in ((runs[0], True), (runs[-1], False)):
            depths = [depth for depth, _, _ in lineage.walk(start, users)]
            self.assertEqual(depths, list(range(1, 5000)))

    def test_moved_renamed_copied_and_deleted(self) -> None:
        shutil.copytree("results", "copy")
        (self.tmp / "copy/exp/a/status.json").write_text(
            '{"status": "failed"}', "utf-8"
        )
        os.rename("results", "elsewhere")
        os.rename("elsewhere/exp/a", "elsewhere/exp/baseline")
        self.assertEqual(self.walk("elsewhere", "exp/b", False)[0][1], "baseline")
        (entry,) = run_utils._Lineage(self.tmp / "copy").walk(
            self.tmp / "copy/exp/b", False
        )
        self.assertEqual(entry[1], self.tmp / "copy/exp/a")
        shutil.rmtree("elsewhere/exp/baseline")
        (entry,) = run_utils._Lineage(self.tmp / "elsewhere").walk(
            self.tmp / "elsewhere/exp/b", False
        )
        self.assertEqual(entry[1], self.tmp / "results/exp/a")

    def test_runs_that_are_tied_to_another(self) -> None:
        tie = {"run": "a", "run_dir": "/gone/exp/a", "relative": "../a"}
        self.make_run("exp/again", metadata={"reproduces": tie})
        self.make_run("exp/inner", metadata={"parent": tie, "reproduces": None})
        found = self.walk("results", "exp/a", True)
        self.assertIn((1, "again", "(reproduced)"), found)
        self.assertIn((1, "inner", "(ran inside)"), found)

    def test_used_by_lines_of_the_ancestors(self) -> None:
        line = {"artifact_relpath": "x.pt", "consumer_run_dir": "/old/results/exp/d"}
        path = self.tmp / "results/exp/a/artifacts/USED_BY.jsonl"
        path.write_text(json.dumps(line) + "\n", "utf-8")
        self.assertEqual(
            self.walk("results", "exp/d", False)[0], (1, "a", "artifacts/x.pt")
        )
        self.assertEqual(Run(self.tmp / "results/exp/a").used_by, ["b", "d"])

    def test_a_run_that_another_one_started(self) -> None:
        self.in_context("""
        import subprocess
        code = "from run_utils import *\\nwith run_context('results/exp', 'in'): pass"
        subprocess.run([sys.executable, "-c", code], check=True)
        """)
        (outer,) = run_utils.find_runs("results", contains="exp-")
        self.assertRegex(outer.used_by[0], r"^in-\d+-\d+")


# === Redaction ===
# No secret reaches the disk. Half of the planted values have no provider's shape, and
# all are made when the tests run.

RANDOM = "a1B2c3D4e5F6g7H8i9J0"  # looks like a key; as a whole and in pieces harmless
MARKER = run_utils.REDACTED


def secret(kind: str, number: int = 0) -> str:
    """Return a value of a kind, the same for the same number."""
    rng = random.Random(f"{kind}{number}")
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"

    def some(length: int, alphabet: str = letters + "0123456789") -> str:
        return "".join(rng.choice(alphabet) for _ in range(length))

    if kind == "hex":
        return some(39, "0123456789abcdef") + "7e"
    if kind == "base64":
        return f"{some(21)}+{some(10)}/{some(10)}="
    if kind == "password":
        return f"{some(5)}7&{some(3)};{some(2)},{some(3)}@{some(2)}/{some(2)}"
    if kind == "provider":
        return "hf_" + some(34, letters)
    if kind == "prefix":
        return f"acme_{some(24)}"
    return some(int(kind))


def redactor(*learned: Any) -> Any:
    result = run_utils._Redactor()
    for data in learned:
        result.learn(data)
    return result


def redacted(data: Any) -> Any:
    """Return data as a process writes it that has learned from nothing else."""
    return redactor(data).data(data)


class SecretNames(unittest.TestCase):
    """A value under a secret name is replaced; names that only sound alike are not."""

    def test_names_of_secrets(self) -> None:
        names = """ACME_API_KEY acmeApiKey password DB_PASSWORD PGPASSWORD SMTP_PASS
            MYSQL_PWD hf_token GITHUB_TOKEN accessToken client_secret GH_PAT passphrase
            AWS_SECRET_ACCESS_KEY MY_CREDENTIALS signing_key X_AUTH_TOKEN HTTP_COOKIE
            FERNET_KEY ACME_KEY POETRY_PYPI_TOKEN_CORP service.api-key.prod API_KEYS
            TOKENS ACCESSKEY AUTHKEY SSHPASS OPENAIKEY api_key_2 TOKEN_ID access_tokens
            DB_PW connectionPassword sas_token SENTRY_DSN token key auth JWT"""
        for name in names.split():
            for value in (RANDOM, secret("20", 1)):
                with self.subTest(name):
                    self.assertEqual(redacted({name: value}), {name: MARKER})
                    self.assertEqual(redacted({name: [value]}), {name: [MARKER]})

    def test_within_what_holds_secrets(self) -> None:
        base64 = "owrcG/4UPNfP5CIHxk/z0w=="
        for data in (
            {"auth": {"token": base64}},
            {"credentials": {"ann": "Harbor#" + "5938?"}},
            {"secrets": {"mail": secret("12", 1)}},
            {"token": "203db13e-70c7" + "-462b-9a3d-bf32640cb0be"},
            {"token": "mf9_wWNAlh" + "IUj29IeY_8wKqAwhs83HdM"},
        ):
            self.assertRegex(str(redacted(data)), f"'{MARKER}'}}+$")

    def test_short_and_wordy_passwords(self) -> None:
        for value in ("hunter2", "letmein", "correct horse battery", "pa/ss", "-x9!a"):
            found = redacted({"db": {"password": value}})
            self.assertEqual(found, {"db": {"password": MARKER}})

    def test_names_that_sound_alike_and_values_that_are_none(self) -> None:
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
            "n_tokens": "300-k2",
            "MONKEY": "rhesus-2",
            "secret": None,
            "api_key": "",
            "hub_token": "None",
            "password": "${DB_PASSWORD}",
            "AWS_SHARED_CREDENTIALS_FILE": "/home/ann/.aws/credentials",
            "ssh_public_key": "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAI ann@host",
            "secret_token_count": 3,
            "use_auth_token": True,
            "api_key_number": "12345678",
            "commit": "9f2c1e4b7a6d5c3f8e0b1a2c4d6e8f0a1b3c5d7e",
            "sha256": "8e35c2cd" * 8,
            "password_hash": "8e35c2cd" * 8,
            "run": "train-20260131-142501-1a2b3c4",
            "model": "unsloth/Qwen2.5-Coder-32B-Instruct-bnb-4bit",
            "image": "nvcr.io/nvidia/pytorch:24.05-py3@sha256:" + "0a1b" * 16,
            "uuid": "203db13e-70c7-462b-9a3d-bf32640cb0be",
            "layout": "IPY_MODEL_" + "0a1b2c3d" * 4,
            "requirements": ["asttokens==3.0.1", "sphinx-apikey==1.0.2"],
        }
        self.assertEqual(redacted(harmless), harmless)

    def test_paths_are_no_passwords(self) -> None:
        """FOUND G8: PWD with a blank, a comma or a parenthesis."""
        for path in ("/home/ann/My Projects (new)", "/data/run lr=0.1,wd=0.2"):
            self.assertEqual(
                redacted({"PWD": path, "x": path}), {"PWD": path, "x": path}
            )
        with tempfile.TemporaryDirectory(prefix="a b,(c)") as folder:
            data = {"password": folder}
            self.assertEqual(redacted(data), data)

    def test_a_bare_key_or_token_needs_a_value_like_one(self) -> None:
        """FOUND R1: and what such a name has is looked for nowhere else."""
        kept = {
            "group_key": "meta-llama/Llama-3.1-8B-Instruct",
            "model": "meta-llama/Llama-3.1-8B-Instruct",
            "hook_key": "blocks.0.attn.hook_result",
            "token": "resnet50-base",
            "why": "Missing key: model.layers.0.weight",
            "kakaobrain/kogpt": 1,
        }
        self.assertEqual(redacted(kept), kept)
        digest = secret("hex")
        found = redacted({"cache_key": digest, "commit": digest})
        self.assertEqual(found, {"cache_key": MARKER, "commit": digest})

    def test_what_a_value_must_look_like(self) -> None:
        random12 = secret("12")
        found = {
            "hftoken": "abc123x",
            "api_tokens": ["abc123x"],
            "auth": random12,
            "api_key": "/" + secret("32"),
        }
        for key, value in found.items():
            self.assertNotIn(str(value), str(redacted({key: value})), key)
        kept = {
            "key": "abcdefghijklmnopqrstuvwxyz0123456789",
            "token_name": random12,
            "max_token": random12,
            "ask_password": "v2-always",
            "public_key": secret("32"),
            "secrets": {"kind": "vault"},
        }
        self.assertEqual(redacted(kept), kept)

    def test_mappings_and_pairs(self) -> None:
        password = secret("12")
        for data in (
            {"secrets": {"mail": password}},
            {"secrets": [{"a": {"b": password}}]},
            [{"name": "DB_PASSWORD", "value": password}],
            {"auths": {"reg.io": {"auth": secret("base64")}}},
        ):
            text = json.dumps(redacted(data))
            self.assertIn(MARKER, text)
            self.assertNotIn(password, text)

    def test_which_keys_are_redacted(self) -> None:
        data = {"lr": 0.1, "db": {"password": "hunter2", "host": "h"}, "argv": ["x"]}
        self.assertEqual(run_utils._Redactor().redacted_keys(data), ["db.password"])
        self.assertEqual(run_utils._Redactor().redacted_keys({"a": math.nan}), [])

    def test_the_callers_object_is_not_touched(self) -> None:
        config = {"a": {"password": RANDOM}, "b": [RANDOM]}
        redacted(config)
        self.assertEqual(config, {"a": {"password": RANDOM}, "b": [RANDOM]})

    def test_nesting_without_end_is_cut(self) -> None:
        data: Any = RANDOM
        for _ in range(900):
            data = [data]
        self.assertIn(MARKER, str(redactor().data(data)))


class SecretShapes(unittest.TestCase):
    """Tokens are told by their shape or their place, wherever they stand in a text."""

    def test_tokens_of_known_and_unknown_providers(self) -> None:
        for token in (
            "ghp_" + "A" * 36,
            "sk-" + "a1B2" * 12,
            "sk-proj-" + secret("40"),
            secret("provider"),
            "AKIA" + "A1B2" * 4,
            "AIza" + "A1b2-" * 7,
            "xoxb-" + "123456789012-" * 2 + "a1B2c3D4e5",
            "glpat-" + "a1B2" * 5,
            "npm_" + "a1b2" * 9,
            "eyJ" + "a1B2" * 5 + ".eyJ" + "c3D4" * 5 + "." + "e5F6" * 8,
            "dapi" + "0a1b2c3d" * 4,
            "SG." + "a1B2" * 5 + "." + "c3D4" * 10,
            "acme_live_" + RANDOM,
            "wonder_test_" + secret("14", 3),
            "api_org_" + secret("provider")[3:],
            "wonder-pat-" + RANDOM,
            "zz-" + "0a1b2c3d" * 4,
            "foo_" + secret("16", 2),
            "csk-" + "ymDswpBcrQbvZjp" * 2 + "Tifmr1Yi",  # as long as few words are
            "-----BEGIN RSA PRIVATE " + "KEY-----\nMIIE\n-----END RSA PRIVATE KEY-----",
        ):
            with self.subTest(token[:8]):
                text = f"failed with {token} (401), retry 1"
                found = redactor().text(text)
                self.assertEqual(found, f"failed with {MARKER} (401), retry 1")

    def test_urls(self) -> None:
        key = secret("20", 3)
        for before, after in {
            f"https://ann:{key}@x.org/a?b=1": "https://<REDACTED>@x.org/a?b=1",
            "postgres://u:p4ss@db:5432/x": "postgres://<REDACTED>@db:5432/x",
            "postgres://u:p@ss/w0rd@db/x": "postgres://<REDACTED>@db/x",
            "git+ssh://git@github.com/a/b.git": "git+ssh://git@github.com/a/b.git",
            f"git+https://o:{key}@x/y.git@main": "git+https://<REDACTED>@x/y.git@main",
            "http://host:8080/@scope/pkg": "http://host:8080/@scope/pkg",
            f"https://{key * 2}@x.org/a": "https://<REDACTED>@x.org/a",
            f"https://x/a?token={key}&n=1": "https://x/a?token=<REDACTED>&n=1",
            "https://s3/x?X-Amz-Signature=" + "0a" * 32: (
                "https://s3/x?X-Amz-Signature=<REDACTED>"
            ),
            f"https://hooks.slack.com/services/T01A/B01A/{key}": (
                "https://hooks.slack.com/services/<REDACTED>"
            ),
            f"https://conda.x/t/{key}/main": "https://conda.x/t/<REDACTED>/main",
        }.items():
            self.assertEqual(redactor().text(before), after)

    def test_headers_assignments_and_json_in_text(self) -> None:
        for value in (RANDOM, secret("20", 4)):
            for text in (
                f"Authorization: Bearer {value}",
                f"Authorization: token {value}",
                f"Incorrect API key provided: {value}.",
                f"DEBUG: using token {value}",
                f"Invalid token '{value}'",
                f"X-Api-Key: {value}",
                f"export ACME_API_KEY={value}",
                f"env: API_TOKEN={value}, x=2",
                f'{{"name": "x", "api_key": "{value}"}}',
                f"api_key: '{value}'",
                f"api_key =\t\t{value}",
                f"tool --api-key {value} --n 1",
                f'["--password", "{value}"]',
                f"curl -u me:{value} x",
                f"tool login --relogin {value}",
                f"machine x.org login me password {value}",
                f"docker login -u me -p {value} x.org",
                f"redis-cli -h db -a {value} ping",
                f"AccountKey={value};EndpointSuffix=core",
            ):
                found = redactor().text(text)
                self.assertEqual(found, text.replace(value, MARKER))

    def test_a_letter_that_is_two_in_lower_case_moves_no_name(self) -> None:
        text = "\u0130" * 30 + " password="
        self.assertEqual(redactor().text(text + RANDOM), text + MARKER)

    def test_where_a_password_ends(self) -> None:
        found = redactor().text("lr=0.1,password=a1;b,c&d,wd=0.2")
        self.assertEqual(found, "lr=0.1,password=<REDACTED>,wd=0.2")
        found = redactor().text("failed: password=" + "jzZjlvveZ7F3.W4Zq user=me")
        self.assertEqual(found, "failed: password=<REDACTED> user=me")
        found = redactor().text("tool --password 'x1 y2 z3' next")
        self.assertEqual(found, "tool --password '<REDACTED>' next")

    def test_prose_and_code_stay(self) -> None:
        for text in (
            "The password is the name of a game; guess the secret token.",
            "the token resnet50-base2 and the password guess12 are words",
            f"run foo_{secret('14', 3)} is no token",
            "Set --api-key or HF_TOKEN to authenticate",
            r"(?i)api[_-]?key\s*[:=]\s*(\w+)",
            "granularity=fine,compact,1,0",
            "gpt-4o-mini-2024-07-18, checkpoint-1000, sm80_xmma_gemm_f16f16_f16f32",
            "SERVICE_TOKEN = 0x00000002",
            "def get(self, key: PositionalIndexer2D) -> Self:",
            "step = warp.LdMatrix8x8x16bOpOfThem(self.layout)",
            "key = c10::computeDispatchKey2(dtype)",
            "norm = CrossAttnDownBlock2DWithSkipConnection3",
            "password = os.environ['DB_PASSWORD_2']",
            "api_key=self.api_key2",
            "resumed from sweep_0a1b2c3d4e5f60718293 and user-9f8e7d6c5b4a39281706",
        ):
            self.assertEqual(redactor().text(text), text)

    def test_a_private_key_line_by_line(self) -> None:
        """FOUND R3: the last lines of a log, also when they begin within the key."""
        line = secret("64")
        key = ["-----BEGIN PRIVATE " + "KEY-----", line, "-----END PRIVATE KEY-----"]
        for text in ("\n".join(["a", *key, "b"]), "\n".join([line, line, key[2], "b"])):
            found = redactor().text(text)
            self.assertNotIn(line, found)
            self.assertEqual(found[-2:], "\nb")
        found = redactor({"SSH_PRIVATE_KEY": "\n".join(key)}).text(f"read {line}")
        self.assertEqual(found, "read <REDACTED>")

    def test_long_and_hostile_texts_come_back(self) -> None:
        for piece in ("a", "://", "eyJ", "=", "-----BEGIN ", "key=", "a-", "a@", '"'):
            text = piece * (200_000 // len(piece))
            self.assertLess(len(redactor().text(text)), 2 * run_utils.MAX_REDACTED)
        hidden = "x " * 500_000 + "ghp_" + "A1b2" * 9
        self.assertFalse("A1b2" in redactor().text(hidden))
        half = "x" * 16_000 + " ghp_" + "A1b2" * 400_000
        self.assertFalse("A1b2" in redactor().text(half))


class CommandLines(unittest.TestCase):
    """One value after a secret flag is replaced, and argv and command agree."""

    def test_flags_and_assignments(self) -> None:
        key = secret("20", 5)
        for words, expected in (
            (["--lr", "0.1", "--api-key", key], ["--lr", "0.1", "--api-key", MARKER]),
            ([f"--token={key}", "-v"], [f"--token={MARKER}", "-v"]),
            ([f"+model.api_key={key}", "x.max_tokens=4096"], None),
            (["--password", "x y z", "--seed", "3"], None),
            (["--password", f"-{key}"], ["--password", MARKER]),
            (["--ask-password", "--seed", "3"], ["--ask-password", "--seed", "3"]),
            (["--password", "--seed", "3"], ["--password", "--seed", "3"]),
            (["-H", f"Authorization: Bearer {key}"], None),
            (["curl", "-u", f"me:{key}"], ["curl", "-u", f"me:{MARKER}"]),
            (["run", "-u", "1000:1000"], ["run", "-u", "1000:1000"]),
            (["--image", "me:tag-12"], ["--image", "me:tag-12"]),
            (["wandb", "login", "0a1b2c3d" * 5], ["wandb", "login", MARKER]),
            (["login", "--relogin", "0a1b2c3d" * 5], ["login", "--relogin", MARKER]),
            (["--api-key", f"{key}A2=="], ["--api-key", MARKER]),
            (["--password", "x8=" + "Qm2!zz4"], ["--password", MARKER]),
            (["--secret", "id=hf"], ["--secret", "id=hf"]),
            (["sshpass", "-p", "Harbor&51", "ssh"], ["sshpass", "-p", MARKER, "ssh"]),
            (["redis-cli", "-a", key, "ping"], ["redis-cli", "-a", MARKER, "ping"]),
            (["show", "-p", "0a1b2c3d" * 5], ["show", "-p", "0a1b2c3d" * 5]),
            (["mysql", f"-p{key}", "-pthread"], ["mysql", f"-p{MARKER}", "-pthread"]),
        ):
            if expected is None:
                changed = [
                    w.replace(key, MARKER).replace("x y z", MARKER) for w in words
                ]
                self.assertNotEqual(changed, words)
                expected = changed
            found = redactor().data({"argv": words, "command": shlex.join(words)})
            self.assertEqual(found["argv"], expected)
            self.assertEqual(shlex.split(found["command"]), expected)
            self.assertEqual(
                redactor().data({"cmd": ["--n", *words]})["cmd"][1:], expected
            )

    def test_an_argv_that_is_none(self) -> None:
        given: Any = {"argv": [1, 2.5, None, ["--lr", "1"], {"password": RANDOM}]}
        expected = {"argv": [1, 2.5, None, ["--lr", "1"], {"password": MARKER}]}
        self.assertEqual(redacted(given), expected)


class ManyTexts(unittest.TestCase):
    """One look at many texts finds what a look at each of them finds."""

    def test_what_is_passed_over_has_no_secret(self) -> None:
        lines = Path(__file__).read_text("utf-8").splitlines()
        odd = [
            "xoxb-1234567890",
            "xapp-1234567890",
            "12345678:" + "a-b_c" * 7,
            "My-long-name-of-something.abcdef." + "another-long-name-" * 2,
            "SK" + "0a" * 16,
            "sk_live_" + "a_b_" * 4,
            "AIza" + "a-b-" * 8,
            f"wearer {RANDOM}",
            f"Basic {RANDOM}",
            f"https://ann:{RANDOM}@example.org",
            f"hooks/services/{RANDOM}/{RANDOM}",
            f"curl -u ann:{RANDOM}",
            f"https://example.org/?code={RANDOM}",
            f"a&sig={RANDOM}",
            f"the_password={RANDOM}",
            "eyJ" + "ab/+" * 20,
            f"acme_corp_test_{RANDOM[:12]}",
        ]
        texts = [*odd, *lines, *(word for line in lines for word in line.split())]
        clean = [redactor().text(text) for text in texts]
        self.assertEqual([t for t, c in zip(odd, clean) if MARKER not in c], [])
        together = redactor().data({f"v{n}": text for n, text in enumerate(texts)})
        self.assertEqual(list(together.values()), clean)
        for text in odd:  # among many that are harmless
            many = {f"v{n}": "harmless" for n in range(100)}
            found = redactor().data({**many, "v": text})
            self.assertEqual(found, {**many, "v": redactor().text(text)})
            found = redactor().data([*many.values(), text])
            self.assertEqual(found, [*many.values(), redactor().text(text)])

    def test_many_lists_are_not_deep(self) -> None:
        many = [["harmless"] for _ in range(1000)]
        self.assertEqual(redactor().data(many), many)

    def test_a_known_value_among_many(self) -> None:
        value = secret("16", 6)
        found = redactor({"db": {"password": value}})
        many = {f"v{n}": "harmless" for n in range(100)}
        wanted = {**many, "v": f"a{MARKER}b"}
        self.assertEqual(found.data({**many, "v": f"a{value}b"}), wanted)


class Propagation(unittest.TestCase):
    """A value that a strong name shows is replaced everywhere; nothing else is."""

    def test_everywhere(self) -> None:
        value = secret("16", 6)
        found = redactor({"db": {"password": value}})
        self.assertEqual(found.data({value: [f"a{value}b"]}), {MARKER: [f"a{MARKER}b"]})
        self.assertEqual(
            found.text(f"no access with {value}"), f"no access with {MARKER}"
        )
        data = f"\0{value}\0".encode()
        self.assertEqual(found.replace_known(data), b"\0<REDACTED>\0")
        self.assertEqual(found.code(data, b"a.bin"), b"\0<REDACTED>\0")
        self.assertEqual(
            found.code(f"x = '{value}'".encode(), b"a.py"), b"x = '<REDACTED>'"
        )
        other = run_utils._Redactor()
        other.learn_values(found.known)  # as the recorder does
        self.assertEqual(other.text(f"x {value}"), f"x {MARKER}")

    def test_the_password_of_a_url_alone(self) -> None:
        value = secret("12", 7)
        found = redactor({"url": f"pg://me:{value}@h/d"})
        self.assertEqual(found.text(f"me and {value}"), f"me and {MARKER}")

    def test_longer_values_first(self) -> None:
        short = secret("12", 8)
        found = redactor({"a_password": short, "b_password": short + "-more1"})
        self.assertEqual(found.text(f"{short}-more1"), MARKER)

    def test_what_is_not_learned(self) -> None:
        for data in (
            {"password": "hunter2"},  # seven characters
            {"password": "postgres"},  # a word, which stands for itself elsewhere
            {"password": "${SECRET_12345}"},
            {"lr": 0.1, "name": "Qwen2.5-7B"},
        ):
            self.assertEqual(redactor(data).known, set())
        found = redactor({"password": f"{RANDOM}\nshort line 2"})
        self.assertEqual(found.text("a short line 2"), "a short line 2")
        self.assertTrue(redactor({"password": "hunter23"}).known)

    def test_data_and_text_learn_nothing(self) -> None:
        found = run_utils._Redactor()
        found.data({"password": RANDOM})
        found.text(f"password={RANDOM}")
        found.code(f"password = '{RANDOM}'".encode(), b"a.py")
        self.assertEqual(found.known, set())

    def test_learning_from_files(self) -> None:
        value = secret("16", 9)
        found = run_utils._Redactor()
        found.learn_code(b"DB_PASSWORD=hunter2-prod1\nX=1\n", b"a/.env")
        found.learn_code(f"api_key = '{value}'\n".encode(), b"a.py")
        self.assertEqual(found.text(f"{value} hunter2-prod1"), f"{MARKER} {MARKER}")
        found.learn_code(b"password = 'hunter3-prod1'\n", b"a.py")
        self.assertEqual(found.text("a hunter3-prod1"), "a hunter3-prod1")
        found.learn_code(f"key = '{secret('32', 9)}'\n".encode(), b"a.py")
        self.assertEqual(found.text(f"a {secret('32', 9)}"), f"a {secret('32', 9)}")
        table = "".join(f"api_key = '{secret('16', n)}'\n" for n in range(300))
        found = run_utils._Redactor()
        found.learn_code(table.encode(), b"test_data.py")
        self.assertEqual(found.known, set())

    def test_a_word_of_the_code_is_no_secret(self) -> None:
        value = secret("16", 11)
        found = redactor({"password": "resnet50_v2"}, {"a_password": "hunter2-prod1"})
        found.learn({"api_key": value})
        code = f"import resnet50_v2\nx = 'resnet50_v2'\n# hunter2-prod1 {value}\n"
        clean = found.code(code.encode(), b"a.py").decode()
        expected = f"import resnet50_v2\nx = '{MARKER}'\n# {MARKER} {MARKER}\n"
        self.assertEqual(clean, expected)

    def test_a_class_of_the_code_is_no_secret(self) -> None:
        """Of wandb, whose three files no longer parsed."""
        code = b"""\
def ensure_api_key_secret(
    core_api: "CoreV1Api",
): pass
x = client.CoreV1Api()
"""
        found = redactor()
        found.learn_code(code, b"a.py")
        self.assertEqual(found.known, set())
        found.learn({"api_key": "CoreV1Api"})
        ast.parse(found.code(code, b"a.py"))

    def test_names_and_expressions_of_real_code(self) -> None:
        """Of modules of Ansible, which were altered, or no longer parsed."""
        for code in (
            "x = dict(\n    password=credentials.passwords[0].value,\n)\n",
            "x = dict(\n    password=self.settings.pw1.value2,\n)\n",
            "ignored = ['v3AuthPass', 'v3PrivPass', 'hostname']\n",
            'values = [\n    "cliCredential",\n    "snmpV2cRead",\n]\n',
            'x = {"cliCredential": "cli_credential", "snmpV2cRead": 1}\n',
            'f(v3AuthPass=params.get("v3AuthPass"))\n',
            "act = {\n    Strategy.TOKEN: kFp8DynamicTokenSym,\n}\n",
        ):
            with self.subTest(code):
                found = redactor()
                found.learn_code(code.encode(), b"a.py")
                self.assertEqual(found.known, set())
                self.assertEqual(found.code(code.encode(), b"a.py"), code.encode())

    def test_thousands_of_known_values(self) -> None:
        values = [secret("24", number) for number in range(3000)]
        found = run_utils._Redactor()
        found.learn_values(values)
        text = " ".join(["word"] * 1000 + values)
        self.assertEqual(found.text(text[-30_000:]).count(values[-1]), 0)


# Lines of files, each with @ in the place of the secret. Below a kind at least ten.
KINDS = r'''
# assignment
a.py|API_KEY = "@"
a.py|openai_api_key='@'
a.js|const apiKey = "@";
a.go|apiKey := "@"
a.java|private static final String SECRET_KEY = "@";
a.c|#define API_TOKEN "@"
a.R|Sys.setenv(HF_TOKEN = "@")
a.php|$password = "@";
a.py|os.environ["WANDB_API_KEY"] = "@"
a.py|openai.api_key = "@"
a.py|self._auth_token = "@"
# annotation
a.py|hf_token: "str | None" = "@"
a.py|password: typing.Annotated[str, Field(repr=False)] = "@"
a.go|var apiKey string = "@"
a.c|char password[] = "@";
a.py|api_key: str = "@"
a.py|    hf_token: Optional[str] = '@'
a.py|db_password: str | None = "@"
a.py|secret: Final[str] = "@"
a.py|def f(x, api_key: str = "@"):
a.py|    access_token: "str" = "@"
a.ts|const apiKey: string = "@";
a.py|    password: typing.Union[str, None] = "@"
a.py|API_KEY : str="@"
a.py|    api_key: SecretStr = SecretStr("@")
a.kt|val apiKey: String = "@"
a.rs|const API_KEY: &str = "@";
a.rs|static TOKEN_SECRET: &'static str = "@";
# otherwise
a.py|Slack(token=os.environ.get("T") or "@")
a.py|f(os.getenv("API_KEY") or "@")
a.py|f(os.environ["API_KEY"] if x else "@")
a.py|api_key = os.getenv("X") or "@"
a.py|password = ask() if ask else "@"
a.js|const apiKey = process.env.KEY || "@";
a.js|const apiKey = process.env.KEY ?? "@";
a.tf|  auth_token = var.x != "" ? var.x : "@"
a.ts|const secretKey = dev ? undefined : '@';
a.rb|api_key = ENV["X"] || '@'
a.py|self.api_key = key or "@"
a.py|    hf_token = os.environ.get("A") or os.environ.get("B") or "@"
a.py|API_KEY = None if local else '@'
# other languages
a.R|api_key <- "@"
a.R|options(api_token = "@")
a.ex|config :app, api_secret: "@"
a.csh|setenv API_KEY @
a.cmake|set(API_KEY "@")
a.plist|<key>API_KEY</key>\n<string>@</string>
a.sql|CREATE USER me WITH PASSWORD '@';
a.sql|CREATE USER me IDENTIFIED BY '@';
a.sh|sshpass -p @ ssh me@host
a.sh|redis-cli -h h -a @ ping
a.ps1|ConvertTo-SecureString "@" -AsPlainText -Force
a.cs|var c = "Server=h;Database=d;User Id=me;Password=@;";
a.py|connect("host=h user=me password=@ dbname=x")
# aligned
a.py|client_secret        =   """@"""
a.py|api_key        = "@"
a.py|api_key\t\t= "@"
a.py|password                         =   "@"
a.py|SECRET_KEY=           "@"
a.toml|api_token    =     "@"
a.py|    "api_key"       :   "@",
a.ini|password        = @
a.yaml|api_key:          @
a.json|"client_secret"    :    "@"
a.py|self.secret_key          = "@"
# two arguments
a.py|env("DB_PASSWORD", default="@")
a.py|decouple.config("SECRET_KEY", default="@")
a.py|HTTPBasicAuth("me", "@")
a.py|secrets["mail"] = "@"
a.py|api_keys.append("@")
a.py|key = os.getenv("NAME_API_KEY", "@")
a.py|os.environ.get("HF_TOKEN", "@")
a.py|os.environ.setdefault("WANDB_API_KEY", "@")
a.py|parser.add_argument("--api_key", default="@")
a.py|parser.add_argument("--api-key", type=str, default="@", help="key")
a.py|p.add_argument(\n    "--hf-token",\n    type=str,\n    default="@",\n)
a.py|monkeypatch.setenv("OPENAI_API_KEY", "@")
a.py|@click.option("-k", "--api-key", default="@")
a.py|config.set("auth", "password", "@")
a.py|headers.append(("X-Api-Key", "@"))
a.py|DB_PASSWORD = os.environ.get("PG", "@")
a.py|subprocess.run(["tool", "--api-key", "@"])
# keyword
a.py|client = OpenAI(api_key="@")
a.py|client = Api(api_key = "@", n=1)
a.py|hf_login(hf_token='@')
a.py|wandb.login(key="@")
a.py|huggingface_hub.login("@")
a.py|conn = connect(host="h", user="u", password="@")
a.py|c = Client(\n    region="eu",\n    secret_key="@",\n)
a.py|x.set_api_key("@")
a.py|m = from_pretrained("a/b", use_auth_token="@")
a.py|comet_ml.Experiment(api_key="@", project_name="p")
# notebook
a.ipynb|"!echo \"machine x login me password @\" >> ~/.netrc\\n"
a.ipynb|   "source": [\n    "login(key=\"@\")\\n",\n    "x = 1\\n"
a.ipynb|"os.environ[\"HF_TOKEN\"] = \"@\"\\n"
a.ipynb|"api_key = '@'\\n"
a.ipynb|"!tool login @\\n"
a.ipynb|"%env OPENAI_API_KEY=@\\n"
a.ipynb|"%set_env WANDB_API_KEY @\\n"
a.ipynb|"client = OpenAI(api_key=\"@\")"
a.ipynb|"!huggingface-cli login --token @"
a.ipynb|"    api_key: str = \"@\",\\n"
a.ipynb|"os.getenv(\"DB_PASSWORD\", \"@\")\\n"
a.ipynb|"!export HF_TOKEN=@ && python a.py\\n"
# flags in texts
a.sh|docker login -u me -p @ ghcr.io
a.sh|gh auth login --with-token <<< @
a.sh|echo "@" | docker login --password-stdin ghcr.io
a.sh|API_TOKEN=${API_TOKEN:-@}
a.sh|python train.py --api-key=@ --lr 1
a.sh|python train.py --api-key @
a.sh|python t.py \\\n  --hf_token "@" \\\n  --lr 1
a.sh|mysql --password='@'
a.py|os.system("tool --api-key=@ run")
a.py|cmd = f"python x.py --hf-token @ --n {n}"
a.md|    tool --api-token @
a.yaml|run: tool --secret @
a.py|"""Usage: x --secret-key @"""
a.sh|curl -H "Authorization: Bearer @" https://x
a.sh|curl -H "X-Api-Key: @" https://x
a.py|# export HF_TOKEN=@
a.md|    API_KEY=@ python train.py
a.py|URL = "https://x.org/?api_key=@&n=1"
# dockerfile
Dockerfile|ENV NAME_API_KEY @
Dockerfile|ENV NAME_API_KEY=@
Dockerfile|ENV A=1 HF_TOKEN=@ B=2
Dockerfile|ARG DB_PASSWORD=@
Dockerfile.gpu|ENV WANDB_API_KEY "@"
gpu.dockerfile|ENV A=1 \\\n    SECRET_KEY=@
Dockerfile|RUN export HF_TOKEN=@ && pip install x
Dockerfile|RUN echo "//r/:_authToken=@" > .npmrc
Containerfile|ENV API_TOKEN=@
docker-compose.yml|    environment:\n      - API_KEY=@
docker-compose.yml|    environment:\n      POSTGRES_PASSWORD: @
# yaml
c.yaml|api_key: !str @
c.yaml|api_key: &k @
c.yaml|api_keys: [\n  @,\n]
c.yaml|api_key: @
c.yml|a:\n  password: @
c.yaml|db: {user: me, password: @}
c.yaml|secret_key: '@'
c.yaml|hf_token: @  # mine
c.yaml|- client_secret: @
c.yaml|env:\n  WANDB_API_KEY: @
c.yaml|"api_key": @
c.yaml|x:\n  aws_secret_access_key: @
c.yml|- {name: x, api_token: @}
# yaml next line
c.yaml|api_key: # mine\n  @
c.yaml|api_key: |2-\n  @
c.yaml|api_key:\n  @
c.yaml|password: >-\n  @
c.yaml|a:\n  secret_key: |\n    @\n  b: 1
c.yml|hf_token: >\n  @
c.yaml|a:\n  client_secret:\n    "@"
c.yaml|a:\n  api_key:\n      @\nb: 1
c.yaml|access_token: |-\n  @
c.yaml|db:\n  password:\n    @\n  host: h
c.yaml|- api_key:\n    @
c.yaml|auth_token: |+\n    @
# kubernetes
d.yaml|- name: API_KEY\n  # mine\n  value: @
d.yaml|- name: API_KEY\n  value: >-\n    @
d.yaml|- value: @\n  name: DB_PASSWORD
d.yaml|args:\n- --api-key\n- @
d.yaml|kind: Secret\nstringData:\n  mail: @
d.json|{"value": "@", "name": "API_KEY"}
d.json|{"ParameterKey": "ApiKey", "ParameterValue": "@"}
d.yaml|- name: DB_PASSWORD\n  value: @
d.yaml|        - name: API_KEY\n          value: "@"
d.yaml|- name: 'HF_TOKEN'\n  value: '@'
d.yml|env:\n- name: WANDB_API_KEY\n  value: @\n- name: X\n  value: y
d.json|{"name": "API_KEY", "value": "@"}
d.json|{\n  "name": "DB_PASSWORD",\n  "value": "@"\n}
d.py|V1EnvVar(name="HF_TOKEN", value="@")
d.yaml|kind: Secret\nstringData:\n  password: @
d.yaml|- {name: DB_PASSWORD, value: @}
d.json|{"Key": "ApiKey", "Value": "@"}
# containers
a.py|api_keys = ["@"]
a.py|API_KEYS = [\n    "@",\n    "x",\n]
a.py|secrets = {"a": "@"}
a.py|credentials = {\n  "one": "@",\n}
c.yaml|api_keys: [@, b]
c.yaml|api_keys:\n  - @\n  - b
c.yaml|secrets:\n  a: @\n  b: x
c.yaml|secrets: {a: @}
c.json|{"api_keys": ["@"]}
c.json|{"secrets": {"mail": "@"}}
a.py|PASSWORDS = ("@", "b")
c.toml|[secrets]\na = "@"
# ini
c.ini|[db]\npassword = @
c.cfg|api_key=@
c.conf|secret_key: @
c.properties|spring.datasource.password=@
c.properties|app.jwt.secret = @
setup.cfg|[x]\nauth_token = @
.pypirc|[pypi]\nusername = __token__\npassword = @
.npmrc|//npm.example.org/:_authToken=@
c.ini|password = "@"
c.ini|; x\nclient_secret=@ ; mine
.netrc|machine h login u password @
# terraform
m.tf|variable "db_password" {\n  default = "@"\n}
m.tf|  password = "@"
m.tfvars|api_key = "@"
m.tf|resource "x" "y" {\n  master_password = "@"\n}
m.tf|provider "aws" {\n  region = "eu"\n  secret_key = "@"\n}
m.tf|variable "api_token" {\n  type    = string\n  default = "@"\n}
m.hcl|token_secret = "@"
m.tf|locals {\n  client_secret = "@"\n}
m.tf|environment = {\n  HF_TOKEN = "@"\n}
m.tfvars|secrets = {\n  a = "@"\n}
# shell
a.sh|export API_KEY=@
a.sh|export API_KEY="@"
a.sh|HF_TOKEN='@'
a.sh|DB_PASSWORD=@ python x.py
run|#!/bin/bash\nexport WANDB_API_KEY=@
a.fish|set -gx HF_TOKEN @
a.ps1|$env:API_KEY = "@"
a.bat|set API_KEY=@
.bashrc|export GITHUB_TOKEN=@
a.sbatch|#SBATCH -n 1\nexport HF_TOKEN=@
Makefile|API_KEY ?= @
a.sh|docker run -e API_KEY=@ img
# env
x.env|API_KEY=@
.env.example|SECRET=@
prod.env|DB_PASSWORD="@"
x.env|export TOKEN_SECRET='@'
x.env|A=1\nHF_TOKEN=@
x.env|JWT_SECRET=@ # c
x.env|MYSQL_PWD=@
x.env|AWS_SECRET_ACCESS_KEY = @
x.env|ACCESSKEY=@
x.env|SMTP_PASS=@
# json
c.json|{"api_key": "@"}
c.json|{"a": {"password": "@"}}
c.json|{"clientSecret":"@"}
c.json|  "accessToken": "@",
c.json|{"private_key": "@"}
c.json|{"auths": {"r": {"auth_token": "@"}}}
c.jsonl|{"secret_key": "@"}
c.json|{"env": {"HF_TOKEN": "@"}}
c.json|{"DB_PASS": "@"}
c.json|{"connection": {"pwd": "@"}}
# other languages
a.rb|ENV["API_TOKEN"] ||= "@"
a.rb|client.auth_token '@'
a.go|const ClientSecret string = `@`
a.ts|const password = `@`;
a.rs|let password = String::from("@");
a.cs|public string ClientSecret { get; set; } = "@";
a.py|token: Annotated[str, Field(alias="api_token")] = "@"
a.sql|CREATE SECRET s (TYPE S3, SECRET '@');
a.cpp|static const std::string kSecret{"@"};
# values beside others
a.py|session.auth = ("ann", "@")  # password
a.py|API_TOKENS = ("a", "@")
a.yaml|db_password: !!str\n  @\n
a.yaml|- key: auth_token\n  value: @
a.yaml|command: redis-server --requirepass @
a.py|def api_token() -> str:\n    return "@"\n
a.py|JWT_KEY = "@"
a.txt|API key: @
# other programs
a.sh|mysqldump -u root -p@ passwords > a.sql
a.sh|echo "@" | sudo -S make # password
'''


class SecretsInCode(unittest.TestCase):
    """In files a secret is found where people put it, and nothing else is altered."""

    def test_realistic_cases(self) -> None:
        missed: list[str] = []
        total = 0
        for row in KINDS.strip().splitlines():
            if row.startswith("# "):
                continue
            name, template = row.split("|", 1)
            template = template.replace("\\n", "\n").replace("\\t", "\t")
            template = template.replace("\\\n", "\\n")
            kinds = ["32", "20", "hex", "base64", "prefix", "provider"]
            if re.search("pass|pwd|secret", template, re.IGNORECASE):
                kinds += ["12", "password"]
            for number, kind in enumerate(kinds):
                value = secret(kind, number + total)
                text = re.sub("@(?!click|host)", lambda match: value, template)  # noqa: B023
                found = redactor().code(text.encode(), name.encode())
                total += 1
                if value.encode() in found or MARKER.encode() not in found:
                    missed.append(f"{kind} in {row}")
        self.assertGreater(total, 1000)
        self.assertEqual(missed, [])

    def test_utf_16(self) -> None:
        value = secret("32", 1)
        for encoding in ("utf-16", "utf-16-le", "utf-16-be"):
            data = f'$env:API_KEY = "{value}"\r\n# ä\r\n'.encode(encoding)
            expected = data.decode(encoding)
            found = redactor().code(data, b"a.ps1")
            text = found.decode(encoding)
            self.assertEqual(text, expected.replace(value, MARKER))

    def test_private_keys_keep_the_quotes_around_their_lines(self) -> None:
        line, last = secret("64"), secret("12")
        begin, end = (
            "-----BEGIN RSA PRIVATE " + "KEY-----",
            "-----END RSA PRIVATE KEY-----",
        )
        for code in (
            f'KEY = """{begin}\n{line}\n{line}\n{last}=\n{end}"""\nx = 1\n',
            f'KEY = ("{begin}\\n"\n       "{line}\\n"\n       "{end}\\n")\nx = 1\n',
            f"KEY = '{begin}\\n{line}\\n{end}'\nx = 1\n",
            f'KEY = """{begin}\n{line}\n"""\nx = 1\n',  # without its end
        ):
            found = redactor().code(code.encode(), b"a.py").decode()
            expected = code.replace(line, MARKER).replace(f"{last}=", MARKER)
            self.assertEqual(found, expected)
        code = f'if "{begin}" in text:\n    return parse(text)\n'
        self.assertEqual(redactor().code(code.encode(), b"a.py"), code.encode())

    def test_shapes_without_a_name(self) -> None:
        token = "ghp_" + "A" * 36
        for code in (f"# use {token}\n", f'f("{token}")\n', f"x = '''a\n{token}.'''\n"):
            found = redactor().code(code.encode(), b"a.py").decode()
            self.assertEqual(found, code.replace(token, MARKER))
        code = f"# a{token} {token}\n"
        found = redactor().code(code.encode(), b"a.py").decode()
        self.assertEqual(found, f"# a{token} {MARKER}\n")

    def test_a_prefix_and_much_that_is_random(self) -> None:
        random64, hexadecimal = secret("64", 1), secret("hex", 1)
        for token in (f"acme_{random64}", f"t5-auth-{random64}", f"xpat_{hexadecimal}"):
            code = f'f("{token}")\n'
            found = redactor().code(code.encode(), b"a.py").decode()
            self.assertEqual(found, f'f("{MARKER}")\n')
        for code in (
            f'f("file-{random64}")\n',
            f'f("resp_{hexadecimal}")\n',
            f"a.whl,sha256=ab_{random64},3\n",
            f"see https://example.org/a_{random64} and a.html#b_{random64}\n",
            "x = util.create3x3MatrixBufferDynamicDraw(gl)\n",
            f'"key-vim.host.ScsiDisk-{"0" * 10}766d686261303a303a30"\n',
        ):
            found = redactor().code(code.encode(), b"a.py").decode()
            self.assertEqual(found, code)

    def test_passwords_that_a_person_chose(self) -> None:
        values = ["Winter-2024!", "Harbor@5152*", "tiger_207?", "Kx,;7/b&9"]
        for value in (*values, "kY{8-(0u4Vn,g", "3Cu&[7:tq%MG%ER", "w.N%a9%lq6,T!Ei{"):
            for code in (
                f'db_password = "{value}"\n',
                f'connect(user="u", password="{value}")\n',
                f'set_password("mail", "me", "{value}")\n',
                f'smtp_pass = "{value}"\n',
            ):
                found = redactor().code(code.encode(), b"a.py").decode()
                self.assertEqual(found, code.replace(value, MARKER))

    def test_places_without_a_name(self) -> None:
        value = secret("32", 3)
        for code in (
            f'DB = "postgresql://u:{value}@db:5432/x"\n',
            f'HOOK = "https://hooks.slack.com/services/T01A/B01A/{value}"\n',
            f'h = {{"Authorization": "Basic {value}"}}\n',
            f'h = {{"Authorization": f"token {value}"}}\n',
            f'cmd = "curl -u me:{value} x"\n',
            f'url = "https://conda.x.org/t/{value}/main"\n',
            f'url = "https://x.org/a?key={value}&x=1"\n',
            f'dsn = "me:{value}@tcp(db:3306)/x"\n',
            f'bot = Bot("{"5" * 9}:AA{value}x")\n',
            f'x.key_secret = "+{value}=="\n',
        ):
            found = redactor().code(code.encode(), b"a.py").decode()
            self.assertRegex(found, f"[/:]?{MARKER}")
            self.assertNotIn(value, found)

    def test_code_stays(self) -> None:
        """FOUND G2 and G3: expressions, names, hashes, signatures, examples."""
        jwt = "eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9..."
        digest = "0a1b2c3d" * 8
        for code in (
            "per_token_loss = -torch.min(a, b)",
            "sorted(files, key=os.path.getmtime)[-1]",
            "f(token_ids_0=token_ids_0, a=1)",
            "token_acc = correct/total",
            'f"forward pass: change={c:.6f}"',
            "    token_logprobs: Per-position values",
            "secret = ScalingType.BlockWise128x128",
            '"layout": "IPY_MODEL_' + "0a1b2c3d" * 4 + '"',
            'api_key = "${API_KEY_1A2B3C4D5E6F}"',
            'password = "{password_9f8e7d6c}"',
            'cache_key = "' + "0a1b2c3d" * 5 + '"',
            'api_key_hash = "' + "0a1b2c3d" * 8 + '"',
            '"integrity": "sha512-' + "a1B2c3D4" * 10 + '=="',
            'public_key = "ssh-rsa AAAAB3' + "a1B2c3D4" * 10 + '"',
            "gpgsig -----BEGIN PGP SIGNATURE-----\n\n" + "a1B2c3D4" * 8 + "\n",
            f'verify_token="{jwt}"',
            'token = "hf_' + "x" * 34 + '"',
            'api_key = "sk-your-key-a1B2c3D4e5F6"',
            'secret_format = "%Y-%m-%dT%H:%M:%SZ"',
            'TOKEN = re.compile(r"[A-Za-z0-9._~+/-]+=*")',
            'TOKEN = re.compile(r"^[!#$%&*^_`|~0-9A-Za-z]+$")',
            'PUBKEY = "' + "a1B2c3D4" * 5 + 'a1="',
            "api_key = compute_key_v2(x9, y8)",
            '# the key of\ncompute("kX9vQz2LmW4tRb7N")',
            "password = hashed_passwords_2[user_id3]",
            'set_password("ab",e1+(t&r),"ef")',
            'assert token == "resnet50-base-v2"',
            '{"next_page_token": "a1B2c3D4e5F6g7H8i9J0k1L2m3"}',
            '{"password": {"id": "3a80c66f-bffb-46df-947c-1e8fa583b470"}}',
            'make_password("hello", "seasalt", "pbkdf2_sha256")',  # of Django
            'var PW = f(OW, "vtkOpenGLGlyph3DMapper")',  # of Panel
            'encodedKey = b"AAAAB3NzaC1yc2EAAAABIwAAAQEAsV0VMRbGmzhqxxayLRHmvnFv"',
            '{"GetChangeTokenStatus": {"Id": "abcd12f2-46da-4fdb-b8d5-fbd4c466928f"}}',
            '{"RootPassword": {"CreateDate": "2024-11-06T22:27:58+00:00"}}',
            'setup_vault_secrets(loader, ids=["prompt1@prompt"])',
            '_special_secret_sig = "1b47061264138c4ac30d75fd1eb44270"',  # of Pulumi
            'credentials = {"sha256": "DIGEST"}'.replace("DIGEST", digest),
            'ARN = "arn:aws:secretsmanager:eu:1:secret:MyDatabaseSecret1-d4e5f6"',
        ):
            for name in (b"a.py", b"a.ipynb", b"a.js"):
                with self.subTest(code[:30]):
                    self.assertEqual(
                        redactor().code(code.encode(), name), code.encode()
                    )

    def test_a_block_of_yaml_ends_where_its_lines_do(self) -> None:
        value = secret("32", 3)
        text = f"""
            passwords:
              one: {value}1
              lmdb_kv:
                two: {value}2
            lmdb_kv2q:
              redirect: {value}3
            secrets:
            - {value}4
            - other
            gcdns_zone9: {value}5
            """
        found = redactor().code(textwrap.dedent(text).encode(), b"a.yml").decode()
        numbers = [n for n in range(1, 6) if f"{value}{n}" in found]
        self.assertEqual(numbers, [3, 5])
        for key in ("lmdb_kv:", "lmdb_kv2q:", "redirect:", "gcdns_zone9:"):
            self.assertIn(key, found)
        text = f"env:\n  password:\n    - {value}6\n  note:\n    - {value}7\n"
        found = redactor().code(text.encode(), b"a.yml").decode()
        self.assertEqual(found, text.replace(f"{value}6", MARKER))

    def test_what_is_closed_before_a_literal_does_not_hold_it(self) -> None:
        value = secret("password", 3)
        code = f'connect(login(ann), port(h[0]), {{}}, "{value}")\n'
        self.assertEqual(redactor().code(code.encode(), b"a.py"), code.encode())
        code = f'make_login(port(h[0]), {{}}, "{value}")\n'
        found = redactor().code(code.encode(), b"a.py").decode()
        self.assertEqual(found, code.replace(value, MARKER))

    def test_files_that_are_no_text_stay(self) -> None:
        data = bytes(random.Random(1).randrange(256) for _ in range(100_000))
        self.assertEqual(redactor().code(data, b"a.bin"), data)
        self.assertEqual(
            redactor().code(b"\0key='" + RANDOM.encode(), b"a"),
            b"\0key='" + RANDOM.encode(),
        )

    def test_a_random_value_of_mostly_digits(self) -> None:
        value = "78" * 5 + "a" + "80" * 4 + "f2" + "73" * 3 + "aa" + "28" * 2 + "cZz9"
        argv = ["python", "train.py", "--token", value]
        self.assertEqual(redactor().data({"argv": argv})["argv"][-1], MARKER)
        for name in ("sentence-transformers-2024-12-31-v2", "1234567890" * 4):
            argv = ["python", "train.py", "--token_id", name]
            self.assertEqual(redactor().data({"argv": argv})["argv"], argv)

    def test_our_own_source_and_tests_stay(self) -> None:
        for path in (SOURCE, Path(__file__), HERE / "vendor.sh", HERE / "README.md"):
            data = path.read_bytes()
            found = redactor().code(data, os.fsencode(path.name))
            self.assertEqual(found, data, path.name)

    def test_files_that_hold_secrets_by_nature(self) -> None:
        is_secret = run_utils._Redactor().is_secret_file
        for name in (b".env", b"a/.env.prod", b"a/id_rsa", b"x.pem", b".ssh/config"):
            self.assertTrue(is_secret(name, b"A=1\n"), name)
        for name in (b".env.example", b"id_rsa.pub", b"environment.yml", b"a.py"):
            self.assertFalse(is_secret(name, b"A=1\n"), name)
        certificate = b"# x\n-----BEGIN CERTIFICATE-----\nMIID\n"
        self.assertFalse(is_secret(b"cacert.pem", certificate))
        self.assertTrue(is_secret(b"key.pem", b"-----BEGIN PRIVATE " + b"KEY-----\n"))


class Audit(RunCase):
    """`audit` finds by file and line what a patch would redact, and never tells it."""

    def setUp(self) -> None:
        super().setUp()
        self.run_folder = self.tmp / "results" / "exp" / "old-20240131-142501"
        self.run_folder.mkdir(parents=True)
        self.put("status.json", '{"status": "success"}')

    def put(self, name: str, text: str) -> None:
        (self.run_folder / name).write_text(text, "utf-8")

    def found(self) -> tuple[list[str], Any]:
        audit = run_utils._Audit(self.tmp)
        audit.search([self.tmp / "results"])
        return [f"{Path(e['file']).name}:{e['line']}" for e in audit.found], audit

    def test_files_and_lines(self) -> None:
        password, key, token = secret("12", 1), secret("32", 2), "ghp_" + "A" * 36
        self.put(
            "git.patch",
            "+++ b/x.env\n password = hunter22\n"
            f"+DB_PASSWORD={password}\n-a = '{token}'\n",
        )
        self.put("config.yaml", f"lr: 0.1\napi_key: {key}\n")
        self.put(
            "metadata.json", json.dumps({"argv": ["--password", "h0rse 2"]}, indent=1)
        )
        self.put("out.log", f"one\nusing {password}\ntwo\n{key} {key}\n")
        self.put("train.py", f"x = f('{token}')\n# password: hunter22\n")
        (self.run_folder / "model.bin").write_bytes(b"\0" + key.encode())
        (self.run_folder / "image.bin").write_bytes(bytes(range(256)))
        with mock.patch.object(run_utils, "_redactor", run_utils._Redactor()):
            found, audit = self.found()
        expected = ["config.yaml:2", "git.patch:3", "git.patch:4", "metadata.json:4"]
        expected += ["model.bin:None", "out.log:2", "out.log:4", "train.py:1"]
        self.assertEqual(sorted(found), expected)
        self.assertEqual((audit.searched, audit.binary), (8, 2))
        self.assertNotIn(key, str(vars(audit)))

    def test_links_are_not_followed_and_what_cannot_be_read_is_told(self) -> None:
        outside = self.tmp / "outside.txt"
        outside.write_text("ghp_" + "A" * 36, "utf-8")
        (self.run_folder / "link.txt").symlink_to(outside)
        (self.tmp / "results" / "all").symlink_to(self.tmp)
        with open(self.run_folder / "huge.txt", "wb") as file:
            file.truncate(run_utils.MAX_READ + 1)
        found, audit = self.found()
        self.assertEqual(found, [])
        self.assertEqual([Path(name).name for name in audit.unread], ["huge.txt"])


class NoSecretReachesTheDisk(RunCase):
    """A canary sits in every place that a secret can come from; none is on the disk."""

    def setUp(self) -> None:
        super().setUp()
        self.canaries: list[str] = []

    def canary(self, prefix: str = "hf_") -> str:
        """Return a value, every other one without a provider's shape."""
        value = f"{uuid.uuid4().hex}Zz9"
        if len(self.canaries) % 2:
            value = prefix + value
        self.canaries.append(value)
        return value

    def project(self) -> Path:
        """Make a repository with a canary in all that git tells."""
        if GIT is None:
            self.skipTest("git is not installed")
        repo = self.tmp / "project"
        (repo / "lib").mkdir(parents=True)
        (repo / "tracked.py").write_text("x = 1\n", "utf-8")
        url = f"https://oauth2:{self.canary()}@example.org/x.git"
        identity = ("-c", "user.name=n", "-c", "user.email=e@x")
        for words in (
            ("init", "-q"),
            ("add", "-A"),
            (*identity, "commit", "-qm", f"with api_key={self.canary()}"),
            ("remote", "add", "origin", url),
        ):
            subprocess.run(["git", *words], cwd=repo, check=True)
        (repo / "tracked.py").write_text(f"api_key = '{self.canary()}'\n", "utf-8")
        (repo / "new.py").write_text(f"login(token='{self.canary()}')\n", "utf-8")
        (repo / ".env").write_text(f"SOME_KEY={self.canary()}\n", "utf-8")
        (repo / "c.yaml").write_text(f"db_password: {self.canary()}\n", "utf-8")
        return repo

    def test_canaries(self) -> None:
        repo = self.project()
        plain = "c0rrect-h0rse-ecdfe2"
        self.canaries.append(plain)
        config = {
            "api_key": self.canary(),
            "nested": {"deep": [{"url": f"https://u:{self.canary()}@x.org/?a=1"}]},
            "db": {"password": plain},
            "free": f"text with {plain} inside",
            "lr": 0.1,
        }
        (repo / "train.py").write_text(
            "import json, os, sys\nfrom run_utils import *\n"
            "config, note, message, late = json.loads(sys.stdin.read())\n"
            "with run_context('../results/e', 'e', config, notes=note) as run_dir:\n"
            "    os.environ['LATE_API_KEY'] = late\n"
            "    log_metrics(run_dir, {'loss': 1.0, 'why': message})\n"
            "    mark_status(run_dir, 'partial', extra={'hint': message})\n"
            "    raise RuntimeError(' '.join([message, sys.argv[2], late]))\n",
            "utf-8",
        )
        secret_of_env, late = self.canary(prefix=""), self.canary(prefix="")
        message = f"no access with {plain} and {secret_of_env}"
        given = [config, f"note {secret_of_env}", message, late]
        env = {"WANDB_API_KEY": secret_of_env, "PLAIN": f"a {secret_of_env}"}
        env["DB_URL"] = f"pg://me:{self.canary()}@h/d"
        command = [
            PYTHON,
            "train.py",
            "--hf_token",
            self.canary(prefix=""),
            f"api_key={self.canary()}",
        ]
        done = subprocess.run(
            command, cwd=repo, env=self.environment(env), timeout=60,
            input=json.dumps(given).encode(), capture_output=True,
        )  # fmt: skip
        self.assertEqual(done.returncode, 1, done.stderr)
        self.run_dir()
        for path in (self.tmp / "results").rglob("*"):
            if path.is_file():
                data = path.read_bytes()
                for number, canary in enumerate(self.canaries):
                    self.assertNotIn(canary.encode(), data, f"{number} in {path}")
        metadata = self.json("metadata.json")
        self.assertEqual(metadata["config"]["lr"], 0.1)
        self.assertEqual(metadata["env"]["WANDB_API_KEY"], MARKER)
        patch = metadata["git"]["patch"]
        self.assertEqual([e["path"] for e in patch["left_out"]], [".env"])
        self.assertEqual(sorted(patch["redacted"]), ["c.yaml", "new.py", "tracked.py"])


# === Plain data ===
# Any object becomes dict, list, str, int, float, bool or None, and these the same text
# everywhere.


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


class ArgumentsAndCommand(unittest.TestCase):
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


class PlainData(unittest.TestCase):
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


class Foreign:
    """A class that looks as if it came from a package that is not installed."""

    @staticmethod
    def named(name: str, **members: Any) -> Any:
        module, _, short = name.rpartition(".")
        return type(short, (), {"__module__": module, **members})


class ConfigsOfPackages(unittest.TestCase):
    """Objects of config packages become their values, told by the names of types."""

    def omegaconf(self) -> Any:
        def to_container(config: Any, resolve: bool) -> Any:
            plain = {}
            for key in config.written:
                value = config[key] if resolve else config.written[key]
                is_config = isinstance(value, container)
                plain[key] = to_container(value, resolve) if is_config else value
            return plain

        def look_up(config: Any, key: str) -> Any:
            value = config.written[key]
            if isinstance(value, str) and value.startswith("${"):
                return config.known[value[2:-1]]
            return value

        def make(config: Any, **written: Any) -> None:
            config.written, config.known = written, {"lr": 0.1}

        container = Foreign.named(
            "omegaconf.basecontainer.BaseContainer", __init__=make, __getitem__=look_up
        )
        settings = types.SimpleNamespace(to_container=to_container)
        module = types.SimpleNamespace(OmegaConf=settings)
        patcher = mock.patch.dict(sys.modules, omegaconf=module)
        patcher.start()
        self.addCleanup(patcher.stop)
        return container

    def test_one_bad_interpolation_leaves_the_others_resolved(self) -> None:
        container = self.omegaconf()
        good = container(a="${lr}", b=container(c="${lr}"))
        found = run_utils._plain(good)
        self.assertEqual(found, {"a": 0.1, "b": {"c": 0.1}})
        bad = container(a="${lr}", b=container(c="${lr}", d="${no.such}"), e=3)
        found = run_utils._plain(bad)
        wanted = {"a": 0.1, "b": {"c": 0.1, "d": "${no.such}"}, "e": 3}
        self.assertEqual(found, wanted)

    def test_flags_of_absl_are_their_values(self) -> None:
        flag = types.SimpleNamespace
        known = {
            "lr": flag(value=0.1, present=0, module="train"),
            "v": flag(value=-1, present=0, module="absl.logging"),
            "alsologtostderr": flag(value=True, present=1, module="absl.logging"),
        }
        flags = Foreign.named(
            "absl.flags._flagvalues.FlagValues",
            __iter__=lambda self: iter(known),
            __getitem__=lambda self, name: known[name],
            find_module_defining_flag=lambda self, name: known[name].module,
        )
        found = run_utils._plain(flags())
        self.assertEqual(found, {"lr": 0.1, "alsologtostderr": True})


class HostileObjects(unittest.TestCase):
    """Conversion ends, stays small, raises nothing and changes nothing."""

    def test_object_that_raises_at_every_touch_is_named(self) -> None:
        wanted = f"<{__name__}.Hostile, repr raises RuntimeError>"
        self.assertEqual(run_utils._plain({"a": Hostile()}), {"a": wanted})

    def test_what_a_signal_handler_raises_meanwhile_goes_on(self) -> None:
        def strike(*args: object) -> int:
            signal.raise_signal(signal.SIGUSR1)
            return 1

        def handle(*args: object) -> None:
            raise TimeoutError("the program's own")

        before = signal.signal(signal.SIGUSR1, handle)
        self.addCleanup(signal.signal, signal.SIGUSR1, before)
        mapping = {"__len__": lambda self: 1, "__iter__": lambda self: iter("a")}
        mapping["__getitem__"] = strike
        array = {"shape": (1,), "dtype": "float32", "tolist": strike}
        for value in (
            type("Shown", (), {"__repr__": strike})(),
            type("Read", (collections.abc.Mapping,), mapping)(),
            type("Counted", (list,), {"__len__": strike})([1]),
            type("Array", (), array)(),
        ):
            with self.assertRaises(TimeoutError, msg=type(value).__name__):
                run_utils._plain(value)

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

    def test_what_was_cut_is_not_cut_again(self) -> None:
        value: dict[str, Any] = {"text": "x" * 100_007, "list": [0] * 10_003, "map": {}}
        value["map"] = dict.fromkeys(range(10_003), 0)
        once = run_utils._plain(value)
        self.assertEqual(run_utils._plain(once), once)

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

    def test_an_object_may_raise_what_looks_like_a_time_limit(self) -> None:
        class Slow:
            @property
            def __dict__(self) -> object:  # type: ignore[override]
                raise TimeoutError("no answer")

        self.assertIn("Slow object>", run_utils._plain([Slow()])[0])

    @unittest.skipUnless(hasattr(signal, "SIGUSR1"), "POSIX signals")
    def test_a_signal_handler_that_strikes_inside_reaches_the_program(self) -> None:
        class Limit(Exception):
            pass

        def handler(number: int, frame: object) -> None:
            raise Limit

        class Struck:
            def __repr__(self) -> str:
                os.kill(os.getpid(), signal.SIGUSR1)
                return str([time.sleep(0.001) for _ in range(1000)])

        self.addCleanup(signal.signal, signal.SIGUSR1, signal.SIG_DFL)
        signal.signal(signal.SIGUSR1, handler)
        for value in (Struck(), {"a": [Struck()]}, {Struck(): 1}):
            with self.assertRaises(Limit):
                run_utils._plain(value)

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
        for spare in range(12, 40):  # pytest takes some of it
            self.assertIsNotNone(deeper(sys.getrecursionlimit() - depth - spare))


# Each document with the bytes that must be written.
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


class YamlText(unittest.TestCase):
    """The text means the same to readers of YAML 1.1 and of YAML 1.2."""

    def test_table_of_documents(self) -> None:
        for value, wanted in YAML_TABLE:
            if wanted is not None:
                self.assertEqual(run_utils._format_yaml(value), wanted)

    def test_pyyaml_reads_the_same_value(self) -> None:
        try:
            import yaml
        except ImportError:
            self.skipTest("PyYAML is not installed")
        for value, _ in YAML_TABLE:
            found = yaml.safe_load(run_utils._format_yaml(value))
            self.assertEqual(repr(found), repr(value))

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


class WritingImportsNoYaml(RunCase):
    """YAML is written without an import, whatever stands under the name `yaml`."""

    SCRIPT = (
        "import sys; sys.path.append(sys.argv[1]); import run_utils; print('once')\n"
        "print(run_utils._format_yaml({'a': [{'b': 1e16}], 'c': 'no'}), end='')\n"
        "print('yaml' in sys.modules)\n"
    )
    WANTED = 'once\na:\n  - b: 1.0e+16\nc: "no"\n'

    def run_script(self, name: str, *flags: str) -> str:
        (self.tmp / name).write_text(self.SCRIPT, "utf-8")
        argv = [sys.executable, *flags, name, str(HERE)]
        options: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        done = subprocess.run(argv, encoding="utf-8", timeout=60, **options)
        self.assertEqual(done.stderr, "")
        return str(done.stdout)

    def test_a_script_named_yaml_does_not_run_twice(self) -> None:
        self.assertEqual(self.run_script("yaml.py"), self.WANTED + "False\n")

    def test_optimised_and_isolated_interpreters_write_the_same(self) -> None:
        for flags in (("-OO",), ("-I",), ("-E", "-S", "-B")):
            found = self.run_script("s.py", *flags)
            self.assertEqual(found, self.WANTED + "False\n", flags)


class ReadingYaml(RunCase):
    """A document is read by PyYAML alone, within limits, or refused with a reason."""

    def parse(self, text: str) -> Any:
        try:
            import yaml  # noqa: F401
        except ImportError:
            self.skipTest("PyYAML is not installed")
        return run_utils._parse_yaml(text)

    def test_what_was_written_is_read_back(self) -> None:
        for value, _ in YAML_TABLE:
            found = self.parse(run_utils._format_yaml(value))
            self.assertEqual(repr(found), repr(value))

    def test_a_merge_key_is_read(self) -> None:
        found = self.parse("a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\n")
        self.assertEqual(found["b"], {"x": 1, "y": 3})

    def test_what_would_take_minutes_is_refused(self) -> None:
        merges = ["a0: &a0 {k: 1}"]
        for number in range(1, 30):
            twice = f"*a{number - 1}, *a{number - 1}"
            merges.append(f"a{number}: &a{number} {{<<: [{twice}]}}")
        for text, reason in {
            "\n".join(merges): "its merge keys make too many items",
            "a: " + "[" * 600: "it is nested too deeply",
            "- " * 600: "it is nested too deeply",
            "a: " + "9" * 100_000: "it has a number of more than 5000 digits",
            "a: 1" + ":59" * 100_000: "it has a number of more than 5000 digits",
        }.items():
            with self.assertRaisesRegex(ValueError, reason):
                self.parse(text)

    def test_an_alias_in_many_places_is_bounded(self) -> None:
        lists = ["a0: &a0 [1, 2]"]
        for number in range(1, 40):
            twice = f"*a{number - 1}, *a{number - 1}"
            lists.append(f"a{number}: &a{number} [{twice}]")
        self.assertLess(len(json.dumps(self.parse("\n".join(lists)))), 20_000_000)

    def test_what_cannot_be_read_is_a_value_error(self) -> None:
        for text in ("a: [", "a: 2024-99-99", "? {a: 1}\n: 2", "!!python/none x", "&"):
            with self.assertRaises(ValueError, msg=text):
                self.parse(text)

    def test_one_of_the_current_folder_is_not_run(self) -> None:
        code = "print('it has been run')\nclass SafeLoader: pass\n"
        read = f"import sys; sys.path.append({str(HERE)!r}); import run_utils\n"
        read += "try: run_utils._parse_yaml('a: 1')\nexcept ValueError: pass"
        for name in ("yaml.py", "yaml/__init__.py"):
            place = self.tmp / name.partition("/")[0] / name
            place.parent.mkdir(parents=True)
            place.write_text(code, "utf-8")
            argv = [sys.executable, "-c", read]
            folder = place.parents[name.count("/")]
            done = subprocess.run(argv, cwd=folder, stdout=subprocess.PIPE, timeout=60)
            self.assertEqual(done.stdout, b"", name)

    def test_without_pyyaml_it_says_what_to_do(self) -> None:
        text = (
            "reading YAML takes PyYAML, which cannot be imported .*pip install pyyaml"
        )
        with mock.patch.dict(sys.modules, {"yaml": None}):
            with self.assertRaisesRegex(ValueError, text):
                run_utils._parse_yaml("a: 1")

    def test_a_yaml_of_the_current_folder_is_not_run(self) -> None:
        (self.tmp / "yaml").mkdir()
        (self.tmp / "yaml/__init__.py").write_text("print('it ran')", "utf-8")
        code = "import sys; sys.path.insert(1, sys.argv[1]); import run_utils\n"
        code += "try: run_utils._parse_yaml('a: 1')\nexcept ValueError as e: print(e)"
        command = [sys.executable, "-c", code, str(HERE)]
        done = subprocess.run(command, stdout=subprocess.PIPE, encoding="utf-8")
        self.assertRegex(done.stdout, r"^reading YAML .*\(the current folder has one")


class JsonText(unittest.TestCase):
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


class FlattenedKeys(unittest.TestCase):
    """Nested mappings are told by dotted keys, and no two by the same."""

    def test_keys_are_joined_by_dots(self) -> None:
        found = run_utils._flattened("", {"a": {"b": 1, "c": {"d": [2]}}, "e.f": 3})
        self.assertEqual(found, {"a.b": 1, "a.c.d": [2], "e.f": 3})
        self.assertEqual(run_utils._flattened("x", {"a": {"b": 1}}), {"x.a.b": 1})
        self.assertEqual(run_utils._flattened("x", 5), {"x": 5})

    def test_an_empty_mapping_is_a_value(self) -> None:
        found = run_utils._flattened("", {"a": {}, "b": {"c": {}}})
        self.assertEqual(found, {"a": {}, "b.c": {}})
        self.assertEqual(run_utils._flattened("", {}), {})

    def test_keys_that_meet_are_quoted(self) -> None:
        found = run_utils._flattened("", {"a.b": 1, "a": {"b": 2}})
        self.assertEqual(found, {'"a.b"': 1, "a.b": 2})
        found = run_utils._flattened("", {"a.b": {"c": 1}, "a": {"b.c": 2}})
        self.assertEqual(found, {'"a.b".c': 1, 'a."b.c"': 2})


class LongTexts(RunCase):
    """A text of 90,000 characters is kept whole; a longer one says what is missing."""

    def test_the_middle_of_a_text_is_not_lost(self) -> None:
        body = """
        words = " ".join(f"word{number}" for number in range(11_000))
        config = {"prompt": words[:90_000], "longer": words[:90_000] + " ." * 10_000}
        with run_context("results/exp", "exp", config):
            pass
        """
        self.script(body)
        prompt = " ".join(f"word{number}" for number in range(11_000))[:90_000]
        config = self.json("metadata.json")["config"]
        self.assertEqual(config["prompt"], prompt)
        self.assertTrue(config["longer"].startswith(prompt))
        self.assertTrue(config["longer"].endswith("... <10000 more characters>"))
        self.assertIn(prompt, (self.run_dir() / "config.yaml").read_text("utf-8"))


# === Programs and processes ===


class ForeignPrograms(RunCase):
    """A foreign program costs at most its time and its bytes, and leaves nothing."""

    def problems(self, *stubs: str) -> list[str]:
        """Return what is said of an nvidia-smi that is each of these shell scripts."""
        (self.tmp / "bin").mkdir(exist_ok=True)
        program = self.tmp / "bin" / "nvidia-smi"
        body = """
        import json, run_utils
        run_utils.PROGRAM_BYTES = 1000
        run_utils.PROGRAM_SECONDS = 0.5
        run_dir = start_run("results/exp", "exp")
        for text in json.loads(sys.argv[2]):
            with open(sys.argv[1], "w") as file:
                file.write("#!/bin/sh\\n" + text)
            os.chmod(sys.argv[1], 0o755)
            capture_metadata(run_dir)
            metadata = json.loads((run_dir / "metadata.json").read_text())
            print(metadata["capture"]["cuda"]["problem"])
        """
        env = {"PATH": f"{self.tmp / 'bin'}{os.pathsep}{os.environ['PATH']}"}
        (self.tmp / "input").write_text("of the experiment", "ascii")
        with open(self.tmp / "input", "rb") as file:
            words = [str(program), json.dumps(stubs)]
            done = self.script(body, *words, env=env, stdin=file)
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        return list(done.stdout.splitlines())

    def test_problems_are_sentences(self) -> None:
        cases = {
            "echo no such thing >&2; exit 3": "ended with status 3: no such thing",
            "echo fatal: this; echo that; exit 3": "ended with status 3",
            "echo fatal: this >&2; echo that >&2; exit 3": (
                "ended with status 3: fatal: this"
            ),
            "kill -9 $$": "ended with status -9",
            "sleep 60": "did not end within 0.5 s",
            "exec >&- 2>&-; sleep 60": "did not end within 0.5 s",
            "while :; do echo flood; done": "printed more than 1000 bytes",
            "while :; do echo flood >&2; done": "printed more than 1000 bytes",
            "sleep 60 & echo bad >&2; exit 3": "ended with status 3: bad",
        }
        wanted = [f"nvidia-smi {sentence}" for sentence in cases.values()]
        began = time.monotonic()
        self.assertEqual(self.problems(*cases), wanted)
        self.assertLess(time.monotonic() - began, 50, "it waited for the grandchild")

    def test_it_has_no_input_and_nobody_elses_working_directory(self) -> None:
        (problem,) = self.problems('echo "$(pwd; cat)" >&2; exit 3')
        place = "/proc" if LINUX else os.sep
        self.assertEqual(problem, f"nvidia-smi ended with status 3: {place}")

    @unittest.skipUnless(LINUX, "needs /proc")
    def test_it_inherits_nothing_that_is_open(self) -> None:
        """Neither from the recorder, which forwards output, nor from the program."""
        program = self.tmp / "bin" / "nvidia-smi"
        program.parent.mkdir()
        listing = 'echo $(ls -l /proc/self/fd | grep -o "[0-9]* ->") >&2; exit 3'
        program.write_text(f"#!/bin/sh\n{listing}\n", "utf-8")
        program.chmod(0o755)
        env = {"PATH": f"{program.parent}{os.pathsep}{os.environ['PATH']}"}
        self.in_context("open('held', 'w'); print('out')", env=env)
        problem = self.json("metadata.json")["capture"]["cuda"]["problem"]
        listed = "0 -> 1 -> 2 -> 3 ->"  # 3 is the folder that ls reads
        self.assertEqual(problem, f"nvidia-smi ended with status 3: {listed}")

    def test_its_children_die_with_it(self) -> None:
        note = self.tmp / "pid"
        (problem,) = self.problems(f"sleep 300 & echo $! >{note}; sleep 300")
        self.assertIn("did not end", problem)
        pid = int(note.read_text("ascii"))
        self.wait_until(lambda: not is_alive(pid), "the grandchild dies as well")

    def test_a_module_of_the_working_directory_is_never_run(self) -> None:
        for name in ("pip", "json", "runpy", "importlib"):
            (self.tmp / "work" / name).mkdir(parents=True)
            marker = f"open({str(self.tmp / 'hijacked')!r}, 'w')\n"
            for file in ("__init__.py", "__main__.py"):
                (self.tmp / "work" / name / file).write_text(marker, "utf-8")
        # The script removes its own folder from the path, as `python -P` does.
        body = """
        import json
        os.chdir("work")
        sys.path.insert(0, "")
        with run_context("../results/exp", "exp"): pass
        capture_metadata(start_run("../results/exp", "exp"))
        """
        done = self.script(body)
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        self.assertFalse((self.tmp / "hijacked").exists())


def is_alive(pid: int) -> bool:
    """Tell whether a process runs: neither gone nor a zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text("utf-8")
    except FileNotFoundError:
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


class WhoIsAlive(RunCase):
    """A process is told from a later one with its number, whoever may see it."""

    def test_a_process_with_the_number_of_a_dead_one_is_another(self) -> None:
        self.in_context("pass")
        path = self.run_dir() / "status.json"
        status = self.json("status.json")
        status.update(status="running", exit_code=None, pid=os.getpid())
        identity = run_utils._process_identity(os.getpid())
        for ticks, wanted in ((identity["start_ticks"], "running"), (7, "lost")):
            status["process"] = {**identity, "start_ticks": ticks}
            path.write_text(json.dumps(status), "ascii")
            done = self.command("list", "results", "--json")
            self.assertIn(f'"status": "{wanted}"', done.stdout)

    def test_a_name_with_parentheses_and_blanks(self) -> None:
        body = """
        with open("/proc/self/comm", "w") as file: file.write("a) b (c")
        with run_context("results/exp", "exp"): os.kill(os.getpid(), 9)
        """
        if not os.path.exists("/proc/self/comm"):
            self.skipTest("needs /proc")
        self.script(body)
        self.assertEqual(self.wait_for_status("failed")["signal"], "SIGKILL")

    def test_a_run_of_another_user_whose_processes_are_hidden_is_not_lost(self) -> None:
        python = "/usr/bin/python3"
        if os.geteuid() != 0 or shutil.which("setpriv") is None:
            self.skipTest("only root can hide processes from a user")
        if not os.path.exists(python):
            self.skipTest(f"no {python} that other users can run")
        self.tmp.chmod(0o755)
        shutil.copy(SOURCE, self.tmp / "run_utils.py")
        body = """
        import subprocess
        hidden = "mount -t proc -o hidepid=2 proc /proc && exec setpriv --reuid 54321"
        hidden += " --regid 54321 --clear-groups /usr/bin/python3 run_utils.py list"
        words = ["unshare", "-m", "sh", "-c", hidden + " results --json"]
        done = subprocess.run(words, stdout=subprocess.PIPE)
        print(done.stdout.decode())
        """
        done = self.in_context(body)
        if "mount" in done.stderr or "unshare" in done.stderr:
            self.skipTest("this machine lets nobody mount")
        self.assertIn('"status": "running"', done.stdout)

    @unittest.skipUnless(LINUX, "there are no control groups")
    def test_how_often_the_kernel_killed_for_want_of_memory(self) -> None:
        """What version 2 of the control groups says comes before version 1."""
        files = {"memory": ("memory", "memory.oom_control"), "": ("", "memory.events")}
        lines = Path("/proc/self/cgroup").read_text().splitlines()
        groups = sorted((line.split(":", 2)[1:] for line in lines), reverse=True)
        known = [(kind, group) for kind, group in groups if kind in files]
        self.assertNotEqual(known, [])
        with mock.patch.object(run_utils, "_CGROUPS", str(self.tmp)):
            self.assertEqual(run_utils._oom_kills(), 0)
            for count, (kind, group) in enumerate(known, 3):
                folder, name = files[kind]
                place = self.tmp / folder / group.lstrip("/")
                place.mkdir(parents=True, exist_ok=True)
                (place / name).write_text(f"oom 9\noom_kill {count}\n")
                self.assertEqual(run_utils._oom_kills(), count)


# === Files ===


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

    def test_only_a_change_of_state_waits_for_the_disk(self) -> None:
        run_dir = run_utils.start_run("results/exp", "exp")
        for step, count in (
            (lambda: run_utils.log_metrics(run_dir, {"loss": 1}), 0),
            (lambda: run_utils.save_json("x.json", 1), 0),
            (lambda: run_utils.mark_status(run_dir, "success"), 1),
        ):
            with mock.patch.object(os, "fsync") as fsync:
                step()
            self.assertEqual(fsync.call_count, count)

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

    def test_a_link_at_the_temporary_name_is_not_followed(self) -> None:
        precious = self.tmp / "precious"
        precious.write_bytes(b"mine")
        with mock.patch.object(os, "urandom", lambda size: bytes(size)):
            name = f".f.{os.getpid()}-00000000.tmp"
            (self.tmp / name).symlink_to(precious)
            with self.assertRaises(FileExistsError):
                run_utils._write_file(self.tmp / "f", b"new")
        self.assertEqual(precious.read_bytes(), b"mine")

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


class WhatIsOpened(RunCase):
    """Only regular files are read and appended to, with a limit and no waiting."""

    def test_what_is_no_regular_file_is_refused(self) -> None:
        os.mkfifo("fifo")
        Path("link").symlink_to("/etc/hostname")
        for name in ("fifo", "link", "/dev/zero", "."):
            with self.subTest(name), self.assertRaises(OSError):
                run_utils._read_bytes(name)
        Path("large").write_bytes(b"x" * 11)
        with self.assertRaises(OSError):
            run_utils._read_bytes("large", limit=10)
        self.assertEqual(run_utils._read_bytes("large", limit=11), b"x" * 11)

    def test_what_has_two_names_is_read_but_not_written_to(self) -> None:
        Path("f").write_bytes(b"x")
        os.link("f", "g")
        self.assertEqual(run_utils._read_bytes("g"), b"x")
        with self.assertRaisesRegex(PermissionError, "a hard link"):
            run_utils._open("g", os.O_WRONLY)
        os.unlink("f")
        descriptor = run_utils._open("g", os.O_WRONLY)
        self.addCleanup(os.close, descriptor)
        self.assertTrue(os.get_blocking(descriptor))  # the program may print to it

    def test_a_record_of_any_usual_size_is_read(self) -> None:
        """Once only the first 64 KiB were."""
        for size in (1, 65_534, 65_535, 65_536, 300_000):
            Path("metadata.json").write_text(json.dumps({"env": "x" * size}))
            found = run_utils._read_json("metadata.json")
            self.assertEqual(found, {"env": "x" * size}, size)

    def test_what_is_temporary_is_for_nobody_else(self) -> None:
        with run_utils._temporary_folder() as path:
            self.assertEqual(stat.S_IMODE(os.stat(path).st_mode), 0o700)
        self.assertFalse(os.path.exists(path))

    def test_the_tail_starts_with_a_whole_line(self) -> None:
        Path("f").write_bytes(b"one\ntwo\nthree\n")
        self.assertEqual(run_utils._read_bytes("f", tail=8), b"three\n")


class Times(unittest.TestCase):
    """Times are UTC, whatever the zone of the reader."""

    def test_there_and_back(self) -> None:
        self.assertEqual(run_utils._seconds("1970-01-02T00:00:00Z"), 86400)
        self.assertEqual(run_utils._utc(86400), "1970-01-02T00:00:00Z")
        self.assertEqual(run_utils._seconds("2026-07-01T12:00:00.25Z") % 1, 0.25)
        for text in ("2026-13-01T00:00:00Z", "yesterday", None):
            self.assertIsNone(run_utils._seconds(text))


# === Finding and comparing runs ===


class WhichRun(ReadingCase):
    """One finder: a path, anything inside, a copy, a name, a part of one, latest."""

    def find(self, text: str) -> str:
        return os.path.relpath(run_utils._find_run(text), self.tmp / "results")

    def refused(self, text: str) -> str:
        with self.assertRaises(ValueError) as caught:
            run_utils._find_run(text)
        return str(caught.exception)

    def test_paths_and_names(self) -> None:
        run = self.make_run("exp/train-20260101-000000")
        self.make_run("exp/train-20260101-000000-2")
        self.make_run("other/train-20260102-000000")
        (run / "plots").mkdir()
        (run / "plots" / "f.png").touch()
        os.symlink(run / "plots" / "f.png", "figure.png")
        name = "exp/train-20260101-000000"
        for text in (
            *("figure.png", f"results/{name}", f"results/{name}/plots/f.png"),
            *("train-20260101-000000", name, "exp/train-20260101-000000"),
        ):
            with self.subTest(text):
                self.assertEqual(self.find(text), name)
        for part in ("0102", "other", "oth…000", "oth...000", "other/tra…"):
            self.assertEqual(self.find(part), "other/train-20260102-000000")

    def test_a_name_as_list_shows_it(self) -> None:
        names = [f"exp/train-20260103-000000-1a2b3c4{end}" for end in ("", "-2", "-3")]
        names += ["exp/train-20260104-000000-1a2b3c4", "far/train-20260105-000000-2"]
        for name in names:
            self.make_run(name)
        for width in range(22, 36):
            shown = run_utils._short_names(names, width)
            found = [self.find(text.strip()) for text in shown]
            self.assertEqual(found, names, shown)

    def test_sentences(self) -> None:
        for name in ("exp/a", "exp/b", "more/a"):
            self.make_run(name)
        here = str(self.tmp / "results")
        self.assertEqual(self.refused("no-such"), f"no run 'no-such' below {here!r}")
        names = "'exp' is a part of 2 names (exp/a, exp/b, ...); say more"
        self.assertEqual(self.refused("exp"), names)
        same = "'a' is the name of 2 runs (exp/a, more/a); give one of the paths"
        self.assertEqual(self.refused("a"), same)
        sentence = "is not in a run directory; give one, or a name"
        self.assertEqual(self.refused("/"), f"'/' {sentence}")
        Path("copy.bin").write_text("of no run")
        self.assertEqual(self.refused("copy.bin"), f"'copy.bin' {sentence}")

    def test_a_copy_finds_the_run_that_made_it(self) -> None:
        self.script("""
        for name in "abc":
            with run_context("results/exp", name) as run_dir:
                (run_dir / "plots" / "f.png").write_text(name.replace("c", "a"))
                (run_dir / "empty").touch()
        """)
        a, b = (path for path in self.run_dirs() if path.name[0] in "ab")
        shutil.copy(b / "plots" / "f.png", "figure.png")
        self.assertEqual(run_utils._find_run("figure.png"), b)
        shutil.copy(a / "plots" / "f.png", "figure.png")  # c made the same, later
        with contextlib.redirect_stderr(io.StringIO()) as said:
            self.assertEqual(run_utils._find_run("figure.png"), a)
            shutil.rmtree(a / "plots")
            self.assertEqual(run_utils._find_run("figure.png"), a)
        self.assertIn("'figure.png' is what 2 runs left; this is the", said.getvalue())
        metadata = json.loads((b / "metadata.json").read_text("utf-8"))
        kept = {file["path"]: file["sha256"] for file in metadata.pop("outputs")}
        self.assertEqual(kept["plots/f.png"], hashlib.sha256(b"b").hexdigest())
        (b / "metadata.json").write_text(json.dumps(metadata, indent=2), "utf-8")
        shutil.copy(b / "plots" / "f.png", "figure.png")  # of a run that died
        self.assertEqual(run_utils._find_run("figure.png"), b)
        shutil.copy(b / "empty", "figure.png")
        self.assertIn("is not in a run", self.refused("figure.png"))

    def test_latest_is_by_the_fraction_of_a_second(self) -> None:
        for number, name in enumerate(("c", "a", "b")):
            facts = {"started": 1767225600.25 + number / 1000}
            self.make_run(f"exp/{name}-20260101-000000", status=facts)
        self.assertEqual(self.find("latest"), "exp/b-20260101-000000")
        self.assertEqual([name[0] for name in self.names()], ["b", "a", "c"])

    def test_many_runs_of_which_the_index_knows_most(self) -> None:
        last = run_utils.MANY_RUNS + 20
        utc = [
            f"2026-01-{1 + n // 24:02d}T{n % 24:02d}:00:00Z" for n in range(last + 3)
        ]
        for number in range(last):
            path = self.make_run(
                f"exp/t{number}-20260101-000000", status=self.start(utc[number])
            )
            if number != last - 3:  # this one has no line
                self.write_start(path, utc[number])
        resumed = self.tmp / "results/exp/t5-20260101-000000"
        status = json.dumps(self.start(utc[last + 1]))
        (resumed / "status.json").write_text(status, "utf-8")
        self.write_start(resumed, utc[last + 1])
        self.make_run("exp/new-20260101-000000", status=self.start(utc[last]))
        expected = ["t5", "new", f"t{last - 1}", f"t{last - 2}", f"t{last - 3}"]
        for _ in range(2):  # with the index, and without it
            found = run_utils.find_runs("results", limit=5)
            self.assertEqual([run.name.split("-")[0] for run in found], expected)
            self.assertEqual(self.find("latest"), "exp/t5-20260101-000000")
            shutil.rmtree("results/index", ignore_errors=True)

    def write_start(self, run: Path, utc: str) -> None:
        """Append the line of the index that a run begins with."""
        record = run_utils._Record(run, 1, self.tmp / "results")
        with mock.patch.object(run_utils, "_utc", return_value=utc):
            record.tell_index("start", "running", inputs=[], tied=[])

    def test_latest_through_folders_with_a_stamp_and_across_time_zones(self) -> None:
        late = self.start("2026-03-29T01:30:00Z")
        self.make_run("sweep-20260101-000000/t-20260328-213000", status=late)
        early = self.start("2026-03-29T00:30:00Z")  # with the later local time
        self.make_run("exp/t-20260329-013000", status=early)
        self.make_run(
            "sweep-20990101-000000/x", status=self.start("2026-01-01T00:00:00Z")
        )
        self.assertEqual(self.find("latest"), "sweep-20260101-000000/t-20260328-213000")
        names = ["t-20260328-213000", "t-20260329-013000", "x"]
        self.assertEqual(self.names(), names)

    def test_the_runs_that_resume_may_take(self) -> None:
        base = self.tmp / "results/exp"
        for day, name in (
            (1, "train"),
            (2, "train-more"),
            (3, "eval"),
            (4, "sub/train"),
        ):
            start = self.start(f"2026-01-0{day}T00:00:00Z")
            self.make_run(f"exp/{name}-2026010{day}-000000", status=start)
        latest = run_utils._latest_own_run
        self.assertEqual(latest(base, "train").name, "train-20260101-000000")
        self.assertEqual(latest(base, "{model}").name, "eval-20260103-000000")
        with mock.patch.object(run_utils, "_is_mine", return_value=False):
            self.assertIsNone(latest(base, "train"))


class WhereRunsAre(ReadingCase):
    """Moved, copied, renamed and half-deleted trees give right answers at once."""

    def test_moved_renamed_deleted_and_copied(self) -> None:
        for day in (1, 2, 3):
            start = self.start(f"2026-01-0{day}T00:00:00Z")
            self.make_run(f"exp/t-2026010{day}-000000", status=start)
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
        self.assertEqual(self.names(status="?"), ["t-20260101-000000"])

    def test_links(self) -> None:
        self.make_run("exp/a")
        shutil.copytree("results/exp/a", "far/exp/b")
        shutil.copytree("results/exp/a", "far/exp/deep/c")
        for link, target in (
            ("results/loop", "results"),
            ("results/exp/best", "results/exp/a"),
            ("results/gone", "nowhere"),
            ("results/scratch", "far"),
            ("results/again", "far/exp/deep"),
            ("results/disk", "/"),
            ("far/exp/back", "results"),
            ("far/exp/usr", "/usr"),
        ):
            os.symlink(self.tmp / target, link)
        walk = run_utils._Walk(str(self.tmp / "results"))
        self.assertEqual(sorted(map(os.path.basename, walk.runs)), ["a", "b", "c"])
        self.assertNotIn("/usr", walk.entered)
        self.assertEqual(self.names(contains="far/exp/b"), ["b"])

    def test_thousands_of_links_and_those_of_others(self) -> None:
        self.make_run("exp/a")
        shutil.copytree("results/exp/a", "far/b")
        for number in range(2000):
            os.symlink(self.tmp / "far", f"results/link{number}")
        scandir = os.scandir
        with mock.patch.object(os, "scandir", side_effect=scandir) as scanned:
            self.assertEqual(sorted(self.names()), ["a", "b"])
        self.assertLess(scanned.call_count, 10)
        if os.geteuid() == 0:
            os.chown("far", 1000, 1000)
            self.assertEqual(self.names(), ["a"])

    def test_a_link_that_vanishes_meanwhile(self) -> None:
        self.make_run("exp/a")
        os.symlink(self.tmp / "far", "results/gone")
        real = os.path.realpath

        def vanished(path: Any) -> str:
            if str(path).endswith("gone"):
                raise FileNotFoundError(2, "No such file or directory", path)
            return real(path)

        with mock.patch.object(run_utils, "realpath", vanished):
            self.assertEqual(self.names(), ["a"])

    def test_what_many_folders_refuse_is_a_few_lines(self) -> None:
        self.make_run("exp/a")
        for number in range(20):
            Path(f"results/closed{number}").mkdir()
        real = os.scandir

        def refusing(path: Any) -> Any:
            if "closed" in str(path):
                raise PermissionError(13, "Permission denied", path)
            return real(path)

        with mock.patch.object(os, "scandir", refusing):
            lines = self.said().splitlines()
        self.assertEqual((len(lines), lines[-1]), (6, "run_utils: ... 15 more lines"))
        self.assertIn("' cannot be read: permission denied", lines[0])

    def test_hidden_folders_are_not_entered(self) -> None:
        self.make_run(".trash/exp/a")
        self.make_run("exp/.old/b")
        self.make_run("exp/c")
        self.assertEqual(self.names(), ["c"])


class WhatReadersSay(RunCase):
    """A reader never says running of a dead run, nor lost of a live one."""

    def status(self, age: float = 0, **facts: object) -> str:
        now: dict[str, object] = {"status": "running", "pid": os.getpid()}
        now["hostname"] = run_utils._hostname()
        now["process"] = run_utils._process_identity(os.getpid())
        now["heartbeat_seconds"] = 10
        path = self.tmp / "status.json"
        path.write_text(json.dumps({**now, **facts}), "utf-8")
        then = time.time() - age
        os.utime(path, (then, then))
        return Run(self.tmp).state

    def test_this_very_process_is_running_whatever_the_clock_says(self) -> None:
        for age in (0, 1e6, -1e6):
            self.assertEqual(self.status(age), "running")

    @unittest.skipUnless(LINUX, "needs /proc")
    def test_dead_zombie_stopped_and_another_with_its_number(self) -> None:
        child = subprocess.Popen(["sleep", "60"])
        identity = run_utils._process_identity(child.pid)
        facts: dict[str, object] = {"pid": child.pid, "process": identity}
        os.kill(child.pid, signal.SIGSTOP)
        self.assertEqual(self.status(**facts), "running")
        again = {**identity, "start_ticks": identity["start_ticks"] - 1}
        self.assertEqual(self.status(pid=child.pid, process=again), "lost")
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        self.assertEqual(self.status(**facts), "lost")
        child.wait()
        self.assertEqual(self.status(**facts), "lost")

    @unittest.skipUnless(LINUX, "the boot id is Linux's")
    def test_another_boot_is_lost(self) -> None:
        identity = {**run_utils._process_identity(os.getpid()), "boot_id": "other"}
        self.assertEqual(self.status(process=identity), "lost")

    def test_another_host_is_judged_by_the_heartbeat(self) -> None:
        self.assertEqual(self.status(5, hostname="elsewhere"), "running")
        self.assertEqual(self.status(600, hostname="elsewhere"), "lost")
        found = self.status(600, hostname="elsewhere", heartbeat_seconds=None)
        self.assertEqual(found, "unknown")


class Where(ReadingCase):
    """`where` compares numbers as numbers, texts as texts, by dotted keys."""

    def test_table(self) -> None:
        config = {
            "lr": 0.001,
            "model": {"name": "Qwen/Qwen3"},
            "fp16": True,
            "s": "1e3",
        }
        config.update({"auto": "auto", "clip": "Infinity", "two words": 2})
        rows = [
            {"step": 1, "loss": 2.0, "val/acc": 0.9, "acc(top5)": 1},
            {"step": 2, "loss": 0.5, "acc": "NaN", "val/acc": 0.7},
        ]
        notes = [{"text": "the baseline", "tags": ["one", "two"]}]
        run = Run(self.make_run("exp/a", config=config, metrics=rows, notes=notes))
        true = ["lr<1e-2", "lr <= 0.001", "lr==1e-3", "lr=0.001", "lr!=2", "loss<1"]
        true += ["model.name~Qwen3$", "config.lr<1", "metrics.loss>=0.5", "fp16==true"]
        true += ["fp16==True", "status==success", "name~^a", "s==1000", "lr>1 or lr<1"]
        true += ["lr<1 and loss<1", "lr>1 and loss>9 or fp16==true", "none!=3"]
        true += ["model.name=='qwen/qwen3'", 'model.name=="Qwen/Qwen3"', "nope==null"]
        true += ["started_utc>2025", "acc!=1", "fp16==true or lr>1 and lr>2"]
        true += [
            "max(val/acc)>0.8",
            "min(val/acc)<.8",
            "first(loss)==2",
            "last(loss)<1",
        ]
        true += ["max( loss ) >= 2", "auto!=1", "clip>1e9", '"two words"==2']
        true += ["name~(a|b) or lr>1", "max(acc(top5))==1", "lr!=null", " lr<1 "]
        true += ["(lr<1)", "lr<1 and (lr>1 or loss<1)", "( (lr<1)and(name~(a|b)) )"]
        true += [
            "notes~baseline",
            "tags=two",
            "tags==one",
            "tags!=on",
            "tags~on",
            "tags!=null",
        ]
        false = ["lr>1", "lr<1 and lr>1", "nope<1", "nope==1", "model.name~^x", "acc<1"]
        false += [
            "acc>1",
            "acc==acc",
            "fp16<1",
            "lr>1 or loss>1",
            "none==3",
            "lr==null",
        ]
        false += ["auto>-1", "auto<1", "auto==1", "max(val/acc)>0.95", "max(nope)>0"]
        false += ["acc>0", "lr<auto", "max(lr)>0", "tags=on", "tags!=one"]
        false += ["(lr<1 or lr>1) and lr>1", "lr>1 and (lr<1 or lr>1)"]
        for expected, texts in ((True, true), (False, false)):
            for text in texts:
                with self.subTest(text):
                    self.assertIs(run_utils._Condition(text).holds(run), expected)

    def test_sentences_for_what_is_not_understood(self) -> None:
        how = "write KEY<VALUE (or <= > >= == != ~), joined by and/or"
        for text, rest in (
            ("lr", "lr"),
            ("lr<", "lr<"),
            ("lr<1 and", ""),
            ("lr<1 and ()", ")"),
            ("(lr<1 or", ""),
            ("(lr<1", ""),
            ("(lr<1) b<2", "b<2"),
            ("(lr<1) android<2", "android<2"),
            ("lr<1 xor b<2", "lr<1 xor b<2"),
            ("", ""),
            ("a<1 or __import__('os')", "__import__('os')"),
            ("lr=0.1,name=x", "lr=0.1,name=x"),
            ("lr=<1", "lr=<1"),
            ("lr<>1", "lr<>1"),
            ("lr<1)", ")"),
            ("(" * 9999 + "lr<1", "(" * 9999 + "lr<1"),
        ):
            with self.subTest(text):
                with self.assertRaises(ValueError) as caught:
                    run_utils.find_runs("results", where=text)
                place = repr(rest) if rest else "its end"
                sentence = f"where {text!r} is not understood at {place}; {how}"
                self.assertEqual(str(caught.exception), sentence)
        with self.assertRaisesRegex(ValueError, "'\\(' is no regular expression: "):
            run_utils.find_runs("results", where="a~'('")


class TheOrder(ReadingCase):
    """What is not a finite number is last in both directions; the newest first else."""

    def test_numbers_texts_infinities_nan_and_nothing(self) -> None:
        values = {"two": 2, "one": 1, "text": "auto", "inf": "Infinity", "nan": "NaN"}
        for number, (name, value) in enumerate(values.items(), 1):
            status = self.start(f"2026-01-01T00:00:0{number}Z")
            rows = [{"step": 0, "acc": value}]
            self.make_run(f"exp/{name}", status=status, metrics=rows)
        for second in (7, 6):
            start = self.start(f"2026-01-01T00:00:0{second}Z")
            self.make_run(f"exp/none{second}", status=start)
        rest = ["text", "inf", "nan", "none7", "none6"]
        self.assertEqual(self.names(sort="acc"), ["one", "two", *rest])
        self.assertEqual(self.names(sort="-acc"), ["two", "one", *rest])
        self.assertEqual(self.names(sort="-acc", top=9), ["two", "one"])
        self.assertEqual(self.names(sort="name", top=2), ["none6", "none7"])
        self.assertEqual(self.names(sort="-acc", limit=6), ["two", "one", *rest[:4]])
        numbers = [
            name for name in self.names(sort="-max(acc)") if name in ("two", "one")
        ]
        self.assertEqual(numbers, ["two", "one"])


class WhatDiffers(ReadingCase):
    """It is decided before filters and cuts, and within a script."""

    def differing(self, **options: Any) -> dict[str, list[str]]:
        filters = run_utils._Filters(options)
        selection = run_utils._Selection(self.tmp / "results", filters)
        return {script: sorted(keys) for script, keys in selection.differing.items()}

    def test_among_all_runs_of_a_script(self) -> None:
        for number in range(3):
            config = {"lr": number / 10, "model": {"name": "q"}, "old": number}
            if number == 2:
                del config["old"]
                config["new"] = 1
            self.make_run(f"exp/train-2026010{number + 1}-000000", config=config)
        argv = {"argv": ["python", "-m", "pkg.evaluate"]}
        self.make_run("exp/e-20260101-000000", config={"lr": 9, "k": 1}, metadata=argv)
        expected = {"pkg.evaluate": [], "train": ["config.lr", "config.old"]}
        self.assertEqual(self.differing(), expected)
        self.assertEqual(self.differing(sort="lr", limit=1), expected)
        self.assertEqual(self.differing(where="lr==0.1"), expected)


class SummaryOfMetrics(ReadingCase):
    """Every metric is found, however seldom logged; a stale summary is not used."""

    def test_rows_that_all_have_keys_of_their_own_are_read_one_by_one(self) -> None:
        looked_for = []

        class Row(dict[str, Any]):
            def __contains__(self, key: object) -> bool:
                looked_for.append(key)
                return super().__contains__(key)

        rows = [Row({"step": n, f"key{n % 30}": n}) for n in range(60)]
        blocks = mock.patch.object(run_utils, "_line_blocks", return_value=[b""])
        with blocks, mock.patch.object(run_utils, "_rows_of", return_value=rows):
            step, *others = run_utils._metric_columns("")
        self.assertEqual(step, ("step", [*range(60)], [*range(60)]))
        self.assertEqual(others[3], ("key3", [3, 33], [3, 33]))
        self.assertEqual((len(others), looked_for), (30, []))

    def test_a_metric_logged_long_ago_once(self) -> None:
        self.in_context("""
        log_metrics(run_dir, {"best": 0.75}, step=3)
        for step in range(5000):
            log_metrics(run_dir, {"loss": 5000 - step, "note": "x" * 20}, step=step)
        """)
        (run,) = run_utils.find_runs("results", where="best>0.7 and max(best)==0.75")
        self.assertEqual((run["metrics.best"], run["metrics.loss"]), (0.75, 1))
        summary = self.json("metrics/summary.json")
        self.assertEqual(summary["best"]["max_step"], 3)
        expected: dict[str, object] = {"last": 1, "last_step": 4999, "min": 1}
        expected.update({"min_step": 4999, "max": 5000, "max_step": 0})
        expected.update({"first": 5000, "first_step": 0, "count": 5000})
        self.assertEqual(summary["loss"], expected)
        self.assertEqual(
            (summary["note"]["min"], summary["note"]["count"]), (None, 5000)
        )
        path = run.path / "metrics" / "summary.json"
        path.write_text(path.read_text().replace("0.75", "0.5"), "utf-8")
        self.assertEqual(self.names(where="max(best)==0.5"), [run.name])  # it is used
        run_utils.log_metrics(run.path, {"best": 0.9}, step=6000)
        again = Run(run.path)
        self.assertEqual(again.best("best", "max"), (0.9, 6000))
        self.assertEqual(self.names(where="max(best)==0.9"), [run.name])
        path.write_text('{"metrics.jsonl": 3, "best": 4}', "utf-8")
        self.assertEqual(Run(run.path).summary["best"]["count"], 2)

    def test_torn_lines_and_lines_of_anything(self) -> None:
        run = self.make_run("exp/a")
        path = run / "metrics" / "metrics.jsonl"
        lines = ['{"step": 1, "a": 1}', '{"step": 2, "a"', "[1]", "7", "", "null"]
        lines += [
            '{"a": 2}',
            '{"a": true}',
            '{"a": {"b": [1]}}',
            '{"a": null}',
            '{"a": 3}',
        ]
        lines += ['{"a": %s}' % ("9" * 5000), "[" * 5000]
        path.write_text("\n".join(lines), "utf-8")
        facts = Run(run).summary["a"]
        found = [
            facts[key] for key in ("first", "first_step", "min", "max", "last", "count")
        ]
        self.assertEqual(found, [1, 1, 1, 3, 3, 5])
        self.assertEqual(Run(run).summary["a.b"]["last"], [1])

    def test_across_the_pieces_in_which_it_is_read(self) -> None:
        run = self.make_run(
            "exp/a", metrics=[{"step": n, "x": n % 97} for n in range(300)]
        )
        with mock.patch.object(run_utils, "METRICS_BYTES", 100):
            facts = Run(run).summary["x"]
            series = Run(run).series("x")
        found = [facts[key] for key in ("min_step", "max", "max_step", "count", "last")]
        self.assertEqual(found, [0, 96, 96, 300, 299 % 97])
        self.assertEqual(series, [(n, n % 97) for n in range(300)])


class WhatARunLeft(ReadingCase):
    """Files at the top count, the record and the logs do not."""

    def test_outputs(self) -> None:
        run = self.make_run("exp/a", metrics=[{"a": 1}], notes=[{"text": "x"}])
        for name in ("figure.png", "artifacts/m.pt", "deep/er/x.bin", "other.yaml"):
            (run / name).parent.mkdir(parents=True, exist_ok=True)
            (run / name).write_text("xyz", "utf-8")
        for name in (
            *("config.yaml", "inputs.jsonl", "git.patch", "git.pkg.patch", ".x.tmp"),
            *("logs/stdout.log", "metrics/summary.json", "metrics/system.jsonl"),
            *("artifacts/USED_BY.jsonl", "attempts/1/config.yaml"),
        ):
            (run / name).parent.mkdir(parents=True, exist_ok=True)
            (run / name).touch()
        left = [
            "artifacts/m.pt",
            "deep/er/x.bin",
            "figure.png",
            "metrics/metrics.jsonl",
        ]
        self.assertEqual(list(Run(run).outputs), [*left, "other.yaml"])
        self.assertEqual(
            self.names(has_outputs=True, where="outputs==5 and size>12"), ["a"]
        )
        files = run_utils._left_files(run)
        self.assertEqual({file["path"] for file in files}, {*left, "other.yaml"})
        self.assertEqual({file["size"] for file in files}, {3, 9})
        with mock.patch.multiple(run_utils, OUTPUT_FILES=2, OUTPUT_SECONDS=0.0):
            short = run_utils._left_files(run)
        self.assertEqual([file["sha256"] for file in short], [None, None])


class WhyItFailed(ReadingCase):
    """`reason` says in one line why a run failed, and SLURM is asked once."""

    def reason(self, **status: Any) -> Any:
        shutil.rmtree("results", ignore_errors=True)
        return Run(self.make_run("exp/a", status={"status": "failed", **status}))[
            "reason"
        ]

    def test_reasons(self) -> None:
        error = {"type": "ValueError", "message": "bad\nsecond line", "traceback": ""}
        stop = {"type": "SystemExit", "message": "3", "traceback": ""}
        said = {"type": "SystemExit", "message": "no data", "traceback": ""}
        last = {"exit_code": 3, "last_output": ["...", "disk full", ""]}
        for facts, expected in (
            ({"exception": error}, "ValueError: bad"),
            ({"exception": error, "failed_rank": 1}, "rank 1: ValueError: bad"),
            ({"exception": stop, "exit_code": 3}, "exit code 3"),
            ({"exception": stop, **last}, "exit code 3: disk full"),
            ({"exception": said, "exit_code": 1}, "exit code 1: no data"),
            (last, "exit code 3: disk full"),
            (
                {**last, "last_output": ["disk full", "run_utils: git is slow", ""]},
                "exit code 3: disk full",
            ),
            (
                {"exception": {"type": "AssertionError", "message": ""}},
                "AssertionError",
            ),
            ({"problem": "killed by SIGKILL, out of memory"},) * 2,
            ({}, None),
            ({"exception": "odd", "problem": ["x"], "last_output": 7}, '["x"]'),
            (
                {"status": "success", "warnings": ["a child was killed"]},
                "a child was killed",
            ),
        ):
            if isinstance(expected, dict):
                expected = expected["problem"]
            with self.subTest(facts):
                self.assertEqual(self.reason(**facts), expected)

    def test_sacct_is_asked_once_for_all(self) -> None:
        script = "#!/bin/sh\nprintf '%s\\n' \"$*\" >> asked; cat answer\n"
        (self.tmp / "bin").mkdir()
        stub = self.tmp / "bin" / "sacct"
        stub.write_text(script.replace("asked", f"{self.tmp}/asked")
            .replace("answer", f"{self.tmp}/answer"))  # fmt: skip
        (self.tmp / "bin" / "sacct").chmod(0o755)
        answer = "11|TIMEOUT\n11.batch|CANCELLED\n12|COMPLETED\n12.0|OUT_OF_MEMORY\n"
        (self.tmp / "answer").write_text(f"{answer}13|CANCELLED by 1000\n14|RUNNING\n")
        lost = {"status": "running", "hostname": "elsewhere", "heartbeat_seconds": 10}
        for job in ("11", "12", "13", "14", "--help"):
            run = self.make_run(
                f"exp/{job}", status=lost, metadata={"launcher": {"SLURM_JOB_ID": job}}
            )
            os.utime(run / "status.json", (0, 0))
        path = {"PATH": f"{self.tmp}/bin:{os.environ['PATH']}"}
        with mock.patch.dict(os.environ, path):
            run_utils._job_ends.clear()
            reasons = {
                run.name: run["reason"] for run in run_utils.find_runs("results")
            }
            self.assertEqual(Run(self.tmp / "results/exp/14")["reason"], None)
            run_utils._job_ends.clear()
            self.assertEqual(self.names(where="reason~TIMEOUT"), ["11"])
            with mock.patch.object(run_utils, "SACCT_JOBS", 3):
                run_utils._job_ends.clear()
                self.assertEqual(self.names(where="why~TIMEOUT"), ["11"])
        asked = (self.tmp / "asked").read_text().splitlines()
        self.assertEqual(len(asked), 4)
        self.assertNotIn("--help", asked[0])
        self.assertEqual(reasons["11"], "SLURM says TIMEOUT")
        self.assertEqual(reasons["12"], "SLURM says OUT_OF_MEMORY")
        self.assertEqual(reasons["13"], "SLURM says CANCELLED")
        self.assertEqual((reasons["14"], reasons["--help"]), (None, None))


class Seeds(ReadingCase):
    """Runs that differ only in the seed are one row: mean, deviation, n, states."""

    def fold(self, over: str, **options: Any) -> Any:
        filters = run_utils._Filters(options)
        selection = run_utils._Selection(self.tmp / "results", filters, over)
        return selection.groups, selection

    def test_mean_and_sample_deviation(self) -> None:
        accuracies: dict[tuple[float, int], object] = {(0.1, 1): 0.5, (0.1, 2): 0.7}
        accuracies.update(
            {(0.2, 1): 0.9, (0.2, 2): "NaN", (0.2, 3): 0.8, (0.3, 1): None}
        )
        for (lr, seed), acc in accuracies.items():
            rows = [] if acc is None else [{"step": 0, "acc": acc}]
            status = {"status": "failed" if acc is None else "success"}
            config = {"lr": lr, "seed": seed, "out": f"dir{seed}"}
            name = f"exp/t-202601{10 * lr + 10:02.0f}-00000{seed}"
            facts = {"pip_freeze": [f"numpy=={1 if lr < 0.2 else seed}"]}
            self.make_run(
                name, config=config, metrics=rows, status=status, metadata=facts
            )
        groups, selection = self.fold("seed, config.out", sort="-acc")
        self.assertEqual(
            [group.config["config.lr"] for group in groups], [0.2, 0.1, 0.3]
        )
        spread = groups[1].spread(run_utils._Key("max(acc)"))
        self.assertAlmostEqual(spread.mean, 0.6)
        self.assertAlmostEqual(spread.deviation, 0.02**0.5)
        self.assertEqual((spread.count, groups[1].states()), (2, {"success": 2}))
        spread = groups[0].spread(run_utils._Key("acc"))
        self.assertEqual((spread.count, len(groups[0].runs)), (2, 3))
        spread = groups[2].spread(run_utils._Key("acc"))
        self.assertEqual((spread.mean, spread.deviation, spread.count), (None, None, 0))
        self.assertEqual(groups[2].states(), {"failed": 1})
        self.assertEqual(list(groups[1].warnings()), [])
        (warning,) = groups[0].warnings()
        self.assertRegex(
            warning, r"^packages of t-\S+-00000\d is not that of t-\S+, t-"
        )
        self.assertEqual(selection.warnings, [warning])
        top, selection = self.fold("seed,out", sort="-acc", top=2)
        self.assertEqual((len(top), selection.unseen), (2, 0))

    def test_a_deviation_beyond_all_numbers(self) -> None:
        for seed, loss in enumerate((1e200, -1e200)):
            rows = [{"step": 0, "loss": loss}]
            self.make_run(f"exp/{seed}", config={"seed": seed}, metrics=rows)
        ((group,), _) = self.fold("seed")
        spread = group.spread(run_utils._Key("loss"))
        self.assertEqual((spread.mean, spread.deviation), (0, math.inf))

    def test_a_key_that_no_run_has_is_said(self) -> None:
        self.make_run("exp/a", config={"seed": 1})
        groups, selection = self.fold("sed")
        self.assertEqual(len(groups), 1)
        sentence = "no run has 'sed'; did you mean 'seed'?"
        self.assertEqual(selection.warnings, [sentence])


class Comparing(ReadingCase):
    """One comparison: two runs, or a run with here and now."""

    def test_two_runs(self) -> None:
        git = {"commit_full": "1a2b3c4", "is_dirty": True, "branch": "main"}
        packages = ["numpy==1.0", "-e /home/ann/pkg", "old==1", "A_b @ git+https://x@1"]
        packages += ["-e git+ssh://git@host/a.git@1#egg=a"]
        packages += ["-e git+ssh://git@host/b.git@2#egg=b"]
        facts: dict[str, Any] = {"git": git, "pip_freeze": packages}
        facts.update(hostname="one", cuda={"version": "12.1"})
        facts.update(determinism={"cudnn_deterministic": True, "random_state": "1"})
        a = self.make_run("exp/a", config={"lr": 1, "x": {"y": 2}}, metadata=facts)
        packages = ["numpy==2.0", "-e /home/ann/pkg", "new==1", "a-b @ git+https://x@2"]
        packages += ["-e git+ssh://git@host/a.git@1#egg=a"]
        packages += ["-e git+ssh://git@host/b.git@3#egg=b"]
        facts = {"git": {**git, "is_dirty": False}, "pip_freeze": packages}
        facts.update(hostname="two", cuda={"version": "12.4"})
        facts.update(determinism={"cudnn_deterministic": False, "random_state": "2"})
        rows = [{"step": 1, "time": 5.0, "loss": 1}]
        config = {"lr": 2, "x": {"y": 2}}
        b = self.make_run("exp/b", config=config, metadata=facts, metrics=rows)
        (a / "git.patch").write_text("+one\n", "utf-8")
        (b / "git.patch").write_text("+two\n", "utf-8")
        found = run_utils._comparison(Run(a), Run(b))
        editable = [f"-e git+ssh://git@host/b.git@{n}#egg=b" for n in (2, 3)]
        expected = {
            "config": {"lr": [1, 2]},
            "code": {"is_dirty": [True, False], "git.patch": ["+one\n", "+two\n"]},
            "packages": {
                "numpy": ["1.0", "2.0"],
                "old": ["1", None],
                "a-b": ["git+https://x@1", "git+https://x@2"],
                "b": editable,
                "new": [None, "1"],
            },
            "machine": {
                "hostname": ["one", "two"],
                "version": ["12.1", "12.4"],
                "cudnn_deterministic": [True, False],
            },
            "metrics": {"loss": [None, 1]},
        }
        self.assertEqual(found, expected)
        self.assertEqual(run_utils._comparison(Run(a), Run(a)), {})

    def test_nan_is_the_same_as_nan(self) -> None:
        config = {"x": "NaN", "list": [1, "NaN"], "inf": "Infinity"}
        rows = [{"step": 1, "loss": "NaN"}]
        a, b = (
            Run(self.make_run(f"exp/{name}", config=config, metrics=rows))
            for name in "ab"
        )
        self.assertEqual(run_utils._comparison(a, b), {})

    def test_what_was_not_kept_or_not_recorded_is_not_called_the_same(self) -> None:
        git = {"commit_full": "1a2b3c4", "is_dirty": True}
        a, b = (self.make_run(f"exp/{name}", metadata={"git": git}) for name in "ab")
        found = run_utils._comparison(Run(a), Run(b))["code"]
        self.assertEqual(
            found["uncommitted changes"], ["not kept by a", "not kept by b"]
        )
        c = self.make_run("exp/c", metadata={"pip_freeze": []})
        found = run_utils._comparison(Run(a), Run(c))
        self.assertEqual(found["code"], {"recorded": [True, False]})
        self.assertEqual(found["packages"], {"recorded": [False, True]})

    def differs_now(self) -> dict[str, Any]:
        done = self.command("diff", "latest", "--json")
        self.assertEqual(done.stderr, "")
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    @unittest.skipUnless(GIT, "git is not installed")
    def test_a_dirty_run_is_the_same_as_the_unchanged_tree(self) -> None:
        git = ["git", "-c", "user.name=x", "-c", "user.email=x@example.org"]
        subprocess.run(["git", "init", "-q", "--bare", "far.git"], check=True)
        subprocess.run(["git", "init", "-q", "."], check=True)
        subprocess.run(["git", "remote", "add", "origin", "far.git"], check=True)
        Path(".gitignore").write_text("results\ntrain.py\nfar.git\n")
        push = ["git", "push", "-q", "origin", "HEAD:main"]
        for depth in (0, 1):
            Path("model.py").write_text(f"depth = {depth}\n")
            subprocess.run(["git", "add", "."], check=True)
            subprocess.run([*git, "commit", "-qm", f"depth {depth}"], check=True)
            if depth == 0:
                subprocess.run(push, check=True)
        Path("model.py").write_text("depth = 2\n")
        Path("new.py").write_text("width = 2\n")
        body = """
        import types
        torch = sys.modules["torch"] = types.ModuleType("torch")
        torch.initial_seed = lambda: 7
        torch.version = types.ModuleType("torch.version")
        torch.version.cuda = "12.1"
        with run_context("results/exp", "exp"): pass
        """
        self.script(body)
        self.assertEqual(self.differs_now(), {})
        subprocess.run(push, check=True)  # now the patch could begin at HEAD
        self.assertEqual(self.differs_now(), {})
        Path("model.py").write_text("depth = 3\n")
        self.assertEqual(list(self.differs_now()["code"]), ["git.patch"])
        subprocess.run([*git, "commit", "-qam", "second"], check=True)
        self.assertIn("commit_full", self.differs_now()["code"])

    def test_without_git(self) -> None:
        for folder in ("code", "lib"):
            Path(folder).mkdir()
        Path("lib/model.py").write_text("depth = 2\n")
        body = "import sys; sys.path.append('lib'); import model\n"
        body += "from run_utils import *\nwith run_context('results/exp', 'exp'): pass"
        Path("code/fit.py").write_text(body)
        env = self.environment()
        subprocess.run([PYTHON, "code/fit.py"], env=env, check=True)
        self.assertEqual(self.differs_now().get("code"), None)
        Path("lib/model.py").write_text("depth = 3\n")
        self.assertIn("git.patch", self.differs_now()["code"])


class Pruning(ReadingCase):
    """Runs go to .trash, or for good; who may still be needed stays."""

    def plan(self, **options: Any) -> dict[str, Any]:
        filters = run_utils._Filters(options)
        selection = run_utils._Selection(self.tmp / "results", filters)
        return {run.name: run for run in selection.runs}

    def test_who_must_stay(self) -> None:
        self.make_run("exp/free", metadata={"inputs": []})
        self.make_run("exp/tagged", notes=[{"tags": ["canonical"]}])
        untagged = [{"tags": ["x"]}, {"tags": ["y"], "untag": ["x", "y"]}]
        self.make_run("exp/untagged", notes=untagged)
        self.make_run("exp/noted", notes=[{"text": "why", "tags": []}])
        alive = {
            "status": "running",
            "pid": os.getpid(),
            "hostname": run_utils._hostname(),
        }
        alive["process"] = run_utils._process_identity(os.getpid())
        self.make_run("exp/alive", status=alive)
        self.make_run("exp/unknown", status={"status": "running"})
        lost = {"status": "running", "hostname": "elsewhere", "heartbeat_seconds": 10}
        os.utime(self.make_run("exp/lost", status=lost) / "status.json", (0, 0))
        producer = self.make_run("exp/producer")
        path, own = str(producer), self.tmp / "x"
        entry = run_utils._input("i", path, path, own, "success")
        self.make_run("exp/consumer", metadata={"inputs": [entry]})
        plan = self.plan()
        refusals = {name: run_utils._why_it_stays(plan[name]) for name in plan}
        expected = {"free": None, "untagged": None, "lost": None, "consumer": None}
        expected.update({"tagged": "it is tagged canonical", "noted": "it has a note"})
        expected.update(dict.fromkeys(("alive", "unknown"), "it may be running"))
        expected["producer"] = "consumer used it"
        self.assertEqual(refusals, expected)
        with self.assertRaisesRegex(ValueError, "^noted stays: it has a note$"):
            run_utils._prune(str(self.tmp / "results"), self.plan()["noted"], True)

    def test_moving_and_deleting(self) -> None:
        root = str(self.tmp / "results")
        for _ in range(2):
            self.make_run("exp/a")
            where = run_utils._prune(root, self.plan()["a"], False)
        self.assertEqual(where, f"{root}/.trash/exp/a-2")
        self.assertTrue((self.tmp / "results/.trash/exp/a/status.json").exists())
        self.assertEqual(self.names(), [])
        outside = self.tmp / "kept.txt"
        outside.touch()
        os.symlink(outside, self.make_run("exp/b") / "link")
        plan = self.plan()
        note = {"text": "written meanwhile"}
        (self.tmp / "results/exp/b/notes.jsonl").write_text(json.dumps(note) + "\n")
        with self.assertRaises(ValueError):
            run_utils._prune(root, plan["b"], True)
        (self.tmp / "results/exp/b/notes.jsonl").unlink()
        self.assertIsNone(run_utils._prune(root, plan["b"], True))
        self.assertTrue(outside.exists())
        self.assertEqual(os.listdir(self.tmp / "results/exp"), [])

    def test_what_cannot_go_keeps_nothing_else_from_going(self) -> None:
        folder = self.make_run("exp/a").parent
        self.make_run("exp/b")
        (self.tmp / "results/.trash/exp").mkdir(parents=True)
        rename = os.rename

        def refuse(path: str, place: str) -> None:
            if path.endswith("b"):
                raise OSError(18, "Invalid cross-device link", path)
            rename(path, place)

        err = self.ask("prune", "--older", "2020")[2]
        self.assertEqual(err, f"no such runs below {str(self.tmp / 'results')!r}\n")
        with mock.patch("os.rename", refuse):
            code, out, err = self.ask("prune", "--yes")
        self.assertEqual((code, err), (2, "b stays: Invalid cross-device link\n"))
        self.assertIn("/results/.trash/exp/a\n", out)
        self.assertEqual(os.listdir(folder), ["b"])

    def test_age(self) -> None:
        self.make_run("exp/old")
        self.make_run("exp/new", status={"started": time.time() - 3600})
        self.assertEqual(list(self.plan(older="7d")), ["old"])


class ReadersTrustNothing(ReadingCase):
    """Whatever lies in a results tree: no traceback, no hang, nothing steered."""

    COMMANDS = (
        *("list", "list --json", "list --md", "inspect X", "lineage X", "diff X X"),
        "list --csv --where lr<1 --sort loss --has-outputs --show max(loss)",
        *("list --over seed --sort=-max(loss)", "reindex --dry-run", "prune"),
    )

    def readable(self, *commands: str) -> None:
        for command in commands or self.COMMANDS:
            words = command.replace("X", "results/exp/t-20260101-000000").split()
            with self.subTest(command):
                code, out, err = self.ask(*words)
                self.assertIn(code, (0, 1), err)
                self.assertNotIn("Traceback", err)
                self.assertNotRegex(out, r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]")

    def test_odd_files(self) -> None:
        run = self.make_run("exp/t-20260101-000000", metrics=[{"a": 1}])
        names = ["status.json", "metadata.json", "config.yaml", "notes.jsonl"]
        names += ["metrics/metrics.jsonl", "metrics/summary.json", "inputs.jsonl"]
        commands = ("list --where max(a)>0", "inspect X", "diff X X")
        for name in names:
            path = run / name
            kept = path.read_bytes() if path.exists() else b""
            path.unlink(missing_ok=True)
            os.mkfifo(path)
            self.readable(*commands)
            path.unlink()
            path.mkdir()
            self.readable(*commands)
            path.rmdir()
            for target in (path, "/dev/zero", "/"):
                path.symlink_to(target)
                self.readable(*commands)
                path.unlink()
            with open(path, "wb") as file:
                file.truncate(100_000_000)
            if name != "metrics/metrics.jsonl":
                self.readable("list", "inspect X")
            path.write_bytes(kept)

    @unittest.skipUnless(sys.getfilesystemencoding() == "utf-8", "ASCII names only")
    def test_huge_deep_and_numbered_oddly(self) -> None:
        run = self.make_run("exp/t-20260101-000000", metadata={"config": None})
        for name in ("attempts/²", "attempts/1", "attempts/x"):
            (run / name).mkdir(parents=True)
        self.assertEqual(Run(run)["attempts"], 2)
        path = run / "metadata.json"
        kept = path.read_text("utf-8")
        deep = "[" * 900 + "]" * 900
        path.write_text(f'{{"config": {{"a": {deep}}}, "git": {deep}}}', "utf-8")
        self.readable()
        path.write_text('{"a": [' + "[]," * 6_000_000 + "[]]}", "utf-8")
        self.assertIn("larger than 16000000 bytes", Run(run).problems[0])
        path.write_text(kept, "utf-8")
        merge = "a0: &a0 {x0: 1}\n"
        for n in range(1, 24):
            merge += f"a{n}: &a{n}\n  <<: [*a{n - 1}, *a{n - 1}]\n  x{n}: 1\n"
        bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n"
        for n in range(1, 12):
            bomb += f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n"
        for text in (merge, bomb, "a: " + "[" * 450000, "- " * 400000):
            (run / "config.yaml").write_text(text, "utf-8")
            self.readable("list", "inspect X")

    def test_hostile_contents(self) -> None:
        evil = "\x1b]0;pwned\x07\u202e\x9b31m\r\n| `x` <b>"
        facts: dict[str, Any] = dict.fromkeys(("hostname", "user", "command"), evil)
        facts["inputs"] = [{"path": evil, "run": evil, "run_dir": evil, "status": 3}]
        facts["inputs"] += [
            evil,
            {"path": 3},
            {"path": "x", "run_dir": 7, "relative": {}},
        ]
        facts["git"] = {"commit_short": evil, "branch": [evil], "unpushed": evil}
        facts.update(
            {"parent": [evil], "reproduces": 7, "outputs": [3, {"size": evil}]}
        )
        facts["run_utils"] = {"schema_version": 99}
        facts["changes"] = {"config": {evil: evil, "lr": [1]}}
        facts["pip_freeze"] = [evil, 3, None]
        facts["launcher"] = {"SLURM_JOB_ID": [evil]}
        status = {"status": evil, "exit_reason": [evil], "started_utc": {}, "run": 7}
        status.update({"duration_seconds": evil, "exception": {"traceback": [evil]}})
        status.update({"started": float("nan"), "warnings": evil, "last_output": {}})
        rows: list[Any] = [{"loss": 1e999, "step": evil}]
        rows.append({evil: "x", "loss": True, "big": 10**400})
        notes = [
            {"text": [evil], "tags": evil, "user": {}},
            {"text": evil, "tags": [evil]},
        ]
        more = {"metadata": facts, "status": status, "metrics": rows, "notes": notes}
        self.make_run("exp/t-20260101-000000", config={evil: evil, "deep": {}}, **more)
        encoding = sys.getfilesystemencoding()
        name = evil.replace("/", "").encode(encoding, "ignore").decode(encoding)
        odd = self.tmp / "results" / "exp" / f"t{name}-20260102-000000"
        shutil.copytree(self.tmp / "results/exp/t-20260101-000000", odd)
        self.readable()

    def test_one_line_counts_what_cannot_be_read(self) -> None:
        run = self.make_run("exp/t-20260101-000000")
        (run / "status.json").write_bytes(b"{")
        (run / "metadata.json").write_bytes(b"[1]")
        paths = [str(run / name) for name in ("metadata.json", "status.json")]
        problems = [f"{path!r} is not a JSON object that can be read" for path in paths]
        self.assertEqual(Run(run).problems, problems)
        self.assertEqual(Run(run)["status"], "?")
        (run / "notes.jsonl").symlink_to("status.json")
        self.assertIn("notes.jsonl' cannot be read: it is a link", Run(run).problems[1])


# === Showing ===


class WhatIsEscaped(unittest.TestCase):
    """What could steer a terminal or hide text is escaped, and nothing else is."""

    def test_controls_and_what_is_not_seen(self) -> None:
        hidden = "\0 \t \n \r \x1b \x7f \x80 \x9b \xad \u034f \u061c \u115f \u1160"
        hidden += " \u17b4 \u180b \u180e \u200b \u200d \u200f \u2028 \u202e \u2060"
        hidden += " \u2066 \u2069 \u206f \u2800 \u3164 \ufe00 \ufe0f \ufeff \uffa0"
        hidden += " \ufff9 \uffff \ud800"
        hidden += " \U0001d173 \U000e0000 \U000e0001 \U000e007f \U000e0100 \U000e01ef"
        hidden += " \ue000 \U0010ffff"
        for letter in hidden.split(" "):
            with self.subTest(ascii(letter)):
                shown = run_utils._visible_text(f"a{letter}b")
                self.assertEqual(shown, f"a{ascii(letter)[1:-1]}b")

    def test_languages_stay(self) -> None:
        text = "Grüße, привет, 你好　世界, مرحبا, नमस्ते, 한국어, ☃ 🎉 5\xa0% C:\\n"
        self.assertEqual(run_utils._visible_text(text), text)

    def test_an_encoding_without_these_letters(self) -> None:
        output = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
        with contextlib.redirect_stdout(output):
            self.assertEqual(run_utils._printable("ü☃"), "\\xfc\\u2603")
            self.assertEqual(run_utils._sparkline([1, 2]), "_#")
            self.assertEqual(run_utils._cut("abcdef", 5), "ab...")
            output.detach()


class Amounts(unittest.TestCase):
    """Times, sizes and counts are short, and rounded once."""

    def test_durations(self) -> None:
        for seconds, expected in (
            (-1, "0s"), (0, "0s"), (0.25, "0.25s"), (9.94, "9.9s"), (9.96, "10s"),
            (59.4, "59s"), (59.6, "1m00s"), (60, "1m00s"), (119.7, "2m00s"),
            (3599.4, "59m59s"), (3599.6, "1h00m"), (7170, "2h00m"), (7500, "2h05m"),
            (86_399, "1d00h"), (5 * 86_400 + 3 * 3600, "5d03h"),
            (7 * 86_400 - 1, "7d00h"), (1e13, "?"), (float("nan"), "?"), ("x", "?"),
            (None, "?"),
        ):  # fmt: skip
            with self.subTest(seconds):
                self.assertEqual(run_utils._format_seconds(seconds), expected)

    def test_sizes(self) -> None:
        for size, expected in (
            (0, "0 B"), (999, "999 B"), (999.6, "1 kB"), (1000, "1 kB"),
            (2050, "2.05 kB"), (999_600, "1 MB"), (1.5e9, "1.5 GB"), (2e12, "2 TB"),
            (5e15, "5000 TB"),
        ):  # fmt: skip
            with self.subTest(size):
                self.assertEqual(run_utils._format_size(size), expected)

    def test_counts(self) -> None:
        count = run_utils._format_count
        self.assertEqual(count(1, "commit", "not pushed"), "1 commit not pushed")
        self.assertEqual((count(2, "file"), count(0, "file")), ("2 files", ""))
        paths = run_utils._format_paths
        self.assertEqual(paths("abc"), "a, b, c")
        self.assertEqual(paths("abcde"), "a, b, c and 2 more")


class InUnicode(unittest.TestCase):
    """What is printed can hold every letter, whatever the locale of the tests."""

    def setUp(self) -> None:
        patched = mock.patch.object(sys, "stdout", io.StringIO())
        patched.start()
        self.addCleanup(patched.stop)


class Sparklines(InUnicode):
    """A curve is drawn whatever numbers are in it."""

    def test_curves(self) -> None:
        nan, inf = float("nan"), float("inf")
        for values, expected in (
            ([1, 2, 3], "▁▄█"), ([3, 1], "█▁"), ([5, 5], "▁▁"), ([1], ""),
            ([nan, 1, 2], "x▁█"), ([inf, 1, -inf, 2], "x▁x█"), ([nan, inf], "xx"),
            ([-1.7e308, 1.7e308], "▁█"), ([0, 5e-324], "▁▁"),
        ):  # fmt: skip
            with self.subTest(values):
                self.assertEqual(run_utils._sparkline(values), expected)

    def test_many_values_are_sampled_up_to_the_last(self) -> None:
        line = run_utils._sparkline([float(n) for n in range(1000)])
        self.assertEqual((len(line), line[0], line[-1]), (24, "▁", "█"))


class NamesOfRuns(InUnicode):
    """A name is shortened so that it still says which run is meant."""

    def test_the_commit_goes_first_the_time_stays(self) -> None:
        name = "probe/train-20260131-142501-1a2b3c4"
        for width, expected in (
            (40, name), (35, name), (30, "probe/train-20260131-142501"),
            (27, "probe/train-20260131-142501"), (24, "probe/train-…0131-142501"),
            (18, "probe/…0131-142501"), (11, "0131-142501"), (6, "142501"),
        ):  # fmt: skip
            with self.subTest(width):
                shown = run_utils._short_name(name, width)
                self.assertEqual(shown.rstrip(), expected)
                self.assertEqual(run_utils._width(shown), width)

    def test_runs_of_one_second_stay_apart(self) -> None:
        name = "train-20260131-142501-1a2b3c4-2"
        self.assertEqual(run_utils._short_name(name, 24), "train-20260131-142501…-2")
        self.assertEqual(run_utils._short_name(name, 20), "train…0131-142501…-2")

    def test_the_folder_goes_where_it_tells_no_two_runs_apart(self) -> None:
        names = ["run", "probe/vit-20260131-142501-1a2b3c4", "b/eval-20260131-142501"]
        short = [name.rstrip() for name in run_utils._short_names(names, 24)]
        self.assertEqual(short, ["run", "vit-20260131-142501", "eval-20260131-142501"])
        short = [name.rstrip() for name in run_utils._short_names(names, 25)]
        self.assertEqual(short[1:], ["probe/vit-20260131-142501", names[2]])
        short = run_utils._short_names([*names, "c/eval-20260131-142501"], 22)
        self.assertEqual(short[3], "c/eval-20260131-142501")

    def test_other_names_lose_their_middle(self) -> None:
        shown = run_utils._short_name("a-very-long-name-of-a-run", 12)
        self.assertEqual(shown, "a-ver…-a-run")
        for width in range(1, 30):
            for name in ("表" * 20, "x" * 40, f"{'表' * 9}-20260131-142501"):
                shown = run_utils._short_name(name, width)
                self.assertEqual(run_utils._width(shown), width, (name, width))


class WhatHasRoom(unittest.TestCase):
    """On a narrow terminal names are shortened first, then what matters least goes."""

    def widths(self, room: int, *columns: Any) -> list[int]:
        """Return the widths of these (heading, text, rank), 0 for one left out."""
        made = [run_utils._Column(h, [text], rank=rank) for h, text, rank in columns]
        widths = run_utils._shortened_widths(made, room)
        return [widths.get(column, 0) for column in made]

    def test_the_name_before_other_texts(self) -> None:
        columns = ("run", "n" * 40, 0), ("model", "m" * 30, 0)
        self.assertEqual(self.widths(62, *columns), [30, 30])
        self.assertEqual(self.widths(40, *columns), [24, 14])
        self.assertEqual(self.widths(20, *columns), [18, 12])

    def test_the_last_of_the_least_important(self) -> None:
        columns = ("run", "n" * 40, 0), ("a", 1.25, 4), ("b", 1.25, 1), ("c", 1.25, 4)
        self.assertEqual(self.widths(42, *columns), [24, 4, 4, 4])
        self.assertEqual(self.widths(40, *columns), [28, 4, 4, 0])
        self.assertEqual(self.widths(30, *columns), [24, 0, 4, 0])

    def test_numbers_are_never_cut_but_their_heading_is(self) -> None:
        self.assertEqual(self.widths(9, ("a_long_metric", 0.123456, 1)), [0])
        self.assertEqual(self.widths(9, ("a_long_metric", 0.123456, 0)), [9])
        self.assertEqual(self.widths(5, ("a_long_metric", 0.123456, 0)), [8])

    def test_the_name_and_the_headings_of_what_was_asked_for(self) -> None:
        columns = ("run", "n" * 40, 0), ("max(val/loss)", 0.25, 0), ("lr", 0.125, 0)
        self.assertEqual(self.widths(46, *columns), [24, 13, 5])
        self.assertEqual(self.widths(40, *columns), [18, 13, 5])
        self.assertEqual(self.widths(31, *columns), [18, 4, 5])


class ForSpreadsheets(InUnicode):
    """Numbers stay numbers, and no text becomes a formula."""

    def test_cells(self) -> None:
        same = [-1.5, 3, 0, "-1.5", "+1e-3", ".5", "a=1", "x-1", "", "lr", "1a2b3c4"]
        for value in same:
            self.assertEqual(run_utils._csv_cell(value), value)
        for text in (
            "=cmd()", "+1+1", "-1+cmd|' /C calc'!A0", "@SUM(1)", "-x", "--lr", "+",
            " =1", "\uff1d1+1", "\uff20x", "-1e5x", "-٣",
        ):  # fmt: skip
            self.assertEqual(run_utils._csv_cell(text), f"'{text}")
        self.assertEqual(run_utils._csv_cell("\t=1"), "\\t=1")
        self.assertEqual(run_utils._csv_cell(None), "")
        self.assertEqual(run_utils._csv_cell(True), "true")


class ForPages(unittest.TestCase):
    """Markdown, HTML, Mermaid and DOT find nothing in a text but text."""

    def test_markdown(self) -> None:
        for text in ("train 0.5", "a-b/c.pt (2.05 kB)", "-1e-05", "50% + x, y"):
            self.assertEqual(run_utils._markdown(text), text)
        for text in (
            "https://x.org", "www.x.org", "@ann", "a@b.org", "#12", "$x^2$", "*x*",
            "a_b_", "<b>", "[x](y)", "![x](y)", "~x~", ":tada:", "1a2b3c4", "GH-12",
            "&amp;", "x<!--",
        ):  # fmt: skip
            self.assertEqual(run_utils._markdown(text), f"`{text}`")
        for text, expected in (
            ("a|b", "<code>a&#124;b</code>"), ("`x`", "<code>&#96;x&#96;</code>"),
            ("\\|", "<code>&#92;&#124;</code>"), ("a\nb", "<code>a&#92;nb</code>"),
        ):  # fmt: skip
            self.assertEqual(run_utils._markdown(text), expected)

    def test_html(self) -> None:
        text = "<b a='1' c=\"2\">&\u202e"
        shown = run_utils._html(text)
        self.assertEqual(shown, "&lt;b a=&#39;1&#39; c=&quot;2&quot;&gt;&amp;\\u202e")
        column = run_utils._Column("<i>", [1, None], ["<b>", "x"])
        rows = "<tr><th>&lt;i&gt;</th></tr>\n<tr><td>&lt;b&gt;</td></tr>\n"
        rows += "<tr><td>x</td></tr>"
        self.assertEqual(run_utils._html_table([column]), f"<table>\n{rows}\n</table>")

    def test_graphs(self) -> None:
        odd = run_utils._format_graph("mermaid", [Path('x"]|<b>;')], [])
        label = '  n0["x#34;#93;#124;#60;b#62;#59;"]'
        self.assertEqual(list(odd)[1], label)
        run, other = Path("%%{init: {}}%%"), Path("b")
        edges = [(run, other, "%%{")]
        lines = list(run_utils._format_graph("mermaid", [run, other], edges))
        self.assertNotIn("%%", "".join(lines))
        self.assertEqual(lines[3], '  n0 -->|"#37;#37;#123;"| n1')
        odd = run_utils._format_graph("dot", [Path('x"\\')], [])
        self.assertEqual(list(odd)[1], '  n0 [label="x\\"\\\\"];')


class WhatARunTook(unittest.TestCase):
    """What a run took is a line or two that a person reads."""

    def test_resources(self) -> None:
        facts = {
            "samples": 9, "cpu_percent_mean": 42.3, "cpu_percent_peak": 99.0,
            "memory_bytes_peak": 1_234_567_890, "memory_source": "proportional",
            "gpus": [{"index": "0", "utilization_percent_mean": 87}, {"index": "1"}],
        }  # fmt: skip
        cpu = "processor 42 % mean, 99 % peak; memory 1.23 GB peak (proportional)"
        shown = run_utils._format_resources(facts)
        self.assertEqual(shown, [cpu, "GPU 0 87 % mean"])
        self.assertEqual(run_utils._format_resources({**facts, "samples": 1}), [])
        for odd in ({}, {"samples": 3}, {"samples": 3, "gpus": [1], "cpu": "x"}):
            self.assertEqual(run_utils._format_resources(odd), [])


class WhatCodeRan(unittest.TestCase):
    """One line says which commit ran, and what it lacked."""

    def test_all_that_is_known(self) -> None:
        git: dict[str, Any] = {"commit_short": "1a2b3c4", "branch": "main"}
        self.assertEqual(run_utils._format_code(git), "1a2b3c4 on main")
        git.update(is_dirty=True, unpushed=2, remote_origin_url="host:x.git")
        git["patch"] = {"file": "git.patch", "left_out_count": 3}
        expected = "1a2b3c4 on main, uncommitted changes, 2 commits not pushed, "
        expected += "kept in git.patch, 3 files not kept, host:x.git"
        self.assertEqual(run_utils._format_code(git), expected)
        self.assertEqual(run_utils._format_code({}), "no commit known")


class LongDifferences(unittest.TestCase):
    """Of two texts the lines that differ are shown, and long ones end soon."""

    def test_the_first_lines_and_how_many_more(self) -> None:
        found = run_utils._format_change("git.patch", "a\nb\nc\n", "a\nB\nc\n")
        lines = ["@@ -1,3 +1,3 @@", " a", "-b", "+B", " c"]
        self.assertEqual(found, ["git.patch:", *(f"  {line}" for line in lines)])
        found = run_utils._format_change("x", "a\n" * 60, "b\n" * 60)
        self.assertEqual((len(found), found[-1]), (42, "  ... 81 more lines"))

    def test_of_patches_only_the_files_that_differ(self) -> None:
        parts = [f"diff --git a/{n} b/{n}\n" + f"+{n}\n" * 3000 for n in "abc"]
        other = "diff --git a/b b/b\n+B\n"
        found = run_utils._format_change("x", "".join(parts[::2]), other + parts[2])
        self.assertEqual(found[-1], "  ... only 2000 lines were compared")
        found = run_utils._format_change("x", parts[0] + other, parts[0])
        self.assertEqual(found[2:], ["  -diff --git a/b b/b", "  -+B"])

    def test_a_text_that_is_cut_is_not_said_to_end_there(self) -> None:
        lines = [f"{n}\n" for n in range(3000)]
        longer = ["new\n", *lines]
        found = run_utils._format_change("x", "".join(lines), "".join(longer))
        self.assertEqual(found[1:-1], ["  @@ -1 +1,2 @@", "  +new", "   0"])

    def test_texts_that_difflib_would_take_minutes_for(self) -> None:
        then = "".join(f"{n}\n" for n in range(100_000))
        now = "".join(f"{n}\n" for n in range(100_000, 0, -1))
        found = run_utils._format_change("x", then, now)
        self.assertEqual(found[-1], "  ... only 2000 lines were compared")

    def test_single_values(self) -> None:
        change = run_utils._format_change
        self.assertEqual(change("lr", None, 0.1), ["lr: none -> 0.1"])
        self.assertEqual(change("x", "a" * 900, "b"), [f"x: {'a' * 500} -> b"])


class HowFarItIs(ReadingCase):
    """What takes longer than two seconds says so on a terminal, and nowhere else."""

    def lines(self, is_terminal: bool, seconds: float) -> str:
        output = io.StringIO()
        output.isatty = lambda: is_terminal  # type: ignore[method-assign]
        with mock.patch.object(run_utils, "PROGRESS_SECONDS", seconds):
            with contextlib.redirect_stderr(output):
                items = run_utils._with_progress([1, 2, 3], "reading runs")
                self.assertEqual(list(items), [1, 2, 3])
        return output.getvalue()

    def test_a_line_that_disappears(self) -> None:
        line = "reading runs: 1 of 3"
        self.assertEqual(self.lines(True, -1), f"\r{line}\r{' ' * len(line)}\r")

    def test_a_long_list_says_so_too(self) -> None:
        for name in ("a", "b"):
            self.make_run(f"e/{name}", config={"seed": name})
        output = io.StringIO()
        output.isatty = lambda: True  # type: ignore[method-assign]
        with mock.patch.object(run_utils, "PROGRESS_SECONDS", -1):
            with contextlib.redirect_stderr(output), contextlib.redirect_stdout(None):
                run_utils.main(["list", "results", "--over", "seed"])
        for what in ("looking at runs: 1 of 2", "reading runs: 1 of 2"):
            self.assertIn(what, output.getvalue())
        self.assertIn("comparing runs: 1 of 1", output.getvalue())

    def test_nothing_where_it_is_quick_or_nobody_looks(self) -> None:
        self.assertEqual(self.lines(True, 60), "")
        self.assertEqual(self.lines(False, -1), "")


# === Report ===
# The page is read as a browser without scripts reads it; .ci/check_report.py has one.


class Parsed(html.parser.HTMLParser):
    """The tags, attributes and texts of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.words: list[str] = []
        self.inside = ""
        self.sources: dict[str, str] = {}
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag in ("script", "style"):
            self.inside = dict(attrs).get("id") or tag

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.sources[self.inside] = data
        elif data.strip():
            self.words.append(data.strip())

    @property
    def text(self) -> str:
        return "\n".join(self.words)

    def values(self, name: str) -> list[str]:
        return [value for key, value in self.attributes if key == name]


class ReportCase(RunCase):
    """Runs written by hand, and the page of them."""

    def make(
        self,
        name: str,
        config: dict[str, Any] | None = None,
        rows: Any = (),
        files: dict[str, bytes] | None = None,
        **status: Any,
    ) -> Path:
        run = self.tmp / "results" / "probe" / name
        (run / "metrics").mkdir(parents=True)
        facts = {"status": "success", "started_utc": "2026-01-31T14:25:01Z", **status}
        (run / "status.json").write_text(json.dumps(facts), "utf-8")
        metadata = {"config": config or {}, "argv": ["train.py", "--fast"]}
        (run / "metadata.json").write_text(json.dumps(metadata), "utf-8")
        lines = "".join(f"{json.dumps(row)}\n" for row in rows)
        (run / "metrics" / "metrics.jsonl").write_text(lines, "utf-8")
        for path, data in (files or {}).items():
            (run / path).parent.mkdir(exist_ok=True)
            (run / path).write_bytes(data)
        return run

    def report(self, *words: str, settings: str = "", **options: Any) -> Parsed:
        body = f"import run_utils\n{settings}\nsys.exit(main(sys.argv[1:]))"
        done = self.script(body, "report", *words, **options)
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        return Parsed((self.tmp / "report.html").read_text("utf-8"))

    def curves(self, page: Parsed) -> Any:
        """Return what the script reads, with steps, values and spreads as numbers."""

        plots = json.loads(page.sources["curves"])
        for plot in plots:
            for curve in plot["curves"]:
                curve[1] = list(itertools.accumulate(curve[1]))
                for place in (2, 3):
                    data = base64.b64decode(curve[place])
                    curve[place] = list(array.array("d", data))
        return plots


class TheReport(ReportCase):
    """The page says what was selected, which run is best, and what differs."""

    def test_a_folder_without_runs_gives_a_page_that_says_so(self) -> None:
        (self.tmp / "results").mkdir()
        page = self.report()
        self.assertIn("There is nothing to show.", page.text)
        self.assertNotIn("table", page.tags)

    def test_best_run_comes_first_and_every_run_is_a_row(self) -> None:
        losses: list[list[float]] = [[3, 1, 2], [9, 0.5, 8], [7]]
        for number, values in enumerate(losses):
            rows = [{"loss": value, "step": 10 * n} for n, value in enumerate(values)]
            self.make(f"run-{number}", {"lr": number, "same": "x"}, rows)
        self.make("run-3", {"lr": 3, "same": "x"}, status="failed")
        page = self.report("--metric", "min(loss)")
        self.assertIn("0.5\nmin(loss) at step 10\nrun-1\nlr=1", page.text)
        self.assertIn("\n4 runs\n", page.text)
        self.assertIn("3\nsuccess\n1\nfailed", page.text)
        self.assertIn("lr\n0, 1, 2, 3", page.text)
        self.assertNotIn("same", page.text)
        self.assertEqual(page.tags.count("tr"), 5)
        words = ("--metric", "max(metrics.loss)", "--where", "lr>0", "-n", "9")
        last = self.report(*words)
        self.assertIn("9\nmax(metrics.loss) at step 0\nrun-1", last.text)
        self.assertIn("\n3 runs: where lr>0, limit 9\n", last.text)

    def test_what_differs(self) -> None:
        for number in range(3):
            path = f"results/exp/train-20260131-14250{number}-1a2b3c4/artifacts/m.pt"
            config = {"checkpoint": path, "fail": "x" * number, "size": 2**number}
            self.make(f"run-{number}", config)
        text = self.report().text
        self.assertIn("checkpoint\n3 values\n", text)
        self.assertIn('fail\n"", x, xx\n', text)
        self.assertNotIn("commits", text)  # there is one

    def test_nothing_differs(self) -> None:
        self.make("run-a", {"lr": 1})
        self.assertNotIn("What differs", self.report().text)

    def test_without_a_metric_nothing_is_ranked(self) -> None:
        self.make("run-a", rows=[{"loss": 1}, {"loss": 2}])
        page = self.report()
        self.assertIn("Nothing is ranked: no metric was chosen.", page.text)

    def test_mistakes_are_one_sentence_and_leave_no_page(self) -> None:
        self.make("run-a", rows=[{"loss": 1}])
        cases = {
            ("--metric", "loss"): "metric 'loss' does not say what is best; "
            "write 'max(loss)' or 'min(loss)'",
            ("--metric", "max(acc)"): "no run has the metric 'acc'",
            ("-o", "results"): "'results' is a folder; give -o the name of a file",
            ("-o", "no/x.html"): "'no/x.html': there is no such folder; make it first",
        }
        for words, sentence in cases.items():
            done = self.command("report", *words)
            self.assertEqual((done.returncode, done.stdout), (2, ""))
            self.assertIn(sentence, done.stderr)
        self.assertFalse((self.tmp / "report.html").exists())

    def test_same_runs_give_the_same_bytes(self) -> None:
        self.make("run-a", {"name": "é", "tags": ["b", "a"]}, [{"loss": 1}] * 3)
        rows = [{"loss": 2}] * 3
        self.make("run-b", {"name": "f"}, rows, status="running", heartbeat_seconds=9)
        pages = []
        for seed, encoding in (("1", "ascii"), ("2", "utf-8")):
            env = {"PYTHONHASHSEED": seed, "PYTHONIOENCODING": encoding}
            self.report("--metric", "min(loss)", env=env)
            pages.append((self.tmp / "report.html").read_bytes())
        self.assertEqual(*pages)
        source = pages[0].decode()
        self.assertEqual(source.count(">2026-01-31 14:25<"), 2)
        self.assertIn(">running<", source)
        self.assertEqual(source.count("data-value="), 2)  # no time, only outputs

    def test_cells_say_what_they_are_sorted_by(self) -> None:
        self.make("run-a", duration_seconds=3725)
        self.assertEqual(self.report().values("data-value")[:1], ["3725"])

    def test_what_cannot_be_read_is_told(self) -> None:
        run = self.make("run-a")
        (run / "metadata.json").write_text("{", "utf-8")
        page = self.report()
        self.assertIn("1 file cannot be read: ", page.text)

    def test_only_the_best_are_drawn_and_the_page_says_so(self) -> None:
        for number in range(5):
            rows = [{"loss": number, "acc": 1}, {"loss": number, "acc": 1}]
            self.make(f"run-{number}", {"lr": number}, rows)
        settings = "run_utils.REPORT_RUNS = 2; run_utils.REPORT_PLOTS = 1"
        page = self.report("--metric", "max(loss)", settings=settings)
        self.assertEqual(page.tags.count("tr"), 6)
        self.assertEqual(len(self.curves(page)), 1)
        self.assertEqual(len(self.curves(page)[0]["curves"]), 2)
        self.assertIn("Only the first 2 of 5 runs, in the order of the", page.text)
        self.assertIn("Of 2 metrics the first 1 have a plot.", page.text)
        self.assertIn("run-4", page.words[page.words.index("Run by run") + 1])


class NothingOnAPageActs(ReportCase):
    """No text of a run is markup, no secret is shown, and nothing is fetched."""

    HOSTILE = "</script><img src=x onerror=alert(1)>\u202e'\"&{x}"

    def test_hostile_texts_stay_texts(self) -> None:
        text = self.HOSTILE
        rows = [{text[:40]: 1.0, "step": 1}, {text[:40]: 2.0, "step": 2}]
        error = {"type": text, "message": text * 500, "traceback": text}
        for number in range(3):
            run = self.make(
                f"run-{number}<b>", {text: str(number) + "x" * 9_000}, rows,
                {"plots/<i>'\".png": b"x", "plots/javascript:a.png": b"x"},
                status="failed", exception=error,
            )  # fmt: skip
            note = {"text": text, "tags": [text], "timestamp_utc": text}
            (run / "notes.jsonl").write_text(json.dumps(note), "utf-8")
        page = self.report("--contains", "<b>")
        source = (self.tmp / "report.html").read_text("utf-8")
        self.assertNotIn("x" * 400, source)
        self.assertIn(text[:20], page.text)
        self.assertNotIn("\u202e", page.text)
        self.assertEqual(page.tags.count("script"), 2)
        self.assertNotIn("img", page.tags)
        self.assertEqual(page.tags.count("b"), 1)
        self.assertFalse([n for n, _ in page.attributes if n.startswith("on")])
        self.assertNotIn("style", dict(page.attributes))
        links = [v for v in page.values("href") + page.values("src") if v[0] != "#"]
        self.assertTrue(links)
        for link in links:
            self.assertRegex(link, r"\Aresults/probe/run-\d%3Cb%3E(/[\w%./]*)?\Z")

    def test_policy_allows_this_script_and_nothing_else(self) -> None:
        self.make("run-a")
        page = self.report("--embed")
        policy = next(text for text in page.values("content") if "default-src" in text)
        for kind in ("script", "style"):
            digest = hashlib.sha256(page.sources[kind].encode()).digest()
            name = f"{kind}-src 'sha256-{base64.b64encode(digest).decode()}'"
            self.assertIn(name, policy)
        self.assertTrue(policy.startswith("default-src 'none'; "))
        self.assertIn("base-uri 'none'; form-action 'none'", policy)
        source = (self.tmp / "report.html").read_text("utf-8")
        self.assertNotRegex(source, r"(?i)https?:|url\(|@import|//\w+\.\w|fetch|eval")
        self.assertLess(len(page.sources["script"] + page.sources["style"]), 60_000)

    def test_secrets_are_redacted_once_more(self) -> None:
        token = "ghp_" + "A1b2" * 9
        self.make("run-a", {"where": token}, files={"logs/stderr.log": token.encode()})
        run = self.make("run-b", {"where": "there"})
        (run / "notes.jsonl").write_text(json.dumps({"text": token}), "utf-8")
        page = self.report()
        self.assertNotIn(token, (self.tmp / "report.html").read_text("utf-8"))
        self.assertIn("REDACTED", page.text)


class LinesOfAReport(ReportCase):
    """A line has a colour and a label."""

    def test_more_runs_than_colours_and_a_key_that_one_lacks(self) -> None:
        rows = [{"loss": 1.0}, {"loss": 0.5}]
        for number, config in enumerate(({}, {"lr": 1}, {"lr": 2}, {"lr": 3})):
            self.make(f"run-{number}", config, rows)
        page = self.report(settings="run_utils.REPORT_COLOURS = 1")
        for number in range(4):
            self.assertIn(f"swatch r{2 * number}", page.values("class"))
        self.assertNotIn("swatch c0 d0", page.values("class"))
        self.assertEqual(page.text.count("lr="), 3)


class CurvesOfAReport(ReportCase):
    """A curve has the exact points, or of many the extremes of equal stretches."""

    def test_points_are_exact_and_in_the_order_of_steps(self) -> None:
        rows = [
            {"loss": 0.123456789, "step": 5},
            {"loss": "NaN", "step": 6},
            {"loss": 4, "step": 1},
            {"loss": 1e-7, "step": 5},
            {"acc": 0.5},
            {"loss": True, "step": 9},
        ]
        self.make("run-a", rows=rows)
        (plot,) = self.curves(self.report())
        self.assertEqual(plot["curves"], [[0, [1, 5], [4, 1e-7], []]])
        self.assertEqual(plot["x"], [1, 5])
        self.assertIsNotNone(plot["log"])

    def test_of_long_curves_the_extremes_stay(self) -> None:
        rows = [{"loss": 1 + n % 2, "step": n} for n in range(2000)]
        rows[0]["loss"] = 1.5
        rows[777]["loss"] = 50
        rows[1234]["loss"] = -50
        self.make("run-a", rows=rows)
        self.make("run-b", rows=rows[:100])
        page = self.report()
        curves = {len(c[1]): c for c in self.curves(page)[0]["curves"]}
        short, long = min(curves), max(curves)
        self.assertEqual(short, 100)
        self.assertTrue(250 < long <= 300, long)
        points = dict(zip(*curves[long][1:3]))
        self.assertEqual((points[777], points[1234]), (50, -50))
        self.assertEqual((min(points), max(points)), (0, 1999))
        self.assertIn("Curves have at most 300 points", page.text)

    def test_few_points_of_a_curve_are_no_teeth_of_a_saw(self) -> None:
        rows = [{"loss": 4000 - 2 * n + n * 300 % 700, "step": n} for n in range(2000)]
        rows[777]["loss"] = -50
        self.make("run-a", rows=rows)
        page = self.report(settings="run_utils.REPORT_POINTS = 40")
        ((_, steps, values, _),) = self.curves(page)[0]["curves"]
        self.assertTrue(30 < len(steps) <= 40, len(steps))
        self.assertEqual((min(steps), max(steps)), (0, 1999))
        points = dict(zip(steps, values))
        self.assertEqual((min(values), points[777]), (-50, -50))
        self.assertEqual(max(values), max(row["loss"] for row in rows))
        self.assertEqual({rows[n]["loss"] for n in points}, {*values})
        smooth = [value for value in values[2:-1] if value != -50]
        self.assertLess(max(b - a for a, b in zip(smooth, smooth[1:])), 100)
        self.assertIn("at most 40 points: the middle value of each", page.text)

    def test_marks_that_look_alike_say_their_number_once(self) -> None:
        rows = [{"big": 1e12 + n, "step": n} for n in range(9)]
        self.make("run-a", rows=rows)
        self.assertEqual(self.report().words.count("1e12"), 1)

    def test_runs_that_no_seed_repeats_are_no_mean(self) -> None:
        for seed in range(2):
            self.make(f"run-{seed}", {"seed": seed, "lr": seed}, [{"loss": 1}] * 2)
        self.assertNotIn("standard deviation", self.report().text)

    def test_steps_are_no_result_to_compare(self) -> None:
        for lr in range(3):
            rows = [{"step": n, "loss": lr} for n in range(lr + 2)]
            self.make(f"run-{lr}", {"lr": lr}, rows)
        words = self.report().words
        start = words.index("What varied, run by run")
        axes = words[start : words.index("Run by run")]
        self.assertIn("loss", axes)
        self.assertNotIn("step", axes)

    def test_marks_of_parallel_coordinates_do_not_lie_on_each_other(self) -> None:
        for number, value in enumerate([0.5, 0.5001, 0.9]):
            self.make(f"run-{number}", {"lr": number, "width": value})
        words = self.report().words
        axes = words[words.index("What varied, run by run") : words.index("Run by run")]
        self.assertEqual(axes[1:], ["lr", "0", "1", "2", "width", "0.5", "0.9"])

    def test_seeds_are_one_band(self) -> None:
        for seed in range(3):
            for lr in (1, 2):
                rows = [{"loss": lr + seed * step, "step": step} for step in (0, 1)]
                self.make(f"run-{lr}-{seed}", {"seed": seed, "lr": lr}, rows)
        page = self.report()
        curves = self.curves(page)[0]["curves"]
        self.assertEqual([curve[1:] for curve in curves if curve[2][0] == 1],
                         [[[0, 1], [1, 2], [0, 1]]])  # fmt: skip
        self.assertEqual(len(curves), 2)
        self.assertIn("lr=1 n=3", page.text)
        self.assertIn("mean ± standard deviation over seed", page.text)
        apart = self.report("--over", "none")
        self.assertEqual(len(self.curves(apart)[0]["curves"]), 6)

    def test_seeds_that_log_at_other_steps_make_no_saw_tooth(self) -> None:
        for seed in (0, 1):  # one falls from 20 to 0, the other from 10 to -10
            steps = range(5 * seed, 100, 10)
            rows = [{"loss": 20 - 10 * seed - step / 5, "step": step} for step in steps]
            self.make(f"run-{seed}", {"seed": seed}, rows)
        (curve,) = self.curves(self.report())[0]["curves"]
        self.assertEqual(curve[1], list(range(0, 100, 5)))
        inside = [(step, value) for step, value, _ in zip(*curve[1:]) if 5 <= step < 91]
        for step, value in inside:
            self.assertAlmostEqual(value, 15 - step / 5, places=5)
        self.assertGreater(min(curve[3][1:-1]), 0)  # a spread of two everywhere

    def test_the_legend_has_only_what_is_drawn(self) -> None:
        self.make("run-a", {"lr": 1, "fail": ""}, [{"loss": 1}] * 2)
        self.make("run-b", {"lr": 2, "fail": "exit"})
        page = self.report()
        self.assertEqual(page.words.count('lr=1 fail=""'), 2)  # and in its details
        self.assertEqual(page.words.count("lr=2 fail=exit"), 1)

    def test_a_run_has_one_colour_everywhere(self) -> None:
        for number in range(3):
            rows = [{"a": number, "b": number}] * 2
            self.make(f"run-{number}", {"lr": number}, rows)
        self.report()
        page = (self.tmp / "report.html").read_text("utf-8")
        colours: set[str] = set()
        for number in range(3):
            groups = re.findall(rf'<g data-line="{number}" class="([^"]+)">', page)
            row = re.findall(rf'<tr data-line="{number}">.*?swatch ([^"]+)"', page)
            self.assertEqual(len(groups), 3)  # two plots, and parallel coordinates
            self.assertEqual({*groups}, {*row})
            colours.update(groups)
        self.assertEqual(len(colours), 3)


class PartsOfAReport(ReportCase):
    """Images and details of each run, within limits that the page tells."""

    def test_images_are_links_or_inside(self) -> None:
        files = {f"samples/grid_{n:04}.png": b"png%d" % n for n in (1, 20)}
        files.update({"plots/a b.svg": b"<svg/>", "plots/c.txt": b""})
        self.make("run-a", files=files)
        page = self.report()
        names = ("plots/a%20b.svg", "samples/grid_0001.png", "samples/grid_0020.png")
        for name in names:
            self.assertIn(f"results/probe/run-a/{name}", page.values("href"))
        self.assertEqual(page.values("src"), [])
        self.assertIn("samples/grid_*.png", page.text)
        inside = self.report("--embed").values("src")
        data = base64.b64encode(b"png20").decode()
        self.assertIn(f"data:image/png;base64,{data}", inside)
        settings = "run_utils.REPORT_IMAGES = 1; run_utils.REPORT_EMBED_BYTES = 2"
        few = self.report("--embed", settings=settings)
        self.assertEqual(few.values("src"), [])
        self.assertIn("Of 3 images the first 1 are shown.", few.text)
        self.assertEqual(sum("/samples/" in link for link in few.values("href")), 0)

    def test_details_say_why_and_how(self) -> None:
        lines = "Traceback\n  File a\nValueError: bad lr\n"
        error = {"type": "ValueError", "message": "bad lr", "traceback": lines}
        self.make("run-a", {"lr": 1}, [{"loss": 1}, {"loss": 2}])
        self.make(
            "run-b", {"lr": 2}, [{"loss": 2}], {"logs/stdout.log": b"one\ntwo\n"},
            status="failed", exit_reason="exception", exit_code=1, exception=error,
        )  # fmt: skip
        page = self.report("--metric", "min(loss)")
        for text in (
            "failed (exception), exit code 1",
            "ValueError: bad lr\n",
            "  File a\n",
            "train.py --fast",
            "lr=2, best: 1",
            "loss: 2 (lowest 1, highest 2)",
            "one\ntwo",
            "logs/stdout.log",
        ):
            self.assertIn(text, page.text)
        self.assertIn("results/probe/run-b/logs/stdout.log", page.values("href"))
        self.assertIn("#run-1", page.values("href"))
        self.assertIn("run-1", page.values("id"))
        self.assertNotIn(", best: ", self.report().text)


# === Running a command ===


class RunCommandCase(RunCase):
    def words(self, *command: str, options: tuple[str, ...] = ()) -> list[str]:
        """Return the words of `run` for a command."""
        start = [PYTHON, str(SOURCE), "run", "--base-dir", "results/demo"]
        return [*start, *options, "--", *command]

    def record(self, *command: str, options: tuple[str, ...] = (), **more: Any) -> Any:
        return subprocess.run(
            self.words(*command, options=options),
            env=self.environment(), stdin=subprocess.DEVNULL, capture_output=True,
            timeout=60, text=True, **more,
        )  # fmt: skip

    def python(self, code: str) -> list[str]:
        return [PYTHON, "-c", textwrap.dedent(code)]

    def config(self) -> dict[str, Any]:
        config = dict(self.json("metadata.json")["config"])
        del config["command"]
        return config


class TheRunCommand(RunCommandCase):
    """`run -- CMD` records any command and exits with its status."""

    def test_output_config_and_exit_status(self) -> None:
        code = "import sys; print(sys.argv[1:]); sys.exit(5)"
        (self.tmp / "job.py").write_text(code, "utf-8")
        words = ["-u", "job.py", "--lr", "0.1", "--fp16", "-v", "3", "seed=3"]
        words += ["--list", "a", "b", "--shift", "-1e-3", "--name=x=y", "--", "data"]
        done = self.record(PYTHON, *words, options=("--note", "first", "--tag", "a"))
        self.assertEqual(done.returncode, 5)
        self.assertEqual(done.stdout, f"{words[2:]}\n")
        run_dir = self.run_dir()
        self.assertEqual(done.stderr, f"run_utils: recorded in {run_dir}\n")
        self.assertTrue(run_dir.name.startswith("job-"))
        expected = {
            "lr": 0.1, "fp16": True, "v": 3, "seed": 3, "list": ["a", "b"],
            "shift": -0.001, "name": "x=y",
        }  # fmt: skip
        self.assertEqual(self.config(), expected)
        status = self.json("status.json")
        self.assertEqual((status["status"], status["exit_code"]), ("failed", 5))
        self.assertEqual(status["last_output"], [f"{words[2:]}"])
        command = str(self.json("metadata.json")["command"])
        self.assertTrue(command.endswith("-- data"), command)
        notes = (run_dir / "notes.jsonl").read_text("utf-8")
        self.assertIn('"text": "first", "tags": ["a"]', notes)

    def test_options_after_a_launcher(self) -> None:
        (self.tmp / "train.py").touch()
        table = {
            "torchrun --nproc 4 train.py --lr 1": {"lr": 1},
            "env A=1 python -u train.py --lr 1": {"lr": 1},
            "python -m train --lr 1 2": {"lr": [1, 2]},
            "python -m launch --nproc 4 train.py --lr 1": {"nproc": 4, "lr": 1},
            "./train --config a.py --on --off=false": {
                "config": "a.py", "on": True, "off": False,
            },
        }  # fmt: skip
        for words, expected in table.items():
            with self.subTest(words):
                found = run_utils._command_options(words.split())
                self.assertEqual(found, expected)

    def test_names_any_language_and_a_second_double_dash(self) -> None:
        done = self.record("sh", "-c", 'echo "$@"', "sh", "--", "a b")
        self.assertEqual((done.returncode, done.stdout), (0, "-- a b\n"))
        status = self.json("status.json")
        found = status["status"], status["exit_reason"], status["exit_code"]
        self.assertEqual(found, ("success", "normal", 0))
        shutil.rmtree("results")
        options = ("--prefix", "lr{lr}")
        self.record("echo", "--lr", "0.1", options=options)
        self.assertTrue(self.run_dir().name.startswith("lr0.1-"))
        done = self.record("echo", "x", options=options)
        self.assertEqual(done.returncode, 2)
        self.assertIn("'{lr}', which is no key of", done.stderr)
        self.assertEqual(len(self.run_dirs()), 1)

    def test_a_config_file(self) -> None:
        (self.tmp / "c.json").write_text('{"lr": 1, "name": "x"}', "utf-8")
        done = self.record("echo", "--lr", "2", options=("--config", "c.json"))
        self.assertEqual(done.returncode, 0)
        self.assertEqual(self.config(), {"lr": 2, "name": "x"})
        for text, reason in (("[1]", "PyYAML"), ("{", "cannot be read")):
            (self.tmp / "c.json").write_text(text, "utf-8")
            done = self.record("true", options=("--config", "c.json"))
            self.assertEqual(done.returncode, 2)
            self.assertIn(reason, done.stderr)

    def test_what_cannot_be_run_has_the_status_of_a_shell(self) -> None:
        for name, text in (("plain", "exit 3"), ("lost", "#!/no/such/program\n")):
            (self.tmp / name).write_text(text, "utf-8")
            (self.tmp / name).chmod(0o755)
        (self.tmp / "data").touch()
        table = {
            "no-such-program": (127, "'no-such-program' is not a program on PATH"),
            "./none": (127, "'./none' is not a program on PATH"),
            "./data": (126, "'./data' is not executable"),
        }
        for name, (status, sentence) in table.items():
            done = self.record(name)
            self.assertEqual((done.returncode, self.run_dirs()), (status, []))
            self.assertIn(f"{sentence}; nothing was recorded\n", done.stderr)
        self.assertEqual(self.record("./plain").returncode, 3)  # as a shell runs it
        shutil.rmtree("results")
        done = self.record("./lost")
        self.assertEqual(done.returncode, 127)
        status = self.json("status.json")
        self.assertEqual((status["status"], status["exit_code"]), ("failed", 127))
        self.assertIn("No such file or directory", status["problem"])

    def test_the_status_is_kept_where_nothing_can_be_shown(self) -> None:
        command = self.words("sh", "-c", "exit 3")
        for redirect in (*self.UNWRITABLE, ">/dev/full", ">&- 2>&-"):
            self.assertEqual(self.redirected(command, redirect), (3, ""), redirect)

    def test_a_reader_that_goes_away_is_told_of(self) -> None:
        job = "while test ! -e go; do echo x; sleep 0.01; done; exit 3"
        with open("said", "wb") as said:
            child = subprocess.Popen(
                self.words("sh", "-c", job), env=self.environment(),
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=said,
            )  # fmt: skip
        assert child.stdout is not None
        with child.stdout:
            self.assertEqual(child.stdout.readline(), b"x\n")
        line = "run_utils: nobody reads stdout any more; the command goes on"
        self.wait_until(lambda: line in Path("said").read_text("utf-8"), line)
        Path("go").touch()
        self.assertEqual(child.wait(), 3)

    def test_a_time_limit(self) -> None:
        body = """
        import run_utils
        run_utils.KILL_SECONDS = 0.2
        sys.exit(main(sys.argv[1:]))
        """
        job = "trap '' TERM; (trap - TERM; exec sleep 99) & echo $!; exec sleep 99"
        words = ["run", "--base-dir", "results/demo", "--timeout", "0.3s", "--"]
        done = self.script(body, *words, "sh", "-c", job)
        self.assertEqual(done.returncode, 124, done.stderr)
        status = self.json("status.json")
        self.assertEqual((status["status"], status["signal"]), ("failed", "SIGKILL"))
        self.assertEqual(status["problem"], "stopped after its time limit of 0.3 s")
        pid = int(done.stdout)
        self.wait_until(lambda: not run_utils._is_alive(pid, None), "its child is dead")
        done = self.record("true", options=("--timeout", "soon"))
        self.assertIn("give a time such as 90s, 30m or 2h", done.stderr)
        self.assertEqual(run_utils._seconds_of("1.5h"), 5400)

    def test_a_script_with_a_run_of_its_own_is_one_linked_pair(self) -> None:
        body = 'with run_context("results/inner", "inner"): print("inside")'
        done = self.record(PYTHON, str(self.write_script(body)))
        self.assertEqual((done.returncode, done.stdout), (0, "inside\n"))
        outer, inner = self.run_dirs()
        metadata = json.loads((inner / "metadata.json").read_text("ascii"))
        self.assertEqual(metadata["parent"]["run"], outer.name)
        lineage = self.command("lineage", str(outer))
        self.assertIn(inner.name, lineage.stdout)

    @unittest.skipUnless(GIT, "git is missing")
    def test_the_program_decides_which_repository_is_recorded(self) -> None:
        for name in ("a", "b"):
            git = [str(GIT), "-c", "user.name=n", "-c", "user.email=e", "-C", name]
            subprocess.run([str(GIT), "init", "-q", name])
            (self.tmp / name / "tool.sh").write_text("#!/bin/sh\ncat $1\n", "utf-8")
            (self.tmp / name / "tool.sh").chmod(0o755)
            subprocess.run([*git, "add", "."])
            subprocess.run([*git, "commit", "-qm", name])
        self.assertEqual(self.record("a/tool.sh", "b/tool.sh").returncode, 0)
        git_facts = self.json("metadata.json")["git"]
        self.assertEqual(git_facts["root"], str(self.tmp / "a"))
        self.assertTrue(self.run_dir().name.startswith("tool-"))


@unittest.skipIf(os.name != "posix", "signals are POSIX")
class SignalsForTheCommand(RunCommandCase):
    """Signals reach the command; how it ends is told as it was."""

    def test_a_signal_gives_128_plus_its_number(self) -> None:
        done = self.record("sh", "-c", "kill -9 $$")
        self.assertEqual(done.returncode, 137)
        status = self.json("status.json")
        found = status["exit_reason"], status["exit_code"], status["signal"]
        self.assertEqual(found, ("killed", 137, "SIGKILL"))

    def test_all_that_can_be_caught_are_sent_on(self) -> None:
        names = ["TERM", "HUP", "INT", "QUIT", "USR1", "USR2", "ALRM", "CONT", "XCPU"]
        code = f"""
        import signal, sys, time
        for name in {names}:
            number = getattr(signal, "SIG" + name)
            signal.signal(number, lambda number, _: print(number, flush=True))
        print("ready", flush=True)
        while not sys.stdin.read(1): pass
        sys.exit(6)
        """
        child = subprocess.Popen(
            self.words(*self.python(code)), env=self.environment(),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        assert child.stdin is not None and child.stdout is not None
        with child.stdin, child.stdout:
            self.assertEqual(child.stdout.readline(), b"ready\n")
            for name in names:
                number = getattr(signal, f"SIG{name}")
                child.send_signal(number)
                self.assertEqual(child.stdout.readline(), b"%d\n" % number)
            child.stdin.write(b"x")
            child.stdin.flush()
            self.assertEqual(child.wait(), 6)

    def test_what_was_inherited_changes_nothing(self) -> None:
        code = """
        import os, signal, sys
        names = "SIGHUP", "SIGCHLD", "SIGUSR1", "SIGPIPE"
        print([signal.getsignal(getattr(signal, name)).name for name in names])
        print(signal.pthread_sigmask(signal.SIG_BLOCK, []), os.read(7, 9))
        sys.exit(5)
        """
        done = self.record(*self.python(code), preexec_fn=self.inherit, pass_fds=(7,))
        expected = "['SIG_IGN', 'SIG_IGN', 'SIG_DFL', 'SIG_IGN']\n"
        expected += "{<Signals.SIGALRM: 14>} b'handed on'\n"
        self.assertEqual((done.returncode, done.stdout), (5, expected))
        done = self.record("sh", "-c", "yes | head -n 1")
        self.assertNotIn("roken", done.stderr)  # SIGPIPE, which Python ignores

    def inherit(self) -> None:
        """Leave to a child what nohup, a careless parent and `cmd 7<file` do."""
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
        reader, writer = os.pipe()
        os.write(writer, b"handed on")
        os.dup2(reader, 7)


@unittest.skipIf(os.name != "posix", "pseudo-terminals are POSIX")
class RunOnATerminal(RunCommandCase):
    """On a terminal the command has one too, and every byte of it is shown."""

    def setUp(self) -> None:
        super().setUp()
        self.shown = b""

    def start(self, words: list[str]) -> None:
        import pty

        self.pid, self.master = pty.fork()
        if self.pid == 0:
            os.execve(words[0], words, self.environment())
        self.addCleanup(os.close, self.master)

    def expect(self, text: str) -> None:
        """Read until a text is shown; keep what came before it in `matched`."""
        deadline = time.monotonic() + 30
        while text.encode() not in self.shown:
            ready = run_utils.select.select([self.master], [], [], 1)[0]
            if ready:
                try:
                    self.shown += os.read(self.master, 65536)
                except OSError:
                    self.assertIn(text, self.shown.decode("utf-8", "replace"))
            self.assertLess(time.monotonic(), deadline, self.shown[-500:])
        before, _, self.shown = self.shown.partition(text.encode())
        self.matched = before.decode("utf-8", "replace")

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def end(self) -> int:
        """Read all that is still shown; return the exit status."""
        with contextlib.suppress(OSError):
            while True:
                data = os.read(self.master, 65536)
                if not data:
                    break
                self.shown += data
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def test_it_is_a_terminal_of_our_size_and_all_is_shown_slowly(self) -> None:
        import fcntl
        import struct
        import termios

        code = """
        import os, sys
        print([os.isatty(n) for n in (0, 1, 2)], os.get_terminal_size())
        print(input("name: "))
        sys.stdout.write("".join(f"line {n}\\n" for n in range(5000)) + "the end\\n")
        sys.exit(4)
        """
        late = ["/bin/sh", "-c", 'read go; "$@"; code=$?; stty -a; exit $code', "sh"]
        self.start([*late, *self.words(*self.python(code))])
        size = struct.pack("HHHH", 33, 99, 0, 0)
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, size)
        self.type("\n")
        self.expect("[True, True, True]")
        self.expect("columns=99, lines=33")
        self.expect("name: ")
        self.type("a name\n")
        self.expect("line 4998\r\nline 4999\r\nthe end\r\n")
        self.assertEqual(self.end(), 4)
        self.assertIn(b" icanon", self.shown)  # our terminal is as it was
        self.assertNotIn(b"\0", self.shown)
        log = self.log("output")
        self.assertNotIn("\r", log)
        self.assertTrue(log.endswith("line 4999\nthe end\n"))

    def test_signals_ctrl_c_and_progress_bars(self) -> None:
        code = """
        import sys, time
        for percent in range(100):
            sys.stdout.write(f"\\r{percent} %")
        print("\\rdone\\nready")
        time.sleep(60)
        """
        for end, status in (("\3", -signal.SIGINT), (None, 143)):
            shutil.rmtree("results", ignore_errors=True)
            self.start(self.words(*self.python(code)))
            self.expect("ready\r\n")
            if end is not None:
                self.type(end)
            else:
                os.kill(self.pid, signal.SIGTERM)
            self.assertEqual(self.end(), status)
            log = self.log("output")
            self.assertNotIn("\r", log)
            self.assertIn("done\nready\n", log)
            self.assertLess(log.count("%"), 5)

    def test_ctrl_c_ends_the_script_around_it_as_well(self) -> None:
        run = shlex.join(self.words("sh", "-c", "echo re''ady; exec sleep 60"))
        for command in (run, f"{run} | cat"):
            for shell in filter(None, map(shutil.which, ("sh", "bash"))):
                with self.subTest(shell=shell, command=command):
                    self.start([shell, "-c", f"{command}; echo behind"])
                    self.expect("ready")
                    self.type("\3")
                    self.assertEqual(self.end(), -signal.SIGINT)
                    self.assertNotIn(b"behind", self.shown)

    def test_so_does_one_that_comes_before_the_command_runs(self) -> None:
        (self.tmp / "git").write_text("#!/bin/sh\nkill -INT $PPID; exec sleep 9\n")
        (self.tmp / "git").chmod(0o755)
        (self.tmp / ".git").mkdir()
        path = f"{self.tmp}{os.pathsep}{os.environ['PATH']}"
        done = subprocess.run(
            self.words("echo", "run"), env=self.environment({"PATH": path}),
            capture_output=True, timeout=60,
        )  # fmt: skip
        self.assertEqual((done.returncode, done.stdout), (-signal.SIGINT, b""))

    def test_a_line_that_ends_with_a_carriage_return_is_logged_once(self) -> None:
        self.start(self.words("printf", r"10 %%\r50 %%\r"))
        self.assertEqual(self.end(), 0)
        self.assertEqual(self.log("output"), "50 %")

    def test_a_command_that_closes_its_terminal_goes_on(self) -> None:
        """Once it was hung up, and ended by SIGHUP."""
        self.start(self.words("sh", "-c", "exec <&- >&- 2>&-; sleep 0.3; exit 4"))
        self.assertEqual(self.end(), 4)

    def test_each_state_of_a_line_that_is_logged_is_a_line(self) -> None:
        text = run_utils._TerminalText()
        with mock.patch.object(run_utils, "HEARTBEAT_SECONDS", -1):  # log each
            told = list(map(text.add, [b"10 %", b"\r", b"20 %", b"\rdone\r\nx"]))
        self.assertEqual(told, [b"10 %", b"", b"\n20 %", b"\ndone\nx"])

    def test_nothing_is_lost_though_little_is_passed_on_at_a_time(
        self,
    ) -> None:
        code = """
        import os, time, tty
        tty.setraw(0)
        print("begun", flush=True)
        while not os.path.exists("go"): time.sleep(0.01)
        print(os.read(0, 9), "x" * 3999 + ".", flush=True)
        """
        body = """
        import run_utils
        run_utils.FORWARD_BYTES = 9
        sys.exit(main(sys.argv[1:]))
        """
        words = self.words(*self.python(code))
        self.start([PYTHON, str(self.write_script(body)), *words[2:]])
        self.expect("begun")
        self.type("\x1a" + "y" * 500)
        (self.tmp / "go").touch()
        self.expect("\\x1ayyyyyyyy' " + "x" * 3999 + ".")
        self.assertEqual(self.end(), 0)

    @unittest.skipUnless(shutil.which("bash"), "bash is missing")
    def test_a_command_that_stops_itself_or_will_not_be_stopped(self) -> None:
        self.start([str(shutil.which("bash")), "--norc", "-i"])
        self.type("PS1='$ '\n")
        run = shlex.join(self.words("sh", "-c", "kill -STOP $$; echo resu''med"))
        self.type(f"{run}\n")
        self.expect("Stopped")
        self.type("fg\n")
        self.expect("resumed")
        self.expect("recorded in")
        if not LINUX:
            return
        code = "trap '' TSTP; echo be''gun; read word; echo got $word"
        self.type(f"{shlex.join(self.words('sh', '-c', code))}\n")
        self.expect("begun")
        self.type("\x1aword\n")
        self.expect("got word")
        self.expect("recorded in")
        self.assertNotIn("Stopped", self.matched)
        self.type("exit\n")
        self.end()

    def test_ctrl_z_is_for_a_job_of_the_command(self) -> None:
        code = """
        import os, signal
        signal.signal(signal.SIGTTOU, signal.SIG_IGN)
        job = os.fork()
        if not job:
            os.setpgid(0, 0)
            os.tcsetpgrp(0, os.getpid())
            print("begun", flush=True)
            signal.pause()
        print("stopped:", os.WIFSTOPPED(os.waitpid(job, os.WUNTRACED)[1]))
        os.kill(job, 9)
        """
        self.start(self.words(*self.python(code)))
        self.expect("begun")
        self.type("\x1a")
        self.expect("stopped: True")
        self.assertEqual(self.end(), 0)

    def test_without_proc_ctrl_z_is_up_to_the_kernel(self) -> None:
        body = """
        import run_utils
        def read(path, really=run_utils._read_proc):
            return b"" if path.endswith("/status") else really(path)
        run_utils._read_proc = read
        sys.exit(main(sys.argv[1:]))
        """
        words = self.words("sh", "-c", "echo be''gun; read word; echo got $word")
        self.start([PYTHON, str(self.write_script(body)), *words[2:]])
        self.expect("begun")
        self.type("\x1a")
        self.type("word\n")
        self.expect("got word")
        self.assertEqual(self.end(), 0)

    @unittest.skipUnless(shutil.which("bash"), "bash is missing")
    def test_stopped_from_elsewhere_it_goes_on_in_the_background(self) -> None:
        code = """
        import os, time
        print("begun", os.getppid(), flush=True)
        while not os.path.exists("go"): time.sleep(0.01)
        """
        (self.tmp / "job.py").write_text(textwrap.dedent(code), "utf-8")
        self.start([str(shutil.which("bash")), "--norc", "-i"])
        self.type(f"{shlex.join(self.words(PYTHON, 'job.py'))}\n")
        self.expect("begun ")
        self.expect("\n")
        os.kill(int(self.matched), signal.SIGSTOP)
        self.expect("Stopped")
        self.type("bg\n")
        self.expect("&")
        (self.tmp / "go").touch()
        self.expect("recorded in")
        self.type("exit\n")
        self.end()

    @unittest.skipUnless(shutil.which("bash"), "bash is missing")
    def test_ctrl_z_fg_bg_and_the_background(self) -> None:
        code = """
        import os, time
        print("begun", os.getpid(), flush=True)
        while not os.path.exists("go"): time.sleep(0.01)
        print("behind")
        print("typed", input())
        """
        (self.tmp / "job.py").write_text(textwrap.dedent(code), "utf-8")
        run = shlex.join(self.words(PYTHON, "job.py"))
        self.start([str(shutil.which("bash")), "--norc", "-i"])
        self.type("PS1='$ '\n")
        self.type(f"{run}\n")
        self.expect("begun ")
        self.expect("\n")
        pid = int(self.matched.split()[-1])
        self.type("\x1a")
        self.expect("Stopped")
        if LINUX:

            def is_stopped() -> bool:
                return (run_utils._process_stat(pid) or [""])[0] == "T"

            self.wait_until(is_stopped, "the command is stopped as well")
        self.type("bg\n")
        self.expect("&")
        (self.tmp / "go").touch()
        self.expect("behind")
        self.type("echo al''ive\n")
        self.expect("alive")
        self.type("fg\n")
        self.expect("run")
        self.type("text\n")
        self.expect("typed text")
        self.expect("recorded in")
        self.assertEqual(self.json("status.json")["status"], "success")
        shutil.rmtree("results")
        job = shlex.join(
            self.words("sh", "-c", "test -t 1 && echo in the back''ground")
        )
        self.type(f"{job} & wait; echo waited $?\n")
        self.expect("in the background")
        self.expect("waited 0")
        self.assertEqual(self.log("output"), "in the background\n")
        self.type("exit\n")
        self.end()


# === Command line ===


class TheCommandLine(ReadingCase):
    """A table of commands: help, mistakes and pipes are the same for all."""

    def test_every_command_has_a_line_of_help(self) -> None:
        done = self.command("--help")
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        for name, about, function, arguments in run_utils._COMMANDS:
            with self.subTest(name):
                self.assertRegex(done.stdout, rf"\n    {name}\s+{about.split()[0]}")
                self.assertTrue(callable(function))
                code, out, _ = self.ask(name, "--help")
                self.assertEqual(code, 0)
                for usage, _ in arguments:
                    for word in re.findall(r"--[a-z-]+|[A-Z]+", usage):
                        self.assertIn(word, out)

    def test_mistakes_are_one_sentence_and_status_2(self) -> None:
        for words, sentence in (
            ([], "the following arguments are required: COMMAND"),
            (["nope"], "invalid choice: 'nope'"),
            (["inspect", "--nope", "x"], "unrecognized arguments: --nope"),
            (["inspect"], "the following arguments are required: RUN"),
            (["list", "--json", "--csv"], "not allowed with argument --json"),
            (["list", "--outputs"], "unrecognized arguments: --outputs"),
            (["run", "--tag", "x"], "no command is given; write it after --"),
        ):
            with self.subTest(words):
                code, out, err = self.ask(*words)
                self.assertEqual((code, out), (2, ""))
                self.assertIn(sentence, err)

    def test_only_what_a_command_needs_is_imported(self) -> None:
        self.make_run("exp/a")
        done = self.script("""
        sys.argv[1:] = ["list"]
        main()
        heavy = "csv difflib unicodedata html subprocess tempfile yaml shutil"
        print(sorted(set(heavy.split()) & set(sys.modules)))
        """)
        self.assertEqual(done.stdout.splitlines()[-1], "[]", done.stderr)

    def test_it_says_how_it_was_called(self) -> None:
        copy = self.tmp / "pkg" / "run_utils"
        copy.mkdir(parents=True)
        shutil.copy(SOURCE, copy / "__init__.py")
        (copy / "__main__.py").write_text(
            "from . import main\nraise SystemExit(main())\n", "utf-8"
        )
        python = os.path.basename(PYTHON)
        for words, prog in (
            (["-m", "pkg.run_utils"], f"{python} -m pkg.run_utils"),
            (["-m", "run_utils"], f"{python} -m run_utils"),
            ([str(SOURCE)], "run_utils.py"),
        ):
            with self.subTest(prog):
                done = subprocess.run(
                    [PYTHON, *words, "inspect", "no-such"], env=self.environment(),
                    stderr=subprocess.PIPE, encoding="utf-8",
                )  # fmt: skip
                self.assertTrue(done.stderr.startswith(f"{prog}: no run "), done.stderr)

    def test_a_reader_that_goes_away(self) -> None:
        self.make_run("exp/a", config={"text": "x" * 90_000, "more": "y" * 90_000})
        path = self.write_script("sys.exit(main(sys.argv[1:]))")
        words = shlex.join([PYTHON, str(path), "list", "--json"])
        command = f"{{ {words}; echo status $? >&2; }} | head -1"
        done = subprocess.run(
            ["sh", "-c", command], env=self.environment(), capture_output=True,
        )  # fmt: skip
        self.assertEqual((done.stdout, done.stderr), (b"[\n", b"status 0\n"))


class Inspecting(ReadingCase):
    """`inspect` shows one run on one screen, and trusts nothing it reads."""

    def test_a_run_without_metadata_is_not_compared_with_now(self) -> None:
        run_dir = run_utils.start_run("results/exp", "hand")
        run_utils.mark_status(run_dir, "success")
        out = self.ask("inspect", str(run_dir))[1]
        self.assertNotIn("\nnow ", out)
        self.assertIn("problems  metadata.json: missing\n", out)

    def test_a_failed_run(self) -> None:
        body = """
        log_metrics(run_dir, {"loss": 2.0, "odd": float("nan")}, 1)
        log_metrics(run_dir, {"loss": 1.0, "odd": float("inf")}, 2)
        raise ValueError("bad \\x1b[31m learning rate")
        """
        self.in_context(body)
        code, out, err = self.ask("inspect", "latest")
        self.assertEqual((code, err), (0, ""))
        self.assertIn("status    failed (exception), exit code 1, after ", out)
        self.assertIn("why       ValueError: bad \\x1b[31m learning rate\n", out)
        self.assertIn("loss: 1 (lowest 1, highest 2, 2 values) █▁\n", out)
        self.assertRegex(out, r"odd: inf \(2 values, 2 not finite\) xx\n")
        self.assertIn("plots: empty", out)
        facts = json.loads(self.ask("inspect", "--json", "latest")[1])
        self.assertEqual(facts["status"]["status"], "failed")
        self.assertEqual(facts["metrics"]["loss"], [2.0, 1.0])
        self.assertEqual(facts["summary"]["loss"]["min"], 1.0)

    def test_the_metrics_are_summarised_once_however_many_there_are(self) -> None:
        rows = [{"step": 1, **{f"layer{n}": n for n in range(50)}}]
        run = Run(self.make_run("exp/a", metrics=rows))
        summary = mock.PropertyMock(return_value={})
        with mock.patch.object(Run, "summary", summary):
            self.assertEqual(len(run_utils._format_metrics(run)), 50)
        self.assertEqual(summary.call_count, 1)

    def test_a_command_that_failed_shows_its_last_lines(self) -> None:
        run = self.make_run("exp/a", status={"status": "failed", "exit_code": 1})
        (run / "logs" / "stderr.log").write_text("one\nno such option\n", "utf-8")
        out = self.ask("inspect", "a")[1]
        lines = "          ".join(("exit code 1\n", "  one\n", "  no such option\n"))
        self.assertIn(f"why       {lines}", out)

    def test_a_run_that_used_a_file_of_another(self) -> None:
        producer = self.make_run("exp/a")
        model = producer / "artifacts" / "model.pt"
        model.touch()
        consumer = self.make_run("exp/next")
        run_utils.mark_artifact_used(model, consumer)
        out = self.ask("inspect", "next")[1]
        line = "mark_artifact_used: a/artifacts/model.pt (success)"
        self.assertIn(f"inputs    {line}\n", out)
        run_utils.mark_artifact_used(producer / "logs", consumer)
        (producer / "logs" / "stdout.log").touch()  # what a folder has is not held
        os.utime(producer / "logs", (1, 1))
        out = self.ask("inspect", "next")[1]
        self.assertIn(" mark_artifact_used: a/logs (success)\n", out)
        self.assertIn("used by   next\n", self.ask("inspect", "a")[1])
        tree = consumer.parents[1]
        moved = tree.rename(tree.with_name("moved"))
        model = moved / model.relative_to(tree)
        show = ("inspect", str(moved / consumer.relative_to(tree)))
        self.assertIn(f"inputs    {line}\n", self.ask(*show)[1])
        model.write_text("longer")
        os.utime(model, (1, 1))
        self.assertIn("(success, changed since)\n", self.ask(*show)[1])
        model.unlink()
        self.assertIn("(success, not there now)\n", self.ask(*show)[1])

    def test_the_attempts_of_a_resumed_run(self) -> None:
        self.script("""
        for lr in (1, 2):
            with run_context("results/e", "e", {"lr": lr}, run_dir="results/e/r"):
                pass
        """)
        out = self.ask("inspect", "results/e/r")[1]
        self.assertRegex(out, r"\n          2 attempts, \S+ in all\n")
        self.assertIn("          attempt 1: success (normal), exit code 0,", out)
        self.assertIn("          changed since: lr: 1 -> 2\n", out)
        self.assertIn("success (2 attempts)", self.ask("list")[1])

    def test_files_at_the_top_are_outputs(self) -> None:
        run = self.make_run("exp/a")
        (run / "figure.png").write_bytes(b"x" * 2000)
        out = self.ask("inspect", "a")[1]
        self.assertIn("at the top: 1 file, 2 kB\n", out)
        self.assertIn("largest: figure.png (2 kB)\n", out)

    def test_a_copy_of_an_output_finds_its_run(self) -> None:
        self.in_context("(run_dir / 'plots/f.png').write_bytes(b'picture')")
        run = self.run_dir()
        shutil.copy(run / "plots" / "f.png", "elsewhere.png")
        self.assertIn(f"run       {run}\n", self.ask("inspect", "elsewhere.png")[1])

    def test_following_a_run_to_its_end(self) -> None:
        body = """
        log_metrics(run_dir, {"loss": 2.0}, 1)
        print(*map(str, range(100, 107)), "training", sep="\\n", flush=True)
        while not os.path.exists("go"):
            time.sleep(0.02)
        log_metrics(run_dir, {"loss": 1.0}, 2)
        print("done", flush=True)
        """
        follow = "import run_utils\nrun_utils.FOLLOW_SECONDS = 0.02\n"
        follow += "sys.exit(main(['inspect', 'latest', '--follow']))"
        runner = threading.Thread(target=self.in_context, args=(body,))
        runner.start()
        self.addCleanup(runner.join)
        self.addCleanup(Path("go").touch)
        self.wait_for_status("running")
        (self.tmp / "follow.py").write_text(
            f"import sys\nfrom run_utils import main\n{follow}", "utf-8"
        )
        watcher = subprocess.Popen(
            [PYTHON, "follow.py"], env=self.environment(), stdout=subprocess.PIPE,
            encoding="utf-8",
        )  # fmt: skip
        assert watcher.stdout is not None
        lines = []
        for line in watcher.stdout:
            lines.append(line.rstrip("\n"))
            if "loss: 2 " in line:
                Path("go").touch()
        self.assertEqual(watcher.wait(), 0)
        watcher.stdout.close()
        self.assertIn("status    running", lines)
        text = "\n".join(lines)
        self.assertIn("metrics   loss: 1 (lowest 1, highest 2, 2 values)", text)
        self.assertIn("status    success (normal), exit code 0,", text)
        self.assertEqual(text.count("run       "), 1)
        self.assertEqual(lines.count("          done"), 1)
        self.assertEqual(text.count("101"), 1)

    def test_on_a_terminal_it_is_drawn_anew_each_time(self) -> None:
        class Terminal(io.StringIO):
            def isatty(self) -> bool:
                return True

        def end(seconds: float) -> None:
            (run / "status.json").write_text('{"status": "success"}', "utf-8")

        alive = {"status": "running", "hostname": "elsewhere", "heartbeat_seconds": 10}
        run = self.make_run("exp/a", status=alive)
        with contextlib.redirect_stdout(Terminal()) as shown:
            with mock.patch.object(time, "sleep", end):
                run_utils._follow(run)
        clear = f"\x1b[H\x1b[2Jrun       {run}\n"
        self.assertTrue(shown.getvalue().startswith(clear), shown.getvalue())
        self.assertEqual(shown.getvalue().count(clear), 2)

    def test_sentences_for_bad_input(self) -> None:
        for name in ("exp/one-run", "exp/two-run"):
            self.make_run(name)
        prog = run_utils._prog()
        here = str(self.tmp / "results")
        for words, sentence in (
            ("no-such", f"no run 'no-such' below {here!r}"),
            ("/", "'/' is not in a run directory; give one, or a name"),
        ):
            code, out, err = self.ask("inspect", words)
            self.assertEqual((code, out, err), (2, "", f"{prog}: {sentence}\n"))
        code, _, err = self.ask("inspect", "run")
        self.assertEqual(code, 2)
        self.assertRegex(err, r": 'run' is a part of 2 names \(.*; say more\n$")

    def test_damaged_and_foreign_directories(self) -> None:
        damages = [b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe", b"{}", b'{"git": 3}']
        damages += [b'{"status": [1], "exception": 4, "duration_seconds": "x"}']
        damages.append(
            b'{"capture": {"a": 1}, "python": 7, "platform": [], "command": {}}'
        )
        damages.append(b'{"inputs": [1, {}], "duration_seconds": %s}' % (b"9" * 400))
        damages.append(b'{"inputs": 1, "loss": %s}' % (b"9" * 400))
        damages.append(b'{"a": ' * 900 + b"1" + b"}" * 900)
        names = ["status.json", "metadata.json", "config.yaml", "notes.jsonl"]
        for name in [*names, "metrics/metrics.jsonl", "metrics/summary.json"]:
            for data in damages:
                with self.subTest(name=name, data=data):
                    folder = self.tmp / "damaged"
                    shutil.rmtree(folder, ignore_errors=True)
                    (folder / "metrics").mkdir(parents=True)
                    (folder / "status.json").write_bytes(b"{}")
                    (folder / name).write_bytes(data)
                    code, _, err = self.ask("inspect", str(folder))
                    self.assertEqual((code, err), (0, ""))


class Listing(ReadingCase):
    """`list` shows what answers the question, on whatever there is of a screen."""

    def setUp(self) -> None:
        super().setUp()
        for day in (1, 3, 2):
            start = f"2026-01-0{day}T00:00:00Z"
            state = "failed" if day == 2 else "success"
            config = {"lr": day / 10, "same": 1, "command": str(day)}
            rows = [{"step": 1, "time": 1, "loss": 1.0 / day}]
            self.make_run(
                f"exp/train-2026010{day}-000000-1a2b3c{day}", config=config,
                status={"started_utc": start, "status": state}, metrics=rows,
            )  # fmt: skip
        names = [f"train-2026010{day}-000000-1a2b3c{day}" for day in (3, 2, 1)]
        self.names = names
        (self.tmp / "results/exp" / names[0] / "artifacts/m").write_text("x" * 2000)

    def test_the_table(self) -> None:
        code, out, err = self.ask("list")
        self.assertEqual((code, err), (0, ""))
        head, *lines = out.splitlines()
        self.assertEqual(head.split(), "run status age time loss lr outputs".split())
        pattern = r"^exp/train-20260103-000000-1a2b3c3  success  \d+d\d+h  1m00s  "
        self.assertRegex(lines[0], pattern + r"0\.333333  0\.3  2 \(2.05 kB\)$")
        self.assertRegex(lines[1], r"  failed .*     0\.5  0\.2 +1 \(\d+ B\)$")
        self.assertNotIn("same", out)
        here = str(self.tmp / "results")
        none = self.ask("list", "--contains", "nothing")
        self.assertEqual(none, (0, "", f"no such runs below {here!r}\n"))

    def test_a_key_with_letters_that_stdout_does_not_have(self) -> None:
        for size in range(2):
            self.make_run(f"exp/run-{size}", config={"größe": size})
        done = self.command("list", env={"PYTHONIOENCODING": "ascii"})
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        self.assertIn("gr\\xf6\\xdfe", done.stdout.splitlines()[0])

    def test_what_differs_is_decided_before_filters_and_cuts(self) -> None:
        for words in ("-n 1", "--status failed", "--sort=-loss --top 1"):
            with self.subTest(words):
                out = self.ask("list", *words.split())[1]
                self.assertIn("lr", out.splitlines()[0].split())

    def test_what_differs_is_decided_within_a_script(self) -> None:
        other = {"argv": ["python", "evaluate.py"]}
        self.make_run("exp/e", config={"task": "x", "same": 2}, metadata=other)
        head = self.ask("list")[1].splitlines()[0].split()
        self.assertIn("lr", head)
        self.assertNotIn("same", head)
        self.assertNotIn("task", self.ask("list")[1])

    def test_it_fits_the_terminal(self) -> None:
        self.ask("note", self.names[0], "é☃表 " * 50, "--tag", "canonical")
        for columns in (20, 40, 72, 80, 100, 200):
            with self.subTest(columns):
                out = self.ask("list", columns=columns)[1]
                widths = list(map(run_utils._width, out.splitlines()))
                self.assertLessEqual(max(widths), columns)
                self.assertIn("[canonical]", self.ask("list", columns=80)[1])

    def test_what_was_asked_for_is_always_shown(self) -> None:
        config = {f"a_rather_long_key_{n}": n for n in range(9)}
        for n in range(3):
            rows = [{f"metric_{m}": m + n / 7 for m in range(9)}, {"acc": n / 9}]
            name = f"exp/a-long-name-for-a-run-2026010{n + 4}-000000"
            more = {key: value + n for key, value in config.items()}
            self.make_run(name, config={**more, "lr": n}, metrics=rows)
        for words, names in (
            (["--sort=-max(acc)"], ["max(acc)"]),
            (["--where", "metric_7>=0"], ["metric_7"]),
            (["--show", "acc,hostname", "--show", "min(metric_8)"],
             ["acc", "hostname", "min(metric_8)"]),
            (["--sort", "duration_seconds"], ["time"]),
            (["--sort", "outputs"], ["outputs"]),
        ):  # fmt: skip
            with self.subTest(words):
                head, *_lines = self.ask("list", *words, columns=80)[1].splitlines()
                self.assertTrue(set(names) <= set(head.split()), head)
        head = self.ask("list", columns=80)[1].splitlines()[0].split()
        self.assertIn("loss", head)
        self.assertIn("lr", head)
        keys = [f"{f}(metric_{m})" for m in range(6) for f in ("first", "max")]
        words = ["list", "--show", ",".join(keys), "--contains", "run-20260105"]
        out = self.ask(*words, columns=80)[1]
        self.assertLessEqual(max(map(len, out.splitlines())), 80)
        self.assertEqual(len(re.findall(r"\d\.1428", out)), len(keys))
        self.assertRegex(out, r"\n    .*max\(metric_5\) 5\.14286")

    def test_a_metric_and_a_key_of_the_config_with_one_name(self) -> None:
        for n in range(2):
            rows = [{"step": 7, "time": 1, "lr": n / 8}]
            config = {"lr": n + 40, "step": n + 50}
            self.make_run(f"exp/x-2026010{n + 6}-000000", config=config, metrics=rows)
        words = ["list", "--contains", "exp/x", "--sort", "metrics.lr"]
        out = self.ask(*words, "--show", "lr")[1]
        head, first, second = (line.split() for line in out.splitlines()[:3])
        self.assertEqual(head[4:-1], ["metrics.lr", "lr", "step"])
        self.assertEqual((first[4:6], second[4:6]), (["0", "40"], ["0.125", "41"]))

    def test_names_are_shortened_first_and_still_find_their_run(self) -> None:
        lines = self.ask("list", columns=64)[1].splitlines()
        self.assertIn("loss", lines[0])
        short = lines[1].split()[0]
        self.assertLess(len(short), len(f"exp/{self.names[0]}"))
        out = self.ask("inspect", short)[1]
        self.assertIn(f"/{self.names[0]}\n", out)

    def test_the_reason_is_shown_everywhere(self) -> None:
        error = {"type": "ValueError", "message": "bad rate", "traceback": "x"}
        status = {"status": "failed", "exit_reason": "exception", "exception": error}
        self.make_run("exp/bad-20260105-000000", status=status)
        self.assertIn("  ValueError: bad rate\n", self.ask("list")[1])
        self.assertIn("\n    ValueError: bad rate\n", self.ask("list", columns=60)[1])
        self.ask("note", "bad", "a note that does not fit beside the reason for it")
        beneath = "\n    ValueError: bad rate\n    a note that"
        self.assertIn(beneath, self.ask("list", columns=60)[1])
        rows = json.loads(self.ask("list", "--json")[1])
        self.assertIn("ValueError: bad rate", [row["reason"] for row in rows])
        self.assertIn("ValueError: bad rate", self.ask("list", "--csv")[1])
        self.assertIn("`ValueError: bad rate`", self.ask("list", "--md")[1])

    def test_csv_is_safe_in_a_spreadsheet(self) -> None:
        config = {"a": "=cmd()", "b": "-1+1", "c": -1.5, "d": 'x,"y"', "e": "@x"}
        config["\x1b[2J"] = 1
        start = {"started_utc": "2026-01-05T00:00:00Z"}
        self.make_run("exp/odd-20260105-000000", config=config, status=start)
        import csv

        row = next(csv.DictReader(io.StringIO(self.ask("list", "--csv")[1])))
        self.assertEqual(row["config.\\x1b[2J"], "1")
        found = [row[f"config.{key}"] for key in "abcde"]
        self.assertEqual(found, ["'=cmd()", "'-1+1", "-1.5", 'x,"y"', "'@x"])

    def test_markdown_shows_which_used_which(self) -> None:
        model = self.tmp / "results/exp" / self.names[0] / "artifacts" / "m"
        user = self.make_run("exp/next-20260105-000000")
        run_utils.mark_artifact_used(model, user)
        self.ask("note", self.names[1], "see a | b <script>", "--tag", "superseded")
        lines = self.ask("list", "--md")[1].splitlines()
        pipes = {len(re.findall(r"\|", line)) for line in lines if line}
        self.assertEqual(len(pipes), 1)
        self.assertIn(f"`{self.names[0]}/artifacts/m`", "\n".join(lines))
        self.assertIn("`next-20260105-000000`", "\n".join(lines))
        self.assertNotIn("<script>", "\n".join(lines))

    def test_commands_to_paste(self) -> None:
        argv = ["python", "train.py", "--name", "it's\x1b[2J", "$(rm x)"]
        facts = {"argv": argv, "working_dir": "/home/ann/my project"}
        self.make_run("exp/odd-20260105-000000", metadata=facts)
        out = self.ask("list", "--commands", "--contains", "odd")[1]
        expected = "cd '/home/ann/my project' && python train.py --name "
        expected += "$'it\\'s\\x1b[2J' '$(rm x)'\n"
        self.assertEqual(out, expected)
        if shutil.which("bash"):
            echo = out.replace("cd '/home/ann/my project' && python", "printf %s,")
            done = subprocess.run(["bash", "-c", echo], stdout=subprocess.PIPE)
            self.assertEqual(done.stdout.decode(), "".join(f"{a}," for a in argv[1:]))

    def test_a_command_that_is_only_a_text_stays_one_command(self) -> None:
        text = "python 'a b.py'; rm x\n\x1b]0;y\x07"
        self.make_run("exp/old", metadata={"argv": None, "command": text})
        out = self.ask("list", "--commands", "--contains", "old")[1]
        self.assertEqual(out, "python 'a b.py;' rm x $'\\x1b]0;y\\x07'\n")
        self.make_run("exp/none", metadata={"argv": None})
        out = self.ask("list", "--commands", "--contains", "none")[1]
        self.assertEqual(out, "# not known\n")

    def test_what_is_not_shown_is_counted(self) -> None:
        out = self.ask("list", "-n", "1")[1]
        self.assertEqual(out.splitlines()[-1], "2 older runs not shown; -n 0 shows all")
        self.assertEqual(len(json.loads(self.ask("list", "--json", "-n", "1")[1])), 1)
        out = self.ask("list", "-n", "1", "--sort", "lr")[1]
        self.assertEqual(out.splitlines()[-1], "2 more runs not shown; -n 0 shows all")

        self.assertEqual(out.splitlines()[-1], "2 more runs not shown; -n 0 shows all")
        with mock.patch.object(run_utils, "MAX_ROWS", 1):
            self.assertIn("2 older runs not shown", self.ask("list")[1])
            self.assertEqual(len(self.rows()), 3)  # a program gets all

    def test_mistyped_words_are_said(self) -> None:
        for words, sentence in (
            (["--sort", "lrr"], "no run has 'lrr'; did you mean 'lr'?"),
            (["--where", "los<1"], "no run has 'los'; did you mean 'loss'?"),
            (["--show", "max(acc)"], "no run has 'max(acc)'"),
            (["--status", "sucess"], "no run has the status 'sucess'; there are: fail"),
            (["--tag", "x"], "no run has the tag 'x'"),
        ):
            with self.subTest(words):
                code, _, err = self.ask("list", *words)
                self.assertEqual(code, 0)
                self.assertIn(sentence, err)

    def test_sentences_for_bad_input(self) -> None:
        for words, sentence in (
            (["no"], "'no' is not a folder; give one that holds runs"),
            (
                ["--since", "x"],
                "since 'x' is no time; give '12h', '7d' or '2026-01-31'",
            ),
            (["--top", "3"], "top is of a value; give one as sort='-max(KEY)'"),
        ):
            code, out, err = self.ask("list", *words)
            self.assertEqual((code, out), (2, ""))
            self.assertTrue(err.endswith(f": {sentence}\n"), err)

    def test_by_script(self) -> None:
        other = {"argv": ["python", "-m", "pkg.evaluate"]}
        self.make_run("exp/e", metadata=other)
        out = self.ask("list", "--by-script")[1]
        self.assertRegex(out, r"(?s)^pkg.evaluate: 1 run\nrun.*\ntrain: 3 runs\nrun")


class Folding(ReadingCase):
    """`list --over seed` shows mean, deviation and number of runs that are alike."""

    def setUp(self) -> None:
        super().setUp()
        for number, loss in enumerate((1.0, 2.0, 3.0, 9.0)):
            config = {"lr": 0.1 + number // 3, "seed": number}
            state = {"status": "failed" if number == 2 else "success"}
            name = f"exp/t-2026010{number + 1}-000000"
            rows = [{"loss": loss, "step": 7}]
            self.make_run(name, config=config, status=state, metrics=rows)

    def test_the_table(self) -> None:
        code, out, err = self.ask("list", "--over", "seed", "--sort", "loss")
        self.assertEqual((code, err), (0, ""))
        head, first, second = (line.split() for line in out.splitlines())
        self.assertEqual(head, ["run", "runs", "status", "loss", "lr"])
        self.assertIn("3 1 failed, 2 success 2 ± 1 (3) 0.1", " ".join(first))
        self.assertIn("1 1 success 9 1.1", " ".join(second))
        out = self.ask("list", "--over", "seed", "--md")[1]
        self.assertIn("| `2 ± 1 (3)` |", out)
        out = self.ask("list", "--over", "seed", "-n", "1")[1]
        self.assertTrue(out.endswith("\n1 older group not shown; -n 0 shows all\n"))
        keys = "min(loss),max(loss),first(loss),last(loss)"
        out = self.ask("list", "--over", "seed", "--show", keys, columns=60)[1]
        self.assertEqual(out.count("2 ± 1 (3)"), 4)

    def test_rows_for_programs(self) -> None:
        words = ["list", "--over", "seed", "--sort", "loss"]
        row = json.loads(self.ask(*words, "--json")[1])[0]
        keys = ("metrics.loss", "metrics.loss deviation", "metrics.loss count", "runs")
        self.assertEqual([row[key] for key in keys], [2.0, 1.0, 3, 3])
        lines = self.ask(*words, "--csv")[1].splitlines()
        self.assertEqual(len(lines), 3)
        self.assertIn(",0.1,", lines[1])


class LineageCommand(ReadingCase):
    """`lineage` shows both directions, as a tree and as graphs."""

    def setUp(self) -> None:
        super().setUp()
        for name in "abcd":
            self.make_run(f"exp/{name}")
        for consumer, producer in ("ba", "cb", "db"):
            there = self.tmp / "results/exp" / producer / "artifacts" / "m.pt"
            there.touch()
            run_utils.mark_artifact_used(there, self.tmp / "results/exp" / consumer)

    def test_both_directions(self) -> None:
        expected = "b (success)\n"
        expected += "used      a (success): artifacts/m.pt\n"
        expected += "used by   c (success): artifacts/m.pt\n"
        expected += "          d (success): artifacts/m.pt\n"
        self.assertEqual(self.ask("lineage", "results/exp/b"), (0, expected, ""))
        deep = self.ask("lineage", "results/exp/a")[1]
        self.assertEqual(deep.count("\n"), 4)
        self.assertIn("            c (success)", deep)

    def test_a_whole_run_that_was_used(self) -> None:
        self.make_run("exp/e")
        folder = self.tmp / "results/exp"
        run_utils.mark_artifact_used(folder / "a", folder / "e")
        out = self.ask("lineage", "results/exp/e")[1]
        self.assertIn("used      a (success): its directory\n", out)

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
        damaged = self.make_run("exp/damaged")
        (damaged / "metadata.json").write_text("{", "utf-8")
        code, _, err = self.ask("diff", str(a), str(damaged))
        self.assertEqual(code, 1)
        self.assertRegex(err, "^1 file cannot be read: .*damaged/metadata.json' is not")
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

    @unittest.skipUnless(GIT, "git is not installed")
    def test_one_run_against_here_and_now(self) -> None:
        subprocess.run(["git", "init", "-q", "."], check=True)
        self.in_context("pass")
        command = [PYTHON, "-m", "run_utils", "diff", "latest"]

        def diff() -> tuple[int, str]:
            done = subprocess.run(
                command, env=self.environment(), stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT, encoding="utf-8",
            )  # fmt: skip
            return done.returncode, done.stdout

        self.assertEqual(diff(), (0, ""))
        path = self.run_dir() / "metadata.json"
        facts = json.loads(path.read_text("utf-8"))
        facts["python"]["version"] = "2.7.18"
        path.write_text(json.dumps(facts), "utf-8")
        code, out = diff()
        self.assertEqual(code, 1)
        self.assertTrue(out.startswith("machine   python: 2.7.18 -> 3."), out)

    def test_trouble_is_2(self) -> None:
        self.assertEqual(self.ask("diff", "nothing")[0], 2)

    @unittest.skipUnless(GIT, "git is not installed")
    def test_the_commits_between(self) -> None:
        git = ["git", "-c", "user.name=x", "-c", "user.email=x@example.org"]
        commits = []
        subprocess.run(["git", "init", "-q", "."], check=True)
        for text in ("first", "second"):
            subprocess.run([*git, "commit", "-qm", text, "--allow-empty"], check=True)
            head = subprocess.run(["git", "rev-parse", "HEAD"], stdout=subprocess.PIPE)
            commits.append(head.stdout.decode().strip())
        program = self.tmp / "gpg"
        program.write_text("#!/bin/sh\ntouch started\n", "utf-8")
        program.chmod(0o755)
        settings = {"gpg.program": str(program), "log.showSignature": "true"}
        for name, value in settings.items():
            subprocess.run(["git", "config", name, value], check=True)
        for name, commit in zip("ab", commits):
            facts = {"commit_full": commit, "commit_short": commit[:7]}
            self.make_run(
                f"exp/{name}", metadata={"git": {**facts, "root": str(self.tmp)}}
            )
        out = self.ask("diff", "results/exp/a", "results/exp/b")[1]
        self.assertIn(f"            >{commits[1][:7]} second\n", out.replace("> ", ">"))
        self.assertFalse(os.path.exists("started"))


class Notes(ReadingCase):
    """Notes and tags are appended, by several people at once, and shown everywhere."""

    def test_a_tag_is_taken_away_without_a_word(self) -> None:
        run = self.make_run("exp/a", notes=[{"tags": ["canonical"]}])
        code, _, err = self.ask("note", "a", "--untag", "canonical")
        self.assertEqual((code, err, Run(run)["tags"]), (0, "", []))

    def test_tags_come_and_go(self) -> None:
        run = self.make_run("exp/a")
        done = self.ask("note", "a", "looks good", "--tag", "canonical")
        self.assertEqual(done, (0, f"noted in {run}\n", ""))
        self.assertEqual(self.ask("note", "a", "--tag", "x", "--tag", "y")[0], 0)
        self.assertEqual(self.ask("note", "a", "no more", "--untag", "canonical")[0], 0)
        self.assertEqual(Run(run)["tags"], ["x", "y"])
        self.assertEqual(self.rows("--tag", "x"), ["a"])
        self.assertIn("[x] [y] looks good; no more", self.ask("list")[1])
        out = self.ask("inspect", "a")[1]
        self.assertIn("tags      x y\n", out)
        self.assertRegex(
            out, r"notes     \S+Z \S+: looks good\n          .*: no more\n"
        )
        self.assertEqual([row["event"] for row in self.index()], ["note"] * 3)

    def test_several_runs_at_once(self) -> None:
        runs = [self.make_run(f"exp/{name}") for name in ("one", "two", "three")]
        self.assertEqual(self.ask("note", "one", "two", "both good")[0], 0)
        self.assertEqual(self.ask("note", "two", "three", "--tag", "keep")[0], 0)
        tags = [Run(run)["tags"] for run in runs]
        self.assertEqual(tags, [[], ["keep"], ["keep"]])
        texts = [[note["text"] for note in Run(run).notes] for run in runs]
        self.assertEqual(texts, [["both good"], ["both good", ""], [""]])
        self.assertEqual(self.ask("note", "one", "nothing", "text")[0], 2)
        self.assertEqual(len(Run(runs[0]).notes), 1)

    def test_64_at_once(self) -> None:
        self.make_run("exp/a")
        code = "import sys, run_utils\nfor n in range(4): "
        code += 'run_utils.main(["note", "results/exp/a", f"{sys.argv[1]}.{n}"])'
        command = [PYTHON, "-c", code]
        env = self.environment()
        writers = [
            subprocess.Popen([*command, str(n)], env=env, stdout=subprocess.DEVNULL)
            for n in range(16)
        ]
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


class Pruned(ReadingCase):
    """`prune` says which runs would go, and lets them go when it is told."""

    def test_what_is_said_and_what_goes(self) -> None:
        self.make_run("exp/a")
        self.make_run("exp/b", notes=[{"text": "why"}])
        code, out, err = self.ask("prune")
        self.assertEqual((code, err), (0, ""))
        self.assertRegex(out, r"(?m)^exp/a \(success, \d+d.* old, \d+ B\): would go$")
        self.assertRegex(out, r"(?m)^exp/b \(.*\): it has a note$")
        self.assertRegex(
            out, r"\n1 run, \d+ B: --yes moves to .trash, --purge deletes\n$"
        )
        rows = json.loads(self.ask("prune", "--json")[1])
        refused = {row["run_dir"][-1]: row["refused"] for row in rows}
        self.assertEqual(refused, {"a": None, "b": "it has a note"})
        trash = self.tmp / "results/.trash/exp/a"
        out = self.ask("prune", "--yes")[1]
        self.assertRegex(out, rf"(?m)^exp/a \(.*\): is now {re.escape(str(trash))}$")
        self.assertNotIn("--yes", out)
        self.assertEqual((self.names(), trash.exists()), (["b"], True))
        self.make_run("exp/a")
        out = self.ask("prune", "--json", "--purge")[1]
        self.assertEqual(len(json.loads(out)), 2)
        self.assertEqual(self.names(), ["b"])


class Reindexing(ReadingCase):
    """`reindex` rebuilds the index from the directories alone."""

    def test_one_line_a_run_oldest_first(self) -> None:
        for day in (2, 1):
            start = {"started_utc": f"2026-01-0{day}T00:00:00Z"}
            facts = {"git": {"commit_short": "1a2b3c4"}}
            name = f"exp/t-2026010{day}-000000"
            self.make_run(name, status=start, metadata=facts)
        self.assertEqual(
            self.ask("reindex", "--dry-run")[1],
            "2 runs: 2 added, 0 removed, if it were done\n",
        )
        self.assertFalse((self.tmp / "results/index").exists())
        self.assertEqual(self.ask("reindex")[1], "2 runs: 2 added, 0 removed\n")
        rows = self.index()
        paths = ["exp/t-20260101-000000", "exp/t-20260102-000000"]
        self.assertEqual([row["path"] for row in rows], paths)
        keys = ("event", "status", "script_name", "git_commit_short")
        facts_of_rows = {tuple(row[key] for key in keys) for row in rows}
        expected = {("backfill", "success", "train", "1a2b3c4")}
        self.assertEqual(facts_of_rows, expected)
        before = (self.tmp / "results/index/runs_index.jsonl").read_bytes()
        self.ask("reindex")
        again = (self.tmp / "results/index/runs_index.jsonl").read_bytes()
        self.assertEqual(before, again)
        shutil.rmtree("results/exp/t-20260101-000000")
        self.assertEqual(self.ask("reindex")[1], "1 run: 0 added, 1 removed\n")

    def test_lines_that_runs_append_meanwhile_stay(self) -> None:
        run = self.make_run("exp/a")
        rebuild = run_utils._rebuilt_index

        def slowly(root: Path) -> Any:
            rows = rebuild(root)
            run_utils._Record.at(run).tell_index("end", "late")
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
        self.ask("reindex", "results")
        (row,) = self.index()
        facts = [row[key] for key in ("event", "status", "exit_reason", "script_name")]
        self.assertEqual(facts, ["backfill", "failed", "x", "old"])

    def test_a_link_in_the_place_of_the_index_is_not_followed(self) -> None:
        self.make_run("exp/a")
        (self.tmp / "mine.txt").write_text("precious", "utf-8")
        os.mkdir("results/index")
        os.symlink(self.tmp / "mine.txt", "results/index/runs_index.jsonl")
        self.assertEqual(self.ask("reindex", "results")[0], 2)
        self.assertEqual((self.tmp / "mine.txt").read_text("utf-8"), "precious")


class Auditing(ReadingCase):
    """Secrets in runs, also in those of the ancestors, are found and never told."""

    SECRETS = ("ghp_" + "A1b2" * 9, "h0rse-battery-9")

    def make(self, name: str, **files: str) -> Path:
        run = self.tmp / "results" / "exp" / name
        (run / "logs").mkdir(parents=True)
        (run / "status.json").write_text('{"status": "success"}', "utf-8")
        for file, text in files.items():
            path = run / file.replace("__", "/").replace("_", ".")
            path.write_text(text, "utf-8")
        return run

    def audit(self, *words: str, **options: Any) -> Any:
        done = self.command("audit", *words, **options)
        self.assertEqual(done.stderr, "")
        for secret in self.SECRETS:
            self.assertNotIn(secret, done.stdout)
        return done

    def test_no_file_at_all(self) -> None:
        out = self.ask("audit", ".")[1]
        self.assertEqual(out, "no places with a secret; no files searched\n")

    def test_a_clean_tree(self) -> None:
        self.in_context("log_metrics(run_dir, {'loss': 1.0})")
        done = self.audit("results")
        self.assertRegex(done.stdout, r"^no places with a secret; \d+ files searched")
        self.assertEqual(done.returncode, 0)

    def test_where_secrets_are(self) -> None:
        token, password = self.SECRETS
        run = self.make(
            "old-20240131-142501",
            config_yaml=f"a:\n  hf_token: {token}\n  lr: 0.1\n",
            metadata_json=json.dumps({"argv": ["python", "--password", password]}),
            logs__out_log=f"line one\nusing {token}\nand {password}\n",
            rows_jsonl=json.dumps({"a": 1}) + "\n" + json.dumps({"url": token}) + "\n",
        )
        (run / "model.bin").write_bytes(b"\0 " + token.encode())
        os.symlink(run / "logs" / "out.log", run / "logs" / "again.log")
        (self.tmp / "results" / "index").mkdir()
        index = self.tmp / "results" / "index" / "runs_index.jsonl"
        index.write_text(json.dumps({"note": password}) + "\n", "utf-8")
        done = self.audit("results")
        start = "exp/old-20240131-142501/"
        expected = {
            f"{start}config.yaml: line 2", f"{start}metadata.json: line 1",
            f"{start}logs/out.log: line 2", f"{start}logs/out.log: line 3",
            f"{start}rows.jsonl: line 2", "index/runs_index.jsonl: line 1",
            f"{start}model.bin: in a binary file",
        }  # fmt: skip
        *places, total, todo = done.stdout.splitlines()
        self.assertEqual(set(places), expected)
        self.assertIn("7 places with a secret; 7 files searched", total)
        self.assertTrue(todo.startswith("revoke what is valid"))
        self.assertEqual(done.returncode, 1)
        facts = json.loads(self.audit("results", "--json").stdout)
        self.assertEqual((len(facts["found"]), facts["binary"]), (7, 1))

    def test_what_is_secret_in_the_environment_is_searched(self) -> None:
        password = self.SECRETS[1]
        self.make("old-20240131-142501", logs__out_log=f"said {password}\n")
        done = self.audit("results", env={"SERVICE_PASSWORD": password})
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


class TheEnvironment(ReadingCase):
    """`env` says what would be recorded here and now, and leaves nothing behind."""

    def test_text_and_json(self) -> None:
        before = sorted(os.listdir(tempfile.gettempdir()))
        done = self.command("env", "--json")
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        facts = json.loads(done.stdout)
        self.assertEqual(facts["run_utils"]["version"], run_utils.__version__)
        self.assertEqual(facts["working_dir"], str(self.tmp))
        self.assertIn("git", facts["capture"])
        done = self.command("env")
        self.assertIn("\nhostname: ", done.stdout)
        left = set(os.listdir(tempfile.gettempdir())) - set(before)
        self.assertFalse([name for name in left if name.startswith("run_utils-env")])
        self.assertEqual(self.run_dirs(), [])


# === vendor.sh ===
# Run by dash and by bash; the checks of .ci have the tools that must pass a copy over.

CHECKOUT = Path(run_utils.__file__).resolve().parent
OURS = ("__init__.py", "__main__.py", "LICENSE")
LICENCE = "# SPDX-FileCopyrightText: us\n# SPDX-License-Identifier: MIT\n"
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
        text = f'"""Record."""\n__version__ = "{version}"\n__vendored__ = None\n'
        path = self.checkout / "run_utils.py"
        path.write_text(LICENCE + text + last_line, encoding="utf-8")

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
            env=env or {**os.environ, "XDG_STATE_HOME": str(self.folder / "state")},
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

    def backups(self) -> dict[str, bytes]:
        folder = self.folder / "state" / "run_utils"
        return {path.name: path.read_bytes() for path in folder.glob("*")}

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

    def test_only_stamp_and_notices_differ_from_the_source(self) -> None:
        self.vendor(self.package)
        source = (self.checkout / "run_utils.py").read_bytes()
        blob = hashlib.sha1(b"blob %d\0" % len(source) + source).hexdigest()
        stamp = f'__vendored__ = "1.2.0 {blob}"'.encode()
        stamped = source.replace(b"__vendored__ = None", stamp).splitlines()
        lines = (self.copy / "__init__.py").read_bytes().splitlines()
        self.assertEqual((lines[:2], lines[11:]), (stamped[:2], stamped[2:]))
        notices = lines[2:11]
        self.assertEqual({line[:2] for line in notices}, {b"# "})
        for notice in (b"# fmt: off", b"# ruff: noqa", b"# pylint: skip-file"):
            self.assertIn(notice, notices)
        program = (self.copy / "__main__.py").read_bytes().splitlines()
        self.assertEqual(program[:11], lines[:11])
        expected = [b"from . import main", b"", b"raise SystemExit(main())"]
        self.assertEqual(program[11:], expected)

    def test_hooks_that_grep_find_nothing(self) -> None:
        """Those of pre-commit's pygrep-hooks heed none of the notices."""
        refused = [
            r"(?i)# noqa(?!: )",
            r"# type:? *ignore(?!\[|\w)",
            r"# type: (?!ignore([^a-zA-Z0-9]|$))",
            r"\beval\(",
            r"(?<!warnings)\.warn\(",
            "\N{REPLACEMENT CHARACTER}",
        ]
        shutil.copy(CHECKOUT / "run_utils.py", self.checkout)
        self.vendor(self.package)
        text = (self.copy / "__init__.py").read_text("utf-8")
        for pattern in refused:
            self.assertIsNone(re.search(pattern, text), pattern)

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
        text = f'"""Record."""\n__version__ = "1.2.0"\n{line}'
        source.write_text(LICENCE + text, encoding="utf-8")
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

    def test_copy_of_version_1_without_notices(self) -> None:
        self.vendor(self.package)
        path = self.copy / "__init__.py"
        lines = path.read_text("utf-8").splitlines(keepends=True)
        path.write_text("".join(lines[:2] + lines[11:]), "utf-8")
        program = "from . import main\n\nraise SystemExit(main())\n"
        (self.copy / "__main__.py").write_text(program, "utf-8")
        self.release("2.0.0")
        self.assertEqual(self.vendor(self.package), (0, "1.2.0 -> 2.0.0\n", ""))
        self.assertIn("# fmt: off\n", path.read_text("utf-8"))

    def test_lost_file_is_put_back(self) -> None:
        self.vendor(self.package)
        (self.copy / "LICENSE").unlink()
        self.assertEqual(self.vendor(self.package)[0], 0)
        self.assertEqual(sorted(self.contents()), sorted(OURS))


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


class VendorForce(VendorCase):
    """--force replaces anything, and what was there stays in a numbered backup."""

    def test_edited_copy_is_kept_as_backup(self) -> None:
        self.vendor(self.package)
        edited = self.edit("__init__.py").read_bytes()
        self.release("1.3.0")
        kept = f"kept __init__.py as {self.folder}/state/run_utils/__init__.py.1\n"
        answer = self.vendor("--force", self.package)
        self.assertEqual(answer, (0, f"{kept}1.2.0 -> 1.3.0\n", ""))
        self.assertEqual(self.backups(), {"__init__.py.1": edited})
        self.assertEqual(sorted(self.contents()), sorted(OURS))
        self.assertEqual(self.vendor("--check", self.package)[0], 0)

    def test_older_backup_is_never_overwritten(self) -> None:
        self.vendor(self.package)
        for text in ("# one\n", "# two\n", "# three\n"):
            self.edit("__init__.py", text)
            self.vendor("--force", self.package)
        backups = [self.backups()[f"__init__.py.{n}"] for n in (1, 2, 3)]
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
        names = {"LICENSE.1", "__init__.py.1", "__init__.py.2"}
        self.assertEqual({*self.backups()}, names)

    def test_without_a_place_for_the_backup_nothing_is_replaced(self) -> None:
        self.vendor(self.package)
        self.edit("__init__.py")
        (self.folder / "state").write_text("", encoding="utf-8")
        folder = f"{self.folder}/state/run_utils"
        why = f"cannot create {folder}, for a backup"
        self.assert_refused(why, "--force", self.package)

    def test_nothing_to_force_leaves_no_backup(self) -> None:
        self.vendor(self.package)
        answer = self.vendor("--force", self.package)
        self.assertEqual(answer, (0, "1.2.0 is current\n", ""))
        self.assertEqual(self.backups(), {})


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


class VendorUsage(VendorCase):
    """Wrong usage is one sentence and status 2."""

    def assert_misused(self, sentence: str, *argv: str | Path) -> None:
        text = f"vendor.sh: {sentence}; see vendor.sh --help\n"
        self.assertEqual(self.vendor(*argv), (2, "", text))

    def test_sentences(self) -> None:
        self.assert_misused("PACKAGE_DIR is missing")
        self.assert_misused("PACKAGE_DIR is missing", "--check")
        how = "give the folder of your package, or make a new one with mkdir -p"
        self.assert_misused(f"no such directory: ''; {how}", "")
        sentence = f"no such directory: 'src/mypkg'; {how}"
        self.assert_misused(sentence, "--force", "src/mypkg")
        self.assert_misused("one PACKAGE_DIR is wanted, not 2", "a", "b")
        self.assert_misused("unknown option '--ceck'", "--ceck", self.package)
        self.vendor(self.package)
        sentence = f"'{self.copy}' is a copy; give the folder it is in"
        self.assert_misused(sentence, self.copy)
        self.assert_misused(sentence, "--check", self.copy)
        self.assertEqual(sorted(self.contents()), sorted(OURS))
        shutil.rmtree(self.copy)
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
        subprocess.run(argv, cwd=self.folder / "src", check=True, capture_output=True)
        (run_dir,) = (self.folder / "src").glob("runs/*/metadata.json")
        done = self.module("inspect", str(run_dir.parent))
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        self.assertIn(run_dir.parent.name, done.stdout)

    def test_program_name_is_the_copy_s(self) -> None:
        done = self.module("--no-such-option")
        self.assertEqual(done.returncode, 2)
        self.assertIn("-m pkg.run_utils", done.stderr)


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
    """Ends with what was skipped, the time, and a line of counts."""

    def __init__(self, **options: Any) -> None:
        options["resultclass"] = CountingResult
        # With stderr closed, what calls us may hand in a descriptor to report on.
        if sys.stderr is None:
            descriptor = os.environ.get("RUN_UTILS_TEST_FD")
            report: Any = int(descriptor) if descriptor else os.devnull
            options["stream"] = open(report, "w", encoding="utf-8")  # noqa: SIM115
        super().__init__(**options)

    def run(self, test: Any) -> Any:
        began = time.monotonic()
        result: Any = super().run(test)
        for case, reason in result.skipped:
            name = case.id().replace("__main__.", "")
            self.stream.write(f"SKIP {name}: {reason}\n")
        lost = result.failures + result.errors + result.unexpectedSuccesses
        self.stream.write(f"All of it took {time.monotonic() - began:.0f} s.\n")
        counts = f"{result.passed} passed, {len(lost)} failed"
        self.stream.write(f"{counts}, {len(result.skipped)} skipped\n")
        self.stream.flush()
        return result


def run_in_shards(command: list[str]) -> int:
    """Run this file as some processes, each with a share of the classes.

    There is one more than cores, since many tests wait for something.
    """
    count = min(os.cpu_count() or 1, 7) + 1
    began = time.monotonic()
    shards = []
    for number in range(count):
        words = [*command, "--shard", f"{number}/{count}"]
        output = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115
        child = subprocess.Popen(words, stdout=output, stderr=subprocess.STDOUT)
        shards.append((child, output))
    counts = [0, 0, 0]
    for child, output in shards:
        child.wait()
        output.seek(0)
        said = output.read()
        line = r"^(\d+) passed, (\d+) failed, (\d+) skipped\n"
        found = re.findall(line, said, re.M)
        print(re.sub(line, "", said, flags=re.M), end="", file=sys.stderr)
        numbers = [0, 1, 0]  # it has not come to its end
        if found:
            numbers = [int(text) for text in found[-1]]
        counts = [one + other for one, other in zip(counts, numbers)]
    print(f"All of it took {time.monotonic() - began:.0f} s.", file=sys.stderr)
    print("{} passed, {} failed, {} skipped".format(*counts), file=sys.stderr)
    return int(counts[1] > 0 or counts[0] == 0)


def load_tests(loader: Any, tests: Any, pattern: Any) -> Any:
    """Leave only the share of a shard: every n-th class."""
    if SHARD is None:
        return tests
    number, count = SHARD
    return unittest.TestSuite(list(tests)[number::count])


SHARD: tuple[int, int] | None = None


if __name__ == "__main__":
    typed = getattr(
        sys, "orig_argv", None
    )  # not in Python 3.9, which runs them in turn
    if sys.argv[1:2] == ["--shard"]:
        number_of, _, count_of = sys.argv.pop(2).partition("/")
        del sys.argv[1]
        SHARD = int(number_of), int(count_of)
    elif typed and len(sys.argv) == 1 and sys.stderr is not None:
        sys.exit(run_in_shards(typed))
    unittest.main(testRunner=CountingRunner)
