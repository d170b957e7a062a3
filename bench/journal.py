"""What a run has measured so far, a line per case, so that an interrupted run can go on."""

import json
import os
from pathlib import Path
from typing import Any

from .plan import Task
from .results import FORMAT, ResultsError
from .workers import Result

# How every journal begins.
HEAD = b'{"format": '
FIELDS = {"task": str, "names": list, "blocks": dict, "errors": dict, "notes": dict}


class Journal:
    """A file of JSON lines: first what the figures depend on, then a result a line.

    Parameters
    ----------
    path : path-like
    conditions : dict
        What must be the same for results to belong to one run.
    fresh : bool
        Whether to forget what the file holds.

    Raises
    ------
    ResultsError
        If the file is no journal, or one of other conditions.
    """

    def __init__(self, path: Path, conditions: dict[str, Any], fresh: bool = False) -> None:
        self.path = path
        self.known: dict[str, dict[str, Any]] = {}
        lines = self._lines(fresh)
        if not lines:
            self._append({"format": FORMAT, **conditions})
        elif lines[0] != {"format": FORMAT, **conditions}:
            raise ResultsError(
                f"{path}: begun with other versions or settings, or on another machine; "
                "--fresh starts anew"
            )
        for line in lines[1:]:
            self.known[line["task"]] = line

    def _lines(self, fresh: bool) -> list[dict[str, Any]]:
        """Return the lines of the file; one that was cut off at its end is removed.

        What is no journal is left as it is.
        """
        try:
            content = self.path.read_bytes()
        except FileNotFoundError:
            return []
        if content[: len(HEAD)] != HEAD[: len(content)]:
            raise ResultsError(f"{self.path}: no journal of python -m bench; it is in the way")
        if fresh:
            content = b""
            self.path.unlink()
        whole = content[: content.rfind(b"\n") + 1]
        try:
            lines = [json.loads(line) for line in whole.splitlines()]
            sound = all(map(_is_sound, lines[1:]))
        except (ValueError, RecursionError):
            sound = False
        if not sound:
            raise ResultsError(f"{self.path}: a damaged journal; --fresh starts anew")
        if len(whole) < len(content):
            os.truncate(self.path, len(whole))
        return lines

    def _append(self, line: dict[str, Any]) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def get(self, task: Task) -> Result | None:
        """Return what was found for a task, if all who compute it were there."""
        line = self.known.get(str(task))
        if line is None or not set(task.names) <= set(line["names"]):
            return None
        return Result(task.case, line["blocks"], line["errors"], line["notes"])

    def add(self, task: Task, result: Result) -> None:
        """Keep what was found for a task."""
        self._append(
            {
                "task": str(task),
                "names": task.names,
                "blocks": result.blocks,
                "errors": result.errors,
                "notes": result.notes,
            }
        )

    def close(self) -> None:
        """Remove the file: the run is over."""
        self.path.unlink(missing_ok=True)


def _is_sound(line: Any) -> bool:
    """Whether a line holds a result."""
    if not isinstance(line, dict) or {k: type(v) for k, v in line.items()} != FIELDS:
        return False
    blocks, errors, notes = line["blocks"].values(), line["errors"].values(), line["notes"].values()
    return (
        all(isinstance(name, str) for name in (*line["names"], *notes))
        and all(isinstance(some, list) and some for some in blocks)
        and all(type(n) in (int, float) for n in (*errors, *(n for some in blocks for n in some)))
    )
