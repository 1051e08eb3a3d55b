"""Batch sizes and block lengths that grow over the first steps of a run, each a function of the step alone."""

from functools import cached_property

import numpy as np

from lmlab.errors import UserError


class BatchSizes:
    """The number of samples of each optimizer step, over all ranks and accumulated batches.

    It grows linearly, in multiples of the initial number, to that of the whole batch.

    ```
    initial 2, 6 steps, batch size 8     step       0 1 2 3 4 5 6 …
                                         samples    2 2 4 4 6 6 8 …
    ```
    """

    def __init__(self, batch_size: int, initial: int | None = None, steps: int = 0):
        """Takes the sizes.

        Args:
            batch_size: that of all steps after the warm-up.
            initial: that of the first step, of which all others are multiples; None for one size of all.
            steps: the number of steps of the warm-up.

        Raises:
            UserError: the batch size is no multiple of the initial one.
        """
        self.batch_size, self.initial, self.steps = batch_size, initial or batch_size, steps if initial else 0
        if batch_size % self.initial:
            raise UserError(
                f"batch_warmup.initial={initial} does not divide batch_size={batch_size}.\n"
                "Batches grow by multiples of the first one: choose one that divides it."
            )

    @cached_property
    def before_each(self) -> np.ndarray:
        """The samples before each step of the warm-up, and before the one after it: [steps + 1] int64."""
        growths = self.batch_size // self.initial - 1
        sizes = self.initial * (1 + np.arange(self.steps) * growths // max(1, self.steps))
        return np.concatenate([[0], np.cumsum(sizes)])

    def before(self, step: int) -> int:
        """Returns the number of samples of all steps before a step."""
        warm = min(step, self.steps)
        return int(self.before_each[warm]) + (step - warm) * self.batch_size

    def of(self, step: int) -> int:
        """Returns the number of samples of a step."""
        return self.before(step + 1) - self.before(step)

    def steps_for(self, samples: int) -> int:
        """Returns the least number of steps that have so many samples."""
        in_warmup = int(self.before_each[-1])
        if samples <= in_warmup:
            return int(np.searchsorted(self.before_each, samples))
        return self.steps - (in_warmup - samples) // self.batch_size


class BlockLengths:
    """The length of the rows of each step, in tokens: blocks are cut into rows of that length.

    No token is left out, and a step has as many tokens as without, in more rows. The length doubles, after equal
    numbers of steps, from the initial one to the block size (as in Nagatsuka et al. 2021).
    """

    def __init__(self, block_size: int, initial: int | None = None, steps: int = 0):
        """Takes the lengths.

        Args:
            block_size: that of all steps after the warm-up.
            initial: that of the first step; None for one length of all.
            steps: the number of steps of the warm-up.

        Raises:
            UserError: the block size is not the initial length, doubled several times, or that is one token.
        """
        self.block_size, self.initial, self.steps = block_size, initial or block_size, steps if initial else 0
        ratio, rest = divmod(block_size, self.initial)
        problem = None
        if rest or ratio & (ratio - 1):
            problem = f"does not become preprocess.block_size={block_size} by doubling"
        elif initial == 1:
            problem = "leaves nothing to predict in a row"
        if problem:
            halves = [block_size >> doublings for doublings in range(1, 8) if block_size % (1 << doublings) == 0]
            lengths = [length for length in halves if length > 1]
            raise UserError(
                f"block_warmup.initial={initial} {problem}.\n"
                f"Use one of {', '.join(map(str, lengths)) or 'those of an even block size'}."
            )
        self.doublings = ratio.bit_length() - 1

    def of(self, step: int) -> int:
        """Returns the length of the rows of a step."""
        done = self.doublings if step >= self.steps else step * self.doublings // self.steps
        return self.initial << done
