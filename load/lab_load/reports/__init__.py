"""Figures of a run as JSON, text, Markdown and HTML; comparison of runs. Knows records; sends nothing."""
