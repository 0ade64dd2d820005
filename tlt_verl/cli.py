"""The command `tlt-verl`. Knows its subcommands' names and arguments; each is imported when it is asked for."""

from __future__ import annotations

import argparse
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns its exit status. Unknown ones end with status 2 and the list of those that exist."""
    arguments = _parser().parse_args(argv)
    from tlt_verl import doctor

    return doctor.main(as_json=arguments.json)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tlt-verl", description="tlt_verl: lossless speculative rollouts for verl.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    doctor = commands.add_parser(
        "doctor",
        help="say whether a run with rollout.name=tlt would start here, and if not, why",
        description="Versions, seams into verl, sglang, megatron and mbridge, plugins, devices, NVML, shared memory. "
        "Exit status 0 when a run with rollout.name=tlt would start here, 1 otherwise.",
    )
    doctor.add_argument("--json", action="store_true", help="the same as one JSON object")
    return parser
