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
        git.patch        the uncommitted code, when there was any
        git.bundle       the commits that no remote has, when there were any
        logs/            stdout.log, stderr.log, or output.log for both
        plots/ artifacts/ samples/ metrics/

`python -m run_utils run -- CMD ...` records a command in any language, and
`python -m run_utils inspect RUN` reads a record back.

Contents (search for the heading):

    Settings             everything you may want to change
    Recording a run      the public functions, in the order a run lives through
    Several processes    many ranks, one run
    Provenance           what git, pip and the machine say
    Lineage              which run fed which
    Redaction            no secret reaches the disk
    Config and YAML      any Python object to plain data, and that to text
    Output               stdout and stderr into logs/
    Recorder             the helper process: slow work, and a record of any death
    Index and notes      runs_index.jsonl, a cache of what the directories say
    Files                whole or absent, never half-written
    Reading runs         run directories back into Python
    Reading YAML         what PyYAML writes, without PyYAML
    Showing runs         tables, paragraphs, graphs
    Command line         run, inspect, list, diff, lineage, note, reindex, audit

The rules: recording never stops an experiment; a caller's mistake raises at once;
no file is ever half-written; no secret reaches the disk; the user's process is left
alone; a run directory is the truth and everything else a cache; no locks.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import re
import select
import shlex
import signal
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from pathlib import Path

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    import subprocess
    from types import TracebackType
    from typing import Any, Union

    StrPath = Union[str, os.PathLike[str]]
    _Blob = tuple[bytes, bytes]  # mode and id of a file in git, empty without one

__all__ = [
    "DEFAULT_SUBDIRS", "Run", "capture_metadata", "ensure_run_dir", "find_runs",
    "load_run", "log_metrics", "main", "mark_artifact_used", "mark_status",
    "run_context", "save_json", "start_run", "write_config_yaml",
]  # fmt: skip
__version__ = "1.0.0"
# vendor.sh writes here which version and git blob a copy is.
__vendored__ = None
SCHEMA_VERSION = 1  # of the files in a run directory; keys are added, never renamed

# === Settings ===
# Everything you may want to change. Times are in seconds, sizes in bytes.

DEFAULT_SUBDIRS = ["logs", "plots", "artifacts", "samples", "metrics"]
INDEX_FILE = os.path.join("index", "runs_index.jsonl")
FORWARDED_SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGQUIT)
HEARTBEAT_SECONDS = 10  # how often the recorder touches status.json
LOST_AFTER_SECONDS = 60  # a run of another host whose heartbeat is older is "lost"
RANK_WAIT_SECONDS = 120  # how long a rank waits for rank 0 to create the run
RANK_POLL_SECONDS = 0.02  # how often it looks meanwhile
EXIT_WAIT_SECONDS = 60  # how long leaving the block waits for the captures
HEAD_SECONDS = 2.0  # what the short hash may take, which entry waits for
PROGRAM_SECONDS = 10.0  # what git or nvidia-smi may take
PIP_SECONDS = 60.0  # what `pip freeze` may take, slow on network disks
PROGRAM_BYTES = 20_000_000  # a program that prints more is stopped
PATCH_SECONDS = 20.0  # what reading the files of one patch may take, and its diff
PATCH_FILE_BYTES = 5_000_000  # a changed file that is larger is listed, not kept
PATCH_BYTES = 20_000_000  # the same for all changed files of a patch together
PATCH_FILES = 2000  # and for their number
BUNDLE_BYTES = 20_000_000  # unpushed commits with more content are not kept
HASH_BYTES = 100_000_000  # a file left out of a patch is hashed up to this size
FORWARD_BYTES = 65_536  # how much output is forwarded at a time
LAST_OUTPUT_LINES = 20  # of the log, in the status.json of a killed run
MAX_SAME_NAME = 1000  # runs of one name: name, name-2, name-3, ...
MAX_PREFIX_BYTES = 180  # of the run's name, which must stay within 255
MAX_MESSAGE = 4096  # characters of an exception's message
MAX_TRACEBACK = 40_000  # characters
MAX_READ = 50_000_000  # a larger JSON file is not read
MAX_CONFIG = 1_000_000  # a larger YAML file is not read
MAX_INDEX = 400_000_000  # a larger index is not read
MAX_TAIL = 65_536  # of metrics.jsonl, for the last values
MAX_INPUTS = 1000  # words of config and argv that are looked at for files of other runs
MAX_LOCAL_PACKAGES = 20  # packages whose own repository is recorded
MAX_LISTED = 200  # changed files named in metadata.json
MAX_WALK = 6  # folders between a results root and a run
MAX_SHOWN = 40  # lines of config that inspect shows
MAX_ROWS = 50  # runs that list shows
MIN_SECRET = 8  # a shorter value is replaced under its own name only
MAX_REDACTED = 32_768  # characters of a text that are kept and searched
MAX_LEARNED = 200  # secrets of one file; what has more is a table, told to nobody else

LOCK_FILES = (  # of a project, whose sha256 metadata.json tells
    "uv.lock", "poetry.lock", "pdm.lock", "Pipfile.lock", "pixi.lock", "pylock.toml",
    "conda-lock.yml", "environment.yml", "environment.yaml", "requirements.txt",
)  # fmt: skip
SECRET_FILES = (  # hold secrets by nature: never in a patch or bundle
    rb"(?i)(^|/)(\.env(\.(?!example$|sample$|template$|dist$)[^/]+)?|[^/]+\.env"
    rb"|id_(rsa|dsa|ecdsa|ed25519)(_sk)?|credentials|kubeconfig"
    rb"|secrets?\.(json|ya?ml|toml|ini|env)"
    rb"|[._](netrc|npmrc|pypirc|pgpass|htpasswd|s3cfg|boto|git-credentials|dockercfg)"
    rb"|[^/]+\.(pem|key|p12|pfx|p8|jks|keystore|kdbx|ppk)|\.(ssh|aws|gnupg|kube)/.*"
    rb"|[^/]*(credential|client_secret|service[-_]account)[^/]*\.(json|ya?ml|ini))$"
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


# === Recording a run ===
# Once the run directory exists nothing here raises into the experiment: what cannot
# be recorded is left out, and one line on stderr says so.


def run_context(
    base_dir: StrPath, run_prefix: str | None = None, config_args: Any = None,
    config_filename: str = "config.yaml", create_subdirs: bool = True,
    subdirs: Sequence[str] | None = None, *, run_dir: StrPath | None = None,
    resume: StrPath | None = None, notes: str | None = None, tags: Sequence[str] = (),
    capture_output: bool = True, ranks: str = "together",
) -> _Recording:
    """Record what happens inside the ``with`` block, and how it ends.

    On entry ``<base_dir>/<run_prefix>-<YYYYMMDD-HHMMSS>-<git_hash>/`` is created and
    yielded as an absolute Path, holding config.yaml (`config_args`: a mapping, an
    argparse.Namespace, a dataclass, ...; read once, never changed), metadata.json and
    status.json ("running"). `run_prefix` defaults to the name of the script.
    Output goes to logs/ as well, unless `capture_output` is false. On exit
    status.json says how it ended and how long it took (in seconds); the exception, if
    any, goes on unchanged. `RUN_DIR` is set in the environment inside the block.

    `run_dir` uses exactly that directory; `resume` goes on in an earlier run (its
    path, its name under `base_dir`, "latest", or "auto": the run of this very job
    before it was requeued or restarted, else a new one): the record that is there
    moves to attempts/<n>/. `notes` and `tags` become a line of notes.jsonl.

    The processes of torchrun, srun or mpirun share one run: rank 0 records it, the
    others get the same Path and have logs/rank<k>.*; `ranks="separate"` gives each
    its own.

    Also a decorator, for functions, coroutines and generators: each call is a run.
    Raises TypeError, ValueError or OSError before anything is recorded.
    """
    if isinstance(tags, str):
        raise TypeError(f"tags must be a list of strings, not {tags!r}; use [{tags!r}]")
    if run_dir is not None and resume is not None:
        both = f"run_dir={str(run_dir)!r} and resume={str(resume)!r}"
        raise ValueError(f"{both} exclude each other; resume= names the directory")
    if ranks not in ("together", "separate"):
        raise ValueError(f"ranks is {ranks!r}; give 'together' or 'separate'")
    return _Recording(
        base_dir=_absolute(base_dir, "base_dir"), run_prefix=run_prefix,
        config_args=config_args, config_filename=_checked_filename(config_filename),
        subdirs=_checked_subdirs(create_subdirs, subdirs),
        run_dir=None if run_dir is None else _absolute(run_dir, "run_dir"),
        resume=resume, notes=notes, tags=list(tags), capture_output=capture_output,
        ranks=ranks,
    )


class _Recording:
    """One run, from entering the block to leaving it."""

    def __init__(self, *, argv: list[str] | None = None, **options: Any) -> None:
        self.options = options
        self.argv = argv  # the program that is recorded, when it is not this one
        self.run_dir: Path | None = None
        self.ending: dict[str, Any] | None = None  # told by `run`, else by __exit__
        self.outside: str | None = None  # RUN_DIR outside of all runs
        self.recorder: _Recorder | None = None
        self.seeds: dict[str, Any] = {}  # and flags, as they were on entry

    def __call__(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Make every call of `function` a run of its own."""
        import inspect

        def call(*args: Any, **kwargs: Any) -> Any:
            with _Recording(argv=self.argv, **self.options):
                return function(*args, **kwargs)

        async def wait(*args: Any, **kwargs: Any) -> Any:
            with _Recording(argv=self.argv, **self.options):
                return await function(*args, **kwargs)

        def iterate(*args: Any, **kwargs: Any) -> Iterator[Any]:
            with _Recording(argv=self.argv, **self.options):
                yield from function(*args, **kwargs)

        waits = inspect.iscoroutinefunction(function)
        iterates = inspect.isgeneratorfunction(function)
        wrapper = wait if waits else iterate if iterates else call
        return functools.wraps(function)(wrapper)

    def __enter__(self) -> Path:
        if self.run_dir is not None:
            used = f"this run_context already recorded {str(self.run_dir)!r}"
            raise RuntimeError(f"{used}; call run_context(...) again for another run")
        self.pid, self.thread = os.getpid(), threading.get_ident()
        self.begun = time.monotonic()
        config, argv = _plain(self.options["config_args"]), self.argv or _argv()
        for source in (dict(os.environ), {"argv": argv}, config):
            _redact(source)  # learns the secrets before anything is written
        directory = _code_directory(self.argv)
        self.launch = _Launch(os.environ, self.options)
        meeting, self.rank = None, self.launch.rank
        if self.rank:
            run_dir, self.attempt = self.launch.join()
        else:
            run_dir = _open_run(self.options, directory, self.launch)
            self.attempt = _attempt(run_dir)
            meeting = self.launch.publish(run_dir, self.attempt)
        self.run_dir, root = run_dir, _results_root(self.options["base_dir"])
        self.capture = _Capture(run_dir, f"rank{self.rank}." if self.rank else "")
        before = _set_active(self, inside=True)
        try:
            if not self.rank:
                self._record_start(run_dir, config, argv, directory)
            self.row = _index_row(run_dir, root)
            with _tolerating("the index"):
                if not self.rank:
                    _append_index(self.row, "start", "running")
            self._start_recorder(run_dir, directory, before, meeting)
        except BaseException as error:  # Ctrl-C while entering: say so, go on
            self.__exit__(type(error), error, error.__traceback__)
            raise
        return run_dir

    def _record_start(
        self, run_dir: Path, config: Any, argv: list[str], directory: str
    ) -> None:
        """Write what must be there at once; leave the rest to the recorder."""
        options = self.options
        document = _config_document(shlex.join(argv), config)
        with _tolerating("config.yaml"):
            _write_yaml(run_dir / options["config_filename"], document)
        with _tolerating("metadata.json"):
            metadata = _immediate_metadata(argv, directory, document)
            metadata["launcher"].update(self.launch.facts)
            metadata["inputs"] = _inputs(document, argv, run_dir)
            self.seeds = metadata["determinism"]
            _write_json(run_dir / "metadata.json", metadata)
            if self.attempt > 1:
                _record_changes(run_dir, self.attempt, "config")
            _warn_of_inputs(metadata["inputs"])
        if options["notes"] or options["tags"]:
            with _tolerating("notes.jsonl"):
                _append_note(run_dir, options["notes"] or "", options["tags"])

    def _start_recorder(
        self, run_dir: Path, directory: str, before: list[_Recording],
        meeting: _Meeting | None,
    ) -> None:
        captured = [run.thread for run in before if run.options["capture_output"]]
        if self.options["capture_output"] and {self.thread}.issuperset(captured):
            with _tolerating("logs/"):  # the streams belong to one thread at a time
                self.capture.open()
        request = _capture_request(run_dir, directory, self.row, self.argv, self.begun)
        request.update(rank=self.rank, attempt=self.attempt)
        request["meeting"] = meeting and meeting.__dict__
        self.recorder = _Recorder.start(request, self.capture.forwards)
        with _tolerating("output capture"):
            self.capture.start(self.recorder)
        if self.recorder is None and meeting is not None:
            threading.Thread(target=meeting.serve, daemon=True).start()
        if self.recorder is None and not self.rank:
            _complete_metadata(run_dir, request)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        run_dir = self.run_dir
        if run_dir is None or self.pid != os.getpid():
            return  # a forked child left the block: the run is its parent's to finish
        ending = self.ending or _ending(error)
        with _tolerating("output capture"):
            self.capture.stop()
        with _tolerating("determinism"):
            ending.update(_late_determinism(self.seeds))
        with _tolerating("status.json"):
            ending["duration_seconds"] = round(time.monotonic() - self.begun, 3)
            folder = _record_of(run_dir, self.attempt)
            if self.rank:
                _record_rank(folder, self.rank, ending, self.row)
            else:
                ending = _finish_status(folder, ending)
        with _tolerating("the index"):
            if not self.rank:
                end = _name_failed_rank(folder) or ending
                _append_index(self.row, "end", end["status"], end["exit_reason"])
        with _tolerating("the recorder"):
            if self.recorder is not None and not self.recorder.finish():
                _warn("the recorder is gone; finishing its work here")
                for forward in self.capture.forwards:
                    forward.drain()
                if not self.rank:
                    _complete_metadata(run_dir, self.recorder.request)
        with _tolerating("metadata.json"):
            if self.attempt > 1 and not self.rank:
                _warn_of_changes(folder, "code", "packages")
        with _tolerating("logs/"):
            self.capture.close(_last_words(error, ending))
        _close_metrics(run_dir)
        _set_active(self, inside=False)


def start_run(
    base_dir: StrPath, run_prefix: str | None = None, include_git_hash: bool = True,
    create_subdirs: bool = True, subdirs: Sequence[str] | None = None,
) -> Path:
    """Create a run directory with status.json ("running") and return its Path.

    For scripts that cannot use `run_context`: call `write_config_yaml`,
    `capture_metadata` and at the end `mark_status` yourself. Raises as it does.
    """
    options: dict[str, Any] = {"run_prefix": run_prefix}
    options["base_dir"] = _absolute(base_dir, "base_dir")
    options["subdirs"] = _checked_subdirs(create_subdirs, subdirs)
    options["include_git_hash"] = include_git_hash
    run_dir = _open_run(options, _code_directory())
    with _tolerating("the index"):
        _append_index(_index_row(run_dir), "start", "running")
    return run_dir


def ensure_run_dir(
    run_dir: StrPath, create_subdirs: bool = True, subdirs: Sequence[str] | None = None
) -> Path:
    """Create `run_dir` and its folders where they are missing; return it as a Path."""
    path = Path(run_dir)
    for folder in [".", *_checked_subdirs(create_subdirs, subdirs)]:
        (path / folder).mkdir(parents=True, exist_ok=True)
    return path


def write_config_yaml(
    run_dir: StrPath, command: str, args: Any, filename: str = "config.yaml"
) -> Path:
    """Write `args` and `command` to a YAML file in `run_dir`; return its Path.

    A mapping (or argparse.Namespace, dataclass, ...) keeps its keys and order and gets
    `command` added. When it has another `command` already, or is not a mapping, the
    file is ``{command: ..., args: ...}``. Secrets are replaced by ``<REDACTED>``.
    """
    path = Path(run_dir) / _checked_filename(filename)
    with _tolerating(filename):
        _write_yaml(path, _config_document(command, _plain(args)))
    return path


def capture_metadata(
    run_dir: StrPath, extra: Mapping[str, Any] | None = None,
    filename: str = "metadata.json",
) -> Path:
    """Write everything that is known of code and machine; return the file's Path.

    Synchronous and complete: git, packages and CUDA are asked before it returns (a
    second or so). `extra` is added at the top level, where it wins. Inside a
    `run_context` the record that the recorder completes is the base.
    """
    path = Path(run_dir) / _checked_filename(filename)
    recording, folder = _active_for(path.parent), path.parent.absolute()
    source = path if recording is None else path.parent / "metadata.json"
    with _tolerating(filename):
        if recording is None:
            directory = _code_directory()
            facts = _immediate_metadata(_argv(), directory, None)
            facts["inputs"] = _inputs(Run(folder).config, facts["argv"], folder)
            _write_json(path, facts)
            if facts["inputs"]:
                _append_index(_index_row(folder), "artifact_used", None)
            request = _capture_request(folder, directory, _index_row(folder))
            _complete_metadata(folder, request, filename)
        elif recording.recorder is not None:
            recording.recorder.ask("wait", "captured")
        _write_json(path, {**(_read_json(source) or {}), **(_plain(extra) or {})})
    return path


def mark_status(
    run_dir: StrPath, status: str, exit_reason: str | None = None,
    extra: Mapping[str, Any] | None = None,
) -> Path:
    """Write `status` to status.json, and an "end" line to the index; return its Path.

    `status` is "success", "failed", or your own word. In the body of `run_context` it
    takes the place of "success" if the block then ends normally.
    """
    path = Path(run_dir) / "status.json"
    facts: dict[str, Any] = {**(_read_json(path) or {}), "status": status}
    facts.update({"exit_reason": exit_reason, "timestamp_utc": _utc()})
    with _tolerating("status.json"):
        _write_json(path, {**facts, **(_plain(extra) or {})}, durable=True)
    if status != "running" and _active_for(path.parent) is None:
        with _tolerating("the index"):
            row = _index_row(path.parent.absolute())
            _append_index(row, "end", status, exit_reason)
    return path


def mark_artifact_used(
    artifact_path: StrPath, consumer_run_dir: StrPath | None = None,
    reason: str | None = None,
) -> None:
    """Record that a file of an earlier run is used by this one; never fail.

    Adds an entry to `inputs` of the consumer's metadata.json (default: the run of
    ``RUN_DIR``), a line to the producer's artifacts/USED_BY.jsonl where that can be
    written, and an "artifact_used" line to the index.
    """
    with _tolerating(f"the use of {str(artifact_path)!r}"):
        consumer = consumer_run_dir or os.environ.get("RUN_DIR")
        consumer = None if consumer is None else os.fspath(consumer)
        _record_use(Path(artifact_path), consumer, reason)


def save_json(path: StrPath, obj: Any) -> Path:
    """Write any Python object to `path` as strict JSON, whole or not at all.

    Converted like a config: numpy and torch scalars are numbers, large arrays become
    a summary, NaN and infinities the strings "NaN", "Infinity" and "-Infinity".
    Not redacted: the data is yours. Raises OSError where it cannot be written.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    _write_file(target, _format_json(_plain(obj, whole=True)).encode())
    return target


def log_metrics(
    run_dir: StrPath, values: Mapping[str, Any], step: int | None = None
) -> None:
    """Append one line to metrics/metrics.jsonl, visible at once to other processes.

    The line is ``{"step": step, "time": seconds since 1970, **values}``, written by a
    single write(2); it survives any later death of this process. Numbers stay
    numbers (numpy and torch scalars too); NaN becomes the string "NaN".
    """
    row = {"step": step, "time": time.time(), **values}
    try:
        if not _NUMBERS.issuperset(map(type, values.values())):
            raise ValueError("convert and redact first")
        text = "".join(_encode_flat(row, 0)) + "\n"
    except (ValueError, TypeError):  # NaN, numpy scalars, strings, nested values
        text = _format_json(_redact(_plain(row)), indent=None)
    line = text.encode("ascii")
    try:
        descriptor, inode = _metrics_files.get(run_dir) or _open_metrics(run_dir)
        if os.fstat(descriptor).st_ino != inode:  # closed and reused by the program
            descriptor, inode = _open_metrics(run_dir)
        if os.write(descriptor, line) != len(line):
            _close_metrics(run_dir)  # the next row ends the torn line
            raise OSError("no space left for a whole line")
    except OSError as error:
        _metrics_files.pop(run_dir, None)
        _warn(f"metrics.jsonl: {error}", once=True)


_NUMBERS = frozenset((int, float, bool))
_encode_flat: Any = json.JSONEncoder(allow_nan=False).iterencode
_inner_json: Any = json.encoder  # of CPython: an encoder made once takes half the time
with contextlib.suppress(AttributeError, TypeError):
    _encode_flat = _inner_json.c_make_encoder(
        None, None, json.encoder.encode_basestring_ascii, None, ": ", ", ", 0, 0, 0
    )
_metrics_files: dict[StrPath, tuple[int, int]] = {}  # descriptor and inode of a run


def _open_metrics(run_dir: StrPath) -> tuple[int, int]:
    """Open metrics.jsonl; the descriptor stays open until the run ends."""
    path = Path(run_dir) / "metrics" / "metrics.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = _open_for_lines(path)
    _metrics_files[run_dir] = descriptor, os.fstat(descriptor).st_ino
    return _metrics_files[run_dir]


def _close_metrics(run_dir: StrPath) -> None:
    for key in [key for key in _metrics_files if os.fspath(key) == os.fspath(run_dir)]:
        descriptor, inode = _metrics_files.pop(key)
        with contextlib.suppress(OSError):
            if os.fstat(descriptor).st_ino == inode:
                os.close(descriptor)


# What run_context and start_run stand on, in the order they need it.


def _ending(error: BaseException | None) -> dict[str, Any]:
    """Return how a block ended as the keys of status.json."""
    if error is None:
        return _outcome("success", "normal", 0)
    if not isinstance(error, SystemExit):
        code = 130 if isinstance(error, KeyboardInterrupt) else 1
        return _outcome("failed", "exception", code, _exception(error))
    if error.code is None or error.code == 0:
        return _outcome("success", "system_exit", 0)
    code = int(error.code) if isinstance(error.code, int) else 1
    return _outcome("failed", "system_exit", code, _exception(error))


def _outcome(
    status: str, why: str | None, code: int | None, exception: Any = None, **more: Any
) -> dict[str, Any]:
    ended = None if status == "running" else round(time.time(), 3)
    facts = {"status": status, "exit_reason": why, "exit_code": code}
    return {**facts, "exception": exception, "ended": ended, **more}


def _exception(error: BaseException) -> dict[str, Any]:
    """Return type, message and traceback of an exception, shortened."""
    kind = type(error)
    module = "" if kind.__module__ in ("builtins", "__main__") else kind.__module__
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
        "type": f"{module}.{kind.__qualname__}".lstrip("."),
        "message": _cut_middle(message, MAX_MESSAGE),
        "traceback": _cut_middle(trace, MAX_TRACEBACK),
    }


def _last_words(error: BaseException | None, ending: Mapping[str, Any]) -> str:
    """Return what Python will print of `error` after the block, for the log."""
    if isinstance(error, SystemExit) and isinstance(error.code, int):
        return ""
    shown = "message" if isinstance(error, SystemExit) else "traceback"
    return str((ending.get("exception") or {}).get(shown, ""))


def _finish_status(run_dir: Path, ending: dict[str, Any]) -> dict[str, Any]:
    """Complete status.json; keep the word that the body itself has put there."""
    now = _read_json(run_dir / "status.json") or {}
    own_word = now.get("status") not in (None, "running")
    if own_word and ending["exit_reason"] == "normal":
        kept = now.get("exit_reason") or "normal"
        ending = {**ending, "status": now["status"], "exit_reason": kept}
    facts = {**now, **ending, "timestamp_utc": _utc()}
    _write_json(run_dir / "status.json", facts, durable=True)
    return ending


_active: list[_Recording] = []  # the runs this process is in, innermost last
_active_lock = threading.Lock()


def _set_active(recording: _Recording, inside: bool) -> list[_Recording]:
    """Enter or leave a run; return the runs entered before and not left.

    RUN_DIR names the innermost run, or what it was before the first.
    """
    locked = _active_lock.acquire(timeout=1.0)  # a fork may have copied it locked
    before = [run for run in _active if run is not recording]
    if inside:
        outside = os.environ.get("RUN_DIR")
        recording.outside = before[-1].outside if before else outside
    _active[:] = [*before, recording] if inside else before
    current = str(_active[-1].run_dir) if _active else recording.outside
    if current is not None:
        os.environ["RUN_DIR"] = current
    else:
        os.environ.pop("RUN_DIR", None)
    if locked:
        _active_lock.release()
    return before


def _active_for(run_dir: Path) -> _Recording | None:
    """Return the recording that this very process makes in `run_dir`, if any."""
    run_dir = run_dir.absolute()
    mine = (run for run in _active if run.pid == os.getpid())
    return next((run for run in mine if run.run_dir == run_dir), None)


def _open_run(
    options: Mapping[str, Any], directory: str, launch: _Launch | None = None
) -> Path:
    """Create or reopen the run's directory, with status.json saying "running".

    The only part that may raise. A step that fails is tried once more, so that a
    hiccup of a network disk does not cost the run; a disk that is really full does.
    """
    base_dir: Path = options["base_dir"]
    chosen: Path | None = options.get("run_dir")
    if options.get("resume") == "auto":
        chosen = launch.earlier_attempt() if launch else None
    elif options.get("resume") is not None:
        chosen = _resumable(base_dir, options["resume"])
    run_dir, prefix = chosen or base_dir, options["run_prefix"]
    prefix = _safe_name(_script_name() if prefix is None else str(prefix))
    with_hash = chosen is None and options.get("include_git_hash", True)
    commit = _git_head(directory) if with_hash else None
    name = "-".join(filter(None, [prefix, time.strftime("%Y%m%d-%H%M%S"), commit]))
    try:
        _twice(run_dir.mkdir, parents=True, exist_ok=True)
        if chosen is None:
            run_dir = _make_run_dir(base_dir, name)
        else:
            _results_root(base_dir).mkdir(parents=True, exist_ok=True)
            _archive_attempt(run_dir)
        _twice(ensure_run_dir, run_dir, subdirs=options["subdirs"])
        running = {**_running_status(options), "attempt": _attempt(run_dir)}
        running["run"] = run_dir.name
        _twice(_write_json, run_dir / "status.json", running)
    except OSError as error:
        if run_dir not in (base_dir, chosen):
            for folder in [*map(run_dir.joinpath, options["subdirs"]), run_dir]:
                with contextlib.suppress(OSError):  # not empty: something was written
                    folder.rmdir()
        raise _unwritable(run_dir, error) from None
    return run_dir


def _make_run_dir(base_dir: Path, name: str) -> Path:
    """Create `base_dir/name`, or the first free of name-2, name-3, ..., exclusively."""
    for number in range(1, MAX_SAME_NAME + 1):
        path = base_dir / (name if number == 1 else f"{name}-{number}")
        with contextlib.suppress(FileExistsError):
            _twice(path.mkdir)
            return path
    raise FileExistsError(f"{name!r} and {MAX_SAME_NAME - 1} numbered names are taken")


def _twice(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call `function`; once more if the file system failed for a moment."""
    try:
        return function(*args, **kwargs)
    except (FileExistsError, PermissionError, NotADirectoryError):
        raise
    except OSError:
        return function(*args, **kwargs)


def _safe_name(text: str) -> str:
    """Replace what a file name cannot hold everywhere by ``_``.

    >>> _safe_name("Qwen/Qwen3-8B"), _safe_name("../../etc")
    ('Qwen_Qwen3-8B', '_.._etc')
    """
    import unicodedata

    encoding = sys.getfilesystemencoding()  # ASCII, where LC_ALL=C is taken literally
    text = unicodedata.normalize("NFC", text)
    text = text.encode(encoding, "replace").decode(encoding)
    text = "".join(c if c.isalnum() or c in "._+=@-" else "_" for c in text)
    name = text.encode("utf-8", "replace")[:MAX_PREFIX_BYTES].decode("utf-8", "ignore")
    name = name.lstrip(".-").rstrip(".")
    if re.fullmatch(r"(?i)(con|prn|aux|nul|com\d|lpt\d)(\..*)?", name):
        name = "_" + name  # names that Windows keeps for devices
    return name or "run"


def _script_name() -> str:
    """Return the stem of the script: "train" of train.py, "mod" of -m pkg.mod."""
    script = Path((getattr(sys, "argv", None) or [""])[0])
    if "ipykernel" in sys.modules or script.name in ("", "-", "-c"):
        return "notebook" if "ipykernel" in sys.modules else "interactive"
    return script.parent.name if script.stem == "__main__" else script.stem


def _resumable(base_dir: Path, resume: StrPath) -> Path:
    """Return the directory that `resume` names; refuse one that is still alive."""
    candidates = [Path(resume), base_dir / resume]
    if str(resume) == "latest":
        candidates = sorted(base_dir.glob("*"), key=_started, reverse=True)
    found = next(filter(_is_run, candidates), None)
    if found is None:
        raise ValueError(f"no run {str(resume)!r} under {str(base_dir)!r} to resume")
    if _status_now(found).get("status") == "running":
        raise ValueError(f"run {str(found)!r} is still running; it cannot be resumed")
    return found.absolute()


def _archive_attempt(run_dir: Path) -> None:
    """Move the record that is in `run_dir` to attempts/<n>/, if there is one."""
    names = ("config.yaml", "metadata.json", "status.json", "git*.patch", "git*.bundle")
    record = [Path(p.name) for name in names for p in sorted(run_dir.glob(name))]
    if record:
        archive = run_dir / "attempts" / str(_attempt(run_dir))
        (archive / "logs").mkdir(parents=True)
        ranks = run_dir.glob("logs/rank*.status.json")
        for path in [*record, *(rank.relative_to(run_dir) for rank in ranks)]:
            os.replace(run_dir / path, archive / path)
        with contextlib.suppress(OSError):  # no other rank failed
            (archive / "logs").rmdir()


def _attempt(run_dir: Path) -> int:
    """Return the number of the attempt whose record lies in the run itself."""
    numbers = [int(p.name) for p in run_dir.glob("attempts/*") if p.name.isdigit()]
    return max(numbers, default=0) + 1


def _record_of(run_dir: Path, attempt: int) -> Path:
    """Return where the record of an attempt is: a later one may have moved it."""
    archive = run_dir / "attempts" / str(attempt)
    return archive if archive.is_dir() else run_dir


def _record_changes(run_dir: Path, attempt: int, *warn_of: str) -> None:
    """Add to metadata.json what changed since the last attempt."""
    before = _read_json(run_dir / "attempts" / str(attempt - 1) / "metadata.json")
    folder = _record_of(run_dir, attempt)
    metadata = _read_json(folder / "metadata.json")
    if before is None or metadata is None:
        return
    then, now = _comparable(before), _comparable(metadata)
    changes: dict[str, Any] = {"attempt": attempt - 1}
    for kind in ("config", "code", "packages"):
        known = then[kind] and now[kind]  # code and packages are found out later
        pairs = _differences({kind: then[kind]}, {kind: now[kind]}) if known else {}
        changes[kind] = pairs.get(kind, {})
    _write_json(folder / "metadata.json", {**metadata, "changes": changes})
    _warn_of_changes(folder, *warn_of)


def _warn_of_changes(folder: Path, *kinds: str) -> None:
    changes = _mapping(_read_json(folder / "metadata.json"), "changes")
    names = {kind: ", ".join(changes.get(kind) or ()) for kind in kinds}
    text = "; ".join(f"{kind} ({names[kind]})" for kind in kinds if names[kind])
    if text:
        _warn(f"changed since attempt {changes['attempt']}: {text}")


def _running_status(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return status.json as it is until the run ends."""
    now = _utc()
    return {
        **_outcome("running", None, None),
        "timestamp_utc": now,
        "started_utc": now,
        "duration_seconds": None,
        "pid": os.getpid(),
        "hostname": _hostname(),
        "process": _process_identity(os.getpid()),
        "heartbeat_seconds": HEARTBEAT_SECONDS if "notes" in options else None,
    }


def _absolute(path: StrPath, name: str) -> Path:
    """Return `path` made absolute now, so that a later chdir does not move it."""
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"{name} must be a path, not {path!r}")
    text = os.fspath(path)
    if not text or "\0" in text:
        raise ValueError(f"{name} is {text!r}; give a directory such as 'results/exp'")
    try:
        return Path(os.path.abspath(text))
    except FileNotFoundError:
        gone = f"{name} {text!r} is relative, but the working directory is gone"
        raise FileNotFoundError(f"{gone}; give an absolute path") from None


