"""One session for all tests here: truths are made and compilations counted once."""

import pytest

from gcompute.certify.session import Session


@pytest.fixture(scope="session")
def session() -> Session:
    return Session()
