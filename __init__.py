"""Diff-Restorer for ComfyUI: restores photographs with any mix of degradations.

Nothing of ComfyUI is imported until it asks for the nodes, so that the core, the training and
their tests can be used without it.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .nodes import DiffRestorerExtension

WEB_DIRECTORY = "./web"


async def comfy_entrypoint() -> DiffRestorerExtension:
    """Called by ComfyUI when it loads the pack."""
    try:
        from .nodes import DiffRestorerExtension
    except Exception:
        # ComfyUI logs one line of what fails here; the rest is what a bug report needs.
        logging.exception("Diff-Restorer could not be loaded.")
        raise
    return DiffRestorerExtension()
