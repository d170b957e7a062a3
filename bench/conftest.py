"""Run as ``pytest bench``, the suite has the quick cases."""

import pytest

from . import plan
from .suite import Suite


def pytest_configure(config: pytest.Config) -> None:
    """Add the suite, unless ``python -m bench`` has."""
    plugins = config.pluginmanager
    if not any(isinstance(plugin, Suite) for plugin in plugins.get_plugins()):
        plugins.register(Suite(plan.make(plan.Choice(quick=True))))
