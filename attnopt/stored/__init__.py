"""Programs as JSON and safetensors: written, and read back without running anything of the file.

expressions.py   sizes: symbols and arithmetic
calls.py         how the source is called, and what it returns
graphs.py        the ATen graph, its ops from an allow-list
programs.py      all of it together, with the weights beside it
"""

from attnopt.stored.programs import read_program as read_program
from attnopt.stored.programs import write_program as write_program
