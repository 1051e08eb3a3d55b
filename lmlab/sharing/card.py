"""The card of a model on the hub: `README.md`, whose metadata the hub reads, and the chart that it shows.

A card depends on the run alone: built again it is the same, so that it is not pushed again.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from omegaconf import OmegaConf

from lmlab.config.models import PRETRAINED
from lmlab.config.targets import sources
from lmlab.console import command, counted, duration
from lmlab.errors import UserError
from lmlab.evaluation.metrics import BOUND, EXACT
from lmlab.evaluation.records import describe
from lmlab.hub import split_revision
from lmlab.io import read_json
from lmlab.models.adapter_files import QUANTIZATION
from lmlab.models.loading import auto_class_of, task
from lmlab.reporting.charts import losses_png
from lmlab.reporting.load import Run, bits_per_byte, describe_origin, load_run
from lmlab.runs.directory import RunDirectory

PIPELINES = {
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForMaskedLM": "fill-mask",
    "AutoModelForSeq2SeqLM": "text2text-generation",
    "AutoModelForPreTraining": None,
}
"""The name that the hub has for the task of each `AutoModel` class; None where it has none."""
PROMPTS = {
    "AutoModelForCausalLM": "Once upon a time",
    "AutoModelForMaskedLM": "The sky is <mask>.",
    "AutoModelForSeq2SeqLM": "The sky is <extra_id_0>.",
    "AutoModelForPreTraining": "The sky is cat.",
}
MEANINGS = {
    EXACT: "The perplexity is exact: exp(Σ nll / Σ targets), over every target of the held-out text once.",
    BOUND: "The bound perplexity is an upper bound, estimated by random masks: the perplexity of the text is at most "
    "this, up to the standard error. It bounds what a causal model's perplexity is exactly.",
}
"""The meaning of a perplexity, by its name in the certificate."""
NO_PERPLEXITY_OF_TEXT = (
    "The {metric} is exp(Σ nll / Σ targets) over the tokens that the objective makes targets, given all that it shows "
    "the model. It is not the perplexity of the text, and can't be compared with that of a causal model."
)


def build_card(run: RunDirectory, repository: str, license: str, steps: Sequence[int] = ()) -> dict[str, bytes]:
    """Returns the card of a finished run, and the chart that it shows, by the names of their files.

    Args:
        repository: the id of the repository on the hub.
        license: the licence of the model, as the hub names it.
        steps: those of the series of models that are pushed too.

    Raises:
        UserError: the evaluation of the run does not add up.
    """
    loaded = load_run(run.path, run.path.name, None)
    assert isinstance(loaded, Run)
    if run.certificate.is_file() and loaded.records is None:  # damaged, or changed since
        raise UserError(loaded.faults[0])
    config = yaml.safe_load(run.config.read_text("utf-8"))
    chart = losses_png(loaded)
    metadata = describe_metadata(run, config, license)
    if results := eval_results(loaded, config, metadata.pipeline_tag):
        metadata.model_name = repository.rpartition("/")[2]  # the hub wants one with the metrics
        metadata.eval_results = results
    sections = [
        f"# {repository.rpartition('/')[2]}",
        describe_model(run, loaded, config),
        f"## On held-out text\n\n{describe_evaluation(loaded)}",
        "" if chart is None else "![Training and validation loss over the tokens seen in training](curve.png)",
        f"## Use\n\n{describe_use(run, repository)}",
        describe_adapter(run, config, repository),
        describe_series(repository, steps),
        f"## Data\n\n{describe_data(run, config)}",
        f"## Training\n\n{describe_training(run, loaded, config, repository)}",
    ]
    files = {"README.md": as_card(metadata, sections)}
    return files if chart is None else files | {"curve.png": chart}


def build_step_card(run: RunDirectory, repository: str, license: str, step: int) -> bytes:
    """Returns the card of the model after `step` optimizer steps of a run, which makes no claim on its metrics."""
    config = yaml.safe_load(run.config.read_text("utf-8"))
    metadata = describe_metadata(run, config, license)
    steps = run.read_summary()["steps"]
    text = (
        f"The model of `{repository}` after step {step:,} of {steps:,}. Its last weights, their evaluation and the "
        "config of the run are on the branch `main`."
    )
    title = f"# {repository.rpartition('/')[2]}, step {step:,}"
    return as_card(metadata, [title, text, describe_use(run, f"{repository}@step-{step}")])


def as_card(metadata: ModelCardData, sections: Sequence[str]) -> bytes:
    """Returns the file of a card: its metadata, and the sections that are not empty."""
    text = "\n\n".join(section for section in sections if section)
    return str(ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n{text}\n")).encode()


def describe_metadata(run: RunDirectory, config: Mapping[str, Any], license: str) -> ModelCardData:
    """Returns the metadata of a card but for its metrics."""
    auto_class, base, data = auto_class_of_export(run), base_model(config), config["data"]
    relation: dict[str, Any] = {"base_model_relation": "finetune"} if base else {}
    of_hub = data["_target_"] == "lmlab.data.sources.load_hub" and is_hub_id(data["path"])
    return ModelCardData(
        license=license,
        library_name="lmlab" if is_torch_module(run) else "transformers",
        pipeline_tag=PIPELINES[auto_class],
        tags=["lmlab", objective_name(config)],
        datasets=[data["path"]] if of_hub else None,
        base_model=base,
        **relation,
    )


def auto_class_of_export(run: RunDirectory) -> str:
    """Returns the name of the `AutoModel` class that loads the exported model of a run."""
    from transformers import AutoConfig

    return auto_class_of(AutoConfig.from_pretrained(run.model, trust_remote_code=False), str(run.model))


def is_torch_module(run: RunDirectory) -> bool:
    """Returns whether the exported model of a run is of a class that transformers does not have."""
    return read_json(run.model / "config.json").get("model_type") == "torch_module"


def base_model(config: Mapping[str, Any]) -> str | None:
    """Returns the hub id of the model whose weights a run began with; None if it began with others."""
    name = config["model"].get("name") if config["model"]["_target_"] == PRETRAINED else None
    return split_revision(name)[0] if name and is_hub_id(name) else None


def is_hub_id(name: str) -> bool:
    """Returns whether a name is that of a repository on the hub, and no path."""
    return not Path(name).exists() and not name.startswith(("/", ".", "~")) and name.count("/") <= 1


def objective_name(config: Mapping[str, Any]) -> str:
    """Returns the name of an objective: of lmlab's own that of its option, such as clm, of others the class."""
    module, _, name = config["objective"]["_target_"].rpartition(".")
    return module.rpartition(".")[2] if module.startswith("lmlab.objectives.") else name


