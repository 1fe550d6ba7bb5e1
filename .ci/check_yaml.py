"""Compare both YAML writers and read their text back with every reader at hand.

    check_yaml.py [--count 10000] [--seed 1] [--corpora DIR]

FUZZ_COUNT and FUZZ_SEED set the first two as well. PyYAML and ruamel.yaml come from
this interpreter, js-yaml from node (NODE_PATH). Ends with one line of counts.
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
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = next(d for d in (HERE, *HERE.parents) if (d / "run_utils.py").exists())
sys.path.insert(0, str(ROOT))

import run_utils  # noqa: E402

WORDS = [
    "y",
    "N",
    "yes",
    "No",
    "on",
    "OFF",
    "true",
    "False",
    "null",
    "~",
    "None",
    "nan",
    ".nan",
    "inf",
    ".inf",
    "-.INF",
    "1e3",
    "1E5",
    "1e-3",
    "08",
    "09",
    "010",
    "0o17",
    "0x1F",
    "0x1p-3",
    "0b11",
    "1_000",
    "12:30",
    "12:30:45",
    "190:20:30.15",
    "2024-01-01",
    "=",
    "<<",
    "2001-12-14t21:59:43.10-05:00",
    "2024-01-01T00:00:00Z",
    ".",
    "..",
    "...",
    "---",
    "--",
    "-",
    "?",
    ":",
    ",",
    "#",
    "&",
    "*",
    "!",
    "|",
    ">",
    "%",
    "@",
    "`",
    "'",
    '"',
    "[",
    "]",
    "{",
    "}",
    "[]",
    "{}",
    "a:",
    "a:b",
    ":a",
    "a,b",
    "a#b",
    "#a",
    "&a",
    "*a",
    "!a",
    "!!str",
    "%YAML",
    "-a",
    "--lr",
    "?a",
    "a?",
    "|-",
    "|2",
    ">+",
    ".5",
    "5.",
    "+.5",
    "-.5",
    "1.",
    "+1",
    "-1",
    "+0",
    "e3",
    "1.e5",
    "1e400",
    "0",
    "00",
    "_1",
    "1_",
    "0_",
    "0x",
    "0xG",
    "1__0",
    "./x",
    "../x",
    ".x",
    "~/x",
    "~x",
    "/x",
    "//x",
    "cuda:0",
    "s3://b/k",
    "C:\\x",
    "a=b",
    "a=1,b=2",
    "Qwen/Qwen3-8B",
    "lr",
    "1e-4",
    "\\n",
    "\\x41",
    "\\ud83d",
    "<cycle>",
    "\\",
    "\\\\",
    "a\\",
    "''",
    '""',
]
MARKS = (
    "\x00\x01\x07\x08\t\n\x0b\x0c\r\x1b\x1f \x7f\x80\x85\x9b\xa0\xad\u061c\u200b\u200d"
    "\u200e\u2028\u2029\u202e\u2066\u2069\u3000\ufb50\ufdd0\ufeff\ufff9\ufffd\ufffe"
    "\uffff\ud7ff\ue000\U00010000\U0001fffe\U0001f600\U000e0041\U0010ffff\u00e9\u4e2d"
)


def random_text(rng: random.Random) -> str:
    shape = rng.random()
    if shape < 0.45:
        return rng.choice(WORDS)
    if shape < 0.6:
        return rng.choice(
            (" ", ": ", " #", ":", "\n", "", "  ", "\t", "- ", ", ")
        ).join(rng.choice(WORDS) for _ in range(rng.randint(0, 4)))
    if shape < 0.8:
        return "".join(rng.choice(MARKS + "ab1 ") for _ in range(rng.randint(0, 9)))
    if shape < 0.9:
        return "".join(chr(rng.randint(32, 126)) for _ in range(rng.randint(0, 12)))
    if shape < 0.97:
        code = rng.choice((rng.randint(0, 0xD7FF), rng.randint(0xE000, 0x10FFFF)))
        return chr(code) * rng.randint(1, 3)
    return rng.choice(("x", "a b ", "\xe9", "\n", "1")) * rng.randint(60, 1500)


def random_number(rng: random.Random) -> object:
    shape = rng.random()
    if shape < 0.3:
        return rng.randint(-20, 20)
    if shape < 0.5:
        return rng.choice((-1, 1)) * rng.getrandbits(
            rng.choice((31, 53, 64, 128, 1000))
        )
    if shape < 0.6:
        return rng.choice((0.0, -0.0, math.inf, -math.inf, math.nan, 5e-324, 1.8e308))
    if shape < 0.8:
        return rng.choice((1, -1)) * float(
            f"{rng.randint(1, 99)}e{rng.randint(-320, 307)}"
        )
    return rng.uniform(-1, 1) * 10 ** rng.randint(-6, 20)


def random_value(rng: random.Random, depth: int = 0) -> object:
    shape = rng.random()
    if depth < 5 and shape < (0.9 if depth == 0 else 0.3):
        size = rng.choice((0, 1, 1, 2, 3, 5))
        if rng.random() < 0.5:
            return [random_value(rng, depth + 1) for _ in range(size)]
        return {random_text(rng): random_value(rng, depth + 1) for _ in range(size)}
    if shape < 0.75:
        return random_text(rng)
    return rng.choice((None, True, False)) if shape < 0.82 else random_number(rng)


def same(left: object, right: object) -> bool:
    """Whether two values are identical, types and signs of zero included."""
    if type(left) is not type(right):
        return False
    if isinstance(left, dict) and isinstance(right, dict):
        pairs = zip(left.items(), right.items())
        return len(left) == len(right) and all(
            a == b and same(x, y) for (a, x), (b, y) in pairs
        )
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, float):
        return isinstance(right, float) and left.hex() == right.hex()
    return bool(left == right)


NODE = """
const lines = require("fs").readFileSync(process.argv[2], "utf8").trim().split("\\n");
const yaml = require(process.argv[3]);
const special = (text) => Object.is(Number(text), NaN) ? NaN : Number(text);
function same(value, wanted) {  // numbers come as {"#": "text"}
  if (Array.isArray(wanted))
    return Array.isArray(value) && value.length === wanted.length &&
      wanted.every((item, i) => same(value[i], item));
  if (wanted === null || typeof wanted !== "object") return value === wanted;
  if ("#" in wanted) {  // parseInt() may round long digits otherwise than Number()
    const number = special(wanted["#"]);
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
  if (!good) { if (bad++ < 5) console.error(JSON.stringify(text).slice(0, 400), why); }
}
console.log(lines.length - bad, bad);
"""


def marked(value: object) -> object:
    """Return the value with numbers and mappings marked, for a reader without ints."""
    if isinstance(value, dict):
        return {"=": [[key, marked(item)] for key, item in value.items()]}
    if isinstance(value, list):
        return [marked(item) for item in value]
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        text = repr(value).replace("inf", "Infinity").replace("nan", "NaN")
        return {"#": text}
    return value


class Report:
    def __init__(self) -> None:
        self.passed, self.failed, self.skipped = 0, 0, 0

    def check(self, ok: bool, what: str, text: str = "") -> None:
        self.passed, self.failed = self.passed + ok, self.failed + (not ok)
        if not ok and self.failed < 10:
            print(f"FAIL {what}: {text[:300]!r}")

    def skip(self, what: str) -> None:
        self.skipped += 1
        print(f"skipped: {what}")


def corpus_values(directory: Path, report: Report) -> list[object]:
    values: list[object] = []
    for name, key in (("strings", "value"), ("configs", "payload")):
        path = directory / f"{name}.jsonl.gz"
        if not path.exists():
            report.skip(f"corpus {name}.jsonl.gz")
            continue
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            rows = [run_utils._plain(json.loads(line)[key]) for line in lines]
        values += rows
        if key == "value":
            values += [{text: [text, {text: text}]} for text in rows]
    return values


def check_node(texts: list[tuple[str, object]], report: Report) -> None:
    node = shutil.which("node")
    env = dict(os.environ)
    env.setdefault("NODE_PATH", str(HERE / "node" / "node_modules"))
    with tempfile.TemporaryDirectory() as folder:
        rows, script = Path(folder, "rows"), Path(folder, "read.js")
        script.write_text(NODE, encoding="utf-8")
        with rows.open("w", encoding="utf-8") as file:
            for text, value in texts:
                file.write(json.dumps([text, marked(value)]) + "\n")
        for package in ("js-yaml", "js-yaml3"):
            result = None
            if node:
                result = subprocess.run(
                    [node, str(script), str(rows), package],
                    env=env,
                    capture_output=True,
                    text=True,
                    timeout=100,
                )
            if result is None or "Cannot find module" in result.stderr:
                report.skip(f"{package} (needs node and the package in NODE_PATH)")
                continue
            print(result.stderr, end="")
            good, bad = map(int, (result.stdout or "0 1").split())
            report.passed, report.failed = report.passed + good, report.failed + bad


def readers(report: Report) -> dict[str, object]:
    found: dict[str, object] = {}
    try:
        import yaml

        found["PyYAML"] = yaml.safe_load
        if hasattr(yaml, "CSafeLoader"):
            found["libyaml"] = lambda text: yaml.load(text, yaml.CSafeLoader)
    except ImportError:
        report.skip("PyYAML")
    try:
        import ruamel.yaml

        found["ruamel.yaml"] = lambda text: ruamel.yaml.YAML(
            typ="safe", pure=True
        ).load(text)
    except ImportError:
        report.skip("ruamel.yaml")
    return found


def check_own_reader(text: str, value: object, report: Report) -> None:
    """Read our text, and the ways PyYAML writes it, without PyYAML."""
    found = run_utils._YamlReader(text).document()
    report.check(same(found, value), "our reader of our text", text)
    try:
        import yaml
    except ImportError:
        return
    text = yaml.safe_dump(value, **LAYOUTS[report.passed % len(LAYOUTS)])
    wanted = run_utils._plain(yaml.safe_load(text))
    if not same(wanted, value):
        return  # PyYAML cannot read what it wrote
    try:
        found = run_utils._YamlReader(text).document()
    except ValueError as beyond:
        report.check("takes PyYAML to read" in str(beyond), "our refusal", text)
    else:
        report.check(same(found, wanted), "our reader", text)


LAYOUTS: list[dict[str, Any]] = [{"sort_keys": False}, {"allow_unicode": True}]
LAYOUTS += [{"default_flow_style": None}, {"width": 30, "indent": 4}]


def main() -> int:
    parser = argparse.ArgumentParser(description="Fuzz the YAML writers.")
    env = os.environ.get
    parser.add_argument("--count", type=int, default=int(env("FUZZ_COUNT", "10000")))
    parser.add_argument("--seed", type=int, default=int(env("FUZZ_SEED", "1")))
    parser.add_argument(
        "--corpora", type=Path, default=ROOT.parent / "shared" / "corpora"
    )
    options = parser.parse_args()
    report, rng = Report(), random.Random(options.seed)
    values = corpus_values(options.corpora, report)
    values += [random_value(rng) for _ in range(options.count)]
    loaders = readers(report)
    texts = []
    for value in values:
        tree = run_utils._yaml_tree(value)
        text = "\n".join(run_utils._yaml_lines(tree)) + "\n"
        text.encode("utf-8")
        texts.append((text, value))
        report.check(text == run_utils._format_yaml(value), "_format_yaml", text)
        if "PyYAML" in loaders:
            report.check(text == run_utils._yaml_by_pyyaml(tree), "bytes differ", text)
        for name, load in loaders.items():
            if name == "ruamel.yaml" and len(text) > 4000:
                continue
            try:
                good = same(load(text), value)  # type: ignore[operator]
            except Exception as problem:
                print(name, type(problem).__name__, str(problem)[:200])
                good = False
            report.check(good, name, text)
        check_own_reader(text, value, report)
    check_node(texts, report)
    print(f"{report.passed} passed, {report.failed} failed, {report.skipped} skipped")
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main())
