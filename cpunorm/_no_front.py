"""Stands in for `_front` where nothing was compiled: declines every call."""

from typing import Any


def _decline(*_: object) -> Any:
    return None


def __getattr__(name: str) -> Any:
    return _decline
