"""Watches the spectral edge while a small transformer groks addition modulo 97.

    python examples/grokking.py

Three seeds train at once under `jax.vmap` until each has grokked: three evaluations in a row with a test accuracy of
98 % or more. The *grok step* is the first of the three. Everything is measured inside the jitted step; what leaves the
device is one small tree of arrays for each evaluation. At the end there are, in `out/grokking`,

  grokking.nc    the record, as `sedjax.record` has it: `sedjax report out/grokking/grokking.nc` makes a page of it
  grokking.png   the figure, drawn from that file

and a table of what happened, and of what the edge did until the grok step. The table states facts of these runs; it
does not test whether the edge predicts anything.

The null is noise with AdamW's momentum; a steady motion, such as the shrinking by weight decay, is no noise and counts
as an edge. Put the tracker before the decay in the chain to leave that motion out.

The default is meant to grok sooner than the companion papers' settings do: 60 % of the pairs for training, batches of
384. It takes about 2,600 steps, four or five minutes on two CPU cores. `--paper` takes their settings to the letter:
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
import operator
import os
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import flax
import jax
import modular
import numpy as np
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
from sedjax import record

console = Console()
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


def first_grok(test_accuracy: np.ndarray) -> int | None:
  """Index of the first of three evaluations in a row at 98 % or more, or None."""
  reached = np.convolve(test_accuracy >= GROKKED, np.ones(IN_A_ROW, int), "valid") == IN_A_ROW
  return int(reached.argmax()) if reached.any() else None


def run_name(seed: int, decay: float) -> str:
  return f"{seed}" if decay else f"{seed}, no decay"


def newest_words(news: Any, run: int) -> list[str]:
  """Train and test accuracy, k*, gap ratio, null ratio and phase of one run, as they stand."""
  reports, *accuracies = news
  newest = jax.tree.map(lambda x: x[-1, run, 0, 0], reports)
  edge = [f"{newest.k_star}", f"{newest.gap_ratio:.2f}", f"{newest.null_ratio:.2f}", sedjax.Phase(newest.phase).name]
  return [*(f"{accuracy[run]:.1%}" for accuracy in accuracies), *edge]


def live_view(progress: Progress, names: list[str], news: Any) -> Group:
  """The progress bar over a table with a line for each run."""
  table = Table("seed", "train", "test", "k*", "gap ratio", "null", "phase", box=rich.box.SIMPLE_HEAD)
  for i, name in enumerate(names):
    table.add_row(name, *newest_words(news, i))
  return Group(progress, table)


def train(settings: modular.Settings, lanes: list[tuple[int, float]], file: Path, command: str) -> None:
  """Trains a run for each (seed, weight decay), shows how it goes, and writes the record."""
  options = {"window": WINDOW, "every": settings.row_every, "momentum": modular.MOMENTUM}
  tracker = sedjax.track_spectral_edge(**options)
  seeds, decays = (np.asarray(values) for values in zip(*lanes, strict=True))
  names = [run_name(*lane) for lane in lanes]
  began = time.perf_counter()
  state = jax.jit(jax.vmap(functools.partial(modular.init, settings, tracker)))(seeds, decays.astype(np.float32))
  interval = modular.make_interval(settings, tracker).lower(state, np.int32(0)).compile()
  console.print(f"Compiled in {time.perf_counter() - began:.0f} s.")

  for old in (file, file.with_name(f"{file.name}.journal")):  # a record that exists would be continued
    old.unlink(missing_ok=True)
  device = jax.devices()[0]
  attrs = {
    **dataclasses.asdict(settings),
    "weight_decay": decays.tolist(),
    "command": command,
    "flax_version": flax.__version__,
    "device": f"{device.platform} ({device.device_kind}), {os.cpu_count()} CPU cores",
  }
  recorder = record.Recorder(file, tracker=options, seeds=names, attrs=attrs)
  began, step = time.perf_counter(), 0
  tests: list[np.ndarray] = []
  progress = Progress(TextColumn("step"), MofNCompleteColumn(), BarColumn(), TimeElapsedColumn(), console=console)
  task = progress.add_task("", total=settings.max_steps)
  if not console.is_terminal:
    console.print("step | seed: train accuracy, test accuracy, k*, gap ratio, null ratio, phase", soft_wrap=True)
  with recorder, Live(progress, console=console) if console.is_terminal else contextlib.nullcontext() as live:
    done = False
    while not done:
      try:
        state, news = interval(state, np.int32(step))
        reports, trained, tested = jax.device_get(news)  # the only transfer from the device
      except KeyboardInterrupt:
        if not tests:
          raise
        console.print(f"Interrupted: the record ends with step {step}.")
        break
      for row in range(settings.eval_every // settings.row_every):
        newest = jax.tree.map(operator.itemgetter(row), reports)
        recorder.append(step + (row + 1) * settings.row_every, newest)
      step += settings.eval_every
      recorder.log(step, train_accuracy=trained, test_accuracy=tested)
      tests.append(tested)
      grokked = all(first_grok(test) is not None for test in np.stack(tests, 1)[decays > 0])
      done = grokked or step >= settings.max_steps
      progress.update(task, completed=step)
      if live:
        live.update(live_view(progress, names, (reports, trained, tested)))
      elif len(tests) % 5 == 0 or done:  # no terminal: a plain line now and then
        words = [f"{name}: {', '.join(newest_words((reports, trained, tested), i))}" for i, name in enumerate(names)]
        console.print(f"step {step} | {' | '.join(words)}", soft_wrap=True, highlight=False)
  seconds = time.perf_counter() - began
  console.print(f"Trained {len(names)} runs for {step} steps in {seconds:.0f} s: {1e3 * seconds / step:.0f} ms a step.")


def runs_of(file: Path) -> list[xr.Dataset]:
  """The record's runs, one window and group each."""
  with record.open_record(file) as whole:
    loaded = whole.isel(window=0, group=0).load()
  return [loaded.isel(seed=i) for i in range(loaded.sizes["seed"])]


