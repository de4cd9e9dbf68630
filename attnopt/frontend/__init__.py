"""Capture: an existing model becomes a Program."""

from attnopt.frontend.capturing import capture as capture
from attnopt.frontend.cleanup import at_device as at_device
from attnopt.frontend.cleanup import at_dtype as at_dtype

__all__ = ["at_device", "at_dtype", "capture"]
