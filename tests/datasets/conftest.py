import pytest


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """What was found out about pictures is remembered apart from the user's."""
    monkeypatch.setenv("TRAINER_DATA", str(tmp_path_factory.mktemp("cache")))
