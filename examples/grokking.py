"""Watches the spectral edge while a small transformer groks addition modulo 97.

    python examples/grokking.py

Three seeds train at once under `jax.vmap` until each has grokked: three evaluations in a row with a test accuracy of
98 % or more. The *grok step* is the first of the three. Everything is measured inside the jitted step; what leaves the
device is one small tree of arrays for each evaluation. At the end there are, in `out/grokking`,

  grokking.nc    the record, an xarray.Dataset of runs, evaluations, rows of the window and singular values
  grokking.png   the figure, drawn from that file

and a table of what happened, and of what the edge did until the grok step. The table states facts of these runs; it
does not test whether the edge predicts anything.

The null is noise with AdamW's momentum; a steady motion, such as the shrinking by weight decay, is no noise and counts
as an edge. Put the tracker before the decay in the chain to leave that motion out.

The default is meant to grok sooner than the companion papers' settings do: 60 % of the pairs for training, batches of
384. It takes about 2,600 steps, two to four minutes on two CPU cores. `--paper` takes their settings to the letter:
50 % of the pairs, batches of 512, evaluations every 100 steps, 200,000 steps at most. Both draw batches with
replacement and use AdamW: learning rate 1e-3, β = (0.9, 0.98), weight decay 1 on all parameters, gradient clip 1.
`--controls` adds the same seeds without weight decay.

Source: arXiv 2602.16746 (model and training), arXiv 2603.15678 (spectral edge).
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import itertools
import os
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import flax
import jax
import jax.numpy as jnp
import modular
import numpy as np
import optax
import rich.box
import xarray as xr
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, NullLocator
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import sedjax

WINDOW = 10
SEEDS = (42, 137, 2024)
DEFAULT = modular.Settings(0.6, 384, 1e-3, max_steps=5000, eval_every=50, row_every=10)
SMOKE = dataclasses.replace(DEFAULT, batch_size=64, max_steps=60, eval_every=30, row_every=5)
FITTED, GROKKED, IN_A_ROW = 0.99, 0.98, 3
# Told apart by colour and, in grey, by lightness.
BLUE, ORANGE = "#0072B2", "#E69F00"
PHASE_COLORS = {
  sedjax.Phase.NO_EDGE: "#FFFFFF",
  sedjax.Phase.RISE: "#FBE6A2",
  sedjax.Phase.PLATEAU: "#B5D6EC",
  sedjax.Phase.COLLAPSE: "#C2A6BF",
}

# What is recorded for each row of the window: units and long name.
ROW_FIELDS = {
  "singular_values": ("parameter units", "singular value of the window"),
  "k_star": ("1", "place of the spectral edge, 0 while the window fills"),
  "gap_ratio": ("1", "ratio of singular values at the edge"),
  "null_ratio": ("1", "ratio that noise of AdamW's momentum rarely exceeds"),
  "edge_ambiguous": ("1", "another place is within the sketch's error"),
  "phase": ("1", "phase of the gap ratio"),
  "pc1_fraction": ("1", "share of the largest singular value in the sum of squares"),
  "turning": ("1", "1 - |cos| between successive leading directions"),
  "last_update_norm": ("parameter units", "norm of the newest row"),
  "effective_dim": ("1", "effective dimension of the sketch"),
  "status": ("1", "sedjax.Status bits"),
}


def make_interval(settings: modular.Settings, tracker: Any) -> Any:
  """The jitted function that trains all lanes up to their next evaluation and returns what is recorded."""
  train_step = functools.partial(modular.train_step, settings, tracker)

  def one_step(lanes: modular.Lane, step: jax.Array) -> tuple[modular.Lane, None]:
    # The step is not mapped over lanes: rows are then pushed by a real branch, not computed and thrown away.
    return jax.vmap(train_step, in_axes=(0, None))(lanes, step)[0], None

  def one_row(lanes: modular.Lane, first: jax.Array) -> tuple[modular.Lane, dict[str, jax.Array]]:
    lanes, _ = jax.lax.scan(one_step, lanes, first + jnp.arange(settings.row_every, dtype=jnp.int32))
    report = sedjax.get_report(lanes.opt_state)
    return lanes, {name: getattr(report, name) for name in ROW_FIELDS}

  @functools.partial(jax.jit, donate_argnums=0)
  def interval(lanes: modular.Lane, start: jax.Array) -> tuple[modular.Lane, Any]:
    firsts = start + jnp.arange(0, settings.eval_every, settings.row_every, dtype=jnp.int32)
    lanes, rows = jax.lax.scan(one_row, lanes, firsts)
    train, test = jax.vmap(functools.partial(modular.evaluate, settings))(lanes)
    return lanes, {"train_accuracy": train, "test_accuracy": test, **rows}

  return interval


def first_grok(test_accuracy: np.ndarray) -> int | None:
  """Index of the first of three evaluations in a row at 98 % or more, or None."""
  reached = np.convolve(test_accuracy >= GROKKED, np.ones(IN_A_ROW, int), "valid") == IN_A_ROW
  return int(reached.argmax()) if reached.any() else None


def run_name(seed: int, decay: float) -> str:
  return f"seed {seed}" if decay else f"seed {seed}, no decay"


def newest_words(newest: dict[str, np.ndarray], run: int) -> list[str]:
  """Train and test accuracy, k*, gap ratio, null ratio and phase of one run, as they stand."""
  k_star, gap, null, phase = (newest[name][-1, run] for name in ("k_star", "gap_ratio", "null_ratio", "phase"))
  accuracies = [f"{newest[name][run]:.1%}" for name in ("train_accuracy", "test_accuracy")]
  return [*accuracies, f"{k_star}", f"{gap:.2f}", f"{null:.2f}", sedjax.Phase(phase).name]


def live_view(progress: Progress, runs: list[str], newest: dict[str, np.ndarray]) -> Group:
  """The progress bar over a table with a line for each run."""
  table = Table("run", "train", "test", "k*", "gap ratio", "null", "phase", box=rich.box.SIMPLE_HEAD)
  for i, run in enumerate(runs):
    table.add_row(run, *newest_words(newest, i))
  return Group(progress, table)


def train(settings: modular.Settings, lanes: list[tuple[int, float]], console: Console) -> xr.Dataset:
  """Trains a run for each (seed, weight decay), shows how it goes, and returns the record."""
  sketch = sedjax.sketch.count()
  tracker = sedjax.track_spectral_edge(WINDOW, every=settings.row_every, momentum=modular.MOMENTUM, sketch=sketch)
  seeds, decays = (np.asarray(values) for values in zip(*lanes, strict=True))
  runs = [run_name(*lane) for lane in lanes]
  began = time.perf_counter()
  state = jax.jit(jax.vmap(functools.partial(modular.init, settings, tracker)))(seeds, decays.astype(np.float32))
  interval = make_interval(settings, tracker).lower(state, np.int32(0)).compile()
  console.print(f"Compiled in {time.perf_counter() - began:.0f} s.")

  began = time.perf_counter()
  records: list[dict[str, np.ndarray]] = []
  progress = Progress(TextColumn("step"), MofNCompleteColumn(), BarColumn(), TimeElapsedColumn(), console=console)
  task = progress.add_task("", total=settings.max_steps)
  if not console.is_terminal:
    console.print("step | run: train accuracy, test accuracy, k*, gap ratio, null ratio, phase", soft_wrap=True)
  with Live(progress, console=console) if console.is_terminal else contextlib.nullcontext() as live:
    done = False
    while not done:
      try:
        state, newest = interval(state, np.int32(len(records) * settings.eval_every))
        newest = jax.device_get(newest)  # the only transfer from the device
      except KeyboardInterrupt:
        if not records:
          raise
        console.print(f"Interrupted: the record ends with step {len(records) * settings.eval_every}.")
        break
      records.append(newest)
      step = len(records) * settings.eval_every
      tests = np.stack([record["test_accuracy"] for record in records], 1)
      grokked = all(first_grok(test) is not None for test in tests[decays > 0])
      done = grokked or step >= settings.max_steps
      progress.update(task, completed=step)
      if live:
        live.update(live_view(progress, runs, newest))
      elif len(records) % 5 == 0 or done:  # no terminal: a plain line now and then
        words = [f"{run}: {', '.join(newest_words(newest, i))}" for i, run in enumerate(runs)]
        console.print(f"step {step} | {' | '.join(words)}", soft_wrap=True, highlight=False)
  seconds, step = time.perf_counter() - began, len(records) * settings.eval_every
  console.print(f"Trained {len(runs)} runs for {step} steps in {seconds:.0f} s: {1e3 * seconds / step:.0f} ms a step.")
  device = jax.devices()[0]
  return to_dataset(records, settings, lanes).assign_attrs(
    sketch=f"{type(sketch).__name__.lower()}, dim {sketch.dim}, seed {sketch.seed}",
    sketch_id=np.asarray(sketch.sketch_id),
    device=f"{device.platform} ({device.device_kind}), {os.cpu_count()} CPU cores",
    seconds=seconds,
  )


def to_dataset(
  records: list[dict[str, np.ndarray]], settings: modular.Settings, lanes: list[tuple[int, float]]
) -> xr.Dataset:
  """One labelled record of all intervals, with units and where it comes from."""

  def labelled(dims: Any, values: Any, units: str, long_name: str) -> tuple[Any, Any, dict[str, Any]]:
    return dims, values, {"units": units, "long_name": long_name}

  every, row_every = settings.eval_every, settings.row_every
  last = len(records) * every
  seeds, decays = zip(*lanes, strict=True)
  coordinates = {
    "run": ("run", [run_name(*lane) for lane in lanes], {"long_name": "run"}),
    "seed": labelled("run", list(seeds), "1", "seed of split, initialization and batches"),
    "weight_decay": labelled("run", list(decays), "1", "weight decay of AdamW"),
    "step": labelled("step", np.arange(every, last + 1, every), "steps", "steps done at the evaluation"),
    "row": labelled("row", np.arange(row_every, last + 1, row_every), "steps", "steps done at the row's end"),
    "index": labelled("index", np.arange(1, WINDOW + 1), "1", "place of the singular value"),
  }
  variables = {}
  for name in ("train_accuracy", "test_accuracy"):
    values = np.stack([record[name] for record in records], 1)
    variables[name] = labelled(("run", "step"), values, "1", name.replace("_", " "))
  for name, (units, long_name) in ROW_FIELDS.items():
    values = np.moveaxis(np.concatenate([record[name] for record in records]), 0, 1)
    variables[name] = labelled(("run", "row", "index")[: values.ndim], values, units, long_name)
  flags = {"flag_values": [int(phase) for phase in sedjax.Phase], "flag_meanings": " ".join(sedjax.Phase.__members__)}
  variables["phase"][2].update(flags)
  versions = {f"{module.__name__}_version": module.__version__ for module in (jax, optax, flax, sedjax)}
  tracker = {"window": WINDOW, "every": row_every, "momentum": modular.MOMENTUM, "source": "updates"}
  return xr.Dataset(variables, coordinates, {**dataclasses.asdict(settings), **tracker, **versions})


def grok_step(run: xr.Dataset) -> int | None:
  """The grok step of one run of the record, or None."""
  index = first_grok(run.test_accuracy.values)
  return None if index is None else int(run.step[index])


def phase_spans(rows: xr.Dataset) -> list[tuple[sedjax.Phase, int, int]]:
  """The phases that followed each other, with the first and the last step of each."""
  spans = []
  for phase, group in itertools.groupby(zip(rows.phase.values, rows.row.values, strict=True), key=lambda pair: pair[0]):
    steps = [int(step) for _, step in group]
    spans.append((sedjax.Phase(phase), steps[0], steps[-1]))
  return spans


def facts(run: xr.Dataset) -> dict[str, str]:
  """What happened in one run, and what the edge did until the grok step, or to the end, in words."""
  grok = grok_step(run)
  fitted = run.step.values[run.train_accuracy.values >= FITTED]
  until = run.sel(row=slice(None, grok))
  until = until.isel(row=until.k_star.values > 0)
  said = {
    f"train ≥ {FITTED:.0%}": f"step {fitted[0]}" if fitted.size else "never",
    "grok step": f"none by step {run.step[-1].item()}" if grok is None else f"step {grok}",
    "full windows": f"{until.sizes['row']}",
  }
  if not until.sizes["row"]:
    return said
  steps, gap, null = until.row.values, until.gap_ratio.values, until.null_ratio.values
  spans = phase_spans(until)
  edges = [first for phase, first, _ in spans if phase != sedjax.Phase.NO_EDGE]
  rises = [first for phase, first, _ in spans if phase == sedjax.Phase.RISE]
  peak = gap.argmax()
  places, counts = np.unique(until.k_star.values, return_counts=True)
  said |= {
    "first edge": f"step {edges[0]}" if edges else "none, always NO_EDGE",
    "phases": "\n".join(f"{phase.name} {first}–{last}" for phase, first, last in spans),
    "gap ratio > null": f"{(gap > null).mean():.0%} of windows",
    "peak (null), step": f"{gap[peak]:.2f} ({null[peak]:.2f}), {steps[peak]}",
    "last (null), step": f"{gap[-1]:.2f} ({null[-1]:.2f}), {steps[-1]}",
    "k*, frequency": f"{places[counts.argmax()]}, {counts.max() / steps.size:.0%}",
    "ambiguous k*": f"{until.edge_ambiguous.values.mean():.0%}",
  }
  if rises:
    said["test at last RISE"] = f"{run.test_accuracy.sel(step=rises[-1], method='bfill').item():.1%}, {rises[-1]}"
  return said


def fact_table(record: xr.Dataset) -> Table:
  """One column for each run."""
  told = [facts(record.isel(run=i)) for i in range(record.sizes["run"])]
  table = Table("until the grok", *record.run.values, box=rich.box.SIMPLE_HEAD, pad_edge=False)
  for name in dict.fromkeys(name for run in told for name in run):
    table.add_row(name, *(run.get(name, "–") for run in told))
  return table


def draw(record: xr.Dataset) -> Figure:
  """A column for each run: accuracy, singular values, gap ratio with its phases, and k*, over the steps."""
  runs = record.sizes["run"]
  figure = Figure((1.8 + 2.8 * runs, 8.4), layout="constrained")
  axes = figure.subplots(4, runs, sharex=True, sharey="row", squeeze=False, height_ratios=(3, 3, 3, 1.5))
  for i in range(runs):
    draw_run(axes[:, i], record.isel(run=i), record.attrs["every"])
  for axis, label in zip(axes[:, 0], ("accuracy", "singular value\n(parameter units)", "gap ratio", "k*"), strict=True):
    axis.set_ylabel(label)
  values, gaps, places = axes[1:, 0]
  values.set_yscale("log")
  gaps.set_yscale("log")
  top = max(2.0, 1.1 * record.gap_ratio.max().item())
  gaps.set_ylim(0.97, top)
  gaps.set_yticks([tick for tick in (1, 1.5, 2, 3, 5, 10, 20, 50, 100) if tick <= top])
  gaps.yaxis.set_major_formatter("{x:g}")
  gaps.yaxis.set_minor_locator(NullLocator())
  places.set_yticks(range(1, WINDOW // 2 + 1))
  places.set_ylim(0.4, WINDOW // 2 + 0.6)
  axes[0, 0].set_xlim(0, record.step.max().item() * 1.01)
  axes[0, 0].xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
  phases = [
    Patch(fc=color, ec="0.6", lw=0.5, label=phase.name.lower().replace("_", " "))
    for phase, color in PHASE_COLORS.items()
  ]
  for row in axes:
    named = {label: handle for axis in row for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    handles = [*named.values(), *phases] if row[0] is gaps else list(named.values())
    row[-1].legend(handles=handles, loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False, fontsize=8)
  span = record.attrs["window"] * record.attrs["every"]
  figure.supxlabel(f"step (a window is drawn at its end and looks back {span} steps)", fontsize=10)
  return figure


def draw_run(axes: Any, run: xr.Dataset, every: int) -> None:
  """One column of the figure."""
  accuracy, values, gaps, places = axes
  grok = grok_step(run)
  full = run.isel(row=run.k_star.values > 0)
  accuracy.set_title(f"{run.run.item()}\n{'did not grok' if grok is None else f'grok step {grok}'}", fontsize=10)
  accuracy.plot(run.step, run.train_accuracy, color=ORANGE, ls=(0, (4, 1.5)), label="train")
  accuracy.plot(run.step, run.test_accuracy, color=BLUE, label="test")
  for k in range(1, WINDOW + 1):
    color = colormaps["cividis"](0.9 * (k - 1) / (WINDOW - 1))
    label = f"$σ_{{{k}}}$" if k in (1, 2, 3, WINDOW) else None
    values.plot(full.row, full.singular_values.sel(index=k), color=color, lw=1, label=label)
  for phase, first, last in phase_spans(full):
    gaps.axvspan(first - every / 2, last + every / 2, color=PHASE_COLORS[phase], lw=0)
  gaps.plot(full.row, full.gap_ratio, color="black", lw=1.2, label="gap ratio")
  gaps.plot(full.row, full.null_ratio, color="black", lw=1, ls=":", label="null")
  for label, face in (("clear", BLUE), ("ambiguous", "white")):
    some = full.isel(row=full.edge_ambiguous.values == (label == "ambiguous"))
    places.plot(some.row, some.k_star, "o", ms=3, mew=0.6, color=BLUE, mfc=face, label=label)
  for axis in axes:
    axis.spines[["top", "right"]].set_visible(False)
    if grok is not None:
      axis.axvline(grok, color="black", lw=1, ls=(0, (7, 3)), label="grok step" if axis is accuracy else None)


def parse(argv: list[str]) -> argparse.Namespace:
  """The arguments; a bad one ends the program with one sentence and exit code 2."""
  parser = argparse.ArgumentParser(description="Watches the spectral edge while a transformer groks addition mod 97.")
  parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS), help="default: %(default)s")
  parser.add_argument("--controls", action="store_true", help="add the same seeds without weight decay")
  parser.add_argument("--steps", type=int, help="steps at most; the run ends earlier when all seeds have grokked")
  parser.add_argument("--out", type=Path, default=Path("out/grokking"), help="folder for the results (%(default)s)")
  kind = parser.add_mutually_exclusive_group()
  kind.add_argument("--paper", action="store_true", help="the companion papers' settings: 50 %% split, 200,000 steps")
  kind.add_argument("--smoke", action="store_true", help="a few steps, to see that everything works; does not grok")
  args = parser.parse_args(argv)
  settings = modular.PAPER if args.paper else SMOKE if args.smoke else DEFAULT
  if args.steps is not None:
    settings = dataclasses.replace(settings, max_steps=args.steps)
  args.settings = settings
  if settings.max_steps <= 0 or settings.max_steps % settings.eval_every:
    parser.error(f"--steps must be a positive multiple of {settings.eval_every}, the steps between evaluations.")
  if len(set(args.seeds)) < len(args.seeds) or not all(0 <= seed < 2**31 for seed in args.seeds):
    parser.error(f"--seeds must be different integers in 0…{2**31 - 1}, got {args.seeds}.")
  try:
    args.out.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    parser.error(f"--out: cannot make the folder {args.out}: {error.strerror}.")
  return args


def main(argv: list[str]) -> None:
  args = parse(argv)
  settings, console = args.settings, Console()
  kind = "the companion papers' settings" if args.paper else "settings that grok sooner than the companion papers' do"
  kind = "a smoke test, too short to grok" if args.smoke else kind
  console.print(
    f"Addition mod 97, {kind}: {settings.train_fraction:.0%} of the pairs for training, batches of "
    f"{settings.batch_size}, learning rate {settings.learning_rate:g}, at most {settings.max_steps} steps. "
    f"A window has {WINDOW} rows of {settings.row_every} steps.",
    soft_wrap=True,
  )
  lanes = [(seed, decay) for decay in ([1.0, 0.0] if args.controls else [1.0]) for seed in args.seeds]
  record = train(settings, lanes, console)
  record.attrs["command"] = shlex.join(["python", "examples/grokking.py", *argv])
  file, picture = args.out / "grokking.nc", args.out / "grokking.png"
  record.to_netcdf(file, engine="h5netcdf")
  record = xr.load_dataset(file, engine="h5netcdf")  # what follows needs only the file
  draw(record).savefig(picture, dpi=150)
  for first in range(0, len(lanes), 3):  # three runs side by side fit into 80 columns
    console.print(fact_table(record.isel(run=slice(first, first + 3))))
  console.print(f"Wrote {file} and {picture}.", soft_wrap=True)


if __name__ == "__main__":
  main(sys.argv[1:])
