"""Makes the README's pictures of a record, and a report, from a real run.

    python examples/pictures.py

Two seeds of the transformer in `modular.py` grok addition modulo 97; the tracker watches the whole model, its blocks
and its embeddings over three windows. In `out/pictures` there are then run.nc (the record, with the accuracies as
series), the pictures that the README shows, and report.html. Takes some minutes on two CPU cores; `--smoke` takes a few
steps only.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import shlex
import sys
from pathlib import Path
from typing import Any

import flax
import jax
import jax.numpy as jnp
import modular
import numpy as np
import optax
import xarray as xr
from matplotlib.figure import Figure

import sedjax
import sedjax.__main__
from sedjax import plot, record

SEEDS = (42, 137)
WINDOWS = (5, 10, 20)
SETTINGS = modular.Settings(0.6, 384, 1e-3, max_steps=2600, eval_every=50, row_every=10)
SMOKE = dataclasses.replace(SETTINGS, batch_size=64, max_steps=200)
# README's name of a picture, what draws it, and how high it is in inches.
PICTURES = {"gap-ratio": (plot.gap_ratio, 3.3), "ratios": (plot.ratios, 3.3), "groups": (plot.groups, 2.9)}


def group_of(path: str) -> str:
  """The blocks and the embeddings by name; what stands after the last block is the head."""
  first = path.split("/")[0]
  return {"tokens": "embeddings", "positions": "embeddings"}.get(first, first if "Block" in first else "head")


def train(settings: modular.Settings, console: Any = print) -> xr.Dataset:
  """Trains all seeds at once and returns the record."""
  sketch = sedjax.sketch.count()
  tracker = sedjax.track_spectral_edge(
    WINDOWS, every=settings.row_every, momentum=modular.MOMENTUM, groups=group_of, sketch=sketch
  )
  train_step = functools.partial(modular.train_step, settings, tracker)

  def one_step(lanes: Any, step: jax.Array) -> tuple[Any, None]:
    return jax.vmap(train_step, in_axes=(0, None))(lanes, step)[0], None

  def one_row(lanes: Any, first: jax.Array) -> tuple[Any, sedjax.Report]:
    lanes, _ = jax.lax.scan(one_step, lanes, first + jnp.arange(settings.row_every, dtype=jnp.int32))
    return lanes, sedjax.get_reports(lanes.opt_state)

  @functools.partial(jax.jit, donate_argnums=0)
  def interval(lanes: Any, start: jax.Array) -> tuple[Any, Any]:
    firsts = start + jnp.arange(0, settings.eval_every, settings.row_every, dtype=jnp.int32)
    lanes, reports = jax.lax.scan(one_row, lanes, firsts)
    return lanes, (reports, *jax.vmap(functools.partial(modular.evaluate, settings))(lanes))

  lanes = jax.jit(jax.vmap(functools.partial(modular.init, settings, tracker)))(
    jnp.asarray(SEEDS), jnp.ones(len(SEEDS))
  )
  told = []
  for start in range(0, settings.max_steps, settings.eval_every):
    lanes, news = interval(lanes, np.int32(start))
    told.append(jax.device_get(news))
    if start % (10 * settings.eval_every) == 0:
      console(f"step {start + settings.eval_every}: test accuracy {told[-1][2].round(3).tolist()}", flush=True)
  reports, trained, tested = jax.tree.map(lambda *parts: np.stack(parts), *told)
  reports = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), reports)
  names = [record.WHOLE, *dict.fromkeys(map(group_of, paths_of(lanes.params)))]
  device = jax.devices()[0]
  made = record.to_dataset(
    reports,
    steps=np.arange(settings.row_every, settings.max_steps + 1, settings.row_every),
    windows=WINDOWS,
    groups=names,
    seeds=SEEDS,
    attrs={
      "sketch": f"{type(sketch).__name__.lower()}, dim {sketch.dim}, seed {sketch.seed}",
      "every": settings.row_every,
      "source": "updates",
      "momentum": modular.MOMENTUM,
      "windows": list(WINDOWS),
      "device": f"{device.platform} ({device.device_kind})",
      "command": shlex.join(["python", "examples/pictures.py", *sys.argv[1:]]),
      **{f"{module.__name__}_version": module.__version__ for module in (jax, optax, flax, sedjax)},
    },
  )
  steps = np.arange(settings.eval_every, settings.max_steps + 1, settings.eval_every)
  for name, values in (("test_accuracy", tested), ("train_accuracy", trained)):
    attrs = {"long_name": name.replace("_", " "), "units": "1"}
    made = made.assign({name: ((f"{name}_step", "seed"), values, attrs)}).assign_coords({f"{name}_step": steps})
  return made


def paths_of(params: Any) -> list[str]:
  """Paths of one run's leaves, in the tree's order."""
  return ["/".join(str(key.key) for key in keys) for keys, _ in jax.tree_util.tree_leaves_with_path(params)]


def main(argv: list[str]) -> None:
  parser = argparse.ArgumentParser(description="Makes the README's pictures of a record, and a report.")
  parser.add_argument("--out", type=Path, default=Path("out/pictures"), help="folder for the results (%(default)s)")
  parser.add_argument("--smoke", action="store_true", help="a few steps, to see that everything works")
  args = parser.parse_args(argv)
  args.out.mkdir(parents=True, exist_ok=True)
  train(SMOKE if args.smoke else SETTINGS).to_netcdf(args.out / "run.nc", engine="h5netcdf")
  # What follows needs only the file.
  with xr.open_dataset(args.out / "run.nc", engine="h5netcdf") as made:
    for name, (draw, height) in PICTURES.items():
      figure = Figure((7.6, height), layout="constrained")
      draw(made, ax=figure.subplots(), window=10)
      figure.savefig(args.out / f"{name}.png", dpi=110)
  sedjax.__main__.main(["report", str(args.out / "run.nc"), "-o", str(args.out / "report.html"), "--window", "10"])


if __name__ == "__main__":
  main(sys.argv[1:])
