"""The application, with the queue that counts its users."""

from threading import Lock

from django.apps import AppConfig

from perqueue import PerQueue


class ShopConfig(AppConfig):
    name = "shop"
    _lock = Lock()
    _queue: PerQueue | None = None

    @property
    def queue(self) -> PerQueue:
        """One for each process, made when it is first used: migrate and collectstatic need no token."""
        with self._lock:  # the first two requests may come at once
            if self._queue is None:
                self._queue = PerQueue()
            return self._queue
