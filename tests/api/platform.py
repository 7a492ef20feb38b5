"""An API in this process over a database of its own, and accounts in it: what every test of this room starts from."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import func, select

from core.settings import Settings
from database.base_models import register_model
from database.models import Base
from database.projects import ADMIN_SCOPES, create_api_key, create_project
from database.secrets import ensure_secret_key
from database.session import Database
from migrations.run import upgrade

BASE_MODEL = "tiny/base"
ROW = b'{"messages":[{"role":"user","content":"2+2?"}],"answer":"4"}\n'
STRING_CHECK = {
    "type": "string_check",
    "name": "exact",
    "input": "{{sample.output_text}}",
    "reference": "{{item.answer}}",
    "operation": "eq",
}
GRADER: dict[str, Any] = {"name": "arithmetic", "url": "https://grader.example.com/grade", "headers": {"authorization": "Bearer hush-hush"}}


def make_settings(home: Path, **values: Any) -> Settings:
    settings = Settings(home=home, allowed_private_networks=("127.0.0.0/8",), max_body_bytes=200_000, **values)
    ensure_secret_key(settings)
    upgrade(settings)
    return settings


@dataclass(frozen=True)
class Account:
    """A project with a key, and a client that sends it."""

    project_id: str
    key: str
    http: Any
    """A TestClient."""

    def get(self, path: str, **params: Any) -> Any:
        return self.request("GET", path, **({"params": params} if params else {}))

    def post(self, path: str, body: Any = None) -> Any:
        return self.request("POST", path, json=body) if body is not None else self.request("POST", path)

    def delete(self, path: str) -> Any:
        return self.request("DELETE", path)

    def request(self, method: str, path: str, **arguments: Any) -> Any:
        return self.http.request(method, path, headers={"authorization": f"Bearer {self.key}"}, **arguments)

    def upload(self, content: bytes = ROW * 12, purpose: str = "fine-tune", filename: str = "rows.jsonl") -> str:
        answer = self.request("POST", "/v1/files", data={"purpose": purpose}, files={"file": (filename, content)})
        assert answer.status_code == 200, answer.text
        return str(answer.json()["id"])

    def job_request(self, *, grader: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
        block = {"grader": grader or STRING_CHECK}
        method = {"type": "reinforcement", "reinforcement": block}
        return {"model": BASE_MODEL, "training_file": self.upload(), "method": method, **changes}

    def create_job(self, **changes: Any) -> dict[str, Any]:
        answer = self.post("/v1/fine_tuning/jobs", self.job_request(**changes))
        assert answer.status_code == 200, answer.text
        job: dict[str, Any] = answer.json()
        return job


@dataclass(frozen=True)
class Platform:
    settings: Settings
    database: Database
    http: Any
    """A TestClient."""

    def account(self, scopes: tuple[str, ...] = ADMIN_SCOPES, project_id: str | None = None) -> Account:
        with self.database.transaction() as session:
            project_id = project_id or create_project(session, "test").id
            _, clear = create_api_key(session, project_id, "test", list(scopes))
        return Account(project_id, clear, self.http)

    def register_base_model(self) -> None:
        with self.database.transaction() as session:
            register_model(session, name=BASE_MODEL, project_id=None, kind="base", source={"type": "folder", "path": "/m"}, digest="d" * 64)

    def fine_tuned_model(self, account: Account) -> str:
        """A model of the account's project, as a finished job leaves it."""
        name = f"{BASE_MODEL}:org:{account.project_id}".replace("tiny", "ft:tiny")
        with self.database.transaction() as session:
            register_model(session, name=name, project_id=account.project_id, kind="fine_tuned", source={}, digest="d" * 64)
        return name

    def count_rows(self) -> dict[str, int]:
        """Rows of every table but those that reading a key could touch."""
        with self.database.reading() as session:
            return {
                name: session.execute(select(func.count()).select_from(table)).scalar_one() for name, table in Base.metadata.tables.items()
            }


def assert_error(answer: Any, status: int, code: str, param: str | None = None) -> str:
    """The one error body, with these values. Returns its message."""
    assert answer.status_code == status, answer.text
    body = answer.json()
    assert body.keys() == {"error", "request_id"}
    assert body["error"].keys() == {"message", "type", "param", "code"}
    assert (body["error"]["code"], body["error"]["param"]) == (code, param), body
    assert body["error"]["type"] == ("server_error" if status >= 500 else "invalid_request_error")
    assert body["request_id"] == answer.headers["x-request-id"]
    return str(body["error"]["message"])
