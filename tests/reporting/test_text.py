"""Values of tables as a person reads them."""

from typing import Any

import numpy as np
import pytest

from lmlab.reporting.text import as_text, number_text


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


def test_numbers_over_many_orders_of_magnitude() -> None:
    values = [3e10, 244_704, np.float64(99_999), 0.45, 0.00012, 6, float("inf"), float("nan"), None, "isoFLOP"]
    texts = ["3e10", "2.45e5", "99,999", "0.4500", "1.2e-4", "6", "inf", "", "", "isoFLOP"]
    assert [number_text(value) for value in values] == texts
