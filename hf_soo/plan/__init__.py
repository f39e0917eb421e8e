"""What a run will cost, predicted."""
