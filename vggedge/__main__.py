"""``python -m vggedge``: the command line where the ``vggedge`` script is not on the path."""

from __future__ import annotations

from vggedge.cli import main

if __name__ == "__main__":
    main()
