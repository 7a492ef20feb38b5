"""What can be said of a grader before it grades: used when a job is submitted and by the validate route."""

from core.grader_specs import (
    GraderSpec,
    InlineEndpointGrader,
    JudgeOptions,
    MultiGrader,
    PinnedEndpointGrader,
    PinnedGraderSpec,
    PinnedMultiGrader,
    PythonGrader,
)
from graders.endpoint import check_headers
from graders.formula import parse_formula
from graders.python_sandbox import PythonGrader as PythonSandbox
from graders.python_sandbox import SandboxLimits
from graders.template import check_syntax
from outbound.safe_http import NetworkPolicy, check_url


def check_grader(spec: GraderSpec, network: NetworkPolicy, param: str = "grader", *, has_response_format: bool = True) -> None:
    """Templates, formula, URL and headers of `spec`; runs nothing. Raises: InvalidRequest naming the field below `param`."""
    check_syntax(spec, param, has_response_format=has_response_format)
    if isinstance(spec, MultiGrader):
        parse_formula(spec.calculate_output, list(spec.graders), param=f"{param}.calculate_output")
        for name, member in spec.graders.items():
            check_grader(member, network, f"{param}.graders.{name}", has_response_format=has_response_format)
    if isinstance(spec, InlineEndpointGrader):
        check_url(spec.url, network, param=f"{param}.url")
        check_headers(spec.headers, param=f"{param}.headers")
    if isinstance(spec, JudgeOptions):
        check_url(spec.base_url, network, param=f"{param}.base_url")


async def check_programs(spec: GraderSpec | PinnedGraderSpec, param: str = "grader", limits: SandboxLimits | None = None) -> None:
    """Loads the programs of `spec` in the sandbox. Raises: InvalidRequest naming the source of one that does not load."""
    if isinstance(spec, MultiGrader | PinnedMultiGrader):
        for name, member in spec.graders.items():
            await check_programs(member, f"{param}.graders.{name}", limits)
    if isinstance(spec, PythonGrader):
        sandbox = PythonSandbox(spec.source, limits, interpreter=spec.interpreter)
        try:
            await sandbox.check(param=f"{param}.source")
        finally:
            await sandbox.close()


def endpoints_of(spec: PinnedGraderSpec) -> list[PinnedEndpointGrader]:
    """Every endpoint in `spec`: whose secrets must be handed over."""
    if isinstance(spec, PinnedMultiGrader):
        return [member for member in spec.graders.values() if isinstance(member, PinnedEndpointGrader)]
    return [spec] if isinstance(spec, PinnedEndpointGrader) else []
