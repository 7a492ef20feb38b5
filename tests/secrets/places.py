"""Where a secret could lie: every place as (name, bytes), and what a secret may look like there."""

import json
import sqlite3
from base64 import b64encode, urlsafe_b64encode
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_plus

import psycopg
import redis
from psycopg import sql

from tests.platform import Platform

Place = tuple[str, bytes]


def found(secrets: dict[str, str], places: Iterator[Place]) -> list[str]:
    """Which secret lies where, in which form."""
    forms = {name: forms_of(secret) for name, secret in secrets.items()}
    return [
        f"{name} ({how}) in {place}" for place, content in places for name, kinds in forms.items() for how, form in kinds if form in content
    ]


def forms_of(secret: str) -> list[tuple[str, bytes]]:
    plain = secret.encode()
    forms = [("plain", plain), ("JSON", json.dumps(secret)[1:-1].encode()), ("hex", plain.hex().encode())]
    percent = {quote(secret, safe="").encode(), quote(secret).encode(), quote_plus(secret).encode()}
    forms += [("percent", form) for form in percent | {form.lower() for form in percent}]
    for before in (b"", b"a", b"ab"):
        for encode in (b64encode, urlsafe_b64encode):
            whole = encode(before + plain)
            forms.append(("base64", whole[4 if before else 0 : -4]))
    return [(how, form) for how, form in forms if len(form) >= 8]


def files(folder: Path, leave_out: tuple[str, ...] = ()) -> Iterator[Place]:
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.is_symlink() and path.name not in leave_out:
            try:
                yield str(path), path.read_bytes()
            except FileNotFoundError:
                continue


def tables(platform: Platform, database_url: str) -> Iterator[Place]:
    """Every row as text, decoded by the database itself; SQLite's files are searched as they are too."""
    if not database_url:
        for name in ("hone.db", "blobs.db"):
            connection = sqlite3.connect(f"file:{platform.home / name}?mode=ro", uri=True, timeout=10)
            for (table,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
                yield f"{name}:{table}", repr(connection.execute(f"SELECT * FROM {table}").fetchall()).encode()
            connection.close()
        return
    with psycopg.connect(database_url.replace("+psycopg", ""), connect_timeout=5) as connection_:
        names = connection_.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'public'").fetchall()
        for (table,) in names:
            rows = connection_.execute(sql.SQL("SELECT * FROM {}").format(sql.Identifier(table))).fetchall()
            yield f"table {table}", repr(rows).encode()


def keys(broker_url: str) -> Iterator[Place]:
    """Every key of the broker with its value, whatever its type."""
    url = broker_url.replace("redis+socket://", "unix://").partition("?")[0]
    with redis.Redis.from_url(url, socket_timeout=5) as client:
        for key in client.scan_iter():
            read: Any = {
                b"string": lambda key: client.get(key),
                b"list": lambda key: client.lrange(key, 0, -1),
                b"set": lambda key: client.smembers(key),
                b"zset": lambda key: client.zrange(key, 0, -1),
                b"hash": lambda key: client.hgetall(key),
            }[client.type(key)]
            yield f"broker {key.decode(errors='replace')}", key + repr(read(key)).encode()


def processes(roots: list[int]) -> list[tuple[int, bytes, bytes]]:
    """(pid, command line, environment) of everything below `roots`."""
    parents: dict[int, int] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    inside = set(roots)
    while more := {pid for pid, parent in parents.items() if parent in inside} - inside:
        inside |= more
    read = []
    for pid in inside:
        try:
            read.append((pid, Path(f"/proc/{pid}/cmdline").read_bytes(), Path(f"/proc/{pid}/environ").read_bytes()))
        except OSError:
            continue
    return read
