"""How near a sketch's spectral edge comes to the exact one, on the real path of a transformer that groks.

    python benchmarks/fidelity.py

The paper says that a dense Johnson–Lindenstrauss map with d = 10W keeps the ratios within 5.7 %. Here a run of
addition modulo 97 is recorded exactly: rows of P = 290,401 numbers, each the sum of 20 steps, until past the grok. Then
each sketch, drawn with many seeds, sees these rows, and the library's reports are compared with the float64 spectrum of
the exact ones, window by window. Beside each stands what theory gives on the same windows: a Gaussian map of dimension
d turns singular values Σ into those of ΣZ, with Z a W×d matrix of N(0, 1/d), whatever P is.

The run that groks has clear edges, on which every good sketch is right. The same run without weight decay does not grok
and has hardly any: its best ratios nearly tie, so that it shows who loses k* first, and whether the flag says so.

The recordings are kept in `--out` and used again; the reports of all draws are written there too. The result goes to
`benchmarks/results/fidelity.json`, or with `--smoke` to `--out`.

Source: arXiv 2603.15678, section on random projections. Departure: the paper's rows are differences of checkpoints of a
language model.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich.box
from flax.traverse_util import flatten_dict
from rich.console import Console
from rich.table import Table

import sedjax
from sedjax import _spectrum

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))
import modular  # noqa: E402

WINDOW, K_MAX, RATIOS = 10, 5, 3  # K_MAX is the library's default, W // 2
SEED = 42
DECAYS = {"grok": 1.0, "no decay": 0.0}
GROKKED, IN_A_ROW = 0.98, 3
# Split, batch and learning rate are those of `examples/grokking.py`; a row is longer, so that rows are less alike.
SETTINGS = modular.Settings(0.6, 384, 1e-3, max_steps=5000, eval_every=100, row_every=20)
SMOKE = dataclasses.replace(SETTINGS, batch_size=64, max_steps=100, eval_every=50, row_every=5)
# (kind, dims, draws); a draw is a seed of the sketch, and sees every window.
MAPS = (("gaussian", (50, 100, 200, 500, 1000), 12), ("count", (256, 1024, 4096, 16384, 65536), 16))
SMOKE_MAPS = (("gaussian", (100,), 2), ("count", (16384,), 2))
LAW_DRAWS = 400
PAPER_ERROR, PAPER_DIM, DEFAULT_DIM = 0.057, 100, 16384

Rows = dict[str, np.ndarray]  # by the leaf's path: float32[rows, *leaf.shape]


class Sketched(sedjax.sketch.Count):
  """Takes rows that are sketched already.

  A sketch's seed is a constant of the compiled program. Of a vector with as many numbers as the sketch has, each is
  moved and given a sign, which changes no inner product: so one program of the library's own makes the reports of every
  draw.
  """

  @property
  def sketch_id(self) -> tuple[int, int, int, int]:
    return (0, 0, self.seed, self.dim)


def record(settings: modular.Settings, decay: float, file: Path, console: Console) -> tuple[Rows, int | None]:
  """The rows of one run until three evaluations in a row reach 98 %, and the first of these (None: no grok)."""
  wanted = json.dumps({**dataclasses.asdict(settings), "seed": SEED, "decay": decay})
  if file.exists():
    with np.load(file) as saved:
      if str(saved["settings"]) == wanted:
        return {name[4:]: saved[name] for name in saved.files if name[:4] == "row:"}, int(saved["grok"]) or None
  train_step = functools.partial(modular.train_step, settings, optax.identity())

  def one_row(lane: modular.Lane, first: jax.Array) -> tuple[modular.Lane, Any]:
    def one_step(carry: Any, step: jax.Array) -> tuple[Any, None]:
      lane, total = carry
      lane, updates = train_step(lane, step)
      return (lane, jax.tree.map(jnp.add, total, updates)), None

    steps = first + jnp.arange(settings.row_every, dtype=jnp.int32)
    (lane, total), _ = jax.lax.scan(one_step, (lane, jax.tree.map(jnp.zeros_like, lane.params)), steps)
    return lane, total

  @jax.jit
  def interval(lane: modular.Lane, start: jax.Array) -> tuple[modular.Lane, Any, jax.Array]:
    firsts = start + jnp.arange(0, settings.eval_every, settings.row_every, dtype=jnp.int32)
    lane, rows = jax.lax.scan(one_row, lane, firsts)
    return lane, rows, modular.evaluate(settings, lane)[1]

  lane = modular.init(settings, optax.identity(), SEED, decay)
  parts, tests, grok = [], [], None
  for start in range(0, settings.max_steps, settings.eval_every):
    lane, rows, test = interval(lane, np.int32(start))
    parts.append(flatten_dict(jax.device_get(rows), sep="/"))
    tests.append(float(test))
    if len(tests) >= IN_A_ROW and min(tests[-IN_A_ROW:]) >= GROKKED:
      grok = (len(tests) - IN_A_ROW + 1) * settings.eval_every
      break
  steps = len(tests) * settings.eval_every
  console.print(f"Weight decay {decay}: trained {steps} steps; last test accuracy {tests[-1]:.1%}.")
  rows = {path: np.concatenate([part[path] for part in parts]) for path in parts[0]}
  np.savez(file, settings=wanted, grok=grok or 0, **{f"row:{path}": leaf for path, leaf in rows.items()})
  return rows, grok


def exact_spectra(rows: Rows) -> np.ndarray:
  """float64[windows, W]: singular values of every window of the exact rows."""
  flat = np.concatenate([leaf.reshape(len(leaf), -1).astype(np.float64) for leaf in rows.values()], 1)
  gram = flat @ flat.T
  starts = range(len(flat) - WINDOW + 1)
  grams = np.stack([gram[i : i + WINDOW, i : i + WINDOW] for i in starts])
  return np.sqrt(np.linalg.eigvalsh(grams)[:, ::-1])


def sketch_rows(sketch: Any, rows: Rows) -> jax.Array:
  """float32[rows, dim]. Under vmap the map's random numbers are made once for all rows."""

  @jax.jit
  @jax.vmap
  def sketched(row: dict[str, jax.Array]) -> jax.Array:
    return sum(sketch.apply(path, leaf) for path, leaf in row.items())  # pyright: ignore[reportReturnType]

  return sketched(rows)


