"""``autoglm-gguf act``: a task and a screenshot to one action."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from autoglm_gguf.cli import options, output
from autoglm_gguf.cli.plan import draw_memory, memory_as_json


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Describe the command."""
    parser = commands.add_parser("act", help="choose the next action for a task")
    options.add_model_options(parser)
    parser.add_argument("--task", required=True, help="what the user wants")
    parser.add_argument("--screenshot", metavar="PNG", help="the phone's screen")
    parser.add_argument("--current-app", metavar="NAME", help="shown to the model")
    parser.add_argument("--no-system", action="store_true", help="leave the system prompt out")
    parser.add_argument("--json", action="store_true", help="print the step as JSON")
    options.add_sampling_options(parser, max_tokens=512)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Print thinking and action."""
    sampling = options.sampling_arguments(arguments)
    with options.load_model(arguments) as model:
        step = model.act(
            arguments.task,
            arguments.screenshot,
            system=None if arguments.no_system else "auto",
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
            "usage": asdict(step.usage),
            "timings": asdict(step.timings),
        }
        output.write_json(facts if memory is None else {**facts, "memory": memory})
        return
    output.note(output.dim(f"thinking: {step.thinking}"))
    output.write(step.action.render())
    for line in lines:
        output.note(line)
