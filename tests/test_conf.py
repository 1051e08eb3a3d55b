"""Every YAML under conf/ and sweeps/ composes, and each block ends in its constructor."""

from pathlib import Path

import hydra
import pytest
from omegaconf import DictConfig, OmegaConf

from lmlab import config
from lmlab.data.preprocess import Preprocessing
from lmlab.train import main

SWEEPS = config.CONF.parent / "sweeps"
# What a person has to say along with an option.
REQUIRED = {
    "data=files": ["data.train=x.txt"],
    "data=hub": ["data.path=me/data"],
    "model=pretrained": ["model.name=me/model"],
    "model=scratch": ["model.architecture=gpt2"],
    "tokenizer=pretrained": ["tokenizer.name=me/tokenizer"],
}
OPTIONS = sorted(
    f"{path.parent.name}={path.stem}" for path in config.CONF.glob("*/*.yaml") if path.parent.name != "hydra"
)


def compose(*overrides: str) -> DictConfig:
    with hydra.initialize_config_dir(str(config.CONF), version_base="1.3"):
        return hydra.compose("train", [*overrides, "run_dir=/nowhere"])


def fits(cfg: DictConfig) -> None:
    """Every block's keys are arguments of what it names, and all that is needed is there."""
    cfg = config.freeze(cfg)
    config.check_keys(cfg, "train")
    Preprocessing(**cfg.preprocess)


def test_there_are_options() -> None:
    assert len(OPTIONS) >= 25


@pytest.mark.parametrize("option", OPTIONS)
def test_option_composes_and_fits_its_constructor(option: str) -> None:
    fits(compose(option, *REQUIRED.get(option, [])))


@pytest.mark.parametrize("sweep", sorted(SWEEPS.glob("*.yaml")), ids=lambda path: path.stem)
def test_sweep_composes(sweep: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    raw = OmegaConf.load(sweep)
    assert raw.hydra.mode == "MULTIRUN"
    swept = [f"{key}={value}" for key, values in raw.hydra.sweeper.params.items() for value in values.split(",")]
    command = ["lmlab.train", "-cd", str(SWEEPS), "-cn", sweep.stem, "--cfg", "job", "run_dir=/nowhere", *swept]
    monkeypatch.setattr("sys.argv", command)
    main()
    fits(OmegaConf.create(capsys.readouterr().out))


def test_root_config_fits_one_screen() -> None:
    for root in config.CONF.glob("*.yaml"):
        assert len(root.read_text().splitlines()) <= 40


def test_objective_brings_its_model_and_the_command_line_wins() -> None:
    assert compose().model.architecture == "gpt2"
    assert compose("objective=mlm").model.architecture == "roberta"
    assert compose("objective=mlm", "model=distilroberta").tokenizer._target_.endswith("pretrained")
    assert compose("objective=mlm", "model=gpt_small").model.architecture == "gpt2"
    assert compose("model=distilgpt2", "tokenizer=char").tokenizer._target_.endswith("char")
    assert compose("experiment=eli5_mlm", "batch_size=4").batch_size == 4


def test_experiments_hold_the_guides_choices() -> None:
    for name, model in (("eli5_clm", "distilgpt2"), ("eli5_mlm", "distilroberta-base")):
        cfg = config.freeze(compose(f"experiment={name}"))
        assert cfg.model.name == cfg.tokenizer.name == f"distilbert/{model}"
        p, t, o = cfg.preprocess, cfg.trainer, cfg.optim
        assert (p.max_records, p.test_size, p.join, p.truncation) == (5000, 0.2, " ", True)
        assert (p.block_size, p.drop_remainder_every, p.special_tokens, p.end_of_text) == (128, 1000, True, False)
        assert (cfg.batch_size, o.lr, o.weight_decay, t.max_epochs) == (8, 2e-5, 0.01, 3)
        assert (o.schedule, o.warmup_steps, o.warmup_ratio) == ("linear", None, 0.0)
        assert cfg.objective.get("mask_probability", 0.15) == 0.15


@pytest.mark.parametrize(
    ("epochs", "max_steps", "interval", "expected"),
    [(3, -1, 1.0, (300, 100)), (3, 7, 1.0, (7, 7)), (0.5, -1, 20, (50, 20)), (1, -1, 0.25, (100, 25))],
)
def test_training_steps(epochs: float, max_steps: int, interval: float, expected: tuple[int, int]) -> None:
    trainer = OmegaConf.create({"max_epochs": epochs, "max_steps": max_steps, "val_check_interval": interval})
    assert config.training_steps(trainer, blocks=800, batch_size=8) == expected
