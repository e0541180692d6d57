"""The one place that imports aiohttp, and says what to install when it is missing."""

try:
    from aiohttp import web
except ImportError as error:
    message = "perqueue.sandbox needs aiohttp, which is not installed: install useper-perqueue[sandbox]"
    raise ImportError(message, name="aiohttp") from error

__all__ = ["web"]
