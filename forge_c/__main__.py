"""python -m forge_c: the command line."""
import sys

from forge_c.cli import main

if __name__ == "__main__":
    sys.exit(main())
