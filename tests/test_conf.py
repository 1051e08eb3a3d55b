"""Every YAML under conf/ and sweeps/ composes, and each block ends in its constructor."""

import inspect
import re
from pathlib import Path

import hydra
import pytest
from hydra.errors import ConfigCompositionException
from omegaconf import DictConfig, OmegaConf

from lmlab.config import compose as composing
from lmlab.config import evaluated, schema, signatures, targets, trust
from lmlab.config.files import CONF
from lmlab.data.warmup import BatchSizes
from lmlab.train import main

SWEEPS = CONF.parent / "sweeps"
TARGETS = {
    target
    for path in CONF.glob("*/*.yaml")
    for target in re.findall(r"_target_: ((?:lmlab|lightning)\..+)", path.read_text())
}
# What a person has to say along with an option.
REQUIRED = {
    "data=files": ["data.train=x.txt"],
    "data=mixture": ["data.sources={a: {train: x.txt, weight: 1}, b: {path: y, weight: 2}}"],
    "distill=teacher": ["distill.model=me/model"],
    "adapter=lora": ["model=pretrained", "model.name=me/model"],
    "adapter=dora": ["model=pretrained", "model.name=me/model"],
    "adapter=qlora": ["model=pretrained", "model.name=me/model"],
    "data=hub": ["data.path=me/data"],
    "data=prepared": ["data.path=x"],
    "data=tokens": ["data.train=x.bin"],
    "tokenizer=prepared": ["data=prepared", "data.path=x"],
    "model=pretrained": ["model.name=me/model"],
    "suite=minimal_pairs": ["pairs=x.jsonl"],
    "suite=lm_eval": ["tasks=x"],
    "model=scratch": ["model.architecture=gpt2"],
    "tokenizer=pretrained": ["tokenizer.name=me/tokenizer"],
}
ALL = sorted(f"{path.parent.name}={path.stem}" for path in CONF.glob("*/*.yaml") if path.parent.name != "hydra")
OPTIONS = [option for option in ALL if not option.startswith("suite=")]  # of evaluations alone
# A trained model comes with its weights and its tokenizer, and nothing is trained or logged.
OF_EVALUATION = [
    option for option in ALL if option.split("=")[0] in ("data", "objective", "preprocess", "suite", "trainer")
] + ["tokenizer=pretrained"]


def compose(*overrides: str, verb: str = "train") -> DictConfig:
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        return hydra.compose(verb, [*overrides, "run_dir=/nowhere"])


def compose_evaluation(*overrides: str) -> DictConfig:
    """As `lmlab.evaluate` composes it for a model that is no run."""
    words = ["model=pretrained", "model.name=me/model", *overrides]
    return evaluated.completed(compose(*words, verb="evaluate"), words)


def fits(cfg: DictConfig, verb: str = "train") -> None:
    """Every block's keys are arguments of what it names, which is lmlab's own, and all that is needed is there."""
    cfg = composing.freeze(cfg)
    schema.check_keys(cfg, verb)
    schema.preprocessing(cfg)
    trust.check_trusted(cfg, ())


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_what_a_target_takes_is_read_without_importing_it(name: str) -> None:
    """As it is when it is imported, as far as a config is held against it."""
    found, real = signatures.read(name), inspect.signature(hydra.utils.get_object(name)).parameters
    assert found is not None
    for one, other in zip(found.values(), real.values(), strict=True):
        assert (one.name, one.kind) == (other.name, other.kind)
        assert (one.default is one.empty) == (other.default is other.empty)
        if one.annotation is one.empty and name.startswith("lightning."):  # a name for a type, which is not looked up
            continue
        for value in (1, 1.0, True, "x", None, [1], {}):
            assert targets.fits(value, one.annotation) == targets.fits(value, other.annotation)


def test_there_are_options() -> None:
    assert len(OPTIONS) >= 25
    assert len(OF_EVALUATION) >= 14


@pytest.mark.parametrize("option", OPTIONS)
def test_option_composes_and_fits_its_constructor(option: str) -> None:
    fits(compose(option, *REQUIRED.get(option, [])))


