"""Select-MoE: choose fine-tuning data with a mixture-of-experts judge, and find out whether the choice beat a random one.

Run ``selectmoe --help``. One stage is one module with one ``run(config)``; see docs/design.md.
"""

import os

__version__ = "0.1.0"

# Read by MKL at its first use: the same bits whatever the number of threads (docs/design.md, "Resume").
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")

# Arrow's own allocator keeps some 80 MB that it has once held; the system's gives them back (docs/performance.md).
os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")
