"""`Host`: what a pool needs from the system that runs its replicas. Runs in the driver."""

from __future__ import annotations

from collections.abc import Awaitable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, Protocol


class Host(Protocol):
    """Runs replicas of one role. Only the host knows what a handle is; callers use `handle.method.remote(...)`."""

    role: str  # name of the role
    losses: tuple[type[BaseException], ...]  # errors of a call after which its replica will never answer
    lost_values: tuple[type[BaseException], ...]  # errors of a call whose referenced argument is lost
    outages: tuple[type[BaseException], ...]  # errors of `node` and `leaving_nodes` while the cluster cannot answer
    close_s: float  # longest time that `close_all` of the role gets before the process ends; 0: it has no such method

    async def create(self, name: str) -> Any:
        """Starts a replica and returns its handle, even if the replica still waits for room. Waits without limit for a
        cluster that does not answer."""

    def kill(self, handle: Any, *, close: bool) -> Future[None]:
        """Ends the replica's process and frees its resources. With `close` calls the role's `close_all` first, if it
        has this method. Returns at once; the future is done when the cluster has received the order."""

    async def node(self, handle: Any) -> str | None:
        """The node where the replica runs; None while it waits for room. Answers within seconds, or raises one of
        `outages`."""

    async def leaving_nodes(self) -> Mapping[str, float]:
        """Nodes that will leave soon, with the seconds until then. Answers within seconds, or raises one of
        `outages`."""

    def probe(self, handle: Any) -> Awaitable[Any]:
        """A call that the replica's process answers even while its role is busy."""

    async def fetch(self, references: Sequence[Any]) -> list[Any]:
        """The values behind references. A value that is gone, or does not arrive within the role's `timeout_s`, becomes
        a RolloutLostError in its place. An item that is not a reference is returned unchanged."""
