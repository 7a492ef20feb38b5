"""A grader behind a URL in one file of standard library: checks the signature, compares, answers {"score": ...}.

GRADER_SECRET=whsec_... python -m examples.endpoint_grader --port 9000 --mode last_integer
"""

import argparse
import base64
import hashlib
import hmac
import json
import os
import re
import time
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

MODES = {
    "last_integer": lambda text, answer: re.findall(r"-?\d+", text)[-1:] == [str(answer).strip()],
    "exact": lambda text, answer: text.strip() == str(answer).strip(),
    "contains": lambda text, answer: str(answer).strip().lower() in text.lower(),
}
MAX_BODY_BYTES = 16 * 1024 * 1024


def is_signed(secret: str, headers: Mapping[str, str], body: bytes) -> bool:
    """Standard Webhooks: one of the signatures is right and not older than five minutes. Names of `headers` are lower case."""
    message_id, sent_at = headers.get("webhook-id", ""), headers.get("webhook-timestamp", "")
    if not sent_at.isdecimal() or abs(time.time() - int(sent_at)) > 300:
        return False
    signed = f"{message_id}.{sent_at}.".encode() + body
    digest = hmac.digest(base64.b64decode(secret.removeprefix("whsec_")), signed, hashlib.sha256)
    expected = "v1," + base64.b64encode(digest).decode()
    return any(hmac.compare_digest(expected.encode(), given.encode()) for given in headers.get("webhook-signature", "").split(" "))


class GraderServer(ThreadingHTTPServer):
    request_queue_size = 128


class GraderHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 60
    wbufsize = 65536  # head and body in one packet
    secret = ""
    is_right = staticmethod(MODES["last_integer"])

    def do_GET(self) -> None:
        self.answer(200, {"status": "ready"})

    def do_POST(self) -> None:
        length = self.headers.get("content-length", "")
        if not length.isdecimal() or int(length) > MAX_BODY_BYTES:
            self.close_connection = True
            return self.answer(411, {"error": f"send a content-length of at most {MAX_BODY_BYTES}"})
        body = self.rfile.read(int(length))
        headers = {name.lower(): value for name, value in self.headers.items()}
        if not is_signed(self.secret, headers, body):
            return self.answer(401, {"error": "the signature is missing, wrong or too old"})
        try:
            request = json.loads(body)
            text, answer = request["sample"]["output_text"], request["item"]["answer"]
        except (ValueError, KeyError, TypeError):
            return self.answer(400, {"error": "expected sample.output_text and item.answer"})
        return self.answer(200, {"score": 1.0 if self.is_right(text, answer) else 0.0})

    def answer(self, status: int, value: dict[str, object]) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        """One line per call would drown everything else."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=9000)
    parser.add_argument("--mode", choices=MODES, default="last_integer")
    options = parser.parse_args()
    secret = os.environ.get("GRADER_SECRET", "")
    if not secret.startswith("whsec_"):
        parser.error("set GRADER_SECRET to the signing secret that the registration showed (whsec_...)")
    settings = {"secret": secret, "is_right": staticmethod(MODES[options.mode])}
    server = GraderServer((options.host, options.port), type("Configured", (GraderHandler,), settings))
    print(f"grading on http://{options.host}:{server.server_port}/ by {options.mode}", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        server.server_close()


if __name__ == "__main__":
    main()
