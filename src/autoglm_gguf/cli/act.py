"""``autoglm-gguf act``: a task and a screenshot to one action."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from autoglm_gguf.annotate import annotate
from autoglm_gguf.cli import cloud_options, options, output
from autoglm_gguf.cli.plan import draw_memory, memory_as_json
from autoglm_gguf.config import CONSTRAIN_ACTION
from autoglm_gguf.session import ACT_MAX_TOKENS, AUTO_SYSTEM
from autoglm_gguf.vision import open_image


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Describe the command."""
    parser = commands.add_parser("act", help="choose the next action for a task")
    options.add_model_options(parser)
    parser.add_argument("--task", required=True, help="what the user wants")
    parser.add_argument("--screenshot", metavar="PNG", help="the phone's screen")
    parser.add_argument("--current-app", metavar="NAME", help="shown to the model")
    parser.add_argument("--no-system", action="store_true", help="leave the system prompt out")
    parser.add_argument("--json", action="store_true", help="print the step as JSON")
    parser.add_argument(
        "--annotate", metavar="PNG", help="write the screenshot with the tap or swipe drawn on it"
    )
    options.add_sampling_options(parser, max_tokens=ACT_MAX_TOKENS)
    cloud_options.add_cloud_options(parser)
    parser.add_argument(
        "--no-constrain",
        dest="constrain",
        action="store_const",
        const=None,
        default=CONSTRAIN_ACTION,
        help="let the model write what it will, an invalid action too",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Print thinking and action."""
    sampling = options.sampling_arguments(arguments)
    if arguments.annotate is not None:
        _check_drawing(arguments)
    with cloud_options.load_model(arguments) as model:
        step = model.act(
            arguments.task,
            arguments.screenshot,
            system=None if arguments.no_system else AUTO_SYSTEM,
            current_app=arguments.current_app,
            **sampling,
        )
        memory = memory_as_json(model) if arguments.stats else None
        lines = [*draw_memory(model)] if arguments.stats else []
    if arguments.json:
        facts = {
            "thinking": step.thinking,
            "action": {"name": step.action.name, **step.action.arguments},
            "rendered": step.action.render(),
            "finish_reason": step.finish_reason,
            "usage": asdict(step.usage),
            "timings": asdict(step.timings),
        }
        if step.route is not None:
            facts["route"] = asdict(step.route)
        output.write_json(facts if memory is None else {**facts, "memory": memory})
    else:
        output.note(output.dim(f"thinking: {step.thinking}"))
        if step.route is not None:
            output.note(output.dim(cloud_options.draw_route(step.route)))
        output.write(step.action.render())
        for line in lines:
            output.note(line)
    if step.finish_reason == "length":
        output.note("note: tokens ran out, so the answer was cut short; raise --max-tokens")
    if arguments.annotate is not None:
        annotate(open_image(arguments.screenshot), step.action).save(arguments.annotate)


def _check_drawing(arguments: argparse.Namespace) -> None:
    """Refuse what could not be drawn before minutes are spent on the answer."""
    if arguments.screenshot is None:
        raise ValueError("--annotate: needs --screenshot, to draw on")
    path = Path(arguments.annotate)
    if path.suffix.lower() not in (".png", ".jpg", ".jpeg"):
        raise ValueError(f"--annotate {path}: not a .png or .jpg file")
    if not path.parent.is_dir():
        raise ValueError(f"--annotate {path}: no such directory")
