#!/usr/bin/env python3
# SPDX-FileCopyrightText: 2026 the run_utils authors
# SPDX-License-Identifier: MIT
"""Ranks of torchrun, accelerate, mpirun and srun share a run; many race for it.

RUN_UTILS_RACES is the number of random launches that have one key (default 60).
"""

from __future__ import annotations

import importlib.util
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import unittest
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from test_run_utils import CountingRunner  # noqa: E402

TRAIN = """
import os, random, sys, time
from run_utils import run_context

names = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID")
rank = next(os.environ[name] for name in names if name in os.environ)
time.sleep(float(sys.argv[1]) * random.random())
with run_context("results/exp", "exp", resume=os.environ.get("RESUME")) as run_dir:
    if "torch" in sys.argv:
        import torch.distributed as dist
        dist.init_process_group("gloo")
        dist.barrier()
    print("rank", rank, run_dir, flush=True)
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if f"fail={rank}" in sys.argv and restarts == "0":
        time.sleep(1)
        raise ValueError("bad batch")
    if f"kill={rank}" in sys.argv:
        time.sleep(1)
        os.kill(os.getpid(), 9)
    if "torch" in sys.argv:
        dist.barrier()
    if "hang" in sys.argv and restarts == "0":
        time.sleep(60)
"""
RACE = """
import sys
import run_utils
run_utils.RANK_WAIT_SECONDS = 30
with run_utils.run_context("results/exp", "exp", capture_output=False) as run_dir:
    print(sys.argv[1], run_dir, flush=True)
    sys.stdin.read()
"""


def read(path: Path) -> dict[str, Any]:
    value = json.loads(path.read_text("ascii"))
    assert isinstance(value, dict)
    return value


