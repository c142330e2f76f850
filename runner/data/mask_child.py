"""`python -m runner.data.mask_child PARENT`: masks rows for a training process; see `shards`."""

from __future__ import annotations

import os
import sys
from multiprocessing.connection import Connection

from runner.data.shards import serve
from runner.processes import die_with_parent


def main() -> int:
    """Serve the parent through the socket that is stdin, and end with it."""
    die_with_parent(int(sys.argv[1]))
    connection: Connection = Connection(os.dup(0))
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    serve(connection)
    return 0


if __name__ == "__main__":
    sys.exit(main())
