#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
# SPDX-FileCopyrightText: 2026 the run_utils authors
"""Measure what recording costs: python3 .ci/bench.py [--quick] [--strict] [NAME ...]

Each scenario is measured in turns with a floor, the least that its work can cost on
this machine, so that a busy moment strikes both. The programs run with the Python that
runs this one, which should have PyYAML and about 100 packages as its users have, in a
git repository of 2,000 files with one changed; the byte code cache is warm. With
--strict the exit status is 1 when a ratio of medians is above its limit.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

RUN_UTILS = Path(__file__).resolve().parent.parent / "run_utils.py"
HEADER = (
    f"{'milliseconds: median (least)':30}{'floor':>20}{'ours':>20}"
    f"{'ratio':>16}{'limit':>9}"
)


def main(argv: list[str] | None = None) -> int:
    """Print one line for each scenario."""
    parser = argparse.ArgumentParser(description="Measure what recording costs.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="some of the names")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a third of the rounds, and not the longest",
    )
    parser.add_argument("--strict", action="store_true", help="hold the limits")
    args = parser.parse_args(argv)
    exceeded = 0
    print(describe_environment())
    print(HEADER)
    with tempfile.TemporaryDirectory(prefix="run_utils-bench-") as folder:
        place = Place(Path(folder))
        for scenario in SCENARIOS:
            takes_long = args.quick and scenario.measure is measure_long_list
            if scenario.name in args.names or not (args.names or takes_long):
                rounds = -(-scenario.rounds // (3 if args.quick else 1))
                exceeded += not show(scenario, place, rounds)
    return 1 if args.strict and exceeded else 0


def describe_environment() -> str:
    """Say in how real an environment is measured."""
    from importlib.metadata import distributions
    from importlib.util import find_spec

    count = sum(1 for _ in distributions())
    yaml = "with" if find_spec("yaml") else "without"
    version = "{}.{}.{}".format(*sys.version_info[:3])
    return f"Python {version} {yaml} PyYAML, {count} packages, {os.cpu_count()} cores"


def show(scenario: Scenario, place: Place, rounds: int) -> bool:
    """Print the line of a scenario; return whether it is within its limit."""
    try:
        floor, ours = scenario.measure(place, rounds)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        last_words = getattr(error, "stderr", None) or str(error).encode()
        reason = last_words.decode(errors="replace").strip().splitlines()[-1]
        print(f"{scenario.name:30}could not be measured: {reason}", flush=True)
        return False
    cost, unit = median(ours), " ms"
    ratios = f"{'':16}"
    if floor:
        cost, unit = median(ours) / median(floor), " x "
        ratios = f"{cost:9.2f} ({min(ours) / min(floor):.2f})".rjust(16)
    within = cost <= scenario.limit
    print(
        f"{scenario.name:30}{summarize(floor):>20}{summarize(ours):>20}{ratios}"
        f"{scenario.limit:6g}{unit}{'' if within else ' ABOVE'}",
        flush=True,
    )
    return within


def summarize(times: list[float]) -> str:
    """Return '12.34 (11.90)' for times in milliseconds, '-' for none."""
    return f"{median(times):.4g} ({min(times):.4g})" if times else "-"


# === The place: a git repository of 2,000 files with run_utils.py ===


class Place:
    """Where the measured programs run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "project"
        self.folder.mkdir()
        self.env = {
            "PATH": os.environ.get("PATH", os.defpath),
            "HOME": str(folder),
            "LC_ALL": "C.UTF-8",
        }
        self.python = sys.executable
        venv.create(folder / "venv", symlinks=os.name != "nt")
        self.bare_python = str(folder / "venv" / "bin" / "python")
        shutil.copy(RUN_UTILS, self.folder)
        for name, code in PROGRAMS.items():
            (self.folder / name).write_text(code, encoding="utf-8")
        for number in range(2000):
            file = self.folder / "src" / str(number % 40) / f"module{number}.py"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(f"def function_{number}():\n    return {number}\n", "utf-8")
        remote = folder / "remote.git"
        self.run("git", "init", "-q", "--bare", str(remote))
        identity = ["-c", "user.name=bench", "-c", "user.email=bench@localhost"]
        steps = ["init -q", "add .", "commit -q -m bench"]
        steps += [f"remote add origin {remote}", "push -q -u origin HEAD"]
        for words in steps:
            self.run("git", *identity, *words.split())
        self.change()
        self.run(self.python, "-c", "import run_utils")  # writes its byte code
        # Of files as young as the index git would read the content again and again,
        # until somebody asks for the status, as everybody does sooner or later.
        time.sleep(1.1)
        self.run("git", "status")

    def change(self) -> None:
        """Leave one file of the repository changed."""
        file = self.folder / "src" / "0" / "module0.py"
        file.write_text("def function_0():\n    return None\n", "utf-8")

    def run(self, *argv: str, out: str = os.devnull) -> None:
        """Run a program to its end; it may leave nothing but its exit status."""
        with (self.folder / out).open("wb") as stdout:
            subprocess.run(
                argv,
                cwd=self.folder,
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=subprocess.PIPE,
                timeout=300,
                check=True,
            )

    def time(self, *argv: str) -> float:
        """Return the milliseconds that `python ARGV` takes."""
        begin = time.monotonic_ns()
        self.run(self.python, *argv)
        return (time.monotonic_ns() - begin) / 1e6

    def time_many(self, count: int, *argv: str) -> float:
        """Return the milliseconds that so many at once take."""
        options: Any = {"cwd": self.folder, "env": self.env}
        for name in ("stdin", "stdout", "stderr"):
            options[name] = subprocess.DEVNULL
        begin = time.monotonic_ns()
        children = [subprocess.Popen([self.python, *argv], **options)
                    for _ in range(count)]  # fmt: skip
        failed = [child for child in children if child.wait(300)]
        if failed:
            raise ValueError(f"{len(failed)} of them failed")
        return (time.monotonic_ns() - begin) / 1e6

    def make_runs(self, count: int, rows: int = 20) -> str:
        """Write so many runs, as real ones are, with their index; return the first."""
        if not (self.folder / f"tree-{count}").exists():
            self.run(self.python, "make_runs.py", str(count), str(rows))
        return f"tree-{count}/exp0/train-20251009-085320"

    def ask(self, *argv: str, out: str = os.devnull) -> list[list[float]]:
        """Return what a program of ours leaves in answer.json."""
        self.run(self.python, *argv, out=out)
        answer: list[list[float]] = json.loads(
            (self.folder / "answer.json").read_text(encoding="utf-8")
        )
        return answer


