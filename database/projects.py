"""Projects and the keys that open them. A clear key is returned once and stored nowhere."""

import hashlib
import secrets

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from core.errors import NotFound
from database.models import ApiKey, Project
from database.sql import clock, insert_or_skip, insert_row, new_id, update_row

ADMIN_SCOPES = ("admin", "jobs:write", "jobs:read", "graders:write", "models:read")
FIRST_PROJECT = "proj_default"


def create_project(session: Session, name: str) -> Project:
    return insert_row(session, Project, id=new_id("proj_"), name=name, created_at=clock())


def get_project(session: Session, project_id: str) -> Project:
    """Raises: NotFound."""
    project = session.get(Project, project_id)
    if project is None:
        raise NotFound(f"No such project: {project_id}.", param="project")
    return project


def ensure_first_admin(session: Session) -> str | None:
    """The clear key of a new admin in a new project `default`, or None when there is a project already."""
    if session.execute(select(Project.id).limit(1)).first() is not None:
        return None
    if insert_or_skip(session, Project, id=FIRST_PROJECT, name="default", created_at=clock()) is None:
        return None
    return create_api_key(session, FIRST_PROJECT, "first admin", list(ADMIN_SCOPES))[1]


def create_api_key(
    session: Session, project_id: str, name: str, scopes: list[str], *, expires_at: float | None = None
) -> tuple[ApiKey, str]:
    """The stored key and the clear one ("hone-...", 256 random bits), which nobody can show again."""
    clear = "hone-" + secrets.token_urlsafe(32)
    key = insert_row(
        session,
        ApiKey,
        id=new_id("key_"),
        project_id=project_id,
        name=name,
        key_hash=hash_key(clear),
        hint=clear[-4:],
        scopes=scopes,
        created_at=clock(),
        expires_at=expires_at,
    )
    return key, clear


def find_api_key(session: Session, clear: str) -> ApiKey | None:
    """The key with this clear text, unless it is revoked or expired."""
    is_live = ApiKey.revoked_at.is_(None) & (ApiKey.expires_at.is_(None) | (ApiKey.expires_at > clock()))
    return session.execute(select(ApiKey).where(ApiKey.key_hash == hash_key(clear), is_live)).scalar_one_or_none()


def list_api_keys(session: Session, project_id: str) -> list[ApiKey]:
    query = select(ApiKey).where(ApiKey.project_id == project_id).order_by(ApiKey.created_at.desc(), ApiKey.id.desc())
    return list(session.execute(query).scalars())


def revoke_api_key(session: Session, project_id: str, key_id: str) -> ApiKey:
    """Ends the key; jobs that it started run on. Raises: NotFound."""
    statement = update(ApiKey).where(ApiKey.id == key_id, ApiKey.project_id == project_id, ApiKey.revoked_at.is_(None))
    key = update_row(session, statement.values(revoked_at=clock()), ApiKey)
    if key is None:
        raise NotFound(f"No such API key: {key_id}.", param="id")
    return key


def hash_key(clear: str) -> str:
    """SHA-256 suffices: the key is random, not a human's password."""
    return hashlib.sha256(clear.encode()).hexdigest()
