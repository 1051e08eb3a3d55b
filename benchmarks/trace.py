"""Steps of training and validations on a GPU that is not there, and what they would take on one.

  python -m benchmarks.trace                                   GPT-2 124M, 32 × 1024, bf16
  python -m benchmarks.trace objective=mlm size=distil batch_size=64 block_size=512

Keys, with their defaults:

  objective=clm         clm, mlm
  size=gpt2             tiny, small, distil, gpt2
  batch_size=32         blocks of a step
  block_size=0          positions of a block; 0: 16, 64, 128 or 1024, by size
  accumulate=1          micro batches of a step
  chunk=0               scored positions whose logits are held at once; 0: lmlab's choice
  checkpointing=false   activations that the backward pass computes again: true for all, selective for cheap ones
  precision=bf16-mixed  bf16-mixed, 16-mixed
  adapter=none          none, lora, qlora, of rank 8 beside all linear layers of the repeated layers
  documents=0           tokens of each document, where they do not see one another; 0: each block is one text

torch's fake tensors have a device and a shape, and no content, so `Trainer.fit` takes the path that it takes on a GPU,
in a few seconds on any machine, with the callbacks of a run but for what they write. The command fails where a step or
a batch of a validation makes the host wait for the device, copies from memory that is not pinned, mixes devices, or
does not use flash attention though nothing has to be masked. What is done once a validation, a report or a checkpoint
may wait, and is not watched. The time is an estimate: of each operation the longer of its arithmetic and of the bytes
that it reads and writes, at the rates of an H100.

It changes torch for the rest of the process, and needs Linux and a build of torch for CPUs.
"""

import ctypes
import importlib
import os
import sys
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal
from unittest.mock import patch

import lightning as L
import numpy as np
import torch
import torch._subclasses.fake_tensor as fake
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from benchmarks.arguments import Arguments
from benchmarks.pairs import workplace
from benchmarks.train import SIZES, SPECIAL, Sized, make_model, make_tokenizer, vocabulary_of
from lmlab.console import duration, show_rows
from lmlab.data.blocks import Blocks
from lmlab.data.datamodule import BlocksDataModule
from lmlab.data.documents import Documents
from lmlab.data.preprocess import group_texts
from lmlab.data.tokens import DocumentEdges, FlatFile, FlatFiles
from lmlab.errors import shown_plainly
from lmlab.evaluation.certify import silence_lightning
from lmlab.evaluation.rows import WindowRows
from lmlab.evaluation.scoring import HeldOut
from lmlab.evaluation.windows import Context, windows
from lmlab.models import adapters, chunked_loss, efficiency
from lmlab.models.flops import Flops
from lmlab.objectives.clm import CausalLM
from lmlab.objectives.mlm import MaskedLM
from lmlab.optim import AdamW
from lmlab.training.callbacks import ShowProgress
from lmlab.training.checkpoint import Checkpoints
from lmlab.training.checkpoint_io import AtomicCheckpointIO
from lmlab.training.measure import Measure
from lmlab.training.module import LMModule

STEPS, VAL_INTERVAL = 4, 2
"""Steps that are made, and those from one validation to the next; the first step, which allocates, is not counted."""
FLOPS_PER_SECOND = {"bf16": 620e12, "float32": 51e12}
BYTES_PER_SECOND = 2.6e12
"""Rates that an H100 SXM reaches in large products and in passes over memory."""
PEAK = 989.4e12
"""Floating-point operations per second in bf16 that its maker states (NVIDIA H100 data sheet), for its utilization."""


@dataclass
class Settings(Sized, Arguments):
    objective: Literal["clm", "mlm"] = "clm"
    size: Literal["tiny", "small", "distil", "gpt2"] = "gpt2"
    batch_size: int = 32
    block_size: int = 0
    accumulate: int = 1
    chunk: int = 0
    checkpointing: Literal["false", "true", "selective"] = "false"
    precision: Literal["bf16-mixed", "16-mixed"] = "bf16-mixed"
    adapter: Literal["none", "lora", "qlora"] = "none"
    documents: int = 0