# === Scenarios: each returns the times of the floor and ours, in milliseconds ===

Times = tuple[list[float], list[float]]


class Scenario(NamedTuple):
    """One line of the table; the limit is a ratio, or milliseconds without a floor."""

    name: str
    limit: float
    rounds: int
    measure: Callable[[Place, int], Times]


def measure_import(place: Place, rounds: int) -> Times:
    """Compare a Python that imports run_utils with one that does nothing."""
    floor, ours = [], []
    for _ in range(rounds):
        floor.append(place.time("-c", "pass"))
        ours.append(place.time("-c", "import run_utils"))
    return floor, ours


def measure_first_line(place: Place, rounds: int) -> Times:
    """Compare the way to the first line of the body with a Python that does nothing."""
    floor, ours = [], []
    for _ in range(rounds):
        floor.append(place.time("-c", "pass"))
        begin = time.monotonic_ns()
        [[first_line]] = place.ask("first_line.py")
        ours.append((first_line - begin) / 1e6)
        time.sleep(0.02)  # a recorder may need a moment to be gone
    return floor, ours


def measure_entry(place: Place, rounds: int) -> Times:
    """Compare __enter__ with the system calls and programs it cannot do without."""
    floor, ours = place.ask("entry.py", str(rounds))
    return floor, ours


