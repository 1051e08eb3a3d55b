"""The keys of the root configs, and of blocks without a target: type, range and meaning of each."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Lt


@dataclass
class Config:
    """The keys that training and evaluation share."""

    preprocess: dict[str, Any]
    """The choices that turn records into blocks, see data/options.py."""
    tokenizer: dict[str, Any]
    """A target that returns a tokenizer."""
    model: dict[str, Any]
    """A target that returns a model."""
    trainer: dict[str, Any]
    """Arguments of lightning.Trainer; `Trainer` declares those that lmlab reads."""
    seed: Annotated[int, Ge(0), Lt(2**63)]
    """Seed of weights, order, masks and dropout; that of the held-out split is preprocess.split_seed."""
    batch_size: Annotated[int, Ge(1)]
    """Training: blocks per optimizer step, over all devices. Evaluation: windows scored at once, per device."""
    num_workers: Annotated[int, Ge(0)]
    """Processes that make batches, per device."""
    attention: str | None
    """Name of an attention implementation, such as sdpa or eager; null leaves the choice to the model."""
    float32_matmul_precision: Literal["highest", "high", "medium"]
    """Precision of products of float32 matrices: highest is float32; high lets devices with units for it use TF32, and
    medium lets CPUs use bf16."""
    logits_chunk_size: Annotated[int, Ge(1)] | None
    """Scored positions whose logits are held at once; null chooses by the device."""
    cache_dir: str
    """Directory of prepared data, which all runs share."""
    debug: bool
    """Show tracebacks of errors that a person can cause."""
    run_dir: str
    """The run directory; hydra.run.dir sets it."""


@dataclass
class Train(Config):
    """The keys of train.yaml."""

    data: dict[str, Any]
    """A target that returns a corpus."""
    objective: dict[str, Any]
    """A target that makes examples of blocks."""
    optim: dict[str, Any]
    """A target that makes an optimizer and its schedule."""
    distill: dict[str, Any] | None = None
    """A target that loads a teacher, whose probabilities are learned too; null learns from the text alone."""
    adapter: dict[str, Any] | None = None
    """A target that adds an adapter to the model, which alone is trained; null trains the model itself."""
    callbacks: dict[str, Any] | None = None
    """Targets that return Lightning callbacks, by a name for each."""
    logger: dict[str, Any] | None = None
    """Targets that return Lightning loggers, by a name for each; and the keys of `Push`."""
    budget: dict[str, Any] | None = None
    """The length of a run in tokens, computation or hours, see `Budget`."""
    batch_warmup: dict[str, Any] | None = None
    """Smaller batches in the first steps, see `Warmup`."""
    block_warmup: dict[str, Any] | None = None
    """Shorter blocks in the first steps, see `Warmup`."""
    validation: dict[str, Any] | None = None
    """The held-out text that validations during training score, see `Validation`."""
    compile: bool = False
    """Compile each layer with torch.compile."""
    activation_checkpointing: bool | Literal["selective"] = False
    """Compute activations again in the backward pass, to take less memory: all of those in layers, or by selective
    those that are no results of matrix products and attention."""
    profile: bool = False
    """Write a trace of torch's profiler for a few steps into the run directory."""


@dataclass
class Prepare(Train):
    """The keys of prepare.yaml, of which those of training that do not concern its data change nothing."""

    output: str = ""
    """The directory that is made, for data=prepared data.path=…"""
    shards: Annotated[int, Ge(1)] = 64
    """Parts of each split that are prepared apart from one another; fewer where there are fewer records."""
    processes: Annotated[int, Ge(1)] = 1
    """Processes that prepare at once; the tasks of a SLURM job array share the shards out too."""


