"""Exports models to ONNX, by the exporter of transformers.

Shapes: B texts, T tokens of the longest of them, V vocabulary.
"""

import logging
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lmlab.errors import UserError, first_line, out_of_memory
from lmlab.sharing.check import Inputs, largest_difference, model_inputs, sample_texts

FILE = "model.onnx"
TRIED = ("bart", "bert", "gpt2", "llama", "modernbert", "qwen3", "roberta", "t5")
"""Architectures that were exported with the tested versions of torch and transformers. Others may work as well."""


def write(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> float:
    """Writes a model with its config and its tokenizer to a new folder, and checks what was written by onnxruntime.

    The graph takes `input_ids` and `attention_mask` [B, T] of any B and T, an encoder-decoder also `decoder_input_ids`,
    and returns `logits` [B, T, V]. It keeps no keys and values from one call to the next.

    Returns:
        the largest difference between its logits and those of the model.

    Raises:
        UserError: the exporter can't export the model, or its logits are others.
    """
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

    inputs = model_inputs(model, tokenizer, sample_texts()[:2])
    axes = dict.fromkeys((0, 1), torch.export.Dim.DYNAMIC)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(StringIO()):  # torch prints each of its steps
            warnings.simplefilter("ignore")
            exported = OnnxExporter().export(
                model, {**inputs, "use_cache": False}, config=OnnxConfig(dynamic_shapes=dict.fromkeys(inputs, axes))
            )
    except Exception as error:  # torch's and transformers' code may raise anything for code that can't be traced
        if out_of_memory(error):
            raise
        raise UserError(
            f"transformers' exporter can't write {model.config.model_type} as ONNX: {first_line(error)}\n"
            f"It can write {', '.join(TRIED)}, and others that are like them."
        ) from error
    for value in exported.program.graph.inputs:
        value.shape = type(value.shape)(["batch", "decoder_sequence" if "decoder" in value.name else "sequence"])
    exported.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return largest_difference(model, tokenizer, reader(folder))


def reader(folder: Path) -> Callable[[Inputs], Tensor]:
    """Returns a function that gives the logits [B, T, V] of a graph in a folder."""
    import onnxruntime

    session = onnxruntime.InferenceSession(folder / FILE, providers=["CPUExecutionProvider"])

    def logits(inputs: Inputs) -> Tensor:
        return torch.from_numpy(session.run(["logits"], {name: ids.numpy() for name, ids in inputs.items()})[0])

    return logits
