"""``autoglm-gguf serve``: a model behind OpenAI's API, a WebSocket and a page.

Options, and what a person is told; the server is ``autoglm_gguf.server``. All of it but its
parameters is imported when it is asked for, since its packages are an extra.
"""

from __future__ import annotations

import argparse
import logging
import os
import threading
from functools import partial
from typing import TYPE_CHECKING, Any

from autoglm_gguf.cli import cloud_options, options, output
from autoglm_gguf.errors import AutoGLMError
from autoglm_gguf.server.params import CONSTRAIN_ACTIONS, KEY_VARIABLE, ServerParams
from autoglm_gguf.session import AutoGLM
from autoglm_gguf.units import format_bytes, parse_bytes

if TYPE_CHECKING:
    from autoglm_gguf.server.service import Service


class ServerMissingError(AutoGLMError):
    """The packages of the ``server`` extra are not installed."""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Describe the command."""
    parser = commands.add_parser("serve", help="serve OpenAI's API, a WebSocket and a web page")
    options.add_model_options(parser)
    cloud_options.add_cloud_options(parser)
    parser.set_defaults(content_format="string", run=run)
    add, default = parser.add_argument, ServerParams()
    add("--host", default=default.host, help="address to listen on (default: %(default)s)")
    add(
        "--port",
        type=int,
        default=default.port,
        metavar="N",
        help="default: %(default)s; 0: a free one",
    )
    add(
        "--api-key",
        metavar="KEY",
        help=f"what clients must send; better set in the environment: {KEY_VARIABLE}",
    )
    add("--allow-no-key", action="store_true", help="listen on a network without a key")
    many = partial(add, action="append", default=[])
    many("--allow-host", metavar="NAME", help="a name by which clients call this server")
    many("--allow-origin", metavar="ORIGIN", help="a web page that may use it: https://name")
    add(
        "--constrain-actions",
        choices=CONSTRAIN_ACTIONS,
        default=default.constrain_actions,
        help="hold chat answers to valid actions: where the system prompt speaks of them, "
        "always, never (default: %(default)s)",
    )
    number = partial(add, type=int, metavar="N")
    number(
        "--max-queue",
        default=default.max_queue,
        help="requests that may wait (default: %(default)s)",
    )
    number("--max-tokens", help="of one answer at most (default: what n_ctx leaves)")
    number("--max-images", default=default.max_images, help="of one request (default: %(default)s)")
    number("--max-image-pixels", default=default.max_image_pixels, help="default: %(default)s")
    add(
        "--max-body",
        type=_size,
        default=default.max_body_bytes,
        metavar="SIZE",
        help=f"of one request (default: {default.max_body_bytes >> 20}MiB)",
    )
    add("--fetch-images", action="store_true", help="take http(s) image addresses, public ones")
    add(
        "--shutdown-seconds",
        type=float,
        default=default.shutdown_s,
        metavar="S",
        help="for the last answer",
    )


def run(arguments: argparse.Namespace) -> None:
    """Serve until a signal."""
    try:
        from autoglm_gguf.server.running import serve
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("autoglm_gguf"):
            raise
        raise ServerMissingError(
            f"{error.name}: not installed, and serve needs it",
            hint="pip install 'autoglm-gguf[server]'",
        ) from error
    params = _params(arguments)
    cloud_options.read_cloud(arguments)  # wrong options are told before anything listens
    logging.getLogger("autoglm_gguf.server").setLevel(logging.INFO)
    logging.getLogger("uvicorn").setLevel(logging.CRITICAL)  # what it logs, the server tells itself
    serve(
        partial(cloud_options.load_model, arguments, _load),
        params,
        on_listening=partial(_listening, params),
        on_loaded=partial(_loaded, arguments.stats),
        on_stop=partial(_end_in_time, params.shutdown_s),
    )


def _params(arguments: argparse.Namespace) -> ServerParams:
    given = arguments.api_key  # an empty one is an error: a script meant to give one
    return ServerParams(
        host=arguments.host,
        port=arguments.port,
        api_key=os.environ.get(KEY_VARIABLE) or None if given is None else given,
        allow_no_key=arguments.allow_no_key,
        allowed_hosts=tuple(arguments.allow_host),
        allowed_origins=tuple(arguments.allow_origin),
        constrain_actions=arguments.constrain_actions,
        max_queue=arguments.max_queue,
        max_body_bytes=arguments.max_body,
        max_images=arguments.max_images,
        max_image_pixels=arguments.max_image_pixels,
        max_tokens=arguments.max_tokens,
        fetch_images=arguments.fetch_images,
        shutdown_s=arguments.shutdown_seconds,
    )


def _load(arguments: argparse.Namespace) -> AutoGLM:
    """This device's model; n_ctx and image tokens, where not given, as the phone agent needs."""
    from autoglm_gguf.server.sizes import REQUEST_BYTES, choose_sizes

    model, mmproj = options.find_model(arguments)
    given = options.memory_arguments(arguments)
    budget = given.pop("memory_budget")
    sizes = choose_sizes(model, mmproj, budget, given)
    if sizes.reason:
        output.note(f"note: {sizes.reason}")
    chosen = {**vars(arguments), **sizes.context, "model": model, "mmproj": mmproj}
    return options.load_model(argparse.Namespace(**chosen), reserved_bytes=REQUEST_BYTES)


def _listening(params: ServerParams, address: str) -> None:
    output.note(f"listening on {address}; the model is being loaded")
    if params.api_key is None and params.allow_no_key:
        output.note("warning: no API key; whoever reaches this port can use the model")


def _loaded(stats: bool, service: Service) -> None:
    from autoglm_gguf.cli.plan import draw_memory

    backend = service.ready()
    info = backend.info
    output.note(f"ready: {info.name}, n_ctx {info.n_ctx}; Ctrl-C ends")
    usage = backend.memory()
    if usage is not None:
        budget = info.plan.budget_bytes if info.plan else None
        of = "" if budget is None else f" of {format_bytes(budget)}"
        output.note(f"memory: {format_bytes(usage.total_bytes)}{of}")
    if stats:
        for line in draw_memory(backend):
            output.note(line)


def _end_in_time(shutdown_s: float) -> None:
    """Told of the first signal: whatever happens, the process ends."""
    output.note("ending; a second signal ends at once")
    # Twice: for the answer to go on, and to be ended. What is left then hangs in native code.
    watchdog = threading.Timer(2 * shutdown_s + 10.0, partial(os._exit, 1))
    watchdog.daemon = True
    watchdog.start()


def _size(text: str) -> Any:
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
