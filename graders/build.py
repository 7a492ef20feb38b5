"""From a pinned spec to a grader: the only place that looks at a grader's type."""

from typing import Any

from core.errors import GraderError
from core.grader_specs import PinnedEndpointGrader, PinnedGraderSpec, PinnedMultiGrader, PythonGrader, StringCheckGrader
from graders import python_sandbox, string_check
from graders.endpoint import EndpointGrader
from graders.grade import Grader
from graders.multi import MultiGrader
from outbound.safe_http import NetworkPolicy


def build_grader(spec: PinnedGraderSpec, secrets: dict[str, dict[str, Any]], network: NetworkPolicy) -> Grader:
    """A grader for one event loop: `grade` and `close` are called from the loop that used it first.

    `secrets` is {secret_ref: {"headers": {...}, "signing_secret": str | None}}. Raises: GraderError, InvalidRequest.
    """
    match spec:
        case StringCheckGrader():
            return string_check.StringCheckGrader(spec)
        case PythonGrader():
            return python_sandbox.PythonGrader(spec.source)
        case PinnedEndpointGrader():
            return _endpoint(spec, secrets, network)
        case PinnedMultiGrader():
            members = {name: build_grader(member, secrets, network) for name, member in spec.graders.items()}
            return MultiGrader(members, spec.calculate_output)


def _endpoint(spec: PinnedEndpointGrader, secrets: dict[str, dict[str, Any]], network: NetworkPolicy) -> EndpointGrader:
    secret = secrets.get(spec.secret_ref)
    if secret is None:
        raise GraderError(f"The secrets of grader '{spec.secret_ref}' were not handed over.", code="grader_secret_missing")
    return EndpointGrader(spec, headers=secret.get("headers") or {}, signing_secret=secret.get("signing_secret"), network=network)
