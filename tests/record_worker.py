"""Kills writers of a record at random moments, and says what their records hold afterwards.

    python record_worker.py FOLDER KILLS SEED

A writer is forked from this process, which has imported everything; it appends rows, reports each that was flushed
through a pipe, and now and then closes the record and continues it. All numbers of a row are its step. After each kill
the record must hold every row reported, each whole, and the next writer continues it, sometimes some steps back. Prints
JSON with counts; ends with an error where a record lacks something.
"""

import collections
import json
import os
import pathlib
import random
import signal
import sys
import time
import warnings

import h5netcdf  # noqa: F401 - imported before the forks
import numpy as np

from sedjax import Report, _netcdf  # noqa: F401
from sedjax._files import UNFINISHED
from sedjax.record import FIELDS, Recorder, open_record

warnings.filterwarnings("ignore", "os.fork")
WINDOWS, GROUPS = (3, 5), ("all", "head")
SHAPES = {"singular_values": (2, 2, 5), "ratios": (2, 2, 4)}
KILLS_A_RECORD = 25


def report_of(step):
  return Report(**{name: np.full(SHAPES.get(name, (2, 2)), step, np.float32) for name in FIELDS})


def write(path, first, pipe, rng):
  step = first
  while True:
    with Recorder(path, windows=WINDOWS, groups=GROUPS) as recorder:
      for _ in range(rng.randint(1, 60)):
        recorder.append(step, report_of(step))
        recorder.log(step, loss=step / 7)
        if rng.random() < 0.7:
          recorder.flush()
          os.write(pipe, f"{step}\n".encode())
        step += 1
      os.write(pipe, b"closing\n")
    os.write(pipe, b"closed\n")


def wait_for(file, mark):
  """Lines up to one that is the mark."""
  lines = []
  for line in file:
    lines.append(line.strip())
    if lines[-1] == mark:
      break
  return lines


def check(path, reported):
  """The number of rows of a record, which must be whole, one for each step, and have all that was reported."""
  try:
    record = open_record(path).load()
  except FileNotFoundError:
    assert not reported, f"{path} is gone, {max(reported)} was reported"
    return 0
  steps = record.step.values
  np.testing.assert_array_equal(steps, np.arange(len(steps)))
  assert reported <= set(steps.tolist()), f"{max(reported)} was reported, the last row is {len(steps) - 1}"
  for name in FIELDS:
    rows = record[name].values.reshape(len(steps), -1)
    expected = (steps != 0) if name == "edge_ambiguous" else steps
    same = (rows == expected[:, None]) | np.isnan(rows)
    assert same.all(), f"{name} is not whole at {steps[~same.all(1)]}"
  if "loss" in record:
    np.testing.assert_array_equal(record.loss.values, record.loss_step.values / 7)
  # A step that was not reported may have its row and not its loss: a kill can come between the two.
  missing = reported - set(record.loss_step.values.tolist() if "loss" in record else ())
  assert not missing, f"the loss of steps {sorted(missing)} was reported and is gone"
  record.close()
  return len(steps)


def main(folder, kills, seed):
  rng = random.Random(seed)
  counts, conversion = collections.Counter(), 0.3
  for kill in range(kills):
    path = pathlib.Path(folder) / f"run{kill // KILLS_A_RECORD}.nc"
    partial, journal = (path.with_name(path.name + end) for end in (UNFINISHED, ".journal"))
    if kill % KILLS_A_RECORD == 0:
      rows, reported = 0, set()  # steps of which row and loss were flushed
    first = max(0, rows - rng.choice([0, 0, 0, 1, 5]))
    readable, writable = os.pipe()
    pid = os.fork()
    if pid == 0:
      try:
        os.close(readable)
        write(path, first, writable, random.Random(seed * 1000 + kill))
      finally:
        os._exit(1)
    os.close(writable)
    with open(readable) as file:
      # At any moment; while the file is made of the journal, from what it took last time or from what is seen of it;
      # about when the one replaced the other.
      when = rng.choice(["any", "closing", "half closed", "closed"])
      if when == "any":
        time.sleep(rng.uniform(0, 0.3))
        told = []
      else:
        told = wait_for(file, "closing")
        start = time.perf_counter()
        if when == "closing":
          time.sleep(rng.uniform(0, 1.1 * conversion))
        elif when == "half closed":
          while not partial.exists() and time.perf_counter() - start < 2 * conversion:
            time.sleep(0.001)
          time.sleep(rng.uniform(0, 0.3 * conversion))
        else:
          told += wait_for(file, "closed")
          conversion = time.perf_counter() - start
          time.sleep(rng.uniform(0, 0.02))
      os.kill(pid, signal.SIGKILL)
      _, status = os.waitpid(pid, 0)
      assert os.WIFSIGNALED(status), "the writer ended by itself"
      told += file.read().split()
    told = [line for line in told if line.isdigit()]
    # A writer that goes back replaces the rows from there on, at its first row.
    counts["in the conversion"] += partial.exists()
    counts["with a journal"] += journal.exists() and journal.stat().st_size > 0
    counts["with a file"] += path.exists()
    reported = {step for step in reported if step < first}
    if told:
      reported |= set(range(first, int(told[-1]) + 1))  # with one all before it are flushed
    rows = check(path, reported)
    counts["kills"] += 1
    counts["rows reported"] += len(told)
  print(json.dumps(counts))


if __name__ == "__main__":
  main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