def _checked_subdirs(create: bool, subdirs: Sequence[str] | None) -> list[str]:
    """Return the folders to create; refuse one that leads out of the run."""
    if isinstance(subdirs, str):
        raise TypeError(f"subdirs must be a list of names, not {subdirs!r}")
    names = list(DEFAULT_SUBDIRS if subdirs is None else subdirs) if create else []
    for name in names:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"subdirs has {name!r}; give names inside the run")
    return names


def _checked_filename(name: str) -> str:
    """Refuse a file name that would leave the run directory."""
    if name in ("", ".", "..") or os.path.basename(name) != name:
        raise ValueError(f"file name {name!r} has a folder in it; give a bare name")
    return name


def _unwritable(path: Path, error: OSError) -> OSError:
    """Return `error` as one sentence that names the directory and what to do."""
    start = f"cannot create a run in {str(path)!r}"
    blocking = next((p for p in [path, *path.parents] if p.exists()), path)
    if blocking.is_file():
        why = f"{str(blocking)!r} is a file; choose another base_dir"
        return NotADirectoryError(f"{start}: {why}")
    why = f"{error.strerror or error}; choose a base_dir that is writable and has space"
    return type(error)(f"{start}: {why}")


def _argv() -> list[str]:
    """Return the command line as it was typed: interpreter, flags, `-m pkg.mod`.

    Python 3.9 has no sys.orig_argv; there it is the interpreter and sys.argv.
    """
    typed = getattr(sys, "orig_argv", None) or ["python", *getattr(sys, "argv", [])]
    return [sys.executable or typed[0], *typed[1:]]


def _code_directory(argv: Sequence[str] | None = None) -> str:
    """Return the directory of the code that runs: that of the script, else the cwd."""
    words = getattr(sys, "argv", [])[:1] if argv is None else argv[1:]
    script = next(filter(os.path.isfile, words), "")
    return os.path.dirname(os.path.join(_working_dir() or "/", script))


def _working_dir() -> str | None:
    try:
        return os.getcwd()
    except OSError:  # it was removed
        return None


def _immediate_metadata(
    argv: list[str], directory: str, document: dict[str, Any] | None
) -> dict[str, Any]:
    """Return metadata.json with everything that takes no time; the rest is null."""
    versions = {"version": __version__, "vendored": __vendored__}
    metadata: dict[str, Any] = {
        "timestamp_utc": _utc(),
        "command": shlex.join(argv),
        "argv": argv,
        "working_dir": _working_dir(),
        "hostname": _hostname(),
        "user": _user(),
        "python": {},
        "platform": {},
        "git": {"commit_short": None, "directory": directory},
        "cuda": _loaded_cuda(),
        "pip_freeze": None,
        "local_packages": None,
        "environment": None,
        "container": None,
        "determinism": {},
        "env": dict(os.environ),
        "inputs": [],
        "launcher": {},
        "run_utils": {**versions, "schema_version": SCHEMA_VERSION},
        "config": document,  # for readers without PyYAML
        "capture": {},
    }
    quick: dict[str, Callable[[], tuple[Any, str | None]]] = {
        "python": lambda: (_python(), None),
        "platform": lambda: (_platform(), None),
        "launcher": lambda: (_launcher(os.environ), None),
        "determinism": lambda: (_determinism(), None),
    }
    for name, collect in quick.items():
        _add_facts(metadata, name, *_ask(collect))
    return metadata


def _capture_request(
    run_dir: Path, directory: str, row: dict[str, Any],
    argv: Sequence[str] | None = None, begun: float | None = None,
) -> dict[str, Any]:
    """Return what the recorder cannot find out by itself."""
    here = _working_dir() or "/"
    python = None if argv is None and _no_interpreter() else (argv or [sys.executable])
    is_python = python and _PYTHON.match(os.path.basename(python[0]))
    return {
        "run_dir": str(run_dir),
        "directory": directory,
        "row": row,
        "executable": python[0] if python and is_python else None,
        "sys_path": [] if argv else [os.path.join(here, place) for place in sys.path],
        "prefix": sys.prefix,
        "entered": _entered_at(run_dir, begun),
        "pid": os.getpid(),
        "process": _process_identity(os.getpid()),
        "begun": time.monotonic() if begun is None else begun,
        "secrets": sorted(_known_secrets),
    }


def _entered_at(run_dir: Path, begun: float | None) -> list[int] | None:
    """Return the moment of entry: ns of our clock, and device and ns of the disk's."""
    if begun is None:
        return None
    info = os.stat(run_dir / "status.json")  # the server of a network disk has a clock
    ago = int((time.monotonic() - begun) * 1e9)
    return [time.time_ns() - ago, info.st_dev, info.st_mtime_ns]


_PYTHON = re.compile(r"(python|pypy)[\d.]*(\.exe)?$", re.I)


def _no_interpreter() -> str | None:
    """Return why sys.executable is not the Python that runs this, or None."""
    if getattr(sys, "frozen", False):
        return "a frozen program"
    found = _PYTHON.match(os.path.basename(sys.executable or ""))
    return None if found else f"sys.executable is {sys.executable!r}, not a Python"


def _complete_metadata(
    run_dir: Path, request: Mapping[str, Any], filename: str = "metadata.json"
) -> None:
    """Ask what is slow to answer, and add each answer to metadata.json."""
    attempt, places = request.get("attempt", 0), request["sys_path"]
    directory, known = request["directory"], len(_known_secrets)
    excluded = [request["row"]["results_root"], str(run_dir)]
    tree = functools.lru_cache(lambda: _GitTree(
        directory, excluded, _entry_moment(request["entered"], directory)
    ))  # fmt: skip
    keep = functools.partial(_record_of, run_dir, attempt)
    collectors: dict[str, Callable[[], tuple[Any, str | None]]] = {
        "git": lambda: _git(tree()),
        "git.patch": lambda: _git_patch(tree(), keep() / "git.patch"),
        "git.bundle": lambda: _git_bundle(tree(), keep() / "git.bundle"),
        "cuda": _cuda,
        "container": _container,
        "environment": lambda: _environment(tree().root, request["prefix"]),
        "pip_freeze": lambda: _packages(request["executable"], places),
        "local_packages": lambda: _local_packages(request, tree(), keep()),
    }
    for name, collect in collectors.items():
        facts, report = _ask(collect)
        with _tolerating(filename):
            metadata = _read_json(keep() / filename) or {}
            _add_facts(metadata, name, facts, report)
            _write_json(keep() / filename, metadata)
    if attempt > 1:
        with _tolerating(filename):
            _record_changes(run_dir, attempt)
    if len(_known_secrets) > known:  # in a file of the patch, in the URL of a package
        _redact_again(keep(), filename, "config.yaml", "notes.jsonl")


def _entry_moment(entered: Sequence[int] | None, directory: str) -> int | None:
    """Return the moment of entry by the clock of the disk that holds the code."""
    if entered is None:
        return None
    ours, device, disks = entered
    return disks if os.stat(directory).st_dev == device else ours


def _redact_again(folder: Path, *names: str) -> None:
    """Replace what was found secret after these files had been written."""
    for name in names:
        with _tolerating(name), contextlib.suppress(FileNotFoundError):
            path = folder / name
            data = _read_bytes(path)
            clean = _replace_known(data)
            if clean != data and name.endswith(".json"):
                _write_json(path, _read_json(path), durable=True)
            elif clean != data:
                _write_file(path, clean)


# === Several processes ===
# Rank 0 creates the run and waits for nobody. Another rank asks below base_dir for it:
# on one host it sees that the rank 0 which published is alive; elsewhere, or when that
# has ended, rank 0's recorder answers its very request. So no stale file is believed.


class _Launch:
    """Which of how many processes this is, and the name that they share."""

    def __init__(self, env: Mapping[str, str], options: Mapping[str, Any]) -> None:
        found = _rank(env) or (0, 1, {}, None)
        self.rank, self.world, self.shared, self.launcher = found
        self.base_dir: Path = options["base_dir"]
        self.facts: dict[str, Any] = {}  # for metadata.json
        slurm = {key: env[key] for key in _SLURM_JOB if key in env}
        if not slurm and not self.shared:
            return
        name, separate = options["run_prefix"], options["ranks"] == "separate"
        own = (os.getpid(), self.base_dir, name)  # the n-th of one rank meets the n-th
        _entered[own] = _entered.get(own, 0) + 1
        which = [str(name or _script_name()), _entered[own], separate and self.rank]
        counts = ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT")
        restarts = [_whole(env.get(count)) or 0 for count in counts]
        launch = [slurm, env.get("SLURM_STEP_ID")] if slurm else self.shared
        job = _short_hash([launch, which])
        self.facts = {"job": job, "restarts": restarts}
        if self.world > 1:
            self.facts.update(rank=self.rank, world_size=self.world)
        key = _short_hash([self.shared, restarts, which])
        self.folder = self.base_dir / ".ranks" / key
        if separate:
            self.rank, self.world = 0, 1

    def publish(self, run_dir: Path, attempt: int) -> _Meeting | None:
        """Tell the other ranks where the run is, in .ranks/<key>/run.json."""
        if self.world == 1:
            return None
        ours = {"pid": os.getpid(), "process": _process_identity(os.getpid())}
        answer = {"run_dir": str(run_dir), "attempt": attempt, **ours}
        with _tolerating("the other ranks"):
            self.folder.mkdir(parents=True, exist_ok=True)
            for path in self.folder.glob("*.joined"):  # of a launch that crashed
                path.unlink()
            _write_file(self.folder / "run.json", json.dumps(answer).encode())
        until = time.monotonic() + RANK_WAIT_SECONDS
        return _Meeting(str(self.folder), answer, self.world - 1, until, self.launcher)

    def join(self) -> tuple[Path, int]:
        """Wait until rank 0 has created the run; return its path and attempt."""
        request = self.folder / f"{self.rank}-{os.urandom(8).hex()}"
        reply = request.with_suffix(".json")
        deadline = time.monotonic() + RANK_WAIT_SECONDS
        try:
            while time.monotonic() < deadline:
                with contextlib.suppress(FileNotFoundError):  # somebody tidied up
                    if not request.exists():
                        self.folder.mkdir(parents=True, exist_ok=True)
                        request.touch()
                answer = self._published_here() or _read_json(reply)
                if answer:
                    with contextlib.suppress(OSError):
                        request.rename(request.with_suffix(".joined"))
                    return Path(answer["run_dir"]), answer["attempt"]
                time.sleep(RANK_POLL_SECONDS)
        except OSError as error:
            raise _unwritable(self.folder, error) from None
        finally:
            for path in (request, reply):
                with contextlib.suppress(OSError):
                    path.unlink()
        who = f"rank {self.rank} of {self.world} waited {RANK_WAIT_SECONDS:g} s"
        what = f"rank 0 to create the run below {str(self.base_dir)!r}"
        known = {k: v for k, v in self.shared.items() if isinstance(v, str)}
        names = " ".join(f"{key}={value}" for key, value in known.items())
        todo = "let all ranks enter run_context, or give ranks='separate'"
        raise TimeoutError(f"{who} for {what} ({names}); {todo}")

    def _published_here(self) -> dict[str, Any] | None:
        """Return what a rank 0 published that is alive on this host (Linux)."""
        published = _read_json(self.folder / "run.json")
        then, here = _mapping(published, "process"), _process_identity(os.getpid())
        same = all(then.get(key) == here[key] for key in ("boot_id", "pid_namespace"))
        if not published or not same or not then.get("start_ticks"):
            return None
        return published if _is_alive(published["pid"], then["start_ticks"]) else None

    def earlier_attempt(self) -> Path | None:
        """Return the run that this job recorded before it was started again."""
        restarts = self.facts.get("restarts", [])
        places = self.base_dir.glob("*") if any(restarts) else []
        for path in sorted(places, key=_started, reverse=True):
            then = _mapping(_read_json(path / "metadata.json"), "launcher")
            if then.get("job") == self.facts["job"] and then["restarts"] < restarts:
                return path
        return None


class _Meeting:
    """How rank 0, and then its recorder, answers the ranks that have not come yet."""

    def __init__(
        self, folder: str, answer: dict[str, Any], others: int, until: float,
        launcher: Any, answered: Sequence[str] = (), joined: Sequence[str] = (),
    ) -> None:
        self.folder, self.answer, self.others = folder, answer, others
        self.until, self.launcher = until, launcher
        self.answered, self.joined = list(answered), list(joined)

    def answer_all(self) -> bool:
        """Tell all that ask where the run is; return False once all have come."""
        known = self.answered + self.joined
        for path in Path(self.folder).glob("*-*"):
            rank, kind = path.name.partition("-")[0], path.suffix
            with contextlib.suppress(OSError):
                if kind == ".joined":
                    path.unlink()
                    self.joined.append(rank)
                elif not kind and not {path.name, rank}.intersection(known):
                    reply = json.dumps(self.answer).encode()
                    _write_file(path.with_suffix(".json"), reply)
                    self.answered.append(path.name)
        if len(set(self.joined)) == self.others:
            self.tidy()
            return False
        return True

    def serve(self) -> None:
        """Answer until all have come, or it can be assumed that none will."""
        while self.answer_all():
            late = time.monotonic() > self.until
            over = self.launcher and not _is_alive(*self.launcher[:2])
            if late or over or not os.path.isdir(self.answer["run_dir"]):
                return self.tidy()
            time.sleep(RANK_POLL_SECONDS)

    def tidy(self) -> None:
        """Remove what is ours; a folder goes when no other launch has a file there."""
        folder = Path(self.folder)
        mine = [folder / name for name in self.answered]
        if _read_json(folder / "run.json") == self.answer:
            mine.append(folder / "run.json")
        for path in (*mine, *(path.with_suffix(".json") for path in mine)):
            with contextlib.suppress(OSError):
                path.unlink()
        for path in (folder, folder.parent):
            with contextlib.suppress(OSError):
                path.rmdir()


_entered: dict[tuple[int, Path, Any], int] = {}  # how often this process has
_SLURM_JOB = ("SLURM_CLUSTER_NAME", "SLURM_JOB_ID")
# Rank, number of ranks, ranks on this host; what all ranks of a launch have in common.
_LAUNCHERS = (
    ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE",
     ("TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT")),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE",
     ("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid")),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALNRANKS", ("PMI_JOBID",)),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "", ("SLURM_STEP_ID",)),
    ("SLURM_PROCID", "SLURM_NTASKS", "", ("SLURM_STEP_ID",)),
)  # fmt: skip


def _rank(
    env: Mapping[str, str]
) -> tuple[int, int, dict[str, Any], list[Any] | None] | None:
    """Return rank, world size, what the ranks of this launch alone share, its launcher.

    The first launcher that names both decides. None for an ordinary process, such as
    the script of sbatch, a shell of salloc, or a program that a rank starts.
    """
    known = [row for row in _LAUNCHERS if row[0] in env and row[1] in env]
    if not known:
        return None
    name, size, local, shared = known[0]
    rank, world = _whole(env[name]), _whole(env[size])
    names = (*shared, *_SLURM_JOB, "PBS_JOBID", size)
    ids: dict[str, Any] = {key: env[key] for key in names if key in env}
    step = _whole(env.get("SLURM_STEP_ID", ""))
    if rank is None or world is None or not rank < world > 1 or _is_child(ids):
        return None
    if name == "RANK" and not {"MASTER_PORT", "TORCHELASTIC_RUN_ID"}.intersection(ids):
        return None  # somebody's own variable
    if name == "SLURM_PROCID" and (step is None or step >= 0xFFFFFFF0):
        return None  # the numbers of what is no step of srun (slurm.h)
    if re.match(r"localhost|127\.|::1", env.get("MASTER_ADDR", "")):
        ids["host"] = [_hostname(), _process_identity(os.getpid())["boot_id"]]
    mark = [f"{key}={env[key]}" for key in (name, size, local) if key in env]
    launcher = _launcher_process(mark)
    if env.get(local) == env[size]:  # all are here, so it is the same for all
        ids["launcher"] = launcher
    return rank, world, ids, launcher


def _whole(text: str | None) -> int | None:
    return int(text) if text and re.fullmatch(r"[0-9]{1,10}", text) else None


def _is_child(ids: Mapping[str, str]) -> bool:
    """Return whether a rank of this launch started us inside its run: we are none."""
    if any(run.pid == os.getpid() for run in _active) or "RUN_DIR" not in os.environ:
        return False
    metadata = _read_json(Path(os.environ["RUN_DIR"]) / "metadata.json")
    then = _mapping(metadata, "launcher")
    known = [key for key in ids if not key.startswith(("PMIX_", "OMPI_MCA_"))]
    return "world_size" in then and all(then.get(key) == ids[key] for key in known)


def _launcher_process(mark: Sequence[str]) -> list[Any] | None:
    """Return what tells the launcher, which started all ranks, from any other process.

    It is the nearest ancestor without our rank in its environment, since a rank may
    be started by a shell. Where that cannot be read, it is our parent.
    """
    pid, wanted = os.getppid(), {os.fsencode(text) for text in mark}
    while pid > 0:
        try:
            environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except OSError:
            environment = []
        fields = _proc_stat(pid)
        if fields is None or not wanted.issubset(environment):
            identity = _process_identity(pid)
            return [pid, identity["start_ticks"], identity["boot_id"], _hostname()]
        pid = int(fields[1])
    return None


def _short_hash(value: Any) -> str:
    import hashlib

    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def _record_rank(
    folder: Path, rank: int, ending: Mapping[str, Any], row: Mapping[str, Any]
) -> None:
    """Write logs/rank<k>.status.json for a rank that failed; name it in status.json."""
    if ending["status"] != "failed":
        return
    path = folder / "logs" / f"rank{rank}.status.json"
    path.parent.mkdir(exist_ok=True)
    about = {"timestamp_utc": _utc(), "pid": row["pid"], "hostname": row["hostname"]}
    _write_json(path, {"rank": rank, **ending, **about}, durable=True)
    before = (_read_json(folder / "status.json") or {}).get("status")
    after = _name_failed_rank(folder)
    if after and before not in ("running", after["status"]):
        _append_index(row, "end", after["status"], after["exit_reason"])


def _name_failed_rank(folder: Path) -> dict[str, Any] | None:
    """Make status.json of a run that has ended tell which rank failed first, and how.

    Both rank 0 and the rank that failed do this after their own part is written:
    whoever comes last sees both.
    """
    status = _read_json(folder / "status.json") or {}
    found = map(_read_json, sorted(folder.glob("logs/rank*.status.json")))
    failed = {str(facts["rank"]): facts for facts in found if facts}
    if status.get("status") in (None, "running") or not failed:
        return None
    own = {key: status[key] for key in _OUTCOME if key in status}
    own = _mapping(status, "ranks").get("0", own)
    causes = failed if own["status"] != "failed" else {"0": own, **failed}
    first = min(causes, key=lambda rank: _failed_at(causes[rank]))
    brief = ("exit_reason", "exit_code", "ended")  # the files tell more
    ranks = {rank: {key: failed[rank].get(key) for key in brief} for rank in failed}
    if len(_mapping(status, "ranks")) == 1 + len(ranks):
        return status
    rest = {key: value for key, value in status.items() if key not in _OUTCOME}
    facts = {key: causes[first][key] for key in _OUTCOME if key in causes[first]}
    facts.update(rest, failed_rank=int(first), ranks={"0": own, **ranks})
    _write_json(folder / "status.json", facts, durable=True)
    return _name_failed_rank(folder)  # another rank may have failed meanwhile


_OUTCOME = ("status", "exit_reason", "exit_code", "exception", "ended", "signal",
            "problem", "last_output")  # fmt: skip


def _failed_at(outcome: Mapping[str, Any]) -> tuple[bool, float]:
    """Return a key that sorts failures: first what the others may follow from.

    The launcher ends the other ranks by SIGTERM; and that a rank was killed is seen
    by its peers, whose connections break, before it is by its recorder.
    """
    killed = outcome.get("exit_reason") == "killed"
    seen = outcome.get("ended") or 0.0
    return outcome.get("signal") == "SIGTERM", seen - 0.5 if killed else seen


# === Provenance ===
# Foreign programs may hang, flood, lie or be missing: a collector keeps its limits,
# changes nothing, and gives (facts, None or the reason why it does not know).


def _ask(collect: Callable[[], tuple[Any, str | None]]) -> tuple[Any, dict[str, Any]]:
    """Return what a collector found out, and its entry in `capture`."""
    started, facts = time.monotonic(), None
    try:
        facts, problem = collect()
    except Exception as error:
        problem = f"{type(error).__name__}: {error}"
    seconds = round(time.monotonic() - started, 3)
    return facts, {"ok": problem is None, "seconds": seconds, "problem": problem}


def _add_facts(
    metadata: dict[str, Any], name: str, facts: Any, report: dict[str, Any]
) -> None:
    """Put facts at their place ("git.patch": `patch` in `git`); None: leave it."""
    *above, key = name.split(".")
    place = metadata
    for part in above:
        place = place.setdefault(part, {})
    if isinstance(facts, dict):  # what is already known is not lost
        known = _mapping(place, key).items()
        facts = {**facts, **{k: v for k, v in known if v is not None}}
    place[key] = place.get(key) if facts is None else facts
    metadata.setdefault("capture", {})[name] = report


def _git_head(directory: str) -> str | None:
    """Return the short hash of the commit in `directory`: one call, for the name."""
    head = _git_run(directory, "rev-parse", "--short", "HEAD", timeout=HEAD_SECONDS)
    found = re.fullmatch(r"[0-9a-f]{4,64}", head.text.strip())
    return found[0] if found and not head.problem else None


def _git(tree: _GitTree) -> tuple[dict[str, Any], str | None]:
    """Return what git says about a repository.

    It is dirty when a tracked file or a submodule differs from the commit, or a file
    is neither tracked nor ignored; what was written after entry does not count. No
    filter is run, so that a touched Git LFS file counts as changed.
    """
    facts: dict[str, Any] = dict.fromkeys(GIT_FACTS)
    if tree.is_shallow is None:
        return facts, tree.problem
    facts.update(is_shallow=tree.is_shallow, root=tree.root or None, branch=tree.branch)
    facts["remote_origin_url"] = tree.config.get("remote.origin.url")
    if tree.head:
        facts.update(commit_full=tree.head, commit_short=_git_head(tree.directory))
        unpushed = ("rev-list", "--count", "HEAD", "--not", "--remotes")
        count = _git_run(tree.directory, *unpushed).text.strip()
        facts["unpushed"] = int(count) if count.isdigit() else None
    if tree.problem or not tree.root:
        return facts, tree.problem
    modules = [_submodule(*module) for module in tree.submodules(tree.head)]
    names = sorted(tree.changes.keys() - set(tree.late))
    untracked = [_show(name) for name in names if name not in tree.tracked]
    changed = [_show(name) for name in names if name in tree.tracked]
    dirty = bool(names) or any(module["is_dirty"] for module in modules)
    facts.update(is_dirty=dirty, submodules=modules, untracked_count=len(untracked))
    facts.update(changed=changed[:MAX_LISTED], untracked=untracked[:MAX_LISTED])
    facts["changed_after_entry"] = [_show(name) for name in tree.late[:MAX_LISTED]]
    return facts, None


GIT_FACTS = ["commit_short", "commit_full", "branch", "is_dirty", "remote_origin_url"]
GIT_FACTS += ["root", "is_shallow", "unpushed", "untracked", "untracked_count"]
GIT_FACTS += ["changed", "changed_after_entry", "submodules"]


def _submodule(name: bytes, recorded: str, tree: _GitTree) -> dict[str, Any]:
    facts, problem = _git(tree)
    keys = ("commit_full", "is_dirty", "unpushed", "remote_origin_url")
    known = {key: facts[key] for key in keys}
    return {"path": _show(name), "recorded": recorded, **known, "problem": problem}


