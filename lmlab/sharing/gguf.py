"""Exports models to GGUF, the format of llama.cpp, by its package `gguf`.

Shapes: D rows of a matrix, H heads.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from lmlab.errors import UserError, out_of_memory
from lmlab.models.formats import load_config, load_tokenizer, located_weights
from lmlab.sharing.check import largest_difference, sample_texts

if TYPE_CHECKING:
    import gguf

FILE = "model.gguf"
ARCHITECTURES = ("gpt2", "llama", "qwen2", "qwen3")
"""The architectures whose weights and config can be written, by the names that transformers and GGUF both have."""
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
"""The types of tokens in a file."""


def write(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> float:
    """Writes a model with its tokenizer to a file in a new folder, in float32, and checks it as transformers reads it.

    Returns:
        the largest difference between the logits of what is read and those of the model.

    Raises:
        UserError: the file can't hold such a model or tokenizer, or what is read is another one.
    """
    check(model)
    import gguf

    folder.mkdir(parents=True)
    path = folder / FILE
    writer = gguf.GGUFWriter(path, model.config.model_type)
    add_config(writer, model)
    add_tokenizer(writer, tokenizer, len(model.get_input_embeddings().weight))
    add_weights(writer, model)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    name = str(path)
    theirs = load_tokenizer(name)
    for text in sample_texts():
        if theirs(text).input_ids != tokenizer(text, verbose=False).input_ids:
            raise UserError(
                "the tokenizer that is read from the file cuts text in another way than the model's own.\n"
                "Nothing was written: GGUF can't hold this tokenizer."
            )
    try:
        read = AutoModelForCausalLM.from_pretrained(**located_weights(name), config=load_config(name)).eval()
    except RuntimeError as error:
        if out_of_memory(error):
            raise
        raise UserError(
            f"transformers expects weights of other sizes in a GGUF file with this {model.config.model_type}.\n"
            "Nothing was written, as what can't be read back can't be checked. Export to ONNX."
        ) from error
    return largest_difference(model, tokenizer, lambda inputs: read(**inputs).logits)


def check(model: PreTrainedModel) -> None:
    """Refuses a model that llama.cpp would not compute as transformers does.

    Raises:
        UserError: says what it is.
    """
    config = model.config
    causal = type(model).__name__ == MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    if not causal or config.model_type not in ARCHITECTURES:
        raise UserError(
            f"{type(model).__name__} can't be written as GGUF here. Causal models of these architectures can: "
            f"{', '.join(ARCHITECTURES)}.\nFor others, use llama.cpp's convert_hf_to_gguf.py, or export to ONNX."
        )
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope != "default":
        raise UserError(f"rope_type={rope} can't be written as GGUF here: only rotary positions without scaling can.")
    if any(kind != "full_attention" for kind in getattr(config, "layer_types", None) or []):
        raise UserError("layers that see a window of positions can't be written as GGUF here.")


def add_config(writer: "gguf.GGUFWriter", model: PreTrainedModel) -> None:
    """Adds the values of a model's config under GGUF's names."""
    config = model.config
    writer.add_name(config.model_type)  # not its path, which may name a person or a machine
    writer.add_file_type(0)  # all in float32
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    if config.model_type == "gpt2":
        writer.add_feed_forward_length(config.n_inner or 4 * config.hidden_size)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
    else:
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
        writer.add_rope_dimension_count(width)
        writer.add_key_length(width)
        writer.add_value_length(width)


def add_tokenizer(writer: "gguf.GGUFWriter", tokenizer: PreTrainedTokenizerBase, rows: int) -> None:
    """Adds a byte-level BPE tokenizer.

    Args:
        rows: the rows of the model's embedding; one without a token gets a placeholder that occurs in no text.

    Raises:
        UserError: the tokenizer is of another kind.
    """
    parts = json.loads(tokenizer.backend_tokenizer.to_str()) if tokenizer.is_fast else {}
    splits = pre_tokenizer(parts.get("pre_tokenizer") or {})
    if parts.get("model", {}).get("type") != "BPE" or splits is None:
        raise UserError(
            "the tokenizer can't be written as GGUF here: only byte-level BPE can, as tokenizer=bpe trains, and as "
            "those of GPT-2, Llama 3 and Qwen are.\nExport to ONNX, which takes any."
        )
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in parts["model"]["merges"]]
    if not merges:
        raise UserError("the tokenizer has no merges, without which GGUF files can't be read.\nExport to ONNX.")
    special = {*tokenizer.all_special_ids}
    added = {*tokenizer.added_tokens_decoder} - special
    names = {number: token for token, number in tokenizer.get_vocab().items()}
    types = dict.fromkeys(names, NORMAL) | dict.fromkeys(added, USER_DEFINED) | dict.fromkeys(special, CONTROL)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(splits)
    writer.add_token_list([names.get(number, f"[PAD{number}]") for number in range(rows)])
    writer.add_token_types([types.get(number, UNUSED) for number in range(rows)])
    writer.add_token_merges(merges)
    for kind, add in [
        ("bos", writer.add_bos_token_id),
        ("eos", writer.add_eos_token_id),
        ("unk", writer.add_unk_token_id),
        ("pad", writer.add_pad_token_id),
    ]:
        number = getattr(tokenizer, f"{kind}_token_id")
        if number is not None:
            add(number)
    ids = tokenizer("a").input_ids
    writer.add_add_bos_token(ids[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(ids[-1] == tokenizer.eos_token_id)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def pre_tokenizer(block: dict[str, Any]) -> str | None:
    """Returns llama.cpp's name for the way in which a byte-level tokenizer splits text; None if it has none.

    Args:
        block: the entry `pre_tokenizer` of its `tokenizer.json`.
    """
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    parts = block.get("pretokenizers", [block])
    if not any(part.get("type") == "ByteLevel" and not part["add_prefix_space"] for part in parts):
        return None
    patterns = [part["pattern"].get("Regex") for part in parts if part.get("type") == "Split"]
    if not patterns:
        return "gpt-2" if len(parts) == 1 and block.get("use_regex", True) else None
    return next((name for name, regex in GGUF_PRE_TOKENIZER_SPLITS.items() if [regex] == patterns), None)


def add_weights(writer: "gguf.GGUFWriter", model: PreTrainedModel) -> None:
    """Adds the weights under GGUF's names, as llama.cpp lays them out."""
    import gguf

    config, layout = model.config, layout_of(model)
    architecture = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}[config.model_type]
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue  # a reader takes the embedding's
        theirs = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if theirs is None:
            raise UserError(f"GGUF's {config.model_type} has no weight {name}: the model can't be written.")
        writer.add_tensor(theirs, np.ascontiguousarray(layout(name, weight.float().cpu().numpy())))


def layout_of(model: PreTrainedModel) -> Callable[[str, np.ndarray], np.ndarray]:
    """Returns a function that lays out a weight, by its name in transformers, as llama.cpp has it.

    GPT-2's matrices are transposed in transformers (`Conv1D`). Llama's rotary positions turn pairs of rows that stand
    beside each other in llama.cpp, and half a head apart in transformers.
    """
    config = model.config
    if config.model_type == "gpt2":
        transposed = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
        return lambda name, weight: weight.T if name.endswith(transposed) else weight
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}

    def paired(name: str, weight: np.ndarray) -> np.ndarray:
        count = next((number for part, number in heads.items() if f".{part}." in name), None)
        if config.model_type != "llama" or count is None:
            return weight
        halves = weight.reshape(count, 2, -1, *weight.shape[1:])  # [H, 2, D / H / 2, …]
        return halves.swapaxes(1, 2).reshape(weight.shape)

    return paired
