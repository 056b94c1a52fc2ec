"""Before anything is imported that looks at it once: no test asks the Hub."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
