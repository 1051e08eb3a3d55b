"""A discriminator and the generator that it is trained with, as one model (ELECTRA, Clark et al. 2020).

Shapes: B rows, T positions, V vocabulary.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import ElectraPreTrainedModel, PreTrainedModel

GENERATOR = "generator"
"""The folder of the generator in that of an exported discriminator."""


class GeneratorAndDiscriminator(ElectraPreTrainedModel):  # type: ignore[misc]
    """A generator, which fills in hidden tokens, and a discriminator, which tells these from the tokens of the text.

    Called as a model it is the generator, a masked model. Its config, and what is exported, are those of the
    discriminator; the generator is exported into a folder beside the weights.
    """

    def __init__(self, generator: PreTrainedModel, discriminator: PreTrainedModel, share_embeddings: bool):
        """Takes both.

        Args:
            share_embeddings: True to let the generator use the embeddings of the discriminator (section 3.2).
        """
        super().__init__(discriminator.config)
        if share_embeddings:
            generator.base_model.embeddings = discriminator.base_model.embeddings
            generator.tie_weights()
        self.generator, self.discriminator = generator, discriminator

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **unused: Any) -> Any:
        """Returns the output of the generator, with logits [B, T, V], for ids [B, T]."""
        return self.generator(input_ids=input_ids, attention_mask=attention_mask)

    def get_input_embeddings(self) -> Any:
        return self.generator.get_input_embeddings()

    def get_output_embeddings(self) -> Any:
        return self.generator.get_output_embeddings()

    def set_attn_implementation(self, attn_implementation: Any, *unused: Any) -> None:
        for half in (self.generator, self.discriminator):
            half.set_attn_implementation(attn_implementation)

    def save_pretrained(self, save_directory: Any, state_dict: dict[str, Tensor] | None = None, **unused: Any) -> None:
        """Writes the discriminator, and the generator into a folder beside its weights.

        Args:
            state_dict: the weights of both; by default their own.
        """
        state = self.state_dict() if state_dict is None else state_dict
        for name, folder in (("discriminator", ""), ("generator", GENERATOR)):
            own = {key.removeprefix(f"{name}."): tensor for key, tensor in state.items() if key.startswith(f"{name}.")}
            getattr(self, name).save_pretrained(Path(save_directory, folder), state_dict=own)


def embeddings_fit(generator: PreTrainedModel, discriminator: PreTrainedModel, values: bool) -> bool:
    """Returns whether the embeddings of both have the same shapes and, for trained models, the same values."""
    own, other = (dict(half.base_model.embeddings.named_parameters()) for half in (generator, discriminator))
    if {name: p.shape for name, p in own.items()} != {name: p.shape for name, p in other.items()}:
        return False
    return not values or all(torch.equal(p, other[name]) for name, p in own.items())
