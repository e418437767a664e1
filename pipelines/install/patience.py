"""Wait for what is being set up beside us: servers that do not answer yet, rights that do not hold yet.

No command runs this module; every command of `pipelines.install` asks through it.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable
from typing import TypeVar

from pipelines import kfp_api
from selectmoe.errors import Unavailable, UserError

UNSETTLED_SECONDS = 20.0
"""How long a right or an account may take to hold after it was made."""
FIRST, LONGEST = 0.5, 5.0
"""Seconds between two attempts, at the beginning and later."""
T = TypeVar("T")


class Unsettled(UserError):
    """The user's mistake, unless what is missing is just being made: worth a few more attempts."""


def patiently(seconds: float, attempt: Callable[[], T]) -> T:
    """Try until it works.

    Args:
        seconds: how long a server that is away is asked again.
        attempt: what is tried; must be repeatable.

    Returns:
        What it returns.

    Raises:
        Unavailable: the server is still away.
        UserError: of the attempt; of `Unsettled` only after `UNSETTLED_SECONDS`.
    """
    begin, wait, said = time.monotonic(), FIRST, ""
    while True:
        try:
            return attempt()
        except (Unavailable, kfp_api.Unavailable, Unsettled) as error:
            limit = min(seconds, UNSETTLED_SECONDS) if isinstance(error, Unsettled) else seconds
            left = begin + limit - time.monotonic()
            text = " ".join(str(error).split())
            if left <= 0:
                raise (Unavailable(text) if isinstance(error, kfp_api.Unavailable) else error) from None
        if text != said:
            print(f"waiting: {text}", file=sys.stderr, flush=True)
            said = text
        time.sleep(min(left, wait * random.uniform(0.8, 1.2)))
        wait = min(LONGEST, 1.5 * wait)
