"""Fixtures for all tests; what tests import lies in families.py, as each folder may have a conftest of its own."""

from __future__ import annotations

import pytest
from families import FAMILIES


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)