def grok_step(run: xr.Dataset) -> int | None:
  """The grok step of one run of the record, or None."""
  index = first_grok(run.test_accuracy.values)
  return None if index is None else int(run.test_accuracy_step[index])


def phase_spans(run: xr.Dataset) -> list[tuple[sedjax.Phase, int, int]]:
  """The phases that followed each other, with the first and the last step of each."""
  spans = []
  for phase, group in itertools.groupby(zip(run.phase.values, run.step.values, strict=True), key=lambda pair: pair[0]):
    steps = [int(step) for _, step in group]
    spans.append((sedjax.Phase(phase), steps[0], steps[-1]))
  return spans


def facts(run: xr.Dataset) -> dict[str, str]:
  """What happened in one run, and what the edge did until the grok step, or to the end, in words."""
  grok = grok_step(run)
  fitted = run.train_accuracy_step.values[run.train_accuracy.values >= FITTED]
  until = run.sel(step=slice(None, grok))
  until = until.isel(step=until.k_star.values > 0)
  said = {
    f"train ≥ {FITTED:.0%}": f"step {fitted[0]}" if fitted.size else "never",
    "grok step": f"none by step {run.step[-1].item()}" if grok is None else f"step {grok}",
    "full windows": f"{until.sizes['step']}",
  }
  if not until.sizes["step"]:
    return said
  steps, gap, null = until.step.values, until.gap_ratio.values, until.null_ratio.values
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
    tested = run.test_accuracy.sel(test_accuracy_step=rises[-1], method="bfill")
    said["test at last RISE"] = f"{tested.item():.1%}, {rises[-1]}"
  return said


def fact_table(runs: list[xr.Dataset]) -> Table:
  """One column for each run."""
  told = [facts(run) for run in runs]
  names = [f"seed {run.seed.item()}" for run in runs]
  table = Table("until the grok", *names, box=rich.box.SIMPLE_HEAD, pad_edge=False)
  for name in dict.fromkeys(name for run in told for name in run):
    table.add_row(name, *(run.get(name, "–") for run in told))
  return table


