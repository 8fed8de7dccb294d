"""What a run leaves on disk: run folder, checkpoints, metrics; whole after a kill or a crash."""

from fedpeft.record.checkpoint import Checkpoint, latest, save
from fedpeft.record.folder import RunFolder
from fedpeft.record.metrics_log import MetricsLog

__all__ = ["Checkpoint", "MetricsLog", "RunFolder", "latest", "save"]
