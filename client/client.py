"""The whole route table as methods: `Client(base_url, api_key).jobs.create({...})`. Answers are the API's JSON objects."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Literal, Self
from urllib.parse import quote

import httpx

from client.transport import TIMEOUT, Object, Transport
from core.grader_specs import EndpointOptions
from core.specs import parse_grader, parse_job_request

Phase = Literal["train", "valid"]


def _every(page: Callable[[str | None], Object]) -> Iterator[Object]:
    """All items of all pages; `page` takes the id of the last item seen."""
    after = None
    while True:
        answer = page(after)
        yield from answer["data"]
        if not answer["has_more"] or not answer["data"]:
            return
        after = answer["data"][-1]["id"]


def _segment(value: str) -> str:
    """`value` as one segment of a path; the colons of model names stay."""
    return quote(value, safe=":")


class Files:
    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def upload(self, path: Path, purpose: str = "fine-tune", *, filename: str | None = None) -> Object:
        """Streams the file from disk."""
        with open(path, "rb") as file:
            return self._transport.post("files", files={"file": (filename or path.name, file)}, data={"purpose": purpose})

    def upload_bytes(self, content: bytes, filename: str, purpose: str = "fine-tune") -> Object:
        return self._transport.post("files", files={"file": (filename, content)}, data={"purpose": purpose})

    def retrieve(self, file_id: str) -> Object:
        return self._transport.get(f"files/{_segment(file_id)}")

    def content(self, file_id: str) -> Iterator[bytes]:
        return self._transport.read(f"files/{_segment(file_id)}/content")

    def list(self, *, purpose: str | None = None, after: str | None = None, limit: int | None = None) -> Object:
        return self._transport.get("files", purpose=purpose, after=after, limit=limit)

    def delete(self, file_id: str) -> Object:
        return self._transport.delete(f"files/{_segment(file_id)}")


class Jobs:
    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def create(self, request: Object) -> Object:
        """Checked here first, so that a mistake costs no round trip. Raises: core.errors.InvalidRequest, client.errors.*."""
        parse_grader(parse_job_request(request).method.reinforcement.grader, "method.reinforcement.grader")
        return self._transport.post("fine_tuning/jobs", request)

    def retrieve(self, job_id: str) -> Object:
        return self._transport.get(self._path(job_id))

    def list(self, *, after: str | None = None, limit: int | None = None, metadata: dict[str, str] | None = None) -> Object:
        filters = {f"metadata[{key}]": value for key, value in (metadata or {}).items()}
        return self._transport.get("fine_tuning/jobs", after=after, limit=limit, **filters)

    def cancel(self, job_id: str) -> Object:
        return self._transport.post(self._path(job_id, "cancel"))

    def events(self, job_id: str, *, after: str | None = None, limit: int | None = None) -> Object:
        """One page, newest first."""
        return self._transport.get(self._path(job_id, "events"), after=after, limit=limit)

    def every_event(self, job_id: str) -> Iterator[Object]:
        return _every(lambda after: self.events(job_id, after=after, limit=100))

    def checkpoints(self, job_id: str, *, after: str | None = None, limit: int | None = None) -> Object:
        return self._transport.get(self._path(job_id, "checkpoints"), after=after, limit=limit)

    def metrics(self, job_id: str, *, after: int = 0, names: Sequence[str] | None = None, max_points: int | None = None) -> Object:
        """Points in the order of storing. The answer's `last_seq` is the next `after`."""
        wanted = ",".join(names) if names else None
        return self._transport.get(self._path(job_id, "metrics"), after=after, names=wanted, max_points=max_points)

    def every_metric(self, job_id: str, *, names: Sequence[str] | None = None) -> Iterator[Object]:
        after, has_more = 0, True
        while has_more:
            page = self.metrics(job_id, after=after, names=names)
            yield from page["data"]
            after, has_more = page["last_seq"], page["has_more"]

    def digests(self, job_id: str, *, after: str | None = None, limit: int | None = None) -> Object:
        """One page of the chain, first step first, with the `states` that the job keeps."""
        return self._transport.get(self._path(job_id, "digests"), after=after, limit=limit)

    def every_digest(self, job_id: str) -> Iterator[Object]:
        return _every(lambda after: self.digests(job_id, after=after, limit=100))

    def samples(
        self,
        job_id: str,
        *,
        step: int | None = None,
        phase: Phase | None = None,
        status: Literal["graded", "abstained", "failed"] | None = None,
        order: Literal["seq", "reward", "-reward"] | None = None,
        after: str | None = None,
        limit: int | None = None,
    ) -> Object:
        query = {"step": step, "phase": phase, "status": status, "order": order, "after": after, "limit": limit}
        return self._transport.get(self._path(job_id, "samples"), **query)

    def every_sample(self, job_id: str, *, step: int, phase: Phase) -> Iterator[Object]:
        return _every(lambda after: self.samples(job_id, step=step, phase=phase, after=after, limit=100))

    def _path(self, job_id: str, *rest: str) -> str:
        return "/".join(["fine_tuning/jobs", _segment(job_id), *rest])


