#!/usr/bin/env python3
# SPDX-FileCopyrightText: 2026 the run_utils authors
# SPDX-License-Identifier: MIT
"""Run every check of run_utils and add them up in the last line.

A NAME is how the names of steps begin: `.ci/run mypy ruff`, `.ci/run tests-3.9`.
Python packages go into a cache outside the tree. Debian packages are installed by
root only, with --install or CI=true. What this machine cannot run is reported as
`SKIP name: reason`. The logs of the last run are kept in the cache, in logs/.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parent.parent
CORPORA = ROOT.parent / "shared" / "corpora"
VERSIONS = ["3.9", "3.10", "3.11", "3.12", "3.13", "3.14"]
TOOLS_VERSION = "3.11"  # of the environment with all libraries
STEP_SECONDS = 900
SKIPPED = 75  # exit status of a step that this machine cannot run
FILES = ["run_utils.py", "test_run_utils.py", "vendor.sh", "README.md", "LICENSE"]
FILES += [".ci", ".github", ".gitignore"]

# Programs of the wider checks, and the Debian package of each.
PROGRAMS = {
    "strace": "strace", "shellcheck": "shellcheck", "jq": "jq", "dash": "dash",
    "setpriv": "util-linux", "unshare": "util-linux", "mpirun": "openmpi-bin",
    "node": "nodejs", "npm": "npm", "dot": "graphviz", "munged": "munge",
    "slurmctld": "slurmctld", "slurmd": "slurmd", "srun": "slurm-client",
    "chromium": "chromium",
}  # fmt: skip
NODE_PACKAGES = [
    "js-yaml@4.3.2", "mermaid@11.17.2", "jsdom@22.1.0", "playwright-core@1.65.1",
    "html-validate@10.17.0", "axe-core@4.14.1",
]  # fmt: skip


class Step:
    """One check: a name, what runs, and what it needs.

    `python` is "bare" for a Python with nothing installed, of a version, or "tools"
    for the environment with all libraries. A word {tree} stands for a copy of the
    tree. `counts` says that the last line of its output has counts.
    """

    def __init__(
        self,
        name: str,
        argv: list[str],
        python: str = "",
        counts: bool = True,
        needs: tuple[str, ...] = (),
        env: dict[str, str] | None = None,
        alone: bool = False,
    ) -> None:
        self.name = name
        self.argv = argv
        self.python = python
        self.counts = counts
        self.needs = needs
        self.env = env or {}
        self.alone = alone


def suite(name: str, version: str, *flags: str, **options: object) -> Step:
    """Return the step that runs all tests on a bare Python."""
    argv = [*flags, "{tree}/test_run_utils.py"]
    return Step(f"tests-{name}", argv, python=version, **options)  # type: ignore


def tool(name: str, *argv: str) -> Step:
    return Step(name, list(argv), counts=False, needs=(argv[0],))


OURS = ["run_utils.py", "test_run_utils.py"]
MYPY = ["mypy", "--config-file", ".ci/mypy.ini"]

STEPS = [
    # First what the README promises: a Python with nothing installed.
    Step("tests", ["test_run_utils.py"], python="default"),
    *[suite(version, version) for version in ("3.13", "3.14")],
    # Variants that cannot hide one another go together, on the other versions.
    suite("isolated-optimised", "3.10", "-I", "-OO"),
    suite("no-home-no-streams", "3.12", env={"SURROUNDINGS": "deleted closed"}),
    suite("c-locale", "3.9", "-X", "utf8=0", "-X", "warn_default_encoding",
          "-W", "error", env={"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"}),
    suite("no-git", "3.13", env={"SURROUNDINGS": "no-git"}),
    suite("unknown-uid", "system", env={"SURROUNDINGS": "unknown-uid"}),
    Step("tests-pytest-pyyaml", ["-m", "pytest", "-q", "-p", "no:cacheprovider",
         "{tree}/test_run_utils.py"], python="tools"),
    tool("ruff", "ruff", "check", "--no-cache", "--config", ".ci/ruff.toml", *OURS,
         ".ci"),
    tool("mypy", *MYPY, "--python-version", "3.10", "run_utils.py", ".ci"),
    tool("mypy-macos", *MYPY, "--platform", "darwin", "run_utils.py"),
    tool("mypy-windows", *MYPY, "--platform", "win32", "run_utils.py"),
    tool("shellcheck", "shellcheck", "vendor.sh", ".ci/run"),
    # The wider checks, each a script of its own; they add themselves up.
    *[Step(path.stem, [f".ci/{path.name}"], python="tools")
      for path in sorted((ROOT / ".ci").glob("check_*.py"))
      if path.name != "check_mutation.py"],  # on demand: it takes hours
    # Alone, for its figures' sake, which judge nothing on a shared machine.
    Step("bench", [".ci/bench.py", "--quick"], python="tools", counts=False,
         alone=True),
]  # fmt: skip


def main() -> int:
    args = parse_arguments()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    with Workplace(install=args.install) as place:
        place.prepare()
        waiting = [step for step in STEPS if is_wanted(step, args.names)]
        if not args.names:
            twin = f"tests-{place.default}"  # the first step is this already
            waiting = [step for step in waiting if step.name != twin]
        done = run_all(waiting, place, args.jobs)
        place.check_tree()
        return summarise(done, place)


def run_all(waiting: list[Step], place: Workplace, jobs: int) -> list[Run]:
    """Run the steps in order, some side by side; report each when it ends."""
    running: list[Run] = []
    done: list[Run] = []
    try:
        while waiting or running:
            while waiting and has_room(waiting[0], running, jobs):
                running.append(Run(waiting.pop(0), place))
            time.sleep(0.05)
            for run in [run for run in running if run.has_ended()]:
                running.remove(run)
                done.append(run)
                run.report()
    finally:
        for run in running:  # we were interrupted
            run.stop()
    return done


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=".ci/run", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("names", metavar="NAME", nargs="*", help="how names begin")
    parser.add_argument("--jobs", type=int, default=2, help="steps side by side (2)")
    in_ci = os.environ.get("CI") == "true"
    parser.add_argument("--install", action="store_true", default=in_ci,
                        help="install Debian packages")  # fmt: skip
    return parser.parse_args()


def is_wanted(step: Step, names: list[str]) -> bool:
    return not names or any(step.name.startswith(name) for name in names)


def has_room(step: Step, running: list[Run], jobs: int) -> bool:
    if step.alone or any(run.step.alone for run in running):
        return not running
    return len(running) < jobs


class Workplace:
    """What the steps need: a copy of the tree, Pythons, tools, a place for logs."""

    def __init__(self, install: bool) -> None:
        self.may_install = install and os.geteuid() == 0
        home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        self.cache = Path(os.environ.get("RUN_UTILS_CI_CACHE", f"{home}/run_utils-ci"))
        self.pythons: dict[str, str] = {}  # of a version, with nothing installed
        self.default = ""  # the version of `python3`
        self.began = time.monotonic()
        self.notes: list[str] = []  # what could not be had
        self.problems: list[str] = []

    def __enter__(self) -> Workplace:
        self.work = Path(tempfile.mkdtemp(prefix="run_utils-ci-"))
        self.work.chmod(0o755)
        self.tree = self.work / "tree"
        self.logs = self.work / "logs"
        self.logs.mkdir()
        self.cache.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(self, *unused: object) -> None:
        kept = self.cache / "logs"
        shutil.rmtree(kept, ignore_errors=True)
        shutil.copytree(self.logs, kept, dirs_exist_ok=True)
        shutil.rmtree(self.work, ignore_errors=True)

    def prepare(self) -> None:
        self.before = describe_tree()
        self.tree.mkdir()
        for name in FILES:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, self.tree / name)
            elif source.exists():
                shutil.copy2(source, self.tree / name)
        subprocess.run(["chmod", "-R", "a+rX", str(self.work)], check=True)
        self.install_programs()
        self.find_pythons()
        self.install_tools()

    def install_programs(self) -> None:
        missing = [name for name in PROGRAMS if shutil.which(name) is None]
        if missing and self.may_install and shutil.which("apt-get"):
            packages = sorted({PROGRAMS[name] for name in missing})
            apt = ["apt-get", "-o", "DPkg::Lock::Timeout=120", "-q", "-y"]
            env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
            with open(self.logs / "apt.log", "wb") as log:
                options = {"stdout": log, "stderr": log, "env": env}
                subprocess.run([*apt, "update"], **options)  # type: ignore
                for package in packages:
                    words = ["install", "--no-install-recommends", package]
                    subprocess.run([*apt, *words], **options)  # type: ignore
        for name in missing:
            if shutil.which(name) is None:
                self.notes.append(f"SKIP {name}: it is not on this machine")

    def find_pythons(self) -> None:
        """Make a bare environment of each version that this machine has."""
        for version in VERSIONS:
            source = find_python(version)
            folder = self.work / "bare" / version
            if source and make_environment(source, folder, with_pip=False):
                self.pythons[version] = str(folder / "bin" / "python")
        self.default = "{}.{}".format(*sys.version_info[:2])
        answer = subprocess.run(
            ["python3", "-c", "import sys; print('%d.%d' % sys.version_info[:2])"],
            capture_output=True, encoding="utf-8",
        )  # fmt: skip
        if answer.stdout.strip() in self.pythons:
            self.default = answer.stdout.strip()
        self.pythons["default"] = self.pythons[self.default]
        for path in ("/usr/bin/python3", sys.executable):  # a uid without rights can
            if os.access(path, os.X_OK):
                self.pythons["system"] = path
                break

    def install_tools(self) -> None:
        """Make one environment for each state of the requirements, with a lock."""
        wanted = (ROOT / ".ci" / "requirements.txt").read_text("utf-8")
        wanted += " ".join(NODE_PACKAGES)
        key = hashlib.sha256(wanted.encode()).hexdigest()[:12]
        version = TOOLS_VERSION
        if version not in self.pythons:
            version = next(iter(self.pythons))
        folder = self.cache / f"tools-{version}-{key}"
        self.tools = folder / "bin" / "python"
        with open(self.cache / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (folder / "finished").exists():
                with open(self.logs / "install.log", "wb") as log:
                    self.fill_tools(folder, version, log)

    def fill_tools(self, folder: Path, version: str, log: IO[bytes]) -> None:
        """Install all at once; if that fails, what can be installed on its own."""
        source = find_python(version)
        if not self.tools.exists() and source:
            make_environment(source, folder, with_pip=True)
        pip = [str(self.tools), "-m", "pip", "--disable-pip-version-check"]
        pip += ["install", "-q"]
        requirements = ROOT / ".ci" / "requirements.txt"
        is_complete = succeeds([*pip, "-r", str(requirements)], log)
        if not is_complete:
            for line in requirements.read_text("utf-8").splitlines():
                if line and line[0] != "#" and not succeeds([*pip, line], log):
                    self.notes.append(f"SKIP {line}: it could not be installed")
        if shutil.which("npm"):
            words = ["npm", "install", "--silent", "--no-save", "--prefix"]
            words += [str(self.cache / "node"), *NODE_PACKAGES]
            if not succeeds(words, log):
                self.notes.append("SKIP npm packages: they could not be installed")
                is_complete = False
        if is_complete:
            (folder / "finished").touch()

    def check_tree(self) -> None:
        """No check may leave anything in the tree."""
        if describe_tree() != self.before:
            self.problems.append("FAIL tree: a check has changed it")


def succeeds(words: list[str], log: IO[bytes]) -> bool:
    """Run a command with its output in a log."""
    return subprocess.run(words, stdout=log, stderr=log).returncode == 0


def find_python(version: str) -> str | None:
    """Return a CPython of that version: from pyenv, PATH or uv."""
    root = os.environ.get("PYENV_ROOT") or os.path.expanduser("~/.pyenv")
    paths = Path(root, "versions").glob(f"{version}.*/bin/python3")
    candidates = [str(path) for path in paths]
    candidates.append(f"python{version}")
    if shutil.which("uv"):
        words = ["uv", "python", "find", "--offline", "--no-project", version]
        found = subprocess.run(words, capture_output=True, encoding="utf-8")
        candidates += found.stdout.split()
    code = "import sys, venv; print(sys.implementation.name, '%d.%d' % "
    code += "sys.version_info[:2])"
    for path in candidates:
        with contextlib.suppress(OSError):
            words = [path, "-I", "-c", code]
            answer = subprocess.run(words, capture_output=True, encoding="utf-8")
            if answer.stdout.split() == ["cpython", version]:
                return path
    return None


def make_environment(python: str, folder: Path, with_pip: bool) -> bool:
    words = [python, "-m", "venv", str(folder)]
    if not with_pip:
        words.insert(3, "--without-pip")
    return subprocess.run(words, capture_output=True).returncode == 0


def describe_tree() -> str:
    """Return a line for the branch, and one for every changed or new file."""
    words = ["git", "status", "--branch", "--porcelain", "--ignored", "-uall"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, encoding="utf-8")
    lines = [line for line in done.stdout.splitlines() if "__pycache__" not in line]
    return "\n".join(lines)


class Run:
    """A step that runs, and what came of it."""

    def __init__(self, step: Step, place: Workplace) -> None:
        self.step = step
        self.place = place
        self.began = time.monotonic()
        self.log = place.logs / f"{step.name}.log"
        self.passed = self.failed = self.skipped = 0
        self.child: subprocess.Popen[bytes] | None = None
        reason = self.missing()
        with open(self.log, "wb") as log:
            if reason is not None:
                log.write(f"SKIP {step.name}: {reason}\n".encode())
            else:
                self.child = self.start(log)

    def missing(self) -> str | None:
        """Return why this machine cannot run the step, or None."""
        python = self.step.python
        if python == "tools":
            if not self.place.tools.exists():
                return "its Python environment could not be installed"
        elif python and python not in self.place.pythons:
            return f"no CPython {python} on this machine"
        for name in self.step.needs:
            if self.which(name) is None:
                return f"{name} could not be installed"
        return None

    def which(self, name: str) -> str | None:
        return shutil.which(name, path=self.path())

    def path(self) -> str:
        return f"{self.place.tools.parent}{os.pathsep}{os.environ['PATH']}"

    def start(self, log: IO[bytes]) -> subprocess.Popen[bytes]:
        """Start the step in its surroundings, as a process group of its own."""
        argv = [word.replace("{tree}", str(self.place.tree)) for word in self.step.argv]
        env = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
        for name in ("VIRTUAL_ENV", "RUN_DIR", "CDPATH"):
            env.pop(name, None)
        env.update(self.step.env)
        env["NODE_PATH"] = str(self.place.cache / "node" / "node_modules")
        python = self.step.python
        if python == "tools":
            argv = [str(self.place.tools), *argv]
            env["PATH"] = self.path()
            if CORPORA.is_dir():
                env["RUN_UTILS_CORPORA"] = str(CORPORA)
        elif python:
            argv = [self.place.pythons[python], *argv]
        else:
            argv[0] = self.which(argv[0]) or argv[0]
        argv, cwd = self.surrounded(argv, env)
        return subprocess.Popen(
            argv, cwd=cwd, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            start_new_session=True, preexec_fn=default_signals,
        )  # fmt: skip

    def surrounded(
        self, argv: list[str], env: dict[str, str]
    ) -> tuple[list[str], Path]:
        """Return the command and its directory in the surroundings it asks for."""
        wanted = env.pop("SURROUNDINGS", "").split()
        if "deleted" in wanted:
            for name in ("HOME", "USER", "LOGNAME"):
                env.pop(name, None)
            env["RUN_UTILS_TEST_FD"] = "9"
            shell = 'cd "$(mktemp -d)" && rmdir "$PWD" && exec "$@" 9>&1 <&- >&- 2>&-'
            argv = ["sh", "-c", shell, "sh", *argv]
        if "no-git" in wanted:
            folder = self.place.work / "without-git"
            link_programs(folder, leave_out="git")
            env["PATH"] = str(folder)
        if "unknown-uid" in wanted:
            env.update(HOME="/", TMPDIR="/tmp")
            for name in ("USER", "LOGNAME"):
                env.pop(name, None)
            if os.geteuid() == 0 and shutil.which("setpriv"):
                user = ["setpriv", "--reuid=54321", "--regid=54321", "--clear-groups"]
            else:
                user = ["unshare", "--user", "--map-user=54321"]
            argv = [*user, *argv]
        return argv, self.place.tree

    def has_ended(self) -> bool:
        if self.child is None:
            return True
        if time.monotonic() - self.began > STEP_SECONDS:
            self.stop()
        return self.child.poll() is not None

    def stop(self) -> None:
        """Kill the step with all that it started."""
        if self.child is not None:
            with contextlib.suppress(OSError):
                os.killpg(self.child.pid, signal.SIGKILL)

    def report(self) -> None:
        """Count what passed and say it in one line; show the log of a failure."""
        text = self.log.read_text("utf-8", "replace")
        status = 0 if self.child is None else self.child.returncode
        if self.child is None or status == SKIPPED:
            self.skipped = 1
        elif self.step.counts:
            self.passed, self.failed, self.skipped = read_counts(text)
            if not self.failed and (status or not self.passed + self.skipped):
                self.failed = 1
        else:
            self.failed = int(status != 0)
            self.passed = 1 - self.failed
        seconds = time.monotonic() - self.began
        word = "FAIL" if self.failed else "ok"
        counts = f"{self.passed} passed, {self.failed} failed, {self.skipped} skipped"
        print(f"{word:4} {seconds:4.0f} s  {self.step.name:22} {counts}", flush=True)
        if self.failed:
            lines = [line for line in text.splitlines() if line[:5] != "SKIP "]
            for line in lines[-150:]:
                print(f"    {self.step.name} | {line}", flush=True)


def default_signals() -> None:
    """Undo what nohup, or a shell in the background, has made us ignore."""
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGPIPE):
        signal.signal(number, signal.SIG_DFL)


def link_programs(folder: Path, leave_out: str) -> None:
    """Make a folder with all programs of PATH but some."""
    folder.mkdir(exist_ok=True)
    for place in os.environ["PATH"].split(os.pathsep):
        with contextlib.suppress(OSError):
            for name in os.listdir(place):
                if not name.startswith(leave_out):
                    with contextlib.suppress(FileExistsError):
                        (folder / name).symlink_to(os.path.join(place, name))


def read_counts(text: str) -> tuple[int, int, int]:
    """Return passed, failed and skipped of the last line of counts, ours or pytest's.

    41 passed, 0 failed, 2 skipped
    1 failed, 40 passed, 12 subtests passed in 3.21s
    """
    found: dict[str, int] = {}
    for line in text.splitlines():
        pairs = re.findall(r"(\d+) (passed|failed|skipped|errors?)\b", line)
        if pairs and re.search(r"(passed|failed|skipped|error)", line):
            found = {word.rstrip("s"): int(number) for number, word in pairs}
    failed = found.get("failed", 0) + found.get("error", 0)
    return found.get("passed", 0), failed, found.get("skipped", 0)


def summarise(done: list[Run], place: Workplace) -> int:
    """Print the benchmark's figures, what was skipped and why, and the sum of all."""
    skips = list(place.notes)
    for run in done:
        text = run.log.read_text("utf-8", "replace")
        if run.step.name == "bench":
            print("\n" + text)
        skips += [line for line in text.splitlines() if line.startswith("SKIP ")]
    for line in [*shorten(skips), *place.problems]:
        print(line)
    passed = sum(run.passed for run in done)
    failed = sum(run.failed for run in done) + len(place.problems)
    skipped = sum(run.skipped for run in done)
    print(f"All of it took {time.monotonic() - place.began:.0f} s.")
    print(f"{passed} passed, {failed} failed, {skipped} skipped")
    return int(failed > 0 or passed == 0)


def shorten(skips: list[str]) -> list[str]:
    """Return one line for each reason.

    SKIP RunningItAgain.test_the_same_files and 94 more: git is not installed
    """
    names: dict[str, set[str]] = {}
    for line in skips:
        name, _, reason = line[len("SKIP ") :].partition(": ")
        names.setdefault(reason, set()).add(name)
    lines = []
    for reason, which in sorted(names.items()):
        more = ""
        if len(which) > 1:
            more = f" and {len(which) - 1} more"
        lines.append(f"SKIP {min(which)}{more}: {reason}")
    return lines


if __name__ == "__main__":
    sys.exit(main())
