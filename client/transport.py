"""One HTTP connection to the API: key, timeouts, bounded repeats, errors as exceptions."""

import json
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Self

import httpx

from client.errors import ConnectionFailed, RateLimited, ServerError, api_error

Object = dict[str, Any]
TIMEOUT = httpx.Timeout(60.0, connect=5.0)
MAX_ATTEMPTS = 3
LONGEST_WAIT_SECONDS = 10.0


class Transport:
    """Only what cannot happen twice is repeated: a GET or DELETE, and any request that the server refused with 429."""

    def __init__(self, base_url: str, api_key: str, *, timeout: httpx.Timeout = TIMEOUT, http: httpx.BaseTransport | None = None) -> None:
        """`base_url` ends in /v1. `http` replaces the network in tests."""
        headers = {"Authorization": f"Bearer {api_key}"}
        self._http = httpx.Client(base_url=base_url.rstrip("/") + "/", headers=headers, timeout=timeout, transport=http, trust_env=False)

    def get(self, path: str, **query: Any) -> Object:
        return self._json("GET", path, params=_given(query))

    def post(self, path: str, body: Object | None = None, **options: Any) -> Object:
        content = None if body is None else json.dumps(body).encode()
        headers = {} if content is None else {"Content-Type": "application/json"}
        return self._json("POST", path, content=content, headers=headers, **options)

    def delete(self, path: str) -> Object:
        return self._json("DELETE", path)

    def read(self, path: str) -> Iterator[bytes]:
        """The body in pieces, never held whole."""
        try:
            with self._http.stream("GET", path) as response:
                if response.is_error:
                    response.read()
                    raise api_error(response.status_code, _body(response))
                yield from response.iter_bytes()
        except httpx.TransportError as error:
            raise ConnectionFailed(f"GET {path}: {type(error).__name__}: {error}") from error

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _json(self, method: str, path: str, **options: Any) -> Object:
        for attempt in range(1, MAX_ATTEMPTS + 1):
            try:
                return self._once(method, path, **options)
            except (ConnectionFailed, ServerError, RateLimited) as error:
                may_have_happened = method == "POST" and not isinstance(error, RateLimited)
                if attempt == MAX_ATTEMPTS or may_have_happened:
                    raise
                time.sleep(_wait_seconds(error, attempt))
        raise AssertionError("the last attempt returns or raises")

    def _once(self, method: str, path: str, **options: Any) -> Object:
        try:
            response = self._http.request(method, path, **options)
        except httpx.TransportError as error:
            raise ConnectionFailed(f"{method} {self._http.base_url.join(path)}: {type(error).__name__}: {error}") from error
        body = _body(response)
        if response.is_error:
            raise api_error(response.status_code, body)
        if not isinstance(body, dict):
            raise ConnectionFailed(f"{method} {path}: the answer is not a JSON object; is {self._http.base_url} the API?")
        return body


def _wait_seconds(error: Exception, attempt: int) -> float:
    return min(LONGEST_WAIT_SECONDS, 0.5 * 2.0**attempt if isinstance(error, RateLimited) else 0.2 * 2.0**attempt)


def _body(response: httpx.Response) -> Any:
    try:
        return response.json()
    except ValueError:
        return response.text


def _given(query: Object) -> Object:
    return {name: value for name, value in query.items() if value is not None}
