"""What is handed back: a directory that plain Transformers loads, with the proof beside it."""

from attnopt.artifacts.loading import load as load
from attnopt.artifacts.saving import save as save
