"""Optimizers, their parameter groups, and the schedules of the learning rate."""

from lmlab.optim.adamw import AdamW
from lmlab.optim.muon import Muon
from lmlab.optim.schedule import SCHEDULES, Scheduled

__all__ = ["SCHEDULES", "AdamW", "Muon", "Scheduled"]