def eval_results(run: Run, config: Mapping[str, Any], pipeline: str | None) -> list[EvalResult] | None:
    """Returns the metrics of the certificate for the hub's metadata, each under its own name.

    None without a certificate, and without a task of the hub's, which lists a metric by that.
    """
    if run.records is None or pipeline is None:
        return None
    data, certificate = config["data"], run.records.certificate
    kind = data["_target_"].rpartition(".")[2].removeprefix("load_")
    name = data["path"] if kind == "hub" and is_hub_id(data["path"]) else {"sample": "lmlab-sample"}.get(kind, kind)
    return [
        EvalResult(
            task_type=pipeline,
            dataset_type=name,
            dataset_name=f"{name}, held-out documents",
            dataset_revision=data.get("revision"),
            metric_type=metric,
            metric_name=f"{metric.replace('_', ' ')}{' (upper bound)' if certificate['figure'] == BOUND else ''}",
            metric_value=certificate["figures"][metric],
        )
        for metric in (certificate["figure"], bits_per_byte(certificate["figure"]))
        if certificate["figures"].get(metric) is not None
    ]


def describe_model(run: RunDirectory, loaded: Run, config: Mapping[str, Any]) -> str:
    """Says what the model is, and what it began with."""
    exported = read_json(run.model / "config.json")
    base, teacher = base_model(config), (config.get("distill") or {}).get("model")
    if base:
        began = f"It is [{base}](https://huggingface.co/{base}), trained further"
    elif config["model"]["_target_"] == PRETRAINED:
        began = "It began with weights that are not on the hub"
    elif config["model"]["_target_"] == "lmlab.models.loading.from_scratch":
        began = "It began with random weights"
    else:
        began = f"It was made by `{config['model']['_target_']}`"
    kind = task(auto_class_of_export(run))
    lines = [
        f"{'An' if kind.startswith('e') else 'A'} {kind} language model, `{exported['architectures'][0]}`, with "
        f"{loaded.summary['parameters']:,} parameters. {began}, and was trained on {loaded.summary['tokens']:,} tokens "
        f"with the objective `{objective_name(config)}` of lmlab."
    ]
    if teacher:
        lines.append(f"It also learned the probabilities of a teacher, `{Path(teacher).name}`.")
    if "pruned" in loaded.summary:
        lines.append("Its run was ended early by the search that it belongs to.")
    return " ".join(lines)


