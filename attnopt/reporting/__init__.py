"""What was found, changed and measured: as JSON of a versioned schema, and as a page to read."""

from attnopt.reporting.content import SCHEMA, content_of, schema
from attnopt.reporting.page import page
from attnopt.reporting.samples import samples

__all__ = ["SCHEMA", "content_of", "page", "samples", "schema"]
