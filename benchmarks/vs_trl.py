"""A whole training step of ours against TRL's GRPOTrainer: the same model, prompts, lengths, reward and loss, in turn on one machine.

`python -m benchmarks.vs_trl WORK_FOLDER --config fixed-full-bf16` runs the races whose names begin with one of the `--config`s, keeps
their raw rounds in WORK_FOLDER/vs_trl.json and prints the tables of all that were kept by this commit. It needs the machine for
itself; one race takes 7 to 15 minutes on two cores.
"""

import argparse
import json
import os
import time
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.contender import Contender, Report
from benchmarks.gradient_check import check_gradients
from benchmarks.machine import describe_commit, describe_machine
from benchmarks.ours import run_ours
from benchmarks.race_table import Entry, Race, from_plain, make_goals, make_table, to_plain
from benchmarks.trl_peer import run_peer, save_peer_gradients
from benchmarks.workload import Workload, completion_lengths
from local.models import convert_smollm2
from worker.trainer_process import trainer_environment

MICRO_BATCHES = [8, 4, 16, 32]
CONFIGS = ["-".join(parts) for parts in product(("fixed", "drawn"), ("full", "lora"), ("bf16", "amp", "float32"))]
RECORD = "vs_trl.json"


@dataclass
class Session:
    """One call of the program."""

    work: Path
    model: Path
    rounds: int
    num_threads: int
    micro_batches: list[int]
    """That the peer tries, in this order."""

    @property
    def log(self) -> Path:
        return self.work / "vs_trl.log"

    def workload(self, config: str) -> Workload:
        lengths, finetuning, precision = config.split("-")
        return Workload(self.model, completion_lengths(lengths), finetuning, precision, self.num_threads)  # type: ignore[arg-type]

    def race(self, config: str) -> Race:
        """Warm-up steps, the peer's choice of its micro-batch, then rounds in turn."""
        workload = self.workload(config)
        with Contender("ours", self.log, run_ours, workload) as ours:
            say(f"{config}: ours, warm-up", ours.step())
            peer, micro_batch = self.fastest_peer(workload, ours.facts)
            with peer:
                reports: dict[str, list[Report]] = {"ours": [], "peer": []}
                for number in range(1, self.rounds + 1):
                    for name, contender in (("ours", ours), ("peer", peer)):
                        reports[name].append(contender.step())
                        say(f"{config}: round {number}/{self.rounds}, {name}", reports[name][-1])
        whole = Entry("ours", "groups", reports["ours"])
        return Race(config, whole, Entry("TRL", str(micro_batch), reports["peer"]))

    def fastest_peer(self, workload: Workload, switches: dict[str, Any]) -> tuple[Contender, int]:
        """The peer at its best micro-batch, warmed up: each is warmed up and then timed once, one process after the other."""
        best: tuple[float, Contender, int] | None = None
        for micro_batch in self.micro_batches:
            peer = Contender(f"TRL, micro-batch {micro_batch}", self.log, run_peer, workload, micro_batch, switches)
            say(f"{peer.name}, warm-up", peer.step())
            report = peer.step()
            say(peer.name, report)
            seconds = report.seconds["step"]
            if best is not None and best[0] <= seconds:
                peer.close()
                continue
            if best is not None:
                best[1].close()
            best = (seconds, peer, micro_batch)
        assert best is not None
        return best[1], best[2]


def say(what: str, report: Report) -> None:
    phases = ", ".join(f"{name} {seconds:.2f}" for name, seconds in report.seconds.items())
    print(f"{what}: {phases} s, {report.peak_bytes / 2**30:.2f} GiB", flush=True)


def keep(path: Path, commit: str, race: Race) -> None:
    """Adds the race to those of the same commit; those of another commit are dropped."""
    kept = {one.config: one for one in read_kept(path, commit)} | {race.config: race}
    aside = path.with_suffix(".tmp")
    aside.write_text(json.dumps({"commit": commit, "races": [to_plain(one) for one in kept.values()]}, indent=1))
    aside.replace(path)


def read_kept(path: Path, commit: str) -> list[Race]:
    plain = json.loads(path.read_text()) if path.exists() else {"commit": commit, "races": []}
    return [from_plain(race) for race in plain["races"]] if plain["commit"] == commit else []


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.vs_trl", description=__doc__)
    parser.add_argument("work", type=Path, help="folder for the model (0.5 GB), the raw rounds and the log")
    parser.add_argument("--config", nargs="+", default=[], metavar="NAME", help=f"beginnings of names; none: no race. {', '.join(CONFIGS)}")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--micro-batches", type=int, nargs="+", default=MICRO_BATCHES, help="that the peer tries")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--model", type=Path, help="a model folder in place of SmolLM2")
    return parser.parse_args()


def main() -> None:
    given = parse_arguments()
    os.environ.update(trainer_environment(given.threads))
    given.work.mkdir(parents=True, exist_ok=True)
    session = Session(given.work, given.model or convert_smollm2(given.work / "models"), given.rounds, given.threads, given.micro_batches)
    session.log.unlink(missing_ok=True)
    commit, path = describe_commit(), given.work / RECORD
    chosen = [config for config in CONFIGS if config.startswith(tuple(given.config))] if given.config else []
    for finetuning in sorted({config.split("-")[1] for config in chosen}):
        workload = session.workload(f"drawn-{finetuning}-float32")
        print(f"{finetuning}: {check_gradients(workload, session.log, save_peer_gradients)}", flush=True)
    for config in chosen:
        start = time.monotonic()
        keep(path, commit, session.race(config))
        print(f"{config}: {time.monotonic() - start:.0f} s", flush=True)
    races = read_kept(path, commit)
    print(f"\nMachine: {describe_machine()}, {given.threads} threads  \nCommit: {commit}\n")
    print(f"{make_table(races)}\n\n{make_goals(races)}")


if __name__ == "__main__":
    main()
