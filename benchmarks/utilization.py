"""Says how much of a device a training step uses: the model's operations over the most that the device can do."""

import statistics
import time
from functools import cache
from typing import Any

import torch

from lmlab.training.measure import peak_flops

PRODUCT = 8192
"""Rows and columns of the matrices whose product shows what a GPU reaches."""


@cache
def measured_peak() -> float | None:
    """Returns the operations per second that this machine's GPU reaches in bf16; None without one."""
    return matmul_flops(torch.device("cuda"), PRODUCT) if torch.cuda.is_available() else None


def matmul_flops(device: torch.device, size: int, seconds: float = 0.5) -> float:
    """Returns the operations per second of a bf16 product of two square matrices, in the median of some batches.

    Args:
        size: rows and columns. The numbers are random: zeros take less power, and a GPU is faster on them.
        seconds: how long is measured, after a fifth of it to warm up.
    """
    one, other = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    out = torch.empty_like(one)

    def rate(count: int) -> float:
        """Returns products per second."""
        synchronize(device)
        began = time.perf_counter()
        for _ in range(count):
            torch.mm(one, other, out=out)
        synchronize(device)
        return count / (time.perf_counter() - began)

    rate(1)  # the library's own start
    at_first = rate(max(1, round(rate(1) * seconds / 5)))
    count = max(1, round(at_first * seconds / 5))
    found = statistics.median(rate(count) for _ in range(5))
    if device.type == "cuda":
        del one, other, out
        torch.cuda.empty_cache()  # the sides need the memory
    return 2 * size**3 * found


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peaks(precision: str) -> dict[str, float | None]:
    """Returns the operations per second at most, in this precision: as the maker states them, and as measured here.

    None where they are not known: on a CPU, in float32, or the stated ones of a device of an unknown name.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {
        "stated": peak_flops(device, precision),
        "measured": measured_peak() if precision == "bf16-mixed" else None,
    }


def speed(
    tokens_per_s: float, tokens: int, flops: float | None, peak: dict[str, float | None], memory: dict[str, Any]
) -> dict[str, float | None]:
    """Returns what one side's speed is in other terms.

    Args:
        tokens: of a step.
        flops: the model's operations in a step (`lmlab.models.flops`), None if they are not known.
        peak: see `peaks`.
        memory: of the side's process, in bytes.
    """
    steps_per_s = tokens_per_s / tokens
    mfu = {name: flops * steps_per_s / most if flops and most else None for name, most in peak.items()}
    return {
        "tokens_per_s": tokens_per_s,
        "step_ms": 1000 / steps_per_s,
        "mfu": mfu["stated"],
        "mfu_of_measured": mfu["measured"],
        "peak_memory_gib": memory["peak"] / 2**30,
    }
