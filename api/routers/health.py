"""Is this process alive, and can it serve: for load balancers, without a key."""

from typing import Annotated

from fastapi import APIRouter, Depends
from sqlalchemy import select
from sqlalchemy.exc import SQLAlchemyError

from api.errors import ServiceUnavailable
from api.schemas import Health
from api.services import Services, get_services
from database.models import Project

router = APIRouter(tags=["health"])


@router.get("/healthz")
async def healthz() -> Health:
    """The process answers."""
    return Health()


@router.get("/readyz")
def readyz(services: Annotated[Services, Depends(get_services)]) -> Health:
    """The database answers and has its tables."""
    try:
        with services.database.reading() as session:
            session.execute(select(Project.id).limit(1))
    except SQLAlchemyError as error:
        raise ServiceUnavailable("The database cannot be reached, or its migrations have not run.") from error
    return Health()
