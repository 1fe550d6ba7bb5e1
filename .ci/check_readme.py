#!/usr/bin/env python3
# SPDX-FileCopyrightText: 2026 the run_utils authors
# SPDX-License-Identifier: MIT
"""Run the blocks of the README that need a library or a program: `needs=NAME`.

They run in a folder with a few small runs, three that succeeded and one that failed.
What a block only defines is then used as its reader would use it. A block whose library
is not installed is skipped by name. Ends with one line of counts.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"^```(\w+) needs=(\w+)\n(.*?)^```$", re.M | re.S)
TRAIN = """
import sys
from run_utils import run_context, log_metrics

config = {"lr": float(sys.argv[1]), "seed": 1}
with run_context("results/demo", config_args=config) as run_dir:
    for step in range(3):
        log_metrics(run_dir, {"loss": config["lr"] / (step + 1)}, step=step)
    if config["lr"] > 0.9:
        raise ValueError("bad learning rate")
"""


class Failure(Exception):
    """A block did not do what the README says."""


def main() -> int:
    blocks = BLOCK.findall((ROOT / "README.md").read_text("utf-8"))
    passed = failed = skipped = 0
    with tempfile.TemporaryDirectory(prefix="run_utils-readme-") as folder:
        sample = Place(Path(folder, "sample"))
        sample.make_runs()
        for language, library, text in blocks:
            if not is_installed(library, language):
                print(f"SKIP README {library}: it is not installed")
                skipped += 1
                continue
            path = Path(folder, library)
            shutil.copytree(sample.path, path)
            try:
                CHECKS[library](Place(path), text)
                passed += 1
            except (Failure, KeyError) as failure:
                print(f"FAIL README {library}: {failure}")
                failed += 1
    if not blocks:
        print("FAIL README: it has no block with needs=NAME")
        failed += 1
    print(f"{passed} passed, {failed} failed, {skipped} skipped")
    return int(failed > 0)


def is_installed(library: str, language: str) -> bool:
    if language == "python":
        return importlib.util.find_spec(library) is not None
    return shutil.which(library) is not None


class Place:
    """A folder in which blocks run, with runs in its results/."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}

    def make_runs(self) -> None:
        self.path.mkdir()
        for lr in ("0.1", "0.2", "0.4"):
            self.python(TRAIN, lr, name="train.py")
        self.python(TRAIN, "1.0", name="train.py", status=1)

    def run(self, *words: str, status: int = 0) -> str:
        """Run a command and return what it prints; it must end with `status`."""
        done = subprocess.run(
            words, cwd=self.path, env=self.env, stdin=subprocess.DEVNULL,
            capture_output=True, encoding="utf-8", timeout=120,
        )  # fmt: skip
        if done.returncode != status:
            raise Failure(f"exit status {done.returncode}: {done.stderr[-1500:]}")
        return done.stdout

    def python(
        self, text: str, *words: str, name: str = "block.py", status: int = 0
    ) -> str:
        (self.path / name).write_text(text, "utf-8")
        return self.run(sys.executable, name, *words, status=status)


def expect(is_so: bool, what: str) -> None:
    if not is_so:
        raise Failure(what)


def check_hydra(place: Place, text: str) -> None:
    script = f"{text}\nmain()\n"
    place.python(script, "+lr=0.1")
    place.python(script, "--multirun", "+lr=0.2,0.3")
    found = []
    for path in (place.path / "results/hydra").glob("*/metadata.json"):
        found.append(json.loads(path.read_text("ascii"))["config"]["lr"])
    expect(sorted(found) == [0.1, 0.2, 0.3], f"the configs have lr {sorted(found)}")


def check_transformers(place: Place, text: str) -> None:
    use = """
from types import SimpleNamespace
callback = LogMetrics("results/trainer")
callback.on_log(None, SimpleNamespace(global_step=7), None, logs={"loss": 0.5})
"""
    (place.path / "results/trainer").mkdir()
    place.python(text + use)
    row = json.loads((place.path / "results/trainer/metrics/metrics.jsonl").read_text())
    expect((row["step"], row["loss"]) == (7, 0.5), f"the row is {row}")


def check_pytest(place: Place, text: str) -> None:
    use = """
def test_it(run_dir):
    assert (run_dir / "status.json").exists()
"""
    (place.path / "test_block.py").write_text(text + use, "utf-8")
    words = ("-m", "pytest", "-q", "--basetemp", "kept", "test_block.py")
    shown = place.run(sys.executable, *words)
    expect("1 passed" in shown, shown)
    (status,) = (place.path / "kept").glob("test_it0/results/*/status.json")
    word = json.loads(status.read_text("ascii"))["status"]
    expect(word == "ended", f"the run is {word}")


def check_pandas(place: Place, text: str) -> None:
    *lines, last = text.rstrip().splitlines()
    script = "\n".join([*lines, f"print({last})"])
    shown = place.python(script)
    expect("0.4" in shown and "mean" in shown, f"the table is\n{shown}")


def check_duckdb(place: Place, text: str) -> None:
    shown = place.run("sh", "-c", text)
    expect("loss" in shown and "12 rows" in shown, f"it prints\n{shown}")


def check_jq(place: Place, text: str) -> None:
    shown = place.run("sh", "-c", text)
    expect(shown == "bad learning rate\n", f"it prints {shown!r}")


def check_mlflow(place: Place, text: str) -> None:
    place.env["MLFLOW_TRACKING_URI"] = f"file:{place.path}/mlruns"
    place.env["MLFLOW_ALLOW_FILE_STORE"] = "true"
    use = """
runs = mlflow.search_runs(output_format="list")
print(sorted((run.data.params["lr"], run.data.metrics["loss"]) for run in runs))
"""
    shown = place.python(text + use)
    expect("('0.4', 0.13333333333333333)" in shown, f"mlflow has {shown}")


CHECKS: dict[str, Callable[[Place, str], None]] = {
    "hydra": check_hydra,
    "transformers": check_transformers,
    "pytest": check_pytest,
    "pandas": check_pandas,
    "duckdb": check_duckdb,
    "jq": check_jq,
    "mlflow": check_mlflow,
}

if __name__ == "__main__":
    sys.exit(main())
