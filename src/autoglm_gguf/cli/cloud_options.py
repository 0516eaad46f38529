"""Options for a cloud that is asked when this device is not enough, and the model they make."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from autoglm_gguf.cli import options, output
from autoglm_gguf.errors import DoesNotFitError
from autoglm_gguf.hub import EMBEDDED
from autoglm_gguf.hybrid.policy import HybridPolicy
from autoglm_gguf.messages import Route
from autoglm_gguf.session import AutoGLM

if TYPE_CHECKING:  # HTTPX takes longer to import than all else, and few need it
    from autoglm_gguf.hybrid.client import HybridClient
    from autoglm_gguf.hybrid.cloud import CloudModel

Model: TypeAlias = "AutoGLM | HybridClient"
_NEED_A_CLOUD = ("cloud_model", "cloud_api_key_env", "cloud_images", "escalate_below")


def add_cloud_options(parser: argparse.ArgumentParser) -> None:
    """Which cloud, what it may be sent, and when."""
    group = parser.add_argument_group(
        "cloud",
        "An OpenAI-compatible endpoint, asked when this device is not enough. Without "
        "--cloud-base-url nothing leaves the device.",
    )
    add = group.add_argument
    add("--cloud-base-url", metavar="URL", help="usually ends in /v1")
    add("--cloud-model", metavar="NAME", help="the model's name there")
    add("--cloud-api-key-env", metavar="NAME", help="the environment variable with the API key")
    add(
        "--cloud-images",
        action="store_true",
        default=None,
        help="requests with images may be sent too; without it they are answered here",
    )
    add(
        "--escalate-below",
        type=float,
        metavar="P",
        help="ask when the mean probability of an action's tokens is under P "
        f"(default: {HybridPolicy().escalate_below:g})",
    )


def read_cloud(arguments: argparse.Namespace) -> tuple[CloudModel, HybridPolicy] | None:
    """The cloud and the policy that the options name; None without a cloud.

    Raises:
        ValueError: An option that is missing, without use, or out of range.
    """
    if arguments.cloud_base_url is None:
        for name in _NEED_A_CLOUD:
            if getattr(arguments, name) is not None:
                raise ValueError(f"--{name.replace('_', '-')}: needs --cloud-base-url")
        return None
    if arguments.cloud_model is None:
        raise ValueError("--cloud-base-url: needs --cloud-model")
    from autoglm_gguf.hybrid.cloud import CloudModel

    cloud = CloudModel(
        arguments.cloud_base_url, arguments.cloud_model, api_key_env=arguments.cloud_api_key_env
    )
    given = {} if arguments.escalate_below is None else {"escalate_below": arguments.escalate_below}
    return cloud, HybridPolicy(send_images=bool(arguments.cloud_images), **given)


def load_model(
    arguments: argparse.Namespace,
    load: Callable[[argparse.Namespace], AutoGLM] = options.load_model,
) -> Model:
    """Load the model that the options name, with the cloud that they name, if they do.

    A model that does not fit is an error only without a cloud.

    Args:
        arguments: With the cloud options.
        load: Loads the model on this device.
    """
    given = read_cloud(arguments)  # before minutes are spent on loading
    if given is None:
        return load(arguments)
    from autoglm_gguf.hybrid.client import HybridClient
    from autoglm_gguf.hybrid.local import LocalModel, UnloadedModel

    local: LocalModel
    try:
        local = load(arguments)
        n_told = len(local.info.notes)
    except DoesNotFitError as error:
        local, n_told = UnloadedModel(Path(arguments.model or EMBEDDED).stem, error), 0
    model = HybridClient(local, *given)
    for remark in model.info.notes[n_told:]:
        output.note(f"note: {remark}")
    return model


def draw_route(route: Route | None) -> str:
    """Who answered and why, as a remark; empty without a cloud."""
    if route is None:
        return ""
    cached = ", kept from before" if route.cached else ""
    return f"[{route.source}{cached}: {route.reason}]"
