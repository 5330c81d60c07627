"""Progress bars, always on stderr, so that what a command prints on stdout stays clean. rich is imported only when one
shows."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")


def tracked(items: Sequence[T], description: str, progress: bool) -> Iterable[T]:
    """`items` with a progress bar, or as they are."""
    if not progress:
        return items
    from rich.console import Console
    from rich.progress import track

    return track(items, description=description, console=Console(stderr=True))


@contextlib.contextmanager
def progress_bar(description: str, total: int, progress: bool) -> Iterator[Callable[[], None]]:
    """A bar of `total` steps; gives the function that advances it by one."""
    if not progress:
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task(description, total=total)
        yield lambda: bar.advance(task)
