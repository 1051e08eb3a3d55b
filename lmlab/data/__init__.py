"""Data: sources of records, their texts, tokens and blocks, and the batches made of them."""
