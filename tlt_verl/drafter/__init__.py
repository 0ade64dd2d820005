"""The drafter: its layouts, checkpoints, and its making from a target. Knows neither verl nor sglang."""
