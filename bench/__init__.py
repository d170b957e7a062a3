"""The comparison suite: docs/bench.md says what it measures and how."""

INTERRUPTED = 130
