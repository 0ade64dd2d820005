"""The subcommand `warmup`: from its arguments to what it prints."""

from __future__ import annotations

from typing import Any

from tlt_verl.warmup.options import WarmupOptions


def main(given: dict[str, Any]) -> int:
    """Run a warm-up; returns the exit status.

    Args:
        given: values of `WarmupOptions`, those that were said.

    Raises:
        ConfigError, DrafterError: an option that cannot be used.
    """
    if "device" not in given:
        import torch

        given = {**given, "device": "cuda" if torch.cuda.is_available() else "cpu"}
    options = WarmupOptions(**given)
    from tlt_verl.warmup.run import Warmup

    print(_table(Warmup(options).run()))
    return 0


def _table(report: dict[str, Any]) -> str:
    """The report as lines for a terminal."""
    rows: list[tuple[str, ...]] = [("", "accept len", "replayed", "tokens", "tokens/s")]
    for name, key in (("untrained", "before"), ("trained", "after")):
        if (measured := report[key]) is not None:
            figures = (measured["accept_len"], measured["replayed"])
            rows.append(
                (name, *(f"{x:.2f}" for x in figures), str(measured["tokens"]), f"{measured['tokens_per_s']:.0f}")
            )
    table = "\n".join("  ".join(f"{cell:>10}" for cell in row) for row in rows)
    trained, rollouts = report["trained"], report["rollouts"]
    return (
        f"{table}\n"
        f"rollouts {rollouts['tokens']} tokens in {rollouts['seconds']:.0f} s; "
        f"trained on {trained['tokens']} tokens in {trained['seconds']:.0f} s; "
        f"hot vocabulary {report['hot_vocab'] or 'off'}; {report['minutes']:.1f} minutes in all\n"
        f"checkpoint: {report['checkpoint']}"
    )
