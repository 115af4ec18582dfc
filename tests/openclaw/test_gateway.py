"""The gateway without our service: the behavior of OpenClaw on which the service relies."""

import asyncio
from uuid import uuid4

import httpx

from tests.service import until

from .gateway import Gateway, session_of
from .model_provider import ModelProvider


def said(response: httpx.Response) -> str:
    """Returns the text of a completion."""
    assert response.status_code == 200, response.text
    text: str = response.json()["choices"][0]["message"]["content"]
    return text


def test_user_and_header_name_the_same_session_each_alone_and_together(gateway: Gateway) -> None:
    """`user`, the header, and both together (as the service sends them) lead to the same session. The service thus
    keeps working if a version of the gateway ignores one of them."""
    key = str(uuid4())
    user = f"adapter-session-{key}"
    header = {"x-openclaw-session-key": session_of(key)}
    assert said(gateway.complete("MARK-guard1", user=user)) == "seen: guard1"
    assert said(gateway.complete("MARK-guard2", headers=header)) == "seen: guard1,guard2"
    assert said(gateway.complete("MARK-guard3", user=user, headers=header)) == "seen: guard1,guard2,guard3"
    assert [name for name in gateway.sessions() if key in name] == [session_of(key)]


def test_a_session_key_in_the_body_is_no_session(gateway: Gateway) -> None:
    """With `session_key` in the body instead of `user`, every message starts a new conversation."""
    key = str(uuid4())
    assert said(gateway.complete("MARK-lost1", session_key=key)) == "seen: lost1"
    assert said(gateway.complete("MARK-lost2", session_key=key)) == "seen: lost2"
    assert not [name for name in gateway.sessions() if key in name]


async def four_at_once(gateway: Gateway) -> list[int]:
    """Sends four first messages to one new session at the same moment. Returns the statuses."""
    user = f"adapter-session-{uuid4()}"
    headers = {"Authorization": f"Bearer {gateway.token}"}
    body = {"model": "agent:main", "user": user, "messages": [{"role": "user", "content": "MARK-rush"}]}
    async with httpx.AsyncClient(base_url=gateway.url, headers=headers, timeout=60, trust_env=False) as client:
        # The connections are opened first, so that only the gateway decides the order.
        await asyncio.gather(*(client.get("/startupz") for _ in range(4)))
        sent = await asyncio.gather(*(client.post("/v1/chat/completions", json=body) for _ in range(4)))
    return [answer.status_code for answer in sent]


def test_four_sends_at_once_can_fail(gateway: Gateway) -> None:
    """The gateway can fail concurrent first messages of a session, so the service queues messages itself.

    The gateway queues messages to an existing session. If two messages both find no session, both create it, and the
    later one is answered with 500 (`SessionWorkStartChangedError` in its log), in about every second attempt.
    """
    statuses: set[int] = set()
    for _ in range(40):
        statuses.update(asyncio.run(four_at_once(gateway)))
        if 500 in statuses:
            break
    assert statuses == {200, 500}


def test_a_caller_that_leaves_aborts_the_run(gateway: Gateway, provider: ModelProvider) -> None:
    """The gateway aborts a run whose client disconnects, so a task of the service holds the connection, not a request
    of a browser."""
    key = str(uuid4())
    with httpx.Client(base_url=gateway.url, timeout=60, trust_env=False) as client:
        request = client.build_request(
            "POST",
            "/v1/chat/completions",
            headers={"Authorization": f"Bearer {gateway.token}"},
            json={
                "model": "agent:main",
                "user": f"adapter-session-{key}",
                "stream": True,
                "messages": [{"role": "user", "content": "MARK-left SLOW-100"}],
            },
        )
        response = client.send(request, stream=True)
        next(line for line in response.iter_lines() if "seen" in line)
        response.close()
    until(lambda: provider.run("left").state == "aborted", 5, "the model's run to be aborted")
    history = until(lambda: gateway.idle_history(key), 10, "the session to be idle")
    assert [role for role, _ in history] == ["user"]


def test_a_wrong_token_is_refused(gateway: Gateway) -> None:
    """The gateway refuses a wrong token, so the other tests also show that the service sends the right one."""
    assert gateway.models("wrong") == 401
    assert gateway.models(gateway.token) == 200
