"""`tlt-verl warmup`: a drafter for a target and a set of prompts, made offline with the parts that a run uses."""