@pytest.mark.parametrize("option", OF_EVALUATION)
def test_option_composes_for_an_evaluation(option: str) -> None:
    group = option.split("=")[0]
    has_text = option in ("suite=minimal_pairs", "suite=lm_eval")
    own = ("data=", "suite=") if group == "data" or has_text else f"{group}="
    others = [word for word in ("data=sample", "objective=clm") if not word.startswith(own)]
    cfg = compose_evaluation(option, *others, *REQUIRED.get(option, []))
    fits(cfg, "evaluate")
    # Whatever else an option brings along, the model is the one that was named, with its own tokenizer.
    assert cfg.model.name == "me/model"
    assert composing.freeze(cfg).tokenizer.name == ("me/tokenizer" if group == "tokenizer" else "me/model")
    if option != "trainer=gpu":  # there is none here
        schema.check_evaluation(cfg)


def test_keys_of_a_run_are_none_of_an_evaluation() -> None:
    for group in ("optim=adamw", "callbacks=default", "logger=file", "experiment=eli5_clm"):
        with pytest.raises(ConfigCompositionException, match=f"Could not override '{group.split('=')[0]}'"):
            compose_evaluation("data=sample", "objective=clm", group)


def test_what_an_evaluation_leaves_open() -> None:
    """Contexts and blocks are for the model or the run to say; text and objective may be."""
    cfg = compose("model=pretrained", "model.name=me/model", verb="evaluate")
    assert "data" not in cfg
    assert "objective" not in cfg
    assert cfg.preprocess.block_size is cfg.context is cfg.stride is None
    assert compose_evaluation("data=sample", "objective=clm").context == "blocks"
    assert compose_evaluation("data=sample", "objective=mlm", "score=pseudo").context == "document"
    # The text may be named without text to train on.
    assert compose_evaluation("data=files", "data.validation=x.txt", "objective=clm").data.train is None
    # A data set that says how it is prepared still does.
    assert compose_evaluation("data=wikitext2", "objective=clm").preprocess.end_of_text is False


def first_values(file: Path) -> list[str]:
    """A value of each swept key."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    from lmlab.sweeps.study import distribution, first_value

    params = OmegaConf.load(file).hydra.sweeper.params
    parsed = OverridesParser.create().parse_overrides([f"{key}={values}" for key, values in params.items()])
    return [f"{override.get_key_element()}={first_value(distribution(override))}" for override in parsed]


@pytest.mark.parametrize("sweep", sorted(SWEEPS.glob("*.yaml")), ids=lambda path: path.stem)
def test_sweep_composes(sweep: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    raw = OmegaConf.load(sweep)
    assert raw.hydra.mode == "MULTIRUN"
    swept = first_values(sweep)
    command = ["lmlab.train", "-cd", str(SWEEPS), "-cn", sweep.stem, "--cfg", "job", "run_dir=/nowhere", *swept]
    monkeypatch.setattr("sys.argv", command)
    main()
    fits(OmegaConf.create(capsys.readouterr().out))


@pytest.mark.parametrize("name", ["train", "evaluate", "trainer", "validation", "preprocess"])
def test_each_key_is_declared_with_its_meaning(name: str) -> None:
    """The schema has the keys of the YAML files, those of its groups included, and says what each of them means."""
    if name == "evaluate":
        words = ["data=sample", "objective=clm", "+model.name=x"]
        suites = [word for word in OF_EVALUATION if word.startswith("suite=")]
        block = {key for suite in suites for key in compose(*words, suite, verb="evaluate")}
    else:
        cfg = compose("distill=teacher", "adapter=lora")
        block = {*(cfg if name == "train" else cfg[name])}
    declared = schema.DECLARED[name]
    assert signatures.parameters(declared).keys() == block - {"_target_"}
    assert all(signatures.meanings(declared)[key] for key in signatures.parameters(declared))


def test_root_config_fits_one_screen() -> None:
    for root in CONF.glob("*.yaml"):
        assert len(root.read_text().splitlines()) <= 45


def test_objective_brings_its_model_and_the_command_line_wins() -> None:
    assert compose().model.architecture == "gpt2"
    assert compose("objective=mlm").model.architecture == "roberta"
    assert compose("objective=mlm", "model=distilroberta").tokenizer._target_.endswith("pretrained")
    assert compose("objective=mlm", "model=gpt_small").model.architecture == "gpt2"
    assert compose("model=distilgpt2", "tokenizer=char").tokenizer._target_.endswith("char")
    assert compose("experiment=eli5_mlm", "batch_size=4").batch_size == 4


def test_experiments_hold_the_guides_choices() -> None:
    for name, model in (("eli5_clm", "distilgpt2"), ("eli5_mlm", "distilroberta-base")):
        cfg = composing.freeze(compose(f"experiment={name}"))
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
    assert schema.training_steps(trainer, blocks=800, sizes=BatchSizes(8)) == expected
