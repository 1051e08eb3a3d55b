"""The precision that a config leaves to the machine, and what a certificate says of it."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from lmlab.config import changes

from .conftest import TINY


@pytest.mark.parametrize(
    ("accelerator", "has_bf16", "precision"),
    [("gpu", True, "bf16-mixed"), ("auto", True, "bf16-mixed"), ("gpu", False, "32-true"), ("cpu", True, "32-true")],
)
def test_the_best_of_the_device(
    accelerator: str, has_bf16: bool, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bf16)
    cfg = OmegaConf.create({"batch_size": 8, "trainer": {"accelerator": accelerator, "devices": 1, "precision": None}})
    changes.fit_to_machine(cfg)
    assert cfg.trainer.precision == precision
    # A run that goes on keeps what it was begun with, wherever it goes on.
    for begun in ("32-true", "bf16-mixed"):
        previous = OmegaConf.create(OmegaConf.to_container(cfg))
        previous.trainer.precision, cfg.trainer.precision = begun, None
        changes.fit_to_machine(cfg, previous)
        assert cfg.trainer.precision == begun


def test_a_certificate_says_what_float32_products_are(
    train: Callable[..., Path], evaluate: Callable[..., Path]
) -> None:
    try:
        run = train(*TINY, "float32_matmul_precision=high")
        assert OmegaConf.load(run / "config.yaml").trainer.precision == "32-true"
        again = evaluate(f"model={run}")
        found = [json.loads((path / "certificate.json").read_text())["precision"] for path in (run, again)]
        assert found == ["32-true, float32 products high", "32-true"]
    finally:
        torch.set_float32_matmul_precision("highest")
