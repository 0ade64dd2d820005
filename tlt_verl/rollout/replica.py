"""A rollout replica of the backend `tlt`: verl's SGLang replica around our server."""

from __future__ import annotations

from typing import Any

import ray
from verl.workers.rollout.sglang_rollout.async_sglang_server import SGLangReplica

from tlt_verl.rollout.server import TLTHttpServer


class TLTReplica(SGLangReplica):
    """verl's SGLang replica, whose servers are `TLTHttpServer`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.server_class = ray.remote(TLTHttpServer)