def window_reports(sketch: Any, rows: Any) -> sedjax.Report:
  """The reports of all full windows, [windows, …], by the library's functional core."""
  config = sedjax.core.Config(WINDOW, sketch=sketch)

  def push(state: Any, row: Any) -> tuple[Any, sedjax.Report]:
    state = sedjax.core.observe(config, state, row)
    return state, sedjax.core.report(state)

  state = sedjax.core.init(config, jax.tree.map(lambda leaf: leaf[0], rows))
  _, reports = jax.lax.scan(push, state, rows)
  return jax.tree.map(lambda field: field[WINDOW - 1 :], reports)


@functools.partial(jax.jit, static_argnums=0)
def reports_of_sketched(dim: int, rows: jax.Array) -> sedjax.Report:
  return window_reports(Sketched(dim, 0), rows)


def sketched_by_dim(kind: str, dims: tuple[int, ...], seed: int, rows: Rows) -> dict[int, jax.Array]:
  """The rows through one draw of the map, for each dimension."""
  make = getattr(sedjax.sketch, kind)
  if kind == "count":
    return {dim: sketch_rows(make(dim, seed=seed), rows) for dim in dims}
  # A Gaussian map makes its outputs one by one, so that a smaller map is the beginning of a larger one.
  widest = sketch_rows(make(max(dims), seed=seed), rows) * np.float32(max(dims) ** 0.5)
  return {dim: widest[:, :dim] / np.float32(dim**0.5) for dim in dims}


