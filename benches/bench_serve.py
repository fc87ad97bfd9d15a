"""The example of Ray Serve under load: requests a second, and how they met their stacks.

    python benches/bench_serve.py [--stacks 1 4 32] [--clients 4] [--requests 64] [--json FILE]
    python benches/bench_serve.py --url http://127.0.0.1:8000 --stacks 1 4

Two replicas on the CPU paint with the emulated model. Clients ask for stacks that are drawn evenly,
each its next picture when it has the last one. Stacks are of two LoRAs, and none share a file. One
application routes by stack, another one, alike in all else, at random. They are asked in turns, a
round each, so that a machine that does other things is as slow for both. Each stack is asked for a
few times before anything is measured. With `--url` an application that runs already is measured.

    in place     the transformer had the set: nothing was composed
    held         the replica held the stack, those in place among them
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

EXAMPLE = Path(__file__).parents[1] / "examples" / "serve"
ROUTINGS = ("by-stack", "at-random")
LORAS_OF_STACK = 2
HELD_BY_REPLICA = 16
BASE_BYTES = 8 << 20
"""More than the base branches of the emulated model."""
STARTED_S = 300


@dataclass(frozen=True)
class Answer:
    """One request's.

    Attributes:
        seconds: From the request to the last byte.
        met: How it met its stack.
        compose_s: Seconds that composing took.
    """

    seconds: float
    met: str
    compose_s: float


class Client:
    """One caller, with a connection that stays open."""

    def __init__(self, url: str, steps: int) -> None:
        self._address = urlsplit(url).netloc
        self._steps = steps
        self._connection = http.client.HTTPConnection(self._address, timeout=300)

    def ask(self, stack: int, seed: int) -> Answer:
        loras = [{"name": name, "strength": 0.8} for name in names_of(stack)]
        body = {"prompt": "a lighthouse", "seed": seed, "steps": self._steps, "loras": loras}
        started = time.perf_counter()
        self._connection.request(
            "POST", "/pictures", json.dumps(body), {"content-type": "application/json"}
        )
        response = self._connection.getresponse()
        content = response.read()
        seconds = time.perf_counter() - started
        if response.status != 200:
            raise SystemExit(f"status {response.status}: {content.decode()}")
        headers = response.headers
        return Answer(seconds, headers["qwenlora-set"], float(headers["qwenlora-compose-s"]))


def names_of(stack: int) -> list[str]:
    """Its LoRAs, as `qwenlora_serve.samples` names them."""
    first = LORAS_OF_STACK * stack
    return [f"sample-{number:02}" for number in range(first, first + LORAS_OF_STACK)]


class Load:
    """Clients of one application, and what they found with one number of stacks."""

    def __init__(self, url: str, stacks: int, args: argparse.Namespace) -> None:
        self._stacks = stacks
        self._draw = random.Random(stacks)
        self._clients = [Client(url, args.steps) for _ in range(args.clients)]
        self._answers: list[Answer] = []
        self._rates: list[float] = []
        self._asked = 0

    def warm(self) -> None:
        """Ask for each stack, a few times."""
        self._ask_all([number % self._stacks for number in range(max(3 * self._stacks, 12))])

    def round(self, requests: int) -> None:
        """Ask for stacks as they are drawn, and measure."""
        drawn = [self._draw.randrange(self._stacks) for _ in range(requests)]
        started = time.perf_counter()
        self._answers += self._ask_all(drawn)
        self._rates.append(requests / (time.perf_counter() - started))

    def row(self) -> dict[str, Any]:
        """Everything that was measured; a rate is the median of the rounds'."""
        answers = self._answers
        composed = [answer.compose_s for answer in answers if answer.met != "in-place"]
        new = [answer.compose_s for answer in answers if answer.met == "new"]
        return {
            "stacks": self._stacks,
            "requests": len(answers),
            "requests_per_s": statistics.median(self._rates),
            "slowest_per_s": min(self._rates),
            "fastest_per_s": max(self._rates),
            "in_place": sum(answer.met == "in-place" for answer in answers) / len(answers),
            "held": sum(answer.met != "new" for answer in answers) / len(answers),
            "compose_median_s": statistics.median(composed) if composed else None,
            "compose_new_median_s": statistics.median(new) if new else None,
            "median_s": statistics.median(answer.seconds for answer in answers),
        }

    def _ask_all(self, stacks: Sequence[int]) -> list[Answer]:
        """Every client takes the next one that is left, with a seed of its own."""
        left = iter(list(enumerate(stacks, self._asked)))
        self._asked += len(stacks)

        def ask_on(client: Client) -> list[Answer]:
            return [client.ask(stack, seed) for seed, stack in left]

        with ThreadPoolExecutor(len(self._clients)) as threads:
            return [answer for own in threads.map(ask_on, self._clients) for answer in own]


