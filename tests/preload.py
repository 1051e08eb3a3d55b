"""What a run imports, for processes that are forked from one that has."""

import datasets  # noqa: F401
import lightning.pytorch.trainer  # noqa: F401
import transformers.generation.utils
import transformers.models.gpt2.modeling_gpt2  # noqa: F401

import lmlab.resume
import lmlab.train
import lmlab.training.callbacks
import lmlab.training.checkpoint
import lmlab.training.loggers
import lmlab.training.module
import lmlab.worker  # noqa: F401