class _GitTree:
    """A work tree and what differs in it from its commit, read without side effects.

    Not counted are the folders `excluded`, other runs, files that a filter encrypts,
    and what was written after `entered`, in ns since 1970 (`late`, where tracked).
    """

    def __init__(
        self, directory: str, excluded: Sequence[str] = (), entered: int | None = None
    ) -> None:
        self.directory, self.excluded, self.entered = directory, excluded, entered
        self.root = self.head = ""
        self.branch: str | None = None
        self.is_shallow: bool | None = None  # None: no repository
        self.config: dict[str, str] = {}
        self.switches: list[str] = []  # that turn filters off
        self.changes: dict[bytes, _Blob] = {}  # name: what the commit has there
        self.tracked: set[bytes] = set()  # those of them that the commit or index has
        self.late: list[bytes] = []
        self.pathspec = [":/"]
        self.problem = self._open() or self._read_config() or self._read_status()

    def _open(self) -> str | None:
        # true\nfalse\n/home/ann/tree\n: the last line is missing in a bare repository
        asked = ("--is-inside-work-tree", "--is-shallow-repository", "--show-toplevel")
        where = _git_run(self.directory, "rev-parse", *asked)
        inside, shallow, root = [*where.text.split("\n", 2), "", ""][:3]
        if inside not in ("true", "false"):
            return where.problem or "git did not answer what it was asked"
        self.is_shallow = shallow == "true"
        self.root = root[:-1] if inside == "true" else ""
        head = _git_run(self.directory, "rev-parse", "--verify", "HEAD").text.strip()
        self.head = head if re.fullmatch(r"[0-9a-f]{40,64}", head) else ""
        branch = _git_run(self.directory, "symbolic-ref", "--short", "-q", "HEAD")
        self.branch = branch.text.strip() or None
        return None

    def _read_config(self) -> str | None:
        listed = _git_run(self.directory, "config", "--list", "-z")
        # remote.origin.url\nhttps://example.org/x.git\0filter.lfs.clean\ngit-lfs\0
        pairs = (item.partition("\n") for item in listed.text.split("\0"))
        self.config = {name: value for name, _, value in pairs}
        keys = (key for key in self.config if key.startswith("filter."))
        filters = sorted({key.rpartition(".")[0] for key in keys})
        if any("=" in name for name in filters):
            return "a git filter has a name that cannot be switched off"
        off = ("clean=", "smudge=", "process=", "required=false")
        settings = [f"{name}.{setting}" for name in filters for setting in off]
        self.switches = [word for text in settings for word in ("-c", text)]
        real = os.path.realpath(self.root)
        for path in self.excluded:
            inside = os.path.relpath(os.path.realpath(path), real)
            if inside.split(os.sep)[0] not in (os.curdir, os.pardir):
                self.pathspec.append(f":(exclude,top,literal){inside}")
        encrypting = re.compile(r"filter\.([a-z-]*(crypt|sops|vault)[a-z-]*)$")
        for match in filter(None, map(encrypting.match, filters)):
            self.pathspec.append(f":(exclude,top,attr:filter={match[1]})")
        return listed.problem

    def _read_status(self) -> str | None:
        if not self.root:
            return None
        options = ("--porcelain=v2", "-z", "--no-renames", "--untracked-files=all")
        words = ("status", *options, "--ignore-submodules=dirty", "--", *self.pathspec)
        output = _git_run(self.root, *self.switches, *words)
        # ? untracked name
        # 1 .M N... <old mode> <index mode> <new mode> <old id> <index id> name
        # u UU N... <base mode> <our mode> ... <base id> <our id> <their id> name
        for record in output.data.split(b"\0")[:-1]:
            kind, _, rest = record.partition(b" ")
            count, mode, oid = (7, 2, 5) if kind == b"1" else (9, 3, 7)
            fields = [rest] if kind == b"?" else rest.split(b" ", count)
            name, old = fields[-1], (b"", b"")
            if kind != b"?":
                self.tracked.add(name)
                old = _blob(fields[mode], fields[oid])
            elif self._is_of_a_run(name):
                continue
            self._add(name, old)
        return output.problem or self._read_hidden()

    def _add(self, name: bytes, old: _Blob) -> None:
        is_tracked, is_late = name in self.tracked, self.is_late(name)
        if is_tracked and is_late:
            self.late.append(name)
        if is_tracked or not is_late:
            self.changes[name] = old

    def _read_hidden(self) -> str | None:
        """Look at the files that git was told to take as unchanged."""
        words = ("ls-files", "-v", "-s", "-z", "--", *self.pathspec)
        listed = _git_run(self.root, *words, limit=5 * PROGRAM_BYTES)
        # h 100644 <id> 0\tname, or S where a sparse checkout need not have it
        marked = re.findall(rb"(?<![^\0])([a-zS]) (\d+) (\w+) 0\t([^\0]+)", listed.data)
        hidden: dict[bytes, _Blob] = {}
        for mark, mode, oid, name in marked:
            there = mark not in b"sS" or os.path.lexists(self.path(name))
            if there and mode != b"160000" and name not in self.changes:
                hidden[name] = mode, oid
        kinds = {name: _lstat(self.path(name)) for name in hidden}
        plain = [name for name, (kind, size) in kinds.items()
                 if stat.S_ISREG(kind) and size <= PATCH_FILE_BYTES]  # fmt: skip
        ids, problem = self._object_ids(plain)
        for name, old in hidden.items():
            if (self.mode(kinds[name][0], old[0]), ids.get(name)) != old:
                self.tracked.add(name)
                self._add(name, old)
        return listed.problem or problem

    def _object_ids(self, names: list[bytes]) -> tuple[dict[bytes, bytes], str | None]:
        """Return what git calls the content of files, and why of some it is unknown."""
        ids: dict[bytes, bytes] = {}
        deadline = time.monotonic() + PROGRAM_SECONDS
        while names and time.monotonic() < deadline:
            some, names = names[:1000], names[1000:]
            words = (*self.switches, "hash-object", "--", *map(os.fsdecode, some))
            ids.update(zip(some, _git_run(self.root, *words).data.split()))
        return ids, "no time to look at all files of a git index" if names else None

    def _is_of_a_run(self, name: bytes) -> bool:
        """Tell whether an untracked file is recorded in a run, or about runs."""
        folders = name.split(b"/")[:-1]
        index = os.fsencode(INDEX_FILE)
        if b".ranks" in folders or name == index or name.endswith(b"/" + index):
            return True
        for depth, folder in enumerate(folders, 1):
            if re.search(rb"-\d{8}-\d{6}", folder):
                status = self.path(b"/".join([*folders[:depth], b"status.json"]))
                return os.path.exists(status)
        return False

    def is_late(self, name: bytes) -> bool:
        """Tell whether a file was written after entry; a missing one was not."""
        with contextlib.suppress(OSError):
            if self.entered is not None:
                return os.lstat(self.path(name)).st_ctime_ns > self.entered
        return False

    def changes_since(self, base: str) -> dict[bytes, _Blob]:
        """Return what differs from the commit `base`, which need not be that here."""
        if base == self.head or not self.head:
            return self.changes
        words = ("diff-tree", "-r", "--raw", "-z", "--no-renames")
        output = _git_run(self.root, *words, base, self.head, "--", *self.pathspec)
        self.problem = self.problem or output.problem
        # :<old mode> <new mode> <old id> <new id> M\0name\0
        fields = output.data.split(b"\0")
        olds = (record[1:].split(b" ") for record in fields[::2])
        moved = {name: _blob(old[0], old[2]) for name, old in zip(fields[1::2], olds)}
        return {**self.changes, **moved}

    def submodules(self, base: str) -> list[tuple[bytes, str, _GitTree]]:
        """Return path, commit and tree of the checked-out submodules of `base`."""
        if not base or not os.path.lexists(self.path(b".gitmodules")):
            return []
        # submodule.a.path\nfolder\0
        asked = ("-z", "-f", ".gitmodules", "--get-regexp", r"^submodule\..*\.path$")
        items = _git_run(self.root, "config", *asked).text.split("\0")
        names = [item.partition("\n")[2] for item in items[:-1]]
        # 160000 commit <id>\tname
        known = _git_run(self.root, "ls-tree", "-z", base, "--", *names).data
        modules = []
        for oid, name in re.findall(rb"160000 commit (\w+)\t([^\0]+)\0", known):
            if os.path.lexists(self.path(name + b"/.git")):
                where = os.fsdecode(self.path(name))
                tree = _GitTree(where, self.excluded, self.entered)
                modules.append((name, oid.decode(), tree))
        return modules

    def object_id(self, kind: bytes, data: bytes) -> str:
        """Return what git calls this content."""
        import hashlib

        name = self.config.get("extensions.objectformat", "sha1")
        digest = hashlib.new(name, b"%s %d\0" % (kind, len(data)))
        digest.update(data)
        return digest.hexdigest()

    def mode(self, kind: int, old: bytes) -> bytes:
        """Return what git writes for the mode of a file: empty when there is none."""
        if stat.S_ISLNK(kind):
            return b"120000"
        if stat.S_ISREG(kind):
            if old[:3] == b"100" and self.config.get("core.filemode") == "false":
                return old
            return b"100755" if kind & 0o100 else b"100644"
        if old == b"160000" and (stat.S_ISDIR(kind) or not kind):
            return old
        return b"other" if kind and not (old and stat.S_ISDIR(kind)) else b""

    def path(self, name: bytes) -> bytes:
        """Return where a file of this tree lies."""
        return os.path.join(os.fsencode(self.root), name)


def _blob(mode: bytes, oid: bytes) -> _Blob:
    return (mode, oid) if oid.strip(b"0") else (b"", b"")


def _show(name: bytes) -> str:
    return name.decode("utf-8", "backslashreplace")


def _git_patch(tree: _GitTree, path: Path) -> tuple[dict[str, Any], str | None]:
    """Write `path`, the way from the commit to the files as they were at entry.

    ``git apply --whitespace=nowarn git.patch`` in a clean checkout of the commit and
    its submodules gives the same files. Secrets in them are redacted. Not in it are
    changes after entry, files that hold secrets by nature, and what passes a limit:
    these are listed. Nothing is written when nothing differs.
    """
    patch = _Patch(time.monotonic() + PATCH_SECONDS)
    if tree.root and tree.problem is None:
        patch.add(tree, tree.head)
    elif tree.is_shallow is not None:
        patch.problems.append(tree.problem or "a bare repository has no files")
    if patch.text:
        _write_file(path, bytes(patch.text))
        patch.facts.update(file=path.name, bytes=len(patch.text))
    return patch.facts, "; ".join(patch.problems) or None


class _Patch:
    """A patch in the making: its text, and what it leaves out."""

    def __init__(self, deadline: float) -> None:
        self.deadline, self.text, self.size = deadline, bytearray(), 0
        self.problems: list[str] = []
        self.facts: dict[str, Any] = {"file": None, "bytes": 0, "files": 0}
        self.facts.update(redacted=[], left_out=[], left_out_count=0, left_out_bytes=0)

    def add(self, tree: _GitTree, base: str, prefix: bytes = b"") -> None:
        """Add what differs in a tree from `base`, then the same of its submodules."""
        base = base or tree.object_id(b"tree", b"")
        known, read = tree.changes_since(base), {}
        sizes = {name: _lstat(tree.path(name)) for name in known}
        small_first = sorted(known, key=lambda name: (sizes[name][1], name))
        for name in sorted(small_first, key=lambda name: name not in tree.tracked):
            new = self._read(tree, prefix + name, name, known[name], *sizes[name])
            if new is not None:
                read[name] = new
        blobs = {}
        for name, (mode, data, clean) in read.items():
            same = mode and tree.object_id(b"blob", data).encode() == known[name][1]
            # What a later file has shown to be secret is replaced here as well.
            clean = data if same else _replace_known(clean)
            self.facts["redacted"] += [_show(prefix + name)] if clean != data else []
            oid = tree.object_id(b"blob", clean).encode() if mode else b""
            if (mode, oid) != known[name]:
                blobs[name] = mode, oid, clean
        if blobs:
            self._compare(tree, base, prefix, blobs)
        self.problems += [tree.problem] if tree.problem else []
        for name, commit, module in () if self.problems else tree.submodules(base):
            self.add(module, commit, prefix + name + b"/")

    def _read(
        self, tree: _GitTree, title: bytes, name: bytes, old: _Blob, kind: int,
        size: int,
    ) -> tuple[bytes, bytes, bytes] | None:
        """Return mode, content and redacted content, or list a file as left out."""
        mode = tree.mode(kind, old[0])
        if mode == b"160000" or not (mode or old[0]):
            return None  # a submodule, whose files come later; or it is gone
        path, data = tree.path(name), b""
        problem = self._obstacle(title, mode, size)
        if mode and not problem:
            try:
                data = _content(path, mode)
            except OSError as error:
                problem = error.strerror or str(error)
        # Asked only now, because the file may have been written while it was read.
        if mode and tree.is_late(name):
            return None
        same = tree.object_id(b"blob", data).encode() == old[1]
        clean = data if same or problem else _redact_bytes(data)
        if clean != data and b"\0" in data:
            problem = "a binary file that holds a secret"
        if problem:
            self._leave_out(title, size, problem, path)
            return None
        self.size += len(clean)
        self.facts["files"] += 1
        return mode, data, clean

    def _obstacle(self, title: bytes, mode: bytes, size: int) -> str | None:
        """Return why a file cannot be in the patch."""
        reasons = {
            "no file of this repository": mode == b"other",
            "holds secrets by nature": mode and _compiled(SECRET_FILES).search(title),
            "has a secret in its name": _redact_bytes(title) != title,
            "too large": size > PATCH_FILE_BYTES,
            "the patch is full": self.size + size > PATCH_BYTES,
            "too many files": self.facts["files"] >= PATCH_FILES,
            "no time left": time.monotonic() > self.deadline,
        }
        return next((reason for reason, holds in reasons.items() if holds), None)

    def _leave_out(
        self, title: bytes, size: int, reason: str, path: bytes = b""
    ) -> None:
        """List a file that the patch lacks, with its sha256 where that is cheap."""
        entry = {"path": _show(title), "bytes": size, "reason": reason}
        self.facts["left_out_count"] += 1
        self.facts["left_out_bytes"] += size
        if len(self.facts["left_out"]) < MAX_LISTED:
            cheap = size <= HASH_BYTES and time.monotonic() < self.deadline
            if reason in ("too large", "the patch is full") and cheap:
                entry["sha256"] = _sha256(path)
            self.facts["left_out"].append(entry)

    def _compare(
        self, tree: _GitTree, base: str, prefix: bytes,
        blobs: Mapping[bytes, tuple[bytes, bytes, bytes]],
    ) -> None:
        """Let git compare the commit with an index and object store of our own."""
        import tempfile

        words = "diff-index --cached -p --binary --full-index --no-renames --no-color"
        ends = [f"--{side}-prefix={letter}/{os.fsdecode(prefix)}"
                for side, letter in (("src", "a"), ("dst", "b"))]  # fmt: skip
        options = (*words.split(), "--no-ext-diff", "--no-textconv", *ends, base)
        with tempfile.TemporaryDirectory(prefix="run_utils-") as scratch:
            more, problem = _git_store(scratch, tree, base, blobs)
            if problem:
                self.problems.append(problem)
                return

            def compare(*settings: str) -> _Output:
                left = max(self.deadline - time.monotonic(), 1.0)
                limits: Any = {"timeout": left, "limit": 3 * PATCH_BYTES, "more": more}
                return _git_run(tree.root, *settings, *options, **limits)

            texts = compare()
            sections = {} if texts.problem else _split_patch(texts.data)
            if texts.problem or any(map(_shows_secret, sections.values())):
                # What would show the old content is shown as a binary patch.
                binary = compare("-c", f"core.attributesFile={scratch}/attributes")
                problem = binary.problem
                for title, section in _split_patch(binary.data).items():
                    if texts.problem or _shows_secret(sections[title]):
                        sections[title] = section
        if problem:
            self.problems.append(problem)
            return
        for title, section in sections.items():
            if _shows_secret(section):
                self._leave_out(title, len(section), "its old version holds a secret")
            else:
                self.text += section


def _shows_secret(section: bytes) -> bool:
    """Tell whether the old side of a text patch shows a secret; the new is redacted."""
    lines = section.partition(b"\n@@")[2].split(b"\n")
    old = b"\n".join(line[1:] for line in lines if line[:1] != b"+")
    return _redact_bytes(old) != old


def _git_store(
    scratch: str, tree: _GitTree, base: str,
    blobs: Mapping[bytes, tuple[bytes, bytes, bytes]],
) -> tuple[dict[str, str], str | None]:
    """Make a git index of `base` and the changes; return its environment."""
    import zlib

    objects = os.path.join(scratch, "objects")
    os.makedirs(os.path.join(objects, "info"))
    asked = _git_run(tree.root, "rev-parse", "--git-path", "objects")
    if asked.problem:
        return {}, asked.problem
    alternates = tree.path(asked.data.rstrip(b"\n")) + b"\n"
    Path(objects, "info", "alternates").write_bytes(alternates)
    Path(scratch, "attributes").write_bytes(b"* -diff\n")
    entries = b""
    # What goes comes first, so that a file can become a folder.
    for name, (mode, oid, data) in sorted(blobs.items(), key=lambda item: item[1][0]):
        entries += b"%s %s\t%s\0" % (mode or b"0", oid or b"0" * len(base), name)
        if oid:
            loose = Path(objects, oid[:2].decode(), oid[2:].decode())
            loose.parent.mkdir(exist_ok=True)
            loose.write_bytes(zlib.compress(b"blob %d\0%s" % (len(data), data), 1))
    listed = Path(scratch, "entries")
    listed.write_bytes(entries)
    more = {"GIT_INDEX_FILE": os.path.join(scratch, "index")}
    more["GIT_OBJECT_DIRECTORY"] = objects
    done = _git_run(tree.root, "read-tree", base, more=more)
    if not done.problem:
        with open(listed, "rb") as file:
            words = ("update-index", "-z", "--replace", "--index-info")
            done = _git_run(tree.root, *words, more=more, stdin=file)
    return more, done.problem


def _split_patch(patch: bytes) -> dict[bytes, bytes]:
    """Split a patch by files, and drop the way back, which git adds to binary ones."""
    sections: dict[bytes, bytes] = {}
    for text in re.split(rb"^(?=diff --git )", patch, flags=re.M)[1:]:
        start, binary, hunk = text.partition(b"\nGIT binary patch\n")
        text = start + binary + hunk.partition(b"\n\n")[0] + b"\n\n" if binary else text
        title = text.partition(b"\n")[0]
        sections[title] = sections.get(title, b"") + text  # a link that became a file
    return sections


def _lstat(path: bytes) -> tuple[int, int]:
    """Return mode and size of a file, zeros where there is none."""
    with contextlib.suppress(OSError):
        info = os.lstat(path)
        return info.st_mode, 0 if stat.S_ISDIR(info.st_mode) else info.st_size
    return 0, 0


def _content(path: bytes, mode: bytes) -> bytes:
    """Return where a link leads, or what is in a file, as far as a patch has room."""
    if mode == b"120000":
        return os.readlink(path)
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    with open(os.open(path, flags), "rb") as file:
        return file.read(PATCH_FILE_BYTES + 1)


def _sha256(path: bytes | str) -> str | None:
    import hashlib

    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            for chunk in iter(lambda: file.read(1 << 20), b""):
                digest.update(chunk)
    except OSError:
        return None
    return digest.hexdigest()


def _git_bundle(tree: _GitTree, path: Path) -> tuple[dict[str, Any], str | None]:
    """Write `path`, the commits that no remote has, unless they hold a secret.

    ``git fetch git.bundle HEAD`` in a clone gets them. Without a remote that is the
    whole history. A bundle cannot be redacted: one secret keeps all of it away.
    """
    facts: dict[str, Any] = {"file": None, "bytes": 0, "commit": None, "commits": 0}
    unpushed = ("HEAD", "--not", "--remotes")
    if not tree.head:
        return facts, None
    # <id of a commit>\n<id> name of a file or folder\n
    listed = _git_run(tree.directory, "rev-list", "--objects", *unpushed)
    rows = [line.partition(b" ") for line in listed.data.splitlines()]
    if listed.problem or not rows:
        return facts, listed.problem and f"no bundle: {listed.problem}"
    names = {oid: name for oid, _, name in rows}
    facts.update(commit=tree.head, commits=sum(not space for _, space, _ in rows))
    import tempfile

    with tempfile.TemporaryFile() as file:
        file.write(b"\n".join(names) + b"\n")
        file.seek(0)
        limits: Any = {"limit": BUNDLE_BYTES, "timeout": PATCH_SECONDS}
        words = ("cat-file", "--batch", "--buffer")
        content = _git_run(tree.directory, *words, stdin=file, **limits)
    if content.problem:
        return facts, f"no bundle: {content.problem}"
    secret = _secret_object(content.data, names, time.monotonic() + PATCH_SECONDS)
    if secret is not None:
        return facts, f"no bundle: {secret}"
    pack = ("-c", "pack.threads=1", "bundle", "create", "-q", "-", *unpushed)
    bundle = _git_run(tree.directory, *pack, **limits)
    # The header names its commit: only what was searched may be kept.
    if bundle.problem or b"\n%s HEAD\n" % tree.head.encode() not in bundle.data[:10000]:
        return facts, f"no bundle: {bundle.problem or 'HEAD has moved meanwhile'}"
    _write_file(path, bundle.data)
    return {**facts, "file": path.name, "bytes": len(bundle.data)}, None


def _secret_object(
    data: bytes, names: Mapping[bytes, bytes], deadline: float
) -> str | None:
    """Return why a bundle of these objects must not be kept; each line is read once."""
    seen: set[bytes] = set()
    start = 0
    while start < len(data):
        # <id> blob <size>\n<content>\n
        header, _, _ = data[start : start + 200].partition(b"\n")
        oid, kind, size = header.split(b" ")
        begin = start + len(header) + 1
        start = begin + int(size) + 1
        name = names.get(oid, b"")
        where = f"{_show(name)!r} of an unpushed commit" if name else "a commit"
        if _compiled(SECRET_FILES).search(name):
            return f"{where} holds secrets by nature"
        lines = data[begin : start - 1].split(b"\n") if kind != b"tree" else []
        new = b"\n".join([line for line in lines if line not in seen])
        seen.update(lines)
        if _redact_bytes(name) != name:
            return "the name of a file in a commit holds a secret"
        if _redact_bytes(new) != new:
            return f"{where} holds a secret"
        if time.monotonic() > deadline:
            return f"its search took more than {PATCH_SECONDS:g} s"
    return None


def _git_run(
    directory: str, *words: str, more: Mapping[str, str] | None = None, **how: Any
) -> _Output:
    """Run git so that it asks, pages, fetches, locks and executes nothing."""
    kept = ("GIT_CEILING_DIRECTORIES", "GIT_DISCOVERY_ACROSS_FILESYSTEM")
    env = {k: v for k, v in os.environ.items() if k[:4] != "GIT_" or k in kept}
    env.update(dict.fromkeys(("GIT_ASKPASS", "SSH_ASKPASS"), "true"), LC_ALL="C")
    env.update(dict.fromkeys(("GIT_OPTIONAL_LOCKS", "GIT_TERMINAL_PROMPT"), "0"))
    env.update(GIT_NO_LAZY_FETCH="1", GIT_ALLOW_PROTOCOL="none", GIT_PAGER="cat")
    settings = ["core.fsmonitor=false", "core.hooksPath=/dev/null"]
    settings.append("core.splitIndex=false")
    switches = [word for setting in settings for word in ("-c", setting)]
    argv = ["git", "--no-pager", *switches, *words]
    return _run(argv, cwd=directory, env={**env, **(more or {})}, **how)


def _packages(
    executable: str | None, places: Sequence[str]
) -> tuple[list[str] | None, str | None]:
    """Return the installed packages as requirement lines: what `pip freeze` says.

    Where there is no pip, they are read from the metadata below `places` (PEP 610
    tells of packages that were installed from a URL, a repository or a folder).
    """
    problem, found = None, {}
    folders = [os.path.join(place, "pip") for place in places]
    if executable is not None and (not folders or any(map(os.path.isdir, folders))):
        pip = [executable, "-m", "pip", "--disable-pip-version-check", "freeze"]
        env = {k: v for k, v in os.environ.items() if not k.startswith("PIP_")}
        output = _run(pip, env=env, timeout=PIP_SECONDS)
        lines = [line.strip() for line in output.text.splitlines() if line.strip()]
        if lines and not output.problem:
            return lines, None
        problem = output.problem
    if not places:
        return None, problem
    from importlib.metadata import distributions

    for distribution in distributions(path=list(places)):
        with contextlib.suppress(Exception):  # a dist-info that is empty or torn
            metadata: Any = distribution.metadata
            name = metadata.get("Name")
            if name and name.lower() not in found:
                found[name.lower()] = _requirement(name, distribution)
    return [found[name] for name in sorted(found)], None


def _requirement(name: str, distribution: Any) -> str:
    """Return "name==1.0", "name @ git+URL@commit" or "-e folder"."""
    direct = json.loads(distribution.read_text("direct_url.json") or "{}")
    url, vcs = str(direct.get("url", "")), direct.get("vcs_info", {})
    if direct.get("dir_info", {}).get("editable"):
        return f"-e {url.replace('file://', '', 1)}"
    url = f"{vcs.get('vcs')}+{url}@{vcs.get('commit_id')}" if vcs else url
    return f"{name} @ {url}" if url else f"{name}=={distribution.version}"


def _local_packages(
    request: Mapping[str, Any], tree: _GitTree, folder: Path
) -> tuple[list[dict[str, Any]], str | None]:
    """Return the repository of each package that was installed from a local folder.

    Its changes become git.<package>.patch in `folder`, its commits that no remote has
    git.<package>.bundle; not so for the repository of the experiment itself.
    """
    places, problem = _sys_path(request)
    sources = _local_sources(places)
    packages, problems, seen = [], [problem] if problem else [], {tree.root}
    deadline = time.monotonic() + PATCH_SECONDS
    for name, (source, editable) in sorted(sources.items())[:MAX_LOCAL_PACKAGES]:
        if time.monotonic() > deadline:
            problems.append(f"no time left for {name} and those after it")
            break
        found = _GitTree(source, tree.excluded, tree.entered)
        facts, problem = _git(found)
        keys = ("root", "commit_full", "is_dirty", "remote_origin_url", "unpushed")
        package = {"name": name, "path": source, "editable": editable}
        package.update((key, facts[key]) for key in keys)
        package["problem"] = problem
        if found.root and found.root not in seen:
            seen.add(found.root)
            file = folder / f"git.{_safe_name(name)}.patch"
            for kind, keep in (("patch", _git_patch), ("bundle", _git_bundle)):
                package[kind], problem = keep(found, file.with_suffix(f".{kind}"))
                problems += [f"{name}: {problem}"] if problem else []
        packages.append(package)
    if len(sources) > MAX_LOCAL_PACKAGES:
        problems.append(f"{len(sources) - MAX_LOCAL_PACKAGES} more are not recorded")
    return packages, "; ".join(problems) or None


def _sys_path(request: Mapping[str, Any]) -> tuple[list[str], str | None]:
    """Return where the experiment's Python looks for modules."""
    if request["sys_path"] or request["executable"] is None:
        return request["sys_path"], None
    asked = "import json, sys; print(json.dumps(sys.path[1:]))"
    output = _run([request["executable"], "-c", asked], cwd=request["directory"])
    lines = output.text.splitlines()
    if output.problem or not lines:
        return [], output.problem or "python printed no sys.path"
    return json.loads(lines[-1]), None


def _local_sources(places: Sequence[str]) -> dict[str, tuple[str, bool]]:
    """Return folder and whether it is editable of packages from local folders."""
    from importlib.metadata import distributions
    from urllib.parse import unquote, urlsplit

    sources: dict[str, tuple[str, bool]] = {}
    for distribution in distributions(path=list(places)):
        with contextlib.suppress(Exception):  # a dist-info that is empty or torn
            about: Any = distribution
            # {"url": "file:///home/me/a", "dir_info": {"editable": true}}   (PEP 610)
            direct = json.loads(about.read_text("direct_url.json") or "{}")
            home, local = Path(about.locate_file("")), direct.get("dir_info")
            develops = about._path.suffix == ".egg-info" and home.name not in _INSTALLED
            if local is not None:
                folder = unquote(urlsplit(direct.get("url", "")).path)
                editable = bool(local.get("editable"))
                sources.setdefault(about.metadata["Name"], (folder, editable))
            elif develops:  # setup.py develop
                sources.setdefault(about.metadata["Name"], (str(home), True))
    return sources


_INSTALLED = ("site-packages", "dist-packages")


def _cuda() -> tuple[dict[str, Any], str | None]:
    """Return what the NVIDIA driver says; no CUDA context is ever made."""
    facts: dict[str, Any] = {**dict.fromkeys(CUDA_FACTS), "available": False}
    columns = list(GPU_FACTS)
    output = _nvidia_smi(columns)
    if "not a valid field" in output.text:  # a driver older than MIG
        columns.remove("mig.mode.current")
        output = _nvidia_smi(columns)
    if output.returncode is None and not os.path.exists(NVIDIA_DRIVER):
        return facts, None  # no such program and no driver: no GPU
    # 0, NVIDIA H100 80GB HBM3, 81559, GPU-8a1b2c3d-..., 550.54.15, Disabled
    rows = [line.split(", ") for line in output.text.splitlines()]
    devices = [_gpu(columns, row) for row in rows if len(row) == len(columns)]
    if output.problem or (rows and not devices and "No devices" not in output.text):
        return dict.fromkeys(CUDA_FACTS), output.problem or "nvidia-smi gave no table"
    header = _run(["nvidia-smi"]).text
    version = re.search(r"CUDA (?:UMD )?Version: *([\d.]+)", header)
    facts.update(available=bool(devices), device_count=len(devices), devices=devices)
    driver = devices[0]["driver_version"] if devices else None
    facts.update(driver_version=driver, version=version[1] if version else None)
    # GPU 0: NVIDIA H100 (UUID: GPU-8a1b...)\n  MIG 1g.10gb Device 0: (UUID: MIG-...)
    parts = re.findall(r"^ +MIG .*", _run(["nvidia-smi", "-L"]).text, re.M)
    facts["mig_devices"] = [part.strip() for part in parts]
    return facts, None


def _nvidia_smi(columns: Sequence[str]) -> _Output:
    query = "--query-gpu=" + ",".join(columns)
    return _run(["nvidia-smi", query, "--format=csv,noheader,nounits"])


def _gpu(columns: Sequence[str], row: Sequence[str]) -> dict[str, Any]:
    """Return a row of nvidia-smi; memory.total in MiB; [N/A] is None."""
    values = [None if text.startswith("[") else text.strip() for text in row]
    facts: dict[str, Any] = {**dict.fromkeys(GPU_FACTS), **dict(zip(columns, values))}
    memory = facts["memory.total"]
    facts["memory.total"] = int(memory) if str(memory).isdigit() else memory
    return facts


CUDA_FACTS = ["available", "version", "device_count", "driver_version", "devices"]
CUDA_FACTS += ["mig_devices"]
GPU_FACTS = ["index", "name", "memory.total", "uuid", "driver_version"]
GPU_FACTS += ["mig.mode.current"]
NVIDIA_DRIVER = "/proc/driver/nvidia/version"


def _loaded_cuda() -> dict[str, Any]:
    """Return what torch, if it is loaded already, says of its CUDA."""
    version = getattr(sys.modules.get("torch.version"), "cuda", None)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    facts = {"torch_cuda_version": version, "visible_devices": visible}
    return {**dict.fromkeys(CUDA_FACTS), **facts}


def _environment(root: str, prefix: str) -> tuple[dict[str, Any], str | None]:
    """Return what made the environment below `prefix`, and the project's lock files."""
    # home = /usr/bin\nuv = 0.4.18\nversion_info = 3.12.1
    uv = _first_match(f"{prefix}/pyvenv.cfg", r"^uv *= *(.+)$")
    conda = os.path.isdir(f"{prefix}/conda-meta")
    venv = os.path.exists(f"{prefix}/pyvenv.cfg")
    manager = "uv" if uv else "conda" if conda else "venv" if venv else None
    installed = os.listdir(f"{prefix}/conda-meta") if conda else []
    packages = sorted(name[:-5] for name in installed if name.endswith(".json"))
    locks = {name: _sha256(os.path.join(root, name)) for name in LOCK_FILES if root}
    return {
        "manager": manager,
        "prefix": prefix,
        "uv_version": uv,
        "conda_environment": os.environ.get("CONDA_DEFAULT_ENV"),
        "conda_packages": packages,  # name-version-build
        "lock_files": {name: digest for name, digest in locks.items() if digest},
    }, None


def _container() -> tuple[dict[str, Any], str | None]:
    """Return the kind of container this is, its image, and the limits of its cgroup."""
    env = os.environ
    apptainer = env.get("APPTAINER_CONTAINER") or env.get("SINGULARITY_CONTAINER")
    # image="docker.io/library/python:3.11"
    podman = _first_match("/run/.containerenv", r'^image="(.*)"')
    kinds = {
        "apptainer": apptainer,
        "podman": os.path.exists("/run/.containerenv"),
        "kubernetes": env.get("KUBERNETES_SERVICE_HOST"),
        "docker": os.path.exists("/.dockerenv"),
    }
    named = [env[name] for name in IMAGE_VARIABLES if env.get(name)]
    quota, _, period = str(_cgroup_limit("cpu.max") or "").partition(" ")
    cpus = int(quota) / int(period) if quota.isdigit() and period.isdigit() else None
    return {
        "kind": next((kind for kind, holds in kinds.items() if holds), None),
        "image": podman or apptainer or next(iter(named), None),
        "cpu_limit": cpus,
        "memory_limit_bytes": _cgroup_limit("memory.max"),
    }, None


# Where an image is told to those inside: SLURM's pyxis, GitLab, hubs of notebooks.
IMAGE_VARIABLES = ["SLURM_CONTAINER_IMAGE", "CONTAINER_IMAGE", "CI_JOB_IMAGE"]
IMAGE_VARIABLES += ["JUPYTER_IMAGE", "DOCKER_IMAGE", "IMAGE_NAME"]


def _cgroup_limit(name: str) -> str | int | None:
    """Return the nearest limit of that name, of cgroup v2, that is set for us."""
    # 0::/system.slice/slurmstepd.scope/job_7/step_0
    folder = str(_first_match("/proc/self/cgroup", r"^0::(/.*)$") or "")
    while folder:
        limit = _first_match(f"/sys/fs/cgroup{folder}/{name}", r"^(\d.*)$")
        if limit is not None:
            return limit
        folder = folder.rpartition("/")[0]
    return _first_match(f"/sys/fs/cgroup/{name}", r"^(\d.*)$")


