"""GRPO on a small mixture of experts, with and without routing replay (`make demo`).

python -m examples.grpo_tiny [--model DIR]

Serves `graphs/rollout.yaml` on a local Ray of its own, lets a trainer actor take a few GRPO
steps against it and shows what replay does. Exits with 1 if a step did not keep its promise.
"""

import argparse
import io
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import ray
import yaml
from pydantic import ValidationError
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.schema import ApplicationStatus, LoggingConfig, ServeDeploySchema
from rich.console import Console
from rich.text import Text
from transformers.utils.logging import disable_progress_bar

from examples.report import Board, StepReport, broken_promises, summary
from examples.tiny_moe import write_checkpoint
from examples.trainer import Trainer, TrainerArgs
from serve_app.config import RolloutArgs
from serve_app.errors import R3Error

ROOT = Path(__file__).resolve().parent.parent
GRAPH = ROOT / "graphs" / "rollout.yaml"
TINY = ROOT / "checkpoints" / "tiny-qwen3-moe"
PROMPTS = ROOT / "examples" / "prompts.txt"
READY_TIMEOUT_S = 120.0
POLL_S = 0.2


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="GRPO with routing replay on a served graph.")
    parser.add_argument(
        "--model", type=Path, help="local checkpoint of a supported family; a small one is made"
    )
    parser.add_argument("--steps", type=positive, default=5)
    parser.add_argument("--group", type=positive, default=4, help="rollouts a prompt")
    parser.add_argument("--new-tokens", type=positive, default=32, help="tokens sampled a rollout")
    parser.add_argument(
        "--pack",
        type=positive,
        default=8,
        help="rollouts in a row of the trainer; 1 for families that cannot keep them apart",
    )
    parser.add_argument(
        # Small matrices gain nothing from more threads, and on a busy machine lose minutes.
        "--cpus",
        type=float,
        default=0.25,
        help="of the trainer; Ray gives it as many threads, at least one",
    )
    parser.add_argument("--lr", type=float, help="3e-4 for the small model, 1e-6 for others")
    args = parser.parse_args()
    try:
        args.config = graph_config(args.model)
    except ValidationError as error:
        parser.error(str(error))
    return args


def positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, got {number}")
    return number


def graph_config(model: Path | None) -> dict[str, Any]:
    """Read the graph's config, with our model in it and a port that is free."""
    config: dict[str, Any] = yaml.safe_load(GRAPH.read_text())
    engine = config["applications"][0]["args"]["engine"]
    engine["model"] = str((model or write_checkpoint(TINY)).resolve())
    RolloutArgs.model_validate(config["applications"][0]["args"])
    http = config["http_options"]
    http["port"] = free_port(http["host"], http["port"])
    return config


def free_port(host: str, wanted: int) -> int:
    """Return the wanted port, or another one if somebody listens there."""
    for port in (wanted, 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise RuntimeError(f"no free port on {host}")


@contextmanager
def local_ray(board: Board) -> Iterator[None]:
    """A cluster of our own, quiet, that is gone afterwards with everything that runs in it."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    board.now("starting Ray")
    try:
        with interrupts_held_back():
            ray.init(
                address="local",
                num_cpus=max(2, os.cpu_count() or 1),
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.WARNING,
            )
        # After ray.init, which sets a handler of its own. Ray's calls can be left by a
        # KeyboardInterrupt and by nothing else.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        yield
    finally:
        # A second Ctrl-C would leave half of the processes behind.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        board.now("stopping Serve and Ray")
        # Ray prints as an error that the controller, asked to stop, has stopped.
        with redirect_stdout(io.StringIO()):
            if ray.is_initialized():
                serve.shutdown()  # type: ignore[no-untyped-call]
            ray.shutdown()


@contextmanager
def interrupts_held_back() -> Iterator[None]:
    """Let Ctrl-C wait: Ray, stopped while it starts, would leave processes behind for a while."""
    came: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: came.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if came:
        raise KeyboardInterrupt


def deploy(config: dict[str, Any]) -> None:
    """Serve a config file's content the way `serve run FILE` does, and wait until it runs."""
    quiet = LoggingConfig(log_level="WARNING")
    schema = ServeDeploySchema.model_validate({**config, "logging_config": quiet.model_dump()})
    serve.start(
        proxy_location=schema.proxy_location,
        http_options=schema.http_options.model_dump(),
        logging_config=quiet,
    )
    # What `serve run` calls; the public way to deploy a config needs the dashboard.
    client = _get_global_client()
    assert client is not None
    client.deploy_apps(schema)
    wait_until_running([app.name for app in schema.applications])


def wait_until_running(apps: list[str]) -> None:
    deadline = time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < deadline:
        found = serve.status().applications
        states = {name: found[name].status for name in apps if name in found}
        for name, state in states.items():
            if state in (ApplicationStatus.DEPLOY_FAILED, ApplicationStatus.UNHEALTHY):
                reasons = [each.message for each in found[name].deployments.values()]
                sys.exit("\n".join([f"FAILED to serve {name}: {found[name].message}", *reasons]))
        if [states.get(name) for name in apps] == [ApplicationStatus.RUNNING] * len(apps):
            return
        time.sleep(POLL_S)
    sys.exit(f"FAILED: {apps} did not run within {READY_TIMEOUT_S:.0f} s: {serve.status()}")


def start_trainer(args: argparse.Namespace) -> Any:
    app = args.config["applications"][0]
    suitable_rate = 3e-4 if args.model is None else 1e-6
    actor: Any = ray.remote(Trainer)
    return actor.options(num_cpus=args.cpus).remote(
        TrainerArgs(
            app=app["name"],
            model=Path(app["args"]["engine"]["model"]),
            prompts=tuple(PROMPTS.read_text().splitlines()),
            group=args.group,
            new_tokens=args.new_tokens,
            pack=args.pack,
            learning_rate=suitable_rate if args.lr is None else args.lr,
        )
    )


def train(trainer: Any, steps: int, board: Board) -> list[StepReport]:
    reports: list[StepReport] = []
    for news in map(ray.get, trainer.steps.remote(steps)):
        if isinstance(news, StepReport):
            reports.append(news)
            board.add(news)
        else:
            board.now(f"step {len(reports) + 1} of {steps}: {news}")
    return reports


def demo(args: argparse.Namespace, console: Console) -> int:
    with Board(console) as board, local_ray(board):
        trainer = start_trainer(args)
        board.now(f"serving {GRAPH.relative_to(ROOT)}")
        deploy(args.config)
        reports = train(trainer, args.steps, board)
    console.print(summary(reports), highlight=False)
    broken = broken_promises(reports)
    for line in broken:
        console.print(f"[bold red]FAILED[/] {line}")
    return 1 if broken else 0


def main() -> int:
    # Where output is a file, rich would wrap the table at 80 columns.
    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else 120)
    disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        return demo(arguments(), console)
    except R3Error as error:
        # Ray's text of it is a traceback of the trainer; the error itself says what is wrong.
        console.print("[bold red]FAILED[/]", Text(str(getattr(error, "cause", error))))
        return 1
    except KeyboardInterrupt:
        console.print("Stopped before its end, as asked.")
        return 130


if __name__ == "__main__":
    sys.exit(main())
