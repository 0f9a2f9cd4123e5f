"""``deepspeed.utils.logging``: its logger, which hpc_ds itself does not write to, and the functions scripts call with it.

The logger is named ``DeepSpeed``, shows warnings and worse unless a script says otherwise, and keeps to itself, as DeepSpeed's.
"""

from __future__ import annotations

import functools
import json
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from hpc_ds.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

log_levels = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
    "critical": logging.CRITICAL,
}


class LoggerFactory:
    """Makes loggers like DeepSpeed's."""

    @staticmethod
    def create_logger(name: str = "DeepSpeed", level: int = logging.WARNING) -> logging.Logger:
        """A logger of its own that writes to stdout."""
        made = logging.getLogger(name)
        made.setLevel(level)
        made.propagate = False
        if not made.handlers:
            handler = logging.StreamHandler(stream=sys.stdout)
            handler.setFormatter(logging.Formatter(f"[%(asctime)s] [%(levelname)s] [{name}] %(message)s"))
            made.addHandler(handler)
        return made


logger = LoggerFactory.create_logger()


@functools.cache
def warning_once(*args: Any, **kwargs: Any) -> None:
    """A warning, the first time that it is given."""
    logger.warning(*args, **kwargs)


def get_dist_msg(message: object, ranks: Sequence[int] | None = None) -> str | None:
    """The message with this rank before it; None on a rank that is not to say it.

    Args:
        message: what to say.
        ranks: who says it; [-1] is all of them. Without a process group everybody does.
    """
    if not dist.is_initialized():
        return f"[Rank -1] {message}"
    mine = dist.get_rank()
    return f"[Rank {mine}] {message}" if ranks and (ranks[0] == -1 or mine in ranks) else None


def log_dist(message: object, ranks: Sequence[int] | None = None, level: int = logging.INFO) -> None:
    """Log on some ranks; see ``get_dist_msg``."""
    if (told := get_dist_msg(message, ranks)) is not None:
        logger.log(level, told)


def show(text: str) -> None:
    """Print, for DeepSpeed's functions that do."""
    sys.stdout.write(f"{text}\n")


def print_dist(message: object, ranks: Sequence[int] | None = None) -> None:
    """Print on some ranks, whatever the level; see ``get_dist_msg``."""
    if (told := get_dist_msg(message, ranks)) is not None:
        show(told)


@functools.cache
def _log_dist_once(message: object, ranks: tuple[int, ...] | None, level: int) -> None:
    log_dist(message, ranks, level)


def log_dist_once(message: object, ranks: Sequence[int] | None = None, level: int = logging.INFO) -> None:
    """Log on some ranks, the first time that it is said."""
    _log_dist_once(message, None if ranks is None else tuple(ranks), level)


def print_json_dist(message: dict[str, Any], ranks: Sequence[int] | None = None, path: str | None = None) -> None:
    """Write a message as JSON to a file, on some ranks; see ``get_dist_msg``."""
    if path is not None and get_dist_msg("", ranks) is not None:
        mine = dist.get_rank() if dist.is_initialized() else -1
        Path(path).write_text(json.dumps({**message, "rank": mine}), encoding="utf-8")


def print_configuration(args: Any, name: str) -> None:
    """Log what a namespace holds."""
    logger.info("%s:", name)
    for key, value in sorted(vars(args).items()):
        logger.info("  %s %s", key.ljust(29, "."), value)


def get_log_level_from_string(log_level_str: str) -> int:
    """The number of a level.

    Raises:
        ConfigError: there is no such level.
    """
    level = log_levels.get(log_level_str.lower())
    if level is None:
        raise ConfigError(f"log level {log_level_str!r}: not a level; use {', '.join(log_levels)}")
    return level


def set_log_level_from_string(log_level_str: str, custom_logger: logging.Logger | None = None) -> None:
    """Set the level of a logger and its handlers, of DeepSpeed's unless one is given."""
    level, chosen = get_log_level_from_string(log_level_str), custom_logger or logger
    chosen.setLevel(level)
    for handler in chosen.handlers:
        handler.setLevel(level)


def get_current_level() -> int:
    """The level of the logger."""
    return logger.getEffectiveLevel()


def should_log_le(max_log_level_str: str) -> bool:
    """Whether the logger shows what has this level."""
    return get_current_level() <= get_log_level_from_string(max_log_level_str)


vars(logger).update(warning_once=warning_once, log_dist_once=log_dist_once)
