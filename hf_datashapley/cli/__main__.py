"""`python -m hf_datashapley.cli`, which is what `accelerate launch -m` needs."""

import sys

from .main import main


sys.exit(main())