def measure_first_line_bare(place: Place, rounds: int) -> Times:
    """Do the same with a Python that has nothing installed."""
    place.python, kept = place.bare_python, place.python
    try:
        place.run(place.python, "-c", "import run_utils")
        return measure_first_line(place, rounds)
    finally:
        place.python = kept


def measure_empty(place: Place, rounds: int) -> Times:
    """Compare the whole process of an empty block with a Python that does nothing.

    A run of the same folder has been recorded before.
    """
    place.time("empty.py")
    floor, ours = [], []
    for _ in range(rounds):
        floor.append(place.time("-c", "pass"))
        ours.append(place.time("empty.py"))
    return floor, ours


def measure_first_run(place: Place, rounds: int) -> Times:
    """Compare the first run of a folder with a second one and 1.2 pip freeze."""
    floor, ours = [], []
    for _ in range(rounds):
        shutil.rmtree(place.folder / "results", ignore_errors=True)
        ours.append(place.time("empty.py"))
        second = place.time("empty.py")
        freeze = place.time("-m", "pip", "--disable-pip-version-check", "freeze")
        floor.append(second + 1.2 * freeze)
    return floor, ours


def measure_disk(place: Place, rounds: int) -> Times:
    """Count the kB of a clean, pushed run: no floor, the limit is in kB."""
    place.run("git", "checkout", "-q", ".")
    shutil.rmtree(place.folder / "results", ignore_errors=True)
    place.run(place.python, "empty.py")
    place.change()
    files = [p for p in (place.folder / "results").rglob("*") if p.is_file()]
    own = [p for p in files if "index" not in p.parts]
    return [], [sum(p.stat().st_size for p in own) / 1000]


def measure_variables(place: Place, rounds: int) -> Times:
    """Compare entry and exit with 12,000 environment variables and with 50."""
    few = {f"VARIABLE_{n}": "some value" for n in range(50)}
    many = {f"VARIABLE_{n}": "some value" for n in range(12_000)}
    kept = place.env
    floor, ours = [], []
    try:
        for _ in range(rounds):
            place.env = {**kept, **few}
            floor.append(place.ask("entry_only.py")[0][0])
            place.env = {**kept, **many}
            ours.append(place.ask("entry_only.py")[0][0])
    finally:
        place.env = kept
    return floor, ours


def measure_redaction(place: Place, rounds: int) -> Times:
    """Time the redaction of 20 MB of code, which the standard library lends."""
    return [], [place.ask("redaction.py")[0][0] for _ in range(rounds)]


def measure_summary(place: Place, rounds: int) -> Times:
    """Time the summary of 1,000,000 rows of metrics."""
    return [], [place.ask("summary.py")[0][0] for _ in range(rounds)]


def measure_idle(place: Place, rounds: int) -> Times:
    """Tell the memory of an idle recorder in MB (no floor)."""
    return [], [place.ask("idle.py")[0][0] for _ in range(rounds)]


def measure_wakes(place: Place, rounds: int) -> Times:
    """Count how often a second an idle recorder wakes (no floor)."""
    return [], [place.ask("wakes.py")[0][0] for _ in range(rounds)]


def measure_many(place: Place, rounds: int) -> Times:
    """Compare 64 runs at once with 64 Pythons at once that do nothing."""
    floor, ours = [], []
    for _ in range(rounds):
        floor.append(place.time_many(64, "-c", "pass"))
        ours.append(place.time_many(64, "empty.py"))
    return floor, ours


def measure_report(place: Place, rounds: int) -> Times:
    """Time the report of 1,000 runs with 10 metrics of 1,000 rows."""
    place.make_runs(1_000, rows=1_000)
    times = []
    for _ in range(rounds):
        words = ("report", "tree-1000", "-o", "report.html", "--metric", "min(loss)")
        times.append(place.time("-m", "run_utils", *words))
        size = (place.folder / "report.html").stat().st_size
        if size > 2_000_000:
            raise ValueError(f"the report has {size} bytes")
    return [], times


