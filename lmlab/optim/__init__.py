"""Optimizers, their parameter groups, and the schedules of the learning rate."""

from lmlab.optim.adamw import AdamW
from lmlab.optim.muon import Muon
from lmlab.optim.schedule import SCHEDULES, Decayed, Scheduled
from lmlab.optim.schedule_free import ScheduleFree

__all__ = ["SCHEDULES", "AdamW", "Decayed", "Muon", "ScheduleFree", "Scheduled"]