def draw(runs: list[xr.Dataset]) -> Figure:
  """A column for each run: accuracy, singular values, gap ratio with its phases, and k*, over the steps."""
  every = int(runs[0].attrs["every"])
  figure = Figure((1.8 + 2.8 * len(runs), 8.4), layout="constrained")
  axes = figure.subplots(4, len(runs), sharex=True, sharey="row", squeeze=False, height_ratios=(3, 3, 3, 1.5))
  for column, run in zip(axes.T, runs, strict=True):
    draw_run(column, run, every)
  for axis, label in zip(axes[:, 0], ("accuracy", "singular value\n(parameter units)", "gap ratio", "k*"), strict=True):
    axis.set_ylabel(label)
  values, gaps, places = axes[1:, 0]
  values.set_yscale("log")
  gaps.set_yscale("log")
  top = max(2.0, *(1.1 * run.gap_ratio.max().item() for run in runs))
  gaps.set_ylim(0.97, top)
  gaps.set_yticks([tick for tick in (1, 1.5, 2, 3, 5, 10, 20, 50, 100) if tick <= top])
  gaps.yaxis.set_major_formatter("{x:g}")
  gaps.yaxis.set_minor_locator(NullLocator())
  places.set_yticks(range(1, WINDOW // 2 + 1))
  places.set_ylim(0.4, WINDOW // 2 + 0.6)
  axes[0, 0].set_xlim(0, runs[0].step[-1].item() * 1.01)
  axes[0, 0].xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
  phases = [
    Patch(fc=color, ec="0.6", lw=0.5, label=phase.name.lower().replace("_", " "))
    for phase, color in PHASE_COLORS.items()
  ]
  for row in axes:
    named = {label: handle for axis in row for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    handles = [*named.values(), *phases] if row[0] is gaps else list(named.values())
    row[-1].legend(handles=handles, loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False, fontsize=8)
  figure.supxlabel(f"step (a window is drawn at its end and looks back {WINDOW * every} steps)", fontsize=10)
  return figure


def draw_run(axes: Any, run: xr.Dataset, every: int) -> None:
  """One column of the figure."""
  accuracy, values, gaps, places = axes
  grok = grok_step(run)
  full = run.isel(step=run.k_star.values > 0)
  accuracy.set_title(f"seed {run.seed.item()}\n{'did not grok' if grok is None else f'grok step {grok}'}", fontsize=10)
  accuracy.plot(run.train_accuracy_step, run.train_accuracy, color=ORANGE, ls=(0, (4, 1.5)), label="train")
  accuracy.plot(run.test_accuracy_step, run.test_accuracy, color=BLUE, label="test")
  for k in range(1, WINDOW + 1):
    color = colormaps["cividis"](0.9 * (k - 1) / (WINDOW - 1))
    label = f"$σ_{{{k}}}$" if k in (1, 2, 3, WINDOW) else None
    values.plot(full.step, full.singular_values.sel(index=k), color=color, lw=1, label=label)
  for phase, first, last in phase_spans(full):
    gaps.axvspan(first - every / 2, last + every / 2, color=PHASE_COLORS[phase], lw=0)
  gaps.plot(full.step, full.gap_ratio, color="black", lw=1.2, label="gap ratio")
  gaps.plot(full.step, full.null_ratio, color="black", lw=1, ls=":", label="null")
  for label, face in (("clear", BLUE), ("ambiguous", "white")):
    some = full.isel(step=full.edge_ambiguous.values == (label == "ambiguous"))
    places.plot(some.step, some.k_star, "o", ms=3, mew=0.6, color=BLUE, mfc=face, label=label)
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
  settings = args.settings
  kind = "the companion papers' settings" if args.paper else "settings that grok sooner than the companion papers' do"
  kind = "a smoke test, too short to grok" if args.smoke else kind
  console.print(
    f"Addition mod 97, {kind}: {settings.train_fraction:.0%} of the pairs for training, batches of "
    f"{settings.batch_size}, learning rate {settings.learning_rate:g}, at most {settings.max_steps} steps. "
    f"A window has {WINDOW} rows of {settings.row_every} steps.",
    soft_wrap=True,
  )
  lanes = [(seed, decay) for decay in ([1.0, 0.0] if args.controls else [1.0]) for seed in args.seeds]
  file, picture = args.out / "grokking.nc", args.out / "grokking.png"
  train(settings, lanes, file, shlex.join(["python", "examples/grokking.py", *argv]))
  runs = runs_of(file)  # what follows needs only the file
  draw(runs).savefig(picture, dpi=150)
  for first in range(0, len(runs), 3):  # three runs side by side fit into 80 columns
    console.print(fact_table(runs[first : first + 3]))
  console.print(f"Wrote {file} and {picture}.", soft_wrap=True)


if __name__ == "__main__":
  main(sys.argv[1:])