def measure_lines(place: Place, rounds: int) -> Times:
    """Compare printing a million lines into a file with and without capture."""
    floor, ours = [], []
    for _ in range(rounds):
        floor.append(place.ask("lines.py", "untouched", out="out.txt")[0][0])
        ours.append(place.ask("lines.py", "captured", out="out.txt")[0][0])
        with (place.folder / "out.txt").open("rb") as file:
            if sum(1 for _ in file) < 1_000_000:
                raise ValueError("lines are missing from the forwarded output")
    return floor, ours


def measure_metrics(place: Place, rounds: int) -> Times:
    """Compare log_metrics with json.dumps and os.write of the row that it writes."""
    floor, ours = place.ask("metrics.py", str(rounds))
    return floor, ours


def measure_rank(place: Place, rounds: int) -> Times:
    """Time from rank 0's publication to the first line of a rank that waits for it."""
    times = []
    for _ in range(rounds):
        ours = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}
        env = {**place.env, **ours, "MASTER_PORT": "29500"}
        command = [place.python, "rank.py"]
        pipe: Any = {"cwd": place.folder, "stdout": subprocess.PIPE}
        waiting = subprocess.Popen(command, env=env, **pipe)
        time.sleep(0.5)
        first = subprocess.Popen(command, env={**env, "RANK": "0"}, **pipe)
        published, entered = (
            int(rank.communicate(timeout=60)[0]) for rank in (first, waiting)
        )
        times.append((entered - published) / 1e6)
    return [], times


def measure_list(place: Place, rounds: int) -> Times:
    """Compare `list` over 10,000 runs with a Python that does nothing."""
    place.make_runs(10_000)
    return compare(place, rounds, "list", "tree-10000")


def measure_sorted_list(place: Place, rounds: int) -> Times:
    """Compare `list` over 10,000 runs by a metric's maximum with a Python."""
    place.make_runs(10_000)
    return compare(place, rounds, "list", "tree-10000", "--sort=-max(loss)")


def measure_inspect(place: Place, rounds: int) -> Times:
    """Compare `inspect` of the oldest of 10,000 runs with a Python."""
    run = place.make_runs(10_000)
    return compare(place, rounds, "inspect", run)


def measure_diff(place: Place, rounds: int) -> Times:
    """Compare `diff` of two of 10,000 runs with a Python that does nothing."""
    run = place.make_runs(10_000)
    return compare(place, rounds, "diff", run, run)


def measure_first_list(place: Place, rounds: int) -> Times:
    """Time `list` over 10,000 runs that have no index."""
    place.make_runs(10_000)
    shutil.rmtree(place.folder / "tree-10000" / "index")
    times = compare(place, rounds, "list", "tree-10000")[1]
    return [], times


def measure_long_list(place: Place, rounds: int) -> Times:
    """Time `list` over 100,000 runs."""
    place.make_runs(100_000)
    return [], compare(place, rounds, "list", "tree-100000")[1]


def compare(place: Place, rounds: int, *words: str) -> Times:
    floor, ours = [], []
    for _ in range(rounds):
        floor.append(place.time("-c", "pass"))
        ours.append(place.time("-m", "run_utils", *words))
    return floor, ours