class Case(unittest.TestCase):
    """A temporary directory with train.py."""

    def setUp(self) -> None:
        folder = tempfile.mkdtemp(prefix="run_utils-launchers-")
        self.tmp = Path(os.path.realpath(folder))
        self.addCleanup(shutil.rmtree, self.tmp, ignore_errors=True)
        (self.tmp / "train.py").write_text(TRAIN, "utf-8")
        drop = ("SLURM_", "OMPI_", "PMI")
        self.env = {k: v for k, v in os.environ.items() if not k.startswith(drop)}
        self.env.update(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")

    def start(self, *words: str, **more: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            words, cwd=self.tmp, env={**self.env, **more}, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8",
            errors="replace",
        )  # fmt: skip
        self.addCleanup(process.communicate)
        self.addCleanup(process.kill)
        return process

    def launch(self, *words: str, code: int | None = 0, **more: str) -> str:
        """Run a command to its end and return its output."""
        process = self.start(*words, **more)
        output = process.communicate(timeout=100)[0]
        if code is not None:
            self.assertEqual(process.returncode, code, output)
        return output

    def run_dirs(self) -> list[Path]:
        return sorted((self.tmp / "results/exp").glob("exp-*"))

    def check_one_run(self, output: str, world: int = 4) -> Path:
        """All ranks had one path; one record, one start and one end; logs of each."""
        (run_dir,) = self.run_dirs()
        self.assertEqual(read(run_dir / "status.json")["status"], "success")
        metadata = read(run_dir / "metadata.json")
        self.assertEqual(metadata["launcher"]["world_size"], world)
        index = (self.tmp / "results/index/runs_index.jsonl").read_text("ascii")
        events = [json.loads(line)["event"] for line in index.splitlines()]
        self.assertEqual(events, ["start", "end"])
        for rank in range(world):
            pattern = "[so]*.log"  # stdout.log, stderr.log or output.log
            if rank:
                pattern = f"rank{rank}.*.log"
            logs = run_dir.glob(f"logs/{pattern}")
            text = "".join(path.read_text("utf-8") for path in logs)
            self.assertIn(f"rank {rank} {run_dir}\n", text, output)
        return run_dir

    def check_failure(self, rank: int, why: str) -> dict[str, Any]:
        """The one run names the rank; its recorders may still be at work."""
        (run_dir,) = self.run_dirs()
        status = self.wait_for_failed_rank(run_dir / "status.json")
        self.assertEqual(status.get("failed_rank"), rank, status)
        self.assertEqual((status["status"], status["exit_reason"]), ("failed", why))
        self.assertTrue((run_dir / f"logs/rank{rank}.status.json").is_file())
        return status

    def wait_for_failed_rank(self, path: Path) -> dict[str, Any]:
        for _ in range(500):
            status = read(path)
            if "failed_rank" in status:
                break
            time.sleep(0.02)
        return status


class Torchrun(Case):
    """torchrun with gloo: one run, the cause of a failure, and restarted attempts."""

    restarting = ("--max-restarts", "2", "--nproc-per-node", "2", "train.py", "0")

    def setUp(self) -> None:
        super().setUp()
        if importlib.util.find_spec("torch") is None:
            self.skipTest("torch is not installed")

    def torchrun(self, *words: str) -> tuple[str, ...]:
        return (sys.executable, "-m", "torch.distributed.run", *words)

    def four(self, *words: str) -> tuple[str, ...]:
        return self.torchrun("--nproc-per-node", "4", "train.py", "0", *words)

    def test_two_agents_whose_ranks_come_at_different_times_share_a_run(self) -> None:
        options = ["--nnodes", "2", "--master-addr", "127.0.0.1", "--master-port"]
        options += ["29617", "--nproc-per-node", "2", "--node-rank"]
        words = ("train.py", "5", "torch")
        agents = [self.start(*self.torchrun(*options, node, *words)) for node in "01"]
        outputs = [agent.communicate(timeout=100)[0] for agent in agents]
        self.check_one_run("".join(outputs))

    def test_the_rank_that_raises_is_named(self) -> None:
        self.launch(*self.four("fail=2", "hang"), code=1)
        status = self.check_failure(2, "exception")
        self.assertEqual(status["exception"]["message"], "bad batch")
        self.assertEqual(status["ranks"]["0"]["signal"], "SIGTERM")

    def test_the_rank_that_is_killed_is_named(self) -> None:
        self.launch(*self.four("kill=3", "torch"), code=1)
        self.assertEqual(self.check_failure(3, "killed")["signal"], "SIGKILL")

    def test_a_restart_is_a_run_of_its_own_that_says_so(self) -> None:
        self.launch(*self.torchrun(*self.restarting, "fail=1", "hang"))
        found = [read(path / "metadata.json")["launcher"] for path in self.run_dirs()]
        self.assertEqual([facts["restarts"] for facts in found], [[0, 0], [0, 1]])

    def test_resume_auto_makes_a_restart_an_attempt(self) -> None:
        self.launch(*self.torchrun(*self.restarting, "fail=1", "hang"), RESUME="auto")
        (run_dir,) = self.run_dirs()
        status = read(run_dir / "status.json")
        self.assertEqual((status["status"], status["attempt"]), ("success", 2))
        first = self.wait_for_failed_rank(run_dir / "attempts/1/status.json")
        self.assertEqual(first.get("failed_rank"), 1, first)
        self.assertEqual(first["exception"]["message"], "bad batch")

    def test_processes_of_spawn_share_a_run(self) -> None:
        code = """
import os, torch.distributed
from run_utils import run_context

def work(rank, world):
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="29618")
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world)
    with run_context("results/exp", "exp") as run_dir:
        print("rank", rank, run_dir, flush=True)
        torch.distributed.barrier()
    torch.distributed.destroy_process_group()

if __name__ == "__main__":
    torch.multiprocessing.spawn(work, args=(4,), nprocs=4)
"""
        (self.tmp / "train.py").write_text(code, "utf-8")
        self.check_one_run(self.launch(sys.executable, "train.py"))

    def test_accelerate_shares_a_run(self) -> None:
        if importlib.util.find_spec("accelerate") is None:
            self.skipTest("accelerate is not installed")
        words = ["-m", "accelerate.commands.accelerate_cli", "launch", "--multi_gpu"]
        words += ["--num_processes", "4", "--num_machines", "1"]
        words += ["--mixed_precision", "no", "--dynamo_backend", "no"]
        output = self.launch(sys.executable, *words, "train.py", "0", "torch")
        self.check_one_run(output)


class Lightning(Case):
    """It starts the ranks by itself, in mid-script: they come into the same run."""

    TRAIN = """
import sys
import lightning, torch
from run_utils import run_context

class Model(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)
    def training_step(self, batch, number):
        return self.layer(batch[0]).pow(2).mean()
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)

data = torch.utils.data.TensorDataset(torch.randn(8, 4))
quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar"), False)
for fold in range(2):
    with run_context("results/exp", "exp", {"fold": fold}) as run_dir:
        trainer = lightning.Trainer(
            max_epochs=1, accelerator="cpu", devices=2, strategy="ddp", **quiet
        )
        trainer.fit(Model(), torch.utils.data.DataLoader(data, batch_size=2))
        print("rank", trainer.global_rank, run_dir, flush=True)
        if fold and trainer.global_rank:
            raise ValueError("bad fold")
"""

    def setUp(self) -> None:
        super().setUp()
        if importlib.util.find_spec("lightning") is None:
            self.skipTest("lightning is not installed")

    def test_the_ranks_of_two_folds_share_two_runs(self) -> None:
        (self.tmp / "train.py").write_text(self.TRAIN, "utf-8")
        self.launch(sys.executable, "train.py", code=None)
        first, second = self.run_dirs()
        for run_dir in (first, second):
            for rank, pattern in enumerate(("[so]*.log", "rank1.*.log")):
                logs = run_dir.glob(f"logs/{pattern}")
                text = "".join(path.read_text("utf-8") for path in logs)
                self.assertIn(f"rank {rank} {run_dir}\n", text)
        self.assertEqual(read(first / "status.json")["status"], "success")
        status = self.wait_for_failed_rank(second / "status.json")
        self.assertEqual(status["exception"]["message"], "bad fold")


class Mpirun(Case):
    """Open MPI: one run, and the cause of a failure."""

    def setUp(self) -> None:
        super().setUp()
        if shutil.which("mpirun") is None:
            self.skipTest("mpirun is not installed")
        self.mpirun = ("mpirun", "--allow-run-as-root", "--oversubscribe", "-n", "4")

    def test_four_ranks_share_a_run(self) -> None:
        words = (*self.mpirun, sys.executable, "train.py", "0.5")
        self.check_one_run(self.launch(*words))

    def test_a_shell_around_each_rank_changes_nothing(self) -> None:
        shell = ("sh", "-c", f"{sys.executable} train.py 0.5; exit $?")
        self.check_one_run(self.launch(*self.mpirun, *shell))

    def test_the_rank_that_raises_is_named(self) -> None:
        words = (*self.mpirun, sys.executable, "train.py", "0", "fail=2", "hang")
        self.launch(*words, code=None)
        self.check_failure(2, "exception")


class Srun(Case):
    """A SLURM of one node, started for the test: steps share runs, scripts do not."""

    def setUp(self) -> None:
        super().setUp()
        programs = ("slurmctld", "slurmd", "munged", "srun", "sbatch")
        missing = [name for name in programs if shutil.which(name) is None]
        if missing or os.geteuid() != 0:
            self.skipTest(f"not installed: {', '.join(missing) or 'root rights'}")
        self.place = self.tmp / "slurm"
        self.place.mkdir()
        self.write_settings()
        self.start_daemons()

    def write_settings(self) -> None:
        host = os.uname().nodename
        port = random.randrange(20000, 30000)
        settings = {
            "ClusterName": "check",
            "SlurmctldHost": f"{host}(127.0.0.1)",
            "SlurmUser": "root",
            "SlurmctldPort": port,
            "SlurmdPort": port + 1,
            "AuthType": "auth/munge",
            "AuthInfo": f"socket={self.place}/munge.socket",
            "CredType": "cred/munge",
            "StateSaveLocation": self.place,
            "SlurmdSpoolDir": self.place / "spool",
            "SlurmctldPidFile": self.place / "slurmctld.pid",
            "SlurmdPidFile": self.place / "slurmd.pid",
            "ProctrackType": "proctrack/linuxproc",
            "TaskPlugin": "task/none",
            "SelectType": "select/cons_tres",
            "MpiDefault": "none",
            "ReturnToService": 2,
            "NodeName": f"{host} NodeAddr=127.0.0.1 CPUs={os.cpu_count()}",
            "PartitionName": "all Nodes=ALL Default=YES OverSubscribe=FORCE",
        }
        text = "".join(f"{name}={value}\n" for name, value in settings.items())
        (self.place / "slurm.conf").write_text(text, "utf-8")
        self.env["SLURM_CONF"] = str(self.place / "slurm.conf")

    def start_daemons(self) -> None:
        key = self.place / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        munge = [f"--key-file={key}", f"--socket={self.place}/munge.socket"]
        munge += [f"--pid-file={self.place}/munge.pid"]
        munge += [f"--seed-file={self.place}/munge.seed"]
        munge += [f"--log-file={self.place}/munge.log"]
        self.daemon("munged", "--foreground", "--force", *munge)
        self.daemon("slurmctld", "-D", "-c")
        self.daemon("slurmd", "-D", "-c", "-N", os.uname().nodename)
        for _ in range(150):
            state = self.launch("sinfo", "-h", "-o", "%T", code=None)
            if "idle" in state:
                return
            time.sleep(0.1)
        logs = "".join(path.read_text("utf-8") for path in self.place.glob("*.out"))
        self.skipTest(f"SLURM did not start here: {state} {logs[-400:]}")

    def daemon(self, *words: str) -> None:
        with open(self.place / f"{words[0]}.out", "wb") as log:
            process = subprocess.Popen(
                words, env=self.env, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        self.addCleanup(process.wait)
        self.addCleanup(process.terminate)

    def test_a_step_shares_a_run_and_a_script_is_one(self) -> None:
        words = ("srun", "-n", "4", "--overcommit", sys.executable, "train.py", "0.5")
        run_dir = self.check_one_run(self.launch(*words))
        self.assertTrue(run_dir.name.startswith("exp-"))
        shutil.rmtree(self.tmp / "results")
        python = f"{sys.executable} train.py 0"
        step = f"srun -n2 -O {python}"
        script = f"#!/bin/sh\n{python}\n{step}\n{step}\n"
        (self.tmp / "job.sh").write_text(script, "utf-8")
        options = ("--wait", "-n", "4", "--overcommit", "-o", "job.out")
        self.launch("sbatch", *options, "job.sh")
        found = [read(path / "metadata.json")["launcher"] for path in self.run_dirs()]
        worlds = [facts.get("world_size") for facts in found]
        self.assertEqual(worlds, [None, 2, 2], (self.tmp / "job.out").read_text())


class Races(Case):
    """Random launches with one key: no rank joins a run of another launch."""

    def test_no_rank_joins_the_run_of_another_launch(self) -> None:
        generator = random.Random(6)
        (self.tmp / "race.py").write_text(RACE, "utf-8")
        count = int(os.environ.get("RUN_UTILS_RACES", "60"))
        runs: set[str] = set()
        for number in range(count):
            crashes = generator.random() < 0.4
            ranks = [0, 1]
            if crashes:
                ranks = [generator.choice((0, 0, 1))]
            generator.shuffle(ranks)
            processes = []
            for rank in ranks:
                processes.append(self.start_rank(number, rank))
                time.sleep(generator.random() ** 3 * 0.2)
            if crashes:
                for process in processes:
                    process.send_signal(signal.SIGKILL)
                    process.wait()
                continue
            told = [process.communicate(timeout=60)[0].split() for process in processes]
            self.assertEqual([pair[0] for pair in told], [str(number)] * 2, told)
            self.assertEqual(told[0][1], told[1][1])
            self.assertNotIn(told[0][1], runs)
            runs.add(told[0][1])
        self.assertGreater(len(runs), 0.4 * count)

    def start_rank(self, number: int, rank: int) -> subprocess.Popen[str]:
        facts = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        facts.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")
        process = subprocess.Popen(
            [sys.executable, "-S", "race.py", str(number)], cwd=self.tmp,
            env={**self.env, **facts}, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            encoding="utf-8",
        )  # fmt: skip
        self.addCleanup(process.communicate)
        self.addCleanup(process.kill)
        return process


if __name__ == "__main__":
    unittest.main(argv=sys.argv[:1], testRunner=CountingRunner)
