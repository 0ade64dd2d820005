"""The speculative algorithm `TLT`, as SGLang sees it.

To SGLang's dispatch it answers as EAGLE does, to every question that the enum knows, so that a question added later is
answered too. What it changes: which options it accepts, and its worker.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sglang.srt.speculative.spec_info import SpeculativeAlgorithm
from sglang.srt.speculative.spec_registry import CustomSpecAlgo

from tlt_verl.engine.options import EngineOptions

if TYPE_CHECKING:
    from sglang.srt.server_args import ServerArgs

NAME = "TLT"


class TLTAlgorithm(CustomSpecAlgo):
    """Answers as `SpeculativeAlgorithm.EAGLE`, except where a method stands here."""

    def handle_server_args(self, server_args: ServerArgs) -> None:
        """EAGLE's defaults and checks: steps, top-k, overlap on a CPU."""
        SpeculativeAlgorithm.EAGLE.handle_server_args(server_args)


def _answer_as_eagle(name: str) -> Any:
    def answer(self: TLTAlgorithm, *args: Any, **kwargs: Any) -> Any:
        return getattr(SpeculativeAlgorithm.EAGLE, name)(*args, **kwargs)

    answer.__name__ = name
    return answer


_OURS = {"create_worker", "handle_server_args"}
for _name, _member in vars(SpeculativeAlgorithm).items():
    if callable(_member) and not _name.startswith("_") and _name not in _OURS:
        setattr(TLTAlgorithm, _name, _answer_as_eagle(_name))


def is_tlt(spec_algorithm: Any) -> bool:
    """Whether a batch's algorithm is this one."""
    return isinstance(spec_algorithm, TLTAlgorithm)


def refuse_inexact(server_args: ServerArgs) -> None:
    """Raise `ValueError` for engine options under which speculation would not be exact."""
    from sglang.srt.environ import envs

    refused = {
        "speculative_accept_threshold_single": (server_args.speculative_accept_threshold_single, 1.0),
        "speculative_accept_threshold_acc": (server_args.speculative_accept_threshold_acc, 1.0),
        "enable_custom_logit_processor": (server_args.enable_custom_logit_processor, False),
        "rl_on_policy_target": (server_args.rl_on_policy_target, None),
        "speculative_use_rejection_sampling": (server_args.speculative_use_rejection_sampling, False),
        "speculative_adaptive": (server_args.speculative_adaptive, False),
        "pp_size": (server_args.pp_size, 1),
        "SGLANG_SIMULATE_ACC_LEN": (max(envs.SGLANG_SIMULATE_ACC_LEN.get(), 0.0), 0.0),
    }
    for option, (value, exact) in refused.items():
        if value != exact:
            raise ValueError(
                f"{option}={value!r} is refused with speculative_algorithm={NAME}: its tokens would not follow the "
                f"target's distribution exactly, or it is not supported. Set it to {exact!r}, or use another "
                "speculative_algorithm."
            )


def refuse_switching(server_args: ServerArgs, options: EngineOptions) -> None:
    """Raise `ValueError` where ranks would compute together and each choose another strategy for its own batch."""
    if server_args.enable_dp_attention and not options.is_fixed:
        arms = ", ".join(map(str, options.strategies()))
        raise ValueError(
            f"enable_dp_attention=True is refused with a choice of strategies ({arms} and off): each rank has a "
            "batch of its own and would choose for itself, while all compute together. Set strategy.tune=false, which "
            "always runs the first of strategy.arms, or enable_dp_attention=False."
        )