SCENARIOS = (
    Scenario("import", 3.5, 30, measure_import),
    Scenario("first line", 4, 30, measure_first_line),
    Scenario("first line, bare Python", 4, 15, measure_first_line_bare),
    Scenario("entry", 2, 30, measure_entry),
    Scenario("empty block, second run", 8, 21, measure_empty),
    Scenario("empty block, first run", 1, 6, measure_first_run),
    Scenario("64 runs at once", 8, 3, measure_many),
    Scenario("disk of a clean run (kB)", 30, 1, measure_disk),
    Scenario("12,000 variables, entry", 3, 9, measure_variables),
    Scenario("idle recorder (MB)", 16, 3, measure_idle),
    Scenario("idle recorder (wakes a s)", 1, 1, measure_wakes),
    Scenario("million lines", 1.2, 6, measure_lines),
    Scenario("log_metrics", 1.5, 30, measure_metrics),
    Scenario("redaction of 20 MB", 1000, 3, measure_redaction),
    Scenario("another rank", 50, 10, measure_rank),
    Scenario("list of 10,000", 10, 15, measure_list),
    Scenario("the same by max(loss)", 10, 15, measure_sorted_list),
    Scenario("inspect", 6, 15, measure_inspect),
    Scenario("diff", 6, 15, measure_diff),
    Scenario("first list of 10,000", 3000, 3, measure_first_list),
    Scenario("list of 100,000", 3000, 3, measure_long_list),
    Scenario("summary of 1,000,000 rows", 2000, 3, measure_summary),
    Scenario("report of 1,000 runs", 10_000, 1, measure_report),
)


# === The measured programs ===

COMMON = """\
import json, os, subprocess, sys, time
from pathlib import Path
from run_utils import run_context

CONFIG = {"model": "small", "lr": 1e-4, "epochs": 3, "data": ["a", "b"]}


def answer(*times):
    Path("answer.json").write_text(json.dumps(times), encoding="utf-8")


def await_captures(run_dir):
    # complete: packages are known, and nothing is written any more
    text, since, deadline = "", 0.0, time.monotonic() + 20
    while time.monotonic() < min(since + 1.0, deadline) or not since:
        now = (run_dir / "metadata.json").read_text(encoding="utf-8")
        if now != text or json.loads(now).get("pip_freeze") is None:
            text, since = now, time.monotonic()
        time.sleep(0.05)
        if time.monotonic() > deadline:
            break
"""

