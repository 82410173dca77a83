"""Where a `sedjax.record.Recorder` sends its scalars as well: TensorBoard, Weights & Biases, JSON lines.

A sink is called in the recorder's writer thread, as `sink(step, scalars)`. Names are `sedjax/gap_ratio` and the like,
followed by the group, the window and the seed where there are several (`sedjax/gap_ratio/head/w10/seed_0`), and
those of the user's series. Any function of these two arguments is a sink, too.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

__all__ = ["JSONL", "TensorBoard", "WandB"]


class TensorBoard:
  """Writes scalars for TensorBoard, through tensorboardX (extra `tensorboard`).

  Args:
    folder: where TensorBoard is to look.

  Raises:
    ImportError: tensorboardX is not installed.

  Example:
    >>> sink = TensorBoard("out/board")  # doctest: +SKIP
    >>> recorder = sedjax.record.Recorder("run.nc", sinks=[sink])  # doctest: +SKIP
  """

  def __init__(self, folder: str | Path):
    try:
      from tensorboardX import SummaryWriter  # pyright: ignore[reportMissingImports]
    except ImportError as error:
      raise ImportError("sedjax.sinks.TensorBoard needs tensorboardX: pip install 'sedjax[tensorboard]'.") from error
    self._writer: Any = SummaryWriter(str(folder))

  def __call__(self, step: int, scalars: dict[str, float]) -> None:
    for name, value in scalars.items():
      if math.isfinite(value):  # else the client prints a line for each value, and draws none
        self._writer.add_scalar(name, value, step)

  def close(self) -> None:
    self._writer.close()


class WandB:
  """Logs scalars to a run of Weights & Biases (extra `wandb`), online or offline.

  They come some steps late, so they have an x axis of their own, `sedjax/step`. Log your own values to that run
  without `step=`, or through the recorder: the client drops what comes with a smaller step than it has seen.

  Args:
    run: what `wandb.init(...)` returned. Finishing it is yours.

  Raises:
    ImportError: wandb is not installed.
    TypeError: `run` is no run.

  Example:
    >>> run = wandb.init(project="edges", mode="offline")  # doctest: +SKIP
    >>> recorder = sedjax.record.Recorder("run.nc", sinks=[WandB(run)])  # doctest: +SKIP
  """

  def __init__(self, run: Any):
    try:
      import wandb  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError as error:
      raise ImportError("sedjax.sinks.WandB needs wandb: pip install 'sedjax[wandb]'.") from error
    if not (hasattr(run, "log") and hasattr(run, "define_metric")):
      raise TypeError(f"sedjax.sinks.WandB: run must be what wandb.init returned, got {type(run).__name__}.")
    self._run, self._known = run, set[str]()
    run.define_metric("sedjax/step", hidden=True)

  def __call__(self, step: int, scalars: dict[str, float]) -> None:
    for name in scalars.keys() - self._known:
      self._run.define_metric(name, step_metric="sedjax/step")
      self._known.add(name)
    self._run.log({"sedjax/step": step, **scalars})


class JSONL:
  """Appends a line of JSON for each step: {"step": 10, "sedjax/gap_ratio": 1.5, …}; NaN and infinity become null.

  Args:
    path: of the file; what it holds is kept.

  Raises:
    OSError: the file cannot be opened.

  Example:
    >>> import tempfile
    >>> path = tempfile.mkdtemp() + "/run.jsonl"
    >>> sink = JSONL(path)
    >>> sink(10, {"loss": 0.5})
    >>> sink.close()
    >>> open(path).read()
    '{"step": 10, "loss": 0.5}\\n'
  """

  def __init__(self, path: str | Path):
    self._file = open(path, "a", encoding="utf-8")
    if end := self._file.tell():  # a line that a kill cut off ends here
      with open(path, "rb") as file:
        file.seek(end - 1)
        if file.read() != b"\n":
          self._file.write("\n")

  def __call__(self, step: int, scalars: dict[str, float]) -> None:
    plain = {name: value if math.isfinite(value) else None for name, value in scalars.items()}
    self._file.write(json.dumps({"step": step, **plain}) + "\n")
    self._file.flush()

  def close(self) -> None:
    self._file.close()
