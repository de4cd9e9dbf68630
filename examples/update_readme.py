"""Put the output of `examples/demo.sh`, as it is now, between the marks in README.md."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"(<!-- demo -->\n```console\n)(.*?)(```\n<!-- /demo -->)", re.DOTALL)


def main() -> int:
    """Run the demo and rewrite the block."""
    done = subprocess.run(
        ["bash", ROOT / "examples" / "demo.sh"], stdout=subprocess.PIPE, text=True, check=True
    )
    readme = ROOT / "README.md"
    shown = done.stdout.rstrip() + "\n"
    text = BLOCK.sub(lambda found: found[1] + shown + found[3], readme.read_text())
    readme.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
