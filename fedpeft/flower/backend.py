"""Flower's pool of Ray actors, with the dead replaced.

Flower 1.41 puts an actor back into its pool whatever became of it. A dead one is idle at once, so
it is given message after message, and every one of them fails: one client that crashes once takes
most clients with it in every later round. Here an actor that died or hangs is ended and another
takes its place. The message is tried again once, for a process may have died of something that its
client has not done; a client that takes two processes with it is an error, for it alone.
"""

from __future__ import annotations

import threading
from typing import Any

import ray
from flwr.app import Context, Message
from flwr.common.constant import PARTITION_ID_KEY
from flwr.server.superlink.fleet.vce.backend.backend import BackendConfig
from flwr.server.superlink.fleet.vce.backend.raybackend import RayBackend
from ray.exceptions import GetTimeoutError, RayError, RayTaskError

from fedpeft.errors import FedpeftError

TRIES = 2
"""Processes that a message may cost."""


class ReplacingBackend(RayBackend):
    """``RayBackend`` whose actors are replaced.

    seconds: that a client may take for a message; then its process is killed. over: set when the
    simulation ends, from when on nothing is replaced.
    """

    def __init__(self, config: BackendConfig, seconds: float, over: threading.Event) -> None:
        super().__init__(config)
        self._seconds = seconds
        self._over = over

    def process_message(self, message: Message, context: Context) -> tuple[Message, Context]:
        """The client's reply and its context afterwards. Raises FedpeftError without one."""
        assert self.pool is not None and self.app_fn is not None, "build comes first"
        client = str(context.node_config[PARTITION_ID_KEY])
        for _ in range(TRIES):
            future = self.pool.submit(_run, (self.app_fn, message, client, context))
            try:
                _, answer, after = ray.get(future, timeout=self._seconds)
            except RayTaskError:
                self.pool.add_actor_back_to_pool(future)
                raise
            except RayError as error:
                reason = _reason(error, self._seconds)
                self._replace(future)
                if isinstance(error, GetTimeoutError) or self._over.is_set():
                    break
            else:
                self.pool.add_actor_back_to_pool(future)
                return answer, after
        raise FedpeftError(reason)

    def _replace(self, future: Any) -> None:
        """Another actor in the place of the one that ran this."""
        pool: Any = self.pool
        ray.kill(pool._future_to_actor.pop(future))
        if not self._over.is_set():
            pool.pool.append(pool.create_actor_fn())


def _run(actor: Any, *job: Any) -> Any:
    return actor.run.remote(*job)


def _reason(error: RayError, seconds: float) -> str:
    if isinstance(error, GetTimeoutError):
        return f"its process did not answer within {seconds:g} seconds, and was killed"
    last = str(error).strip().splitlines()[-1][:200]
    return f"its process died {TRIES} times in a row: {last}"
