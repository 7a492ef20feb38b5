"""API keys of the caller's own project. Needs the scope `admin`."""

from typing import Annotated

from fastapi import APIRouter, Depends

from api.auth import Admin
from api.bodies import JsonBody, documents, parse_body
from api.pagination import ListPage
from api.requests import CreateApiKey
from api.schemas import ApiKey, NewApiKey
from api.services import Services, get_services
from api.views import key_view
from database.projects import create_api_key, list_api_keys, revoke_api_key

router = APIRouter(prefix="/v1/admin/api_keys", tags=["admin"])
HasServices = Annotated[Services, Depends(get_services)]
EXAMPLE = {"name": "ci", "scopes": ["jobs:write", "jobs:read", "models:read"]}


@router.post("", openapi_extra=documents(CreateApiKey, key=EXAMPLE))
def create_key(body: JsonBody, caller: Admin, services: HasServices) -> NewApiKey:
    """A new key. Only this answer shows it."""
    request = parse_body(CreateApiKey, body)
    with services.database.transaction() as session:
        key, clear = create_api_key(session, caller.project_id, request.name, sorted(set(request.scopes)))
        return NewApiKey(key=clear, **key_view(key).model_dump())


@router.get("")
def list_keys(caller: Admin, services: HasServices) -> ListPage[ApiKey]:
    """All keys of the project, newest first, revoked ones included."""
    with services.database.reading() as session:
        keys = [key_view(key) for key in list_api_keys(session, caller.project_id)]
    return ListPage(data=keys, has_more=False)


@router.delete("/{key_id}")
def revoke_key(key_id: str, caller: Admin, services: HasServices) -> ApiKey:
    """Ends the key at once. Jobs that it started run on."""
    with services.database.transaction() as session:
        return key_view(revoke_api_key(session, caller.project_id, key_id))
