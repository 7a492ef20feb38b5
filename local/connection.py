"""Where the command line finds the API and its key: HONE_URL and HONE_API_KEY, else the home on this machine."""

import os
from pathlib import Path

import typer

from client.client import Client
from core.settings import Settings
from local.home import Home, read_url

DEFAULT_URL = "http://127.0.0.1:8000"


def local_home() -> Home:
    return Home(Settings().home)


def base_url() -> str:
    """Ends in /v1. What HONE_URL says, else where this home's `hone up` answers, else the default port."""
    url = (os.environ.get("HONE_URL") or read_url(local_home()) or DEFAULT_URL).rstrip("/")
    return url if url.endswith("/v1") else f"{url}/v1"


def find_api_key() -> str:
    """Raises: typer.BadParameter when there is none."""
    key = os.environ.get("HONE_API_KEY") or _read(local_home().api_key)
    if not key:
        raise typer.BadParameter(f"no API key: set HONE_API_KEY, or start the platform once ('hone up' writes {local_home().api_key}).")
    return key


def _read(path: Path) -> str:
    return path.read_text().strip() if path.exists() else ""


def connect() -> Client:
    return Client(base_url(), find_api_key())
