"""Graders as a request names them: pinned for a job, masked for an echo, run once for `graders/run`. Runs no user code in this process."""

import asyncio
import hashlib
import json
import time
from dataclasses import dataclass, replace
from typing import Any

from sqlalchemy.orm import Session

from api.requests import RunGrader
from core.errors import InvalidRequest, NotFound
from core.grader_specs import (
    CallOptions,
    GraderSpec,
    InlineEndpointGrader,
    LabelModelGrader,
    MultiGrader,
    PinnedEndpointGrader,
    PinnedGraderSpec,
    PinnedLabelModelGrader,
    PinnedMultiGrader,
    PinnedRewardModelGrader,
    PinnedScoreModelGrader,
    PinnedSingleGrader,
    RegisteredEndpointGrader,
    RewardModelGrader,
    ScoreModelGrader,
    SingleGrader,
)
from core.run_directory import REWARD_MODELS
from core.settings import Settings
from database.base_models import get_model
from database.graders import MASK, pin_grader, read_secrets
from database.secrets import Secrets
from graders.build import build_grader
from graders.check import check_programs, endpoints_of
from graders.grade import Grade, GradeFailure, Grader, GradeRequest, failed
from graders.limits import MakeLimiter
from graders.python_sandbox import SandboxLimits
from graders.shared_limits import SharedLimits
from graders.template import names_output_json
from outbound.safe_http import NetworkPolicy

INLINE = "inline"
CHECK_LIMITS = SandboxLimits(seconds=2.0, num_processes=1)
RUN_TIMEOUT_SECONDS = 60.0
"""`graders/run` asks an endpoint or judge once, and not longer than this, whatever the grader says."""

RUN_SECONDS = 120.0
"""For one run in all, with its wait for a place that jobs hold."""

RUN_AWAY_SECONDS = 10.0

Secret = dict[str, Any]


@dataclass(frozen=True)
class Pinned:
    spec: PinnedGraderSpec
    inline_secrets: dict[str, Secret]
    """{secret_ref: {"headers", "signing_secret"}} of endpoints and judges given inline; a registered one's stay with its version."""


def check_sources(spec: GraderSpec, param: str) -> None:
    """Loads `spec`'s programs in the sandbox. Raises: InvalidRequest naming the source of one that does not load."""
    asyncio.run(check_programs(spec, param, CHECK_LIMITS))


def pin(session: Session, project_id: str, spec: GraderSpec, param: str) -> Pinned:
    """`spec` with every endpoint in the version that is current now. Raises: InvalidRequest for a grader that is not the project's."""
    secrets: dict[str, Secret] = {}
    if not isinstance(spec, MultiGrader):
        return Pinned(_pin_single(session, project_id, spec, param, INLINE, secrets), secrets)
    members = {
        name: _pin_single(session, project_id, member, f"{param}.graders.{name}", f"{INLINE}:{name}", secrets)
        for name, member in spec.graders.items()
    }
    return Pinned(PinnedMultiGrader(type="multi", name=spec.name, graders=members, calculate_output=spec.calculate_output), secrets)


def _pin_single(
    session: Session, project_id: str, spec: SingleGrader, param: str, reference: str, secrets: dict[str, Secret]
) -> PinnedSingleGrader:
    if isinstance(spec, RegisteredEndpointGrader):
        try:
            pinned = pin_grader(session, project_id, spec.grader_id)
        except NotFound as error:
            raise InvalidRequest(error.message, code="grader_not_found", param=f"{param}.grader_id") from error
        return pinned.model_copy(update={"name": spec.name or pinned.name})
    if isinstance(spec, InlineEndpointGrader):
        secrets[reference] = {"headers": spec.headers, "signing_secret": None}
        fields = spec.model_dump(exclude={"headers"})
        return PinnedEndpointGrader(**fields, secret_ref=reference, grader_version=INLINE)
    if isinstance(spec, ScoreModelGrader | LabelModelGrader):
        headers = {} if spec.api_key is None else {"authorization": f"Bearer {spec.api_key}"}
        secrets[reference] = {"headers": headers, "signing_secret": None}
        kind = PinnedScoreModelGrader if isinstance(spec, ScoreModelGrader) else PinnedLabelModelGrader
        return kind(**spec.model_dump(exclude={"api_key"}), secret_ref=reference)
    if isinstance(spec, RewardModelGrader):
        return _pin_reward_model(session, project_id, spec, param)
    return spec


