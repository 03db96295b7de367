"""A deterministic engine behind the real app on a real socket (see `support.fake_server`)."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import httpx
import openai
import pytest

from lamina.server.app import create_app
from support.fake_server import FakeEngine, Live, wait_until


@pytest.fixture(scope="session")
def _live() -> Iterator[SimpleNamespace]:
    engine = FakeEngine()
    app = create_app(engine, served_model_name="org/fake", max_body_bytes=20_000)
    with Live(app) as live, httpx.Client(base_url=live.url, timeout=10) as http:
        yield SimpleNamespace(engine=engine, url=live.url, http=http)


@pytest.fixture
def engine(_live: SimpleNamespace) -> FakeEngine:
    _live.engine.reset()
    return _live.engine


@pytest.fixture
def url(_live: SimpleNamespace) -> str:
    return _live.url


@pytest.fixture
def http(_live: SimpleNamespace, engine: FakeEngine) -> httpx.Client:
    return _live.http


@pytest.fixture
def client(_live: SimpleNamespace, engine: FakeEngine) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{_live.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def tools() -> SimpleNamespace:
    """What tests need of this file beside fixtures."""
    return SimpleNamespace(FakeEngine=FakeEngine, Live=Live, wait_until=wait_until)
