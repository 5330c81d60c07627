"""Progress bars, always on stderr, so that what a command prints on stdout stays clean. rich is imported only when one
shows."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

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


class TwoBars:
    """An outer and an inner bar, and lines above them. Without a display all of it does nothing."""

    def __init__(self, bar: Any = None, description: str = "", total: int = 0) -> None:
        self._bar = bar
        self._outer = bar.add_task(description, total=total) if bar else None
        self._inner = bar.add_task("", total=1) if bar else None

    def outer(self) -> None:
        """One outer step is done."""
        if self._bar:
            self._bar.advance(self._outer)

    def inner(self, description: str, total: int | None) -> None:
        """The inner bar begins anew; without a total it only shows that work goes on."""
        if self._bar:
            self._bar.reset(self._inner, description=description)
            self._bar.tasks[self._inner].total = total

    def step(self) -> None:
        """One inner step is done."""
        if self._bar:
            self._bar.advance(self._inner)

    def line(self, text: str) -> None:
        """A line that stays."""
        if self._bar:
            self._bar.console.print(text, highlight=False, markup=False, soft_wrap=True)


@contextlib.contextmanager
def two_bars(description: str, total: int, progress: bool) -> Iterator[TwoBars]:
    """Bars for work in `total` parts, each with steps of its own."""
    if not progress:
        yield TwoBars()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        yield TwoBars(bar, description, total)