def _determinism() -> dict[str, Any]:
    """Return seeds and flags that loaded modules have; nothing is drawn or imported.

    A state that no seed tells is told by a number, equal where the state is.
    """
    facts = {name: _loaded(path) for name, path in _DETERMINISM.items()}
    for name in ("PYTHONHASHSEED", "CUBLAS_WORKSPACE_CONFIG"):
        facts[name] = os.environ.get(name)
    facts["hash_randomization"] = bool(sys.flags.hash_randomization)
    state = _loaded("random.getstate")  # (3, 625 numbers, None)
    facts["random_state"] = _state_number(state[1]) if state else None
    state = _loaded("numpy.random.get_state")  # ("MT19937", 624 numbers, 624, 0, 0.0)
    numbers = [*map(int, state[1].tolist()), int(state[2])] if state else [0]
    facts["numpy_state"] = _state_number(numbers) if state else None
    # Seeded and not used since: init_genrand of Matsumoto and Nishimura's mt19937ar.c.
    seed = numbers[0]
    then = (1812433253 * (seed ^ (seed >> 30)) + 1) & 0xFFFFFFFF
    fresh = len(numbers) == 625 and numbers[-1] == 624 and numbers[1] == then
    facts["numpy_seed"] = seed if fresh else None
    return facts


_DETERMINISM = {
    "torch_seed": "torch.initial_seed",
    "torch_deterministic": "torch.are_deterministic_algorithms_enabled",
    "torch_cudnn_deterministic": "torch.backends.cudnn.deterministic",
    "torch_cudnn_benchmark": "torch.backends.cudnn.benchmark",
    "torch_float32_matmul_precision": "torch.get_float32_matmul_precision",
}


def _loaded(path: str) -> Any:
    """Read `torch.backends.cudnn.benchmark` if it is loaded; call a function.

    A module is not asked for what it lacks: numpy would import numpy.random.
    """
    module, *names = path.split(".")
    value: Any = sys.modules.get(module)
    with contextlib.suppress(Exception):  # a stub, another version, a broken install
        for name in names:
            lazy = type(value) is type(sys)
            value = vars(value).get(name) if lazy else getattr(value, name, None)
        return value() if callable(value) else value
    return None


def _state_number(numbers: Sequence[int]) -> str:
    """Return a number for a state; Python's hash of integers is the same everywhere."""
    return f"{hash(tuple(numbers)) & 0xFFFFFFFFFFFFFFFF:016x}"


def _late_determinism(before: Mapping[str, Any]) -> dict[str, Any]:
    """Return, for status.json, the seeds and flags that were set after entry."""
    facts = _determinism() if before else {}
    set_since = {k: v for k, v in facts.items() if v not in (None, before.get(k))}
    new = {k: v for k, v in set_since.items() if k not in _UNEQUAL}
    return {"determinism": new} if new else {}


def _python() -> dict[str, Any]:
    return {
        "version": sys.version,
        "executable": sys.executable,
        "implementation": sys.implementation.name,
        "prefix": sys.prefix,
        "flags": {k: v for k in _FLAGS if (v := getattr(sys.flags, k, None))},
        "torch": getattr(sys.modules.get("torch"), "__version__", None),
        "numpy": getattr(sys.modules.get("numpy"), "__version__", None),
    }


_FLAGS = ("dev_mode", "isolated", "no_site", "optimize", "safe_path", "utf8_mode")


def _platform() -> dict[str, Any]:
    """Return the keys of the platform module, and CPU and memory."""
    name = os.uname() if hasattr(os, "uname") else None
    known = dict.fromkeys(("platform", "system", "machine", "release"))
    known["platform"] = _platform_name()
    if name is not None:
        known.update(system=name.sysname, release=name.release, machine=name.machine)
    affinity = getattr(os, "sched_getaffinity", None)
    return {
        **known,
        "processor": _first_match("/proc/cpuinfo", r"^model name\s*: (.*)"),
        "cpu_count": os.cpu_count(),
        "usable_cpus": len(affinity(0)) if affinity else None,
        "memory_kib": _first_match("/proc/meminfo", r"^MemTotal:\s*(\d+)"),
    }


def _platform_name() -> str:
    """Return "Linux-6.1.0-x86_64"."""
    name = os.uname() if hasattr(os, "uname") else None
    return f"{name.sysname}-{name.release}-{name.machine}" if name else sys.platform


def _first_match(path: str, pattern: str) -> str | int | None:
    """Return the first group of `pattern` in a small file; digits as a number."""
    with contextlib.suppress(OSError, ValueError):
        found = re.search(pattern, Path(path).read_text("utf-8"), re.M)
        if found:
            return int(found[1]) if found[1].isdigit() else found[1]
    return None


def _hostname() -> str:
    return os.uname().nodename if hasattr(os, "uname") else ""


def _user() -> str:
    """Return the name of the user, "uid:54321" where the system has none."""
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        if os.environ.get(name):
            return os.environ[name]
    try:
        import pwd

        return pwd.getpwuid(os.getuid()).pw_name
    except (ImportError, KeyError):
        return f"uid:{os.getuid()}" if hasattr(os, "getuid") else "unknown"


def _launcher(env: Mapping[str, str]) -> dict[str, Any]:
    """Return the ids that a scheduler or launcher gave this process."""
    prefixes = (
        "SLURM_", "TORCHELASTIC_", "OMPI_COMM_WORLD_", "PMI_", "PMIX_", "PALS_", "PBS_",
        "LSB_", "FLUX_", "SGE_TASK_", "POD_", "JOB_COMPLETION_",
    )  # fmt: skip
    names = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "JOB_ID"]
    names += ["MASTER_PORT", "KUBERNETES_SERVICE_HOST", "NODE_NAME", "PYTHONHASHSEED"]
    return {k: env[k] for k in sorted(env) if k.startswith(prefixes) or k in names}


class _Output:
    """What a program printed, how it ended, and in a sentence what went wrong."""

    def __init__(self, program: str) -> None:
        self.program = os.path.basename(program)
        self.returncode: int | None = None
        self.problem: str | None = None
        self.printed = {1: bytearray(), 2: bytearray()}

    @property
    def data(self) -> bytes:
        return bytes(self.printed[1])

    @property
    def text(self) -> str:
        return self.data.decode("utf-8", "surrogateescape")

    def read(self, child: subprocess.Popen[bytes], timeout: float, limit: int) -> None:
        """Collect what the child prints until it ends or passes a limit.

        A grandchild that keeps the pipe open is not waited for.
        """
        pipes: list[Any] = [child.stdout, child.stderr]
        streams = {pipe.fileno(): n + 1 for n, pipe in enumerate(pipes)}
        deadline, ended, pause = time.monotonic() + timeout, False, 0.0001
        poller = select.poll()
        for descriptor in streams:
            poller.register(descriptor, select.POLLIN)
        while streams or not ended:
            ended = child.poll() is not None
            ready = poller.poll(0 if ended or not streams else 50)
            for descriptor, _ in ready:
                data = os.read(descriptor, 65536)
                self.printed[streams[descriptor]] += data
                if not data:
                    poller.unregister(descriptor)
                    del streams[descriptor]
            if max(map(len, self.printed.values())) > limit:
                self.problem = f"{self.program} printed more than {limit} bytes"
            elif time.monotonic() > deadline:
                self.problem = f"{self.program} did not end within {timeout:g} s"
            if self.problem or (ended and not ready):
                return
            if not streams:  # its end is not announced, but most often due at once
                time.sleep(pause)
                pause = min(2 * pause, 0.05)


def _run(
    argv: Sequence[str], cwd: str | None = None, env: Mapping[str, str] | None = None,
    timeout: float | None = None, limit: int | None = None, stdin: Any = None,
) -> _Output:
    """Start a foreign program, the only way here; kill it at its limits."""
    output = _Output(argv[0])
    import subprocess  # here and below: commands that only read go without

    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    pipes.update(stdin=stdin or subprocess.DEVNULL, start_new_session=True)
    try:
        child = subprocess.Popen(argv, cwd=cwd, env=env, **pipes)
    except (OSError, ValueError) as error:
        output.problem = f"{output.program} cannot be started: {error}"
        return output
    try:
        output.read(child, timeout or PROGRAM_SECONDS, limit or PROGRAM_BYTES)
        if output.problem is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):  # stuck in the kernel
            output.returncode = child.wait(0.5)
    except OSError as error:
        output.problem = f"{output.program}: {error}"
    finally:
        for pipe in filter(None, (child.stdout, child.stderr)):
            pipe.close()
    if output.returncode and not output.problem:
        lines = output.printed[2].decode("utf-8", "replace").strip().splitlines()
        fatal = [line for line in lines if line.startswith("fatal:")] or lines[-1:]
        said = f": {fatal[0][:200]}" if fatal else ""
        output.problem = f"{output.program} ended with status {output.returncode}{said}"
    return output


# === Lineage ===
# Which run fed which: found in config values and argv, recorded in the consumer only.
# Who used a run is found when it is asked for.


def _inputs(
    config: Any, argv: Sequence[str], run_dir: Path, cwd: str | None = None
) -> list[dict[str, Any]]:
    """Return an entry for each existing path of another run that a run was given.

    Looked at are the strings of the config, in lists too, and the words of the command
    line: ``a/b.pt``, ``--init=a/b.pt``, ``key=a.pt,b.pt``, relative to `cwd`.
    """
    own = os.path.realpath(run_dir)
    entries: dict[str, dict[str, Any]] = {}
    for _, (key, text) in zip(range(MAX_INPUTS), _named(config or {}, argv)):
        for path in _existing_paths(text, cwd or ""):
            producer = _run_of(path)
            if producer is not None and os.path.realpath(producer) != own:
                entry = _input(key, path, producer, run_dir)
                entries.setdefault(os.path.join(producer, entry["path"]), entry)
    return list(entries.values())


