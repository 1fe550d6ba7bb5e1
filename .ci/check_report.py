#!/usr/bin/env python3
# SPDX-FileCopyrightText: 2026 the run_utils authors
# SPDX-License-Identifier: MIT
"""Make pages of `report` from seeded example runs, and look at them in Chromium.

    check_report.py [--picture .github/report.png] [--keep FOLDER]

Needs Chromium, and node with playwright-core, html-validate and axe-core (NODE_PATH).
Also measures: 1,000 runs with 10 metrics of 1,000 rows within 10 s and 2 MB, and
10,000 runs. Ends with one line of counts.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import run_utils  # noqa: E402

START = datetime(2026, 1, 31, 9, 0, tzinfo=timezone.utc)
HOSTILE = "</script><script>hit = 1</script><img src=x onerror=hit=1>\u202e'\"`${hit}"
TRACEBACK = """Traceback (most recent call last):
  File "train.py", line 212, in <module>
    main()
  File "train.py", line 174, in main
    loss.backward()
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--picture", metavar="FILE", help="save a picture of a page")
    parser.add_argument("--keep", metavar="FOLDER", help="make the pages there")
    args = parser.parse_args()
    folder = Path(args.keep or tempfile.mkdtemp(prefix="run_utils-report-"))
    try:
        results = measured(folder)
        results += looked_at(folder, args.picture)
    finally:
        if not args.keep:
            shutil.rmtree(folder, ignore_errors=True)
    failed = sum(line.startswith("FAIL") for line in results)
    passed = sum(line.startswith("ok") for line in results)
    skipped = sum(line.startswith("SKIP") for line in results)
    print(f"{passed} passed, {failed} failed, {skipped} skipped")
    return min(failed, 1)


def measured(folder: Path) -> list[str]:
    """Make all pages; tell what is too slow or too large."""
    make_page(folder, "none", Examples(0))
    make_page(folder, "one", Examples(1))
    make_page(folder, "nine", Examples(9))
    make_page(folder, "sixty", Examples(60))
    make_page(folder, "seeds", Examples(60, seeds=4))
    make_page(folder, "picture", Examples(12, seeds=3))
    make_page(folder, "hostile", Hostile(4))
    lines = []
    seconds, size = make_page(folder, "thousand", Examples(1000, rows=1000, metrics=10))
    print(f"1,000 runs in {seconds:.1f} s; the benchmark holds the limit of 10 s")
    lines.append(verdict("size", size <= 2_000_000, f"1,000 runs in {size:,} bytes"))
    examples = Examples(10_000, rows=20, metrics=3, is_bare=True)
    seconds, size = make_page(folder, "many", examples)
    page = (folder / "many" / "report.html").read_text("utf-8")
    is_whole = page.count("<tr") > 10_000 and "the first 200 of 10000 runs" in page
    told = f"10,000 runs in {seconds:.1f} s and {size:,} bytes"
    lines.append(verdict("many", is_whole, told))
    return lines


def verdict(name: str, is_good: bool, what: str) -> str:
    line = f"FAIL {name}: {what}"
    if is_good:
        line = f"ok {name}: {what}"
    print(line)
    return line


def make_page(folder: Path, name: str, examples: Examples) -> tuple[float, int]:
    """Write example runs and a page of them; return its seconds and bytes."""
    place = folder / name
    if not place.exists():
        examples.write(place / "results" / "cifar")
    words = ["report", "results/cifar", "-o", "report.html"]
    if examples.count:
        words += ["--metric", examples.metric]
    start = time.monotonic()
    command = [sys.executable, str(HERE.parent / "run_utils.py"), *words]
    done = subprocess.run(command, cwd=place, capture_output=True, text=True)
    seconds = time.monotonic() - start
    if done.returncode != 0:
        raise SystemExit(f"{name}: {done.stderr}")
    return seconds, (place / "report.html").stat().st_size


