"""Where the tests run. Under pytest-xdist the process that hands them out imports no torch, while the others wait for it."""

import pytest


def pytest_configure(config: pytest.Config) -> None:
    if not config.getoption("numprocesses", None):
        config.pluginmanager.import_plugin("shared_fixtures")
