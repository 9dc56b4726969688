"""Virtual keys: identity, storage, rate limits, budgets. Knows headers and token counts; nothing of answers."""
