"""Registered endpoint graders: their headers and signing secret are stored encrypted, and every change is a new version."""

from typing import Annotated

from fastapi import APIRouter, Depends

from api.auth import GraderReader, GraderWriter
from api.bodies import JsonBody, documents, parse_body
from api.pagination import After, Limit, ListPage, list_page
from api.requests import CreateGrader, UpdateGrader
from api.schemas import Deleted, Grader, NewGrader, RotatedGrader
from api.services import Services, get_services
from api.views import grader_view
from core.errors import Conflict
from core.grader_specs import EndpointOptions
from database.graders import add_grader_version, create_grader, delete_grader, get_grader, list_graders, rotate_signing_secret
from graders.endpoint import check_headers
from outbound.safe_http import check_url

router = APIRouter(prefix="/v1/graders", tags=["graders"])
HasServices = Annotated[Services, Depends(get_services)]
EXAMPLE = {
    "name": "arithmetic",
    "url": "https://grader.example.com/grade",
    "headers": {"authorization": "Bearer ..."},
    "timeout_seconds": 30,
}


@router.post("", openapi_extra=documents(CreateGrader, endpoint=EXAMPLE))
def register_grader(body: JsonBody, caller: GraderWriter, services: HasServices) -> NewGrader:
    """Registers an endpoint. Only this answer shows the secret with which its requests are signed."""
    request = parse_body(CreateGrader, body)
    check_url(request.url, services.network)
    check_headers(request.headers)
    with services.database.transaction() as session:
        grader, version, signing_secret = create_grader(
            session, services.secrets, caller.project_id, name=request.name, options=_options(request), headers=request.headers
        )
        return NewGrader(signing_secret=signing_secret, **grader_view(grader, version).model_dump())


@router.get("")
def list_all_graders(caller: GraderReader, services: HasServices, after: After = None, limit: Limit = 20) -> ListPage[Grader]:
    """The project's graders, newest first."""
    with services.database.reading() as session:
        page = list_graders(session, caller.project_id, after=after, limit=limit)
        return list_page(page, lambda row: grader_view(*row))


@router.get("/{grader_id}")
def retrieve_grader(grader_id: str, caller: GraderReader, services: HasServices) -> Grader:
    """The grader's newest version."""
    with services.database.reading() as session:
        return grader_view(*get_grader(session, caller.project_id, grader_id))


@router.post("/{grader_id}", openapi_extra=documents(UpdateGrader, slower={"timeout_seconds": 120}))
def update_grader(grader_id: str, body: JsonBody, caller: GraderWriter, services: HasServices) -> Grader:
    """A new version with what the body names changed. Jobs go on with the version they started with."""
    request = parse_body(UpdateGrader, body)
    with services.database.transaction() as session:
        _, version = get_grader(session, caller.project_id, grader_id)
        given = request.model_dump(exclude_unset=True, exclude={"name", "headers"})
        if given.get("url", "") is None:
            del given["url"]
        if given.get("format") == "single":
            given.setdefault("batch_size", None)
        options = parse_body(EndpointOptions, {**version.options, **given})
        check_url(options.url, services.network)
        check_headers(request.headers or {})
        grader, newest = add_grader_version(
            session, services.secrets, caller.project_id, grader_id, name=request.name, options=options, headers=request.headers
        )
        if newest.version != version.version + 1:
            raise Conflict("Another request changed the grader at the same time. Send the change again.", param="grader_id")
        return grader_view(grader, newest)


@router.post("/{grader_id}/rotate_secret")
def rotate_secret(grader_id: str, caller: GraderWriter, services: HasServices) -> RotatedGrader:
    """A new signing secret, shown only here. For 24 hours requests carry two signatures, the new secret's and the old one's.

    A job that runs signs with what it started with; its next start takes the new secret.
    """
    with services.database.transaction() as session:
        grader, version, signing_secret, expires_at = rotate_signing_secret(session, services.secrets, caller.project_id, grader_id)
        shown = grader_view(grader, version).model_dump()
        return RotatedGrader(signing_secret=signing_secret, previous_secret_expires_at=int(expires_at), **shown)


@router.delete("/{grader_id}")
def remove_grader(grader_id: str, caller: GraderWriter, services: HasServices) -> Deleted:
    """Hides the grader. Jobs that pinned a version run on."""
    with services.database.transaction() as session:
        delete_grader(session, caller.project_id, grader_id)
    return Deleted(id=grader_id, object="grader")


def _options(request: CreateGrader) -> EndpointOptions:
    return EndpointOptions.model_validate({name: getattr(request, name) for name in EndpointOptions.model_fields})