def _named(config: Any, argv: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield the strings of a config with their dotted keys, then those of argv."""
    for key, value in config.items():
        yield from _strings(key, value) if key != "command" else ()
    for word in argv[1:]:
        yield "argv", word


def _existing_paths(text: str, cwd: str) -> Iterator[Path]:
    """Yield what exists of "a/b.pt", "--init=a/b.pt", "key=a.pt,b.pt"."""
    value = text.partition("=")[2]
    parts = [text, value, *text.split(","), *value.split(",")]
    for part in dict.fromkeys(parts if "," in text else parts[:2]):
        path = os.path.join(cwd, os.path.expanduser(part))
        if part and len(part) <= 4096 and "\0" not in part and os.path.exists(path):
            yield Path(os.path.abspath(path))


def _strings(key: str, value: Any) -> Iterator[tuple[str, str]]:
    """Yield the strings in plain data with their dotted keys; lists have no own."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from _strings(f"{key}.{name}", item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(key, item)


def _input(key: str, path: Path, producer: Path, run_dir: Path) -> dict[str, Any]:
    """Return the entry of `inputs` in metadata.json for a file of another run."""
    inside = os.path.relpath(path, producer)
    if inside.startswith(os.pardir):  # a link into the run
        inside = os.path.relpath(os.path.realpath(path), os.path.realpath(producer))
    info = path.stat() if path.exists() else None
    return {
        "key": key,
        "run": producer.name,
        "run_dir": str(producer),
        "relative": os.path.relpath(producer, run_dir),  # holds when a tree is moved
        "path": inside,
        "size": info.st_size if info and stat.S_ISREG(info.st_mode) else None,
        "mtime": _utc(info.st_mtime) if info and stat.S_ISREG(info.st_mode) else None,
        "status": _status_now(producer).get("status"),
    }


def _warn_of_inputs(inputs: Iterable[Mapping[str, Any]]) -> None:
    """Say which inputs come from a run that failed, is lost or is superseded."""
    for entry in inputs:
        why = [entry["status"]] if entry["status"] in ("failed", "lost") else []
        tags = _tags(_read_lines(Path(entry["run_dir"]) / "notes.jsonl"))
        why += [tag for tag in tags if tag == "superseded"]
        if why:
            what = f"{entry['key']}={entry['path']} comes from {entry['run']}"
            _warn(f"{what}, which is {' and '.join(why)}")


def _record_use(artifact: Path, consumer: str | None, reason: str | None) -> None:
    """Record on both sides that the run `consumer` used a file of another run."""
    artifact = artifact.absolute()
    producer = _run_of(artifact)
    if producer is None:
        return
    folder = producer / "artifacts"
    inside = artifact.is_relative_to(folder)
    path = os.path.relpath(artifact, folder if inside else producer)
    about = {"artifact_relpath": path, "consumer_run_dir": consumer, "reason": reason}
    if consumer is not None and Path(consumer).absolute() != producer:
        with _tolerating("inputs of metadata.json"):
            _add_input(Path(consumer).absolute(), artifact, producer)
    who = {"when": _utc(), **about, "host": _hostname(), "user": _user()}
    with contextlib.suppress(OSError):  # the producer's tree may be read-only
        folder.mkdir(exist_ok=True)
        _append_line(folder / "USED_BY.jsonl", who)
        _append_index(_index_row(producer), "artifact_used", None, **about)


def _add_input(run_dir: Path, artifact: Path, producer: Path) -> None:
    """Add a file of another run, as it is now, to `inputs` of metadata.json, once."""
    entry = _input("mark_artifact_used", artifact, producer, run_dir)
    recording = _active_for(run_dir)
    if recording is not None and recording.recorder is not None:
        recording.recorder.ask("wait", "captured")  # it writes the same file
    metadata = _read_json(run_dir / "metadata.json")
    if metadata is None:
        return
    inputs = metadata.setdefault("inputs", [])
    same = ("run_dir", "path", "size", "mtime")
    if all([old.get(k) for k in same] != [entry[k] for k in same] for old in inputs):
        inputs.append(entry)
        _write_json(run_dir / "metadata.json", metadata)
        _append_index(_index_row(run_dir), "artifact_used", None)
        _warn_of_inputs([entry])


class _Lineage:
    """Which runs below a results root used which, read from the runs themselves."""

    def __init__(self, root: Path, run: Path | None = None) -> None:
        """Read all runs below `root`, or only what tells who used `run`."""
        self.root = root
        self.named: dict[str, str] = {}  # where the run of a name is
        # (producer, consumer): the files
        self.edges: dict[tuple[Path, Path], list[str]] = {}
        since = _started(run) if run else ""
        for line in _stamped_runs(root, known=_runs_without_inputs(root)):
            path = line[STAMP_WIDTH:]
            if line[:15] > since:
                consumer = Path(path)
                for entry in _read_inputs(consumer):
                    producer = self.producer(entry, consumer)
                    self.add(producer, consumer, str(entry["path"]))
        for path in [str(run)] if run else _walk_runs(root):
            if os.path.exists(f"{path}/artifacts/USED_BY.jsonl"):
                self.add_users(Path(path))

    def add_users(self, producer: Path) -> None:
        """Add what mark_artifact_used, ours or the ancestors', left in a producer."""
        for row in _read_lines(producer / "artifacts" / "USED_BY.jsonl"):
            consumer = Path(str(row.get("consumer_run_dir") or "?"))
            consumer = consumer if _is_run(consumer) else self.find(consumer)
            self.add(producer, consumer, f"artifacts/{row.get('artifact_relpath')}")

    def add(self, producer: Path, consumer: Path, path: str) -> None:
        paths = self.edges.setdefault((producer, consumer), [])
        paths += [path] if path not in paths[:MAX_INPUTS] else []

    def producer(self, entry: Mapping[str, Any], consumer: Path) -> Path:
        """Return where the producer is now: moved with us, in its place, or renamed."""
        path = Path(str(entry.get("run_dir", "?")))
        beside = Path(os.path.normpath(consumer / str(entry.get("relative", "?"))))
        for place in (beside, path):
            if place.name == entry.get("run") and _is_run(place):
                return Path(os.path.realpath(place))
        return self.find(path)

    def find(self, path: Path) -> Path:
        """Return the run that had this name; the path itself when there is none."""
        if not self.named:
            runs = _walk_runs(self.root)
            self.named.update({os.path.basename(run): run for run in runs})
        if path.name not in self.named:
            for run in list(self.named.values()):  # a renamed one knows its first name
                name = (_read_json(Path(run, "status.json")) or {}).get("run")
                self.named.setdefault(str(name), run)
        return Path(self.named.get(path.name, path))

    def walk(self, start: Path, users: bool) -> Iterator[tuple[int, Path, str]]:
        """Yield (depth, run, file) from `start` on; a run met again is not entered."""
        following: dict[Path, list[tuple[Path, str]]] = {}
        for (producer, consumer), paths in sorted(self.edges.items()):
            here, there = (producer, consumer) if users else (consumer, producer)
            following.setdefault(here, []).append((there, _format_paths(paths)))
        seen, waiting = {start}, [(1, *step) for step in following.get(start, [])[::-1]]
        while waiting:
            depth, run, path = waiting.pop()
            again = run in seen
            yield depth, run, path + " (see above)" * again
            if not again:
                seen.add(run)
                steps = following.get(run, [])[::-1]
                waiting += [(depth + 1, *step) for step in steps]


def _read_inputs(run_dir: Path) -> list[dict[str, Any]]:
    """Return `inputs` of metadata.json; of an ancestor's run, what its config names."""
    with contextlib.suppress(OSError):
        if b'"inputs": []' in _read_bytes(run_dir / "metadata.json"):
            return []
    run = Run(run_dir)
    inputs = run.metadata.get("inputs")
    if inputs is None and run.config:
        words, cwd = _texts(run.metadata.get("argv")), run.metadata.get("working_dir")
        cwd = cwd if isinstance(cwd, str) and os.path.isabs(cwd) else "/"
        return _inputs(run.config, words, run_dir, cwd)
    entries = inputs if isinstance(inputs, list) else []
    return [entry for entry in entries if isinstance(entry, dict) and "path" in entry]


def _runs_without_inputs(root: Path) -> set[str]:
    """Return the paths of runs that used no other run, as the index tells."""
    idle, used = set(), set()
    with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
        raw = stack.enter_context(_opened(root / INDEX_FILE, MAX_INDEX))
        for line in stack.enter_context(io.BufferedReader(raw, FORWARD_BYTES)):
            # {..., "path": "exp/train-20260131-142501", "inputs": []}
            if line.endswith(b'", "inputs": []}\n'):
                idle.add(line[line.rfind(b'"path": "') + 9 : -17])
            elif b'", "inputs": ["' in line:
                used.add(line[line.rfind(b'"path": "') + 9 :].partition(b'"')[0])
    return {f"{root}/{os.fsdecode(path)}" for path in idle - used}


# === Redaction ===
# No secret reaches the disk: by the name of a value, by the shape of a token, in URLs,
# and wherever a value once found secret turns up again. Numbers are never secrets.

REDACTED = "<REDACTED>"
_known_secrets: set[str] = set()  # every value found secret by this process


def _redact(value: Any, name: str = "") -> Any:
    """Return plain data of the same shape without secrets; `name` is its key."""
    if isinstance(value, dict):
        return {_redact_text(k): _redact(v, k) for k, v in value.items()}
    if isinstance(value, list):
        if name == "argv":
            return _redact_argv(value)
        return [_redact(item, name) for item in value]
    if not isinstance(value, str):
        return value
    if name == "command":  # a shell command is redacted as the list that it is
        with contextlib.suppress(ValueError):
            argv = shlex.split(value)
            if shlex.join(argv) == value:
                return shlex.join(_redact_argv(argv))
    return _secret(value) if _is_secret(name, value) else _redact_text(value)


def _redact_argv(argv: Sequence[Any]) -> list[Any]:
    """Redact a command line: `--flag value`, `--flag=value`, `key=value`, headers."""
    words, flag = [], ""
    for word in argv:
        if not isinstance(word, str):  # in a config of somebody
            words.append(_redact(word, flag))
            continue
        option = re.match(r"([-+]{0,2}[A-Za-z0-9_][\w.@/-]{0,100})=(.*)", word, re.S)
        if flag and not word.startswith("-") and _is_secret(flag, word):
            words.append(_secret(word))
        elif option:
            words.append(f"{option[1]}={_redact(option[2], option[1])}")
        else:
            words.append(_redact_text(word))
        flag = word if re.match(r"--?[A-Za-z0-9]", word) and not option else ""
    return words


def _redact_text(text: str) -> str:
    """Return a text without the secrets that can be told by their shape or place."""
    if len(text) < MIN_SECRET:
        return text
    text = _redact_shapes(_cut_middle(text, MAX_REDACTED))
    for secret in sorted(_known_secrets, key=len, reverse=True):
        text = text.replace(secret, REDACTED)
    return text


def _redact_bytes(data: bytes) -> bytes:
    """Return the content of a file without secrets."""
    text = data.decode("utf-8", "surrogateescape")
    clean = _redact_whole(text)
    return data if clean == text else clean.encode("utf-8", "surrogateescape")


def _redact_whole(text: str) -> str:
    """Return a text of any length without secrets.

    Words do not become known: in code, `token = "resnet50-base"` names a model.
    """
    before = set(_known_secrets)
    text = _redact_shapes.__wrapped__(text)
    found = _known_secrets - before
    many = len(found) > MAX_LEARNED or len(_known_secrets) > 10 * MAX_LEARNED
    _known_secrets.difference_update([v for v in found if many or _is_words(v)])
    for secret in sorted(_known_secrets, key=len, reverse=True):
        text = text.replace(secret, REDACTED)
    return text


def _replace_known(data: bytes) -> bytes:
    for secret in sorted(_known_secrets, key=len, reverse=True):
        value = secret.encode("utf-8", "surrogateescape")
        data = data.replace(value, REDACTED.encode())
    return data


_compiled = functools.cache(re.compile)  # when first needed: 6 ms


@functools.lru_cache(maxsize=512)  # the environment is first searched, then written
def _redact_shapes(text: str) -> str:
    for hint, pattern, replace in _TEXT_RULES:
        if hint in text:
            text = _compiled(pattern).sub(replace, text)
    return text


def _cut_middle(text: str, limit: int) -> str:
    """Keep both ends of a long text, and no piece of a token at the cut."""
    if len(text) <= limit:
        return text
    head, tail = text[: limit // 2], text[-limit // 2 :]
    head = head[: max(head.rfind(" "), head.rfind("\n"), len(head) - 4096)]
    spaces = [place for place in (tail.find(" "), tail.find("\n")) if place >= 0]
    tail = tail[min(spaces, default=len(tail)) :]
    return f"{head}... {len(text) - len(head + tail)} characters ...{tail}"


def _secret(value: str) -> str:
    """Return the marker, and remember what it stands for."""
    peculiar = re.search(r"\d|[a-z][A-Z]|[^\w\s]", value[:4096])
    if MIN_SECRET <= len(value) < 65536 and peculiar and not _is_harmless(value):
        _known_secrets.add(value)
    return REDACTED


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
# Words that make a name secret wherever they stand; `token` needs a value like one.
_STRONG = r".*(password|passwd|passphrase|passcode|credentials?|apikey|token|secrets?)"
# Words that do so at the end, and what makes a `key` secret.
_WEAK = _words(
    "pass pw pwd pat sas psk auth authorization bearer cookie jwt")
_KEY_OF = _words(
    """api access private secret signing encryption master license account storage
    application app deploy fernet auth service subscription ssh shared admin client
    consumer session root webhook""")
# Words at the end of a name whose value only tells something about a secret.
_ABOUT = _words(
    """id ids name file path dir folder url uri host type types len length size
    count limit num ttl expiry enabled disabled required policy version algorithm
    backend provider manager field column columns prefix suffix pattern format mode
    level rate seconds timeout budget index dim dtype class free""")
# The tokens of language models.
_ROLES = _words(
    """pad eos bos unk mask sep cls image video audio stop start end special eot
    sot prefix middle suffix max min per num next first last think tool""")


def _is_secret(name: str, value: str) -> bool:
    """Return whether a value under this name is a secret."""
    words = [word.lower() for word in _WORDS.findall(name[-200:])]
    if len(value) < 4 or not words or words[-1] in _ABOUT or _is_harmless(value):
        return False
    last, before = words[-1], ["", *words][-2]
    if last == "key":
        return before != "public" and _is_mixed(value, 8 if before in _KEY_OF else 20)
    if last.endswith("token"):
        return before not in _ROLES and _is_mixed(value, 6)
    strong = _compiled(_STRONG).fullmatch
    if strong(last):
        return True
    keys = any(a in _KEY_OF and b == "key" for a, b in zip(words, words[1:]))
    if keys or any(map(strong, words)):
        return _is_mixed(value, 8)
    short = last.endswith(("pw", "pwd", "pass")) and len(value) >= 8
    return (short or last in _WEAK) and _is_mixed(value, 6)


def _is_mixed(value: str, length: int) -> bool:
    """Return whether a value looks chosen by a machine, or as a password is."""
    mixed = re.search(r"\d|[a-z][A-Z]|[^\w\s.]", value[:4096])
    long = len(value) >= 20 and not _is_name(value)
    return len(value) >= length and (long or bool(mixed))


_HARMLESS = (  # numbers, placeholders, public keys, paths, names of files
    r"(?s)[-+]?[\d.,_]+([eE][-+]?\d+)?|0[xX][\da-fA-F]{1,16}|[*/-]+|[xX]+|"
    r"(?i:true|false|yes|no|on|off|none|null|nan)|"
    r"<[^<>]*>|\[[^\]]*\]|\$\w+|\$?\{[^\"]*\}|(ssh-\w+|ecdsa-\S+) AAAA.*|"
    r"(file:|unix:)?(~|\.{1,2}|[A-Za-z]:)?([/\\](?=[\w.@%+-]*[A-Za-z])"
    r"[\w.@%+-]{1,64}){1,32}/?|[\w-]+(\.[\w-]+)*\.(json|ya?ml|txt|pem|key|env|toml)"
)


def _is_harmless(value: str) -> bool:
    return len(value) < 4096 and bool(_compiled(_HARMLESS).fullmatch(value))


_MARKED = (
    r"(?i)(^|[-_.])(live|test|prod|sandbox|secret|api|pat|tkn|token|oauth|pw|key|sk"
    r"|[a-z]*seck)(?=[-_.])"
)
_HASH = (
    r"(?i)(sha\d*|md5|commit|rev|git|hash|digest|blob|run|job|exp|ckpt|model|id|v\d*"
    r"|img|env|step|layer|snapshot|checkpoint|version|data|cache|tmp|build|node|ver)"
)


def _is_token(text: str) -> bool:
    """Return whether a word is `prefix-random`, the shape providers give to tokens.

    >>> _is_token("acme_live_" + "a1B2c3D4" * 3), _is_token("Qwen2-VL-7B-Instruct-Int4")
    (True, False)
    """
    prefix, *rest = re.split(r"[-_.~]", text)
    if re.fullmatch(r"sha\d+", prefix):
        return False  # of a package, in a lock file
    need = 10 if _compiled(_MARKED).search(text) else 16
    longest = max(rest, key=len, default=text)  # without a prefix it must be long
    if len(longest) < (need if rest else 40) or len(text) < 20:
        return False
    if rest and len(prefix) > 20:
        return False
    if "tile" in text or (not rest and (not text.isalnum() or text[:4] == "AAAA")):
        return False  # tilesize128x128x64 of a CUDA kernel, a public SSH key
    if re.fullmatch(r"[0-9a-f]+|[0-9A-F]+", longest):  # a token, unless it is a hash
        is_hash = not rest or len(rest) > 3 or _compiled(_HASH).fullmatch(prefix)
        return len(longest) >= 32 and not is_hash
    if _is_name(longest):
        return False
    kinds = re.sub(r"[A-Z]", "A", re.sub(r"[a-z]", "a", re.sub(r"\d", "0", longest)))
    changes = sum(a != b for a, b in zip(kinds, kinds[1:]))
    return "0" in kinds and changes * 5 >= len(longest) + (0 if need == 10 else 5)


def _is_name(text: str) -> bool:
    """Return whether a word is made of words, as names in code are: Conv2dBlock3."""
    words, numbers = re.findall("[A-Z]?[a-z]{2,}", text), re.findall(r"\d+", text)
    letters, many = sum(map(len, words)), len(text) >= 24
    in_words = letters >= (0.75 if many else 0.6) * len(text)
    by_chance = many and letters < 4 * len(words)  # their words are short
    return in_words and not by_chance and len(numbers) <= 1 + len(text) / 10


def _is_words(text: str) -> bool:
    """Return whether a text is of words and numbers: resnet50-base_v2, but no h0rse."""
    words = r"((<?[A-Za-z]+\d*|\d+[A-Za-z]{0,3})([-_.,:;/ >]+|$))*"
    return bool(re.fullmatch(words, text))


# What to do with a match: group 1 stays, the last group may be a secret. All are
# functions, since a template imports re, which fails when the interpreter shuts down.


def _redact_rest(match: re.Match[str]) -> str:
    return match[1] + _secret(match[0][len(match[1]) :])


def _redact_userinfo(match: re.Match[str]) -> str:
    scheme, user, password = match.groups()
    if not password and not _is_token(user) and len(user) <= 30:
        return match[0]  # git@github.com
    if re.search(r"[][{}<>]|:(\$\w+|%s)$", password or ""):
        return match[0]  # the template of a URL
    return f"{scheme}{_secret((password or ':' + user)[1:])}@"


def _redact_assignment(match: re.Match[str]) -> str:
    start, name, value = match.groups()
    signed = re.fullmatch(r"(?i)sig|signature|code|x-.*-(signature|credential)", name)
    in_url = start[0] in "?&;"
    quoted = re.search("[=: ][\"']$", start)
    if in_url and signed:
        return start + _secret(value)
    if not (quoted or in_url) and _compiled(_EXPRESSION).match(value):
        return match[0]
    if _is_secret(name, value) and _is_mixed(value, 8):
        return start + _secret(value)
    return match[0]


# In code a name is given what a call, an item, an attribute or another name stands for.
_EXPRESSION = (
    r"[\w.:]*[(\[{]|[^`]*`|[A-Za-z_]\w*(\.[A-Za-z_]\w*)+\W*$|[A-Za-z_]+\W*$"
    r"|[A-Za-z_]\w*[)\]]\W*$"
)


def _redact_token(match: re.Match[str]) -> str:
    return _secret(match[0]) if _is_token(match[0]) else match[0]


# Shapes that are a token by themselves: AWS, Google, JWT, Slack, Hugging Face, Twilio,
# SendGrid, Telegram, Discord, Facebook, Databricks, Mailgun, OpenAI, Stripe, GitLab.
_SHAPES = (
    r"(?:AKIA|ASIA|ABIA|ACCA|A3T[A-Z0-9])[A-Z0-9]{16}|AIza[\w-]{30,}|ya29\.[\w-]{20,}"
    r"|eyJ[\w-]{8,2000}(?:\.[\w-]{2,4000}){1,2}|eyJ[A-Za-z0-9+/_-]{60,8000}={0,2}"
    r"|(?:xox[a-z]|xapp)-[\w-]{10,}|hf_[A-Za-z0-9]{30,}|SG\.[\w.-]{20,}"
    r"|S[Kk][0-9a-fA-F]{32}|\d{8,10}:[\w-]{35}"
    r"|[MNO][\w-]{22,27}\.[\w-]{6,7}\.[\w-]{27,}|EAA[A-Za-z0-9]{60,}"
    r"|dapi[0-9a-f]{32}(?:-\d)?|key-[0-9a-f]{32}|GOCSPX-[\w-]{20,}|sk-[A-Za-z0-9]{20,}"
    r"|gh[a-z]_[A-Za-z0-9]{36,}|npm_[A-Za-z0-9]{36}|API-[A-Z0-9]{26}"
    r"|AGE-SECRET-KEY-1[A-Z0-9]{40,}|[sr]k_(?:live|test)_\w{16,}"
    r"|gl(?:[a-z]{2,6}-[A-Z0-9]|(?:pat|rt|dt|ptt|cbt)-\w)[\w-]{19,}|NRAK-[A-Z0-9]{27}"
    r"|[a-z]{2,12}_pat_[\w-]{20,}|sq0[a-z]{3}-[\w-]{20,}|ATBB[A-Za-z0-9]{32}"
    r"|[A-Za-z0-9]{14}\.atlasv1\.[\w-]{40,}"
)
_NAMED = r"[A-Za-z_][\w.-]{0,80})[\"']{0,2}\]? {0,2}[:=] {0,2}[\"']{0,2})"
_TEXT_RULES: tuple[tuple[str, str, Any], ...] = (  # applied where the first is found
    ("PRIVATE KEY", r"(?s)()-----BEGIN [A-Z ]{0,40}PRIVATE KEY-----.*?"
     r"(?:-----END [^-]*-----|\Z)", _redact_rest),
    ("://", r"(\b[a-zA-Z][\w+.-]{1,20}://)([^\s/@:]{0,200})(:[^\s/@]{1,500})?@",
     _redact_userinfo),
    ("=", r"([?&;]([\w.-]{1,60})=)([^&\s#'\"<>]{4,})", _redact_assignment),
    ("/", r"(/(?:services|webhooks?)/)[\w/-]{24,}", _redact_rest),
    ("", r"(?i)(\b(?:bearer|basic|token) +)(?=[^\s]*\d)[\w.~+/=-]{12,}",
     _redact_rest),
    ("login", r"(\blogin\s{1,9}\S{1,80}\s{1,9}password\s{1,9})\S{6,}", _redact_rest),
    ("", rf"(?<![\w.-])(({_NAMED}([^\s\"',;&}}]{{6,}})", _redact_assignment),
    ("", rf"()(?<![\w/.+-])(?:{_SHAPES})(?![\w])", _redact_rest),
    ("", r"(?<![\w/.+@:~-])[A-Za-z][\w.~=-]{19,600}(?![\w/+(])", _redact_token),
)  # fmt: skip


# === Config and YAML ===
# Any object becomes plain data, and plain data becomes the same text everywhere.


def _config_document(command: str, args: Any) -> dict[str, Any]:
    """Return `command`, the line to paste into a shell, and below it the arguments.

    Arguments that are no mapping, or have a `command` of their own, go under `args`.
    """
    plain = {} if args is None else _plain(args)
    if isinstance(plain, dict) and plain.get("command", command) == command:
        return {"command": command, **plain}
    return {"command": command, "args": plain}


def _plain(value: Any, whole: bool = False) -> Any:
    """Return any object as dict, list, str, int, float, bool or None; never raise.

    It is read once and not changed. What has no natural form becomes its repr. An
    Enum is its value if that is a string, else its name; an IntEnum is its number;
    bytes are b'...'; a lone surrogate is the text `\\udc80`; a key is a string, as
    JSON writes it, with a number added when taken. `whole` lifts the size limits.
    """
    try:
        return _Conversion(1_000_000 if whole else 1).plain(value)
    except RecursionError:
        return "<no room left on the call stack>"


class _Conversion:
    """One conversion: how much may still be written, and the objects around us."""

    def __init__(self, scale: int) -> None:
        self.scale, self.room = scale, MAX_NODES * scale
        self.parents: set[int] = set()

    def plain(self, value: Any) -> Any:
        kind = type(value)  # not isinstance(), which believes a mock's __class__
        self.room -= 1
        if value is None or kind is bool:
            return value
        if issubclass(kind, str):
            text = _clean(str.__str__(value), MAX_TEXT * self.scale)
            self.room -= len(text) // 100  # one text in many places is many texts
            return text
        if issubclass(kind, int):
            bits, value = int.bit_length(value), int.__int__(value)
            fits = bits <= MAX_INT_BITS
            return value if fits else f"<int of {bits} bits, {hex(value)[:40]}...>"
        if issubclass(kind, float):
            return float.__float__(value)
        if id(value) in self.parents:
            return "<cycle>"
        if len(self.parents) >= MAX_DEPTH:
            return f"<{_type_name(kind)} nested too deeply>"
        self.parents.add(id(value))
        try:
            return self.compound(value, kind)
        except Exception:
            return _repr(value)
        finally:
            self.parents.discard(id(value))

    def compound(self, value: Any, kind: Any) -> Any:
        for name in map(_type_name, kind.__mro__):
            if name in _NATURAL:
                return self.plain(_NATURAL[name](value))
        fields = getattr(kind, "_fields", None) if issubclass(kind, tuple) else None
        if hasattr(kind, "__dataclass_fields__"):
            fields = [field.name for field in sys.modules["dataclasses"].fields(kind)]
        elif hasattr(kind, "__attrs_attrs__"):
            fields = [attribute.name for attribute in kind.__attrs_attrs__]
        if fields is not None:
            return self.mapping(fields, lambda name: getattr(value, name))
        is_array = hasattr(kind, "tolist") or hasattr(kind, "iloc")
        if is_array and hasattr(kind, "shape"):
            return self.array(value, kind)
        if hasattr(kind, "keys") and hasattr(kind, "__getitem__"):
            return self.mapping(value.keys(), lambda key: value[key])
        is_set = issubclass(kind, (set, frozenset))
        is_list = issubclass(kind, (list, tuple))
        if is_set or is_list or (kind is range and len(value) <= MAX_ARRAY):
            return self.sequence(value, is_set)
        if hasattr(kind, "__fspath__"):
            return self.plain(os.fspath(value))
        # "<Config object at 0x7f...>" tells nothing, its attributes do.
        if kind.__repr__ is object.__repr__ and getattr(value, "__dict__", None):
            return self.plain(vars(value))
        return _repr(value)

    def mapping(self, keys: Any, read: Any) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key in self.within_limits(keys):
            name = self.plain(key)
            name = name if isinstance(name, str) else json.dumps(name)
            while name in result:
                name += f" ({len(result) + 1})"
            try:
                result[name] = self.plain(read(key))
            except Exception as problem:  # a property, a missing mandatory value
                result[name] = f"<unreadable: {_repr(problem)}>"
        if len(result) < len(keys):
            result["<more>"] = f"<{len(keys) - len(result)} more keys>"
        return result

    def sequence(self, items: Any, is_set: bool) -> list[Any]:
        result = [self.plain(item) for item in self.within_limits(items)]
        if is_set:
            result.sort(key=str)
            with contextlib.suppress(TypeError):  # numbers alone sort as numbers
                result.sort()
        more = len(items) - len(result)
        return result + [f"<{more} more items>"] * (more > 0)

    def within_limits(self, items: Any) -> Iterator[Any]:
        count = range(min(len(items), MAX_ITEMS * self.scale))
        for _, item in list(zip(count, items)):
            if self.room > 0:
                yield item

    def array(self, value: Any, kind: Any) -> Any:
        import math

        shape = tuple(value.shape)
        # tolist() of a table loses its index; a distributed tensor's would wait for
        # the other ranks; one on the device "meta" has no items, and raises.
        remote = kind.__module__.startswith("torch.distributed")
        small = math.prod(shape) <= MAX_ARRAY * self.scale
        with contextlib.suppress(Exception):
            if small and not remote and not hasattr(kind, "iloc"):
                # No number of Python is a numpy time or a long double.
                odd = getattr(value.dtype, "char", "") in ("M", "m", "g", "G")
                return self.plain((value.astype(str) if odd else value).tolist())
        known = [name for name in ("dtype", "device") if hasattr(kind, name)]
        facts = "".join(f" {name}={getattr(value, name)}" for name in known)
        return f"<{_type_name(kind)} shape={shape}{facts}>"


def _clean(text: str, limit: int) -> str:
    if not text.isascii():  # a lone surrogate has no UTF-8 form
        text = text.encode("utf-8", "backslashreplace").decode("utf-8")
    more = len(text) - limit
    return f"{text[:limit]}... <{more} more characters>" if more > 0 else text


def _repr(value: Any) -> str:
    try:
        text = str.__str__(repr(value))
    except Exception as problem:
        text = f"<{_type_name(type(value))}, repr raises {_type_name(type(problem))}>"
    return _clean(re.sub(r" at 0x[0-9A-Fa-f]+", "", text), MAX_REPR)


def _type_name(kind: Any) -> str:
    return type.__repr__(kind)[8:-2]  # "<class 'numpy.ndarray'>"


def _bytes_text(value: Any) -> str:
    more = f"... <{len(value)} bytes>" if len(value) > MAX_REPR else ""
    return repr(bytes(value[:MAX_REPR])) + more


def _omegaconf_container(value: Any) -> Any:
    to_container = sys.modules["omegaconf"].OmegaConf.to_container
    try:
        return to_container(value, resolve=True)
    except Exception:  # an interpolation leads nowhere: all stay as they were written
        return to_container(value, resolve=False)


_NATURAL: dict[str, Any] = {  # by the name of the type or of one of its bases
    name: convert
    for names, convert in (
        ("argparse.Namespace types.SimpleNamespace pydantic.v1.main.BaseModel", vars),
        ("collections.deque array.array dict_keys dict_values dict_items", list),
        ("complex decimal.Decimal fractions.Fraction uuid.UUID", str),
        ("numpy.dtype torch.dtype torch.device", str),
        ("bytes bytearray memoryview", _bytes_text),
        ("datetime.date datetime.time", lambda date: date.isoformat()),
        ("datetime.timedelta", lambda delta: f"PT{delta.total_seconds():f}S"),
        ("enum.Enum", lambda e: e.value if type(e.value) is str else e.name or str(e)),
        ("function method builtin_function_or_method",
         lambda function: f"{function.__module__}.{function.__qualname__}"),
        ("type", _type_name),
        ("module", lambda module: module.__name__),
        ("omegaconf.basecontainer.BaseContainer", _omegaconf_container),
        ("ml_collections.config_dict.config_dict.FieldReference", lambda r: r.get()),
        ("pydantic.main.BaseModel",
         lambda m: {**vars(m), **(getattr(m, "__pydantic_extra__", None) or {})}),
    )
    for name in names.split()
}


def _format_yaml(value: Any) -> str:
    """Return plain data as YAML that readers of 1.1 and of 1.2 read back alike.

    PyYAML lays it out where it can be imported, `_yaml_lines` where it cannot. The
    scalars are written by us, so that both give the same bytes.
    """
    tree = _yaml_tree(value)
    try:
        return _yaml_by_pyyaml(tree)
    except (Exception, SystemExit):  # whatever a broken install or a namesake does
        return "\n".join(_yaml_lines(tree)) + "\n"


def _pyyaml() -> Any:
    """Return PyYAML; a script named yaml.py must not run again."""
    from importlib import import_module, machinery

    found = machinery.PathFinder.find_spec("yaml")
    if not (found and found.submodule_search_locations):
        raise ImportError("PyYAML is not installed")
    return import_module("yaml")


def _yaml_by_pyyaml(tree: Any) -> str:
    yaml = _pyyaml()
    indent = yaml.SafeDumper.increase_indent
    overrides: dict[str, Any] = {
        "increase_indent": lambda self, flow=False, **_: indent(self, flow),
        "check_simple_key": lambda self: len(self.event.value) <= YAML_WIDTH,
        "process_tag": lambda self: None,
        "ignore_aliases": lambda self, data: True,
        "process_scalar": lambda self: self.write_indicator(self.event.value, True),
    }
    layout = {"default_flow_style": False, "sort_keys": False, "allow_unicode": True}
    dumper = type("Dumper", (yaml.SafeDumper,), overrides)
    return str(yaml.dump(tree, Dumper=dumper, width=sys.maxsize, **layout))


def _yaml_lines(tree: Any, first: str = "", rest: str = "") -> Iterator[str]:
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


def _yaml_tree(value: Any) -> Any:
    """Return the same tree, with text for scalars and for lists of one line."""
    if value and isinstance(value, dict):
        return {_yaml_scalar(key): _yaml_tree(item) for key, item in value.items()}
    if value and isinstance(value, list):
        items = [_yaml_tree(item) for item in value]
        if not all(isinstance(item, str) for item in items):
            return items
        text = f"[{', '.join(items)}]"
        return text if len(text) <= YAML_WIDTH else items
    return _yaml_scalar(value)


def _yaml_scalar(value: Any) -> str:
    if isinstance(value, float):  # 1e+16 is a string to YAML 1.1, 1.0e+16 is not
        text = re.sub(r"^(-?\d+)e", r"\1.0e", repr(value))
        return text.replace("inf", ".inf").replace("nan", ".nan")
    text = json.dumps(value, ensure_ascii=False)
    if not isinstance(value, str):
        return text
    plain = _compiled(_YAML_PLAIN).fullmatch(value)
    if plain and not _compiled(_YAML_MISREAD).fullmatch(value):
        return value
    # JSON's escapes and Python's (\xa0, \u2028, \U0001fffe) are YAML's as well.
    hidden: re.Pattern[str] = _compiled(_YAML_HIDDEN)
    return hidden.sub(lambda m: m[0].encode("unicode_escape").decode(), text)


# Colons, commas and sharps have a meaning somewhere, digits and signs start numbers.
_YAML_PLAIN = r"(?a)([A-Za-z_/]|\.\.?/|~/)[\w./+@%=~-]*( [\w./+@%=~-]+)*"
_YAML_MISREAD = "(?i)y|n|yes|no|on|off|true|false|null|none|nan|inf"
# Not shown raw: controls, odd spaces and line ends, marks that turn the direction of
# text, surrogates, non-characters, planes for private use.
_YAML_HIDDEN = (
    "[\x7f-\xa0\xad\u061c\u180e\u2000-\u200b\u200e\u200f\u2028-\u202f\u205f-\u206f"
    "\ud800-\udfff\ufdd0-\ufdef\ufeff\ufff0-\ufffc\ufffe\uffff"
    "\U0001fffe\U0001ffff\U0002fffe\U0002ffff\U0003fffe-\U0010ffff]"
)


def _format_json(value: Any, indent: int | None = 2) -> str:
    """Return plain data as strict JSON; `indent=None` gives one line for JSONL.

    NaN and infinities, which JSON lacks, become "NaN", "Infinity", "-Infinity".
    """
    with contextlib.suppress(ValueError, TypeError, RecursionError):
        text = json.dumps(value, allow_nan=False, indent=indent)
        if "\\ud" not in text:  # jq refuses a lone surrogate
            return text + "\n"
    plain = json.dumps(_plain(value, whole=True))
    return json.dumps(json.loads(plain, parse_constant=str), indent=indent) + "\n"


# === Output ===
# Not a terminal: descriptors 1 and 2 point at the logs and the recorder forwards what
# is appended. A terminal, notebook or test runner: a tee copies writes to the log.


class _Capture:
    """The output of one run: the streams that are captured and their logs."""

    def __init__(self, run_dir: Path, prefix: str = "") -> None:
        self.run_dir, self.prefix = run_dir, prefix  # "rank3." for another rank's logs
        self.streams: list[_Stream] = []
        self.forwards: list[_Forward] = []
        self.recorder: _Recorder | None = None

    def open(self) -> None:
        """Open the logs and remember where output goes; redirect nothing yet."""
        candidates = [_Stream("stdout", 1), _Stream("stderr", 2)]
        streams = [stream for stream in candidates if stream.place is not None]
        together = len(streams) == 2 and streams[0].place == streams[1].place
        for stream in streams:
            name = "output" if together else stream.name
            path = self.run_dir / "logs" / f"{self.prefix}{name}.log"
            path.parent.mkdir(exist_ok=True)
            with contextlib.suppress(OSError):  # a descriptor closed behind sys.stdout
                stream.open(path)
                self.streams.append(stream)
        direct = [stream for stream in self.streams if stream.direct]
        try:
            for stream in direct[:1] if together else direct:
                reader = _open(stream.path, os.O_RDONLY)
                os.lseek(reader, 0, os.SEEK_END)
                self.forwards.append(_Forward(reader, stream.saved.number))
        except OSError:  # nobody would forward: leave it to a tee
            while self.forwards:
                self.forwards.pop().kept[0].close()
            for stream in direct:
                stream.direct = False

    def start(self, recorder: _Recorder | None) -> None:
        """Redirect; without a recorder to forward, everything goes through a tee."""
        self.recorder = recorder
        if any(stream.direct for stream in self.streams):
            _flush_c_streams()
        for stream in self.streams:
            stream.direct = stream.direct and recorder is not None
            stream.start()

    def stop(self) -> None:
        """Put every stream back exactly as it was."""
        for stream in self.streams:
            stream.flush()
        if any(stream.direct for stream in self.streams):
            _flush_c_streams()
        for stream in reversed(self.streams):
            stream.stop()

    def close(self, last_words: str) -> None:
        """Append what Python itself will print, such as a traceback; close the logs."""
        if last_words and self.streams and self.streams[-1].log.is_ours():
            text = _redact_text(last_words).encode("utf-8", "backslashreplace")
            os.write(self.streams[-1].log.number, text)
        opened = [kept for s in self.streams for kept in (s.log, s.saved)]
        for kept in opened + [forward.kept[0] for forward in self.forwards]:
            kept.close()
        self.streams, self.forwards = [], []


class _Stream:
    """sys.stdout or sys.stderr while a run captures it."""

    def __init__(self, name: str, descriptor: int) -> None:
        self.name, self.descriptor = name, descriptor
        self.original = getattr(sys, name)
        self.direct = False  # the descriptor points at the log
        self.log = self.saved = _Kept(-1)
        self.tee: _Tee | None = None
        self.place: object = None  # equal for two streams that go to one place
        if self.original is not None:
            self.place = self
            with contextlib.suppress(AttributeError, OSError, ValueError):
                if self.original.fileno() == descriptor:
                    self.place = _identity(descriptor)
                    self.direct = not os.isatty(descriptor)

    def open(self, path: Path) -> None:
        """Open the log and keep a copy of the descriptor."""
        self.path = path
        self.log = _Kept(_open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT))
        try:
            if self.direct:
                self.saved = _Kept(_above_stderr(os.dup(self.descriptor)))
        except OSError:
            self.log.close()
            raise

    def start(self) -> None:
        if self.direct:
            self.flush()
            os.dup2(self.log.number, self.descriptor)
            _guard(self.original)
        else:
            self.tee = _Tee(self.original, self.log)
            setattr(sys, self.name, self.tee)

    def flush(self) -> None:
        """Write out what Python still buffers, for this stream and its stand-ins."""
        for stream in (getattr(sys, self.name), self.original):
            with contextlib.suppress(AttributeError, OSError, ValueError):
                stream.flush()

    def stop(self) -> None:
        """Put the stream back, or let the run that took it over do so later."""
        if self.tee is not None:
            self.tee.run_utils_log = None  # whoever still holds it writes through it
            stream = self.original
            while isinstance(stream, _Tee) and stream.run_utils_log is None:
                stream = stream.run_utils_original  # the tee of a run that is over
            if getattr(sys, self.name) is self.tee:
                setattr(sys, self.name, stream)
        elif self.direct and self.saved.is_ours():
            if _identity(self.descriptor) == self.log.identity:
                os.dup2(self.saved.number, self.descriptor)
                return
            for other in (s for r in _active for s in r.capture.streams if s.direct):
                if other.saved.is_ours() and other.saved.identity == self.log.identity:
                    os.dup2(self.saved.number, other.saved.number, inheritable=False)
                    other.saved.identity = self.saved.identity


class _Tee:
    """Stand in for a stream: write to it, copy to the log, else be like it."""

    def __init__(self, original: Any, log: _Kept) -> None:
        self.run_utils_original = original
        self.run_utils_log: _Kept | None = log

    def write(self, data: Any) -> Any:
        written = self.run_utils_original.write(data)
        is_text = isinstance(data, str)
        self.copy(data.encode("utf-8", "backslashreplace") if is_text else data)
        return written

    def copy(self, data: bytes) -> None:
        """Append to the log alone; a log that fails is given up."""
        if self.run_utils_log is not None:
            try:
                if not self.run_utils_log.is_ours():
                    raise OSError("the program closed the log")
                _write_all(self.run_utils_log.number, data)
            except OSError as error:
                self.run_utils_log = None
                _warn(f"output is no longer logged: {error}")

    def writelines(self, lines: Iterable[Any]) -> None:
        for line in lines:
            self.write(line)

    @property
    def buffer(self) -> Any:
        log, buffer = self.run_utils_log, self.run_utils_original.buffer
        return buffer if log is None else _Tee(buffer, log)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.run_utils_original, name)

    def __iter__(self) -> Any:
        return iter(self.run_utils_original)


class _LogFile(io.FileIO):
    """Descriptor 1 or 2 below sys.stdout: a log that is full never reaches print."""

    def write(self, data: Any) -> int:
        rest = memoryview(data).cast("B")
        while rest:
            try:
                rest = rest[super().write(rest) or 0 :]
            except OSError as error:
                if not _give_way(self.fileno(), error):
                    raise
        return len(data)


_replaced_files: list[io.FileIO] = []  # collecting one would close the descriptor


def _guard(stream: Any) -> None:
    """Put a `_LogFile` below sys.stdout or sys.stderr.

    The stream object stays the same, so whoever holds it keeps the order of output.
    It cannot be re-initialised while other threads may write to it.
    """
    buffer: Any = getattr(stream, "buffer", None)
    raw = getattr(buffer, "raw", buffer)  # python -u has no buffer in between
    if type(raw) is not io.FileIO or len(sys._current_frames()) > 1:
        return
    below = _LogFile(raw.fileno(), "w", closefd=False)
    below.name = raw.name
    _replaced_files.append(raw)
    if buffer is not raw:
        io.BufferedWriter.__init__(buffer, below)
    else:
        ways = {"line_buffering": stream.line_buffering, "write_through": True}
        stream.__init__(below, stream.encoding, stream.errors, **ways)


def _give_way(descriptor: int, error: OSError) -> bool:
    """Let output go where it went before, since the log cannot be written."""
    for stream, capture in ((s, r.capture) for r in _active for s in r.capture.streams):
        ours = stream.direct and stream.descriptor == descriptor
        ours = ours and _identity(descriptor) == stream.log.identity
        if ours and stream.saved.is_ours():
            if capture.recorder is not None:
                capture.recorder.ask("drain", "drained")
            os.dup2(stream.saved.number, descriptor)
            _warn(f"{stream.name} is no longer logged: {error}")
            return True
    return False


def _flush_c_streams() -> None:
    """Flush C's stdio buffers, so that a `puts` lands in the log of its own run.

    Nobody but ctypes and extension modules can call it; importing ctypes takes long.
    """
    files = [str(getattr(module, "__file__", "")) for module in [*sys.modules.values()]]
    extensions = [f for f in files if f.endswith(".so") and "lib-dynload" not in f]
    with contextlib.suppress(Exception):  # a Python built without ctypes
        if extensions or "ctypes" in sys.modules:
            import ctypes

            ctypes.CDLL(None).fflush(None)


class _Forward:
    """Copies what is appended to a log to where the output went before.

    The position is the file offset of `log`, which parent and recorder share: when one
    dies, the other goes on where it stopped.
    """

    def __init__(self, log: int, target: int) -> None:
        self.log, self.target = log, target
        self.kept = _Kept(log), _Kept(target)
        self.stop_at: int | None = None  # the offset where forwarding ends
        self.broken = False  # the reader went away
        self.wake = threading.Event()  # there is something to do

    def position(self) -> int:
        return os.lseek(self.log, 0, os.SEEK_CUR)

    def run(self) -> None:
        """Forward until `stop_at`; look often while there is output, else rarely."""
        pause = 0.005
        while self.stop_at is None or self.position() < self.stop_at:
            position = self.position()
            size = FORWARD_BYTES if self.stop_at is None else self.stop_at - position
            data = os.pread(self.log, min(size, FORWARD_BYTES), position)
            if data and not self.broken:
                self.broken = not _write_patiently(self.target, data)
            os.lseek(self.log, len(data), os.SEEK_CUR)
            pause = 0.005 if data else min(2 * pause, 0.1)
            if not data and self.wake.wait(pause):
                self.wake.clear()

    def drain(self) -> None:
        """Forward everything that is in the log now."""
        if all(kept.is_ours() for kept in self.kept):
            self.stop_at = os.fstat(self.log).st_size
            self.run()


def _write_patiently(descriptor: int, data: bytes) -> bool:
    """Write all of `data`, however slow the reader; return False if it is gone."""
    failures = 0
    while data and failures < 4:
        try:
            data = data[os.write(descriptor, data) :]
        except BlockingIOError:
            select.select([], [descriptor], [], 1.0)
        except BrokenPipeError:
            return False
        except OSError:
            failures += 1
            time.sleep(0.05)
    return not data


# === Recorder ===
# One helper process per run, started from this file: it asks what is slow to answer,
# keeps the heartbeat, forwards output, and writes down the death of its parent.


class _Recorder:
    """The experiment's end of the recorder: two pipes and no process of its own."""

    def __init__(self, request: dict[str, Any], commands: int, replies: int) -> None:
        self.request = request
        self.commands, self.replies = commands, replies
        self.kept = _Kept(commands), _Kept(replies)
        self.received = b""
        self.gone = False
        self.pid: int | None = None

    @staticmethod
    def start(
        request: dict[str, Any], forwards: Sequence[_Forward]
    ) -> _Recorder | None:
        """Start the recorder; return None, and say why, where that cannot be done."""
        problem = _no_interpreter()
        if os.name != "posix":
            problem = "not a POSIX system"
        elif not os.path.isfile(globals().get("__file__") or ""):
            problem = "run_utils is not a plain file"
        if problem is None:
            try:
                return _spawn_recorder(request, forwards)
            except (OSError, ValueError) as error:
                problem = str(error)
        _warn(f"no recorder ({problem}): its work is done in this process, slower")
        with _tolerating("status.json"):
            path = Path(request["run_dir"]) / "status.json"
            _write_json(path, {**(_read_json(path) or {}), "heartbeat_seconds": None})
        return None

    def ask(self, word: str, answer: str) -> bool:
        """Send a command and wait for its answer; False if the recorder is gone."""
        try:
            if not self.kept[0].is_ours():
                return False  # the program closed it, and opened something else
            os.write(self.commands, word.encode() + b"\n")
        except OSError:
            return False
        return self._wait_for(answer)

    def _wait_for(self, answer: str, seconds: float = 1e6) -> bool:
        wanted, deadline = answer.encode() + b"\n", time.monotonic() + seconds
        poller = select.poll()
        poller.register(self.replies, select.POLLIN)
        while wanted not in self.received:
            left = deadline - time.monotonic()
            if self.gone or left <= 0:
                return False
            if poller.poll(left * 1000):
                data = os.read(self.replies, 65536)
                self.received += data
                self.gone = not data
        before, _, self.received = self.received.partition(wanted)
        if before.startswith(b"pid "):
            self.pid = int(before.split()[1])
        return True

    def finish(self) -> bool:
        """Return True once all is forwarded and on disk, False if it has died."""
        try:
            if not self.ask("end", "drained"):
                return False
            if not self._wait_for("done", EXIT_WAIT_SECONDS) and not self.gone:
                _warn("the recorder is still busy; it completes metadata.json")
            elif self.pid is not None:  # our own child if we are pid 1 of a container
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(self.pid, 0)
            return not self.gone
        finally:
            self.close()

    def close(self) -> None:
        for kept in self.kept:
            kept.close()


def _spawn_recorder(request: dict[str, Any], forwards: Sequence[_Forward]) -> _Recorder:
    """Start the recorder as nobody's child, so that os.wait() never meets it.

    A shell puts it into the background and is gone; what the shell ignores, the
    recorder ignores from its first moment. It runs as a module, so that its compiled
    code is used, from the last place on the path, so that no neighbour of ours takes
    the place of a module of the standard library.
    """
    import subprocess

    commands_end, commands = map(_above_stderr, os.pipe())
    replies, replies_end = map(_above_stderr, os.pipe())
    ends = [commands_end, replies_end]
    pidfd_open: Any = getattr(os, "pidfd_open", None)  # Linux: tells of our death
    with contextlib.suppress(OSError, TypeError):
        ends.append(_above_stderr(pidfd_open(os.getpid())))
    request["watch"] = ends[2] if len(ends) == 3 else None
    request["forwards"] = [(forward.log, forward.target) for forward in forwards]
    folder, name = os.path.split(os.path.abspath(__file__))
    if name == "__init__.py":
        folder, name = os.path.split(folder)
    code = "import sys; sys.path.append(sys.argv[1]); m = __import__(sys.argv[2])"
    python = [sys.executable, "-E", "-S", *["-B"] * sys.dont_write_bytecode]
    if sys.pycache_prefix:
        python += ["-X", f"pycache_prefix={sys.pycache_prefix}"]
    python += ["-c", f"{code}; sys.exit(m.main(sys.argv[3:]))", folder]
    python += [name.partition(".")[0], "--recorder", *map(str, ends[:2])]
    shell = ["/bin/sh", "-c", 'trap "" HUP INT QUIT TERM; "$@" &', "run_utils"]
    passed = [*ends, *(fd for pair in request["forwards"] for fd in pair)]
    quiet: Any = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
    recorder = _Recorder(request, commands, replies)
    try:
        started = subprocess.run(
            [*shell, *python], pass_fds=passed, cwd="/", start_new_session=True, **quiet
        )
        if started.returncode != 0:
            raise OSError("no process could be started")
    except subprocess.SubprocessError as error:
        recorder.close()
        raise OSError(str(error)) from None
    except BaseException:
        recorder.close()
        raise
    finally:
        for descriptor in ends:
            os.close(descriptor)
    _write_patiently(commands, json.dumps(request).encode() + b"\n")
    return recorder


