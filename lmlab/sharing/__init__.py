"""Shares finished runs: the card that describes a model, and the push to the Hugging Face hub."""
