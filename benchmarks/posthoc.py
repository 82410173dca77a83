"""What the analysis of saved checkpoints costs, beside merely reading them and beside the way of the peers' scripts.

    python benchmarks/posthoc.py

It makes a series of checkpoints of GPT-2's 124 M float32 parameters by a random walk with a drift, as many as leave an
eighth of the disk free, analyses them, and deletes them. Each way runs in a process of its own:

- read: every tensor is read into the same buffer and summed; nothing else. Before and after each of the others.
- sketch: the command `sedjax analyze` with the default sketch; exact: the same with `--sketch exact`.
- load all: the peers' way, all differences in memory as float32 and their N × N inner products; of as many checkpoints
  as fit into a third of the memory that is free.

Each way is measured with the files in the page cache as far as it reaches ("warm"), and after they were dropped from it
("cold", where the system has `posix_fadvise`), beside reading in the same state.

Seconds are those of the work, compilation included, imports not. `peak_bytes` is the largest resident set. The numbers
are compared with a float64 oracle, which reads the files by NumPy alone. The result goes to
`benchmarks/results/posthoc-<cpu>.json`; with `--smoke`, small and short, to `out/benchmarks/`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

WINDOW, DIM = 10, 16384
CHECKPOINTS, TREE = 24, "gpt2_124m"
SMOKE_CHECKPOINTS, SMOKE_TREE = 12, "gpt_220k"
ROUNDS = 3  # of the sketch, each between two readings; the median counts
# What it must reach.
MOST_BYTES, MOST_RATIO, MOST_EXACT_ERROR = 1.2e9, 1.8, 1e-4


def step_files(folder: Path) -> list[Path]:
  return sorted(folder.glob("step_*/model.safetensors"))


# ---- making them ----


def write_safetensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
  """The format's header, and the tensors behind it."""
  header, at = {}, 0
  for name, tensor in tensors.items():
    header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [at, at + tensor.nbytes]}
    at += tensor.nbytes
  text = json.dumps(header).encode()
  text += b" " * (-len(text) % 8)
  with open(path, "wb") as file:
    file.write(len(text).to_bytes(8, "little") + text)
    for tensor in tensors.values():
      file.write(tensor.data)


