"""`python -m graders.probe_url`: probes the endpoint that standard input names and writes the report to standard output, both as JSON.

For the command line, on the machine of the grader's author: every address is allowed. Secrets come by the pipe alone.
"""

import asyncio
import json
import sys
from typing import Any

from core.grader_specs import PinnedEndpointGrader
from graders.endpoint import EndpointGrader
from graders.probe import ProbeReport, for_probing, probe_grader
from outbound.safe_http import NetworkPolicy

ANYWHERE = NetworkPolicy(("0.0.0.0/0", "::/0"), allow_http=True)


async def probe_url(
    options: dict[str, Any], headers: dict[str, str], signing_secret: str | None, rows: list[dict[str, Any]]
) -> ProbeReport:
    """`options` are those of `EndpointOptions`. Raises: InvalidRequest for headers or an address that cannot be."""
    spec = for_probing(
        PinnedEndpointGrader.model_validate({**options, "type": "endpoint", "secret_ref": "probe", "grader_version": "probe"})
    )
    grader = EndpointGrader(spec, {"headers": headers, "signing_secret": signing_secret}, network=ANYWHERE)
    try:
        return await probe_grader(grader, spec, rows)
    finally:
        await grader.close()


def main() -> None:
    asked = json.load(sys.stdin)
    report = asyncio.run(probe_url(asked["options"], asked["headers"], asked["signing_secret"], asked["rows"]))
    json.dump(report.as_dict(), sys.stdout)


if __name__ == "__main__":
    main()
