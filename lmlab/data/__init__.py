"""From a source of records to batches of blocks."""
