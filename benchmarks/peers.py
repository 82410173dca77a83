"""Other ways to project updates to a few numbers, each run in a process of its own: the `peers` section of `run.py`.

A process times one way on the vectors of the benchmark's tree, in turn with `optax.global_norm` of the same numbers,
and reads its own peak memory. Then it measures the error of inner products of pairs ⟨x, y⟩ = ½‖x‖‖y‖ on the small tree,
where every way can afford the same d. Of two kinds of vectors: *even* ones of normal numbers, and *rank one*, where
every matrix is the outer product of two normal vectors, as the gradient of a single token is.

    python benchmarks/peers.py 'sedjax count(16384)' --device cpu --smoke     # prints one line of JSON
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import models
import numpy as np

TREE, SMALL = "gpt_51m", "gpt_220k"
EQUAL_DIM, PAIRS, COSINE = 1024, 32, 0.5
KINDS = ("even", "rank one")
ROUNDS, BUDGET, TIMEOUT = 20, 20.0, 3600
SMOKE_PAIRS, SMOKE_ROUNDS, SMOKE_BUDGET = 2, 3, 1.0
MATRIX_BYTES = 2**31  # of a matrix that a peer keeps


class Way(NamedTuple):
  """One way to project: place once, then project the same numbers again and again."""

  prepare_s: float  # compiling, or making the matrix, before the first projection
  place: Callable[[np.ndarray], Any]  # float32[vectors, P] to what `project` takes
  project: Callable[[Any], Any]  # to [vectors, d], which NumPy can read; waits for it
  share: float = 1.0  # of the P numbers that are projected
  takes_tree: bool = False  # `project` takes the tree on the device itself
  temporaries: int | None = None  # bytes, as the compiler says
  device_bytes: Callable[[], int | None] = lambda: None


Make = Callable[[int, str, int, str], Way]  # of d, name of the tree, number of vectors, device


class Peer(NamedTuple):
  dim: int  # usually
  make: Make
  packages: tuple[str, ...] = ()


def split(flat: np.ndarray, name: str) -> models.Tree:
  """float32[vectors, P] as the tree's leaves, with the vectors in front where there are several."""
  import jax

  leaves, structure = jax.tree.flatten(models.shapes(name))
  ends = np.cumsum([leaf.size for leaf in leaves])
  parts = [flat[:, end - leaf.size : end] for leaf, end in zip(leaves, ends, strict=True)]
  lead = () if len(flat) == 1 else (len(flat),)
  return structure.unflatten([part.reshape(*lead, *leaf.shape) for part, leaf in zip(parts, leaves, strict=True)])


def _jax_way(function: Callable[[Any], Any], name: str, vectors: int) -> Way:
  """`function` of one tree, compiled, and vmapped where there are several vectors."""
  import jax
  from timing import compile_function

  lead = () if vectors == 1 else (vectors,)
  compiled = compile_function(jax.vmap(function) if lead else function, models.shapes(name, lead=lead))

  def peak() -> int | None:
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")

  return Way(
    compiled.seconds,
    lambda flat: jax.device_put(split(flat, name)),
    lambda tree: jax.block_until_ready(compiled.call(tree)),
    takes_tree=True,
    temporaries=compiled.temporaries,
    device_bytes=peak,
  )


def _sedjax(kind: str) -> Make:
  def make(dim: int, name: str, vectors: int, device: str) -> Way:
    del device
    from sedjax import sketch
    from sedjax._count import Piece
    from sedjax._layout import shapes_by_path

    paths = list(shapes_by_path(models.shapes(name)))
    chosen = getattr(sketch, kind)(dim)

    def project(tree: Any) -> Any:
      import jax

      pieces = [Piece(path, leaf) for path, leaf in zip(paths, jax.tree.leaves(tree), strict=True)]
      return chosen.rows(pieces, [0] * len(pieces), 1)[0]

    return _jax_way(project, name, vectors)

  return make


def _jax_gaussian(dim: int, name: str, vectors: int, device: str) -> Way:
  """A dense matrix that is drawn again each time, one of its rows, leaf by leaf, at a time."""
  del device
  import jax
  import jax.numpy as jnp

  def project(tree: Any) -> Any:
    leaves = jax.tree.leaves(tree)

    def output(carry: None, key: Any) -> tuple[None, Any]:
      keys = jax.random.split(key, len(leaves))
      normals = (jax.random.normal(k, leaf.shape) for k, leaf in zip(keys, leaves, strict=True))
      return carry, sum(jnp.vdot(normal, leaf) for normal, leaf in zip(normals, leaves, strict=True))

    _, outputs = jax.lax.scan(output, None, jax.random.split(jax.random.key(0), dim))
    return outputs / np.float32(math.sqrt(dim))

  return _jax_way(project, name, vectors)


