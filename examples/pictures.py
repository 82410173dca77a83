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
import operator
import sys
from pathlib import Path
from typing import Any

import flax
import jax
import jax.numpy as jnp
import modular
import numpy as np
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


def train(settings: modular.Settings, file: Path) -> None:
  """Trains all seeds at once and writes the record."""
  options: dict[str, Any] = {
    "window": WINDOWS,
    "every": settings.row_every,
    "momentum": modular.MOMENTUM,
    "groups": group_of,
  }
  tracker = sedjax.track_spectral_edge(**options)
  interval = modular.make_interval(settings, tracker)
  lanes = jax.jit(jax.vmap(functools.partial(modular.init, settings, tracker)))(
    jnp.asarray(SEEDS), jnp.ones(len(SEEDS))
  )
  device = jax.devices()[0]
  attrs = {"device": f"{device.platform} ({device.device_kind})", "flax_version": flax.__version__}
  names = [record.WHOLE, *dict.fromkeys(map(group_of, paths_of(lanes.params)))]
  for old in (file, file.with_name(f"{file.name}.journal")):  # a record that exists would be continued
    old.unlink(missing_ok=True)
  recorder = record.Recorder(file, tracker=options, groups=names, seeds=SEEDS, attrs=attrs)
  with recorder:
    for start in range(0, settings.max_steps, settings.eval_every):
      lanes, news = interval(lanes, np.int32(start))
      reports, trained, tested = jax.device_get(news)
      for row in range(settings.eval_every // settings.row_every):
        newest = jax.tree.map(operator.itemgetter(row), reports)
        recorder.append(start + (row + 1) * settings.row_every, newest)
      recorder.log(start + settings.eval_every, train_accuracy=trained, test_accuracy=tested)
      if start % (10 * settings.eval_every) == 0:
        print(f"step {start + settings.eval_every}: test accuracy {tested.round(3).tolist()}", flush=True)


def paths_of(params: Any) -> list[str]:
  """Paths of one run's leaves, in the tree's order."""
  return ["/".join(str(key.key) for key in keys) for keys, _ in jax.tree_util.tree_leaves_with_path(params)]


def main(argv: list[str]) -> None:
  parser = argparse.ArgumentParser(description="Makes the README's pictures of a record, and a report.")
  parser.add_argument("--out", type=Path, default=Path("out/pictures"), help="folder for the results (%(default)s)")
  parser.add_argument("--smoke", action="store_true", help="a few steps, to see that everything works")
  args = parser.parse_args(argv)
  args.out.mkdir(parents=True, exist_ok=True)
  train(SMOKE if args.smoke else SETTINGS, args.out / "run.nc")
  # What follows needs only the file.
  with record.open_record(args.out / "run.nc") as made:
    for name, (draw, height) in PICTURES.items():
      figure = Figure((7.6, height), layout="constrained")
      draw(made, ax=figure.subplots(), window=10)
      figure.savefig(args.out / f"{name}.png", dpi=110)
  sedjax.__main__.main(["report", str(args.out / "run.nc"), "-o", str(args.out / "report.html"), "--window", "10"])


if __name__ == "__main__":
  main(sys.argv[1:])
