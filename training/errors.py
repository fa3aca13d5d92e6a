"""What may end a run, beside settings (ValueError) and files (OSError) that are wrong."""


class DiskError(RuntimeError):
    """Too little disk, or a write that failed; earlier checkpoints are intact."""


class ResumeError(RuntimeError):
    """A run folder holds checkpoints, but none that this run can go on from."""


class NonFiniteError(RuntimeError):
    """A loss or gradient became NaN or infinite."""