@dataclass
class Evaluate(Config):
    """The keys of evaluate.yaml."""

    data: dict[str, Any] | None = None
    """A target that returns a corpus; null takes what the run held out."""
    objective: dict[str, Any] | None = None
    """A target that makes examples of windows; null takes what the model was trained with."""
    context: Literal["blocks", "document", "sliding", "rolling", "fixed_length"] | None = None
    """The text that a model sees at once: blocks as in training, a document alone, or overlapping windows of all;
    rolling as lm-evaluation-harness, and fixed_length as the documentation of transformers."""
    stride: Annotated[int, Ge(1)] | None = None
    """Tokens from one window to the next, of sliding, fixed_length and long documents; null is half a block."""
    score_end: bool = True
    """Score the end-of-text token after each document."""
    score: Literal["labels", "pseudo", "elbo"] | None = None
    """The scored tokens: labels are those that the objective masks or predicts, pseudo hides each token in turn, elbo
    hides random ones, for an upper bound; null is the objective's own."""
    draws: Annotated[int, Ge(2)] | None = None
    """Random masks of each window, with score=elbo; an even number. null takes the objective's, or 16."""
    within_word: bool = False
    """Hide the rest of the word too, with score=pseudo."""
    sample: Annotated[float, Gt(0), Lt(1)] | None = None
    """The share of the tokens that score=pseudo scores; null scores all."""
    units: Literal["text", "words"] = "text"
    """The words of the perplexity per word: words and ends of documents, or words and ends of all lines."""
    trust: str | list[str] | None = None
    """Packages whose code may run where the config of the run names it."""
    series: bool | list[Annotated[int, Ge(0)]] = False
    """Score each model of the run's series, or those of these steps."""
    suite: Literal["minimal_pairs", "memorization", "generation", "lm_eval"] | None = None
    """Another measure than the nll of held-out text; null measures that."""
    pairs: str | list[str] | None = None
    """Files of minimal pairs, by path or glob, with suite=minimal_pairs."""
    phenomenon: str | None = None
    """The column that names the phenomenon of a pair; null is phenomenon, linguistics_term or UID, or the file's
    name."""
    prefix: Annotated[int, Ge(1)] = 50
    """Tokens at the beginning of a document that the model continues, with suite=memorization or generation."""
    continuation: Annotated[int, Ge(1)] = 50
    """Tokens after them: those that are to follow verbatim, or the most that are written."""
    min_k: Annotated[float, Gt(0), Le(1)] = 0.2
    """The share of a document's tokens that are the least probable, with suite=memorization."""
    prompts: Annotated[int, Ge(1)] = 200
    """Documents whose beginnings are continued, with suite=generation."""
    temperature: Annotated[float, Ge(0)] = 1.0
    """The divisor of the logits that are sampled from; 0 always takes the most probable token."""
    top_k: Annotated[int, Ge(1)] | None = None
    """Sample from so many of the most probable tokens; null is all."""
    top_p: Annotated[float, Gt(0), Le(1)] | None = None
    """Sample from the most probable tokens that have this share of the probability; null is all."""
    mauve: str | None = None
    """The model by which MAUVE tells the texts from people's, by hub id or directory; null goes without."""
    tasks: str | list[str] | None = None
    """Tasks of lm-evaluation-harness, with suite=lm_eval."""
    task_path: str | None = None
    """A directory with further tasks."""
    shots: Annotated[int, Ge(0)] | None = None
    """Examples before each question; null is as many as each task says."""
    limit: Annotated[int, Ge(1)] | None = None
    """Examples of each task, from the first on; null is all."""
    surprisal: bool = False
    """Write the surprisal of each word of the text too."""
    calibration: bool = False
    """Measure too whether the model is right as often as it is sure."""
    check: bool = False
    """Measure again at another batch size and number of devices, and fail if a total moves."""


@dataclass
class Trainer:
    """The keys of the block trainer that lmlab reads itself; others are Lightning's."""

    accelerator: Literal["auto", "cpu", "gpu", "cuda", "mps"] = "cpu"
    """The kind of device."""
    devices: Annotated[int, Ge(1)] = 1
    """Processes on each node, one for each device."""
    num_nodes: Annotated[int, Ge(1)] = 1
    """Nodes; on more than one, SLURM or torchrun starts the ranks."""
    strategy: Literal["auto", "ddp", "fsdp", "hsdp"] = "auto"
    """auto and ddp keep a copy of the model on each device, fsdp shards it over all of them (trainer=fsdp), and hsdp
    over those of each node."""
    precision: Literal["32-true", "bf16-mixed", "16-mixed", "bf16-true"] | None = None
    """The number formats of weights and computation; 32, bf16 and 16 are short for the first three. null takes
    bf16-mixed on GPUs that have it, else 32-true."""
    max_epochs: int | None = None
    """Passes over the training blocks."""
    max_steps: Annotated[int, Ge(1)] | Literal[-1] | None = None
    """Optimizer steps; -1 and null go by trainer.max_epochs."""
    accumulate_grad_batches: Annotated[int, Ge(1)] = 1
    """Batches per optimizer step; batch_size counts the blocks of all of them."""
    gradient_clip_val: Annotated[float, Ge(0)] | None = None
    """The largest norm of the gradients; null does not clip them."""
    val_check_interval: Annotated[int, Ge(1)] | Annotated[float, Gt(0)] = 1.0
    """The distance between validations: a whole number counts optimizer steps (100), another one epochs (1.0)."""
    log_every_n_steps: Annotated[int, Ge(1)] = 10
    """The number of optimizer steps between logged losses."""


@dataclass
class Validation:
    """The keys of the block validation."""

    max_documents: Annotated[int, Ge(1)] | None = None
    """Held-out documents that validations look at, always the same; null takes all. The last one looks at all."""


@dataclass
class Budget:
    """The keys of the block budget, at most one of which says how long a run trains."""

    tokens: Annotated[float, Gt(0), Lt(1e30)] | None = None
    """Tokens that the model is trained on; those of later epochs count again."""
    tokens_per_parameter: Annotated[float, Gt(0), Lt(1e30)] | None = None
    """Such tokens for each parameter of the model, embeddings included."""
    flops: Annotated[float, Gt(0), Lt(1e30)] | None = None
    """Floating-point operations of all forward and backward passes."""
    hours: Annotated[float, Gt(0), Lt(1e6)] | None = None
    """Hours of the whole run, validations included, at the speed of a short run before it."""


@dataclass
class Warmup:
    """The keys of the blocks batch_warmup and block_warmup; a warm-up has both keys."""

    initial: Annotated[int, Ge(1)] | None = None
    """The blocks of the first step, which grow to batch_size; or the tokens of its rows, which grow to
    preprocess.block_size."""
    steps: Annotated[int, Ge(1)] | None = None
    """The number of steps of the warm-up."""


@dataclass
class Push:
    """The keys of the block logger that name no logger: the push of a finished run to the Hugging Face hub."""

    push: str | None = None
    """Repository on the hub, OWNER/NAME; null pushes nothing."""
    push_license: str | None = None
    """The licence of the model, as the hub names it: apache-2.0, mit, cc-by-4.0, other."""
    push_private: bool = False
    """Make it a repository that only its owner sees."""
    push_series: bool = False
    """Push the series of models too."""
