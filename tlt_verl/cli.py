"""The command `tlt-verl`. Knows its subcommands' names and arguments; each is imported when it is asked for."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns its exit status. Unknown ones end with status 2 and the list of those that exist."""
    arguments = _parser().parse_args(argv)
    if arguments.command == "doctor":
        from tlt_verl import doctor

        return doctor.main(as_json=arguments.json)
    if arguments.command == "report":
        from tlt_verl.report.command import main as report

        return report(arguments.runs, arguments.out, arguments.markdown, arguments.baseline)
    from tlt_verl.config import ConfigError
    from tlt_verl.drafter.eagle import DrafterError

    try:
        return _warmup(arguments) if arguments.command == "warmup" else _export(arguments)
    except (ConfigError, DrafterError) as error:  # what to change stands in the message
        print(f"tlt-verl {arguments.command}: {error}", file=sys.stderr)
        return 2


def _warmup(arguments: argparse.Namespace) -> int:
    from tlt_verl.warmup.command import main as warmup

    given = {name: value for name, value in vars(arguments).items() if name != "command" and value is not None}
    if "engine" in given:
        given["engine"] = dict(given["engine"])
    return warmup(given)


def _export(arguments: argparse.Namespace) -> int:
    from tlt_verl.drafter.export import export_drafter

    out = export_drafter(arguments.checkpoint, arguments.target, arguments.out)
    print((out / "README.md").read_text(encoding="utf-8"))
    return 0


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
    _add_warmup(commands)
    export = commands.add_parser(
        "export",
        help="a drafter's checkpoint with everything that a serving engine wants",
        description="Writes config.json, the weights with the target's embedding, the token map, and the command line "
        "for stock SGLang.",
    )
    export.add_argument("--checkpoint", type=Path, required=True, help="a checkpoint, or a warm-up's folder/latest")
    export.add_argument("--target", type=Path, required=True, help="folder of the target")
    export.add_argument("--out", type=Path, required=True, help="folder to write")
    _add_report(commands)
    return parser


def _add_report(commands: argparse._SubParsersAction) -> None:
    report = commands.add_parser(
        "report",
        help="a page and a table of one run, or of several side by side",
        description="Reads what verl logged, prints a table in Markdown, and writes one HTML page: learning, speed, "
        "where the time goes, statistics, spot training, strategies. Nothing is fetched by the page.",
    )
    report.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="a log of verl's console output, or a folder with train.log or TensorBoard events; NAME=PATH names it",
    )
    report.add_argument("--out", type=Path, default=Path("report.html"), help="the page (report.html)")
    report.add_argument("--markdown", type=Path, metavar="FILE", help="file for the table, too")
    report.add_argument("--baseline", metavar="NAME", help="the run that the others are compared with (the first)")


def _add_warmup(commands: argparse._SubParsersAction) -> None:
    warmup = commands.add_parser(
        "warmup",
        help="a drafter for a target and a set of prompts, offline",
        description="Rolls the prompts out with the target, trains a drafter on what its forward passes computed, and "
        "measures it on held-out prompts. Run it again with the same --out to go on from the last checkpoint.",
    )
    warmup.add_argument("--target", type=Path, required=True, help="folder of the target")
    warmup.add_argument("--prompts", type=Path, required=True, help="parquet or JSON lines: prompt or messages")
    warmup.add_argument("--out", type=Path, required=True, help="folder for checkpoints, curve.csv and report.json")
    warmup.add_argument("--minutes", type=float, help="wall time of everything (10)")
    warmup.add_argument("--tokens", type=int, help="stop when so many tokens were learnt from")
    warmup.add_argument("--strategy", help="the chain that accept length is measured with (eagle:7x1@8)")
    warmup.add_argument("--hot-vocab", type=int, help="tokens that the draft head knows; 0: all (default: chosen)")
    warmup.add_argument("--batch", type=int, help="requests at a time (64)")
    warmup.add_argument("--max-new-tokens", type=int, help="of a response (512)")
    warmup.add_argument("--temperature", type=float, help="of the rollouts (1.0)")
    warmup.add_argument("--held-out", type=int, help="prompts for the measurements in the engine (64)")
    warmup.add_argument("--pack-tokens", type=int, help="rows of one training step (1536)")
    warmup.add_argument("--lr", type=float, help="learning rate (0.0015)")
    warmup.add_argument("--seed", type=int, help="of the split, the engine and the trainer (0)")
    warmup.add_argument("--device", help="cpu or cuda (cuda where there is one)")
    warmup.add_argument("--dtype", help="of the target in the engine (bfloat16)")
    warmup.add_argument(
        "--engine",
        action="append",
        type=engine_argument,
        metavar="NAME=VALUE",
        help="another argument of SGLang's engine, such as attention_backend=triton; may be given again",
    )


def engine_argument(text: str) -> tuple[str, Any]:
    """An argument of SGLang's engine, NAME=VALUE; the value is JSON, or the text that it is.

    Raises:
        argparse.ArgumentTypeError: says what it takes.
    """
    name, equals, value = text.partition("=")
    if not (name.isidentifier() and equals):
        raise argparse.ArgumentTypeError(f"got {text!r}, takes NAME=VALUE")
    with contextlib.suppress(ValueError):
        return name, json.loads(value)
    return name, value


if __name__ == "__main__":
    sys.exit(main())
