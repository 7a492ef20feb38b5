"""The models that a job may name: base models that an admin registered, and what finished jobs made of them."""

from typing import Any, Literal

from sqlalchemy import ColumnElement, select, update
from sqlalchemy.orm import Session

from core.errors import Conflict, NotFound
from database.models import Model
from database.sql import clock, insert_or_skip, new_id, update_row


def register_model(
    session: Session,
    *,
    name: str,
    project_id: str | None,
    kind: Literal["base", "fine_tuned"],
    source: dict[str, Any],
    digest: str,
    job_id: str | None = None,
    checkpoint_id: str | None = None,
) -> Model:
    """The new model; every project sees it when `project_id` is None.

    `source` of a base model: {"type": "folder" | "gguf" | "hub", "path" or "repo" and "revision"}.
    Raises: Conflict when the name is taken.
    """
    model = insert_or_skip(
        session,
        Model,
        id=new_id("model_"),
        name=name,
        project_id=project_id,
        kind=kind,
        source=source,
        digest=digest,
        job_id=job_id,
        checkpoint_id=checkpoint_id,
        created_at=clock(),
    )
    if model is None:
        raise Conflict(f"There is already a model '{name}'.", code="model_exists", param="name")
    return model


def get_model(session: Session, project_id: str, name: str) -> Model:
    """The project's own model of that name, else the shared one. Raises: NotFound."""
    query = select(Model).where(Model.name == name, _is_visible(project_id)).order_by(Model.project_id.is_(None)).limit(1)
    model = session.execute(query).scalar_one_or_none()
    if model is None:
        raise NotFound(f"The model '{name}' does not exist or you do not have access to it.", code="model_not_found", param="model")
    return model


def get_pinned_model(session: Session, project_id: str, name: str, digest: str) -> Model:
    """The model that a job named at submit, also if it was hidden since. Raises: NotFound when the name means another one now."""
    is_visible = (Model.project_id == project_id) | Model.project_id.is_(None)
    query = select(Model).where(Model.name == name, Model.digest == digest, is_visible)
    query = query.order_by(Model.deleted_at.is_not(None), Model.project_id.is_(None), Model.created_at.desc()).limit(1)
    model = session.execute(query).scalar_one_or_none()
    if model is None:
        message = f"The model '{name}' is not the one that the job was submitted for."
        raise NotFound(message, code="model_not_found", param="model")
    return model


def list_models(session: Session, project_id: str) -> list[Model]:
    """Newest first."""
    query = select(Model).where(_is_visible(project_id)).order_by(Model.created_at.desc(), Model.id.desc())
    return list(session.execute(query).scalars())


def delete_model(session: Session, project_id: str | None, name: str) -> None:
    """Hides the model that belongs to exactly `project_id` (None: a shared one); jobs that named it run on. Raises: NotFound."""
    statement = update(Model).where(Model.name == name, Model.project_id.is_not_distinct_from(project_id), Model.deleted_at.is_(None))
    if update_row(session, statement.values(deleted_at=clock()), Model) is None:
        raise NotFound(f"The model '{name}' does not exist or is not yours.", code="model_not_found", param="model")


def _is_visible(project_id: str) -> ColumnElement[bool]:
    return ((Model.project_id == project_id) | Model.project_id.is_(None)) & Model.deleted_at.is_(None)