def _recorder_main(commands: int, replies: int) -> int:
    """Be the recorder: `run_utils.py --recorder COMMANDS REPLIES`."""
    for number in FORWARDED_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    line = bytearray()
    while not line.endswith(b"\n"):  # by bytes: the next command may follow at once
        byte = os.read(commands, 1)
        if not byte:
            return 1
        line += byte
    request = json.loads(line)
    _known_secrets.update(request["secrets"])
    return _RecorderProcess(request, commands, replies).run()


class _RecorderProcess:
    """The recorder's own end: one loop for the parent, threads for what may block."""

    def __init__(self, request: dict[str, Any], commands: int, replies: int) -> None:
        self.request, self.commands, self.replies = request, commands, replies
        self.run_dir = Path(request["run_dir"])
        self.forwards = [_Forward(*pair) for pair in request["forwards"]]
        loops = [forward.run for forward in self.forwards]
        self.threads = [threading.Thread(target=run, daemon=True) for run in loops]
        work: Any = {"target": _complete_metadata, "args": (self.run_dir, request)}
        work = {} if request["rank"] else work  # what it asks is asked by rank 0's
        self.captures = threading.Thread(**work, daemon=True)
        self.meeting = _Meeting(**request["meeting"]) if request["meeting"] else None
        self.oom_kills = _oom_kills()

    def run(self) -> int:
        """Serve the parent until its block ends or it dies."""
        self._reply(f"pid {os.getpid()}")
        for thread in [*self.threads, self.captures]:
            thread.start()
        watch, beat, waiting = self.request["watch"], 0.0, False
        poller = select.poll()
        for descriptor in filter(None, (self.commands, watch)):
            poller.register(descriptor, select.POLLIN)
        while True:
            soon = self.meeting is not None and time.monotonic() < self.meeting.until
            pause = RANK_POLL_SECONDS * 1000 if soon else 250
            ready = [descriptor for descriptor, _ in poller.poll(pause)]
            if self.commands in ready:
                words = os.read(self.commands, 4096).split()
                if b"end" in words:
                    return self._finish()
                if b"drain" in words:
                    self._drain()
                    self._reply("drained")
                if not words:  # the parent called exec, or closed what it has open
                    poller.unregister(self.commands)
                waiting = waiting or b"wait" in words
            ticks = self.request["process"]["start_ticks"]
            alive = watch is not None or _is_alive(self.request["pid"], ticks)
            if watch in ready or not alive:
                self._record_death()
                self.meeting = None
                return self._finish()
            if self.meeting is not None:
                self.meeting = self.meeting if self.meeting.answer_all() else None
            if waiting and not self.captures.is_alive():
                waiting = False
                self._reply("captured")
            if time.monotonic() >= beat:
                beat = time.monotonic() + HEARTBEAT_SECONDS
                with contextlib.suppress(OSError):
                    if not self.request["rank"]:
                        os.utime(self.run_dir / "status.json")

    def _drain(self) -> None:
        """Wait until all that is in the logs by now is forwarded."""
        ends = [os.fstat(forward.log).st_size for forward in self.forwards]
        for forward, end in zip(self.forwards, ends):
            forward.wake.set()
            while forward.position() < end:
                time.sleep(0.002)

    def _record_death(self) -> None:
        """Write the end that the parent could not write, unless it just had."""
        rank, row = self.request["rank"], self.request["row"]
        folder = _record_of(self.run_dir, self.request["attempt"])
        path = folder / "status.json"
        path = folder / "logs" / f"rank{rank}.status.json" if rank else path
        with _tolerating("status.json"):
            status = _read_json(path) or {}
            if isinstance(status.get("exit_code"), int):
                return
            seconds = round(time.monotonic() - self.request["begun"], 3)
            ending = _killed(self.request, self.oom_kills)
            ending.update(duration_seconds=seconds, timestamp_utc=_utc())
            prefix = f"rank{rank}." if rank else ""
            ending["last_output"] = _last_output(self.run_dir, prefix)
            if rank:
                return _record_rank(folder, rank, ending, row)
            _write_json(path, {**status, **ending}, durable=True)
            _name_failed_rank(folder)
        with _tolerating("the index"):
            _append_index(row, "end", "failed", "killed")

    def _finish(self) -> int:
        """Forward the rest, let go of the user's descriptors, complete the record."""
        for forward in self.forwards:
            forward.stop_at = os.fstat(forward.log).st_size
            forward.wake.set()
        for forward, thread in zip(self.forwards, self.threads):
            thread.join()
            os.close(forward.target)
        self._reply("drained")
        self.captures.join()
        learned = _known_secrets.difference(self.request["secrets"])
        if learned and not self.request["rank"]:
            folder = _record_of(self.run_dir, self.request["attempt"])
            _redact_again(folder, "status.json", "notes.jsonl")
        self._reply("done")
        status = _read_json(self.run_dir / "status.json") or {}
        if self.meeting is not None and status.get("status") != "failed":
            self.meeting.serve()
        return 0

    def _reply(self, word: str) -> None:
        with contextlib.suppress(OSError):
            os.write(self.replies, word.encode() + b"\n")


def _killed(request: dict[str, Any], oom_kills: int | None) -> dict[str, Any]:
    """Return how the parent died, as far as the kernel tells, for status.json."""
    wait_status = _wait_status(request["pid"], request["watch"])
    problem = "the process ended without leaving the run_context block"
    code = None if wait_status is None else _exit_of(wait_status)
    if code is None or code >= 0:
        problem += "" if code is None else f" (exit status {code})"
        return _outcome("failed", "killed", code, signal=None, problem=problem)
    # The kernel counts what it kills for want of memory.
    starved = -code == signal.SIGKILL and (_oom_kills() or 0) > (oom_kills or 0)
    return _killed_by(-code, ", out of memory" if starved else "")


def _killed_by(number: int, why: str = "") -> dict[str, Any]:
    """Return the keys of status.json for a process that a signal ended."""
    known = {int(item): item.name for item in signal.Signals}
    name = known.get(number, f"signal {number}")
    about = {"signal": name, "problem": f"killed by {name}{why}"}
    return _outcome("failed", "killed", 128 + number, **about)


def _exit_of(wait_status: int) -> int:
    """Return the exit status of a wait status, or -n for signal n."""
    if os.WIFSIGNALED(wait_status):
        return -os.WTERMSIG(wait_status)
    return os.WEXITSTATUS(wait_status)


def _wait_status(pid: int, pidfd: int | None) -> int | None:
    """Return the wait status of a process that is not our child, if Linux tells.

    While it is a zombie, field 52 of /proc/<pid>/stat (proc(5)); once it is reaped,
    ioctl PIDFD_GET_INFO of its pidfd (linux/pidfd.h, Linux 6.15).
    """
    get_info, info_exit = 0xC040FF0B, 8
    for _ in range(20):
        fields = _proc_stat(pid)
        if fields is not None and fields[0] in "ZX":
            return int(fields[49])
        if pidfd is not None and fields is None:
            with contextlib.suppress(Exception):  # an older kernel, no fcntl
                import fcntl

                info = bytearray(info_exit.to_bytes(8, sys.byteorder) + bytes(56))
                fcntl.ioctl(pidfd, get_info, info)
                if int.from_bytes(info[:8], sys.byteorder) & info_exit:
                    return int.from_bytes(info[60:64], sys.byteorder)
        time.sleep(0.01)
    return None


def _proc_stat(pid: int) -> list[str] | None:
    """Return the fields of /proc/<pid>/stat from the third, the state, on."""
    with contextlib.suppress(OSError):
        text = Path(f"/proc/{pid}/stat").read_bytes()
        return text.rpartition(b")")[2].decode("ascii").split()  # names may hold a ")"
    return None


def _oom_kills() -> int | None:
    """Return how often the kernel killed in this cgroup for lack of memory."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/self/cgroup").read_text("utf-8").splitlines():
            _, controllers, group = line.split(":", 2)  # "4:memory:/slurm/job_7"
            if controllers in ("", "memory"):
                place = f"/memory{group}/memory.oom_control"
                place = place if controllers else f"{group}/memory.events"
                text = Path(f"/sys/fs/cgroup{place}").read_text("utf-8")
                return int(re.findall(r"^oom_kill (\d+)", text, re.M)[0])
    return None


def _last_output(run_dir: Path, prefix: str = "") -> list[str]:
    """Return the last lines of the log that is likeliest to say why."""
    for name in ("stderr.log", "output.log", "stdout.log"):
        path = run_dir / "logs" / f"{prefix}{name}"
        with contextlib.suppress(OSError), open(path, "rb") as log:
            log.seek(max(0, os.fstat(log.fileno()).st_size - MAX_MESSAGE))
            lines = log.read().decode("utf-8", "replace").splitlines()
            if lines:
                return lines[-LAST_OUTPUT_LINES:]
    return []


def _is_alive(pid: int, start_ticks: int | None) -> bool:
    """Return whether a process of this host is the one meant, and not a zombie."""
    fields = _proc_stat(pid)
    if fields is not None:
        return fields[0] not in "ZX" and start_ticks in (None, int(fields[19]))
    try:
        if not os.path.exists("/proc/self/stat") and os.name == "posix":
            os.kill(pid, 0)  # macOS; on Windows it would end the process
            return True
    except OSError as error:
        return isinstance(error, PermissionError)
    return False


def _process_identity(pid: int) -> dict[str, Any]:
    """Return what tells a process from a later one with the same pid."""
    fields = _proc_stat(pid)
    return {**_boot(), "start_ticks": int(fields[19]) if fields else None}


@functools.cache
def _boot() -> dict[str, Any]:
    """Return what numbers of processes are relative to."""
    facts = dict.fromkeys(("boot_id", "pid_namespace"))
    with contextlib.suppress(OSError):
        facts["boot_id"] = _first_match("/proc/sys/kernel/random/boot_id", r"^(\S+)")
        facts["pid_namespace"] = os.readlink("/proc/self/ns/pid")
    return facts


# === Index and notes ===
# `<results root>/index/runs_index.jsonl` has one line per event. It is a cache: the
# directories are the truth, and readers skip lines that are torn or out of date.


def _results_root(base_dir: Path) -> Path:
    """Return the nearest directory with an index, else named "results", else itself."""
    above = [base_dir, *base_dir.parents]
    indexed = [path for path in above if (path / INDEX_FILE).is_file()]
    return [*indexed, *(path for path in above if path.name == "results"), base_dir][0]


def _index_row(run_dir: Path, root: Path | None = None) -> dict[str, Any]:
    """Return what the lines of one run in the index have in common."""
    root = root or _results_root(run_dir.parent)
    metadata = _read_json(run_dir / "metadata.json")
    inputs = (metadata or {}).get("inputs")
    used = inputs if isinstance(inputs, list) else []
    return {
        "event": None, "timestamp_utc": None, "run_dir": str(run_dir),
        "run_basename": run_dir.name, "experiment_name": run_dir.parent.name,
        "env_name": run_dir.parent.parent.name, "results_root": str(root),
        "hostname": _hostname(), "user": _user(), "pid": os.getpid(),
        "git_commit_short": _mapping(metadata, "git").get("commit_short"),
        "script_name": _script_name(), "status": None, "exit_reason": None,
        "path": os.path.relpath(run_dir, root),  # holds when the tree is moved
        "inputs": [str(e.get("run")) for e in used if isinstance(e, dict)],
    }


def _append_index(
    row: Mapping[str, Any], event: str, status: str | None, why: Any = None, **more: Any
) -> None:
    """Append one event of a run to the index of its results root."""
    path = Path(row["results_root"]) / INDEX_FILE
    path.parent.mkdir(exist_ok=True)
    facts = {"event": event, "timestamp_utc": _utc(), "status": status}
    if event == "end":  # the start has told it
        row = {key: value for key, value in row.items() if key != "inputs"}
    _append_line(path, {**row, **facts, "exit_reason": why, **more})


def _rebuilt_index(root: Path) -> list[dict[str, Any]]:
    """Return one "backfill" line for each run directory below `root`, oldest first."""
    rows = []
    for run in reversed(find_runs(root)):
        row = _index_row(run.path, root)
        row.update(event="backfill", timestamp_utc=run.status.get("timestamp_utc"))
        for key in ("status", "exit_reason", "hostname", "user", "script_name"):
            row[key] = run[key]
        row["inputs"] = [str(entry.get("run")) for entry in _read_inputs(run.path)]
        rows.append({**row, "pid": run.status.get("pid")})
    return rows


def _replace_index(path: Path, size: int, rows: Iterable[Mapping[str, Any]]) -> None:
    """Put rows in the place of the first `size` bytes; what runs append stays."""
    path.parent.mkdir(exist_ok=True)
    lines = [_format_json(_redact(row), indent=None) for row in rows]
    old = io.FileIO(_open(path, os.O_RDWR | os.O_CREAT), "r+")
    with old:
        _write_file(path, "".join(lines).encode("ascii"))
        old.seek(size)
        late = old.readall()  # of runs that started or ended meanwhile
        if late:
            with io.FileIO(_open_for_lines(path), "a") as new:
                new.write(late)


def _append_note(
    run_dir: Path, text: str, tags: Sequence[str], untag: Sequence[str] = ()
) -> None:
    """Append one line to notes.jsonl: a text, tags to add and tags to take away."""
    note = {"timestamp_utc": _utc(), "user": _user(), "text": text, "tags": list(tags)}
    taken = {"untag": list(untag)} if untag else {}
    _append_line(run_dir / "notes.jsonl", {**note, **taken})


def _tags(notes: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the tags that are in force after all notes, in their order."""
    tags: dict[str, None] = {}
    for note in notes:
        for key in ("tags", "untag"):
            names = note.get(key) if isinstance(note.get(key), list) else []
            for name in filter(None, map(str, names or [])):
                tags.pop(name, None)
                tags.update({name: None} if key == "tags" else {})
    return list(tags)


# === Files ===
# Whole files by a temporary name and os.replace, lines by one write(2) each; readable
# by colleagues (0666 & ~umask); fsync only where a state changes. FileIO, as the
# builtin open is gone when a generator is closed at shutdown.


def _write_json(path: Path, value: Any, durable: bool = False) -> None:
    """Write plain data as redacted, strict JSON."""
    _write_file(path, _format_json(_redact(value)).encode("ascii"), durable)


def _write_yaml(path: Path, value: Any) -> None:
    """Write plain data as redacted YAML."""
    _write_file(path, _format_yaml(_redact(value)).encode("utf-8"))


def _write_file(path: Path, data: bytes, durable: bool = False) -> None:
    """Replace `path` by `data`, or raise OSError and leave what was there."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{os.urandom(4).hex()}.tmp")
    try:
        descriptor = _open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        try:
            _write_all(descriptor, data)
            if durable:
                os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def _append_line(path: Path, row: Mapping[str, Any]) -> None:
    """Append one redacted line of JSON with a single write(2)."""
    line = _format_json(_redact(row), indent=None).encode("ascii")
    with io.FileIO(_open_for_lines(path), "a") as file:
        if file.write(line) != len(line):
            raise OSError(f"only a part of a line fitted into {str(path)!r}")


def _open_for_lines(path: Path) -> int:
    """Open a JSONL file for appending; end the torn line of an earlier writer."""
    descriptor = _open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT)
    with contextlib.suppress(OSError):
        size = os.fstat(descriptor).st_size
        if size and os.pread(descriptor, 1, size - 1) != b"\n":
            time.sleep(0.01)  # it may only be in the middle of its write
            if os.fstat(descriptor).st_size == size:
                os.write(descriptor, b"\n")
    return descriptor


def _write_all(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


def _open(path: StrPath, flags: int) -> int:
    """Open a file close-on-exec, never as descriptor 0, 1 or 2."""
    return _above_stderr(os.open(path, flags | getattr(os, "O_CLOEXEC", 0), 0o666))


def _above_stderr(descriptor: int) -> int:
    """Move a descriptor out of the place of a closed stdin, stdout or stderr."""
    if descriptor > 2:
        return descriptor
    try:
        return _above_stderr(os.dup(descriptor))
    finally:
        os.close(descriptor)


def _identity(descriptor: int) -> tuple[int, int] | None:
    """Return device and inode of an open descriptor, None of a closed one."""
    with contextlib.suppress(OSError):
        info = os.fstat(descriptor)
        return info.st_dev, info.st_ino
    return None


class _Kept:
    """An open descriptor of ours: the program may close it, and reuse its number."""

    def __init__(self, number: int) -> None:
        self.number, self.identity = number, _identity(number)

    def is_ours(self) -> bool:
        return self.identity is not None and _identity(self.number) == self.identity

    def close(self) -> None:
        if self.is_ours():
            os.close(self.number)


def _read_json(path: Path) -> dict[str, Any] | None:
    """Return the mapping in a JSON file, or None for anything else."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        value = json.loads(_read_bytes(path))
        return value if isinstance(value, dict) else None
    return None


def _read_lines(path: Path, tail: int | None = None) -> Iterator[dict[str, Any]]:
    """Yield the mappings of a JSONL file, or of its `tail`; skip torn lines."""
    with contextlib.suppress(OSError):
        for line in _read_bytes(path, tail=tail).split(b"\n"):
            with contextlib.suppress(ValueError, RecursionError):
                row = json.loads(line)
                if isinstance(row, dict):
                    yield row


def _read_bytes(path: Path, limit: int = 0, tail: int | None = None) -> bytes:
    """Return a regular file of sane size, or its `tail` of so many bytes.

    A FIFO or device raises OSError, and never blocks.
    """
    with _opened(path, sys.maxsize if tail else limit or MAX_READ) as file:
        size = os.fstat(file.fileno()).st_size
        if tail is None or size <= tail:
            return file.readall()
        file.seek(-tail, os.SEEK_END)
        return file.readall().partition(b"\n")[2]  # the first line is cut


def _opened(path: Path, limit: int) -> io.FileIO:
    """Open a regular file of at most `limit` bytes; never wait for a FIFO."""
    at_once = getattr(os, "O_NONBLOCK", 0)
    file = io.FileIO(path, opener=lambda name, how: _open(name, how | at_once))
    info = os.fstat(file.fileno())
    if stat.S_ISREG(info.st_mode) and info.st_size <= limit:
        return file
    file.close()
    raise OSError(f"{str(path)!r} is not a file of at most {limit} bytes")


@contextlib.contextmanager
def _tolerating(what: str) -> Iterator[None]:
    """Turn a failure of recording into one line on stderr."""
    try:
        yield
    except Exception as error:
        _warn(f"{what}: {type(error).__name__}: {error}")


_warned: set[str] = set()


def _warn(text: str, once: bool = False) -> None:
    """Say one line on stderr; never fail."""
    if not (once and text in _warned):
        _warned.add(text)
        with contextlib.suppress(Exception):
            print(f"run_utils: {_printable(_redact_text(text))}", file=sys.stderr)


def _utc(seconds: float | None = None) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


# === Reading runs ===
# Readers trust nothing: a file may be absent, torn, huge, hostile, or of an ancestor.


def find_runs(
    root: StrPath = "results", *, where: str | None = None, status: str | None = None,
    since: str | None = None, contains: str | None = None, tag: str | None = None,
    has_outputs: bool = False, sort: str | None = None, limit: int | None = None,
) -> list[Run]:
    """Return the runs below `root`, newest first, at most `limit` of them.

    `where` compares config, metrics and the keys of `Run`: ``"lr<1e-3 and acc>=0.9 or
    model~qwen"`` (``< <= > >= == !=``, and ``~`` for a regular expression), numbers as
    numbers; ``and`` binds tighter. `status` is as it is now; `since` an age ("12h",
    "7d") or the start of a UTC time ("2026-01-31"); `contains` a part of the path below
    `root`; `tag` one that is in force. `sort` is a key, "-key" the other way round.
    Raises ValueError for a `where` or `since` that cannot be read.
    """
    folder = Path(root).absolute()
    return _select_runs(
        folder, where, status, since, contains, tag, has_outputs, sort, limit
    )[0]


def load_run(path: StrPath) -> Run:
    """Return the run that `path` is, or is inside of.

    Raises ValueError when there is no run directory at or above `path`.
    """
    found = _run_of(Path(path).absolute())
    if found is None:
        raise ValueError(f"{str(path)!r} is not in a run directory")
    return Run(found)


class Run(dict):  # type: ignore[type-arg]
    """One run directory as a flat dictionary: a row for pandas.DataFrame.

    Keys: name, run_dir, experiment, status (as it is now), exit_reason, started_utc,
    duration_seconds (of all attempts), attempts, hostname, user, git_commit,
    script_name, tags, then `config.<key>` and `metrics.<key>` (the last values). The
    files themselves are the attributes `config`, `metadata`, `status`, `metrics`,
    `notes` and `attempts` (status.json of the earlier ones); `outputs` has the files
    it left, with their sizes in bytes, and `problems` what could not be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.problems: list[str] = []
        self.inputs: list[str] = []  # runs it used, and runs that used it
        self.used_by: list[str] = []
        self.metadata = self._read_json("metadata.json")
        self.status = _status_now(path, self._read_json("status.json"))
        self.config = _mapping(self.metadata, "config") or self._read_config()
        self.notes = list(_read_lines(path / "notes.jsonl"))
        self.metrics: dict[str, Any] = {}
        for row in _read_lines(path / "metrics" / "metrics.jsonl", MAX_TAIL):
            self.metrics.update(row)
        numbers = [int(p.name) for p in path.glob("attempts/*") if p.name.isdecimal()]
        earlier = [path / "attempts" / str(number) for number in sorted(numbers)]
        self.attempts = [_read_json(p / "status.json") or {} for p in earlier]
        times = [s.get("duration_seconds") for s in (*self.attempts, self.status)]
        known = [t for t in map(_number, times) if t is not None]
        super().__init__(
            name=path.name, run_dir=str(path), experiment=path.parent.name,
            status=_text(self.status.get("status", "?")),
            exit_reason=self.status.get("exit_reason"),
            started_utc=self.status.get("started_utc")
            or self.metadata.get("timestamp_utc") or self.status.get("timestamp_utc"),
            duration_seconds=sum(known) if known else None,
            attempts=len(earlier) + 1,
            hostname=self.metadata.get("hostname", self.status.get("hostname")),
            user=self.metadata.get("user"),
            git_commit=_mapping(self.metadata, "git").get("commit_short"),
            script_name=_script_of(self.metadata, path),
            tags=_tags(self.notes),
        )  # fmt: skip
        plain = {k: v for k, v in self.config.items() if k != "command"}
        self.update(_flattened("config", plain))
        self.update(_flattened("metrics", self.metrics))

    def _read_json(self, name: str) -> dict[str, Any]:
        path = self.path / name
        found = _read_json(path)
        if found is None and os.path.lexists(path):
            self.problems.append(f"{str(path)!r} is not a JSON object that can be read")
        return found or {}

    def _read_config(self) -> dict[str, Any]:
        """Return config.yaml, where metadata.json does not have the same."""
        path = self.path / "config.yaml"
        try:
            value = _parse_yaml(_read_bytes(path, MAX_CONFIG).decode("utf-8"))
        except FileNotFoundError:
            return {}
        except (Exception, RecursionError) as error:  # yaml.YAMLError has many kinds
            self.problems.append(f"{str(path)!r} cannot be read: {error}")
            return {}
        return value if isinstance(value, dict) else {"config": value}

    @property
    def outputs(self) -> dict[str, int]:
        """The files in the folders, but for logs/ and attempts/: sizes in bytes."""
        sizes: dict[str, int] = {}
        for name in self.folders():
            if name not in ("logs", "attempts"):
                sizes.update(_file_sizes(self.path, name))
        return {k: v for k, v in sizes.items() if k != "artifacts/USED_BY.jsonl"}

    def folders(self) -> list[str]:
        with contextlib.suppress(OSError), os.scandir(self.path) as entries:
            return sorted(e.name for e in entries if e.is_dir(follow_symlinks=False))
        return []

    def look_up(self, key: str) -> Any:
        """Return the value of a key: ours, else of the config, else of the metrics."""
        for name in (key, f"config.{key}", f"metrics.{key}"):
            if name in self:
                return self[name]
        return len(self.outputs) if key == "outputs" else None


def _file_sizes(run_dir: Path, folder: str) -> dict[str, int]:
    """Return the sizes of the files below a folder, by their path in the run."""
    sizes: dict[str, int] = {}
    for place, _, names in os.walk(run_dir / folder):
        for path in (os.path.join(place, name) for name in names[:MAX_ITEMS]):
            with contextlib.suppress(OSError):
                sizes[os.path.relpath(path, run_dir)] = os.lstat(path).st_size
    return sizes


def _script_of(metadata: Mapping[str, Any], run_dir: Path) -> str:
    """Return the name of the script: from argv, else from the run's own name."""
    words = _texts(metadata.get("argv"))
    scripts = [Path(word).stem for word in words if re.search(r"\.(py|sh|R|jl)$", word)]
    if "-m" in words[:-1]:
        return words[words.index("-m") + 1]
    return scripts[0] if scripts else _STAMP.split(run_dir.name)[0].rstrip("-")


def _select_runs(
    root: Path, where: str | None, status: str | None, since: str | None,
    contains: str | None, tag: str | None, has_outputs: bool, sort: str | None,
    limit: int | None,
) -> tuple[list[Run], int]:
    """Return the runs of `find_runs`, and how many older ones were not looked at."""
    tests = _tests(where, status, since, tag, has_outputs)
    paths = _walk_runs(root)
    if contains is not None:
        part, start = contains.lower(), len(str(root))
        paths = [path for path in paths if part in path[start:].lower()]
    runs: list[Run] = []
    seen = 0
    for path in paths:
        if limit is not None and len(runs) >= limit and not sort:
            break
        seen += 1
        for place in [path] if _looks_like_run(path) else _walk_runs(path, True):
            run = Run(Path(place))
            runs += [run] if all(test(run) for test in tests) else []
    runs.sort(key=lambda run: str(run["started_utc"] or ""), reverse=True)
    if sort:
        key = sort.lstrip("-")
        known = [run for run in runs if run.look_up(key) is not None]
        known.sort(key=lambda run: _sortable(run.look_up(key)), reverse=sort[0] == "-")
        runs = known + [run for run in runs if run.look_up(key) is None]
    return runs[:limit], len(paths) - seen + len(runs[limit:] if limit else [])


def _tests(
    where: str | None, status: str | None, since: str | None, tag: str | None,
    has_outputs: bool,
) -> list[Callable[[Run], Any]]:
    """Return what a run must fulfil, the cheapest first."""
    tests: list[Callable[[Run], Any]] = []
    if status is not None:
        tests.append(lambda run: run["status"] == status)
    if since is not None:
        first = _since(since)
        tests.append(lambda run: str(run["started_utc"] or "") >= first)
    if tag is not None:
        tests.append(lambda run: tag in run["tags"])
    if where is not None:
        tests.append(_condition(where))
    return [*tests, lambda run: run.outputs] if has_outputs else tests


def _since(text: str) -> str:
    """Return the UTC time that an age ("90s", "12h", "7d") or a date begins."""
    age = re.fullmatch(r"(\d+(?:\.\d+)?)([smhdw])", text)
    if age:
        units = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
        return _utc(max(0.0, time.time() - float(age[1]) * units[age[2]]))
    if not re.match(r"\d{4}(-\d\d){0,2}", text):
        raise ValueError(f"since {text!r} is no time; give '12h', '7d' or '2026-01-31'")
    return text


def _condition(text: str) -> Callable[[Run], bool]:
    """Return the test that "lr<1e-3 and model~qwen or acc>=0.9" describes."""
    comparison = re.compile(
        r"\s*([^\s<>=!~\"']+)\s*(<=|>=|==|!=|=|<|>|~)\s*(\"[^\"]*\"|'[^']*'|[^\s\"']+)"
        r"\s*(?:(and|or)\s+(?=\S)|$)"
    )
    alternatives: list[list[tuple[str, str, str]]] = [[]]
    position = 0
    while position < len(text) or not alternatives[0]:
        found = comparison.match(text, position)
        if found is None:
            how = "write KEY<VALUE (or <= > >= == != ~), joined by and/or"
            place = f"where {text!r} is not understood at {text[position:]!r}"
            raise ValueError(f"{place}; {how}")
        key, operator, value, joint = found.groups()
        value = value[1:-1] if value[0] in "\"'" else value
        if operator == "~":
            try:
                re.compile(value)
            except re.error as error:
                what = f"where: {value!r} is no regular expression"
                raise ValueError(f"{what}: {error}") from None
        alternatives[-1].append((key, operator, value))
        alternatives += [[]] if joint == "or" else []
        position = found.end()
    return lambda run: any(
        all(_holds(run.look_up(key), *rest) for key, *rest in terms)
        for terms in alternatives
    )


def _holds(found: Any, operator: str, wanted: str) -> bool:
    """Return whether a comparison holds: of numbers if both are, else of texts."""
    if found is None and wanted.lower() not in ("null", "none"):
        return operator == "!="
    if operator == "~":
        return re.search(wanted, _text(found)) is not None
    a: Any = _number(found)
    b: Any = _number(wanted)
    if a is None or b is None:
        a, b = _text(found).lower(), wanted.lower().replace("none", "null")
    order = (a > b) - (a < b) if a == a and b == b else None  # None: a NaN
    return order in _ORDERS.get(operator, (0,))


_ORDERS: dict[str, tuple[int | None, ...]] = {
    "<": (-1,), "<=": (-1, 0), ">": (1,), ">=": (0, 1), "!=": (-1, 1, None)
}  # fmt: skip


def _number(value: Any) -> float | None:
    """Return a number, or a text that is one, as float; None for anything else."""
    if isinstance(value, (int, float, str)) and not isinstance(value, bool):
        with contextlib.suppress(ValueError, OverflowError):
            return float(value)
    return None


def _sortable(value: Any) -> tuple[bool, float, str]:
    number = _number(value)
    return number is None, 0.0 if number is None else number, _text(value)


def _texts(value: Any) -> list[str]:
    return [v for v in value if isinstance(v, str)] if isinstance(value, list) else []


