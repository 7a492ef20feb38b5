"""Uploaded files: rows that name a blob. Deleting hides the row; the content stays as long as an unfinished job pins it."""

from typing import Literal

from sqlalchemy import ColumnElement, select, update
from sqlalchemy.orm import Session

from core.errors import NotFound
from database.blobs import BlobInfo
from database.models import File
from database.pages import Page
from database.sql import clock, fetch_page, insert_row, new_id, update_row


def insert_file(session: Session, project_id: str, *, filename: str, purpose: str, blob: BlobInfo, expires_at: float | None = None) -> File:
    return insert_row(
        session,
        File,
        id=new_id("file-"),
        project_id=project_id,
        filename=filename,
        purpose=purpose,
        blob=blob.id,
        bytes=blob.bytes,
        sha256=blob.sha256,
        created_at=clock(),
        expires_at=expires_at,
    )


def get_file(session: Session, project_id: str, file_id: str) -> File:
    """Raises: NotFound for a file that is unknown, another project's, deleted or expired."""
    query = select(File).where(File.id == file_id, File.project_id == project_id, _is_visible())
    file = session.execute(query).scalar_one_or_none()
    if file is None:
        raise _not_found(file_id)
    return file


def list_files(
    session: Session, project_id: str, *, purpose: str | None, after: str | None, limit: int, order: Literal["asc", "desc"] = "desc"
) -> Page[File]:
    query = select(File).where(File.project_id == project_id, _is_visible())
    if purpose is not None:
        query = query.where(File.purpose == purpose)
    columns = (File.created_at, File.id)
    return fetch_page(session, query, columns, after=after, limit=limit, id_column=File.id, descending=order == "desc")


def delete_file(session: Session, project_id: str, file_id: str) -> None:
    """Raises: NotFound."""
    statement = update(File).where(File.id == file_id, File.project_id == project_id, File.deleted_at.is_(None))
    if update_row(session, statement.values(deleted_at=clock()), File) is None:
        raise _not_found(file_id)


def _is_visible() -> ColumnElement[bool]:
    return File.deleted_at.is_(None) & (File.expires_at.is_(None) | (File.expires_at > clock()))


def _not_found(file_id: str) -> NotFound:
    return NotFound(f"No such File object: {file_id}", param="id")
