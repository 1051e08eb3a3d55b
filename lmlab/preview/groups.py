"""The parameter groups of a run: what holds for the parameters whose names match each pattern."""

from omegaconf import DictConfig
from transformers import PreTrainedTokenizerBase

from lmlab.config import build
from lmlab.config.models import model_without_weights
from lmlab.console import show_rows


def show_groups(cfg: DictConfig, tokenizer: PreTrainedTokenizerBase, auto_class: str) -> None:
    """Prints the groups of parameters that differ, if there are several and the model can be made without weights.

    Args:
        auto_class: the class of transformers that the objective wants, such as "AutoModelForCausalLM".
    """
    if not cfg.optim.get("groups") and not cfg.optim.get("base_width"):
        return
    model = model_without_weights(cfg, tokenizer, auto_class)
    if model is not None:
        rows = []
        for group in build.parameter_groups(cfg, model):
            rate, decay = (f"{group[key]:g}" for key in ("lr", "weight_decay"))
            held = ["frozen", ""] if group["freeze"] else [rate, decay]
            rows.append([group["pattern"] or "all others", f"{group['parameters']:,}", *held])
        show_rows("Parameter groups", ["pattern", "parameters", "lr", "weight decay"], rows)
