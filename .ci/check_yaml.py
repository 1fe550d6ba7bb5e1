#!/usr/bin/env python3
# SPDX-FileCopyrightText: 2026 the run_utils authors
# SPDX-License-Identifier: MIT
"""Write random and collected values as YAML; every reader at hand reads them back.

    check_yaml.py [--count 3000] [--seed 1]

PyYAML, libyaml and ruamel.yaml come from this interpreter, js-yaml from node
(NODE_PATH). RUN_UTILS_CORPORA names a folder with strings.jsonl.gz and
configs.jsonl.gz. Ends with one line of counts.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import run_utils  # noqa: E402

WORDS = r"""
y N yes No on OFF true False null ~ None nan .nan inf .inf -.INF 1e3 1E5 1e-3 1e-4 08 09
010 0o17 0x1F 0x1p-3 0b11 1_000 12:30 12:30:45 190:20:30.15 2024-01-01 = <<
2001-12-14t21:59:43.10-05:00 2024-01-01T00:00:00Z . .. ... --- -- - ? : , # & * ! | > %
@ ` ' " [ ] { } [] {} a: a:b :a a,b a#b #a &a *a !a !!str %YAML -a --lr ?a a? |- |2 >+
.5 5. +.5 -.5 1. +1 -1 +0 e3 1.e5 1e400 0 00 _1 1_ 0_ 0x 0xG 1__0 ./x ../x .x ~/x ~x /x
//x cuda:0 s3://b/k C:\x a=b a=1,b=2 Qwen/Qwen3-8B lr \n \x41 \ud83d <cycle> \ \\ a\ ''
""
""".split()
MARKS = (
    "\x00\x01\x07\x08\t\n\x0b\x0c\r\x1b\x1f \x7f\x80\x85\x9b\xa0\xad\u061c\u200b\u200d"
    "\u200e\u2028\u2029\u202e\u2066\u2069\u3000\ufb50\ufdd0\ufeff\ufff9\ufffd\ufffe"
    "\uffff\ud7ff\ue000\U00010000\U0001fffe\U0001f600\U000e0041\U0010ffff\u00e9\u4e2d"
)
JOINTS = (" ", ": ", " #", ":", "\n", "", "  ", "\t", "- ", ", ")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--count", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    report = Report()
    rng = random.Random(options.seed)
    values = corpus_values(report)
    values += [random_value(rng) for _ in range(options.count)]
    rows = [(run_utils._format_yaml(value), value) for value in values]
    for name, load in find_readers(report).items():
        for text, value in rows:
            if name in SLOW and len(text) > 4000:
                continue
            report.check(name, text, value, load)
    check_node(rows, report)
    print(f"{report.passed} passed, {report.failed} failed, {report.skipped} skipped")
    return int(report.failed > 0)


class Report:
    """What was counted."""

    def __init__(self) -> None:
        self.passed = 0
        self.failed = 0
        self.skipped = 0

    def check(
        self, name: str, text: str, value: object, load: Callable[[str], object]
    ) -> None:
        """Have a reader read a text, and compare with what was written."""
        try:
            why = "another value"
            is_right = is_same(load(text), value)
        except Exception as error:
            why = f"{type(error).__name__}: {error}"
            is_right = False
        if is_right:
            self.passed += 1
            return
        self.failed += 1
        if self.failed < 10:
            print(f"FAIL {name}: {text[:300]!r}: {why[:300]}")

    def skip(self, name: str, reason: str) -> None:
        self.skipped += 1
        print(f"SKIP {name}: {reason}")


# === Values ===


def corpus_values(report: Report) -> list[object]:
    """Return collected strings, also as keys, and collected configs."""
    folder = Path(os.environ.get("RUN_UTILS_CORPORA", "/nonexistent"))
    values: list[object] = []
    for name, key in (("strings", "value"), ("configs", "payload")):
        path = folder / f"{name}.jsonl.gz"
        if not path.exists():
            report.skip(path.name, "there are no corpora on this machine")
            continue
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            rows = [run_utils._plain(json.loads(line)[key]) for line in lines]
        values += rows
        if name == "strings":
            values += [{text: [text, {text: text}]} for text in rows]
    return values


def random_value(rng: random.Random, depth: int = 0) -> object:
    shape = rng.random()
    share = 0.3
    if depth == 0:
        share = 0.9
    if depth < 5 and shape < share:
        size = rng.choice((0, 1, 1, 2, 3, 5))
        if rng.random() < 0.5:
            return [random_value(rng, depth + 1) for _ in range(size)]
        return {random_text(rng): random_value(rng, depth + 1) for _ in range(size)}
    if shape < 0.75:
        return random_text(rng)
    if shape < 0.82:
        return rng.choice((None, True, False))
    return random_number(rng)


def random_text(rng: random.Random) -> str:
    shape = rng.random()
    if shape < 0.45:
        return rng.choice(WORDS)
    if shape < 0.6:
        words = [rng.choice(WORDS) for _ in range(rng.randint(0, 4))]
        return rng.choice(JOINTS).join(words)
    if shape < 0.8:
        return "".join(rng.choice(MARKS + "ab1 ") for _ in range(rng.randint(0, 9)))
    if shape < 0.9:
        return "".join(chr(rng.randint(32, 126)) for _ in range(rng.randint(0, 12)))
    if shape < 0.97:  # any character but a surrogate
        code = rng.choice((rng.randint(0, 0xD7FF), rng.randint(0xE000, 0x10FFFF)))
        return chr(code) * rng.randint(1, 3)
    return rng.choice(("x", "a b ", "\xe9", "\n", "1")) * rng.randint(60, 1500)


def random_number(rng: random.Random) -> object:
    shape = rng.random()
    sign = rng.choice((1, -1))
    if shape < 0.3:
        return rng.randint(-20, 20)
    if shape < 0.5:
        return sign * rng.getrandbits(rng.choice((31, 53, 64, 128, 1000)))
    if shape < 0.6:
        return rng.choice((0.0, -0.0, math.inf, -math.inf, math.nan, 5e-324, 1.8e308))
    if shape < 0.8:
        return sign * float(f"{rng.randint(1, 99)}e{rng.randint(-320, 307)}")
    return rng.uniform(-1, 1) * 10 ** rng.randint(-6, 20)


def is_same(left: object, right: object) -> bool:
    """Tell whether two values are identical, types and signs of zero included."""
    if type(left) is not type(right):
        return False
    if isinstance(left, dict) and isinstance(right, dict):
        if list(left) != list(right):
            return False
        return all(is_same(left[key], right[key]) for key in left)
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(map(is_same, left, right))
    if isinstance(left, float) and isinstance(right, float):
        return left.hex() == right.hex()
    return left == right


# === Readers ===

SLOW = ("PyYAML", "ruamel.yaml")


def find_readers(report: Report) -> dict[str, Callable[[str], object]]:
    """Return the readers of this interpreter; run_utils' own goes through PyYAML."""
    found: dict[str, Callable[[str], object]] = {}
    try:
        import yaml
    except ImportError:
        report.skip("PyYAML", "it is not installed")
    else:
        found["PyYAML"] = yaml.safe_load
        found["run_utils"] = run_utils._parse_yaml
        if hasattr(yaml, "CSafeLoader"):
            found["libyaml"] = lambda text: yaml.load(text, yaml.CSafeLoader)
    try:
        import ruamel.yaml
    except ImportError:
        report.skip("ruamel.yaml", "it is not installed")
    else:
        reader = ruamel.yaml.YAML(typ="safe", pure=True)
        found["ruamel.yaml"] = reader.load
    return found


NODE = """
const lines = require("fs").readFileSync(process.argv[2], "utf8").trim().split("\\n");
const yaml = require("js-yaml");
function same(value, wanted) {  // numbers come as {"#": "text"}
  if (Array.isArray(wanted))
    return Array.isArray(value) && value.length === wanted.length &&
      wanted.every((item, i) => same(value[i], item));
  if (wanted === null || typeof wanted !== "object") return value === wanted;
  if ("#" in wanted) {  // parseInt() may round long digits otherwise than Number()
    const number = Number(wanted["#"]);
    const long = Math.abs(number) > 2 ** 53 && !wanted["#"].includes("e");
    return Object.is(value, number) || (long && Math.abs(value / number - 1) < 1e-14);
  }
  const pairs = wanted["="];
  return value !== null && typeof value === "object" && !Array.isArray(value) &&
    Object.keys(value).length === pairs.length &&
    pairs.every(([key, item]) => Object.hasOwn(value, key) && same(value[key], item));
}
let bad = 0;
for (const line of lines) {
  const [text, wanted] = JSON.parse(line);
  let good = false, why = "";
  try { good = same(yaml.load(text), wanted); } catch (error) { why = String(error); }
  if (!good) {
    bad += 1;
    const shown = JSON.stringify(text).slice(0, 300);
    if (bad < 6) console.error("FAIL js-yaml:", shown, why);
  }
}
console.log(lines.length - bad, bad);
"""


def check_node(rows: list[tuple[str, object]], report: Report) -> None:
    """Have js-yaml, a reader of YAML 1.2, read all texts in one process."""
    node = shutil.which("node")
    if node is None:
        report.skip("js-yaml", "node is not on this machine")
        return
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder, "rows")
        lines = [json.dumps([text, marked(value)]) for text, value in rows]
        data.write_text("\n".join(lines), "utf-8")
        done = subprocess.run(
            [node, "-e", NODE, "-", str(data)], capture_output=True, encoding="utf-8",
            timeout=100,
        )  # fmt: skip
    if "Cannot find module" in done.stderr:
        report.skip("js-yaml", "it is not in NODE_PATH")
        return
    print(done.stderr, end="")
    passed, failed = (done.stdout or "0 1").split()
    report.passed += int(passed)
    report.failed += int(failed)


def marked(value: Any) -> object:
    """Return the value with numbers and mappings marked, for a reader without ints."""
    if isinstance(value, dict):
        return {"=": [[key, marked(item)] for key, item in value.items()]}
    if isinstance(value, list):
        return [marked(item) for item in value]
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return {"#": repr(value).replace("inf", "Infinity").replace("nan", "NaN")}
    return value


if __name__ == "__main__":
    sys.exit(main())
