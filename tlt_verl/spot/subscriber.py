"""A server's side of publications: it says how it is, is told of a drafter that it lacks, and takes it.

Knows the coordinator's handle and Ray's references; what taking a drafter means is the server's. A drafter is taken in
a task of its own, so that the coordinator hears of the server meanwhile. Nothing is remembered about the coordinator:
one that was started again learns everything by the next call.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from ray.exceptions import RayError

logger = logging.getLogger(__name__)

_ANSWER_S = 10.0
_TAKE_S = 70.0  # for the weights, and again for the engine, which has 60 s

Receive = Callable[[int, Any, Any, Any], Awaitable[str | None]]


class Subscriber:
    """The drafters of one replica.

    Args:
        replica: its name.
        receive: takes a drafter's version, config, weights and hot vocabulary; None, or why it does not serve.
        is_awake: whether the engine can take one now.
        take_s: that `receive` may take.

    Attributes:
        serves: the version that was received last; 0 while the engine drafts with what it began with.
        refused: the newest version that was not taken, and why.
        lost: drafters that did not come, though they were announced.
        has_news: set when the coordinator should be called at once.
    """

    def __init__(
        self, replica: str, receive: Receive, is_awake: Callable[[], bool] = lambda: True, take_s: float = _TAKE_S
    ) -> None:
        self._replica, self._receive, self._is_awake, self._take_s = replica, receive, is_awake, take_s
        self._taking: asyncio.Task[None] | None = None
        self.serves, self.lost = 0, 0
        self.refused: tuple[int, str] = (0, "")
        self.has_news = asyncio.Event()

    async def beat(self, coordinator: Any) -> dict[str, float]:
        """Call the coordinator; its metrics. What is due is being taken when this returns.

        Raises:
            RayError, TimeoutError: it does not answer.
        """
        self.has_news.clear()
        call = coordinator.beat.remote(self._replica, self.serves, self._is_awake(), self.refused)
        answer = await asyncio.wait_for(call, _ANSWER_S)
        due, answered = answer["due"], max(self.serves, self.refused[0])  # perhaps while this call was on its way
        if due is not None and self._taking is None and due["version"] > answered:
            self._taking = asyncio.create_task(self._take(**due))
        return answer["metrics"]

    async def _take(self, version: int, config: dict[str, Any], drafter: Any) -> None:
        try:
            weights, hot = await asyncio.wait_for(drafter, self._take_s)
            taking = asyncio.ensure_future(self._receive(version, config, weights, hot))
            # not cancelled when it is late: the engine's answer to it would be taken for that to the next call
            reason = await asyncio.wait_for(asyncio.shield(taking), self._take_s)
        except RayError as error:  # its owner is gone; another coordinator offers another one
            self.lost += 1
            logger.error("tlt: drafter %d did not come to replica %s: %s", version, self._replica, error)
            return
        except TimeoutError:
            reason = f"it was not taken in {self._take_s:g} s"
        except Exception as error:  # of the disk or the engine: the reason goes to the publisher, and to the log
            reason = f"{type(error).__name__}: {error}"
        finally:
            self._taking = None
        if reason is None:
            self.serves = version
        elif self._is_awake():
            self.refused = (version, reason)
            logger.error("tlt: replica %s did not take drafter %d: %s", self._replica, version, reason)
        self.has_news.set()
