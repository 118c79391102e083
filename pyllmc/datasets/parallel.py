"""Work in several threads, with the results in order and little in memory.

Called by common.py and tinystories.py; calls nothing of pyllmc. Threads are enough: the tokenizer computes outside
Python's lock, and text need not be copied to another process.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

_END = object()


def ordered_map(function: Callable[[Item], Result], items: Iterable[Item], workers: int) -> Iterator[Result]:
    """`map(function, items)` computed by `workers` threads, at most 2 * workers items ahead of the reader of the
    results; with one worker, by the calling thread. The items are taken by the calling thread."""
    if workers == 1:
        yield from map(function, items)
        return
    waiting: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def prefetch(items: Iterable[Item]) -> Iterator[Item]:
    """The same items; while one is worked on, a thread gets the next one, and no more."""
    source = iter(items)
    with ThreadPoolExecutor(1) as pool:
        following = pool.submit(next, source, _END)
        while (item := following.result()) is not _END:
            following = pool.submit(next, source, _END)
            yield item