class Graders:
    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def create(self, name: str, options: EndpointOptions, headers: dict[str, str] | None = None) -> Object:
        """The only answer that holds `signing_secret`."""
        body = {"name": name, "headers": headers or {}, **options.model_dump(mode="json", exclude_none=True)}
        return self._transport.post("graders", body)

    def retrieve(self, grader_id: str) -> Object:
        return self._transport.get(f"graders/{_segment(grader_id)}")

    def update(self, grader_id: str, changes: Object) -> Object:
        """A new version; running jobs keep theirs."""
        return self._transport.post(f"graders/{_segment(grader_id)}", changes)

    def list(self, *, after: str | None = None, limit: int | None = None) -> Object:
        return self._transport.get("graders", after=after, limit=limit)

    def delete(self, grader_id: str) -> Object:
        return self._transport.delete(f"graders/{_segment(grader_id)}")

    def test(self, grader_id: str, *, version: int | None = None, file_id: str | None = None) -> Object:
        """A report to poll with `report`."""
        return self._transport.post(f"graders/{_segment(grader_id)}/test", {"version": version, "file_id": file_id})

    def regrade(
        self,
        grader_id: str,
        job_id: str,
        *,
        version: int | None = None,
        step: int | None = None,
        phase: Phase | None = None,
        max_samples: int = 200,
    ) -> Object:
        """A report to poll with `report`: the job's samples scored by this grader, compared with their old scores."""
        body = {"job_id": job_id, "version": version, "step": step, "phase": phase, "max_samples": max_samples}
        return self._transport.post(f"graders/{_segment(grader_id)}/regrade", body)

    def report(self, grader_id: str, report_id: str) -> Object:
        return self._transport.get(f"graders/{_segment(grader_id)}/reports/{_segment(report_id)}")

    def reports(self, grader_id: str, *, kind: str | None = None, after: str | None = None, limit: int | None = None) -> Object:
        """One page, newest first."""
        return self._transport.get(f"graders/{_segment(grader_id)}/reports", kind=kind, after=after, limit=limit)

    def run(self, grader: Object, model_sample: str, item: Object | None = None) -> Object:
        body: Object = {"grader": grader, "model_sample": model_sample}
        return self._transport.post("fine_tuning/alpha/graders/run", body if item is None else {**body, "item": item})

    def validate(self, grader: Object) -> Object:
        return self._transport.post("fine_tuning/alpha/graders/validate", {"grader": grader})


class Models:
    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def add(self, name: str, source: Object, digest: str | None = None) -> Object:
        """Registers a base model (admin)."""
        return self._transport.post("models", {"name": name, "source": source, **({"digest": digest} if digest else {})})

    def retrieve(self, name: str) -> Object:
        return self._transport.get(f"models/{_segment(name)}")

    def list(self) -> Object:
        return self._transport.get("models")

    def delete(self, name: str) -> Object:
        return self._transport.delete(f"models/{_segment(name)}")


class Keys:
    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def create(self, name: str, scopes: Sequence[str], project_id: str | None = None) -> Object:
        """The only answer that holds `key`."""
        project = {"project_id": project_id} if project_id else {}
        return self._transport.post("admin/api_keys", {"name": name, "scopes": list(scopes), **project})

    def list(self) -> Object:
        return self._transport.get("admin/api_keys")

    def revoke(self, key_id: str) -> Object:
        return self._transport.delete(f"admin/api_keys/{_segment(key_id)}")


class Client:
    """Use as a context manager, or close it."""

    def __init__(self, base_url: str, api_key: str, *, timeout: httpx.Timeout = TIMEOUT, http: httpx.BaseTransport | None = None) -> None:
        self._transport = Transport(base_url, api_key, timeout=timeout, http=http)
        self.files = Files(self._transport)
        self.jobs = Jobs(self._transport)
        self.graders = Graders(self._transport)
        self.models = Models(self._transport)
        self.keys = Keys(self._transport)

    def close(self) -> None:
        self._transport.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
