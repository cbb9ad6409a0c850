"""Ray Data as our jobs use it: no bars and announcements beside our own, blocks as they were made."""

import contextlib
import logging
from collections.abc import Iterator

import ray.data

# Neither the announcement of each execution, nor the advice to turn its bars on, nor the traceback of an error that is
# raised as well.
_LOGGERS = {
    "ray.data": logging.WARNING,
    "ray.data._internal.progress": logging.ERROR,
    "ray.data.exceptions": logging.CRITICAL,
    "ray.data._internal.execution": logging.CRITICAL,
}


@contextlib.contextmanager
def quiet_ray_data() -> Iterator[None]:
    context = ray.data.DataContext.get_current()
    before = context.target_max_block_size, context.enable_progress_bars
    context.target_max_block_size, context.enable_progress_bars = None, False
    levels = {name: logging.getLogger(name).level for name in _LOGGERS}
    for name, level in _LOGGERS.items():
        logging.getLogger(name).setLevel(level)
    try:
        yield
    finally:
        context.target_max_block_size, context.enable_progress_bars = before
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
