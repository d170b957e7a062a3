"""Progress on stderr while a person watches, nothing otherwise."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Advance = Callable[[], None]


@contextmanager
def stage(text: str, total: int) -> Iterator[Advance]:
    """Show `text` and how many of `total` steps are done; each call of what this gives is one."""
    if not sys.stderr.isatty():
        yield lambda: None
        return
    try:
        from rich.console import Console
        from rich.progress import Progress
    except ImportError:
        yield from _plain(text, total)
        return
    # Without a refresh thread: it would wake up in the middle of a measurement.
    console = Console(stderr=True)
    with Progress(console=console, transient=True, auto_refresh=False) as progress:
        task = progress.add_task(text, total=total)

        def advance() -> None:
            progress.advance(task)
            progress.refresh()

        yield advance


def _plain(text: str, total: int) -> Iterator[Advance]:
    done = 0

    def show(line: str) -> None:
        sys.stderr.write(f"\r\x1b[K{line}")
        sys.stderr.flush()

    def advance() -> None:
        nonlocal done
        done += 1
        show(f"{text} {done}/{total}")

    show(f"{text} 0/{total}")
    try:
        yield advance
    finally:
        show("")
