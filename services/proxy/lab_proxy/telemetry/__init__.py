"""Records of requests: metrics, traces, access log. Knows numbers and names; no prompts, answers or keys."""
