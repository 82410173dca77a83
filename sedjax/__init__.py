"""sedjax: spectral edge dynamics of training trajectories, measured inside the jitted step."""

from sedjax import core as core
from sedjax import sketch as sketch
from sedjax._cost import Cost as Cost
from sedjax._cost import check_cost as check_cost
from sedjax._migrate import migrate as migrate
from sedjax._transform import SpectralEdgeState as SpectralEdgeState
from sedjax._transform import get_history as get_history
from sedjax._transform import get_report as get_report
from sedjax._transform import get_reports as get_reports
from sedjax._transform import track_spectral_edge as track_spectral_edge
from sedjax._types import Phase as Phase
from sedjax._types import Report as Report
from sedjax._types import Status as Status
from sedjax._types import explain as explain

__version__ = "0.1.0"
__all__ = [
  "Cost",
  "Phase",
  "Report",
  "SpectralEdgeState",
  "Status",
  "check_cost",
  "core",
  "explain",
  "get_history",
  "get_report",
  "get_reports",
  "migrate",
  "sketch",
  "track_spectral_edge",
]
