"""Figures from a run's log. Knows the log's format and nothing else of ours."""
