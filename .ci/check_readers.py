#!/usr/bin/env python3
# SPDX-FileCopyrightText: 2026 the run_utils authors
# SPDX-License-Identifier: MIT
"""Corrupt a tree of runs at random; no command may raise, hang or steer a terminal.

    check_readers.py [--count 600] [--seed 1]

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

COMMANDS = """
list
list --json
list --csv
list --md
list -n 2 --show loss,max(loss)
list --over lr
list --where lr<1|or|metrics.loss>=0.5|and|name~t --sort=-loss --has-outputs
list --status success --since 2026-01-01 --tag canonical --contains 0
list --commands
inspect RUN
inspect --json RUN
inspect latest
lineage RUN
lineage RUN --dot
lineage RUN --mermaid
lineage RUN --json
diff RUN OTHER
diff --json RUN OTHER
diff RUN
verify RUN
verify --json RUN
report -o report.html
report -o report.html --metric min(loss) --over lr
prune --status failed
prune --older 1d --json
note RUN text --tag x
reindex
reindex --dry-run
audit
audit --json
""".strip().splitlines()
SECONDS = 30  # a command that takes longer hangs
CONTROLS = r"[\0-\x08\x0b-\x1f\x7f-\x9f]"


class Hangs(BaseException):
    """A command took too long; no handler of errors may take it for its own."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--count", type=int, default=600)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    signal.signal(signal.SIGALRM, stop_hanging)
    results: list[bool | None] = []
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        make_tree(Path("sound/results"))
        rng = random.Random(options.seed)
        for number in range(options.count):
            if number % 8 == 0:
                shutil.rmtree("results", ignore_errors=True)
                shutil.copytree("sound/results", "results", symlinks=True)
            results.append(survives(rng, f"{options.seed}.{number}"))
        os.chdir(ROOT)
    results += [graphviz_reads_it(), mermaid_reads_it()]
    passed, failed, skipped = (results.count(kind) for kind in (True, False, None))
    print(f"{passed} passed, {failed} failed, {skipped} skipped")
    return int(failed > 0)


def stop_hanging(*_: object) -> None:
    raise Hangs(f"it took more than {SECONDS} s")


# === A sound tree ===


def make_tree(root: Path) -> None:
    """Write six runs: two as the ancestors left them, all linked by their inputs."""
    previous: Path | None = None
    for number in range(6):
        name = f"t-2026010{number + 1}-000000"
        if number == 0:
            name = "renamed"
        run = root / "exp" / name
        write_run(run, number, previous)
        previous = run
    with contextlib.redirect_stdout(io.StringIO()):
        run_utils.main(["reindex", str(root)])


def write_run(run: Path, number: int, previous: Path | None) -> None:
    for folder in ("logs", "metrics", "artifacts", "attempts/1"):
        (run / folder).mkdir(parents=True)
    utc = f"2026-01-0{number + 1}T00:00:00Z"
    config: dict[str, Any] = {"lr": number / 10, "model": {"name": "q"}, "l": [1]}
    if previous is not None:
        config["init"] = f"results/exp/{previous.name}"
    status: dict[str, Any] = {
        "status": ("failed", "success")[number % 2],
        "exit_reason": "exception", "timestamp_utc": utc, "exit_code": 0,
        "exception": {"type": "E", "message": "m", "traceback": "a\nb\nc"},
    }  # fmt: skip
    metadata: dict[str, Any] = {
        "timestamp_utc": utc, "working_dir": os.getcwd(), "hostname": "h", "user": "u",
        "command": "python t.py", "argv": ["p", "t"],
        "git": {"commit_short": "1a2b3c4", "is_dirty": True, "root": "/"},
        "pip_freeze": ["numpy==1.0", "-e /x", "a @ git+https://x"],
    }  # fmt: skip
    if number > 1:  # as we write it, not an ancestor
        status.update(started_utc=utc, duration_seconds=1.5, run=run.name)
        inputs = run_utils._inputs(config, [], run)
        metadata.update(config=config, inputs=inputs, capture={"git": {"ok": True}})
        rows = [{"step": n, "time": n, "loss": 1 / (n + 1)} for n in range(9)]
        write_lines(run / "metrics/metrics.jsonl", *rows)
        summary = run_utils._summarize_metrics(run)
        (run / "metrics/summary.json").write_text(json.dumps(summary, indent=2))
    (run / "config.yaml").write_text(run_utils._format_yaml(config))
    (run / "status.json").write_text(json.dumps(status, indent=2))
    (run / "metadata.json").write_text(json.dumps(metadata, indent=2))
    (run / "attempts/1/status.json").write_text(json.dumps(status))
    note = {"timestamp_utc": utc, "user": "u", "text": "n", "tags": ["canonical"]}
    write_lines(run / "notes.jsonl", note)
    used = {"artifact_relpath": "m.pt", "consumer_run_dir": str(previous)}
    write_lines(run / "artifacts/USED_BY.jsonl", used)
    (run / "git.patch").write_text("+a\n")
    (run / "logs/stdout.log").write_text("hello\n")