ANSWERS: dict[str, Any] = {
    "is_available": True,
    "device_count": 1,
    "current_device": 0,
    "is_initialized": True,
    "get_device_capability": (9, 0),
    "get_device_name": "NVIDIA H100 80GB HBM3",
    "is_bf16_supported": True,
    "max_memory_allocated": 0,
    "get_rng_state": torch.get_rng_state(),
    "get_rng_state_all": [],
}
"""The values that functions of `torch.cuda` return."""
IGNORED = (
    *("set_device", "empty_cache", "manual_seed_all", "reset_peak_memory_stats"),
    *("set_rng_state", "set_rng_state_all", "_lazy_init"),
)
"""Functions of `torch.cuda` that do nothing."""


def install_hooks() -> tuple[Any, ...]:
    """Gives autograd the hooks and the device guard of CUDA, which a build for CPUs lacks: they do nothing.

    Returns:
        What has to stay in memory.
    """
    c10, torch_cpu = (ctypes.CDLL(f"{torch.__path__[0]}/lib/lib{name}.so") for name in ("c10", "torch_cpu"))
    get_hooks = torch_cpu._ZN2at6detail12getCUDAHooksEv
    word = get_hooks.restype = ctypes.c_void_p
    hooks = word.from_address(get_hooks())
    # A copy of its virtual functions, in the order of AcceleratorHooksInterface.h.
    functions = (word * 96)(*(word * 96).from_address(hooks.value))
    no, yes = functions[2], ctypes.cast(ctypes.pythonapi.Py_IsInitialized, word).value
    functions[2], functions[3], functions[4] = yes, yes, no  # isBuilt, isAvailable, hasPrimaryContext
    hooks.value = ctypes.addressof(functions)
    # A guard that counts 0 devices: torch puts one that does nothing in its place.
    counts_none = (word * 32)(*[no] * 32)
    guard = word(ctypes.addressof(counts_none))
    registry = (word * 2).in_dll(c10, "_ZN3c104impl26device_guard_impl_registryE")
    registry[1] = ctypes.addressof(guard)
    torch._C._ensureCUDADeviceGuardSet()
    return functions, counts_none, guard


@dataclass
class Work:
    """The operations of all watched steps, or of all batches of validations."""

    times: int = 0
    """How many steps, or batches."""
    operations: Counter[str] = field(default_factory=Counter)
    waits: Counter[str] = field(default_factory=Counter)
    """Those for which the host waits."""
    bytes: Counter[str] = field(default_factory=Counter)
    """Read and written, by the kind of operation; views move nothing."""
    flops: Counter[str] = field(default_factory=Counter)
    seconds: Counter[str] = field(default_factory=Counter)
    """At `FLOPS_PER_SECOND` and `BYTES_PER_SECOND`, whichever takes longer."""

    def row(self, name: str, kinds: Iterable[str]) -> list[str]:
        """Returns the cells of the table for the operations of some kinds, of one step or batch."""
        counters = (self.bytes, self.flops, self.seconds)
        moved, flops, seconds = (sum(counter[kind] for kind in kinds) / self.times for counter in counters)
        return [name, f"{moved / 1e9:,.1f} GB", f"{flops / 1e12:,.2f} TFLOP", duration(seconds)]


