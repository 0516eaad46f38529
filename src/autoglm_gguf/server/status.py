"""``/status``: what a page shows beside a conversation, and what it needs to hold one.

Answered while the model is being loaded too: what is not known yet is null.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from autoglm_gguf.actions import SYSTEM_PROMPT_EN, SYSTEM_PROMPT_ZH
from autoglm_gguf.server.service import Service


def describe_status(service: Service) -> dict[str, Any]:
    """How the server is: model, sizes, notes, limits, queue, memory in bytes."""
    holder, params = service.holder, service.params
    backend = holder.backend if holder.state in ("ready", "stopping") else None
    info = backend.info if backend else None
    plan = info.plan if info else None
    usage = backend.memory() if backend else None
    return {
        "status": holder.state,
        "model": info.name if info else None,
        "n_ctx": info.n_ctx if info else None,
        "takes_images": backend is not None and backend.takes_images,
        "max_image_tokens": info.max_image_tokens if info else None,
        "notes": list(info.notes) if info else [],
        "limits": {
            "max_body_bytes": params.max_body_bytes,
            "max_image_pixels": params.max_image_pixels,
        },
        "system_prompts": {"zh": SYSTEM_PROMPT_ZH, "en": SYSTEM_PROMPT_EN},
        "queue": {"waiting": service.queue.n_waiting, "running": not service.queue.is_idle},
        "memory": {
            "budget_bytes": plan.budget_bytes if plan else None,
            "planned_bytes": plan.peak_bytes if plan else None,
            "planned_phase_bytes": plan.phase_bytes if plan else None,
            "measured": {**asdict(usage), "total_bytes": usage.total_bytes} if usage else None,
        },
    }
