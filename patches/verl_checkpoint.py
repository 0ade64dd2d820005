"""verl's checkpoints, with the drafter beside the policy.

verl's trainer has no hook for what a plugin wants to keep. Behind its own saving and loading a function is called with
the checkpoint's folder. Installed when verl's trainer is imported.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

from tlt_verl.patches.seam import Seam, Target
from tlt_verl.patches.trainer_servers import server_handles

MODULE = "verl.trainer.ppo.v1.trainer_base"
_TRAINER = f"{MODULE}:PPOTrainer"


def _install(name: str, save: Callable[[str, list[Any]], None], load: Callable[[str, list[Any]], None]) -> None:
    """Call `save` and `load` in a run with rollout `name`.

    Args:
        save, load: of the folder of verl's checkpoint, and the replicas' servers. What they raise ends the run.
    """
    from verl.trainer.ppo.v1.trainer_base import PPOTrainer

    original_save, original_load = PPOTrainer._save_checkpoint, PPOTrainer._load_checkpoint

    @functools.wraps(original_save)
    def save_checkpoint(self: Any) -> None:
        original_save(self)
        if self.config.actor_rollout_ref.rollout.name == name:
            save(_folder(self, resumed=False), server_handles(self))

    @functools.wraps(original_load)
    def load_checkpoint(self: Any) -> None:
        original_load(self)
        if self.config.actor_rollout_ref.rollout.name == name and self.global_steps > 0:
            load(_folder(self, resumed=True), server_handles(self))

    PPOTrainer._save_checkpoint, PPOTrainer._load_checkpoint = save_checkpoint, load_checkpoint


def _folder(trainer: Any, *, resumed: bool) -> str:
    """The folder of the checkpoint that was just written, or the one that the run resumed from."""
    config = trainer.config.trainer
    if resumed and config.resume_mode == "resume_path":
        return os.path.abspath(config.resume_from_path)
    return os.path.abspath(os.path.join(config.default_local_dir, f"global_step_{trainer.global_steps}"))


SEAM = Seam(
    name="verl.checkpoint",
    package="verl",
    versions=">=0.9.1,<0.9.2",
    targets=(
        Target(
            path=f"{_TRAINER}._save_checkpoint",
            source_contains=('self.config.trainer.default_local_dir, f"global_step_{self.global_steps}"',),
        ),
        Target(
            path=f"{_TRAINER}._load_checkpoint",
            source_contains=(
                "self.global_steps = 0",
                'self.config.trainer.resume_mode == "disable"',
                "self.config.trainer.resume_from_path",
                'int(global_step_folder.split("global_step_")[-1])',
            ),
        ),
        Target(
            path=f"{_TRAINER}._rollout_server_managers",
            source_contains=('getattr(self, "llm_server_manager", None)',),
        ),
    ),
    why="The drafter is saved with the policy, and comes back with it.",
    install=_install,
)