PROGRAMS = {
    "rank.py": """\
import os, sys, time
import run_utils

moments = []
publish = run_utils._Launch.publish

def published(*args):
    meeting = publish(*args)
    moments.append(time.monotonic_ns())
    return meeting

run_utils._Launch.publish = published
with run_utils.run_context("ranks", capture_output=False):
    moments.append(time.monotonic_ns())
    if os.environ["RANK"] == "0":
        time.sleep(0.5)
print(moments[0])
""",
    "make_runs.py": """\
import json, os, sys, time
import run_utils

count, rows, here = int(sys.argv[1]), int(sys.argv[2]), os.getcwd()
root = f"tree-{sys.argv[1]}"
os.makedirs(f"{root}/index")
index = open(f"{root}/index/runs_index.jsonl", "w")
status = {"status": "success", "exit_reason": "normal", "exit_code": 0, "pid": 5}
metadata = {"hostname": "h", "user": "u", "command": "python train.py", "inputs": []}
metadata["argv"] = ["python", "train.py"]
metadata["env"] = {f"VARIABLE_{n}": "value " * 4 for n in range(60)}
metadata["pip_freeze"] = [f"package-{n}==1.{n}.0" for n in range(80)]
metadata["git"] = {"commit_short": "1a2b3c4", "branch": "main", "is_dirty": False}
for n in range(count):
    then = time.gmtime(1_760_000_000 + n * 60)
    utc = time.strftime("%Y-%m-%dT%H:%M:%SZ", then)
    name = time.strftime("train-%Y%m%d-%H%M%S", then)
    run = f"{root}/exp{n % 20}/{name}"
    for folder in ("logs", "plots", "artifacts", "samples", "metrics"):
        os.makedirs(f"{run}/{folder}")
    times = {"started_utc": utc, "timestamp_utc": utc, "duration_seconds": 60.5}
    config = {"command": "x", "lr": n % 10 / 100, "seed": n, "model": {"name": "q"}}
    facts = {**metadata, "timestamp_utc": utc, "config": config}
    lines = [{"step": k, "time": 1.0, "loss": 1 / (k + 1 + n % 7)} for k in range(rows)]
    if rows > 20:
        for line in lines:
            line.update({f"metric{m}": (n * m + line["step"]) % 97 for m in range(9)})
    texts = {"status.json": json.dumps({**status, **times}, indent=2)}
    texts["metadata.json"] = json.dumps(facts, indent=2)
    texts["metrics/metrics.jsonl"] = "".join(json.dumps(x) + "\\n" for x in lines)
    for path, text in texts.items():
        with open(f"{run}/{path}", "w") as file:
            file.write(text)
    with open(f"{run}/metrics/summary.json", "w") as file:
        file.write(run_utils._format_json(run_utils._summarize_metrics(run)))
    row = {"event": "start", "timestamp_utc": utc, "run_dir": f"{here}/{run}"}
    row.update(run_basename=name, experiment_name=f"exp{n % 20}", env_name=root)
    row.update(results_root=f"{here}/{root}", hostname="h", user="u", pid=5)
    row.update(git_commit_short="1a2b3c4", script_name="train", status="running")
    row.update(exit_reason=None, path=f"exp{n % 20}/{name}", inputs=[])
    index.write(json.dumps(row) + "\\n")
    del row["inputs"]
    index.write(json.dumps({**row, "event": "end", "status": "success"}) + "\\n")
""",
    ".gitignore": "answer.json\nout.txt\nresults/\nfloor*\n__pycache__/\ntree-*\n"
    "report.html\nmany/\n",
    "empty.py": """\
from run_utils import run_context
with run_context("results", config_args={"lr": 0.1}):
    pass
""",
    "entry_only.py": """\
import time
from run_utils import run_context
context = run_context("results", config_args={"lr": 0.1})
begin = time.perf_counter()
context.__enter__()
entered = (time.perf_counter() - begin) * 1000
context.__exit__(None, None, None)
with open("answer.json", "w", encoding="utf-8") as file:
    file.write(f"[[{entered}]]")
""",
    "redaction.py": """\
import json, os, sys, time
from pathlib import Path
import run_utils
files = []
for path in sorted(Path(os.__file__).parent.glob("**/*.py")):
    if sum(map(len, files)) < 20_000_000:
        files.append(path.read_bytes())
size = sum(map(len, files))
begin = time.perf_counter()
for data in files:
    finds = run_utils._redactor.learn_code(data, b"module.py")
    run_utils._redactor.code(data, b"module.py", finds)
took = (time.perf_counter() - begin) * 1000
Path("answer.json").write_text(json.dumps([[took * 20_000_000 / size]]))
""",
    "summary.py": """\
import json, os, time
from pathlib import Path
import run_utils
os.makedirs("many/metrics", exist_ok=True)
with open("many/metrics/metrics.jsonl", "w") as file:
    for step in range(1_000_000):
        file.write(f'{{"step": {step}, "time": 1.5, "loss": {step % 997}.5}}\\n')
begin = time.perf_counter()
summary = run_utils._summarize_metrics(Path("many"))
took = (time.perf_counter() - begin) * 1000
assert "loss" in json.dumps(summary)
Path("answer.json").write_text(json.dumps([[took]]))
""",
    "idle.py": """\
import json, re, time
from pathlib import Path
import run_utils
with run_utils.run_context("results"):
    time.sleep(4)  # the captures are over
    pid = run_utils._active[0].recorder.pid
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    size = int(re.search(r"Pss: +(\\d+)", text)[1]) / 1000
Path("answer.json").write_text(json.dumps([[size]]))
""",
    "wakes.py": """\
import json, re, time
from pathlib import Path
import run_utils

def wakes():
    pattern = re.compile(r"^voluntary_ctxt_switches:\\t(\\d+)", re.M)
    pid = run_utils._active[0].recorder.pid
    files = Path(f"/proc/{pid}/task").glob("*/status")
    return sum(int(pattern.search(file.read_text())[1]) for file in files)

with run_utils.run_context("results"):
    time.sleep(17)  # after so long a silence it is idle
    before = wakes()
    time.sleep(20)
    answer = (wakes() - before) / 20
Path("answer.json").write_text(json.dumps([[answer]]))
""",
    # As short as a user's: nothing but run_utils is imported before the first line.
    "first_line.py": """\
import time
from run_utils import run_context
with run_context("results", config_args={"lr": 0.1}):
    first_line = time.monotonic_ns()
    with open("answer.json", "w", encoding="utf-8") as file:
        file.write(f"[[{first_line}]]")
""",
    "entry.py": COMMON
    + """
FILE = b"x" * 2000


def floor(run_dir):
    begin = time.perf_counter()
    subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True)
    os.mkdir(run_dir)
    for name in ("logs", "plots", "artifacts", "samples", "metrics"):
        os.mkdir(f"{run_dir}/{name}")
    for name in ("config.yaml", "metadata.json", "status.json", "more.json"):
        with open(f"{run_dir}/.{name}.tmp", "wb") as file:
            file.write(FILE)
        os.replace(f"{run_dir}/.{name}.tmp", f"{run_dir}/{name}")
    with open("floor/index.jsonl", "ab") as file:
        file.write(FILE[:500])
    subprocess.run(["true"])
    return (time.perf_counter() - begin) * 1000


def ours():
    begin = time.perf_counter()
    context = run_context("results", config_args=CONFIG)
    context.__enter__()
    entered = time.perf_counter()
    context.__exit__(None, None, None)
    return (entered - begin) * 1000


os.mkdir("floor")
pairs = [(floor(f"floor/{n}"), ours()) for n in range(int(sys.argv[1]) + 1)]
answer(*zip(*pairs[1:]))
""",
    "exit.py": COMMON
    + """
with run_context("results", config_args=CONFIG) as run_dir:
    await_captures(run_dir)
    begin = time.perf_counter()
answer([(time.perf_counter() - begin) * 1000])
""",
    # From the first print until the last line has gone where it would have gone.
    "lines.py": COMMON
    + """
capture = sys.argv[1] == "captured"
with run_context("results", config_args=CONFIG, capture_output=capture) as run_dir:
    await_captures(run_dir)
    begin = time.perf_counter()
    for step in range(1_000_000):
        print("step", step, "loss 0.4375")
    sys.stdout.flush()
answer([(time.perf_counter() - begin) * 1000])
""",
    "metrics.py": COMMON
    + """
from run_utils import log_metrics

VALUES = {"loss": 0.1234567, "accuracy": 0.87654, "lr": 3e-4, "norm": 12.5, "ppl": 8.1}
COUNT = 2000


def floor(row, descriptor):
    begin = time.perf_counter()
    for step in range(COUNT):
        row["step"] = step
        os.write(descriptor, (json.dumps(row) + "\\n").encode())
    return (time.perf_counter() - begin) * 1000 / COUNT


def ours(run_dir):
    begin = time.perf_counter()
    for step in range(COUNT):
        log_metrics(run_dir, VALUES, step)
    return (time.perf_counter() - begin) * 1000 / COUNT


with run_context("results", config_args=CONFIG, capture_output=False) as run_dir:
    await_captures(run_dir)
    log_metrics(run_dir, VALUES, 0)
    path = run_dir / "metrics" / "metrics.jsonl"
    row = json.loads(path.read_text(encoding="utf-8").splitlines()[-1])
    descriptor = os.open("floor.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    pairs = [(floor(row, descriptor), ours(run_dir)) for n in range(int(sys.argv[1]))]
answer(*zip(*pairs))
""",
}


if __name__ == "__main__":
    raise SystemExit(main())