def _pin_reward_model(session: Session, project_id: str, spec: RewardModelGrader, param: str) -> PinnedRewardModelGrader:
    try:
        model = get_model(session, project_id, spec.model)
    except NotFound as error:
        raise InvalidRequest(error.message, code="model_not_found", param=f"{param}.model") from error
    folder = f"{REWARD_MODELS}/{hashlib.sha256(spec.model.encode()).hexdigest()[:16]}"
    return PinnedRewardModelGrader(**spec.model_dump(), digest=model.digest, folder=folder)


def masked(raw: dict[str, Any]) -> dict[str, Any]:
    """A grader's JSON, as sent or as parsed, with the key and the value of every header hidden."""
    shown = dict(raw)
    if isinstance(raw.get("headers"), dict):
        shown["headers"] = dict.fromkeys(raw["headers"], MASK)
    if raw.get("api_key") is not None:
        shown["api_key"] = MASK
    members = raw.get("graders")
    if isinstance(members, list):
        shown["graders"] = [masked(member) for member in members]
    elif isinstance(members, dict) and isinstance(members.get("type"), str):
        shown["graders"] = masked(members)
    elif isinstance(members, dict):
        shown["graders"] = {name: masked(member) for name, member in members.items()}
    return shown


def secrets_of(session: Session, secrets: Secrets, pinned: Pinned) -> dict[str, Secret]:
    """Everything that `build_grader` needs to call the endpoints and judges of `pinned`."""
    registered = {endpoint.secret_ref for endpoint in endpoints_of(pinned.spec)} - pinned.inline_secrets.keys()
    return {**pinned.inline_secrets, **{reference: read_secrets(session, secrets, reference) for reference in registered}}


def run_limits(settings: Settings, project_id: str) -> SharedLimits:
    """Under which `graders/run` calls services: those of the project's jobs, all runs together taking turns with each of these."""
    return SharedLimits(settings.effective_broker_url(), project_id, owner="runs", away_seconds=RUN_AWAY_SECONDS)


def lacks_json(spec: PinnedGraderSpec, request: RunGrader) -> bool:
    """Whether `spec` looks at `sample.output_json` of a text that is no JSON: a wrong answer, which the answer's flags name."""
    return names_output_json(spec) and _json_or_none(request.model_sample) is None


def run_once(
    spec: PinnedGraderSpec, secrets: dict[str, Secret], network: NetworkPolicy, request: RunGrader, make_limiter: MakeLimiter
) -> Grade:
    """The grade of one sample, in an event loop of its own: a grader that blocks holds up nobody else.

    Its `latency_seconds` are those of the whole run, for every kind of grader. Raises: InvalidRequest.
    """
    members = spec.graders.values() if isinstance(spec, PinnedMultiGrader) else [spec]
    if any(isinstance(member, PinnedRewardModelGrader) for member in members):
        raise InvalidRequest("A 'reward_model' runs only on a worker, inside a job; it cannot be tried here.", param="grader.type")
    started = time.monotonic()
    grade = asyncio.run(_grade(build_grader(_for_one_try(spec), secrets, network, make_limiter), _grade_request(request)))
    return replace(grade, latency_seconds=time.monotonic() - started)


async def _grade(grader: Grader, request: GradeRequest) -> Grade:
    try:
        async with asyncio.timeout(RUN_SECONDS):
            return await grader.grade(request)
    except TimeoutError:
        return failed(GradeFailure.TIMEOUT, f"No grade within {RUN_SECONDS:g} seconds; jobs may hold all places at the grader.", attempts=0)
    finally:
        await grader.close()


def _grade_request(request: RunGrader) -> GradeRequest:
    item = dict(request.item or {})
    if request.reference_answer is not None:
        item.setdefault("reference_answer", request.reference_answer)
    return GradeRequest(item=item, output_text=request.model_sample, output_json=_json_or_none(request.model_sample))


def _json_or_none(text: str) -> Any:
    try:
        return json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return None


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _for_one_try(spec: PinnedGraderSpec) -> PinnedGraderSpec:
    if isinstance(spec, PinnedMultiGrader):
        return spec.model_copy(update={"graders": {name: _one_try(member) for name, member in spec.graders.items()}})
    return _one_try(spec)


def _one_try(spec: PinnedSingleGrader) -> PinnedSingleGrader:
    if not isinstance(spec, CallOptions):
        return spec
    return spec.model_copy(update={"max_attempts": 1, "timeout_seconds": min(spec.timeout_seconds, RUN_TIMEOUT_SECONDS)})
