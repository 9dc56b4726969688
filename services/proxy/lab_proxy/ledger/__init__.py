"""Usage and cost: prices, charges, usage rows, reconciliation. Knows key ids and token counts; no requests."""
