"""`make demo`: fine-tunes a real 135M chat model on dictionary glosses, beside Transformers + PEFT + bitsandbytes."""