def describe_evaluation(run: Run) -> str:
    """Returns the metrics of the certificate as a table, and what they are; else those of the last validation."""
    if run.records is None:
        metrics = {key: value for key, value in run.summary.items() if key.startswith("val/") and value is not None}
        rows = {key.removeprefix("val/").replace("_", " "): f"{value:,.4f}" for key, value in metrics.items()}
        return f"{table(['metric', 'value'], rows.items())}\n\nThe run wrote no certificate."
    certificate = run.records.certificate
    metric = certificate["figure"].replace("_", " ")
    rows = describe(certificate)
    before = run.summary.get(f"val/{certificate['figure']}_before")
    if before is not None:
        rows[f"{metric} before training"] = f"{before:,.4f}"
    meaning = MEANINGS.get(certificate["figure"], NO_PERPLEXITY_OF_TEXT.format(metric=metric))
    return (
        f"{table(['metric', 'value'], rows.items())}\n\n{meaning} nll is in nats, and bits per byte are "
        "Σ nll / ln 2 / bytes of the text.\n\n"
        "[`run/certificate.json`](run/certificate.json) has these totals and all that they depend on, and "
        "[`run/records.parquet`](run/records.parquet) a row for each document, which add up to them. Weights "
        f"`{certificate['weights_hash']}`, text `{certificate['data_hash']}`, tokenizer "
        f"`{certificate['tokenizer_hash']}`, computed in {certificate['precision']}."
    )


def describe_use(run: RunDirectory, name: str) -> str:
    """Returns the code and the command that load the model.

    Args:
        name: its hub id, with a revision behind an @ or without.
    """
    auto_class = auto_class_of_export(run)
    predict = command("python", "-m", "lmlab.predict", name, PROMPTS[auto_class])
    if is_torch_module(run):
        return (
            "The model is a torch module of a class that transformers does not have. Download the repository, and run "
            "`python -m lmlab.predict` with its folder and `--trust PACKAGE`, where PACKAGE has the class."
        )
    repository, revision = split_revision(name)
    arguments = f'"{repository}"' + (f', revision="{revision}"' if revision else "")
    return (
        f"```python\nfrom transformers import {auto_class}, AutoTokenizer\n\n"
        f"tokenizer = AutoTokenizer.from_pretrained({arguments})\n"
        f"model = {auto_class}.from_pretrained({arguments})\n```\n\n"
        f"With lmlab:\n\n```bash\n{predict}\n```"
    )


def describe_adapter(run: RunDirectory, config: Mapping[str, Any], repository: str) -> str:
    """Says how the adapter of a run is loaded beside its base; nothing where the run has none."""
    if not run.adapter.is_dir():
        return ""
    base = base_model(config)
    beside = f'"{base}"' if base else "BASE"
    auto_class = auto_class_of_export(run)
    quantized = run.adapter / QUANTIZATION
    names, options = auto_class, ""
    if quantized.is_file():
        names += ", BitsAndBytesConfig"
        options = f", quantization_config=BitsAndBytesConfig.from_dict({read_json(quantized)})"
    return (
        "## The adapter\n\n`adapter/` has the adapter alone, in the form of peft; the model above is its base"
        f"{', quantized,' if options else ''} with the adapter merged into it."
        f"{'' if base else ' The base, which stands for BASE below, is not on the hub.'}\n\n"
        f"```python\nfrom peft import PeftModel\nfrom transformers import {names}\n\n"
        f"base = {auto_class}.from_pretrained({beside}{options})\n"
        f'model = PeftModel.from_pretrained(base, "{repository}", subfolder="adapter")\n```'
    )


