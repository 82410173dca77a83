"""What tracking costs on this device, beside what reading the updates once costs.

    python benchmarks/run.py --device cpu

Sections, each explained in `benchmarks/README.md`:

- peers: other ways to project updates to a few numbers (runs first, in processes of its own).
- observe: the whole tracker beside two bounds, on whole GPT trees.
- flatness: the same for sketches and windows of several sizes.
- params: a step that reads nothing, beside a step that does nothing.
- seeds: vmapped seeds beside as many single ones.
- step: training steps with and without the tracker.
- eigen: ways to get the spectrum of a few rows.

Whatever is compared is timed in turn, in one loop. The result goes to `benchmarks/results/<device>.json`, section by
section; with `--smoke`, which takes a minute and shows only that everything works, to `out/benchmarks/`.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import models
import numpy as np
import optax
import peers
import provenance
import report
from models import Tree
from timing import compile_function, interleave, seconds_of

import sedjax
from sedjax import _eigen, core

WINDOW, DIM = 10, 16384
TINY, SMALL, MIDDLE = "gpt_220k", "grok_290k", "gpt_51m"
Section = dict[str, Any]


class Effort(NamedTuple):
  """How long to measure."""

  smoke: bool
  accelerator: bool
  rounds: int
  repeats: int

  @property
  def trees(self) -> tuple[str, ...]:
    return (SMALL,) if self.smoke else (TINY, SMALL, MIDDLE, "gpt2_124m")


class Observer:
  """A compiled `core.observe` and the state that it hands on."""

  def __init__(self, config: core.Config, trees: list[Tree]):
    self.config, self.trees = config, trees
    self.state = core.init(config, trees[0])
    observe = functools.partial(core.observe, config)
    self.compiled = compile_function(observe, self.state, trees[0], donate_argnums=0)

  def __call__(self, i: int) -> Any:
    self.state = self.compiled.call(self.state, self.trees[i % len(self.trees)])
    return self.state


def column_sums(tree: Tree) -> Tree:
  """The cheapest thing that has the shape of a sketch: sums over the rows of every leaf; vectors are copied."""
  return jax.tree.map(lambda leaf: leaf.reshape(-1, leaf.shape[-1]).sum(0), tree)


def bounds(trees: list[Tree]) -> dict[str, tuple[Any, Callable[[int], Any]]]:
  """By name: what is compiled, and a call of it."""
  functions = {"global_norm": optax.global_norm, "column_sums": column_sums}
  compiled = {name: compile_function(function, trees[0]) for name, function in functions.items()}
  return {name: (each, lambda i, call=each.call: call(trees[i % len(trees)])) for name, each in compiled.items()}


def if_it_fits(measure: Callable[[], Section], what: Section) -> Section:
  """`what` with what was measured, or with the reason why not."""
  try:
    return {**what, **measure()}
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    return {**what, "skipped": "out of memory"}


def free_bytes() -> float:
  """Memory of the device that is not in use, as far as is known."""
  known = jax.devices()[0].memory_stats() or {}
  if "bytes_limit" in known:
    return known["bytes_limit"] - known["bytes_in_use"]
  try:
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
  except (ValueError, OSError):
    return math.inf


def copy_bandwidth(effort: Effort) -> float:
  """Bytes read and written in a second where a large array is copied with another sign."""
  count = 2**28 if effort.accelerator else 2**25
  array = jax.random.normal(jax.random.key(0), (count,))
  copy = compile_function(lambda x: -x, array)
  timing = interleave({"copy": lambda _: copy.call(array)}, effort.rounds, effort.repeats)["copy"]
  return 2 * array.nbytes / timing["best_s"]


# ---- sections ----


def measure_observe(effort: Effort) -> Section:
  cases = [(name, "float32") for name in effort.trees]
  if effort.accelerator and not effort.smoke:
    cases += [("gpt2_124m", "bfloat16"), ("gpt2_1p3b", "float32"), ("gpt2_1p3b", "bfloat16")]

  def measure(name: str, dtype: str) -> Section:
    trees = models.variants(models.shapes(name, jnp.dtype(dtype)))
    known = bounds(trees)
    observer = Observer(core.Config(WINDOW), trees)
    calls = {bound: call for bound, (_, call) in known.items()} | {"observe": observer}
    timings = interleave(calls, effort.rounds, effort.repeats)
    facts = {bound: compiled.facts() for bound, (compiled, _) in known.items()}
    facts["observe"] = observer.compiled.facts()
    best = {call: timing["best_s"] for call, timing in timings.items()}
    return {
      **{call: {**timing, **facts[call]} for call, timing in timings.items()},
      "ratio_to_global_norm": best["observe"] / best["global_norm"],
      "ratio_to_column_sums": best["observe"] / best["column_sums"],
      "ratio_to_copying": best["observe"] * bandwidth / models.sizes(trees[0])["bytes"],
    }

  bandwidth = copy_bandwidth(effort)
  lines = []
  for name, dtype in cases:
    what = {"tree": name, "dtype": dtype, **models.sizes(models.shapes(name, jnp.dtype(dtype)))}
    lines.append(if_it_fits(functools.partial(measure, name, dtype), what))
  return {"copy_bytes_per_s": bandwidth, "lines": lines}


def measure_flatness(effort: Effort) -> Section:
  name = SMALL if effort.smoke else MIDDLE
  trees = models.variants(models.shapes(name))
  settings = [(WINDOW, dim) for dim in (1024, 4096, DIM, 65536)] + [(window, DIM) for window in (5, 32, 64)]
  settings = settings[1:4] if effort.smoke else settings
  observers = {
    f"W={window}, d={dim}": Observer(core.Config(window, sketch=sedjax.sketch.count(dim)), trees)
    for window, dim in settings
  }
  # More rounds than usual: what differs is less than what a machine that does other things varies by.
  timings = interleave(observers, 5 * effort.rounds, effort.repeats)
  usual = timings[f"W={WINDOW}, d={DIM}"]["best_s"]
  lines = [
    {
      "window": window,
      "dim": dim,
      **timings[key],
      **observers[key].compiled.facts(),
      "ratio_to_usual": timings[key]["best_s"] / usual,
    }
    for (window, dim), key in zip(settings, observers, strict=True)
  ]
  return {"tree": name, "usual": {"window": WINDOW, "dim": DIM}, "lines": lines}


def measure_params(effort: Effort) -> Section:
  every = 200

  def nothing(state: Any, params: Tree) -> Any:
    del params
    return state._replace(counters=state.counters + 1)

  def measure(name: str) -> Section:
    trees = models.variants(models.shapes(name))
    config = core.Config(WINDOW, source="params", every=every)
    states: dict[str, Any] = {}

    def observe(config: core.Config, state: Any, params: Tree) -> Any:
      return core.observe(config, state, None, params)

    def fresh(config: core.Config) -> Any:
      return core.init(config, trees[0])

    always = core.Config(WINDOW, source="params")
    compiled = {
      "between": compile_function(functools.partial(observe, config), fresh(config), trees[0], donate_argnums=0),
      "nothing": compile_function(nothing, fresh(config), trees[0], donate_argnums=0, keep_unused=True),
      "reading": compile_function(functools.partial(observe, always), fresh(always), trees[0], donate_argnums=0),
    }

    def call(kind: str, i: int) -> Any:
      states[kind] = compiled[kind].call(states[kind], trees[i % len(trees)])
      return states[kind]

    def restart() -> None:
      for kind in compiled:
        states[kind] = fresh(always if kind == "reading" else config)
      call("between", 0)  # reads the parameters, as one step in `every` does

    rounds = min(every - 10, 5 * effort.rounds)
    calls = {kind: functools.partial(call, kind) for kind in compiled}
    timings = interleave(calls, rounds, effort.repeats, restart=restart)
    between, idle, reading = (timings[kind]["best_s"] for kind in ("between", "nothing", "reading"))
    return {
      **{kind: {**timing, **compiled[kind].facts()} for kind, timing in timings.items()},
      "added_s": between - idle,
      "average_s": (reading + (every - 1) * between) / every,
    }

  lines = [{"tree": name, "every": every, **measure(name)} for name in effort.trees]
  return {"lines": lines}


def measure_seeds(effort: Effort) -> Section:
  config = core.Config(WINDOW)
  small, middle = ((1, 8), ()) if effort.smoke else ((1, 8, 32), (1, 4))
  if effort.accelerator and not effort.smoke:
    small = middle = (1, 8, 64)
  cases = [(SMALL, seeds) for seeds in small] + [(MIDDLE, seeds) for seeds in middle]

  def measure(name: str, seeds: int) -> Section:
    trees = models.variants(models.shapes(name))
    stacks = models.variants(models.shapes(name, lead=(seeds,)), seed=1)
    single = Observer(config, trees)
    states = [core.init(config, trees[0]) for _ in range(seeds)]

    def one_by_one(i: int) -> Any:
      for seed in range(seeds):
        states[seed] = single.compiled.call(states[seed], trees[(i + seed) % len(trees)])
      return states

    stacked = [jax.vmap(functools.partial(core.init, config))(stacks[0])]
    observe = jax.vmap(functools.partial(core.observe, config))
    compiled = compile_function(observe, stacked[0], stacks[0], donate_argnums=0)

    def together(i: int) -> Any:
      stacked[0] = compiled.call(stacked[0], stacks[i % len(stacks)])
      return stacked

    timings = interleave({"together": together, "one_by_one": one_by_one}, effort.rounds, effort.repeats)
    facts = compiled.facts()
    size = models.sizes(stacks[0])["bytes"]
    return {
      "together": {**timings["together"], **facts},
      "one_by_one": {**timings["one_by_one"], **single.compiled.facts()},
      "ratio": timings["together"]["best_s"] / timings["one_by_one"]["best_s"],
      "stacked_bytes": size,
      "temporaries_of_stacked": None if facts["temporary_bytes"] is None else facts["temporary_bytes"] / size,
    }

  lines = []
  for name, seeds in cases:
    what = {"tree": name, "seeds": seeds}
    needed = 3 * seeds * models.sizes(models.shapes(name))["bytes"]
    if needed > free_bytes():
      lines.append({**what, "skipped": f"needs {needed / 1e9:.1f} GB of free memory"})
    else:
      lines.append(if_it_fits(functools.partial(measure, name, seeds), what))
  return {"lines": lines}


def measure_step(effort: Effort) -> Section:
  # (tree, sequences, tokens in each, dtype, rounds). The seconds that the tracker adds do not depend on how many tokens
  # there are, and short steps vary less.
  if effort.smoke:
    cases = [(SMALL, 8, 2, "float32", 10)]
  elif effort.accelerator:
    cases = [("gpt2_124m", batch, 1024, "bfloat16", 190) for batch in (32, 8)]
  else:
    cases = [(MIDDLE, 8, 256, "float32", 16), (MIDDLE, 1, 64, "float32", 100)]

  def measure(name: str, batch: int, length: int, dtype: str, rounds: int) -> Section:
    generator = np.random.default_rng(0)
    tokens = [
      jnp.asarray(generator.integers(models.GPTS[name].vocab, size=(batch, length + 1)), jnp.int32) for _ in range(8)
    ]
    tracker = sedjax.track_spectral_edge(WINDOW, momentum=0.9)
    between = sedjax.track_spectral_edge(WINDOW, momentum=0.9, source="params", every=200)  # more than all rounds
    optimizers = {"without": [], "with": [tracker], "params": [between]}
    compiled, states = {}, {}
    for kind, trackers in optimizers.items():
      tx = optax.chain(optax.adamw(3e-4), *trackers)

      def step(params: Tree, state: Any, tokens: jax.Array, tx: Any = tx) -> tuple[Tree, Any, jax.Array]:
        loss, gradients = jax.value_and_grad(models.loss)(params, tokens, jnp.dtype(dtype))
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, loss

      params = models.initial_params(name)
      states[kind] = (params, tx.init(params))
      compiled[kind] = compile_function(step, *states[kind], tokens[0], donate_argnums=(0, 1))
    # By itself, between the steps: the difference of two steps is known less well than that.
    updates = models.initial_params(name)
    states["alone"] = tracker.init(updates)
    alone = compile_function(lambda u, s: tracker.update(u, s)[1], updates, states["alone"], donate_argnums=1)
    compiled["alone"] = alone

    def call(kind: str, i: int) -> Any:
      if kind == "alone":
        states[kind] = compiled[kind].call(updates, states[kind])
        return states[kind]
      *state, loss = compiled[kind].call(*states[kind], tokens[i % len(tokens)])
      states[kind] = tuple(state)
      return (*state, loss)

    seconds: dict[str, list[float]] = {kind: [] for kind in states}
    for i in range(2 + rounds):
      # Every other round in the other order.
      for kind in [*list(optimizers)[:: 1 if i % 2 else -1], "alone"]:
        found = seconds_of(functools.partial(call, kind), i)
        if i >= 2:
          seconds[kind].append(found)

    def added(kind: str) -> Section:
      without, tracked = np.asarray(seconds["without"]), np.asarray(seconds[kind])
      difference = tracked - without
      error = difference.std(ddof=1) / rounds**0.5
      return {
        "difference_s": difference.mean(),
        "difference_standard_error_s": error,
        "median_difference_s": np.median(difference),
        "overhead": difference.mean() / without.mean(),
        "overhead_standard_error": error / without.mean(),
      }

    facts = {kind: {"median_s": statistics.median(seconds[kind]), **compiled[kind].facts()} for kind in seconds}
    facts["params"] |= added("params")
    return {"batch": [batch, length], "rounds": rounds, **facts, **added("with"), "seconds": seconds}

  lines = []
  for name, *sizes, dtype, rounds in cases:
    what = {"tree": name, "dtype": dtype}
    lines.append(if_it_fits(functools.partial(measure, name, *sizes, dtype, rounds), what))
  return {"lines": lines}


# ---- eigenproblems ----


def jacobi(gram: jax.Array, sweeps: int) -> tuple[jax.Array, jax.Array]:
  """Eigenvalues (descending) and the leading eigenvector of float32[batch, n, n], by parallel Jacobi rotations.

  Index i of the upper half meets index i of the lower half; then all but the first move on by one place, as players of
  a tournament do. After n - 1 rounds each has met each, and all are back in place: one sweep.
  """
  size = gram.shape[1]
  half = (size + 1) // 2
  matrix = jnp.pad(gram, ((0, 0), (0, 2 * half - size), (0, 2 * half - size)))
  vectors = jnp.broadcast_to(jnp.eye(2 * half, dtype=gram.dtype), matrix.shape)

  def turn(x: jax.Array, cosine: jax.Array, sine: jax.Array) -> jax.Array:
    """Rotates pairs of rows, and moves the rows on."""
    upper, lower = x[:, :half], x[:, half:]
    upper, lower = cosine * upper - sine * lower, sine * upper + cosine * lower
    return jnp.concatenate([upper[:, :1], lower[:, :1], upper[:, 1:-1], lower[:, 1:], upper[:, -1:]], 1)

  def one_round(_: Any, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    matrix, vectors = carry
    diagonal = jnp.diagonal(matrix, axis1=1, axis2=2)
    off = jnp.diagonal(matrix[:, :half, half:], axis1=1, axis2=2)
    slope = (diagonal[:, half:] - diagonal[:, :half]) / jnp.where(off == 0, 1, 2 * off)
    tangent = jnp.where(slope < 0, -1, 1) / (jnp.abs(slope) + jnp.sqrt(1 + slope * slope))
    tangent = jnp.where(off == 0, 0, tangent)
    cosine = jax.lax.rsqrt(1 + tangent * tangent)[..., None]
    sine = tangent[..., None] * cosine
    matrix = turn(matrix, cosine, sine).swapaxes(1, 2)
    return turn(matrix, cosine, sine), turn(vectors, cosine, sine)

  if half == 1:
    raise ValueError("jacobi needs three rows or more")
  matrix, vectors = jax.lax.fori_loop(0, sweeps * (2 * half - 1), one_round, (matrix, vectors))
  values = jnp.diagonal(matrix, axis1=1, axis2=2)[:, :size]  # the row of padding is last again, with eigenvalue 0
  best = jnp.argmax(values, 1)
  return -jnp.sort(-values, 1), jnp.take_along_axis(vectors, best[:, None, None], 1)[:, 0, :size]


def sweeps_for(size: int) -> int:
  """As many as these spectra need: the error falls no further with more."""
  return 4 + math.ceil(math.log2(size))


def graded_rows(count: int, size: int, condition: float) -> np.ndarray:
  """float32[count, size, d]: rows whose singular values fall geometrically from 1 to 1/condition."""
  generator = np.random.default_rng(size)
  right = np.linalg.qr(generator.standard_normal((DIM, size)))[0].T
  left = np.linalg.qr(generator.standard_normal((count, size, size)))[0]
  return ((left * condition ** -np.linspace(0, 1, size)) @ right).astype(np.float32)


def by_svd(rows: jax.Array, gram: jax.Array) -> tuple[jax.Array, jax.Array]:
  del gram
  left, values, _ = jnp.linalg.svd(rows, full_matrices=False)
  return values, left[..., 0]


def by_eigh(rows: jax.Array, gram: jax.Array) -> tuple[jax.Array, jax.Array]:
  del rows
  return _eigen.by_library(gram)


def by_jacobi(rows: jax.Array, gram: jax.Array) -> tuple[jax.Array, jax.Array]:
  del rows
  return jacobi(gram, sweeps_for(gram.shape[1]))


def by_householder(rows: jax.Array, gram: jax.Array) -> tuple[jax.Array, jax.Array]:
  del rows
  return _eigen.solve_each(gram)


def by_kernel(rows: jax.Array, gram: jax.Array) -> tuple[jax.Array, jax.Array]:
  del rows
  return _eigen.solve_on_gpu(gram)


CONDITIONS = (100, 300)
METHODS = {"svd": by_svd, "eigh": by_eigh, "jacobi": by_jacobi, "householder": by_householder, "kernel": by_kernel}


def gram_of(rows: jax.Array) -> jax.Array:
  return jnp.einsum("bnd,bmd->bnm", rows, rows, precision=jax.lax.Precision.HIGHEST)


def spectrum(method: str, rows: jax.Array, gram: jax.Array) -> np.ndarray:
  """Singular values, descending, by one of the methods."""
  values = np.asarray(jax.jit(METHODS[method])(rows, gram)[0], np.float64)
  return -np.sort(-(values if method == "svd" else np.sqrt(np.maximum(values, 0))), 1)


def measure_eigen(effort: Effort) -> Section:
  sizes = (3, 10) if effort.smoke else (3, 5, 10, 11, 16, 32, 65)
  batches = (1, 8) if effort.smoke else (1, 8, 64, 512)
  if effort.accelerator:  # whose compilers take longer
    sizes, batches = sizes[::2], batches[::3]
  known = [method for method in METHODS if method != "kernel" or jax.default_backend() == "gpu"]
  lines = []
  for size in sizes:
    errors: dict[str, dict[str, float]] = {method: {} for method in known}
    for condition in CONDITIONS:
      rows = graded_rows(8, size, condition)
      exact = np.linalg.svd(rows.astype(np.float64), compute_uv=False)
      gram = gram_of(jnp.asarray(rows))
      for method in known:
        found = spectrum(method, jnp.asarray(rows), gram)
        errors[method][str(condition)] = float(np.max(np.abs(found / exact - 1)))
    rows = jnp.asarray(graded_rows(8, size, CONDITIONS[0]))
    grams = gram_of(rows)
    times: dict[str, dict[str, Any]] = {}
    for batch in batches:
      some, gram = rows[:batch], jnp.tile(grams[:batch], (max(1, batch // 8), 1, 1))
      # More rows than these take long, and much memory.
      methods = [method for method in known if method != "svd" or batch <= 8]
      compiled = {method: compile_function(METHODS[method], some, gram) for method in methods}
      calls = {method: lambda _, c=each.call, x=some, g=gram: c(x, g) for method, each in compiled.items()}
      timings = {}
      # One method after the other: LAPACK's threads, which spin for a while after large problems, slow down the rest.
      for method, call in calls.items():
        time.sleep(0.2)
        timings |= interleave({method: call}, effort.rounds, effort.repeats, warm=1, budget=1)
      times[str(batch)] = {method: {**timings[method], **compiled[method].facts()} for method in methods}
    lines.append({"rows": size, "sweeps": sweeps_for(size), "batches": times, "max_relative_error": errors})
  return {"dim": DIM, "timed_condition": CONDITIONS[0], "lines": lines}


# ---- the program ----

SECTIONS: dict[str, Callable[[Effort], Section]] = {
  "observe": measure_observe,
  "flatness": measure_flatness,
  "params": measure_params,
  "seeds": measure_seeds,
  "step": measure_step,
  "eigen": measure_eigen,
}
NAMES = ("peers", *SECTIONS)  # in this order: while other processes run, this one must not hold the device


def main(argv: list[str]) -> None:
  parser = argparse.ArgumentParser(description="Measures what tracking costs on this device.")
  parser.add_argument("--device", choices=("cpu", "gpu", "tpu"), required=True)
  parser.add_argument("--smoke", action="store_true", help="small and short, to see that it works; not stored")
  parser.add_argument("--only", nargs="+", choices=NAMES, metavar="NAME", help=f"some of: {', '.join(NAMES)}")
  args = parser.parse_args(argv)
  begun = provenance.begin()
  if args.device == "cpu":
    jax.config.update("jax_platforms", "cpu")
  jax.config.update("jax_enable_compilation_cache", False)
  wanted = [name for name in NAMES if args.only is None or name in args.only]
  effort = Effort(args.smoke, args.device != "cpu", rounds=3 if args.smoke else 20, repeats=1 if args.smoke else 3)

  measured, file = {}, Path()
  for name in wanted:
    print(f"{name} …", flush=True)
    start = time.perf_counter()
    if name == "peers":
      section = peers.measure_all(args.device, args.smoke)
    else:
      if jax.default_backend() != args.device:
        sys.exit(f"There is no {args.device} here: JAX's default device is {jax.devices()[0]}.")
      section = SECTIONS[name](effort)
    measured[name] = {"seconds": time.perf_counter() - start, **section}
    print(f"  {measured[name]['seconds']:.0f} s", flush=True)
    file = store(argv, args, begun, measured)
  print(report.tables(file.stem, json.loads(file.read_text())))
  print(f"Wrote {file}.")


def store(argv: list[str], args: argparse.Namespace, begun: Section, measured: dict[str, Section]) -> Path:
  """Writes the sections measured so far into the device's file, where others that are there already are kept."""
  made_by = provenance.made_by("run.py", argv, begun)
  device = made_by["device"]
  if device["platform"] != args.device:
    sys.exit(f"There is no {args.device} here: JAX's default device is {jax.devices()[0]}.")
  folder = provenance.SMOKE if args.smoke else provenance.RESULTS
  file = folder / f"{provenance.device_name(device)}.json"
  old: dict[str, Section] = json.loads(file.read_text()) if file.exists() else {}
  if args.only is None or any(section["made_by"]["device"] != device for section in old.values()):
    old = {}  # numbers of another machine do not belong beside these
  sections = old | {name: {"made_by": made_by, **section} for name, section in measured.items()}
  folder.mkdir(parents=True, exist_ok=True)
  file.write_text(
    json.dumps({name: sections[name] for name in NAMES if name in sections}, indent=1, default=provenance.plain)
  )
  return file


if __name__ == "__main__":
  main(sys.argv[1:])
