"""``python -m captum_llm_ext`` is the command ``captum-llm-ext``."""

from __future__ import annotations

import sys

from captum_llm_ext.cli import main

if __name__ == "__main__":
    sys.exit(main())
