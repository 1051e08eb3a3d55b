"""lmlab trains, measures and compares language models."""

import os
import sys

__version__ = "0.1.0"

# While `python -m lmlab.train` is looking for its module: what that imports takes a while. Ranks are told by others.
if sys.argv[:1] == ["-m"] and "LMLAB_PARENT" not in os.environ:
    from lmlab import early

    early.heed()
