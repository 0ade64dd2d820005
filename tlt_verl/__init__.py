"""tlt_verl: lossless speculative rollouts and spot drafter training for stock verl.

Importing this package imports nothing heavy: verl, sglang and torch are imported by the rooms that need them.
"""

__version__ = "0.1.0"