def draw_reports(
  kind: str, dims: tuple[int, ...], draws: int, runs: dict[str, Rows]
) -> dict[tuple[str, int], dict[str, np.ndarray]]:
  """By run and dim: fields [draws, windows, …] of the library's reports for the sketch's seeds 0 … draws - 1."""
  paths = next(iter(runs.values()))
  rows = {path: np.concatenate([run[path] for run in runs.values()]) for path in paths}
  starts = np.cumsum([len(next(iter(run.values()))) for run in runs.values()])[:-1]
  found: dict[tuple[str, int], list[sedjax.Report]] = {(run, dim): [] for dim in dims for run in runs}
  for seed in range(draws):
    for dim, sketched in sketched_by_dim(kind, dims, seed, rows).items():
      for run, part in zip(runs, jnp.split(sketched, starts), strict=True):
        found[run, dim].append(jax.device_get(reports_of_sketched(dim, part)))
  fields = ("singular_values", "ratios", "k_star", "edge_ambiguous", "effective_dim")
  return {
    key: {name: np.stack([getattr(report, name) for report in reports]) for name in fields}
    for key, reports in found.items()
  }


def law(dim: int, draws: int, exact: np.ndarray) -> dict[str, np.ndarray]:
  """What theory gives: the fields of `draw_reports`, for a Gaussian map of dimension `dim` that errs as it must."""
  generator = np.random.default_rng(dim)
  # Bartlett: ZZᵀ = LLᵀ/d with L lower triangular, normal below a diagonal of chi variables.
  lower = np.tril(generator.standard_normal((draws, len(exact), WINDOW, WINDOW)), -1)
  place = np.arange(WINDOW)
  lower[..., place, place] = np.sqrt(generator.chisquare(dim - place, (draws, len(exact), WINDOW)))
  values = np.linalg.svd(exact[:, :, None] * lower, compute_uv=False) / np.sqrt(dim)
  dims = np.full(values.shape[:2], dim, np.float32)
  ratios = _spectrum.ratios_of(values.astype(np.float32))
  k_star, _, ambiguous = _spectrum.find_edge(ratios, K_MAX, dims, exact=False)
  fields = {"ratios": ratios, "k_star": k_star, "edge_ambiguous": ambiguous, "effective_dim": dims}
  return {"singular_values": values, **{name: np.asarray(field) for name, field in fields.items()}}


def statistics(kind: str, run: str, dim: int, found: dict[str, np.ndarray], exact: np.ndarray) -> dict[str, Any]:
  """One line of the table. Shares are of all windows of all draws where nothing else is said."""
  exact_ratios = exact[:, :-1] / exact[:, 1:]
  error = np.abs(found["ratios"] / exact_ratios - 1)
  differs = found["k_star"] != exact_ratios[:, :K_MAX].argmax(1) + 1
  flagged = found["edge_ambiguous"]
  line = {"run": run, "map": kind, "dim": dim, "draws": len(differs), "windows": differs.size}
  for k in range(RATIOS):
    values = error[..., k]
    line[f"error_{k + 1}{k + 2}"] = {
      "mean": values.mean(),
      "mean_standard_error": values.mean(1).std(ddof=1) / len(values) ** 0.5,
      "percentile_95": np.percentile(values, 95),
      "max": values.max(),
    }
  line |= {
    "k_star_differs": differs.mean(),
    # Windows overlap and share a draw, so that draws, not windows, are independent.
    "k_star_differs_standard_error": differs.mean(1).std(ddof=1) / len(differs) ** 0.5,
    "flagged": flagged.mean(),
    "differs_of_unflagged": differs[~flagged].mean() if not flagged.all() else 0.0,
    "differing": differs.sum(),
    "differing_and_flagged": (differs & flagged).sum(),
    "effective_dim_median": np.median(found["effective_dim"]),
    "effective_dim_min": found["effective_dim"].min(),
  }
  return json.loads(json.dumps(line, default=lambda x: x.item()))


