"""Models: base models, which an admin registers for every project, and the project's own fine-tuned ones."""

from typing import Annotated

from fastapi import APIRouter, Depends

from api.auth import ADMIN, Admin, JobWriter, ModelReader
from api.bodies import JsonBody, documents, parse_body
from api.requests import CreateModel
from api.schemas import Deleted, Model, ModelList
from api.services import Services, get_services
from api.views import model_view
from core.errors import NotAuthorized
from database.base_models import delete_model, get_model, list_models, register_model

router = APIRouter(prefix="/v1/models", tags=["models"])
HasServices = Annotated[Services, Depends(get_services)]
FOLDER = {"name": "SmolLM2-135M-Instruct", "source": {"type": "folder", "path": "/models/smollm2"}}
HUB = {
    "name": "Qwen/Qwen3-0.6B",
    "source": {"type": "hub", "repo": "Qwen/Qwen3-0.6B", "revision": "c1899de289a04d12100db370d81485cdf75e47ca"},
}


@router.post("", openapi_extra=documents(CreateModel, folder=FOLDER, hub=HUB))
def create_model(body: JsonBody, caller: Admin, services: HasServices) -> Model:
    """Registers a base model for every project: a name, and where the weights lie on the workers."""
    request = parse_body(CreateModel, body)
    source = request.source.model_dump()
    with services.database.transaction() as session:
        model = register_model(session, name=request.name, project_id=None, kind="base", source=source, digest=request.digest or "")
        return model_view(model, services.settings.organization_id)


@router.get("")
def list_all_models(caller: ModelReader, services: HasServices) -> ModelList:
    """Base models and the project's own, newest first."""
    with services.database.reading() as session:
        models = list_models(session, caller.project_id)
    return ModelList(data=[model_view(model, services.settings.organization_id) for model in models])


@router.get("/{model:path}")
def retrieve_model(model: str, caller: ModelReader, services: HasServices) -> Model:
    """One model. Its name may hold slashes, sent as they are or as %2F."""
    with services.database.reading() as session:
        return model_view(get_model(session, caller.project_id, model), services.settings.organization_id)


@router.delete("/{model:path}")
def remove_model(model: str, caller: JobWriter, services: HasServices) -> Deleted:
    """Deletes a fine-tuned model of the project, or, with an admin key, a base model. Jobs that use it run on."""
    with services.database.transaction() as session:
        owner = get_model(session, caller.project_id, model).project_id
        if owner is None and ADMIN not in caller.scopes:
            raise NotAuthorized("Only an admin may delete a base model.", param="model")
        delete_model(session, owner, model)
    return Deleted(id=model, object="model")
