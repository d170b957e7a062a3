"""Run as ``pytest bench``, the suite has the quick cases."""

import pytest

from . import plan
from .suite import Suite


def _suite(config: pytest.Config) -> Suite | None:
    plugins = config.pluginmanager.get_plugins()
    return next((plugin for plugin in plugins if isinstance(plugin, Suite)), None)


def pytest_configure(config: pytest.Config) -> None:
    """Add the suite, unless ``python -m bench`` has."""
    if _suite(config) is None:
        config.pluginmanager.register(Suite(plan.make(plan.Choice(quick=True))))


@pytest.fixture(scope="session")
def suite(pytestconfig: pytest.Config) -> Suite:
    """What measures, and keeps what it has found."""
    found = _suite(pytestconfig)
    assert found is not None
    return found
