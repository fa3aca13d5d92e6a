"""ComfyUI nodes: thin adapters between the host and the core in `diff_restorer/`."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from . import host
from .classifier import DiffRestorerDegradationClassifier
from .color import DiffRestorerColorFix
from .conditioning import DiffRestorerDegradationControl, DiffRestorerPromptProcessor
from .decode import DiffRestorerAwareVAEDecode
from .edit import DiffRestorerEditDegradation
from .folders import DiffRestorerFolderPhoto
from .loaders import DiffRestorerLoader, DiffRestorerNanoLoader
from .measure import DiffRestorerMeasure
from .routing import DiffRestorerSwitch
from .simulate import DiffRestorerSimulateDegradation
from .tiled import DiffRestorerTiledDiffusion


class DiffRestorerExtension(ComfyExtension):
    """The pack, as the host sees it."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        host.register_model_folder()
        return [
            DiffRestorerLoader,
            DiffRestorerNanoLoader,
            DiffRestorerPromptProcessor,
            DiffRestorerDegradationControl,
            DiffRestorerAwareVAEDecode,
            DiffRestorerDegradationClassifier,
            DiffRestorerEditDegradation,
            DiffRestorerColorFix,
            DiffRestorerSimulateDegradation,
            DiffRestorerMeasure,
            DiffRestorerTiledDiffusion,
            DiffRestorerSwitch,
            DiffRestorerFolderPhoto,
        ]
