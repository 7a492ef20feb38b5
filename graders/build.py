"""From a pinned spec to a grader: the only place that looks at a grader's type."""

from typing import Any

from core.grader_specs import PinnedGraderSpec
from graders.grade import Grader
from outbound.safe_http import NetworkPolicy


def build_grader(spec: PinnedGraderSpec, secrets: dict[str, dict[str, Any]], network: NetworkPolicy) -> Grader:
    """A grader ready to use inside a running event loop.

    `secrets` is {secret_ref: {"headers": {...}, "signing_secret": str | None}}. Raises: GraderError when it cannot be built here.
    """
    raise NotImplementedError
