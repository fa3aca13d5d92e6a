"""What goes wrong between this program, its servers and its photos."""

from __future__ import annotations

import struct
import threading
import zlib

from PIL import Image

DAMAGED = (
    *(OSError, SyntaxError, struct.error, zlib.error, Image.DecompressionBombError),
    *(ValueError, TypeError, LookupError, AttributeError, OverflowError, EOFError),
    RuntimeError,  # of the AVIF plugin; and RecursionError, of deep JSON
)
"""What Pillow and parsers raise for damaged data."""
DECODING = threading.Lock()
"""Pillow has one switch for files that are cut off, for all threads."""


class ClientError(RuntimeError):
    """Something between this program and the server went wrong."""


class AddressError(ClientError):
    """The address of a server is none."""


class ServerUnreachableError(ClientError):
    """No ComfyUI answers at the address, it stopped answering, or something else answers."""


class TooLargeError(ClientError):
    """The server, or a proxy before it, takes no file of this size; another one may."""


class RunLostError(ServerUnreachableError):
    """The server died, stopped answering or was restarted during a run."""


class WorkflowError(ClientError):
    """The workflow file is not what the client needs."""


class PromptRejectedError(ClientError):
    """The server refused the workflow; the message carries its reasons per node."""


class ExecutionError(ClientError):
    """A node failed while the workflow ran; the message carries its error."""


class PromptInterruptedError(ClientError):
    """The run was interrupted, or taken out of the queue before it began."""
