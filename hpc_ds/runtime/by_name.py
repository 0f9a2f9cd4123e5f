"""What holds for a script that knows us by the name ``deepspeed`` (docs/decisions/019)."""

from __future__ import annotations

import os
import sys
from datetime import timedelta

from hpc_ds.errors import ConfigError

_TIMEOUT = "DEEPSPEED_TIMEOUT"
_DEFAULT_MIN = 10


def goes_by_deepspeed() -> bool:
    """Whether ``import deepspeed`` has found hpc_ds in this process."""
    return str(getattr(sys.modules.get("deepspeed"), "__version__", "")).endswith("+hpcds")


def default_timeout() -> timedelta:
    """Of collectives, where nobody names one: 10 minutes, or under that name DEEPSPEED_TIMEOUT.

    Raises:
        ConfigError: that is not a positive whole number of minutes.
    """
    text = os.environ.get(_TIMEOUT, "").strip() if goes_by_deepspeed() else ""
    if not text:
        return timedelta(minutes=_DEFAULT_MIN)
    # More digits are no time that torch can hold.
    if not (text.isascii() and text.isdigit() and len(text) < 8 and int(text) > 0):
        raise ConfigError(
            f"{_TIMEOUT} {text!r}: not a whole number of minutes above 0; correct it or unset it",
            key=_TIMEOUT,
            value=text,
        )
    return timedelta(minutes=int(text))
