"""`make demo`: fine-tunes a real 135M chat model on dictionary glosses, beside Transformers + PEFT + bitsandbytes."""

import logging

# It reports, at every start, a GPU-hub kernel that it could not load and does not need.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
