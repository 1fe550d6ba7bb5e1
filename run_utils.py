# SPDX-FileCopyrightText: 2026 the run_utils authors
# SPDX-License-Identifier: MIT
"""Record every experiment as plain files, with no server, daemon or dependency.

    from run_utils import run_context, log_metrics

    with run_context("results/probe", config_args=vars(args)) as run_dir:
        for step in range(args.steps):
            log_metrics(run_dir, {"loss": train_step()}, step=step)

leaves one directory that anybody can read without this file:

    results/probe/train-20260131-142501-1a2b3c4/
        config.yaml      the command and all arguments
        metadata.json    git, python, platform, CUDA, packages, host, environment
        status.json      "running" from the first moment, then how it ended
        git.patch        what a clone of the remote lacks of the code that ran
        logs/            stdout.log, stderr.log, or output.log for both
        plots/ artifacts/ samples/ metrics/

`python -m run_utils run -- CMD ...` records a command in any language, and
`python -m run_utils inspect RUN` reads a record back.

Contents (search for the heading):

    Settings                     everything you may want to change
    Recording a run              the public functions, as a run lives through them
    Reading runs                 find_runs, load_run and Run
    A recording                  one block, from entry to exit
    The record                   the files of a run, and its lines in the index
    Several processes            many ranks, one run
    The recorder                 the helper process: slow work, a record of any death
    Output                       stdout and stderr into logs/
    Provenance                   what the machine, Python and its packages say
    Resources                    what the run took of processor, memory and GPU
    Git                          the code that ran, as a patch from what a remote has
    Reproducing                  a run done again, and how exactly
    Lineage                      which run fed which
    Redaction                    no secret reaches the disk
    Plain data                   any Python object to plain data, and that to text
    Programs and processes       foreign programs, and who is alive
    Files                        whole or absent, never half-written
    Finding and comparing runs   one finder, one walk, one comparison
    Showing                      columns and paragraphs as text, Markdown, CSV, HTML
    Report                       one page that shows a folder of runs
    Running a command            run -- CMD: its signals, terminal and exit status
    Command line                 the table of commands

The rules: recording never stops an experiment; a caller's mistake raises at once;
no file is ever half-written; one writer for each file; no secret reaches the disk;
the user's process is left alone; a run directory is the truth and everything else a
cache; no locks.
"""

# `as annotations` keeps pyupgrade from removing it in the copy of a project.
from __future__ import annotations as annotations

import bisect
import contextlib
import errno
import functools
import io
import itertools
import json
import operator
import os
import re
import select
import shlex
import signal
import stat
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from os.path import (
    abspath,
    basename,
    dirname,
    exists,
    isabs,
    isdir,
    isfile,
    join,
    lexists,
    normpath,
    realpath,
    relpath,
)
from pathlib import Path
from time import monotonic

TYPE_CHECKING = False
if TYPE_CHECKING:
    import subprocess  # nosec
    from argparse import ArgumentParser, Namespace
    from types import CodeType
    from typing import Any, TypeVar, Union

    Function = TypeVar("Function", bound=Callable[..., Any])
    StrPath = Union[str, os.PathLike[str]]
    JSON = Any  # plain data: dict, list, str, int, float, bool, None
    Facts = dict[str, JSON]  # a JSON object whose keys a file format fixes

__all__ = [
    "DEFAULT_SUBDIRS", "Run", "capture_metadata", "ensure_run_dir", "find_runs",
    "load_run", "log_metrics", "main", "mark_artifact_used", "mark_status",
    "run_context", "save_json", "start_run", "write_config_yaml",
]
__version__ = "2.0.0"
# vendor.sh writes here which version and git blob a copy is.
__vendored__ = None
SCHEMA_VERSION = 2  # of the files in a run directory; keys are added, never renamed

# === Settings ===
# Everything you may want to change. Times are in seconds, sizes in bytes. A program
# can also assign one before it enters a run: `run_utils.PATCH_FILE_BYTES = 1_000_000`.

DEFAULT_SUBDIRS = ["logs", "plots", "artifacts", "samples", "metrics"]

# The recorder
HEARTBEAT_SECONDS = 10  # how often the recorder touches status.json and samples
LOST_AFTER_SECONDS = 60  # a run of another host whose heartbeat is older is "lost"
RANK_WAIT_SECONDS = 120  # how long a rank waits for rank 0 to create the run
RANK_POLL_SECONDS = 0.02  # how often it looks meanwhile
RECORDER_SECONDS = 2.0  # how long entry waits for the recorder's first answer
EXIT_WAIT_SECONDS = 60  # how long leaving the block waits for the captures
SAMPLE_SHARE = 0.002  # of a core, which measuring may take
PROPORTIONAL_BYTES = 4_000_000_000  # more memory is not counted page by page
PROPORTIONAL_SECONDS = 0.02  # and no longer if counting takes so long

# Output
FORWARD_BYTES = 65_536  # how much output is forwarded at a time
SILENT_SECONDS = 2.0  # how often output is looked for after a long silence
LOOK_SECONDS = 1.0  # how often a writer sees whether the recorder is alive
DRAIN_SECONDS = 0.8  # how long a full disk waits for what is still to be shown
LAST_OUTPUT_LINES = 20  # of the log, in the status.json of a killed run
MAX_MESSAGE = 4096  # characters of an exception's message
MAX_TRACEBACK = 40_000  # characters

# What foreign programs may take
HEAD_SECONDS = 2.0  # the short hash, which entry waits for
PROGRAM_SECONDS = 10.0  # git or nvidia-smi
PIP_SECONDS = 60.0  # `pip freeze`, slow on network disks
GPU_SECONDS = 5.0  # nvidia-smi, for one sample
SACCT_SECONDS = 5.0  # SLURM's sacct, for one question
SACCT_JOBS = 200  # jobs in one question
PROGRAM_BYTES = 20_000_000  # a program that prints more is stopped

# The code that ran
PATCH_SECONDS = 20.0  # what reading the files of one patch may take, and its diff
PATCH_FILE_BYTES = 5_000_000  # a changed file that is larger is listed, not kept
PATCH_BYTES = 20_000_000  # the same for all changed files of a patch together
PATCH_FILES = 2000  # and for their number
WHOLE_BYTES = 2_000_000  # a tree that no remote has is kept whole up to this
WHOLE_FILES = 2000  # and up to this number of files
LINK_BYTES = 65_536  # a larger patch that did not change becomes a hard link
WALK_SECONDS = 2.0  # what looking for source files may take where there is no git
HASH_BYTES = 100_000_000  # a file left out of a patch is hashed up to this size
MAX_LISTED = 200  # changed files named in metadata.json

# The name of a run, what it used and what it left
MAX_SAME_NAME = 1000  # runs of one name: name, name-2, name-3, ...
MAX_PREFIX_BYTES = 180  # of the run's name, which must stay within 255
OPEN_METRICS = 50  # files of metrics that stay open between two rows
MAX_INPUTS = 1000  # words of config and argv that are looked at for files of other runs
INPUT_SECONDS = 2.0  # what looking for them may take
OUTPUT_FILES = 1000  # files left by a run that metadata.json lists
OUTPUT_SECONDS = 2.0  # what hashing them may take at the end of a run

# Redaction
MIN_SECRET = 8  # a shorter value is replaced under its own name only
MAX_SECRET = 65_536  # characters; what is longer is a file, not a secret
MAX_LEARNED = 200  # secrets of one file; a file with more is a table of test data
MAX_REDACTED = 110_000  # characters of a text that are kept and searched

# Reading
MAX_READ = 50_000_000  # a larger file is not read
MAX_RECORD = 16_000_000  # a larger metadata.json or status.json is not read
MAX_CONFIG = 1_000_000  # a larger YAML file is not read
MAX_METRICS = 4_000_000_000  # a larger metrics.jsonl is not read
METRICS_BYTES = 262_144  # how much of it is read at a time
MAX_INDEX = 400_000_000  # a larger index is not read
MAX_EARLIER = 100  # runs beside a new one that are asked for their packages
MAX_WALK = 6  # folders between a results root and a run
LINK_SECONDS = 10.0  # what following links in a results tree may take
TRASH_FOLDER = ".trash"  # in a results root, where prune moves runs
MANY_RUNS = 100  # of more than these in a folder, or to be sorted, the index is asked
INDEX_SECONDS = 300  # how long after its start the line of a run may be written
MAX_COMPARED = 200  # runs beside the shown ones that decide what differs
MAX_SHOWN = 40  # lines of config that inspect shows
MAX_ROWS = 50  # runs that list shows
NAME_WIDTH = 24  # a run's name is this wide before columns of a table are left out
LEAST_NAME_WIDTH = 18  # and this wide where all columns were asked for
TEXT_WIDTH = 12  # the same for another text; a number is never shortened
SPARKLINE_WIDTH = 24  # columns of a metric's curve
DIFF_LINES = 2_000  # lines of a text that are compared
PROGRESS_SECONDS = 2.0  # after so long a terminal is told how far something is
FOLLOW_SECONDS = 2.0  # how often `inspect --follow` looks again

# More limits
FETCH_SECONDS = 600.0  # what fetching the commit of a run may take
INSTALL_SECONDS = 3600.0  # what one step of making an environment may take
PLAN_DETAILS = 5  # lines on one respect: what is said fits on a screen
WHEEL_INDEX = "https://download.pytorch.org/whl/"  # has the versions with +cu121, +cpu
REPRODUCES = "RUN_UTILS_REPRODUCES"  # tells a new run which one it does again
MAX_KEYS = 10_000  # keys of mappings that are remembered as clean
MAX_LINE = 160  # characters before a literal in code that are searched for its name
MAX_BEFORE = 1000  # the same for the call, list or mapping that it stands in
KILL_SECONDS = 10.0  # how long a command may take to end after its time limit

# The report
REPORT_RUNS = 200  # runs with curves and details in a report
REPORT_PLOTS = 24  # metrics that have a plot in a report
REPORT_POINTS = 300  # points of a curve in a report
REPORT_BYTES = 1_900_000  # of a report: curves take what room is left
REPORT_CURVE_BYTES = 400_000  # but at least so much
REPORT_POINT_BYTES = 20  # of one point of a curve, with its exact value
REPORT_TEXT_BYTES = 100_000  # of exceptions, outputs and so on in a report
REPORT_EMBED_BYTES = 5_000_000  # of images inside a report
REPORT_IMAGES = 200  # images that a report shows
REPORT_AXES = 8  # keys of the config in the parallel coordinates
REPORT_WORDS = 12  # different words on one of these axes
REPORT_COLOURS = 8  # of the style sheet; with dashes and dots three times that

LOCK_FILES = (  # of a project, whose sha256 metadata.json tells
    "uv.lock", "poetry.lock", "pdm.lock", "Pipfile.lock", "pixi.lock", "pylock.toml",
    "conda-lock.yml", "environment.yml", "environment.yaml", "requirements.txt",
)

# Limits of a config: a marker stands for what lies beyond.
MAX_DEPTH = 64  # levels of nesting
MAX_ITEMS = 10_000  # items of one list or mapping
MAX_NODES = 100_000  # values of one document, all levels together
MAX_ARRAY = 100  # items of an array, tensor or range; a larger one is summarised
MAX_TEXT = 100_000  # characters of one string
MAX_REPR = 500  # bytes, or characters of an object that only its repr can show
MAX_INT_BITS = 1_023  # 308 digits; JavaScript reads no larger number
YAML_WIDTH = 80  # a list up to this width is one line, a longer key is "? key"

_DEFAULTS = {name: value for name, value in list(globals().items()) if name.isupper()}


def _changed_settings() -> Facts:
    """Return the settings that the program has assigned, for the recorder."""
    return _changed(_DEFAULTS, {name: globals()[name] for name in _DEFAULTS})


# === Recording a run ===
# Once the run directory exists nothing here raises into the experiment: what cannot
# be recorded is left out, and one line on stderr says so.


def run_context(
    base_dir: StrPath, run_prefix: str | None = None, config_args: object = None,
    config_filename: str = "config.yaml", create_subdirs: bool = True,
    subdirs: Sequence[str] | None = None, *, run_dir: StrPath | None = None,
    resume: StrPath | None = None, notes: str | None = None, tags: Sequence[str] = (),
    capture_output: bool = True, ranks: str = "together", resources: bool = True,
) -> _Recording:
    """Record what happens inside the ``with`` block, and how it ends.

    On entry ``<base_dir>/<run_prefix>-<YYYYMMDD-HHMMSS>-<git_hash>/`` is created and
    yielded as an absolute Path, holding config.yaml (`config_args`: a mapping, an
    argparse.Namespace, a dataclass, ...; read once, never changed), metadata.json and
    status.json ("running"). `run_prefix` defaults to the name of the script; in it
    ``{key}`` is filled from the config: ``"{model}-lr{lr}"``.
    Output goes to logs/ as well, unless `capture_output` is false; what the run takes
    of processor, memory and GPU goes to metrics/system.jsonl, unless `resources` is
    false. On exit status.json says how it ended and how long it took (in seconds);
    the exception, if any, goes on unchanged. `RUN_DIR` is set in the environment
    inside the block.

    `run_dir` uses exactly that directory; `resume` goes on in an earlier run (its
    path, its name under `base_dir`, "latest" of this prefix that was no success, or
    "auto": the run of this very job before it was requeued or restarted, else a new
    one): the record that is there moves to attempts/<n>/. `notes` and `tags` become a
    line of notes.jsonl.

    The processes of torchrun, srun or mpirun share one run: rank 0 records it, the
    others get the same Path and have logs/rank<k>.*; ``ranks="separate"`` gives each
    its own.

    Also a decorator, for functions, coroutines and generators: each call is a run.
    Raises TypeError, ValueError or OSError before anything is recorded.
    """
    options = _Options(base_dir, run_prefix, create_subdirs, subdirs)
    options.config_args = config_args
    options.config_filename = _checked_filename(config_filename)
    options.capture_output = capture_output
    options.resources = resources
    if ranks not in ("together", "separate"):
        raise ValueError(f"ranks is {ranks!r}; give 'together' or 'separate'")
    options.ranks = ranks
    options.notes = notes
    if isinstance(tags, str):
        raise TypeError(f"tags must be a list of strings, not {tags!r}; use [{tags!r}]")
    options.tags = list(tags)
    if run_dir is not None and resume is not None:
        both = f"run_dir={str(run_dir)!r} and resume={str(resume)!r}"
        raise ValueError(f"{both} exclude each other; resume= names the directory")
    if run_dir is not None:
        options.run_dir = _absolute(run_dir, "run_dir")
    options.resume = resume
    return _Recording(options)


def start_run(
    base_dir: StrPath, run_prefix: str | None = None, include_git_hash: bool = True,
    create_subdirs: bool = True, subdirs: Sequence[str] | None = None, *,
    config_args: object = None, until_exit: bool = False,
) -> Path:
    """Create a run directory with status.json ("running") and return its Path.

    For scripts that have no block to put into ``with``. ``until_exit=True`` records
    all that `run_context` does, until the interpreter ends (or, in a notebook, until
    the next such call). Without it, call `write_config_yaml`, `capture_metadata` and
    at the end `mark_status` yourself; `config_args` is written to config.yaml at once.
    Raises as `run_context` does.
    """
    options = _Options(base_dir, run_prefix, create_subdirs, subdirs)
    options.include_git_hash = include_git_hash
    options.config_args = config_args
    if until_exit:
        return _record_until_exit(options)
    config = _plain(config_args)
    options.run_prefix = _filled_prefix(run_prefix, config)
    site = _Site.here()
    _learn_at_entry(dict(os.environ), site, config)
    commit = _settle_code(site)
    prefix = options.run_prefix
    record = _create_record(options, site, prefix, commit, None, is_watched=False)
    if config_args is not None:
        write_config_yaml(record.path, shlex.join(site.argv), config)
    with _tolerating("the index"):
        record.tell_index("start", "running")
    return record.path


def ensure_run_dir(
    run_dir: StrPath, create_subdirs: bool = True, subdirs: Sequence[str] | None = None
) -> Path:
    """Create `run_dir` and its folders where they are missing; return it as a Path."""
    path = Path(run_dir)
    for folder in [".", *_checked_subdirs(create_subdirs, subdirs)]:
        (path / folder).mkdir(parents=True, exist_ok=True)
    return path


def write_config_yaml(
    run_dir: StrPath, command: str, args: object, filename: str = "config.yaml"
) -> Path:
    """Write `args` and `command` to a YAML file in `run_dir`; return its Path.

    A mapping (or argparse.Namespace, dataclass, ...) keeps its keys and order and gets
    `command` added. When it has another `command` already, or is not a mapping, the
    file is ``{command: ..., args: ...}``. Secrets are replaced by ``<REDACTED>``.
    metadata.json gets the same, for readers without PyYAML.
    """
    path = Path(run_dir) / _checked_filename(filename)
    document = _config_document(command, _plain(args))
    _redactor.learn(document)
    with _tolerating(filename):
        text = _format_yaml(_redactor.data(document))
        _write_file(path, text.encode("utf-8"))
    with _tolerating("metadata.json"):
        recording = _active_for(path.parent)
        metadata = path.parent / "metadata.json"
        if recording is not None:
            recording.add_facts({"config": document})
        else:
            _write_json(metadata, {**_read_json(metadata), "config": document})
    return path


def capture_metadata(
    run_dir: StrPath, extra: Mapping[str, object] | None = None,
    filename: str = "metadata.json",
) -> Path:
    """Write everything that is known of code and machine; return the file's Path.

    Synchronous and complete: git, packages and CUDA are asked before it returns (a
    second or so). `extra` is added at the top level, where it wins. Inside a
    `run_context` the record that the recorder completes is the base.
    """
    path = Path(run_dir) / _checked_filename(filename)
    more: Facts = _plain(extra) or {}
    _redactor.learn(more)
    with _tolerating(filename):
        recording = _active_for(path.parent)
        if recording is None:
            metadata = _captured_by_hand(path.parent.absolute())
            _write_json(path, {**metadata, **more})
        elif filename == "metadata.json":
            recording.add_facts(more)
            recording.wait_for_captures()
        else:
            recording.wait_for_captures()
            metadata = _read_json(path.parent / "metadata.json")
            _write_json(path, {**metadata, **more})
    return path


def _captured_by_hand(path: Path) -> Facts:
    """Return the whole of metadata.json for a run that no block records."""
    record = _Record.at(path)
    site = _Site.here()
    _learn_at_entry(dict(os.environ), site, None)
    _settle_code(site)
    site.run_dir = str(path)
    site.results_root = str(record.results_root)
    document = Run(path, row=False).config or None
    metadata = _quick_metadata(site, document)
    metadata["inputs"] = _inputs(document, site.argv, path)
    _complete_metadata(metadata, site, record)
    _redactor.learn(metadata)
    return metadata


def mark_status(
    run_dir: StrPath, status: str, exit_reason: str | None = None,
    extra: Mapping[str, object] | None = None,
) -> Path:
    """Write `status` to status.json, and an "end" line to the index; return its Path.

    `status` is "success", "failed", or your own word. In the body of `run_context` it
    takes the place of "success" if the block then ends normally.
    """
    path = Path(run_dir) / "status.json"
    facts: Facts = _read_json(path)
    started = _number(facts.get("started"))
    if status != "running" and started is not None and facts.get("ended") is None:
        facts["ended"] = round(time.time(), 3)
        facts["duration_seconds"] = round(facts["ended"] - started, 3)
    facts.update(status=status, exit_reason=exit_reason, timestamp_utc=_utc())
    facts.update(_plain(extra) or {})
    with _tolerating("status.json"):
        _write_json(path, facts, durable=True)
    if status != "running" and _active_for(path.parent) is None:
        _close_metrics(path.parent)
        with _tolerating("the index"):
            record = _Record.at(path.parent.absolute())
            record.tell_index("end", status, exit_reason)
    return path


def mark_artifact_used(
    artifact_path: StrPath, consumer_run_dir: StrPath | None = None,
    reason: str | None = None,
) -> None:
    """Record that a file of an earlier run is used by this one; never fail.

    Adds a line to inputs.jsonl of the consumer (default: the run of this thread, else
    of ``RUN_DIR``), a line to the producer's artifacts/USED_BY.jsonl where that can be
    written, and an "artifact_used" line to the index.
    """
    with _tolerating(f"the use of {str(artifact_path)!r}"), _signals_held():
        consumer = consumer_run_dir or _current_run_dir()
        if consumer is not None:
            consumer = os.fspath(consumer)
        _record_use(Path(artifact_path), consumer, reason)


def save_json(path: StrPath, obj: object) -> Path:
    """Write any Python object to `path` as strict JSON, whole or not at all.

    Converted like a config: numpy and torch scalars are numbers, large arrays become
    a summary, NaN and infinities the strings "NaN", "Infinity" and "-Infinity".
    Not redacted: the data is yours. Raises OSError where it cannot be written.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    _write_file(target, _format_json(_plain(obj, whole=True)).encode("ascii"))
    return target


def log_metrics(
    run_dir: StrPath, values: Mapping[str, object], step: int | None = None
) -> None:
    """Append one line to metrics/metrics.jsonl, visible at once to other processes.

    The line is ``{"step": step, "time": seconds since 1970, **values}``, written by a
    single write(2); it survives any later death of this process. Numbers stay
    numbers (numpy and torch scalars too); NaN becomes the string "NaN". A metric that
    is itself called step or time is kept as "step (2)" or "time (2)".
    """
    now = time.time()
    row = {"step": step, "time": now, **values}
    if "time" in values or "step" in values:
        row.update(step=step, time=now)
        for name in values.keys() & {"step", "time"}:
            row[f"{name} (2)"] = values[name]
    try:
        if not _NUMBERS.issuperset(map(type, values.values())):
            raise ValueError("numpy scalars, strings and nested values are converted")
        line = "".join(_row_encoder()(row, 0)).encode("ascii") + b"\n"
    except (ValueError, TypeError) as error:  # or it is a NaN
        if _is_foreign(error):
            raise
        line = _redacted_json(_plain(row), indent=None)
    _append_metrics(run_dir, line)


_NUMBERS = frozenset((int, float, bool))


@functools.lru_cache(None)
def _row_encoder() -> Callable[[object, int], Iterable[str]]:
    """Return what makes JSON of a row; json itself makes one anew for each call."""
    with _ignoring(Exception):  # a Python that makes it in another way
        parts: Any = json.encoder
        encode: Callable[[object, int], Iterable[str]] = parts.c_make_encoder(
            None, None, parts.encode_basestring_ascii, None, ": ", ", ",
            False, False, False,
        )
        if "".join(encode({"a": 1.5}, 0)) == '{"a": 1.5}':
            return encode
    encoder = json.JSONEncoder(allow_nan=False)
    return lambda row, _level: encoder.encode(row)


_metrics_files: dict[StrPath, _Kept] = {}  # by the run's path, and by another spelling


def _append_metrics(run_dir: StrPath, line: bytes) -> None:
    """Append a line to metrics.jsonl, which stays open until the run ends."""
    try:
        kept = _metrics_files.get(run_dir)
        if kept is None or not kept.is_ours():  # the program may have closed it
            kept = _open_metrics(run_dir)
        if os.write(kept.number, line) != len(line):
            _close_metrics(run_dir)  # The next row ends the torn line.
            raise OSError(errno.ENOSPC, "no space left for a whole line")
    except OSError as error:
        if _is_foreign(error):
            raise
        _warn(f"metrics.jsonl: {error}", once=True)


def _open_metrics(run_dir: StrPath) -> _Kept:
    """Return the open file of a run, under whatever spelling it was opened first."""
    path = abspath(run_dir)
    with _signals_held():
        kept = _metrics_files.get(path)
        if kept is None or not kept.is_ours():
            while len(_metrics_files) >= 2 * OPEN_METRICS:  # a file has two keys
                _close_metrics(next(iter(_metrics_files)))
            os.makedirs(path, exist_ok=True)
            with _Folder(Path(path)).opened("metrics", create=True) as place:
                kept = _Kept(place.open_for_lines("metrics.jsonl"))
        _metrics_files[path] = kept
        if isabs(run_dir):  # a relative one means another run after a chdir
            _metrics_files[run_dir] = kept
    return kept


def _close_metrics(run_dir: StrPath) -> None:
    closed = _metrics_files.get(abspath(run_dir))
    for key, kept in list(_metrics_files.items()):
        if kept is closed:
            del _metrics_files[key]
            kept.close()


# === Reading runs ===
# A run directory as Python sees it: plain dictionaries, which pandas.DataFrame takes as
# they are. Readers trust nothing: a file may be absent, torn, huge or hostile.


def find_runs(
    root: StrPath = "results", *, where: str | None = None, status: str | None = None,
    since: str | None = None, older: str | None = None, contains: str | None = None,
    tag: str | None = None, has_outputs: bool = False, sort: str | None = None,
    top: int | None = None, limit: int | None = None,
) -> list[Run]:
    """Return the runs below `root`, newest first.

    `where` compares config, metrics, the keys of `Run` and the columns of `list`
    (`time` and `age` are in seconds), numbers as numbers:
    ``"lr<1e-3 and max(val/acc)>=0.9 or model~qwen"`` (``< <= > >= == !=``, ``~`` for
    a regular expression; ``and`` binds tighter). A metric's name means its last value;
    max(), min(), first() and last() say which. `status` is as it is now. `since` and
    `older` bound the start: an age ("12h", "7d") or the beginning of a UTC time
    ("2026-01-31"). `contains` is a part of the path below `root`, `tag` one that is in
    force.

    `sort` is a key or such a function of a metric, "-max(acc)" the other way round.
    Runs without a value, or with one that is not finite, come last in both directions.
    `limit` is how many runs are returned at most; `top` is the same, of those only that
    have a finite value.

    Raises ValueError for what cannot be read. A key, status or tag that no run has is
    said on stderr.
    """
    options = {
        "where": where, "status": status, "since": since, "older": older,
        "contains": contains, "tag": tag, "has_outputs": has_outputs, "sort": sort,
        "top": top, "limit": limit,
    }
    selection = _Selection(abspath(root), _Filters(options))
    for warning in selection.warnings:
        _warn(warning)
    return _Runs(selection.runs)


def load_run(path: StrPath) -> Run:
    """Return the run that `path` is, or is inside of.

    Raises ValueError when there is no run directory at or above `path`.
    """
    found = _run_of(abspath(path))
    if found is None:
        raise ValueError(f"{str(path)!r} is not in a run directory")
    return Run(found)


class Run(dict):  # type: ignore[type-arg]
    """One run directory as a flat dictionary: a row for pandas.DataFrame.

    Keys: name, run_dir, experiment, status (as it is now), exit_reason, reason (why it
    failed), started_utc, duration_seconds (of all attempts), attempts, hostname, user,
    git_commit, script_name, tags, then `config.<key>` and `metrics.<key>` (the last
    values). NaN and infinities are floats.

    The attributes `metadata`, `status`, `config`, `summary`, `metrics`, `notes`,
    `attempts`, `inputs`, `used_by`, `outputs` and `problems` are read when they are
    asked for.
    """

    lineage: _Lineage | None = None  # of all runs of the results root

    def __init__(self, path: StrPath, row: bool = True) -> None:
        """Read the row; with `row=False` nothing is read before it is asked for."""
        super().__init__()
        self.folder = os.fspath(path)
        if not self.folder.startswith(os.sep):
            self.folder = abspath(path)
        self.unread: dict[str, str] = {}  # why a file was not read, by its name
        if row:
            self.fill()

    def fill(self) -> Run:
        for key, read in _ROW.items():
            self[key] = read(self)
        self.update({**self.flat_config, **self.flat_metrics})
        self.forget()
        return self

    def __reduce__(self) -> tuple[type[Run], tuple[str]]:
        """Let a copy, also one in another process, read the directory again."""
        return Run, (self.folder,)

    def forget(self) -> None:
        """Let go of what is large, for there may be thousands of runs."""
        self.__dict__.pop("metadata", None)
        self.__dict__.pop("raw_summary", None)

    @property
    def path(self) -> Path:
        return Path(self.folder)

    @property
    def name(self) -> str:
        return basename(self.folder)

    @cached_property
    def metadata(self) -> Facts:
        return self.read_facts("metadata.json")

    @cached_property
    def status(self) -> Facts:
        """The content of status.json, with "lost" for a run that must have died."""
        facts = self.read_facts("status.json")
        if facts.get("status") != "running":
            return facts or {"status": "?"}
        path = f"{self.folder}/status.json"
        judged = {**facts, "status": _liveness(facts, path)}
        latest = _read_json(path)
        if latest.get("status", "running") != "running":
            return latest  # it ended while we looked
        return judged

    @property
    def state(self) -> str:
        return _text(self.status.get("status", "?"))

    @cached_property
    def config(self) -> Facts:
        """The arguments, from metadata.json; of an ancestor's run from config.yaml."""
        config = _mapping(self.metadata, "config") or self.read_config()
        return _mapping(_converted(config, _as_float))

    @cached_property
    def flat_config(self) -> Facts:
        """The config but for its command, with keys such as "config.model.lr"."""
        arguments = _arguments(self.config)
        if not arguments:
            return {}
        return _flattened("config", arguments)

    @cached_property
    def raw_summary(self) -> Facts:
        """The same as `summary`, with the texts that stand for NaN and infinities."""
        path = f"{self.folder}/metrics/metrics.jsonl"
        facts = _read_json(f"{self.folder}/metrics/summary.json")
        try:
            size = os.stat(path).st_size
            if _at(facts, "metrics.jsonl", "bytes") != size:
                facts = _summarize_metrics(self.folder)
        except FileNotFoundError:
            pass
        except OSError as error:
            self.unread["metrics"] = _unreadable(error, path)
            return {}
        facts.pop("metrics.jsonl", None)
        return facts

    @property
    def summary(self) -> dict[str, Facts]:
        """For each metric last, min, max, first, their steps, and the count."""
        found = {}
        for key, facts in self.raw_summary.items():
            if isinstance(facts, dict):
                known = {**_NO_VALUES, **facts}
                found[key] = {name: _as_float(value) for name, value in known.items()}
                if type(found[key]["count"]) is not int:
                    found[key]["count"] = 0
        return found

    @property
    def metrics(self) -> Facts:
        """The last value of each metric."""
        return {key: facts.get("last") for key, facts in self.summary.items()}

    @property
    def flat_metrics(self) -> Facts:
        return {f"metrics.{key}": value for key, value in self.metrics.items()}

    @cached_property
    def notes(self) -> list[Facts]:
        path = f"{self.folder}/notes.jsonl"
        try:
            return list(_mappings_in(_read_bytes(path)))
        except FileNotFoundError:
            pass
        except OSError as error:
            self.unread["notes.jsonl"] = _unreadable(error, path)
        return []

    @cached_property
    def attempts(self) -> list[Facts]:
        """The status.json of each attempt but the last."""
        folder = f"{self.folder}/attempts"
        with _ignoring(OSError):
            names = [name for name in os.listdir(folder) if _whole(name) is not None]
            names.sort(key=int)
            return [_read_json(f"{folder}/{name}/status.json") for name in names]
        return []

    @cached_property
    def inputs(self) -> list[str]:
        """The files of other runs that it used: "train-20260131-142501/m.pt"."""
        used = _read_inputs(self.folder)
        return [f"{entry.get('run')}/{entry['path']}" for entry in used]

    @cached_property
    def used_by(self) -> list[str]:
        """The names of the runs that used it, which all runs of the tree are asked."""
        lineage = self.lineage
        if lineage is None:
            lineage = _Lineage(_results_root(self.path.parent), self.path)
        return lineage.users_of(self.path)

    @cached_property
    def outputs(self) -> dict[str, int]:
        """The files it left, but for its record and its logs: their sizes in bytes."""
        return _output_sizes(self.folder)

    @property
    def problems(self) -> list[str]:
        """A sentence for each file of the record that is there and cannot be read."""
        for name in ("metadata", "status", "config", "raw_summary", "notes"):
            getattr(self, name)
        return [self.unread[name] for name in sorted(self.unread)]

    @cached_property
    def started(self) -> float:
        return _started(self.folder)

    def series(self, key: str) -> list[tuple[object, object]]:
        """Return (step, value) of each time that a metric was logged."""
        values, steps = _all_series(self).get(key, ([], []))
        return list(zip(steps, values))

    def best(self, key: str, which: str) -> tuple[float, object]:
        """Return the lowest ("min") or highest ("max") value of a metric and its step.

        A metric without a number has (nan, None).
        """
        if which not in ("min", "max"):
            raise ValueError(f"best is {which!r}; give 'min' or 'max'")
        facts = self.summary.get(key, {})
        number = _number(facts.get(which))
        if number is None or number != number:
            return float("nan"), None
        return number, facts.get(f"{which}_step")

    def value(self, key: _Key) -> object:
        """Return what it is sorted by, and let go of what had to be read for it."""
        found = key.value(self)
        self.forget()
        return found

    def read_facts(self, name: str) -> Facts:
        """Return the JSON object in a file; keep why it could not be read."""
        path = f"{self.folder}/{name}"
        problem = f"{path!r} is not a JSON object that can be read"
        try:
            value = json.loads(_read_bytes(path, MAX_RECORD))
            if isinstance(value, dict):
                return value
        except FileNotFoundError:
            return {}
        except OSError as error:
            problem = _unreadable(error, path)
        except (ValueError, RecursionError):
            pass
        self.unread[name] = problem
        return {}

    def read_config(self) -> Facts:
        """Return config.yaml, where metadata.json does not have the same."""
        path = f"{self.folder}/config.yaml"
        value: JSON = {}
        try:
            value = _parse_yaml(_read_bytes(path, MAX_CONFIG).decode("utf-8"))
        except FileNotFoundError:
            pass
        except (OSError, ValueError) as error:
            self.unread["config.yaml"] = _unreadable(error, path)
        if isinstance(value, dict):
            return value
        return {"config": value}

    def _repr_html_(self) -> str:
        """Return this run, with its whole config, as a table for a notebook."""
        everything = {self["script_name"]: list(self.flat_config)}
        return _html_table(_run_columns([self], dirname(self.folder), everything))


class _Runs(list):  # type: ignore[type-arg]
    def _repr_html_(self) -> str:
        root = dirname(os.path.commonpath([run.folder for run in self] or [os.sep]))
        return _html_table(_run_columns(self, root, _differing_keys(self)))


def _total_duration(run: Run) -> float | None:
    attempts = [*run.attempts, run.status]
    known = _numbers(status.get("duration_seconds") for status in attempts)
    if not known:
        return None
    return sum(known)


def _started_utc(run: Run) -> object:
    return (
        run.status.get("started_utc")
        or run.metadata.get("timestamp_utc")
        or run.status.get("timestamp_utc")
    )


def _script_of(run: Run) -> str:
    """Return the name of the script: as recorded, else of argv, else of the run."""
    recorded = run.metadata.get("script_name")
    if isinstance(recorded, str) and recorded:
        return recorded
    words = _texts(run.metadata, "argv")
    if "-m" in words[:-1]:
        return words[words.index("-m") + 1]
    for word in words:
        if re.search(r"\.(py|sh|R|jl)$", word):
            return os.path.splitext(basename(word))[0]
    return re.split(_STAMP, run.name)[0].rstrip("-")


# The row of a run in its order, and how each value is read.
_ROW: dict[str, Callable[[Run], object]] = {
    "name": lambda run: run.name,
    "run_dir": lambda run: run.folder,
    "experiment": lambda run: basename(dirname(run.folder)),
    "status": lambda run: run.state,
    "exit_reason": lambda run: run.status.get("exit_reason"),
    "reason": lambda run: _reason(run),
    "started_utc": _started_utc,
    "duration_seconds": _total_duration,
    "attempts": lambda run: len(run.attempts) + 1,
    "hostname": lambda run: run.metadata.get("hostname", run.status.get("hostname")),
    "user": lambda run: run.metadata.get("user"),
    "git_commit": lambda run: _at(run.metadata, "git", "commit_short"),
    "script_name": _script_of,
    "tags": lambda run: _tags(run.notes),
}
_KEYS: dict[str, Callable[[Run], object]] = {  # the same, and what takes longer
    **_ROW,
    "outputs": lambda run: len(run.outputs),
    "size": lambda run: sum(run.outputs.values()),
    "notes": lambda run: "; ".join(_note_texts(run)),
    # What `list` calls some of them; time and age are in seconds.
    "run": _ROW["name"],
    "age": lambda run: time.time() - run.started,
    "time": _total_duration,
    "why": _ROW["reason"],
}


# === A recording ===
# One block, from entry to exit. Only the creation of the directory may raise; each
# step of the exit is done whatever happened to the one before.


class _Options:
    """What the caller of run_context or start_run asked for."""

    def __init__(
        self, base_dir: StrPath, run_prefix: str | None, create_subdirs: bool,
        subdirs: Sequence[str] | None,
    ) -> None:
        self.base_dir = _absolute(base_dir, "base_dir")
        self.run_prefix = run_prefix
        self.subdirs = _checked_subdirs(create_subdirs, subdirs)
        self.include_git_hash = True
        self.config_args: object = None
        self.config_filename = "config.yaml"
        self.run_dir: Path | None = None
        self.resume: StrPath | None = None
        self.notes: str | None = None
        self.tags: list[str] = []
        self.capture_output = True
        self.resources = True
        self.ranks = "together"


class _Recording:
    """One run, from entering the block to leaving it."""

    def __init__(self, options: _Options, argv: list[str] | None = None) -> None:
        self.options = options
        self.argv = argv  # the program that is recorded, when it is not this one
        self.until_exit = False
        self.record: _Record | None = None
        self.recorder: _Recorder | None = None
        self.capture: _Capture | None = None
        self.metadata: Facts = {}  # only used where no recorder holds it
        self.seeds: Facts = {}  # and flags, as they were on entry
        self.ending: _Ending | None = None  # told by `run`, else found by __exit__
        self.unwritten: Facts | None = None  # how it ended, for the recorder to write
        self.outside: str | None = None  # RUN_DIR outside of all runs
        self.spare: list[_Kept] = []  # descriptors for an exit when none is left
        self.has_ended = False  # how the block ended is written
        self.has_left = False  # everything has been let go of

    def __call__(self, function: Function) -> Function:
        call: Function
        call = _decorated(function, lambda: _Recording(self.options, self.argv))
        return call

    def __enter__(self) -> Path:
        if self.record is not None:
            used = f"this run_context already recorded {str(self.record.path)!r}"
            raise RuntimeError(f"{used}; call run_context(...) again for another run")
        self.pid = os.getpid()
        self.thread = threading.get_ident()
        self.begun = monotonic()
        self.oom_kills = _oom_kills()
        self.variables = dict(os.environ)
        options = self.options
        config = _plain(options.config_args)
        prefix = _filled_prefix(options.run_prefix, config)
        site = self.site = _Site.here(self.argv)
        self.launch = _Launch(
            os.environ, options.base_dir, options.run_prefix, options.ranks
        )
        head = None
        try:
            with _signals_held():  # else a child may be left that nobody knows
                if not self.launch.rank:
                    head = _asked_for_head(site.directory, self.variables)
                self._spawn_recorder()
            _learn_at_entry(self.variables, site, config)
            joined = None
            commit = None
            if self.launch.rank:
                joined = self.launch.join()
            else:
                commit = _settle_code(site, head)
            # A signal that came now would leave a run that nobody can finish: its
            # recorder is only about to be told of it.
            with _signals_held():
                if joined is not None:
                    self.record = _Record.at(*joined)
                else:
                    self.record = _create_record(
                        options, site, prefix, commit, self.launch, is_watched=True
                    )
                self._begin(self.record, site, config)
        except BaseException as error:
            if head is not None:
                head.close()
            if self.record is None and self.recorder is not None:
                self.recorder.give_up()
            self.__exit__(type(error), error, error.__traceback__)
            raise
        return self.record.path

    def _spawn_recorder(self) -> None:
        try:
            self.recorder = _Recorder(self.variables)
        except Exception as error:
            self._go_without_recorder(error)

    def _go_without_recorder(self, error: Exception) -> None:
        if _is_foreign(error):
            raise error
        self.recorder = None
        reason = str(error) or type(error).__name__
        _warn(f"no recorder ({reason}): its work is done in this process, slower", True)

    def _begin(self, record: _Record, site: _Site, config: JSON) -> None:
        """Write what must be there at once, and start the recorder."""
        rank = self.launch.rank
        meeting = None
        if rank == 0:
            meeting = self.launch.publish(record)
        site.run_dir = str(record.path)
        site.results_root = str(record.results_root)
        site.entered = _entered_at(record, self.begun)
        parent = _current_run_dir()
        before = _set_active(self, is_inside=True)
        if rank == 0:
            self._write_start(record, site, config, parent)
        capture = self.capture = _Capture()
        if self.options.capture_output and self._owns_streams(record, before):
            with _tolerating("logs/"):
                capture.open(record, _rank_prefix(rank))
        self._tell_recorder(record, site, meeting, capture)
        with _tolerating("output capture"):
            capture.start(self.recorder)
        with _ignoring(OSError):
            for _ in range(3):  # a directory, a folder in it, and a file
                descriptor = os.open(os.devnull, os.O_RDONLY)
                self.spare.append(_Kept(_above_stderr(descriptor)))

    def _write_start(
        self, record: _Record, site: _Site, config: JSON, parent: str | None
    ) -> None:
        options = self.options
        document = _config_document(shlex.join(site.argv), config)
        with _tolerating(options.config_filename):
            record.write_config(options.config_filename, document)
            keys = ", ".join(_redactor.redacted_keys(config)[:10])
            if keys:
                _warn(f"config.yaml: redacted as secrets: {keys}")
        with _tolerating("metadata.json"):
            metadata = _quick_metadata(site, document)
            metadata["launcher"].update(self.launch.facts)
            metadata["inputs"] = _inputs(document, site.argv, record.path)
            metadata["parent"] = _run_named(parent, record)
            if parent is None:  # what a reproduced run starts reproduces nothing
                metadata["reproduces"] = _run_named(os.environ.get(REPRODUCES), record)
            if record.attempt > 1:
                metadata["changes"] = _changes_since_last_attempt(record, metadata)
                _warn_of_changes(metadata, ["config"])
            self.metadata = metadata
            self.seeds = metadata["determinism"]
            record.write_json("metadata.json", metadata)
            _warn_of_inputs(metadata["inputs"])
        if options.notes or options.tags:
            with _tolerating("notes.jsonl"):
                record.append_note(options.notes or "", options.tags)
        with _tolerating("the index"):
            used = [entry["run"] for entry in self.metadata.get("inputs", [])]
            tied = [tie["run"] for tie in map(self.metadata.get, _TIES) if tie]
            record.tell_index("start", "running", inputs=used, tied=tied)

    def _owns_streams(self, record: _Record, before: Sequence[_Recording]) -> bool:
        """Tell whether no run of another thread has the streams; say so if one has."""
        for other in before:
            if other.options.capture_output and other.thread != self.thread:
                why = "a run in another thread has the streams"
                _warn(f"the output of {record.path.name} is not logged: {why}")
                return False
        return True

    def _tell_recorder(
        self, record: _Record, site: _Site, meeting: _Meeting | None,
        capture: _Capture,
    ) -> None:
        """Tell the recorder of the run; without one, do its work here and now."""
        request: Facts = {
            "record": record.to_json(),
            "site": site.to_json(),
            "rank": self.launch.rank,
            "process": _process_identity(self.pid),
            "begun": self.begun,  # monotonic() on entry
            "oom_kills": self.oom_kills,  # until then
            "variables": {},  # that would change how it starts; by _Recorder.begin
            "is_watched": False,  # whether it is given a pidfd; by _Recorder.begin
            "secrets": sorted(_redactor.known),
            "settings": _changed_settings(),
            "resources": self.options.resources,
            "until_exit": self.until_exit,
            "meeting": None,
        }
        if meeting is not None:
            request["meeting"] = meeting.facts
        if self.recorder is not None:
            try:
                self.recorder.begin(request, capture.forwards)
                return
            except Exception as error:
                self._go_without_recorder(error)
        if meeting is not None:
            threading.Thread(target=meeting.serve, daemon=True).start()
        if self.launch.rank == 0:
            with _tolerating("status.json"):
                record.is_unwatched()
            self._complete_here(record, site)

    def _complete_here(self, record: _Record, site: _Site) -> None:
        with _tolerating("metadata.json"):
            if not self.metadata:
                self.metadata = _quick_metadata(site, None)
            _complete_metadata(self.metadata, site, record)
            _redactor.learn(self.metadata)
            record.write_json("metadata.json", self.metadata)

    def __exit__(self, kind: object, error: BaseException | None, at: object) -> None:
        """Write how the block ended; the exception goes on.

        A signal handler may raise before the first step, or between two.
        """
        if self.record is None:
            return
        try:
            self._finish(self.record, error)
        finally:
            if not self.has_left:
                self._finish(self.record, error, in_haste=True)

    def _finish(
        self, record: _Record, error: BaseException | None, in_haste: bool = False
    ) -> None:
        """Take what steps of an exit are left; in haste without waiting for anybody."""
        if self._is_somebody_elses(record):
            self.has_left = True
            return
        is_interrupted = True
        try:
            if not self.has_ended:
                with _signals_held():
                    self.has_ended = True
                    self._end(record, error)
            is_interrupted = in_haste
        finally:
            if self.has_ended:
                self._leave(record, is_interrupted)

    def _is_somebody_elses(self, record: _Record) -> bool:
        """Tell whether a forked child left the block, which is its parent's to finish.

        The child of a program that has made itself a daemon goes on as the program.
        """
        if self.pid == os.getpid():
            return False
        status = record.read_json("status.json")
        started = _at(status, "process", "start_ticks")
        is_over = status.get("status") != "running"
        return is_over or started is None or _is_alive(self.pid, started)

    def _end(self, record: _Record, error: BaseException | None) -> None:
        for kept in self.spare:
            kept.close()
        if self.ending is None:
            self.ending = _Ending.of_error(error)
        try:
            if self.capture is not None:
                self.capture.stop()
        finally:
            self._write_end(record, self.ending)

    def _write_end(self, record: _Record, ending: _Ending) -> None:
        more: Facts = {"duration_seconds": round(monotonic() - self.begun, 3)}
        _redactor.learn(_changed(self.variables, os.environ))  # as by load_dotenv()
        if ending.status == "failed" and ending.exception is None:
            prefix = _rank_prefix(self.launch.rank)
            ending.last_output = _last_output(record.path, prefix)
        with _tolerating("determinism"):
            seeds = _late_determinism(self.seeds)
            if seeds:
                more["determinism"] = seeds
        killed = _oom_kills() - self.oom_kills
        if killed > 0:
            text = f"the kernel killed {killed} process(es) here for want of memory"
            more["warnings"] = [text]
        if self.launch.rank:
            with _tolerating("status.json"):
                _record_rank(record, self.launch.rank, ending, more)
            return
        status: Facts = {"status": ending.status, "exit_reason": ending.exit_reason}
        facts = {**ending.to_json(), **more}
        try:
            status = record.finish(facts)
            status = _name_failed_rank(record) or status
        except Exception as error:
            if _is_foreign(error):
                raise
            problem = f"status.json: {type(error).__name__}: {error}"
            if self.recorder is not None:  # we may have given up our rights
                problem += "; that is left to the recorder"
                self.unwritten = _redactor.data(facts)
            _warn(problem)
            return
        with _tolerating("the index"):
            record.tell_index("end", status["status"], status["exit_reason"])

    def _leave(self, record: _Record, is_interrupted: bool) -> None:
        """Wait until the recorder has completed the record; let go of everything."""
        try:
            with _tolerating("the recorder"):
                self._finish_recorder(record, is_interrupted)
        finally:
            with _signals_held():
                self.has_left = True
                _in_turn([
                    lambda: self._close_capture(is_interrupted),
                    lambda: _close_metrics(record.path),
                    lambda: _set_active(self, is_inside=False),
                ])

    def _finish_recorder(self, record: _Record, is_interrupted: bool) -> None:
        seconds = float(EXIT_WAIT_SECONDS)
        if is_interrupted:
            seconds = 0.0
        is_complete = False
        is_gone = self.recorder is None
        if self.recorder is not None:
            is_complete = self.recorder.finish(seconds, self.unwritten)
            if not is_complete and self.recorder.is_gone():
                is_gone = True
                _warn("the recorder is gone; finishing its work here")
        if self.launch.rank:
            return
        if is_gone:
            self.metadata = record.read_json("metadata.json") or self.metadata
            if self.metadata.get("pip_freeze") is None:
                self._complete_here(record, self.site)
            _write_summary(record)
            with _tolerating("metadata.json"):
                self.metadata["outputs"] = _left_files(record.path)
                record.write_json("metadata.json", self.metadata)
        if is_complete or is_gone:
            _say_what_failed(record)

    def _close_capture(self, is_interrupted: bool) -> None:
        words = ""
        if self.ending is not None and not is_interrupted:
            words = self.ending.last_words
        if self.capture is not None:
            with _tolerating("logs/"):
                self.capture.close(words)

    def add_facts(self, facts: Facts) -> None:
        if self.recorder is not None:
            self.recorder.ask("add", facts=_redactor.data(facts))
        elif self.record is not None:
            self.metadata.update(facts)
            self.record.write_json("metadata.json", self.metadata)

    def wait_for_captures(self) -> None:
        if self.recorder is not None:
            self.recorder.ask("collected", EXIT_WAIT_SECONDS)


def _in_turn(steps: Sequence[Callable[[], object]]) -> None:
    """Take every step, whatever the others raise; then the exception goes on."""
    if not steps:
        return
    try:
        steps[0]()
    finally:
        _in_turn(steps[1:])


@contextlib.contextmanager
def _signals_held() -> Iterator[None]:
    """Let signals wait until the block has ended; then they are delivered.

    Several greenlets of a thread may be inside at once, and leave in any order.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    thread = threading.get_native_id()
    masks = _held.setdefault(thread, [])
    noted: list[None] = []
    try:
        mask = _signals.pthread_sigmask(_signals.SIG_BLOCK, [])
        _call_noted(noted, masks.append, mask)
        _signals.pthread_sigmask(_signals.SIG_BLOCK, _IGNORED_SIGNALS)
        yield
    finally:
        if noted:
            mask = masks.pop()
            if not masks:
                del _held[thread]
                _signals.pthread_sigmask(_signals.SIG_SETMASK, mask)


_held: dict[int, list[Any]] = {}  # the masks to go back to, by thread of the system


def _call_noted(notes: list[Any], function: Callable[..., Any], *words: Any) -> None:
    """Call a function of C and append its result, at once for every signal handler."""
    notes.extend(map(function, *([word] for word in words)))


def _decorated(function: Callable[..., Any], record: Callable[[], _Recording]) -> Any:
    """Return `function` wrapped so that each call, or its iteration, is a run."""
    import inspect

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with record():
            return function(*args, **kwargs)

    @functools.wraps(function)
    async def wait(*args: Any, **kwargs: Any) -> Any:
        with record():
            return await function(*args, **kwargs)

    @functools.wraps(function)
    def iterate(*args: Any, **kwargs: Any) -> Any:
        with record():
            return (yield from function(*args, **kwargs))

    @functools.wraps(function)
    async def iterate_async(*args: Any, **kwargs: Any) -> Any:
        with record():
            generator = function(*args, **kwargs)
            step = generator.__anext__
            argument: tuple[Any, ...] = ()
            while True:
                try:
                    item = await step(*argument)
                except StopAsyncIteration:
                    return
                try:
                    argument = ((yield item),)
                    step = generator.asend  # codespell:ignore asend
                except GeneratorExit:
                    await generator.aclose()
                    raise
                except BaseException as error:
                    argument = (error,)
                    step = generator.athrow

    if inspect.iscoroutinefunction(function):
        return wait
    if inspect.isasyncgenfunction(function):
        return iterate_async
    if inspect.isgeneratorfunction(function):
        return iterate
    return call


# Of start_run(until_exit=True), at most one. They are not kept here, since Spyder and
# IPython's autoreload import this module anew.
_flat_runs: list[_Recording] = vars(sys).setdefault("_run_utils_flat_runs", [])


def _record_until_exit(options: _Options) -> Path:
    import atexit

    # What this imports must not be imported at the end: Python would forget there
    # that a KeyboardInterrupt has ended the program.
    import traceback  # noqa: F401

    # A worker of multiprocessing, which imports the script again, is in its run.
    again = sys.modules.get("__mp_main__")
    if again not in (None, sys.modules.get("__main__")) and "RUN_DIR" in os.environ:
        return Path(os.environ["RUN_DIR"])
    _finish_flat_run()
    recording = _Recording(options)
    recording.until_exit = True
    path = recording.__enter__()
    _flat_runs.append(recording)
    atexit.register(_finish_flat_run)
    return path


def _finish_flat_run() -> None:
    """End the run of start_run(until_exit=True), if there is one.

    Python keeps the exception that ended the program. An exit status that
    `sys.exit` gave is only known once the process has ended: the recorder sees it.
    """
    while _flat_runs:
        recording = _flat_runs.pop()
        error = getattr(sys, "last_value", None)
        if hasattr(sys, "ps1") or "ipykernel" in sys.modules:
            error = None  # of a cell that failed; the kernel lives on
        recording.__exit__(type(error), error, None)


_active: list[_Recording] = []  # the runs this process is in, innermost last
_active_lock = threading.Lock()


def _set_active(recording: _Recording, is_inside: bool) -> list[_Recording]:
    """Enter or leave a run; return the runs entered before and not left."""
    is_locked = _active_lock.acquire(timeout=1.0)  # a fork may have copied it locked
    try:
        before = [run for run in _active if run is not recording]
        if is_inside:
            recording.outside = os.environ.get("RUN_DIR")
            if before:
                recording.outside = before[-1].outside
            _active[:] = [*before, recording]
        else:
            _active[:] = before
        current = recording.outside
        if _active and _active[-1].record is not None:
            current = str(_active[-1].record.path)
        if current is not None:
            os.environ["RUN_DIR"] = current
        else:
            os.environ.pop("RUN_DIR", None)
        return before
    finally:
        if is_locked:
            _active_lock.release()


def _active_for(run_dir: Path) -> _Recording | None:
    run_dir = Path(abspath(run_dir))
    for recording in list(_active):
        is_mine = recording.pid == os.getpid()
        if is_mine and recording.record and recording.record.path == run_dir:
            return recording
    return None


def _current_run_dir() -> str | None:
    """Return the directory of this thread's innermost run, else what RUN_DIR says."""
    for recording in reversed(_active):
        if recording.thread == threading.get_ident() and recording.record is not None:
            return str(recording.record.path)
    return os.environ.get("RUN_DIR")


# What entry stands on, in the order it is needed.


def _absolute(path: StrPath, name: str) -> Path:
    """Return `path` made absolute now, so that a later chdir does not move it."""
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"{name} must be a path, not {path!r}")
    text = os.fspath(path)
    if not text or "\0" in text:
        raise ValueError(f"{name} is {text!r}; give a directory such as 'results/exp'")
    try:
        return Path(abspath(text))
    except FileNotFoundError:
        gone = f"{name} {text!r} is relative, but the working directory is gone"
        raise FileNotFoundError(f"{gone}; give an absolute path") from None


def _checked_subdirs(create: bool, subdirs: Sequence[str] | None) -> list[str]:
    """Return the folders to create; refuse one that leads out of the run."""
    if isinstance(subdirs, str):
        raise TypeError(f"subdirs must be a list of names, not {subdirs!r}")
    if not create:
        return []
    names = subdirs
    if names is None:
        names = DEFAULT_SUBDIRS
    for name in names:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"subdirs has {name!r}; give names inside the run")
    return list(names)


def _checked_filename(name: str) -> str:
    if name in ("", ".", "..") or basename(name) != name:
        raise ValueError(f"file name {name!r} has a folder in it; give a bare name")
    return name


def _filled_prefix(prefix: str | None, config: JSON) -> str | None:
    """Fill `{key}` in a prefix from the config; an unknown key is a ValueError.

    Long values are cut to an equal share, so that what follows one stays in the name.

    >>> _filled_prefix("{model}-lr{optim.lr}", {"model": "a/b", "optim": {"lr": 0.1}})
    'a/b-lr0.1'
    """
    if prefix is None or "{" not in str(prefix):
        return prefix
    known: Facts = {}
    if isinstance(config, dict):
        _redactor.learn(dict(os.environ))
        _redactor.learn(config)
        for name, value in _redactor.data(config).items():
            known[name] = value
            known.update(_flattened(name, value))
    field = r"\{([^{}]*)\}"
    parts = re.split(field, str(prefix))
    fixed = sum(len(part.encode("utf-8", "replace")) for part in parts[::2])
    share = max(8, (MAX_PREFIX_BYTES - fixed) // max(1, len(parts) // 2))

    def fill(match: re.Match[str]) -> str:
        key = match[1]
        if key not in known:
            names = ", ".join(list(known)[:20]) or "nothing"
            text = f"run_prefix {prefix!r} has {match[0]!r}"
            raise ValueError(f"{text}, which is no key of config_args ({names})")
        return _first_bytes(str(known[key]), share)

    return re.sub(field, fill, str(prefix))


def _learn_at_entry(variables: Facts, site: _Site, config: JSON) -> None:
    _redactor.learn(variables)
    _redactor.learn({"argv": site.argv})
    _redactor.learn(config)


def _settle_code(site: _Site, likeliest: _Program | None = None) -> str | None:
    for directory in site.places():
        site.head = _told_head(likeliest or _asked_for_head(directory))
        likeliest = None
        if site.head:
            site.directory = directory
            break
    return _commit_in(site.head)


def _create_record(
    options: _Options, site: _Site, prefix: str | None, commit: str | None,
    launch: _Launch | None, is_watched: bool,
) -> _Record:
    """Create or reopen the run's directory: the only step of entry that may raise."""
    path = options.run_dir
    if options.resume == "auto":
        if launch is not None:
            path = launch.earlier_attempt()
    elif options.resume is not None:
        path = _resumable(options.base_dir, options.resume, options.run_prefix)
    if path is not None:
        record = _Record.reopen(path, options.base_dir, options.subdirs, is_watched)
    else:
        if prefix is None:
            prefix = site.name
        parts = [_safe_name(str(prefix)), time.strftime("%Y%m%d-%H%M%S")]
        if commit is not None and options.include_git_hash:
            parts.append(commit)
        name = "-".join(parts)
        record = _Record.create(options.base_dir, name, options.subdirs, is_watched)
    record.commit = commit
    record.script = site.name
    return record


def _resumable(base_dir: Path, resume: StrPath, prefix: str | None) -> Path:
    """Return the directory that `resume` names; "latest" is none that succeeded."""
    missing = f"no run {str(resume)!r} under {str(base_dir)!r} to resume"
    if str(resume) != "latest":
        for candidate in (Path(resume), base_dir / resume):
            if _is_run(candidate):
                return candidate.absolute()
        raise ValueError(missing)
    if prefix is None:
        prefix = _script_name()
    found = _latest_own_run(base_dir, prefix)
    if found is None:
        raise ValueError(missing)
    if Run(found, row=False).state == "success":
        text = f"the latest run, {str(found)!r}, has ended in success"
        raise ValueError(f"{text}; give its name to resume it all the same")
    return found


def _safe_name(text: str) -> str:
    """Replace what a file name cannot hold everywhere by ``_``.

    >>> _safe_name("Qwen/Qwen3-8B"), _safe_name("../../etc")
    ('Qwen_Qwen3-8B', '_.._etc')
    """
    import unicodedata

    encoding = sys.getfilesystemencoding()  # ASCII, where LC_ALL=C is taken literally
    text = unicodedata.normalize("NFC", text)
    text = text.encode(encoding, "replace").decode(encoding)
    safe = ""
    for character in text:
        if character.isalnum() or character in "._+=@-":
            safe += character
        else:
            safe += "_"
    name = _first_bytes(safe, MAX_PREFIX_BYTES).lstrip(".-").rstrip(".")
    if re.fullmatch(r"(?i)(con|prn|aux|nul|com\d|lpt\d)(\..*)?", name):
        name = "_" + name  # Windows keeps these names for devices.
    return name or "run"


def _first_bytes(text: str, size: int) -> str:
    return text.encode("utf-8", "replace")[:size].decode("utf-8", "ignore")


def _entered_at(record: _Record, begun: float) -> list[int]:
    """Return the moment of entry: ns of our clock, and device and ns of the disk's."""
    info = os.stat(record.folder)
    with _ignoring(OSError):
        info = os.stat(record.folder / "status.json")
    ago = int((monotonic() - begun) * 1e9)
    return [time.time_ns() - ago, info.st_dev, info.st_mtime_ns]


def _run_named(run_dir: str | None, record: _Record) -> Facts | None:
    if not run_dir or not isfile(join(run_dir, "status.json")):
        return None
    return {
        "run": basename(run_dir),
        "run_dir": run_dir,
        "relative": relpath(run_dir, record.path),  # holds in a moved tree
    }


def _changes_since_last_attempt(record: _Record, metadata: Facts) -> Facts:
    last = record.attempt - 1
    before = _read_json(record.path / f"attempts/{last}/metadata.json")
    changes: Facts = {"attempt": last}
    if before:
        then = _comparable(before)
        now = _comparable(metadata)
        for kind in ("config", "code", "packages"):
            changes[kind] = {}
            if then[kind] and now[kind]:  # code and packages are found out later
                pair = _differences({kind: then[kind]}, {kind: now[kind]})
                changes[kind] = pair.get(kind, {})
    return changes


def _warn_of_changes(metadata: Facts, kinds: Sequence[str]) -> None:
    changes = _mapping(metadata, "changes")
    texts = []
    for kind in kinds:
        if changes.get(kind):
            texts.append(f"{kind} ({', '.join(changes[kind])})")
    if texts:
        _warn(f"changed since attempt {changes['attempt']}: {'; '.join(texts)}")


def _say_what_failed(record: _Record) -> None:
    metadata = record.read_json("metadata.json")
    capture = _mapping(metadata, "capture")
    for name in ("git", "git.patch"):
        problem = _at(capture, name, "problem")
        if problem and not _at(capture, name, "is_expected"):
            _warn(f"the code is not recorded completely: {problem}", once=True)
            break
    if record.attempt > 1:
        _warn_of_changes(metadata, ["code", "packages"])


def _write_summary(record: _Record) -> None:
    with _tolerating("metrics/summary.json"):
        summary = _summarize_metrics(record.path)
        if summary:
            text = _format_json(summary)
            with record.run_folder.opened("metrics", create=True) as place:
                place.write("summary.json", text.encode("ascii"))


# === The record ===
# `_Record` alone knows the names of a run's files. Each has one writer: status.json
# and config.yaml whoever entered the run, metadata.json the recorder once it runs;
# lines of *.jsonl may come from anybody.

INDEX_FILE = join("index", "runs_index.jsonl")
_ARCHIVED = ("config.yaml", "metadata.json", "status.json", "git*.patch")


class _Record:
    """The files of one run on disk."""

    def __init__(
        self, path: Path, attempt: int, results_root: Path,
        identity: Sequence[int] = (),
    ) -> None:
        self.path = path
        self.attempt = attempt
        self.results_root = results_root
        self.run_folder = _Folder(path, identity)
        self.commit: str | None = None  # this, the script and the pid are for the index
        self.script: str | None = None
        self.pid = os.getpid()

    @staticmethod
    def create(
        base_dir: Path, name: str, subdirs: Sequence[str], is_watched: bool = False
    ) -> _Record:
        """Create `base_dir/name`, or the first free of name-2, name-3, ..."""
        with _explaining(base_dir):
            _retried(lambda: base_dir.mkdir(parents=True, exist_ok=True))
            path = _make_run_dir(base_dir, name)
        with _explaining(path):
            try:
                record = _Record(path, 1, _results_root(base_dir))
                record.begin(subdirs, is_watched)
                return record
            except BaseException:
                for folder in [*(path / name for name in subdirs), path]:
                    with _ignoring(OSError):
                        folder.rmdir()
                raise

    @staticmethod
    def reopen(
        path: Path, base_dir: Path, subdirs: Sequence[str], is_watched: bool = False
    ) -> _Record:
        """Use exactly this directory; a record that is there moves to attempts/<n>/.

        Of several who want it at once one gets it, the others a ValueError.
        """
        _ended_attempt(path)  # or refuse it, before anything is made
        with _explaining(path):
            path.mkdir(parents=True, exist_ok=True)
            root = _results_root(base_dir)
            root.mkdir(parents=True, exist_ok=True)
            _archive_attempt(path)
            record = _Record(path, _attempt(path), root)
            record.begin(subdirs, is_watched, is_new_folder=False)
            return record

    @staticmethod
    def at(path: Path, attempt: int | None = None) -> _Record:
        if attempt is None:
            attempt = _attempt(path)
        record = _Record(path, attempt, _results_root(path.parent))
        metadata = record.read_json("metadata.json")
        record.commit = _at(metadata, "git", "commit_short")
        record.script = metadata.get("script_name")
        return record

    def to_json(self) -> Facts:
        return {
            "path": str(self.path),
            "identity": self.run_folder.identity,
            "attempt": self.attempt,
            "results_root": str(self.results_root),
            "more": {name: getattr(self, name) for name in ("commit", "script", "pid")},
        }

    @staticmethod
    def from_json(facts: Facts) -> _Record:
        root = Path(facts["results_root"])
        path = Path(facts["path"])
        record = _Record(path, facts["attempt"], root, facts["identity"])
        vars(record).update(facts["more"])
        return record

    @property
    def inside(self) -> str:
        """Where in the run this attempt's record is: a later one may have moved it."""
        archive = f"attempts/{self.attempt}"
        if isdir(self.path / archive):
            return archive
        return ""

    @property
    def folder(self) -> Path:
        return self.path / self.inside

    def write_bytes(self, name: str, data: bytes, durable: bool = False) -> None:
        with self.run_folder.opened(self.inside) as place:
            place.write(name, data, durable)

    def write_json(self, name: str, value: JSON, durable: bool = False) -> None:
        """Replace a JSON file of this attempt; it is redacted."""
        self.write_bytes(name, _redacted_json(value), durable)

    def write_config(self, name: str, document: Facts) -> None:
        text = _format_yaml(_redactor.data(document))
        self.write_bytes(name, text.encode("utf-8"))

    def link(self, name: str, source: Path) -> None:
        with self.run_folder.opened(self.inside) as place:
            target = join(place.path, name)
            os.link(source, target, dst_dir_fd=place.dir_fd, follow_symlinks=False)

    def read_json(self, name: str) -> Facts:
        return _read_json(self.folder / name)

    def append(self, name: str, row: Facts) -> None:
        folder, _, file = name.rpartition("/")
        with self.run_folder.opened(folder, create=True) as place:
            place.append(file, row)

    def append_note(
        self, text: str, tags: Sequence[str], untag: Sequence[str] = ()
    ) -> None:
        note: Facts = {"timestamp_utc": _utc(), "user": _user(), "text": text}
        note["tags"] = list(tags)
        if untag:
            note["untag"] = list(untag)
        self.append("notes.jsonl", note)

    def open_log(self, name: str, flags: int) -> int:
        """Open a log: "stdout", "output" or "rank3.stderr"."""
        with self.run_folder.opened("logs", create=True) as place:
            return place.open(f"{name}.log", flags)

    def begin(
        self, subdirs: Sequence[str], is_watched: bool, is_new_folder: bool = True
    ) -> None:
        """Make the folders, and status.json, which a recorder may be going to touch."""
        for folder in subdirs:
            (self.path / folder).mkdir(parents=True, exist_ok=True)
        now = time.time()
        heartbeat = None
        if is_watched:
            heartbeat = HEARTBEAT_SECONDS
        status: Facts = {
            "status": "running",
            "exit_reason": None,
            "exit_code": None,
            "exception": None,
            "ended": None,
            "timestamp_utc": _utc(now),
            "started_utc": _utc(now),
            "started": round(now, 6),
            "duration_seconds": None,
            "pid": self.pid,
            "hostname": _hostname(),
            "process": _process_identity(self.pid),
            "heartbeat_seconds": heartbeat,
            "attempt": self.attempt,
            "run": self.path.name,
        }
        data = _redacted_json(status)
        is_made = not is_new_folder and self._create_status(data)
        if not is_made:  # nobody else knows a new folder, or the disk has no links
            _retried(lambda: self.write_bytes("status.json", data))

    def _create_status(self, data: bytes) -> bool:
        """Make status.json unless somebody else just did; False if the disk cannot."""
        with self.run_folder.opened() as place, _ignoring(OSError):
            try:
                place.write("status.json", data, is_new=True)
                return True
            except FileExistsError:
                raise _still_running(self.path) from None
        return False

    def is_unwatched(self) -> None:
        status = self.read_json("status.json")
        self.write_json("status.json", {**status, "heartbeat_seconds": None})

    def finish(self, ending: Facts) -> Facts:
        """Complete status.json and return it; a word of the body's own is kept."""
        before = self.read_json("status.json")
        status = {**before, **ending, "timestamp_utc": _utc()}
        own_word = before.get("status") not in (None, "running")
        if own_word and ending["exit_reason"] == "normal":
            status["status"] = before["status"]
            status["exit_reason"] = before.get("exit_reason") or "normal"
        self.write_json("status.json", status, durable=True)
        return status

    def touch(self) -> None:
        """Renew the heartbeat, which is the time of status.json."""
        os.utime(self.folder / "status.json")

    def redact_again(self) -> None:
        """Replace what was found secret after these files had been written."""
        paths = [self.folder / name for name in ("config.yaml", "status.json")]
        for path in [*paths, self.path / "notes.jsonl"]:
            with _tolerating(path.name), _ignoring(FileNotFoundError):
                data = _read_bytes(path)
                clean = _redactor.replace_known(data)
                if clean != data:
                    _write_file(path, clean)

    def tell_index(
        self, event: str, status: str | None = None, exit_reason: str | None = None,
        **more: JSON,
    ) -> None:
        row = self.index_row()
        row.update(event=event, timestamp_utc=_utc(), status=status)
        row.update(exit_reason=exit_reason, **more)
        folder, name = os.path.split(INDEX_FILE)
        with _Folder(self.results_root).opened(folder, create=True) as place:
            place.append(name, row)

    def index_row(self) -> Facts:
        return {
            "event": None,
            "timestamp_utc": None,
            "run_dir": str(self.path),
            "run_basename": self.path.name,
            "experiment_name": self.path.parent.name,
            "env_name": self.path.parent.parent.name,
            "results_root": str(self.results_root),
            "hostname": _hostname(),
            "user": _user(),
            "pid": self.pid,
            "git_commit_short": self.commit,
            "script_name": self.script,
            "status": None,
            "exit_reason": None,
            # holds in a tree that was moved
            "path": relpath(self.path, self.results_root),
        }

    def earlier_runs(self) -> Iterator[Path]:
        """Yield the runs of this user beside this one, the newest first."""
        with _ignoring(OSError):
            names = [name for name in os.listdir(self.path.parent) if _stamp_of(name)]
            # Of those of one second name-10 is newer than name-2.
            names.sort(key=lambda n: (_stamp_of(n), len(n), n), reverse=True)
            for name in names:
                path = self.path.parent / name
                if path != self.path and _is_mine(path):
                    yield path

    def earlier_metadata(self) -> Iterator[Facts]:
        """Yield metadata.json of the newest runs beside this one.

        Those that were started together with this one know little yet.
        """
        for path in itertools.islice(self.earlier_runs(), MAX_EARLIER):
            metadata = _read_json(path / "metadata.json")
            schema = _at(metadata, "run_utils", "schema_version")
            if schema == SCHEMA_VERSION:
                yield metadata


def _is_mine(path: StrPath) -> bool:
    """Tell whether a file or folder belongs to this user, and is no link."""
    with _ignoring(OSError):
        info = os.lstat(path)
        if stat.S_ISLNK(info.st_mode):
            return False
        return not hasattr(os, "geteuid") or info.st_uid == os.geteuid()
    return False


def _make_run_dir(base_dir: Path, name: str) -> Path:
    for number in range(1, MAX_SAME_NAME + 1):
        path = base_dir / name
        if number > 1:
            path = base_dir / f"{name}-{number}"
        with _ignoring(FileExistsError):
            _retried(path.mkdir)
            return path
    text = f"{name!r} and {MAX_SAME_NAME - 1} numbered names are taken"
    raise FileExistsError(errno.EEXIST, text)


def _retried(step: Callable[[], None]) -> None:
    """Call `step`; once more if the file system failed for a moment."""
    try:
        step()
    except (FileExistsError, PermissionError, NotADirectoryError):
        raise
    except OSError as error:
        if _is_foreign(error):
            raise
        step()


@contextlib.contextmanager
def _explaining(path: Path) -> Iterator[None]:
    """Let an OSError say in one sentence which directory it is, and what to do."""
    try:
        yield
    except OSError as error:
        if _is_foreign(error):
            raise
        start = f"cannot create a run in {str(path)!r}"
        blocking = path
        while not blocking.exists() and blocking != blocking.parent:
            blocking = blocking.parent
        if blocking.is_file():
            why = f"{str(blocking)!r} is a file; choose another base_dir"
            raise NotADirectoryError(f"{start}: {why}") from None
        why = error.strerror or str(error)
        todo = "choose a base_dir that is writable and has space"
        raise type(error)(f"{start}: {why}; {todo}") from None


def _archive_attempt(path: Path) -> None:
    """Move the record that is in a run to attempts/<n>/, if there is one."""
    names = _archived_names(path)
    if not names:
        return
    if (path / "attempts").is_symlink():
        raise OSError(errno.ELOOP, "attempts is a link", str(path / "attempts"))
    archive = _made_archive(path, "status.json" in names)
    for name in names:
        try:
            os.replace(path / name, archive / name)
        except FileNotFoundError:
            raise _still_running(path) from None
    ranks = sorted(path.glob("logs/rank*.status.json"))
    if ranks:
        (archive / "logs").mkdir()
    for rank in ranks:
        os.replace(rank, archive / "logs" / rank.name)


def _archived_names(path: Path) -> list[str]:
    """Return the files of a record, status.json first.

    Who finds others without it waits a moment, since they may be moved just now.
    """
    names: list[str] = []
    for _ in range(50):
        names = [found.name for name in _ARCHIVED for found in path.glob(name)]
        if not names or "status.json" in names:
            break
        time.sleep(0.01)
    return sorted(names, key=lambda name: (name != "status.json", name))


def _made_archive(path: Path, is_there: bool) -> Path:
    """Make the folder for the record that is in a run; who makes it moves the record.

    If it is there, somebody else is moving the record now, or died doing so: wait for
    a change, then take over.
    """
    number = _ended_attempt(path, is_there)
    archive = path / "attempts" / str(_whole(number) or _attempt(path))
    with _ignoring(FileExistsError):
        archive.mkdir(parents=True)
        return archive
    for _ in range(300):
        time.sleep(0.01)
        if _ended_attempt(path) != number:
            raise _still_running(path)
    if any(archive.iterdir()):
        archive = path / "attempts" / str(_attempt(path))
        archive.mkdir()
    return archive


def _ended_attempt(path: Path, is_there: bool = False) -> str:
    """Return the number of the attempt in a run as its record has it, or refuse it.

    `is_there` says that it has a record, unless that was moved away this very moment.
    """
    run = Run(path, row=False)
    status = run.status.get("status")
    if status == "running" or (is_there and status == "?" and not run.unread):
        raise _still_running(path)
    return _text(run.status.get("attempt"))


def _still_running(path: Path) -> ValueError:
    return ValueError(f"run {str(path)!r} is still running; it cannot be resumed")


def _attempt(path: Path) -> int:
    """Return the number of the attempt whose record lies in the run itself."""
    numbers = [_whole(archive.name) or 0 for archive in path.glob("attempts/*")]
    return max(numbers, default=0) + 1


def _results_root(base_dir: Path) -> Path:
    """Return the nearest directory with an index, else named "results", else itself.

    An index of somebody else is not taken, as in /tmp, and nothing is looked for above
    the home directory, the top of a repository, or a mount point.
    """
    home = os.path.expanduser("~")
    named = None
    for path in [base_dir, *base_dir.parents]:
        if _has_trusted_index(path, base_dir):
            return path
        if named is None and path.name == "results":
            named = path
        is_top = lexists(path / ".git") or os.path.ismount(path)
        if str(path) == home or is_top:
            break
    if named is not None:
        return named
    return base_dir


def _has_trusted_index(path: Path, base_dir: Path) -> bool:
    """Tell whether a folder has an index that is ours, or of base_dir's owner."""
    with _ignoring(OSError):
        index = os.lstat(path / INDEX_FILE)
        folder = os.stat(path)
        if not stat.S_ISREG(index.st_mode):
            return False
        if not hasattr(os, "geteuid") or path == base_dir:
            return True
        while not base_dir.exists():
            base_dir = base_dir.parent
        owners = (os.geteuid(), folder.st_uid, base_dir.stat().st_uid)
        everybody = folder.st_mode & stat.S_ISVTX and folder.st_mode & stat.S_IWOTH
        return index.st_uid in owners and not everybody
    return False


class _Ending:
    """How a run ended: of a block, of a command, or of a process that died."""

    def __init__(self, status: str, exit_reason: str, exit_code: int | None) -> None:
        self.status = status
        self.exit_reason = exit_reason
        self.exit_code = exit_code  # as the operating system sees it
        self.ended = round(time.time(), 3)
        self.exception: Facts | None = None
        self.signal: str | None = None
        self.problem: str | None = None
        self.last_output: list[str] = []
        self.last_words = ""  # what Python will print of it after the block

    @staticmethod
    def of_error(error: BaseException | None) -> _Ending:
        if error is None or _is_closed_generator(error):
            return _Ending("success", "normal", 0)
        ending = _Ending("failed", "exception", 1)
        if isinstance(error, KeyboardInterrupt) or _is_cancelled_by_ctrl_c(error):
            ending.exit_code = 128 + signal.SIGINT
        if isinstance(error, SystemExit):
            ending = _Ending("failed", "system_exit", _system_code(error.code))
            if ending.exit_code == 0:
                ending.status = "success"
                return ending
        ending.exception = _exception(error)
        if not isinstance(error, SystemExit):
            ending.last_words = ending.exception["traceback"]
        elif not isinstance(error.code, int):
            ending.last_words = ending.exception["message"] + "\n"
        return ending

    @staticmethod
    def of_command(code: int) -> _Ending:
        if code < 0:
            return _Ending.of_signal(-code)
        if code == 0:
            return _Ending("success", "normal", 0)
        return _Ending("failed", "system_exit", code)

    @staticmethod
    def of_signal(number: int, why: str = "") -> _Ending:
        ending = _Ending("failed", "killed", 128 + number)
        ending.signal = f"signal {number}"  # a real-time signal has no name
        with _ignoring(ValueError):
            ending.signal = signal.Signals(number).name
        ending.problem = f"killed by {ending.signal}{why}"
        return ending

    @staticmethod
    def of_death(wait_status: int | None, starved: bool) -> _Ending:
        """Return how a process died, as far as the kernel told its wait status.

        `starved` says that the kernel killed something here for want of memory.
        """
        code = None
        if wait_status is not None:
            code = _exit_code(wait_status)
        if code is not None and code < 0:
            why = ""
            if -code == _signals.SIGKILL and starved:
                why = ", out of memory"
            return _Ending.of_signal(-code, why)
        ending = _Ending("failed", "killed", code)
        ending.problem = "the process ended before its run did"
        if code is not None:
            ending.problem += f" (exit status {code})"
        return ending

    def to_json(self) -> Facts:
        facts: Facts = {
            "status": self.status,
            "exit_reason": self.exit_reason,
            "exit_code": self.exit_code,
            "exception": self.exception,
            "ended": self.ended,
        }
        if self.signal or self.problem:
            facts["signal"] = self.signal
            facts["problem"] = self.problem
        if self.last_output:
            facts["last_output"] = self.last_output
        return facts


def _is_cancelled_by_ctrl_c(error: BaseException) -> bool:
    """Tell whether asyncio.run cancels its task and then raises KeyboardInterrupt."""
    handler = signal.getsignal(signal.SIGINT)
    runner = getattr(getattr(handler, "func", None), "__self__", None)
    is_told = getattr(runner, "_interrupt_count", 0) > 0
    is_raised = isinstance(error.__context__, KeyboardInterrupt)  # before Python 3.11
    return type(error).__name__ == "CancelledError" and (is_told or is_raised)


def _is_closed_generator(error: BaseException) -> bool:
    """Tell whether the block is in a generator that its consumer left early."""
    trace = error.__traceback__
    if not isinstance(error, GeneratorExit) or trace is None:
        return False
    # CO_GENERATOR, CO_COROUTINE, CO_ASYNC_GENERATOR of the module inspect
    return bool(trace.tb_frame.f_code.co_flags & (0x20 | 0x80 | 0x200))


def _system_code(code: object) -> int:
    if code is None:
        return 0
    if not isinstance(code, int):
        return 1
    if not -(2**63) <= code < 2**63:
        return 255
    return int(code) & 0xFF


def _exception(error: BaseException) -> Facts:
    kind = type(error)
    name = kind.__qualname__
    if kind.__module__ not in ("builtins", "__main__"):
        name = f"{kind.__module__}.{name}"
    try:
        message = str(error)
    except Exception as problem:
        message = f"<{kind.__name__} whose str() raises {type(problem).__name__}>"
    try:
        import traceback

        trace = "".join(traceback.format_exception(kind, error, error.__traceback__))
    except Exception as problem:  # the interpreter is shutting down, or out of memory
        trace = f"<no traceback: {type(problem).__name__}>"
    return {
        "type": name,
        "message": _cut_middle(message, MAX_MESSAGE),
        "traceback": _cut_middle(trace, MAX_TRACEBACK),
    }


def _last_output(run_dir: Path, rank_prefix: str = "") -> list[str]:
    """Return the last lines of the log that is likeliest to say why."""
    for name in ("stderr", "output", "stdout"):
        path = run_dir / "logs" / f"{rank_prefix}{name}.log"
        data = _readable_bytes(path, tail=MAX_MESSAGE)
        # A private key goes over several lines, so it is searched for in all of them.
        text = _redactor.text(data.decode("utf-8", "replace"))
        if text:
            return text.splitlines()[-LAST_OUTPUT_LINES:]
    return []


# === Several processes ===
# Rank 0 creates the run and waits for nobody. Another rank asks for it by a file below
# base_dir, and rank 0 or its recorder answers that very request: no answer to an
# earlier launch is ever believed.


class _Launch:
    """Which of how many processes this is, and what names their launch."""

    def __init__(
        self, env: Mapping[str, str], base_dir: Path, run_prefix: str | None, ranks: str
    ) -> None:
        found = _rank(env) or _rank_of_lightning(env) or _rank_of_torch(env)
        if found is None:
            found = 0, 1, {}, None
        self.rank, self.world, self.shared, self.launcher = found
        self.base_dir = base_dir
        # The first run_context of one rank meets the first of the others, and so on.
        own = (os.getpid(), base_dir, run_prefix)
        _entered[own] = _entered.get(own, 0) + 1
        which: list[JSON] = [str(run_prefix or _script_name()), _entered[own]]
        self.facts: Facts = {"block": _short_hash([str(base_dir), *which])}
        self.entered: tuple[Path, int] | None = None  # the parent's run, and attempt
        is_lightning = "first" in self.shared
        if is_lightning and self.rank and ranks == "together":
            self._look_for_parent()
        slurm = {name: env[name] for name in _SLURM_JOB if name in env}
        if self.entered is not None or not (slurm or self.shared):
            return
        if ranks == "separate":
            which.append(self.rank)
        restarts = [_whole(env.get(name)) or 0 for name in _RESTARTS]
        job: JSON = self.shared
        if slurm:
            job = [slurm, env.get("SLURM_STEP_ID")]
        self.facts.update(job=_short_hash([job, which]), restarts=restarts)
        if self.world > 1 and not is_lightning:
            self.facts.update(rank=self.rank, world_size=self.world)
        self.key = _short_hash([self.shared, restarts, which])
        if ranks == "separate":
            self.rank = 0
            self.world = 1

    def _look_for_parent(self) -> None:
        """Find the run of our parent that we are in, as a rank that begins anew.

        What comes before the block in which it has started us is ours alone; in what
        comes after it we meet our parent as other ranks do.
        """
        runs = _runs_of_parent()
        for path, metadata in runs:
            if _at(metadata, "launcher", "block") == self.facts["block"]:
                self.entered = path, _attempt(path)
                _joined.add(runs[0][0])
        if runs and runs[0][0] not in _joined:
            self.rank = 0
            self.world = 1
            self.shared = {}

    def publish(self, record: _Record) -> _Meeting | None:
        """Begin to tell the other ranks where the run is; None if there are none."""
        if self.world == 1:
            return None
        meeting = _Meeting({
            "base_dir": str(self.base_dir),
            "key": self.key,
            "answer": {"run_dir": str(record.path), "attempt": record.attempt},
            "others": self.world - 1,
            "until": monotonic() + RANK_WAIT_SECONDS,
            "launcher": self.launcher,
            "answered": [],
            "joined": [],
        })
        with _tolerating("the other ranks"):
            marks = [n for n in meeting.place.names() if n.endswith(".joined")]
            meeting.place.remove(*marks)  # of an earlier launch
            meeting.answer_all()
        return meeting

    def join(self) -> tuple[Path, int]:
        if self.entered is not None:
            return self.entered
        place = _MeetingPlace(self.base_dir, self.key)
        request = f"{self.rank}-{os.urandom(8).hex()}"
        reply = f"{request}.json"
        deadline = monotonic() + RANK_WAIT_SECONDS
        try:
            while monotonic() < deadline:
                # Somebody may tidy up just now.
                with _explaining(place.path), _ignoring(FileNotFoundError):
                    names = place.names()
                    if reply in names:
                        answer = _read_json(place.path / reply)
                        place.write(f"{request}.joined", b"")
                        return Path(answer["run_dir"]), answer["attempt"]
                    if request not in names:  # at first, and when it was tidied up
                        place.write(request, b"")
                time.sleep(RANK_POLL_SECONDS)
        finally:
            place.remove(request, reply)
        who = f"rank {self.rank} waited {RANK_WAIT_SECONDS:g} s"
        what = f"rank 0 to create the run below {str(self.base_dir)!r}"
        known = [f"{k}={v}" for k, v in self.shared.items() if isinstance(v, str)]
        variables = " ".join(known)
        todo = "let all ranks enter run_context, or give ranks='separate'"
        raise TimeoutError(f"{who} for {what} ({variables}); {todo}")

    def earlier_attempt(self) -> Path | None:
        restarts = self.facts.get("restarts", [])
        if not any(restarts):
            return None
        found = []
        for path in self.base_dir.glob("*"):
            then = _mapping(_read_json(path / "metadata.json"), "launcher")
            is_ours = then.get("job") == self.facts["job"] and _is_mine(path)
            if is_ours and [int(count) for count in then["restarts"]] < restarts:
                found.append(path)
        return max(found, key=_started, default=None)


class _Meeting:
    """How rank 0, and after entry its recorder, answers the other ranks."""

    def __init__(self, facts: Facts) -> None:
        self.facts = facts
        self.place = _MeetingPlace(Path(facts["base_dir"]), facts["key"])
        self.until: float = facts["until"]  # by monotonic(), one for all of a host
        self.answered: list[str] = facts["answered"]  # the requests
        self.joined: list[str] = facts["joined"]  # those whose rank has the answer

    def answer_all(self) -> bool:
        """Answer every new request; return False once all ranks have come."""
        names = None
        with _ignoring(FileNotFoundError):
            names = self.place.names()
        if names is None:  # another launch tidies up just now
            return True
        answer = json.dumps(self.facts["answer"]).encode("ascii")
        for name in names:
            is_request = re.fullmatch(r"[0-9]+-[0-9a-f]{16}", name)
            if is_request and name not in self.answered:
                with _ignoring(FileNotFoundError):
                    self.place.write(f"{name}.json", answer)
                    self.answered.append(name)
        # A rank leaves a mark when it has read the answer. That a request is gone tells
        # nothing: it may be of a launch that crashed, and another run tidied up.
        for name in self.answered:
            if f"{name}.joined" in names:
                self.place.remove(f"{name}.joined")
                self.joined.append(name.partition("-")[0])
        return len(set(self.joined)) < int(self.facts["others"])

    def tick(self) -> float:
        """Answer; return the seconds until the next time, _NEVER if none is needed."""
        launcher = self.facts["launcher"]
        now = monotonic()
        is_over = launcher is not None and not _is_alive(*launcher[:2])
        is_gone = not isdir(self.facts["answer"]["run_dir"])
        if is_over or is_gone or now > self.until or not self.answer_all():
            for name in self.answered:
                self.place.remove(name, f"{name}.json", f"{name}.joined")
            for folder in (self.place.path, self.place.path.parent):
                with _ignoring(OSError):  # another launch uses it
                    folder.rmdir()
            return _NEVER
        # Most ranks come at once; for one that does not, a second makes no difference.
        waited = now - (self.until - RANK_WAIT_SECONDS)
        return min(1.0, max(RANK_POLL_SECONDS, waited / 20))

    def serve(self) -> None:
        with _tolerating("the other ranks"):
            for pause in iter(self.tick, _NEVER):
                time.sleep(pause)


class _MeetingPlace:
    """The folder .ranks/<key> below base_dir, in which only this user can write."""

    def __init__(self, base_dir: Path, key: str) -> None:
        base_dir.mkdir(parents=True, exist_ok=True)
        self.base_dir = base_dir
        self.key = key

    @property
    def path(self) -> Path:
        name = ".ranks"
        if lexists(self.base_dir / name) and not _is_mine(self.base_dir / name):
            name = f".ranks-{_posix.geteuid()}"  # beside a folder of another user
        return self.base_dir / name / self.key

    def names(self) -> list[str]:
        """Return what is there; a network disk tells it anew to who opens a folder."""
        with self._opened() as place:
            if place.dir_fd is None:
                return os.listdir(place.path)
            return os.listdir(place.dir_fd)

    def write(self, name: str, data: bytes) -> None:
        with self._opened() as place:
            place.write(name, data)

    def remove(self, *names: str) -> None:
        for name in names:
            with _ignoring(OSError):
                os.unlink(self.path / name)

    @contextlib.contextmanager
    def _opened(self) -> Iterator[_Place]:
        """Open the folder, made if need be; raise PermissionError if it is not safe."""
        with contextlib.ExitStack() as stack:
            place = self._enter(stack)
            if place.dir_fd is not None:
                ranks = os.stat(os.pardir, dir_fd=place.dir_fd)
                # A network disk may tell a wrong owner, then of base_dir as well.
                owners = (_posix.geteuid(), os.stat(self.base_dir).st_uid)
                if ranks.st_uid not in owners:
                    text = "the folder belongs to another user"
                    raise PermissionError(errno.EPERM, text, str(self.path.parent))
                if stat.S_IMODE(ranks.st_mode) != 0o700:
                    os.chmod(os.pardir, 0o700, dir_fd=place.dir_fd)
            yield place

    def _enter(self, stack: contextlib.ExitStack) -> _Place:
        """Open the folder; again if the last of an earlier meeting just removed it."""
        inside = f"{self.path.parent.name}/{self.key}"
        for _ in range(100):
            with _ignoring(FileNotFoundError):
                opened = _Folder(self.base_dir).opened(inside, create=True)
                return stack.enter_context(opened)
        raise FileNotFoundError(errno.ENOENT, "it is removed all the time", inside)


_entered: dict[tuple[int, Path, str | None], int] = {}  # how often this process has
_SLURM_JOB = ("SLURM_CLUSTER_NAME", "SLURM_JOB_ID")
_RESTARTS = ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT")
# Rank, number of ranks, ranks on this host; what all ranks of a launch have in common.
_RANK_VARIABLES = (
    ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE",
     ("TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT")),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE",
     ("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid")),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALNRANKS", ("PMI_JOBID",)),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "", ("SLURM_STEP_ID",)),
    ("SLURM_PROCID", "SLURM_NTASKS", "", ("SLURM_STEP_ID",)),
)


if TYPE_CHECKING:
    # Rank, world size, what only the ranks of this launch share, its launcher.
    _Rank = tuple[int, int, Facts, Union[list[JSON], None]]


def _rank(env: Mapping[str, str]) -> _Rank | None:
    """Return what the variables of a launcher tell of this process."""
    known = [row for row in _RANK_VARIABLES if row[0] in env and row[1] in env]
    if not known:
        return None
    name, size, local, shared = known[0]
    rank = _whole(env[name])
    world = _whole(env[size])
    if rank is None or world is None or world < 2 or rank >= world:
        return None
    names = (*shared, *_SLURM_JOB, "PBS_JOBID", size)
    ids: Facts = {key: env[key] for key in names if key in env}
    if name == "RANK" and "MASTER_PORT" not in ids and "TORCHELASTIC_RUN_ID" not in ids:
        return None  # somebody's own variable
    step = _whole(env.get("SLURM_STEP_ID"))
    if name == "SLURM_PROCID" and (step is None or step >= 0xFFFFFFF0):
        return None  # the number of what is no step of srun (slurm.h)
    if _is_child(ids):
        return None
    ids.update(_host_of_master(env))
    mark = [f"{key}={env[key]}" for key in (name, size, local) if key in env]
    launcher = _launcher_process(mark)
    if env.get(local) == env[size]:  # all are here, so it is the same for all
        ids["launcher"] = launcher
    return rank, world, ids, launcher


def _host_of_master(env: Mapping[str, str]) -> Facts:
    """Return which host is meant where the master's address names none."""
    if re.match(r"localhost|127\.|::1", env.get("MASTER_ADDR", "")):
        return {"host": [_hostname(), _boot()["boot_id"]]}
    return {}


def _rank_of_lightning(env: Mapping[str, str]) -> _Rank | None:
    """Return the same of Lightning, whose rank 0 starts the others in mid-script.

    They begin the script anew. How many there are is only told while they train.
    """
    names = {"LOCAL_RANK", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT"}
    rank = _whole(env.get("LOCAL_RANK"))
    if rank is None or "RANK" in env or not names <= env.keys():
        return None
    first: list[JSON] | None = _known_process(os.getpid())
    if rank:
        first = _launcher_process([f"LOCAL_RANK={rank}"])
        if first is None or first[0] != os.getppid():
            return None  # one of the ranks has started us
    world = _whole(env.get("WORLD_SIZE")) or _MANY
    return rank, world, {"first": first}, first


_MANY = 1_000_000  # ranks, where nobody tells their number


def _rank_of_torch(env: Mapping[str, str]) -> _Rank | None:
    """Return the same where no variable tells the rank, as below torch's mp.spawn."""
    rank = _loaded("torch.distributed.get_rank")
    world = _loaded("torch.distributed.get_world_size")
    if not isinstance(rank, int) or not isinstance(world, int) or world < 2:
        return None  # not loaded, or not initialised
    ids: Facts = {"torch": world, **_host_of_master(env)}
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        ids[name] = env.get(name)
    return rank, world, ids, _known_process(os.getppid())


def _whole(text: str | None) -> int | None:
    """Return the plain number that a text is; isdigit() also takes a superscript."""
    if text is None or not re.fullmatch(r"[0-9]{1,10}", text):
        return None
    return int(text)


def _is_child(ids: Facts) -> bool:
    """Tell whether a rank of this launch started us inside its run: we are none."""
    run_dir = os.environ.get("RUN_DIR")
    if run_dir is None or any(run.pid == os.getpid() for run in _active):
        return False
    then = _mapping(_read_json(join(run_dir, "metadata.json")), "launcher")
    own = [key for key in ids if not key.startswith(("PMIX_", "OMPI_MCA_"))]
    return "world_size" in then and all(then.get(key) == ids[key] for key in own)


def _runs_of_parent() -> list[tuple[Path, Facts]]:
    """Return the runs that our parent is in and their metadata, the innermost first."""
    runs: list[tuple[Path, Facts]] = []
    run_dir = os.environ.get("RUN_DIR")
    if _active:
        run_dir = _active[0].outside
    while run_dir and len(runs) < MAX_DEPTH:
        status = _read_json(join(run_dir, "status.json"))
        entered_by = [status.get("pid"), status.get("hostname")]
        is_parent = entered_by == [os.getppid(), _hostname()]
        if not is_parent or status.get("status") != "running":
            break
        metadata = _read_json(join(run_dir, "metadata.json"))
        runs.append((Path(run_dir), metadata))
        run_dir = _word(metadata, "parent", "run_dir")
    return runs


_joined: set[Path] = set()  # the runs in which our parent has started us, once joined


def _launcher_process(mark: Sequence[str]) -> list[JSON] | None:
    """Return what tells the launcher, which started all ranks, from other processes."""
    wanted = {os.fsencode(text) for text in mark}
    pid = os.getppid()
    while pid > 0:
        environment: list[bytes] = []
        with _ignoring(OSError):
            environment = _read_proc(f"/proc/{pid}/environ").split(b"\0")
        fields = _process_stat(pid)
        if fields is None or not wanted.issubset(environment):
            return _known_process(pid)
        pid = int(fields[1])
    return None


def _known_process(pid: int) -> list[JSON]:
    identity = _process_identity(pid)
    return [pid, identity["start_ticks"], identity["boot_id"], _hostname()]


def _short_hash(value: JSON) -> str:
    return _hash_of(json.dumps(value).encode())[:16]


def _record_rank(record: _Record, rank: int, ending: _Ending, more: Facts) -> None:
    """Write logs/rank<k>.status.json for a rank that failed; name it in status.json."""
    if ending.status != "failed":
        return
    facts: Facts = {"rank": rank, **ending.to_json(), **more}
    facts.update(timestamp_utc=_utc(), pid=record.pid, hostname=_hostname())
    name = f"{_rank_prefix(rank)}status.json"
    folder = join(record.inside, "logs")
    with record.run_folder.opened(folder, create=True) as place:
        place.write(name, _redacted_json(facts), durable=True)
    before = record.read_json("status.json").get("status")
    after = _name_failed_rank(record)
    if after is not None and before not in ("running", after["status"]):
        record.tell_index("end", after["status"], after["exit_reason"])


def _name_failed_rank(record: _Record) -> Facts | None:
    """Let status.json of a run that has ended tell which rank failed first, and how.

    Rank 0 and each rank that fails do this after their own part is written: whoever
    comes last sees both. Returns the new content, None if no rank has failed.
    """
    status: Facts | None = None
    while True:
        before = status
        status = _with_failed_rank(record)
        if status is None or status == before:  # no other rank failed meanwhile
            return status
        record.write_json("status.json", status, durable=True)


def _with_failed_rank(record: _Record) -> Facts | None:
    status = record.read_json("status.json")
    paths = sorted(record.folder.glob("logs/rank*.status.json"))
    found = filter(None, map(_read_json, paths))
    failed = {str(facts["rank"]): facts for facts in found}
    if status.get("status") in (None, "running") or not failed:
        return None
    own = _at(status, "ranks", "0")
    if own is None:
        own = {key: status[key] for key in _OUTCOME if key in status}
    causes = dict(failed)
    if own["status"] == "failed":
        causes["0"] = own
    first = min(causes, key=lambda rank: _failed_at(causes[rank]))
    outcome = {key: causes[first][key] for key in _OUTCOME if key in causes[first]}
    rest = {key: value for key, value in status.items() if key not in _OUTCOME}
    ranks = {"0": own}
    for rank, facts in failed.items():
        ranks[rank] = {key: facts.get(key) for key in _RANK_OUTCOME}
    return {**outcome, **rest, "failed_rank": int(first), "ranks": ranks}


_OUTCOME = ("status", "exit_reason", "exit_code", "exception", "ended", "signal",
            "problem", "last_output")
_RANK_OUTCOME = ("exit_reason", "exit_code", "ended")  # the rank's own file tells more


def _rank_prefix(rank: int) -> str:
    """Return how the names of a rank's own logs begin: "rank3.", of rank 0 ""."""
    if rank:
        return f"rank{rank}."
    return ""


def _failed_at(outcome: Facts) -> tuple[bool, float]:
    """Return a key that sorts failures: first what the others may follow from.

    The launcher ends the other ranks by SIGTERM. And that a rank was killed is seen
    by its peers, whose connections break, before it is by its recorder.
    """
    seen = outcome.get("ended") or 0.0
    if outcome.get("exit_reason") == "killed":
        seen -= 0.5
    return outcome.get("signal") == "SIGTERM", seen


# === The recorder ===
# One helper process per run, and nobody's child. It asks what is slow to answer, keeps
# the heartbeat, forwards output, takes samples, and writes down how the process that
# entered the run has died.


class _Recorder:
    """The experiment's end of the recorder: a socket, and no process of its own."""

    pid: int | None = None  # of the recorder
    number = 0  # of the last question
    received = b""
    has_died = False

    def __init__(self, variables: Mapping[str, str]) -> None:
        """Start the process, which gets ready and waits to be told of a run.

        Raises _Unknown where there can be none; `begin` does, too.
        """
        problem = _no_interpreter()
        if not hasattr(os, "posix_spawn") or not hasattr(select, "poll"):
            problem = "it takes posix_spawn and poll"  # Windows, eventlet
        elif os.getpid() == 1:
            problem = "process 1 would become its parent"
        if problem is not None:
            raise _Unknown(problem)
        self.path = _file_to_load()
        # What would change how its Python works it gets once it works.
        names = {name for name in variables if name.startswith("PYTHON")}
        names -= {"PYTHONHOME", "PYTHONPLATLIBDIR", "PYTHONCOERCECLOCALE"}
        self.withheld = {name: variables[name] for name in names}
        self.owner = os.getpid()
        self.lock = threading.Lock()
        env = {k: v for k, v in variables.items() if k not in self.withheld}
        _socket = __import__("_socket")  # what socket adds is slow to import
        ours, theirs = (_above_stderr(end.detach()) for end in _socket.socketpair())
        self.kept = _Kept(ours)
        try:
            self.starter = _spawn_recorder(theirs, self.path, env)
        except BaseException:
            os.close(ours)
            raise
        finally:
            os.close(theirs)

    def begin(self, request: Facts, forwards: Sequence[_Forward]) -> None:
        """Tell the recorder of the run, once it has answered for the first time."""
        deadline = monotonic() + RECORDER_SECONDS
        descriptors = []
        pidfd = _pidfd(self.owner)
        if pidfd is not None:
            descriptors.append(pidfd)
        for forward in forwards:
            descriptors += [forward.log, forward.target]
        try:
            first = self._answer(0, deadline)
            if first is None and self.is_gone():
                raise _Unknown("it ended at once")
            if first is None:
                raise _Unknown(f"it does not answer within {RECORDER_SECONDS:g} s")
            self.pid = first["pid"]
            _reap(self.starter, RECORDER_SECONDS)
            fields = _process_stat(first["pid"])
            if fields is not None and int(fields[1]) == os.getpid():
                raise _Unknown("this process would become its parent (a subreaper)")
            if not self.path:
                import marshal

                code = marshal.dumps(_MODULE_CODE)
                self._send(len(code).to_bytes(8, "big") + code, deadline)
            request["variables"] = self.withheld
            request["is_watched"] = pidfd is not None
            self._send(json.dumps(request).encode() + b"\n", deadline, descriptors)
        except BaseException:
            self.give_up()
            raise
        finally:
            if pidfd is not None:
                os.close(pidfd)

    def give_up(self) -> None:
        """Let go of a recorder that has not begun; it ends by itself."""
        self.has_died = True
        self.kept.close()
        if not _reap(self.starter, 0):
            with _ignoring(OSError):
                os.kill(self.starter, _signals.SIGKILL)
            _reap(self.starter, 0.5)
        if self.pid is not None:
            _reap(self.pid, 0.5)  # it is our child if it was refused for that

    def ask(
        self, do: str, seconds: float | None = None, descriptors: Sequence[int] = (),
        **facts: JSON,
    ) -> bool:
        """Send a question and wait for its answer; False if none comes in time.

        "collected" is answered once all captures are done, "drain" once all output
        is forwarded; "retarget" sends a descriptor to which output is forwarded from
        now on; "add" adds `facts` to metadata.json; "end" ends the recorder.
        """
        if seconds is None:
            seconds = RECORDER_SECONDS
        deadline = monotonic() + seconds
        if os.getpid() != self.owner:
            return False  # a forked child does not talk to the recorder of its parent
        locked: list[bool] = []
        try:
            _call_noted(locked, self.lock.acquire, True, seconds)
            if True not in locked:
                return False
            self.number += 1
            message = {"number": self.number, "do": do, **facts}
            with _ignoring(OSError):
                data = json.dumps(message).encode() + b"\n"
                self._send(data, deadline, descriptors)
                return self._answer(self.number, deadline) is not None
            return False
        finally:
            if True in locked:
                self.lock.release()

    def is_gone(self) -> bool:
        if os.getpid() == self.owner and self.kept.is_ours():
            self.has_died = _is_ready(self.kept.number, _HANG_UP, 0.0)
        return self.has_died

    def is_stopped(self) -> bool:
        """Tell whether somebody has stopped the recorder, as by SIGSTOP."""
        fields = None
        if self.pid is not None:
            fields = _process_stat(self.pid)
        return fields is not None and fields[0] in "Tt"

    def finish(self, seconds: float, ending: Facts | None) -> bool:
        """Return whether the recorder has completed the record within `seconds`.

        It writes the ending, if the program could not. A Ctrl-C ends the waiting alone:
        the recorder goes on, and so does the code after the block; so it is with one
        that was stopped. What comes into the logs afterwards is not forwarded: Python
        prints the traceback itself.
        """
        is_complete = False
        try:
            with _ignoring(KeyboardInterrupt):
                is_complete = self.ask("end", seconds, ending=ending)
        finally:
            is_gone = self.is_gone()
            self.kept.close()
        if self.pid is not None and not is_complete and not is_gone:
            with _ignoring(OSError):
                os.kill(self.pid, _signals.SIGCONT)  # somebody may have stopped it
            if seconds > 0:
                _warn("the recorder is still busy; it completes the record")
        return is_complete

    def _send(
        self, data: bytes, deadline: float, descriptors: Sequence[int] = ()
    ) -> None:
        """Send all of `data`, and descriptors with its first byte, or raise OSError."""
        _socket = __import__("_socket")
        if not self.kept.is_ours() or self.is_gone():
            raise OSError(errno.EPIPE, "the other end is closed")
        flags = _socket.MSG_DONTWAIT
        flags |= getattr(_socket, "MSG_NOSIGNAL", 0)  # SIGPIPE would kill the program
        rights: list[Any] = []
        if descriptors:
            numbers = b"".join(n.to_bytes(4, sys.byteorder) for n in descriptors)
            rights = [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, numbers)]
        while data:
            with _signals_held():  # a socket that is lost would close the descriptor
                connection = _socket.socket(fileno=self.kept.number)
                try:
                    with _ignoring(BlockingIOError):
                        sent = connection.sendmsg([data], rights, flags)
                        data = data[sent:]
                        rights = []
                finally:
                    connection.detach()
            if data and not _is_ready(self.kept.number, _polls.POLLOUT, deadline):
                raise OSError(errno.ETIMEDOUT, "it does not read what it is told")

    def _answer(self, number: int, deadline: float) -> Facts | None:
        """Return the answer to a question; None if none comes in time, or ever."""
        connection = self.kept.number
        while self.kept.is_ours():
            until = min(deadline, monotonic() + RECORDER_SECONDS)
            if not _is_ready(connection, _polls.POLLIN, until):
                if until == deadline or self.is_stopped():
                    break
                continue
            data = os.read(connection, 65536)
            if not data:
                break
            *lines, self.received = (self.received + data).split(b"\n")
            for line in lines:
                answer: Facts = json.loads(line)
                if answer["answer"] == number:
                    return answer
        return None


_HANG_UP = 0  # is told even if nothing is asked for


def _is_ready(descriptor: int, event: int, deadline: float) -> bool:
    poller = _polls.poll()
    poller.register(descriptor, event)
    return bool(poller.poll(max(0.0, deadline - monotonic()) * 1000))


def _reap(pid: int, seconds: float) -> bool:
    """Wait for a child that is about to end; return whether it is no child any more."""
    deadline = monotonic() + seconds
    while True:
        try:
            if os.waitpid(pid, _posix.WNOHANG)[0] == pid:
                return True
        except ChildProcessError:
            return True
        if monotonic() >= deadline:
            return False
        time.sleep(0.0005)


# The first thing that the new process runs. The experiment waits for the answer, so
# nothing before it may be slow. The socket is descriptor 0. A second process goes on
# and the first ends, so that os.wait() in the experiment never meets the recorder.
_BOOTSTRAP = """
import gc, sys
gc.disable()  # for there is nothing to collect yet
sys.path[:] = [place for place in sys.path if place]  # not the current directory
import _signal, _socket, posix
for number in sys.argv[3:]:
    _signal.signal(int(number), _signal.SIG_IGN)
_signal.pthread_sigmask(_signal.SIG_SETMASK, [])
posix.chdir(sys.argv[1])
posix.setsid()
if posix.fork():
    posix._exit(0)
for name in posix.listdir("/dev/fd"):
    if int(name) > 2:
        try:
            posix.close(int(name))
        except OSError:
            pass
connection = _socket.socket(fileno=posix.dup(0))
posix.dup2(1, 0)
connection.sendall(b'{"answer": 0, "pid": %d}\\n' % posix.getpid())

if sys.argv[2]:
    from _frozen_importlib_external import SourceFileLoader
    code = SourceFileLoader("run_utils", sys.argv[2]).get_code("run_utils")
else:
    import marshal
    size = int.from_bytes(connection.recv(8, _socket.MSG_WAITALL), "big")
    code = marshal.loads(connection.recv(size, _socket.MSG_WAITALL))
module = type(sys)("run_utils")
module.__file__ = sys.argv[2]
sys.modules["run_utils"] = module
exec(code, module.__dict__)
del code
gc.freeze()
gc.enable()
module._recorder_main(connection)
posix._exit(0)  # tidying up takes longer than an empty block
"""
_MODULE_CODE = sys._getframe().f_code  # of this very file, as it was compiled


def _signals_named(names: str) -> list[int]:
    known = [name for name in names.split() if hasattr(signal, f"SIG{name}")]
    return [getattr(signal, f"SIG{name}") for name in known]


# What it ignores: a terminal and a scheduler send signals to whole groups.
_IGNORED_SIGNALS = _signals_named("HUP INT QUIT TERM USR1 USR2 ALRM VTALRM XCPU PIPE")


def _spawn_recorder(connection: int, path: str, env: Mapping[str, str]) -> int:
    """Start what starts the recorder, whose descriptor 0 is `connection`."""
    flags = ["-s", "-S"]  # without the packages of the user and of the environment
    if sys.dont_write_bytecode:
        flags.append("-B")
    if sys.pycache_prefix:
        flags += ["-X", f"pycache_prefix={sys.pycache_prefix}"]
    flags += ["-X", f"utf8={sys.flags.utf8_mode}"]
    words = ["-c", _BOOTSTRAP, _neutral_directory(), path]
    words += [str(int(number)) for number in _IGNORED_SIGNALS]
    actions = [
        (_posix.POSIX_SPAWN_DUP2, connection, 0),
        (_posix.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_RDWR, 0),
        (_posix.POSIX_SPAWN_DUP2, 1, 2),
    ]
    pid: int = _posix.posix_spawn(
        sys.executable, [sys.executable, *flags, *words], env, file_actions=actions,
        setsigmask=_IGNORED_SIGNALS, setsigdef=[_signals.SIGCHLD],
    )
    return pid


def _file_to_load() -> str:
    """Return the file that the recorder loads; "" if it is sent the compiled code.

    That is so where Python keeps no byte code, which takes long to make. But what an
    import hook has changed is loaded, since it would need packages that the recorder
    has not. Raises _Unknown for a part of a script, which must not run once more.
    """
    path = str(globals().get("__file__", ""))
    spec = globals().get("__spec__")
    if spec is None and basename(path) != "run_utils.py":
        raise _Unknown("run_utils is no module of its own")
    is_kept = isfile(getattr(spec, "cached", None) or "")
    loader = type(globals().get("__loader__")).__name__
    if isfile(path) and (is_kept or loader != "SourceFileLoader"):
        return path
    return ""


def _recorder_main(connection: Any) -> None:
    """Be the recorder: what the new process does, from being told of a run on."""
    sys.setswitchinterval(0.0005)  # whoever has waited for git goes on at once
    told = b""
    rights: list[Any] = []
    while not told.endswith(b"\n"):
        data, more, _, _ = connection.recvmsg(65536, 1024)
        if not data:
            return  # there is no run
        told += data
        rights += more
    request: Facts = json.loads(told)
    os.environ.update(request["variables"])
    globals().update(request["settings"])
    _redactor.learn_values(request["secrets"])
    _RecorderProcess(request, connection, _descriptors_in(rights)).run()


def _descriptors_in(rights: Sequence[Any]) -> list[int]:
    """Return what came with a message; no program that is started inherits it."""
    data = b"".join(each[2] for each in rights)
    descriptors: list[int] = memoryview(data).cast("i").tolist()
    for descriptor in descriptors:
        os.set_inheritable(descriptor, False)
    return descriptors


class _RecorderProcess:
    """The recorder's own end: one loop, and threads for what may block."""

    pidfd: int | None = None  # tells of the death of the process that entered
    received = b""
    is_over = False  # the block has been left, or its process is dead
    has_heir = False  # its process has ended well, perhaps as a daemon does
    last_question = 0
    sampler: _Sampler | None = None
    meeting: _Meeting | None = None  # with ranks that have not come yet

    def __init__(
        self, request: Facts, connection: Any, descriptors: list[int]
    ) -> None:
        self.request = request
        self.connection = connection  # a socket
        self.said = sys.stderr = io.StringIO()  # it comes into metadata.json
        if request["is_watched"]:
            self.pidfd = descriptors.pop(0)
        pairs = zip(descriptors[::2], descriptors[1::2])
        self.forwards = [_Forward(log, target) for log, target in pairs]
        self.descriptors: list[int] = []  # those that came with a question
        self.record = _Record.from_json(request["record"])
        self.site = _Site.from_json(request["site"])
        self.rank = request["rank"]
        self.metadata = self.record.read_json("metadata.json")
        if request["resources"] and self.rank == 0:
            self.sampler = _Sampler(self.site.pid, self.record)
        self.ends_sampling = threading.Event()
        if request["meeting"] is not None:
            self.meeting = _Meeting(request["meeting"])
        self.poller = _polls.poll()

    def run(self) -> None:
        """Serve the experiment until its block is left or its process has died."""
        self.forwarding = [_started_thread(each.run) for each in self.forwards]
        self.captures = _started_thread(self._collect)
        self.sampling = _started_thread(self._sample)
        tasks = [self._touch, self._look_after_process, self._look_at_logs]
        self.due = dict.fromkeys([*tasks, self._answer_ranks], 0.0)
        connection = self.connection.fileno()
        self.poller.register(connection, _polls.POLLIN)
        if self.pidfd is not None:
            self.poller.register(self.pidfd, _polls.POLLIN)
        while not self.is_over:
            pause = min(self.due.values()) - monotonic()
            ready = dict(self.poller.poll(max(0.0, pause) * 1000))
            if connection in ready:
                self._listen()
            if self.pidfd in ready:
                self.due[self._look_after_process] = 0.0
            for task, due in self.due.items():
                if monotonic() >= due:
                    self.due[task] = monotonic() + HEARTBEAT_SECONDS
                    with _tolerating("the recorder"):
                        self.due[task] = monotonic() + task()
        self._complete()

    def _answer_ranks(self) -> float:
        """Answer the ranks that come late; a run whose process has died takes none."""
        if self.meeting is None:
            return _NEVER
        is_dead = self.pidfd is not None and _is_ready(self.pidfd, _polls.POLLIN, 0.0)
        if is_dead or self.is_over:
            return RANK_POLL_SECONDS
        return self.meeting.tick()

    def _listen(self) -> None:
        data = b""
        with _ignoring(OSError):
            data, rights, _, _ = self.connection.recvmsg(65536, 1024)
            self.descriptors += _descriptors_in(rights)
        if not data:  # it has called exec, or closed what it has open, or is dead
            self.poller.unregister(self.connection)
        *lines, self.received = (self.received + data).split(b"\n")
        for line in lines:
            message = json.loads(line)
            if message["do"] == "end":
                self.is_over = True
                self.last_question = message["number"]
                if message["ending"] is not None:
                    self._write_ending(message["ending"])
            elif message["do"] == "add":
                self.metadata.update(message["facts"])
                self._answer(message["number"])
            else:
                _started_thread(self._answer_later, message)

    def _answer(self, number: int) -> None:
        with _ignoring(OSError):
            self.connection.sendall(b'{"answer": %d}\n' % number)

    def _answer_later(self, message: Facts) -> None:
        """Answer once the captures are done, or what is in the logs is forwarded."""
        if message["do"] == "collected":
            self.captures.join()
        else:
            for forward in self.forwards:
                forward.wait(_NEVER)
        if message["do"] == "retarget":
            self.forwards[message["at"]].retarget(self.descriptors.pop(0))
        self._answer(message["number"])

    def _collect(self) -> None:
        """Find out what is slow to answer; write it down unless the end does so."""
        if self.rank:
            return  # it is the same for all ranks
        with _tolerating("metadata.json"):
            _complete_metadata(self.metadata, self.site, self.record)
            if self.record.attempt > 1:
                changes = _changes_since_last_attempt(self.record, self.metadata)
                self.metadata["changes"] = changes
        if not self.is_over:
            self._write_metadata()

    def _write_metadata(self) -> None:
        with _tolerating("metadata.json"):
            self.record.write_json("metadata.json", dict(self.metadata))

    def _sample(self) -> None:
        """Take samples until the end; a slow nvidia-smi holds nobody up here."""
        pause = float(HEARTBEAT_SECONDS)
        while self.sampler is not None and not self.ends_sampling.wait(pause):
            with _tolerating("resources"):
                pause = self.sampler.tick()

    def _touch(self) -> float:
        if self.rank:
            return _NEVER
        self.record.touch()
        return HEARTBEAT_SECONDS

    def _look_at_logs(self) -> float:
        """Wake the forwards that wait for the end of a silence."""
        pause = _NEVER
        for forward in self.forwards:
            if os.fstat(forward.log).st_size != forward.position():
                forward.wake.set()
            pause = SILENT_SECONDS
        return pause

    def _look_after_process(self) -> float:
        """Look whether the process that entered lives; a pidfd tells when to look.

        One that has ended well while somebody else has its socket has become a daemon:
        a child of it goes on, and the end of that child is the end of the run.
        """
        wait_status: int | None = 0
        if not self.has_heir:
            if self.pidfd is not None:
                if not _is_ready(self.pidfd, _polls.POLLIN, 0.0):
                    return _NEVER
                self.poller.unregister(self.pidfd)
            elif _is_alive(self.site.pid, self.request["process"]["start_ticks"]):
                return 1.0
            wait_status = _wait_status(self.site.pid, self.pidfd)
            self.pidfd = None
            self.has_heir = wait_status == 0
        if self.has_heir and not _is_ready(self.connection.fileno(), _HANG_UP, 0.0):
            return 1.0
        self._record_death(wait_status)
        return _NEVER

    def _record_death(self, wait_status: int | None) -> None:
        self.is_over = True
        name = "status.json"
        if self.rank:
            name = f"logs/{_rank_prefix(self.rank)}{name}"
        status = self.record.read_json(name)
        if not isinstance(status.get("exit_code"), int):
            is_starved = _oom_kills() > self.request["oom_kills"]
            ending = _Ending.of_death(wait_status, is_starved)
            self._write_death(ending, monotonic())

    def _write_death(self, ending: _Ending, ended: float) -> None:
        prefix = _rank_prefix(self.rank)
        ending.last_output = _last_output(self.record.path, prefix)
        more: Facts = {"duration_seconds": round(ended - self.request["begun"], 3)}
        if not self.rank:
            self._write_ending({**ending.to_json(), **more})
            return
        with _tolerating("status.json"):
            _record_rank(self.record, self.rank, ending, more)

    def _write_ending(self, ending: Facts) -> None:
        with _tolerating("status.json"):
            status = self.record.finish(ending)
            status = _name_failed_rank(self.record) or status
            self.record.tell_index("end", status["status"], status["exit_reason"])

    def _complete(self) -> None:
        """Forward the rest, let go of what is the program's, complete the record."""
        ended = monotonic()
        for forward in self.forwards:
            forward.stop_at = os.fstat(forward.log).st_size
            forward.wake.set()
        self.ends_sampling.set()
        self.sampling.join()
        if self.rank == 0:
            self._complete_record()
        for forward, thread in zip(self.forwards, self.forwarding):
            thread.join()
            os.close(forward.target)
        self._answer(self.last_question)
        if self.request["until_exit"] and self.pidfd is not None:
            self._wait_for_exit(self.pidfd, ended)
        if self.meeting is not None and self.due[self._answer_ranks] < _NEVER:
            if self._has_failed():  # ranks that come later get no answer
                self.meeting.until = 0.0
            self.meeting.serve()

    def _complete_record(self) -> None:
        more: Facts = {}
        with _tolerating("resources"):
            if self.sampler is not None:
                more["resources"] = self.sampler.summary()
        with _tolerating("outputs"):
            more["outputs"] = _left_files(self.record.path)
        self.captures.join()
        self.metadata.update(more)
        said = self.said.getvalue()
        if said:
            problem = {"ok": False, "problem": _cut_middle(said, MAX_MESSAGE)}
            self.metadata["capture"]["recorder"] = problem
        self._write_metadata()
        _write_summary(self.record)
        if _redactor.known.difference(self.request["secrets"]):
            self.record.redact_again()

    def _wait_for_exit(self, pidfd: int, ended: float) -> None:
        if _is_ready(pidfd, _polls.POLLIN, monotonic() + 10):
            wait_status = _wait_status(self.site.pid, pidfd)
            if wait_status and not self._has_failed():
                ending = _Ending.of_command(_exit_code(wait_status))
                ending.ended = round(ending.ended - (monotonic() - ended), 3)
                self._write_death(ending, ended)

    def _has_failed(self) -> bool:
        return self.record.read_json("status.json").get("status") == "failed"


_NEVER = float("inf")


def _started_thread(work: Callable[..., None], *args: object) -> threading.Thread:
    thread = threading.Thread(target=work, args=args, daemon=True)
    thread.start()
    return thread


# === Output ===
# Not a terminal: descriptors 1 and 2 point at the logs, and the recorder forwards what
# is appended. A terminal, a notebook, a test runner: what is written is copied. The
# stream stays the program's own object: only an attribute `write` is set on the file
# below it, or on itself, and deleted again.


class _Capture:
    """The output of one run: the streams that are captured, and their logs."""

    recorder: _Recorder | None = None
    shell: Any = None  # of IPython

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.streams: list[_Stream] = []
        self.forwards: list[_Forward] = []
        self.lock = threading.Lock()  # two threads may find the disk full at once

    def open(self, record: _Record, rank_prefix: str) -> None:
        for name, descriptor in (("stdout", 1), ("stderr", 2)):
            if getattr(sys, name, None) is not None:
                self.streams.append(_Stream(self, name, descriptor))
        places = {stream.place for stream in self.streams}
        try:
            for stream in self.streams:
                name = stream.name
                if len(places) < len(self.streams):
                    name = "output"
                stream.open(record, f"{rank_prefix}{name}", self.streams[0])
        except BaseException:
            self.close("")
            raise

    def start(self, recorder: _Recorder | None) -> None:
        """Redirect; without a recorder, which would forward, everything is copied."""
        self.recorder = recorder
        if recorder is None:
            for stream in self.streams:
                stream.is_direct = False
        _flush_c_streams(self.streams)
        _captures.append(self)
        for stream in self.streams:
            stream.start()
        ask = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)
        self.shell = ask()  # that runs this program cell by cell
        if self.shell is not None:
            self.shell.events.register("pre_execute", self.renew)

    def renew(self) -> None:
        """See what one more cell writes: IPython puts `write` back after each."""
        with _tolerating("output capture"):
            for stream in self.streams:
                for tap in stream.taps:
                    tap.renew()

    def forget_shell(self) -> None:
        if self.shell is not None:
            with _ignoring(ValueError):  # the program has forgotten it
                self.shell.events.unregister("pre_execute", self.renew)

    def copy(self, descriptor: int, data: bytes) -> None:
        for stream in self.streams:
            if stream.descriptor == descriptor:
                stream.copy(data, [])

    def stop(self) -> None:
        """Put every stream back as it was, whatever fails on the way."""
        steps: list[Callable[[], object]] = [self.forget_shell]
        steps += [stream.flush for stream in self.streams]
        steps.append(lambda: _flush_c_streams(self.streams))
        if threading.active_count() > 1:  # whose next line would be shown first
            steps.append(self.drain)
        steps += [stream.stop for stream in self.streams]
        if self in _captures:
            steps.append(lambda: _captures.remove(self))
        _in_turn(steps)

    def close(self, last_words: str) -> None:
        """Append what Python itself will print, such as a traceback; close the logs."""
        if self.recorder is not None and self.recorder.is_gone():
            self.drain()
        if last_words and self.streams:
            text = _redactor.text(last_words)
            self.streams[-1].copy(text.encode("utf-8", "backslashreplace"), [])
        for stream in self.streams:
            stream.log.close()
            stream.saved.close()
        for forward in self.forwards:
            forward.kept[0].close()
        self.streams = []
        self.forwards = []

    def drain(self) -> None:
        """Have all that is in the logs shown, as far as a moment allows."""
        if self.pid != os.getpid():  # a forked child has no word with the recorder
            for forward in self.forwards:
                forward.wait(DRAIN_SECONDS)
        elif self.recorder is not None and not self.recorder.is_gone():
            self.recorder.ask("drain", DRAIN_SECONDS)
        else:
            for forward in self.forwards:
                forward.drain()


_captures: list[_Capture] = []  # those that have started and not stopped, in order


class _Stream:
    """sys.stdout or sys.stderr while a run captures it."""

    forward: _Forward | None = None
    is_logged = True  # until the log fails
    is_direct = False  # the descriptor is the log

    def __init__(self, capture: _Capture, name: str, descriptor: int) -> None:
        self.capture = capture
        self.name = name
        self.descriptor = descriptor
        self.original: Any = getattr(sys, name)
        self.log = _Kept(-1)
        self.saved = _Kept(-1)  # what the descriptor stood for before
        self.taps: list[_Tap] = []
        self.place: object = self  # equal for two streams that go to one place
        identity = _identity(descriptor)
        if identity is not None and _descriptor_of(self.original) == descriptor:
            self.place = identity
            self.is_direct = _can_be_a_file(descriptor)

    def open(self, record: _Record, name: str, first: _Stream) -> None:
        """Open the log, unless the first stream has it; keep the descriptor."""
        if self.is_direct:
            self.saved = _Kept(_above_stderr(os.dup(self.descriptor)))
        if self is not first and self.place == first.place:
            self.log = first.log
            self.forward = first.forward
            return
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
        self.log = _Kept(record.open_log(name, flags))
        if self.is_direct:
            reader = record.open_log(name, os.O_RDONLY)
            os.lseek(reader, 0, os.SEEK_END)
            self.forward = _Forward(reader, self.saved.number)
            self.capture.forwards.append(self.forward)

    def start(self) -> None:
        """Point the descriptor at the log, or have a copy of what is written."""
        if self.is_direct:
            self.flush()
            os.dup2(self.log.number, self.descriptor)
        own = _bottom(self.original)
        files = [
            (file, is_buffered)
            for file, is_buffered in (own, _bottom(getattr(sys, f"__{self.name}__")))
            if isinstance(file, io.FileIO) and _descriptor_of(file) == self.descriptor
        ]
        if self.is_direct or own in files:
            for file, is_buffered in files:
                self._tap(file, is_buffered)
        elif _is_plain(self.original):
            self._tap(*own)
        else:
            self._tap(self.original, False)

    def _tap(self, holder: Any, is_buffered: bool) -> None:
        """See what is written to an object; one that refuses gets a stand-in."""
        tap = next((tap for tap in _taps if tap.holder is holder), None)
        if tap is not None:
            tap.renew()
        else:
            try:
                tap = _Tap(holder, is_buffered)
            except (AttributeError, TypeError):
                holder = _StandIn(self.original)
                setattr(sys, self.name, holder)
                tap = _Tap(holder, False)
            _taps.append(tap)
        if tap not in self.taps:
            self.taps.append(tap)
            tap.set_streams([*tap.streams, self])

    def copy(self, data: bytes, written: list[int]) -> None:
        """Append to the log alone, and to `written` that it was; give up a full log."""
        if not self.is_logged:
            return
        try:
            if not self.log.is_ours():
                raise OSError(errno.EBADF, "the program closed the log")
            written.extend(map(os.write, (self.log.number,), (data,)))
            if written[-1] < len(data):
                written.pop()
                raise OSError(errno.ENOSPC, "only a part of it fitted")
        except OSError as error:
            if _is_foreign(error):
                raise
            with self.without_log(error):
                pass

    def is_log(self) -> bool:
        """Tell whether the descriptor still is the log: the program may move it."""
        return self.is_direct and _identity(self.descriptor) == self.log.identity

    @contextlib.contextmanager
    def without_log(self, error: OSError) -> Iterator[None]:
        """Go on without the log, which has failed; then say so in one line."""
        self.is_logged = False
        self.give_back()
        yield
        problem = f"{self.name} is no longer logged: {error}"
        if _descriptor_of(getattr(sys, "stderr", None)) != 2:
            _warn(problem)
            return
        line = f"run_utils: {problem}\n".encode("utf-8", "replace")
        for _ in range(2):
            with _ignoring(OSError):  # this thread may have locked sys.stderr
                if os.write(2, line) == len(line):
                    return
            for stream in self.capture.streams:
                if stream.descriptor == 2:  # its log is on the same disk
                    stream.is_logged = False
                    stream.give_back()

    def give_back(self) -> None:
        """Let the descriptor be what it was before, once the log has been shown."""
        capture = self.capture
        is_parent = capture.pid == os.getpid()
        is_locked = is_parent and capture.lock.acquire(timeout=2 * DRAIN_SECONDS)
        try:
            if self.is_log() and (is_locked or not is_parent):
                capture.drain()
            for stream in capture.streams:
                if stream.log is self.log:
                    stream.is_logged = self.is_logged
                    stream.let_go()
        finally:
            if is_locked:
                capture.lock.release()

    def let_go(self) -> None:
        if self.is_log():
            if not self.saved.is_ours():  # the program has closed what was kept
                self.saved = _Kept(os.open(os.devnull, os.O_WRONLY))
            os.dup2(self.saved.number, self.descriptor)
        self.is_direct = False
        if self.forward is not None:
            self.forward.is_broken = True  # copies in the log are not to be shown
        for tap in self.taps:
            tap.set_streams(tap.streams)

    def flush(self) -> None:
        names = [self.name, f"__{self.name}__"]
        for stream in [self.original, *(getattr(sys, name, None) for name in names)]:
            with _ignoring(Exception):  # closed, detached, or the program's own kind
                stream.flush()

    def stop(self) -> None:
        """Put the stream back as it was before this run, whichever runs go on."""
        steps: list[Callable[[], object]] = []
        for tap in self.taps:
            rest = [stream for stream in tap.streams if stream is not self]
            steps.append(functools.partial(tap.set_streams, rest))
            if not rest and getattr(sys, self.name, None) is tap.holder:
                setattr(sys, self.name, self.original)  # in place of a stand-in
        steps.append(self._release)
        _in_turn(steps)

    def _release(self) -> None:
        """Move the descriptor back; or move a later run, which goes on, below us."""
        if self.is_log():
            if self.saved.is_ours():  # else the recorder goes on until the end
                os.dup2(self.saved.number, self.descriptor)
        elif self.is_direct:
            for capture in reversed(_captures):
                capture.drain()
            for capture in _captures:
                for stream in capture.streams:
                    if stream.saved.identity == self.log.identity:
                        stream.move_below(self)
        self.is_direct = False

    def move_below(self, ended: _Stream) -> None:
        """Send output on to where that of an earlier run went, which has ended."""
        if not self.saved.is_ours() or not ended.saved.is_ours():
            return
        target = ended.saved.number
        forward = self.forward
        recorder = self.capture.recorder
        if forward is not None and forward.target == self.saved.number:
            number = self.capture.forwards.index(forward)
            if not recorder or not recorder.ask("retarget", None, [target], at=number):
                self.is_logged = False
        os.dup2(target, self.saved.number, inheritable=False)
        self.saved.identity = ended.saved.identity
        if not self.is_logged:
            self.give_back()


def _descriptor_of(stream: Any) -> int | None:
    with _ignoring(Exception):  # none, closed, or the program's own kind
        number = stream.fileno()
        if isinstance(number, int):
            return number
    return None


def _can_be_a_file(descriptor: int) -> bool:
    """Tell whether what is written to a descriptor may go to a file instead."""
    if not hasattr(os, "pread") or os.isatty(descriptor):
        return False
    resource = __import__("resource")
    limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    is_limited = bool(limit != resource.RLIM_INFINITY)
    if is_limited:
        _warn("`ulimit -f` is set: what other programs print is not logged", once=True)
    return not is_limited


def _is_plain(stream: Any) -> bool:
    """Tell whether all that is written to a stream goes to the buffer that it has."""
    is_wrapper = isinstance(stream, io.TextIOWrapper)
    return is_wrapper and type(stream).write is io.TextIOWrapper.write


def _bottom(stream: Any) -> tuple[Any, bool]:
    """Return the file below a stream, and whether a buffer stands in between."""
    below = stream
    with _ignoring(Exception):  # detached
        below = stream.buffer
        return below.raw, True
    return below, False  # python -u, or a buffer of a test runner


class _Tap:
    """An attribute `write`, set on an object to see what is written to it.

    Whoever writes looks `write` up by its name in the object itself: print, logging,
    writelines, a text stream at its buffer, and a buffer at its file.
    """

    look_at = 0.0  # when to see next whether the recorders are alive
    repeated = b""  # was written, and is about to be written once more

    def __init__(self, holder: Any, is_buffered: bool) -> None:
        """Set the attribute; raise AttributeError or TypeError if that is refused."""
        self.holder = holder
        self.is_buffered = is_buffered
        self.streams: list[_Stream] = []
        self.copies = self.streams  # those whose log gets a copy
        self._install()

    def _install(self) -> None:
        self.before = getattr(self.holder, "__dict__", {}).get("write")
        self.original: Callable[[Any], Any] = self.holder.write
        self.installed = self._new_write()
        self.holder.write = self.installed

    def renew(self) -> None:
        """Set the attribute once more if somebody has put back what was there."""
        if self.holder.write is not self.installed:
            self._install()

    def set_streams(self, streams: list[_Stream]) -> None:
        """See what is written for these streams; for none, be gone."""
        self.streams = streams
        self.copies = [s for s in streams if s.is_logged and not s.is_direct]
        if streams:
            return
        if self in _taps:
            _taps.remove(self)
        if getattr(self.holder, "write", None) is not self.installed:
            return  # somebody else has set `write` since, and calls ours
        if self.before is not None:
            self.holder.write = self.before
        else:
            del self.holder.write

    def _new_write(self) -> Callable[[Any], Any]:
        """Return a `write` for the object.

        A signal handler may raise between any two steps, even when the file is written
        and the buffer above, which then writes again, does not know it yet. It cannot
        come into a function of C, so there the result is stored, in `done`.
        """
        original = self.original
        now = monotonic

        def write(data: Any) -> Any:
            if self.installed is not write:
                return original(data)  # a later one sees it: what called us was wrapped
            if now() > self.look_at:
                self._look_after_recorders()
            rest = data
            done: list[Any] = []
            copied: list[int] = []
            try:
                if self.repeated:
                    rest = self._new_part(data)
                done.extend(map(original, (rest,)))
                if self.copies:
                    self._copy(rest, done[0], copied)
                if not self.is_buffered:
                    return self._complete(data, done[0])
                if done[0] is None:
                    return None  # a terminal that does not block takes nothing now
                self.repeated = b""
                return len(data) - len(rest) + done[0]
            except BaseException as error:
                if not done:
                    return self._write_elsewhere(data, error)
                if self.is_buffered:
                    self._remember(data, len(data) - len(rest) + (done[0] or 0))
                if self.copies:
                    self._copy(rest, done[0], copied)
                raise

        return write

    def _complete(self, data: Any, written: Any) -> Any:
        """Write the rest if the disk is nearly full: python -u tries only once."""
        if not self.copies and written != len(data):
            if any(stream.is_log() for stream in self.streams):
                return written + self.installed(memoryview(data).cast("B")[written:])
        return written

    def _remember(self, data: Any, written: int) -> None:
        """Remember what the buffer above will write again; it keeps no larger piece."""
        kept = min(getattr(self.holder, "_blksize", 0), io.DEFAULT_BUFFER_SIZE)
        if len(data) <= kept:
            self.repeated = bytes(memoryview(data)[:written])

    def _new_part(self, data: Any) -> Any:
        """Leave out what was written already, if that is what is written again."""
        size = len(self.repeated)
        if bytes(memoryview(data)[:size]) == self.repeated:
            return memoryview(data)[size:]
        return data

    def _copy(self, data: Any, written: Any, copied: list[int]) -> None:
        if isinstance(data, str):
            data = data.encode("utf-8", "backslashreplace")
        else:
            data = bytes(memoryview(data).cast("B")[: written or 0])
        for stream in self.copies[len(copied) :]:
            stream.copy(data, copied)

    def _write_elsewhere(self, data: Any, error: BaseException) -> Any:
        """Write where output went before, if its log has failed; else raise."""
        if isinstance(error, OSError) and not _is_foreign(error):
            for stream in reversed(self.streams):
                if stream.is_log():
                    with stream.without_log(error):
                        return self.installed(data)
        raise error

    def _look_after_recorders(self) -> None:
        """Give back the output of a run whose recorder, which forwards it, is gone."""
        self.look_at = monotonic() + LOOK_SECONDS
        with _tolerating("output capture"):
            for stream in self.streams:
                recorder = stream.capture.recorder
                if recorder is not None and recorder.is_gone():
                    for other in stream.capture.streams:
                        other.give_back()


_taps: list[_Tap] = []  # all that are set


class _StandIn:
    """Stands in for a stream whose attributes cannot be set, and is like it."""

    run_utils_original: Any = None

    def __init__(self, original: Any) -> None:
        self.run_utils_original = original
        self.write = original.write

    def writelines(self, lines: Iterable[Any]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.run_utils_original, name)


def _flush_c_streams(streams: Sequence[_Stream]) -> None:
    """Flush the buffers of C's stdio, so that a `puts` lands in the log of its run."""
    files = [str(getattr(module, "__file__", "")) for module in [*sys.modules.values()]]
    extensions = [f for f in files if f.endswith(".so") and "lib-dynload" not in f]
    is_used = extensions or "ctypes" in sys.modules
    if not is_used or not any(stream.is_direct for stream in streams):
        return
    with _ignoring(Exception):  # a Python built without ctypes
        import ctypes

        library = ctypes.CDLL(None)
        for name in ("stdout", "stderr", "__stdoutp", "__stderrp"):  # __ on macOS
            with _ignoring(ValueError):
                library.fflush(ctypes.c_void_p.in_dll(library, name))


class _Forward:
    """Copies what is appended to a log to where the output went before."""

    stop_at = _NEVER  # the offset where forwarding ends
    is_broken = False  # nothing is shown any more: the reader went away

    def __init__(self, log: int, target: int) -> None:
        self.log = log
        self.target = target
        self.kept = [_Kept(log), _Kept(target)]
        self.wake = threading.Event()  # there is something to do

    def position(self) -> int:
        return os.lseek(self.log, 0, os.SEEK_CUR)

    def wait(self, seconds: float) -> None:
        """Wait until all that is in the log by now is forwarded, or was cut."""
        deadline = monotonic() + seconds
        self.wake.set()
        with _ignoring(OSError):  # the program has closed the log
            end = os.fstat(self.log).st_size
            while self.position() < end <= os.fstat(self.log).st_size:
                if monotonic() > deadline:
                    return
                time.sleep(0.001)

    def run(self) -> None:
        """Forward until `stop_at`; look often while there is output.

        After a long silence the recorder looks, for all streams: once a second is as
        often as it may wake when it is idle.
        """
        silent_since = monotonic()
        while True:
            size = min(FORWARD_BYTES, self.stop_at - self.position())
            if size <= 0:
                return
            if self._forward(int(size)):
                silent_since = monotonic()
                continue
            if self.stop_at < _NEVER:
                return  # the log has been cut
            pause = max(0.005, (monotonic() - silent_since) / 8)
            if pause < SILENT_SECONDS:
                self.wake.wait(pause)
            else:
                self.wake.wait()  # until `_look_at_logs` has seen something
            self.wake.clear()

    def _forward(self, size: int) -> bool:
        """Forward up to `size` bytes; return False if there is nothing new."""
        data = b""
        with _ignoring(OSError):
            data = _posix.pread(self.log, size, self.position())
        if not data:
            if os.fstat(self.log).st_size < self.position():  # as by copytruncate
                os.lseek(self.log, 0, os.SEEK_SET)
            return False
        while data:
            # A pipe takes so many bytes at once or none, so that whoever goes on
            # after a process that was killed repeats nothing.
            piece = data[: getattr(select, "PIPE_BUF", 512)]
            if not self.is_broken:
                self.is_broken = not _write_patiently(self.target, piece)
            os.lseek(self.log, len(piece), os.SEEK_CUR)
            data = data[len(piece) :]
        return True

    def drain(self) -> None:
        if all(kept.is_ours() for kept in self.kept):
            self.stop_at = os.fstat(self.log).st_size
            self.run()

    def retarget(self, target: int) -> None:
        """Go on to another target: the last one was the log of a run that has ended."""
        before = self.target
        self.target = target
        self.is_broken = False
        os.close(before)


def _write_patiently(descriptor: int, data: bytes) -> bool:
    """Write all of `data`, however slow the reader; return False if it is gone."""
    failures = 0
    while data and failures < 4:
        try:
            data = data[os.write(descriptor, data) :]
        except BlockingIOError:
            _is_ready(descriptor, _polls.POLLOUT, monotonic() + 1.0)
        except BrokenPipeError:
            return False
        except OSError as error:
            if _is_foreign(error):
                raise
            failures += 1
            time.sleep(0.05)
    return True


# === Provenance ===
# One collector finds out one key of metadata.json. It returns facts or raises _Unknown
# with the reason, changes nothing, imports nothing, and keeps its limits, for foreign
# programs may hang, flood, lie or be missing.


class _Unknown(Exception):
    """Something could not be found out; the text says why.

    `facts` is what is known all the same. `is_expected` means that nobody has to be
    told, as where there is no repository.
    """

    def __init__(
        self, reason: str, facts: JSON = None, is_expected: bool = False
    ) -> None:
        super().__init__(reason)
        self.facts = facts
        self.is_expected = is_expected


def _quick_metadata(site: _Site, document: Facts | None) -> Facts:
    """Return metadata.json with everything that takes no time; the rest is null."""
    metadata: Facts = {
        "run": basename(site.run_dir),
        "timestamp_utc": _utc(),
        "command": shlex.join(site.argv),
        "argv": site.argv,
        "working_dir": site.cwd,
        "hostname": _hostname(),
        "user": _user(),
        "script_name": site.name,
        "python": None,
        "platform": None,
        "git": {"commit_short": None, "directory": site.directory},
        "cuda": None,
        "pip_freeze": None,
        "packages": None,
        "local_packages": None,
        "environment": None,
        "container": None,
        "determinism": None,
        "config": document,
        "env": None,
        "inputs": [],
        "parent": None,
        "launcher": {},
        "resources": None,
        "outputs": None,
        "run_utils": {
            "version": __version__,
            "vendored": __vendored__,
            "schema_version": SCHEMA_VERSION,
        },
        "capture": {},
    }
    _collect(metadata, "python", lambda: _python(site))
    _collect(metadata, "platform", _platform)
    _collect(metadata, "cuda", _loaded_cuda)
    _collect(metadata, "determinism", _determinism)
    _collect(metadata, "launcher", lambda: _launcher(os.environ))
    return metadata


def _complete_metadata(metadata: Facts, site: _Site, record: _Record) -> None:
    """Find out what takes time, and put it and how that went into `metadata`."""
    packages = _Packages(site, record)
    code: dict[str, Callable[[], JSON]] = {
        **_git_collectors(site, record),
        "environment": lambda: _environment(site, metadata["git"].get("root")),
    }
    python: dict[str, Callable[[], JSON]] = {
        "python": lambda: _ask_python(site),
        "pip_freeze": packages.lines,
        "packages": lambda: packages.about or None,
        "env": lambda: dict(os.environ),  # of the recorder: it is that of its parent
        "container": _container,
    }
    threads = []
    for chain in (code, python, {"cuda": _cuda}):  # git takes longest
        try:
            if site.pid == os.getpid():
                raise RuntimeError("this is the process of the user")
            threads.append(_started_thread(_collect_chain, metadata, chain))
        except RuntimeError:  # or there is no room for one more thread
            _collect_chain(metadata, chain)
    for thread in threads:
        thread.join()


def _collect_chain(metadata: Facts, chain: Mapping[str, Callable[[], JSON]]) -> None:
    for name, ask in chain.items():
        _collect(metadata, name, ask)


def _collect(metadata: Facts, name: str, ask: Callable[[], JSON]) -> None:
    """Put what `ask` finds out at its place, and how that went in `capture`."""
    started = monotonic()
    facts = problem = None
    more = {}
    try:
        facts = ask()
    except _Unknown as reason:
        facts = reason.facts
        problem = str(reason)
        if reason.is_expected:
            more = {"is_expected": True}
    except Exception as error:  # a bug of ours costs one key, not the record
        is_main = threading.current_thread() is threading.main_thread()
        if is_main and _is_foreign(error):
            raise
        problem = f"{type(error).__name__}: {error}"
    seconds = round(monotonic() - started, 3)
    report = {"ok": problem is None, "seconds": seconds, "problem": problem, **more}
    with _collecting:
        _place(metadata, name, facts)
        metadata["capture"] = {**metadata["capture"], name: report}


_collecting = threading.Lock()  # held while a key of metadata.json changes


def _place(metadata: Facts, name: str, facts: JSON) -> None:
    """Put facts at their place, "git.patch" as `patch` in `git`; not None."""
    if facts is None:
        return
    name, _, inner = name.partition(".")
    if inner:
        facts = {inner: facts}
    known = metadata.get(name)
    if isinstance(known, dict) and isinstance(facts, dict):
        news = {k: v for k, v in facts.items() if v is not None or k not in known}
        facts = {**known, **news}
    metadata[name] = facts


class _Site:
    """What ran and where: all that a collector may need and JSON can carry."""

    argv: list[str]
    cwd: str | None  # None: the working directory was removed
    script: str | None = None  # absolute path of the file that ran
    name: str = ""  # what a run of it is called by default: "train" of train.py
    directory: str  # the folder whose repository is recorded
    head: str = ""  # what git answered to _HEAD_QUESTION there
    executable: str | None = None  # the Python of the experiment
    origin: str = "this process"  # where it was found; or "the command", or "PATH"
    prefix: str = ""  # of its environment; empty: it was not asked yet
    sys_path: list[str]  # where it looks for modules; the same
    entered: list[int] | None = None  # ns of our clock, a disk, ns of the disk's clock
    run_dir: str = ""
    results_root: str = ""
    loaded: list[str]  # source files of the program, for code that has no git
    pid: int

    def __init__(self, argv: list[str]) -> None:
        self.argv = argv
        self.cwd = _working_dir()
        self.sys_path = []
        self.loaded = []
        self.pid = os.getpid()
        self.reading = threading.RLock()
        self.packages: list[_Installed] | None = None

    @staticmethod
    def here(argv: list[str] | None = None) -> _Site:
        if not argv:
            site = _Site(_typed_argv())
            _describe_process(site)
        else:
            site = _Site(argv)
            _describe_command(site)
        site.directory = site.places()[0]
        return site

    def to_json(self) -> Facts:
        return {name: getattr(self, name) for name in _Site.__annotations__}

    @staticmethod
    def from_json(facts: Facts) -> _Site:
        site = _Site([])
        vars(site).update(facts)
        return site

    def places(self) -> list[str]:
        """Return the folders whose repository may have the code, the likeliest first.

        The program that runs decides: not what it was given to read, and not where
        pytest or Jupyter are installed. At the end stands the working directory.
        """
        scripts = []
        if self.script is not None:
            scripts = [realpath(self.script), self.script]
        folders = [dirname(path) for path in scripts if not _is_installed(path)]
        folders += [self.cwd or os.sep, os.sep]
        return list(dict.fromkeys(filter(isdir, folders)))

    def package_places(self) -> list[str]:
        """Return where packages may be: sys.path without the script's folder."""
        with self.reading:
            if not self.sys_path and self.executable is not None:
                _ask_python(self)
        places = list(self.sys_path)
        if self.origin == "this process" and places[:1] and places[0] in self.places():
            del places[0]
        return list(dict.fromkeys(places))

    def installed(self) -> list[_Installed]:
        with self.reading:
            if self.packages is None:
                self.packages = _installed(self.package_places())
            return self.packages


def _describe_process(site: _Site) -> None:
    here = site.cwd or os.sep
    file = getattr(sys.modules.get("__main__"), "__file__", None)
    # `python -m cProfile train.py` leaves train.py in argv.
    for word in [*getattr(sys, "argv", [])[:1], str(file or "-")]:
        path = join(here, word)
        if isfile(path) and (site.script is None or not _is_installed(path)):
            site.script = path
    site.name = _script_name()
    if _no_interpreter() is None:
        site.executable = join(here, sys.executable)
    site.sys_path = [normpath(join(here, place)) for place in sys.path]
    site.prefix = sys.prefix
    site.loaded = _loaded_sources(here)


def _script_name() -> str:
    """Return the stem of the script: "train" of train.py, "mod" of -m pkg.mod."""
    if "ipykernel" in sys.modules:
        return "notebook"
    words = getattr(sys, "argv", None) or [""]
    if basename(words[0]) in ("", "-", "-c"):
        return "interactive"
    return _stem(words[0])


def _stem(path: str) -> str:
    path = os.path.splitext(path)[0]
    if basename(path) == "__main__":
        path = dirname(path)
    return basename(path)


def _typed_argv() -> list[str]:
    """Return the command line as it was typed: interpreter, flags, `-m pkg.mod`."""
    typed = getattr(sys, "orig_argv", None) or ["python", *getattr(sys, "argv", [])]
    return [sys.executable or "python", *typed[1:]]


def _working_dir() -> str | None:
    with _ignoring(OSError):
        return os.getcwd()
    return None


def _loaded_sources(here: str) -> list[str]:
    """Return the loaded source files that are the program's own, not installed."""
    files = []
    for module in list(sys.modules.values()):
        with _ignoring(AttributeError):
            # A lazy module that is asked in the usual way begins to be imported.
            files.append(object.__getattribute__(module, "__dict__").get("__file__"))
    sources = [f for f in files if isinstance(f, str) and f.endswith(".py")]
    paths = [join(here, file) for file in sources]
    return [path for path in paths if not _is_installed(path)][:PATCH_FILES]


def _is_installed(path: str) -> bool:
    """Tell whether a file belongs to an environment or the system, not to a project."""
    is_package = re.search(r"[/\\](site|dist)-packages[/\\]", path)
    if is_package or path.startswith(_STANDARD_LIBRARY):
        return True
    folder = dirname(path)
    if basename(folder) not in ("bin", "sbin", "shims", "Scripts"):
        return False
    is_on_path = folder in os.environ.get("PATH", "").split(os.pathsep)
    return is_on_path or _is_prefix(dirname(folder))


_STANDARD_LIBRARY = dirname(os.__file__) + os.sep


def _is_prefix(folder: str) -> bool:
    """Tell whether a folder is an environment made by venv, uv or conda."""
    return exists(f"{folder}/pyvenv.cfg") or exists(f"{folder}/conda-meta")


def _describe_command(site: _Site) -> None:
    """Fill in what the words of a command say of the program that will run.

    Its Python is the one it names, else the one of its environment, else what
    `python` means on PATH: a shell script or make is likely to start that one.
    """
    here = site.cwd or os.sep
    words = _without_launcher(site.argv)
    program = _on_path(words[0], here) or join(here, words[0])
    site.script = program
    site.name = _stem(program)
    if re.match(_INTERPRETER, basename(program)):
        site.script, module = _operand(words, here)
        if module:
            site.name = module.replace(".__main__", "").rpartition(".")[2]
        elif site.script is not None:
            site.name = _stem(site.script)
    site.origin = "the command"
    first = _on_path(site.argv[0], here) or ""
    site.executable = _python_beside(first) or _python_beside(program)
    if site.executable is None:
        site.executable = _on_path("python", here) or _on_path("python3", here)
        site.origin = "PATH"


def _python_beside(program: str) -> str | None:
    """Return the Python of the environment that has a program such as pytest."""
    folder, name = os.path.split(program)
    if re.match(_PYTHON, name):
        return program
    if _is_prefix(dirname(folder)):
        return _on_path(join(folder, "python"))
    return None


_LAUNCHER = (
    "accelerate|deepspeed|env|mpiexec|mpirun|nice|nohup|srun|time|timeout|torchrun|uv"
)
_INTERPRETER = (
    "(python|pypy|bash|dash|fish|ksh|sh|zsh"
    "|Rscript|julia|lua|node|octave|perl|php|ruby)"
    r"[\d.]*t?(\.exe)?$"
)


def _without_launcher(words: list[str]) -> list[str]:
    """Return the words of a command from the program on that a launcher starts.

    `torchrun --nproc-per-node 2 train.py --lr 1` becomes `python train.py --lr 1`.
    """
    if re.fullmatch(_LAUNCHER, basename(words[0])):
        for number, word in enumerate(words):
            if word == "-m" or word.endswith(".py"):
                return ["python", *words[number:]]
            if re.match(_INTERPRETER, basename(word)):
                return words[number:]
    return words


def _operand(words: Sequence[str], here: str) -> tuple[str | None, str]:
    """Return the script that an interpreter is given, and the module of `-m`.

    `python -u -X dev train.py` has a script, `python -um pkg.mod` a module, and
    `bash -ec "..."` neither of them.
    """
    is_python = re.match(_PYTHON, basename(words[0]))
    code = "-[A-Za-z]*e$"
    if is_python or words[0].endswith("sh"):
        code = "-[A-Za-z]*c$"
    rest = iter(words[1:])
    for word in rest:
        if re.match(code, word):
            break
        if is_python and re.match("-[A-Za-z]*m$", word):
            module = next(rest, "")
            path = join(here, *module.split("."))
            files = (f"{path}.py", f"{path}/__main__.py")
            return next(filter(isfile, files), None), module
        if word in ("-W", "-X", "-o", "-O", "-r"):
            next(rest, "")
        elif not word.startswith(("-", "+")):
            return join(here, word), ""
    return None, ""


def _on_path(program: str, here: str = os.sep) -> str | None:
    """Return the absolute path of a program as a shell in `here` would find it."""
    folders = [""]
    if os.sep not in program:
        folders = os.environ.get("PATH", os.defpath).split(os.pathsep)
    for folder in folders:
        path = join(here, folder, program)
        if isfile(path) and os.access(path, os.X_OK):
            return path
    return None


# What takes no time.


def _hostname() -> str:
    if hasattr(os, "uname"):
        return str(os.uname().nodename)
    return os.environ.get("COMPUTERNAME", "")


def _user() -> str:
    """Return the name of the user, "uid:54321" where the system has none."""
    name = os.environ.get("LOGNAME") or os.environ.get("USER")
    if name:
        return name
    import getpass

    with _ignoring(ImportError, KeyError, OSError):
        return getpass.getuser()
    if hasattr(os, "getuid"):
        return f"uid:{os.getuid()}"
    return "unknown"


def _python(site: _Site) -> Facts:
    """Return which Python this is; that of a command is asked for later."""
    facts: Facts = {
        "version": None,
        "executable": site.executable or sys.executable,
        "origin": site.origin,
        "implementation": None,
        "prefix": None,
        "torch": _loaded("torch.__version__"),
        "numpy": _loaded("numpy.__version__"),
    }
    if site.origin == "this process":
        facts.update(version=sys.version, prefix=sys.prefix)
        facts["implementation"] = sys.implementation.name
    return facts


def _platform() -> Facts:
    facts: Facts = {
        "platform": sys.platform,
        "system": None,
        "machine": None,
        "release": None,
        "processor": _match_in_file("/proc/cpuinfo", r"^model name\s*: (.*)"),
        "cpu_count": os.cpu_count(),
        "usable_cpus": None,
        "memory_kib": _match_in_file("/proc/meminfo", r"^MemTotal:\s*(\d+)"),
    }
    if hasattr(os, "uname"):
        name = os.uname()
        facts["platform"] = f"{name.sysname}-{name.release}-{name.machine}"
        facts.update(system=name.sysname, release=name.release, machine=name.machine)
    if hasattr(os, "sched_getaffinity"):
        facts["usable_cpus"] = len(os.sched_getaffinity(0))
    if facts["memory_kib"] is None and hasattr(os, "sysconf"):
        with _ignoring(ValueError, OSError):  # macOS
            pages = os.sysconf("SC_PHYS_PAGES")
            facts["memory_kib"] = pages * os.sysconf("SC_PAGE_SIZE") // 1024
    return facts


def _match_in_file(path: str, pattern: str) -> str | int | None:
    """Return the first group of `pattern` in a small file; digits as a number.

    Only its beginning is read: /proc/cpuinfo of a large machine takes milliseconds.
    """
    data = b""
    with _ignoring(OSError), io.FileIO(path) as file:
        data = file.read(16_384) or b""
    found = re.search(pattern, data.decode("utf-8", "replace"), re.M)
    if found is None:
        return None
    if found[1].isdigit():
        return int(found[1])
    return found[1]


def _loaded_cuda() -> Facts:
    return {
        **dict.fromkeys(_CUDA_FACTS),
        "torch_cuda_version": _loaded("torch.version.cuda"),
        "visible_devices": os.environ.get("CUDA_VISIBLE_DEVICES"),
    }


def _determinism() -> Facts:
    return {
        "torch_seed": _loaded("torch.initial_seed"),
        "torch_deterministic": _loaded("torch.are_deterministic_algorithms_enabled"),
        "torch_cudnn_deterministic": _loaded("torch.backends.cudnn.deterministic"),
        "torch_cudnn_benchmark": _loaded("torch.backends.cudnn.benchmark"),
        "torch_float32_matmul_precision": _loaded("torch.get_float32_matmul_precision"),
        "hash_randomization": bool(sys.flags.hash_randomization),
        **{name: os.environ.get(name) for name in _SEEDING_VARIABLES},
    }


# The last is set by seed_everything() of Lightning.
_SEEDING_VARIABLES = ("PYTHONHASHSEED", "CUBLAS_WORKSPACE_CONFIG", "PL_GLOBAL_SEED")


def _late_determinism(before: Facts) -> Facts:
    """Return the seeds and flags that were set since `before`, for status.json."""
    if not before:
        return {}
    news = _changed(before, _determinism())
    return {name: value for name, value in news.items() if value is not None}


def _loaded(path: str) -> JSON:
    """Read `torch.backends.cudnn.benchmark` if it is loaded; call a function."""
    module, *names = path.split(".")
    value: Any = sys.modules.get(module)
    if type(value).__module__ == "importlib.util":  # it waits to be imported
        return None
    try:
        for name in names:
            if type(value) is type(sys):
                value = vars(value).get(name)
            else:  # torch.backends.cudnn puts an object in place of its module
                value = getattr(value, name, None)
        if callable(value):
            value = value()
    except Exception as error:  # a stub, another version, a broken install
        _raise_if_foreign(error)
        return None
    return _plain(value)


def _launcher(env: Mapping[str, str]) -> Facts:
    is_known = re.compile(_LAUNCHER_NAMES).match
    return {name: env[name] for name in sorted(env) if is_known(name)}


_LAUNCHER_NAMES = (
    "SLURM_|TORCHELASTIC_|OMPI_COMM_WORLD_|PMIX?_|PALS_|PBS_|LSB_|FLUX_|SGE_TASK_|POD_"
    "|JOB_COMPLETION_|(LOCAL_|GROUP_)?(RANK|WORLD_SIZE)$|MASTER_(ADDR|PORT)$|JOB_ID$"
    "|KUBERNETES_SERVICE_HOST$|NODE_NAME$|PYTHONHASHSEED$"
)


# The Python of the experiment and its packages.


def _ask_python(site: _Site) -> Facts | None:
    if site.origin == "this process":
        return None
    if site.executable is None:
        raise _Unknown("no Python was found on PATH")
    code = "import json, sys; print(json.dumps([sys.version, sys.prefix, sys.path]))"
    printed = _run([site.executable, "-c", code], env=_python_environment())
    try:
        version, site.prefix, places = json.loads(printed.splitlines()[-1])
    except (ValueError, IndexError):
        raise _Unknown("the command's Python does not say what it is") from None
    site.sys_path = [place for place in places if isabs(place)]
    return {"version": version, "prefix": site.prefix}


def _python_environment() -> dict[str, str]:
    env = {k: v for k, v in os.environ.items() if not k.startswith("PIP_")}
    env["PIP_CONFIG_FILE"] = os.devnull
    places = env.pop("PYTHONPATH", "").split(os.pathsep)
    kept = [p for p in places if isabs(p) and not exists(f"{p}/pip")]
    if kept:
        env["PYTHONPATH"] = os.pathsep.join(kept)
    return env


class _Packages:
    """The installed packages, taken from an earlier run where nothing has changed."""

    def __init__(self, site: _Site, record: _Record) -> None:
        self.site = site
        self.record = record
        self.state: str | None = None  # tells whether the list can be used again
        self.about: Facts = {}

    def lines(self) -> list[str]:
        """Return the requirement lines that `pip freeze` prints."""
        self.state = _packages_state(self.site)
        earlier = self.earlier_lines()
        if earlier is not None:
            return earlier
        self.about = {"source": "pip freeze", "taken_from": None, "state": self.state}
        python = self.site.executable
        problems = []
        if python is None:
            problems.append(_no_interpreter() or "no Python was found on PATH")
        elif any(isdir(f"{place}/pip") for place in self.site.package_places()):
            try:
                return _pip_freeze(python)
            except _ProgramFailed as reason:
                problems.append(str(reason))
        self.about["source"] = "installed metadata"
        lines = _requirements(self.site.installed(), problems)
        if problems:
            raise _Unknown("; ".join(problems), lines or None)
        return lines

    def earlier_lines(self) -> list[str] | None:
        if self.state is None:
            return None
        for earlier in self.record.earlier_metadata():
            about = _mapping(earlier, "packages")
            is_whole = isinstance(earlier.get("pip_freeze"), list)
            is_ok = _at(earlier, "capture", "pip_freeze", "ok") is True
            if is_whole and is_ok and about.get("state") == self.state:
                taken_from = about["taken_from"] or earlier["run"]
                self.about = {**about, "taken_from": taken_from}
                return _texts(earlier, "pip_freeze")
        return None


def _pip_freeze(executable: str) -> list[str]:
    pip = [*_safe_python(executable), "-m", "pip", "--disable-pip-version-check"]
    printed = _run([*pip, "freeze"], env=_python_environment(), timeout=PIP_SECONDS)
    return [line.strip() for line in _lines_of(printed) if line.strip()]


class _Installed:
    """The metadata of a package in a folder of sys.path, a link to one, or a .pth."""

    folder: str | None = None  # of the sources that it was installed from
    is_editable = False
    problem: str | None = None

    def __init__(self, place: str, name: str) -> None:
        self.path = join(place, name)
        self.direct: Facts = {}  # direct_url.json of PEP 610
        # Only where an installer writes is it believed where a package comes from.
        if basename(place) in ("site-packages", "dist-packages"):
            self.read_origin()

    def read_origin(self) -> None:
        if self.path.endswith(".egg-link"):  # setup.py develop: its first line says it
            self.folder = _head_of_file(self.path).partition("\n")[0].strip()
            self.is_editable = True
        file = join(self.path, "direct_url.json")
        if not exists(file):
            return
        # {"url": "file:///home/me/a", "dir_info": {"editable": true}}
        try:
            direct = json.loads(_head_of_file(file))
            url = str(direct["url"])
        except (ValueError, LookupError, TypeError):
            self.problem = f"{file} cannot be read"
            return
        self.direct = direct
        if isinstance(direct.get("dir_info"), dict):
            from urllib.parse import unquote, urlsplit

            self.folder = unquote(urlsplit(url).path)
            self.is_editable = bool(_at(direct, "dir_info", "editable"))

    def stamp(self) -> list[object]:
        """Return name and times, which tell a package from another of its version."""
        files = ("", "/METADATA", "/direct_url.json")
        return [self.path, *(_stamp(self.path + file) for file in files)]

    def names(self) -> tuple[str, str]:
        for file in ("", "/METADATA", "/PKG-INFO", "/EGG-INFO/PKG-INFO"):
            head = _head_of_file(self.path + file).partition("\n\n")[0]
            name = re.search(r"^Name: *(\S+)", head, re.M)
            version = re.search(r"^Version: *(\S+)", head, re.M)
            if name is not None and version is not None:
                return name[1], version[1]
        return "", ""


def _installed(places: Iterable[str]) -> list[_Installed]:
    kinds = (".dist-info", ".egg-info", ".egg-link", ".egg", ".pth")
    found = []
    for place in places:
        names: list[str] = []
        with _ignoring(OSError):  # a zip file, or a folder that does not exist
            names = sorted(os.listdir(place))
        found += [_Installed(place, name) for name in names if name.endswith(kinds)]
    return found


def _head_of_file(path: str, size: int = 65_536) -> str:
    """Return the beginning of a text file, nothing if it cannot be read."""
    with _ignoring(OSError), _opened(path, MAX_READ, follow=True) as file:
        return (file.read(size) or b"").decode("utf-8", "replace")
    return ""


def _stamp(path: str) -> list[int] | None:
    with _ignoring(OSError):
        info = os.stat(path)
        return [info.st_mtime_ns, info.st_ctime_ns, info.st_size]
    return None


def _packages_state(site: _Site) -> str | None:
    """Return a digest of all that `pip freeze` depends on, if that is known."""
    places = site.package_places()
    if site.executable is None or not places:
        return None
    state: list[object] = [site.executable, _stamp(site.executable), places]
    for package in site.installed():
        state.append(package.stamp())
        if package.is_editable and package.folder is not None:
            checkout = _checkout(package.folder)
            if checkout is None:
                return None
            state.append(checkout)
    return _hash_of(json.dumps(state).encode("ascii"))


def _checkout(folder: str) -> list[object] | None:
    """Return what tells one checkout of a package from another, None if nothing can."""
    try:
        answer = _git_run(folder, "rev-parse", "HEAD", "--git-common-dir")
    except _Unknown as reason:
        if "not a git repository" in str(reason):
            return []
        return None
    commit, _, common = os.fsdecode(answer).rstrip("\n").partition("\n")
    return [commit, _stamp(join(folder, common, "config"))]


def _requirements(installed: Iterable[_Installed], problems: list[str]) -> list[str]:
    found: dict[str, str] = {}
    for package in installed:
        name, version = package.names()
        key = re.sub("[-_.]+", "-", name).lower()
        if not name or key in found:  # the first on sys.path is what is imported
            continue
        problems += filter(None, [package.problem])
        url = package.direct.get("url")
        source = package.direct.get("vcs_info")
        if isinstance(source, dict):
            url = f"{source.get('vcs')}+{url}@{source.get('commit_id')}"
        found[key] = f"{name}=={version}"
        if package.is_editable:
            found[key] = f"-e {package.folder}"
        elif url is not None:
            found[key] = f"{name} @ {url}"
    return [found[key] for key in sorted(found)]


def _local_sources(site: _Site) -> dict[str, tuple[str, bool]]:
    sources: dict[str, tuple[str, bool]] = {}
    for package in site.installed():
        if package.folder is not None:
            name = package.names()[0] or _stem(package.path)
            sources.setdefault(name, (package.folder, package.is_editable))
    return sources


# The machine.

_CUDA_FACTS = (
    "available", "version", "device_count", "driver_version", "devices", "mig_devices",
)
_GPU_FACTS = (
    "index", "name", "memory.total", "uuid", "driver_version", "mig.mode.current",
)
NVIDIA_DRIVER = "/proc/driver/nvidia/version"


def _cuda() -> Facts:
    """Return what the NVIDIA driver says; no CUDA context is ever made."""
    facts: Facts = {**dict.fromkeys(_CUDA_FACTS), "available": False}
    if _on_path("nvidia-smi") is None and not exists(NVIDIA_DRIVER):
        return facts  # no program and no driver: no GPU
    # NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 ...
    driver = _match_in_file(NVIDIA_DRIVER, r"Kernel Module +([\d.]+)")
    facts.update(available=None, driver_version=driver)
    try:
        # 0, NVIDIA H100 80GB HBM3, 81559, GPU-8a1b2c3d-..., 550.54.15, Disabled
        table = _nvidia_smi(_GPU_FACTS)
        header = _run(["nvidia-smi"]).decode("utf-8", "replace")
    except _Unknown as reason:
        raise _Unknown(str(reason), facts) from None
    devices: list[Facts] = [dict(zip(_GPU_FACTS, row)) for row in table]
    facts.update(available=bool(devices), device_count=len(devices), devices=devices)
    facts["mig_devices"] = []
    for device in devices:
        facts["driver_version"] = device["driver_version"]
        if str(device["memory.total"]).isdigit():
            device["memory.total"] = int(device["memory.total"])  # in MiB
    # | NVIDIA-SMI 550.54.15    Driver Version: 550.54.15    CUDA Version: 12.4     |
    version = re.search(r"CUDA (?:UMD )?Version: *([\d.]+)", header)
    if version is not None:
        facts["version"] = version[1]
    if any(device["mig.mode.current"] == "Enabled" for device in devices):
        # GPU 0: NVIDIA H100 (UUID: GPU-8a1b...)\n  MIG 1g.10gb Device 0: (UUID: ...)
        listed = _run(["nvidia-smi", "-L"]).decode("utf-8", "replace")
        facts["mig_devices"] = re.findall(r"^ +(MIG .*)", listed, re.M)
    return facts


def _nvidia_smi(
    columns: Sequence[str], seconds: float | None = None
) -> list[list[str | None]]:
    """Return a table of nvidia-smi, a row for each GPU; None for "[N/A]"."""
    query = ["--query-gpu=" + ",".join(columns), "--format=csv,noheader,nounits"]
    try:
        printed = _run(["nvidia-smi", *query], timeout=seconds)
    except _ProgramFailed as problem:
        printed = problem.output
        if b"No devices" not in printed:
            raise
    lines = [re.sub(r"\[.*?\]", "", line) for line in _lines_of(printed)]
    table = [[value.strip() or None for value in line.split(",")] for line in lines]
    rows = [row for row in table if len(row) == len(columns)]
    if not rows and b"No devices" not in printed:
        raise _Unknown("nvidia-smi gave no table")
    return rows


def _environment(site: _Site, root: str | None) -> Facts:
    settings = join(site.prefix, "pyvenv.cfg")
    # home = /usr/bin\nuv = 0.4.18\nversion_info = 3.12.1
    uv = _match_in_file(settings, r"^uv *= *(.+)$")
    conda: list[str] = []
    with _ignoring(OSError):
        conda = sorted(os.listdir(join(site.prefix, "conda-meta")))
    history = _head_of_file(f"{site.prefix}/conda-meta/history", MAX_RECORD)
    # +conda-forge/linux-64::numpy-1.26.4-py311h64a7726_0
    channels = re.findall(r"(?m)^\+(\S+)/[^/:\s]+::", history)
    folder = root or site.directory
    locks = {name: _sha256(join(folder, name)) for name in LOCK_FILES}
    managers = {"uv": uv, "conda": conda, "venv": exists(settings)}
    return {
        "manager": _first_true(managers),
        "prefix": site.prefix or None,
        "uv_version": uv,
        "conda_environment": os.environ.get("CONDA_DEFAULT_ENV"),
        # name-version-build
        "conda_packages": [name[:-5] for name in conda if name.endswith(".json")],
        "conda_channels": list(dict.fromkeys(channels)),
        "lock_files": {name: digest for name, digest in locks.items() if digest},
    }


def _first_true(answers: Mapping[str, object]) -> str | None:
    return next(filter(answers.__getitem__, answers), None)


def _container() -> Facts:
    env = os.environ
    apptainer = env.get("APPTAINER_CONTAINER") or env.get("SINGULARITY_CONTAINER")
    kinds = {
        "apptainer": apptainer,
        "podman": exists("/run/.containerenv"),
        "kubernetes": env.get("KUBERNETES_SERVICE_HOST"),
        "docker": exists("/.dockerenv"),
    }
    # image="docker.io/library/python:3.11"
    image = _match_in_file("/run/.containerenv", r'^image="(.*)"') or apptainer
    # Where it is told to those inside: SLURM's pyxis, GitLab, hubs of notebooks.
    for name in ("SLURM_CONTAINER_IMAGE", "CONTAINER_IMAGE", "CI_JOB_IMAGE",
                 "JUPYTER_IMAGE", "DOCKER_IMAGE", "IMAGE_NAME"):
        image = image or env.get(name)
    cpus = None
    # 150000 100000   (microseconds that may be used in each period of so many)
    quota, _, period = str(_cgroup_limit("cpu.max")).partition(" ")
    if quota.isdigit() and period.isdigit():
        cpus = int(quota) / int(period)
    return {
        "kind": _first_true(kinds),
        "image": image,
        "cpu_limit": cpus,
        "memory_limit_bytes": _cgroup_limit("memory.max"),
    }


def _cgroup_limit(name: str) -> str | int | None:
    """Return the nearest limit of that name, of cgroup v2, that is set for us."""
    folder = _cgroup()
    while folder.startswith(_CGROUPS):
        limit = _match_in_file(f"{folder}/{name}", r"^(\d.*)$")
        if limit is not None:
            return limit
        folder = dirname(folder)
    return None


_CGROUPS = "/sys/fs/cgroup"


def _cgroup() -> str:
    """Return the folder of our control group, of version 2.

    0::/system.slice/slurmstepd.scope/job_7/step_0
    """
    inner = _match_in_file("/proc/self/cgroup", r"^0::(/.*)$") or ""
    return f"{_CGROUPS}{inner}".rstrip("/")


def _in_cgroup(name: str, old_name: str, pattern: str) -> str | int | None:
    """Return what a file about the memory of our control group says.

    4:memory:/slurm/job_7      (version 1)
    """
    found = _match_in_file(f"{_cgroup()}/{name}", pattern)
    if found is None:
        group = _match_in_file("/proc/self/cgroup", r"^\d+:memory:(/.*)$")
        found = _match_in_file(f"{_CGROUPS}/memory{group or '-'}/{old_name}", pattern)
    return found


# === Resources ===
# What a run takes is measured by its recorder, from outside: processor time by
# differences, memory by samples, GPUs by nvidia-smi. What is slow is asked less often.


class _Sampler:
    """What a process takes with its descendants, also those that init has adopted."""

    is_cheap = True  # to count memory by pages
    problem: str | None = None
    last: tuple[float, float] | None = None  # when, and processor time until
    samples = 0
    cpu_seconds = 0.0
    cpu_peak: float | None = None  # percent of one core

    def __init__(self, pid: int, record: _Record) -> None:
        self.pid = pid
        self.record = record
        self.known: dict[int, str] = {}  # when each process started, by its pid
        self.gpus = _GpuMeter()
        self.begun = monotonic()
        self.memory = _Values()
        self.sources: list[str] = []
        self._take()

    def tick(self) -> float:
        """Append a sample to metrics/system.jsonl; return how long to wait."""
        started = monotonic()
        row = self._take()
        cost = monotonic() - started
        if row is not None:
            row.update(self.gpus.measure())
            self.record.append("metrics/system.jsonl", row)
        return max(HEARTBEAT_SECONDS, cost / SAMPLE_SHARE)

    def summary(self) -> Facts:
        """Return peaks and means with their sources, for metadata.json."""
        self._take()
        peak = _in_cgroup("memory.peak", "memory.max_usage_in_bytes", r"^(\d+)$")
        seconds = mean = source = None
        if self.samples and self.last is not None:
            seconds = round(self.cpu_seconds, 2)
            mean = round(100 * self.cpu_seconds / (self.last[0] - self.begun), 1)
            source = "/proc, with ended children"
        return {
            "samples": self.samples,
            "cpu_seconds": seconds,
            "cpu_percent_mean": mean,
            "cpu_percent_peak": self.cpu_peak,
            "cpu_source": source,
            "memory_bytes_mean": self.memory.mean(),
            "memory_bytes_peak": self.memory.peak,
            "memory_source": " or ".join(self.sources) or None,
            "cgroup_memory_bytes_peak": peak,
            "gpus": self.gpus.summary(),
            "gpu_source": self.gpus.source,
            "problem": self.problem or self.gpus.problem,
        }

    def _take(self) -> Facts | None:
        """Take a sample; return its row, unless it is the first or all have ended."""
        if not isdir("/proc/self/task") or not hasattr(os, "sysconf"):
            self.problem = "there is no /proc, which tells what processes take"
            return None
        found = self._processes()
        if not found:
            return None
        ticks = 0
        for fields in found.values():
            # utime, stime, cutime and cstime of proc_pid_stat(5)
            ticks += sum(map(int, fields[11:15]))
        before = self.last
        now = self.last = (monotonic(), ticks / os.sysconf("SC_CLK_TCK"))
        if before is None:
            return None
        self.samples += 1
        # Where nobody waited for a child, its time vanishes with it.
        seconds = max(0.0, now[1] - before[1])
        percent = round(100 * seconds / (now[0] - before[0]), 1)
        self.cpu_seconds += seconds
        self.cpu_peak = max(percent, self.cpu_peak or 0.0)
        row: Facts = {"time": round(time.time(), 3), "processes": len(found)}
        row["cpu_percent"] = percent
        memory, source = self._memory(found)
        if memory:  # processes that are just ending have none
            row.update(memory_bytes=memory, memory_source=source)
            self.memory.add(memory)
            if source not in self.sources:
                self.sources.append(source)
        return row

    def _processes(self) -> dict[int, list[str]]:
        """Return the fields of /proc/<pid>/stat of each process of the run."""
        found: dict[int, list[str]] = {}
        waiting = [self.pid, *self.known]
        while waiting:
            pid = waiting.pop()
            fields = _process_stat(pid)
            # What the recorder starts is its own affair.
            if fields is None or pid in found or pid == os.getpid():
                continue
            if self.known.get(pid, fields[19]) != fields[19]:
                continue  # another process has the number of one that ended
            found[pid] = fields
            waiting += _children(pid)
        self.known = {pid: fields[19] for pid, fields in found.items()}
        return found

    def _memory(self, pids: Iterable[int]) -> tuple[int, str]:
        """Return the memory of processes, and whether each shared page counts once."""
        started = monotonic()
        page = _posix.sysconf("SC_PAGE_SIZE")
        resident = 0
        private = 0
        for pid in pids:
            with _ignoring(OSError):
                pages = _read_proc(f"/proc/{pid}/statm").split()
                resident += int(pages[1]) * page
                private += (int(pages[1]) - int(pages[2])) * page
        if self.is_cheap and resident < PROPORTIONAL_BYTES:
            total = 0
            for pid in pids:
                rollup = f"/proc/{pid}/smaps_rollup"
                total += 1024 * int(_match_in_file(rollup, r"^Pss: *(\d+) kB") or 0)
            self.is_cheap = monotonic() - started < PROPORTIONAL_SECONDS
            if total:
                return total, "proportional"
        return private, "resident minus shared"


def _children(pid: int) -> list[int]:
    """Return the children of a process, where Linux tells them."""
    found: list[int] = []
    with _ignoring(OSError):
        for thread in os.listdir(f"/proc/{pid}/task"):
            children = _read_proc(f"/proc/{pid}/task/{thread}/children")
            found += map(int, children.split())
    return found


class _Values:
    """Peak and mean of what is measured again and again."""

    peak: int | None = None
    total = 0
    count = 0

    def add(self, value: int) -> None:
        self.peak = max(value, self.peak or 0)
        self.total += value
        self.count += 1

    def mean(self) -> int | None:
        if not self.count:
            return None
        return self.total // self.count


class _GpuMeter:
    """Utilisation and memory of each GPU."""

    source: str | None = None
    problem: str | None = None
    due = 0.0

    def __init__(self) -> None:
        self.values: dict[str, dict[str, _Values]] = {}  # by index and name
        if _on_path("nvidia-smi") is not None:
            self.source = "nvidia-smi"

    def measure(self) -> Facts:
        """Ask nvidia-smi; the slower it is the less often, and never after a failure.

        0, 93, 40536                  (index, percent, MiB)
        """
        started = monotonic()
        if self.source is None or self.problem is not None or started < self.due:
            return {}
        columns = ["index", "utilization.gpu", "memory.used"]
        try:
            table = _nvidia_smi(columns, GPU_SECONDS)
        except _Unknown as reason:
            self.problem = str(reason)
            return {}
        self.due = started + (monotonic() - started) / SAMPLE_SHARE
        row: Facts = {}
        for index, *values in table:
            device = self.values.setdefault(str(index), {})
            for name, value in zip(("utilization_percent", "memory_mib"), values):
                if value is not None and value.isdigit():
                    row[f"gpu{index}_{name}"] = int(value)
                    device.setdefault(name, _Values()).add(int(value))
        return row

    def summary(self) -> list[Facts]:
        result = []
        for index, device in sorted(self.values.items()):
            facts: Facts = {"index": index}
            for name, values in device.items():
                facts[f"{name}_mean"] = values.mean()
                facts[f"{name}_peak"] = values.peak
            result.append(facts)
        return result


# === Git ===
# A repository is read, never touched: no program that it names is started, and nothing
# in it changes. git.patch leads from the base, a commit that a remote has, to the files
# as they were when the run began.

SOURCE_FILES = (  # names of files that come first where there is no git
    r"(?i)\.(py\w?|ipynb|sh|r|jl|m|lua|c|cc|cpp|cuh?|h|hpp|rs|js|ts|toml|ya?ml|cfg"
    r"|ini)$|file$"
)

if TYPE_CHECKING:
    _Blob = tuple[bytes, bytes]  # mode and id of a file in git; both empty: none

_NO_BLOB = (b"", b"")
_GIT_FACTS = (
    "commit_short", "commit_full", "branch", "is_dirty", "remote_origin_url", "base",
    "root", "is_shallow", "unpushed", "unpushed_commits", "untracked",
    "untracked_count", "changed", "changed_after_entry", "submodules",
)


def _asked_for_head(
    directory: str, variables: Mapping[str, str] | None = None
) -> _Program | None:
    """Begin to ask git for the commit in a folder, which names a run."""
    options: Any = {"variables": variables}
    with _ignoring(_Unknown):
        if _has_repository(directory):
            return _git_started(directory, *_HEAD_QUESTION, **options)
    return None


def _told_head(git: _Program | None) -> str:
    with _ignoring(_Unknown):
        if git is not None:
            printed = os.fsdecode(git.result(HEAD_SECONDS))
            if _commit_in(printed) is not None:
                return printed
    return ""


# true\nfalse\n/home/ann/tree\n<id of HEAD>\n<its short form>\n
_HEAD_QUESTION = (
    "rev-parse", "--is-inside-work-tree", "--is-shallow-repository",
    "--show-toplevel", "HEAD", "--short", "HEAD",
)


def _commit_in(answer: str) -> str | None:
    for commit in re.findall(r"\n([0-9a-f]{4,64})\n\Z", answer):
        return str(commit)
    return None


def _git_head(directory: str) -> str | None:
    return _commit_in(_told_head(_asked_for_head(directory)))


def _git_collectors(site: _Site, record: _Record) -> dict[str, Callable[[], JSON]]:
    tree = _Repository.of(site)
    return {
        "git": tree.facts,
        "git.patch": lambda: _git_patch(record, tree),
        "local_packages": lambda: _local_packages(site, record, tree),
    }


def _git_patch(record: _Record, tree: _Repository) -> Facts:
    """Write git.patch, the way from the base to the files as they were at entry.

    ``git apply --whitespace=nowarn git.patch`` in a clone of the base, or in an empty
    folder where there is none, gives the same files. Secrets in them are redacted. Not
    in it are changes after entry, files that hold secrets by nature, and what passes a
    limit: these are listed. Nothing is written when nothing differs.
    """
    patch = _Patch(next(record.earlier_runs(), None))
    try:
        tree.open()
        base = tree.base
        if base is not None and base["url"] is None:
            only = f"no remote is known to have commit {base['commit'][:12]}"
            patch.problems.append(f"{only}, only {tree.root!r}: push it to keep it")
    except _Unknown as reason:
        if not reason.is_expected:
            tree.is_deep = False
            only = "only the script and what it had loaded is kept"
            patch.problems.append(f"{reason}; {only}")
    patch.add(tree)
    facts = patch.keep(record, "git.patch", tree.root)
    if patch.problems:
        raise _Unknown("; ".join(patch.problems), facts)
    return facts


def _local_packages(site: _Site, record: _Record, tree: _Repository) -> list[Facts]:
    """Return the repository of each package that was installed from a local folder.

    What a clone lacks of its code becomes git.<package>.patch; not so for a package
    that lies in the repository of the experiment itself.
    """
    seen = {tree.root}
    problems = []
    packages = []
    deadline = monotonic() + PATCH_SECONDS
    for name, (folder, is_editable) in sorted(_local_sources(site).items()):
        if monotonic() > deadline:
            problems.append(f"no time left for {name} and those after it")
            break
        package = {"name": name, "path": folder, "editable": is_editable}
        package.update(_package(name, _Repository.of(site, folder), record, seen))
        packages.append(package)
        if package["problem"] is not None:
            problems.append(f"{name}: {package['problem']}")
    if problems:
        raise _Unknown("; ".join(problems), packages)
    return packages


def _package(name: str, tree: _Repository, record: _Record, seen: set[str]) -> Facts:
    facts = tree.known_facts()
    if tree.root not in seen:
        seen.add(tree.root)
        patch = _Patch()
        patch.add(tree)
        facts["patch"] = patch.keep(record, f"git.{_safe_name(name)}.patch", tree.root)
        facts["problem"] = facts["problem"] or "; ".join(patch.problems) or None
    return facts


class _Change:
    """A file that is not as a commit has it, as the disk has it now."""

    old_size = 0
    old_data: bytes | None = None  # None: not to be had, or not to be shown
    mode = b""  # as git writes it; empty where there is no file
    size = 0
    data = b""
    finds: list[_Find] | None = None  # where its secrets stand, once known
    part = b""  # what an earlier patch says of it and its old content
    is_late = False  # it was written after entry

    def __init__(
        self, tree: _Repository, name: bytes, old: _Blob, is_tracked: bool = True
    ) -> None:
        self.name = name
        self.title = tree.prefix + name  # its path from the outermost root
        self.path = join(os.fsencode(tree.root), name)
        self.hash_name = tree.hash_name
        self.old = old  # as the commit has it from which the patch starts
        self.committed = old  # as HEAD has it
        self.is_tracked = is_tracked
        self.rank = int(not is_tracked)  # low ones come first into a patch
        self.look(tree)

    def look(self, tree: _Repository) -> None:
        """Fill in what the disk says; what lies behind a link is not there."""
        if not tree.is_real(dirname(self.path)):
            return
        with _ignoring(OSError):
            info = os.lstat(self.path)
            if tree.entered is not None:
                self.is_late = info.st_ctime_ns > tree.entered
            if stat.S_ISDIR(info.st_mode):
                return
            self.size = info.st_size
            if stat.S_ISLNK(info.st_mode):
                self.mode = b"120000"
            elif not stat.S_ISREG(info.st_mode):
                self.mode = b"other"
            elif not tree.keeps_modes and self.committed[0].startswith(b"100"):
                self.mode = self.committed[0]
            elif info.st_mode & 0o100:
                self.mode = b"100755"
            else:
                self.mode = b"100644"

    def read(self) -> None:
        if self.mode == b"120000":
            self.data = os.readlink(self.path)
        elif self.mode:
            with open(_open(os.fsdecode(self.path), os.O_RDONLY), "rb") as file:
                self.data = file.read(PATCH_FILE_BYTES + 1)

    def blob(self) -> _Blob:
        """Return what git calls the file with the content that was read."""
        if not self.mode:
            return _NO_BLOB
        return self.mode, self.object_id(self.data)

    def object_id(self, data: bytes) -> bytes:
        digest = _digest(self.hash_name, b"blob %d\0" % len(data))
        digest.update(data)
        return str(digest.hexdigest()).encode()


def _no_repository() -> _Unknown:
    return _Unknown("the code is in no git repository", is_expected=True)


class _Repository:
    """A folder with code: a git work tree, or what is taken for code without git.

    Not counted are the folders `excluded`, other runs, files that a filter encrypts,
    and what was written after `entered`, in ns since 1970. All repositories that lie
    inside share the deadline of the outermost.
    """

    entered: int | None = None
    is_deep = True  # without git, the sources below the folder count as well
    is_git = False
    hung: _Unknown | None = None
    answer = ""  # to _HEAD_QUESTION, if that has been asked on entry
    head = ""
    short = ""
    is_shallow = False
    hash_name = "sha1"
    keeps_modes = True
    # Of a repository inside another:
    prefix = b""  # where it lies below the outermost, with a slash
    recorded: str | None = None  # its commit in the index of the outer one
    wanted: str | None = None  # the same in the base of the outer one

    def __init__(self, directory: str, excluded: Sequence[str]) -> None:
        self.directory = directory
        self.root = realpath(directory)
        self.excluded = excluded
        self.sources: list[str] = []  # files that were loaded, for code without git
        self.deadline = monotonic() + PATCH_SECONDS
        self.config: dict[str, str] = {}
        self.filters: list[str] = []  # filter.lfs
        self.switches: list[str] = []  # that turn them off
        self.folders: dict[bytes, bool] = {}  # whether they are reached without a link

    @staticmethod
    def of(site: _Site, folder: str | None = None) -> _Repository:
        tree = _Repository(folder or site.directory, [site.results_root, site.run_dir])
        if folder is None:
            sources = [site.script or "", *site.loaded]
            tree.sources = [path for path in sources if _is_own_source(path, site)]
            tree.answer = site.head
        if site.entered is not None:
            ours, device, clock_of_disk = site.entered
            tree.entered = ours
            with _ignoring(OSError):
                if os.stat(tree.directory).st_dev == device:
                    tree.entered = clock_of_disk
        return tree

    def facts(self) -> Facts:
        facts: Facts = dict.fromkeys(_GIT_FACTS)
        try:
            self._describe(facts)
        except _Unknown as reason:
            reason.facts = facts
            raise
        return facts

    def known_facts(self) -> Facts:
        problem = None
        try:
            facts = self.facts()
        except _Unknown as reason:
            facts = reason.facts
            if not reason.is_expected:
                problem = str(reason)
        return {**facts, "problem": problem}

    def _describe(self, facts: Facts) -> None:
        """Fill in the facts, the quickest to find out first."""
        self.open()
        facts.update(root=self.root, is_shallow=self.is_shallow)
        facts.update(commit_full=self.head or None, commit_short=self.short or None)
        facts["remote_origin_url"] = self.config.get("remote.origin.url")
        facts["branch"] = self.status.branch
        changed, untracked, late = [], [], []
        for name, change in self.changes.items():
            if change.is_late:
                late.append(_shown(name))
            elif change.is_tracked:
                changed.append(_shown(name))
            else:
                untracked.append(_shown(name))
        untracked += map(_shown, self.status.repositories)
        facts["changed"] = changed[:MAX_LISTED]
        facts["untracked"] = untracked[:MAX_LISTED]
        facts["untracked_count"] = len(untracked)
        facts["changed_after_entry"] = late[:MAX_LISTED]
        inner = []
        for tree in self.inner:
            known = tree.known_facts()
            if known["is_dirty"] is False and tree.recorded is not None:
                known["is_dirty"] = tree.head != tree.recorded
            path = _shown(tree.prefix[:-1])
            inner.append({"path": path, "recorded": tree.recorded, **known})
        facts["submodules"] = inner
        has_moved = self.status.has_moved or any(each["is_dirty"] for each in inner)
        facts["is_dirty"] = bool(changed or untracked or has_moved)
        if self.head:
            unpushed, _ = self.history
            facts["unpushed"] = len(unpushed)
            facts["unpushed_commits"] = unpushed[:MAX_LISTED]
        facts["base"] = self.base

    def git(self, *words: str, **how: Any) -> bytes:
        if self.hung is not None:
            raise self.hung
        try:
            return _git_run(self.root, *self.switches, *words, **how)
        except _ProgramFailed as failure:
            if "did not end" in str(failure):
                self.hung = failure  # it is not waited for again
            raise

    def open(self) -> None:
        """Find the work tree and read its settings; raise _Unknown."""
        if self.is_git:
            return
        if not _has_repository(self.directory):
            raise _no_repository()
        answer = self.answer or self._ask_for_head()
        if answer.startswith("false"):  # core.worktree
            raise _Unknown(f"the .git above {self.directory!r} names another work tree")
        found = re.fullmatch(r"true\n(\w+)\n(.+)\n(\w*)\n(\w*)\n", answer, re.S)
        if found is None or not isabs(found[2]):
            raise _Unknown("git did not answer what it was asked")
        self.read_config()
        _check_git_dir(self, found[2])
        self.is_shallow = found[1] == "true"
        self.root, self.head, self.short = found.groups()[1:]
        is_mac = lexists(join(self.root, ".GIT"))  # or the setting was copied from one
        if self.config.get("core.ignorecase") == "true" and not is_mac:
            self.switches += ["-c", "core.ignoreCase=false"]
        self.is_git = True

    def _ask_for_head(self) -> str:
        try:
            return os.fsdecode(self.git(*_HEAD_QUESTION))
        except _ProgramFailed as failure:
            if b"unknown revision" not in failure.errors:
                raise _explained(failure, self.directory) from None
            return os.fsdecode(failure.output[: -len("HEAD\n")]) + "\n\n"  # no commit

    def read_config(self) -> None:
        # remote.origin.url\nhttps://example.org/x.git\0filter.lfs.clean\ngit-lfs\0
        for item in os.fsdecode(self.git("config", "--list", "-z")).split("\0"):
            name, _, value = item.partition("\n")
            if not (name.endswith(".url") and name in self.config):  # the first counts
                self.config[name] = value
        self.hash_name = self.config.get("extensions.objectformat", "sha1")
        self.keeps_modes = self.config.get("core.filemode") != "false"
        keys = [key for key in self.config if key.startswith("filter.")]
        self.filters = sorted({key.rpartition(".")[0] for key in keys})
        for name in self.filters:
            if "=" in name:
                raise _Unknown("a git filter has a name that cannot be switched off")
            for setting in ("clean=", "smudge=", "process=", "required=false"):
                self.switches += ["-c", f"{name}.{setting}"]

    @cached_property
    def _pathspec(self) -> list[str]:
        pathspec = ["--", ":/"]
        root = realpath(self.root)
        for folder in self.excluded:
            inside = relpath(realpath(folder), root)
            if inside.split(os.sep)[0] not in (os.curdir, os.pardir):
                pathspec.append(f":(exclude,top,literal){inside}")
        for name in self.filters:
            match = re.match(r"filter\.([a-z-]*(crypt|sops|vault)[a-z-]*)$", name)
            if match:
                pathspec.append(f":(exclude,top,attr:filter={match[1]})")
        return pathspec

    @cached_property
    def status(self) -> _Status:
        words = ("status", "--porcelain=v2", "--branch", "-z", "--untracked-files=all")
        options = ("--no-renames", "--ignore-submodules=dirty")
        return _Status(self.git(*words, *options, *self._pathspec))

    @cached_property
    def listed(self) -> _Listed:
        words = ("ls-files", "-v", "-s", "-z", *self._pathspec)
        return _Listed(self.git(*words, limit=5 * PROGRAM_BYTES))

    @cached_property
    def changes(self) -> dict[bytes, _Change]:
        """The files that are not as HEAD has them, by name."""
        found = {}
        for name, old in self.status.files.items():
            change = _Change(self, name, old or _NO_BLOB, is_tracked=old is not None)
            if not change.mode and self._is_promise(change):
                continue
            if change.is_tracked or not (change.is_late or self._is_by_product(name)):
                found[name] = change
        for name in self.listed.hidden - set(found):
            change = _Change(self, name, self.listed.files[name])
            if monotonic() > self.deadline:
                raise _Unknown("no time to look at all files that git does not look at")
            with _ignoring(OSError):
                change.read()
            if change.blob() != change.old and self._is_there(change):
                found[name] = change
        return dict(sorted(found.items()))

    def _is_promise(self, change: _Change) -> bool:
        """Tell whether HEAD lacks a deleted file, of which `git add -N` told alone.

        To git status it is an empty file of HEAD.
        """
        is_empty = change.old[1] == change.object_id(b"")
        return is_empty and change.name not in self._names_in_head

    @cached_property
    def _names_in_head(self) -> set[bytes]:
        if not self.head:
            return set()
        words = ("ls-tree", "-r", "-z", "--full-tree", "--name-only", "HEAD")
        return set(self.git(*words, limit=5 * PROGRAM_BYTES).split(b"\0"))

    def is_real(self, folder: bytes) -> bool:
        """Tell whether a folder of this tree is reached without a link."""
        if folder not in self.folders:
            root = os.fsencode(self.root)
            real = normpath(join(realpath(root), relpath(folder, root)))
            self.folders[folder] = realpath(folder) == real
        return self.folders[folder]

    def _is_there(self, change: _Change) -> bool:
        return change.mode != b"" or change.name not in self.listed.sparse

    def _is_by_product(self, name: bytes) -> bool:
        """Tell whether an untracked file is byte code, in a run, or about runs."""
        kinds = rb"\.ranks/|index/runs_index\.jsonl$|__pycache__/[^/]+\.pyc$"
        root = os.fsencode(self.root)
        stamps = re.finditer(rb"-\d{8}-\d{6}[^/]*/", name)
        runs = [join(root, name[: stamp.end()], b"status.json") for stamp in stamps]
        return any(map(exists, runs)) or bool(re.search(rb"(^|/)(%s)" % kinds, name))

    @cached_property
    def base(self) -> Facts | None:
        """The newest commit of this history that a remote has, and that remote."""
        if not self.head:
            return None
        with _ignoring(_Unknown):  # facts() says why
            if self.wanted is not None:
                remote = self._remote_of(self.wanted)
                if remote is not None:
                    return {"commit": self.wanted, **remote}
            _, commit = self.history
            if commit is not None:
                remote = self._remote_of(commit) or self._remotes[0]
                return {"commit": commit, **remote}
            size = sum(change.size for change in self._whole_tree)
            if len(self._whole_tree) <= WHOLE_FILES and size <= WHOLE_BYTES:
                return None
        return {"commit": self.head, "remote": None, "url": None}

    @cached_property
    def history(self) -> tuple[list[Facts], str | None]:
        """The commits that no remote has, newest first, and the newest that one has."""
        if self._is_pushed:
            return [], self.head
        words = ["--boundary", "--encoding=UTF-8", "--format=%m%H %ct %s", "HEAD"]
        if self._remotes:
            words += ["--not", "--remotes"]
        if self._remotes and self.is_shallow:  # a remote has sent where it was cut
            path = os.fsdecode(self.git("rev-parse", "--git-path", "shallow").rstrip())
            words += os.fsdecode(_readable_bytes(join(self.root, path))).split()
        # >8f31c0e... 1769869501 Fix the seed
        # -1b2c3d4... 1769869000 The commit before, which a remote has
        listed = self.git("rev-list", *words).decode("utf-8", "replace")
        rows = re.findall(r"^([-<>])([0-9a-f]{40,64}) (\d+) (.*)$", listed, re.M)
        if not rows:
            return [], self.head
        unpushed = []
        pushed: dict[str | None, int] = {None: -1}
        for mark, commit, seconds, subject in rows:
            if mark == "-":
                pushed[commit] = int(seconds)
            else:
                unpushed.append({"commit": commit, "subject": subject[:200]})
        return unpushed, max(pushed, key=pushed.__getitem__)

    @cached_property
    def _remotes(self) -> list[Facts]:
        """Name and URL of the remotes, that of the branch first, then origin."""
        remotes = []
        for key, url in sorted(self.config.items()):
            match = re.fullmatch(r"remote\.(.+)\.url", key, re.S)
            if match and url:
                if any(key.endswith(".insteadof") for key in self.config):
                    answer = self.git("ls-remote", "--get-url", match[1])
                    url = os.fsdecode(answer).rstrip("\n")
                if url.startswith("."):
                    url = normpath(join(self.root, url))
                remotes.append({"remote": match[1], "url": url})
        ranks = {"origin": 1, self._followed: 0}
        remotes.sort(key=lambda each: ranks.get(each["remote"], 2))
        return remotes

    @property
    def _followed(self) -> str | None:
        """The remote that the branch has come from."""
        return self.config.get(f"branch.{self.status.branch}.remote")

    @property
    def _is_pushed(self) -> bool:
        """Whether the branch that this one follows has all its commits."""
        names = [each["remote"] for each in self._remotes[:1]]
        return self.status.is_behind and names == [self._followed]

    def _remote_of(self, commit: str) -> Facts | None:
        """Return the remote that has a commit, if several do the likeliest one."""
        if commit == self.head and self._is_pushed:
            return self._remotes[0]
        refs = ""
        words = ("for-each-ref", "--format=%(refname)", "--contains", commit)
        with _ignoring(_ProgramFailed):  # a commit of a submodule that is not here
            refs = os.fsdecode(self.git(*words, "refs/remotes"))
        for remote in self._remotes:
            if f"refs/remotes/{remote['remote']}/" in refs:
                return remote
        if refs and self._remotes:
            return self._remotes[0]
        return None

    @cached_property
    def _whole_tree(self) -> list[_Change]:
        found = []
        changed = {name: each.committed for name, each in self.changes.items()}
        for name, committed in sorted({**self.listed.files, **changed}.items()):
            change = _Change(self, name, _NO_BLOB, name in self.listed.files)
            change.committed = committed
            if self._is_there(change):
                found.append(change)
        return found

    @cached_property
    def changes_from_base(self) -> list[_Change]:
        """The files that are not as the base has them; without git all there are."""
        if not self.is_git:
            return _loose_files(self)
        if self.base is None:
            return self._whole_tree
        commit = self.base["commit"]
        changes = {**self.changes}
        if commit != self.head:
            words = ("diff-tree", "-r", "--raw", "-z", "--no-renames", commit)
            # :100644 100755 <old id> <new id> M\0name\0
            fields = self.git(*words, self.head, *self._pathspec).split(b"\0")
            for record, name in zip(fields[::2], fields[1::2]):
                old_mode, new_mode, old_id, new_id, _ = record[1:].split(b" ")
                old, new = _blob(old_mode, old_id), _blob(new_mode, new_id)
                if name not in changes and old != new:
                    changes[name] = _Change(self, name, new)
                if name in changes:
                    changes[name].old = old
        return list(changes.values())

    @cached_property
    def inner(self) -> list[_Repository]:
        """The submodules that are checked out, and untracked repositories."""
        if not self.is_git:
            return []
        found = []
        links = self.listed.links
        for path in sorted({*links, *(path[:-1] for path in self.status.repositories)}):
            name = os.fsdecode(path)
            place = join(realpath(self.root), name)
            if realpath(place) != place or not lexists(join(place, ".git")):
                continue
            if monotonic() > self.deadline:
                raise _Unknown("no time left to look into all repositories inside")
            tree = _Repository(join(self.root, name), self.excluded)
            tree.prefix = self.prefix + path + b"/"
            tree.entered = self.entered
            tree.deadline = self.deadline
            if path in links:
                tree.recorded = links[path].decode()
                tree.wanted = self._link_in_base(name)
            found.append(tree)
        return found

    def _link_in_base(self, name: str) -> str | None:
        with _ignoring(_Unknown):
            if self.base is not None:
                # 160000 commit <id>\tname\0
                listed = self.git("ls-tree", "-z", self.base["commit"], "--", name)
                for commit in re.findall(rb"^160000 commit (\w+)\t", listed):
                    return os.fsdecode(commit)
        return None

    def load(self, changes: Iterable[_Change]) -> None:
        """Read what commits have of these files, if it is here and small enough."""
        ids = {change.old[1] for change in changes}
        ids |= {change.committed[1] for change in changes if change.is_late}
        if ids and any(key.endswith(".promisor") for key in self.config):
            ids -= self._missing()
        sizes = {}
        try:
            printed = self._of_each(ids, "--batch", limit=PATCH_FILE_BYTES)
        except _ProgramFailed:  # some may be large: first their sizes alone
            # <id> blob 17\n
            listed = self._of_each(ids, "--batch-check")
            found = re.findall(rb"^(\w+) blob (\d+)$", listed, re.M)
            sizes = {oid: int(size) for oid, size in found}
            small = [oid for oid in sizes if sizes[oid] <= PATCH_FILE_BYTES]
            printed = self._of_each(small, "--batch", limit=5 * PATCH_BYTES)
        blobs = _blobs_in(printed)
        sizes.update((oid, len(data)) for oid, data in blobs.items())
        for change in changes:
            change.old_size = sizes.get(change.old[1], 0)
            change.old_data = blobs.get(change.old[1])
            if change.is_late:
                change.mode, oid = change.committed
                change.size = sizes.get(oid, 0)
                change.data = blobs.get(oid, b"")

    def _missing(self) -> set[bytes]:
        commits = {self.head}
        if self.base is not None:
            commits.add(self.base["commit"])
        # <id> name\n?<id>\n
        words = ("rev-list", "--objects", "--no-walk", "--missing=print", *commits)
        listed = self.git(*words, limit=5 * PROGRAM_BYTES)
        return set(re.findall(rb"^\?(\w+)$", listed, re.M))

    def _of_each(self, ids: Iterable[bytes], *words: str, **how: Any) -> bytes:
        """Return what a command of git says of each object that it reads from stdin."""
        wanted = sorted(set(ids) - {b""})
        if not wanted:
            return b""
        with _unnamed_file(b"\n".join([*wanted, b""])) as file:
            return self.git("cat-file", *words, "--buffer", stdin=file, **how)


def _blobs_in(printed: bytes) -> dict[bytes, bytes]:
    r"""Return by their ids the contents that `git cat-file --batch` has printed.

    <id> blob 17\n<content>\n
    <id> missing\n
    """
    blobs = {}
    start = 0
    while start < len(printed):
        end = printed.index(b"\n", start)
        oid, *size = printed[start:end].split(b" ")
        start = end + 1
        if len(size) == 2:
            end = start + int(size[1])
            blobs[oid] = printed[start:end]
            start = end + 1
    return blobs


class _Status:
    r"""What `git status --porcelain=v2 --branch -z` says.

    # branch.oid 8f31c0e...\0# branch.head main\0# branch.upstream origin/main\0
    # branch.ab +0 -2\0# stash 1\0
    1 .M N... <old mode> <index mode> <new mode> <old id> <index id> name\0
    u UU N... <base mode> <our mode> ... <base id> <our id> <their id> name\0
    ? untracked name\0? untracked repository/\0
    """

    def __init__(self, data: bytes) -> None:
        self.branch: str | None = None
        self.is_behind = False  # nothing is ahead of the branch that this one follows
        self.files: dict[bytes, _Blob | None] = {}  # as HEAD has them; None: untracked
        self.repositories: list[bytes] = []
        self.has_moved = False  # a submodule has
        for record in data.split(b"\0")[:-1]:
            kind, _, rest = record.partition(b" ")
            if kind == b"#":
                name, _, value = rest.partition(b" ")
                if name == b"branch.head" and value != b"(detached)":
                    self.branch = os.fsdecode(value)
                self.is_behind |= rest.startswith(b"branch.ab +0 ")
            elif kind == b"1":
                _, _, old_mode, index_mode, _, old_id, _, name = rest.split(b" ", 7)
                self.has_moved |= b"160000" in (old_mode, index_mode)
                if old_mode != b"160000" or index_mode != b"160000":
                    self.files[name] = _blob(old_mode, old_id)
            elif kind == b"u":
                fields = rest.split(b" ", 9)
                self.files[fields[9]] = _blob(fields[3], fields[7])
            elif kind == b"?" and rest.endswith(b"/"):
                self.repositories.append(rest)
            elif kind == b"?":
                self.files.setdefault(rest, None)


class _Listed:
    r"""What `git ls-files -v -s -z` lists: H 100644 <id> 0\tname\0.

    The letter is small for a file assumed to be unchanged, and S for one that a sparse
    checkout need not have.
    """

    def __init__(self, data: bytes) -> None:
        self.files: dict[bytes, _Blob] = {}
        self.hidden: set[bytes] = set()  # those that git does not look at
        self.sparse: set[bytes] = set()
        self.links: dict[bytes, bytes] = {}  # submodules and their commits
        pattern = rb"([a-zA-Z]) (\d+) (\w+) [02]\t([^\0]+)\0"
        for mark, mode, oid, name in re.findall(pattern, data):
            if mode == b"160000":
                self.links[name] = oid
                continue
            self.files[name] = mode, oid
            if mark == b"S" or mark.islower():
                self.hidden.add(name)
            if mark in b"sS":
                self.sparse.add(name)


def _blob(mode: bytes, oid: bytes) -> _Blob:
    if not mode.strip(b"0") or mode == b"160000":
        return _NO_BLOB
    return mode, oid


def _shown(name: bytes) -> str:
    return name.decode("utf-8", "backslashreplace")


def _has_repository(directory: str) -> bool:
    places = _folders_above(abspath(directory))
    return any(lexists(f"{place}/.git") for place in places)


def _explained(failure: _ProgramFailed, directory: str) -> _Unknown:
    if re.search(rb"repository \(or any|must be run in a work tree", failure.errors):
        return _no_repository()
    # git config --global --add safe.directory /data/code
    advice = re.search(rb"git config --global --add safe\.directory .+", failure.errors)
    if advice:
        why = "belongs to another user, and git does not read it; to allow that"
        return _Unknown(f"{directory!r} {why}: {os.fsdecode(advice[0])}")
    if failure.status is None:
        return _Unknown(f"{failure}; the code in {directory!r} is in a repository")
    return failure


def _check_git_dir(tree: _Repository, root: str) -> None:
    """Raise _Unknown unless work tree and .git name each other: it may be a trap."""
    dot_git = join(root, ".git")
    line = _first_line(dot_git) or ""
    folder = realpath(join(root, line.partition("gitdir: ")[2] or ".git"))
    common = _first_line(join(folder, "commondir"))
    if tree.prefix and root != tree.directory:
        is_own = False  # git went up to the outer repository
    elif common is not None:  # of `git worktree add`
        is_known = dirname(folder) == realpath(join(folder, common, "worktrees"))
        back = _first_line(join(folder, "gitdir")) or ""  # relative since git 2.48
        is_own = is_known and normpath(join(folder, back)) == dot_git
    elif "core.worktree" in tree.config:  # of a submodule: git has looked there
        is_own = True
    elif tree.prefix or basename(folder) == ".git":
        is_own = folder == join(realpath(root), ".git")
    else:
        is_own = True  # `git init --separate-git-dir` leaves no way back
    parts = [join(folder, name) for name in ("objects", "refs", "packed-refs")]
    if not is_own or any(map(os.path.islink, parts)):
        raise _Unknown(f"the .git of {root!r} belongs to another work tree")


def _first_line(path: str) -> str | None:
    with _ignoring(OSError):
        return os.fsdecode(_read_bytes(path, limit=8192).partition(b"\n")[0])
    return None


def _loose_files(tree: _Repository) -> list[_Change]:
    """Return the code that is in no repository: what was loaded, and texts below.

    The texts of a home directory, or of a folder that is everybody's, are not one
    program. `tree.root` becomes the folder that has them all.
    """
    top = realpath(tree.directory)
    loaded = [realpath(path) for path in tree.sources]
    paths = [*loaded]
    if tree.is_deep and not _is_shared_folder(top):
        paths += _texts_below(tree, top)
    tree.root = os.path.commonpath([top, *paths])
    changes = []
    for path in dict.fromkeys(paths):
        name = os.fsencode(relpath(path, tree.root))
        change = _Change(tree, name, _NO_BLOB, is_tracked=path in loaded)
        if change.rank and not re.search(SOURCE_FILES, path):
            change.rank = 2
        if change.mode not in (b"", b"other") and not change.is_late:
            changes.append(change)
    return changes


def _texts_below(tree: _Repository, top: str) -> Iterator[str]:
    """Yield files, but none of other projects, environments, results and runs."""
    deadline = monotonic() + WALK_SECONDS
    marks = (".git", "pyvenv.cfg", "conda-meta", "status.json", INDEX_FILE)
    skipped = ("__pycache__", "node_modules", "site-packages", "dist-packages")
    excluded = [realpath(path) for path in tree.excluded]
    for folder, folders, files in os.walk(top):
        is_other = any(lexists(join(folder, mark)) for mark in marks)
        if monotonic() > deadline or folder in excluded or is_other:
            folders.clear()
            continue
        folders[:] = [n for n in folders if n[:1] != "." and n not in skipped]
        links = [n for n in folders if os.path.islink(join(folder, n))]
        yield from [join(folder, name) for name in sorted(files + links)]


def _is_shared_folder(folder: str) -> bool:
    home = realpath(os.path.expanduser("~"))
    is_home = folder in (home, dirname(home), os.sep)
    return is_home or os.stat(folder).st_mode & stat.S_ISVTX != 0


def _is_own_source(path: str, site: _Site) -> bool:
    real = realpath(path)
    if not isfile(real) or _is_installed(path) or _is_installed(real):
        return False
    ours = realpath(_is_own_source.__code__.co_filename)
    return real != ours or _is_below(real, site.directory)


class _Patch:
    """A patch in the making: its text, and what it leaves out."""

    def __init__(self, earlier: Path | None = None) -> None:
        self.parts: dict[bytes, bytes] = {}  # of an earlier one, by how they begin
        if earlier is not None:
            self._read_earlier(earlier)
        self.deadline = monotonic() + PATCH_SECONDS
        self.text = bytearray()
        self.room = 0, 0  # limits of bytes and files
        self.size = 0  # bytes of the files in it, old and new
        self.files = 0
        self.redacted: list[str] = []
        self.left_out: list[Facts] = []
        self.problems: list[str] = []

    def add(self, tree: _Repository) -> None:
        """Add what differs in a tree from its base, and the repositories inside."""
        try:
            if tree.prefix:
                tree.open()
            changes = tree.changes_from_base
            self.room = PATCH_BYTES, PATCH_FILES
            if tree.is_git:
                for change in changes:
                    change.part = self._earlier_part(change)
                tree.load([change for change in changes if not change.part])
            else:
                self.room = WHOLE_BYTES, WHOLE_FILES
            self._add_files(tree, changes)
            inner = tree.inner
        except _Unknown as reason:
            where = _shown(tree.prefix) or "git.patch"
            self.problems.append(f"{where}: {reason}")
            return
        for each in inner:
            self.add(each)

    def _read_earlier(self, run_dir: Path) -> None:
        """Read the patch of the newest run beside a new one, if all of the code is in.

        What stands there of a file is taken over if it is about the same two contents,
        by the names that git gives them.
        """
        metadata = _read_json(run_dir / "metadata.json")
        facts = _mapping(metadata, "git", "patch")
        is_whole = facts.get("redacted") == facts.get("left_out") == []
        is_ours = _at(metadata, "run_utils", "version") == __version__
        if not (is_ours and is_whole):
            return
        data = _readable_bytes(run_dir / "git.patch")
        if _hash_of(data) == facts.get("sha256"):
            for part in re.split(rb"(?m)^(?=diff --git )", data):
                # diff --git a/name b/name\nindex <old id>..<new id> 100644\n
                for start in re.findall(rb"\A.+\nindex \w+", part):
                    self.parts[start] = part

    def _earlier_part(self, change: _Change) -> bytes:
        if change.is_late or not self.parts:
            return b""
        names = _quoted(b"a/" + change.title), _quoted(b"b/" + change.title)
        start = b"diff --git %s %s\nindex %s" % (*names, change.old[1])
        return self.parts.get(start, b"")

    def _is_known(self, change: _Change) -> bool:
        new = rb".+\nindex \w+\.\.%s %s\n" % (change.blob()[1], change.mode)
        if not re.match(new, change.part):
            return False
        texts = [change.part, change.data]
        return all(_redactor.code(text, change.title) == text for text in texts)

    def _add_files(self, tree: _Repository, changes: Sequence[_Change]) -> None:
        """Add the files that can be in it; what an earlier patch says is taken over."""
        kept = self._kept(tree, changes)
        known = {change.part for change in kept if self._is_known(change)}
        rest = [change for change in kept if change.part not in known]
        tree.load([change for change in rest if change.part])
        compared = []
        for change in sorted(rest, key=lambda each: each.title):
            if not self._redact(change):
                self._leave_out(change, "a binary file that holds a secret")
            elif change.old == _NO_BLOB and b"\0" not in change.data:
                self.text += _new_file(change)
                self.files += 1
            else:
                compared.append(change)
        self.text += b"".join(p for p in self.parts.values() if p in known)
        self.files += len(known)
        try:
            left = max(self.deadline - monotonic(), 1.0)
            self.text += _compared_by_git(compared, left)
            self.files += len(compared)
        except _Unknown as reason:
            self.problems.append(str(reason))
            for change in compared:
                self._leave_out(change, str(reason))

    def _kept(self, tree: _Repository, changes: Sequence[_Change]) -> list[_Change]:
        """Read the files that there is room for, small ones first; list the others."""
        kept: list[_Change] = []
        for change in sorted(changes, key=lambda each: (each.rank, each.size)):
            if not change.mode and change.old == _NO_BLOB:
                continue
            count = self.files + len(kept)
            problem = self._obstacle(change, count) or self._read(tree, change)
            if problem is None and change.mode:
                if _redactor.is_secret_file(change.title, change.data):
                    problem = "holds secrets by nature"
                    _redactor.learn_code(change.data, change.title)
            if problem is not None:
                self._leave_out(change, problem)
            elif not tree.is_git and b"\0" in change.data:
                self._leave_out(change, "no source")
            elif change.blob() != change.old:
                self.size += change.size + change.old_size
                kept.append(change)
                if b"\0" not in change.data:
                    change.finds = _redactor.learn_code(change.data, change.title)
        return kept

    def keep(self, record: _Record, name: str, root: str) -> Facts:
        data = bytes(self.text)
        facts: Facts = {
            "file": None,
            "bytes": len(data),
            "sha256": None,
            "files": self.files,
            "root": root,  # the folder that the names in it start from
            "redacted": self.redacted,
            "left_out": self.left_out[:MAX_LISTED],
            "left_out_count": len(self.left_out),
            "left_out_bytes": sum(each["bytes"] for each in self.left_out),
        }
        if data:
            _write_or_link(record, name, data)
            facts["file"] = name
            facts["sha256"] = _hash_of(data)
        return facts

    def _read(self, tree: _Repository, change: _Change) -> str | None:
        if not change.is_late:
            try:
                change.read()
            except OSError as error:
                return error.strerror or str(error)
            change.look(tree)
            if change.is_late:
                return "it was written while it was read"
        return None

    def _obstacle(self, change: _Change, count: int) -> str | None:
        """Return why a file cannot be in a patch that has so many already."""
        title = _shown(change.title)
        if change.mode == b"other":
            return "no file of this repository"
        if _redactor.text(title) != title:
            return "has a secret in its name"
        if max(change.size, change.old_size) > PATCH_FILE_BYTES:
            return "too large"
        if self.size + change.size + change.old_size > self.room[0]:
            return "the patch is full"
        if count >= self.room[1]:
            return "too many files"
        if monotonic() > self.deadline:
            return "no time left"
        return None

    def _redact(self, change: _Change) -> bool:
        """Take the secrets out of a file; return False for a binary one."""
        old = change.old_data
        if old is not None and _redactor.holds_secrets(old, change.title):
            change.old_data = None  # a text patch would show it
        modes = change.mode[:3], change.old[0][:3]
        if change.blob()[1] == change.old[1] and modes == (b"100", b"100"):
            change.data = b""  # only its mode has changed, which needs no content
            change.old_data = b""
            return True
        clean = _redactor.code(change.data, change.title, change.finds)
        if clean != change.data:
            if b"\0" in change.data:
                return False
            change.data = clean
            self.redacted.append(_shown(change.title))
        return True

    def _leave_out(self, change: _Change, reason: str) -> None:
        size = max(change.size, change.old_size)
        facts: Facts = {"path": _shown(change.title), "bytes": size, "reason": reason}
        limits = ("no source", "too large", "the patch is full", "too many files")
        is_cheap = size <= HASH_BYTES and monotonic() < self.deadline
        is_listed = len(self.left_out) < MAX_LISTED and reason in limits
        if is_listed and is_cheap and change.mode.startswith(b"100"):
            facts["sha256"] = _sha256(os.fsdecode(change.path))
        self.left_out.append(facts)


def _write_or_link(record: _Record, name: str, data: bytes) -> None:
    earlier = None
    if len(data) > LINK_BYTES:
        earlier = next(record.earlier_runs(), None)
    with _ignoring(OSError):
        if earlier is not None and _read_bytes(earlier / name) == data:
            record.link(name, earlier / name)
            return
    record.write_bytes(name, data)


def _compared_by_git(changes: Sequence[_Change], seconds: float) -> bytes:
    if not changes:
        return b""
    hidden = {}
    words = "diff --no-index --binary --full-index --no-renames --no-color -U3"
    options = "--no-ext-diff --no-textconv --src-prefix= --dst-prefix= a b"
    config = "[core]\nrepositoryformatversion = 1\n[extensions]\nobjectFormat = "
    files = {
        "HEAD": "ref: refs/heads/main\n",
        "config": config + changes[0].hash_name,
        "info/attributes": "* -text -filter -ident !eol !diff !working-tree-encoding\n",
    }
    with _temporary_folder() as scratch:
        for folder in ("a", "b", ".git/info", ".git/objects", ".git/refs"):
            os.makedirs(f"{scratch}/{folder}")
        for name, content in files.items():
            _write_file(f"{scratch}/.git/{name}", content.encode())
        for change in changes:
            old_data = change.old_data or b""
            if change.old_data is None and change.old[1]:
                old_data = b"\0" + change.old[1]
                hidden[change.object_id(old_data)] = change.old[1]
            _put(os.fsencode(f"{scratch}/a/"), change, change.old[0], old_data)
            _put(os.fsencode(f"{scratch}/b/"), change, change.mode, change.data)
        limits: Any = {"timeout": seconds, "limit": 5 * PATCH_BYTES}
        try:
            text = _git_run(scratch, *words.split(), *options.split(), **limits)
        except _ProgramFailed as failure:
            if failure.status != 1 or failure.errors.startswith(b"fatal"):
                raise
            text = failure.output  # 1 says that something differs
    for stand_in, old_id in hidden.items():
        text = text.replace(b"\nindex " + stand_in, b"\nindex " + old_id)
    # After the new content of a binary file git writes the old one, the way back.
    way = rb"(?:literal|delta) \d+\n(?:.+\n)+\n"
    return re.sub(rb"(?m)^(GIT binary patch\n%s)%s" % (way, way), rb"\1", text)


def _put(place: bytes, change: _Change, mode: bytes, data: bytes) -> None:
    path = place + change.title
    os.makedirs(dirname(path), exist_ok=True)
    if mode == b"120000" and b"\0" not in data:
        os.symlink(data, path)
    elif mode:
        with open(path, "wb") as file:
            file.write(data)
        os.chmod(path, int(mode[-3:], 8))


def _new_file(change: _Change) -> bytes:
    """Return the part of a patch that creates a text file, as git would write it."""
    old_name, name = _quoted(b"a/" + change.title), _quoted(b"b/" + change.title)
    text = b"diff --git %s %s\nnew file mode %s\n" % (old_name, name, change.mode)
    lines = change.data.split(b"\n")
    end = b"\n\\ No newline at end of file\n"
    if not lines[-1]:
        lines.pop()
        end = b"\n"
    if b" " in name and name == b"b/" + change.title:
        name += b"\t"  # marks the end of a name with a blank in it
    if lines:
        text += b"--- /dev/null\n+++ %s\n" % name
        text += b"@@ -0,0 +1,%d @@\n+" % len(lines) + b"\n+".join(lines) + end
    return text


def _quoted(name: bytes) -> bytes:
    r"""Return a name as git reads it: "a/tab\011here", if it is not a plain one."""
    escaped = re.sub(rb'[^ !#-[\]-~]', lambda match: b"\\%03o" % ord(match[0]), name)
    if escaped == name:
        return name
    return b'"%s"' % escaped


def _git_run(
    directory: str, *words: str, timeout: float | None = None, limit: int | None = None,
    **how: Any,
) -> bytes:
    """Return what git prints; it asks, pages, fetches, locks and executes nothing."""
    return _git_started(directory, *words, **how).result(timeout, limit)


def _git_started(
    directory: str, *words: str, protocols: str = "none", stdin: int | None = None,
    variables: Mapping[str, str] | None = None,
) -> _Program:
    foreign = re.compile("GIT_(?!CEILING_DIRECTORIES$|DISCOVERY_ACROSS_FILESYSTEM$)")
    variables = variables or os.environ
    env = {name: variables[name] for name in variables if not foreign.match(name)}
    env.update(_GIT_ENVIRONMENT, GIT_ALLOW_PROTOCOL=protocols)
    argv = ["git", "-C", directory, "--no-pager"]
    for setting in _GIT_SETTINGS:
        argv += ["-c", setting]
    return _Program([*argv, *words], os.curdir, env, stdin)


_GIT_SETTINGS = (
    "core.fsmonitor=false", "core.hooksPath=/dev/null", "core.quotePath=true",
    "core.splitIndex=false", "log.showSignature=false", "status.submoduleSummary=false",
)
_GIT_ENVIRONMENT = {
    "GIT_ASKPASS": "true",
    "GIT_NO_LAZY_FETCH": "1",
    "GIT_NO_REPLACE_OBJECTS": "1",  # no clone has what `git replace` made
    "GIT_OPTIONAL_LOCKS": "0",
    "GIT_PAGER": "cat",
    "GIT_TERMINAL_PROMPT": "0",
    "LC_ALL": "C",
    "SSH_ASKPASS": "true",
}


# === Reproducing ===
# What is missing is said before anything is built. The tree is made anew elsewhere:
# nothing of the user's changes, and nothing that a record names is run before --exec.


def _cmd_reproduce(args: Namespace) -> int:
    """Build the tree that a run ran in, print a plan, and with --exec run it again.

    Returns 0 if all is as it was, 1 if something differs, 2 if it cannot be done.
    """
    tolerance = float(args.tolerance or 1e-6)
    if not tolerance >= 0:
        raise ValueError(f"--tolerance {args.tolerance}: give a number from 0 up")
    plan = _Plan(args.run)
    target = abspath(args.into or plan.default_target())
    _make_room(target)
    plan.set_values(args.set)
    plan.check(dirname(target))
    for step in plan.steps:
        if args.exec and step["stops"]:
            raise ValueError(f"--exec is refused: {step['about']}: {step['text']}")
    plan.build(target, args.venv)
    if not args.json:
        plan.show(target)
    comparison: Facts = {}
    if args.exec and plan.level() < 2:
        comparison = _run_again(plan, target, tolerance, args.json)
    if args.json:
        _print_json({**plan.to_json(target), "comparison": comparison})
    elif comparison:
        _show_comparison(comparison)
    if comparison:
        return int(not comparison["same"])
    return plan.level()


def _cmd_verify(args: Namespace) -> int:
    plan = _Plan(args.run)
    plan.check(os.curdir)
    with _temporary_folder() as scratch:
        plan.build(f"{scratch}/tree")
    if args.json:
        _print_json(plan.to_json(None))
    else:
        plan.show(None)
    return plan.level()


_UNFINISHED = ".git/run_utils.half"  # in a tree that lacks files, or its environment


def _make_room(tree: str) -> None:
    """Refuse a folder that exists, unless it is a tree that was never finished."""
    if isfile(f"{tree}/{_UNFINISHED}"):
        _remove_half_built(tree)
    if lexists(tree):
        raise ValueError(f"{tree!r} exists; give another folder by --into")


def _remove_half_built(tree: str) -> None:
    """Remove a tree, its mark after all else: this may be interrupted too."""
    git = f"{tree}/.git"
    for folder, kept in ((tree, git), (git, f"{tree}/{_UNFINISHED}")):
        for place in [join(folder, name) for name in os.listdir(folder)]:
            if place != kept:
                _remove_tree(place)
    emptied = f"{tree}.{os.getpid()}"
    os.rename(tree, emptied)
    _remove_tree(emptied)


# Of the plan: what matters most comes first.
_ORDER = ("code", "inputs", "secrets", "disk", "environment", "command")


class _Plan:
    """What it takes to do a run again, and what is not as it was."""

    def __init__(self, text: str) -> None:
        self.folder = abspath(text)  # with metadata.json, git.patch and status.json
        self.run_dir = re.sub(r"/attempts/\d+$", "", self.folder)
        if self.run_dir == self.folder or not isfile(f"{self.folder}/metadata.json"):
            self.run_dir = self.folder = str(_find_run(text))
        self.run = Run(self.folder, row=False)
        self.metadata = self.run.metadata
        self.argv = _texts(self.metadata, "argv")
        self.cwd = _word(self.metadata, "working_dir")
        if not self.argv:
            problem = f"{self.folder!r} has no metadata.json with its command"
            raise ValueError(self.run.unread.get("metadata.json", problem))
        self.git = _mapping(self.metadata, "git")
        self.patch = _mapping(self.git, "patch")
        self.root = _word(self.patch, "root") or _word(self.git, "root")
        self.origin = _word(self.metadata, "python", "origin")
        self.python = self._recorded_python()
        self.launcher: list[str] = []  # before the command of one rank
        self.steps: list[Facts] = []

    def add(
        self, about: str, level: int, text: str, details: Sequence[str] = (),
        stops: bool = False,
    ) -> None:
        """Say that something is as it was (0), differs (1) or is a bar to all (2)."""
        step = {"about": about, "level": level, "text": text}
        self.steps.append({**step, "details": list(details), "stops": stops})
        self.steps.sort(key=lambda step: _ORDER.index(step["about"]))

    def level(self) -> int:
        return max([step["level"] for step in self.steps], default=0)

    def default_target(self) -> str:
        """Return a folder beside the repository that we are in, else in this folder."""
        place = os.getcwd()
        for folder in _folders_above(place):
            if lexists(f"{folder}/.git"):
                place = dirname(folder)
        return join(place, f"{basename(self.run_dir)}-again")

    def _recorded_python(self) -> str | None:
        """Return the Python that would run it again, None if the command needs none."""
        recorded = _word(self.metadata, "python", "executable")
        if not recorded or self.origin == "PATH":
            return None
        if re.match(_PYTHON, basename(recorded)) and isfile(recorded):
            owners = {os.lstat(recorded).st_uid, os.stat(recorded).st_uid}
            if not hasattr(os, "getuid") or owners <= {os.getuid(), 0}:
                return recorded
        return sys.executable

    def set_values(self, settings: Sequence[str]) -> None:
        """Change the command by "lr=0.2", where it has --lr 0.1, --lr=0.1 or lr=0.1.

        What had its default gets a word of its own.
        """
        for setting in settings:
            name, equals, value = setting.partition("=")
            if not equals:
                raise ValueError(f"--set {setting}: give key=value")
            for number, word in enumerate(self.argv[1:], 1):
                flag, equals, old = word.partition("=")
                if _bare(flag) != _bare(name):
                    continue
                if equals:
                    self.argv[number] = f"{flag}={value}"
                elif word.startswith("-") and number + 1 < len(self.argv):
                    old = self.argv[number + 1]
                    self.argv[number + 1] = value
                if old != REDACTED:
                    self.add("command", 1, f"{name} is {value}, not {old}")
                break
            else:
                self._add_value(name, value)

    def _add_value(self, name: str, value: str) -> None:
        config = {_bare(_short(key)): old for key, old in self.run.flat_config.items()}
        if _bare(name) not in config or self.origin != "this process":
            hint = _similar(name, config)
            raise ValueError(f"no word of the command sets {name!r}{hint}")
        has_flags = any(word.startswith("--") for word in self.argv)
        if any(re.match(r"[\w.]+=", word) for word in self.argv) and not has_flags:
            self.argv.append(f"{name}={value}")  # as with Hydra
        else:
            self.argv += [f"--{name.lstrip('-')}", value]
        old = _text(config[_bare(name)])
        self.add("command", 1, f"{name} is {value}, not {old}: added at its end")

    def check(self, place: str) -> None:
        """Look at all that is quick to see; `place` is where the tree is to go."""
        name = _word(self.patch, "file")
        digest = _sha256(join(self.folder, name))
        if name and digest is None:
            self.add("code", 2, f"{name} is not in {self.folder!r}")
        elif name and self.patch.get("sha256") not in (None, digest):
            self.add("code", 2, f"{name} is not the file that the run wrote")
        self._check_inputs()
        self._check_secrets()
        self._check_environment(_rows(self.metadata, "local_packages"))
        self._check_disk(place)
        self.launcher = self._launcher_words()
        if self.launcher:
            text = f"{self.launcher[-1]} processes, which --exec does not start"
            self.add("command", 1, text, stops=True)

    def _launcher_words(self) -> list[str]:
        facts = _mapping(self.metadata, "launcher")
        ranks = str(facts.get("world_size"))  # not there: it ran alone
        for key, words in _LAUNCHER_LINES.items():
            if facts.get(key) != ranks:
                continue
            here = _word(facts, "LOCAL_WORLD_SIZE") or ranks
            if key == "WORLD_SIZE" and here != ranks:
                hosts = _word(facts, "GROUP_WORLD_SIZE")
                return [words[0], "--nnodes", hosts, words[1], here]
            return [*words, ranks]
        return []

    def _check_disk(self, place: str) -> None:
        import shutil

        sizes = [output.get("size") for output in _rows(self.metadata, "outputs")]
        needed = sum(_numbers([*sizes, self.patch.get("bytes")]))
        while not isdir(place):
            place = dirname(place) or os.curdir
        free = shutil.disk_usage(place).free
        if free < needed:
            text = f"{_format_size(free)} free, and the run took {_format_size(needed)}"
            self.add("disk", 1, text, stops=True)

    def _check_inputs(self) -> None:
        inputs = _read_inputs(self.run_dir)
        problems = []
        for entry in inputs:
            place, problem = _input_now(entry, self.run_dir)
            if problem is not None:
                problems.append(f"{entry.get('run')}/{entry['path']} {problem}")
            recorded = join(_word(entry, "run_dir"), entry["path"])
            for number, word in enumerate(self.argv):
                start, equals, value = word.rpartition("=")
                if normpath(join(self.cwd, value)) == recorded:
                    # The new tree has no results, so it is named by its full path.
                    self.argv[number] = start + equals + place
        if problems:
            self.add("inputs", 1, problems[0], problems[1:], stops=True)
        elif inputs:
            self.add("inputs", 0, f"{_format_count(len(inputs), 'file')}, unchanged")

    def _check_secrets(self) -> None:
        """Name what was redacted and has to be supplied: it is never guessed."""
        pairs = zip(self.argv, self.argv[1:])
        flags = [a if b == REDACTED else b for a, b in pairs if REDACTED in b]
        if flags:
            text = f"redacted in the command: {', '.join(flags)}; give them by --set"
            self.add("secrets", 1, text, stops=True)
        names = _texts(self.patch, "redacted")
        if names:
            text = "redacted in the code; fill them in by hand"
            self.add("secrets", 1, text, names, stops=True)
        env = _mapping(self.metadata, "env")
        missing = [n for n in env if REDACTED in str(env[n]) and n not in os.environ]
        if missing:
            self.add("secrets", 0, f"the environment also had {', '.join(missing)}")

    def _check_environment(self, local_packages: Iterable[Facts]) -> None:
        """Compare Python, packages and GPUs with those that --exec would use."""
        if self.python is None:
            return
        site = _Site.here([self.python, "-c", ""])
        now: Facts = {"capture": {}}
        _collect(now, "python", lambda: _ask_python(site))
        _collect(now, "pip_freeze", _Packages(site, _Unwritten(self.run)).lines)
        _collect(now, "cuda", _cuda)
        then, here = self._environment(self.metadata), self._environment(now)
        rows = []
        for name, old in then.items():
            new = here.get(name, "missing")
            if new != old and REDACTED not in str(old):
                rows.append((_weight(name, old, new), f"{name} {old}, here {new}"))
        for package in local_packages:
            problem = _package_now(package)
            if problem is not None:
                rows.append((1, problem))
        lines = [text for _, text in sorted(rows)]
        if lines:
            self.add("environment", 1, lines[0], lines[1:])
        else:
            self.add("environment", 0, f"Python {then['python']} and its packages")

    def _environment(self, metadata: Facts) -> Facts:
        lines = []
        for line in _texts(metadata, "pip_freeze"):
            if line.startswith("-e /"):
                lines.append(f"{self._name_of_folder(line[3:])} @ from a folder")
            elif not line.startswith("#"):
                lines.append(line)
        return {
            "python": _python_version(metadata),
            "GPUs": _at(metadata, "cuda", "device_count") or 0,
            **(_comparable_packages(lines) or {}),
        }

    def _name_of_folder(self, folder: str) -> str:
        """Return which package was installed from here: there, or as rebuilt by us."""
        for package in _rows(self.metadata, "local_packages"):
            name = _word(package, "name")
            is_rebuilt = f"/.git/packages/{_safe_name(name)}" in f"{folder}/"
            if is_rebuilt or folder in (package.get("path"), package.get("root")):
                return name
        return basename(folder)

    def build(self, target: str, has_environment: bool = False) -> None:
        """Make the tree as a whole, or leave nothing but what a kill leaves behind."""
        if self.level() == 2:
            return
        beginning = f"{target}.{os.getpid()}"  # it is never there without its mark
        os.makedirs(f"{beginning}/.git")
        _write_file(f"{beginning}/{_UNFINISHED}", b"")
        os.rename(beginning, target)
        about = "code"
        try:
            self._rebuild(target, self.git, self.patch, self.root)
            self._add_code(self._missing_files(target))
            place = self.command(target)[1]
            if _is_below(place, target):  # git has no empty or ignored folders
                os.makedirs(place, exist_ok=True)
            about = "environment"
            if has_environment:
                self._install(target)
            os.remove(f"{target}/{_UNFINISHED}")
        except BaseException as error:
            with _ignoring(OSError):
                _remove_half_built(target)
            if not isinstance(error, _Unknown):
                raise
            self.add(about, 2, str(error))

    def _add_code(self, missing: Sequence[str]) -> None:
        commit = _word(self.git, "commit_short")
        file = _word(self.patch, "file")
        text = commit or "the sources of a folder without git"
        if file:
            start = self.git.get("commit_full")
            if "base" in self.git:  # by hand one starts there, not at HEAD
                start = _at(self.git, "base", "commit")
            if not commit or start == self.git.get("commit_full"):
                text += f" with {file}"
            elif start:
                text = f"{str(start)[: len(commit)]} with {file}, which is {commit}"
            else:
                text = f"{file} alone, which is {commit}"
        if not commit and not file:
            self.add("code", 1, "none was recorded", missing)
        elif missing:
            self.add("code", 1, f"{text}, but not all", missing)
        else:
            self.add("code", 0, f"{text}, byte for byte")

    def _rebuild(self, place: str, git: Facts, patch: Facts, root: str) -> None:
        """Make a repository at `place` with those inside it, and apply the patch."""
        base = _mapping(git, "base")
        if "base" not in git and git.get("commit_full"):  # of version 1
            base = {"commit": git["commit_full"], "url": git.get("remote_origin_url")}
        switches = _fetch(place, base, root)
        waiting = _rows(git, "submodules")
        for inner in waiting:
            waiting += _rows(inner, "submodules")
            path = _word(inner, "path")
            if not _is_below(join(place, path), place):
                raise _Unknown(f"{path!r} leads out of the tree")
            if inner.get("base"):
                _fetch(join(place, path), _mapping(inner, "base"), join(root, path))
        if patch.get("file"):
            file = join(self.folder, basename(_word(patch, "file")))
            _new_git(place, *switches, "apply", "--whitespace=nowarn", file)

    def _missing_files(self, tree: str) -> list[str]:
        """Return which files are not as they were, and why.

        One that the patch had no room for is copied where it still is the same.
        """
        import shutil

        texts = []
        left_out = _rows(self.patch, "left_out")
        for entry in left_out:
            path, known = _word(entry, "path"), entry.get("sha256")
            source, place = join(self.root, path), join(tree, path)
            is_same = known is not None and _sha256(source) == known
            if is_same and _is_below(place, tree):
                os.makedirs(dirname(place), exist_ok=True)
                shutil.copy(source, place)
            else:
                texts.append(f"{path}: {entry.get('reason')}")
        more = int(_number(self.patch.get("left_out_count")) or 0) - len(left_out)
        if more > 0:
            texts.append(f"{more} more that were left out")
        texts += [f"{name}: redacted" for name in _texts(self.patch, "redacted")]
        late = _texts(self.git, "changed_after_entry")
        texts += [f"{name}: changed after entry, taken as committed" for name in late]
        problem = _word(self.metadata, "capture", "git.patch", "problem")
        base = self.git.get("base")
        if problem and (base is None or _at(base, "url")):
            texts.append(problem)
        return texts

    def _install(self, target: str) -> None:
        """Make the recorded environment inside the new tree, and nowhere else."""
        os.makedirs(f"{target}/.git/info")
        _write_file(f"{target}/.git/info/exclude", b"/.venv/\n")
        for place, package in self._local_packages(target):
            patch = _mapping(package, "patch")
            root = _word(patch, "root") or _word(package, "root")
            self._rebuild(place, package, patch, root)
        for command in self.environment_commands(target):
            _run(command, timeout=INSTALL_SECONDS, cwd=target)
        self.python = f"{target}/.venv/bin/python"
        self.steps = [step for step in self.steps if step["about"] != "environment"]
        self._check_environment([])

    def _local_packages(self, target: str) -> Iterator[tuple[str, Facts]]:
        """Yield where each package goes whose code was recorded by itself."""
        for package in _rows(self.metadata, "local_packages"):
            if package.get("patch") or package.get("base"):
                name = _safe_name(_word(package, "name"))
                yield f"{target}/.git/packages/{name}", package

    def environment_commands(self, target: str) -> list[list[str]]:
        """Return what makes the environment, and write the requirements for it."""
        version = _python_version(self.metadata)
        if not version or not _texts(self.metadata, "pip_freeze"):
            return []
        lines = self._requirements(target)
        file = f"{target}/.git/requirements.txt"
        if isdir(target):
            _write_file(file, "\n".join([*lines, ""]).encode("utf-8"))
        install = ["--no-deps", "-r", file]
        tags = re.findall(r"\+(cu\d+|cpu|rocm[\d.]+|xpu)\b", "\n".join(lines))
        for tag in sorted(set(tags)):
            install += ["--extra-index-url", WHEEL_INDEX + tag]
        venv = f"{target}/.venv"
        python = f"{venv}/bin/python"
        conda = _texts(self.metadata, "environment", "conda_packages")
        if conda:
            make = ["conda", "create", "--yes", "--prefix", venv]
            for channel in _texts(self.metadata, "environment", "conda_channels"):
                make += ["--channel", channel]
            make += ["=".join(text.rsplit("-", 2)) for text in conda]
        elif _on_path("uv") is not None:
            make = ["uv", "venv", "--python", version, venv]
            strategy = ["--index-strategy", "unsafe-best-match"]
            install = ["uv", "pip", "install", "--python", python, *install, *strategy]
            return [make, install]
        else:
            base = self.python
            if base in (None, sys.executable):
                minor = "python" + ".".join(version.split(".")[:2])
                base = _on_path(minor) or sys.executable
            make = [base, "-m", "venv", venv]
        return [make, [python, "-m", "pip", "install", *install]]

    def _requirements(self, target: str) -> list[str]:
        lines = []
        rebuilt = []
        for place, package in self._local_packages(target):
            path = _word(package, "path")
            inside = relpath(path, _word(package, "root") or path)
            lines.append(f"-e {normpath(join(place, inside))}")
            rebuilt.append(package.get("name"))
        for line in _texts(self.metadata, "pip_freeze"):
            is_local = line.startswith("-e /") or "@ file:" in line
            name = re.split(r"[ =@<>]", line, maxsplit=1)[0]
            if not is_local and name not in rebuilt and REDACTED not in line:
                lines.append(line)
        return lines

    def command(self, target: str) -> tuple[list[str], str]:
        words = [_moved(word, self.root, target) for word in self.argv]
        if re.match(_PYTHON, basename(words[0])):
            words[0] = self.python or words[0]
            if self.launcher[:1] == ["torchrun"]:
                # It says -u by itself.
                words = list(itertools.dropwhile("-u".__eq__, words[1:]))
        place = _in_new_tree(self.cwd, self.root, target)  # never the old folder
        return [*self.launcher, *words], place

    def to_json(self, target: str | None) -> Facts:
        words, place = self.command(target or self.root)
        return {
            "run": self.folder,
            "tree": target,
            "level": self.level(),
            "steps": self.steps,
            "environment": self.environment_commands(target or "TREE"),
            "command": words,
            "working_dir": place,
        }

    def show(self, target: str | None) -> None:
        lines = []
        for step in self.steps:
            word = ("same", "differs", "impossible")[step["level"]]
            details = step["details"][:PLAN_DETAILS]
            rest = len(step["details"]) - len(details)
            if rest:
                details.append(f"and {rest} more, see --json")
            text = f"{step['about']}: {word}: {step['text']}"
            lines.append("\n     ".join([text, *details]))
        if target is not None and self.level() < 2:
            differing = [step["about"] for step in self.steps if step["level"]]
            if "environment" in differing and not isdir(f"{target}/.venv"):
                lines += map(_shell_line, self.environment_commands(target))
            lines.append(_shell_line(*self.command(target)))
        for number, line in enumerate(lines, 1):
            for part in f"{number}. {line}".split("\n"):
                _print(part)
        if target is not None and isdir(target):
            print(f"To remove it: {_shell_line(['rm', '-rf', target])}")


_LAUNCHER_LINES = {  # by the variable that tells the number of ranks
    "WORLD_SIZE": ["torchrun", "--nproc-per-node"],
    "SLURM_STEP_NUM_TASKS": ["srun", "--ntasks"],
    "SLURM_NTASKS": ["srun", "--ntasks"],
    "OMPI_COMM_WORLD_SIZE": ["mpirun", "-n"],
    "PMI_SIZE": ["mpiexec", "-n"],
}


def _bare(flag: str) -> str:
    return flag.lstrip("-").replace("-", "_")


def _moved(word: str, root: str, target: str) -> str:
    """Return a word of the command that means what the new tree has, not the old."""
    start, equals, value = word.rpartition("=")
    moved = _in_new_tree(value, root, target)
    if lexists(moved):
        return start + equals + moved
    return word


def _in_new_tree(path: str, root: str, target: str) -> str:
    if root and f"{path}/".startswith(f"{root}/"):
        return target + path[len(root) :]
    return path


def _python_version(metadata: Facts) -> str:
    return _word(metadata, "python", "version").split(" ")[0]


def _weight(name: str, old: object, new: object) -> int:
    """Return how much a difference matters: Python, GPUs, what is missing, versions."""
    if name in ("python", "GPUs"):
        return 0
    if new == "missing":
        return 1
    is_major = str(old).split(".")[0] != str(new).split(".")[0]
    return 3 - int(is_major)


def _package_now(package: Facts) -> str | None:
    name, path = package.get("name"), _word(package, "path")
    patch = _mapping(package, "patch")
    if path and not isdir(path):
        return f"{name} was in {path}, which is gone"
    if not path or "sha256" not in patch or patch.get("redacted"):
        return None
    tree = _Repository(path, [])
    then, commit = package.get("commit_short"), tree.known_facts()["commit_short"]
    if commit != then:
        return f"{name} {then}, here {commit}, in {path}"
    now = _Patch()
    now.add(tree)
    if _hash_of(bytes(now.text)) != (patch["sha256"] or _hash_of(b"")):
        return f"{name} has changed in {path}"
    return None


def _input_now(
    entry: Facts, run_dir: StrPath, deadline: float = float("inf")
) -> tuple[str, str | None]:
    """Return where an input is now, and what is wrong with it."""
    places = [f"{place}/{entry['path']}" for place in _producer_places(entry, run_dir)]
    found = list(filter(exists, places))
    size = entry.get("size")
    for place in found:
        if size is None or entry.get("mtime") == _utc(os.stat(place).st_mtime):
            return place, None
    if not found:
        return places[-1], "is gone"
    place = found[0]
    now = os.stat(place).st_size
    if not now and size:
        return place, "is empty"
    if now != size:
        return place, f"has {now} bytes, not {size}"
    digest = _sha256(place, deadline)
    outputs = _rows(_read_json(f"{_run_of(place)}/metadata.json"), "outputs")
    known = {output.get("path"): output.get("sha256") for output in outputs}
    if digest is not None and known.get(entry["path"]) == digest:
        return place, None  # only its time is another
    return place, "has changed"


def _fetch(place: str, base: Facts, former: str) -> list[str]:
    """Make a repository with the commit of a base; return what turns filters off."""
    commit = _word(base, "commit")
    if base and not re.fullmatch("[0-9a-f]{40,64}", commit):
        raise _Unknown(f"{commit!r} is no commit")
    os.makedirs(place, exist_ok=True)
    kind = {64: "sha256"}.get(len(commit), "sha1")
    _new_git(place, "init", "-q", "--template=", f"--object-format={kind}")
    tree = _Repository(place, [])
    tree.read_config()
    if not base:
        return tree.switches
    url = re.sub(f"[^/]*{REDACTED}[^/]*@", "", _word(base, "url"))
    if url:
        _new_git(place, "remote", "add", "--", "origin", url)
    problem = "they are gone"
    everything = "+refs/heads/*:refs/remotes/origin/*"
    sources = [source for source in (former, url) if source != former or isdir(former)]
    for source in filter(None, sources):
        # Not every server gives a commit that is asked for by its name.
        for words in (("--depth=1", "--", source, commit), ("--", source, everything)):
            try:
                _new_git(place, "fetch", "-q", *words)
                checkout = ("checkout", "-q", "--detach", commit, "--")
                _new_git(place, *tree.switches, *checkout)
                return tree.switches
            except _Unknown as reason:
                problem = str(reason)
    nobody = f"neither {former!r} nor {url or 'a remote'!r}"
    raise _Unknown(f"{nobody} has commit {commit[:12]}: {problem}")


def _new_git(place: str, *words: str) -> bytes:
    protocols = "file:git:http:https:ssh"
    return _git_run(place, *words, protocols=protocols, timeout=FETCH_SECONDS)


def _run_again(plan: _Plan, target: str, tolerance: float, is_quiet: bool) -> Facts:
    """Run the command in the new tree as a run of its own; return how it compares."""
    import subprocess  # nosec

    words, place = plan.command(target)
    env = {**os.environ, REPRODUCES: plan.folder}
    venv = f"{target}/.venv"
    if isdir(venv):
        path = os.pathsep.join([f"{venv}/bin", env.get("PATH", "")])
        env.update(VIRTUAL_ENV=venv, PATH=path)
    if plan.origin != "this process":
        base = f"{target}/results/{plan.run.path.parent.name}"
        prefix = re.split(f"-{_STAMP}", plan.run.name)[0]
        ours = ["run", "--base-dir", base, "--prefix", prefix]
        words = [sys.executable, __file__, *ours, "--", *words]
    options: Any = {}
    if is_quiet:  # its log has it
        options["stdout"] = subprocess.DEVNULL
    sys.stdout.flush()
    done = subprocess.run(words, cwd=place, env=env, **options)  # nosec
    for root in (target, dirname(plan.run_dir)):
        for path in _walk_runs(root):
            again = Run(path, row=False)
            if _at(again.metadata, "reproduces", "run_dir") == plan.folder:
                return _compared(plan.run, again, tolerance)
    raise ValueError(f"it ended with status {done.returncode}; no run recorded it")


def _compared(then: Run, now: Run, tolerance: float) -> Facts:
    before, after = _outcome(then), _outcome(now)
    rows: list[Facts] = []
    nothing = _hash_of(b"")
    for kind, key in {**before, **after}:
        old, new = before.get((kind, key)), after.get((kind, key))
        if kind == "log" and (None in (old, new) or old == new == nothing):
            continue  # the streams were not kept in the same way, or had nothing
        row = {"kind": kind, "key": key, "then": old, "now": new}
        rows.append({**row, "verdict": _verdict(kind, old, new, tolerance)})
    level, is_same = _level_reached(then, rows, tolerance)
    return {"run": str(now.path), "rows": rows, "level": level, "same": is_same}


def _outcome(run: Run) -> dict[tuple[str, str], JSON]:
    """Return how a run ended, and its metrics, the hashes of its files and its log."""
    found: dict[tuple[str, str], JSON] = {}
    for key in ("status", "exit_code"):
        found["end", key] = run.status.get(key)
    for name, facts in run.raw_summary.items():
        for part in ("last", "min", "max"):
            if name != "time" and isinstance(facts, dict):
                found["metric", f"{part}({name})"] = facts.get(part)
    for entry in _left_files(run.path):
        if entry["path"] != "metrics/metrics.jsonl":
            found["file", entry["path"]] = entry["sha256"] or entry["size"]
    names = ("stdout", "stderr", "output")
    stdout, stderr, output = (_sha256(f"{run.path}/logs/{n}.log") for n in names)
    if stderr == _hash_of(b""):  # so stdout has all
        output = stdout
    found["log", "stdout"] = stdout
    found["log", "output"] = output
    return found


def _verdict(kind: str, then: JSON, now: JSON, tolerance: float) -> str:
    """Return "same", "close", "missing", "new", or how a value differs."""
    if then == now:
        return "same"
    if then is None:
        return "new"
    if now is None:
        return "missing"
    old, new = _number(then), _number(now)
    if kind != "metric" or old is None or new is None:
        return "different"
    off = abs(old - new) / (max(abs(old), abs(new)) or 1.0)
    # What follows the clock would be close by accident.
    units = (1, 1e3, 1e6, 1e9)
    is_time = any(abs(new / unit - time.time()) < 86_400 for unit in units)
    if off <= tolerance and not is_time:
        return "close"
    return f"different by {off:.2g}"


def _level_reached(
    then: Run, rows: Sequence[Facts], tolerance: float
) -> tuple[str, bool]:
    """Return the level in a sentence, and whether it may be called the same."""
    kinds = {row["kind"] for row in rows}
    bad = {row["kind"] for row in rows if row["verdict"] not in ("same", "close")}
    if "end" in bad:
        return "different: it ended in another way", False
    if "file" in kinds and not bad & {"file", "metric"}:
        if any(isinstance(row["now"], int) for row in rows if row["kind"] == "file"):
            return "not known: some files have the same size, and no hash", False
        text = "the same files, byte for byte"
        if "log" in bad:
            text += ", but another output"
        return text, True
    if "metric" in kinds and "metric" not in bad:
        text = f"the same metrics within {tolerance:g}"
        if "file" in bad:
            text += ", but other files"
        return text, "file" not in bad
    if kinds == {"end"}:
        return "not known: it left no file, metric or output", False
    if not bad:
        return "the same output, byte for byte", True
    seeds = _enclosing_seeds(then, rows)
    if seeds > 1 and "file" not in bad:
        return f"within the spread of {seeds} seeds", False
    return "different", False


def _enclosing_seeds(run: Run, rows: Sequence[Facts]) -> int:
    """Return how many runs differ only in a seed, 0 if they do not enclose the new."""
    keys = [key for key in run.flat_config if "seed" in key.lower()]
    runs = [Run(path, row=False) for path in _walk_runs(run.path.parent)]
    for group in _fold_seeds(runs, keys):
        if run.folder not in [each.folder for each in group.runs]:
            continue
        for row in rows:
            if row["kind"] == "metric" and row["key"].startswith("last("):
                last = _Key(row["key"])
                known = _numbers(last.value(each) for each in group.runs)
                now = _number(row["now"])
                if now is None or not known or not min(known) <= now <= max(known):
                    return 0
        return len(group.runs)
    return 0


def _show_comparison(comparison: Facts) -> None:
    """Print what came out: first what is not the same, at last the level reached."""
    for row in sorted(comparison["rows"], key=lambda row: row["verdict"] == "same"):
        text = f"{row['kind']} {row['key']}: {row['verdict']}"
        if row["verdict"] != "same" and row["kind"] not in ("file", "log"):
            text += f": {_text(row['then'])}, now {_text(row['now'])}"
        _print(f"   {text}")
    _print(f"{comparison['run']}: {comparison['level']}")


# === Lineage ===
# A run says what it used: files of other runs are found in its config and on its
# command line. Who used a run is found by asking all others.


def _inputs(
    config: Facts | None, argv: Sequence[str], run_dir: Path, cwd: str = ""
) -> list[Facts]:
    """Return an entry for each existing path of another run that a run was given.

    Looked at are the strings of the config, in lists too, and the words of the command
    line: ``a/b.pt``, ``--init=a/b.pt``, ``key=a.pt,b.pt``, ``file:///a/b.pt``,
    ``a/*.pt`` and ``$OLD/b.pt``, relative to `cwd`.
    """
    own = realpath(run_dir)
    is_run = functools.lru_cache(None)(_is_run)  # each folder is looked at once
    deadline = monotonic() + INPUT_SECONDS
    states: dict[str, str] = {}
    entries: dict[str, Facts] = {}
    words = (("argv", word) for word in argv[1:])
    texts = itertools.chain(_strings("", _arguments(config or {})), words)
    for key, text in itertools.islice(texts, MAX_INPUTS):
        for path in _existing_paths(text, cwd):
            if monotonic() > deadline or len(entries) >= MAX_INPUTS:
                return list(entries.values())
            producer = _run_of(path, is_run)
            if producer is None or realpath(producer) == own:
                continue
            if producer not in states:
                states[producer] = Run(producer, row=False).state
            entry = _input(key, path, producer, run_dir, states[producer])
            entries.setdefault(f"{producer}/{entry['path']}", entry)
    return list(entries.values())


def _strings(key: str, value: JSON) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict):
        for name, item in _flattened(key, value).items():
            yield from _strings(name, item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(key, item)


def _existing_paths(text: str, cwd: str) -> Iterator[str]:
    if len(text) > 4096 or "\0" in text:
        return
    value = text.partition("=")[2]
    parts = dict.fromkeys([text, value, *text.split(","), *value.split(",")])
    for part in filter(None, parts):
        path = os.path.expandvars(_without_scheme(part))
        path = join(cwd, os.path.expanduser(path))
        if exists(path):
            yield abspath(path)
        elif _is_glob(path):
            import glob

            with _ignoring(OSError, re.error):
                yield from map(abspath, itertools.islice(glob.iglob(path), MAX_INPUTS))


def _without_scheme(text: str) -> str:
    """Return the path of "file:///data/a%20b.pt" or "file:a.pt", else the text."""
    if not text.startswith("file:"):
        return text
    from urllib.parse import unquote

    return unquote(re.sub("^file:(//[^/]*)?", "", text))  # a host, most often none


def _is_glob(path: str) -> bool:
    """Tell whether a path is a pattern, in at most two of its parts."""
    return len(re.findall(r"[*?[][^/]*", path)) in (1, 2)


def _input(
    key: str, path: str, producer: str, run_dir: StrPath, status: str
) -> Facts:
    """Return the entry of `inputs` in metadata.json for a file of another run."""
    inside = relpath(path, producer)
    if inside.startswith(os.pardir):  # a link into the run
        inside = relpath(realpath(path), realpath(producer))
    entry: Facts = {
        "key": key,
        "run": basename(producer),
        "run_dir": producer,
        "relative": relpath(producer, run_dir),  # holds when a tree is moved
        "path": inside,
        "size": None,
        "mtime": None,
        "status": status,
    }
    with _ignoring(OSError):
        info = os.stat(path)
        if stat.S_ISREG(info.st_mode):
            entry.update(size=info.st_size, mtime=_utc(info.st_mtime))
    return entry


def _warn_of_inputs(inputs: Iterable[Facts]) -> None:
    for entry in inputs:
        why = []
        if entry["status"] in ("failed", "lost"):
            why.append(entry["status"])
        if "superseded" in _tags(_read_lines(f"{entry['run_dir']}/notes.jsonl")):
            why.append("superseded")
        if why:
            what = f"{entry['key']}={entry['path']} comes from {entry['run']}"
            _warn(f"{what}, which is {' and '.join(why)}")


def _record_use(artifact: Path, consumer: str | None, reason: str | None) -> None:
    """Record on both sides that the run `consumer` used a file of another run."""
    path = abspath(artifact)
    producer = _run_of(path)
    if producer is None:
        return
    about: Facts = {
        "artifact_relpath": re.sub("^artifacts/", "", relpath(path, producer)),
        "consumer_run_dir": consumer,
        "reason": reason,
    }
    if consumer is not None and realpath(consumer) != realpath(producer):
        with _tolerating("inputs.jsonl"):
            _add_input(Path(abspath(consumer)), path, producer, reason)
    with _ignoring(OSError):  # the producer's tree may be read-only
        record = _Record.at(Path(producer))
        used: Facts = {"when": _utc(), **about, "host": _hostname(), "user": _user()}
        record.append("artifacts/USED_BY.jsonl", used)
        record.tell_index("artifact_used", **about)


def _add_input(run_dir: Path, path: str, producer: str, reason: str | None) -> None:
    status = Run(producer, row=False).state
    entry = _input("mark_artifact_used", path, producer, run_dir, status)
    if reason is not None:
        entry["reason"] = reason
    if _same_input(entry) in map(_same_input, _read_lines(run_dir / "inputs.jsonl")):
        return
    record = _Record.at(run_dir)
    record.append("inputs.jsonl", {"timestamp_utc": _utc(), **entry})
    _warn_of_inputs([entry])
    with _tolerating("the index"):
        record.tell_index("artifact_used", inputs=[entry["run"]])


def _same_input(entry: Facts) -> str:
    """Return what makes two entries the same: the file, as it was."""
    return _format_json([entry.get(k) for k in ("run_dir", "path", "size", "mtime")])


def _read_inputs(run_dir: StrPath) -> list[Facts]:
    different: dict[str, Facts] = {}
    for entry in [*_recorded_inputs(run_dir), *_read_lines(f"{run_dir}/inputs.jsonl")]:
        if isinstance(entry.get("path"), str):
            different.setdefault(_same_input(entry), entry)
    return list(different.values())


def _producer_places(entry: Facts, run_dir: StrPath) -> list[str]:
    """Return where the run of an input may be: moved with us, or in its place."""
    beside = join(run_dir, _word(entry, "relative") or "?")
    return [normpath(beside), _word(entry, "run_dir") or "?"]


def _recorded_inputs(run_dir: StrPath) -> list[Facts]:
    """Return `inputs` of metadata.json; of an ancestor's run, what its config names."""
    metadata = _readable_bytes(f"{run_dir}/metadata.json", MAX_RECORD)
    if b'\n  "inputs": [],' in metadata:
        return []  # as most have it: not to parse 10,000 of them is worth a line
    run = Run(run_dir, row=False)
    inputs = run.metadata.get("inputs")
    if inputs is not None or not run.config:
        return _rows(run.metadata, "inputs")
    cwd = _word(run.metadata, "working_dir")
    if not isabs(cwd):
        cwd = os.sep
    return _inputs(run.config, _texts(run.metadata, "argv"), run.path, cwd)


class _Lineage:
    """Which runs below a results root used which, read from the runs themselves."""

    def __init__(self, root: Path, run: Path | None = None) -> None:
        """Ask all runs below `root`; with `run`, only those that may have used that."""
        self.root = root
        self.run = run

    @cached_property
    def edges(self) -> dict[tuple[Path, Path], list[str]]:
        """What was used, by who made it and who used it."""
        edges: dict[tuple[Path, Path], list[str]] = {}
        for producer, consumer, path in self._uses():
            paths = edges.setdefault((producer, consumer), [])
            if path == os.curdir:
                path = "its directory"
            if path not in paths[:MAX_INPUTS]:
                paths.append(path)
        return edges

    @cached_property
    def names(self) -> dict[str, str]:
        return {basename(run): run for run in self.tree.runs}

    @cached_property
    def first_names(self) -> dict[str, str]:
        """Where a run is, by the name that it had before it was renamed."""
        return {_first_name(run): run for run in self.tree.runs}

    @cached_property
    def tree(self) -> _Walk:
        return _Walk(str(self.root))

    def users_of(self, run: Path) -> list[str]:
        uses = [(realpath(used), user.name) for used, user in self.edges]
        return sorted({name for used, name in uses if used == realpath(run)})

    def walk(self, start: Path, users: bool) -> Iterator[tuple[int, Path, str]]:
        """Yield (depth, run, what) from `start` on; a run met again is not entered."""
        following: dict[Path, list[tuple[Path, str]]] = {}
        for (producer, consumer), paths in sorted(self.edges.items()):
            here, there = consumer, producer
            if users:
                here, there = producer, consumer
            following.setdefault(here, []).append((there, _format_paths(paths)))
        seen: set[Path] = set()
        waiting = [(0, start, "")]
        while waiting:
            depth, run, text = waiting.pop()
            if run in seen:
                yield depth, run, f"{text} (see above)"
                continue
            if depth:
                yield depth, run, text
            seen.add(run)
            for step in reversed(following.get(run, [])):
                waiting.append((depth + 1, *step))

    def _uses(self) -> Iterator[tuple[Path, Path, str]]:
        consumers = producers = self.tree.runs
        if self.run is not None:
            consumers = _possible_users(self.run, self.tree)
            producers = [str(self.run)]
        for consumer in map(Path, consumers):
            inputs = [(entry, str(entry["path"])) for entry in _read_inputs(consumer)]
            for entry, what in [*inputs, *_ties(consumer)]:
                yield self._where_now(entry, consumer), consumer, what
        for producer in map(Path, producers):
            for row in _read_lines(producer / "artifacts" / "USED_BY.jsonl"):
                consumer = Path(str(row.get("consumer_run_dir") or "?"))
                if not _is_run(consumer):
                    consumer = self._find(consumer)
                path = str(row.get("artifact_relpath"))
                inside = f"artifacts/{path}"
                is_beside = lexists(producer / path)
                if path != os.curdir and (lexists(producer / inside) or not is_beside):
                    path = inside
                yield producer, consumer, path

    def _where_now(self, entry: Facts, consumer: Path) -> Path:
        """Return where a producer is now: moved with us, in its place, or renamed."""
        places = _producer_places(entry, consumer)
        for place in places:
            if basename(place) == entry.get("run") and _is_run(place):
                return Path(realpath(place))
        return self._find(Path(places[-1]))

    def _find(self, path: Path) -> Path:
        """Return the run that had this name; the path itself when there is none."""
        found = self.names.get(path.name) or self.first_names.get(path.name)
        return Path(found or path)


def _possible_users(run: Path, walk: _Walk) -> list[str]:
    """Return the runs that by the index used a run, and those it does not know."""
    runs = [path for path in walk.runs if path not in walk.starts]
    for name in {run.name, _first_name(run)}:
        runs += walk.users_of(name)
    return list(dict.fromkeys(runs))


def _first_name(run: StrPath) -> str:
    return _text(_read_json(f"{run}/status.json").get("run"))


# Keys of metadata.json that tie a run to one other, and what that is called.
_TIES = {"reproduces": "(reproduced)", "parent": "(ran inside)"}


def _ties(run: Path) -> Iterator[tuple[Facts, str]]:
    """Yield the runs that `parent` and `reproduces` in metadata.json name, and how.

    {"run": "train-20260131-142501", "run_dir": ..., "relative": "../train-..."}
    """
    data = _readable_bytes(run / "metadata.json", MAX_RECORD)
    if not re.search(rb'\n  "(reproduces|parent)": [^n]', data):
        return  # null, as with most: not to parse 10,000 of them is worth a line
    metadata = _read_json(f"{run}/metadata.json")
    for key, what in _TIES.items():
        tied = metadata.get(key)
        if isinstance(tied, dict):
            yield tied, what


def _tied_names(run: Run) -> list[str]:
    return [f"{tied.get('run')} {what}" for tied, what in _ties(run.path)]


# === Redaction ===
# No secret reaches the disk. Facts are redacted widely, by the name of a value, by its
# shape and by its place; code narrowly, since a rebuilt file must still run.

REDACTED = "<REDACTED>"
SECRET_FILES = (  # hold secrets by nature: never in a patch
    rb"(?i)(^|/)(\.env(\.(?!example$|sample$|template$|dist$)[^/]+)?|[^/]+\.env"
    rb"|id_(rsa|dsa|ecdsa|ed25519)(_sk)?|credentials|kubeconfig"
    rb"|secrets?\.(json|ya?ml|toml|ini|env)"
    rb"|[._](netrc|npmrc|pypirc|pgpass|htpasswd|s3cfg|boto|git-credentials|dockercfg)"
    rb"|[^/]+\.(pem|key|p12|pfx|p8|jks|keystore|kdbx|ppk)|\.(ssh|aws|gnupg|kube)/.*"
    rb"|[^/]*(credential|client_secret|service[-_]account)[^/]*\.(json|ya?ml|ini))$"
)


class _Redactor:
    """What this process has found secret, and the only way from data to disk.

    The methods called `learn` remember; all others are pure.
    """

    def __init__(self) -> None:
        self.known: set[str] = set()
        self.pattern: re.Pattern[str] | None = None  # of all, once it is needed
        self.keys: dict[str, str] = {}  # of mappings, as they are without secrets

    def learn(self, data: JSON) -> None:
        facts = _Facts(_Redactor())
        facts.value(data)
        self.learn_values(facts.learned)

    def learn_code(self, data: bytes, name: bytes) -> list[_Find]:
        """Remember what a file has of secrets; return where they stand, for `code`."""
        text, _ = _decoded(data)
        finds = _code_finds(text, name)
        more: list[_Find] = []
        if self.is_secret_file(name, data):
            more = _fact_finds(text)
        self.learn_finds(text, [*finds, *more])
        return finds

    def learn_finds(self, text: str, finds: Iterable[_Find]) -> None:
        """Remember what was found in a file, unless so much that it is a table."""
        values = set()
        for start, end, grade in finds:
            if grade >= _RANDOM:
                value = text[start:end].encode("latin-1", "ignore")
                values.add(value.decode("utf-8", "surrogateescape"))
        if len(values) <= MAX_LEARNED:
            self.learn_values(values)

    def learn_values(self, values: Iterable[str]) -> None:
        before = len(self.known)
        for value in values:
            self.known.update(_worth_knowing(value))
        if len(self.known) > before:
            self.pattern = None
            self.keys = {}

    def data(self, value: JSON) -> JSON:
        return _Facts(self).value(value)

    def text(self, text: str) -> str:
        return _Facts(self).text(text)

    def redacted_keys(self, data: JSON) -> list[str]:
        clean = _flattened("", self.data(data)).values()
        pairs = zip(_flattened("", data).items(), clean)
        return [key for (key, before), after in pairs if not _is_same(before, after)]

    def code(
        self, data: bytes, name: bytes, finds: list[_Find] | None = None
    ) -> bytes:
        """Return the content of a file without secrets; `name` is its path.

        What parsed before parses after: what is replaced stands in quotes or a comment,
        or is a value in a file that is known to be configuration.
        """
        text, encoding = _decoded(data)
        if not encoding:
            return self.replace_known(data)
        if finds is None:
            finds = _code_finds(text, name)
        clean = _replaced(text, finds)
        clean = self.without_known(clean, _marker_unless_a_name)
        if clean == text:
            return data
        return clean.encode(encoding, "surrogatepass")

    def replace_known(self, data: bytes) -> bytes:
        return self.without_known(data.decode("latin-1")).encode("latin-1")

    def is_secret_file(self, name: bytes, data: bytes) -> bool:
        """Return whether a file holds secrets by nature, as `.env` and `id_rsa` do."""
        if not re.search(SECRET_FILES, name):
            return False
        is_pem = name.lower().endswith((b".pem", b".key")) and b"-----BEGIN " in data
        return not is_pem or b"PRIVATE KEY" in data

    def holds_secrets(self, data: bytes, name: bytes) -> bool:
        """Return whether a file has a secret, or is one that does by nature."""
        return self.is_secret_file(name, data) or self.code(data, name) != data

    def without_known(
        self, text: str, marker: str | Callable[[re.Match[str]], str] = REDACTED
    ) -> str:
        if not self.known:
            return text
        return self.known_pattern().sub(marker, text)

    def known_places(self, text: str) -> list[int]:
        if not self.known:
            return []
        return [match.start() for match in self.known_pattern().finditer(text)]

    def known_pattern(self) -> re.Pattern[str]:
        """Return the pattern of the known values in a text or a decoded file."""
        if self.pattern is None:
            encoded = [known.encode("utf-8", "surrogateescape") for known in self.known]
            values = self.known.union(data.decode("latin-1") for data in encoded)
            longest_first = sorted(values, key=len, reverse=True)
            self.pattern = re.compile(_alternation(longest_first))
        return self.pattern


_redactor = _Redactor()


def _worth_knowing(value: str) -> Iterator[str]:
    """Yield what is looked for elsewhere when a value is secret."""
    if MIN_SECRET <= len(value) <= MAX_SECRET and not _is_harmless(value):
        yield value
        yield json.dumps(value)[1:-1]  # as it stands in a file of JSON
    for line in value.splitlines()[1:]:  # a log shows a private key line by line
        if len(line) >= 32 and not line.startswith("-----"):
            yield line


def _alternation(values: Sequence[str], depth: int = 3) -> str:
    """Return a regular expression for any of the values, which come longest first.

    It is a tree of their first letters: to try hundreds one by one would be slow.
    """
    if depth == 0 or len(values) == 1:
        return "|".join(map(re.escape, values))
    groups: dict[str, list[str]] = {}
    for value in values:
        groups.setdefault(value[:1], []).append(value[1:])
    branches = []
    for first, rests in groups.items():
        branches.append(f"{re.escape(first)}(?:{_alternation(rests, depth - 1)})")
    return "|".join(branches)


def _marker_unless_a_name(match: re.Match[str]) -> str:
    """Return the marker, but a word as it is where it may be a name of the code."""
    value = match[0]
    text = match.string
    around = text[match.start() - 1 : match.start()] + text[match.end() :][:1]
    is_quoted = around in ("''", '""')
    if value.isidentifier() and not is_quoted and not _is_random(value, 16):
        return value
    return REDACTED


# A secret in a text: its begin, its end and its grade (see `_grade`), which from
# `_RANDOM` on has it looked for elsewhere.
if TYPE_CHECKING:
    _Find = tuple[int, int, int]


def _replaced(text: str, finds: Iterable[_Find]) -> str:
    pieces = []
    done = 0
    for start, end, _ in sorted(finds, key=lambda find: (find[0], -find[1])):
        if end > done:
            pieces += [text[done : max(done, start)], REDACTED]
            done = end
    return "".join([*pieces, text[done:]])


def _cut_middle(text: str, limit: int) -> str:
    """Keep both ends of a long text, and no piece of a token at the cut."""
    if len(text) <= limit:
        return text
    head = text[: limit // 2]
    head = head[: max(head.rfind(" "), head.rfind("\n"), len(head) - 4096)]
    tail = re.sub(r"\A[^ \n]+", "", text[-limit // 2 :])
    return f"{head}... {len(text) - len(head + tail)} characters ...{tail}"


def _decoded(data: bytes) -> tuple[str, str]:
    """Return the text of a file, and the encoding that makes it bytes again.

    Any bytes are text in Latin-1, one character each; PowerShell writes UTF-16. Where
    they have zeros and are no UTF-16, both are "".
    """
    encoding = "latin-1"
    even, odd = data[0:400:2], data[1:400:2]
    if data.startswith(b"\xfe\xff") or even.count(0) * 10 > len(even) * 9 > 30:
        encoding = "utf-16-be"
    elif data.startswith(b"\xff\xfe") or odd.count(0) * 10 > len(odd) * 9 > 30:
        encoding = "utf-16-le"
    with _ignoring(UnicodeDecodeError):
        text = data.decode(encoding, "surrogatepass")
        if "\0" not in text[:8192]:
            return text, encoding
    return "", ""


class _Facts:
    """A walk through plain data that replaces what is secret."""

    def __init__(self, redactor: _Redactor) -> None:
        self.redactor = redactor
        self.learned: list[str] = []
        self.depth = 0

    def value(self, value: JSON, name: str = "", above: int = 0) -> JSON:
        """Return a value without secrets; `above` is the grade of what holds it."""
        if isinstance(value, str):
            return self.named_text(value, name, above)
        if not isinstance(value, (dict, list)):
            return value  # a number is never a secret
        if self.depth > 2 * MAX_DEPTH:  # only a foreign file has so many levels
            return REDACTED
        self.depth += 1
        if isinstance(value, dict):
            clean: JSON = self.mapping(value, name, above)
        elif name == "argv" or any(map(_is_long_flag, value)):
            clean = self.argv(value)
        else:
            clean = self.items(value, name, above)
        self.depth -= 1
        return clean

    def mapping(self, values: Facts, name: str, above: int) -> Facts:
        within = max(above, _grade(name))
        if "value" in values and isinstance(values.get("name"), str):
            # {"name": "DB_PASSWORD", "value": "..."}
            within = max(within, _grade(values["name"]))
        texts = {k: v for k, v in values.items() if isinstance(v, str)}
        harmless = self.harmless({*texts, *texts.values()}, within)
        harmless.discard("command")  # whose value is read as a shell reads it
        clean = {}
        for key, value in values.items():
            if key in harmless and texts.get(key) in harmless:
                clean[key] = value
            else:
                clean[self.key(key)] = self.value(value, key, within)
        return clean

    def items(self, values: list[JSON], name: str, above: int) -> list[JSON]:
        texts = {value for value in values if isinstance(value, str)}
        harmless = self.harmless(texts, max(above, _grade(name)))
        clean = values.copy()
        for number, value in enumerate(values):
            if not isinstance(value, str) or value not in harmless:
                clean[number] = self.value(value, name, above)
        return clean

    def harmless(self, many: set[str], above: int) -> set[str]:
        """Return those of many texts that can hold no secret, by one look at all.

        To search for a few strings in everything is quicker than for patterns in each
        of 12,000 variables. What it passes over has nothing that `text` replaces.
        """
        if len(many) < 16 or above != _NONE:
            return set()
        texts = list(many)
        whole = "\0".join(texts)
        if not whole.isascii():
            return set()
        ends = list(itertools.accumulate([len(text) + 1 for text in texts]))
        doubtful = {text for text in texts if len(text) > MAX_REDACTED}
        for place in self.redactor.known_places(whole):
            doubtful.add(texts[bisect.bisect_right(ends, place)])
        lower = whole.lower()
        long = _long_words(lower, 16, _ALNUM) | _long_words(lower, 34, _NAMED)
        for hint in [*_HINTS, *long]:
            place = lower.find(hint)
            while place >= 0:
                number = bisect.bisect_right(ends, place)
                doubtful.add(texts[number])
                place = lower.find(hint, ends[number])
        return many - doubtful

    def key(self, key: str) -> str:
        keys = self.redactor.keys
        if key not in keys:
            if len(keys) >= MAX_KEYS:
                return self.text(key)
            keys[key] = self.text(key)
        return keys[key]

    def named_text(self, value: str, name: str, above: int) -> str:
        """Return what stands under a name, as a whole or without the secrets in it."""
        grade = _grade(name)
        if grade < _RANDOM <= above and (_is_random(value, 6) or _is_chosen(value)):
            grade = _SURE  # {"secrets": {"mail": "x8Qp2r"}}
        if _is_secret(grade, value):
            return self.secret(value, grade)
        if name == "command":
            with _ignoring(ValueError):  # a quote that is not closed
                words = shlex.split(value)
                if shlex.join(words) == value:
                    return shlex.join(self.argv(words))
        return self.text(value)

    def argv(self, words: list[JSON]) -> list[JSON]:
        """Redact `--flag value`, `--flag=value`, `-u user:password` and the like."""
        clean = []
        flag = ""
        for word in words:
            if isinstance(word, str):
                clean.append(self.word(word, flag))
                flag = _next_flag(word, flag)
            else:  # in a config of somebody
                clean.append(self.value(word, flag))
        return clean

    def word(self, word: str, flag: str) -> str:
        option = _re(r"[-+]{0,2}([A-Za-z0-9_][\w.@/-]{0,100})=").match(word)
        is_whole = word[0:1].isalnum() and _is_secret(_grade(flag), word)
        if option and not (is_whole and _re(_NO_WORD).search(option[1])):
            return option[0] + self.named_text(word[option.end() :], option[1], _NONE)
        if word.startswith("-p") and _is_secret_in_code(_SURE, word[2:]):
            return "-p" + self.secret(word[2:], _SURE)
        if _is_flag(word):
            return word
        if flag in _USER_FLAGS:
            pair = _re(r"([^\s:/@]{1,100}:)(\S{4,})").fullmatch(word)
            if pair and not _is_harmless(pair[2]):
                return pair[1] + self.secret(pair[2], _SURE)
        is_secret = flag == "sshpass" and _is_secret(_MIXED, word)
        if flag in ("login", "-p", "-a") and _is_random(word, 16):
            is_secret = flag == "login" or not _re(_HEX).fullmatch(word)
        if is_secret:
            return self.secret(word, _SURE)
        return self.named_text(word, flag, _NONE)

    def text(self, text: str) -> str:
        """Return a text without the secrets that their shape or place shows."""
        if len(text) < MIN_SECRET:
            return text
        text = _cut_middle(text, MAX_REDACTED)
        finds = _fact_finds(text)
        for start, end, grade in finds:
            self.secret(text[start:end], grade)
        return self.redactor.without_known(_replaced(text, finds))

    def secret(self, value: str, grade: int) -> str:
        """Return the marker; remember what it stands for unless that is a lone word."""
        if grade >= _RANDOM and _is_mixed(value):
            self.learned.append(value)
        return REDACTED


def _long_words(text: str, least: int, characters: str) -> set[str]:
    """Return the words of these characters that are at least so long."""
    words = text.encode("latin-1", "replace").translate(_all_but(characters)).split()
    return {word.decode() for word in words if len(word) >= least}


@functools.cache
def _all_but(characters: str) -> bytes:
    """Return a table for bytes.translate that turns all others into blanks."""
    others = bytes(set(range(256)) - set(characters.encode()))
    return bytes.maketrans(others, b" " * len(others))


_USER_FLAGS = ("-u", "--user", "--proxy-user", "-a", "--auth", "--creds")


def _is_long_flag(word: JSON) -> bool:
    return isinstance(word, str) and word.startswith("--")


def _is_flag(word: str) -> bool:
    """Return whether a word is a flag; a password may begin with a dash as well."""
    if not re.match(r"--?[A-Za-z]", word):
        return False
    return word.startswith("--") or not _is_random(word[1:], 8)


def _next_flag(word: str, flag: str) -> str:
    """Return what the word after this one may be the value of."""
    programs = ("login", "sshpass")
    if flag in programs and word.startswith("-") and _grade(word) == _NONE:
        return flag  # `login --relogin KEY`
    if word in programs or (_is_flag(word) and "=" not in word):
        return word
    return ""


def _fact_finds(text: str) -> list[_Find]:
    """Return the secrets of a text that their shape or place shows."""
    if len(text) < 20 and text.isidentifier():
        return []  # no token is so short
    finds = [*_named_in_fact(text), *_logins_of_urls(text)]
    finds += _found_by(_PLACE_RULES, text, _is_secret_in_code)
    finds += _found_by(_FACT_RULES, text, _is_secret)
    tokens = [*filter(_is_shaped, _re(_FACT_TOKEN).finditer(text))]
    for match in _re(_LONG_WORD).finditer(text):
        if _is_token(match[0]):
            tokens.append(match)
    return finds + [(*match.span(), _SURE) for match in tokens]


def _is_shaped(token: re.Match[str]) -> bool:
    return token["loose"] is None or _is_like_token(token["loose"])


def _named_in_fact(text: str) -> Iterator[_Find]:
    """Yield the secrets of `name = value`, `"name": "value"` and `--name value`."""
    done = 0
    for name, grade in _graded_names(text):
        if name.start() < done:
            continue  # it is part of a value
        separator = _ASSIGNS
        if name[0].startswith("-"):
            separator = rf"(?:{_ASSIGNS}|\s{{1,9}}|[\"'],\s{{0,40}})"
        match = _re(separator + _FACT_VALUE).match(text, name.end())
        if match is None:
            continue
        group = match.lastindex or 0
        value = match[group]
        if len(value) > 100:
            done = match.end()
        if group == 2:  # it is not in quotes
            value = value.rstrip(",;)]}")
            is_expression = _re(_EXPRESSION).match(value) and _surprise(value) < 0.5
            if is_expression or _is_flag(value):
                continue
        if len(value) >= 6 and _is_secret(grade, value) and _is_mixed(value):
            start = match.start(group)
            yield (start, start + len(value), grade)


def _graded_names(text: str) -> Iterator[tuple[re.Match[str], int]]:
    """Yield the words of a text that may be names of secrets, each with its grade."""
    done = 0
    text = text.replace("\u0130", "I")  # alone becomes two characters in lower case
    for stem in _re(_STEMS).finditer(text.lower()):
        place = stem.start()
        if place < done:
            continue
        start = place - len(_last_name(text[max(0, place - 100) : place]))
        name = _re(r"[\w.-]+").match(text, start)
        if name is None:
            continue
        done = name.end()
        grade = _grade(name[0])
        if grade != _NONE:
            yield name, grade


def _last_name(text: str) -> str:
    return text[len(text.rstrip(_NAMED)) :]


def _found_by(
    rules: Iterable[tuple[str, str]], text: str, is_secret: Callable[[int, str], bool]
) -> Iterator[_Find]:
    """Yield what the rules find that need a string which the text has."""
    for needed, pattern in rules:
        if needed not in text:
            continue
        for match in _re(pattern).finditer(text):
            grade = _grade(match.groupdict().get("name", "password"))
            group = match.lastindex or 0
            if is_secret(grade, match[group]):
                yield (*match.span(group), grade)


def _logins_of_urls(text: str) -> Iterator[_Find]:
    """Yield `user:password` of URLs, but no port, no template and not git@."""
    if "://" not in text:
        return
    for pattern in (_WEB_USERINFO, _USERINFO):
        for match in _re(pattern).finditer(text):
            user, password = match.groups()
            if password is None:
                if len(user) > 30 or _is_like_token(user):
                    yield (*match.span(1), _SURE)
            elif not _re(_NO_USERINFO).fullmatch(password):
                yield (match.start(1), match.end(2), _NONE)
                yield (*match.span(2), _SURE)  # which alone is remembered


def _is_token(word: str) -> bool:
    """Return whether a word is `prefix-random`, the shape providers give to tokens.

    >>> _is_token("acme_live_" + "a1B2c3D4" * 3), _is_token("Qwen2-VL-7B-Instruct-Int4")
    (True, False)
    """
    prefix, *rest = _re(r"[-_.~]").split(word)
    longest = max(rest, key=len, default="")
    need = 16
    if _re(_MARKED).search(word):
        need = 10
    if len(longest) < need or len(prefix) > 20 or _re(_HASHED).fullmatch(prefix):
        return False
    if _re(r"[0-9a-f]+|[0-9A-F]+").fullmatch(longest):
        return len(longest) >= 32 and len(rest) <= 3
    if _re(r"\d").search(longest):
        return _is_random(longest, need)
    return bool(_re("[a-z][A-Z]").search(longest)) and _is_random(longest, 24)


# One of these is in any name of a secret (see _grade).
_STEMS = "pass|pw|secret|token|key|cred|auth|cookie|jwt|bearer|psk|pat|sas|dsn|login"
# One of these, or a long word, is in any text that has a secret.
_HINTS = (
    f"{_STEMS}|://|earer |asic |hook|/t/|-u|?|&|;|eyj|aiza|xox|xapp|live|test|prod"
    "|sandbox|api|tkn|sk|seck"
).split("|")
_ALNUM = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"
_NAMED = _ALNUM + "_.-"  # the characters of names and tokens
# What follows a name. A value without quotes ends where the next `name=` begins, as in
# lr=0.1,password=a;b,wd=0.2
_ASSIGNS = r"\\?[\"']{0,2}\]?[ \t]{0,40}(?::=|=>|[:=](?!=))[ \t]{0,40}"
_FACT_VALUE = (
    r"(?:\\?[\"']{1,2}([^\s\"'\\][^\"'\\\n]{3,500})"
    r"|((?:(?![,;&][\w.-]{1,40}[=:])[^\s\"']){4,500}))"
)
# In code a name is given what a call, an item, an attribute or another name stands for.
_EXPRESSION = (
    r"[\w.:]*[(\[{]|[^`]*`|[A-Za-z_]\w*(\.[A-Za-z_]\w*)+\W*$|[A-Za-z_]+\W*$"
)
# Prefixes of tokens, and of what only looks like one.
_MARKED = (
    r"(?i)(^|[-_.])(live|test|prod|sandbox|secret|api|pat|tkn|token|oauth|pw|key|sk"
    r"|[a-z]*seck)(?=[-_.])"
)
_HASHED = (
    r"(?i)sha\d*|md5|commit|rev|git|hash|digest|blob|run|job|exp|ckpt|model|id|v\d*"
    r"|img|env|step|layer|snapshot|checkpoint|version|data|cache|tmp|build|node|ver|ipy"
    r"|batch|file|resp|msg|req"
)
# Tokens that are told by their beginning and length: AWS, Google, Hugging Face, GitHub,
# npm, Databricks, Mailgun, OpenAI, Stripe, Slack, Atlassian.
_SHAPES = (
    r"(?:AKIA|ASIA|ABIA|ACCA|A3T[A-Z0-9])[A-Z0-9]{16}|AIza[\w-]{30,}"
    r"|hf_[A-Za-z0-9]{30,}|gh[a-z]_[A-Za-z0-9]{36,}|github_pat_\w{40,}"
    r"|npm_[A-Za-z0-9]{36}|dapi[0-9a-f]{32}(?:-\d)?|key-[0-9a-f]{32}"
    r"|sk-(?=[A-Za-z]*\d)[A-Za-z0-9]{20,}|[sr]k_(?:live|test)_\w{16,}"
    r"|(?:xox[a-z]|xapp)-[\w-]{10,}|ATATT3[\w-]{50,}"
)
# The same, where a part must be random: JWT, Google, OpenAI and Anthropic, PyPI,
# GitLab, SendGrid, Vault.
_LOOSE_SHAPES = (
    r"eyJ[\w-]{8,2000}(?:\.[\w-]{2,4000}){1,2}|ya29\.[\w-]{20,}|GOCSPX-[\w-]{20,}"
    r"|sk-[A-Za-z0-9_-]{20,}|pypi-[\w-]{40,}|[a-z]{2,12}_pat_[\w-]{20,}"
    r"|gl(?:[a-z]{2,6}-[A-Z0-9]|(?:pat|rt|dt|ptt|cbt)-\w)[\w-]{19,}|SG\.[\w.-]{20,}"
    r"|hv[bsr]\.[\w-]{24,}"
)
# Shapes that have another meaning in code: Twilio, Telegram, Discord, Facebook.
_FACT_SHAPES = (
    r"eyJ[A-Za-z0-9+/_-]{60,8000}={0,2}|S[Kk][0-9a-fA-F]{32}|\d{8,10}:[\w-]{35}"
    r"|[MNO][\w-]{22,27}\.[\w-]{6,7}\.[\w-]{27,}|EAA[A-Za-z0-9]{60,}"
)
# Any prefix before so much that it is no id, whose random part is shorter. Hexadecimal
# digits are a hash unless the prefix says what they are.
_PREFIXED = (
    rf"(?!(?:{_HASHED[4:]})[-_])"
    r"(?:[a-z]{1,7}\d?[-_]){1,3}"
    r"(?P<loose>(?=.*[a-z])(?=.*(?:\d[A-Z]|[A-Z]\d))[\w-]{32,})"
    r"|(?:[a-z]{1,7}\d?_)?(?:[a-z]*pat|pt|[a-z]*key|api|sk|tok|token|secret|dop_v1)[-_]"
    r"(?P<hex>[0-9a-f]{32,})(?:_[0-9a-f]+)?"
)
_CODE_TOKEN = rf"(?:{_SHAPES}|(?P<loose>{_LOOSE_SHAPES}))(?!\w)"
_FACT_TOKEN = rf"(?<![\w/.+-])(?:{_FACT_SHAPES}|{_CODE_TOKEN})(?!\w)"
_LONG_WORD = r"(?<![\w/.+@:~-])[A-Za-z][\w.~-]{19,600}={0,2}(?![\w/+(])"
_KEY_HEADER = r"-----BEGIN [A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?-----"
# A whole private key, or its end alone, as in the last lines of a log.
_KEY_BLOCK = (
    rf"(?s){_KEY_HEADER}.*?(?:-----END [^-]*-----|\Z)"
    r"|(?:[A-Za-z0-9+/=]{1,76}\s{1,9}){1,999}-----END [A-Z0-9 ]{0,40}PRIVATE KEY-----"
)
# In a URL of the web the first slash begins the path; the password of a database may
# have one.
_WEB = r"(?:\w{1,4}\+)?(?:https?|ssh|git|s?ftp)://"
_USER = r"([^\s/@:\"'<>]{0,200})"
_WEB_USERINFO = rf"\b{_WEB}{_USER}(?::([^\s/\"'<>]{{1,500}}))?@"
_USERINFO = (
    rf"\b(?!{_WEB})[a-zA-Z][\w+.-]{{1,20}}://{_USER}"
    r"(?::((?:(?!://)[^\s\"'<>]){1,500}))?@"
)
_NO_USERINFO = r"\d{1,5}(/.*)?|.*[][{}<>].*|\$\w+|%s"

# A rule is a string that a text must have and a pattern. The last group of the pattern
# is the secret, or all of it; a group `name` has its name, else it is a password.
_FACT_RULES = (
    ("PRIVATE KEY", _KEY_BLOCK),
    (" ", r"(?i)(?P<name>\btoken|api[ _-]?key)(?: provided| is)?:?[ ][\"']?"
          r"(?=\D*\d)([\w.+/~-]{12,300}={0,2})(?<!\.)"),
    ("=", r"(?i)[?&;](?:sig|signature|code|x-[\w-]*-(?:signature|credential))"
     r"=([^&\s#'\"<>]{4,})"),
)
_PLACE_RULES = (  # in facts and in code
    ("login ", r"login\s{1,9}(?:\S{1,80}\s{1,9}password\s{1,9}([^\s\"'\\]{6,})"
               r"|[^\n]{0,120}?-p +[\"']?([^\s\"']{6,200})"
               r"|(?:--?[\w-]+[ \t]+){0,3}([\w+/=.-]{20,200}))"),
    ("earer ", r"earer[ \t]+([\w.~+/=-]{16,512})"),
    ("asic ", r"asic[ \t]+([\w+/=-]{16,512})"),
    ("oken ", r"uthorization\W{1,6}f?\W?[tT]oken[ \t]+([\w.~+/=-]{16,512})"),
    ("-u", r"-u(?:s[e]r)?[ \t=]+\\?[\"']?[\w.@-]{1,60}:([^\s\"'\\`]{8,200})"),
    ("sshpass ", r"sshpass +-p *[\"']?([^\s\"']{6,200})"),
    ("redis-cli ", r"redis-cli\b[^\n]{0,80} -a +[\"']?([^\s\"']{6,200})"),
    ("hook", r"/(?:services|workflows|webhooks?)/([\w/-]{24,})"),
    ("/t/", r"://[\w.:@%-]{1,99}(?:/[\w.-]{1,60}){0,3}/t/([\w-]{9,200})/"),
)


# Where secrets stand in code. Random values are found first and then their names, since
# code has few of these and many names with `key` and `token`.


def _code_finds(text: str, name: bytes) -> list[_Find]:
    finds = [*_tokens_in_code(text), *_private_keys_in_code(text)]
    finds += _literals_in_code(text)
    finds += _assigned_in_code(text)
    finds += _found_by(_PLACE_RULES + _CODE_RULES, text, _is_secret_in_code)
    if re.search(_SCRIPTS, name):
        finds += _found_by(_SCRIPT_RULES, text, _is_secret_in_code)
    if re.search(_CONFIGURATION, name) or text.startswith("#!/bin/"):
        finds += _values_in_configuration(text)
    return finds


def _tokens_in_code(text: str) -> Iterator[_Find]:
    # To look at the long words is quicker than to search for forty beginnings.
    for word in _long_words(text, 20, _NAMED):
        token = _re(_CODE_TOKEN).match(word)
        around = _NAMED
        if token is None and len(word) >= 36:
            token = _re(_PREFIXED).fullmatch(word)
            around = _NAMED + "/=+@:#"  # else part of an address, or after `sha256=`
        if not token or not _is_shaped(token) or _re(_EXAMPLE).search(word):
            continue
        place = text.find(word)
        while place >= 0:
            if place == 0 or text[place - 1] not in around:
                yield (place, place + token.end(), _SURE)
            place = text.find(word, place + 1)


def _private_keys_in_code(text: str) -> Iterator[_Find]:
    if "PRIVATE KEY" not in text:
        return
    for header in _re(_KEY_HEADER).finditer(text):
        line = _re(_KEY_LINE).match(text, header.end())
        while line is not None:
            yield (*line.span(1), _SURE)
            line = _re(_KEY_LINE).match(text, line.end())


def _literals_in_code(text: str) -> Iterator[_Find]:
    """Yield the random literals that stand under a secret's name."""
    is_no_word = _re(_NO_WORD).search
    is_between = _re(_BETWEEN).match
    for match in _re(r"[\"'`]([^\s\"'`\\]{8,512})(?=\\?[\"'`])").finditer(text):
        value = match[1]
        if not is_no_word(value) or is_between(value):
            continue
        if not _is_random(value, 8) and not _is_chosen(value):
            continue
        start = match.start()
        before = text[max(0, start - MAX_BEFORE) : start].lower()
        if not _re(_STEMS).search(before):
            continue
        if text[start - 1 : start] == "\\":  # in a string of JSON
            start -= 1
        elif text[start - 2 : start] in ('""', "''"):
            start -= 2
        if _is_name_of_secret(value):
            continue
        grade = _grade_of_literal(text, start)
        if _is_secret_in_code(grade, value):
            yield (*match.span(1), grade)


def _grade_of_literal(text: str, start: int) -> int:
    """Return the grade of the name under which a literal stands.

    >>> _grade_of_literal('os.getenv("DB_PASSWORD", "x")', 25)
    5
    """
    before = text[max(0, start - MAX_LINE) : start]
    patterns = [_ASSIGNED, _FLAGGED, _SECOND_ARGUMENT, _RETURNED, _SPACED]
    if before.endswith((" or ", " else ", "|| ", "?? ")) or " ? " in before[-60:]:
        patterns = [_OTHERWISE, _ITEM_OTHERWISE, *patterns]
    for pattern in patterns:
        match = _re(pattern).search(before)
        if match is None or (pattern == _OTHERWISE and _grade(match[1]) == _NONE):
            continue
        name = match[1]
        if pattern == _SECOND_ARGUMENT and "--" not in match[0]:
            if text[max(0, _opener_before(text, start))] != "(":
                continue  # one of several words: ["password2", "new_password2"]
        grade = _grade(name)
        owner = before[: match.start()].rstrip("\"'")
        if owner.endswith("["):  # secrets["mail"] = "..."
            grade = max(grade, _grade(_last_name(owner[:-1])))
        if name.lower() in ("default", "value", "fallback", "parametervalue"):
            # - name: DB_PASSWORD
            #   value: "..."
            names = ["", *_re(_PAIRED).findall(before[: match.start()])]
            grade = _grade(names[-1])
        elif grade >= _RANDOM or _tells_about(name):
            return grade
        return max(grade, _grade_around(text, start))  # login(key="...")
    return _grade_around(text, start)


def _grade_around(text: str, place: int) -> int:
    """Return the grade of the call, list or mapping in which a literal stands."""
    found = _NONE
    for _ in range(3):
        opener = _opener_before(text, place)
        if opener < 0:
            break
        before = text[max(0, opener - MAX_LINE) : opener]
        grade = _NONE
        name = _last_name(before)
        if name and text[opener] in "({":
            before = before[: -len(name)].rstrip(_NAMED + ":")
            if re.search(r"\b(def|class|func|fn|function) +\Z", before):
                break  # what stands here are parameters
            grade = _grade(re.sub(r"\.(append|add|push)\Z", "", name))
            if _re(_LOGIN_CALL).search(name):
                grade = _MIXED
        match = _re(_ASSIGNED).search(before) or _re(_LABEL).search(before)
        if match and len(match[1]) > 2:
            grade = max(grade, _grade(match[1]))
            if text[opener] == "(" and match[1].endswith("auth"):
                grade = _MIXED  # auth=("user", "password")
        if grade >= _RANDOM:
            return grade
        if grade == _TOKEN:
            found = grade
        place = opener
    return found


def _opener_before(text: str, place: int) -> int:
    start = max(0, place - MAX_BEFORE)
    depth = 0
    for match in reversed(list(_re(r"[][(){}]").finditer(text, start, place))):
        if match[0] in ")]}":
            depth += 1
        elif depth == 0:
            return match.start()
        else:
            depth -= 1
    return -1


def _is_secret_in_code(grade: int, value: str) -> bool:
    """Return whether a value in code is a secret: random, no example, no template."""
    if grade == _NONE or _is_harmless(value):
        return False
    if _re(_EXAMPLE).search(value) or _re(_TEMPLATE).search(value):
        return False
    if _re(r"[a-z]+\d{0,4}(?:[_-][a-z]+\d{0,4})+").fullmatch(value):
        return False  # pbkdf2_sha256
    if grade == _SURE:
        return _is_random(value, 8) or _is_chosen(value)
    if grade == _MIXED:
        return _is_random(value, 10) or _is_chosen(value)
    if grade < _TOKEN or (grade == _RANDOM and "-" in value):
        if _re(_HEX).fullmatch(value):
            return False  # the key of a cache is a hash, a place has a UUID
    least = 25
    if grade >= _TOKEN and _re(r"\d").search(value):
        least = 16
    if len(value) < least or not _re(r"[\w.~+/=%:;,|@-]+").fullmatch(value):
        return False  # too short, or the tables of a parser
    return _is_secret(min(grade, _TOKEN), value)


def _is_name_of_secret(value: str) -> bool:
    """Tell names from what they name: params.get("v3AuthPass"), kFp8DynamicTokenSym."""
    is_name = value.isidentifier() and _surprise(value) < 0.5
    return is_name and _grade(value) != _NONE


def _assigned_in_code(text: str) -> Iterator[_Find]:
    for match in _re(_ASSIGNED_VALUE).finditer(text):
        if not _re(_NO_WORD).search(match[1]) or _is_name_of_secret(match[1]):
            continue
        before = text[max(0, match.start() - MAX_LINE) : match.start()]
        before = before.rstrip(" \t\"'\\]")
        name = _last_name(before)
        if name.lower() == "key":  # API key: ...
            name = _last_name(before[: -len(name)].rstrip()) + "_key"
        grade = _grade(name)
        if grade < _MIXED or before.endswith(f":{name}"):  # arn:aws:secret:name
            continue
        if _is_secret_in_code(grade, match[1]):
            yield (*match.span(1), grade)


# What random values have, and most words do not: to look for it is quick.
_NO_WORD = r"\d|[a-z][A-Z]|[!@#$%^&*+=?;,]"
# What stands directly before a literal: `name: str = "`, `"name": "`, `x["name"] = r"`.
_ASSIGNED = (
    r"(?<![\w.-])([\w.-]{1,100})\\?[\"']?\]?\s{0,60}"
    r"(?::\s?(?:[\"'][\w |.\[\]]+[\"']"
    r"|[\w. |&']{1,60}(?:\[[\w.\[\], |()=\"']{0,60}\])?[\w. |]{0,20})"
    r"|\[\d*\]|string|\{ ?get;[\w ;]*\})?\s{0,60}"
    r"(?:(?:[:!=+?]|\|\|)?=>?|:|<-)"
    r"\s{0,60}\\?\s{0,60}@?[(\[{]?\s{0,60}[rbfuRBFU]{0,2}\Z"
)
_FLAGGED = (  # --name "...", #define name "..."
    r"(?<![\w-])(?:--|(?:define|ENV|ARG)\s)\s{0,20}([\w-]{1,100})[ =\t]\s{0,20}\Z"
)
_OTHERWISE = (  # name = os.getenv("x") or "...", name = x if y else "..."
    r"(?<![\w.-])([\w.-]{1,100})[ \t]{0,20}=(?!=)[ \t]?[^\n]{1,100}"
    r"(?:\bor|\|\||\?\?|\belse|\?[^\n?]{1,60}:) \Z"
)
_ITEM_OTHERWISE = (  # os.getenv("name") or "..."
    r"[\"']([\w.-]{1,100})[\"'][)\]][^\n\"']{0,60}(?:\bor|\|\||\?\?|\belse) \Z"
)
_SECOND_ARGUMENT = r"[\"'](?:--)?([\w.-]{1,100})\\?[\"']\s{0,40},\s{0,40}[rbfu]{0,2}\Z"
_LOGIN_CALL = r"(?i)(login|basic_?auth|networkcredential)\Z"
_LABEL = r"[\"']([\w.-]{1,100})[\"']\s{0,20}\Z"  # variable "db_password" {
_RETURNED = r"\bdef (\w{1,100})\([^\n]{0,100}\n\s{1,20}return [bru]?\Z"
_SPACED = r"(?<![\w.-])([\w.-]{1,100})[ \t]{1,9}\Z"  # PASSWORD '...', auth_token "..."
_PAIRED = (
    r"(?:\b(?:Parameter)?(?:[nN]ame|[kK]ey)\\?[\"']?\s{0,20}[:=]\s{0,20}\\?[\"']?"
    r"|[\"']--|\([\"'])"
    r"([\w.-]{1,100})"
)
# Eight characters with a letter, a digit and punctuation, but no date or user@host. A
# word in brackets or before them is code.
_CHOSEN = (
    r"(?!\d{4}-\d\d|[\w.+-]+@[A-Za-z./_-]+\Z)(?=.*[A-Za-z])(?=.*\d)"
    r"(?=.*[!@#$%^&*;,?+~])(?!.*(?:[a-z]{3}[(\[]|[(\[{<][a-z_]{3}|[(\[]\?))"
    r"[^\s\\]{8,64}\Z"
)
# What stands between two literals, and is no base64.
_BETWEEN = r"[])},:;.+&|?=](?![\w+/]+=*\Z).*[(\[{,:;=+.&|?!]\Z"
# What stands for a value or makes one: f-strings, `%`, URLs, regular expressions.
_TEMPLATE = (
    r"\{[^{}]*\}|<[^<>]*>|[{<][A-Za-z_]+[.\[(]?\Z|\$\{|%\(|%[A-Z_]{3,}%"
    r"|%[A-Za-z][^\w%]{0,3}%[A-Za-z]|://|^arn:|-[zZ9][aA0]-|0-9\]"
)
_EXAMPLE = (
    r"(?i)example|\.\.\.|x{6}|\*{4}|1234567|abcdefg|your|dummy|fake|placeholder"
    r"|redacted"
)
_BETWEEN_LINES = r"(?:\s|\\[nrt\n]|[\"'+,()]|[\w-]{1,40}: [\w,-]{1,80}\n)*"
_KEY_LINE = (
    rf"{_BETWEEN_LINES}([A-Za-z0-9+/=]{{32,}}(?![A-Za-z0-9+/=.])"
    rf"|[A-Za-z0-9+/=]{{1,76}}(?={_BETWEEN_LINES}-----END))"
)
_ASSIGNED_VALUE = r"[:=][ \t]{0,60}([A-Za-z0-9+/_.~-]{16,512}={0,2})(?![\w(\[{])"
_CODE_RULES = (
    ("--", r"--(?P<name>[A-Za-z][\w-]{1,60})(?:=|[ \t]+)([^\s\"'\\`]{8,512})"),
    ("env ", r"env(?:(?<=%env)|(?<=%set_env))[ \t]+(?P<name>\w+)[ =]"
             r"([^\s\"'\\]{8,512})"),
    # A password, a query, and a user, but for hexadecimal digits, which Sentry does not
    # keep secret.
    ("://", r"://(?:[\w.%-]{0,60}:(?!\d{1,5},)([^\s\"'\\/@]{8,200})@"
            r"|(?![0-9a-f]+@)([A-Za-z0-9_-]{20,200})@[\w.-]+"
            r"|[^\s\"'<>?]{1,200}\?[^\s\"'<>?]{0,200}?\b(?:key|token|sig)="
            r"([\w+/%-]{20,500}={0,2})(?![\w(]))"),
    ("assword=", r"assword=(?<![\w.-].assword=)(?<=[pP]assword=)"
                 r"(?!\w+(?:\.\w+)+(?:[^\w!@#$%^&*+=?-]|\Z))"
                 r"([^\s;\"'<>()[\]]{8,200})"),
    ("PASSWORD '", r"PASSWORD '([^'\n]{6,200})'"),  # SQL
    ("IDENTIFIED BY '", r"IDENTIFIED BY '([^'\n]{6,200})'"),
    (":AA", r":(?<=\d{8}:)(AA[\w-]{33})(?![\w-])"),  # Telegram
    ("mysql", r"mysql\w*[ \t][^\n\"']{0,99}? -p([^\s\"'\\-][^\s\"'\\]{7,99})"),
    ("@tcp(", r"[\"'`][\w.-]{1,60}:([^\s\"'`]{8,200})@tcp\("),
    ("<<<", r"(?:login|token)[^\n]{0,60}<<< *[\"']?([^\s\"']{6,200})"),
    ("-stdin", r"echo +[\"']?([^\s\"'|]{6,200})[\"']? *\|[^\n]{1,90}-stdin"),
    ("sudo -S", r"echo +[\"']?([^\s\"'|]{6,200})[\"']? *\| *sudo -S"),
)

_SCRIPTS = rb"(?i)\.(t?csh|cmake|plist|ps1|json|ya?ml|sh|bash|zsh)$|cmakelists\.txt$"
_SCRIPT_RULES = (
    ("name", r"value[\"']?: *[\"']?(?=[^\s\"']+[\"']?,?\s{1,60}[\"']?name[\"']?:"
             r" *[\"']?(?P<name>[\w.-]+))([^\s\"']{8,500}?)(?=[\"']?,?\s)"),
    ("</key>", r"<key>(?P<name>[\w.-]{1,60})</key>\s{0,40}<string>([^<\s]{6,500})</"),
    ("setenv ", r"setenv[ \t]+(?P<name>\w+)[ \t]+[\"']?([^\s\"']{8,512})"),
    ("set(", r"set\((?P<name>\w+)[ \t]+[\"']?([^\s\"')]{8,512})"),  # CMake
    ("SecureString ", r"ConvertTo-SecureString +[\"']([^\"'\n]{6,200})"),
)


# Where secrets stand in configuration, whose values need no quotes.


def _values_in_configuration(text: str) -> Iterator[_Find]:
    """Yield the values under the names of secrets, wherever a format puts them."""
    done = 0
    names = [*_graded_names(text)]
    if "kind: Secret" in text:
        data = _re(r"(?m)^(data|stringData)(?=:)").finditer(text)
        names += [(name, _SURE) for name in data]
        names.sort(key=lambda graded: graded[0].start())
    for name, grade in names:
        if name.start() < done:
            continue  # it is part of a value
        patterns = [*_BLOCKS, *_VALUES]
        if text[name.start() - 1 : name.start()] == "[":
            patterns.insert(0, _SECTION)
        elif name[0].startswith("--"):
            patterns.append(_NEXT_ITEM)
        for pattern in patterns:
            match = _re(pattern).match(text, name.end())
            if match is None:
                continue
            values = match[1]
            each = _PLAIN_VALUE
            if pattern in _VALUES:
                each = _ONE_VALUE
                if not values.startswith("${") and _grade(values) < _MIXED:
                    done = match.end(1)
            if pattern == _BLOCKS[0]:
                values = _indented(values, text[: name.start()].rpartition("\n")[2])
            for word in _re(each).finditer(values):
                value = word[1].rstrip(",;)]}")
                if _is_secret_in_code(grade, value):
                    start = match.start(1) + word.start(1)
                    yield (start, start + len(value), grade)
            break


def _indented(lines: str, before: str) -> str:
    """Return the lines of a block of YAML; `before` stands left of its name.

    An item of a list may begin right below the name.
    """
    depth = len(before) - len(before.lstrip(" "))
    end = 0
    for line in lines.splitlines(keepends=True):
        inner = line.lstrip(" ")
        if len(line) - len(inner) <= depth and not inner.startswith("- "):
            break
        end += len(line)
    return lines[:end]


_CONFIGURATION = (
    rb"(?i)(^|/)([^/]*\.(env|ini|cfg|conf|cnf|ya?ml|toml|sh|bash|zsh|fish|ksh|tf|tfvars"
    rb"|hcl|properties|sbatch|slurm|pbs|service|ps1|bat|cmd|envrc|xml)|[^/]*env\.[^/]*"
    rb"|\.env[^/]*|[^/]*dockerfile[^/]*|containerfile|[^/]*makefile|\.?(netrc|npmrc"
    rb"|pypirc|condarc|pgpass|boto|s3cfg|bashrc|zshrc|profile|bash_profile))$"
)
# What may follow the name; the group has the value or the values.
_SECTION = r"\][ \t]*\r?\n((?:[^\n\[][^\n]{0,500}\n?){1,30})"  # of an ini file
_NEXT_ITEM = r"[\"']?\s{1,60}- +(\S{1,500})"  # of the arguments in a list of YAML
_BLOCKS = (
    # A list or a mapping of YAML, whose lines are indented.
    r"[\"']?:[ \t]*\r?\n((?:[ \t]+(?:- |[\w.-]{1,99}:)[^\n]{0,500}\n?){1,30}"
    r"|(?:- [^\n]{0,500}\n?){1,30})",
    # A list or a mapping on one line.
    r"[\"']?[ \t]*[:=][ \t]*([\[{]\s{0,60}[^\n]{1,1000})",
)
_VALUES = (
    # A value on the next line, with or without `>-` and `|`.
    r"[\"']?:[ \t]*(?:[|>]\d?[-+]?|!!?\w+)?[ \t]*(?:#[^\n]*)?\r?\n[ \t]+([^\s:]{1,500})"
    r"[ \t]*(?:\r?\n|\Z)",
    # Kubernetes: the name is itself the value of `name:`.
    r"[\"']?(?:\s{1,60}(?:#[^\n]*\s{1,60})?|, *)value:[ \t]*(?:[|>][-+]?\s{1,60})?"
    r"([^\s]{1,500})",
    # A value, which ends where the next `name=` begins.
    r"[\"']?\]?[ \t]*(?:[:?+]?=|:-?)[ \t]*(?:\\\r?\n[ \t]*|[!&]\w+[ \t]+)?"
    r"((?:(?![,;&][\w.-]{1,40}[=:])[^\s]){1,500})",
    r"[ \t]+([^\s=:]{1,500})",  # ENV NAME value, password VALUE of .netrc
    r">([^<\s]{1,500})</",  # XML
)
_ONE_VALUE = r"[\"'\[{(]{0,3}([^\s\"'#\[{(][^\s\"']*)"
# In the group: the first word of a line, after a dash or a name of its own.
_PLAIN_VALUE = (
    r"(?m)(?:^|(?<=[\s\[{,]))[ \t]*(?:- +)?(?:[\w.-]+[ \t]*[:=](?!=)[ \t]*)?"
    r"[\"'\[{(]{0,3}(?![\w.-]+:[ \t]*$)([^\s\"'#\[{(][^\s\"']*)"
)


# What a name tells. A grade says what the value must look like to be a secret.

_NONE = 0
_WEAK = 1  # `key`, `token_id`: a value like a token, looked for nowhere else
_TOKEN = 2  # `token` alone: the same, but a hash in code, which a `key` may well be
_RANDOM = 3  # `auth`, `secret` in the midst of a name: a random value
_MIXED = 4  # `api_key`: a value that is more than a word
_SURE = 5  # `password`: any value


def _word_set(text: str) -> frozenset[str]:
    return frozenset(text.split())


_WORDS = r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+"
_SURE_WORDS = _word_set("password passwd passphrase passcode secret credential")
_LAST_WORDS = (
    (_SURE, _SURE_WORDS),
    (_MIXED, _word_set("pass pwd pw pswd pword apikey")),
    (_RANDOM, _word_set("pat sas psk auth authorization bearer cookie jwt dsn")),
)
# What stands before `key` when it is secret.
_KEY_OF = _word_set(
    """api access private secret signing encryption master license account storage
    application app deploy fernet auth service subscription ssh shared admin client
    consumer session root webhook encrypt sign jwt"""
)
# What stands before `token` in a language model, whose tokens are words, and in an API
# where a token is a place in a list, or marks a request.
_TOKEN_OF = _word_set(
    """pad eos bos unk mask sep cls image video audio stop start end special eot sot
    prefix middle suffix max min per num first last think tool new extra bad
    placeholder initializer trigger class instance prompt query object control begin
    forced decoder suppress"""
)
_PLACE_OF = _word_set("change request action continuation page sync purchase next")
# The last words of a name whose value only tells something about a secret.
_ABOUT_WORDS = _word_set(
    """id name file path dir folder url uri host type len length size count limit num
    ttl expiry enabled disabled required policy version algorithm backend provider
    manager field column prefix suffix pattern format mode level rate seconds timeout
    budget index dim dtype class free endpoint issuer scope"""
)
_HASH_WORDS = _word_set(
    """hash hashes sha md digest digests checksum checksums fingerprint fingerprints
    thumbprint sig signature commit revision etag hashed"""
)
_QUESTION_WORDS = _word_set("ask no prompt")  # --ask-password has no value
# Words that are run together: PGPASSWORD, accesskey, SSHPASS, hftoken; no compass.
_RUN_TOGETHER = (
    r"(\w*?)(password|passwd|passphrase|passcode|credential|secret|token|pwd|key)s?"
    r"|(ssh|db|user|mail|smtp|admin|root|sql|mysql|ldap|ftp|require|master)(pass)"
)


@functools.lru_cache(maxsize=16_384)
def _grade(name: str) -> int:
    """Return how surely a value under this name is a secret.

    >>> _grade("DB_PASSWORD"), _grade("accessKey"), _grade("sort_key"), _grade("lr")
    (5, 4, 1, 0)
    """
    if not _re(_STEMS).search(name.lower()):
        return _NONE
    words = _name_words(name[-200:])
    is_public = "public" in words or "pub" in words
    if not words or words[0] in _QUESTION_WORDS or is_public:
        return _NONE
    before = ""
    inner = _NONE
    for word in words[:-1]:
        is_key = word == "key" and before in _KEY_OF
        if is_key or word in _SURE_WORDS or word in ("token", "tokens"):
            inner = _RANDOM
        before = word
    last = words[-1]
    if last in _HASH_WORDS:
        return _NONE
    if last in _ABOUT_WORDS:
        return min(inner, _WEAK)
    return max(inner, _grade_of_last(before, last))


def _grade_of_last(before: str, last: str) -> int:
    """Return the grade of a name that ends in these two words."""
    for grade, words in _LAST_WORDS:
        if last in words:
            return grade
    if last in ("key", "tokens") and before in _KEY_OF:
        return _MIXED
    if last == "key":
        return _WEAK
    if last == "tokens" or (last == "token" and not before):
        return _TOKEN
    if last != "token" or before in _PLACE_OF:
        return _NONE
    if before in _TOKEN_OF:
        return _WEAK
    return _MIXED


def _name_words(name: str) -> list[str]:
    """Return the words of a name in lower case, those of secrets in the singular."""
    words = []
    for found in _re(_WORDS).findall(name):
        word = found.lower()
        match = _re(_RUN_TOGETHER).fullmatch(word)
        if match is None:
            words.append(word)
        else:
            words += filter(None, match.groups())
        if word.endswith("tokens"):
            words[-1] = "tokens"  # of a text, more often than of a service
    return words


def _tells_about(name: str) -> bool:
    """Return whether the value under a name is an id, a path, a hash or the like."""
    words = _name_words(name)[-1:]
    return not words or words[0] in _HASH_WORDS or words[0] in _ABOUT_WORDS


# What a value tells.


def _is_secret(grade: int, value: str) -> bool:
    """Return whether a value is a secret under a name of this grade."""
    if grade == _NONE or len(value) < 4 or _is_harmless(value):
        return False
    if grade == _SURE:
        return True
    if grade == _MIXED:
        if value.startswith("/") and not _is_like_token(value):
            return False  # PWD=/home/ann/My Projects
        return len(value) >= 6 and _is_mixed(value)
    if grade == _RANDOM:
        return _is_random(value, 8)
    is_uuid = grade == _TOKEN and len(value) == 36 and _is_random(value, 36)
    return is_uuid or _is_like_token(value)


def _is_chosen(value: str) -> bool:
    """Return whether a value looks as what people choose: Winter-2024!"""
    return _re(_CHOSEN).match(value) is not None


def _is_mixed(value: str) -> bool:
    """Return whether a value is more than a word or two."""
    if _re(r"\d|[a-z][A-Z]|[^\w\s.]").search(value[:4096]):
        return True
    return _is_random(value, 8)


def _is_like_token(value: str) -> bool:
    """Return whether a value has a long random piece, or random pieces alone."""
    pieces = _re(r"[-_.:~/]").split(value[:4096])
    if _is_random(max(pieces, key=len), 16):
        return True
    long = [piece for piece in pieces if len(piece) > 4]
    return len("".join(long)) >= 16 and all(_is_random(piece, 5) for piece in long)


def _is_random(value: str, length: int) -> bool:
    """Return whether a value of at least this length was chosen by a machine.

    >>> _is_random("kX9vQz2LmW", 8), _is_random("Qwen2-7B-Instruct", 8)
    (True, False)
    """
    value = value[:256].rstrip("=")
    if len(value) < length or _re(r"\s").search(value):
        return False
    if _re(_HEX).fullmatch(value):
        return True
    # No name goes so often from letters to digits and back without a separator.
    changes = _re(r"(?i)[a-z](?=\d)|\d(?=[a-z])").findall(value)
    if len(value) >= 30 and len(changes) >= 4 and value.isalnum():
        return True
    # How many neighbours do not go together in words: of random letters and digits two
    # pairs in three, of hexadecimal digits one in two, of names in code one in ten.
    return _surprise(value) >= 0.3


def _surprise(value: str) -> float:
    """Return which share of the neighbours in a value do not go together in words."""
    return sum(map(_pair_surprise, value, value[1:])) / max(len(value) - 1, 1)


# 128 bits or more, with letters and digits: a hash, a UUID, or a secret.
_HEX = (
    r"(?=.*\d)(?=.*[a-fA-F])([0-9a-f]{20,}|[0-9A-F]{20,}"
    r"|[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12})"
)
# The letters that follow a letter in the words of English and the names of code: of all
# pairs of letters less than half, of the pairs in real words 96 percent.
_FOLLOWERS = {
    "a": "bcdefgiklmnprstuvwxyz", "b": "aceilorsuy", "c": "acehikloprstuy",
    "d": "adeilorstu", "e": "abcdefgilmnopqrstuvwxy", "f": "aefilorstuy",
    "g": "aeghilmnoprsu", "h": "aeiortuy", "i": "abcdefgklmnoprstvxz", "j": "aeo",
    "k": "aeils", "l": "acdeilmopstuvy", "m": "abeilmopsu",
    "n": "abcdefgiklmnoprstuvy", "o": "abcdefgiklmnoprstuvw", "p": "aehiloprstuy",
    "q": "u", "r": "acdefgiklmnoprstuvy", "s": "acdefhiklmnoprstuwy",
    "t": "acdehilmoprstuy", "u": "abcdefgilmnprst", "v": "aeio", "w": "aehinors",
    "x": "ceilpt", "y": "eimnpst", "z": "aeiu",
}


@functools.lru_cache(maxsize=8192)
def _pair_surprise(first: str, second: str) -> float:
    """Return 1 for two characters that do not follow each other in a word, else 0."""
    pair = first + second
    if ord(second) - ord(first) in (0, 1):
        return 0.0  # aa, xyz, 123
    if pair.isalpha():
        if second.lower() not in _FOLLOWERS.get(first.lower(), ""):
            return 1.0
        if first.islower() and second.isupper():
            return 0.5
    elif pair.isalnum():
        if not pair.isnumeric():
            return 1.0
    elif _re("[!@#$%^&*+=?;,]").search(pair):
        return 0.5
    return 0.0


# Numbers, placeholders, references, public keys and names of files.
_HARMLESS = (
    r"(?s)[-+]?[\d.,_]+([eE][-+]?\d+)?|0[xX][\da-fA-F]{1,16}|[*/-]+|[xX]+|"
    r"(?i:true|false|yes|no|on|off|none|null|nan|empty|redacted|changeme)|"
    r"<[^<>]*>|\[[^\]]*\]|\$\w+|%\(?\w+\)?s?|\$?\{[^\"]*\}|((ssh-\w+|ecdsa-\S+) )?"
    r"AAAA[A-Z][23](Nz|Vj).*|"
    r"[\w-]+(\.[\w-]+)*\.(json|ya?ml|txt|pem|key|env|toml)"
)
_PATH = (
    r"(file:|unix:)?(~|\.{1,2}|[A-Za-z]:)?"
    r"([/\\](?=[\w.@%+-]*[A-Za-z])[\w.@%+-]{1,64}){1,32}/?"
)


def _is_harmless(value: str) -> bool:
    """Return whether a value is none that one would keep secret, whatever its name."""
    if len(value) >= 4096:
        return False
    if _re(_HARMLESS).fullmatch(value):
        return True
    if _re(_PATH).fullmatch(value) and not _is_like_token(value):
        return True
    return value.startswith("/") and "\0" not in value and lexists(value)


@functools.cache
def _re(pattern: str) -> re.Pattern[str]:
    """Return a compiled pattern; to compile all of them at import would take 6 ms."""
    return re.compile(pattern)


# What `audit` searches.


class _Audit:
    """Secrets in the files of runs, by file and line; what they are is never told."""

    def __init__(self, root: StrPath) -> None:
        self.root = os.fspath(root)
        self.found: list[Facts] = []  # file, and line, which is None in a binary file
        self.unread: dict[str, str] = {}  # by file, why it was not searched
        self.searched = 0  # files
        self.binary = 0  # those of them that are searched for known values only

    def search(self, places: Iterable[StrPath]) -> None:
        """Search files, and all files below folders; no link is followed."""
        paths: list[str] = []
        for place in places:
            for path in _files_below(os.fspath(place)):
                paths.append(path)
                text, _ = _decoded(self.read(path))
                _redactor.learn_finds(text, _audit_finds(text, os.fsencode(path)))
        for path in paths:
            self.search_file(path, self.read(path))

    def read(self, path: str) -> bytes:
        try:
            return _read_bytes(path)
        except OSError as error:
            self.unread[self.name(path)] = error.strerror or str(error)
            return b""

    def search_file(self, path: str, data: bytes) -> None:
        name = self.name(path)
        if name not in self.unread:
            self.searched += 1
        text, _ = _decoded(data)
        places = [start for start, _, _ in _audit_finds(text, os.fsencode(path))]
        places += _redactor.known_places(text)
        ends = [match.start() for match in re.finditer("\n", text)]
        lines: list[JSON] = sorted({bisect.bisect_left(ends, at) + 1 for at in places})
        if data and not text:
            self.binary += 1
            if _redactor.replace_known(data) != data:
                lines = [None]
        self.found += [{"file": name, "line": line} for line in lines]

    def name(self, path: str) -> str:
        return _redactor.text(relpath(path, self.root))


def _files_below(place: str) -> list[str]:
    """Return a regular file, or those below a folder, in order; links lead out."""
    paths = [place]
    for folder, folders, names in os.walk(place):
        folders.sort()
        paths += [join(folder, name) for name in sorted(names)]
    return [path for path in paths if isfile(path) and not os.path.islink(path)]


def _audit_finds(text: str, name: bytes) -> list[_Find]:
    """Return the secrets in a file of a run; all but code is searched for facts too."""
    if name.endswith((b".patch", b".diff")):
        # Without the signs each line begins as in its file, perhaps configuration.
        return _code_finds(_re(r"(?m)^[-+ ]").sub(" ", text), b".env")
    finds = _code_finds(text, name)
    if not name.endswith((b".py", b".ipynb")):
        finds += _fact_finds(text)
    return finds


# === Plain data ===
# Any object becomes dict, list, str, int, float, bool or None, and these become the
# same text everywhere.


def _config_document(command: str, args: object) -> Facts:
    plain = _plain(args)
    if plain is None:
        plain = {}
    if isinstance(plain, dict) and plain.get("command", command) == command:
        return {"command": command, **plain}
    return {"command": command, "args": plain}


def _plain(value: object, whole: bool = False) -> JSON:
    """Return any object as plain data; read it once, do not change it, never raise.

    What has no natural form becomes its repr, and what is beyond the limits of a
    config (Settings) a text in angle brackets; `whole` lifts the limits. Keys become
    strings as in JSON, with a number added when one is taken.
    """
    scale = 1
    if whole:
        scale = 1_000_000
    try:
        return _Conversion(scale).plain(value)
    except RecursionError:
        return "<no room left on the call stack>"


class _Conversion:
    """One conversion: how much may still be written, and which objects are around."""

    def __init__(self, scale: int) -> None:
        self.scale = scale  # of the limits
        self.room = MAX_NODES * scale  # values that may still be written
        self.parents: set[int] = set()  # ids of the objects that are being converted

    def plain(self, value: Any) -> JSON:
        kind = type(value)  # not isinstance(), which believes a mock's __class__
        self.room -= 1
        if value is None or kind is bool:
            return value
        if issubclass(kind, str):
            text = _shortened(str.__str__(value), MAX_TEXT * self.scale)
            self.room -= len(text) // 100  # one text in many places is many texts
            return text
        if issubclass(kind, int):
            value = int.__int__(value)
            if value.bit_length() > MAX_INT_BITS:
                return f"<int of {value.bit_length()} bits, {hex(value)[:40]}...>"
            return value
        if issubclass(kind, float):
            return float.__float__(value)
        if id(value) in self.parents:
            return "<cycle>"
        if len(self.parents) >= MAX_DEPTH:
            return f"<{_type_name(kind)} nested too deeply>"
        self.parents.add(id(value))
        try:
            return self.compound(value, kind)
        except Exception as error:
            _raise_if_foreign(error)
            return _short_repr(value)
        finally:
            self.parents.discard(id(value))

    def compound(self, value: Any, kind: Any) -> JSON:
        """Return what is no scalar, by the first of these rules that fits its type."""
        for base in kind.__mro__:
            convert = _NATURAL_FORMS.get(_type_name(base))
            if convert is not None:
                return self.plain(convert(value))
        fields = _field_names(kind)
        if fields is not None:
            return self.mapping(fields, lambda name: getattr(value, name))
        is_array = hasattr(kind, "tolist") or hasattr(kind, "iloc")
        if is_array and hasattr(kind, "shape"):
            return self.array(value, kind)
        if hasattr(kind, "keys") and hasattr(kind, "__getitem__"):
            return self.mapping(value.keys(), lambda key: value[key])
        if issubclass(kind, (list, tuple, set, frozenset)):
            return self.sequence(value, kind)
        if kind is range and len(value) <= MAX_ARRAY:
            return list(value)
        if hasattr(kind, "__fspath__"):
            return self.plain(os.fspath(value))
        # "<Config object at 0x7f...>" tells nothing, but its attributes do.
        if kind.__repr__ is object.__repr__ and getattr(value, "__dict__", None):
            return self.plain(vars(value))
        return _short_repr(value)

    def mapping(self, keys: Any, read: Callable[[Any], Any]) -> dict[str, JSON]:
        result: dict[str, JSON] = {}
        for key in self.within_limits(keys):
            name = self.plain(key)
            if not isinstance(name, str):
                name = json.dumps(name)
            while name in result:
                name += f" ({len(result) + 1})"
            try:
                result[name] = self.plain(read(key))
            except Exception as error:  # a property, a missing mandatory value
                _raise_if_foreign(error)
                result[name] = f"<unreadable: {_short_repr(error)}>"
        more = len(keys) - len(result)
        if more > 0:
            result["<more>"] = f"<{more} more keys>"
        return result

    def sequence(self, items: Any, kind: Any) -> list[JSON]:
        result = [self.plain(item) for item in self.within_limits(items)]
        if issubclass(kind, (set, frozenset)):  # in the same order in each process
            result.sort(key=str)
            with _ignoring(TypeError):  # numbers alone sort as numbers
                result.sort()
        more = len(items) - len(result)
        if more > 0:
            result.append(f"<{more} more items>")
        return result

    def within_limits(self, items: Any) -> Iterator[Any]:
        """Yield the items that there is room for."""
        count = len(items)
        if count > MAX_ITEMS * self.scale + 1:  # of one more there would be a marker
            count = MAX_ITEMS * self.scale
        for item in list(itertools.islice(items, count)):
            if self.room > 0:
                yield item

    def array(self, value: Any, kind: Any) -> JSON:
        """Return the numbers of a small array or tensor, a summary of any other."""
        import math

        shape = tuple(value.shape)
        is_apart = kind.__module__.startswith("torch.distributed")
        is_apart = is_apart or hasattr(kind, "iloc")
        if math.prod(shape) <= MAX_ARRAY * self.scale and not is_apart:
            try:
                items = value
                if getattr(value.dtype, "char", "") in [*"MmgG"]:
                    items = value.astype(str)  # times, long doubles
                return self.plain(items.tolist())
            except Exception as error:
                _raise_if_foreign(error)
        facts = f"shape={shape}"
        for name in ("dtype", "device"):
            if hasattr(kind, name):
                facts += f" {name}={getattr(value, name)}"
        return f"<{_type_name(kind)} {facts}>"


def _shortened(text: str, limit: int) -> str:
    """Return text that has a UTF-8 form, with a count of what is beyond the limit."""
    if not text.isascii():  # a lone surrogate has no UTF-8 form
        text = text.encode("utf-8", "backslashreplace").decode("utf-8")
    rest = text[limit:]
    if not rest or re.fullmatch(r"\.\.\. <\d+ more characters>", rest):
        return text
    return f"{text[:limit]}... <{len(rest)} more characters>"


def _short_repr(value: object) -> str:
    """Return the repr of an object without its address; never raise."""
    try:
        text = str.__str__(repr(value))
    except Exception as error:
        _raise_if_foreign(error)
        text = f"<{_type_name(type(value))}, repr raises {_type_name(type(error))}>"
    return _shortened(re.sub(r" at 0x[0-9A-Fa-f]+", "", text), MAX_REPR)


def _type_name(kind: type) -> str:
    """Return "numpy.ndarray", from "<class 'numpy.ndarray'>"."""
    return type.__repr__(kind)[8:-2]


def _field_names(kind: Any) -> list[str] | None:
    fields = getattr(kind, "__attrs_attrs__", None)
    if hasattr(kind, "__dataclass_fields__"):
        fields = sys.modules["dataclasses"].fields(kind)
    if fields is not None:
        return [field.name for field in fields]
    names = getattr(kind, "_fields", None)
    if issubclass(kind, tuple) and names is not None:
        return list(names)
    return None


def _bytes_text(value: Any) -> str:
    text = repr(bytes(value[:MAX_REPR]))
    if len(value) > MAX_REPR:
        text += f"... <{len(value)} bytes>"
    return text


def _enum_value(member: Any) -> str:
    if type(member.value) is str:
        return member.value
    return member.name or str(member)  # a sum of flags has no name


def _function_name(function: Any) -> str:
    return f"{function.__module__}.{function.__qualname__}"


def _omegaconf_container(config: Any) -> object:
    """Return an OmegaConf container, its interpolations resolved where they can be."""
    to_container = sys.modules["omegaconf"].OmegaConf.to_container
    try:
        return to_container(config, resolve=True)
    except Exception as error:
        _raise_if_foreign(error)
    written = to_container(config, resolve=False)
    keys: Iterable[Any] = range(len(written))
    if isinstance(written, dict):
        keys = list(written)
    for key in keys:
        try:
            written[key] = config[key]
        except Exception as error:
            _raise_if_foreign(error)
    return written


def _absl_flags(flags: Any) -> dict[str, object]:
    """Return the values of absl's FLAGS; of absl's own flags those that were given."""
    values = {}
    for name in flags:
        owner = str(flags.find_module_defining_flag(name))
        if flags[name].present or not owner.startswith("absl."):
            values[name] = flags[name].value
    return values


def _pydantic_fields(model: Any) -> dict[str, object]:
    return {**vars(model), **(getattr(model, "__pydantic_extra__", None) or {})}


# By the name of a type, or of one of its bases, so that nothing is imported.
_NATURAL_FORMS: dict[str, Callable[[Any], object]] = {
    "absl.flags._flagvalues.FlagValues": _absl_flags,
    "argparse.Namespace": vars,
    "array.array": list,
    "builtin_function_or_method": _function_name,
    "bytearray": _bytes_text,
    "bytes": _bytes_text,
    "collections.deque": list,
    "datetime.date": lambda date: date.isoformat(),
    "datetime.time": lambda moment: moment.isoformat(),
    "datetime.timedelta": lambda delta: f"PT{delta.total_seconds():f}S",
    "decimal.Decimal": str,
    "dict_items": list,
    "dict_keys": list,
    "dict_values": list,
    "enum.Enum": _enum_value,
    "fractions.Fraction": str,
    "function": _function_name,
    "memoryview": _bytes_text,
    "method": _function_name,
    "ml_collections.config_dict.config_dict.FieldReference": lambda field: field.get(),
    "module": lambda module: module.__name__,
    "numpy.dtype": str,
    "omegaconf.basecontainer.BaseContainer": _omegaconf_container,
    "pydantic.main.BaseModel": _pydantic_fields,
    "pydantic.v1.main.BaseModel": vars,
    "torch.device": str,
    "type": _type_name,
    "types.SimpleNamespace": vars,
    "uuid.UUID": str,
}


def _raise_if_foreign(error: Exception) -> None:
    """Raise what a signal handler of the program raised while we were at work.

    Whatever else an object raises when it is looked at is its own affair.
    """
    if _is_of_handler(error):
        raise error


def _flattened(prefix: str, value: JSON) -> dict[str, JSON]:
    """Return nested mappings as one, with dotted keys below `prefix` (or none, "").

    Where {"a.b": 1} and {"a": {"b": 2}} meet, keys with a dot in them are quoted.
    """
    if value == {}:
        return {}
    leaves = [*_leaves([*filter(None, [prefix])], value)]
    found = {".".join(path): leaf for path, leaf in leaves}
    if len(found) < len(leaves):
        found = {".".join(map(_quoted_key, path)): leaf for path, leaf in leaves}
    return found


def _quoted_key(key: str) -> str:
    if "." in key or '"' in key:
        return json.dumps(key)
    return key


def _leaves(path: list[str], value: JSON) -> Iterator[tuple[list[str], JSON]]:
    """Yield what is no mapping in nested ones, or an empty one, with its keys."""
    if not isinstance(value, dict) or not value or len(path) > MAX_DEPTH:
        yield path, value
    else:
        for key, item in value.items():
            yield from _leaves([*path, str(key)], item)


# JSON: strict, ASCII, and nothing makes it fail.


def _format_json(value: object, indent: int | None = 2) -> str:
    """Return plain data as strict JSON; `indent=None` gives one line for JSONL.

    NaN and infinities, which JSON lacks, become "NaN", "Infinity", "-Infinity", and
    what is not plain data is converted first.
    """
    with _ignoring(ValueError, TypeError, RecursionError):  # NaN, an object, a cycle
        text = json.dumps(value, allow_nan=False, indent=indent)
        if "\\ud" not in text:  # half of a surrogate pair, which jq refuses
            return text + "\n"
    plain = _converted(_plain(value, whole=True), _as_json_number)
    return json.dumps(plain, allow_nan=False, indent=indent) + "\n"


def _converted(value: JSON, convert: Callable[[JSON], JSON], depth: int = 0) -> JSON:
    """Return plain data with each scalar converted."""
    if depth > MAX_DEPTH:
        return "<nested too deeply>"
    if isinstance(value, dict):
        return {k: _converted(item, convert, depth + 1) for k, item in value.items()}
    if isinstance(value, list):
        return [_converted(item, convert, depth + 1) for item in value]
    return convert(value)


def _as_json_number(value: JSON) -> JSON:
    if isinstance(value, float) and value - value != 0:
        return json.dumps(value)  # NaN, Infinity, -Infinity
    return value


def _as_float(value: JSON) -> JSON:
    """Return the float that such a text of our JSON stands for."""
    if isinstance(value, str) and value in ("NaN", "Infinity", "-Infinity"):
        return float(value)
    return value


# YAML: written so that readers of YAML 1.1 and of 1.2 read the same back.


def _format_yaml(value: JSON) -> str:
    return "\n".join(_yaml_lines(_yaml_tree(value))) + "\n"


def _yaml_lines(tree: JSON, first: str = "", rest: str = "") -> Iterator[str]:
    """Yield the lines of a tree, the first after `first`, the others after `rest`."""
    deeper = rest + "  "
    if isinstance(tree, str):
        yield first + tree
    elif isinstance(tree, list):
        for item in tree:
            yield from _yaml_lines(item, first + "- ", deeper)
            first = rest
    else:
        for key, item in tree.items():
            if len(key) > YAML_WIDTH:
                yield f"{first}? {key}"
                yield from _yaml_lines(item, rest + ": ", deeper)
            elif isinstance(item, str):
                yield f"{first}{key}: {item}"
            else:
                yield f"{first}{key}:"
                yield from _yaml_lines(item, deeper, deeper)
            first = rest


def _yaml_tree(value: JSON) -> JSON:
    """Return the same tree with text for scalars, and for lists that fit a line."""
    if value and isinstance(value, dict):
        return {_yaml_scalar(key): _yaml_tree(item) for key, item in value.items()}
    if value and isinstance(value, list):
        items = [_yaml_tree(item) for item in value]
        if all(isinstance(item, str) for item in items):
            text = f"[{', '.join(items)}]"
            if len(text) <= YAML_WIDTH:
                return text
        return items
    return _yaml_scalar(value)


def _yaml_scalar(value: JSON) -> str:
    """Return a scalar, an empty list or an empty mapping as YAML."""
    if isinstance(value, float):  # 1e+16 is a string to YAML 1.1, 1.0e+16 is not
        text = re.sub(r"^(-?\d+)e", r"\1.0e", repr(value))
        return text.replace("inf", ".inf").replace("nan", ".nan")
    text = json.dumps(value, ensure_ascii=False)
    if not isinstance(value, str):
        return text
    if re.fullmatch(_YAML_PLAIN, value) and not re.fullmatch(_YAML_MISREAD, value):
        return value
    return re.sub("[^ -~]", _yaml_escape, text)


def _yaml_escape(match: re.Match[str]) -> str:
    r"""Return an escape of Python that is YAML's as well, as \xa0, where one is needed.

    Not shown raw: controls, odd spaces and line ends, marks that turn the direction of
    text, surrogates, what is no character or for private use.
    """
    if match[0].isprintable():
        return match[0]
    return match[0].encode("unicode_escape").decode()


# What needs no quotes. Colons, commas and sharps have a meaning somewhere, and digits
# and signs start numbers.
_YAML_PLAIN = r"(?a)([A-Za-z_/]|\.\.?/|~/)[\w./+@%=~-]*( [\w./+@%=~-]+)*"
_YAML_MISREAD = "(?i)y|n|yes|no|on|off|true|false|null|none|nan|inf"


def _parse_yaml(text: str) -> JSON:
    """Return a YAML document as plain data, read by PyYAML; raise only ValueError.

    Aliases and merge keys (`<<: [*a, *a]`), which may stand for data of any size, are
    bounded.
    """
    _refuse_hostile_yaml(text)
    yaml = _pyyaml()
    base = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

    class Loader(base):  # type: ignore[misc, valid-type]
        merged = 0

        def flatten_mapping(self, node: Any) -> None:
            before = len(node.value)
            super().flatten_mapping(node)
            self.merged += len(node.value) - before
            if self.merged > MAX_ITEMS:
                raise ValueError("its merge keys make too many items")

    try:
        return _plain(yaml.load(text, Loader))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except Exception as error:  # a date such as 2024-99-99, a list as a key
        _raise_if_foreign(error)
        raise ValueError(str(error)) from error


def _refuse_hostile_yaml(text: str) -> None:
    """Raise ValueError for what ends the process, or takes minutes to read."""
    depth = 0
    deepest = 0
    for bracket in re.findall(r"[][{}]", text):
        if bracket in "[{":
            depth += 1
        else:
            depth = max(0, depth - 1)
        deepest = max(depth, deepest)
    if deepest > 500 or re.search(r"^[ \t?:-]{500}", text, re.M):
        raise ValueError("it is nested too deeply")  # for the stack of libyaml
    if re.search(r"[\d_:]{5000}", text):  # 1:59:59 is a number to base 60
        raise ValueError("it has a number of more than 5000 digits")


def _pyyaml() -> Any:
    """Return PyYAML, loaded if need be; raise ValueError with what to do.

    A yaml/ in the current folder, which `python -m` finds first, is not run.
    """
    from importlib import import_module, machinery

    loaded = sys.modules.get("yaml")
    if hasattr(loaded, "SafeLoader"):
        return loaded
    found = machinery.PathFinder.find_spec("yaml")
    places = getattr(found, "submodule_search_locations", None)
    try:
        if not places:
            raise ImportError("there is no such package")
        if realpath("yaml") in map(realpath, places):
            raise ImportError("the current folder has one, which is not run")
        return import_module("yaml")
    except (Exception, SystemExit) as error:
        what = "reading YAML takes PyYAML, which cannot be imported"
        raise ValueError(f"{what} ({error}); install it: pip install pyyaml") from None


# === Programs and processes ===
# One function starts every foreign program. The others tell which process is alive, and
# how a process that is not our child has died.

# Names that Windows lacks, for type checkers that look at the file as Windows would.
_posix: Any = os
_signals: Any = signal
_polls: Any = select


class _ProgramFailed(_Unknown):
    """A program could not be started, passed a limit, or ended with a bad status."""

    def __init__(self, program: _Program, problem: str) -> None:
        super().__init__(f"{program.name} {problem}")
        self.status = program.status
        self.output = bytes(program.output)
        self.errors = bytes(program.errors)


def _run(
    argv: Sequence[str], *, cwd: str | None = None,
    env: Mapping[str, str] | None = None, timeout: float | None = None,
) -> bytes:
    program = _Program(argv, cwd or _neutral_directory(), env or os.environ, None)
    return program.result(timeout)


class _Program:
    """A foreign program that runs, and what it has printed so far.

    The module subprocess, which takes as long to load as git to answer, is only used
    where the system has no posix_spawn.
    """

    def __init__(
        self, argv: Sequence[str], cwd: str, env: Mapping[str, str], stdin: int | None
    ) -> None:
        self.name = basename(argv[0])
        self.pid = 0
        self.end: int | None = None  # a descriptor that tells of its end
        self.status: int | None = None  # once it has ended; -n for signal n
        self.output = bytearray()
        self.errors = bytearray()
        self.texts: dict[int, bytearray] = {}  # the two, by their pipes
        self.child: subprocess.Popen[bytes] | None = None
        try:
            if hasattr(os, "posix_spawn") and hasattr(select, "poll"):
                self._spawn(argv, cwd, env, stdin)
            else:  # Windows, eventlet
                self._open(argv, cwd, env, stdin)
        except BaseException as error:
            self.close()
            if not isinstance(error, (OSError, ValueError)) or _is_foreign(error):
                raise
            raise _ProgramFailed(self, f"cannot be started: {error}") from None

    def _spawn(
        self, argv: Sequence[str], cwd: str, env: Mapping[str, str], stdin: int | None
    ) -> None:
        path = _on_path(argv[0])
        if path is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), argv[0])
        if cwd not in (os.curdir, _working_dir()):
            argv = ["sh", "-c", 'cd "$0" && exec "$@"', cwd, path, *argv[1:]]
            path = "/bin/sh"
        source: Any = (_posix.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0)
        if stdin is not None:
            source = (_posix.POSIX_SPAWN_DUP2, stdin, 0)
        actions = [source]
        ends = []
        try:
            for number, text in ((1, self.output), (2, self.errors)):
                ours, theirs = (_above_stderr(end) for end in os.pipe())
                self.texts[ours] = text
                ends.append(theirs)
                actions.append((_posix.POSIX_SPAWN_DUP2, theirs, number))
            self.pid = _posix.posix_spawn(
                path, argv, env, file_actions=actions, setsid=True,
                setsigdef=[_signals.SIGPIPE, _signals.SIGXFSZ],
            )
        finally:
            for end in ends:
                os.close(end)
        self.end = _pidfd(self.pid)

    def _open(
        self, argv: Sequence[str], cwd: str, env: Mapping[str, str], stdin: int | None
    ) -> None:
        import subprocess  # nosec

        if stdin is None:
            stdin = subprocess.DEVNULL
        self.child = subprocess.Popen(  # nosec
            argv, stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=cwd,
            env=env, start_new_session=True,
        )
        self.pid = self.child.pid

    def result(self, timeout: float | None = None, limit: int | None = None) -> bytes:
        """Wait for its end and return what it has printed, or raise _ProgramFailed."""
        read = self._read
        if self.child is not None:
            read = self._communicate
        try:
            problem = read(timeout or PROGRAM_SECONDS, limit or PROGRAM_BYTES)
        finally:
            self.close()
        if problem is None and self.status != 0:
            problem = f"ended with status {self.status}{_complaint(self.errors)}"
        if problem is not None:
            raise _ProgramFailed(self, problem)
        return bytes(self.output)

    def _read(self, timeout: float, limit: int) -> str | None:
        """Read until the program ends; return which limit it has passed, if one.

        A grandchild that keeps a pipe open is not waited for.
        """
        deadline = monotonic() + timeout
        poller = _polls.poll()
        for descriptor in [*self.texts, self.end]:
            if descriptor is not None:
                poller.register(descriptor, _polls.POLLIN)
        while True:
            has_ended = self._has_ended()
            ready = poller.poll(self._pause(deadline) * 1000)
            found = [pipe for pipe, _ in ready if pipe in self.texts]
            for pipe in found:
                data = os.read(pipe, 65536)
                self.texts[pipe] += data
                if not data:
                    poller.unregister(pipe)
                    del self.texts[pipe]
                    os.close(pipe)
            if max(len(self.output), len(self.errors)) > limit:
                return f"printed more than {limit} bytes"
            if has_ended and not found:
                return None
            if monotonic() > deadline:
                return f"did not end within {timeout:g} s"

    def _pause(self, deadline: float) -> float:
        if self.status is not None:
            return 0.0
        pause = max(0.0, deadline - monotonic())
        if self.end is not None:
            return pause
        if self.texts:
            return min(pause, 0.05)
        return min(pause, 0.001)  # it is most often due at once

    def _has_ended(self) -> bool:
        """Tell whether the program has ended; what somebody else reaped did well."""
        if self.status is None:
            pid, wait_status = self.pid, 0
            with _ignoring(ChildProcessError):
                pid, wait_status = os.waitpid(self.pid, _posix.WNOHANG)
            if pid == self.pid:
                self.status = _exit_code(wait_status)
        return self.status is not None

    def _communicate(self, timeout: float, limit: int) -> str | None:
        import subprocess  # nosec

        assert self.child is not None  # nosec
        try:
            output, errors = self.child.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            return f"did not end within {timeout:g} s"
        self.status = self.child.returncode
        self.output += output[: limit + 1]
        self.errors += errors
        return None

    def close(self) -> None:
        """Let go of the program; kill it with all it started if it has not ended."""
        if self.end is not None:
            os.close(self.end)
        for pipe in self.texts:
            os.close(pipe)
        self.end = None
        self.texts = {}
        if self.child is not None and self.status is None:
            with _ignoring(Exception):  # it has not ended even then
                self.child.kill()
                self.child.wait(0.5)
        elif self.pid and not self._has_ended():
            with _ignoring(OSError):
                _posix.killpg(self.pid, _signals.SIGKILL)
            _reap(self.pid, 0.5)


def _pidfd(pid: int) -> int | None:
    """Return a descriptor that tells of the end of a process; Linux has it, mostly."""
    with _ignoring(OSError, AttributeError):
        return _above_stderr(_posix.pidfd_open(pid))
    return None


def _lines_of(printed: bytes | bytearray) -> list[str]:
    return printed.decode("utf-8", "replace").splitlines()


def _complaint(errors: bytearray) -> str:
    """Return the line of stderr that tells best what went wrong, after a colon.

    fatal: detected dubious ownership in repository at '/data'
    """
    lines = _lines_of(errors.strip())
    fatal = [line for line in lines if line.startswith("fatal:")]
    for line in [*fatal[:1], *lines[-1:]]:
        return f": {line[:200]}"
    return ""


def _neutral_directory() -> str:
    """Return a directory into which nobody can put a module or a program."""
    return next(filter(isdir, ("/proc", "/var/empty")), os.sep)


def _safe_python(executable: str) -> list[str]:
    code = (
        "import sys; sys.path[:1] == [''] and sys.path.pop(0); del sys.argv[:2]; "
        "import runpy; runpy.run_module(sys.argv[0], None, '__main__', True)"
    )
    return [executable, "-c", code]


_PYTHON = r"(?i)(python|pypy)[\d.]*t?(\.exe)?$"


def _no_interpreter() -> str | None:
    if getattr(sys, "frozen", False):
        return "a frozen program"
    if not re.match(_PYTHON, basename(sys.executable or "")):
        return f"sys.executable is {sys.executable!r}, not a Python"
    return None


def _process_stat(pid: int) -> list[str] | None:
    """Return the fields of /proc/<pid>/stat from the third, the state, on.

    4711 (a name may hold) S) S 1 4711 4711 0 -1 4194304 ...
    """
    with _ignoring(OSError):
        text = _read_proc(f"/proc/{pid}/stat")
        return text.rpartition(b")")[2].decode("ascii").split()
    return None


def _read_proc(path: str) -> bytes:
    """Return a file of the kernel, which tells no size."""
    with io.FileIO(path) as file:
        return file.readall()


def _process_identity(pid: int) -> Facts:
    """Return what tells a process from a later one with the same pid."""
    identity = {**_boot(), "start_ticks": None}
    fields = _process_stat(pid)
    if fields is not None:
        identity["start_ticks"] = int(fields[19])
    return identity


@functools.lru_cache(None)
def _boot() -> Facts:
    """Return what the numbers of processes are relative to."""
    facts: Facts = {"boot_id": None, "pid_namespace": None}
    with _ignoring(OSError):
        text = _read_proc("/proc/sys/kernel/random/boot_id")
        facts["boot_id"] = text.decode("ascii").strip()
        facts["pid_namespace"] = os.readlink("/proc/self/ns/pid")
    return facts


def _is_alive(pid: int, start_ticks: int | None) -> bool:
    """Return whether a process of this host is the one meant, and not a zombie."""
    fields = _process_stat(pid)
    if fields is not None:
        return start_ticks in (None, int(fields[19])) and fields[0] not in "ZX"
    if hasattr(os, "killpg"):  # on Windows signal 0 would end the process
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:  # another user's, which /proc may hide (hidepid=2)
            pass
    return True


def _wait_status(pid: int, pidfd: int | None) -> int | None:
    """Return the wait status of a process that is not our child, if Linux tells.

    While it is a zombie, its field of /proc/<pid>/stat has it. Once it is reaped, its
    pidfd has it, since Linux 6.15: PIDFD_GET_INFO of linux/pidfd.h.
    """
    get_info = 0xC040FF0B
    has_exit = 8  # the bit of the mask that asks for exit_code and says it is there
    for _ in range(20):
        fields = _process_stat(pid)
        if fields is not None and fields[0] in "ZX":
            return int(fields[49])  # field 52, exit_code, in proc(5)
        if fields is None and pidfd is not None:
            # struct pidfd_info { __u64 mask; ... __s32 exit_code; }: 64 bytes
            info = bytearray(has_exit.to_bytes(8, sys.byteorder) + bytes(56))
            with _ignoring(ImportError, OSError):  # an older kernel
                __import__("fcntl").ioctl(pidfd, get_info, info)
                if int.from_bytes(info[:8], sys.byteorder) & has_exit:
                    return int.from_bytes(info[60:], sys.byteorder)
        time.sleep(0.01)
    return None


def _exit_code(wait_status: int) -> int:
    return os.waitstatus_to_exitcode(wait_status)


def _oom_kills() -> int:
    """Return how often the kernel has killed in this cgroup for want of memory."""
    found = _in_cgroup("memory.events", "memory.oom_control", r"^oom_kill (\d+)")
    return int(found or 0)


def _digest(name: str, data: bytes = b"") -> Any:
    """Return a sha1 or sha256 of `data`, to be updated and read, without OpenSSL.

    hashlib loads that, for 4 ms of an entry and 4 MB of each recorder.
    """
    for module in ("_" + name, "_sha2"):  # _sha2 has sha256 since Python 3.12
        with _ignoring(ImportError, AttributeError):
            return getattr(__import__(module), name)(data)
    import hashlib

    return hashlib.new(name, data)


def _hash_of(data: bytes) -> str:
    return str(_digest("sha256", data).hexdigest())


# === Files ===
# Whole files by a temporary name and os.replace, lines by one write(2) each. One
# function opens what is read or appended to: a regular file, never a link, a FIFO or
# a device. Colleagues can read what is written (0666 & ~umask); fsync is only used
# where a state changes.

_NO_FOLLOW: int = getattr(os, "O_NOFOLLOW", 0)
_NO_WAIT: int = getattr(os, "O_NONBLOCK", 0)
_CLOSE_ON_EXEC: int = getattr(os, "O_CLOEXEC", 0)
_HAS_DIR_FD = os.open in os.supports_dir_fd and os.rename in os.supports_dir_fd


def _write_json(path: StrPath, value: JSON, durable: bool = False) -> None:
    _write_file(path, _redacted_json(value), durable)


def _redacted_json(value: JSON, indent: int | None = 2) -> bytes:
    return _format_json(_redactor.data(value), indent).encode("ascii")


@_signals_held()  # else a signal handler that raises may leave a descriptor open
def _write_file(
    path: StrPath, data: bytes, durable: bool = False, dir_fd: int | None = None,
    is_new: bool = False,
) -> None:
    """Replace a file by `data`, or raise OSError and leave what was there.

    With `is_new` that there is a file raises FileExistsError.
    """
    folder, name = os.path.split(os.fspath(path))
    unique = f"{os.getpid()}-{os.urandom(4).hex()}"
    temporary = join(folder, f".{name[:100]}.{unique}.tmp")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | _NO_FOLLOW | _CLOSE_ON_EXEC
    try:
        descriptor = _above_stderr(os.open(temporary, flags, 0o666, dir_fd=dir_fd))
        try:
            _write_all(descriptor, data)
            if durable:
                os.fsync(descriptor)
        finally:
            os.close(descriptor)
        here: Any = {}
        if dir_fd is not None:
            here = {"src_dir_fd": dir_fd, "dst_dir_fd": dir_fd}
        if is_new:
            os.link(temporary, path, **here)
            with _ignoring(OSError):
                os.unlink(temporary, dir_fd=dir_fd)
        else:
            os.replace(temporary, path, **here)
    except BaseException:
        with _ignoring(OSError):
            os.unlink(temporary, dir_fd=dir_fd)
        raise


@contextlib.contextmanager
def _temporary_folder() -> Iterator[str]:
    """Make a folder for a moment, without tempfile, which takes long to load."""
    named = map(os.environ.get, ("TMPDIR", "TEMP", "TMP"))
    for place in filter(None, [*named, "/tmp", "/var/tmp", os.getcwd()]):  # nosec
        path = join(abspath(place), f"run_utils-{os.urandom(8).hex()}")
        with _ignoring(OSError):
            os.mkdir(path, 0o700)
            break
    else:
        raise _Unknown("no folder is to be had for temporary files")
    try:
        yield path
    finally:
        with _ignoring(OSError):
            _remove_tree(path)


def _remove_tree(path: str) -> None:
    """Remove a folder with all that is in it, or a file, or a link."""
    if os.path.islink(path) or not isdir(path):
        os.unlink(path)
        return
    for name in os.listdir(path):
        _remove_tree(join(path, name))
    os.rmdir(path)


@contextlib.contextmanager
def _unnamed_file(data: bytes) -> Iterator[int]:
    if hasattr(os, "memfd_create"):
        descriptor = _above_stderr(os.memfd_create("run_utils"))
    else:
        import tempfile

        with tempfile.TemporaryFile() as file:
            descriptor = _above_stderr(os.dup(file.fileno()))
    try:
        _write_all(descriptor, data)
        os.lseek(descriptor, 0, os.SEEK_SET)
        yield descriptor
    finally:
        os.close(descriptor)


def _is_below(path: str, folder: str) -> bool:
    """Tell whether a path leads into a folder, whatever links there are."""
    return realpath(path).startswith(realpath(folder) + os.sep)


def _write_all(descriptor: int, data: bytes) -> None:
    while data:
        written = os.write(descriptor, data)
        data = data[written:]


def _open(
    path: StrPath, flags: int, dir_fd: int | None = None, follow: bool = False
) -> int:
    """Return a descriptor of a regular file; raise OSError for anything else.

    It is close-on-exec and never 0, 1 or 2. A link is only followed if the caller
    says so. To be written to, the file must have one link, and belong to us or to
    the owner of its folder: somebody else may have put it there for our lines.
    """
    flags |= _NO_WAIT | _CLOSE_ON_EXEC
    if not follow:
        flags |= _NO_FOLLOW
    descriptor = _above_stderr(os.open(path, flags, 0o666, dir_fd=dir_fd))
    try:
        info = os.fstat(descriptor)
        if not stat.S_ISREG(info.st_mode):
            raise OSError(errno.EINVAL, "not a regular file", os.fspath(path))
        if flags & (os.O_WRONLY | os.O_RDWR):
            _check_owner(path, info, dir_fd)
        if _NO_WAIT:
            _posix.set_blocking(descriptor, True)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _check_owner(path: StrPath, info: os.stat_result, dir_fd: int | None) -> None:
    """Raise PermissionError for a file that somebody else put at this place."""
    problem = None
    if info.st_nlink > 1:
        problem = "the file has another name as well (a hard link)"
    elif hasattr(os, "geteuid") and info.st_uid != os.geteuid():
        folder = dirname(os.fspath(path)) or os.curdir
        if info.st_uid != os.stat(folder, dir_fd=dir_fd).st_uid:
            problem = "the file belongs to another user"
    if problem is not None:
        raise PermissionError(errno.EPERM, problem, os.fspath(path))


def _above_stderr(descriptor: int) -> int:
    """Move a descriptor out of the place of a closed stdin, stdout or stderr."""
    if descriptor > 2:
        return descriptor
    try:
        return _above_stderr(os.dup(descriptor))
    finally:
        os.close(descriptor)


class _Folder:
    """A directory that is known by its inode: one put in its place gets nothing."""

    def __init__(self, path: Path, identity: Sequence[int] = ()) -> None:
        self.path = path
        if not identity:
            info = os.stat(path)
            identity = (info.st_dev, info.st_ino)
        self.identity = tuple(identity)

    @contextlib.contextmanager
    def opened(self, inside: str = "", create: bool = False) -> Iterator[_Place]:
        """Open the directory, or a folder `inside` it ("attempts/2"), but no link."""
        path = self.path / inside
        if not _HAS_DIR_FD:
            if create:
                path.mkdir(parents=True, exist_ok=True)
            if inside and path.is_symlink():
                raise OSError(errno.ENOTDIR, "the folder is a link", str(path))
            yield _Place(str(path), None)
            return
        flags = os.O_RDONLY | _posix.O_DIRECTORY | _CLOSE_ON_EXEC
        with _signals_held():  # else a descriptor may be left open
            opened = [_above_stderr(os.open(self.path, flags))]
            try:
                if _identity(opened[0]) != self.identity:
                    text = "another directory has taken the place of the run's"
                    raise OSError(errno.ENOTDIR, text, str(self.path))
                for name in filter(None, inside.split("/")):
                    if create:
                        with _ignoring(FileExistsError):
                            os.mkdir(name, dir_fd=opened[-1])
                    folder = os.open(name, flags | _NO_FOLLOW, dir_fd=opened[-1])
                    opened.append(_above_stderr(folder))
                yield _Place("", opened[-1])
            finally:
                for descriptor in opened:
                    with _ignoring(OSError):
                        os.close(descriptor)


class _Place:
    """Where the names of some files are looked up: below a path or a descriptor."""

    def __init__(self, path: str, dir_fd: int | None) -> None:
        self.path = path
        self.dir_fd = dir_fd

    def write(
        self, name: str, data: bytes, durable: bool = False, is_new: bool = False
    ) -> None:
        _write_file(join(self.path, name), data, durable, self.dir_fd, is_new)

    def append(self, name: str, row: Facts) -> None:
        line = _redacted_json(row, indent=None)
        descriptor = self.open_for_lines(name)
        try:
            written = os.write(descriptor, line)
        finally:
            os.close(descriptor)
        if written != len(line):
            raise OSError(errno.ENOSPC, "only a part of a line fitted", name)

    def open(self, name: str, flags: int) -> int:
        return _open(join(self.path, name), flags, self.dir_fd)

    def open_for_lines(self, name: str) -> int:
        """Open a JSONL file for appending; end the torn line of an earlier writer."""
        descriptor = self.open(name, os.O_RDWR | os.O_APPEND | os.O_CREAT)
        with _ignoring(OSError, AttributeError):  # no os.pread on Windows
            size = os.fstat(descriptor).st_size
            if size and _posix.pread(descriptor, 1, size - 1) != b"\n":
                time.sleep(0.01)  # Its writer may only be in the middle of its write.
                if os.fstat(descriptor).st_size == size:
                    os.write(descriptor, b"\n")
        return descriptor


class _Kept:
    """An open descriptor of ours: the program may close it, and reuse its number."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.identity = _identity(number)

    def is_ours(self) -> bool:
        return self.identity is not None and _identity(self.number) == self.identity

    def close(self) -> None:
        if self.is_ours():
            with _ignoring(OSError):
                os.close(self.number)
        self.identity = None


def _identity(descriptor: int) -> tuple[int, int] | None:
    try:  # log_metrics has no time for _ignoring
        info = os.fstat(descriptor)
    except OSError as error:
        if _is_foreign(error):
            raise
        return None
    return info.st_dev, info.st_ino


def _read_json(path: StrPath) -> Facts:
    """Return the object in a JSON file, {} for anything else."""
    with _ignoring(OSError, ValueError, RecursionError):
        value = json.loads(_small_text(os.fspath(path)))
        if isinstance(value, dict):
            return value
    return {}


def _small_text(path: str) -> str:
    """Return the text of a file that most often is small, or raise OSError.

    As _read_bytes, in half the time: `list` may read 100,000 of them.
    """
    descriptor = os.open(path, os.O_RDONLY | _NO_FOLLOW | _NO_WAIT | _CLOSE_ON_EXEC)
    try:
        data = os.read(descriptor, FORWARD_BYTES)
    finally:
        os.close(descriptor)
    if len(data) == FORWARD_BYTES:
        data = _read_bytes(path, MAX_RECORD)
    return data.decode("utf-8")


def _read_lines(path: StrPath, tail: int | None = None) -> Iterator[Facts]:
    """Yield the mappings of a JSONL file, or of its last bytes; skip torn lines."""
    return _mappings_in(_readable_bytes(path, tail=tail))


def _mappings_in(lines: bytes) -> Iterator[Facts]:
    for line in filter(None, lines.split(b"\n")):
        row = None
        with _ignoring(ValueError, RecursionError):
            row = json.loads(line)
        if isinstance(row, dict):
            yield row


def _readable_bytes(path: StrPath, limit: int = 0, tail: int | None = None) -> bytes:
    """Return the same as _read_bytes; nothing if the file cannot be read."""
    with _ignoring(OSError):
        return _read_bytes(path, limit, tail)
    return b""


@_signals_held()
def _read_bytes(path: StrPath, limit: int = 0, tail: int | None = None) -> bytes:
    """Return the content of a regular file of at most `limit` bytes (MAX_READ).

    With `tail` it is the last bytes of a file of any size, from a whole line on.
    """
    if tail is not None:
        limit = sys.maxsize
    with _opened(path, limit or MAX_READ) as file:
        size = os.fstat(file.fileno()).st_size
        if tail is None or size <= tail:
            return file.readall()
        file.seek(-tail, os.SEEK_END)
        _cut_line, _, rest = file.readall().partition(b"\n")
        return rest


def _opened(path: StrPath, limit: int, follow: bool = False) -> io.FileIO:
    file = io.FileIO(_open(path, os.O_RDONLY, follow=follow))
    size = os.fstat(file.fileno()).st_size
    if size > limit:
        file.close()
        raise OSError(errno.EFBIG, f"larger than {limit} bytes", os.fspath(path))
    return file


class _ignoring:
    """Go on after an exception of these kinds, unless it is the program's own.

    contextlib.suppress(OSError) would also swallow the TimeoutError which a signal
    handler of the program raises while our code runs.
    """

    def __init__(self, *kinds: type[BaseException]) -> None:
        self.kinds = kinds

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, at: object) -> bool:
        return isinstance(error, self.kinds) and not _is_foreign(error)


class _tolerating(_ignoring):
    """Turn a failure of recording into one line on stderr."""

    def __init__(self, what: str) -> None:
        super().__init__(Exception)
        self.what = what

    def __exit__(self, kind: object, error: BaseException | None, at: object) -> bool:
        is_ignored = super().__exit__(kind, error, at)
        if is_ignored:
            _warn(f"{self.what}: {type(error).__name__}: {error}")
        return is_ignored


def _is_foreign(error: BaseException) -> bool:
    """Tell whether an exception is the program's own, raised inside our code.

    Only a signal handler of the program can do that, which the traceback tells. An
    OSError without errno was not raised by the system: it comes from a handler too,
    unless the standard library has raised it.
    """
    if _is_of_handler(error):
        return True
    codes = _codes(error)
    if not isinstance(error, OSError) or error.errno is not None or not codes:
        return False
    file = codes[-1].co_filename
    is_standard = file.startswith(dirname(os.__file__) + os.sep)
    return file != _OUR_FILE and (not is_standard or "-packages" in file)


def _is_of_handler(error: BaseException) -> bool:
    codes = [code for code in _codes(error) if code.co_filename != _OUR_FILE]
    return bool(codes) and not _signal_handlers().isdisjoint(codes)


def _codes(error: BaseException) -> list[CodeType]:
    """Return the code that an exception has come through, its origin last."""
    codes = []
    trace = error.__traceback__
    while trace is not None:
        codes.append(trace.tb_frame.f_code)
        trace = trace.tb_next
    return codes


_OUR_FILE = _codes.__code__.co_filename


def _signal_handlers() -> set[object]:
    found = set()
    for handler in map(signal.getsignal, signal.valid_signals()):
        function = getattr(handler, "__func__", handler)
        if not hasattr(function, "__code__"):
            function = vars(type(function)).get("__call__")
        found.add(getattr(function, "__code__", None))
    return found


_warned: set[str] = set()


def _warn(text: str, once: bool = False) -> None:
    if not once or text not in _warned:
        _warned.add(text)
        with _ignoring(Exception):
            _say(f"run_utils: {_redactor.text(text)}")


def _say(text: str) -> None:
    """Print one line on stderr, if it takes one; never fail."""
    stream = sys.stderr
    with _ignoring(Exception):  # it is None, closed, full, or of the program's kind
        line = f"{_printable(text)}\n"
        if _captures or _descriptor_of(stream) != 2:
            stream.write(line)
            return
        stream.flush()
        os.write(2, line.encode(stream.encoding, "backslashreplace"))


def _utc(seconds: float | None = None) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def _seconds(utc: object) -> float | None:
    pattern = r"(\d{4})-(\d\d)-(\d\d)[T ](\d\d):(\d\d):(\d\d)(\.\d{1,9})?"
    parts = re.match(pattern, str(utc))
    if parts is None:
        return None
    import calendar

    *date, fraction = parts.groups("0")
    with _ignoring(ValueError, OverflowError):  # a 13th month
        return calendar.timegm(tuple(map(int, date))) + float(fraction)
    return None


# === Finding and comparing runs ===
# One finder, one walk, one comparison. What is read here may be absent, torn, huge,
# hostile, or an ancestor's: nothing is trusted, and what cannot be read is said.

if TYPE_CHECKING:
    from typing import TypeVar

    _Item = TypeVar("_Item")
    _Ranked = TypeVar("_Ranked", Run, "_Group")
    Comparable = dict[str, Union[Facts, None]]  # by section; None: it is not known
    Differences = dict[str, dict[str, list[JSON]]]  # by section and key: then and now


def _find_run(text: str) -> Path:
    """Return the run that `text` means, as an absolute path.

    It may be a path of a run or of anything inside one, a copy of a file that a run
    left, a run's name, a unique part of one, or "latest". Names are looked for below
    results/, else in the current folder. Raises ValueError with one sentence.
    """
    if lexists(text):
        found = _run_of(text)
        if found is not None:
            return Path(realpath(found))
    walk = _Walk(_search_root(None))
    runs = _named(text, walk)
    if not runs and isfile(text):
        makers = _makers_of(text, walk.runs)
        if len(makers) > 1:
            _say(f"{text!r} is what {len(makers)} runs left; this is the first of them")
        runs = makers[:1]
    if not runs:
        raise ValueError(_not_found(text, walk))
    if len(runs) == 1:
        return Path(runs[0])
    names = ", ".join(relpath(run, walk.root) for run in runs[:3])
    problem = f"a part of {len(runs)} names ({names}, ...); say more"
    if basename(runs[0]) == text:
        problem = f"the name of {len(runs)} runs ({names}); give one of the paths"
    raise ValueError(f"{text!r} is {problem}")


def _not_found(text: str, walk: _Walk) -> str:
    effective = os.access in getattr(os, "supports_effective_ids", ())
    try:
        os.lstat(text)
        if exists(text) and not os.access(text, os.R_OK, effective_ids=effective):
            raise PermissionError
    except PermissionError as error:
        return _unreadable(error, text)
    except (OSError, ValueError):
        return "; ".join([f"no run {text!r} below {walk.root!r}", *walk.problems[:1]])
    return f"{text!r} is not in a run directory; give one, or a name"


def _latest_own_run(root: Path, prefix: str) -> Path | None:
    """Return the latest run of this user in `root`, of this prefix if it is fixed."""
    start = f"{_safe_name(prefix)}-"
    for run in map(Path, _walk_runs(root)):
        is_meant = "{" in prefix or re.split(_STAMP, run.name)[0] == start
        if is_meant and run.parent == root and _is_mine(run):
            return run
    return None


def _named(text: str, walk: _Walk) -> list[str]:
    if text == "latest":
        return walk.newest_first(1)
    paths = {run: relpath(run, walk.root) for run in sorted(walk.runs)}
    found = [run for run in paths if basename(run) == text]
    found = found or [run for run in paths if paths[run] == normpath(text)]
    if found or lexists(text):
        return found
    pieces = re.split(r"\.\.\.|…", text)  # `list` shortens a name to "tra…-142501"
    part = re.compile(".*".join(map(re.escape, pieces)))
    shown = re.compile(f"{part.pattern}({_COMMIT})?")  # it may leave out the commit
    for matches in (shown.fullmatch, part.search):
        found = [run for run in paths if matches(basename(run))]
        found = found or [run for run in paths if matches(paths[run])]
        if found:
            break
    return found


def _search_root(text: str | None) -> str:
    root = text or os.curdir
    if text is None and isdir("results"):
        root = "results"
    if not isdir(root):
        raise ValueError(f"{root!r} is not a folder; give one that holds runs")
    return realpath(root)


def _is_run(path: StrPath) -> bool:
    """Tell whether a folder holds a record; a data set has a metadata.json too."""
    if isfile(f"{path}/status.json"):
        return True
    if not isfile(f"{path}/metadata.json"):
        return False
    if _stamp_of(basename(path)) or isfile(f"{path}/config.yaml"):
        return True
    with _ignoring(OSError), _opened(f"{path}/metadata.json", sys.maxsize) as file:
        return b'"timestamp_utc"' in (file.read(FORWARD_BYTES) or b"")
    return False


def _run_of(path: StrPath, is_run: Callable[[str], bool] = _is_run) -> str | None:
    for place in (abspath(path), realpath(path)):
        for folder in _folders_above(place):
            if is_run(folder):
                return folder
    return None


def _folders_above(path: str) -> list[str]:
    return [path, *map(str, Path(path).parents)]


_STAMP = r"\d{8}-\d{6}(?![^-])"  # in the name of a run: local time
_COMMIT = r"(?<=\d{8}-\d{6})-[0-9a-f]{7,40}"  # after the stamp


def _stamp_of(name: str) -> str:
    found = re.search(_STAMP, name)
    if found is None:
        return ""
    return found[0]


class _Walk:
    """The paths of all runs below a folder, and what could not be read.

    Links are followed once, to what lies outside of the folder and belongs to its
    owner: a link to / must not lead us through the machine.

    index/runs_index.jsonl is a cache, which may not know a run. To parse all its lines
    would take longer than to ask the runs: what is wanted is searched as we write it.
    """

    def __init__(self, root: str) -> None:
        self.root = root
        self.real_root = realpath(root)
        self.results_root = _results_root(Path(root))
        self.problems: list[str] = []
        self.found: set[str] = set()
        self.links: list[str] = []
        self.entered: set[str] = set()  # folders, by their paths without links
        self._enter(root)
        deadline = monotonic() + LINK_SECONDS
        for link in list(self.links):
            with _ignoring(OSError):  # it may vanish while we look
                target = realpath(link)
                if not self._leads_elsewhere(target):
                    continue
                if monotonic() > deadline:
                    self.problems.append("not all links were followed in the time")
                    break
                self._enter(target, deadline)
        self.runs = sorted(self.found, reverse=True)  # mostly the newest first

    def newest_first(self, limit: int | None = None) -> list[str]:
        runs = [Run(folder, row=False) for folder in self.runs]
        return [run.folder for run in self.newest(runs, limit)]

    def newest(self, runs: Iterable[_Ranked], limit: int | None) -> list[_Ranked]:
        """Return the newest runs in the order of their starts, at most `limit`.

        Of many only those are asked that, by the index, may be among the newest.
        """
        asked = list(runs)
        if limit is not None and len(asked) > max(limit, MANY_RUNS):
            asked.sort(key=lambda run: self.starts.get(run.folder, "9"))
            least = min(run.started for run in asked[-limit:])
            bound = _utc(least - INDEX_SECONDS)
            asked = [r for r in asked if self.starts.get(r.folder, "9") > bound]
        asked.sort(key=lambda run: (run.started, run.folder), reverse=True)
        return asked[:limit]

    def _leads_elsewhere(self, target: str) -> bool:
        """Tell whether a link's target is a folder that may be entered, and is new."""
        if target in _folders_above(self.real_root) or not isdir(target):
            return False
        is_new = self.entered.isdisjoint(_folders_above(target))
        return is_new and os.stat(target).st_uid == os.stat(self.root).st_uid

    def _enter(self, top: str, deadline: float = float("inf")) -> None:
        """Collect the runs at and below a folder."""
        waiting = [(top, 0)]
        while waiting and monotonic() < deadline:
            folder, depth = waiting.pop()
            self.entered.add(realpath(folder))
            inside = self._folders_in(folder)
            is_empty = not set(inside).difference([*DEFAULT_SUBDIRS, "attempts"])
            # Without its files a run is known by the time in its name.
            if _is_run(folder) or (is_empty and _stamp_of(basename(folder))):
                self.found.add(folder)
                continue
            are_many = len(inside) > MANY_RUNS
            for name in inside:
                path = f"{folder}/{name}"
                is_run = are_many and path in self.starts
                if not is_run and _stamp_of(name):  # nearly always a run: no look
                    is_run = os.access(f"{path}/status.json", os.F_OK)
                if is_run:
                    self.found.add(path)
                elif depth < MAX_WALK and not name.startswith("."):
                    waiting.append((path, depth + 1))

    def _folders_in(self, folder: str) -> list[str]:
        inside = []
        try:
            for entry in os.scandir(folder):
                if entry.is_dir(follow_symlinks=False):
                    inside.append(entry.name)
                elif entry.is_symlink():
                    self.links.append(entry.path)
        except OSError as error:
            self.problems.append(_unreadable(error, folder))
        return inside

    @cached_property
    def starts(self) -> dict[str, str]:
        """By path when runs began, "2026-01-31T14:25:01Z", that told their inputs then.

        It is true within INDEX_SECONDS.
        """
        starts = {}
        event = '{"event": "start", "timestamp_utc": "'
        for lines in self._index_lines():
            for part in lines.decode("latin-1").split('", "inputs": [')[:-1]:
                line = part[part.rfind("\n") + 1 :]
                if line.startswith(event):
                    path = line[line.rindex('"') + 1 :]
                    starts[f"{self.results_root}/{path}"] = line[len(event) :][:20]
        return starts

    def _index_lines(self) -> Iterator[bytes]:
        with _ignoring(OSError):
            yield from _line_blocks(self.results_root / INDEX_FILE, MAX_INDEX)

    def users_of(self, name: str) -> Iterator[str]:
        """Yield the runs of whose lines `inputs` or `tied` have the name of a run."""
        wanted = json.dumps(name).encode("ascii")
        for block in self._index_lines():
            lines = [line for line in block.split(b"\n") if wanted in line]
            for row in _rows_of(b"\n".join(lines)):
                if name in [*_texts(row, "inputs"), *_texts(row, "tied")]:
                    yield f"{self.results_root}/{row.get('path')}"


def _walk_runs(root: StrPath) -> list[str]:
    return _Walk(os.fspath(root)).newest_first()


def _started(run_dir: StrPath) -> float:
    """Return when a run was started, in seconds since 1970; 0 if nothing tells."""
    status = _read_json(f"{run_dir}/status.json")
    if _is_finite(status.get("started")):
        return float(status["started"])
    seconds = _seconds(status.get("started_utc"))
    if seconds is None:
        metadata = _read_json(f"{run_dir}/metadata.json")
        seconds = _seconds(metadata.get("timestamp_utc"))
    if seconds is None:
        seconds = _seconds(status.get("timestamp_utc"))
        with _ignoring(ValueError, OverflowError):
            stamp = time.strptime(_stamp_of(basename(run_dir)), "%Y%m%d-%H%M%S")
            seconds = time.mktime(stamp)
    return seconds or 0.0


def _liveness(facts: Facts, path: str) -> str:
    """Return "running", "lost" or "unknown" for a status.json that says running.

    On its own host the process itself is asked, elsewhere the heartbeat, which is the
    time of status.json. Without both it is "unknown".
    """
    process = _mapping(facts, "process")
    pid = facts.get("pid")
    is_alive = None
    if process and isinstance(pid, int) and facts.get("hostname") == _hostname():
        here = _process_identity(os.getpid())
        if process.get("boot_id") != here["boot_id"]:
            return "lost"  # the host was started anew since
        if process.get("pid_namespace") == here["pid_namespace"]:
            is_alive = _is_alive(pid, process.get("start_ticks"))
    if is_alive is None and facts.get("heartbeat_seconds") is not None:
        with _ignoring(OSError):
            is_alive = abs(time.time() - os.stat(path).st_mtime) < LOST_AFTER_SECONDS
    return {True: "running", False: "lost", None: "unknown"}[is_alive]


# Which runs are asked for, and in which order.


class _Filters:
    """What is asked for of runs, and their order; ValueError where that is unclear."""

    def __init__(self, options: Mapping[str, JSON]) -> None:
        """Take them by their names as parameters of find_runs."""
        self.status: str | None = options.get("status")
        self.tag: str | None = options.get("tag")
        self.contains: str = (options.get("contains") or "").lower()
        self.has_outputs: bool = options.get("has_outputs", False)
        self.since = _moment("since", options)
        self.older = _moment("older", options)
        self.where: _Condition | None = None
        if options.get("where") is not None:
            self.where = _Condition(options["where"])
        shown = ",".join(options.get("show") or ()).split(",")
        self.shown = [_Key(text) for text in shown if text]
        self.sort: _Key | None = None
        self.reverse = False
        if options.get("sort") is not None:
            self.reverse = options["sort"].startswith("-")
            self.sort = _Key(options["sort"].removeprefix("-"))
        self.limit: int | None = options.get("limit")
        self.is_top = options.get("top") is not None
        if self.is_top:
            self.limit = options["top"]
            if self.sort is None:
                raise ValueError("top is of a value; give one as sort='-max(KEY)'")
        if self.limit is not None and self.limit < 0:
            raise ValueError(f"limit is {self.limit}; give 0 for all, or a number")

    def take(self, run: Run, root: str) -> bool:
        """Tell whether a run is asked for; the cheapest questions come first."""
        if self.contains and self.contains not in run.folder.removeprefix(root).lower():
            return False
        if self.since is not None and run.started < self.since:
            return False
        if self.older is not None and run.started >= self.older:
            return False
        if self.status is not None and run.state != self.status:
            return False
        if self.tag is not None and self.tag not in _tags(run.notes):
            return False
        if self.where is not None and not self.where.holds(run):
            return False
        return not self.has_outputs or bool(run.outputs)

    def asked(self) -> list[_Key]:
        keys = []
        if self.sort is not None:
            keys.append(self.sort)
        if self.where is not None:
            keys += [term.key for term in self.where.terms]
        return list({key.text: key for key in keys + self.shown}.values())

    def unknown_words(self, runs: list[Run]) -> Iterator[str]:
        """Yield a sentence for each key, status or tag that no run has."""
        absent = set()
        if self.where is not None:
            absent = {term.key.text for term in self.where.terms if term.wants_null}
        for key in self.asked():
            if key.text not in absent:
                yield from _unknown_key(key, runs)
        if self.status not in (None, "running", "success", "failed", "lost", "unknown"):
            states = sorted({run.state for run in runs})
            if self.status not in states:
                there_are = f"there are: {', '.join(states)}"
                yield f"no run has the status {self.status!r}; {there_are}"
        if self.tag is not None:
            tags = dict.fromkeys(tag for run in runs for tag in _tags(run.notes))
            if self.tag not in tags:
                yield f"no run has the tag {self.tag!r}{_similar(self.tag, tags)}"

    def hidden_keys(self, runs: list[Run]) -> Iterator[str]:
        """Yield a sentence for each key of the config that has the name of one of ours.

        Where nothing is found, it may be what was meant.
        """
        for key in self.asked():
            hidden = _Key(f"config.{key.name}")
            if key.name in _KEYS and any(run.value(hidden) is not None for run in runs):
                yield f"{key.text!r} is not of the config; that is {hidden.text!r}"


def _moment(name: str, options: Mapping[str, JSON]) -> float | None:
    """Return the seconds since 1970 of an age ("90s", "12h", "7d") or of a UTC date."""
    text = options.get(name)
    if text is None:
        return None
    age = re.fullmatch(r"(\d{1,9}(?:\.\d+)?)([smhdw])", text)
    if age is not None:
        units = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}
        return time.time() - float(age[1]) * units[age[2]]
    if re.match(r"\d{4}(-\d\d){0,2}([T ][\d:]+)?Z?$", text):
        date = text.rstrip("Z")
        seconds = _seconds(date + "0000-01-01T00:00:00"[len(date) :])
        # The 30th of February would be the 2nd of March.
        if seconds is not None and _utc(seconds).startswith(date.replace(" ", "T")):
            return seconds
    how = "give '12h', '7d' or '2026-01-31'"
    raise ValueError(f"{name} {text!r} is no time; {how}")


class _Selection:
    """The runs that were asked for, in their order, and what is to be said of them.

    With `over` they are folded into `groups` over keys such as "seed", which are sorted
    by the mean of what they are sorted by, else by their newest run. `unseen` is how
    many more there are, beyond the limit.
    """

    def __init__(
        self, root: StrPath, filters: _Filters, over: str | None = None
    ) -> None:
        self.root = os.fspath(root)
        self.shown = filters.shown
        asked = filters.asked()
        self.asked = [key.text for key in asked]
        self.groups: list[_Group] = []
        walk = _Walk(self.root)
        self.warnings = _first(walk.problems, PLAN_DETAILS)
        everything = [Run(path, row=False) for path in walk.runs]
        lineage = _Lineage(walk.results_root)
        names = [key.name for key in asked]
        if "reason" in names or "why" in names:
            _ask_sacct(everything)  # in one question; else each run asks for itself
        found = []  # those that are asked for, in no order
        for run in _with_progress(everything, "looking at runs"):
            run.lineage = lineage
            if filters.take(run, self.root):
                found.append(run)
            run.forget()
        if everything:
            self.warnings += filters.unknown_words(everything)
        if not found:
            self.warnings += filters.hidden_keys(everything[:MAX_COMPARED])
        if over is None:
            self.runs, self.unseen = _first_of(found, filters, walk)
            found = _with_others(self.runs, everything)
        else:
            keys = list(filter(None, map(str.strip, over.split(","))))
            for key in keys:
                self.warnings += _unknown_key(_Key(key), everything)
            groups = _fold_seeds(walk.newest(found, None), keys)
            self.groups, self.unseen = _first_of(groups, filters, walk)
            self.runs = [run for group in self.groups for run in group.runs]
        _ask_sacct(self.runs)
        for run in _with_progress(self.runs, "reading runs"):
            run.fill()
        for group in self.groups:
            self.warnings += group.warnings()
        self.differing = _differing_keys(found)  # by script: keys as "config.lr"


def _with_others(shown: Sequence[Run], everything: Sequence[Run]) -> list[Run]:
    """Return these runs and others, which decide with them what differs."""
    folders = {run.folder for run in shown}
    starts = tuple({re.split(_STAMP, run.name)[0] for run in shown})
    others = [run for run in everything if run.folder not in folders]
    alike = (run for run in others if run.name.startswith(starts))
    some = itertools.islice(itertools.chain(alike, others), MAX_COMPARED)
    return [*shown, *some]


def _first_of(
    items: list[_Ranked], filters: _Filters, walk: _Walk
) -> tuple[list[_Ranked], int]:
    """Return runs, or groups of them, in their order, and how many the limit hides."""
    groups = [items]
    sort = filters.sort
    if sort is not None:
        ranked = _in_order(items, lambda item: item.value(sort), filters.reverse)
        groups = list(ranked.values())
        if filters.is_top:  # texts, as of a model, only where there are no numbers
            groups = [group for rank, group in ranked.items() if rank[0] == 0]
            groups = groups or [ranked[rank] for rank in ranked if rank[0] == 1]
    count = sum(map(len, groups))
    limit = filters.limit or count
    first: list[_Ranked] = []
    for group in groups:
        if len(first) >= limit:
            break
        first += walk.newest(group, limit - len(first))
    return first, count - len(first)


def _in_order(
    items: Iterable[_Item], value_of: Callable[[_Item], object], reverse: bool = False
) -> dict[tuple[int, float, str], list[_Item]]:
    """Return items in groups of equal values, in the order of the values.

    Numbers come first, then texts, both in the direction asked for; then infinities,
    NaN, and at last what has no value.
    """
    groups: dict[tuple[int, float, str], list[_Item]] = {}
    for item in items:
        groups.setdefault(_sort_rank(value_of(item)), []).append(item)
    ranks = sorted(groups, reverse=reverse)
    return {rank: groups[rank] for rank in sorted(ranks, key=lambda rank: rank[0])}


def _sort_rank(value: object) -> tuple[int, float, str]:
    """Return what a value is sorted by: first its kind, then a number or a text."""
    if value is None:
        return 4, 0.0, ""
    number = _number(value)
    if number is None:
        return 1, 0.0, _text(value)
    if number != number:
        return 3, 0.0, ""
    if number - number != 0:
        return 2, number, ""
    return 0, number, ""


def _differing_keys(runs: Iterable[Run]) -> dict[str, list[str]]:
    values: dict[str, dict[str, set[str]]] = {}
    for run in runs:
        keys = values.setdefault(_script_of(run), {})
        for key, value in run.flat_config.items():
            keys.setdefault(key, set()).add(_text(value))
        run.forget()
    return {
        script: [key for key, found in keys.items() if len(found) > 1]
        for script, keys in values.items()
    }


def _unknown_key(key: _Key, runs: Iterable[Run]) -> list[str]:
    known: dict[str, None] = dict.fromkeys(_KEYS)
    for run in runs:
        if key.value(run) is not None or key.name in _ROW:
            return []
        for name in [*run.flat_config, *run.flat_metrics]:
            known[_short(name)] = None
        run.forget()
    return [f"no run has {key.text!r}{_similar(key.name, known)}"]


def _similar(word: str, known: Iterable[str]) -> str:
    """Return "; did you mean 'lr'?", or nothing."""
    import difflib

    found = difflib.get_close_matches(word, list(known)[:MAX_ITEMS], 1)
    return "".join(f"; did you mean {name!r}?" for name in found)


class _Key:
    """A value of a run: a key, or max(), min(), first() or last() of a metric."""

    def __init__(self, text: str) -> None:
        self.text = self.name = _unquoted(text)
        self.function: str | None = None
        found = re.fullmatch(r"(max|min|first|last)\((.+)\)", self.text)
        if found is not None:
            self.function = found[1]
            self.name = _unquoted(found[2])
        if not self.name:
            raise ValueError(f"{text!r} is no key; give one such as 'lr' or 'max(acc)'")

    def value(self, run: Run) -> object:
        """Return the value of a run: ours, else of its config, else of its metrics."""
        if self.function is not None:
            facts = _metric_facts(run, self.name)
            if not facts and self.name.startswith("metrics."):
                facts = _metric_facts(run, self.name.removeprefix("metrics."))
            return _as_float(facts.get(self.function))
        if self.name in _KEYS:
            return _KEYS[self.name](run)
        for name in (self.name, f"config.{self.name}", f"metrics.{self.name}"):
            found: Facts = {}
            if name.startswith("config."):
                found = run.flat_config
            elif name.startswith("metrics."):
                found = run.flat_metrics
            if name in found:
                return found[name]
        return None


def _unquoted(text: str) -> str:
    return re.sub('^"([^"]+)"$', r"\1", text.strip())


# One comparison, up to "and", "or", ")" or the end.
_TERM = (
    r"""(?x)\s*
    (?P<key> (?:max|min|first|last)\(.+?\)(?=\s*[<>=!~])  # max(val/acc)
           | (?:[^\s<>=!~"'()]|"[^"]*")+ )                # lr, model.lr, "val loss"
    \s* (?P<sign> <=|>=|==|!=|=|<|>|~ )
    \s* (?: "(?P<double>[^"]*)" | '(?P<single>[^']*)'
           | (?P<word>(?:\\.|[^\s"'()\\]|\([^\s"'()]*\))+) )  # 3, vit(-b|-l)
    (?= \s* $ | \s* \) | \s+ (?:and|or) \b )
    """
)


class _Condition:
    """What "lr<1e-3 and (max(acc)>0.9 or model~qwen)" asks of a run."""

    def __init__(self, text: str) -> None:
        self.text = self.rest = text
        self.terms: list[_Term] = []
        if text.count("(") > MAX_DEPTH:
            raise self._problem()
        self.holds = self._any()
        if self.rest.strip():
            raise self._problem()

    def _any(self) -> Callable[[Run], bool]:
        """Read what `or` joins; `and` binds tighter."""
        parts = [self._all()]
        while self._has(r"or\b"):
            parts.append(self._all())
        return lambda run: any(holds(run) for holds in parts)

    def _all(self) -> Callable[[Run], bool]:
        parts = [self._one()]
        while self._has(r"and\b"):
            parts.append(self._one())
        return lambda run: all(holds(run) for holds in parts)

    def _one(self) -> Callable[[Run], bool]:
        """Read one comparison, or what is in parentheses."""
        if self._has(r"\("):
            inner = self._any()
            if not self._has(r"\)"):
                raise self._problem()
            return inner
        found = _re(_TERM).match(self.rest)
        if found is None:
            raise self._problem()
        # No part of an operator is in a value without quotes: not "lr<=>3".
        if found["sign"] != "~" and re.search("[()<>=!~]", found["word"] or ""):
            raise self._problem()
        self.rest = self.rest[found.end() :]
        self.terms.append(_Term(found))
        return self.terms[-1].holds

    def _has(self, pattern: str) -> bool:
        """Tell whether this word or sign comes next, and go on after it."""
        found = re.match(rf"\s*{pattern}", self.rest)
        if found is not None:
            self.rest = self.rest[found.end() :]
        return found is not None

    def _problem(self) -> ValueError:
        place = "its end"
        if self.rest.strip():
            place = repr(self.rest.strip())
        what = f"where {self.text!r} is not understood at {place}"
        how = "write KEY<VALUE (or <= > >= == != ~), joined by and/or"
        return ValueError(f"{what}; {how}")


class _Term:
    """One comparison: "max(acc)>=0.9"."""

    def __init__(self, found: re.Match[str]) -> None:
        self.key = _Key(found["key"])
        self.sign = found["sign"]
        self.wanted = found["double"] or found["single"] or found["word"] or ""
        self.wants_null = self.wanted.lower() in ("null", "none")
        if self.sign == "~":
            try:
                re.compile(self.wanted)
            except re.error as error:
                what = f"where: {self.wanted!r} is no regular expression"
                raise ValueError(f"{what}: {error}") from None

    def holds(self, run: Run) -> bool:
        """Tell whether it holds: of numbers if both are, else of texts.

        A number is neither less, more nor equal to a text, and NaN to nothing. That
        `tags=x` asks whether x is one of them.
        """
        found = self.key.value(run)
        if isinstance(found, list) and self.sign in ("=", "==", "!="):
            if self.key.name == "tags":
                return (self.wanted in found) == (self.sign != "!=")
        if self.sign == "~":
            return found is not None and bool(re.search(self.wanted, _text(found)))
        if found is None and self.wants_null:
            return self.sign in ("=", "==")
        sides: JSON = None, None
        if not (isinstance(found, str) and self.key.name in _KEYS):
            sides = _number(found), _number(self.wanted)
        is_mixed = (sides[0] is None) != (sides[1] is None)
        if is_mixed or found is None or self.wants_null:
            return self.sign == "!="
        if sides[0] is None:
            sides = _text(found).lower(), self.wanted.lower()
        return bool(_SIGNS[self.sign](*sides))


_SIGNS: dict[str, Callable[[JSON, JSON], JSON]] = {
    "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge,
    "=": operator.eq, "==": operator.eq, "!=": operator.ne,
}


# Metrics: metrics/summary.json is what the whole of metrics.jsonl says, in short.


def _summarize_metrics(run_dir: StrPath) -> Facts:
    """Return the content of metrics/summary.json; nothing where there are no metrics.

    {"acc": {"last": 0.7, "last_step": 9, "min": ..., "max": ..., "first": ...,
    "count": 10}, ..., "metrics.jsonl": {"bytes": 812}}: by its size a reader sees
    whether rows were added since.
    """
    path = f"{run_dir}/metrics/metrics.jsonl"
    summary: Facts = {}
    if not exists(path):
        return summary
    size = os.path.getsize(path)
    for key, values, steps in _metric_columns(path):
        if key in summary or len(summary) < MAX_ITEMS:
            _add_values(summary.setdefault(key, {**_NO_VALUES}), values, steps)
    if summary:
        summary["metrics.jsonl"] = {"bytes": size}
    return summary


# What a reader finds of a metric that has no values.
_NO_VALUES: Facts = {
    "last": None, "last_step": None, "min": None, "min_step": None,
    "max": None, "max_step": None, "first": None, "first_step": None, "count": 0,
}


def _add_values(facts: Facts, values: Sequence[JSON], steps: Sequence[JSON]) -> None:
    """Add some values of a metric, at these steps, to its summary."""
    if facts["count"] == 0:
        facts["first"], facts["first_step"] = values[0], steps[0]
    facts["last"], facts["last_step"] = values[-1], steps[-1]
    facts["count"] += len(values)
    if not set(map(type, values)) <= {int, float} or values[0] != values[0]:
        pairs = zip(map(_as_float, values), steps)
        known = [pair for pair in pairs if type(pair[0]) in (int, float)]
        numbers = [pair for pair in known if pair[0] == pair[0]]
        if not known:
            return
        # What is nothing but NaN has it as its lowest and its highest value.
        values, steps = zip(*(numbers or [(known[0][0], None)]))
    for name, extreme in (("min", min), ("max", max)):
        found = extreme(values)  # which passes over a NaN that is not the first
        before = facts[name]
        if before is None or before != before or extreme(before, found) != before:
            facts[name], facts[f"{name}_step"] = found, steps[values.index(found)]


def _metric_facts(run: Run, key: str) -> Facts:
    """Return the summary of one metric, {} if the run has none of this name."""
    if "raw_summary" not in run.__dict__:
        with _ignoring(OSError, ValueError, RecursionError):
            text = _small_text(f"{run.folder}/metrics/summary.json")
            size = os.stat(f"{run.folder}/metrics/metrics.jsonl").st_size
            if f'\n    "bytes": {size}\n' in text:
                member = text.partition(_member_start(key))[2]
                if not member:
                    return {}
                return _mapping(_decoder.raw_decode(member)[0])
    return _mapping(run.raw_summary, key)


_decoder = json.JSONDecoder()


@functools.lru_cache(100)
def _member_start(key: str) -> str:
    """Return how a member begins in a JSON file that is indented as ours are."""
    return f"\n  {json.dumps(key)}: "


def _all_series(run: Run) -> dict[str, tuple[list[JSON], list[JSON]]]:
    series: dict[str, tuple[list[JSON], list[JSON]]] = {}
    path = f"{run.folder}/metrics/metrics.jsonl"
    try:
        for key, values, steps in _metric_columns(path):
            known = series.setdefault(key, ([], []))
            known[0].extend(map(_as_float, values))
            known[1].extend(steps)
    except OSError as error:
        run.unread["metrics"] = _unreadable(error, path)
    return series


def _metric_columns(path: str) -> Iterator[tuple[str, list[JSON], list[JSON]]]:
    """Yield metrics, some of their values, and the steps that belong to them."""
    for rows in map(_rows_of, _line_blocks(path, MAX_METRICS)):
        different = set(map(tuple, rows))
        if len(different) > 1:  # nearly all have the same keys
            yield from _columns_by_row(rows)
            continue
        steps = [row.get("step") for row in rows]
        for key in itertools.chain(*different):
            yield key, [row[key] for row in rows], steps


def _columns_by_row(
    rows: Iterable[Facts],
) -> Iterator[tuple[str, list[JSON], list[JSON]]]:
    columns: dict[str, tuple[list[JSON], list[JSON]]] = {}
    for row in rows:
        for key, value in row.items():
            values, steps = columns.setdefault(key, ([], []))
            values.append(value)
            steps.append(row.get("step"))
    for key, (values, steps) in columns.items():
        yield key, values, steps


def _line_blocks(path: StrPath, limit: int) -> Iterator[bytes]:
    """Yield the lines of a file, METRICS_BYTES at a time."""
    try:
        file = _opened(path, limit)
    except FileNotFoundError:
        return
    rest = b""
    with file:
        for data in iter(lambda: file.read(METRICS_BYTES), b""):
            lines, _, rest = (rest + data).rpartition(b"\n")
            yield lines
            if len(rest) > METRICS_BYTES:
                rest = b"torn"  # a line that never ends
    yield rest


def _rows_of(lines: bytes) -> list[Facts]:
    """Return the objects in some lines of JSON; what is torn is left out."""
    rows: list[Facts] = []
    with _ignoring(ValueError, RecursionError):
        rows = json.loads(b"[" + lines.replace(b"\n", b",") + b"]")
    if set(map(type, rows)) != {dict}:
        rows = list(_mappings_in(lines))
    if lines.count(b"{") > len(rows):  # mappings in mappings, or a text with a brace
        rows = [_flattened("", row) for row in rows]
    return rows


# What a run left, and why it failed.

# The files in a run that are its record, and no outputs.
_RECORD_FILE = (
    r"(config\.yaml|(metadata|status)\.json|(notes|inputs)\.jsonl|\.[^/]*|.*/.*\.tmp"
    r"|git(\.[^/]+)?\.(patch|bundle)|artifacts/USED_BY\.jsonl"
    r"|metrics/(summary\.json|system\.jsonl))"
)


def _output_sizes(run_dir: StrPath) -> dict[str, int]:
    sizes = _file_sizes(run_dir, ("logs", "attempts"))
    is_record = _re(f"(?s){_RECORD_FILE}").fullmatch
    return {name: size for name, size in sizes.items() if not is_record(name)}


def _file_sizes(folder: StrPath, skipped: Sequence[str] = ()) -> dict[str, int]:
    sizes: dict[str, int] = {}
    waiting = [""]
    while waiting and len(sizes) < MAX_ITEMS:
        inside = waiting.pop()
        with _ignoring(OSError), os.scandir(f"{folder}/{inside}") as entries:
            for entry in entries:
                name = inside + entry.name
                if not entry.is_dir(follow_symlinks=False):
                    sizes[name] = entry.stat(follow_symlinks=False).st_size
                elif name not in skipped:
                    waiting.append(f"{name}/")
    return dict(sorted(sizes.items())[:MAX_ITEMS])


def _left_files(run_dir: StrPath) -> list[Facts]:
    """Return the files that a run left, with their sizes and sha256.

    By these a copy finds its run again. Small files come first; sha256 is null beyond
    OUTPUT_SECONDS, and there are at most OUTPUT_FILES.
    """
    deadline = monotonic() + OUTPUT_SECONDS
    sizes = _output_sizes(run_dir)
    files: list[Facts] = []
    for name in sorted(sizes, key=sizes.__getitem__)[:OUTPUT_FILES]:
        digest = _sha256(f"{run_dir}/{name}", deadline)
        files.append({"path": name, "size": sizes[name], "sha256": digest})
    return files


def _sha256(
    path: StrPath, deadline: float = float("inf"), follow: bool = False
) -> str | None:
    """Return the hash of a regular file, None if it cannot be read or not in time."""
    digest = _digest("sha256")
    with _ignoring(OSError), _opened(path, sys.maxsize, follow) as file:
        for data in iter(lambda: file.read(METRICS_BYTES), b""):
            if monotonic() >= deadline:
                return None
            digest.update(data)
        return str(digest.hexdigest())
    return None


def _makers_of(path: str, runs: Iterable[str]) -> list[str]:
    size = os.stat(path).st_size
    digest = _sha256(path, monotonic() + PROGRAM_SECONDS, follow=True)
    if size == 0 or digest is None:
        return []
    makers = [run for run in runs if _left(run, size, digest)]
    return sorted(makers, key=_started)


def _left(run: str, size: int, digest: str) -> bool:
    metadata = _readable_bytes(f"{run}/metadata.json", MAX_RECORD)
    if b'"outputs": [' in metadata:
        if digest.encode("ascii") not in metadata:
            return False
        outputs = _rows(_read_json(f"{run}/metadata.json"), "outputs")
        return digest in [file.get("sha256") for file in outputs]
    deadline = monotonic() + PROGRAM_SECONDS
    for name, length in _output_sizes(run).items():
        if length == size and _sha256(f"{run}/{name}", deadline) == digest:
            return True
    return False


def _reason(run: Run) -> str | None:
    """Return "rank 1: ValueError: bad" of a run that failed, or what else is wrong."""
    lines = ": ".join(filter(None, _reasons(run))).strip().splitlines()
    if not lines:
        return None
    return _shortened(lines[0], MAX_REPR)


def _reasons(run: Run) -> Iterator[str]:
    status = run.status
    if run.state in ("running", "success"):
        yield from _texts(status, "warnings")[:1]
        return
    if status.get("failed_rank") is not None:
        yield f"rank {_text(status['failed_rank'])}"
    _ask_sacct([run])
    yield _job_ends.get(_unexplained_job(run), "")
    exception = _mapping(status, "exception")
    message = _text(exception.get("message") or "")
    code = _text(status.get("exit_code"))
    if exception and exception.get("type") != "SystemExit":
        yield _text(exception.get("type"))
        yield message
    elif status.get("problem"):
        yield _text(status["problem"])
    elif status.get("exit_code"):
        yield f"exit code {code}"
        for text in [message, *reversed(_texts(status, "last_output"))]:
            if text.strip() not in ("", code) and not text.startswith("run_utils: "):
                yield text.strip()
                return


# How SLURM ended a job, where that explains the end of a run.
_JOB_ENDS = ("TIMEOUT", "DEADLINE", "OUT_OF_MEMORY", "PREEMPTED", "NODE_FAIL",
             "BOOT_FAIL", "CANCELLED")
_job_ends: dict[str, str] = {}  # what sacct told of a job, or ""; it is asked once


def _unexplained_job(run: Run) -> str:
    """Return the number of the SLURM job of a run that cannot tell how it ended."""
    if run.state == "lost" or run.status.get("exit_reason") == "killed":
        job = _word(run.metadata, "launcher", "SLURM_JOB_ID")
        if re.fullmatch("[0-9]{1,12}", job):
            return job
    return ""


def _ask_sacct(runs: Iterable[Run]) -> None:
    """Ask SLURM how jobs ended whose runs cannot tell it, many in one question."""
    found = dict.fromkeys(map(_unexplained_job, runs))
    jobs = [job for job in found if job and job not in _job_ends]
    _job_ends.update(dict.fromkeys(jobs, ""))
    lines: list[str] = []
    with _ignoring(_Unknown):  # there is no SLURM here, or it does not answer
        for first in range(0, len(jobs), SACCT_JOBS):
            words = ",".join(jobs[first : first + SACCT_JOBS])
            command = ["sacct", "-n", "-P", "-o", "JobIDRaw,State", "-j", words]
            lines += _lines_of(_run(command, timeout=SACCT_SECONDS))
    for line in lines:
        # 4711|TIMEOUT
        # 4711.batch|CANCELLED by 1000
        name, _, state = line.partition("|")
        job, _, step = name.partition(".")
        word = state.split(" ")[0]
        is_told = not step or word == "OUT_OF_MEMORY"
        if is_told and word in _JOB_ENDS:
            _job_ends[job] = f"SLURM says {word}"


# Seeds: runs that differ in nothing else are one row, with mean and spread.


class _Spread:
    """Mean and sample standard deviation of the finite numbers among some values."""

    def __init__(self, values: Iterable[object]) -> None:
        numbers = _numbers(filter(_is_finite, values))
        self.count = len(numbers)
        self.mean: float | None = None
        self.deviation: float | None = None
        if self.count:
            self.mean = sum(numbers) / self.count
        if self.mean is not None and self.count > 1:
            off = [number - self.mean for number in numbers]
            squares = sum(part * part for part in off)  # ** 2 raises beyond 1e154
            self.deviation = (squares / (self.count - 1)) ** 0.5


class _Group:
    """Runs of one script whose config is equal but for the keys folded over."""

    def __init__(self, config: Facts, newest: Run) -> None:
        self.config = config  # what they have in common, by "config.lr"
        self.runs: list[Run] = []
        self.started = newest.started
        self.folder = newest.folder

    def states(self) -> dict[str, int]:
        states = [run.state for run in self.runs]
        return {state: states.count(state) for state in states}

    def spread(self, key: _Key) -> _Spread:
        return _Spread(key.value(run) for run in self.runs)

    def value(self, key: _Key) -> object:
        return self.spread(key).mean

    def warnings(self) -> Iterator[str]:
        first, *others = self.runs
        facts = _comparable_run(first)
        found: dict[str, list[str]] = {"code": [], "packages": []}
        for run in _with_progress(others, "comparing runs"):
            different = _differences(facts, _comparable_run(run))
            for kind in found.keys() & different.keys():
                found[kind].append(run.name)
            run.forget()
        for kind, names in found.items():
            if names:
                yield f"{kind} of {first.name} is not that of {_format_paths(names)}"


def _fold_seeds(runs: Iterable[Run], keys: Iterable[str]) -> list[_Group]:
    left_out = set(keys)
    left_out |= {f"config.{key}" for key in left_out}
    groups: dict[str, _Group] = {}
    for run in runs:
        config = {k: v for k, v in run.flat_config.items() if k not in left_out}
        same = _format_json([_script_of(run), sorted(config.items())])
        groups.setdefault(same, _Group(config, run)).runs.append(run)
        run.forget()
    return list(groups.values())


# One comparison: of two runs, of a run with here and now, of a run with its last
# attempt.


def _comparison(then: Run, now: Run | None) -> Differences:
    """Return what differs between two runs, or between a run and here and now."""
    if now is None:
        return _differences(_comparable_run(then), _comparable_now(then))
    return _differences(_comparable_run(then), _comparable_run(now))


def _differences(then: Comparable, now: Comparable) -> Differences:
    """Return [then, now] of what differs in the sections that both sides have."""
    found: Differences = {}
    for section in [section for section in then if section in now]:
        before, after = then[section], now[section]
        if before is None or after is None:
            before = {"recorded": before is not None}
            after = {"recorded": after is not None}
        pairs = {key: [before.get(key), after.get(key)] for key in {**before, **after}}
        different = {key: pair for key, pair in pairs.items() if not _is_same(*pair)}
        if different:
            found[section] = different
    return found


def _comparable_run(run: Run) -> Comparable:
    of_run = {"config": run.config, "determinism": _seeds(run)}
    facts = _comparable({**run.metadata, **of_run})
    code = facts["code"]
    if code is not None:
        patches = _patches_of(run)
        if code.get("is_dirty") and not patches:
            patches["uncommitted changes"] = f"not kept by {run.name}"
        code.update(patches)
    facts["metrics"] = {k: v for k, v in run.metrics.items() if k not in _NO_METRICS}
    return facts


def _patches_of(run: Run) -> Facts:
    patches: Facts = {}
    for path in sorted(run.path.glob("git*.patch")):
        with _ignoring(OSError):
            patches[path.name] = _read_bytes(path).decode("utf-8", "replace")
    return patches


def _seeds(run: Run) -> Facts:
    """Return the seeds at the start of a run, or as they were found out later."""
    return _mapping(run.metadata, "determinism") | _mapping(run.status, "determinism")


def _comparable(metadata: Facts) -> Comparable:
    """Return what can differ between two runs, by section; None: it is not known."""
    git = _mapping(metadata, "git")
    code = None
    if "commit_full" in git:
        keys = ("commit_full", "branch", "is_dirty", "remote_origin_url")
        code = {key: git.get(key) for key in keys}
        code.update({key: git.get(key) or [] for key in ("changed", "untracked")})
    config = _mapping(_converted(_mapping(metadata, "config"), _as_float))
    return {
        "config": _flattened("", _arguments(config)),
        "code": code,
        "packages": _comparable_packages(metadata.get("pip_freeze")),
        "machine": _comparable_machine(metadata),
    }


def _comparable_packages(lines: JSON) -> Facts | None:
    """Return the version of each package, or where it was installed from.

    numpy==1.26.4
    pkg @ git+https://example.org/pkg@1a2b3c4
    -e git+ssh://git@example.org/pkg.git@1a2b3c4#egg=pkg
    -e /home/ann/pkg
    """
    if not isinstance(lines, list):
        return None
    packages: Facts = {}
    for line in map(str, lines):
        name, version = line, line
        named = re.match(r"([^=@<> ]+)(?: ?@ ?|==)(.*)|-e .*#egg=([^&]+)", line)
        if named is not None:
            name, version = named[1] or named[3], named[2] or line
        packages[name.lower().replace("_", "-")] = version
    return packages


# Other in every run, or not known of older ones.
_UNEQUAL = ("memory_kib", "hash_randomization", "random_state", "numpy_state")


def _comparable_machine(metadata: Facts) -> Facts:
    machine = {
        "hostname": metadata.get("hostname"),
        "python": _python_version(metadata),
        "executable": _at(metadata, "python", "executable"),
        "container": _at(metadata, "container", "image"),
    }
    for section in ("platform", "cuda", "determinism"):
        machine.update(_mapping(metadata, section))
    return {key: value for key, value in machine.items() if key not in _UNEQUAL}


def _comparable_now(run: Run) -> Comparable:
    """Return the same of here and now; it has no config, metrics or seeds."""
    then = _mapping(run.metadata, "git")
    site = _Site.here()
    site.run_dir = run.folder
    site.results_root = str(_results_root(run.path.parent))
    site.script = None
    top = _word(then, "patch", "root")
    patch = _patches_of(run).get("git.patch", "")
    names = re.findall(r"^\+\+\+ b/(.+)", patch, re.M)
    site.loaded = [join(top, name) for name in names]
    for folder in (_word(then, "directory"), _word(then, "root")):
        if isdir(folder):
            site.directory = folder
    repository = _Repository.of(site)
    repository.wanted = _word(then, "base", "commit") or None
    record = _Unwritten(run)
    now = _quick_metadata(site, None)
    _collect(now, "git", repository.facts)
    _collect(now, "git.patch", lambda: _git_patch(record, repository))
    _collect(now, "pip_freeze", _Packages(site, record).lines)
    _collect(now, "container", _container)
    _collect(now, "cuda", _cuda)
    now["determinism"] = _seeds(run)
    loaded = _at(run.metadata, "cuda", "torch_cuda_version")
    now["cuda"] = {**_mapping(now, "cuda"), "torch_cuda_version": loaded}
    facts = _comparable(now)
    if facts["code"] is not None:
        facts["code"].update(record.patches)
    del facts["config"]
    return facts


class _Unwritten(_Record):
    """A record that keeps in memory what would be the patches of a run."""

    def __init__(self, run: Run) -> None:
        super().__init__(run.path, 1, _results_root(run.path.parent))
        self.metadata = run.metadata
        self.patches: Facts = {}

    def write_bytes(self, name: str, data: bytes, durable: bool = False) -> None:
        self.patches[name] = data.decode("utf-8", "replace")

    def earlier_runs(self) -> Iterator[Path]:
        return iter(())

    def earlier_metadata(self) -> Iterator[Facts]:
        """Yield that of the run itself: what has not changed is taken from there."""
        yield self.metadata


# Pruning: nothing goes that somebody may still need, and nothing without being asked.


def _why_it_stays(run: Run) -> str | None:
    if run.state in ("running", "unknown"):
        return "it may be running"
    for problem in run.problems:
        if problem.endswith(_DENIED):
            return problem
    if run.used_by:
        return f"{run.used_by[0]} used it"
    for tag in _tags(run.notes):
        return f"it is tagged {tag}"
    if any(note.get("text") for note in run.notes):
        return "it has a note"
    return None


def _prune(root: str, run: Run, purge: bool) -> str | None:
    """Move a run to ROOT/.trash, or delete it; return where it is now."""
    import shutil

    as_it_is_now = Run(run.folder, row=False)  # somebody may have noted something
    as_it_is_now.lineage = run.lineage
    refusal = _why_it_stays(as_it_is_now)
    if refusal is not None:
        raise ValueError(f"{run.name} stays: {refusal}")
    if purge:
        shutil.rmtree(run.folder)
        return None
    inside = relpath(run.folder, root)
    if inside.startswith(os.curdir):
        inside = run.name  # found through a link, or given as the root itself
    wanted = place = join(root, TRASH_FOLDER, inside)
    numbers = itertools.count(2)
    while lexists(place):
        place = f"{wanted}-{next(numbers)}"
    os.makedirs(dirname(place), exist_ok=True)
    os.rename(run.folder, place)
    return place


# Small things about values of JSON files.


def _arguments(config: Facts) -> Facts:
    """Return a config without the command, which is in it as well."""
    return {key: value for key, value in config.items() if key != "command"}


def _at(facts: JSON, *keys: str) -> JSON:
    """Return facts[key][...]; None where that is not there."""
    for key in keys:
        if not isinstance(facts, dict):
            return None
        facts = facts.get(key)
    return facts


def _changed(before: Mapping[str, JSON], now: Mapping[str, JSON]) -> Facts:
    """Return what of `now` is new or has another value than before."""
    return {key: value for key, value in now.items() if before.get(key) != value}


def _is_same(value: JSON, other: JSON) -> bool:
    """Tell whether two values are equal; NaN is the same as NaN."""
    return bool(value == other or repr(value) == repr(other))


def _typed(kind: type[_Item], facts: JSON, keys: Sequence[str]) -> _Item:
    """Return facts[key][...]; an empty value where nothing of this type is there."""
    value = _at(facts, *keys)
    if isinstance(value, kind):
        return value
    return kind()


def _mapping(facts: JSON, *keys: str) -> Facts:
    return _typed(dict, facts, keys)


def _word(facts: JSON, *keys: str) -> str:
    return _typed(str, facts, keys)


def _texts(facts: JSON, *keys: str) -> list[str]:
    return [text for text in _items(facts, *keys) if isinstance(text, str)]


def _rows(facts: JSON, key: str) -> list[Facts]:
    return [row for row in _items(facts, key) if isinstance(row, dict)]


def _items(facts: JSON, *keys: str) -> list[JSON]:
    return _typed(list, facts, keys)


def _text(value: object) -> str:
    if isinstance(value, str):
        text = value
    elif isinstance(value, float):
        text = f"{value:.6g}"
    else:
        try:
            text = json.dumps(value, default=str)
        except (ValueError, RecursionError):  # a number of 5,000 digits, deep nesting
            text = f"<{type(value).__name__}>"
    if len(text) > MAX_MESSAGE:
        return text[:MAX_MESSAGE] + "..."
    return text


def _number(value: object) -> float | None:
    if type(value) is float:
        return value
    if isinstance(value, (int, float, str)) and not isinstance(value, bool):
        with _ignoring(ValueError, OverflowError):
            return float(value)
    return None


def _numbers(values: Iterable[object]) -> list[float]:
    return [number for number in map(_number, values) if number is not None]


def _is_finite(value: object) -> bool:
    number = _number(value)
    return number is not None and number - number == 0


def _tags(notes: Iterable[Facts]) -> list[str]:
    """Return the tags that are in force after all notes, in their order."""
    tags: dict[str, None] = {}
    for note in notes:
        added, taken = _texts(note, "tags"), _texts(note, "untag")
        for tag in [*added, *taken]:
            tags.pop(tag, None)
        tags.update(dict.fromkeys(tag for tag in added if tag and tag not in taken))
    return list(tags)


_DENIED = "permission denied"


def _unreadable(error: Exception, path: str) -> str:
    """Return the sentence for what cannot be read; raise what is the program's own."""
    if _is_foreign(error):
        raise error
    why = getattr(error, "strerror", None) or error
    if isinstance(error, PermissionError):
        why = _DENIED
    elif getattr(error, "errno", None) == errno.ELOOP:
        why = "it is a link"
    return f"{path!r} cannot be read: {why}"


# === Showing ===
# First a model: the columns of a table, or the paragraphs of a page. Text, Markdown,
# CSV and HTML render it, and there all that comes from a run directory is escaped.

if TYPE_CHECKING:
    Paragraph = tuple[str, list[str]]  # a name, and lines


class _Column:
    """One column of a table: a heading, and for each row a value and its text."""

    def __init__(
        self, heading: str, values: Sequence[object],
        texts: Iterable[str] | None = None, rank: int = 0, beneath: bool = False,
    ) -> None:
        if texts is None:
            texts = map(_cell_text, values)
        self.values = values
        self.cells = [heading, *texts]
        self.rank = rank  # where there is no room, the highest goes first
        self.beneath = beneath
        self.is_name = heading == "run"
        known = [value for value in values if value is not None]
        self.is_number = bool(known) and all(map(_is_number_value, known))

    def is_empty(self) -> bool:
        return not any(self.cells[1:])

    def width(self) -> int:
        return max(map(_width, self.cells))

    def least(self) -> int:
        """Return the columns that it must have: a number is never cut."""
        heading = _width(self.cells[0])
        if self.rank > 0:
            heading = min(heading, TEXT_WIDTH)
        return max(heading, self.least_of_texts(NAME_WIDTH))

    def least_of_texts(self, name_width: int = LEAST_NAME_WIDTH) -> int:
        """Return the same for where there is no room for its heading."""
        longest = max(map(_width, self.cells[1:]))
        if self.is_name:
            return min(longest, name_width)
        if self.is_number:
            return longest
        return min(longest, TEXT_WIDTH)

    def fitted(self, width: int) -> list[str]:
        """Return the heading and the texts, each in exactly `width` columns."""
        if self.is_name:
            return _short_names(self.cells, width)
        cells = self.cells
        if self.is_number:
            cells = [" " * (width - _width(text)) + text for text in cells]
        return [_cut(text, width) for text in cells]


def _is_number_value(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _cell_text(value: object) -> str:
    if value is None:
        return ""
    return _text(value)


# --- The columns and rows of `list`.


def _run_columns(
    runs: Sequence[Run], root: StrPath, differing: Mapping[str, Sequence[str]],
    asked: Sequence[str] = (), whole: bool = False,
) -> list[_Column]:
    """Return the columns of some runs, metrics before config."""
    ages = [_age(run) for run in runs]
    times = [_duration(run) for run in runs]
    metrics = [key for run in runs for key in run if key.startswith("metrics.")]
    config: dict[str, None] = {}
    for run in runs:
        config.update(dict.fromkeys(differing.get(run["script_name"], ())))
    columns = [
        _Column("run", [relpath(run.path, root) for run in runs]),
        _Column("status", [_status_text(run) for run in runs]),
        _Column("age", ages, map(_format_seconds, ages), 3),
        _Column("time", times, map(_format_seconds, times), 5),
        *(_Column(text, [_Key(text).value(run) for run in runs])
          for text in dict.fromkeys(asked) if text not in _COLUMN_OF),
        *_key_columns(runs, metrics, asked, 1, 4, taken=config),
        *_key_columns(runs, config, asked, 2, 6),
        _Column("outputs", [len(r.outputs) for r in runs], map(_outputs_text, runs), 7),
        _Column("why", [run["reason"] for run in runs], beneath=True),
    ]
    if whole:
        used = [", ".join([*run.inputs, *_tied_names(run)]) for run in runs]
        users = [", ".join(run.used_by) for run in runs]
        columns += [_Column("inputs", used), _Column("used by", users)]
    columns.append(_Column("notes", [_notes_text(run) for run in runs], beneath=True))
    for column in columns:
        if column.cells[0] in [_COLUMN_OF.get(text) for text in asked]:
            column.rank = 0
    return columns


_NO_METRICS = ("step", "time")
_COLUMN_OF = {  # some keys: the heading of the column that shows them
    "name": "run", "status": "status", "started_utc": "age", "duration_seconds": "time",
    "outputs": "outputs", "size": "outputs", "reason": "why", "tags": "notes",
    "run": "run", "age": "age", "time": "time", "why": "why", "notes": "notes",
}


def _key_columns(
    rows: Sequence[Mapping[str, object]], keys: Iterable[str], asked: Sequence[str],
    rank: int, others: int, taken: Collection[str] = (),
) -> Iterator[_Column]:
    """Yield columns for keys; the most frequent has a `rank` of its own.

    A metric keeps its whole name if a key of the config in `taken` has its heading.
    """
    counts = {key: sum(key in row for row in rows) for key in dict.fromkeys(keys)}
    ours = [f"metrics.{name}" for name in _NO_METRICS]
    for key in sorted(counts, key=lambda key: -counts[key]):
        if not counts[key] or key in ours:
            continue
        heading = _short(key)
        if f"config.{heading}" in taken:
            heading = key
        if not {key, heading}.intersection(asked):
            texts = [_spread_text(row, key) for row in rows]
            yield _Column(heading, [row.get(key) for row in rows], texts, rank)
            rank = others


def _status_text(run: Run) -> str:
    if run["attempts"] > 1:
        return f"{run.state} ({run['attempts']} attempts)"
    return run.state


def _age(run: Run) -> float | None:
    started = _seconds(run["started_utc"])
    if started is None:
        return None
    return time.time() - started


def _duration(run: Run) -> float | None:
    if run["status"] == "running":
        return _age(run)
    return _number(run["duration_seconds"])


def _outputs_text(run: Run) -> str:
    if not run.outputs:
        return "empty"
    return f"{len(run.outputs)} ({_format_size(sum(run.outputs.values()))})"


def _notes_text(run: Run) -> str:
    tags = [f"[{tag}]" for tag in run["tags"]]
    return " ".join([*tags, "; ".join(_note_texts(run))]).strip()


def _note_texts(run: Run) -> list[str]:
    return [_text(note["text"]) for note in run.notes if note.get("text")]


def _run_row(run: Run, selection: _Selection) -> Facts:
    row: Facts = {
        "path": relpath(run.path, selection.root),
        "outputs": len(run.outputs),
        "size": sum(run.outputs.values()),
        "inputs": run.inputs,
        "used_by": run.used_by,
        **run,
        "notes": _note_texts(run),
        "problems": run.problems,
    }
    for key in selection.shown:
        row.setdefault(key.text, key.value(run))
    return row


def _group_row(group: _Group, asked: Iterable[str]) -> Facts:
    """Return runs that differ only in their seeds as one row: means and deviations."""
    newest = group.runs[0]
    states = [f"{count} {state}" for state, count in group.states().items()]
    row: Facts = {
        "run": newest.name,
        "runs": len(group.runs),
        "status": ", ".join(states),
        "script_name": newest["script_name"],
        **group.config,
    }
    keys = dict.fromkeys(key for run in group.runs for key in run)
    metrics = [key for key in keys if key.startswith("metrics.")]
    spreads = {key: _Spread(run.get(key) for run in group.runs) for key in metrics}
    spreads.update({key: group.spread(_Key(key)) for key in asked})
    for key, spread in spreads.items():
        if spread.mean is not None and key not in row:
            row[key] = spread.mean
            row[f"{key} deviation"] = spread.deviation
            row[f"{key} count"] = spread.count
    return row


def _group_columns(
    rows: Sequence[Facts], differing: Mapping[str, Sequence[str]], asked: Sequence[str]
) -> list[_Column]:
    config = dict.fromkeys(itertools.chain(*differing.values()))
    means = [key for row in rows for key in row if f"{key} count" in row]
    columns = []
    for key in dict.fromkeys(["run", "runs", "status", *asked]):
        values = [row.get(key, row.get(f"config.{key}")) for row in rows]
        columns.append(_Column(key, values, [_spread_text(row, key) for row in rows]))
    columns += _key_columns(rows, means, [*asked, *config], 1, 4, taken=config)
    columns += _key_columns(rows, config, asked, 2, 6)
    return columns


def _spread_text(row: Mapping[str, object], key: str) -> str:
    """Return a value; of a group "0.912 ± 0.021 (5)": mean, deviation, how many."""
    value = row.get(key, row.get(f"config.{key}"))
    deviation = row.get(f"{key} deviation")
    if deviation is None:
        return _cell_text(value)
    return f"{value:.4g} ± {deviation:.2g} ({row[f'{key} count']})"


# --- Tables.


def _print_columns(columns: Sequence[_Column], form: str | None) -> None:
    # What was asked for is shown, though it be empty.
    columns = [c for c in columns if not c.is_empty() or not (c.rank or c.beneath)]
    if form == "md":
        heading, *rows = zip(*(column.cells for column in columns))
        for row in [heading, ["---"] * len(columns), *rows]:
            print(f"| {' | '.join(map(_markdown, row))} |")
        print()
    elif len(columns[0].cells) > 1:
        _print_table(columns)


def _print_table(columns: Sequence[_Column]) -> None:
    """Print a table; where the terminal is narrow, shorten and leave out."""
    for column in columns:
        column.cells = list(map(_printable, column.cells))
    room = _terminal_width() or sys.maxsize
    widths = {column: column.width() for column in columns}
    beneath: list[_Column] = []
    if _total(widths) > room:
        widths = _shortened_widths([c for c in columns if not c.beneath], room)
        # What was asked for is on the screen, wherever there is room.
        beneath = [c for c in columns if c.beneath or not (c.rank or c in widths)]
    lines = []
    fitted = [column.fitted(width) for column, width in widths.items()]
    for number, row in enumerate(zip(*fitted)):
        lines.append("  ".join(row))
        if number:
            lines += _lines_beneath(beneath, number, room)
    left_out = [c.cells[0] for c in columns if c not in widths and c not in beneath]
    if left_out:
        lines.append(f"not shown: {', '.join(left_out)}")
    for line in lines:
        print(_cut(line.rstrip(), room).rstrip())


def _lines_beneath(columns: Iterable[_Column], number: int, room: int) -> list[str]:
    """Return what some columns have in a row, as many on a line as have room."""
    lines: list[str] = []
    for column in columns:
        text = column.cells[number]
        if text and not column.beneath:
            text = f"{column.cells[0]} {text}"
        if text and lines and _width(f"{lines[-1]}  {text}") <= room:
            lines[-1] += f"  {text}"
        elif text:
            lines.append(f"    {text}")
    return lines


def _shortened_widths(columns: Sequence[_Column], room: int) -> dict[_Column, int]:
    widths = {column: column.width() for column in columns}
    _fit(widths, room, _Column.least)
    total = _total(widths)
    for last in sorted(columns, key=lambda column: column.rank)[::-1]:
        if total <= room or last.rank == 0:
            break  # all that is left has room, or was asked for
        total -= widths.pop(last) + 2
    _fit(widths, room, _Column.least_of_texts)
    while _total(widths) > room and len(widths) > 2:
        widths.popitem()
        _fit(widths, room, _Column.least_of_texts)
    return widths


def _fit(
    widths: dict[_Column, int], room: int, least: Callable[[_Column], int]
) -> None:
    """Let the first columns, of which one is the name, take or leave what is needed."""
    spare = room - _total(widths)
    for column, before in widths.items():
        width = min(max(before + spare, least(column)), column.width())
        spare += before - width
        widths[column] = width


def _total(widths: Mapping[_Column, int]) -> int:
    return sum(widths.values()) + 2 * len(widths) - 2


def _terminal_width() -> int | None:
    with _ignoring(AttributeError, ValueError, OSError):  # stdout may be closed
        columns = os.environ.get("COLUMNS")
        return int(columns or os.get_terminal_size(sys.stdout.fileno()).columns) or None
    return None


def _width(text: str) -> int:
    if text.isascii():
        return len(text)
    import unicodedata

    wide = sum(unicodedata.east_asian_width(letter) in "WF" for letter in text)
    return len(text) + wide - sum(unicodedata.combining(letter) > 0 for letter in text)


def _cut(text: str, width: int) -> str:
    """Return the text in exactly `width` columns; an ellipsis stands for the rest."""
    if width == sys.maxsize:
        return text
    if _width(text) > width:
        text = text[:width]
        while text and _width(text + _dots()) > width:
            text = text[:-1]
        text = (text + _dots())[:width]
    return text + " " * (width - _width(text))


def _dots() -> str:
    return _if_printable("…", "...")


def _if_printable(text: str, plain: str) -> str:
    """Return a text if stdout has its letters, else a plain one."""
    if _printable(text) == text:
        return text
    return plain


def _short_names(names: Sequence[str], width: int) -> list[str]:
    """Return names of runs in `width` columns, so that they still find the runs.

    "probe/train-20260131-142501-1a2b3c4" loses its commit, then its folder, if that is
    not what tells it from the others, then becomes "tra…0131-142501".
    """
    if max(map(_width, map(_without_commit, names))) > width:
        inner = list(map(basename, names))
        if len(set(inner)) == len(set(names)):
            names = inner
    return [_short_name(name, width) for name in names]


def _without_commit(name: str) -> str:
    return re.sub(rf"{_COMMIT}(?=(-\d+)?$)", _dots(), name).removesuffix(_dots())


def _short_name(name: str, width: int) -> str:
    if _width(name) > width:
        name = _without_commit(name)
    if _width(name) > width:
        end = name[-(width // 2) :]
        stamp = re.search(r"\d{4}-\d{6}(\D+\d+)?$", name)
        if stamp is not None:
            end = stamp[0]
        name = _cut(name[: -len(end)], max(width - _width(end), 0)) + end[-width:]
    return _cut(name, width)


def _markdown(text: str) -> str:
    """Return a text in which GitHub finds no markup, link, @name, #number or $math$."""
    text = _printable(text)
    links = re.search(r"www\.|GH-\d|[0-9a-f]{7}", text, re.I)
    if links is None and re.fullmatch(r"[A-Za-z0-9 .,+%()/-]*", text):
        return text
    if not re.search(r"[`|\\]", text):
        return f"`{text}`"
    coded = re.sub(r"[^A-Za-z0-9 ]", lambda found: f"&#{ord(found[0])};", text)
    return f"<code>{coded}</code>"


def _print_csv(rows: Sequence[Facts]) -> None:
    import csv

    keys = dict.fromkeys(key for row in rows for key in row)
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(map(_csv_cell, keys))
    writer.writerows(map(_csv_cell, map(row.get, keys)) for row in rows)


def _csv_cell(value: object) -> object:
    """Return a value for a spreadsheet: numbers stay numbers, no text is a formula."""
    if _is_number_value(value):
        return value
    text = _printable(_cell_text(value))
    is_number = re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", text, re.A | re.I)
    if re.match(r"\s*[-=+@\uff0b\uff0d\uff1d\uff20]", text) and not is_number:
        return f"'{text}"
    return text


def _html_table(columns: Sequence[_Column]) -> str:
    used = [column.cells for column in columns if not column.is_empty()]
    lines = ["<table>"]
    tag = "th"
    for row in zip(*used):
        cells = [f"<{tag}>{_html(text)}</{tag}>" for text in row]
        lines.append(f"<tr>{''.join(cells)}</tr>")
        tag = "td"
    return "\n".join([*lines, "</table>"])


def _html(text: str) -> str:
    marks = {"&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "'": "&#39;"}
    return re.sub("[&<>\"']", lambda found: marks[found[0]], _visible_text(text))


# --- Paragraphs: of `inspect` and `diff`.


def _print_paragraphs(paragraphs: Iterable[Paragraph]) -> None:
    for line in _paragraph_lines(paragraphs):
        print(line)


def _paragraph_lines(paragraphs: Iterable[Paragraph]) -> Iterator[str]:
    """Yield the lines of paragraphs; one without lines is left out."""
    for name, lines in paragraphs:
        for line in lines:
            yield f"{name:<10}{_printable(line.expandtabs(4))}".rstrip()
            name = ""


def _inspected(run: Run) -> Facts:
    names = "status attempts config metadata summary outputs used_by notes problems"
    series = _number_series(run)  # first: that it cannot be read is a problem as well
    facts: Facts = {name: getattr(run, name) for name in names.split()}
    facts.update(run_dir=str(run.path), tags=run["tags"], metrics=series)
    facts["now"] = _differences_from_now(run)
    return facts


def _run_paragraphs(run: Run) -> Iterator[Paragraph]:
    yield from _live_paragraphs(run)
    config = []
    if _arguments(run.config):
        config = _format_yaml(_arguments(run.config)).splitlines()
    yield from _about_paragraphs(run, config)
    changes = _differences_from_now(run)
    yield "now", [f"{key}: {change}" for key, change in changes.items()]
    captures = _mapping(run.metadata, "capture")
    whys = {name: _at(captures, name, "problem") for name in captures}
    problems = [f"{name}: {_text(why)}" for name, why in whys.items() if why]
    if not run.metadata and not run.problems:
        problems.append("metadata.json: missing")
    yield "problems", problems + run.problems


def _about_paragraphs(run: Run, config: Sequence[str]) -> Iterator[Paragraph]:
    """Yield where a run came from, and what it left: for `inspect` and the report."""
    yield "command", [_command_of(run)]
    yield "code", [_format_code(_mapping(run.metadata, "git"))]
    yield "started", [_format_start(run)]
    yield "config", _first(config)
    yield "inputs", _first(_format_inputs(run))
    yield "tied to", _tied_names(run)
    yield "used by", _first(run.used_by)
    yield "outputs", _format_outputs(run)
    yield "resources", _format_resources(_mapping(run.metadata, "resources"))
    if run["tags"]:
        yield "tags", [" ".join(run["tags"])]
    yield "notes", _format_notes(run)


def _live_paragraphs(run: Run) -> Iterator[Paragraph]:
    """Yield what changes while a run is running, for `inspect --follow`."""
    yield "run", [run.folder]
    yield "status", _first([_format_end(run.status), *_format_attempts(run)])
    yield "why", _format_why(run)
    yield "metrics", _format_metrics(run)


def _first(lines: Sequence[str], limit: int = MAX_SHOWN) -> list[str]:
    if len(lines) <= limit:
        return list(lines)
    return [*lines[:limit], f"... {len(lines) - limit} more lines"]


def _known(facts: Facts, key: str) -> str:
    """Return a value as one short line, "?" for what is missing."""
    return _text(facts.get(key) or "?")


def _format_end(status: Facts) -> str:
    text = _known(status, "status")
    if status.get("exit_reason"):
        text += f" ({_text(status['exit_reason'])})"
    if status.get("exit_code") is not None:
        text += f", exit code {_text(status['exit_code'])}"
    if status.get("duration_seconds") is not None:
        text += f", after {_format_seconds(status['duration_seconds'])}"
    return text


def _format_attempts(run: Run) -> Iterator[str]:
    if run.attempts:
        took = _format_seconds(run["duration_seconds"])
        yield f"{run['attempts']} attempts, {took} in all"
    for number, status in enumerate(run.attempts, 1):
        yield f"attempt {number}: {_format_end(status)}"
    changes = _mapping(run.metadata, "changes")
    for section in changes:
        for key, pair in _mapping(changes, section).items():
            if isinstance(pair, list) and len(pair) == 2:
                yield f"changed since: {_format_change(key, *pair)[0]}"


def _format_why(run: Run) -> list[str]:
    status = run.status
    trace = _at(status, "exception", "traceback")
    lines = []
    if isinstance(trace, str):
        lines = trace.rstrip().splitlines()[-4:-1]
    elif status.get("status") not in ("running", "success"):
        lines = _texts(status, "last_output") or _last_output(run.path)
        lines = [f"  {line}" for line in lines[-8:]]
    if run["reason"]:
        return [run["reason"], *lines]
    return lines


def _format_code(git: Facts) -> str:
    """Return "1a2b3c4 on main, uncommitted changes, 2 commits not pushed, URL"."""
    if not git.get("commit_short"):
        return "no commit known"
    patch = _mapping(git, "patch")
    branch = _text(git.get("branch") or "no branch")
    parts = [f"{_text(git['commit_short'])} on {branch}"]
    if git.get("is_dirty"):
        parts.append("uncommitted changes")
    parts.append(_format_count(git.get("unpushed"), "commit", "not pushed"))
    if patch.get("file"):
        parts.append(f"kept in {_text(patch['file'])}")
    parts.append(_format_count(patch.get("left_out_count"), "file", "not kept"))
    parts.append(_text(git.get("remote_origin_url") or ""))
    return ", ".join(filter(None, parts))


def _format_start(run: Run) -> str:
    metadata = run.metadata
    words = [_known(run, "started_utc")]
    words += [_known(metadata, key) for key in ("user", "hostname", "working_dir")]
    words.append(_python_version(metadata) or "?")
    words.append(_known(_mapping(metadata, "platform"), "platform"))
    return "{} by {} on {} in {}, Python {} on {}".format(*words)


def _format_inputs(run: Run) -> list[str]:
    lines = []
    for entry in _read_inputs(run.folder):
        about = _known(entry, "status")
        _, problem = _input_now(entry, run.folder, deadline=0.0)
        if problem == "is gone":
            about += ", not there now"
        elif problem is not None:
            about += ", changed since"
        name = f"{_known(entry, 'run')}/{_text(entry['path'])}"
        lines.append(f"{_known(entry, 'key')}: {name} ({about})")
    return lines


def _number_series(run: Run) -> dict[str, list[float]]:
    series = _all_series(run)
    names = [name for name in series if name not in _NO_METRICS]
    return {name: _numbers(series[name][0]) for name in names}


def _format_metrics(run: Run) -> list[str]:
    lines = []
    last = run.metrics
    for name, values in _number_series(run).items():
        finite = list(filter(_is_finite, values))
        about = [_format_count(len(values), "value")]
        if finite:
            about.insert(0, f"lowest {min(finite):.6g}, highest {max(finite):.6g}")
        if len(finite) < len(values):
            about.append(f"{len(values) - len(finite)} not finite")
        line = f"{name}: {_text(last.get(name))} ({', '.join(about)})"
        lines.append(f"{line} {_sparkline(values)}")
    return lines


def _sparkline(values: Sequence[float]) -> str:
    """Return the course of some numbers, such as "▇▄▂▁▁"; "x" is not finite."""
    if len(values) < 2:
        return ""
    blocks = _if_printable("▁▂▃▄▅▆▇█", "_.-~=+*#")
    count = min(SPARKLINE_WIDTH, len(values))
    # Halves, since the difference of two large numbers may be infinite.
    points = [values[(n + 1) * len(values) // count - 1] / 2 for n in range(count)]
    finite = list(filter(_is_finite, points)) or [0.0]
    low = min(finite)
    span = max(finite) - low or 1
    line = ""
    for point in points:
        if _is_finite(point):
            line += blocks[int((point - low) / span * 7)]
        else:
            line += "x"
    return line


def _format_outputs(run: Run) -> list[str]:
    """Return how much is in each folder and at the top, and the largest files."""
    _, names, _ = next(os.walk(run.path), ("", [], []))
    folders: dict[str, list[int]] = {name: [] for name in names}
    for path, size in run.outputs.items():
        folder = dirname(path).partition("/")[0] or "at the top"
        folders.setdefault(folder, []).append(size)
    lines = []
    for folder in sorted(folders.keys() - {"logs", "attempts"}):
        sizes = folders[folder]
        about = "empty"
        if sizes:
            about = f"{_format_count(len(sizes), 'file')}, {_format_size(sum(sizes))}"
        lines.append(f"{folder}: {about}")
    largest = sorted(run.outputs.items(), key=lambda pair: -pair[1])[:3]
    words = [f"{path} ({_format_size(size)})" for path, size in largest]
    if words:
        lines.append(f"largest: {', '.join(words)}")
    return lines


def _format_resources(resources: Facts) -> list[str]:
    """Return "processor 42 % mean, 99 % peak; memory 1.2 GB peak (proportional)".

    A second line has the GPUs. Of a run so short that it has one sample: nothing.
    """
    figures = {key: _number(value) for key, value in resources.items()}
    if (figures.get("samples") or 0) < 2:
        return []
    words = []
    mean, peak = figures.get("cpu_percent_mean"), figures.get("cpu_percent_peak")
    if mean is not None and peak is not None:
        words.append(f"processor {mean:.0f} % mean, {peak:.0f} % peak")
    memory = figures.get("memory_bytes_peak")
    if memory is not None:
        source = _text(resources.get("memory_source"))
        words.append(f"memory {_format_size(memory)} peak ({source})")
    gpus = []
    for gpu in _rows(resources, "gpus"):
        mean = _number(gpu.get("utilization_percent_mean"))
        if mean is not None:
            gpus.append(f"GPU {_text(gpu.get('index'))} {mean:.0f} % mean")
    return list(filter(None, ("; ".join(words), "; ".join(gpus))))


def _format_notes(run: Run) -> list[str]:
    lines = []
    for note in run.notes:
        if note.get("text"):
            who = f"{_known(note, 'timestamp_utc')} {_known(note, 'user')}"
            lines.append(f"{who}: {_text(note['text'])}")
    return lines


def _command_of(run: Run, folder: str = "") -> str:
    words = _texts(run.metadata, "argv")
    if not words:
        command = _text(run.metadata.get("command") or run.config.get("command") or "")
        if not command:
            return "# not known"
        words = [command]
        with _ignoring(ValueError):  # a quote that is not closed
            words = shlex.split(command)
    return _shell_line(words, folder)


def _shell_line(words: Iterable[str], folder: str = "") -> str:
    """Return a command, to be run in a folder, as it can be pasted into a shell."""
    line = " ".join(map(_shell_word, words))
    if folder:
        return f"cd {_shell_word(folder)} && {line}"
    return line


def _shell_word(text: str) -> str:
    """Return a word for a shell; what cannot be printed is written as $'\\x1b'."""
    if _printable(text) == text:
        return shlex.quote(text)
    text = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"$'{_printable(text)}'"


def _differences_from_now(run: Run) -> dict[str, str]:
    """Return what of commit and machine is not as it was: "3.9.1 -> 3.11.7"."""
    git = _mapping(run.metadata, "git")
    then = _comparable_machine(run.metadata)
    now = _comparable_machine(_quick_metadata(_Site.here(), None))
    then["commit"] = git.get("commit_short")
    if isdir(_word(git, "root")):
        now["commit"] = _git_head(git["root"])
    changes = {}
    for key in ("commit", "python", "hostname", "platform"):
        old, new = then.get(key), now.get(key)
        if old and new and old != new:
            changes[key] = f"{_text(old)} -> {_text(new)}"
    return changes


def _diff_paragraphs(run: Run, found: Differences) -> Iterator[Paragraph]:
    for section, pairs in found.items():
        lines = []
        for key, (then, now) in pairs.items():
            lines += _format_change(key, then, now)
        if "commit_full" in pairs:
            lines += _commits_between(run, *pairs["commit_full"])
        yield section, lines


def _commits_between(run: Run, then: JSON, now: JSON) -> list[str]:
    for commit in (then, now):
        if re.fullmatch("[0-9a-f]{4,64}", str(commit)) is None:
            return []
    root = _word(run.metadata, "git", "root")
    words = f"rev-list --left-right --oneline --max-count=10 {then}...{now} --"
    try:
        output = _git_run(root, *words.split())
    except _Unknown:  # the repository, or a commit, is not there any more
        return []
    return [f"  {line}" for line in _lines_of(output)]


def _format_change(key: str, then: JSON, now: JSON) -> list[str]:
    """Return "key: then -> now"; of two long texts the lines that differ."""
    if isinstance(then, str) and isinstance(now, str) and "\n" in then + now:
        lines = _line_changes(*_different_parts(then, now))
        return [f"{key}:", *(f"  {line[:MAX_REPR]}" for line in lines)]
    sides = [_cell_text(side)[:MAX_REPR].split("\n")[0] for side in (then, now)]
    return [f"{key}: {sides[0] or 'none'} -> {sides[1] or 'none'}"]


def _different_parts(then: str, now: str) -> tuple[str, str]:
    """Return what two patches say of the files of which they do not say the same."""
    old, new = (re.split(r"(?m)^(?=diff --git )", text) for text in (then, now))
    removed = [part for part in old if part not in new]
    added = [part for part in new if part not in old]
    return "".join(removed), "".join(added)


def _line_changes(then: str, now: str) -> list[str]:
    """Return the first lines that differ, of long texts only of their beginnings."""
    import difflib

    a, b = (text.splitlines()[:DIFF_LINES] for text in (then, now))
    lines = list(difflib.unified_diff(a, b, lineterm="", n=1))[2:]
    if DIFF_LINES not in (len(a), len(b)):
        return _first(lines)
    if lines and lines[-1][1:] in (a[-1], b[-1]):  # one goes on, the other was cut
        last = max(n for n, line in enumerate(lines) if line.startswith("@@"))
        del lines[last:]
    return [*_first(lines), f"... only {DIFF_LINES} lines were compared"]


# --- A graph of runs.


def _format_graph(
    form: str, runs: Sequence[Path], edges: Sequence[tuple[Path, Path, str]]
) -> Iterator[str]:
    if form == "json":
        keys = ("producer", "consumer", "path")
        rows = [dict(zip(keys, map(str, edge))) for edge in edges]
        yield _format_json({"runs": list(map(str, runs)), "edges": rows}).rstrip()
        return
    start, node, edge = "graph TD", "  {}[{}]", "  {} -->|{}| {}"
    if form == "dot":
        start = "digraph lineage {"
        node, edge = "  {} [label={}];", "  {0} -> {2} [label={1}];"
    names = {run: f"n{number}" for number, run in enumerate(runs)}
    yield start
    for run, name in names.items():
        yield node.format(name, _label(form, run.name))
    for producer, consumer, path in edges:
        yield edge.format(names[producer], _label(form, path), names[consumer])
    if form == "dot":
        yield "}"


def _label(form: str, text: str) -> str:
    """Return a text in quotes; for Mermaid "%%{init}%%" must be no directive."""
    text = _printable(text)
    if form == "dot":
        text = re.sub(r'(["\\])', r"\\\1", text)
    else:
        text = re.sub(r"[^\w ./-]", lambda found: f"#{ord(found[0])};", text)
    return f'"{text}"'


# --- Single values.


def _format_size(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 999.5:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.4g} TB"


def _format_seconds(seconds: object) -> str:
    """Return "0.25s", "14s", "3m20s", "2h05m", "5d03h", "?" for what is no time."""
    if not isinstance(seconds, (int, float)) or not -1e12 < seconds < 1e12:
        return "?"
    if seconds < 10:
        return f"{max(seconds, 0):.2g}s"
    whole, minutes = round(seconds), round(seconds / 60)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return "{}m{:02}s".format(*divmod(whole, 60))
    if minutes < 24 * 60:
        return "{}h{:02}m".format(*divmod(minutes, 60))
    return "{}d{:02}h".format(*divmod(round(seconds / 3600), 24))


def _format_count(number: object, noun: str, about: str = "") -> str:
    """Return "2 files", "1 commit not pushed"; nothing for 0."""
    if not number:
        return ""
    if number != 1:
        noun += "s"
    return f"{_text(number)} {noun} {about}".rstrip()


def _format_problems(runs: Iterable[Run]) -> list[str]:
    problems = [problem for run in runs for problem in run.problems]
    if not problems:
        return []
    return [f"{_format_count(len(problems), 'file')} cannot be read: {problems[0]}"]


def _format_paths(paths: Sequence[str]) -> str:
    text = ", ".join(paths[:3])
    if len(paths) > 3:
        text += f" and {len(paths) - 3} more"
    return text


def _print(line: str) -> None:
    print(_printable(line))


def _printable(text: str) -> str:
    """Return a text as it can be printed: escaped, in letters that stdout has."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    data = _visible_text(text).encode(encoding, "backslashreplace")
    return data.decode(encoding)


# Letters that Python calls printable although nothing is seen of them: fillers, blank
# Braille, vowels without a shape, and the variation selectors.
_UNSEEN = (
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\uffa0\ufe00-\ufe0f"
    "\U000e0100-\U000e01ef]"
)


def _visible_text(text: str) -> str:
    """Escape what could steer a terminal, hide text, or not be seen at all."""
    if text.isascii() and text.isprintable():
        return text
    letters = []
    for letter in text:
        unseen = re.match(_UNSEEN, letter) or not letter.isprintable()
        if unseen and letter not in "\xa0\u3000":  # blanks that may well be meant
            letter = letter.encode("unicode_escape").decode("ascii")
        letters.append(letter)
    return "".join(letters)


def _with_progress(items: Sequence[_Item], what: str) -> Iterator[_Item]:
    """Yield the items; a terminal is told how far it is when it takes long."""
    due = monotonic() + PROGRESS_SECONDS
    line = ""
    for number, item in enumerate(items, 1):
        if monotonic() > due and sys.stderr is not None and sys.stderr.isatty():
            due = monotonic() + 0.2
            line = f"{what}: {number} of {len(items)}"
            print(f"\r{line}", end="", file=sys.stderr, flush=True)
        yield item
    if line:
        print(f"\r{' ' * len(line)}\r", end="", file=sys.stderr, flush=True)


# === Report ===
# One HTML page that shows a folder of runs: the same bytes for the same runs, no
# request of any kind, and all of it can be read without its script.

if TYPE_CHECKING:
    _Point = tuple[float, float]  # a step, and a value
    # A line, its points, and of a mean the standard deviation at each.
    _Curve = tuple["_Line", list[_Point], list[float]]


def _cmd_report(args: Namespace) -> int:
    output = abspath(args.output)
    if isdir(output):
        raise ValueError(f"{args.output!r} is a folder; give -o the name of a file")
    if not isdir(dirname(output)):
        raise ValueError(f"{args.output!r}: there is no such folder; make it first")
    page = _Page(args)
    data = _report(page).encode()
    _write_file(output, data)
    count = _format_count(len(page.runs) or "no", "run")
    _print(f"{args.output}: {count}, {_format_size(len(data))}")
    return 0


def _report(page: _Page) -> str:
    sections = (_summary_html, _table_html, _parallel_html, _details_html)
    top, table, parallel, details = ("\n".join(section(page)) for section in sections)
    room = REPORT_BYTES - len(top + table + parallel + details)
    parts = [top, table, *_plots_html(page, room), parallel, *_images_html(page)]
    parts += [details, *_left_out_html(page)]
    policy = "default-src 'none'; base-uri 'none'; form-action 'none'"
    policy += "; img-src 'self' file: data:"
    for kind, source in (("style", _REPORT_STYLE), ("script", _REPORT_SCRIPT)):
        digest = _base64(_digest("sha256", source.encode()).digest())
        policy += f"; {kind}-src 'sha256-{digest}'"
    return _REPORT_MARKUP.lstrip().format(
        policy=policy,
        version=__version__,
        title=page.text(basename(page.root)),
        body="\n".join(parts),
        curves=re.sub(r"\.0\b", "", json.dumps(page.curves, separators=(",", ":"))),
        style=_REPORT_STYLE,
        script=_REPORT_SCRIPT,
    )


def _base64(data: bytes) -> str:
    import base64

    return base64.b64encode(data).decode()


class _Page:
    """What the sections of a page share: the runs in their order, colours, text."""

    def __init__(self, args: Namespace) -> None:
        self.args = args
        self.left_out: list[str] = []
        self.curves: list[JSON] = []  # of each plot, for the script
        self.redacted: dict[str, str] = {}
        goal = self.goal = _goal(args.metric)
        selection = _selected(args)
        self.root = selection.root
        self.runs = selection.runs
        if goal is not None:
            ranked = _in_order(self.runs, goal.value, goal.function == "max")
            self.runs = list(itertools.chain(*ranked.values()))
            if self.runs and not _is_finite(goal.value(self.runs[0])):
                raise ValueError(f"no run has the metric {goal.name!r}")
        differing = [keys for _, keys in sorted(selection.differing.items())]
        keys = dict.fromkeys(itertools.chain(*differing))
        self.varying = [key for key in keys if any(key in run for run in self.runs)]
        self.columns = self.fixed_columns(selection.differing)
        self.drawn = self.runs[:REPORT_RUNS]
        over = args.over.split(",")
        self.over = [key for key in self.varying if _short(key) in over]
        self.lines = self.coloured_lines()
        self.line_of = {run.folder: line for line in self.lines for run in line.runs}
        if selection.unseen:
            self.left_out.append(f"{selection.unseen} runs beyond the limit.")
        if len(self.drawn) < len(self.runs):
            self.left_out.append(
                f"Only the first {len(self.drawn)} of {len(self.runs)} runs, in the "
                "order of the table, have curves, images and details."
            )

    def fixed_columns(self, differing: Mapping[str, Sequence[str]]) -> list[_Column]:
        """Return the columns of `list`, without what depends on when it is asked."""
        asked = []
        if self.goal is not None:
            asked.append(self.goal.text)
        columns = _run_columns(self.runs, self.root, differing, asked)
        starts = []
        times = []
        for run in self.runs:
            starts.append(str(run["started_utc"] or "")[:16].replace("T", " "))
            times.append(_number(run["duration_seconds"]))
            if run.state == "running":
                times[-1] = None
        texts = [_format_seconds(time).strip("?") for time in times]
        columns[2:4] = [_Column("started", starts), _Column("time", times, texts)]
        return [column for column in columns if not column.is_empty()]

    def coloured_lines(self) -> list[_Line]:
        """Return the lines of the drawn runs, with their colours.

        Few lines are told apart, in the order in which the runs were started, so that a
        new run changes no other's colour. Of many the colour tells the rank.
        """
        members = [[run] for run in self.drawn]
        if self.over:
            groups = _fold_seeds(self.drawn, map(_short, self.over))
            members = [group.runs for group in groups]
        keys = [key for key in self.varying if key not in self.over]
        lines = [_Line(number, runs, keys) for number, runs in enumerate(members)]
        # There may be more than colours, dashed and dotted ones too.
        self.is_crowded = len(lines) > 3 * REPORT_COLOURS
        by_start = sorted(lines, key=lambda line: (line.runs[0].started, line.number))
        for place, line in enumerate(by_start):
            line.colour = f"c{place % REPORT_COLOURS} d{place // REPORT_COLOURS}"
            if self.is_crowded:
                line.colour = f"r{line.number * 8 // len(lines)}"
        return lines

    def text(self, value: object, limit: int = 200) -> str:
        """Return a value as text for the page: redacted, short, escaped."""
        text = _text(value)
        if isinstance(value, str):
            text = value[:MAX_REDACTED]
        if text not in self.redacted:
            self.redacted[text] = _redactor.text(text)
        text = self.redacted[text]
        if len(text) > limit:
            text = f"{text[: limit - 1]}…"
        return _html(text)

    def block(self, lines: Sequence[str], room: int) -> str:
        """Return the last of some lines as they stand, as many as there is room for."""
        kept: list[str] = []
        for line in reversed(lines):
            kept.insert(0, self.text(line.expandtabs(4), 400))
            room -= len(kept[0])
            if room < 0:
                break
        return "\n".join(kept)

    def link(self, path: str) -> str:
        from urllib.parse import quote

        with _ignoring(ValueError):  # it is on another drive
            path = relpath(path, dirname(abspath(self.args.output)))
        return quote(path.replace(os.sep, "/"), errors="surrogateescape")


def _goal(text: str | None) -> _Key | None:
    if text is None:
        return None
    goal = _Key(text)
    goal.name = goal.name.removeprefix("metrics.")
    if goal.function in ("min", "max"):
        return goal
    how = f"write 'max({goal.name})' or 'min({goal.name})'"
    raise ValueError(f"metric {goal.text!r} does not say what is best; {how}")


class _Line:
    """Runs that are drawn as one: a run, or those that differ only in their seed."""

    def __init__(self, number: int, runs: list[Run], keys: Sequence[str]) -> None:
        self.number = number  # the place in the order of the table, from 0
        self.runs = runs
        self.colour = ""  # classes of the style sheet
        first = runs[0]
        words = []
        for key in keys:
            if key in first:
                value = _text(first[key]) or _NO_TEXT
                words.append(f"{key.rpartition('.')[2]}={value}")
        if len(runs) > 1:
            words.append(f"n={len(runs)}")
        self.label = " ".join(words)

    def swatch(self) -> str:
        return f'<i class="swatch {self.colour}"></i>'


_NO_TEXT = '""'  # what an empty text is shown as


def _finite(value: object) -> float | None:
    """Return a number that can be drawn as float; None for anything else."""
    number = _number(value)
    if number is None or isinstance(value, str) or not -1e300 < number < 1e300:
        return None
    return number


def _short(key: str) -> str:
    return key.partition(".")[2]


# --- The first screen, and the table.


def _summary_html(page: _Page) -> Iterator[str]:
    """Yield what was selected, the states, the best run, and what differs."""
    asked = [
        f"{name} {value}"
        for name, value in vars(page.args).items()
        if name not in _NO_FILTERS and value not in (None, False)
    ]
    told = [_format_count(len(page.runs), "run") or "No runs"]
    if asked:
        told.append(page.text(", ".join(asked), 400))
    yield f'<p class="quiet">{": ".join(told)}</p>'
    if not page.runs:
        yield "<p>There is nothing to show.</p>"
        return
    yield '<div class="summary"><section><h2>States</h2><ul>'
    states = [run.state for run in page.runs]
    for word in sorted(set(states), key=lambda word: (-states.count(word), word)):
        yield f"<li><b>{states.count(word)}</b> {_state_html(page, word)}</li>"
    yield "</ul></section><section><h2>Best run</h2>"
    yield from _best_html(page)
    yield "</section>"
    differences = {
        page.text(_short(key), 60): _values_html(page, key)
        for key in page.varying[:REPORT_AXES]
    }
    commits = {run["git_commit"] for run in page.runs} - {None}
    if len(commits) > 1:
        differences["code"] = f"{len(commits)} commits"
    if differences:
        yield "<section><h2>What differs</h2><dl>"
        for title, text in differences.items():
            yield f"<dt>{title}</dt><dd>{text}</dd>"
        yield "</dl></section>"
    yield "</div>"


_NO_FILTERS = ("root", "output", "metric", "over", "embed", "function")


def _state_html(page: _Page, word: str) -> str:
    known = word.partition(" ")[0]
    if known not in ("success", "failed", "running", "lost"):
        known = "other"
    return f'<span class="state {known}">{page.text(word, 40)}</span>'


def _best_html(page: _Page) -> Iterator[str]:
    goal = page.goal
    if goal is None:
        yield "<p>Nothing is ranked: no metric was chosen.</p>"
        yield "<p>Choose one with <code>--metric 'max(KEY)'</code> or min.</p>"
        return
    run = page.runs[0]
    told = goal.text
    step = run.summary[goal.name].get(f"{goal.function}_step")
    if step is not None:
        told += f" at step {_text(step)}"
    yield f'<p class="value">{page.text(_number(goal.value(run)))}</p>'
    yield f'<p class="quiet">{page.text(told)}</p>'
    yield f"<p>{_name_html(page, 0)}</p>"
    yield f'<p class="quiet">{page.text(_Line(0, [run], page.varying).label)}</p>'


def _name_html(page: _Page, place: int) -> str:
    run = page.runs[place]
    name = page.text(run.name, 120)
    if place >= len(page.drawn):
        return name
    return f'{page.line_of[run.folder].swatch()}<a href="#run-{place}">{name}</a>'


def _values_html(page: _Page, key: str) -> str:
    values = {_text(run[key]): run[key] for run in page.runs if key in run}
    ordered = _in_order(values, values.__getitem__).values()
    texts = [page.text(equals[0] or _NO_TEXT, 40) for equals in ordered]
    if max(map(len, values)) > 40:  # of paths one would only see the same beginning
        return f"{len(texts)} values"
    if len(texts) <= 5:
        return ", ".join(texts)
    return f"{texts[0]} to {texts[-1]}, {len(texts)} values"


def _table_html(page: _Page) -> Iterator[str]:
    """Yield the table of all runs, and hidden tools that the script makes work."""
    if not page.runs:
        return
    yield '<section><h2>Runs</h2><p class="tools" hidden>'
    yield '<input type="search" id="filter" placeholder="Filter" aria-label="Filter">'
    yield '<button type="button" id="clear">Clear selection</button>'
    yield '<span class="quiet" id="count" role="status"></span></p>'
    yield '<section class="scroll" aria-label="All runs" tabindex="0">'
    yield '<table class="runs"><thead><tr>'
    for column in page.columns:
        kind = ' class="t"'
        if column.is_number:
            kind = ""
        yield f'<th scope="col"{kind}>{page.text(column.cells[0], 60)}</th>'
    yield "</tr></thead><tbody>"
    for place, run in enumerate(page.runs):
        mark = ""
        if place < len(page.drawn):
            mark = f' data-line="{page.line_of[run.folder].number}"'
        cells = [_cell_html(page, column, place) for column in page.columns[1:]]
        name = f'<th scope="row">{_name_html(page, place)}</th>'
        yield f"<tr{mark}>{name}{''.join(cells)}</tr>"
    yield "</tbody></table></section></section>"


def _cell_html(page: _Page, column: _Column, place: int) -> str:
    """Return a cell; one whose text is no number says what it is sorted by."""
    text = column.cells[place + 1]
    shown = page.text(text, 120)
    if column.cells[0] == "status":
        shown = _state_html(page, text)
    kind = ' class="t"'
    if column.is_number:
        kind = ""
        value = _finite(column.values[place])
        if value is not None and _number(text) is None:
            kind = f' data-value="{value:.9g}"'
    return f"<td{kind}>{shown}</td>"


# --- The plots: one for each metric, the course of every line over the steps.


def _plots_html(page: _Page, room: int) -> Iterator[str]:
    """Yield a plot for each metric that was logged more than once."""
    plots = _plots(page, room)
    if not plots:
        return
    yield '<section><h2>Metrics over steps</h2><ul class="legend">'
    if any(len(line.runs) > 1 for line in page.lines):
        keys = page.text(", ".join(map(_short, page.over)))
        yield f'<li class="quiet">mean ± standard deviation over {keys}</li>'
    if page.is_crowded:
        ramp = "".join(f'<i class="swatch r{place}"></i>' for place in range(8))
        yield f"<li>the table's first {ramp} its last drawn run</li>"
    else:
        curves = itertools.chain(*(plot.curves for plot in plots))
        drawn = {line for line, _, _ in curves}
        for line in filter(drawn.__contains__, page.lines):
            label = page.text(line.label or line.runs[0].name, 90)
            yield f'<li data-line="{line.number}">{line.swatch()}{label}</li>'
    yield '</ul><div class="plots">'
    for plot in plots:
        yield from _plot_html(page, plot)
    yield "</div></section>"


def _plots(page: _Page, room: int) -> list[_Plot]:
    """Return the plots with their curves, that of the goal first."""
    last: dict[str, float] = {}  # of each metric, how far its curves go
    if page.goal is not None:
        last[page.goal.name] = 0.0
    curves = 0
    for run in page.drawn:
        for key, facts in run.summary.items():
            is_curve = facts["count"] > 1 and _finite(facts["min"]) is not None
            if is_curve and key not in _NO_METRICS:
                names = ("first_step", "last_step", "min_step", "max_step")
                steps = [_finite(facts[name]) or 0.0 for name in names]
                last[key] = max(last.get(key, 0.0), facts["count"] - 1.0, *steps)
                curves += 1
    shown = [key for key in last if last[key]]
    if len(shown) > REPORT_PLOTS:
        told = f"Of {len(shown)} metrics the first {REPORT_PLOTS} have a plot."
        page.left_out.append(told)
    room = max(room, REPORT_CURVE_BYTES) // (REPORT_POINT_BYTES * max(curves, 1))
    count = max(10, min(REPORT_POINTS, room))
    plots = [_Plot(key, last[key], count) for key in shown[:REPORT_PLOTS]]
    for line in page.lines:
        series = [_all_series(run) for run in line.runs]
        for plot in plots:
            courses = [_course(*one[plot.key]) for one in series if plot.key in one]
            plot.add(line, list(filter(None, courses)))
    if any(plot.is_thinned for plot in plots):
        kept = "the lowest and the highest value of each stretch of steps"
        if plots[0].is_coarse:
            kept = "the middle value of each stretch, the lowest and the highest"
        page.left_out.append(
            f"Curves have at most {count} points: {kept}; the same stretches for all."
        )
    return [plot for plot in plots if plot.curves]


def _course(values: Sequence[object], steps: Sequence[object]) -> list[_Point]:
    """Return the finite points of a metric by step; of two at a step the later one."""
    points: dict[float, float] = {}
    for place, (value, step) in enumerate(zip(values, steps)):
        number, at = _finite(value), _finite(step)
        if at is None:
            at = float(place)
        if number is not None:
            points[at] = number
    return sorted(points.items())


class _Plot:
    """The curves of one metric."""

    def __init__(self, key: str, last: float, count: int) -> None:
        self.key = key
        self.count = count  # of points, at most
        self.is_coarse = count < 100
        self.stretches = count // 2 - 1
        if self.is_coarse:
            self.stretches = count - 4
        self.width = last / self.stretches
        self.is_thinned = False
        self.curves: list[_Curve] = []

    def add(self, line: _Line, courses: list[list[_Point]]) -> None:
        if courses and len(line.runs) > 1:
            self.curves.append((line, *self.mean(courses)))
        elif courses:
            self.curves.append((line, self.thinned(courses[0]), []))

    def thinned(self, course: list[_Point]) -> list[_Point]:
        """Return the lowest and the highest point of each stretch, and both ends.

        Of few stretches these are the teeth of a saw, the same in all curves: there
        it is the middle one of each, and the lowest and the highest of all.
        """
        if len(course) <= self.count:
            return course
        self.is_thinned = True
        stretches = list(self.stretched(course).values())
        kept = {course[0], course[-1]}
        if self.is_coarse:
            by_value = (sorted(points, key=_value_of) for points in stretches)
            kept.update(points[len(points) // 2] for points in by_value)
            stretches = [course]
        for points in stretches:
            kept.add(min(points, key=_value_of))
            kept.add(max(points, key=_value_of))
        return sorted(kept)

    def stretched(self, course: list[_Point]) -> dict[float, list[_Point]]:
        """Return the points in each stretch of steps, which are the same for all."""
        found: dict[float, list[_Point]] = {}
        for point in course:
            number = point[0] // self.width
            if not 0 <= number <= self.stretches:  # a step that nobody expected
                number = -1
            found.setdefault(number, []).append(point)
        return found

    def mean(self, courses: list[list[_Point]]) -> tuple[list[_Point], list[float]]:
        """Return the mean of runs in each stretch, where each counts once.

        A run that has no point there counts as on its way from one to the next.
        """
        known = []
        for course in courses:
            stretches = self.stretched(course).items()
            known.append({number: _mean_point(points) for number, points in stretches})
        together = []
        for number in set().union(*known):
            points = [means[number] for means in known if number in means]
            step, _ = _mean_point(points)
            for course, means in zip(courses, known):
                if number not in means and course[0][0] < step < course[-1][0]:
                    points.append((step, _value_at(step, course)))
            together.append(points)
        together.sort()
        spreads = [_Spread(map(_value_of, points)).deviation for points in together]
        return list(map(_mean_point, together)), [spread or 0.0 for spread in spreads]


def _value_of(point: _Point) -> float:
    return point[1]


def _mean_point(points: list[_Point]) -> _Point:
    steps, values = zip(*points)
    return sum(steps) / len(points), sum(values) / len(points)


def _value_at(step: float, course: Sequence[_Point]) -> float:
    """Return what lies between two points on the straight line through them."""
    place = bisect.bisect(course, (step,))
    (before, low), (after, high) = course[place - 1], course[place]
    return low + (high - low) * (step - before) / (after - before)


class _Axis:
    """A stretch of numbers on paper: where a value lies, and where its marks are."""

    def __init__(
        self, values: Sequence[float], is_log: bool = False, margin: float = 0.0
    ) -> None:
        self.is_log = is_log
        low, high = self.scaled(min(values)), self.scaled(max(values))
        margin *= high - low
        if low == high:
            margin = abs(low) / 10 or 1.0
        self.ends = [low - margin, high + margin]

    def scaled(self, value: float) -> float:
        import math

        if self.is_log:
            return math.log10(value)
        return value

    def place(self, value: float) -> float:
        """Return where a value lies: 0 is the lower end, 1 the upper one."""
        low, high = self.ends
        return (self.scaled(value) - low) / (high - low)

    def marks(self) -> list[float]:
        import math

        low, high = self.ends
        if self.is_log and high - low >= 2:
            every = 1 + int(high - low) // 6
            decades = range(math.ceil(low), math.floor(high) + 1, every)
            return [10.0**decade for decade in decades]
        if self.is_log:
            low, high = 10**low, 10**high
        rough = (high - low) / 7
        unit = 10.0 ** math.floor(math.log10(rough))
        step = min(unit * digit for digit in (1, 2, 5, 10) if unit * digit >= rough)
        numbers = range(math.ceil(low / step), math.floor(high / step) + 1)
        return [number * step for number in numbers]


def _plot_html(page: _Page, plot: _Plot) -> Iterator[str]:
    steps, values = zip(*itertools.chain(*map(_outline, plot.curves)))
    across = _Axis(steps)
    axis = _Axis(values, margin=0.04)
    positive = [value for value in values if value > 0]
    logarithm = None
    name = page.text(plot.key, 80)
    kind = "plot"
    if page.is_crowded:
        kind = "plot many"
    yield f'<figure class="{kind}"><figcaption><h3>{name}</h3>'
    if positive and max(positive) > 2 * min(positive):
        logarithm = _Axis(positive, True, 0.04)
        yield '<button type="button" aria-pressed="false" hidden>log</button>'
    about = f"{name} over steps, {_format_count(len(plot.curves), 'curve')}"
    yield f'</figcaption><svg viewBox="0 0 640 300" role="img" aria-label="{about}">'
    yield _marks_html(axis, "")
    if logarithm is not None:
        yield _marks_html(logarithm, " off")
    for mark in across.marks():
        x = 56 + 572 * across.place(mark)
        yield f'<text class="x" x="{x:.0f}" y="289">{_format_mark(mark)}</text>'
    yield '<svg class="area" x="56" y="8" width="572" height="262" '
    yield 'viewBox="0 0 1144 524">'
    for curve in reversed(plot.curves):
        line, points, spreads = curve
        yield f'<g data-line="{line.number}" class="{line.colour}">'
        if spreads:
            yield f'<path class="band" d="{_path(_outline(curve), across, axis)}"/>'
        yield f'<path d="{_path(points, across, axis)}"/></g>'
    yield "</svg></svg></figure>"
    page.curves.append({
        "x": across.ends, "y": axis.ends, "log": logarithm and logarithm.ends,
        "curves": list(map(_exact, plot.curves)),
    })


def _exact(curve: _Curve) -> JSON:
    """Return number, differences of steps, values and spreads of a curve.

    Values are in base64, as little-endian floats: half the bytes.
    """
    import struct

    line, points, spreads = curve
    steps = [step for step, _ in points]
    rises = [b - a for a, b in zip([0.0, *steps], steps)]
    facts: list[JSON] = [line.number, rises]
    for numbers in (list(map(_value_of, points)), spreads):
        facts.append(_base64(struct.pack(f"<{len(numbers)}d", *numbers)))
    return facts


def _outline(curve: _Curve) -> list[_Point]:
    """Return the points of a curve, or those around its band."""
    _, points, spreads = curve
    if not spreads:
        return points
    pairs = list(zip(points, spreads))
    upper = [(step, mean + spread) for (step, mean), spread in pairs]
    return upper + [(step, mean - spread) for (step, mean), spread in reversed(pairs)]


def _marks_html(axis: _Axis, kind: str) -> str:
    """Return the numbers of an axis, each with a line across the plot."""
    parts = []
    before = ""
    for mark in axis.marks():
        y = round(270 - 262 * axis.place(mark))
        parts.append(f'<path d="M56 {y}h572"/>')
        label = _format_mark(mark)
        if label != before:  # marks nearer than its digits tell say it once
            parts.append(f'<text x="50" y="{y + 4}">{label}</text>')
        before = label
    return f'<g class="y{kind}">{"".join(parts)}</g>'


def _format_mark(number: float) -> str:
    """Return a round number for an axis: 0.25, 20000, 3e6, 1e-5."""
    return re.sub(r"e([-+])0*", r"e\1", f"{number:.6g}").replace("e+", "e")


def _path(points: Sequence[_Point], across: _Axis, axis: _Axis) -> str:
    """Return the path through some points of a plot's area, in few bytes: M0 9l3-2."""
    places = [(round(1144 * across.place(step)), round(524 - 524 * axis.place(value)))
              for step, value in points]
    parts = []
    for (x, y), (next_x, next_y) in zip(places, places[1:]):
        parts.append(f"{next_x - x} {next_y - y}".replace(" -", "-"))
    return f"M{places[0][0]} {places[0][1]}l{' '.join(parts) or '0 0'}"


# --- Parallel coordinates: which values of the config go with which results.


def _parallel_html(page: _Page) -> Iterator[str]:
    names = page.varying[:REPORT_AXES]
    if page.goal is not None:
        names.append(page.goal.text)
    elif page.drawn:
        names += [key for key in page.drawn[0].summary if key not in _NO_METRICS][:2]
    scales = [_Scale(name, page.drawn) for name in names]
    scales = [scale for scale in scales if scale.marks]
    if len(scales) < 2 or len(page.drawn) < 3:
        return
    yield '<section><h2>What varied, run by run</h2><section class="scroll" '
    yield 'aria-label="Parallel coordinates" tabindex="0"><svg class="parallel" '
    yield 'viewBox="0 0 1000 320" role="img" aria-label="A line for each run">'
    gap = 790 / (len(scales) - 1)
    for run in reversed(page.drawn):
        line = page.line_of[run.folder]
        places = [
            f"{80 + gap * number:.0f} {300 - 250 * scale.places[run.folder]:.0f}"
            for number, scale in enumerate(scales)
            if run.folder in scale.places
        ]
        if places:
            yield f'<g data-line="{line.number}" class="{line.colour}">'
            yield f'<path d="M{"L".join(places)}"/></g>'
    for number, scale in enumerate(scales):
        yield from _upright_html(page, scale, number, gap)
    yield "</svg></section></section>"


def _upright_html(page: _Page, scale: _Scale, number: int, gap: float) -> Iterator[str]:
    """Yield an upright with its name and marks, none of them upon another."""
    x = round(80 + gap * number)
    y = 32
    if gap < 190 and number % 2:  # names in two rows have room
        y = 14
    yield f'<g class="upright"><path d="M{x} 50v250"/>'
    yield f'<text class="name" x="{x}" y="{y}">{page.text(scale.name, 24)}</text>'
    before = 999
    for label, height in scale.marks.items():
        y = round(304 - 250 * height)
        if before - y >= 12:
            mark = page.text(label, min(18, int(gap / 8)))
            yield f'<text x="{x + 6}" y="{y}">{mark}</text>'
            before = y
    yield "</g>"


class _Scale:
    """One upright of the parallel coordinates, with the place of each run on it."""

    def __init__(self, name: str, runs: Sequence[Run]) -> None:
        self.name = name.replace("config.", "", 1)
        self.places: dict[str, float] = {}  # by folder: 0 is the lower end, 1 the upper
        self.marks: dict[str, float] = {}
        found = {run.folder: _Key(name).value(run) for run in runs}
        values = {path: value for path, value in found.items() if value is not None}
        words = sorted({_text(value) for value in values.values()})
        numbers = [n for n in map(_finite, values.values()) if n is not None]
        if len(words) < 2:
            return
        if len(numbers) == len(values):
            marks = sorted(set(numbers))
            axis = _Axis(marks, is_log=0 < 50 * marks[0] <= marks[-1])
            self.places = {p: axis.place(n) for p, n in zip(values, numbers)}
            if len(marks) > 6:
                marks = axis.marks()
            self.marks = {_format_mark(mark): axis.place(mark) for mark in marks}
        elif len(words) <= REPORT_WORDS:
            self.marks = {word: at / (len(words) - 1) for at, word in enumerate(words)}
            self.places = {path: self.marks[_text(v)] for path, v in values.items()}


# --- Images side by side, and the runs one by one.

_IMAGE = r"(plots|samples)/(?s:.*)\.(?i:png|jpe?g|gif|webp|svg)"


def _images_html(page: _Page) -> Iterator[str]:
    """Yield the images of plots/ and samples/, a strip for each name without its step.

    Those that are not inside the page are links, until somebody opens the strip.
    """
    images = []
    for run in page.drawn:
        names = filter(re.compile(_IMAGE).fullmatch, run.outputs)
        images += [(run, name) for name in names]
    if not images:
        return
    if len(images) > REPORT_IMAGES:
        told = f"Of {len(images)} images the first {REPORT_IMAGES} are shown."
        page.left_out.append(told)
    strips: dict[str, list[tuple[Run, str]]] = {}
    for run, name in images[:REPORT_IMAGES]:
        pattern = re.sub(r"\d+(?=\D*$)", "*", name)
        strips.setdefault(pattern, []).append((run, name))
    yield "<section><h2>Images</h2>"
    room = REPORT_EMBED_BYTES
    for pattern in sorted(strips):
        shown = page.text(pattern, 120)
        yield f'<details class="images"><summary>{shown}</summary><div class="strip">'
        for run, name in strips[pattern]:
            path = f"{run.folder}/{name}"
            line = page.line_of[run.folder]
            about = page.text(f"{run.name}, {basename(name)}")
            image = ""
            if page.args.embed:
                image = _embedded(path, room)
                room -= len(image)
            yield f'<figure data-line="{line.number}"><a href="{page.link(path)}">'
            yield f"{image}{line.swatch()}{about}</a></figure>"
        yield "</div></details>"
    yield "</section>"


def _embedded(path: str, room: int) -> str:
    kind = path.rpartition(".")[2].lower()
    kind = {"jpg": "jpeg", "svg": "svg+xml"}.get(kind, kind)
    with _ignoring(OSError):
        data = _base64(_read_bytes(path, max(room, 1) * 3 // 4))
        return f'<img src="data:image/{kind};base64,{data}" alt="">'
    return ""


def _details_html(page: _Page) -> Iterator[str]:
    """Yield what is known of each drawn run, folded up."""
    if not page.runs:
        return
    yield '<section id="runs"><h2>Run by run</h2>'
    for number, run in enumerate(page.drawn):
        room = REPORT_TEXT_BYTES // len(page.drawn)
        line = page.line_of[run.folder]
        yield f'<details class="run" data-line="{line.number}"><summary>{line.swatch()}'
        yield f'<span class="name">{page.text(run.name, 120)}</span>'
        yield f'<span class="label">{page.text(line.label, 90)}</span>'
        yield _state_html(page, run.state)
        yield f'</summary><dl id="run-{number}">'
        for title, lines in _run_facts(page, run):
            text = page.block(lines, min(room, 4000))
            room = max(room - len(text), 200)
            if text:
                yield f"<dt>{title}</dt><dd><pre>{text}</pre></dd>"
        yield "<dt>files</dt><dd>"
        for name in ("", "logs/stdout.log", "logs/stderr.log", "logs/output.log"):
            path = f"{run.folder}/{name}"
            if exists(path):
                yield f'<a href="{page.link(path)}">{name or "folder"}</a>'
        yield "</dd></dl></details>"
        run.forget()
    yield "</section>"


def _run_facts(page: _Page, run: Run) -> Iterator[Paragraph]:
    best = page.runs[0]
    config = []
    for key in page.varying:
        then, now = _text(best.get(key)), _text(run.get(key))
        if page.goal is not None and then != now:
            config.append(f"{_short(key)}={now}, best: {then}")
    metrics = []
    for key, facts in list(run.summary.items())[:REPORT_PLOTS]:
        last, low, high = (_text(facts[name]) for name in ("last", "min", "max"))
        metrics.append(f"{key}: {last} (lowest {low}, highest {high})")
    yield "status", [_format_end(run.status)]
    yield "why", _format_why(run)
    yield "metrics", metrics
    yield from _about_paragraphs(run, config)
    yield "output", _last_output(run.path)


def _left_out_html(page: _Page) -> Iterator[str]:
    left_out = page.left_out + _format_problems(page.drawn)
    if left_out:
        yield "<section><h2>What this page leaves out</h2><ul>"
        for sentence in left_out:
            yield f"<li>{page.text(sentence)}</li>"
        yield "</ul></section>"


# --- The page itself: markup, style and script.

_REPORT_MARKUP = """
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="generator" content="run_utils {version}">
<title>{title}: runs</title>
<style>{style}</style>
</head>
<body>
<main>
<h1>{title}</h1>
{body}
</main>
<div id="tip" hidden></div>
<script type="application/json" id="curves">{curves}</script>
<script>{script}</script>
</body>
</html>
"""

_REPORT_STYLE = """
:root {
  color-scheme: light dark;
  --paper: #fff; --ink: #1b1f24; --quiet: #59636e; --rule: #e1e4e8; --wash: #f4f6f8;
  --accent: #0b5cad; --good: #1a7337; --bad: #b3261e; --odd: #875000;
}
.c0 { color: #0072b2; } .c1 { color: #d55e00; } .c2 { color: #009e73; }
.c3 { color: #b65a93; } .c4 { color: #c78500; } .c5 { color: #3f9fd8; }
.c6 { color: #7a2048; } .c7 { color: #5f5f5f; } .r0 { color: #16318a; }
.r1 { color: #24509f; } .r2 { color: #3670ab; } .r3 { color: #4f90b2; }
.r4 { color: #6ca8b4; } .r5 { color: #8dbbb0; } .r6 { color: #adc6ab; }
.r7 { color: #c8cfaf; }
@media screen and (prefers-color-scheme: dark) {
  :root {
    --paper: #15181c; --ink: #e4e7eb; --quiet: #9aa4af; --rule: #2d333b;
    --wash: #1d2126; --accent: #79b8ff; --good: #56c271; --bad: #ff8a80;
    --odd: #e3b057;
  }
  .c0 { color: #58a9e0; } .c1 { color: #f08040; } .c2 { color: #2fc39a; }
  .c3 { color: #e08fc0; } .c4 { color: #eab54a; } .c5 { color: #9ad6f7; }
  .c6 { color: #cc5f93; } .c7 { color: #c9ccd1; } .r0 { color: #ffe3a0; }
  .r1 { color: #f0c892; } .r2 { color: #d9b090; } .r3 { color: #bb9f97; }
  .r4 { color: #9d909d; } .r5 { color: #80819d; } .r6 { color: #667094; }
  .r7 { color: #52618a; }
}
* { box-sizing: border-box; margin: 0; }
body {
  background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, "Segoe UI", Arial, sans-serif;
  font-variant-numeric: tabular-nums; overflow-wrap: anywhere;
}
main { max-width: 1400px; margin: 0 auto; padding: 32px; }
main > section { margin-top: 44px; }
h1 { font-size: 28px; font-weight: 650; }
h2 { margin-bottom: 10px; font-size: 17px; font-weight: 620; }
h3 { font-size: 14px; font-weight: 600; }
a { color: var(--accent); text-decoration: none; }
a:hover { text-decoration: underline; }
:focus-visible { outline: 2px solid var(--accent); }
code, pre { font: 13px/1.5 ui-monospace, Menlo, Consolas, monospace; }
pre { padding: 8px 12px; background: var(--wash); white-space: pre-wrap; }
.quiet, dt, .label, thead { color: var(--quiet); }
[hidden], .off, .unlisted { display: none !important; }

.summary {
  display: grid; grid-template-columns: minmax(150px, 1fr) 2fr 3fr; gap: 32px;
  margin-top: 24px; padding-top: 20px; border-top: 1px solid var(--rule);
}
.summary h2 { margin: 0; color: var(--quiet); font-size: 13px; font-weight: 500; }
.summary b { display: inline-block; min-width: 2.2em; font-size: 17px; }
.value { font-size: 34px; font-weight: 600; line-height: 1.25; }
ul { padding: 0; list-style: none; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 4px 18px; }
dd { min-width: 0; }
.state::before { display: inline-block; width: 1.2em; content: "•"; }
.success { color: var(--good); }
.success::before { content: "✓"; }
.failed { color: var(--bad); }
.failed::before { content: "✗"; }
.running { color: var(--accent); }
.running::before { content: "▸"; }
.lost { color: var(--odd); }
.lost::before { content: "?"; }

.scroll { overflow: auto; max-height: 72vh; }
.runs { width: 100%; border-collapse: collapse; font-size: 14px; }
.runs th, .runs td {
  max-width: 380px; padding: 4px 12px; overflow: hidden; text-overflow: ellipsis;
  border-bottom: 1px solid var(--rule); font-weight: 400; text-align: right;
  white-space: nowrap;
}
.runs .t, .runs tbody th { text-align: left; }
.runs thead th { position: sticky; top: 0; background: var(--paper); font-size: 13px; }
.runs tr.lit, .runs tbody tr:hover { background: var(--wash); }
.tools { display: flex; gap: 14px; margin-bottom: 10px; }
button, input[type="search"] {
  padding: 2px 10px; border: 1px solid var(--rule); border-radius: 6px;
  background: none; color: inherit; font: inherit; font-size: 13px;
}
th button { padding: 0; border: 0; }
th button::after { position: absolute; }
[aria-sort] button { color: var(--ink); font-weight: 600; }
[aria-sort="ascending"] button::after { content: "↑"; }
[aria-sort="descending"] button::after { content: "↓"; }
[aria-pressed="true"] { border-color: var(--accent); color: var(--accent); }
[type="checkbox"] { margin-right: 8px; accent-color: var(--accent); }

.swatch {
  display: inline-block; width: 18px; margin-right: 8px; vertical-align: 4px;
  border-top: 3px solid;
}
.swatch.d1 { border-top-style: dashed; }
.swatch.d2 { border-top-style: dotted; }
.legend { margin-bottom: 14px; font-size: 13px; }
.legend li { display: inline-block; margin-right: 20px; }
.legend .swatch + .swatch { margin-left: -8px; }

.plots {
  display: grid; gap: 26px;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 520px), 1fr));
}
figcaption { display: flex; justify-content: space-between; min-height: 26px; }
svg { display: block; width: 100%; height: auto; }
svg path { fill: none; stroke: var(--rule); }
svg text { fill: var(--quiet); font-size: 12px; }
.y text { text-anchor: end; }
.x, .name { text-anchor: middle; }
svg [data-line] { stroke-width: 3; stroke-linejoin: round; stroke-linecap: round; }
svg [data-line] path { stroke: currentColor; }
.d1 path { stroke-dasharray: 14 9; }
.d2 path { stroke-dasharray: 2 8; }
.many [data-line] { stroke-width: 2; opacity: 0.75; }
svg [data-line] .band { fill: currentColor; stroke: none; opacity: 0.16; }
svg .dot { fill: currentColor; }
.parallel { min-width: 700px; max-width: 1180px; }
.parallel [data-line] { stroke-width: 1.6; opacity: 0.7; }
svg .lit { stroke-width: 6; opacity: 1; }
.parallel .lit { stroke-width: 4; }
.faded, svg .faded { opacity: 0.1; }
.upright text { stroke: var(--paper); stroke-width: 4px; paint-order: stroke; }
.upright .name { fill: var(--ink); font-weight: 600; }
#tip {
  position: fixed; z-index: 2; max-width: 340px; padding: 8px 12px; font-size: 13px;
  border: 1px solid var(--rule); background: var(--paper); white-space: pre-line;
  pointer-events: none;
}

summary { padding: 5px 0; cursor: pointer; }
.strip { display: flex; gap: 18px; overflow-x: auto; font-size: 13px; }
.strip figure { flex: 0 0 auto; max-width: 320px; }
.strip img { display: block; max-width: 100%; max-height: 260px; }
.run { border-bottom: 1px solid var(--rule); }
.run dl { padding: 8px 0 20px 18px; }
.run dd > a { margin-right: 14px; }
.label { margin: 0 8px; font-size: 13px; }

@media (max-width: 900px) {
  main { padding: 18px; }
  .summary { grid-template-columns: 1fr 1fr; }
  .summary section:last-child { grid-column: 1 / -1; }
}
@media print {
  @page { size: landscape; margin: 10mm; }
  .scroll { max-height: none; overflow: visible; }
  .runs, .runs thead th, .runs button { font-size: 8px; }
  .runs th, .runs td { padding: 2px 3px; max-width: none; }
  .runs th, .runs .t { min-width: 40px; overflow-wrap: anywhere; white-space: normal; }
  figure button, input, .tools { display: none; }
  figure { break-inside: avoid; }
}
"""

_REPORT_SCRIPT = """
"use strict";

const find = (selector) => document.querySelector(selector);
const all = (selector) => document.querySelectorAll(selector);
const make = (tag, facts) => Object.assign(document.createElement(tag), facts);
const table = find(".runs");
const rows = table ? [...table.tBodies[0].rows] : [];
const tip = find("#tip");
const itemsOf = {}; // of each line all that belongs to it: row, curves, legend, images

for (const item of all("[data-line]")) {
  (itemsOf[item.dataset.line] ||= []).push(item);
}
if (table) {
  find(".tools").hidden = false;
  find("#filter").oninput = update;
  find("#clear").onclick = clearSelection;
  [...table.tHead.rows[0].cells].forEach(makeSortable);
  rows.forEach(makeSelectable);
}
const curves = JSON.parse(find("#curves").textContent);
all(".plot").forEach(makePlot);
for (const strip of all(".images")) strip.ontoggle = loadImages;
window.onbeforeprint = () => {
  for (const details of all("details")) details.open = true;
};

function light(line) {
  for (const item of all(".lit")) item.classList.remove("lit");
  for (const item of itemsOf[line] || []) item.classList.add("lit");
}

function loadImages(event) {
  for (const link of event.target.querySelectorAll("a")) {
    if (link.querySelector("img")) continue;
    link.prepend(make("img", { alt: "", src: link.href }));
  }
}

function makeSortable(head, column, heads) {
  const button = make("button", { type: "button" });
  button.append(...head.childNodes);
  head.append(button);
  button.onclick = () => {
    const sign = head.ariaSort === "ascending" ? -1 : 1;
    for (const other of heads) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
    const keys = new Map(rows.map((row) => [row, sortKey(row.cells[column])]));
    rows.sort((a, b) => compareKeys(keys.get(a), keys.get(b), sign));
    table.tBodies[0].append(...rows);
  };
}

function sortKey(cell) {
  return cell.dataset.value || cell.textContent.trim();
}

// Numbers come before texts, and an empty cell last, in both directions.
function compareKeys(a, b, sign) {
  if (!a || !b) return !a - !b;
  if (!isNaN(a) && !isNaN(b)) return sign * (a - b);
  return isNaN(a) - isNaN(b) || sign * a.localeCompare(b, "en");
}

function makeSelectable(row) {
  const ariaLabel = "Select " + row.cells[0].textContent;
  const box = make("input", { type: "checkbox", ariaLabel, onchange: update });
  row.cells[0].prepend(box);
}

function clearSelection() {
  for (const row of rows) row.cells[0].firstChild.checked = false;
  update();
}

// Show the rows that have all words of the filter, and the lines that rows show.
function update() {
  const words = find("#filter").value.toLowerCase().split(" ");
  const shown = new Set();
  const selected = new Set();
  for (const row of rows) {
    const text = row.textContent.toLowerCase();
    row.hidden = !words.every((word) => text.includes(word));
    if (row.hidden) continue;
    shown.add(row.dataset.line);
    if (row.cells[0].firstChild.checked) selected.add(row.dataset.line);
  }
  for (const [line, items] of Object.entries(itemsOf)) {
    const isFaded = selected.size > 0 && !selected.has(line);
    for (const item of items) {
      if (item.tagName === "TR") continue;
      item.classList.toggle("unlisted", !shown.has(line));
      item.classList.toggle("faded", isFaded && item.tagName !== "DETAILS");
    }
  }
  const count = rows.filter((row) => !row.hidden).length;
  find("#count").textContent = count + " of " + rows.length + " runs";
}

function makePlot(figure, number) {
  const plot = { ...curves[number], isLog: false, figure, groups: {} };
  plot.curves = plot.curves.map(decode);
  plot.area = figure.querySelector(".area");
  for (const group of plot.area.children) plot.groups[group.dataset.line] = group;
  const svg = figure.querySelector("svg");
  svg.onpointermove = (event) => showPoint(plot, svg, event);
  svg.onpointerleave = () => hidePoint(plot);
  const button = figure.querySelector("button");
  if (!button) return;
  button.hidden = false;
  button.onclick = () => {
    plot.isLog = !plot.isLog;
    button.setAttribute("aria-pressed", plot.isLog);
    figure.querySelectorAll(".y").forEach((axis) => axis.classList.toggle("off"));
    plot.curves.forEach((curve) => drawCurve(plot, curve));
  };
}

// A curve has its line's number, steps, values, and the deviations of a mean.
function decode([line, rises, values, spreads]) {
  const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const numbers = (text) => [...new Float64Array(bytes(text).buffer)];
  let step = 0;
  const steps = rises.map((rise) => (step += rise));
  return [line, steps, numbers(values), numbers(spreads)];
}

function drawCurve(plot, [number, steps, values, spreads]) {
  const shifted = (sign) =>
    values.map((value, i) => place(plot, steps[i], value + sign * (spreads[i] || 0)));
  const line = shifted(0);
  const band = [...shifted(1), ...shifted(-1).reverse()];
  for (const path of plot.groups[number].querySelectorAll("path")) {
    const places = path.matches(".band") ? band : line;
    const words = places.filter(Boolean).map(([x, y]) => x + " " + y);
    path.setAttribute("d", "M" + (words.join("L") || "0 0"));
  }
}

// Return where a point lies in the plot's area; on a logarithmic axis 0 has no place.
function place(plot, step, value) {
  if (plot.isLog && value <= 0) return null;
  const [low, high] = plot.isLog ? plot.log : plot.y;
  const height = ((plot.isLog ? Math.log10(value) : value) - low) / (high - low);
  const x = (step - plot.x[0]) / (plot.x[1] - plot.x[0]);
  return [1144 * x, 524 - 524 * height];
}

function showPoint(plot, svg, event) {
  const box = svg.getBoundingClientRect();
  const scale = 640 / box.width;
  const x = 2 * ((event.clientX - box.left) * scale - 56);
  const y = 2 * ((event.clientY - box.top) * scale - 8);
  const [curve, at, point] = nearestPoint(plot, x, y);
  hidePoint(plot);
  if (!curve) return;
  const dot = `<circle class="dot" r="8" cx="${point[0]}" cy="${point[1]}"/>`;
  plot.groups[curve[0]].insertAdjacentHTML("beforeend", dot);
  light(curve[0]);
  tip.textContent = describe(plot, curve, at);
  tip.hidden = false;
  tip.style.left = Math.min(event.clientX + 16, innerWidth - tip.offsetWidth) + "px";
  tip.style.top = Math.min(event.clientY + 16, innerHeight - tip.offsetHeight) + "px";
}

function hidePoint(plot) {
  plot.area.querySelector(".dot")?.remove();
  tip.hidden = true;
  light(null);
}

function nearestPoint(plot, x, y) {
  let found = [];
  let least = 150;
  for (const curve of plot.curves) {
    if (plot.groups[curve[0]].matches(".unlisted, .faded")) continue;
    curve[1].forEach((step, at) => {
      const point = place(plot, step, curve[2][at]);
      const distance = point ? Math.hypot(point[0] - x, point[1] - y) : Infinity;
      if (distance >= least) return;
      least = distance;
      found = [curve, at, point];
    });
  }
  return found;
}

function describe(plot, [line, steps, values, spreads], at) {
  const details = find(`.run[data-line="${line}"]`);
  const label = details.querySelector(".label").textContent.trim();
  const metric = plot.figure.querySelector("h3").textContent;
  const name = details.querySelector(".name").textContent;
  const step = "step " + Number(steps[at].toPrecision(12));
  if (!spreads.length) {
    return [name, label, metric + " " + values[at], step].join("\\n");
  }
  const [mean, spread] = [values[at], spreads[at]].map((n) => +n.toPrecision(7));
  return [label, metric + " " + mean + " ± " + spread, step].join("\\n");
}
"""


# === Running a command ===
# `run -- CMD`: the command has the signals, the terminal, the environment and the open
# files that it would have without us, and its exit status is ours.


def _cmd_run(args: Namespace) -> int:
    """Record a command; return its exit status, 128+n when signal n ended it.

    If SIGINT has ended the command, it ends us too.
    """
    words: list[str] = args.words
    if words[:1] == ["--"]:
        words = words[1:]
    if not words:
        raise ValueError("no command is given; write it after --")
    if not hasattr(os, "fork"):
        raise ValueError("run takes os.fork, which is not here; use run_context")
    limit = _seconds_of(args.timeout)
    config = {**_config_file(args.config), **_command_options(words)}
    recording = run_context(
        args.base_dir, args.prefix, config, notes=args.note, tags=args.tag
    )
    recording.argv = words
    path = _on_path(words[0], os.getcwd())
    if path is None:
        code, problem = _not_runnable(words[0])
        _say(f"{_prog()}: {problem}; nothing was recorded")
        return code
    with recording as run_dir:
        assert recording.capture is not None  # nosec
        command = _Command(path, words, recording.capture, limit)
        code = command.run()
        recording.ending = _Ending.of_command(code)
        if command.problem is not None:
            recording.ending.status = "failed"
            recording.ending.problem = command.problem
    if command.problem is not None:
        _say(f"{_prog()}: {command.problem}")
    _say(f"run_utils: recorded in {run_dir}")
    if command.is_late:
        return 124  # as timeout(1)
    if code == -signal.SIGINT:
        if command.terminal is not None and command.terminal.is_interrupted:
            os.kill(0, signal.SIGINT)  # our group, which our terminal would have told
        raise KeyboardInterrupt
    if code < 0:
        return 128 - code
    return code


def _not_runnable(name: str) -> tuple[int, str]:
    folders = os.get_exec_path()
    if os.sep in name:
        folders = [""]
    if any(exists(join(folder, name)) for folder in folders):
        return 126, f"{name!r} is not executable"
    return 127, f"{name!r} is not a program on PATH"


def _seconds_of(text: str | None) -> float | None:
    if text is None:
        return None
    parts = re.fullmatch(r"(\d+\.?\d*)([smhd]?)", text)
    if parts is None:
        raise ValueError(f"--timeout is {text!r}; give a time such as 90s, 30m or 2h")
    return float(parts[1]) * {"m": 60, "h": 3600, "d": 86400}.get(parts[2], 1)


def _config_file(name: str | None) -> Facts:
    if name is None:
        return {}
    try:
        text = _read_bytes(name).decode("utf-8")
        read: Callable[[str], JSON] = _parse_yaml
        if text.lstrip().startswith("{"):
            read = json.loads
        value = read(text)
    except (OSError, ValueError) as error:
        raise ValueError(f"--config {name!r} cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"--config {name!r} is not a mapping; give key: value lines")
    return value


def _command_options(words: Sequence[str]) -> Facts:
    """Return the options of a command as a config.

    What comes before its script is for the interpreter or the launcher.

    >>> _command_options(["./train", "--flag", "-v", "3", "--list", "a", "b", "x=0.9"])
    {'flag': True, 'v': 3, 'list': ['a', 'b'], 'x': 0.9}
    """
    config: dict[str, list[str]] = {}
    name = None
    for word in _arguments_of(words):
        option = re.fullmatch(r"(--?|\+\+?|)([A-Za-z_][\w.-]*)(?:=(.*))?", word, re.S)
        if option and option[3] is not None:
            config[option[2]] = [option[3]]
            name = None
        elif option and option[1].startswith("-"):
            name = option[2]
            config[name] = []
        elif name is not None:
            if config[name] and word.endswith(".py") and isfile(word):
                name = None  # the script that a launcher starts
            else:
                config[name].append(word)
    options: Facts = {}
    for name, texts in config.items():
        options[name] = [_option_value(text) for text in texts] or [True]
        if len(options[name]) == 1:
            options[name] = options[name][0]
    return options


def _arguments_of(words: Sequence[str]) -> Sequence[str]:
    site = _Site.here(list(words))
    for number, word in enumerate(words):
        if number and word in ("-m", "-c"):
            return words[number + 2 :]
        if join(site.cwd or os.sep, word) == site.script:
            return words[number + 1 :]
    return words[1:]


def _option_value(text: str) -> JSON:
    if re.fullmatch(r"[-+]?\d{1,18}", text):
        return int(text)
    if re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?", text):
        return float(text)
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    return text


class _Command:
    """A command that runs, the signals for it, and what it shows on a terminal.

    Where stdin, stdout and stderr are our terminal, it gets another one of that kind,
    and we are in between. Else, and in the background, it only gets another stdout and
    stderr, and not even these where they are logs.
    """

    code: int | None = None  # its exit status, -n: signal n has ended it
    problem: str | None = None
    is_late = False
    terminal: _Terminal | None = None  # ours, when we are in between

    def __init__(
        self, path: str, words: list[str], capture: _Capture, limit: float | None
    ) -> None:
        self.path = path
        self.words = words
        self.capture = capture
        self.limit = limit  # in seconds
        self.channels: list[_Channel] = []

    def run(self) -> int:
        wake, waker = os.pipe()  # which tells the signals that have come
        _posix.set_blocking(waker, False)
        try:
            with _signals_to(waker) as of_children:
                if all(map(os.isatty, (0, 1, 2))) and _is_foreground():
                    self.terminal = _Terminal()
                    self.terminal.follow()
                    self.channels = [_Channel(self.capture, 1, self.terminal.master)]
                    inner = os.dup(self.terminal.inner)
                    self._start({0: inner, 1: inner, 2: inner}, of_children)
                else:
                    self._start(self._outputs(), of_children)
                self._serve(wake)
        finally:
            if self.terminal is not None:
                self.terminal.restore()
                self.terminal.kept_inner.close()
            for channel in self.channels:
                channel.close()
            os.close(wake)
            os.close(waker)
        return self.code or 0

    def _outputs(self) -> dict[int, int]:
        """Return what the command gets as stdout or stderr where that is no log."""
        own = {}
        places: dict[object, int] = {}
        for stream in self.capture.streams:
            if stream.is_direct:
                continue
            if stream.place not in places:
                if os.isatty(stream.descriptor):
                    reader, writer = _posix.openpty()
                    _pass_as_it_is(writer, stream.descriptor)
                else:
                    reader, writer = os.pipe()
                places[stream.place] = writer
                channel = _Channel(self.capture, stream.descriptor, reader)
                self.channels.append(channel)
            own[stream.descriptor] = places[stream.place]
        return own

    def _start(self, own: Mapping[int, int], of_children: Any) -> None:
        """Start the command with some descriptors, and each signal as we had got it."""
        failure, tell = os.pipe()
        mask = _signals.pthread_sigmask(_signals.SIG_BLOCK, signal.valid_signals())
        self.pid = _posix.fork()
        if self.pid == 0:
            try:
                ignored = (_signals.SIGPIPE, _signals.SIGXFSZ)  # by Python itself
                for number in signal.valid_signals():
                    if number in ignored or callable(signal.getsignal(number)):
                        signal.signal(number, signal.SIG_DFL)
                signal.signal(_signals.SIGCHLD, of_children)
                if self.terminal is not None:
                    self.terminal.become_controlling()
                for descriptor, source in own.items():
                    os.dup2(source, descriptor)
                _signals.pthread_sigmask(_signals.SIG_SETMASK, mask)
                _execute(self.path, self.words)
            except OSError as error:
                os.write(tell, str(error.errno).encode())
            finally:
                os._exit(127)
        for descriptor in {tell, *own.values()}:
            os.close(descriptor)
        _signals.pthread_sigmask(_signals.SIG_SETMASK, mask - {_signals.SIGCHLD})
        told = os.read(failure, 16)
        os.close(failure)
        if told:
            self.problem = f"{self.path!r} cannot be run: {os.strerror(int(told))}"
            os.waitpid(self.pid, 0)
            self.code = 126
            if int(told) in (errno.ENOENT, errno.ENOTDIR):  # its #! line names none
                self.code = 127

    def _pass_on(self, number: int) -> None:
        """Send a signal on, unless the terminal has sent it to the command as well."""
        if number in (_signals.SIGCHLD, _signals.SIGWINCH):
            return  # they only wake us
        is_typed = number in (signal.SIGINT, _signals.SIGQUIT) and _is_foreground()
        if self.terminal is not None or not is_typed:
            self._signal(number)

    def _signal(self, number: int) -> None:
        send = os.kill
        if self.terminal is not None:
            send = _posix.killpg  # it is a group of its own
        if self.code is None:
            with _ignoring(ProcessLookupError):
                send(self.pid, number)

    def _serve(self, wake: int) -> None:
        """Show what the command prints and let it read what is typed, until it ends."""
        deadline = _NEVER
        if self.limit is not None:
            deadline = monotonic() + self.limit
        terminal = self.terminal
        while True:
            is_over = self._has_ended()
            readers: list[int] = [wake, *(channel.reader for channel in self.channels)]
            writers = []
            pause = 0.0
            if not is_over:
                pause = max(0.0, min(1.0, deadline - monotonic()))
                if terminal is not None and terminal.follow():
                    if terminal.typed:
                        writers.append(terminal.master)
                    else:
                        readers.append(0)
            ready, takers, _ = select.select(readers, writers, [], pause)
            self._say_who_is_gone()
            if wake in ready:
                for number in os.read(wake, 512):
                    self._pass_on(number)
            if terminal is not None:
                if 0 in ready and terminal.read(self.pid):
                    self._signal(_signals.SIGSTOP)
                if takers:
                    terminal.pass_on()
            for channel in list(self.channels):
                if channel.reader in ready and not channel.show():
                    self.channels.remove(channel)
            if is_over and set(ready) <= {wake}:
                return
            if monotonic() >= deadline:
                deadline = monotonic() + KILL_SECONDS
                self._end()

    def _say_who_is_gone(self) -> None:
        """Say why the command goes on: it writes into a log, and is told nothing."""
        for stream in self.capture.streams:
            if stream.is_direct and stream.saved.is_ours():
                if _is_ready(stream.saved.number, _HANG_UP, 0.0):
                    text = f"nobody reads {stream.name} any more; the command goes on"
                    _warn(f"{text}, and so does its log", once=True)

    def _has_ended(self) -> bool:
        """Tell whether the command has ended; stop when it does, for our shell."""
        how = _posix.WNOHANG
        if self.terminal is not None:
            how |= _posix.WUNTRACED
        if self.code is None:
            pid, status = os.waitpid(self.pid, how)
            if pid and self.terminal is not None and _posix.WIFSTOPPED(status):
                self.terminal.restore()
                _posix.killpg(_posix.getpgrp(), _signals.SIGTSTP)  # until `fg` or `bg`
                self._signal(_signals.SIGCONT)
            elif pid:
                self.code = _exit_code(status)
                if self.terminal is not None:  # else its output would have no end
                    self.terminal.kept_inner.close()
        return self.code is not None

    def _end(self) -> None:
        """Ask a command that is late to end, with all it has started; then kill it."""
        number = signal.SIGTERM
        if self.is_late:
            number = _signals.SIGKILL
        self.is_late = True
        self.problem = f"stopped after its time limit of {self.limit:g} s"
        pids = [self.pid]
        for pid in pids:
            pids += _children(pid)
        for pid in pids:
            with _ignoring(OSError):
                os.kill(pid, number)


class _Channel:
    """What a command prints, on its way to our stdout or stderr and to the log."""

    def __init__(self, capture: _Capture, target: int, reader: int) -> None:
        self.capture = capture
        self.target = target
        self.reader = reader
        self.text = _TerminalText()
        self.is_terminal = os.isatty(reader)

    def show(self) -> bool:
        """Show what has come; return False once nobody has the other end."""
        data = b""
        with _ignoring(OSError):  # as a terminal tells it
            data = os.read(self.reader, FORWARD_BYTES)
        if not data:
            self.close()
            return False
        _write_patiently(self.target, data)
        if self.is_terminal:
            data = self.text.add(data)
        self.capture.copy(self.target, data)
        return True

    def close(self) -> None:
        os.close(self.reader)
        self.capture.copy(self.target, self.text.end())


class _TerminalText:
    """Makes lines for a log of what a terminal is told.

    "\\r\\n" becomes "\\n". Of a line that is written over and over, such as a progress
    bar, the last state is kept, and one every HEARTBEAT_SECONDS.
    """

    line = b""  # what the log lacks of the last one
    is_begun = False  # the log has a part of it
    due = 0.0  # when to log a line that is written over and over

    def add(self, data: bytes) -> bytes:
        result = b""
        *lines, self.line = re.sub(rb"\r+\n", b"\n", self.line + data).split(b"\n")
        for line in lines:
            result += self._seen(line) + b"\n"
            self.is_begun = False
        if b"\r" not in self.line or monotonic() > self.due:
            result += self.end()
        self.line = self.line[-4096:]
        return result

    def end(self) -> bytes:
        """Return the last line as it is now, as far as the log lacks it."""
        self.due = monotonic() + HEARTBEAT_SECONDS
        seen = self._seen(self.line)
        self.is_begun = self.is_begun or seen != b""
        self.line = self.line[len(self.line.rstrip(b"\r")) :]
        return seen

    def _seen(self, line: bytes) -> bytes:
        """Return what is seen of a line in the end: after a "\\r" it is begun anew."""
        text = line.rstrip(b"\r")
        seen = text[text.rfind(b"\r") + 1 :]
        if self.is_begun and seen != text:
            return b"\n" + seen
        return seen


class _Terminal:
    """The terminal that we are on, and the one that the command gets instead."""

    is_raw = False  # what is typed comes as it is
    is_gone = False
    is_interrupted = False  # Ctrl-C has been typed
    typed = b""  # what the command has not taken yet

    def __init__(self) -> None:
        self.tty = __import__("tty")  # which has all of termios
        self.saved = self.tty.tcgetattr(0)
        self.master, self.inner = _posix.openpty()
        # It stays open here: were it closed by the command, which then runs on without
        # a terminal, we would hang up.
        self.kept_inner = _Kept(self.inner)
        _posix.set_blocking(self.master, False)
        self.tty.tcsetattr(self.inner, self.tty.TCSANOW, self.saved)
        _copy_size(0, self.master)

    def become_controlling(self) -> None:
        """In the command: begin a session whose terminal is the inner one."""
        fcntl = __import__("fcntl")
        _posix.setsid()
        fcntl.ioctl(self.inner, self.tty.TIOCSCTTY, 0)

    def follow(self) -> bool:
        """Tell whether what is typed is for us: while we are in the foreground."""
        with _ignoring(OSError, self.tty.error):
            if not self.is_gone and _is_foreground():
                _copy_size(0, self.master)
                if not self.is_raw:
                    self.tty.setraw(0, self.tty.TCSADRAIN)
                    self.is_raw = True
                return True
        return False

    def restore(self) -> None:
        with _ignoring(OSError, self.tty.error):
            if self.is_raw and _is_foreground():
                self.tty.tcsetattr(0, self.tty.TCSADRAIN, self.saved)
        self.is_raw = False

    def read(self, pid: int) -> bool:
        """Read what is typed; tell whether it is Ctrl-Z, which is to stop the command.

        The kernel does not stop the first process of a terminal.
        """
        data = b""
        with _ignoring(OSError):
            data = os.read(0, 1024)
        if not data:
            self.is_gone = True
        if self.saved[6][self.tty.VINTR] in data:
            self.is_interrupted = True
        stop = self._stop_byte(pid)
        self.typed += data.replace(stop, b"", 1)
        return bool(stop) and stop in data

    def pass_on(self) -> None:
        with _ignoring(OSError):
            self.typed = self.typed[os.write(self.master, self.typed) :]

    def _stop_byte(self, pid: int) -> bytes:
        """Return what is typed to stop the command; nothing if that is up to it."""
        with _ignoring(OSError, self.tty.error):
            attributes = self.tty.tcgetattr(self.master)
            is_ours = _posix.tcgetpgrp(self.master) == pid
            status = _read_proc(f"/proc/{pid}/status")
            ignored = re.search(rb"SigIgn:\s*(\w+)", status)
            if is_ours and attributes[3] & self.tty.ISIG and ignored is not None:
                if not int(ignored[1], 16) & 1 << _signals.SIGTSTP - 1:
                    stop: bytes = attributes[6][self.tty.VSUSP]
                    return stop.strip(b"\0")
        return b""


def _pass_as_it_is(terminal: int, outer: int) -> None:
    """Let a terminal have our size and leave the line ends to ours."""
    termios = __import__("termios")
    attributes = termios.tcgetattr(terminal)
    attributes[1] &= ~termios.OPOST
    termios.tcsetattr(terminal, termios.TCSANOW, attributes)
    _copy_size(outer, terminal)


def _copy_size(outer: int, inner: int) -> None:
    fcntl = __import__("fcntl")
    termios = __import__("termios")
    size = fcntl.ioctl(outer, termios.TIOCGWINSZ, bytes(8))
    fcntl.ioctl(inner, termios.TIOCSWINSZ, size)


def _is_foreground() -> bool:
    with _ignoring(OSError), io.FileIO("/dev/tty") as terminal:
        return bool(_posix.tcgetpgrp(terminal.fileno()) == _posix.getpgrp())
    return False  # there is no terminal


def _execute(path: str, words: list[str]) -> None:
    """Become the program; a script without a #! line is for the shell."""
    try:
        os.execv(path, words)  # nosec
    except OSError as error:
        if error.errno != errno.ENOEXEC:
            raise
        os.execv("/bin/sh", ["sh", path, *words[1:]])  # nosec


@contextlib.contextmanager
def _signals_to(waker: int) -> Iterator[Any]:
    """Have signals written to a descriptor; yield how that of children was handled."""
    numbers = _signals_named(
        "TERM HUP INT QUIT USR1 USR2 ALRM CONT XCPU VTALRM PROF IO PWR ABRT WINCH"
    )
    if hasattr(signal, "SIGRTMIN"):
        numbers += range(_signals.SIGRTMIN, _signals.SIGRTMAX + 1)
    wakeup = signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
    before = {}
    for number in [*numbers, _signals.SIGCHLD]:
        handled = signal.getsignal(number)
        if handled not in (signal.SIG_IGN, None) or number == _signals.SIGCHLD:
            before[number] = signal.signal(number, lambda *_: None)
    try:
        yield before[_signals.SIGCHLD]
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handled in before.items():
            signal.signal(number, handled)


# === Command line ===
# What the commands are is one table, at the end. Exit status 0: yes, same, done;
# 1: no, different; 2: trouble, and one sentence on stderr says which.


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line with `argv` (default: sys.argv[1:]); return its status."""
    words = argv
    if words is None:
        words = sys.argv[1:]
    try:
        args = _parse(list(words))
        status = int(args.function(args))
        if args.function is not _cmd_run:  # whose stdout is the command's
            print(end="", flush=True)
        return status
    except BrokenPipeError:  # `| head`: what is still buffered goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0
    except KeyboardInterrupt:
        if argv is None:  # a shell only ends its loop if we end as a Ctrl-C does it
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            signal.raise_signal(signal.SIGINT)
        return 130
    except (ValueError, OSError, _Unknown) as error:
        _say(f"{_prog()}: {error}")
        return 2


def _prog() -> str:
    """Return what was typed to come here: "python3 -m pkg.run_utils"."""
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    if spec is None:
        words: list[str] = getattr(sys, "argv", None) or ["run_utils"]
        return basename(words[0])
    module = str(spec.name).removesuffix(".__main__")
    return f"{basename(sys.executable)} -m {module}"


def _parse(words: list[str]) -> Namespace:
    """Return the arguments of the command that `words` name, with its `function`."""
    import argparse

    for name, about, function, arguments in _COMMANDS:
        if words[:1] == [name]:
            # Without a width each argument would import shutil, for 5 ms.
            width = _terminal_width() or 80
            parser = argparse.ArgumentParser(
                prog=f"{_prog()} {name}", description=about, allow_abbrev=False,
                formatter_class=functools.partial(argparse.HelpFormatter, width=width),
            )
            for usage, text in arguments:
                _add_argument(parser, usage, text)
            parser.set_defaults(function=function)
            if name == "note":  # tags may stand between the runs and the text
                return parser.parse_intermixed_args(words[1:])
            return parser.parse_args(words[1:])
    parser = argparse.ArgumentParser(prog=_prog(), description="Record experiments.")
    version = f"run_utils {__version__}"
    parser.add_argument("--version", action="version", version=version)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, about, _, _ in _COMMANDS:
        commands.add_parser(name, help=about)
    return parser.parse_args(words)


def _add_argument(parser: ArgumentParser, usage: str, text: str) -> None:
    """Add an argument that is written as in a usage line.

    RUN, [ROOT] and WORDS... are taken by their place, "-- CMD" is all that is left.
    --flag takes no value, --into DIR one, --tag TAG... one each time, N is a whole
    number, FILE=a.html has a default. Of --json | --csv only one can be given.
    """
    *names, value = usage.split()
    if "|" in names:
        formats = parser.add_mutually_exclusive_group()
        for name in usage.split(" | "):
            formats.add_argument(
                name, dest="format", action="store_const", const=name[2:],
                help=f"as {name[2:]}",
            )
        return
    if value.startswith("-"):
        parser.add_argument(*names, value, action="store_true", help=text)
        return
    metavar, _, default = value.partition("=")
    how: Facts = {"help": text, "metavar": metavar.strip("[.]")}
    if names == ["--"]:
        names, how["nargs"] = ["words"], "..."
    elif not names:
        names = [how["metavar"].lower()]
        if metavar.startswith("["):
            how["nargs"] = "?"
        elif metavar.endswith("..."):
            how["nargs"] = "+"
    elif metavar.endswith("..."):
        how.update(action="append", default=[])
    elif default:
        how.update(default=default, help=f"{text} (default: {default})")
    if metavar == "N":
        how["type"] = int
    parser.add_argument(*names, **how)


def _print_json(value: object) -> None:
    print(_format_json(value), end="")


def _cmd_inspect(args: Namespace) -> int:
    run_dir = _find_run(args.run)
    if args.json:
        _print_json(_inspected(Run(run_dir)))
    elif args.follow:
        _follow(run_dir)
    else:
        _print_paragraphs(_run_paragraphs(Run(run_dir)))
    return 0


def _follow(run_dir: Path) -> None:
    shown: list[str] = []
    while True:
        begun = monotonic()
        run = Run(run_dir)
        paragraphs = [*_live_paragraphs(run), ("output", _last_output(run.path)[-8:])]
        lines = list(_paragraph_lines(paragraphs))
        if sys.stdout.isatty():
            shown = []
            print("\x1b[H\x1b[2J", end="")  # to the top left, and clear
        for line in lines:
            if line[10:] not in shown:
                print(line, flush=True)
        if run["status"] != "running":
            return
        shown = [line[10:] for line in lines]
        took = monotonic() - begun
        time.sleep(max(FOLLOW_SECONDS, 5 * took))


def _selected(args: Namespace, over: str | None = None) -> _Selection:
    """Return the runs that the filters ask for; say which keys no run has."""
    conditions = args.where
    if len(conditions) > 1:
        conditions = [f"({text})" for text in conditions]
    args.where = None
    if conditions:
        args.where = " and ".join(conditions)
    selection = _Selection(_search_root(args.root), _Filters(vars(args)), over)
    for warning in selection.warnings:
        _say(_redactor.text(warning))
    return selection


def _cmd_list(args: Namespace) -> int:
    if args.limit is None and args.format is None:
        args.limit = MAX_ROWS
    selection = _selected(args, args.over)
    asked = selection.asked
    rows = [_group_row(group, asked) for group in selection.groups]
    if args.over is None and args.format in ("json", "csv"):
        rows = [_run_row(run, selection) for run in selection.runs]
    if args.format == "commands":
        for run in selection.runs:
            print(_command_of(run, _word(run.metadata, "working_dir")))
    elif args.format == "json":
        _print_json(rows)
    elif args.format == "csv":
        _print_csv(rows)
    elif args.over is not None:
        _print_columns(_group_columns(rows, selection.differing, asked), args.format)
    else:
        _print_runs(selection, args)
    if args.format is None:
        _say_what_is_unseen(selection, args)
    return 0


def _print_runs(selection: _Selection, args: Namespace) -> None:
    groups = {"": selection.runs}
    if args.by_script:
        groups = {}
        for run in selection.runs:
            groups.setdefault(run["script_name"], []).append(run)
    for script, runs in sorted(groups.items()):
        if script:
            _print(f"{script}: {_format_count(len(runs), 'run')}")
        columns = _run_columns(
            runs, selection.root, selection.differing, selection.asked,
            whole=args.format == "md",
        )
        _print_columns(columns, args.format)


def _say_what_is_unseen(selection: _Selection, args: Namespace) -> None:
    """Print what a table does not show: older runs, and files that are damaged."""
    if not selection.runs:
        _say(f"no such runs below {selection.root!r}")
    if selection.unseen and args.top is None:
        age, kind = "older", "run"
        if args.sort is not None:
            age = "more"
        if selection.groups:
            kind = "group"
        count = _format_count(selection.unseen, f"{age} {kind}", "not shown")
        print(f"{count}; -n 0 shows all")
    for line in _format_problems(selection.runs):
        _say(line)


def _cmd_diff(args: Namespace) -> int:
    then = Run(_find_run(args.run))
    now = None
    runs = [then]
    if args.other is not None:
        now = Run(_find_run(args.other))
        runs.append(now)
    found = _comparison(then, now)
    for line in _format_problems(runs):
        _say(line)
    if args.json:
        _print_json(found)
    else:
        _print_paragraphs(_diff_paragraphs(then, found))
    return int(bool(found))


def _cmd_lineage(args: Namespace) -> int:
    start = _find_run(args.run)
    lineage = _Lineage(_results_root(start.parent))
    used, users = (list(lineage.walk(start, way)) for way in (False, True))
    if args.format:
        related = {start, *(run for _, run, _ in used + users)}
        edges = [
            (*pair, _format_paths(paths))
            for pair, paths in lineage.edges.items()
            if related.issuperset(pair)
        ]
        for line in _format_graph(args.format, sorted(related), edges):
            print(line)
        return 0
    _print(_run_and_status(start))
    for title, way in (("used", used), ("used by", users)):
        for depth, run, path in way:
            _print(f"{title:<8}{'  ' * depth}{_run_and_status(run)}: {path}")
            title = ""
    return 0


def _run_and_status(run: Path) -> str:
    if not _is_run(run):
        return f"{run.name} (not there now)"
    return f"{run.name} ({Run(run, row=False).state})"


def _cmd_note(args: Namespace) -> int:
    """Append one line to the notes.jsonl of each run, and one to the index."""
    *words, text = args.words
    if not words:
        words, text = [text], ""
    runs = [_find_run(word) for word in words]
    if text and (args.tag or args.untag):
        with _ignoring(ValueError):  # with a tag all words may be runs
            runs.append(_find_run(text))
            text = ""
    if not (text or args.tag or args.untag):
        raise ValueError("nothing to note; give a text, or --tag canonical")
    for run_dir in runs:
        record = _Record.at(run_dir)
        record.append_note(text, args.tag, args.untag)
        with _tolerating("the index"):
            record.tell_index("note", text=text, tags=args.tag, untag=args.untag)
        _print(f"noted in {run_dir}")
    return 0


def _cmd_prune(args: Namespace) -> int:
    selection = _selected(args)
    rows: list[Facts] = [
        {
            "run_dir": run.folder,
            "status": run.state,
            "size": sum(_file_sizes(run.folder).values()),
            "refused": _why_it_stays(run),
        }
        for run in selection.runs
    ]
    if args.json:
        _print_json(rows)
    is_meant = args.yes or args.purge
    code = 0
    sizes = []
    for run, row in zip(selection.runs, rows):
        what = row["refused"]
        if what is None:
            what = "would go"
            sizes.append(row["size"])
            if is_meant:
                try:
                    place = _prune(selection.root, run, args.purge)
                except OSError as error:
                    _say(f"{run.name} stays: {error.strerror or error}")
                    code = 2
                    continue
                what = f"is now {place or 'deleted'}"
        if not args.json:
            name = relpath(run.path, selection.root)
            about = f"{run.state}, {_format_seconds(_age(run))} old"
            _print(f"{name} ({about}, {_format_size(row['size'])}): {what}")
    if sizes and not (is_meant or args.json):
        about = f"{_format_count(len(sizes), 'run')}, {_format_size(sum(sizes))}"
        print(f"{about}: --yes moves to {TRASH_FOLDER}, --purge deletes")
    if not args.json:
        _say_what_is_unseen(selection, args)
    return code


def _cmd_audit(args: Namespace) -> int:
    """Say where a secret is, and never which; return 1 when there is one."""
    root = _search_root(args.root)
    _redactor.learn(dict(os.environ))  # what is secret here and now is searched too
    audit = _Audit(root)
    audit.search(_with_progress([*_walk_runs(root), f"{root}/index"], "searching"))
    if args.json:
        about = {"files": audit.searched, "binary": audit.binary}
        _print_json({"found": audit.found, **about, "not_searched": audit.unread})
    else:
        for place in audit.found:
            where = f"line {place['line']}"
            if place["line"] is None:
                where = "in a binary file"
            _print(f"{place['file']}: {where}")
        for name, why in audit.unread.items():
            _print(f"{name}: not searched: {why}")
        places = _format_count(len(audit.found) or "no", "place", "with a secret")
        files = _format_count(audit.searched or "no", "file", "searched")
        print(f"{places}; {files}")
        if audit.found:
            print("revoke what is valid; then remove it, or the file, by hand")
    if audit.unread and not audit.found:
        return 2
    return int(bool(audit.found))


def _cmd_reindex(args: Namespace) -> int:
    root = Path(_search_root(args.root))
    size = 0
    with _ignoring(FileNotFoundError):
        size = os.path.getsize(root / INDEX_FILE)
    known = _read_lines(root / INDEX_FILE, tail=MAX_INDEX)
    before = {str(row.get("path")) for row in known}
    rows = _rebuilt_index(root)
    now = {row["path"] for row in rows}
    line = f"{_format_count(len(rows) or 'no', 'run')}: "
    line += f"{len(now - before)} added, {len(before - now)} removed"
    if args.dry_run:
        line += ", if it were done"
    else:
        _replace_index(root, size, rows)
    print(line)
    return 0


def _rebuilt_index(root: Path) -> list[Facts]:
    rows = []
    for path in _with_progress(_walk_runs(root)[::-1], "reading runs"):
        run = Run(path)
        row = _Record(run.path, 1, root).index_row()
        row.update(event="backfill", timestamp_utc=run.status.get("timestamp_utc"))
        row.update(pid=run.status.get("pid"), git_commit_short=run["git_commit"])
        for key in ("status", "exit_reason", "hostname", "user", "script_name"):
            row[key] = run[key]
        rows.append(row)
    return rows


def _replace_index(root: Path, size: int, rows: Iterable[Facts]) -> None:
    """Put rows in the place of the first `size` bytes; what runs append stays."""
    folder, name = os.path.split(INDEX_FILE)
    lines = [_redacted_json(row, indent=None) for row in rows]
    with _Folder(root).opened(folder, create=True) as place:
        with io.FileIO(place.open(name, os.O_RDWR | os.O_CREAT), "r+") as old:
            place.write(name, b"".join(lines))
            old.seek(size)
            late = old.readall()  # of runs that started or ended meanwhile
        with io.FileIO(place.open_for_lines(name), "a") as new:
            new.write(late)


def _cmd_env(args: Namespace) -> int:
    with _temporary_folder() as folder:
        facts = _read_json(capture_metadata(folder))
    if args.json:
        _print_json(facts)
    else:
        for line in _format_yaml(facts).splitlines():
            _print(line)
    return 0


_RUN = ("RUN", "a path, a file in a run or a copy of it, a part of a name, or latest")
_ROOT = ("[ROOT]", "a folder with runs (default: results, else the current folder)")
_JSON = ("--json", "for programs")
_FILTERS = [
    ("--where EXPR...", "'lr<1e-3 and max(acc)>0.9'"),
    ("--status WORD", "running, success, failed, lost, or a word of your own"),
    ("--since TIME", "started after 12h, 7d, 2026-01-31"),
    ("--older TIME", "started before"),
    ("--contains TEXT", "a part of the path"),
    ("--tag TAG", "one that is in force"),
    ("--has-outputs", "what left a file"),
    ("--sort KEY", "by a value; --sort=-KEY: the largest first"),
    ("--top N", "the first N that have this value"),
    ("-n --limit N", "at most N, 0 for all"),
]
_COMMANDS = [  # name, help, function, and arguments as a usage line writes them
    ("run", "record any command, in any language; exit with its status", _cmd_run, [
        ("--base-dir DIR=results/runs", "where the run is made"),
        ("--prefix NAME", "of the run; default: the script's name"),
        ("--config FILE", "JSON or YAML to keep as config"),
        ("--note TEXT", "what this run is about"),
        ("--tag TAG...", "such as canonical"),
        ("--timeout TIME", "stop it after 90s, 30m, 2h"),
        ("-- CMD", "the command"),
    ]),
    ("inspect", "show one run on one screen", _cmd_inspect, [
        _RUN, ("--follow", "go on while it runs"), _JSON,
    ]),
    ("list", "list runs, newest first", _cmd_list, [
        _ROOT, *_FILTERS,
        ("--show KEY...", "a value to show, or several: lr,max(acc)"),
        ("--over KEY", "fold runs that differ only in this (seed): mean and spread"),
        ("--by-script", "a table for each script"),
        ("--json | --csv | --md | --commands", ""),
    ]),
    ("diff", "show what differs between two runs, or one and now", _cmd_diff, [
        _RUN, ("[OTHER]", "another run; default: here and now"), _JSON,
    ]),
    ("lineage", "show which runs a run used, and which used it", _cmd_lineage, [
        _RUN, ("--dot | --mermaid | --json", ""),
    ]),
    ("note", "append a note or tags to runs", _cmd_note, [
        ("WORDS...", "runs, and at last the text"),
        ("--tag TAG...", "such as canonical or superseded"),
        ("--untag TAG...", "one to take away"),
    ]),
    ("reproduce", "build the tree a run ran in; say how to run it", _cmd_reproduce, [
        _RUN,
        ("--into DIR", "a new folder for the tree"),
        ("--exec", "run it, and compare"),
        ("--venv", "install the packages into the new tree"),
        ("--set SETTING...", "key=value: change or supply a word of the command"),
        ("--tolerance X", "of metrics, relative"),
        _JSON,
    ]),
    ("verify", "check that a run can be done again; read-only", _cmd_verify, [
        _RUN, _JSON,
    ]),
    ("report", "write one HTML page about runs", _cmd_report, [
        _ROOT, *_FILTERS,
        ("-o --output FILE=report.html", "where to write it"),
        ("--metric KEY", "which run is best: 'max(acc)', 'min(loss)'"),
        ("--over KEY=seed", "draw runs that differ only in this as one band"),
        ("--embed", "put the images into the page"),
    ]),
    ("prune", "say which runs would go, or let them go", _cmd_prune, [
        _ROOT, *_FILTERS,
        ("--yes", "move them to ROOT/.trash"), ("--purge", "delete them"), _JSON,
    ]),
    ("audit", "search runs for secrets; status 1: there are", _cmd_audit, [
        _ROOT, _JSON,
    ]),
    ("reindex", "rebuild the index from the directories", _cmd_reindex, [
        _ROOT, ("--dry-run", "only say what would change"),
    ]),
    ("env", "show what would be recorded here, for a bug report", _cmd_env, [_JSON]),
]

if __name__ == "__main__":
    raise SystemExit(main())
