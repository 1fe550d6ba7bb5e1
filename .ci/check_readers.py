#!/usr/bin/env python3
# SPDX-FileCopyrightText: 2026 the run_utils authors
# SPDX-License-Identifier: MIT
"""Corrupt a tree of runs at random; no command may raise, hang or steer a terminal.

    check_readers.py [--count 2000] [--seed 1]

Also has graphviz and mermaid (node, NODE_PATH) read graphs with hostile names. Ends
with one line of counts.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import run_utils  # noqa: E402

COMMANDS = (
    *("list", "list --json", "list --csv", "list --md --by-script", "list -n 2"),
    "list --where lr<1|or|metrics.loss>=0.5|and|name~t --sort=-loss --has-outputs",
    "list --status success --since 2026-01-01 --tag canonical --contains 0",
    *("inspect RUN", "inspect --json RUN", "inspect latest", "lineage RUN"),
    *("lineage RUN --dot", "lineage RUN --mermaid", "lineage RUN --json"),
    *("diff RUN OTHER", "diff --json RUN OTHER", "reindex --dry-run"),
    *("note RUN text --tag x", "reindex", "audit", "audit --json"),
)
ODD: list[Any] = [
    None,
    True,
    -1,
    1e308,
    10**400,
    "",
    "\x1b[2J\u202e\x9b",
    "é" * 3000,
    [],
    {},
]
ODD += [[[]], {"": {}}, {"a": [None]}, ["x", 1], "2026-13-99T99:99:99Z", float("nan")]
MERMAID = """
import fs from "node:fs"; import { createRequire } from "node:module";
const require = createRequire(process.env.NODE_PATH + "/x.js");
const { JSDOM } = require("jsdom");
globalThis.window = new JSDOM("").window; globalThis.document = window.document;
const path = require.resolve("mermaid/package.json").replace("package.json", "");
const { default: mermaid } = await import(path + "dist/mermaid.core.mjs");
console.log((await mermaid.parse(fs.readFileSync(0, "utf8"))).diagramType);
"""


def main() -> int:
    parser = argparse.ArgumentParser(description="Corrupt a tree of runs at random.")
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    options, _ = parser.parse_known_args()  # all checks are told of the corpora
    passed = failed = skipped = 0
    signal.signal(signal.SIGALRM, hangs)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        make_tree(Path("sound/results"))
        rng = random.Random(options.seed)
        for number in range(options.count):
            if number % 8 == 0:
                shutil.rmtree("results", ignore_errors=True)
                shutil.copytree("sound/results", "results", symlinks=True)
            good = survives(rng, f"{options.seed}.{number}")
            passed, failed = passed + good, failed + (not good)
        os.chdir(ROOT)
    for check in (graphviz_reads_it, mermaid_reads_it):
        result = check()
        passed, failed = passed + (result is True), failed + (result is False)
        skipped += result is None
    print(f"{passed} passed, {failed} failed, {skipped} skipped")
    return 1 if failed else 0


def hangs(*_: object) -> None:
    raise TimeoutError("it took more than 20 s")


def make_tree(root: Path) -> None:
    """Write six runs: two as the ancestors left them, all linked by their inputs."""
    previous: Path | None = None
    for number in range(6):
        run = root / "exp" / (f"t-2026010{number + 1}-000000" if number else "renamed")
        for folder in ("logs", "metrics", "artifacts", "attempts/1"):
            (run / folder).mkdir(parents=True)
        utc = f"2026-01-0{number + 1}T00:00:00Z"
        config: dict[str, Any] = {"lr": number / 10, "model": {"name": "q"}, "l": [1]}
        config["init"] = previous and str(Path("results", previous.relative_to(root)))
        status: dict[str, Any] = {"status": "success" if number % 2 else "failed"}
        status.update(exit_reason="exception", timestamp_utc=utc, exit_code=0)
        status["exception"] = {"type": "E", "message": "m", "traceback": "a\nb\nc"}
        metadata: dict[str, Any] = {"timestamp_utc": utc, "working_dir": os.getcwd()}
        metadata.update(hostname="h", user="u", command="python t.py", argv=["p", "t"])
        metadata["git"] = {"commit_short": "1a2b3c4", "is_dirty": True, "root": "/"}
        metadata["pip_freeze"] = ["numpy==1.0", "-e /x", "a @ git+https://x"]
        if number > 1:
            status.update(started_utc=utc, duration_seconds=1.5, run=run.name)
            inputs = run_utils._inputs(config, [], run)
            metadata.update(config=config, inputs=inputs, capture={"git": {"ok": True}})
            lines = [{"step": n, "time": n, "loss": 1 / (n + 1)} for n in range(9)]
            text = "".join(json.dumps(line) + "\n" for line in lines)
            (run / "metrics/metrics.jsonl").write_text(text)
        (run / "config.yaml").write_text(run_utils._format_yaml(config))
        for path, value in (("status.json", status), ("metadata.json", metadata)):
            (run / path).write_text(json.dumps(value, indent=1))
        (run / "attempts/1/status.json").write_text(json.dumps(status))
        note = {"timestamp_utc": utc, "user": "u", "text": "n", "tags": ["canonical"]}
        (run / "notes.jsonl").write_text(json.dumps(note) + "\n")
        used = {"artifact_relpath": "m.pt", "consumer_run_dir": str(previous)}
        (run / "artifacts/USED_BY.jsonl").write_text(json.dumps(used) + "\n")
        (run / "git.patch").write_text("+a\n")
        previous = run
    with contextlib.redirect_stdout(io.StringIO()):
        run_utils.main(["reindex", str(root)])


def survives(rng: random.Random, name: str) -> bool:
    """Corrupt one file and run one command; say how it failed, if it did."""
    files = sorted(p for p in Path("results").rglob("*") if p.is_file())
    path = rng.choice(files or [Path("results/exp/renamed/status.json")])
    damage = rng.choice(DAMAGES)
    with contextlib.suppress(OSError):
        damage(rng, path)
    runs = sorted(Path("results/exp").glob("*"))
    command = rng.choice(COMMANDS)
    words = [w.replace("|", " ") for w in command.split(" ")]
    names = {"RUN": str(rng.choice(runs)), "OTHER": str(rng.choice(runs))}
    words = [names.get(word, word) for word in words]
    without = mock.patch.object(run_utils, "_pyyaml", side_effect=ImportError)
    out, err = io.StringIO(), io.StringIO()
    problem = ""
    with contextlib.ExitStack() as stack:
        if rng.random() < 0.5:
            stack.enter_context(without)
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(err))
        signal.alarm(20)
        try:
            status = run_utils.main(words)
        except SystemExit as usage:
            status = int(str(usage.code))
            if "audit" not in words:
                problem = f"usage: {err.getvalue()[-300:]}"
        except BaseException:
            status, problem = 0, traceback.format_exc(limit=-6)
        finally:
            signal.alarm(0)
    if status not in (0, 1, 2) or re.search(
        r"[\0-\x08\x0b-\x1f\x7f-\x9f]", out.getvalue()
    ):
        problem = problem or f"exit status {status}: {out.getvalue()[:300]!r}"
    if problem:
        print(f"FAIL {name}: {damage.__name__} {path}: {words}\n{problem}")
    return not problem


def truncated(rng: random.Random, path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: rng.randrange(len(data) + 1)])


def flipped(rng: random.Random, path: Path) -> None:
    data = bytearray(path.read_bytes() or b"x")
    for _ in range(rng.choice((1, 3, 30))):
        data[rng.randrange(len(data))] = rng.randrange(256)
    path.write_bytes(data)


def inserted(rng: random.Random, path: Path) -> None:
    data = path.read_bytes()
    at = rng.randrange(len(data) + 1)
    more = rng.choice(
        (b"\0", b"\xff\xfe", b"\n", b"{", b"[" * 9000, b'"', b"- " * 5000)
    )
    path.write_bytes(data[:at] + more * rng.choice((1, 50)) + data[at:])


def retyped(rng: random.Random, path: Path) -> None:
    """Put an odd value in the place of a random one in each line of JSON."""
    text = path.read_text("utf-8", "replace")
    lines = text.splitlines() if path.suffix == ".jsonl" else [text]
    with contextlib.suppress(ValueError, RecursionError):
        changed = [json.dumps(odd(rng, json.loads(line))) for line in lines]
        path.write_text("\n".join(changed) + "\n")


def odd(rng: random.Random, value: Any) -> Any:
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        return {**value, key: odd(rng, value[key])}
    if isinstance(value, list) and value and rng.random() < 0.7:
        at = rng.randrange(len(value))
        return [*value[:at], odd(rng, value[at]), *value[at + 1 :]]
    return rng.choice(ODD)


def gone(rng: random.Random, path: Path) -> None:
    path.unlink()


def emptied(rng: random.Random, path: Path) -> None:
    path.write_bytes(b"")


def replaced(rng: random.Random, path: Path) -> None:
    """Put a folder, a FIFO, a link to itself, or a sparse gigabyte in its place."""
    path.unlink()
    kind = rng.randrange(4)
    if kind == 0:
        path.mkdir()
    elif kind == 1:
        os.mkfifo(path)
    elif kind == 2:
        path.symlink_to(path.name)
    else:
        with path.open("wb") as file:
            file.truncate(1_000_000_000)


def looped(rng: random.Random, path: Path) -> None:
    (path.parent / "loop").symlink_to(rng.choice(("..", "/", ".", "../..")))


DAMAGES: list[Callable[[random.Random, Path], None]] = [truncated, flipped, inserted]
DAMAGES += [retyped, retyped, retyped, gone, emptied, replaced, looped]


def graph(form: str) -> bytes:
    evil = 'x"]|<b>;`#&\\ end\x1b\n{}()[]--> %% é'
    runs = [Path(evil), Path("end")]
    lines = run_utils._format_graph(form, runs, [(runs[0], runs[1], evil)])
    return ("\n".join(lines) + "\n").encode()


def graphviz_reads_it() -> bool | None:
    if shutil.which("dot") is None:
        print("skipped: graphviz is not on this machine")
        return None
    done = subprocess.run(["dot", "-Tsvg"], input=graph("dot"), capture_output=True)
    good = done.returncode == 0 and done.stdout.count(b'class="node"') == 2
    if not good:
        print("FAIL graphviz:", done.stderr.decode()[:300])
    return good


def mermaid_reads_it() -> bool | None:
    modules = Path(os.environ.get("NODE_PATH", "/nowhere"), "mermaid")
    if shutil.which("node") is None or not modules.is_dir():
        print("skipped: node with mermaid is not on this machine")
        return None
    command = ["node", "--input-type=module", "-e", MERMAID]
    done = subprocess.run(command, input=graph("mermaid"), capture_output=True)
    good = done.stdout.strip() == b"flowchart-v2"
    if not good:
        print("FAIL mermaid:", done.stderr.decode()[-300:])
    return good


if __name__ == "__main__":
    sys.exit(main())