def _text(value: Any) -> str:
    """Return a value of a JSON file as one short line."""
    if isinstance(value, float):
        return f"{value:.6g}"
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= MAX_MESSAGE else text[:MAX_MESSAGE] + "..."


def _is_run(path: StrPath) -> bool:
    """Return whether a folder holds a record; a data set has a metadata.json too."""
    if os.path.isfile(f"{path}/status.json"):
        return True
    if not os.path.isfile(f"{path}/metadata.json"):
        return False
    name = os.path.basename(path)
    if _STAMP.search(name) or os.path.isfile(f"{path}/config.yaml"):
        return True
    return "timestamp_utc" in (_read_json(Path(path, "metadata.json")) or {})


_STAMP = re.compile(r"\d{8}-\d{6}(?![^-])")  # in the name of a run: local time


def _run_of(path: Path) -> Path | None:
    """Return the run directory that `path` is or lies in, also through links."""
    for place in dict.fromkeys([path, Path(os.path.realpath(path))]):
        for folder in (place, *place.parents):
            if _is_run(folder):
                return folder
    return None


def _walk_runs(root: StrPath, opened: bool = False) -> list[str]:
    """Return the paths of all run directories below `root`, newest first."""
    return [line[STAMP_WIDTH:] for line in _stamped_runs(root, opened)]


STAMP_WIDTH = 20  # "20260131-142501", when a run started, and the length of its path


def _stamped_runs(
    root: StrPath, opened: bool = False, known: Set[str] = frozenset()
) -> list[str]:
    """Return a line for each run directory, but `known` ones: its start and its path.

    A folder whose name has a time stamp is taken for a run without a look, unless it
    is the root, already `opened`. Links are followed to what lies outside of the tree.
    """
    found: list[str] = []
    places, seen = [str(root)], [""]
    while places:
        place = places.pop()
        real = os.path.realpath(place)
        if any(f"{real}/".startswith(f"{known}/") for known in seen[1:]):
            continue
        folders = [(real if seen[1:] else place, 0)]
        seen.append(real)
        while folders:
            folder, depth = folders.pop()
            inside, linked, is_run = _scan(folder, known)
            if is_run and not (opened and depth == 0):
                found.append(f"{_started(folder):15}{len(folder):5}{folder}")
                continue
            places += linked
            stamps = [_STAMP.search(path, len(folder) + 1) for path in inside]
            pairs = list(zip(stamps, inside))
            found += [f"{at[0]}{len(path):5}{path}" for at, path in pairs if at]
            if depth < MAX_WALK:
                folders += [(path, depth + 1) for at, path in pairs if not at]
    return sorted(found, reverse=True)


def _scan(
    folder: str, known: Set[str] = frozenset()
) -> tuple[list[str], list[str], bool]:
    """Return the folders in a folder, the links to folders, and whether it is a run."""
    entries: list[os.DirEntry[str]] = []
    with contextlib.suppress(OSError), os.scandir(folder) as found:
        entries = [e for e in found if e.path not in known]
    inside = [e.path for e in entries if e.is_dir(follow_symlinks=False)]
    names = {e.name for e in entries if not e.is_dir(follow_symlinks=False)}
    links = [e.path for e in entries if e.is_symlink() and os.path.isdir(e.path)]
    inside = [path for path in inside if path[len(folder) + 1] != "."]
    record = not names.isdisjoint(("status.json", "metadata.json"))
    return inside, links, record and _is_run(folder)


def _looks_like_run(path: str) -> bool:
    """Return whether a folder with a stamp is a run, or what is left of one."""
    inside, _, is_run = _scan(path)
    return is_run or {*map(os.path.basename, inside)} <= {*DEFAULT_SUBDIRS, "attempts"}


def _started(run_dir: StrPath) -> str:
    """Return a key that sorts runs by their start: "20260131-142501", local time."""
    stamp = _STAMP.search(os.path.basename(run_dir))
    if stamp:
        return stamp[0]
    for name in ("status.json", "metadata.json"):
        facts = _read_json(Path(run_dir, name)) or {}
        seconds = _seconds(facts.get("started_utc") or facts.get("timestamp_utc"))
        if seconds is not None:
            return time.strftime("%Y%m%d-%H%M%S", time.localtime(seconds))
    return ""


def _seconds(utc: Any) -> float | None:
    """Return the seconds since 1970 of "2026-01-31T14:25:01Z", None of all else."""
    parts = re.match(r"(\d{4})-(\d\d)-(\d\d)[T ](\d\d):(\d\d):(\d\d)", str(utc))
    with contextlib.suppress(ValueError, OverflowError):
        if parts:
            year, month, day, hour, minute, second = map(int, parts.groups())
            date = (year, month, day, hour, minute, second, 0, 0, 0)
            return time.mktime(date) - time.timezone
    return None


def _status_now(run_dir: Path, facts: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return status.json, with "lost" for a run that cannot be running any more.

    Judged by the process itself on its own host, elsewhere by the heartbeat.
    """
    path = run_dir / "status.json"
    facts = facts or _read_json(path) or {"status": "?"}
    if facts.get("status") != "running":
        return facts
    then, here = _mapping(facts, "process"), _process_identity(os.getpid())
    pid = facts.get("pid") if then and facts.get("hostname") == _hostname() else None
    alive = None
    if isinstance(pid, int) and then.get("boot_id") != here["boot_id"]:
        alive = False  # the host was started anew since
    elif isinstance(pid, int) and then.get("pid_namespace") == here["pid_namespace"]:
        alive = _is_alive(pid, then.get("start_ticks"))
    elif facts.get("heartbeat_seconds") is not None and path.exists():
        alive = abs(time.time() - os.stat(path).st_mtime) < LOST_AFTER_SECONDS
    status = {True: "running", False: "lost", None: "unknown"}[alive]
    latest = _read_json(path) or facts  # it may have ended while we looked
    return latest if latest.get("status") != "running" else {**facts, "status": status}


def _mapping(facts: Any, key: str) -> dict[str, Any]:
    """Return `facts[key]` if that is a mapping, else an empty one."""
    value = facts.get(key) if isinstance(facts, dict) else None
    return value if isinstance(value, dict) else {}


def _comparable(
    metadata: Mapping[str, Any], patches: Mapping[str, str] | None = None
) -> dict[str, dict[str, Any] | None]:
    """Return what can differ between two runs, by section; None: it is not known."""
    config = {k: v for k, v in _mapping(metadata, "config").items() if k != "command"}
    git, python = _mapping(metadata, "git"), _mapping(metadata, "python")
    machine = {**_mapping(metadata, "platform"), **_mapping(metadata, "cuda")}
    machine["container"] = _mapping(metadata, "container").get("image")
    machine.update(_mapping(metadata, "determinism"))
    packages = metadata.get("pip_freeze")
    lines = map(str, packages) if isinstance(packages, list) else []
    names = [re.match(r"(-e )?([^=@<> ]+)( ?@ ?|==)?(.*)", line) for line in lines]
    code = ("commit_full", "branch", "is_dirty", "remote_origin_url")
    return {
        "config": {key[7:]: v for key, v in _flattened("config", config).items()},
        "code": None if "commit_full" not in git else {
            **{key: git.get(key) for key in code},
            **{key: git.get(key) or [] for key in ("changed", "untracked")},
            **(patches or {}),
        },
        "packages": None if packages is None else
        {n[2].lower().replace("_", "-"): n[4] or n[1] for n in names if n},
        "machine": {
            "hostname": metadata.get("hostname"),
            "python": _text(python.get("version")).split(" ")[0],
            "executable": python.get("executable"),
            **{k: v for k, v in machine.items() if k not in _UNEQUAL},
        },
    }  # fmt: skip


# Other in every run, or not known of older ones.
_UNEQUAL = {"memory_kib", "hash_randomization", "random_state", "numpy_state"}


def _differences(
    then: Mapping[str, Any], now: Mapping[str, Any]
) -> dict[str, dict[str, list[Any]]]:
    """Return [before, after] of what differs, by section, where both have that."""
    found: dict[str, dict[str, list[Any]]] = {}
    for section in filter(now.__contains__, then):
        a, b = then[section], now[section]
        if a is None or b is None:
            a, b = ({"recorded": side is not None} for side in (a, b))
        pairs = {key: [a.get(key), b.get(key)] for key in {**a, **b}}
        changed = {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}
        found.update({section: changed} if changed else {})
    return found


def _flattened(name: str, value: Any, depth: int = 0) -> dict[str, Any]:
    """Return nested mappings as one, with dotted keys."""
    if not isinstance(value, dict) or depth > MAX_DEPTH:
        return {name: value}
    parts = [_flattened(f"{name}.{key}", v, depth + 1) for key, v in value.items()]
    return {key: item for part in parts for key, item in part.items()}


# === Reading YAML ===
# config.yaml of the ancestors, and ours, where PyYAML is not installed.


def _parse_yaml(text: str) -> Any:
    """Return a YAML document as plain data: by PyYAML, or by a reader of our own.

    Raises ValueError, and what the constructors of PyYAML raise.
    """
    if _is_deep(text):  # libyaml would end the process where its stack ends
        raise ValueError("it is nested too deeply")
    try:
        yaml = _pyyaml()
    except ImportError:
        return _plain(_YamlReader(text).document())
    try:
        value = yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error
    return _plain(value)  # bounded: an alias may stand for the same list many times


def _is_deep(text: str) -> bool:
    """Return whether a YAML document may have more than 500 levels."""
    depth = deepest = 0
    for bracket in re.findall(r"[][{}]", text):
        depth = depth + 1 if bracket in "[{" else max(depth - 1, 0)
        deepest = max(deepest, depth)
    return deepest > 500 or bool(re.search(r"^[ \t?:-]{500}", text, re.M))


class _YamlReader:
    """Read the YAML that PyYAML's safe_dump and we write; ValueError for any other.

    Tokens are (kind, column, text, line): "-", "?", ":", "&" for an anchor, "key" and
    "value", which is a scalar or a list in brackets, over as many lines as it takes.
    """

    # Tags, literal blocks, odd ends of line, complex keys in brackets, two keys a line.
    BEYOND = (
        r"(?a)\A[!|>%@`]|[\x85\u2028\u2029]|\A(?=[\[{])[\s\S]*?[\[{,]\s*\?\s"
        r"|\A[^\"'\[{](?:(?!\s#).|\n)*:(?=\s|\Z)"
    )

    def __init__(self, text: str) -> None:
        self.lines = re.sub(r"(?m)^(---|\.\.\.)$", "", text).split("\n")
        self.tokens = list(self.tokenized())[::-1]
        self.anchors: dict[str, Any] = {}

    def document(self) -> Any:
        value = self.node(0)
        if self.tokens:
            raise self.beyond(self.tokens[-1])
        return value

    def beyond(self, token: tuple[str, int, str, int]) -> ValueError:
        text = token[2].split("\n")[0][:20]
        return ValueError(f"line {token[3]}, {text!r}, takes PyYAML to read")

    def tokenized(self) -> Iterator[tuple[str, int, str, int]]:
        step = re.compile(
            r"(?a)([-?:](?= |$))|&([^\s,]+)(?= |$)|"
            r"(\"(?:[^\"\\]|\\.)*\"|'(?:[^']|'')*'"
            r"|(?:[^\s,[\]{}#&*!|>'\"%@`?:-]|[?:-](?=\S))(?:(?! #).)*?) *:(?= |$)"
        )
        number = 0
        while number < len(self.lines):
            line = self.lines[number]
            number += 1
            column, parent, key = len(line) - len(line.lstrip(" ")), -1, None
            if line[column : column + 1] == "#":
                continue
            found = step.match(line, column)
            while found and not (key and found[2] is None):  # one key a line
                sign, anchor, key = found.groups()
                parent = parent if anchor else column
                kind = sign or ("&" if anchor else "key")
                yield kind, column, anchor or key or sign, number
                rest = line[found.end() :].lstrip(" ")
                column = len(line) - len(rest)
                found = step.match(line, column)
            value, first = line[column:], number
            if value.strip(" \t") and value[0] != "#":
                while number < len(self.lines) and self.goes_on(value, number, parent):
                    value += "\n" + self.lines[number]
                    number += 1
                token = "value", column, value.rstrip(" \t\n"), first
                if re.search(self.BEYOND, value):
                    raise self.beyond(token)
                yield token

    def goes_on(self, value: str, number: int, parent: int) -> bool:
        """Return whether the next line belongs to a value that was begun."""
        if value[0] in "\"'":
            whole = r"(?as)(\"(?:[^\"\\]|\\.)*\"|'(?:[^']|'')*')\s*( #.*)?"
            return not re.fullmatch(whole, value)
        if value[0] in "[{":
            words = _flow_words(value)
            return sum(w in "[{" for w in words) != sum(w in "]}" for w in words)
        line = self.lines[number].lstrip(" ")
        deeper = len(self.lines[number]) - len(line) > parent
        return not line or (deeper and line[0] != "#")

    def node(self, least: int, beside: int = -1) -> Any:
        """Read what stands in column `least` or after; a list may stand at `beside`."""
        name = None
        if self.tokens and self.tokens[-1][0] == "&" and self.tokens[-1][1] >= least:
            name = self.tokens.pop()[2]
        kind, column, text, _ = self.tokens[-1] if self.tokens else ("", -1, "", 0)
        value: Any = None
        if kind == "-" and column >= min(least, beside if beside >= 0 else least):
            value = []
            while self.tokens and self.tokens[-1][:2] == ("-", column):
                self.tokens.pop()
                value.append(self.node(column + 1))
        elif kind in ("key", "?") and column >= least:
            value = self.mapping(column)
        elif kind == "value" and column >= least:
            self.tokens.pop()
            is_flow = text[0] in "[{"
            value = self.flow(_flow_words(text)[::-1]) if is_flow else self.scalar(text)
        if name is not None:
            self.anchors[name] = value
        return value

    def mapping(self, column: int) -> dict[str, Any]:
        result: dict[str, Any] = {}
        while self.tokens and self.tokens[-1][1] == column:
            kind, _, text, _ = token = self.tokens.pop()
            if kind not in ("key", "?"):
                raise self.beyond(token)
            key = self.scalar(text) if kind == "key" else self.node(column + 1)
            if kind == "?" and self.tokens and self.tokens[-1][:2] == (":", column):
                self.tokens.pop()
            name = key if isinstance(key, str) else json.dumps(key)
            result[name] = self.node(column + 1, beside=column)
        return result

    def flow(self, words: list[str]) -> Any:
        """Read a list or mapping in brackets from its words, the first one last."""
        word = words.pop()
        if word not in ("[", "{"):
            return self.scalar(word)
        items: list[Any] = []
        result: dict[str, Any] = {}
        while words[-1] not in ("]", "}"):
            key = self.flow(words)
            items.append(key)
            if words[-1] == ":":
                words.pop()
                name = key if isinstance(key, str) else json.dumps(key)
                result[name] = None if words[-1] in ",}" else self.flow(words)
            if words[-1] == ",":
                words.pop()
        words.pop()
        return items if word == "[" else result

    def scalar(self, text: str) -> Any:
        fold = r"[ \t]*\n((?:[ \t]*\n)*)[ \t]*"
        if text[0] == '"':
            escape = r"(?s)\\(?:\n[ \t]*|x(..)|u(.{4})|U(.{8})|(.))|" + fold
            body = text[1 : text.rindex('"')]
            return re.sub(escape, self.unescaped, body)
        joined = lambda match: "\n" * match[1].count("\n") or " "  # noqa: E731
        if text[0] == "'":
            body = text[1 : text.rindex("'")]
            return re.sub(fold, joined, body).replace("''", "'")
        text = re.sub(r"(?am)(^|\s)#.*", "", text).rstrip(" \t\n")
        text = re.sub(fold, joined, text)
        if text[:1] == "*":
            return self.anchors[text[1:]]
        return _yaml_plain(text)

    def unescaped(self, match: re.Match[str]) -> str:
        code = match[1] or match[2] or match[3]
        if code:
            return chr(int(code, 16))
        if match[4]:
            meant = "\0\a\b\t\n\v\f\r\x1b\x85\xa0\u2028\u2029"
            return dict(zip("0abtnvfreN_LP", meant)).get(match[4], match[4])
        lines = match[5]
        return "" if lines is None else "\n" * lines.count("\n") or " "


def _flow_words(text: str) -> list[str]:
    """Split "[a, {b: 'c d'}]" into its brackets, commas, colons and scalars."""
    return re.findall(
        r"""(?a)\"(?:[^\"\\]|\\[\s\S])*\"|'(?:[^']|'')*'|[\"'][\s\S]*|[\[\]{},]"""
        r"""|:(?=[\s,\[\]{}"']|$)"""
        r"""|[^\s,\[\]{}"':](?:[^,\[\]{}:]|:(?![\s,\[\]{}]|$))*(?<!\s)""",
        text,
    )


def _yaml_plain(text: str) -> Any:
    """Return what a scalar without quotes is to YAML 1.1: "1e3" is a string."""
    if text in ("", "~", "null", "Null", "NULL"):
        return None
    word = text.lower()
    if word in ("yes", "on", "true", "no", "off", "false"):
        known = text in (word, word.title(), word.upper())
        return word in ("yes", "on", "true") if known else text
    digits = text.replace("_", "")
    if re.fullmatch(r"[-+]?(0|[1-9][0-9_]*)", text):
        return int(digits)
    if re.fullmatch(r"[-+]?0(x[0-9a-fA-F_]+|b[01_]+|[0-7_]+)", text):
        return int(re.sub(r"0(?=[0-7])", "0o", digits, count=1), 0)
    if re.fullmatch(r"(?a)([-+]?\d[\d_]*\.[\d_]*|\.\d[\d_]*)([eE][-+]\d+)?", text):
        return float(digits)
    special = re.fullmatch(r"([-+]?)\.(inf|Inf|INF|nan|NaN|NAN)", text)
    return float(special[1] + special[2]) if special else text


# === Showing runs ===
# Rows, paragraphs and graphs for people. Whatever comes from a run directory is
# escaped before it reaches a terminal, a page or a spreadsheet.


def _print_tables(runs: list[Run], root: Path, markdown: bool, split: bool) -> None:
    """Print one table, or one for each script."""
    for script in sorted({run["script_name"] for run in runs}) if split else [None]:
        group = [run for run in runs if script in (None, run["script_name"])]
        if script is not None:
            print(_printable(f"{script}: {_format_count(len(group), 'run')}"))
        if markdown:
            _print_markdown(_table(group, root, lineage=True))
        elif group:
            _print_table(_table(group, root))


def _row(run: Run, root: Path) -> dict[str, Any]:
    """Return a run as `list --json` and `--csv` show it."""
    outputs = run.outputs
    facts = {"path": os.path.relpath(run.path, root), "outputs": len(outputs)}
    facts.update(size=sum(outputs.values()), inputs=run.inputs, used_by=run.used_by)
    notes = [_text(note.get("text")) for note in run.notes if note.get("text")]
    return {**facts, **run, "notes": notes, "problems": run.problems}


def _with_lineage(runs: list[Run], root: Path) -> list[Run]:
    """Complete runs by the files of others they used, and the runs that used them."""
    known = {run.path: run for run in runs}
    for (producer, consumer), paths in _Lineage(_results_root(root)).edges.items():
        if consumer in known:
            known[consumer].inputs.append(f"{producer.name}/{_format_paths(paths)}")
        if producer in known:
            known[producer].used_by.append(consumer.name)
    return runs


def _format_paths(paths: Sequence[str]) -> str:
    """Return "a.pt, b.pt, c.pt and 7 more"."""
    more = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
    return ", ".join(paths[:3]) + more


def _table(runs: list[Run], root: Path, lineage: bool = False) -> list[list[str]]:
    """Return the rows of `list`, the first with the headings."""
    heads = ["run", "status", "age", "time", "outputs", "config", "metrics"]
    rows = [[*heads, *["inputs", "used by", "repeats"] * lineage, "notes"]]
    varying = _varying(runs)
    first: dict[str, str] = {}
    for run in runs[::-1]:
        config = {key: run[key] for key in run if key.startswith("config.")}
        same = _format_json([run["script_name"], run["git_commit"], config])
        repeated = first.setdefault(same, run.path.name)
        repeated = "" if repeated == run.path.name else repeated
        more = [", ".join(run.inputs), ", ".join(run.used_by), repeated] * lineage
        rows.insert(1, [*_cells(run, root, varying), *more, _format_notes(run)])
    return rows


def _varying(runs: Sequence[Run]) -> list[str]:
    """Return the keys of the config whose values differ between the runs."""
    keys = dict.fromkeys(k for run in runs for k in run if k.startswith("config."))
    missing = object()
    values = {key: [run.get(key, missing) for run in runs] for key in keys}
    return [key for key, found in values.items() if found.count(found[0]) < len(found)]


def _cells(run: Run, root: Path, varying: Sequence[str]) -> list[str]:
    started, seconds = _seconds(run["started_utc"]), run["duration_seconds"]
    age = None if started is None else time.time() - started
    if run["status"] == "running":
        seconds = age
    config = [f"{k[7:]}={_text(run[k])}" for k in varying if k in run]
    last = {k: v for k, v in run.metrics.items() if k not in _NO_METRICS}
    metrics = [f"{key}={_text(value)}" for key, value in last.items()]
    outputs = run.outputs
    size = f"{len(outputs)} ({_format_size(sum(outputs.values()))})"
    attempts = f" ({run['attempts']} attempts)" * (run["attempts"] > 1)
    return [
        os.path.relpath(run.path, root), run["status"] + attempts,
        _format_seconds(age), _format_seconds(seconds),
        size if outputs else "empty", " ".join(config), " ".join(metrics),
    ]  # fmt: skip


_NO_METRICS = ("step", "time")


def _format_notes(run: Run) -> str:
    texts = [_text(note["text"]) for note in run.notes if note.get("text")]
    return " ".join([*(f"[{tag}]" for tag in run["tags"]), "; ".join(texts)]).strip()


def _print_table(rows: list[list[str]]) -> None:
    """Print rows in columns; where the terminal is narrow, cut or wrap the last ones.

    The first five columns stay whole: names are there to be copied.
    """
    rows = [[_printable(cell) for cell in row] for row in rows]
    kept = [n for n, cells in enumerate(zip(*rows)) if n < 5 or any(cells[1:])]
    rows = [[row[n] for n in kept] for row in rows]
    widths = [max(map(_width, cells)) for cells in zip(*rows)]
    room = _terminal_width() or sum(widths) + 2 * len(widths)
    while sum(widths[5:]) > 0 and sum(widths) + 2 * len(widths) - 2 > room:
        widest = max(range(5, len(widths)), key=lambda n: widths[n])
        widths[widest] -= 1
    wrapped = min([12, *widths[5:]]) < min([12, *(len(cell) for cell in rows[0][5:])])
    for number, row in enumerate(rows):
        cells = [_cut(cell, width) for cell, width in zip(row, widths)]
        print(_cut("  ".join(cells[:5] if wrapped else cells), room).rstrip())
        rest = "  ".join(filter(None, row[5:]))
        if wrapped and number and rest:
            print(_cut(f"    {rest}", room).rstrip())


def _terminal_width() -> int | None:
    """Return COLUMNS, else the width of the terminal, None where there is none."""
    with contextlib.suppress(ValueError, OSError):
        return int(os.environ.get("COLUMNS") or os.get_terminal_size(1).columns) or None
    return None


def _width(text: str) -> int:
    """Return how many columns of a terminal a text takes."""
    if text.isascii():
        return len(text)
    import unicodedata

    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    return len(text) + wide - sum(map(bool, map(unicodedata.combining, text)))


def _cut(text: str, width: int) -> str:
    """Return the text in exactly so many columns."""
    if _width(text) > width:
        text = text[:width]
        while text and _width(text) > width - 3:
            text = text[:-1]
        text = (text + "...")[:width]
    return text + " " * (width - _width(text))


def _print_csv(rows: list[dict[str, Any]]) -> None:
    """Print CSV (RFC 4180); what a spreadsheet would take for a formula gets a '."""
    import csv

    keys = list(dict.fromkeys(key for row in rows for key in row))
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(map(_csv_cell, keys))
    for row in rows:
        values = [row.get(key) for key in keys]
        writer.writerow([v if type(v) is float else _csv_cell(v) for v in values])


def _csv_cell(value: Any) -> str:
    text = "" if value is None else _printable(_text(value))
    return f"'{text}" if re.match(r"[=+@\t\r]|-(?![\d.])", text) else text


def _print_markdown(rows: list[list[str]]) -> None:
    """Print a table of GitHub's Markdown; nothing in a cell is markup."""
    for number, row in enumerate(rows):
        cells = [re.sub(r"([\\`*_{}\[\]<>|#~&])", r"\\\1", _printable(c)) for c in row]
        print(f"| {' | '.join(cells)} |")
        if number == 0:
            print("|" + " --- |" * len(row))
    print()