def describe_series(repository: str, steps: Sequence[int]) -> str:
    """Says which steps of the run can be loaded; nothing where there is no series."""
    if not steps:
        return ""
    shown = ", ".join(f"`step-{step}`" for step in steps)
    return (
        f"## During training\n\n{counted(len(steps), 'tag')} with the model after so many steps: {shown}. "
        f'Load one by `revision="step-{steps[0]}"`, or with lmlab as `{repository}@step-{steps[0]}`.'
    )


def describe_data(run: RunDirectory, config: Mapping[str, Any]) -> str:
    """Says what text the run had, and where it went."""
    ledger = read_json(run.ledger)
    names = list(dict.fromkeys(name for counts in ledger.values() for name in counts))
    rows = [
        (name.replace("_", " "), *(format_count(counts.get(name)) for counts in ledger.values()))
        for name in names
        if any(counts.get(name) is not None for counts in ledger.values())
    ]
    return f"{describe_source(config['data'])}\n\n{table(['count', *ledger], rows)}"


def describe_source(data: Mapping[str, Any]) -> str:
    """Says where the text came from, without the folders of anyone's disk."""
    kind = data["_target_"].removeprefix("lmlab.data.sources.")
    field = f", the text in `{data['text']}`" if data.get("text") else ""
    if kind == "load_sample":
        return f"The small corpus that comes with lmlab{field}."
    if kind == "load_hub":
        path = data["path"]
        named = f"[{path}](https://huggingface.co/datasets/{path})" if is_hub_id(path) else f"`{Path(path).name}`"
        chosen = {key: data.get(key) for key in ("name", "revision", "train", "validation") if data.get(key)}
        return f"{named}{field}{''.join(f', {key} `{value}`' for key, value in chosen.items())}."
    if data.get("sources"):
        lines = ["A mixture of", ""]
        for name, (block, share) in sources(OmegaConf.create(dict(data))).items():
            weight = f" (weight {share.weight})" if share.get("weight") else ""
            lines.append(f"- {name}{weight}: {describe_source(block)}")
        return "\n".join(lines)
    if kind == "load_files":
        files = {key: data[key] for key in ("train", "validation") if data.get(key)}
        if isinstance(files.get("validation"), Mapping):
            held_out = files.pop("validation")
            files |= {f"validation {name}": value for name, value in held_out.items()}
        lists = {key: [value] if isinstance(value, str) else value for key, value in files.items()}
        named = "; ".join(f"{key}: {', '.join(f'`{Path(one).name}`' for one in value)}" for key, value in lists.items())
        return f"Local files ({named}){field}."
    return f"What `{data['_target_']}` gives{field}."


def describe_training(run: RunDirectory, loaded: Run, config: Mapping[str, Any], repository: str) -> str:
    """Returns the choices of the run that people ask for first, and how it is repeated."""
    optim, summary = config["optim"], loaded.summary
    rows = {
        "steps": f"{summary['steps']:,}",
        "global batch": f"{config['batch_size']:,} blocks of {config['preprocess']['block_size']:,} tokens",
        "optimizer": ", ".join(
            [
                optim["_target_"].rpartition(".")[2],
                *(f"{key} {optim[key]}" for key in ("lr", "schedule") if key in optim),
            ]
        ),
        "precision": config["trainer"]["precision"],
        "seed": str(config["seed"]),
        "training time": duration(summary["seconds"]),
        "run": loaded.manifest["run_id"],
    }
    if adapter := config.get("adapter"):
        keys = ("r", "alpha", "dora", "quantization")
        rows["adapter"] = ", ".join(f"{key} {adapter[key]}" for key in keys if adapter.get(key) is not None)
    origin = describe_origin(loaded.manifest)
    folder = repository.rpartition("/")[2]
    fetch = command("hf", "download", repository, "--include", "run/*", "--local-dir", folder)
    again = command("python", "-m", "lmlab.resume", f"{folder}/run", "--fresh")
    return (
        f"{table(['choice', 'value'], rows.items())}\n\nThe command was\n\n```bash\n{origin['commands'][0]}\n```\n\n"
        f"with {origin['software'][0]}. [`run/config.yaml`](run/config.yaml) is its whole config. To run it again:\n\n"
        f"```bash\n{fetch}\n{again}\n```"
    )


def table(heads: Sequence[str], rows: Any) -> str:
    """Returns a table in Markdown."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def format_count(count: int | None) -> str:
    """Returns a count of the ledger; nothing where there is none."""
    return "" if count is None else f"{count:,}"
