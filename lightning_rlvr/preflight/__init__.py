"""What a config takes before it is run: memory by part and rank, work of a step, disk, and terms that cannot act."""

from lightning_rlvr.preflight.report import Report, inspect, options

__all__ = ["Report", "inspect", "options"]
