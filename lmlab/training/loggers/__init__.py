"""Loggers: `metrics.jsonl` in the run directory, and what shows its rows elsewhere.

Each is a target of a file in `conf/logger/`; the two here are named by configs of older versions too.
"""

from lmlab.training.loggers.metrics_file import MetricsFile
from lmlab.training.loggers.wandb import weights_and_biases

__all__ = ["MetricsFile", "weights_and_biases"]
