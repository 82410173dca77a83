"""The examples run as a user runs them."""

import pathlib
import subprocess
import sys

import pytest
import xarray as xr

ROOT = pathlib.Path(__file__).parents[1]


def run(*args, **kwargs):
  command = [sys.executable, *map(str, args)]
  return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False, **kwargs)


def test_grokking_smoke(tmp_path):
  """A short run ends with a record that reads back, a figure and a table."""
  done = run("examples/grokking.py", "--smoke", "--controls", "--seeds", 1, "--out", tmp_path)
  assert done.returncode == 0, done.stderr
  assert "too short to grok" in done.stdout
  assert "grok step" in done.stdout
  assert (tmp_path / "grokking.png").read_bytes().startswith(b"\x89PNG")
  record = xr.load_dataset(tmp_path / "grokking.nc", engine="h5netcdf")
  assert dict(record.sizes) == {"run": 2, "step": 2, "row": 12, "index": 10}
  assert record.weight_decay.values.tolist() == [1.0, 0.0]
  assert record.k_star.values[:, :9].max() == 0
  assert record.k_star.values[:, 9:].min() >= 1
  assert {"units", "long_name"} <= set(record.singular_values.attrs)
  assert {"sketch_id", "window", "every", "command", "device", "sedjax_version"} <= set(record.attrs)


@pytest.mark.parametrize(
  ("args", "words"),
  [
    (["--steps", "70"], "--steps must be a positive multiple of 50"),
    (["--seeds", "1", "1"], "--seeds must be different integers"),
    (["--paper", "--smoke"], "not allowed with"),
  ],
)
def test_grokking_refuses(args, words):
  done = run("examples/grokking.py", *args)
  assert done.returncode == 2
  assert words in done.stderr


@pytest.mark.slow
def test_pictures_smoke(tmp_path):
  """A short run ends with a record, the README's pictures and a page."""
  done = run("examples/pictures.py", "--smoke", "--out", tmp_path)
  assert done.returncode == 0, done.stderr
  for name in ("gap-ratio", "ratios", "groups"):
    assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
  assert "What happened in run.nc" in (tmp_path / "report.html").read_text()
  record = xr.load_dataset(tmp_path / "run.nc", engine="h5netcdf")
  assert record.sizes["seed"] == 2
