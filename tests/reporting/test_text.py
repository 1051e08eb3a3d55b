"""Values of tables as a person reads them."""

from typing import Any

import numpy as np
import pytest

from lmlab.reporting.text import as_text


@pytest.mark.parametrize(
    ("value", "head", "text"),
    [
        (38986.41014120312, "tokens per s", "38,986"),
        (np.float64(38986.41014120312), "tokens per s", "38,986"),
        (np.float32(0.125), "", "0.125"),
        (np.float64(1.5e12), "", "1.5e+12"),
        (np.int64(685568), "parameters", "685,568"),
        (np.int64(2 * 10**12), "FLOPs", "2e+12"),
        (np.float64("nan"), "", ""),
        (None, "", ""),
        (True, "", "True"),
        (np.True_, "", "True"),
        ("0.10", "", "0.10"),
    ],
)
def test_as_text(value: Any, head: str, text: str) -> None:
    assert as_text(value, head) == text
