"""Several processes: one mesh over all of them, checkpoints between different numbers of them, and the loss of one.

The processes run `process_worker.py` on this machine, over four virtual CPU devices in all.
"""

import contextlib
import json
import os
import pathlib
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import QUICK
from process_worker import CASES, HISTORY, SAVED, STEPS

WORKER = pathlib.Path(__file__).with_name("process_worker.py")
LIMIT = 200  # seconds that processes are given for their tasks
BOUND = 60  # seconds within which a process must end once another is gone

pytestmark = pytest.mark.xdist_group("processes")


@contextlib.contextmanager
def started(folder, processes, *tasks):
  """Processes under way, which do not outlive the block."""
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    port = probe.getsockname()[1]
  environment = {
    **os.environ,
    "XLA_FLAGS": QUICK,
    "JAX_PLATFORMS": "cpu",
    "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),  # as many processes as before need not compile again
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
  }
  running = []
  with contextlib.ExitStack() as stack:
    for process in range(processes):
      command = [sys.executable, WORKER, folder, port, process, processes, *tasks]
      log = stack.enter_context(open(folder / f"log-{port}-{process}", "w+"))
      running.append(subprocess.Popen([str(x) for x in command], env=environment, stdout=log, stderr=log))
      running[-1].log = pathlib.Path(log.name)
      stack.callback(running[-1].wait)
      stack.callback(running[-1].kill)
    yield running


def finish(running):
  deadline = time.monotonic() + LIMIT
  for process in running:
    assert process.wait(deadline - time.monotonic()) == 0, process.log.read_text()[-3000:]


def rows_of(file):
  """The rows that an endless run has written so far."""
  lines = file.read_text().splitlines(keepends=True) if file.exists() else []
  return [json.loads(line) for line in lines if line.endswith("\n")]


def kill_one(folder, running, name, victim):
  """Kills one of two processes of an endless run, some steps after the checkpoint of step `SAVED`; when it did so."""
  deadline = time.monotonic() + LIMIT
  while len(rows_of(folder / f"{name}-{victim}.jsonl")) < SAVED + 2:
    ended = [process.log.read_text()[-3000:] for process in running if process.poll() is not None]
    assert not ended, ended
    assert time.monotonic() < deadline
    time.sleep(0.05)
  running[victim].kill()
  return time.monotonic()


def exit_code(process, since):
  """How a process ended within `BOUND` seconds from then; None where it is still running."""
  with contextlib.suppress(subprocess.TimeoutExpired):
    return process.wait(max(0, since + BOUND - time.monotonic()))


@pytest.fixture(scope="module")
def found(tmp_path_factory):
  """What the processes wrote, by file name, and how the one ended that was left alone."""
  folder = tmp_path_factory.mktemp("processes")
  with started(folder, 1, "train=one") as running:
    finish(running)
  with started(folder, 2, "train=two", "resume=one", "seeds=two", "migrate=two", "endless=lost") as pair:
    killed = kill_one(folder, pair, "lost", victim=1)
    with started(folder, 1, "resume=two", "last=lost") as running:  # while the other of the two finds out
      left = exit_code(pair[0], killed)
      finish(running)
  files = {file.stem: json.loads(file.read_text()) for file in folder.glob("*.json")}
  return files | {"left": left, "rows": rows_of(folder / "lost-0.jsonl")}


def assert_same(rows, expected):
  """Reports, as dicts of lists, say the same."""
  assert len(rows) == len(expected)
  for row, other in zip(rows, expected, strict=True):
    assert row.keys() == other.keys()
    for name, value in row.items():
      if name in ("k_star", "phase", "count", "status", "k95", "edge_ambiguous", "row_steps"):
        assert value == other[name], name
      np.testing.assert_allclose(value, other[name], rtol=1e-5, atol=2e-6 if name == "turning" else 0, err_msg=name)


def by_row(history):
  """The reports that a history holds, as rows."""
  rows = [dict(zip(history, values, strict=True)) for values in zip(*history.values(), strict=True)]
  return [row for row in rows if row["count"]]


@pytest.mark.parametrize("case", CASES)
def test_two_processes_report_what_one_does(found, case):
  """Each of the two has the whole report of every step, equal to that of one process with as many devices."""
  expected = found["train-one-0"][case]
  assert [row["count"] for row in expected["rows"]] == list(range(1, STEPS + 1))
  assert all(row["k_star"] > 0 and row["phase"] > 0 for row in expected["rows"][4:])
  assert found["train-two-0"][case] == found["train-two-1"][case]
  assert_same(found["train-two-0"][case]["rows"], expected["rows"])
  assert_same(by_row(found["train-two-0"][case]["history"]), expected["rows"])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("writers", "readers"), [("two", 1), ("one", 2)])
def test_another_number_of_processes_resumes(found, case, writers, readers):
  """Half of the steps in one number of processes, half in another: what the uninterrupted run reports, and no gap."""
  expected = found[f"train-{writers}-0"][case]["rows"]
  for process in range(readers):
    resumed = found[f"resume-{writers}-{process}"][case]
    assert resumed["restored"] == expected[STEPS // 2 - 1]
    assert_same(resumed["rows"], expected[STEPS // 2 :])
    assert_same(by_row(resumed["history"]), expected)


def test_seeds_that_other_processes_have_are_read_by_a_groups_name(found):
  """The groups' names lie with the seeds, of which each process has two."""
  for process in range(2):
    assert found[f"seeds-two-{process}"] == {kind: [[1], [[0, 1]]] for kind in ("Explicit", "Auto")}


def test_seeds_that_other_processes_have_are_migrated(found):
  for process in range(2):
    assert found[f"migrate-two-{process}"] == [3]


def test_loss_of_a_process_is_an_error(found):
  """When one process is killed while training, the other ends with an error within a minute, and does not hang."""
  assert found["left"] is not None
  assert found["left"] != 0


def test_last_checkpoint_has_every_row(found):
  """One process goes on from what the two had saved: every row up to there, and then the next."""
  last, rows = found["last-lost-0"], found["rows"]
  assert len(rows) > SAVED
  assert last["restored"] == rows[SAVED - 1]
  assert by_row(last["history"]) == rows[:SAVED]
  assert_same([last["next"]], [rows[SAVED]])


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_loss_at_any_time(tmp_path, victim):
  """Likewise where the lost one is the coordinator, and where it is lost while a checkpoint is being written."""
  with started(tmp_path, 2, "saving=lost") as pair:
    killed = kill_one(tmp_path, pair, "lost", victim)
    assert exit_code(pair[1 - victim], killed) not in (None, 0)
  rows = rows_of(tmp_path / f"lost-{1 - victim}.jsonl")
  with started(tmp_path, 1, "last=lost") as running:
    finish(running)
  last = json.loads((tmp_path / "last-lost-0.json").read_text())
  count = last["restored"]["count"]
  assert count >= SAVED
  assert by_row(last["history"]) == rows[max(0, count - HISTORY) : count]
