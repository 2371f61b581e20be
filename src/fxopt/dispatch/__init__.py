"""Which captured program a call runs, and what happens when none covers it."""

from fxopt.dispatch.whole import Dispatcher

__all__ = ["Dispatcher"]