def make(folder: Path, count: int, tree: str) -> None:
  """Writes the series, one checkpoint after the other."""
  import jax
  import models

  leaves = jax.tree_util.tree_leaves_with_path(models.shapes(tree))
  shapes = {".".join(key.key for key in path): leaf.shape for path, leaf in leaves}
  size = 4 * sum(int(np.prod(shape)) for shape in shapes.values())
  disk = shutil.disk_usage(folder)
  count = min(count, int((disk.free - disk.total / 8) // size))
  if count < WINDOW + 1:
    raise SystemExit(f"{folder} has room for {count} checkpoints only, {WINDOW + 1} are needed")
  rng = np.random.default_rng(0)
  params = {name: 0.02 * rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
  drifts = [{name: rng.standard_normal(shape[-1:], np.float32) for name, shape in shapes.items()} for _ in range(2)]
  for i in range(count):
    (folder / f"step_{100 * i:06}").mkdir()
    write_safetensors(folder / f"step_{100 * i:06}" / "model.safetensors", params)
    for name, param in params.items():
      # Two common directions over noise: an edge at 1 or 2 that moves.
      step = rng.standard_normal(param.shape, np.float32)
      step += (2 - i / count) * drifts[0][name] + np.float32(np.cos(i / 3)) * drifts[1][name]
      step *= 1e-4
      param += step


# ---- the ways, each in a process of its own ----


def analysis(folder: Path, sketch: str) -> dict[str, Any]:
  """What a user types, and where the record then is."""
  from sedjax import __main__

  out = folder / f"{sketch.partition(':')[0]}.nc"
  command = ["analyze", str(folder / "step_*" / "model.safetensors"), "-o", str(out)]
  if __main__.main([*command, "--window", str(WINDOW), "--sketch", sketch]):
    raise SystemExit("the analysis failed")
  return {"record": str(out)}


def reported(record: str) -> dict[str, Any]:
  """What the record says that is compared with the oracle."""
  import sedjax.record

  with sedjax.record.open_record(record) as opened:
    found = opened.isel(seed=0, window=0, group=0)
    return {name: found[name].values.astype(float).tolist() for name in ("singular_values", "effective_dim")}


def read_all(folder: Path) -> dict[str, Any]:
  from sedjax import _readers
  from sedjax._selection import aligned

  total, buffer = 0.0, aligned(0, np.dtype(np.float32))
  for file in step_files(folder):
    reader = _readers.open_checkpoint(file)
    for name, info in reader.tensors.items():
      if buffer.size < info.size:
        buffer = aligned(info.size, np.dtype(np.float32))
      reader.read(name, 0, buffer[: info.size])
      total += float(buffer[: info.size].sum())
    reader.close()
  return {"sum": total}


def load_all(folder: Path) -> dict[str, Any]:
  """As scripts do it: every checkpoint as a vector, the differences stacked, their inner products."""

  def vector(file: Path) -> np.ndarray:
    return np.concatenate([tensor.reshape(-1) for _, tensor in tensors_of(file)])

  files = step_files(folder)
  size = sum(tensor.size for _, tensor in tensors_of(files[0]))
  free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
  if Path("/proc/meminfo").exists():  # which counts what the page cache would give back
    free = next(int(line.split()[1]) * 1024 for line in open("/proc/meminfo") if line.startswith("MemAvailable"))
  files = files[: max(WINDOW + 1, int(free / 3 / (4 * size)))]
  deltas, before = np.empty((len(files) - 1, size), np.float32), vector(files[0])
  for i, file in enumerate(files[1:]):
    now = vector(file)
    np.subtract(now, before, out=deltas[i])
    before = now
  gram = np.array([[np.dot(a, b) for a in deltas] for b in deltas], np.float64)
  return {"singular_values": windows_of(gram), "checkpoints": len(files)}


def tensors_of(file: Path) -> Iterator[tuple[str, np.ndarray]]:
  """By NumPy alone."""
  with open(file, "rb") as opened:
    length = int.from_bytes(opened.read(8), "little")
    header = json.loads(opened.read(length))
  for name, entry in header.items():
    start, end = entry["data_offsets"]
    yield name, np.fromfile(file, "<f4", (end - start) // 4, offset=8 + length + start)


def windows_of(gram: np.ndarray) -> list[list[float]]:
  """Singular values of each full window."""
  found = []
  for last in range(WINDOW, len(gram) + 1):
    values = np.linalg.eigvalsh(gram[last - WINDOW : last, last - WINDOW : last])
    found.append(np.sqrt(np.maximum(values[::-1], 0)).tolist())
  return found


def oracle(folder: Path) -> dict[str, Any]:
  """All differences in float64, part by part of each tensor."""
  files = step_files(folder)
  gram = np.zeros((len(files) - 1, len(files) - 1))
  series = [tensors_of(file) for file in files]
  for together in zip(*series, strict=True):
    values = [tensor for _, tensor in together]
    for start in range(0, values[0].size, 2**20):
      rows = np.diff(np.stack([value[start : start + 2**20] for value in values]).astype(np.float64), axis=0)
      gram += rows @ rows.T
  return {"singular_values": windows_of(gram)}


WAYS: dict[str, Callable[[Path], dict[str, Any]]] = {
  "read": read_all,
  "sketch": lambda folder: analysis(folder, f"count:{DIM}"),
  "exact": lambda folder: analysis(folder, "exact"),
  "load all": load_all,
  "oracle": oracle,
}


def in_process(way: str, folder: Path, warm: bool = True) -> dict[str, Any]:
  """Seconds, peak memory and result of one way."""
  if not warm:
    for file in step_files(folder):
      with open(file, "rb") as opened:
        os.fsync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
  command = [sys.executable, str(Path(__file__).resolve()), "--way", way, "--folder", str(folder)]
  # The threads of NumPy's BLAS spin for minutes where another process wants the cores: the peers are spared that.
  environment = os.environ | ({"OPENBLAS_NUM_THREADS": "1"} if way in ("oracle", "load all") else {})
  done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
  if done.returncode:
    raise SystemExit(f"{way} failed:\n{done.stderr}")
  return json.loads(done.stdout.splitlines()[-1])


# ---- the whole ----


def errors(found: dict[str, Any], exact: list[list[float]]) -> dict[str, float]:
  """Relative errors of singular values and of ratios, over all full windows."""
  values = np.asarray(found["singular_values"])
  values = values[WINDOW - 1 :] if len(values) > len(exact) else values  # the analysis begins before the window is full
  true = np.asarray(exact)[: len(values)]
  ratios, true_ratios = (x[:, :-1] / x[:, 1:] for x in (values, true))
  logs = np.abs(np.log(ratios / true_ratios))
  # What the sketch says of the logarithm of a ratio, as `edge_ambiguous` reckons.
  dims = np.asarray(found["effective_dim"])[-len(exact) :][: len(true)] if "effective_dim" in found else None
  stated = (
    {}
    if dims is None
    else {
      "stated_standard_error": float(np.sqrt(1 / np.mean(dims))),
      "ratios_within_2_standard_errors": float(np.mean(logs <= 2 * np.sqrt(1 / dims)[:, None])),
      "ratios_max_in_standard_errors": float(np.max(logs * np.sqrt(dims)[:, None])),
      "ratios_compared": logs.size,
    }
  )
  return {
    **stated,
    "singular_values_max": float(np.max(np.abs(values / true - 1))),
    "singular_values_rms": float(np.sqrt(np.mean((values / true - 1) ** 2))),
    "ratios_max": float(np.max(logs)),
    "ratios_rms": float(np.sqrt(np.mean(logs**2))),
  }


def main(argv: list[str]) -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--smoke", action="store_true", help="small and short, to see that it works; not stored")
  parser.add_argument("--checkpoints", type=int, help="how many at most")
  parser.add_argument("--folder", type=Path, help="where the checkpoints go (a temporary folder)")
  parser.add_argument("--way", choices=list(WAYS), help=argparse.SUPPRESS)
  args = parser.parse_args(argv)
  if args.way is not None:
    import h5netcdf  # noqa: F401 - so that no way's time is that of importing
    import xarray  # noqa: F401

    import sedjax.checkpoints  # noqa: F401

    start = time.perf_counter()
    found = WAYS[args.way](args.folder)
    found["seconds"] = time.perf_counter() - start
    found |= reported(found.pop("record")) if "record" in found else {}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(json.dumps({**found, "peak_bytes": peak}))
    return
  tree = SMOKE_TREE if args.smoke else TREE
  with tempfile.TemporaryDirectory(dir=args.folder) as name:
    folder = Path(name)
    count = args.checkpoints or (SMOKE_CHECKPOINTS if args.smoke else CHECKPOINTS)
    # In a process of its own, since processes inherit the largest resident set of the one that started them.
    maker = multiprocessing.get_context("spawn").Process(target=make, args=(folder, count, tree))
    maker.start()
    maker.join()
    count = len(step_files(folder))
    if maker.exitcode:
      raise SystemExit(maker.exitcode)
    size = sum(file.stat().st_size for file in step_files(folder))
    found: dict[str, dict[str, Any]] = {}
    reads = []
    for state in ("cold", "warm") if hasattr(os, "posix_fadvise") else ("warm",):
      warm = state == "warm"
      if warm:
        in_process("read", folder)
      for way in ("sketch", "exact", "load all"):
        name, ratios = f"{way}, {state}", []
        around = [in_process("read", folder, warm)]
        for _ in range(ROUNDS if way == "sketch" else 1):
          found[name] = in_process(way, folder, warm)
          around.append(in_process("read", folder, warm))
          part = found[name].get("checkpoints", count) / count
          reading = part * statistics.mean(read["seconds"] for read in around[-2:])
          ratios.append(found[name]["seconds"] / reading)
        peak, ratio = found[name]["peak_bytes"], statistics.median(ratios)
        found[name] |= {"ratio_to_reading": ratio, "ratios": ratios, "load": os.getloadavg()[0]}
        found[name]["reading_seconds"] = part * statistics.mean(read["seconds"] for read in around)
        reads += around
        print(f"{name}: {found[name]['seconds']:.1f} s, {ratio:.2f} × reading, {peak / 1e9:.2f} GB", flush=True)
    exact = in_process("oracle", folder)["singular_values"]
  store(argv, args, tree, count, size, found, reads, exact)


def store(
  argv: list[str],
  args: argparse.Namespace,
  tree: str,
  count: int,
  size: int,
  found: dict[str, dict[str, Any]],
  reads: list[dict[str, Any]],
  exact: list[list[float]],
) -> None:
  import provenance  # not before: processes would inherit the memory that JAX takes
  import scipy.stats

  ways = {}
  for way, one in found.items():
    ways[way] = {name: value for name, value in one.items() if name not in ("singular_values", "effective_dim")}
    ways[way]["errors"] = errors(one, exact)
  sketch, precise = ways["sketch, warm"], ways["exact, warm"]
  cold = {f"{way} ÷ reading": [ways[way]["ratio_to_reading"], MOST_RATIO] for way in ways if way == "sketch, cold"}
  compared = sketch["errors"]["ratios_compared"]
  targets = {
    "peak memory, bytes": [max(sketch["peak_bytes"], precise["peak_bytes"]), MOST_BYTES],
    **cold,
    "sketch, warm ÷ reading": [sketch["ratio_to_reading"], MOST_RATIO],
    "exact: largest relative error": [precise["errors"]["singular_values_max"], MOST_EXACT_ERROR],
    "sketch: root mean square error of ratios, in standard errors": [
      sketch["errors"]["ratios_rms"] / sketch["errors"]["stated_standard_error"],
      1,
    ],
    # So many independent normal numbers are below these bounds 19 times in 20.
    "sketch: share of ratios beyond 2 standard errors": [
      1 - sketch["errors"]["ratios_within_2_standard_errors"],
      scipy.stats.binom.ppf(0.95, compared, 2 * scipy.stats.norm.sf(2)) / compared,
    ],
    "sketch: largest error of a ratio, in standard errors": [
      sketch["errors"]["ratios_max_in_standard_errors"],
      scipy.stats.norm.ppf((1 + 0.95 ** (1 / compared)) / 2),
    ],
  }
  result = {
    **provenance.made_by("posthoc.py", argv, provenance.begin()),
    "tree": tree,
    "checkpoints": count,
    "bytes": size,
    "window": WINDOW,
    "dim": DIM,
    "reading_peak_bytes": max(read["peak_bytes"] for read in reads),
    "ways": ways,
    "targets": {
      name: {"found": value, "most": most, "met": bool(value <= most)} for name, (value, most) in targets.items()
    },
  }
  folder = provenance.SMOKE if args.smoke else provenance.RESULTS
  folder.mkdir(parents=True, exist_ok=True)
  file = folder / f"posthoc-{provenance.device_name(result['device']).removeprefix('cpu-')}.json"
  file.write_text(json.dumps(result, indent=1, default=provenance.plain) + "\n")
  for name, target in result["targets"].items():
    print(f"{name}: {target['found']:.4g}, at most {target['most']:.4g}: {'met' if target['met'] else 'NOT MET'}")
  print(f"stored in {os.path.relpath(file)}")


if __name__ == "__main__":
  main(sys.argv[1:])
