"""What a stored result says of itself: command, commit, date, device and versions."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import jax
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
SMOKE = ROOT / "out" / "benchmarks"  # of smoke runs, which are not kept
_MADE_PAGES = ("README.md", "benchmarks/RESULTS.md")
_PACKAGES = ("jax", "jaxlib", "optax", "flax", "numpy", "sedjax", "scikit-learn", "traker", "torch")


def _git(*arguments: str) -> str | None:
  done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
  return done.stdout.strip() if done.returncode == 0 else None


def begin() -> dict[str, Any]:
  """Date, commit, and whether files differ from it (results and what is made of them aside), as a program starts."""
  changed = _git("status", "--porcelain", "--", ".", ":!benchmarks/results", *(f":!{page}" for page in _MADE_PAGES))
  return {
    "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    "commit": _git("rev-parse", "HEAD"),
    "dirty": None if changed is None else bool(changed),
  }


def made_by(program: str, argv: list[str], begun: dict[str, Any]) -> dict[str, Any]:
  """What made a result; from here on this process holds JAX's device."""
  return {
    "command": shlex.join(["python", f"benchmarks/{program}", *argv]),
    **begun,
    "device": _device(),
    "versions": _versions(),
  }


def _cpu_model() -> str | None:
  file = Path("/proc/cpuinfo")
  found = re.search(r"^model name\s*:\s*(.+)$", file.read_text(), re.M) if file.exists() else None
  return found[1].strip() if found else platform.processor() or None


def _device() -> dict[str, Any]:
  device = jax.devices()[0]
  return {
    "platform": device.platform,
    "kind": device.device_kind,
    "count": jax.device_count(),
    "cpu": _cpu_model(),
    "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
  }


def device_name(facts: dict[str, Any]) -> str:
  """Of a device, for the name of a file: lower-case letters, digits and dashes."""
  name = facts["kind"] if facts["platform"] != "cpu" else f"cpu {re.sub('[(](R|TM)[)]', '', facts['cpu'] or '')}"
  return re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")


def _versions() -> dict[str, str]:
  found = {"python": platform.python_version()}
  for name in _PACKAGES:
    try:
      found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      continue
  return found


def plain(value: Any) -> Any:
  """NumPy's numbers as Python's, for JSON."""
  return value.item() if isinstance(value, np.generic) else str(value)
