"""From a pinned spec to a grader: the only place that looks at a grader's type."""

from importlib import import_module
from typing import Any

from core.errors import GraderError
from core.grader_specs import (
    PinnedEndpointGrader,
    PinnedGraderSpec,
    PinnedLabelModelGrader,
    PinnedMultiGrader,
    PinnedRewardModelGrader,
    PinnedScoreModelGrader,
    PythonGrader,
    StringCheckGrader,
    TextSimilarityGrader,
)
from graders import python_sandbox, string_check, text_similarity
from graders.endpoint import EndpointGrader
from graders.grade import Grader
from graders.limits import MakeLimiter, local_limiter
from graders.model_judge import ModelJudge, label_scale, number_scale
from graders.multi import MultiGrader
from outbound.safe_http import NetworkPolicy


def build_grader(
    spec: PinnedGraderSpec, secrets: dict[str, dict[str, Any]], network: NetworkPolicy, make_limiter: MakeLimiter = local_limiter
) -> Grader:
    """A grader for one event loop: `grade` and `close` are called from the loop that used it first.

    `secrets` is {secret_ref: {"headers": {...}, "signing_secret": str | None, ...}}; `make_limiter` says over which processes the
    limits of services hold. Raises: GraderError, InvalidRequest.
    """
    match spec:
        case StringCheckGrader():
            return string_check.StringCheckGrader(spec)
        case TextSimilarityGrader():
            return text_similarity.TextSimilarityGrader(spec)
        case PythonGrader():
            return python_sandbox.PythonGrader(spec.source, interpreter=spec.interpreter)
        case PinnedEndpointGrader():
            return EndpointGrader(spec, _secret(spec.secret_ref, secrets), network=network, make_limiter=make_limiter)
        case PinnedScoreModelGrader():
            headers = _secret(spec.secret_ref, secrets).get("headers") or {}
            return ModelJudge(spec, number_scale(spec), headers=headers, network=network, make_limiter=make_limiter)
        case PinnedLabelModelGrader():
            headers = _secret(spec.secret_ref, secrets).get("headers") or {}
            return ModelJudge(spec, label_scale(spec), headers=headers, network=network, make_limiter=make_limiter)
        case PinnedRewardModelGrader():
            grader: Grader = import_module("graders.reward_model").load_reward_model(spec)  # the only one that needs torch
            return grader
        case PinnedMultiGrader():
            members = {name: build_grader(member, secrets, network, make_limiter) for name, member in spec.graders.items()}
            return MultiGrader(members, spec.calculate_output)


def _secret(secret_ref: str, secrets: dict[str, dict[str, Any]]) -> dict[str, Any]:
    if secret_ref not in secrets:
        raise GraderError(f"The secrets of grader '{secret_ref}' were not handed over.", code="grader_secret_missing")
    return secrets[secret_ref]
