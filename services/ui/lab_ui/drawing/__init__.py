"""Parts that several pages draw: faults, the key, code, charts, tokens. Knows Streamlit; has no logic of a page."""
