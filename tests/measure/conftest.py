"""Fixtures that tests of measurements share with those of the runtime."""

from tests.runtime.conftest import bundles

__all__ = ["bundles"]
