"""How long a large record takes to write, to open, to read and to report.

    python benchmarks/records.py

Makes a record of 100,000 steps, 8 seeds, 4 windows and 13 groups with `sedjax.record.Recorder`, from reports that are
made up, then opens it in processes of its own: while it is still a journal (as it is while a run goes on, or after a
kill), and when it is the finished NetCDF file, with and without the file in the page cache; of the file `sedjax report`
makes a page. The files are removed. It needs disk for the journal and the file at once, 27 GB; `--smoke` takes a
hundredth of the steps and stores nothing.

The result goes to `benchmarks/results/records.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

import sedjax
from sedjax.record import Recorder

WINDOWS, GROUPS, SEEDS = (5, 10, 20, 32), ("all", *(f"block_{i}" for i in range(12))), 8
DIFFERENT = 64  # reports that are made up; each step's is one of these, its floats times a random number

READ = """
import json, resource, sys, time
start = time.perf_counter()
from sedjax.record import open_record
import xarray
times = {"import_s": time.perf_counter() - start}

def timed(name, read):
  start = time.perf_counter()
  found = read()
  times[name] = time.perf_counter() - start
  return found

record = timed("open_s", lambda: open_record(sys.argv[1]))
assert record.sizes["step"] == int(sys.argv[2]), record.sizes
gap = timed("gap_ratio_of_a_seed_s", lambda: record.gap_ratio.isel(seed=3).values)
timed("singular_values_of_a_seed_and_window_s", lambda: record.singular_values.isel(seed=3, window=-1, group=0).values)
assert gap.shape == (int(sys.argv[2]), 4, 13) and (gap > 0).all()
def by_steps():
  for start in range(0, min(record.sizes["step"], 8192), 1024):
    record.isel(step=slice(start, start + 1024)).load()
timed("all_of_8192_steps_by_1024_s", by_steps)
times["peak_memory_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps(times))
"""


def made_up_reports(rng: np.random.Generator) -> list[sedjax.Report]:
  """Reports with numbers as hard to compress as real ones."""
  vectors = {"singular_values": max(WINDOWS), "ratios": max(WINDOWS) - 1}
  found = []
  for _ in range(DIFFERENT):
    fields: dict[str, Any] = {}
    for name in sedjax.Report._fields:
      shape = (SEEDS, len(GROUPS), len(WINDOWS), *([vectors[name]] if name in vectors else []))
      if name in ("k_star", "k95", "phase", "count", "row_steps", "skipped_nonfinite", "skipped_zero", "status"):
        fields[name] = rng.integers(0, 5, shape, np.int32)
      elif name == "edge_ambiguous":
        fields[name] = rng.random(shape) < 0.2
      else:
        fields[name] = rng.random(shape, np.float32) + 1
    found.append(sedjax.Report(**fields))
  return found


def read(path: Path, steps: int) -> dict[str, float]:
  environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
  command = [sys.executable, "-c", READ, str(path), str(steps)]
  done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
  return json.loads(done.stdout)


def report(path: Path) -> dict[str, float]:
  """What `sedjax report` takes, imports included."""
  page = path.with_suffix(".html")
  command = [sys.executable, "-m", "sedjax", "report", str(path), "-o", str(page)]
  start = time.perf_counter()
  process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env={**os.environ, "JAX_PLATFORMS": "cpu"})
  _, status, used = os.wait4(process.pid, 0)
  seconds = time.perf_counter() - start
  if status:
    raise SystemExit(f"{shlex.join(command)} failed")
  return {"seconds": seconds, "peak_memory_bytes": used.ru_maxrss * 1024, "page_bytes": page.stat().st_size}


def forget(path: Path) -> None:
  """Takes a file out of the page cache."""
  with open(path, "rb") as file:
    os.fsync(file.fileno())
    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(folder: Path, steps: int) -> dict[str, Any]:
  path = folder / "run.nc"
  rng = np.random.default_rng(0)
  reports = made_up_reports(rng)
  start = time.perf_counter()
  recorder = Recorder(path, windows=WINDOWS, groups=GROUPS, tracker={"window": WINDOWS, "momentum": 0.9})
  for step in range(steps):
    scale = rng.random(dtype=np.float32) + 1
    recorder.append(
      step, sedjax.Report._make(x * scale if x.dtype == np.float32 else x for x in reports[step % DIFFERENT])
    )
    if step % 10000 == 0:
      recorder.log(step, validation_loss=1 / (step + 1))
  recorder.flush()
  found: dict[str, Any] = {"append_and_write_s": time.perf_counter() - start}
  journal = path.with_name("run.nc.journal")
  found |= {"journal_bytes": journal.stat().st_size, "journal": read(path, steps)}
  start = time.perf_counter()
  recorder.close()
  found |= {"close_s": time.perf_counter() - start, "file_bytes": path.stat().st_size}
  print(json.dumps(found, indent=1), flush=True)
  forget(path)
  found["file_not_cached"] = read(path, steps)
  found["file_cached"] = read(path, steps)
  forget(path)
  return {**found, "report_not_cached": report(path), "report_cached": report(path)}


def main(argv: list[str]) -> None:
  parser = argparse.ArgumentParser(description="How long a large record takes to write, open, read and report.")
  parser.add_argument("--smoke", action="store_true", help="a hundredth of the steps, to see that it works; not stored")
  parser.add_argument("--folder", type=Path, help="where the files are made for a while; default: the temporary folder")
  args = parser.parse_args(argv)
  os.environ["JAX_PLATFORMS"] = "cpu"
  import provenance  # after the platform is chosen

  begun = provenance.begin()
  steps = 1000 if args.smoke else 100_000
  folder = Path(tempfile.mkdtemp(dir=args.folder))
  need = 280e3 * steps
  if shutil.disk_usage(folder).free < need:
    folder.rmdir()
    sys.exit(f"There are not {need / 1e9:.0f} GB free in {folder.parent}; choose another --folder.")
  try:
    measured = measure(folder, steps)
  finally:
    shutil.rmtree(folder)
  made_by = provenance.made_by("records.py", argv, begun)
  sizes = {"steps": steps, "seeds": SEEDS, "windows": WINDOWS, "groups": len(GROUPS)}
  text = json.dumps({"made_by": made_by, **sizes, **measured}, indent=1)
  print(text)
  if not args.smoke:
    file = provenance.RESULTS / "records.json"
    file.write_text(text + "\n")
    print(f"Wrote {file}.")


if __name__ == "__main__":
  main(sys.argv[1:])