class Watch(TorchDispatchMode):
    """Counts the operations by their kind, those for which the host waits, and the memory in use."""

    def __init__(self, vocabulary: int, width: int) -> None:
        """Names the sizes by which the logits are known: rows of the head's matrix, and its columns."""
        super().__init__()
        self.vocabulary, self.width = {vocabulary, vocabulary + -vocabulary % chunked_loss.ALIGNMENT}, width
        self.steps, self.validations = Work(), Work()
        self.work: Work | None = None
        """What operations are counted to; None where they are not watched."""
        self.storages: set[int] = set()
        """The pieces of the device's memory that are in use."""
        self.in_use = self.most_in_use = 0
        """Their bytes, now and at most."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = function.__name__.split(".")[0], kwargs or {}
        if name == "_local_scalar_dense" and args[0].constant is None:
            result: Any = True if args[0].dtype == torch.bool else 1
        else:
            result = True if name in ("equal", "allclose") else function(*args, **kwargs)
        self.keep_account(result)
        if self.work:
            self.work.operations[name] += 1
            self.work.waits[name] += self.makes_the_host_wait(name, args, kwargs)
            self.count(self.work, function, args, kwargs, result)
        return result

    def synchronize(self, device: Any = None) -> None:
        """Stands in for `torch.cuda.synchronize`."""
        if self.work:
            self.work.waits["synchronize"] += 1

    def keep_account(self, result: Any) -> None:
        """Adds the memory of new tensors to what is in use, and takes it off again when it is freed."""
        for value in tree_leaves(result):
            if torch.is_tensor(value) and value.device.type == "cuda":
                storage = value.untyped_storage()
                if storage._cdata not in self.storages:
                    self.storages.add(storage._cdata)
                    self.in_use += storage.nbytes()
                    weakref.finalize(storage, self.free, storage._cdata, storage.nbytes())
        self.most_in_use = max(self.most_in_use, self.in_use)

    def free(self, storage: int, size: int) -> None:
        """Takes the memory of a storage off what is in use."""
        self.storages.remove(storage)
        self.in_use -= size

    @staticmethod
    def makes_the_host_wait(name: str, args: Any, kwargs: Any) -> bool:
        """Returns whether the host needs the result of an operation, or a copy to be finished, before it goes on."""
        source = args[0] if args and torch.is_tensor(args[0]) else None
        if source is None:
            return False
        if source.device.type == "cuda":
            if name in ("_local_scalar_dense", "nonzero", "masked_select", "equal"):
                return True
            if name == "index":  # a mask is counted first
                return any(index is not None and index.dtype == torch.bool for index in args[1])
        device, asynchronous = kwargs.get("device"), kwargs.get("non_blocking")
        if name == "copy_":
            device, source, asynchronous = source.device, args[1], len(args) > 2 and args[2]
        if device is None or torch.device(device).type == source.device.type:
            return False
        return not (asynchronous and getattr(source, "pinned", False))

    def count(self, work: Work, function: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Adds the bytes, operations and time of one call."""
        given = {key: value for key, value in kwargs.items() if key != "out"}
        read = [value for value in tree_leaves((args, given)) if torch.is_tensor(value)]
        written = [value for value in tree_leaves(result) if torch.is_tensor(value)]
        in_place = ("_foreach", "_fused", "_amp_foreach")  # they write what they read
        if not written and function.__name__.startswith(in_place):
            written = read
        if moves_nothing(function) or all(value.device.type == "cpu" for value in written):
            return
        known = flop_registry.get(function.overloadpacket)
        # The formula of addmm takes no dtype of the result.
        factors = [value for value in args if not isinstance(value, torch.dtype)]
        flops = known(*factors, **given, out_val=result) if known else 0
        moved = sum(value.numel() * value.element_size() for value in [*read, *written])
        kind = "loss" if any(map(self.are_logits, [*read, *written])) else kind_of(function.__name__, flops)
        half = any(value.dtype in (torch.bfloat16, torch.float16) for value in read)
        work.bytes[kind] += moved
        work.flops[kind] += flops
        work.seconds[kind] += max(moved / BYTES_PER_SECOND, flops / FLOPS_PER_SECOND["bf16" if half else "float32"])

    def compiled_nll_and_slope(
        self, logits: torch.Tensor, targets: torch.Tensor, dtype: Any, scale: Any, z_loss: float = 0.0
    ) -> Any:
        """Stands in for the compiled function, which no trace sees into: it reads the logits twice, and writes once."""
        if self.work:
            moved = (2 + (dtype is not None)) * logits.numel() * logits.element_size()
            self.work.bytes["loss"] += moved
            self.work.seconds["loss"] += moved / BYTES_PER_SECOND
        nll = logits.new_empty(len(logits), dtype=torch.float32)
        return nll, None if dtype is None else torch.empty_like(logits, dtype=dtype)

    def are_logits(self, value: torch.Tensor) -> bool:
        """Returns whether a tensor holds a number for each token of the vocabulary at some positions."""
        return value.ndim > 1 and not self.vocabulary.isdisjoint(value.shape) and self.width not in value.shape


