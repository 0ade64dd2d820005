"""verl's SGLang rollout, whose server, replica and adapter ours are subclasses of.

Nothing is changed here: the seam says what the subclasses lean on.
"""

from __future__ import annotations

from tlt_verl.patches.seam import Seam, Target

_SERVER = "verl.workers.rollout.sglang_rollout.async_sglang_server"
_ADAPTER = "verl.workers.rollout.sglang_rollout.sglang_rollout"


def _install() -> None:
    """Nothing to install."""


SEAM = Seam(
    name="verl.rollout_server",
    package="verl",
    versions=">=0.9.1,<0.9.2",
    targets=(
        Target(path=f"{_SERVER}:SGLangReplica.__init__", source_contains=("self.server_class = ray.remote(",)),
        Target(path=f"{_SERVER}:SGLangReplica.launch_servers", source_contains=("self.server_class.options(",)),
        Target(
            path=f"{_SERVER}:SGLangHttpServer.launch_server",
            source_contains=(
                'args["speculative_algorithm"] = self.config.mtp.speculative_algorithm',
                "**engine_kwargs",
                'args["enable_draft_weights_cpu_backup"] = True',
            ),
        ),
        Target(
            path=f"{_SERVER}:SGLangHttpServer.generate",
            source_contains=('meta_info.get("spec_draft_token_num"', 'extra_fields["spec_num_verify_steps"]'),
        ),
        # what verl does with a replica, for those who train on its device meanwhile
        Target(path=f"{_SERVER}:SGLangHttpServer.sleep"),
        Target(path=f"{_SERVER}:SGLangHttpServer.abort_all_requests"),
        Target(path=f"{_SERVER}:SGLangHttpServer.resume_generation"),
        Target(path=f"{_SERVER}:SGLangHttpServer.set_global_steps", parameters=("global_steps",)),
        Target(path="verl.workers.rollout.replica:RolloutMode", source_contains=("COLOCATED", "STANDALONE")),
        Target(
            path=f"{_ADAPTER}:ServerAdapter.update_weights",
            parameters=("weights", "global_steps"),
            source_contains=("self.server_actor.set_global_steps.remote(global_steps)",),
        ),
        Target(path=f"{_ADAPTER}:ServerAdapter._is_server_tp_leader"),
        Target(path=f"{_ADAPTER}:ServerAdapter.resume", parameters=("tags",)),
        Target(path=f"{_ADAPTER}:ServerAdapter.release"),
        Target(
            path="verl.workers.config:MtpConfig",
            parameters=("speculative_algorithm", "speculative_num_steps", "speculative_eagle_topk"),
        ),
        Target(path="verl.workers.config:RolloutConfig", parameters=("custom", "engine_kwargs", "mtp")),
    ),
    why="The rollout backend `tlt` is made of subclasses of verl's SGLang server, replica and adapter.",
    install=_install,
)
