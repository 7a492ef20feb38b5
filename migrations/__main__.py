"""`python -m migrations upgrade | downgrade REVISION | current`, on the database that the settings name."""

import argparse
import sys

from core.settings import load_settings
from migrations.run import current, downgrade, upgrade


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m migrations", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("upgrade").add_argument("revision", nargs="?", default="head")
    commands.add_parser("downgrade").add_argument("revision", help="a revision, -1 for one back, base for nothing")
    commands.add_parser("current")
    arguments = parser.parse_args()
    settings = load_settings()
    if arguments.command == "upgrade":
        upgrade(settings, arguments.revision)
    elif arguments.command == "downgrade":
        downgrade(settings, arguments.revision)
    for name, revision in current(settings).items():
        sys.stdout.write(f"{name}: {revision or 'nothing installed'}\n")


if __name__ == "__main__":
    main()
