"""The application, with the queue that counts its users."""

from functools import cached_property

from django.apps import AppConfig

from perqueue import PerQueue


class ShopConfig(AppConfig):
    name = "shop"

    @cached_property
    def queue(self) -> PerQueue:
        """One for each process, made when it is first used: migrate and collectstatic need no token."""
        return PerQueue()