def path_difference(kind: str, dims: tuple[int, ...], rows: Rows) -> dict[str, Any]:
  """How far the shortcut (sketch all rows, then report) is from observing the trees themselves, on some rows."""
  dim, checked = (DEFAULT_DIM, (DEFAULT_DIM,)) if kind == "count" else (dims[0], dims[:2])
  some = {path: leaf[: WINDOW + 10] for path, leaf in rows.items()}
  sketch = getattr(sedjax.sketch, kind)(dim, seed=1)
  whole = jax.device_get(jax.jit(functools.partial(window_reports, sketch))(some))
  short = jax.device_get(reports_of_sketched(dim, sketched_by_dim(kind, checked, 1, some)[dim]))
  return {
    "map": kind,
    "dim": dim,
    "singular_values_max_relative": float(np.abs(short.singular_values / whole.singular_values - 1).max()),
    "k_star_or_flag_differs": int(
      ((short.k_star != whole.k_star) | (short.edge_ambiguous != whole.edge_ambiguous)).sum()
    ),
  }


def verdicts(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
  """The targets, and what was found."""
  by_map = {(line["run"], line["map"], line["dim"]): line for line in lines}
  pairs = []
  for run in DECAYS:
    ours, theory = by_map[run, "count", DEFAULT_DIM], by_map[run, "law", DEFAULT_DIM]
    name = f"{run}, count({DEFAULT_DIM})"
    error, limit = ours["error_23"]["mean"], 1.25 * theory["error_23"]["mean"]
    pairs += [
      (f"{name}: mean error of σ2/σ3", error, limit, "1.25 × the law"),
      (f"{name}: k* differs", ours["k_star_differs"], 1.25 * theory["k_star_differs"], "1.25 × the law"),
      (f"{name}: k* differs where not flagged", ours["differs_of_unflagged"], 0.005, "0.5 %"),
    ]
    if run == "grok":  # without an edge the best two ratios do nearly tie
      pairs.append((f"{name}: flagged ambiguous", ours["flagged"], 0.25, "25 %"))
  for k in range(1, RATIOS + 1):
    what = f"the paper's claim, grok, gaussian({PAPER_DIM}): mean error of σ{k}/σ{k + 1}"
    pairs.append((what, by_map["grok", "gaussian", PAPER_DIM][f"error_{k}{k + 1}"]["mean"], PAPER_ERROR, "5.7 %"))
  return [
    {"target": what, "found": found, "limit": limit, "limit_is": words, "met": bool(found <= limit)}
    for what, found, limit, words in pairs
  ]


def show(lines: list[dict[str, Any]], targets: list[dict[str, Any]], console: Console) -> None:
  """A table for each run, and the verdicts."""
  for run in DECAYS:
    table = Table(
      "map",
      box=rich.box.SIMPLE_HEAD,
      pad_edge=False,
      title=f"{run}; relative errors in %: mean, 95th percentile, maximum",
    )
    names = ("d", "eff. d", "windows", "σ1/σ2", "σ2/σ3", "σ3/σ4", "differs", "flagged", "differs, unflagged", "caught")
    for name in names:
      table.add_column(name, justify="right")
    for line in (line for line in lines if line["run"] == run):
      errors = [
        " ".join(f"{100 * line[f'error_{k}{k + 1}'][name]:5.2f}" for name in ("mean", "percentile_95", "max"))
        for k in range(1, RATIOS + 1)
      ]
      counts = [f"{line[name]:.0f}" for name in ("dim", "effective_dim_median", "windows")]
      shares = [f"{line[name]:.2%}" for name in ("k_star_differs", "flagged", "differs_of_unflagged")]
      caught = f"{line['differing_and_flagged']} of {line['differing']}"
      table.add_row(line["map"], *counts, *errors, *shares, caught)
    console.print(table)
  for target in targets:
    word = "met" if target["met"] else "NOT MET"
    console.print(
      f"{word}: {target['target']} is {target['found']:.3%}, limit {target['limit']:.3%} ({target['limit_is']})",
      soft_wrap=True,
      highlight=False,
    )


def provenance(argv: list[str], settings: modular.Settings) -> dict[str, Any]:
  """What made the result."""
  device = jax.devices()[0]
  commit = subprocess.run(
    ["git", "describe", "--always", "--abbrev=40", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
  )
  packages = ("jax", "jaxlib", "numpy", "optax", "flax", "sedjax")
  return {
    "command": shlex.join(["python", "benchmarks/fidelity.py", *argv]),
    "device": f"{device.platform} ({device.device_kind}), {os.cpu_count()} CPU cores, {platform.machine()}",
    "versions": {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in packages},
    "commit": commit.stdout.strip() or None,
    "settings": {**dataclasses.asdict(settings), "seed": SEED, "window": WINDOW, "k_max": K_MAX},
    "runs_weight_decay": DECAYS,
  }


def main(argv: list[str]) -> None:
  parser = argparse.ArgumentParser(description="Compares sketched spectral edges with the exact ones.")
  parser.add_argument("--out", type=Path, default=Path("out/fidelity"), help="folder for the recording (%(default)s)")
  parser.add_argument("--smoke", action="store_true", help="a short recording and few draws, to see that it works")
  args = parser.parse_args(argv)
  args.out.mkdir(parents=True, exist_ok=True)
  settings, maps = (SMOKE, SMOKE_MAPS) if args.smoke else (SETTINGS, MAPS)
  origin = provenance(argv, settings)
  suffix = "-smoke" if args.smoke else ""
  console = Console(width=max(Console().width, 160))
  began = time.perf_counter()

  runs, groks = {}, {}
  for run, decay in DECAYS.items():
    file = args.out / f"{run.replace(' ', '-')}{suffix}.npz"
    runs[run], groks[run] = record(settings, decay, file, console)
    # The other run is as long as the one that groks.
    settings = dataclasses.replace(settings, max_steps=settings.row_every * len(next(iter(runs[run].values()))))
  exact = {run: exact_spectra(rows) for run, rows in runs.items()}
  for run, spectra in exact.items():
    console.print(f"{run}: {len(spectra)} windows of {WINDOW} rows of {settings.row_every} steps; grok {groks[run]}.")
  lines, checks = [], []
  saved = {f"exact:{run}": spectra for run, spectra in exact.items()}
  for kind, dims, draws in maps:
    start = time.perf_counter()
    checks.append(path_difference(kind, dims, runs["grok"]))
    for (run, dim), found in draw_reports(kind, dims, draws, runs).items():
      saved |= {f"{kind}:{dim}:{run}:{name}": field for name, field in found.items()}
      lines.append(statistics(kind, run, dim, found, exact[run]))
      lines.append(statistics("law", run, dim, law(dim, LAW_DRAWS, exact[run]), exact[run]))
    console.print(f"{kind}: {draws} draws of {len(dims)} dimensions in {time.perf_counter() - start:.0f} s")
  targets = verdicts(lines)
  show(lines, targets, console)
  for check in checks:
    console.print(f"Shortcut against observing the trees: {check}", soft_wrap=True, highlight=False)
  leaves = list(runs["grok"].values())
  result = {
    "provenance": origin,
    "parameters": sum(leaf[0].size for leaf in leaves),
    "rows": len(leaves[0]),
    "grok_step": groks["grok"],
    "seconds": time.perf_counter() - began,
    "verdicts": targets,
    "shortcut_checks": checks,
    "lines": lines,
  }
  np.savez_compressed(args.out / f"reports{suffix}.npz", **saved)
  file = args.out / "fidelity-smoke.json" if args.smoke else ROOT / "benchmarks" / "results" / "fidelity.json"
  file.parent.mkdir(parents=True, exist_ok=True)
  file.write_text(json.dumps(result, indent=1) + "\n")
  console.print(f"Wrote {file} after {result['seconds']:.0f} s.", soft_wrap=True)


if __name__ == "__main__":
  main(sys.argv[1:])
