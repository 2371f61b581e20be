"""Which captured program a call runs, and what happens when none covers it."""

from fxopt.dispatch.account import Part, account
from fxopt.dispatch.account import report as parts_report
from fxopt.dispatch.root import RootDispatcher as Dispatcher

__all__ = ["Dispatcher", "Part", "account", "parts_report"]
