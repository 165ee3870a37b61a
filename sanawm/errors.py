"""Exceptions that a user can cause and mend."""


class UserError(Exception):
    """A mistake in what the user gave.

    The message is one sentence or a short report: what was expected, what was found, and what to do. Command lines print it without a
    traceback and exit with code 2.
    """


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged, or not a SANA-WM checkpoint."""


class CameraError(UserError):
    """Poses, intrinsics or actions that cannot be used."""


class BundleError(UserError):
    """A bundle that is damaged, tampered with, or not for this machine."""


class InputError(UserError):
    """An image, prompt or length that cannot be used."""


class EngineError(UserError):
    """A missing or unsuitable engine library, or a failure inside an engine."""
