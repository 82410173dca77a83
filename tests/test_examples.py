"""The examples run as a user runs them."""

import pathlib
import subprocess
import sys

import pytest

from sedjax.record import open_record

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
  with open_record(tmp_path / "grokking.nc") as record:
    assert {name: record.sizes[name] for name in ("seed", "step", "test_accuracy_step")} == {
      "seed": 2,
      "step": 12,
      "test_accuracy_step": 2,
    }
    assert record.weight_decay.tolist() == [1.0, 0.0]
    k_star = record.k_star.values[..., 0, 0]
    assert k_star[:9].max() == 0
    assert k_star[9:].min() >= 1
    assert {"sketch_id", "every", "command", "device", "sedjax_version"} <= set(record.attrs)
  done = run("-m", "sedjax", "report", tmp_path / "grokking.nc", "-o", tmp_path / "report.html")
  assert done.returncode == 0, done.stderr
  assert "What happened in grokking.nc" in (tmp_path / "report.html").read_text()


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
  with open_record(tmp_path / "run.nc") as record:
    assert record.sizes["seed"] == 2
    assert record.test_accuracy.sizes["test_accuracy_step"] == 4