def moves_nothing(function: Any) -> bool:
    """Returns whether an operation moves nothing."""
    return function.is_view or function.__name__.startswith(("_unsafe_view", "empty", "new_empty"))


def kind_of(name: str, flops: int) -> str:
    """Returns what kind of work an operation is, for the table."""
    if "attention" in name:
        return "attention"
    if flops:
        return "products"
    return "optimizer" if "adam" in name else "elementwise"


class WatchBatches(L.Callback):
    """Has the watch count all steps but the first, which allocates, and all batches of validations."""

    def __init__(self, watch: Watch):
        self.watch = watch

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        self.watch.work = self.watch.steps if trainer.global_step > 0 else None

    def on_before_zero_grad(self, *args: Any) -> None:
        if self.watch.work:
            self.watch.work.times += 1

    def on_validation_batch_start(self, *args: Any) -> None:
        self.watch.work = self.watch.validations
        self.watch.work.times += 1

    def stop(self, *args: Any) -> None:
        """Has the watch count nothing."""
        self.watch.work = None

    on_validation_start = on_validation_epoch_end = on_train_end = stop


def apply(self: torch.nn.Module, function: Any, recurse: bool = True) -> torch.nn.Module:
    """Stands in for `Module._apply`, which would swap the content of tensors: fake ones have none."""
    made: dict[Any, torch.nn.Parameter] = {}
    for owner in self.modules():
        for name, parameter in owner._parameters.items():
            if parameter is not None:
                owner._parameters[name] = made.setdefault(
                    parameter, torch.nn.Parameter(function(parameter.detach()), parameter.requires_grad)
                )
        for held, names in ((owner._buffers, owner._buffers), (vars(owner), getattr(owner, "_defaults", ()))):
            held.update({name: function(held[name]) for name in names if torch.is_tensor(held.get(name))})
    return self


def pin_memory(tensor: torch.Tensor, *args: Any) -> torch.Tensor:
    """Stands in for `Tensor.pin_memory`."""
    tensor.pinned = True  # type: ignore[attr-defined]
    return tensor


def numpy(tensor: torch.Tensor, *args: Any, numpy: Any = torch.Tensor.numpy, **options: Any) -> Any:
    """Stands in for `Tensor.numpy`: all numbers that come from the device are 1."""
    return np.ones(tensor.shape) if isinstance(tensor, fake.FakeTensor) else numpy(tensor, *args, **options)


def attention(query: Any, key: Any, value: Any, attn_mask: Any = None, dropout_p: float = 0.0, **options: Any) -> Any:
    """Stands in for `scaled_dot_product_attention` on a GPU, which takes flash attention where there is no mask."""
    query, key, value = (x.to(torch.get_autocast_dtype("cuda")) for x in (query, key, value))  # as autocast does
    if attn_mask is not None:
        efficient = torch.ops.aten._scaled_dot_product_efficient_attention
        bias = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(attn_mask.logical_not(), -torch.inf)
        bias = bias.expand(-1, query.shape[1], -1, -1)
        return efficient(query, key, value, bias, torch.is_grad_enabled(), dropout_p)[0]
    flash = torch.ops.aten._scaled_dot_product_flash_attention
    return flash(query, key, value, dropout_p, options.get("is_causal", False), False, scale=options.get("scale"))[0]


