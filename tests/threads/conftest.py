"""Fixtures that tests of threads share with those of the runtime."""

from tests.runtime.conftest import bundles

__all__ = ["bundles"]
