"""Files: streamed in and out in pieces, so that neither memory nor disk of the API holds one whole."""

from functools import partial
from itertools import chain
from typing import Annotated, Any, Literal
from urllib.parse import quote

from anyio import to_thread
from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import StreamingResponse

from api.auth import Caller, JobReader, JobWriter
from api.multipart import Part, body_chunks, read_parts
from api.pagination import After, FileLimit, ListPage, list_page
from api.schemas import Deleted, FileObject
from api.services import Services, get_services
from api.views import file_view
from core.errors import InvalidRequest
from database.blobs import BlobInfo
from database.files import delete_file, get_file, insert_file, list_files
from database.sql import now

router = APIRouter(prefix="/v1/files", tags=["files"])
PURPOSES = ("assistants", "batch", "fine-tune", "vision", "user_data", "evals")
MAX_FILENAME = 255
EXPIRY_SECONDS = (3600, 2_592_000)
ANCHOR, SECONDS = "expires_after[anchor]", "expires_after[seconds]"

UPLOAD_FORM: dict[str, Any] = {
    "type": "object",
    "required": ["file", "purpose"],
    "properties": {
        "file": {"type": "string", "format": "binary"},
        "purpose": {"type": "string", "enum": list(PURPOSES)},
        ANCHOR: {"type": "string", "enum": ["created_at"]},
        SECONDS: {"type": "integer", "minimum": EXPIRY_SECONDS[0], "maximum": EXPIRY_SECONDS[1]},
    },
}
UPLOAD_BODY = {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": UPLOAD_FORM}}}}
HasServices = Annotated[Services, Depends(get_services)]


@router.post("", openapi_extra=UPLOAD_BODY)
async def create_file(request: Request, caller: JobWriter, services: HasServices) -> FileObject:
    """Uploads a file. Its content is checked by the job that uses it, not here."""
    return await to_thread.run_sync(partial(_store_upload, request, caller, services), limiter=services.uploads)


@router.get("")
def list_all(
    caller: JobReader,
    services: HasServices,
    after: After = None,
    limit: FileLimit = 10_000,
    order: Literal["asc", "desc"] = "desc",
    purpose: Annotated[str | None, Query(max_length=64)] = None,
) -> ListPage[FileObject]:
    """The project's files, newest first."""
    with services.database.reading() as session:
        page = list_files(session, caller.project_id, purpose=purpose, after=after, limit=limit, order=order)
        return list_page(page, file_view)


@router.get("/{file_id}")
def retrieve_file(file_id: str, caller: JobReader, services: HasServices) -> FileObject:
    """One file, without its content."""
    with services.database.reading() as session:
        return file_view(get_file(session, caller.project_id, file_id))


@router.get("/{file_id}/content", response_class=StreamingResponse)
def file_content(file_id: str, caller: JobReader, services: HasServices) -> StreamingResponse:
    """The file's bytes, each piece verified before it is sent."""
    with services.database.reading() as session:
        file = get_file(session, caller.project_id, file_id)
        blob, size, filename = file.blob, file.bytes, file.filename
    chunks = services.blobs.read(blob)
    first = next(chunks, b"")  # damage in the first piece is still an error answer, not a broken stream
    headers = {
        "content-length": str(size),
        "content-disposition": f"attachment; filename*=UTF-8''{quote(filename, safe='')}",
        "x-content-type-options": "nosniff",
    }
    return StreamingResponse(chain([first], chunks), media_type="application/octet-stream", headers=headers)


@router.delete("/{file_id}")
def remove_file(file_id: str, caller: JobWriter, services: HasServices) -> Deleted:
    """Hides the file. Jobs that use it keep its content."""
    with services.database.transaction() as session:
        delete_file(session, caller.project_id, file_id)
    return Deleted(id=file_id, object="file")


def _store_upload(request: Request, caller: Caller, services: Services) -> FileObject:
    """Runs in a thread of its own kind. A refused upload leaves no row and no blob."""
    fields: dict[str, str] = {}
    stored: BlobInfo | None = None
    filename = ""
    try:
        for part in read_parts(request.headers.get("content-type", ""), body_chunks(request)):
            if part.name == "file" and stored is None:
                filename = _checked_filename(part)
                stored = services.blobs.put(part.chunks, kind="file")
            elif part.name in fields or part.name not in ("purpose", ANCHOR, SECONDS):
                raise InvalidRequest(f"Unknown or repeated field: '{part.name}'.", code="unknown_parameter", param=part.name)
            else:
                fields[part.name] = part.text()
                _check_field(part.name, fields[part.name])
        return _insert(services, caller.project_id, filename, fields, stored)
    except BaseException:
        if stored is not None:
            services.blobs.delete(stored.id)
        raise


def _insert(services: Services, project_id: str, filename: str, fields: dict[str, str], stored: BlobInfo | None) -> FileObject:
    for name, is_given in (("file", stored is not None), ("purpose", "purpose" in fields)):
        if not is_given:
            raise InvalidRequest(f"Missing required parameter: '{name}'.", code="missing_required_parameter", param=name)
    assert stored is not None
    if stored.bytes == 0:
        raise InvalidRequest("The file is empty.", code="empty_file", param="file")
    if (ANCHOR in fields) != (SECONDS in fields):
        raise InvalidRequest(f"'{ANCHOR}' and '{SECONDS}' go together.", code="missing_required_parameter", param="expires_after")
    with services.database.transaction() as session:
        expires_at = now(session) + int(fields[SECONDS]) if SECONDS in fields else None
        file = insert_file(session, project_id, filename=filename, purpose=fields["purpose"], blob=stored, expires_at=expires_at)
        return file_view(file)


def _checked_filename(part: Part) -> str:
    filename = (part.filename or "").replace("\\", "/").rsplit("/", 1)[-1]
    if not filename or len(filename) > MAX_FILENAME:
        raise InvalidRequest(f"The file needs a name of 1 to {MAX_FILENAME} characters.", param="file")
    return filename


def _check_field(name: str, value: str) -> None:
    if name == "purpose" and value not in PURPOSES:
        raise InvalidRequest(f"'purpose' is {value!r}; it must be one of {', '.join(PURPOSES)}.", param="purpose")
    if name == ANCHOR and value != "created_at":
        raise InvalidRequest(f"'{ANCHOR}' must be 'created_at'.", param=ANCHOR)
    low, high = EXPIRY_SECONDS
    if name == SECONDS and not (value.isdecimal() and len(value) <= 8 and low <= int(value) <= high):
        raise InvalidRequest(f"'{SECONDS}' must be a whole number from {low} to {high}.", param=SECONDS)
