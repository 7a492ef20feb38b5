"""Our signatures against two implementations that are not ours."""

import time
from datetime import UTC, datetime

import pytest
import standardwebhooks
from hypothesis import given, settings
from hypothesis import strategies as st
from openai import OpenAI

from core.errors import InvalidRequest, NotAuthenticated
from outbound.signing import generate_secret, sign, verify

BODY = b'{"object": "event", "type": "fine_tuning.job.succeeded", "id": "evt_1", "created_at": 1, "data": {"id": "ftjob-1"}}'


@settings(max_examples=30)
@given(st.text().map(lambda text: text.encode(errors="replace")), st.from_regex(r"[A-Za-z0-9_-]{1,64}", fullmatch=True))
def test_the_reference_library_accepts_every_body_that_we_sign(body: bytes, message_id: str) -> None:
    secret = generate_secret()
    headers = sign(secret, message_id, int(time.time()), body)
    standardwebhooks.Webhook(secret).verify(body, headers, json_parse=False)


def test_the_openai_client_unwraps_what_we_sign() -> None:
    secret = generate_secret()
    client = OpenAI(api_key="none", webhook_secret=secret)
    event = client.webhooks.unwrap(BODY, sign(secret, "evt_1", int(time.time()), BODY))
    assert event.type == "fine_tuning.job.succeeded"


def test_we_accept_what_the_reference_library_signs() -> None:
    secret = generate_secret()
    now = time.time()
    moment = datetime.fromtimestamp(int(now), UTC)
    signature = standardwebhooks.Webhook(secret).sign("msg_1", moment, BODY.decode())
    headers = {"Webhook-Id": "msg_1", "Webhook-Timestamp": str(int(now)), "Webhook-Signature": f"v1a,other {signature}"}
    verify(secret, headers, BODY, now=now)


@pytest.mark.parametrize("change", ["body", "webhook-id", "webhook-timestamp", "webhook-signature", "secret", "missing"])
def test_a_change_to_anything_that_is_signed_is_noticed(change: str) -> None:
    secret, now = generate_secret(), 1_700_000_000
    headers = sign(secret, "msg_1", now, BODY)
    body = BODY + b" " if change == "body" else BODY
    if change == "secret":
        secret = generate_secret()
    if change in headers:
        headers[change] = {"webhook-timestamp": str(now + 1)}.get(change, "v1,AAAA" if "signature" in change else "msg_2")
    if change == "missing":
        del headers["webhook-id"]
    with pytest.raises(NotAuthenticated) as caught:
        verify(secret, headers, body, now=now)
    assert caught.value.code == "invalid_signature"


@pytest.mark.parametrize(("age", "accepted"), [(0, True), (299, True), (301, False), (-299, True), (-301, False)])
def test_a_signature_counts_for_five_minutes(age: int, accepted: bool) -> None:
    secret, now = generate_secret(), 1_700_000_000
    headers = sign(secret, "msg_1", now - age, BODY)
    if accepted:
        verify(secret, headers, BODY, now=now)
    else:
        with pytest.raises(NotAuthenticated):
            verify(secret, headers, BODY, now=now)


@pytest.mark.parametrize("secret", ["", "whsec_", "whsec_not base64!"])
def test_a_bad_secret_is_refused_without_quoting_it(secret: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        sign(secret, "msg_1", 1, BODY)
    assert "not base64" not in caught.value.message
