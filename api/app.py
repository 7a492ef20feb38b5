"""The HTTP API: `uvicorn api.app:app`. Importing this file opens nothing; the application's start does."""

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from importlib.metadata import version

from anyio import to_thread
from fastapi import FastAPI

from api.errors import install_error_handlers
from api.middleware import BodyLimit, RefuseNul, RequestIds
from api.openapi import install_openapi
from api.routers import admin, alpha_graders, files, grader_reports, graders, health, jobs, models
from api.services import open_services
from core.settings import Settings, load_settings

ROUTERS = (
    files.router,
    jobs.router,
    alpha_graders.router,
    graders.router,
    grader_reports.router,
    models.router,
    admin.router,
    health.router,
)


def create_app(settings: Settings | None = None) -> FastAPI:
    """An application for `settings`; None: those of the environment, read when it starts."""
    app = FastAPI(
        title="Hone", version=version("hone"), lifespan=_lifespan(settings), redirect_slashes=False, docs_url=None, redoc_url=None
    )
    install_error_handlers(app)
    install_openapi(app)
    for router in ROUTERS:
        app.include_router(router)
    for middleware in (BodyLimit, RefuseNul, RequestIds):
        app.add_middleware(middleware)
    return app


def _lifespan(settings: Settings | None) -> Callable[[FastAPI], AbstractAsyncContextManager[None]]:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        services = await to_thread.run_sync(open_services, settings or load_settings())
        app.state.services = services
        try:
            yield
        finally:
            await to_thread.run_sync(services.close)

    return lifespan


app = create_app()
