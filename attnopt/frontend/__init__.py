"""Capture: an existing model becomes a Program."""

from attnopt.frontend.capturing import capture as capture
from attnopt.frontend.cleanup import at_device as at_device

__all__ = ["at_device", "capture"]