@contextlib.contextmanager
def application(routing: str, port: int, args: argparse.Namespace) -> Iterator[str]:
    """Write LoRAs, start an application on them, and end it; gives its URL."""
    with tempfile.TemporaryDirectory() as scratch:
        loras = Path(scratch) / "loras"
        count = LORAS_OF_STACK * max(args.stacks)
        program = [sys.executable, "-m"]
        samples = [*program, "qwenlora_serve.samples", loras]
        subprocess.run(
            [*samples, "--count", str(count), "--rank", str(args.rank)],
            cwd=EXAMPLE,
            check=True,
            stdout=subprocess.DEVNULL,
        )
        of_stack = LORAS_OF_STACK * (loras / "sample-00.safetensors").stat().st_size
        options = {
            "port": port,
            "routing": routing,
            "stacks": HELD_BY_REPLICA,
            "waiting": args.waiting,
            # What is not held is not in the caches either.
            "cache-bytes": HELD_BY_REPLICA * of_stack + BASE_BYTES,
        }
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        log = Path(scratch) / "log"
        with log.open("wb") as output:
            server = subprocess.Popen(
                [*program, "qwenlora_serve", loras, *words],
                cwd=EXAMPLE,
                stdout=output,
                stderr=output,
            )
        try:
            wait_for(server, log)
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()
            server.wait(60)


def wait_for(server: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until an application answers."""
    end = time.monotonic() + STARTED_S
    while "ready at" not in log.read_text(encoding="utf-8"):
        if server.poll() is not None or time.monotonic() > end:
            raise SystemExit(log.read_text(encoding="utf-8"))
        time.sleep(0.1)


def show(row: dict[str, Any]) -> None:
    """One line of the table."""
    composed, new = (
        "-" if row[key] is None else f"{1e3 * row[key]:.1f}"
        for key in ("compose_median_s", "compose_new_median_s")
    )
    print(
        f"{row['routing']:>10} {row['stacks']:7} {row['requests_per_s']:9.1f}"
        f" {row['slowest_per_s']:7.1f} {row['fastest_per_s']:7.1f}"
        f" {row['in_place']:9.1%} {row['held']:7.1%} {composed:>12} {new:>12}"
        f" {1e3 * row['median_s']:10.0f}",
        flush=True,
    )


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", help="an application that runs already")
    parser.add_argument("--stacks", type=int, nargs="+", default=[1, 4, 32])
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--requests", type=int, default=64, help="of one round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--waiting", type=int, default=2, help="most requests in one replica")
    parser.add_argument("--port", type=int, default=8765, help="the first of two")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def main() -> None:
    args = parsed()
    print(
        f"{os.cpu_count()} cores, {args.clients} clients, {args.rounds} rounds of"
        f" {args.requests} requests, {args.waiting} in a replica at most"
    )
    print(
        f"{'routing':>10} {'stacks':>7} {'a second':>9} {'from':>7} {'to':>7} {'in place':>9}"
        f" {'held':>7} {'compose, ms':>12} {'new, ms':>12} {'median, ms':>10}"
    )
    rows = []
    with contextlib.ExitStack() as running:
        urls = {"as it runs": args.url} if args.url else started(running, args)
        for stacks in args.stacks:
            loads = {routing: Load(url, stacks, args) for routing, url in urls.items()}
            for load in loads.values():
                load.warm()
            for _ in range(args.rounds):
                for load in loads.values():
                    load.round(args.requests)
            for routing, load in loads.items():
                rows.append({"routing": routing, **load.row()})
                show(rows[-1])
    if args.json:
        args.json.write_text(json.dumps({"rows": rows}, indent=1), encoding="utf-8")


def started(running: contextlib.ExitStack, args: argparse.Namespace) -> dict[str, str]:
    """Start an application for each routing; their URLs."""
    return {
        routing: running.enter_context(application(routing, port, args))
        for port, routing in enumerate(ROUTINGS, args.port)
    }


if __name__ == "__main__":
    main()
