"""Which captured program a call runs, and what happens when none covers it."""

from fxopt.dispatch.root import RootDispatcher

Dispatcher = RootDispatcher

__all__ = ["Dispatcher"]
