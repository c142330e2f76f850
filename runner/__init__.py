"""A YAML-recipe-driven runner of supervised fine-tuning experiments."""

import logging

# bitsandbytes 0.50 warns at every import, also where nothing is 4-bit, that a faster CPU kernel
# could be downloaded.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

__version__ = "0.1.0"
