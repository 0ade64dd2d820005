"""Small runs for the report's tests, written as verl writes them: a console log, or TensorBoard events."""

import pprint
from collections.abc import Mapping
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

BASE_GEN_S, FAST_GEN_S = (8.0, 8.0, 9.0, 10.0, 12.0, 12.0), (8.0, 4.0, 3.0, 4.0, 4.0, 3.0)
BASE_STEP_S, FAST_STEP_S = (20.0, 20.0, 21.0, 22.0, 24.0, 24.0), (20.0, 16.0, 14.0, 16.0, 16.0, 15.0)
PHASES_S = {"old_log_prob": 2.0, "adv": 0.5, "update_actor": 6.0, "update_weights": 1.0}


def metrics(step: int, gen_s: float, step_s: float, more: Mapping[str, float] | None = None) -> dict[str, float]:
    """A step of 8 responses of 30 tokens on average, to prompts of 10, with a reward of a tenth of its number."""
    return {
        "training/global_step": step,
        "critic/score/mean": step / 10,
        "actor/ppo_kl": 0.001 * step,
        "training/rollout_probs_diff_mean": 0.002,
        "response_length/mean": 30.0 + step % 2,
        "prompt_length/mean": 10.0 - step % 2,
        "perf/total_num_tokens": 320,
        "timing_s/gen": gen_s,
        "timing_s/step": step_s,
        **{f"timing_s/{name}": seconds for name, seconds in PHASES_S.items()},
        **(more or {}),
    }


def baseline() -> dict[int, dict[str, float]]:
    return {step: metrics(step, BASE_GEN_S[step - 1], BASE_STEP_S[step - 1]) for step in range(1, 7)}


def fast() -> dict[int, dict[str, float]]:
    """A run that drafts, trains its drafter and tunes."""
    return {step: metrics(step, FAST_GEN_S[step - 1], FAST_STEP_S[step - 1], drafting(step)) for step in range(1, 7)}


def drafting(step: int) -> dict[str, float]:
    return {
        "tlt/accept_len": 1.0 + step / 2,
        "tlt/draft_share/eagle": 0.75,
        "tlt/draft_share/off": 0.25,
        "tlt/tuner/5-8/eagle:7x1@8": 0.75,
        "tlt/tuner/5-8/off": 0.25,
        "tlt/tuner/17-32/ngram:7x1@8": 1.0,
        "tlt/tuner/lost_s": 0.5,
        "tlt/spot/idle_s": 4.0,
        "tlt/spot/trained_s": 3.0,
        "tlt/spot/harvest": 0.75,
        "tlt/drafter/version": step,
        "tlt/drafter/loss": 1 / step,
    }


def console_line(step: int, figures: Mapping[str, float]) -> str:
    """As verl's LocalLogger prints them and Ray passes them on."""
    items = [f"{key}:{pprint.pformat(value)}" for key, value in figures.items()]
    return "\x1b[36m(TaskRunnerV1 pid=9)\x1b[0m " + " - ".join([f"step:{step}", *items]) + "\n"


def console(steps: Mapping[int, Mapping[str, float]]) -> str:
    return "starting\n" + "".join(console_line(step, figures) for step, figures in steps.items())


def write_log(folder: Path, text: str, name: str = "train.log") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text)
    return folder


def write_events(folder: Path, steps: Mapping[int, Mapping[str, float]], suffix: str = "") -> Path:
    """As verl's tensorboard logger does."""
    writer = SummaryWriter(str(folder), filename_suffix=suffix)
    for step, figures in steps.items():
        for key, value in figures.items():
            writer.add_scalar(key, value, step)
    writer.close()
    return folder
