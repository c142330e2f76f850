"""The training process. Nothing outside this package imports torch; nothing in it launches processes."""

import logging

# bitsandbytes 0.50 warns at every import, also where nothing is 4-bit, that a faster CPU kernel could be downloaded.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
