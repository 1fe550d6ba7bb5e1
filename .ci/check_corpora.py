#!/usr/bin/env python3
# SPDX-FileCopyrightText: 2026 the run_utils authors
# SPDX-License-Identifier: MIT
"""Hold redaction against a corpus of secrets and harmless values.

    check_corpora.py [--corpora DIR]

DIR/secrets.jsonl.gz has rows of name, value, secret, where (env, arg, value, url or
config), tier, should_redact and keep; each is written by the tool to a directory, and
every byte of what it wrote is searched. The configs must come back as they are.
"""

from __future__ import annotations

import argparse
import collections
import gzip
import json
import os
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import run_utils  # noqa: E402

LIMITS = {  # share of rows that must be right
    ("must", True): 0.99,
    ("should", True): 0.90,
    ("strict", False): 0.99,
}


def read(path: Path) -> list[Any]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def write(row: dict[str, Any], folder: Path) -> tuple[Any, Any]:
    """Write one row as the tool would; return what was given and what came back."""
    given: Any
    if row["where"] == "arg":
        argv = row.get("argv") or shlex.split(row["value"])
        given = {"argv": argv, "command": shlex.join(argv)}
    else:
        given = row["value"]
        dotted = row["name"].split(".") if row["where"] == "config" else [row["name"]]
        for part in reversed(dotted):
            given = {part: given}
    path = folder / "metadata.json"
    # As in a process of its own, which has learned from nothing else.
    with mock.patch.object(run_utils, "_redactor", run_utils._Redactor()):
        run_utils._redactor.learn(given)
        if row["where"] in ("config", "value"):
            run_utils.write_config_yaml(folder, "python train.py", given)
        run_utils._write_json(path, given)
    return given, json.loads(path.read_text("ascii"))


def is_right(row: dict[str, Any], folder: Path) -> bool:
    given, found = write(row, folder)
    if not row["should_redact"]:
        return bool(given == found)
    files = [path.read_text("utf-8") for path in folder.iterdir() if path.is_file()]
    text = json.dumps(found, ensure_ascii=False) + "".join(files)
    secret = row["secret"]
    hidden = secret not in text and json.dumps(secret)[1:-1] not in text
    return hidden and all(keep in text for keep in row.get("keep") or [])


def check_secrets(path: Path) -> tuple[int, int]:
    right: collections.Counter[Any] = collections.Counter()
    total: collections.Counter[Any] = collections.Counter()
    for row in read(path):
        with tempfile.TemporaryDirectory() as folder:
            key = row["tier"], row["should_redact"]
            total[key] += 1
            right[key] += is_right(row, Path(folder))
    failed = 0
    for key in sorted(total):
        share = right[key] / total[key]
        limit = LIMITS.get(key, 0.0)
        failed += share < limit
        kind = "replaced" if key[1] else "kept"
        print(
            f"{key[0]:8} {kind:8} {right[key]}/{total[key]} = {share:.1%}, {limit:.0%}"
        )
    return len(total) - failed, failed


def check_configs(path: Path) -> tuple[int, int]:
    """Count the configs that come back as they are, also in the same process."""
    configs = [row["payload"] for row in read(path)]
    redactor = run_utils._Redactor()
    for config in configs:
        redactor.learn(config)
    changed = [config for config in configs if redactor.data(config) != config]
    return len(configs) - len(changed), len(changed)


def main() -> int:
    parser = argparse.ArgumentParser(description="Redaction on the corpora.")
    place = os.environ.get("RUN_UTILS_CORPORA", ROOT.parent / "shared" / "corpora")
    parser.add_argument("--corpora", type=Path, default=place)
    corpora = parser.parse_args().corpora
    passed = failed = skipped = 0
    for name, check in (
        ("secrets.jsonl.gz", check_secrets),
        ("configs.jsonl.gz", check_configs),
    ):
        if (corpora / name).exists():
            good, bad = check(corpora / name)
            passed, failed = passed + good, failed + bad
        else:
            print(f"SKIP {name}: there are no corpora beside the checkout")
            skipped += 1
    print(f"{passed} passed, {failed} failed, {skipped} skipped")
    return int(failed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