def _numpy_gaussian(dim: int, name: str, vectors: int, device: str) -> Way:
  """A loop over the rows of a dense matrix, each drawn anew."""
  del name, vectors, device

  def project(x: np.ndarray) -> np.ndarray:
    generator = np.random.default_rng(0)
    found = np.empty((len(x), dim), np.float32)
    for i in range(dim):
      found[:, i] = x @ generator.standard_normal(x.shape[1], np.float32)
    return found / np.float32(math.sqrt(dim))

  return Way(0.0, lambda flat: flat, project)


def _sklearn(kind: str) -> Make:
  def make(dim: int, name: str, vectors: int, device: str) -> Way:
    del vectors, device
    from sklearn import random_projection

    size = models.sizes(models.shapes(name))["parameters"]
    used = min(size, MATRIX_BYTES // (8 * dim)) if kind == "GaussianRandomProjection" else size
    projection = getattr(random_projection, kind)(n_components=dim, random_state=0)
    start = time.perf_counter()
    # `fit` reads nothing but the shape of what it is given, and its type.
    projection.fit(np.broadcast_to(np.zeros((1, 1), np.float32), (1, used)))
    seconds = time.perf_counter() - start

    def dense(found: Any) -> np.ndarray:
      return found.toarray() if hasattr(found, "toarray") else found

    return Way(seconds, lambda flat: flat[:, :used], lambda x: dense(projection.transform(x)), used / size)

  return make


def _trak(dim: int, name: str, vectors: int, device: str) -> Way:
  del vectors
  import torch
  from trak.projectors import BasicProjector, ProjectionType

  size = models.sizes(models.shapes(name))["parameters"]
  where = torch.device("cuda" if device == "gpu" and torch.cuda.is_available() else "cpu")
  block = max(1, min(dim, 100, MATRIX_BYTES // (4 * size)))
  start = time.perf_counter()
  projector = BasicProjector(size, dim, 0, ProjectionType.rademacher, where, block_size=block)
  seconds = time.perf_counter() - start

  def project(x: Any) -> np.ndarray:
    return projector.project(x, model_id=0).cpu().numpy() / np.float32(math.sqrt(dim))

  def peak() -> int | None:
    return torch.cuda.max_memory_allocated() if where.type == "cuda" else None

  return Way(seconds, lambda flat: torch.from_numpy(flat).to(where), project, device_bytes=peak)


PEERS = {
  "sedjax count(16384)": Peer(16384, _sedjax("count")),
  "sedjax count(1024)": Peer(1024, _sedjax("count")),
  "sedjax gaussian(100)": Peer(100, _sedjax("gaussian")),
  "jax.random Gaussian(100) in a scan": Peer(100, _jax_gaussian),
  "NumPy loop of Gaussian rows (100)": Peer(100, _numpy_gaussian),
  "scikit-learn GaussianRandomProjection(100)": Peer(100, _sklearn("GaussianRandomProjection"), ("sklearn",)),
  "scikit-learn SparseRandomProjection(1024)": Peer(1024, _sklearn("SparseRandomProjection"), ("sklearn",)),
  "TRAK BasicProjector(100)": Peer(100, _trak, ("torch", "trak")),
}


# ---- one process ----


def _peak_bytes() -> int:
  """The most resident memory that this process had so far."""
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  return peak if sys.platform == "darwin" else 1024 * peak


def time_way(peer: Peer, name: str, device: str, rounds: int, budget: float) -> dict[str, Any]:
  """Seconds of one projection and of the bound, in turn, and memory."""
  import jax
  import optax
  from timing import compile_function, seconds_of

  size = models.sizes(models.shapes(name))["parameters"]
  generator = np.random.default_rng(0)
  flats = [np.float32(1e-3) * generator.standard_normal((1, size), np.float32) for _ in range(2)]
  trees = [jax.device_put(split(flat, name)) for flat in flats]
  bound = compile_function(optax.global_norm, trees[0]).call
  jax.block_until_ready([bound(tree) for tree in trees])
  before = _peak_bytes()
  way = peer.make(peer.dim, name, 1, device)
  placed = trees if way.takes_tree else [way.place(flat) for flat in flats]
  start, seconds, bounds = time.perf_counter(), [], []
  for i in range(rounds + 1):
    # Several, since a slow way has few rounds.
    bounds += [seconds_of(lambda j: bound(trees[j % 2]), j) for j in range(6)][1:]
    seconds.append(seconds_of(lambda j: way.project(placed[j % 2]), i))
    if time.perf_counter() - start > budget:
      break
  seconds = seconds[1:] or seconds  # the first one warms up, unless it is the only one
  median, reference = statistics.median(seconds), statistics.median(bounds)
  scaled = median / way.share
  return {
    "parameters": size,
    "projected_parameters": round(way.share * size),
    "rounds": len(seconds),
    "median_s": median,
    "scaled_s": scaled,  # to all parameters, where only some are projected
    "bound_s": reference,
    "ratio": scaled / reference,
    "prepare_s": way.prepare_s,
    "peak_bytes": _peak_bytes(),
    "added_bytes": _peak_bytes() - before,
    "temporary_bytes": way.temporaries,
    "device_peak_bytes": way.device_bytes(),
  }


def draw(kind: str, name: str, generator: np.random.Generator) -> np.ndarray:
  """float64[P]: one vector."""
  import jax

  def leaf(like: Any) -> np.ndarray:
    if kind == "even":
      return generator.standard_normal(like.size)
    rows = generator.standard_normal((math.prod(like.shape[:-1]), 1))
    return (rows * generator.standard_normal(like.shape[-1])).ravel()

  return np.concatenate([leaf(like) for like in jax.tree.leaves(models.shapes(name))])


def pairs_of(kind: str, name: str, pairs: int) -> np.ndarray:
  """float32[2 · pairs, P]: x and y in turn, of one norm, ⟨x, y⟩ = ½‖x‖‖y‖."""
  generator = np.random.default_rng(1)
  found = []
  for _ in range(pairs):
    x, noise = draw(kind, name, generator), draw(kind, name, generator)
    noise -= noise @ x / (x @ x) * x
    y = COSINE * x + math.sqrt(1 - COSINE**2) * noise * np.linalg.norm(x) / np.linalg.norm(noise)
    found += [x.astype(np.float32), y.astype(np.float32)]
  return np.stack(found)


def errors(peer: Peer, name: str, dim: int, pairs: int, device: str) -> dict[str, float]:
  """By kind of vectors, the root mean square of ⟨Sx, Sy⟩/⟨x, y⟩ - 1 over the pairs, through one draw of the map."""
  way = peer.make(dim, name, 2 * pairs, device)
  found = {}
  for kind in KINDS:
    vectors = pairs_of(kind, name, pairs)
    projected = np.asarray(way.project(way.place(vectors)), np.float64)
    true = np.einsum("ip,ip->i", vectors[::2], vectors[1::2], dtype=np.float64)
    found[kind] = float(np.sqrt(np.mean((np.einsum("id,id->i", projected[::2], projected[1::2]) / true - 1) ** 2)))
  return found


def law(dim: int) -> float:
  """The same for a dense Gaussian map: the variance of ⟨Sx, Sy⟩ is (‖x‖²‖y‖² + ⟨x, y⟩²)/d."""
  return math.sqrt((1 + COSINE**-2) / dim)


def main(argv: list[str]) -> None:
  parser = argparse.ArgumentParser(description="Measures one way to project, in this process; prints JSON.")
  parser.add_argument("name", choices=PEERS)
  parser.add_argument("--device", choices=("cpu", "gpu", "tpu"), required=True)
  parser.add_argument("--smoke", action="store_true")
  args = parser.parse_args(argv)
  peer = PEERS[args.name]
  missing = [package for package in peer.packages if importlib.util.find_spec(package) is None]
  if missing:
    print(json.dumps({"name": args.name, "skipped": f"not installed: {', '.join(missing)}"}))
    return
  import jax

  if args.device == "cpu":
    jax.config.update("jax_platforms", "cpu")
  if jax.default_backend() != args.device:
    sys.exit(f"there is no {args.device} here, only {jax.default_backend()}")
  dims, pairs = ({peer.dim}, SMOKE_PAIRS) if args.smoke else ({peer.dim, EQUAL_DIM}, PAIRS)
  rounds, budget = (SMOKE_ROUNDS, SMOKE_BUDGET) if args.smoke else (ROUNDS, BUDGET)
  # Memory first: what comes later only adds to the peak.
  line = time_way(peer, SMALL if args.smoke else TREE, args.device, rounds, budget)
  line["errors"] = [{"dim": d, "law": law(d), **errors(peer, SMALL, d, pairs, args.device)} for d in sorted(dims)]
  print(json.dumps({"name": args.name, "dim": peer.dim, **line}))


# ---- all of them ----


def measure_all(device: str, smoke: bool) -> dict[str, Any]:
  """The `peers` section: a line for each way; one that cannot run says why."""
  # A process that takes the accelerator's memory in advance leaves none for libraries other than JAX.
  environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
  lines = []
  for name in PEERS:
    command = [sys.executable, str(Path(__file__).resolve()), name, "--device", device, *["--smoke"] * smoke]
    start = time.perf_counter()
    try:
      done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
      lines.append({"name": name, "skipped": f"took more than {TIMEOUT} s"})
      continue
    if done.returncode:
      words = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
      lines.append({"name": name, "skipped": f"failed: {words}"})
    else:
      lines.append({**json.loads(done.stdout.strip().splitlines()[-1]), "process_s": time.perf_counter() - start})
    print(f"  {name}: {lines[-1].get('skipped', 'measured')}, {time.perf_counter() - start:.0f} s", flush=True)
  return {
    "tree": SMALL if smoke else TREE,
    "error_tree": SMALL,
    "pairs": SMOKE_PAIRS if smoke else PAIRS,
    "equal_dim": EQUAL_DIM,
    "equal_dim_law": law(EQUAL_DIM),
    "bound": "optax.global_norm of the same numbers, in turn, in the same process",
    "lines": lines,
  }


if __name__ == "__main__":
  main(sys.argv[1:])
