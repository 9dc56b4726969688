"""One request, from parsed body to answer: plan, cache lookup, fetch, delivery, billing. Knows nothing of HTTP."""