def looked_at(folder: Path, picture: str | None) -> list[str]:
    """Return the verdicts of the browser."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    modules = Path(os.environ.get("NODE_PATH", "/nowhere"))
    if browser is None or shutil.which("node") is None:
        return [tell("SKIP browser: Chromium and node are not on this machine")]
    if not (modules / "playwright-core").is_dir():
        return [tell("SKIP browser: playwright-core is not in NODE_PATH")]
    names = ["none", "one", "nine", "sixty", "seeds", "hostile", "thousand", "picture"]
    job = {
        "browser": browser,
        "pages": [
            {"name": name, "path": str(folder / name / "report.html")} for name in names
        ],
        "picture": picture and os.path.abspath(picture),
    }
    done = subprocess.run(
        ["node", str(HERE / "check_report.js")],
        input=json.dumps(job), capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    lines = [tell(line) for line in done.stdout.splitlines()]
    if done.returncode != 0:
        lines.append(tell(f"FAIL browser: {done.stderr[-2000:]}"))
    return lines


def tell(line: str) -> str:
    print(line, flush=True)
    return line


class Examples:
    """Runs of an image classifier, the same at each call: plain files, as a run has."""

    metric = "max(val/acc)"

    def __init__(
        self,
        count: int,
        rows: int = 200,
        metrics: int = 4,
        seeds: int = 1,
        is_bare: bool = False,
    ) -> None:
        self.count = count
        self.rows = rows
        self.metrics = metrics
        self.seeds = seeds
        self.is_bare = is_bare  # nothing but what the table needs
        self.random = random.Random(7)

    def write(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        for number in range(self.count):
            start = START + timedelta(minutes=37 * number)
            commit = ("1a2b3c4", "9f8e7d6")[number % 7 == 6]
            run = folder / f"train-{start:%Y%m%d-%H%M%S}-{commit}"
            (run / "metrics").mkdir(parents=True)
            self.write_run(run, number, start, commit)

    def write_run(self, run: Path, number: int, start: datetime, commit: str) -> None:
        config = self.config(number)
        end = self.rows
        if self.random.random() < 0.08:
            end = max(3, int(self.rows * self.random.random()))
        rows = list(self.metric_rows(config, end))
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (run / "metrics" / "metrics.jsonl").write_text(lines, "utf-8")
        summary = run_utils._summarize_metrics(run)
        write(run / "metrics" / "summary.json", summary)
        seconds = 60 + end * 9.3
        write(run / "status.json", self.status(start, seconds, end == self.rows))
        words = [f"--{key}={value}" for key, value in config["optimizer"].items()]
        metadata = {
            "timestamp_utc": f"{start:%Y-%m-%dT%H:%M:%SZ}",
            "argv": ["python", "train.py", *words],
            "config": config,
            "hostname": "node07",
            "user": "ada",
            "working_dir": "/home/ada/cifar",
            "git": {"commit_short": commit, "branch": "main"},
            "resources": {"processor_seconds": round(seconds * 3.2, 1)},
        }
        write(run / "metadata.json", metadata)
        if not self.is_bare:
            self.write_outputs(run, number, rows)

    def config(self, number: int) -> dict[str, Any]:
        pick = self.random
        if self.seeds > 1:
            pick = random.Random(number // self.seeds + 15)
        return {
            "model": pick.choice(["resnet18", "resnet50", "vit-small"]),
            "optimizer": {
                "name": pick.choice(["sgd", "adamw"]),
                "lr": round(10 ** pick.uniform(-4, -1), 5),
            },
            "width": pick.choice([64, 128, 256]),
            "dropout": pick.choice([0.0, 0.1, 0.3]),
            "seed": number % self.seeds,
        }

    def metric_rows(self, config: dict[str, Any], end: int) -> Any:
        names = ["loss", "val/acc", "lr", "grad/norm", "val/loss", "train/acc"]
        names += ["val/f1", "throughput", "memory", "ema/loss"]
        rate = config["optimizer"]["lr"]
        quality = math.exp(-abs(math.log10(rate) + 2.3))
        strength = {"resnet18": 0.9, "resnet50": 1.0, "vit-small": 0.95}
        quality *= strength[config["model"]]
        level = 0.0
        for step in range(end):
            progress = step / self.rows
            level = 0.9 * level + self.random.gauss(0, 0.02)
            loss = 2.3 * math.exp(-5 * quality * progress) + 0.08
            loss += abs(level) * (1 - progress / 2)
            values = {
                "loss": loss,
                "val/acc": 0.95 * quality * (1 - math.exp(-6 * progress))
                + self.random.gauss(0, 0.008),
                "lr": rate * 0.5 * (1 + math.cos(math.pi * progress)),
                "grad/norm": 10 ** (1 - 2 * progress + self.random.gauss(0, 0.15)),
            }
            row: dict[str, float] = {"step": step, "time": 1769850000 + 9 * step}
            for name in names[: self.metrics]:
                default = loss * (1 + 0.1 * self.random.random())
                row[name] = round(values.get(name, default), 9)
            yield row

    def status(self, start: datetime, seconds: float, is_good: bool) -> dict[str, Any]:
        end = start + timedelta(seconds=seconds)
        facts: dict[str, Any] = {
            "status": "success", "exit_reason": "normal", "exit_code": 0,
            "started_utc": f"{start:%Y-%m-%dT%H:%M:%SZ}",
            "timestamp_utc": f"{end:%Y-%m-%dT%H:%M:%SZ}",
            "duration_seconds": round(seconds, 1),
        }  # fmt: skip
        if not is_good:
            message = "CUDA out of memory. Tried to allocate 2.50 GiB"
            facts.update(status="failed", exit_reason="exception", exit_code=1)
            facts["exception"] = {
                "type": "torch.OutOfMemoryError", "message": message,
                "traceback": f"{TRACEBACK}torch.OutOfMemoryError: {message}\n",
            }  # fmt: skip
        return facts

    def write_outputs(self, run: Path, number: int, rows: list[Any]) -> None:
        (run / "logs").mkdir()
        lines = [f"step {row['step']}: loss {row['loss']:.4f}\n" for row in rows[-30:]]
        (run / "logs" / "stdout.log").write_text("".join(lines), "utf-8")
        if number < 12:
            for folder in ("plots", "samples"):
                (run / folder).mkdir()
            (run / "plots" / "confusion.png").write_bytes(self.image(48))
            for step in (50, 100, 200):
                (run / "samples" / f"grid_{step:06}.png").write_bytes(self.image(32))
        if number == 2:
            note = {"text": "the baseline of the paper", "tags": ["canonical"]}
            write(run / "notes.jsonl", note)

    def image(self, size: int) -> bytes:
        """Return a PNG of a confusion matrix."""
        rows = b""
        for y in range(size):
            rows += b"\0"
            for x in range(size):
                near = math.exp(-(((x - y) / 4) ** 2))
                value = int(255 * min(1, near * 0.8 + self.random.random() * 0.15))
                rows += bytes((40 + value * 3 // 5, 60 + value // 2, 120 + value // 4))
        head = struct.pack(">IIBBBBB", size, size, 8, 2, 0, 0, 0)
        parts = [(b"IHDR", head), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
        data = b"\x89PNG\r\n\x1a\n"
        for kind, content in parts:
            check = struct.pack(">I", zlib.crc32(kind + content))
            data += struct.pack(">I", len(content)) + kind + content + check
        return data


class Hostile(Examples):
    """Runs whose every text tries to act."""

    metric = f"max({HOSTILE})"

    def config(self, number: int) -> dict[str, Any]:
        config = super().config(number)
        return {**config, HOSTILE: f"{HOSTILE}{number}", "long": "x" * 10_000}

    def metric_rows(self, config: dict[str, Any], end: int) -> Any:
        for row in super().metric_rows(config, end):
            yield {**row, HOSTILE: row["loss"]}

    def status(self, start: datetime, seconds: float, is_good: bool) -> dict[str, Any]:
        facts = super().status(start, seconds, False)
        facts["status"] = HOSTILE
        facts["exception"] = dict.fromkeys(("type", "message", "traceback"), HOSTILE)
        return facts

    def write_outputs(self, run: Path, number: int, rows: list[Any]) -> None:
        super().write_outputs(run, number, rows)
        (run / "logs" / "stderr.log").write_text(f"{HOSTILE}\n" * 50, "utf-8")
        name = HOSTILE.replace("/", "-")
        (run / "plots" / f"{name}.png").write_bytes(b"no image")
        (run / "plots" / "javascript:hit=1;.png").write_bytes(b"no image")
        write(run / "notes.jsonl", {"text": HOSTILE, "tags": [HOSTILE]})


def write(path: Path, facts: dict[str, Any]) -> None:
    path.write_text(json.dumps(facts) + "\n", "utf-8")


if __name__ == "__main__":
    sys.exit(main())
