"""Open a file by the node that users load it with: `python -m training.opening FILE`."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from tools import environment, in_process
from tools.ending import in_words


@in_words
def main(file: Path) -> None:
    """Raises the node's own error, whose message says what is wrong with the file."""
    with tempfile.TemporaryDirectory() as base:
        in_process.import_host(environment.comfyui_root(), Path(base).resolve(), cpu=True)
        folder = Path(base, "models/diff_restorer")
        folder.mkdir(parents=True)
        folder.joinpath(file.name).symlink_to(file.resolve())
        in_process.load_pack()
        in_process.execute("DiffRestorerLoader", file=file.name)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
