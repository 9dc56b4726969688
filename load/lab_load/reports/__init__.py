"""A run's figures as JSON, text, Markdown and HTML, and two runs compared. Knows records; sends nothing."""
