"""Clients that go away: what they asked for ends in the engine too."""

from __future__ import annotations

import asyncio

import httpx
import pytest
from fastapi import Request

from lamina.server.app import create_app
from lamina.server.streaming import event_stream


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("hang_after", [0, 2])
@pytest.mark.parametrize("stream", [False, True])
def test_disconnect_aborts_every_prompt(url, engine, tools, stream, hang_after, chat):
    engine.hang_after = hang_after
    body = {"messages": [{"role": "user", "content": "x"}]} if chat else {"prompt": ["a", "b"]}
    path = "/v1/chat/completions" if chat else "/v1/completions"
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(url + path, json={**body, "stream": stream}, timeout=0.2)
    expected = 1 if chat else 2
    tools.wait_until(lambda: len(engine.aborted) == expected)
    assert len(engine.started) == expected


def test_a_stream_closed_by_its_reader_is_aborted(client, engine, tools):
    engine.delay_s = 0.02
    stream = client.completions.create(model="org/fake", prompt="x", stream=True)
    next(iter(stream))
    assert engine.aborted == []
    stream.close()
    tools.wait_until(lambda: len(engine.aborted) == 1)


def test_a_stream_is_closed_even_if_the_client_stops_reading():
    closed = []

    async def bodies():
        try:
            while True:
                yield {}
        finally:
            closed.append(True)

    async def scenario():
        gone = asyncio.Event()

        async def receive():
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message):
            if message["type"] == "http.response.body":
                gone.set()
                await asyncio.sleep(60)  # as if the socket's buffer were full

        scope = {"type": "http", "method": "POST", "headers": [], "path": "/"}
        generator = bodies()
        response = await event_stream(Request(scope, receive), generator)
        await asyncio.wait_for(response(scope, receive, send), 5)
        assert closed  # now, not when the garbage collector finds it

    asyncio.run(scenario())


def test_a_failing_prompt_aborts_its_siblings(http, engine, tools):
    engine.delay_s = 0.01
    engine.fail_after = 1
    engine.fails = lambda prompt: prompt[-1] == ord("b")
    assert http.post("/v1/completions", json={"prompt": ["a", "b"]}).status_code == 500
    assert [request.endswith("-0") for request in engine.aborted] == [True]


def test_interrupt_ends_what_runs_and_what_comes(tools):
    async def scenario():
        engine = tools.FakeEngine()
        engine.hang_after = 1
        app = create_app(engine, served_model_name="m")
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as http:
            asks = [
                asyncio.create_task(http.post("/v1/completions", json={"prompt": "x", **more}))
                for more in ({}, {"stream": True})
            ]
            while len(engine.started) < 2:
                await asyncio.sleep(0.001)
            await asyncio.sleep(0.02)
            app.state.serving.interrupt("the server is stopping")
            whole, streamed = await asyncio.wait_for(asyncio.gather(*asks), 5)
            late = await http.post("/v1/completions", json={"prompt": "x"})
        assert sorted(engine.aborted) == sorted(request.id for request in engine.started)
        return whole, streamed, late

    whole, streamed, late = asyncio.run(scenario())
    assert whole.status_code == late.status_code == 503
    for answer in (whole, streamed, late):
        assert "the server is stopping" in answer.text