@contextmanager
def fake_cuda(vocabulary: int, width: int) -> Iterator[Watch]:
    """Makes torch believe that it has a GPU, for the rest of the process; the arguments are those of `Watch`."""
    watch = Watch(vocabulary, width)
    kept = install_hooks()
    replaced: list[tuple[Any, str, Any]] = [
        *((torch.cuda, name, lambda *args, answer=answer, **options: answer) for name, answer in ANSWERS.items()),
        *((torch.cuda, name, lambda *args, **options: None) for name in IGNORED),
        (torch.cuda, "default_generators", (torch.Generator(),)),
        (torch.cuda, "synchronize", watch.synchronize),
        (fake, "init_gpu_context", lambda device: None),
        (fake.FakeTensorMode, "avoid_device_init", True),
        (torch.nn.Module, "_apply", apply),
        (torch.Tensor, "pin_memory", pin_memory),
        (torch.Tensor, "__deepcopy__", lambda tensor, memo: tensor.detach().clone()),
        (torch.Tensor, "numpy", numpy),
        (Checkpoints, "save", lambda *args: None),
        (LMModule, "refuse_bad_batch", lambda *args: None),
        (torch.nn.functional, "scaled_dot_product_attention", attention),
        (chunked_loss, "compiled_nll_and_slope", lambda device: watch.compiled_nll_and_slope),
    ]
    with ExitStack() as stack:
        for owner, name, value in replaced:
            stack.enter_context(patch.object(owner, name, value))
        stack.enter_context(fake.FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(watch)
        yield watch
    del kept


def trace(settings: Settings) -> tuple[Watch, float]:
    """Trains for `STEPS` steps; returns what they did, and the floating-point operations that a step needs."""
    vocabulary = vocabulary_of(settings.size, settings.causal)
    tokenizer = make_tokenizer(vocabulary)
    if settings.adapter != "none":
        importlib.import_module("peft")  # before there seems to be a GPU, which bitsandbytes looks for
    count = (STEPS + 1) * settings.batch_size
    ids = np.random.default_rng(0).integers(len(SPECIAL), vocabulary, count * settings.positions).astype(np.int32)
    with workplace() as folder, fake_cuda(vocabulary, SIZES[settings.size][1]) as watch:
        ids.tofile(folder / "tokens")
        edges = None
        if settings.documents:
            np.full(len(ids) // settings.documents + 1, settings.documents).tofile(folder / "lengths")
            edges = DocumentEdges(FlatFiles(FlatFile(folder / "lengths", "int64")))
        bounds = group_texts(np.array([len(ids)]), settings.positions)
        blocks = Blocks(FlatFiles(FlatFile(folder / "tokens")), bounds, document_edges=edges)
        objective = CausalLM() if settings.causal else MaskedLM(tokenizer)
        model: Any = make_model(tokenizer, settings.size, settings.causal, settings.positions)
        if settings.adapter != "none":
            quantization = "nf4" if settings.adapter == "qlora" else None
            given = {"base": None, "revision": None, "auto_class": objective.auto_class, "seed": 0}
            adapters.lora(model=model, targets="all-linear", quantization=quantization, **given)
        efficiency.fuse_activations(model)
        if settings.checkpointing != "false":
            efficiency.checkpoint_activations(model, settings.checkpointing == "selective")
        # A batch of whole blocks, and one whose last row is padded.
        shown = ids[: (2 * settings.batch_size - 1) * settings.positions + 2]
        held_out = hold_out(shown, settings.positions, objective, settings.documents)
        module = LMModule(
            model,
            AdamW(),
            steps=STEPS + 1,
            batch_size=settings.batch_size,
            block_size=settings.positions,
            seed=0,
            sums=held_out.sums(),
            metric=objective.metric,
            logits_chunk_size=chunked_loss.logits_chunk_size(model, settings.chunk or None, True),
            val_interval=VAL_INTERVAL,
        )
        datamodule = BlocksDataModule(
            blocks,
            held_out,
            objective,
            1,
            settings.batch_size,
            STEPS + 1,
            0,
            accumulate=settings.accumulate,
        )
        silence_lightning()
        trainer = L.Trainer(
            accelerator="gpu",
            devices=1,
            precision=settings.precision,
            max_epochs=1,
            max_steps=STEPS,
            gradient_clip_val=1.0,
            accumulate_grad_batches=settings.accumulate,
            val_check_interval=VAL_INTERVAL * settings.accumulate,
            check_val_every_n_epoch=None,
            num_sanity_val_steps=0,
            callbacks=[WatchBatches(watch), ShowProgress(0.0), Checkpoints(str(folder), keep_best=0), Measure()],
            plugins=[AtomicCheckpointIO()],
            log_every_n_steps=100,
            logger=False,
            use_distributed_sampler=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, datamodule)
        flops = Flops.from_model(model)
        assert flops is not None
        tokens = settings.batch_size * settings.positions
        targets = settings.batch_size * (settings.positions - 1) if settings.causal else round(0.15 * tokens)
    return watch, flops.step(tokens, targets, settings.positions)


def hold_out(ids: np.ndarray, positions: int, objective: Any, length: int) -> HeldOut:
    """Returns the blocks of ids, of which the last one may be short, as held-out rows.

    Args:
        length: the number of tokens of each document, where they do not see one another; 0: there is one document.
    """
    edges = np.append(np.arange(0, len(ids), length or len(ids)), len(ids))
    names = [*map(str, range(len(edges) - 1))]
    spans = np.ones((len(ids), 5), np.int32)
    documents = Documents(ids, spans, edges, edges, names, [0] * len(names), [""] * len(names), "")
    bounds = group_texts(documents.lengths, positions)
    context = Context("blocks", positions, document_attention=length > 0)
    shown = windows(context, documents, bounds, objective, None)
    return HeldOut(WindowRows(documents, shown, objective, 0), pad_id=1, facts={})


def show(watch: Watch, needed: float, documents: bool) -> None:
    """Prints the work of a step by its kind, and that of a batch of a validation; fails if the host waited.

    Args:
        documents: whether documents do not see one another.
    """
    steps, validations = watch.steps, watch.validations
    rows = [steps.row(kind, [kind]) for kind, _ in steps.seconds.most_common()]
    rows += [steps.row("a step", steps.seconds), validations.row("a batch of a validation", validations.seconds)]
    show_rows("Trace", ("", "read and written", "computed", "estimate"), rows)
    print(f"{watch.most_in_use / 2**30:.1f} GiB of memory at most, without what an allocator leaves unused.")
    print(f"{needed * steps.times / steps.seconds.total() / PEAK:.0%} of the peak of an H100 would be used.")
    for work, name in ((steps, "a step"), (validations, "a batch of a validation")):
        assert not +work.waits, f"in {name} the host waits for the device: {dict(+work.waits)}"
    assert steps.operations["_fused_adamw_"], "no _fused_adamw_ in a step"
    kind, other = ("efficient", "flash") if documents else ("flash", "efficient")  # the former takes a mask
    assert not steps.operations[f"_scaled_dot_product_{other}_attention"], f"{other} attention in a step"
    assert steps.operations[f"_scaled_dot_product_{kind}_attention_backward"], f"no {kind} attention in a step"
    assert validations.operations[f"_scaled_dot_product_{kind}_attention"], f"no {kind} attention in a validation"


def main() -> None:
    with shown_plainly():
        if {"--help", "-h"} & set(sys.argv[1:]):
            print(__doc__)
            return
        settings = Settings.parse(sys.argv[1:])
        show(*trace(settings), documents=settings.documents > 0)
        sys.stdout.flush()
        os._exit(0)  # autograd's thread for the device would not end by itself


if __name__ == "__main__":
    main()
