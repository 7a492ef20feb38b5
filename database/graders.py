"""Registered endpoint graders. Every change is a new version; a job pins the version current at submit.

Headers and signing secret are encrypted; `grader_view` shows only that a header is there.
"""

import base64
import secrets as random_secrets
import time
from typing import Any

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from core.errors import NotFound
from core.grader_specs import EndpointOptions, PinnedEndpointGrader
from database.models import Grader, GraderVersion, Job
from database.pages import Page
from database.secrets import Secrets
from database.sql import clock, fetch_page, insert_row, new_id, update_row

MASK = "**********"
ROTATION_SECONDS = 24 * 3600.0
"""How long the old signing secret still signs beside the new one."""


def create_grader(
    session: Session, secrets: Secrets, project_id: str, *, name: str, options: EndpointOptions, headers: dict[str, str]
) -> tuple[Grader, GraderVersion, str]:
    """The grader, its version 1 and its signing secret ("whsec_..."), which is shown this once."""
    grader = insert_row(session, Grader, id=new_id("grader_"), project_id=project_id, name=name, version=1, created_at=clock())
    signing_secret = new_signing_secret()
    stored = {"headers": headers, "signing_secret": signing_secret}
    return grader, _insert_version(session, secrets, grader, options, stored), signing_secret


def add_grader_version(
    session: Session,
    secrets: Secrets,
    project_id: str,
    grader_id: str,
    *,
    name: str | None = None,
    options: EndpointOptions,
    headers: dict[str, str] | None = None,
) -> tuple[Grader, GraderVersion]:
    """The next version. The signing secret stays; so do the headers and the name when None. Raises: NotFound."""
    changes = {"version": Grader.version + 1} | ({} if name is None else {"name": name})
    grader = update_row(session, update(Grader).where(*_owned(project_id, grader_id)).values(changes), Grader)
    if grader is None:
        raise _not_found(grader_id)
    stored = read_secrets(session, secrets, f"{grader.id}@{grader.version - 1}")
    if headers is not None:
        stored = {**stored, "headers": headers}
    return grader, _insert_version(session, secrets, grader, options, stored)


def rotate_signing_secret(session: Session, secrets: Secrets, project_id: str, grader_id: str) -> tuple[Grader, GraderVersion, str, float]:
    """The grader, its newest version, its new signing secret and when the one before ceases to sign beside it (unix seconds).

    Holds for all versions, so that a job which pinned an old one signs with the new secret from its next start on.
    Of three secrets only the two newest sign. Raises: NotFound.
    """
    locked = update(Grader).where(*_owned(project_id, grader_id)).values(version=Grader.version)
    grader = update_row(session, locked, Grader)
    if grader is None:
        raise _not_found(grader_id)
    new, expires_at = new_signing_secret(), time.time() + ROTATION_SECONDS
    for version in session.scalars(select(GraderVersion).where(GraderVersion.grader_id == grader.id)):
        stored = secrets.decrypt(version.secrets)
        changed = {"signing_secret": new, "previous_signing_secret": stored["signing_secret"], "previous_expires_at": expires_at}
        version.secrets = secrets.encrypt({**stored, **changed})
    return grader, _version(session, grader.id, grader.version), new, expires_at


def get_grader(session: Session, project_id: str, grader_id: str) -> tuple[Grader, GraderVersion]:
    """The grader and its newest version. Raises: NotFound."""
    grader = session.execute(select(Grader).where(*_owned(project_id, grader_id))).scalar_one_or_none()
    if grader is None:
        raise _not_found(grader_id)
    return grader, _version(session, grader.id, grader.version)


def list_graders(session: Session, project_id: str, *, after: str | None, limit: int) -> Page[tuple[Grader, GraderVersion]]:
    query = select(Grader).where(Grader.project_id == project_id, Grader.deleted_at.is_(None))
    page = fetch_page(session, query, (Grader.created_at, Grader.id), after=after, limit=limit, id_column=Grader.id)
    return Page([(grader, _version(session, grader.id, grader.version)) for grader in page.items], page.has_more)


def delete_grader(session: Session, project_id: str, grader_id: str) -> None:
    """Hides it; jobs that pinned a version run on. Raises: NotFound."""
    if update_row(session, update(Grader).where(*_owned(project_id, grader_id)).values(deleted_at=clock()), Grader) is None:
        raise _not_found(grader_id)


def pin_grader(session: Session, project_id: str, grader_id: str, number: int | None = None) -> PinnedEndpointGrader:
    """Version `number`, or the newest one, as a job stores it. Raises: NotFound."""
    grader, version = get_grader(session, project_id, grader_id)
    if number is not None:
        version = _version(session, grader.id, number)
    reference = f"{grader.id}@{version.version}"
    return PinnedEndpointGrader(
        type="endpoint", name=grader.name, secret_ref=reference, grader_version=reference, **_options(version).model_dump()
    )


def read_secrets(session: Session, secrets: Secrets, secret_ref: str) -> dict[str, Any]:
    """{"headers", "signing_secret"} of the version that `secret_ref` ("grader_x@3") names, deleted or not; after a rotation also
    {"previous_signing_secret", "previous_expires_at"}.

    Serves the holder of a job, which got the reference from a row of its own project. Raises: NotFound.
    """
    grader_id, _, number = secret_ref.partition("@")
    if not number.isdecimal():
        raise _not_found(secret_ref)
    return secrets.decrypt(_version(session, grader_id, int(number)).secrets)


def read_job_secrets(session: Session, secrets: Secrets, job: Job) -> dict[str, dict[str, Any]]:
    """{secret_ref: {"headers": ..., "signing_secret": ...}} of all that the job's grader names: given inline, and of registered graders."""
    inline = secrets.decrypt(job.secrets) if job.secrets is not None else {}
    references = [spec["secret_ref"] for spec in [job.grader, *job.grader.get("graders", {}).values()] if "secret_ref" in spec]
    return {reference: inline[reference] if reference in inline else read_secrets(session, secrets, reference) for reference in references}


def grader_view(grader: Grader, version: GraderVersion) -> dict[str, Any]:
    """What may be shown of a grader: everything, header values masked, no signing secret."""
    return {
        "id": grader.id,
        "object": "grader",
        "name": grader.name,
        "version": version.version,
        "created_at": int(grader.created_at),
        "type": "endpoint",
        **version.options,
        "headers": dict.fromkeys(version.header_names, MASK),
    }


def new_signing_secret() -> str:
    """A Standard Webhooks secret of 32 random bytes."""
    return "whsec_" + base64.b64encode(random_secrets.token_bytes(32)).decode()


def _insert_version(session: Session, secrets: Secrets, grader: Grader, options: EndpointOptions, stored: dict[str, Any]) -> GraderVersion:
    return insert_row(
        session,
        GraderVersion,
        grader_id=grader.id,
        version=grader.version,
        options={name: getattr(options, name) for name in EndpointOptions.model_fields},
        header_names=sorted(stored["headers"]),
        secrets=secrets.encrypt(stored),
        created_at=clock(),
    )


def _options(version: GraderVersion) -> EndpointOptions:
    return EndpointOptions.model_validate(version.options)


def _version(session: Session, grader_id: str, number: int) -> GraderVersion:
    version = session.get(GraderVersion, (grader_id, number))
    if version is None:
        raise _not_found(f"{grader_id}@{number}")
    return version


def _owned(project_id: str, grader_id: str) -> tuple[Any, ...]:
    return Grader.id == grader_id, Grader.project_id == project_id, Grader.deleted_at.is_(None)


def _not_found(grader_id: str) -> NotFound:
    return NotFound(f"No such grader: {grader_id}", param="grader_id")