def _format_size(size: float) -> str:
    """Return "512 B", "1.5 MB": bytes by powers of 1000."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if size < 999.5 or unit == "TB":
            return f"{size:.3g} {unit}" if size < 999.5 else f"{size:.0f} {unit}"
        size /= 1000
    return "?"


def _format_seconds(seconds: Any) -> str:
    """Return "0.25s", "14s", "3m20s", "2h05m", "5d03h", "?" for what is no time."""
    if not isinstance(seconds, (int, float)) or not -1e12 < seconds < 1e12:
        return "?"
    if seconds < 59.5:
        return f"{max(seconds, 0):.2g}s" if seconds < 10 else f"{seconds:.0f}s"
    minutes, hours, days = seconds // 60, seconds // 3600, seconds // 86400
    if hours < 1:
        return f"{minutes:.0f}m{seconds % 60:02.0f}s"
    if days < 1:
        return f"{hours:.0f}h{minutes % 60:02.0f}m"
    return f"{days:.0f}d{hours % 24:02.0f}h"


def _series(run: Run) -> dict[str, list[float]]:
    """Return the numbers of each metric in their order."""
    series: dict[str, list[float]] = {}
    for row in _read_lines(run.path / "metrics" / "metrics.jsonl", MAX_READ):
        for key, value in row.items():
            number = None if key in _NO_METRICS else _number(value)
            if number is not None:
                series.setdefault(key, []).append(number)
    return series


def _format_inspect(
    run: Run, facts: Mapping[str, Any]
) -> Iterator[tuple[str, list[str]]]:
    """Yield the paragraphs of `inspect`: a name and lines."""
    status, metadata = run.status, run.metadata
    known = {"user": "?", "hostname": "?", "working_dir": "?", **metadata}
    packages = metadata.get("pip_freeze")
    count = len(packages) if isinstance(packages, list) else "no list of"
    version = _text(_mapping(metadata, "python").get("version", "?")).split(" ")[0]
    machine = _mapping(metadata, "platform").get("platform", "?")
    config = {k: v for k, v in run.config.items() if k != "command"}
    captures = _mapping(metadata, "capture")
    problems = {name: _mapping(captures, name).get("problem") for name in captures}
    started = "{} by {user} on {hostname} in {working_dir}"
    yield "run", [str(run.path)]
    yield "status", [_format_end(status), *_format_attempts(run)]
    yield "why", _format_why(status, run.path)
    yield "command", [_text(metadata.get("command", run.config.get("command", "?")))]
    yield "code", [_format_code(_mapping(metadata, "git"))]
    yield "started", [started.format(run["started_utc"] or "?", **known)]
    yield "python", [f"{version} on {machine}; {count} packages"]
    lines = list(_yaml_lines(_yaml_tree(config))) if config else []
    more = [f"... {len(lines) - MAX_SHOWN} more lines"] * (len(lines) > MAX_SHOWN)
    yield "config", lines[:MAX_SHOWN] + more
    yield "inputs", [_format_input(entry) for entry in _read_inputs(run.path)]
    yield "used by", facts["used_by"][:MAX_SHOWN]
    series = facts["metrics"].items()
    yield "metrics", [_format_series(name, values) for name, values in series]
    yield "outputs", _format_outputs(run)
    yield "now", [f"{key}: {value}" for key, value in facts["now"].items()]
    yield "tags", [" ".join(run["tags"])] if run["tags"] else []
    fields = ("timestamp_utc", "user", "text")
    notes = [[_text(note.get(field) or "") for field in fields] for note in run.notes]
    yield "notes", ["{} {}: {}".format(*note) for note in notes if note[2]]
    unread = [] if metadata or run.problems else ["metadata.json: missing"]
    unread += [f"{name}: {_text(why)}" for name, why in problems.items() if why]
    yield "problems", unread + run.problems


def _format_end(status: Mapping[str, Any]) -> str:
    """Return "failed (exception), exit code 1, after 2h05m"."""
    parts = [_text(status.get("status", "?"))]
    if status.get("exit_reason"):
        parts[0] += f" ({_text(status['exit_reason'])})"
    if status.get("exit_code") is not None:
        parts.append(f"exit code {_text(status['exit_code'])}")
    took = _format_seconds(status.get("duration_seconds"))
    return ", ".join([*parts, f"after {took}"] if took != "?" else parts)


def _format_attempts(run: Run) -> list[str]:
    if not run.attempts:
        return []
    took = _format_seconds(run["duration_seconds"])
    total = f"{run['attempts']} attempts, {took} in all"
    earlier = [_format_end(status) for status in run.attempts]
    changes = _mapping(run.metadata, "changes")
    kinds = [kind.items() for kind in changes.values() if isinstance(kind, dict)]
    pairs = [(k, v) for kind in kinds for k, v in kind if v and isinstance(v, list)]
    changed = [line for key, v in pairs for line in _format_change(key, v[0], v[-1])]
    lines = [f"attempt {n}: {text}" for n, text in enumerate(earlier, 1)]
    return [total, *lines, *(f"changed since: {line}" for line in changed[:MAX_SHOWN])]


def _format_why(status: Mapping[str, Any], run_dir: Path) -> list[str]:
    """Return the exception, or the last output of a run that was killed or lost."""
    exception, last = status.get("exception"), status.get("last_output")
    rank = status.get("failed_rank")
    who = "" if rank is None else f"rank {_text(rank)}: "
    if isinstance(exception, dict):
        frames = str(exception.get("traceback", "")).rstrip().splitlines()
        what = f"{who}{exception.get('type')}: {exception.get('message')}"
        return [what, *frames[-4:-1]]
    if status.get("status") in ("lost", "?"):
        last = _last_output(run_dir)
    output = [f"  {line}" for line in last[-8:]] if isinstance(last, list) else []
    problem = status.get("problem")
    return [f"{who}{_text(problem)}", *output] if problem else output


def _format_code(git: Mapping[str, Any]) -> str:
    """Return "1a2b3c4 on main, uncommitted changes, 2 commits not pushed, URL"."""
    if not git.get("commit_short"):
        return "no commit known"
    branch = _text(git.get("branch") or "no branch")
    parts = [f"{_text(git['commit_short'])} on {branch}"]
    parts.append("uncommitted changes" if git.get("is_dirty") else "")
    parts.append(_format_count(git.get("unpushed"), "commit", "not pushed"))
    kept = [_mapping(git, kind).get("file") for kind in ("patch", "bundle")]
    names = " and ".join(map(_text, filter(None, kept)))
    parts.append(f"kept in {names}" if names else "")
    left_out = _mapping(git, "patch").get("left_out_count")
    parts.append(_format_count(left_out, "file", "not kept"))
    return ", ".join(filter(None, [*parts, _text(git.get("remote_origin_url") or "")]))


def _format_count(number: Any, noun: str, about: str = "") -> str:
    """Return "2 files", "1 commit not pushed", or nothing for none."""
    count = f"{_text(number)} {noun}{'s' * (number != 1)} {about}" if number else ""
    return count.rstrip()


def _format_input(entry: Mapping[str, Any]) -> str:
    """Return "key: run/path (success)", and what became of the file since."""
    path = Path(_text(entry.get("run_dir", "?"))) / _text(entry["path"])
    about = [_text(entry.get("status", "?"))]
    if not path.exists():
        about.append("not there now")
    elif entry.get("mtime") not in (None, _utc(path.stat().st_mtime)):
        about.append("changed since")
    name = f"{_text(entry.get('run', '?'))}/{_text(entry['path'])}"
    return f"{_text(entry.get('key', '?'))}: {name} ({', '.join(about)})"


def _format_series(name: str, values: Sequence[float]) -> str:
    """Return "loss: 0.1 (lowest 0.1, highest 2, 10 values) and a sparkline"."""
    text = "{}: {:.6g} (lowest {:.6g}, highest {:.6g}, {} values) {}"
    finite = [value for value in values if abs(value) < 1e300] or [float("nan")]
    least, most = min(finite), max(finite)
    line = _sparkline(finite) if len(values) > 1 else ""
    return text.format(name, values[-1], least, most, len(values), line).rstrip()


def _sparkline(values: Sequence[float], width: int = 24) -> str:
    """Return the course of some numbers, such as "▇▄▂▁▁", on one line."""
    blocks = "▁▂▃▄▅▆▇█"
    try:
        blocks.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        blocks = "_.-~=+*#"
    count = min(width, len(values))
    points = [values[(n + 1) * len(values) // count - 1] for n in range(count)]
    least, most = min(points), max(points)
    scale = (len(blocks) - 1) / ((most - least) or 1)
    return "".join(blocks[int((point - least) * scale)] for point in points)


def _format_outputs(run: Run) -> list[str]:
    """Return a line for each folder, and the largest files."""
    sizes = run.outputs
    lines = []
    for folder in run.folders():
        own = folder not in ("logs", "attempts")
        inside = sizes if own else _file_sizes(run.path, folder)
        found = [size for path, size in inside.items() if Path(path).parts[0] == folder]
        many = f"{_format_count(len(found), 'file')}, {_format_size(sum(found))}"
        lines.append(f"{folder}: {many if found else 'empty'}")
    largest = sorted(sizes, key=lambda path: sizes[path], reverse=True)[:3]
    names = ", ".join(f"{path} ({_format_size(sizes[path])})" for path in largest)
    return [*lines, f"largest: {names}"] if largest else lines


def _format_change(key: str, then: Any, now: Any) -> list[str]:
    """Return "key: then -> now"; of two long texts the lines that differ."""
    if isinstance(then, str) and isinstance(now, str) and "\n" in then + now:
        import difflib

        texts = then.splitlines(), now.splitlines()
        lines = list(difflib.unified_diff(*texts, lineterm="", n=1))
        return [f"{key}:", *(f"  {line}" for line in lines[2 : MAX_SHOWN + 2])]
    shown = ["none" if side is None else _text(side) for side in (then, now)]
    return [f"{key}: {shown[0][:MAX_REPR]} -> {shown[1][:MAX_REPR]}".split("\n")[0]]


def _format_commits(run: Run, commits: Sequence[Any]) -> list[str]:
    """Return the commits that lie between, where the repository is at hand."""
    root = str(_mapping(run.metadata, "git").get("root") or "")
    known = all(re.fullmatch(r"[0-9a-f]{4,64}", str(commit)) for commit in commits)
    if not known or not os.path.isdir(root):
        return []
    between = f"{commits[0]}...{commits[1]}"
    options = ("--oneline", "--left-right", "--no-decorate", "-n", "10", between, "--")
    return [f"  {line}" for line in _git_run(root, "log", *options).text.splitlines()]


def _format_graph(
    form: str, runs: Sequence[Path], edges: Sequence[tuple[Path, Path, str]]
) -> Iterator[str]:
    """Yield the lines of a graph from producers to consumers."""
    if form == "json":
        keys = ("producer", "consumer", "path")
        rows = [dict(zip(keys, map(str, edge))) for edge in edges]
        yield _format_json({"runs": list(map(str, runs)), "edges": rows}).rstrip()
        return
    dot = form == "dot"

    def label(text: str) -> str:
        shown = _printable(text)
        if dot:
            return '"' + re.sub(r'(["\\])', r"\\\1", shown) + '"'
        return '"' + re.sub(r'["#<>&\\`|]', lambda m: f"#{ord(m[0])};", shown) + '"'

    names = {run: f"n{number}" for number, run in enumerate(runs)}
    yield "digraph lineage {" if dot else "graph TD"
    for run, name in names.items():
        shown = label(run.name)
        yield f"  {name} [label={shown}];" if dot else f"  {name}[{shown}]"
    for producer, consumer, path in edges:
        a, b, shown = names[producer], names[consumer], label(path)
        yield f"  {a} -> {b} [label={shown}];" if dot else f"  {a} -->|{shown}| {b}"
    if dot:
        yield "}"


def _printable(text: str) -> str:
    """Escape what could steer a terminal, hide text, or not be printed at all."""
    hidden = r"\0-\x08\n-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f"
    hidden = rf"[{hidden}\ufeff\ud800-\udfff]"
    text = re.sub(hidden, lambda m: m[0].encode("unicode_escape").decode("ascii"), text)
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


# === Command line ===
# Exit status 0: yes, same, done; 1: no, different; 2: trouble.


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line with `argv` (default: sys.argv[1:]); return its status."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["--recorder"]:
        return _recorder_main(int(words[1]), int(words[2]))
    parser = _parser(words)
    try:
        args = parser.parse_args(words)
        status: int = args.command(args)
        print(end="", flush=True)
        return status
    except BrokenPipeError:  # `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0
    except (ValueError, OSError) as error:
        print(f"{parser.prog}: {_printable(str(error))}", file=sys.stderr)
        return 2


def _parser(words: Sequence[str]) -> argparse.ArgumentParser:
    """Return the parser of the command that `words` name, or of all."""
    import argparse

    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    prog = os.path.basename((getattr(sys, "argv", None) or ["run_utils"])[0])
    if spec is not None:
        prog = f"python -m {spec.name.replace('.__main__', '')}"
    parser = argparse.ArgumentParser(prog=prog, description="Record experiments.")
    version = f"run_utils {__version__}"
    parser.add_argument("--version", action="version", version=version)
    # Without `prog` argparse would import shutil, for 5 ms.
    commands = parser.add_subparsers(metavar="COMMAND", required=True, prog=prog)
    table = {
        "run": _add_run, "inspect": _add_inspect, "list": _add_list, "diff": _add_diff,
        "lineage": _add_lineage, "note": _add_note, "reindex": _add_reindex,
        "audit": _add_audit,
    }  # fmt: skip
    for name in [word for word in words[:1] if word in table] or table:
        table[name](commands)
    return parser


RUN_HELP = "a path, anything in a run, a part of a name, or latest"
ROOT_HELP = "a folder with runs (default: results, else the working directory)"


def _add_run(commands: Any) -> None:
    run = commands.add_parser("run", help="record any command, in any language")
    run.add_argument("--base-dir", default="results/runs", metavar="DIR")
    run.add_argument("--prefix", metavar="NAME", help="default: the script's name")
    run.add_argument("--config", metavar="FILE", help="JSON or YAML to keep as config")
    run.add_argument("words", nargs="+", metavar="CMD", help="after --")
    run.set_defaults(command=_cmd_run)


def _cmd_run(args: argparse.Namespace) -> int:
    """Record a command; return its exit status, 128+n when signal n ended it."""
    import shutil

    words: list[str] = args.words
    if shutil.which(words[0]) is None:
        raise ValueError(f"{words[0]!r} is not a program on PATH; nothing was recorded")
    config = {**_read_options(args.config), **_flags(words)}
    script = Path(next(filter(os.path.isfile, words[1:]), words[0])).stem
    module = words[words.index("-m") + 1] if "-m" in words[1:-1] else script
    recording = run_context(args.base_dir, args.prefix or module, config)
    recording.argv = words
    run = _run_on_terminal if all(map(os.isatty, (0, 1, 2))) else _run_attached
    with recording as run_dir:
        code = run(words)
        how = ("failed", "system_exit") if code else ("success", "normal")
        recording.ending = _killed_by(-code) if code < 0 else _outcome(*how, code)
    print(f"run_utils: recorded in {_printable(str(run_dir))}", file=sys.stderr)
    return 128 - code if code < 0 else code


def _read_options(name: str | None) -> dict[str, Any]:
    """Return the mapping in a JSON file, or in a YAML file where there is PyYAML."""
    if name is None:
        return {}
    try:
        text = _read_bytes(Path(name))
        is_json = text.lstrip()[:1] == b"{"
        value = json.loads(text) if is_json else _pyyaml().safe_load(text)
    except ImportError:
        raise ValueError(f"--config {name!r}: PyYAML is missing; give JSON") from None
    except Exception as error:  # yaml.YAMLError cannot be named without PyYAML
        raise ValueError(f"--config {name!r} cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"--config {name!r} is not a mapping; give key: value lines")
    return value


def _flags(words: Sequence[str]) -> dict[str, Any]:
    """Return the options of a command as a config.

    >>> _flags(["train.py", "--lr", "0.1", "--fp16", "optim.beta=0.9"])
    {'lr': 0.1, 'fp16': True, 'optim.beta': 0.9}
    """
    config: dict[str, Any] = {}
    waiting = ""
    for word in words[1:]:
        option = re.fullmatch(r"(--|\+\+?|)([A-Za-z_][\w.-]*)(?:=(.*))?", word, re.S)
        if option and option[3] is not None:
            config[option[2]], waiting = option[3], ""
        elif option and option[1] == "--":
            config[option[2]], waiting = "true", option[2]
        elif waiting:
            config[waiting], waiting = word, ""
    for name, text in config.items():
        if re.fullmatch(r"[-+]?\d{1,18}", text):
            config[name] = int(text)
        elif re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?", text):
            config[name] = float(text)
        elif text.lower() in ("true", "false"):
            config[name] = text.lower() == "true"
    return config


def _run_attached(words: Sequence[str]) -> int:
    """Run a command on our streams; return its status, -n when signal n ended it."""
    import subprocess

    children: list[subprocess.Popen[bytes]] = []
    early: list[int] = []
    typed: tuple[int, ...] = ()  # what the terminal sends to the command as well
    with contextlib.suppress(OSError), open("/dev/tty", "rb") as terminal:
        if os.tcgetpgrp(terminal.fileno()) == os.getpgrp():
            typed = (signal.SIGINT, signal.SIGQUIT)

    def forward(number: int, frame: object) -> None:
        if not children:
            early.append(number)
        elif number not in typed:
            children[0].send_signal(number)

    with _handling(FORWARDED_SIGNALS, forward):
        children.append(subprocess.Popen(words))
        for number in early:
            children[0].send_signal(number)
        return children[0].wait()


def _run_on_terminal(words: Sequence[str]) -> int:
    """Run a command on a pseudo-terminal of the same size; copy it to the log."""
    import fcntl
    import pty
    import termios

    inner: list[int] = []  # our end of the pseudo-terminal
    early: list[int] = []

    def resize(*_: object) -> None:
        for descriptor in inner:
            size = fcntl.ioctl(0, termios.TIOCGWINSZ, bytes(8))
            fcntl.ioctl(descriptor, termios.TIOCSWINSZ, size)

    def forward(number: int, frame: object) -> None:
        if not inner:
            early.append(number)
        for descriptor in inner:
            os.killpg(os.tcgetpgrp(descriptor), number)

    def read(descriptor: int) -> bytes:
        shown, marker = os.read(descriptor, FORWARD_BYTES), b""
        if not inner:
            marker, shown = shown[:1], shown[1:]  # the first output tells us `inner`
            inner.append(descriptor)
            resize()
            while early:
                forward(early.pop(), None)
        if isinstance(sys.stdout, _Tee):
            sys.stdout.copy(shown)
        return shown or marker

    shell = ["/bin/sh", "-c", 'printf "\\0"; exec "$@"', "sh"]
    with _handling([signal.SIGWINCH], resize), _handling(FORWARDED_SIGNALS, forward):
        return _exit_of(pty.spawn([*shell, *words], read))


@contextlib.contextmanager
def _handling(numbers: Iterable[int], handler: Any) -> Iterator[None]:
    """Handle signals that are not ignored, and put back what was there."""
    with contextlib.ExitStack() as stack:
        for number in numbers:
            if signal.getsignal(number) is not signal.SIG_IGN:
                stack.callback(signal.signal, number, signal.signal(number, handler))
        yield


def _add_inspect(commands: Any) -> None:
    inspect = commands.add_parser("inspect", help="show one run on one screen")
    inspect.add_argument("run", metavar="RUN", help=RUN_HELP)
    inspect.add_argument("--json", action="store_true", help="for programs")
    inspect.set_defaults(command=_cmd_inspect)


def _cmd_inspect(args: argparse.Namespace) -> int:
    """Print what ran, how it ended, what it left, and what differs from now."""
    run = Run(_find_run(args.run))
    lineage = _Lineage(_results_root(run.path.parent), run.path)
    users = [there for (here, there) in lineage.edges if here == run.path]
    facts = {
        "run_dir": str(run.path), "status": run.status, "attempts": run.attempts,
        "config": run.config, "metadata": run.metadata, "metrics": _series(run),
        "outputs": run.outputs, "used_by": sorted({path.name for path in users}),
        "notes": run.notes, "tags": run["tags"], "problems": run.problems,
        "now": _differences_from_now(run.metadata),
    }
    if args.json:
        print(_format_json(facts), end="")
        return 0
    for name, lines in _format_inspect(run, facts):
        for number, line in enumerate(lines):
            print(f"{'' if number else name:<10}{_printable(line)}".rstrip())
    return 0


def _find_run(text: str) -> Path:
    """Return the run that a path, a part of a name, or "latest" means."""
    path = Path(text)
    if path.exists() or path.is_symlink():
        found = _run_of(path.absolute())
        if found is None:
            raise ValueError(f"{text!r} is not in a run directory; give one, or a name")
        return Path(os.path.realpath(found))
    root = _root(None)
    paths = _walk_runs(root)
    if text == "latest":
        runs = [path for path in paths[:100] if _looks_like_run(path)][:1]
    else:
        runs = [path for path in paths if text in os.path.basename(path)]
        runs = [path for path in runs if os.path.basename(path) == text] or runs
    if not runs:
        raise ValueError(f"no run {text!r} below {str(root)!r}")
    if len(runs) > 1:
        names = ", ".join(map(os.path.basename, runs[:3]))
        many = f"{len(runs)} names ({names}, ...)"
        raise ValueError(f"{text!r} is a part of {many}; say more")
    return Path(runs[0])


def _root(text: str | None) -> Path:
    """Return the folder to look for runs in, as an absolute path without links."""
    root = text or ("results" if os.path.isdir("results") else os.curdir)
    if not os.path.isdir(root):
        raise ValueError(f"{root!r} is not a folder; give one that holds runs")
    return Path(os.path.realpath(root))


def _add_list(commands: Any) -> None:
    parser = commands.add_parser("list", help="list runs, newest first")
    parser.add_argument("root", nargs="?", metavar="ROOT", help=ROOT_HELP)
    parser.add_argument("--where", metavar="EXPR", help="'lr<1e-3 and acc>0.9'")
    parser.add_argument("--status", metavar="WORD", help="running, success, lost, ...")
    parser.add_argument("--since", metavar="TIME", help="12h, 7d, 2026-01-31")
    parser.add_argument("--contains", metavar="TEXT", help="a part of the path")
    parser.add_argument("--tag", metavar="TAG", help="one that is in force")
    parser.add_argument("--has-outputs", action="store_true", help="not the empty ones")
    parser.add_argument("--sort", metavar="KEY", help="by a value; =-KEY: reversed")
    parser.add_argument(
        "-n", "--limit", type=int, metavar="N",
        help=f"at most N, 0 for all (default: {MAX_ROWS} in a table, else all)",
    )  # fmt: skip
    parser.add_argument("--by-script", action="store_true", help="one table a script")
    formats = parser.add_mutually_exclusive_group()
    form = {"dest": "format", "action": "store_const"}
    for name in ("json", "csv", "md"):
        formats.add_argument(f"--{name}", const=name, **form)
    parser.set_defaults(command=_cmd_list)


def _cmd_list(args: argparse.Namespace) -> int:
    """Print one row for each run that was asked for."""
    root = _root(args.root)
    limit = MAX_ROWS if args.limit is None and not args.format else args.limit
    runs, unseen = _select_runs(
        root, args.where, args.status, args.since, args.contains, args.tag,
        args.has_outputs, args.sort, limit or None,
    )  # fmt: skip
    if args.format:
        runs = _with_lineage(runs, root)
    if args.format == "json":
        print(_format_json([_row(run, root) for run in runs]), end="")
    elif args.format == "csv":
        _print_csv([_row(run, root) for run in runs])
    else:
        _print_tables(runs, root, args.format == "md", args.by_script)
    if not runs and not args.format:
        print(f"no such runs below {str(root)!r}", file=sys.stderr)
    if unseen and not args.format:
        print(f"{unseen} older runs are not shown; -n 0 shows all")
    problems = [problem for run in runs for problem in run.problems]
    if problems:
        count = _format_count(len(problems), "file")
        print(f"{count} cannot be read: {_printable(problems[0])}", file=sys.stderr)
    return 0


def _differences_from_now(metadata: Mapping[str, Any]) -> dict[str, str]:
    """Return what of machine and code is not as it was: "then -> now"."""
    git = _mapping(metadata, "git")
    root = str(git.get("root") or "")
    now = {
        "commit": (git.get("commit_short"), _git_head(root) if root else None),
        "python": (_mapping(metadata, "python").get("version"), sys.version),
        "hostname": (metadata.get("hostname"), _hostname()),
        "platform": (_mapping(metadata, "platform").get("platform"), _platform_name()),
    }
    short = {name: [str(v).split(" ")[0] for v in pair] for name, pair in now.items()}
    return {k: " -> ".join(v) for k, v in short.items() if v[0] != v[1] and all(now[k])}


def _add_diff(commands: Any) -> None:
    about = "show what differs between two runs, or between one and here and now"
    diff = commands.add_parser("diff", help=about)
    diff.add_argument("a", metavar="RUN", help=RUN_HELP)
    diff.add_argument("b", metavar="RUN", nargs="?", help="default: here and now")
    diff.add_argument("--json", action="store_true", help="for programs")
    diff.set_defaults(command=_cmd_diff)


def _cmd_diff(args: argparse.Namespace) -> int:
    """Print the differences; return 0 when there are none, else 1."""
    a = Run(_find_run(args.a))
    b = Run(_find_run(args.b)) if args.b else None
    sides = _comparable_run(a), _comparable_run(b) if b else _comparable_now(a)
    found = _differences(*sides)
    if args.json:
        print(_format_json(found), end="")
        return 1 if found else 0
    for section, pairs in found.items():
        lines = [line for key in pairs for line in _format_change(key, *pairs[key])]
        if "commit_full" in pairs:
            lines += _format_commits(a, pairs["commit_full"])
        for number, line in enumerate(lines):
            print(f"{'' if number else section:<10}{_printable(line)}".rstrip())
    return 1 if found else 0


def _comparable_run(run: Run) -> dict[str, Any]:
    """Return what `diff` compares of a run, in its order."""
    patches: dict[str, str] = {}
    for path in sorted(run.path.glob("git*.patch")):
        with contextlib.suppress(OSError):
            patches[path.name] = _read_bytes(path).decode("utf-8", "replace")
    if _mapping(run.metadata, "git").get("is_dirty") and not patches:
        patches["uncommitted changes"] = f"not kept by {run.path.name}"
    metrics = {k: v for k, v in run.metrics.items() if k not in _NO_METRICS}
    of_run = {"config": run.config, "determinism": _seeds(run)}
    facts = _comparable({**run.metadata, **of_run}, patches)
    return {**facts, "metrics": metrics}


def _seeds(run: Run) -> dict[str, Any]:
    """Return the seeds and flags that a run had in the end."""
    files = run.metadata, run.status
    return {k: v for file in files for k, v in _mapping(file, "determinism").items()}


def _comparable_now(run: Run) -> dict[str, Any]:
    """Return the same of here and now; it has no config, metrics or seeds."""
    root = _mapping(run.metadata, "git").get("root")
    directory = str(root if os.path.isdir(str(root)) else _working_dir() or "/")
    metadata = _immediate_metadata([], directory, None)
    excluded = [str(_results_root(run.path.parent)), str(run.path)]
    metadata["git"], _ = _git(_GitTree(directory, excluded))
    metadata["cuda"] = {**metadata["cuda"], **_cuda()[0]}
    metadata["container"], _ = _container()
    metadata["determinism"] = _seeds(run)
    metadata["pip_freeze"], _ = _packages(sys.executable, sys.path)
    facts = _comparable(metadata)
    del facts["config"]
    return facts


def _add_lineage(commands: Any) -> None:
    about = "show which runs a run used, and which used it"
    lineage = commands.add_parser("lineage", help=about)
    lineage.add_argument("run", metavar="RUN", help=RUN_HELP)
    formats = lineage.add_mutually_exclusive_group()
    form = {"dest": "format", "action": "store_const"}
    for name in ("dot", "mermaid", "json"):
        formats.add_argument(f"--{name}", const=name, **form)
    lineage.set_defaults(command=_cmd_lineage)


def _cmd_lineage(args: argparse.Namespace) -> int:
    """Print the runs that a run used and those that used it, to any depth."""
    start = _find_run(args.run)
    lineage = _Lineage(_results_root(start.parent))
    ways = {users: list(lineage.walk(start, users)) for users in (False, True)}
    if args.format:
        related = {start, *(run for way in ways.values() for _, run, _ in way)}
        edges = [(*pair, _format_paths(paths)) for pair, paths in
                 lineage.edges.items() if related.issuperset(pair)]  # fmt: skip
        print("\n".join(_format_graph(args.format, sorted(related), edges)))
        return 0
    print(_printable(f"{start.name} ({_text(_status_now(start).get('status'))})"))
    for users, title in ((False, "used"), (True, "used by")):
        for number, (depth, run, path) in enumerate(ways[users]):
            known = _is_run(run)
            status = _status_now(run).get("status") if known else "not there now"
            line = "  " * depth + f"{run.name} ({_text(status)}): {path}"
            print(f"{'' if number else title:<8}{_printable(line)}")
    return 0


def _add_note(commands: Any) -> None:
    note = commands.add_parser("note", help="append a note or tags to a run")
    note.add_argument("run", metavar="RUN", help=RUN_HELP)
    note.add_argument("text", metavar="TEXT", nargs="?", default="")
    many: Any = {"action": "append", "default": [], "metavar": "TAG"}
    note.add_argument("--tag", help="such as canonical or superseded", **many)
    note.add_argument("--untag", help="a tag to take away", **many)
    note.set_defaults(command=_cmd_note)


def _cmd_note(args: argparse.Namespace) -> int:
    """Append one line to the run's notes.jsonl, and a "note" line to the index."""
    if not (args.text or args.tag or args.untag):
        raise ValueError('nothing to note; give a text, or --tag canonical')
    run_dir = _find_run(args.run)
    _append_note(run_dir, args.text, args.tag, args.untag)
    with _tolerating("the index"):
        more = {"text": args.text, "tags": args.tag, "untag": args.untag}
        _append_index(_index_row(run_dir), "note", None, **more)
    return 0


def _add_reindex(commands: Any) -> None:
    about = "rebuild the index from the directories"
    reindex = commands.add_parser("reindex", help=about)
    reindex.add_argument("root", nargs="?", metavar="ROOT", help=ROOT_HELP)
    reindex.add_argument("--dry-run", action="store_true", help="only say what changes")
    reindex.set_defaults(command=_cmd_reindex)


def _cmd_reindex(args: argparse.Namespace) -> int:
    """Replace the index by one line for each run; keep what is appended meanwhile."""
    root = _root(args.root)
    path = root / INDEX_FILE
    before = {str(row.get("path")) for row in _read_lines(path, MAX_INDEX)}
    size = os.path.getsize(path) if path.exists() else 0
    rows = _rebuilt_index(root)
    now = {row["path"] for row in rows}
    change = f"{len(now - before)} added, {len(before - now)} removed"
    print(f"{len(rows)} runs: {change}" + ", if it were done" * args.dry_run)
    if not args.dry_run:
        _replace_index(path, size, rows)
    return 0


def _add_audit(commands: Any) -> None:
    about = "search runs, also of the ancestors, for secrets; exit status 1: there are"
    audit = commands.add_parser("audit", help=about)
    audit.add_argument("root", nargs="?", metavar="ROOT", help=ROOT_HELP)
    audit.add_argument("--json", action="store_true", help="as JSON")
    audit.set_defaults(command=_cmd_audit)


def _cmd_audit(args: argparse.Namespace) -> int:
    """Say where a secret is, and never which."""
    root = _root(args.root)
    _redact(dict(os.environ))  # what is secret here and now is searched as well
    audit = _Audit(root)
    for run in _walk_runs(root):
        audit.search(_files_below(run))
    audit.search([root / INDEX_FILE] if (root / INDEX_FILE).is_file() else [])
    if args.json:
        facts = {"found": audit.found, "files": len(audit.read)}
        print(_format_json({**facts, "not_searched": audit.unread}), end="")
    else:
        print("\n".join(map(_printable, audit.report())))
    return 1 if audit.found else 2 if audit.unread else 0


class _Audit:
    """Secrets in files, by file and place; what they are is never told."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.found: list[dict[str, str]] = []
        self.read: dict[Path, bool] = {}  # a file, and whether it is binary
        self.unread: dict[str, str] = {}  # a file, and why

    def search(self, paths: Sequence[Path]) -> None:
        """Search files, twice where a secret is found, which the others may hold."""
        known = len(_known_secrets)
        found = [(path, self.places(path)) for path in paths]
        if len(_known_secrets) > known:
            found = [(path, self.places(path)) for path in paths]
        for path, places in found:
            self.found += [{"file": self.name(path), "place": at} for at in places]

    def name(self, path: Path) -> str:
        return _redact_text(os.path.relpath(path, self.root))

    def places(self, path: Path) -> list[str]:
        """Return where in a file secrets are."""
        try:
            data = _read_bytes(path)
        except OSError as error:
            self.unread[self.name(path)] = error.strerror or str(error)
            return []
        self.read[path] = b"\0" in data[:8192]
        if self.read[path]:
            return ["somewhere in a binary file"] * (_replace_known(data) != data)
        return _secret_places(path.suffix, data.decode("utf-8", "surrogateescape"))

    def report(self) -> list[str]:
        lines = [f"{entry['file']}: {entry['place']}" for entry in self.found]
        lines += [f"{file}: not searched: {why}" for file, why in self.unread.items()]
        places = _format_count(len(self.found) or "no", "place", "with a secret")
        files = _format_count(len(self.read) or "no", "file", "searched")
        binary = sum(self.read.values())
        more = f", {binary} binary: only for the secrets of the others" * bool(binary)
        lines.append(f"{places}; {files}{more}")
        todo = "revoke each that is valid; then remove it, or the file, by hand"
        return [*lines, todo] if self.found else lines


def _files_below(run: str) -> list[Path]:
    """Return the regular files of a run; links lead out of it."""
    paths = []
    for folder, folders, names in os.walk(run):
        folders.sort()
        paths += [Path(folder, name) for name in sorted(names)]
    return [path for path in paths if path.is_file() and not path.is_symlink()]


def _secret_places(suffix: str, text: str) -> list[str]:
    """Return the keys of JSON or YAML, else the lines, where a text has secrets."""
    if suffix in (".json", ".yaml", ".yml") and len(text) <= MAX_CONFIG:
        with contextlib.suppress(Exception):  # it is torn: searched as text
            value = json.loads(text) if suffix == ".json" else _parse_yaml(text)
            return [f"key {key}" for key in dict.fromkeys(_secret_keys(value, ""))]
    if suffix != ".jsonl" and not _holds_secret(text):
        return []
    places, in_hunk = [], False
    for number, line in enumerate(text.split("\n"), 1):
        in_hunk = line == "GIT binary patch" or (in_hunk and line != "")
        keys = list(_secret_keys(_parsed(line), "")) if suffix == ".jsonl" else []
        places += [f"line {number}, key {key}" for key in keys]
        if not keys and not in_hunk and _holds_secret(line):
            places.append(f"line {number}")
    return places


def _parsed(line: str) -> Any:
    with contextlib.suppress(ValueError, RecursionError):
        return json.loads(line)
    return None


def _secret_keys(value: Any, key: str, name: str = "") -> Iterator[str]:
    """Yield the dotted keys of plain data under which a secret is."""
    if isinstance(value, dict):
        for inner, item in value.items():
            shown = _redact_text(str(inner))
            if shown != str(inner):
                yield f"{key}.{shown}".lstrip(".")
            yield from _secret_keys(item, f"{key}.{shown}".lstrip("."), str(inner))
    elif isinstance(value, list) and (name != "argv" or _redact_argv(value) == value):
        for item in value:
            yield from _secret_keys(item, key, name)
    elif isinstance(value, list):
        yield key
    elif isinstance(value, str):
        short = len(value) <= MAX_REDACTED  # what is longer would be cut
        if _redact(value, name) != value if short else _holds_secret(value):
            yield key


def _holds_secret(text: str) -> bool:
    return _redact_whole(text) != text


if __name__ == "__main__":
    raise SystemExit(main())
