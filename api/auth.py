"""Who is calling: a bearer key is looked up by its hash and stands for one project and a set of scopes."""

from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from api.services import Services, get_services
from core.errors import NotAuthenticated, NotAuthorized
from database.projects import find_api_key

ADMIN = "admin"
bearer = HTTPBearer(auto_error=False, description="An API key: `Authorization: Bearer hone-...`")


@dataclass(frozen=True)
class Caller:
    project_id: str
    key_id: str
    scopes: frozenset[str]


def current_caller(
    request: Request,
    services: Annotated[Services, Depends(get_services)],
    credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)],
) -> Caller:
    """Raises: NotAuthenticated, with the same words for an unknown, a revoked and an expired key."""
    if credentials is None:
        raise NotAuthenticated("You did not provide an API key: send it as 'Authorization: Bearer YOUR_KEY'.")
    with services.database.reading() as session:
        key = find_api_key(session, credentials.credentials)
        if key is None:
            raise NotAuthenticated("Incorrect API key provided.")
        return Caller(key.project_id, key.id, frozenset(key.scopes))


def requires(*scopes: str) -> Callable[[Caller], Coroutine[None, None, Caller]]:
    """A dependency: the caller, if its key has one of `scopes` (`admin` has all of them)."""

    async def check(caller: Annotated[Caller, Depends(current_caller)]) -> Caller:
        if not caller.scopes & {*scopes, ADMIN}:
            raise NotAuthorized(f"This key lacks the scope {' or '.join(scopes)}.", code="insufficient_scope")
        return caller

    return check


JobReader = Annotated[Caller, Depends(requires("jobs:read"))]
JobWriter = Annotated[Caller, Depends(requires("jobs:write"))]
GraderReader = Annotated[Caller, Depends(requires("graders:write", "jobs:read"))]
GraderWriter = Annotated[Caller, Depends(requires("graders:write"))]
ModelReader = Annotated[Caller, Depends(requires("models:read"))]
Admin = Annotated[Caller, Depends(requires(ADMIN))]