def write_lines(path: Path, *rows: dict[str, Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


# === Damages ===

ODD: list[Any] = [None, True, -1, 1e308, 10**400, "", "\x1b[2J\u202e\x9b", "é" * 3000]
ODD += [[], {}, [[]], {"": {}}, {"a": [None]}, ["x", 1], "2026-13-99T99:99:99Z"]
ODD += [float("nan")]
ODD += ["\x1b]0;title\x07 \x1b[31m\r"] * 6  # steers a terminal that it is shown on
JUNK = (b"\0", b"\xff\xfe", b"\n", b"{", b"[" * 9000, b'"', b"- " * 5000)


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
    place = rng.randrange(len(data) + 1)
    more = rng.choice(JUNK) * rng.choice((1, 50))
    path.write_bytes(data[:place] + more + data[place:])


def retyped(rng: random.Random, path: Path) -> None:
    """Take a random value out of each line of JSON, or put an odd one in its place."""
    text = path.read_text("utf-8", "replace")
    lines = [text]
    if path.suffix == ".jsonl":
        lines = text.splitlines()
    with contextlib.suppress(ValueError, RecursionError):
        changed = [json.dumps(with_odd_value(rng, json.loads(line))) for line in lines]
        path.write_text("\n".join(changed) + "\n")


def with_odd_value(rng: random.Random, value: Any) -> Any:
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        rest = {name: item for name, item in value.items() if name != key}
        if rng.random() < 0.15:
            return rest
        return {**rest, key: with_odd_value(rng, value[key])}
    if isinstance(value, list) and value and rng.random() < 0.7:
        place = rng.randrange(len(value))
        changed = with_odd_value(rng, value[place])
        return [*value[:place], changed, *value[place + 1 :]]
    return rng.choice(ODD)


def removed(rng: random.Random, path: Path) -> None:
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
DAMAGES += [retyped, retyped, retyped, removed, emptied, replaced, looped]


# === Commands ===


def survives(rng: random.Random, name: str) -> bool:
    """Corrupt one file and run one command; say how it failed, if it did."""
    files = sorted(path for path in Path("results").rglob("*") if path.is_file())
    path = rng.choice(files)
    damage = rng.choice(DAMAGES)
    with contextlib.suppress(OSError):
        damage(rng, path)
    words = random_command(rng)
    without_pyyaml = rng.random() < 0.5
    problem = run_command(words, without_pyyaml)
    if problem:
        print(f"FAIL {name}: {damage.__name__} {path}: {words}\n{problem}")
    return not problem


def random_command(rng: random.Random) -> list[str]:
    runs = sorted(str(path) for path in Path("results/exp").glob("*"))
    names = {"RUN": rng.choice(runs), "OTHER": rng.choice(runs)}
    while True:
        words = [word.replace("|", " ") for word in rng.choice(COMMANDS).split(" ")]
        if getattr(run_utils, f"_cmd_{words[0]}", None) is not None:
            return [names.get(word, word) for word in words]


def run_command(words: list[str], without_pyyaml: bool) -> str:
    """Run the command line in this process; return what was wrong, or nothing."""
    out = io.StringIO()
    err = io.StringIO()
    lacking = ValueError("reading YAML takes PyYAML")
    with contextlib.ExitStack() as stack:
        if without_pyyaml:
            patch = mock.patch.object(run_utils, "_pyyaml", side_effect=lacking)
            stack.enter_context(patch)
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(err))
        signal.alarm(SECONDS)
        try:
            status = run_utils.main(words)
        except BaseException:  # SystemExit, too: the words are right
            return traceback.format_exc(limit=-6) + err.getvalue()[-300:]
        finally:
            signal.alarm(0)
    if re.search(CONTROLS, out.getvalue()):
        return f"it prints controls: {out.getvalue()[:300]!r}"
    if status not in allowed(words):
        return f"exit status {status}: {out.getvalue()[:300]!r} {err.getvalue()[-300:]}"
    return ""


def allowed(words: list[str]) -> tuple[int, ...]:
    """Return how a command may end; 2 says that there is no such run any more."""
    if words[0] in ("list", "report", "prune"):
        return (0,)
    return (0, 1, 2)


# === Graphs ===

MERMAID = """
import fs from "node:fs"; import { createRequire } from "node:module";
const require = createRequire(process.env.NODE_PATH + "/x.js");
const { JSDOM } = require("jsdom");
globalThis.window = new JSDOM("").window; globalThis.document = window.document;
const path = require.resolve("mermaid/package.json").replace("package.json", "");
const { default: mermaid } = await import(path + "dist/mermaid.core.mjs");
console.log((await mermaid.parse(fs.readFileSync(0, "utf8"))).diagramType);
"""


def hostile_graph(form: str) -> bytes:
    evil = 'x"]|<b>;`#&\\ end\x1b\n{}()[]--> %% é'
    runs = [Path(evil), Path("end")]
    lines = run_utils._format_graph(form, runs, [(runs[0], runs[1], evil)])
    return ("\n".join(lines) + "\n").encode()


def graphviz_reads_it() -> bool | None:
    if shutil.which("dot") is None:
        print("SKIP graphviz: it is not on this machine")
        return None
    graph = hostile_graph("dot")
    done = subprocess.run(["dot", "-Tsvg"], input=graph, capture_output=True)
    is_right = done.returncode == 0 and done.stdout.count(b'class="node"') == 2
    if not is_right:
        print("FAIL graphviz:", done.stderr.decode()[:300])
    return is_right


def mermaid_reads_it() -> bool | None:
    modules = Path(os.environ.get("NODE_PATH", "/nowhere"), "mermaid")
    if shutil.which("node") is None or not modules.is_dir():
        print("SKIP mermaid: node with mermaid is not on this machine")
        return None
    command = ["node", "--input-type=module", "-e", MERMAID]
    graph = hostile_graph("mermaid")
    done = subprocess.run(command, input=graph, capture_output=True)
    is_right = done.stdout.strip() == b"flowchart-v2"
    if not is_right:
        print("FAIL mermaid:", done.stderr.decode()[-300:])
    return is_right


if __name__ == "__main__":
    sys.exit(main())
