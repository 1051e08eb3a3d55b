"""What a run will cost and see, before it is begun."""
